"""The package itself: its imports, its exports, its docstrings."""

import inspect
import operator
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import flax_dropout_cell as fdc
import flax_dropout_cell.linen
import flax_dropout_cell.nnx

ROOT = Path(__file__).parents[2]
PUBLIC = {
    "Cell", "ConcreteDropout", "Description", "Dropout", "Entropies", "GRUParams", "GaussianNoise",
    "LRUParams", "LSTMParams", "LSTMState", "Masks", "MinGRUParams", "MinLSTMParams", "Noise",
    "RANDOM_STREAM", "RGLRUParams", "RecurrentDropout", "ScanExplanation", "Zoneout",
    "activation_regularization", "at_paths", "concrete_regularization", "describe", "draw_masks",
    "draw_step_masks", "dropout_cell", "dropout_scan", "embedding_dropout", "episode_ids",
    "explain_scan", "gaussian_kl", "gru_cell", "init_gru", "init_lru", "init_lstm", "init_min_gru",
    "init_min_lstm", "init_rg_lru", "lru_cell", "lstm_cell", "mc_entropies", "mc_samples",
    "min_gru_cell", "min_lstm_cell", "plot_masks", "recurrent_kernels", "register_noise",
    "rg_lru_cell", "scan", "temporal_activation_regularization", "undisturbed",
}  # fmt: skip


def test_the_api_page_has_every_public_name() -> None:
    groups = sorted((ROOT / "docs/api").glob("*.md"))
    page = "\n".join(path.read_text() for path in groups)
    assert ".. automodule:: flax_dropout_cell.recipes\n   :members:" in page
    found: dict[str, list[str]] = {}
    module = ""
    for kind, name in re.findall(r"^\.\. (currentmodule|auto\w+):: (\S+)", page, re.M):
        if kind == "currentmodule":
            module = name
        elif kind != "automodule":
            found.setdefault(module, []).append(name)
    own = [
        {
            name
            for name, value in vars(part).items()
            if not name.startswith("_") and inspect.isroutine(value) | inspect.isclass(value)
        }
        for part in (flax_dropout_cell.linen, flax_dropout_cell.nnx)
    ]
    names = ("flax_dropout_cell", "flax_dropout_cell.linen", "flax_dropout_cell.nnx")
    for name, wanted in zip(names, (PUBLIC, *own), strict=True):
        assert sorted(found[name]) == sorted(wanted), name


def test_what_a_release_is_made_of_agrees() -> None:
    assert f"\nversion: {fdc.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {fdc.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    workflows = [path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml")]
    assert len(workflows) == 4
    for workflow in workflows:
        assert "\npermissions:\n  contents: read\n" in workflow
        for action in re.findall(r"uses: (.*)", workflow):
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", action), action


@pytest.mark.parametrize("adapter", ["", "._flax.framework", "._flax.layer", "._flax.wrapper"])
def test_the_core_and_the_contract_of_adapters_do_not_import_flax(adapter: str) -> None:
    code = (
        f"import sys, flax_dropout_cell{adapter}; "
        "sys.exit(any(name.split('.')[0] in ('flax', 'optax') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_submodules_come_when_they_are_asked_for() -> None:
    code = "import flax_dropout_cell as fdc; print(fdc.linen.DropoutCell.__name__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "DropoutCell\n"


@pytest.mark.parametrize("module", [flax_dropout_cell.linen, flax_dropout_cell.nnx])
def test_names_of_flax_lead_to_their_modules(module) -> None:
    """`fdc.RNN` says to write `fdc.linen.RNN` or `fdc.nnx.RNN`."""
    names = {name for name in vars(module) if not name.startswith("_")}
    names -= {name for name in names if inspect.ismodule(getattr(module, name))} | set(vars(fdc))
    assert {"RNN", "RGLRUCell", "DropoutCarry", "core_params"} < names
    for name in names:
        with pytest.raises(AttributeError, match=f"write fdc.linen.{name} or fdc.nnx.{name}"):
            getattr(fdc, name)


def test_what_is_public() -> None:
    names = {name for name in vars(fdc) if not name.startswith("_")}
    modules = {name for name in names if inspect.ismodule(getattr(fdc, name))}
    assert names - modules == PUBLIC
    assert modules <= {"cells", "linen", "nnx", "noises", "recipes"}


@pytest.mark.parametrize(
    "module", [fdc, flax_dropout_cell.linen, flax_dropout_cell.nnx], ids=["core", "linen", "nnx"]
)
def test_everything_public_is_documented(module) -> None:
    for name, value in vars(module).items():
        if name.startswith("_") or not getattr(value, "__module__", "").startswith("flax_dropout"):
            continue
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        assert value.__doc__, name
        for member, attribute in vars(value).items():
            if inspect.isfunction(attribute) and not member.startswith("_"):
                if not attribute.__module__.startswith("flax_dropout"):
                    continue  # a default that is a function, such as an initializer of Flax's
                assert attribute.__doc__ or inspect.getdoc(getattr(value, member)), (name, member)


SIGNATURES = {
    "dropout_cell": "params, carry, x, rng, *, cell, dropout, masks=None, step=None, "
    "sequence_ids=None",
    "draw_masks": "params, carry, x, rng, *, cell, dropout, sequence_ids=None",
    "draw_step_masks": "params, carry, x, rng, num_steps, *, cell, dropout, start=0, "
    "sequence_ids=None",
    "dropout_scan": "params, carry, xs, rng, *, cell, dropout, masks=None, seq_lengths=None, "
    "valid=None, resets=None, reset_carry=None, sequence_ids=None, reverse=False, start=0, "
    "unroll=1, checkpoint_every=None, parallel=None",
    "mc_samples": "predict, rng, num_samples, *, chunk_size=None",
    "mc_entropies": "probabilities",
    "embedding_dropout": "table, ids, rng, *, keep_prob, per_example=False",
    "activation_regularization": "ys, *, seq_lengths=None, time_axis=0",
    "temporal_activation_regularization": "ys, *, time_axis, seq_lengths=None",
    "gaussian_kl": "mean, stddev",
    "concrete_regularization": "logit, kernel, *, length_scale, num_examples",
    "at_paths": "noise, *patterns",
    "recurrent_kernels": "noise",
    "linen.RNN": "cell, dropout, deterministic=False, time_major=False, return_carry=False, "
    "reverse=False, keep_order=False, unroll=1, checkpoint_every=None, parallel=None",
    "linen.RNN.__call__": "self, inputs, *, initial_carry=None, init_key=None, seq_lengths=None, "
    "valid=None, resets=None, sequence_ids=None, start=None, reset_carry=None, "
    "deterministic=None, rng=None, return_carry=None, time_major=None, reverse=None, "
    "keep_order=None",
    "nnx.RNN.__call__": "self, inputs, *, initial_carry=None, init_key=None, seq_lengths=None, "
    "valid=None, resets=None, sequence_ids=None, start=None, reset_carry=None, "
    "deterministic=None, rngs=None, return_carry=None, time_major=None, reverse=None, "
    "keep_order=None",
    "linen.DropoutCell": "cell, dropout, deterministic=False",
    "linen.RNNCellDropoutWrapper": "cell, input_keep_prob=1.0, output_keep_prob=1.0, "
    "state_keep_prob=1.0, variational_recurrent=False, input_size=None, dtype=None, seed=None, "
    "dropout_state_filter_visitor=None",
    "linen.Embed": "num_embeddings, features, keep_prob",
    "nnx.RNN.__init__": "self, cell, dropout, deterministic=False, *, time_major=False, "
    "return_carry=False, reverse=False, keep_order=False, unroll=1, checkpoint_every=None, "
    "parallel=None, rngs=None",
    "nnx.DropoutCell.__init__": "self, cell, dropout, deterministic=False, *, rngs=None",
    "nnx.RNNCellDropoutWrapper.__init__": "self, cell, input_keep_prob=1.0, output_keep_prob=1.0, "
    "state_keep_prob=1.0, variational_recurrent=False, input_size=None, dtype=None, seed=None, "
    "dropout_state_filter_visitor=None, broadcast_dims=(), deterministic=False, *, rngs=None",
    "describe": "params, carry, x, *, cell, dropout",
    "explain_scan": "step, init, xs=None, length=None",
    "Dropout": "*, keep_prob, variational=False, broadcast_dims=(), scale=True",
    "Zoneout": "*, prob, variational=False, broadcast_dims=()",
    "GaussianNoise": "*, stddev, variational=False, broadcast_dims=()",
    "ConcreteDropout": "*, logit, temperature=0.1, variational=False, broadcast_dims=()",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    """A change of a name, a default or an order breaks programs that are written already."""
    found = operator.attrgetter(name)(fdc)
    got, wanted = map(arguments, (found, eval(f"lambda {SIGNATURES[name]}: None")))
    if inspect.isclass(found):  # more fields may follow, those of Flax among them
        got = got[0][: len(wanted[0])], got[1]
    assert got == wanted


def arguments(function: Any) -> tuple[list[Any], dict[str, Any]]:
    """The arguments by place, in their order, and those by name; each with its default."""
    parameters = inspect.signature(function).parameters.values()
    return (
        [(it.name, it.kind, it.default) for it in parameters if it.kind != it.KEYWORD_ONLY],
        {it.name: it.default for it in parameters if it.kind == it.KEYWORD_ONLY},
    )


def test_dir_shows_public_names_and_help_lists_them() -> None:
    code = (
        "import flax_dropout_cell as fdc, sys; names = dir(fdc); "
        "assert not any(name.split('.')[0] == 'flax' for name in sys.modules); print(*names)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = set(ran.stdout.split())
    assert names == PUBLIC | {"linen", "nnx", "recipes", "__version__"}
    listed = inspect.getdoc(fdc) or ""
    groups = [line for line in listed.split("Read the package")[0].splitlines() if line[:2] == "- "]
    assert len(groups) > 5
    assert {name for name in names if f"`{name}`" not in listed} == set()


@pytest.mark.parametrize("module", [fdc.linen, fdc.nnx, fdc.recipes])
def test_dir_of_a_module_shows_its_public_names(module: Any) -> None:
    assert all(inspect.getmodule(getattr(module, name)) is not None for name in dir(module))
    assert not any(
        name.startswith("_") or inspect.ismodule(getattr(module, name)) for name in dir(module)
    )
    if module is not fdc.recipes:
        assert {name for name in dir(module) if f"`{name}`" not in (module.__doc__ or "")} == set()
        assert {"RNN", "DropoutCell", "LSTMCell"} <= set(dir(module))
    else:
        assert "gal2016" in dir(module) and "RecurrentDropout" not in dir(module)

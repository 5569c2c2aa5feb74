"""The package itself: what it imports, what it exports, what it documents."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flax_dropout_cell as fdc
import flax_dropout_cell.linen
import flax_dropout_cell.nnx

ROOT = Path(__file__).parents[1]
PUBLIC = {
    "Cell", "ConcreteDropout", "Description", "Dropout", "Entropies", "GRUParams", "GaussianNoise",
    "LSTMParams", "LSTMState", "Masks", "Noise", "RANDOM_STREAM", "RecurrentDropout", "Zoneout",
    "activation_regularization", "at_paths", "concrete_regularization", "describe",
    "draw_masks", "dropout_cell", "dropout_scan", "embedding_dropout", "gru_cell",
    "init_gru", "init_lstm", "lstm_cell", "mc_entropies", "mc_samples", "plot_masks",
    "recurrent_kernels", "register_noise", "temporal_activation_regularization", "undisturbed",
}  # fmt: skip


def test_the_api_page_has_every_public_name() -> None:
    page = (ROOT / "docs/api.md").read_text()
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
    assert len(workflows) == 3
    for workflow in workflows:
        assert "\npermissions:\n  contents: read\n" in workflow
        for action in re.findall(r"uses: (.*)", workflow):
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", action), action


def test_the_core_does_not_import_flax() -> None:
    code = (
        "import sys, flax_dropout_cell; "
        "sys.exit(any(name.split('.')[0] in ('flax', 'optax') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_submodules_come_when_they_are_asked_for() -> None:
    code = "import flax_dropout_cell as fdc; print(fdc.linen.DropoutCell.__name__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "DropoutCell\n"


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


@pytest.mark.parametrize("function", [fdc.dropout_cell, fdc.dropout_scan, fdc.draw_masks])
def test_signatures(function) -> None:
    """params, carry, x(s), rng by position; everything after by name."""
    parameters = list(inspect.signature(function).parameters.values())
    assert [p.name for p in parameters[:4]] in (
        ["params", "carry", "x", "rng"],
        ["params", "carry", "xs", "rng"],
    )
    assert all(p.kind == p.KEYWORD_ONLY for p in parameters[4:])

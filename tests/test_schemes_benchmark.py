"""The comparison of schemes: one budget for all, and a table that says what was measured."""

import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_dropout_cell as fdc

ROOT = Path(__file__).parent.parent


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield [importlib.import_module(f"scheme{name}") for name in ("s", "_tasks", "_tables")]


def make_task(tasks):
    """Sequences of two bits, of which each is the one before, turned round."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2, (8, 1, 2))
    series = ((first + np.arange(7)[None, :, None]) % 2).astype(np.float32)
    split = tasks.Split(series[:, :-1], series[:, 1:], np.array([6, 5, 4, 6, 6, 3, 6, 6], np.int32))

    def nlls(outputs, targets):
        return optax.sigmoid_binary_cross_entropy(outputs, targets).sum(-1)

    return tasks.Task((split,) * 3, 2, nlls, tasks.all_steps, True, "step", "made up")


def test_a_comparison_picks_by_validation_and_runs_all_seeds(modules):
    schemes, tasks, _ = modules
    config = schemes.Config(units=4, epochs=3, batch=4, mc_samples=2)
    # All but one keep next to nothing: no training can learn from that.
    scheme = schemes.Scheme("Gal", schemes.gal, (1e-6, 1.0, 1e-6, 1e-6), monte_carlo=True)
    row = schemes.compare(make_task(tasks), config, "lstm", scheme)
    assert row["strength"] == 1.0
    assert row["valid_nll_by_strength"][1] < row["valid_nll_by_strength"][0]
    assert row["seed"] == [0, 1, 2, 3, 4] and len(set(row["test_nll"])) == 5
    # The splits are one, and where all is kept, Monte Carlo is evaluation.
    np.testing.assert_allclose(row["valid_nll"], row["test_nll"], rtol=1e-5)
    curves = np.array(row["curves"])
    assert curves.shape == (5, 3, 2)
    np.testing.assert_allclose(curves[:, :, 1].min(1), row["valid_nll"], atol=1e-4)
    assert (1 + curves[:, :, 1].argmin(1)).tolist() == row["best_epoch"]


def test_padding_does_not_count(modules):
    schemes, tasks, _ = modules
    task = make_task(tasks)
    params = {
        "cell": fdc.init_gru(jax.random.key(0), 2, 4),
        "kernel": jnp.ones((4, 2)),
        "bias": jnp.zeros(2),
    }
    split = tasks.Split(*map(jnp.asarray, task.splits[0]))
    spec = schemes.SCHEMES["none"].noise(None, None)
    weights = task.weights(split.lengths, 6)
    assert weights.sum(1).tolist() == split.lengths.tolist()
    assert tasks.last_step(split.lengths, 6)[5].tolist() == [0, 0, 1, 0, 0, 0]
    torn = split._replace(inputs=jnp.where(weights[..., None] > 0, split.inputs, jnp.nan))
    outputs = [schemes.predict(params, part, None, fdc.gru_cell, spec) for part in (split, torn)]
    np.testing.assert_array_equal(*outputs)


def test_every_scheme_has_four_strengths_and_a_noise_of_each(modules):
    schemes, _, _ = modules
    for name, scheme in schemes.SCHEMES.items():
        assert len(set(scheme.strengths)) == (1 if name == "none" else 4)
        specs = [scheme.noise(strength, strength) for strength in scheme.strengths]
        assert len(set(specs)) == len(specs)


def make_row(scheme, test):
    return {
        "scheme": scheme,
        "cell": "lstm",
        "strength": 0.9,
        "test_nll": test,
    }


def test_the_table_compares_with_the_bare_model(modules):
    _, _, tables = modules
    report = {
        "unit": "step",
        "rows": [
            make_row("none", [8.0, 9.0, 10.0]),
            make_row("Gal, tied", [7.0, 8.0, 9.0]),
        ],
    }
    assert tables.format_table(report).splitlines()[2:] == [
        "| none | lstm |  | 9.00 ± 1.00 |  |",
        # Of two standard errors of 1 / sqrt(3), in quadrature.
        "| Gal, tied | lstm | 0.9 | 8.00 ± 1.00 | -1.00 (1.2 standard errors) |",
    ]


def test_chorales_are_cut_where_they_are_long(modules, tmp_path):
    _, tasks, _ = modules
    songs = [np.arange(length) for length in (129, 64, 66)]
    pieces = tasks.cut_long(songs, 64)
    assert [(int(piece[0]), len(piece)) for piece in pieces] == [
        (0, 65), (64, 65), (0, 64), (0, 65), (64, 2)
    ]  # fmt: skip
    predicted = [piece[1:] for piece in pieces]
    assert sum(map(len, predicted)) == sum(len(song) - 1 for song in songs)
    with pytest.raises(FileNotFoundError, match="must hold jsb_chorales"):
        tasks.load_chorales(None)


def test_stored_results_are_whole(modules):
    schemes, _, _ = modules
    for path in (ROOT / "docs/results").glob("schemes_*.json"):
        report = json.loads(path.read_text())
        assert {"task", "config", "device", "versions", "command"} <= set(report)
        for row in report["rows"]:
            assert row["scheme"] in schemes.SCHEMES
            assert len(row["test_nll"]) == len(row["valid_nll"]) == len(row["seed"]) == 5
            assert len(row["curves"][0]) == row["epochs"]

"""The benchmark of bands by scheme, and the sentences of docs/coverage.md that rest on it."""

import dataclasses
import importlib
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_dropout_cell as fdc

ROOT = Path(__file__).parents[2]
LEVELS = ("0.5", "0.8", "0.95")


@pytest.fixture
def bands(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("bands")


def test_crps_is_that_of_all_pairs(bands) -> None:
    rng = np.random.default_rng(0)
    samples, seen = rng.normal(3, 2, (7, 2, 3)), rng.normal(size=(2, 3))
    samples[1] = samples[4]  # ties count as pairs of equals
    for place in np.ndindex(seen.shape):
        xs, y = samples[:, *place], seen[place]
        error = sum(abs(x - y) for x in xs) / 7
        spread = sum(abs(x - other) for x in xs for other in xs) / 7**2
        np.testing.assert_allclose(bands.crps(samples, seen)[place], error - spread / 2, rtol=1e-12)


def test_crps_of_a_normal_distribution(bands) -> None:
    """The closed form of Gneiting and Raftery 2007, and what few samples add to it."""
    rng, count, trials, scale = np.random.default_rng(1), 10, 4000, 3.0
    samples = rng.normal(1, scale, (count, trials))
    seen = rng.normal(0, 4, trials)
    z = (seen - 1) / scale
    cdf = np.array([(1 + math.erf(each / math.sqrt(2))) / 2 for each in z])
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    exact = scale * (z * (2 * cdf - 1) + 2 * density - 1 / math.sqrt(math.pi))
    # Of the count**2 pairs, count are of a sample with itself, and add to the spread nothing.
    exact += scale / math.sqrt(math.pi) / count
    off = bands.crps(samples, seen) - exact
    assert abs(off.mean()) < 5 * off.std() / math.sqrt(trials)
    assert off.std() / math.sqrt(trials) < 0.01 * exact.mean()  # so that the bound says something


def test_the_benchmark_at_a_tiny_size_goes_on_from_its_rows(
    bands, monkeypatch, tmp_path, capsys
) -> None:
    """A row has bands, likelihood, error and CRPS; rows that are there stay as they are."""
    lstm, min_gru = bands.ROWS[0], bands.ROWS[5]
    monkeypatch.setattr("sys.argv", ["bands.py", "--quick", "--out", str(tmp_path)])
    monkeypatch.setattr(bands, "ROWS", (min_gru,))
    windows = [
        split._replace(past=split.past[:6, -5:], future=split.future[:6])
        for split in bands.load_windows()
    ]
    monkeypatch.setattr(bands, "load_windows", lambda: windows)
    with jax.numpy_dtype_promotion("standard"):  # the example's learning rates need it
        bands.main()
    path = tmp_path / "bands.json"
    report = json.loads(path.read_text())
    assert report["command"] == "python benchmarks/bands.py --quick"
    (row,) = report["rows"]
    assert (row["cell"], row["scheme"]) == ("minGRU", "candidate and output 0.5")
    assert set(row["coverage"]) == {"0.5", "0.8", "0.95"}
    assert row["crps"] > 0 and row["error"] > 0 and math.isfinite(row["log_likelihood"])

    monkeypatch.setattr(bands, "ROWS", (lstm, min_gru))
    other = row | {"cell": "LSTM", "scheme": "none", "seed": 0}
    monkeypatch.setattr(bands, "run_row", lambda row, config: {lstm: other}[row])
    bands.main()
    assert json.loads(path.read_text())["rows"] == [row, other]

    monkeypatch.setattr(bands, "QUICK", bands.CONFIG)
    with pytest.raises(SystemExit):
        bands.main()
    assert "is of another config" in capsys.readouterr().err


def test_each_rows_noise_is_that_of_its_name(bands) -> None:
    half, held = fdc.Dropout(keep_prob=0.5), fdc.Dropout(keep_prob=0.5, variational=True)
    kernels = fdc.recurrent_kernels(held)
    zoneout = fdc.Zoneout(prob=0.05)
    wanted = (
        {},
        {"output": half},
        {"inside": {"recurrent": held}, "output": held},
        {"state": (fdc.Zoneout(prob=0.5), None), "inside": {"hidden": zoneout}},
        {"params": kernels, "output": held},
    )
    lstms = [row for row in bands.ROWS if row.cell == "LSTM"]
    for row, fields in zip(lstms, wanted, strict=True):
        spec = row.make(bands.Config(units=2), nnx.Rngs(0)).rnn.dropout
        kept = {"input": None} if getattr(spec.input, "keep_prob", 1.0) == 1 else {}
        assert dataclasses.replace(spec, **kept) == fdc.RecurrentDropout(**fields), row
    for row in set(bands.ROWS) - set(lstms):
        model = row.make(bands.Config(units=2), nnx.Rngs(0))
        candidate = {"candidate": half}
        assert model.first.dropout == fdc.RecurrentDropout(inside=candidate)
        last = fdc.RecurrentDropout(input=held, inside=candidate, output=held)
        assert model.second.dropout == last
        assert type(model.first.cell) is type(model.second.cell)
        assert type(model.first.cell).__name__ == f"{row.cell[0].upper()}{row.cell[1:]}Cell"


def test_a_linear_forecaster_by_hand(bands) -> None:
    """Two cells step by step, a GELU between them; with dropout, masks follow the key."""
    model = bands.LinearForecaster(3, 1.0, fdc.nnx.MinGRUCell, nnx.Rngs(params=0, dropout=1))
    past = bands.load_windows()[1].past[:2, -4:]
    ys = past
    for layer in (model.first, model.second):
        carry, outputs = layer.cell.initialize_carry(ys[:, 0].shape), []
        for step in range(ys.shape[1]):
            carry, y = layer.cell(carry, ys[:, step])
            outputs.append(y)
        ys = jnp.stack(outputs, axis=1)
        if layer is model.first:
            ys = jax.nn.gelu(ys)
    mean, log_scale = model(past)
    wanted = model.readout(ys[:, -1])
    np.testing.assert_allclose(jnp.concatenate([mean, log_scale], -1), wanted, rtol=2e-5, atol=1e-6)
    dropped = bands.LinearForecaster(3, 0.5, fdc.nnx.MinGRUCell, nnx.Rngs(params=0, dropout=1))
    means = [dropped(past, jax.random.key(number))[0] for number in (1, 1, 2)]
    np.testing.assert_array_equal(means[0], means[1])
    assert np.abs(means[0] - means[2]).max() > 1e-3


# Sentences of docs/coverage.md --------------------------------------------------------------------


def test_the_pages_table_and_sentences_are_those_of_the_stored_rows(bands) -> None:
    report = json.loads((ROOT / "docs/results/bands.json").read_text())
    page = (ROOT / "docs/coverage.md").read_text()
    assert bands.format_table(report) in page and f"\n{report['command']}\n" in page
    assert report["config"] | {"seed": 0} == vars(bands.CONFIG)
    text = " ".join(page.split())
    stored, names = report["rows"], [row[:2] for row in bands.ROWS]
    assert [(row["cell"], row["scheme"]) for row in stored] == names * 5
    assert [row["seed"] for row in stored] == sorted([*range(5)] * len(names))
    crps = np.array([row["crps"] for row in stored]).reshape(5, len(names))

    def mean_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
        shares = {level: np.mean([row["coverage"][level] for row in runs]) for level in LEVELS}
        means = {name: np.mean([row[name] for row in runs]) for name in ("crps", "error")}
        return means | {"coverage": shares}

    rows = [mean_of(stored[at :: len(names)]) for at in range(len(names))]
    none, zaremba, gal, zoneout, weight_drop, min_gru, lru = rows

    def wide(row: dict[str, Any]) -> float:
        return row["coverage"]["0.95"]

    least = min(map(wide, (gal, weight_drop, min_gru, lru)))
    assert f"Without dropout the 95% band holds {wide(none):.0%} of the years." in text
    assert f"linear cells, it holds at least {least:.0%}." in text
    assert (
        f"with Zaremba's scheme the 95% band holds {wide(zaremba):.0%}, with zoneout "
        f"{wide(zoneout):.0%}." in text
    )
    assert max(map(wide, (none, zaremba, zoneout))) < least - 0.3

    scores = [row["crps"] for row in (gal, weight_drop, lru)]
    assert (
        f"It is {min(scores):.1f} to {max(scores):.1f} with Gal, weight-drop and the LRU, and "
        f"{none['crps']:.1f} without dropout; Zaremba's is the highest, {zaremba['crps']:.1f}."
        in text
    )
    assert max(scores) < min(row["crps"] for row in (none, zaremba, zoneout, min_gru))
    assert max(rows, key=lambda row: row["crps"]) is zaremba

    for level, share in min_gru["coverage"].items():
        assert abs(share - float(level)) < abs(gal["coverage"][level] - float(level))
    assert f"its forecasts are further off: a CRPS of {min_gru['crps']:.1f}." in text
    assert min_gru["error"] > gal["error"]
    assert min(rows, key=lambda row: row["crps"]) is lru
    ahead = crps[:, rows.index(gal)].mean() - crps[:, rows.index(lru)].mean()
    error = np.sqrt(sum(crps[:, rows.index(row)].var(ddof=1) / 5 for row in (gal, lru)))
    told = (
        f"lowest CRPS, {ahead:.1f} less than Gal's, which is {ahead / error:.1f} standard errors."
    )
    assert told in text

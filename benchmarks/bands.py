"""Which scheme's bands are right? Sunspots forecast by Monte Carlo dropout, scheme by scheme.

    python benchmarks/bands.py            # half an hour for five seeds; needs statsmodels
    python benchmarks/bands.py --quick    # at sizes that say nothing

The windows, the training, the forecasts and most of the numbers are those of
`examples/uncertainty.py`. Added is the continuous ranked probability score (Gneiting and Raftery
2007, eq. 21), in sunspots: of a forecast with no spread it is the absolute error.

If it is run again, the program goes on from the rows in `--out`.
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from compare import cpu_name
from flax import nnx
from jax_programs import versions
from rounds import resume, store
from scheme_noises import gal, no_dropout, weight_drop, zaremba

import flax_dropout_cell as fdc

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from sunspots import AHEAD, LEVELS, assess, load_windows, to_spots
from uncertainty import Config, Forecaster, forecast, train

CONFIG, SEEDS = Config(), 5
QUICK = Config(units=4, steps=2, samples=4)


# Models ------------------------------------------------------------------------------------------


class LinearForecaster(nnx.Module):
    """Two layers of a cell that is linear in its state, and the example's readout.

    A GELU between them, because one such layer tells the order of its inputs only by decay.
    """

    def __init__(self, units: int, keep_prob: float, cell: Any, rngs: nnx.Rngs) -> None:
        kept = fdc.Dropout(keep_prob=keep_prob, variational=True)
        candidate = {"candidate": fdc.Dropout(keep_prob=keep_prob)}
        first = fdc.RecurrentDropout(inside=candidate)
        second = fdc.RecurrentDropout(input=kept, inside=candidate, output=kept)
        self.first = fdc.nnx.RNN(cell(1, units, rngs=rngs), first, rngs=rngs)
        self.second = fdc.nnx.RNN(cell(units, units, rngs=rngs), second, rngs=rngs)
        self.readout = nnx.Linear(units, 2 * AHEAD, rngs=rngs)

    def __call__(self, past: jax.Array, rng: Any = None) -> tuple[jax.Array, jax.Array]:
        rngs = (None, None) if rng is None else jax.random.split(rng)
        hidden: Any = self.first(past, rngs=rngs[0])
        ys: Any = self.second(jax.nn.gelu(hidden), rngs=rngs[1])
        mean, log_scale = jnp.split(self.readout(ys[:, -1]), 2, axis=-1)
        return mean, jnp.maximum(log_scale, -5)


class Row(NamedTuple):
    """A model of the table.

    Attributes:
      cell: its name.
      scheme: its name, with the noise's strength.
      make: `make(config, rngs)`, the model.
    """

    cell: str
    scheme: str
    make: Callable[[Config, nnx.Rngs], nnx.Module]


def lstm(spec_of: Callable[..., fdc.RecurrentDropout], config: Config, rngs: nnx.Rngs) -> Any:
    # The input is kept whole: it is one number per year.
    return Forecaster(config.units, spec_of(config.keep_prob, 1.0, "lstm"), rngs)


def krueger(_: Any, __: Any, cell: str) -> fdc.RecurrentDropout:
    return fdc.recipes.krueger2016(cell_prob=0.5, hidden_prob=0.05)


def linear(cell: Any, config: Config, rngs: nnx.Rngs) -> Any:
    return LinearForecaster(config.units, config.keep_prob, cell, rngs)


ROWS = (
    Row("LSTM", "none", functools.partial(lstm, no_dropout)),
    Row("LSTM", "Zaremba: output 0.5", functools.partial(lstm, zaremba)),
    Row("LSTM", "Gal, tied: h and output 0.5", functools.partial(lstm, gal)),
    Row("LSTM", "zoneout: c 0.5, h 0.05", functools.partial(lstm, krueger)),
    Row("LSTM", "weight-drop: kernels and output 0.5", functools.partial(lstm, weight_drop)),
    Row("minGRU", "candidate and output 0.5", functools.partial(linear, fdc.nnx.MinGRUCell)),
    Row("LRU", "candidate and output 0.5", functools.partial(linear, fdc.nnx.LRUCell)),
)


def build(row: Row, config: Config, _: str) -> Any:
    """The row's model, with the leading axis of members that the example's training wants."""

    @nnx.vmap
    def build_one(rng: jax.Array) -> nnx.Module:
        params, dropout = jax.random.split(rng)
        return row.make(config, nnx.Rngs(params=params, dropout=dropout))

    return build_one(jax.random.split(jax.random.key(config.seed), 1))


# The score ---------------------------------------------------------------------------------------


def crps(samples: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The continuous ranked probability score of samples `[samples, ...]`, lower is better.

    `mean |X - y| - mean |X - X'| / 2` over all samples and all pairs. Sorted, a sample is the
    larger one of as many pairs as there are samples below it, so no pair has to be made.
    """
    count = len(samples)
    ranked = np.sort(samples.astype(np.float64), axis=0)
    signs = 2 * np.arange(count) - count + 1  # how often it is the larger, less how often not
    half_spread = np.tensordot(signs, ranked, axes=1) / count**2
    return np.abs(samples - seen).mean(axis=0) - half_spread


def run_row(row: Row, config: Config) -> dict[str, Any]:
    began = time.monotonic()
    training, held_out = load_windows()
    name = f"{row.cell}, {row.scheme}"
    models = train(config, training, name, functools.partial(build, row))
    found = forecast(config, models, held_out.past)
    seen = np.asarray(held_out.future)
    score = crps(to_spots(found.values), to_spots(seen)).mean()
    result = assess(found, seen)
    # By name, as a JSON has them.
    coverage = {str(level): share for level, share in result.coverage.items()}
    return {
        "cell": row.cell,
        "scheme": row.scheme,
        "seed": config.seed,
        **result._replace(coverage=coverage)._asdict(),
        "crps": float(score),
        "seconds": round(time.monotonic() - began, 1),
    }


class Summary(NamedTuple):
    """A model's means over the seeds, and the standard deviation of its CRPS."""

    coverage: dict[str, float]
    log_likelihood: float
    error: float
    crps: float
    crps_std: float


def summarize(report: dict[str, Any]) -> dict[tuple[str, str], Summary]:
    """A summary of each model, by its cell and scheme."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        runs.setdefault((row["cell"], row["scheme"]), []).append(row)
    found = {}
    for name, rows in runs.items():
        shares = {
            level: float(np.mean([row["coverage"][level] for row in rows]))
            for level in rows[0]["coverage"]
        }
        mean = {
            key: float(np.mean([row[key] for row in rows]))
            for key in ("log_likelihood", "error", "crps")
        }
        crps = [row["crps"] for row in rows]
        spread = float(np.std(crps, ddof=1)) if len(crps) > 1 else 0.0
        found[name] = Summary(coverage=shares, **mean, crps_std=spread)
    return found


def format_table(report: dict[str, Any]) -> str:
    """A row for each model: its means over the seeds."""
    bands = " | ".join(f"{level:.0%} band" for level in LEVELS)
    lines = [
        f"| cell | scheme | {bands} | log-likelihood | RMSE | CRPS |",
        "|---" * (len(LEVELS) + 5) + "|",
    ]
    for name, each in summarize(report).items():
        cells = [*name, *(f"{share:.0%}" for share in each.coverage.values())]
        cells += [f"{each.log_likelihood:.2f}", f"{each.error:.2f}"]
        cells.append(f"{each.crps:.1f} ± {each.crps_std:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("results"), help="default: results")
    options = parser.parse_args()
    config, path = QUICK if options.quick else CONFIG, options.out / "bands.json"
    shared = dataclasses.asdict(config)
    del shared["seed"]
    report = {"config": shared, "rows": []}
    report |= {"cpu": cpu_name(), "versions": versions()}
    report = resume(parser, report, path)
    done = {(row["cell"], row["scheme"], row["seed"]) for row in report["rows"]}
    for seed in range(1 if options.quick else SEEDS):
        for row in ROWS:
            if (row.cell, row.scheme, seed) not in done:
                report["rows"].append(run_row(row, dataclasses.replace(config, seed=seed)))
                store(report, path, format_table(report))


if __name__ == "__main__":
    main()

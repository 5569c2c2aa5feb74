"""The yearly sunspot numbers, and scores of their forecasts: a table, bands, JSON."""

import dataclasses
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from statsmodels.datasets import sunspots

PAST, AHEAD = 44, 11  # years: four cycles of the sun, and one
FIRST_HELD_OUT = 1929
LEVELS = (0.5, 0.8, 0.95)
SHOWN_AHEAD = 3  # the plot shows what was forecast three years before


# The series --------------------------------------------------------------------------------------


class Windows(NamedTuple):
    """Pieces of the series, scaled, and the year of each's first forecast."""

    past: jax.Array  # [windows, PAST, 1]
    future: jax.Array  # [windows, AHEAD]
    years: np.ndarray  # [windows]


def load_windows() -> tuple[Windows, Windows]:
    """Windows to train on, and windows whose forecasts all lie in the years held out."""
    data: Any = sunspots.load_pandas().data
    years = data["YEAR"].to_numpy().astype(int)
    series = to_scale(data["SUNACTIVITY"].to_numpy())
    starts = np.arange(PAST, len(series) - AHEAD + 1)
    past = np.stack([series[start - PAST : start, None] for start in starts])
    future = np.stack([series[start : start + AHEAD] for start in starts])
    first, last = years[starts], years[starts + AHEAD - 1]

    def choose(these: np.ndarray) -> Windows:
        return Windows(jnp.asarray(past[these]), jnp.asarray(future[these]), first[these])

    return choose(last < FIRST_HELD_OUT), choose(first >= FIRST_HELD_OUT)


def to_scale(spots: np.ndarray) -> np.ndarray:
    """Scaled square roots of the counts, between -1.5 and 2."""
    return (np.sqrt(spots) / 4 - 1.5).astype(np.float32)


def to_spots(values: np.ndarray) -> np.ndarray:
    return (4 * np.maximum(values + 1.5, 0)) ** 2


# Scores of forecasts ----------------------------------------------------------------------------


class Forecast(NamedTuple):
    """Many forecasts of the same windows, `[samples, windows, AHEAD]` each."""

    mean: np.ndarray
    log_scale: np.ndarray
    values: np.ndarray  # a draw from each


class Result(NamedTuple):
    """How good a model's forecasts of the years held out are.

    Attributes:
      coverage: which part of the years falls into each band of `LEVELS`.
      log_likelihood: of the mixture of all samples' distributions, in nats per year.
      error: the root mean square error of the mean forecast, in scaled units.
    """

    coverage: dict[float, float]
    log_likelihood: float
    error: float


def negative_log_likelihood(mean: jax.Array, log_scale: jax.Array, value: jax.Array) -> jax.Array:
    deviation = (value - mean) * jnp.exp(-log_scale)
    return deviation**2 / 2 + log_scale + jnp.log(2 * jnp.pi) / 2


def bands(values: np.ndarray, level: float) -> np.ndarray:
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)


def assess(forecast: Forecast, future: np.ndarray) -> Result:
    coverage = {}
    for level in LEVELS:
        low, high = bands(forecast.values, level)
        coverage[level] = float(((low <= future) & (future <= high)).mean())
    each = -negative_log_likelihood(
        jnp.asarray(forecast.mean), jnp.asarray(forecast.log_scale), jnp.asarray(future)[None]
    )
    mixture = jax.nn.logsumexp(each, axis=0) - jnp.log(len(forecast.mean))
    error = np.sqrt(((forecast.mean.mean(axis=0) - future) ** 2).mean())
    return Result(coverage, float(mixture.mean()), float(error))


# Reports -----------------------------------------------------------------------------------------


def format_table(results: dict[str, Result]) -> str:
    titles = "".join(f"{level:>8.0%}" for level in LEVELS)
    lines = [f"{'':12}{titles}   log-likelihood   RMSE"]
    for name, result in results.items():
        shares = "".join(f"{share:>8.1%}" for share in result.coverage.values())
        lines.append(f"{name:12}{shares}{result.log_likelihood:>17.3f}{result.error:>7.3f}")
    return "\n".join(lines)


def write_json(
    path: Path, config: Any, results: dict[str, Result], seconds: dict[str, float]
) -> None:
    """Writes the scores, and the settings and versions that they came from.

    Args:
      path: the file.
      config: a dataclass with all that decided the numbers.
      results: by the model's name.
      seconds: how long each model's training took.
    """
    report = {
        "config": dataclasses.asdict(config),
        "seed": config.seed,
        "command": " ".join(["python", *sys.argv]),
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("jax", "flax", "optax", "statsmodels")},
        "results": [
            {"model": name, **result._asdict(), "seconds": round(seconds[name], 1)}
            for name, result in results.items()
        ],
    }
    path.write_text(json.dumps(report, indent=2) + "\n")


def write_bands(path: Path, held_out: Windows, forecasts: dict[str, Forecast]) -> None:
    figure = Figure(figsize=(8, 3 * len(forecasts)), layout="constrained")
    years = held_out.years + SHOWN_AHEAD - 1
    panels = figure.subplots(len(forecasts), sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (name, forecast) in zip(panels, forecasts.items(), strict=True):
        values = to_spots(forecast.values[:, :, SHOWN_AHEAD - 1])
        for level in reversed(LEVELS):
            low, high = bands(values, level)
            axes.fill_between(years, low, high, color="tab:blue", alpha=0.25, label=f"{level:.0%}")
        seen = to_spots(np.asarray(held_out.future)[:, SHOWN_AHEAD - 1])
        axes.plot(years, seen, ".-", color="black", linewidth=0.8, label="sunspots")
        axes.set_title(f"{name}: forecasts from {SHOWN_AHEAD} years before")
        axes.set_ylabel("sunspots")
        axes.set_ylim(-5, 260)  # with room for the legend
        axes.legend(ncols=4, loc="upper left")
    figure.savefig(path, dpi=150)

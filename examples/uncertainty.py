"""Forecasts that know what they do not know: sunspots, with bands from Monte Carlo dropout.

An LSTM reads 44 years of the yearly sunspot numbers (statsmodels ships them: 1700 to 2008) and
forecasts the next 11 years, each as a normal distribution. It has few years to learn from. Without
dropout it learns them by heart, and its bands are far too narrow for the years that it has not
seen. With variational dropout (Gal and Ghahramani 2016, arXiv:1512.05287), a forecast is many
forecasts, each under masks of its own, and the bands are their quantiles.

    python examples/uncertainty.py
    python examples/uncertainty.py --keep-prob 0.7 --samples 1000

It ends with a table of how much of 1929 to 2008 falls into the 50, 80 and 95 % bands, and writes
it to `uncertainty.json` and the bands to `uncertainty.png` in `--out`. Both models are trained for
as many steps, and neither has seen a year after 1928. The sun was livelier after 1929 than before:
no model can know that, and even the bands with dropout hold somewhat less than they say.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flags import read_config
from flax import nnx
from matplotlib.figure import Figure
from statsmodels.datasets import sunspots
from tqdm import tqdm

import flax_dropout_cell as fdc

PAST, AHEAD = 44, 11  # years: four cycles of the sun, and one
FIRST_HELD_OUT = 1929
LEVELS = (0.5, 0.8, 0.95)
SHOWN_AHEAD = 3  # the plot shows what was forecast three years before
MODELS = ("no dropout", "dropout")


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides the numbers; chosen by forecasts of 1880 to 1928 from the years before."""

    keep_prob: float = 0.5
    units: int = 48
    steps: int = 1000
    learning_rate: float = 3e-3
    samples: int = 400
    seed: int = 0


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
    """Roots spread counts of all sizes alike, and lie between -1.5 and 2 then."""
    return (np.sqrt(spots) / 4 - 1.5).astype(np.float32)


def to_spots(values: np.ndarray) -> np.ndarray:
    return (4 * np.maximum(values + 1.5, 0)) ** 2


# The model and its training ----------------------------------------------------------------------


class Forecaster(nnx.Module):
    """An LSTM, and a normal distribution for each year ahead: its mean and log of its scale."""

    def __init__(self, units: int, dropout: fdc.RecurrentDropout, rngs: nnx.Rngs) -> None:
        self.rnn = fdc.nnx.RNN(fdc.nnx.LSTMCell(1, units, rngs=rngs), dropout, rngs=rngs)
        self.readout = nnx.Linear(units, 2 * AHEAD, rngs=rngs)

    def __call__(self, past: jax.Array, rng: Any = None) -> tuple[jax.Array, jax.Array]:
        ys: Any = self.rnn(past, rngs=rng)  # None: from the model's own stream
        mean, log_scale = jnp.split(self.readout(ys[:, -1]), 2, axis=-1)
        return mean, jnp.maximum(log_scale, -5)


def build_model(config: Config, dropout: bool) -> Forecaster:
    kept = config.keep_prob if dropout else 1.0
    # Not on the input: it is one number per year, and a sequence without it says nothing.
    spec = fdc.recipes.gal2016(input_keep_prob=1.0, recurrent_keep_prob=kept, output_keep_prob=kept)
    return Forecaster(config.units, spec, nnx.Rngs(params=config.seed, dropout=config.seed + 1))


def negative_log_likelihood(mean: jax.Array, log_scale: jax.Array, value: jax.Array) -> jax.Array:
    deviation = (value - mean) * jnp.exp(-log_scale)
    return deviation**2 / 2 + log_scale + jnp.log(2 * jnp.pi) / 2


@nnx.jit
def train_step(
    model: Forecaster, optimizer: nnx.Optimizer, past: jax.Array, future: jax.Array
) -> jax.Array:
    def loss_of(model: Forecaster) -> jax.Array:
        return negative_log_likelihood(*model(past), future).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


def train(config: Config, windows: Windows, name: str) -> Forecaster:
    model = build_model(config, dropout=name == "dropout")
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    loss, trained = jnp.nan, 0
    # In a log or in CI there is no terminal to draw a bar on.
    quiet = not sys.stderr.isatty()
    try:
        for _ in tqdm(range(config.steps), desc=name, unit="step", leave=False, disable=quiet):
            loss = train_step(model, optimizer, windows.past, windows.future)
            trained += 1
    except KeyboardInterrupt:
        print(f"{name}: stopped after {trained} of {config.steps} steps", flush=True)
    print(f"{name}: trained to a loss of {loss:.3f} nats per year", flush=True)
    return model


# Forecasts ---------------------------------------------------------------------------------------


class Forecast(NamedTuple):
    """Many forecasts of the same windows, `[samples, windows, AHEAD]` each."""

    mean: np.ndarray
    log_scale: np.ndarray
    values: np.ndarray


def forecast(config: Config, model: Forecaster, past: jax.Array) -> Forecast:
    """Each sample has masks of its own, and a draw from the distribution that these give."""

    def predict(rng: jax.Array) -> tuple[jax.Array, ...]:
        masks_rng, value_rng = jax.random.split(rng)
        mean, log_scale = model(past, masks_rng)
        noise = jnp.exp(log_scale) * jax.random.normal(value_rng, mean.shape)
        return mean, log_scale, mean + noise

    rng = jax.random.key(config.seed + 2)
    samples = fdc.mc_samples(predict, rng, config.samples, chunk_size=50)
    return Forecast(*map(np.asarray, samples))


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


def write_json(path: Path, config: Config, results: dict[str, Result]) -> None:
    report = {
        "config": dataclasses.asdict(config),
        "results": [{"model": name, **result._asdict()} for name, result in results.items()],
    }
    path.write_text(json.dumps(report, indent=2) + "\n")


def write_bands(path: Path, held_out: Windows, forecasts: dict[str, Forecast]) -> None:
    figure = Figure(figsize=(8, 6), layout="constrained")
    years = held_out.years + SHOWN_AHEAD - 1
    for axes, (name, forecast) in zip(
        figure.subplots(2, sharex=True, sharey=True), forecasts.items(), strict=True
    ):
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


# The command line --------------------------------------------------------------------------------


def main() -> int:
    config, out = read_config(
        "Forecast sunspots with bands, without dropout and with it. Ctrl-C ends a training, and "
        "reports what was learned until then.",
        Config,
        keep_prob="share of units kept, of h and of the output",
        units="size of the LSTM",
        steps="steps to train each model for",
        learning_rate="Adam's, before it decays",
        samples="forecasts that a band is made of",
        seed="of the weights and the masks",
    )
    training, held_out = load_windows()
    print(
        f"{len(training.years)} windows to train on, {len(held_out.years)} held out, whose "
        f"forecasts are of {held_out.years[0]} to {held_out.years[-1] + AHEAD - 1}",
        flush=True,
    )
    forecasts = {}
    for name in MODELS:
        forecasts[name] = forecast(config, train(config, training, name), held_out.past)
    results = {name: assess(each, np.asarray(held_out.future)) for name, each in forecasts.items()}
    print(f"how much of the years held out falls into the bands:\n{format_table(results)}")
    write_json(out / "uncertainty.json", config, results)
    write_bands(out / "uncertainty.png", held_out, forecasts)
    print(f"written to {out / 'uncertainty.json'} and {out / 'uncertainty.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

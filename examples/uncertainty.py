"""Forecasts that know what they do not know: sunspots, with bands from Monte Carlo dropout.

An LSTM reads 44 years of the yearly sunspot numbers (statsmodels ships them: 1700 to 2008) and
forecasts the next 11 years, each as a normal distribution. It has few years to learn from. Without
dropout it memorizes them, and its bands are far too narrow for the years that it has not
seen. With variational dropout (Gal and Ghahramani 2016, arXiv:1512.05287), a forecast is many
forecasts, each under masks of its own, and the bands are their quantiles.

    python examples/uncertainty.py
    python examples/uncertainty.py --keep-prob 0.7 --samples 1000
    python examples/uncertainty.py --members 5

The last command also trains a deep ensemble, five models without dropout from different initial
weights, in one `vmap` (Lakshminarayanan et al. 2017, arXiv:1612.01474). That costs five times as
much.

It ends with a table of how much of 1929 to 2008 falls into the 50, 80 and 95% bands, and writes
it to `uncertainty.json` and the bands to `uncertainty.png` in `--out`. All models are trained for
as many steps, and none has seen a year after 1928. The sun was livelier after 1929 than before:
no model can know that, and even the bands with dropout hold somewhat less than they say.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flags import read_config
from flax import nnx
from sunspots import (
    AHEAD,
    Forecast,
    Windows,
    assess,
    format_table,
    load_windows,
    negative_log_likelihood,
    write_bands,
    write_json,
)
from tqdm import tqdm

import flax_dropout_cell as fdc


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides the numbers; chosen by forecasts of 1880 to 1928 from the years before."""

    keep_prob: float = 0.5
    units: int = 48
    steps: int = 1000
    learning_rate: float = 3e-3
    samples: int = 400
    members: int = 1
    seed: int = 0


MODELS = ("no dropout", "dropout")
EXIT_INTERRUPTED = 130


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


def build_models(config: Config, name: str) -> Forecaster:
    """One model, or the members of an ensemble, along a leading axis of every weight."""
    kept = config.keep_prob if name == "dropout" else 1.0
    members = config.members if name == "ensemble" else 1
    # Not on the input: it is one number per year, and a sequence without it says nothing.
    spec = fdc.recipes.gal2016(input_keep_prob=1.0, recurrent_keep_prob=kept, output_keep_prob=kept)

    @nnx.vmap
    def build(rng: jax.Array) -> Forecaster:
        params, dropout = jax.random.split(rng)
        return Forecaster(config.units, spec, nnx.Rngs(params=params, dropout=dropout))

    return build(jax.random.split(jax.random.key(config.seed), members))


@nnx.jit
@nnx.vmap(in_axes=(0, 0, None, None))
def train_step(
    model: Forecaster, optimizer: nnx.Optimizer, past: jax.Array, future: jax.Array
) -> jax.Array:
    def loss_of(model: Forecaster) -> jax.Array:
        return negative_log_likelihood(*model(past), future).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


def train(
    config: Config,
    windows: Windows,
    name: str,
    build: Callable[[Config, str], Any] = build_models,
) -> Any:
    """Trains all members of a model at once."""
    models = build(config, name)
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    optimizers = nnx.vmap(lambda model: nnx.Optimizer(model, tx, wrt=nnx.Param))(models)
    losses = jnp.array([jnp.nan])
    # In a log or in CI there is no terminal to draw a bar on.
    quiet = not sys.stderr.isatty()
    for _ in tqdm(range(config.steps), desc=name, unit="step", leave=False, disable=quiet):
        losses = train_step(models, optimizers, windows.past, windows.future)
    print(f"{name}: trained to a loss of {jnp.mean(losses):.3f} nats per year", flush=True)
    return models


def forecast(config: Config, models: Forecaster, past: jax.Array) -> Forecast:
    """Each sample has masks of its own, and a draw from the distribution that these give.

    The members of an ensemble have an equal share of the samples each.
    """
    graph, state = nnx.split(models)
    members = jax.tree.leaves(state)[0].shape[0]

    def predict(rng: jax.Array) -> tuple[jax.Array, ...]:
        masks_rng, value_rng = jax.random.split(rng)
        run = jax.vmap(lambda state, rng: nnx.merge(graph, state)(past, rng))
        mean, log_scale = run(state, jax.random.split(masks_rng, members))
        noise = jnp.exp(log_scale) * jax.random.normal(value_rng, mean.shape)
        return mean, log_scale, mean + noise

    rng, each = jax.random.key(config.seed + 2), -(-config.samples // members)
    samples = fdc.mc_samples(predict, rng, each, chunk_size=50)
    return Forecast(*(np.concatenate(np.asarray(sample)) for sample in samples))


# The command line --------------------------------------------------------------------------------


def main() -> int:
    config, out = read_config(
        "Forecast sunspots with bands, with dropout and without. Ctrl-C ends the program, "
        "and reports the models that are trained by then.",
        Config,
        keep_prob="share of units kept, of h and of the output",
        units="size of the LSTM",
        steps="steps to train each model for",
        learning_rate="Adam's, before it decays",
        samples="forecasts that a band is made of",
        members="models in an ensemble without dropout, if there are several",
        seed="of the weights and the masks",
    )
    training, held_out = load_windows()
    print(
        f"{len(training.years)} windows to train on, {len(held_out.years)} held out, whose "
        f"forecasts are of {held_out.years[0]} to {held_out.years[-1] + AHEAD - 1}",
        flush=True,
    )
    forecasts, seconds, status = {}, {}, 0
    try:
        for name in (*MODELS, "ensemble") if config.members > 1 else MODELS:
            start = time.perf_counter()
            models = train(config, training, name)
            seconds[name] = time.perf_counter() - start
            forecasts[name] = forecast(config, models, held_out.past)
    except KeyboardInterrupt:
        print(f"interrupted; trained by then: {', '.join(forecasts) or 'none'}", file=sys.stderr)
        status = EXIT_INTERRUPTED
    if not forecasts:
        return status
    results = {name: assess(each, np.asarray(held_out.future)) for name, each in forecasts.items()}
    print(f"how much of the years held out falls into the bands:\n{format_table(results)}")
    write_json(out / "uncertainty.json", config, results, seconds)
    write_bands(out / "uncertainty.png", held_out, forecasts)
    print(f"written to {out / 'uncertainty.json'} and {out / 'uncertainty.png'}")
    return status


if __name__ == "__main__":
    sys.exit(main())

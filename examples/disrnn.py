"""Finds out what an agent remembers: a recurrent net with an information bottleneck on each latent.

    python examples/disrnn.py

An agent plays a two-armed bandit. It learns the value of each arm from its rewards and forgets the
arm that it did not play; its next choice depends on the difference of the two values. A small
recurrent net with five latents learns to predict the agent's choices. Each latent, and each input,
passes a bottleneck: it is scaled and gets Gaussian noise, and the loss charges for the information
that comes through (DisRNN: Miller et al. 2023, *Cognitive model discovery via disentangled RNNs*).
Latents and inputs that the task does not need close. By default two latents stay open, from which
the agent's difference of values can be read; the input that is mere noise closes. It ends with a
table of the bottlenecks, and writes a plot to `disrnn.png` in `--out`.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flags import read_config
from matplotlib.figure import Figure

import flax_dropout_cell as fdc

INPUTS = ("last choice", "last reward", "noise")  # the last one is a distraction
LATENTS, HIDDEN = 5, 16
LEARNING_RATE, TEMPERATURE, DRIFT = 0.3, 0.2, 0.1
OPEN = 0.2  # nats per trial that come through a bottleneck, from which on we call it open


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides the numbers."""

    steps: int = 2000
    sessions: int = 128
    trials: int = 100
    price: float = 0.01
    learning_rate: float = 5e-3
    seed: int = 0


# The agent ---------------------------------------------------------------------------------------


class Sessions(NamedTuple):
    """An agent's choices and rewards, `[trials, sessions]` each."""

    choices: jax.Array  # 0 or 1
    rewards: jax.Array  # 0 or 1
    differences: jax.Array  # of the agent's two values before the choice: the memory to find


def play(rng: jax.Array, trials: int, sessions: int) -> Sessions:
    """Q-learning with forgetting, on arms whose probabilities of a reward drift."""

    def trial(carry: Any, rng: jax.Array) -> Any:
        values, odds = carry
        choice_rng, reward_rng, drift_rng = jax.random.split(rng, 3)
        difference = values[:, 1] - values[:, 0]
        choice = jax.random.bernoulli(choice_rng, jax.nn.sigmoid(difference / TEMPERATURE))
        played = jnp.stack([~choice, choice], axis=-1)
        reward = jax.random.bernoulli(reward_rng, (odds * played).sum(-1))
        target = (played & reward[:, None]).astype(values.dtype)
        values = values + LEARNING_RATE * (target - values)
        drift = DRIFT * jax.random.normal(drift_rng, odds.shape)
        odds = jnp.clip(odds + drift, 0.0, 1.0)
        return (values, odds), Sessions(choice, reward, difference)

    start_rng, trials_rng = jax.random.split(rng)
    start = (jnp.zeros((sessions, 2)), jax.random.uniform(start_rng, (sessions, 2)))
    _, played = jax.lax.scan(trial, start, jax.random.split(trials_rng, trials))
    return Sessions(*(leaf.astype(jnp.float32) for leaf in played))


def inputs_of(sessions: Sessions, rng: jax.Array) -> jax.Array:
    """Before each choice: the choice and the reward of the trial before, and noise."""
    before = jnp.stack([2 * sessions.choices - 1, 2 * sessions.rewards - 1], axis=-1)
    before = jnp.concatenate([jnp.zeros_like(before[:1]), before[:-1]])
    noise = jax.random.normal(rng, (*before.shape[:-1], 1))
    return jnp.concatenate([before, noise], axis=-1)


# The network -------------------------------------------------------------------------------------


def init_params(rng: jax.Array) -> Any:
    """The weights of two small nets, and the scale and log stddev of each bottleneck."""

    def layers(rng: jax.Array, sizes: Sequence[int]) -> list[Any]:
        kernels = zip(jax.random.split(rng, len(sizes) - 1), sizes, sizes[1:], strict=False)
        init = jax.nn.initializers.lecun_normal()
        return [(init(key, (rows, columns)), jnp.zeros(columns)) for key, rows, columns in kernels]

    def bottleneck(units: int) -> Any:
        return {"scale": jnp.ones(units), "log_stddev": jnp.full(units, -3.0)}

    update_rng, choice_rng = jax.random.split(rng)
    return {
        "update": layers(update_rng, (LATENTS + len(INPUTS), HIDDEN, 2 * LATENTS)),
        "choice": layers(choice_rng, (LATENTS, HIDDEN, 1)),
        "latents": bottleneck(LATENTS),
        "inputs": bottleneck(len(INPUTS)),
    }


def run_layers(layers: list[Any], x: jax.Array) -> jax.Array:
    for kernel, bias in layers[:-1]:
        x = jnp.tanh(x @ kernel + bias)
    kernel, bias = layers[-1]
    return x @ kernel + bias


def cell(params: Any, latents: jax.Array, x: jax.Array, *, disturb: Any = fdc.undisturbed) -> Any:
    """A gated step. It emits the logit of a choice, and the latents before their noise."""
    read = run_layers(params["update"], jnp.concatenate([latents, x], axis=-1))
    gate, new = jnp.split(read, 2, axis=-1)
    gate = jax.nn.sigmoid(gate)
    means = params["latents"]["scale"] * ((1 - gate) * latents + gate * jnp.tanh(new))
    latents = disturb("latents", means)
    return latents, (run_layers(params["choice"], latents)[..., 0], means)


class Ran(NamedTuple):
    """The network's outputs; information in nats per trial, for each unit."""

    logits: jax.Array
    latents: jax.Array
    of_latents: jax.Array
    of_inputs: jax.Array


def run(params: Any, xs: jax.Array, rng: jax.Array | None) -> Ran:
    """Runs the network; without a key its bottlenecks add no noise."""
    stddevs = {site: jnp.exp(params[site]["log_stddev"]) for site in ("latents", "inputs")}
    spec = fdc.RecurrentDropout(
        input=fdc.GaussianNoise(stddev=stddevs["inputs"]),
        inside={"latents": fdc.GaussianNoise(stddev=stddevs["latents"])},
    )
    xs = params["inputs"]["scale"] * xs
    first = jnp.zeros((xs.shape[1], LATENTS))
    _, (logits, latents) = fdc.dropout_scan(params, first, xs, rng, cell=cell, dropout=spec)
    information = (
        fdc.gaussian_kl(means, stddev).mean((0, 1))
        for means, stddev in ((latents, stddevs["latents"]), (xs, stddevs["inputs"]))
    )
    return Ran(logits, latents, *information)


# Training ----------------------------------------------------------------------------------------


def train(config: Config) -> tuple[Any, Ran, Sessions, float]:
    """Gives the weights, and the outputs for held-out sessions, these sessions, and their loss."""
    data_rng, noise_rng, init_rng, train_rng = jax.random.split(jax.random.key(config.seed), 4)
    sessions = play(data_rng, config.trials, 2 * config.sessions)
    xs = inputs_of(sessions, noise_rng)
    mine, held_out = slice(None, config.sessions), slice(config.sessions, None)
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    optimizer = optax.adam(schedule)

    def nll(ran: Ran, choices: jax.Array) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(ran.logits, choices).mean()

    def loss(params: Any, rng: jax.Array) -> jax.Array:
        ran = run(params, xs[:, mine], rng)
        information = ran.of_latents.sum() + ran.of_inputs.sum()
        return nll(ran, sessions.choices[:, mine]) + config.price * information

    @jax.jit
    def train_all(params: Any) -> Any:
        def step(carry: Any, rng: jax.Array) -> Any:
            params, state = carry
            gradient = jax.grad(loss)(params, rng)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), None

        rngs = jax.random.split(train_rng, config.steps)
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), rngs)
        return params

    params = train_all(init_params(init_rng))
    ran = jax.jit(run)(params, xs[:, held_out], None)
    rest = Sessions(*(leaf[:, held_out] for leaf in sessions))
    return params, ran, rest, float(nll(ran, rest.choices))


# Analysis ----------------------------------------------------------------------------------------


def fit(latents: Any, wanted: Any) -> tuple[np.ndarray, float]:
    """The wanted number as a linear function of latents, and the part of its variance in it."""
    features = np.concatenate([latents, np.ones((*latents.shape[:-1], 1))], axis=-1)
    weights, *_ = np.linalg.lstsq(features.reshape(-1, features.shape[-1]), np.ravel(wanted))
    fitted = features @ weights
    return fitted, float(1 - np.var(np.asarray(wanted) - fitted) / np.var(np.asarray(wanted)))


def agents_nll(sessions: Sessions) -> float:
    """The loss of a predictor that knows the agent's values."""
    logits = sessions.differences / TEMPERATURE
    return float(optax.sigmoid_binary_cross_entropy(logits, sessions.choices).mean())


def report(ran: Ran, sessions: Sessions, nll: float) -> None:
    """Prints each bottleneck, and how much of the agent's memory the open latents hold."""
    print(f"Choices of held-out sessions: {nll:.3f} nats each; the agent itself: ", end="")
    print(f"{agents_nll(sessions):.3f}; a coin: {np.log(2):.3f}")
    for name, nats in zip(INPUTS, ran.of_inputs, strict=True):
        print(f"input {name:<12} {nats:6.2f} nats  {'open' if nats > OPEN else 'closed'}")
    is_open = find_open(ran)
    for index in np.argsort(-ran.of_latents):
        state = "open" if is_open[index] else "closed"
        print(f"latent {index:<11} {ran.of_latents[index]:6.2f} nats  {state}")
    _, part = fit(open_latents(ran), sessions.differences)
    print(f"The open latents hold the agent's difference of values: {part:.1%} of its variance")


def find_open(ran: Ran) -> np.ndarray:
    """Which latents are open, `[latents]`: the widest one alone if all are below `OPEN`."""
    is_open = np.asarray(ran.of_latents) > OPEN
    is_open[np.argmax(ran.of_latents)] = True
    return is_open


def open_latents(ran: Ran) -> np.ndarray:
    """`[trials, sessions, open]`"""
    return np.asarray(ran.latents)[..., find_open(ran)]


def plot(ran: Ran, sessions: Sessions, path: Path) -> None:
    """The bottlenecks as bars, and what the open latents hold beside what the agent has."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    bars, lines = figure.subplots(1, 2, width_ratios=(1, 2))
    names = [*INPUTS, *(f"latent {index}" for index in range(LATENTS))]
    bars.barh(names, np.concatenate([ran.of_inputs, ran.of_latents]))
    bars.invert_yaxis()
    bars.set_xlabel("information, nats per trial")
    fitted, _ = fit(open_latents(ran), sessions.differences)
    lines.plot(sessions.differences[:, 0], label="the agent's difference of values")
    lines.plot(fitted[:, 0], "--", label="read linearly from the open latents")
    lines.set_xlabel("trial of one session")
    lines.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    config, out = read_config(
        "Find out what an agent remembers, by a recurrent net with information bottlenecks.",
        Config,
        steps="of training",
        sessions="to train on; as many are held out",
        trials="of a session",
        price="of a nat, in the loss",
        learning_rate="Adam's, before it decays",
        seed="of the agent, the weights and the noise",
    )
    _, ran, sessions, nll = train(config)
    report(ran, sessions, nll)
    plot(ran, sessions, out / "disrnn.png")
    print(f"written to {out / 'disrnn.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

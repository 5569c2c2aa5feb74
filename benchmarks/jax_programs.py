"""The bare cell, this library in each mode and host, and the naive way."""

import functools
import importlib.metadata
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from program import KEEP_PROBS, Compiled, Config, Programs

import flax_dropout_cell as fdc

MODES: dict[str, fdc.Dropout | None] = {
    "bare": None,
    "variational": fdc.Dropout(keep_prob=KEEP_PROBS[0], variational=True),
    **{f"per step, {keep_prob}": fdc.Dropout(keep_prob=keep_prob) for keep_prob in KEEP_PROBS},
}


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}


def spec_of(noise: fdc.Dropout) -> fdc.RecurrentDropout:
    """Three sites: the inputs, h and the outputs."""
    return fdc.RecurrentDropout(input=noise, state=(None, noise), output=noise)


def compile_program(
    config: Config, params: Any, run: Callable[[Any, jax.Array, jax.Array], jax.Array]
) -> Compiled:
    """Compiles `run(params, xs, rng)`, which gives the outputs, and its gradient."""
    xs_rng, rng = jax.random.split(jax.random.key(0, impl=config.impl))
    xs = jax.random.normal(xs_rng, (config.time, config.batch, config.features))

    def loss(*args: Any) -> jax.Array:
        return jnp.mean(run(*args) ** 2)

    args = (params, xs, rng)
    forward = jax.jit(run).lower(*args).compile()
    start = time.perf_counter()
    gradient = jax.jit(jax.grad(loss)).lower(*args).compile()
    compile_s = time.perf_counter() - start

    def size(compiled: Any) -> int:
        return compiled.memory_analysis().temp_size_in_bytes

    return Compiled(
        lambda: jax.block_until_ready(forward(*args)),
        lambda: jax.block_until_ready(gradient(*args)),
        compile_s,
        size(forward),
        size(gradient),
    )


def init_cell(cell: nn.RNNCellBase, config: Config) -> tuple[Any, Any]:
    x = jnp.zeros((config.batch, config.features))
    carry = cell.initialize_carry(jax.random.key(1), x.shape)
    return carry, cell.init(jax.random.key(1), carry, x)


def make_scan(noise: fdc.Dropout | None, config: Config) -> Compiled:
    cell = nn.LSTMCell(config.features)
    carry, params = init_cell(cell, config)

    def run_bare(params: Any, xs: jax.Array, rng: jax.Array) -> jax.Array:
        del rng
        return jax.lax.scan(functools.partial(cell.apply, params), carry, xs)[1]  # type: ignore

    def run(params: Any, xs: jax.Array, rng: jax.Array) -> jax.Array:
        assert noise is not None
        _, ys = fdc.dropout_scan(params, carry, xs, rng, cell=cell.apply, dropout=spec_of(noise))
        return ys

    return compile_program(config, params, run_bare if noise is None else run)


def make_linen_rnn(noise: fdc.Dropout | None, config: Config) -> Compiled:
    cell = nn.LSTMCell(config.features)
    rnn = nn.RNN(
        cell if noise is None else fdc.linen.DropoutCell(cell, spec_of(noise)), time_major=True
    )
    params = rnn.init(jax.random.key(1), jnp.zeros((1, config.batch, config.features)))
    return compile_program(
        config, params, lambda params, xs, rng: rnn.apply(params, xs, rngs={"dropout": rng})
    )


def make_nnx_rnn(noise: fdc.Dropout | None, config: Config) -> Compiled:
    cell = nnx.LSTMCell(config.features, config.features, rngs=nnx.Rngs(1))
    if noise is not None:
        cell = fdc.nnx.DropoutCell(cell, spec_of(noise), rngs=nnx.Rngs(dropout=2))
    graphdef, params, rest = nnx.split(nnx.RNN(cell, time_major=True), nnx.Param, ...)

    def run(params: Any, xs: jax.Array, rng: jax.Array) -> jax.Array:
        rnn = nnx.merge(graphdef, params, jax.tree.map(jnp.asarray, rest))
        if noise is not None:
            nnx.reseed(rnn, dropout=rng)
        return rnn(xs)

    return compile_program(config, params, run)


class NaiveCell(nn.RNNCellBase):
    """`nn.Dropout` at the three sites, inside the cell."""

    features: int
    rate: float

    @nn.compact
    def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, jax.Array]:
        drop = functools.partial(nn.Dropout, self.rate, deterministic=False)
        (c, h), y = nn.LSTMCell(self.features)(carry, drop()(inputs))
        return (c, drop()(h)), drop()(y)

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> Any:
        return nn.LSTMCell(self.features, parent=None).initialize_carry(rng, input_shape)

    @property
    def num_feature_axes(self) -> int:
        return 1


def make_naive(keep_prob: float, config: Config) -> Compiled:
    cell = NaiveCell(config.features, 1 - keep_prob)
    rnn = nn.RNN(cell, time_major=True, split_rngs={"params": False, "dropout": True})
    rngs = {"params": jax.random.key(1), "dropout": jax.random.key(2)}
    params = rnn.init(rngs, jnp.zeros((1, config.batch, config.features)))
    return compile_program(
        config, params, lambda params, xs, rng: rnn.apply(params, xs, rngs={"dropout": rng})
    )


HOSTS = {"scan": make_scan, "nn.RNN": make_linen_rnn, "nnx.RNN": make_nnx_rnn}

PROGRAMS: Programs = {
    f"{host}: {mode}": functools.partial(make, noise)
    for host, make in HOSTS.items()
    for mode, noise in MODES.items()
} | {
    f"nn.Dropout in the cell: {keep_prob}": functools.partial(make_naive, keep_prob)
    for keep_prob in KEEP_PROBS
}

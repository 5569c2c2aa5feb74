"""Stock cells without dropout, and under variational dropout in each of this library's layers."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax_programs import compile_program, versions
from program import Compiled, Config, Programs

import flax_dropout_cell as fdc

KEEP = fdc.Dropout(keep_prob=0.7, variational=True)
FLAX_CELLS = ("LSTMCell", "OptimizedLSTMCell", "GRUCell")
SIX_LINES = "six-line LSTM"

__all__ = ["PROGRAMS", "versions"]


def spec_of(name: str) -> fdc.RecurrentDropout:
    """The inputs, h and the outputs. On a GRU's h kept units are not scaled: it would explode."""
    if name == "GRUCell":
        keep = fdc.Dropout(keep_prob=0.7, variational=True, scale=False)
        return fdc.RecurrentDropout(input=KEEP, state=keep, output=KEEP)
    return fdc.RecurrentDropout(input=KEEP, state=(None, KEEP), output=KEEP)


def six_lines(params: Any, carry: Any, x: jax.Array) -> Any:
    c, h = carry
    gates = jnp.concatenate([x, h], axis=-1) @ params["kernel"] + params["bias"]
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (c, h), h


def functional(name: str, config: Config) -> tuple[Callable[..., Any], Any, Any]:
    """A cell as a function, its weights and its initial carry."""
    size, x = config.features, jnp.zeros((config.batch, config.features))
    if name == SIX_LINES:
        kernel = jax.random.normal(jax.random.key(1), (2 * size, 4 * size)) / size**0.5
        return six_lines, {"kernel": kernel, "bias": jnp.zeros(4 * size)}, (x, x)
    cell = getattr(nn, name)(size)
    carry = cell.initialize_carry(jax.random.key(1), x.shape)
    return cell.apply, cell.init(jax.random.key(1), carry, x), carry


def make_scan(name: str, config: Config, *, bare: bool = False) -> Compiled:
    cell, params, carry = functional(name, config)

    def run_bare(params: Any, xs: jax.Array, rng: jax.Array) -> jax.Array:
        del rng
        return jax.lax.scan(functools.partial(cell, params), carry, xs)[1]

    def run(params: Any, xs: jax.Array, rng: jax.Array) -> jax.Array:
        return fdc.dropout_scan(params, carry, xs, rng, cell=cell, dropout=spec_of(name))[1]

    return compile_program(config, params, run_bare if bare else run)


def make_linen(name: str, config: Config, *, bare: bool = False, dtype: Any = None) -> Compiled:
    """Half precision is that of the cell; its weights and the inputs stay float32."""
    cell = getattr(nn, name)(config.features, dtype=dtype)
    rnn: Any = nn.RNN(cell, time_major=True)
    if not bare:
        rnn = fdc.linen.RNN(cell, spec_of(name), time_major=True)
    params = rnn.init(jax.random.key(1), jnp.zeros((1, config.batch, config.features)))

    def run(params: Any, xs: jax.Array, rng: jax.Array) -> jax.Array:
        return rnn.apply(params, xs, rngs=None if bare else {"dropout": rng})

    return compile_program(config, params, run)


def make_nnx(name: str, config: Config, *, bare: bool = False) -> Compiled:
    cell = getattr(nnx, name)(config.features, config.features, rngs=nnx.Rngs(1))
    rnn: Any = nnx.RNN(cell, time_major=True)
    if not bare:
        rnn = fdc.nnx.RNN(cell, spec_of(name), time_major=True)
    graphdef, params, rest = nnx.split(rnn, nnx.Param, ...)

    def run(params: Any, xs: jax.Array, rng: jax.Array) -> jax.Array:
        rnn = nnx.merge(graphdef, params, jax.tree.map(jnp.asarray, rest))
        return rnn(xs) if bare else rnn(xs, rngs=rng)

    return compile_program(config, params, run)


PROGRAMS: Programs = {
    f"{SIX_LINES}: jax.lax.scan": functools.partial(make_scan, SIX_LINES, bare=True),
    f"{SIX_LINES}: dropout_scan": functools.partial(make_scan, SIX_LINES),
}
for name in FLAX_CELLS:
    PROGRAMS |= {
        f"{name}: nn.RNN": functools.partial(make_linen, name, bare=True),
        f"{name}: dropout_scan": functools.partial(make_scan, name),
        f"{name}: fdc.linen.RNN": functools.partial(make_linen, name),
        f"{name}: nnx.RNN": functools.partial(make_nnx, name, bare=True),
        f"{name}: fdc.nnx.RNN": functools.partial(make_nnx, name),
    }

HALF = functools.partial(make_linen, "OptimizedLSTMCell", dtype=jnp.bfloat16)
PROGRAMS |= {
    "OptimizedLSTMCell in bfloat16: nn.RNN": functools.partial(HALF, bare=True),
    "OptimizedLSTMCell in bfloat16: fdc.linen.RNN": HALF,
}

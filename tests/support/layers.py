"""The layers of linen and NNX behind one face, each beside the stock layer with its weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import probes
from flax import nnx

import flax_dropout_cell as fdc

BATCH, STEPS, FEATURES, UNITS = 3, 6, 4, 16
LENGTHS = jnp.array([4, 6, 1])
XS = jax.random.normal(jax.random.key(1), (BATCH, STEPS, FEATURES))


class Layer(NamedTuple):
    """A layer with weights.

    Attributes:
      run: `run(xs, key=None, params=None, **options)`, the layer's call, on its own weights or
        others.
      stock: `stock(xs, **options)`, the call of the stock layer around the bare cell.
      params: the cell's weights.
      cell: the cell as a pure function of them.
      carry: the cell's initial carry.
    """

    run: Callable[..., Any]
    stock: Callable[..., Any]
    params: Any
    cell: Callable[..., Any]
    carry: Any


def linen_layer(cell: Any, spec: fdc.RecurrentDropout, xs: jax.Array, **options: Any) -> Layer:
    layer, stock = fdc.linen.RNN(cell, spec, **options), nn.RNN(cell, **options)
    variables = jax.jit(stock.init)(jax.random.key(7), xs)

    def pure(params: Any, carry: Any, x: jax.Array, **given: Any) -> Any:
        return cell.apply({"params": params}, carry, x, **given)

    def run(xs: jax.Array, key: Any = None, params: Any = None, **given: Any) -> Any:
        weights = variables if params is None else {"params": {"cell": params}}
        return layer.apply(weights, xs, rng=key, **given)

    return Layer(
        run=run,
        stock=lambda xs, **given: stock.apply(variables, xs, **given),
        params=variables["params"]["cell"],
        cell=pure,
        carry=cell.initialize_carry(jax.random.key(0), step_shape(xs, options)),
    )


def nnx_layer(cell: Any, spec: fdc.RecurrentDropout, xs: jax.Array, **options: Any) -> Layer:
    layer: Any = fdc.nnx.RNN(cell, spec, **options)
    graphdef, state = nnx.split(cell)

    def pure(params: Any, carry: Any, x: jax.Array, **given: Any) -> Any:
        leaves = jax.tree.leaves(params)
        run: Any = nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), leaves))
        return run(carry, x, **given)

    def run(xs: jax.Array, key: Any = None, params: Any = None, **given: Any) -> Any:
        if params is None:
            return layer(xs, rngs=key, **given)
        weights = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(params))
        other: Any = fdc.nnx.RNN(nnx.merge(graphdef, weights), spec, **options)
        return other(xs, rngs=key, **given)

    def stock(xs: jax.Array, **given: Any) -> Any:
        # Made where it runs: it writes to itself.
        rnn: Any = nnx.RNN(nnx.merge(graphdef, jax.tree.map(jnp.copy, state)), **options)
        return rnn(xs, **given)

    return Layer(
        run=run,
        stock=stock,
        params=nnx.to_pure_dict(state),
        cell=pure,
        carry=cell.initialize_carry(step_shape(xs, options), nnx.Rngs(0)),
    )


def step_shape(xs: jax.Array, options: dict[str, Any]) -> tuple[int, ...]:
    return xs.shape[1:] if options.get("time_major") else (*xs.shape[:-2], xs.shape[-1])


class Framework(NamedTuple):
    """The parts of a framework's layer."""

    layer: Callable[..., Layer]
    lstm: Callable[..., Any]
    stock_lstm: Callable[[], Any]
    gru: Callable[[], Any]
    probe: Callable[[], Any]
    rnn: type


FRAMEWORKS = {
    "linen": Framework(
        linen_layer,
        lambda **functions: fdc.linen.LSTMCell(UNITS, **functions),
        lambda: nn.OptimizedLSTMCell(UNITS),
        lambda: nn.GRUCell(UNITS),
        probes.LinenProbe,
        fdc.linen.RNN,
    ),
    "nnx": Framework(
        nnx_layer,
        lambda **functions: fdc.nnx.LSTMCell(FEATURES, UNITS, rngs=nnx.Rngs(0), **functions),
        lambda: nnx.LSTMCell(FEATURES, UNITS, rngs=nnx.Rngs(0)),
        lambda: nnx.GRUCell(FEATURES, UNITS, rngs=nnx.Rngs(0)),
        probes.NnxProbe,
        fdc.nnx.RNN,
    ),
}


def differ_widely(a: Any, b: Any) -> bool:
    return any((x != y).mean() > 0.1 for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))

"""Layers and wrappers of linen and NNX are exported with a symbolic batch and a symbolic time."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from asserts import assert_close
from flax import nnx
from jax import export

import flax_dropout_cell as fdc

RNG = jax.random.key(6)
XS = jax.random.normal(jax.random.key(1), (4, 5, 3))
SPEC = fdc.RecurrentDropout(
    input=fdc.Dropout(keep_prob=0.7, variational=True), output=fdc.Dropout(keep_prob=0.7)
)
LINEN = {
    "layer": lambda cell, **options: fdc.linen.RNN(cell, SPEC, **options),
    "wrapper": lambda cell, **options: nn.RNN(fdc.linen.DropoutCell(cell, SPEC, **options)),
}
NNX = {
    "NNX layer": lambda cell, *args, **options: fdc.nnx.RNN(cell, SPEC, *args, **options),
    "NNX wrapper": lambda cell, *args, **options: nnx.RNN(
        fdc.nnx.DropoutCell(cell, SPEC, *args, **options)
    ),
}


def linen_run(host: str, trains: bool) -> Any:
    model = LINEN[host](nn.GRUCell(8), deterministic=not trains)
    variables = model.init({"params": RNG, "dropout": RNG}, XS)
    return lambda xs: model.apply(variables, xs, rngs={"dropout": RNG} if trains else {})


def nnx_run(host: str, trains: bool) -> Any:
    """The exported function makes the module again, in its own trace: there streams may count."""
    model = NNX[host](nnx.GRUCell(3, 8, rngs=nnx.Rngs(0)), not trains, rngs=nnx.Rngs(dropout=1))
    graphdef, state = nnx.split(model)
    return lambda xs: nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))(xs)


@pytest.mark.parametrize("host", [*LINEN, *NNX])
@pytest.mark.parametrize("trains", [True, False], ids=["training", "evaluation"])
def test_export_with_a_symbolic_batch_and_time(host, trains) -> None:
    """It computes what the same program does, and in training not what evaluation does."""
    make = linen_run if host in LINEN else nnx_run
    run = jax.jit(make(host, trains))
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("batch, time, 3"), jnp.float32)
    exported = export.deserialize(export.export(run)(shape).serialize())
    assert_close(exported.call(XS), run(XS))
    assert ((exported.call(XS) == 0).any()) == trains


def test_export_of_training_with_resets() -> None:
    layer = fdc.linen.RNN(nn.GRUCell(8), SPEC)
    variables = layer.init({"params": RNG, "dropout": RNG}, XS)
    resets = jnp.arange(20).reshape(4, 5) % 3 == 0
    run = jax.jit(
        lambda xs, resets: layer.apply(variables, xs, resets=resets, rngs={"dropout": RNG})
    )
    shape = export.symbolic_shape("batch, time, 3")
    args = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:2], bool)
    exported = export.deserialize(export.export(run)(*args).serialize())
    assert_close(exported.call(XS, resets), run(XS, resets))

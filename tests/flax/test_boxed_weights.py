"""Weights in a FrozenDict or with partitioning metadata are noised as plain ones are."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.core import freeze

import flax_dropout_cell as fdc

FROZEN = fdc.Dropout(keep_prob=0.5, variational=True)
SPEC = fdc.RecurrentDropout(params={"h": {"kernel": FROZEN}, "i": None})
XS = jax.random.normal(jax.random.key(1), (2, 5, 3))
RNGS = {"dropout": jax.random.key(2)}


def layer(cell: Any) -> Any:
    return fdc.linen.RNN(cell, SPEC)


def wrapped(cell: Any) -> Any:
    return nn.RNN(fdc.linen.DropoutCell(cell, SPEC))


@pytest.mark.parametrize("host", [layer, wrapped])
def test_weights_in_a_frozen_dict(host: Any) -> None:
    rnn = host(nn.SimpleCell(8))
    variables = rnn.init(jax.random.key(0), XS)
    want = rnn.apply(variables, XS, rngs=RNGS)
    np.testing.assert_array_equal(rnn.apply(freeze(variables), XS, rngs=RNGS), want)


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="jax.set_mesh came after JAX 0.7.0")
@pytest.mark.parametrize("host", [layer, wrapped])
def test_weights_with_partitions_on_a_mesh(host: Any) -> None:
    """Flax constrains the sharding when it opens a box, which a shape does not take."""
    lecun = nn.initializers.lecun_normal()
    boxed = host(nn.SimpleCell(8, kernel_init=nn.with_partitioning(lecun, (None, "x"))))
    variables = boxed.init(jax.random.key(0), XS)
    want = host(nn.SimpleCell(8)).apply(nn.unbox(variables), XS, rngs=RNGS)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh):
        got = boxed.apply(jax.device_put(variables, whole), XS, rngs=RNGS)
    np.testing.assert_allclose(got, want, rtol=1e-6)

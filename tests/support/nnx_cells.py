"""NNX cells, and helpers that the tests of NNX share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from probes import BATCH, STEPS, UNITS, NnxProbe, noise_everywhere

import flax_dropout_cell as fdc
from flax_dropout_cell.nnx import DropoutCell

VARIATIONAL = fdc.Dropout(keep_prob=0.5, variational=True)
PER_STEP = fdc.Dropout(keep_prob=0.5)
MIXED = fdc.RecurrentDropout(
    input=VARIATIONAL, state=(None, PER_STEP), output=VARIATIONAL, params=PER_STEP
)

both_modes = pytest.mark.parametrize("noise", [VARIATIONAL, PER_STEP], ids=["variational", "step"])
compiled: Any = functools.cache(nnx.jit)


class Sum(nnx.RNNCellBase):
    """Emits its inputs and sums them up, so that either shows the masks."""

    def __init__(self, in_features: int = UNITS) -> None:
        self.in_features = in_features

    def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, Any]:
        return carry + inputs, inputs

    def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
        return jnp.zeros(input_shape)

    @property
    def num_feature_axes(self) -> int:
        return 1


class Counted(nnx.Variable):
    pass


class Counting(NnxProbe):
    """A cell that writes to a variable, and reads a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = Counted(jnp.zeros((), jnp.int32))

    def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, Any]:
        self.steps[...] = self.steps[...] + 1
        return super().__call__(carry, inputs)


def probe_of(noise: fdc.Noise | None, seed: Any = 0) -> DropoutCell:
    return DropoutCell(NnxProbe(), noise_everywhere(noise), rngs=nnx.Rngs(dropout=seed))


def wrapped(cell_class: Any, spec: fdc.RecurrentDropout) -> Any:
    rngs = nnx.Rngs(params=0, dropout=1)
    return DropoutCell(cell_class(3, 8, rngs=rngs), spec, rngs=rngs)


def rnn_of(cell: Any, **options: Any) -> Any:
    return nnx.RNN(cell, **options)


def inputs() -> jax.Array:
    return jax.random.normal(jax.random.key(5), (BATCH, STEPS, 3))


def run_rnn(rnn: Any, x: jax.Array, carry: Any = None) -> Any:
    return rnn(x, initial_carry=carry, return_carry=True)


def start(cell: Any, features: int = UNITS) -> Any:
    return cell.initialize_carry((BATCH, features), nnx.Rngs(0))


def draws_of(cell: Any) -> int:
    """How many keys the cell's stream has given."""
    return int(cell.dropout_stream.count[...])


def next_key(cell: Any) -> jax.Array:
    """The key that the cell's stream gives next."""
    return jax.random.fold_in(cell.dropout_stream.key[...], cell.dropout_stream.count[...])

"""Carries and weights that pass between NNX wrappers: of other specs, in parts, restored."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asserts import assert_same
from flax import nnx
from nnx_cells import PER_STEP, VARIATIONAL, Sum, rnn_of, start
from probes import BATCH, SHAPE, STEPS, UNITS, NnxProbe

import flax_dropout_cell as fdc
from flax_dropout_cell.nnx import DropoutCell

X = jnp.ones(SHAPE)


def cell_of(**sites: Any) -> Any:
    return DropoutCell(Sum(), fdc.RecurrentDropout(**sites), rngs=nnx.Rngs(0))


def noise_of(keep_prob: Any) -> fdc.Dropout:
    return fdc.Dropout(keep_prob=keep_prob, variational=True)


@pytest.mark.parametrize(
    "other",
    [
        {"input": noise_of(1.0)},
        {"input": noise_of(0.9)},
        {"input": VARIATIONAL, "output": PER_STEP},
        {},
    ],
    ids=["one", "more", "another site", "nothing"],
)
def test_a_carry_of_another_spec_is_refused(other: dict[str, Any]) -> None:
    carry = start(cell_of(input=VARIATIONAL))
    cell = cell_of(**other)
    with pytest.raises(ValueError, match=r"another spec.*\n.*\n.*\n.*redraw_masks") as error:
        cell(carry, X)
    assert len(str(error.value).splitlines()) <= 5
    cell(cell.redraw_masks(carry, X), X)
    cell_of(input=noise_of(np.float64(0.5)))(carry, X)  # an equal one goes on


def test_redraw_masks_draws_from_the_key_or_from_the_next_of_the_stream() -> None:
    cell = cell_of(input=VARIATIONAL)
    carry = start(cell)
    one, other = (cell.redraw_masks(carry, X).masks.input for _ in range(2))
    assert (one != other).any()
    rng = jax.random.key(7)
    masks = cell.redraw_masks(carry, X, rngs=rng).masks
    spec = fdc.RecurrentDropout(input=VARIATIONAL)
    echo = lambda params, carry, x: (carry, x)  # noqa: E731
    expected = fdc.draw_masks(None, carry.cell_carry, X, rng, cell=echo, dropout=spec)
    assert_same(masks.input, expected.input)


@pytest.mark.parametrize(
    "spec",
    [fdc.RecurrentDropout(output=PER_STEP), fdc.RecurrentDropout(params=VARIATIONAL)],
    ids=["output", "params"],
)
def test_a_sliced_carry_is_an_error_that_names_the_layer(spec: fdc.RecurrentDropout) -> None:
    cell = DropoutCell(NnxProbe(), spec, rngs=nnx.Rngs(0))
    part = jax.tree.map(lambda leaf: leaf[2:], start(cell))
    with pytest.raises(ValueError, match=r"sliced.*\n?.*RNN with sequence_ids"):
        cell(part, X[2:])


@dataclasses.dataclass(frozen=True)
class Flipped:
    """Turns the sign of all weights in evaluation, so that it is seen to be asked."""

    variational: bool = True

    def draw_mask(self, rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.bernoulli(rng, 0.5, shape)

    def apply(self, mask: jax.Array, value: jax.Array, previous: Any) -> jax.Array:
        return jnp.where(mask, -value, value)

    def expected(self, value: jax.Array, previous: Any) -> jax.Array:
        return -value


def test_evaluation_gives_the_expected_weights() -> None:
    """In a wrapper, in a wrapper's wrapper, in a layer and in the core."""
    spec = fdc.RecurrentDropout(params=Flipped())
    wrapped: Any = DropoutCell(NnxProbe(), spec, deterministic=True)
    twice: Any = DropoutCell(wrapped, fdc.RecurrentDropout(input=PER_STEP), deterministic=True)
    layer: Any = fdc.nnx.RNN(NnxProbe(), spec, deterministic=True)
    xs = jnp.ones((BATCH, STEPS, UNITS))
    for run in (rnn_of(wrapped), rnn_of(twice), layer):
        assert (run(xs)["params"] == -1).all()
    carry, weights = start(NnxProbe()), {"w": jnp.ones(UNITS)}
    cell = lambda params, carry, x: (carry, x * params["w"][None])  # noqa: E731
    _, y = fdc.dropout_cell(weights, carry, X, None, cell=cell, dropout=spec)
    assert (y == -1).all()


class Holder(nnx.RNNCellBase):
    """A user's cell that keeps an LSTM to itself."""

    def __init__(self) -> None:
        self.lstm = nnx.LSTMCell(UNITS, UNITS, rngs=nnx.Rngs(0))

    def __call__(self, carry: Any, inputs: jax.Array) -> Any:
        return self.lstm(carry, inputs)

    def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
        return self.lstm.initialize_carry(input_shape, rngs)

    @property
    def num_feature_axes(self) -> int:
        return 1


@pytest.mark.parametrize("noise", [VARIATIONAL, PER_STEP, fdc.Zoneout(prob=0.5)])
def test_an_lstm_made_in_the_cell_is_refused(noise: Any) -> None:
    spec = fdc.RecurrentDropout(state=noise)
    with pytest.raises(ValueError, match="one noise for the whole state would reach every leaf"):
        start(DropoutCell(Holder(), spec, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="one noise for the whole state would reach every leaf"):
        layer: Any = fdc.nnx.RNN(Holder(), spec, rngs=nnx.Rngs(0))
        layer(jnp.ones((BATCH, STEPS, UNITS)))

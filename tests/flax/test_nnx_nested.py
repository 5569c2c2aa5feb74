"""NNX: cells in cells: nested wrappers, stacks of wrapped cells, and an LSTM's memory."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from asserts import assert_same
from flax import nnx
from hand_masks import kept, site_key
from nnx_cells import (
    PER_STEP,
    VARIATIONAL,
    Sum,
    both_modes,
    draws_of,
    rnn_of,
    run_rnn,
    start,
)
from probes import BATCH, SHAPE, STEPS, UNITS, differ

import flax_dropout_cell as fdc
from flax_dropout_cell.nnx import DropoutCell


class MyLSTM(nnx.LSTMCell):
    pass


@pytest.mark.parametrize("cell_class", [nnx.LSTMCell, nnx.OptimizedLSTMCell, MyLSTM])
def test_one_noise_for_an_lstms_state_means_h(cell_class: Any) -> None:
    cell = cell_class(3, 8, rngs=nnx.Rngs(0))
    spec = fdc.RecurrentDropout(state=VARIATIONAL)
    nested = DropoutCell(cell, fdc.RecurrentDropout(), rngs=nnx.Rngs(0))
    for state in (
        start(DropoutCell(cell, spec, rngs=nnx.Rngs(0)), 3).masks.state,
        start(DropoutCell(nested, spec, rngs=nnx.Rngs(0)), 3).masks.state.cell_carry,
    ):
        assert state[0] is None
        assert state[1].shape == (BATCH, 8)
    both = fdc.RecurrentDropout(state=(VARIATIONAL, VARIATIONAL))
    c, h = start(DropoutCell(cell, both, rngs=nnx.Rngs(0)), 3).masks.state
    assert differ(c, h)


class Stack(nnx.RNNCellBase):
    """A user's own stacked cell, whose layers drop out by themselves."""

    def __init__(self, noise: fdc.Dropout, rngs: nnx.Rngs) -> None:
        spec = fdc.RecurrentDropout(output=noise)
        self.first: Any = DropoutCell(Sum(), spec, rngs=rngs)
        self.second: Any = DropoutCell(Sum(), spec, rngs=rngs)

    def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, Any]:
        first, y = self.first(carry[0], inputs)
        second, z = self.second(carry[1], jnp.ones_like(inputs))
        return (first, second), jnp.stack([y, z])

    def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
        return (
            self.first.initialize_carry(input_shape, rngs),
            self.second.initialize_carry(input_shape, rngs),
        )

    @property
    def num_feature_axes(self) -> int:
        return 1


@both_modes
def test_a_users_stack_of_dropout_cells(noise: fdc.Dropout) -> None:
    rnn = rnn_of(Stack(noise, nnx.Rngs(0)), time_major=True)
    layers = [ys[:, layer] for ys in (rnn(probes.ones()), rnn(probes.ones())) for layer in (0, 1)]
    for ys in layers:
        assert set(np.unique(ys)) == {0.0, 2.0}
        assert (ys[1:] == ys[:1]).all() == noise.variational
    for one, other in itertools.combinations(layers, 2):
        assert differ(one[0], other[0])


def test_one_noise_over_a_cell_that_holds_dropout_cells() -> None:
    spec = fdc.RecurrentDropout(state=VARIATIONAL)
    with pytest.raises(ValueError, match="one noise for the whole state would reach every leaf"):
        start(DropoutCell(Stack(PER_STEP, nnx.Rngs(0)), spec, rngs=nnx.Rngs(0)))


@both_modes
def test_wrappers_nest(noise: fdc.Dropout) -> None:
    spec = fdc.RecurrentDropout(input=noise, state=noise)
    inner = DropoutCell(Sum(), spec, rngs=nnx.Rngs(1))
    outer = DropoutCell(inner, spec, rngs=nnx.Rngs(2))
    rnn = rnn_of(outer)
    x = jnp.ones((BATCH, STEPS, UNITS))
    carry, ys = run_rnn(rnn, x)
    assert set(np.unique(ys)) == {0.0, 4.0}  # both have to keep a unit
    assert (ys[:, 1:] == ys[:, :1]).all() == noise.variational
    assert draws_of(inner) == draws_of(outer) == 1
    fresh: Any = outer.redraw_masks(carry, jnp.ones(SHAPE))
    assert draws_of(inner) == draws_of(outer) == 2
    assert_same(fresh.cell_carry.cell_carry, carry.cell_carry.cell_carry)
    if noise.variational:
        for other in (start(outer), fresh):
            assert differ(carry.masks.input, other.masks.input)
            assert differ(carry.masks.state.cell_carry, other.masks.state.cell_carry)
            assert differ(carry.cell_carry.masks.input, other.cell_carry.masks.input)
            assert differ(carry.cell_carry.masks.state, other.cell_carry.masks.state)
    rnn.eval()
    _, ys = run_rnn(rnn, x)
    assert (ys == 1).all()


@pytest.mark.parametrize("seed", [True, False], ids=["one rngs", "rngs of one seed"])
def test_nested_wrappers_draw_masks_of_their_own(seed: bool) -> None:
    """A unit is kept where both keep it: a quarter of them, not a half."""
    rngs = nnx.Rngs(0)
    cell: Any = Sum(1024)
    for _ in range(2):
        spec = fdc.RecurrentDropout(input=VARIATIONAL)
        cell = DropoutCell(cell, spec, rngs=rngs if seed else nnx.Rngs(dropout=0))
    _, y = cell(start(cell, 1024), jnp.ones((BATCH, 1024)))
    kept = float((y != 0).mean())
    sigma = (0.25 * 0.75 / (BATCH * 1024)) ** 0.5
    assert abs(kept - 0.25) < 5 * sigma


def test_three_nested_wrappers_draw_masks_of_their_own() -> None:
    cell: Any = Sum()
    noise = fdc.Dropout(keep_prob=0.5, variational=True)
    for _ in range(3):
        spec = fdc.RecurrentDropout(input=noise)
        cell = fdc.nnx.DropoutCell(cell, spec, rngs=nnx.Rngs(dropout=0))
    x = jnp.ones((4, 1024))
    _, y = cell(cell.initialize_carry(x.shape), x)
    share = float((y != 0).mean())
    assert abs(share - 1 / 8) < 5 * (1 / 8 * 7 / 8 / x.size) ** 0.5


@pytest.mark.parametrize("inside", [1, 2])
def test_the_key_of_a_wrapper_around_wrappers(inside: int) -> None:
    """Part of the random stream: the table in `_random/keys.py`."""
    cell: Any = Sum()
    for _ in range(inside):
        cell = DropoutCell(cell, fdc.RecurrentDropout())
    noise = fdc.Dropout(keep_prob=0.5, variational=True)
    outer = DropoutCell(cell, fdc.RecurrentDropout(input=noise), rngs=nnx.Rngs(dropout=7))
    shape = (BATCH, 16)
    _, y = outer(outer.initialize_carry(shape), jnp.ones(shape))
    own = nnx.Rngs(dropout=7)["dropout"].fork()()
    key = jax.random.fold_in(own, np.uint32(2**31 + 7 * 2**28 + inside))
    assert_same(y, np.where(kept(site_key(key, "input"), *shape), np.float32(2), np.float32(0)))

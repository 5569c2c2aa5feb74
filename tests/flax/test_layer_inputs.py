"""What layers read: padding of any pattern, several arrays, and no steps at all.

Compared with the stock layer, which runs each row by itself without its padding.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asserts import assert_close, assert_same
from flax import nnx
from hand_masks import kept, site_key
from layers import BATCH, FEATURES, FRAMEWORKS, STEPS, UNITS, XS, Framework
from quick_prng import quick_key

import flax_dropout_cell as fdc

NONE = fdc.RecurrentDropout()
ONCE = fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=0.5, variational=True))
frameworks = pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)
backward = pytest.mark.parametrize("reverse", [False, True])
VALID = np.array([[0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 0, 1], [1, 1, 0, 0, 0, 0]], bool)


def rows_by_hand(layer: Any, valid: np.ndarray, reverse: bool) -> tuple[Any, np.ndarray]:
    """The stock layer on each row's valid steps, with its outputs put back where these were."""
    carries, ys = [], np.zeros((BATCH, STEPS, UNITS), np.float32)
    for row, steps in enumerate(map(np.flatnonzero, valid)):
        options = {"return_carry": True, "reverse": reverse, "keep_order": True}
        carry, y = layer.stock(XS[row : row + 1, steps], **options)
        ys[row, steps] = y[0]
        carries.append(carry)
    return jax.tree.map(lambda *rows: np.concatenate(rows), *carries), ys


@frameworks
@backward
def test_padding_of_any_pattern(framework: Framework, reverse: bool) -> None:
    layer = framework.layer(framework.gru(), NONE, XS)
    options = {"return_carry": True, "reverse": reverse, "keep_order": True}
    got = layer.run(XS, deterministic=True, valid=VALID, **options)
    carry, ys = rows_by_hand(layer, VALID, reverse)
    assert_close(got, (carry, ys))
    if reverse:  # in the order in which they were made
        got = layer.run(XS, deterministic=True, valid=VALID, reverse=True)
        assert_close(got, ys[:, ::-1])


@pytest.mark.usefixtures("float64")
def test_reversed_rows_with_64_bits() -> None:
    """Under strict promotion, with lengths of 32 bits: the stock layer's, but for padding."""
    xs, lengths = np.asarray(XS, np.float32), np.array([5, 2, 6], np.int32)
    layer = fdc.linen.RNN(nn.GRUCell(UNITS), NONE, reverse=True)
    stock = nn.RNN(nn.GRUCell(UNITS), reverse=True)
    variables = layer.init(jax.random.key(0), xs)
    got = layer.apply(variables, xs, seq_lengths=lengths)
    with jax.numpy_dtype_promotion("standard"):
        want = np.array(stock.apply(variables, xs, seq_lengths=lengths))
    want[np.arange(STEPS)[None] >= lengths[:, None]] = 0
    assert_close(got, want)


@frameworks
@backward
def test_time_first(framework: Framework, reverse: bool) -> None:
    xs = XS.swapaxes(0, 1)
    layer = framework.layer(framework.gru(), ONCE, XS)
    options: Any = {"reverse": reverse, "key": quick_key(1)}
    batch_first = layer.run(XS, valid=VALID, **options)
    time_first = layer.run(xs, valid=VALID.T, time_major=True, **options)
    assert_close(time_first, batch_first.swapaxes(0, 1))
    assert_close(layer.run(XS, valid=np.ones_like(VALID), **options), layer.run(XS, **options))


@frameworks
def test_lengths_beyond_the_inputs_turn_no_output_round(framework: Framework) -> None:
    layer = framework.layer(framework.gru(), NONE, XS)
    lengths = np.array([STEPS, 2, 4])
    options: Any = {"deterministic": True, "reverse": True}
    _, ys = rows_by_hand(layer, np.arange(STEPS) < lengths[:, None], reverse=True)
    wanted = np.zeros_like(ys)
    for row, length in enumerate(lengths):
        wanted[row, :length] = ys[row, :length][::-1]
    beyond = jnp.array([STEPS + 3, 2, 4])
    assert_close(layer.run(XS, seq_lengths=beyond, **options), wanted)


class LinenClock(nn.RNNCellBase):
    """A cell that reads a time beside x."""

    @nn.compact
    def __call__(self, carry: Any, inputs: Any) -> Any:
        time, x = inputs
        h = jnp.tanh(nn.Dense(UNITS)(x) + nn.Dense(UNITS, name="h")(carry)) * time[..., None]
        return h, h

    @nn.nowrap
    def initialize_carry(self, rng: Any, input_shape: Any) -> Any:
        time, x = input_shape
        assert x == (*time, FEATURES)
        return jnp.full((*time, UNITS), 0.5)

    @property
    def num_feature_axes(self) -> int:
        return 1


class NNXClock(nnx.RNNCellBase):
    """The same in NNX."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.x = nnx.Linear(FEATURES, UNITS, rngs=rngs)
        self.h = nnx.Linear(UNITS, UNITS, rngs=rngs)

    def __call__(self, carry: Any, inputs: Any) -> Any:
        time, x = inputs
        h = jnp.tanh(self.x(x) + self.h(carry)) * time[..., None]
        return h, h

    def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
        time, x = input_shape
        assert x == (*time, FEATURES)
        return jnp.full((*time, UNITS), 0.5)

    @property
    def num_feature_axes(self) -> int:
        return 1


def clock(framework: str, time_major: bool) -> tuple[Any, Any]:
    """A layer around the cell, as a function, and the cell as one."""
    spec = fdc.RecurrentDropout(input=(None, ONCE.input))
    if framework == "linen":
        layer = fdc.linen.RNN(LinenClock(), spec, time_major=time_major)
        inputs = (jnp.ones((BATCH, STEPS)), XS)
        if time_major:
            inputs = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), inputs)
        variables = layer.init(jax.random.key(0), inputs)
        assert layer.describe(inputs).places[0].path == "input[1]"
        cell = {"params": variables["params"]["cell"]}
        return (
            lambda inputs, key, **given: layer.apply(variables, inputs, rng=key, **given),
            lambda carry, x: LinenClock().apply(cell, carry, x),
        )
    bare: Any = NNXClock()
    rnn: Any = fdc.nnx.RNN(bare, spec, time_major=time_major)
    return (lambda inputs, key, **given: rnn(inputs, rngs=key, **given)), bare


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_inputs_of_several_arrays(framework: str, time_major: bool) -> None:
    """A loop by hand over time and x, whose mask is drawn for the array that it is on."""
    run, cell = clock(framework, time_major)
    times = jnp.linspace(0.1, 1.0, BATCH * STEPS).reshape(BATCH, STEPS)
    inputs = (times, XS)
    if time_major:
        inputs = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), inputs)
    carry, ys = run(inputs, quick_key(2), valid=VALID.T if time_major else VALID, return_carry=True)

    mask = kept(site_key(quick_key(2), "input", leaf=1), BATCH, FEATURES)
    dropped = jnp.where(mask[:, None], 2 * XS, 0)
    for row in range(BATCH):
        h, wanted = jnp.full((1, UNITS), 0.5), np.zeros((STEPS, UNITS), np.float32)
        for t in np.flatnonzero(VALID[row]):
            h, y = cell(h, (times[row : row + 1, t], dropped[row : row + 1, t]))
            wanted[t] = y[0]
        assert_close(ys[:, row] if time_major else ys[row], wanted)
        assert_close(carry[row], h[0])


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_no_steps(framework: str) -> None:
    noise = fdc.Dropout(keep_prob=0.5, variational=True)
    spec = fdc.RecurrentDropout(input=noise, output=noise)
    none, resets = XS[:, :0], np.zeros((BATCH, 0), bool)
    if framework == "linen":
        layer = fdc.linen.RNN(nn.GRUCell(UNITS), spec, return_carry=True)
        variables = layer.init(jax.random.key(0), none)
        stock = nn.RNN(nn.GRUCell(UNITS)).init(jax.random.key(0), none)
        assert jax.tree.structure(variables) == jax.tree.structure(stock)

        def run(**given: Any) -> Any:
            return layer.apply(variables, none, rng=quick_key(0), **given)
    else:
        cell: Any = nnx.GRUCell(FEATURES, UNITS, rngs=nnx.Rngs(0))
        rnn: Any = fdc.nnx.RNN(cell, spec, return_carry=True)

        def run(**given: Any) -> Any:
            return rnn(none, rngs=quick_key(0), **given)

    for reverse in (False, True):
        for given in ({}, {"resets": resets}, {"valid": resets}, {"seq_lengths": [0] * BATCH}):
            carry, ys = run(reverse=reverse, **given)
            assert ys.shape == (BATCH, 0, UNITS)
            np.testing.assert_array_equal(carry, np.zeros((BATCH, UNITS)))


class LinenStarts(nn.GRUCell):
    """A cell that starts from a random carry."""

    @nn.nowrap
    def initialize_carry(self, rng: Any, input_shape: Any) -> Any:
        return jax.random.normal(rng, (*input_shape[:-1], UNITS))


class NNXStarts(nnx.GRUCell):
    """The same in NNX."""

    def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
        return jax.random.normal(rngs(), (*input_shape[:-1], UNITS))


def test_the_key_of_the_first_carry() -> None:
    """`init_key`, and then the source of the call; by default always the same."""
    none, one, two = XS[:, :0], jax.random.key(1), jax.random.key(2)

    def normal(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, (BATCH, UNITS))

    linen = fdc.linen.RNN(LinenStarts(UNITS), ONCE, return_carry=True)
    variables = linen.init(jax.random.key(5), XS)
    calls: list[Any] = [({}, jax.random.key(0)), ({"init_key": one}, one)]
    for given, key in calls:
        for rng, deterministic in ((two, False), (None, True)):
            carry, _ = linen.apply(variables, none, rng=rng, deterministic=deterministic, **given)
            assert_same(carry, normal(key))

    cell: Any = NNXStarts(FEATURES, UNITS, rngs=nnx.Rngs(5))
    layer: Any = fdc.nnx.RNN(cell, ONCE, return_carry=True, rngs=nnx.Rngs(dropout=6))
    for rngs, default in (
        (lambda: None, jax.random.key(0)),
        (lambda: two, jax.random.key(0)),
        (lambda: nnx.Rngs(dropout=2), jax.random.key(0)),
        (lambda: nnx.Rngs(carry=3, dropout=2), jax.random.key(3)),
        (lambda: nnx.RngStream(jax.random.key(4), tag="carry"), jax.random.key(4)),
    ):
        for given, key in (({}, default), ({"init_key": one}, one)):
            for deterministic in (False, True):
                carry, _ = layer(none, rngs=rngs(), deterministic=deterministic, **given)
                assert_same(carry, normal(jax.random.fold_in(key, 0)))

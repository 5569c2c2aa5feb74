"""TensorFlow's wrapper around NNX cells."""

import functools
import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asserts import assert_same
from flax import nnx
from hand_masks import kept, site_key, with_seed
from nnx_cells import (
    MIXED,
    Sum,
    compiled,
    draws_of,
    inputs,
    next_key,
    rnn_of,
    run_rnn,
    start,
)
from probes import BATCH, SHAPE, UNITS, NnxProbe, differ

import flax_dropout_cell as fdc
from flax_dropout_cell.nnx import DropoutCarry, DropoutCell, RNNCellDropoutWrapper


def wrap(cell: Any, *args: Any, **options: Any) -> Any:
    return RNNCellDropoutWrapper(cell, *args, **options, rngs=nnx.Rngs(dropout=0))


def visit_memories(state: Any) -> Any:
    return (True, False) if isinstance(state, tuple) else True


@pytest.mark.parametrize(
    ("cell_class", "variational"), [(nnx.OptimizedLSTMCell, True), (nnx.SimpleCell, False)]
)
def test_wrapper_is_a_dropout_cell(cell_class: Any, variational: bool) -> None:
    """TensorFlow's order of arguments: input, output, state, variational."""
    noise = functools.partial(fdc.Dropout, variational=variational, broadcast_dims=(0,))
    state = (
        (None, noise(keep_prob=0.5))
        if cell_class is nnx.OptimizedLSTMCell
        else noise(keep_prob=0.5)
    )
    spec = fdc.RecurrentDropout(
        input=noise(keep_prob=0.9), output=noise(keep_prob=0.8), state=state
    )
    cell = cell_class(3, 8, rngs=nnx.Rngs(0))
    wrapper = wrap(cell, 0.9, 0.8, 0.5, variational, 3, jnp.float32, broadcast_dims=[0])
    theirs = DropoutCell(cell, spec, rngs=nnx.Rngs(dropout=0))
    carry, ys = compiled(run_rnn)(rnn_of(wrapper), inputs())
    their_carry, their_ys = compiled(run_rnn)(rnn_of(theirs), inputs())
    assert_same(
        (carry.cell_carry, carry.masks, ys), (their_carry.cell_carry, their_carry.masks, their_ys)
    )
    dropped = np.asarray(ys == 0)
    assert dropped.any()
    assert (dropped == dropped[:1]).all()  # one mask for the batch
    assert (dropped == dropped[:, :1]).all() == variational
    _, again = compiled(run_rnn)(rnn_of(wrapper), inputs())
    assert differ(dropped, again == 0)


def test_wrapper_keeps_everything_by_default() -> None:
    cell = nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0))
    carry = start(wrap(cell), 3)
    assert not jax.tree.leaves(carry.masks)
    assert carry.rng is None
    assert_same(rnn_of(wrap(cell))(inputs()), rnn_of(cell)(inputs()))


def test_wrapper_evaluates() -> None:
    cell = nnx.SimpleCell(3, 8, rngs=nnx.Rngs(0))
    plain = rnn_of(cell)(inputs())
    off = RNNCellDropoutWrapper(cell, 0.5, 0.5, 0.5, deterministic=True)
    assert_same(rnn_of(off)(inputs()), plain)
    on = rnn_of(wrap(cell, 0.5, 0.5, 0.5))
    on.eval()
    assert_same(on(inputs()), plain)
    on.train()
    assert differ(on(inputs()), plain)


def spare_memories(state: Any) -> Any:
    """TensorFlow's usual visitor."""
    return fdc.LSTMState(c=False, h=True) if isinstance(state, fdc.LSTMState) else True


def test_visitor_says_which_state_is_dropped() -> None:
    cell = nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0))
    for visitor, wanted in (
        (None, (False, True)),
        (visit_memories, (True, False)),
        (spare_memories, (False, True)),
        (lambda _: True, (True, True)),
    ):
        wrapper = wrap(cell, 1.0, 1.0, 0.5, True, dropout_state_filter_visitor=visitor)
        assert tuple(mask is not None for mask in start(wrapper, 3).masks.state) == wanted
    wrapper = wrap(cell, 1.0, 1.0, 0.5, True, dropout_state_filter_visitor=lambda _: 1)
    with pytest.raises(TypeError, match="returned 1, a non-bool scalar"):
        start(wrapper, 3)


def test_seed_is_folded_into_the_streams_keys() -> None:
    masks = []
    for seed in (None, 0, 1, -1, 2**32, 2**40 + 1):
        wrapper = RNNCellDropoutWrapper(
            Sum(), 0.5, 1.0, 0.5, True, seed=seed, rngs=nnx.Rngs(dropout=0)
        )
        for _ in range(2):
            key = with_seed(next_key(wrapper), seed)
            mask = start(wrapper, 32).masks.input
            assert_same(mask, kept(site_key(key, "input"), BATCH, 32))
            masks.append(mask)
    for one, other in itertools.combinations(masks, 2):
        assert differ(one, other)


def test_wrapper_checks_what_arrives() -> None:
    cell, x = Sum(3), jnp.ones((BATCH, 3))

    def step(**options: Any) -> None:
        wrapper = wrap(cell, **options)
        wrapper(start(wrapper, 3), x)

    step(input_size=3, dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"input_size is 4, but an input of shape \(4, 3\)"):
        step(input_size=4)
    with pytest.raises(TypeError, match=r"dtype is bfloat16, but a float32 input arrived"):
        step(dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="RNNCellDropoutWrapper needs a 'dropout' stream"):
        start(RNNCellDropoutWrapper(cell, 0.5))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"input_keep_prob": 1.5}, ValueError, r"input_keep_prob must be between 0 and 1, got 1.5"),
        ({"state_keep_prob": "half"}, TypeError, r"state_keep_prob must be a number in \[0, 1\]"),
        ({"seed": 1.0}, TypeError, r"seed must be an int or None, got 1.0"),
        ({"dropout_state_filter_visitor": 3}, TypeError, r"visitor must be callable, got 3"),
    ],
)
def test_wrapper_checks_its_arguments(options: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        wrap(Sum(), **options)


def test_traced_keep_probs_do_not_retrace() -> None:
    traces = 0

    @nnx.jit
    def step(cell: Any) -> Any:
        nonlocal traces
        traces += 1
        _, y = cell(start(cell), jnp.ones(SHAPE))
        return y

    cell = wrap(Sum(), jnp.float32(1.0))
    for keep_prob in (1.0, 0.5):
        cell.input_keep_prob = jnp.float32(keep_prob)
        ys: Any = step(cell)
        assert set(np.unique(ys)) == ({1.0} if keep_prob == 1 else {0.0, 2.0})
    assert traces == 1


class Sized(Sum):
    state_size = "theirs"
    output_size = "their own"

    def zero_state(self, batch_size: int, dtype: Any) -> Any:
        return batch_size, dtype


def test_sizes_and_states() -> None:
    cell = nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0))
    wrapper = wrap(cell, 0.5, 0.5, 0.5)
    assert wrapper.wrapped_cell is cell
    assert wrapper.state_size == (8, 8)
    assert wrapper.output_size == 8
    assert draws_of(wrapper) == 0
    for state in (
        wrapper.zero_state(5, jnp.bfloat16),
        wrapper.get_initial_state(batch_size=5, dtype=jnp.bfloat16),
        wrapper.get_initial_state(jnp.ones((5, 3), jnp.bfloat16)),
    ):
        for leaf in state:
            assert_same(leaf, jnp.zeros((5, 8), jnp.bfloat16))
            assert leaf.dtype == jnp.bfloat16
    carry = wrapper.redraw_masks(wrapper.zero_state(BATCH, jnp.float32), jnp.ones((BATCH, 3)))
    wrapper(carry, inputs()[:, 0])

    nested = wrap(DropoutCell(cell, MIXED))
    assert nested.output_size == 8
    assert nested.state_size == DropoutCarry((8, 8), None, None)
    assert nested.zero_state(2, jnp.float32).masks is None

    sized = wrap(Sized())
    assert (sized.state_size, sized.output_size) == ("theirs", "their own")
    assert sized.zero_state(3, "f") == (3, "f")
    assert wrap(NnxProbe(jnp.ones(7)), input_size=7).state_size == {"a": 7, "b": 7}
    with pytest.raises(ValueError, match="has no in_features; give input_size"):
        _ = wrap(NnxProbe(jnp.ones(7))).state_size
    with pytest.raises(ValueError, match="batch_size is 4, but inputs have a batch of 5"):
        wrapper.get_initial_state(jnp.ones((5, 3)), batch_size=4)
    with pytest.raises(ValueError, match="give inputs, or batch_size and dtype"):
        wrapper.get_initial_state()


def test_config_round_trip() -> None:
    cell = nnx.LSTMCell(3, 8, activation_fn=jnp.sin, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    wrapper = wrap(
        cell, 0.5, 0.6, jnp.float32(0.5), True, 3, jnp.bfloat16, 7, visit_memories, (0,), True
    )
    config = wrapper.get_config()
    assert (config["seed"], config["deterministic"]) == (7, True)
    kept = {"in_features", "hidden_features", "activation_fn", "param_dtype"}
    assert config["cell"]["config"].keys() == kept
    stored = json.loads(json.dumps(config))
    twin: Any = RNNCellDropoutWrapper.from_config(
        stored, rngs=nnx.Rngs(0), trusted=(__name__, "nnx_cells")
    )
    assert twin.get_config() == config
    assert twin.cell.activation_fn is jnp.sin
    assert twin.dropout_state_filter_visitor is visit_memories
    assert twin.cell.hi.kernel[...].dtype == jnp.bfloat16
    twin.train()
    _, y = twin(start(twin, 3), inputs()[:, 0].astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16


def test_config_of_nested_wrappers() -> None:
    wrapper = wrap(wrap(nnx.GRUCell(3, 8, rngs=nnx.Rngs(0)), 0.5), 0.25)
    twin: Any = RNNCellDropoutWrapper.from_config(wrapper.get_config(), rngs=nnx.Rngs(0))
    assert (twin.input_keep_prob, twin.cell.input_keep_prob) == (0.25, 0.5)
    start(twin, 3)


class Around(Sum):
    """A cell that holds a cell."""

    def __init__(self, inner: Any, in_features: int = UNITS) -> None:
        super().__init__(in_features)
        self.inner = inner


def test_config_of_a_cell_that_holds_a_cell() -> None:
    wrapper = wrap(Around(nnx.GRUCell(3, 8, rngs=nnx.Rngs(0))))
    config = json.loads(json.dumps(wrapper.get_config()))
    twin: Any = RNNCellDropoutWrapper.from_config(
        config, rngs=nnx.Rngs(0), trusted=(__name__, "nnx_cells")
    )
    assert twin.cell.inner.hidden_features == 8
    assert twin.get_config() == config


class Forgetful(Sum):
    def __init__(self, width: int) -> None:
        super().__init__(width)


def test_what_a_config_cannot_hold() -> None:
    config = wrap(nnx.GRUCell(3, 8, rngs=nnx.Rngs(0))).get_config()
    with pytest.raises(ValueError, match=r"GRUCell needs a key.*rngs=nnx.Rngs\(0\) to from_config"):
        RNNCellDropoutWrapper.from_config(config)
    with pytest.raises(ValueError, match="has no import path"):
        wrap(Sum(), dropout_state_filter_visitor=lambda _: True).get_config()
    with pytest.raises(ValueError, match="Forgetful takes width and has no attribute of that name"):
        wrap(Forgetful(3)).get_config()
    with pytest.raises(ValueError, match="input_keep_prob is traced"):
        nnx.jit(lambda wrapper: wrapper.get_config())(wrap(Sum(), jnp.float32(0.5)))
    weightless: Any = RNNCellDropoutWrapper.from_config(
        wrap(Sum(3)).get_config(), trusted=(__name__, "nnx_cells")
    )
    assert weightless.cell.in_features == 3


def test_input_sizes_of_any_structure() -> None:
    wrapper = wrap(Sum(), input_size={"a": 3, "b": [4]})
    assert wrapper.input_size == {"a": 3, "b": [4]}
    assert nnx.jit(lambda wrapper: wrapper.input_size["a"])(wrapper) == 3


def test_equal_modules_share_a_program() -> None:
    traces = 0

    @nnx.jit
    def trace(cell: Any) -> None:
        nonlocal traces
        traces += 1

    call: Any = trace
    cells: list[Any] = []  # kept, for a new object may have the id of one that is gone
    for keep_prob in (0.5, 0.5, 0.25):
        spec = fdc.RecurrentDropout(params={"w": fdc.Dropout(keep_prob=keep_prob)})
        cells.append(DropoutCell(NnxProbe(), spec, rngs=nnx.Rngs(0)))
    cells += [wrap(Sum(), input_size={"a": size}) for size in (3, 3)]
    hashes = [hash(nnx.split(cell)[0]) for cell in cells]
    assert hashes[0] == hashes[1]
    assert hashes[3] == hashes[4]
    for cell, want in zip(cells, (1, 1, 2, 3, 3), strict=True):
        call(cell)
        assert traces == want

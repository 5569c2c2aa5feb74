"""NNX: the cell's weights and other state, the numbers of the core and of linen, and training."""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import nnx_hosts
import numpy as np
import probes
import pytest
from asserts import assert_close, assert_same
from flax import nnx
from nnx_cells import (
    PER_STEP,
    VARIATIONAL,
    Counting,
    Sum,
    both_modes,
    compiled,
    draws_of,
    inputs,
    next_key,
    probe_of,
    rnn_of,
    run_rnn,
    start,
    wrapped,
)
from probes import BATCH, NOTHING, SHAPE, STEPS, UNITS, NnxProbe, differ

import flax_dropout_cell as fdc
from flax_dropout_cell import linen
from flax_dropout_cell.nnx import DropoutCell, RNNCellDropoutWrapper

X = jnp.ones((1, 3, 1))


class Scaled(nnx.RNNCellBase):
    """`h' = w h + w x`, of one unit."""

    def __init__(self, weight: nnx.Param) -> None:
        self.weight = weight

    def __call__(self, h: jax.Array, x: jax.Array) -> Any:
        h = self.weight[...] * h + self.weight[...] * x
        return h, h

    def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
        return jnp.zeros(input_shape)

    @property
    def num_feature_axes(self) -> int:
        return 1


def outputs(layer: Any) -> jax.Array:
    """Of one row and one unit, for inputs of ones."""
    return layer(X)[0, :, 0]


CELLS = (nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.SimpleCell, nnx.GRUCell)


@pytest.mark.parametrize(
    ("cell_class", "params", "state"),
    [
        (nnx.LSTMCell, None, (None, PER_STEP)),
        (nnx.OptimizedLSTMCell, None, (PER_STEP, VARIATIONAL)),
        (nnx.SimpleCell, VARIATIONAL, VARIATIONAL),
        (nnx.GRUCell, None, fdc.Dropout(keep_prob=0.5, scale=False)),
    ],
)
def test_a_host_gives_the_numbers_of_dropout_scan(cell_class: Any, params: Any, state: Any) -> None:
    spec = fdc.RecurrentDropout(input=VARIATIONAL, output=PER_STEP, state=state, params=params)
    cell = wrapped(cell_class, spec)
    key = next_key(cell)
    graphdef, weights, rest = nnx.split(cell.cell, nnx.Param, ...)
    scan = jax.jit(
        lambda: fdc.dropout_scan(
            weights,
            start(cell.cell, 3),
            jnp.swapaxes(inputs(), 0, 1),
            key,
            cell=lambda weights, carry, x: nnx.merge(graphdef, weights, rest)(carry, x),
            dropout=spec,
        )
    )
    carry, ys = scan()
    got_carry, got = run_rnn(rnn_of(cell), inputs())
    got = jnp.swapaxes(got, 0, 1)
    assert_same(got == 0, ys == 0)
    assert_close((got_carry.cell_carry, got), (carry, ys))


def test_padded_rows_of_a_reversed_sequence() -> None:
    lengths = jnp.array([3, 1, STEPS, 2])
    cell = wrapped(nnx.SimpleCell, fdc.RecurrentDropout(input=VARIATIONAL, state=PER_STEP))
    carry = start(cell, 3)
    last, _ = rnn_of(cell)(
        inputs(), initial_carry=carry, seq_lengths=lengths, reverse=True, return_carry=True
    )
    step = compiled(lambda cell, carry, x: cell(carry, x))
    for row, length in enumerate(lengths.tolist()):
        alone = carry
        for t in reversed(range(length)):
            alone, _ = step(cell, alone, inputs()[:, t])
        assert_close(last.cell_carry[row], alone.cell_carry[row])


@both_modes
def test_redraw_masks_keeps_the_state_and_nothing_else(noise: fdc.Dropout) -> None:
    cell: Any = probe_of(noise)
    carry, _ = cell(start(cell), jnp.ones(SHAPE))
    fresh: Any = cell.redraw_masks(carry, jnp.ones(SHAPE))
    assert draws_of(cell) == 2
    assert_same(fresh.cell_carry, carry.cell_carry)
    old_masks, masks = jax.tree.leaves(carry.masks), jax.tree.leaves(fresh.masks)
    assert len(masks) == (5 if noise.variational else 0)
    for mask, old in zip(masks, old_masks, strict=True):
        assert differ(mask, old)
    if not noise.variational:
        assert differ(fresh.rng.key, carry.rng.key)
        assert fresh.rng.step.tolist() == [0]
    of_the_cell = cell.redraw_masks(carry.cell_carry, jnp.ones(SHAPE))
    assert_same(of_the_cell.cell_carry, carry.cell_carry)
    cell(of_the_cell, jnp.ones(SHAPE))


@pytest.mark.parametrize("variational", [True, False], ids=["variational", "step"])
def test_linen_and_nnx_agree(variational: bool) -> None:
    """One carry, one set of weights, one answer."""
    ours = nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0))
    weights = {
        name.rstrip("_"): jax.tree.map(lambda leaf: leaf + 0.1, layer)
        for name, layer in nnx.to_pure_dict(nnx.state(ours, nnx.Param)).items()
    }
    nnx.update(ours, {name + "_" * (name == "if"): layer for name, layer in weights.items()})
    noise = fdc.Dropout(keep_prob=0.7, variational=variational)
    params = noise if variational else None
    spec = fdc.RecurrentDropout(input=noise, state=noise, output=noise, params=params)
    cell: Any = DropoutCell(ours, spec, rngs=nnx.Rngs(0))
    carry = their_carry = start(cell, 3)
    if variational:
        renamed = {name.rstrip("_"): mask for name, mask in carry.masks.params.items()}
        their_carry = carry._replace(masks=carry.masks._replace(params=renamed))
    agree(cell, linen.DropoutCell(nn.LSTMCell(8), spec), weights, carry, their_carry)


def test_linen_and_nnx_wrappers_agree() -> None:
    ours = nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0))
    weights = {
        name.rstrip("_"): layer
        for name, layer in nnx.to_pure_dict(nnx.state(ours, nnx.Param)).items()
    }
    args = (0.5, 0.6, 0.7, True)
    cell: Any = RNNCellDropoutWrapper(ours, *args, seed=3, rngs=nnx.Rngs(0))
    carry = start(cell, 3)
    theirs = linen.RNNCellDropoutWrapper(nn.LSTMCell(8), *args, seed=3)
    agree(cell, theirs, weights, carry, carry)


def agree(ours: Any, theirs: Any, weights: Any, carry: Any, their_carry: Any) -> None:
    last, ys = run_rnn(rnn_of(ours), inputs(), carry)
    rnn: Any = nn.RNN(theirs, return_carry=True)
    variables = {"params": {"cell": weights}}
    their_last, their_ys = rnn.apply(variables, inputs(), initial_carry=their_carry)
    assert_same(ys == 0, their_ys == 0)
    assert (ys == 0).any()
    assert_close((last.cell_carry, ys), (their_last.cell_carry, their_ys))


def in_scan_that_carries_the_state(cell: Any, xs: jax.Array) -> tuple[Any, Any]:
    return nnx_hosts.in_nnx_scan(cell, xs, axes=nnx.StateAxes({...: nnx.Carry}))


@pytest.mark.parametrize(
    "host", [nnx_hosts.in_nnx_rnn, in_scan_that_carries_the_state, nnx_hosts.in_nnx_loop]
)
def test_disturbed_weights_leave_the_cell_as_it_was(host: Any) -> None:
    spec = fdc.RecurrentDropout(params=VARIATIONAL)
    cell: Any = DropoutCell(Counting(), spec, rngs=nnx.Rngs(0))
    _, ys = host(cell, probes.ones())
    assert (ys["params"] == 0).any()
    assert (cell.cell.w[...] == 1).all()
    assert int(cell.cell.steps[...]) == STEPS  # the cell's other writes stay


def test_tracing_for_shapes_leaves_the_cell_as_it_was() -> None:
    spec = fdc.RecurrentDropout(output={**NOTHING, "output": VARIATIONAL})
    inner: Any = DropoutCell(Counting(), spec, rngs=nnx.Rngs(0))
    start(DropoutCell(inner, spec, rngs=nnx.Rngs(0)))
    assert int(inner.cell.steps[...]) == 0
    assert draws_of(inner) == 1  # for its own masks
    assert inner.deterministic is False


@pytest.mark.parametrize("cell_class", CELLS)
def test_dropped_weights_get_no_gradient(cell_class: Any) -> None:
    cell = wrapped(cell_class, fdc.RecurrentDropout(params=VARIATIONAL))
    carry = start(cell, 3)

    def loss(cell: Any) -> jax.Array:
        ones = jax.tree.map(jnp.ones_like, carry.cell_carry)
        _, y = cell(carry._replace(cell_carry=ones), inputs()[:, 0])
        return jnp.sum(y**2)

    grads: Any = nnx.jit(nnx.grad(loss))(cell)
    masks = jax.tree.leaves(carry.masks.params)
    for grad, mask in zip(jax.tree.leaves(grads), masks, strict=True):
        assert_same(grad != 0, np.asarray(mask[0]))


def test_a_prefix_of_weights_is_a_plain_dict() -> None:
    spec = fdc.RecurrentDropout(params={"dense_h": {"kernel": VARIATIONAL}, "dense_i": None})
    cell = wrapped(nnx.GRUCell, spec)
    masks = start(cell, 3).masks.params
    assert masks["dense_i"] == {"bias": None, "kernel": None}
    assert masks["dense_h"]["kernel"].shape == (1, 8, 24)
    _, first = compiled(run_rnn)(rnn_of(cell), inputs())
    _, second = compiled(run_rnn)(rnn_of(cell), inputs())
    assert differ(first, second)


def test_training_steps_do_not_retrace() -> None:
    spec = fdc.RecurrentDropout(
        input=VARIATIONAL, output=PER_STEP, params=fdc.Dropout(keep_prob=0.9)
    )
    model = rnn_of(wrapped(nnx.SimpleCell, spec))
    traces = 0

    def loss(model: Any, x: jax.Array) -> Any:
        nonlocal traces
        traces += 1
        y = model(x)
        return jnp.mean((y - 0.5) ** 2), y == 0

    @nnx.jit
    def train_step(model: Any, x: jax.Array) -> Any:
        (value, dropped), grads = nnx.value_and_grad(loss, has_aux=True)(model, x)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda param, grad: param - 0.3 * grad, params, grads))
        return value, dropped

    step: Any = train_step
    values, dropped = zip(*(step(model, inputs()) for _ in range(30)), strict=True)
    assert traces == 1
    for one, other in itertools.pairwise(dropped):
        assert differ(one, other)
    assert np.mean(values[-5:]) < np.mean(values[:5])
    assert draws_of(model.cell) == 30


# Weights of a bare model


class Model(nnx.Module):
    """With layers before and after, by name, and a cell under as many wrappers as asked."""

    def __init__(self, wrappers: int, seed: int = 0) -> None:
        rngs = nnx.Rngs(params=seed, dropout=1)
        spec = fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=0.5, variational=True))
        cell: Any = nnx.LSTMCell(3, 8, rngs=rngs)
        for _ in range(wrappers):
            cell = DropoutCell(cell, spec, rngs=rngs)
        self.before = nnx.Linear(3, 3, rngs=rngs)
        self.rnn: Any = nnx.RNN(cell)
        self.then = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.then(self.rnn(self.before(x)))


@pytest.mark.parametrize("as_dict", [False, True], ids=["state", "pure dict"])
@pytest.mark.parametrize("wrappers", [1, 2])
def test_weights_of_a_bare_model_load(wrappers: int, as_dict: bool) -> None:
    bare, model = Model(0, seed=1), Model(wrappers, seed=2)
    weights: Any = nnx.state(bare, nnx.Param)
    kept = jax.tree.structure(nnx.state(model))
    nnx.update(model, nnx.to_pure_dict(weights) if as_dict else weights)
    assert jax.tree.structure(nnx.state(model)) == kept
    model.eval()
    assert_same(model(inputs()), bare(inputs()))


def test_weights_of_a_wrapped_model_load_into_a_bare_one() -> None:
    bare, model = Model(0, seed=1), Model(1, seed=2)
    model.rnn.cell = model.rnn.cell.cell
    nnx.update(bare, nnx.state(model, nnx.Param))
    assert_same(model(inputs()), bare(inputs()))


def test_weights_of_a_bare_layer_load() -> None:
    bare, model = Model(0, seed=1), Model(1, seed=2)
    nnx.update(model.rnn.cell, nnx.state(bare.rnn, nnx.Param))
    model.eval()
    assert_same(model.rnn(inputs()), bare.rnn(inputs()))


class Outer(Sum):
    """A cell that holds a cell, under the name that a wrapper gives it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.cell = nnx.SimpleCell(3, 8, rngs=nnx.Rngs(seed))


def test_weights_of_a_bare_layer_load_whatever_its_cells_fields_are_called() -> None:
    bare, rnn = (nnx.RNN(Outer(seed)) for seed in (1, 2))
    rnn.cell = DropoutCell(rnn.cell, fdc.RecurrentDropout())
    nnx.update(rnn.cell, nnx.state(bare, nnx.Param))
    assert_same(nnx.state(rnn.cell.cell, nnx.Param), nnx.state(bare.cell, nnx.Param))


@pytest.mark.parametrize("as_dict", [False, True], ids=["state", "pure dict"])
@pytest.mark.parametrize("wrappers", [1, 2])
def test_a_model_loads_if_its_cell_holds_a_cell(wrappers: int, as_dict: bool) -> None:
    """Its state is at `cell.cell`, as that of a wrapped cell would be."""
    bare, rnn = (nnx.RNN(Outer(seed)) for seed in (1, 2))
    cell = rnn.cell
    for _ in range(wrappers):
        rnn.cell = DropoutCell(rnn.cell, fdc.RecurrentDropout())
    kept, weights = jax.tree.structure(nnx.state(rnn)), nnx.state(bare, nnx.Param)
    nnx.update(rnn, nnx.to_pure_dict(weights) if as_dict else weights)
    assert_same(nnx.state(cell, nnx.Param), nnx.state(bare.cell, nnx.Param))
    assert jax.tree.structure(nnx.state(rnn)) == kept


class WithGain(DropoutCell):
    """A wrapper with state of its own, made before the wrapper's or after it."""

    def __init__(self, first: bool) -> None:
        if first:
            self.gain = nnx.Param(jnp.ones(3))
        super().__init__(Sum(), fdc.RecurrentDropout())
        if not first:
            self.gain = nnx.Param(jnp.ones(3))
        self.notes = nnx.data({"a": jnp.zeros(1)})


@pytest.mark.parametrize("first", [True, False])
def test_state_of_a_subclass_of_a_wrapper_is_its_own(first: bool) -> None:
    cell: Any = WithGain(first)
    assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(cell))} == {"gain", "notes"}
    assert not {"gain", "notes"} & vars(cell.cell).keys()
    cell.late = nnx.Param(jnp.ones(1))
    assert "late" in vars(cell) and "late" not in vars(cell.cell)


class WithDropout(Sum):
    """A cell with an attribute that a wrapper has too."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.dropout: Any = nnx.Dropout(0.5, rngs=nnx.Rngs(seed))


def test_a_model_loads_if_its_cell_holds_a_dropout() -> None:
    bare, cell = WithDropout(1), WithDropout(2)
    nnx.update(DropoutCell(cell, fdc.RecurrentDropout()), nnx.state(bare))
    keys = [each.dropout.rngs.key[...] for each in (cell, bare)]
    assert_same(*map(jax.random.key_data, keys))


def test_weights_of_a_bare_cell_with_weights_of_its_own_load() -> None:
    """Its weights stand in the cell itself, not in a layer of it."""
    bare, cell = NnxProbe(jnp.full(UNITS, 3.0)), DropoutCell(NnxProbe(), fdc.RecurrentDropout())
    nnx.update(cell, nnx.state(bare, nnx.Param))
    assert (cell.cell.w[...] == 3).all()


# Noise on weights that are not there


class Buffer(nnx.Variable):
    pass


class Unnamed(Sum):
    """A cell whose weights are no `nnx.Param`."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = Buffer(jnp.ones(UNITS))


@pytest.mark.parametrize("params", [PER_STEP, VARIATIONAL, {"scale": PER_STEP}])
@pytest.mark.parametrize("evaluate", [False, True])
def test_noise_on_params_that_meets_none_is_an_error(params: Any, evaluate: bool) -> None:
    spec = fdc.RecurrentDropout(params=params)
    for cell in (Sum(), Unnamed()):
        held = f"{type(cell).__name__} has no weights for it: they must be nnx.Params"
        rnn = rnn_of(DropoutCell(cell, spec, deterministic=evaluate, rngs=nnx.Rngs(0)))
        with pytest.raises(ValueError, match=held):
            rnn(jnp.ones((BATCH, STEPS, UNITS)))


@pytest.mark.skipif(not hasattr(nnx.Param, "get_raw_value"), reason="Flax 0.11 has no such method")
def test_a_param_that_computes_its_value_computes_it_once() -> None:
    """Stored as a logarithm, a weight of 1 sums the inputs, in the layer and in the wrapper."""

    class Positive(nnx.Param):
        def get_value(self, **options: Any) -> Any:
            return jnp.exp(super().get_value(**options))

    cell = Scaled(Positive(jnp.float32(0)))
    assert_same(outputs(fdc.nnx.RNN(cell, fdc.RecurrentDropout())), jnp.array([1.0, 2, 3]))
    kept = fdc.Dropout(keep_prob=jnp.float32(1), variational=True)  # an array draws, and drops none
    noisy = DropoutCell(cell, fdc.RecurrentDropout(params=kept), rngs=nnx.Rngs(0))
    for evaluate in (False, True):
        noisy.deterministic = evaluate
        assert_same(outputs(nnx.RNN(noisy)), jnp.array([1.0, 2, 3]))


@pytest.mark.parametrize("transform", [nnx.remat, nnx.jit])
@pytest.mark.parametrize("site", ["input", "params"])
def test_a_transformation_inside_of_a_cell(transform: Any, site: str) -> None:
    """It hands all Params back anew, which is no write: the numbers are those of the cell alone."""

    class Transformed(Scaled):
        def __call__(self, h: jax.Array, x: jax.Array) -> Any:
            h = transform(lambda cell, h, x: cell.weight[...] * (h + x))(self, h, x)
            return h, h

    kept = fdc.Dropout(keep_prob=jnp.float32(1), variational=True)
    cell, spec = Transformed(nnx.Param(jnp.float32(2))), fdc.RecurrentDropout(**{site: kept})
    wanted = jnp.array([2.0, 6, 14])
    assert_same(outputs(fdc.nnx.RNN(cell, spec, rngs=nnx.Rngs(0))), wanted)
    assert_same(outputs(nnx.RNN(DropoutCell(cell, spec, rngs=nnx.Rngs(0)))), wanted)


@pytest.mark.skipif(not hasattr(nnx, "var_defaults"), reason="Flax 0.11 has no such option")
def test_params_that_are_references() -> None:
    with nnx.var_defaults(ref=True):
        cell = Scaled(nnx.Param(jnp.float32(2)))
    kept = fdc.Dropout(keep_prob=jnp.float32(1), variational=True)
    spec = fdc.RecurrentDropout(params=kept)
    assert_same(outputs(fdc.nnx.RNN(cell, spec, rngs=nnx.Rngs(0))), jnp.array([2.0, 6, 14]))

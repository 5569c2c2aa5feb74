"""`DropoutCell` around linen's cells, in linen's hosts."""

import dataclasses
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from added_noise import Added
from hand_masks import lstm_row
from quick_prng import QUICK, quick_key

import flax_dropout_cell as fdc
from flax_dropout_cell.linen import DropoutCell

B, T, F, H = 4, 6, 3, 8
RNG = quick_key(5)
XS = jax.random.normal(jax.random.key(1), (B, T, F))
IMAGES = jax.random.normal(jax.random.key(1), (2, 3, 6, 6, 2))
VARIATIONAL = fdc.Dropout(keep_prob=0.5, variational=True)
PER_STEP = fdc.Dropout(keep_prob=0.5)

CELLS = {
    "LSTMCell": nn.LSTMCell(H),
    "OptimizedLSTMCell": nn.OptimizedLSTMCell(H),
    "GRUCell": nn.GRUCell(H),
    "MGUCell": nn.MGUCell(H),
    "SimpleCell": nn.SimpleCell(H),
    "ConvLSTMCell": nn.ConvLSTMCell(4, kernel_size=(3, 3)),
}
cells = pytest.mark.parametrize("name", CELLS)
GRU_FAMILY = ("GRUCell", "MGUCell")
LSTM_FAMILY = ("LSTMCell", "OptimizedLSTMCell", "ConvLSTMCell")


def inputs_of(name: str) -> jax.Array:
    return IMAGES if name == "ConvLSTMCell" else XS


def on_state(name: str, noise: fdc.Dropout) -> fdc.Dropout:
    """The noise, which a GRU takes on its state only where it does not scale."""
    return dataclasses.replace(noise, scale=False) if name in GRU_FAMILY else noise


def apply(rnn: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return rnn.apply(*args, **kwargs)


def train(
    rnn: nn.Module, variables: Any, xs: jax.Array, rng: jax.Array = RNG, **kwargs: Any
) -> Any:
    return apply(rnn, variables, xs, rngs={"dropout": rng}, **kwargs)


@cells
def test_weights_keep_their_names_and_values(name) -> None:
    xs = inputs_of(name)
    spec = fdc.RecurrentDropout(input=VARIATIONAL, params=VARIATIONAL)
    for host in (nn.RNN, lambda cell: nn.Bidirectional(nn.RNN(cell), nn.RNN(cell.copy()))):
        bare = host(CELLS[name]).init(RNG, xs)
        wrapped = host(DropoutCell(CELLS[name], spec)).init(RNG, xs)
        jax.tree.map(np.testing.assert_array_equal, wrapped, bare)


@cells
def test_evaluation_is_the_bare_cell(name) -> None:
    xs = inputs_of(name)
    state = None if name in GRU_FAMILY else VARIATIONAL
    spec = fdc.RecurrentDropout(input=PER_STEP, state=state, output=PER_STEP, params=VARIATIONAL)
    bare = nn.RNN(CELLS[name])
    variables = bare.init(RNG, xs)
    rnn = nn.RNN(DropoutCell(CELLS[name], spec, deterministic=True))
    np.testing.assert_array_equal(rnn.apply(variables, xs), bare.apply(variables, xs))
    np.testing.assert_array_equal(train(rnn, variables, xs), bare.apply(variables, xs))


@cells
def test_nn_rnn_is_dropout_scan(name) -> None:
    """With the key that the wrapper drew, the core gives the same numbers, for every cell."""
    cell, xs = CELLS[name], inputs_of(name)
    state = on_state(name, VARIATIONAL)
    state = (None, state) if name in LSTM_FAMILY else state
    spec = fdc.RecurrentDropout(input=PER_STEP, state=state, output=VARIATIONAL, params=VARIATIONAL)
    rnn = nn.RNN(DropoutCell(cell, spec), return_carry=True)
    variables = rnn.init(RNG, xs)
    carry, ys = train(rnn, variables, xs)
    first = cell.initialize_carry(RNG, xs[:, 0].shape)
    weights = {"params": variables["params"]["cell"]}
    core_spec = fdc.RecurrentDropout(
        input=spec.input, state=spec.state, output=spec.output, params={"params": spec.params}
    )
    key = jax.random.wrap_key_data(carry.rng.key[0], impl=QUICK)
    want_carry, want = fdc.dropout_scan(
        weights, first, xs.swapaxes(0, 1), key, cell=cell.apply, dropout=core_spec
    )
    np.testing.assert_allclose(ys.swapaxes(0, 1), want, rtol=1e-5, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        carry.cell_carry,
        want_carry,
    )
    assert (np.asarray(ys) == 0).any()


@fdc.register_noise
@dataclasses.dataclass(frozen=True)
class OneForAllRows(Added):
    """A mask of fewer dims than the value."""

    def draw_mask(self, rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return super().draw_mask(rng, shape[-1:], dtype)


def test_a_mask_of_fewer_dims_goes_through_padded_rows() -> None:
    """`nn.RNN` indexes each leaf of a carry by row, so a mask must have the rows' axis."""
    xs, noise = jnp.ones((3, 4, 5)), OneForAllRows()
    cell = DropoutCell(nn.SimpleCell(8), fdc.RecurrentDropout(input=noise))
    rnn = nn.RNN(cell, return_carry=True)
    variables = rnn.init(RNG, xs)
    carry, _ = rnn.apply(variables, xs, seq_lengths=jnp.array([4, 2, 1]), rngs={"dropout": RNG})
    assert carry.masks.input.shape == (3, 5)
    np.testing.assert_array_equal(carry.masks.input, carry.masks.input[:1].repeat(3, 0))


@cells
def test_one_noise_for_the_state_spares_an_lstms_memory(name) -> None:
    xs = inputs_of(name)
    for noise in (VARIATIONAL, PER_STEP):
        spec = fdc.RecurrentDropout(state=on_state(name, noise))
        rnn = nn.RNN(DropoutCell(CELLS[name], spec), return_carry=True)
        carry, _ = train(rnn, rnn.init(RNG, xs), xs)
        state = carry.cell_carry
        memory, h = state if name in LSTM_FAMILY else (None, state)
        assert memory is None or (memory != 0).all()
        assert 0 < (h == 0).mean() < 1


def test_memory_is_reached_by_its_name() -> None:
    spec = fdc.RecurrentDropout(state=(VARIATIONAL, None))
    rnn = nn.RNN(DropoutCell(nn.LSTMCell(H), spec), return_carry=True)
    carry, _ = train(rnn, rnn.init(RNG, XS), XS)
    c, h = carry.cell_carry
    np.testing.assert_array_equal(c == 0, ~carry.masks.state[0])
    assert (h != 0).all()


def test_a_subclass_of_an_lstm_is_an_lstm() -> None:
    class MyLstm(nn.LSTMCell):
        pass

    spec = fdc.RecurrentDropout(state=VARIATIONAL)
    carry: Any = DropoutCell(MyLstm(H), spec).initialize_carry(RNG, (B, F))
    assert carry.masks.state[0] is None


def test_new_masks_on_an_old_state() -> None:
    """`redraw_masks`, inside a model and outside of one."""
    spec = probes.noise_everywhere(VARIATIONAL)
    xs = probes.ones()

    class Model(nn.Module):
        @nn.compact
        def __call__(self, xs: jax.Array, carry: Any = None) -> Any:
            cell = DropoutCell(probes.LinenProbe(), spec)
            if carry is not None:
                carry = cell.redraw_masks(carry, xs[0])
            return nn.RNN(cell, time_major=True, return_carry=True)(xs, initial_carry=carry)

    variables = Model().init(RNG, xs)
    carry, first = train(Model(), variables, xs)
    again, second = train(Model(), variables, xs, quick_key(6), carry=carry)
    for site in ("params", "input", "output"):
        assert (np.asarray(first[site][0]) != np.asarray(second[site][0])).any()
        assert (second[site] == second[site][:1]).all()
    jax.tree.map(  # the state itself is the old one
        np.testing.assert_array_equal,
        jax.tree.map(lambda leaf: leaf[0], second["state"]),
        carry.cell_carry,
    )
    unbound = DropoutCell(probes.LinenProbe(), spec)
    outside: Any = unbound.redraw_masks(again, xs[0], rng=quick_key(8))
    from_cell_carry = unbound.redraw_masks(again.cell_carry, xs[0], rng=quick_key(8))
    jax.tree.map(np.testing.assert_array_equal, outside, from_cell_carry)
    assert (outside.masks.input != again.masks.input).any()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("noise", [VARIATIONAL, PER_STEP], ids=["variational", "step"])
def test_seq_lengths(noise, reverse) -> None:
    """Each row's outputs and carry are those of a batch that is cut at that row's length."""
    cell = DropoutCell(probes.LinenProbe(), probes.noise_everywhere(noise))
    rnn = nn.RNN(cell, time_major=True, reverse=reverse, return_carry=True)
    lengths = [2, 5, 1, 3]
    xs = probes.ones() * jnp.arange(1.0, 6.0)[:, None, None]
    variables = rnn.init(RNG, xs)
    carry, ys = train(rnn, variables, xs, seq_lengths=jnp.array(lengths))
    no_carry = train(rnn, variables, xs, seq_lengths=jnp.array(lengths), return_carry=False)
    jax.tree.map(np.testing.assert_array_equal, no_carry, ys)
    for row, length in enumerate(lengths):
        cut_carry, cut = train(rnn, variables, xs[:length])
        for site in ("params", "input", "output"):
            np.testing.assert_array_equal(ys[site][:length, row], cut[site][:, row])
        jax.tree.map(
            lambda a, b, row=row: np.testing.assert_array_equal(a[row], b[row]),
            carry.cell_carry,
            cut_carry.cell_carry,
        )


@pytest.mark.parametrize("noise", [VARIATIONAL, PER_STEP], ids=["variational", "step"])
def test_a_users_stack_of_dropout_cells(noise) -> None:
    """As TensorFlow's MultiRNNCell of wrappers: every layer has masks of its own."""

    class Stack(nn.RNNCellBase):
        layers: tuple[nn.RNNCellBase, ...]

        @nn.compact
        def __call__(self, carry: Any, inputs: jax.Array) -> Any:
            carry_0, y_0 = self.layers[0](carry[0], inputs)
            carry_1, y_1 = self.layers[1](carry[1], jnp.ones_like(inputs))
            return (carry_0, carry_1), (y_0, y_1)

        @nn.nowrap
        def initialize_carry(self, rng: jax.Array, input_shape: Any) -> Any:
            return tuple(layer.initialize_carry(rng, input_shape) for layer in self.layers)

        @property
        def num_feature_axes(self) -> int:
            return 1

    spec = probes.noise_everywhere(noise)
    stack = Stack(tuple(DropoutCell(probes.LinenProbe(), spec) for _ in range(2)))
    rnn = nn.RNN(stack, time_major=True)
    xs = probes.ones()
    variables = rnn.init(RNG, xs)
    first, second = (train(rnn, variables, xs, quick_key(seed)) for seed in (0, 1))
    for site in ("params", "input", "output"):
        layers = [np.asarray(y[site]) for y in (*first, *second)]
        for layer in layers:
            assert (layer == layer[:1]).all() == noise.variational, site
        for one, other in itertools.combinations(layers, 2):
            assert (one[0] != other[0]).any(), site


@pytest.mark.parametrize("noise", [VARIATIONAL, PER_STEP], ids=["variational", "step"])
def test_an_unbound_cell_inside_a_module_reads_the_modules_stream(noise) -> None:
    """Linen's own idiom, `parent=None`, where nn.RNN hands in a constant key."""
    spec = probes.noise_everywhere(noise)

    class Inline(nn.RNNCellBase):
        @nn.compact
        def __call__(self, carry: Any, inputs: jax.Array) -> Any:
            return DropoutCell(probes.LinenProbe(), spec)(carry, inputs)

        @nn.nowrap
        def initialize_carry(self, rng: jax.Array, input_shape: Any) -> Any:
            cell = DropoutCell(probes.LinenProbe(parent=None), spec, parent=None)
            return cell.initialize_carry(rng, input_shape)

        @property
        def num_feature_axes(self) -> int:
            return 1

    rnn = nn.RNN(Inline(), time_major=True)
    xs = probes.ones()
    variables = rnn.init(RNG, xs)
    first, second = (train(rnn, variables, xs, quick_key(seed)) for seed in (0, 1))
    for site in ("params", "input", "output"):
        assert (first[site][0] != second[site][0]).any(), site
        assert (first[site] == first[site][:1]).all() == noise.variational, site
    with pytest.raises(ValueError, match="needs a 'dropout' stream in training"):
        rnn.apply(variables, xs)


def test_a_wrapper_in_a_wrapper() -> None:
    """Both masks are there, each with its own draw, and the LSTM's memory is spared twice."""
    inner = DropoutCell(nn.LSTMCell(64), fdc.RecurrentDropout(state=VARIATIONAL))
    outer = DropoutCell(inner, fdc.RecurrentDropout(state=VARIATIONAL, output=PER_STEP))
    rnn = nn.RNN(outer, return_carry=True)
    carry, _ = train(rnn, rnn.init(RNG, XS), XS)
    inner_mask = carry.cell_carry.masks.state[1]
    outer_mask = carry.masks.state.cell_carry[1]
    c, h = carry.cell_carry.cell_carry
    np.testing.assert_array_equal(h != 0, inner_mask & outer_mask)
    assert (inner_mask != outer_mask).any()
    assert (c != 0).all()
    again: Any = outer.redraw_masks(carry, XS[:, 0], rng=quick_key(1))
    assert (again.masks.state.cell_carry[1] != outer_mask).any()
    assert (again.cell_carry.masks.state[1] != inner_mask).any()


def test_one_cell_in_two_directions_has_two_draws() -> None:
    cell = DropoutCell(probes.LinenProbe(), probes.noise_everywhere(VARIATIONAL))
    shared = nn.RNN(cell, time_major=True)
    both = nn.Bidirectional(
        shared, shared, time_major=True, merge_fn=lambda f, b: jnp.stack([f, b])
    )
    xs = probes.ones()
    ys = train(both, both.init(RNG, xs), xs)
    for site in ("params", "input", "output"):
        forward, backward = np.asarray(ys[site])
        assert (forward[0] != backward[0]).any(), site


def test_two_layers_have_masks_of_their_own() -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, xs: jax.Array) -> Any:
            spec = probes.noise_everywhere(VARIATIONAL)
            rnns = [
                nn.RNN(DropoutCell(probes.LinenProbe(), spec), time_major=True) for _ in range(2)
            ]
            return [rnn(xs) for rnn in rnns]

    xs = probes.ones()
    first, second = train(Model(), Model().init(RNG, xs), xs)
    for site in ("params", "input", "output"):
        assert (first[site][0] != second[site][0]).any()


def test_a_training_step_redraws() -> None:
    """Under jit, with the key of each step: other masks each time, and no new program."""
    rnn = nn.RNN(
        DropoutCell(probes.LinenProbe(), probes.noise_everywhere(VARIATIONAL)), time_major=True
    )
    xs = probes.ones()
    variables = rnn.init(RNG, xs)
    traces = []

    @jax.jit
    def step(rng: jax.Array) -> Any:
        traces.append(rng)
        return train(rnn, variables, xs, rng)["input"][0]

    masks = [np.asarray(step(jax.random.fold_in(RNG, index))) for index in range(4)]
    assert len(traces) == 1
    for one, other in itertools.combinations(masks, 2):
        assert (one != other).any()


def test_init_with_a_dropout_stream_trains() -> None:
    """But for the noise on weights, which come to be in the very run of the cell."""
    rnn = nn.RNN(
        DropoutCell(probes.LinenProbe(), probes.noise_everywhere(VARIATIONAL)), time_major=True
    )
    ys, _ = rnn.init_with_output({"params": RNG, "dropout": RNG}, probes.ones())
    for site in ("input", "output"):
        assert set(np.unique(ys[site])) == {0.0, 2.0}
    assert (ys["params"] == 1).all()


def test_no_batch_dim() -> None:
    """As a loop over the bare cell, with masks by hand."""
    spec = fdc.RecurrentDropout(input=PER_STEP, state=VARIATIONAL, params=VARIATIONAL)
    rnn = nn.RNN(DropoutCell(nn.LSTMCell(H), spec), return_carry=True)
    variables = rnn.init(RNG, XS[0])
    carry, ys = train(rnn, variables, XS[0])
    wanted = lstm_row(
        lambda params, carry, x: nn.LSTMCell(H).apply({"params": params}, carry, x),
        variables["params"]["cell"],
        jax.random.wrap_key_data(carry.rng.key[0], impl=QUICK),
        XS[0],
    )
    np.testing.assert_allclose(ys, wanted, rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_weights() -> None:
    """Zero for dropped weights, in nn.RNN as in the core."""
    spec = fdc.RecurrentDropout(params=VARIATIONAL)
    rnn = nn.RNN(DropoutCell(nn.SimpleCell(H), spec), return_carry=True)
    variables = rnn.init(RNG, XS)
    carry, _ = train(rnn, variables, XS)
    grads = jax.grad(lambda v: train(rnn, v, XS)[1].sum())(variables)["params"]["cell"]
    masks = carry.masks.params
    for layer, weight in (("i", "kernel"), ("h", "kernel")):
        np.testing.assert_array_equal(grads[layer][weight] == 0, ~masks[layer][weight][0])

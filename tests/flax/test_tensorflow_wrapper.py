"""The facts that TensorFlow's own tests of its DropoutWrapper pin down, and additions to them.

The numbers are those of TensorFlow's tests (`DropoutWrapperTest`): an LSTM of 3 units with all
kernels 0.5, biases 0 and forget bias 1, fed 2s and then 1s from a state of 0.1.
"""

import json
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hand_masks import kept, site_key, with_seed
from linen_cells import FromZeros

import flax_dropout_cell as fdc
from flax_dropout_cell._flax.tensorflow.arguments import fold_seed
from flax_dropout_cell.linen import RNNCellDropoutWrapper

RNG = jax.random.key(2)
TWO_STEPS = jnp.array([[[2.0, 2, 2]], [[1, 1, 1]]])
RANDOM_STEPS = jax.random.normal(jax.random.key(0), (7, 5, 3))
OUTPUTS, FINAL_H, FINAL_C = (0.751109, 0.895509), 0.895509, 1.949385
KEEP_NOTHING = 1e-6


class LSTMStateTuple(NamedTuple):
    c: Any
    h: Any


def weights_of(cell: nn.RNNCellBase, xs: jax.Array) -> Any:
    """All kernels 0.5, all biases 0, and TensorFlow's forget bias of 1."""
    variables = nn.RNN(cell, time_major=True).init(jax.random.key(0), xs)

    def fill(path: Any, leaf: jax.Array) -> jax.Array:
        gate, name = (entry.key for entry in path[-2:])
        return jnp.full_like(leaf, 0.5 if name == "kernel" else float(gate == "hf"))

    return jax.tree_util.tree_map_with_path(fill, variables)


def run(xs: Any = TWO_STEPS, rng: Any = RNG, **arguments: Any) -> Any:
    """Outputs, final c and final h of the wrapped LSTM."""
    batch = xs.shape[1]

    class Model(nn.Module):
        @nn.compact
        def __call__(self, xs: jax.Array) -> Any:
            state = (jnp.full((batch, 3), 0.1),) * 2
            cell = RNNCellDropoutWrapper(nn.LSTMCell(3, name="cell"), **arguments)
            carry = cell.redraw_masks(state, xs[0])
            return nn.RNN(cell, time_major=True, return_carry=True)(xs, initial_carry=carry)

    variables = weights_of(nn.LSTMCell(3), xs)
    model: Any = Model()
    carry, outputs = model.apply(variables, xs, rngs={"dropout": rng})
    c, h = carry.cell_carry
    return outputs, c, h


class TestPortedFromTensorFlow:
    def test_properties(self) -> None:
        class Cell(nn.RNNCellBase):
            state_size: int = 10
            output_size: int = 10

            def __call__(self, carry: Any, inputs: Any) -> Any:
                raise NotImplementedError

        cell = Cell()
        wrapper = RNNCellDropoutWrapper(cell)
        assert wrapper.wrapped_cell is cell
        assert wrapper.state_size == wrapper.output_size == 10

    def test_zero_state_is_the_cells_own(self) -> None:
        class Cell(nn.RNNCellBase):
            def __call__(self, carry: Any, inputs: Any) -> Any:
                raise NotImplementedError

            @nn.nowrap
            def zero_state(self, batch_size: int, dtype: Any) -> str:
                return "wrapped_cell_zero_state"

        assert (
            RNNCellDropoutWrapper(Cell()).zero_state(10, jnp.float32) == "wrapped_cell_zero_state"
        )

    @pytest.mark.parametrize("one", [1.0, jnp.ones(())], ids=["number", "array"])
    def test_keep_all(self, one) -> None:
        outputs, c, h = run(input_keep_prob=one, output_keep_prob=one, state_keep_prob=one)
        for output, want in zip(outputs, OUTPUTS, strict=True):
            np.testing.assert_allclose(output, np.full((1, 3), want), rtol=1e-5)
        np.testing.assert_allclose(h, np.full((1, 3), FINAL_H), rtol=1e-5)
        np.testing.assert_allclose(c, np.full((1, 3), FINAL_C), rtol=1e-5)

    def test_keep_no_output(self) -> None:
        outputs, c, h = run(output_keep_prob=KEEP_NOTHING)
        np.testing.assert_array_equal(outputs, np.zeros((2, 1, 3)))
        np.testing.assert_allclose(h, np.full((1, 3), FINAL_H), rtol=1e-5)
        np.testing.assert_allclose(c, np.full((1, 3), FINAL_C), rtol=1e-5)

    def test_keep_no_state_except_lstm_memory(self) -> None:
        outputs, c, h = run(state_keep_prob=KEEP_NOTHING)
        np.testing.assert_allclose(outputs[0], np.full((1, 3), OUTPUTS[0]), rtol=1e-5)
        np.testing.assert_allclose(outputs[1], np.full((1, 3), 0.7661714), rtol=1e-5)
        np.testing.assert_array_equal(h, np.zeros((1, 3)))
        np.testing.assert_allclose(c, np.full((1, 3), 1.713925), rtol=1e-5)

    def test_keep_no_input(self) -> None:
        outputs, c, h = run(input_keep_prob=KEEP_NOTHING)
        np.testing.assert_allclose(outputs[:, 0, 0], [0.0831479, 0.0964550], rtol=1e-5)
        np.testing.assert_allclose(h, np.full((1, 3), 0.0964550), rtol=1e-5)
        np.testing.assert_allclose(c, np.full((1, 3), 0.1836367), rtol=1e-5)

    def test_recurrent_output(self) -> None:
        outputs, _, _ = run(
            RANDOM_STEPS,
            output_keep_prob=0.8,
            variational_recurrent=True,
            input_size=3,
            dtype=jnp.float32,
        )
        kept = np.abs(outputs) > KEEP_NOTHING
        np.testing.assert_array_equal(kept, np.broadcast_to(kept[:1], kept.shape))
        assert 0 < kept.mean() < 1

    @pytest.mark.parametrize("seed", [None, -234987])
    def test_recurrent_state_input_and_output(self, seed) -> None:
        """With `broadcast_dims=(0,)`, one mask for the whole batch, as in TensorFlow."""
        arguments: dict[str, Any] = {
            "input_keep_prob": 0.6,
            "output_keep_prob": 0.6,
            "state_keep_prob": 0.6,
            "variational_recurrent": True,
            "dtype": jnp.float32,
            "input_size": 3,
            "seed": seed,
        }
        shared = arguments | {"broadcast_dims": (0,)}
        outputs, c, h = run(RANDOM_STEPS, **shared)
        kept = np.abs(outputs) > KEEP_NOTHING
        np.testing.assert_array_equal(kept, np.broadcast_to(kept[:1, :1], kept.shape))
        np.testing.assert_array_equal(h == 0, np.broadcast_to(h[:1] == 0, h.shape))
        assert (c != 0).all()
        outputs, _, _ = run(RANDOM_STEPS, **arguments)
        kept = np.abs(outputs) > KEEP_NOTHING
        assert (kept[0] != kept[0, :1]).any(), "without broadcast_dims each example has its own"

    def test_dropped_inputs_of_a_counting_cell(self) -> None:
        class Plus1(FromZeros):
            @nn.compact
            def __call__(self, carry: Any, inputs: Any) -> Any:
                return carry + 1, inputs + 1

        rnn = nn.RNN(RNNCellDropoutWrapper(Plus1(), input_keep_prob=KEEP_NOTHING, seed=0))
        outputs = rnn.apply({}, jnp.ones((2, 8, 5)), rngs={"dropout": RNG})
        np.testing.assert_array_equal(outputs, np.ones((2, 8, 5)))

    def test_weights_are_the_cells_own(self) -> None:
        bare = nn.RNN(nn.SimpleCell(1)).init(RNG, jnp.ones((1, 1, 1)))
        wrapped = nn.RNN(RNNCellDropoutWrapper(nn.SimpleCell(1))).init(RNG, jnp.ones((1, 1, 1)))
        jax.tree.map(np.testing.assert_array_equal, wrapped, bare)

    def test_depth_1_structures_of_the_visitor(self) -> None:
        """TensorFlow's nest tests of traverse_shallow_structure."""
        from flax_dropout_cell._flax.tensorflow.state_filters import visit_state

        state = [3, 4, (1, 2, [0]), [5, 6], {"a": (7,)}, []]
        answers = visit_state(lambda node: not isinstance(node, tuple), state)
        assert answers == [True, True, False, [True, True], {"a": False}, []]
        answers = visit_state(
            lambda node: (True, False) if isinstance(node, tuple) else True, [(1, [2]), ([1], 2)]
        )
        assert answers == [(True, False), ([True], False)]
        for visitor, bad in (
            (lambda _: [True], 0),
            (lambda _: 1, [1]),
            (lambda _: [1], [1]),
            (lambda _: 1, 0),
            (lambda _: (True, True), [1, 2]),
            (lambda _: np.bool_(True), 0),
        ):
            with pytest.raises(TypeError, match="dropout_state_filter_visitor returned"):
                visit_state(visitor, bad)


class TestStateFilter:
    def test_the_default_spares_named_memories_in_a_stack(self) -> None:
        assert masked_leaves(Stack(NAMED)) == ["[0].h", "[1].h"]

    def test_a_visitor_decides(self) -> None:
        def only_second_layer(state: Any) -> Any:
            if isinstance(state, LSTMStateTuple):
                return True
            return (False, True) if isinstance(state, tuple) else True

        assert masked_leaves(Stack(NAMED), only_second_layer) == ["[1].c", "[1].h"]
        assert masked_leaves(Stack(NAMED), lambda state: False) == []
        assert masked_leaves(Stack(PLAIN), lambda state: True) == [
            "[0][0]",
            "[0][1]",
            "[1][0]",
            "[1][1]",
        ]

    @pytest.mark.parametrize("make", [nn.LSTMCell, nn.OptimizedLSTMCell, fdc.linen.LSTMCell])
    def test_tensorflows_usual_visitor_knows_flaxs_plain_pairs(self, make: Any) -> None:
        assert masked_leaves(make(4), spare_memories) == ["[1]"]
        assert masked_leaves(Layers((make(4), make(4))), spare_memories) == ["[0][1]", "[1][1]"]
        within = Layers((make(4), Layers((make(4),))))
        assert masked_leaves(within, spare_memories) == ["[0][1]", "[1][0][1]"]

    def test_a_pair_of_other_cells_stays_a_pair(self) -> None:
        grus = Layers((nn.GRUCell(4), nn.GRUCell(4)))
        assert masked_leaves(grus, spare_memories) == ["[0]", "[1]"]
        mixed = Layers((nn.LSTMCell(4), nn.GRUCell(4)))
        assert masked_leaves(mixed, lambda state: not hasattr(state, "c")) == [
            "[0][0]",
            "[0][1]",
            "[1]",
        ]

    def test_a_visitor_reaches_the_memory_of_an_lstm(self) -> None:
        assert masked_leaves(nn.LSTMCell(4)) == ["[1]"]
        assert masked_leaves(nn.LSTMCell(4), lambda state: True) == ["[0]", "[1]"]
        assert masked_leaves(
            nn.LSTMCell(4), lambda state: (True, False) if isinstance(state, tuple) else True
        ) == ["[0]"]


def masked_leaves(cell: nn.RNNCellBase, visitor: Any = None) -> list[str]:
    wrapper = RNNCellDropoutWrapper(
        cell,
        state_keep_prob=0.5,
        variational_recurrent=True,
        dropout_state_filter_visitor=visitor,
    )
    carry: Any = wrapper.initialize_carry(RNG, (2, 4))
    return [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(carry.masks and carry.masks.state)
    ]


def spare_memories(state: Any) -> Any:
    return fdc.LSTMState(c=False, h=True) if isinstance(state, fdc.LSTMState) else True


class Layers(nn.RNNCellBase):
    cells: tuple[nn.RNNCellBase, ...]
    num_feature_axes = 1  # type: ignore[assignment]

    def __call__(self, carry: Any, inputs: Any) -> Any:
        raise NotImplementedError

    @nn.nowrap
    def initialize_carry(self, rng: Any, input_shape: Any) -> Any:
        return tuple(cell.initialize_carry(rng, input_shape) for cell in self.cells)


PLAIN, NAMED = lambda c, h: (c, h), LSTMStateTuple


class Stack(nn.RNNCellBase):
    pair: Any

    def __call__(self, carry: Any, inputs: Any) -> Any:
        raise NotImplementedError

    @nn.nowrap
    def initialize_carry(self, rng: Any, input_shape: Any) -> Any:
        return tuple(self.pair(jnp.zeros(input_shape), jnp.zeros(input_shape)) for _ in range(2))


# The masks of these seeds before larger seeds were told apart.
GOLDEN = {None: "69b8afda", 0: "1f99a0d4", 3: "de1971a5", -1: "426b767c", 2**40: "025d762c"}


class TestSeeds:
    ARGUMENTS = {"input_keep_prob": 0.5, "variational_recurrent": True}  # noqa: RUF012

    def start(self, seed: Any, rng: jax.Array = RNG, **arguments: Any) -> Any:
        """The carry of a wrapper in its host."""
        cell = RNNCellDropoutWrapper(nn.GRUCell(3), seed=seed, **self.ARGUMENTS | arguments)
        rnn = nn.RNN(cell, return_carry=True)
        xs = jnp.ones((2, 3, 32))
        return rnn.apply(rnn.init(RNG, xs), xs, rngs={"dropout": rng})[0]

    def mask(self, seed: Any, rng: jax.Array = RNG) -> np.ndarray:
        return np.asarray(self.start(seed, rng).masks.input)

    @pytest.mark.parametrize("seed", [None, 10, -234987, 2**40 + 1])
    def test_a_seed_is_folded_into_the_key_of_the_sequence(self, seed: int | None) -> None:
        """The host's key shows in a carry of per-step masks; without a host it is the given one."""
        per_step = self.start(None, variational_recurrent=False)
        of_host = jax.random.wrap_key_data(per_step.rng.key[0])
        np.testing.assert_array_equal(
            self.mask(seed), kept(site_key(with_seed(of_host, seed), "input"), 2, 32)
        )
        unbound = RNNCellDropoutWrapper(nn.GRUCell(3), seed=seed, **self.ARGUMENTS)
        carry: Any = unbound.initialize_carry(RNG, (2, 32))
        np.testing.assert_array_equal(
            carry.masks.input, kept(site_key(with_seed(RNG, seed), "input"), 2, 32)
        )

    def test_different_seeds_give_different_masks(self) -> None:
        seeds = [None, 0, 1, -1, 2**32 - 1, 2**32, 2**40]
        masks = [self.mask(seed) for seed in seeds]
        for index, mask in enumerate(masks):
            for other in masks[:index]:
                assert (mask != other).any()

    def test_seeds_have_64_bits(self) -> None:
        seeds = [0, 1, -1, 2**31, 2**32 - 1, 2**32, -(2**32), 2**63 - 1, -(2**63)]
        with pytest.raises(OverflowError):
            fold_seed(RNG, 2**63)
        keys = {jax.random.key_data(fold_seed(RNG, seed)).tobytes() for seed in seeds}
        assert len(keys) == len(seeds)
        for seed in (0, 3, -1, -234987, 2**40, 2**63 - 1, -(2**63)):
            assert fold_seed(RNG, seed) == with_seed(RNG, seed)

    @pytest.mark.parametrize("seed", [np.int32(-3), np.int64(-3), np.uint8(3), np.int64(-(2**63))])
    def test_numpy_seeds_are_ints(self, seed) -> None:
        assert (fold_seed(RNG, seed) == fold_seed(RNG, int(seed))).all()
        wrapper = RNNCellDropoutWrapper(nn.GRUCell(3), seed=seed)
        assert json.loads(json.dumps(wrapper.get_config()))["seed"] == int(seed)

    def test_golden_masks_of_seeds(self) -> None:
        masks = {
            seed: np.packbits(
                np.asarray(fdc.Dropout(keep_prob=0.5).draw_mask(fold_seed(RNG, seed), (32,), "f4"))
            )
            .tobytes()
            .hex()
            for seed in (None, 0, 3, -1, 2**40)
        }
        assert masks == GOLDEN

    def test_no_seed_freezes_a_mask_over_training_steps(self) -> None:
        assert (self.mask(3) != self.mask(3, rng=jax.random.key(9))).any()

    def test_no_seed_freezes_a_mask_over_time(self) -> None:
        cell = RNNCellDropoutWrapper(nn.GRUCell(3), output_keep_prob=0.5, seed=3)
        xs = jnp.ones((2, 9, 4))
        rnn = nn.RNN(cell)
        kept = np.asarray(rnn.apply(rnn.init(RNG, xs), xs, rngs={"dropout": RNG})) != 0
        assert (kept != kept[:, :1]).any()


class TestWhatExplodes:
    """TensorFlow puts dropout on any state, and so does this wrapper."""

    @pytest.mark.parametrize("variational", [True, False])
    def test_a_gru_and_a_cell_of_ones_own_are_not_refused(self, variational) -> None:
        class Pair(nn.RNNCellBase):
            @nn.compact
            def __call__(self, carry: Any, inputs: Any) -> Any:
                c, h = carry
                return (c + 1, h + 1), inputs

            @nn.nowrap
            def initialize_carry(self, rng: Any, input_shape: Any) -> Any:
                return jnp.zeros(input_shape), jnp.zeros(input_shape)

            @property
            def num_feature_axes(self) -> int:
                return 1

        xs = jnp.ones((4, 5, 64))
        for cell in (Pair(), nn.GRUCell(64), nn.MGUCell(64), nn.SimpleCell(64)):
            wrapper = RNNCellDropoutWrapper(
                cell, state_keep_prob=0.5, variational_recurrent=variational
            )
            rnn: Any = nn.RNN(wrapper, return_carry=True)
            carry, _ = rnn.apply(rnn.init(RNG, xs), xs, rngs={"dropout": RNG})
            for leaf in jax.tree.leaves(carry.cell_carry):
                assert 0.3 < float((leaf == 0).mean()) < 0.7

    def test_a_visitor_reaches_the_memory(self) -> None:
        _, c, h = run(
            RANDOM_STEPS, state_keep_prob=0.5, dropout_state_filter_visitor=lambda state: True
        )
        assert 0 < (c == 0).mean() < 1
        assert 0 < (h == 0).mean() < 1


class TestSizes:
    def test_sizes(self) -> None:
        lstm = RNNCellDropoutWrapper(nn.LSTMCell(8))
        assert lstm.state_size == (8, 8)
        assert lstm.output_size == 8
        gru = RNNCellDropoutWrapper(nn.GRUCell(5), input_size=7)
        assert gru.state_size == gru.output_size == 5
        conv = RNNCellDropoutWrapper(nn.ConvLSTMCell(4, kernel_size=(3, 3)), input_size=(6, 7, 2))
        assert conv.state_size == ((6, 7, 4), (6, 7, 4))
        assert conv.output_size == (6, 7, 4)

        class Summing(nn.RNNCellBase):
            """Its carry is as wide as its input."""

            def __call__(self, carry, inputs):
                return carry + inputs, carry

            def initialize_carry(self, rng, input_shape):
                return jnp.zeros(input_shape)

            @property
            def num_feature_axes(self) -> int:
                return 1

        for name in ("state_size", "output_size"):
            with pytest.raises(ValueError, match="Summing depend on the width of its inputs"):
                getattr(RNNCellDropoutWrapper(Summing()), name)
            assert getattr(RNNCellDropoutWrapper(Summing(), input_size=7), name) == 7
        with pytest.raises(ValueError, match="Summing depend on the width of its inputs"):
            RNNCellDropoutWrapper(Summing()).zero_state(3, jnp.float32)
        with pytest.raises(ValueError, match="depend on 3 feature axes; give input_size"):
            _ = RNNCellDropoutWrapper(nn.ConvLSTMCell(4, kernel_size=(3, 3))).state_size

    def test_a_complex_state_stays_complex(self) -> None:
        state = RNNCellDropoutWrapper(fdc.linen.LRUCell(8)).zero_state(3, jnp.float32)
        assert (state.shape, state.dtype) == ((3, 8), jnp.complex64)

    def test_the_sizes_of_a_cell_of_tokens(self) -> None:
        class Tokens(nn.RNNCellBase):
            @nn.compact
            def __call__(self, carry, inputs):
                return carry, nn.Embed(7, 4)(inputs)

            def initialize_carry(self, rng, input_shape):
                return jnp.zeros((*input_shape[:-1], 3))

            @property
            def num_feature_axes(self) -> int:
                return 1

        wrapper = RNNCellDropoutWrapper(Tokens(), input_size=2)
        assert (wrapper.state_size, wrapper.output_size) == (3, (2, 4))

    def test_zero_states(self) -> None:
        wrapper = RNNCellDropoutWrapper(nn.LSTMCell(8))
        for state in (
            wrapper.zero_state(3, jnp.bfloat16),
            wrapper.get_initial_state(batch_size=3, dtype=jnp.bfloat16),
            wrapper.get_initial_state(inputs=jnp.ones((3, 2), jnp.bfloat16)),
        ):
            assert [(leaf.shape, leaf.dtype) for leaf in state] == [((3, 8), jnp.bfloat16)] * 2
            assert all((leaf == 0).all() for leaf in state)
        for arguments, text in (
            (
                {"inputs": jnp.ones((3, 2)), "batch_size": 4},
                "batch_size is 4, but inputs have a batch of 3",
            ),
            (
                {"inputs": jnp.ones((3, 2)), "dtype": "bfloat16"},
                "dtype is bfloat16, but inputs are float32",
            ),
            (
                {"batch_size": 4},
                "give inputs, or batch_size and dtype; got batch_size=4, dtype=None",
            ),
        ):
            with pytest.raises(ValueError, match=text):
                wrapper.get_initial_state(**arguments)

    def test_what_is_announced_is_checked(self) -> None:
        with pytest.raises(
            ValueError, match=r"input_size is 4, but an input of shape \(1, 3\) arrived"
        ):
            run(input_size=4)
        with pytest.raises(TypeError, match="dtype is bfloat16, but a float32 input arrived"):
            run(dtype=jnp.bfloat16)

    def test_nested_inputs(self) -> None:
        class Cell(nn.RNNCellBase):
            @nn.compact
            def __call__(self, carry: Any, inputs: Any) -> Any:
                return carry, inputs

        wrapper = RNNCellDropoutWrapper(
            Cell(), input_keep_prob=0.5, variational_recurrent=True, input_size=(32, 64)
        )
        x = (jnp.ones((4, 32)), jnp.ones((4, 64)))
        carry = wrapper.redraw_masks(jnp.zeros(1), x, rng=RNG)
        carry, y = wrapper.apply({}, carry, x)
        for leaf, mask in zip(y, carry.masks.input, strict=True):
            np.testing.assert_array_equal(leaf, jnp.where(mask, 2.0, 0.0))
        with pytest.raises(ValueError, match=r"input_size is \(32, 64\), but the inputs have"):
            wrapper.apply({}, carry, {"a": x[0], "b": x[1]})


def spare_everything(state: Any) -> bool:
    del state
    return False


class TestConfigs:
    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"input_keep_prob": 0.8, "output_keep_prob": np.float32(0.5), "seed": 3},
            {"variational_recurrent": True, "input_size": 3, "dtype": jnp.bfloat16},
            {"dropout_state_filter_visitor": spare_everything, "broadcast_dims": (0,)},
            {"state_keep_prob": jnp.asarray(0.5), "deterministic": True, "input_size": (3, 4)},
        ],
    )
    @pytest.mark.parametrize(
        "cell",
        [
            nn.LSTMCell(10),
            nn.GRUCell(10, gate_fn=nn.tanh, param_dtype=jnp.bfloat16),
            nn.ConvLSTMCell(4, kernel_size=(3, 3), use_bias=False),
            fdc.linen.RNNCellDropoutWrapper(nn.MGUCell(3), 0.5),
        ],
        ids=lambda cell: type(cell).__name__,
    )
    def test_round_trip(self, cell, arguments) -> None:
        wrapper = RNNCellDropoutWrapper(cell, **arguments)
        config = wrapper.get_config()
        again = RNNCellDropoutWrapper.from_config(
            json.loads(json.dumps(config)), trusted=(__name__,)
        )
        assert again.get_config() == config
        assert type(again.cell) is type(cell)
        assert again.dropout_state_filter_visitor is wrapper.dropout_state_filter_visitor
        for name in ("input_keep_prob", "output_keep_prob", "state_keep_prob"):
            assert getattr(again, name) == float(getattr(wrapper, name))
        if isinstance(cell, nn.GRUCell):
            assert (again.cell.gate_fn, again.cell.param_dtype) == (nn.tanh, jnp.bfloat16)

    def test_a_config_holds_no_code(self) -> None:
        wrapper = RNNCellDropoutWrapper(
            nn.GRUCell(3), dropout_state_filter_visitor=lambda state: True
        )
        with pytest.raises(ValueError, match="holds no code: use a module-level function"):
            wrapper.get_config()
        wrapper = RNNCellDropoutWrapper(nn.GRUCell(3, gate_fn=lambda x: x))
        with pytest.raises(ValueError, match=r"GRUCell.gate_fn .* use a module-level function"):
            wrapper.get_config()

    def test_a_keep_prob_for_each_unit_has_no_config(self) -> None:
        wrapper = RNNCellDropoutWrapper(nn.GRUCell(3), jnp.array([0.5, 0.6, 0.7]))
        with pytest.raises(ValueError, match=r"input_keep_prob has shape \(3,\), and a config"):
            wrapper.get_config()

    def test_a_traced_keep_prob_has_no_config(self) -> None:
        def config(keep_prob: Any) -> Any:
            return RNNCellDropoutWrapper(nn.GRUCell(3), keep_prob).get_config()

        with pytest.raises(
            ValueError, match="input_keep_prob is traced, and a config holds numbers"
        ):
            jax.jit(config)(0.5)


@pytest.mark.parametrize("name", ["input_keep_prob", "state_keep_prob", "output_keep_prob"])
@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_keep_prob_out_of_range(name, bad) -> None:
    with pytest.raises(ValueError, match=f"{name} must be between 0 and 1, got {bad}"):
        RNNCellDropoutWrapper(nn.LSTMCell(3), **{name: bad})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"input_keep_prob": None}, "input_keep_prob must be a number in .0, 1. .* got None"),
        (
            {"dropout_state_filter_visitor": 3},
            "dropout_state_filter_visitor must be callable, got 3",
        ),
        ({"seed": 0.5}, "seed must be an int or None, got 0.5"),
    ],
)
def test_arguments_of_a_wrong_type(arguments, text) -> None:
    with pytest.raises(TypeError, match=text):
        RNNCellDropoutWrapper(nn.LSTMCell(3), **arguments)


def test_not_a_cell() -> None:
    with pytest.raises(TypeError, match="is not an RNNCell of flax"):
        RNNCellDropoutWrapper(nn.Dense(3))  # type: ignore[arg-type]


def test_keep_prob_zero_gives_zeros() -> None:
    outputs, _, h = run(output_keep_prob=0, state_keep_prob=0.0, variational_recurrent=True)
    np.testing.assert_array_equal(outputs, np.zeros_like(outputs))
    np.testing.assert_array_equal(h, np.zeros_like(h))


def test_deterministic_is_the_bare_cell() -> None:
    outputs, c, h = run(
        RANDOM_STEPS,
        input_keep_prob=0.5,
        output_keep_prob=0.5,
        state_keep_prob=0.5,
        deterministic=True,
    )
    want, want_c, want_h = run(RANDOM_STEPS)
    jax.tree.map(np.testing.assert_array_equal, (outputs, c, h), (want, want_c, want_h))


def test_positional_order_is_tensorflows() -> None:
    """input, OUTPUT, state."""
    wrapper = RNNCellDropoutWrapper(
        nn.LSTMCell(3), 0.9, 0.8, 0.7, True, 3, "float32", 5, spare_everything
    )
    assert wrapper.get_config() | {"cell": None} == {
        "cell": None,
        "input_keep_prob": 0.9,
        "output_keep_prob": 0.8,
        "state_keep_prob": 0.7,
        "variational_recurrent": True,
        "input_size": 3,
        "dtype": "float32",
        "seed": 5,
        "dropout_state_filter_visitor": {"import_path": f"{__name__}:spare_everything"},
        "broadcast_dims": [],
        "deterministic": False,
    }


class Verbose:
    """Something with a repr of many lines."""

    def __repr__(self) -> str:
        return "line\n" * 200

    def __call__(self, x: Any) -> Any:
        return x


def test_errors_are_short() -> None:
    """No value's repr, however long: of the state a visitor gave back, or of an argument."""
    big = jnp.ones((100, 100))

    def answers_with_the_state(state: Any) -> Any:
        return state

    attempts = (
        lambda: run(input_keep_prob=[Verbose()]),
        lambda: run(seed=Verbose()),
        lambda: run(seed=big),
        lambda: run(dropout_state_filter_visitor=big),
        lambda: run(state_keep_prob=0.5, dropout_state_filter_visitor=answers_with_the_state),
        lambda: run(input_size={"a": list(range(1000))}),
        lambda: RNNCellDropoutWrapper(nn.GRUCell(3, gate_fn=Verbose())).get_config(),
    )
    for attempt in attempts:
        with pytest.raises((TypeError, ValueError)) as error:
            attempt()
        assert len(str(error.value)) < 400, str(error.value)
        assert str(error.value).count("\n") < 5


@pytest.mark.parametrize(
    ("visitor", "dropped"),
    [(None, (False, True)), (lambda state: True, (True, True)), (spare_everything, (False, False))],
    ids=["default", "everything", "nothing"],
)
def test_a_visitor_reaches_the_state_within_a_wrapper(visitor: Any, dropped: Any) -> None:
    inner = RNNCellDropoutWrapper(nn.LSTMCell(3))
    cell = RNNCellDropoutWrapper(inner, state_keep_prob=0.0, dropout_state_filter_visitor=visitor)
    x = jnp.ones((2, 4))
    carry: Any = cell.initialize_carry(RNG, x.shape)
    variables = cell.init(RNG, carry, x)
    carry, _ = cell.apply(variables, carry, x, rngs={"dropout": RNG})
    c, h = carry.cell_carry.cell_carry
    assert (bool((c == 0).all()), bool((h == 0).all())) == dropped


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_announced_dtype_is_that_of_all_inputs(dtypes: Any) -> None:
    class Cell(nn.RNNCellBase):
        @nn.compact
        def __call__(self, carry: Any, inputs: Any) -> Any:
            return carry, inputs

    wrapper = RNNCellDropoutWrapper(Cell(), dtype=jnp.float32)
    x = tuple(jnp.ones((4, 3), dtype) for dtype in dtypes)
    carry = wrapper.redraw_masks(jnp.zeros(1), x, rng=jax.random.key(3))
    with pytest.raises(TypeError, match="dtype is float32, but a bfloat16 input arrived"):
        wrapper.apply({}, carry, x)

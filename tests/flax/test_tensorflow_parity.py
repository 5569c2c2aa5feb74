"""The numbers of TensorFlow's own dropout wrapper, from its own masks.

`parity/make_tensorflow_parity.py` ran TensorFlow and stored the inputs, the masks that it used
and the outputs. Here the same masks go through this library.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_dropout_cell as fdc
from flax_dropout_cell.linen import DropoutCarry, RNNCellDropoutWrapper

EAGER = [
    f"{cell}_{mode}"
    for cell in ("lstm", "gru", "stack", "stack_memories")
    for mode in ("variational", "per_step")
]
VARIATIONAL = ["lstm_dynamic_rnn", *(name for name in EAGER if name.endswith("variational"))]
FLAX_LSTMS = [nn.LSTMCell, nn.OptimizedLSTMCell]


@pytest.fixture(autouse=True)
def full_precision():
    # Accelerators multiply float32 matrices with fewer bits unless they are told not to.
    with jax.default_matmul_precision("highest"):
        yield


class LSTMState(NamedTuple):
    c: Any
    h: Any


def lstm_cell(params, carry, x):
    gates = jnp.concatenate([x, carry[1]], axis=-1) @ params["kernel"] + params["bias"][None]
    i, j, f, o = jnp.split(gates, 4, axis=-1)
    c = carry[0] * nn.sigmoid(f + params["forget_bias"]) + nn.sigmoid(i) * jnp.tanh(j)
    h = jnp.tanh(c) * nn.sigmoid(o)
    return LSTMState(c, h), h


def gru_cell(params, h, x):
    gates = jnp.concatenate([x, h], axis=-1) @ params["gate_kernel"] + params["gate_bias"][None]
    r, u = jnp.split(nn.sigmoid(gates), 2, axis=-1)
    candidate = jnp.concatenate([x, r * h], axis=-1) @ params["candidate_kernel"]
    h = u * h + (1 - u) * jnp.tanh(candidate + params["candidate_bias"][None])
    return h, h


CELLS: dict[str, fdc.Cell] = {"lstm": lstm_cell, "gru": gru_cell}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of TensorFlow, and how an LSTM's carry is written here."""

    arrays: dict[str, np.ndarray]
    lstm_state: tuple[int, int] = LSTMState(0, 0)

    @property
    def variational(self) -> bool:
        return bool(self.arrays["mode"] == "variational")

    @property
    def layers(self) -> list[str]:
        return self.arrays["layers"].tolist()

    @property
    def sequence_lengths(self) -> jax.Array | None:
        lengths = self.arrays.get("sequence_lengths")
        return None if lengths is None else jnp.asarray(lengths)

    @property
    def params(self) -> Any:
        params = [
            {
                key.removeprefix(f"layer{index}."): jnp.asarray(array)
                for key, array in self.arrays.items()
                if key.startswith(f"layer{index}.")
            }
            | {"forget_bias": jnp.float32(self.arrays["forget_bias"])}
            for index in range(len(self.layers))
        ]
        return params if len(params) > 1 else params[0]

    def cell(self, params: Any, carry: Any, x: Any) -> tuple[Any, Any]:
        if len(self.layers) == 1:
            return CELLS[self.layers[0]](params, carry, x)
        new = []
        for layer, layer_params, layer_carry in zip(self.layers, params, carry, strict=True):
            layer_carry, x = CELLS[layer](layer_params, layer_carry, x)
            new.append(layer_carry)
        return tuple(new), x

    def state(self, name: str, leaf: Callable[[Any], Any] = jnp.asarray) -> Any:
        """A state by its name in the archive; None at the leaves that have no such array."""
        states = [self.lstm_state if layer == "lstm" else 0 for layer in self.layers]
        structure = jax.tree.structure(tuple(states) if len(states) > 1 else states[0])
        arrays = [self.arrays.get(f"{name}.{index}") for index in range(structure.num_leaves)]
        return structure.unflatten([None if a is None else leaf(a) for a in arrays])

    @property
    def dropout(self) -> fdc.RecurrentDropout:
        def noise(site: str) -> fdc.Dropout:
            keep_prob = float(self.arrays[f"{site}_keep_prob"])
            return fdc.Dropout(keep_prob=keep_prob, variational=self.variational)

        return fdc.RecurrentDropout(
            input=noise("input"),
            state=self.state("state_mask", lambda _: noise("state")),
            output=noise("output"),
        )

    def masks(self, step: int = 0) -> fdc.Masks:
        def at_step(mask: np.ndarray) -> jax.Array:
            return jnp.asarray(mask if self.variational else mask[step])

        return fdc.Masks(
            input=at_step(self.arrays["input_mask"]),
            state=self.state("state_mask", at_step),
            output=at_step(self.arrays["output_mask"]),
        )


def load(name: str) -> Run:
    path = Path(__file__).parents[1] / "support/parity" / f"{name}.npz"
    with np.load(path, allow_pickle=False) as archive:
        return Run(dict(archive))


def load_for_flax(name: str) -> tuple[Run, dict[str, Any]]:
    """An LSTM's run with the plain carry `(c, h)` of Flax, and its weights under Flax's names."""
    run = dataclasses.replace(load(name), lstm_state=(0, 0))
    units, features = run.arrays["outputs"].shape[-1], run.arrays["inputs"].shape[-1]
    bias = run.arrays["layer0.bias"].copy()
    # Flax has no forget_bias; TensorFlow's gates come in the order i, j, f, o.
    bias[2 * units : 3 * units] += run.arrays["forget_bias"].astype(np.float32)
    weights = {}
    for gate, kernel, gate_bias in zip(
        "igfo",
        np.split(run.arrays["layer0.kernel"], 4, axis=-1),
        np.split(bias, 4),
        strict=True,
    ):
        weights[f"i{gate}"] = {"kernel": kernel[:features]}
        weights[f"h{gate}"] = {"kernel": kernel[features:], "bias": gate_bias}
    return run, weights


def assert_same(got: Any, want: Any) -> None:
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, equal_nan=False)


def check_each_step(run: Run, step: Callable[[int, Any, Any], tuple[Any, Any]]) -> None:
    carry = run.state("initial_state")
    for t, x in enumerate(run.arrays["inputs"]):
        carry, y = step(t, carry, jnp.asarray(x))
        assert_same(y, run.arrays["outputs"][t])
        assert_same(carry, run.state("states", lambda leaf, t=t: jnp.asarray(leaf[t])))


def check_sequence(run: Run, carry: Any, ys: jax.Array) -> None:
    assert_same(ys, run.arrays["outputs"])
    if "states.0" in run.arrays:
        assert_same(carry, run.state("states", lambda leaf: jnp.asarray(leaf[-1])))
    else:
        assert_same(carry, run.state("final_state"))


def dropout_step(run: Run) -> Callable[[int, Any, Any], tuple[Any, Any]]:
    def step(t: int, carry: Any, x: Any) -> tuple[Any, Any]:
        return fdc.dropout_cell(
            run.params, carry, x, None, cell=run.cell, dropout=run.dropout, masks=run.masks(t)
        )

    return step


@pytest.mark.parametrize("name", EAGER)
def test_dropout_cell(name):
    run = load(name)
    check_each_step(run, dropout_step(run))


@pytest.mark.parametrize("name", VARIATIONAL)
def test_dropout_scan(name):
    run = load(name)
    carry, ys = fdc.dropout_scan(
        run.params,
        run.state("initial_state"),
        jnp.asarray(run.arrays["inputs"]),
        None,
        cell=run.cell,
        dropout=run.dropout,
        masks=run.masks(),
        seq_lengths=run.sequence_lengths,
    )
    check_sequence(run, carry, ys)


# Flax's GRU resets after the product with the recurrent kernel and TensorFlow's before it, so
# no weights make them equal; its LSTMs compute the same function.
@pytest.mark.parametrize("cell_class", FLAX_LSTMS)
@pytest.mark.parametrize("name", ["lstm_variational", "lstm_per_step"])
def test_dropout_cell_around_flax_lstm(name, cell_class):
    run, weights = load_for_flax(name)
    cell = cell_class(run.arrays["outputs"].shape[-1]).apply

    def step(t, carry, x):
        return fdc.dropout_cell(
            {"params": weights}, carry, x, None, cell=cell, dropout=run.dropout, masks=run.masks(t)
        )

    check_each_step(run, step)


class UserCell(nn.RNNCellBase):
    """A cell of a user's own: TensorFlow's, with its carry named as there."""

    run: fdc.Cell

    def __call__(self, carry, x):
        return self.run(self.get_variable("params", "weights"), carry, x)

    @property
    def num_feature_axes(self):
        return 1


def visit_memories(state):
    """The visitor with which TensorFlow ran, word for word."""
    if isinstance(state, LSTMState):
        return LSTMState(c=True, h=False)
    if isinstance(state, tuple):
        return (True, False, True)
    return True


def wrap(run: Run, cell: nn.RNNCellBase, **options: Any) -> RNNCellDropoutWrapper:
    # By position, since a call that was written for TensorFlow may be.
    return RNNCellDropoutWrapper(
        cell,
        float(run.arrays["input_keep_prob"]),
        float(run.arrays["output_keep_prob"]),
        float(run.arrays["state_keep_prob"]),
        run.variational,
        run.arrays["inputs"].shape[-1],
        jnp.float32,
        **options,
    )


def wrap_user_cell(name: str, run: Run) -> RNNCellDropoutWrapper:
    visitor = visit_memories if "memories" in name else None
    return wrap(run, UserCell(run.cell), dropout_state_filter_visitor=visitor)


def run_rnn(run: Run, wrapper: RNNCellDropoutWrapper, weights: Any) -> tuple[Any, Any]:
    result: Any = nn.RNN(wrapper, time_major=True, return_carry=True).apply(
        {"params": {"cell": weights}},
        jnp.asarray(run.arrays["inputs"]),
        initial_carry=DropoutCarry(run.state("initial_state"), run.masks(), None),
        seq_lengths=run.sequence_lengths,
    )
    carry, ys = result
    if run.sequence_lengths is not None:  # nn.RNN does not zero the steps after the end.
        steps = jnp.arange(len(ys))[:, None, None]
        ys = jnp.where(steps < run.sequence_lengths[None, :, None], ys, 0)
    return carry.cell_carry, ys


@pytest.mark.parametrize("name", EAGER)
def test_linen_wrapper_step(name):
    run = load(name)
    wrapper = wrap_user_cell(name, run)

    def step(t, carry, x):
        variables = {"params": {"weights": run.params}}
        carry, y = wrapper.apply(variables, DropoutCarry(carry, run.masks(t), None), x)
        return carry.cell_carry, y

    check_each_step(run, step)


@pytest.mark.parametrize("name", VARIATIONAL)
def test_linen_wrapper_in_rnn(name):
    run = load(name)
    check_sequence(run, *run_rnn(run, wrap_user_cell(name, run), {"weights": run.params}))


@pytest.mark.parametrize("cell_class", FLAX_LSTMS)
@pytest.mark.parametrize("name", ["lstm_variational", "lstm_dynamic_rnn"])
def test_linen_wrapper_around_flax_lstm_in_rnn(name, cell_class):
    run, weights = load_for_flax(name)
    wrapper = wrap(run, cell_class(run.arrays["outputs"].shape[-1]))
    check_sequence(run, *run_rnn(run, wrapper, weights))


def shapes(masks: fdc.Masks | None) -> Any:
    return jax.tree.map(jnp.shape, masks)


@pytest.mark.parametrize("name", VARIATIONAL)
def test_drawn_masks_have_the_shapes_of_tensorflows(name):
    run = load(name)
    dropout = jax.tree.map(
        lambda noise: dataclasses.replace(noise, broadcast_dims=(0,)),
        run.dropout,
        is_leaf=lambda node: isinstance(node, fdc.Dropout),
    )

    def draw(rng):
        carry, x = run.state("initial_state"), run.arrays["inputs"][0]
        return fdc.draw_masks(run.params, carry, x, rng, cell=run.cell, dropout=dropout)

    assert shapes(jax.eval_shape(draw, jax.random.key(0))) == shapes(run.masks())


@pytest.mark.parametrize("cell_class", FLAX_LSTMS)
def test_linen_wrapper_draws_masks_of_tensorflows_shapes(cell_class):
    run, _ = load_for_flax("lstm_variational")
    wrapper = wrap(run, cell_class(run.arrays["outputs"].shape[-1]), broadcast_dims=(0,))

    def draw(rng):
        return wrapper.initialize_carry(rng, run.arrays["inputs"].shape[1:]).masks

    assert shapes(jax.eval_shape(draw, jax.random.key(0))) == shapes(run.masks())


def swap_state_and_output(arrays):
    return {"state_mask.1": arrays["output_mask"], "output_mask": arrays["state_mask.1"]}


def mask_memory_too(arrays):
    return {"state_mask.0": arrays["state_mask.1"]}


def swap_keep_probs(arrays):
    return {
        "state_keep_prob": arrays["output_keep_prob"],
        "output_keep_prob": arrays["state_keep_prob"],
    }


def delay_masks(arrays):
    return {name: np.roll(arrays[name], 1, axis=0) for name in arrays if "mask" in name}


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("lstm_variational", swap_state_and_output),
        ("lstm_variational", mask_memory_too),
        ("lstm_variational", swap_keep_probs),
        ("lstm_per_step", swap_state_and_output),
        ("lstm_per_step", mask_memory_too),
        ("lstm_per_step", delay_masks),
    ],
)
def test_a_mistake_shows(name, mistake):
    run = load(name)
    wrong = dataclasses.replace(run, arrays=run.arrays | mistake(run.arrays))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_each_step(wrong, dropout_step(wrong))

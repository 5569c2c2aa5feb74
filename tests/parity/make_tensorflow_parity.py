"""Stores runs of TensorFlow's own dropout wrapper for `tests/test_tensorflow_parity.py`.

Needs `pip install tensorflow-cpu tf_keras`; run it by hand, never in CI:

    python tests/parity/make_tensorflow_parity.py

Every `.npz` beside this file is one run: inputs `[time, batch, units]`, weights, the masks that
TensorFlow used in that very run, its outputs and its states. Leaves of a state are numbered in
the order of `tf.nest.flatten`; a leaf without a mask is one that the state filter left alone.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# tf.compat.v1.nn.rnn_cell is gone from Keras 3.
os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf  # pyright: ignore[reportMissingImports]

# The default state filter of tf.nn.RNNCellDropoutWrapper knows the LSTMStateTuple of this module
# only: around the LSTM cells of tf.compat.v1.nn.rnn_cell it drops the memory c as well.
from tensorflow.python.keras.layers.legacy_rnn import (  # pyright: ignore[reportMissingImports]
    rnn_cell_impl,
)

STEPS, BATCH, DEPTH = 7, 3, 5
KEEP_PROBS = {"input_keep_prob": 0.8, "state_keep_prob": 0.7, "output_keep_prob": 0.6}
FORGET_BIAS = 0.75
SEQUENCE_LENGTHS = (7, 1, 4)

CELLS = {
    "lstm": functools.partial(rnn_cell_impl.BasicLSTMCell, forget_bias=FORGET_BIAS),
    "gru": rnn_cell_impl.GRUCell,
}
WEIGHTS = {
    "lstm": ("kernel", "bias"),
    "gru": ("gate_kernel", "gate_bias", "candidate_kernel", "candidate_bias"),
}

Arrays = dict[str, np.ndarray]


def visit_memories(state: Any) -> Any:
    """The opposite of the default on an LSTM, and nothing of the second layer."""
    if isinstance(state, rnn_cell_impl.LSTMStateTuple):
        return rnn_cell_impl.LSTMStateTuple(c=True, h=False)
    if isinstance(state, tuple):
        return (True, False, True)
    return True


def run_eagerly(
    layers: list[tuple[str, int]],
    *,
    variational: bool,
    seed: int,
    visitor: Callable[[Any], Any] | None = None,
) -> Arrays:
    """Steps `tf.nn.RNNCellDropoutWrapper` in a Python loop."""
    tf.random.set_seed(seed)
    random = np.random.default_rng(seed)
    cells = [CELLS[kind](units) for kind, units in layers]
    cell = cells[0] if len(cells) == 1 else rnn_cell_impl.MultiRNNCell(cells)
    wrapper = tf.nn.RNNCellDropoutWrapper(
        cell,
        **KEEP_PROBS,
        variational_recurrent=variational,
        input_size=DEPTH,
        dtype=tf.float32,
        seed=seed,
        dropout_state_filter_visitor=visitor,
    )
    inputs = draw(random, STEPS, BATCH, DEPTH)
    state = tf.nest.map_structure(
        lambda units: tf.constant(draw(random, BATCH, units)), wrapper.state_size
    )
    arrays = describe("tf.nn.RNNCellDropoutWrapper", layers, variational)
    arrays |= {"inputs": inputs} | number("initial_state", state)

    # Builds the weights; what it computes and draws is thrown away.
    wrapper(tf.constant(inputs[0]), state)
    arrays |= set_weights(random, layers, wrapper.weights)

    drops: list[tuple[str, Any, Any]] = []
    wrapper._dropout = functools.partial(record_drop, wrapper._dropout, drops)
    steps = []
    for x in inputs:
        drops.clear()
        output, state = wrapper(tf.constant(x), state)
        step = {"outputs": output.numpy()} | number("states", state) | read_drops(drops)
        steps.append(step)
    stacked = {name: np.stack([step[name] for step in steps]) for name in steps[0]}
    if variational:
        stacked |= share_masks(stacked, read_noise(wrapper))
    return arrays | stacked


def run_in_graph(units: int, *, seed: int) -> Arrays:
    """Runs `tf.compat.v1.nn.rnn_cell.DropoutWrapper` in `dynamic_rnn`, in one `Session.run`."""
    rnn_cell = tf.compat.v1.nn.rnn_cell
    random = np.random.default_rng(seed)
    inputs = draw(random, STEPS, BATCH, DEPTH)
    initial_state = [draw(random, BATCH, units) for _ in range(2)]
    layers = [("lstm", units)]
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        cell = rnn_cell.BasicLSTMCell(units, forget_bias=FORGET_BIAS)
        wrapper = rnn_cell.DropoutWrapper(
            cell,
            **KEEP_PROBS,
            variational_recurrent=True,
            input_size=DEPTH,
            dtype=tf.float32,
            seed=seed,
        )
        outputs, state = tf.compat.v1.nn.dynamic_rnn(
            wrapper,
            tf.constant(inputs),
            sequence_length=SEQUENCE_LENGTHS,
            initial_state=rnn_cell.LSTMStateTuple(*map(tf.constant, initial_state)),
            time_major=True,
        )
        noise = (
            wrapper._recurrent_input_noise,
            wrapper._recurrent_state_noise,
            wrapper._recurrent_output_noise,
        )
        weights = set_weights(random, layers, wrapper.weights, session)
        outputs, state, noise = session.run([outputs, state, noise])
    masks = masks_from_noise(*noise)
    del masks["state_mask.0"]  # The memory c, which the default filter protects.
    return (
        describe("tf.compat.v1.nn.rnn_cell.DropoutWrapper", layers, variational=True)
        | {"inputs": inputs, "sequence_lengths": np.array(SEQUENCE_LENGTHS, np.int32)}
        | number("initial_state", initial_state)
        | weights
        | masks
        | {"outputs": outputs}
        | number("final_state", state)
    )


def record_drop(dropout, drops, values, salt_prefix, *args, **kwargs):
    """Calls the wrapper's `_dropout` and keeps what went in and what came out."""
    dropped = dropout(values, salt_prefix, *args, **kwargs)
    drops.append((salt_prefix, values, dropped))
    return dropped


def read_drops(drops: list[tuple[str, Any, Any]]) -> Arrays:
    """The masks of one step: False where dropout made a zero of what was none."""
    masks = {}
    for site, values, dropped in drops:
        befores, afters = tf.nest.flatten(values), tf.nest.flatten(dropped)
        for index, (before, after) in enumerate(zip(befores, afters, strict=True)):
            if after is before:  # The state filter said False.
                continue
            if not np.all(before.numpy()):
                raise RuntimeError(f"A zero before dropout hides the {site} mask there.")
            name = f"state_mask.{index}" if site == "state" else f"{site}_mask"
            masks[name] = after.numpy() != 0
    return masks


def read_noise(wrapper: Any) -> Arrays:
    """The variational masks, from the noise that the wrapper holds."""
    noise = (
        wrapper._recurrent_input_noise,
        wrapper._recurrent_state_noise,
        wrapper._recurrent_output_noise,
    )
    return masks_from_noise(*tf.nest.map_structure(lambda leaf: leaf.numpy(), noise))


def masks_from_noise(input_noise: Any, state_noise: Any, output_noise: Any) -> Arrays:
    def threshold(noise: np.ndarray, site: str) -> np.ndarray:
        return np.floor(np.float32(KEEP_PROBS[f"{site}_keep_prob"]) + noise) == 1

    masks = {
        "input_mask": threshold(input_noise, "input"),
        "output_mask": threshold(output_noise, "output"),
    }
    for index, noise in enumerate(tf.nest.flatten(state_noise)):
        masks[f"state_mask.{index}"] = threshold(noise, "state")
    return masks


def share_masks(stacked: Arrays, from_noise: Arrays) -> Arrays:
    """The masks `[1, units]`, after a check that every step and row did use them."""
    seen = {name: mask for name, mask in stacked.items() if "mask" in name}
    for name, mask in seen.items():
        if not np.all(mask == from_noise[name]):
            raise RuntimeError(f"{name}: the noise and the zeros do not tell of the same mask.")
    return {name: from_noise[name] for name in seen}


def set_weights(
    random: np.random.Generator, layers: list[tuple[str, int]], variables: Any, session: Any = None
) -> Arrays:
    """Gives every weight, and every bias, a value of its own."""
    names = [f"layer{i}.{name}" for i, (kind, _) in enumerate(layers) for name in WEIGHTS[kind]]
    weights = {}
    for name, variable in zip(names, variables, strict=True):
        weights[name] = draw(random, *variable.shape) / 2
        if session is None:
            variable.assign(weights[name])
        else:
            variable.load(weights[name], session)
    return weights


def draw(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape, np.float32)


def number(name: str, tree: Any) -> Arrays:
    return {f"{name}.{i}": np.asarray(leaf) for i, leaf in enumerate(tf.nest.flatten(tree))}


def describe(wrapper: str, layers: list[tuple[str, int]], variational: bool) -> Arrays:
    return {
        "tensorflow_version": np.array(tf.__version__),
        "wrapper": np.array(wrapper),
        "mode": np.array("variational" if variational else "per-step"),
        "layers": np.array([kind for kind, _ in layers]),
        "forget_bias": np.array(FORGET_BIAS),
    } | {name: np.array(keep_prob) for name, keep_prob in KEEP_PROBS.items()}


def check(name: str, arrays: Arrays) -> None:
    """Refuses a run that could not tell a right mask from a wrong one."""
    masks = {key: mask for key, mask in arrays.items() if "mask" in key}
    for key, mask in masks.items():
        if mask.all() or not mask.any():
            raise RuntimeError(f"{name}: {key} keeps all or nothing; take another seed.")
        if arrays["mode"] == "per-step" and np.all(mask == mask[:1]):
            raise RuntimeError(f"{name}: {key} is the same at every step.")
        for other, other_mask in masks.items():
            if key != other and np.array_equal(mask, other_mask):
                raise RuntimeError(f"{name}: {key} and {other} are equal; take another seed.")


def main() -> None:
    stack = [("lstm", 6), ("gru", 4), ("lstm", 5)]
    eager, memories = run_eagerly, functools.partial(run_eagerly, visitor=visit_memories)
    runs = {
        "lstm_variational": eager([("lstm", 6)], variational=True, seed=1),
        "lstm_per_step": eager([("lstm", 6)], variational=False, seed=2),
        "lstm_dynamic_rnn": run_in_graph(6, seed=3),
        "gru_variational": eager([("gru", 6)], variational=True, seed=4),
        "gru_per_step": eager([("gru", 6)], variational=False, seed=5),
        "stack_variational": eager(stack, variational=True, seed=6),
        "stack_per_step": eager(stack, variational=False, seed=7),
        "stack_memories_variational": memories(stack, variational=True, seed=8),
        "stack_memories_per_step": memories(stack, variational=False, seed=9),
    }
    for name, arrays in runs.items():
        check(name, arrays)
        np.savez_compressed(Path(__file__).with_name(f"{name}.npz"), allow_pickle=False, **arrays)
        print(name, {key: value.shape for key, value in arrays.items() if "mask" in key})


if __name__ == "__main__":
    main()

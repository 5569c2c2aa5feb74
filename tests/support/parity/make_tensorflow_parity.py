"""Stores runs of TensorFlow's own dropout wrapper for `tests/flax/test_tensorflow_parity.py`.

Needs `pip install tensorflow-cpu tf_keras`; run it by hand, never in CI:

    python tests/support/parity/make_tensorflow_parity.py

Every `.npz` beside this file is one run: inputs `[time, batch, units]`, weights, the masks that
TensorFlow used in that very run, its outputs and its states. Leaves of a state are numbered in
the order of `tf.nest.flatten`; a leaf without a mask is one that the state filter left alone.
"""
# pyright: reportMissingImports=false, reportMissingModuleSource=false
# pyright: reportPossiblyUnboundVariable=false

import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":  # Not where pytest imports every file to look for doctests.
    # tf.compat.v1.nn.rnn_cell is gone from Keras 3.
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    import tensorflow as tf

    # The default state filter of tf.nn.RNNCellDropoutWrapper knows the LSTMStateTuple of this
    # module only: around the LSTM cells of tf.compat.v1.nn.rnn_cell it drops c as well.
    from tensorflow.python.keras.layers.legacy_rnn import rnn_cell_impl

STEPS, BATCH, DEPTH = 7, 3, 8
KEEP_PROBS = {"input_keep_prob": 0.8, "state_keep_prob": 0.7, "output_keep_prob": 0.6}
FORGET_BIAS = 0.75
SEQUENCE_LENGTHS = (7, 1, 4)

WEIGHTS = {
    "lstm": ("kernel", "bias"),
    "gru": ("gate_kernel", "gate_bias", "candidate_kernel", "candidate_bias"),
}

Arrays = dict[str, np.ndarray]
Layers = list[tuple[str, int]]


def make_cell(layers: Layers) -> Any:
    def make_layer(kind: str, units: int) -> Any:
        if kind == "gru":
            return rnn_cell_impl.GRUCell(units)
        return rnn_cell_impl.BasicLSTMCell(units, forget_bias=FORGET_BIAS)

    cells = [make_layer(*layer) for layer in layers]
    return cells[0] if len(cells) == 1 else rnn_cell_impl.MultiRNNCell(cells)


def visit_memories(state: Any) -> Any:
    """The opposite of the default on an LSTM, and nothing of the second layer."""
    if isinstance(state, rnn_cell_impl.LSTMStateTuple):
        return rnn_cell_impl.LSTMStateTuple(c=True, h=False)
    if isinstance(state, tuple):
        return (True, False, True)
    return True


def run_eagerly(
    layers: Layers,
    *,
    variational: bool,
    seed: int,
    visitor: Callable[[Any], Any] | None = None,
) -> Arrays:
    """Steps `tf.nn.RNNCellDropoutWrapper` in a Python loop."""
    tf.random.set_seed(seed)
    random = np.random.default_rng(seed)
    cell = make_cell(layers)
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
    arrays = describe("tf.nn.RNNCellDropoutWrapper", layers, variational, seed)
    arrays |= {"inputs": inputs} | number("initial_state", state)

    # Builds the weights; its result and its draws are thrown away.
    wrapper(tf.constant(inputs[0]), state)
    arrays |= set_weights(random, layers, cell.weights)

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
        noise = tf.nest.map_structure(lambda leaf: leaf.numpy(), noise_of(wrapper))
        stacked |= share_masks(stacked, masks_from_noise(noise))
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
        weights = set_weights(random, layers, cell.weights, session)
        outputs, state, noise = session.run([outputs, state, noise_of(wrapper)])
    masks = masks_from_noise(noise)
    del masks["state_mask.0"]  # The memory c, which the default filter protects.
    return (
        describe("tf.compat.v1.nn.rnn_cell.DropoutWrapper", layers, True, seed)
        | {"inputs": inputs, "sequence_lengths": np.array(SEQUENCE_LENGTHS, np.int32)}
        | number("initial_state", initial_state)
        | weights
        | masks
        | {"outputs": outputs}
        | number("final_state", state)
    )


def record_drop(dropout, drops, values, salt_prefix, *args, **kwargs):
    """Calls the wrapper's `_dropout` and keeps its argument and its result."""
    dropped = dropout(values, salt_prefix, *args, **kwargs)
    drops.append((salt_prefix, values, dropped))
    return dropped


def read_drops(drops: list[tuple[str, Any, Any]]) -> Arrays:
    """The masks of one step: False where dropout turned a non-zero value into zero."""
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


def noise_of(wrapper: Any) -> tuple[Any, Any, Any]:
    """The uniform noise from which a wrapper makes its variational masks."""
    return (
        wrapper._recurrent_input_noise,
        wrapper._recurrent_state_noise,
        wrapper._recurrent_output_noise,
    )


def masks_from_noise(noise: tuple[Any, Any, Any]) -> Arrays:
    def threshold(site: str, uniform: np.ndarray) -> np.ndarray:
        return np.floor(np.float32(KEEP_PROBS[f"{site}_keep_prob"]) + uniform) == 1

    input_noise, state_noise, output_noise = noise
    masks = {
        "input_mask": threshold("input", input_noise),
        "output_mask": threshold("output", output_noise),
    }
    for index, uniform in enumerate(tf.nest.flatten(state_noise)):
        masks[f"state_mask.{index}"] = threshold("state", uniform)
    return masks


def share_masks(stacked: Arrays, from_noise: Arrays) -> Arrays:
    """The masks `[1, units]`, after a check that every step and row did use them."""
    seen = {name: mask for name, mask in stacked.items() if "mask" in name}
    for name, mask in seen.items():
        if not np.all(mask == from_noise[name]):
            raise RuntimeError(f"{name}: the noise and the zeros do not tell of the same mask.")
    return {name: from_noise[name] for name in seen}


def set_weights(
    random: np.random.Generator, layers: Layers, variables: Any, session: Any = None
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


def describe(wrapper: str, layers: Layers, variational: bool, seed: int) -> Arrays:
    return {
        "tensorflow_version": np.array(tf.__version__),
        "wrapper": np.array(wrapper),
        "mode": np.array("variational" if variational else "per-step"),
        "layers": np.array([kind for kind, _ in layers]),
        "forget_bias": np.array(FORGET_BIAS),
        "seed": np.array(seed),
    } | {name: np.array(keep_prob) for name, keep_prob in KEEP_PROBS.items()}


def tells_masks_apart(arrays: Arrays) -> bool:
    """Whether a wrong mask, in place of any of the run's, would show."""
    masks = [mask for name, mask in arrays.items() if "mask" in name]
    per_step = arrays["mode"] == "per-step"
    return (
        all(mask.any() and not mask.all() for mask in masks)
        and not any(np.array_equal(*pair) for pair in itertools.combinations(masks, 2))
        and not any(per_step and np.all(mask == mask[:1]) for mask in masks)
    )


def first_telling(run: Callable[..., Arrays]) -> Arrays:
    """The run of the first seed whose masks can be told apart."""
    return next(filter(tells_masks_apart, (run(seed=seed) for seed in itertools.count())))


def main() -> None:
    stack = [("lstm", 8), ("gru", 6), ("lstm", 7)]
    cases = {
        "lstm": functools.partial(run_eagerly, [("lstm", 8)]),
        "gru": functools.partial(run_eagerly, [("gru", 8)]),
        "stack": functools.partial(run_eagerly, stack),
        "stack_memories": functools.partial(run_eagerly, stack, visitor=visit_memories),
    }
    runs = {"lstm_dynamic_rnn": functools.partial(run_in_graph, 8)}
    for name, case in cases.items():
        runs[f"{name}_variational"] = functools.partial(case, variational=True)
        runs[f"{name}_per_step"] = functools.partial(case, variational=False)
    for name, run in runs.items():
        arrays = first_telling(run)
        np.savez_compressed(Path(__file__).with_name(f"{name}.npz"), allow_pickle=False, **arrays)
        print(name, {key: value.shape for key, value in arrays.items() if "mask" in key})


if __name__ == "__main__":
    main()

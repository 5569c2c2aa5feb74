"""TensorFlow: `RNNCellDropoutWrapper` in a `tf.function`, with XLA and without."""

import functools
import itertools
import os
import time
from collections.abc import Callable
from typing import Any

os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf
from program import KEEP_PROBS, Compiled, Config, Programs

# The default state filter knows the LSTMStateTuple of this module only.
from tensorflow.python.keras.layers.legacy_rnn import rnn_cell_impl


def versions() -> dict[str, str]:
    return {"tensorflow": tf.__version__}


def make_cell(mode: str, config: Config) -> Any:
    cell = rnn_cell_impl.BasicLSTMCell(config.features)
    if mode == "bare":
        return cell
    keep_prob = KEEP_PROBS[0]
    return tf.nn.RNNCellDropoutWrapper(
        cell,
        input_keep_prob=keep_prob,
        state_keep_prob=keep_prob,
        output_keep_prob=keep_prob,
        variational_recurrent=mode == "variational",
        input_size=tf.TensorShape([config.features]) if mode == "variational" else None,
        dtype=tf.float32 if mode == "variational" else None,
    )


def make(mode: str, xla: bool, config: Config) -> Compiled:
    cell = make_cell(mode, config)
    xs = tf.random.normal((config.time, config.batch, config.features))
    state = cell.zero_state(config.batch, tf.float32)
    cell(xs[0], state)  # makes the weights

    @tf.function(jit_compile=xla)
    def forward() -> tf.Tensor:
        def step(index: tf.Tensor, state: Any, ys: tf.TensorArray) -> tuple[Any, ...]:
            y, state = cell(xs[index], state)
            return index + 1, state, ys.write(index, y)

        ys = tf.TensorArray(tf.float32, config.time, element_shape=(config.batch, config.features))
        _, _, ys = tf.while_loop(
            lambda index, *_: index < config.time,
            step,
            (0, state, ys),
            maximum_iterations=config.time,
        )
        return ys.stack()

    @tf.function(jit_compile=xla)
    def gradient() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(forward() ** 2)
        return tape.gradient(loss, cell.trainable_variables)

    start = time.perf_counter()
    gradient()
    first = time.perf_counter() - start
    start = time.perf_counter()
    wait(gradient)
    again = time.perf_counter() - start
    return Compiled(lambda: wait(forward), lambda: wait(gradient), first - again)


def wait(function: Callable[[], Any]) -> None:
    for tensor in tf.nest.flatten(function()):
        tensor.numpy()


PROGRAMS: Programs = {
    f"TensorFlow{', XLA' if xla else ''}: {label}": functools.partial(make, mode, xla)
    for xla, (mode, label) in itertools.product(
        (False, True),
        [
            ("bare", "bare"),
            ("variational", "variational"),
            ("per step", f"per step, {KEEP_PROBS[0]}"),
        ],
    )
}

"""Keras 3 on JAX: its LSTM layer, with dropout on the inputs and on h."""

import functools
import os
import time

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
from program import KEEP_PROBS, Compiled, Config, Programs


def versions() -> dict[str, str]:
    return {"keras": keras.__version__, "jax (keras)": jax.__version__}


def make(keep_prob: float, config: Config) -> Compiled:
    rate = 1 - keep_prob
    layer = keras.layers.LSTM(
        config.features, dropout=rate, recurrent_dropout=rate, return_sequences=True
    )
    xs = jax.random.normal(jax.random.key(0), (config.batch, config.time, config.features))
    layer.build(xs.shape)
    params = [variable.value for variable in layer.trainable_variables]
    others = [variable.value for variable in layer.non_trainable_variables]

    def run(params: list[jax.Array], others: list[jax.Array], xs: jax.Array) -> jax.Array:
        return layer.stateless_call(params, others, xs, training=True)[0]

    def loss(*args: object) -> jax.Array:
        return jnp.mean(run(*args) ** 2)  # type: ignore

    args = (params, others, xs)
    forward = jax.jit(run).lower(*args).compile()
    start = time.perf_counter()
    gradient = jax.jit(jax.grad(loss)).lower(*args).compile()
    return Compiled(
        lambda: jax.block_until_ready(forward(*args)),
        lambda: jax.block_until_ready(gradient(*args)),
        time.perf_counter() - start,
        forward.memory_analysis().temp_size_in_bytes,
        gradient.memory_analysis().temp_size_in_bytes,
    )


PROGRAMS: Programs = {
    "Keras LSTM: bare": functools.partial(make, 1.0),
    f"Keras LSTM: {KEEP_PROBS[0]}": functools.partial(make, KEEP_PROBS[0]),
}

"""Predictions under many draws of the noise, and what their spread says."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ._random.keys import as_rng, fold_in, is_threefry

PyTree = Any


def mc_samples(
    predict: Callable[[jax.Array], PyTree],
    rng: jax.Array,
    num_samples: int,
    *,
    chunk_size: int | None = None,
) -> PyTree:
    """Calls a stochastic prediction with many keys: Monte Carlo dropout, in one program.

    Each sample is a draw of all masks, and so of one model, from the approximate posterior (Gal
    and Ghahramani 2016, arXiv:1512.05287, section 4.1): `predict` passes its key on as the `rng`
    of the layers, or to `dropout_scan`. Sample i has the key `jax.random.fold_in(rng, i)`, so
    neither `num_samples` nor `chunk_size` changes it.

    It is compiled anew at each call; to call it often, do so in a function under `jax.jit`.

    Args:
      predict: `predict(key) -> prediction`, any pytree of arrays. It is traced and may close over
        parameters, and over an NNX module that is called with the key.
      rng: the key. Those of threefry run side by side; a vmap would give those of other PRNGs,
        such as rbg, one stream, so their samples run one after the other.
      num_samples: how many samples to draw.
      chunk_size: how many samples run side by side at most, which bounds the memory; it need not
        divide `num_samples`. None is all of them.

    Returns:
      What `predict` gives, with a first axis `[num_samples, ...]` in each leaf.

    Raises:
      ValueError: a size is below 1, or there is no key.
      TypeError: an argument has the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> def predict(rng):
      ...     table = jnp.ones((10, 3))
      ...     return fdc.embedding_dropout(table, jnp.arange(4), rng, keep_prob=0.8)
      >>> fdc.mc_samples(predict, jax.random.key(0), 100, chunk_size=32).shape
      (100, 4, 3)
    """
    if not callable(predict):
        raise TypeError(f"predict must be a function of a key, got a {type(predict).__name__}.")
    typed = as_rng(rng)
    if typed is None:
        raise ValueError("mc_samples needs a key such as jax.random.key(0), got rng=None.")
    num_samples = _check_size("num_samples", num_samples)
    chunk_size = num_samples if chunk_size is None else _check_size("chunk_size", chunk_size)
    if not is_threefry(typed):
        chunk_size = 1
    # As many chunks as are needed, of one size, so that the last one has few samples too many.
    num_chunks = -(-num_samples // chunk_size)
    chunk_size = -(-num_samples // num_chunks)

    def sample(index: jax.Array) -> PyTree:
        return predict(fold_in(typed, index))

    with jax.named_scope("mc_samples"):
        indices = jnp.arange(num_chunks * chunk_size, dtype=jnp.uint32)
        if chunk_size == 1:
            return jax.lax.map(sample, indices)
        # One chunk is a loop too: outside of jit that makes one program, to which what `predict`
        # closes over is an argument and no constant.
        chunks = jax.lax.map(jax.vmap(sample), indices.reshape(num_chunks, chunk_size))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num_samples], chunks)


class Entropies(NamedTuple):
    """The parts of a prediction's uncertainty, in nats, `[...]` without the classes.

    Attributes:
      predictive: the entropy of the mean prediction: all uncertainty.
      expected: the mean entropy of the samples: what more training data would not take away.
      mutual_information: their difference, between the prediction and the masks: what the model
        does not know (BALD: Houlsby et al. 2011, arXiv:1112.5745).
    """

    predictive: jax.Array
    expected: jax.Array
    mutual_information: jax.Array


def mc_entropies(probabilities: jax.Array) -> Entropies:
    """Splits the uncertainty of sampled class probabilities into its two parts.

    Gal 2016, *Uncertainty in Deep Learning*, equations 3.21 to 3.23.

    Args:
      probabilities: `[num_samples, ..., classes]`, after the softmax, as `mc_samples` stacks them.
        Of a concrete array the values are checked; under `jit` they are not seen, and logits give
        numbers that mean nothing.

    Returns:
      `Entropies(predictive, expected, mutual_information)`, each `[...]`, in float32 or wider. The
      mutual information is the difference of the others, or 0 where rounding makes that negative.

    Raises:
      ValueError: the array has no two axes, or is seen to hold no probabilities.
      TypeError: the array is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> agree = jnp.array([[0.5, 0.5], [0.5, 0.5]])
      >>> differ = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> fdc.mc_entropies(jnp.stack([agree, differ], axis=1)).mutual_information.round(3)
      Array([0.   , 0.693], dtype=float32)
    """
    probabilities = jnp.asarray(probabilities)
    _check_probabilities(probabilities)
    probabilities = _widen(probabilities)
    predictive = _entropy(probabilities.mean(axis=0))
    expected = _entropy(probabilities).mean(axis=0)
    return Entropies(predictive, expected, jnp.maximum(predictive - expected, 0))


def _entropy(probabilities: jax.Array) -> jax.Array:
    # Where a class has probability 0 it adds nothing, and no infinite slope to the gradient.
    positive = probabilities > 0
    safe = jnp.where(positive, probabilities, jnp.ones((), probabilities.dtype))
    return -(safe * jnp.log(safe)).sum(axis=-1)


def _widen(values: jax.Array) -> jax.Array:
    return values if jnp.finfo(values.dtype).bits >= 32 else values.astype(jnp.float32)


def _check_probabilities(probabilities: jax.Array) -> None:
    came = f"{probabilities.dtype}{list(probabilities.shape)}"
    if not jnp.issubdtype(probabilities.dtype, jnp.floating):
        raise TypeError(f"probabilities must be floating-point, got {came}.")
    if probabilities.ndim < 2 or 0 in probabilities.shape:
        raise ValueError(f"probabilities must be [num_samples, ..., classes], got {came}.")
    if isinstance(probabilities, Tracer) or not probabilities.is_fully_addressable:
        return
    values = np.asarray(_widen(probabilities))
    sums, slack = values.sum(axis=-1), 0.03  # some may have been rounded to bfloat16
    if not (np.all(values >= -slack) and np.all(np.abs(sums - 1) <= slack)):
        raise ValueError(
            f"probabilities must be in [0, 1] and sum to 1 over the last axis, got values from "
            f"{values.min():.3g} to {values.max():.3g}, sums from {sums.min():.3g} to "
            f"{sums.max():.3g}.\nOf logits, pass jax.nn.softmax(logits)."
        )


def _check_size(name: str, size: Any) -> int:
    if isinstance(size, bool) or not isinstance(size, int | np.integer):
        raise TypeError(f"{name} must be an int, got a {type(size).__name__}.")
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}.")
    return int(size)

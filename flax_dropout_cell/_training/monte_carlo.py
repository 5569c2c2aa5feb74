"""Monte Carlo dropout: predictions under many masks, and the uncertainty in their spread."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._arguments import check_count
from .._compat import is_traced
from .._dtypes import wide_dtype
from .._messages import must_be
from .._random.keys import fold_in, is_threefry, need_rng

PyTree = Any


def mc_samples(
    predict: Callable[[jax.Array], PyTree],
    rng: jax.Array,
    num_samples: int,
    *,
    chunk_size: int | None = None,
) -> PyTree:
    """Runs a prediction under many masks: Monte Carlo dropout, compiled as one program.

    Each sample draws all masks anew, and so draws one model from the approximate posterior (Gal
    and Ghahramani 2016, arXiv:1512.05287, section 4.1). `predict` passes its key on to the layers
    as `rng=`, or to `dropout_scan`. Sample i has the key `jax.random.fold_in(rng, i)`, whatever
    `num_samples` and `chunk_size` are.

    In a model each layer needs a key of its own. Give a linen model `rngs={"dropout": key}`, and
    let an NNX model hand `nnx.Rngs(dropout=key)` on to its layers. Layers that are all given `key`
    itself draw equal masks.

    Each call compiles the program again. If you call it often, call it inside `jax.jit`.

    Args:
      predict: `predict(key) -> prediction`, any pytree of arrays. It is traced. It may close over
        parameters, or over an NNX module that it calls with `nnx.Rngs(dropout=key)`.
      rng: the key. Samples with threefry keys run in parallel. Samples with keys of other PRNGs,
        such as rbg, run one after the other, because `jax.vmap` would give them all one stream.
      num_samples: how many samples to draw.
      chunk_size: how many samples run in parallel at most, which bounds the memory. It need not
        divide `num_samples`. If None, all of them.

    Returns:
      The predictions, stacked: `[num_samples, ...]` in each leaf.

    Warns:
      UserWarning: if all samples are equal, as in evaluation. Under `jit` nothing is checked.

    Raises:
      ValueError: if a size is below 1, or `rng` is None.
      TypeError: if an argument has the wrong type.

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
        raise TypeError(must_be("predict", "a function of a key", predict))
    typed = need_rng("mc_samples", rng)
    num_samples = check_count("num_samples", num_samples)
    chunk_size = num_samples if chunk_size is None else check_count("chunk_size", chunk_size)
    if not is_threefry(typed):
        chunk_size = 1
    # Chunks of equal size, so that the last one computes few samples that are thrown away.
    num_chunks = -(-num_samples // chunk_size)
    chunk_size = -(-num_samples // num_chunks)

    def sample(index: jax.Array) -> PyTree:
        return predict(fold_in(typed, index))

    with jax.named_scope("mc_samples"):
        indices = jnp.arange(num_chunks * chunk_size, dtype=jnp.uint32)
        if chunk_size == 1:
            samples = jax.lax.map(sample, indices)
        else:
            # Even one chunk runs in a loop: outside of jit, the loop is compiled as one program,
            # and the arrays that `predict` closes over become its arguments instead of constants.
            chunks = jax.lax.map(jax.vmap(sample), indices.reshape(num_chunks, chunk_size))
            samples = jax.tree.map(
                lambda leaf: leaf.reshape(len(indices), *leaf.shape[2:])[:num_samples], chunks
            )
    _warn_if_equal(samples)
    return samples


def _warn_if_equal(samples: PyTree) -> None:
    """Warns if no sample differs from another in any floating-point value."""
    floats = (it for it in jax.tree.leaves(samples) if jnp.issubdtype(it.dtype, jnp.inexact))
    leaves = [leaf for leaf in floats if leaf.size]
    if not leaves or len(leaves[0]) < 2 or any(map(is_traced, leaves)):
        return
    if all(bool((leaf == leaf[:1]).all()) for leaf in leaves):
        warnings.warn(
            "all samples of mc_samples are equal: the model is in evaluation, or its layers do not "
            "get the key. Use deterministic=False, or train() in NNX, and pass the key on.",
            stacklevel=3,
        )


class Entropies(NamedTuple):
    """The parts of a prediction's uncertainty, in nats, `[...]` without the classes.

    Attributes:
      predictive: the entropy of the mean prediction: the total uncertainty.
      expected: the mean entropy of the samples: the part that more data would not reduce
        (aleatoric).
      mutual_information: the difference of the two, between the prediction and the masks: the
        model's own uncertainty (epistemic; BALD: Houlsby et al. 2011, arXiv:1112.5745).
    """

    predictive: jax.Array
    expected: jax.Array
    mutual_information: jax.Array


def mc_entropies(probabilities: jax.Array) -> Entropies:
    """Splits the uncertainty of sampled class probabilities into aleatoric and epistemic parts.

    Gal 2016, *Uncertainty in Deep Learning*, equations 3.21 to 3.23.

    Args:
      probabilities: `[num_samples, ..., classes]`, after the softmax, as `mc_samples` stacks them.
        Outside of `jit` the values are checked. Under `jit` they cannot be, and logits give
        meaningless numbers.

    Returns:
      `Entropies(predictive, expected, mutual_information)`, each `[...]`, in float32 or wider. The
      mutual information is `predictive - expected`, or 0 if rounding makes that negative.

    Raises:
      ValueError: if the array has fewer than two axes, or its values are not probabilities.
      TypeError: if the array is not floating-point.

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
    # A class of probability 0 adds nothing to the sum, and no infinite slope to the gradient.
    positive = probabilities > 0
    safe = jnp.where(positive, probabilities, jnp.ones((), probabilities.dtype))
    return -(safe * jnp.log(safe)).sum(axis=-1)


def _widen(values: jax.Array) -> jax.Array:
    return values.astype(wide_dtype(values.dtype))


def _check_probabilities(probabilities: jax.Array) -> None:
    if not jnp.issubdtype(probabilities.dtype, jnp.floating):
        raise TypeError(must_be("probabilities", "floating-point", probabilities))
    if probabilities.ndim < 2 or 0 in probabilities.shape:
        raise ValueError(must_be("probabilities", "[num_samples, ..., classes]", probabilities))
    if is_traced(probabilities) or not probabilities.is_fully_addressable:
        return
    values = np.asarray(_widen(probabilities))
    sums, slack = values.sum(axis=-1), 0.03  # some may have been rounded to bfloat16
    if not (np.all(values >= -slack) and np.all(np.abs(sums - 1) <= slack)):
        raise ValueError(
            f"probabilities must be in [0, 1] and sum to 1 over the last axis, got values from "
            f"{values.min():.3g} to {values.max():.3g}, sums from {sums.min():.3g} to "
            f"{sums.max():.3g}. For logits, pass jax.nn.softmax(logits)."
        )

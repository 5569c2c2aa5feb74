"""Terms that papers add to the loss: AR, TAR, and what makes a dropout probability learnable."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def activation_regularization(
    ys: jax.Array, *, seq_lengths: jax.Array | None = None, time_axis: int = 0
) -> jax.Array:
    """AR: the mean square of a layer's outputs, after their dropout (without its weight).

    Merity et al. 2017, arXiv:1708.02182, section 4.6: `alpha * L2(m * h_t)`, with alpha = 2 there
    and on the last layer alone. The mean is over all valid elements, as in the authors' code.

    Args:
      ys: the dropped outputs, `[time, *batch, features]`, or with time at `time_axis`.
      seq_lengths: `[*batch]`; what lies past a sequence's end does not count. None: all counts.
      time_axis: which axis of `ys` is time.

    Returns:
      A scalar, in float32 or wider; 0 where no step is valid.

    Raises:
      ValueError: the shapes do not fit.
      TypeError: `ys` is not floating-point, or `seq_lengths` not integer.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> ys = jnp.array([[[1.0], [3.0]], [[1.0], [9.0]]])  # [time=2, batch=2, features=1]
      >>> fdc.activation_regularization(ys, seq_lengths=jnp.array([2, 1])).round(3)
      Array(3.667, dtype=float32)
    """
    ys = _time_first(ys, time_axis)
    return _mean_square(ys, _valid(ys, seq_lengths))


def temporal_activation_regularization(
    ys: jax.Array, *, time_axis: int, seq_lengths: jax.Array | None = None
) -> jax.Array:
    """TAR: the mean square of the change of a layer's outputs, before their dropout.

    Merity et al. 2017, arXiv:1708.02182, section 4.6: `beta * L2(h_t - h_{t+1})`, with beta = 1
    there and on the last layer alone. The mean is over all pairs of steps of which both are valid.

    Args:
      ys: the raw outputs, without dropout, `[time, *batch, features]`, or with time at `time_axis`.
      time_axis: which axis of `ys` is time. It has no default: over the batch the term would be
        wrong without an error.
      seq_lengths: `[*batch]`; what lies past a sequence's end does not count. None: all counts.

    Returns:
      A scalar, in float32 or wider; 0 where no pair is valid.

    Raises:
      ValueError: the shapes do not fit.
      TypeError: `ys` is not floating-point, or `seq_lengths` not integer.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> ys = jnp.array([[1.0], [2.0], [5.0]])  # one sequence of three steps
      >>> fdc.temporal_activation_regularization(ys, time_axis=0)
      Array(5., dtype=float32)
    """
    ys = _time_first(ys, time_axis)
    valid = _valid(ys, seq_lengths)[1:]
    # Select first: what padding holds, NaN included, reaches neither the value nor the gradient.
    return _mean_square(jnp.where(valid, ys[1:], 0) - jnp.where(valid, ys[:-1], 0), valid)


def concrete_regularization(
    logit: jax.Array | float, kernel: jax.Array, *, length_scale: float, num_examples: int
) -> jax.Array:
    """The term to add to the loss for a `ConcreteDropout`: without it, its probability falls to 0.

    The divergence from the prior per training example, of units that are dropped with
    probability p = sigmoid(logit) and read by `kernel` (Gal, Hron and Kendall 2017,
    arXiv:1705.07832, equations 3 and 4): `(l**2 (1 - p) ||M||**2 / 2 - K H(p)) / N`, where K
    units have the entropy H(p) each. There M is the weight of a unit that is kept, here
    `kernel / (1 - p)`, for `ConcreteDropout` scales what it keeps. Without this term the likelihood
    pulls p to 0. It belongs to a loss that is the mean of `-log p(y | x)` in nats, such as the mean
    cross-entropy: one term for each site that has a `ConcreteDropout`.

    Args:
      logit: the noise's `logit`, a scalar.
      kernel: the weights that read the dropped units, `[K, ...]`.
      length_scale: l, of the Gaussian prior on the weights, above 0. The larger it is, the
        smaller are the weights, and the lower the probabilities that pay off.
      num_examples: N, how many examples the training set has.

    Returns:
      A scalar, in float32 or wider. It may be negative.

    Raises:
      ValueError: `kernel` has no axis, `logit` is no scalar, or a number is not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> fdc.concrete_regularization(
      ...     jnp.zeros(()), jnp.ones((2, 4)), length_scale=1.0, num_examples=10
      ... ).round(3)
      Array(0.661, dtype=float32)
    """
    logit, kernel = _float(logit), _float(kernel)
    if logit.ndim != 0 or kernel.ndim == 0:
        raise ValueError(
            f"logit must be a scalar and kernel [units, ...], got shapes {logit.shape} and "
            f"{kernel.shape}."
        )
    for name, number in (("length_scale", length_scale), ("num_examples", num_examples)):
        if isinstance(number, int | float | np.number) and not number > 0:
            raise ValueError(f"{name} must be above 0, got {number}.")
    # log p and log(1 - p) of a logit are finite where the products with p would round to 0 * inf.
    log_drop, log_keep = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
    entropy = -(jnp.exp(log_drop) * log_drop + jnp.exp(log_keep) * log_keep)
    weights = length_scale**2 / 2 * (kernel**2).sum().astype(logit.dtype) * jnp.exp(-log_keep)
    return (weights - kernel.shape[0] * entropy) / num_examples


def _float(value: Any) -> jax.Array:
    value = jnp.asarray(value)
    wide = jnp.issubdtype(value.dtype, jnp.floating) and jnp.finfo(value.dtype).bits >= 32
    return value if wide else value.astype(jnp.float32)


def _time_first(ys: jax.Array, time_axis: int) -> jax.Array:
    ys = jnp.asarray(ys)
    if not jnp.issubdtype(ys.dtype, jnp.floating):
        raise TypeError(f"ys must be floating-point, got {ys.dtype}{list(ys.shape)}.")
    if not -ys.ndim <= time_axis < ys.ndim - 1 or time_axis == -1:
        raise ValueError(
            f"ys must be [time, *batch, features] with time at time_axis={time_axis}, "
            f"got shape {ys.shape}."
        )
    # Squares of half-precision values overflow, and their sums do not add up.
    return jnp.moveaxis(_float(ys), time_axis, 0)


def _valid(ys: jax.Array, seq_lengths: jax.Array | None) -> jax.Array:
    """Which steps count, `[time, *batch, 1]`."""
    steps, batch = ys.shape[0], ys.shape[1:-1]
    if seq_lengths is None:
        return jnp.ones((steps, *batch, 1), bool)
    seq_lengths = jnp.asarray(seq_lengths)
    if not jnp.issubdtype(seq_lengths.dtype, jnp.integer):
        raise TypeError(f"seq_lengths must be integers, got {seq_lengths.dtype}.")
    if seq_lengths.shape != batch:
        raise ValueError(
            f"seq_lengths must have the batch's shape {batch}, got {seq_lengths.shape}; ys is "
            f"[time, *batch, features] with shape {ys.shape} once time is first."
        )
    times = jax.lax.broadcasted_iota(seq_lengths.dtype, (steps, *batch), 0)
    return (times < seq_lengths[None])[..., None]


def _mean_square(values: jax.Array, valid: jax.Array) -> jax.Array:
    total = jnp.where(valid, values, 0)
    count = valid.sum(dtype=jnp.int32).astype(values.dtype) * values.shape[-1]
    return (total**2).sum() / jnp.maximum(count, 1)

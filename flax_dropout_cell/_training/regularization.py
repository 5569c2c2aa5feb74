"""Regularization terms for the loss: AR, TAR, and the divergence for learned probabilities."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._arguments import Number
from .._dtypes import wide_dtype
from .._messages import must_be
from .._sequence.padding import find_valid
from ..noises.arguments import check_number


def activation_regularization(
    ys: jax.Array, *, seq_lengths: jax.typing.ArrayLike | None = None, time_axis: int = 0
) -> jax.Array:
    """AR, without its weight alpha: the mean square of a layer's outputs after their dropout.

    Merity et al. 2017, arXiv:1708.02182, section 4.6: `alpha * L2(m * h_t)`. The paper uses
    alpha = 2, on the last layer only. The mean is over all valid elements, as in the authors' code.

    Args:
      ys: the dropped outputs, `[time, *batch, features]`, or with time at `time_axis`.
      seq_lengths: `[*batch]`; steps past a sequence's end do not count. If None, all steps count.
      time_axis: which axis of `ys` is time. With `seq_lengths` and a layer's outputs,
        `[batch, time, features]`, pass 1: if there are as many rows as steps, the wrong axis is not
        an error.

    Returns:
      A scalar, in float32 or wider; 0 if no step is valid.

    Raises:
      ValueError: if the shapes do not fit.
      TypeError: if `ys` is not floating-point, or `seq_lengths` are not integers.

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
    ys: jax.Array, *, time_axis: int, seq_lengths: jax.typing.ArrayLike | None = None
) -> jax.Array:
    """TAR, without its weight beta: the mean square of the change of a layer's raw outputs.

    Merity et al. 2017, arXiv:1708.02182, section 4.6: `beta * L2(h_t - h_{t+1})`, on the outputs
    before their dropout. The paper uses beta = 1, on the last layer only. The mean is over all
    pairs of neighbouring steps that are both valid.

    Args:
      ys: the raw outputs, without dropout, `[time, *batch, features]`, or with time at `time_axis`.
      time_axis: which axis of `ys` is time. It has no default: over the batch the term would be
        wrong without an error.
      seq_lengths: `[*batch]`; steps past a sequence's end do not count. If None, all steps count.

    Returns:
      A scalar, in float32 or wider; 0 if no pair is valid.

    Raises:
      ValueError: if the shapes do not fit.
      TypeError: if `ys` is not floating-point, or `seq_lengths` are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> ys = jnp.array([[1.0], [2.0], [5.0]])  # one sequence of three steps
      >>> fdc.temporal_activation_regularization(ys, time_axis=0)
      Array(5., dtype=float32)
    """
    ys = _time_first(ys, time_axis)
    valid = _valid(ys, seq_lengths)[1:]
    # Select before subtracting, so that NaN in padding reaches neither the value nor the gradient.
    return _mean_square(jnp.where(valid, ys[1:], 0) - jnp.where(valid, ys[:-1], 0), valid)


def concrete_regularization(
    logit: jax.Array | float, kernel: jax.Array, *, length_scale: float, num_examples: int
) -> jax.Array:
    """The regularizer of a `ConcreteDropout`; without it the learned probability falls to 0.

    The divergence from the prior, per training example, for units that are dropped with
    probability p = sigmoid(logit) and read by `kernel` (Gal, Hron and Kendall 2017,
    arXiv:1705.07832, equations 3 and 4): `(l**2 (1 - p) ||M||**2 / 2 - K H(p)) / N`, with K units
    of entropy H(p) each; with a logit for each unit, the sum of these terms. The paper's M is the
    weight of a kept unit. Here that is `kernel / (1 - p)`, because `ConcreteDropout` scales the
    units that it keeps. Add one term for each site that has a `ConcreteDropout` to a loss that is
    the mean of `-log p(y | x)` in nats, such as the mean cross-entropy.

    Args:
      logit: the noise's `logit`, a scalar or `[K]`.
      kernel: the weights that read the dropped units, `[K, ...]`.
      length_scale: l, of the Gaussian prior on the weights, above 0. A larger l favours smaller
        weights and lower probabilities.
      num_examples: N, how many examples the training set has.

    Returns:
      A scalar, in float32 or wider. It may be negative.

    Raises:
      ValueError: if `kernel` has no axis, `logit` does not fit it, or a number is not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> fdc.concrete_regularization(
      ...     jnp.zeros(()), jnp.ones((2, 4)), length_scale=1.0, num_examples=10
      ... ).round(3)
      Array(0.661, dtype=float32)
    """
    logit, kernel = _float(logit), _float(kernel)
    if kernel.ndim == 0 or logit.shape not in ((), kernel.shape[:1]):
        got = f"shapes {kernel.shape} and {logit.shape}"
        raise ValueError(f"kernel must be [units, ...] and logit a scalar or [units], got {got}.")
    for name, number in (("length_scale", length_scale), ("num_examples", num_examples)):
        if isinstance(number, int | float | np.number) and not number > 0:
            raise ValueError(f"{name} must be above 0, got {number}.")
    # log_sigmoid stays finite for logits at which p rounds to 0 and p * log(p) to 0 * -inf.
    log_drop, log_keep = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
    entropy = -(jnp.exp(log_drop) * log_drop + jnp.exp(log_keep) * log_keep)
    squares = (kernel**2).sum(tuple(range(1, kernel.ndim))).astype(logit.dtype)
    weights = length_scale**2 / 2 * (squares * jnp.exp(-log_keep)).sum()
    units = kernel.shape[0] if logit.ndim == 0 else 1
    return (weights - units * entropy.sum()) / num_examples


def gaussian_kl(mean: jax.Array | float, stddev: jax.Array | float) -> jax.Array:
    """The divergence of normal distributions from N(0, 1), for noise whose size is learned.

    `KL(N(mean, stddev**2) || N(0, 1)) = (mean**2 + stddev**2 - 1) / 2 - log(stddev)`, in nats. Its
    sum over the units and steps of a `GaussianNoise` with a learned `stddev` is the price of an
    information bottleneck: a unit that the task does not need goes to `mean = 0`, `stddev = 1`
    and tells nothing (DisRNN: Miller et al. 2023, *Cognitive model discovery via disentangled
    RNNs*). With the mean and stddev of weights it is the complexity cost of Bayesian recurrent
    networks (Fortunato et al. 2017, arXiv:1704.02798, section 2). It draws nothing.

    Args:
      mean: of any shape: the undisturbed value.
      stddev: above 0, of a shape that broadcasts with the mean's, such as `[features]`.

    Returns:
      The divergence of each element, 0 or more, in float32 or wider.

    Raises:
      ValueError: if `stddev` is a number that is not above 0.
      TypeError: if the shapes do not broadcast.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> fdc.gaussian_kl(jnp.zeros(3), jnp.array([1.0, 0.5, 0.1])).round(2)
      Array([0.  , 0.32, 1.81], dtype=float32)
    """
    if isinstance(stddev, Number):
        check_number("stddev", stddev, least=0, above=True)
    mean, stddev = _float(mean), _float(stddev)
    ndim = max(mean.ndim, stddev.ndim)
    mean, stddev = (leaf.reshape((1,) * (ndim - leaf.ndim) + leaf.shape) for leaf in (mean, stddev))
    return (mean**2 + stddev**2 - 1) / 2 - jnp.log(stddev)


def _float(value: Any) -> jax.Array:
    value = jnp.asarray(value)
    if jnp.issubdtype(value.dtype, jnp.floating):
        return value.astype(wide_dtype(value.dtype))
    return value.astype(jnp.float32)


def _time_first(ys: jax.Array, time_axis: int) -> jax.Array:
    ys = jnp.asarray(ys)
    if not jnp.issubdtype(ys.dtype, jnp.floating):
        raise TypeError(must_be("ys", "floating-point", ys))
    if not -ys.ndim <= time_axis < ys.ndim - 1 or time_axis == -1:
        wanted = f"[time, *batch, features] with time at time_axis={time_axis}"
        raise ValueError(must_be("ys", wanted, ys))
    # Squares of half-precision values overflow, and their sums lose digits.
    return jnp.moveaxis(_float(ys), time_axis, 0)


def _valid(ys: jax.Array, seq_lengths: jax.typing.ArrayLike | None) -> jax.Array:
    """Which steps count, `[time, *batch, 1]`."""
    steps, batch = ys.shape[0], ys.shape[1:-1]
    if seq_lengths is None:
        return jnp.ones((steps, *batch, 1), bool)
    if np.shape(seq_lengths) != batch:
        raise ValueError(must_be("seq_lengths", f"of the batch's shape {batch}", seq_lengths))
    valid = find_valid(seq_lengths, None, steps)
    assert valid is not None
    return valid[..., None]


def _mean_square(values: jax.Array, valid: jax.Array) -> jax.Array:
    total = jnp.where(valid, values, 0)
    count = valid.sum(dtype=jnp.int32).astype(values.dtype) * values.shape[-1]
    return (total**2).sum() / jnp.maximum(count, 1)  # not 0 / 0 if no step is valid

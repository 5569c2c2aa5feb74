"""AR, TAR and the term of concrete dropout, against their equations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_dropout_cell as fdc

STEPS, BATCH, UNITS = 7, 3, 4
LENGTHS = np.array([7, 2, 0])


def outputs() -> np.ndarray:
    return np.asarray(jax.random.normal(jax.random.key(0), (STEPS, BATCH, UNITS)))


def test_without_lengths_they_are_plain_means() -> None:
    ys = outputs()
    got = fdc.activation_regularization(jnp.asarray(ys))
    np.testing.assert_allclose(got, (ys**2).mean(), rtol=1e-6)
    got = fdc.temporal_activation_regularization(jnp.asarray(ys), time_axis=0)
    np.testing.assert_allclose(got, ((ys[1:] - ys[:-1]) ** 2).mean(), rtol=1e-6)


@pytest.mark.parametrize("time_axis", [0, 1, -2, -3])
def test_valid_steps_alone_count_wherever_time_is(time_axis: int) -> None:
    ys = outputs()
    squares, changes = [], []
    for row, length in enumerate(LENGTHS):
        squares += [ys[t, row] ** 2 for t in range(length)]
        changes += [(ys[t + 1, row] - ys[t, row]) ** 2 for t in range(length - 1)]
    padded = np.where(np.arange(STEPS)[:, None, None] < LENGTHS[:, None], ys, np.nan)
    batch_first = time_axis in (1, -2)
    given = jnp.asarray(padded.swapaxes(0, 1) if batch_first else padded)
    got = fdc.activation_regularization(
        given, time_axis=time_axis, seq_lengths=jnp.asarray(LENGTHS)
    )
    np.testing.assert_allclose(got, np.mean(squares), rtol=1e-6)
    got = fdc.temporal_activation_regularization(
        given, time_axis=time_axis, seq_lengths=jnp.asarray(LENGTHS)
    )
    np.testing.assert_allclose(got, np.mean(changes), rtol=1e-6)


@pytest.mark.parametrize("temporal", [False, True])
def test_padding_reaches_no_gradient_and_nothing_valid_gives_0(temporal: bool) -> None:
    def term(ys: jax.Array, lengths: jax.Array) -> jax.Array:
        if temporal:
            return fdc.temporal_activation_regularization(ys, time_axis=0, seq_lengths=lengths)
        return fdc.activation_regularization(ys, seq_lengths=lengths)

    valid = np.arange(STEPS)[:, None, None] < LENGTHS[:, None]
    ys = jnp.asarray(np.where(valid, outputs(), np.nan))
    gradient = np.asarray(jax.grad(term)(ys, jnp.asarray(LENGTHS)))
    np.testing.assert_array_equal(gradient != 0, np.broadcast_to(valid, gradient.shape))
    nothing = jax.value_and_grad(term)(ys, jnp.zeros(BATCH, int))
    assert nothing[0] == 0 and (np.asarray(nothing[1]) == 0).all()
    one_step = fdc.temporal_activation_regularization(jnp.ones((1, 2, 3)), time_axis=0)
    assert one_step == 0


def test_other_batches() -> None:
    """No batch at all, and two dims of it."""
    ys = jnp.asarray(outputs())
    alone = fdc.activation_regularization(ys[:, 0], seq_lengths=jnp.int32(3))
    np.testing.assert_allclose(alone, np.mean(outputs()[:3, 0] ** 2), rtol=1e-6)
    wide = jnp.broadcast_to(ys[:, None], (STEPS, 5, BATCH, UNITS))
    lengths = jnp.broadcast_to(jnp.asarray(LENGTHS), (5, BATCH))
    np.testing.assert_allclose(
        fdc.temporal_activation_regularization(wide, time_axis=0, seq_lengths=lengths),
        fdc.temporal_activation_regularization(ys, time_axis=0, seq_lengths=jnp.asarray(LENGTHS)),
        rtol=1e-6,
    )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_does_not_overflow(dtype: Any) -> None:
    ys = jnp.full((STEPS, BATCH, UNITS), 300, dtype)
    got = fdc.activation_regularization(ys)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, float(ys[0, 0, 0]) ** 2)


# The term of concrete dropout --------------------------------------------------------------------


@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.5])
def test_the_divergence_is_that_of_the_paper(logit: float) -> None:
    kernel = np.asarray(jax.random.normal(jax.random.key(0), (6, 20)), np.float64)
    p = 1 / (1 + np.exp(-logit))
    entropy = -p * np.log(p) - (1 - p) * np.log(1 - p)
    m = kernel / (1 - p)
    wanted = (0.3**2 * (1 - p) * (m**2).sum() / 2 - 6 * entropy) / 50
    got = fdc.concrete_regularization(
        jnp.float32(logit), jnp.asarray(kernel, jnp.float32), length_scale=0.3, num_examples=50
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_without_weights_it_pulls_to_one_half_and_weights_pull_it_lower() -> None:
    def best(scale: float) -> float:
        logits = jnp.linspace(-6, 6, 121)
        terms = jax.vmap(
            lambda logit: fdc.concrete_regularization(
                logit, jnp.full((5, 8), scale), length_scale=1.0, num_examples=10
            )
        )(logits)
        return float(jax.nn.sigmoid(logits[terms.argmin()]))

    assert abs(best(0.0) - 0.5) < 1e-6
    assert best(1.0) < best(0.3) < 0.5


@pytest.mark.parametrize("logit", [-200.0, -40.0, 40.0])
def test_gradients_far_out_are_those_of_the_equation(logit: float) -> None:
    got = jax.grad(
        lambda logit, kernel: fdc.concrete_regularization(
            logit, kernel, length_scale=1e-3, num_examples=50
        ),
        argnums=(0, 1),
    )(jnp.float32(logit), jnp.ones((3, 4)))
    odds = np.exp(np.float64(logit))  # p / (1 - p)
    slope_of_entropy = -logit * odds / (1 + odds) ** 2
    of_logit = (1e-6 / 2 * 12 * odds - 3 * slope_of_entropy) / 50
    np.testing.assert_allclose(got[0], of_logit, rtol=1e-4, atol=1e-38)
    np.testing.assert_allclose(got[1], np.full((3, 4), 1e-6 * (1 + odds) / 50), rtol=1e-4)


ONES = jnp.ones((STEPS, BATCH, UNITS))
ERRORS = {
    "no time": (
        lambda: fdc.activation_regularization(jnp.ones(4)),
        ValueError,
        r"with time at time_axis=0, got float32\[4\]",
    ),
    "time among the features": (
        lambda: fdc.temporal_activation_regularization(ONES, time_axis=2),
        ValueError,
        "time_axis=2",
    ),
    "no time_axis": (
        lambda: fdc.temporal_activation_regularization(ONES),  # type: ignore
        TypeError,
        "time_axis",
    ),
    "integers": (
        lambda: fdc.activation_regularization(jnp.ones((3, 2), int)),
        TypeError,
        r"ys must be floating-point, got int32\[3, 2\]",
    ),
    "lengths of another batch": (
        lambda: fdc.activation_regularization(ONES, seq_lengths=jnp.ones(STEPS, int)),
        ValueError,
        r"batch's shape \(3,\), got int32\[7\]",
    ),
    "lengths of fractions": (
        lambda: fdc.activation_regularization(ONES, seq_lengths=jnp.ones(BATCH)),
        TypeError,
        "seq_lengths must be ints, got float32",
    ),
    "no examples": (
        lambda: fdc.concrete_regularization(
            jnp.zeros(()), jnp.ones((2, 2)), length_scale=1.0, num_examples=0
        ),
        ValueError,
        "num_examples must be above 0, got 0",
    ),
    "logits of other units": (
        lambda: fdc.concrete_regularization(
            jnp.zeros(3), jnp.ones((2, 2)), length_scale=1.0, num_examples=5
        ),
        ValueError,
        r"logit a scalar or \[units\], got shapes \(2, 2\) and \(3,",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_came_and_what_to_write(name: str) -> None:
    run, error, message = ERRORS[name]
    with pytest.raises(error, match=message) as raised:
        run()
    assert len(str(raised.value).splitlines()) <= 5


def test_narrow_lengths_of_long_sequences() -> None:
    """A uint8 cannot count 300 steps."""
    ys = jnp.arange(300.0)[:, None, None] * jnp.ones((300, 2, 1))
    lengths = np.array([3, 5], np.uint8)
    wanted = np.mean(np.concatenate([np.arange(3.0), np.arange(5.0)]) ** 2)
    got = fdc.activation_regularization(ys, seq_lengths=jnp.asarray(lengths))
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    with pytest.raises(ValueError, match="seq_lengths must be from 0 to 300"):
        fdc.activation_regularization(ys, seq_lengths=np.array([3, 301]))


@pytest.mark.parametrize("shape", [(6,), (6, 3, 4)])
def test_concrete_regularization_of_kernels_of_any_rank(shape: tuple[int, ...]) -> None:
    kernel, logits = jax.random.normal(jax.random.key(3), shape), jnp.linspace(-2, 2, 6)
    got = fdc.concrete_regularization(logits, kernel, length_scale=0.7, num_examples=10)
    p = 1 / (1 + np.exp(-np.float64(logits)))
    squares = (np.float64(kernel) ** 2).reshape(6, -1).sum(1)
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    np.testing.assert_allclose(
        got, (0.7**2 / 2 * (squares / (1 - p)).sum() - entropy.sum()) / 10, rtol=1e-5
    )

"""Zoneout, Gaussian noise and concrete dropout: their draws, and their effect on a value."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_dropout_cell as fdc

SHAPE = (64, 100)
MAKE: dict[str, Callable[..., Any]] = {
    "Zoneout": lambda number=0.3, **options: fdc.Zoneout(prob=number, **options),
    "GaussianNoise": lambda number=0.3, **options: fdc.GaussianNoise(stddev=number, **options),
    "ConcreteDropout": lambda number=0.3, **options: fdc.ConcreteDropout(logit=number, **options),
}
noises = pytest.mark.parametrize("name", MAKE)


def values(*shape: int, seed: int = 1, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape or SHAPE).astype(dtype)


def disturb(noise: Any, value: jax.Array, previous: Any = None, seed: int = 0) -> jax.Array:
    mask = noise.draw_mask(jax.random.key(seed), value.shape, value.dtype)
    return noise.apply(mask, value, previous)


# Shared by all -----------------------------------------------------------------------------------


@noises
def test_defaults(name: str) -> None:
    noise = MAKE[name]()
    assert noise.variational is False
    assert noise.broadcast_dims == ()
    assert isinstance(noise, fdc.Noise)


@noises
def test_one_mask_over_broadcast_dims(name: str) -> None:
    noise = MAKE[name](broadcast_dims=(0,))
    mask = noise.draw_mask(jax.random.key(0), SHAPE, jnp.float32)
    assert mask.shape == (1, SHAPE[1])
    # Bit for bit the mask of one row.
    alone = MAKE[name]().draw_mask(jax.random.key(0), (1, SHAPE[1]), jnp.float32)
    np.testing.assert_array_equal(mask, alone)
    out = noise.apply(mask, jnp.ones(SHAPE), jnp.zeros(SHAPE))
    np.testing.assert_array_equal(out, np.broadcast_to(out[:1], SHAPE))


@noises
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_stay_and_half_precision_is_computed_in_float32(name: str, dtype: Any) -> None:
    noise, value, previous = MAKE[name](), values(dtype=dtype), values(seed=2, dtype=dtype)
    mask = noise.draw_mask(jax.random.key(0), SHAPE, dtype)
    for method, arguments in (("apply", (mask,)), ("expected", ())):
        got = getattr(noise, method)(*arguments, value, previous)
        assert got.dtype == dtype
        wide = getattr(noise, method)(
            *arguments, value.astype(jnp.float32), previous.astype(jnp.float32)
        )
        np.testing.assert_array_equal(got, wide.astype(dtype))


@noises
def test_float64_and_complex(name: str, float64: None) -> None:
    for dtype in (jnp.float64, jnp.complex64, jnp.complex128):
        value = jnp.ones(SHAPE, dtype)
        got = disturb(MAKE[name](), value, jnp.zeros(SHAPE, dtype))
        assert got.dtype == dtype
        assert MAKE[name]().expected(value, jnp.zeros(SHAPE, dtype)).dtype == dtype


COMPLEX: dict[str, Any] = {  # what `apply` and `expected` give, with a number of 0.3
    "Zoneout": lambda mask, x, old: (np.where(mask, x, old), 0.3 * old + 0.7 * x),
    "GaussianNoise": lambda mask, x, old: (x + 0.3 * mask, x),
    "ConcreteDropout": lambda u, x, old: (
        x * (1 + np.exp(0.3)) / (1 + np.exp((0.3 + np.log(u / (1 - u))) / 0.1)),
        x,
    ),
}


@noises
def test_both_parts_of_a_complex_value(name: str, float64: None) -> None:
    """As of the state of an LRU."""
    noise, dtype = MAKE[name](), jnp.complex128
    value, old = (jax.random.normal(jax.random.key(seed), SHAPE, dtype) for seed in (1, 2))
    mask = noise.draw_mask(jax.random.key(0), SHAPE, dtype)
    got = noise.apply(mask, value, old), noise.expected(value, old)
    for one, wanted in zip(got, COMPLEX[name](*map(np.asarray, (mask, value, old))), strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(one, wanted, rtol=1e-6, atol=1e-9)


def test_both_parts_of_a_complex_deviate() -> None:
    mask = np.asarray(
        fdc.GaussianNoise(stddev=1.0).draw_mask(jax.random.key(0), SHAPE, "complex64")
    )
    for part in (mask.real, mask.imag):  # a variance of 1/2; the mean of its square is within
        assert abs((part**2).mean() - 0.5) < 5 * np.sqrt(0.5 / mask.size)  # 5 standard errors
    assert abs((mask.real * mask.imag).mean()) < 5 * 0.5 / np.sqrt(mask.size)


@noises
def test_a_number_is_static_and_an_array_is_data(name: str) -> None:
    number, array = MAKE[name](0.3), MAKE[name](jnp.float32(0.3))
    assert jax.tree.leaves(number) == []
    assert jax.tree.leaves(array) == [jnp.float32(0.3)]
    assert hash(number) == hash(MAKE[name](0.3)) and number == MAKE[name](0.3)
    np.testing.assert_array_equal(
        number.draw_mask(jax.random.key(0), SHAPE, jnp.float32),
        array.draw_mask(jax.random.key(0), SHAPE, jnp.float32),
    )
    value, previous = values(), values(seed=2)
    np.testing.assert_allclose(
        disturb(number, value, previous), disturb(array, value, previous), rtol=1e-6, atol=1e-6
    )
    traces = []

    @jax.jit
    def run(noise: Any) -> jax.Array:
        traces.append(1)
        return disturb(noise, value, previous)

    for probability in (0.2, 0.5, 0.7):
        run(MAKE[name](jnp.float32(probability)))
    assert len(traces) == 1
    population = jax.vmap(lambda number: disturb(MAKE[name](number), value, previous))
    assert population(jnp.array([0.1, 0.9])).shape == (2, *SHAPE)


@noises
def test_copies_and_pickles(name: str) -> None:
    for noise in (MAKE[name](variational=True, broadcast_dims=[-1]), fdc.Dropout(keep_prob=0.5)):
        assert copy.deepcopy(noise) == noise == pickle.loads(pickle.dumps(noise))


@noises
@pytest.mark.parametrize("options", [{"variational": 1}, {"broadcast_dims": 0}])
def test_options_of_a_wrong_kind(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(options))):
        MAKE[name](**options)


@pytest.mark.parametrize("given", [-0.5, 0.0, 0.3, 1.0, 1.5])
def test_arrays_outside_of_0_to_1_count_as_0_and_1_in_evaluation(given: float) -> None:
    """With the slope of the probability itself, at 0 and 1 too."""
    new, old = jnp.float32(3), jnp.float32(7)

    def kept(number: jax.Array) -> jax.Array:
        return fdc.Dropout(keep_prob=number, scale=False).expected(new)

    def zoned_out(number: jax.Array) -> jax.Array:
        return fdc.Zoneout(prob=number).expected(new, old)

    share, inside = min(max(given, 0.0), 1.0), 0 <= given <= 1
    value, slope = jax.value_and_grad(kept)(jnp.float32(given))
    np.testing.assert_allclose((value, slope), (3 * share, 3 * inside), rtol=1e-6)
    value, slope = jax.value_and_grad(zoned_out)(jnp.float32(given))
    np.testing.assert_allclose((value, slope), (3 + 4 * share, 4 * inside), rtol=1e-6)


ERRORS = {
    "Zoneout by position": (lambda: fdc.Zoneout(0.1), TypeError, r"by name: write Zoneout\(prob="),  # type: ignore
    "GaussianNoise by position": (
        lambda: fdc.GaussianNoise(0.1),  # type: ignore
        TypeError,
        r"GaussianNoise takes its numbers by name: write GaussianNoise\(stddev=0.1\), got 0.1",
    ),
    "ConcreteDropout by position": (
        lambda: fdc.ConcreteDropout(0.1),  # type: ignore
        TypeError,
        "by name",
    ),
    "no prob": (lambda: fdc.Zoneout(), TypeError, "write Zoneout.prob=0.1., got nothing"),  # type: ignore
    "prob above 1": (lambda: fdc.Zoneout(prob=1.5), ValueError, "prob must be between 0 and 1"),
    "prob NaN": (lambda: fdc.Zoneout(prob=math.nan), ValueError, "prob must be between 0 and 1"),
    "prob a string": (lambda: fdc.Zoneout(prob="0.1"), TypeError, "prob must be a number"),  # type: ignore
    "stddev below 0": (
        lambda: fdc.GaussianNoise(stddev=-1),
        ValueError,
        "stddev must be a finite number, at least 0, got -1",
    ),
    "stddev inf": (lambda: fdc.GaussianNoise(stddev=math.inf), ValueError, "stddev must be a fin"),
    "stddev True": (lambda: fdc.GaussianNoise(stddev=True), TypeError, "stddev must be a number"),
    "logit NaN": (lambda: fdc.ConcreteDropout(logit=math.nan), ValueError, "logit must be a fin"),
    "temperature 0": (
        lambda: fdc.ConcreteDropout(logit=0.0, temperature=0),
        ValueError,
        "temperature must be a finite number, above 0, got 0",
    ),
    "a logit for other units": (
        lambda: disturb(fdc.ConcreteDropout(logit=jnp.zeros(7)), values()),
        ValueError,
        r"logit has shape \(7,\), which does not broadcast to \(",
    ),
    "zoneout without a past, in training": (
        lambda: disturb(fdc.Zoneout(prob=0.5), values()),
        ValueError,
        "needs the value of the step before",
    ),
    "zoneout without a past, in evaluation": (
        lambda: fdc.Zoneout(prob=0.5).expected(values()),
        ValueError,
        "needs the value of the step before",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_came_and_what_to_write(name: str) -> None:
    run, error, message = ERRORS[name]
    with pytest.raises(error, match=message) as raised:
        run()
    assert len(str(raised.value).splitlines()) <= 5


# Zoneout -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prob", [0.05, 0.5, 0.75])
def test_zoneout_keeps_the_old_value_with_its_probability(prob: float) -> None:
    noise, value, previous = fdc.Zoneout(prob=prob), values(), values(seed=2)
    mask = np.asarray(noise.draw_mask(jax.random.key(0), SHAPE, jnp.float32))
    assert mask.dtype == bool
    sigma = math.sqrt(prob * (1 - prob) / mask.size)
    assert abs((~mask).mean() - prob) < 5 * sigma
    got = disturb(noise, value, previous)
    np.testing.assert_array_equal(got, np.where(mask, value, previous))
    wanted = prob * np.asarray(previous) + (1 - prob) * np.asarray(value)
    np.testing.assert_allclose(noise.expected(value, previous), wanted, rtol=1e-5, atol=1e-6)


def test_zoneout_masks_are_those_of_dropout_with_the_rest() -> None:
    rng = jax.random.key(3)
    np.testing.assert_array_equal(
        fdc.Zoneout(prob=0.25).draw_mask(rng, SHAPE, jnp.float32),
        fdc.Dropout(keep_prob=0.75).draw_mask(rng, SHAPE, jnp.float32),
    )


@pytest.mark.parametrize("prob", [0, 1, 0.0, 1.0])
def test_zoneout_at_its_ends(prob: float) -> None:
    value, previous = values(), values(seed=2)
    wanted = value if prob == 0 else previous
    for noise in (fdc.Zoneout(prob=prob), fdc.Zoneout(prob=jnp.float32(prob))):
        np.testing.assert_array_equal(disturb(noise, value, previous), wanted)
        np.testing.assert_array_equal(noise.expected(value, previous), wanted)
    assert fdc.Zoneout(prob=prob).is_identity == (prob == 0)


def test_what_does_not_pass_reaches_no_gradient() -> None:
    noise = fdc.Zoneout(prob=0.5)
    mask = noise.draw_mask(jax.random.key(0), SHAPE, jnp.float32)
    value = jnp.where(mask, values(), jnp.nan)
    previous = jnp.where(mask, jnp.inf, values(seed=2))
    got, gradients = jax.value_and_grad(
        lambda *args: noise.apply(mask, *args).sum(), argnums=(0, 1)
    )(value, previous)
    assert np.isfinite(got)
    np.testing.assert_array_equal(gradients[0], mask)
    np.testing.assert_array_equal(gradients[1], ~mask)


def leaky(weights: jax.Array, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    h = 0.9 * h + jnp.tanh(x + h @ weights)
    return h, h


def test_zoneout_in_a_sequence_is_the_paper_s_loop() -> None:
    """At `state`, the next step reads the zoned value, and h_0 is the first previous value."""
    steps, units = 6, 40
    weights, h0, xs = values(units, units) / 8, values(2, units), values(steps, 2, units, seed=3)
    spec, rng = fdc.RecurrentDropout(state=fdc.Zoneout(prob=0.4)), jax.random.key(5)
    got_h, got_ys = fdc.dropout_scan(weights, h0, xs, rng, cell=leaky, dropout=spec)
    evaluated, _ = fdc.dropout_scan(weights, h0, xs, None, cell=leaky, dropout=spec)
    # The masks, read off a cell that emits nothing but new values above old ones.
    _, seen = fdc.dropout_scan(
        None,
        jnp.zeros((2, units)),
        1 + jax.lax.broadcasted_iota(jnp.float32, xs.shape, 0),
        rng,
        cell=lambda _, h, x: (x, h),
        dropout=spec,
    )
    h, mean = np.asarray(h0), np.asarray(h0)
    for t in range(steps):
        new, y = leaky(weights, jnp.asarray(h), xs[t])
        np.testing.assert_allclose(got_ys[t], y, rtol=2e-5, atol=2e-5)
        passes = (
            np.asarray(seen[t + 1]) == t + 1
            if t + 1 < steps
            else np.isclose(got_h, new, rtol=2e-5, atol=2e-5)
        )
        assert 0.3 < passes.mean() < 0.9
        h = np.where(passes, new, h)
        mean = 0.4 * mean + 0.6 * np.asarray(leaky(weights, jnp.asarray(mean), xs[t])[0])
    np.testing.assert_allclose(got_h, h, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(evaluated, mean, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("site", ["input", "output", "params"])
@pytest.mark.parametrize("training", [True, False])
def test_zoneout_where_there_is_no_past_is_an_error_that_names_the_sites(
    site: str, training: bool
) -> None:
    spec = fdc.RecurrentDropout(**{site: fdc.Zoneout(prob=0.4)})  # type: ignore
    rng = jax.random.key(0) if training else None
    with pytest.raises(ValueError, match=f"dropout.{site}: Zoneout needs the value(.|\n)*state"):
        fdc.dropout_scan(values(4, 4), values(2, 4), values(3, 2, 4), rng, cell=leaky, dropout=spec)


# Gaussian noise ----------------------------------------------------------------------------------


def test_gaussian_noise_adds_a_normal_deviate() -> None:
    noise, value = fdc.GaussianNoise(stddev=0.3), values(100, 1000)
    added = (np.asarray(disturb(noise, value)) - np.asarray(value)) / 0.3
    size = added.size
    assert abs(added.mean()) < 5 / math.sqrt(size)
    assert abs((added**2).mean() - 1) < 5 * math.sqrt(2 / size)
    assert abs((added**4).mean() - 3) < 5 * math.sqrt(96 / size)
    mask = noise.draw_mask(jax.random.key(0), value.shape, jnp.float32)
    np.testing.assert_array_equal(mask, jax.random.normal(jax.random.key(0), value.shape))
    np.testing.assert_array_equal(noise.expected(value), value)


def test_stddev_0_is_the_identity_and_stddev_can_be_learned() -> None:
    assert fdc.GaussianNoise(stddev=0).is_identity
    value = values()
    mask = fdc.GaussianNoise(stddev=1).draw_mask(jax.random.key(0), SHAPE, jnp.float32)
    slope = jax.grad(lambda stddev: fdc.GaussianNoise(stddev=stddev).apply(mask, value).sum())(
        jnp.float32(0.5)
    )
    np.testing.assert_allclose(slope, mask.sum(), rtol=1e-4)


def test_weight_noise_is_one_draw_per_sequence() -> None:
    """Graves: each step of a sequence reads the same disturbed weights."""
    weights = values(3, 4)
    spec = fdc.RecurrentDropout(params=fdc.GaussianNoise(stddev=0.075, variational=True))

    def emit(weights: jax.Array, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return h, weights + 0 * x

    _, seen = fdc.dropout_scan(
        weights, jnp.zeros(1), jnp.zeros((5, 1, 1)), jax.random.key(0), cell=emit, dropout=spec
    )
    np.testing.assert_array_equal(seen, np.broadcast_to(seen[:1], seen.shape))
    assert (np.asarray(seen[0]) != np.asarray(weights)).all()


# Concrete dropout --------------------------------------------------------------------------------


@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.0])
def test_concrete_dropout_is_equation_5(logit: float) -> None:
    noise, value = fdc.ConcreteDropout(logit=logit, temperature=0.2), values(64, 1000)
    u = np.asarray(noise.draw_mask(jax.random.key(0), value.shape, jnp.float32), np.float64)
    assert 0 < u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / u.size)
    p = 1 / (1 + math.exp(-logit))
    z = 1 / (1 + np.exp(-(math.log(p) - math.log(1 - p) + np.log(u) - np.log1p(-u)) / 0.2))
    got = disturb(noise, value)
    np.testing.assert_allclose(got, value * (1 - z) / (1 - p), rtol=1e-3, atol=1e-5)
    # A unit counts as dropped with probability p, whatever the temperature.
    assert abs((z > 0.5).mean() - p) < 5 * math.sqrt(p * (1 - p) / u.size)
    np.testing.assert_array_equal(noise.expected(value), value)


@pytest.mark.parametrize("logit", [-90.0, -20.0, 20.0, 90.0, 300.0])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_values_and_gradients_stay_finite_far_out(logit: float, dtype: Any) -> None:
    value = values(dtype=dtype)

    def total(logit: jax.Array, value: jax.Array) -> jax.Array:
        out = disturb(fdc.ConcreteDropout(logit=logit), value)
        return out.astype(jnp.float32).sum()

    got, gradients = jax.value_and_grad(total, argnums=(0, 1))(jnp.float32(logit), value)
    assert np.isfinite(got)
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in gradients)


def test_nan_in_a_unit_that_is_wholly_dropped_does_not_come_through() -> None:
    noise = fdc.ConcreteDropout(logit=jnp.float32(0), temperature=0.02)
    mask = noise.draw_mask(jax.random.key(0), SHAPE, jnp.float32)
    dropped = np.asarray(noise.apply(mask, jnp.ones(SHAPE))) == 0
    assert 0.1 < dropped.mean() < 0.6
    value = jnp.where(dropped, jnp.nan, values())

    def total(logit: jax.Array, value: jax.Array) -> jax.Array:
        return fdc.ConcreteDropout(logit=logit, temperature=0.02).apply(mask, value).sum()

    got, gradients = jax.value_and_grad(total, argnums=(0, 1))(jnp.float32(0), value)
    assert np.isfinite(got)
    assert all(np.isfinite(leaf).all() for leaf in gradients)


def test_the_gradient_of_the_logit_is_that_of_finite_differences() -> None:
    value = values()
    mask = fdc.ConcreteDropout(logit=0.0).draw_mask(jax.random.key(0), SHAPE, jnp.float32)

    def loss(logit: jax.Array) -> jax.Array:
        return (fdc.ConcreteDropout(logit=logit, temperature=0.5).apply(mask, value) ** 2).mean()

    slope = jax.grad(loss)(jnp.float32(-0.5))
    wanted = (loss(jnp.float32(-0.49)) - loss(jnp.float32(-0.51))) / 0.02
    np.testing.assert_allclose(slope, wanted, rtol=1e-2)


def train_probability(regularized: bool, steps: int = 1000) -> float:
    """A little recurrent regression, whose dropout probability starts at 1/2; where does it go?"""
    examples, units, time = 64, 16, 5
    xs = values(time, examples, units)
    target = jnp.tanh(xs.sum(axis=(0, 2)) / 4)
    params = {
        "logit": jnp.float32(0.0),
        "recurrent": values(units, units, seed=3) / 8,
        "readout": values(units, seed=4) / 4,
    }

    def cell(kernel: jax.Array, h: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(x + h @ kernel), None

    def loss(params: dict[str, jax.Array], rng: jax.Array) -> jax.Array:
        noise = fdc.ConcreteDropout(logit=params["logit"], variational=True)
        spec = fdc.RecurrentDropout(state=noise)
        h0 = jnp.zeros((examples, units))
        h, _ = fdc.dropout_scan(params["recurrent"], h0, xs, rng, cell=cell, dropout=spec)
        likelihood = ((h @ params["readout"] - target) ** 2).mean() / 2
        if not regularized:
            return likelihood
        return likelihood + fdc.concrete_regularization(
            params["logit"], params["recurrent"], length_scale=0.1, num_examples=examples
        )

    def step(state: Any, rng: jax.Array) -> tuple[Any, None]:
        params, moments = state
        gradients = jax.grad(loss)(params, rng)
        moments = jax.tree.map(lambda m, g: 0.99 * m + 0.01 * g**2, moments, gradients)
        params = jax.tree.map(
            lambda p, g, m: p - 0.03 * g / (jnp.sqrt(m) + 1e-6), params, gradients, moments
        )
        return (params, moments), None

    moments = jax.tree.map(jnp.ones_like, params)
    keys = jax.random.split(jax.random.key(9), steps)
    (params, _), _ = jax.jit(lambda state: jax.lax.scan(step, state, keys))((params, moments))
    return float(jax.nn.sigmoid(params["logit"]))


def test_the_likelihood_alone_pulls_the_probability_to_0_and_the_regularization_holds_it() -> None:
    alone, regularized = train_probability(False), train_probability(True)
    assert alone < 0.03, alone
    assert 0.1 < regularized < 0.4, regularized

"""The effect of a mask on a value, and how often a unit is kept."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_dropout_cell as fdc

KEEP_PROBS = [0.5, 0.75, 0.9, 0.7, 0.1, 0.013, 1 / 3, 251 / 256]
DTYPES = ["float32", "bfloat16", "float16"]


def emit(params, carry, x):
    """A cell that shows its input."""
    del params
    return carry, x


def drop_input(noise: fdc.Noise, x: jax.Array, rng: jax.Array | None, mask=None) -> jax.Array:
    masks = None if mask is None else fdc.Masks(input=mask)
    spec = fdc.RecurrentDropout(input=noise)
    _, y = fdc.dropout_cell(None, None, x, rng, cell=emit, dropout=spec, masks=masks)
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep_prob", KEEP_PROBS)
def test_kept_units_are_divided_by_keep_prob_and_others_are_zero(keep_prob, dtype) -> None:
    x = jax.random.normal(jax.random.key(1), (64, 33)).astype(dtype)
    noise = fdc.Dropout(keep_prob=keep_prob)
    mask = jax.random.bernoulli(jax.random.key(2), 0.5, x.shape)
    y = drop_input(noise, x, None, mask)
    quotient = (x.astype("float32") / keep_prob).astype(dtype)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, jnp.where(mask, quotient, jnp.zeros((), dtype)))


@pytest.mark.usefixtures("float64")
def test_float64_values_keep_their_precision() -> None:
    mask = jnp.array([True, False, True])
    y = drop_input(fdc.Dropout(keep_prob=0.7), jnp.array([1.0, 2.0, 3.0], "float64"), None, mask)
    assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, [1 / 0.7, 0.0, 3 / 0.7], rtol=1e-15)


def test_complex_values_stay_complex() -> None:
    mask = jnp.array([True, False, True])
    y = drop_input(fdc.Dropout(keep_prob=0.5), jnp.array([1 + 2j, 3j, 1], "complex64"), None, mask)
    assert y.dtype == jnp.complex64
    np.testing.assert_array_equal(y, np.array([2 + 4j, 0, 2], "complex64"))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("keep_prob", KEEP_PROBS)
def test_keep_rate(keep_prob, impl) -> None:
    """The share of kept units is within 5 sigma of keep_prob, for odd and even row lengths."""
    for seed, shape in enumerate(
        [(300_000,), (40, 5, 1501), (9001, 33), (20_000, 1), (3, 64, 1024)]
    ):
        mask = fdc.Dropout(keep_prob=keep_prob).draw_mask(
            jax.random.key(seed, impl=impl), shape, "float32"
        )
        assert mask.shape == shape
        assert mask.dtype == bool
        sigma = math.sqrt(keep_prob * (1 - keep_prob) / mask.size)
        assert abs(float(mask.mean()) - keep_prob) < 5 * sigma, shape


@pytest.mark.parametrize("keep_prob", [0.5, 0.75, 13 / 16, 251 / 256, 0.7])
def test_units_and_rows_are_independent(keep_prob) -> None:
    """Pairs of units in a row, near and far, and neighbouring rows: correlation within 5 sigma."""
    rows, units = 40_000, 80
    mask = fdc.Dropout(keep_prob=keep_prob).draw_mask(jax.random.key(5), (rows, units), "float32")
    centred = (np.asarray(mask) - keep_prob) / math.sqrt(keep_prob * (1 - keep_prob))
    within = centred.T @ centred / rows
    off_diagonal = within[~np.eye(units, dtype=bool)]
    assert np.abs(off_diagonal).max() < 5.5 / math.sqrt(rows)  # 3,160 pairs: 5.5 sigma for all
    across = (centred[1:] * centred[:-1]).mean(axis=0)
    assert np.abs(across).max() < 5 / math.sqrt(rows)


def test_units_that_later_digits_settle_are_independent_too() -> None:
    """keep_prob 1/512: a unit is kept only where its own byte ties, so the other bytes decide.

    Pairs of such units would move together if a word shared one tie-breaker: both would be kept
    with probability 2**-17 instead of 2**-18.
    """
    rows, units = 600_000, 64
    keep_prob = 1 / 512
    mask = fdc.Dropout(keep_prob=keep_prob).draw_mask(jax.random.key(6), (rows, units), "float32")
    kept = np.asarray(mask).reshape(rows, -1, 4).sum(axis=-1).astype(np.int64)
    pairs, expected = (kept * (kept - 1)).sum() / 2, kept.size * math.comb(4, 2) * keep_prob**2
    assert abs(pairs - expected) < 5 * math.sqrt(expected)
    shared = kept.size * math.comb(4, 2) * 2**-17
    assert abs(shared - expected) > 10 * math.sqrt(expected), "the bound above must tell them apart"


@pytest.mark.parametrize("keep_prob", [0.7, 0.9, 1 / 3, 0.013])
def test_traced_keep_prob_draws_the_mask_that_the_number_draws(keep_prob) -> None:
    def draw(keep_prob):
        return fdc.Dropout(keep_prob=keep_prob).draw_mask(jax.random.key(0), (64, 100), "float32")

    np.testing.assert_array_equal(draw(keep_prob), jax.jit(draw)(keep_prob))


@pytest.mark.parametrize("dtype", DTYPES)
def test_traced_keep_prob_zero_and_one(dtype) -> None:
    x = jnp.full((50, 40), 3.0, dtype)

    @jax.jit
    def drop(keep_prob):
        return drop_input(fdc.Dropout(keep_prob=keep_prob), x, jax.random.key(0))

    np.testing.assert_array_equal(drop(1.0), x)
    np.testing.assert_array_equal(drop(0.0), jnp.zeros_like(x))


@pytest.mark.parametrize(("beyond", "bound"), [(1.5, 1.0), (float("inf"), 1.0), (-0.2, 0.0)])
def test_traced_keep_prob_beyond_its_bounds_counts_as_the_bound(beyond, bound) -> None:
    """A schedule that overshoots neither drops nor scales more than the bound does."""
    x = jnp.full((50, 40), 3.0)

    @jax.jit
    def drop(keep_prob):
        return drop_input(fdc.Dropout(keep_prob=keep_prob), x, jax.random.key(0))

    np.testing.assert_array_equal(drop(beyond), drop(bound))


def test_keep_prob_one_is_exactly_the_identity_and_adds_nothing() -> None:
    x = jnp.array([1.0, jnp.nan, -jnp.inf, -0.0])
    noise = fdc.Dropout(keep_prob=1)
    y = drop_input(noise, x, jax.random.key(0))
    assert y is x

    def run(noise):
        spec = fdc.RecurrentDropout(input=noise, state=noise, output=noise, params=noise)
        w, xs = jnp.ones(3), jnp.ones((5, 3))
        return jax.make_jaxpr(
            lambda w, xs, rng: fdc.dropout_scan(
                w, xs[0], xs, rng, cell=lambda w, c, x: (c + w, x), dropout=spec
            )
        )(w, xs, jax.random.key(0))

    assert str(run(fdc.Dropout(keep_prob=1.0))) == str(run(None))
    assert str(run(fdc.Dropout(keep_prob=1.0, variational=True))) == str(run(None))


@pytest.mark.parametrize("keep_prob", [0, 0.0, np.float32(0)])
def test_keep_prob_zero_gives_zeros(keep_prob) -> None:
    x = jnp.array([1.0, jnp.nan, jnp.inf])

    def drop(x):
        return drop_input(fdc.Dropout(keep_prob=keep_prob), x, jax.random.key(0))

    np.testing.assert_array_equal(drop(x), np.zeros(3))
    np.testing.assert_array_equal(jax.grad(lambda x: drop(x).sum())(x), np.zeros(3))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_dropped_unit_holds_goes_nowhere(bad, dtype) -> None:
    """Not forward, and not backward into the value, the weights before it or keep_prob."""
    mask = jnp.array([True, False, True])
    x = jnp.array([1.0, bad, 3.0], dtype)

    def loss(x, keep_prob):
        return drop_input(fdc.Dropout(keep_prob=keep_prob), x, None, mask).sum()

    half = jnp.asarray(0.5)
    assert loss(x, half) == 8
    by_x, by_keep_prob = jax.grad(loss, argnums=(0, 1))(x, half)
    np.testing.assert_array_equal(by_x, jnp.array([2.0, 0.0, 2.0], dtype))
    np.testing.assert_allclose(by_keep_prob, -16.0)
    number = jax.grad(lambda x: loss(x, 0.5))(x)
    np.testing.assert_array_equal(number, jnp.array([2.0, 0.0, 2.0], dtype))


@pytest.mark.parametrize("dims", [(0,), (1,), (-1,), (0, 2), [1]])
def test_broadcast_dims_share_one_mask(dims) -> None:
    x = jnp.ones((6, 50, 40))
    y = drop_input(fdc.Dropout(keep_prob=0.5, broadcast_dims=dims), x, jax.random.key(0))
    y = np.asarray(y)
    for dim in range(3):
        shared = (y == y.take([0], axis=dim)).all()
        assert shared == (dim in [d % 3 for d in dims])


def test_a_population_of_keep_probs() -> None:
    keep_probs = jnp.array([0.0, 0.3, 0.7, 1.0])
    x = jnp.ones((100, 100))

    def drop(spec, rng):
        return fdc.dropout_cell(None, None, x, rng, cell=emit, dropout=spec)[1]

    specs = fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=keep_probs))
    ys = jax.vmap(drop)(specs, jax.random.split(jax.random.key(0), 4))
    for y, keep_prob in zip(ys, keep_probs, strict=True):
        sigma = math.sqrt(keep_prob * (1 - keep_prob) / x.size)
        assert abs(float((y > 0).mean()) - keep_prob) <= 5 * sigma
        np.testing.assert_allclose(y.max(), 0.0 if keep_prob == 0 else 1 / keep_prob, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (2, 1, 1)])
def test_small_and_empty_shapes(shape) -> None:
    for keep_prob in (0.5, 0.7):
        mask = fdc.Dropout(keep_prob=keep_prob).draw_mask(jax.random.key(0), shape, "float32")
        assert mask.shape == shape


def test_a_noise_of_ones_own_at_every_site() -> None:
    """A noise that only has the protocol's four members, and that uses `previous`."""

    class HalfOfThePrevious:
        variational = False

        def draw_mask(self, rng, shape, dtype):
            return jax.random.bernoulli(rng, 0.5, shape).astype(dtype)

        def apply(self, mask, value, previous):
            return value * 10 + (0 if previous is None else previous / 2)

        def expected(self, value, previous):
            return value * 100 + (0 if previous is None else previous / 4)

    noise = HalfOfThePrevious()
    spec = fdc.RecurrentDropout(input=noise, state=noise, output=noise, params=noise)

    def cell(w, carry, x):
        return carry + w + x, x

    args = (jnp.ones(2), jnp.full(2, 8.0), jnp.full(2, 2.0))
    carry, y = fdc.dropout_cell(*args, jax.random.key(0), cell=cell, dropout=spec)
    np.testing.assert_array_equal(carry, np.full(2, (8 + 10 + 20) * 10 + 8 / 2))
    np.testing.assert_array_equal(y, np.full(2, 200))
    carry, y = fdc.dropout_cell(*args, None, cell=cell, dropout=spec)
    np.testing.assert_array_equal(carry, np.full(2, (8 + 100 + 200) * 100 + 8 / 4))
    np.testing.assert_array_equal(y, np.full(2, 20_000))


def test_order_within_a_step() -> None:
    """Params and input first, the incoming carry untouched, then the outgoing carry, then y."""
    masks = fdc.Masks(*(jnp.array(mask) for mask in itertools.repeat([True, False], 4)))
    noise = fdc.Dropout(keep_prob=0.5, variational=True)
    spec = fdc.RecurrentDropout(params=noise, input=noise, state=noise, output=noise)

    def cell(w, carry, x):
        h = carry + w + 10 * x
        return h, h

    carry, y = fdc.dropout_cell(
        jnp.ones(2),
        jnp.full(2, 100.0),
        jnp.full(2, 3.0),
        None,
        cell=cell,
        dropout=spec,
        masks=masks,
    )
    # Unit 0: (100 + 2 * 1 + 10 * 2 * 3) * 2; y is h before the state's noise.
    np.testing.assert_array_equal(carry, [324.0, 0.0])
    np.testing.assert_array_equal(y, [324.0, 0.0])
    state_only = fdc.RecurrentDropout(state=noise)
    carry, y = fdc.dropout_cell(
        jnp.ones(2),
        jnp.full(2, 100.0),
        jnp.full(2, 3.0),
        None,
        cell=cell,
        dropout=state_only,
        masks=fdc.Masks(state=jnp.array([True, False])),
    )
    np.testing.assert_array_equal(carry, [262.0, 0.0])
    np.testing.assert_array_equal(y, [131.0, 131.0])


DEVIATES = jnp.full((2, 3), -0.3)
OF_ANOTHER_NOISE = {  # a mask, and the dtype and kind that its error names
    "deviates for Dropout": (fdc.Dropout(keep_prob=0.5), DEVIATES, "float32", "boolean"),
    "integers for Dropout": (fdc.Dropout(keep_prob=0.5), jnp.ones((2, 3), int), "int32", "boolean"),
    "deviates for Zoneout": (fdc.Zoneout(prob=0.5), DEVIATES, "float32", "boolean"),
    "keep-mask for noise": (fdc.GaussianNoise(stddev=1.0), DEVIATES < 0, "bool", "floating"),
    "keep-mask for concrete": (fdc.ConcreteDropout(logit=0.0), DEVIATES < 0, "bool", "floating"),
}


@pytest.mark.parametrize("case", OF_ANOTHER_NOISE.values(), ids=OF_ANOTHER_NOISE)
@pytest.mark.parametrize("variational", [True, False], ids=["variational", "step"])
def test_masks_of_another_noise_are_refused(case, variational) -> None:
    """Cast to booleans, all deviates would be True: no dropout, and nothing to see it by."""
    noise, mask, dtype, kind = case
    noise = dataclasses.replace(noise, variational=variational)
    spec = fdc.RecurrentDropout(inside={"site": noise})

    def cell(params, carry, x, disturb=fdc.undisturbed):
        del params
        return disturb("site", x, carry), x

    x, masks = jnp.ones((2, 3)), fdc.Masks(inside={"site": mask})
    message = rf"\['site'\] is {dtype}\[2, 3\], but a mask of {type(noise).__name__} is {kind}"
    for rng in (None, jax.random.key(0)):
        with pytest.raises(TypeError, match=message):
            fdc.dropout_cell(None, x, x, rng, cell=cell, dropout=spec, masks=masks)
        with pytest.raises(TypeError, match=message):
            fdc.dropout_scan(None, x, x[None], rng, cell=cell, dropout=spec, masks=masks)


@dataclasses.dataclass(frozen=True)
class _Multiplied:
    """A noise of a user's own, whose masks are as the user likes them."""

    variational: bool = False

    def draw_mask(self, rng, shape, dtype):
        return jax.random.randint(rng, shape, 0, 3)

    def apply(self, mask, value, previous):
        return mask.astype(value.dtype) * value

    def expected(self, value, previous):
        return value


def test_a_noise_without_a_mask_kind_takes_any_mask() -> None:
    for mask in (jnp.array([2, 0]), jnp.array([2.0, 0.0]), jnp.array([True, False])):
        y = drop_input(_Multiplied(), jnp.ones(2), None, mask)
        np.testing.assert_array_equal(y, np.asarray(mask, float))

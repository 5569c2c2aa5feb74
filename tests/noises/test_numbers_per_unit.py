"""Numbers of a noise that are arrays with one for each unit: masks, values, gradients, hosts."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asserts import assert_close
from flax import nnx
from hand_masks import site_key

import flax_dropout_cell as fdc

KEY = jax.random.key(5)
UNITS = 37  # not a multiple of the four units that a word of random bits serves
VALUE = jnp.asarray(np.random.default_rng(0).normal(size=(64, UNITS)), jnp.float32)
OLD = jnp.asarray(np.random.default_rng(1).normal(size=(64, UNITS)), jnp.float32)
PROBS = jnp.linspace(0.02, 0.98, UNITS)
MAKE: dict[str, Any] = {
    "Dropout": lambda number, **more: fdc.Dropout(keep_prob=number, **more),
    "unscaled Dropout": lambda number, **more: fdc.Dropout(keep_prob=number, scale=False, **more),
    "Zoneout": lambda number, **more: fdc.Zoneout(prob=number, **more),
    "GaussianNoise": lambda number, **more: fdc.GaussianNoise(stddev=number, **more),
    "ConcreteDropout": lambda number, **more: fdc.ConcreteDropout(logit=number, **more),
}
noises = pytest.mark.parametrize("name", MAKE)


def disturb(noise: Any, value: jax.Array = VALUE, key: jax.Array = KEY) -> jax.Array:
    return noise.apply(noise.draw_mask(key, value.shape, value.dtype), value, OLD)


@noises
@pytest.mark.parametrize("shape", [(UNITS,), (1, UNITS), (64, 1), (64, UNITS)], ids=str)
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_equal_numbers_give_what_the_scalar_gives(name: str, shape: Any, impl: str) -> None:
    """The same masks bit for bit, and the same values to rounding."""
    key = jax.random.key(5, impl=impl)
    one = MAKE[name](jnp.float32(0.37))
    each = MAKE[name](jnp.full(shape, 0.37))
    masks = [noise.draw_mask(key, VALUE.shape, VALUE.dtype) for noise in (one, each)]
    np.testing.assert_array_equal(*masks)
    assert_close(disturb(one, key=key), disturb(each, key=key))
    assert_close(one.expected(VALUE, OLD), each.expected(VALUE, OLD))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_each_unit_has_its_own_probability(impl: str) -> None:
    rows = 20_000
    mask = fdc.Dropout(keep_prob=PROBS).draw_mask(
        jax.random.key(1, impl=impl), (rows, UNITS), jnp.float32
    )
    sigma = np.sqrt(PROBS * (1 - PROBS) / rows)
    assert (np.abs(np.asarray(mask).mean(0) - PROBS) < 5 * sigma).all()
    zoned = fdc.Zoneout(prob=PROBS).draw_mask(KEY, (rows, UNITS), jnp.float32)
    assert (np.abs((~np.asarray(zoned)).mean(0) - PROBS) < 5 * sigma).all()


def test_a_unit_keeps_its_mask_when_other_units_change() -> None:
    """A unit's mask depends on its own number."""
    mask = fdc.Dropout(keep_prob=PROBS).draw_mask(KEY, VALUE.shape, VALUE.dtype)
    for unit in (0, 1, 18, UNITS - 1):
        alone = fdc.Dropout(keep_prob=PROBS[unit]).draw_mask(KEY, VALUE.shape, VALUE.dtype)
        np.testing.assert_array_equal(mask[:, unit], alone[:, unit])


def test_values_are_those_of_the_formulas() -> None:
    """In NumPy, with the masks as they were drawn."""
    value, old, p = (np.asarray(leaf, np.float64) for leaf in (VALUE, OLD, PROBS))
    shape, dtype = VALUE.shape, VALUE.dtype

    def both(noise: Any) -> tuple[Any, Any, Any]:
        mask = noise.draw_mask(KEY, shape, dtype)
        return np.asarray(mask), noise.apply(mask, VALUE, OLD), noise.expected(VALUE, OLD)

    mask, got, _ = both(fdc.Dropout(keep_prob=PROBS))
    np.testing.assert_allclose(got, value * mask / p, rtol=1e-5)
    mask, got, mean = both(fdc.Dropout(keep_prob=PROBS, scale=False))
    np.testing.assert_array_equal(got, np.asarray(VALUE) * mask)
    np.testing.assert_allclose(mean, value * p, rtol=1e-5)
    mask, got, mean = both(fdc.Zoneout(prob=PROBS))
    np.testing.assert_array_equal(got, np.where(mask, VALUE, OLD))
    np.testing.assert_allclose(mean, p * old + (1 - p) * value, rtol=1e-4, atol=1e-6)
    mask, got, mean = both(fdc.GaussianNoise(stddev=PROBS))
    np.testing.assert_allclose(got, value + p * mask, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(mean, VALUE)
    logit = np.log(p / (1 - p))
    mask, got, _ = both(fdc.ConcreteDropout(logit=jnp.asarray(logit, jnp.float32)))
    wanted = concrete(np.asarray(mask, np.float64), value, None, logit)
    np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=1e-5)


@noises
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64], ids=str)
def test_dtypes_stay(name: str, dtype: Any) -> None:
    value, noise = VALUE.astype(dtype), MAKE[name](PROBS)
    mask = noise.draw_mask(KEY, value.shape, value.dtype)
    for got in (noise.apply(mask, value, value), noise.expected(value, value)):
        assert (got.shape, got.dtype) == (value.shape, value.dtype)


def test_ends_are_exact() -> None:
    """0, 1, and what lies beyond them, beside each other."""
    keeps = jnp.array([0.0, 1.0, -0.5, 1.5] * 9 + [0.5])
    got = disturb(fdc.Dropout(keep_prob=keeps))
    ends = np.asarray(keeps[:-1])
    np.testing.assert_array_equal(got[:, :-1], np.where(ends > 0, VALUE[:, :-1], 0))


LEARNED = ("GaussianNoise", "ConcreteDropout")


@pytest.mark.parametrize("name", LEARNED)
def test_numbers_are_learned_each_for_itself(name: str) -> None:
    """The gradient of a unit's loss reaches the unit's own number alone, as vmap has it."""

    def loss(numbers: jax.Array, unit: int) -> jax.Array:
        return (disturb(MAKE[name](numbers))[:, unit] ** 2).mean()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)(PROBS, 3)
    assert gradient[3] != 0
    np.testing.assert_array_equal(gradient.at[3].set(0), 0)
    step = 1e-2
    slope = (loss(PROBS.at[3].add(step), 3) - loss(PROBS.at[3].add(-step), 3)) / (2 * step)
    np.testing.assert_allclose(gradient[3], slope, rtol=2e-2)


def test_a_schedule_of_arrays_does_not_retrace_and_a_population_maps() -> None:
    traces = []

    @jax.jit
    def run(keep: jax.Array) -> jax.Array:
        traces.append(keep)
        return disturb(fdc.Dropout(keep_prob=keep))

    run(PROBS)
    run(1 - PROBS)
    assert len(traces) == 1
    population = jnp.stack([PROBS, 1 - PROBS])
    mapped = jax.vmap(lambda keep: disturb(fdc.Dropout(keep_prob=keep)))(population)
    np.testing.assert_array_equal(mapped, jnp.stack([run(keep) for keep in population]))


def cell(params: Any, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    h = jnp.tanh(x + h * params)
    return h, h


def concrete(u: np.ndarray, new: np.ndarray, old: Any, logit: np.ndarray) -> np.ndarray:
    drop = 1 / (1 + np.exp(-(logit + np.log(u) - np.log1p(-u)) / 0.1))
    return new * (1 - drop) * (1 + np.exp(logit))


FORMULAS: dict[str, Any] = {
    "Dropout": lambda mask, new, old, keep: np.where(mask, new / keep, 0),
    "unscaled Dropout": lambda mask, new, old, keep: np.where(mask, new, 0),
    "Zoneout": lambda mask, new, old, prob: np.where(mask, new, old),
    "GaussianNoise": lambda mask, new, old, stddev: new + stddev * mask,
    "ConcreteDropout": concrete,
}


@pytest.mark.parametrize(
    ("name", "variational"),
    [(name, False) for name in MAKE] + [(name, True) for name in MAKE if name != "Zoneout"],
)
def test_in_a_sequence_with_ids_and_resets(name: str, variational: bool) -> None:
    """A loop in NumPy, whose rows draw by their ids from keys by hand."""
    steps, rows, units = 6, 3, 8
    xs = np.random.default_rng(2).normal(size=(steps, rows, units)).astype(np.float32)
    resets = np.zeros((steps, rows), bool)
    resets[3, 1] = True
    ids, numbers = np.array([7, 2, 2**20]), jnp.linspace(0.1, 0.9, units)
    noise = MAKE[name](numbers, **({"variational": True} if variational else {}))
    last, ys = fdc.dropout_scan(
        jnp.ones(()), jnp.zeros((rows, units)), xs, KEY, cell=cell,
        dropout=fdc.RecurrentDropout(state=noise),
        resets=resets, sequence_ids=np.broadcast_to(ids, (steps, rows)),
    )  # fmt: skip

    def mask_of(row: int, step: int) -> np.ndarray:
        key = site_key(KEY, "state", None if variational else step)
        for word in (ids[row], 0):
            key = jax.random.fold_in(key, np.uint32(word))
        return np.asarray(noise.draw_mask(key, (units,), jnp.float32))

    h, number = np.zeros((rows, units)), np.asarray(numbers, np.float64)
    close: Any = {"rtol": 2e-3 if name == "ConcreteDropout" else 1e-5, "atol": 1e-5}
    for step in range(steps):
        h = np.where(resets[step][:, None], 0, h)
        new = np.tanh(xs[step] + h)
        np.testing.assert_allclose(ys[step], new, **close)
        masks = np.stack([mask_of(row, step) for row in range(rows)])
        h = FORMULAS[name](masks, new, h, number)
    np.testing.assert_allclose(last, h, **close)


@noises
def test_equal_numbers_of_rows_with_ids_draw_as_a_scalar(name: str) -> None:
    xs, ids = jnp.zeros((6, 3, 8)), jnp.array([7, 2, 2**20])

    def run(number: jax.Array) -> Any:
        spec = fdc.RecurrentDropout(state=MAKE[name](number))
        return fdc.dropout_scan(
            jnp.ones(()), jnp.ones((3, 8)), xs, KEY, cell=cell, dropout=spec, sequence_ids=ids
        )

    jax.tree.map(
        np.testing.assert_array_equal, run(jnp.full(8, 0.3)), run(jnp.asarray(0.3, jnp.float32))
    )


@pytest.mark.parametrize("host", ["layer", "wrapper", "NNX layer", "NNX wrapper"])
def test_flax_hosts(host: str) -> None:
    """The gradient of a stddev for each unit of the input, by a sum with deviates by hand."""
    x, h = jnp.ones((2, 5, 3)), jnp.zeros((2, 4))
    variables = nn.RNN(nn.GRUCell(4)).init(KEY, x)

    def gru() -> Any:
        return nnx.GRUCell(3, 4, rngs=nnx.Rngs(0))

    def run(stddev: jax.Array) -> Any:
        spec = fdc.RecurrentDropout(input=fdc.GaussianNoise(stddev=stddev))
        if host == "layer":
            return fdc.linen.RNN(nn.GRUCell(4), spec).apply(variables, x, rng=KEY)
        if host == "wrapper":
            cell = fdc.linen.DropoutCell(nn.GRUCell(4), spec)
            carry = cell.redraw_masks(h, x[:, 0], rng=KEY)
            return nn.RNN(cell).apply(variables, x, initial_carry=carry)
        if host == "NNX layer":
            layer: Any = fdc.nnx.RNN(gru(), spec)
            return layer(x, rngs=KEY)
        wrapper: Any = fdc.nnx.DropoutCell(gru(), spec)
        rnn: Any = nnx.RNN(wrapper)
        return rnn(x, initial_carry=wrapper.redraw_masks(h, x[:, 0], rngs=KEY))

    deviates = [jax.random.normal(site_key(KEY, "input", t), (2, 3)) for t in range(5)]

    def by_hand(stddev: jax.Array) -> Any:
        noisy = x + stddev[None, None] * jnp.stack(deviates, 1)
        if "NNX" in host:
            rnn: Any = nnx.RNN(gru())
            return rnn(noisy)
        return nn.RNN(nn.GRUCell(4)).apply(variables, noisy)

    got, wanted = (
        jax.jit(jax.grad(lambda stddev, ys=ys: (ys(stddev) ** 2).sum()))(jnp.array([0.5, 1, 1.5]))
        for ys in (run, by_hand)
    )
    assert_close(got, wanted)
    assert (wanted != 0).all()


def test_describe_shows_the_shape() -> None:
    spec = fdc.RecurrentDropout(output=fdc.GaussianNoise(stddev=jnp.ones(8)))
    x = jnp.ones((2, 8))
    table = fdc.describe(jnp.ones(()), jnp.zeros((2, 8)), x, cell=cell, dropout=spec)
    assert "GaussianNoise(stddev=float32[8])" in str(table)


def test_specs_with_arrays_of_other_shapes_differ() -> None:
    one, each = (
        fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=number))
        for number in (jnp.float32(0.5), jnp.full(8, 0.5))
    )
    assert one != each
    assert each == fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=jnp.full(8, 0.5)))


MISTAKES = {
    "of another size": (lambda: fdc.Dropout(keep_prob=jnp.ones(3)), r"\(3,\), .* \(64, 37\)"),
    "a mask that the units share": (
        lambda: fdc.Dropout(keep_prob=PROBS, broadcast_dims=(-1,)), r"\(37,\), .* \(64, 1\)"
    ),
    "more dims than the value": (
        lambda: fdc.Zoneout(prob=jnp.ones((2, 64, UNITS))), r"\(2, 64, 37\), .* \(64, 37\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_array_that_does_not_fit(mistake: str) -> None:
    make, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=f"has shape {message}; give one number") as caught:
        disturb(make())
    assert len(str(caught.value).splitlines()) <= 5


def test_concrete_regularization_of_several_logits() -> None:
    """The sum over units of the paper's term for one unit, and the scalar's at equal logits."""
    kernel = VALUE[:8, :5]
    logits = jnp.linspace(-2, 2, 8)
    options: Any = {"length_scale": 0.7, "num_examples": 10}
    got = fdc.concrete_regularization(logits, kernel, **options)
    p = 1 / (1 + np.exp(-np.float64(logits)))
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    squares = (np.float64(kernel) ** 2).sum(1)
    want = (0.7**2 / 2 * (squares / (1 - p)).sum() - entropy.sum()) / 10
    np.testing.assert_allclose(got, want, rtol=1e-5)
    same = fdc.concrete_regularization(jnp.full(8, 0.3), kernel, **options)
    scalar = fdc.concrete_regularization(jnp.float32(0.3), kernel, **options)
    np.testing.assert_allclose(same, scalar, rtol=1e-5)
    with pytest.raises(ValueError, match=r"logit a scalar or \[units\], got shapes"):
        fdc.concrete_regularization(jnp.zeros(5), kernel, **options)


def test_gaussian_kl_is_the_integral() -> None:
    """Of the log ratio of the densities, by a sum over a fine grid."""
    grid = np.linspace(-30, 30, 200_001)
    means, stddevs = jnp.array([[0.0], [1.5]]), jnp.array([0.2, 1.0, 3.0])
    got = fdc.gaussian_kl(means, stddevs)
    assert got.shape == (2, 3)
    for (row, column), kl in np.ndenumerate(got):
        mean, stddev = float(means[row, 0]), float(stddevs[column])
        log_p = -(((grid - mean) / stddev) ** 2) / 2 - math.log(stddev)
        density = np.exp(log_p) / math.sqrt(2 * math.pi)
        integral = (density * (log_p + grid**2 / 2)).sum() * (grid[1] - grid[0])
        np.testing.assert_allclose(kl, integral, atol=1e-5)
    assert fdc.gaussian_kl(jnp.zeros(2, jnp.bfloat16), 1.0).dtype == jnp.float32
    gradient = jax.grad(lambda stddev: fdc.gaussian_kl(0.0, stddev))(jnp.float32(1.0))
    assert gradient == 0


def test_a_temperature_that_does_not_fit() -> None:
    noise = fdc.ConcreteDropout(logit=0.0, temperature=jnp.full((2, 4), 0.1))
    with pytest.raises(ValueError, match=r"temperature has shape \(2, 4\), .* \(4,\); give one"):
        noise.apply(jnp.full(4, 0.5), jnp.ones(4))

"""The linear cells against their papers in NumPy: steps, initial weights, and what may go wrong."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy_linear_cells as in_numpy
import pytest
from asserts import assert_close

import flax_dropout_cell as fdc

FEATURES, UNITS, BATCH, STEPS = 3, 8, 2, 5


class LinearCase(NamedTuple):
    cell: Callable[..., Any]
    in_numpy: Callable[..., Any]
    init: Callable[..., Any]


CELLS = {
    "lru": LinearCase(fdc.lru_cell, in_numpy.lru, fdc.init_lru),
    "min_gru": LinearCase(fdc.min_gru_cell, in_numpy.min_gru, fdc.init_min_gru),
    "min_lstm": LinearCase(fdc.min_lstm_cell, in_numpy.min_lstm, fdc.init_min_lstm),
    "rg_lru": LinearCase(fdc.rg_lru_cell, in_numpy.rg_lru, fdc.init_rg_lru),
}
cells = pytest.mark.parametrize("name", CELLS)


def draw(shape: tuple[int, ...], seed: int, dtype: Any = jnp.float32) -> jax.Array:
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values.astype(np.float32), dtype)


def example(name: str, batch: tuple[int, ...] = (BATCH,), dtype: Any = jnp.float32) -> Any:
    """Weights, biases not zero, with a carry and an input."""
    params = CELLS[name].init(jax.random.key(0), FEATURES, UNITS, dtype)
    if name != "lru":
        params = params._replace(bias=draw(params.bias.shape, 1, dtype))
    h = draw((*batch, UNITS), 2)
    h = jax.lax.complex(h, draw(h.shape, 3)) if name == "lru" else h.astype(dtype)
    return params, h, draw((*batch, FEATURES), 4, dtype)


def mix(mask: Any, value: Any, previous: Any) -> Any:
    return mask * value + (0 if previous is None else (1 - mask) * previous)


def stub(masks: dict[str, Any]) -> Callable[..., Any]:
    def disturb(site: str, value: Any, previous: Any = None) -> Any:
        mask = masks.get(site)
        return value if mask is None else mix(mask.astype(value.dtype), value, previous)

    return disturb


def numpy_sites(masks: dict[str, Any]) -> dict[str, Any]:
    return {
        site: functools.partial(mix, np.asarray(mask, np.float64)) for site, mask in masks.items()
    }


@cells
@pytest.mark.parametrize("sites", [(), ("candidate",), ("hidden",), ("candidate", "hidden")])
@pytest.mark.parametrize("batch", [(), (2, 1, 3)], ids=str)
def test_a_step_is_its_papers_equations(
    name: str, sites: tuple[str, ...], batch: tuple[int, ...]
) -> None:
    params, h, x = example(name, batch)
    masks = {site: draw((*batch, UNITS), 10 + seed) for seed, site in enumerate(sites)}
    got = CELLS[name].cell(params, h, x, disturb=stub(masks))
    want = CELLS[name].in_numpy(params, np.asarray(h), np.asarray(x), numpy_sites(masks))
    assert got[1].shape == (*batch, UNITS)
    assert_close(got, want, rtol=2e-5, atol=2e-5)


@cells
def test_a_sequence_under_noise(name: str) -> None:
    """Masks once for the candidate, zoneout of h at every step, dropped units of the state."""
    noises = {
        "candidate": fdc.Dropout(keep_prob=0.6, variational=True),
        "hidden": fdc.Zoneout(prob=0.3),
    }
    state = fdc.Dropout(keep_prob=0.7, variational=True, scale=False)
    spec = fdc.RecurrentDropout(state=state, inside=noises)
    params, h, _ = example(name)
    xs, key = draw((STEPS, BATCH, FEATURES), 5), jax.random.key(3)
    options: Any = {"cell": CELLS[name].cell, "dropout": spec}
    got = fdc.dropout_scan(params, h, xs, key, **options)

    once = fdc.draw_masks(params, h, xs[0], key, **options)
    frozen = fdc.RecurrentDropout(inside={"hidden": fdc.Zoneout(prob=0.3, variational=True)})
    carry, ys = np.asarray(h), []
    for step_key, x in zip(jax.random.split(key, STEPS), np.asarray(xs), strict=True):
        at_step = fdc.draw_masks(
            params, h, x, step_key, cell=CELLS[name].cell, dropout=frozen
        ).inside["hidden"]
        sites = {
            "candidate": lambda value, _: value * np.asarray(once.inside["candidate"]) / 0.6,
            "hidden": lambda value, old, new=at_step: np.where(new, value, old),
        }
        carry, y = CELLS[name].in_numpy(params, carry, x, sites)
        carry = carry * np.asarray(once.state)
        ys.append(y)
    assert_close(got, (carry, np.stack(ys)), rtol=2e-5, atol=2e-5)
    evaluated = fdc.dropout_scan(params, h, xs, None, **options)
    assert not np.allclose(evaluated[1], got[1])


@cells
def test_the_update_is_affine_in_h_unit_by_unit(name: str) -> None:
    """In the traced step h meets products, sums and casts alone, so a scan may run in parallel."""
    params, h, x = example(name)

    def update(h: jax.Array) -> jax.Array:
        return CELLS[name].cell(params, h, x)[0]

    jaxpr = jax.make_jaxpr(update)(h).jaxpr
    needed, path = set(jaxpr.outvars), []  # an LRU's y reads h, and is not looked at
    for equation in reversed(jaxpr.eqns):
        if needed.intersection(equation.outvars):
            needed.update(var for var in equation.invars if not hasattr(var, "val"))
            path.append(equation)
    of_h = set(jaxpr.invars)
    for equation in reversed(path):
        if any(var in of_h for var in equation.invars if not hasattr(var, "val")):
            assert equation.primitive.name in ("mul", "add", "convert_element_type"), equation
            of_h.update(equation.outvars)
    assert jaxpr.outvars[0] in of_h


@cells
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)
def test_half_precision(name: str, dtype: Any) -> None:
    params, h, x = example(name, dtype=dtype)
    new, y = CELLS[name].cell(params, h, x)
    assert (new.dtype, y.dtype) == (h.dtype, x.dtype)
    want = CELLS[name].in_numpy(
        params, np.asarray(h, h.dtype if name == "lru" else "float32"), np.asarray(x, "float32"), {}
    )
    wide = (new if name == "lru" else new.astype("float32"), y.astype("float32"))
    assert_close(wide, want, rtol=0.05, atol=0.05)


@cells
def test_float64(name: str, float64: None) -> None:
    params = CELLS[name].init(jax.random.key(0), FEATURES, UNITS, jnp.float64)
    h = jnp.zeros((BATCH, UNITS), jnp.complex128 if name == "lru" else jnp.float64)
    x = draw((BATCH, FEATURES), 4, jnp.float64)
    got = CELLS[name].cell(params, h, x)
    assert (got[0].dtype, got[1].dtype) == (h.dtype, jnp.float64)
    assert_close(
        got, CELLS[name].in_numpy(params, np.asarray(h), np.asarray(x), {}), rtol=1e-12, atol=1e-12
    )


@cells
def test_the_carry_keeps_its_dtype(name: str) -> None:
    params, _, x = example(name, dtype=jnp.bfloat16)
    h = example(name)[1]
    assert CELLS[name].cell(params, h, x)[0].dtype == h.dtype


def uniform(values: Any, low: float, high: float) -> bool:
    """Whether values look drawn uniformly: Kolmogorov and Smirnov, at one in a million."""
    ranks = (np.sort(np.asarray(values, np.float64)) - low) / (high - low)
    gap = np.abs(ranks - (np.arange(ranks.size) + 0.5) / ranks.size).max()
    return gap < 2.7 / math.sqrt(ranks.size)


@pytest.mark.parametrize(("low", "high", "phase"), [(0.0, 1.0, 2 * math.pi), (0.9, 0.999, 0.3)])
def test_eigenvalues_of_an_lru_are_uniform_on_their_ring(
    low: float, high: float, phase: float
) -> None:
    """Lemma 3.2: |lambda|**2 is uniform, and so is the phase; gamma follows equation 7."""
    init = functools.partial(fdc.init_lru, min_radius=low, max_radius=high, max_phase=phase)
    params = in_numpy.in_float64(init(jax.random.key(1), 2, 2000))
    radii = np.exp(-np.exp(params.nu_log))
    assert uniform(radii**2, low**2, high**2)
    assert uniform(np.exp(params.theta_log), 0, phase)
    np.testing.assert_allclose(np.exp(params.gamma_log), np.sqrt(1 - radii**2), rtol=1e-3)


def test_no_eigenvalue_of_an_lru_rounds_to_one() -> None:
    """The paper's radius for long memories, 200,000 times: a logarithm of 0 would train to NaN.

    Gamma is exact there too: from squares in float32 it would have one or two correct digits.
    """
    init = functools.partial(fdc.init_lru, min_radius=0.999, max_phase=math.pi / 50)
    few = [init(jax.random.key(seed), 1, 1000) for seed in range(200)]
    for name in ("nu_log", "theta_log", "gamma_log"):
        drawn = np.stack([getattr(params, name) for params in few])
        assert np.isfinite(drawn).all(), name
    nu, gamma = (
        np.stack([getattr(params, name) for params in few]).astype(np.float64)
        for name in ("nu_log", "gamma_log")
    )
    np.testing.assert_allclose(np.exp(2 * gamma), -np.expm1(-2 * np.exp(nu)), rtol=1e-5)


def test_matrices_of_an_lru() -> None:
    """Each part of B has variance 1 / (2 D) and of C 1 / H, so B and C have 1 / D and 2 / H."""
    features, units = 50, 200
    params = fdc.init_lru(jax.random.key(1), features, units)
    for kernel, variance in (
        (params.input_kernel, 1 / (2 * features)),
        (params.output_kernel, 1 / units),
        (params.skip_kernel, 1 / features),
    ):
        assert abs(float(kernel.var()) / variance - 1) < 5 * math.sqrt(2 / kernel.size)


def test_h_of_an_lru_keeps_the_variance_of_white_noise() -> None:
    """What gamma is for: E|h|**2 is that of x B, whatever the eigenvalue."""
    init = functools.partial(fdc.init_lru, min_radius=0.8, max_radius=0.95)
    params = init(jax.random.key(1), 4, 400)
    xs = jax.random.normal(jax.random.key(2), (400, 32, 4))
    h, _ = fdc.dropout_scan(
        params, jnp.zeros((32, 400), jnp.complex64), xs, None,
        cell=fdc.lru_cell, dropout=fdc.RecurrentDropout(),
    )  # fmt: skip
    assert abs(float((jnp.abs(h) ** 2).mean()) - 1) < 0.1


def test_decays_of_an_rg_lru() -> None:
    """Section 2.4: a**c is uniform between 0.9 and 0.999, with c = 8."""
    params = fdc.init_rg_lru(jax.random.key(1), 2, 2000)
    a = 1 / (1 + np.exp(-np.asarray(params.decay_logit, np.float64)))
    assert uniform(a**8, 0.9, 0.999)


@pytest.mark.parametrize("name", [name for name in CELLS if name != "lru"])
def test_gates_start_as_flax_has_them(name: str) -> None:
    params = CELLS[name].init(jax.random.key(0), 64, 128)
    assert not params.bias.any()
    kernels = jnp.split(params.input_kernel, params.bias.size // 128, -1)
    for kernel in kernels:
        assert abs(float(kernel.std()) * 8 - 1) < 5 / math.sqrt(2 * kernel.size)
    assert not (kernels[0] == kernels[1]).any()


@cells
def test_weights_have_the_dtype_asked_for(name: str) -> None:
    params = CELLS[name].init(jax.random.key(0), FEATURES, UNITS, jnp.bfloat16)
    assert {leaf.dtype for leaf in params} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("name", ["min_gru", "min_lstm", "rg_lru"])
@pytest.mark.parametrize("size", [-200.0, 200.0])
def test_saturated_gates_give_no_nan(name: str, size: float) -> None:
    """Both gates of a minLSTM may underflow, and the square root of an RG-LRU has no slope at 0."""
    params, h, x = example(name)
    bias = jnp.full_like(params.bias, size)

    def loss(bias: jax.Array, decay: Any) -> jax.Array:
        moved = params._replace(bias=bias)
        moved = moved if decay is None else moved._replace(decay_logit=decay)
        return CELLS[name].cell(moved, h, x)[0].sum()

    decay = jnp.full(UNITS, 200.0) if name == "rg_lru" else None
    value, gradient = jax.value_and_grad(loss)(bias, decay)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()


@cells
def test_gradients_of_a_scan(name: str) -> None:
    """By weights, initial carry and inputs, under noise, against jax.lax.scan with the masks."""
    params, h, _ = example(name)
    xs, key = draw((STEPS, BATCH, FEATURES), 5), jax.random.key(3)
    noise = fdc.Dropout(keep_prob=0.6, variational=True)
    spec = fdc.RecurrentDropout(inside={"candidate": noise})
    options: Any = {"cell": CELLS[name].cell, "dropout": spec}
    mask = fdc.draw_masks(params, h, xs[0], key, **options).inside["candidate"]
    masks = {"candidate": mask.astype(jnp.float32) / 0.6}

    def loss(run: Callable[..., Any], *args: Any) -> jax.Array:
        carry, ys = run(*args)
        return (ys**2).sum() + (jnp.abs(carry) ** 2).sum()

    def by_hand(params: Any, h: Any, xs: Any) -> Any:
        step = functools.partial(CELLS[name].cell, params, disturb=stub(masks))
        return jax.lax.scan(step, h, xs)

    def ours(params: Any, h: Any, xs: Any) -> Any:
        return fdc.dropout_scan(params, h, xs, key, **options)

    grad = jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=0)
    assert_close(grad(ours, params, h, xs), grad(by_hand, params, h, xs), rtol=1e-4, atol=1e-4)


MISTAKES = {
    "an LSTM's carry": (
        "min_gru", lambda p, h, x: (p, (h, h), x), TypeError, "the carry h as one array, got .float"
    ),
    "an input of another size": (
        "min_lstm", lambda p, h, x: (p, h, h), ValueError, r"x \[2, 8\].*\[3, 24\] reads 3 feat"
    ),
    "an h of another batch": (
        "rg_lru", lambda p, h, x: (p, h[:1], x), ValueError, r"h \[1, 8\]; h must be \[2, 8\]"
    ),
    "a kernel transposed": (
        "min_gru", lambda p, h, x: (p._replace(input_kernel=p[0].T), h, x), ValueError,
        r"input_kernel \[in_features, 2 \* features\], got \[16, 3\]",
    ),
    "ints as the input": (
        "lru", lambda p, h, x: (p, h, x.astype(int)), TypeError, "takes a floating-point x, got int"
    ),
    "ints as h": (
        "min_gru", lambda p, h, x: (p, h.astype(int), x), TypeError, "a floating-point h, such as"
    ),
    "weights of another cell": (
        "min_lstm", lambda p, h, x: (fdc.RGLRUParams(p[0], p[1], p[1][:8]), h, x), TypeError,
        "min_lstm_cell takes MinLSTMParams, got a",
    ),
    "a bias of one": (
        "rg_lru", lambda p, h, x: (p._replace(bias=jnp.ones(1)), h, x), ValueError,
        r"takes a bias \[24\], got \[1\]",
    ),
    "a gamma of one": (
        "lru", lambda p, h, x: (p._replace(gamma_log=jnp.ones(1)), h, x), ValueError,
        r"takes a gamma_log \[8\], got \[1\]",
    ),
    "a real state": (
        "lru", lambda p, h, x: (p, h.real, x), TypeError, "such as complex64, got float32"
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str) -> None:
    name, change, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message) as caught:
        CELLS[name].cell(*change(*example(name)))
    assert len(str(caught.value).splitlines()) <= 5


def lru_candidate(p: Any, x: Any) -> Any:
    real, imag = np.split(x @ p["input_kernel"], 2, -1)
    return real + 1j * imag


def of_gates(count: int, pick: Any) -> Any:
    return lambda p, x: pick(*np.split(x @ p["input_kernel"] + p["bias"], count, -1))


@pytest.mark.parametrize(
    ("init", "cell", "candidate"),
    [
        (fdc.init_lru, fdc.lru_cell, lru_candidate),
        (fdc.init_min_gru, fdc.min_gru_cell, of_gates(2, lambda z, n: n)),
        (fdc.init_min_lstm, fdc.min_lstm_cell, of_gates(3, lambda f, i, n: n)),
        (fdc.init_rg_lru, fdc.rg_lru_cell, of_gates(3, lambda r, i, n: n / (1 + np.exp(-i)))),
    ],
    ids=["lru", "min_gru", "min_lstm", "rg_lru"],
)
def test_the_values_at_the_sites_of_a_linear_cell(init: Any, cell: Any, candidate: Any) -> None:
    """As the docstrings say; a mask of dropout would not tell i * D(n) from D(i * n)."""
    params = init(jax.random.key(3), 3, 8)
    if hasattr(params, "bias"):
        params = params._replace(bias=jax.random.normal(jax.random.key(3), params.bias.shape))
    dtype = jnp.complex64 if cell is fdc.lru_cell else jnp.float32
    h = jax.random.normal(jax.random.key(3), (2, 8), dtype)
    x = jax.random.normal(jax.random.key(4), (2, 3))
    seen: dict[str, Any] = {}

    def disturb(site: str, value: Any, previous: Any = None) -> Any:
        seen[site] = (value, previous)
        return value

    new, _ = cell(params, h, x, disturb=disturb)
    plain = {name: np.float64(leaf) for name, leaf in params._asdict().items()}
    assert list(seen) == ["candidate", "hidden"]
    np.testing.assert_allclose(seen["candidate"][0], candidate(plain, np.float64(x)), rtol=1e-5)
    np.testing.assert_array_equal(seen["hidden"][0], new)
    np.testing.assert_array_equal(seen["hidden"][1], h)

"""Half precision: random numbers, probabilities and decays are those of float32, rounded once."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_dropout_cell as fdc

KEY = jax.random.key(3)
halves = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
frameworks = pytest.mark.parametrize("framework", ["linen", "nnx"])


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


@halves
def test_deviates_of_half_precision_are_rounded_from_float32(dtype: Any) -> None:
    """Drawn in bfloat16, none would be beyond 2.7."""
    mask = fdc.GaussianNoise(stddev=1.0).draw_mask(KEY, (100, 1000), dtype)
    assert mask.dtype == dtype
    wanted = jax.random.normal(KEY, (100, 1000), jnp.float32).astype(dtype)
    np.testing.assert_array_equal(mask, wanted)


@halves
def test_uniform_deviates_are_float32_for_half_precision(dtype: Any) -> None:
    """In bfloat16 there would be 128 of them, and no probability below 1 %."""
    mask = fdc.ConcreteDropout(logit=-2.0).draw_mask(KEY, (100, 100), dtype)
    tiny = float(np.finfo(np.float32).tiny)
    np.testing.assert_array_equal(mask, jax.random.uniform(KEY, (100, 100), minval=tiny))
    assert mask.dtype == jnp.float32


def test_a_prob_in_half_precision_is_taken_as_it_is() -> None:
    """1 - 0.1 in bfloat16 is 0.898."""
    prob = jnp.bfloat16(0.1)
    mask = np.asarray(fdc.Zoneout(prob=prob).draw_mask(KEY, (2048, 2048), jnp.float32))
    passes = 1 - float(prob)
    assert abs(mask.mean() - passes) < 5 * (passes * (1 - passes) / mask.size) ** 0.5


@pytest.mark.parametrize("name", ["lru", "rg_lru"])
@frameworks
def test_half_precision_rounds_no_decay(name: str, framework: str) -> None:
    """Where the inputs are zeros, h is multiplied by the decay of the float32 weights."""
    x, module = jnp.zeros((2, 3)), {"lru": "LRUCell", "rg_lru": "RGLRUCell"}[name]
    h = jnp.ones((2, 64), jnp.complex64 if name == "lru" else jnp.float32)
    if framework == "linen":
        cell = getattr(fdc.linen, module)(64, dtype=jnp.bfloat16)
        variables = cell.init(KEY, h, x)
        params, (new, _) = variables["params"], cell.apply(variables, h, x)
    else:
        cell = getattr(fdc.nnx, module)(3, 64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        params, (new, _) = nnx.to_pure_dict(nnx.state(cell)), cell(h, x)
    if name == "lru":
        nu, theta = (np.float64(params[each]) for each in ("nu_log", "theta_log"))
        decay = np.exp(-np.exp(nu) + 1j * np.exp(theta))
    else:  # both gates are half open
        decay = sigmoid(np.float64(params["decay_logit"])) ** 4
    np.testing.assert_allclose(new, np.broadcast_to(decay, h.shape), rtol=2e-5)


@halves
def test_the_decay_of_an_rg_lru_is_computed_in_float32(dtype: Any) -> None:
    """Half precision rounds 0.999 to 1: a memory would never fade, and nothing would enter it."""
    params = fdc.init_rg_lru(KEY, 3, 64)
    narrow = params._replace(
        input_kernel=params.input_kernel.astype(dtype), bias=params.bias.astype(dtype)
    )
    x, h = jnp.zeros((1, 3), dtype), jnp.ones((1, 64))
    new, _ = fdc.rg_lru_cell(narrow, h, x)
    decay = sigmoid(np.float64(params.decay_logit)) ** 4  # r is one half
    np.testing.assert_allclose(new[0], decay, rtol=2e-6)


def test_first_decays_of_an_rg_lru_in_half_precision() -> None:
    """They are those of float32, rounded once."""
    wide = fdc.init_rg_lru(KEY, 2, 1000).decay_logit
    half = fdc.init_rg_lru(KEY, 2, 1000, jnp.bfloat16).decay_logit
    np.testing.assert_array_equal(half, wide.astype(jnp.bfloat16))


@frameworks
def test_a_gru_of_float32_weights_computes_in_half_precision(framework: str) -> None:
    """All of it: under strict promotion one weight that is not cast is an error."""
    h, x = jnp.ones((2, 8)), jnp.ones((2, 3))
    if framework == "linen":
        cell: Any = fdc.linen.GRUCell(8, dtype=jnp.bfloat16)
        variables = cell.init(KEY, h, x)
        run: Any = lambda h, x: cell.apply(variables, h, x)  # noqa: E731
    else:
        run = fdc.nnx.GRUCell(3, 8, dtype=jnp.bfloat16, use_recurrent_bias=True, rngs=nnx.Rngs(0))
    new, y = run(h, x)
    assert new.dtype == y.dtype == jnp.float32  # the carry's
    program = str(jax.make_jaxpr(run)(h, x))
    tanh = [line for line in program.splitlines() if " tanh " in line]
    assert tanh and all("bf16" in line.split("=")[0] for line in tanh)


def test_attend_has_the_dtype_of_the_stock_layer() -> None:
    stock, own = (
        make(dtype=jnp.bfloat16)
        for make in (
            functools.partial(nn.Embed, 9, 4),
            functools.partial(fdc.linen.Embed, 9, 4, 0.5),
        )
    )
    variables = stock.init(KEY, jnp.arange(3))
    query = jax.random.normal(KEY, (2, 4))
    results: list[Any] = [each.apply(variables, query, method="attend") for each in (own, stock)]
    got, wanted = results
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got, wanted)

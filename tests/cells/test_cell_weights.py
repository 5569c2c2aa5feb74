"""Weights of Flax's own cells load into this library's as they are, and back, by number."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asserts import assert_close_in_scale
from flax import nnx

import flax_dropout_cell as fdc

FEATURES, UNITS, BATCH, STEPS = 3, 8, 2, 5

LINEN = {
    "nn.LSTMCell": (nn.LSTMCell, fdc.linen.LSTMCell),
    "nn.OptimizedLSTMCell": (nn.OptimizedLSTMCell, fdc.linen.LSTMCell),
    "nn.GRUCell": (nn.GRUCell, fdc.linen.GRUCell),
}
NNX = {
    "nnx.LSTMCell": (nnx.LSTMCell, fdc.nnx.LSTMCell),
    "nnx.OptimizedLSTMCell": (nnx.OptimizedLSTMCell, fdc.nnx.LSTMCell),
    "nnx.GRUCell": (nnx.GRUCell, fdc.nnx.GRUCell),
}
linen_cells = pytest.mark.parametrize("name", LINEN)
nnx_cells = pytest.mark.parametrize("name", NNX)


def xs(dtype: Any = jnp.float32) -> jax.Array:
    values = np.random.default_rng(0).normal(size=(STEPS, BATCH, FEATURES))
    return jnp.asarray(values.astype(np.float32), dtype)


def shake(tree: Any) -> Any:
    """Other weights of the same shapes, biases not zero."""
    draw = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(draw.normal(size=leaf.shape), leaf.dtype) / 2, tree
    )


def first_carry(cell: Any, dtype: Any = jnp.float32) -> Any:
    draw = np.random.default_rng(2).normal(size=(2, BATCH, UNITS)).astype(np.float32)
    c, h = jnp.asarray(draw, dtype)
    return h if isinstance(cell, nn.GRUCell | nnx.GRUCell) else (c, h)


def run(step: Callable[..., Any], weights: Any, carry: Any, xs: jax.Array) -> Any:
    """A sequence, and the gradients of a loss by weights, initial carry and inputs."""

    def loss(weights: Any, carry: Any, xs: jax.Array) -> Any:
        carry, ys = jax.lax.scan(lambda carry, x: step(weights, carry, x), carry, xs)
        return (ys.astype(jnp.float32) ** 2).sum(), (carry, ys)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(weights, carry, xs)


def linen_pair(name: str, **fields: Any) -> tuple[Any, Any, Any]:
    stock, ours = (kind(UNITS, **fields) for kind in LINEN[name])
    variables = stock.init(jax.random.key(0), first_carry(stock), xs()[0])
    return stock, ours, shake(variables)


@linen_cells
def test_linen_weights_load_as_they_are(name: str) -> None:
    stock, ours, variables = linen_pair(name)
    carry = first_carry(stock)
    assert_close_in_scale(
        run(ours.apply, variables, carry, xs()), run(stock.apply, variables, carry, xs())
    )


@linen_cells
def test_linen_init_makes_the_same_weights(name: str) -> None:
    stock, ours, _ = linen_pair(name, bias_init=nn.initializers.normal())
    args = (jax.random.key(3), first_carry(stock), xs()[0])
    want, got = stock.init(*args), ours.init(*args)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@linen_cells
def test_linen_fields(name: str) -> None:
    """The fields of Flax's cells keep their meaning."""
    stock, ours, variables = linen_pair(
        name, gate_fn=nn.hard_sigmoid, activation_fn=jnp.sin, carry_init=nn.initializers.ones
    )
    carry = stock.initialize_carry(jax.random.key(0), (BATCH, FEATURES))
    jax.tree.map(
        np.testing.assert_array_equal,
        carry,
        ours.initialize_carry(jax.random.key(0), (BATCH, FEATURES)),
    )
    assert_close_in_scale(
        ours.apply(variables, carry, xs()[0]), stock.apply(variables, carry, xs()[0])
    )


def make_ones(key: Any, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    """Orthogonal matrices, which are the default, are not to be had in half precision."""
    del key
    return jnp.ones(shape, dtype)


@linen_cells
@pytest.mark.parametrize("fields", [{"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}])
def test_linen_half_precision(name: str, fields: Any) -> None:
    """Both fields give the dtypes that Flax gives: its carry is made in param_dtype."""
    with jax.numpy_dtype_promotion("standard"):
        stock, ours, variables = linen_pair(name, recurrent_kernel_init=make_ones, **fields)
        x = xs(jnp.bfloat16)[0]
        carry = stock.initialize_carry(jax.random.key(0), x.shape)
        want, got = stock.apply(variables, carry, x), ours.apply(variables, carry, x)
    assert_close_in_scale(got, want, 0.02)


@linen_cells
def test_linen_core_params_and_back(name: str) -> None:
    stock, ours, variables = linen_pair(name)
    params = fdc.linen.core_params(variables, stock)
    core_cell = fdc.gru_cell if name == "nn.GRUCell" else fdc.lstm_cell
    carry = first_carry(stock)
    got = core_cell(params, carry, xs()[0])  # type: ignore[arg-type]
    assert_close_in_scale(got, stock.apply(variables, carry, xs()[0]))
    for cell in (stock, ours):
        back = fdc.linen.cell_params(params, cell)
        assert jax.tree.structure(back) == jax.tree.structure(variables)
        jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_linen_core_params_of_boxed_weights() -> None:
    stock = nn.LSTMCell(UNITS, kernel_init=nn.with_partitioning(nn.initializers.ones, ("a", "b")))
    variables = stock.init(jax.random.key(0), first_carry(stock), xs()[0])
    params = fdc.linen.core_params(variables, stock)
    np.testing.assert_array_equal(params.input_kernel, jnp.ones((FEATURES, 4 * UNITS)))


def test_linen_cells_in_a_stock_rnn() -> None:
    rnn, stock = nn.RNN(fdc.linen.LSTMCell(UNITS)), nn.RNN(nn.OptimizedLSTMCell(UNITS))
    x = xs().swapaxes(0, 1)
    variables = rnn.init(jax.random.key(0), x)
    assert_close_in_scale(rnn.apply(variables, x), stock.apply(variables, x))


def nnx_pair(name: str, **options: Any) -> tuple[Any, Any]:
    stock, ours = (kind(FEATURES, UNITS, rngs=nnx.Rngs(0), **options) for kind in NNX[name])
    nnx.update(stock, shake(nnx.to_pure_dict(nnx.state(stock, nnx.Param))))
    return stock, ours


def nnx_step(cell: Any) -> tuple[Callable[..., Any], Any]:
    graph, params = nnx.split(cell, nnx.Param)
    return lambda params, carry, x: nnx.merge(graph, params)(carry, x), params


def run_nnx(cell: Any) -> Any:
    step, params = nnx_step(cell)
    gradients, result = run(step, params, first_carry(cell), xs())
    return (fdc.nnx.core_params(gradients[0], cell), *gradients[1:]), result


@nnx_cells
def test_nnx_weights_load(name: str) -> None:
    """As they are, where the names are Flax's; through `core_params` from `nnx.LSTMCell`."""
    stock, ours = nnx_pair(name)
    if name == "nnx.LSTMCell":
        params = fdc.nnx.core_params(nnx.state(stock), stock)
        nnx.update(ours, fdc.nnx.cell_params(params, ours))
    else:
        nnx.update(ours, nnx.state(stock))
    assert_close_in_scale(run_nnx(ours), run_nnx(stock))


@pytest.mark.parametrize("name", ["nnx.OptimizedLSTMCell", "nnx.GRUCell"])
def test_nnx_first_weights_are_the_stock_ones(name: str) -> None:
    states = [
        nnx.to_pure_dict(nnx.state(kind(FEATURES, UNITS, rngs=nnx.Rngs(5)))) for kind in NNX[name]
    ]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    jax.tree.map(np.testing.assert_array_equal, *states)


@nnx_cells
@pytest.mark.parametrize("options", [{"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}])
def test_nnx_half_precision(name: str, options: Any) -> None:
    with jax.numpy_dtype_promotion("standard"):
        stock, ours = nnx_pair(name, recurrent_kernel_init=make_ones, **options)
        params = fdc.nnx.core_params(nnx.state(stock), stock)
        nnx.update(ours, fdc.nnx.cell_params(params, ours))
        x = xs(jnp.bfloat16)[0]
        carry = stock.initialize_carry(x.shape, nnx.Rngs(0))
        assert_close_in_scale(ours(carry, x), stock(carry, x), 0.03)


@nnx_cells
def test_nnx_core_params_and_back(name: str) -> None:
    stock, ours = nnx_pair(name)
    params = fdc.nnx.core_params(nnx.state(stock), stock)
    core_cell = fdc.gru_cell if name == "nnx.GRUCell" else fdc.lstm_cell
    carry = first_carry(stock)
    assert_close_in_scale(core_cell(params, carry, xs()[0]), stock(carry, xs()[0]))  # type: ignore[arg-type]
    pure = nnx.to_pure_dict(nnx.state(stock, nnx.Param))
    back = fdc.nnx.cell_params(params, stock)
    assert jax.tree.structure(back) == jax.tree.structure(pure)
    jax.tree.map(np.testing.assert_array_equal, back, pure)
    nnx.update(ours, fdc.nnx.cell_params(params, ours))
    again = fdc.nnx.core_params(nnx.state(ours), ours)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_second_bias_in_nnx() -> None:
    """Flax's NNX GRU has no place for the bias that linen's has; ours makes one if asked."""
    linen, _, variables = linen_pair("nn.GRUCell")
    params = fdc.linen.core_params(variables, linen)
    cell = fdc.nnx.GRUCell(FEATURES, UNITS, use_recurrent_bias=True, rngs=nnx.Rngs(0))
    nnx.update(cell, fdc.nnx.cell_params(params, cell))
    carry = first_carry(cell)
    assert_close_in_scale(cell(carry, xs()[0]), linen.apply(variables, carry, xs()[0]))
    again = fdc.nnx.core_params(nnx.state(cell), cell)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    without = fdc.nnx.GRUCell(FEATURES, UNITS, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no place for the weights' recurrent_bias"):
        fdc.nnx.cell_params(params, without)
    with pytest.raises(ValueError, match="no place for the weights' recurrent_bias"):
        fdc.nnx.cell_params(params, nnx.GRUCell(FEATURES, UNITS, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("cell", [nn.GRUCell(UNITS), "nnx with a place"], ids=["linen", "nnx"])
def test_no_second_bias_is_one_of_zeros(cell: Any) -> None:
    params = fdc.init_gru(jax.random.key(0), FEATURES, UNITS)._replace(recurrent_bias=None)
    if isinstance(cell, nn.GRUCell):
        bias = fdc.linen.cell_params(params, cell)["params"]["hn"]["bias"]
    else:
        cell = fdc.nnx.GRUCell(FEATURES, UNITS, use_recurrent_bias=True, rngs=nnx.Rngs(0))
        bias = fdc.nnx.cell_params(params, cell)["recurrent_bias"]
    np.testing.assert_array_equal(bias, np.zeros(UNITS))


def lstm() -> fdc.LSTMParams:
    return fdc.LSTMParams(jnp.ones((3, 32)), jnp.ones((8, 32)), jnp.ones(32))


def nnx_lstm(units: int = UNITS) -> Any:
    return fdc.nnx.LSTMCell(FEATURES, units, rngs=nnx.Rngs(0))


def nnx_layer() -> Any:
    return fdc.nnx.RNN(nnx_lstm(), fdc.RecurrentDropout(), rngs=nnx.Rngs(0))


def linen_weights() -> Any:
    return nn.LSTMCell(8).init(jax.random.key(0), (jnp.zeros(8), jnp.zeros(8)), jnp.zeros(3))


def without_bias(weights: dict[str, Any], name: str) -> dict[str, Any]:
    return weights | {name: {"kernel": weights[name]["kernel"]}}


MISTAKES = {
    "linen, of another kind": (
        lambda: fdc.linen.cell_params(lstm(), nn.GRUCell(8)), TypeError,
        "GRUCell takes GRUParams, got an LSTMParams",
    ),
    "linen, of another size": (
        lambda: fdc.linen.cell_params(lstm(), nn.LSTMCell(9)), ValueError,
        r"has 9 features, but the weights 8",
    ),
    "linen, without a bias": (
        lambda: fdc.linen.core_params(
            {"params": without_bias(linen_weights()["params"], "hi")}, nn.LSTMCell(8)
        ),
        ValueError, r"these variables lack weights of LSTMCell: hi/bias\.",
    ),
    "NNX, without a bias": (
        lambda: fdc.nnx.core_params(
            without_bias(nnx.to_pure_dict(nnx.state(nnx_lstm(), nnx.Param)), "dense_h"), nnx_lstm()
        ),
        ValueError, r"these variables lack weights of LSTMCell: dense_h/bias\.",
    ),
    "linen, no such weights": (
        lambda: fdc.linen.cell_params(lstm(), nn.SimpleCell(8)), TypeError,
        "LSTMCell, OptimizedLSTMCell, GRUCell and this library's cells, got a SimpleCell",
    ),
    "linen, other variables": (
        lambda: fdc.linen.core_params({"params": {"ii": {}}}, nn.LSTMCell(8)), ValueError,
        r"has the weights ii, if, ig, io, hi, hf, hg, ho; these variables hold ii",
    ),
    "linen, the params themselves": (
        lambda: fdc.linen.core_params({"ii": {}}, nn.LSTMCell(8)), ValueError,
        r"variables must be \{'params': ..\}, as init gives them, got \['ii'\]",
    ),
    "linen, a kernel transposed": (
        lambda: fdc.linen.cell_params(
            lstm()._replace(input_kernel=lstm().input_kernel.T), nn.LSTMCell(8)
        ),
        ValueError, r"takes an input_kernel \[in_features, 4 \* 8\], got \[32, 3\]",
    ),
    "linen, a bias of one": (
        lambda: fdc.linen.cell_params(lstm()._replace(bias=jnp.ones(1)), nn.LSTMCell(8)),
        ValueError, r"takes a bias \[32\], got \[1\]",
    ),
    "linen, variables of another size": (
        lambda: fdc.linen.core_params(
            fdc.linen.cell_params(lstm(), nn.LSTMCell(8)), nn.LSTMCell(9)
        ),
        ValueError, "the cell has 9 features, but the weights 8",
    ),
    "linen, a linear cell's kernel of another size": (
        lambda: fdc.linen.core_params(
            {"params": {"input_kernel": jnp.ones((3, 5)), "bias": jnp.ones(16)}},
            fdc.linen.MinGRUCell(8),
        ),
        ValueError, r"input_kernel must be \[3, 16\] for this MinGRUCell, got \[3, 5\]",
    ),
    "NNX, a bias of one": (
        lambda: fdc.nnx.cell_params(lstm()._replace(bias=jnp.ones(1)), nnx_lstm()),
        ValueError, r"takes a bias \[32\], got \[1\]",
    ),
    "NNX, variables of another size": (
        lambda: fdc.nnx.core_params(fdc.nnx.cell_params(lstm(), nnx_lstm()), nnx_lstm(9)),
        ValueError, r"features \(3, 9\), but the weights \(3, 8\)",
    ),
    "NNX, the cell itself": (
        lambda: fdc.nnx.core_params(nnx_lstm(), nnx_lstm()), TypeError,
        r"variables must be nnx.state\(cell\), or a dict of arrays, got an LSTMCell",
    ),
    "NNX, of another kind": (
        lambda: fdc.nnx.cell_params(lstm(), nnx.GRUCell(3, 8, rngs=nnx.Rngs(0))), TypeError,
        "GRUCell takes GRUParams, got an LSTMParams",
    ),
    "NNX, of another size": (
        lambda: fdc.nnx.cell_params(lstm(), nnx_lstm(9)), ValueError,
        r"features \(3, 9\), but the weights \(3, 8\)",
    ),
    "NNX, no such weights": (
        lambda: fdc.nnx.cell_params(lstm(), nnx.SimpleCell(3, 8, rngs=nnx.Rngs(0))), TypeError,
        "LSTMCell, OptimizedLSTMCell, GRUCell and this library's cells, got a SimpleCell",
    ),
    "NNX, a layer": (
        lambda: fdc.nnx.core_params({}, nnx_layer()), TypeError, "got an RNN: give its cell"
    ),
    "NNX, other variables": (
        lambda: fdc.nnx.core_params({"ii": {}}, nnx_lstm()), ValueError,
        "LSTMCell has the weights dense_h, dense_i; these variables hold ii",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str) -> None:
    run, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message) as caught:
        run()
    assert len(str(caught.value).splitlines()) <= 5

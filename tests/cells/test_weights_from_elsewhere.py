"""Every line of docs/weights.md, against the frameworks' own outputs, and the way back."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_dropout_cell as fdc

PAGE = Path(__file__).parents[2] / "docs" / "weights.md"
PARITY = Path(__file__).parents[1] / "support/parity"
STEPS, BATCH, FEATURES, UNITS = 5, 2, 3, 4

SECTIONS = {
    title: re.findall(r"^```python$\n(.*?)^```$", body, re.M | re.S)
    for title, body in re.findall(r"^### (\S+)$(.*?)(?=^##|\Z)", PAGE.read_text(), re.M | re.S)
}


class Foreign(NamedTuple):
    """A framework's cell: the names that the page's lines use, a sequence, and its results."""

    names: dict[str, Any]
    xs: Any
    ys: Any
    gradient: Any


def stored(file: str) -> dict[str, np.ndarray]:
    with np.load(PARITY / f"weights_{file}.npz") as arrays:
        return dict(arrays)


def torch_cell(kind: str) -> Foreign:
    arrays = stored(f"torch_{kind}")
    results = [arrays.pop(name) for name in ("xs", "ys", "gradient")]
    return Foreign({name: jnp.asarray(array) for name, array in arrays.items()}, *results)


def keras_layer(kind: str) -> Foreign:
    arrays = stored(f"keras_{kind}")
    weights = [arrays[f"weight_{index}"] for index in range(3)]
    return Foreign({"weights": weights}, *(arrays[name] for name in ("xs", "ys", "gradient")))


def inputs() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(STEPS, BATCH, FEATURES)), "float32")


def shake(tree: Any) -> Any:
    """Other weights, so that no bias is zero."""
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + draw.normal(size=leaf.shape).astype("float32"), tree)


def run(step: Callable[..., Any], carry: Any, xs: Any, **names: Any) -> Foreign:
    """Runs a cell of a framework that is at hand; `step(carry, x)` gives `(carry, y)`."""

    def loss(xs: jax.Array) -> Any:
        _, ys = jax.lax.scan(step, carry, xs)
        return (ys**2).sum(), ys

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        gradient, ys = jax.jit(jax.grad(loss, has_aux=True))(xs)
    return Foreign(names, xs, ys, gradient)


def zeros(gates: str) -> Any:
    h = jnp.zeros((BATCH, UNITS))
    return h if gates == "gru" else (h, h)


def linen_cell(cell: Any, gates: str) -> Foreign:
    variables = shake(cell.init(jax.random.key(0), zeros(gates), inputs()[0]))
    return run(
        lambda carry, x: cell.apply(variables, carry, x),
        zeros(gates), inputs(), cell=cell, variables=variables,
    )  # fmt: skip


def nnx_cell(kind: Any, gates: str) -> Foreign:
    cell = kind(FEATURES, UNITS, rngs=nnx.Rngs(0))
    nnx.update(cell, shake(nnx.to_pure_dict(nnx.state(cell, nnx.Param))))
    graph, state = nnx.split(cell)
    return run(
        lambda carry, x: nnx.merge(graph, state)(carry, x),
        zeros(gates), inputs(), cell=cell, nnx=nnx,
    )  # fmt: skip


def equinox_cell(name: str, gates: str) -> Foreign:
    eqx = pytest.importorskip("equinox")
    cell = getattr(eqx.nn, name)(FEATURES, UNITS, key=jax.random.key(0))

    def step(carry: Any, x: jax.Array) -> Any:
        carry = jax.vmap(cell)(x, carry)
        return carry, carry if gates == "gru" else carry[0]

    return run(step, zeros(gates), inputs(), cell=cell, eqx=eqx)


def haiku_cell() -> Foreign:
    hk = pytest.importorskip("haiku")
    core = hk.without_apply_rng(hk.transform(lambda x, state: hk.LSTM(UNITS)(x, state)))
    carry = hk.LSTMState(*zeros("lstm"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        variables = shake(core.init(jax.random.key(0), inputs()[0], carry))
    return run(
        lambda carry, x: core.apply(variables, x, carry)[::-1],
        carry, inputs(), linear=variables["lstm/linear"],
    )  # fmt: skip


FOREIGN: dict[str, Callable[[], Foreign]] = {
    "nn.LSTMCell": lambda: linen_cell(nn.LSTMCell(UNITS), "lstm"),
    "nn.GRUCell": lambda: linen_cell(nn.GRUCell(UNITS), "gru"),
    "nnx.LSTMCell": lambda: nnx_cell(nnx.LSTMCell, "lstm"),
    "nnx.OptimizedLSTMCell": lambda: nnx_cell(nnx.OptimizedLSTMCell, "lstm"),
    "nnx.GRUCell": lambda: nnx_cell(nnx.GRUCell, "gru"),
    "torch.nn.LSTMCell": lambda: torch_cell("lstm"),
    "torch.nn.GRUCell": lambda: torch_cell("gru"),
    "keras.layers.LSTM": lambda: keras_layer("lstm"),
    "keras.layers.GRU": lambda: keras_layer("gru"),
    "eqx.nn.LSTMCell": lambda: equinox_cell("LSTMCell", "lstm"),
    "eqx.nn.GRUCell": lambda: equinox_cell("GRUCell", "gru"),
    "hk.LSTM": haiku_cell,
}


def execute(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, PAGE.name, "exec"), names)


def ours(params: Any, xs: Any) -> tuple[Any, Any]:
    """Outputs and the inputs' gradient of this library's cell."""
    cell = fdc.gru_cell if isinstance(params, fdc.GRUParams) else fdc.lstm_cell
    carry = zeros("gru" if isinstance(params, fdc.GRUParams) else "lstm")
    done = run(lambda carry, x: cell(params, carry, x), carry, jnp.asarray(xs))  # type: ignore[arg-type]
    return done.ys, done.gradient


@pytest.mark.parametrize("title", FOREIGN)
def test_the_page_runs(title: str) -> None:
    foreign, (there, back) = FOREIGN[title](), SECTIONS[title]
    names = {"jax": jax, "jnp": jnp, "fdc": fdc, **foreign.names}
    execute(there, names)
    for got, want in zip(ours(names["params"], foreign.xs), foreign[2:], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    # Other weights go there and come back the same: with the lines above, which were just proved,
    # this proves the lines below.
    names["params"] = params = shake(names["params"])
    execute(back, names)
    del names["params"]
    execute(there, names)
    assert jax.tree.structure(names["params"]) == jax.tree.structure(params)
    for got, want in zip(jax.tree.leaves(names["params"]), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_every_cell_of_the_page_is_run() -> None:
    assert set(SECTIONS) == set(FOREIGN)
    blocks = PAGE.read_text().count("```python")
    first, in_a_layer = 1, 2  # a block of imports, and two on weights in a layer's tree
    orbax = 1  # run by test_a_stock_checkpoint_leaves_the_streams_of_nnx_layers_alone
    assert blocks == first + 2 * len(FOREIGN) + in_a_layer + orbax


def test_a_haiku_gru_is_another_function() -> None:
    """It resets h before its product: swapping gates and signs does not make it ours."""
    hk = pytest.importorskip("haiku")
    core = hk.without_apply_rng(hk.transform(lambda x, h: hk.GRU(UNITS)(x, h)))
    h = jnp.ones((BATCH, UNITS)) / 2
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        weights = shake(core.init(jax.random.key(0), inputs()[0], h))["gru"]
        want, _ = core.apply({"gru": weights}, inputs()[0], h)

    def regate(array: jax.Array) -> jax.Array:
        z, r, a = jnp.split(array, 3, -1)
        return jnp.concatenate([r, -z, a], -1)

    w_i, w_h, b = (regate(weights[name]) for name in ("w_i", "w_h", "b"))
    params = fdc.GRUParams(w_i, w_h, b, None)
    got, _ = fdc.gru_cell(params, h, inputs()[0])
    assert np.abs(got - want).max() > 0.05
    # Where nothing is reset, both are one function.
    wide = params._replace(bias=params.bias.at[:UNITS].set(100.0))
    open_gate = {**weights, "b": weights["b"].at[UNITS : 2 * UNITS].set(100.0)}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        want, _ = core.apply({"gru": open_gate}, inputs()[0], h)
    np.testing.assert_allclose(fdc.gru_cell(wide, h, inputs()[0])[0], want, rtol=1e-5, atol=1e-6)

"""The linear cells in linen's and NNX's hosts, against their papers' loops in NumPy."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy_linear_cells as in_numpy
import pytest
from asserts import assert_close as assert_tree_close
from asserts import assert_same
from flax import nnx

import flax_dropout_cell as fdc

FEATURES, UNITS, BATCH, STEPS, KEEP = 3, 8, 2, 5, 0.6
XS = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, STEPS, FEATURES)), jnp.float32)
KEY = jax.random.key(4)
SPEC = fdc.RecurrentDropout(
    input=fdc.Dropout(keep_prob=KEEP, variational=True),
    inside={
        "candidate": fdc.Dropout(keep_prob=KEEP, variational=True),
        "hidden": fdc.Dropout(keep_prob=KEEP, variational=True, scale=False),
    },
)


class Kind(NamedTuple):
    module: str
    pure: Callable[..., Any]
    in_numpy: Callable[..., Any]
    init: Callable[..., Any]


KINDS = {
    "lru": Kind("LRUCell", fdc.lru_cell, in_numpy.lru, fdc.init_lru),
    "min_gru": Kind("MinGRUCell", fdc.min_gru_cell, in_numpy.min_gru, fdc.init_min_gru),
    "min_lstm": Kind("MinLSTMCell", fdc.min_lstm_cell, in_numpy.min_lstm, fdc.init_min_lstm),
    "rg_lru": Kind("RGLRUCell", fdc.rg_lru_cell, in_numpy.rg_lru, fdc.init_rg_lru),
}
kinds = pytest.mark.parametrize("name", KINDS)
frameworks = pytest.mark.parametrize("framework", ["linen", "nnx"])


def weights(name: str) -> Any:
    params = KINDS[name].init(jax.random.key(0), FEATURES, UNITS)
    if name == "lru":
        return params
    bias = np.random.default_rng(1).normal(size=params.bias.shape)
    return params._replace(bias=jnp.asarray(bias, jnp.float32))


def linen_cell(name: str) -> Any:
    return getattr(fdc.linen, KINDS[name].module)(UNITS)


def nnx_cell(name: str) -> Any:
    cell = getattr(fdc.nnx, KINDS[name].module)(FEATURES, UNITS, rngs=nnx.Rngs(0))
    nnx.update(cell, fdc.nnx.cell_params(weights(name), cell))
    return cell


def zeros(name: str) -> Any:
    return jnp.zeros((BATCH, UNITS), jnp.complex64 if name == "lru" else jnp.float32)


def by_hand(name: str, masks: fdc.Masks | None, xs: Any = XS) -> tuple[Any, Any]:
    """The last carry and the outputs `[batch, time, units]`."""
    params, carry, ys = weights(name), np.asarray(zeros(name)), []
    sites: dict[str, Any] = {}
    if masks is None:
        sites["hidden"] = lambda value, _: KEEP * value  # evaluation: nothing was scaled
    else:
        inside = {site: np.asarray(mask) for site, mask in masks.inside.items()}
        sites["hidden"] = lambda value, _: inside["hidden"] * value
        sites["candidate"] = lambda value, _: inside["candidate"] * value / KEEP
    for x in np.moveaxis(np.asarray(xs), 1, 0):
        if masks is not None:
            x = x * np.asarray(masks.input) / KEEP
        carry, y = KINDS[name].in_numpy(params, carry, x, sites)
        ys.append(y)
    return carry, np.stack(ys, 1)


assert_close = functools.partial(assert_tree_close, rtol=2e-5, atol=2e-5)


def masks_of(name: str) -> fdc.Masks:
    """Those of a key that is the sequence's own."""
    pure = KINDS[name].pure
    return fdc.draw_masks(weights(name), zeros(name), XS[:, 0], KEY, cell=pure, dropout=SPEC)


@kinds
def test_layers(name: str) -> None:
    cell = linen_cell(name)
    layer = fdc.linen.RNN(cell, SPEC, return_carry=True)
    variables = {"params": {"cell": fdc.linen.cell_params(weights(name), cell)["params"]}}
    other = fdc.nnx.RNN(nnx_cell(name), SPEC, return_carry=True)
    for run in (
        lambda **options: layer.apply(variables, XS, **options),
        lambda rng=None, **options: other(XS, rngs=rng, **options),
    ):
        assert_close(run(rng=KEY), by_hand(name, masks_of(name)))
        assert_close(run(deterministic=True), by_hand(name, None))


@kinds
def test_the_wrapper_in_stock_hosts(name: str) -> None:
    """With the masks that the host drew, which are in the carry that it returns."""
    cell = linen_cell(name)
    wrapped = nn.RNN(fdc.linen.DropoutCell(cell, SPEC), return_carry=True)
    variables = {"params": {"cell": fdc.linen.cell_params(weights(name), cell)["params"]}}
    in_nnx: Any = nnx.RNN(
        fdc.nnx.DropoutCell(nnx_cell(name), SPEC, rngs=nnx.Rngs(dropout=1)), return_carry=True
    )
    for carry, ys in (wrapped.apply(variables, XS, rngs={"dropout": KEY}), in_nnx(XS)):
        assert_close((carry.cell_carry, ys), by_hand(name, carry.masks))


@kinds
def test_both_directions(name: str) -> None:
    """In the stock Bidirectional, evaluated, as one direction runs from the end."""
    cell, spec = linen_cell(name), SPEC
    both = nn.Bidirectional(
        fdc.linen.RNN(cell, spec, deterministic=True),
        fdc.linen.RNN(cell.clone(), spec, deterministic=True),
    )
    params = {"cell": fdc.linen.cell_params(weights(name), cell)["params"]}
    variables = {"params": {"forward_rnn": params, "backward_rnn": params}}
    forth, back = by_hand(name, None)[1], by_hand(name, None, XS[:, ::-1])[1][:, ::-1]
    assert_close(both.apply(variables, XS), np.concatenate([forth, back], -1))
    rnns = (fdc.nnx.RNN(nnx_cell(name), spec, deterministic=True) for _ in range(2))
    in_nnx: Any = nnx.Bidirectional(*rnns)
    assert_close(in_nnx(XS), np.concatenate([forth, back], -1))


@kinds
def test_a_stack_with_residuals_trains(name: str) -> None:
    """Two layers, padded; padding has no effect, and every weight has a gradient."""

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
            x = nn.Dense(UNITS)(x)
            for _ in range(2):
                x = x + fdc.linen.RNN(linen_cell(name), SPEC)(x, seq_lengths=lengths)
            return x

    lengths, stack = jnp.array([3, STEPS]), Stack()
    variables = stack.init(jax.random.key(0), XS, lengths)

    def loss(variables: Any, xs: jax.Array) -> jax.Array:
        y = stack.apply(variables, xs, lengths, rngs={"dropout": KEY})
        return (jnp.asarray(y)[0, :3] ** 2).sum() + (jnp.asarray(y)[1] ** 2).sum()

    padded = XS.at[0, 3:].set(1e6)
    assert_close(loss(variables, padded), loss(variables, XS))
    gradients = jax.jit(jax.grad(loss))(variables, XS)
    assert all((jnp.abs(leaf) > 0).any() for leaf in jax.tree.leaves(gradients))


@kinds
def test_weights_there_and_back(name: str) -> None:
    params, cell, other = weights(name), linen_cell(name), nnx_cell(name)
    variables = fdc.linen.cell_params(params, cell)
    made = cell.init(jax.random.key(0), zeros(name), XS[:, 0])
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, made)
    for back in (
        fdc.linen.core_params(variables, cell),
        fdc.nnx.core_params(nnx.state(other), other),
    ):
        assert type(back) is type(params)
        jax.tree.map(np.testing.assert_array_equal, back, params)


class ParamsKey(nn.Module):
    """Gives the first key that linen makes for a module at the top."""

    def __call__(self) -> Any:
        return self.make_rng("params")


class TwoCells(nn.Module):
    make: Callable[[], Any]

    @nn.compact
    def __call__(self, carry: Any, x: jax.Array) -> Any:
        return [self.make()(carry, x) for _ in range(2)]


@kinds
@frameworks
def test_initial_weights_are_the_cores(name: str, framework: str) -> None:
    """Drawn from one key, the module's: the gamma of an LRU is then that of its nu."""
    kind, (carry, x) = KINDS[name], (zeros(name), XS[:, 0])

    def made(seed: int) -> dict[str, Any]:
        if framework == "linen":
            return dict(linen_cell(name).init(jax.random.key(seed), carry, x)["params"])
        return arrays_of(getattr(fdc.nnx, kind.module)(FEATURES, UNITS, rngs=nnx.Rngs(seed)))

    for seed in (5, 6):
        if framework == "linen":
            key: Any = ParamsKey().apply({}, rngs={"params": jax.random.key(seed)})
        else:
            key = nnx.Rngs(seed).params()
        wanted = kind.init(key, FEATURES, UNITS)._asdict()
        assert_same(made(seed), wanted)
        assert {leaf.dtype for leaf in made(seed).values()} == {jnp.dtype("float32")}
    if framework == "linen":
        two = TwoCells(lambda: linen_cell(name)).init(jax.random.key(0), carry, x)["params"]
        cells = [dict(params) for params in two.values()]
    else:
        rngs, make = nnx.Rngs(0), getattr(fdc.nnx, kind.module)
        cells = [arrays_of(make(FEATURES, UNITS, rngs=rngs)) for _ in range(2)]
    for one, other in ((made(5), made(6)), cells):
        for weight in one.keys() - {"bias"}:  # zeros
            assert (one[weight] != other[weight]).any(), weight


def arrays_of(cell: Any) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.state(cell))


@kinds
@frameworks
def test_half_precision(name: str, framework: str) -> None:
    """The state of an LRU stays complex64; eigenvalues and decays keep the weights' dtype."""
    x, options = XS[:, 0], {"dtype": jnp.bfloat16}
    if framework == "linen":
        cell = getattr(fdc.linen, KINDS[name].module)(UNITS, **options)
        carry = cell.initialize_carry(KEY, x.shape)
        (h, y), _ = cell.init_with_output(KEY, carry, x)
    else:
        cell = getattr(fdc.nnx, KINDS[name].module)(FEATURES, UNITS, **options, rngs=nnx.Rngs(0))
        h, y = cell(cell.initialize_carry(x.shape), x)
    assert h.dtype == zeros(name).dtype
    assert y.dtype == (jnp.bfloat16 if name == "lru" else jnp.float32)


def test_the_ring_of_an_lru_in_both() -> None:
    ring: Any = {"min_radius": 0.9, "max_radius": 0.99, "max_phase": 0.1}
    x = jnp.ones((1, FEATURES))
    cell = fdc.linen.LRUCell(500, **ring)
    made = cell.init(KEY, cell.initialize_carry(KEY, x.shape), x)["params"]
    other = fdc.nnx.LRUCell(FEATURES, 500, **ring, rngs=nnx.Rngs(0))
    for params in (made, nnx.to_pure_dict(nnx.state(other))):
        radii = np.exp(-np.exp(params["nu_log"]))
        assert 0.9 <= radii.min() < 0.91 and 0.98 < radii.max() <= 0.99
        assert np.exp(params["theta_log"]).max() <= 0.1


def test_a_first_carry_of_ones() -> None:
    cell = fdc.linen.LRUCell(UNITS, carry_init=nn.initializers.ones)
    first = cell.initialize_carry(KEY, (BATCH, FEATURES))
    np.testing.assert_array_equal(first, jnp.ones((BATCH, UNITS), jnp.complex64))
    other = fdc.nnx.LRUCell(FEATURES, UNITS, rngs=nnx.Rngs(0))
    made = other.initialize_carry((BATCH, FEATURES), nnx.Rngs(0), nnx.initializers.ones)
    np.testing.assert_array_equal(made, first)


MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "weights of another cell": (
        lambda: fdc.linen.cell_params(weights("min_gru"), fdc.linen.MinLSTMCell(8)),
        TypeError, "MinLSTMCell takes MinLSTMParams, got a MinGRUParams",
    ),
    "weights of another size": (
        lambda: fdc.nnx.cell_params(weights("lru"), fdc.nnx.LRUCell(3, 4, rngs=nnx.Rngs(0))),
        ValueError, r"nu_log must be \[4\] for this LRUCell, got \[8\]",
    ),
    "other variables": (
        lambda: fdc.linen.core_params({"params": {"ii": {}}}, fdc.linen.RGLRUCell(8)),
        ValueError, "RGLRUCell has the weights input_kernel, bias, decay_logit; .* hold ii",
    ),
    "a key for an initial carry in NNX": (
        lambda: nnx_cell("lru").initialize_carry((2, 3), None, nnx.initializers.normal()),
        ValueError, "carry_init needs rngs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str) -> None:
    run, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message) as caught:
        run()
    assert len(str(caught.value).splitlines()) <= 5


def test_the_weights_of_apply_without_variables_belong_together() -> None:
    """As in `init`, all are drawn at once: an LRU's gamma goes with its nu."""
    _, variables = fdc.linen.LRUCell(64).apply(
        {}, jnp.zeros((2, 64), jnp.complex64), jnp.ones((2, 3)),
        mutable=["params"], rngs={"params": jax.random.key(0)},
    )  # fmt: skip
    nu, gamma = (
        np.asarray(variables["params"][name], np.float64) for name in ("nu_log", "gamma_log")
    )
    np.testing.assert_allclose(np.exp(2 * gamma), -np.expm1(-2 * np.exp(nu)), rtol=1e-4)

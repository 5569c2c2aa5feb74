"""The scan that keeps weights' gradients out of its loop: `jax.lax.scan`'s numbers, always."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from op_by_op import op_by_op
from scan_cases import CASES, TAKES_RULES, Case

from flax_dropout_cell._hoist import three_parts, traced_scan
from flax_dropout_cell._hoist.hoisted_scan import scan_in_parts as scan

# Programs here are small and many, so the time to compile them dominates.
QUICKLY: Any = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SCALES = (1.0, 0.5)


def dot(first: Any, second: Any) -> jax.Array:
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, first, second)), start=jnp.zeros(()))


def scaled(arrays: dict[str, Any], scale: jax.Array) -> dict[str, Any]:
    """All but the weights, scaled: so that `vmap` over the scale leaves the weights alone."""
    return arrays | {
        name: jax.tree.map(lambda leaf: leaf * scale, arrays[name])
        for name in ("h", "c", "carry", "xs")
        if name in arrays
    }


def all_ways(case: Case, arrays: Any, along: Any, scan: Any = scan) -> dict[str, tuple[Any, Any]]:
    """The results of each transformation, of the hoisted scan and of `jax.lax.scan`."""

    def plain(arrays: Any, scale: Any) -> jax.Array:
        return case.loss(jax.lax.scan, scaled(arrays, scale))

    def loss(arrays: Any, scale: Any = 1.0) -> jax.Array:
        return case.loss(scan, scaled(arrays, scale))

    amplifies = jnp.array(SCALES)
    values, gradients = jax.vmap(jax.value_and_grad(plain), (None, 0))(arrays, amplifies)
    value, gradient = values[0], jax.tree.map(lambda leaf: leaf[0], gradients)
    slope, product = jax.jvp(
        lambda arrays: jax.value_and_grad(plain)(arrays, 1.0), (arrays,), (along,)
    )[1]
    linearized, push = jax.linearize(loss, arrays)
    total = jax.tree.map(lambda leaf: leaf.sum(0), gradients)
    return {
        "forward": (loss(arrays), value),
        "gradient": (jax.grad(loss)(arrays), gradient),
        "checkpoint": (jax.grad(jax.checkpoint(loss))(arrays), gradient),  # type: ignore
        "jvp": (jax.jvp(loss, (arrays,), (along,)), (value, slope)),
        "linearize": ((linearized, push(along)), (value, slope)),
        "vmap of grad": (jax.vmap(jax.grad(loss), (None, 0))(arrays, amplifies), gradients),
        "grad of vmap": (
            jax.grad(lambda arrays: jax.vmap(loss, (None, 0))(arrays, amplifies).sum())(arrays),
            total,
        ),
        "forward over reverse": (jax.jvp(jax.grad(loss), (arrays,), (along,))[1], product),
        "reverse over reverse": (
            jax.grad(lambda arrays: dot(jax.grad(loss)(arrays), along))(arrays),
            product,
        ),
        "reverse over forward": (
            jax.grad(lambda arrays: jax.jvp(loss, (arrays,), (along,))[1])(arrays),
            product,
        ),
    }


def is_hoisted(case: Case, arrays: Any) -> bool:
    jaxpr = jax.make_jaxpr(lambda arrays: case.run(scan, **arrays))(arrays)
    return "custom_jvp_call" in [eqn.primitive.name for eqn in jaxpr.jaxpr.eqns]


def assert_numbers_of_jax_lax_scan(case: Case, scan: Any = scan) -> None:
    arrays, along = case.arrays(0), case.arrays(1)
    run = op_by_op(lambda arrays, along: all_ways(case, arrays, along, scan))
    for name, (got, wanted) in run(arrays, along).items():
        jax.tree.map(
            lambda got, wanted, name=name: np.testing.assert_allclose(
                got, wanted, rtol=1e-9, atol=1e-9, err_msg=name
            ),
            got,
            wanted,
        )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_number_is_that_of_jax_lax_scan(case) -> None:
    assert is_hoisted(case, case.arrays(0)) == case.hoists
    assert_numbers_of_jax_lax_scan(case)


@pytest.fixture
def cut_wherever_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moves products of any size out of the loop: those of the cases are small."""
    monkeypatch.setattr(three_parts, "MIN_WEIGHT_TO_ROWS", 0.0)
    monkeypatch.setattr(three_parts, "MIN_WEIGHT_SIZE", 0)


# How many equations run before the loop and after it, if products of any size do.
CUTS = {
    "nn.LSTMCell": (4, 0),
    "masks closed over and in xs": (2, 0),
    "lengths with a counter": (1, 0),
    "tied and elementwise and an output": (1, 0),
    "masked copies that are made again after the loop": (2, 0),
    "attention": (1, 0),
    "products that are cut and then added": (1, 0),
    "a scale a divided and a subtracted weight": (1, 0),
    "a gate of the input alone": (1, 0),
    "a linear recurrent unit": (2, 2),
    "a transform inside a real cell": (1, 0),
    "loops inside": (1, 0),
    "no features": (1, 0),
    "reverse and unrolled": (1, 0),
    "an embedding looked up inside": (0, 1),
    "heads of the new state and the old": (1, 8),
    "a gated linear recurrence with a head": (2, 2),
}


@pytest.mark.usefixtures("float64", "cut_wherever_possible")
@pytest.mark.parametrize("name", CUTS)
def test_every_number_of_a_loop_that_is_cut(name, monkeypatch) -> None:
    found = []

    def spy(*args: Any) -> Any:
        found.append(three_parts.cut_loop(*args))
        return found[-1]

    monkeypatch.setattr(traced_scan, "cut_loop", spy)
    assert_numbers_of_jax_lax_scan(CASES[name])
    counts = [(len(cut.before), len(cut.after)) for cut in found]
    assert max(counts, key=sum) == CUTS[name]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "name", ["a linear recurrent unit", "a gated linear recurrence with a head"]
)
def test_every_number_without_a_loop(name) -> None:
    assert_numbers_of_jax_lax_scan(CASES[name], functools.partial(scan, parallel=True))


@pytest.mark.parametrize("name", ["nn.LSTMCell", "heads of the new state and the old"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_under_the_checks_of_jax(name, dtype) -> None:
    """They compare the shapes of equations, some of which run on the rows of all steps."""
    case, wide = CASES[name], CASES[name].arrays(dtype=jnp.float32)
    cast = functools.partial(jax.tree.map, lambda leaf: leaf.astype(dtype))

    def loss(scan: Any, arrays: Any) -> jax.Array:
        return case.loss(scan, cast(arrays)).astype(jnp.float32)

    unchecked = jax.grad(functools.partial(loss, scan))(wide)
    with jax.enable_checks(True):
        got = jax.grad(functools.partial(loss, scan))(wide)
    jax.tree.map(np.testing.assert_array_equal, got, unchecked)
    # test_half_precision judges the rest.
    if dtype == jnp.float32:
        wanted = jax.grad(functools.partial(loss, jax.lax.scan))(wide)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        jax.tree.map(close, got, wanted)


# Left to jax.lax.scan ----------------------------------------------------------------------------


@jax.custom_vjp
def with_a_backward_pass_alone(h: jax.Array) -> jax.Array:
    return jnp.tanh(h)


with_a_backward_pass_alone.defvjp(
    lambda h: (jnp.tanh(h), h), lambda h, cotangent: (cotangent * jnp.cos(h),)
)


@jax.custom_jvp
def spike(h: jax.Array) -> jax.Array:
    return (h > 0).astype(h.dtype)


@spike.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return spike(*primals), tangents[0] / (1 + jnp.abs(primals[0])) ** 2


def printing(h: jax.Array) -> jax.Array:
    jax.debug.callback(lambda h: None, h)
    return jnp.tanh(h)


ROW = jnp.ones((2, 4))
REASONS: dict[str, tuple[Any, Any, bool]] = {  # the function, the initial h, and why it is plain
    "nothing": (jnp.tanh, ROW, False),
    "a rule for one way only": (with_a_backward_pass_alone, ROW, True),
    "an effect": (printing, ROW, True),
    "a branch": (lambda h: jax.lax.cond(h[0, 0] > 0, jnp.tanh, jnp.sin, h), ROW, True),
    "many rows for a small weight": (jnp.tanh, jnp.ones((9, 4)), True),
    "a rule that is not the derivative": (spike, ROW, not TAKES_RULES),
}


@pytest.mark.parametrize(("function", "h", "plain"), REASONS.values(), ids=REASONS)
def test_what_is_not_hoisted(function, h, plain) -> None:
    def run(scan: Any, w: jax.Array) -> Any:
        def step(h: Any, x: Any) -> Any:
            h = function(h @ w + x)
            return h, h

        return scan(step, h, jnp.ones((3, *h.shape)))

    case = Case(run, {"w": (4, 4)}, hoists=not plain)
    arrays = case.arrays(0, "float32")
    assert is_hoisted(case, arrays) == case.hoists
    got, wanted = jax.jit(
        lambda arrays: [
            jax.grad(lambda arrays, scan=way: case.loss(scan, arrays))(arrays)["w"]
            for way in (scan, jax.lax.scan)
        ],
        compiler_options=QUICKLY,
    )(arrays)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_step_that_does_not_fit_gets_the_error_of_jax_lax_scan() -> None:
    with pytest.raises(TypeError, match="carry"):
        scan(lambda h, _: (h[:1], h), ROW, None, length=2)


@pytest.mark.parametrize("cast", [False, True], ids=["all of it", "the products"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype, cast) -> None:
    """The same dtypes and forward bits; gradients rounded once, after the sum over steps.

    With float32 weights `jax.lax.scan` rounds at each step, and adds in float32.
    """
    steps, units, wide = 40, 16, jnp.float32
    keys = jax.random.split(jax.random.key(0), 3)
    weights = {
        name: jax.random.normal(key, (units, units)) for name, key in zip("xh", keys, strict=False)
    }
    weights = jax.tree.map(lambda w: (w / 4).astype(wide if cast else dtype), weights)
    xs = jax.random.normal(keys[2], (steps, 2, units), dtype)

    def loss(weights: Any, xs: Any, scan: Any) -> tuple[jax.Array, jax.Array]:
        def step(h: Any, x: Any) -> Any:
            kernels = jax.tree.map(lambda w: w.astype(x.dtype), weights)
            h = jnp.tanh(x @ kernels["x"] + h @ kernels["h"])
            return h, h

        ys = scan(step, jnp.zeros_like(xs[0]), xs)[1]
        return ys.astype(wide).sum(), ys

    def gradient(weights: Any, xs: Any, scan: Any) -> Any:
        take = jax.grad(functools.partial(loss, scan=scan), has_aux=True)
        return jax.jit(take)(weights, xs)

    (got, ys), (plain, plain_ys) = (gradient(weights, xs, way) for way in (scan, jax.lax.scan))
    wide_weights = jax.tree.map(lambda w: w.astype(wide), weights)
    exact, _ = gradient(wide_weights, xs.astype(wide), jax.lax.scan)
    np.testing.assert_array_equal(ys, plain_ys)
    for name, wanted in exact.items():
        assert got[name].dtype == plain[name].dtype == weights[name].dtype
        error, plain_error = (
            jnp.abs(each[name].astype(wide) - wanted).max() for each in (got, plain)
        )
        rounding = float(jnp.finfo(dtype).eps) / 2 * jnp.abs(wanted).max()
        assert error <= plain_error + (rounding if cast else 0)


@pytest.mark.parametrize("cut", [False, True], ids=["in the loop", "cut"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_large_gradient_of_a_float32_weight(dtype, cut, request) -> None:
    """It adds up in float32, as that of `jax.lax.scan`, though the cell is in half precision."""
    if cut:
        request.getfixturevalue("cut_wherever_possible")
    steps, units, wide = 40, 8, jnp.float32
    weights = {
        "x": jnp.eye(units),
        "h": jnp.eye(units) / 8,
        "b": jnp.zeros((1, units)),
        "scale": jnp.ones((1, units)),
        "x_b": jnp.zeros((1, units)),
        "x_scale": jnp.ones((1, units)),
    }
    xs = jnp.ones((steps, 2, units), dtype)

    def loss(weights: Any, scan: Any) -> jax.Array:
        def step(h: Any, x: Any) -> Any:
            kernels = jax.tree.map(lambda w: w.astype(dtype), weights)
            joined = jnp.concatenate([kernels["x"], kernels["h"]])
            x = x * kernels["x_scale"] + kernels["x_b"]
            ahead = x @ kernels["x"]  # of no carry, so it may run before the loop
            h = h + ahead / 8
            h = (jnp.concatenate([x, h], -1) @ joined + kernels["b"]) * kernels["scale"]
            return h / 2, (h * kernels["h"][:2], h @ kernels["h"])

        h, ys = scan(step, jnp.zeros_like(xs[0]), xs)
        return sum((2000 * y.astype(wide)).sum() for y in ys) + h.astype(wide).sum()

    got, wanted = (
        jax.jit(jax.grad(functools.partial(loss, scan=s)))(weights) for s in (scan, jax.lax.scan)
    )
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted)) > 65504
    tolerance = 2 * float(jnp.finfo(dtype).eps)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=tolerance), got, wanted)


# Steps drawn at random ---------------------------------------------------------------------------

PARTS = "product,left product,scalar,bias,sum,times,tanh,join,cut,tied".split(",")
SIDE = 2


def random_step(parts: list[tuple[str, int, int]], weights: Any, h: Any, x: Any) -> Any:
    """A step that makes values `[2, 2 n]` of others, each part of those that its numbers pick."""
    values = [h, x]
    for part, first, second in parts:
        one, other = values[first % len(values)], values[second % len(values)]
        width, kernel = one.shape[1], weights["kernel"]
        if part in ("product", "tied"):
            side = kernel if part == "product" else kernel.T
            values.append(one @ side[:width, : SIDE * (1 + second % 2)])
        elif part == "left product":
            values.append(weights["left"] @ one)
        elif part == "scalar":
            values.append(one + other[0] @ kernel[: other.shape[1], 0])
        elif part == "bias":
            values.append(one + weights["bias"][:, :width])
        elif part in ("sum", "times") and one.shape == other.shape:
            values.append(one + other if part == "sum" else one * other)
        elif part == "tanh":
            values.append(jnp.tanh(one))
        elif part == "join" and width == SIDE == other.shape[1]:
            values.append(jnp.concatenate([one, other], -1))
        elif part == "cut" and width > SIDE:
            values.extend(jnp.split(one, 2, -1))
    return jnp.tanh(sum(value[:, :SIDE] for value in values)), values[-1]


@pytest.mark.usefixtures("float64")
@settings(max_examples=8)
@given(
    st.lists(
        st.tuples(st.sampled_from(PARTS), st.integers(0, 9), st.integers(0, 9)),
        min_size=6,
        max_size=14,
    )
)
def test_steps_drawn_at_random(parts) -> None:
    shapes: Any = {"kernel": (4, 4), "left": (SIDE, SIDE), "bias": (1, 4)}
    shapes |= {"h": (2, SIDE), "xs": (3, 2, SIDE)}

    def run(scan: Any, h: Any, xs: Any, **weights: Any) -> Any:
        return scan(lambda h, x: random_step(parts, weights, h, x), h, xs)

    case = Case(run, shapes, hoists=True)

    def derivatives(scan: Any, arrays: Any, along: Any) -> Any:
        def push(arrays: Any) -> Any:
            return jax.jvp(lambda arrays: case.loss(scan, arrays), (arrays,), (along,))

        value, vjp = jax.vjp(push, arrays)
        return value, vjp((1.0, 0.0)), vjp((0.0, 1.0))

    both = op_by_op(lambda *args: (derivatives(scan, *args), derivatives(jax.lax.scan, *args)))
    got, wanted = both(case.arrays(0), case.arrays(1))
    jax.tree.map(
        lambda got, wanted: np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-8),
        got,
        wanted,
    )

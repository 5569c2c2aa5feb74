"""`fdc.scan` is called as `jax.lax.scan` is, and `fdc.explain_scan` tells what it does."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_dropout_cell as fdc
from flax_dropout_cell._hoist import three_parts
from flax_dropout_cell._hoist.flat_jaxpr import flatten

WIDE, ROW = jnp.eye(128) / 2, jnp.ones((1, 128))
ROWS = jnp.ones((300, 128))
XS = jnp.linspace(-1, 1, 6 * 128).reshape(6, 1, 128)


def step_of(w: Any, u: Any, function: Any = jnp.tanh) -> Any:
    def step(h: Any, x: Any) -> Any:
        h = function(x @ w + h @ u)
        return h, h

    return step


def test_it_has_the_signature_of_jax_lax_scan() -> None:
    own, wanted = (inspect.signature(scan).parameters for scan in (fdc.scan, jax.lax.scan))
    defaults = [(name, own[name].kind, own[name].default) for name in own]
    names = list(wanted)[1 : len(own)]  # the first is called f there
    assert [name for name, *_ in defaults][1:] == names
    assert [default for *_, default in defaults] == [
        wanted[name].default for name in list(wanted)[: len(own)]
    ]


@pytest.mark.parametrize("options", [(), (6, True), (None, False, 2)])
def test_its_numbers(options) -> None:
    def results(scan: Any, w: Any) -> Any:
        def loss(w: Any) -> Any:
            h, ys = scan(step_of(w, w), ROW, XS, *options)
            return (ys**2).sum(), (h, ys)

        return jax.grad(loss, has_aux=True)(w)

    got, wanted = (
        jax.jit(results, static_argnums=0)(way, WIDE) for way in (fdc.scan, jax.lax.scan)
    )
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got, wanted)


def test_without_inputs() -> None:
    h, ys = fdc.scan(lambda h, _: (h + 1, None), jnp.zeros(2), length=3)
    assert h.tolist() == [3, 3] and ys is None


MISTAKES: dict[str, Any] = {
    "no length": lambda scan: scan(lambda h, x: (h, x), ROW, None),
    "another length": lambda scan: scan(lambda h, x: (h, x), ROW, XS, 5),
    "two lengths": lambda scan: scan(lambda h, x: (h, x), ROW, (XS, XS[:2])),
    "a number as inputs": lambda scan: scan(lambda h, x: (h, x), ROW, jnp.ones(())),
    "no pair": lambda scan: scan(lambda h, x: h, ROW, XS),
    "another carry": lambda scan: scan(lambda h, x: ((h, h), x), ROW, XS),
    "another shape": lambda scan: scan(lambda h, x: (h[:, :1], x), ROW, XS),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_get_the_errors_of_jax_lax_scan(mistake) -> None:
    with pytest.raises(Exception) as wanted:
        mistake(jax.lax.scan)
    with pytest.raises(wanted.type) as got:
        mistake(fdc.scan)
    assert str(got.value) == str(wanted.value)


# The explanation ---------------------------------------------------------------------------------


def test_the_explanation_of_few_rows() -> None:
    told = fdc.explain_scan(step_of(WIDE, 2 * WIDE), ROW, XS)
    assert told.why_plain is None
    assert told.before == ("dot_general: float32[6,1,128]",)
    assert told.loop == ("dot_general: float32[1,128]", "1 add, 1 tanh")
    assert told.gradients_after == ("float32[128,128]",) * 2
    assert told.gradients_in_loop == told.after == ()
    assert told.obstacle == "it goes through dot_general"


def headed(width: int, h: Any) -> Any:
    head = jnp.ones((128, width))

    def step(h: Any, x: Any) -> Any:
        h = jnp.tanh(x @ WIDE + h @ WIDE)
        return h, h @ head

    return fdc.explain_scan(step, h, jnp.ones((6, *h.shape)))


def test_shapes_are_explained_as_arrays_are() -> None:
    carry, xs = (jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (ROW, XS))
    assert fdc.explain_scan(step_of(WIDE, WIDE), carry, xs) == fdc.explain_scan(
        step_of(WIDE, WIDE), ROW, XS
    )


def test_the_explanation_of_a_head() -> None:
    told = headed(256, ROW)
    assert told.loop == ("dot_general: float32[1,128]", "1 add, 1 tanh")
    assert told.after == ("dot_general: float32[6,1,256]",)
    assert headed(64, ROW).after == headed(256, ROWS).after == ()


def test_a_head_stays_in_the_loop_if_too_much_memory_would_wait_for_it(monkeypatch) -> None:
    """The loop would keep 128 numbers for each of its 129 outputs, or of its 127."""
    monkeypatch.setattr(three_parts, "MAX_KEPT_BYTES", 0)
    monkeypatch.setattr(three_parts, "MIN_WEIGHT_SIZE", 0)
    assert headed(129, ROW).after and not headed(127, ROW).after


def test_a_head_whose_weight_is_cast_at_each_step_stays_in_the_loop() -> None:
    """The gradient of the scale adds up in float32, at each step."""
    head, scale, half = jnp.ones((128, 256)), jnp.ones((1, 256)), jnp.bfloat16

    def explain(is_scaled: bool) -> Any:
        def step(h: Any, x: Any) -> Any:
            h = jnp.tanh(x @ WIDE + h @ WIDE)
            y = h.astype(half) @ head.astype(half)
            return h, y * scale.astype(half) if is_scaled else y

        return fdc.explain_scan(step, ROW, XS)

    assert explain(False).after and not explain(True).after


def test_a_callback_that_cannot_be_mapped_stays_in_the_loop() -> None:
    head = jnp.linspace(-1, 1, 128 * 256).reshape(128, 256)

    def run(scan: Any, on_host: bool) -> Any:
        def step(h: Any, x: Any) -> Any:
            h = jnp.tanh(x @ WIDE + h @ WIDE)
            y = h @ head
            if not on_host:
                return h, jnp.sin(y)
            return h, jax.pure_callback(np.sin, jax.ShapeDtypeStruct(y.shape, y.dtype), y)

        return scan(step, ROW, XS)

    assert run(fdc.explain_scan, False).after and not run(fdc.explain_scan, True).after
    got, wanted = run(fdc.scan, True), run(jax.lax.scan, False)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got, wanted)


def test_the_explanation_of_linear_recurrences() -> None:
    def step(carry: Any, x: Any) -> Any:
        a, b = carry
        return (0.5 * a + x, jnp.sin(x) * b + a), a + b

    told = fdc.explain_scan(step, (ROW, ROW), XS)
    assert told.obstacle is None and str(told).endswith("a linear recurrence       yes")
    told = fdc.explain_scan(lambda c, x: ((c[0], jnp.sin(c[1])), x), (ROW, ROW), XS)
    assert told.obstacle == "[1] goes through sin"


def test_the_explanation_of_many_rows_and_other_uses() -> None:

    def step(h: Any, x: Any) -> Any:
        h = jnp.maximum(x @ WIDE + h @ jnp.sort(WIDE), ROWS)
        return h, h

    told = fdc.explain_scan(step, ROWS, jnp.ones((2, 300, 128)))
    assert told.before == told.gradients_after == ()
    assert told.once == ("1 sort",)
    assert sorted(told.gradients_in_loop) == [
        "float32[128,128]: small compared with its rows",
        "float32[128,128]: small compared with its rows",
        "float32[300,128]: used in max",
    ]


@jax.custom_vjp
def rule_for_one_way(h: Any) -> Any:
    return h


rule_for_one_way.defvjp(lambda h: (h, None), lambda _, cotangent: (cotangent,))


def printing(h: Any) -> Any:
    jax.debug.callback(lambda h: None, h)
    return h


REASONS = {
    "custom_vjp": (rule_for_one_way, "jax.custom_vjp"),
    "effect": (printing, "side effects"),
    "cond": (lambda h: jax.lax.cond(h[0, 0] > 0, jnp.sin, jnp.cos, h), "jax.lax.cond"),
    "carry": (lambda h: h.astype(jnp.bfloat16), "the carry changes"),
}


@pytest.mark.parametrize(("function", "reason"), REASONS.values(), ids=REASONS)
def test_the_explanation_of_a_step_that_is_left_alone(function, reason) -> None:
    told = fdc.explain_scan(step_of(WIDE, WIDE, function), ROW, XS)
    assert told.why_plain is not None and reason in told.why_plain
    assert str(told) == f"jax.lax.scan as it is: {told.why_plain}"


# The cut -----------------------------------------------------------------------------------------


def test_a_step_is_cut_by_what_its_equations_depend_on() -> None:
    def step(h: Any, x: Any) -> Any:
        h = jnp.tanh(jnp.exp(x) + jnp.sin(h))
        return h, jnp.cos(h) * x

    program = flatten(jax.make_jaxpr(step)(ROW, ROW))
    before, others = three_parts.split_by_carry(program.equations, [0])
    after = three_parts.only_for_ys(program.equations, [0], program.outputs[:1])
    assert [each.name for each in before] == ["exp"]
    assert [each.name for each in others] == ["sin", "add", "tanh", "cos", "mul"]
    assert [each.name for each in after] == ["cos", "mul"]


@pytest.mark.parametrize(
    "case", ["piece, output", "piece, read twice", "another width", "a summand", "a sum", "both"]
)
def test_summands_may_be_read_elsewhere(case: str) -> None:
    """Its cotangent is then another than that of the sum that it goes into."""
    keys, width = jax.random.split(jax.random.key(0), 4), 48 if case == "another width" else 32
    wx, wh, h = (
        jax.random.normal(key, shape) / 4
        for key, shape in zip(keys, ((16, width), (16, 32), (2, 16)), strict=False)
    )
    xs = jax.random.normal(keys[3], (5, 2, 16))

    def loss(scan: Any, wx: Any, wh: Any) -> Any:
        def step(h: Any, x: Any) -> Any:
            of_x, of_h = x @ wx, h @ wh
            if case in ("a summand", "a sum", "both"):
                z = of_x + of_h
                first, second = jnp.split(z + 1, 2, -1)
                y = {"a summand": (of_x,), "a sum": (z,), "both": (of_h, z)}[case]
                return jnp.tanh(first) * jax.nn.sigmoid(second), y
            a, b, c, d = of_x[:, :16], of_x[:, 16:32], of_h[:, :16], of_h[:, 16:32]
            gate = jax.nn.sigmoid(b + d)
            if case == "piece, read twice":
                gate = gate * jnp.tanh(a)
            return jnp.tanh(a + c) * gate, ((a if case == "piece, output" else gate),)

        last, ys = scan(step, h, xs)
        return (last**2).sum() + sum(jnp.sin(y).sum() for y in ys)

    got, wanted = (
        jax.jit(jax.grad(loss, (1, 2)), static_argnums=0)(scan, wx, wh)
        for scan in (fdc.scan, jax.lax.scan)
    )
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)

"""Scans whose carry is a linear recurrence: all steps at once, the numbers of a loop."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hand_masks import site_key
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from op_by_op import op_by_op
from quick_prng import quick_key

import flax_dropout_cell as fdc
from flax_dropout_cell import linen
from flax_dropout_cell import nnx as fdc_nnx
from flax_dropout_cell._hoist import hoisted_scan, linear_recurrence
from flax_dropout_cell._hoist.flat_jaxpr import all_equations

T, B, D, H = 6, 3, 2, 4
close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)


def assert_close(got: Any, wanted: Any) -> None:
    jax.tree.map(close, got, wanted)


def draw(seed: int, *shape: int, dtype: Any = None) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype or float)


@pytest.fixture(params=["step by step", "at once"])
def solver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The solver of CPUs, and that of all other platforms."""
    if request.param == "at once":
        other = linear_recurrence._solve_at_once
        monkeypatch.setattr(linear_recurrence, "_solve_step_by_step", other)


# The recurrence itself ---------------------------------------------------------------------------


def loop(slope: jax.Array, offset: jax.Array, *, reverse: bool) -> jax.Array:
    def step(h: jax.Array, now: Any) -> Any:
        h = now[0] * h + now[1]
        return h, h

    return jax.lax.scan(step, jnp.zeros_like(offset[0]), (slope, offset), reverse=reverse)[1]


def all_ways(solve: Any, slope: jax.Array, offset: jax.Array) -> dict[str, Any]:
    """Derivatives of a real number that the recurrence gives, of up to the third order."""

    def loss(slope: jax.Array, offset: jax.Array) -> jax.Array:
        h = solve(slope, offset)
        return jnp.sum(jnp.abs(h) ** 2) + jnp.sum(jnp.sin(h).real)

    def size(gradient: Any) -> Any:
        return sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in gradient)

    both, along = (slope, offset), (offset, slope)
    grad = jax.grad(loss, (0, 1))

    def forward(slope: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.jvp(loss, (slope, offset), along)[1]

    return {
        "value": solve(slope, offset),
        "gradient": grad(*both),
        "checkpoint": jax.grad(jax.checkpoint(loss), (0, 1))(*both),  # type: ignore[attr-defined]
        "jvp": forward(*both),
        "linearize": jax.linearize(loss, *both)[1](*along),
        "vmap of grad": jax.vmap(grad, (1, None), 1)(slope, offset[:, 0]),
        "grad of vmap": jax.grad(lambda *args: jax.vmap(loss, 1)(*args).sum(), (0, 1))(*both),
        "forward over reverse": jax.jvp(grad, both, along)[1],
        "reverse over reverse": jax.grad(lambda *args: size(grad(*args)), (0, 1))(*both),
        "reverse over forward": jax.grad(forward, (0, 1))(*both),
        "three times": jax.grad(
            lambda *args: jax.jvp(lambda *args: size(grad(*args)), args, along)[1], (0, 1)
        )(*both),
    }


@pytest.mark.usefixtures("float64", "solver")
@pytest.mark.parametrize(("dtype", "reverse"), [("float64", True), ("complex128", False)])
def test_derivatives_are_those_of_the_loop(dtype, reverse) -> None:
    slope, offset = draw(0, T, B, 2, dtype=dtype), draw(1, T, B, 2, dtype=dtype)
    got, wanted = (
        jax.jit(
            lambda *args, solve=solve: all_ways(functools.partial(solve, reverse=reverse), *args)
        )(slope, offset)
        for solve in (linear_recurrence.linear_recurrence, loop)
    )
    for name in wanted:
        assert_close(got[name], wanted[name])


@pytest.mark.usefixtures("float64", "solver")
def test_the_numbers_are_those_of_numpy() -> None:
    slope, offset = draw(0, T, B), draw(1, T, B)
    h, wanted = np.zeros(B), []
    for a, b in zip(np.asarray(slope), np.asarray(offset), strict=True):
        wanted.append(h := a * h + b)
    assert_close(linear_recurrence.linear_recurrence(slope, offset), np.stack(wanted))


def test_the_gradient_keeps_nothing_of_the_solver() -> None:
    """The tree of a parallel scan has products at every level; its derivative keeps them all."""

    def memory(solve: Any) -> int:
        loss = jax.grad(lambda *args: jnp.sum(jnp.sin(solve(*args))), (0, 1))
        shape = jax.ShapeDtypeStruct((1024, 256), jnp.float32)
        analysis = jax.jit(loss).lower(shape, shape).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    tree = functools.partial(linear_recurrence._solve_at_once, reverse=False)
    assert memory(linear_recurrence.linear_recurrence) < memory(tree) / 2


# Steps -------------------------------------------------------------------------------------------


def gated(params: Any, h: jax.Array, x: jax.Array, disturb: Any = fdc.undisturbed) -> Any:
    """A cell whose carry is a linear recurrence, with the sites of this library's cells."""
    decay = jax.nn.sigmoid(x @ params["decay"])
    h = disturb("hidden", decay * h + disturb("candidate", jnp.tanh(x @ params["in"])), h)
    return h, h @ params["out"]


def gated_arrays(dtype: Any = None) -> tuple[Any, jax.Array, jax.Array]:
    params = {"decay": draw(0, D, H), "in": draw(1, D, H), "out": draw(2, H, H)}
    return (
        jax.tree.map(lambda leaf: leaf.astype(dtype or float), params),
        draw(3, B, H, dtype=dtype),
        draw(4, T, B, D, dtype=dtype),
    )


KEY = quick_key(7)
DROP = fdc.Dropout(keep_prob=0.6, scale=False)
TIED = fdc.Dropout(keep_prob=0.6, variational=True)
ONCE = fdc.Dropout(keep_prob=0.6, variational=True, scale=False)
SPECS: dict[str, fdc.RecurrentDropout] = {
    "none": fdc.RecurrentDropout(),
    "state dropout": fdc.RecurrentDropout(state=DROP),
    "state dropout, tied": fdc.RecurrentDropout(state=ONCE),
    "zoneout": fdc.RecurrentDropout(state=fdc.Zoneout(prob=0.4)),
    "zoneout inside": fdc.RecurrentDropout(inside={"hidden": fdc.Zoneout(prob=0.4)}),
    "Gaussian noise": fdc.RecurrentDropout(state=fdc.GaussianNoise(stddev=0.3)),
    "candidate": fdc.RecurrentDropout(inside={"candidate": fdc.Dropout(keep_prob=0.6)}),
    "weights": fdc.RecurrentDropout(params={"decay": None, "in": TIED, "out": DROP}),
    "all": fdc.RecurrentDropout(
        params={"decay": TIED, "in": None, "out": None},
        input=TIED,
        state=DROP,
        output=fdc.Dropout(keep_prob=0.7),
        inside={"candidate": TIED, "hidden": fdc.Zoneout(prob=0.4)},
    ),
}
RESETS = jnp.array([[0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]], bool)
LENGTHS = jnp.array([6, 2, 0])
IDS = jnp.cumsum(RESETS, 0) * B + jnp.arange(B)[None]
SEQUENCES: dict[str, dict[str, Any]] = {
    "whole": {},
    "reverse": {"reverse": True},
    "later": {"start": 5},
    "lengths": {"seq_lengths": LENGTHS},
    "resets": {"resets": RESETS},
    "resets, reverse": {"resets": RESETS, "reverse": True, "reset_carry": jnp.full((B, H), 0.5)},
    "ids": {"resets": RESETS, "sequence_ids": IDS, "seq_lengths": LENGTHS},
    "chunks": {"checkpoint_every": 4, "resets": RESETS},
    "unrolled": {"unroll": 2},
}


def run(
    parallel: bool | None, rng: Any = KEY, *, cell: Any = gated, arrays: Any, **options: Any
) -> Any:
    params, carry, xs = arrays
    return fdc.dropout_scan(params, carry, xs, rng, cell=cell, parallel=parallel, **options)


def both_ways(**options: Any) -> list[Any]:
    """Results and gradients, of a loop and in parallel."""

    def loss(arrays: Any, parallel: bool) -> Any:
        results = run(parallel, arrays=arrays, **options)
        return sum(jnp.sum(jnp.sin(leaf).real) for leaf in jax.tree.leaves(results)), results

    arrays = options.pop("arrays")
    return [
        jax.jit(jax.grad(functools.partial(loss, parallel=parallel), has_aux=True))(arrays)
        for parallel in (False, True)
    ]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_noise_gives_the_numbers_of_the_loop(spec) -> None:
    assert_close(*both_ways(arrays=gated_arrays(), dropout=spec))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", SEQUENCES.values(), ids=SEQUENCES)
def test_resets_padding_and_the_rest(options) -> None:
    assert_close(*both_ways(arrays=gated_arrays(), dropout=SPECS["all"], **options))


# Their masks are floats, which a reset keeps or draws again.
FLOAT_MASKS: dict[str, fdc.Noise] = {
    "Gaussian noise": fdc.GaussianNoise(stddev=0.3, variational=True),
    "concrete dropout": fdc.ConcreteDropout(logit=-1.0, variational=True),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("noise", FLOAT_MASKS.values(), ids=FLOAT_MASKS)
@pytest.mark.parametrize("ids", [None, IDS], ids=["by place", "by id"])
def test_resets_redraw_masks_of_floats_in_parallel(noise, ids) -> None:
    spec = fdc.RecurrentDropout(input=noise, output=TIED, inside={"candidate": noise})
    options: dict[str, Any] = {"resets": RESETS, "sequence_ids": ids}
    arrays = gated_arrays()
    assert_close(*both_ways(arrays=arrays, dropout=spec, **options))
    assert_close(*both_ways(arrays=arrays, dropout=spec, reverse=True, **options))
    _, ys = run(True, arrays=arrays, dropout=fdc.RecurrentDropout(input=noise), **options)
    frozen = run(
        True, arrays=arrays, dropout=fdc.RecurrentDropout(input=noise), resets=RESETS & False
    )
    if ids is None:  # up to a row's first reset it has the masks of a sequence without one
        close(ys[:2, 2], frozen[1][:2, 2])
        assert (np.abs(ys[0, 1] - frozen[1][0, 1]) > 1e-3).any()


def test_masks_of_a_reset_are_drawn_once() -> None:
    """The loop over the masks draws them; nothing else of the program does."""
    options: dict[str, Any] = {"resets": RESETS, "dropout": fdc.RecurrentDropout(input=TIED)}
    jaxpr = jax.make_jaxpr(lambda arrays: run(True, jax.random.key(0), arrays=arrays, **options))(
        gated_arrays()
    )
    drawn = [
        eqn.outvars[0].aval.shape
        for eqn in all_equations(jaxpr.jaxpr)
        if eqn.params.get("name") == "_draw"
    ]
    assert len(drawn) == 2  # before the loop, and in it
    assert all(T not in shape for shape in drawn)


def test_the_key_of_a_reset_is_not_used_twice() -> None:
    with jax.debug_key_reuse(True):
        run(
            True,
            jax.random.key(0),
            arrays=gated_arrays(),
            dropout=fdc.RecurrentDropout(input=TIED),
            resets=RESETS,
        )


@pytest.mark.usefixtures("float64")
def test_a_float_that_a_step_computes_with_is_not_stepped_through() -> None:
    """Kept or replaced it has a loop of its own; anything else would be the loop to be avoided."""
    row, xs = draw(0, *ROW), draw(1, *XS)

    def kept(carry: Any, x: jax.Array) -> Any:
        held, h = carry
        held = jax.lax.cond(x.sum() > 0, lambda old: x, lambda old: old, held)
        return (held, held * h + x), h

    def computed(carry: Any, x: jax.Array) -> Any:
        held, h = carry
        held = jax.lax.cond(x.sum() > 0, lambda old: x, lambda old: jnp.sin(old), held)
        return (held, held * h + x), h

    def chosen_by_itself(carry: Any, x: jax.Array) -> Any:
        held, h = carry
        held = jnp.where(held > 0, x, held)
        return (held, held * h + x), h

    def branched_by_itself(carry: Any, x: jax.Array) -> Any:
        held, h = carry
        held = jax.lax.cond(held.sum() > 0, lambda old: x, lambda old: old, held)
        return (held, held * h + x), h

    carry = (row, row)
    assert_close(
        hoisted_scan.scan_in_parts(kept, carry, xs, parallel=True), jax.lax.scan(kept, carry, xs)
    )
    for step in (computed, chosen_by_itself, branched_by_itself):
        with pytest.raises(ValueError, match="parallel=True needs a carry"):
            hoisted_scan.scan_in_parts(step, carry, xs, parallel=True)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rng", [None, "threefry2x32", "rbg", "unsafe_rbg"])
def test_every_prng(rng) -> None:
    rng = rng and jax.random.key(3, impl=rng)
    loop, parallel = (
        run(each, rng, arrays=gated_arrays(), dropout=SPECS["all"]) for each in (False, True)
    )
    assert_close(parallel, loop)


def mask_of(rng: Any, step: int, site: str, shape: Any, noise: Any, name: str = "") -> Any:
    """A mask as docs/randomness.md says that its key is made."""
    key = site_key(rng, site, step, inside=name)
    return np.asarray(noise.draw_mask(key, shape, jnp.float64))


@pytest.mark.usefixtures("float64", "solver")
def test_masks_folded_into_a_and_b_by_hand() -> None:
    """Zoneout, then dropout of the state, as the numbers `a` and `b` of a NumPy loop."""
    params, h, x = gated_arrays()
    zoneout, candidate = fdc.Zoneout(prob=0.4), fdc.Dropout(keep_prob=0.6)
    spec = fdc.RecurrentDropout(state=DROP, inside={"hidden": zoneout, "candidate": candidate})
    last, ys = run(True, arrays=(params, h, x), dropout=spec)
    params, h, x = jax.tree.map(np.asarray, (params, h, x))
    for step in range(T):
        z, g, d = (
            mask_of(KEY, step, "inside", (B, H), zoneout, "hidden"),
            mask_of(KEY, step, "inside", (B, H), candidate, "candidate"),
            mask_of(KEY, step, "state", (B, H), DROP),
        )
        a = 1 / (1 + np.exp(-x[step] @ params["decay"]))
        b = np.tanh(x[step] @ params["in"]) * g / 0.6
        close(ys[step], ((z * a + (1 - z)) * h + z * b) @ params["out"])
        h = d * (z * a + (1 - z)) * h + d * z * b
    close(last, h)


@pytest.mark.usefixtures("float64")
def test_an_actor_step_by_step_and_a_learner_in_parallel() -> None:
    spec, (params, h, x) = SPECS["all"], gated_arrays()
    last, ys = run(True, arrays=(params, h, x), dropout=spec, start=3)
    masks = fdc.draw_masks(params, h, x[0], KEY, cell=gated, dropout=spec)
    for t, now in enumerate(x):
        h, y = fdc.dropout_cell(
            params, h, now, KEY, step=3 + t, cell=gated, dropout=spec, masks=masks
        )
        close(ys[t], y)
    close(last, h)


@pytest.mark.usefixtures("float64")
def test_complex_states() -> None:
    """The linear recurrent unit of Orvieto et al. 2023, in five lines."""

    def lru(params: Any, h: jax.Array, x: jax.Array, disturb: Any = fdc.undisturbed) -> Any:
        decay = jnp.exp(jax.lax.complex(-jnp.exp(params["log"]), params["angle"]))
        h = disturb("hidden", decay * h + (x @ params["in"]).astype(h.dtype), h)
        return h, (h @ params["out"]).real

    params = {"log": draw(0, 1, H), "angle": draw(1, 1, H), "in": draw(2, D, H)}
    params["out"] = draw(3, H, 2, dtype=complex)
    arrays = (params, draw(4, B, H, dtype=complex), draw(5, T, B, D))
    spec = fdc.RecurrentDropout(state=DROP, inside={"hidden": fdc.Zoneout(prob=0.4)})
    assert_close(*both_ways(arrays=arrays, dropout=spec, cell=lru, resets=RESETS))


@pytest.mark.usefixtures("float64")
def test_derivatives_of_all_orders() -> None:
    spec = fdc.RecurrentDropout(state=ONCE, inside={"candidate": TIED})
    arrays, along = gated_arrays(), jax.tree.map(lambda leaf: leaf + 1, gated_arrays())

    def ways(parallel: bool, arrays: Any, along: Any) -> dict[str, Any]:
        def loss(arrays: Any) -> jax.Array:
            last, ys = run(parallel, arrays=arrays, dropout=spec)
            return jnp.sum(jnp.sin(ys)) + jnp.sum(last**2)

        def forward(arrays: Any) -> jax.Array:
            return jax.jvp(loss, (arrays,), (along,))[1]

        return {
            "jvp": forward(arrays),
            "forward over reverse": jax.jvp(jax.grad(loss), (arrays,), (along,))[1],
            "reverse over forward": jax.grad(forward)(arrays),
            "vmap of grad": jax.vmap(
                lambda scale: jax.grad(loss)(jax.tree.map(lambda leaf: leaf * scale, arrays))
            )(jnp.array([1.0, 0.5])),
        }

    loop, parallel = (
        op_by_op(functools.partial(ways, each))(arrays, along) for each in (False, True)
    )
    assert_close(parallel, loop)


@pytest.mark.usefixtures("solver")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_rounded_once(dtype) -> None:
    """A sum of many small numbers, which stands still if each step is rounded."""
    decay, xs = 1 - 2.0**-7, jnp.ones((512, 1), dtype)
    h, ys = hoisted_scan.scan_in_parts(
        lambda h, x: (jnp.asarray(decay, dtype) * h + x, h), xs[0], xs, parallel=True
    )
    assert h.dtype == ys.dtype == dtype
    sums = (1 - decay ** np.arange(1, 514)) / (1 - decay)
    close(ys[:, 0].astype(float), sums[:-1], rtol=float(jnp.finfo(dtype).eps), atol=0)


# What is in the program --------------------------------------------------------------------------


def loops(jaxpr: Any) -> list[Any]:
    return [eqn for eqn in all_equations(jaxpr) if eqn.primitive.name in ("scan", "while")]


def test_no_loop_holds_a_product_or_a_mask() -> None:
    rng = jax.random.key(0)
    jaxpr = jax.make_jaxpr(
        lambda arrays: jax.grad(
            lambda arrays: run(True, rng, arrays=arrays, dropout=SPECS["all"])[1].sum()
        )(arrays)
    )(gated_arrays())
    inside = {
        eqn.primitive.name
        for each in loops(jaxpr.jaxpr)
        for eqn in all_equations(each.params["jaxpr"].jaxpr)
        if eqn.primitive.name not in ("jit", "pjit")  # whose equations are looked at themselves
    }
    # The last two select the offset where a slope is 0, as it is at a reset.
    assert inside <= {"mul", "add", "eq", "select_n"}


@pytest.mark.parametrize(("platform", "has_loop"), [("cpu", True), ("cuda", False), ("tpu", False)])
def test_the_solver_goes_by_the_platform_of_the_program(platform, has_loop) -> None:
    def loss(arrays: Any) -> jax.Array:
        return run(True, None, arrays=arrays, dropout=SPECS["zoneout"])[1].sum()

    exported = jax.export.export(jax.jit(jax.grad(loss)), platforms=[platform])(gated_arrays())
    assert ("stablehlo.while" in exported.mlir_module()) is has_loop


def is_parallel(step: Any, carry: Any, xs: Any, **options: Any) -> bool:
    scan = functools.partial(hoisted_scan.scan_in_parts, step, **options)
    return "linear_solve" in str(jax.make_jaxpr(scan)(carry, xs))


def test_none_goes_by_the_platform(monkeypatch) -> None:
    row, xs = jnp.zeros((B, H)), jnp.ones((T, B, H))
    for platform, wanted in {"cpu": False, "gpu": True, "tpu": True}.items():
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert is_parallel(lambda h, x: (h * x, h), row, xs) is wanted
        assert not is_parallel(lambda h, x: (h * x, h), row, xs, parallel=False)
        assert not is_parallel(lambda h, x: (jnp.tanh(h * x), h), row, xs)
    assert is_parallel(lambda h, x: (h * x, h), row, xs, parallel=True)


def test_a_scan_without_a_recurrence_loops(monkeypatch) -> None:
    """As `jax.lax.map` does, to hold one step's values at a time."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def loops(step: Any, carry: Any, **options: Any) -> bool:
        run = functools.partial(hoisted_scan.scan_in_parts, step, carry, **options)
        return "scan[" in str(jax.make_jaxpr(run)(jnp.ones((T, H))))

    for step, carry in (
        (lambda c, x: (c, jnp.tanh(x)), ()),
        (lambda h, x: (x, jnp.tanh(h)), jnp.ones(H)),
    ):
        assert loops(step, carry) and not loops(step, carry, parallel=True)
    assert loops(lambda i, x: (i + 1, x * i.astype(x.dtype)), 0)
    pair = jnp.ones(H), jnp.ones(H)
    assert is_parallel(lambda c, x: ((c[0] * x, x), c[1]), pair, jnp.ones((T, H)))


# Which carries are linear recurrences ------------------------------------------------------------

ROW, XS = (B, H), (T, B, H)
STEPS: dict[str, Any] = {  # steps over one float or several leaves, from zeros
    "negation and difference": lambda h, x: (x - (-h) / 2, h),
    "division": lambda h, x: (h / (2 + jnp.cos(x)), h),
    "a choice": lambda h, x: (jnp.where(x > 0, h, 2 - h), h),
    "a choice of two": lambda h, x: (jax.lax.select_n((x > 0).astype(int), h, x * h), h * h),
    "another shape on the way": lambda h, x: ((h.reshape(H, B) * x.reshape(H, B)).reshape(ROW), h),
    "one more axis": lambda h, x: ((h[None] * x[None])[0] + x, h.sum()),
    "nothing of the carry": lambda h, x: (jnp.tanh(x), h),
    "the same at all steps": lambda h, x: (h, h * x),
    "no output": lambda h, x: (h * x + 1, None),
    "the same slope at all steps": lambda h, x: (0.9 * h + 0.1, x),
    "an output of h alone": lambda h, _: (0.9 * h, jnp.tanh(h @ h.T)),
}
SEVERAL: dict[str, Any] = {
    "one after the other": lambda c, x: ((c[0] * x + 1, c[0] * c[1] + x), c[1]),
    "a delay line": lambda c, x: ((x, c[0]), c[1]),
    "side by side": lambda c, x: ((c[0] * x, c[1] / 2 + x), c[0] * c[1]),
    "exchanged": lambda c, x: ((c[1], c[0]), c[0] * x),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "reverse"), [*((name, False) for name in STEPS), *((name, True) for name in SEVERAL)]
)
def test_steps_that_need_no_loop(name, reverse) -> None:
    step, row = STEPS.get(name) or SEVERAL[name], draw(0, *ROW)
    carry = row if name in STEPS else (row, row + 1)
    scan = functools.partial(hoisted_scan.scan_in_parts, step, reverse=reverse, parallel=True)
    assert_close(
        scan(carry, draw(1, *XS)), jax.lax.scan(step, carry, draw(1, *XS), reverse=reverse)
    )


@pytest.mark.usefixtures("float64")
def test_a_weakly_typed_carry() -> None:
    """As `jnp.full((B, H), 0.1)` makes it."""
    h, xs = jnp.full(ROW, 0.1), draw(1, *XS)
    assert jax.typeof(h).weak_type
    step = STEPS["the same slope at all steps"]
    assert_close(hoisted_scan.scan_in_parts(step, h, xs, parallel=True), jax.lax.scan(step, h, xs))
    last, ys = run(True, arrays=(gated_arrays()[0], h, draw(4, T, B, D)), dropout=SPECS["all"])
    strong = jnp.full(ROW, 0.1, float)
    assert_close(
        (last, ys),
        run(False, arrays=(gated_arrays()[0], strong, draw(4, T, B, D)), dropout=SPECS["all"]),
    )


@pytest.mark.usefixtures("float64")
def test_a_callback_that_cannot_be_mapped() -> None:
    """It is called at each step, with that step's input."""

    def sine(x: jax.Array) -> jax.Array:
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    def step(h: jax.Array, x: jax.Array) -> Any:
        return 0.5 * h + sine(x), h

    h, xs = draw(0, *ROW), draw(1, *XS)
    assert_close(
        hoisted_scan.scan_in_parts(step, h, xs, parallel=True),
        jax.lax.scan(lambda h, x: (0.5 * h + x, h), h, np.sin(xs)),
    )


def test_a_foreign_function_that_cannot_be_mapped() -> None:
    """Its call has the shape of a step, in a loop."""

    def step(h: jax.Array, x: jax.Array) -> Any:
        return 0.5 * h + jax.ffi.ffi_call("kernel", jax.typeof(x))(x), h

    traced = jax.make_jaxpr(
        lambda xs: hoisted_scan.scan_in_parts(step, jnp.ones(ROW), xs, parallel=True)
    )
    jaxpr = traced(jnp.ones(XS))
    (call,) = [eqn for eqn in all_equations(jaxpr.jaxpr) if eqn.primitive.name == "ffi_call"]
    assert call.outvars[0].aval.shape == ROW and "linear_solve" in str(jaxpr)


@pytest.mark.usefixtures("float64")
def test_a_cast_and_back() -> None:
    def step(h: jax.Array, x: jax.Array) -> Any:
        return (h.astype(x.dtype) * x + 1).astype(h.dtype), h

    h, xs = draw(0, *ROW, dtype="float32"), draw(1, *XS)
    got, wanted = hoisted_scan.scan_in_parts(step, h, xs, parallel=True), jax.lax.scan(step, h, xs)
    assert got[0].dtype == wanted[0].dtype == h.dtype
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, wanted)


@pytest.mark.usefixtures("float64")
def test_counters_and_keys_run_on_the_side() -> None:
    def step(carry: Any, x: jax.Array) -> Any:
        at, key, h, seen = carry
        key, own = jax.random.split(key)
        h = jnp.where(at % 2 == 0, h * x, h + jax.random.uniform(own, h.shape))
        return (at + 1, key, h, seen | (x[0, 0] > 0)), (h, at, seen)

    def scan(scan: Any, h: jax.Array) -> Any:
        carry = (jnp.int32(3), jax.random.key(1), h, jnp.bool_(False))
        (at, key, h, seen), ys = scan(step, carry, draw(1, *XS))
        return at, jax.random.key_data(key), h, seen, ys

    parallel = functools.partial(hoisted_scan.scan_in_parts, parallel=True)
    assert_close(scan(parallel, draw(0, *ROW)), scan(jax.lax.scan, draw(0, *ROW)))


@pytest.mark.usefixtures("float64")
def test_a_branch_that_is_not_taken_gives_no_nan() -> None:
    """Under `jax.vmap` both branches would run, and the root of a negative number with them."""

    def step(h: jax.Array, x: jax.Array) -> Any:
        return h * jax.lax.cond(x[0, 0] > 0, jnp.sqrt, jnp.abs, x), h

    def slope(scan: Any) -> Any:
        return jax.grad(lambda xs: scan(step, jnp.ones((1, 1)), xs)[0].sum())(
            jnp.array([4.0, -1.0, 0.25]).reshape(3, 1, 1)
        )

    assert_close(
        slope(functools.partial(hoisted_scan.scan_in_parts, parallel=True)), slope(jax.lax.scan)
    )


NOT_AFFINE: dict[str, tuple[Any, str]] = {
    "a function": (lambda h, x: (jnp.tanh(h + x), h), "goes through tanh"),
    "a product of matrices": (lambda h, x: (h @ h.T @ x, h), "goes through transpose"),
    "a product with itself": (lambda h, x: (h * (h + x), h), "is multiplied by a value that depe"),
    "a divisor": (lambda h, x: (x / (h + 2), h), "goes through div"),
    "a predicate": (lambda h, x: (jnp.where(h > 0, h, x), h), "goes through gt"),
    "a sum": (lambda h, x: (x + h.sum(), h), "goes through reduce_sum"),
    "another order": (lambda h, x: (h[::-1] * x, h), "goes through rev"),
    "another order of a reshape": (
        lambda h, x: (jax.lax.reshape(h, ROW, (1, 0)) + x, h),
        "goes through reshape",
    ),
    "one for all": (lambda h, x: (jnp.broadcast_to(h[:1], ROW) + x, h), "goes through slice"),
    "halves": (
        lambda h, x: (jnp.concatenate(jnp.split(h, 2, -1)[::-1], -1) + x, h),
        "goes through split",
    ),
    "a join": (lambda h, x: (jnp.concatenate([h, x], -1)[:, :H], h), "goes through concatenate"),
    "a cast to integers": (
        lambda h, x: (h.astype(int).astype(h.dtype) + x, h),
        "goes through convert_element_type",
    ),
    "a rounding": (lambda h, x: (jnp.round(h) + x, h), "goes through round"),
    "a rule of its own": (lambda h, x: (jax.nn.relu(h) + x, h), "goes through relu"),
    "logarithms": (lambda h, x: (jnp.logaddexp(h, x), h), "goes through logaddexp"),
}


@pytest.mark.parametrize("step, reason", NOT_AFFINE.values(), ids=NOT_AFFINE)
def test_an_error_names_the_equation(step, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        hoisted_scan.scan_in_parts(step, jnp.ones(ROW), jnp.ones(XS), parallel=True)


def test_cells_of_this_library_that_are_not_linear() -> None:
    row = jnp.zeros((B, H))
    lstm = (fdc.init_lstm(jax.random.key(0), D, H), fdc.LSTMState(row, row), jnp.ones((T, B, D)))
    with pytest.raises(ValueError, match=r"carry\.h goes through \w+\. Leave parallel="):
        run(True, arrays=lstm, cell=fdc.lstm_cell, dropout=SPECS["none"])
    gru = (fdc.init_gru(jax.random.key(0), D, H), row, jnp.ones((T, B, D)))
    with pytest.raises(ValueError, match=r"but carry goes through \w+\. Leave"):
        run(True, arrays=gru, cell=fdc.gru_cell, dropout=SPECS["none"])
    with pytest.raises(ValueError, match=r"but carry goes through \w+\. Leave"):
        linen.RNN(nn.GRUCell(H), SPECS["none"], parallel=True).init(
            jax.random.key(0), jnp.ones((B, T, D))
        )


def test_one_leaf_that_is_not_affine_keeps_the_loop_for_all(monkeypatch) -> None:
    def step(carry: Any, x: jax.Array) -> Any:
        return {"linear": carry["linear"] * x, "rnn": jnp.tanh(carry["rnn"] + x)}, x

    carry = {"linear": jnp.ones(ROW), "rnn": jnp.ones(ROW)}
    with pytest.raises(ValueError, match=r"\['rnn'\] goes through tanh"):
        hoisted_scan.scan_in_parts(step, carry, jnp.ones(XS), parallel=True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not is_parallel(step, carry, jnp.ones(XS))
    pair = {"a": jnp.ones(ROW), "b": jnp.ones(ROW)}
    with pytest.raises(ValueError, match="depends on another part of the carry, through"):
        hoisted_scan.scan_in_parts(
            lambda c, x: ({"a": c["a"] - c["b"], "b": c["a"] + c["b"]}, x),
            pair,
            jnp.ones(XS),
            parallel=True,
        )
    with pytest.raises(ValueError, match="depends on another part of the carry, through tanh"):
        hoisted_scan.scan_in_parts(
            lambda c, x: ({"a": jnp.tanh(c["b"]), "b": jnp.tanh(c["a"])}, x),
            pair,
            jnp.ones(XS),
            parallel=True,
        )
    with pytest.raises(ValueError, match=r"\['a'\] depends on another part of the carry\. Leave"):
        hoisted_scan.scan_in_parts(
            lambda c, x: ({"a": c["b"], "b": c["a"] * c["b"]}, x), pair, jnp.ones(XS), parallel=True
        )


@pytest.mark.usefixtures("float64", "solver")
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_nan_does_not_survive_a_reset(bad: float) -> None:
    """One that comes in with the carry, and one of an earlier sequence of the row."""
    xs = jnp.ones((T, B, H)).at[1].set(bad)
    resets = jnp.zeros((T, B), bool).at[3].set(True)
    options: Any = {
        "cell": lambda params, h, x: (h / 2 + x,) * 2,
        "dropout": fdc.RecurrentDropout(),
    }

    def run(xs: jax.Array, h: float, resets: jax.Array, parallel: bool) -> jax.Array:
        carry = jnp.full((B, H), h, xs.dtype)
        return fdc.dropout_scan(None, carry, xs, None, resets=resets, parallel=parallel, **options)[
            1
        ]

    def later(xs: jax.Array) -> jax.Array:
        return run(xs, 0.0, resets, True)[3:].sum()

    np.testing.assert_array_equal(run(xs, 0.0, resets, True), run(xs, 0.0, resets, False))
    assert jnp.isfinite(jax.grad(later)(xs)).all() and jnp.isfinite(later(xs))
    at_first = jnp.zeros((T, B), bool).at[0].set(True)
    ones = jnp.ones((T, B, H))
    np.testing.assert_array_equal(run(ones, bad, at_first, True), run(ones, 0.0, at_first, False))


@pytest.mark.usefixtures("solver")
def test_slopes_that_overflow_before_a_reset_give_no_nan_after_it() -> None:
    """1.5 to the power of 900 is inf in float32, and 0 times inf is NaN."""
    steps, reset = 1024, 900
    slope = jnp.full((steps, 1), 1.5).at[reset].set(0)
    offset = jnp.zeros((steps, 1)).at[-1].set(2)
    h = linear_recurrence.linear_recurrence(slope, offset)
    np.testing.assert_array_equal(h[reset:], offset[reset:])


def test_the_gradient_of_a_weight_cast_to_bfloat16_adds_up_in_float32() -> None:
    """Added up in bfloat16, 3001 steps of 2 come to 3072 instead of about 6000."""
    xs, kernel = jnp.ones((3001, 1, 8), jnp.bfloat16), jnp.ones((8, 4))

    def loss(kernel: jax.Array, parallel: bool) -> jax.Array:
        def step(h: jax.Array, x: jax.Array) -> Any:
            h = h / 2 + (x @ kernel.astype(jnp.bfloat16)).astype(jnp.float32)
            return h, h

        first = jnp.zeros((1, 4))
        _, ys = hoisted_scan.scan_in_parts(step, first, xs, parallel=parallel)
        return ys.sum()

    at_once = jax.jit(jax.grad(functools.partial(loss, parallel=True)))(kernel)
    by_hand = sum(2 - 0.5**left for left in range(3001))  # what each step adds to all later ys
    np.testing.assert_allclose(at_once, by_hand, rtol=0.01)


def test_side_effects_are_refused() -> None:
    def step(h: jax.Array, x: jax.Array) -> Any:
        jax.debug.callback(lambda h: None, h)
        return h * x, h

    with pytest.raises(ValueError, match="cannot run this scan, because the step has side effects"):
        hoisted_scan.scan_in_parts(step, jnp.ones(ROW), jnp.ones(XS), parallel=True)


def test_a_carry_that_starts_equal_on_all_shards_is_refused() -> None:
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(AxisType.Auto,))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(None, "rows"), out_specs=P("rows"))
    def run(xs: jax.Array) -> jax.Array:
        def step(h: jax.Array, x: jax.Array) -> Any:
            return h / 2 + x, None

        return hoisted_scan.scan_in_parts(step, jnp.zeros(ROW), xs, parallel=True)[0]

    with pytest.raises(ValueError, match=r"a step changes the axes of jax\.shard_map over which"):
        run(jnp.ones(XS))


@pytest.mark.usefixtures("float64")
def test_log_space_gives_no_nan_for_a_dropped_unit() -> None:
    """As the paper of minGRU codes it: a candidate that is dropped has the logarithm -inf."""

    def cell(params: Any, log_h: jax.Array, x: jax.Array, *, disturb: Any) -> Any:
        z = x @ params["decay"]
        log_candidate = jnp.log(disturb("candidate", jax.nn.softplus(x @ params["in"])))
        log_h = jnp.logaddexp(log_h - jax.nn.softplus(z), jax.nn.log_sigmoid(z) + log_candidate)
        return log_h, jnp.exp(log_h)

    params, h, x = gated_arrays()
    spec = fdc.RecurrentDropout(inside={"candidate": fdc.Dropout(keep_prob=0.5)})
    arrays = ({"decay": params["decay"], "in": params["in"]}, jnp.zeros_like(h), x)
    ys, grads = jax.value_and_grad(
        lambda arrays: run(None, arrays=arrays, cell=cell, dropout=spec)[1].sum()
    )(arrays)
    assert jnp.isfinite(ys)
    assert all((jnp.isfinite(leaf) & (leaf != 0)).any() for leaf in jax.tree.leaves(grads))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


# Layers and cells --------------------------------------------------------------------------------

CELLS: dict[str, tuple[Any, Any]] = {
    "LRU": (fdc.lru_cell, fdc.init_lru),
    "minGRU": (fdc.min_gru_cell, fdc.init_min_gru),
    "minLSTM": (fdc.min_lstm_cell, fdc.init_min_lstm),
    "RG-LRU": (fdc.rg_lru_cell, fdc.init_rg_lru),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("cell", "init"), CELLS.values(), ids=CELLS)
def test_linear_cells_of_this_library(cell, init) -> None:
    features = D if cell is fdc.rg_lru_cell else H
    params = init(jax.random.key(0), D, features, jnp.float64)
    dtype = complex if cell is fdc.lru_cell else float
    arrays = (params, draw(1, B, features, dtype=dtype), draw(2, T, B, D))
    inside = {"candidate": TIED, "hidden": fdc.Zoneout(prob=0.4)}
    spec = fdc.RecurrentDropout(state=DROP, inside=inside)
    assert_close(*both_ways(arrays=arrays, cell=cell, dropout=spec, resets=RESETS))


class LinenGated(nn.RNNCellBase):
    features: int

    @nn.compact
    def __call__(self, h: jax.Array, x: jax.Array) -> Any:
        decay = nn.sigmoid(nn.Dense(self.features, name="decay")(x))
        h = decay * h + (1 - decay) * nn.Dense(self.features, name="in")(x)
        return h, h

    @nn.nowrap
    def initialize_carry(self, rng: Any, input_shape: Any) -> jax.Array:
        return jnp.zeros((*input_shape[:-1], self.features))

    @property
    def num_feature_axes(self) -> int:
        return 1


class NNXGated(nnx.RNNCellBase):
    def __init__(self, features: int, rngs: nnx.Rngs):
        self.features = features
        self.decay, self.candidate = (nnx.Linear(D, features, rngs=rngs) for _ in range(2))

    def __call__(self, h: jax.Array, x: jax.Array) -> Any:
        decay = nnx.sigmoid(self.decay(x))
        h = decay * h + (1 - decay) * self.candidate(x)
        return h, h

    def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
        return jnp.zeros((*input_shape[:-1], self.features))

    @property
    def num_feature_axes(self) -> int:
        return 1


LAYER_SPEC = fdc.RecurrentDropout(input=TIED, state=DROP, output=TIED)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_layers(framework) -> None:
    x, resets = draw(0, B, T, D), RESETS.T

    def layer(parallel: bool) -> jax.Array:
        if framework == "linen":
            rnn = linen.RNN(LinenGated(H), LAYER_SPEC, parallel=parallel)
            return rnn.apply(rnn.init(jax.random.key(0), x), x, rng=KEY, resets=resets)  # type: ignore
        cell = NNXGated(H, nnx.Rngs(0))
        return fdc_nnx.RNN(cell, LAYER_SPEC, parallel=parallel)(x, rngs=KEY, resets=resets)

    np.testing.assert_allclose(layer(True), layer(False), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("float64", "solver")
@pytest.mark.parametrize("reverse", [False, True])
def test_the_gradient_by_a_slope_of_zero(reverse) -> None:
    """At the first step the slope meets the initial carry, which no step before has made."""

    def loss(arrays: Any, scan: Any) -> jax.Array:
        decay, h, xs = arrays
        last, ys = scan(lambda h, x: (decay * h * x[:1] + x, h), h, xs, reverse=reverse)
        return jnp.sum(jnp.sin(ys)) + jnp.sum(last**2)

    decay = jnp.array([[0.0, 0.5, 0.3, 0.0]])
    arrays = (decay, draw(0, *ROW) + 2, draw(1, *XS).at[0].set(0.0).at[-1, 1].set(0.0))
    parallel = functools.partial(hoisted_scan.scan_in_parts, parallel=True)
    assert_close(jax.grad(loss)(arrays, parallel), jax.grad(loss)(arrays, jax.lax.scan))


@pytest.mark.parametrize("reverse", [False, True])
def test_constants_in_the_carry_and_in_the_outputs(reverse: bool) -> None:
    """A flag that the first step turns off, and numbers of Python: as `jax.lax.scan` has them."""

    def cell(slope: Any, carry: Any, x: Any) -> Any:
        h, is_first = carry
        h = jnp.where(is_first, x, slope * h + x)
        return (h, jnp.array(False)), (1.5, h, 3, True)

    slope, first, xs = jnp.asarray(0.5), (jnp.ones(H), jnp.array(True)), draw(0, T, H)
    wanted = jax.lax.scan(lambda c, x: cell(slope, c, x), first, xs, reverse=reverse)
    spec = fdc.RecurrentDropout()
    options: Any = {"cell": cell, "dropout": spec, "reverse": reverse, "parallel": True}
    got = fdc.dropout_scan(slope, first, xs, None, **options)
    assert_close(got, wanted)
    jax.tree.map(
        lambda a, b: np.testing.assert_equal((a.dtype, a.shape), (b.dtype, b.shape)), got, wanted
    )

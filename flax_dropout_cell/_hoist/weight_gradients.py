"""The derivative of a scan, in which weights' gradients are products over all steps."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from .._compat import vary_over, varying_axes
from .._sharding import explicit_sharding
from .flat_jaxpr import is_inexact, run_all
from .run_parts import pick, run_parts
from .traced_scan import TracedScan
from .weight_products import SUMMANDS, Plan, WeightUse, at_every_step


def differentiate(traced: TracedScan, primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
    """Pushes tangents through the scan: those of weights enter its loop as sums."""
    # Worked through for `z = h @ W`, with a tangent th of h and tW of W: that of z is
    # `th @ W + h @ tW`. The loop pushes the first part, step by step, because th depends on the
    # tangent of the step before. The second part needs h alone, so it is one product of all steps,
    # and enters the loop as a sum. JAX transposes both: the loop gives out the cotangents dz of all
    # steps, and the product makes dW of them.
    leaves = dict(enumerate(primals))
    dots = {at: dot for at, dot in enumerate(tangents) if not isinstance(dot, SymbolicZero)}
    of_constants = pick(dots, traced.constants)
    plan = traced.plan(of_constants)

    # First what depends on constants alone, such as `W * mask`: it runs once, before the loop, and
    # its tangents with it. From here on the weights of the loop are the results.
    def run_once(moving: dict[int, Any]) -> tuple[Any, dict[int, Any]]:
        values = traced.program.literals | pick(leaves, traced.constants) | moving
        run_all(plan.once, values)
        return (pick(values, plan.differentiated), _run_wide(plan, values)), values

    (hoisted, weights), (hoisted_dots, weight_dots), fixed = jax.jvp(
        run_once, (pick(leaves, of_constants),), (of_constants,), has_aux=True
    )
    fixed |= hoisted
    run_fixed = functools.partial(run_parts, traced, plan, leaves | fixed)
    # A weight may be read in other ways too, such as `tanh(W)`: there the loop differentiates it.
    elsewhere = plan.used_elsewhere(traced.program.outputs)
    differentiated = pick(leaves, dots.keys() - of_constants.keys()) | pick(hoisted, elsewhere)
    moving_dots = {at: dots[at] if at in dots else hoisted_dots[at] for at in differentiated}
    sums = {total: _zeros(traced, total) for total in plan.sums}
    # Linearized, not pushed forward: the sums are not known yet, for they are made of the operands
    # that the loop stacks.
    results, push, stacks = jax.linearize(run_fixed, differentiated, sums, has_aux=True)
    stacks |= pick(leaves, traced.xs)
    for total, uses in plan.sums.items():
        for use in uses:
            tangent = weights[use.weight], weight_dots[use.weight]
            pushed = _push_recomputed(traced, plan, use, stacks, fixed, *tangent)
            zeros = sums[total]
            pushed = _align(pushed, zeros.ndim)
            # Zeros of the sum's type: a bias gives one summand for all steps and rows. Rounded
            # last, so that the transpose adds up in float32 if the weight is in float32.
            sums[total] = zeros + (jnp.zeros_like(zeros, pushed.dtype) + pushed).astype(zeros.dtype)
    # One run of the linearized loop, with both parts of the tangent.
    return results, push(moving_dots, sums)


def _run_wide(plan: Plan, values: dict[int, Any]) -> dict[int, Any]:
    """The weights of all uses; those that were cast to half precision, without the cast.

    A gradient over all steps of a float16 weight may be inf although the float32 weight that it
    was cast from has a finite one. `jax.lax.scan` adds up the latter; so products after the loop
    give the gradient of the wide weight.
    """
    # Only the casts run again, and what follows them up to the loop.
    wide = dict(values)
    casts = (each for each in plan.once if plan.narrowed.intersection(each.outputs))
    run_all(casts, wide, lambda each, inputs: each.in_float32()(*map(_as_float32, inputs)))
    return {use.weight: wide[use.weight] for use in plan.uses.values()}


def _as_float32(value: jax.Array) -> jax.Array:
    return value.astype(jnp.float32) if is_inexact(value) else value


def _push_recomputed(
    traced: TracedScan,
    plan: Plan,
    use: WeightUse,
    stacks: dict[int, Any],
    fixed: dict[int, Any],
    *tangent: jax.Array,
) -> jax.Array:
    """`_push_weight_use` with the operands of its product computed from what the loop stacks."""
    operands, wide = traced.operands(plan), use.weight in plan.narrowed
    if not operands.equations:
        return _push_weight_use(use, stacks, *tangent, wide=wide)

    # In the backward pass jax.checkpoint ties the stacks to the cotangent. XLA would otherwise
    # compute all operands as early as it can, and hold them during the loop.
    @jax.checkpoint
    def push(stacks: dict[int, Any], fixed: dict[int, Any], *tangent: jax.Array) -> jax.Array:
        recomputed = operands.run(stacks, fixed, traced.steps)
        return _push_weight_use(use, recomputed, *tangent, wide=wide)

    return push(stacks, fixed, *tangent)


def _push_weight_use(
    use: WeightUse, stacks: dict[int, Any], weight: Any, dot: Any, *, wide: bool
) -> jax.Array:
    """The weight tangent's share of the use's output, for all steps at once."""
    equation, operands = use.equation, [stacks[value] for value in use.operands]
    if wide:
        equation, operands = equation.in_float32(), [_as_float32(value) for value in operands]
    if equation.name in SUMMANDS:  # the same at all steps
        return dot[None]
    place = equation.inputs.index(use.weight)

    def run(weight: Any, *operands: Any) -> Any:
        return equation(*operands[:place], weight, *operands[place:])[0]

    # By jax.jvp, as the equation need not be a product of matrices: a convolution, a lookup in a
    # table and a product by element are linear in their weight too.
    every_step = at_every_step(use, run)
    return jax.jvp(lambda weight: every_step(weight, *operands), (weight,), (dot,))[1]


def _align(pushed: jax.Array, ndim: int) -> jax.Array:
    """Inserts the axes after time that a scalar lacks if it is added to an array."""
    missing = ndim - pushed.ndim
    return pushed.reshape(pushed.shape[:1] + (1,) * missing + pushed.shape[1:])


def _zeros(traced: TracedScan, value: int) -> jax.Array:
    # They are tangents of values with this type, and JAX mixes no arrays that are sharded in other
    # ways, or differ over other axes of jax.shard_map.
    aval = traced.program.types[value]
    sharding = explicit_sharding(aval)
    if sharding is not None:
        sharding = sharding.update(spec=jax.P(None, *sharding.spec))
    zeros = jax.lax.full((traced.steps, *aval.shape), 0, aval.dtype, sharding=sharding)
    return vary_over(zeros, varying_axes(aval))

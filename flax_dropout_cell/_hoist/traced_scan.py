"""A scan's step as a flat list of equations, or the reason why it is left to `jax.lax.scan`."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._compat import IS_BEFORE_0_8, IS_BEFORE_0_12, varying_axes
from .._sharding import explicit_sharding
from .flat_jaxpr import Program, all_equations, flatten
from .recomputed_operands import Recomputed, plan_operands
from .three_parts import Cut, cut_loop
from .weight_products import Plan, plan_weight_uses

PyTree = Any
Step = Callable[[Any, Any], tuple[Any, Any]]


class TracedScan(NamedTuple):
    """A traced scan: its step, the numbers of its arguments, and `jax.lax.scan` for it.

    Attributes:
      closed: the step as a jaxpr.
      structure: the structure of its results.
      program: the step with its values numbered: first constants, then carry, then xs.
      constants: the numbers of the arrays that the step closes over.
      carry: the numbers of the leaves of the carry.
      xs: the numbers of the leaves of the inputs.
      steps: the number of steps.
      is_complex: whether the step makes complex numbers.
      loop: `jax.lax.scan` with the user's options.
      plain: why the step cannot be cut up, so that its loop is `jax.lax.scan`; None if it can.
    """

    closed: Any
    structure: Any
    program: Program
    constants: range
    carry: range
    xs: range
    steps: int
    is_complex: bool
    loop: Callable[..., Any]
    plain: str | None

    def plan(self, differentiated: Iterable[int]) -> Plan:
        return plan_weight_uses(
            self.program, self.constants, filter(self.program.is_inexact, differentiated)
        )

    def cut(self, plan: Plan) -> Cut:
        return cut_loop(self.program, plan, self.carry, self.xs, self.steps)

    def operands(self, plan: Plan) -> Recomputed:
        return plan_operands(self.program, plan.loop, plan.operands, plan.known, self.xs)


def trace_scan(
    step: Step, carry: PyTree, xs: PyTree, *, length: int | None = None, **options: Any
) -> TracedScan | str:
    """The traced scan, or why nothing is known of its step, so that it runs as it is.

    Args:
      step: as in `jax.lax.scan`.
      carry: the initial carry.
      xs: the inputs.
      length: the number of steps, if `xs` does not tell.
      **options: other options of `jax.lax.scan`.
    """
    carry, xs = jax.tree.map(jnp.asarray, (carry, xs))
    found = _trace_step(step, carry, xs, length)
    if isinstance(found, str):
        return found
    closed, structure = found
    carry, xs = jax.tree.leaves(carry), jax.tree.leaves(xs)
    first, second = len(closed.consts), len(closed.consts) + len(carry)
    # Inside of the step too: an LRU's x and y are real, and its h is not.
    made = (variable for eqn in all_equations(closed.jaxpr) for variable in eqn.outvars)
    is_complex = any(jnp.issubdtype(it.aval.dtype, jnp.complexfloating) for it in made)
    steps: Any = xs[0].shape[0] if xs else length
    return TracedScan(
        closed=closed,
        structure=structure,
        program=flatten(closed),
        constants=range(first),
        carry=range(first, second),
        xs=range(second, second + len(xs)),
        steps=steps,
        is_complex=is_complex,
        # A step that reads none of its inputs leaves no array that tells how long the loop is.
        loop=functools.partial(jax.lax.scan, length=steps, **options),
        plain=_why_plain(closed),
    )


def _trace_step(step: Step, carry: PyTree, xs: PyTree, length: int | None) -> tuple[Any, Any] | str:
    """The step as a jaxpr and the structure of its results, or why it is left alone."""
    # Shapes are compared and multiplied, so they must be known.
    if any(map(_has_symbolic_shape, jax.tree.leaves((carry, xs)))):
        return "an array has a symbolic shape"
    lengths = {leaf.shape[:1] for leaf in jax.tree.leaves(xs)}
    if length is not None:
        lengths.add((length,))
    if len(lengths) != 1 or lengths == {()}:
        return "the inputs do not have one length"
    closed, results = jax.make_jaxpr(step, return_shape=True)(
        carry, jax.tree.map(type_at_a_step, xs)
    )
    # jax.lax.scan has errors for all of these that name the leaf, so it gets to raise them.
    changes = "the carry changes its structure, shape, dtype or sharding"
    if not isinstance(results, tuple) or len(results) != 2:
        return "the step does not return a pair"
    if jax.tree.structure(results[0]) != jax.tree.structure(carry):
        return changes
    # jax.debug.print is an effect: for all steps at once it would print once.
    if closed.effects:
        return "the step has side effects, or names an axis as jax.lax.pmean does"
    if any(map(_has_symbolic_shape, closed.consts)):
        return "the step reads an array of a symbolic shape"
    leaves = jax.tree.leaves(carry)
    outputs: list[Any] = closed.out_avals
    for got, wanted in zip(outputs[: len(leaves)], map(jax.typeof, leaves), strict=True):
        if (got.shape, got.dtype) != (wanted.shape, wanted.dtype):
            return changes
        if explicit_sharding(got) != explicit_sharding(wanted):
            return changes
        if varying_axes(got) != varying_axes(wanted):
            return "a step changes the axes of jax.shard_map over which the carry differs"
    return closed, jax.tree.structure(results)


def type_at_a_step(leaf: Any) -> Any:
    """The type of an array without its leading axis, time."""
    whole = jax.typeof(leaf)
    sharding = whole.sharding.update(spec=whole.sharding.spec[1:])
    return whole.update(shape=whole.shape[1:], sharding=sharding)


def _has_symbolic_shape(leaf: Any) -> bool:
    return not all(isinstance(dim, int) for dim in jax.typeof(leaf).shape)


def _why_plain(closed: Any) -> str | None:
    """Why a step cannot be cut up and differentiated in any way; None if it can."""
    # jax.linearize forgets there that a complex tangent differs between the shards.
    if IS_BEFORE_0_8 and any(map(varying_axes, closed.out_avals)):
        return "the carry differs between the shards of jax.shard_map, which needs JAX 0.8"
    # jax.sharding.auto_axes cannot be linearized inside of jax.shard_map.
    if any(varying_axes(aval) and explicit_sharding(aval) for aval in closed.in_avals):
        return "an array is sharded on an explicit axis inside of jax.shard_map"
    for eqn in all_equations(closed.jaxpr):
        name = eqn.primitive.name
        if name.startswith("custom_vjp"):
            return "the step has a jax.custom_vjp, which has no forward derivative"
        if name == "custom_jvp_call" and IS_BEFORE_0_12:
            # jax.linearize and jax.jvp disagree in second order about a rule that is not the
            # derivative, as spiking networks have it.
            return "the step has a jax.custom_jvp, which needs JAX 0.12"
        if name == "cond":
            # A cond that is linearized and then mapped by jax.vmap cannot be transposed. Before JAX
            # 0.12, one that picks masks cannot be linearized inside of jax.checkpoint either.
            dtypes = [variable.aval.dtype for variable in eqn.outvars]
            masks = IS_BEFORE_0_12 and any(jnp.issubdtype(dtype, jnp.bool_) for dtype in dtypes)
            if masks or any(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes):
                return "the step has a jax.lax.cond between floats"
    return None

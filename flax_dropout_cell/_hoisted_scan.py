"""`jax.lax.scan` whose weights' gradients are not accumulated in its backward loop.

`jax.lax.scan` differentiates `h @ W` as `dW += h.T @ dz` at each step of the backward loop, which
reads and writes all of `dW`. Here the loop keeps `h` and gives out `dz`, and one product over all
steps makes `dW` of them.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ._equations import Equation, Program, all_equations, flatten, run_all
from ._linear_sites import SUMMANDS, Plan, Site, plan_sites

PyTree = Any
_OLD_JAX = jax.__version_info__ < (0, 12)
Step = Callable[[Any, Any], tuple[Any, Any]]

# Computed a second time in the backward loop rather than kept for it: these cost less than to
# write and read what they give.
_CHEAP = frozenset(
    "add add_any sub mul neg div integer_pow square one_minus_square max min select_n copy "
    "convert_element_type broadcast_in_dim reshape squeeze expand_dims slice split concatenate "
    "transpose".split()
)


def scan(
    step: Step,
    carry: PyTree,
    xs: PyTree,
    *,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan`: the same numbers to rounding, forward and differentiated in any way.

    A step that is not understood runs in `jax.lax.scan` as it is.
    """
    loop = functools.partial(jax.lax.scan, length=length, reverse=reverse, unroll=unroll)
    carry, xs = jax.tree.map(jnp.asarray, (carry, xs))
    traced = _trace(step, carry, xs)
    if traced is None:
        return loop(step, carry, xs)
    closed, structure = traced
    this = _Scan.of(closed, carry, xs, loop)
    leaves = [*closed.consts, *jax.tree.leaves((carry, xs))]
    if not this.plan(this.constants).sums:
        return jax.tree.unflatten(structure, _run_unhoisted(this, leaves))

    @jax.custom_jvp
    def run(*leaves: Any) -> list[Any]:
        consts, carry, xs = (
            [leaves[at] for at in part] for part in (this.constants, this.carry, this.xs)
        )

        def flat_step(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
            results = jax.core.eval_jaxpr(closed.jaxpr, consts, *carry, *x)
            return results[: len(carry)], results[len(carry) :]

        carry, ys = loop(flat_step, carry, xs)
        return [*carry, *ys]

    @functools.partial(run.defjvp, symbolic_zeros=True)
    def differentiate(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        return _differentiate(this, primals, tangents)

    return jax.tree.unflatten(structure, run(*leaves))


class _Scan(NamedTuple):
    """A traced scan: its step, the numbers of its arguments, and `jax.lax.scan` for it."""

    program: Program
    constants: range
    carry: range
    xs: range
    steps: int
    loop: Callable[..., Any]

    @classmethod
    def of(cls, closed: Any, carry: PyTree, xs: PyTree, loop: functools.partial[Any]) -> "_Scan":
        carry, xs = jax.tree.leaves(carry), jax.tree.leaves(xs)
        ends = (len(closed.consts), len(closed.consts) + len(carry))
        steps = xs[0].shape[0] if xs else loop.keywords["length"]
        parts = range(ends[0]), range(*ends), range(ends[1], ends[1] + len(xs))
        return cls(flatten(closed), *parts, steps, loop)

    def plan(self, moving: Iterable[int]) -> Plan:
        return plan_sites(self.program, self.constants, filter(self.program.is_inexact, moving))


def _trace(step: Step, carry: PyTree, xs: PyTree) -> tuple[Any, Any] | None:
    """The step as a jaxpr, and the structure of what it returns; None where it is left alone."""
    if any(map(_is_unusual, jax.tree.leaves((carry, xs)))):
        return None
    first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), xs)
    closed, results = jax.make_jaxpr(step, return_shape=True)(carry, first)
    if jax.tree.structure(results[0]) != jax.tree.structure(carry) or not _is_understood(closed):
        return None
    for got, came in zip(jax.tree.leaves(results[0]), jax.tree.leaves(carry), strict=True):
        wanted = jax.typeof(came)
        if (got.shape, got.dtype) != (wanted.shape, wanted.dtype) or wanted.weak_type:
            return None
    return closed, jax.tree.structure(results)


def _is_unusual(leaf: Any) -> bool:
    """Whether an array has a symbolic shape, or a type with axes of `jax.shard_map`."""
    aval = jax.typeof(leaf)
    if not all(isinstance(dim, int) for dim in aval.shape):
        return True
    newer = getattr(aval, "manual_axis_type", None)
    return bool(getattr(aval, "vma", ()) or getattr(newer, "varying", ()))


def _is_understood(closed: Any) -> bool:
    """Whether the step can be cut up and differentiated in any way."""

    def is_obscure(eqn: Any) -> bool:
        name = eqn.primitive.name
        if name == "cond":
            # Linearized first and mapped then, a branch cannot be transposed any more. Before JAX
            # 0.12 one that picks masks cannot be linearized inside of jax.checkpoint either.
            dtypes = [variable.aval.dtype for variable in eqn.outvars]
            masks = _OLD_JAX and any(jnp.issubdtype(dtype, jnp.bool_) for dtype in dtypes)
            return masks or any(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes)
        if name == "custom_jvp_call" and _OLD_JAX:
            # jax.linearize and jax.jvp disagree in second order about a rule that is not the
            # derivative, as spiking networks have it.
            return True
        return name.startswith("custom_vjp")

    if closed.effects or any(map(_is_unusual, closed.consts)):
        return False
    return not any(map(is_obscure, all_equations(closed.jaxpr)))


def _run_unhoisted(this: _Scan, leaves: list[Any]) -> list[Any]:
    """The loop without sites, which keeps less for its gradient than `jax.lax.scan`."""
    plan = this.plan(())
    values = this.program.constants | dict(enumerate(leaves))
    run_all(plan.front, values)
    return _run_loop(this, plan, values, {}, {})[0]


def _differentiate(this: _Scan, primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
    """Pushes tangents through the scan: those of the sites' weights enter its loop as sums."""
    leaves = dict(enumerate(primals))
    dots = {at: dot for at, dot in enumerate(tangents) if not isinstance(dot, SymbolicZero)}
    of_constants = _pick(dots, this.constants)
    plan = this.plan(of_constants)

    def run_front(moving: dict[int, Any]) -> tuple[dict[int, Any], dict[int, Any]]:
        values = this.program.constants | _pick(leaves, this.constants) | moving
        run_all(plan.front, values)
        return _pick(values, plan.moving), values

    front, front_dots, fixed = jax.jvp(
        run_front, (_pick(leaves, of_constants),), (of_constants,), has_aux=True
    )
    fixed |= front
    run_loop = functools.partial(_run_loop, this, plan, leaves | fixed)
    elsewhere = plan.used_elsewhere(this.program.outputs)
    moving = _pick(leaves, dots.keys() - of_constants.keys()) | _pick(front, elsewhere)
    moving_dots = {at: dots[at] if at in dots else front_dots[at] for at in moving}
    nothing = {total: _zeros(this, total) for total in plan.sums}
    results, push, stacks = jax.linearize(run_loop, moving, nothing, has_aux=True)
    stacks |= _pick(leaves, this.xs)
    sums = {
        total: sum(_push_site(site, stacks, fixed, front_dots) for site in sites)
        for total, sites in plan.sums.items()
    }
    return results, push(moving_dots, sums)


def _run_loop(
    this: _Scan, plan: Plan, fixed: dict[int, Any], moving: dict[int, Any], sums: dict[int, Any]
) -> tuple[list[Any], dict[int, Any]]:
    """The loop, whose sites read their weights from `fixed`; and what else they read, stacked."""
    values = fixed | moving
    sites, stacked = plan.sites, plan.operands - set(this.xs)

    def step(carry: list[Any], at: Any) -> tuple[list[Any], Any]:
        x, sums = at
        now = values | dict(zip([*this.carry, *this.xs], [*carry, *x], strict=True))

        def run(equation: Equation, inputs: list[Any]) -> list[Any]:
            site = sites.get(equation.outputs)
            if site is not None:
                inputs[equation.inputs.index(site.weight)] = fixed[site.weight]
            outputs = equation(*inputs)
            made = zip(equation.outputs, outputs, strict=True)
            return [_with_tangent(it, sums[at]) if at in sums else it for at, it in made]

        run_all(plan.loop, now, run)
        results = [now[value] for value in this.program.outputs]
        return results[: len(carry)], (results[len(carry) :], _pick(now, stacked))

    step = jax.checkpoint(step, policy=_is_kept, prevent_cse=False)
    first, sequences = ([values[at] for at in part] for part in (this.carry, this.xs))
    last, (ys, stacks) = this.loop(step, first, (sequences, sums))
    return [*last, *ys], stacks


def _push_site(
    site: Site, stacks: dict[int, Any], fixed: dict[int, Any], dots: dict[int, Any]
) -> jax.Array:
    """What the weight's tangent adds to what the site gives, at all steps at once."""
    equation, dot = site.equation, dots[site.weight]
    if equation.name in SUMMANDS:  # the same at all steps
        return (equation(dot)[0] if len(equation.inputs) == 1 else dot)[None]
    place = equation.inputs.index(site.weight)
    operands = [stacks[value] for value in site.operands]

    def run(weight: Any, *operands: Any) -> Any:
        return equation(*operands[:place], weight, *operands[place:])[0]

    many, shape = jax.vmap(run, (None, *[0] * len(operands))), None
    if site.rows_lead:  # one product of matrices, rather than one that XLA has to transpose for
        shape = operands[0].shape[:2]
        operands, many = [operands[0].reshape(-1, *operands[0].shape[2:])], run
    pushed = jax.jvp(lambda weight: many(weight, *operands), (fixed[site.weight],), (dot,))[1]
    return pushed if shape is None else pushed.reshape(*shape, *pushed.shape[1:])


@jax.custom_jvp
def _with_tangent(value: Any, summand: Any) -> Any:
    """The value; its tangent is the sum of both tangents."""
    del summand
    return value


_with_tangent.defjvp(lambda primals, tangents: (primals[0], tangents[0] + tangents[1]))


def _zeros(this: _Scan, value: int) -> jax.Array:
    aval = this.program.types[value]
    return jnp.zeros((this.steps, *aval.shape), aval.dtype)


def _is_kept(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in _CHEAP


def _pick(values: dict[int, Any], wanted: Iterable[int]) -> dict[int, Any]:
    return {value: values[value] for value in wanted if value in values}

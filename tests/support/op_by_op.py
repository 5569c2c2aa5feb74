"""Runs a traced program operation by operation, for tests that ask for many programs' numbers.

XLA takes seconds to compile a gradient of a gradient of a scan. JAX compiles an operation once
for its shapes, whichever programs it stands in.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr")
"""Where an operation that calls a program has it."""


def op_by_op(function: Callable[..., Any]) -> Callable[..., Any]:
    """Like `jax.jit(function)`: traced as a whole; then its operations run one after another."""

    def run(*args: Any) -> Any:
        traced, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        results = _run_program(traced, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return run


def _run_program(program: Any, args: Iterable[Any]) -> list[Any]:
    """Runs a `Jaxpr` or a `ClosedJaxpr`."""
    jaxpr = getattr(program, "jaxpr", program)
    values: dict[Any, Any] = dict(zip(jaxpr.invars, args, strict=True))
    values.update(zip(jaxpr.constvars, getattr(program, "consts", ()), strict=True))

    def read(var: Any) -> Any:
        return var.val if isinstance(var, Literal) else values[var]

    for eqn in jaxpr.eqns:
        values.update(zip(eqn.outvars, _run(eqn, list(map(read, eqn.invars))), strict=True))
    return list(map(read, jaxpr.outvars))


def _run(eqn: Any, args: list[Any]) -> list[Any]:
    """A `while` stays one operation: where it is mapped, its condition is an array."""
    params = eqn.params
    if eqn.primitive.name == "scan":
        return _run_scan(eqn, args)
    if eqn.primitive.name == "cond":
        return _run_program(params["branches"][int(args[0])], args[1:])
    for name in CALLED:
        if name in params:
            return _run_program(params[name], args)
    results = eqn.primitive.bind(*args, **params)
    return results if eqn.primitive.multiple_results else [results]


def _run_scan(eqn: Any, args: list[Any]) -> list[Any]:
    step, length = eqn.params["jaxpr"], eqn.params["length"]
    inner = getattr(step, "jaxpr", step)

    def has_no_time(outer: Any, inner: Any) -> bool:
        return outer.aval.ndim == inner.aval.ndim

    first_x = sum(map(has_no_time, eqn.invars, inner.invars))  # constants, carry, xs
    num_carry = sum(map(has_no_time, eqn.outvars, inner.outvars))
    consts, carry = args[: first_x - num_carry], args[first_x - num_carry : first_x]
    ys: list[list[Any]] = [[] for _ in eqn.outvars[num_carry:]]
    order = range(length)[:: -1 if eqn.params["reverse"] else 1]
    for t in order:
        results = _run_program(step, [*consts, *carry, *(xs[t] for xs in args[first_x:])])
        carry = results[:num_carry]
        for rows, y in zip(ys, results[num_carry:], strict=True):
            rows.append(y)
    return [*carry, *(jnp.stack([rows[order.index(t)] for t in range(length)]) for rows in ys)]

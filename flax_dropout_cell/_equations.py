"""A step of a loop as a flat list of equations, each of which can be run by itself."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal  # type: ignore[attr-defined]

_CALLS = ("jit", "pjit")


class Equation(NamedTuple):
    """An equation of a jaxpr between numbered values.

    Attributes:
      eqn: the equation itself.
      source: what JAX says of the function that it comes from.
      inputs: the values that its variables stand for; what it has as literals is in `eqn`.
      outputs: the values that it makes.
    """

    eqn: Any
    source: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.eqn.primitive.name

    def __call__(self, *inputs: Any) -> list[Any]:
        """Runs it; the shapes may be others than those it was traced with."""
        variables = [atom for atom in self.eqn.invars if not isinstance(atom, Literal)]
        # JAX knows how to bind an equation that holds functions, in each version in its own way.
        alone = Jaxpr([], variables, self.eqn.outvars, [self.eqn], self.eqn.effects, self.source)
        return jax.core.eval_jaxpr(alone, [], *inputs)


class Program(NamedTuple):
    """A traced function. Its values have numbers; its arguments come first.

    Attributes:
      types: the shape and dtype of each value.
      constants: the values that are known.
      equations: what is computed, in order.
      outputs: the values that the function returns.
    """

    types: list[Any]
    constants: dict[int, Any]
    equations: list[Equation]
    outputs: list[int]

    def size(self, values: Iterable[int]) -> int:
        """How many elements values have together."""
        return sum(math.prod(self.types[value].shape) for value in values)

    def is_inexact(self, value: int) -> bool:
        """Whether a value can be differentiated."""
        return is_inexact(self.types[value])


def is_inexact(aval: Any) -> bool:
    """Whether what has this shape and dtype can be differentiated."""
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def flatten(closed: Any) -> Program:
    """Numbers the values of a jaxpr, its constants first; what it calls under `jit` is inlined."""
    types: list[Any] = []
    constants: dict[int, Any] = {}
    equations: list[Equation] = []

    def number(variable: Any) -> int:
        types.append(variable.aval)
        return len(types) - 1

    def lay_out(jaxpr: Any, known: dict[Any, int]) -> list[int]:
        def read(atom: Any) -> int:
            if not isinstance(atom, Literal):
                return known[atom]
            constants[value := number(atom)] = atom.val
            return value

        for eqn in jaxpr.eqns:
            if _is_inlined(eqn):
                inner = eqn.params["jaxpr"]
                own = dict(zip(inner.jaxpr.invars, map(read, eqn.invars), strict=True))
                for variable, constant in zip(inner.jaxpr.constvars, inner.consts, strict=True):
                    constants[own.setdefault(variable, number(variable))] = constant
                outputs = lay_out(inner.jaxpr, own)
            else:
                variables = [atom for atom in eqn.invars if not isinstance(atom, Literal)]
                inputs = tuple(known[variable] for variable in variables)
                outputs = [number(variable) for variable in eqn.outvars]
                equations.append(Equation(eqn, jaxpr.debug_info, inputs, tuple(outputs)))
            known.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    jaxpr = closed.jaxpr
    arguments = {variable: number(variable) for variable in (*jaxpr.constvars, *jaxpr.invars)}
    return Program(types, constants, equations, lay_out(jaxpr, arguments))


def run_all(
    equations: Iterable[Equation],
    values: dict[int, Any],
    run: Callable[[Equation, list[Any]], list[Any]] = lambda equation, inputs: equation(*inputs),
) -> None:
    """Adds to `values` what the equations make of them."""
    for equation in equations:
        outputs = run(equation, [values[value] for value in equation.inputs])
        values.update(zip(equation.outputs, outputs, strict=True))


def _is_inlined(eqn: Any) -> bool:
    """Whether an equation is a call under `jit` that something differentiable may go through."""
    if eqn.primitive.name not in _CALLS or "jaxpr" not in eqn.params:
        return False
    placed = (*eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ()))
    if any(isinstance(sharding, jax.sharding.Sharding) for sharding in placed):
        return False
    return any(is_inexact(variable.aval) for variable in eqn.outvars)


def all_equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr, and those of the functions that they hold."""
    for eqn in jaxpr.eqns:
        yield eqn
        for function in _functions(eqn):
            yield from all_equations(function)


def _functions(eqn: Any) -> Iterator[Any]:
    """The jaxprs in an equation's parameters."""
    for parameter in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
        if _is_jaxpr(parameter):
            yield getattr(parameter, "jaxpr", parameter)


def _is_jaxpr(node: Any) -> bool:
    return isinstance(node, Jaxpr | ClosedJaxpr)

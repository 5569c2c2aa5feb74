"""A step of a loop as a flat list of equations, each of which can be run by itself."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._compat import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]
    Jaxpr,
    Literal,
    eval_jaxpr,
    is_threefry_dtype,
    jaxpr_of,
)

_CALLS = ("jit", "pjit")  # JAX has given the one primitive both names
# Primitives that run on any float dtype: their parameters name none, or `in_float32` replaces it.
_ANY_DTYPE = frozenset(
    "add broadcast_in_dim concatenate convert_element_type copy expand_dims mul neg pcast pvary "
    "reshape select_n slice split squeeze sub transpose".split()
)


class Equation(NamedTuple):
    """An equation of a jaxpr between numbered values.

    Attributes:
      eqn: the equation itself.
      debug_info: JAX's debug information about the function that it comes from.
      inputs: the values of its variables; its literals are in `eqn`.
      outputs: the values that it makes.
    """

    eqn: Any
    debug_info: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.eqn.primitive.name

    @property
    def arguments(self) -> list[int | None]:
        """The value of each operand, in order; None for a literal."""
        inputs = iter(self.inputs)
        return [None if isinstance(atom, Literal) else next(inputs) for atom in self.eqn.invars]

    @property
    def as_jaxpr(self) -> Any:
        """A jaxpr of this equation and nothing else."""
        return jaxpr_of(self.eqn, self.debug_info)

    def __call__(self, *inputs: Any) -> list[Any]:
        """Runs the equation. Its inputs may have other shapes than those it was traced with."""
        # eval_jaxpr would assert the shapes and dtypes that it was traced with.
        if jax.config.jax_enable_checks and self._can_be_bound:
            results = self.eqn.primitive.bind(*inputs, **self.eqn.params)
            return results if self.eqn.primitive.multiple_results else [results]
        # JAX knows how to bind an equation that holds functions, in each version in its own way.
        return eval_jaxpr(self.as_jaxpr, [], *inputs)

    @property
    def _can_be_bound(self) -> bool:
        return None not in self.arguments and not any(_functions(self.eqn))

    @property
    def runs_in_any_dtype(self) -> bool:
        """Whether the equation can be run on arrays of another dtype than it was traced with."""
        return self.name in _ANY_DTYPE and None not in self.arguments

    def in_float32(self) -> "Equation":
        """The same equation on float32 in place of float16 and bfloat16."""
        params = {name: _widened(value) for name, value in self.eqn.params.items()}
        return self._replace(eqn=self.eqn.replace(params=params))


class Program(NamedTuple):
    """A traced function. Its values have numbers; its arguments come first.

    Attributes:
      types: the shape and dtype of each value.
      literals: the values that are written in the program, such as 1.0.
      equations: the computation, in order.
      outputs: the values that the function returns.
    """

    types: list[Any]
    literals: dict[int, Any]
    equations: list[Equation]
    outputs: list[int]

    def size(self, values: Iterable[int]) -> int:
        """The number of elements of values, together."""
        return sum(math.prod(self.types[value].shape) for value in values)

    def num_bytes(self, values: Iterable[int]) -> int:
        """The memory that values take, together."""
        types = [self.types[value] for value in values]
        return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in types)

    def is_inexact(self, value: int) -> bool:
        """Whether a value can be differentiated."""
        return is_inexact(self.types[value])

    def narrows(self, equation: Equation) -> bool:
        """Whether an equation casts wider floats to half precision."""
        if equation.name != "convert_element_type":
            return False
        before, after = (
            [self.types[value].dtype for value in values]
            for values in (equation.inputs, equation.outputs)
        )
        wide = (jnp.issubdtype(dtype, jnp.floating) and not is_half(dtype) for dtype in before)
        return any(wide) and is_half(after[0])


def is_inexact(aval: Any) -> bool:
    """Whether a value of this type can be differentiated."""
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def is_half(dtype: Any) -> bool:
    """Whether floats of a dtype have 16 bits or less."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 16


def _widened(parameter: Any) -> Any:
    if isinstance(parameter, np.dtype) and is_half(parameter):
        return jnp.dtype(jnp.float32)
    return parameter


def flatten(closed: Any) -> Program:
    """Numbers the values of a jaxpr, its constants first, and inlines calls under `jit`."""
    # Numbers, not JAX's variables: a call under jit that is inlined twice has the same variables
    # twice, and sets and dicts of numbers have an order that does not change from run to run.
    types: list[Any] = []
    literals: dict[int, Any] = {}
    equations: list[Equation] = []

    def number(variable: Any) -> int:
        types.append(variable.aval)
        return len(types) - 1

    def lay_out(jaxpr: Any, known: dict[Any, int]) -> list[int]:
        def read(atom: Any) -> int:
            if not isinstance(atom, Literal):
                return known[atom]
            literals[value := number(atom)] = atom.val
            return value

        for eqn in jaxpr.eqns:
            # A product inside of jax.jit, as jnp.einsum makes it, is a product all the same.
            if _is_inlined(eqn):
                inner = eqn.params["jaxpr"]
                own = dict(zip(inner.jaxpr.invars, map(read, eqn.invars), strict=True))
                for variable, constant in zip(inner.jaxpr.constvars, inner.consts, strict=True):
                    literals[own.setdefault(variable, number(variable))] = constant
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
    return Program(types, literals, equations, lay_out(jaxpr, arguments))


def run_all(
    equations: Iterable[Equation],
    values: dict[int, Any],
    run: Callable[[Equation, list[Any]], list[Any]] = lambda equation, inputs: equation(*inputs),
) -> None:
    """Runs the equations, and adds their outputs to `values`."""
    for equation in equations:
        outputs = run(equation, [values[value] for value in equation.inputs])
        values.update(zip(equation.outputs, outputs, strict=True))


def is_call(eqn: Any) -> bool:
    """Whether an equation is a call under `jit`."""
    return eqn.primitive.name in _CALLS and "jaxpr" in eqn.params


def _is_inlined(eqn: Any) -> bool:
    """Whether an equation is a call under `jit` that something differentiable may go through."""
    if not is_call(eqn):
        return False
    # With a sharding of its own, a call is more than its equations.
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


def changes_under_vmap(equation: Equation) -> bool:
    """Whether `jax.vmap` fails, gives other random bits, or runs both branches of a condition.

    JAX's rbg gives all rows of a vmap the bits of the first key; a branch that is not taken may
    have a gradient of NaN.
    """

    def is_changed(eqn: Any) -> bool:
        # vmap makes a selection of a branch, which computes both sides.
        if eqn.primitive.name == "cond":
            return any(is_inexact(variable.aval) for variable in eqn.outvars)
        # A pure_callback or an ffi_call.
        if "vmap_method" in eqn.params:
            return eqn.params["vmap_method"] is None
        dtypes = [atom.aval.dtype for atom in (*eqn.invars, *eqn.outvars)]
        keys = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jax.dtypes.prng_key)]
        return eqn.primitive.name == "rng_bit_generator" or not all(map(is_threefry_dtype, keys))

    return any(map(is_changed, all_equations(equation.as_jaxpr)))


def _functions(eqn: Any) -> Iterator[Any]:
    """The jaxprs in an equation's parameters."""
    # By type: the parameters' names differ between primitives, and `cond` has a tuple of them.
    for parameter in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
        if _is_jaxpr(parameter):
            yield getattr(parameter, "jaxpr", parameter)


def _is_jaxpr(node: Any) -> bool:
    return isinstance(node, Jaxpr | ClosedJaxpr)

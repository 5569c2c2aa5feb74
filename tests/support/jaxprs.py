"""Walks through traced programs."""

from collections.abc import Iterator
from typing import Any

import jax


def equations(program: Any, around: tuple[str, ...] = ()) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Every equation of a `Jaxpr` or a `ClosedJaxpr`, and the names of those that hold it.

    The outermost name comes first: `("scan", "pjit")` for one in a function that a step calls.
    """
    for equation in getattr(program, "jaxpr", program).eqns:
        yield equation, around
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                yield from equations(inner, (*around, equation.primitive.name))

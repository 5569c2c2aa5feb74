"""Operands of weight products that are computed again after the loop instead of stacked in it.

The gradient of `(mask * h) @ W` reads `mask * h` of every step, but it is enough to keep `h`. If
each gate has a mask of its own, that is one array instead of one for each gate.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from .flat_jaxpr import Equation, Program, run_all

# Cheaper to compute a second time than to write and read.
CHEAP = frozenset(
    "add add_any sub mul neg div integer_pow square one_minus_square max min select_n copy "
    "convert_element_type broadcast_in_dim reshape squeeze expand_dims slice split concatenate "
    "transpose".split()
)


class Recomputed(NamedTuple):
    """Which values the loop stacks, and how the operands are computed from them.

    Attributes:
      sources: the values that the loop stacks.
      equations: compute the operands after the loop; none if the sources are the operands.
    """

    sources: set[int]
    equations: list[Equation]

    def run(self, stacks: dict[int, Any], known: dict[int, Any], steps: int) -> dict[int, Any]:
        """`stacks`, and the operands and intermediate values computed from them, `[time, ...]`."""
        made = {value for equation in self.equations for value in equation.outputs}
        read = {value for equation in self.equations for value in equation.inputs} - made

        def run_step(at_step: dict[int, Any]) -> dict[int, Any]:
            values = known | at_step
            run_all(self.equations, values)
            return {value: values[value] for value in made}

        at_step = {value: stacks[value] for value in read & stacks.keys()}
        return stacks | jax.vmap(run_step, axis_size=steps)(at_step)


def plan_operands(
    program: Program, loop: list[Equation], operands: set[int], known: set[int], xs: Iterable[int]
) -> Recomputed:
    """Plans which values to stack: the operands, or fewer bytes from which they are made.

    Args:
      program: the step.
      loop: the equations that the loop runs.
      operands: the values that are wanted at all steps.
      known: the values that are the same at all steps.
      xs: the values that are stacked in any case.
    """
    # From the operands backward, through cheap equations, to values that are stacked in any case,
    # are the same at all steps, or are expensive.
    makers = {value: equation for equation in loop for value in equation.outputs}
    sources: set[int] = set()
    used: set[tuple[int, ...]] = set()
    left = list(operands)
    while left:
        value = left.pop()
        if value in known or value in xs:
            continue
        maker = makers.get(value)
        if maker is None or maker.name not in CHEAP:
            sources.add(value)
        elif maker.outputs not in used:
            used.add(maker.outputs)
            left.extend(maker.inputs)
    # The sources may be larger than the operands: `a + b + c` is one operand made of three.
    stacked = operands.difference(xs)
    if program.num_bytes(sources) >= program.num_bytes(stacked):
        return Recomputed(stacked, [])
    return Recomputed(sources, [equation for equation in loop if equation.outputs in used])

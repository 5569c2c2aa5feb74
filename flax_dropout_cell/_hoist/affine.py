"""Finds the carries of a scan that can be known at all steps without running it step by step.

A carry `h` whose update is `a * h + b`, with `a` and `b` of the inputs alone, is a linear
recurrence, which a parallel scan solves. Elementwise noise keeps it one: dropout of the state
multiplies `a` and `b`, zoneout mixes `a` with 1, a reset sets `a` to 0 and padding sets it to 1.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from .._compat import function_name
from .flat_jaxpr import Equation, Program, is_inexact
from .kept_values import find_computed

# The operands in which an equation is affine, element by element, if the others do not depend on
# the carry. A product is affine in either operand, but not in both at once. Those that could mix
# elements, such as a slice, do not if the size stays the same.
_ANY = slice(None)
_AFFINE = {
    **dict.fromkeys(("add", "add_any", "sub", "mul", "neg", "copy"), _ANY),
    **dict.fromkeys(("convert_element_type", "reshape", "squeeze", "expand_dims", "slice"), _ANY),
    **dict.fromkeys(("broadcast_in_dim", "sharding_constraint", "pvary", "pcast"), _ANY),
    "div": slice(0, 1),
    "select_n": slice(1, None),
}


class Stage(NamedTuple):
    """Carries that can be computed for all steps, once those of the stages before are known.

    Attributes:
      kind: "shifted" if the new carry does not depend on an unknown one, so that the next step
        sees it as it is; "affine" for linear recurrences; "stepped" for integers, booleans, keys,
        and floats that a step keeps or replaces, such as masks: these take a loop of their own.
      leaves: the carries, as arguments of the step.
    """

    kind: Literal["shifted", "affine", "stepped"]
    leaves: list[int]


class Obstacle(NamedTuple):
    """An equation that keeps a carry from being a linear recurrence.

    Attributes:
      leaf: the carry, as an argument of the step.
      equation: None if the new carry is simply another carry.
      meets_another: whether it combines the carry with another that is not known either.
    """

    leaf: int
    equation: Equation | None
    meets_another: bool

    def __str__(self) -> str:
        name = "" if self.equation is None else _name(self.equation)
        if self.meets_another:
            return f"depends on another part of the carry{name and f', through {name}'}"
        if name == "mul":
            return "is multiplied by a value that depends on it"
        return f"goes through {name}"


def plan_stages(
    program: Program, updates: dict[int, int], known: Iterable[int]
) -> list[Stage] | Obstacle:
    """Orders the carries by when they can be computed.

    Args:
      program: the step.
      updates: the new carry of each carry.
      known: the values that do not depend on the carry.

    Returns:
      The stages, or an obstacle if one carry has no place in any.
    """
    # A carry may depend on another that is known by then: an episode's counter of steps decides on
    # a reset of h. So stages are found one after the other, each as large as it can be.
    known, waiting, stages = set(known), set(updates), []
    while waiting:
        for equation in program.equations:
            if known.issuperset(equation.inputs):
                known.update(equation.outputs)
        paths = {leaf: follow(program, leaf, known) for leaf in sorted(waiting)}
        ready: dict[Any, list[int]] = {
            "shifted": [leaf for leaf in paths if updates[leaf] in known],
            "affine": [leaf for leaf, path in paths.items() if updates[leaf] in path.affine],
        }
        # Only if nothing else is left, since these take a loop.
        if not any(ready.values()):
            ready = {"stepped": sorted(_steppable(program, updates, waiting))}
        if not any(ready.values()):
            return _obstacle(program, updates, paths)
        stages += [Stage(kind, leaves) for kind, leaves in ready.items() if leaves]
        known.update(*ready.values())
        waiting.difference_update(*ready.values())
    return stages


def has_recurrence(stages: list[Stage]) -> bool:
    """Whether a carry is a linear recurrence, and not only passed on or stepped through."""
    return any(stage.kind == "affine" for stage in stages)


class Path(NamedTuple):
    """The fate of one carry in a step.

    Attributes:
      affine: the values that are affine in it, element by element, and depend on no other carry.
      obstacles: why each other value that depends on an unknown carry is not.
    """

    affine: set[int]
    obstacles: dict[int, Obstacle]


def follow(program: Program, leaf: int, known: set[int]) -> Path:
    """Follows one carry through the equations that cannot be run yet."""
    path = Path({leaf} if program.is_inexact(leaf) else set(), {})
    for equation in program.equations:
        if known.issuperset(equation.inputs):
            continue
        obstacle = _obstacle_in(program, equation, leaf, known, path)
        if obstacle is None:
            path.affine.update(equation.outputs)
        else:
            path.obstacles.update(dict.fromkeys(equation.outputs, obstacle))
    return path


def _obstacle_in(
    program: Program, equation: Equation, leaf: int, known: set[int], path: Path
) -> Obstacle | None:
    for value in equation.inputs:
        if value in path.obstacles:
            return path.obstacles[value]
        if value not in path.affine and value not in known:
            return Obstacle(leaf, equation, meets_another=True)
    # "mul" is affine in each operand, but h * h is not affine.
    places = [at for at, value in enumerate(equation.arguments) if value in path.affine]
    allowed = range(len(equation.eqn.invars))[_AFFINE.get(equation.name, slice(0))]
    # One that changes the size mixes elements, and one that leaves the floats rounds them.
    size = math.prod(program.types[leaf].shape)
    fits = all(
        is_inexact(program.types[value]) and math.prod(program.types[value].shape) == size
        for value in equation.outputs
    )
    permutes = equation.name == "reshape" and equation.eqn.params["dimensions"] is not None
    is_square = equation.name == "mul" and len(places) == 2
    if not set(places) <= set(allowed) or is_square or permutes or not fits:
        return Obstacle(leaf, equation, meets_another=False)
    return None


def _steppable(program: Program, updates: dict[int, int], waiting: set[int]) -> set[int]:
    """The waiting carries that depend on none but each other, and that are cheap to step through.

    Those are integers, booleans and keys, and floats that no step computes with.
    """
    origins: dict[int, set[int]] = {leaf: {leaf} for leaf in waiting}
    for equation in program.equations:
        reads = set().union(*(origins.get(value, ()) for value in equation.inputs))
        origins.update(dict.fromkeys(equation.outputs, reads))
    # Until nothing changes: an integer that depends on one that depends on a float is out as well.
    floats = set(filter(program.is_inexact, waiting))
    computed = find_computed(program, floats)
    alone = {leaf for leaf in waiting if leaf not in floats or updates[leaf] not in computed}
    while left := {leaf for leaf in alone if not origins.get(updates[leaf], set()) <= alone}:
        alone -= left
    return alone


def _obstacle(program: Program, updates: dict[int, int], paths: dict[int, Path]) -> Obstacle:
    """The obstacle to name: one of a single carry if there is one."""
    found = [
        path.obstacles.get(updates[leaf], Obstacle(leaf, None, meets_another=True))
        for leaf, path in paths.items()
        if program.is_inexact(leaf)
    ]
    return min(found, key=lambda obstacle: obstacle.meets_another)


def _name(equation: Equation) -> str:
    """An equation's name; that of the function if it has a derivative of its own."""
    return function_name(equation.eqn.params.get("call_jaxpr")) or equation.name

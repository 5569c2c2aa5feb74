"""Values that a step keeps or replaces, as it does with the masks of rows that reset."""

import enum
from collections.abc import Iterable, Sequence
from typing import Any

from .._compat import Literal
from .flat_jaxpr import Program, is_call

# They move an array, or pick one of several; they do not pick by a float.
_MOVES = frozenset(
    "broadcast_in_dim copy expand_dims pcast pvary reshape select_n sharding_constraint "
    "squeeze".split()
)


class _Fate(enum.IntEnum):
    """The fate of a value, from the best to the worst; that of a result is the worst of all."""

    UNRELATED = 0
    KEPT = 1
    COMPUTED = 2


def find_computed(program: Program, values: Iterable[int]) -> set[int]:
    """Finds the values that a step computes from others, instead of keeping or replacing these."""
    fates: dict[Any, _Fate] = dict.fromkeys(values, _Fate.KEPT)
    for equation in program.equations:
        operands = [fates.get(value, _Fate.UNRELATED) for value in equation.arguments]
        fates.update(zip(equation.outputs, _fates_after(equation.eqn, operands), strict=True))
    return {value for value, fate in fates.items() if fate is _Fate.COMPUTED}


def _fates_after(eqn: Any, operands: Sequence[_Fate]) -> list[_Fate]:
    """The fates of the results of an equation."""
    name = eqn.primitive.name
    if name == "cond" and operands[0] is _Fate.UNRELATED:
        branches = [_fates_in(branch, operands[1:]) for branch in eqn.params["branches"]]
        return [max(fates) for fates in zip(*branches, strict=True)]
    if is_call(eqn):
        return _fates_in(eqn.params["jaxpr"], operands)
    worst = max(operands, default=_Fate.UNRELATED)
    if worst is _Fate.KEPT and name not in _MOVES:
        worst = _Fate.COMPUTED
    return [worst] * len(eqn.outvars)


def _fates_in(closed: Any, arguments: Sequence[_Fate]) -> list[_Fate]:
    """The fates of the results of a function."""
    fates = dict(zip(closed.jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> _Fate:
        return _Fate.UNRELATED if isinstance(atom, Literal) else fates.get(atom, _Fate.UNRELATED)

    for eqn in closed.jaxpr.eqns:
        fates.update(zip(eqn.outvars, _fates_after(eqn, [*map(read, eqn.invars)]), strict=True))
    return [*map(read, closed.jaxpr.outvars)]

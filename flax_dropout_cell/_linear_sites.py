"""Where a loop's step is linear in a weight, so that its gradient can wait for the loop's end."""

from collections.abc import Iterable
from typing import NamedTuple

from ._equations import Equation, Program

# The operands in which an equation is linear.
_PRODUCTS = {"dot_general": (0, 1), "conv_general_dilated": (1,), "gather": (0,)}
SUMMANDS = {"broadcast_in_dim": (0,), "add": (0, 1), "add_any": (0, 1)}
_SUMS = ("add", "add_any")
_CUTS = ("slice", "split")

# A gradient that is accumulated in the loop is read and written at each step; one that waits for
# the end needs its equation's operands and cotangents to be kept instead. From this share of the
# latter on the former costs more: measured, see docs/benchmarks.md. A batched product over all
# steps wants its batch to lead, before time, so both are transposed first.
WORTHWHILE = 0.8
WORTHWHILE_BATCHED = 5.0


class Site(NamedTuple):
    """An equation of the loop that is linear in a weight.

    Attributes:
      equation: the equation.
      weight: the value in which it is linear.
      operands: the other values that it reads, which differ from step to step.
    """

    equation: Equation
    weight: int
    operands: tuple[int, ...]

    @property
    def rows_lead(self) -> bool:
        """Whether what it makes has the rows of its one operand, so that steps are more rows."""
        if self.equation.name != "dot_general" or self.equation.inputs[0] == self.weight:
            return False
        (contracted, _), _ = self.equation.eqn.params["dimension_numbers"]
        return not self.is_batched and 0 not in contracted

    @property
    def is_batched(self) -> bool:
        """Whether it is many products of matrices."""
        if self.equation.name != "dot_general":
            return False
        _, (batch, _) = self.equation.eqn.params["dimension_numbers"]
        return bool(batch)


class Plan(NamedTuple):
    """A step, cut in two.

    Attributes:
      front: equations that depend on the loop's constants alone: they run once, before it.
      moving: the values before the loop that are differentiated.
      loop: the other equations.
      sums: the sites, by the value that their outputs are summed up in. They share its cotangent.
    """

    front: list[Equation]
    moving: set[int]
    loop: list[Equation]
    sums: dict[int, list[Site]]

    @property
    def sites(self) -> dict[tuple[int, ...], Site]:
        """Each site by what its equation makes."""
        return {site.equation.outputs: site for sites in self.sums.values() for site in sites}

    @property
    def operands(self) -> set[int]:
        """What the sites read besides their weights."""
        return {value for site in self.sites.values() for value in site.operands}

    def used_elsewhere(self, outputs: Iterable[int]) -> set[int]:
        """The differentiated values that the loop reads at other places than their sites."""
        sites = self.sites
        used = set(outputs)
        for equation in self.loop:
            site = sites.get(equation.outputs)
            used.update(value for value in equation.inputs if not site or value != site.weight)
        return used & self.moving


def plan_sites(program: Program, constants: Iterable[int], moving: Iterable[int]) -> Plan:
    """Plans a step whose values `constants` are the same at all steps.

    Args:
      program: the step.
      constants: the arguments that are the same at all steps.
      moving: those of them that are differentiated.
    """
    front, loop, known = _split(program, {*constants, *program.constants})
    moving = set(moving)
    for equation in front:
        if moving.intersection(equation.inputs):
            moving.update(filter(program.is_inexact, equation.outputs))
    paths = _Paths(loop, program.outputs)
    sums: dict[int, list[Site]] = {}
    for equation in loop:
        site = _as_site(equation, known, moving)
        if site is not None:
            sums.setdefault(paths.sum_of(equation.outputs[0]), []).append(site)
    worth = {total: sites for total, sites in sums.items() if _is_worth(program, total, sites)}
    return Plan(front, moving, loop, worth)


class _Paths:
    """Where values go in a loop's step."""

    def __init__(self, loop: list[Equation], outputs: list[int]) -> None:
        self._makers = {value: equation for equation in loop for value in equation.outputs}
        self._readers: dict[int, list[Equation]] = {value: [] for value in self._makers}
        for equation in loop:
            for value in equation.inputs:
                self._readers.setdefault(value, []).append(equation)
        self._outputs = set(outputs)

    def sum_of(self, value: int) -> int:
        """The last of the sums that a value goes into, and nowhere else."""
        while value not in self._outputs:
            readers = self._readers[value]
            if len(readers) == 1 and readers[0].name in _SUMS:
                value = readers[0].outputs[0]
            elif (twin := self._twin(value)) is not None and twin < value:
                value = twin
            else:
                break
        return value

    def _twin(self, value: int) -> int | None:
        """A value that is cut as this one is, and whose pieces are only added to those of it."""
        twins = set()
        for cut in self._readers[value]:
            for place, piece in enumerate(cut.outputs):
                twins.add(self._counterpart(cut, place, piece))
        twin = twins.pop() if len(twins) == 1 else None
        if twin not in self._makers or twin in self._outputs:
            return None
        return twin if len(self._readers[twin]) == len(self._readers[value]) else None

    def _counterpart(self, cut: Equation, place: int, piece: int) -> int | None:
        if cut.name not in _CUTS or len(self._readers[piece]) != 1 or piece in self._outputs:
            return None
        total = self._readers[piece][0]
        others = [value for value in total.inputs if value != piece]
        if total.name not in _SUMS or len(others) != 1 or others[0] not in self._makers:
            return None
        other = self._makers[others[0]]
        same = (other.name, other.eqn.params) == (cut.name, cut.eqn.params)
        alone = len(self._readers[others[0]]) == 1 and others[0] not in self._outputs
        return other.inputs[0] if same and alone and other.outputs[place] == others[0] else None


def _split(program: Program, known: set[int]) -> tuple[list[Equation], list[Equation], set[int]]:
    """The equations that can run before the loop, the others, and what is known before it."""
    front, loop = [], []
    for equation in program.equations:
        # What is larger than all it is made of is cheaper to make at each step than to read.
        inflates = program.size(equation.outputs) > program.size(equation.inputs)
        if known.issuperset(equation.inputs) and not inflates:
            front.append(equation)
            known.update(equation.outputs)
        else:
            loop.append(equation)
    return front, loop, known


def _as_site(equation: Equation, known: set[int], moving: set[int]) -> Site | None:
    linear = _PRODUCTS.get(equation.name) or SUMMANDS.get(equation.name, ())
    weights = [value for value in equation.inputs if value in known]
    if len(equation.eqn.invars) != len(equation.inputs) or len(weights) != 1:
        return None
    (weight,) = weights
    if weight not in moving or equation.inputs.index(weight) not in linear:
        return None
    operands = tuple(value for value in equation.inputs if value not in known)
    return Site(equation, weight, operands if equation.name in _PRODUCTS else ())


def _is_worth(program: Program, total: int, sites: list[Site]) -> bool:
    products = [site for site in sites if site.equation.name in _PRODUCTS and site.operands]
    operands = {value for site in products for value in site.operands}
    accumulated = program.size(site.weight for site in products)
    share = WORTHWHILE_BATCHED if any(site.is_batched for site in products) else WORTHWHILE
    return bool(products) and accumulated >= share * program.size([*operands, total])

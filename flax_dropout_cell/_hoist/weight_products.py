"""Where a loop's step is linear in a weight, so that its gradient can wait for the loop's end."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from .._sharding import explicit_sharding
from .flat_jaxpr import Equation, Program

# The operands in which an equation is linear.
_PRODUCTS = {  # equations of two values
    "dot_general": (0, 1),
    "conv_general_dilated": (1,),
    "gather": (0,),
    "mul": (0, 1),
    "div": (0,),
    "sub": (0, 1),
}
# Of a bias: its gradient is the cotangent, and needs no operand.
SUMMANDS = {"add": (0, 1), "add_any": (0, 1)}
_CUTS = ("slice", "split")

# In the loop, a gradient reads and writes all elements of the weight at each step. After the loop,
# it needs the operands and cotangents of all steps, which are kept. It waits if the weight has at
# least this many elements for each one that a step keeps: measured, see docs/benchmarks.md. A
# batched product over all steps transposes both arrays first, so its bound is higher.
MIN_WEIGHT_TO_KEPT = 0.8
MIN_WEIGHT_TO_KEPT_BATCHED = 5.0


class WeightUse(NamedTuple):
    """An equation of the loop that is linear in a weight.

    Attributes:
      equation: the equation.
      weight: the value in which it is linear.
      operands: the other values that its gradient needs, which differ from step to step; a sum
        has none.
    """

    equation: Equation
    weight: int
    operands: tuple[int, ...]

    @property
    def rows_lead(self) -> bool:
        """Whether what it makes has the rows of its one operand, so that steps are more rows."""
        eqn = self.equation.eqn
        if self.equation.name == "conv_general_dilated":
            numbers = eqn.params["dimension_numbers"]
            rows_lead = numbers.lhs_spec[0] == numbers.out_spec[0] == 0
            return rows_lead and eqn.params["batch_group_count"] == 1
        if self.equation.name != "dot_general" or self.equation.inputs[0] == self.weight:
            return False
        (contracted, _), _ = eqn.params["dimension_numbers"]
        has_rows = eqn.invars[0].aval.ndim > 0
        return has_rows and not self.is_batched and 0 not in contracted

    @property
    def is_batched(self) -> bool:
        """Whether it is many products of matrices."""
        if self.equation.name != "dot_general":
            return False
        _, (batch, _) = self.equation.eqn.params["dimension_numbers"]
        return bool(batch)


class Plan(NamedTuple):
    """Which equations run once, and which weights' gradients wait for the end of the loop.

    Attributes:
      once: equations that depend on the loop's constants alone; they run once, before it.
      differentiated: the values before the loop that are differentiated.
      narrowed: the values before the loop that were cast from a wide dtype to half precision.
      loop: the other equations, and casts that are repeated so that gradients add up in the wide
        dtype.
      known: the values that are the same at all steps.
      sums: the uses of weights, by the value that their outputs are summed up in. They share its
        cotangent.
    """

    once: list[Equation]
    differentiated: set[int]
    narrowed: set[int]
    loop: list[Equation]
    known: set[int]
    sums: dict[int, list[WeightUse]]

    @property
    def uses(self) -> dict[tuple[int, ...], WeightUse]:
        """Each use, by the outputs of its equation."""
        return {use.equation.outputs: use for uses in self.sums.values() for use in uses}

    @property
    def operands(self) -> set[int]:
        """The values that weight uses read, apart from the weights."""
        return {value for use in self.uses.values() for value in use.operands}

    def used_elsewhere(self, outputs: Iterable[int]) -> set[int]:
        """The differentiated values that the loop reads elsewhere than in their uses."""
        made = {value for equation in self.loop for value in equation.outputs}
        used = _read_elsewhere(self.loop, self.uses) | set(outputs)
        return (used - made) & self.differentiated


def plan_weight_uses(
    program: Program, constants: Iterable[int], differentiated: Iterable[int]
) -> Plan:
    """Plans a step whose values `constants` are the same at all steps.

    Args:
      program: the step.
      constants: the arguments that are the same at all steps.
      differentiated: those of them that are differentiated.
    """
    once, loop, known, narrowed = _split(program, {*constants, *program.literals})
    differentiated = set(differentiated)
    for equation in once:
        if differentiated.intersection(equation.inputs):
            differentiated.update(filter(program.is_inexact, equation.outputs))
    # Products that are added up, such as `x @ W + h @ U + b`, have one cotangent. Kept once for all
    # of them, it may be worth its memory even if it would not be for each alone.
    paths = _Paths(loop, program.outputs)
    sums: dict[int, list[WeightUse]] = {}
    for equation in loop:
        use = _as_weight_use(equation, known, differentiated)
        if use is not None:
            sums.setdefault(paths.sum_of(equation.outputs[0]), []).append(use)
    worth = {total: uses for total, uses in sums.items() if _saves_work(program, total, uses)}
    plan = Plan(once, differentiated, narrowed, loop, known, worth)
    # A gradient that is added up in the loop is added up in the wide dtype, as jax.lax.scan does.
    casts, needed = [], _read_elsewhere(loop, plan.uses) | set(program.outputs)
    for equation in reversed(once):
        if narrowed.intersection(equation.outputs) and needed.intersection(equation.outputs):
            casts.append(equation)
            needed.update(equation.inputs)
    return plan._replace(loop=[*reversed(casts), *loop])


def _read_elsewhere(loop: list[Equation], uses: dict[tuple[int, ...], WeightUse]) -> set[int]:
    """The values that equations read, except for the weights at their uses."""
    read = set()
    for equation in loop:
        use = uses.get(equation.outputs)
        read.update(value for value in equation.inputs if not use or value != use.weight)
    return read


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
        # An output has a cotangent of its own, and so has a value that is read twice.
        while value not in self._outputs:
            readers = self._readers[value]
            if len(readers) == 1 and readers[0].name in SUMMANDS:
                value = readers[0].outputs[0]
            elif (twin := self.equal_split_sibling(value)) is not None and twin < value:
                value = twin
            else:
                break
        return value

    def equal_split_sibling(self, value: int) -> int | None:
        """A value that is cut as this one is, and whose pieces are only added to those of it."""
        # `split(x @ W)` and `split(h @ U)`, added piece by piece, as in nn.OptimizedLSTMCell: the
        # sum of the whole is not computed, but its cotangent is that of both products.
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
        if total.name not in SUMMANDS or len(others) != 1 or others[0] not in self._makers:
            return None
        other = self._makers[others[0]]
        same = _cut_of(other) == _cut_of(cut)
        alone = len(self._readers[others[0]]) == 1 and others[0] not in self._outputs
        return other.inputs[0] if same and alone and other.outputs[place] == others[0] else None


def _cut_of(equation: Equation) -> tuple[Any, ...]:
    """The shape that an equation cuts, and how; equal bounds may cut arrays of other shapes."""
    return equation.name, equation.eqn.params, equation.eqn.invars[0].aval.shape


def _split(
    program: Program, known: set[int]
) -> tuple[list[Equation], list[Equation], set[int], set[int]]:
    """The equations that can run before the loop, the others, and the values known before it."""
    once, loop = [], []
    narrowed: set[int] = set()
    for equation in program.equations:
        is_known = known.issuperset(equation.inputs)
        narrows = is_known and (
            not narrowed.isdisjoint(equation.inputs) or program.narrows(equation)
        )
        if not is_known or (narrows and not equation.runs_in_any_dtype):
            loop.append(equation)
            continue
        once.append(equation)
        known.update(equation.outputs)
        if narrows:
            narrowed.update(filter(program.is_inexact, equation.outputs))
    return once, loop, known, narrowed


def is_linear(equation: Equation, value: int) -> bool:
    """Whether an equation is linear in one of its inputs."""
    linear = _PRODUCTS.get(equation.name) or SUMMANDS.get(equation.name, ())
    return equation.inputs.index(value) in linear


def _as_weight_use(
    equation: Equation, known: set[int], differentiated: set[int]
) -> WeightUse | None:
    weights = [value for value in equation.inputs if value in known]
    # With a literal, or with two weights, it runs before the loop or is no product.
    if None in equation.arguments or len(weights) != 1:
        return None
    (weight,) = weights
    if weight not in differentiated or not is_linear(equation, weight):
        return None
    operands = tuple(value for value in equation.inputs if value not in known)
    return WeightUse(equation, weight, operands if equation.name in _PRODUCTS else ())


def _saves_work(program: Program, total: int, uses: list[WeightUse]) -> bool:
    """Whether a gradient after the loop is cheaper than one that is accumulated in it."""
    if jax.device_count() > 1:  # a sum in the loop may be an all-reduce at each step
        return True
    # Biases are small and come along with their product; alone they stay in the loop.
    products = [use for use in uses if use.equation.name in _PRODUCTS and use.operands]
    operands = {value for use in products for value in use.operands}
    accumulated = program.size(use.weight for use in products)
    is_batched = any(use.is_batched for use in products)
    min_ratio = MIN_WEIGHT_TO_KEPT_BATCHED if is_batched else MIN_WEIGHT_TO_KEPT
    return bool(products) and accumulated >= min_ratio * program.size([*operands, total])


def at_every_step(use: WeightUse, run: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a product with a weight at all steps at once, on operands `[time, ...]`."""
    many = jax.device_count() > 1

    def run_each(weight: Any, *operands: Any) -> Any:
        return jax.vmap(run, (None, *[0] * len(operands)))(weight, *operands)

    if not use.rows_lead or (many and use.equation.name == "dot_general"):
        # The gradient of a product over `[time, batch]` contracts both axes. That keeps a batch
        # that is sharded as it is, but the compiler for CPUs transposes both operands for it.
        return run_each

    def run_rows(weight: Any, operand: Any) -> Any:
        if not many and explicit_sharding(operand) is not None:  # a reshape cannot merge its axes
            return run_each(weight, operand)
        # Steps become more rows. If the batch may be sharded it has to lead: `[time * batch]`
        # would interleave the shards, so each device would gather all rows.
        time, batch, *features = operand.shape
        if many:
            operand = operand.swapaxes(0, 1)
        result = run(weight, operand.reshape(time * batch, *features))
        result = result.reshape(*operand.shape[:2], *result.shape[1:])
        return result.swapaxes(0, 1) if many else result

    return run_rows

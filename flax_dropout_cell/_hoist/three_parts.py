"""A step cut in three: before the loop, in it, and after it.

    z = x @ W            before: needs no carry, so it can run for all steps at once
    h = tanh(z + h @ U)  in the loop: the next carry needs it
    y = h @ V            after: only y needs it

Running a part for all steps at once turns many small products into a large one. That pays if the
loop spends its time on reading the weight: `h @ U` with one row reads all of `U` at each step, and
so does `x @ W`, which over all steps reads `W` once. The same holds for `h @ V`.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax

from .flat_jaxpr import Equation, Program, changes_under_vmap
from .recomputed_operands import CHEAP
from .weight_products import Plan

# A product of `[rows, K]` and `[K, N]` moves out of the loop on a CPU if its weight is at least
# this many times as large as its rows, `K N` against `rows * (K + N)`. The forward pass of an LSTM
# takes 0.7 to 0.8 of the time at a ratio of 26 (two busy cores), but 0.9 to 1.1 at 8 and 1.1 to 1.3
# at 3.2, because the loop then writes and reads `z` instead of keeping it in the cache. Nothing was
# measured between 8 and 26.
MIN_WEIGHT_TO_ROWS = 16.0
# Smaller weights stay in a cache between steps, and their products keep the loop's exact bits.
MIN_WEIGHT_SIZE = 2**14
# The loop keeps `h` of all steps for `h @ V` after it. It may take this much memory, or as much as
# the ys that are made of it.
MAX_KEPT_BYTES = 16 * 2**20


def split_by_carry(
    equations: Iterable[Equation], carry: Iterable[int]
) -> tuple[list[Equation], list[Equation]]:
    """The equations that do not depend on the carry that comes in, and those that do."""
    carried, before, others = set(carry), [], []
    for equation in equations:
        if carried.isdisjoint(equation.inputs):
            before.append(equation)
        else:
            others.append(equation)
            carried.update(equation.outputs)
    return before, others


def only_for_ys(
    equations: Iterable[Equation], carry: Iterable[int], last: Iterable[int]
) -> list[Equation]:
    """The equations that depend on the carry that comes in, and that `last` does not need.

    Args:
      equations: the step.
      carry: the values of the carry that comes in.
      last: the values of the carry that goes out.
    """
    needed, after = set(last), []
    for equation in reversed(split_by_carry(equations, carry)[1]):
        if needed.isdisjoint(equation.outputs):
            after.append(equation)
        else:
            needed.update(equation.inputs)
    return after[::-1]


class Cut(NamedTuple):
    """Where the equations of a loop run.

    Attributes:
      before: before it, for all steps at once.
      loop: in it.
      after: after it, for all steps at once. Cheap ones may be in the loop as well.
      kept: the values that the loop keeps for those after it.
    """

    before: list[Equation]
    loop: list[Equation]
    after: list[Equation]
    kept: set[int]

    @property
    def is_all_in_loop(self) -> bool:
        """Whether the whole step runs in the loop."""
        return not self.before and not self.after


def cut_loop(program: Program, plan: Plan, carry: range, xs: Iterable[int], steps: int) -> Cut:
    """Cuts a loop: large products of few rows leave it if they can.

    Args:
      program: the step.
      plan: the plan of the step.
      carry: the values of the carry that comes in.
      xs: the inputs.
      steps: the number of steps.
    """
    before = products_before(program, plan, carry)
    made = _made_by(before)
    loop = [equation for equation in plan.loop if made.isdisjoint(equation.outputs)]
    after, kept = products_after(program, plan, loop, carry, made.union(xs), steps)
    # A y that is a carry as well is made in the loop.
    results = {*program.outputs[: len(carry)], *kept}
    return Cut(before, _needed_for(results, loop, after), after, kept)


def products_before(program: Program, plan: Plan, carry: Iterable[int]) -> list[Equation]:
    """The equations of a loop that run before it: large products, and what they are made of."""
    before, _ = split_by_carry(plan.loop, carry)
    makers = {value: equation for equation in before for value in equation.outputs}
    uses = plan.uses
    chosen: set[tuple[int, ...]] = set()
    for product in before:
        use = uses.get(product.outputs)
        needed = _makers_of(use.operands if use else product.inputs, makers)
        # Random bits are not cheap, so they stay: for all steps at once some PRNGs draw others.
        if (
            _is_faster_at_once(program, product, plan.known)
            and all(each.name in CHEAP for each in needed)
            and all(_may_leave_loop(each, plan) for each in (product, *needed))
        ):
            chosen.update(each.outputs for each in (product, *needed))
    return [equation for equation in before if equation.outputs in chosen]


def products_after(
    program: Program,
    plan: Plan,
    loop: list[Equation],
    carry: range,
    at_hand: set[int],
    steps: int,
) -> tuple[list[Equation], set[int]]:
    """The equations that run after a loop: large products that only ys need, and what follows them.

    Args:
      program: the step.
      plan: the plan of the step.
      loop: its equations that do not run before the loop.
      carry: the values of the carry that comes in.
      at_hand: the values that are known at all steps without the loop.
      steps: the number of steps.

    Returns:
      The equations, in the order in which they run, and the values that the loop keeps for them.
    """
    only_ys = only_for_ys(loop, carry, program.outputs[: len(carry)])
    chosen: set[tuple[int, ...]] = set()
    for product in only_ys:
        if _is_faster_at_once(program, product, plan.known):
            # Whatever reads a product that has moved has to move with it.
            followers = _followers(product, only_ys)
            if all(_may_leave_loop(equation, plan) for equation in followers):
                chosen.update(equation.outputs for equation in followers)
    after = [equation for equation in only_ys if equation.outputs in chosen]
    if not after:
        return [], set()

    after, kept = _with_cheap_makers(program, plan, loop, after, at_hand)
    ys = _made_by(after).intersection(program.outputs)
    products = _made_by(each for each in after if each.name == "dot_general") - ys
    # Memory that jax.lax.scan does not take: what the loop keeps, and the products of all steps.
    held = program.num_bytes(kept | products) * steps
    if held > max(MAX_KEPT_BYTES, program.num_bytes(ys) * steps):
        return [], set()
    return after, kept


def _followers(product: Equation, equations: list[Equation]) -> list[Equation]:
    """A product and whatever is made of it."""
    made, found = set(product.outputs), [product]
    for equation in equations:
        if not made.isdisjoint(equation.inputs):
            made.update(equation.outputs)
            found.append(equation)
    return found


def _may_leave_loop(equation: Equation, plan: Plan) -> bool:
    """Whether an equation may run for all steps at once."""
    use = plan.uses.get(equation.outputs)
    read = set(equation.inputs) - ({use.weight} if use else set())
    # The gradient of a weight in half precision adds up in float32, at each step.
    return plan.narrowed.isdisjoint(read) and not changes_under_vmap(equation)


def _with_cheap_makers(
    program: Program,
    plan: Plan,
    loop: list[Equation],
    after: list[Equation],
    at_hand: set[int],
) -> tuple[list[Equation], set[int]]:
    """Adds cheap equations to those after the loop if the loop then keeps no more for them.

    Returns:
      The equations, and the values that the loop keeps.
    """
    # `h @ V` may read `dropout(h)`. Keeping h and its mask instead of `dropout(h)` gains nothing,
    # so an equation is added only if its inputs are no larger than its outputs.
    known, made, ys = plan.known | at_hand, _made_by(after), set(program.outputs)
    kept = {value for equation in after for value in equation.inputs} - made - known
    added: set[tuple[int, ...]] = set()
    for equation in reversed(loop):
        is_read = not kept.isdisjoint(equation.outputs)
        is_cheap = equation.name in CHEAP and _may_leave_loop(equation, plan)
        # A y is kept in any case.
        if not is_read or not is_cheap or not ys.isdisjoint(equation.outputs):
            continue
        inputs = set(equation.inputs) - known - kept
        if program.size(inputs) <= program.size(equation.outputs):
            added.add(equation.outputs)
            kept = (kept - set(equation.outputs)) | inputs
    runs = made.union(*added)
    return [equation for equation in loop if not runs.isdisjoint(equation.outputs)], kept


def _needed_for(results: set[int], loop: list[Equation], after: list[Equation]) -> list[Equation]:
    """The equations of a loop without those that run after it and that nothing in it reads."""
    moved = {equation.outputs for equation in after}
    # Backward, so that the readers of a value are known when its own equation comes.
    needed, left = set(results), []
    for equation in reversed(loop):
        if equation.outputs not in moved or not needed.isdisjoint(equation.outputs):
            left.append(equation)
            needed.update(equation.inputs)
    return left[::-1]


def _made_by(equations: Iterable[Equation]) -> set[int]:
    return {value for equation in equations for value in equation.outputs}


def _makers_of(values: Iterable[int], makers: dict[int, Equation]) -> list[Equation]:
    """The equations that make values, and those that make their inputs."""
    found: dict[tuple[int, ...], Equation] = {}
    left = list(values)
    while left:
        maker = makers.get(left.pop())
        if maker is not None and maker.outputs not in found:
            found[maker.outputs] = maker
            left.extend(maker.inputs)
    return list(found.values())


def _is_faster_at_once(program: Program, product: Equation, known: set[int]) -> bool:
    """Whether a product of few rows and a large weight runs faster for all steps at once."""
    rows = [value for value in product.inputs if value not in known]
    if product.name != "dot_general" or len(product.inputs) != 2 or len(rows) != 1:
        return False
    _, (batch, _) = product.eqn.params["dimension_numbers"]
    # A vector may be one of many rows, under `jax.vmap`.
    if batch or len(program.types[rows[0]].shape) < 2:
        return False
    weight = program.size(set(product.inputs) - set(rows))
    # On an accelerator any ratio pays: the loop starts one kernel less at each step (argued, not
    # measured).
    min_ratio = MIN_WEIGHT_TO_ROWS if jax.default_backend() == "cpu" else 0
    return weight >= max(MIN_WEIGHT_SIZE, min_ratio * program.size([*rows, *product.outputs]))

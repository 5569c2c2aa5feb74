"""Scans whose carry is a linear recurrence, for all steps at once.

A step is cut at its carry: whatever does not depend on it is computed for all steps first, then the
recurrence `h[t] = a[t] * h[t - 1] + b[t]` is solved (Blelloch 1990, section 1.4.1), and then the
outputs are computed for all steps from the carries that they saw.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .._dtypes import wide_dtype
from .affine import Obstacle, Stage, follow, plan_stages
from .flat_jaxpr import Equation, Program, changes_under_vmap, run_all
from .traced_scan import TracedScan
from .weight_products import WeightUse, at_every_step


def linear_recurrence(slope: jax.Array, offset: jax.Array, *, reverse: bool = False) -> jax.Array:
    """Solves `h[t] = slope[t] * h[t - 1] + offset[t]`, from `h[-1] = 0`.

    This is a linear system with ones on the diagonal and `-slope` below it, and is differentiated
    as one: a tangent is the same recurrence, a cotangent the one that runs the other way. Nothing
    of the solver is kept for the gradient but `slope` and `h`.

    Args:
      slope: `[time, ...]`, real or complex.
      offset: the same shape.
      reverse: run from the last step to the first.
    """

    # jax.lax.associative_scan would be differentiated through all its levels, and keep them. As the
    # solution of a linear system, the gradient is one more recurrence.
    def multiply(h: jax.Array) -> jax.Array:
        return h - slope * _previous(h, jnp.zeros_like(h[0]), reverse)

    def solve(_: Any, offset: jax.Array) -> jax.Array:
        return _solve(slope, offset, reverse)

    def solve_transposed(_: Any, cotangent: jax.Array) -> jax.Array:
        back = _previous(slope, jnp.zeros_like(slope[0]), not reverse)
        return _solve(back, cotangent, not reverse)

    return jax.lax.custom_linear_solve(multiply, offset, solve, solve_transposed)


def _solve(slope: jax.Array, offset: jax.Array, reverse: bool) -> jax.Array:
    # A CPU has no use for the additional work of the parallel scan: one multiplication and
    # addition after the other are 3 to 8 times faster there.
    return jax.lax.platform_dependent(
        slope,
        offset,
        cpu=functools.partial(_solve_step_by_step, reverse=reverse),
        default=functools.partial(_solve_at_once, reverse=reverse),
    )


def _solve_step_by_step(slope: jax.Array, offset: jax.Array, *, reverse: bool) -> jax.Array:
    def step(h: jax.Array, now: Any) -> tuple[jax.Array, jax.Array]:
        h = _advance(h, *now)
        return h, h

    return jax.lax.scan(step, jnp.zeros_like(offset[0]), (slope, offset), reverse=reverse)[1]


def _advance(h: jax.Array, slope: jax.Array, offset: jax.Array) -> jax.Array:
    """`slope * h + offset`, in which a NaN of h does not survive a reset or a dropped unit."""
    return jnp.where(slope == 0, offset, slope * h + offset)


def _solve_at_once(slope: jax.Array, offset: jax.Array, *, reverse: bool) -> jax.Array:
    # A step is the function h -> a h + b. Two of them, one after the other, are such a function
    # too.
    def join(early: Any, late: Any) -> Any:
        # 0 after a reset, even if the slopes before it overflowed: inf * 0 would be NaN.
        slope = jnp.where(late[0] == 0, late[0], early[0] * late[0])
        return slope, _advance(early[1], *late)

    return jax.lax.associative_scan(join, (slope, offset), reverse=reverse)[1]


def find_stages(traced: TracedScan) -> list[Stage] | Obstacle:
    """The order in which the carries of a step can be computed for all steps at once.

    Returns:
      The stages, or why there are none: the carry is not a linear recurrence.
    """
    changing, known = _changing_carries(traced)
    # Carries that a step returns unchanged are known at all steps, and need no stage.
    return plan_stages(traced.program, changing, [*known, *traced.program.literals])


def scan_in_parallel(
    traced: TracedScan, stages: list[Stage], leaves: list[Any], *, reverse: bool
) -> list[Any]:
    """Runs a scan without a loop over its step.

    Args:
      traced: the scan, of at least one step.
      stages: the stages of its carries, from `find_stages`.
      leaves: its arguments: constants, carry and inputs, which are `[time, ...]`.
      reverse: run from the last step to the first.

    Returns:
      The last carry and the outputs.
    """
    program, carry = traced.program, traced.carry
    changing, known = _changing_carries(traced)
    arguments = {at: leaves[at] for at in known}
    same = {*traced.constants, *known.intersection(carry)}
    # Turn by turn: run all equations whose inputs are known, then solve for the next carries, which
    # makes more inputs known. The last turn runs the equations of ys.
    history = _History(program, arguments, same, traced.steps)
    last = {leaf: leaves[leaf] for leaf in carry}
    for stage in stages:
        history.advance()
        firsts = {leaf: leaves[leaf] for leaf in stage.leaves}
        for leaf, new in history.solve(stage, changing, firsts, reverse).items():
            history.values[leaf] = _previous(new, firsts[leaf], reverse)
            history.know(changing[leaf], new)
            last[leaf] = new[0 if reverse else -1]
    history.advance()
    return [*last.values(), *map(history.at_all_steps, program.outputs[len(carry) :])]


def _changing_carries(traced: TracedScan) -> tuple[dict[int, int], set[int]]:
    """The update of each carry that changes, and the arguments that do not depend on one."""
    updates = dict(zip(traced.carry, traced.program.outputs, strict=False))
    changing = {leaf: update for leaf, update in updates.items() if leaf != update}
    return changing, set(range(traced.xs.stop)) - changing.keys()


class _History:
    """The values of a step at all steps; those that are the same at all steps have no time axis.

    Args:
      program: the step.
      arguments: those of its arguments that are known.
      same: those of them that are the same at all steps.
      steps: how many steps there are.
    """

    def __init__(
        self, program: Program, arguments: dict[int, Any], same: set[int], steps: int
    ) -> None:
        self._program, self._steps = program, steps
        self._same = {*same, *program.literals}
        self._waiting = program.equations
        self.values = program.literals | arguments

    def know(self, value: int, at_all_steps: jax.Array) -> None:
        """Takes a value as it is, so that no equation makes it a second time."""
        if value in self.values:
            return
        self.values[value] = at_all_steps
        # A draw of masks, of which a loop has just made those of all steps, would be the most
        # expensive equation of all.
        self._waiting = [
            equation
            for equation in self._waiting
            if not self.values.keys() >= set(equation.outputs)
        ]

    def advance(self) -> None:
        """Runs the equations whose inputs are known."""
        waiting = []
        for equation in self._waiting:
            if self.values.keys() >= set(equation.inputs):
                self._run(equation)
            else:
                waiting.append(equation)
        self._waiting = waiting

    def _run(self, equation: Equation) -> None:
        inputs = [self.values[value] for value in equation.inputs]
        if self._same.issuperset(equation.inputs):
            self._same.update(equation.outputs)
            outputs = equation(*inputs)
        elif changes_under_vmap(equation):
            outputs = self._map(equation, inputs)
        elif (use := self._as_weight_use(equation)) is not None:
            at = equation.inputs.index(use.weight)
            run = at_every_step(use, lambda weight, rows: equation(rows, weight)[0])
            outputs = [run(inputs[at], inputs[1 - at])]
        else:
            outputs = jax.vmap(equation, tuple(map(self._axis, equation.inputs)))(*inputs)
        self.values.update(zip(equation.outputs, outputs, strict=True))

    def _as_weight_use(self, equation: Equation) -> WeightUse | None:
        """A product of rows and a weight, in which steps are more rows.

        Under `jax.vmap` its gradient would be a sum over two axes, time and rows, which XLA for
        CPUs adds up in bfloat16 if the weight is in bfloat16. On several devices it still is.
        """
        weights = self._same.intersection(equation.inputs)
        if equation.name != "dot_general" or len(set(equation.inputs)) != 2 or len(weights) != 1:
            return None
        (weight,) = weights
        rows = tuple(value for value in equation.inputs if value != weight)
        use = WeightUse(equation, weight, rows)
        return use if use.rows_lead else None

    def _map(self, equation: Equation, inputs: list[Any]) -> list[Any]:
        """Runs an equation for one step after the other."""
        places = [at for at, value in enumerate(equation.inputs) if value not in self._same]

        def run(varying: list[Any]) -> list[Any]:
            now = dict(enumerate(inputs)) | dict(zip(places, varying, strict=True))
            return equation(*now.values())

        return jax.lax.map(run, [inputs[at] for at in places])

    def _axis(self, value: int) -> int | None:
        return None if value in self._same else 0

    def at_all_steps(self, value: int) -> jax.Array:
        """A value with its time axis."""
        known = jnp.asarray(self.values[value])  # a constant may be a Python number
        if value not in self._same:
            return known
        return jnp.broadcast_to(known, (self._steps, *known.shape))

    def solve(
        self, stage: Stage, updates: dict[int, int], firsts: dict[int, Any], reverse: bool
    ) -> dict[int, jax.Array]:
        """The new carries of a stage, at all steps."""
        if stage.kind == "shifted":
            return {leaf: self.at_all_steps(updates[leaf]) for leaf in stage.leaves}
        if stage.kind == "stepped":
            return self._step_through(updates, firsts, reverse)
        return {
            leaf: self._solve_affine(leaf, updates[leaf], firsts[leaf], reverse)
            for leaf in stage.leaves
        }

    def _solve_affine(self, leaf: int, update: int, first: jax.Array, reverse: bool) -> jax.Array:
        # Slope and offset without algebra: an affine function's value at 0, and its tangent there.
        affine = follow(self._program, leaf, set(self.values)).affine
        equations = _leading_to({update}, [it for it in self._waiting if affine & {*it.outputs}])
        known = self._read_by(equations)

        def at_step(known: dict[int, Any]) -> tuple[jax.Array, jax.Array]:
            def run(h: jax.Array) -> jax.Array:
                values = known | {leaf: h}
                run_all(equations, values)
                return values[update]

            return jax.jvp(run, (jnp.zeros_like(first),), (jnp.ones_like(first),))

        axes = {value: self._axis(value) for value in known}
        if self._same.issuperset(known):
            offset, slope = (
                jnp.broadcast_to(each, (self._steps, *each.shape)) for each in at_step(known)
            )
        else:
            offset, slope = jax.vmap(at_step, (axes,))(known)
        # Rounding errors of half precision would add up from step to step.
        wide = wide_dtype(first.dtype)
        offset, slope = offset.astype(wide), slope.astype(wide)
        # h[-1] = 0 in the solver, so the initial carry goes into the first offset.
        begin = -1 if reverse else 0
        # JAX differentiates this line, so not `_advance`, which has no derivative by a slope of 0.
        is_bad = (slope[begin] == 0) & ~jnp.isfinite(first)
        start = jnp.where(is_bad, jnp.zeros_like(first), first).astype(wide)
        offset = offset.at[begin].set(slope[begin] * start + offset[begin])
        return linear_recurrence(slope, offset, reverse=reverse).astype(first.dtype)

    def _step_through(
        self, updates: dict[int, int], firsts: dict[int, Any], reverse: bool
    ) -> dict[int, jax.Array]:
        """A loop over what some carries depend on, and nothing else."""
        equations = _leading_to({updates[leaf] for leaf in firsts}, self._waiting)
        known = self._read_by(equations)
        fixed = {value: it for value, it in known.items() if value in self._same}
        varying = {value: it for value, it in known.items() if value not in self._same}

        def step(carry: dict[int, Any], now: dict[int, Any]) -> Any:
            values = fixed | now | carry
            run_all(equations, values)
            new = {leaf: values[updates[leaf]] for leaf in carry}
            return new, new

        return jax.lax.scan(step, firsts, varying, length=self._steps, reverse=reverse)[1]

    def _read_by(self, equations: list[Equation]) -> dict[int, Any]:
        """The known values that equations read."""
        read = {value for equation in equations for value in equation.inputs}
        return {value: self.values[value] for value in read if value in self.values}


def _leading_to(wanted: set[int], equations: list[Equation]) -> list[Equation]:
    """The equations that some values are made by."""
    needed, wanted = [], set(wanted)
    for equation in reversed(equations):
        if wanted.intersection(equation.outputs):
            needed.append(equation)
            wanted.update(equation.inputs)
    return needed[::-1]


def _previous(values: jax.Array, first: jax.Array, reverse: bool) -> jax.Array:
    """The values of the step before, for each step."""
    pieces = [values[1:], first[None]] if reverse else [first[None], values[:-1]]
    return jnp.concatenate(pieces)

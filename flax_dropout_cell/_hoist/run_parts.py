"""Runs a traced scan: what goes before the loop, the loop, and what goes after it."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax

from .flat_jaxpr import Equation, run_all
from .recomputed_operands import CHEAP
from .traced_scan import TracedScan
from .weight_products import Plan


def run_without_rule(traced: TracedScan, plan: Plan, leaves: list[Any]) -> list[Any]:
    """Runs a scan whose derivative is left to JAX.

    It still keeps less for its gradient than `jax.lax.scan`.
    """
    values = traced.program.literals | dict(enumerate(leaves))
    run_all(plan.once, values)
    return run_parts(traced, plan, values, {}, {})[0]


def run_parts(
    traced: TracedScan,
    plan: Plan,
    fixed: dict[int, Any],
    differentiated: dict[int, Any],
    sums: dict[int, Any],
) -> tuple[list[Any], dict[int, Any]]:
    """Runs the parts of a step before the loop, in it and after it.

    Args:
      traced: the scan.
      plan: its plan.
      fixed: the values that nothing differentiates here; each weight use reads its weight there.
      differentiated: the values that are differentiated; every other reader reads these.
      sums: zeros `[time, ...]`, one for each entry of `plan.sums`; their tangents enter there.

    Returns:
      The results of the scan, and the values of all steps that the weights' gradients need.
    """
    values, cut = fixed | differentiated, traced.cut(plan)
    outputs = traced.program.outputs
    sources = traced.operands(plan).sources

    # The weight of `h @ W` comes from `fixed`, which nothing differentiates, and every other reader
    # of W has the one that is. So JAX finds no path from this product to W, and adds up no dW.
    uses = plan.uses

    def run(equation: Equation, inputs: list[Any]) -> list[Any]:
        use = uses.get(equation.outputs)
        if use is not None:
            inputs[equation.inputs.index(use.weight)] = fixed[use.weight]
        return equation(*inputs)

    sequences = pick(values, traced.xs)
    run_at_all_steps = functools.partial(
        _run_at_all_steps, run=run, values=values, sequences=sequences, sums=sums
    )
    run_at_all_steps(cut.before, steps=traced.steps)
    ys = outputs[len(traced.carry) :]
    # Values that are known at all steps, or made after the loop, do not come out of it.
    made_after = {value for equation in cut.after for value in equation.outputs}
    stacked = (sources | cut.kept | set(ys)) - sequences.keys() - made_after
    made = {value for equation in cut.loop for value in equation.outputs}
    read = {value for equation in cut.loop for value in equation.inputs}.union(outputs, stacked)

    def step(carry: list[Any], at: Any) -> tuple[list[Any], Any]:
        x, sums = at
        # Later entries win: an input of this step over one of all steps.
        now = values | x | dict(zip(traced.carry, carry, strict=True))

        def run_and_add(equation: Equation, inputs: list[Any]) -> list[Any]:
            # A zero is added, whose tangent is the weight's share of this sum's tangent.
            # Transposed, its cotangent is that of the sum: the `dz` that `dW = h.T @ dz` needs.
            return _add_tangents(equation, run(equation, inputs), sums)

        run_all(cut.loop, now, run_and_add)
        return [now[value] for value in outputs[: len(carry)]], pick(now, stacked)

    # A policy makes jax.checkpoint round what it keeps, and complex numbers cannot be rounded.
    if not traced.is_complex:
        step = jax.checkpoint(step, policy=_is_kept, prevent_cse=False)
    first = [values[at] for at in traced.carry]
    last, stacks = traced.loop(step, first, (pick(sequences, read), pick(sums, made)))
    # Known at all steps now, so that the equations after the loop read them as they read xs.
    sequences.update(stacks)
    run_at_all_steps(cut.after, steps=traced.steps)
    return [*last, *(sequences[value] for value in ys)], pick(sequences, sources)


def _run_at_all_steps(
    equations: list[Equation],
    run: Callable[[Equation, list[Any]], list[Any]],
    values: dict[int, Any],
    sequences: dict[int, Any],
    sums: dict[int, Any],
    steps: int,
) -> None:
    """Runs equations for all steps at once, and adds the results to `sequences`.

    Those that are the same at all steps are added to `values`.
    """
    for equation in equations:
        is_constant = sequences.keys().isdisjoint(equation.inputs)
        if is_constant and sums.keys().isdisjoint(equation.outputs):
            run_all([equation], values, run)
            continue
        # vmap and not a reshape: an equation may reduce, split or transpose any of its axes.
        inputs = [sequences.get(at, values.get(at)) for at in equation.inputs]
        axes = [0 if at in sequences else None for at in equation.inputs]
        every_step = jax.vmap(
            lambda *inputs, equation=equation: run(equation, list(inputs)), axes, axis_size=steps
        )
        made = _add_tangents(equation, every_step(*inputs), sums)
        sequences.update(zip(equation.outputs, made, strict=True))


def _add_tangents(equation: Equation, made: list[Any], sums: dict[int, Any]) -> list[Any]:
    """Adds the weights' shares to the tangents of an equation's outputs."""
    named = zip(equation.outputs, made, strict=True)
    return [_with_tangent(it, sums[at]) if at in sums else it for at, it in named]


# `value + summand` with a summand of zeros would do, but the zeros of all steps would be read.
@jax.custom_jvp
def _with_tangent(value: Any, summand: Any) -> Any:
    """The value; its tangent is the sum of both tangents."""
    del summand
    return value


_with_tangent.defjvp(lambda primals, tangents: (primals[0], tangents[0] + tangents[1]))


# For jax.checkpoint. The results of matmuls and of functions such as tanh are kept for the
# gradient; sums, products and casts are computed again. To keep those too would take five more
# arrays per step of an LSTM.
def _is_kept(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in CHEAP


def pick(values: dict[int, Any], wanted: Iterable[int]) -> dict[int, Any]:
    """The wanted entries of `values`, without those that it does not have."""
    return {value: values[value] for value in wanted if value in values}

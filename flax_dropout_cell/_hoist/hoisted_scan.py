"""`jax.lax.scan` whose weights' gradients are not accumulated in its backward loop.

`jax.lax.scan` differentiates `h @ W` as `dW += h.T @ dz` at each step of the backward loop, which
reads and writes all of `dW`. Here the loop keeps `h` and gives out `dz`, and one product over all
steps makes `dW` of them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_leaves_with_path

from .._compat import eval_jaxpr
from .affine import Obstacle, has_recurrence
from .linear_recurrence import find_stages, scan_in_parallel
from .run_loop import run_cut
from .traced_scan import Step, TracedScan, trace_scan
from .weight_gradients import differentiate

PyTree = Any


def scan_in_parts(
    step: Step,
    carry: PyTree,
    xs: PyTree,
    *,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    parallel: bool | None = None,
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan`: the same numbers to rounding, forward and differentiated in any way.

    A step that is not understood runs in `jax.lax.scan` as it is. A carry that is a linear
    recurrence needs no loop over the step: see `scan_in_parallel`.

    Args:
      step: as in `jax.lax.scan`.
      carry: the initial carry.
      xs: the inputs.
      length: as in `jax.lax.scan`.
      reverse: as in `jax.lax.scan`.
      unroll: as in `jax.lax.scan`; without effect on a linear recurrence that runs in parallel.
      parallel: True insists on all steps at once, False on a loop; None runs linear recurrences at
        once except on a CPU, where a loop is as fast and takes less memory.
    """
    # The order of the questions: can the step be traced, is it a linear recurrence, can it be cut
    # up, and does it have a weight whose gradient can wait? Each "no" leads to a plainer loop.
    loop = functools.partial(jax.lax.scan, length=length, reverse=reverse, unroll=unroll)
    carry, xs = jax.tree.map(jnp.asarray, (carry, xs))
    traced = trace_scan(step, carry, xs, loop)
    if isinstance(traced, str):
        if parallel:
            raise ValueError(
                f"parallel=True cannot run this scan, because {traced}. Leave parallel=None to run "
                f"it step by step."
            )
        return loop(step, carry, xs)
    leaves = [*traced.closed.consts, *jax.tree.leaves((carry, xs))]
    results = _run_in_parallel(traced, carry, leaves, reverse, parallel)
    if results is None and traced.plain is not None:
        return loop(step, carry, xs)
    if results is None:
        results = _run_with_rule(traced, leaves)
    return jax.tree.unflatten(traced.structure, results)


def _run_with_rule(traced: TracedScan, leaves: list[Any]) -> list[Any]:
    """The results of the scan as a loop, with the rule for its weights if some can wait."""
    plan = traced.plan(traced.constants)
    # Without such a weight JAX differentiates the loop itself: there is no rule to give.
    if not plan.sums:
        return run_cut(traced, traced.plan(()), leaves)

    # A rule for tangents, not for cotangents (custom_vjp): JAX transposes it where reverse mode is
    # asked for, so forward mode, jax.linearize, higher orders and jax.vmap all work.
    @jax.custom_jvp
    def run(*leaves: Any) -> list[Any]:
        # Not differentiated, this is the user's own loop: XLA compiles it as it compiles
        # jax.lax.scan.
        if not traced.cut(plan).has_loop_alone:
            return run_cut(traced, plan, list(leaves))
        consts, carry, xs = (
            [leaves[at] for at in part] for part in (traced.constants, traced.carry, traced.xs)
        )

        def flat_step(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
            results = eval_jaxpr(traced.closed.jaxpr, consts, *carry, *x)
            return results[: len(carry)], results[len(carry) :]

        carry, ys = traced.loop(flat_step, carry, xs)
        return [*carry, *ys]

    # Symbolic zeros tell which weights are differentiated; only their products leave the loop.
    @functools.partial(run.defjvp, symbolic_zeros=True)
    def rule(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        return differentiate(traced, primals, tangents)

    return run(*leaves)


def _run_in_parallel(
    traced: TracedScan, carry: PyTree, leaves: list[Any], reverse: bool, parallel: bool | None
) -> list[Any] | None:
    """The results of the scan without a loop over its step; None if it is to run as a loop."""
    # The platform that a program is traced on: one that is traced for several has one loop for all.
    wanted = jax.default_backend() != "cpu" if parallel is None else parallel
    if not wanted or traced.steps == 0:
        return None
    stages = find_stages(traced.program, traced.carry, len(leaves))
    if isinstance(stages, Obstacle):
        if not parallel:
            return None
        raise ValueError(
            f"parallel=True needs a carry that is a linear recurrence, a * carry + b for each "
            f"element, with a and b of the inputs alone; but "
            f"{say_obstacle(stages, traced.carry, carry)}. Leave parallel=None to run it step by "
            f"step."
        )
    # A scan without a recurrence is a map: its user may loop to save memory.
    if not parallel and not has_recurrence(stages):
        return None
    return scan_in_parallel(
        traced.program,
        stages,
        traced.constants,
        traced.carry,
        leaves,
        steps=traced.steps,
        reverse=reverse,
    )


def say_obstacle(obstacle: Obstacle, leaves: range, carry: PyTree) -> str:
    """Says which leaf of the carry meets an obstacle, and which obstacle it is."""
    paths = [keystr(path).lstrip(".") or "it" for path, _ in tree_leaves_with_path(carry)]
    return f"{paths[obstacle.leaf - leaves.start]} {obstacle}"

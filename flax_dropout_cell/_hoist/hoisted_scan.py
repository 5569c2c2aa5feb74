"""`jax.lax.scan` whose weights' gradients are not accumulated in its backward loop.

`jax.lax.scan` differentiates `h @ W` as `dW += h.T @ dz` at each step of the backward loop, which
reads and writes all of `dW`. Here the backward loop returns `dz` of all steps, and one product over
all steps makes `dW` after it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_leaves_with_path

from .._compat import eval_jaxpr
from .affine import Obstacle, has_recurrence
from .linear_recurrence import find_stages, scan_in_parallel
from .run_parts import run_without_rule
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
    # In this order: a step that cannot be traced runs as it is; a linear recurrence needs no loop;
    # a step that cannot be cut up runs as it is; the others are cut, with a derivative rule for
    # weights whose gradients can wait.
    options: dict[str, Any] = {"length": length, "reverse": reverse, "unroll": unroll}
    carry, xs = jax.tree.map(jnp.asarray, (carry, xs))
    traced = trace_scan(step, carry, xs, **options)
    if isinstance(traced, str):
        if parallel:
            raise ValueError(
                f"parallel=True cannot run this scan, because {traced}. Leave parallel=None to run "
                f"it step by step."
            )
        return jax.lax.scan(step, carry, xs, **options)
    leaves = [*traced.closed.consts, *jax.tree.leaves((carry, xs))]
    results = _run_in_parallel(traced, carry, leaves, reverse, parallel)
    if results is None and traced.plain is not None:
        return jax.lax.scan(step, carry, xs, **options)
    if results is None:
        results = _run_with_rule(traced, leaves)
    return jax.tree.unflatten(traced.structure, results)


def _run_with_rule(traced: TracedScan, leaves: list[Any]) -> list[Any]:
    """Runs the scan as a loop, with a derivative rule if some weights' gradients can wait."""
    plan = traced.plan(traced.constants)
    # Without such a weight JAX differentiates the loop itself: there is no rule to give.
    if not plan.sums:
        return run_without_rule(traced, traced.plan(()), leaves)

    # A rule for tangents, not for cotangents (custom_vjp): JAX transposes it where reverse mode is
    # asked for, so forward mode, jax.linearize, higher orders and jax.vmap all work.
    @jax.custom_jvp
    def run(*leaves: Any) -> list[Any]:
        # Not differentiated, this is the user's own loop: XLA compiles it as it compiles
        # jax.lax.scan.
        if not traced.cut(plan).is_all_in_loop:
            return run_without_rule(traced, plan, list(leaves))
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
    # The platform at trace time: a program that is lowered for several is the same on all of them.
    wanted = jax.default_backend() != "cpu" if parallel is None else parallel
    if not wanted or traced.steps == 0:
        return None
    stages = find_stages(traced)
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
    return scan_in_parallel(traced, stages, leaves, reverse=reverse)


def say_obstacle(obstacle: Obstacle, arguments: range, carry: PyTree) -> str:
    """Says which leaf of the carry meets an obstacle, and which obstacle it is."""
    paths = [keystr(path).lstrip(".") or "it" for path, _ in tree_leaves_with_path(carry)]
    return f"{paths[obstacle.leaf - arguments.start]} {obstacle}"

"""The public scan: `jax.lax.scan` with its signature, and a table of how a step is cut."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax

from .affine import Obstacle, has_recurrence
from .flat_jaxpr import Equation, Program
from .hoisted_scan import say_obstacle, scan_in_parts
from .linear_recurrence import find_stages
from .traced_scan import TracedScan, trace_scan
from .weight_products import Plan, is_linear

PyTree = Any
Step = Callable[[Any, Any], tuple[Any, Any]]


def scan(
    step: Step,
    init: PyTree,
    xs: PyTree = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan` whose weights' gradients are computed after the backward loop.

    The numbers are those of `jax.lax.scan` to rounding, in forward and reverse mode, for higher
    orders and under `jax.vmap`. A step that cannot be cut up runs in `jax.lax.scan` as it is;
    `explain_scan` says what happens to a step. There is no dropout in it: see `dropout_scan`.

    Args:
      step: `step(carry, x) -> (carry, y)`.
      init: the initial carry.
      xs: the inputs, a pytree of arrays `[time, ...]`, or None.
      length: the number of steps; needed only if `xs` has no arrays.
      reverse: run from the last step to the first.
      unroll: as in `jax.lax.scan`.

    Returns:
      `(carry, ys)`: the last carry, and the outputs `[time, ...]`.

    Raises:
      TypeError, ValueError: as `jax.lax.scan`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> w = jnp.eye(8)
      >>> def step(h, x):
      ...     h = jnp.tanh(x + h @ w)
      ...     return h, h
      >>> h, ys = fdc.scan(step, jnp.zeros((4, 8)), jnp.ones((20, 4, 8)))
      >>> h.shape, ys.shape
      ((4, 8), (20, 4, 8))
    """
    return scan_in_parts(step, init, xs, length=length, reverse=reverse, unroll=unroll)


class ScanExplanation(NamedTuple):
    """The parts in which `scan` runs a step; it prints as a table.

    Attributes:
      why_plain: why the step runs in `jax.lax.scan` as it is, or None.
      once: equations on values that are the same at all steps, which run once.
      before: equations that run before the loop, for all steps at once.
      loop: equations that run in the loop.
      after: equations that run after the loop, for all steps at once, as only ys need them.
      gradients_after: weights whose gradients are computed after the backward loop.
      gradients_in_loop: weights whose gradients are added up in it, and why.
      obstacle: why the carry is not a linear recurrence, `a * carry + b` element by element; None
        if it is one, which runs without a loop on a GPU or TPU, or with `parallel=True`.
    """

    why_plain: str | None
    once: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    loop: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    gradients_after: tuple[str, ...] = ()
    gradients_in_loop: tuple[str, ...] = ()
    obstacle: str | None = None

    def __str__(self) -> str:
        if self.why_plain is not None:
            parallel = ", unless it runs in parallel: the carry is a linear recurrence"
            return say_plain(self.why_plain) + ("" if self.obstacle else parallel)
        rows = {
            "once": self.once,
            "before the loop": self.before,
            "in the loop": self.loop,
            "after the loop": self.after,
            "gradients after the loop": self.gradients_after,
            "gradients in the loop": self.gradients_in_loop,
            "a linear recurrence": (f"no: {self.obstacle}" if self.obstacle else "yes",),
        }
        lines = []
        for title, entries in rows.items():
            for at, entry in enumerate(entries or ("nothing",)):
                lines.append(f"{'' if at else title:<26}{entry}")
        return "\n".join(lines)


def say_plain(plain: str) -> str:
    """Says that a step runs as it is, and why."""
    return f"jax.lax.scan as it is: {plain}"


def explain_scan(
    step: Step, init: PyTree, xs: PyTree = None, length: int | None = None
) -> ScanExplanation:
    """Explains how `scan` runs a step, if every weight that it closes over is differentiated.

    It traces the step and computes nothing. `dropout_scan` and the layers run the same scan.

    Args:
      step: as in `scan`.
      init: the initial carry, or its shapes.
      xs: the inputs, or their shapes.
      length: the number of steps; needed only if `xs` has no arrays.

    Returns:
      A `ScanExplanation`, which prints as a table.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> w, u, b = jnp.ones((128, 512)), jnp.ones((512, 512)), jnp.ones((1, 512))
      >>> def step(h, x):
      ...     h = jnp.tanh(x @ w + h @ u + b)
      ...     return h, h
      >>> print(fdc.explain_scan(step, jnp.zeros((1, 512)), jnp.ones((20, 1, 128))))
      once                      nothing
      before the loop           dot_general: float32[20,1,512]
      in the loop               dot_general: float32[1,512]
                                2 add, 1 tanh
      after the loop            nothing
      gradients after the loop  float32[128,512]
                                float32[512,512]
                                float32[1,512]
      gradients in the loop     nothing
      a linear recurrence       no: it goes through dot_general
    """
    found: list[ScanExplanation] = []

    def explain(init: PyTree, xs: PyTree) -> None:
        traced = trace_scan(step, init, xs, length=length)
        steps = None if isinstance(traced, str) else traced.steps
        found.append(explain_traced(traced, init, steps))

    jax.eval_shape(explain, init, xs)  # so that both may be shapes
    return found[0]


def explain_traced(
    traced: TracedScan | str, init: PyTree, steps: int | None = None
) -> ScanExplanation:
    """Explains a traced scan, or one that runs as it is.

    Args:
      traced: as `trace_scan` returns it.
      init: the initial carry.
      steps: leads the shapes outside of the loop, if it is given.
    """
    if isinstance(traced, str):
        return ScanExplanation(traced, obstacle=traced)
    program, stages = traced.program, find_stages(traced)
    obstacle = None
    if isinstance(stages, Obstacle):
        obstacle = say_obstacle(stages, traced.carry, init)
    elif not has_recurrence(stages):
        obstacle = "no float of the carry depends on the one before"
    if traced.plain is not None:
        return ScanExplanation(traced.plain, obstacle=obstacle)
    plan = traced.plan(traced.constants)
    cut = traced.cut(plan)
    # In the order of their uses, each once, because a tied weight has several.
    weights = dict.fromkeys(use.weight for use in plan.uses.values())
    return ScanExplanation(
        None,
        tuple(_summary(program, plan.once)),
        tuple(_summary(program, cut.before, steps)),
        tuple(_summary(program, cut.loop)),
        tuple(_summary(program, cut.after, steps)),
        tuple(_type(program, weight) for weight in weights),
        tuple(_why_accumulated(program, plan)),
        obstacle,
    )


def _summary(
    program: Program, equations: Iterable[Equation], steps: int | None = None
) -> Iterator[str]:
    """A line for each product, and one that counts the other equations."""
    others: Counter[str] = Counter()
    for equation in equations:
        if equation.name in ("dot_general", "conv_general_dilated"):
            yield f"{equation.name}: {_type(program, equation.outputs[0], steps)}"
        else:
            others[equation.name] += 1
    if others:
        yield ", ".join(f"{count} {name}" for name, count in others.items())


def _type(program: Program, value: int, steps: int | None = None) -> str:
    aval = program.types[value]
    shape = aval.shape if steps is None else (steps, *aval.shape)
    return f"{aval.dtype}[{','.join(map(str, shape))}]"


def _why_accumulated(program: Program, plan: Plan) -> Iterator[str]:
    """A line for each weight whose gradient is added up in the loop, with the reason."""
    # A weight that waits in one use may be read in others, of which the first is named.
    left = plan.used_elsewhere(program.outputs)
    for equation in plan.loop:
        for value in left.intersection(equation.inputs):
            if equation.outputs in plan.uses and value == plan.uses[equation.outputs].weight:
                continue
            is_small = is_linear(equation, value)
            reason = "small compared with its rows" if is_small else f"used in {equation.name}"
            yield f"{_type(program, value)}: {reason}"
            left.remove(value)
    yield from (f"{_type(program, value)}: an output" for value in left)

"""Runs each scan under dropout once more, for 1,000 steps, and sees whether it stays bounded.

The doctests of this library, of its docs and of README all run under `watched`, so whatever a
snippet scans is a test of this, without being listed anywhere.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

import flax_dropout_cell as fdc
from flax_dropout_cell._hoist import checkpointed_scan
from flax_dropout_cell._sequence import dropout_scan
from flax_dropout_cell._step.apply_noise import StepNoise

STEPS = 1000
BOUND = 1e6  # keep_prob 0.8 on a carried value gives 5e9 after a hundred steps


@contextlib.contextmanager
def watched() -> Iterator[list[float]]:
    """Gives the largest value of each long run; at the end none may be above the bound."""
    largest: list[float] = []
    watcher = _Watcher(largest)
    patches = [
        (jax.lax, "scan", watcher.scan),
        (checkpointed_scan, "scan_in_parts", watcher.scan_in_parts),
        (dropout_scan, "disturb_once", watcher.disturb_once),
        (fdc, "dropout_cell", watcher.dropout_cell),
        (StepNoise, "__call__", watcher.disturb),
    ]
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in patches]
    for owner, name, replaced in patches:
        setattr(owner, name, replaced)
    try:
        yield largest
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)
    jax.effects_barrier()
    assert all(value < BOUND for value in largest), f"{STEPS} steps reach {max(largest):.1e}"


class _Watcher:
    """Replaces the functions that scan or step, while a snippet is watched."""

    def __init__(self, largest: list[float]) -> None:
        self.largest = largest
        self.disturbed = 0  # how often a step was traced
        self.own = False  # whether this is a long run
        self.call, self.step = StepNoise.__call__, fdc.dropout_cell
        self.run_disturb_once = dropout_scan.disturb_once
        self.run_scan, self.run_in_parts = jax.lax.scan, checkpointed_scan.scan_in_parts

        def disturb(step_noise: StepNoise, *args: Any, **kwargs: Any) -> Any:
            self.disturbed += 1
            return self.call(step_noise, *args, **kwargs)

        self.disturb = disturb

    def scan(self, f: Any, init: Any, xs: Any = None, length: Any = None, **options: Any) -> Any:
        before = self.disturbed
        result = self.run_scan(f, init, xs, length, **options)
        if self.disturbed > before and not self.own:
            self.run_on(f, init, xs, length)
            self.disturbed = before  # for a scan around this one: it has no steps of its own
        return result

    def scan_in_parts(self, f: Any, init: Any, xs: Any, **options: Any) -> Any:
        before = self.disturbed
        result = self.run_in_parts(f, init, xs, **options)
        if self.disturbed > before and not self.own:  # it traces a step before it scans
            self.run_on(f, init, xs, options.get("length"))
            self.disturbed = before
        return result

    def disturb_once(self, *args: Any, **options: Any) -> Any:
        """Disturbs the weights of a whole sequence: no step of a scan around that sequence."""
        before = self.disturbed
        result = self.run_disturb_once(*args, **options)
        self.disturbed = before
        return result

    def dropout_cell(self, params: Any, carry: Any, x: Any, rng: Any, **options: Any) -> Any:
        result = self.step(params, carry, x, rng, **options)
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((carry, x, rng)))
        if rng is not None and not traced:

            def again(carry: Any, t: jax.Array) -> Any:
                return self.step(params, carry, x, rng, **{**options, "step": t})

            self.run_on(again, result[0], jnp.arange(STEPS), None)
        return result

    def run_on(self, f: Any, init: Any, xs: Any, length: Any) -> None:
        """The same scan over its inputs again and again."""
        short = length if xs is None else jax.tree.leaves(xs)[0].shape[0]
        if short == 0:
            return

        def repeat(leaf: Any) -> jax.Array:
            return jnp.concatenate([leaf] * -(-STEPS // short))[:STEPS]

        self.own = True
        try:
            done = self.run_scan(f, init, jax.tree.map(repeat, xs), STEPS)
        finally:
            self.own = False
        for leaf in jax.tree.leaves(done):
            if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size:
                jax.debug.callback(self.note, jnp.abs(leaf).max())

    def note(self, value: Any) -> None:
        self.largest.append(float(np.nan_to_num(value, nan=np.inf)))

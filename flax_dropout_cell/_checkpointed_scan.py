"""A scan that keeps little for the gradient: it knows nothing of dropout."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from . import _hoisted_scan

PyTree = Any


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: PyTree,
    xs: PyTree,
    *,
    steps: int,
    reverse: bool,
    unroll: int | bool,
    checkpoint_every: int | None,
) -> tuple[PyTree, PyTree]:
    """Scans in chunks whose inside is computed a second time for the gradient.

    Kept are the carries between the chunks, and one chunk's inside at a time, so memory grows with
    `steps / checkpoint_every + checkpoint_every`. None is one chunk.
    """
    every = steps if checkpoint_every is None else checkpoint_every

    def run(carry: PyTree, xs: PyTree, length: int) -> tuple[PyTree, PyTree]:
        options: dict[str, Any] = {"length": length, "reverse": reverse, "unroll": unroll}
        return _hoisted_scan.scan(step, carry, xs, **options)

    if every >= steps:
        return run(carry, xs, steps)
    chunks, left = divmod(steps, every)
    # What does not fill a chunk runs last, so the backward pass is done with it first.
    at = left if reverse else steps - left
    early = jax.tree.map(lambda leaf: leaf[:at], xs)
    late = jax.tree.map(lambda leaf: leaf[at:], xs)
    whole, rest = (late, early) if reverse else (early, late)
    whole = jax.tree.map(lambda leaf: leaf.reshape(chunks, every, *leaf.shape[1:]), whole)
    run_chunk = jax.checkpoint(lambda carry, xs: run(carry, xs, every), prevent_cse=False)
    carry, ys = jax.lax.scan(run_chunk, carry, whole, length=chunks, reverse=reverse)
    ys = jax.tree.map(lambda leaf: leaf.reshape(chunks * every, *leaf.shape[2:]), ys)
    if not left:
        return carry, ys
    carry, rest_ys = run(carry, rest, left)
    pieces = (rest_ys, ys) if reverse else (ys, rest_ys)
    return carry, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *pieces)

"""A scan in chunks, each of which is computed again for the gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .hoisted_scan import scan_in_parts

PyTree = Any


def scan_in_chunks(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: PyTree,
    xs: PyTree,
    *,
    steps: int,
    reverse: bool,
    unroll: int | bool,
    checkpoint_every: int | None,
    parallel: bool | None,
) -> tuple[PyTree, PyTree]:
    """Scans in chunks whose inside is computed a second time for the gradient.

    Kept are the carries between the chunks, and one chunk's inside at a time, so memory grows with
    `steps / checkpoint_every + checkpoint_every`. None is one chunk.
    """
    every = steps if checkpoint_every is None else checkpoint_every

    def run(carry: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
        return scan_in_parts(step, carry, xs, reverse=reverse, unroll=unroll, parallel=parallel)

    if every >= steps:
        return run(carry, xs)
    # A loop over chunks, each a scan of its own, so each has its weights' gradients after it. They
    # are added up over the chunks, which are few.
    chunks, left = divmod(steps, every)
    # The steps that do not fill a chunk run last, so the backward pass finishes them first.
    at = left if reverse else steps - left
    early = jax.tree.map(lambda leaf: leaf[:at], xs)
    late = jax.tree.map(lambda leaf: leaf[at:], xs)
    whole, rest = (late, early) if reverse else (early, late)
    whole = jax.tree.map(lambda leaf: leaf.reshape(chunks, every, *leaf.shape[1:]), whole)
    # prevent_cse=False, since XLA merges nothing across the steps of a loop.
    run_chunk = jax.checkpoint(run, prevent_cse=False)
    carry, ys = jax.lax.scan(run_chunk, carry, whole, reverse=reverse)
    ys = jax.tree.map(lambda leaf: leaf.reshape(chunks * every, *leaf.shape[2:]), ys)
    if not left:
        return carry, ys
    carry, rest_ys = run(carry, rest)
    pieces = (rest_ys, ys) if reverse else (ys, rest_ys)
    return carry, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *pieces)

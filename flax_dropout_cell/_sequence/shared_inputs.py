"""Inputs that all rows share, such as a table `[time, features]`, are refused with padding."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from .._messages import short_repr
from .._spec.prefixes import PyTree, dtype_of


def check_inputs_have_rows(
    cell: Callable[..., Any], params: PyTree, carry: PyTree, x: PyTree, batch: tuple[int, ...]
) -> None:
    """Raises if the cell reads an input as one for all rows, though it has the batch's sizes.

    Padding would blank the part of it that has a row's number. The cell is traced for a batch of
    sizes that occur nowhere else: an input that has to keep its size there has no rows.

    Args:
      cell: `cell(params, carry, x) -> (carry, y)`.
      params: the cell's weights.
      carry: the carry.
      x: the shapes of the inputs at a step.
      batch: the batch dims.
    """
    leaves, structure = tree_flatten_with_path(x)
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves((params, carry, x))]
    if not batch or not all(isinstance(size, int) for shape in shapes for size in shape):
        return
    largest = max(map(math.prod, shapes))
    other = tuple(largest + 1 + at for at in range(len(batch)))

    def resize(leaf: Any) -> Any:
        shape = np.shape(leaf)
        if len(shape) >= len(batch):
            shape = (*other, *shape[len(batch) :])
        return jax.ShapeDtypeStruct(shape, dtype_of(leaf))

    def fits(kept: int | None) -> bool:
        """Whether the cell runs on the other batch, if one input keeps its size."""
        resized = [resize(leaf) if at != kept else leaf for at, (_, leaf) in enumerate(leaves)]
        x = jax.tree.unflatten(structure, resized)
        try:
            results = jax.eval_shape(
                lambda carry, x: cell(params, carry, x), jax.tree.map(resize, carry), x
            )
        except Exception:  # of whichever kind: the cell is the user's
            return False
        return all(
            leaf.ndim < len(batch) or leaf.shape[: len(batch)] == other
            for leaf in jax.tree.leaves(results)
        )

    if fits(None):
        return
    for at, (path, leaf) in enumerate(leaves):
        if len(np.shape(leaf)) >= len(batch) and fits(at):
            raise ValueError(
                f"xs{keystr(path)} is {short_repr(leaf)} at a step, which begins with the batch "
                f"dims {batch} by chance: the cell reads it as one for all rows, and padding "
                f"would blank parts of it. Give each row its own by jnp.broadcast_to."
            )

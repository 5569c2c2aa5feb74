"""Values that all rows share, such as a table `[time, features]`, with padding or resets."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from .._messages import short_repr
from .._spec.prefixes import PyTree, dtype_of
from .padding import check_rows


def check_rows_apart(
    cell: Callable[..., Any],
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    batch: tuple[int, ...],
    option: str,
) -> None:
    """Raises if padding or resets of one row would change a value that all rows share.

    A value of enough dims counts as having rows if it starts with the batch dims. It may do so by
    chance, such as a table `[8, 3]` in a batch of 8. To find out, the cell is traced for a batch of
    another size: a value that has to keep its size there has no rows.

    Args:
      cell: `cell(params, carry, x) -> (carry, y)`.
      params: the cell's weights.
      carry: the carry.
      x: the shapes of the inputs at a step.
      batch: the batch dims.
      option: the option that gave the batch dims. `resets` change carries only, the others, which
        are padding, inputs too.
    """
    padded = option != "resets"
    check_rows("carry", carry, batch, option)
    if padded:
        check_rows("xs", x, batch, option)
    given = {"carry": carry, "xs": x}
    leaves, structure = tree_flatten_with_path(given)
    sizes = {size for leaf in jax.tree.leaves((params, given)) for size in np.shape(leaf)}
    with_rows = [leaf for _, leaf in leaves if np.ndim(leaf) >= len(batch)]
    if not batch or len(with_rows) < 2 or not all(isinstance(size, int) for size in sizes):
        return
    # Multiples, because a cell may split its batch; of primes larger than any size, so that no size
    # of the cell's matches by chance.
    primes = _primes_above(max(sizes))
    other = tuple(max(size, 1) * next(primes) for size in batch)

    def resize(leaf: Any) -> Any:
        shape = np.shape(leaf)
        if len(shape) >= len(batch):
            shape = (*other, *shape[len(batch) :])
        return jax.ShapeDtypeStruct(shape, dtype_of(leaf))

    def fits(kept: int | None) -> bool:
        """Whether the cell runs on the other batch, if one value keeps its size."""
        resized = [resize(leaf) if at != kept else leaf for at, (_, leaf) in enumerate(leaves)]
        values = jax.tree.unflatten(structure, resized)
        try:
            new_carry, _ = jax.eval_shape(
                lambda carry, x: cell(params, carry, x), values["carry"], values["xs"]
            )
        except Exception:  # of whichever kind: the cell is the user's
            return False
        came, left = jax.tree.leaves(values["carry"]), jax.tree.leaves(new_carry)
        return [np.shape(leaf) for leaf in came] == [leaf.shape for leaf in left]

    if fits(None):
        return
    for at, (path, leaf) in enumerate(leaves):
        name = f"{path[0].key}{keystr(path[1:])}"
        changes = padded or name.startswith("carry")
        if changes and len(np.shape(leaf)) >= len(batch) and fits(at):
            raise ValueError(
                f"{name} is {short_repr(leaf)} at a step, which begins with the batch dims {batch} "
                f"by chance: the cell reads it as one for all rows, and padding or resets would "
                f"change parts of it. Give each row its own by jnp.broadcast_to. If it has rows "
                f"already, the cell uses arrays of this batch from outside: pass those in xs."
            )


def _primes_above(number: int) -> Iterator[int]:
    for candidate in itertools.count(number + 1):
        if candidate > 1 and all(candidate % n for n in range(2, math.isqrt(candidate) + 1)):
            yield candidate

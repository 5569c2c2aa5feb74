"""The carry that a layer is given to start from, where it does not fit."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from .._shown import shown_tree
from .._sites import PyTree


@contextlib.contextmanager
def naming_carry(
    carry: PyTree, make_carry: Callable[[], PyTree], shape: tuple[int, ...]
) -> Iterator[None]:
    """Names `initial_carry` where a run fails on one that is not such as the cell makes.

    It compares only once the run has failed, so no carry that works is refused.

    Args:
      carry: what the layer runs on.
      make_carry: makes the cell's own first carry.
      shape: the shape of the inputs, for the message.

    Raises:
      ValueError: the run raised, and the carry's structure or shapes are not the cell's.
    """
    try:
        yield
    except Exception as error:
        wanted = make_carry()
        if _layout(carry) == _layout(wanted):
            raise
        raise ValueError(
            f"initial_carry is {shown_tree(carry)}, but for inputs of shape {shape} the cell's "
            f"carry is {shown_tree(wanted)}. Give one like it, or leave initial_carry out."
        ) from error


def _layout(tree: PyTree) -> tuple[Any, list[tuple[int, ...]]]:
    return jax.tree.structure(tree), list(map(np.shape, jax.tree.leaves(tree)))

"""An error for an `initial_carry` that does not fit the cell."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from .._messages import short_tree_repr
from .._spec.recurrent_dropout import PyTree
from ..cells import LSTMState


@contextlib.contextmanager
def blame_initial_carry(
    carry: PyTree, make_carry: Callable[[], PyTree], shape: PyTree
) -> Iterator[None]:
    """Blames `initial_carry` if its structure caused the failure.

    It compares only after a failure, so a carry that works is never refused.

    Args:
      carry: the layer's initial carry.
      make_carry: makes the cell's own initial carry.
      shape: the shape of the inputs, for the message.

    Raises:
      ValueError: if the run raised, and the carry's structure or shapes are not the cell's.
    """
    try:
        yield
    except Exception as error:
        try:
            wanted = make_carry()
        except Exception:
            wanted = carry  # a cell without an initial carry of its own, so none to compare with
        # The user's error is shown as it is if the carry is not to blame.
        if _layout(carry) == _layout(wanted):
            raise
        raise ValueError(
            f"initial_carry is {short_tree_repr(carry)}, but for inputs of shape {shape} the "
            f"cell's carry is {short_tree_repr(wanted)}."
        ) from error


def _layout(tree: PyTree) -> tuple[Any, list[tuple[int, ...]]]:
    # A plain pair stands for an LSTMState, and the other way round.
    plain = jax.tree.map(
        lambda node: tuple(node) if _is_lstm_state(node) else node, tree, is_leaf=_is_lstm_state
    )
    return jax.tree.structure(plain), list(map(np.shape, jax.tree.leaves(tree)))


def _is_lstm_state(node: Any) -> bool:
    return isinstance(node, LSTMState)

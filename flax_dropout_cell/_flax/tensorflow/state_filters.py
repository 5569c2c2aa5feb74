"""TensorFlow's state filter visitors, which choose the parts of a state that get dropout."""

from collections.abc import Callable
from typing import Any

import jax

from ..._messages import short_repr
from ..._spec.recurrent_dropout import PyTree
from ...cells import LSTMState
from ...cells.known import family_of_module
from ...cells.lstm import LSTM
from ...noises import Noise
from ..carry import DropoutCarry
from ..framework import Framework
from ..wrapper import CellWrapper

Visitor = Callable[[Any], Any]


def place_visited(
    framework: Framework, cell: Any, state: PyTree, noise: Noise, visitor: Visitor | None
) -> PyTree:
    """A prefix with the noise at the parts of a state that a visitor chooses."""
    if isinstance(cell, CellWrapper):
        inner = place_visited(framework, cell.cell, state.cell_carry, noise, visitor)
        return DropoutCarry(inner, None, None)
    # TensorFlow's default does not fit a cell that holds LSTMs, which may have pairs of its own.
    is_lstm = family_of_module(cell) is LSTM
    knows_pairs = is_lstm if visitor is None else _holds_only_lstms(framework, cell)
    named = _name_pairs(state) if knows_pairs else state
    answers = visit_state(visitor or leave_lstm_memory_alone, named)
    if visitor is None and all(jax.tree.leaves(answers)):
        _check_no_lstms_within(framework, cell)
    # Leaf by leaf, because one noise on a state of several leaves is refused where it may explode,
    # and TensorFlow puts it on all of them.
    answers = jax.tree.leaves(jax.tree.broadcast(answers, named))
    return noise_where_true(noise, jax.tree.unflatten(jax.tree.structure(state), answers))


def _holds_only_lstms(framework: Framework, cell: Any) -> bool:
    """Whether each pair of arrays in the cell's state is the (c, h) of an LSTM."""
    if family_of_module(cell) is LSTM:
        return True
    parts = [part for part in framework.parts(cell) if part is not cell]
    cells = [part for part in parts if hasattr(part, "initialize_carry")]
    return bool(cells) and all(_holds_only_lstms(framework, part) for part in cells)


def _name_pairs(state: PyTree) -> PyTree:
    """Flax's plain (c, h) as an `LSTMState`, this library's name for an `LSTMStateTuple`."""
    if type(state) is tuple and len(state) == 2 and jax.tree_util.all_leaves(state):
        return LSTMState(*state)
    children, structure = jax.tree.flatten(state, is_leaf=lambda node: node is not state)
    if jax.tree_util.all_leaves([state]):
        return state
    return jax.tree.unflatten(structure, map(_name_pairs, children))


def visit_state(visitor: Visitor, state: PyTree) -> PyTree:
    """Asks a state filter visitor which parts of a state get dropout.

    The visitor is called on the whole state first, then on its parts. If it answers False, nothing
    below gets dropout. If it answers True, it is called on each child; an array gets dropout. If
    it answers a structure of bools, it is called on the children that are True there.

    Args:
      visitor: the `dropout_state_filter_visitor`.
      state: a cell's carry.

    Returns:
      A prefix of `state` with True at the arrays that get dropout and False elsewhere.

    Raises:
      TypeError: if the visitor answers anything else.
    """
    answer = visitor(state)
    children, structure = jax.tree.flatten(state, is_leaf=lambda node: node is not state)
    if jax.tree_util.all_leaves([state]):
        if not isinstance(answer, bool):
            raise TypeError(
                f"dropout_state_filter_visitor returned {short_repr(answer)} for an array; "
                f"return True or False."
            )
        return answer
    if answer is False:
        return False
    answers = [True] * len(children) if answer is True else _child_answers(answer, structure)
    return jax.tree.unflatten(
        structure,
        [
            visit_state(visitor, child) if descend else False
            for child, descend in zip(children, answers, strict=True)
        ],
    )


def _child_answers(answer: Any, structure: Any) -> list[bool]:
    answers, answered = jax.tree.flatten(answer)
    if type(answer) is tuple and structure == jax.tree.structure(LSTMState(0, 0)):
        answered = jax.tree.structure(LSTMState(*answer)) if len(answer) == 2 else answered
    if answered != structure or not all(isinstance(entry, bool) for entry in answers):
        what = (
            "a non-bool scalar"
            if jax.tree_util.all_leaves([answer])
            else "which is not a structure of bools like the state's, one level deep"
        )
        raise TypeError(
            f"dropout_state_filter_visitor returned {short_repr(answer)}, {what}; return True, "
            f"False or a structure of bools such as (False, True) for a state (c, h)."
        )
    return answers


def leave_lstm_memory_alone(state: Any) -> Any:
    """TensorFlow's default visitor: dropout on everything but the c of a named (c, h) tuple."""
    if getattr(state, "_fields", None) == ("c", "h"):
        return state._replace(c=False, h=True)
    return True


def _check_no_lstms_within(framework: Framework, cell: Any) -> None:
    for part in framework.parts(cell):
        if isinstance(part, CellWrapper) or family_of_module(part) is LSTM:
            raise ValueError(
                f"one noise for the whole state of {type(cell).__name__} would reach the memory c "
                f"of the {type(part).__name__} that it holds; say where it goes, with a "
                f"dropout_state_filter_visitor."
            )


def noise_where_true(noise: Noise, answers: PyTree) -> PyTree:
    """A prefix of noises from a visitor's answers."""
    return jax.tree.map(lambda answer: noise if answer else None, answers)

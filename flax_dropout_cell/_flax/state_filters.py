"""TensorFlow's state filter visitors: they say which parts of a state get dropout."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol

import jax

from .._shown import shown
from .._sites import PyTree
from ..noises import Noise
from .carry import DropoutCarry
from .wrapper import CellWrapper

Visitor = Callable[[Any], Any]


class CellFacts(Protocol):
    """What a framework knows of its cells."""

    _lstm_cells: ClassVar[tuple[type, ...]]

    def _parts(self, cell: Any) -> Iterable[Any]:
        """What a cell holds; a cell among them has a state of its own."""
        ...


def place_visited(
    facts: CellFacts, cell: Any, state: PyTree, noise: Noise, visitor: Visitor | None
) -> PyTree:
    """Places a noise where a state filter visitor says."""
    if isinstance(cell, CellWrapper):
        inner = place_visited(facts, cell.cell, state.cell_carry, noise, visitor)
        return DropoutCarry(inner, None, None)
    answers = visit_state(visitor or leave_lstm_memory_alone, state)
    if visitor is None and all(jax.tree.leaves(answers)):
        if isinstance(cell, facts._lstm_cells):
            return (None, noise)
        _refuse_lstms_within(facts, cell)
    # Leaf by leaf, for one noise on a state of several leaves is refused where it may explode,
    # and TensorFlow puts it on all of them.
    return noise_where_true(noise, answers)


def visit_state(visitor: Visitor, state: PyTree) -> PyTree:
    """Asks a state filter visitor which parts of a state get dropout.

    The visitor is called on a part of the state, first on the whole. It answers False: no dropout
    below here. True: call it again on each child, or, at an array, dropout. A structure of bools
    for its children: go on below those that are True.

    Args:
      visitor: the `dropout_state_filter_visitor`.
      state: a cell's carry.

    Returns:
      A prefix of `state` with True at the arrays that get dropout and False elsewhere.

    Raises:
      TypeError: the visitor answered something else.
    """
    answer = visitor(state)
    children, structure = jax.tree.flatten(state, is_leaf=lambda node: node is not state)
    if jax.tree_util.all_leaves([state]):
        if not isinstance(answer, bool):
            raise TypeError(
                f"dropout_state_filter_visitor returned {shown(answer)} for an array; "
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
    if answered != structure or not all(isinstance(entry, bool) for entry in answers):
        what = (
            "a non-bool scalar"
            if jax.tree_util.all_leaves([answer])
            else "no depth=1 structure of bools like the state's"
        )
        raise TypeError(
            f"dropout_state_filter_visitor returned {shown(answer)}, {what}; return True, "
            f"False or a structure of bools such as (False, True) for a state (c, h)."
        )
    return answers


def leave_lstm_memory_alone(state: Any) -> Any:
    """TensorFlow's default visitor: dropout on everything but the c of a named (c, h) tuple."""
    if getattr(state, "_fields", None) == ("c", "h"):
        return state._replace(c=False, h=True)
    return True


def _refuse_lstms_within(facts: CellFacts, cell: Any) -> None:
    for part in facts._parts(cell):
        if isinstance(part, (*facts._lstm_cells, CellWrapper)):
            raise ValueError(
                f"one noise for the whole state of {type(cell).__name__} would reach the memory c "
                f"of the {type(part).__name__} that it holds; say where it goes, with a "
                f"dropout_state_filter_visitor."
            )


def noise_where_true(noise: Noise, answers: PyTree) -> PyTree:
    """A prefix of noises from a visitor's answers."""
    return jax.tree.map(lambda answer: noise if answer else None, answers)

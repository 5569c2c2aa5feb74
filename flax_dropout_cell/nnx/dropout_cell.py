"""`DropoutCell`: an NNX cell under recurrent dropout."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .._flax.carry import DropoutCarry, run_step
from .._flax.wrapper import CellWrapper
from .._sites import PyTree, RecurrentDropout

RngSource = nnx.Rngs | nnx.RngStream | None


class Wrapper(CellWrapper, nnx.RNNCellBase):
    """What both wrappers share. A subclass says the noises."""

    _lstm_cells = (nnx.LSTMCell, nnx.OptimizedLSTMCell)

    def __init__(self, cell: nnx.RNNCellBase, deterministic: bool, rngs: RngSource) -> None:
        check_cell(cell)
        self.cell = cell
        self.deterministic = deterministic
        self.rngs: nnx.RngStream | None
        if isinstance(rngs, nnx.Rngs):
            # No stream to fork is no error yet: evaluation needs none.
            has_stream = "dropout" in rngs or "default" in rngs
            self.rngs = rngs["dropout"].fork() if has_stream else nnx.data(None)
        elif isinstance(rngs, nnx.RngStream):
            self.rngs = rngs.fork()
        elif rngs is None:
            self.rngs = nnx.data(None)
        else:
            raise TypeError(
                f"rngs must be Rngs, an RngStream or None, such as nnx.Rngs(dropout=0), "
                f"got {rngs!r}."
            )

    def _sequence_rng(self) -> jax.Array | None:
        """The key of a new sequence; None where it is to run without dropout."""
        if self.deterministic:
            return None
        if self.rngs is None:
            raise ValueError(
                f"{type(self).__name__} needs a 'dropout' stream in training: make it with "
                f"rngs=nnx.Rngs(dropout=0), or evaluate with eval() or deterministic=True."
            )
        return self.rngs()

    def initialize_carry(
        self, input_shape: Any, rngs: RngSource = None, carry_init: Any = None
    ) -> DropoutCarry:
        """The cell's first carry, with the masks of a new sequence.

        Draws the variational masks, once for all steps of the sequence, from this module's own
        `dropout` stream. Call it before the loop.

        Args:
          input_shape: the shape of the input at a step, `[*batch, *features]`, or a pytree of
            such shapes for nested inputs.
          rngs: handed to the cell's own `initialize_carry`, and used for nothing else: a host's
            stream starts from the same key each time that the host is made.
          carry_init: handed to the cell's own `initialize_carry`.

        Returns:
          The carry to start a sequence with.

        Raises:
          ValueError: there is no `dropout` stream, and this is not evaluation.
        """
        # Cells need not know carry_init; those of Flax 0.11 do not.
        given = () if carry_init is None else (carry_init,)
        cell_carry = self.cell.initialize_carry(input_shape, rngs, *given)
        return self._start(self._sequence_rng(), cell_carry, input_shape)

    def redraw_masks(self, carry: PyTree, input_shape: Any) -> DropoutCarry:
        """Starts new masks on an old state, as Gal and Ghahramani do from window to window.

        Args:
          carry: this wrapper's last carry, or a carry of the wrapped cell.
          input_shape: as in `initialize_carry`.

        Returns:
          The carry to start the next window with.
        """
        cell_carry = carry.cell_carry if isinstance(carry, DropoutCarry) else carry
        if isinstance(self.cell, Wrapper):
            cell_carry = self.cell.redraw_masks(cell_carry, input_shape)
        return self._start(self._sequence_rng(), cell_carry, input_shape)

    def _parts(self) -> Iterable[Any]:
        return (node for _, node in nnx.iter_graph(self.cell))

    def _params_shapes(self, cell_carry: PyTree, x: PyTree) -> PyTree:
        return _params(self.cell)

    def _output_shapes(self, cell_carry: PyTree, x: PyTree) -> PyTree:
        _, y = trace(self.cell, lambda cell, *args: cell(*args), cell_carry, x)
        return y

    def set_view(self, deterministic: bool | None = None) -> None:
        """What `nnx.view` calls.

        Args:
          deterministic: True is evaluation.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def __call__(self, carry: DropoutCarry, inputs: PyTree) -> tuple[DropoutCarry, PyTree]:
        """One step of the wrapped cell, with noise."""
        dropout = RecurrentDropout()
        if isinstance(carry, DropoutCarry):
            dropout = self._dropout(carry.cell_carry)
        params = None if dropout.params is None else _params(self.cell)

        def cell(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
            if params is None:
                return self.cell(carry, x)
            return _call_with_params(self.cell, params, carry, x)

        return run_step(
            carry,
            inputs,
            cell=cell,
            params=params,
            dropout=dropout,
            deterministic=self.deterministic,
        )


class DropoutCell(Wrapper):
    """An NNX cell under recurrent dropout; put it wherever the cell would go.

    In training it draws from its own `dropout` stream, once per sequence; evaluation, by
    `eval()`, `nnx.view` or `deterministic=True`, needs none.

    Its carry is a `DropoutCarry`. Handed on to a next window it keeps its masks, as one long
    sequence that was cut; `redraw_masks` starts new ones on it.

    Args:
      cell: any `nnx.RNNCellBase`.
      dropout: which noise sits where. One noise for the whole `state` of an LSTM-family cell
        means h alone; to reach the memory c, name it: `state=(noise_c, noise_h)`. `params` takes
        a prefix of the cell's `nnx.Param`s as a plain dict. Arrays in it are data of this module,
        so that a new `dropout` with other values does not retrace.
      deterministic: True is evaluation.
      rngs: where the masks come from, an `nnx.Rngs` or an `nnx.RngStream`; it is forked.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> noise = fdc.Dropout(keep_prob=0.8, variational=True)
      >>> dropout = fdc.RecurrentDropout(input=noise, state=noise)
      >>> rngs = nnx.Rngs(params=0, dropout=1)
      >>> cell = nnx.LSTMCell(32, 64, rngs=rngs)
      >>> rnn = nnx.RNN(fdc.nnx.DropoutCell(cell, dropout, rngs=rngs))
      >>> rnn(jnp.ones((4, 20, 32))).shape
      (4, 20, 64)
    """

    def __init__(
        self,
        cell: nnx.RNNCellBase,
        dropout: RecurrentDropout,
        deterministic: bool = False,
        *,
        rngs: RngSource = None,
    ) -> None:
        super().__init__(cell, deterministic, rngs)
        self.dropout = dropout

    @property
    def dropout(self) -> RecurrentDropout:
        """Which noise sits where."""
        arrays = iter(self._noise_arrays)
        return jax.tree.map(
            lambda leaf: next(arrays)[...] if leaf is ... else leaf, self._noises.tree
        )

    @dropout.setter
    def dropout(self, dropout: RecurrentDropout) -> None:
        if not isinstance(dropout, RecurrentDropout):
            raise TypeError(
                f"dropout must be a RecurrentDropout, such as "
                f"RecurrentDropout(input=Dropout(keep_prob=0.8)), got {dropout!r}."
            )
        leaves, structure = jax.tree.flatten(dropout, is_leaf=_is_array)
        self._noises = Static(
            jax.tree.unflatten(structure, [... if _is_array(leaf) else leaf for leaf in leaves])
        )
        # Variables, for Flax cannot update a bare array inside a list.
        self._noise_arrays = nnx.data(
            [
                leaf if isinstance(leaf, nnx.Variable) else nnx.Variable(jnp.asarray(leaf))
                for leaf in leaves
                if _is_array(leaf)
            ]
        )

    if not TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None:
            # Flax up to 0.12.8 looks for arrays in a value before it looks for a property.
            if name == "dropout":
                object.__setattr__(self, name, value)
            else:
                super().__setattr__(name, value)

    def _dropout(self, cell_carry: PyTree) -> RecurrentDropout:
        dropout = self.dropout
        return dataclasses.replace(dropout, state=self._place_state(dropout.state))


class Static:
    """A pytree as one static value: graphdefs are compared and hashed, and dicts have no hash."""

    def __init__(self, tree: PyTree) -> None:
        self.tree = tree

    def _key(self) -> Any:
        leaves, structure = jax.tree.flatten(self.tree)
        return tuple(leaves), structure

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return repr(self.tree)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | nnx.Variable)


def check_cell(cell: Any) -> None:
    if not (isinstance(cell, nnx.Module) and callable(cell) and hasattr(cell, "initialize_carry")):
        raise TypeError(
            f"{cell!r} is not an RNNCell of flax.nnx: give a cell such as "
            f"nnx.LSTMCell(32, 64, rngs=rngs), a module with initialize_carry and "
            f"__call__(carry, inputs)."
        )


def _params(cell: nnx.RNNCellBase) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.state(cell, nnx.Param))


def _call_with_params(
    cell: nnx.RNNCellBase, params: PyTree, carry: PyTree, x: PyTree
) -> tuple[PyTree, PyTree]:
    """Runs the cell with other weights, which are gone afterwards; what else it writes stays."""
    graphdef, own, rest = nnx.split(cell, nnx.Param, ...)
    others = jax.tree.unflatten(jax.tree.structure(own), jax.tree.leaves(params))
    copy = nnx.merge(graphdef, others, rest)
    before = jax.tree.leaves(rest)
    result = copy(carry, x)
    after = nnx.state(copy, nnx.Not(nnx.Param))
    # Flax forbids even an idle write where the cell comes from outside of a jax.lax.scan.
    if list(map(id, jax.tree.leaves(after))) != list(map(id, before)):
        nnx.update(cell, after)
    return result


def trace(cell: nnx.RNNCellBase, run: Callable[..., PyTree], *args: PyTree) -> PyTree:
    """The shapes of `run(cell, *args)`, on a copy: the cell's own state stays as it is."""
    graphdef, state = nnx.split(cell)

    def trace(state: PyTree, *args: PyTree) -> PyTree:
        copy = nnx.merge(graphdef, state)
        copy.eval()  # shapes are those of training, and there is no stream to draw from
        return run(copy, *args)

    return jax.eval_shape(trace, state, *args)

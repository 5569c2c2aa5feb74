"""A spec as an attribute of an NNX module."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import keystr, tree_flatten_with_path

from .._spec.recurrent_dropout import PyTree, RecurrentDropout
from .._step.checks import check_dropout


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


class DropoutAttribute:
    """Gives a module the attribute `dropout`; its numbers are static and its arrays are state.

    So `nnx.jit` retraces if a number changes, but not if an array does.
    """

    if not TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None:
            # Flax up to 0.12.8 looks for arrays in a value before it looks for a property.
            if name == "dropout" and not isinstance(value, nnx.State | dict):
                object.__setattr__(self, name, value)
            else:
                super().__setattr__(name, value)

    @property
    def dropout(self) -> RecurrentDropout:
        """The noise at each site; it may be replaced at any time, inside `nnx.jit` too."""
        arrays = self._noise_arrays
        leaves, structure = tree_flatten_with_path(self.noises.tree)
        own = {_name(path) for path, leaf in leaves if leaf is ...}
        if arrays.keys() != own:  # a state of another spec was loaded
            others = ", ".join(sorted(arrays.keys() ^ own))
            raise ValueError(
                f"the loaded state does not fit this module's dropout: only one of them has an "
                f"array at {others}. Set module.dropout to the spec that was saved, and load again."
            )
        return jax.tree.unflatten(
            structure, [arrays[_name(path)][...] if leaf is ... else leaf for path, leaf in leaves]
        )

    @dropout.setter
    def dropout(self, dropout: RecurrentDropout) -> None:
        check_dropout(dropout)
        leaves, structure = tree_flatten_with_path(dropout, is_leaf=_is_state_leaf)
        kept = [... if _is_state_leaf(leaf) else leaf for _, leaf in leaves]
        self.noises = Static(jax.tree.unflatten(structure, kept))
        # By their paths, so that the numbers of another spec do not load at the wrong site.
        # Variables, for Flax cannot update a bare array inside of a dict.
        self._noise_arrays = nnx.data(
            {_name(path): _as_variable(leaf) for path, leaf in leaves if _is_state_leaf(leaf)}
        )


def _name(path: Any) -> str:
    return keystr(path).lstrip(".")


def _is_state_leaf(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | nnx.Variable)


def _as_variable(array: Any) -> nnx.Variable:
    return array if isinstance(array, nnx.Variable) else nnx.Variable(jnp.asarray(array))

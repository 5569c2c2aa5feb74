"""A hashable stand-in for a spec with arrays, used as an `nn.jit` cache key."""

import hashlib
import itertools
import weakref
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np

from .._compat import is_traced
from ..noises.protocol import is_array

_numbers = itertools.count()
_objects: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
# Flax compares hashes alone, and that of a PyTreeDef leaves out what its nodes hold, such as the
# numbers of noises: all specs of one structure hash alike. A dict compares the PyTreeDefs.
_structures: dict[Any, int] = {}


def nn_jit_hash(tree: Any) -> tuple[Hashable, ...]:
    """A key that is equal only for trees with equal numbers and arrays.

    A traced array gets a new key each time: `nn.jit` then compiles again, and never runs a program
    that was made for another value.
    """
    leaves, structure = jax.tree.flatten(tree)
    return _structures.setdefault(structure, next(_numbers)), *map(_of_leaf, leaves)


def _of_leaf(leaf: Any) -> str:
    # An `id` can be reused once its object is gone, so it would not do as a key.
    if is_traced(leaf):
        return f"traced {next(_numbers)}"
    if not is_array(leaf):
        return f"object {_objects.setdefault(leaf, next(_numbers))}"
    array = np.asarray(leaf)
    digest = hashlib.sha256(array.tobytes()).hexdigest()
    return f"{array.dtype.name}{list(array.shape)} {digest}"

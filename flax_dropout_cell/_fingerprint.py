"""What stands for a tree with arrays where something is compiled once for all that hash alike."""

import hashlib
import itertools
import weakref
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from .noises.protocol import is_array

_numbers = itertools.count()
_objects: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def fingerprint(tree: Any) -> tuple[Hashable, ...]:
    """Equal for trees of equal numbers and arrays only; of its own where an array is traced."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, *map(_of_leaf, leaves)


def _of_leaf(leaf: Any) -> str:
    # By its id, a traced array or an object could be taken for one that is long gone.
    if isinstance(leaf, Tracer):
        return f"traced {next(_numbers)}"
    if not is_array(leaf):
        return f"object {_objects.setdefault(leaf, next(_numbers))}"
    array = np.asarray(leaf)
    digest = hashlib.sha256(array.tobytes()).hexdigest()
    return f"{array.dtype.name}{list(array.shape)} {digest}"

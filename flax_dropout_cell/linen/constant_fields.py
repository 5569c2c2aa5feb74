"""What `nn.jit` says to a module whose fields hold arrays."""

import dataclasses
from typing import Any, NoReturn

from jax.tree_util import keystr, tree_leaves_with_path

from .._shown import shown
from ..noises.protocol import is_array


class ConstantFields:
    """The descriptor of `__fn_or_cls__`: it refuses arrays, and is not there otherwise.

    `nn.jit` compiles once for all modules whose fields hash alike, with the fields as constants.
    An array cannot be one: a traced one has no value to hash, and by any hash but that of its
    value an array could run in a program that was compiled for another. Flax refuses it as
    "iteration over a 0-d array". It asks a module for `__fn_or_cls__` right before it hashes the
    fields, so that is where the error that says what to write can stand.
    """

    nowrap = True
    """Keeps Flax from wrapping the descriptor in another, which turns each error into its own."""

    def __get__(self, module: Any, cls: type | None = None) -> NoReturn:
        if module is not None:
            _refuse_arrays(module)
        raise AttributeError("__fn_or_cls__")


def _refuse_arrays(module: Any) -> None:
    for field in dataclasses.fields(module):
        if field.name in ("parent", "name", "cell"):
            continue
        for path, leaf in tree_leaves_with_path(getattr(module, field.name)):
            if is_array(leaf):
                name = type(module).__name__.removeprefix("Jit")  # as nn.jit calls its copy
                raise ValueError(
                    f"nn.jit compiles a module's fields in as constants, and {field.name}"
                    f"{keystr(path)} of {name} is an array, {shown(leaf)}. Give a number, use "
                    f"jax.jit around the model instead, or make the {name} inside the module "
                    f"that nn.jit compiles, from an array that is an argument of its call."
                )

"""The modules that a linen module holds in its fields."""

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
from flax import serialization, traverse_util


def fields_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules in a module's fields, with the names that Flax gives them there."""
    for field in dataclasses.fields(module):
        if field.name in ("parent", "name"):
            continue
        tree = serialization.to_state_dict(getattr(module, field.name, None))
        if not isinstance(tree, dict):
            flat = {(): tree}
        else:
            flat = traverse_util.flatten_dict(tree)
        for path, part in flat.items():
            if isinstance(part, nn.Module):
                yield "_".join([field.name, *path]), part


def parts_of(module: nn.Module) -> Iterator[nn.Module]:
    """A module, and all that it holds in its fields."""
    yield module
    for _, part in fields_of(module):
        yield from parts_of(part)

"""The base of this library's noises: arguments by name, and those that every noise has."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

from .._messages import must_be, short_repr
from .protocol import shared_dims


class NamedNoise:
    """A noise whose numbers go by name, with `variational` and `broadcast_dims`.

    A subclass is a frozen dataclass with these two fields and its own, whose first one has no
    default. It sets `amplifies`, `needs_previous` and `is_identity` if they apply (see `Noise`). Do
    not forget `amplifies`: without it, noise that makes kept units larger is accepted at places
    where it does so at every step, and values explode. A user's noise need not be a subclass,
    because `Noise` is a protocol.

    Attributes:
      how_to_write: shown in the error for a number without a name.
      mask_kind: the kind of its masks' dtype, as `Noise` says.
      keep_mask_field: the field whose probability `draw_keep_mask` takes; such masks are the same
        bits under `jax.vmap`, so a scan may draw those of all steps at once.
    """

    how_to_write: ClassVar[str]
    mask_kind: ClassVar[Any]
    keep_mask_field: ClassVar[str | None] = None
    variational: bool
    broadcast_dims: Sequence[int]

    def __post_init__(self) -> None:
        if not isinstance(self.variational, bool):
            raise TypeError(must_be("variational", "True or False", self.variational))
        dims = self.broadcast_dims
        if not isinstance(dims, Sequence) or not all(map(_is_dim, dims)):
            raise TypeError(must_be("broadcast_dims", "a sequence of ints such as (0,)", dims))
        # A tuple, because the field is part of a hash.
        object.__setattr__(self, "broadcast_dims", tuple(dims))

    def mask_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a mask for a value: 1 in each of `broadcast_dims`."""
        shared = shared_dims(self, shape)
        return tuple(1 if dim in shared else size for dim, size in enumerate(shape))


def _is_dim(dim: Any) -> bool:
    return isinstance(dim, int) and not isinstance(dim, bool)


def explain_missing_names(cls: Any) -> Any:
    """Makes numbers without their names an error that shows how the noise is written."""
    # Python's own error would name `positional arguments`, and not that nn.Dropout(0.2) is a rate
    # and this library's number a probability to keep: the one mistake that would train silently.
    init, first = cls.__init__, dataclasses.fields(cls)[0].name

    @functools.wraps(init)
    def __init__(self: Any, *positional: Any, **named: Any) -> None:
        if positional or first not in named:
            got = ", ".join([*map(short_repr, positional), *named]) or "nothing"
            raise TypeError(
                f"{cls.__name__} takes its numbers by name: {cls.how_to_write}, got {got}."
            )
        init(self, **named)

    cls.__init__ = __init__
    return cls

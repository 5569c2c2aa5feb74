"""The streams that NNX modules draw their keys from."""

from typing import Any

import jax
from flax import nnx

from .._random.keys import as_rng
from .._shown import shown

RngSource = nnx.Rngs | nnx.RngStream | None

_CARRY = "carry"
"""The stream that Flax's hosts hand on for `initialize_carry`; masks never come from it."""


def fork_stream(rngs: Any) -> nnx.RngStream | None:
    """A `dropout` stream of a module's own; none to fork is no error, as evaluation needs none."""
    if isinstance(rngs, nnx.Rngs):
        return rngs["dropout"].fork() if has_dropout(rngs) else nnx.data(None)
    if isinstance(rngs, nnx.RngStream):
        return rngs.fork()
    if rngs is None:
        return nnx.data(None)
    raise TypeError(
        f"rngs must be Rngs, an RngStream or None, such as nnx.Rngs(dropout=0), got {shown(rngs)}."
    )


def has_dropout(rngs: nnx.Rngs) -> bool:
    """Whether there is a stream for dropout: its own, or the one for all."""
    return "dropout" in rngs or "default" in rngs


def key_of(rngs: Any) -> jax.Array | None:
    """The next key of a source of keys, or the key itself."""
    if isinstance(rngs, nnx.Rngs):
        return rngs.dropout()
    return rngs() if isinstance(rngs, nnx.RngStream) else as_rng(rngs)


def is_for_carries(rngs: RngSource | jax.Array) -> bool:
    """Whether a host hands on its stream for carries: it starts from one key in every program."""
    return isinstance(rngs, nnx.RngStream) and rngs.tag == _CARRY


def carry_stream(rngs: RngSource | jax.Array, init_key: jax.Array | None) -> nnx.RngStream:
    """What a cell's `initialize_carry` draws from."""
    if init_key is None and isinstance(rngs, nnx.RngStream) and is_for_carries(rngs):
        return rngs
    if init_key is None and isinstance(rngs, nnx.Rngs) and _CARRY in rngs:
        return rngs[_CARRY]
    return nnx.RngStream(jax.random.key(0) if init_key is None else init_key, tag=_CARRY)

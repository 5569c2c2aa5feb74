"""The streams that NNX modules draw their keys from."""

from typing import Any

import jax
import numpy as np
from flax import errors, nnx

from .._messages import must_be
from .._random.keys import as_key

RngSource = nnx.Rngs | nnx.RngStream | None

_AT_THE_CALL = "rngs=nnx.Rngs(dropout=key) at the call"

_CARRY = "carry"
"""The stream that Flax's RNN layers pass to `initialize_carry`; masks never come from it."""


def fork_stream(rngs: Any) -> nnx.RngStream | None:
    """A module's own `dropout` stream; None if there is none, because evaluation needs none."""
    if isinstance(rngs, nnx.Rngs):
        return rngs["dropout"].fork() if has_dropout(rngs) else nnx.data(None)
    if isinstance(rngs, nnx.RngStream):
        return rngs.fork()
    if rngs is None:
        return nnx.data(None)
    wanted = "an Rngs such as nnx.Rngs(dropout=0), an RngStream or None"
    raise TypeError(must_be("rngs", wanted, rngs))


def has_dropout(rngs: nnx.Rngs) -> bool:
    """Whether there is a stream for dropout: its own, or the one for all."""
    return "dropout" in rngs or "default" in rngs


def dropout_key(
    name: str, rngs: Any, own: nnx.RngStream | None, *, takes: str = _AT_THE_CALL
) -> jax.Array:
    """The key to draw from.

    Args:
      name: the name of the module that draws, for the error.
      rngs: the call's argument: an `nnx.Rngs`, an `nnx.RngStream`, a key, or None.
      own: the module's own stream.
      takes: how else it takes a key, for the error.

    Raises:
      ValueError: if there is nothing to draw from, or a transformation closes over the stream.
      TypeError: if `rngs` is none of these.
    """
    # nnx.Bidirectional passes its `carry` stream to the layers that it holds. By default it starts
    # from key 0 in every model and every run, so all models would draw the same masks.
    source = own if rngs is None or is_for_carries(rngs) else rngs
    if isinstance(source, nnx.Rngs) and has_dropout(source):
        source = source["dropout"]
    if isinstance(source, nnx.RngStream):
        return _draw(name, source, takes, is_own=source is own)
    # An Rngs without a stream for dropout is refused, even if the module has a stream of its own.
    key = None if isinstance(source, nnx.Rngs) else as_source(source)
    if key is None:
        raise ValueError(
            f"{name} needs a 'dropout' stream in training: make it with rngs=nnx.Rngs(dropout=0), "
            f"pass {takes}, or evaluate with eval() or deterministic=True."
        )
    return key


def as_source(rngs: Any) -> Any:
    """A call's `rngs`, with a type if it is a raw key; raises if nothing can be drawn from it."""
    if rngs is None or isinstance(rngs, nnx.Rngs | nnx.RngStream):
        return rngs
    wanted = "an Rngs such as nnx.Rngs(dropout=key), an RngStream, one key or None"
    return as_key("rngs", rngs, wanted)


def _draw(name: str, stream: nnx.RngStream, takes: str, *, is_own: bool) -> jax.Array:
    keys = np.shape(stream.key[...])
    if keys:
        raise ValueError(
            f"the stream of {name} holds keys of shape {keys}, as nnx.split_rngs makes them: run "
            f"the model in nnx.vmap or nnx.scan over them."
        )
    try:
        return stream()
    except errors.TraceContextError:
        if not is_own:
            raise ValueError(
                f"{name} got rngs= that jax.jit, vmap or grad closes over, so its counter cannot "
                f"be updated. Pass a key to the function, and make nnx.Rngs(dropout=key) in it."
            ) from None
        raise ValueError(
            f"{name} updates the counter of its own RNG stream, which jax.jit, vmap and grad "
            f"cannot track. Pass the model as an argument to nnx.jit, nnx.vmap or nnx.grad, as in "
            f"nnx.jit(lambda model, x: model(x))(model, x), or pass {takes}."
        ) from None


def is_for_carries(rngs: RngSource | jax.Array) -> bool:
    """Whether this is a stock wrapper's stream for carries, which always starts from one key."""
    return isinstance(rngs, nnx.RngStream) and rngs.tag == _CARRY


def carry_stream(rngs: RngSource | jax.Array, init_key: jax.Array | None) -> nnx.RngStream:
    """The stream for a cell's `initialize_carry`."""
    if init_key is None and isinstance(rngs, nnx.RngStream) and is_for_carries(rngs):
        return rngs
    if init_key is None and isinstance(rngs, nnx.Rngs) and _CARRY in rngs:
        return rngs[_CARRY]
    given = jax.random.key(0) if init_key is None else init_key
    return nnx.RngStream(as_key("init_key", given), tag=_CARRY)


def check_rngs(rngs: Any) -> None:
    """Raises if weights cannot be drawn from `rngs`."""
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(must_be("rngs", "an Rngs such as nnx.Rngs(0)", rngs))

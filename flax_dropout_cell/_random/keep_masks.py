"""Boolean keep-masks from few random bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from .._arguments import Number
from .keys import as_typed
from .words import draw_words


def draw_keep_mask(
    rng: jax.Array, keep_prob: Number | jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Draws a boolean mask whose units are True with probability `keep_prob`.

    A unit takes as many random bits as the denominator of `keep_prob` needs: one for 1/2, two
    for 3/4, four for n/16. Any other `keep_prob`, and every traced one, takes eight, and is exact
    to 24 bits all the same: see `_mark_dropped`. Words are shared along the last dim only, so a
    draw that is sharded over any other dim stays local.

    Args:
      rng: a typed or raw key.
      keep_prob: the probability of True, a number or an array that broadcasts to `shape`.
      shape: the mask's shape.

    Returns:
      A boolean array of shape `shape`.
    """
    if isinstance(keep_prob, Number) and keep_prob in (0, 1):
        return jnp.full(shape, bool(keep_prob))
    bits = bits_per_unit(keep_prob)
    if bits < 8:
        limit = jnp.uint32(float(keep_prob) * 2**bits)
    else:
        limit = drop_prob_in_24_bits(keep_prob)
        limit = _limits_of_bytes(limit, shape) if limit.ndim else limit
    return _draw(as_typed(rng), limit, bits, tuple(shape))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _draw(rng: jax.Array, limit: jax.Array, bits: int, shape: tuple[int, ...]) -> jax.Array:
    *rows, units = shape or (1,)
    words_shape = (*rows, -(-units * bits // 32))
    if bits < 8:
        mask = _split_words(draw_words(rng, words_shape), bits) < limit
    else:
        words = draw_words(rng, words_shape, _mark_dropped, limit)
        mask = _bytes(words) == 0
    # No -1: a batch may have no rows.
    return mask.reshape(*rows, words_shape[-1] * 32 // bits)[..., :units].reshape(shape)


def bits_per_unit(keep_prob: Number | jax.Array) -> int:
    """The number of random bits of a unit."""
    if isinstance(keep_prob, Number):
        for bits in (1, 2, 4):
            if (float(keep_prob) * 2**bits).is_integer():
                return bits
    return 8


def _split_words(words: jax.Array, bits: int) -> jax.Array:
    """Cuts 32-bit words `[..., W]` into numbers `[..., W * 32 / bits]` of `bits` bits each."""
    per_word = 32 // bits
    shape = (*words.shape[:-1], words.shape[-1] * per_word)
    words = jnp.broadcast_to(words[..., None], (*words.shape, per_word)).reshape(shape)
    positions = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    return (words >> (positions % per_word * bits)) & (2**bits - 1)


def _bytes(words: jax.Array) -> jax.Array:
    """The four bytes of each word, lowest first, along an axis of their own."""
    if all(isinstance(dim, int) for dim in words.shape):
        return jax.lax.bitcast_convert_type(words, jnp.uint8)
    # JAX cannot export a bitcast of a symbolic shape.
    positions = jax.lax.broadcasted_iota(jnp.uint32, (*words.shape, 4), words.ndim)
    return (words[..., None] >> (positions * 8)) & 0xFF


def drop_prob_in_24_bits(keep_prob: Number | jax.Array) -> jax.Array:
    """`1 - keep_prob` in units of `2**-24`, from 0 to `2**24`."""
    # Numbers are rounded to float32 too, so that a number and a traced array give the same mask.
    if isinstance(keep_prob, Number):
        keep = np.round(np.float32(keep_prob) * np.float32(2**24))
        return jnp.uint32(2**24 - int(keep))
    keep = jnp.round(keep_prob.astype(jnp.float32) * jnp.float32(2**24))
    return jnp.uint32(2**24) - jnp.clip(keep, 0, 2**24).astype(jnp.uint32)


def _limits_of_bytes(limits: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Limits that broadcast to a mask's shape, for the bytes of its words: `[..., words, 4]`."""
    limits = limits.reshape((1,) * (len(shape) - limits.ndim) + limits.shape)
    limits = jnp.broadcast_to(limits, (*limits.shape[:-1], shape[-1]))
    padding = [(0, 0)] * (limits.ndim - 1) + [(0, -shape[-1] % 4)]
    return jnp.pad(limits, padding).reshape(*limits.shape[:-1], -1, 4)


def _mark_dropped(words: jax.Array, drop: jax.Array) -> jax.Array:
    """Sets each byte of `words` to 1 with probability `drop / 2**24`, and to 0 otherwise.

    `drop` is one number for all bytes, or has one for each, `[..., words, 4]`.
    Each byte starts a number of three bytes, and is dropped if adding `drop` to that number
    overflows. Two bytes of a word are computed at a time, each with a byte of room above it.
    """
    second, third = _later_digits(words)
    digits = ((third, drop & 0xFF), (second, (drop >> 8) & 0xFF), (words, drop >> 16))

    def pair(summand: jax.Array, shift: int) -> jax.Array:
        """The summands of the two bytes of a word that are `shift` and `shift + 16` bits up."""
        if summand.ndim == 0:
            return summand * 0x00010001
        both = summand[..., shift // 8] | (summand[..., shift // 8 + 2] << 16)
        # Under `jax.vmap` the words of many keys come at once, with dims in front.
        return both.reshape((1,) * (words.ndim - both.ndim) + both.shape)

    def carry_out(shift: int) -> jax.Array:
        carry = jnp.zeros_like(words)
        for digit, summand in digits:
            total = ((digit >> shift) & 0x00FF00FF) + pair(summand, shift) + carry
            carry = (total >> 8) & 0x00010001
        return carry

    return carry_out(0) | (carry_out(8) << 8)


def _later_digits(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The second and third digit, in base 256, of the numbers that the bytes of a word start.

    They matter only if the first digit does not decide, once in 256 times, so they may be made of
    the word's other bytes: byte i starts the number `(b[i], b[i+1] ^ b[i+2], b[i+1] ^ b[i+3])`,
    with indices mod 4. Each number is uniform, and the first two digits of any two are
    independent.
    """
    return _rotate(words, 8) ^ _rotate(words, 16), _rotate(words, 8) ^ _rotate(words, 24)


def _rotate(words: jax.Array, bits: int) -> jax.Array:
    return (words >> bits) | (words << (32 - bits))

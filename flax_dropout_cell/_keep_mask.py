"""Boolean keep-masks from few random bits."""

import jax
import jax.numpy as jnp
import numpy as np

Number = int | float | np.number
"""A value that is known on the host, so it can be checked and can pick an algorithm."""

_TIE_BITS = 16


def draw_keep_mask(
    rng: jax.Array, keep_prob: Number | jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Draws a boolean mask whose units are True with probability `keep_prob`.

    A unit takes as many fresh bits as the denominator of `keep_prob` needs: one for 1/2, two
    for 3/4, up to eight for n/256. Any other `keep_prob`, and every traced one, takes eight
    fresh bits and settles the one comparison in 256 that they leave open with sixteen more,
    which a strongly universal hash of the unit's place in its row provides (Dietzfelbinger
    1996; two random words per row). Each unit is then kept with probability
    `round(2**24 keep_prob) / 2**24`, and any two units are independent in rows of up to
    131,072 units.

    Words are shared only along the last dim, so a draw that is sharded over any other dim stays
    local.

    Args:
      rng: a typed or raw key.
      keep_prob: the probability of True, a number or a scalar array.
      shape: the mask's shape.

    Returns:
      A boolean array of shape `shape`.
    """
    if isinstance(keep_prob, Number) and keep_prob in (0, 1):
        return jnp.full(shape, bool(keep_prob))
    *rows, units = shape or (1,)
    fresh_bits, exact = _fresh_bits(keep_prob)
    fresh_words = -(-units * fresh_bits // 32)
    words = jax.random.bits(rng, (*rows, fresh_words + (0 if exact else 2)), jnp.uint32)
    numbers = _split_words(words[..., :fresh_words], fresh_bits)[..., :units]
    if exact:
        threshold = jnp.uint32(float(keep_prob) * 2**fresh_bits)
    else:
        threshold = _round_to_24_bits(keep_prob)
        ties = _universal_hash(words[..., -2:-1], words[..., -1:], units)
        numbers = (numbers << _TIE_BITS) | ties
    return (numbers < threshold).reshape(shape)


def _fresh_bits(keep_prob: Number | jax.Array) -> tuple[int, bool]:
    """How many fresh bits a unit takes, and whether they alone give `keep_prob` exactly."""
    if isinstance(keep_prob, Number):
        for bits in (1, 2, 4, 8):
            if (float(keep_prob) * 2**bits).is_integer():
                return bits, True
    return 8, False


def _split_words(words: jax.Array, bits: int) -> jax.Array:
    """Cuts 32-bit words `[..., W]` into numbers `[..., W * 32 / bits]` of `bits` bits each."""
    shifts = jnp.arange(0, 32, bits, dtype=jnp.uint32)
    shifts = shifts.reshape((1,) * words.ndim + (-1,))
    numbers = (words[..., None] >> shifts) & jnp.uint32(2**bits - 1)
    return numbers.reshape(*words.shape[:-1], -1)


def _round_to_24_bits(keep_prob: Number | jax.Array) -> jax.Array:
    # Through float32 for numbers too, so that a number and its traced value give one mask.
    if isinstance(keep_prob, Number):
        return jnp.uint32(np.round(np.float32(keep_prob) * np.float32(2**24)))
    scaled = jnp.round(keep_prob.astype(jnp.float32) * jnp.float32(2**24))
    return jnp.maximum(scaled, jnp.float32(0)).astype(jnp.uint32)


def _universal_hash(multiplier: jax.Array, offset: jax.Array, units: int) -> jax.Array:
    """Multiply-shift: 16 bits for each of a row's units, pairwise independent."""
    places = jnp.arange(units, dtype=jnp.uint32)
    places = places.reshape((1,) * (multiplier.ndim - 1) + (-1,))
    return (multiplier * places + offset) >> (32 - _TIE_BITS)

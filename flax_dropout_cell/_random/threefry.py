"""Threefry-2x32, written out so that XLA makes one kernel of it."""

import jax
import jax.numpy as jnp

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry_2x32(key: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011) of the blocks `(0, counts)`.

    Many keys, `[.., 2]`, broadcast against the counts.
    """
    first, second = key[..., 0], key[..., 1]
    # The third key is not zero even if both words are.
    keys = (first, second, first ^ second ^ jnp.uint32(_PARITY))
    left, right = jnp.zeros_like(counts) + first, counts + second
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            left += right
            right = (right << jnp.uint32(rotation)) | (right >> jnp.uint32(32 - rotation))
            right ^= left
        left += keys[(group + 1) % 3]
        right += keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return left, right

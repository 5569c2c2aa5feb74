"""Each kind of PRNG key that JAX has, typed and raw."""

import contextlib
from collections.abc import Iterator

import jax

KINDS = {
    "threefry2x32": ("threefry2x32", True),
    "threefry2x32, not partitionable": ("threefry2x32", False),
    "rbg": ("rbg", True),
    "unsafe_rbg": ("unsafe_rbg", True),
}


@contextlib.contextmanager
def keys_of(kind: str) -> Iterator[tuple[jax.Array, jax.Array]]:
    """One key twice, typed and raw, where the raw one means the same."""
    impl, partitionable = KINDS[kind]
    with jax.default_prng_impl(impl), jax.threefry_partitionable(partitionable):
        yield jax.random.key(5), jax.random.PRNGKey(5)

"""Comparisons of trees of arrays, exact and to rounding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def assert_same(got: Any, want: Any) -> None:
    """Equal structures and equal bits, keys included."""
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(_bits(a), _bits(b)), got, want)


def assert_close(got: Any, want: Any, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Equal structures, and numbers that differ by rounding: a compiler may reorder sums."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


def assert_close_in_scale(got: Any, want: Any, tolerance: float = 2e-5) -> None:
    """Equal structures, shapes and dtypes, and numbers that differ by little of the largest one."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.float64(a), np.float64(b)
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()))


def _bits(leaf: Any) -> Any:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf

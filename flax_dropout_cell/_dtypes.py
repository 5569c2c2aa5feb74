"""The dtype in which numbers of half precision are drawn and computed."""

from typing import Any

import jax.numpy as jnp


def wide_dtype(dtype: Any) -> Any:
    """float32 for half precision, any other dtype as it is."""
    dtype = jnp.dtype(dtype)
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)

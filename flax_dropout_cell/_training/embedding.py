"""Word-level embedding dropout: a dropped word is dropped wherever it occurs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._arguments import check_count, check_flag
from .._messages import must_be
from .._random.keep_masks import drop_prob_in_24_bits
from .._random.keys import EMBEDDING, as_rng, fold_in, is_threefry
from .._random.threefry import threefry_2x32
from .._sharding import check_shards_differ
from ..noises import Dropout
from ..noises.arguments import check_fits, check_probability


def embedding_dropout(
    table: jax.Array,
    ids: jax.typing.ArrayLike,
    rng: jax.Array | None,
    *,
    keep_prob: float | jax.Array,
    per_example: bool = False,
) -> jax.Array:
    """Looks words up in a table from which whole word types are dropped.

    Each word type is dropped with probability `1 - keep_prob`: all its features are zero at every
    place where it occurs. The others are scaled by `1 / keep_prob` (Gal and Ghahramani 2016,
    arXiv:1512.05287, section 4.2; Merity et al. 2017, arXiv:1708.02182, section 4.3). A type's
    mask depends on `rng` and its id alone, so windows of a sequence that share a key agree.
    Nothing is drawn for types that do not occur: the cost grows with the number of ids, not with
    the table.

    Args:
      table: `[num_embeddings, *features]`, floating-point.
      ids: integers of any shape; negative ones count from the table's end, as in NumPy.
      rng: the sequence's key. If None, this is evaluation: the plain lookup.
      keep_prob: in [0, 1], a number or a scalar array, as in `Dropout`. 1 is the plain lookup.
      per_example: if True, each row of `ids` (its index along the first axis) drops types of its
        own, as in Gal's code. If False, all rows drop the same types, as in Merity's.

    Returns:
      `[*ids.shape, *features]`, in the table's dtype.

    Raises:
      ValueError: if `keep_prob` is a number outside [0, 1], or an array with dims; if `per_example`
        is True, and `ids` is a scalar, or the shards of `jax.shard_map` share a key; or if NumPy
        `ids` are not in the table.
      TypeError: if `table` is not floating-point, `ids` are not integers, or `rng` is not a key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> table = jnp.ones((50_000, 3))
      >>> ids = jnp.array([[7, 8, 7], [9, 8, 7]])
      >>> fdc.embedding_dropout(table, ids, jax.random.key(0), keep_prob=0.5)[..., 0]
      Array([[0., 2., 0.],
             [2., 2., 0.]], dtype=float32)
    """
    noise = Dropout(keep_prob=keep_prob)
    if np.ndim(keep_prob):  # units are dropped together, as a type
        got = f"got shape {np.shape(keep_prob)}"
        raise ValueError(f"keep_prob must be one number, or an array without dims; {got}.")
    check_fits("keep_prob", keep_prob, ())
    check_flag("per_example", per_example)
    rng = as_rng(rng)
    _check_range(table, ids)
    table, ids = jnp.asarray(table), jnp.asarray(ids)
    _check_lookup(table, ids, per_example)
    # A narrow dtype cannot count from the end of a long table.
    if jnp.iinfo(ids.dtype).bits < 32:
        ids = ids.astype(jnp.int32)
    rows = jnp.take(table, ids, axis=0)
    if rng is None or noise.is_identity:
        return rows
    if per_example:
        check_shards_differ("embedding_dropout: the array of ids", ids, rng)
    with jax.named_scope("embedding_dropout"):
        types = jnp.where(ids < 0, ids + table.shape[0], ids).astype(jnp.uint32)
        drop = drop_prob_in_24_bits(keep_prob)
        mask = _keep_types(rng, types, drop, per_example)
        return noise.apply(mask.reshape(mask.shape + (1,) * (table.ndim - 1)), rows)


@functools.partial(jax.jit, static_argnums=3)
def _keep_types(rng: jax.Array, types: jax.Array, drop: jax.Array, per_example: bool) -> jax.Array:
    """Draws a random word per id; an id is kept if the first 24 bits are at least `drop`."""
    rng = fold_in(_as_threefry(rng), EMBEDDING)
    if per_example:
        words = jax.vmap(lambda row, types: _words(fold_in(rng, row), types))(
            jnp.arange(types.shape[0], dtype=jnp.uint32), types
        )
    else:
        words = _words(rng, types)
    return (words >> 8) >= drop


def _words(rng: jax.Array, types: jax.Array) -> jax.Array:
    """`jax.random.bits(rng, [num_embeddings])[types]`, drawing only these; rng is threefry."""
    left, right = threefry_2x32(jax.random.key_data(rng), types)
    return left ^ right


def _as_threefry(rng: jax.Array) -> jax.Array:
    # Other PRNGs need a loop for one word per key: under vmap, rbg gives all keys one stream, and
    # its bits depend on the sharding. So a key of any kind is hashed to a threefry key.
    if is_threefry(rng):
        return rng
    first, second, *others = jax.random.key_data(rng).ravel()
    key = jnp.stack([first, second])
    for word in others:
        key = jnp.stack(threefry_2x32(key, word))
    return jax.random.wrap_key_data(key, impl="threefry2x32")


def _check_lookup(table: jax.Array, ids: jax.Array, per_example: bool) -> None:
    if table.ndim == 0 or not jnp.issubdtype(table.dtype, jnp.floating):
        raise TypeError(must_be("table", "floating-point, [num_embeddings, *features]", table))
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(must_be("ids", "integers", ids))
    if per_example and ids.ndim == 0:
        raise ValueError("with per_example, ids must be [batch, ...], got a scalar.")


def _check_range(table: Any, ids: Any) -> None:
    """Raises if an id on the host is not in the table: JAX would read NaN there."""
    size = np.shape(table)[:1]
    if isinstance(ids, np.ndarray | np.integer) and np.issubdtype(ids.dtype, np.integer) and size:
        wrong = ids[(ids < -size[0]) | (ids >= size[0])]
        if np.size(wrong):
            got = np.ravel(wrong)[0]
            raise ValueError(f"ids must be from {-size[0]} to {size[0] - 1}, got {got}.")


def check_embed(num_embeddings: int, features: int, keep_prob: float | jax.Array) -> None:
    """Raises if the arguments of `Embed` would make its calls fail."""
    for name, size in (("num_embeddings", num_embeddings), ("features", features)):
        check_count(name, size)
    check_probability("keep_prob", keep_prob)

"""Shardings that are part of an array's type, as they are on a mesh with explicit axes.

`jnp.where` and the carry of `jax.lax.scan` want arrays of one sharding there. So a mask is drawn
with the sharding of the value that it is for, and a carry starts sharded as the inputs are. On all
other meshes, and on one device, arrays have no such sharding, and these functions do nothing.

Inside of `jax.shard_map`, the type says over which axes an array differs; a carry starts with those
of the inputs.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ._compat import ShapedArray, how_to_vary, vary_over, varying_axes


def explicit_sharding(leaf: Any) -> NamedSharding | None:
    """The sharding in the type of an array or a shape; None if no dim is on an explicit axis."""
    sharding = type_of(leaf).sharding
    if not isinstance(sharding, NamedSharding) or not any(
        axes is not None and _is_explicit(sharding.mesh, axes) for axes in sharding.spec
    ):
        return None
    return sharding


def place_like(value: Any, leaf: Any) -> Any:
    """A value that broadcasts to a leaf, with the leaf's sharding and its axes of `shard_map`."""
    value = vary_over(value, varying_axes(type_of(leaf)))
    sharding = _sharding_of(np.shape(value), leaf)
    if sharding is None or sharding == jax.typeof(value).sharding:
        return value
    return jax.sharding.reshard(value, sharding)


def broadcast_like(value: Any, leaf: Any) -> jax.Array:
    """A value that is broadcast to the shape of a leaf, sharded as the leaf is."""
    return place_like(jnp.broadcast_to(value, np.shape(leaf)), leaf)


def place_rows(tree: Any, batch: tuple[int, ...], like: Any) -> Any:
    """Leaves that start with the batch dims, with these sharded as in arrays of the type `like`.

    In `jax.shard_map` all leaves differ over the axes that `like` differs over.
    """
    axes, sharding = varying_axes(like), explicit_sharding(like)
    tree = jax.tree.map(lambda leaf: vary_over(leaf, axes), tree)
    if sharding is None:
        return tree
    rows = sharding.spec[: len(batch)]

    def place(leaf: Any) -> Any:
        if np.shape(leaf)[: len(batch)] != batch:
            return leaf
        spec = P(*rows, *[None] * (np.ndim(leaf) - len(batch)))
        return jax.sharding.reshard(leaf, sharding.update(spec=spec))

    return jax.tree.map(place, tree)


def draw_like(leaf: Any, draw: Callable[..., jax.Array], *args: Any) -> jax.Array:
    """`draw(*args)`, which broadcasts to a leaf, sharded as the leaf is.

    The compiler shards the draw, so each device draws its own part.

    Args:
      leaf: the leaf, or its type.
      draw: makes an array. It must take all arrays that it reads from `args`.
      *args: pytrees of arrays and of other values.
    """
    sharding = explicit_sharding(leaf)
    if sharding is None:
        return draw(*args)
    leaves, structure = jax.tree.flatten(args)
    arrays = {at: each for at, each in enumerate(leaves) if hasattr(each, "dtype")}

    def run(arrays: dict[int, Any]) -> jax.Array:
        filled = [arrays.get(at, each) for at, each in enumerate(leaves)]
        return draw(*jax.tree.unflatten(structure, filled))

    drawn = jax.eval_shape(
        run, jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), arrays)
    )
    mesh = sharding.mesh
    axes = tuple(axis for axis in mesh.axis_names if _is_explicit(mesh, axis))
    placed = _sharding_of(drawn.shape, leaf)
    sharded = jax.sharding.auto_axes(run, axes=axes, out_sharding=placed)(arrays)
    return cast(jax.Array, sharded)


def check_shards_differ(what: str, value: Any, drawn_from: Any, otherwise: str = "") -> None:
    """Raises if the shards of `jax.shard_map` would draw the same mask for different values.

    Args:
      what: names the value, for the error.
      value: the array that the mask is for, or its type.
      drawn_from: a pytree of all arrays that the mask is drawn from, such as the key.
      otherwise: another way out than a key for each shard.
    """
    sources = map(jax.typeof, jax.tree.leaves(drawn_from))
    missing = sorted(varying_axes(type_of(value)).difference(*map(varying_axes, sources)))
    if missing:
        axes = repr(missing[0] if len(missing) == 1 else tuple(missing))
        raise ValueError(
            f"{what} differs between the shards of {axes} in jax.shard_map, and the key does not, "
            f"so all shards would draw the same mask. Write "
            f"rng = jax.random.fold_in(rng, jax.lax.axis_index({axes})){otherwise}. If the values "
            f"are in fact equal on all of them, write rng = {how_to_vary('rng', axes)}."
        )


def type_of(leaf: Any) -> Any:
    """The type of an array; a type as it is."""
    known = isinstance(leaf, jax.ShapeDtypeStruct | ShapedArray)
    return leaf if known else jax.typeof(leaf)


def _sharding_of(shape: tuple[int, ...], leaf: Any) -> NamedSharding | None:
    """The sharding of an array that broadcasts to a leaf; its dims of size 1 are not sharded."""
    sharding = explicit_sharding(leaf)
    if sharding is None:
        return None
    spec = [*sharding.spec, *[None] * (np.ndim(leaf) - len(sharding.spec))]
    spec = [*[None] * len(shape), *spec][len(spec) :]
    pairs = zip(shape, spec, strict=True)
    return sharding.update(spec=P(*(None if size == 1 else axes for size, axes in pairs)))


def _is_explicit(mesh: Any, axes: str | tuple[str, ...]) -> bool:
    first = axes if isinstance(axes, str) else axes[0]
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return types.get(first) == AxisType.Explicit

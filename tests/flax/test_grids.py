"""Rows in a grid: with two batch dims, each row has the masks of its place or of its id."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asserts import assert_close
from hand_masks import kept, site_key, with_number
from layers import FEATURES, FRAMEWORKS, STEPS, UNITS, Framework

import flax_dropout_cell as fdc

KEY = jax.random.key(3)
ONCE = fdc.Dropout(keep_prob=0.5, variational=True)
frameworks = pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)


def echo(params: Any, carry: Any, x: Any) -> tuple[Any, Any]:
    return carry, x


def echoed(noise: fdc.Dropout, xs: jax.Array, **given: Any) -> Any:
    spec = fdc.RecurrentDropout(input=noise)
    return fdc.dropout_scan(None, None, xs, KEY, cell=echo, dropout=spec, **given)[1]


@frameworks
def test_rows_in_a_grid(framework: Framework) -> None:
    """The stock layer under masks by hand, with every argument that has the batch dims."""
    grid = (2, 3)
    spec = fdc.RecurrentDropout(input=ONCE, output=fdc.Dropout(keep_prob=0.5))
    xs = np.asarray(jax.random.normal(jax.random.key(4), (*grid, STEPS, FEATURES)))
    layer = framework.layer(framework.gru(), spec, jnp.asarray(xs))
    lengths = np.array([[4, 6, 1], [2, 0, 5]])

    def dropped(mask: np.ndarray, value: Any) -> np.ndarray:
        return np.where(mask, 2 * np.asarray(value), 0)

    def wanted(once: np.ndarray, fresh: np.ndarray) -> np.ndarray:
        """`once` is `[*grid, features]`, `fresh` `[*grid, time, units]`."""
        return dropped(fresh, layer.stock(jnp.asarray(dropped(once[:, :, None], xs))))

    once = kept(site_key(KEY, "input"), *grid, FEATURES)
    fresh = [kept(site_key(KEY, "output", t), *grid, UNITS) for t in range(STEPS)]
    ys = wanted(once, np.stack(fresh, 2))
    assert_close(layer.run(xs, KEY), ys)
    time_first = layer.run(np.moveaxis(xs, 2, 0), KEY, time_major=True)
    assert_close(time_first, np.moveaxis(ys, 2, 0))
    prefix = np.arange(STEPS) < lengths[..., None]
    for given in ({"seq_lengths": lengths}, {"valid": prefix}):
        assert_close(layer.run(xs, KEY, **given), np.where(prefix[..., None], ys, 0))

    ids = np.array([[7, -1, 2**40], [3, 2**40 + 3, 7]])

    def of_rows(key: jax.Array, units: int) -> np.ndarray:
        rows = np.empty((*grid, units), bool)
        for row, name in np.ndenumerate(ids):
            rows[row] = kept(with_number(key, int(name)), units)
        return rows

    once = of_rows(site_key(KEY, "input"), FEATURES)
    fresh = [of_rows(site_key(KEY, "output", t), UNITS) for t in range(STEPS)]
    ys = wanted(once, np.stack(fresh, 2))
    assert_close(layer.run(xs, KEY, sequence_ids=ids), ys)
    resets = np.zeros((*grid, STEPS), bool)
    resets[:, :, 0] = True
    each = np.broadcast_to(ids[..., None], resets.shape)
    assert_close(layer.run(xs, KEY, resets=resets, sequence_ids=each), ys)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_reset_in_a_grid_draws_by_the_rows_place(reverse: bool) -> None:
    grid = (2, 3)
    spec = fdc.RecurrentDropout(input=ONCE)
    resets = np.zeros((4, *grid), bool)
    resets[1], resets[3, 1, 2] = True, True
    xs = jnp.ones((4, *grid, 16))
    options: Any = {"resets": resets, "reverse": reverse}
    _, ys = fdc.dropout_scan(None, xs[0, ..., 0], xs, KEY, cell=echo, dropout=spec, **options)
    key = site_key(KEY, "input")
    masks = kept(key, *grid, 16)
    for t in range(4):
        for place, row in enumerate(np.ndindex(grid)):
            if resets[(t, *row)]:
                own = jax.random.fold_in(jax.random.fold_in(key, np.uint32(t)), np.uint32(place))
                masks[row] = kept(own, 16)
        np.testing.assert_array_equal(ys[t], np.where(masks, 2.0, 0.0))


def test_a_mask_over_one_of_two_batch_dims_is_not_a_rows_own() -> None:
    """Rows share it, so it is drawn once for all, whatever their ids."""
    noise = fdc.Dropout(keep_prob=0.5, variational=True, broadcast_dims=(1,))
    xs = jnp.ones((2, 2, 3, 16))
    ys = echoed(noise, xs, sequence_ids=np.arange(6).reshape(2, 3))
    mask = kept(site_key(KEY, "input"), 2, 1, 16)
    np.testing.assert_array_equal(ys, np.broadcast_to(np.where(mask, 2.0, 0.0), ys.shape))


@pytest.mark.parametrize("dims", [(1,), (-2,), (2,), (1, 2)])
def test_rows_with_ids_share_a_mask_over_their_own_dims(dims: tuple[int, ...]) -> None:
    """`broadcast_dims` counts the value's dims; a row, drawn by itself, has none of the batch."""
    noise = fdc.Dropout(keep_prob=0.5, variational=True, broadcast_dims=dims)
    ids, shape = np.array([4, -1, 4]), (3, 5, 16)
    xs = jnp.ones((2, *shape))
    ys = echoed(noise, xs, sequence_ids=ids)
    alone = [1 if dim in [each % 3 for each in dims] else shape[dim] for dim in (1, 2)]
    masks = np.empty(shape, bool)
    for row, name in enumerate(ids):
        masks[row] = kept(with_number(site_key(KEY, "input"), int(name)), *alone)
    np.testing.assert_array_equal(ys, np.broadcast_to(np.where(masks, 2.0, 0.0), ys.shape))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int64", "uint64"])
def test_an_id_draws_alike_in_every_integer_type(dtype: str) -> None:
    """By its two words as an integer of 64 bits: the upper one of a small unsigned id is 0."""
    ids = np.array([7, np.iinfo(dtype).max & 0xFFFFFFFF, 200], dtype)  # beyond the signed type
    ys = echoed(ONCE, jnp.ones((1, 3, 32)), sequence_ids=ids)
    for y, name in zip(ys[0], ids.tolist(), strict=True):
        mask = kept(with_number(site_key(KEY, "input"), name), 32)
        np.testing.assert_array_equal(y, np.where(mask, 2.0, 0.0))


def test_regularization_with_time_behind_two_batch_dims() -> None:
    ys = np.asarray(jax.random.normal(KEY, (3, 3, 5, 2)))
    lengths = np.array([[5, 2, 0], [1, 4, 3], [2, 2, 5]])
    squares, changes = [], []
    for row, length in np.ndenumerate(lengths):
        squares += list(ys[row][:length] ** 2)
        changes += list(np.diff(ys[row][:length], axis=0) ** 2)
    for function, wanted in (
        (fdc.activation_regularization, squares),
        (fdc.temporal_activation_regularization, changes),
    ):
        got = function(jnp.asarray(ys), time_axis=2, seq_lengths=lengths)
        np.testing.assert_allclose(got, np.mean(wanted), rtol=1e-5)

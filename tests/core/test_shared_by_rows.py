"""A value that all rows share: neither padding nor a reset of a row may change a part of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_dropout_cell as fdc

T, B = 4, 2
BARE = fdc.RecurrentDropout()
RESETS = np.zeros((T, B), bool)
RESETS[2, 0] = True
ROWS_DIFFER = {"seq_lengths": np.array([4, 1]), "resets": RESETS}
options = pytest.mark.parametrize("option", ROWS_DIFFER)


def scan(cell: Any, carry: Any, xs: Any, **given: Any) -> Any:
    return fdc.dropout_scan(None, carry, xs, None, cell=cell, dropout=BARE, **given)


def centred(_: Any, carry: Any, x: Any) -> Any:
    """Inputs less a running mean of each feature, which all rows share."""
    h, mean = carry
    mean = (mean + x.mean(0)) / 2
    return (h + x - mean[None], mean), h


def noisy(_: Any, carry: Any, x: Any) -> Any:
    """A raw key, whose two words are as many as the rows."""
    h, key = carry
    key, step = jax.random.split(key)
    return (h + x + jax.random.uniform(step, h.shape), key), h


@options
@pytest.mark.parametrize("features", [B, B + 1])
def test_a_statistic_of_the_batch_is_refused(option: str, features: int) -> None:
    """Of as many features as rows, it would lose those that have the number of a row."""
    carry, xs = (jnp.zeros((B, features)), jnp.zeros(features)), jnp.ones((T, B, features))
    found = rf"carry\[1\] is float32\[{features}\] at a step.*jnp.broadcast_to"
    with pytest.raises(ValueError, match=found):
        scan(centred, carry, xs, **{option: ROWS_DIFFER[option]})


@options
def test_a_raw_key_is_refused(option: str) -> None:
    carry = (jnp.zeros((B, 3)), jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match=r"carry\[1\] is uint32\[2\] at a step.*by chance"):
        scan(noisy, carry, jnp.ones((T, B, 3)), **{option: ROWS_DIFFER[option]})


@options
def test_a_typed_key_that_all_rows_share_goes_on(option: str) -> None:
    """It has no dims, so it is no row's: the keys are those of a loop without padding or resets."""
    key, keys = jax.random.key(0), []
    for _ in range(T):
        key, step = jax.random.split(key)
        keys.append(step)
    carry = (jnp.zeros((B, 3)), jax.random.key(0))
    given = {option: ROWS_DIFFER[option]}
    (h, last), _ = scan(noisy, carry, jnp.ones((T, B, 3)), **given)
    np.testing.assert_array_equal(jax.random.key_data(last), jax.random.key_data(key))
    added = np.stack([1 + jax.random.uniform(step, (B, 3)) for step in keys])
    first = {"seq_lengths": (0, 0), "resets": (2, 0)}[option]  # of each row's steps that count
    last_of = {"seq_lengths": (T, 1), "resets": (T, T)}[option]
    spans = zip(first, last_of, strict=True)
    wanted = [added[start:stop, row].sum(0) for row, (start, stop) in enumerate(spans)]
    np.testing.assert_allclose(h, wanted, rtol=1e-6)


@options
def test_a_cell_that_knows_its_batch_is_no_reason_to_refuse(option: str) -> None:
    """An array of each row's own beside the carry: the cell runs on no other batch."""
    own = jnp.arange(1.0, B + 1)[:, None] * jnp.ones((B, B))

    def cell(_: Any, h: Any, x: Any) -> Any:
        h = h + own * x.astype(h.dtype)
        return h, h

    given = {option: ROWS_DIFFER[option]}
    h, _ = scan(cell, jnp.zeros((B, B)), jnp.ones((T, B, B)), **given)
    steps = {"seq_lengths": [[4.0], [1.0]], "resets": [[2.0], [4.0]]}[option]
    np.testing.assert_array_equal(h, own * jnp.array(steps))


def test_a_leaf_that_meets_nothing_but_an_array_outside() -> None:
    """In the cell it is like one that all rows share; the error says where the array goes."""
    pace = jnp.arange(1.0, B + 1)

    def closes_over(_: Any, carry: Any, x: Any) -> Any:
        h, clock = carry
        return (h + x, clock + pace), clock

    def reads(_: Any, carry: Any, at: Any) -> Any:
        (h, clock), (x, pace) = carry, at
        return (h + x, clock + pace), clock

    first, xs = (jnp.zeros((B, 3)), jnp.zeros(B)), jnp.ones((T, B, 3))
    with pytest.raises(ValueError, match=r"carry\[1\] .*arrays of this batch .*pass those in xs"):
        scan(closes_over, first, xs, resets=RESETS)
    _, clocks = scan(reads, first, (xs, jnp.broadcast_to(pace, (T, B))), resets=RESETS)
    np.testing.assert_array_equal(clocks, [[0, 0], [1, 2], [0, 4], [1, 6]])


@options
def test_a_cell_that_cuts_its_batch_in_parts(option: str) -> None:
    def cell(_: Any, h: Any, x: Any) -> Any:
        h = jnp.concatenate([part + 1 for part in jnp.split(h, 2)]) * x
        return h, h

    h, _ = scan(cell, jnp.zeros((B, 3)), jnp.ones((T, B, 3)), **{option: ROWS_DIFFER[option]})
    steps = {"seq_lengths": [4, 1], "resets": [2, 4]}[option]
    np.testing.assert_array_equal(h[:, 0], steps)


@options
def test_a_carry_that_alone_has_rows(option: str) -> None:
    """Whatever the cell closes over, it cannot be one that rows share."""
    own = jnp.arange(1.0, B + 1)

    def cell(_: Any, h: Any, x: Any) -> Any:
        return h + own + x, h

    h, _ = scan(cell, jnp.zeros(B), jnp.ones(T), **{option: ROWS_DIFFER[option]})
    wanted = {"seq_lengths": [8, 3], "resets": [4, 12]}[option]
    np.testing.assert_array_equal(h, wanted)


def test_keys_of_rows_need_a_reset_carry() -> None:
    """Zeros, the default, would be one key, and so the same numbers in all rows."""

    def cell(_: Any, carry: Any, x: Any) -> Any:
        h, keys = carry
        keys, steps = jax.vmap(jax.random.split, out_axes=1)(keys)
        y = jax.vmap(jax.random.uniform)(steps)
        return (h + y[:, None] * x, keys), y

    carry, xs = (jnp.zeros((B, 3)), jax.random.split(jax.random.key(0), B)), jnp.ones((T, B, 3))
    with pytest.raises(ValueError, match=r"carry\[1\] holds keys.*give reset_carry"):
        scan(cell, carry, xs, resets=RESETS)
    fresh = jax.random.split(jax.random.key(1), B)
    _, ys = scan(cell, carry, xs, resets=RESETS, reset_carry=(jnp.zeros((B, 3)), fresh))
    for row in range(B):
        key = carry[1][row]
        for step in range(T):
            key, own = jax.random.split(fresh[row] if RESETS[step, row] else key)
            assert ys[step, row] == jax.random.uniform(own), (step, row)


@pytest.mark.parametrize("option", ["valid", "resets"])
def test_a_number_of_each_row(option: str) -> None:
    """A leaf `[batch]` of the carry has rows: padding holds it back, and a reset starts it anew."""
    steps, rows = 6, 4
    flags = np.random.default_rng(3).random((steps, rows)) < 0.5
    given: Any = {option: flags}

    def cell(params: Any, carry: Any, x: Any) -> Any:
        return {"count": carry["count"] + 1, "h": x}, carry["count"]

    carry = {"count": jnp.full(rows, 5, jnp.int32), "h": jnp.zeros((rows, 2))}
    carry, ys = fdc.dropout_scan(
        None,
        carry,
        jnp.ones((steps, rows, 2)),
        None,
        cell=cell,
        dropout=fdc.RecurrentDropout(),
        **given,
    )
    count, wanted = np.full(rows, 5), np.zeros((steps, rows), int)
    for t in range(steps):
        count = np.where(flags[t], 0, count) if option == "resets" else count
        runs = flags[t] if option == "valid" else np.ones(rows, bool)
        wanted[t] = np.where(runs, count, 0)
        count = count + runs
    np.testing.assert_array_equal(carry["count"], count)
    np.testing.assert_array_equal(ys, wanted)

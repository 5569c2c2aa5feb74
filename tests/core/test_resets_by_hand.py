"""Resets, ids and cut windows beside `jax.lax.scan`, with masks drawn by hand from `jax.random`.

The keys are those of docs/randomness.md. At a probability of 1/2 a unit is kept if its bit is 0.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hand_masks import kept, site_key

import flax_dropout_cell as fdc

T, B, H = 6, 3, 5
RNG = jax.random.key(7)
XS, H0 = (jax.random.normal(jax.random.key(n), shape) for n, shape in ((1, (T, B, H)), (2, (B, H))))
RESETS = np.array([[0, 0, 1], [0, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 1]], bool)
IDS = np.array([7, -1, 2**40 + 3]) + 10 * RESETS.cumsum(0)
SPEC = fdc.RecurrentDropout(
    input=fdc.Dropout(keep_prob=0.5, variational=True),
    state=fdc.Zoneout(prob=0.5),
    output=fdc.Dropout(keep_prob=0.5),
)


def cell(params: Any, h: Any, x: Any) -> Any:
    h = jnp.tanh(x + h)
    return h, h


key_at = functools.partial(site_key, RNG)


def of_rows(key: Any, low: Any, high: Any) -> np.ndarray:
    pairs = zip(np.asarray(low).astype(np.uint32), np.asarray(high).astype(np.uint32), strict=True)
    return np.stack([kept(jax.random.fold_in(jax.random.fold_in(key, a), b), H) for a, b in pairs])


def masks_by_hand(by_id: bool) -> list[np.ndarray]:
    masks, once = [], kept(key_at("input"), B, H)
    for t in range(T):
        if by_id:
            words = IDS[t] & 0xFFFFFFFF, (IDS[t] >> 32) & 0xFFFFFFFF
            keys = key_at("input"), key_at("state", t), key_at("output", t)
            masks.append([of_rows(key, *words) for key in keys])
            continue
        # A row that resets is named by this step and its place.
        new = of_rows(key_at("input"), np.full(B, t), np.arange(B))
        once = np.where(RESETS[t][:, None], new, once)
        masks.append([once, kept(key_at("state", t), B, H), kept(key_at("output", t), B, H)])
    return [np.stack(each) for each in zip(*masks, strict=True)]


def scan_by_hand(by_id: bool) -> Any:
    def step(h: Any, at: Any) -> Any:
        x, reset, of_x, of_h, of_y = at
        h = jnp.where(reset[:, None], 0, h)
        new = jnp.tanh(jnp.where(of_x, 2 * x, 0) + h)
        return jnp.where(of_h, new, h), jnp.where(of_y, 2 * new, 0)

    return jax.lax.scan(step, H0, (XS, RESETS, *masks_by_hand(by_id)))


@pytest.mark.parametrize(("by_id", "cuts"), [(False, [0, T]), (True, [0, T]), (True, [0, 1, 4, T])])
def test_a_sequence_with_resets(by_id: bool, cuts: list[int]) -> None:
    scan = functools.partial(fdc.dropout_scan, None, cell=cell, dropout=SPEC)
    h, ys = H0, []
    for start, end in itertools.pairwise(cuts):
        now = slice(start, end)
        ids = IDS[now] if by_id else None
        h, y = scan(h, XS[now], RNG, start=start, resets=RESETS[now], sequence_ids=ids)
        ys.append(y)
    wanted_h, wanted = scan_by_hand(by_id)
    np.testing.assert_allclose(h, wanted_h, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.concatenate(ys), wanted, rtol=1e-5, atol=1e-6)


def test_a_mask_that_is_brought_for_one_of_several_leaves_stays_at_a_reset() -> None:
    """The mask is the same at all steps, although its noise would draw at each step."""

    def pair(params: Any, carry: Any, x: Any) -> Any:
        first, second = carry
        second = jnp.tanh(x + second)
        return (first + second, second), second

    noise = fdc.Dropout(keep_prob=0.5, scale=False)
    mask = kept(key_at("state"), B, H)
    (_, h), ys = fdc.dropout_scan(
        None, (H0, H0), XS, RNG, cell=pair, dropout=fdc.RecurrentDropout(state=(None, noise)),
        masks=fdc.Masks(state=(None, jnp.asarray(mask))), resets=RESETS,
    )  # fmt: skip

    def step(h: Any, at: Any) -> Any:
        x, reset = at
        y = jnp.tanh(x + jnp.where(reset[:, None], 0, h))
        return jnp.where(mask, y, 0), y

    wanted_h, wanted = jax.lax.scan(step, H0, (XS, RESETS))
    np.testing.assert_allclose(h, wanted_h, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ys, wanted, rtol=1e-5, atol=1e-6)

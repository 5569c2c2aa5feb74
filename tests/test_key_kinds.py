"""Every kind of key, in every host: typed and raw, of each PRNG, threefry partitionable or not."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import probes
import pytest
import test_nnx
from flax import nnx
from probes import BATCH, SITE_NAMES, STEPS, UNITS

import flax_dropout_cell as fdc
from flax_dropout_cell._random.keys import fold_in

KEEP_PROB = 0.7
FROZEN = ("params", "state.a", "state.b")
SPEC = fdc.RecurrentDropout(
    params=fdc.Dropout(keep_prob=KEEP_PROB, variational=True),
    input=fdc.Dropout(keep_prob=KEEP_PROB),
    state=fdc.Dropout(keep_prob=KEEP_PROB, variational=True),
    output={
        "params": None,
        "input": None,
        "state": None,
        "output": fdc.Dropout(keep_prob=KEEP_PROB),
    },
)
KINDS = {
    "threefry2x32": ("threefry2x32", True),
    "threefry2x32, not partitionable": ("threefry2x32", False),
    "rbg": ("rbg", True),
    "unsafe_rbg": ("unsafe_rbg", True),
}


def in_nnx(host: test_nnx.Host) -> Callable[[jax.Array], dict[str, Any]]:
    def run(rng: jax.Array) -> dict[str, Any]:
        rngs = nnx.Rngs(dropout=rng)
        cell = fdc.nnx.DropoutCell(test_nnx.Probe(), SPEC, rngs=rngs)
        carry, ys = host(cell, probes.ones())
        return probes.seen(carry.cell_carry, ys)

    return run


def elsewhere(host: probes.Host) -> Callable[[jax.Array], dict[str, Any]]:
    return lambda rng: host(SPEC, rng, probes.ones()).seen


HOSTS = {name: elsewhere(host) for name, host in probes.HOSTS.items()}
HOSTS |= {f"nnx, {name}": in_nnx(host) for name, host in test_nnx.HOSTS.items()}


@contextlib.contextmanager
def keys_of(kind: str) -> Iterator[tuple[jax.Array, jax.Array]]:
    """One key twice, typed and raw, where the raw one means the same."""
    impl, partitionable = KINDS[kind]
    with jax.default_prng_impl(impl), jax.threefry_partitionable(partitionable):
        yield jax.random.key(5), jax.random.PRNGKey(5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", HOSTS)
def test_lifetimes_and_rates(host: str, kind: str) -> None:
    with keys_of(kind) as (typed, raw):
        # Two functions to JAX, which would take one's compiled program for another default PRNG.
        from_typed, from_raw = (jax.jit(lambda rng: HOSTS[host](rng))(rng) for rng in (typed, raw))
    for site in SITE_NAMES:
        kept = np.asarray(from_typed[site])
        np.testing.assert_array_equal(kept, from_raw[site])
        assert kept.shape == (STEPS, BATCH, UNITS)
        assert set(np.unique(kept)) == {np.float32(0), 1 / np.float32(KEEP_PROB)}
        if site in FROZEN:
            np.testing.assert_array_equal(kept, np.broadcast_to(kept[:1], kept.shape))
            kept = kept[0, :1] if site == "params" else kept[0]
        else:
            pairs = [(s, t) for s in range(STEPS) for t in range(s)]
            assert all(0.2 < (kept[s] != kept[t]).mean() < 0.7 for s, t in pairs)
        sigma = math.sqrt(KEEP_PROB * (1 - KEEP_PROB) / kept.size)
        assert abs((kept > 0).mean() - KEEP_PROB) < 5 * sigma, site


def test_raw_keys_mean_the_default_prng_of_the_moment() -> None:
    """Though compiled programs outlive it: one raw key, two PRNGs, two masks."""
    noise, raw = fdc.Dropout(keep_prob=KEEP_PROB), jax.numpy.arange(4, dtype="uint32")
    for impl in ("rbg", "unsafe_rbg", "rbg"):
        with jax.default_prng_impl(impl):
            for fold in (jax.random.fold_in, fold_in):
                mask = noise.draw_mask(fold(raw, 1), (64,), "float32")
                typed = jax.random.fold_in(jax.random.wrap_key_data(raw, impl=impl), 1)
                np.testing.assert_array_equal(mask, noise.draw_mask(typed, (64,), "float32"))

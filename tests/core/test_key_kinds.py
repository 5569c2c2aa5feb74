"""Every kind of key, in every host: typed and raw, of each PRNG, threefry partitionable or not."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from host_runs import Window
from hosts import HOSTS, ONE_EACH
from key_kinds import KINDS, keys_of
from op_by_op import op_by_op
from probes import BATCH, SITE_NAMES, UNITS

import flax_dropout_cell as fdc
from flax_dropout_cell._random.keys import fold_in

KEEP_PROB = 0.7
SPEC = probes.mixed(("params", "state"), KEEP_PROB)
STEPS = 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", [host for host in HOSTS if "backward" not in host])
def test_lifetimes_and_rates(host: str, kind: str) -> None:
    with keys_of(kind) as (typed, raw):
        from_typed, from_raw = op_by_op(
            lambda *rngs: [HOSTS[host](SPEC, rng, probes.ones(STEPS)).seen for rng in rngs]
        )(typed, raw)
    for site in SITE_NAMES:
        kept = np.asarray(from_typed[site])
        np.testing.assert_array_equal(kept, from_raw[site])
        assert kept.shape == (STEPS, BATCH, UNITS)
        assert set(np.unique(kept)) == {np.float32(0), 1 / np.float32(KEEP_PROB)}
        if not site.startswith(("input", "output")):
            np.testing.assert_array_equal(kept, np.broadcast_to(kept[:1], kept.shape))
            kept = kept[0, :1] if site == "params" else kept[0]
        else:
            pairs = [(s, t) for s in range(STEPS) for t in range(s)]
            assert all(0.2 < (kept[s] != kept[t]).mean() < 0.7 for s, t in pairs)
        sigma = math.sqrt(KEEP_PROB * (1 - KEEP_PROB) / kept.size)
        assert abs((kept > 0).mean() - KEEP_PROB) < 5 * sigma, site


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", ONE_EACH)
def test_a_padded_window_and_then_the_next(host: str, kind: str) -> None:
    """A wrapper's carry holds the key, and hosts index every leaf of a carry with the lengths."""

    def run(rng: jax.Array) -> list[Any]:
        padded = Window(seq_lengths=jnp.full(BATCH, STEPS))
        first = HOSTS[host](SPEC, rng, probes.ones(STEPS), None, padded)
        then = Window(first.carry, start=STEPS)
        return [first.seen, HOSTS[host](SPEC, rng, probes.ones(STEPS), None, then).seen]

    with keys_of(kind) as (typed, raw):
        windows = op_by_op(lambda *rngs: [run(rng) for rng in rngs])(typed, raw)
    for first, second in windows:
        for site in SITE_NAMES:
            masks = np.concatenate([first[site], second[site]])
            frozen = not site.startswith(("input", "output"))
            for s, t in itertools.combinations(range(2 * STEPS), 2):
                assert (masks[s] == masks[t]).all() == frozen, (site, s, t)


def test_raw_keys_mean_the_default_prng_of_the_moment() -> None:
    """Though compiled programs outlive it: one raw key, two PRNGs, two masks."""
    noise, raw = fdc.Dropout(keep_prob=KEEP_PROB), jnp.arange(4, dtype="uint32")
    for impl in ("rbg", "unsafe_rbg", "rbg"):
        with jax.default_prng_impl(impl):
            for fold in (jax.random.fold_in, fold_in):
                mask = noise.draw_mask(fold(raw, 1), (64,), "float32")
                typed = jax.random.fold_in(jax.random.wrap_key_data(raw, impl=impl), 1)
                np.testing.assert_array_equal(mask, noise.draw_mask(typed, (64,), "float32"))

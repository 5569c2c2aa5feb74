"""When a mask is fresh and when it is frozen: the promise that this library is there for."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from probes import BATCH, HOSTS, SITE_NAMES, STEPS, UNITS

import flax_dropout_cell as fdc

VARIATIONAL = fdc.Dropout(keep_prob=0.5, variational=True)
PER_STEP = fdc.Dropout(keep_prob=0.5)

all_hosts = pytest.mark.parametrize("host", HOSTS)
both_modes = pytest.mark.parametrize("noise", [VARIATIONAL, PER_STEP], ids=["variational", "step"])


def differ(a: np.ndarray, b: np.ndarray) -> bool:
    """Two masks of half ones: equal only by chance, once in 2**64 for the smallest here."""
    return bool((a != b).any())


@all_hosts
def test_variational_mask_is_frozen_within_a_sequence(host: str) -> None:
    run = probes.run(host, VARIATIONAL, seed=0)
    for site in SITE_NAMES:
        mask = run.seen[site]
        assert set(np.unique(mask)) == {0.0, 2.0}, site
        np.testing.assert_array_equal(mask, np.broadcast_to(mask[:1], mask.shape), site)


@all_hosts
def test_per_step_mask_is_fresh_at_each_step(host: str) -> None:
    run = probes.run(host, PER_STEP, seed=0)
    for site in SITE_NAMES:
        mask = run.seen[site]
        assert set(np.unique(mask)) == {0.0, 2.0}, site
        for s, t in itertools.combinations(range(STEPS), 2):
            assert differ(mask[s], mask[t]), (site, s, t)


@all_hosts
@both_modes
def test_masks_differ_over_sites_leaves_and_examples(host: str, noise: fdc.Dropout) -> None:
    run = probes.run(host, noise, seed=0)
    for site, other in itertools.combinations(SITE_NAMES, 2):
        assert differ(run.seen[site][0], run.seen[other][0]), (site, other)
    for site in SITE_NAMES[1:]:
        for i, j in itertools.combinations(range(BATCH), 2):
            assert differ(run.seen[site][0, i], run.seen[site][0, j]), (site, i, j)


@all_hosts
@both_modes
def test_masks_are_new_for_another_key(host: str, noise: fdc.Dropout) -> None:
    first, second = (probes.run(host, noise, seed) for seed in (0, 1))
    for site in SITE_NAMES:
        for s, t in itertools.product(range(STEPS), repeat=2):
            assert differ(first.seen[site][s], second.seen[site][t]), site


@pytest.mark.parametrize("host", ["dropout_scan", "nn.RNN"])
def test_masks_are_the_same_for_the_same_key_compiled_or_not(host: str) -> None:
    compiled = probes.run(host, PER_STEP, seed=0)
    plain = HOSTS[host](probes.spec_of(PER_STEP), jax.random.key(0), probes.ones())
    for site in SITE_NAMES:
        np.testing.assert_array_equal(plain.seen[site], compiled.seen[site])


@all_hosts
@both_modes
def test_evaluation_disturbs_nothing(host: str, noise: fdc.Dropout) -> None:
    run = probes.run(host, noise, seed=None)
    for site in SITE_NAMES:
        np.testing.assert_array_equal(run.seen[site], np.ones((STEPS, BATCH, UNITS)))


@both_modes
@pytest.mark.parametrize("site", ["params", "input", "state", "output"])
@pytest.mark.parametrize("host", ["dropout_scan", "nn.RNN"])
def test_one_site_does_not_move_another(host: str, site: str, noise: fdc.Dropout) -> None:
    """Taking the other sites' noises away leaves a site's masks as they were."""
    everything = probes.run(host, noise, seed=0)
    alone = probes.run(host, noise, seed=0, sites=site)
    for name in SITE_NAMES:
        want = everything.seen[name] if name.startswith(site) else np.ones((STEPS, BATCH, UNITS))
        np.testing.assert_array_equal(alone.seen[name], want)


def test_one_leaf_does_not_move_another() -> None:
    spec = probes.spec_of(PER_STEP)
    both = probes.run_dropout_scan(spec, jax.random.key(0), probes.ones())
    one = fdc.RecurrentDropout(state={"a": None, "b": fdc.Dropout(keep_prob=0.5)})
    run = probes.run_dropout_scan(one, jax.random.key(0), probes.ones())
    np.testing.assert_array_equal(run.seen["state.b"], both.seen["state.b"])
    np.testing.assert_array_equal(run.seen["state.a"], np.ones_like(run.seen["state.a"]))


@both_modes
def test_every_host_that_is_given_the_key_draws_the_same(noise: fdc.Dropout) -> None:
    """The three hosts whose key is the user's own agree with one another, bit for bit."""
    runs = [
        host(probes.spec_of(noise), jax.random.key(3), probes.ones())
        for host in (
            probes.run_dropout_scan,
            probes.run_python_loop,
            probes.run_linen_scan_from_outside,
        )
    ]
    for run in runs[1:]:
        for site in SITE_NAMES:
            np.testing.assert_array_equal(run.seen[site], runs[0].seen[site])


@both_modes
def test_directions_have_masks_of_their_own(noise: fdc.Dropout) -> None:
    forward = probes.run("nn.Bidirectional", noise, seed=0)
    backward = probes.run("nn.Bidirectional, backward", noise, seed=0)
    for site in SITE_NAMES:
        if noise.variational:
            assert (backward.seen[site] == backward.seen[site][:1]).all()
        for s, t in itertools.product(range(STEPS), repeat=2):
            assert differ(forward.seen[site][s], backward.seen[site][t]), site


def test_a_step_never_shares_a_mask_with_the_sequence() -> None:
    """The same site and leaf, variational and per-step, under one key."""
    frozen = probes.run_dropout_scan(probes.spec_of(VARIATIONAL), jax.random.key(0), probes.ones())
    fresh = probes.run_dropout_scan(probes.spec_of(PER_STEP), jax.random.key(0), probes.ones())
    for site, other in itertools.product(SITE_NAMES, repeat=2):
        for t in range(STEPS):
            assert differ(frozen.seen[site][0], fresh.seen[other][t]), (site, other)


def test_a_single_step_under_the_sequence_key_is_independent_of_its_masks() -> None:
    """`draw_masks` and `dropout_cell` may be given one key: their sites are different draws."""
    noises = {
        "input": fdc.Dropout(keep_prob=0.5, variational=True),
        "output": fdc.Dropout(keep_prob=0.5),
    }
    spec = fdc.RecurrentDropout(**noises)
    x = jnp.ones((BATCH, UNITS))
    args, options = (None, x, x, jax.random.key(0)), {"cell": echo, "dropout": spec}
    masks = fdc.draw_masks(*args, **options)
    _, y = fdc.dropout_cell(*args, **options, masks=masks)
    assert differ(np.asarray(masks.input), np.asarray(y["ones"]) > 0)


def echo(params, carry, x):
    del params
    return carry, {"x": jnp.zeros_like(x), "ones": jnp.ones_like(x)}


@both_modes
def test_pairs_of_masks_are_independent(noise: fdc.Dropout) -> None:
    """Correlations over sites, leaves, steps and examples stay within 5 sigma."""
    units = 20_000
    run = probes.run_dropout_scan(
        probes.spec_of(noise), jax.random.key(0), probes.ones(steps=3, batch=2, units=units)
    )
    steps = range(1 if noise.variational else 3)
    masks = {
        (site, t, i): run.seen[site][t, i] - 1.0
        for site in SITE_NAMES
        for t in steps
        for i in range(1 if site == "params" else 2)
    }
    for one, other in itertools.combinations(masks, 2):
        correlation = np.mean(masks[one] * masks[other])
        assert abs(correlation) < 5 / np.sqrt(units), (one, other)

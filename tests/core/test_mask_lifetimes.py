"""When a mask is fresh and when it is frozen: the promise that this library is there for."""

import itertools
from typing import Any

import hosts
import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from asserts import assert_same
from hosts import HOSTS, ONE_EACH, SPECS, is_frozen
from probes import BATCH, SITE_NAMES, STEPS, UNITS, differ
from quick_prng import quick_key

import flax_dropout_cell as fdc

VARIATIONAL = fdc.Dropout(keep_prob=0.5, variational=True)
PER_STEP = fdc.Dropout(keep_prob=0.5)

all_hosts = pytest.mark.parametrize("host", HOSTS)
both_specs = pytest.mark.parametrize("spec", SPECS)
one_host_each = pytest.mark.parametrize("host", ONE_EACH)
both_modes = pytest.mark.parametrize("noise", [VARIATIONAL, PER_STEP], ids=["variational", "step"])


@all_hosts
@both_specs
def test_a_variational_mask_is_frozen_and_a_per_step_mask_is_fresh(host: str, spec: str) -> None:
    for site, mask in hosts.run(host, spec, seed=0).seen.items():
        assert set(np.unique(mask)) == {0.0, 2.0}, site
        for s, t in itertools.combinations(range(STEPS), 2):
            assert differ(mask[s], mask[t]) is not is_frozen(spec, site), (site, s, t)


def assert_all_differ(seen: dict[str, np.ndarray]) -> None:
    """No row of a site's masks is a row of another's, nor of another example's."""
    for site, other in itertools.combinations(SITE_NAMES, 2):
        for i, j in itertools.product(range(BATCH), repeat=2):
            assert differ_by_step(seen[site][:, i], seen[other][:, j]), (site, other)
    for site in SITE_NAMES[1:]:
        for i, j in itertools.combinations(range(BATCH), 2):
            assert differ_by_step(seen[site][:, i], seen[site][:, j]), site


def differ_by_step(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((one[:, None] != other[None]).any(-1).all())


@all_hosts
@both_specs
def test_masks_differ_over_sites_leaves_and_examples(host: str, spec: str) -> None:
    assert_all_differ(hosts.run(host, spec, seed=0).seen)


@both_modes
def test_masks_of_one_kind_differ_over_sites_leaves_and_examples(noise: fdc.Dropout) -> None:
    """With one noise everywhere: the other specs never have one kind at all sites."""
    spec = probes.noise_everywhere(noise)
    run = jax.jit(lambda rng, xs: hosts.run_dropout_scan(spec, rng, xs).seen)
    assert_all_differ(jax.tree.map(np.asarray, run(jax.random.key(0), probes.ones())))


@all_hosts
@both_specs
def test_masks_are_new_for_another_key(host: str, spec: str) -> None:
    first, second = (hosts.run(host, spec, seed).seen for seed in (0, 1))
    for site in SITE_NAMES:
        for s, t in itertools.product(range(STEPS), repeat=2):
            assert differ(first[site][s], second[site][t]), site


@one_host_each
@both_specs
def test_masks_are_the_same_for_the_same_key_compiled_or_not(host: str, spec: str) -> None:
    plain = HOSTS[host](SPECS[spec], quick_key(0), probes.ones())
    assert_same(plain.seen, hosts.run(host, spec, seed=0).seen)


@all_hosts
@both_specs
def test_every_host_draws_what_dropout_scan_draws(host: str, spec: str) -> None:
    """From the sequence's key, bit for bit: a probe computes nothing."""
    run = hosts.run(host, spec, seed=0)
    key = hosts.sequence_key(run, quick_key(0))
    assert_same(hosts.program("dropout_scan", spec)(key, probes.ones()).seen, run.seen)


@all_hosts
@both_specs
def test_evaluation_disturbs_nothing_and_needs_no_stream(host: str, spec: str) -> None:
    for mask in hosts.run(host, spec, seed=None).seen.values():
        assert_same(mask, np.ones((STEPS, BATCH, UNITS)))


@one_host_each
@both_specs
def test_one_site_does_not_move_another(host: str, spec: str) -> None:
    """Taking the other sites' noises away leaves a site's masks as they were."""

    def run_alone(site: str, rng: jax.Array) -> Any:
        alone = fdc.RecurrentDropout(**{site: getattr(SPECS[spec], site)})
        return HOSTS[host](alone, rng, probes.ones()).seen

    sites = ("params", "input", "state", "output")
    alone = jax.jit(lambda rng: {site: run_alone(site, rng) for site in sites})(quick_key(0))
    everything = hosts.run(host, spec, seed=0).seen
    for site, name in itertools.product(sites, SITE_NAMES):
        undisturbed = np.ones((STEPS, BATCH, UNITS))
        assert_same(alone[site][name], everything[name] if name.startswith(site) else undisturbed)


def test_one_leaf_does_not_move_another() -> None:
    spec = probes.noise_everywhere(PER_STEP)
    both = hosts.run_dropout_scan(spec, quick_key(0), probes.ones())
    one = fdc.RecurrentDropout(state={"a": None, "b": PER_STEP})
    run = hosts.run_dropout_scan(one, quick_key(0), probes.ones())
    assert_same(run.seen["state.b"], both.seen["state.b"])
    assert_same(run.seen["state.a"], np.ones_like(run.seen["state.a"]))


@both_specs
@pytest.mark.parametrize("host", ["nn.Bidirectional", "nnx.Bidirectional"])
def test_directions_have_masks_of_their_own(host: str, spec: str) -> None:
    forward, backward = (hosts.run(host + way, spec, seed=0).seen for way in ("", ", backward"))
    for site in SITE_NAMES:
        for s, t in itertools.product(range(STEPS), repeat=2):
            assert differ(forward[site][s], backward[site][t]), site


def test_a_step_never_shares_a_mask_with_the_sequence() -> None:
    """The same site and leaf, variational and per-step, under one key."""
    frozen = hosts.run_dropout_scan(
        probes.noise_everywhere(VARIATIONAL), jax.random.key(0), probes.ones()
    )
    fresh = hosts.run_dropout_scan(
        probes.noise_everywhere(PER_STEP), jax.random.key(0), probes.ones()
    )
    for site, other in itertools.product(SITE_NAMES, repeat=2):
        for t in range(STEPS):
            assert differ(frozen.seen[site][0], fresh.seen[other][t]), (site, other)


def test_a_single_step_under_the_sequence_key_is_independent_of_its_masks() -> None:
    """`draw_masks` and `dropout_cell` may be given one key: their sites are different draws."""
    noises: Any = {
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
    run = hosts.run_dropout_scan(
        probes.noise_everywhere(noise),
        jax.random.key(0),
        probes.ones(steps=3, batch=2, units=units),
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

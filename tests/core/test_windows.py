"""A cut sequence equals the uncut one; padding; and the state that the next window starts from."""

import itertools
from typing import Any

import hosts
import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from asserts import assert_same
from host_runs import Window
from hosts import GOES_ON, HOSTS, ONE_EACH, SPECS, is_frozen
from probes import BATCH, SITE_NAMES, STEPS
from quick_prng import quick_key

import flax_dropout_cell as fdc

LENGTHS = (3, 1, STEPS, 2)
SOME_OF_EACH = [
    (host, spec)
    for host, spec in itertools.product(GOES_ON, SPECS)
    if host in ONE_EACH or spec == "ends frozen"
]


@pytest.mark.parametrize(("host", "spec"), SOME_OF_EACH)
def test_a_sequence_that_is_cut_is_the_uncut_one(host: str, spec: str) -> None:
    """Bit for bit, with the other parts of the carry: masks, key and index."""

    @jax.jit
    def pieces(rng: jax.Array, xs: jax.Array) -> Any:
        first = HOSTS[host](SPECS[spec], rng, xs[:2])
        then = Window(first.carry, start=2)
        return first.seen, HOSTS[host](SPECS[spec], rng, xs[2:], None, then)

    whole = hosts.run(host, spec, seed=0)
    first, second = pieces(quick_key(0), probes.ones())
    for site in SITE_NAMES:
        assert_same(np.concatenate([first[site], second.seen[site]]), whole.seen[site])
    assert_same(second.carry, whole.carry)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("host", ONE_EACH)
def test_padded_rows_keep_the_state_of_their_last_step(host: str, spec: str) -> None:
    @jax.jit
    def padded(rng: jax.Array, xs: jax.Array) -> Any:
        return HOSTS[host](SPECS[spec], rng, xs, None, Window(seq_lengths=jnp.array(LENGTHS)))

    whole = hosts.run(host, spec, seed=0)
    run = padded(quick_key(0), probes.ones())
    cell_carry = getattr(run.carry, "cell_carry", run.carry)
    for row, length in enumerate(LENGTHS):
        for site in ("params", "input", "output"):
            assert_same(run.seen[site][:length, row], whole.seen[site][:length, row])
        for name in "ab":
            assert_same(cell_carry[name][row], whole.seen[f"state.{name}"][length - 1, row])


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("host", ["nn.RNN", "nnx.RNN"])
def test_padded_windows_one_after_the_other(host: str, spec: str) -> None:
    """Frozen masks go on, and per-step masks are new, whatever the rows' lengths were.

    A wrapper's carry has a key and an index for each row then, and the furthest sets the pace.
    """
    windows = [(2, 4, 1, 3), (5, 1, 2, 2), (STEPS,) * BATCH]

    @jax.jit
    def run(rng: jax.Array, xs: jax.Array) -> Any:
        carry, seen, steps = None, [], []
        for lengths in windows:
            window = Window(carry, seq_lengths=jnp.array(lengths))
            done = HOSTS[host](SPECS[spec], rng, xs, None, window)
            carry = done.carry
            seen.append(done.seen)
            steps.append(carry.rng.step)
        return seen, steps

    seen, steps = run(quick_key(0), probes.ones())
    for site in ("params", "input", "output"):
        # No row went beyond a window's longest.
        used = [seen[i][site][: max(lengths)] for i, lengths in enumerate(windows)]
        for one, other in itertools.combinations(np.concatenate(used), 2):
            assert (one == other).all() == is_frozen(spec, site), site
    assert [step.tolist() for step in steps] == [
        [2, 4, 1, 3],
        [4 + length for length in windows[1]],
        [9 + STEPS] * BATCH,
    ]


def test_pieces_that_run_backward_and_begin_with_a_reset() -> None:
    """A piece cannot see a reset at the start of the next one, so the caller resets its carry."""
    steps, cut, ids = 6, 3, jnp.array([7, 8])
    xs = jax.random.normal(jax.random.key(0), (steps, 2, 4))
    resets = jnp.zeros((steps, 2), bool).at[cut, 0].set(True)
    noise = fdc.Dropout(keep_prob=0.5, variational=True)
    options: Any = {
        "cell": lambda params, h, x: (jnp.tanh(h + x),) * 2,
        "dropout": fdc.RecurrentDropout(input=noise, output=fdc.Dropout(keep_prob=0.5)),
        "reverse": True,
    }

    def run(h: jax.Array, part: slice) -> Any:
        count = part.stop - part.start
        return fdc.dropout_scan(
            None, h, xs[part], quick_key(1), resets=resets[part], start=part.start,
            sequence_ids=jnp.broadcast_to(ids, (count, 2)), **options,
        )  # fmt: skip

    zeros = jnp.zeros((2, 4))
    _, whole = run(zeros, slice(0, steps))
    h, late = run(zeros, slice(cut, steps))
    _, early = run(jnp.where(resets[cut][:, None], 0, h), slice(0, cut))
    np.testing.assert_allclose(jnp.concatenate([early, late]), whole, rtol=1e-6)


def test_a_new_window_first_reads_the_state_that_the_old_mask_left() -> None:
    """Noise at `state` has multiplied the carry that comes in; inside the cell it does not."""
    noise = fdc.Dropout(keep_prob=0.5, variational=True)
    ones, xs = jnp.ones((BATCH, probes.UNITS)), jnp.ones((2, BATCH, 1))

    def cell(params: Any, h: jax.Array, x: jax.Array, *, disturb: Any = fdc.undisturbed) -> Any:
        return jnp.ones_like(h), disturb("read", h)  # the state as this step reads it

    def windows(spec: fdc.RecurrentDropout) -> list[Any]:
        h, seen = ones, []
        for seed in (0, 1):
            h, ys = fdc.dropout_scan(None, h, xs, jax.random.key(seed), cell=cell, dropout=spec)
            seen.append(ys)
        return seen

    old, new = windows(fdc.RecurrentDropout(state=noise))
    assert_same(new[0], old[1])
    assert (new[1] != old[1]).any()
    old, new = windows(fdc.RecurrentDropout(inside={"read": noise}))
    assert_same(new[0], new[1])
    assert (new[0] != old[1]).any()

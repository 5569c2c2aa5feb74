"""`episode_ids`: no two episodes share an id, and the learner has the actor's masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_dropout_cell as fdc

ROWS, STEPS, UNITS = 6, 40, 64
KEY = jax.random.key(3)
NOISE = fdc.Dropout(keep_prob=0.5, variational=True)
SPEC = fdc.RecurrentDropout(input=NOISE, inside={"recurrent": NOISE})


def show_masks(params, h, x, *, disturb=fdc.undisturbed):
    """A cell whose output is the masks of its input and of its site."""
    return h, (x, disturb("recurrent", jnp.ones_like(h)))


def test_each_episode_has_an_id_of_its_own() -> None:
    """Counted by a loop in Python, for rows of one and of two batch dims."""
    for shape in ((ROWS,), (2, 3)):
        done = np.random.default_rng(0).random((STEPS, *shape)) < 0.3
        ids = jnp.arange(ROWS).reshape(shape)
        episode, seen = np.zeros(shape, int), {}
        for step in range(STEPS):
            for row in np.ndindex(shape):
                key = (row, episode[row])
                assert seen.setdefault(int(ids[row]), key) == key
            assert len(set(np.ravel(ids))) == ROWS
            episode += done[step]
            ids = fdc.episode_ids(ids, done[step])
            assert ids.dtype == jnp.arange(ROWS).dtype
        assert len(seen) > ROWS + 0.2 * ROWS * STEPS


def test_devices_that_see_their_own_rows_count_in_steps_of_all() -> None:
    """Two devices of three rows each; counted in steps of three, they would meet."""
    done = np.random.default_rng(1).random((STEPS, 2, 3)) < 0.5
    for num_rows, distinct in ((ROWS, True), (None, False)):
        ids = jnp.arange(ROWS).reshape(2, 3)
        seen: list[set[int]] = [set(), set()]
        for step in range(STEPS):
            for device in range(2):
                seen[device] |= set(np.ravel(ids[device]).tolist())
            count = jax.vmap(lambda ids, done, n=num_rows: fdc.episode_ids(ids, done, num_rows=n))
            ids = count(ids, done[step])
        assert seen[0].isdisjoint(seen[1]) == distinct


def test_the_learner_of_permuted_rows_has_the_actors_masks() -> None:
    """To the bit, over two rollouts; the actor takes one step a call."""
    h, ids, done = jnp.zeros((ROWS, UNITS)), jnp.arange(ROWS), jnp.ones(ROWS, bool)
    ends = np.random.default_rng(2).random((2, STEPS, ROWS)) < 0.2
    order = np.random.default_rng(3).permutation(ROWS)[: ROWS - 2]
    masks_of: dict[int, bytes] = {}

    @jax.jit
    def run(h, xs, resets, ids):
        return fdc.dropout_scan(
            None, h, xs, KEY, cell=show_masks, dropout=SPEC, resets=resets, sequence_ids=ids
        )

    for rollout in ends:
        first_h, taken = h, []
        for end in rollout:
            h, masks = run(h, jnp.ones((1, ROWS, 3)), done[None], ids[None])
            taken.append((done, ids, jax.tree.map(lambda leaf: leaf[0], masks)))
            done, ids = jnp.asarray(end), fdc.episode_ids(ids, end)
        resets, all_ids, acted = jax.tree.map(lambda *leaves: np.stack(leaves), *taken)
        some = jax.tree.map(lambda leaf: leaf[:, order], (resets, all_ids, acted))
        _, learned = run(first_h[order], jnp.ones((STEPS, ROWS - 2, 3)), *some[:2])
        jax.tree.map(np.testing.assert_array_equal, learned, some[2])
        for step, row in np.ndindex(STEPS, ROWS):
            mask = acted[1][step, row].tobytes()
            assert masks_of.setdefault(int(all_ids[step, row]), mask) == mask
    assert len(set(masks_of.values())) == len(masks_of) > 2 * ROWS


def test_ids_wrap_around_without_meeting() -> None:
    """Past the largest int32 come the negative ones, which are other ids."""
    ids = jnp.array([2**31 - 2, 2**31 - 1], jnp.int32)
    later = fdc.episode_ids(ids, jnp.array([True, True]))
    np.testing.assert_array_equal(later, np.array([-(2**31), -(2**31) + 1], np.int32))


def test_ids_that_jax_would_cut_are_refused() -> None:
    """Of 1 and 2**32 + 1 it keeps the same 32 bits."""
    done = np.zeros(2, bool)
    for ids in (np.array([1, 2**32 + 1]), np.array([1, 2**63], np.uint64)):
        with pytest.raises(ValueError, match=r"more than the 32 bits.*jax_enable_x64"):
            fdc.episode_ids(ids, done)
    np.testing.assert_array_equal(fdc.episode_ids(np.array([1, -2]), ~done), [3, 0])


def test_errors() -> None:
    ids, done = jnp.arange(3), jnp.zeros(3, bool)
    with pytest.raises(TypeError, match=r"done must be bools, got float32: write done\.astype"):
        fdc.episode_ids(ids, done.astype(jnp.float32))
    with pytest.raises(TypeError, match="ids must be ints of at least 32 bits, got int8"):
        fdc.episode_ids(ids.astype(jnp.int8), done)
    with pytest.raises(TypeError, match="ids must be ints of at least 32 bits, got float32"):
        fdc.episode_ids(ids.astype(jnp.float32), done)
    with pytest.raises(ValueError, match=r"of one step, got shapes \(3,\), \(7, 3\)"):
        fdc.episode_ids(ids, jnp.zeros((7, 3), bool))

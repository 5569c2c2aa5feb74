"""Several sequences in one scan: resets, ids, and masks that an actor and a learner share."""

import dataclasses
import functools
from typing import Any

import exact_lstm
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asserts import assert_close, assert_same
from jaxprs import equations
from reset_case import (
    NOISES,
    PARAMS,
    RESETS,
    XS,
    B,
    D,
    H,
    T,
    cell,
    first_carry,
    noise_everywhere,
    scan,
)

import flax_dropout_cell as fdc

noises = pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
impls = pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])


def cut(tree, where) -> Any:
    return jax.tree.map(lambda leaf: leaf[where], tree)


@noises
def test_no_reset_is_no_change(noise) -> None:
    assert_same(scan(noise, resets=jnp.zeros((T, B), bool)), scan(noise))


@noises
def test_a_reset_starts_the_row_anew_and_no_other(noise) -> None:
    carry, ys = scan(noise, resets=RESETS)
    _, whole = scan(noise)
    assert_same(jax.tree.map(lambda y: y[:, 1], ys), jax.tree.map(lambda y: y[:, 1], whole))
    np.testing.assert_array_equal(ys["state"][4, 0], 0)  # reset_carry is zeros
    np.testing.assert_array_equal(ys["state"][0, 3], 0)
    for name in ("inside", "out"):
        masks = ys[name] != 0
        np.testing.assert_array_equal(masks[:4, 0], whole[name][:4, 0] != 0)
        if noise.variational:
            np.testing.assert_array_equal(masks[4:7, 0], np.broadcast_to(masks[4, 0], (3, H)))
            spans = [masks[0, 0], masks[4, 0], masks[7, 0]]
            assert all((a != b).mean() > 0.2 for a in spans for b in spans if a is not b)
            assert (masks[7, 0] != masks[7, 2]).mean() > 0.2  # places differ
        else:
            np.testing.assert_array_equal(masks, whole[name] != 0)
    filled = {"h": jnp.full((B, H), 2.0), "seen": jnp.full((B, H), 3.0)}
    _, ys = scan(noise, resets=RESETS, reset_carry=filled)
    np.testing.assert_array_equal(ys["state"][4, 0], 3)
    assert carry["h"].shape == (B, H)


@noises
def test_a_reset_is_named_by_its_absolute_step(noise) -> None:
    """So, without ids, a window that begins before a reset has the whole's masks from there on."""
    _, whole = scan(noise, resets=RESETS)
    rows = np.array([1, 2])  # both reset at step 7
    options: Any = {"cell": cell, "dropout": noise_everywhere(noise)}
    running = fdc.draw_masks(PARAMS, first_carry(), XS[0], jax.random.key(9), **options)
    for start in (5, 4):
        _, window = scan(noise, XS[5:], masks=running, resets=RESETS[5:], start=start)
        masks, wanted = window["inside"][2:, rows], whole["inside"][7:, rows]
        assert np.array_equal(masks, wanted) == (start == 5)


CUT = 6  # goes through the sequence that row 0 begins at step 4


def second_piece(noise, ids=None, start: Any = CUT, **options) -> Any:
    """A sequence that is cut in two: the second piece runs on the carry of the first."""
    first, second = (
        {} if ids is None else {"sequence_ids": ids[at]} for at in (slice(CUT), slice(CUT, None))
    )
    carry, _ = scan(noise, XS[:CUT], resets=RESETS[:CUT], **first)
    options |= second
    return scan(noise, XS[CUT:], carry=carry, resets=RESETS[CUT:], start=start, **options)[1]


@noises
def test_a_cut_with_ids_is_the_uncut_scan(noise) -> None:
    ids = np.asarray(RESETS).astype(int).cumsum(0) * B + np.arange(B)
    _, whole = scan(noise, resets=RESETS, sequence_ids=ids)
    for start in (CUT, jnp.uint32(CUT)):
        assert_close(second_piece(noise, ids, start), cut(whole, slice(CUT, None)))


def test_a_cut_without_ids_is_refused_where_masks_are_of_sequences() -> None:
    """The second piece cannot know that row 0 is in a sequence with masks of its own."""
    for start in (CUT, jnp.int32(CUT)):
        with pytest.raises(ValueError, match="With resets and start, give sequence_ids"):
            second_piece(NOISES["variational"], start=start)
    _, whole = scan(NOISES["step"], resets=RESETS)  # these are of steps and places
    assert_close(second_piece(NOISES["step"]), cut(whole, slice(CUT, None)))
    shared = fdc.Dropout(keep_prob=0.7, variational=True, broadcast_dims=(0,))
    spec = fdc.RecurrentDropout(inside={"a": shared})
    _, whole = scan(spec, resets=RESETS)
    assert_close(second_piece(spec), cut(whole, slice(CUT, None)))


def test_masks_that_are_brought_for_some_sites_leave_the_others_refused() -> None:
    noise = NOISES["variational"]
    options: Any = {"cell": cell, "dropout": noise_everywhere(noise)}
    masks = fdc.draw_masks(PARAMS, first_carry(), XS[0], jax.random.key(9), **options)
    second_piece(noise, masks=masks)
    with pytest.raises(ValueError, match="give sequence_ids"):
        second_piece(noise, masks=masks._replace(state=None))


def test_ids_of_64_bits_count_in_full() -> None:
    """From NumPy, without x64: the words of an id are its halves, as NumPy has them."""
    noise = NOISES["variational"]
    wide = np.array([1, 2**32 + 1, 7 * 2**32 + 1, -1])
    assert wide.dtype == np.int64

    def seen(ids):
        return np.asarray(scan(noise, sequence_ids=ids)[1]["inside"][0])

    masks = seen(wide)
    pairs = [(a, b) for a in range(B) for b in range(a)]
    assert all((masks[a] != masks[b]).mean() > 0.2 for a, b in pairs)
    assert_same(masks, seen(wide.tolist()))
    small = np.array([1, 5, 3, -1])
    assert_same(seen(small), seen(small.astype(np.int32)))
    assert_same(seen(small)[[0, 3]], masks[[0, 3]])
    assert_same(
        seen(wide.astype(np.uint64)),
        np.stack([*masks[:3], seen(np.uint64(2**64 - 1) * np.ones(B, np.uint64))[0]]),
    )
    resets = np.zeros((T, B), bool)
    steps = np.broadcast_to(wide, (T, B))
    assert_same(scan(noise, resets=resets, sequence_ids=steps), scan(noise, sequence_ids=wide))
    moved = np.where(np.arange(T)[:, None] < 6, 1, 2**32 + 1) * np.ones((1, B), int)
    got = scan(noise, resets=resets, sequence_ids=moved)[1]["inside"]
    assert_same(got[[0, 6], 0], masks[:2])


@noises
@pytest.mark.parametrize("by_id", [False, True])
def test_backward_has_the_same_masks(noise, by_id) -> None:
    ids = {"sequence_ids": RESETS.astype(int).cumsum(0) * B + jnp.arange(B)[None]} if by_id else {}
    _, forward = scan(noise, resets=RESETS, **ids)
    _, backward = scan(noise, resets=RESETS, reverse=True, **ids)
    for name in ("inside", "out"):
        np.testing.assert_array_equal(forward[name], backward[name])
    # Row 0: the sequence of steps 4 to 6 starts at its own last step.
    np.testing.assert_array_equal(backward["state"][6, 0], 0)
    np.testing.assert_array_equal(backward["state"][3, 0], 0)
    assert (backward["state"][T - 1, 0] == 1).all()


@noises
@impls
def test_packed_documents_get_what_they_get_alone(noise, impl) -> None:
    """Two documents in a row, padding behind them: each as if it ran by itself with its id."""
    rng, spec = jax.random.key(4, impl=impl), noise_everywhere(noise)
    lengths, ids = (5, 7), (30, 11)
    documents = [XS[:n, :1] + n for n in lengths]
    zeros = jax.tree.map(jnp.zeros_like, first_carry(1))
    if not noise.variational:  # by step as well: a document alone starts at step 0
        documents, lengths, ids = documents[:1], lengths[:1], ids[:1]
    packed = jnp.concatenate(documents)
    starts = np.cumsum([0, *lengths[:-1]])
    resets = jnp.zeros((len(packed), 1), bool).at[starts].set(True)
    names = jnp.repeat(jnp.array(ids), jnp.array(lengths))[:, None]
    _, ys = scan(spec, packed, rng, zeros, resets=resets, sequence_ids=names)
    for document, start, name in zip(documents, starts, ids, strict=True):
        _, alone = scan(spec, document, rng, zeros, sequence_ids=jnp.array([name]))
        assert_close(cut(ys, slice(start, start + len(document))), alone, rtol=2e-5)


@impls
def test_an_actor_and_a_learner_see_the_same_masks(impl) -> None:
    """Two rollouts, step by step, with episodes that end inside them and run on between them.

    The learner sees them whole, rows permuted, and gets the same bits.
    """
    rng, draw = jax.random.key(21, impl=impl), np.random.default_rng(0)
    once, fresh = (dataclasses.replace(noise, scale=False) for noise in NOISES.values())
    output = {"h": None, "inside": None, "state": None, "out": fresh}
    state = {"h": fresh, "seen": once}
    spec = dataclasses.replace(noise_everywhere(once), output=output, state=state)
    params = {name: exact_lstm.integers(draw, *leaf.shape) for name, leaf in PARAMS.items()}
    done = jax.random.bernoulli(jax.random.key(3), 0.2, (2 * T, B))
    done = done.at[T].set(False)  # episodes run on between the rollouts
    ids = jnp.arange(B)[None] + B * done.astype(int).cumsum(0)
    observations = exact_lstm.integers(draw, 2 * T, B, D)
    exact_cell = functools.partial(cell, activation=exact_lstm.activation)
    options: Any = {"cell": exact_cell, "dropout": spec}
    zeros = jax.tree.map(jnp.zeros_like, first_carry())

    @jax.jit
    def act(params, carry, x, done, ids, step):
        carry = jax.tree.map(lambda leaf: jnp.where(done[:, None], 0, leaf), carry)
        masks = fdc.draw_masks(params, carry, x, rng, sequence_ids=ids, **options)
        return fdc.dropout_cell(
            params, carry, x, rng, step=step, masks=masks, sequence_ids=ids, **options
        )

    @jax.jit
    def learn(params, carry, xs, resets, ids, start):
        given = {"resets": resets, "sequence_ids": ids, "start": start}
        return fdc.dropout_scan(params, carry, xs, rng, **given, **options)[1]

    carry, ys, carries = zeros, [], []
    for t in range(2 * T):
        if t % T == 0:
            carries.append(carry)
        carry, y = act(params, carry, observations[t], done[t], ids[t], t)
        ys.append(y)
    acted = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)

    order = jnp.array([2, 0, 3, 1])
    for rollout in range(2):
        steps = slice(rollout * T, (rollout + 1) * T)
        learned = learn(
            params,
            jax.tree.map(lambda leaf: leaf[order], carries[rollout]),
            observations[steps, order],
            done[steps, order],
            ids[steps, order],
            rollout * T,
        )
        assert_same(learned, cut(cut(acted, steps), (slice(None), order)))
        assert len(np.unique(learned["h"])) > 3


def test_an_id_that_changes_without_a_reset_changes_masks_alone() -> None:
    ids = jnp.zeros((T, B), int).at[6:].set(1)
    _, ys = scan(NOISES["variational"], resets=jnp.zeros((T, B), bool), sequence_ids=ids)
    np.testing.assert_array_equal(ys["inside"][5], ys["inside"][0])
    assert (ys["inside"][6] != ys["inside"][5]).mean() > 0.2
    assert (ys["state"][6] != 0).any()


def test_masks_that_rows_share_belong_to_the_whole_call() -> None:
    shared = fdc.Dropout(keep_prob=0.7, variational=True, broadcast_dims=(0,))
    spec = fdc.RecurrentDropout(inside={"a": shared})
    _, ys = scan(spec, resets=RESETS)
    np.testing.assert_array_equal(ys["inside"], np.broadcast_to(ys["inside"][0, 0], (T, B, H)))
    assert_same(
        ys,
        scan(spec, resets=RESETS, sequence_ids=jnp.zeros((T, B), int))[1] | {"state": ys["state"]},
    )


@pytest.mark.parametrize("site", ["inside", "params"])
def test_shared_masks_that_are_brought_need_no_key(site) -> None:
    """A reset draws none of them anew."""
    shared = fdc.Dropout(keep_prob=0.7, variational=True, broadcast_dims=(0,))
    spec = fdc.RecurrentDropout(**{site: {"inside": {"a": shared}, "params": shared}[site]})
    options: Any = {"cell": cell, "dropout": spec, "resets": RESETS}
    masks = fdc.draw_masks(PARAMS, first_carry(), XS[0], jax.random.key(9), cell=cell, dropout=spec)
    got = fdc.dropout_scan(PARAMS, first_carry(), XS, None, masks=masks, **options)
    assert_same(got, scan(spec, rng=jax.random.key(9), resets=RESETS))
    per_row = dataclasses.replace(spec, output=NOISES["variational"])
    with pytest.raises(ValueError, match="so it needs rng"):
        fdc.dropout_scan(
            PARAMS, first_carry(), XS, None, masks=masks, **options | {"dropout": per_row}
        )


@noises
def test_evaluation_resets_the_carry(noise) -> None:
    _, ys = fdc.dropout_scan(
        PARAMS, first_carry(), XS, None, cell=cell, dropout=noise_everywhere(noise), resets=RESETS
    )
    np.testing.assert_array_equal(ys["state"][4, 0], 0)
    np.testing.assert_array_equal(ys["inside"], 1)


@noises
def test_with_lengths(noise) -> None:
    lengths = jnp.array([6, T, 9, 3])
    carry, ys = scan(noise, resets=RESETS, seq_lengths=lengths)
    _, whole = scan(noise, resets=RESETS)
    for row, length in enumerate(map(int, lengths)):
        valid, padding = (slice(length), row), (slice(length, None), row)
        assert_close(cut(ys, valid), cut(whole, valid), rtol=2e-5)
        assert not any(leaf.any() for leaf in jax.tree.leaves(cut(ys, padding)))
        last, _ = scan(noise, XS[:length], resets=RESETS[:length])
        assert_close(cut(carry, row), cut(last, row), rtol=2e-5)


def test_without_resets_the_program_knows_nothing_of_them() -> None:
    """The loop carries no ids of rows; the next test checks where masks are drawn."""

    def program(**options):
        spec = noise_everywhere(NOISES["variational"])
        return (
            jax.jit(lambda rng: scan(spec, XS, rng, **options)).lower(jax.random.key(0)).as_text()
        )

    plain, resetting = program(), program(resets=RESETS)
    for mark in (f"tensor<{B}xui32>", f"tensor<{T}x{B}xi1>"):
        assert mark in resetting
        assert mark not in plain


def test_new_masks_are_drawn_where_a_row_resets_and_nowhere_else() -> None:
    def program(**options):
        spec = noise_everywhere(NOISES["variational"])
        traced = jax.make_jaxpr(lambda rng: scan(spec, XS, rng, **options))(jax.random.key(0))
        found = [(equation.primitive.name, around) for equation, around in equations(traced)]
        return [(name, around) for name, around in found if "scan" in around]

    draws = [around for name, around in program(resets=RESETS) if name == "shift_left"]
    assert draws
    assert all("cond" in around[around.index("scan") :] for around in draws)
    assert not {"cond", "shift_left"} & {name for name, _ in program()}


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"resets": jnp.zeros((T, B))}, TypeError, "resets must be bools"),
        ({"resets": RESETS.T}, ValueError, r"resets must be \[time, \*batch\] with 12 steps"),
        ({"resets": RESETS[:, :2]}, ValueError, r"batch dims of resets, \(2,\)"),
        (
            {"resets": RESETS, "sequence_ids": jnp.zeros(B, int)},
            ValueError,
            r"must have the shape \(12, ",
        ),
        ({"resets": RESETS, "sequence_ids": jnp.zeros((T, B))}, TypeError, "must be ints"),
        (
            {"sequence_ids": jnp.zeros((T, B), int)},
            ValueError,
            r"sequence_ids must be .\*batch., an id for each row, got shape",
        ),
        ({"reset_carry": first_carry()}, ValueError, "reset_carry needs resets"),
        ({"resets": RESETS, "reset_carry": 0.0}, ValueError, "reset_carry has the structure"),
        (
            {"resets": RESETS, "reset_carry": {"h": jnp.zeros(5), "seen": 0.0}},
            ValueError,
            r"reset_carry\['h'\] has shape \(5,\)",
        ),
    ],
)
def test_mistakes(options, error, text) -> None:
    with pytest.raises(error, match=text):
        scan(NOISES["variational"], **options)


@pytest.mark.parametrize("by_id", [False, True], ids=["by place", "by id"])
def test_a_shared_mask_inside_beside_one_of_each_row(by_id) -> None:
    """A reset draws the rows' own masks again; the mask that all rows share stays."""
    noise = fdc.Dropout(keep_prob=0.5, variational=True, scale=False)
    shared = dataclasses.replace(noise, broadcast_dims=(0,))
    spec = fdc.RecurrentDropout(inside={"shared": shared, "own": noise})

    def emit(params, carry, x, disturb=fdc.undisturbed):
        return carry, (disturb("shared", x), disturb("own", x))

    xs, resets = jnp.ones((6, 3, 64)), jnp.zeros((6, 3), bool).at[2, 1].set(True)
    ids = jnp.cumsum(resets, 0) * 3 + jnp.arange(3)[None] if by_id else None
    options: Any = {"cell": emit, "dropout": spec, "resets": resets, "sequence_ids": ids}
    _, (same, own) = fdc.dropout_scan(None, xs[0], xs, jax.random.key(0), **options)
    np.testing.assert_array_equal(same, np.broadcast_to(same[0, 0], same.shape))
    for row, first in ((0, 0), (1, 0), (1, 2), (2, 0)):
        span = slice(first, 2) if (row, first) == (1, 0) else slice(first, None)
        np.testing.assert_array_equal(
            own[span, row], np.broadcast_to(own[first, row], own[span, row].shape)
        )
    assert 0.2 < (own[1, 1] != own[2, 1]).mean() < 0.8
    assert 0.2 < (same == 1).mean() < 0.8

"""Loops, cuts, padding and direction: the same numbers whichever way a sequence is run."""

import dataclasses
import itertools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asserts import assert_close, assert_same
from quick_prng import quick_key
from specs import noise_everywhere

import flax_dropout_cell as fdc

T, B, F, H = 7, 4, 3, 6
RNG = quick_key(11)
THREEFRY = jax.random.key(11)
XS = jax.random.normal(jax.random.key(1), (T, B, F))
LENGTHS = jnp.array([3, 7, 1, 5])


def dropout_everywhere(variational: bool) -> fdc.RecurrentDropout:
    noise, output, params = (
        fdc.Dropout(keep_prob=keep, variational=variational) for keep in (0.7, 0.5, 0.9)
    )
    return noise_everywhere(noise, output=output, params=params)


def with_keep_prob(spec: fdc.RecurrentDropout, keep_prob: float) -> fdc.RecurrentDropout:
    return jax.tree.map(
        lambda noise: dataclasses.replace(noise, keep_prob=keep_prob),
        spec,
        is_leaf=lambda node: isinstance(node, fdc.Noise),
    )


MIXED = fdc.RecurrentDropout(
    input=fdc.Dropout(keep_prob=0.7, variational=True),
    state=(None, fdc.Dropout(keep_prob=0.7)),
    output=fdc.Dropout(keep_prob=0.5, variational=True),
    params=fdc.Dropout(keep_prob=0.9),
)
SPECS = {"variational": dropout_everywhere(True), "step": dropout_everywhere(False), "mixed": MIXED}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


class Lstm:
    """A small LSTM as a plain cell, with its weights and initial carry."""

    params: ClassVar = {
        "kernel": jax.random.normal(jax.random.key(0), (F + H, 4 * H)),
        "bias": jnp.zeros((1, 4 * H)),
    }
    carry = (jax.random.normal(jax.random.key(2), (B, H)), jnp.ones((B, H)))

    @staticmethod
    def cell(params, carry, x):
        c, h = carry
        bias = params["bias"].reshape((1,) * (x.ndim - 1) + (-1,))
        gates = jnp.concatenate([x, h], axis=-1) @ params["kernel"] + bias
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h


def scan(spec: Any, xs: Any = XS, carry: Any = Lstm.carry, rng: Any = RNG, **options: Any) -> Any:
    return fdc.dropout_scan(Lstm.params, carry, xs, rng, cell=Lstm.cell, dropout=spec, **options)


def draw(spec, **options):
    return fdc.draw_masks(
        Lstm.params, Lstm.carry, XS[0], RNG, cell=Lstm.cell, dropout=spec, **options
    )


def loop(spec: Any, order: Any, rng: Any = RNG, masks: Any = None) -> Any:
    step = jax.jit(
        lambda carry, x, rng, masks: fdc.dropout_cell(
            Lstm.params, carry, x, rng, cell=Lstm.cell, dropout=spec, masks=masks
        )
    )
    carry, ys = Lstm.carry, {}
    for t in order:
        step_rng = None if rng is None else jax.random.fold_in(rng, t)
        carry, ys[t] = step(carry, XS[t], step_rng, masks)
    return carry, jnp.stack([ys[t] for t in range(T)])


def rough_cell(params, carry, x):
    """Sums and products of small integers: exact in any order and however it is compiled."""
    c, h = carry
    return (c + x.sum(-1, keepdims=True), jnp.mod(h + c * params, 64.0)), h + 2 * c


@specs
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_is_a_python_loop(spec, reverse) -> None:
    """Bit for bit where the cell's own arithmetic is exact, with keep_prob a power of two."""
    half = with_keep_prob(spec, 0.5)
    xs = jax.random.randint(jax.random.key(0), (T, B, F), 0, 4).astype(jnp.float32)
    carry, params = (jnp.ones((B, 1)), jnp.zeros((B, F))), jnp.arange(1.0, F + 1)[None]
    args, options = (params, carry, xs), {"cell": rough_cell, "dropout": half}
    scanned = fdc.dropout_scan(*args, THREEFRY, **options, reverse=reverse)
    masks = fdc.draw_masks(params, carry, xs[0], THREEFRY, **options)
    ys = {}
    for t in reversed(range(T)) if reverse else range(T):
        carry, ys[t] = fdc.dropout_cell(
            params, carry, xs[t], jax.random.fold_in(THREEFRY, t), **options, masks=masks
        )
    assert_same(scanned, (carry, jnp.stack([ys[t] for t in range(T)])))


@specs
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_is_a_python_loop_for_an_lstm(spec, reverse) -> None:
    """The loop's steps are compiled by themselves, so the LSTM's own sums may round otherwise."""
    order = reversed(range(T)) if reverse else range(T)
    carry, ys = loop(spec, order, masks=draw(spec))
    scanned_carry, scanned_ys = scan(spec, reverse=reverse)
    np.testing.assert_array_equal(scanned_ys == 0, ys == 0)
    assert_close((scanned_carry, scanned_ys), (carry, ys))


@specs
def test_keys_of_split_are_keys_of_steps(spec) -> None:
    """A loop over `jax.random.split(rng, T)` has the scan's masks (threefry, partitionable)."""
    options: Any = {"cell": rough_cell, "dropout": with_keep_prob(spec, 0.5)}
    xs = jnp.ones((T, B, F))
    carry, params = (jnp.ones((B, 1)), jnp.zeros((B, F))), jnp.arange(1.0, F + 1)[None]
    scanned = fdc.dropout_scan(params, carry, xs, THREEFRY, **options)
    masks, ys = fdc.draw_masks(params, carry, xs[0], THREEFRY, **options), []
    for key, x in zip(jax.random.split(THREEFRY, T), xs, strict=True):
        carry, y = fdc.dropout_cell(params, carry, x, key, **options, masks=masks)
        ys.append(y)
    assert_same(scanned, (carry, jnp.stack(ys)))


@specs
@pytest.mark.parametrize("cuts", [(3,), (1, 2, 6)])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_cut_sequence_is_the_uncut_one(spec, cuts, reverse) -> None:
    whole_carry, whole_ys = scan(spec, reverse=reverse)
    bounds = [0, *cuts, T]
    pieces = list(itertools.pairwise(bounds))
    carry, ys = Lstm.carry, {}
    for first, last in reversed(pieces) if reverse else pieces:
        carry, ys[first] = scan(
            spec, XS[first:last], carry, masks=draw(spec), start=first, reverse=reverse
        )
    assert_same(carry, whole_carry)
    assert_same(jnp.concatenate([ys[first] for first in bounds[:-1]]), whole_ys)


@specs
def test_a_cut_may_be_traced(spec) -> None:
    pieces = jax.jit(lambda start: scan(spec, XS[3:], masks=draw(spec), start=start))
    assert_same(pieces(jnp.int32(3)), jax.jit(lambda: scan(spec, XS[3:], start=3))())


@specs
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("rng", [RNG, None], ids=["train", "evaluate"])
def test_padding(spec, reverse, rng) -> None:
    """Each row's outputs are those of a batch that is cut at that row's length, and zeros after."""
    half = with_keep_prob(spec, 0.5)
    xs = jax.random.randint(jax.random.key(0), (T, B, F), 0, 4).astype(jnp.float32)
    first, params = (jnp.ones((B, 1)), jnp.zeros((B, F))), jnp.arange(1.0, F + 1)[None]

    def run(xs, **options):
        return fdc.dropout_scan(
            params, first, xs, rng, cell=rough_cell, dropout=half, reverse=reverse, **options
        )

    carry, ys = run(xs, seq_lengths=LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        cut_carry, cut_ys = run(xs[:length])
        jax.tree.map(
            lambda a, b, row=row: np.testing.assert_array_equal(a[row], b[row]), carry, cut_carry
        )
        np.testing.assert_array_equal(ys[:length, row], cut_ys[:, row])
        np.testing.assert_array_equal(ys[length:, row], np.zeros((T - length, F)))


@pytest.mark.parametrize("reverse", [False, True])
def test_what_padding_holds_has_no_effect(reverse) -> None:
    """NaN in padding comes neither forward nor back through the gradient."""
    padding = jnp.arange(T)[:, None] >= LENGTHS[None]
    poisoned = jnp.where(padding[..., None], jnp.nan, XS)

    def loss(params, xs):
        carry, ys = fdc.dropout_scan(
            params,
            Lstm.carry,
            xs,
            RNG,
            cell=Lstm.cell,
            dropout=MIXED,
            seq_lengths=LENGTHS,
            reverse=reverse,
        )
        return sum(leaf.sum() for leaf in jax.tree.leaves((carry, ys)))

    clean, dirty = (jax.value_and_grad(loss, (0, 1))(Lstm.params, xs) for xs in (XS, poisoned))
    assert_same(clean, dirty)
    assert (np.asarray(dirty[1][1])[np.asarray(padding)] == 0).all()


def test_padding_of_a_full_length_is_no_padding() -> None:
    assert_close(scan(MIXED, seq_lengths=jnp.full(B, T)), scan(MIXED))


def test_length_zero_leaves_the_first_carry() -> None:
    carry, ys = scan(MIXED, seq_lengths=jnp.array([0, T, T, T]))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), carry, Lstm.carry)
    assert (ys[:, 0] == 0).all()


def test_unroll_changes_nothing() -> None:
    assert_close(scan(MIXED, unroll=3), scan(MIXED))
    assert "unroll=3" in str(jax.make_jaxpr(lambda: scan(MIXED, unroll=3))())


def test_frozen_masks_need_no_key() -> None:
    """Masks that are brought for every leaf are applied, and nothing is drawn."""
    frozen = with_keep_prob(dropout_everywhere(True), 0.7)
    masks = draw(frozen)
    per_step = with_keep_prob(dropout_everywhere(False), 0.7)
    for rng in (None, quick_key(99)):
        assert_same(scan(per_step, rng=rng, masks=masks), scan(frozen, rng=None, masks=masks))


def test_masks_that_are_brought_win_over_drawn_ones() -> None:
    spec = dropout_everywhere(True)
    mine = fdc.Masks(state=(None, jnp.zeros((B, H), bool)))
    carry, _ = scan(spec, masks=mine)
    assert (carry[1] == 0).all()
    drawn = draw(spec)
    assert_same(
        scan(spec, masks=mine), scan(spec, rng=None, masks=drawn._replace(state=mine.state))
    )


def test_weight_noise_without_its_mask_is_refused() -> None:
    """Else it would be off in silence: no key to draw from, and no mask among those that came."""
    weights = fdc.Dropout(keep_prob=0.9, variational=True)
    spec = fdc.RecurrentDropout(
        input=fdc.Dropout(keep_prob=0.7, variational=True), params={"kernel": weights, "bias": None}
    )
    drawn = draw(spec)
    partial = [fdc.Masks(), fdc.Masks(input=drawn.input), drawn._replace(params=None)]
    for masks in partial:
        with pytest.raises(ValueError, match="is variational and has no mask: call draw_masks"):
            scan(spec, rng=None, masks=masks)
    assert_same(scan(spec, rng=None, masks=drawn), scan(spec))


def test_no_batch_dim_and_several() -> None:
    for batch in ((), (2, 3)):
        xs, h = jnp.ones((T, *batch, F)), jnp.ones((*batch, H))
        _, ys = scan(MIXED, xs, (h, h))
        assert ys.shape == (T, *batch, H)
        lengths = jnp.full(batch, 2)
        padded, zs = scan(MIXED, xs, (h, h), seq_lengths=lengths)
        assert (zs[2:] == 0).all()
        assert_close(zs[:2], ys[:2])
        cut, _ = scan(MIXED, xs[:2], (h, h))
        assert_close(padded, cut)


def test_convolutional_and_nested() -> None:
    conv = nn.ConvLSTMCell(4, kernel_size=(3, 3))
    xs = jax.random.normal(jax.random.key(0), (T, B, 8, 8, 16))
    carry = conv.initialize_carry(jax.random.key(0), xs.shape[1:])
    params = conv.init(jax.random.key(0), carry, xs[0])
    spec = fdc.RecurrentDropout(
        input={
            "image": fdc.Dropout(keep_prob=0.5, variational=True, broadcast_dims=(-3, -2)),
            "time": None,
        },
        state=(None, fdc.Dropout(keep_prob=0.5, variational=True)),
        output=(
            fdc.Dropout(keep_prob=0.5),
            {"copy": fdc.Dropout(keep_prob=0.5), "time": None, "image": None},
        ),
    )

    def cell(params, carry, x):
        carry, y = conv.apply(params, carry, x["image"])
        return carry, (y, {"copy": y, "time": x["time"], "image": x["image"]})

    inputs = {"image": xs, "time": jnp.arange(T)}
    (_, h), (y, rest) = fdc.dropout_scan(params, carry, inputs, RNG, cell=cell, dropout=spec)
    assert h.shape == (B, 8, 8, 4)
    np.testing.assert_array_equal(rest["time"], np.arange(T))
    whole_maps = np.asarray(rest["image"] == 0)
    np.testing.assert_array_equal(whole_maps.all((2, 3)), whole_maps.any((2, 3)))
    assert ((np.asarray(y) == 0) != (np.asarray(rest["copy"]) == 0)).any()
    masks = fdc.draw_masks(
        params, carry, jax.tree.map(lambda leaf: leaf[0], inputs), RNG, cell=cell, dropout=spec
    )
    np.testing.assert_array_equal(np.asarray(h) == 0, ~masks.state[1])

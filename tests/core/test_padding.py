"""Padding, of any pattern, compared with rows that NumPy runs one by one, without their padding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asserts import assert_close
from quick_prng import quick_key

import flax_dropout_cell as fdc

T, B, F, H = 6, 4, 3, 5
RNG = quick_key(11)
PARAMS = {
    "in": jax.random.normal(jax.random.key(0), (F, H)),
    "rec": jax.random.normal(jax.random.key(1), (H, H)) / 2,
}
XS = jax.random.normal(jax.random.key(2), (T, B, F))
H0 = jax.random.normal(jax.random.key(3), (B, H))
ONCE = fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=0.5, variational=True))
LENGTHS = np.array([3, T, 0, 1])
PREFIX = np.arange(T)[:, None] < LENGTHS
PATTERNS = {
    "behind": PREFIX,
    "in front": PREFIX[::-1],
    "holes": np.array(
        [[1, 0, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 1, 0], [1, 0, 1, 1], [0, 0, 0, 1]], bool
    ),
    "none": np.ones((T, B), bool),
}
patterns = pytest.mark.parametrize("valid", PATTERNS.values(), ids=PATTERNS)
backward = pytest.mark.parametrize("reverse", [False, True])


def cell(params, h, x):
    h = jnp.tanh(x @ params["in"] + h @ params["rec"])
    return h, h


def scan(xs: Any = XS, carry: Any = H0, rng: Any = RNG, spec: Any = ONCE, **options: Any) -> Any:
    options = {"cell": cell} | options
    return fdc.dropout_scan(PARAMS, carry, xs, rng, dropout=spec, **options)


def dropped() -> np.ndarray:
    """The inputs under their mask, scaled."""
    mask = fdc.draw_masks(PARAMS, H0, XS[0], RNG, cell=cell, dropout=ONCE).input
    return np.asarray(XS) * np.asarray(mask, np.float32) / np.float32(0.5)


def by_hand(valid, resets=None, reverse=False) -> tuple[np.ndarray, np.ndarray]:
    """Each row by itself, over its valid steps alone, in NumPy."""
    inputs = dropped()
    kernel, recurrent = (np.asarray(PARAMS[name], np.float64) for name in ("in", "rec"))
    last, ys = np.array(H0, np.float64), np.zeros((T, B, H))
    for row in range(B):
        steps = np.flatnonzero(valid[:, row])
        for t in reversed(steps) if reverse else steps:
            if resets is not None:  # backward, a sequence ends where the one after it began
                later = steps[steps > t][:1] if reverse else [t]
                if any(resets[step, row] for step in later):
                    last[row] = 0
            last[row] = ys[t, row] = np.tanh(inputs[t, row] @ kernel + last[row] @ recurrent)
    return last, ys


@patterns
@backward
def test_a_row_is_its_valid_steps(valid, reverse) -> None:
    assert_close(scan(valid=valid, reverse=reverse), by_hand(valid, reverse=reverse))


@backward
def test_lengths_are_a_pattern(reverse) -> None:
    assert_close(scan(seq_lengths=LENGTHS, reverse=reverse), by_hand(PREFIX, reverse=reverse))


@patterns
@backward
def test_what_padding_holds_goes_nowhere(valid, reverse) -> None:
    """Neither forward nor, NaN as it is, back through the gradient."""

    def loss(params, xs):
        options: Any = {"cell": cell, "dropout": ONCE, "valid": valid, "reverse": reverse}
        carry, ys = fdc.dropout_scan(params, H0, xs, RNG, **options)
        return carry.sum() + (ys**2).sum()

    poisoned = jnp.where(valid[..., None], XS, jnp.nan)
    clean, dirty = (jax.value_and_grad(loss, (0, 1))(PARAMS, xs) for xs in (XS, poisoned))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert not dirty[1][1][~valid].any()


@patterns
@backward
@pytest.mark.parametrize("reset", ["first of each span", "everywhere", "in padding"])
def test_a_reset_in_padding_is_none(valid, reverse, reset) -> None:
    """As resets have it that are wherever an id differs from the one before.

    Resets would draw new masks, so these inputs come with the mask of the reference on them.
    """
    resets = {
        "first of each span": np.diff(valid, axis=0, prepend=False) != 0,
        "everywhere": np.ones((T, B), bool),
        "in padding": ~valid,
    }[reset]
    options = {"resets": resets, "reverse": reverse, "spec": fdc.RecurrentDropout()}
    wanted = by_hand(valid, resets & valid, reverse)
    assert_close(scan(dropped(), valid=valid, **options), wanted)
    if valid is PREFIX:
        assert_close(scan(dropped(), seq_lengths=LENGTHS, **options), wanted)


@patterns
def test_cells_that_are_singular_at_zero(valid) -> None:
    """Padding is not filled with zeros, of which a norm has no gradient."""

    def unit_cell(params, h, x):
        return cell(params, h, x / jnp.linalg.norm(x, axis=-1, keepdims=True))

    def loss(params):
        carry, ys = fdc.dropout_scan(
            params, H0, XS, None, cell=unit_cell, dropout=ONCE, valid=valid
        )
        return carry.sum() + ys.sum()

    def loss_by_hand(params):
        """A loop over the valid steps of the rows that have any."""
        total = 0.0
        for row in range(B):
            h = H0[row]
            for t in np.flatnonzero(valid[:, row]):
                h, y = unit_cell(params, h, XS[t, row])
                total += y.sum()
            total += h.sum()
        return total

    assert_close(jax.grad(loss)(PARAMS), jax.grad(loss_by_hand)(PARAMS))


@pytest.mark.parametrize("lengths", [[3, T, 0, 9], np.array([3, T + 1, 0, 1]), [3, -1, 0, 1]])
def test_lengths_that_the_inputs_do_not_have(lengths) -> None:
    with pytest.raises(ValueError, match=f"from 0 to {T}"):
        scan(seq_lengths=lengths)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "uint32"])
@backward
def test_lengths_on_the_device_end_with_the_inputs(dtype, reverse) -> None:
    lengths = jnp.array([3, 200, 0, 1]).astype(dtype)
    assert_close(scan(seq_lengths=lengths, reverse=reverse), by_hand(PREFIX, reverse=reverse))
    wide = jnp.array([3, 2**31 + 5, 0, 1], "uint32")
    assert_close(scan(seq_lengths=wide, reverse=reverse), by_hand(PREFIX, reverse=reverse))


def counting(params, carry, x):
    """A cell whose rows share a count of steps, which it reads, and a clock among its inputs."""
    h, y = cell(params, carry["h"], x["x"])
    count = carry["count"] + 1
    return {"h": h, "count": count}, {"y": y, "count": count, "time": x["time"]}


@pytest.mark.parametrize("option", ["seq_lengths", "valid", "resets"])
def test_values_that_rows_share_go_on(option) -> None:
    """A step counter has no rows, and so neither padding nor resets."""
    resets = np.zeros((T, B), bool)
    resets[2, 1] = True
    options = {"seq_lengths": LENGTHS, "valid": PREFIX, "resets": resets}
    xs = {"x": XS, "time": jnp.arange(T)}
    carry = {"h": H0, "count": jnp.int32(0)}
    spec = fdc.RecurrentDropout()
    carry, ys = scan(xs, carry, None, spec, cell=counting, **{option: options[option]})
    assert carry["count"] == T
    np.testing.assert_array_equal(ys["count"], 1 + np.arange(T))
    np.testing.assert_array_equal(ys["time"], np.arange(T))
    alone = scan(XS, H0, None, spec, **{option: options[option]})
    assert_close((carry["h"], ys["y"]), alone)


@pytest.mark.parametrize("features", [B - 1, B + 1])
@pytest.mark.parametrize("option", ["seq_lengths", "valid"])
def test_inputs_without_rows_are_refused(features, option) -> None:
    """By their place a table's features would be rows, in a batch of that size."""
    xs = {"x": XS, "time": jnp.ones((T, features))}
    with pytest.raises(ValueError, match=r"xs\['time'\] is float32\[\d\] at a step.*broadcast_to"):
        scan(xs, **{option: {"seq_lengths": LENGTHS, "valid": PREFIX}[option]})


@pytest.mark.parametrize("option", ["seq_lengths", "valid"])
@pytest.mark.parametrize("shape", [(T, B), (T, B, H)])
def test_inputs_without_rows_that_have_the_batchs_size(shape, option) -> None:
    """A table of as many features as rows, and weights that change over time."""

    def reads_table(params, h, x):
        table = x["shared"]
        shared = jnp.ones(B) @ table if table.ndim == 2 else table @ jnp.ones((B, H))
        return cell(params, h + shared[None], x["x"])

    xs = {"x": XS, "shared": jnp.ones(shape)}
    given = {option: {"seq_lengths": LENGTHS, "valid": PREFIX}[option]}
    with pytest.raises(ValueError, match=r"xs\['shared'\] is float32\[.*by chance.*broadcast_to"):
        scan(xs, cell=reads_table, **given)


@pytest.mark.parametrize("option", ["seq_lengths", "valid"])
def test_a_cell_that_knows_its_batch_is_no_reason_to_refuse(option) -> None:
    own = jnp.ones((B, H))
    given = {option: {"seq_lengths": LENGTHS, "valid": PREFIX}[option]}
    scan(cell=lambda params, h, x: cell(params, h * own, x), **given)


@pytest.mark.parametrize("option", ["seq_lengths", "valid"])
def test_inputs_of_other_kinds(option) -> None:
    """Tokens, flags and no features: padding of any dtype is out of the cell's sight."""
    tokens = np.where(PREFIX, np.arange(T)[:, None] % 3, 99)
    flags, empty = PREFIX | True, jnp.ones((T, B, 0), jnp.bfloat16)

    def embed(params, h, x):
        tokens, flags, empty = x
        seen = jnp.where(flags[:, None], params["in"][tokens], 0)
        h = h + seen + empty.sum(-1, keepdims=True, dtype=h.dtype)
        return h, tokens

    given: Any = {option: {"seq_lengths": LENGTHS, "valid": PREFIX}[option]}
    xs, spec = (tokens, flags, empty), fdc.RecurrentDropout()
    h, ys = scan(xs, rng=None, spec=spec, cell=embed, **given)
    wanted = [H0[b] + sum(PARAMS["in"][t % 3] for t in range(LENGTHS[b])) for b in range(B)]
    assert_close(h, jnp.stack(wanted))
    np.testing.assert_array_equal(ys, np.where(PREFIX, tokens, 0))


@pytest.mark.parametrize("options", ["seq_lengths", "valid", "resets", "ids", "all"])
@backward
def test_no_steps(options, reverse) -> None:
    resets = {"resets": jnp.zeros((0, B), bool)}
    given: dict[str, Any] = {
        "seq_lengths": {"seq_lengths": [0] * B},
        "valid": {"valid": np.zeros((0, B), bool)},
        "resets": resets,
        "ids": resets | {"sequence_ids": np.zeros((0, B), int)},
        "all": resets | {"seq_lengths": [0] * B, "sequence_ids": jnp.zeros((0, B), int)},
    }[options]
    noise = fdc.Dropout(keep_prob=0.5, variational=True)
    spec = fdc.RecurrentDropout(input=noise, output=noise)
    h, ys = scan(XS[:0], spec=spec, reverse=reverse, **given)
    np.testing.assert_array_equal(h, H0)
    assert ys.shape == (0, B, H)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"seq_lengths": PREFIX}, TypeError, "got bool: pass a mask as valid="),
        ({"seq_lengths": np.ones(B)}, TypeError, "must be ints, got float64"),
        ({"valid": LENGTHS}, TypeError, r"valid must be bools \[time, \*batch\], got int32"),
        ({"valid": PREFIX.T}, ValueError, "valid must .* 6 steps"),
        ({"valid": PREFIX[:, :2]}, ValueError, r"carry .*batch dims of valid, \(2,\)"),
        ({"valid": PREFIX, "seq_lengths": LENGTHS}, ValueError, "seq_lengths or valid, not both"),
        (
            {"valid": PREFIX, "resets": PREFIX[:, :2]},
            ValueError,
            r"resets \(6, 2\) and padding \(6, 4\) differ in shape",
        ),
    ],
)
def test_padding_that_does_not_fit_is_refused(options, error, text) -> None:
    with pytest.raises(error, match=text):
        scan(**options)

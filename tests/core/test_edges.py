"""Sizes, numbers and leaves at the edge of JAX's limits: they work, or are one clear error."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from added_noise import Added
from jax import export
from quick_prng import quick_key

import flax_dropout_cell as fdc
from flax_dropout_cell._compat import as_weakly_typed

RNG = quick_key(6)
XS = jax.random.normal(jax.random.key(1), (5, 4, 6))
HALF = fdc.Dropout(keep_prob=0.5)
FROZEN, FRESH = fdc.Dropout(keep_prob=0.7, variational=True), fdc.Dropout(keep_prob=0.7)
MODES = pytest.mark.parametrize("noise", [FROZEN, FRESH], ids=["variational", "step"])


def cell(params, h, x):
    h = jnp.tanh(h + x * jnp.broadcast_to(params, x.shape))
    return h, h


def everywhere(noise) -> fdc.RecurrentDropout:
    return fdc.RecurrentDropout(params=noise, input=noise, state=noise, output=noise)


def scan(noise, params, h, xs, rng: Any = RNG, cell=cell, **options):
    dropout = noise if isinstance(noise, fdc.RecurrentDropout) else everywhere(noise)
    return fdc.dropout_scan(params, h, xs, rng, cell=cell, dropout=dropout, **options)


@pytest.mark.parametrize("keep_prob", [1e-38, 1e-39, 1e-45, 1e-300, 5e-324, np.float32(1e-40)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_tiny_keep_prob_gives_zeros(keep_prob, dtype) -> None:
    noise = fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=keep_prob))
    emit = lambda params, h, x: (h, x)  # noqa: E731
    for masks in (None, fdc.Masks(input=jnp.array([True, False]))):
        rng = RNG if masks is None else None
        _, y = fdc.dropout_cell(
            None, None, jnp.ones(2, dtype), rng, cell=emit, dropout=noise, masks=masks
        )
        np.testing.assert_array_equal(y, 0)  # the unit that is kept, too: its inverse is infinite


NOTHING = {
    "no noise": fdc.RecurrentDropout(),
    "keep_prob=1": everywhere(fdc.Dropout(keep_prob=1.0, variational=True)),
    "inside": fdc.RecurrentDropout(inside={"a": fdc.Dropout(keep_prob=1.0, variational=True)}),
}


@pytest.mark.parametrize("name", NOTHING)
def test_noise_that_does_nothing_needs_no_key(name) -> None:
    def with_site(w, h, x, *, disturb=fdc.undisturbed):
        return cell(w, h, disturb("a", x))

    given: Any = {"cell": with_site, "dropout": NOTHING[name]}
    w, h, resets = jnp.ones(6), XS[0], jnp.zeros((5, 4), bool).at[2].set(True)
    masks = fdc.draw_masks(w, h, XS[0], None, **given)
    assert masks == fdc.Masks()
    want_h, want = h, []
    for x in XS:
        want_h, _ = cell(w, want_h, x)
        want.append(want_h)
    got_h, _ = fdc.dropout_cell(w, h, XS[0], None, masks=masks, **given)
    np.testing.assert_array_equal(got_h, want[0])
    _, ys = fdc.dropout_scan(w, h, XS, None, masks=masks, **given)
    np.testing.assert_allclose(ys, jnp.stack(want), atol=1e-6)
    fdc.dropout_scan(w, h, XS, None, masks=masks, resets=resets, **given)


@MODES
@pytest.mark.parametrize("shape", [(0, 6), (4, 0), (0,)])
def test_no_rows_or_no_units(noise, shape) -> None:
    xs = jnp.ones((3, *shape))
    run = jax.jit(lambda xs: scan(noise, jnp.ones(shape[-1:]), xs[0], xs)[1].sum())
    assert jax.grad(run)(xs).shape == xs.shape
    assert run(xs) == 0
    ids = {"sequence_ids": jnp.zeros(shape[:1], int)}
    assert scan(noise, jnp.ones(shape[-1:]), xs[0], xs, **ids)[1].shape == xs.shape


@pytest.mark.parametrize("noise", [FROZEN, FRESH, HALF], ids=["variational", "step", "few bits"])
@pytest.mark.parametrize("symbols", ["5, batch, 6", "5, batch, units", "time, batch, 6"])
def test_export_with_symbolic_dims(noise, symbols) -> None:
    shape = export.symbolic_shape(symbols)
    program = jax.jit(lambda xs, w: scan(noise, w, xs[0], xs)[1])
    args = (jax.ShapeDtypeStruct(shape, XS.dtype), jax.ShapeDtypeStruct(shape[2:], XS.dtype))
    exported = export.deserialize(export.export(program)(*args).serialize())
    w = jnp.ones(6)
    np.testing.assert_allclose(exported.call(XS, w), program(XS, w), rtol=1e-6)


@pytest.mark.parametrize("site", ["input", "output", "inside"])
@pytest.mark.parametrize("given", ["nothing more", "lengths", "resets"])
def test_weakly_typed_inputs_widen_nothing(site, given) -> None:
    def bfloat16_cell(w, h, x, *, disturb=fdc.undisturbed):
        h = jnp.tanh(disturb("a", x) @ w + h @ w)
        return h, h

    spec = fdc.RecurrentDropout(**{site: {"a": FRESH} if site == "inside" else FRESH})
    w, h, xs = jnp.ones((6, 6), "bfloat16"), jnp.ones((4, 6), "bfloat16"), jnp.full(XS.shape, 1.0)
    assert xs.weak_type
    options: Any = {
        "nothing more": {},
        "lengths": {"seq_lengths": jnp.array([5, 3, 2, 1])},
        "resets": {"resets": jnp.zeros((5, 4), bool).at[2].set(True)},
    }[given]
    got = jax.eval_shape(lambda xs: scan(spec, w, h, xs, cell=bfloat16_cell, **options), xs)
    want = jax.eval_shape(
        lambda xs: jax.lax.scan(lambda h, x: bfloat16_cell(w, h, x), h, xs), xs
    )  # fmt: skip
    assert got == want


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("noise", [FROZEN, Added(), Added(variational=False)], ids=str)
def test_numpy_float64_values_warn_of_nothing(noise: Any) -> None:
    """Also if the mask has the dtype of the value: that is float32 by then."""
    spec = fdc.RecurrentDropout(input=noise, state=noise, output=noise, params=noise)
    weights, h, xs = np.ones(6), np.ones(XS.shape[1:]), np.ones(XS.shape)
    carry, ys = scan(spec, weights, h, xs, cell=cell)
    assert carry.dtype == ys.dtype == jnp.float32


@fdc.register_noise
@dataclasses.dataclass(frozen=True)
class Fixed(Added):
    """A noise whose mask is a number."""

    def draw_mask(self, rng: Any, shape: Any, dtype: Any) -> Any:
        return 1.0


def test_a_mask_that_is_a_number() -> None:
    _, ys = scan(fdc.RecurrentDropout(input=Fixed()), jnp.ones(6), XS[0] * 0, XS, cell=cell)
    _, wanted = scan(fdc.RecurrentDropout(), jnp.ones(6), XS[0] * 0, XS + 1, cell=cell)
    np.testing.assert_allclose(ys, wanted, rtol=1e-6)


def test_a_weakly_typed_array_keeps_its_dtype() -> None:
    weak = as_weakly_typed(jnp.bfloat16(2.0))
    assert jax.typeof(weak).weak_type
    masks = fdc.draw_masks(
        None, weak, weak, RNG, cell=lambda params, h, x: (h, x),
        dropout=fdc.RecurrentDropout(state=fdc.GaussianNoise(stddev=1.0, variational=True)),
    )  # fmt: skip
    assert masks.state is not None and masks.state.dtype == jnp.bfloat16


@MODES
def test_a_carry_of_python_numbers(noise) -> None:
    spec = fdc.RecurrentDropout(state=noise)
    total = lambda params, h, x: (h + x, x)  # noqa: E731
    carry, _ = fdc.dropout_cell(
        None, 1.0, jnp.float32(2.0), RNG, step=0, cell=total, dropout=spec,
        masks=fdc.draw_masks(None, 1.0, jnp.float32(2.0), RNG, cell=total, dropout=spec),
    )  # fmt: skip
    assert float(carry) in (0.0, np.float32(3 / np.float32(0.7)))
    scan(spec, None, 1.0, jnp.ones(3), cell=total)
    held, _ = fdc.dropout_cell(
        None, 1.0, jnp.float32(2.0), RNG, step=0, cell=lambda params, h, x: (h, x), dropout=spec,
        masks=fdc.draw_masks(None, 1.0, jnp.float32(2.0), RNG, cell=total, dropout=spec),
    )  # fmt: skip
    assert float(held) in (0.0, 1 / np.float32(0.7))


@MODES
def test_weights_beside_functions(noise) -> None:
    """An Equinox module has its activation among its leaves: noise passes it by."""
    params = eqx.nn.MLP(6, 6, 8, depth=1, key=jax.random.key(0))
    assert any(callable(leaf) for leaf in jax.tree.leaves(params))

    def cell(mlp, h, x):
        return h + jax.vmap(mlp)(x), h

    spec = fdc.RecurrentDropout(params=noise, output=noise)
    _, ys = scan(spec, params, XS[0], XS, cell=cell)

    arguments: Any = {"cell": cell, "dropout": spec}
    of_call = fdc.draw_masks(params, XS[0], XS[0], RNG, **arguments)
    of_steps = fdc.draw_step_masks(params, XS[0], XS[0], RNG, len(XS), **arguments)
    arrays = map(np.asarray, jax.tree.leaves(eqx.filter(params, eqx.is_array)))
    masks = of_call if noise.variational else of_steps
    *masks, of_output = (
        np.broadcast_to(mask, (len(XS), *mask.shape[not noise.variational :])) / np.float32(0.7)
        for mask in jax.tree.leaves((masks.params, masks.output))
    )
    w1, b1, w2, b2 = (mask * array for mask, array in zip(masks, arrays, strict=True))
    h = np.asarray(XS[0])
    for t, x in enumerate(np.asarray(XS)):
        np.testing.assert_allclose(ys[t], of_output[t] * h, rtol=1e-5, atol=1e-5)
        h = h + np.maximum(x @ w1[t].T + b1[t], 0) @ w2[t].T + b2[t]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coin:
    """A noise of one number for a whole value: its mask has no dims."""

    variational: bool = False

    def draw_mask(self, rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.bernoulli(rng)

    def apply(self, mask: Any, value: Any, previous: Any) -> Any:
        return jnp.where(mask, value, 0)

    def expected(self, value: Any, previous: Any) -> Any:
        return value / 2


fdc.register_noise(Coin)


@pytest.mark.parametrize("features", [16, 3], ids=["as many as rows", "few"])
@pytest.mark.parametrize("variational", [False, True])
def test_a_mask_of_fewer_dims_than_a_row_is_the_rows(features, variational) -> None:
    """With ids a row draws alone, and its one number is for all of its features."""
    xs, ids = jnp.ones((5, 16, features)), jnp.arange(16) % 8
    spec = fdc.RecurrentDropout(input=Coin(variational=variational))
    emit = lambda params, h, x: (h, x)  # noqa: E731
    _, ys = scan(spec, None, xs[0], xs, cell=emit, sequence_ids=ids)
    ys = np.asarray(ys)
    np.testing.assert_array_equal(ys, np.broadcast_to(ys[:, :, :1], ys.shape))
    np.testing.assert_array_equal(ys[:, :8], ys[:, 8:])
    assert {*ys[0, :, 0]} == {0.0, 1.0}
    assert bool((ys == ys[0]).all()) == variational


def test_noise_on_weights_that_the_cell_does_not_show() -> None:
    w = jnp.ones(6)
    for rng in (RNG, None):
        for params in (None, (), {"activation": jnp.tanh}):
            with pytest.raises(ValueError, match=r"params has noise, but no weights came for it"):
                scan(
                    fdc.RecurrentDropout(params=FROZEN), params, XS[0], XS, rng,
                    cell=lambda params, h, x: (h, x * w),
                )  # fmt: skip


@pytest.mark.parametrize("start", [np.uint32(3), jnp.uint32(3), jnp.int32(3), np.int64(3), 3])
def test_every_integer_is_a_start(start) -> None:
    def emit(w, h, x):
        return h, x + jnp.broadcast_to(w, x.shape)

    w, xs = jnp.ones(6), jnp.concatenate([XS, XS])
    _, whole = scan(FRESH, w, xs[0], xs, cell=emit)
    _, rest = scan(FRESH, w, xs[0], xs[3:], start=start, cell=emit)
    np.testing.assert_array_equal(rest, whole[3:])
    jax.jit(lambda start: scan(FRESH, jnp.ones(6), XS[0], XS, start=start))(start)


def test_steps_stay_below_the_keys_of_sites() -> None:
    scan(FRESH, jnp.ones(6), XS[0], XS, start=2**31 - 5)
    for start in (2**31 - 4, 2**31, -1):
        with pytest.raises(ValueError, match=r"start"):
            scan(FRESH, jnp.ones(6), XS[0], XS, start=start)
        options = {"cell": cell, "dropout": everywhere(FRESH), "start": start}
        with pytest.raises(ValueError, match=r"start"):
            fdc.draw_step_masks(jnp.ones(6), XS[0], XS[0], RNG, len(XS), **options)
        with pytest.raises(ValueError, match=r"start"):
            fdc.plot_masks(jnp.ones(6), XS[0], XS, RNG, **options)
    mistakes: Any = ((-1, ValueError), (2**31, ValueError), (0.5, TypeError), (True, TypeError))
    for step, error in mistakes:
        with pytest.raises(error, match="step must be"):
            fdc.dropout_cell(
                jnp.ones(6), XS[0], XS[0], RNG, step=step, cell=cell, dropout=everywhere(FRESH)
            )


def test_a_mask_of_a_wrong_shape() -> None:
    class Wide(fdc.Dropout):
        def draw_mask(self, rng, shape, dtype):
            return jax.random.bernoulli(rng, 0.5, (7, *shape))

    noise = Wide(keep_prob=0.5)
    with pytest.raises(ValueError, match=r"Wide.draw_mask gave the shape \(7, 4, 6\)"):
        scan(fdc.RecurrentDropout(input=noise), jnp.ones(6), XS[0], XS)


@MODES
def test_rows_draw_by_their_ids(noise) -> None:
    """A row's masks do not depend on its place, on the batch, or on the ids' integer type."""
    spec = fdc.RecurrentDropout(input=noise, state=noise, output=noise)
    emit = lambda w, h, x: (x, h * 0 + x)  # noqa: E731
    xs, ids = jnp.ones((5, 4, 64)), jnp.array([7, -3, 7, 2**31 - 1], "int32")
    _, ys = scan(spec, None, xs[0], xs, cell=emit, sequence_ids=ids)
    np.testing.assert_array_equal(ys[:, 0], ys[:, 2])
    assert not np.array_equal(ys[:, 0], ys[:, 1])
    order = jnp.array([3, 1])
    _, some = scan(spec, None, xs[0, :2], xs[:, :2], cell=emit, sequence_ids=ids[order])
    np.testing.assert_array_equal(some, ys[:, order])
    _, small = scan(
        spec, None, xs[0, :2], xs[:, :2], cell=emit, sequence_ids=ids[:2].astype("int8")
    )
    np.testing.assert_array_equal(small, ys[:, :2])


def test_a_scalar_beside_the_inputs_cannot_share_its_mask() -> None:
    """The noise's own error, which names the dims and the shape."""
    noise = fdc.Dropout(keep_prob=0.5, broadcast_dims=(0,))
    spec = fdc.RecurrentDropout(input=(noise, noise))
    x = (jnp.ones((2, 3)), jnp.ones(()))
    with pytest.raises(ValueError, match=r"broadcast_dims has 0, but the value has shape \(\)"):
        fdc.dropout_cell(
            None, None, x, jax.random.key(0), cell=lambda p, c, x: (c, x[0]), dropout=spec,
        )  # fmt: skip


@pytest.mark.parametrize("dim", [2, -3])
@pytest.mark.parametrize("variational", [True, False])
def test_a_dim_that_a_value_lacks_is_refused_with_ids_too(dim: int, variational: bool) -> None:
    """It would be taken modulo the number of dims, and share another axis."""
    noise = fdc.Dropout(keep_prob=0.5, broadcast_dims=(dim,), variational=variational)
    options: Any = {"cell": lambda p, c, x: (c, x), "dropout": fdc.RecurrentDropout(input=noise)}
    with pytest.raises(ValueError, match=rf"broadcast_dims has {dim}, but .* shape \(4, 3\)"):
        fdc.dropout_scan(
            None, None, jnp.ones((2, 4, 3)), jax.random.key(0),
            sequence_ids=jnp.arange(4), **options,
        )  # fmt: skip

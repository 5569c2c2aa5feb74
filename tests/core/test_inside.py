"""Sites inside a cell: the keys of their masks, and mistakes that would be silent."""

import hashlib
import inspect
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_dropout_cell as fdc
from flax_dropout_cell._random.keys import name_hash

RNG = jax.random.key(5)
STEPS, BATCH, UNITS = 4, 3, 64
XS = jnp.ones((STEPS, BATCH, UNITS))
H = jnp.ones((BATCH, UNITS))
FROZEN = fdc.Dropout(keep_prob=0.5, variational=True)
FRESH = fdc.Dropout(keep_prob=0.5)


def cell(params, h, x, *, disturb=fdc.undisturbed):
    """Shows the masks of its three sites: at `old` through `previous`, which is 3 there."""
    a, b = disturb("a", x), disturb("pair", {"left": x, "right": x})
    old = disturb("old", x, previous=3 * x)
    return h, {"a": a, **b, "old": old}


def noise_inside(**inside) -> fdc.RecurrentDropout:
    return fdc.RecurrentDropout(inside=inside)


def scan(spec, rng: Any = RNG, cell=cell, **options):
    return fdc.dropout_scan(None, H, XS, rng, cell=cell, dropout=spec, **options)[1]


@pytest.mark.parametrize("noise", [FROZEN, FRESH], ids=["variational", "step"])
def test_masks_sit_where_they_are_named_and_live_as_long_as_they_should(noise) -> None:
    ys = jax.jit(lambda: scan(noise_inside(a=noise, pair={"left": None, "right": noise})))()
    np.testing.assert_array_equal(ys["left"], XS)
    np.testing.assert_array_equal(ys["old"], XS)
    for name in ("a", "right"):
        assert set(np.unique(ys[name])) == {0.0, 2.0}
        frozen = np.array_equal(ys[name][0], ys[name][1])
        assert frozen == noise.variational
        assert not np.array_equal(ys[name][0, 0], ys[name][0, 1])
    assert not np.array_equal(ys["a"], ys["right"])


def test_a_loop_of_steps_has_the_masks_of_the_scan() -> None:
    spec = noise_inside(a=FROZEN, pair=FRESH, old=FRESH)
    masks = fdc.draw_masks(None, H, XS[0], RNG, cell=cell, dropout=spec)
    assert set(masks.inside) == {"a"}
    options = {"cell": cell, "dropout": spec, "masks": masks}
    steps = [fdc.dropout_cell(None, H, XS[t], RNG, step=t, **options)[1] for t in range(STEPS)]
    jax.tree.map(
        lambda whole, *steps: np.testing.assert_array_equal(whole, jnp.stack(steps)),
        scan(spec),
        *steps,
    )


def test_a_site_draws_by_its_name_alone() -> None:
    """Other sites come and go; a renamed one draws anew; the key is the contract's."""
    alone, among = scan(noise_inside(a=FRESH)), scan(noise_inside(old=FROZEN, pair=FRESH, a=FRESH))
    np.testing.assert_array_equal(alone["a"], among["a"])
    outer = fdc.RecurrentDropout(input=FROZEN, inside={"a": FRESH})
    kept = scan(outer)["a"] != 0
    np.testing.assert_array_equal(
        kept, (scan(fdc.RecurrentDropout(input=FROZEN))["a"] != 0) & (alone["a"] != 0)
    )

    def renamed(params, h, x, *, disturb=fdc.undisturbed):
        return h, {"a": disturb("other", x)}

    assert not np.array_equal(scan(noise_inside(other=FRESH), cell=renamed)["a"], alone["a"])
    assert name_hash("a") == int.from_bytes(hashlib.sha256(b"a").digest()[:4], "big")
    fold = jax.random.fold_in
    slot = fold(fold(RNG, 0), np.uint32(2**31 + 4 * 2**28))
    key = fold(fold(slot, np.uint32(name_hash("a"))), 0)
    np.testing.assert_array_equal(alone["a"][0] != 0, FRESH.draw_mask(key, H.shape, H.dtype))


def test_evaluation_gives_what_is_expected() -> None:
    ys = scan(noise_inside(a=fdc.Dropout(keep_prob=0.25, scale=False), pair=FROZEN), rng=None)
    np.testing.assert_array_equal(ys["a"], XS / 4)
    np.testing.assert_array_equal(ys["left"], XS)


def test_frozen_masks_are_applied_without_a_key() -> None:
    spec = noise_inside(a=FROZEN)
    masks = fdc.draw_masks(None, H, XS[0], jax.random.key(8), cell=cell, dropout=spec)
    ys = scan(spec, rng=None, masks=masks)
    np.testing.assert_array_equal(ys["a"][2] != 0, masks.inside["a"])
    np.testing.assert_array_equal(scan(spec, masks=masks)["a"], ys["a"])


def test_a_site_without_noise_adds_nothing() -> None:
    def bare(params, h, x):
        return h, {"a": x, "left": x, "right": x, "old": x}

    def program(cell, spec):
        run = jax.jit(lambda rng, xs: fdc.dropout_scan(None, H, xs, rng, cell=cell, dropout=spec))
        return run.lower(RNG, XS).as_text()

    for spec in (
        fdc.RecurrentDropout(),
        noise_inside(a=None),
        noise_inside(a=fdc.Dropout(keep_prob=1)),
    ):
        assert program(cell, spec) == program(bare, fdc.RecurrentDropout())


def test_disturb_is_passed_only_where_there_is_noise() -> None:
    def bare(params, h, x):
        return h, x

    scan(fdc.RecurrentDropout(input=FRESH), cell=bare)
    with pytest.raises(TypeError, match=r"noise at 'a', but the cell has no sites"):
        scan(noise_inside(a=FRESH), cell=bare)
    with pytest.raises(
        TypeError, match=r"takes no argument `disturb`. For .candidate. use lstm_cell"
    ):
        flax_cell = nn.SimpleCell(UNITS)
        variables = flax_cell.init(RNG, H, XS[0])
        spec = noise_inside(candidate=FRESH)
        fdc.dropout_cell(variables, H, XS[0], RNG, step=0, cell=flax_cell.apply, dropout=spec)


def test_a_site_that_the_cell_has_not() -> None:
    with pytest.raises(ValueError, match=r"noise at 'b', .* it has a, old, pair."):
        scan(noise_inside(b=FRESH))
    with pytest.raises(ValueError, match=r"it has a, old, pair. Use lstm_cell of this library"):
        scan(noise_inside(memory=fdc.Dropout(keep_prob=0.5, scale=False)))
    with pytest.raises(ValueError, match=r"masks.inside\['b'\] has a mask where"):
        scan(noise_inside(a=FROZEN), masks=fdc.Masks(inside={"b": H > 0}))


def mapped(params, h, x, *, disturb=fdc.undisturbed):
    return h, jax.vmap(lambda row: disturb("a", row))(x)


def scanned(params, h, x, *, disturb=fdc.undisturbed):
    return jax.lax.scan(lambda h, _: (disturb("a", h), None), h, None, length=2)[0], x


def rematted(params, h, x, *, disturb=fdc.undisturbed):
    return h, jax.checkpoint(lambda x: disturb("a", x))(x)


class HaikuCell(hk.RNNCore):
    def __init__(self, disturb):
        super().__init__()
        self.disturb = disturb

    def __call__(self, inputs, prev_state):
        return hk.vmap(lambda row: self.disturb("a", row), split_rng=False)(inputs), prev_state

    def initial_state(self, batch_size): ...


def haiku(params, h, x, *, disturb=fdc.undisturbed):
    run = hk.without_apply_rng(hk.transform(lambda h, x: HaikuCell(disturb)(x, h)))
    y, h = run.apply({}, h, x)
    return h, y


class EquinoxCell(eqx.Module):
    def __call__(self, h, x, disturb):
        return h, disturb("a", x)


def equinox(params, h, x, *, disturb=fdc.undisturbed):
    return eqx.filter_vmap(lambda h, x: EquinoxCell()(h, x, disturb))(h, x)


class LinenCell(nn.Module):
    @nn.compact
    def __call__(self, h, x, disturb=fdc.undisturbed):
        rows = nn.vmap(lambda module, row: disturb("a", row), variable_axes={}, split_rngs={})
        return h, rows(self, x)


def linen(params, h, x, *, disturb=fdc.undisturbed):
    return LinenCell().apply({}, h, x, disturb=disturb)


@pytest.mark.parametrize("cell", [mapped, scanned, rematted, haiku, equinox, linen])
@pytest.mark.parametrize("noise", [FROZEN, FRESH], ids=["variational", "step"])
def test_disturb_under_a_transformation_of_the_cells_own_is_refused(cell, noise) -> None:
    with pytest.raises(ValueError, match="called under a transformation that the cell itself"):
        scan(noise_inside(a=noise), cell=cell)
    cell(None, H, XS[0])


@pytest.mark.parametrize("keep_prob", [1.0, 0.5])
def test_a_mask_that_is_brought_is_applied(keep_prob) -> None:
    """A noise that would draw no mask applies the one that it is given, as at the input."""
    mask, noise = jnp.arange(UNITS) % 2 == 0, fdc.Dropout(keep_prob=keep_prob)
    inside = scan(noise_inside(a=noise), rng=None, masks=fdc.Masks(inside={"a": mask}))
    at_input = scan(
        fdc.RecurrentDropout(input=noise), rng=None, masks=fdc.Masks(input=mask)
    )  # fmt: skip
    for ys in (inside, at_input):
        np.testing.assert_array_equal(ys["a"], jnp.where(mask, XS / keep_prob, 0))
    np.testing.assert_array_equal(inside["left"], XS)


@pytest.mark.parametrize("noise", [FROZEN, FRESH], ids=["variational", "step"])
def test_one_name_twice_in_a_step_is_refused(noise) -> None:
    def twice(params, h, x, *, disturb=fdc.undisturbed):
        return disturb("a", h), disturb("a", x)

    with pytest.raises(ValueError, match="called twice in a step"):
        scan(noise_inside(a=noise), cell=twice)


def test_transformations_around_the_scan_are_welcome() -> None:
    """vmap, grad and remat of the whole are the user's own business."""
    spec = noise_inside(a=FROZEN)
    keys = jax.random.split(RNG, 2)
    mapped = jax.vmap(lambda rng: scan(spec, rng)["a"])(keys)
    np.testing.assert_array_equal(mapped[1], scan(spec, keys[1])["a"])
    grad = jax.grad(
        jax.checkpoint(
            lambda x: fdc.dropout_scan(None, H, x, RNG, cell=cell, dropout=spec)[1]["a"].sum()
        )
    )(XS)
    np.testing.assert_array_equal(grad, scan(spec)["a"])


def test_a_noise_that_needs_the_step_before() -> None:
    class Previous:
        variational = False
        needs_previous = True

        def draw_mask(self, rng, shape, dtype):
            return jax.random.bernoulli(rng, 0.5, shape)

        def apply(self, mask, value, previous):
            return jnp.where(mask, value, previous)

        def expected(self, value, previous):
            return previous

    assert set(np.unique(scan(noise_inside(old=Previous()))["old"])) == {1.0, 3.0}
    np.testing.assert_array_equal(scan(noise_inside(old=Previous()), rng=None)["old"], 3 * XS)
    with pytest.raises(ValueError, match=r"inside\['a'\]: Previous needs the value of the step"):
        scan(noise_inside(a=Previous()))
    for site in ("input", "output"):
        with pytest.raises(ValueError, match=r"Put it at state, or inside .* memory and hidden"):
            sites: Any = {site: Previous()}
            scan(fdc.RecurrentDropout(**sites))


def test_undisturbed_takes_what_disturb_takes() -> None:
    assert list(inspect.signature(fdc.undisturbed).parameters) == ["site", "value", "previous"]


def test_an_error_of_a_cells_own_function_is_shown_as_it_is() -> None:
    """The cell takes `disturb`; the function that it hands it to does not."""

    def helper(x):
        return x

    def forwards(params, h, x, *, disturb=fdc.undisturbed):
        return h, helper(x, disturb=disturb)  # type: ignore

    with pytest.raises(TypeError, match=r"helper\(\) got an unexpected keyword argument"):
        scan(noise_inside(a=FRESH), cell=forwards)


def test_two_names_of_one_hash_are_refused() -> None:
    """Their masks would be the same. These two were found by counting."""
    first, second = "site_69524", "site_92913"
    digests = {hashlib.sha256(name.encode()).digest()[:4] for name in (first, second)}
    assert len(digests) == 1

    def collides(params, h, x, *, disturb=fdc.undisturbed):
        return h, disturb(first, x) + disturb(second, x)

    with pytest.raises(ValueError, match=f"'{first}' and '{second}' have the same hash"):
        scan(fdc.RecurrentDropout(inside={first: FRESH, second: FRESH}), cell=collides)


def test_a_cell_under_a_checkpoint_is_one_clear_error() -> None:
    """It takes arrays alone, and no `disturb`."""
    spec = fdc.RecurrentDropout(inside={"recurrent": fdc.Dropout(keep_prob=0.5)})
    cell = jax.checkpoint(fdc.gru_cell)  # type: ignore[attr-defined]
    args = fdc.init_gru(jax.random.key(0), 3, 8), jnp.zeros((2, 8)), jnp.ones((4, 2, 3))
    with pytest.raises(TypeError, match=r"under a transformation such as jax\.checkpoint"):
        fdc.dropout_scan(*args, jax.random.key(1), cell=cell, dropout=spec)

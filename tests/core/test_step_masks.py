"""Masks of all steps as arrays, and those that `dropout_scan` draws before its loop."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_dropout_cell as fdc
from flax_dropout_cell._sequence import step_masks

T, B, H = 5, 3, 70
KEY = jax.random.key(7)
ONES = jnp.ones((B, H))
# The slots of the sites in the random stream, and of the name "gate".
SLOTS = {"params": 0, "input": 1, "state": 2, "output": 3, "gate": 4}
GATE = 0xC974E17B

Noise = Any


@fdc.register_noise
@dataclasses.dataclass(frozen=True)
class UsersNoise:
    """A noise that is none of this library's."""

    variational: bool = False

    def draw_mask(self, rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.bernoulli(rng, 0.6, shape)

    def apply(self, mask: jax.Array, value: jax.Array, previous: Any) -> jax.Array:
        return jnp.where(mask, value, 0)

    def expected(self, value: jax.Array, previous: Any) -> jax.Array:
        return value


def probe(params: Any, carry: Any, x: jax.Array, *, disturb: Any = fdc.undisturbed) -> Any:
    """A cell of ones, whose output shows each site: a factor for each mask."""
    y = {"params": params, "input": x, "state": carry[1], "gate": disturb("gate", ONES)}
    return (carry[0], jnp.ones_like(carry[1])), y | {"output": ONES}


def noise_at_all_but_params(noise: Noise, *, params: Noise = None) -> fdc.RecurrentDropout:
    output = dict.fromkeys(SLOTS, None) | {"output": noise}
    inside = {"gate": noise}
    return fdc.RecurrentDropout(
        input=noise, state=(None, noise), output=output, params=params, inside=inside
    )


def run(spec: fdc.RecurrentDropout, rng: Any = KEY, **options: Any) -> Any:
    xs = jnp.ones((T, B, H))
    scan = jax.jit(
        lambda rng: fdc.dropout_scan(
            ONES, (ONES, ONES), xs, rng, cell=probe, dropout=spec, **options
        )
    )
    return scan(rng)[1]


def draw(spec: fdc.RecurrentDropout, rng: Any = KEY, **options: Any) -> dict[str, Any]:
    masks = fdc.draw_step_masks(
        ONES, (ONES, ONES), ONES, rng, T, cell=probe, dropout=spec, **options
    )
    assert masks.state is None or masks.state[0] is None
    return {
        "params": masks.params,
        "input": masks.input,
        "state": None if masks.state is None else masks.state[1],
        "output": None if masks.output is None else masks.output["output"],
        "gate": None if masks.inside is None else masks.inside["gate"],
    }


def by_hand(noise: Noise, site: str, step: int) -> Any:
    """A mask from JAX's own keys; how a noise draws from its key is pinned by the golden masks."""
    key = jax.random.fold_in(KEY, step)
    leaf = {"state": 1, "output": list(sorted(SLOTS)).index("output")}.get(site, 0)
    key = jax.random.fold_in(key, np.uint32(2**31 + SLOTS[site] * 2**28 + (site != "gate") * leaf))
    if site == "gate":
        key = jax.random.fold_in(jax.random.fold_in(key, np.uint32(GATE)), 0)
    return noise.draw_mask(key, (B, H), jnp.float32)


NOISES = {
    "0.7": fdc.Dropout(keep_prob=0.7),
    "0.5": fdc.Dropout(keep_prob=0.5),
    "an array": fdc.Dropout(keep_prob=jnp.float32(0.3)),
    "one for the batch": fdc.Dropout(keep_prob=0.7, broadcast_dims=(0,)),
    "gaussian": fdc.GaussianNoise(stddev=0.5),
    "a user's": UsersNoise(),
}


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_masks_as_arrays_are_those_drawn_by_hand(noise: Noise) -> None:
    masks = draw(noise_at_all_but_params(noise, params=noise), start=2)
    for site in SLOTS:
        wanted = [by_hand(noise, site, 2 + step) for step in range(T)]
        np.testing.assert_array_equal(masks[site], np.stack(wanted), err_msg=site)


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_variational_noises_have_none(noise: Noise) -> None:
    noise = dataclasses.replace(noise, variational=True)
    assert not jax.tree.leaves(draw(noise_at_all_but_params(noise, params=noise)))


def test_zoneouts_masks() -> None:
    noise = fdc.Zoneout(prob=0.3)
    masks = draw(fdc.RecurrentDropout(state=(None, noise)))
    np.testing.assert_array_equal(masks["state"][3], by_hand(noise, "state", 3))


def seen(masks: dict[str, Any], *, reverse: bool = False) -> dict[str, Any]:
    """What the probe's output shows of masks, in NumPy; that of the state comes a step late."""
    found = {site: np.where(mask, np.float32(1 / 0.7), 0) for site, mask in masks.items()}
    order = slice(None, None, -1) if reverse else slice(None)
    late = np.concatenate([np.ones((1, B, H)), found["state"][order][:-1]])
    return found | {"state": late[order]}


IDS = jnp.array([4, 4, -1])
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "start": ({"start": 3}, {"start": 3}),
    "ids": ({"sequence_ids": IDS}, {"sequence_ids": IDS}),
    "reverse": ({"reverse": True}, {}),
    "unrolled": ({"unroll": 2}, {}),
    "checkpoints": ({"checkpoint_every": 2}, {}),
    "resets": ({"resets": jnp.zeros((T, B), bool)}, {}),
    "ids and resets": (
        {"resets": jnp.zeros((T, B), bool), "sequence_ids": jnp.tile(IDS, (T, 1))},
        {"sequence_ids": IDS},
    ),
}  # fmt: skip


@pytest.mark.parametrize("ahead", [True, False], ids=["before the loop", "in the loop"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_dropout_scan_draws_the_same_masks(
    options: Any, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Applied in NumPy to a cell of ones."""
    if not ahead:
        monkeypatch.setattr(step_masks, "MAX_BYTES", 0)
    of_scan, of_draw = options
    noise = fdc.Dropout(keep_prob=0.7)
    spec = noise_at_all_but_params(noise, params=noise)
    wanted = seen(draw(spec, **of_draw), reverse=of_scan.get("reverse", False))
    for site, got in run(spec, **of_scan).items():
        np.testing.assert_allclose(got, wanted[site], rtol=1e-6, err_msg=site)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_other_prngs_draw_step_by_step(impl: str) -> None:
    """Under vmap they would give all steps one mask."""
    key, noise = jax.random.key(3, impl=impl), fdc.Dropout(keep_prob=0.7)
    masks = draw(noise_at_all_but_params(noise), key)
    assert not np.array_equal(masks["input"][0], masks["input"][1])
    wanted = seen({site: mask for site, mask in masks.items() if mask is not None})
    got = run(noise_at_all_but_params(noise), key)
    for site in wanted:
        np.testing.assert_allclose(got[site], wanted[site], rtol=1e-6, err_msg=site)


def test_a_mask_that_is_brought_is_used() -> None:
    """At its leaf; the others' are drawn as if it were not there."""
    noise = fdc.Dropout(keep_prob=0.7)
    frozen = fdc.Masks(input=jnp.zeros((B, H), bool))
    got, wanted = (
        run(noise_at_all_but_params(noise), masks=frozen),
        seen(draw(noise_at_all_but_params(noise, params=noise))),
    )
    assert not got["input"].any()
    for site in ("state", "output", "gate"):
        np.testing.assert_allclose(got[site], wanted[site], rtol=1e-6, err_msg=site)


def test_a_step_at_a_time_draws_the_same_masks() -> None:
    noise = fdc.Dropout(keep_prob=0.7)
    masks = draw(noise_at_all_but_params(noise))
    for step in range(T):
        _, y = fdc.dropout_cell(
            ONES,
            (ONES, ONES),
            ONES,
            KEY,
            step=step,
            cell=probe,
            dropout=noise_at_all_but_params(noise),
        )
        for site in ("input", "output", "gate"):
            np.testing.assert_array_equal(y[site] > 0, masks[site][step], err_msg=site)


def test_under_vmap_each_key_draws_its_own_masks() -> None:
    keys, spec = jax.random.split(KEY, 4), noise_at_all_but_params(fdc.Dropout(keep_prob=0.7))
    many = jax.vmap(lambda key: run(spec, key))(keys)
    for at, key in enumerate(keys):
        one = run(spec, key)
        jax.tree.map(
            lambda many, one, at=at: np.testing.assert_array_equal(many[at], one), many, one
        )


@pytest.mark.parametrize(("steps", "rows"), [(0, B), (T, 0)], ids=["no steps", "no rows"])
def test_nothing_to_draw(steps: int, rows: int) -> None:
    spec = fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=0.7))
    options = {"cell": lambda params, h, x: (h, x), "dropout": spec}
    h, xs, ids = jnp.ones((rows, H)), jnp.ones((steps, rows, H)), jnp.arange(rows)
    for sequence_ids in (None, ids):
        options["sequence_ids"] = sequence_ids
        masks = fdc.draw_step_masks(None, h, jnp.ones((rows, H)), KEY, steps, **options)
        assert masks.input.shape == xs.shape
        assert fdc.dropout_scan(None, h, xs, KEY, **options)[1].shape == xs.shape


def test_arguments_that_do_not_fit_are_refused() -> None:
    spec = noise_at_all_but_params(fdc.Dropout(keep_prob=0.7))
    with pytest.raises(ValueError, match="draw_step_masks needs a key"):
        draw(spec, None)
    with pytest.raises(TypeError, match="start must be an int"):
        draw(spec, start=0.5)
    num_steps: Any = 2.0
    with pytest.raises(TypeError, match="num_steps must be an int"):
        fdc.draw_step_masks(ONES, (ONES, ONES), ONES, KEY, num_steps, cell=probe, dropout=spec)


def test_no_key_is_needed_if_no_noise_does_anything() -> None:
    spec = fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=1))
    masks = fdc.draw_step_masks(ONES, (ONES, ONES), ONES, None, T, cell=probe, dropout=spec)
    assert masks == fdc.Masks()
    with pytest.raises(ValueError, match="draw_step_masks needs a key"):
        draw(fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=0.5)), None)

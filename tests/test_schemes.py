"""Each published scheme against its paper's equations in NumPy, forward and gradient.

`scheme_equations.py` has the equations. The masks that `dropout_scan` draws are injected there:
those of a step are what `draw_masks` draws from the step's key, for sites and leaves have the same
keys there.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scheme_equations as equations
from scheme_equations import KEEP, STDDEV, ZONE_C, ZONE_H

import flax_dropout_cell as fdc
from flax_dropout_cell import recipes

STEPS, BATCH, FEATURES, UNITS = 6, 3, 4, 5
FULL = (STEPS,) * BATCH
LENGTHS = (6, 1, 4)


class Scheme(NamedTuple):
    """A paper's scheme: the spec, its cell, its equations in training and in evaluation."""

    spec: fdc.RecurrentDropout
    cell: str
    step: Callable[..., Any]
    evaluate: Callable[..., Any]


def lstm_scheme(spec: fdc.RecurrentDropout, step: Any, evaluate: Any = None) -> Scheme:
    return Scheme(spec, "lstm", step, evaluate or equations.bare_lstm)


def gru_scheme(spec: fdc.RecurrentDropout, step: Any, evaluate: Any = None) -> Scheme:
    return Scheme(spec, "gru", step, evaluate or equations.bare_gru)


def gal(tied: bool) -> fdc.RecurrentDropout:
    return recipes.gal2016(
        input_keep_prob=KEEP, recurrent_keep_prob=KEEP, output_keep_prob=KEEP, tied=tied
    )


SEMENIUTA = recipes.semeniuta2016(
    candidate_keep_prob=KEEP, input_keep_prob=KEEP, output_keep_prob=KEEP
)
MOON = fdc.RecurrentDropout(
    inside={"memory": fdc.Dropout(keep_prob=KEEP, variational=True, scale=False)}
)
GRU_ZONEOUT = fdc.RecurrentDropout(inside={"hidden": fdc.Zoneout(prob=ZONE_H)})


def graves(variational: bool) -> fdc.RecurrentDropout:
    return fdc.RecurrentDropout(params=fdc.GaussianNoise(stddev=STDDEV, variational=variational))


SCHEMES = {
    "Zaremba 2014": lstm_scheme(
        recipes.zaremba2014(input_keep_prob=KEEP, output_keep_prob=KEEP), equations.zaremba
    ),
    "Gal 2016, tied": lstm_scheme(gal(tied=True), equations.gal_tied),
    "Gal 2016, untied": lstm_scheme(gal(tied=False), equations.gal_untied),
    "Gal 2016, tied, GRU": gru_scheme(gal(tied=True), equations.gal_tied_gru),
    "Gal 2016, untied, GRU": gru_scheme(gal(tied=False), equations.gal_untied_gru),
    "Semeniuta 2016": lstm_scheme(SEMENIUTA, equations.semeniuta_lstm),
    "Semeniuta 2016, GRU": gru_scheme(SEMENIUTA, equations.semeniuta_gru),
    "Moon 2015": lstm_scheme(MOON, equations.moon, equations.moon_in_evaluation),
    "Krueger 2016": lstm_scheme(
        recipes.krueger2016(cell_prob=ZONE_C, hidden_prob=ZONE_H),
        equations.krueger, equations.krueger_in_evaluation,
    ),
    "Krueger 2016, GRU": gru_scheme(
        GRU_ZONEOUT, equations.zoned_gru, equations.zoned_gru_in_evaluation
    ),
    "Merity 2017": lstm_scheme(
        recipes.merity2017(weight_keep_prob=KEEP, input_keep_prob=KEEP), equations.merity
    ),
    "Graves, per step": lstm_scheme(graves(variational=False), equations.graves),
    "Graves, variational": lstm_scheme(graves(variational=True), equations.graves),
}  # fmt: skip
schemes = pytest.mark.parametrize("name", SCHEMES)
CELLS = {"lstm": fdc.lstm_cell, "gru": fdc.gru_cell}


def draw(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def example(cell: str) -> tuple[Any, Any, Any]:
    """Weights, a first carry and inputs, none of them zero."""
    width = (4 if cell == "lstm" else 3) * UNITS
    shapes = [(FEATURES, width), (UNITS, width), (width,)]
    weights = [draw(shape, seed) / 2 for seed, shape in enumerate(shapes)]
    params = (
        fdc.LSTMParams(*weights) if cell == "lstm" else fdc.GRUParams(*weights, draw((UNITS,), 3))
    )
    c, h = draw((BATCH, UNITS), 4), np.tanh(draw((BATCH, UNITS), 5))
    return params, (c, h) if cell == "lstm" else h, draw((STEPS, BATCH, FEATURES), 6)


def frozen(spec: fdc.RecurrentDropout) -> fdc.RecurrentDropout:
    """The same noises, each drawn once."""
    return jax.tree.map(
        lambda noise: dataclasses.replace(noise, variational=True),
        spec,
        is_leaf=lambda node: isinstance(node, fdc.Noise),
    )


@functools.cache
def drawer(name: str) -> Callable[..., Any]:
    """What `dropout_scan` draws: once from its key, and from each step's own key."""
    scheme = SCHEMES[name]
    params, carry, xs = example(scheme.cell)

    def draw(key: jax.Array, spec: fdc.RecurrentDropout) -> fdc.Masks:
        cell = CELLS[scheme.cell]
        return fdc.draw_masks(params, carry, xs[0], key, cell=cell, dropout=spec)

    @jax.jit
    def draw_all(rng: jax.Array) -> Any:
        keys = jax.random.split(rng, STEPS)
        return draw(rng, scheme.spec), jax.lax.map(lambda key: draw(key, frozen(scheme.spec)), keys)

    return draw_all


@functools.cache
def masks_of(name: str, seed: int) -> list[dict[str, Any]]:
    """The masks of each step."""
    sequence, steps = map(as_dict, drawer(name)(jax.random.key(seed)))
    return [jax.tree.map(lambda mask, t=t: mask[t], steps) | sequence for t in range(STEPS)]


def as_dict(masks: fdc.Masks) -> dict[str, Any]:
    found = {name: getattr(masks, name) for name in ("params", "input", "output")}
    found |= masks.inside or {}
    if masks.state is not None:
        found["c"] = masks.state[0]
    return {
        name: jax.tree.map(np.asarray, mask) for name, mask in found.items() if mask is not None
    }


def run(name: str, params: Any, carry: Any, xs: Any, rng: Any, seq_lengths: Any = None) -> Any:
    scheme = SCHEMES[name]
    return fdc.dropout_scan(
        params, carry, xs, rng,
        cell=CELLS[scheme.cell], dropout=scheme.spec, seq_lengths=seq_lengths,
    )  # fmt: skip


def loss(carry: Any, ys: Any) -> Any:
    """Reads every number that comes out, each with a weight of its own."""
    return sum(
        (leaf * draw(leaf.shape, 20 + index)).sum()
        for index, leaf in enumerate([*equations.as_tuple(carry), ys])
    )


def assert_close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@schemes
def test_training_is_the_papers_equations(name: str) -> None:
    check(name, jax.random.key(1), SCHEMES[name].step, masks_of(name, 1))


@schemes
def test_evaluation_is_the_papers_rule(name: str) -> None:
    check(name, None, SCHEMES[name].evaluate, [{}] * STEPS)


def check(name: str, rng: Any, step: Any, masks: list[Any]) -> None:
    def with_loss(params: Any, carry: Any, xs: Any, seq_lengths: Any) -> Any:
        carry, ys = run(name, params, carry, xs, rng, seq_lengths)
        return loss(carry, ys), (carry, ys)

    differentiate = jax.jit(jax.grad(with_loss, argnums=(0, 1, 2), has_aux=True))
    args = example(SCHEMES[name].cell)
    for seq_lengths in (FULL, LENGTHS):
        gradients, (carry, ys) = differentiate(*args, jnp.asarray(seq_lengths))

        def in_numpy(*args: Any, seq_lengths: Any = seq_lengths) -> tuple[Any, Any]:
            return equations.loop(step, *args, masks, seq_lengths)

        want_carry, want_ys = in_numpy(*args)
        pairs = zip(equations.as_tuple(carry), equations.as_tuple(want_carry), strict=True)
        for got, want in [*pairs, (ys, want_ys)]:
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
        check_gradients(gradients, args, lambda *args: loss(*in_numpy(*args)))


def check_gradients(gradients: Any, args: Any, loss: Callable[..., Any]) -> None:
    """Along directions in which all weights, the carry and the inputs move at once.

    The imaginary part after a tiny imaginary step is the derivative, to the last digit.
    """
    leaves, structure = jax.tree.flatten(args)
    for seed in (30, 31, 32):
        way = [draw(leaf.shape, 100 * seed + index) for index, leaf in enumerate(leaves)]
        moved = [np.float64(leaf) + 1e-30j * step for leaf, step in zip(leaves, way, strict=True)]
        want = loss(*jax.tree.unflatten(structure, moved)).imag / 1e-30
        parts = [
            np.float64(gradient) * step
            for gradient, step in zip(jax.tree.leaves(gradients), way, strict=True)
        ]
        scale = sum(float(np.abs(part).sum()) for part in parts)
        assert scale > 1
        assert abs(sum(float(part.sum()) for part in parts) - want) < 1e-5 * scale


# The traps that implementations elsewhere fell into.


@schemes
def test_nothing_explodes_in_a_thousand_steps(name: str) -> None:
    """tensorflow#11650: dropout on an LSTM's c grows by 1 / keep_prob at each step."""
    params, carry, _ = example(SCHEMES[name].cell)
    xs = jnp.asarray(draw((1000, BATCH, FEATURES), 7))
    carry, ys = jax.jit(lambda *args: run(name, *args))(params, carry, xs, jax.random.key(0))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves((carry, ys)))
    assert largest < 50


@pytest.mark.parametrize("variational", [True, False], ids=["variational", "step"])
def test_scaling_dropout_on_the_memory_is_refused(variational: bool) -> None:
    params, carry, xs = example("lstm")
    noise = fdc.Dropout(keep_prob=KEEP, variational=variational)
    with pytest.raises(ValueError, match=r"inside\['memory'\].*explode.*scale=False"):
        fdc.dropout_scan(
            params, carry, xs, jax.random.key(0), cell=fdc.lstm_cell,
            dropout=fdc.RecurrentDropout(inside={"memory": noise}),
        )  # fmt: skip


@schemes
def test_evaluation_draws_nothing(name: str) -> None:
    """Keras draws masks in evaluation too; haste once leaked them into it."""
    args = example(SCHEMES[name].cell)
    program = str(jax.make_jaxpr(lambda *args: run(name, *args, None))(*args))
    assert "random" not in program
    assert "threefry" not in program
    training = jax.make_jaxpr(lambda *args: run(name, *args))(*args, jax.random.key(0))
    assert "random_bits" in str(training)


@schemes
def test_masks_are_drawn_anew(name: str) -> None:
    """In TensorFlow 2 a variational mask was drawn once, for good."""
    masks, others = masks_of(name, 0), masks_of(name, 1)
    once = variational_sites(SCHEMES[name].spec)
    assert masks[0].keys() == others[0].keys()
    for site in masks[0]:
        assert differs(masks[0][site], others[0][site])
        assert differs(masks[0][site], masks[1][site]) != (site in once)


def variational_sites(spec: fdc.RecurrentDropout) -> set[str]:
    """By the names that they have in `masks_of`."""
    around = {"params": spec.params, "input": spec.input, "output": spec.output, "c": spec.state}
    found = set()
    for name, prefix in {**around, **spec.inside}.items():
        entries = jax.tree.leaves(prefix, is_leaf=lambda node: hasattr(node, "variational"))
        # A lazy prefix has its noise in a field.
        if any(getattr(entry, "noise", entry).variational for entry in entries):
            found.add(name)
    return found


def differs(ours: Any, theirs: Any) -> bool:
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return any((a != b).any() for a, b in pairs)


def test_zoneout_emits_what_it_carries_on() -> None:
    """RETURNN and haste emitted the un-zoned h."""
    args = example("lstm")
    (_, h), ys = run("Krueger 2016", *args, jax.random.key(0))
    np.testing.assert_array_equal(ys[-1], h)
    frozen_h = recipes.krueger2016(cell_prob=0.0, hidden_prob=1.0)
    _, ys = fdc.dropout_scan(*args, jax.random.key(0), cell=fdc.lstm_cell, dropout=frozen_h)
    np.testing.assert_array_equal(ys, np.broadcast_to(args[1][1], ys.shape))


def test_padding_leaves_zoneout_alone() -> None:
    """A row's carry is that of its last valid step, whatever is drawn on the padding."""
    args = example("lstm")
    carry, _ = run("Krueger 2016", *args, jax.random.key(0), jnp.asarray(LENGTHS))
    for row, length in enumerate(LENGTHS):
        params, first, xs = args
        alone, _ = run("Krueger 2016", params, first, xs[:length], jax.random.key(0))
        for leaf, want in zip(carry, alone, strict=True):
            np.testing.assert_array_equal(leaf[row], want[row])


def test_weights_are_dropped_for_one_call_only() -> None:
    """Elsewhere it was cut off (fastai), or the weights were zeroed for good (Better_LSTM)."""
    params, carry, xs = example("lstm")

    def gradient(rng: Any) -> Any:
        def with_loss(params: Any) -> Any:
            return loss(*run("Merity 2017", params, carry, xs, rng))

        return jax.grad(with_loss)(params).recurrent_kernel

    before = params.recurrent_kernel.copy()
    one, two = (np.asarray(gradient(jax.random.key(seed))) for seed in (0, 1))
    masks = [masks_of("Merity 2017", seed)[0]["params"] for seed in (0, 1)]
    for found, mask in zip((one, two), masks, strict=True):
        np.testing.assert_array_equal(found != 0, mask.recurrent_kernel)
    assert (masks[0].recurrent_kernel != masks[1].recurrent_kernel).any()
    np.testing.assert_array_equal(params.recurrent_kernel, before)
    assert np.asarray(gradient(None)).all()

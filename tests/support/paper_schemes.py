"""The published schemes as a table, with an example to run each on and the masks it draws there.

The masks of a step are what `draw_masks` draws from the step's key, for sites and leaves have the
same keys there.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
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
    "Wan 2013": lstm_scheme(
        fdc.RecurrentDropout(
            params=fdc.at_paths(fdc.Dropout(keep_prob=KEEP, variational=True), "*kernel")
        ), equations.wan,
    ),
    "Merity 2017": lstm_scheme(
        recipes.merity2017(weight_keep_prob=KEEP, input_keep_prob=KEEP), equations.merity
    ),
    "Graves, per step": lstm_scheme(graves(variational=False), equations.graves),
    "Graves, variational": lstm_scheme(graves(variational=True), equations.graves),
}  # fmt: skip
schemes = pytest.mark.parametrize("name", SCHEMES)
CELLS = {"lstm": fdc.lstm_cell, "gru": fdc.gru_cell}


def draw(shape: tuple[int, ...], seed: int) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def example(cell: str) -> tuple[Any, Any, Any]:
    """Weights, an initial carry and inputs, none of them zero."""
    width = (4 if cell == "lstm" else 3) * UNITS
    input_kernel, recurrent_kernel = draw((FEATURES, width), 0) / 2, draw((UNITS, width), 1) / 2
    lstm = fdc.LSTMParams(input_kernel, recurrent_kernel, draw((width,), 2) / 2)
    c, h = draw((BATCH, UNITS), 4), np.tanh(draw((BATCH, UNITS), 5))
    xs = draw((STEPS, BATCH, FEATURES), 6)
    if cell == "lstm":
        return lstm, (c, h), xs
    return fdc.GRUParams(*lstm, recurrent_bias=draw((UNITS,), 3)), h, xs


def frozen(spec: fdc.RecurrentDropout) -> fdc.RecurrentDropout:
    """The same noises, each drawn once."""
    return jax.tree.map(
        lambda noise: dataclasses.replace(noise, variational=True),
        spec,
        is_leaf=lambda node: isinstance(node, fdc.Noise),
    )


@functools.cache
def drawer(name: str) -> Callable[..., Any]:
    """The draws of `dropout_scan`: once from its key, and from each step's own key."""
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


def run(name: str, *args: Any) -> Any:
    """Runs a scheme on `params, carry, xs, rng` and, if given, lengths."""
    params, carry, xs, rng, *lengths = args
    scheme = SCHEMES[name]
    return fdc.dropout_scan(
        params, carry, xs, rng,
        cell=CELLS[scheme.cell], dropout=scheme.spec, seq_lengths=lengths[0] if lengths else None,
    )  # fmt: skip


def loss(carry: Any, ys: Any) -> Any:
    """Reads every number that comes out, each with a weight of its own."""
    return sum(
        (leaf * draw(leaf.shape, 20 + index)).sum()
        for index, leaf in enumerate([*equations.as_tuple(carry), ys])
    )


def assert_close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)

"""docs/schemes.md: every row has code that runs, says truly when it draws, and has a test."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paper_schemes import SCHEMES, example

import flax_dropout_cell as fdc

PAGE = Path(__file__).parents[2] / "docs" / "schemes.md"
LINE = re.compile(
    r"^\| ([^|`]+) \|.*\| (once per sequence|at each step) \| `([^`]+)` \|.*\|$", re.M
)
ROWS = {name: (drawn, code) for name, drawn, code in LINE.findall(PAGE.read_text())}
rows = pytest.mark.parametrize("name", ROWS)

TESTED = {
    "Zaremba": ["Zaremba 2014"],
    "Gal, tied": ["Gal 2016, tied", "Gal 2016, tied, GRU"],
    "Gal, untied": ["Gal 2016, untied", "Gal 2016, untied, GRU"],
    "Semeniuta": ["Semeniuta 2016", "Semeniuta 2016, GRU"],
    "RNNDrop": ["Moon 2015"],
    "zoneout": ["Krueger 2016", "Krueger 2016, GRU"],
    "DropConnect": ["Wan 2013"],
    "weight-drop": ["Merity 2017"],
    "weight noise": ["Graves, variational"],
    "weight noise, fresh": ["Graves, per step"],
    "concrete dropout": [],  # in test_noises.py
}
"""The schemes of `SCHEMES` for each row."""


def test_every_row_is_tested_and_every_scheme_has_a_row() -> None:
    assert [*ROWS] == [*TESTED]
    tested = [scheme for schemes in TESTED.values() for scheme in schemes]
    assert sorted(tested) == sorted(SCHEMES)


def spec_on_page(name: str) -> fdc.RecurrentDropout:
    return eval(ROWS[name][1], {"fdc": fdc, "jnp": jnp})


@rows
def test_a_row_says_when_it_draws(name: str) -> None:
    spec = spec_on_page(name)
    drawn = {variational for noises in kinds(spec, "input").values() for _, variational in noises}
    assert drawn == {ROWS[name][0] == "once per sequence"}
    for scheme in (SCHEMES[other] for other in TESTED[name]):
        if scheme.cell == "lstm":
            assert kinds(spec) == kinds(scheme.spec)


def kinds(spec: fdc.RecurrentDropout, *more: str) -> dict[str, set[tuple[type, bool]]]:
    """The kinds of noise at a site; a recipe has more arguments than a row uses."""
    sites = {"params": spec.params, "state": spec.state, **spec.inside}
    found = {}
    for site, prefix in (sites | {site: getattr(spec, site) for site in more}).items():
        # A lazy prefix has its noise in a field.
        prefix = getattr(prefix, "noise", prefix)
        noises = jax.tree.leaves(prefix, is_leaf=lambda node: hasattr(node, "draw_mask"))
        drawing = [noise for noise in noises if not getattr(noise, "is_identity", False)]
        found[site] = {(type(noise), noise.variational) for noise in drawing}
    return {site: noises for site, noises in found.items() if noises}


@rows
def test_a_row_runs_and_disturbs(name: str) -> None:
    params, carry, xs = example("lstm")

    def run(rng: Any) -> Any:
        return fdc.dropout_scan(
            params, carry, xs, rng, cell=fdc.lstm_cell, dropout=spec_on_page(name)
        )

    _, trained = run(jax.random.key(0))
    _, evaluated = run(None)
    assert np.isfinite(trained).all() and (np.asarray(trained) != np.asarray(evaluated)).any()


def page_names() -> dict[str, Any]:
    """The definitions in the page's code."""
    code = "\n".join(re.findall(r"^(?:>>>|\.\.\.) (.*)$", PAGE.read_text(), re.M))
    names: dict[str, Any] = {}
    exec(compile(code, PAGE.name, "exec"), names)
    return names


def test_fraternal_dropout_is_the_papers_loss() -> None:
    """(l(z1) + l(z2)) / 2 + kappa mean((z1 - z2)**2), of two sets of masks."""
    params, carry, xs = example("lstm")
    spec = fdc.recipes.zaremba2014(input_keep_prob=0.5)

    def predict(rng: jax.Array) -> jax.Array:
        return fdc.dropout_scan(params, carry, xs, rng, cell=fdc.lstm_cell, dropout=spec)[1]

    def loss(outputs: jax.Array) -> jax.Array:
        return jnp.abs(outputs).mean()

    fraternal_loss = page_names()["fraternal_loss"]
    got = jax.jit(lambda rng: fraternal_loss(loss, predict, rng, kappa=0.3))(jax.random.key(4))
    one, two = (np.asarray(predict(rng)) for rng in jax.random.split(jax.random.key(4), 2))
    want = (np.abs(one).mean() + np.abs(two).mean()) / 2 + 0.3 * ((one - two) ** 2).mean()
    assert (one != two).any()
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_curriculum_dropout_is_the_papers_schedule_and_compiles_once() -> None:
    curriculum = page_names()["curriculum"]
    traces = []

    @jax.jit
    def kept(step: jax.Array) -> jax.Array:
        traces.append(step)
        keep_prob = curriculum(step, total_steps=1000, target=0.5)
        spec = fdc.recipes.zaremba2014(input_keep_prob=keep_prob)
        _, seen = fdc.dropout_scan(
            None, None, jnp.ones((50, 100, 20)), jax.random.key(0),
            cell=lambda params, carry, x: (carry, x), dropout=spec,
        )  # fmt: skip
        return (seen != 0).mean()

    for step in (0, 100, 1000):
        want = 0.5 * np.exp(-step / 100) + 0.5
        spread = 5 * np.sqrt(want * (1 - want) / 100_000)
        assert abs(kept(jnp.float32(step)) - want) <= spread + 1e-6
    assert len(traces) == 1

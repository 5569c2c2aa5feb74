"""The recipes: where each puts its noises, and that in a stack no wire is dropped twice."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_dropout_cell as fdc
from flax_dropout_cell import recipes

KEEP = 0.5
STEPS, BATCH, UNITS = 20, 8, 64


def identity_cell(
    params: Any, carry: Any, x: jax.Array, *, disturb: Any = fdc.undisturbed
) -> tuple[Any, jax.Array]:
    """Emits its input unchanged, and calls all of the recipes' sites on the side."""
    c, h = carry  # zeros, which no mask changes
    c = disturb("candidate", disturb("recurrent", c))
    c = disturb("recurrent_per_gate", jnp.stack([c] * 4, axis=-2))[..., 0, :]
    x = disturb("input_per_gate", jnp.stack([x] * 4, axis=-2))[..., 0, :]
    return (c, disturb("hidden", h, h)), x


class Layer(NamedTuple):
    """A recipe as a function of whether it is the last layer's, and the wires that it drops."""

    make: Callable[[float], fdc.RecurrentDropout]
    wires: int


LAYERS = {
    "zaremba2014": Layer(
        lambda out: recipes.zaremba2014(input_keep_prob=KEEP, output_keep_prob=out), 3
    ),
    "gal2016, tied": Layer(
        lambda out: recipes.gal2016(
            input_keep_prob=KEEP, recurrent_keep_prob=KEEP, output_keep_prob=out
        ), 3,
    ),
    "gal2016, untied": Layer(
        lambda out: recipes.gal2016(
            input_keep_prob=KEEP, recurrent_keep_prob=KEEP, output_keep_prob=out, tied=False
        ), 3,
    ),
    "semeniuta2016": Layer(
        lambda out: recipes.semeniuta2016(
            candidate_keep_prob=KEEP, input_keep_prob=KEEP, output_keep_prob=out
        ), 3,
    ),
    "krueger2016": Layer(lambda out: recipes.krueger2016(), 0),
    "merity2017": Layer(lambda out: recipes.merity2017(input_keep_prob=KEEP), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_no_wire_of_a_stack_is_dropped_twice(name: str) -> None:
    """Ones come in, and every layer passes them on: the powers of 1 / keep_prob are counted."""
    layer = LAYERS[name]
    params = {"recurrent_kernel": jnp.ones((UNITS, 4 * UNITS))}
    zeros, ys = jnp.zeros((BATCH, UNITS)), jnp.ones((STEPS, BATCH, UNITS))
    for index, spec in enumerate([layer.make(1.0), layer.make(KEEP)]):
        _, ys = fdc.dropout_scan(
            params, (zeros, zeros), ys, jax.random.key(index), cell=identity_cell, dropout=spec
        )
    kept = np.asarray(ys) != 0
    np.testing.assert_array_equal(ys, np.where(kept, KEEP**-layer.wires, 0))
    # A mask that is shared by all steps counts as one draw.
    draws = kept[:1] if (kept == kept[:1]).all() else kept
    chance = KEEP**layer.wires
    assert abs(draws.mean() - chance) <= 5 * (chance * (1 - chance) / draws.size) ** 0.5


def entries(spec: fdc.RecurrentDropout) -> dict[str, Any]:
    around = {name: getattr(spec, name) for name in ("input", "state", "output", "params")}
    return {name: entry for name, entry in {**around, **spec.inside}.items() if entry is not None}


def dropout(keep_prob: Any, variational: bool = False) -> fdc.Dropout:
    return fdc.Dropout(keep_prob=keep_prob, variational=variational)


def test_where_each_recipe_puts_its_noises() -> None:
    assert entries(recipes.zaremba2014(input_keep_prob=0.5, output_keep_prob=0.25)) == {
        "input": dropout(0.5), "output": dropout(0.25),
    }  # fmt: skip
    gal = recipes.gal2016(input_keep_prob=0.5, recurrent_keep_prob=0.25, output_keep_prob=0.75)
    assert entries(gal) == {
        "input": dropout(0.5, True),
        "recurrent": dropout(0.25, True),
        "output": dropout(0.75, True),
    }
    untied = recipes.gal2016(input_keep_prob=0.5, recurrent_keep_prob=0.25, tied=False)
    assert entries(untied) == {
        "input_per_gate": dropout(0.5, True),
        "recurrent_per_gate": dropout(0.25, True),
        "output": dropout(1.0, True),
    }
    assert entries(recipes.semeniuta2016(candidate_keep_prob=0.75)) == {
        "input": dropout(1.0), "candidate": dropout(0.75), "output": dropout(1.0),
    }  # fmt: skip
    assert entries(recipes.krueger2016()) == {
        "state": (fdc.Zoneout(prob=0.5), None), "hidden": fdc.Zoneout(prob=0.05),
    }  # fmt: skip
    merity = recipes.merity2017(weight_keep_prob=0.25, input_keep_prob=0.75)
    assert merity.params == fdc.recurrent_kernels(dropout(0.25, True))
    assert merity.input == dropout(0.75, True)
    assert not merity.inside


RECIPES = [value for name, value in vars(recipes).items() if name[-4:].isdigit()]
NUMBERS = [
    (build, name)
    for build in RECIPES
    for name in inspect.signature(build).parameters
    if name.endswith("prob")
]


@pytest.mark.parametrize(("build", "name"), NUMBERS)
def test_an_error_has_the_recipes_name_for_a_number(build: Any, name: str) -> None:
    needed = inspect.signature(build).parameters.values()
    options = {it.name: 0.5 for it in needed if it.default is inspect.Parameter.empty}
    with pytest.raises(ValueError, match=f"^{name} must be between 0 and 1, got 80"):
        build(**options | {name: 80})


SIGNATURES = {
    "zaremba2014": {"input_keep_prob": None, "output_keep_prob": 1.0},
    "gal2016": {
        "input_keep_prob": None, "recurrent_keep_prob": None, "output_keep_prob": 1.0, "tied": True,
    },
    "semeniuta2016": {
        "candidate_keep_prob": None, "input_keep_prob": 1.0, "output_keep_prob": 1.0,
    },
    "krueger2016": {"cell_prob": 0.5, "hidden_prob": 0.05},
    "merity2017": {"weight_keep_prob": 0.5, "input_keep_prob": 1.0},
}  # fmt: skip


def test_signatures() -> None:
    """By name only, and a default only where the paper has one configuration."""
    found = {}
    for recipe in RECIPES:
        parameters = inspect.signature(recipe).parameters.values()
        assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters)
        found[recipe.__name__] = {
            parameter.name: None if parameter.default is parameter.empty else parameter.default
            for parameter in parameters
        }
    assert found == SIGNATURES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_docstrings_name_the_paper_and_what_is_left_out(recipe: Any) -> None:
    assert "arXiv:" in recipe.__doc__
    assert "Not in the spec:" in recipe.__doc__


def test_probabilities_may_be_arrays() -> None:
    """A schedule does not retrace."""
    params = fdc.init_lstm(jax.random.key(0), 3, 8)
    carry, xs = (jnp.zeros((2, 8)), jnp.zeros((2, 8))), jnp.ones((4, 2, 3))
    traces = []

    @jax.jit
    def run(keep_prob: jax.Array) -> jax.Array:
        traces.append(None)
        spec = recipes.gal2016(input_keep_prob=keep_prob, recurrent_keep_prob=keep_prob)
        return fdc.dropout_scan(
            params, carry, xs, jax.random.key(1), cell=fdc.lstm_cell, dropout=spec
        )[1]

    plain, half = run(jnp.float32(1)), run(jnp.float32(0.5))
    assert len(traces) == 1
    assert (plain != half).any()


@pytest.mark.parametrize("made", [tuple, fdc.LSTMState._make], ids=["(c, h)", "LSTMState"])
@pytest.mark.parametrize("written", [tuple, fdc.LSTMState._make], ids=["(c, h)", "LSTMState"])
def test_a_pair_of_noises_is_for_c_and_h(made: Any, written: Any) -> None:
    """Whichever way the pair and the carry are written, the same masks reach the same leaves."""
    params = fdc.init_lstm(jax.random.key(0), 3, 8)
    rows, xs = [jnp.zeros((2, 8))] * 2, jnp.ones((4, 2, 3))
    spec = recipes.krueger2016(cell_prob=0.5)
    want, want_ys = fdc.dropout_scan(
        params, tuple(rows), xs, jax.random.key(1), cell=fdc.lstm_cell, dropout=spec
    )
    spec = dataclasses.replace(spec, state=written(spec.state))
    carry, ys = fdc.dropout_scan(
        params, made(rows), xs, jax.random.key(1), cell=fdc.lstm_cell, dropout=spec
    )
    assert type(carry) is type(made(rows))
    np.testing.assert_array_equal(ys, want_ys)
    np.testing.assert_array_equal(carry[0], want[0])

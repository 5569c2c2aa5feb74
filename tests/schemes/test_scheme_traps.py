"""The traps that implementations of recurrent dropout elsewhere fell into, each with a test.

One more, a mask that reaches one direction alone (fastai), is in test_schemes_in_hosts.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paper_schemes import (
    BATCH,
    FEATURES,
    LENGTHS,
    SCHEMES,
    draw,
    example,
    loss,
    masks_of,
    run,
    schemes,
)
from quick_prng import quick_key
from scheme_equations import KEEP

import flax_dropout_cell as fdc
from flax_dropout_cell import recipes


@schemes
def test_nothing_explodes_in_a_thousand_steps(name: str) -> None:
    """tensorflow#11650: dropout on an LSTM's c grows by 1 / keep_prob at each step."""
    params, carry, _ = example(SCHEMES[name].cell)
    xs = jnp.asarray(draw((1000, BATCH, FEATURES), 7))
    carry, ys = jax.jit(lambda *args: run(name, *args))(params, carry, xs, quick_key(0))
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
    program = str(jax.make_jaxpr(lambda *args: run(name, *args))(*args, None))
    assert "random" not in program
    assert "threefry" not in program
    training = jax.make_jaxpr(lambda *args: run(name, *args))(*args, jax.random.key(0))
    assert "random_bits" in str(training)


# The masks that each paper draws once per sequence; it draws its others at every step.
ONCE_PER_SEQUENCE: dict[str, set[str]] = {
    "Zaremba 2014": set(),
    "Gal 2016, tied": {"input", "recurrent", "output"},
    "Gal 2016, untied": {"input_per_gate", "recurrent_per_gate", "output"},
    "Semeniuta 2016": set(),
    "Moon 2015": {"memory"},
    "Krueger 2016": set(),
    "Wan 2013": {"params"},
    "Merity 2017": {"params", "input"},
    "Graves, per step": set(),
    "Graves, variational": {"params"},
}


@schemes
def test_masks_are_drawn_anew(name: str) -> None:
    """In TensorFlow 2 a variational mask was drawn once, for good."""
    masks, others = masks_of(name, 0), masks_of(name, 1)
    once = ONCE_PER_SEQUENCE[name.removesuffix(", GRU")]
    assert masks[0].keys() == others[0].keys()
    assert once <= masks[0].keys()
    for site in masks[0]:
        assert differs(masks[0][site], others[0][site])
        assert differs(masks[0][site], masks[1][site]) != (site in once)


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


def test_evaluation_of_zoneout_is_what_training_gives_on_average() -> None:
    """MXNet's gives the new state, as if nothing had ever been zoned out."""
    params, carry, xs = example("lstm")
    spec = SCHEMES["Krueger 2016"].spec

    def step(rng: Any) -> Any:
        return fdc.dropout_cell(params, carry, xs[0], rng, cell=fdc.lstm_cell, dropout=spec)[0]

    samples = jax.jit(jax.vmap(step))(jax.random.split(jax.random.key(0), 4000))
    new, _ = fdc.lstm_cell(params, carry, xs[0])
    for sampled, expected, bare in zip(samples, step(None), new, strict=True):
        bound = 5 * sampled.std(axis=0) / 4000**0.5 + 1e-5
        assert (jnp.abs(sampled.mean(axis=0) - expected) <= bound).all()
        assert (jnp.abs(expected - bare) > bound).any()


def test_padding_leaves_zoneout_alone() -> None:
    """A row's carry is that of its last valid step, whatever is drawn on the padding."""
    params, first, xs = example("lstm")
    padded = jax.jit(lambda *args: run("Krueger 2016", params, first, xs, *args))
    carry, _ = padded(quick_key(0), jnp.asarray(LENGTHS))
    for row, length in enumerate(LENGTHS):
        alone, _ = padded(quick_key(0), jnp.full(BATCH, length))
        for leaf, want in zip(carry, alone, strict=True):
            np.testing.assert_array_equal(leaf[row], want[row])


def test_weights_are_dropped_for_one_call_only() -> None:
    """Elsewhere it was cut off (fastai), or the weights were zeroed for good (Better_LSTM)."""
    params, carry, xs = example("lstm")

    def gradient(rng: Any) -> Any:
        def with_loss(params: Any) -> Any:
            return loss(*run("Merity 2017", params, carry, xs, rng))

        return jax.jit(jax.grad(with_loss))(params).recurrent_kernel

    before = params.recurrent_kernel.copy()
    one, two = (np.asarray(gradient(jax.random.key(seed))) for seed in (0, 1))
    masks = [masks_of("Merity 2017", seed)[0]["params"] for seed in (0, 1)]
    for found, mask in zip((one, two), masks, strict=True):
        np.testing.assert_array_equal(found != 0, mask.recurrent_kernel)
    assert (masks[0].recurrent_kernel != masks[1].recurrent_kernel).any()
    np.testing.assert_array_equal(params.recurrent_kernel, before)
    assert np.asarray(gradient(None)).all()

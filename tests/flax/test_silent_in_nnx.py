"""Mistakes in NNX that would leave no trace: dropout that is off, frozen, redrawn or lost."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from added_noise import Added
from asserts import assert_same
from flax import nnx
from nnx_cells import PER_STEP, VARIATIONAL, Sum, start
from probes import BATCH, SHAPE, UNITS

import flax_dropout_cell as fdc
from flax_dropout_cell.nnx import DropoutCell

X = jnp.ones(SHAPE)
XS = jnp.ones((BATCH, 1, UNITS))
CARRY = jnp.zeros((BATCH, UNITS))
SPEC = fdc.RecurrentDropout(input=VARIATIONAL)


def layer_of(noise: Any) -> Any:
    return fdc.nnx.RNN(Sum(), fdc.RecurrentDropout(input=noise), rngs=nnx.Rngs(dropout=0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: fdc.nnx.RNN(Sum(), SPEC, nnx.Rngs(0)),  # type: ignore[arg-type]
        lambda: DropoutCell(Sum(), SPEC, nnx.Rngs(0)),  # type: ignore[arg-type]
        lambda: fdc.nnx.Embed(9, 4, 0.5, deterministic=nnx.Rngs(0), rngs=nnx.Rngs(0)),  # type: ignore[arg-type]
    ],
    ids=["RNN", "DropoutCell", "Embed"],
)
def test_a_stream_in_the_place_of_deterministic_would_be_true(make: Any) -> None:
    with pytest.raises(TypeError, match="deterministic must be True or False, got an Rngs"):
        make()


def test_a_word_in_the_place_of_deterministic_would_be_true() -> None:
    calls = [
        lambda word: layer_of(PER_STEP)(XS, deterministic=word),
        lambda word: DropoutCell(Sum(), SPEC, rngs=nnx.Rngs(0)).redraw_masks(
            CARRY, X, deterministic=word
        ),
        lambda word: fdc.linen.RNN(fdc.linen.LSTMCell(4), SPEC).init(
            jax.random.key(0), XS, deterministic=word
        ),
        lambda word: fdc.linen.RNN(fdc.linen.LSTMCell(4), SPEC, deterministic=word).init(
            jax.random.key(0), XS
        ),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="deterministic must be True or False, got 'False'"):
            call("False")
    assert_same(layer_of(PER_STEP)(XS, deterministic=np.bool_(True)), XS)


class Shifted(nnx.Linear):
    """A linear layer that does more than its kernel and bias say, as one with LoRA does."""

    def __call__(self, inputs: jax.Array, *args: Any) -> jax.Array:
        return super().__call__(inputs, *args) + 1


@pytest.mark.parametrize("cell_class", [fdc.nnx.LSTMCell, fdc.nnx.GRUCell])
@pytest.mark.parametrize("name", ["dense_i", "dense_h"])
def test_a_layer_in_the_place_of_a_cells_linear_one(cell_class: Any, name: str) -> None:
    cell = cell_class(UNITS, UNITS, rngs=nnx.Rngs(0))
    old = getattr(cell, name)
    setattr(cell, name, Shifted(UNITS, old.kernel.shape[1], rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"cannot hold a Shifted\. Use Flax's own cell"):
        cell(cell.initialize_carry(X.shape, nnx.Rngs(0)), X)


def added(mask: jax.Array, stddev: jax.Array) -> jax.Array:
    return X + stddev * mask


def concrete(mask: jax.Array, logit: jax.Array) -> jax.Array:
    """Equation 5 of Gal et al. 2017 at x = 1, with the mean kept."""
    dropped = jax.nn.sigmoid((logit + jnp.log(mask) - jnp.log(1 - mask)) / 0.1)
    return (1 - dropped) / (1 - jax.nn.sigmoid(logit))


LEARNED: dict[str, tuple[Callable[[Any], Any], float, Callable[..., jax.Array]]] = {
    "GaussianNoise": (lambda it: fdc.GaussianNoise(stddev=it, variational=True), 0.5, added),
    "a user's": (lambda it: Added(stddev=it, reparameterized=True), 0.5, added),
    "ConcreteDropout": (lambda it: fdc.ConcreteDropout(logit=it, variational=True), -1.0, concrete),
}


def gradients_of_windows(noise: Any) -> tuple[jax.Array, list[jax.Array]]:
    """The mask of a sequence of three windows, and each window's gradient by the one number."""
    cell = DropoutCell(Sum(), fdc.RecurrentDropout(input=noise), rngs=nnx.Rngs(0))
    carry: Any = start(cell)
    mask, found = carry.masks.input, []

    def loss(cell: Any, carry: Any) -> tuple[jax.Array, Any]:
        carry, y = cell(carry, X)
        return y.sum(), carry

    for _ in range(3):
        grads, carry = nnx.grad(loss, has_aux=True)(cell, carry)
        found += jax.tree.leaves(grads)
    return mask, found


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_number_has_its_gradient_in_every_window(name: str) -> None:
    """The carry brings the deviates, and the number is the spec's own."""
    make, number, by_hand = LEARNED[name]
    mask, found = gradients_of_windows(make(nnx.Param(jnp.float32(number))))
    wanted = jax.grad(lambda number: by_hand(mask, number).sum())(jnp.float32(number))
    np.testing.assert_allclose(found, [wanted] * 3, rtol=1e-3)


def test_a_noise_that_may_draw_with_its_number_keeps_the_number_too() -> None:
    """As docs/noise.md says of one without `reparameterized`."""
    _, found = gradients_of_windows(Added(stddev=nnx.Param(jnp.float32(0.5))))
    assert found == [0, 0, 0]  # the carry was made before the loss, and holds the number


def test_an_array_keep_prob_stays_that_of_the_masks() -> None:
    """Dropout's masks are drawn with it, so a new value waits for new masks."""

    def cell_of(keep_prob: float) -> Any:
        noise = fdc.Dropout(keep_prob=jnp.float32(keep_prob), variational=True)
        return DropoutCell(Sum(), fdc.RecurrentDropout(input=noise), rngs=nnx.Rngs(0))

    _, y = cell_of(0.25)(start(cell_of(0.5)), X)
    assert set(np.unique(y)) == {0, 2}


@pytest.mark.filterwarnings("ignore:keep_rngs")
def test_a_bare_cells_stream_does_not_become_the_stream_of_the_masks() -> None:
    def bare() -> Any:
        return nnx.LSTMCell(UNITS, UNITS, rngs=nnx.Rngs(0), keep_rngs=True)

    cell = DropoutCell(bare(), SPEC, rngs=nnx.Rngs(dropout=1))
    want = start(nnx.clone(cell)).masks.input
    nnx.update(cell, nnx.state(bare()))
    assert_same(start(cell).masks.input, want)


def test_learned_numbers_load_where_they_were() -> None:
    """A site that is new has its own number, whatever the order of the sites."""

    def cell_of(**logits: float) -> Any:
        spec = fdc.RecurrentDropout(
            **{
                site: fdc.ConcreteDropout(logit=nnx.Param(jnp.float32(logit)))  # type: ignore[arg-type]
                for site, logit in logits.items()
            }
        )
        return DropoutCell(Sum(), spec, rngs=nnx.Rngs(0))

    new = cell_of(input=0.0, output=0.0)
    nnx.update(new, nnx.state(cell_of(output=5.0), nnx.Param))
    assert (new.dropout.input.logit, new.dropout.output.logit) == (0, 5)
    old = cell_of(input=0.0)
    with pytest.raises(ValueError, match=r"output\.logit"):  # Flax 0.11 refuses to load it
        nnx.update(old, nnx.state(cell_of(output=5.0), nnx.Param))
        old.dropout  # noqa: B018


def test_arrays_of_sites_with_odd_names_stay_apart() -> None:
    noises = [fdc.Dropout(keep_prob=jnp.float32(prob)) for prob in (0.25, 0.75)]
    spec = fdc.RecurrentDropout(inside={"a/b": noises[0], "a": {"b": noises[1]}})
    again = DropoutCell(Sum(), spec, rngs=nnx.Rngs(0)).dropout
    assert (again.inside["a/b"].keep_prob, again.inside["a"]["b"].keep_prob) == (0.25, 0.75)


@pytest.mark.parametrize(
    ("cell", "kept"),
    [
        (
            lambda rngs: fdc.nnx.GRUCell(
                3, 8, use_recurrent_bias=True, activation_fn=nnx.relu, rngs=rngs
            ),
            {"use_recurrent_bias": True, "activation_fn": nnx.relu},
        ),
        (
            lambda rngs: fdc.nnx.LRUCell(3, 8, min_radius=0.5, max_phase=0.25, rngs=rngs),
            {"min_radius": 0.5, "max_radius": 1.0, "max_phase": 0.25},
        ),
    ],
    ids=["GRU", "LRU"],
)
def test_the_config_of_a_wrapper_keeps_how_its_cell_was_made(cell: Any, kept: Any) -> None:
    wrapper = fdc.nnx.RNNCellDropoutWrapper(cell(nnx.Rngs(0)), input_keep_prob=0.5)
    again = fdc.nnx.RNNCellDropoutWrapper.from_config(wrapper.get_config(), nnx.Rngs(0))
    assert {name: getattr(again.cell, name) for name in kept} == kept


def test_a_stream_that_the_caller_closes_over() -> None:
    layer, rngs = layer_of(PER_STEP), nnx.Rngs(dropout=0)
    with pytest.raises(ValueError, match=r"got rngs= that jax.jit.*closes over.*key to the funct"):
        jax.jit(lambda xs: layer(xs, rngs=rngs))(XS)


def test_a_stream_that_was_split() -> None:
    layer = layer_of(PER_STEP)
    with (
        nnx.split_rngs(layer, splits=3),
        pytest.raises(ValueError, match=r"stream of RNN holds keys of shape \(3,\).*in nnx.vmap"),
    ):
        layer(XS)


def test_a_carry_that_is_an_array_is_named_by_its_shape() -> None:
    with pytest.raises(TypeError, match=r"must be a DropoutCarry, got float32\[4, 16\]: start"):
        jax.jit(DropoutCell(Sum(), SPEC, deterministic=True))(jnp.zeros((4, 16)), jnp.ones((4, 16)))

"""A spec is a pytree: its numbers are structure, its arrays are data."""

import dataclasses
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

import flax_dropout_cell as fdc

RNG = jax.random.key(3)


def nested_spec(keep_prob, **options) -> fdc.RecurrentDropout:
    noise = fdc.Dropout(keep_prob=keep_prob, variational=True, **options)
    return fdc.RecurrentDropout(
        input=noise, state=({"a": None}, [noise]), params={"w": (noise, None)}, inside={"m": noise}
    )


def draw(spec: fdc.RecurrentDropout, rng: jax.Array = RNG) -> jax.Array:
    def emit(params, carry, x):
        return carry, x

    only_input = dataclasses.replace(spec, state=None, params=None, inside={})
    _, ys = fdc.dropout_scan(None, None, jnp.ones((3, 4, 64)), rng, cell=emit, dropout=only_input)
    return ys


@pytest.mark.parametrize("number", [0.5, 0.7, 1, 0, np.float32(0.7), np.int64(1)])
def test_numbers_are_structure(number) -> None:
    spec = nested_spec(number)
    assert jax.tree.leaves(spec) == []
    assert hash(spec) == hash(nested_spec(number))
    assert spec == nested_spec(number)
    assert spec != nested_spec(0.25)


@pytest.mark.parametrize("array", [jnp.float32(0.7), np.array(0.7, "float32")])
def test_arrays_are_data(array) -> None:
    spec = nested_spec(array)
    assert [leaf is array for leaf in jax.tree.leaves(spec)] == [True] * 4
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(spec)]
    assert paths[0] == ".input.keep_prob"
    assert spec == nested_spec(array)
    with pytest.raises(TypeError, match="unhashable"):
        hash(spec)


@pytest.mark.parametrize("make", [nested_spec, lambda number: nested_spec(jnp.float32(number))])
def test_a_rebuilt_spec_is_the_spec(make) -> None:
    spec = make(0.7)
    leaves, structure = jax.tree.flatten(spec)
    rebuilt = jax.tree.unflatten(structure, leaves)
    assert rebuilt == spec
    assert jax.tree.structure(rebuilt) == structure
    np.testing.assert_array_equal(draw(rebuilt), draw(spec))


def test_a_spec_is_a_static_argument_with_any_containers() -> None:
    run = jax.jit(draw, static_argnums=0)
    np.testing.assert_array_equal(run(nested_spec(0.5), RNG), draw(nested_spec(0.5)))
    np.testing.assert_array_equal(run(nested_spec(0.7), RNG), draw(nested_spec(0.7)))


@pytest.mark.parametrize("keep_prob", [0.5, 0.75, 0.7, 1, 0])
def test_a_spec_of_numbers_is_the_same_passed_in_or_closed_over(keep_prob) -> None:
    spec = nested_spec(keep_prob)
    closed_over = jax.jit(lambda rng: draw(spec, rng))(RNG)
    np.testing.assert_array_equal(jax.jit(draw)(spec, RNG), closed_over)
    mapped = jax.vmap(draw, in_axes=(None, 0))(spec, RNG[None])
    np.testing.assert_array_equal(mapped[0], closed_over)
    scanned, _ = jax.lax.scan(lambda spec, _: (spec, None), spec, None, length=2)
    assert scanned == spec


def test_a_number_retraces_and_an_array_does_not() -> None:
    chex.clear_trace_counter()
    run = jax.jit(chex.assert_max_traces(draw, n=2))
    for keep_prob in (0.5, 0.7, 0.5):
        run(nested_spec(keep_prob), RNG)
    chex.clear_trace_counter()
    run = jax.jit(chex.assert_max_traces(draw, n=1))
    for keep_prob in (0.5, 0.7, 0.9):
        run(nested_spec(jnp.float32(keep_prob)), RNG)


def test_an_array_can_be_mapped_from_any_axis() -> None:
    keep_probs = jnp.array([0.5, 0.7, 0.9])
    noise = fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=keep_probs, variational=True))
    for axes in (0, -1, jax.tree.map(lambda _: -1, noise)):
        mapped = jax.vmap(draw, in_axes=(axes, None))(noise, RNG)
        for index, keep_prob in enumerate(keep_probs):
            np.testing.assert_array_equal(mapped[index], draw(nested_spec(keep_prob)))


def test_tree_functions_put_anything_there() -> None:
    spec = nested_spec(jnp.float32(0.7))
    sizes = jax.tree.map(jnp.size, spec)
    assert jax.tree.leaves(sizes) == [1] * 4
    assert jax.tree.structure(sizes) == jax.tree.structure(spec)
    labels = jax.tree.map(lambda _: "frozen", spec)
    assert labels.input.keep_prob == "frozen"
    nones = jax.tree.map(lambda _: None, spec)
    assert nones.inside["m"].keep_prob is None
    assert nested_spec(0.7) == jax.tree.map(jnp.size, nested_spec(0.7))


def test_gradients_keep_the_structure() -> None:
    spec = fdc.RecurrentDropout(output=fdc.Dropout(keep_prob=jnp.float32(0.7)))
    grads = jax.grad(lambda spec: draw_output(spec).sum())(spec)
    assert jax.tree.structure(grads) == jax.tree.structure(spec)
    kept = np.count_nonzero(draw_output(spec))  # each is 1 / keep_prob
    np.testing.assert_allclose(grads.output.keep_prob, -kept / 0.7**2, rtol=1e-6)


def draw_output(spec: fdc.RecurrentDropout) -> jax.Array:
    _, y = fdc.dropout_cell(
        None, None, jnp.ones(64), RNG, step=0, cell=lambda p, c, x: (c, x), dropout=spec
    )
    return y


def test_equinox_and_optax_take_a_spec_in_a_field() -> None:
    class Model(eqx.Module):
        w: jax.Array
        dropout: fdc.RecurrentDropout

    model = Model(jnp.ones(2), nested_spec(jnp.float32(0.7)))
    arrays, rest = eqx.partition(model, eqx.is_array)
    assert eqx.combine(arrays, rest).dropout == model.dropout
    grads = eqx.filter_grad(lambda model: (model.w**2).sum())(model)
    np.testing.assert_array_equal(grads.w, [2, 2])
    for keep_prob in (0.7, jnp.float32(0.7)):
        model = Model(jnp.ones(2), nested_spec(keep_prob))
        mask = Model(True, jax.tree.map(lambda _: False, model.dropout))  # type: ignore
        optimizer = optax.masked(optax.sgd(0.1, momentum=0.9), mask)
        weights: Any = model
        updates, _ = optimizer.update(weights, optimizer.init(weights))
        assert jax.tree.structure(updates) == jax.tree.structure(model)


def test_a_train_state_carries_a_schedule() -> None:
    """In a field of Flax's `TrainState`, whose step compiles once."""

    class State(train_state.TrainState):
        dropout: fdc.RecurrentDropout

    def apply(params: Any, dropout: fdc.RecurrentDropout, rng: jax.Array) -> jax.Array:
        emit = lambda params, carry, x: (carry, params["w"] * x)  # noqa: E731
        return fdc.dropout_cell(params, None, jnp.ones(4000), rng, cell=emit, dropout=dropout)[1]

    @jax.jit
    def train_step(state: State, rng: jax.Array) -> tuple[State, jax.Array]:
        traces.append(rng)
        y, vjp = jax.vjp(lambda params: state.apply_fn(params, state.dropout, rng), state.params)
        (gradients,) = vjp(jnp.ones_like(y))
        noise = fdc.Dropout(keep_prob=state.dropout.input.keep_prob - 0.25)
        dropout = fdc.RecurrentDropout(input=noise)
        return state.apply_gradients(grads=gradients, dropout=dropout), y

    traces: list[jax.Array] = []
    dropout = fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=jnp.float32(0.75)))
    state = State.create(
        apply_fn=apply, params={"w": jnp.float32(1.0)}, tx=optax.sgd(0.0), dropout=dropout
    )
    for keep_prob, rng in zip((0.75, 0.5, 0.25), jax.random.split(RNG, 3), strict=True):
        state, y = train_step(state, rng)
        y = np.asarray(y)
        kept = y != 0
        np.testing.assert_allclose(y[kept], 1 / keep_prob, rtol=1e-6)
        assert abs(kept.mean() - keep_prob) < 5 * np.sqrt(keep_prob * (1 - keep_prob) / kept.size)
    assert len(traces) == 1


def test_replacing_a_number_by_an_array_and_back() -> None:
    noise = fdc.Dropout(keep_prob=0.5)
    array = dataclasses.replace(noise, keep_prob=jnp.float32(0.5))
    assert len(jax.tree.leaves(array)) == 1
    assert jax.tree.leaves(dataclasses.replace(array, keep_prob=0.5)) == []


def test_construction_by_the_user_is_checked() -> None:
    with pytest.raises(TypeError, match=r"nn.Dropout\(0.2\) is Dropout\(keep_prob=0.8\)"):
        fdc.Dropout(0.2)  # type: ignore
    with pytest.raises(TypeError, match=r"holds the class Dropout; give an instance"):
        fdc.RecurrentDropout(input=fdc.Dropout)
    with pytest.raises(TypeError, match=r"dropout.inside\['m'\] must hold noises .* got 0.5"):
        fdc.RecurrentDropout(inside={"m": 0.5})
    with pytest.raises(TypeError, match=r"dropout\.inside must be a dict"):
        fdc.RecurrentDropout(inside=fdc.Dropout(keep_prob=0.5))  # type: ignore


@pytest.mark.parametrize("name", ["variational", "is_identity", "needs_previous", "amplifies"])
def test_a_flag_that_is_a_method_is_refused(name) -> None:
    class Mistaken:
        variational = False

        def draw_mask(self, rng, shape, dtype): ...

        def apply(self, mask, value, previous): ...

        def expected(self, value, previous): ...

    setattr(Mistaken, name, lambda self: True)
    with pytest.raises(TypeError, match=f"Mistaken.{name} must be True or False, got the function"):
        fdc.RecurrentDropout(input=Mistaken())

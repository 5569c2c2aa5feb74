"""`nn.jit` compiles a module's fields in as constants, once for each value."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_dropout_cell as fdc

XS = jnp.ones((2, 3, 4))
VARIATIONAL = fdc.Dropout(keep_prob=0.5, variational=True)
RNGS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


class Echo(nn.RNNCellBase):
    """Emits its inputs."""

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: Any) -> jax.Array:
        return jnp.zeros(input_shape[:-1])

    @property
    def num_feature_axes(self) -> int:
        return 1

    def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, jax.Array]:
        return carry, inputs


def output_dropout(keep_prob: Any) -> fdc.RecurrentDropout:
    return fdc.RecurrentDropout(output=fdc.Dropout(keep_prob=keep_prob, variational=True))


Lift = Callable[[Any], Any]
HOSTS: dict[str, Callable[[Any, Lift], Any]] = {
    "RNN": lambda p, lift: lift(fdc.linen.RNN)(Echo(), output_dropout(p), name="layer"),
    "DropoutCell": lambda p, lift: lift(nn.RNN)(
        fdc.linen.DropoutCell(Echo(), output_dropout(p)), name="layer"
    ),
    "RNNCellDropoutWrapper": lambda p, lift: lift(nn.RNN)(
        fdc.linen.RNNCellDropoutWrapper(Echo(), 1.0, p, variational_recurrent=True), name="layer"
    ),
}


def run(host: str, keep_prob: Any, lift: Lift) -> Any:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, xs: jax.Array) -> Any:
            return HOSTS[host](keep_prob, lift)(xs)

    return Model().apply({}, XS, rngs=RNGS)


def assert_kept_once(ys: Any, keep_prob: float) -> None:
    assert set(np.unique(ys)) == {0.0, 1 / np.float32(keep_prob)}
    np.testing.assert_array_equal(ys, np.broadcast_to(ys[:, :1], ys.shape))


@pytest.mark.parametrize("host", HOSTS)
def test_numbers_pass_through_nn_jit_and_arrays_through_jit(host: str) -> None:
    assert_kept_once(run(host, 0.7, nn.jit), 0.7)
    compiled = jax.jit(lambda keep_prob: run(host, keep_prob, lambda layer: layer))
    np.testing.assert_array_equal(compiled(jnp.float32(0.7)), run(host, 0.7, lambda layer: layer))


WITH_SPEC = ("RNN", "DropoutCell")


@pytest.mark.parametrize("host", WITH_SPEC)
def test_an_array_in_a_spec_is_a_constant_of_its_value(host: str) -> None:
    """Concrete, traced, mapped or differentiated: no value runs in another one's program."""
    compiled = jax.jit(lambda keep_prob: run(host, keep_prob, nn.jit))
    for keep_prob in (0.7, 0.4, 0.7):
        number = run(host, keep_prob, nn.jit)
        assert_kept_once(number, keep_prob)
        for make in (jnp.float32, lambda value: np.asarray(value, np.float32)):
            np.testing.assert_array_equal(run(host, make(keep_prob), nn.jit), number)
            np.testing.assert_array_equal(compiled(make(keep_prob)), number)
    keep_probs = jnp.array([0.25, 0.8], jnp.float32)
    mapped = jax.vmap(lambda keep_prob: run(host, keep_prob, nn.jit))(keep_probs)
    np.testing.assert_array_equal(mapped.max((1, 2, 3)), 1 / keep_probs)
    total, slope = jax.value_and_grad(lambda p: run(host, p, nn.jit).sum())(jnp.float32(0.7))
    np.testing.assert_allclose(slope, -total / 0.7, rtol=1e-6)


def test_one_program_for_each_value_of_an_array() -> None:
    traces = []

    class Traced(Echo):
        def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, jax.Array]:
            traces.append(inputs)
            return carry, inputs

    layer = nn.jit(fdc.linen.RNN)
    counts = []
    for keep_prob in (0.7, 0.7, 0.4, 0.7):
        ys = layer(Traced(), output_dropout(jnp.float32(keep_prob))).apply({}, XS, rngs=RNGS)
        assert_kept_once(ys, keep_prob)
        counts.append(len(traces))
    assert 0 < counts[0] == counts[1] < counts[2] == counts[3]


def test_traced_arrays_share_no_program() -> None:
    """One compiled layer in two traces, and twice in one, each time with another value."""
    layer = nn.jit(fdc.linen.RNN)

    def apply(keep_prob: jax.Array) -> Any:
        return layer(Echo(), output_dropout(keep_prob)).apply({}, XS, rngs=RNGS)

    for keep_prob in (0.7, 0.4):
        both = jax.jit(lambda p: (apply(p), apply(p / 2)))(jnp.float32(keep_prob))
        for ys, expected in zip(both, (keep_prob, keep_prob / 2), strict=True):
            np.testing.assert_array_equal(ys.max(), 1 / np.float32(expected))


class Times:
    """A noise that is no dataclass and is not registered: to JAX and Flax an object."""

    variational = True

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def draw_mask(self, rng: jax.Array, shape: Any, dtype: Any) -> jax.Array:
        return jnp.full(shape, self.factor, dtype)

    def apply(self, mask: Any, value: jax.Array, previous: Any = None) -> jax.Array:
        return value * mask

    def expected(self, value: jax.Array, previous: Any = None) -> jax.Array:
        return value


def test_noises_that_are_gone_leave_no_program_behind() -> None:
    """A new object may be where an old one was, with its id."""
    layer = nn.jit(fdc.linen.RNN)
    for factor in (2.0, 3.0, 4.0, 5.0):
        spec = fdc.RecurrentDropout(output=Times(factor))
        ys = layer(Echo(), spec).apply({}, XS, rngs=RNGS)
        np.testing.assert_array_equal(ys, factor * XS)
        del spec


def test_a_wrappers_array_is_refused_by_name() -> None:
    """A field that is an array itself gives Flax nothing to hash."""
    text = r"output_keep_prob of RNNCellDropoutWrapper is an array, float32\[\]. Give a number, or"
    for keep_prob in (jnp.float32(0.7), np.asarray(0.7, np.float32)):
        with pytest.raises(ValueError, match=text) as error:
            run("RNNCellDropoutWrapper", keep_prob, nn.jit)
    assert len(str(error.value)) < 400
    with pytest.raises(ValueError, match=text):
        jax.jit(lambda p: run("RNNCellDropoutWrapper", p, nn.jit))(jnp.float32(0.7))


def test_an_embeddings_array_is_refused() -> None:
    embed = nn.jit(fdc.linen.Embed)(3, 4, jnp.float32(0.5))
    with pytest.raises(ValueError, match="keep_prob of Embed is an array"):
        embed.init(RNGS, jnp.zeros((2,), int))


def test_an_array_that_is_an_argument_of_the_compiled_module() -> None:
    """Written as the error says, one program serves all values, each with its own result."""
    traces = []

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, xs: jax.Array, keep_prob: jax.Array) -> Any:
            traces.append(keep_prob)
            return fdc.linen.RNN(Echo(), output_dropout(keep_prob))(xs)

    model = nn.jit(Layer)()
    for keep_prob in (0.7, 0.4, 0.7):
        ys = model.apply({}, XS, jnp.float32(keep_prob), rngs=RNGS)
        assert_kept_once(ys, keep_prob)
    assert len(traces) == 1


def frozen(**changes: Any) -> fdc.Dropout:
    return dataclasses.replace(VARIATIONAL, **changes)


STATIC = {
    "variational": (VARIATIONAL, frozen(variational=False)),
    "keep_prob": (VARIATIONAL, frozen(keep_prob=0.25)),
    "scale": (VARIATIONAL, frozen(scale=False)),
    "broadcast_dims": (VARIATIONAL, frozen(broadcast_dims=(-1,))),
    "another dim": (frozen(broadcast_dims=(-2,)), frozen(broadcast_dims=(-1,))),
}


def assert_is_noise(noise: fdc.Dropout, ys: jax.Array) -> None:
    """Whether ones `[batch, time, features]` have gone through this noise, and no other."""
    assert set(np.unique(ys)) == {0, 1 / np.float32(noise.keep_prob) if noise.scale else 1}
    # At a step a value is `[batch, features]`: dim -2 of it is dim 0 here, and -1 is dim 2.
    shared = {1: noise.variational, 0: -2 in noise.broadcast_dims, 2: -1 in noise.broadcast_dims}
    draws = math.prod(size for dim, size in enumerate(ys.shape) if not shared[dim])
    keep = float(noise.keep_prob)
    assert abs(float((ys != 0).mean()) - keep) < 5 * math.sqrt(keep * (1 - keep) / draws)
    for dim, is_shared in shared.items():
        assert bool((ys == jnp.take(ys, jnp.array([0]), dim)).all()) == is_shared, dim


@pytest.mark.parametrize("changed", STATIC)
@pytest.mark.parametrize("host", WITH_SPEC)
def test_a_spec_does_not_run_in_the_program_of_another(host: str, changed: str) -> None:
    """Specs that differ in static values alone have PyTreeDefs with equal hashes."""
    layer_class: Any = fdc.linen.RNN if host == "RNN" else nn.RNN
    layer = nn.jit(layer_class)  # one class, and so one cache

    class Model(nn.Module):
        spec: Any

        @nn.compact
        def __call__(self, xs: jax.Array) -> Any:
            if host == "RNN":
                return layer(Echo(), self.spec, name="layer")(xs)
            return layer(fdc.linen.DropoutCell(Echo(), self.spec), name="layer")(xs)

    for noise in STATIC[changed] * 2:
        ys: Any = Model(fdc.RecurrentDropout(output=noise)).apply(
            {}, jnp.ones((8, 6, 32)), rngs=RNGS
        )
        assert_is_noise(noise, ys)


NOTHING_KEPT = fdc.Dropout(keep_prob=0.0, variational=True)
NAMES: dict[str, tuple[fdc.RecurrentDropout, tuple[str, ...]]] = {
    "recurrent": (fdc.RecurrentDropout(inside={"recurrent": NOTHING_KEPT}), ("hr", "hz", "hn")),
    "per gate": (
        fdc.RecurrentDropout(inside={"input_per_gate": NOTHING_KEPT}), ("ir", "iz", "in")
    ),
    "in/kernel": (fdc.RecurrentDropout(params=fdc.at_paths(NOTHING_KEPT, "in/kernel")), ("in",)),
    "hn/kernel": (fdc.RecurrentDropout(params=fdc.at_paths(NOTHING_KEPT, "hn/kernel")), ("hn",)),
}  # fmt: skip


def test_names_in_a_spec_count() -> None:
    """The site inside a cell, or the weights: with nothing kept, Flax's GRU with zero kernels."""
    lifted, xs = nn.jit(fdc.linen.RNN), jax.random.normal(jax.random.key(3), (4, 5, 3))
    stock = nn.RNN(nn.GRUCell(8, name="cell"))
    variables: Any = stock.init(RNGS, xs)

    class Model(nn.Module):
        spec: Any

        @nn.compact
        def __call__(self, xs: jax.Array) -> Any:
            return lifted(fdc.linen.GRUCell(8), self.spec, name="layer")(xs)

    for spec, zeroed in [*NAMES.values()] * 2:
        weights = {name: dict(dense) for name, dense in variables["params"]["cell"].items()}
        ours = Model(spec).apply({"params": {"GRUCell_0": weights}}, xs, rngs=RNGS)
        for name in zeroed:
            weights[name]["kernel"] = jnp.zeros_like(weights[name]["kernel"])
        want = stock.apply({"params": {"cell": weights}}, xs)
        np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]


def echo_layer() -> Any:
    return fdc.linen.RNN(Echo(), output_dropout(0.5))


def echo_rnn() -> Any:
    return nn.RNN(fdc.linen.DropoutCell(Echo(), output_dropout(0.5)))


def tf_rnn() -> Any:
    return nn.RNN(fdc.linen.RNNCellDropoutWrapper(Echo(), 1.0, 0.5, variational_recurrent=True))


class Holder(nn.Module):
    held: Any

    def __call__(self, xs: jax.Array) -> Any:
        return self.held(xs)


class Words(nn.Module):
    embed: Any

    def __call__(self, xs: jax.Array) -> Any:
        return self.embed(jnp.arange(xs.size).reshape(xs.shape)[..., 0])


def both_directions(lift: Lift, xs: jax.Array) -> Any:
    layers = [fdc.linen.RNN(Echo(), output_dropout(0.5)) for _ in range(2)]
    return lift(nn.Bidirectional)(*layers, merge_fn=lambda one, other: [one, other])(xs)


MADE_OUTSIDE: dict[str, Callable[[Lift, jax.Array], Any]] = {
    "both directions": both_directions,
    "fields": lambda lift, xs: [lift(Holder)(echo_layer())(xs) for _ in range(2)],
    "a field's field": lambda lift, xs: [lift(Holder)(Holder(echo_layer()))(xs) for _ in range(2)],
    "cells": lambda lift, xs: [
        lift(nn.RNN)(fdc.linen.DropoutCell(Echo(), output_dropout(0.5)))(xs) for _ in range(2)
    ],
    "cells of fields": lambda lift, xs: [lift(Holder)(echo_rnn())(xs) for _ in range(2)],
    "wrappers": lambda lift, xs: [lift(Holder)(tf_rnn())(xs) for _ in range(2)],
    "embeddings": lambda lift, xs: [
        lift(Words)(fdc.linen.Embed(2**14, 1, 0.5, embedding_init=nn.initializers.ones))(xs)
        for _ in range(2)
    ],
    "remat inside": lambda lift, xs: [lift(nn.remat(Holder))(echo_layer())(xs) for _ in range(2)],
    "remat outside": lambda lift, xs: [nn.remat(lift(Holder))(echo_layer())(xs) for _ in range(2)],
}
ON_MANY = jnp.ones((64, 8, 32))
AT_RANDOM = 0.34, 0.66  # 5 standard deviations of the share of 256 units that are kept


def run_within(make: Callable[[Lift, jax.Array], Any], lift: Lift) -> Any:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, xs: jax.Array) -> Any:
            return make(lift, xs)

    variables = Model().init(jax.random.key(0), ON_MANY)
    return Model().apply(variables, ON_MANY, rngs=RNGS)


def assert_independent(one: jax.Array, other: jax.Array) -> None:
    """Half of the units are kept, and half of those are kept by the other mask too."""
    (least, most), kept = AT_RANDOM, one != 0
    assert least < kept.mean() < most
    assert least < (other != 0)[kept].mean() < most


# Modules that hash alike run in one program if they are compiled by one `nn.jit`.
LIFTS: dict[str, Lift] = {
    "a program each": nn.jit,
    "one program": functools.cache(nn.jit),
    "nn.fold_rngs": nn.fold_rngs,
}


@pytest.mark.parametrize("lift", LIFTS)
@pytest.mark.parametrize("case", MADE_OUTSIDE)
def test_modules_that_are_made_outside_keep_their_masks(case: str, lift: str) -> None:
    """Flax gives all of them one key in `nn.jit`; here they have their masks without `nn.jit`."""
    compiled = run_within(MADE_OUTSIDE[case], LIFTS[lift])
    if "remat" not in case:  # A transform changes a module's name, and so its path.
        plain = run_within(MADE_OUTSIDE[case], lambda module: module)
        jax.tree.map(np.testing.assert_array_equal, compiled, plain)
    assert_independent(*compiled)


@pytest.mark.parametrize("lift", [nn.jit, nn.fold_rngs])
def test_flaxs_own_dropout_has_one_mask_there(lift: Lift) -> None:
    """The docs warn of it; this fails once Flax has mended it."""
    one, other = run_within(
        lambda lift, xs: [lift(Holder)(nn.Dropout(0.5, deterministic=False))(xs) for _ in range(2)],
        lift,
    )
    np.testing.assert_array_equal(one, other)


def test_a_compiled_cell_draws_at_each_step() -> None:
    with pytest.raises(TypeError, match=r"draws from an rng stream, as nn\.jit does for each cell"):
        run_within(
            lambda _, xs: fdc.linen.RNN(nn.jit(nn.LSTMCell)(8), output_dropout(0.5))(xs), nn.jit
        )


class Block(nn.Module):
    """Makes its layer itself, once it runs."""

    @nn.compact
    def __call__(self, xs: jax.Array) -> Any:
        return echo_layer()(xs)


class Nested(nn.Module):
    @nn.compact
    def __call__(self, xs: jax.Array) -> Any:
        return nn.jit(Block)()(xs)


REFUSED: dict[str, Callable[[Lift, jax.Array], Any]] = {
    "a field that makes a layer": lambda lift, xs: lift(Holder)(Block())(xs),
    "a field's field": lambda lift, xs: lift(Holder)(Holder(Block()))(xs),
    "a field that is compiled too": lambda lift, xs: lift(Holder)(lift(Block)())(xs),
    "a field that compiles": lambda lift, xs: lift(Holder)(Nested())(xs),
}


@pytest.mark.parametrize("lift", [nn.jit, nn.fold_rngs])
@pytest.mark.parametrize("case", REFUSED)
def test_layers_whose_key_others_have_too_are_refused(case: str, lift: Lift) -> None:
    """The program that is compiled for one such field would serve the next, with its masks."""
    with pytest.raises(ValueError, match="this RNN would have the masks of other modules"):
        run_within(REFUSED[case], lift)


class Decorated(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, xs: jax.Array) -> Any:
        return echo_layer()(xs)


class InSetup(nn.Module):
    def setup(self) -> None:
        self.layer = echo_layer()

    @nn.jit
    def __call__(self, xs: jax.Array) -> Any:
        return self.layer(xs)


MADE_INSIDE: dict[str, Callable[[jax.Array], Any]] = {
    "a layer": lambda xs: nn.jit(fdc.linen.RNN)(Echo(), output_dropout(0.5))(xs),
    "in a method": lambda xs: nn.jit(Block)()(xs),
    "in a method that is compiled": lambda xs: Decorated()(xs),
    "in setup": lambda xs: InSetup()(xs),
    "in nn.jit in nn.jit": lambda xs: nn.jit(Nested)()(xs),
    "as an argument": lambda xs: nn.jit(lambda module, xs: module(xs))(Block(), xs),
}


@pytest.mark.parametrize("case", MADE_INSIDE)
def test_modules_that_are_made_inside_have_masks_of_their_own(case: str) -> None:
    assert_independent(*run_within(lambda _, xs: [MADE_INSIDE[case](xs) for _ in range(2)], nn.jit))

"""A key for a whole model, for a step at a time, and for Monte Carlo samples."""

import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick_prng import quick_key

import flax_dropout_cell as fdc

KEY, X = quick_key(0), jnp.ones((2, 5, 4))
VARIATIONAL = fdc.Dropout(keep_prob=0.5, variational=True)
PER_STEP = fdc.Dropout(keep_prob=0.5)


class NNXModel(nnx.Module):
    def __init__(self, spec: fdc.RecurrentDropout, rngs: nnx.Rngs) -> None:
        self.first: Any = fdc.nnx.RNN(nnx.SimpleCell(4, 4, rngs=rngs), spec, rngs=rngs)
        self.second: Any = fdc.nnx.RNN(nnx.SimpleCell(4, 4, rngs=rngs), spec, rngs=rngs)

    def __call__(self, x: jax.Array, rngs: Any = None) -> Any:
        return self.first(x, rngs=rngs), self.second(x, rngs=rngs)


class LinenModel(nn.Module):
    spec: fdc.RecurrentDropout

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        return [fdc.linen.RNN(nn.SimpleCell(4), self.spec)(x) for _ in "ab"]


def test_layers_of_one_model_draw_masks_of_their_own() -> None:
    """As the docs of `mc_samples` advise, in linen and in NNX."""
    spec = fdc.RecurrentDropout(output=VARIATIONAL)
    model, linen = NNXModel(spec, nnx.Rngs(0)), LinenModel(spec)
    variables = linen.init(KEY, X)
    for predict in (
        lambda key: model(X, rngs=nnx.Rngs(dropout=key)),
        lambda key: linen.apply(variables, X, rngs={"dropout": key}),
    ):
        first, second = (np.asarray(ys == 0) for ys in fdc.mc_samples(predict, KEY, 20))
        assert 0.3 < (first != second).mean() < 0.7
        again, _ = (np.asarray(ys == 0) for ys in fdc.mc_samples(predict, KEY, 20))
        np.testing.assert_array_equal(again, first)


def cell(params: None, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return h + x, h


def step_by_step(key: jax.Array) -> Any:
    h, y, options = jnp.zeros((2, 4)), None, {"cell": cell, "dropout": BOTH}
    masks = fdc.draw_masks(None, h, X[:, 0], key, **options)
    for step in range(3):
        h, y = fdc.dropout_cell(None, h, X[:, step], key, masks=masks, step=step, **options)
    return y


def whole(key: jax.Array) -> Any:
    steps = X.swapaxes(0, 1)
    return fdc.dropout_scan(None, jnp.zeros((2, 4)), steps, key, cell=cell, dropout=BOTH)


def linen_layers(keys: list[jax.Array]) -> Any:
    rnn = fdc.linen.RNN(nn.SimpleCell(4), BOTH)
    variables = rnn.init(KEY, X)
    return [rnn.apply(variables, X, rng=key) for key in keys]


def nnx_layers(keys: Any) -> Any:
    model = NNXModel(BOTH, nnx.Rngs(0))
    return [model.first(X, rngs=keys[0]), model.second(X, rngs=keys[1])]


BOTH = fdc.RecurrentDropout(input=VARIATIONAL, output=PER_STEP)


class TestKeyReuse:
    """`jax.debug_key_reuse` refuses one key for two layers, and passes ordinary uses."""

    @pytest.mark.parametrize("layers", [linen_layers, nnx_layers])
    def test_one_key_for_two_layers(self, layers: Any) -> None:
        with jax.debug_key_reuse(True), pytest.raises(jax.errors.KeyReuseError):
            jax.jit(lambda key: layers([key, key]))(jax.random.key(0))

    @pytest.mark.parametrize(
        "use",
        [
            whole,
            step_by_step,
            lambda key: linen_layers(list(jax.random.split(key))),
            lambda key: nnx_layers(jax.random.split(key)),
            lambda key: nnx_layers([nnx.Rngs(dropout=key)] * 2),
            lambda key: fdc.mc_samples(whole, key, 3),
        ],
        ids=["whole", "step by step", "linen", "NNX", "Rngs", "samples"],
    )
    def test_ordinary_uses(self, use: Any) -> None:
        with jax.debug_key_reuse(True):
            jax.jit(use)(jax.random.key(0))


class TestEqualSamples:
    def test_a_model_in_evaluation_warns(self) -> None:
        model = NNXModel(fdc.RecurrentDropout(output=PER_STEP), nnx.Rngs(0))
        model.eval()
        with pytest.warns(UserWarning, match="all samples of mc_samples are equal"):
            fdc.mc_samples(lambda key: model(X, rngs=nnx.Rngs(dropout=key)), KEY, 4)
        with pytest.warns(UserWarning, match="all samples of mc_samples are equal"):
            fdc.mc_samples(lambda key: jnp.ones(3), KEY, 4, chunk_size=1)

    @pytest.mark.parametrize(
        ("predict", "samples"),
        [
            (lambda key: jax.random.normal(key, (2,)), 3),
            (lambda key: {"spread": jax.random.normal(key), "mean": jnp.ones(2)}, 3),
            (lambda key: jnp.ones(2), 1),
            (lambda key: jnp.argmax(jax.random.normal(key, (2,))) * 0, 3),
        ],
        ids=["differ", "one leaf differs", "one sample", "classes"],
    )
    def test_nothing_else_does(self, predict: Any, samples: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fdc.mc_samples(predict, KEY, samples)
            jax.jit(lambda: fdc.mc_samples(lambda key: jnp.ones(2), KEY, 3))()


@pytest.mark.parametrize("framework", ["linen", "nnx"])
class TestOneStepAtATime:
    """A loop of calls, each of one step, that passes the carry and the key on."""

    def layer(self, framework: str, noise: fdc.Dropout) -> Any:
        spec = fdc.RecurrentDropout(output=noise)
        if framework == "linen":
            layer = fdc.linen.RNN(nn.SimpleCell(4), spec, return_carry=True)
            variables = layer.init(KEY, X)
            return lambda x, key, **given: layer.apply(variables, x, rng=key, **given)
        nnx_layer: Any = fdc.nnx.RNN(
            nnx.SimpleCell(4, 4, rngs=nnx.Rngs(0)), spec, return_carry=True, rngs=nnx.Rngs(1)
        )
        return lambda x, key, **given: nnx_layer(x, rngs=key, **given)

    def test_per_step_noise_needs_the_steps_index(self, framework: str) -> None:
        layer = self.layer(framework, PER_STEP)
        carry, first = layer(X[:, :1], KEY)
        with pytest.raises(ValueError, match="pass start=t, the index of the step"):
            layer(X[:, 1:2], KEY, initial_carry=carry)
        steps = [first]
        for t in range(1, 5):
            carry, y = layer(X[:, t : t + 1], KEY, initial_carry=carry, start=t)
            steps.append(y)
        _, whole = layer(X, KEY)
        np.testing.assert_allclose(jnp.concatenate(steps, axis=1), whole, rtol=1e-6)

    def test_calls_that_are_right_without_it(self, framework: str) -> None:
        layer = self.layer(framework, VARIATIONAL)
        carry, first = layer(X[:, :1], KEY)
        _, second = layer(X[:, 1:2], KEY, initial_carry=carry)
        np.testing.assert_array_equal(first == 0, second == 0)
        layer = self.layer(framework, PER_STEP)
        layer(X[:, :2], KEY, initial_carry=carry)
        layer(X[:, :1], None, initial_carry=carry, deterministic=True)
        layer(X[:, :1], KEY, initial_carry=carry, deterministic=True)

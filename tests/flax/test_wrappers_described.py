"""The table of a wrapper: `describe` of linen's and NNX's, TensorFlow's too."""

import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from asserts import assert_same
from flax import nnx

import flax_dropout_cell as fdc

X = jax.ShapeDtypeStruct((3, 4), jnp.float32)
ONCE = fdc.Dropout(keep_prob=0.5, variational=True)
STEP = fdc.Dropout(keep_prob=0.25)
frameworks = pytest.mark.parametrize("framework", ["linen", "nnx"])


def lstm(framework: str) -> Any:
    return nn.LSTMCell(16) if framework == "linen" else nnx.LSTMCell(4, 16, rngs=nnx.Rngs(0))


def dropout_cell(framework: str, cell: Any, spec: fdc.RecurrentDropout) -> Any:
    wrap = fdc.linen.DropoutCell if framework == "linen" else fdc.nnx.DropoutCell
    return wrap(cell, spec)


@frameworks
def test_dropout_cell(framework: str) -> None:
    """It needs no weights, keys or streams; one noise for an LSTM's state stands at h."""
    spec = fdc.RecurrentDropout(params=fdc.recurrent_kernels(ONCE), input=STEP, state=ONCE)
    lines = repr(dropout_cell(framework, lstm(framework), spec).describe(X)).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "site value noise drawn mask shared over",
        *(
            f"params['h{gate}']['kernel'] float32[16, 16] Dropout(keep_prob=0.5) once "
            "bool[16, 16] steps, rows"
            for gate in "fgio"
        ),
        "input float32[3, 4] Dropout(keep_prob=0.25) each step bool[3, 4]",
        "state[1] float32[3, 16] Dropout(keep_prob=0.5) once bool[3, 16] steps",
        "without noise: params (8 of 12 leaves), state[0], output",
        "free sites inside the cell: none",
    ]


@frameworks
def test_a_wrapper_around_a_wrapper(framework: str) -> None:
    inner = dropout_cell(framework, lstm(framework), fdc.RecurrentDropout(output=ONCE))
    outer = dropout_cell(framework, inner, fdc.RecurrentDropout(input=STEP, state=ONCE))
    places = outer.describe(X).places
    assert [place.path for place in places] == ["input", "state.cell_carry[1]"]


class Described(nn.Module):
    """A model that may look at its own wrapper, which holds a wrapper, before it runs it."""

    looks: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        inner = fdc.linen.RNNCellDropoutWrapper(nn.LSTMCell(8), output_keep_prob=0.5)
        outer = fdc.linen.RNNCellDropoutWrapper(inner, 0.5)
        if self.looks:
            assert outer.describe(x[:, 0]).places and outer.state_size and outer.output_size
        return nn.RNN(outer, split_rngs={"params": False, "dropout": True})(x)


def test_a_model_that_looks_at_its_wrapper_keeps_its_masks() -> None:
    x, rngs = jnp.ones((2, 5, 4)), {"dropout": jax.random.key(1)}
    variables = Described(False).init(jax.random.key(0), x)
    assert_same(*(Described(looks).apply(variables, x, rngs=rngs) for looks in (False, True)))


class StartsAtRandom(nn.RNNCellBase):
    """A cell that holds a wrapper, and starts from a stream and a variable of its own."""

    inner: Any

    def setup(self) -> None:
        self.scale = self.variable("constants", "scale", lambda: jnp.ones(()))

    def __call__(self, carry: Any, inputs: Any) -> Any:
        return carry, inputs

    def initialize_carry(self, rng: Any, input_shape: Any) -> Any:
        return self.scale.value * jax.random.normal(self.make_rng("noise"), input_shape)

    @property
    def num_feature_axes(self) -> int:
        return 1


class LooksAtStart(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        inner = fdc.linen.DropoutCell(nn.LSTMCell(8), fdc.RecurrentDropout(input=ONCE))
        spec = fdc.RecurrentDropout(input=STEP)
        cell = fdc.linen.DropoutCell(StartsAtRandom(inner), spec)
        return [place.path for place in cell.describe(x).places]


def test_a_cell_is_described_with_the_streams_and_variables_that_it_starts_from() -> None:
    rngs = {"noise": jax.random.key(0)}
    found, _ = LooksAtStart().apply({}, jnp.ones((2, 4)), rngs=rngs, mutable=["constants"])
    assert found == ["input"]


@frameworks
def test_tensorflows_wrapper(framework: str) -> None:
    wrap = (fdc.linen if framework == "linen" else fdc.nnx).RNNCellDropoutWrapper
    wrapper = wrap(
        lstm(framework), input_keep_prob=0.5, state_keep_prob=0.75, variational_recurrent=True
    )
    assert repr(wrapper.describe(X)) == inspect.cleandoc(
        """
        site      value           noise                    drawn  mask         shared over
        input     float32[3, 4]   Dropout(keep_prob=0.5)   once   bool[3, 4]   steps
        state[1]  float32[3, 16]  Dropout(keep_prob=0.75)  once   bool[3, 16]  steps
        without noise: params (12 leaves), state[0], output
        free sites inside the cell: none
        """
    )


@frameworks
def test_evaluation_is_told(framework: str) -> None:
    """By a layer and by a wrapper, and for NNX after `eval()` and `train()` too."""
    spec, told = fdc.RecurrentDropout(input=STEP), "evaluation: nothing is drawn"
    rnn = (fdc.linen if framework == "linen" else fdc.nnx).RNN
    x = jax.ShapeDtypeStruct((3, 5, 4), jnp.float32)
    for evaluates in (False, True):
        layer = rnn(lstm(framework), spec, deterministic=evaluates)
        assert repr(layer.describe(x)).endswith(told) == evaluates
        wrap = fdc.linen.DropoutCell if framework == "linen" else fdc.nnx.DropoutCell
        wrapper = wrap(lstm(framework), spec, deterministic=evaluates)
        assert repr(wrapper.describe(X)).endswith(told) == evaluates
    if framework == "nnx":
        model = rnn(lstm(framework), spec)
        model.eval()
        assert repr(model.describe(x)).endswith(told)
        model.train()
        assert told not in repr(model.describe(x))

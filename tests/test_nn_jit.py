"""`nn.jit` takes a module's fields as constants: numbers pass, arrays are refused by name."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_dropout_cell as fdc

XS = jnp.ones((2, 3, 4))
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


def spec_of(keep_prob: Any) -> fdc.RecurrentDropout:
    return fdc.RecurrentDropout(output=fdc.Dropout(keep_prob=keep_prob, variational=True))


Lift = Callable[[Any], Any]
HOSTS: dict[str, Callable[[Any, Lift], Any]] = {
    "RNN": lambda p, lift: lift(fdc.linen.RNN)(Echo(), spec_of(p)),
    "DropoutCell": lambda p, lift: lift(nn.RNN)(fdc.linen.DropoutCell(Echo(), spec_of(p))),
    "RNNCellDropoutWrapper": lambda p, lift: lift(nn.RNN)(
        fdc.linen.RNNCellDropoutWrapper(Echo(), 1.0, p, variational_recurrent=True)
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


@pytest.mark.parametrize("host", HOSTS)
def test_an_array_in_a_field_is_refused_by_name(host: str) -> None:
    """Its value is none that could be compiled in: it may be traced, or another the next time."""
    field = "output_keep_prob" if host.endswith("Wrapper") else "dropout.output.keep_prob"
    text = rf"{field} of {host} is an array, float32\[\]. Give a number, use jax.jit"
    for keep_prob in (jnp.float32(0.7), np.asarray(0.7, np.float32)):
        with pytest.raises(ValueError, match=text) as error:
            run(host, keep_prob, nn.jit)
    assert len(str(error.value)) < 400
    with pytest.raises(ValueError, match=text):
        jax.jit(lambda keep_prob: run(host, keep_prob, nn.jit))(jnp.float32(0.7))


def test_an_embeddings_array_is_refused() -> None:
    embed = nn.jit(fdc.linen.Embed)(3, 4, jnp.float32(0.5))
    with pytest.raises(ValueError, match="keep_prob of Embed is an array"):
        embed.init(RNGS, jnp.zeros((2,), int))


def test_an_array_that_is_an_argument_of_the_compiled_module() -> None:
    """What the error says to write: each value has its own result, of one program."""
    traces = []

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, xs: jax.Array, keep_prob: jax.Array) -> Any:
            traces.append(keep_prob)
            return fdc.linen.RNN(Echo(), spec_of(keep_prob))(xs)

    model = nn.jit(Layer)()
    for keep_prob in (0.7, 0.4, 0.7):
        ys = model.apply({}, XS, jnp.float32(keep_prob), rngs=RNGS)
        assert_kept_once(ys, keep_prob)
    assert len(traces) == 1

"""The sharp bits about Flax: each mistake does what docs/sharp_bits.md says, and its cure cures."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge
from linen_cells import FromZeros
from nnx_cells import PER_STEP, VARIATIONAL, Sum
from probes import UNITS

import flax_dropout_cell as fdc

KEY = jax.random.key(5)
ONES = jnp.ones((4, 1, UNITS))
H = jnp.zeros((4, UNITS))


def nnx_layer(noise: Any = PER_STEP) -> Any:
    return fdc.nnx.RNN(Sum(), fdc.RecurrentDropout(input=noise), rngs=nnx.Rngs(dropout=0))


class Echo(FromZeros):
    """Emits its inputs."""

    def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, jax.Array]:
        return carry, inputs


def linen_layer(noise: Any) -> Any:
    return fdc.linen.RNN(Echo(), fdc.RecurrentDropout(input=noise))


def different(masks: list[Any]) -> int:
    return len(np.unique(np.stack(masks).reshape(len(masks), -1), axis=0))


def test_a_loop_of_calls_of_one_step_in_nnx() -> None:
    """Own stream: frozen noise is fresh. One key in a new Rngs: fresh noise is frozen."""
    own, given = nnx_layer(VARIATIONAL), nnx_layer(PER_STEP)
    assert different([own(ONES, initial_carry=H) for _ in range(4)]) == 4
    with_start = [own(ONES, initial_carry=H, rngs=KEY, start=step) for step in range(4)]
    assert different(with_start) == 1
    calls = [given(ONES, initial_carry=H, rngs=nnx.Rngs(dropout=KEY)) for _ in range(4)]
    assert different(calls) == 1
    with_start = [given(ONES, initial_carry=H, rngs=KEY, start=step) for step in range(4)]
    assert different(with_start) == 4


def test_a_loop_of_calls_of_one_step_in_linen() -> None:
    rngs = {"dropout": KEY}
    layer = linen_layer(PER_STEP)
    calls = [layer.apply({}, ONES, initial_carry=H, rngs=rngs) for _ in range(4)]
    assert different(calls) == 1
    calls = [layer.apply({}, ONES, initial_carry=H, rng=KEY, start=step) for step in range(4)]
    assert different(calls) == 4


def test_carries_of_single_rows_that_are_joined() -> None:
    """All rows go on with the first one's masks of weights."""
    noise = fdc.Dropout(keep_prob=0.5, variational=True)
    wrapper = fdc.linen.DropoutCell(nn.SimpleCell(8), fdc.RecurrentDropout(params=noise))
    xs, params = jnp.ones((4, 3)), nn.SimpleCell(8).init(KEY, jnp.zeros((1, 8)), jnp.ones((1, 3)))

    def start(seed: int) -> Any:
        bound = wrapper.bind(params, rngs={"dropout": jax.random.key(seed)})
        return bound.initialize_carry(KEY, (1, 3))

    carries = [start(seed) for seed in range(4)]
    joined: Any = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *carries)
    together: Any = wrapper.apply(params, joined, xs)[1]  # type: ignore[index]
    apart: Any = [wrapper.apply(params, carry, xs[:1])[1][0] for carry in carries]  # type: ignore[index]
    np.testing.assert_allclose(together, np.stack([apart[0]] * 4), rtol=1e-6)
    assert different(apart) == 4


def test_an_nnx_model_under_transformations_of_jax() -> None:
    """The layer's masks, and those of Flax's own Dropout."""
    for model in (nnx_layer(), nnx.Dropout(0.5, rngs=nnx.Rngs(0))):
        ones = jnp.ones((4, 8, UNITS))
        compiled = jax.jit(lambda model, xs: model(xs))
        assert different([compiled(model, ones) for _ in range(3)]) == 1
        assert different([*jax.vmap(lambda model, xs: model(xs), (None, 0))(model, ones)]) == 1
        ours = nnx.jit(lambda model, xs: model(xs))
        assert different([ours(model, ones) for _ in range(3)]) == 3


@pytest.mark.filterwarnings("ignore")  # Flax warns of its own bridge
def test_a_bridge_to_linen_without_streams() -> None:
    model = bridge.to_linen(fdc.nnx.RNN, Sum(), fdc.RecurrentDropout(input=PER_STEP))
    variables = model.init({"params": KEY, "dropout": KEY}, ONES)
    assert different([model.apply(variables, ONES) for _ in range(3)]) == 1
    calls = [model.apply(variables, ONES, rngs={"dropout": jax.random.key(n)}) for n in range(3)]
    assert different(calls) == 3


def test_only_a_param_is_learned() -> None:
    for logit, count in ((jnp.float32(-2), 0), (nnx.Param(jnp.float32(-2)), 1)):
        layer = nnx_layer(fdc.ConcreteDropout(logit=logit))  # type: ignore[arg-type]
        grads = nnx.grad(lambda layer: layer(ONES).sum())(layer)
        assert len(jax.tree.leaves(grads)) == count


class Outer(Sum):
    """A cell that holds a wrapper, and carries its carry."""

    def __init__(self) -> None:
        super().__init__()
        spec = fdc.RecurrentDropout(input=VARIATIONAL)
        self.inner = fdc.nnx.DropoutCell(Sum(), spec, rngs=nnx.Rngs(dropout=1))

    def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, Any]:
        return self.inner(carry, inputs)

    def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
        return self.inner.initialize_carry(input_shape, rngs)


def test_redraw_masks_leaves_those_of_a_wrapper_inside_the_users_cell() -> None:
    cell = Outer()
    spec = fdc.RecurrentDropout(output=VARIATIONAL)
    wrapper = fdc.nnx.DropoutCell(cell, spec, rngs=nnx.Rngs(dropout=0))
    first: Any = wrapper.initialize_carry(H.shape, nnx.Rngs(0))
    second: Any = wrapper.redraw_masks(first, H)
    assert different([first.masks.output, second.masks.output]) == 2
    assert different([first.cell_carry.masks.input, second.cell_carry.masks.input]) == 1
    inner: Any = cell.inner.redraw_masks(second.cell_carry, H)
    assert different([first.cell_carry.masks.input, inner.masks.input]) == 2


def test_an_nnx_cell_that_writes_a_param() -> None:
    """The write is lost; that of another Variable is an error."""

    class Counts(Sum):
        def __init__(self, count: nnx.Variable) -> None:
            self.count = count

        def __call__(self, carry: Any, inputs: Any) -> Any:
            self.count[...] += 1
            return super().__call__(carry, inputs)

    for kind in (nnx.Param, nnx.Variable):
        cell = Counts(kind(jnp.zeros(())))
        layer = fdc.nnx.RNN(cell, fdc.RecurrentDropout())
        if kind is nnx.Param:
            layer(ONES)
            assert cell.count[...] == 0
        else:
            with pytest.raises(TypeError, match="Counts writes a variable"):
                layer(ONES)


def test_a_threefry_key_that_is_split_and_folded_into() -> None:
    split = jax.random.split(KEY, 3)
    for i in range(3):
        folded = jax.random.fold_in(KEY, i)
        np.testing.assert_array_equal(jax.random.key_data(split[i]), jax.random.key_data(folded))

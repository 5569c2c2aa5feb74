"""An adapter for another framework is one `Framework` and one layer; here it is Equinox's."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_dropout_cell as fdc
from flax_dropout_cell._flax.deterministic import needs_key
from flax_dropout_cell._flax.framework import Framework
from flax_dropout_cell._flax.inspected_layer import InspectedLayer
from flax_dropout_cell._flax.layer import (
    Settings,
    read_layout,
    run_layer,
)
from flax_dropout_cell.cells.family import CellSite, Family
from flax_dropout_cell.cells.lstm import LSTM

KEY = jax.random.key(0)
XS = jax.random.normal(jax.random.key(1), (4, 6, 3))  # [batch, time, features]
NOISE = fdc.Dropout(keep_prob=0.5, variational=True)


class PureCell:
    """Equinox's LSTM, which reads one row and carries (h, c), over a batch."""

    def __init__(self, cell: Any) -> None:
        self.params, self._rest = eqx.partition(cell, eqx.is_inexact_array)

    def __call__(self, params: Any, carry: Any, x: Any) -> tuple[Any, Any]:
        h, c = jax.vmap(eqx.combine(params, self._rest))(x, carry)
        return (h, c), h


class Equinox(Framework):
    name, prefix, ours, sizes = "equinox", "eqx.nn", "ours", "32, 64, key=key"
    weights_are = "arrays"
    twins: ClassVar = {}

    def is_module(self, value: Any) -> bool:
        return isinstance(value, eqx.Module)

    def parts(self, cell: Any) -> Iterable[Any]:
        return [cell]

    def sizes_of(self, cell: Any) -> str:
        return f"{cell.input_size}, {cell.hidden_size}, key=key"

    def pure(self, cell: Any) -> Any:
        return PureCell(cell)

    def weights(self, cell: Any) -> Any:
        return PureCell(cell).params

    def run_on(self, cell: Any, params: Any, carry: Any, x: Any, **options: Any) -> Any:
        return PureCell(cell)(params, carry, x)

    def traceable(self, cell: Any) -> Callable[..., Any]:
        pure = PureCell(cell)
        return lambda _, carry, x: pure(pure.params, carry, x)

    def params_shapes(self, cell: Any, carry: Any, x: Any) -> Any:
        return self.weights(cell)

    def carry_shapes(self, cell: Any, input_shape: Any) -> Any:
        return jax.eval_shape(lambda: self.first_carry(cell, input_shape))

    def first_carry(self, cell: Any, input_shape: Any) -> Any:
        zeros = jnp.zeros((*input_shape[:-1], cell.hidden_size))
        return zeros, zeros

    def num_feature_axes(self, cell: Any) -> int:
        return 1

    def family(self, cell: Any) -> Family:
        h, c = CellSite("hidden", carried=True), CellSite("memory", carried=True, leaky=True)
        return LSTM._replace(sites=(h, c))


EQUINOX = Equinox()


class RNN(InspectedLayer, eqx.Module):
    _framework = EQUINOX

    cell: Any
    dropout: fdc.RecurrentDropout
    deterministic: bool = False
    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    unroll: int = 1
    checkpoint_every: int | None = None
    parallel: bool | None = None

    def __call__(self, inputs: Any, *, key: Any = None, deterministic: bool | None = None) -> Any:
        settings = Settings.of(self)
        layout = read_layout(inputs, 1, settings.time_major)
        carry, cell = EQUINOX.first_carry(self.cell, layout.step_shape), EQUINOX.pure(self.cell)
        return run_layer(
            cell.params,
            carry,
            layout,
            key if needs_key(self.dropout, deterministic, self.deterministic) else None,
            cell=cell,
            dropout=EQUINOX.resolve_noise(self.dropout, self.cell, carry),
            make_carry=lambda: carry,
            settings=settings,
        )


def layer(**noises: Any) -> RNN:
    cell = eqx.nn.LSTMCell(3, 8, key=KEY)
    return RNN(cell, fdc.RecurrentDropout(**noises))


@pytest.mark.parametrize("state", [NOISE, fdc.LSTMState(None, NOISE)], ids=["one", "named"])
def test_its_layer_runs_equinox_under_masks(state: Any) -> None:
    """One noise for the whole state means h, and so does one by name; here h comes first."""
    rnn = layer(input=NOISE, state=state)
    zeros = jnp.zeros((4, 8))
    masks = fdc.draw_masks(
        None, (zeros, zeros), XS[:, 0], KEY,
        cell=lambda params, carry, x: (carry, carry[0]),
        dropout=fdc.RecurrentDropout(input=NOISE, state=(NOISE, None)),
    )  # fmt: skip
    h, c, wanted = zeros, zeros, []
    for t in range(XS.shape[1]):
        h, c = jax.vmap(rnn.cell)(jnp.where(masks.input, 2 * XS[:, t], 0.0), (h, c))
        wanted.append(h)
        h = jnp.where(masks.state[0], 2 * h, 0.0)
    got = rnn(XS, key=KEY)
    np.testing.assert_allclose(got, jnp.stack(wanted, 1), rtol=1e-5, atol=1e-6)


def test_it_describes_itself_and_refuses_sites_that_the_cell_lacks() -> None:
    describe = layer(state=NOISE).describe(XS)
    assert [place.path for place in describe.places] == ["state[0]"]
    with pytest.raises(TypeError, match=r"eqx\.nn\.LSTMCell has no sites"):
        layer(inside={"memory": NOISE})(XS, key=KEY)


def test_a_layer_that_lacks_a_setting_is_not_taken_for_one_that_sets_none() -> None:
    class Lacking:
        time_major = return_carry = reverse = keep_order = False
        unroll, checkpoint_every = 1, None

    with pytest.raises(AttributeError, match="parallel"):
        Settings.of(Lacking())


@pytest.mark.parametrize("layer_class", [fdc.linen.RNN, fdc.nnx.RNN])
def test_every_setting_of_a_layer_is_read_from_it(layer_class: Any) -> None:
    """One that `Settings` lacks would silently have no effect."""
    named = set(inspect.signature(layer_class.__init__).parameters)
    others = {"self", "cell", "dropout", "deterministic", "rngs", "parent", "name"}
    assert named - others == {*Settings._fields}

"""Cells of every shape, and every host that binds them in another way.

A host is made with `wrap`, which is applied to the cell where a user would write `DropoutCell`.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

BATCH, STEPS, FEATURES, UNITS = 2, 2, 3, 3
Wrap = Callable[[Any], Any]


class Delegating(nn.RNNCellBase):
    """Shared by the cells below: their carry is the carry of `inner`."""

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: Any) -> Any:
        return nn.SimpleCell(UNITS, parent=None).initialize_carry(rng, input_shape)

    @property
    def num_feature_axes(self) -> int:
        return 1


class FromZeros(nn.RNNCellBase):
    """Shared by cells of tests: their carry has the inputs' shape, and starts from zeros."""

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: Any) -> Any:
        return jnp.zeros(input_shape)

    @property
    def num_feature_axes(self) -> int:
        return 1


class Subclassed(nn.LSTMCell):
    pass


class Residual(Delegating):
    inner: nn.RNNCellBase

    @nn.compact
    def __call__(self, carry: Any, inputs: jax.Array) -> Any:
        carry, y = self.inner(carry, inputs)
        return carry, y + nn.Dense(UNITS)(inputs)


class WithoutWeightsOfItsOwn(Delegating):
    inner: nn.RNNCellBase

    def __call__(self, carry: Any, inputs: jax.Array) -> Any:
        carry, y = self.inner(carry, inputs)
        return carry, y + inputs


class FieldCalledCell(Delegating):
    cell: nn.RNNCellBase

    @nn.compact
    def __call__(self, carry: Any, inputs: jax.Array) -> Any:
        carry, y = self.cell(carry, inputs)
        return carry, y * self.param("scale", nn.initializers.normal(), (1, UNITS))


class Stack(Delegating):
    layers: tuple[nn.RNNCellBase, ...]

    def __call__(self, carry: Any, inputs: jax.Array) -> Any:
        carry_0, y = self.layers[0](carry[0], inputs)
        carry_1, y = self.layers[1](carry[1], y)
        return (carry_0, carry_1), y

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: Any) -> Any:
        one = super().initialize_carry(rng, input_shape)
        return (one, one)


class Named(Delegating):
    parts: dict[str, nn.Module]

    def __call__(self, carry: Any, inputs: jax.Array) -> Any:
        carry, y = self.parts["cell"](carry, self.parts["pre"](inputs))
        return carry, y


class MadeInSetup(Delegating):
    def setup(self) -> None:
        self.cell = nn.SimpleCell(UNITS)
        self.bias = self.param("bias", nn.initializers.normal(), (1, UNITS))

    def __call__(self, carry: Any, inputs: jax.Array) -> Any:
        carry, y = self.cell(carry, inputs)
        return carry, y + self.bias


class MadeInCompact(Delegating):
    @nn.compact
    def __call__(self, carry: Any, inputs: jax.Array) -> Any:
        return nn.SimpleCell(UNITS)(carry, nn.Dense(UNITS)(inputs))


class Twice(Delegating):
    """One cell under two names."""

    first: nn.RNNCellBase
    second: nn.RNNCellBase

    def __call__(self, carry: Any, inputs: jax.Array) -> Any:
        carry, y = self.first(carry, inputs)
        return self.second(carry, y)


def twice() -> nn.RNNCellBase:
    shared = nn.SimpleCell(UNITS)
    return Twice(shared, shared)


# Functions, for a host makes its cells where it would: at the top, in setup, or in compact.
CELLS: dict[str, Callable[[], nn.RNNCellBase]] = {
    "LSTMCell": lambda: nn.LSTMCell(UNITS),
    "OptimizedLSTMCell": lambda: nn.OptimizedLSTMCell(UNITS),
    "GRUCell": lambda: nn.GRUCell(UNITS),
    "MGUCell": lambda: nn.MGUCell(UNITS),
    "SimpleCell": lambda: nn.SimpleCell(UNITS),
    "ConvLSTMCell": lambda: nn.ConvLSTMCell(UNITS, kernel_size=(2, 2)),
    "subclassed": lambda: Subclassed(UNITS),
    "residual": lambda: Residual(nn.SimpleCell(UNITS)),
    "without weights of its own": lambda: WithoutWeightsOfItsOwn(nn.SimpleCell(UNITS)),
    "residual in residual": lambda: Residual(WithoutWeightsOfItsOwn(nn.SimpleCell(UNITS))),
    "a field called cell": lambda: FieldCalledCell(nn.SimpleCell(UNITS)),
    "cell in cell": lambda: FieldCalledCell(FieldCalledCell(nn.SimpleCell(UNITS))),
    "tuple of cells": lambda: Stack((nn.SimpleCell(UNITS), Residual(nn.SimpleCell(UNITS)))),
    "dict of modules": lambda: Named({"cell": nn.SimpleCell(UNITS), "pre": nn.Dense(UNITS)}),
    "made in setup": MadeInSetup,
    "made in compact": MadeInCompact,
    "one cell twice": twice,
}


def inputs_of(name: str) -> jax.Array:
    features = (4, 4, 2) if name == "ConvLSTMCell" else (FEATURES,)
    return jax.random.normal(jax.random.key(1), (BATCH, STEPS, *features))


def loop(cell: Any, xs: jax.Array) -> jax.Array:
    carry = cell.initialize_carry(jax.random.key(0), xs[:, 0].shape)
    ys = []
    for t in range(xs.shape[1]):
        carry, y = cell(carry, xs[:, t])
        ys.append(y)
    return jnp.stack(ys, 1)


class Direct(nn.Module):
    """Runs a cell step by step, as a field of itself."""

    cell: nn.RNNCellBase

    def __call__(self, xs: jax.Array) -> jax.Array:
        return loop(self.cell, xs)


class TwoOfOne(nn.Module):
    """A field that is wrapped in compact, in one host, and goes bare into another."""

    cell: nn.RNNCellBase
    wrap: Wrap

    @nn.compact
    def __call__(self, xs: jax.Array) -> Any:
        return nn.RNN(self.wrap(self.cell))(xs), nn.RNN(self.cell)(xs)


def in_compact(call: Callable[..., Any]) -> Callable[..., nn.Module]:
    def make(make_cell: Callable[[], Any], wrap: Wrap) -> nn.Module:
        class Model(nn.Module):
            @nn.compact
            def __call__(self, xs: jax.Array) -> Any:
                return call(make_cell, wrap, xs)

        return Model()

    return make


def in_setup(build: Callable[..., Any]) -> Callable[..., nn.Module]:
    def make(make_cell: Callable[[], Any], wrap: Wrap) -> nn.Module:
        class Model(nn.Module):
            def setup(self) -> None:
                self.layer = build(make_cell, wrap)

            def __call__(self, xs: jax.Array) -> Any:
                layer: Any = self.layer
                return loop(layer, xs) if isinstance(layer, nn.RNNCellBase) else layer(xs)

        return Model()

    return make


def scanned(make_cell: Callable[[], Any], wrap: Wrap, xs: jax.Array) -> Any:
    cell = wrap(make_cell())
    scan = nn.scan(
        lambda cell, carry, x: cell(carry, x),
        variable_broadcast="params",
        split_rngs={"params": False},
        in_axes=1,
        out_axes=1,
    )
    return scan(cell, cell.initialize_carry(jax.random.key(0), xs[:, 0].shape), xs)[1]


def with_copies(make_cell: Callable[[], Any], wrap: Wrap) -> nn.Module:
    cell = wrap(make_cell())
    return nn.Bidirectional(nn.RNN(cell), nn.RNN(cell.copy()))


def shared(make_cell: Callable[[], Any], wrap: Wrap) -> nn.Module:
    """Two wrappers around one cell; two times the cell itself where there are none."""
    cell = make_cell()
    return nn.Bidirectional(nn.RNN(wrap(cell)), nn.RNN(wrap(cell)))


def rematerialized(make_cell: Callable[[], Any], wrap: Wrap, xs: jax.Array) -> Any:
    return nn.remat(lambda rnn, xs: rnn(xs))(nn.RNN(wrap(make_cell())), xs)


def made_outside(make_cell: Callable[[], Any], wrap: Wrap) -> nn.Module:
    cell = make_cell()
    return in_compact(lambda make_cell, wrap, xs: nn.RNN(wrap(cell))(xs))(make_cell, wrap)


HOSTS: dict[str, Callable[[Callable[[], Any], Wrap], nn.Module]] = {
    "nn.RNN": lambda make_cell, wrap: nn.RNN(wrap(make_cell())),
    "nn.Bidirectional": lambda make_cell, wrap: nn.Bidirectional(
        nn.RNN(wrap(make_cell())), nn.RNN(wrap(make_cell()))
    ),
    "nn.Bidirectional of copies": with_copies,
    "nn.Bidirectional of one cell": shared,
    "nn.RNN in compact": in_compact(lambda make_cell, wrap, xs: nn.RNN(wrap(make_cell()))(xs)),
    "copies in compact": in_compact(lambda make_cell, wrap, xs: with_copies(make_cell, wrap)(xs)),
    "one cell in compact": in_compact(lambda make_cell, wrap, xs: shared(make_cell, wrap)(xs)),
    "made outside of compact": made_outside,
    "nn.RNN in setup": in_setup(lambda make_cell, wrap: nn.RNN(wrap(make_cell()))),
    "copies in setup": in_setup(with_copies),
    "nn.scan": in_compact(scanned),
    "nn.remat": in_compact(rematerialized),
    "a field": lambda make_cell, wrap: Direct(wrap(make_cell())),
    "a field that is wrapped in compact": lambda make_cell, wrap: TwoOfOne(make_cell(), wrap),
    "a loop in compact": in_compact(lambda make_cell, wrap, xs: loop(wrap(make_cell()), xs)),
    "a loop in setup": in_setup(lambda make_cell, wrap: wrap(make_cell())),
}

"""Recurrent dropout around Flax linen cells."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ._dropout_carry import DropoutCarry as DropoutCarry
from ._dropout_carry import run_step, start_sequence
from ._noise import Noise
from ._spec import Masks, PyTree, RecurrentDropout, active_noises

LSTM_CELLS = (nn.LSTMCell, nn.OptimizedLSTMCell, nn.ConvLSTMCell)
"""The cells whose carry is `(c, h)`; subclasses count."""


class _DropoutWrapper(nn.RNNCellBase):
    """What both wrappers share; a subclass has `cell`, `deterministic` and `spec`."""

    def setup(self) -> None:
        # The weights keep the names that they have without the wrapper.
        nn.share_scope(self, self.cell)

    @property
    def spec(self) -> RecurrentDropout:
        raise NotImplementedError

    @property
    def num_feature_axes(self) -> int:
        return self.cell.num_feature_axes

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> DropoutCarry:
        return self._start(rng, self.cell.initialize_carry(rng, input_shape), input_shape)

    @nn.nowrap
    def redraw_masks(self, rng, carry, input_shape) -> DropoutCarry:
        cell_carry = carry.cell_carry if isinstance(carry, DropoutCarry) else carry
        if isinstance(self.cell, _DropoutWrapper):
            cell_carry = self.cell.redraw_masks(rng, cell_carry, input_shape)
        return self._start(rng, cell_carry, input_shape)

    @nn.nowrap
    def _start(self, rng, cell_carry, input_shape):
        sequence_rng = None if self.deterministic else _sequence_rng(self, rng)
        if sequence_rng is None:
            return DropoutCarry(cell_carry, None, None)
        values = _site_shapes(self.cell, cell_carry, input_shape, self.spec)
        return start_sequence(cell_carry, sequence_rng, self.spec, values)

    def __call__(self, carry: DropoutCarry, x: PyTree) -> tuple[DropoutCarry, PyTree]:
        spec, params = self.spec, None
        evaluate = self.deterministic or (self.is_initializing() and carry.masks is None)

        def cell(params, carry, x):
            if params is None:
                return self.cell(carry, x)
            run = nn.map_variables(lambda cell, *args: cell(*args), "params", lambda _: {"params": params})
            return run(self.cell, carry, x)

        if spec.params is not None:
            if self.is_initializing():
                self.cell(carry.cell_carry, x)
            params = self.cell.variables["params"]
        return run_step(carry, x, cell=cell, params=params, dropout=spec, deterministic=evaluate)


class DropoutCell(_DropoutWrapper):
    cell: nn.RNNCellBase
    dropout: RecurrentDropout
    deterministic: bool = False

    @property
    def spec(self):
        import dataclasses
        return dataclasses.replace(self.dropout, state=expand_state(self.cell, self.dropout.state))

def expand_state(cell, state):
    if state is None: return None
    if isinstance(cell, _DropoutWrapper):
        return DropoutCarry(expand_state(cell.cell, state), None, None)
    if isinstance(state, Noise) and isinstance(cell, LSTM_CELLS):
        return (None, state)
    return state

def _sequence_rng(module, rng):
    owner = module if module.scope is not None else nn.module._context.module_stack[-1]
    if owner is None or owner.scope is None: return rng
    if owner.has_rng("dropout"): return owner.make_rng("dropout")
    if owner.is_initializing(): return None
    raise ValueError("no dropout rng")

def _site_shapes(cell, cell_carry, input_shape, spec):
    x = jax.ShapeDtypeStruct(input_shape, jnp.float32)
    y, params = None, None
    if any(n.variational for n in active_noises((spec.params, spec.output))):
        unbound = cell.clone(parent=None, _deep_clone=True, _reset_names=True)
        (_, y), variables = jax.eval_shape(unbound.init_with_output, jax.random.key(0), cell_carry, x)
        params = nn.unbox(variables)["params"]
    return Masks(params, x, cell_carry, y)

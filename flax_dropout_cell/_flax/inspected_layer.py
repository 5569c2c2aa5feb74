"""Shared by linen's and NNX's layers: the table and the picture of their noise."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax

from .._inspect.describe import Description, describe
from .._inspect.plot_masks import draw_strips, plot_strips
from .._sequence.dropout_scan import at_a_step
from .._spec.recurrent_dropout import PyTree, RecurrentDropout
from .deterministic import is_evaluation
from .framework import Framework
from .layer import Settings, read_layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class InspectedLayer:
    """Gives a layer `describe` and `plot_masks`."""

    _framework: ClassVar[Framework]

    def describe(self, inputs: Any, *, time_major: bool | None = None) -> Description:
        """Describes the noise of the layer, as a table; needs no weights and no keys.

        Args:
          inputs: inputs, or a `jax.ShapeDtypeStruct` of them.
          time_major: see the layer.

        Returns:
          A `Description`, as `fdc.describe` gives it for one step of the cell.

        Raises:
          ValueError: if the inputs lack an axis, or a noise does not fit its site.

        Example:
          >>> import flax_dropout_cell as fdc
          >>> import jax, jax.numpy as jnp
          >>> gal = fdc.recipes.gal2016(input_keep_prob=0.8, recurrent_keep_prob=0.7)
          >>> fdc.linen.RNN(fdc.linen.GRUCell(8), gal).describe(jnp.ones((4, 20, 8)))
          site                 value          noise                   drawn  mask        shared over
          input                float32[4, 8]  Dropout(keep_prob=0.8)  once   bool[4, 8]  steps
          inside['recurrent']  float32[4, 8]  Dropout(keep_prob=0.7)  once   bool[4, 8]  steps
          without noise: params (10 leaves), state, output
          free sites inside the cell: candidate, hidden, input_per_gate, recurrent_per_gate
          >>> from flax import nnx
          >>> cell = fdc.nnx.GRUCell(8, 8, rngs=nnx.Rngs(0))
          >>> table = fdc.nnx.RNN(cell, gal).describe(jnp.ones((4, 20, 8)))
          >>> [place.path for place in table.places]
          ['input', "inside['recurrent']"]
        """
        traced = _trace_layer(self, inputs, time_major)
        x = at_a_step(traced.xs)
        shown = describe(traced.params, traced.carry, x, cell=traced.cell, dropout=traced.dropout)
        layer: Any = self
        return dataclasses.replace(shown, evaluates=is_evaluation(None, layer.deterministic))

    def plot_masks(
        self,
        inputs: Any,
        rng: jax.Array,
        *,
        start: int = 0,
        row: int = 0,
        max_units: int = 32,
        time_major: bool | None = None,
        ax: "Axes | Sequence[Axes] | None" = None,
    ) -> "Figure":
        """Plots which units one row of a batch keeps and drops over time, as `fdc.plot_masks`.

        Args:
          inputs: inputs, or a `jax.ShapeDtypeStruct` of them.
          rng: the key of the call; the masks are those of a call of the layer with this key.
          start: the absolute index of the first step, 0 by default.
          row: which row of the batch, counted through all batch dims.
          max_units: how many units of each array are shown.
          time_major: see the layer.
          ax: the matplotlib axes to draw in, one for each array; a new figure by default.

        Returns:
          A matplotlib figure.

        Raises:
          ImportError: if matplotlib is not installed.
          ValueError: if no noise draws a mask, `row` is not in the batch, or `rng` is None.
        """
        traced = _trace_layer(self, inputs, time_major)
        strips = draw_strips(
            traced.params,
            traced.carry,
            traced.xs,
            rng,
            cell=traced.cell,
            dropout=traced.dropout,
            start=start,
            row=row,
            batch_ndim=traced.batch_ndim,
        )
        return plot_strips(strips, start=start, max_units=max_units, ax=ax)


class _Traced(NamedTuple):
    """A layer as the functions that look at a cell take it: shapes in place of arrays."""

    params: PyTree
    carry: PyTree
    xs: PyTree
    cell: Callable[..., Any]
    dropout: RecurrentDropout
    batch_ndim: int


def _trace_layer(layer: Any, inputs: Any, time_major: bool | None) -> _Traced:
    cell, framework = layer.cell, layer._framework

    def time_first(inputs: Any) -> Any:
        leads = Settings.of(layer, time_major=time_major).time_major
        return read_layout(inputs, framework.num_feature_axes(cell), leads).xs

    xs = jax.eval_shape(time_first, inputs)
    carry = framework.carry_shapes(cell, jax.tree.map(lambda leaf: leaf.shape[1:], xs))
    params = framework.params_shapes(cell, carry, at_a_step(xs))
    dropout = framework.resolve_noise(layer.dropout, cell, carry)
    batch_ndim = max(leaf.ndim for leaf in jax.tree.leaves(xs)) - 1
    batch_ndim -= framework.num_feature_axes(cell)
    return _Traced(params, carry, xs, framework.traceable(cell), dropout, batch_ndim)

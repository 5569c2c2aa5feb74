"""The hosts of NNX; `hosts.py` has the table.

First those around a module, whose stream moves on from call to call.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from host_runs import WHOLE, Run, Window, one_direction
from probes import NnxProbe, seen

import flax_dropout_cell as fdc


def nnx_probe(
    spec: fdc.RecurrentDropout, rngs: nnx.Rngs | None, weights: Any = None
) -> fdc.nnx.DropoutCell:
    """A probe that draws from `rngs`; without any it evaluates."""
    return fdc.nnx.DropoutCell(NnxProbe(weights), spec, deterministic=rngs is None, rngs=rngs)


def _nnx_start(cell: Any, xs: jax.Array, window: Window) -> Any:
    return cell.initialize_carry(xs.shape[1:]) if window.carry is None else window.carry


def in_nnx_rnn(cell: Any, xs: jax.Array, window: Window = WHOLE) -> tuple[Any, Any]:
    rnn: Any = nnx.RNN(cell, time_major=True, return_carry=True)
    return rnn(xs, initial_carry=window.carry, seq_lengths=window.seq_lengths)


def in_nnx_bidirectional(cells: tuple[Any, Any], xs: jax.Array) -> tuple[Any, Any]:
    forward, backward = map(nnx.RNN, cells)
    both: Any = nnx.Bidirectional(
        forward, backward, merge_fn=lambda *ys: jnp.stack(ys), return_carry=True
    )
    return both(xs, time_major=True)


def in_nnx_scan(
    cell: Any, xs: jax.Array, window: Window = WHOLE, axes: Any = None
) -> tuple[Any, Any]:
    scan: Any = nnx.scan(
        lambda cell, carry, x: cell(carry, x),
        in_axes=(axes, nnx.Carry, 0),
        out_axes=(nnx.Carry, 0),
    )
    return scan(cell, _nnx_start(cell, xs, window), xs)


def in_nnx_loop(cell: Any, xs: jax.Array, window: Window = WHOLE) -> tuple[Any, Any]:
    carry, outputs = _nnx_start(cell, xs, window), []
    for x in xs:
        carry, y = cell(carry, x)
        outputs.append(y)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def nnx_host(run: Callable[..., tuple[Any, Any]]) -> Callable[..., Run]:
    def host(
        spec: fdc.RecurrentDropout,
        rng: jax.Array | None,
        xs: jax.Array,
        weights: Any = None,
        window: Window = WHOLE,
    ) -> Run:
        weights = jnp.ones(xs.shape[-1]) if weights is None else weights
        cell = nnx_probe(spec, None if rng is None else nnx.Rngs(dropout=rng), weights)
        carry, ys = run(cell, xs, window)
        return Run(seen(carry.cell_carry, ys), carry)

    return host


def run_nnx_layer(
    spec: fdc.RecurrentDropout,
    rng: jax.Array | None,
    xs: jax.Array,
    weights: Any = None,
    window: Window = WHOLE,
) -> Run:
    """This library's own layer, with the key at the call."""
    cell: Any = NnxProbe(jnp.ones(xs.shape[-1]) if weights is None else weights)
    layer = fdc.nnx.RNN(cell, spec, rng is None, time_major=True, return_carry=True)
    options = {"initial_carry": window.carry, "seq_lengths": window.seq_lengths}
    carry, ys = layer(xs, rngs=rng, start=window.start, **options)
    return Run(seen(carry, ys), carry)


def run_nnx_bidirectional(
    spec: fdc.RecurrentDropout,
    rng: jax.Array | None,
    xs: jax.Array,
    weights: Any = None,
    direction: int = 0,
) -> Run:
    rngs = None if rng is None else nnx.Rngs(dropout=rng)
    cells = nnx_probe(spec, rngs, weights), nnx_probe(spec, rngs, weights)
    return one_direction(*in_nnx_bidirectional(cells, xs), direction)

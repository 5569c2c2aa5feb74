"""The hosts of linen; `hosts.py` has the table."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from host_runs import WHOLE, Run, Window, one_direction
from probes import LinenProbe, seen

import flax_dropout_cell as fdc


def run_linen_layer(
    spec: fdc.RecurrentDropout,
    rng: jax.Array | None,
    xs: jax.Array,
    weights: Any = None,
    window: Window = WHOLE,
) -> Run:
    """This library's own layer, with the key at the call."""
    layer = fdc.linen.RNN(LinenProbe(), spec, rng is None, time_major=True, return_carry=True)
    options = {"initial_carry": window.carry, "seq_lengths": window.seq_lengths}
    carry, ys = _apply(layer, None, xs, weights, rng=rng, start=window.start, **options)
    return Run(seen(carry, ys), carry)


def _linen_probe(spec: fdc.RecurrentDropout, rng: jax.Array | None) -> fdc.linen.DropoutCell:
    return fdc.linen.DropoutCell(LinenProbe(), spec, deterministic=rng is None)


def _apply(
    module: nn.Module, stream: jax.Array | None, xs: jax.Array, weights: Any = None, **options: Any
) -> Any:
    variables = module.init(jax.random.key(7), xs)
    if weights is not None:
        variables = jax.tree.map(lambda _: weights, variables)
    rngs = None if stream is None else {"dropout": stream}
    return module.apply(variables, xs, rngs=rngs, **options)


def run_linen_rnn(
    spec: fdc.RecurrentDropout,
    rng: jax.Array | None,
    xs: jax.Array,
    weights: Any = None,
    window: Window = WHOLE,
) -> Run:
    rnn = nn.RNN(_linen_probe(spec, rng), time_major=True, return_carry=True)
    options = {"initial_carry": window.carry, "seq_lengths": window.seq_lengths}
    carry, ys = _apply(rnn, rng, xs, weights, **options)
    return Run(seen(carry.cell_carry, ys), carry)


def run_linen_rnn_in_a_module(
    spec: fdc.RecurrentDropout, rng: jax.Array | None, xs: jax.Array, weights: Any = None
) -> Run:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, xs: jax.Array) -> Any:
            return nn.RNN(_linen_probe(spec, rng), time_major=True, return_carry=True)(xs)

    carry, ys = _apply(Model(), rng, xs, weights)
    return Run(seen(carry.cell_carry, ys), carry)


def run_linen_bidirectional(
    spec: fdc.RecurrentDropout,
    rng: jax.Array | None,
    xs: jax.Array,
    weights: Any = None,
    direction: int = 0,
) -> Run:
    forward, backward = (nn.RNN(_linen_probe(spec, rng), time_major=True) for _ in range(2))
    both = nn.Bidirectional(
        forward, backward, time_major=True, return_carry=True, merge_fn=lambda *ys: jnp.stack(ys)
    )
    carries, ys = _apply(both, rng, xs, weights)
    return one_direction(carries, ys, direction)


def run_linen_scan(
    spec: fdc.RecurrentDropout,
    rng: jax.Array | None,
    xs: jax.Array,
    weights: Any = None,
    window: Window = WHOLE,
) -> Run:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, xs: jax.Array, carry: Any = None) -> Any:
            cell = _linen_probe(spec, rng)
            if carry is None:
                carry = cell.initialize_carry(jax.random.key(0), xs.shape[1:])
            scan = nn.scan(
                lambda cell, carry, x: cell(carry, x),
                variable_broadcast="params",
                split_rngs={"params": False},
            )
            return scan(cell, carry, xs)

    carry, ys = _apply(Model(), rng, xs, weights, carry=window.carry)
    return Run(seen(carry.cell_carry, ys), carry)


def run_linen_scan_from_outside(
    spec: fdc.RecurrentDropout,
    rng: jax.Array | None,
    xs: jax.Array,
    weights: Any = None,
    window: Window = WHOLE,
) -> Run:
    """The carry is made by an unbound cell, from the key that it is given."""
    scan = nn.scan(fdc.linen.DropoutCell, variable_broadcast="params", split_rngs={"params": False})
    cell = scan(LinenProbe(), spec, deterministic=rng is None)
    carry = window.carry
    if carry is None:
        key = jax.random.key(0) if rng is None else rng
        carry = _linen_probe(spec, rng).initialize_carry(key, xs.shape[1:])
    variables = cell.init(jax.random.key(7), carry, xs)
    if weights is not None:
        variables = jax.tree.map(lambda _: weights, variables)
    carry, ys = cell.apply(variables, carry, xs)
    return Run(seen(carry.cell_carry, ys), carry)

"""Every host that runs a cell, behind one signature: the table that cross-cutting tests run over.

A host gives what its probe saw. The key is the sequence's own in the core and the layers,
and the `dropout` stream's in the hosts of linen and NNX; None evaluates.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from probes import LinenProbe, NnxProbe, first_carry, mixed, ones, probe_cell, seen

import flax_dropout_cell as fdc


class Run(NamedTuple):
    """What a host gave: a mask value `[time, batch, units]` for each site, and its last carry."""

    seen: dict[str, Any]
    carry: Any


class Window(NamedTuple):
    """The part of a sequence that a host is to run, and how much of it each row has."""

    carry: Any = None  # of the host's run before; None starts a sequence
    start: int = 0  # the index of the first step; a wrapper's carry knows it by itself
    seq_lengths: Any = None


WHOLE = Window()


# The core


def run_dropout_scan(
    spec: fdc.RecurrentDropout,
    rng: jax.Array | None,
    xs: jax.Array,
    weights: Any = None,
    window: Window = WHOLE,
) -> Run:
    carry, ys = fdc.dropout_scan(
        {"w": jnp.ones(xs.shape[-1]) if weights is None else weights},
        first_carry(xs[0]) if window.carry is None else window.carry,
        xs,
        rng,
        cell=probe_cell,
        dropout=spec,
        start=window.start,
        seq_lengths=window.seq_lengths,
    )
    return Run(seen(carry, ys), carry)


def run_python_loop(
    spec: fdc.RecurrentDropout,
    rng: jax.Array | None,
    xs: jax.Array,
    weights: Any = None,
    window: Window = WHOLE,
) -> Run:
    params = {"w": jnp.ones(xs.shape[-1]) if weights is None else weights}
    carry = first_carry(xs[0]) if window.carry is None else window.carry
    outputs, masks = [], None
    if rng is not None:
        masks = fdc.draw_masks(params, carry, xs[0], rng, cell=probe_cell, dropout=spec)
    for t, x in enumerate(xs, start=window.start):
        carry, y = fdc.dropout_cell(
            params, carry, x, rng, step=t, cell=probe_cell, dropout=spec, masks=masks
        )
        outputs.append(y)
    ys = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
    return Run(seen(carry, ys), carry)


# Linen


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
    return _one_direction(carries, ys, direction)


def _one_direction(carries: Any, ys: Any, direction: int) -> Run:
    # The backward layer's outputs, back in the order in which it ran.
    ys = jax.tree.map(lambda leaf: leaf[direction][:: (1, -1)[direction]], ys)
    return Run(seen(carries[direction].cell_carry, ys), carries[direction])


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


# NNX: first around a module, whose stream moves on from call to call


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


def _nnx_host(run: Callable[..., tuple[Any, Any]]) -> Callable[..., Run]:
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
    return _one_direction(*in_nnx_bidirectional(cells, xs), direction)


# The table

HOSTS: dict[str, Callable[..., Run]] = {
    "dropout_scan": run_dropout_scan,
    "python loop": run_python_loop,
    "fdc.linen.RNN": run_linen_layer,
    "nn.RNN": run_linen_rnn,
    "nn.RNN in a module": run_linen_rnn_in_a_module,
    "nn.Bidirectional": run_linen_bidirectional,
    "nn.Bidirectional, backward": functools.partial(run_linen_bidirectional, direction=1),
    "nn.scan": run_linen_scan,
    "nn.scan from outside": run_linen_scan_from_outside,
    "fdc.nnx.RNN": run_nnx_layer,
    "nnx.RNN": _nnx_host(in_nnx_rnn),
    "nnx.Bidirectional": run_nnx_bidirectional,
    "nnx.Bidirectional, backward": functools.partial(run_nnx_bidirectional, direction=1),
    "nnx.scan": _nnx_host(in_nnx_scan),
    "nnx, python loop": _nnx_host(in_nnx_loop),
}
ONE_EACH = ("dropout_scan", "nn.RNN", "nnx.RNN")
"""The plainest host of each framework. These take `seq_lengths` too."""
LAYERS = ("fdc.linen.RNN", "fdc.nnx.RNN")
GOES_ON = (*ONE_EACH, *LAYERS, "python loop", "nn.scan", "nn.scan from outside", "nnx.scan")
"""Those that go on from a carry. (An NNX loop's steps are those of its scan.)"""

FROZEN = {"weights and state frozen": ("params", "state"), "ends frozen": ("input", "output")}
"""Two specs that have both kinds of noise, and each kind at every site once."""
SPECS = {name: mixed(frozen) for name, frozen in FROZEN.items()}


def is_frozen(spec: str, site: str) -> bool:
    return site.split(".")[0] in FROZEN[spec]


@functools.cache
def program(host: str, spec: str) -> Callable[..., Run]:
    """A host, compiled, with a spec of the table; without a key it evaluates."""
    return jax.jit(lambda rng, xs: HOSTS[host](SPECS[spec], rng, xs))


@functools.cache
def run(host: str, spec: str, seed: int | None) -> Run:
    """What a compiled host gives from `key(seed)`; without a seed it evaluates."""
    rng = None if seed is None else jax.random.key(seed)
    done = program(host, spec)(rng, ones())
    return Run(jax.tree.map(np.asarray, done.seen), done.carry)


def sequence_key(run: Run, rng: jax.Array) -> jax.Array:
    """The key from which the core draws what a host drew from `rng`."""
    # A wrapper's carry holds it where there are per-step noises, as in all of SPECS.
    return run.carry.rng.key[0] if hasattr(run.carry, "rng") else rng

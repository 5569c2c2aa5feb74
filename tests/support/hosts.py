"""Every host that runs a cell, behind one signature: the table that cross-cutting tests run over.

A host gives what its probe saw. The key is the sequence's own in the core and the layers,
and the `dropout` stream's in the hosts of linen and NNX; None evaluates.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import linen_hosts
import nnx_hosts
import numpy as np
from host_runs import WHOLE, Run, Window
from probes import first_carry, mixed, ones, probe_cell, seen
from quick_prng import QUICK, quick_key

import flax_dropout_cell as fdc


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


# The table

HOSTS: dict[str, Callable[..., Run]] = {
    "dropout_scan": run_dropout_scan,
    "python loop": run_python_loop,
    "fdc.linen.RNN": linen_hosts.run_linen_layer,
    "nn.RNN": linen_hosts.run_linen_rnn,
    "nn.RNN in a module": linen_hosts.run_linen_rnn_in_a_module,
    "nn.Bidirectional": linen_hosts.run_linen_bidirectional,
    "nn.Bidirectional, backward": functools.partial(
        linen_hosts.run_linen_bidirectional, direction=1
    ),
    "nn.scan": linen_hosts.run_linen_scan,
    "nn.scan from outside": linen_hosts.run_linen_scan_from_outside,
    "fdc.nnx.RNN": nnx_hosts.run_nnx_layer,
    "nnx.RNN": nnx_hosts.nnx_host(nnx_hosts.in_nnx_rnn),
    "nnx.Bidirectional": nnx_hosts.run_nnx_bidirectional,
    "nnx.Bidirectional, backward": functools.partial(nnx_hosts.run_nnx_bidirectional, direction=1),
    "nnx.scan": nnx_hosts.nnx_host(nnx_hosts.in_nnx_scan),
    "nnx, python loop": nnx_hosts.nnx_host(nnx_hosts.in_nnx_loop),
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
    """A compiled host's result with `quick_key(seed)`; without a seed, in evaluation."""
    rng = None if seed is None else quick_key(seed)
    done = program(host, spec)(rng, ones())
    return Run(jax.tree.map(np.asarray, done.seen), done.carry)


def sequence_key(run: Run, rng: jax.Array) -> jax.Array:
    """The key from which the core draws what a host drew from `rng`."""
    # A wrapper's carry holds it where there are per-step noises, as in all of SPECS.
    if not hasattr(run.carry, "rng"):
        return rng
    return jax.random.wrap_key_data(run.carry.rng.key[0], impl=QUICK)

"""Cells through which masks can be read off, and every host that runs them.

With ones for inputs and weights, what a probe emits at a site is the mask there, divided by
keep_prob. `HOSTS` is the table that the cross-cutting tests run over.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import flax_dropout_cell as fdc
from flax_dropout_cell.linen import DropoutCell

STEPS, BATCH, UNITS = 5, 4, 64
SITE_NAMES = ("params", "input", "state.a", "state.b", "output")


def probe_cell(params: Any, carry: Any, x: jax.Array) -> tuple[Any, Any]:
    ones = jnp.ones_like(x)
    weights = jnp.broadcast_to(params["w"], x.shape)
    y = {"params": weights, "input": x, "state": carry, "output": ones}
    return {"a": ones, "b": ones}, y


class LinenProbe(nn.RNNCellBase):
    """`probe_cell` as a linen cell."""

    @nn.compact
    def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, Any]:
        w = self.param("w", nn.initializers.ones, inputs.shape[-1:])
        return probe_cell({"w": w}, carry, inputs)

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: Any) -> Any:
        del rng
        return {"a": jnp.ones(input_shape), "b": jnp.ones(input_shape)}

    @property
    def num_feature_axes(self) -> int:
        return 1


def spec_of(noise: fdc.Noise | None) -> fdc.RecurrentDropout:
    """One noise at every site of a probe; at `output` only on the leaf that shows no other."""
    output = {"params": None, "input": None, "state": None, "output": noise}
    state = {"a": noise, "b": noise}
    return fdc.RecurrentDropout(params=noise, input=noise, state=state, output=output)


class Run(NamedTuple):
    """What a host gave: a mask value `[time, batch, units]` for each site, and its last carry."""

    seen: dict[str, Any]
    carry: Any


def seen(cell_carry: Any, ys: Any) -> dict[str, Any]:
    """Lines the masks up by step. A state's mask shows in the carry that the next step reads."""
    state = {
        name: jnp.concatenate([ys["state"][name][1:], cell_carry[name][None]]) for name in "ab"
    }
    return {
        "params": ys["params"],
        "input": ys["input"],
        "state.a": state["a"],
        "state.b": state["b"],
        "output": ys["output"],
    }


def ones(steps: int = STEPS, batch: int = BATCH, units: int = UNITS) -> jax.Array:
    return jnp.ones((steps, batch, units))


def first_carry(x: jax.Array) -> Any:
    return {"a": jnp.ones_like(x), "b": jnp.ones_like(x)}


def run_dropout_scan(spec: fdc.RecurrentDropout, rng: jax.Array | None, xs: jax.Array) -> Run:
    params = {"w": jnp.ones(xs.shape[-1])}
    carry, ys = fdc.dropout_scan(params, first_carry(xs[0]), xs, rng, cell=probe_cell, dropout=spec)
    return Run(seen(carry, ys), carry)


def run_python_loop(spec: fdc.RecurrentDropout, rng: jax.Array | None, xs: jax.Array) -> Run:
    params, carry, outputs, masks = {"w": jnp.ones(xs.shape[-1])}, first_carry(xs[0]), [], None
    if rng is not None:
        masks = fdc.draw_masks(params, carry, xs[0], rng, cell=probe_cell, dropout=spec)
    for t, x in enumerate(xs):
        step_rng = None if rng is None else jax.random.fold_in(rng, t)
        carry, y = fdc.dropout_cell(
            params, carry, x, step_rng, cell=probe_cell, dropout=spec, masks=masks
        )
        outputs.append(y)
    ys = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
    return Run(seen(carry, ys), carry)


def _apply(module: nn.Module, rng: jax.Array | None, xs: jax.Array, **kwargs: Any) -> Any:
    variables = module.init(jax.random.key(7), xs)
    rngs = None if rng is None else {"dropout": rng}
    return module.apply(variables, xs, rngs=rngs, **kwargs)


def run_linen_rnn(spec: fdc.RecurrentDropout, rng: jax.Array | None, xs: jax.Array) -> Run:
    cell = DropoutCell(LinenProbe(), spec, deterministic=rng is None)
    rnn = nn.RNN(cell, time_major=True, return_carry=True)
    carry, ys = _apply(rnn, rng, xs)
    return Run(seen(carry.cell_carry, ys), carry)


def run_linen_rnn_in_a_module(
    spec: fdc.RecurrentDropout, rng: jax.Array | None, xs: jax.Array
) -> Run:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, xs: jax.Array) -> Any:
            cell = DropoutCell(LinenProbe(), spec, deterministic=rng is None)
            return nn.RNN(cell, time_major=True, return_carry=True)(xs)

    carry, ys = _apply(Model(), rng, xs)
    return Run(seen(carry.cell_carry, ys), carry)


def run_linen_bidirectional(
    spec: fdc.RecurrentDropout, rng: jax.Array | None, xs: jax.Array, direction: int = 0
) -> Run:
    def rnn() -> nn.RNN:
        cell = DropoutCell(LinenProbe(), spec, deterministic=rng is None)
        return nn.RNN(cell, time_major=True)

    both = nn.Bidirectional(
        rnn(), rnn(), time_major=True, return_carry=True, merge_fn=lambda f, b: jnp.stack([f, b])
    )
    carries, ys = _apply(both, rng, xs)
    ys = jax.tree.map(lambda leaf: leaf[direction], ys)
    if direction == 1:  # back in the order in which the backward layer ran
        ys = jax.tree.map(lambda leaf: leaf[::-1], ys)
    carry = carries[direction]
    return Run(seen(carry.cell_carry, ys), carry)


def run_linen_scan(spec: fdc.RecurrentDropout, rng: jax.Array | None, xs: jax.Array) -> Run:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, xs: jax.Array) -> Any:
            cell = DropoutCell(LinenProbe(), spec, deterministic=rng is None)
            carry = cell.initialize_carry(jax.random.key(0), xs.shape[1:])
            scan = nn.scan(
                lambda cell, carry, x: cell(carry, x),
                variable_broadcast="params",
                split_rngs={"params": False},
            )
            return scan(cell, carry, xs)

    carry, ys = _apply(Model(), rng, xs)
    return Run(seen(carry.cell_carry, ys), carry)


def run_linen_scan_from_outside(
    spec: fdc.RecurrentDropout, rng: jax.Array | None, xs: jax.Array
) -> Run:
    """The carry is made by an unbound cell, from the key that it is given."""
    scan = nn.scan(DropoutCell, variable_broadcast="params", split_rngs={"params": False})
    cell = scan(LinenProbe(), spec, deterministic=rng is None)
    unbound = DropoutCell(LinenProbe(), spec, deterministic=rng is None)
    carry = unbound.initialize_carry(jax.random.key(0) if rng is None else rng, xs.shape[1:])
    variables = cell.init(jax.random.key(7), carry, xs)
    carry, ys = cell.apply(variables, carry, xs)
    return Run(seen(carry.cell_carry, ys), carry)


Host = Callable[[fdc.RecurrentDropout, jax.Array | None, jax.Array], Run]

HOSTS: dict[str, Host] = {
    "dropout_scan": run_dropout_scan,
    "python loop": run_python_loop,
    "nn.RNN": run_linen_rnn,
    "nn.RNN in a module": run_linen_rnn_in_a_module,
    "nn.Bidirectional": run_linen_bidirectional,
    "nn.Bidirectional, backward": functools.partial(run_linen_bidirectional, direction=1),
    "nn.scan": run_linen_scan,
    "nn.scan from outside": run_linen_scan_from_outside,
}


@functools.cache
def run(host: str, noise: fdc.Noise | None, seed: int | None, sites: str = "all") -> Run:
    """Runs a host, compiled, with one noise at `sites`; without a seed it evaluates."""
    spec = spec_of(noise)
    if sites != "all":
        spec = fdc.RecurrentDropout(**{sites: getattr(spec, sites)})
    rng = None if seed is None else jax.random.key(seed)
    done = jax.jit(lambda rng, xs: HOSTS[host](spec, rng, xs))(rng, ones())
    return Run(jax.tree.map(np.asarray, done.seen), done.carry)

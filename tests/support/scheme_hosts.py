"""The Flax hosts around this library's cells, with the weights that the schemes are run with."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from paper_schemes import FEATURES, UNITS, as_dict, example
from quick_prng import QUICK

import flax_dropout_cell as fdc

EVALUATION = None
"""Takes the place of a key: noise draws from it in training."""


class Ran(NamedTuple):
    """A host's result, with its outputs in the order in which it ran.

    Attributes:
      carry: the cell's own last carry.
      ys: `[time, batch, units]`.
      masks: those that it drew once; for a layer, those that `draw_masks` draws from its key; None
        in evaluation.
      rng: the sequence's key; None where a wrapper's carry has none, as no step draws.
    """

    carry: Any
    ys: Any
    masks: fdc.Masks | None
    rng: Any


class Framework(NamedTuple):
    """A framework's cell with the weights of `example`, and a function that runs it.

    Attributes:
      hosts: each gives a `Ran` for each of its directions, of a spec, a key and inputs.
      tree: the cell's weights.
      pure: the cell as a function of them.
      to_core: a tree like that of the weights, as the core has it.
    """

    hosts: dict[str, Callable[[fdc.RecurrentDropout, Any, Any], list[Ran]]]
    tree: Any
    pure: Callable[..., Any]
    to_core: Callable[[Any], Any]

    def masks(self, masks: Any) -> dict[str, Any]:
        """Masks by the names that the equations have for them."""
        if masks.params is not None:
            # A weight without a mask gets one, which no equation asks for.
            whole = jax.tree.map(
                lambda mask, weight: jnp.ones_like(weight) if mask is None else mask,
                masks.params, self.tree, is_leaf=lambda leaf: leaf is None,
            )  # fmt: skip
            masks = masks._replace(params=self.to_core(whole))
        return as_dict(masks)

    def of_layer(self, spec: Any, key: Any, xs: Any, carry: Any, ys: Any) -> list[Ran]:
        if key is EVALUATION:
            return [Ran(carry, ys, None, None)]
        first = jax.tree.map(jnp.zeros_like, carry)
        masks = fdc.draw_masks(self.tree, first, xs[0], key, cell=self.pure, dropout=spec)
        return [Ran(carry, ys, masks, key)]


def of_wrapper(carry: Any, ys: Any) -> Ran:
    masks = carry.masks
    if masks is not None:
        masks = masks._replace(params=jax.tree.map(lambda mask: mask[0], masks.params))
    rng = None if carry.rng is None else jax.random.wrap_key_data(carry.rng.key[0], impl=QUICK)
    return Ran(carry.cell_carry, ys, masks, rng)


def of_both_wrappers(carries: Any, ys: Any) -> list[Ran]:
    return [of_wrapper(carries[0], ys[0]), of_wrapper(carries[1], ys[1][::-1])]


# Linen -------------------------------------------------------------------------------------------


def linen_module(host: str, cell: Any, spec: fdc.RecurrentDropout, evaluate: bool) -> Any:
    """A host as a module; the weights of its cells have the same names in all of them."""

    def wrapped() -> fdc.linen.DropoutCell:
        return fdc.linen.DropoutCell(cell.clone(name=None), spec, deterministic=evaluate)

    def rnn() -> nn.RNN:
        return nn.RNN(wrapped(), time_major=True, return_carry=True)

    class Scan(nn.Module):
        @nn.compact
        def __call__(self, xs: Any) -> Any:
            inner = cell.clone(name="cell", parent=self)
            wrapper = fdc.linen.DropoutCell(inner, spec, deterministic=evaluate)
            carry = wrapper.initialize_carry(jax.random.key(0), xs.shape[1:])
            scan = nn.scan(
                lambda cell, carry, x: cell(carry, x),
                variable_broadcast="params",
                split_rngs={"params": False},
            )
            return scan(wrapper, carry, xs)

    if host == "nn.RNN":
        return rnn()
    if host == "nn.scan":
        return Scan()
    if host == "nn.Bidirectional":
        return nn.Bidirectional(
            rnn(), rnn(), time_major=True, return_carry=True, merge_fn=lambda *ys: ys
        )
    return fdc.linen.RNN(cell, spec, evaluate, time_major=True, return_carry=True)


LINEN_HOSTS = ("nn.RNN", "nn.Bidirectional", "nn.scan", "fdc.linen.RNN")


@functools.cache
def linen(kind: str) -> Framework:
    """Linen's hosts around an "lstm" or a "gru"."""
    cell = {"lstm": fdc.linen.LSTMCell, "gru": fdc.linen.GRUCell}[kind](UNITS)
    variables = fdc.linen.cell_params(example(kind)[0], cell)
    tree = variables["params"]

    def pure(params: Any, carry: Any, x: Any, **sites: Any) -> Any:
        return cell.apply({"params": params}, carry, x, **sites)

    def run(host: str, spec: Any, key: Any, xs: Any) -> list[Ran]:
        params: Any = {"cell": tree}
        if host == "nn.Bidirectional":
            params = {"forward_rnn": params, "backward_rnn": params}
        module = linen_module(host, cell, spec, key is EVALUATION)
        options: Any = {} if key is EVALUATION else {"rngs": {"dropout": key}}
        if host == "fdc.linen.RNN" and options:
            options = {"rng": key}
        found = module.apply({"params": params}, xs, **options)
        if host == "nn.Bidirectional":
            return of_both_wrappers(*found)
        if host == "fdc.linen.RNN":
            return framework.of_layer(spec, key, xs, *found)
        return [of_wrapper(*found)]

    framework = Framework(
        hosts={host: functools.partial(run, host) for host in LINEN_HOSTS},
        tree=tree,
        pure=pure,
        to_core=lambda tree: fdc.linen.core_params({"params": tree}, cell),
    )
    return framework


# NNX ---------------------------------------------------------------------------------------------


def nnx_cell(kind: str) -> Any:
    if kind == "lstm":
        return fdc.nnx.LSTMCell(FEATURES, UNITS, rngs=nnx.Rngs(0))
    return fdc.nnx.GRUCell(FEATURES, UNITS, use_recurrent_bias=True, rngs=nnx.Rngs(0))


@functools.cache
def in_nnx(kind: str) -> Framework:
    """NNX's hosts around an "lstm" or a "gru"."""
    cell = nnx_cell(kind)
    tree = fdc.nnx.cell_params(example(kind)[0], cell)
    nnx.update(cell, tree)
    graph, state = nnx.split(cell)

    def pure(params: Any, carry: Any, x: Any, **sites: Any) -> Any:
        other = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(params))
        merged: Any = nnx.merge(graph, other)
        return merged(carry, x, **sites)

    def copy() -> Any:
        return nnx.merge(graph, jax.tree.map(jnp.asarray, state))

    def wrapped(spec: Any, rngs: Any) -> Any:
        return fdc.nnx.DropoutCell(copy(), spec, deterministic=rngs is None, rngs=rngs)

    def stream(key: Any) -> Any:
        return None if key is EVALUATION else nnx.Rngs(dropout=key)

    def in_rnn(spec: Any, key: Any, xs: Any) -> list[Ran]:
        rnn: Any = nnx.RNN(wrapped(spec, stream(key)), time_major=True, return_carry=True)
        return [of_wrapper(*rnn(xs))]

    def in_bidirectional(spec: Any, key: Any, xs: Any) -> list[Ran]:
        rngs = stream(key)
        rnns = (nnx.RNN(wrapped(spec, rngs)) for _ in range(2))
        options: Any = {"merge_fn": lambda *ys: ys, "return_carry": True}
        both: Any = nnx.Bidirectional(*rnns, **options)
        return of_both_wrappers(*both(xs, time_major=True))

    def in_layer(spec: Any, key: Any, xs: Any) -> list[Ran]:
        layer: Any = fdc.nnx.RNN(copy(), spec, time_major=True, return_carry=True)
        ran = layer(xs, rngs=key, deterministic=key is EVALUATION)
        return framework.of_layer(spec, key, xs, *ran)

    framework = Framework(
        hosts={
            "nnx.RNN": in_rnn,
            "nnx.Bidirectional": in_bidirectional,
            "fdc.nnx.RNN": in_layer,
        },
        tree=tree,
        pure=pure,
        to_core=lambda tree: fdc.nnx.core_params(tree, cell),
    )
    return framework

"""A wrapped linen cell of any shape keeps the names of its weights, in every host."""

import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from linen_cells import CELLS, HOSTS, inputs_of
from quick_prng import quick_key

import flax_dropout_cell as fdc
from flax_dropout_cell.linen import DropoutCell

RNG = quick_key(5)
NOISE = fdc.Dropout(keep_prob=0.5, variational=True)
SPEC = fdc.RecurrentDropout(input=NOISE, output=fdc.Dropout(keep_prob=0.5))


def wrap(cell: Any, deterministic: bool = False) -> Any:
    return DropoutCell(cell, SPEC, deterministic=deterministic)


def wrap_twice(cell: Any, deterministic: bool = False) -> Any:
    return wrap(wrap(cell, deterministic), deterministic)


def bare(cell: Any) -> Any:
    return cell


def names(variables: Any) -> dict[str, Any]:
    paths = jax.tree_util.tree_leaves_with_path(variables)
    return {jax.tree_util.keystr(path): (leaf.shape, leaf.dtype) for path, leaf in paths}


STOCK = ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "MGUCell", "SimpleCell", "ConvLSTMCell")
FOR_STOCK = ("nn.RNN", "copies in compact", "nn.scan", "a loop in setup")


@pytest.mark.parametrize("host", HOSTS)
def test_names_are_the_bare_cells(host: str) -> None:
    """The same variables, around one wrapper and around two."""
    for name, make_cell in CELLS.items():
        if name in STOCK and host not in FOR_STOCK:
            continue
        xs = inputs_of(name)
        wanted = names(jax.eval_shape(HOSTS[host](make_cell, bare).init, RNG, xs))
        for way in (wrap, wrap_twice) if name == "residual" else (wrap,):
            wrapped = HOSTS[host](make_cell, way)
            assert names(jax.eval_shape(wrapped.init, RNG, xs)) == wanted, (name, way)


PAIRS = {*((name, "nn.RNN") for name in CELLS), *(("cell in cell", host) for host in HOSTS)}


@pytest.mark.parametrize(("name", "host"), sorted(PAIRS))
def test_checkpoints_load_both_ways(name: str, host: str) -> None:
    """`init` gives the bare cell's values for the same key, and evaluation its numbers."""
    xs = inputs_of(name)

    @jax.jit
    def run(rng: jax.Array) -> Any:
        plain = HOSTS[host](CELLS[name], bare)
        wrapped = HOSTS[host](CELLS[name], functools.partial(wrap, deterministic=True))
        variables, wrapped_variables = plain.init(rng, xs), wrapped.init(rng, xs)
        ys = plain.apply(variables, xs), wrapped.apply(wrapped_variables, xs)
        crossed = plain.apply(wrapped_variables, xs), wrapped.apply(variables, xs)
        return (variables, *ys), (wrapped_variables, *crossed)

    want, got = run(RNG)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_flax_adopts_a_field_in_the_order_that_the_wrapper_relies_on() -> None:
    """First the parent is set, then the field is assigned, then the module is bound."""
    seen = []

    class Spy:
        def __get__(self, owner: Any, cls: Any = None) -> Any:
            if owner is None:
                raise AttributeError("cell")
            return owner.__dict__["cell"]

        def __set__(self, owner: Any, cell: Any) -> None:
            if owner.scope is not None:
                seen.append((cell.parent is owner, cell.name, cell.scope))
            owner.__dict__["cell"] = cell

    class Owner(nn.Module):
        cell: nn.Module

        def __call__(self, x: jax.Array) -> Any:
            return self.cell(x)

    Owner.cell = Spy()  # type: ignore
    Owner(nn.Dense(2)).init(RNG, np.ones((1, 2), np.float32))
    assert seen[0] == (True, "cell", None)

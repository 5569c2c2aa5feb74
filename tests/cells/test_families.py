"""The families of cells: what a cell declares is what it does, and a cell is told by any name."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import flax_dropout_cell as fdc
from flax_dropout_cell.cells.known import FAMILIES, family_of, family_of_module, list_cells_with

UNITS, FEATURES, BATCH = 8, 3, 2
NOISE = fdc.Dropout(keep_prob=0.8)
FROZEN = fdc.Dropout(keep_prob=0.8, variational=True)
X = jnp.ones((BATCH, FEATURES))
H = jnp.zeros((BATCH, UNITS))
PURE = {
    "lstm": (fdc.lstm_cell, fdc.init_lstm, fdc.LSTMState(H, H)),
    "gru": (fdc.gru_cell, fdc.init_gru, H),
    "lru": (fdc.lru_cell, fdc.init_lru, H.astype(jnp.complex64)),
    "min_gru": (fdc.min_gru_cell, fdc.init_min_gru, H),
    "min_lstm": (fdc.min_lstm_cell, fdc.init_min_lstm, H),
    "rg_lru": (fdc.rg_lru_cell, fdc.init_rg_lru, H),
}
MODULES = {
    "lru": "LRUCell",
    "min_gru": "MinGRUCell",
    "min_lstm": "MinLSTMCell",
    "rg_lru": "RGLRUCell",
    "gru": "GRUCell",
}
LEAKY = ("gru", "lru", "min_gru", "min_lstm", "rg_lru")


def weights(name: str) -> Any:
    return PURE[name][1](jax.random.key(0), FEATURES, UNITS)


@pytest.mark.parametrize("name", PURE)
def test_a_cell_declares_the_sites_that_it_has(name: str) -> None:
    """In order, with `previous` and the next carry at those that are carried."""
    cell, _, carry = PURE[name]
    family = family_of(cell)
    assert family is not None
    seen = []

    def disturb(site: str, value: Any, previous: Any = None) -> Any:
        seen.append((site, previous is not None))
        return jnp.full_like(value, len(seen))

    new, _ = cell(weights(name), carry, X, disturb=disturb)
    assert seen == [(site.name, site.carried) for site in family.sites]
    carried = [seen.index((site.name, True)) + 1 for site in family.carried]
    assert [leaf[0, 0].real for leaf in jax.tree.leaves(new)] == carried


def test_each_of_our_cells_is_told_apart() -> None:
    assert sum(family.cell is not None for family in FAMILIES) == len(PURE)
    for name, (cell, *_) in PURE.items():
        for wrapped in (cell, functools.partial(cell), jax.jit(functools.partial(cell))):
            found = family_of(wrapped)
            assert found is not None and found.cell is cell, name
    assert family_of(lambda params, h, x: fdc.gru_cell(params, h, x)) is None
    assert family_of(object()) is None


def test_a_module_is_told_by_its_class() -> None:
    class Mine(nn.LSTMCell):
        """A subclass."""

    rngs = nnx.Rngs(0)
    for module, cell in (
        (nn.LSTMCell(8), fdc.lstm_cell),
        (nn.OptimizedLSTMCell(8), fdc.lstm_cell),
        (nn.ConvLSTMCell(8, (3,)), fdc.lstm_cell),
        (Mine(8), fdc.lstm_cell),
        (nnx.LSTMCell(3, 8, rngs=rngs), fdc.lstm_cell),
        (nnx.OptimizedLSTMCell(3, 8, rngs=rngs), fdc.lstm_cell),
        (nn.GRUCell(8), fdc.gru_cell),
        (nn.MGUCell(8), None),
        (nnx.GRUCell(3, 8, rngs=rngs), fdc.gru_cell),
        (fdc.linen.RGLRUCell(8), fdc.rg_lru_cell),
        (fdc.nnx.LRUCell(3, 8, rngs=rngs), fdc.lru_cell),
    ):
        family = family_of_module(module)
        assert family is not None and family.cell is cell
    assert family_of_module(nn.SimpleCell(8)) is None

    class GRUCell(nn.SimpleCell):
        """Somebody else's, of that name."""

    assert family_of_module(GRUCell(8)) is None


@pytest.mark.parametrize("name", LEAKY)
@pytest.mark.parametrize("noise", [NOISE, FROZEN], ids=["step", "variational"])
def test_noise_that_explodes_is_refused(name: str, noise: fdc.Dropout) -> None:
    """At the state and at hidden, in the core and in all Flax hosts; the error says what to do."""
    way_out = "recurrent" if name == "gru" else "candidate"
    message = rf"(?s)explode.*inside={{'{way_out}': noise}}.*scale=False.*Zoneout"
    at_state = fdc.RecurrentDropout(state=noise)
    at_hidden = fdc.RecurrentDropout(inside={"hidden": noise})
    for spec in (at_state, at_hidden):
        for run in entries(name, spec):
            with pytest.raises(ValueError, match=message) as caught:
                run()
            assert len(str(caught.value).splitlines()) <= 5


def entries(name: str, spec: fdc.RecurrentDropout) -> list[Callable[[], Any]]:
    """All ways to run a cell: in the core, and in each of Flax's hosts."""
    cell, _, carry = PURE[name]
    xs, key = jnp.ones((4, BATCH, FEATURES)), jax.random.key(0)
    in_linen = getattr(fdc.linen, MODULES[name])(UNITS)
    in_nnx = getattr(fdc.nnx, MODULES[name])(FEATURES, UNITS, rngs=nnx.Rngs(0))
    options: Any = {"cell": cell, "dropout": spec}
    return [
        lambda: fdc.dropout_scan(weights(name), carry, xs, key, **options),
        lambda: fdc.dropout_cell(weights(name), carry, X, key, step=0, **options),
        lambda: fdc.draw_masks(weights(name), carry, X, key, **options),
        lambda: fdc.linen.RNN(in_linen, spec).init_with_output(key, xs),
        lambda: nn.RNN(fdc.linen.DropoutCell(in_linen, spec)).init_with_output(key, xs),
        lambda: fdc.nnx.RNN(in_nnx, spec)(xs, rngs=key),
        lambda: nnx.RNN(fdc.nnx.DropoutCell(in_nnx, spec, rngs=nnx.Rngs(0)))(xs),
    ]


@pytest.mark.parametrize("name", LEAKY)
def test_what_does_not_amplify_is_welcome_and_stays_bounded(name: str) -> None:
    cell, _, carry = PURE[name]
    xs = jax.random.normal(jax.random.key(1), (500, BATCH, FEATURES))
    for spec in (
        fdc.RecurrentDropout(state=fdc.Dropout(keep_prob=0.5, scale=False)),
        fdc.RecurrentDropout(inside={"hidden": fdc.Zoneout(prob=0.5)}),
        fdc.RecurrentDropout(inside={"candidate": NOISE}),
    ):
        options: Any = {"cell": cell, "dropout": spec}
        h, _ = fdc.dropout_scan(weights(name), carry, xs, jax.random.key(0), **options)
        assert jnp.abs(h).max() < 20


def test_one_noise_for_an_lstms_state_means_h_alone() -> None:
    """Whichever of the carried sites is leaky, the module's order says which leaf that is."""
    cell = nn.LSTMCell(UNITS)
    xs, key = jnp.ones((BATCH, 20, FEATURES)), jax.random.key(0)
    ways = (FROZEN, (None, FROZEN))
    layers = [fdc.linen.RNN(cell, fdc.RecurrentDropout(state=noise)) for noise in ways]
    variables = layers[0].init(key, xs)
    one, named = (layer.apply(variables, xs, rng=key, return_carry=True) for layer in layers)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, named))
    (c, h), _ = one
    assert not (c == 0).any()
    assert (h == 0).any()


def test_messages_list_the_cells_that_have_a_site() -> None:
    assert list_cells_with("memory") == "lstm_cell"
    assert list_cells_with("recurrent") == "lstm_cell or gru_cell"
    assert list_cells_with("hidden").endswith(
        "lru_cell, min_gru_cell, min_lstm_cell or rg_lru_cell"
    )
    assert list_cells_with("nowhere") == ""


@pytest.mark.parametrize("cell", [nn.GRUCell(4), nn.MGUCell(4), fdc.linen.MinGRUCell(4)], ids=str)
def test_concrete_dropout_explodes_on_a_leaky_sum_too(cell: Any) -> None:
    key, noise = jax.random.key(0), fdc.ConcreteDropout(logit=-1.0)
    layer = fdc.linen.RNN(cell, fdc.RecurrentDropout(state=noise))
    with pytest.raises(ValueError, match=r"ConcreteDropout would enlarge.*h, which it carries on"):
        layer.init({"params": key, "dropout": key}, jnp.ones((2, 3, 4)))
    lstm = fdc.linen.RNN(fdc.linen.LSTMCell(4), fdc.RecurrentDropout(inside={"memory": noise}))
    with pytest.raises(ValueError, match="ConcreteDropout would enlarge the memory c"):
        lstm.init({"params": key, "dropout": key}, jnp.ones((2, 3, 4)))

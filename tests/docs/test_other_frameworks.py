"""Cells of other frameworks run as they are, masks and all, and the docs page on them runs."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from long_runs import watched
from quick_prng import quick_key

import flax_dropout_cell as fdc

PAGE = Path(__file__).parents[2] / "docs" / "other_frameworks.md"
STEPS, BATCH, FEATURES, UNITS = 5, 4, 3, 8
KEEP_PROB = 0.5


class Example(NamedTuple):
    """A cell with its weights and initial carry, and which leaves of the carry are disturbed."""

    cell: fdc.Cell
    params: Any
    carry: Any
    disturbed: tuple[bool, ...]


def haiku_cell(name: str) -> Example:
    hk = pytest.importorskip("haiku")
    with jax.numpy_dtype_promotion("standard"):
        core = hk.without_apply_rng(
            hk.transform(lambda x, state: getattr(hk, name)(UNITS)(x, state))
        )
        zeros = jnp.zeros((BATCH, UNITS))
        carry = hk.LSTMState(zeros, zeros) if name == "LSTM" else zeros
        params = core.init(jax.random.key(0), jnp.zeros((BATCH, FEATURES)), carry)

    def cell(params: Any, carry: Any, x: Any) -> tuple[Any, Any]:
        return core.apply(params, x, carry)[::-1]

    return Example(cell, params, carry, (True, False) if name == "LSTM" else (True,))


def equinox_cell(name: str) -> Example:
    eqx = pytest.importorskip("equinox")
    params = getattr(eqx.nn, name)(FEATURES, UNITS, key=jax.random.key(0))
    zeros = jnp.zeros((BATCH, UNITS))

    def cell(params: Any, carry: Any, x: Any) -> tuple[Any, Any]:
        carry = jax.vmap(params)(x, carry)
        return carry, carry[0] if name == "LSTMCell" else carry

    if name == "LSTMCell":
        return Example(cell, params, (zeros, zeros), (True, False))
    return Example(cell, params, zeros, (True,))


def plain_cell() -> Example:
    def cell(params: Any, h: Any, x: Any) -> tuple[Any, Any]:
        h = jnp.tanh(x @ params["in"] + h @ params["rec"])
        return h, h

    draw = np.random.default_rng(0)
    params = {
        "in": jnp.float32(draw.normal(size=(FEATURES, UNITS))),
        "rec": jnp.float32(draw.normal(size=(UNITS, UNITS))),
    }
    return Example(cell, params, jnp.zeros((BATCH, UNITS)), (True,))


EXAMPLES: dict[str, Callable[[], Example]] = {
    "hk.LSTM": lambda: haiku_cell("LSTM"),
    "hk.GRU": lambda: haiku_cell("GRU"),
    "eqx.nn.LSTMCell": lambda: equinox_cell("LSTMCell"),
    "eqx.nn.GRUCell": lambda: equinox_cell("GRUCell"),
    "a plain function": plain_cell,
}


def spec_of_example(example: Example, noise: fdc.Dropout) -> fdc.RecurrentDropout:
    structure = jax.tree.structure(example.carry)
    state = jax.tree.unflatten(structure, [noise if there else None for there in example.disturbed])
    return fdc.RecurrentDropout(input=noise, state=state, output=noise)


def inputs() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (STEPS, BATCH, FEATURES))


def drop(mask: np.ndarray, value: Any) -> jax.Array:
    return jnp.where(mask, value / KEEP_PROB, 0.0)


def by_hand(example: Example, masks: list[fdc.Masks]) -> tuple[Any, jax.Array]:
    """The cell alone in a Python loop, with dropout written down at its three places."""
    carry, outputs = example.carry, []
    for x, mask in zip(inputs(), masks, strict=True):
        carry, y = example.cell(example.params, carry, drop(mask.input, x))
        leaves, structure = jax.tree.flatten(carry)
        state_masks = jax.tree.leaves(mask.state, is_leaf=lambda leaf: leaf is None)
        pairs = zip(state_masks, leaves, example.disturbed, strict=True)
        disturbed = [drop(m, leaf) if there else leaf for m, leaf, there in pairs]
        carry = jax.tree.unflatten(structure, disturbed)
        outputs.append(drop(mask.output, y))
    return carry, jnp.stack(outputs)


def masks_of(example: Example, rng: jax.Array, variational: bool) -> list[fdc.Masks]:
    """The masks of each step, by the contract on randomness.

    A step's masks are those that `draw_masks` draws from the step's key: sites and leaves have the
    same offsets there.
    """
    spec = spec_of_example(example, fdc.Dropout(keep_prob=KEEP_PROB, variational=True))
    args = (example.params, example.carry, inputs()[0])
    steps = [rng if variational else jax.random.fold_in(rng, t) for t in range(STEPS)]
    return [fdc.draw_masks(*args, key, cell=example.cell, dropout=spec) for key in steps]


def assert_close(got: Any, want: Any) -> None:
    """To some units in the last place of an array's largest value: sums differ in their order."""
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("variational", [True, False], ids=["variational", "step"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_dropout_scan_is_the_loop_by_hand(name: str, variational: bool) -> None:
    example, rng = EXAMPLES[name](), quick_key(2)
    spec = spec_of_example(example, fdc.Dropout(keep_prob=KEEP_PROB, variational=variational))
    masks = masks_of(example, rng, variational)

    def with_scan(params: Any) -> tuple[jax.Array, Any]:
        carry, ys = fdc.dropout_scan(
            params, example.carry, inputs(), rng, cell=example.cell, dropout=spec
        )
        return (ys**2).sum(), (carry, ys)

    def with_loop(params: Any) -> tuple[jax.Array, Any]:
        carry, ys = by_hand(example._replace(params=params), masks)
        return (ys**2).sum(), (carry, ys)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        got = jax.grad(with_scan, has_aux=True)(example.params)
        want = jax.grad(with_loop, has_aux=True)(example.params)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(assert_close, got, want)
    kept = np.stack([mask.output for mask in masks])
    assert (kept == kept[:1]).all() == variational
    assert not got[1][1][~kept].any()
    assert got[1][1][kept].any()


@pytest.mark.parametrize("name", EXAMPLES)
def test_evaluation_is_the_bare_cell(name: str) -> None:
    example = EXAMPLES[name]()
    spec = spec_of_example(example, fdc.Dropout(keep_prob=KEEP_PROB, variational=True))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        got = fdc.dropout_scan(
            example.params, example.carry, inputs(), None, cell=example.cell, dropout=spec
        )
        want = jax.lax.scan(
            lambda carry, x: example.cell(example.params, carry, x), example.carry, inputs()
        )
    jax.tree.map(np.testing.assert_array_equal, got, want)


BLOCKS = re.findall(r"^## (.*?)$.*?^```python$(.*?)^```$", PAGE.read_text(), re.M | re.S)


@pytest.mark.parametrize(("title", "code"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_the_page_runs(title: str, code: str) -> None:
    """Each of its sections runs alone, and gives the value of its last line in a comment."""
    for module in re.findall(r"^import (haiku|equinox)", code, re.M):
        pytest.importorskip(module)
    names: dict[str, Any] = {}
    standard = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with standard[0], standard[1], watched() as largest:
        exec(compile(code, f"{PAGE.name}: {title}", "exec"), names)
    assert largest
    last = code.strip().splitlines()[-1]
    expression, shape = last.split("  # ")
    assert str(eval(expression, names)) == shape
    mask = np.asarray(names["ys"] == 0)
    assert 0 < mask.mean() < 1
    assert (mask == mask[:1]).all(), "the page's output masks are variational"


def test_the_page_has_all_frameworks() -> None:
    assert [title for title, _ in BLOCKS] == ["Haiku", "Equinox", "A plain function"]

"""A site of one's own, in cells of every framework: docs/inside.md runs, and mistakes are noticed.

The mistakes would be silent: rows, depths or places would share one mask, or there would be none.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from linen_cells import FromZeros

import flax_dropout_cell as fdc

PAGE = Path(__file__).parents[2] / "docs" / "inside.md"
SECTIONS = dict(
    re.findall(r"^## ([^\n]*)$[^#]*?^```python$(.*?)^```$", PAGE.read_text(), re.M | re.S)
)
FROZEN = fdc.Dropout(keep_prob=0.8, variational=True)
KEY = jax.random.key(1)


def test_the_page_has_all_frameworks() -> None:
    assert [*SECTIONS] == ["A plain function", "Linen", "NNX", "Haiku", "Equinox"]


@pytest.mark.parametrize("title", SECTIONS)
def test_the_page_runs_and_draws_the_same_masks_everywhere(title: str) -> None:
    names: dict[str, Any] = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(SECTIONS[title], f"{PAGE.name}: {title}", "exec"), names)
    ys = np.asarray(names["ys"])
    assert ys.shape == (20, 4, 64)
    # h' = h / 2 + candidate / 2, so a dropped candidate shows in the outputs.
    candidates = 2 * ys - np.concatenate([np.zeros_like(ys[:1]), ys[:-1]])

    def shows(params: Any, h: Any, x: Any, *, disturb: Any) -> Any:
        return disturb("candidate", h), h

    h = jnp.zeros((4, 64))
    masks = fdc.draw_masks(None, h, h, KEY, cell=shows, dropout=names["spec"])
    assert masks.inside is not None
    kept = np.broadcast_to(masks.inside["candidate"], ys.shape)
    np.testing.assert_array_equal(np.abs(candidates) > 1e-5, kept)
    # A kept one is a tanh, scaled.
    assert 1 < np.abs(candidates).max() / np.float32(np.tanh(1)) and np.abs(candidates).max() < 1.25


# Mistakes ----------------------------------------------------------------------------------------

Change = Callable[[Any, Any], Any]
"""`change(disturb, value)`: the cell's own code at its site."""


def run_plain(change: Change, noise: Any) -> None:
    def cell(params: Any, h: Any, x: Any, *, disturb: Any = fdc.undisturbed) -> Any:
        return h, change(disturb, x)

    scan(cell, noise)


def run_haiku(change: Change, noise: Any) -> None:
    class Core(hk.RNNCore):
        def __call__(self, inputs: Any, prev_state: Any, disturb: Any = fdc.undisturbed) -> Any:
            return change(disturb, inputs), prev_state

        def initial_state(self, batch_size: Any) -> Any: ...

    core = hk.without_apply_rng(hk.transform(lambda *args, **sites: Core()(*args, **sites)))
    scan(lambda params, h, x, **sites: core.apply({}, x, h, **sites)[::-1], noise)


def run_equinox(change: Change, noise: Any) -> None:
    class Cell(eqx.Module):
        def __call__(self, h: Any, x: Any, *, disturb: Any = fdc.undisturbed) -> Any:
            return h, change(disturb, x)

    scan(lambda params, h, x, **sites: Cell()(h, x, **sites), noise)


def scan(cell: Any, noise: Any) -> None:
    h, xs = jnp.zeros((2, 3)), jnp.ones((4, 2, 3))
    fdc.dropout_scan(None, h, xs, KEY, cell=cell, dropout=noise_at_a(noise))


def noise_at_a(noise: Any) -> fdc.RecurrentDropout:
    return fdc.RecurrentDropout(inside={"a": noise})


class LinenCell(FromZeros):
    change: Any

    @nn.compact
    def __call__(self, carry: Any, inputs: Any, *, disturb: Any = fdc.undisturbed) -> Any:
        return carry, self.change(disturb, inputs)


def run_linen_layer(change: Change, noise: Any) -> None:
    layer = fdc.linen.RNN(LinenCell(change), noise_at_a(noise))
    layer.apply({}, jnp.ones((2, 4, 3)), rng=KEY)  # type: ignore[call-arg]


def run_linen_wrapper(change: Change, noise: Any) -> None:
    rnn = nn.RNN(fdc.linen.DropoutCell(LinenCell(change), noise_at_a(noise)))
    rnn.apply({}, jnp.ones((2, 4, 3)), rngs={"dropout": KEY})


class NNXCell(nnx.RNNCellBase):
    def __init__(self, change: Change) -> None:
        self.change = change

    def __call__(self, carry: Any, inputs: Any, *, disturb: Any = fdc.undisturbed) -> Any:
        return carry, self.change(disturb, inputs)

    def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
        return jnp.zeros(input_shape)

    @property
    def num_feature_axes(self) -> int:
        return 1


def run_nnx_layer(change: Change, noise: Any) -> None:
    layer: Any = fdc.nnx.RNN(NNXCell(change), noise_at_a(noise))
    layer(jnp.ones((2, 4, 3)), rngs=KEY)


def run_nnx_wrapper(change: Change, noise: Any) -> None:
    rngs = nnx.Rngs(dropout=KEY)
    rnn: Any = nnx.RNN(fdc.nnx.DropoutCell(NNXCell(change), noise_at_a(noise), rngs=rngs))
    rnn(jnp.ones((2, 4, 3)))


def by_row(transform: Any) -> Change:
    return lambda disturb, value: transform(lambda row: disturb("a", row))(value)


def by_depth(scan: Any) -> Change:
    def change(disturb: Any, value: Any) -> Any:
        return scan(lambda value, _: (disturb("a", value), None), value, None, length=2)[0]

    return change


def in_linen(lift: Any, **options: Any) -> Change:
    """A lifted transformation wants a module first."""

    class Site(nn.Module):
        disturb: Any

        @nn.compact
        def __call__(self, value: Any) -> Any:
            return self.disturb("a", value)

    return lambda disturb, value: lift(Site, **options)(disturb)(value)


def twice(disturb: Any, value: Any) -> Any:
    return disturb("a", value) + disturb("a", value)


def unused(disturb: Any, value: Any) -> Any:
    disturb("a", 2 * value)
    return value


lax_scan = by_depth(jax.lax.scan)
nn_vmap = in_linen(nn.vmap, variable_axes={}, split_rngs={})
MISTAKES: dict[str, tuple[Any, list[Change]]] = {
    "core": (run_plain, [by_row(jax.vmap), lax_scan, by_row(jax.checkpoint), by_row(jax.jit)]),
    "Haiku": (
        run_haiku,
        [by_row(lambda f: hk.vmap(f, split_rng=False)), by_depth(hk.scan), by_row(hk.remat)],
    ),
    "Equinox": (run_equinox, [by_row(eqx.filter_vmap), lax_scan, by_row(eqx.filter_checkpoint)]),
    "linen, layer": (run_linen_layer, [nn_vmap, lax_scan, in_linen(nn.remat), by_row(jax.vmap)]),
    "linen, wrapper": (run_linen_wrapper, [nn_vmap, lax_scan, in_linen(nn.remat)]),
    "nnx, layer": (run_nnx_layer, [by_row(nnx.vmap), lax_scan, by_row(nnx.remat)]),
    "nnx, wrapper": (run_nnx_wrapper, [by_row(nnx.vmap), lax_scan, by_row(nnx.remat)]),
}


NOISES = {
    "frozen": FROZEN,
    "step": fdc.Dropout(keep_prob=0.8),
    "step, few bits": fdc.Dropout(keep_prob=0.75),  # drawn in the loop, not ahead of it
}


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
@pytest.mark.parametrize("framework", MISTAKES)
def test_mistakes_that_would_be_silent(framework: str, noise: fdc.Dropout) -> None:
    run, transformed = MISTAKES[framework]
    for change in transformed:
        with pytest.raises(ValueError, match="under a transformation that the cell") as caught:
            run(change, noise)
        assert len(str(caught.value).splitlines()) <= 5
    with pytest.raises(ValueError, match=r"called twice in a step.*'0/a' and '1/a'") as caught:
        run(twice, noise)
    assert len(str(caught.value).splitlines()) <= 5
    with pytest.warns(UserWarning, match=r"does not use the value.*value = disturb\('a', value\)"):
        run(unused, noise)
    run(unused, None)
    run(lambda disturb, value: disturb("a", value), None)  # and nothing without them
    run(lambda disturb, value: disturb("a", value), noise)

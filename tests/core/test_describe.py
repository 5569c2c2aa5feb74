"""The table and the picture of a spec agree with the masks, value by value."""

import builtins
import dataclasses
import importlib
import math
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hand_masks import kept, site_key
from jaxprs import equations
from matplotlib.figure import Figure

import flax_dropout_cell as fdc
from flax_dropout_cell._inspect.plot_masks import draw_strips

STEPS, ROWS, UNITS, START = 12, 3, 16, 5
KEY = jax.random.key(3)
FRESH = fdc.Dropout(keep_prob=0.5, scale=False)
FROZEN = fdc.Dropout(keep_prob=0.5, variational=True, scale=False)


def table(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


def test_the_table_of_the_core() -> None:
    """Every kind of row: weights by name, an array for a number, shared axes, sites inside."""
    params = fdc.init_lstm(KEY, 4, UNITS)
    carry = fdc.LSTMState(jnp.zeros((ROWS, UNITS)), jnp.zeros((ROWS, UNITS)))
    spec = fdc.RecurrentDropout(
        params=fdc.recurrent_kernels(fdc.Dropout(keep_prob=0.5, variational=True)),
        input=fdc.Dropout(keep_prob=0.8, variational=True, broadcast_dims=(0,)),
        state=(fdc.Zoneout(prob=0.1), fdc.Dropout(keep_prob=jnp.float32(0.9))),
        output=fdc.Dropout(keep_prob=1.0),
        inside={"candidate": fdc.GaussianNoise(stddev=0.2, broadcast_dims=(1,))},
    )
    shown = fdc.describe(params, carry, jnp.ones((ROWS, 4)), cell=fdc.lstm_cell, dropout=spec)
    assert repr(shown) == table(
        """
        site                     value            noise                         drawn      mask           shared over
        params.recurrent_kernel  float32[16, 64]  Dropout(keep_prob=0.5)        once       bool[16, 64]   steps, rows
        input                    float32[3, 4]    Dropout(keep_prob=0.8)        once       bool[1, 4]     steps, axis 0
        state.c                  float32[3, 16]   Zoneout(prob=0.1)             each step  bool[3, 16]
        state.h                  float32[3, 16]   Dropout(keep_prob=float32[])  each step  bool[3, 16]
        inside['candidate']      float32[3, 16]   GaussianNoise(stddev=0.2)     each step  float32[3, 1]  axis 1
        without noise: params.input_kernel, params.bias, output
        free sites inside the cell: hidden, input_per_gate, memory, recurrent, recurrent_per_gate
        """  # noqa: E501
    )


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_the_table_of_a_layer(framework: str) -> None:
    """One noise for an LSTM's state stands at h; a layer needs neither weights nor a key."""
    dropout = fdc.RecurrentDropout(state=FROZEN, output=FRESH)
    if framework == "linen":
        layer = fdc.linen.RNN(nn.LSTMCell(UNITS), dropout)
    else:
        layer = fdc.nnx.RNN(nnx.LSTMCell(4, UNITS, rngs=nnx.Rngs(0)), dropout)
    expected = table(
        """
        site      value           noise                                drawn      mask         shared over
        state[1]  float32[3, 16]  Dropout(keep_prob=0.5, scale=False)  once       bool[3, 16]  steps
        output    float32[3, 16]  Dropout(keep_prob=0.5, scale=False)  each step  bool[3, 16]
        without noise: params (12 leaves), input, state[0]
        free sites inside the cell: none
        """  # noqa: E501
    )
    assert repr(layer.describe(jnp.ones((ROWS, STEPS, 4)))) == expected
    time_first = jax.ShapeDtypeStruct((STEPS, ROWS, 4), jnp.float32)
    assert repr(layer.describe(time_first, time_major=True)) == expected


def test_a_layer_that_knows_its_cell_is_described_by_it() -> None:
    """A GRU's h explodes under scaling noise: refused here as in training."""
    layer = fdc.linen.RNN(nn.GRUCell(UNITS), fdc.RecurrentDropout(state=fdc.Dropout(keep_prob=0.5)))
    with pytest.raises(ValueError, match="would explode"):
        layer.describe(jnp.ones((ROWS, STEPS, 4)))


@jax.custom_vjp
def clip_gradient(h):
    return h


clip_gradient.defvjp(lambda h: (h, None), lambda _, g: (jnp.clip(g, -1, 1),))


class ClippedGRU(nn.GRUCell):
    def __call__(self, carry, inputs):
        return super().__call__(clip_gradient(carry), inputs)


class NNXClippedGRU(nnx.GRUCell):
    def __call__(self, carry, inputs):
        return super().__call__(clip_gradient(carry), inputs)


@pytest.mark.parametrize("host", ["core", "linen", "nnx"])
def test_a_cell_that_the_scan_leaves_alone_is_told(host: str) -> None:
    """Its gradients are right, but all of them are added up in the loop."""
    spec, x = fdc.RecurrentDropout(input=FROZEN), jnp.ones((ROWS, STEPS, 4))
    if host == "core":

        def cell(w, h, x):
            h = clip_gradient(jnp.tanh(x @ w + h))
            return h, h

        arguments = jnp.ones((4, UNITS)), jnp.zeros((ROWS, UNITS)), x[:, 0]
        shown = fdc.describe(*arguments, cell=cell, dropout=spec)
    elif host == "linen":
        shown = fdc.linen.RNN(ClippedGRU(UNITS), spec).describe(x)
    else:
        shown = fdc.nnx.RNN(NNXClippedGRU(4, UNITS, rngs=nnx.Rngs(0)), spec).describe(x)
    reason = "the step has a jax.custom_vjp, which has no forward derivative"
    assert shown.why_plain == reason
    assert repr(shown).endswith(f"\njax.lax.scan as it is: {reason}")


def describe_a_row(host: str, linear: bool) -> Any:
    """One row of 128 features, and as many units."""
    spec, x, size = fdc.RecurrentDropout(), jnp.ones((1, STEPS, 128)), 128
    if host == "core":
        init, cell = (
            (fdc.init_min_gru, fdc.min_gru_cell) if linear else (fdc.init_gru, fdc.gru_cell)
        )
        params = init(jax.random.key(0), size, size)
        return fdc.describe(params, x[:, 0], x[:, 0], cell=cell, dropout=spec)
    if host == "linen":
        cell = fdc.linen.MinGRUCell if linear else fdc.linen.GRUCell
        return fdc.linen.RNN(cell(size), spec).describe(x)
    cell = fdc.nnx.MinGRUCell if linear else fdc.nnx.GRUCell
    return fdc.nnx.RNN(cell(size, size, rngs=nnx.Rngs(0)), spec).describe(x)


@pytest.mark.parametrize("host", ["core", "linen", "nnx"])
def test_where_the_scan_cuts_a_cell_is_told(host: str) -> None:
    nonlinear, linear = (describe_a_row(host, each) for each in (False, True))
    assert "\nbefore the loop: dot_general: float32[1," in repr(nonlinear)
    assert nonlinear.after == () and not nonlinear.is_linear
    assert "\nbefore the loop: dot_general: float32[1," in repr(linear)
    assert repr(linear).endswith(
        "\na linear recurrence: no loop on a GPU or TPU, or with parallel=True"
    )


def probe(params, carry, x, *, disturb=fdc.undisturbed):
    """Emits the value at each site: the input, the incoming carry, a site inside."""
    ones = jnp.ones((ROWS, UNITS))
    weights = jnp.broadcast_to(params, x.shape)
    return ones, {"x": x, "h": carry, "w": weights, "z": disturb("z", ones), "y": ones}


def test_strips_are_the_masks_of_the_scan() -> None:
    xs, one = jnp.ones((STEPS, ROWS, UNITS)), jnp.ones((ROWS, UNITS))
    spec = fdc.RecurrentDropout(
        params=FROZEN,
        input=FROZEN,
        state=FRESH,
        output={"x": None, "h": None, "w": None, "z": None, "y": FRESH},
        inside={"z": FRESH},
    )
    arguments = {"cell": probe, "dropout": spec}
    _, ys = fdc.dropout_scan(jnp.ones(UNITS), one, xs, KEY, start=START, **arguments)
    row = 1
    drawn = draw_strips(jnp.ones(UNITS), one, xs, KEY, start=START, row=row, **arguments)
    strips = {path: strip.mask for path, strip in drawn.items()}
    kept = {name: np.asarray(values[:, row] == 1).T for name, values in ys.items()}
    assert list(strips) == ["params", "input", "state", "output['y']", "inside['z']"]
    np.testing.assert_array_equal(strips["params"], kept["w"])
    np.testing.assert_array_equal(strips["input"], kept["x"])
    np.testing.assert_array_equal(strips["output['y']"], kept["y"])
    np.testing.assert_array_equal(strips["inside['z']"], kept["z"])
    # A step sees the state that the step before has disturbed.
    np.testing.assert_array_equal(strips["state"][:, :-1], kept["h"][:, 1:])

    masks = fdc.draw_masks(jnp.ones(UNITS), one, xs[0], KEY, **arguments)
    for path, mask in (("params", masks.params), ("input", masks.input[row])):
        np.testing.assert_array_equal(strips[path], np.repeat(mask[:, None], STEPS, axis=1))
    for path in ("state", "output['y']", "inside['z']"):
        assert not (strips[path] == strips[path][:, :1]).all()


def test_the_figure() -> None:
    xs = jnp.ones((STEPS, ROWS, UNITS))
    spec = fdc.RecurrentDropout(input=FROZEN, state=fdc.GaussianNoise(stddev=1.0))
    arguments = {"cell": lambda p, h, x: (h + x, h), "dropout": spec, "start": START, "row": 2}
    figure = fdc.plot_masks(None, xs[0], xs, KEY, max_units=4, **arguments)
    strips = draw_strips(None, xs[0], xs, KEY, **arguments)
    titles = [axes.get_title(loc="left") for axes in figure.axes[:2]]
    assert titles == [
        "input: Dropout(keep_prob=0.5, scale=False)",
        "state: GaussianNoise(stddev=1.0)",
    ]
    assert figure.axes[2].get_ylabel() == "mask"  # the bar of the shades, and of nothing else
    assert len(figure.axes) == 3
    for axes, strip in zip(figure.axes[:2], strips.values(), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), strip.mask[:4])
        assert axes.images[0].get_extent() == [START - 0.5, START + STEPS - 0.5, 3.5, -0.5]


def test_a_picture_says_what_its_noise_does() -> None:
    spec = fdc.RecurrentDropout(
        input=FRESH, state=fdc.Zoneout(prob=0.5), params={"w": fdc.Dropout(keep_prob=0.5)}
    )
    arguments = {"cell": lambda p, h, x: (h + x, h), "dropout": spec}
    xs = jnp.ones((STEPS, ROWS, UNITS))
    grid = Figure().subplots(3)
    figure = fdc.plot_masks({"w": jnp.ones((2, 3))}, xs[0], xs, KEY, ax=grid, **arguments)
    assert figure is grid[0].figure
    words = {axes.get_title(loc="left"): axes.get_title(loc="right") for axes in grid}
    assert words == {
        "params['w']: Dropout(keep_prob=0.5)": "blue: kept, blank: dropped",
        "input: Dropout(keep_prob=0.5, scale=False)": "blue: kept, blank: dropped",
        "state: Zoneout(prob=0.5)": "blue: new value, blank: held back",
    }
    assert [axes.get_ylabel() for axes in grid] == ["weight [2, 3]", "unit", "unit"]
    with pytest.raises(ValueError, match=r"one axes for each array with masks, .*; got 2"):
        fdc.plot_masks({"w": jnp.ones((2, 3))}, xs[0], xs, KEY, ax=grid[:2], **arguments)


def test_the_picture_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs"))
    path = importlib.import_module("make_images").masks(tmp_path)
    assert path.name == "masks.png" and path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def plot(spec, key: Any = KEY, **options):
    xs = jnp.ones((STEPS, ROWS, UNITS))
    return fdc.plot_masks(
        None, xs[0], xs, key, cell=lambda p, h, x: (h, x), dropout=spec, **options
    )


def test_masks_of_complex_numbers_are_plotted_by_their_real_part() -> None:
    xs = jnp.ones((STEPS, ROWS, UNITS), jnp.complex64)
    figure = fdc.plot_masks(
        None, xs[0], xs, KEY, cell=lambda params, h, x: (h, x),
        dropout=fdc.RecurrentDropout(input=fdc.GaussianNoise(stddev=1.0)),
    )  # fmt: skip
    (image,) = figure.axes[0].get_images()
    assert np.shape(image.get_array()) == (UNITS, STEPS)


def test_what_cannot_be_plotted(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = fdc.RecurrentDropout(input=FRESH)
    with pytest.raises(ValueError, match="no masks to plot"):
        plot(fdc.RecurrentDropout())
    with pytest.raises(ValueError, match="plot_masks needs a key such as"):
        plot(spec, key=None)
    with pytest.raises(ValueError, match="row must be one of the 3 rows at input, got 3"):
        plot(spec, row=3)
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="needs matplotlib: pip install matplotlib"):
        plot(spec)


def test_zoneout_on_the_carry_of_a_gru_says_that_the_output_has_none() -> None:
    params, h, x = fdc.init_gru(jax.random.key(0), 3, 8), jnp.zeros((4, 8)), jnp.ones((4, 3))
    zoneout = fdc.Zoneout(prob=0.5)
    specs = {
        True: fdc.RecurrentDropout(state=zoneout),
        False: fdc.RecurrentDropout(inside={"hidden": zoneout}),
    }
    for at_state, spec in specs.items():
        new_h, y = fdc.dropout_cell(
            params, h, x, jax.random.key(1), step=0, cell=fdc.gru_cell, dropout=spec
        )
        assert bool((new_h != y).any()) == at_state
        table = repr(fdc.describe(params, h, x, cell=fdc.gru_cell, dropout=spec))
        assert ("the output comes before the noise at state" in table) == at_state


def test_a_row_has_the_masks_of_all_its_gates() -> None:
    """`row` counts examples, not their gates."""
    params, h, xs = (
        fdc.init_gru(KEY, 5, UNITS),
        jnp.zeros((ROWS, UNITS)),
        jnp.ones((STEPS, ROWS, 5)),
    )
    spec = fdc.recipes.gal2016(input_keep_prob=0.5, recurrent_keep_prob=0.5, tied=False)
    arguments: Any = {"cell": fdc.gru_cell, "dropout": spec}
    masks = fdc.draw_masks(params, h, xs[0], KEY, **arguments)
    assert masks.inside is not None
    for row in range(ROWS):
        strips = draw_strips(params, h, xs, KEY, start=0, row=row, **arguments)
        for site in ("input_per_gate", "recurrent_per_gate"):
            of_row = np.asarray(masks.inside[site][row]).reshape(-1, 1)
            strip = strips[f"inside['{site}']"].mask
            np.testing.assert_array_equal(strip, np.repeat(of_row, STEPS, axis=1))


def test_a_linear_recurrence_that_is_left_alone_is_told_apart() -> None:
    """Its loop is `jax.lax.scan` as it is; in parallel it runs without one."""

    @jax.custom_vjp
    def clip_gradient(x):
        return x

    clip_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1, 1),))

    def cell(params, h, x):
        h = 0.5 * h + clip_gradient(x)
        return h, h

    h, xs = jnp.zeros((2, 3)), jnp.ones((4, 2, 3))
    told = fdc.explain_scan(lambda h, x: cell(None, h, x), h, xs)
    assert "custom_vjp" in str(told) and told.obstacle is None
    assert "unless it runs in parallel" in str(told)
    spec = fdc.RecurrentDropout()
    described = fdc.describe(None, h, xs[0], cell=cell, dropout=spec)
    assert described.is_linear and "custom_vjp" in repr(described)
    got = fdc.dropout_scan(None, h, xs, None, cell=cell, dropout=spec, parallel=True)
    wanted = jax.lax.scan(lambda h, x: cell(None, h, x), h, xs)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize("host", ["linen", "nnx"])
def test_a_layer_plots_all_pixels_of_an_example(host: str) -> None:
    """It knows the cell's feature axes, so a row is an example of the batch."""
    xs, spec = jnp.ones((2, STEPS, 3, 4, 5)), fdc.RecurrentDropout(input=FRESH)
    if host == "linen":
        layer: Any = fdc.linen.RNN(nn.ConvLSTMCell(2, (2, 2)), spec)
    else:
        cell = nnx.OptimizedLSTMCell(5, 2, rngs=nnx.Rngs(0))
        layer, xs = fdc.nnx.RNN(cell, spec), xs[:, :, 0, 0]
    size = math.prod(xs.shape[2:])
    grid = [Figure().subplots()]
    figure = layer.plot_masks(xs, KEY, row=1, max_units=100, ax=grid)
    assert figure is grid[0].figure
    shown = np.asarray(grid[0].images[0].get_array())
    masks = [
        FRESH.draw_mask(leaf_key, (2, *xs.shape[2:]), "float32")[1].ravel()
        for leaf_key in jax.vmap(
            lambda t: jax.random.fold_in(jax.random.fold_in(KEY, t), np.uint32(2**31 + 2**28))
        )(jnp.arange(STEPS))
    ]
    assert shown.shape == (size, STEPS)
    np.testing.assert_array_equal(shown.astype(bool), np.stack(masks, 1))
    with pytest.raises(ValueError, match="row must be one of the 2 rows at input, got 2"):
        layer.plot_masks(xs, KEY, row=2)


def host_of_linear(host: str, spec: fdc.RecurrentDropout) -> tuple[Any, Any]:
    """A linear recurrence: its description, and its run in parallel, as a function."""
    xs, rng = jnp.ones((ROWS, STEPS, 4)), jax.random.key(3)
    if host == "core":
        params, h = fdc.init_min_gru(jax.random.key(0), 4, UNITS), jnp.zeros((ROWS, UNITS))
        options: Any = {"cell": fdc.min_gru_cell, "dropout": spec}

        def run() -> Any:
            time_first = xs.swapaxes(0, 1)
            return fdc.dropout_scan(params, h, time_first, rng, parallel=True, **options)

        return fdc.describe(params, h, xs[:, 0], **options), run
    if host == "linen":
        layer: Any = fdc.linen.RNN(fdc.linen.MinGRUCell(UNITS), spec, parallel=True)
        return layer.describe(xs), lambda: layer.init_with_output(rng, xs, rng=rng)
    cell = fdc.nnx.MinGRUCell(4, UNITS, rngs=nnx.Rngs(0))
    layer = fdc.nnx.RNN(cell, spec, parallel=True)
    return layer.describe(xs), lambda: layer(xs, rngs=nnx.Rngs(rng))


@pytest.mark.parametrize("host", ["core", "linen", "nnx"])
def test_it_tells_of_the_noise_in_the_scan(host: str) -> None:
    """A noise alone can take the scan's parts from it, or the linear recurrence."""

    @fdc.register_noise
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Clipped(fdc.Dropout):
        def apply(self, mask: Any, value: Any, previous: Any = None) -> Any:
            return clip_gradient(super().apply(mask, value, previous))

    @fdc.register_noise
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Squashed(fdc.Dropout):
        def apply(self, mask: Any, value: Any, previous: Any = None) -> Any:
            return super().apply(mask, jnp.tanh(value), previous)

    described, run = host_of_linear(host, fdc.RecurrentDropout(output=FRESH))
    assert described.why_plain is None and described.is_linear
    run()

    described, _ = host_of_linear(host, fdc.RecurrentDropout(output=Clipped(keep_prob=0.5)))
    assert "custom_vjp" in described.why_plain and described.before == described.after == ()

    shifted = fdc.RecurrentDropout(output=FRESH)
    cell: Any = lambda params, h, x: (x, h)  # noqa: E731
    row = jnp.zeros((ROWS, 4))
    assert not fdc.describe(None, row, row, cell=cell, dropout=shifted).is_linear

    squashed = Squashed(keep_prob=0.5, scale=False)
    described, run = host_of_linear(host, fdc.RecurrentDropout(inside={"hidden": squashed}))
    assert described.why_plain is None and not described.is_linear
    with pytest.raises(ValueError, match="tanh"):
        run()


@pytest.mark.parametrize(
    ("noise", "is_ahead"),
    [
        (fdc.Dropout(keep_prob=0.7), True),
        (fdc.Dropout(keep_prob=0.7, variational=True), True),
        (fdc.Dropout(keep_prob=0.5), False),  # one bit a unit is drawn in the loop
        (fdc.GaussianNoise(stddev=0.1), False),
    ],
)
def test_it_tells_if_noise_keeps_a_product_in_the_loop(noise: Any, is_ahead: bool) -> None:
    """The product reads the disturbed input: it cannot run before the input's mask is drawn."""
    size, spec = 128, fdc.RecurrentDropout(input=noise)
    params, h = fdc.init_gru(jax.random.key(0), size, size), jnp.zeros((1, size))
    options: Any = {"cell": fdc.gru_cell, "dropout": spec}
    told = repr(fdc.describe(params, h, h, **options))
    assert ("before the loop: dot_general" in told) == is_ahead

    def run(xs: jax.Array) -> Any:
        return fdc.dropout_scan(params, h, xs, jax.random.key(1), **options)

    program = jax.make_jaxpr(run)(jnp.ones((5, 1, size)))
    names = {each.primitive.name for each, around in equations(program) if "scan" not in around}
    assert ("dot_general" in names) == is_ahead


def test_mistakes_that_a_step_would_tell() -> None:
    params, h, x = fdc.init_gru(jax.random.key(0), 3, 8), jnp.zeros((4, 8)), jnp.ones((4, 3))
    spec = fdc.RecurrentDropout(inside={"candidate": fdc.Zoneout(prob=0.1)})
    with pytest.raises(ValueError, match="pass one at 'hidden'"):
        fdc.describe(params, h, x, cell=fdc.gru_cell, dropout=spec)
    spec = fdc.RecurrentDropout(state=FROZEN)
    with pytest.raises(ValueError, match="all rows would share its mask"):
        fdc.describe(None, h[:1], x, cell=lambda params, h, x: (h + x[:, :1], h), dropout=spec)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_a_layers_picture_with_each_argument(framework: str) -> None:
    steps, rows, start = 7, 3, 5
    spec = fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=0.5))
    if framework == "linen":
        layer: Any = fdc.linen.RNN(nn.GRUCell(8), spec)
    else:
        layer = fdc.nnx.RNN(nnx.GRUCell(16, 8, rngs=nnx.Rngs(0)), spec)
    grid = [Figure().subplots()]
    layer.plot_masks(
        jnp.ones((steps, rows, 16)), KEY, start=start, row=2, max_units=4, time_major=True, ax=grid
    )
    masks = [kept(site_key(KEY, "input", start + t), rows, 16)[2, :4] for t in range(steps)]
    image = grid[0].images[0]
    np.testing.assert_array_equal(np.asarray(image.get_array()).astype(bool), np.stack(masks, 1))
    assert image.get_extent() == [start - 0.5, start + steps - 0.5, 3.5, -0.5]

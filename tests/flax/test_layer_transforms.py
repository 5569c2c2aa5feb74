"""The layers under Flax's transformations: members and depths have masks of their own."""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from asserts import assert_same
from flax import nnx
from probes import differ

import flax_dropout_cell as fdc

STEPS, COPIES = 3, 3
SPEC = probes.mixed(("params", "state"))
XS = probes.ones(STEPS, 2)
RNGS = {"dropout": jax.random.key(1)}


def assert_right(masks: Any) -> None:
    """Frozen at the weights, fresh on the inputs."""
    assert_same(masks["params"][1:], masks["params"][:-1])
    for one, other in itertools.combinations(masks["input"], 2):
        assert differ(one, other)


class Layer(nn.Module):
    """A layer that gives its masks; a body of `nn.scan` as it stands."""

    wrap: Any = staticmethod(lambda layer: layer)

    @nn.compact
    def __call__(self, xs: jax.Array, _: Any = None) -> Any:
        layer = self.wrap(fdc.linen.RNN)(probes.LinenProbe(), SPEC, time_major=True)
        return xs, layer(xs)


def test_each_call_of_a_linen_layer_has_new_masks() -> None:
    """Two windows in one model, say: a call is a window. (NNX's stream is looked at below.)"""

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, xs: jax.Array) -> Any:
            layer = fdc.linen.RNN(probes.LinenProbe(), SPEC, time_major=True)
            return layer(xs), layer(xs)

    model = Twice()
    one, other = model.apply(model.init(jax.random.key(0), XS), XS, rngs=RNGS)
    for site in ("params", "input"):
        assert differ(one[site], other[site]), site


@pytest.mark.parametrize("wrap", [nn.jit, nn.remat], ids=["nn.jit", "nn.remat"])
def test_linen_compiled_and_recomputed(wrap: Any) -> None:
    model = Layer(wrap)
    variables = model.init(jax.random.key(0), XS)

    def loss(variables: Any) -> Any:
        masks: Any = model.apply(variables, XS, rngs=RNGS)[1]
        return masks["params"].sum(), masks

    grads, masks = jax.jit(jax.grad(loss, has_aux=True))(variables)
    assert_right(masks)
    (grad,) = jax.tree.leaves(grads)
    assert_same(grad, masks["params"].sum((0, 1)))  # the weights' mask was drawn as before


LIFTED = {
    "nn.vmap": lambda layer, rngs: nn.vmap(
        layer,
        variable_axes={"params": 0},
        split_rngs=rngs,
        in_axes=None,  # type: ignore[arg-type]
        axis_size=COPIES,
    ),
    "nn.scan": lambda layer, rngs: nn.scan(
        layer, variable_axes={"params": 0}, split_rngs=rngs, length=COPIES
    ),
}


@pytest.mark.parametrize("lift", LIFTED)
def test_linen_copies_with_masks_of_their_own(lift: str) -> None:
    model: Any = LIFTED[lift](Layer, {"params": True, "dropout": True})()
    variables = jax.jit(model.init)(jax.random.key(0), XS)
    copies = jax.jit(lambda: model.apply(variables, XS, rngs=RNGS)[1])()
    masks = [jax.tree.map(lambda leaf, i=i: leaf[i], copies) for i in range(COPIES)]
    for one in masks:
        assert_right(one)
    for one, other in itertools.combinations(masks, 2):
        assert all(differ(one[site], other[site]) for site in ("params", "input"))


def layer_of(rngs: Any) -> Any:
    return fdc.nnx.RNN(probes.NnxProbe(), SPEC, time_major=True, rngs=rngs)  # type: ignore[arg-type]


def test_nnx_compiled_and_recomputed() -> None:
    """Each call moves the stream on, in a transformation too."""
    plain, layer = layer_of(nnx.Rngs(0)), layer_of(nnx.Rngs(0))

    def loss(layer: Any) -> Any:
        masks = layer(XS)
        return masks["params"].sum(), masks

    seen = []
    for take in (nnx.jit(nnx.grad(loss, has_aux=True)), nnx.grad(nnx.remat(loss), has_aux=True)):
        grads, masks = take(layer)
        assert_right(masks)
        assert_same(masks, plain(XS))
        (grad,) = jax.tree.leaves(grads)
        assert_same(grad, masks["params"].sum((0, 1)))
        seen.append(masks)
    assert differ(seen[0]["params"], seen[1]["params"])


@pytest.mark.parametrize("transform", ["nnx.vmap", "nnx.scan"])
def test_nnx_copies_with_masks_of_their_own(transform: str) -> None:
    layers = nnx.split_rngs(splits=COPIES)(nnx.vmap(layer_of))(nnx.Rngs(0))
    if transform == "nnx.vmap":
        run: Any = nnx.vmap(lambda layer, xs: layer(xs), in_axes=(0, None))
    else:
        scan: Any = nnx.scan(
            lambda layer, xs: (xs, layer(xs)),
            in_axes=(0, nnx.Carry),
            out_axes=(nnx.Carry, 0),
        )
        run = lambda layers, xs: scan(layers, xs)[1]  # noqa: E731
    calls = [nnx.jit(run)(layers, XS) for _ in range(2)]
    masks = [jax.tree.map(lambda leaf, i=i: leaf[i], call) for call in calls for i in range(COPIES)]
    for one in masks:
        assert_right(one)
    for one, other in itertools.combinations(masks, 2):
        assert all(differ(one[site], other[site]) for site in ("params", "input"))


def test_nnx_windows_in_a_scan_with_masks_of_their_own() -> None:
    """The way out that the docs name; a layer that is broadcast repeats its masks."""
    windows = jnp.stack([XS] * COPIES)
    ways = {"stream": nnx.StateAxes({nnx.RngState: nnx.Carry, ...: None}), "broadcast": None}
    for way, axes in ways.items():
        scan: Any = nnx.scan(lambda layer, xs: layer(xs)["params"], in_axes=(axes, 0), out_axes=0)
        for one, other in itertools.combinations(scan(layer_of(nnx.Rngs(0)), windows), 2):
            assert differ(one, other) == (way == "stream")


def test_linen_windows_in_a_scan_with_masks_of_their_own() -> None:
    class Windows(nn.Module):
        @nn.compact
        def __call__(self, windows: jax.Array) -> Any:
            scan = nn.scan(
                lambda layer, carry, xs: (carry, layer(xs)["params"]),
                variable_broadcast="params",
                split_rngs={"params": False, "dropout": True},
            )
            layer = fdc.linen.RNN(probes.LinenProbe(), SPEC, time_major=True)
            return scan(layer, None, windows)[1]

    windows, model = jnp.stack([XS] * COPIES), Windows()
    variables = model.init(jax.random.key(0), windows)
    for one, other in itertools.combinations(model.apply(variables, windows, rngs=RNGS), 2):
        assert differ(one, other)


def test_layers_of_a_model_draw_apart_from_one_rngs() -> None:
    """In a stack and in both directions, sample by sample: as the docs say it for `mc_samples`."""
    first, second = layer_of(None), layer_of(None)
    both: Any = nnx.Bidirectional(
        first, second, time_major=True, merge_fn=lambda *ys: jnp.stack(ys)
    )

    def predict(key: jax.Array) -> Any:
        rngs = nnx.Rngs(key)
        stack = first(XS, rngs=rngs)["params"], second(XS, rngs=rngs)["params"]
        return jnp.stack(stack), both(XS, rngs=nnx.Rngs(key))["params"]

    for samples in fdc.mc_samples(predict, jax.random.key(0), 2):
        for one, other in itertools.combinations(np.concatenate(samples), 2):
            assert differ(one, other)


def test_jax_over_keys() -> None:
    """`jax.vmap` and `jax.lax.map` close over an NNX layer, and a key each is masks of its own."""
    layer, keys = layer_of(nnx.Rngs(0)), jax.random.split(jax.random.key(0), COPIES)
    mapped = jax.jit(jax.vmap(lambda key: layer(XS, rngs=key)))(keys)
    one_by_one = jax.jit(lambda keys: jax.lax.map(lambda key: layer(XS, rngs=key), keys))(keys)
    assert_same(mapped, one_by_one)
    masks = np.asarray(mapped["input"])
    assert all(differ(one, other) for one, other in itertools.combinations(masks, 2))

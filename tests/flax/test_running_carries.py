"""Carries of running sequences, in linen's and NNX's wrappers: arrays, dtypes, checkpoints."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import orbax.checkpoint
import pytest
from added_noise import Added
from asserts import assert_same
from flax import nnx
from hand_masks import site_key
from quick_prng import QUICK, quick_key

import flax_dropout_cell as fdc

ROWS, STEPS, UNITS = 4, 3, 64
KEY = quick_key(5)
frameworks = pytest.mark.parametrize("framework", ["linen", "nnx"])


def show(weights: jax.Array, carry: Any, x: jax.Array, disturb: Any) -> Any:
    """Emits the value at each site. Leaf 2 of the outputs, in the order of names, is `output`."""
    ones = jnp.ones_like(x)
    weights = jnp.broadcast_to(weights, x.shape)
    y = {"input": x, "inside": disturb("shown", ones), "output": ones, "params": weights}
    return carry, y


class LinenShows(nn.RNNCellBase):
    num_feature_axes = 1  # type: ignore[assignment]

    @nn.compact
    def __call__(self, carry: Any, inputs: Any, *, disturb: Any = fdc.undisturbed) -> Any:
        weights = self.param("recurrent_kernel", nn.initializers.ones, (UNITS,))
        return show(weights, carry, inputs, disturb)

    @nn.nowrap
    def initialize_carry(self, rng: Any, input_shape: Any) -> Any:
        return jnp.zeros(input_shape)


class NNXShows(nnx.RNNCellBase):
    num_feature_axes = 1  # type: ignore[assignment]

    def __init__(self) -> None:
        self.recurrent_kernel = nnx.Param(jnp.ones(UNITS))

    def __call__(self, carry: Any, inputs: Any, *, disturb: Any = fdc.undisturbed) -> Any:
        return show(self.recurrent_kernel[...], carry, inputs, disturb)

    def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
        return jnp.zeros(input_shape)


def host(framework: str) -> Callable[..., Any]:
    """`run(spec, xs, carry=None)` of a stock layer; NNX keeps its module and sets the spec."""
    if framework == "linen":

        def in_linen(spec: Any, xs: jax.Array, carry: Any = None, **given: Any) -> Any:
            rnn = nn.RNN(fdc.linen.DropoutCell(LinenShows(), spec), return_carry=True)
            variables = {"params": {"cell": {"recurrent_kernel": jnp.ones(UNITS)}}}
            rngs = {"dropout": KEY}
            return rnn.apply(variables, xs, initial_carry=carry, rngs=rngs, **given)

        return in_linen
    cell = fdc.nnx.DropoutCell(NNXShows(), fdc.RecurrentDropout(), rngs=nnx.Rngs(dropout=KEY))

    def in_nnx(spec: Any, xs: jax.Array, carry: Any = None, **given: Any) -> Any:
        cell.dropout = spec
        rnn: Any = nnx.RNN(cell, return_carry=True)
        return rnn(xs, initial_carry=carry, **given)

    return in_nnx


def on_output(noise: fdc.Noise) -> dict[str, Any]:
    return {"input": None, "inside": None, "output": noise, "params": None}


@frameworks
@pytest.mark.parametrize("lengths", [None, [1, 3, 2, 3]])
def test_arrays_of_a_running_sequence(framework: str, lengths: Any) -> None:
    """Variational masks keep the scale that they were drawn with; steps have the new one."""

    def spec(keep_prob: float) -> fdc.RecurrentDropout:
        keep = jnp.float32(keep_prob)
        once = fdc.Dropout(keep_prob=keep, variational=True)
        return fdc.RecurrentDropout(
            params=fdc.recurrent_kernels(once),
            input=once,
            inside={"shown": fdc.Dropout(keep_prob=keep / 2, variational=True)},
            output=on_output(fdc.Dropout(keep_prob=keep)),
        )

    def scales(ys: Any) -> dict[str, float]:
        return {site: float(jnp.unique(values)[1:].item()) for site, values in ys.items()}

    run, xs = host(framework), jnp.ones((ROWS, STEPS, UNITS))
    carry, first = run(spec(0.5), xs, seq_lengths=lengths and jnp.array(lengths))
    assert scales(first) == {"params": 2, "input": 2, "inside": 4, "output": 2}
    _, second = run(spec(0.25), xs, carry)
    assert scales(second) == {"params": 2, "input": 2, "inside": 4, "output": 4}
    for site in ("params", "input", "inside"):
        assert_same(first[site], second[site])
    _, fresh = run(spec(0.25), xs)
    assert scales(fresh) == {"params": 4, "input": 4, "inside": 8, "output": 4}


@frameworks
@pytest.mark.parametrize(
    ("site", "noise", "place"),
    [
        ("input", Added(), {}),
        ("output", on_output(Added()), {"leaf": 2}),
        ("inside", {"shown": Added()}, {"inside": "shown"}),
    ],
    ids=["input", "output", "inside"],
)
def test_inputs_of_another_dtype(framework: str, site: str, noise: Any, place: Any) -> None:
    """A host says no dtype when it starts; masks are drawn again for the one that comes."""
    shape, dtype = (ROWS, STEPS, UNITS), jnp.bfloat16
    xs = jax.random.normal(jax.random.key(1), shape, dtype)
    sites: dict[str, Any] = {site: noise}
    carry, ys = host(framework)(fdc.RecurrentDropout(**sites), xs)
    key = jax.random.wrap_key_data(carry.rng.key[0], impl=QUICK)
    mask = jax.random.normal(site_key(key, site, **place), (ROWS, UNITS), dtype)
    plain = {"input": xs, "inside": jnp.ones(shape, dtype), "output": jnp.ones(shape, dtype)}
    for name, value in plain.items():
        assert ys[name].dtype == dtype
        assert_same(ys[name], value + mask[:, None] if name == site else value)


@frameworks
def test_a_carry_that_orbax_saved(framework: str, tmp_path: Path) -> None:
    """It goes on bit for bit; a carry with other sites cannot take it."""
    once, fresh = (fdc.Dropout(keep_prob=0.5, variational=each) for each in (True, False))
    spec = fdc.RecurrentDropout(
        params=fdc.recurrent_kernels(once), input=once, output=on_output(fresh)
    )
    run, xs = host(framework), jnp.ones((ROWS, STEPS, UNITS))
    carry, _ = run(spec, xs)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "carry", carry)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "carry", jax.tree.map(jnp.zeros_like, carry))
    assert_same(run(spec, xs, restored), run(spec, xs, carry))
    other, _ = run(dataclasses.replace(spec, inside={"shown": once}), xs)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        with pytest.raises(ValueError, match="structures do not match"):
            checkpointer.restore(tmp_path / "carry", other)

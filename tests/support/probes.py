"""Cells through which masks can be read off: a plain function, and the same in linen and NNX.

With ones for inputs and weights, what a probe emits at a site is the mask there, divided by
keep_prob.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import flax_dropout_cell as fdc

STEPS, BATCH, UNITS = 5, 4, 64
SHAPE = (BATCH, UNITS)
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


class NnxProbe(nnx.RNNCellBase):
    """`probe_cell` as an NNX cell."""

    def __init__(self, w: Any = None) -> None:
        self.w = nnx.Param(jnp.ones(UNITS) if w is None else w)

    def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, Any]:
        return probe_cell({"w": self.w[...]}, carry, inputs)

    def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
        return {"a": jnp.ones(input_shape), "b": jnp.ones(input_shape)}

    @property
    def num_feature_axes(self) -> int:
        return 1


NOTHING = {"params": None, "input": None, "state": None, "output": None}


def noise_everywhere(noise: fdc.Noise | None) -> fdc.RecurrentDropout:
    """One noise at every site of a probe; at `output` only on the leaf that shows no other."""
    return fdc.RecurrentDropout(
        params=noise,
        input=noise,
        state={"a": noise, "b": noise},
        output={**NOTHING, "output": noise},
    )


def mixed(frozen: tuple[str, ...], keep_prob: float = 0.5) -> fdc.RecurrentDropout:
    """Noise at every site of a probe: variational at those of `frozen`, per-step elsewhere."""

    def noise(site: str) -> fdc.Dropout:
        return fdc.Dropout(keep_prob=keep_prob, variational=site in frozen)

    return fdc.RecurrentDropout(
        params=noise("params"),
        input=noise("input"),
        state={"a": noise("state"), "b": noise("state")},
        output={**NOTHING, "output": noise("output")},
    )


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


def differ(a: Any, b: Any) -> bool:
    """Two masks of half ones: equal only by chance, once in 2**64 for the smallest here."""
    return bool((np.asarray(a) != np.asarray(b)).any())

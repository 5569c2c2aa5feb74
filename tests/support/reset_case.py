"""A cell, inputs and resets that cut rows into sequences of several lengths."""

from typing import Any

import jax
import jax.numpy as jnp
from quick_prng import quick_key

import flax_dropout_cell as fdc

T, B, D, H = 12, 4, 3, 64


PARAMS = {
    "in": jax.random.normal(jax.random.key(0), (D, H)),
    "rec": jax.random.normal(jax.random.key(1), (H, H)) / 8,
}


XS = jax.random.normal(jax.random.key(2), (T, B, D))


RESETS = jnp.zeros((T, B), bool).at[[4, 7, 7, 0], [0, 0, 2, 3]].set(True)
NOISES = {
    "variational": fdc.Dropout(keep_prob=0.7, variational=True),
    "step": fdc.Dropout(keep_prob=0.7),
}


def cell(params, carry, x, *, activation=jnp.tanh, disturb=fdc.undisturbed):
    """Shows the masks of its input and of its site inside, and a state that runs on."""
    ones, h = jnp.ones((*x.shape[:-1], H)), carry["h"]
    z = x @ params["in"] + h @ params["rec"]
    new = {"h": activation(z), "seen": ones}
    return new, {"h": new["h"], "inside": disturb("a", ones), "state": carry["seen"], "out": ones}


def first_carry(batch=B):
    return {"h": jnp.full((batch, H), 0.5), "seen": jnp.ones((batch, H))}


def noise_everywhere(noise) -> fdc.RecurrentDropout:
    return fdc.RecurrentDropout(
        input=noise,
        state={"h": noise, "seen": noise},
        output={"h": None, "inside": None, "state": None, "out": noise},
        inside={"a": noise},
        params={"in": None, "rec": noise},
    )


def scan(noise, xs=XS, rng=None, carry=None, **options) -> Any:
    if rng is None:  # JAX's own PRNG takes long to compile at each step
        rng = jax.random.key(9) if noise is NOISES["variational"] else quick_key(9)
    carry = first_carry(xs.shape[1]) if carry is None else carry
    spec = noise_everywhere(noise) if isinstance(noise, fdc.Dropout) else noise
    return fdc.dropout_scan(PARAMS, carry, xs, rng, cell=cell, dropout=spec, **options)

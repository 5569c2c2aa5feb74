"""Gradients under dropout, against finite differences, and zero where units are dropped."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from hosts import HOSTS, SPECS
from jax.test_util import check_grads
from quick_prng import quick_key
from specs import noise_everywhere

import flax_dropout_cell as fdc

STEPS = 3  # of a probe: loops in Python are compiled step by step
T, B, F, H = 4, 2, 3, 5
RNG = jax.random.key(3)


def lstm(params, carry, x):
    c, h = carry
    gates = jnp.concatenate([x, h], axis=-1) @ params["kernel"] + params["bias"]
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (c, h), h


def values(dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "kernel": jax.random.normal(keys[0], (F + H, 4 * H), dtype),
        "bias": jax.random.normal(keys[1], (1, 4 * H), dtype),
    }
    carry = (jnp.zeros((B, H), dtype), jax.random.normal(keys[2], (B, H), dtype))
    return params, carry, jax.random.normal(keys[3], (T, B, F), dtype)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("variational", [True, False], ids=["variational", "step"])
def test_finite_differences(variational) -> None:
    """In float64, with the masks held fast by the key."""
    rng = RNG if variational else quick_key(3)  # each step's draws take long to compile
    spec = noise_everywhere(fdc.Dropout(keep_prob=0.6, variational=variational))

    def loss(params, carry, xs):
        carry, ys = fdc.dropout_scan(params, carry, xs, rng, cell=lstm, dropout=spec)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves((carry, ys)))

    check_grads(jax.jit(loss), values("float64"), order=1, modes=("fwd", "rev"), rtol=1e-6)


def test_a_learned_keep_prob() -> None:
    """keep_prob is differentiable through the scale of the kept units."""
    x = jnp.arange(1.0, 5.0)
    mask = jnp.array([True, False, True, True])

    def loss(spec):
        _, y = fdc.dropout_cell(
            None,
            None,
            x,
            None,
            cell=lambda p, c, x: (c, x),
            dropout=spec,
            masks=fdc.Masks(input=mask),
        )
        return y.sum()

    spec = fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=jnp.asarray(0.5)))
    grad = jax.grad(loss)(spec)
    np.testing.assert_allclose(grad.input.keep_prob, -(1 + 3 + 4) / 0.5**2)


@pytest.mark.parametrize("variational", [True, False], ids=["variational", "step"])
def test_no_gradient_through_dropped_units(variational) -> None:
    """A unit that is dropped at the input has gradient 0 there; a kept one has not."""
    params, carry, xs = values("float32")
    noise = fdc.Dropout(keep_prob=0.6, variational=variational)
    spec = fdc.RecurrentDropout(input=noise)

    def emit(p, c, x):
        return c, x

    _, shown = fdc.dropout_scan(None, None, jnp.ones_like(xs), RNG, cell=emit, dropout=spec)

    def loss(xs):
        (_, h), _ = fdc.dropout_scan(params, carry, xs, RNG, cell=lstm, dropout=spec)
        return h.sum()

    grad = jax.grad(loss)(xs)
    np.testing.assert_array_equal(grad == 0, shown == 0)
    assert 0 < (shown == 0).mean() < 1


def test_no_gradient_to_dropped_weights() -> None:
    params, carry, xs = values("float32")
    spec = fdc.RecurrentDropout(
        params={"kernel": fdc.Dropout(keep_prob=0.6, variational=True), "bias": None}
    )
    masks = fdc.draw_masks(params, carry, xs[0], RNG, cell=lstm, dropout=spec)

    def loss(params):
        (_, h), _ = fdc.dropout_scan(params, carry, xs, RNG, cell=lstm, dropout=spec)
        return h.sum()

    grad = jax.grad(loss)(params)
    np.testing.assert_array_equal(grad["kernel"] == 0, ~masks.params["kernel"])
    assert (grad["bias"] != 0).all()


@pytest.mark.parametrize("site", ["input", "state", "output"])
def test_nan_in_dropped_units_stays_out_of_a_sequence(site) -> None:
    """A poisoned unit that is always dropped leaves the outputs and all gradients clean."""
    mask = jnp.array([[True, False, True]])
    noise: Any = fdc.Dropout(keep_prob=0.5, variational=True)
    spec = fdc.RecurrentDropout(**{site: noise})
    masks = fdc.Masks(**{site: jnp.broadcast_to(mask, (2, 3))})

    def cell(w, carry, x):
        new = carry * w + x
        y = x if site == "input" else new
        return (jnp.zeros_like(new) if site == "output" else new), y

    def loss(w, xs, poison):
        at = jnp.array([[0.0, 1.0, 0.0]])
        xs = xs + jnp.where(at == 1, poison, 0.0)[None]
        carry = jnp.zeros((2, 3))
        carry, ys = fdc.dropout_scan(w, carry, xs, None, cell=cell, dropout=spec, masks=masks)
        seen = carry if site == "state" else ys
        return (seen**2).sum()

    w, xs = jnp.full((1, 3), 0.5), jnp.ones((T, 2, 3))
    clean = jax.value_and_grad(loss, (0, 1))(w, xs, 0.0)
    if site == "input":  # the cell's own arithmetic never sees the poison
        dirty = jax.value_and_grad(loss, (0, 1))(w, xs, jnp.nan)
        jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    else:  # the value is clean; the gradient of w is the cell's own product with NaN
        dirty = jax.value_and_grad(loss, 1)(w, xs, jnp.inf)
        np.testing.assert_array_equal(dirty[0], clean[0])
        np.testing.assert_array_equal(dirty[1], clean[1][1])


@pytest.mark.parametrize("host", [host for host in HOSTS if "backward" not in host])
def test_gradients_in_every_host(host) -> None:
    """A probe's outputs are linear in weights and inputs, so their gradients are the masks."""

    @jax.jit
    def gradients(rng, xs, weights):
        def total(xs, weights):
            seen = HOSTS[host](SPECS["ends frozen"], rng, xs, weights).seen
            return seen["params"].sum() + seen["input"].sum(), seen

        return jax.grad(total, (0, 1), has_aux=True)(xs, weights)

    weights = jnp.ones(probes.UNITS)
    (of_xs, of_weights), seen = gradients(RNG, probes.ones(STEPS), weights)
    np.testing.assert_array_equal(of_xs, seen["input"])
    np.testing.assert_array_equal(of_weights, seen["params"].sum((0, 1)))
    assert set(np.unique(of_xs)) == {0.0, 2.0}


def test_a_packed_rows_gradient_is_that_of_its_sequences_alone() -> None:
    noise = fdc.Dropout(keep_prob=0.6, variational=True)
    spec = fdc.RecurrentDropout(input=noise, inside={"recurrent": noise})
    params, zeros = fdc.init_lstm(jax.random.key(0), 3, 8), jnp.zeros((1, 8))
    xs = jax.random.normal(jax.random.key(1), (7, 1, 3))
    resets = jnp.zeros((7, 1), bool).at[4].set(True)
    ids = jnp.array([30] * 4 + [11] * 3)[:, None]

    def loss(params: Any, xs: jax.Array, **options: Any) -> jax.Array:
        given: Any = {"cell": fdc.lstm_cell, "dropout": spec, **options}
        carry = fdc.LSTMState(zeros, zeros)
        return (fdc.dropout_scan(params, carry, xs, jax.random.key(2), **given)[1] ** 2).sum()

    def alone(params: Any, xs: jax.Array) -> jax.Array:
        first = loss(params, xs[:4], sequence_ids=jnp.array([30]))
        return first + loss(params, xs[4:], sequence_ids=jnp.array([11]))

    def packed(params: Any, xs: jax.Array) -> jax.Array:
        return loss(params, xs, resets=resets, sequence_ids=ids)

    ours, theirs = jax.jit(
        lambda *args: [jax.grad(which, (0, 1))(*args) for which in (packed, alone)]
    )(params, xs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)
    assert all(jnp.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(theirs))

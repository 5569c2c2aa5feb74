"""Recurrent dropout with no framework: a cell is a function, its weights are a dict of arrays.

An LSTM forecasts the next value of noisy waves. The training set is small: without dropout the LSTM
memorizes the noise, and the loss on new waves rises while the training loss falls.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import optax

import flax_dropout_cell as fdc

UNITS, STEPS, EPOCHS = 48, 50, 300
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(5e-3))
DROPOUT = fdc.RecurrentDropout(
    state=(None, fdc.Dropout(keep_prob=0.8, variational=True)),  # The carry is (c, h): h only.
    output=fdc.Dropout(keep_prob=0.8, variational=True),
)


def lstm(params, carry, x):
    c, h = carry
    gates = x @ params["input"] + h @ params["recurrent"] + params["bias"]
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (c, h), h


def init_params(rng):
    shapes = {"input": (1, 4 * UNITS), "recurrent": (UNITS, 4 * UNITS), "readout": (UNITS, 1)}
    init, keys = jax.nn.initializers.lecun_normal(), jax.random.split(rng, len(shapes))
    params = {name: init(key, shapes[name]) for name, key in zip(shapes, keys, strict=True)}
    return params | {"bias": jnp.zeros(4 * UNITS)}


def make_waves(rng, batch):
    """Sums of two sines and noise, `[time, batch, 1]`."""
    rate_rng, phase_rng, noise_rng = jax.random.split(rng, 3)
    rates = jax.random.uniform(rate_rng, (2, batch), minval=0.1, maxval=0.9)
    phases = jax.random.uniform(phase_rng, (2, batch), maxval=2 * jnp.pi)
    waves = jnp.sin(rates * jnp.arange(STEPS)[:, None, None] + phases).sum(axis=1)
    return (waves + 0.3 * jax.random.normal(noise_rng, waves.shape))[..., None]


@functools.partial(jax.jit, static_argnames="dropout")
def loss_of(params, waves, rng, dropout):
    """The mean squared error of the forecasts. `rng=None` is evaluation, without dropout."""
    zeros = jnp.zeros((waves.shape[1], UNITS))
    _, ys = fdc.dropout_scan(params, (zeros, zeros), waves[:-1], rng, cell=lstm, dropout=dropout)
    return jnp.mean((ys @ params["readout"] - waves[1:]) ** 2)


@functools.partial(jax.jit, static_argnames="dropout")
def train_step(params, opt_state, waves, rng, dropout):
    loss, grads = jax.value_and_grad(loss_of)(params, waves, rng, dropout)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def main():
    argparse.ArgumentParser(
        description=__doc__,
        epilog="Takes no flags; prints losses every 50 epochs, on new waves too.",
    ).parse_args()
    init_rng, train_rng, new_rng, dropout_rng = jax.random.split(jax.random.key(0), 4)
    waves, new_waves = make_waves(train_rng, batch=32), make_waves(new_rng, batch=512)
    for name, label, dropout in (
        ("no dropout", "training", fdc.RecurrentDropout()),
        ("dropout", "training (dropout on)", DROPOUT),
    ):
        params = init_params(init_rng)
        opt_state = OPTIMIZER.init(params)
        for epoch in range(1, EPOCHS + 1):
            rng = jax.random.fold_in(dropout_rng, epoch)  # New masks: each epoch is one sequence.
            params, opt_state, loss = train_step(params, opt_state, waves, rng, dropout)
            if epoch % 50 == 0:
                new_loss = loss_of(params, new_waves, None, dropout)
                print(f"{name}, epoch {epoch}: {label} {loss:.4f}, new waves {new_loss:.4f}")


if __name__ == "__main__":
    main()

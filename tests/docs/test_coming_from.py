"""Sentences of README, coming_from.md, sequences.md and tensorflow.md that stand without code."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asserts import assert_close

import flax_dropout_cell as fdc

BATCH, STEPS, FEATURES, UNITS = 3, 6, 4, 16
XS = jax.random.normal(jax.random.key(0), (BATCH, STEPS, FEATURES))
KEY = jax.random.key(1)
ONCE = fdc.Dropout(keep_prob=0.5, variational=True)


def sigmoid(value: Any) -> Any:
    return 1 / (1 + np.exp(-value))


def test_one_on_the_bias_of_f_is_the_forget_bias_of_tensorflow() -> None:
    """An LSTM in NumPy that adds 1 in the forget gate, as TensorFlow's does."""
    rnn = fdc.linen.RNN(fdc.linen.LSTMCell(UNITS), fdc.RecurrentDropout())
    variables: Any = rnn.init(jax.random.key(2), XS)
    cell = jax.tree.map(np.asarray, variables["params"]["cell"])
    for gate in "ifgo":
        assert not cell[f"h{gate}"]["bias"].any()
    c = h = np.zeros((BATCH, UNITS), np.float32)
    for x in np.asarray(XS).swapaxes(0, 1):
        i, f, g, o = (x @ cell[f"i{k}"]["kernel"] + h @ cell[f"h{k}"]["kernel"] for k in "ifgo")
        c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
    variables["params"]["cell"]["hf"]["bias"] += 1
    ys: Any = rnn.apply(variables, XS)
    assert_close(ys[:, -1], h)


def test_the_last_output_of_a_padded_row_is_h() -> None:
    lengths = np.array([6, 2, 4])
    rnn = fdc.linen.RNN(fdc.linen.LSTMCell(UNITS), fdc.RecurrentDropout(), return_carry=True)
    variables = rnn.init(jax.random.key(2), XS)
    ran: Any = rnn.apply(variables, XS, seq_lengths=lengths)
    (_, h), y = ran
    assert not y[1:, -1].any()
    stock: Any = nn.RNN(nn.LSTMCell(UNITS)).apply(variables, XS)
    for row, length in enumerate(lengths):
        assert_close(h[row], stock[row, length - 1])


def echo(params: Any, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return h + x, x


def test_a_reset_leaves_the_masks_that_rows_share() -> None:
    shared = fdc.Dropout(keep_prob=0.5, variational=True, broadcast_dims=(0,))
    xs = jnp.ones((STEPS, BATCH, 32))
    resets = np.zeros((STEPS, BATCH), bool)
    resets[3] = True
    for noise, changes in ((ONCE, True), (shared, False)):
        options: Any = {"cell": echo, "dropout": fdc.RecurrentDropout(output=noise)}
        _, ys = fdc.dropout_scan(None, jnp.zeros((BATCH, 32)), xs, KEY, resets=resets, **options)
        assert (ys[2] == ys[0]).all() and (ys[5] == ys[3]).all()
        assert bool((ys[3] != ys[0]).any()) == changes
    weights = fdc.RecurrentDropout(params=ONCE)

    def by_weights(w: jax.Array, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return h, x * w[None]

    options = {"cell": by_weights, "dropout": weights, "resets": resets}
    _, ys = fdc.dropout_scan(jnp.ones(32), jnp.zeros((BATCH, 32)), xs, KEY, **options)
    assert (ys == ys[:1, :1]).all() and 0 < (ys[0, 0] == 0).sum() < 32


@pytest.mark.parametrize("passes_it", [False, True])
def test_a_reset_of_a_function_starts_from_zeros(passes_it: bool) -> None:
    """Whatever carry came, unless it comes as `reset_carry` too."""
    first, resets = jnp.full((BATCH, 1), 100.0), np.zeros((STEPS, BATCH), bool)
    resets[3, 1] = True
    options: Any = {"cell": echo, "dropout": fdc.RecurrentDropout(), "resets": resets}
    if passes_it:
        options["reset_carry"] = first
    h, _ = fdc.dropout_scan(None, first, jnp.ones((STEPS, BATCH, 1)), None, **options)
    assert h.ravel().tolist() == [106, 103 if passes_it else 3, 106]


@pytest.mark.parametrize("noise", [ONCE, fdc.Dropout(keep_prob=0.5)], ids=["once", "each step"])
def test_vmap_over_the_batch_needs_a_key_for_each_row(noise: fdc.Dropout) -> None:
    def run(x: jax.Array, rng: jax.Array) -> jax.Array:
        spec = fdc.RecurrentDropout(output=noise)
        return fdc.dropout_scan(None, jnp.zeros(32), x, rng, cell=echo, dropout=spec)[1]

    xs = jnp.ones((BATCH, STEPS, 32))
    one_key = jax.vmap(run, (0, None))(xs, KEY)
    assert (one_key == one_key[:1]).all()
    keys = jax.vmap(run)(xs, jax.random.split(KEY, BATCH))
    assert all((keys[row] != keys[0]).any() for row in range(1, BATCH))


def test_the_end_of_a_path_names_a_weight_and_kernel_names_all() -> None:
    params = {"rec": {"kernel": jnp.ones((8, 8))}, "in": {"kernel": jnp.ones((8, 8))}}

    def cell(params: Any, h: jax.Array, x: jax.Array) -> Any:
        return h, (params["rec"]["kernel"], params["in"]["kernel"])

    for path, dropped in (("rec/kernel", [True, False]), ("kernel", [True, True])):
        spec = fdc.RecurrentDropout(params=fdc.at_paths(ONCE, path))
        _, weights = fdc.dropout_scan(
            params, jnp.zeros(1), jnp.ones((1, 1)), KEY, cell=cell, dropout=spec
        )
        assert [bool((weight == 0).any()) for weight in weights] == dropped


def test_a_state_of_the_cell_starts_tensorflows_wrapper() -> None:
    """By `redraw_masks`: with a key in training, without one in evaluation, as the stock layer."""
    cell = fdc.linen.RNNCellDropoutWrapper(nn.GRUCell(UNITS), deterministic=True)
    state = jax.random.normal(jax.random.key(3), (BATCH, UNITS))
    rnn, stock = nn.RNN(cell), nn.RNN(nn.GRUCell(UNITS))
    variables = stock.init(jax.random.key(2), XS)
    ys: Any = rnn.apply(variables, XS, initial_carry=cell.redraw_masks(state, XS[:, 0]))
    assert_close(ys, stock.apply(variables, XS, initial_carry=state))
    trains = fdc.linen.RNNCellDropoutWrapper(nn.GRUCell(UNITS), output_keep_prob=0.5)
    carry = trains.redraw_masks(state, XS[:, 0], KEY)
    dropped: Any = nn.RNN(trains).apply(variables, XS, initial_carry=carry)
    kept = dropped != 0
    assert 0 < kept.mean() < 1
    assert_close(dropped, jnp.where(kept, 2 * ys, 0))

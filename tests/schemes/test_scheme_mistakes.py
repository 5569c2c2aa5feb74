"""Mistakes in writing down a scheme: each is one error that says how to write it."""

# The mistakes are on purpose:
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import pytest

import flax_dropout_cell as fdc

KEY = jax.random.key(0)
NOISE = fdc.Dropout(keep_prob=0.8, variational=True)
H = jnp.zeros((2, 8))
LSTM = fdc.init_lstm(KEY, 3, 8)
GRU = fdc.init_gru(KEY, 3, 8)


def scan_lstm(masks: Any = None, **sites: Any) -> None:
    fdc.dropout_scan(
        LSTM, fdc.LSTMState(H, H), jnp.ones((4, 2, 3)), KEY,
        cell=fdc.lstm_cell, dropout=fdc.RecurrentDropout(**sites), masks=masks,
    )  # fmt: skip


def scan_gru(**sites: Any) -> None:
    fdc.dropout_scan(
        GRU, H, jnp.ones((4, 2, 3)), KEY, cell=fdc.gru_cell, dropout=fdc.RecurrentDropout(**sites)
    )


def scan_haiku(**sites: Any) -> None:
    core = hk.without_apply_rng(hk.transform(lambda x, state: hk.LSTM(8)(x, state)))
    state, xs = hk.LSTMState(H, H), jnp.ones((4, 2, 3))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        fdc.dropout_scan(
            core.init(KEY, xs[0], state), state, xs, KEY,
            cell=lambda params, state, x: core.apply(params, x, state)[::-1],
            dropout=fdc.RecurrentDropout(**sites),
        )  # fmt: skip


def scan_plain(**sites: Any) -> None:
    fdc.dropout_scan(
        None, H, jnp.ones((4, 2, 8)), KEY,
        cell=lambda params, h, x: (jnp.tanh(h + x), h), dropout=fdc.RecurrentDropout(**sites),
    )  # fmt: skip


MISTAKES = {
    "a probability by position": (
        lambda: fdc.Dropout(0.2),
        TypeError,
        r"nn.Dropout\(0.2\) is .*Dropout\(keep_prob=0.8\)",
    ),
    "a site that the cell has not": (
        lambda: scan_lstm(inside={"recurent": NOISE}),
        ValueError,
        "'recurent'.* has candidate, hidden, input_per_gate, memory, recurrent, recurrent_per_gate",
    ),
    "a site that another cell has": (
        lambda: scan_gru(inside={"memory": fdc.Dropout(keep_prob=0.8, scale=False)}),
        ValueError,
        r"'memory'.* has candidate, hidden, input_per_gate, recurrent, rec.*\. .*lstm_cell",
    ),
    "a cell without disturb": (
        lambda: scan_plain(inside={"recurrent": NOISE}),
        TypeError,
        "'recurrent', but the cell has no sites: it takes no argument `disturb`.*lstm_cell .*gru_c",
    ),
    "a noise that needs the step before": (
        lambda: scan_lstm(input=fdc.Zoneout(prob=0.1)),
        ValueError,
        "dropout.input: Zoneout needs the value of the step before.* state",
    ),
    "a pattern that matches no weight": (
        lambda: scan_lstm(params=fdc.at_paths(NOISE, "hh/kernel")),
        ValueError,
        "'hh/kernel'.* input_kernel, recurrent_kernel",
    ),
    "a joint kernel": (
        lambda: scan_haiku(params=fdc.recurrent_kernels(NOISE)),
        ValueError,
        "lstm/linear/w is one joint kernel",
    ),
    "a mask at a site without noise": (
        lambda: scan_lstm(masks=fdc.Masks(inside={"recurrent": H > 0}), input=NOISE),
        ValueError,
        r"masks.inside\['recurrent'\] has a mask where",
    ),
    "probabilities that are logits": (
        lambda: fdc.mc_entropies(jnp.array([[[2.0, -1.0]], [[0.5, 0.1]]])),
        ValueError,
        "probabilities.*logits",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_is_one_short_error(mistake: str) -> None:
    make, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=rf"(?s){message}") as caught:
        make()
    text = str(caught.value)
    assert len(text.splitlines()) <= 5
    # Shapes and names, never a value's whole repr.
    assert len(text) < 500 and "Array(" not in text and "array([" not in text

"""Mistakes that newcomers make, as they write them; `docs/error_messages.md` shows the errors.

`python tests/support/mistakes.py` writes that part of the page anew.
"""

# The mistakes are on purpose:
# pyright: reportArgumentType=false

import functools
import sys
import textwrap
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import flax_dropout_cell as fdc

PAGE = Path(__file__).parents[2] / "docs/error_messages.md"
BEGIN, END = "<!-- mistakes: begin -->\n", "<!-- mistakes: end -->\n"

MISTAKES = {
    "Noises": [
        "fdc.Dropout(0.2)",
        "fdc.Dropout(rate=0.2)",
        "fdc.Dropout(keep_prob=80)",
        'fdc.Dropout(keep_prob=0.8, variational="yes")',
        "fdc.Zoneout(0.1)",
    ],
    "Noises at sites": [
        "fdc.RecurrentDropout(noise)",
        "fdc.RecurrentDropout(recurrent_dropout=0.2)",
        "fdc.RecurrentDropout(candidate=noise)",
        "fdc.RecurrentDropout(input=0.8)",
        "fdc.RecurrentDropout(input=nn.Dropout(0.2))",
        "fdc.RecurrentDropout(input=fdc.Dropout)",
        'scan(dropout={"input": noise})',
        "scan(dropout=noise)",
        "scan(dropout=fdc.RecurrentDropout(input=fdc.Zoneout(prob=0.1)))",
        "scan(dropout=fdc.RecurrentDropout(state=(None, noise)))",
        "scan_lstm(dropout=fdc.RecurrentDropout(state=[None, noise]))",
        "scan_lstm(dropout=fdc.RecurrentDropout(state=noise))",
        "scan_gru(dropout=fdc.RecurrentDropout(state=noise))",
        'scan(dropout=fdc.RecurrentDropout(inside={"recurrent": noise}))',
        'scan_gru(dropout=fdc.RecurrentDropout(inside={"recurent": noise}))',
        'scan(dropout=fdc.RecurrentDropout(params={"rec": noise}))',
        'scan(dropout=fdc.RecurrentDropout(params={"in": None, "hidden": noise}))',
        'scan(dropout=fdc.RecurrentDropout(params=fdc.at_paths(noise, "hh/kernel")))',
    ],
    "Arrays and their axes": [
        "scan(xs=inputs)  # [batch, time, features], but time leads here",
        "fdc.dropout_scan(params, xs, h, key, cell=cell, dropout=spec)  # carry, then xs",
        "scan(carry=h[:1])  # one row, to be broadcast",
        "scan(xs=xs.astype(int))",
        "scan(seq_lengths=jnp.ones((4, 5), bool))  # a mask, as Keras has it",
        "scan(resets=jnp.zeros((4, 5), bool))",
        "scan(sequence_ids=jnp.arange(5))",
        "rnn(xs=jnp.ones(3))",
        "rnn(initial_carry=h)  # an LSTM's is (c, h)",
        "rnn(initial_carry=(h[:2], h[:2]))",
    ],
    "Cells": [
        "scan(cell=nn.LSTMCell(8))",
        "scan(cell=lambda params, h, x: cell(params, h, x)[0])",
        "scan_lstm(cell=lambda *step: fdc.lstm_cell(*step)[::-1])  # (y, carry)",
    ],
    "Keys and masks": [
        "scan(rng=0)",
        "scan(rng=jax.random.split(key))",
        "fdc.dropout_cell(params, h, xs[0], key, step=0, cell=cell, dropout=frozen)",
        "scan(dropout=frozen, masks=masks_of(h[:2], xs[0, :2]))  # masks of another batch size",
        "scan(dropout=frozen, masks=masks_of(h, xs))  # drawn for all steps at once",
        "scan(dropout=frozen, masks=jnp.ones((4, 3), bool))",
        "fdc.mc_samples(lambda key: scan(rng=key), 10, key)",
        "fdc.mc_entropies(jnp.array([[[2.0, -1.0]]]))",
    ],
    "Layers of linen": [
        "fdc.linen.RNN(nn.LSTMCell(8))",
        "nn.RNN(nn.LSTMCell(8), spec).apply(variables, inputs)  # Flax's own RNN",
        "fdc.linen.RNN(nn.LSTMCell(8), 0.8)",
        "fdc.linen.RNN(nn.LSTMCell(8), fdc.recipes.gal2016)",
        "fdc.linen.RNN(nn.LSTMCell(8), dropout=0.2, recurrent_dropout=0.2)",
        "fdc.linen.RNN(nn.LSTMCell, spec)",
        "fdc.linen.RNN(fdc.lstm_cell, spec)",
        "fdc.linen.RNN(nn.LSTMCell(8), gal).init(key, inputs)  # noise at a site inside",
        "rnn(xs=inputs[:, :1], rngs=None, rng=key, initial_carry=(h, h))  # a loop over steps",
        "fdc.linen.RNN(nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0)), spec)",
        "fdc.linen.RNN(nn.LSTMCell(8), spec)(inputs)",
        "fdc.RNN(nn.LSTMCell(8), spec)",
        "rnn(rngs=None)",
        'rnn(rngs={"params": key})',
        "rnn(train=True)",
        "nn.jit(fdc.linen.Embed)(9, 8, jnp.float32(0.8)).init(key, ids)  # array keep_prob",
    ],
    "Wrappers in Flax's own RNN": [
        "fdc.linen.RNN(fdc.linen.DropoutCell(nn.LSTMCell(8), spec), spec)",
        "wrapped(spec, initial_carry=(h, h))",
        "wrapped(spec, initial_carry=wrapped(frozen, return_carry=True)[0])  # of another",
    ],
    "NNX": [
        "fdc.nnx.RNN(nn.LSTMCell(8), spec)",
        "fdc.nnx.RNN(nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0)), spec)(inputs)  # no rngs=",
        "fdc.nnx.RNN(nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0)), spec, rngs=0)",
        "nnx_rnn(inputs, rngs=0)",
        "jax.jit(nnx_rnn)(inputs)  # with jax.jit, not nnx.jit",
    ],
}


@functools.cache
def setting() -> dict[str, Any]:
    """The names that the mistakes use."""
    key = jax.random.key(0)
    noise = fdc.Dropout(keep_prob=0.8)
    spec = fdc.RecurrentDropout(input=noise)
    frozen = fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=0.8, variational=True))
    gal = fdc.recipes.gal2016(input_keep_prob=0.8, recurrent_keep_prob=0.8)
    ids = jnp.zeros((4, 5), int)
    params = {"in": jnp.ones((3, 8)), "rec": jnp.eye(8)}
    gru_params = fdc.init_gru(key, 3, 8)
    lstm_params = fdc.init_lstm(key, 3, 8)
    h, xs, inputs = jnp.zeros((4, 8)), jnp.ones((5, 4, 3)), jnp.ones((4, 5, 3))
    nnx_rnn = fdc.nnx.RNN(nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0)), spec, rngs=nnx.Rngs(dropout=1))
    variables = fdc.linen.RNN(nn.LSTMCell(8), spec).init(key, inputs)

    def cell(params: Any, h: Any, x: Any) -> Any:
        h = jnp.tanh(x @ params["in"] + h @ params["rec"])
        return h, h

    def scan(params=params, carry=h, *, xs=xs, rng: Any = key, cell=cell, dropout=spec, **options):
        return fdc.dropout_scan(params, carry, xs, rng, cell=cell, dropout=dropout, **options)

    def scan_lstm(*, cell=fdc.lstm_cell, dropout=spec):
        return scan(lstm_params, (h, h), cell=cell, dropout=dropout)

    def scan_gru(*, dropout):
        return scan(gru_params, cell=fdc.gru_cell, dropout=dropout)

    def masks_of(h: Any, x: Any) -> fdc.Masks:
        return fdc.draw_masks(params, h, x, key, cell=cell, dropout=frozen)

    def rnn(*, xs=inputs, rngs: Any = {"dropout": key}, **options):  # noqa: B006
        layer = fdc.linen.RNN(nn.LSTMCell(8), spec)
        return layer.apply(variables, xs, rngs=rngs, **options)

    def wrapped(spec: Any, **options: Any) -> Any:
        host = nn.RNN(fdc.linen.DropoutCell(nn.LSTMCell(8), spec))
        return host.apply(variables, inputs, rngs={"dropout": key}, **options)

    return locals() | {"fdc": fdc, "jax": jax, "jnp": jnp, "nn": nn, "nnx": nnx}


def make(code: str) -> str:
    """Makes a mistake; returns the error message or the numbers that its author sees."""
    try:
        eval(code, dict(setting()))
    except Exception as error:
        # JAX adds a note of its own about its frames.
        notes = [note for note in getattr(error, "__notes__", ()) if "The cell was" in note]
        # Where there is a note of ours, the words above it are JAX's or Python's, and may change.
        return "\n".join([f"{type(error).__name__}: {'...' if notes else error}", *notes])
    raise AssertionError(f"no error: {code}")


def page_part() -> str:
    """The part of the page that shows each mistake and its error."""
    lines = []
    for title, codes in MISTAKES.items():
        lines.append(f"## {title}\n")
        for code in codes:
            shown = "\n".join(textwrap.fill(line, 88) for line in make(code).splitlines())
            lines.append(f"```python\n{code}\n```\n```text\n{shown}\n```\n")
    return "\n".join(lines)


def split_page() -> tuple[str, str, str]:
    """The page before, with and after that part."""
    before, rest = PAGE.read_text().split(BEGIN)
    part, after = rest.split(END)
    return before + BEGIN, part, END + after


if __name__ == "__main__":
    before, _, after = split_page()
    PAGE.write_text(before + page_part() + after)
    print(f"wrote {PAGE}", file=sys.stderr)

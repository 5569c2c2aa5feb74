"""What the hoisted scan compiles to, and what runs in `jax.lax.scan` as it is."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from compiled import called_by, random_operations, scans

import flax_dropout_cell as fdc
from flax_dropout_cell._hoisted_scan import scan

T, B, D, H = 6, 4, 12, 20  # [H, 4H] and [D, 4H] are shapes of weights alone
LSTM = fdc.init_lstm(jax.random.key(0), D, H)
CARRY = fdc.LSTMState(jnp.zeros((B, H)), jnp.zeros((B, H)))
XS = jnp.ones((T, B, D))
SPECS = {
    "variational": fdc.Dropout(keep_prob=0.7, variational=True),
    "step": fdc.Dropout(keep_prob=0.7),
    "half": fdc.Dropout(keep_prob=0.5),
    "gaussian": fdc.GaussianNoise(stddev=0.1),
}


def plain_lstm(params: Any, xs: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda carry, x: fdc.lstm_cell(params, carry, x), CARRY, xs)[1]


def dropped_lstm(
    params: Any, xs: jax.Array, noise: Any = SPECS["variational"], **options: Any
) -> jax.Array:
    spec = fdc.RecurrentDropout(input=noise, state=(None, noise), output=noise)
    options |= {"cell": fdc.lstm_cell, "dropout": spec}
    return fdc.dropout_scan(params, CARRY, xs, jax.random.key(1), **options)[1]


def text_of(function: Any, *args: Any) -> str:
    text = jax.jit(function).lower(*args).compile().as_text()
    assert text is not None
    return text


def gradient_text(run: Any, *args: Any) -> str:
    return text_of(jax.grad(lambda *args: (run(*args) ** 2).sum()), *args)


def backward_loop(text: str) -> str:
    (loop,) = [line for line in scans(text, T) if "/transpose(" in line]
    return loop


def test_the_backward_loop_accumulates_no_weights() -> None:
    """The cell joins its kernels: `dropout_scan` does so before the loop, which reads them."""

    def kernels(run: Any) -> list[int]:
        carried = backward_loop(gradient_text(run, LSTM, XS)).split(" while(")[0]
        return [carried.count(f"f32[{rows},{4 * H}]") for rows in (D, H, D + H)]

    assert kernels(plain_lstm)[:2] == [1, 1]  # their sums
    assert kernels(dropped_lstm) == [0, 0, 1]


def test_the_product_over_all_steps_reads_what_the_loop_wrote() -> None:
    """Nothing is transposed for it first."""
    text = gradient_text(dropped_lstm, LSTM, XS)
    ((left, right),) = re.findall(rf"= f32\[{D + H},{4 * H}\]\S* dot\((\S+), (\S+)\)", text)
    assert "copy" not in left + right and "transpose" not in left + right


@pytest.mark.parametrize(("units", "sums"), [(20, 1), (40, 0)])
def test_a_batched_product_waits_for_the_end_of_the_loop_where_that_is_cheaper(
    units: int, sums: int
) -> None:
    """Kernels that are read by each gate apart: `units / 6` times what their products read."""
    params, row = fdc.init_lstm(jax.random.key(0), units, units), jnp.zeros((B, units))
    spec = fdc.recipes.gal2016(input_keep_prob=0.7, recurrent_keep_prob=0.7, tied=False)

    def run(params: Any, xs: jax.Array) -> jax.Array:
        options: Any = {"cell": fdc.lstm_cell, "dropout": spec}
        carry = fdc.LSTMState(row, row)
        return fdc.dropout_scan(params, carry, xs, jax.random.key(1), **options)[1]

    text = gradient_text(run, params, jnp.ones((T, B, units)))
    carried = backward_loop(text).split(" while(")[0]
    # In the loop the kernels stand as they are read, too, once for each gate.
    kernels = re.findall(rf"f32\[4,{2 * units},{units}\]", carried)
    assert len(kernels) == 1 + sums


@pytest.mark.parametrize("resets", [None, jnp.ones((T, B), bool)], ids=["whole", "resets"])
@pytest.mark.parametrize("noise", SPECS.values(), ids=SPECS)
def test_the_backward_loop_draws_nothing(noise, resets) -> None:
    """Not for per-step masks, nor for those of new sequences."""
    text = gradient_text(
        lambda params, xs: dropped_lstm(params, xs, noise, resets=resets), LSTM, XS
    )
    in_loops = random_operations(text, called_by(text, scans(text, T)))
    assert (in_loops > 0) == (not noise.variational or resets is not None)
    assert random_operations(text, called_by(text, [backward_loop(text)])) == 0


def test_a_gradient_under_vmap_holds_no_weights_per_row() -> None:
    def run(params: Any, xs: jax.Array) -> jax.Array:
        return jax.vmap(lambda xs: dropped_lstm(params, xs))(xs)

    text = gradient_text(run, LSTM, jnp.ones((7, T, B, D)))
    assert f"f32[{H},{4 * H}]" in text
    assert not re.findall(rf"f32\[[\d,]*\b7,[\d,]*\b(?:{D}|{H}),{4 * H}\]", text)


def test_the_forward_pass_is_a_plain_scans() -> None:
    """Instruction for instruction."""

    def hoisted(params: Any, xs: jax.Array) -> jax.Array:
        return scan(lambda carry, x: fdc.lstm_cell(params, carry, x), CARRY, xs)[1]

    def instructions(run: Any) -> list[str]:
        return sorted(re.findall(r" = (\S+ [\w-]+)\(", text_of(run, LSTM, XS)))

    assert instructions(hoisted) == instructions(plain_lstm)

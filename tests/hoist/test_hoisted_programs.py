"""The programs that the hoisted scan compiles to, and the steps that it leaves alone.

Numbers cannot tell a fast program from a slow one, so these tests pin which products, copies and
draws a loop has. Each says which cost would come back if it failed.
"""

import functools
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from compiled import called_by, random_operations, scans

import flax_dropout_cell as fdc
from flax_dropout_cell._hoist.hoisted_scan import scan_in_parts as scan

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
    """It reads the recurrent kernel alone, for the gradient of h.

    This is the time that training gains: a sum of a weight's gradient in the loop reads and writes
    all of it at every step.
    """

    def kernels(run: Any) -> list[int]:
        carried = backward_loop(gradient_text(run, LSTM, XS)).split(" while(")[0]
        return [carried.count(f"f32[{rows},{4 * H}]") for rows in (D, H)]

    assert kernels(plain_lstm) == [1, 2]  # a sum for each
    assert kernels(dropped_lstm) == [0, 1]


def test_products_that_are_cut_before_they_are_added_keep_one_cotangent() -> None:
    """Flax's cell cuts both products into gates and adds those; ours adds first, then cuts.

    A gradient's memory depends on it: two cotangents of all gates at all steps would wait for the
    products after the loop, although they are equal.
    """

    def memory(cell: nn.RNNCellBase) -> int:
        variables = cell.init(jax.random.key(0), (CARRY.c, CARRY.h), XS[0])

        def loss(variables: Any, xs: jax.Array) -> jax.Array:
            step = functools.partial(cell.apply, variables)
            return (scan(step, (CARRY.c, CARRY.h), xs)[1] ** 2).sum()

        compiled = jax.jit(jax.grad(loss)).lower(variables, XS).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    a_cotangent = T * B * 4 * H * 4
    ours, flax = memory(fdc.linen.LSTMCell(H)), memory(nn.OptimizedLSTMCell(H))
    assert abs(flax - ours) < a_cotangent / 4


def test_the_products_over_all_steps_read_what_the_loop_wrote() -> None:
    """Nothing is transposed for them first.

    A copy of the activations of all steps would cost time and memory.
    """
    text = gradient_text(dropped_lstm, LSTM, XS)
    for rows in (D, H):
        ((left, right),) = re.findall(rf"= f32\[{rows},{4 * H}\]\S* dot\((\S+), (\S+)\)", text)
        assert "copy" not in left + right and "transpose" not in left + right


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_masks_for_each_gate_are_not_kept_at_each_step(cell: str) -> None:
    """Each gate's masked copy is made again after the loop, from the one value that is masked.

    Kept, the copies would be four times as large as the one that masks for all gates keep.
    """
    init, step = getattr(fdc, f"init_{cell}"), getattr(fdc, f"{cell}_cell")
    carry = CARRY if cell == "lstm" else CARRY.h

    def sizes(tied: bool) -> int:
        options = {"input_keep_prob": 0.7, "recurrent_keep_prob": 0.7}
        spec = fdc.recipes.gal2016(**options, tied=tied)

        def run(params: Any, xs: jax.Array) -> jax.Array:
            key = jax.random.key(1)
            return fdc.dropout_scan(params, carry, xs, key, cell=step, dropout=spec)[1]

        first, _ = scans(gradient_text(run, init(jax.random.key(0), D, H), XS), T)
        shapes = re.findall(rf"f32\[{T},([\d,]+)\]", first.split(" while(")[0])
        return sum(math.prod(map(int, shape.split(","))) for shape in shapes)

    assert sizes(tied=False) == sizes(tied=True)


@pytest.mark.parametrize(("units", "sums"), [(20, 1), (40, 0)])
def test_a_batched_product_waits_for_the_end_of_the_loop_where_that_is_cheaper(
    units: int, sums: int
) -> None:
    """A kernel for each of four gates: `units / 8` times what their products read and give.

    Gradients of small kernels add up in the loop, because XLA transposes the operands of a batched
    product over all steps, and that costs more than the sums.
    """
    kernels = jax.random.normal(jax.random.key(0), (4, units, units))

    def run(kernels: jax.Array, xs: jax.Array) -> jax.Array:
        def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = jnp.tanh(jnp.einsum("gbh,ghk->gbk", h + x, kernels))
            return h, h

        return scan(step, jnp.zeros((4, B, units)), xs)[1]

    text = gradient_text(run, kernels, jnp.ones((T, 4, B, units)))
    carried = backward_loop(text).split(" while(")[0]
    assert carried.count(f"f32[4,{units},{units}]") == 1 + sums


@pytest.mark.parametrize("resets", [None, jnp.ones((T, B), bool)], ids=["whole", "resets"])
@pytest.mark.parametrize("noise", SPECS.values(), ids=SPECS)
def test_the_backward_loop_draws_nothing(noise, resets) -> None:
    """Not for per-step masks, nor for those of new sequences.

    To draw a mask again would double the time that goes into random bits.
    """
    text = gradient_text(
        lambda params, xs: dropped_lstm(params, xs, noise, resets=resets), LSTM, XS
    )
    in_loops = random_operations(text, called_by(text, scans(text, T)))
    ahead = noise == SPECS["step"]  # drawn for all steps before the loop
    draws_in_loop = resets is not None if noise.variational else not ahead
    assert (in_loops > 0) == draws_in_loop
    assert random_operations(text, called_by(text, [backward_loop(text)])) == 0


def test_a_gradient_under_vmap_holds_no_weights_per_row() -> None:
    """Weights that are not mapped have one gradient, the sum over the mapped axis.

    A gradient for each row would take the weights' memory as many times as there are rows.
    """

    def run(params: Any, xs: jax.Array) -> jax.Array:
        return jax.vmap(lambda xs: dropped_lstm(params, xs))(xs)

    text = gradient_text(run, LSTM, jnp.ones((7, T, B, D)))
    assert f"f32[{H},{4 * H}]" in text
    assert not re.findall(rf"f32\[[\d,]*\b7,[\d,]*\b(?:{D}|{H}),{4 * H}\]", text)


def test_the_forward_pass_is_a_plain_scans() -> None:
    """Instruction for instruction.

    If only outputs are asked for, the hoisted gradient costs nothing.
    """

    def hoisted(params: Any, xs: jax.Array) -> jax.Array:
        return scan(lambda carry, x: fdc.lstm_cell(params, carry, x), CARRY, xs)[1]

    def instructions(run: Any) -> list[str]:
        return sorted(re.findall(r" = (\S+ [\w-]+)\(", text_of(run, LSTM, XS)))

    assert instructions(hoisted) == instructions(plain_lstm)


@pytest.mark.parametrize(("rows", "ahead"), [(1, True), (48, False)])
def test_a_product_of_few_rows_runs_before_the_loop(rows: int, ahead: bool) -> None:
    """With the input, for all steps at once; the loop has the recurrent product alone.

    With few rows a step takes as long as its kernels take to read, and before the loop the input's
    kernel is read once instead of at every step. Many rows gain nothing by it and take memory.
    """
    steps, units = 5, 128
    params, row = fdc.init_lstm(jax.random.key(0), units, units), jnp.zeros((rows, units))

    def run(params: Any, xs: jax.Array) -> jax.Array:
        carry = fdc.LSTMState(row, row)
        return scan(lambda carry, x: fdc.lstm_cell(params, carry, x), carry, xs)[1]

    program = jax.make_jaxpr(run)(params, jnp.ones((steps, rows, units)))
    products = re.findall(r":f32\[([\d,]+)\] = dot_general", str(program))
    wanted = [f"{steps},{rows},{4 * units}"] if ahead else [f"{rows},{4 * units}"]
    assert sorted(products) == sorted([*wanted, f"{rows},{4 * units}"])

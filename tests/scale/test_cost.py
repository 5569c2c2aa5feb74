"""The cost of dropout, counted: random words, bytes kept for the gradient, kernels in the loop."""

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import hosts
import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from compiled import computations, random_work, scans
from flax import nnx
from jaxprs import equations
from specs import noise_everywhere

import flax_dropout_cell as fdc
from flax_dropout_cell._sequence import step_masks

STEPS, BATCH, UNITS = 6, 4, 64
SITES = 3  # an LSTM's input, h and output
ROWS = SITES * BATCH

Program = tuple[Callable[..., Any], Any]
"""`run(params, xs, rng)`, which gives the outputs, and the params, or their shapes."""


def core_program(noise: fdc.Dropout | None, **options: Any) -> Program:
    cell = nn.LSTMCell(UNITS)
    row = jnp.zeros((BATCH, UNITS))
    params = jax.eval_shape(cell.init, jax.random.key(0), (row, row), row)

    def run(params: Any, xs: jax.Array, rng: jax.Array) -> Any:
        return fdc.dropout_scan(
            params,
            (row, row),
            xs,
            rng,
            cell=cell.apply,
            dropout=noise_everywhere(noise, params=None),
            **options,
        )[1]

    return run, params


def linen_program(noise: fdc.Dropout | None) -> Program:
    cell = fdc.linen.DropoutCell(nn.LSTMCell(UNITS), noise_everywhere(noise, params=None))
    rnn = nn.RNN(cell, time_major=True)
    params = jax.eval_shape(rnn.init, jax.random.key(0), jnp.zeros((1, BATCH, UNITS)))
    return lambda params, xs, rng: rnn.apply(params, xs, rngs={"dropout": rng}), params


def nnx_program(noise: fdc.Dropout | None) -> Program:
    cell = nnx.LSTMCell(UNITS, UNITS, rngs=nnx.Rngs(0))
    cell = fdc.nnx.DropoutCell(cell, noise_everywhere(noise, params=None), rngs=nnx.Rngs(dropout=1))
    graph, params, rest = nnx.split(nnx.RNN(cell, time_major=True), nnx.Param, ...)

    def run(params: Any, xs: jax.Array, rng: jax.Array) -> Any:
        rnn = nnx.merge(graph, params, jax.tree.map(jnp.asarray, rest))
        nnx.reseed(rnn, dropout=rng)
        return rnn(xs)

    return run, params


PROGRAMS = {"dropout_scan": core_program, "nn.RNN": linen_program, "nnx.RNN": nnx_program}
programs = pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)


def inputs() -> tuple[jax.Array, jax.Array]:
    return jnp.ones((STEPS, BATCH, UNITS)), jax.random.key(0)


def words_drawn(jaxpr: Any) -> Iterator[tuple[int, bool]]:
    """The 32-bit words of each draw in a program, and whether it stands in the body of a scan."""
    for equation, around in equations(jaxpr):
        if equation.primitive.name == "random_bits":
            # JAX computes a word per element, however few of its bits are asked for.
            yield math.prod(equation.outvars[0].aval.shape), "scan" in around


@programs
@pytest.mark.parametrize(
    ("keep_prob", "bits"), [(0.5, 1), (0.75, 2), (5 / 16, 4), (0.7, 8), (255 / 256, 8)]
)
@pytest.mark.parametrize("variational", [True, False], ids=["variational", "step"])
def test_words_drawn(program, keep_prob, bits, variational) -> None:
    """As many bits per unit as said, once per sequence or once per step, and none elsewhere.

    `dropout_scan` draws eight bits a unit for all steps at once, before its loop.
    """
    run, params = program(fdc.Dropout(keep_prob=keep_prob, variational=variational))
    found = list(words_drawn(jax.make_jaxpr(run)(params, *inputs())))
    inside = sum(words for words, in_scan in found if in_scan)
    outside = sum(words for words, in_scan in found if not in_scan)
    wanted = ROWS * UNITS * bits // 32
    if not variational and program is core_program and bits == 8:
        assert (inside, outside) == (0, STEPS * wanted)
    else:
        assert (inside, outside) == ((0, wanted) if variational else (wanted, 0))


@pytest.mark.parametrize("host", [host for host in hosts.HOSTS if "loop" not in host])
@pytest.mark.parametrize("variational", [True, False], ids=["variational", "step"])
def test_variational_masks_cost_a_hosts_loop_no_randomness(host, variational) -> None:
    spec = probes.noise_everywhere(fdc.Dropout(keep_prob=0.5, variational=variational))
    jaxpr = jax.make_jaxpr(lambda rng, xs: hosts.HOSTS[host](spec, rng, xs).seen)
    found = {in_scan for _, in_scan in words_drawn(jaxpr(jax.random.key(0), probes.ones()))}
    assert found == {not variational}


@functools.cache
def compiled(program: Callable[..., Program], noise: fdc.Dropout | None, direction: str) -> str:
    """The text of a compiled program."""
    return text_of(*program(noise), direction)


def text_of(run: Callable[..., Any], params: Any, direction: str) -> str:
    def loss(*args: Any) -> jax.Array:
        return (run(*args) ** 2).mean()

    function = run if direction == "forward" else jax.grad(loss)
    text = jax.jit(function).lower(params, *inputs()).compile().as_text()
    assert text is not None
    return text


@programs
@pytest.mark.parametrize("direction", ["forward", "gradient"])
@pytest.mark.parametrize("variational", [True, False], ids=["variational", "step"])
def test_the_compiled_loop_draws_only_per_step_masks(program, variational, direction) -> None:
    noise = fdc.Dropout(keep_prob=0.5, variational=variational)
    work = random_work(compiled(program, noise, direction), STEPS)
    assert work["anywhere"] > 0
    assert (work["inside"] == 0) == variational


def histories(text: str) -> dict[str, int]:
    """How many arrays `[time, batch, units]` of each dtype the compiled loop that runs first has.

    These are the inputs and outputs, and all that it keeps for the gradient.
    """
    types = scans(text, STEPS)[0].split(" while(")[0]
    found = [
        dtype
        for dtype, dims in re.findall(rf"(\w+)\[{STEPS},{BATCH},([\d,]+)\]", types)
        if math.prod(map(int, dims.split(","))) == UNITS  # masks come in words' bytes
    ]
    return {dtype: found.count(dtype) for dtype in sorted(set(found))}


@programs
@pytest.mark.parametrize("keep_prob", [0.5, 0.7])
def test_the_gradient_keeps_masks_as_booleans(program, keep_prob) -> None:
    """Beyond the bare cell's, and not even masks where these are variational.

    `dropout_scan` keeps the input's mask too, and makes the disturbed input again after the loop;
    Flax's scans keep the disturbed input, four times as large.
    """
    bare = histories(compiled(program, None, "gradient"))
    assert set(bare) == {"f32"}
    per_step, variational = (
        fdc.Dropout(keep_prob=keep_prob, variational=once) for once in (False, True)
    )
    inputs = 0 if program is core_program else 1
    kept = histories(compiled(program, variational, "gradient"))
    assert kept == {"f32": bare["f32"] + inputs}
    kept = histories(compiled(program, per_step, "gradient"))
    # A gradient by the inputs, for which Flax's scans need their masks, is not asked for.
    assert kept == {"f32": bare["f32"] + inputs, "pred": SITES - inputs}


def test_the_gradient_of_a_bare_lstm_keeps_nothing_without_need() -> None:
    """Of each step: x, y, the four gates, c, tanh(c') and h. The rest is computed a second time."""
    assert histories(compiled(core_program, None, "gradient")) == {"f32": 9}


@programs
def test_the_forward_pass_keeps_no_masks(program) -> None:
    bare = histories(compiled(program, None, "forward"))
    for variational in (True, False):
        noise = fdc.Dropout(keep_prob=0.5, variational=variational)
        assert histories(compiled(program, noise, "forward")) == bare


@pytest.mark.parametrize("direction", ["forward", "gradient"])
@pytest.mark.parametrize("sequence_ids", [None, jnp.arange(BATCH)], ids=["by place", "by id"])
def test_masks_of_all_steps_are_drawn_in_a_kernel_for_each_site(direction, sequence_ids) -> None:
    run, params = core_program(fdc.Dropout(keep_prob=0.7), sequence_ids=sequence_ids)
    text = text_of(run, params, direction)
    assert random_work(text, STEPS)["inside"] == 0
    words = UNITS // 4
    drawn = re.findall(rf"= u32\[{STEPS},{BATCH},{words}\]\S* (?:fusion|call)\(", text)
    assert len(drawn) == 2 * SITES  # in the branch that is always taken, and in the other


@pytest.mark.parametrize("direction", ["forward", "gradient"])
def test_masks_that_take_much_memory_are_drawn_in_the_loop(direction, monkeypatch) -> None:
    size = STEPS * ROWS * UNITS
    for bytes_allowed, is_inside in ((size, False), (size - 1, True)):
        monkeypatch.setattr(step_masks, "MAX_BYTES", bytes_allowed)
        text = text_of(*core_program(fdc.Dropout(keep_prob=0.7)), direction)
        assert (random_work(text, STEPS)["inside"] > 0) == is_inside


def test_masks_are_booleans() -> None:
    _, params = core_program(None)
    cell = nn.LSTMCell(UNITS).apply
    row = jnp.zeros((BATCH, UNITS))
    noise = fdc.Dropout(keep_prob=0.7, variational=True)
    masks = fdc.draw_masks(
        params,
        (row, row),
        row,
        jax.random.key(0),
        cell=cell,
        dropout=noise_everywhere(noise, params=None),
    )
    leaves = jax.tree.leaves(masks)
    assert [leaf.dtype for leaf in leaves] == [bool] * SITES
    assert sum(leaf.nbytes for leaf in leaves) == ROWS * UNITS


@programs
@pytest.mark.parametrize("keep_prob", [0.5, 0.7])
def test_a_word_is_computed_once(program, keep_prob) -> None:
    """No kernel that computes random words goes on to cut them: it would do so for each unit."""
    text = compiled(program, fdc.Dropout(keep_prob=keep_prob), "gradient")
    kernels = [lines for lines in computations(text).values() if re.search(r" xor\(", str(lines))]
    roots = [line for lines in kernels for line in lines if line.strip().startswith("ROOT")]
    assert roots
    assert not [root for root in roots if re.search(r"= (pred|f32|u8)\[\d", root)]


class MyDropout(fdc.Dropout):
    """It might draw in another way."""


NEITHER = np.zeros((6, 4), bool)
SEVEN = fdc.Dropout(keep_prob=0.7)
WHERE: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "dropout": (SEVEN, {}, False),
    "zoneout": (fdc.Zoneout(prob=0.3), {}, False),
    "resets": (SEVEN, {"resets": NEITHER}, False),
    "ids": (SEVEN, {"sequence_ids": np.arange(4)}, False),
    "a subclass": (MyDropout(keep_prob=0.7), {}, True),
    "a bit a unit": (fdc.Dropout(keep_prob=0.5), {}, True),
    "another noise": (fdc.GaussianNoise(stddev=0.1), {}, True),
    "checkpoints": (SEVEN, {"checkpoint_every": 2}, True),
    "resets and ids": (SEVEN, {"resets": NEITHER, "sequence_ids": NEITHER.astype(int)}, True),
}


@pytest.mark.parametrize(("noise", "options", "in_loop"), WHERE.values(), ids=WHERE)
def test_where_per_step_masks_are_drawn(noise: Any, options: Any, in_loop: bool) -> None:
    """As docs/randomness.md says, under "Before the loop, or inside"."""

    def run(xs: jax.Array) -> Any:
        return fdc.dropout_scan(
            None, jnp.zeros((4, 8)), xs, jax.random.key(0), cell=lambda _, h, x: (h + x, h),
            dropout=fdc.RecurrentDropout(state=noise), **options,
        )  # fmt: skip

    found = words_drawn(jax.make_jaxpr(run)(jnp.ones((6, 4, 8))))
    assert {in_scan for _, in_scan in found} == {in_loop}


@pytest.mark.parametrize("steps", [256, 257])
def test_16_mib_of_masks_are_drawn_before_the_loop_and_more_in_it(steps: int) -> None:
    """A unit's mask is a byte: 256 steps of 64 rows of 1024 are 16 MiB."""
    shape = (64, 1024)

    def run(xs: jax.Array) -> Any:
        return fdc.dropout_scan(
            None, jnp.zeros(shape), xs, jax.random.key(0), cell=lambda _, h, x: (h, x[:, 0]),
            dropout=fdc.RecurrentDropout(input=SEVEN),
        )  # fmt: skip

    traced = jax.make_jaxpr(run)(jax.ShapeDtypeStruct((steps, *shape), jnp.float32))
    assert {in_scan for _, in_scan in words_drawn(traced)} == {steps > 256}

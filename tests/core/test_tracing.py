"""The places in the program where masks are drawn, and that tracing changes nothing."""

import dataclasses
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxprs import equations
from quick_prng import quick_key
from specs import noise_everywhere

import flax_dropout_cell as fdc
from flax_dropout_cell.linen import DropoutCell

T, B, F, H = 6, 4, 3, 8
XS = jnp.ones((T, B, F))
RANDOM = ("random_bits", "random_fold_in", "random_split", "random_seed", "threefry2x32")


@pytest.fixture(autouse=True)
def _count_traces_afresh() -> None:
    chex.clear_trace_counter()


def dropout_everywhere(variational: bool, keep_prob: Any = 0.7) -> fdc.RecurrentDropout:
    return noise_everywhere(fdc.Dropout(keep_prob=keep_prob, variational=variational))


def random_primitives(function: Any, *args: Any) -> dict[bool, set[str]]:
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for equation, around in equations(jax.make_jaxpr(function)(*args)):
        if equation.primitive.name in RANDOM:
            found["scan" in around].add(equation.primitive.name)
    return found


def core_program(spec: fdc.RecurrentDropout) -> tuple[Any, ...]:
    cell = nn.LSTMCell(H)
    carry = cell.initialize_carry(jax.random.key(0), XS.shape[1:])
    params = cell.init(jax.random.key(0), carry, XS[0])

    def run(params, rng):
        return fdc.dropout_scan(params, carry, XS, rng, cell=cell.apply, dropout=spec)

    return run, params, jax.random.key(0)


def linen_program(spec: fdc.RecurrentDropout) -> tuple[Any, ...]:
    rnn = nn.RNN(DropoutCell(nn.LSTMCell(H), spec), time_major=True)
    params = rnn.init(jax.random.key(0), XS)
    return (
        (lambda params, rng: rnn.apply(params, XS, rngs={"dropout": rng})),
        params,
        jax.random.key(0),
    )


PROGRAMS = {"dropout_scan": core_program, "nn.RNN": linen_program}
programs = pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)


@programs
def test_variational_draws_stand_outside_the_loop(program) -> None:
    found = random_primitives(*program(dropout_everywhere(variational=True)))
    assert "random_bits" in found[False]
    assert not found[True]


@programs
def test_per_step_draws_stand_inside_the_loop(program) -> None:
    found = random_primitives(*program(dropout_everywhere(variational=False, keep_prob=0.5)))
    assert "random_bits" in found[True]
    assert "random_bits" not in found[False]


def test_per_step_draws_of_many_bits_stand_before_it() -> None:
    """Those of weights alone stand inside, because all steps' weights would not fit."""
    spec = dropout_everywhere(variational=False)
    found = random_primitives(*core_program(dataclasses.replace(spec, params=None)))
    assert "random_bits" in found[False]
    assert not found[True]
    found = random_primitives(*core_program(fdc.RecurrentDropout(params=spec.params)))
    assert "random_bits" in found[True]
    assert "random_bits" not in found[False]


@programs
@pytest.mark.parametrize("variational", [True, False], ids=["variational", "step"])
def test_the_gradient_draws_where_the_value_does(program, variational) -> None:
    run, params, rng = program(dropout_everywhere(variational))

    def loss(params, rng):
        return sum(leaf.sum() for leaf in jax.tree.leaves(run(params, rng)))

    found = random_primitives(jax.grad(loss), params, rng)
    assert ("random_bits" in found[True]) == (not variational)


def test_evaluation_draws_nothing() -> None:
    run, params, _ = core_program(dropout_everywhere(False))
    found = random_primitives(lambda params: run(params, None), params)
    assert not found[True] and not found[False]


def rough_program(spec: fdc.RecurrentDropout, rng: jax.Array) -> Any:
    """Exact arithmetic, so that compiling cannot change a bit of it."""
    xs = jnp.arange(T * B * F, dtype=jnp.float32).reshape(T, B, F)
    carry = (jnp.ones((B, F)), jnp.ones((B, F)))

    def cell(params, carry, x):
        c, h = carry
        return (c + x, jnp.mod(h + params, 32.0)), h + c

    params = jnp.arange(1.0, F + 1)[None]
    return fdc.dropout_scan(params, carry, xs, rng, cell=cell, dropout=spec)


@pytest.mark.parametrize("variational", [True, False], ids=["variational", "step"])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_compiled_and_not_compiled_agree(variational, impl) -> None:
    spec, rng = dropout_everywhere(variational, keep_prob=0.5), jax.random.key(0, impl=impl)
    compiled = jax.jit(lambda rng: rough_program(spec, rng))(rng)
    with jax.disable_jit():
        plain = rough_program(spec, rng)
    jax.tree.map(np.testing.assert_array_equal, compiled, plain)


@pytest.mark.parametrize("keep_prob", [0.5, 0.7])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_typed_and_raw_keys_agree(impl, keep_prob) -> None:
    typed = jax.random.key(5, impl=impl)
    with jax.default_prng_impl(impl):
        raw = jax.random.key_data(typed)
        for variational in (True, False):
            spec = dropout_everywhere(variational, keep_prob)
            jax.tree.map(
                np.testing.assert_array_equal, rough_program(spec, typed), rough_program(spec, raw)
            )


def test_both_threefries_work() -> None:
    """The stream differs, the promises do not."""
    draws = []
    for partitionable in (True, False):
        with jax.threefry_partitionable(partitionable):
            carry, ys = rough_program(dropout_everywhere(False, 0.5), jax.random.key(0))
            draws.append(ys)
            assert 0 < (ys == 0).mean() < 1
            del carry
    assert (draws[0] != draws[1]).any()


@pytest.mark.parametrize("variational", [True, False], ids=["variational", "step"])
def test_no_retrace_over_training_steps(variational) -> None:
    """New keys, new keep_probs (a schedule) and new start indices reuse one program."""
    cell = nn.OptimizedLSTMCell(H)
    carry = cell.initialize_carry(jax.random.key(0), XS.shape[1:])
    params = cell.init(jax.random.key(0), carry, XS[0])
    optimizer = optax.sgd(0.1)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def train_step(params, state, rng, keep_prob, start):
        spec = dropout_everywhere(variational, keep_prob)

        def loss(params):
            _, ys = fdc.dropout_scan(
                params, carry, XS, rng, cell=cell.apply, dropout=spec, start=start
            )
            return (ys**2).sum()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for step in range(3):
        rng = jax.random.fold_in(quick_key(0), step)
        params, state = train_step(params, state, rng, 0.9 - 0.1 * step, step * T)


def test_no_retrace_in_nn_rnn() -> None:
    run, params, _ = linen_program(dropout_everywhere(variational=False))
    apply = jax.jit(chex.assert_max_traces(run, n=1))
    ys = [apply(params, quick_key(seed)) for seed in range(3)]
    assert (ys[0] != ys[1]).any() and (ys[1] != ys[2]).any()


def test_a_schedule_of_keep_probs_in_nn_rnn() -> None:
    """A traced keep_prob in a linen module is no constant of the program."""
    variables = nn.RNN(nn.LSTMCell(H)).init(jax.random.key(0), XS)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def apply(keep_prob):
        noise = fdc.Dropout(keep_prob=keep_prob, variational=True)
        rnn = nn.RNN(DropoutCell(nn.LSTMCell(H), fdc.RecurrentDropout(output=noise)))
        return rnn.apply(variables, XS, rngs={"dropout": quick_key(0)})

    assert 0 < (apply(0.3) == 0).mean() - (apply(0.9) == 0).mean()
    assert (apply(1.0) != 0).all()


def test_no_tracer_leaks() -> None:
    with jax.checking_leaks():
        for variational in (True, False):
            for program in PROGRAMS.values():
                run, params, rng = program(dropout_everywhere(variational))
                take = jax.grad(lambda p, r, run=run: jax.tree.leaves(run(p, r))[0].sum())
                jax.jit(take).trace(params, rng)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_stay(dtype) -> None:
    """Under strict promotion, dtypes come back as the cell gives them."""
    cell = nn.LSTMCell(H, dtype=dtype)
    carry = cell.initialize_carry(jax.random.key(0), XS.shape[1:])
    params = nn.LSTMCell(H).init(jax.random.key(0), carry, XS[0])
    params, carry, xs = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, carry, XS))
    for variational in (True, False):
        out = fdc.dropout_scan(
            params,
            carry,
            xs,
            quick_key(0),
            cell=cell.apply,
            dropout=dropout_everywhere(variational),
        )
        assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype(dtype)}
        assert not any(jnp.isnan(leaf).any() for leaf in jax.tree.leaves(out))


def test_vmap_over_keys_is_a_loop_over_keys() -> None:
    spec = dropout_everywhere(False, 0.5)
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.vmap(lambda key: rough_program(spec, key))(keys)
    for index, key in enumerate(keys):
        jax.tree.map(
            lambda a, b, index=index: np.testing.assert_array_equal(a[index], b),
            together,
            rough_program(spec, key),
        )


def test_checkpointing_redraws_the_same_masks() -> None:
    spec = dropout_everywhere(False, 0.5)

    def cell(params, carry, x):
        c, h = carry
        return (jnp.tanh(c + x), jnp.tanh(h * params)), h * c

    def loss(params, cell):
        carry = (jnp.ones((B, F)), jnp.ones((B, F)))
        _, ys = fdc.dropout_scan(params, carry, XS, quick_key(0), cell=cell, dropout=spec)
        return ys.sum()

    params = jnp.full((1, F), 0.5)
    plain, again = (jax.grad(loss)(params, f) for f in (cell, jax.checkpoint(cell)))
    np.testing.assert_allclose(plain, again, rtol=1e-6)
    whole = jax.grad(jax.checkpoint(lambda p: loss(p, cell)))(params)
    np.testing.assert_allclose(plain, whole, rtol=1e-6)

"""Monte Carlo samples: one program that is right for every key, and entropies of the samples."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from key_kinds import KINDS, keys_of

import flax_dropout_cell as fdc


def predict(rng: jax.Array) -> jax.Array:
    return fdc.Dropout(keep_prob=0.7).draw_mask(rng, (3, 40), jnp.float32)


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_is_the_prediction_with_its_own_key(kind: str, chunk_size: int | None) -> None:
    with keys_of(kind) as keys:
        for rng in keys:
            samples = fdc.mc_samples(predict, rng, 7, chunk_size=chunk_size)
            alone = jnp.stack([predict(jax.random.fold_in(rng, i)) for i in range(7)])
            np.testing.assert_array_equal(samples, alone)
            assert len({np.asarray(sample).tobytes() for sample in samples}) == 7


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_a_sample_is_a_draw_of_all_masks_of_a_recurrent_net(impl: str) -> None:
    noise = fdc.Dropout(keep_prob=0.5, variational=True)
    spec = fdc.RecurrentDropout(input=noise, output=noise)

    def cell(weights: jax.Array, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(x + h @ weights)
        return h, h

    def predict(rng: jax.Array) -> dict[str, jax.Array]:
        zeros, xs = jnp.zeros((2, 8)), jnp.ones((3, 2, 8))
        h, ys = fdc.dropout_scan(jnp.eye(8) / 2, zeros, xs, rng, cell=cell, dropout=spec)
        return {"h": h, "ys": ys}

    rng = jax.random.key(3, impl=impl)
    samples = fdc.mc_samples(predict, rng, 5, chunk_size=2)
    assert samples["ys"].shape == (5, 3, 2, 8)
    wanted = jax.jit(predict)(jax.random.fold_in(rng, 4))
    for name in ("h", "ys"):
        np.testing.assert_allclose(samples[name][4], wanted[name], rtol=1e-6)
    assert len({np.asarray(h).tobytes() for h in samples["h"]}) == 5


def test_neither_the_number_of_samples_nor_the_chunks_change_a_sample() -> None:
    rng = jax.random.key(3)
    many = fdc.mc_samples(predict, rng, 11)
    for num_samples, chunk_size in ((5, None), (11, 4), (8, 5)):
        few = fdc.mc_samples(predict, rng, num_samples, chunk_size=chunk_size)
        np.testing.assert_array_equal(few, many[:num_samples])


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_it_traces_once_and_in_a_jit_only_once_for_all_calls(chunk_size: int | None) -> None:
    traces = []

    def counted(rng: jax.Array) -> jax.Array:
        traces.append(1)
        return jax.random.normal(rng, (3,))

    run = jax.jit(lambda rng: fdc.mc_samples(counted, rng, 10, chunk_size=chunk_size))
    assert not np.allclose(run(jax.random.key(0)), run(jax.random.key(1)))
    assert len(traces) == 1


def test_weights_are_those_of_the_call_and_not_of_an_earlier_one() -> None:
    """A program kept for a function would go on with the weights that this had closed over."""
    rngs = nnx.Rngs(0)
    linear = nnx.Linear(2, 3, rngs=rngs)

    def predict(rng: jax.Array) -> jax.Array:
        return linear(jax.random.normal(rng, (2,)))

    before = fdc.mc_samples(predict, jax.random.key(0), 4)
    linear.kernel[...] = 2 * linear.kernel[...]
    after = fdc.mc_samples(predict, jax.random.key(0), 4)
    np.testing.assert_allclose(after, 2 * before, rtol=1e-6)


def test_weights_are_arguments_of_the_program_and_no_constants() -> None:
    weights = jnp.ones((64, 64))

    def program(rng: jax.Array) -> jax.Array:
        return fdc.mc_samples(lambda rng: jax.random.normal(rng, (64,)) @ weights, rng, 4)

    equations = jax.make_jaxpr(program)(jax.random.key(0)).eqns
    (loop,) = [equation for equation in equations if equation.primitive.name == "scan"]
    assert "float32[64,64]" in [str(value.aval) for value in loop.invars]


def test_chunks_bound_the_memory() -> None:
    def wide(rng: jax.Array) -> jax.Array:
        return jnp.sort(jax.random.normal(rng, (10_000,)))[:2]

    def memory(chunk_size: int | None) -> int:
        run = jax.jit(lambda rng: fdc.mc_samples(wide, rng, 64, chunk_size=chunk_size))
        analysis: Any = run.lower(jax.random.key(0)).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    assert memory(None) > 64 * 40_000
    assert memory(16) < 0.35 * memory(None)
    assert memory(4) < 0.35 * memory(16)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_samples_without_elements(chunk_size: int | None) -> None:
    """Of a batch without rows. They are equal, of course, so there is no warning."""
    samples = fdc.mc_samples(
        lambda key: jax.random.normal(key, (0, 5)), jax.random.key(0), 3, chunk_size=chunk_size
    )
    assert samples.shape == (3, 0, 5)


def test_gradients_pass() -> None:
    def loss(weight: jax.Array) -> jax.Array:
        return fdc.mc_samples(
            lambda rng: weight * jax.random.normal(rng, ()), jax.random.key(0), 6, chunk_size=4
        ).sum()

    draws = fdc.mc_samples(lambda rng: jax.random.normal(rng, ()), jax.random.key(0), 6)
    np.testing.assert_allclose(jax.grad(loss)(jnp.float32(3)), draws.sum(), rtol=1e-5)


# Entropies ---------------------------------------------------------------------------------------


def test_entropies_are_those_of_the_equations() -> None:
    logits = jax.random.normal(jax.random.key(0), (9, 4, 5, 3)) * 2
    probabilities = np.asarray(jax.nn.softmax(logits), np.float64)
    mean = probabilities.mean(axis=0)
    predictive = -(mean * np.log(mean)).sum(axis=-1)
    expected = -(probabilities * np.log(probabilities)).sum(axis=-1).mean(axis=0)
    got = fdc.mc_entropies(jax.nn.softmax(logits))
    np.testing.assert_allclose(got.predictive, predictive, rtol=1e-5)
    np.testing.assert_allclose(got.expected, expected, rtol=1e-5)
    np.testing.assert_allclose(got.mutual_information, predictive - expected, atol=1e-6)
    assert (np.asarray(got.mutual_information) > 0).all()
    assert all(entropy.shape == (4, 5) for entropy in got)


def test_what_samples_agree_on_is_no_information() -> None:
    same = jnp.broadcast_to(jnp.array([0.1, 0.2, 0.7]), (13, 6, 3))
    got = fdc.mc_entropies(same)
    assert (np.asarray(got.mutual_information) >= 0).all()
    np.testing.assert_allclose(got.mutual_information, 0, atol=1e-6)
    certain = jnp.zeros((4, 3)).at[:, 0].set(1)
    for entropy in fdc.mc_entropies(certain):
        assert entropy == 0
    opposed = jnp.eye(4)  # each sample sure of a class of its own
    np.testing.assert_allclose(fdc.mc_entropies(opposed), (np.log(4), 0, np.log(4)), rtol=1e-6)


def test_gradients_where_a_class_has_probability_0() -> None:
    """`(log p - log mean) / samples`; a class of probability 0 has no slope of its own."""
    gradient = jax.grad(lambda p: fdc.mc_entropies(p).mutual_information)(
        jnp.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    )
    wanted = [[-np.log(0.75), -np.log(0.25) - 1, 0], [np.log(0.5 / 0.75), np.log(0.5 / 0.25), 0]]
    np.testing.assert_allclose(gradient, np.array(wanted) / 2, rtol=1e-6)


@pytest.mark.parametrize("rows", [[0.5, 0.55], [0.5, 0.45], [-0.05, 1.05]])
def test_values_that_only_rounding_does_not_explain_are_refused(rows: list[float]) -> None:
    with pytest.raises(ValueError, match="sum to 1 over the last axis"):
        fdc.mc_entropies(jnp.array([rows, [0.2, 0.8]]))


def test_probabilities_rounded_to_bfloat16_are_taken() -> None:
    logits = jax.random.normal(jax.random.key(0), (2, 50, 1000))
    fdc.mc_entropies(jax.nn.softmax(logits).astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype: Any) -> None:
    probabilities = jax.nn.softmax(jax.random.normal(jax.random.key(0), (9, 4, 3))).astype(dtype)
    wide = np.asarray(probabilities, np.float64)
    mean = wide.mean(0)
    got = fdc.mc_entropies(probabilities)
    assert got.predictive.dtype == got.expected.dtype == jnp.float32
    np.testing.assert_allclose(got.predictive, -(mean * np.log(mean)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(got.expected, -(wide * np.log(wide)).sum(-1).mean(0), rtol=1e-5)


ERRORS = {
    "logits": (
        lambda: fdc.mc_entropies(jnp.array([[2.0, -1.0], [0.3, 0.4]])),
        ValueError,
        r"sum to 1 over the last axis, got values from -1 to 2(.|\n)*softmax\(logits\)",
    ),
    "log-probabilities": (
        lambda: fdc.mc_entropies(jax.nn.log_softmax(jnp.ones((2, 3)))),
        ValueError,
        "sum to 1",
    ),
    "NaN": (lambda: fdc.mc_entropies(jnp.full((2, 3), jnp.nan)), ValueError, "sum to 1"),
    "classes before samples": (
        lambda: fdc.mc_entropies(jnp.full((3, 7), 1 / 3)),
        ValueError,
        "sums from 2.33 to 2.33",
    ),
    "one axis": (
        lambda: fdc.mc_entropies(jnp.ones(3) / 3),
        ValueError,
        r"must be \[num_samples, ..., classes\], got float32\[3\]",
    ),
    "integers": (
        lambda: fdc.mc_entropies(jnp.ones((2, 1), int)),
        TypeError,
        r"must be floating-point, got int32\[2, 1\]",
    ),
    "no samples": (
        lambda: fdc.mc_samples(predict, jax.random.key(0), 0),
        ValueError,
        "num_samples must be an int of at least 1, got 0",
    ),
    "empty chunks": (
        lambda: fdc.mc_samples(predict, jax.random.key(0), 2, chunk_size=0),
        ValueError,
        "chunk_size must be an int of at least 1, got 0",
    ),
    "a number that is none": (
        lambda: fdc.mc_samples(predict, jax.random.key(0), 2.0),  # type: ignore
        TypeError,
        "num_samples must be an int of at least 1, got 2.0",
    ),
    "no key": (
        lambda: fdc.mc_samples(predict, None, 2),  # type: ignore
        ValueError,
        "mc_samples needs a key such as jax.random.key",
    ),
    "many keys": (
        lambda: fdc.mc_samples(predict, jax.random.split(jax.random.key(0)), 2),
        TypeError,
        "rng must be one key",
    ),
    "no function": (
        lambda: fdc.mc_samples(jnp.ones(3), jax.random.key(0), 2),  # type: ignore
        TypeError,
        "predict must be a function of a key, got float32",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_came_and_what_to_write(name: str) -> None:
    run, error, message = ERRORS[name]
    with pytest.raises(error, match=message) as raised:
        run()
    assert len(str(raised.value).splitlines()) <= 5


def test_logits_are_not_seen_under_jit() -> None:
    """As the docstring says; a check of values would need the device."""
    jax.jit(fdc.mc_entropies)(jnp.array([[2.0, -1.0], [0.3, 0.4]]))


def test_no_information_is_negative() -> None:
    probabilities = jax.nn.softmax(jax.random.normal(jax.random.key(3), (1000, 7)))
    got = fdc.mc_entropies(jnp.broadcast_to(probabilities, (13, 1000, 7)))
    assert (np.asarray(got.predictive) < np.asarray(got.expected)).any()
    assert (np.asarray(got.mutual_information) >= 0).all()

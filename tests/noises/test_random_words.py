"""The bits behind the masks: JAX's own, and cut into units without losing exactness."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_dropout_cell._random.keep_masks import _later_digits, _mark_dropped
from flax_dropout_cell._random.keys import as_typed, fold_in
from flax_dropout_cell._random.words import draw_words

KEYS = {
    "typed": jax.random.key(7),
    "raw": jax.random.PRNGKey(7),
    "rbg": jax.random.key(7, impl="rbg"),
    "unsafe_rbg": jax.random.key(7, impl="unsafe_rbg"),
}
SHAPES = [(), (1,), (0,), (5,), (33,), (4, 0, 3), (64, 64), (3, 5, 7)]


@pytest.mark.parametrize("partitionable", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KEYS)
def test_words_are_those_of_jax(kind: str, shape: tuple[int, ...], partitionable: bool) -> None:
    with jax.threefry_partitionable(partitionable):
        wanted = jax.random.bits(KEYS[kind], shape, jnp.uint32)
        rng = as_typed(KEYS[kind])
        np.testing.assert_array_equal(draw_words(rng, shape), wanted)
        finished = jax.jit(lambda rng: draw_words(rng, shape, lambda words: words ^ 1))
        np.testing.assert_array_equal(finished(rng), wanted ^ 1)


def test_words_of_many_keys_are_those_of_jax() -> None:
    rngs = jax.random.split(KEYS["typed"], 50)
    got = jax.vmap(lambda rng: draw_words(rng, (3, 5)))(rngs)
    wanted = jax.vmap(lambda rng: jax.random.bits(rng, (3, 5), jnp.uint32))(rngs)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("data", [0, 1, 2**31 - 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("kind", KEYS)
def test_folded_keys_are_those_of_jax(kind: str, data: int) -> None:
    wanted, got = jax.random.fold_in(KEYS[kind], data), fold_in(KEYS[kind], np.uint32(data))
    assert got.dtype == wanted.dtype
    assert bool((got == wanted).all())
    steps = jnp.arange(20, dtype=jnp.int32)
    wanted, got = (
        jax.vmap(fold, (None, 0))(KEYS[kind], steps) for fold in (jax.random.fold_in, fold_in)
    )
    assert bool((got == wanted).all())


@pytest.mark.parametrize("drop", [0, 1, 255, 256, 65_536, 5_033_165, 2**24 - 1, 2**24])
def test_each_byte_is_dropped_exactly_that_often(drop: int) -> None:
    """Counted, not sampled: over all numbers that a byte can start.

    A number stays as it is when the word's three other bytes are changed by the same exclusive
    or, so words in which one of them is zero have them all.
    """
    found, agree = count_dropped(jnp.uint32(drop))
    assert int(found) == drop
    assert agree.all()


# Compiled for speed, unlike all else in these tests: it computes more than it compiles.
@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
def count_dropped(drop: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How often the first byte is dropped, and whether each later one is where it is."""
    words = jnp.arange(2**24, dtype=jnp.uint32)
    dropped, agree = _mark_dropped(words, drop) & 0xFF, []
    for place in (1, 2, 3):
        turned = (words << (8 * place)) | (words >> (32 - 8 * place))
        marks = _mark_dropped(turned, drop) >> (8 * place)
        agree.append((marks & 0xFF == dropped).all())
    return dropped.sum(), jnp.stack(agree)


def test_two_bytes_of_a_word_are_independent() -> None:
    """The first two digits of both are a one-to-one function of the word: linear, of full rank."""
    word_bits = jnp.uint32(1) << jnp.arange(32, dtype=jnp.uint32)
    second, _ = _later_digits(word_bits)
    for pair in itertools.combinations(range(4), 2):
        columns = np.zeros(32, np.uint64)
        for place, digit in itertools.product(pair, (word_bits, second)):
            byte = np.asarray(digit >> (8 * place) & 0xFF, np.uint64)
            columns = (columns << np.uint64(8)) | byte
        assert rank_of_bits([int(column) for column in columns]) == 32, pair


def rank_of_bits(rows: list[int]) -> int:
    """The rank over GF(2) of a matrix whose rows are the bits of integers."""
    rank = 0
    while rows:
        pivot = rows.pop()
        if pivot:
            rank += 1
            low = pivot & -pivot
            rows = [row ^ pivot if row & low else row for row in rows]
    return rank

"""Long sequences: less memory for the gradient, the same numbers, the same masks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asserts import assert_close_in_scale
from quick_prng import quick_key
from reset_case import RESETS, XS, T, noise_everywhere, scan

import flax_dropout_cell as fdc

NOISES = [fdc.Dropout(keep_prob=0.7, variational=True), fdc.Dropout(keep_prob=0.7)]
noises = pytest.mark.parametrize("noise", NOISES, ids=["variational", "step"])

IDS = RESETS.astype(int).cumsum(0) * 4 + jnp.arange(4)[None]


@functools.cache
def differentiated(noise: fdc.Dropout, reverse: bool, every: int | None) -> Any:
    """With resets and lengths, and chunks that do not fill the sequence."""
    # JAX's own PRNG takes long to compile, so it is there once.
    rng = jax.random.key(9) if reverse and not noise.variational else quick_key(9)

    def run(xs: Any) -> Any:
        carry, ys = scan(
            noise, xs, rng, resets=RESETS, sequence_ids=IDS, start=4, reverse=reverse,
            seq_lengths=jnp.array([6, T, 9, 3]), checkpoint_every=every,
        )  # fmt: skip
        return (ys["h"] ** 2).sum() + carry["h"].sum(), ys

    return jax.jit(jax.value_and_grad(run, has_aux=True))(XS)


@noises
@pytest.mark.parametrize(("every", "reverse"), [(1, False), (5, False), (5, True), (100, False)])
def test_no_number_changes(noise, every, reverse) -> None:
    plain, chunked = (differentiated(noise, reverse, each) for each in (None, every))
    for name in ("inside", "out", "state"):
        np.testing.assert_array_equal(chunked[0][1][name], plain[0][1][name])
    # Gradients up to 30 cancel to a few hundredths, so rounding is a share of the largest one.
    assert_close_in_scale(chunked, plain, 1e-6)


def test_memory_grows_with_the_chunks_and_what_is_in_one() -> None:
    xs = jnp.ones((256, 4, 3))

    def memory(**options):
        run = jax.jit(jax.grad(lambda xs: scan(NOISES[1], xs, **options)[0]["h"].sum()))
        analysis = run.lower(xs).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert memory(checkpoint_every=16) < memory() / 3


@pytest.mark.parametrize("every", [0, -1, True, 2.0, "2"])
def test_a_checkpoint_every_that_does_not_fit_is_refused(every) -> None:
    error = ValueError if type(every) is int else TypeError
    with pytest.raises(error, match="checkpoint_every must be an int of at least 1"):
        scan(noise_everywhere(NOISES[0]), checkpoint_every=every)

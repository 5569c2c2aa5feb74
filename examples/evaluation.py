"""How well a language model predicts a split: with its noises' expectations, and by Monte Carlo."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from corpus import Rows, cut_evenly, window_at

import flax_dropout_cell as fdc


def sum_nll(logits: jax.Array, window: Rows) -> jax.Array:
    """The negative log-likelihood of a window's words, padding left out."""
    return jnp.sum(window.weights * _nlls(logits, window))


def build_evaluate(model: Any, window: int) -> Callable[[Any, Rows], jax.Array]:
    """Builds a function for a split's mean negative log-likelihood; one carry runs through it."""
    model = model.clone(deterministic=True)

    @jax.jit
    def evaluate(params: Any, rows: Rows) -> jax.Array:
        def step(carry: Any, start: jax.Array) -> tuple[Any, jax.Array]:
            at = window_at(rows, start, window)
            logits, carry, _ = model.apply(params, at.inputs, carry)
            return carry, sum_nll(logits, at)

        starts = jnp.asarray(cut_evenly(rows, window).starts)
        _, nlls = jax.lax.scan(step, model.zero_carry(rows.inputs.shape[0]), starts)
        return nlls.sum() / rows.weights.sum()

    return evaluate


def build_mc_evaluate(
    model: Any, window: int, samples: int
) -> Callable[[Any, Rows, jax.Array], jax.Array]:
    """The same by Monte Carlo: Gal and Ghahramani 2016, arXiv:1512.05287, table 1.

    Each sample has masks of its own for the whole split, and the probabilities are averaged, not
    their logarithms. No words are dropped, as in the authors' code.
    """

    @jax.jit
    def evaluate(params: Any, rows: Rows, rng: jax.Array) -> jax.Array:
        def word_nlls(rng: jax.Array) -> jax.Array:
            def step(carry: Any, start: jax.Array) -> tuple[Any, jax.Array]:
                at = window_at(rows, start, window)
                # The sample's key again, and the step that the window starts at: one sequence.
                logits, carry, _ = model.apply(
                    params, at.inputs, carry, start=start, keep_words=True, rngs={"dropout": rng}
                )
                return carry, _nlls(logits, at)

            starts = jnp.asarray(cut_evenly(rows, window).starts)
            _, nlls = jax.lax.scan(step, model.zero_carry(rows.inputs.shape[0]), starts)
            return nlls.swapaxes(0, 1).reshape(nlls.shape[1], -1)

        sampled = fdc.mc_samples(word_nlls, rng, samples)
        nlls = jnp.log(samples) - jax.nn.logsumexp(-sampled, axis=0)
        weights = rows.weights[:, : nlls.shape[1]]
        return jnp.sum(weights * nlls) / weights.sum()

    return evaluate


def _nlls(logits: jax.Array, window: Rows) -> jax.Array:
    targets = jnp.asarray(window.targets)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

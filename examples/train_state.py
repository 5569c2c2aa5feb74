"""The state of a training run of the language model, at its start and after each epoch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from configs import Config
from corpus import SPLITS, Corpus, lay_out
from evaluation import build_evaluate
from optimizers import averaged, begin_averaging, build_optimizer, draw_params, has_stalled


class TrainState(NamedTuple):
    """All that a training run needs to resume from where it is.

    Attributes:
      step: how many windows it has learned from; picks the next window and its masks.
      params: the model's variables.
      opt_state: the optimizer's state.
      carry: the carry at the end of the last window.
      nll: the negative log-likelihood of this epoch's words so far.
      perplexities: `[epochs, splits]`, nan for an epoch that is not over.
      best: the variables of the epoch that is best by validation.
      seconds: how long it has run.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    carry: Any
    nll: jax.Array
    perplexities: jax.Array
    best: Any
    seconds: jax.Array


def start_training(config: Config, model: Any, rng: jax.Array) -> TrainState:
    words, carry = jnp.zeros((config.batch_size, 1), jnp.int32), model.zero_carry(config.batch_size)
    params = draw_params(config, jax.jit(model.init)(rng, words, carry), rng)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=build_optimizer(config).init(params),
        carry=carry,
        nll=jnp.float32(0),
        perplexities=jnp.full((config.epochs, len(SPLITS)), jnp.nan),
        best=jax.tree.map(jnp.copy, params),
        seconds=jnp.float32(0),
    )


def build_end_epoch(
    config: Config, model: Any, corpus: Corpus
) -> Callable[[TrainState, int, float], TrainState]:
    """Builds the function that ends an epoch.

    It evaluates, keeps the best weights, and starts averaging if validation has stalled.
    """
    evaluate = build_evaluate(model, config.window)
    held_out = [
        jax.device_put(lay_out(words, config.evaluation_rows, config.window))
        for words in (corpus.valid, corpus.test)
    ]

    def end_epoch(state: TrainState, epoch: int, loss: float) -> TrainState:
        params = averaged(state.opt_state, state.params)
        with np.errstate(over="ignore"):
            losses = [loss, *(float(evaluate(params, rows)) for rows in held_out)]
            perplexities = np.exp(np.array(losses, np.float32))
        if not np.isfinite(perplexities).all():
            raise FloatingPointError(f"the training diverged in epoch {epoch + 1}")
        state = state._replace(perplexities=state.perplexities.at[epoch].set(perplexities))
        valid = np.array(state.perplexities[: epoch + 1, SPLITS.index("valid")])
        if valid.argmin() == epoch:
            state = state._replace(best=jax.tree.map(jnp.copy, params))
        patience = config.averaging_patience
        if patience is not None and has_stalled(valid, patience):
            state = state._replace(opt_state=begin_averaging(state.opt_state))
        return state

    return end_epoch

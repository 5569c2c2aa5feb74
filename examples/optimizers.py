"""Initial weights and the optimizer."""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from configs import Config


def draw_params(config: Config, params: Any, rng: jax.Array) -> Any:
    """The initial weights and biases: uniform, where the configuration has a range for them."""
    if config.init_range is None:
        return params
    limit_of_others = config.init_range

    def draw(path: Any, leaf: jax.Array) -> jax.Array:
        name, limit = jax.tree_util.keystr(path), limit_of_others
        if config.pytorch_lstm and "LSTMCell" in name:
            limit = leaf.shape[-1] ** -0.5
        elif config.pytorch_lstm and "bias" in name:
            return leaf
        key = jax.random.fold_in(rng, zlib.crc32(name.encode()))
        return jax.random.uniform(key, leaf.shape, leaf.dtype, -limit, limit)

    return jax.tree_util.tree_map_with_path(draw, params)


def build_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """Its `update` takes the learning rate as `rate`."""
    pieces = [
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.add_decayed_weights(config.l2) if config.l2 else optax.identity(),
        optax.scale_by_adam() if config.adam else optax.identity(),
        scale_by_rate(),
        shrink_weights(config.weight_decay) if config.weight_decay else optax.identity(),
    ]
    if config.averaging_patience is not None:
        pieces.append(average_weights())
    return optax.chain(*pieces)


def scale_by_rate() -> optax.GradientTransformationExtraArgs:
    """Goes down the gradient by the learning rate, which comes with each update as `rate`."""

    def update(updates: Any, state: Any, params: Any = None, *, rate: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda update: -rate * update, updates), state

    return optax.GradientTransformationExtraArgs(optax.identity().init, update)  # type: ignore[arg-type]


def shrink_weights(share: float) -> optax.GradientTransformation:
    """Takes a share off the updated weights, whatever the learning rate is."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda u, p: u - share * (p + u), updates, params), state

    return optax.GradientTransformation(optax.identity().init, update)


class AverageState(NamedTuple):
    """The weights' average since it was begun; the weights themselves until then.

    Attributes:
      begun: whether averaging has begun.
      length: how many updates are in the average.
      average: shaped like the weights.
    """

    begun: jax.Array
    length: jax.Array
    average: Any


def average_weights() -> optax.GradientTransformation:
    """Averages the weights, and changes no update: the A of NT-ASGD. It comes last in a chain."""

    def init(params: Any) -> AverageState:
        return AverageState(jnp.bool_(False), jnp.int32(0), jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: AverageState, params: Any = None) -> tuple[Any, AverageState]:
        length = jnp.where(state.begun, state.length + 1, 0)
        share = 1 / jnp.maximum(length, 1).astype(jnp.float32)
        average = jax.tree.map(
            lambda mean, p, u: mean + share * (p + u - mean), state.average, params, updates
        )
        return updates, AverageState(state.begun, length, average)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def begin_averaging(opt_state: Any) -> Any:
    """The state of a chain that ends in `average_weights`, from which the average counts."""
    return (*opt_state[:-1], opt_state[-1]._replace(begun=jnp.bool_(True)))


def averaged(opt_state: Any, params: Any) -> Any:
    """The weights to evaluate: their average, where the optimizer has one."""
    last = opt_state[-1]
    return last.average if isinstance(last, AverageState) else params


def has_stalled(losses: np.ndarray, patience: int) -> bool:
    """The NT of NT-ASGD: whether the last loss is above the best of those `patience` epochs ago.

    Merity et al. 2017, arXiv:1708.02182, algorithm 1, as their code counts.
    """
    *earlier, last = losses
    return len(earlier) > patience and bool(last > min(earlier[:-patience]))

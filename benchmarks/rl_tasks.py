"""Three tasks that need memory, each with a shifted test, for `rl.py`.

A state has a `clock`, which counts the steps of an episode, and an `episode`, its id.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

sys.path.append(str(Path(__file__).parent.parent / "examples"))

import recurrent_ppo as ppo

import flax_dropout_cell as fdc


class Memory(NamedTuple):
    """A task to learn, a shifted one to test, and how many steps their episodes may take."""

    train: ppo.Task
    shifted: ppo.Task
    longest: int
    longest_shifted: int


def replace_finished(build: Callable[..., Any], state: Any, done: jax.Array, rng: jax.Array) -> Any:
    """New episodes in place of those that are over, with ids that no other episode has."""

    def pick(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(done.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(pick, build(rng, fdc.episode_ids(state.episode, done)), state)


def with_noise(task: ppo.Task, stddev: float) -> ppo.Task:
    """The task through noisy eyes; the noise depends on the episode's id and its clock."""

    def look(state: Any) -> jax.Array:
        seen = task.look(state)

        def draw(episode: jax.Array, clock: jax.Array) -> jax.Array:
            rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), episode), clock)
            return stddev * jax.random.normal(rng, seen.shape[1:])

        return seen + jax.vmap(draw)(state.episode, state.clock)

    return task._replace(look=look)


# A T-maze ----------------------------------------------------------------------------------------

LONGER, MORE_PATIENCE = (60, 80), 120  # in training 4 to 10 steps to the junction, and 40


def build_longer(rng: jax.Array, episode: jax.Array) -> ppo.Mazes:
    mazes = ppo.build_mazes(rng, episode)
    length = jax.random.randint(jax.random.fold_in(rng, 1), episode.shape, LONGER[0], LONGER[1] + 1)
    return mazes._replace(length=length)


LONGER_MAZES = ppo.Task(
    build_longer,
    ppo.look,
    functools.partial(ppo.walk, build=build_longer, patience=MORE_PATIENCE),
    ppo.MAZES.actions,
)

# Repeat previous ---------------------------------------------------------------------------------

SUITS, BACK, CARDS = 4, 3, 24


class Cards(NamedTuple):
    """The suits of the last cards, `[rows, BACK + 1]`, the newest first."""

    suits: jax.Array
    clock: jax.Array
    episode: jax.Array


def deal(rng: jax.Array, episode: jax.Array) -> Cards:
    suits = jax.random.randint(rng, (*episode.shape, BACK + 1), 0, SUITS)
    return Cards(suits, jnp.zeros_like(episode), episode)


def look_at_card(cards: Cards) -> jax.Array:
    return jax.nn.one_hot(cards.suits[:, 0], SUITS)


def name_suit(
    cards: Cards, action: jax.Array, rng: jax.Array
) -> tuple[Cards, jax.Array, jax.Array]:
    """As in POPGym (Morad et al. 2023): the suit of `BACK` steps ago gains, another one costs.

    The return of an episode is from -1 to 1. Cards are drawn with replacement, not from a deck.
    """
    right = jnp.where(action == cards.suits[:, BACK], 1.0, -1.0) / (CARDS - BACK)
    reward = jnp.where(cards.clock >= BACK, right, 0.0)
    done = cards.clock + 1 == CARDS
    card_rng, new_rng = jax.random.split(rng)
    card = jax.random.randint(card_rng, (len(done), 1), 0, SUITS)
    suits = jnp.concatenate([card, cards.suits[:, :-1]], axis=1)
    same = Cards(suits, cards.clock + 1, cards.episode)
    return replace_finished(deal, same, done, new_rng), reward, done


REPEAT_PREVIOUS = ppo.Task(deal, look_at_card, name_suit, SUITS)

# A cart-pole whose velocities are hidden ---------------------------------------------------------

GRAVITY, CART, POLE, FORCE, SECONDS = 9.8, 1.0, 0.1, 10.0, 0.02
FARTHEST, STEEPEST, STEPS = 2.4, 12 * jnp.pi / 180, 200
HALF_LENGTH = 0.5


class Poles(NamedTuple):
    """`[rows, 4]`: place and speed of the cart, angle and speed of the pole."""

    state: jax.Array
    clock: jax.Array
    episode: jax.Array


def set_up(rng: jax.Array, episode: jax.Array) -> Poles:
    state = jax.random.uniform(rng, (*episode.shape, 4), minval=-0.05, maxval=0.05)
    return Poles(state, jnp.zeros_like(episode), episode)


def look_at_pole(poles: Poles) -> jax.Array:
    """Place and angle, as shares of where an episode ends; no velocities."""
    return poles.state[:, ::2] / jnp.array([FARTHEST, STEEPEST])


def swing(state: jax.Array, action: jax.Array, half_length: float) -> jax.Array:
    """Gym's `CartPole`, by Euler's method (Barto, Sutton and Anderson 1983)."""
    _, speed, angle, turning = state.T
    force = jnp.where(action == 1, FORCE, -FORCE)
    sin, cos, mass = jnp.sin(angle), jnp.cos(angle), CART + POLE
    pushed = (force + POLE * half_length * turning**2 * sin) / mass
    bend = (GRAVITY * sin - cos * pushed) / (half_length * (4 / 3 - POLE * cos**2 / mass))
    pull = pushed - POLE * half_length * bend * cos / mass
    return state + SECONDS * jnp.stack([speed, pull, turning, bend], axis=-1)


def push(
    poles: Poles, action: jax.Array, rng: jax.Array, half_length: float = HALF_LENGTH
) -> tuple[Poles, jax.Array, jax.Array]:
    """The return of an episode is the share of the steps for which the pole stays up."""
    state = swing(poles.state, action, half_length)
    fell = (jnp.abs(state[:, ::2]) > jnp.array([FARTHEST, STEEPEST])).any(axis=-1)
    done = fell | (poles.clock + 1 == STEPS)
    same = Poles(state, poles.clock + 1, poles.episode)
    return replace_finished(set_up, same, done, rng), jnp.full(done.shape, 1 / STEPS), done


CART_POLE = ppo.Task(set_up, look_at_pole, push, actions=2)
SHORT_POLE = CART_POLE._replace(walk=functools.partial(push, half_length=HALF_LENGTH / 2))

# All of them -------------------------------------------------------------------------------------

MAZE_NOISE, CARD_NOISE, POLE_NOISE = 0.3, 0.4, 0.1

TASKS = {
    "T-maze": Memory(ppo.MAZES, with_noise(LONGER_MAZES, MAZE_NOISE), ppo.PATIENCE, MORE_PATIENCE),
    "repeat previous": Memory(
        REPEAT_PREVIOUS, with_noise(REPEAT_PREVIOUS, CARD_NOISE), CARDS, CARDS
    ),
    "masked cart-pole": Memory(CART_POLE, with_noise(SHORT_POLE, POLE_NOISE), STEPS, STEPS),
}

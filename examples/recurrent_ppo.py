"""A policy that remembers: PPO on a T-maze, under dropout that actor and learner share.

A sign at the start of a maze says left or right. Then comes a corridor with nothing to be seen, and
at its end a junction: the turn that the sign said gives 1, the other one -1 (Bakker 2001). Without
memory no policy gets more than 0 on average; an LSTM learns to get 1.

Dropout has a catch in reinforcement learning. PPO divides the learner's probability of an action by
the actor's, so both must have the same masks, though the learner sees rows in another order, and
episodes that were cut where a rollout ended. Here every episode has an id, and its masks depend on
a key and that id alone (`sequence_ids`). In the first minibatch of each iteration all ratios are
then 1, up to rounding. If one is not, the program stops.

    python examples/recurrent_ppo.py --keep-prob 0.5 --iterations 100

Three policies learn from as many steps: one that forgets everything at each step, one with memory,
and one with memory under variational dropout (Gal and Ghahramani 2016, arXiv:1512.05287). It ends
with a table of returns, and writes `recurrent_ppo.json` and `recurrent_ppo.png` to `--out`. These
are the returns of the rollouts, so the third policy's are measured with dropout on.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flags import read_config
from matplotlib.figure import Figure
from tqdm import tqdm

import flax_dropout_cell as fdc

LEFT, RIGHT, ON = range(3)  # the actions
SHORTEST, LONGEST, PATIENCE = 4, 10, 40  # steps to the junction, and until a maze is given up
DISCOUNT, TRACE, CLIP, ENTROPY, MINIBATCHES = 0.99, 0.95, 0.2, 0.01, 4
MODELS = ("no memory", "memory", "memory, dropout")
EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides the numbers."""

    keep_prob: float = 0.8
    units: int = 32
    mazes: int = 64
    steps: int = 32
    iterations: int = 60
    epochs: int = 4
    learning_rate: float = 3e-3
    seed: int = 0


# Mazes and policies ------------------------------------------------------------------------------


class Mazes(NamedTuple):
    """Mazes with an agent in each, `[mazes]`."""

    sign: jax.Array  # LEFT or RIGHT
    length: jax.Array
    place: jax.Array
    clock: jax.Array  # steps since the start
    episode: jax.Array  # an id that no other episode has


def build_mazes(rng: jax.Array, episode: jax.Array) -> Mazes:
    sign_rng, length_rng = jax.random.split(rng)
    sign = jax.random.randint(sign_rng, episode.shape, LEFT, RIGHT + 1)
    length = jax.random.randint(length_rng, episode.shape, SHORTEST, LONGEST + 1)
    return Mazes(sign, length, jnp.zeros_like(sign), jnp.zeros_like(sign), episode)


def look(mazes: Mazes) -> jax.Array:
    """An agent's observation: the sign at the start, and whether it is at the junction."""
    start, junction = mazes.place == 0, mazes.place == mazes.length
    signs = [start & (mazes.sign == side) for side in (LEFT, RIGHT)]
    return jnp.stack([*signs, junction], axis=-1).astype(jnp.float32)


def walk(
    mazes: Mazes,
    action: jax.Array,
    rng: jax.Array,
    build: Callable[..., Mazes] = build_mazes,
    patience: int = PATIENCE,
) -> tuple[Mazes, jax.Array, jax.Array]:
    """The mazes after a step, new ones where an episode is over; rewards; and where it is over."""
    junction = mazes.place == mazes.length
    turns, walks = junction & (action != ON), ~junction & (action == ON)
    turned = jnp.where(action == mazes.sign, 1.0, -1.0)
    reward = jnp.where(turns, turned, jnp.where(walks, 0.0, -0.1))  # -0.1 for a walk into a wall
    done = turns | (mazes.clock + 1 == patience)
    same = mazes._replace(place=mazes.place + walks, clock=mazes.clock + 1)
    new = build(rng, fdc.episode_ids(mazes.episode, done))
    return jax.tree.map(lambda new, same: jnp.where(done, new, same), new, same), reward, done


class Task(NamedTuple):
    """Environments side by side, whose state has a `clock` and an `episode`, as mazes have."""

    build: Callable[..., Any]
    look: Callable[..., jax.Array]
    walk: Callable[..., tuple[Any, jax.Array, jax.Array]]
    actions: int


MAZES = Task(build_mazes, look, walk, actions=3)


class Window(NamedTuple):
    """A policy's inputs, `[mazes, time, ..]`: observations, starts of episodes, ids."""

    seen: jax.Array
    first: jax.Array
    episode: jax.Array


def window_of(mazes: Any, task: Task = MAZES) -> Window:
    """One step, as a window."""
    window = Window(task.look(mazes), mazes.clock == 0, mazes.episode)
    return jax.tree.map(lambda leaf: leaf[:, None], window)


class Policy(nn.Module):
    """An LSTM that gives logits of the actions, and the value of where an agent is."""

    units: int
    dropout: fdc.RecurrentDropout
    remembers: bool
    actions: int = MAZES.actions

    @nn.compact
    def __call__(
        self, carry: Any, window: Window, key: jax.Array | None, start: int | jax.Array = 0
    ) -> Any:
        rnn = fdc.linen.RNN(fdc.linen.LSTMCell(self.units), self.dropout, return_carry=True)
        carry, hs = rnn(
            window.seen,
            initial_carry=carry,
            resets=window.first if self.remembers else jnp.ones_like(window.first),
            sequence_ids=window.episode,
            start=start,  # per-step noises depend on the step in the rollout
            rng=key,
            deterministic=key is None,
        )
        return carry, nn.Dense(self.actions)(hs), nn.Dense(1)(hs)[..., 0]


# Acting and learning -----------------------------------------------------------------------------


class Agent(NamedTuple):
    """State that carries over from rollout to rollout, also in the middle of an episode."""

    params: Any
    opt_state: Any
    mazes: Any
    carry: Any


class Rollout(NamedTuple):
    """Observations, actions and rewards, `[mazes, time, ..]`, and the carry at the start."""

    carry: Any
    window: Window
    action: jax.Array
    logits: jax.Array
    value: jax.Array
    reward: jax.Array
    done: jax.Array


def act(
    policy: Policy,
    agent: Agent,
    rng: jax.Array,
    steps: int,
    key: jax.Array | None,
    task: Task = MAZES,
) -> Any:
    """Walks step by step: the agent after it, the rollout, and the value of where it is then."""

    def run(mazes: Any, carry: Any, start: int | jax.Array) -> Any:
        window = window_of(mazes, task)
        carry, *heads = cast(Any, policy.apply(agent.params, carry, window, key, start))
        return carry, *jax.tree.map(lambda leaf: leaf[:, 0], (window, *heads))

    def step(state: tuple[Any, Any], at: tuple[jax.Array, jax.Array]) -> Any:
        action_rng, maze_rng = jax.random.split(at[0])
        carry, window, logits, value = run(*state, at[1])
        action = jax.random.categorical(action_rng, logits)
        mazes, reward, done = task.walk(state[0], action, maze_rng)
        return (mazes, carry), (window, action, logits, value, reward, done)

    state = (agent.mazes, agent.carry)
    each = (jax.random.split(rng, steps), jnp.arange(steps))
    (mazes, carry), steps_taken = jax.lax.scan(step, state, each)
    seen = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), steps_taken)
    rollout = Rollout(agent.carry, *seen)
    return agent._replace(mazes=mazes, carry=carry), rollout, run(mazes, carry, steps)[-1]


def advantages_of(rollout: Rollout, last_value: jax.Array) -> jax.Array:
    """Generalized advantage estimates (Schulman et al. 2015, arXiv:1506.02438)."""
    following = jnp.concatenate([rollout.value[:, 1:], last_value[:, None]], axis=1)
    goes_on = DISCOUNT * (1.0 - rollout.done)
    surprise = rollout.reward + goes_on * following - rollout.value

    def back(later: jax.Array, at: Any) -> tuple[jax.Array, jax.Array]:
        advantage = at[0] + TRACE * at[1] * later
        return advantage, advantage

    return jax.lax.scan(back, 0 * last_value, (surprise.T, goes_on.T), reverse=True)[1].T


def loss_of(params: Any, policy: Policy, rows: Any, key: jax.Array) -> Any:
    """PPO's clipped loss (Schulman et al. 2017, arXiv:1707.06347), and each ratio's error."""
    rollout, advantage = rows
    _, logits, value = cast(Any, policy.apply(params, rollout.carry, rollout.window, key))
    # Both in one array, so that they are rounded alike: from equal logits a ratio is exactly 1.
    log_probs = jax.nn.log_softmax(jnp.stack([logits, rollout.logits]))
    actions = jnp.stack([rollout.action, rollout.action])[..., None]
    new, old = jnp.take_along_axis(log_probs, actions, axis=-1)[..., 0]
    ratio = jnp.exp(new - old)
    scaled = advantage / (advantage.std() + 1e-6)
    gain = jnp.minimum(ratio * scaled, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * scaled)
    entropy = -(jnp.exp(log_probs[0]) * log_probs[0]).sum(axis=-1)
    error = (value - rollout.value - advantage) ** 2
    return (error / 2 - gain - ENTROPY * entropy).mean(), jnp.abs(ratio - 1)


def iterate(
    policy: Policy,
    opt: optax.GradientTransformation,
    config: Config,
    agent: Agent,
    rng: jax.Array,
    key: jax.Array,
    task: Task = MAZES,
    learner_rng: jax.Array | None = None,
) -> tuple[Agent, Rollout, jax.Array]:
    """Acts and learns: the agent after it, the rollout, and how far off the first ratios were.

    With `learner_rng` the actor drops nothing, and the learner has new masks in each update.
    """
    rollout_rng, *epoch_rngs = jax.random.split(rng, 1 + config.epochs)
    actor_key = key if learner_rng is None else None
    agent, rollout, last_value = act(policy, agent, rollout_rng, config.steps, actor_key, task)
    batch = (rollout, advantages_of(rollout, last_value))

    def update(agent: Agent, at: tuple[jax.Array, jax.Array | None]) -> tuple[Agent, jax.Array]:
        rows, own_key = at
        some = jax.tree.map(lambda leaf: leaf[rows], batch)
        learner_key = key if own_key is None else own_key
        grads, off = jax.grad(loss_of, has_aux=True)(agent.params, policy, some, learner_key)
        updates, opt_state = opt.update(grads, agent.opt_state)
        params = optax.apply_updates(agent.params, updates)
        return agent._replace(params=params, opt_state=opt_state), off

    size = -(-config.mazes // MINIBATCHES)
    orders = [jax.random.permutation(rng, config.mazes) for rng in epoch_rngs]
    rows = jnp.stack(orders)[:, : config.mazes - config.mazes % size].reshape(-1, size)
    own_keys = None if learner_rng is None else jax.random.split(learner_rng, len(rows))
    agent, off = jax.lax.scan(update, agent, (rows, own_keys))
    return agent, rollout, off[0]


def begin(
    config: Config, policy: Policy, rng: jax.Array, task: Task = MAZES
) -> tuple[Agent, optax.GradientTransformation, jax.Array, jax.Array]:
    """An agent that has learned nothing, its optimizer, and keys: of all acting, of all masks."""
    opt = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(config.learning_rate))
    init_rng, maze_rng, act_rng, key = jax.random.split(rng, 4)
    mazes = task.build(maze_rng, jnp.arange(config.mazes))
    carry = (jnp.zeros((config.mazes, config.units)),) * 2
    params = jax.jit(policy.init)(init_rng, carry, window_of(mazes, task), None)
    return Agent(params, opt.init(params), mazes, carry), opt, act_rng, key


class Learned(NamedTuple):
    """The mean return of an iteration, and how far from 1 a ratio was in its first minibatch."""

    mean_return: Any
    ratio_error: Any


def train(config: Config, name: str) -> Iterator[Learned]:
    """Trains a policy, and gives the result of each iteration.

    Raises:
      FloatingPointError: the training diverged.
    """
    kept = config.keep_prob if "dropout" in name else 1.0
    # Not on the input: a sign that is dropped is a sign that nobody has seen.
    spec = fdc.recipes.gal2016(input_keep_prob=1.0, recurrent_keep_prob=kept, output_keep_prob=kept)
    policy = Policy(config.units, spec, remembers=name != "no memory")
    agent, opt, act_rng, key = begin(config, policy, jax.random.key(config.seed))

    @jax.jit
    def run(agent: Agent, rng: jax.Array) -> tuple[Agent, Learned]:
        agent, rollout, off = iterate(policy, opt, config, agent, rng, key)
        mean_return = rollout.reward.sum() / jnp.maximum(rollout.done.sum(), 1)
        return agent, Learned(mean_return, off.max())

    for index in tqdm(range(config.iterations), desc=name, disable=None, leave=False):
        agent, learned = run(agent, jax.random.fold_in(act_rng, index))
        learned = Learned(*map(float, learned))
        if not math.isfinite(learned.ratio_error):
            raise FloatingPointError(f"{name}: the training diverged in iteration {index + 1}")
        if learned.ratio_error >= 1e-3:
            raise AssertionError(
                f"actor and learner differ: a ratio is off by {learned.ratio_error}"
            )
        yield learned


def report(config: Config, out: Path, curves: dict[str, list[Learned]]) -> None:
    results = []
    for name, curve in curves.items():
        final = sum(learned.mean_return for learned in curve[-10:]) / len(curve[-10:])
        error = max(learned.ratio_error for learned in curve)
        label = "return (dropout on)" if "dropout" in name else "return"
        print(f"{name:20} {label:19} {final:6.3f}", end="   ")
        print(f"first ratios off from 1 by at most {error:.1e}")
        returns = [learned.mean_return for learned in curve]
        results.append({"model": name, "return": final, "ratio_error": error, "curve": returns})
    content = {"config": dataclasses.asdict(config), "results": results}
    (out / "recurrent_ppo.json").write_text(json.dumps(content, indent=2) + "\n")
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for result in results:
        axes.plot(result["curve"], label=result["model"])
    axes.set(xlabel="iteration", ylabel="return of an episode", ylim=(-2.5, 1.1))
    axes.legend()
    figure.savefig(out / "recurrent_ppo.png", dpi=150)
    print(f"written to {out / 'recurrent_ppo.json'} and {out / 'recurrent_ppo.png'}")


def main() -> int:
    config, out = read_config(
        "Train policies on a T-maze by PPO. Ctrl-C reports what was learned until then.",
        Config,
        keep_prob="share of units kept, of h and of the output",
        units="size of the LSTM",
        mazes="how many agents act side by side",
        steps="steps of a rollout",
        iterations="rollouts to act and learn from",
        epochs="how often to learn from a rollout",
        learning_rate="Adam's",
        seed="of the weights, the mazes and the masks",
    )
    curves, status = dict[str, list[Learned]](), 0
    try:
        for name in MODELS:
            for learned in train(config, name):
                curves.setdefault(name, []).append(learned)
    except KeyboardInterrupt:
        print("interrupted; this is what was learned until then:", file=sys.stderr)
        status = EXIT_INTERRUPTED
    except FloatingPointError as error:
        print(f"{error}; this is what was learned until then:", file=sys.stderr)
        status = EXIT_FAILED
    if curves:
        report(config, out, curves)
    return status


if __name__ == "__main__":
    sys.exit(main())

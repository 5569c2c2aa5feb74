"""How far PPO's ratios are from 1 before an update, by the masks of actor and learner.

    python benchmarks/ratios.py                         # two minutes on two cores
    python benchmarks/ratios.py --updates 10 --out results

A policy learns to name the symbol that it saw three steps ago; an episode ends at any step with
probability 1/16. It acts and learns under the same masks, by episode ids. Before each update, the
ratios of the learner's probabilities to the actor's are computed three times: with those masks;
with an actor that drops nothing, as in code that turns dropout on in its loss only; and with masks
of the learner's own. Actor and learner have the same weights, so each ratio should be 1. PPO clips
ratios outside of 1 +- 0.2: if they went where the advantage points, they have no gradient.
"""

import argparse
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from compare import positive_int
from jax_programs import versions
from rounds import parser_of, store

import flax_dropout_cell as fdc

ACTORS, STEPS, SYMBOLS, LAG, UNITS = 64, 32, 8, 3, 64
CLIP, ENTROPY, DISCOUNT, EPOCHS, END = 0.2, 0.01, 0.5, 4, 1 / 16
KEEP_PROBS = (0.9, 0.8, 0.5)
WAYS = {
    "same": "the same masks, by ids",
    "bare": "the actor drops nothing",
    "other": "masks of the learner's own",
}


class Policy(nn.Module):
    """A GRU under dropout, the action's logits and the value."""

    keep_prob: float

    @nn.compact
    def __call__(self, carry: Any, seen: Any, first: Any, ids: Any, key: Any) -> Any:
        gal = fdc.recipes.gal2016(
            input_keep_prob=1.0,
            recurrent_keep_prob=self.keep_prob,
            output_keep_prob=self.keep_prob,
        )
        rnn = fdc.linen.RNN(fdc.linen.GRUCell(UNITS), gal, time_major=True, return_carry=True)
        carry, hs = rnn(
            jax.nn.one_hot(seen, SYMBOLS),
            initial_carry=carry,
            resets=first,
            sequence_ids=ids,
            rng=key,
            deterministic=key is None,
        )
        return carry, nn.Dense(SYMBOLS)(hs), nn.Dense(1)(hs)[..., 0]


class Actors(NamedTuple):
    """Where each actor is, `[actors, ..]`."""

    carry: jax.Array
    recent: jax.Array  # the symbols seen last, the newest in front
    first: jax.Array  # whether its next step is an episode's first
    ids: jax.Array


class Steps(NamedTuple):
    """What actors saw, did and got, `[steps, actors, ..]`."""

    seen: jax.Array
    first: jax.Array
    ids: jax.Array
    action: jax.Array
    logits: jax.Array
    reward: jax.Array


def begin() -> Actors:
    return Actors(
        jnp.zeros((ACTORS, UNITS)),
        jnp.zeros((ACTORS, LAG + 1), int),
        jnp.ones(ACTORS, bool),
        jnp.arange(ACTORS),
    )


def act(policy: Policy, params: Any, actors: Actors, rng: jax.Array, key: Any) -> Any:
    """A rollout, one step a call."""

    def step(actors: Actors, rng: jax.Array) -> tuple[Actors, Steps]:
        carry, recent, first, ids = actors
        seen_rng, action_rng, end_rng = jax.random.split(rng, 3)
        seen = jax.random.randint(seen_rng, (ACTORS,), 0, SYMBOLS)
        recent = jnp.concatenate([seen[:, None], recent[:, :-1]], axis=1)
        window = (leaf[None] for leaf in (seen, first, ids))
        carry, logits, _ = cast(Any, policy.apply(params, carry, *window, key))
        action = jax.random.categorical(action_rng, logits[0])
        reward = (action == recent[:, LAG]).astype(jnp.float32)
        done = jax.random.bernoulli(end_rng, END, (ACTORS,))
        later = Actors(carry, recent, done, fdc.episode_ids(ids, done))
        return later, Steps(seen, first, ids, action, logits[0], reward)

    return jax.lax.scan(step, actors, jax.random.split(rng, STEPS))


def evaluate(policy: Policy, params: Any, carry: Any, steps: Steps, key: Any) -> Any:
    """The learner's log probabilities, its ratios to the actor's, and its values."""
    window = (steps.seen, steps.first, steps.ids)
    _, logits, value = cast(Any, policy.apply(params, carry, *window, key))
    log_probs = jax.nn.log_softmax(jnp.stack([logits, steps.logits]))
    actions = jnp.stack([steps.action, steps.action])[..., None]
    new, old = jnp.take_along_axis(log_probs, actions, axis=-1)[..., 0]
    return log_probs[0], jnp.exp(new - old), value


def loss_of(params: Any, policy: Policy, carry: Any, steps: Steps, key: Any) -> jax.Array:
    """PPO's clipped loss; a return is that of the rollout's remaining steps, discounted."""
    log_probs, ratio, value = evaluate(policy, params, carry, steps, key)

    def back(later: jax.Array, reward: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (total := reward + DISCOUNT * later), total

    returns = jax.lax.scan(back, jnp.zeros(value.shape[1]), steps.reward, reverse=True)[1]
    advantage = jax.lax.stop_gradient(returns - value)
    advantage = advantage / (advantage.std() + 1e-6)
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage)
    entropy = -(jnp.exp(log_probs) * log_probs).sum(-1)
    return ((value - returns) ** 2 / 2 - gain - ENTROPY * entropy).mean()


def train(keep_prob: float, updates: int) -> dict[str, list[float]]:
    """For each update, the share of ratios outside of the clip beforehand; and the mean reward."""
    policy = Policy(keep_prob)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(3e-3))
    init_rng, act_rng, order_rng, key, other = jax.random.split(jax.random.key(0), 5)
    actors = begin()
    window = (leaf[None] for leaf in (actors.recent[:, 0], actors.first, actors.ids))
    params = jax.jit(policy.init)(init_rng, actors.carry, *window, None)

    @jax.jit
    def measure(params: Any, actors: Actors, rng: jax.Array) -> dict[str, jax.Array]:
        order = jax.random.permutation(order_rng, ACTORS)

        def off(acting: Any, learning: Any) -> jax.Array:
            _, steps = act(policy, params, actors, rng, acting)
            steps = jax.tree.map(lambda leaf: leaf[:, order], steps)
            return abs(evaluate(policy, params, actors.carry[order], steps, learning)[1] - 1)

        offs = {"same": off(key, key), "bare": off(None, key), "other": off(key, other)}
        outside = {way: (off > CLIP).mean() for way, off in offs.items()}
        return outside | {"largest with ids": offs["same"].max()}

    @jax.jit
    def learn(params: Any, state: Any, actors: Actors, rng: jax.Array) -> Any:
        later, steps = act(policy, params, actors, rng, key)

        def update(_: Any, learner: Any) -> Any:
            grads = jax.grad(loss_of)(learner[0], policy, actors.carry, steps, key)
            updates, state = optimizer.update(grads, learner[1])
            return optax.apply_updates(learner[0], updates), state

        learner = jax.lax.fori_loop(0, EPOCHS, update, (params, state))
        return *learner, later, steps.reward.mean()

    state = optimizer.init(params)
    curves: dict[str, list[float]] = {way: [] for way in (*WAYS, "largest with ids", "reward")}
    for index in range(updates):
        rng = jax.random.fold_in(act_rng, index)
        measured = measure(params, actors, rng)
        params, state, actors, reward = learn(params, state, actors, rng)
        for name, value in (measured | {"reward": reward}).items():
            curves[name].append(float(f"{value:.3g}"))
    return curves


def format_table(result: dict[str, Any]) -> str:
    """The share of ratios outside of the clip, over all updates and in the worst one."""
    lines = ["| actor and learner have | " + " | ".join(f"keep {kept}" for kept in KEEP_PROBS)]
    lines = [f"{lines[0]} |", "|---" * (1 + len(KEEP_PROBS)) + "|"]
    for way, name in WAYS.items():
        cells = [
            f"{np.mean(run['curves'][way]):.0%}, at worst {max(run['curves'][way]):.0%}"
            for run in result["runs"]
        ]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__, None)
    parser.add_argument("--updates", type=positive_int, default=100, help="default: 100")
    options: argparse.Namespace = parser.parse_args()
    runs = [{"keep_prob": kept, "curves": train(kept, options.updates)} for kept in KEEP_PROBS]
    result = {"versions": versions(), "updates": options.updates, "runs": runs}
    store(result, options.out / "ratios.json", format_table(result))


if __name__ == "__main__":
    main()

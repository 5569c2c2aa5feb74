"""Does recurrent dropout help in reinforcement learning? Five ways, three tasks, ten seeds each.

    python benchmarks/rl.py

The policies and PPO are those of `examples/recurrent_ppo.py`. Dropout is consistent if actor and
learner have the same masks, by the ids of episodes, as zoneout is here too. Public code often has
dropout in the learner alone: it acts without, and learns with masks that are new at each update.
All seeds of a task and a way are one program. Policies are tested in evaluation mode, which drops
nothing: on the task that they learn, and on a shifted one. Results go to `rl.json`, row by row:
started again, it goes on with the rows that are missing. It ends with a table and a figure.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rl_tables import draw, format_table
from rl_tasks import TASKS, Memory, ppo
from rounds import resume, write
from schemes import describe_run

import flax_dropout_cell as fdc


class Way(NamedTuple):
    dropout: fdc.RecurrentDropout
    learner_alone: bool = False


def variational(keep: float) -> fdc.RecurrentDropout:
    """On h and the output, as in the example: a sign that is dropped, nobody has seen."""
    return fdc.recipes.gal2016(input_keep_prob=1.0, recurrent_keep_prob=keep, output_keep_prob=keep)


WAYS = {
    "no dropout": Way(fdc.RecurrentDropout()),
    "consistent, keep 0.9": Way(variational(0.9)),
    "consistent, keep 0.7": Way(variational(0.7)),
    "zoneout": Way(fdc.recipes.krueger2016(cell_prob=0.25, hidden_prob=0.025)),
    "learner alone, keep 0.9": Way(variational(0.9), learner_alone=True),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The same for all tasks and ways."""

    seeds: int = 10
    units: int = 32
    environments: int = 64
    steps: int = 32
    iterations: int = 160
    epochs: int = 4
    learning_rate: float = 3e-3
    tests: int = 32  # during a training, at equal distances
    tested: int = 64  # episodes in each of them


QUICK = Config(seeds=2, units=4, environments=4, steps=6, iterations=4, epochs=1, tests=2, tested=4)


def mean_return(
    policy: ppo.Policy, params: Any, task: ppo.Task, rng: Any, config: Config, longest: int
) -> jax.Array:
    """Of one episode in each environment, in evaluation mode; actions are sampled."""
    build_rng, id_rng, act_rng = jax.random.split(rng, 3)
    first = jax.random.randint(id_rng, (), 0, 2**30)  # the noise of a shifted test follows the id
    state = task.build(build_rng, first + jnp.arange(config.tested))
    carry = (jnp.zeros((config.tested, config.units)),) * 2
    agent = ppo.Agent(params, None, state, carry)
    _, rollout, _ = ppo.act(policy, agent, act_rng, longest, None, task)
    before = jnp.cumsum(rollout.done, axis=1) - rollout.done  # episodes that are over by then
    return jnp.where(before == 0, rollout.reward, 0.0).sum(axis=1).mean()


def build_run(memory: Memory, way: Way, config: Config) -> Callable[..., Any]:
    """All trainings as a function of their keys.

    It gives the returns of tests `[seeds, tests]`, of the shifted test `[seeds]`, and the share
    of ratios that the first update of each iteration clips, and their worst error.
    """
    learner = ppo.Config(
        units=config.units,
        mazes=config.environments,
        steps=config.steps,
        epochs=config.epochs,
        learning_rate=config.learning_rate,
    )
    policy = ppo.Policy(config.units, way.dropout, True, memory.train.actions)

    def run(rng: jax.Array) -> Any:
        train_rng, test_rng = jax.random.split(rng)
        agent, opt, act_rng, key = ppo.begin(learner, policy, train_rng, memory.train)

        def iterate(agent: Any, index: jax.Array) -> Any:
            rng = jax.random.fold_in(act_rng, index)
            own = jax.random.fold_in(key, index) if way.learner_alone else None
            agent, _, off = ppo.iterate(policy, opt, learner, agent, rng, key, memory.train, own)
            return agent, ((off > ppo.CLIP).mean(), off.max())

        def learn_and_test(agent: Any, indices: jax.Array) -> Any:
            agent, first = jax.lax.scan(iterate, agent, indices)
            rng = jax.random.fold_in(test_rng, indices[-1])
            tested = mean_return(policy, agent.params, memory.train, rng, config, memory.longest)
            return agent, (tested, *first)

        indices = jnp.arange(config.iterations).reshape(config.tests, -1)
        agent, (returns, clipped, error) = jax.lax.scan(learn_and_test, agent, indices)
        rng = jax.random.fold_in(test_rng, config.iterations)
        shifted = mean_return(
            policy, agent.params, memory.shifted, rng, config, memory.longest_shifted
        )
        return returns, shifted, clipped.ravel(), error.max()

    return jax.jit(jax.vmap(run))


LAST = 4
"""The final return of a seed is the mean of so many tests."""


def compare(task: str, way: str, config: Config) -> dict[str, Any]:
    began = time.monotonic()
    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    results = build_run(TASKS[task], WAYS[way], config)(keys)
    returns, shifted, clipped, error = (np.asarray(part, float) for part in results)
    return {
        "task": task,
        "way": way,
        "return": np.round(returns[:, -LAST:].mean(axis=1), 4).tolist(),
        "return_over_time": np.round(returns.mean(axis=1), 4).tolist(),
        "shifted_return": np.round(shifted, 4).tolist(),
        "clipped": np.round(clipped.mean(axis=1), 4).tolist(),
        "worst_clipped": float(clipped.max()),
        "ratio_error": float(error.max()),
        "seconds": round(time.monotonic() - began, 1),
        "curves": np.round(returns, 3).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="default: results")
    parser.add_argument("--task", choices=TASKS, action="append", help="some instead of all")
    parser.add_argument("--way", choices=WAYS, action="append", help="some instead of all")
    parser.add_argument("--quick", action="store_true", help="a tiny size, which learns nothing")
    arguments = parser.parse_args()
    config = QUICK if arguments.quick else Config()
    path = arguments.out / "rl.json"
    report = resume(parser, {"config": dataclasses.asdict(config), "rows": []}, path)
    done = {(row["task"], row["way"]) for row in report["rows"]}
    for task in arguments.task or TASKS:
        for way in arguments.way or WAYS:
            if (task, way) in done:
                continue
            row = compare(task, way, config) | describe_run()
            report["rows"].append(row)
            write(path, report)
            print(f"{task}, {way}: {row['seconds']} s", flush=True)
    draw(report, path.with_suffix(".png"))
    print(format_table(report), f"wrote {path} and {path.with_suffix('.png')}", sep="\n")


if __name__ == "__main__":
    main()

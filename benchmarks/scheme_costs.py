"""The training cost of each scheme, relative to the bare model: the models of `schemes.py`.

    python benchmarks/scheme_costs.py                     # 300 units, batches of 16 x 64 steps
    python benchmarks/scheme_costs.py --rounds 5 --out results

It times the gradient of one batch, whatever the data are. Within a round each program runs once; a
ratio is the median over the rounds of a scheme's time divided by the bare one's in the same round.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from compare import describe
from jax_programs import versions
from program import Config
from rounds import parser_of, store, time_in_turn
from scheme_noises import COMPARED, SCHEMES
from scheme_tables import format_row
from scheme_tasks import Split, Task, all_steps
from schemes import Config as Training
from schemes import Model

STEPS, BATCH, FEATURES, UNITS = 64, 16, 88, 300
MEASURED = ("lstm", "gru")  # of one layer each


def made_up_task() -> Task:
    """Of the chorales' shape: their numbers do not matter here."""
    values = np.random.default_rng(0).random((BATCH, STEPS, FEATURES), np.float32)
    split = Split(values, values, np.full(BATCH, STEPS, np.int32))

    def squares(outputs: jax.Array, targets: jax.Array) -> jax.Array:
        return ((outputs - targets) ** 2).sum(-1)

    return Task((split,) * 3, FEATURES, squares, all_steps, True, "step", "made up", {})


def compile_gradient(cell: str, name: str) -> Callable[[], Any]:
    task = made_up_task()
    model = Model(cell, task, Training(units=UNITS))
    scheme, strength = SCHEMES[name], max(SCHEMES[name].strengths)
    specs = [scheme.noise(strength, 0.9, cell)]

    def loss(params: Any, split: Split, rng: jax.Array) -> jax.Array:
        return model.loss(params, split, rng, specs)

    init_rng, rng = jax.random.split(jax.random.key(0))
    args = model.init(init_rng), Split(*map(jnp.asarray, task.splits[0])), rng
    return functools.partial(jax.jit(jax.grad(loss)).lower(*args).compile(), *args)


def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    """The seconds of each scheme's gradient in each round, by cell."""
    return {
        cell: time_in_turn(
            {
                name: compile_gradient(cell, name)
                for name in COMPARED[cell]
                if not SCHEMES[name].monte_carlo
            },
            rounds,
        )
        for cell in MEASURED
    }


def format_table(result: dict[str, Any]) -> str:
    """Each scheme's time to train, as a multiple of the bare model's."""
    seconds = result["seconds"]
    lines = [format_row(["scheme", *seconds]), "|---" * (1 + len(seconds)) + "|"]
    for name in seconds["lstm"]:
        cells = [
            f"{np.median(np.divide(times[name], times['none'])):.2f}" if name in times else ""
            for times in seconds.values()
        ]
        lines.append(format_row([name, *cells]))
    return "\n".join(lines)


def main() -> None:
    options = parser_of(__doc__, 41).parse_args()
    config = Config(time=STEPS, batch=BATCH, features=FEATURES)
    result = describe([versions()], config) | {"seconds": measure(options.rounds)}
    store(result, options.out / "scheme_costs.json", format_table(result))


if __name__ == "__main__":
    main()

"""Which recurrent-dropout scheme, if each may choose its optimizer as well?

    python benchmarks/equal_budgets.py chorales --data FOLDER
    python benchmarks/equal_budgets.py words

As in `schemes.py`, but every row picks from twelve settings: without dropout, three learning rates
with four weight decays each; with it, four strengths with three pairs of a rate and a decay each.
One seed is trained at each setting; the one that is best by validation is trained with the other
seeds too, and tested.
"""

import functools
import itertools
import time
from typing import Any

import numpy as np
import scheme_noises
from scheme_noises import SCHEMES, Scheme, Setting
from scheme_tasks import Task
from schemes import (
    Config,
    build_run,
    describe_run,
    describe_trainings,
    for_cell,
    keys_of,
    run_rows,
    stack,
)

DECAYS = (0.0, 0.1, 0.3, 1.0)
GAL, AVERAGED = "Gal, tied", "Gal, tied, Monte Carlo"  # Two rows from the same trainings.
COMPARED = {
    cell: [name for name in names if name != AVERAGED]
    for cell, names in scheme_noises.COMPARED.items()
    if cell in ("lstm", "gru")
}


def settings_of(scheme: Scheme, task: Task) -> list[Setting]:
    if scheme.name == "none":
        return [Setting(0.0, *pair) for pair in itertools.product(task.rates, DECAYS)]
    pairs = itertools.product(scheme.strengths, task.optimizers)
    return [Setting(strength, *optimizer) for strength, optimizer in pairs]


def tune(task: Task, config: Config, cell: str, scheme: Scheme) -> list[dict[str, Any]]:
    """One seed at every setting, all seeds at the best; a row for each way to predict."""
    began = time.monotonic()
    config, names = for_cell(task, config, cell), [scheme.name]
    if scheme.name == GAL:
        scheme, names = SCHEMES[AVERAGED], [GAL, AVERAGED]
    run, settings = build_run(task, config, cell, scheme), settings_of(scheme, task)
    keys = keys_of(config)
    screened = [np.asarray(part) for part in run(keys[:1], stack(settings))]

    @functools.cache
    def all_seeds(picked: int) -> list[np.ndarray]:
        parts = [part[picked] for part in screened]
        if config.seeds == 1:
            return parts
        others = run(keys[1:], stack([settings[picked]]))
        return [np.concatenate([one, rest[0]]) for one, rest in zip(parts, others, strict=True)]

    rows = []
    for at, name in enumerate(names):
        by_setting = screened[0][:, 0, at, 0]
        picked = int(by_setting.argmin())
        valid, test, epochs, curves = all_seeds(picked)
        row = {
            "scheme": name,
            "cell": cell,
            "learning_rate": config.learning_rate * settings[picked].rate,
            "settings": [setting._asdict() for setting in settings],
            "valid_nll_by_setting": by_setting.tolist(),
        }
        row |= settings[picked]._asdict()
        row |= describe_trainings(task, config, (valid[:, at], test[:, at], epochs, curves), began)
        rows.append(row | describe_run())
    return rows


def main() -> None:
    run_rows("Compare schemes under equal budgets.", "equal_budgets", COMPARED, tune)


if __name__ == "__main__":
    main()

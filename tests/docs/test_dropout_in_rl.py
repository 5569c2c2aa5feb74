"""*Dropout in RL*: its table and each of its sentences with numbers, from the stored result."""

import dataclasses
import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
REPORT = json.loads((ROOT / "docs/results/rl.json").read_text())
TEXT = (ROOT / "docs/dropout_in_rl.md").read_text()
PAGE = " ".join(TEXT.split())


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield SimpleNamespace(
        rl=importlib.import_module("rl"),
        tasks=importlib.import_module("rl_tasks"),
        tables=importlib.import_module("rl_tables"),
    )


def test_the_table_is_the_stored_results(modules: SimpleNamespace) -> None:
    assert modules.tables.format_table(REPORT) in TEXT
    pairs = [(row["task"], row["way"]) for row in REPORT["rows"]]
    assert pairs == [(task, way) for task in modules.rl.TASKS for way in modules.rl.WAYS]
    # Two programs ran side by side.
    for row in REPORT["rows"]:
        some = " --task 'masked cart-pole'" if row["task"] == "masked cart-pole" else ""
        assert row["command"] == f"python benchmarks/rl.py{some}"


def test_the_setup_is_the_programs(modules: SimpleNamespace) -> None:
    config, tasks = modules.rl.Config(), modules.tasks
    assert REPORT["config"] == dataclasses.asdict(config)
    learns = f"An LSTM of {config.units} units learns from {config.iterations} rollouts of"
    places = f"{config.steps} steps in {config.environments} environments, four epochs each"
    assert f"{learns} {places}, by Adam from a learning rate of {config.learning_rate}" in PAGE
    assert config.seeds == 10 and config.epochs == 4 and modules.rl.LAST == 4
    assert f"the mean of {config.tests} tests" in PAGE
    shortest, longest = tasks.LONGER
    assert f"| {shortest} to {longest} steps, and noise of {tasks.MAZE_NOISE} in" in PAGE
    assert f"turn after {tasks.ppo.SHORTEST} to {tasks.ppo.LONGEST} steps" in PAGE
    assert tasks.BACK == 3 and f"of three cards ago, of {tasks.SUITS} suits" in PAGE
    assert f"| noise of {tasks.CARD_NOISE} in the cards |" in PAGE
    assert f"share of {tasks.STEPS} steps" in PAGE
    assert f"| a pole of half the length, and noise of {tasks.POLE_NOISE} in what is seen |" in PAGE
    spec = modules.rl.WAYS[ZONEOUT].dropout
    chances = f"{spec.state[0].prob} for c and {spec.inside['hidden'].prob} for h"
    assert f"**Zoneout**, with {chances}, half of the defaults" in PAGE
    compared = len(modules.tables.MEASURES) * sum(row["way"] != NONE for row in REPORT["rows"])
    by_chance = compared * math.erfc(2 / math.sqrt(2))
    assert f"Of the {compared} comparisons, about" in PAGE and round(by_chance) == 2
    minutes = sum(row["seconds"] for row in REPORT["rows"]) / 60
    assert f"All training runs together took {minutes:.0f} minutes" in PAGE
    assert f"outside of 1 ± {tasks.ppo.CLIP}" in PAGE


# Findings ----------------------------------------------------------------------------------------

NONE, WEAK, STRONG = "no dropout", "consistent, keep 0.9", "consistent, keep 0.7"
ZONEOUT, ALONE = "zoneout", "learner alone, keep 0.9"
MAZE, CARDS, POLE = "T-maze", "repeat previous", "masked cart-pole"


def row_of(task: str, way: str) -> dict[str, Any]:
    (row,) = [row for row in REPORT["rows"] if (row["task"], row["way"]) == (task, way)]
    return row


def mean(task: str, way: str, name: str = "return") -> str:
    return f"{np.mean(row_of(task, way)[name]):.2f}"


def errors_apart(task: str, first: str, second: str, name: str) -> float:
    """How far the first way's mean is above the second's, in standard errors."""
    ours, theirs = (np.array(row_of(task, way)[name]) for way in (first, second))
    spread = (ours.var(ddof=1) / len(ours) + theirs.var(ddof=1) / len(theirs)) ** 0.5
    return float((ours.mean() - theirs.mean()) / spread)


def differing(name: str, sign: int) -> set[tuple[str, str]]:
    """The tasks and ways that are better (1) or worse (-1) than no dropout."""
    return {
        (row["task"], row["way"])
        for row in REPORT["rows"]
        if row["way"] != NONE
        if sign * errors_apart(row["task"], row["way"], NONE, name) > 2
    }


def test_dropout_does_not_help_at_the_end() -> None:
    assert not differing("return", 1)
    assert (CARDS, STRONG) in differing("return", -1)
    assert "no kind of dropout ends better than none, and some end far worse" in PAGE
    gains, losses = (len(differing("shifted_return", sign)) for sign in (1, -1))
    assert (gains, losses) == (1, 6) and "one of twelve is better, and six are worse" in PAGE
    assert "At the end of the training, no way is better than no dropout in any task" in PAGE


def test_cards_are_learned_later_under_dropout() -> None:
    ways = (NONE, WEAK, STRONG)
    ends = [mean(CARDS, way) for way in ways]
    falls = f"from {ends[0]} to {ends[1]} if 0.9 is kept, and to {ends[2]} if 0.7 is kept"
    assert f"In *{CARDS}* consistent dropout lowers the return at the end {falls}" in PAGE
    assert {(CARDS, WEAK), (CARDS, STRONG)} <= differing("return", -1)
    # They still learn: the last four tests are above the four before them.
    for way in (WEAK, STRONG):
        curves = np.array(row_of(CARDS, way)["curves"])
        assert curves[:, -4:].mean() > curves[:, -8:-4].mean() + 0.01
    assert {task for task, way in differing("return_over_time", -1) if way == STRONG} == {
        CARDS,
        POLE,
    }
    assert f"With keep 0.7 the *{POLE}* is learned later too" in PAGE
    assert "Both policies still learn when the training ends" in PAGE


def test_no_ratio_is_clipped_with_ids() -> None:
    consistent = [row for row in REPORT["rows"] if row["way"] != ALONE]
    assert {row["worst_clipped"] for row in consistent} == {0.0}
    off = max(row["ratio_error"] for row in consistent)
    assert f"With ids no ratio is off from 1 by more than {off:.0e}, and none is clipped" in PAGE
    first, second, third = (
        f"{np.mean(row_of(task, ALONE)['clipped']):.1%}" for task in (CARDS, POLE, MAZE)
    )
    told = (
        f"Dropout in the learner alone puts {first} of the ratios outside of 1 ± 0.2 in *{CARDS}*"
    )
    assert f"{told}, {second} in *{POLE}* and {third} in *{MAZE}*." in PAGE


def test_consistent_dropout_is_better_than_dropout_in_the_learner_alone() -> None:
    ends = [mean(CARDS, way) for way in (WEAK, ALONE)]
    assert errors_apart(CARDS, WEAK, ALONE, "return") > 2
    assert f"at the same strength it ends at {ends[1]}, and consistent dropout at {ends[0]}" in PAGE
    collapsed = [value for value in row_of(MAZE, ALONE)["return"] if value < 0.5]
    others = [value for row in REPORT["rows"] if row["task"] == MAZE for value in row["return"]]
    assert len(collapsed) == 1 and sum(value < 0.99 for value in others) == 1
    alone = f"one seed of ten ends at {collapsed[0]:.2f}, and every other seed of every way above"
    assert f"In the *{MAZE}* {alone} 0.99" in PAGE
    assert abs(errors_apart(MAZE, WEAK, ALONE, "return")) < 2 and "not a difference" in PAGE


def test_the_shift_is_borne_better_once_and_worse_elsewhere() -> None:
    assert differing("shifted_return", 1) == {(MAZE, STRONG)}
    shifted = [mean(MAZE, way, "shifted_return") for way in (NONE, STRONG)]
    assert f"keep 0.7 raises the shifted *{MAZE}* from {shifted[0]} to {shifted[1]}" in PAGE
    worse = differing("shifted_return", -1)
    assert {(CARDS, way) for way in (WEAK, STRONG, ALONE)} <= worse
    assert f"The shifted *{CARDS}* is worse under all three" in PAGE
    assert {(POLE, way) for way in (WEAK, STRONG, ALONE)} <= worse
    lower = [mean(POLE, way, "shifted_return") for way in (NONE, WEAK, STRONG, ALONE)]
    falls = f"from {lower[0]} to {lower[1]} with keep 0.9, {lower[2]} with keep 0.7"
    assert f"The shifted *{POLE}* falls {falls}, and {lower[3]} with dropout in the" in PAGE
    assert (POLE, ALONE) in worse and errors_apart(POLE, WEAK, ALONE, "shifted_return") > 2


def test_zoneout_costs_least() -> None:
    later = {task for task, way in differing("return_over_time", -1) if way == ZONEOUT}
    assert later == {CARDS} and f"It delays *{CARDS}*, and makes no" in PAGE
    assert not any(way == ZONEOUT for sign in (1, -1) for _, way in differing("return", sign))
    shifts = {
        (sign, task)
        for sign in (1, -1)
        for task, way in differing("shifted_return", sign)
        if way == ZONEOUT
    }
    assert not shifts and "no difference at the end or under the shift" in PAGE
    short = errors_apart(POLE, NONE, ZONEOUT, "shifted_return")
    assert f"lower by {short:.2f} standard errors, just short of two" in PAGE
    assert short < 2

"""The sentences at the top of *Which scheme?*, each written anew from the stored results."""

import dataclasses
import functools
import importlib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/which_scheme.md"
TASKS = {
    "chorales": "the chorales",
    "words": "words",
    "digits": "digits",
    "sunspots": "the sunspots",
}
GAL, AVERAGED = "Gal, tied", "Gal, tied, Monte Carlo"


@functools.cache
def stored(name: str) -> dict[str, Any]:
    return json.loads((ROOT / f"docs/results/{name}.json").read_text())


LINEAR = {"lru": "LRU", "min_gru": "minGRU"}


def report_of(task: str, cell: str) -> dict[str, Any]:
    """The linear cells ran on another Python's words, so on another text."""
    own_text = task == "words" and cell in LINEAR
    return stored(f"schemes_{task}_3.12.1" if own_text else f"schemes_{task}")


def rows_of(task: str, cell: str = "lstm") -> dict[str, dict[str, Any]]:
    rows = report_of(task, cell)["rows"]
    return {row["scheme"]: row for row in rows if row["cell"] == cell}


def loss(task: str, scheme: str, cell: str = "lstm") -> float:
    return float(np.mean(rows_of(task, cell)[scheme]["test_nll"]))


def error(task: str, scheme: str, cell: str = "lstm") -> float:
    """The standard error of a mean test loss."""
    losses = rows_of(task, cell)[scheme]["test_nll"]
    return float(np.std(losses, ddof=1) / len(losses) ** 0.5)


def gap(task: str, first: str, second: str, cell: str = "lstm") -> float:
    """How far the first loss is above the second, in standard errors."""
    spread = np.hypot(error(task, first, cell), error(task, second, cell))
    return float((loss(task, first, cell) - loss(task, second, cell)) / spread)


def best(task: str, *, one_pass: bool = False) -> str:
    schemes = [name for name in rows_of(task) if not (one_pass and name == AVERAGED)]
    return min(schemes, key=lambda name: loss(task, name))


def gain(task: str, scheme: str, cell: str = "lstm") -> float:
    return loss(task, "none", cell) - loss(task, scheme, cell)


def tasks_with(holds: Any) -> str:
    return " and ".join(name for task, name in TASKS.items() if holds(task))


def costs() -> dict[str, float]:
    """The time of a training, as a multiple of the bare model's."""
    seconds = stored("benchmark_scheme_costs")["seconds"]["lstm"]
    return {name: float(np.median(np.divide(seconds[name], seconds["none"]))) for name in seconds}


def start_with_gal() -> str:
    shares = [
        f"{gain(task, GAL) / gain(task, best(task, one_pass=True)):.0%}"
        for task in ("chorales", "words")
    ]
    worse = [name for name in TASKS if gain(name, GAL) < 0]
    return (
        f"Start with Gal's tied variational dropout, `fdc.recipes.gal2016`. On the chorales it has "
        f"{shares[0]} of the gain of the best scheme that runs once at test time, and on words "
        f"{shares[1]}; its mean loss is {'sometimes' if worse else 'never'} higher than without "
        f"dropout, and training takes {costs()[GAL]:.2f} times as long."
    )


def loss_by_rate(task: str, cell: str = "lstm") -> dict[float, float]:
    """The validation loss without dropout, by the factor of the learning rate."""
    row = rows_of(task, cell)["none"]
    return dict(zip(row["strengths"], row["valid_nll_by_strength"], strict=True))


def what_to_keep() -> str:
    (wide, keep), (small, keep_words), (_, keep_long) = (
        (stored(f"schemes_{task}")["config"]["units"], rows_of(task)[GAL]["strength"])
        for task in ("chorales", "words", "digits")
    )
    return (
        f"Keep {keep} in a layer of {wide} units on the chorales, and {keep_words} in a layer of "
        f"{small} units on words; start from {keep_long} if the network must remember for a long "
        f"time."
    )


def more_is_worse() -> str:
    ratios = []
    for cell in ("lstm", "gru"):
        rows = rows_of("digits", cell)
        bare = loss_by_rate("digits", cell)[1.0]
        for scheme in (GAL, "weight-drop"):
            half = rows[scheme]["strengths"].index(0.5)
            ratios.append(rows[scheme]["valid_nll_by_strength"][half] / bare)
    return (
        f"If the task needs long memory, as with the digits read pixel by pixel, more dropout is "
        f"worse: schemes that keep half of h, or half of its weights, have {min(ratios):.1f} to "
        f"{max(ratios):.1f} times the validation loss without dropout at the same learning rate."
    )


def try_zoneout() -> str:
    cells = [cell for cell in ("lstm", "gru") if gap("digits", "zoneout", "none", cell) < -2]
    (strength,) = {rows_of("digits", cell)["zoneout"]["strength"] for cell in cells}
    names = " and ".join({"lstm": "the LSTM", "gru": "the GRU"}[cell] for cell in cells)
    return f"There, try zoneout with {strength} first: it helps {names}."


def average() -> str:
    same = tasks_with(lambda task: abs(gap(task, AVERAGED, GAL)) < 2)
    return (
        f"Average over Monte Carlo samples if you can pay for them at test time. That is the best "
        f"of all on {tasks_with(lambda task: best(task) == AVERAGED)}; on {same} it makes no "
        f"difference that five seeds can show."
    )


def weight_drop() -> str:
    def close(task: str) -> bool:
        return abs(loss(task, "weight-drop") / loss(task, GAL) - 1) < 0.01

    return f"Weight-drop is within 1% of Gal's scheme on {tasks_with(close)}."


def untied() -> str:
    def gap_of(task: str) -> float:
        return gap(task, "Gal, untied", GAL)

    times = costs()
    others = max(time for name, time in times.items() if name != "Gal, untied")
    return (
        f"Untied masks are better than tied ones on {tasks_with(lambda task: gap_of(task) < -2)}, "
        f"worse on {tasks_with(lambda task: gap_of(task) > 2)}, and no different on "
        f"{tasks_with(lambda task: abs(gap_of(task)) <= 2)}; training takes "
        f"{times['Gal, untied']:.1f} times as long with them, and at most {others:.2f} times with "
        f"every other scheme ([the costs](#cost-of-each-scheme))."
    )


def zaremba() -> str:
    def close(task: str) -> bool:
        return loss(task, "Zaremba") - loss(task, best(task)) < error(task, "Zaremba")

    share = gain("chorales", "Zaremba") / gain("chorales", GAL)
    tuned = (
        tuned_rows("words", "lstm")["Zaremba"]["test_nll"],
        tuned_rows("words", "lstm")[GAL]["test_nll"],
    )
    behind, spread = np.mean(tuned[0]) - np.mean(tuned[1]), np.std(tuned, axis=1, ddof=1)
    assert behind > 2 * np.hypot(*spread) / len(tuned[0]) ** 0.5
    return (
        f"Zaremba's dropout, which leaves the path from step to step alone, is within a standard "
        f"error of the best on {tasks_with(close)}, but {behind:.2f} nats behind Gal's with a "
        f"tuned optimizer; on the chorales it has {share:.0%} of the gain of Gal's."
    )


def train_longer() -> str:
    bare, gal, dropped = (
        round(np.mean(rows_of("chorales")[name]["best_epoch"]))
        for name in ("none", GAL, "weight-drop")
    )
    return (
        f"Dropout needs longer training: on the chorales the LSTM is best after {bare} epochs "
        f"without it, after {gal} with Gal's and after {dropped} with weight-drop."
    )


def not_everywhere() -> str:
    gaps = [
        gap(task, scheme, "none", cell)
        for task in TASKS
        for cell in ("lstm", "gru", *LINEAR)
        for scheme in rows_of(task, cell)
        if scheme != "none"
    ]
    unclear = sum(each >= -2 for each in gaps)
    return (
        f"Dropout does not always help: over all four cells, {unclear} of the {len(gaps)} rows "
        f"with dropout in the tables of the four tasks are not better than none by two standard "
        f"errors. Every run keeps the weights of its best epoch."
    )


def linear_cells() -> str:
    task = "sunspots"
    run_on = {cell: [name for name in TASKS if rows_of(name, cell)] for cell in LINEAR}
    assert all(
        rows_of(name, cell).keys() == rows_of(task, cell).keys()
        for cell, names in run_on.items()
        for name in names
    )
    assert run_on["lru"] == run_on["min_gru"] == [*TASKS]
    losses = {
        (cell, scheme): loss(task, scheme, cell)
        for cell in LINEAR
        for scheme in rows_of(task, cell)
        if scheme != "none"
    }
    ranked = [
        sorted((scheme for at, scheme in losses if at == cell), key=lambda it: losses[cell, it])
        for cell in LINEAR
    ]
    assert ranked[0][:2] == ranked[1][:2] == ["kernel weight-drop", "candidate"]
    clear = sum(gap(task, scheme, "none", cell) < -2 for cell, scheme in losses)
    cell, scheme = min(losses, key=lambda it: losses[it])
    assert losses[cell, scheme] > loss(task, "none")
    return (
        f"On {TASKS[task]}, kernel weight-drop is the best scheme for both, and "
        f"candidate dropout the second; of the {len(losses)} rows with dropout, {clear} are better "
        f"than none by two standard errors. Even so, the best of them, the {LINEAR[cell]} with "
        f"{scheme}, is at "
        f"{losses[cell, scheme]:.2f} behind the LSTM without dropout, at {loss(task, 'none'):.2f}."
    )


def linear_cells_on_all_tasks() -> str:
    """A count of wins and losses, and of the cases in which each scheme is the best."""
    better, worse, firsts = [], set(), []
    for cell in LINEAR:
        gaps = {
            (task, scheme): gap(task, scheme, "none", cell)
            for task in TASKS
            for scheme in rows_of(task, cell)
            if scheme != "none"
        }
        better.append(f"{sum(each < -2 for each in gaps.values())} of the {len(gaps)} rows")
        worse |= {(cell, *at) for at, each in gaps.items() if each > 2}
        for task in TASKS:
            schemes = [scheme for at, scheme in gaps if at == task]
            firsts.append(min(schemes, key=lambda name: loss(task, name, cell)))
    assert {(cell, task) for cell, task, _ in worse} == {("min_gru", "digits")}
    times = Counter(firsts)
    ranked = sorted(times, key=lambda name: -times[name])
    first, *others = ranked
    shares = f"*{first}* wins {times[first]} of the {len(firsts)} pairs of a cell and a task, "
    shares += ", ".join(f"*{name}* {times[name]}" for name in others)
    return (
        f"Over the four tasks, {better[0]} of the LRU with dropout are better than none by two "
        f"standard errors, and {better[1]} of the minGRU; {len(worse)} of the minGRU's are worse, "
        f"all on digits. No scheme is always the best: {shares}."
    )


def linear_cells_on_words() -> str:
    text = report_of("words", "lru")["source"].removeprefix("the language reference of ")
    text = text.removesuffix(", windows of 35 words")
    told = [
        f"The linear cells ran on another edition of the text, that of {text}, so compare each "
        f"only with its own row without dropout. They have two layers and learn at the task's rate."
    ]
    for cell in LINEAR:
        rows = rows_of("words", cell)
        base = report_of("words", cell)["config"]["learning_rate"]
        assert {row["learning_rate"] for row in rows.values()} == {base}
        losses = {name: loss("words", name, cell) for name in rows}
        bare = losses.pop("none")
        first = min(losses, key=lambda name: losses[name])
        epochs = {name: float(np.mean(rows[name]["best_epoch"])) for name in ("none", first)}
        clear = sum(gap("words", name, "none", cell) < -2 for name in losses)
        counted = {1: "Only one", len(losses): "All"}.get(clear, str(clear))
        told.append(
            f"Without dropout the {LINEAR[cell]} is at {bare:.2f} and best after "
            f"{epochs['none']:.0f} epochs; with *{first}* it is at {losses[first]:.2f}, after "
            f"{epochs[first]:.0f}. {counted} of its {len(losses)} "
            f"schemes {'is' if clear == 1 else 'are'} better than none by two standard errors."
        )
    by_rate = loss_by_rate("words", "min_gru")
    assert rows_of("words", "min_gru")["none"]["strength"] == 2.0 == max(by_rate)
    told.append(
        f"Twice the task's rate, the highest of the four, lowers the minGRU's validation loss "
        f"without dropout from {by_rate[1.0]:.2f} to {by_rate[2.0]:.2f}. Its schemes were not "
        f"given that choice, so they may gain more than the table says."
    )
    return " ".join(told)


def min_gru_on_digits() -> str:
    rows = rows_of("digits", "min_gru")
    schemes = [scheme for scheme in rows if scheme != "none"]
    assert all(gap("digits", scheme, "none", "min_gru") > -2 for scheme in schemes)
    worse = [f"*{it}*" for it in schemes if gap("digits", it, "none", "min_gru") > 2]
    rates = {row["learning_rate"] for row in rows.values()}
    factor = rates.pop() / stored("schemes_digits")["config"]["learning_rate"]
    assert not rates
    return (
        f"The minGRU, which is [linear in its state](linear_recurrences.md), has two layers and is "
        f"trained at {factor:.0f} times the task's learning rate. Even so it is far behind the "
        f"LSTM: without dropout at {loss('digits', 'none', 'min_gru'):.2f}, where the LSTM is at "
        f"{loss('digits', 'none'):.2f}. No scheme is better than none by two standard errors, and "
        f"{len(worse)} of {len(schemes)} are worse: {', '.join(worse)}."
    )


def min_gru_on_chorales() -> str:
    rows = rows_of("chorales", "min_gru")
    base = stored("schemes_chorales")["config"]["learning_rate"]
    assert {row["learning_rate"] for row in rows.values()} == {base / 4}
    bare = {cell: loss("chorales", "none", cell) for cell in ("min_gru", "gru", "lstm")}
    assert bare["min_gru"] < bare["lstm"] < bare["gru"]
    losses = {name: loss("chorales", name, "min_gru") for name in rows if name != "none"}
    first = min(losses, key=lambda name: losses[name])
    clear = sum(gap("chorales", name, "none", "min_gru") < -2 for name in losses)
    of_lstm = best("chorales", one_pass=True)
    return (
        f"The minGRU, which is [linear in its state](linear_recurrences.md), has two layers and is "
        f"trained at a quarter of the task's learning rate. Without dropout it is at "
        f"{bare['min_gru']:.2f}, before the LSTM's {bare['lstm']:.2f} and the GRU's "
        f"{bare['gru']:.2f}; with *{first}* it is at {losses[first]:.2f}, where the LSTM's best "
        f"scheme that runs once, *{of_lstm}*, is at {loss('chorales', of_lstm):.2f}. Of its "
        f"{len(losses)} schemes, {clear} are better than none by two standard errors."
    )


def lru_on_chorales() -> str:
    rows = rows_of("chorales", "lru")
    base = stored("schemes_chorales")["config"]["learning_rate"]
    assert {row["learning_rate"] for row in rows.values()} == {base / 4}
    losses = {name: loss("chorales", name, "lru") for name in rows}
    bare = losses.pop("none")
    assert bare > max(loss("chorales", "none", cell) for cell in ("lstm", "gru", "min_gru"))
    first = min(losses, key=lambda name: losses[name])
    epochs = {name: float(np.mean(rows[name]["best_epoch"])) for name in ("none", first)}
    assert all(gap("chorales", name, "none", "lru") < -2 for name in losses)
    return (
        f"The LRU is linear in its state as well, with two layers and the minGRU's learning rate. "
        f"Without dropout it is the worst of the four cells, at {bare:.2f}, and best after "
        f"{epochs['none']:.0f} epochs; with *{first}* it is at {losses[first]:.2f}, after "
        f"{epochs[first]:.0f}. All {len(losses)} schemes are better than none by more than two "
        f"standard errors."
    )


def lru_on_digits() -> str:
    rows = rows_of("digits", "lru")
    schemes = [scheme for scheme in rows if scheme != "none"]
    clear = sum(gap("digits", scheme, "none", "lru") < -2 for scheme in schemes)
    best = min(schemes, key=lambda scheme: loss("digits", scheme, "lru"))
    others = {
        (cell, scheme): loss("digits", scheme, cell)
        for cell in ("lstm", "gru", "min_gru")
        for scheme in rows_of("digits", cell)
    }
    cell, scheme = min(others, key=lambda it: others[it])
    assert cell == "gru" and loss("digits", best, "lru") < others[cell, scheme]
    base = stored("schemes_digits")["config"]["learning_rate"]
    assert {row["learning_rate"] for row in rows.values()} == {base}
    return (
        f"The LRU is linear in its state and has two layers as well, and learns at the task's "
        f"rate. It is at {loss('digits', 'none', 'lru'):.3f} without dropout and at "
        f"{loss('digits', best, 'lru'):.3f} with *{best}*, which is the lowest mean of the table, "
        f"before the GRU's {others[cell, scheme]:.3f} with *{scheme}*. Of its {len(schemes)} "
        f"schemes, {clear} are better than none by two standard errors."
    )


def test_the_page_says_what_a_tuned_rate_is_worth() -> None:
    page = " ".join(PAGE.read_text().split())
    by_rate = loss_by_rate("chorales")
    assert rows_of("chorales")["none"]["strength"] == 0.5
    told = f"validation loss without dropout from {by_rate[1.0]:.2f} to {by_rate[0.5]:.2f}, and"
    assert told in page
    by_rate = loss_by_rate("chorales", "gru")
    assert rows_of("chorales", "gru")["none"]["strength"] == 0.25 == min(by_rate)
    lowest = "and a quarter of it, the lowest of the four rates, the GRU's from"
    told = f"{lowest} {by_rate[1.0]:.2f} to {by_rate[0.25]:.2f}."
    assert told in page
    by_rate = loss_by_rate("digits", "gru")
    assert rows_of("digits", "gru")["none"]["strength"] == 2.0
    told = f"GRU's validation loss without dropout from {by_rate[1.0]:.2f} to {by_rate[2.0]:.2f}"
    assert told in page


def schemes_at_the_rate_of_none() -> str:
    """Two schemes on the GRU, at the learning rate that is best without dropout."""
    low, base = stored("rates_chorales"), stored("schemes_chorales")
    none = rows_of("chorales", "gru")["none"]
    moved, gains = [], []
    for row in low["rows"]:
        assert row["cell"] == "gru" and row["epochs"] == none["epochs"]
        assert row["learning_rate"] == none["strength"] * base["config"]["learning_rate"]
        other = rows_of("chorales", "gru")[row["scheme"]]
        assert row["strengths"] == other["strengths"] and row["seed"] == other["seed"]
        losses = [float(np.mean(each["test_nll"])) for each in (row, other)]
        moved.append(f"{losses[0]:.2f} instead of {losses[1]:.2f} with *{row['scheme']}*")
        valid = [min(each["valid_nll_by_strength"]) for each in (row, other)]
        gains.append(f"{np.mean(none['test_nll']) - losses[int(np.argmin(valid))]:.2f}")
    return (
        f"At a quarter of the rate, the GRU is at {' and at '.join(moved)}. If validation picks "
        f"one of the two rates for each scheme, they gain {' and '.join(gains)} nats per step over "
        f"no dropout (`docs/results/rates_chorales.json`)."
    )


CELL_NAMES = {"lstm": "the LSTM", "gru": "the GRU"}


def tuned_rows(task: str, cell: str) -> dict[str, dict[str, Any]]:
    """The rows under equal budgets."""
    rows = stored(f"equal_budgets_{task}")["rows"]
    return {row["scheme"]: row for row in rows if row["cell"] == cell}


def tuned_loss(task: str, cell: str, scheme: str) -> float:
    return float(np.mean(tuned_rows(task, cell)[scheme]["test_nll"]))


def tuned_gain(task: str, cell: str, scheme: str) -> float:
    return tuned_loss(task, cell, "none") - tuned_loss(task, cell, scheme)


def valid_at(task: str, cell: str, scheme: str, **setting: float) -> float:
    """The best validation loss of one seed at the settings with these values."""
    row = tuned_rows(task, cell)[scheme]
    pairs = zip(row["settings"], row["valid_nll_by_setting"], strict=True)
    return min(loss for each, loss in pairs if each | setting == each)


AS_IN_THE_TASK = {"rate": 1.0, "weight_decay": 0.0}


def listed(numbers: list[float]) -> str:
    *first, last = [f"{number:g}" for number in numbers]
    return f"{', '.join(first)} and {last}"


def the_settings_of(task: str) -> str:
    """The rates and decays that a task's rows pick from, which are twelve settings for each."""
    rows = stored(f"equal_budgets_{task}")["rows"]
    assert {len(row["settings"]) for row in rows} == {12}
    none = [row for row in rows if row["scheme"] == "none"]
    dropped = [row for row in rows if row["scheme"] != "none"]
    rates, decays = (
        sorted({setting[key] for row in none for setting in row["settings"]})
        for key in ("rate", "weight_decay")
    )
    assert len(rates) == 3 and len(decays) == 4
    tried = [{(it["rate"], it["weight_decay"]) for it in row["settings"]} for row in dropped]
    pairs = sorted(tried[0])
    assert len(pairs) == 3 and all(each == tried[0] for each in tried)
    assert all(len({it["strength"] for it in row["settings"]}) == 4 for row in dropped)
    told = [f"{rate:g} with {decay:g}" for rate, decay in pairs]
    return (
        f"The rates are {listed(rates)} times the task's, and the decays {listed(decays)}; the "
        f"pairs are {', '.join(told[:-1])} and {told[-1]}."
    )


def the_settings_on_words() -> str:
    text = stored("equal_budgets_words")["source"].removeprefix("the language reference of ")
    text = text.removesuffix(", windows of 35 words")
    return f"{the_settings_of('words')} The text is that of {text}, as for the linear cells."


def the_settings_on_chorales() -> str:
    """The settings, and the schemes that were run: not all yet."""
    lstm, gru = (tuned_rows("chorales", cell).keys() for cell in CELL_NAMES)
    assert gru == {"none", GAL, AVERAGED} and lstm == gru | {"weight-drop"}
    return (
        f"{the_settings_of('chorales')} Of the schemes, Gal's tied dropout was run and, with the "
        f"LSTM, weight-drop."
    )


def optimizer_or_dropout(task: str, cell: str) -> tuple[float, float, str, float]:
    """Validation losses of one seed, without dropout and with, each tuned in one way only.

    They are that without dropout at the task's optimizer, and at the best one; then the scheme that
    is best at the task's optimizer, and its loss.
    """
    dropped = [scheme for scheme in tuned_rows(task, cell) if scheme not in ("none", AVERAGED)]
    alone = {scheme: valid_at(task, cell, scheme, **AS_IN_THE_TASK) for scheme in dropped}
    best = min(alone, key=lambda scheme: alone[scheme])
    bare = valid_at(task, cell, "none", **AS_IN_THE_TASK)
    return bare, valid_at(task, cell, "none"), best, alone[best]


def decay_and_dropout() -> str:
    told = []
    for cell, name in CELL_NAMES.items():
        bare, tuned, best, alone = optimizer_or_dropout("words", cell)
        assert max(tuned, alone) < bare
        told.append(
            f"With {name}, a larger learning rate and weight decay lower the validation loss "
            f"without dropout from {bare:.2f} to {tuned:.2f}; the best scheme with the task's own "
            f"optimizer, *{best}*, lowers it to {alone:.2f}."
        )
    rows = stored("equal_budgets_words")["rows"]
    largest = {max(setting["rate"] for setting in row["settings"]) for row in rows}
    assert {row["rate"] for row in rows} == largest
    for cell in CELL_NAMES:
        before = rows_of("words", cell).keys() - {"none"}
        assert tuned_rows("words", cell).keys() >= before
        assert all(tuned_gain("words", cell, it) > gain("words", it, cell) for it in before)
    told.append(
        "But the gains of dropout grow, as the next table shows. It compares gains alone, because "
        "the rows in [Words](#words) are of another edition of the text. Every row picks the "
        "largest of its rates, so a wider search may still lower all of them."
    )
    return " ".join(told)


def gal_on_chorales() -> tuple[list[float], list[float]]:
    """The gains of Gal's scheme under equal budgets and before, with the LSTM and the GRU."""
    now = [tuned_gain("chorales", cell, GAL) for cell in CELL_NAMES]
    return now, [gain("chorales", GAL, cell) for cell in CELL_NAMES]


def optimizer_on_chorales() -> str:
    told = []
    for cell, name in CELL_NAMES.items():
        bare, tuned, best, alone = optimizer_or_dropout("chorales", cell)
        assert alone < tuned < bare
        told.append(
            f"With {name}, the best of the twelve optimizers lowers the validation loss without "
            f"dropout from {bare:.2f}, at the task's own, to {tuned:.2f}; *{best}* with the task's "
            f"own optimizer lowers it to {alone:.2f}."
        )
    now, before = gal_on_chorales()
    assert all(abs(new - old) < 0.05 for new, old in zip(now, before, strict=True))
    lstm, gru = (tuned_rows("chorales", cell)["none"] for cell in CELL_NAMES)
    assert lstm["rate"] == max(setting["rate"] for setting in lstm["settings"])
    assert gru["weight_decay"] == max(setting["weight_decay"] for setting in gru["settings"])
    told.append(
        "So dropout is worth more here than a tuned optimizer, and its gains stay, as the next "
        "table shows. Without dropout, the LSTM picks the largest of its rates and the GRU the "
        "largest of its decays, so a wider search may still lower both."
    )
    return " ".join(told)


def tune_the_optimizer() -> str:
    now = [tuned_gain("words", cell, GAL) for cell in CELL_NAMES]
    before = [gain("words", GAL, cell) for cell in CELL_NAMES]
    assert all(new > old for new, old in zip(now, before, strict=True))
    (strength,) = {tuned_rows("words", cell)[GAL]["strength"] for cell in CELL_NAMES}
    (weaker,) = {rows_of("words", cell)[GAL]["strength"] for cell in CELL_NAMES}
    assert strength > weaker
    here, there = gal_on_chorales()
    _, tuned, _, alone = optimizer_or_dropout("words", "lstm")
    assert tuned < alone - 0.1
    _, tuned, _, alone = optimizer_or_dropout("words", "gru")
    assert abs(tuned - alone) < 0.02
    return (
        f"Tune the learning rate and the weight decay as well ([equal budgets](#equal-budgets)). "
        f"On words they are worth more than dropout with the LSTM, and as much with the GRU. "
        f"With a tuned optimizer, dropout gains more, not less: Gal's scheme {now[0]:.2f} nats per "
        f"word with the LSTM and {now[1]:.2f} with the GRU, instead of {before[0]:.2f} and "
        f"{before[1]:.2f}. It keeps {strength} there instead of {weaker}. On the chorales a tuned "
        f"optimizer is worth less than dropout, and Gal's scheme gains {here[0]:.2f} and "
        f"{here[1]:.2f} nats per step, instead of {there[0]:.2f} and {there[1]:.2f}."
    )


def what_is_left_of_each_gain(task: str) -> str:
    """A table of the gains over no dropout, under equal budgets and before."""
    unit, section = {
        "words": ("word", "[Words](#words)"),
        "chorales": ("step", "[JSB chorales](#jsb-chorales)"),
    }[task]
    names = dict.fromkeys(name for cell in CELL_NAMES for name in tuned_rows(task, cell))
    lines = [
        f"| gain over none, nats per {unit} | LSTM | LSTM in {section} | GRU | GRU in {section} |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        if name == "none":
            continue
        gains = [name]
        for cell in CELL_NAMES:
            is_here, was_there = name in tuned_rows(task, cell), name in rows_of(task, cell)
            now = tuned_gain(task, cell, name) if is_here else None
            before = gain(task, name, cell) if was_there else None
            gains += ["" if each is None else f"{each:.2f}" for each in (now, before)]
        lines.append(f"| {' | '.join(gains)} |")
    return "\n".join(lines)


SENTENCES = [
    start_with_gal,
    what_to_keep,
    more_is_worse,
    try_zoneout,
    average,
    weight_drop,
    untied,
    zaremba,
    train_longer,
    tune_the_optimizer,
    not_everywhere,
]


PARAGRAPHS = [
    linear_cells,
    linear_cells_on_all_tasks,
    linear_cells_on_words,
    min_gru_on_chorales,
    lru_on_chorales,
    min_gru_on_digits,
    lru_on_digits,
    schemes_at_the_rate_of_none,
    the_settings_on_words,
    the_settings_on_chorales,
    optimizer_on_chorales,
    decay_and_dropout,
]


@pytest.mark.parametrize("task", ["words", "chorales"])
def test_the_page_says_what_is_left_of_each_gain(task: str) -> None:
    assert what_is_left_of_each_gain(task) in PAGE.read_text()


@pytest.mark.parametrize("paragraph", PARAGRAPHS)
def test_the_page_says_how_linear_cells_and_other_rates_fare(paragraph: Callable[[], str]) -> None:
    assert paragraph() in " ".join(PAGE.read_text().split())


def page_sentences() -> list[str]:
    top = PAGE.read_text().split("\n## ")[0]
    return [" ".join(item.split()) for item in re.split(r"^\d+\. ", top, flags=re.M)[1:]]


@pytest.mark.parametrize("number", range(len(SENTENCES)))
def test_the_page_says_what_the_results_say(number: int) -> None:
    assert "These are the results in eleven points." in PAGE.read_text() and len(SENTENCES) == 11
    assert len(page_sentences()) == len(SENTENCES)
    assert page_sentences()[number] == SENTENCES[number]()


if __name__ == "__main__":
    for number, sentence in enumerate(SENTENCES, 1):
        print(f"{number}. {sentence()}")


def test_the_page_says_which_noises_each_scheme_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paragraph on one strength for all noises, beside the specs that the benchmark trains."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    noises, benchmark = (importlib.import_module(name) for name in ("scheme_noises", "schemes"))
    page = " ".join(PAGE.read_text().split())
    assert "All schemes except zoneout and weight noise also drop the layer's output" in page
    assert "per step in Zaremba's and Semeniuta's, once per sequence in the others" in page
    assert "Zoneout of an LSTM uses the strength for c and a third of it for h" in page
    for cell, names in noises.COMPARED.items():
        for name in set(names) - {"none"}:
            spec = noises.SCHEMES[name].noise(0.6, 0.7, cell)
            if "zoneout" in name or name == "weight noise":
                assert spec.input is None and spec.output is None, name
                continue
            assert spec.output.keep_prob == 0.6, name
            assert spec.output.variational == (name not in ("Zaremba", "Semeniuta")), name
    zoned = noises.SCHEMES["zoneout"].noise(0.6, 0.7, "lstm")
    assert (zoned.state[0].prob, zoned.inside["hidden"].prob) == (0.6, 0.6 / 3)
    samples = {field.name: field.default for field in dataclasses.fields(benchmark.Config)}
    assert f"averages the probabilities of {samples['mc_samples']} samples" in page
    candidate = noises.SCHEMES["candidate"].noise(0.6, 0.7, "lru").inside["candidate"]
    assert "*candidate* adds per-step dropout" in page and not candidate.variational

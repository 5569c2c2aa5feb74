"""The numbers in README and docs are those of the stored results; their links lead somewhere."""

import importlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_language_models_table() -> None:
    """A row per seed: validation and test perplexity, without dropout and with."""
    page = (ROOT / "docs/results.md").read_text()
    gains = []
    for path in sorted((ROOT / "docs/results").glob("language_model_seed*.json")):
        report = json.loads(path.read_text())
        bare, dropped = report["results"]
        row = f"| {report['config']['seed']} | " + " | ".join(
            f"{bare[split]:.1f} | {dropped[split]:.1f} | {dropped[split] / bare[split] - 1:+.1%}"
            for split in ("valid", "test")
        )
        assert row in page, row
        assert f"with Python {report['versions']['python']}" in page
        gains.append(1 - dropped["test"] / bare["test"])
    gain = f"falls by {min(gains):.0%} to {max(gains):.0%}, over three seeds"
    assert len(gains) == 3 and gain in " ".join((ROOT / "README.md").read_text().split())


def test_the_language_models_learning_rates() -> None:
    """A row per learning rate: the best validation perplexity, without dropout and with."""
    page = (ROOT / "docs/results.md").read_text()
    report = json.loads((ROOT / "docs/results/language_model_rates.json").read_text())
    rows: dict[str, dict[str, str]] = {}
    for run in report["runs"]:
        factor = "" if run["decay"] == 1 else f", times {run['decay']} after each epoch"
        row = rows.setdefault(f"{run['learning_rate']}{factor}", {})
        row[run["scheme"]] = f"{min(run['valid']):.1f}"
    for rate, best in rows.items():
        assert f"| {rate} | {best['none']} | {best.get('variational', '')} |" in page, rate
    bare, dropped = (
        min(float(best[scheme]) for best in rows.values() if scheme in best)
        for scheme in ("none", "variational")
    )
    assert f"falls from {bare} to {dropped} only" in " ".join(page.split())
    gain = f"if each model has its best rate, by {1 - dropped / bare:.0%} on validation"
    assert gain in " ".join((ROOT / "README.md").read_text().split())


def test_the_papers_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row per configuration, which says so where it was not trained."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    configs, report = (importlib.import_module(name) for name in ("configs", "report"))
    page = (ROOT / "docs/results.md").read_text()
    for name in configs.CONFIGS:
        path = ROOT / f"docs/results/ptb_{name}.json"
        (row,) = re.findall(rf"^\| `{name}` \| [^|]+ \| (.*) \|$", page, re.MULTILINE)
        stored = json.loads(path.read_text()) if path.exists() else None
        assert row == (
            " | ".join(["not run", "", "", ""]) if stored is None else report.format_row(stored)
        )


def read_ptb(name: str) -> tuple[dict[str, Any], str]:
    """A stored run of a configuration, and its row on the page."""
    stored = json.loads((ROOT / f"docs/results/ptb_{name}.json").read_text())
    page = " ".join((ROOT / "docs/results.md").read_text().split())
    assert f"took {stored['seconds'] / 3600:.1f} hours on two cores of a CPU" in page
    return stored, page


def test_what_the_page_says_of_zaremba_small() -> None:
    stored, page = read_ptb("zaremba-small")
    assert stored["best_epoch"] == 6 and "overfits from its sixth epoch on" in page
    valid = stored["curves"]["valid"]
    assert min(valid[6:]) > valid[5]
    assert stored["test_perplexity"] < 117


def test_what_the_page_says_of_inan_small() -> None:
    stored, page = read_ptb("inan-small")
    settings, others = stored["settings"], read_ptb("zaremba-small")[0]["settings"]
    assert settings["scheme"] == "variational" and settings["tied"]
    assert all(
        settings[size] == others[size] for size in ("hidden_size", "embedding_size", "layers")
    )
    assert stored["best_epoch"] == stored["epochs"] and "still learns in its last epoch" in page
    worse = stored["mc_test_perplexity"] - stored["test_perplexity"]
    assert f"the average over samples is worse by {worse:.1f}" in page
    assert stored["test_perplexity"] < 85.1


def test_what_the_page_says_of_monte_carlo(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/results.md").read_text()
    report = json.loads((ROOT / "docs/results/monte_carlo_inan-small.json").read_text())
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    assert importlib.import_module("monte_carlo").format_table(report) in page
    assert report["command"] in page
    once, rows = report["without_noise"], [row["perplexity"] for row in report["rows"]]
    few, many = (
        [row["perplexity"] for row in report["rows"] if row["samples"] == samples]
        for samples in (20, 100)
    )
    assert len(few) == len(many) == 3 and len(rows) == 6
    stored = json.loads((ROOT / "docs/results/ptb_inan-small.json").read_text())
    assert math.isclose(once, stored["test_perplexity"], rel_tol=1e-6)  # of the same weights

    def span(values: list[float]) -> str:
        least, most = f"{min(values):.1f}", f"{max(values):.1f}"
        return least if least == most else f"{least} to {most}"

    text = " ".join(page.split())
    worse, better = (
        span([row["1.0"] - once for row in few]),
        span([once - row["1.0"] for row in many]),
    )
    told = f"With 20, the arithmetic mean is worse than one pass without noise by {worse}, however"
    assert f"{told} long the masks stay; with 100 it is better by {better}." in text
    assert all(row["1.0"] < once for row in many) and "and better if there are 100" in text
    assert all(min(row, key=row.__getitem__) == "0.5" for row in rows)
    gains = [span([once - row["0.5"] for row in some]) for some in (few, many)]
    told = (
        f"best in every row: better than one pass by {gains[0]} with 20 samples, and by {gains[1]}"
    )
    assert f"{told} with 100." in text


def test_stored_commands_name_no_machines_paths() -> None:
    for path in (ROOT / "docs/results").glob("*.json"):
        report = json.loads(path.read_text())
        for run in (report, *report.get("rows", ())):
            assert " /" not in run.get("command", ""), path.name


def rows_of(task: str, cell: str) -> dict[str, dict[str, Any]]:
    report = json.loads((ROOT / f"docs/results/schemes_{task}.json").read_text())
    return {row["scheme"]: row for row in report["rows"] if row["cell"] == cell}


def test_the_chorales_are_within_reach_of_what_is_published() -> None:
    page = " ".join((ROOT / "docs/which_scheme.md").read_text().split())
    nlls = [np.mean(row["test_nll"]) for row in rows_of("chorales", "lstm").values()]
    assert min(nlls) < 8.20 and np.median(nlls) < 8.35
    median = (
        f"the median of all nine rows, including the one without dropout, is {np.median(nlls):.2f};"
    )
    assert len(nlls) == 9 and f"the best row is at {min(nlls):.2f}, and {median}" in page


def test_what_the_readme_says_of_equal_budgets() -> None:

    def losses(task: str, cell: str) -> list[str]:
        report = json.loads((ROOT / f"docs/results/equal_budgets_{task}.json").read_text())
        tested = {(row["cell"], row["scheme"]): np.mean(row["test_nll"]) for row in report["rows"]}
        return [f"{tested[cell, name]:.2f}" for name in ("none", "Gal, tied")]

    notes, lstm, gru = losses("chorales", "lstm"), losses("words", "lstm"), losses("words", "gru")
    told = (
        f"that LSTM's test loss on the chorales falls from {notes[0]} to {notes[1]}, a word-level "
        f"LSTM's from {lstm[0]} nats per word to {lstm[1]}, and a word-level GRU's from {gru[0]} "
        f"to {gru[1]} ([equal budgets]"
    )
    assert told in " ".join((ROOT / "README.md").read_text().split())


def test_what_the_readme_says_of_the_chorales() -> None:
    rows = rows_of("chorales", "lstm")
    none, gal, averaged = (
        f"{np.mean(rows[name]['test_nll']):.2f}"
        for name in ("none", "Gal, tied", "Gal, tied, Monte Carlo")
    )
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"from {none} nats per step to {gal} with `gal2016`, and to {averaged}" in readme
    index = " ".join((ROOT / "docs/index.md").read_text().split())
    assert f"from {none} nats per step to {gal}, and to {averaged} if predictions are av" in index


def test_names_that_people_search_for_lead_somewhere() -> None:
    page = (ROOT / "docs/find.md").read_text()
    for name in ("MultiRNNCell", "seq2seq", "ConvLSTM", "TrainState", "bfloat16", "stateful"):
        (row,) = re.findall(rf"^\| [^|]*{name}[^|]* \| (.+) \|$", page, re.M)
        assert "](" in row or "`" in row, name


def tables() -> Any:
    return importlib.import_module("scheme_tables")


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_the_schemes_tables() -> None:
    """The tables of all comparisons are on the page, as `scheme_tables.py` prints them."""
    page = (ROOT / "docs/which_scheme.md").read_text()
    for path in (ROOT / "docs/results").glob("schemes_*.json"):
        report = json.loads(path.read_text())
        assert tables().format_table(report) in page, path.name
        assert tables().format_verdict(report) in page, path.name
        config = report["config"]
        sizes = f"{config['units']} units, {config['epochs']} epochs, batches of {config['batch']}"
        assert sizes in " ".join(page.split()), path.name
        for row in report["rows"]:
            tuned_rate = row["scheme"] == "none" and len(row["strengths"]) > 1
            of_cpu = tuned_rate or row["cell"] in ("lru", "min_gru")
            wanted = ("cpu, x86_64", "0.12.0.1") if of_cpu else ("NVIDIA H200, x86_64", "0.11.2")
            assert (row["device"], row["versions"]["jax"]) == wanted
    told = (
        "Rows with *rate x* and those of linear cells ran on two cores of a CPU with JAX 0.12.0.1"
    )
    assert f"{told}, all others on an NVIDIA H200 with JAX 0.11.2" in " ".join(page.split())
    for path in (ROOT / "docs/results").glob("equal_budgets_*.json"):
        report = json.loads(path.read_text())
        assert tables().format_table(report) in page, path.name
        assert tables().format_verdict(report) in page, path.name
        of_run = {(row["device"], row["versions"]["jax"]) for row in report["rows"]}
        assert of_run == {("cpu, x86_64", "0.12.0.1")}
    costs = importlib.import_module("scheme_costs")
    assert costs.format_table(benchmark("scheme_costs")) in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_each_page_is_in_the_table_of_contents() -> None:
    """Tutorials too; their code is run where the site is built."""
    index = (ROOT / "docs/index.md").read_text()
    for page in PAGES[1:]:
        name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
        assert name == "index" or f"\n{name}\n" in index, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page) -> None:
    """A claim that names its test, as `test_file.py::test_name` or `test_name`, has one."""
    sources = {path.name: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    everything = "\n".join(sources.values())
    for file, name in re.findall(
        r"`(?:tests/)?(test_\w+\.py)?(?:::)?((?:test_|Test)\w+)?`", page.read_text()
    ):
        assert not file or file in sources, file
        kind = "class" if name.startswith("Test") else "def"
        assert not name or re.search(rf"{kind} {name}\b", sources.get(file, everything)), name


def test_how_far_off_ratios_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of `ratios.py`, the largest ratio with ids, and the sizes that the page names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    program = importlib.import_module("ratios")
    page = (ROOT / "docs/rl.md").read_text()
    result = json.loads((ROOT / "docs/results/ratios.json").read_text())
    assert program.format_table(result) in page
    words = " ".join(page.split())
    largest = max(max(run["curves"]["largest with ids"]) for run in result["runs"])
    assert f"off from 1 by more than {largest:.0e}" in words
    assert f"before each of {result['updates']} updates" in words
    assert f"GRU of {program.UNITS} units" in words and f"{program.SYMBOLS} actions" in words


def benchmark(name: str) -> dict[str, Any]:
    return json.loads((ROOT / f"docs/results/benchmark_{name}.json").read_text())


def test_the_benchmarks_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page shows the output of `compare.py` for the stored results."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    compare = importlib.import_module("compare")
    page = (ROOT / "docs/benchmarks.md").read_text()
    runs = [benchmark(f"table_{number}") for number in (1, 2, 3)]
    for name in ("scan: variational", "scan: per step, 0.7", "scan: per step, 0.5"):
        rows = [{row["name"]: row for row in run["rows"]} for run in runs]
        cells = [name]
        for part in ("forward", "gradient"):
            medians = [compare.ratios(row[name], row["scan: bare"], part)[1] for row in rows]
            cells.append(", ".join(f"{median:.2f}" for median in medians))
        sizes = [rows[0][which]["gradient_bytes"] for which in (name, "scan: bare")]
        line = f"| {' | '.join([*cells, f'{sizes[0] / sizes[1]:.2f}'])} |"
        assert line in page
    peers, small = benchmark("peers"), [benchmark(f"small_{number}") for number in (1, 2, 3)]
    for result in (runs[0], peers, small[0]):
        assert compare.format_table(result["rows"]) in page
    ahead, *in_the_loop = (
        [
            f"{compare.ratios(rows[name], rows['scan: bare'], 'forward')[1]:.2f}"
            for run in small
            for rows in [{row["name"]: row for row in run["rows"]}]
        ]
        for name in ("scan: per step, 0.7", "nn.RNN: per step, 0.7", "nnx.RNN: per step, 0.7")
    )
    text = " ".join(page.split())
    assert f"masks of 0.7 takes {ahead[0]}, {ahead[1]} and {ahead[2]} times as long" in text
    least, most = (pick([*in_the_loop[0], *in_the_loop[1]]) for pick in (min, max))
    assert f"and {least} to {most} times as long with a `DropoutCell`." in text
    assert compare.format_sweep(benchmark("sweep")["points"]) in page
    gradients = [
        compare.ratios(row, point["rows"][0], "gradient")[1]
        for point in benchmark("sweep")["points"]
        for row in point["rows"][1:]
    ]
    assert f"more than {100 * (max(gradients) - 1):.0f} percent" in page
    ours = [row for row in benchmark("table_rbg")["rows"] if row["name"].startswith(("scan", "nn"))]
    assert compare.format_table(ours) in page
    for name, version in [*runs[0]["versions"].items(), *peers["versions"].items()]:
        assert f"{name} {version}" in page


BENCHMARKS = {
    "cells": ["cells_1", "cells_2", "cells_3"],
    "layers_and_resets": ["layers_and_resets"],
    "untied": ["untied_1", "untied_2", "untied_3"],
    "own_cells": ["own_cells_1", "own_cells_2", "own_cells_3"],
    "few_rows": ["few_rows_1", "few_rows_2", "few_rows_3"],
    "hoisting": ["hoisting"],
    "long_sequences": ["long_sequences"],
}


def assert_goals_are_told(module: Any, runs: list[dict[str, Any]], page: str) -> None:
    """The page says how many ratios to Flax's faster cell are above the goals."""

    def missed(part: str, kind: str) -> int:
        rows = zip(*(run["rows"] for run in runs), strict=True)
        found = [[module.ratios(row, part, kind) for row in same] for same in rows]
        goal = {"forward": 1.03, "gradient": 1.02}[part]
        medians = [
            np.median([each[noise] for each in same]) for same in found for noise in module.NOISES
        ]
        assert len(medians) == 16
        return sum(median > goal for median in medians)

    cpu, clock = (
        [missed(part, kind) for part in ("gradient", "forward")] for kind in ("seconds", "clock")
    )
    told = f"{cpu[0]} of 16 gradients and {cpu[1]} of 16 forward passes miss it, in the median of "
    assert f"{told}three runs; on the clock, {clock[0]} and {clock[1]} do." in page


@pytest.mark.parametrize("program", BENCHMARKS)
def test_the_table_of_each_benchmark(program, monkeypatch) -> None:
    """The page shows the output of a program for the stored results."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module(program)
    page = (ROOT / "docs/benchmarks.md").read_text()
    results = [benchmark(name) for name in BENCHMARKS[program]]
    assert module.format_table(*results) in page
    if program == "cells":
        assert module.format_summary(*results) in page
        assert module.format_summary(*results) in (ROOT / "README.md").read_text()
    assert all(result["command"] in page for result in results if "command" in result)
    if program == "few_rows":
        parts = [
            np.median([module.ratio(run["rows"][0], part) for run in results])
            for part in ("forward", "gradient")
        ]
        assert f"reaches {parts[0]:.2f} and {parts[1]:.2f}" in page
    if program == "own_cells":
        assert_goals_are_told(module, results, " ".join(page.split()))
    if program == "long_sequences":
        config, row = results[0]["config"], results[0]["rows"][-1]
        outputs = 4 * row["length"] * config["batch"] * config["features"]
        assert f"take {(row['bytes'][1] - 2 * outputs) / 2**20:.1f} MiB" in page
    if program == "hoisting":
        worst = max(map(module.cost, results[0]["rows"]))
        assert f"takes {worst:.2f} times as long" in page


# Of benchmarks that came later than the page; a table is due as soon as there is a stored run.
LATER = {
    "linear": "linear_recurrences",
    "gpu": "benchmarks",
}


def is_stored(program: str) -> bool:
    return (ROOT / f"docs/results/benchmark_{program}.json").exists()


@pytest.mark.parametrize("program", [*filter(is_stored, LATER)])
def test_the_table_of_each_stored_run(program, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    result = benchmark(program)
    page = (ROOT / f"docs/{LATER[program]}.md").read_text()
    assert importlib.import_module(program).format_table(result) in page
    assert result["command"] in page

"""The table and the figure of `rl.py`, from its JSON; run with JSONs' paths, it makes them."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scheme_tables import format_row

BARE = "no dropout"
MEASURES = {
    "return_over_time": "mean over the training",
    "return": "at the end",
    "shifted_return": "shifted test",
}


def format_table(report: dict[str, Any]) -> str:
    """A row per task and way: means over the seeds, standard errors, and how it compares."""
    head = ["task", "way", *MEASURES.values(), "clipped, mean", "clipped, worst"]
    lines = [format_row(head), "|---" * len(head) + "|"]
    for row in report["rows"]:
        cells = [row["task"], row["way"], *(format_mean(report, row, name) for name in MEASURES)]
        clipped = [f"{np.mean(row['clipped']):.1%}", f"{row['worst_clipped']:.0%}"]
        lines.append(format_row(cells + clipped))
    return "\n".join(lines)


def mean_of(values: list[float]) -> tuple[float, float]:
    """The mean over the seeds, and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def find(report: dict[str, Any], task: str, way: str) -> dict[str, Any] | None:
    rows = [row for row in report["rows"] if (row["task"], row["way"]) == (task, way)]
    return rows[0] if rows else None


def difference_of(row: dict[str, Any], bare: dict[str, Any], name: str) -> tuple[float, float]:
    """How far a way's mean is above the bare policy's, and the standard error of that."""
    (ours, our_error), (theirs, their_error) = mean_of(row[name]), mean_of(bare[name])
    return ours - theirs, float(np.hypot(our_error, their_error))


def verdict_of(report: dict[str, Any], row: dict[str, Any], name: str) -> str:
    """If a mean differs from the bare policy's by more than two standard errors: how."""
    bare = find(report, row["task"], BARE)
    if bare is None:
        return ""
    difference, error = difference_of(row, bare, name)
    if abs(difference) <= 2 * error:
        return ""
    return "better" if difference > 0 else "worse"


def format_mean(report: dict[str, Any], row: dict[str, Any], name: str) -> str:
    mean, error = mean_of(row[name])
    verdict = verdict_of(report, row, name)
    return f"{mean:.3f} ± {error:.3f}" + (f", **{verdict}**" if verdict else "")


def draw(report: dict[str, Any], path: Path) -> None:
    """Returns over time, a panel per task: means over the seeds, and two standard errors."""
    tasks = [*dict.fromkeys(row["task"] for row in report["rows"])]
    ways = [*dict.fromkeys(row["way"] for row in report["rows"])]
    figure = Figure(figsize=(4 * len(tasks), 4.2), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    config = report["config"]
    for axes, task in zip(panels, tasks, strict=True):
        for row in report["rows"]:
            if row["task"] != task:
                continue
            curves = np.array(row["curves"])
            mean, error = curves.mean(0), curves.std(0, ddof=1) / np.sqrt(len(curves))
            times = (1 + np.arange(len(mean))) * config["iterations"] // config["tests"]
            color = f"C{ways.index(row['way'])}" if row["way"] != BARE else "black"
            axes.plot(times, mean, label=row["way"], color=color)
            axes.fill_between(times, mean - 2 * error, mean + 2 * error, color=color, alpha=0.15)
        axes.set(title=task, xlabel="iteration")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("return in evaluation mode")
    panels[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        report = json.loads(path.read_text())
        print(format_table(report))
        draw(report, path.with_suffix(".png"))
        print(f"wrote {path.with_suffix('.png')}")

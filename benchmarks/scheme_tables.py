"""The table and the figure of `schemes.py`, from its JSON; run with JSONs' paths, it makes them."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

AGAINST = "against none (in standard errors)"


def format_table(report: dict[str, Any]) -> str:
    """A row per scheme and cell: what was picked, and the test over the seeds."""
    scored = report["score"] is not None
    head = ["scheme", "cell", "picked", f"test, nats per {report['unit']}", AGAINST]
    lines = [format_row([*head, report["score"]] if scored else head)]
    lines.append("|---" * (len(head) + scored) + "|")
    for row in report["rows"]:
        bare = find(report, row["cell"], "none")
        change = ""
        if bare is not None and bare is not row:
            gain, error = gain_of(row, bare)
            change = f"{-gain:+.{places(report)}f} ({abs(gain) / error:.1f})"
        test = format_test(row, places(report))
        cells = [row["scheme"], row["cell"], format_picked(row), test, change]
        if scored:
            cells.append(f"{np.mean(row['test_score']):.1%}")
        lines.append(format_row(cells))
    return "\n".join(lines)


def format_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def format_picked(row: dict[str, Any]) -> str:
    """The strength, the factor of the learning rate and the weight decay, as far as tuned."""
    if "rate" in row:
        strength = "" if row["scheme"] == "none" else f"{row['strength']:g}, "
        return f"{strength}rate x {row['rate']:g}, decay {row['weight_decay']:g}"
    if row["scheme"] != "none":
        return f"{row['strength']:g}"
    return f"rate x {row['strength']:g}" if row["strength"] else ""  # 0: an untuned row


def format_test(row: dict[str, Any], places: int) -> str:
    test = np.array(row["test_nll"])
    return f"{test.mean():.{places}f} ± {test.std(ddof=1):.{places}f}"


def places(report: dict[str, Any]) -> int:
    """Decimal places: three where the numbers are below one."""
    return 3 if np.mean(report["rows"][0]["test_nll"]) < 1 else 2


def find(report: dict[str, Any], cell: str, scheme: str) -> dict[str, Any] | None:
    rows = [row for row in report["rows"] if (row["cell"], row["scheme"]) == (cell, scheme)]
    return rows[0] if rows else None


def gain_of(row: dict[str, Any], bare: dict[str, Any]) -> tuple[float, float]:
    """How far a scheme's mean is below the bare model's, and the standard error of that."""
    ours, theirs = np.array(row["test_nll"]), np.array(bare["test_nll"])
    error = np.sqrt(ours.var(ddof=1) / len(ours) + theirs.var(ddof=1) / len(theirs))
    return float(theirs.mean() - ours.mean()), float(error)


def format_verdict(report: dict[str, Any]) -> str:
    """Of each cell: the best scheme by the test, and those that dropout did not help."""
    lines = []
    for cell in dict.fromkeys(row["cell"] for row in report["rows"]):
        bare = find(report, cell, "none")
        if bare is None:
            continue
        rows = [row for row in report["rows"] if row["cell"] == cell and row is not bare]
        gains = {row["scheme"]: gain_of(row, bare) for row in rows}
        best = max(gains, key=lambda name: gains[name][0])
        unclear = [f"*{name}*" for name, (gain, error) in gains.items() if gain <= 2 * error]
        line = f"- {name_of(cell)}: *{best}* is best"
        if not unclear:
            line += ", and every scheme is better than none by more than two standard errors."
        elif len(unclear) == len(gains):
            line += ", but no scheme is better than none by two standard errors."
        else:
            line += f". Not better than none by two standard errors: {'; '.join(unclear)}."
        lines.append(line)
    return "\n".join(lines)


def name_of(cell: str) -> str:
    """A cell's name in a sentence: "LSTM" for "lstm"."""
    return MARKERS[cell][2].split(": ")[1]


# Each cell's marker, how far it is from the middle of its scheme's row, and its name.
MARKERS = {
    "lstm": ("o", -0.24, "dot: LSTM"),
    "gru": ("s", -0.08, "square: GRU"),
    "lru": ("^", 0.08, "triangle: LRU"),
    "min_gru": ("D", 0.24, "diamond: minGRU"),
}


def draw(report: dict[str, Any], path: Path) -> None:
    """Each scheme's test over the seeds, and the first cell's mean validation over the epochs."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    tests, curves = figure.subplots(1, 2, width_ratios=(2, 3))
    names = [*dict.fromkeys(row["scheme"] for row in report["rows"])]
    cells = [*dict.fromkeys(row["cell"] for row in report["rows"])]
    colors = {name: f"C{index}" if index else "black" for index, name in enumerate(names)}
    for row in report["rows"]:
        first, nlls = row["cell"] == cells[0], np.array(row["test_nll"])
        marker, beside, _ = MARKERS[row["cell"]]
        style = {"color": colors[row["scheme"]], "mfc": None if first else "white"}
        place = names.index(row["scheme"]) + beside
        tests.errorbar(nlls.mean(), place, xerr=nlls.std(ddof=1), fmt=marker, **style)
        if first and "Monte Carlo" not in row["scheme"]:
            valid = np.array(row["curves"])[:, :, 1].mean(0)
            curves.plot(1 + np.arange(len(valid)), valid, label=row["scheme"], color=style["color"])
    tests.set_yticks(range(len(names)), names)
    tests.invert_yaxis()
    legend = ", ".join(MARKERS[cell][2] for cell in cells)
    tests.set_xlabel(f"test, nats per {report['unit']} ({legend})")
    lowest = min(line.get_ydata().min() for line in curves.get_lines())
    bare = curves.get_lines()[0].get_ydata()
    curves.set_ylim(lowest - 0.05 * abs(lowest), 1.6 * bare.min() - 0.6 * lowest + 0.1 * bare.min())
    curves.set_xlabel("epoch")
    curves.set_ylabel("validation, mean over the seeds")
    curves.legend(fontsize=8)
    for axes in (tests, curves):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        report = json.loads(path.read_text())
        print(format_table(report), format_verdict(report), sep="\n\n")
        draw(report, path.with_suffix(".png"))
        print(f"wrote {path.with_suffix('.png')}")

"""The table of `schemes.py`, from its JSON; run with the JSON's path, it prints it."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def format_table(report: dict[str, Any]) -> str:
    """A row per scheme and cell: what was picked, and the test over the seeds."""
    lines = [
        f"| scheme | cell | picked | test, nats per {report['unit']} | against none |",
        "|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        test = np.array(row["test_nll"])
        bare = find(report, row["cell"], "none")
        change = ""
        if bare is not None and bare is not row:
            gain, error = gain_of(row, bare)
            change = f"{-gain:+.2f} ({abs(gain) / error:.1f} standard errors)"
        picked = "" if row["scheme"] == "none" else f"{row['strength']:g}"
        score = f"{test.mean():.2f} ± {test.std(ddof=1):.2f}"
        lines.append(f"| {row['scheme']} | {row['cell']} | {picked} | {score} | {change} |")
    return "\n".join(lines)


def find(report: dict[str, Any], cell: str, scheme: str) -> dict[str, Any] | None:
    rows = [row for row in report["rows"] if (row["cell"], row["scheme"]) == (cell, scheme)]
    return rows[0] if rows else None


def gain_of(row: dict[str, Any], bare: dict[str, Any]) -> tuple[float, float]:
    """How far a scheme's mean is below the bare model's, and the standard error of that."""
    ours, theirs = np.array(row["test_nll"]), np.array(bare["test_nll"])
    error = np.sqrt(ours.var(ddof=1) / len(ours) + theirs.var(ddof=1) / len(theirs))
    return float(theirs.mean() - ours.mean()), float(error)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(format_table(json.loads(Path(name).read_text())))

"""The plots of `compare.py`."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np

STYLES = {
    "scan: bare": {"color": "black", "linestyle": "--", "label": "bare cell"},
    "scan: variational": {"color": "tab:blue", "label": "variational"},
    "scan: per step, 0.7": {"color": "tab:orange", "label": "per step, keep_prob 0.7"},
    "scan: per step, 0.5": {"color": "tab:green", "label": "per step, keep_prob 0.5"},
}
DIMS = {"time": "time steps", "batch": "batch", "features": "features"}


def draw_sweep(result: dict[str, Any], path: Path) -> None:
    """Time and temporary memory of the gradient against each size, log-log."""
    figure, axes = plt.subplots(2, len(DIMS), figsize=(11, 6.5), sharey="row", squeeze=False)
    for column, (dim, label) in enumerate(DIMS.items()):
        points = [point for point in result["points"] if point["dim"] == dim]
        sizes = [point["size"] for point in points]
        for index, row in enumerate(points[0]["rows"]):
            rows = [point["rows"][index] for point in points]
            seconds = [np.median(row["gradient_s"]) for row in rows]
            sizes_mib = [row["gradient_bytes"] / 2**20 for row in rows]
            for axis, values in zip(axes[:, column], (seconds, sizes_mib), strict=True):
                axis.loglog(sizes, values, marker="o", markersize=3, **STYLES[row["name"]])
        axes[1, column].set_xlabel(label)
        others = {name: size for name, size in result["config"].items() if name in DIMS}
        del others[dim]
        axes[0, column].set_title(
            ", ".join(f"{name} {size}" for name, size in others.items()), fontsize=9
        )
    axes[0, 0].set_ylabel("gradient, seconds")
    axes[1, 0].set_ylabel("temporary memory, MiB")
    axes[0, 0].legend(fontsize=8)
    _save(figure, result, path)


def draw_table(result: dict[str, Any], path: Path) -> None:
    """Each program's times as multiples of the first one's, with their quartiles."""
    rows = result["rows"]
    figure, axis = plt.subplots(figsize=(8, 0.32 * len(rows) + 1.5))
    for part, marker in (("forward", "o"), ("gradient", "s")):
        base = np.array(rows[0][f"{part}_s"])
        pairs = np.array([np.array(row[f"{part}_s"]) / base for row in rows])
        low, middle, high = np.quantile(pairs, [0.25, 0.5, 0.75], axis=1)
        places = np.arange(len(rows)) + (-0.15 if part == "forward" else 0.15)
        axis.errorbar(
            middle, places, xerr=(middle - low, high - middle), fmt=marker, label=part, markersize=4
        )
    axis.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axis.set_xscale("log")
    ticks = [tick for tick in (0.5, 0.7, 1, 1.2, 1.5, 2, 3, 5, 10, 20) if _in_view(axis, tick)]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("time, as a multiple of the bare cell's")
    axis.legend()
    _save(figure, result, path)


def draw_bars(
    titles: list[str], times: dict[str, list[float]], result: dict[str, Any], path: Path
) -> None:
    """Times as multiples of a bare layer's, `times[label]` at each of the sizes in `titles`."""
    figure, axis = plt.subplots(figsize=(8, 3.5))
    width = 0.8 / len(times)
    for index, (label, ratios) in enumerate(times.items()):
        places = np.arange(len(titles)) + (index - (len(times) - 1) / 2) * width
        bars = axis.bar(places, ratios, 0.9 * width, label=label.replace("`", ""))
        axis.bar_label(bars, fmt="%.2f", fontsize=8, color="white", label_type="center")
    axis.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axis.set_xticks(range(len(titles)), titles)
    axis.set_ylabel("gradient with dropout / bare")
    axis.legend(fontsize=8, ncols=2, loc="upper left")
    axis.set_ylim(top=1.5)
    _save(figure, result, path)


def _in_view(axis: plt.Axes, tick: float) -> bool:
    low, high = axis.get_xlim()
    return low <= tick <= high


def _save(figure: plt.Figure, result: dict[str, Any], path: Path) -> None:
    machine, versions = result["machine"], result["versions"]
    figure.suptitle(
        f"{machine['cpu']}, {machine['cores']} cores, JAX {versions['jax']}, {result['date']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)

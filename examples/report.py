"""Reports of the language model's training runs: a table, a JSON file and learning curves."""

import dataclasses
import importlib.metadata
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from configs import SCHEMES, Config
from corpus import SPLITS, Corpus
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


class Final(NamedTuple):
    """The perplexities of the best epoch's weights, read in one row; `mc_test` may be None."""

    valid: float
    test: float
    mc_test: float | None


class Result(NamedTuple):
    """The perplexities of a training run, `[epochs, splits]`."""

    scheme: str
    perplexities: np.ndarray

    @classmethod
    def of(cls, scheme: str, perplexities: jax.Array) -> "Result":
        """Of the epochs that are over: the others are nan."""
        table = np.array(perplexities)
        return cls(scheme, table[~np.isnan(table[:, 0])])

    @property
    def best_epoch(self) -> int:
        """The epoch with the best validation perplexity; the table has the others' of that one."""
        return 1 + int(self.curve("valid").argmin())

    def curve(self, split: str) -> np.ndarray:
        return self.perplexities[:, SPLITS.index(split)]

    def label(self, split: str) -> str:
        """Training perplexity is measured under masks, unlike the others."""
        return f"{split} (dropout on)" if split == "train" and self.scheme != "none" else split

    def best(self, split: str) -> float:
        return float(self.curve(split)[self.best_epoch - 1])


def format_epoch(result: Result) -> str:
    """The perplexities of the last epoch, in one line."""
    perplexities = ", ".join(
        f"{result.label(split)} {result.curve(split)[-1]:.2f}" for split in SPLITS
    )
    return f"{SCHEMES[result.scheme]}, epoch {len(result.perplexities)}: {perplexities}"


def format_table(results: list[Result]) -> str:
    """A row for each training run, then how much the last is above or below the first."""
    lines = [f"{'perplexity':<20}{'best epoch':>12}{'valid':>10}{'test':>10}"]
    for result in results:
        best = "".join(f"{result.best(split):>10.2f}" for split in ("valid", "test"))
        lines.append(f"{SCHEMES[result.scheme]:<20}{result.best_epoch:>12}{best}")
    if len(results) > 1:
        first, *_, last = results
        changes = [last.best(split) / first.best(split) - 1 for split in ("valid", "test")]
        lines.append(f"{'':<32}" + "".join(f"{change:>+10.1%}" for change in changes))
    return "\n".join(lines)


def describe_runs(config: Config, corpus: Corpus, results: list[Result]) -> dict[str, Any]:
    return {
        "config": dataclasses.asdict(config),
        "words": {split: len(getattr(corpus, split)) for split in SPLITS},
        "vocabulary": len(corpus.vocabulary),
        **describe_machine(),
        "results": [
            {
                "scheme": result.scheme,
                "best_epoch": result.best_epoch,
                "valid": result.best("valid"),
                "test": result.best("test"),
                "curves": {split: result.curve(split).tolist() for split in SPLITS},
            }
            for result in results
        ],
    }


def describe_config(
    name: str, config: Config, result: Result, final: Final, seconds: float, mc_samples: int
) -> dict[str, Any]:
    return {
        "config": name,
        "seed": config.seed,
        "valid_perplexity": final.valid,
        "test_perplexity": final.test,
        "mc_test_perplexity": final.mc_test,
        "mc_samples": None if final.mc_test is None else mc_samples,
        "epochs": len(result.perplexities),
        "best_epoch": result.best_epoch,
        "seconds": round(seconds, 1),
        **describe_machine(),
        "command": shlex.join(["python", *sys.argv]),
        "settings": dataclasses.asdict(config),
        "curves": {split: result.curve(split).tolist() for split in SPLITS},
    }


def describe_machine() -> dict[str, Any]:
    """The device, and the versions of the packages."""
    packages = ("jax", "jaxlib", "flax", "optax", "flax_dropout_cell")
    return {
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
    }


def format_row(report: dict[str, Any]) -> str:
    """A configuration's report as the cells of a table: epochs, validation, test, Monte Carlo."""
    mc_test = report["mc_test_perplexity"]
    cells = [
        f"{report['epochs']} of {report['settings']['epochs']}",
        f"{report['valid_perplexity']:.1f}",
        f"{report['test_perplexity']:.1f}",
        "" if mc_test is None else f"{mc_test:.1f}",
    ]
    return " | ".join(cells)


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Writes beside and renames, so that a full disk does not take an older report along."""
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(report, indent=2) + "\n")
    beside.replace(path)


def write_curves(path: Path, results: list[Result]) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for color, result in zip(("tab:red", "tab:blue"), results, strict=False):
        epochs = range(1, 1 + len(result.perplexities))
        for split, style in (("train", ":"), ("valid", "-")):
            label = f"{SCHEMES[result.scheme]}, {result.label(split)}"
            axes.plot(epochs, result.curve(split), style, color=color, label=label)
        axes.plot(result.best_epoch, result.best("valid"), "o", color=color)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("perplexity")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)

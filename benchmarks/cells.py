"""Training with variational dropout against the bare stock layer of the same cell.

    python benchmarks/cells.py                # three sizes; ten minutes on two cores
    python benchmarks/cells.py --torch        # and PyTorch's nn.LSTM, bare
    python benchmarks/cells.py --scan-only    # without the layers of linen and NNX
    python benchmarks/cells.py --quick        # a small size, three rounds

Variational dropout on the inputs, h and the outputs. A ratio is the median over the rounds of a
program's time divided by its cell's bare time in the same round.
"""

import argparse
import contextlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import peers
import plots
from compare import Worker, describe, measure, positive_int, ratios
from program import Config

SIZES = (
    Config(time=35, batch=20, features=650),
    Config(time=35, batch=20, features=200),
    Config(time=128, batch=64, features=256),
)
QUICK = (Config(time=20, batch=20, features=128),)
TORCH = "PyTorch nn.LSTM: bare"
SUMMARY = {
    "a function of six lines in `dropout_scan`": "six-line LSTM: dropout_scan",
    "`nn.LSTMCell` in `fdc.linen.RNN`": "LSTMCell: fdc.linen.RNN",
    "`nn.OptimizedLSTMCell`": "OptimizedLSTMCell: fdc.linen.RNN",
    "`nn.GRUCell`": "GRUCell: fdc.linen.RNN",
}
LAYERS = ("fdc.linen.RNN", " nnx.RNN", "fdc.nnx.RNN")


def run(
    sizes: tuple[Config, ...], rounds: int, *, scan_only: bool = False, torch: bool = False
) -> dict[str, Any]:
    points, left_out = [], []
    with contextlib.ExitStack() as stack:
        workers = [Worker("cells", sys.executable)]
        if torch:
            workers.append(Worker("torch", find_torch()))
        for worker in workers:
            stack.callback(worker.close)
        programs = [
            (worker, name)
            for worker in workers
            for name in worker.names
            if not name.startswith("PyTorch loop") and not (scan_only and name.endswith(LAYERS))
        ]
        for config in sizes:
            rows, failed = measure(programs, config, rounds, title_of(config))
            points.append({"config": config._asdict(), "rows": rows})
            left_out += failed
        result = describe([worker.versions for worker in workers], sizes[0])
    del result["config"]
    return result | {"rounds": rounds, "points": points, "left_out": left_out}


def find_torch() -> Path:
    python = peers.find_python("torch")
    if python is None:
        problem = peers.install("torch")
        python = peers.find_python("torch")
        if python is None:
            raise SystemExit(f"PyTorch cannot be installed: {problem}")
    return python


def title_of(config: Config) -> str:
    return f"T={config.time} B={config.batch} H={config.features}"


def format_table(*runs: dict[str, Any]) -> str:
    """A Markdown table of the gradient's time in each run, and its memory.

    Both are multiples of the bare layer's around the same cell; PyTorch's time is one of the bare
    `nn.LSTMCell`'s, and no one counts its memory.
    """
    titles = [title_of(Config(**point["config"])) for point in runs[0]["points"]]
    lines = [f"| cell | program | {' | '.join(titles)} |", f"|---|---|{'---|' * len(titles)}"]
    for name in [row["name"] for row in runs[0]["points"][0]["rows"]]:
        cells = name.split(": ")
        for at, _ in enumerate(titles):
            times, memory = zip(
                *(compare_to_bare(run["points"][at], name) for run in runs), strict=True
            )
            size = "" if memory[0] is None else f"; memory {memory[0]:.2f}"
            cells.append(", ".join(f"{time:.2f}" for time in times) + size)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_summary(*runs: dict[str, Any]) -> str:
    """A Markdown table of the gradient's time with variational dropout: the median of the runs."""
    titles, times = summarize(*runs)
    lines = [f"| {' | '.join(['cell', *titles])} |", f"|---|{'---|' * len(titles)}"]
    for label, row in times.items():
        lines.append(f"| {' | '.join([label, *(f'{time:.2f}' for time in row)])} |")
    return "\n".join(lines)


def summarize(*runs: dict[str, Any]) -> tuple[list[str], dict[str, list[float]]]:
    """The sizes, and the gradient's time at each of them: the median of the runs."""
    points = runs[0]["points"]
    times = {
        label: [
            statistics.median(compare_to_bare(run["points"][at], name)[0] for run in runs)
            for at, _ in enumerate(points)
        ]
        for label, name in SUMMARY.items()
    }
    return [title_of(Config(**point["config"])) for point in points], times


def compare_to_bare(point: dict[str, Any], name: str) -> tuple[float, float | None]:
    """The gradient's time and memory, as multiples of the bare layer's around the same cell."""
    cell = "LSTMCell" if name == TORCH else name.split(": ")[0]
    bare = next(row for row in point["rows"] if row["name"].startswith(f"{cell}: "))
    (row,) = [row for row in point["rows"] if row["name"] == name]
    size = row["gradient_bytes"]
    memory = None if size is None else size / bare["gradient_bytes"]
    return ratios(row, bare, "gradient")[1], memory


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small size, three rounds")
    parser.add_argument("--scan-only", action="store_true", help="without the layers")
    parser.add_argument("--torch", action="store_true", help="and PyTorch's LSTM, without dropout")
    parser.add_argument("--rounds", type=positive_int, help="default: 15")
    parser.add_argument("--out", type=Path, default=Path("results"), help="default: results")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 15)
    sizes = QUICK if options.quick else SIZES
    result = run(sizes, rounds, scan_only=options.scan_only, torch=options.torch)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cells.json").write_text(json.dumps(result, indent=1) + "\n")
    print(format_table(result))
    for reason in result["left_out"]:
        print(f"left out: {reason}")
    print(f"wrote {options.out / 'cells.json'}")
    if not options.scan_only:  # the bars are of layers
        plots.draw_bars(*summarize(result), result, options.out / "cells.png")
        print(f"wrote {options.out / 'cells.png'}")


if __name__ == "__main__":
    main()

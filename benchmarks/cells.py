"""Training with variational dropout against the bare stock layer of the same cell.

    python benchmarks/cells.py                # three sizes; twenty minutes on two cores
    python benchmarks/cells.py --scan-only    # without the layers of linen and NNX
    python benchmarks/cells.py --quick        # a small size, three rounds

Variational dropout on the inputs, h and the outputs. A ratio is the median over the rounds of a
program's time divided by its cell's bare time in the same round.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from compare import Worker, describe, measure, positive_int, ratios
from program import Config

SIZES = (
    Config(time=35, batch=20, features=650),
    Config(time=35, batch=20, features=200),
    Config(time=128, batch=64, features=256),
)
QUICK = (Config(time=20, batch=20, features=128),)


LAYERS = ("fdc.linen.RNN", " nnx.RNN", "fdc.nnx.RNN")


def run(sizes: tuple[Config, ...], rounds: int, scan_only: bool) -> dict[str, Any]:
    worker, points, left_out = Worker("cells", sys.executable), [], []
    try:
        names = [name for name in worker.names if not (scan_only and name.endswith(LAYERS))]
        for config in sizes:
            programs = [(worker, name) for name in names]
            rows, failed = measure(programs, config, rounds, title_of(config))
            points.append({"config": config._asdict(), "rows": rows})
            left_out += failed
        result = describe([worker], sizes[0])
    finally:
        worker.close()
    del result["config"]
    return result | {"rounds": rounds, "points": points, "left_out": left_out}


def title_of(config: Config) -> str:
    return f"T={config.time} B={config.batch} H={config.features}"


def format_table(result: dict[str, Any]) -> str:
    """A Markdown table of the gradient's time and memory, as multiples of the bare layer's."""
    points = result["points"]
    titles = [title_of(Config(**point["config"])) for point in points]
    lines = [f"| cell | program | {' | '.join(titles)} |", f"|---|---|{'---|' * len(titles)}"]
    for name in [row["name"] for row in points[0]["rows"]]:
        cell, program = name.split(": ")
        cells = [cell, program]
        for point in points:
            rows = [row for row in point["rows"] if row["name"].startswith(f"{cell}: ")]
            (row,) = [row for row in rows if row["name"] == name]
            time = ratios(row, rows[0], "gradient")[1]
            memory = row["gradient_bytes"] / rows[0]["gradient_bytes"]
            cells.append(f"{time:.2f}, memory {memory:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small size, three rounds")
    parser.add_argument("--scan-only", action="store_true", help="without the layers")
    parser.add_argument("--rounds", type=positive_int, help="default: 15")
    parser.add_argument("--out", type=Path, default=Path("results"), help="default: results")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 15)
    result = run(QUICK if options.quick else SIZES, rounds, options.scan_only)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cells.json").write_text(json.dumps(result, indent=1) + "\n")
    print(format_table(result))
    for reason in result["left_out"]:
        print(f"left out: {reason}")
    print(f"wrote {options.out / 'cells.json'}")


if __name__ == "__main__":
    main()

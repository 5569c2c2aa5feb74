"""The time of an LSTM with recurrent dropout, in several libraries, relative to the bare cell.

    python benchmarks/compare.py                 # this library, the bare cell, the naive way
    python benchmarks/compare.py --peers         # and Keras, TensorFlow and PyTorch
    python benchmarks/compare.py --sweep         # time and memory against time, batch, features
    python benchmarks/compare.py --quick         # under a minute

Every library runs in a process of its own. Within a round each program runs once, so that
whatever else the machine does meets all of them; a ratio is the median over the rounds of the
program's time divided by the bare cell's in the same round. Needs `pip install -e .[examples]`.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import peers
import plots
from program import Config
from tqdm import tqdm

HERE = Path(__file__).parent
BASE = "scan: bare"
PARTS = ("forward", "gradient")
IMPLS = ("threefry2x32", "rbg", "unsafe_rbg")
TABLE, TABLE_QUICK = Config(), Config(time=32, batch=32, features=128)

SWEEP_FROM = Config(time=64, batch=32, features=256)
SWEEP = {
    "time": (16, 64, 256, 1024, 4096),
    "batch": (8, 32, 128, 512),
    "features": (64, 256, 750, 1500),
}
SWEEP_QUICK = {"time": (16, 64, 256), "batch": (8, 32), "features": (64, 256)}

Row = dict[str, Any]
"""A program's name, compile_s, forward_bytes, gradient_bytes, forward_s, gradient_s: JSON."""


class Worker:
    """A library in its own process, which answers one request at a time."""

    def __init__(self, library: str, python: str | Path) -> None:
        # Threads that spin while they wait would take the machine from the next program.
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "JAX_PLATFORMS": "cpu"}
        self.log = open(os.devnull, "w")
        self.process = subprocess.Popen(
            [python, HERE / "program.py", library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        hello = self._read()
        self.versions: dict[str, str] = hello["versions"]
        self.names: list[str] = hello["names"]

    def ask(self, do: str, name: str, **fields: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps({"do": do, "name": name, **fields}), file=self.process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("its process ended")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


@contextmanager
def start_workers(options: argparse.Namespace) -> Iterator[tuple[list[Worker], list[str]]]:
    """Starts a process per library that is at hand, and says why the others are left out."""
    workers, left_out = [Worker("jax", sys.executable)], []
    try:
        for peer in [] if options.quick or options.sweep else peers.REQUIREMENTS:
            python = peers.find_python(peer)
            if python is None:
                left_out.append(f"{peer}: not installed; --peers makes its environment")
                continue
            try:
                workers.append(Worker(peer, python))
            except RuntimeError as error:
                left_out.append(f"{peer}: does not start: {error}")
        yield workers, left_out
    finally:
        for worker in workers:
            worker.close()


def measure(
    programs: list[tuple[Worker, str]], config: Config, rounds: int, title: str
) -> tuple[list[Row], list[str]]:
    """Times programs in turn, a round after the other."""
    rows: list[Row] = []
    left_out: list[str] = []
    running: list[tuple[Worker, str]] = []
    total = len(programs) * (1 + rounds * len(PARTS))
    with tqdm(total=total, desc=title, leave=False) as bar:
        for worker, name in programs:
            bar.set_postfix_str(name)
            try:
                rows.append({"name": name} | worker.ask("compile", name, config=config))
                running.append((worker, name))
            except RuntimeError as error:
                left_out.append(f"{name}: {error}")
            bar.update()
        for row in rows:
            row |= {f"{part}_s": [] for part in PARTS}
        for _ in range(rounds):
            for part in PARTS:
                for row, (worker, name) in zip(rows, running, strict=True):
                    bar.set_postfix_str(name)
                    row[f"{part}_s"].append(worker.ask(part, name)["seconds"])
                    bar.update()
        for worker, name in running:
            worker.ask("forget", name)
    return rows, left_out


def run_table(options: argparse.Namespace) -> dict[str, Any]:
    config = (TABLE_QUICK if options.quick else TABLE)._replace(impl=options.impl)
    rounds = options.rounds or (5 if options.quick else 15)
    with start_workers(options) as (workers, left_out):
        programs = [(worker, name) for worker in workers for name in worker.names]
        rows, failed = measure(programs, config, rounds, "table")
        return describe([worker.versions for worker in workers], config) | {
            "rows": rows,
            "left_out": left_out + failed,
        }


def run_sweep(options: argparse.Namespace) -> dict[str, Any]:
    base = SWEEP_FROM._replace(impl=options.impl)
    rounds = options.rounds or (3 if options.quick else 5)
    points = []
    with start_workers(options) as (workers, left_out):
        (worker,) = workers
        programs = [(worker, name) for name in worker.names if name.startswith("scan: ")]
        for dim, sizes in (SWEEP_QUICK if options.quick else SWEEP).items():
            for size in sizes:
                config = base._replace(**{dim: size})
                rows, failed = measure(programs, config, rounds, f"{dim} {size}")
                points.append({"dim": dim, "size": size, "rows": rows})
                left_out += failed
        return describe([worker.versions for worker in workers], base) | {
            "points": points,
            "left_out": left_out,
        }


def describe(versions: list[dict[str, str]], config: Config) -> dict[str, Any]:
    """When, where and with which versions something was measured."""
    merged = {"python": platform.python_version()}
    for each in versions:
        merged |= each
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": merged,
        "config": config._asdict(),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def ratios(row: Row, base: Row, part: str) -> tuple[float, float, float]:
    """The lower quartile, median and upper quartile of the ratios within the rounds."""
    pairs = np.array(row[f"{part}_s"]) / np.array(base[f"{part}_s"])
    low, middle, high = np.quantile(pairs, [0.25, 0.5, 0.75])
    return low, middle, high


def format_table(rows: list[Row]) -> str:
    """A Markdown table. Times and memory are ratios to the first row, with their quartiles."""
    base = rows[0]
    lines = [
        "| program | compile, s | forward | gradient | memory, forward | memory, gradient |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["name"], "-" if row["compile_s"] is None else f"{row['compile_s']:.1f}"]
        for part in PARTS:
            low, middle, high = ratios(row, base, part)
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        for part in PARTS:
            size = row[f"{part}_bytes"]
            share = "-" if size is None else f"{size / base[f'{part}_bytes']:.2f}"
            cells.append(share if size is None else f"{share} ({size / 2**20:.1f} MiB)")
        lines.append(f"| {' | '.join(cells)} |")
    seconds = [float(np.median(base[f"{part}_s"])) for part in PARTS]
    lines += ["", f"1.00 is {seconds[0] * 1e3:.0f} ms forward, {seconds[1] * 1e3:.0f} ms gradient."]
    return "\n".join(lines)


def format_sweep(points: list[dict[str, Any]]) -> str:
    """A Markdown table of the ratios to the bare cell of the same size."""
    names = [row["name"] for row in points[0]["rows"][1:]]
    lines = [
        f"| size | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for point in points:
        base, *rows = point["rows"]
        cells = [f"{point['dim']} {point['size']}"]
        for row in rows:
            times = [f"{ratios(row, base, part)[1]:.2f}" for part in PARTS]
            memory = row["gradient_bytes"] / base["gradient_bytes"]
            cells.append(f"{times[0]} / {times[1]} / {memory:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "forward / gradient / temporary memory of the gradient"]
    return "\n".join(lines)


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds, no peers")
    parser.add_argument("--peers", action="store_true", help="make the peers' environments first")
    parser.add_argument("--sweep", action="store_true", help="sizes instead of libraries, no peers")
    parser.add_argument("--rounds", type=positive_int, help="default: 15; in a sweep 5")
    parser.add_argument("--impl", choices=IMPLS, default=IMPLS[0], help="JAX's PRNG")
    parser.add_argument("--out", type=Path, default=Path("results"), help="default: results")
    options = parser.parse_args(arguments)
    if options.peers and (options.quick or options.sweep):
        parser.error("--peers goes with neither --quick nor --sweep, which run without peers")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out} is not a folder")
    return options


def install_peers() -> None:
    for peer in peers.REQUIREMENTS:
        if peers.find_python(peer) is None:
            print(f"installing {peer} in {peers.cache_folder() / peer}", file=sys.stderr)
            if problem := peers.install(peer):
                print(f"{peer} is left out: {problem}", file=sys.stderr)


def main() -> None:
    options = parse()
    if options.peers:
        install_peers()
    kind = "sweep" if options.sweep else "table"
    result = run_sweep(options) if options.sweep else run_table(options)
    name = f"{kind}_{options.impl}{'_quick' if options.quick else ''}"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if options.sweep:
        print(format_sweep(result["points"]))
        plots.draw_sweep(result, options.out / f"{name}.png")
    else:
        print(format_table(result["rows"]))
        plots.draw_table(result, options.out / f"{name}.png")
    for reason in result["left_out"]:
        print(f"left out: {reason}")
    print(f"wrote {options.out / name}.json and .png")


if __name__ == "__main__":
    main()

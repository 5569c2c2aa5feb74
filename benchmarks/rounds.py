"""Helpers that benchmarks share: timing in turn, flags, and files of results."""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from compare import positive_int


def time_in_turn(programs: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    """The seconds of each program in each round; a round before them warms up.

    In turn, so that whatever else the machine does meets all of them.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in programs}
    for number in range(rounds + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def parser_of(doc: str | None, rounds: int | None, default: str = "") -> argparse.ArgumentParser:
    """A parser with `--out`, described by a program's own docstring.

    It has `--rounds` if there are some by default; `default` says how many if that depends.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if rounds is not None or default:
        shown = f"default: {default or rounds}"
        parser.add_argument("--rounds", type=positive_int, default=rounds, help=shown)
    parser.add_argument("--out", type=Path, default=Path("results"), help="default: results")
    return parser


def command_of(arguments: list[str]) -> str:
    """The command line, without the folder that results go to."""
    parts = [f"benchmarks/{Path(arguments[0]).name}", *arguments[1:]]
    if "--out" in parts:
        at = parts.index("--out")
        del parts[at : at + 2]
    return shlex.join(["python", *parts])


def resume(parser: argparse.ArgumentParser, report: dict[str, Any], path: Path) -> dict[str, Any]:
    """The report that is stored there, so that a run that was stopped goes on; else the given one.

    What has another `config` is refused.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = json.loads(path.read_text()) if path.exists() else report
    except (OSError, ValueError) as error:
        parser.error(f"{path} cannot be read: {error}")
    if not isinstance(stored, dict) or stored.get("config") != report["config"]:
        parser.error(f"{path} is of another config; give another --out")
    return stored


def write(path: Path, result: dict[str, Any], indent: int | None = None) -> None:
    """Beside and renamed, so that a full disk does not take the older results along."""
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(result, indent=indent) + "\n")
    beside.replace(path)


def store(result: dict[str, Any], path: Path, *shown: str) -> None:
    """Writes the JSON, with the command that made it, and prints what is to be seen of it."""
    result = result | {"command": command_of(sys.argv)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, result, indent=1)
    print(*shown, f"wrote {path}", sep="\n")

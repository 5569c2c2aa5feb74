"""This library's LSTM and GRU against Flax's under the same layer, in one process, by CPU time.

    python benchmarks/own_cells.py           # four sizes
    python benchmarks/own_cells.py --quick   # a small size, three rounds

Within a round each program runs once, in turn. A ratio is the median over the rounds of a
program's CPU time, of all threads, divided by that of Flax's faster cell in the same round: other
work on the machine counts little. The time on the clock is stored too. Only this library's cells
can have masks for each gate; these are compared with masks that gates share.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from cells import title_of
from cells_programs import spec_of
from compare import describe
from jax_programs import compile_program, versions
from program import Compiled, Config
from rounds import parser_of, store

import flax_dropout_cell as fdc

SIZES = (
    Config(time=35, batch=20, features=650),
    Config(time=35, batch=20, features=200),
    Config(time=128, batch=64, features=256),
    Config(time=100, batch=32, features=128),
)
QUICK = (Config(time=20, batch=20, features=64),)
FLAX: dict[str, dict[str, Any]] = {
    "LSTM": {"nn.OptimizedLSTMCell": nn.OptimizedLSTMCell, "nn.LSTMCell": nn.LSTMCell},
    "GRU": {"nn.GRUCell": nn.GRUCell},
}
OWN: dict[str, Any] = {"LSTM": fdc.linen.LSTMCell, "GRU": fdc.linen.GRUCell}
PARTS = ("forward", "gradient")
KINDS = ("seconds", "clock")  # of all threads, and on the clock
NOISES = ("no noise", "variational")


def make_layer(cell: Any, spec: fdc.RecurrentDropout, config: Config) -> Compiled:
    rnn = fdc.linen.RNN(cell(config.features), spec, time_major=True)
    params = rnn.init(jax.random.key(1), jnp.zeros((1, config.batch, config.features)))
    return compile_program(
        config, params, lambda params, xs, rng: rnn.apply(params, xs, rngs={"dropout": rng})
    )


def make_programs(kind: str, config: Config) -> dict[str, Compiled]:
    """Every program of a cell, by what it is and what drops."""
    dropout = spec_of("GRUCell" if kind == "GRU" else "LSTMCell")
    specs = dict(zip(NOISES, (fdc.RecurrentDropout(), dropout), strict=True))
    found = {
        f"{name}, {noise}": make_layer(cell, spec, config)
        for noise, spec in specs.items()
        for name, cell in (FLAX[kind] | {"own": OWN[kind]}).items()
    }
    for masks, tied in (("shared masks", True), ("masks for each gate", False)):
        spec = fdc.recipes.gal2016(input_keep_prob=0.7, recurrent_keep_prob=0.7, tied=tied)
        found[f"own, {masks}"] = make_layer(OWN[kind], spec, config)
    return found


class Seconds(NamedTuple):
    """The seconds of each program in each round: of all threads, and on the clock."""

    cpu: dict[str, list[float]]
    clock: dict[str, list[float]]


def time_both(programs: dict[str, Callable[[], Any]], rounds: int) -> Seconds:
    """Runs each program once in each round, in turn; a round before them warms up."""
    seconds = Seconds({name: [] for name in programs}, {name: [] for name in programs})
    for number in range(rounds + 1):
        for name, program in programs.items():
            starts = time.process_time(), time.perf_counter()
            program()
            ends = time.process_time(), time.perf_counter()
            if number:
                for times, start, end in zip(seconds, starts, ends, strict=True):
                    times[name].append(end - start)
    return seconds


def measure(kind: str, config: Config, rounds: int) -> dict[str, Any]:
    programs = make_programs(kind, config)
    parts = {
        part: time_both({name: getattr(it, part) for name, it in programs.items()}, rounds)
        for part in PARTS
    }
    return {
        "cell": kind,
        "config": config._asdict(),
        "seconds": {part: both.cpu for part, both in parts.items()},
        "clock": {part: both.clock for part, both in parts.items()},
        "gradient_bytes": {name: it.gradient_bytes for name, it in programs.items()},
    }


def ratio(seconds: dict[str, list[float]], name: str, bases: list[str]) -> float:
    """The median ratio to the base with the least time."""
    base = min(bases, key=lambda base: np.median(seconds[base]))
    return float(np.median(np.divide(seconds[name], seconds[base])))


def ratios(row: dict[str, Any], part: str, kind: str = "seconds") -> dict[str, float]:
    """By what drops; `kind` is "seconds" for CPU time, or "clock"."""
    seconds = row[kind][part]
    found = {
        noise: ratio(seconds, f"own, {noise}", [f"{name}, {noise}" for name in FLAX[row["cell"]]])
        for noise in NOISES
    }
    masks = ratio(seconds, "own, masks for each gate", ["own, shared masks"])
    return found | {"masks for each gate": masks}


def format_table(*runs: dict[str, Any]) -> str:
    """A Markdown table of the ratios in each run, and of the memory of masks for each gate.

    A number in brackets is the ratio on the clock, the median of the runs.
    """
    columns = [*NOISES, "masks for each gate"]
    lines = [
        f"| cell | size | | {' | '.join(columns)} | memory of masks for each gate |",
        f"|---|---|---|{'---|' * len(columns)}---|",
    ]
    for rows in zip(*(run["rows"] for run in runs), strict=True):
        size = rows[0]["gradient_bytes"]
        memory = {"gradient": f"{size['own, masks for each gate'] / size['own, shared masks']:.2f}"}
        for part in PARTS:
            cells = [rows[0]["cell"], title_of(Config(**rows[0]["config"])), part]
            found, clock = ([ratios(row, part, kind) for row in rows] for kind in KINDS)
            for column in columns:
                times = ", ".join(f"{each[column]:.2f}" for each in found)
                on_clock = np.median([each[column] for each in clock])
                cells.append(f"{times} ({on_clock:.2f})")
            lines.append(f"| {' | '.join([*cells, memory.get(part, '')])} |")
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__, None, "15")
    parser.add_argument("--quick", action="store_true", help="a small size, three rounds")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 15)
    sizes = QUICK if options.quick else SIZES
    rows = [measure(kind, config, rounds) for config in sizes for kind in OWN]
    result = describe([versions()], sizes[0]) | {"rounds": rounds, "rows": rows}
    del result["config"]
    store(result, options.out / "own_cells.json", format_table(result))


if __name__ == "__main__":
    main()

"""Few rows and large weights, as in acting and decoding: `fdc.scan` against `jax.lax.scan`.

    python benchmarks/few_rows.py            # two minutes on two cores
    python benchmarks/few_rows.py --quick    # a small size, three rounds

This library's LSTM without dropout, alone and with a head that reads h at each step. Products of x
run before the loop, those of the head after it, and the weights' gradients after the backward loop.
Within a round each program runs once, in turn. A ratio is the median over the rounds of the CPU
time of all threads, divided by that of `jax.lax.scan` in the same round; memory is temporary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from compare import describe
from jax_programs import compile_program, versions
from own_cells import PARTS, time_both
from program import Compiled, Config
from rounds import parser_of, store

import flax_dropout_cell as fdc


class Size(NamedTuple):
    """An LSTM over as many features as it has units; `head` is 0 if there is no head."""

    time: int = 128
    batch: int = 1
    features: int = 256
    head: int = 0


SIZES = (Size(), Size(head=256), Size(batch=4, head=1024), Size(features=512, head=512))
QUICK = (Size(time=20, features=64, head=64),)
BASE = "jax.lax.scan"
SCANS: dict[str, Any] = {BASE: jax.lax.scan, "fdc.scan": fdc.scan}


def make_program(scan: Callable[..., Any], size: Size) -> Compiled:
    key, head_key = jax.random.split(jax.random.key(1))
    row = jnp.zeros((size.batch, size.features))
    head = jax.random.normal(head_key, (size.features, size.head)) / size.features**0.5
    params = fdc.init_lstm(key, size.features, size.features), head

    def run(params: Any, xs: jax.Array, _: jax.Array) -> jax.Array:
        lstm, head = params

        def step(carry: Any, x: jax.Array) -> Any:
            carry, h = fdc.lstm_cell(lstm, carry, x)
            return carry, h @ head if size.head else h

        return scan(step, fdc.LSTMState(row, row), xs)[1]

    return compile_program(Config(size.time, size.batch, size.features), params, run)


def measure(size: Size, rounds: int) -> dict[str, Any]:
    programs = {name: make_program(scan, size) for name, scan in SCANS.items()}
    seconds = {
        part: time_both({name: getattr(it, part) for name, it in programs.items()}, rounds).cpu
        for part in PARTS
    }
    size_of = {
        part: {name: getattr(it, f"{part}_bytes") for name, it in programs.items()}
        for part in PARTS
    }
    return {"size": size._asdict(), "seconds": seconds, "bytes": size_of}


def ratio(row: dict[str, Any], part: str) -> float:
    seconds = row["seconds"][part]
    return float(np.median(np.divide(seconds["fdc.scan"], seconds[BASE])))


def format_table(*runs: dict[str, Any]) -> str:
    """A Markdown table: ratios to `jax.lax.scan` in each run, and the gradient's memory in MiB."""
    lines = [
        "| size | head | forward | gradient | memory of the gradient |",
        "|---|---|---|---|---|",
    ]
    for rows in zip(*(run["rows"] for run in runs), strict=True):
        size = Size(**rows[0]["size"])
        ours, base = (rows[0]["bytes"]["gradient"][name] / 2**20 for name in ("fdc.scan", BASE))
        cells = [
            f"T={size.time} B={size.batch} H={size.features}",
            str(size.head or ""),
            *(", ".join(f"{ratio(row, part):.2f}" for row in rows) for part in PARTS),
            f"{ours:.1f} MiB instead of {base:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__, None, "31")
    parser.add_argument("--quick", action="store_true", help="a small size, three rounds")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 31)
    rows = [measure(size, rounds) for size in (QUICK if options.quick else SIZES)]
    result = describe([versions()], Config()) | {"rounds": rounds, "rows": rows}
    del result["config"]
    store(result, options.out / "few_rows.json", format_table(result))


if __name__ == "__main__":
    main()

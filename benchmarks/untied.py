"""The cost of a mask for each gate, relative to one for all gates: Gal's two variants.

    python benchmarks/untied.py                     # T=128, B=64, H=256
    python benchmarks/untied.py --rounds 5 --out results

Within a round each program runs once, so that whatever else the machine does meets all of them; a
ratio is the median over the rounds of a program's time divided by the tied one's in the same round.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from compare import describe
from jax_programs import versions
from program import Config
from rounds import parser_of, store, time_in_turn

import flax_dropout_cell as fdc

STEPS, BATCH, FEATURES = 128, 64, 256
CELLS = {"LSTM": (fdc.lstm_cell, fdc.init_lstm), "GRU": (fdc.gru_cell, fdc.init_gru)}
PARTS = ("forward", "gradient")


def compile_program(cell: str, tied: bool, part: str) -> Any:
    """A compiled program with its arguments: `run(*args)`."""
    step, init = CELLS[cell]
    rng = jax.random.key(0)
    spec = fdc.recipes.gal2016(input_keep_prob=0.7, recurrent_keep_prob=0.7, tied=tied)
    h = jnp.zeros((BATCH, FEATURES))
    carry: Any = (h, h) if cell == "LSTM" else h

    def forward(params: Any, xs: jax.Array, rng: jax.Array) -> jax.Array:
        return fdc.dropout_scan(params, carry, xs, rng, cell=step, dropout=spec)[1]

    def loss(*args: Any) -> jax.Array:
        return (forward(*args) ** 2).mean()

    xs = jax.random.normal(rng, (STEPS, BATCH, FEATURES))
    args = init(rng, FEATURES, FEATURES), xs, rng
    run = forward if part == "forward" else jax.grad(loss)
    return jax.jit(run).lower(*args).compile(), args


def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    """The seconds of each program in each round, by cell and part, first tied, then untied."""
    ready = {
        (f"{cell}, {part}", "tied" if tied else "untied"): compile_program(cell, tied, part)
        for cell in CELLS
        for part in PARTS
        for tied in (True, False)
    }
    programs = {name: functools.partial(run, *args) for name, (run, args) in ready.items()}
    seconds: dict[str, dict[str, list[float]]] = {}
    for (name, masks), times in time_in_turn(programs, rounds).items():
        seconds.setdefault(name, {})[masks] = times
    return seconds


def ratio(seconds: dict[str, list[float]]) -> float:
    return float(np.median(np.divide(seconds["untied"], seconds["tied"])))


def format_table(*runs: dict[str, Any]) -> str:
    """A Markdown table of the ratios in each run."""
    lines = ["| | forward | gradient |", "|---|---|---|"]
    for cell in CELLS:
        found = ([ratio(run["seconds"][f"{cell}, {part}"]) for run in runs] for part in PARTS)
        cells = [", ".join(f"{each:.2f}" for each in times) for times in found]
        lines.append(f"| {cell} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    options = parser_of(__doc__, 31).parse_args()
    config = Config(time=STEPS, batch=BATCH, features=FEATURES)
    result = describe([versions()], config) | {"seconds": measure(options.rounds)}
    store(result, options.out / "untied.json", format_table(result))


if __name__ == "__main__":
    main()

"""Memory and time of a gradient against the length of the sequence, with `checkpoint_every`.

    python benchmarks/long_sequences.py            # 256 to 16,384 steps
    python benchmarks/long_sequences.py --quick    # up to 1,024

An LSTM, batch 8, 128 features, per-step dropout at the inputs, h and the outputs.
`checkpoint_every` is the square root of the length.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
from compare import describe
from jax_programs import spec_of, versions
from program import Config
from rounds import parser_of, store, time_in_turn
from tqdm import tqdm

import flax_dropout_cell as fdc

LENGTHS = (256, 1024, 4096, 16384)
BATCH, FEATURES = 8, 128


def compile_gradient(length: int, every: int | None) -> tuple[Any, tuple[Any, ...]]:
    params = fdc.init_lstm(jax.random.key(0), FEATURES, FEATURES)
    row = jnp.zeros((BATCH, FEATURES))
    xs = jax.random.normal(jax.random.key(1), (length, BATCH, FEATURES))
    spec = spec_of(fdc.Dropout(keep_prob=0.7))

    def loss(params: Any, xs: jax.Array, rng: jax.Array) -> jax.Array:
        options: Any = {"cell": fdc.lstm_cell, "dropout": spec, "checkpoint_every": every}
        ys = fdc.dropout_scan(params, fdc.LSTMState(row, row), xs, rng, **options)[1]
        return jnp.mean(ys**2)

    args = (params, xs, jax.random.key(2))
    return jax.jit(jax.grad(loss)).lower(*args).compile(), args


def measure_length(length: int, rounds: int) -> dict[str, Any]:
    """Both programs in turn: each one's memory, and its times."""
    every = round(length**0.5)
    ready = {"without": compile_gradient(length, None), "with": compile_gradient(length, every)}
    programs = {name: functools.partial(program, *args) for name, (program, args) in ready.items()}
    seconds = [*time_in_turn(programs, rounds).values()]
    memory = [program.memory_analysis().temp_size_in_bytes for program, _ in ready.values()]
    return {"length": length, "every": every, "bytes": memory, "seconds": seconds}


def format_table(result: dict[str, Any]) -> str:
    """A Markdown table: memory without and with chunks, and the ratio of the least times."""
    lines = [
        "| steps | checkpoint_every | memory without | memory with | time with / without |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        whole, chunked = (f"{size / 2**20:.1f} MiB" for size in row["bytes"])
        ratio = min(row["seconds"][1]) / min(row["seconds"][0])
        lines.append(f"| {row['length']} | {row['every']} | {whole} | {chunked} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__, 5)
    parser.add_argument("--quick", action="store_true", help="short sequences")
    options = parser.parse_args()
    lengths = LENGTHS[:2] if options.quick else LENGTHS
    bar = tqdm(lengths, desc="lengths", leave=False, file=sys.stderr)
    rows = [measure_length(length, options.rounds) for length in bar]
    result = describe([versions()], Config(batch=BATCH, features=FEATURES)) | {"rows": rows}
    store(result, options.out / "long_sequences.json", format_table(result))


if __name__ == "__main__":
    main()

"""Linear recurrences: step by step, in parallel, and written by hand; without noise and with it.

    python benchmarks/linear.py            # 64 to 16,384 steps
    python benchmarks/linear.py --quick    # up to 1,024

An LRU and a minGRU, batch 4, 128 features, forward pass and gradient. Each number is a ratio to a
program that is written by hand without dropout: all gates at once, then
`jax.lax.associative_scan`. "noise" has tied dropout on the inputs and the outputs, candidate
dropout, and zoneout on the state. Within a round each program runs once; a time is the least of
all rounds, of the CPU time of all threads, which a busy machine disturbs less than the clock.
"""

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from compare import describe
from jax_programs import versions
from program import Config
from rounds import parser_of, store
from tqdm import tqdm

import flax_dropout_cell as fdc

LENGTHS = (64, 1024, 16384)
BATCH, FEATURES = 4, 128
TIED = fdc.Dropout(keep_prob=0.75, variational=True)
NOISE = fdc.RecurrentDropout(
    input=TIED,
    state=fdc.Zoneout(prob=0.1),
    output=TIED,
    inside={"candidate": fdc.Dropout(keep_prob=0.75)},
)
NONE = fdc.RecurrentDropout()
BY_HAND = "by hand"

Program = Callable[[Any, jax.Array, jax.Array], jax.Array]
"""`run(params, xs, rng)`, which gives the outputs."""


def solve(slope: jax.Array, offset: jax.Array) -> jax.Array:
    """`h[t] = slope[t] * h[t - 1] + offset[t]`, as S5 and LRU codes have it."""

    def join(early: Any, late: Any) -> Any:
        return early[0] * late[0], early[1] * late[0] + late[1]

    return jax.lax.associative_scan(join, (slope, offset))[1]


def lru_by_hand(params: fdc.LRUParams, xs: jax.Array, _: Any) -> jax.Array:
    slope = jnp.exp(jax.lax.complex(-jnp.exp(params.nu_log), jnp.exp(params.theta_log)))
    read = jax.lax.complex(*jnp.split(xs @ params.input_kernel, 2, axis=-1))
    h = solve(jnp.broadcast_to(slope, read.shape), jnp.exp(params.gamma_log) * read)
    return jnp.concatenate([h.real, h.imag], -1) @ params.output_kernel + xs @ params.skip_kernel


def min_gru_by_hand(params: fdc.MinGRUParams, xs: jax.Array, _: Any) -> jax.Array:
    z, candidate = jnp.split(xs @ params.input_kernel + params.bias, 2, axis=-1)
    z = jax.nn.sigmoid(z)
    return solve(1 - z, z * candidate)


CELLS: dict[str, tuple[Any, Any, Any, Program, Any]] = {
    "LRU": (fdc.lru_cell, fdc.init_lru, jnp.complex64, lru_by_hand, fdc.linen.LRUCell),
    "minGRU": (fdc.min_gru_cell, fdc.init_min_gru, float, min_gru_by_hand, fdc.linen.MinGRUCell),
}


def programs_of(name: str) -> tuple[Any, dict[str, Program]]:
    cell, init, dtype, by_hand, module = CELLS[name]
    params = init(jax.random.key(0), FEATURES, FEATURES)
    first = jnp.zeros((BATCH, FEATURES), dtype)
    stock = nn.RNN(module(FEATURES), time_major=True)
    layer = stock.init(jax.random.key(0), jnp.zeros((1, BATCH, FEATURES)))

    def run(parallel: bool, spec: fdc.RecurrentDropout, params: Any, xs: Any, rng: Any) -> Any:
        options: Any = {"cell": cell, "dropout": spec, "parallel": parallel}
        return fdc.dropout_scan(params, first, xs, rng, **options)[1]

    return (params, layer), {
        BY_HAND: by_hand,
        "jax.lax.scan": lambda params, xs, _: jax.lax.scan(
            functools.partial(cell, params), first, xs
        )[1],
        "nn.RNN": lambda params, xs, _: stock.apply(params, xs),  # type: ignore[return-value]
        "step by step": functools.partial(run, False, NONE),
        "parallel": functools.partial(run, True, NONE),
        "step by step, noise": functools.partial(run, False, NOISE),
        "parallel, noise": functools.partial(run, True, NOISE),
    }


def measure(name: str, length: int, rounds: int) -> dict[str, Any]:
    """Seconds and bytes of each program, forward and gradient."""
    (params, layer), programs = programs_of(name)
    xs = jax.random.normal(jax.random.key(1), (length, BATCH, FEATURES))
    ready: dict[tuple[str, str], Any] = {}
    memory: dict[str, list[int]] = {}
    for program, run in programs.items():
        args = (layer if program == "nn.RNN" else params, xs, jax.random.key(2))
        gradient = jax.grad(lambda *args, run=run: jnp.mean(run(*args) ** 2))
        compiled = [jax.jit(part).lower(*args).compile() for part in (run, gradient)]
        memory[program] = [part.memory_analysis().temp_size_in_bytes for part in compiled]
        for part, executable in zip(("forward", "gradient"), compiled, strict=True):
            ready[program, part] = functools.partial(executable, *args)
    seconds = cpu_time_in_turn(ready, rounds)
    least = {
        program: [min(seconds[program, part]) for part in ("forward", "gradient")]
        for program in programs
    }
    return {"cell": name, "length": length, "cpu_seconds": least, "bytes": memory}


def cpu_time_in_turn(programs: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    """The CPU seconds of each program in each round; a round before them warms up."""
    seconds: dict[Any, list[float]] = {name: [] for name in programs}
    for number in range(rounds + 1):
        for name, program in programs.items():
            start = time.process_time()
            jax.block_until_ready(program())
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds


def format_table(result: dict[str, Any]) -> str:
    """A Markdown table: each program's times, and the memory of its gradient, as ratios."""
    lines = [
        f"| cell | steps | program | forward / {BY_HAND} | gradient / {BY_HAND} | "
        "memory of the gradient |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        base, size = row["cpu_seconds"][BY_HAND], row["bytes"][BY_HAND][1]
        for program, times in row["cpu_seconds"].items():
            ratios = [time / other for time, other in zip(times, base, strict=True)]
            ratios.append(row["bytes"][program][1] / size)
            shown = " | ".join(f"{ratio:.2f}" for ratio in ratios)
            lines.append(f"| {row['cell']} | {row['length']} | {program} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__, 5)
    parser.add_argument("--quick", action="store_true", help="short sequences")
    options = parser.parse_args()
    lengths = LENGTHS[:2] if options.quick else LENGTHS
    cases = [(name, length) for name in CELLS for length in lengths]
    bar = tqdm(cases, desc="cells and lengths", leave=False, file=sys.stderr)
    rows = [measure(*case, options.rounds) for case in bar]
    result = describe([versions()], Config(batch=BATCH, features=FEATURES)) | {"rows": rows}
    store(result, options.out / "linear.json", format_table(result))


if __name__ == "__main__":
    main()

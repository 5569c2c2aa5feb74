"""The cost of resets and of the layers: ratios within one run, each to its own bare program.

    python benchmarks/layers_and_resets.py               # two minutes on two cores
    python benchmarks/layers_and_resets.py --rounds 10

Forward pass and gradient of an LSTM, 128 steps, batch 64, 256 features, with dropout on the input,
on h and on the output. A layer is held against Flax's own around the bare cell; a scan in which one
step in a hundred is a reset against the same scan without. Within a round every program runs once,
so that whatever else the machine does meets all of them; a ratio is the median over the rounds, of
wall-clock time and of the CPU time of all threads, which a busy machine disturbs less.
"""

import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from compare import describe
from flax import nnx
from jax_programs import spec_of, versions
from program import Config
from rounds import parser_of, store
from tqdm import tqdm

import flax_dropout_cell as fdc

RESETS = 0.01  # the part of all steps, over all rows, that begin a sequence
CONFIG = Config()
MODES = {
    "variational": fdc.Dropout(keep_prob=0.7, variational=True),
    "per step": fdc.Dropout(keep_prob=0.7),
}
PAIRS = {
    "scan, variational, resets": "scan, variational",
    "scan, per step, resets": "scan, per step",
    **{f"{host}, {mode}": f"{host}, stock" for host in ("linen", "nnx") for mode in MODES},
}
"""Which program is held against which."""

Program = Callable[[Any, jax.Array, jax.Array], jax.Array]
"""`run(params, xs, rng)`, which gives the outputs."""


def scan_programs() -> tuple[Any, dict[str, Program]]:
    cell = nn.LSTMCell(CONFIG.features)
    row = jnp.zeros((CONFIG.batch, CONFIG.features))
    params = cell.init(jax.random.key(1), (row, row), row)
    resets = jax.random.bernoulli(jax.random.key(2), RESETS, (CONFIG.time, CONFIG.batch))

    def make(noise: fdc.Dropout, resets: Any) -> Program:
        return lambda params, xs, rng: fdc.dropout_scan(
            params, (row, row), xs, rng, cell=cell.apply, dropout=spec_of(noise), resets=resets
        )[1]

    programs = {f"scan, {mode}": make(noise, None) for mode, noise in MODES.items()}
    resetting = {f"scan, {mode}, resets": make(noise, resets) for mode, noise in MODES.items()}
    return params, programs | resetting


def linen_programs() -> tuple[Any, dict[str, Program]]:
    cell = nn.LSTMCell(CONFIG.features)
    stock = nn.RNN(cell, time_major=True)
    params = stock.init(jax.random.key(1), jnp.zeros((1, CONFIG.batch, CONFIG.features)))

    def make(noise: fdc.Dropout) -> Program:
        layer = fdc.linen.RNN(cell, spec_of(noise), time_major=True)
        return lambda params, xs, rng: layer.apply(params, xs, rng=rng)  # type: ignore

    programs: dict[str, Any] = {"linen, stock": lambda params, xs, _: stock.apply(params, xs)}
    return params, programs | {f"linen, {mode}": make(noise) for mode, noise in MODES.items()}


def nnx_programs() -> tuple[Any, dict[str, Program]]:
    def make(noise: fdc.Dropout | None) -> tuple[Any, Program]:
        cell = nnx.LSTMCell(CONFIG.features, CONFIG.features, rngs=nnx.Rngs(1))
        if noise is None:
            layer: Any = nnx.RNN(cell, time_major=True)
        else:
            layer = fdc.nnx.RNN(cell, spec_of(noise), time_major=True)
        graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

        def run(params: Any, xs: jax.Array, rng: jax.Array) -> jax.Array:
            rnn = nnx.merge(graphdef, params, jax.tree.map(jnp.asarray, rest))
            return rnn(xs) if noise is None else rnn(xs, rngs=rng)

        return params, run

    made = {"nnx, stock": make(None), **{f"nnx, {mode}": make(MODES[mode]) for mode in MODES}}
    return made["nnx, stock"][0], {name: run for name, (_, run) in made.items()}


def compile_all() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Each program's forward pass and gradient, ready to be timed."""
    xs = jax.random.normal(jax.random.key(3), (CONFIG.time, CONFIG.batch, CONFIG.features))
    ready = {}
    for params, programs in (scan_programs(), linen_programs(), nnx_programs()):
        args = (params, xs, jax.random.key(4))
        for name, run in tqdm(programs.items(), desc="compiling", disable=None, leave=False):
            loss = jax.grad(lambda *args, run=run: jnp.mean(run(*args) ** 2))
            parts = [jax.jit(part).lower(*args).compile() for part in (run, loss)]
            ready[name] = tuple(
                lambda part=part, args=args: jax.block_until_ready(part(*args)) for part in parts
            )
    return ready


def measure(rounds: int) -> dict[str, list[list[float]]]:
    """Wall-clock and CPU seconds of each program's forward pass and gradient, `[rounds, 4]`."""
    ready = compile_all()
    seconds: dict[str, list[list[float]]] = {name: [] for name in ready}
    for index in tqdm(range(rounds + 1), desc="measuring", disable=None, leave=False):
        for name, parts in ready.items():
            times = []
            for part in parts:
                start = time.perf_counter(), time.process_time()
                part()
                times += [time.perf_counter() - start[0], time.process_time() - start[1]]
            if index:  # the first one warms up
                seconds[name].append(times)
    return seconds


def ratios(seconds: dict[str, list[list[float]]]) -> dict[str, list[float]]:
    """Each program's times, as multiples of those that it is held against."""
    return {
        name: np.median(np.array(seconds[name]) / np.array(seconds[base]), axis=0).tolist()
        for name, base in PAIRS.items()
    }


def format_table(result: dict[str, Any]) -> str:
    lines = ["| | against | forward | its CPU time | gradient | its CPU time |"]
    lines.append("|---|---|---|---|---|---|")
    for name, times in ratios(result["seconds"]).items():
        cells = [name, PAIRS[name], *(f"{each:.2f}" for each in times)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    options = parser_of(__doc__, 20).parse_args()
    result = describe([versions()], CONFIG) | {"resets": RESETS, "seconds": measure(options.rounds)}
    store(result, options.out / "layers_and_resets.json", format_table(result))


if __name__ == "__main__":
    main()

"""Where a weight's gradient should wait for the end of the loop: the rule, held against a clock.

    python benchmarks/hoisting.py            # twelve sizes of four cells
    python benchmarks/hoisting.py --quick    # two of them

The gradient under variational dropout is compiled three times: with every weight's gradient taken
after the loop, with none, and as the library's rule has it. A ratio is the median over the rounds
of the first program's time divided by the second's; below 1 it pays to wait.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cells import title_of
from cells_programs import functional, spec_of
from compare import describe
from jax_programs import versions
from program import Config
from rounds import parser_of, store, time_in_turn
from tqdm import tqdm

import flax_dropout_cell as fdc
from flax_dropout_cell._hoist import weight_products

# None of these is a size that the rule was made from.
SIZES = (
    Config(time=20, batch=4, features=64),
    Config(time=50, batch=16, features=64),
    Config(time=100, batch=128, features=64),
    Config(time=100, batch=16, features=128),
    Config(time=64, batch=64, features=128),
    Config(time=50, batch=256, features=128),
    Config(time=256, batch=16, features=256),
    Config(time=40, batch=256, features=256),
    Config(time=50, batch=8, features=400),
    Config(time=35, batch=64, features=400),
    Config(time=50, batch=64, features=512),
    Config(time=20, batch=32, features=1000),
)
CELLS = ("six-line LSTM", "LSTMCell", "GRUCell", "untied LSTM")
RULE = {
    name: getattr(weight_products, name)
    for name in ("MIN_WEIGHT_TO_KEPT", "MIN_WEIGHT_TO_KEPT_BATCHED")
}
ALWAYS, NEVER = dict.fromkeys(RULE, 0.0), dict.fromkeys(RULE, float("inf"))


def build_gradient(cell: str, config: Config) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A gradient and its arguments."""
    row = jnp.zeros((config.batch, config.features))
    if cell == "untied LSTM":
        params = fdc.init_lstm(jax.random.key(1), config.features, config.features)
        carry: Any = fdc.LSTMState(row, row)
        spec = fdc.recipes.gal2016(input_keep_prob=0.7, recurrent_keep_prob=0.7, tied=False)
        step: Any = fdc.lstm_cell
    else:
        step, params, carry = functional(cell, config)
        spec = spec_of(cell)

    def loss(params: Any, xs: jax.Array, rng: jax.Array) -> jax.Array:
        ys = fdc.dropout_scan(params, carry, xs, rng, cell=step, dropout=spec)[1]
        return jnp.mean(ys**2)

    xs = jax.random.normal(jax.random.key(2), (config.time, *row.shape))
    return jax.grad(loss), (params, xs, jax.random.key(3))


def lower(cell: str, config: Config, rule: dict[str, float]) -> tuple[Any, tuple[Any, ...]]:
    """A gradient under a rule: its lowered program, and its arguments."""
    for name, share in rule.items():
        setattr(weight_products, name, share)
    jax.clear_caches()
    run, args = build_gradient(cell, config)
    return jax.jit(run).lower(*args), args


def measure(cell: str, config: Config, rounds: int) -> dict[str, Any]:
    """What the rule has chosen, and the seconds of both programs in each round."""
    lowered = [lower(cell, config, rule) for rule in (ALWAYS, NEVER, RULE)]
    after, inside, chosen = [program.as_text() for program, _ in lowered]
    assert chosen in (after, inside)
    programs = {
        name: functools.partial(program.compile(), *args)
        for name, (program, args) in zip(("after", "inside"), lowered, strict=False)
    }
    seconds = [*time_in_turn(programs, rounds).values()]
    return {"cell": cell, "config": config._asdict(), "waits": chosen == after, "seconds": seconds}


def ratio(row: dict[str, Any]) -> float:
    after, inside = np.array(row["seconds"])
    return float(np.median(after / inside))


def cost(row: dict[str, Any]) -> float:
    """The time of the program that the rule has chosen, as a multiple of the faster one's."""
    return max(1.0, ratio(row) if row["waits"] else 1 / ratio(row))


def format_table(result: dict[str, Any]) -> str:
    """A Markdown table of the ratios; those that the rule has kept in the loop in brackets."""
    sizes = list(dict.fromkeys(Config(**row["config"]) for row in result["rows"]))
    lines = [f"| size | {' | '.join(CELLS)} |", f"|---|{'---|' * len(CELLS)}"]
    for size in sizes:
        rows = [row for row in result["rows"] if Config(**row["config"]) == size]
        cells = [f"{ratio(row):.2f}" if row["waits"] else f"({ratio(row):.2f})" for row in rows]
        lines.append(f"| {title_of(size)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__, None, "9")
    parser.add_argument("--quick", action="store_true", help="two sizes, three rounds")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 9)
    pairs = [(cell, size) for size in SIZES[: 2 if options.quick else None] for cell in CELLS]
    rows = [measure(*pair, rounds) for pair in tqdm(pairs, desc="programs", leave=False)]
    result = describe([versions()], SIZES[0]) | {"rule": RULE, "rounds": rounds, "rows": rows}
    del result["config"]
    worst = f"the rule costs {max(map(cost, rows)):.2f} at worst"
    store(result, options.out / "hoisting.json", format_table(result), worst)


if __name__ == "__main__":
    main()

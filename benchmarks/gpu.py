"""One LSTM layer on an accelerator: this library, Flax, cuDNN, in under eight minutes.

    python benchmarks/gpu.py                 # two sizes, float32 and bfloat16
    python benchmarks/gpu.py --torch         # and cuDNN's LSTM, in PyTorch
    python benchmarks/gpu.py --quick         # a tiny size, to try the script on a CPU

Without dropout, with variational and with per-step dropout; each with one, four and eight steps in
a turn of the loop; and once with the products of x in the loop instead of before it. After seven
minutes no other program is started, and the rest is listed as left out. Numbers are milliseconds,
the minimum of the rounds.
"""

import contextlib
import functools
import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from cells import title_of
from compare import describe
from jax_programs import MODES, spec_of, versions
from program import Config
from rounds import parser_of, store

import flax_dropout_cell as fdc
from flax_dropout_cell._hoist import three_parts

SIZES = (Config(time=128, batch=64, features=256), Config(time=35, batch=20, features=650))
QUICK = (Config(time=5, batch=4, features=8),)
UNROLLS = (1, 4, 8)
DTYPES = (jnp.float32, jnp.bfloat16)
SECONDS = 7 * 60

Run = Callable[[], Any]
"""Runs a program and waits for its results."""


def pair_of(apply: Callable[..., jax.Array], *args: Any) -> dict[str, Run]:
    """A forward pass, and the gradient of its mean square by the first argument."""

    def loss(*args: Any) -> jax.Array:
        return jnp.mean(apply(*args).astype(jnp.float32) ** 2)

    def compiled(function: Callable[..., Any]) -> Run:
        program = jax.jit(function).lower(*args).compile()
        return lambda: jax.block_until_ready(program(*args))

    return {"forward": compiled(apply), "gradient": compiled(jax.grad(loss))}


def layer(cell: Any, mode: str, unroll: int, config: Config, dtype: Any) -> dict[str, Run]:
    """Flax's own layer, or this library's if something drops."""
    noise = MODES[mode]
    options: dict[str, Any] = {"time_major": True, "unroll": unroll}
    inner = cell(config.features, dtype=dtype)
    rnn = nn.RNN(inner, **options)
    if noise is not None:
        rnn = fdc.linen.RNN(inner, spec_of(noise), **options)
    rng = jax.random.key(0)
    xs = jax.random.normal(rng, (config.time, config.batch, config.features), dtype)
    params = rnn.init(rng, xs)

    def run(params: Any, xs: jax.Array, rng: jax.Array) -> jax.Array:
        rngs = None if noise is None else {"dropout": rng}
        return rnn.apply(params, xs, rngs=rngs)  # type: ignore[return-value]

    return pair_of(run, params, xs, rng)


@contextlib.contextmanager
def all_products_in_the_loop() -> Iterator[None]:
    """No weight is large enough to leave it."""
    rule, three_parts.MIN_WEIGHT_SIZE = three_parts.MIN_WEIGHT_SIZE, 2**62
    try:
        yield
    finally:
        three_parts.MIN_WEIGHT_SIZE = rule


def uncut_layer(config: Config, dtype: Any) -> dict[str, Run]:
    with all_products_in_the_loop():
        return layer(fdc.linen.LSTMCell, "variational", 1, config, dtype)


def jax_cudnn(config: Config, dtype: Any) -> dict[str, Run]:
    """CuDNN's LSTM through `jax.experimental.rnn`, without dropout."""
    from jax.experimental import rnn

    size, rng = config.features, jax.random.key(0)
    weights = rnn.init_lstm_weight(rng, size, size, num_layers=1, bidirectional=False)
    xs = jax.random.normal(rng, (config.batch, config.time, size), dtype)
    zeros = jnp.zeros((1, config.batch, size), dtype)
    lengths = jnp.full((config.batch,), config.time, jnp.int32)

    def run(weights: jax.Array, xs: jax.Array) -> jax.Array:
        sizes = {"input_size": size, "hidden_size": size, "num_layers": 1}
        options = {"dropout": 0.0, "bidirectional": False}
        return rnn.lstm(xs, zeros, zeros, weights, lengths, **sizes, **options)[0]

    return pair_of(run, weights.astype(dtype), xs)


def torch_cudnn(config: Config, dtype: Any) -> dict[str, Run]:
    """PyTorch's LSTM, which is cuDNN's on a GPU, without dropout."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, jnp.dtype(dtype).name)
    lstm = torch.nn.LSTM(config.features, config.features, device=device, dtype=kind)
    shape = (config.time, config.batch, config.features)
    xs, params = torch.randn(shape, device=device, dtype=kind), list(lstm.parameters())

    def wait(result: Any) -> Any:
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    def forward() -> Any:
        with torch.no_grad():
            return wait(lstm(xs)[0])

    def gradient() -> Any:
        return wait(torch.autograd.grad((lstm(xs)[0].float() ** 2).mean(), params))

    return {"forward": forward, "gradient": gradient}


def keras_layer(config: Config, dtype: Any) -> dict[str, Run]:
    """Keras' LSTM on JAX, without dropout."""
    import keras

    lstm = keras.layers.LSTM(config.features, return_sequences=True, dtype=jnp.dtype(dtype).name)
    xs = jax.random.normal(jax.random.key(0), (config.batch, config.time, config.features), dtype)
    lstm.build(xs.shape)
    rest = [variable.value for variable in lstm.non_trainable_variables]
    params = [variable.value for variable in lstm.trainable_variables]
    return pair_of(lambda params, xs: lstm.stateless_call(params, rest, xs)[0], params, xs)


def programs(*, torch: bool) -> Iterator[tuple[str, Callable[..., dict[str, Run]]]]:
    """Each program by its name, the most telling first."""
    cells = {"nn.OptimizedLSTMCell": nn.OptimizedLSTMCell, "fdc.linen.LSTMCell": fdc.linen.LSTMCell}
    for unroll in UNROLLS:
        for mode in MODES:
            for name, cell in cells.items():
                yield (
                    f"{name}: {mode}, unroll={unroll}",
                    functools.partial(layer, cell, mode, unroll),
                )
        if unroll == 1:
            yield "fdc.linen.LSTMCell: variational, unroll=1, products in the loop", uncut_layer
            yield "jax.experimental.rnn: bare", jax_cudnn
            if torch:
                yield "torch.nn.LSTM: bare", torch_cudnn
            if importlib.util.find_spec("keras"):
                yield "keras.layers.LSTM: bare", keras_layer


def measure(run: Run, rounds: int) -> float:
    """Milliseconds, the minimum of the rounds; the first is not counted."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def measure_all(
    sizes: tuple[Config, ...], rounds: int, *, torch: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    end, rows, left_out = time.monotonic() + SECONDS, [], []
    for name, make in programs(torch=torch):
        for config in sizes:
            for dtype in DTYPES:
                title = f"{name}, {title_of(config)}, {jnp.dtype(dtype).name}"
                if time.monotonic() > end:
                    left_out.append(f"{title}: no time left")
                    continue
                try:
                    parts = make(config, dtype)
                    times = {part: measure(run, rounds) for part, run in parts.items()}
                except Exception as error:
                    reason = (str(error).splitlines() or [""])[0]
                    left_out.append(f"{title}: {type(error).__name__}: {reason[:100]}")
                    continue
                print(title, *(f"{part} {each:.2f} ms" for part, each in times.items()), flush=True)
                rows.append({"name": name, "config": config._asdict(), "ms": times})
                rows[-1]["dtype"] = jnp.dtype(dtype).name
    return rows, left_out


def format_table(result: dict[str, Any]) -> str:
    lines = ["| program | size | dtype | forward, ms | gradient, ms |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        times = [f"{row['ms'][part]:.2f}" for part in ("forward", "gradient")]
        cells = [row["name"], title_of(Config(**row["config"])), row["dtype"], *times]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *(f"left out: {reason}" for reason in result["left_out"])])


def main() -> None:
    parser = parser_of(__doc__, None, "20")
    parser.add_argument("--quick", action="store_true", help="a tiny size, three rounds")
    parser.add_argument("--torch", action="store_true", help="PyTorch too, of this environment")
    options = parser.parse_args()
    sizes = QUICK if options.quick else SIZES
    global UNROLLS
    UNROLLS = UNROLLS[:1] if options.quick else UNROLLS
    rounds = options.rounds or (3 if options.quick else 20)
    rows, left_out = measure_all(sizes, rounds, torch=options.torch)
    result = describe([versions()], sizes[0]) | {
        "device": jax.devices()[0].device_kind, "rounds": rounds, "rows": rows, "left_out": left_out
    }  # fmt: skip
    del result["config"]
    store(result, options.out / "gpu.json", format_table(result))


if __name__ == "__main__":
    main()

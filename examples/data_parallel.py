"""A recurrent model with dropout, trained on all devices of all hosts at once.

Each device has its share of every batch, and draws the masks of that share. The batch, the masks
and the losses are those of one device, however many there are.

    python examples/data_parallel.py                        # all devices of this host
    JAX_NUM_CPU_DEVICES=4 python examples/data_parallel.py  # a CPU as four devices
    srun python examples/data_parallel.py --cluster         # SLURM, Open MPI or a TPU pod
    python examples/data_parallel.py --coordinator HOST:PORT --processes 2 --process-id 0

The task is to repeat the input of `DELAY` steps ago. The first process prints the loss of each step
under dropout, and in the end one without dropout, on a new batch; it writes them to `--out`. With
`--checkpoint DIR`, a run that was killed resumes when it is started again, and ends with the same
losses.
"""

import argparse
import dataclasses
import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flags import Parser, count, keep_prob, positive, seed
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_dropout_cell as fdc
from flax_dropout_cell.linen import DropoutCell

if TYPE_CHECKING:
    from checkpoints import Checkpoints

SCHEMES = ("none", "per-step", "variational")
FEATURES, LENGTH, DELAY = 8, 24, 3
EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that determines the results; numbers of devices and processes do not."""

    scheme: str = "variational"
    steps: int = 100
    batch_size: int = 32
    hidden_size: int = 32
    keep_prob: float = 0.9
    learning_rate: float = 1e-2
    seed: int = 0


# The model ---------------------------------------------------------------------------------------


class Model(nn.Module):
    """Reads a sequence, `[batch, time, features]`, and gives one of the same shape."""

    hidden_size: int
    dropout: fdc.RecurrentDropout
    deterministic: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        lstm = nn.OptimizedLSTMCell(self.hidden_size)
        cell = DropoutCell(lstm, self.dropout, deterministic=self.deterministic)
        return nn.Dense(x.shape[-1])(nn.RNN(cell)(x))


def build_model(config: Config, deterministic: bool = False) -> Model:
    noise = None
    if config.scheme != "none":
        noise = fdc.Dropout(keep_prob=config.keep_prob, variational=config.scheme == "variational")
    dropout = fdc.RecurrentDropout(input=noise, state=noise, output=noise)
    return Model(config.hidden_size, dropout, deterministic)


def mean_error(y: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.mean((y[:, DELAY:] - x[:, :-DELAY]) ** 2)


# The data ----------------------------------------------------------------------------------------


def make_batch(config: Config, step: int, sharding: NamedSharding) -> jax.Array:
    """A batch of sequences. A process makes the rows that its own devices hold, and no others."""

    def make_row(row: int) -> np.ndarray:
        draw = np.random.default_rng((config.seed, step, row))
        return draw.choice(np.array([-1, 1], np.float32), (LENGTH, FEATURES))

    def make_rows(index: Any) -> np.ndarray:
        return np.stack([make_row(row) for row in range(config.batch_size)[index[0]]])

    shape = (config.batch_size, LENGTH, FEATURES)
    return jax.make_array_from_callback(shape, sharding, make_rows)


# The training ------------------------------------------------------------------------------------


class TrainState(NamedTuple):
    """All that a training run needs to resume from where it is; the same on every device.

    Attributes:
      step: how many batches it has learned from; picks the next batch and its masks.
      params: the model's variables.
      opt_state: the optimizer's state.
      losses: the loss of each step, nan where it is still to come.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    losses: jax.Array


def build_mesh() -> Mesh:
    # Of all processes' devices. In Flax's RNN the compiler has to find the shardings: the carry
    # starts as zeros of which nobody says how they are sharded.
    return jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))


def start_training(config: Config, mesh: Mesh) -> TrainState:
    def start() -> TrainState:
        rng, _ = jax.random.split(jax.random.key(config.seed))  # The other one is the masks'.
        params = build_model(config).init(rng, jnp.zeros((1, LENGTH, FEATURES)))
        opt_state = optax.adam(config.learning_rate).init(params)
        return TrainState(jnp.int32(0), params, opt_state, jnp.full(config.steps, jnp.nan))

    return jax.jit(start, out_shardings=NamedSharding(mesh, P()))()


def build_train_step(config: Config, mesh: Mesh) -> Callable[[TrainState, jax.Array], TrainState]:
    """The step that learns from one batch; its masks depend on the seed and `state.step` only."""
    model, optimizer = build_model(config), optax.adam(config.learning_rate)

    def loss_of(params: Any, x: jax.Array, rng: jax.Array) -> jax.Array:
        y: Any = model.apply(params, x, rngs={"dropout": rng})
        return mean_error(y, x)

    def train_step(state: TrainState, x: jax.Array) -> TrainState:
        _, dropout_rng = jax.random.split(jax.random.key(config.seed))
        rng = jax.random.fold_in(dropout_rng, state.step)
        loss, grads = jax.value_and_grad(loss_of)(state.params, x, rng)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            losses=state.losses.at[state.step].set(loss),
        )

    return jax.jit(train_step, out_shardings=NamedSharding(mesh, P()))


def train(config: Config, checkpoints: "Checkpoints | None" = None) -> Iterator[TrainState]:
    """Trains a model, and gives the state after each step."""
    mesh = build_mesh()
    train_step = build_train_step(config, mesh)
    rows = NamedSharding(mesh, P("batch"))
    state = start_training(config, mesh)
    if checkpoints is not None:
        state = checkpoints.restore(state)
    if start := int(state.step):
        yield state
    for step in range(start, config.steps):
        state = train_step(state, make_batch(config, step, rows))
        if checkpoints is not None:
            checkpoints.save(step + 1, state, last=step + 1 == config.steps)
        yield state


def evaluate(config: Config, params: Any) -> float:
    """The loss without dropout, on a batch that is not trained on; every process calls it."""
    model, mesh = build_model(config, deterministic=True), build_mesh()

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def loss_of(params: Any, x: jax.Array) -> jax.Array:
        y: Any = model.apply(params, x)  # Evaluation needs no key.
        return mean_error(y, x)

    return float(loss_of(params, make_batch(config, config.steps, NamedSharding(mesh, P("batch")))))


# The processes -----------------------------------------------------------------------------------


def join(options: argparse.Namespace) -> None:
    """Connects to the other processes, if any. Call it before any other function of JAX.

    When one of them is lost or does not come, JAX ends all others after this timeout.
    """
    by_hand = (options.coordinator, options.processes, options.process_id)
    if not options.cluster and by_hand == (None, None, None):
        return
    timeouts = {
        "initialization_timeout": options.timeout,
        "heartbeat_timeout_seconds": options.timeout,
        "shutdown_timeout_seconds": options.timeout,  # not in every JAX
    }
    known = inspect.signature(jax.distributed.initialize).parameters
    timeouts = {name: timeout for name, timeout in timeouts.items() if name in known}
    jax.distributed.initialize(*by_hand, **timeouts)


# The command line --------------------------------------------------------------------------------


def address(text: str) -> str:
    if not text.rpartition(":")[0] or not text.rpartition(":")[2].isdigit():
        raise argparse.ArgumentTypeError(f"must be HOST:PORT, got {text}")
    return text


def build_parser() -> Parser:
    parser = Parser(
        description="Train a recurrent model with dropout on many devices.",
        epilog="Ctrl-C ends the training, and writes the losses until then to --out.",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="file for the losses, as JSON")
    parser.add_argument("--scheme", choices=SCHEMES)
    for name, kind, text in (
        ("steps", count, "batches to learn from"),
        ("batch_size", count, "sequences in a batch, on all devices together"),
        ("hidden_size", count, "size of the LSTM"),
        ("keep_prob", keep_prob, "share of units kept at each site"),
        ("learning_rate", positive, "Adam's"),
        ("seed", seed, "of the weights, the data and the masks"),
    ):
        flag, default = f"--{name.replace('_', '-')}", getattr(Config, name)
        parser.add_argument(flag, type=kind, help=f"{text} ({default})")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="folder to save in, and to resume from"
    )
    parser.add_argument(
        "--checkpoint-every", type=count, metavar="N", help="steps between saves (20)"
    )
    group = parser.add_argument_group("several processes")
    group.add_argument(
        "--cluster",
        action="store_true",
        help="find the other processes through the cluster's launcher",
    )
    group.add_argument(
        "--coordinator", type=address, metavar="HOST:PORT", help="where process 0 listens"
    )
    group.add_argument("--processes", type=count, help="number of processes")
    group.add_argument("--process-id", type=seed, help="number of this process, from 0")
    group.add_argument(
        "--timeout",
        type=count,
        default=100,
        metavar="SECONDS",
        help="until a process counts as lost (100)",
    )
    return parser


def open_checkpoints(
    parser: Parser, options: argparse.Namespace, config: Config
) -> "Checkpoints | None":
    if options.checkpoint is None:
        return None
    import checkpoints  # Not at the top: this brings Orbax, which takes half a second.

    try:
        return checkpoints.open_checkpoints(
            options.checkpoint, dataclasses.asdict(config), options.checkpoint_every or 20
        )
    except checkpoints.CheckpointError as error:
        parser.error(str(error))


def check_flags(parser: Parser, options: argparse.Namespace, config: Config) -> None:
    by_hand = [options.coordinator, options.processes, options.process_id]
    if None in by_hand and by_hand != [None, None, None]:
        parser.error("--coordinator, --processes and --process-id go together")
    if options.cluster and by_hand != [None, None, None]:
        parser.error(
            "--cluster finds out addresses and numbers itself: leave out --coordinator, "
            "--processes and --process-id"
        )
    if None not in by_hand and options.process_id >= options.processes:
        parser.error(f"--process-id must be below --processes, got {options.process_id}")
    if options.checkpoint_every is not None and options.checkpoint is None:
        parser.error("--checkpoint-every needs --checkpoint")
    if config.scheme == "none" and options.keep_prob is not None:
        parser.error("--keep-prob needs a --scheme with dropout")


def check_out(parser: Parser, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("a").close()
        if not existed:
            path.unlink(missing_ok=True)  # Another process may have been here.
    except OSError as error:
        parser.error(f"--out must be a file to write to, got {path}: {error.strerror}")


def main() -> int:
    parser = build_parser()
    options = parser.parse_args()
    given = {name: value for name, value in vars(options).items() if value is not None}
    names = {field.name for field in dataclasses.fields(Config)}
    config = Config(**{name: value for name, value in given.items() if name in names})
    check_flags(parser, options, config)
    if options.out is not None:
        check_out(parser, options.out)  # Now, because after the training its losses would be lost.
    try:
        join(options)
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(str(error).splitlines()[0])
    if config.batch_size % jax.device_count():
        parser.error(
            f"--batch-size must be a multiple of the number of devices, {jax.device_count()}, "
            f"got {config.batch_size}"
        )
    checkpoints = open_checkpoints(parser, options, config)
    failures: tuple[type[Exception], ...] = ()
    if checkpoints is not None:
        from checkpoints import CheckpointError

        failures = (CheckpointError,)
    first, status = jax.process_index() == 0, 0
    losses, state, evaluation = np.zeros(0), None, None
    if first:
        print(f"{jax.device_count()} devices, {jax.process_count()} processes", flush=True)
    try:
        for state in train(config, checkpoints):
            losses = np.asarray(state.losses)[: int(state.step)]
            if first:
                print(f"step {len(losses)}: loss {losses[-1]:.6f}", flush=True)
        if state is not None:
            evaluation = evaluate(config, state.params)
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
        if first:
            print(f"stopped after {len(losses)} of {config.steps} steps", flush=True)
    except failures as error:
        status = EXIT_FAILED
        if first:
            print(f"{error}; stopped after {len(losses)} of {config.steps} steps", file=sys.stderr)
    if first and evaluation is not None:
        print(f"without dropout, on a new batch: loss {evaluation:.6f}", flush=True)
    if first and options.out is not None:
        report = {
            "config": dataclasses.asdict(config),
            "devices": jax.device_count(),
            "processes": jax.process_count(),
            "losses": losses.tolist(),
            "evaluation_loss": evaluation,
        }
        try:
            options.out.write_text(json.dumps(report, indent=2) + "\n")
        except OSError as error:
            parser.error(f"{options.out} cannot be written to: {error.strerror}")
        print(f"written to {options.out}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())

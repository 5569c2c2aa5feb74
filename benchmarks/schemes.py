"""Which recurrent-dropout scheme? All of them on the same data, tuned alike.

    python benchmarks/schemes.py chorales --data FOLDER     # the folder holds jsb_chorales.mat
    python benchmarks/schemes.py digits

Every scheme gets the same budget: the same model and training, four settings, and five seeds of
each; the setting with the best mean validation is tested. A scheme's settings are its strengths,
those of no dropout are learning rates. Every training keeps the weights of
the epoch that is best by validation, that without dropout too. The runs of a scheme are one
program, side by side on an accelerator. Results go to a JSON, scheme by scheme: started
again, it goes on with the schemes that are missing. It ends with a table and a figure.
"""

import argparse
import dataclasses
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compare import positive_int
from rounds import command_of, resume, write
from scheme_cells import CELLS
from scheme_noises import COMPARED, SCHEMES, Scheme, Setting
from scheme_tables import draw, format_table
from scheme_tasks import TASKS, Split, Task

import flax_dropout_cell as fdc


@dataclasses.dataclass(frozen=True)
class Config:
    """What is the same for all schemes of a task, whose `config` has its own defaults."""

    units: int = 128
    epochs: int = 60
    batch: int = 16
    learning_rate: float = 3e-3
    max_grad_norm: float = 1.0
    seeds: int = 5
    mc_samples: int = 20


# One run -----------------------------------------------------------------------------------------


class Model(NamedTuple):
    """The layers, and the readout of their outputs."""

    cell_name: str
    task: Task
    config: Config

    def init(self, rng: jax.Array) -> dict[str, Any]:
        cell_rng, kernel_rng, embedding_rng = jax.random.split(rng, 3)
        units, outputs, words = self.config.units, self.task.outputs, self.task.words
        inputs = self.task.splits[0].inputs.shape[-1] if words is None else units
        layers = CELLS[self.cell_name]
        params = {
            "layers": [
                layers.init(rng, units if at else inputs, units)
                for at, rng in enumerate(layer_keys(cell_rng, layers.count))
            ],
            "kernel": jax.nn.initializers.lecun_normal()(kernel_rng, (units, outputs)),
            "bias": jnp.zeros(outputs),
        }
        if words is not None:
            normal = jax.nn.initializers.normal(0.1)
            params["embedding"] = normal(embedding_rng, (words, units))
        return params

    def predict(
        self, params: Any, split: Split, rng: Any, specs: list[fdc.RecurrentDropout]
    ) -> jax.Array:
        """The outputs at each step, `[batch, time, outputs]`; `specs` has one for each layer."""
        layers, rows = CELLS[self.cell_name], split.inputs.shape[0]
        xs = split.inputs if self.task.words is None else params["embedding"][split.inputs]
        ys = xs.swapaxes(0, 1)
        keys = layer_keys(rng, layers.count)
        for weights, spec, rng in zip(params["layers"], specs, keys, strict=True):
            _, ys = fdc.dropout_scan(
                weights,
                layers.first_carry(rows, self.config.units),
                ys,
                rng,
                cell=layers.cell,
                dropout=spec,
                seq_lengths=split.lengths,
            )
        return ys.swapaxes(0, 1) @ params["kernel"] + params["bias"]

    def loss(self, params: Any, split: Split, rng: Any, specs: Any) -> jax.Array:
        nlls = self.task.nlls(self.predict(params, split, rng, specs), split.targets)
        return self._mean(nlls, split)

    def evaluate(self, params: Any, split: Split, rng: Any, specs: Any, samples: int) -> jax.Array:
        """The negative log-likelihood and the score of averaged predictions, or nan for no score.

        `samples=0` predicts once, with the noises' expectations.
        """

        def sample(rng: Any) -> tuple[jax.Array, ...]:
            outputs = self.predict(params, split, rng, specs)
            nlls = self.task.nlls(outputs, split.targets)
            score = self.task.score
            return (nlls,) if score is None else (nlls, score.probabilities(outputs, split.targets))

        if samples:
            nlls, *scored = fdc.mc_samples(sample, rng, samples, chunk_size=1)
            nlls = jnp.log(samples) - jax.nn.logsumexp(-nlls, axis=0)
            scored = [probabilities.mean(0) for probabilities in scored]
        else:
            nlls, *scored = sample(None)
        nll = self._mean(nlls, split)
        if self.task.score is None:
            return jnp.stack([nll, jnp.nan])
        (probabilities,) = scored
        hits = self.task.score.hits(probabilities, split.targets)
        return jnp.stack([nll, self._mean(hits, split)])

    def _mean(self, values: jax.Array, split: Split) -> jax.Array:
        weights = self.task.weights(split.lengths, values.shape[1])
        return (weights * values).sum() / weights.sum()


def layer_keys(rng: Any, count: int) -> list[Any]:
    """A key for each layer; None for each in evaluation."""
    if rng is None or count == 1:
        return [rng] * count
    return list(jax.random.split(rng, count))


def build_run(task: Task, config: Config, cell_name: str, scheme: Scheme) -> Callable[..., Any]:
    """A whole training as a function of its key and its `Setting`.

    It gives `(negative log-likelihood, score)` of validation and of test at the epoch that is
    best by validation, that epoch, and the curve `[epochs, (train, valid)]`. With Monte Carlo, the
    likelihoods and scores are a row each: of one pass without noise, then of the average.
    """
    train, valid, test = (Split(*map(jnp.asarray, split)) for split in task.splits)
    model = Model(cell_name, task, config)
    batches = len(train.inputs) // config.batch
    passes = (0, config.mc_samples) if scheme.monte_carlo else (0,)

    def run(rng: jax.Array, setting: Setting) -> Any:
        steps = config.epochs * batches
        schedule = optax.cosine_decay_schedule(config.learning_rate * setting.rate, steps)
        optimizer = optax.chain(
            optax.clip_by_global_norm(config.max_grad_norm),
            optax.adamw(schedule, weight_decay=setting.weight_decay),
        )
        # A layer's outputs are the next one's inputs, which are not dropped twice.
        keep = setting.strength if task.drops_inputs else 1.0
        before = [keep] + [1.0] * (CELLS[cell_name].count - 1)
        specs = [scheme.noise(setting.strength, keep, cell_name) for keep in before]
        init_rng, rng, test_rng = jax.random.split(rng, 3)
        params = model.init(init_rng)

        def learn(state: Any, at: Any) -> Any:
            params, opt_state = state
            rows, rng = at
            batch = Split(*(part[rows] for part in train))
            loss, grads = jax.value_and_grad(model.loss)(params, batch, rng, specs)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        def run_epoch(state: Any, rng: jax.Array) -> Any:
            params, opt_state, best, best_loss = state
            order_rng, rng = jax.random.split(rng)
            order = jax.random.permutation(order_rng, len(train.inputs))
            rows = order[: batches * config.batch].reshape(batches, config.batch)
            keys = jax.random.split(rng, batches)
            (params, opt_state), losses = jax.lax.scan(learn, (params, opt_state), (rows, keys))
            loss = model.loss(params, valid, None, specs)
            best = jax.tree.map(
                lambda new, old: jnp.where(loss < best_loss, new, old), params, best
            )
            state = (params, opt_state, best, jnp.minimum(loss, best_loss))
            return state, jnp.stack([losses.mean(), loss])

        state = (params, optimizer.init(params), params, jnp.float32(jnp.inf))
        keys = jax.random.split(rng, config.epochs)
        (*_, best, _), curve = jax.lax.scan(run_epoch, state, keys)
        results = [
            jnp.stack([model.evaluate(best, split, test_rng, specs, count) for count in passes])
            for split in (valid, test)
        ]
        return *results, 1 + curve[:, 1].argmin(), curve

    if jax.default_backend() != "cpu":
        return jax.jit(jax.vmap(jax.vmap(run, (0, None)), (None, 0)))

    # One after the other: on a CPU batched products of matrices are slower than plain ones. And
    # each in a call of its own: with JAX 0.12 on a CPU, a loop with several large products keeps
    # some memory at each step until its program returns, which was 22 GB after half an hour.
    one = jax.jit(run)

    def run_all(keys: jax.Array, settings: Setting) -> Any:
        runs = [[one(rng, setting) for rng in keys] for setting in map(Setting, *settings)]
        return stack([stack(of_setting) for of_setting in runs])

    return run_all


def stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


# All runs ----------------------------------------------------------------------------------------


def compare(task: Task, config: Config, cell: str, scheme: Scheme) -> list[dict[str, Any]]:
    """Runs all strengths with all seeds, and picks the strength by the mean validation: a row."""
    began = time.monotonic()
    config = for_cell(task, config, cell)
    run = build_run(task, config, cell, scheme)
    knob = "rate" if scheme.scales_rate else "strength"
    settings = stack([Setting(**{knob: strength}) for strength in scheme.strengths])
    valid, test, epochs, curves = map(np.asarray, run(keys_of(config), settings))
    by_strength = valid[:, :, -1, 0].mean(1, dtype=float)
    picked = int(by_strength.argmin())
    of_picked = (valid[picked, :, -1], test[picked, :, -1], epochs[picked], curves[picked])
    row = {
        "scheme": scheme.name,
        "cell": cell,
        "learning_rate": config.learning_rate,
        "strengths": [*scheme.strengths],
        "valid_nll_by_strength": by_strength.tolist(),
        "strength": scheme.strengths[picked],
    }
    return [row | describe_trainings(task, config, of_picked, began) | describe_run()]


def for_cell(task: Task, config: Config, cell: str) -> Config:
    """The config with the learning rate of a cell."""
    rate = config.learning_rate * task.rate_of.get(cell, 1.0)
    return dataclasses.replace(config, learning_rate=rate)


def keys_of(config: Config) -> jax.Array:
    return jax.vmap(jax.random.key)(jnp.arange(config.seeds))


def describe_trainings(task: Task, config: Config, results: Any, began: float) -> dict[str, Any]:
    """Each seed's numbers at one setting, from what `build_run` gives for one way to predict."""
    valid, test, epochs, curves = results
    described = {
        "seed": [*range(config.seeds)],
        "valid_nll": valid[:, 0].tolist(),
        "test_nll": test[:, 0].tolist(),
        "best_epoch": epochs.tolist(),
        "epochs": config.epochs,
        "seconds": round(time.monotonic() - began, 1),
        "curves": np.round(curves.astype(float), 4).tolist(),
    }
    if task.score is not None:
        described["test_score"] = test[:, 1].tolist()
    return described


def describe(task: Task, name: str, config: Config) -> dict[str, Any]:
    return {
        "task": name,
        "source": task.source,
        "unit": task.unit,
        "score": None if task.score is None else task.score.name,
        "config": dataclasses.asdict(config),
        "rows": [],
    }


def describe_run() -> dict[str, Any]:
    """What a row was run with; the rows of one file may differ in it."""
    packages = ("jax", "jaxlib", "flax_dropout_cell")
    return {
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in packages},
        "command": command_of(sys.argv),
    }


def main() -> None:
    run_rows("Compare recurrent-dropout schemes.", "schemes", COMPARED, compare)


def run_rows(
    description: str,
    prefix: str,
    compared: dict[str, Sequence[str]],
    compare: Callable[[Task, Config, str, Scheme], list[dict[str, Any]]],
) -> None:
    """Reads the command line, and adds the rows that are missing to `PREFIX_TASK.json`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="FOLDER")
    parser.add_argument("--cell", choices=compared, action="append", help="some instead of all")
    parser.add_argument("--scheme", choices=SCHEMES, action="append", help="some instead of all")
    for field in dataclasses.fields(Config):
        kind: Any = positive_int if isinstance(field.default, int) else float
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, default=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.data is not None and arguments.task != "chorales":
        parser.error(f"--data is for chorales; {arguments.task} need none")
    try:
        task = TASKS[arguments.task](arguments.data)
    except (ImportError, KeyError, OSError, ValueError) as error:
        parser.error(f"{arguments.task} cannot be read: {error}")
    given = {key: value for key, value in vars(arguments).items() if hasattr(Config, key)}
    config = Config(**task.config | given)
    if config.batch > len(task.splits[0].inputs):
        parser.error(f"--batch is {config.batch}, of {len(task.splits[0].inputs)} sequences")
    path = arguments.out / f"{prefix}_{arguments.task}.json"
    report = resume(parser, describe(task, arguments.task, config), path)
    if report["source"] != task.source:
        parser.error(f"{path} is of {report['source']}, not {task.source}; give another --out")
    cells, names = [*compared], [*SCHEMES]
    done = {(row["cell"], row["scheme"]) for row in report["rows"]}
    for cell in arguments.cell or compared:
        for name in compared[cell]:
            if (cell, name) in done or (arguments.scheme and name not in arguments.scheme):
                continue
            report["rows"] += compare(task, config, cell, SCHEMES[name])
            report["rows"].sort(
                key=lambda row: (cells.index(row["cell"]), names.index(row["scheme"]))
            )
            write(path, report)
            draw(report, path.with_suffix(".png"))
            print(format_table(report), flush=True)
    print(f"written to {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()

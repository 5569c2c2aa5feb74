"""Which recurrent-dropout scheme? All of them on the same data, tuned alike.

    python benchmarks/schemes.py chorales --data FOLDER     # the folder holds jsb_chorales.mat
    python benchmarks/schemes.py digits

Every scheme gets the same budget: the same model and training, one probability out of four that
is picked by validation with one seed, then five seeds. Every training keeps the weights of the
epoch that is best by validation, that without dropout too. The runs of a scheme are one program,
by `jax.vmap` over seeds and probabilities. Results go to a JSON, scheme by scheme: started again,
it goes on with the schemes that are missing. In the end it prints a table.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scheme_tables import format_table
from scheme_tasks import TASKS, Split, Task

import flax_dropout_cell as fdc

SEEDS = 5
KEPT = (0.9, 0.8, 0.65, 0.5)
ZONED_OUT = (0.05, 0.15, 0.3, 0.5)
STDDEVS = (0.02, 0.05, 0.1, 0.2)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is the same for all schemes of a task."""

    units: int = 128
    epochs: int = 60
    batch: int = 16
    learning_rate: float = 1e-2
    max_grad_norm: float = 1.0
    mc_samples: int = 20


class Scheme(NamedTuple):
    """A scheme: its noise of a strength, the strengths to pick from, and how it is tested.

    `noise(strength, before)` takes what to keep of the inputs apart: some tasks drop none of them.
    """

    name: str
    noise: Callable[[Any, Any], fdc.RecurrentDropout]
    strengths: tuple[float, ...]
    monte_carlo: bool = False


def no_dropout(_: Any, __: Any) -> fdc.RecurrentDropout:
    return fdc.RecurrentDropout()


def zaremba(keep: Any, before: Any) -> fdc.RecurrentDropout:
    return fdc.recipes.zaremba2014(input_keep_prob=before, output_keep_prob=keep)


def gal(keep: Any, before: Any, tied: bool = True) -> fdc.RecurrentDropout:
    return fdc.recipes.gal2016(
        input_keep_prob=before, recurrent_keep_prob=keep, output_keep_prob=keep, tied=tied
    )


def semeniuta(keep: Any, before: Any) -> fdc.RecurrentDropout:
    return fdc.recipes.semeniuta2016(
        candidate_keep_prob=keep, input_keep_prob=before, output_keep_prob=keep
    )


def zoneout(prob: Any, _: Any) -> fdc.RecurrentDropout:
    return fdc.recipes.krueger2016(cell_prob=prob, hidden_prob=prob / 3)


def weight_drop(keep: Any, before: Any) -> fdc.RecurrentDropout:
    spec = fdc.recipes.merity2017(weight_keep_prob=keep, input_keep_prob=before)
    output = fdc.Dropout(keep_prob=keep, variational=True)
    return dataclasses.replace(spec, output=output)


def weight_noise(stddev: Any, _: Any) -> fdc.RecurrentDropout:
    return fdc.RecurrentDropout(params=fdc.GaussianNoise(stddev=stddev, variational=True))


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("none", no_dropout, (0.0,)),
        Scheme("Zaremba", zaremba, KEPT),
        Scheme("Gal, tied", gal, KEPT),
        Scheme("Gal, tied, Monte Carlo", gal, KEPT, monte_carlo=True),
        Scheme("Gal, untied", functools.partial(gal, tied=False), KEPT),
        Scheme("Semeniuta", semeniuta, KEPT),
        Scheme("zoneout", zoneout, ZONED_OUT),
        Scheme("weight-drop", weight_drop, KEPT),
        Scheme("weight noise", weight_noise, STDDEVS),
    )
}


# One run -----------------------------------------------------------------------------------------


def predict(params: Any, split: Split, rng: Any, cell: Any, spec: Any) -> jax.Array:
    """The model's outputs, `[batch, time, outputs]`."""
    batch = split.inputs.shape[0]
    zeros = jnp.zeros((batch, params["cell"].recurrent_kernel.shape[0]))
    carry = fdc.LSTMState(zeros, zeros) if cell is fdc.lstm_cell else zeros
    _, ys = fdc.dropout_scan(
        params["cell"],
        carry,
        split.inputs.swapaxes(0, 1),
        rng,
        cell=cell,
        dropout=spec,
        seq_lengths=split.lengths,
    )
    return ys.swapaxes(0, 1) @ params["kernel"] + params["bias"]


def build_run(task: Task, config: Config, cell_name: str, scheme: Scheme) -> Callable[..., Any]:
    """A whole training as a function of its key and the scheme's strength.

    It gives the negative log-likelihoods of validation and test at the epoch that is best by
    validation, that epoch, and the curve `[epochs, (train, valid)]`.
    """
    train, valid, test = (Split(*map(jnp.asarray, split)) for split in task.splits)
    cell = fdc.lstm_cell if cell_name == "lstm" else fdc.gru_cell
    init_cell = fdc.init_lstm if cell_name == "lstm" else fdc.init_gru
    batches = len(train.inputs) // config.batch
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.epochs * batches)
    optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.adam(schedule))

    def loss_of(params: Any, split: Split, rng: Any, spec: Any) -> jax.Array:
        nlls = task.nlls(predict(params, split, rng, cell, spec), split.targets)
        weights = task.weights(split.lengths, nlls.shape[1])
        return (weights * nlls).sum() / weights.sum()

    def mc_loss_of(params: Any, split: Split, rng: Any, spec: Any) -> jax.Array:
        def sample(rng: jax.Array) -> jax.Array:
            return task.nlls(predict(params, split, rng, cell, spec), split.targets)

        sampled = fdc.mc_samples(sample, rng, config.mc_samples, chunk_size=1)
        nlls = jnp.log(config.mc_samples) - jax.nn.logsumexp(-sampled, axis=0)
        weights = task.weights(split.lengths, nlls.shape[1])
        return (weights * nlls).sum() / weights.sum()

    def run(rng: jax.Array, strength: jax.Array) -> Any:
        spec = scheme.noise(strength, strength if task.drops_inputs else 1.0)
        cell_rng, kernel_rng, rng = jax.random.split(rng, 3)
        shape = (config.units, task.outputs)
        params = {
            "cell": init_cell(cell_rng, train.inputs.shape[-1], config.units),
            "kernel": jax.nn.initializers.lecun_normal()(kernel_rng, shape),
            "bias": jnp.zeros(task.outputs),
        }

        def learn(state: Any, at: Any) -> Any:
            params, opt_state = state
            rows, rng = at
            batch = Split(*(part[rows] for part in train))
            loss, grads = jax.value_and_grad(loss_of)(params, batch, rng, spec)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        def run_epoch(state: Any, rng: jax.Array) -> Any:
            params, opt_state, best, best_loss = state
            order_rng, rng = jax.random.split(rng)
            order = jax.random.permutation(order_rng, len(train.inputs))
            rows = order[: batches * config.batch].reshape(batches, config.batch)
            keys = jax.random.split(rng, batches)
            (params, opt_state), losses = jax.lax.scan(learn, (params, opt_state), (rows, keys))
            loss = loss_of(params, valid, None, spec)
            best = jax.tree.map(
                lambda new, old: jnp.where(loss < best_loss, new, old), params, best
            )
            state = (params, opt_state, best, jnp.minimum(loss, best_loss))
            return state, jnp.stack([losses.mean(), loss])

        state = (params, optimizer.init(params), params, jnp.float32(jnp.inf))
        keys = jax.random.split(rng, config.epochs)
        (*_, best, best_loss), curve = jax.lax.scan(run_epoch, state, keys)
        if scheme.monte_carlo:
            valid_loss, test_loss = (mc_loss_of(best, part, rng, spec) for part in (valid, test))
        else:
            valid_loss, test_loss = best_loss, loss_of(best, test, None, spec)
        return valid_loss, test_loss, 1 + curve[:, 1].argmin(), curve

    return jax.jit(jax.vmap(run))


# All runs ----------------------------------------------------------------------------------------


def compare(task: Task, config: Config, cell: str, scheme: Scheme) -> dict[str, Any]:
    """Picks the strength with the first seed, and runs the other seeds with it."""
    began, cpu_began = time.monotonic(), time.process_time()
    run = build_run(task, config, cell, scheme)

    def runs(seeds: list[int], strengths: list[float]) -> list[np.ndarray]:
        keys = jax.vmap(jax.random.key)(jnp.array(seeds))
        return [np.asarray(part) for part in run(keys, jnp.array(strengths, jnp.float32))]

    candidates = [*scheme.strengths]
    first = runs([0] * len(candidates), candidates)
    picked = int(first[0].argmin())
    others = runs([*range(1, SEEDS)], [candidates[picked]] * (SEEDS - 1))
    valid, test, epochs, curves = (
        np.concatenate([one[picked : picked + 1], more])
        for one, more in zip(first, others, strict=True)
    )
    return {
        "scheme": scheme.name,
        "cell": cell,
        "strengths": candidates,
        "valid_nll_by_strength": first[0].tolist(),
        "strength": candidates[picked],
        "seed": [*range(SEEDS)],
        "valid_nll": valid.tolist(),
        "test_nll": test.tolist(),
        "best_epoch": epochs.tolist(),
        "epochs": config.epochs,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu_began, 1),
        "curves": np.round(curves, 4).tolist(),
    }


def describe(task: Task, name: str, config: Config) -> dict[str, Any]:
    packages = ("jax", "jaxlib", "flax_dropout_cell")
    return {
        "task": name,
        "source": task.source,
        "unit": task.unit,
        "config": dataclasses.asdict(config),
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in packages},
        "command": shlex.join(["python", *sys.argv]),
        "rows": [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare recurrent-dropout schemes.")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="FOLDER")
    parser.add_argument("--cell", choices=("lstm", "gru"), default="lstm")
    parser.add_argument("--scheme", choices=SCHEMES, action="append", help="some instead of all")
    for field in dataclasses.fields(Config):
        kind: Any = type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    arguments = parser.parse_args()
    config = Config(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Config)})
    try:
        task = TASKS[arguments.task](arguments.data)
    except (OSError, ImportError) as error:
        parser.error(str(error))
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"schemes_{arguments.task}.json"
    report = describe(task, arguments.task, config)
    if path.exists():
        old = json.loads(path.read_text())
        if old["config"] != report["config"]:
            parser.error(f"{path} is of another config; give another --out")
        report["rows"] = old["rows"]
    done = {(row["cell"], row["scheme"]) for row in report["rows"]}
    for name in arguments.scheme or SCHEMES:
        if (arguments.cell, name) in done:
            continue
        report["rows"].append(compare(task, config, arguments.cell, SCHEMES[name]))
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(report) + "\n")
        beside.replace(path)
        print(format_table(report), flush=True)


if __name__ == "__main__":
    main()

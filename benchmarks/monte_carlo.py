"""Does Monte Carlo predict better than one pass without noise? A trained language model, tested.

    python benchmarks/monte_carlo.py --data DIR --checkpoint saved/inan-small

Gal and Ghahramani 2016 (arXiv:1512.05287) average the probabilities of samples that differ in their
masks. A sample keeps its masks for the whole test set, or draws new ones for each window or for
each sentence. The average is a power mean, normalized over the vocabulary, as in Melis et al. 2018
(arXiv:1805.09208): power 1 is the arithmetic mean, power 0 the geometric one.

The test set is one row of words, and the carry is handed on through all of it. If it is run again,
the program goes on from the rows in `--out`.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from compare import cpu_name, positive_int
from jax_programs import versions
from rounds import resume, store
from tqdm import tqdm

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from command_line import open_checkpoints
from configs import CONFIGS, Config
from corpus import (
    END_OF_SENTENCE,
    Corpus,
    InputError,
    Rows,
    cut_evenly,
    lay_out,
    load_corpus,
    window_at,
)
from evaluation import build_evaluate
from language_model import LanguageModel
from train_state import start_training

MASKS = ("set", "window", "sentence")
"""For how long a sample keeps its masks."""

POWERS = (1.0, 0.5, 0.0)


AT_ONCE = 10
"""Samples whose logits are in memory together, at most: for 100, they would not fit the caches."""


def to_power(logs: jax.Array, power: float) -> jax.Array:
    """Log-probabilities as the numbers whose mean is the power mean; see `from_power`."""
    return logs if power == 0 else jnp.exp(power * logs)


def from_power(mean: jax.Array, power: float) -> jax.Array:
    """The power mean's log-probabilities, normalized over the classes."""
    return jax.nn.log_softmax(mean if power == 0 else jnp.log(mean) / power)


def number_sentences(rows: Rows, end: int) -> np.ndarray:
    """Counts the sentences up to each word that is read: `[rows, words]`."""
    return np.cumsum(np.asarray(rows.inputs) == end, axis=1, dtype=np.int32)


def build_step(model: LanguageModel, window: int, masks: str) -> Callable[..., Any]:
    """Reads a window with all samples: their new carries, and the loss of each word by power.

    Keys and carries come in groups of samples, `[groups, samples, ...]`.
    """

    @jax.jit
    def step(
        params: Any, carry: Any, rngs: jax.Array, rows: Rows, sentences: jax.Array, start: jax.Array
    ) -> tuple[Any, jax.Array]:
        at = window_at(rows, start, window)
        ids = jax.lax.dynamic_slice_in_dim(sentences, start, window, axis=1)

        def read(rng: jax.Array, carry: Any) -> tuple[jax.Array, Any]:
            if masks == "window":
                rng = jax.random.fold_in(rng, start)
            logits, carry, _ = model.apply(
                params,
                at.inputs,
                carry,
                start=0 if masks == "window" else start,
                sequence_ids=ids if masks == "sentence" else None,
                keep_words=True,
                rngs={"dropout": rng},
            )
            return logits, carry

        def add(sums: list[jax.Array], group: Any) -> tuple[list[jax.Array], jax.Array]:
            logits, carry = jax.vmap(read)(*group)
            logs = jax.nn.log_softmax(logits)
            raised = [to_power(logs, power).sum(0) for power in POWERS]
            return [total + new for total, new in zip(sums, raised, strict=True)], carry

        zeros = jnp.zeros((*at.inputs.shape, model.vocabulary_size))
        sums, carry = jax.lax.scan(add, [zeros] * len(POWERS), (rngs, carry))
        targets, nlls = at.targets[..., None], []
        for total, power in zip(sums, POWERS, strict=True):
            logs = from_power(total / rngs.size, power)
            nlls.append(-jnp.take_along_axis(logs, targets, axis=-1)[..., 0])
        return carry, jnp.stack([jnp.sum(at.weights * nll) for nll in nlls])

    return step


def run_test(
    config: Config, corpus: Corpus, params: Any, masks: str, samples: int
) -> dict[str, Any]:
    """Perplexities of the test split, by power."""
    began = time.monotonic()
    model = LanguageModel(config, len(corpus.vocabulary))
    host = lay_out(corpus.test, 1, config.window)
    sentences = jnp.asarray(number_sentences(host, corpus.vocabulary.index(END_OF_SENTENCE)))
    rows = jax.device_put(host)
    at_once = max(size for size in range(1, AT_ONCE + 1) if samples % size == 0)
    # 2, for a split key gives fold_in(key, 0) and fold_in(key, 1), which the training has.
    rngs = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 2), samples)
    rngs = rngs.reshape(-1, at_once)
    zeros = model.zero_carry(1)
    carry = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*rngs.shape, *leaf.shape)), zeros)
    step, total = build_step(model, config.window, masks), np.zeros(len(POWERS))
    quiet = not sys.stderr.isatty()
    for start in tqdm(cut_evenly(host, config.window).starts, masks, disable=quiet):
        carry, nlls = step(params, carry, rngs, rows, sentences, start)
        total += np.asarray(nlls)
    perplexities = np.exp(total / host.weights.sum())
    return {
        "masks": masks,
        "samples": samples,
        "perplexity": dict(zip(map(str, POWERS), perplexities.tolist(), strict=True)),
        "seconds": round(time.monotonic() - began, 1),
    }


def format_table(report: dict[str, Any]) -> str:
    lines = [
        f"| new masks for each | samples | {' | '.join(f'power {power:g}' for power in POWERS)} |",
        "|---" * (2 + len(POWERS)) + "|",
    ]
    for row in report["rows"]:
        cells = [f"{row['perplexity'][str(power)]:.2f}" for power in POWERS]
        lines.append(f"| {row['masks']} | {row['samples']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Without noise: {report['without_noise']:.2f}."])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="default: results")
    parser.add_argument("--data", type=Path, metavar="DIR", help="Penn Treebank's three files")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument("--config", choices=CONFIGS, default="inan-small")
    parser.add_argument("--masks", choices=MASKS, action="append", help="one instead of all")
    parser.add_argument(
        "--samples", type=positive_int, action="append", help="default: 20, then 100"
    )
    options = parser.parse_args()
    config = CONFIGS[options.config]
    try:
        corpus = load_corpus(options.data, config.vocabulary_size)
    except InputError as error:
        parser.error(str(error))
    (saved,) = open_checkpoints(parser, [options.checkpoint], 1, config, corpus, read_only=True)
    if saved.newest is None:
        parser.error(f"{options.checkpoint} has no checkpoint; train with --checkpoint first")
    model = LanguageModel(config, len(corpus.vocabulary))
    params = saved.restore(start_training(config, model, jax.random.key(0))).best
    path = options.out / f"monte_carlo_{options.config}.json"
    rows = jax.device_put(lay_out(corpus.test, 1, config.window))
    once = float(np.exp(build_evaluate(model, config.window)(params, rows)))
    report: dict[str, Any] = {"config": options.config, "without_noise": once, "rows": []}
    report |= {"cpu": cpu_name(), "versions": versions()}
    report = resume(parser, report, path)
    if not np.isclose(report["without_noise"], once, rtol=1e-5):
        parser.error(f"{path} is of other weights; give another --out")
    done = {(row["masks"], row["samples"]) for row in report["rows"]}
    for samples in options.samples or (20, 100):
        for masks in options.masks or MASKS:
            if (masks, samples) not in done:
                report["rows"].append(run_test(config, corpus, params, masks, samples))
                store(report, path, format_table(report))


if __name__ == "__main__":
    main()

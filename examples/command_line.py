"""The command line of the language model: picks what to train, and writes the reports."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from configs import CONFIGS, SCHEMES, Config
from corpus import Corpus, InputError, fingerprint, lay_out, load_corpus
from evaluation import build_evaluate, build_mc_evaluate
from flags import Parser, count, keep_prob, positive, seed
from report import (
    Final,
    Result,
    describe_config,
    describe_runs,
    format_epoch,
    format_table,
    write_curves,
    write_json,
)
from tqdm import tqdm

if TYPE_CHECKING:
    from checkpoints import Checkpoints

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
MC_SCHEMES = ("variational", "untied")  # A sample keeps its masks for the whole text.


def build_parser() -> Parser:
    parser = Parser(description="Train an LSTM language model without dropout, then with it.")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the text's splits")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("results"))
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="folder to save in, and to resume from"
    )
    parser.add_argument(
        "--checkpoint-every", type=count, metavar="N", help="windows between saves (100)"
    )
    parser.add_argument("--config", choices=CONFIGS, help="a paper's configuration, trained alone")
    parser.add_argument(
        "--mc-samples",
        type=count,
        metavar="N",
        help="Monte Carlo samples for the test set, with --config only (20)",
    )
    parser.add_argument("--scheme", choices=SCHEMES)
    for name, kind, text in (
        ("embedding_size", count, "size of a word's embedding"),
        ("hidden_size", count, "size of each LSTM"),
        ("layers", count, "how many LSTMs are stacked"),
        ("input_keep_prob", keep_prob, "share of units kept before each LSTM"),
        ("recurrent_keep_prob", keep_prob, "share of h's units kept, as the gates read it"),
        ("output_keep_prob", keep_prob, "share of units kept after the last LSTM"),
        ("vocabulary_size", count, "how many words are known, the most frequent ones"),
        ("batch_size", count, "rows that are trained side by side"),
        ("window", count, "steps of truncated backpropagation"),
        ("epochs", count, "passes over the training text"),
        ("learning_rate", positive, "of the first epochs"),
        ("max_grad_norm", positive, "largest gradient norm, above which it is clipped"),
        ("unroll", count, "steps in one turn of an LSTM's loop; more can be faster on a GPU"),
        ("seed", seed, "of the weights and the masks"),
    ):
        flag, default = f"--{name.replace('_', '-')}", getattr(Config, name)
        parser.add_argument(
            flag, type=kind, help=f"{text} (default: {default}, or the value of --config)"
        )
    return parser


def open_checkpoints(
    parser: Parser,
    folders: list[Path],
    every: int,
    config: Config,
    corpus: Corpus,
    *,
    read_only: bool = False,
) -> "list[Checkpoints]":
    import checkpoints  # Not at the top: this brings Orbax, which takes half a second.

    settings = dataclasses.asdict(config) | {"text": fingerprint(corpus)}
    try:
        return [
            checkpoints.open_checkpoints(folder, settings, every, read_only=read_only)
            for folder in folders
        ]
    except checkpoints.CheckpointError as error:
        parser.error(str(error))


def build_config(given: dict[str, Any]) -> Config:
    """The default configuration or that of `--config`, changed by the other flags."""
    names = {field.name for field in dataclasses.fields(Config)}
    changes = {name: value for name, value in given.items() if name in names}
    if "input_keep_prob" in changes:  # It is for the first LSTM too.
        changes["first_keep_prob"] = None
    return dataclasses.replace(CONFIGS.get(given.get("config", ""), Config()), **changes)


def check_effects(parser: Parser, given: dict[str, Any], config: Config) -> None:
    """Ends the program if a flag would have no effect."""
    if "checkpoint_every" in given and "checkpoint" not in given:
        parser.error("--checkpoint-every needs --checkpoint")
    if "mc_samples" in given and not ("config" in given and config.scheme in MC_SCHEMES):
        parser.error("--mc-samples needs a --config with variational dropout")
    for name in given:
        if name.endswith("keep_prob") and config.scheme == "none":
            parser.error(f"--{name.replace('_', '-')} needs a --scheme with dropout")


def run(train: Callable[..., Iterator[Any]], model: Callable[[Config, int], Any]) -> int:
    """The program, given how to train and how to make a model."""
    parser = build_parser()
    given = {key: value for key, value in vars(parser.parse_args()).items() if value is not None}
    data, folder, name = (given.get(key) for key in ("data", "checkpoint", "config"))
    out, every = given["out"], given.get("checkpoint_every", 100)
    samples = given.get("mc_samples", 20)
    config = build_config(given)
    check_effects(parser, given, config)
    bare = dataclasses.replace(config, scheme="none")
    configs = [config] if name else [*dict.fromkeys([bare, config])]
    try:
        corpus = load_corpus(data, config.vocabulary_size)
        out.mkdir(parents=True, exist_ok=True)
    except (InputError, OSError) as error:
        parser.error(str(error))
    checkpoints: list[Any] = [None] * len(configs)
    failures: tuple[type[Exception], ...] = (FloatingPointError,)
    if folder is not None:
        from checkpoints import CheckpointError

        failures += (CheckpointError,)
        folders = [folder if name else folder / part.scheme for part in configs]
        checkpoints = open_checkpoints(parser, folders, every, config, corpus)
    print(
        f"{len(corpus.train):,} words to train on, {len(corpus.valid):,} to validate, "
        f"{len(corpus.test):,} to test; a vocabulary of {len(corpus.vocabulary):,}",
        flush=True,
    )
    results: dict[str, Result] = {}
    state, status = None, 0
    try:
        for part, saved in zip(configs, checkpoints, strict=True):
            for state in train(part, corpus, saved):
                results[part.scheme] = Result.of(part.scheme, state.perplexities)
                tqdm.write(format_epoch(results[part.scheme]))
                sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted; this is what was learned until then:", file=sys.stderr)
        status = EXIT_INTERRUPTED
    except failures as error:
        print(f"{error}; this is what was learned until then:", file=sys.stderr)
        status = EXIT_FAILED
    if not results:
        print("nothing, since the first epoch was not over", file=sys.stderr)
        return status
    print(format_table([*results.values()]))
    report = describe_runs(config, corpus, [*results.values()])
    if name and state is not None:
        final = finish(config, model(config, len(corpus.vocabulary)), corpus, state.best, samples)
        print(format_final(final))
        (result,) = results.values()
        report = describe_config(name, config, result, final, float(state.seconds), samples)
    paths = [out / f"{name or 'language_model'}.{suffix}" for suffix in ("json", "png")]
    try:
        write_json(paths[0], report)
        write_curves(paths[1], [*results.values()])
    except OSError as error:
        parser.error(f"{out} cannot be written to: {error.strerror}")
    print(f"written to {paths[0]} and {paths[1]}")
    return status


def finish(config: Config, model: Any, corpus: Corpus, params: Any, samples: int) -> Final:
    """Evaluates the best epoch's weights: in one row, so each word is read after all before it."""
    valid, test = (
        jax.device_put(lay_out(words, 1, config.window)) for words in (corpus.valid, corpus.test)
    )
    evaluate = build_evaluate(model, config.window)
    mc_test = None
    if config.scheme in MC_SCHEMES:
        mc_evaluate = build_mc_evaluate(model, config.window, samples)
        # 2, for a split key gives fold_in(key, 0) and fold_in(key, 1), which the training has.
        rng = jax.random.fold_in(jax.random.key(config.seed), 2)
        mc_test = float(np.exp(mc_evaluate(params, test, rng)))
    return Final(
        valid=float(np.exp(evaluate(params, valid))),
        test=float(np.exp(evaluate(params, test))),
        mc_test=mc_test,
    )


def format_final(final: Final) -> str:
    line = f"its weights, on one row: valid {final.valid:.2f}, test {final.test:.2f}"
    return line + ("" if final.mc_test is None else f", test by Monte Carlo {final.mc_test:.2f}")

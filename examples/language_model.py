"""A word-level LSTM language model, trained without dropout and with it.

Embedding, a stack of LSTMs, softmax: the model of Zaremba et al. 2014 (arXiv:1409.2329), with
their per-step dropout or with the variational dropout of Gal and Ghahramani 2016
(arXiv:1512.05287). It is trained by truncated backpropagation: the carry is handed from window to
window, and each window draws new masks.

    python examples/language_model.py                 # Python's own language reference
    python examples/language_model.py --data DIR      # text in Penn Treebank's format
    python examples/language_model.py --scheme per-step --state-keep-prob 1     # Zaremba's scheme

It ends with a table of perplexities, and writes them to `language_model.json` and their curves to
`language_model.png` in `--out`. Ctrl-C ends the training and reports what was learned until then.
With `--checkpoint DIR`, a training that was killed goes on when it is started again, to the same
perplexities.
"""

import collections
import dataclasses
import gzip
import hashlib
import json
import math
import pydoc_data.topics
import random
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flags import Parser, count, keep_prob, positive, seed
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

import flax_dropout_cell as fdc
from flax_dropout_cell.linen import DropoutCell

if TYPE_CHECKING:
    from checkpoints import Checkpoints

SCHEMES = {
    "none": "no dropout",
    "per-step": "per-step dropout",
    "variational": "variational dropout",
}
SPLITS = ("train", "valid", "test")
UNKNOWN, END_OF_SENTENCE = "<unk>", "<eos>"
EXIT_DIVERGED, EXIT_INTERRUPTED = 1, 130

Carry = tuple[tuple[jax.Array, jax.Array], ...]
"""The `(c, h)` of each LSTM in the stack: what is handed from window to window."""


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides the numbers, but for the text. Two trainings differ in `scheme` only."""

    scheme: str = "variational"
    embedding_size: int = 128
    hidden_size: int = 128
    layers: int = 2
    input_keep_prob: float = 0.7
    state_keep_prob: float = 0.7
    output_keep_prob: float = 0.7
    vocabulary_size: int = 10_000
    batch_size: int = 16
    window: int = 35
    epochs: int = 16
    learning_rate: float = 3e-3  # Where the model without dropout does best on the default text.
    max_grad_norm: float = 1.0
    seed: int = 0


# The text ----------------------------------------------------------------------------------------


class InputError(Exception):
    """The text or a folder cannot be used; the message is one line."""


class Corpus(NamedTuple):
    """The numbers `[words]` of each split's words, and the words that they stand for."""

    vocabulary: list[str]
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


class Windows(NamedTuple):
    """A split cut into windows, `[windows, batch, window]` each; or one of them, `[batch, window]`.

    A row goes on from window to window. `weights` are 1 for a word and 0 for padding.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def load_corpus(folder: Path | None, vocabulary_size: int) -> Corpus:
    """Reads the text and numbers the most frequent words of its training split.

    Where that has no `<unk>` of its own, as Penn Treebank has, a word that occurs only once
    becomes one: this is how the model learns how likely an unknown word is.

    Args:
      folder: holds the splits in Penn Treebank's format; None for Python's language reference.
      vocabulary_size: how many words get a number, besides `<unk>` and `<eos>`.

    Raises:
      InputError: the folder does not hold a split, or it cannot be read or has no words.
    """
    if folder is None:
        documents = split_documents(topic_documents())
        lines = {split: [line for doc in documents[split] for line in doc] for split in SPLITS}
    else:
        lines = {split: read_lines(folder, split) for split in SPLITS}
    words = {split: list(words_of(lines[split])) for split in SPLITS}
    counts = collections.Counter(words["train"])
    special = (UNKNOWN, END_OF_SENTENCE)
    rarest = 1 if UNKNOWN in counts else 2
    known = [word for word in counts if counts[word] >= rarest and word not in special]
    known.sort(key=lambda word: (-counts[word], word))
    vocabulary = [*special, *known[:vocabulary_size]]
    number = {word: index for index, word in enumerate(vocabulary)}
    train, valid, test = (
        np.array([number.get(word, number[UNKNOWN]) for word in words[split]]) for split in SPLITS
    )
    return Corpus(vocabulary, train, valid, test)


def fingerprint(corpus: Corpus) -> str:
    """Another one for another text."""
    numbers = [words.tolist() for words in (corpus.train, corpus.valid, corpus.test)]
    return hashlib.sha256(json.dumps([corpus.vocabulary, numbers]).encode()).hexdigest()[:12]


def words_of(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        if words := line.split():
            yield from words
            yield END_OF_SENTENCE


def topic_documents(min_words: int = 300) -> list[list[str]]:
    """Python's language reference, as documents of consecutive paragraphs.

    Some topics contain others, so a paragraph that was seen before is left out: otherwise the
    model would be tested on what it was trained on.
    """
    documents: list[list[str]] = []
    seen: set[str] = set()
    for _, topic in sorted(pydoc_data.topics.topics.items()):
        words_in_last = min_words  # A topic begins a document.
        for paragraph in map(tokenize, re.split(r"\n\s*\n", topic)):
            if not paragraph or paragraph in seen:
                continue
            seen.add(paragraph)
            if words_in_last >= min_words:
                documents.append([])
                words_in_last = 0
            documents[-1].append(paragraph)
            words_in_last += len(paragraph.split())
    return documents


def tokenize(paragraph: str) -> str:
    """Lower-case words and punctuation, with spaces between them; a number becomes N."""
    lines = [line for line in paragraph.lower().splitlines() if any(map(str.isalnum, line))]
    words = (match.group() for match in re.finditer(r"\w+|([^\w\s])\1*", " ".join(lines)))
    return " ".join("N" if word.isdigit() else word for word in words)


def split_documents(documents: list[list[str]]) -> dict[str, list[list[str]]]:
    """Deals the documents out, a tenth to validation and to test each. No seed changes it."""
    documents = random.Random(0).sample(documents, len(documents))
    tenth = len(documents) // 10
    parts = (documents[2 * tenth :], documents[:tenth], documents[tenth : 2 * tenth])
    return dict(zip(SPLITS, parts, strict=True))


def read_lines(folder: Path, split: str) -> list[str]:
    """The lines of `ptb.train.txt` or `train.txt` in the folder, plain or as `.gz`."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    names = [f"{prefix}{split}.txt{suffix}" for prefix in ("ptb.", "") for suffix in ("", ".gz")]
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        raise InputError(f"{folder} has no {' or '.join(names)}")
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not text.split():
        raise InputError(f"{path} is empty")
    return text.splitlines()


def cut_windows(words: np.ndarray, batch_size: int, window: int) -> Windows:
    """Cuts a split into `batch_size` rows, and these into windows. Each word is a target once."""
    row_length = math.ceil(len(words) / batch_size)
    padding = -row_length % window
    first_input = np.array([1])  # <eos>: the text begins where a sentence has ended.

    def cut(values: np.ndarray) -> np.ndarray:
        values = np.pad(values, (0, row_length * batch_size - len(values)))
        rows = np.pad(values.reshape(batch_size, row_length), ((0, 0), (0, padding)))
        return rows.reshape(batch_size, -1, window).swapaxes(0, 1)

    return Windows(
        inputs=cut(np.concatenate([first_input, words[:-1]]).astype(np.int32)),
        targets=cut(words.astype(np.int32)),
        weights=cut(np.ones(len(words), np.float32)),
    )


# The model ---------------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """Predicts the next word at each step of a window.

    Attributes:
      vocabulary_size: how many words there are to predict.
      embedding_size: the size of a word's embedding.
      hidden_size: the size of each LSTM.
      dropouts: the dropout of each LSTM in the stack.
      deterministic: True in evaluation.
    """

    vocabulary_size: int
    embedding_size: int
    hidden_size: int
    dropouts: tuple[fdc.RecurrentDropout, ...]
    deterministic: bool = False

    @nn.compact
    def __call__(self, words: jax.Array, carry: Carry) -> tuple[jax.Array, Carry]:
        """Logits `[batch, window, vocabulary]`, and the carry for the next window."""
        x = nn.Embed(self.vocabulary_size, self.embedding_size)(words)
        ends = []
        for dropout, start in zip(self.dropouts, carry, strict=True):
            cell = DropoutCell(nn.OptimizedLSTMCell(self.hidden_size), dropout, self.deterministic)
            # New masks on the old state; without a key they come from the "dropout" stream.
            start = cell.redraw_masks(start, x[:, 0])
            end, x = nn.RNN(cell, return_carry=True)(x, initial_carry=start)
            ends.append(end.cell_carry)
        return nn.Dense(self.vocabulary_size)(x), tuple(ends)


def build_model(config: Config, vocabulary_size: int) -> LanguageModel:
    return LanguageModel(
        vocabulary_size, config.embedding_size, config.hidden_size, build_dropouts(config)
    )


def build_dropouts(config: Config) -> tuple[fdc.RecurrentDropout, ...]:
    """Dropout before each LSTM, on the state h of each, and after the last one."""
    if config.scheme == "none":
        return (fdc.RecurrentDropout(),) * config.layers

    def noise(keep_prob: float) -> fdc.Dropout:
        return fdc.Dropout(keep_prob=keep_prob, variational=config.scheme == "variational")

    inner = fdc.RecurrentDropout(
        input=noise(config.input_keep_prob), state=noise(config.state_keep_prob)
    )
    last = dataclasses.replace(inner, output=noise(config.output_keep_prob))
    return (inner,) * (config.layers - 1) + (last,)


def zero_carry(config: Config, batch_size: int) -> Carry:
    zeros = jnp.zeros((batch_size, config.hidden_size))
    return ((zeros, zeros),) * config.layers


# The training ------------------------------------------------------------------------------------


class TrainState(NamedTuple):
    """All that a training needs to go on from where it is.

    Attributes:
      step: how many windows it has learned from; picks the next window and its masks.
      params: the model's variables.
      opt_state: the optimizer's state.
      carry: the carry at the end of the last window.
      nll: the negative log-likelihood of this epoch's words so far.
      perplexities: `[epochs, splits]`, nan for an epoch that is not over.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    carry: Carry
    nll: jax.Array
    perplexities: jax.Array


def build_optimizer(config: Config) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm), optax.adam(config.learning_rate)
    )


def start_training(config: Config, model: LanguageModel, rng: jax.Array) -> TrainState:
    carry = zero_carry(config, config.batch_size)
    params = model.init(rng, jnp.zeros((config.batch_size, config.window), jnp.int32), carry)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=build_optimizer(config).init(params),
        carry=carry,
        nll=jnp.float32(0),
        perplexities=jnp.full((config.epochs, len(SPLITS)), jnp.nan),
    )


def run_window(
    model: LanguageModel, params: Any, carry: Carry, window: Windows, rngs: dict[str, jax.Array]
) -> tuple[jax.Array, Carry]:
    """The negative log-likelihood of a window's words, and the carry for the next window."""
    outputs: Any = model.apply(params, window.inputs, carry, rngs=rngs)
    logits, carry = outputs
    nlls = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(window.targets))
    return jnp.sum(window.weights * nlls), carry


def build_train_step(
    config: Config, model: LanguageModel, rng: jax.Array
) -> Callable[[TrainState, Windows], TrainState]:
    """The step that learns from one window; its masks depend on `rng` and `state.step` only."""
    optimizer = build_optimizer(config)

    def loss_of(
        params: Any, carry: Carry, window: Windows, rng: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, Carry]]:
        nll, carry = run_window(model, params, carry, window, {"dropout": rng})
        # Over the size of a full window, or the few words in an epoch's last would weigh more.
        return nll / window.targets.size, (nll, carry)

    @jax.jit
    def train_step(state: TrainState, window: Windows) -> TrainState:
        window_rng = jax.random.fold_in(rng, state.step)
        grads, (nll, carry) = jax.grad(loss_of, has_aux=True)(
            state.params, state.carry, window, window_rng
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return state._replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            carry=carry,
            nll=state.nll + nll,
        )

    return train_step


def build_evaluate(config: Config, model: LanguageModel) -> Callable[[Any, Windows], jax.Array]:
    """Gives the mean negative log-likelihood of a split, the carry handed on through all of it."""
    model = model.clone(deterministic=True)

    @jax.jit
    def evaluate(params: Any, windows: Windows) -> jax.Array:
        def step(carry: Carry, window: Windows) -> tuple[Carry, jax.Array]:
            nll, carry = run_window(model, params, carry, window, {})
            return carry, nll

        _, nlls = jax.lax.scan(step, zero_carry(config, windows.inputs.shape[1]), windows)
        return nlls.sum() / windows.weights.sum()

    return evaluate


def train(
    config: Config, corpus: Corpus, checkpoints: "Checkpoints | None" = None
) -> Iterator[np.ndarray]:
    """Trains a model, and gives the perplexities, `[epochs, splits]`, as each epoch is over.

    Raises:
      FloatingPointError: the training diverged.
    """
    model = build_model(config, len(corpus.vocabulary))
    init_rng, dropout_rng = jax.random.split(jax.random.key(config.seed))
    train_step = build_train_step(config, model, dropout_rng)
    evaluate = build_evaluate(config, model)
    windows = cut_windows(corpus.train, config.batch_size, config.window)
    words_until = np.cumsum(windows.weights.sum((1, 2)), dtype=int)
    steps = config.epochs * len(words_until)
    # In one row, so that each word is predicted from all those before it.
    valid, test = (cut_windows(words, 1, config.window) for words in (corpus.valid, corpus.test))
    state = start_training(config, model, init_rng)
    if checkpoints is not None:
        state = checkpoints.restore(state)
    start = int(state.step)
    epochs, index = divmod(start, len(words_until))
    if epochs:
        yield np.array(state.perplexities[:epochs])
    with tqdm(
        total=config.epochs * len(corpus.train),
        initial=epochs * len(corpus.train) + (int(words_until[index - 1]) if index else 0),
        desc=SCHEMES[config.scheme],
        unit=" words",
        unit_scale=True,
    ) as bar:
        for step in range(start, steps):
            epoch, index = divmod(step, len(words_until))
            if index == 0:
                zeros = zero_carry(config, config.batch_size)
                state = state._replace(carry=zeros, nll=jnp.float32(0))
            state = train_step(state, Windows(*(part[index] for part in windows)))
            # Reading the loss waits for the step, so that the bar and Ctrl-C keep up with it.
            loss = float(state.nll) / words_until[index]
            bar.set_postfix(epoch=epoch + 1, loss=f"{loss:.3f}", refresh=False)
            bar.update(epoch * len(corpus.train) + int(words_until[index]) - bar.n)
            epoch_is_over = index + 1 == len(words_until)
            if epoch_is_over:
                with np.errstate(over="ignore"):
                    losses = [float(evaluate(state.params, part)) for part in (valid, test)]
                    perplexities = np.exp(np.float32([loss, *losses]))
                if not np.isfinite(perplexities).all():
                    raise FloatingPointError(f"the training diverged in epoch {epoch + 1}")
                state = state._replace(perplexities=state.perplexities.at[epoch].set(perplexities))
            if checkpoints is not None:
                checkpoints.save(step + 1, state, last=step + 1 == steps)
            if epoch_is_over:
                yield np.array(state.perplexities[: epoch + 1])


# The report --------------------------------------------------------------------------------------


class Result(NamedTuple):
    """The perplexities of a training, `[epochs, splits]`."""

    scheme: str
    perplexities: np.ndarray

    @property
    def best_epoch(self) -> int:
        """The epoch with the best validation perplexity; the table has the others' of that one."""
        return 1 + int(self.curve("valid").argmin())

    def curve(self, split: str) -> np.ndarray:
        return self.perplexities[:, SPLITS.index(split)]

    def best(self, split: str) -> float:
        return float(self.curve(split)[self.best_epoch - 1])


def format_epoch(result: Result) -> str:
    """What the last epoch has come to."""
    values = zip(SPLITS, result.perplexities[-1], strict=True)
    perplexities = ", ".join(f"{split} {value:.2f}" for split, value in values)
    return f"{SCHEMES[result.scheme]}, epoch {len(result.perplexities)}: {perplexities}"


def format_table(results: list[Result]) -> str:
    """A row for each training, then how much the last is above or below the first."""
    lines = [f"{'perplexity':<20}{'best epoch':>12}{'valid':>10}{'test':>10}"]
    for result in results:
        best = "".join(f"{result.best(split):>10.2f}" for split in ("valid", "test"))
        lines.append(f"{SCHEMES[result.scheme]:<20}{result.best_epoch:>12}{best}")
    if len(results) > 1:
        first, *_, last = results
        changes = [last.best(split) / first.best(split) - 1 for split in ("valid", "test")]
        lines.append(f"{'':<32}" + "".join(f"{change:>+10.1%}" for change in changes))
    return "\n".join(lines)


def write_json(path: Path, config: Config, corpus: Corpus, results: list[Result]) -> None:
    report = {
        "config": dataclasses.asdict(config),
        "words": {split: len(getattr(corpus, split)) for split in SPLITS},
        "vocabulary": len(corpus.vocabulary),
        "results": [
            {
                "scheme": result.scheme,
                "best_epoch": result.best_epoch,
                "valid": result.best("valid"),
                "test": result.best("test"),
                "curves": {split: result.curve(split).tolist() for split in SPLITS},
            }
            for result in results
        ],
    }
    path.write_text(json.dumps(report, indent=2) + "\n")


def write_curves(path: Path, results: list[Result]) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for color, result in zip(("tab:red", "tab:blue"), results, strict=False):
        epochs = range(1, 1 + len(result.perplexities))
        for split, style in (("train", ":"), ("valid", "-")):
            label = f"{SCHEMES[result.scheme]}, {split}"
            axes.plot(epochs, result.curve(split), style, color=color, label=label)
        axes.plot(result.best_epoch, result.best("valid"), "o", color=color)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("perplexity")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


# The command line --------------------------------------------------------------------------------


def build_parser() -> Parser:
    parser = Parser(description="Train an LSTM language model without dropout, then with it.")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the text's splits")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("results"))
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="folder to save in, and to go on from"
    )
    parser.add_argument(
        "--checkpoint-every", type=count, metavar="N", default=100, help="windows to a save (100)"
    )
    parser.add_argument("--scheme", choices=SCHEMES, default=Config.scheme)
    for name, kind, text in (
        ("embedding_size", count, "size of a word's embedding"),
        ("hidden_size", count, "size of each LSTM"),
        ("layers", count, "how many LSTMs are stacked"),
        ("input_keep_prob", keep_prob, "share of units kept before each LSTM"),
        ("state_keep_prob", keep_prob, "share of units kept in each LSTM's state h"),
        ("output_keep_prob", keep_prob, "share of units kept after the last LSTM"),
        ("vocabulary_size", count, "how many words are known, the most frequent ones"),
        ("batch_size", count, "rows that are trained side by side"),
        ("window", count, "steps of truncated backpropagation"),
        ("epochs", count, "passes over the training text"),
        ("learning_rate", positive, "Adam's"),
        ("max_grad_norm", positive, "where the gradient is clipped"),
        ("seed", seed, "of the weights and the masks"),
    ):
        flag, default = f"--{name.replace('_', '-')}", getattr(Config, name)
        parser.add_argument(flag, type=kind, default=default, help=f"{text} ({default})")
    return parser


def open_checkpoints(
    parser: Parser, folder: Path, every: int, schemes: list[str], config: Config, corpus: Corpus
) -> "dict[str, Checkpoints]":
    """Those of each training, in a folder of its own."""
    import checkpoints  # Not at the top: this brings Orbax, which takes half a second.

    settings = dataclasses.asdict(config) | {"text": fingerprint(corpus)}
    try:
        return {
            scheme: checkpoints.open_checkpoints(folder / scheme, settings, every)
            for scheme in schemes
        }
    except checkpoints.CheckpointError as error:
        parser.error(str(error))


def main() -> int:
    parser = build_parser()
    arguments = vars(parser.parse_args())
    data, out = arguments.pop("data"), arguments.pop("out")
    folder, every = arguments.pop("checkpoint"), arguments.pop("checkpoint_every")
    config = Config(**arguments)
    try:
        corpus = load_corpus(data, config.vocabulary_size)
        out.mkdir(parents=True, exist_ok=True)
    except (InputError, OSError) as error:
        parser.error(str(error))
    schemes = [*dict.fromkeys(["none", config.scheme])]
    checkpoints: dict[str, Checkpoints] = {}
    if folder is not None:
        checkpoints = open_checkpoints(parser, folder, every, schemes, config, corpus)
    print(
        f"{len(corpus.train):,} words to train on, {len(corpus.valid):,} to validate, "
        f"{len(corpus.test):,} to test; a vocabulary of {len(corpus.vocabulary):,}",
        flush=True,
    )
    results: dict[str, Result] = {}
    status = 0
    try:
        for scheme in schemes:
            scheme_config = dataclasses.replace(config, scheme=scheme)
            for perplexities in train(scheme_config, corpus, checkpoints.get(scheme)):
                results[scheme] = Result(scheme, perplexities)
                tqdm.write(format_epoch(results[scheme]))
                sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted; this is what was learned until then:", file=sys.stderr)
        status = EXIT_INTERRUPTED
    except FloatingPointError as error:
        print(f"{error}; this is what was learned until then:", file=sys.stderr)
        status = EXIT_DIVERGED
    if not results:
        print("nothing, since the first epoch was not over", file=sys.stderr)
        return status
    print(format_table([*results.values()]))
    write_json(out / "language_model.json", config, corpus, [*results.values()])
    write_curves(out / "language_model.png", [*results.values()])
    print(f"written to {out / 'language_model.json'} and {out / 'language_model.png'}")
    return status


if __name__ == "__main__":
    sys.exit(main())

"""A word-level LSTM language model, without dropout and with it.

Embedding, a stack of LSTMs, softmax: the model of Zaremba et al. 2014 (arXiv:1409.2329), with
their per-step dropout or with the variational dropout of Gal and Ghahramani 2016
(arXiv:1512.05287). It is trained by truncated backpropagation: the carry is handed from window to
window, and each window draws new masks.

    python examples/language_model.py                        # Python's language reference
    python examples/language_model.py --data DIR             # text in Penn Treebank's format
    python examples/language_model.py --scheme per-step --state-keep-prob 1    # Zaremba's model

It ends with a table of perplexities, and writes them to `language_model.json` and their curves to
`language_model.png` in `--out`. Ctrl-C ends the training and reports what was learned until then.
"""

import argparse
import collections
import dataclasses
import gzip
import json
import pydoc_data.topics
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import flax_dropout_cell as fdc
from flax_dropout_cell.linen import DropoutCell

SPLITS = ("train", "valid", "test")
SCHEMES = {
    "none": "no dropout",
    "per-step": "per-step dropout",
    "variational": "variational dropout",
}
UNKNOWN, END_OF_SENTENCE = "<unk>", "<eos>"

Carry = tuple[tuple[jax.Array, jax.Array], ...]
"""The `(c, h)` of each LSTM in the stack, which is all that windows share."""


class InputError(Exception):
    """The user's input cannot be used; the message is one line that says why."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What decides the numbers that come out. The two trainings differ in `scheme` only."""

    scheme: str = "variational"
    embedding_size: int = 128
    hidden_size: int = 128
    layers: int = 2
    input_keep_prob: float = 0.6
    state_keep_prob: float = 0.8
    output_keep_prob: float = 0.6
    vocabulary_size: int = 10_000
    batch_size: int = 16
    window: int = 35
    epochs: int = 16
    learning_rate: float = 3e-3
    max_grad_norm: float = 1.0
    seed: int = 0


# The text ----------------------------------------------------------------------------------------


class Corpus(NamedTuple):
    """Word numbers `[words]` of each split, and the words that they stand for."""

    vocabulary: list[str]
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


class Windows(NamedTuple):
    """A split that is cut into windows, `[windows, batch, window]` each, or one of its windows.

    Rows run on from window to window. `weights` are 1 for a word and 0 for padding.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def topic_documents(min_words: int = 300) -> list[tuple[str, ...]]:
    """Python's language reference, as documents of consecutive paragraphs.

    Some topics contain others, so a paragraph that has been seen is left out: otherwise the model
    could be tested on what it was trained on.
    """
    documents, document, seen = [], [], set()
    for _, topic in sorted(pydoc_data.topics.topics.items()):
        for paragraph in re.split(r"\n\s*\n", topic):
            words = tokenize(paragraph)
            if words and words not in seen:
                seen.add(words)
                document.append(words)
            if sum(len(words.split()) for words in document) >= min_words:
                documents.append(tuple(document))
                document = []
        if document:
            documents.append(tuple(document))
            document = []
    return documents


def tokenize(paragraph: str) -> str:
    """Lower-case words and punctuation, parted by spaces; numbers become N, rulers go."""
    lines = [line for line in paragraph.lower().splitlines() if any(map(str.isalnum, line))]
    words = (match.group() for match in re.finditer(r"\w+|([^\w\s])\1*", " ".join(lines)))
    return " ".join("N" if word.isdigit() else word for word in words)


def split_documents(documents: list[tuple[str, ...]]) -> dict[str, list[tuple[str, ...]]]:
    """Deals the documents out, a tenth each to validation and test, the same for every seed."""
    documents = random.Random(0).sample(documents, len(documents))
    tenth = len(documents) // 10
    parts = documents[2 * tenth :], documents[:tenth], documents[tenth : 2 * tenth]
    return dict(zip(SPLITS, parts, strict=True))


def read_folder(folder: Path) -> dict[str, list[str]]:
    """The lines of each split, from `ptb.train.txt` or `train.txt` and so on, or their `.gz`."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    return {split: read_lines(folder, split) for split in SPLITS}


def read_lines(folder: Path, split: str) -> list[str]:
    names = [f"{prefix}{split}.txt{suffix}" for prefix in ("ptb.", "") for suffix in ("", ".gz")]
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        raise InputError(f"{folder} has none of {', '.join(names)}")
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if not text.split():
        raise InputError(f"{path} is empty")
    return text.splitlines()


def load_corpus(folder: Path | None, vocabulary_size: int) -> Corpus:
    """Reads the text and numbers its words by the vocabulary of the training split.

    A word that the training split has only once is unknown, which teaches the model what it
    needs in the other splits: how likely an unknown word is.
    """
    if folder is None:
        documents = split_documents(topic_documents())
        lines = {split: sum(documents[split], start=()) for split in SPLITS}
    else:
        lines = read_folder(folder)
    words = {split: list(words_of(lines[split])) for split in SPLITS}
    counts = collections.Counter(words["train"])
    frequent = sorted((-count, word) for word, count in counts.items() if count > 1)
    special = (UNKNOWN, END_OF_SENTENCE)
    known = [word for _, word in frequent if word not in special]
    vocabulary = [*special, *known][:vocabulary_size]
    numbers = {word: number for number, word in enumerate(vocabulary)}
    unknown = numbers[UNKNOWN]
    return Corpus(
        vocabulary,
        *(np.array([numbers.get(word, unknown) for word in words[split]]) for split in SPLITS),
    )


def words_of(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        if line.split():
            yield from (*line.split(), END_OF_SENTENCE)


def cut_windows(words: np.ndarray, batch_size: int, window: int) -> Windows:
    """Cuts a split into `batch_size` rows, and these into windows; every word is a target once."""
    row = -(-len(words) // batch_size)
    steps = -(-row // window) * window
    inputs = np.concatenate([[1], words[:-1]])  # The text before the first word ends: <eos>.

    def cut(values: np.ndarray, dtype: type) -> np.ndarray:
        rows = np.pad(values, (0, row * batch_size - len(values))).reshape(batch_size, row)
        rows = np.pad(rows, ((0, 0), (0, steps - row))).astype(dtype)
        return rows.reshape(batch_size, -1, window).swapaxes(0, 1)

    return Windows(
        cut(inputs, np.int32), cut(words, np.int32), cut(np.ones(len(words)), np.float32)
    )


# The model ---------------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """Predicts each next word of a window.

    Attributes:
      vocabulary_size: how many words there are.
      embedding_size: the features of a word's embedding.
      hidden_size: the features of each LSTM.
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
        last_carry = []
        for dropout, cell_carry in zip(self.dropouts, carry, strict=True):
            cell = DropoutCell(nn.OptimizedLSTMCell(self.hidden_size), dropout, self.deterministic)
            # The key only counts outside a module: here, masks come from the "dropout" stream.
            start = cell.redraw_masks(jax.random.key(0), cell_carry, x[:, 0].shape)
            end, x = nn.RNN(cell, return_carry=True)(x, initial_carry=start)
            last_carry.append(end.cell_carry)
        return nn.Dense(self.vocabulary_size)(x), tuple(last_carry)


def build_model(config: Config, vocabulary_size: int) -> LanguageModel:
    return LanguageModel(
        vocabulary_size, config.embedding_size, config.hidden_size, build_dropouts(config)
    )


def build_dropouts(config: Config) -> tuple[fdc.RecurrentDropout, ...]:
    """Dropout before each LSTM, on each one's state h, and after the last."""
    if config.scheme == "none":
        return (fdc.RecurrentDropout(),) * config.layers

    def noise(keep_prob: float) -> fdc.Dropout:
        return fdc.Dropout(keep_prob, variational=config.scheme == "variational")

    inner = fdc.RecurrentDropout(
        input=noise(config.input_keep_prob), state=noise(config.state_keep_prob)
    )
    last = dataclasses.replace(inner, output=noise(config.output_keep_prob))
    return (*[inner] * (config.layers - 1), last)


def zero_carry(config: Config, batch_size: int) -> Carry:
    zeros = jnp.zeros((batch_size, config.hidden_size))
    return ((zeros, zeros),) * config.layers


# Training ----------------------------------------------------------------------------------------


class TrainState(NamedTuple):
    """Everything that a training needs to go on from where it is.

    Attributes:
      step: how many windows have been learned from; it also picks the next window's masks.
      params: the model's weights.
      opt_state: the optimizer's state.
      carry: the LSTMs' states at the end of the last window.
      nll: the negative log-likelihood of the words of this epoch so far.
      perplexities: `[epochs, splits]`; nan for epochs that are not over.
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


def build_train_step(
    config: Config, model: LanguageModel, rng: jax.Array
) -> Callable[[TrainState, Windows], TrainState]:
    """One window's step. Its masks depend on `rng` and on `state.step` alone."""
    optimizer = build_optimizer(config)

    def loss(params: Any, carry: Carry, window: Windows, rng: jax.Array):
        logits, carry = model.apply(params, window.inputs, carry, rngs={"dropout": rng})
        nll = weighted_nll(logits, window)
        # By the size of a full window, lest the few words in an epoch's last weigh more.
        return nll / window.targets.size, (nll, carry)

    @jax.jit
    def train_step(state: TrainState, window: Windows) -> TrainState:
        window_rng = jax.random.fold_in(rng, state.step)
        grads, (nll, carry) = jax.grad(loss, has_aux=True)(
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


def build_evaluate(
    config: Config, model: LanguageModel
) -> Callable[[Any, Windows], jax.Array]:
    """The negative log-likelihood of a whole split, the carry handed on through all of it."""
    model = model.clone(deterministic=True)

    @jax.jit
    def evaluate(params: Any, windows: Windows) -> jax.Array:
        def step(carry: Carry, window: Windows) -> tuple[Carry, jax.Array]:
            logits, carry = model.apply(params, window.inputs, carry)
            return carry, weighted_nll(logits, window)

        _, nlls = jax.lax.scan(step, zero_carry(config, windows.inputs.shape[1]), windows)
        return nlls.sum()

    return evaluate


def weighted_nll(logits: jax.Array, window: Windows) -> jax.Array:
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(window.targets))
    return jnp.sum(window.weights * nll)


def perplexity(nll: float, words: float) -> float:
    return float(np.exp(nll / words))

"""The text of the language model: read, numbered, and laid out in rows."""

import collections
import gzip
import hashlib
import json
import math
import pydoc_data.topics
import random
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from configs import Config

SPLITS = ("train", "valid", "test")
UNKNOWN, END_OF_SENTENCE = "<unk>", "<eos>"


class InputError(Exception):
    """The text or a folder cannot be used; the message is one line."""


class Corpus(NamedTuple):
    """The numbers `[words]` of each split's words, and the words that they stand for."""

    vocabulary: list[str]
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def load_corpus(folder: Path | None, vocabulary_size: int) -> Corpus:
    """Reads the text and numbers the most frequent words of its training split.

    If the text has no `<unk>` of its own (Penn Treebank has one), each word that occurs only once
    becomes `<unk>`, so that the model learns how likely unknown words are.

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
    """A hash of the text, saved with checkpoints: a run does not resume on another text."""
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


class Rows(NamedTuple):
    """A split in rows that are read side by side, or a window of them, `[rows, steps]` each.

    `weights` are 1 for a word and 0 for padding.
    """

    inputs: np.ndarray | jax.Array
    targets: np.ndarray | jax.Array
    weights: np.ndarray | jax.Array


def lay_out(words: np.ndarray, rows: int, window: int) -> Rows:
    """Lays a split out in rows, and pads them so that any window that begins in them ends there.

    Each word is a target once.
    """
    length = math.ceil(len(words) / rows)
    first_input = np.array([1])  # <eos>: the text begins where a sentence has ended.

    def lay(values: np.ndarray) -> np.ndarray:
        values = np.pad(values, (0, length * rows - len(values)))
        return np.pad(values.reshape(rows, length), ((0, 0), (0, window)))

    return Rows(
        inputs=lay(np.concatenate([first_input, words[:-1]]).astype(np.int32)),
        targets=lay(words.astype(np.int32)),
        weights=lay(np.ones(len(words), np.float32)),
    )


def window_at(rows: Rows, start: int | jax.Array, steps: int) -> Rows:
    """The window of `steps` steps that begins at `start`."""
    return Rows(*(jax.lax.dynamic_slice_in_dim(part, start, steps, axis=1) for part in rows))


class Windows(NamedTuple):
    """Where a pass over some rows is cut into windows: `[windows]` each."""

    starts: np.ndarray
    lengths: np.ndarray


def cut_evenly(rows: Rows, window: int) -> Windows:
    """Windows of one length, of which the last may end in padding."""
    starts = np.arange(0, rows.inputs.shape[1] - window, window, dtype=np.int32)
    return Windows(starts, np.full_like(starts, window))


def cut_at_random(rows: Rows, window: int, longest: int, rng: np.random.Generator) -> Windows:
    """Windows of random lengths: Merity et al. 2017, arXiv:1708.02182, section 4.1.

    A length is normal with a deviation of 5 around `window`, or in one case of 20 around half of
    it, and at least 5, as in the authors' code.
    """
    end, starts, lengths, start = rows.inputs.shape[1] - longest, [], [], 0
    while start < end:
        mean = window if rng.random() < 0.95 else window / 2
        starts.append(start)
        lengths.append(min(max(5, int(rng.normal(mean, 5))), longest))
        start += lengths[-1]
    return Windows(np.array(starts, np.int32), np.array(lengths, np.int32))


def plan_windows(config: Config, rows: Rows, epoch: int) -> Windows:
    """The windows of an epoch."""
    if not config.random_windows:
        return cut_evenly(rows, config.window)
    rng = np.random.default_rng([config.seed, epoch])
    return cut_at_random(rows, config.window, config.longest_window, rng)


def pad(windows: Windows, count: int) -> Windows:
    """The windows, and more that mean nothing, `count` in all."""
    return Windows(*(np.resize(part, count) for part in windows))

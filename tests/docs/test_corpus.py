"""The language model's text: how it is read, numbered, laid out in rows and cut into windows."""

import itertools
import pydoc_data.topics
import re
from typing import Any

import corpus as texts
import numpy as np
import pytest
from example_runs import EXAMPLES, SPLITS


def test_default_documents_are_in_one_split_only():
    documents = texts.topic_documents()
    splits = texts.split_documents(documents)
    assert sorted(itertools.chain(*splits.values())) == sorted(documents)
    assert splits == texts.split_documents(documents)
    tenth = len(documents) // 10
    assert [len(splits[split]) for split in SPLITS] == [len(documents) - 2 * tenth, tenth, tenth]
    paragraphs = {split: {line for doc in splits[split] for line in doc} for split in SPLITS}
    assert len(set().union(*paragraphs.values())) == sum(map(len, paragraphs.values()))
    # The topics themselves are not disjoint: "while" is a part of "compound", for one.
    topics = pydoc_data.topics.topics
    repeated = texts.tokenize(topics["while"].strip().split("\n\n")[-1])
    assert repeated in texts.tokenize(topics["compound"])
    assert sum(line.count(repeated) for lines in paragraphs.values() for line in lines) == 1


def test_default_corpus_is_numbered_by_its_training_split():
    corpus = texts.load_corpus(None, vocabulary_size=10_000)
    assert len(corpus.train) > 40_000
    assert len(corpus.train) / 12 < len(corpus.valid) < len(corpus.train) / 5
    assert len(corpus.train) / 12 < len(corpus.test) < len(corpus.train) / 5
    counts = np.bincount(corpus.train, minlength=len(corpus.vocabulary))
    assert counts.min() >= 2
    assert (np.diff(counts[2:]) <= 0).all()
    for words in corpus[1:]:
        assert 0 < np.mean(words == corpus.vocabulary.index("<unk>")) < 0.1
        assert np.max(words) < len(corpus.vocabulary)
    capped = texts.load_corpus(None, vocabulary_size=100)
    assert capped.vocabulary == corpus.vocabulary[:102]
    np.testing.assert_array_equal(capped.valid, np.where(corpus.valid < 102, corpus.valid, 0))


def test_the_tutorials_validation_text_is_new():
    """Its words are counted in the training text, and no 20 words in a row are of that text."""
    page = (EXAMPLES.parent / "docs/tutorials/language_model.md").read_text()
    imports, text = re.findall(r"```\{code-cell\}\n(.*?)```", page, re.DOTALL)[:2]
    found: dict[str, Any] = {}
    exec(imports + text, found)
    tokens = found["tokens"]
    train, valid = tokens[:30_000], tokens[30_000:]
    assert len(valid) == 10_000
    assert set(found["number"]) <= set(train)
    runs = [set(zip(*(part[i:] for i in range(20)), strict=False)) for part in (train, valid)]
    assert not runs[0] & runs[1]


@pytest.mark.parametrize(
    ("train", "vocabulary", "numbers"),
    [
        ("a b a\n\n b a c", ["<unk>", "<eos>", "a", "b"], ([2, 3, 2, 1, 3, 2, 0, 1], [0, 3, 0, 1])),
        # A text that has <unk> keeps its rare words, or its perplexity would not compare.
        ("b a b <unk> c", ["<unk>", "<eos>", "b", "a", "c"], ([2, 3, 2, 0, 4, 1], [4, 2, 0, 1])),
    ],
)
def test_corpus_of_a_folder(train, vocabulary, numbers, tmp_path):
    for split, text in (("train", train), ("valid", "c b d\n"), ("test", "<unk>")):
        (tmp_path / f"{split}.txt").write_text(text)
    corpus = texts.load_corpus(tmp_path, vocabulary_size=10)
    assert corpus.vocabulary == vocabulary
    assert (corpus.train.tolist(), corpus.valid.tolist()) == numbers
    assert corpus.test.tolist() == [0, 1]


@pytest.mark.parametrize("batch_size", [1, 3, 40])
def test_windows_hold_each_word_once(batch_size):
    words = np.arange(2, 33)
    rows = texts.lay_out(words, batch_size, window=4)
    starts, lengths = texts.cut_evenly(rows, window=4)
    assert set(lengths.tolist()) == {4}
    windows = [texts.window_at(rows, start, 4) for start in starts]
    inputs, targets, weights = (np.concatenate(parts, 1) for parts in zip(*windows, strict=True))
    assert inputs.shape == (batch_size, 4 * len(starts))
    assert targets[weights == 1].tolist() == words.tolist()
    assert inputs[weights == 1].tolist() == [1, *words[:-1].tolist()]
    # A row is words first and padding then.
    assert (np.diff(weights, axis=1) <= 0).all()


def test_random_windows_follow_one_another():
    rows = texts.lay_out(np.arange(200_000), 2, window=90)
    draw = [texts.cut_at_random(rows, 70, 90, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    (starts, lengths), again, other = draw
    np.testing.assert_array_equal(starts, again.starts)
    assert other.starts.tolist() != starts.tolist()
    assert starts.tolist() == [0, *np.cumsum(lengths)[:-1].tolist()]
    assert starts[-1] < 100_000 <= starts[-1] + lengths[-1]
    assert 5 <= lengths.min() < lengths.max() <= 90
    half = lengths < 52  # 3.5 deviations from either mean
    assert abs(half.mean() - 0.05) < 5 * (0.05 * 0.95 / len(lengths)) ** 0.5
    assert abs(lengths[~half].mean() + 0.5 - 70) < 5 * 5 / (~half).sum() ** 0.5
    assert abs(lengths[half].mean() + 0.5 - 35) < 5 * 5 / half.sum() ** 0.5

"""The benchmark of Monte Carlo averages, beside averages that are taken by hand."""

import dataclasses
import importlib
import itertools
import json
from pathlib import Path
from typing import Any

import command_line
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs import CONFIGS
from corpus import Corpus
from language_model import LanguageModel

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WINDOW, SAMPLES, END = 4, 3, 1
TEXT = np.array([3, 4, 1, 2, 5, 6, 3, 1, 4, 2, 2, 1, 6])
READ = np.array([END, *TEXT[:-1]])  # the word before each: a text begins after a sentence
CORPUS = Corpus(["<unk>", "<eos>", *"abcde"], TEXT, TEXT, TEXT)


@pytest.fixture
def monte_carlo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("monte_carlo")


def pieces_of(masks: str) -> list[slice]:
    """The stretches of the read words in which masks stay."""
    if masks == "set":
        cuts = []
    elif masks == "window":
        cuts = [*range(WINDOW, len(READ), WINDOW)]
    else:
        cuts = [*np.flatnonzero(READ[1:] == END) + 1]
    edges = [0, *map(int, cuts), len(READ)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


TINY = dataclasses.replace(
    CONFIGS["inan-small"], embedding_size=5, hidden_size=5, layers=2, window=WINDOW
)


@pytest.mark.parametrize("masks", ["set", "window", "sentence"])
@pytest.mark.parametrize("at_once", [SAMPLES, 1])
def test_perplexities_by_hand(monte_carlo, monkeypatch, masks: str, at_once: int) -> None:
    monkeypatch.setattr(monte_carlo, "AT_ONCE", at_once)
    config = TINY
    model = LanguageModel(config, len(CORPUS.vocabulary))
    carry = model.zero_carry(1)
    params = model.init(jax.random.key(2), jnp.zeros((1, 1), jnp.int32), carry)
    params = jax.tree.map(lambda leaf: 8 * leaf, params)  # so that masks are felt

    def logits_of(rng: jax.Array) -> np.ndarray:
        """One sample's logits: `model.apply` on a piece at a time, each with masks of its own."""
        state, logits = carry, []
        for number, piece in enumerate(pieces_of(masks), start=1):
            options: dict[str, Any] = {"start": piece.start, "rngs": {"dropout": rng}}
            if masks == "window":
                options = {"rngs": {"dropout": jax.random.fold_in(rng, piece.start)}}
            words = jnp.asarray(READ[piece])[None]
            if masks == "sentence":
                options["sequence_ids"] = jnp.full(words.shape, number)
            outputs: Any = model.apply(params, words, state, keep_words=True, **options)
            part, state, _ = outputs
            logits.append(np.asarray(part[0], np.float64))
        return np.concatenate(logits)

    rngs = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 2), SAMPLES)
    logits = np.stack([logits_of(rng) for rng in rngs])
    if masks == "set":
        assert np.abs(logits[0] - logits[1]).max() > 0.1
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = {
        "1.0": probabilities.mean(0),
        "0.5": np.sqrt(probabilities).mean(0) ** 2,
        "0.0": np.exp(np.log(probabilities).mean(0)),
    }
    got = monte_carlo.run_test(config, CORPUS, params, masks, SAMPLES)["perplexity"]
    for power, mean in wanted.items():
        of_words = (mean / mean.sum(-1, keepdims=True))[range(len(TEXT)), TEXT]
        np.testing.assert_allclose(got[power], np.exp(-np.log(of_words).mean()), rtol=1e-5)
    assert set(got) == set(wanted)


def test_samples_have_a_key_that_the_training_has_not(monkeypatch) -> None:
    """Both count with `fold_in`, from keys that are derived from one seed."""
    given = []
    monkeypatch.setattr(command_line, "build_evaluate", lambda *_: lambda *_: 0.0)
    monkeypatch.setattr(
        command_line, "build_mc_evaluate", lambda *_: lambda _, __, rng: given.append(rng) or 0.0
    )
    command_line.finish(TINY, None, CORPUS, None, SAMPLES)
    (of_samples,) = given
    of_training = jax.random.split(jax.random.key(TINY.seed))  # of the weights, and of all masks
    data = [jax.random.key_data(key).tolist() for key in (*of_training, of_samples)]
    assert data[2] not in data[:2]


@dataclasses.dataclass
class Saved:
    """A checkpoint of the initial weights, multiplied."""

    factor: float
    newest: int = 1

    def restore(self, state: Any) -> Any:
        return state._replace(best=jax.tree.map(lambda leaf: self.factor * leaf, state.best))


def test_rows_of_other_weights_are_refused(monte_carlo, monkeypatch, tmp_path, capsys) -> None:
    """Rows that are there stay, and no row of other weights is added to them."""

    def run(factor: float, samples: int) -> None:
        monkeypatch.setattr(monte_carlo, "open_checkpoints", lambda *_, **__: [Saved(factor)])
        command = f"monte_carlo.py --checkpoint saved --masks set --samples {samples}"
        monkeypatch.setattr("sys.argv", [*command.split(), "--out", str(tmp_path)])
        monte_carlo.main()

    def rows() -> list[tuple[str, int]]:
        report = json.loads((tmp_path / "monte_carlo_inan-small.json").read_text())
        return [(row["masks"], row["samples"]) for row in report["rows"]]

    monkeypatch.setitem(CONFIGS, "inan-small", TINY)
    monkeypatch.setattr(monte_carlo, "load_corpus", lambda *_: CORPUS)
    run(1, samples=2)
    run(1, samples=3)
    assert rows() == [("set", 2), ("set", 3)]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(9, samples=4)
    assert "is of other weights; give another --out" in capsys.readouterr().err
    assert rows() == [("set", 2), ("set", 3)]

"""The data that `schemes.py` compares recurrent-dropout schemes on, each read into one shape."""

import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

PIECE = 64
WINDOW = 35
BAND = 0.8


class Split(NamedTuple):
    """Sequences side by side, padded: `[sequences, time, ...]`, and each one's length."""

    inputs: Any
    targets: Any
    lengths: Any


class Task(NamedTuple):
    """What is learned.

    Attributes:
      splits: to train on, to validate and to test.
      outputs: how many numbers the model gives at a step.
      nlls: of outputs and targets, the negative log-likelihood at each step, `[batch, time]`.
      weights: of lengths and time, which steps count, and how much, `[batch, time]`.
      drops_inputs: whether a scheme that drops what a layer reads does so here.
      unit: what a negative log-likelihood is per.
      source: where the data is from.
      config: the fields of `schemes.Config` that this task wants otherwise.
      rate_of: factors of the learning rate, for cells that are too slow at that of the others.
      rates: factors of the learning rate that a row without dropout picks from in
        `equal_budgets.py`.
      optimizers: pairs of such a factor and a weight decay that a scheme picks from there.
      words: how many there are, where the inputs are numbers of words; None for vectors.
      score: what else is measured of the predictions; None is nothing.
    """

    splits: tuple[Split, ...]
    outputs: int
    nlls: Callable[[jax.Array, jax.Array], jax.Array]
    weights: Callable[[jax.Array, int], jax.Array]
    drops_inputs: bool
    unit: str
    source: str
    config: dict[str, Any]
    words: int | None = None
    score: "Score | None" = None
    rate_of: Mapping[str, float] = MappingProxyType({})
    rates: tuple[float, ...] = (1.0, 2.0, 4.0)
    optimizers: tuple[tuple[float, float], ...] = ((1.0, 0.0), (2.0, 0.1), (4.0, 0.3))


class Score(NamedTuple):
    """A share of the predictions, beside the likelihood.

    Attributes:
      name: what they are a share of.
      probabilities: of outputs and targets; Monte Carlo averages them over its samples.
      hits: of averaged probabilities and targets, 1 for a hit and 0 otherwise, `[batch, time]`.
    """

    name: str
    probabilities: Callable[[jax.Array, jax.Array], jax.Array]
    hits: Callable[[jax.Array, jax.Array], jax.Array]


def all_steps(lengths: jax.Array, time: int) -> jax.Array:
    """Every step of a sequence counts."""
    return (jnp.arange(time)[None] < lengths[:, None]).astype(jnp.float32)


def last_step(lengths: jax.Array, time: int) -> jax.Array:
    """Only what comes at a sequence's end counts."""
    return (jnp.arange(time)[None] == lengths[:, None] - 1).astype(jnp.float32)


def cut_long(songs: list[np.ndarray], steps: int) -> list[np.ndarray]:
    """The songs in pieces of at most `steps` predictions each: less padding, shorter training."""
    pieces = [song[at : at + steps + 1] for song in songs for at in range(0, len(song) - 1, steps)]
    return [piece for piece in pieces if len(piece) > 1]


def load_chorales(data: Path | None) -> Task:
    """The keys of the next step of a chorale from those before; `data` holds the `.mat` file."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    if data is None:
        raise FileNotFoundError("--data FOLDER must hold jsb_chorales.mat")
    try:
        arrays: Any = loadmat(str(data / "jsb_chorales.mat"))
    except MatReadError as error:
        raise ValueError(str(error)) from error

    def split(name: str) -> Split:
        songs = [song.astype(np.float32) for song in arrays[name].ravel()]
        if name == "traindata":
            songs = cut_long(songs, PIECE)
        lengths = np.array([len(song) - 1 for song in songs], np.int32)
        rolls = np.zeros((len(songs), lengths.max() + 1, 88), np.float32)
        for roll, song in zip(rolls, songs, strict=True):
            roll[: len(song)] = song
        return Split(rolls[:, :-1], rolls[:, 1:], lengths)

    def nlls(outputs: jax.Array, targets: jax.Array) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(outputs, targets).sum(-1)

    names = ("traindata", "validdata", "testdata")
    source = "JSB Chorales, Boulanger-Lewandowski's split"
    return Task(
        splits=tuple(map(split, names)),
        outputs=88,
        nlls=nlls,
        weights=all_steps,
        drops_inputs=True,
        unit="step",
        source=source,
        config={"units": 300, "epochs": 150, "learning_rate": 1e-2},
        # Without dropout, a minGRU's validation loss is 8.26 at a quarter of the rate, 8.37 at
        # twice; an LRU's, of one seed, is 8.60 at a quarter, 8.67 at the rate.
        rate_of={"min_gru": 0.25, "lru": 0.25},
        # Without dropout or decay, an LSTM is best at half of the rate, a GRU at a quarter. A decay
        # of 0.3 at the full rate costs Gal's scheme validation loss: 8.16, of one seed, at keeping
        # 0.8, against 8.12 at half of the rate with 0.1.
        rates=(0.25, 0.5, 1.0),
        optimizers=((0.25, 0.0), (0.5, 0.1), (1.0, 0.0)),
    )


def load_digits(data: Path | None) -> Task:
    """Which digit an image shows, read pixel by pixel; scikit-learn ships them."""
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    inputs = (images[:, :, None] / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(inputs))
    lengths = np.full(len(inputs), 64, np.int32)
    targets = np.broadcast_to(labels[:, None], (len(labels), 64)).astype(np.int32)
    splits = [
        Split(inputs[part], targets[part], lengths[part])
        for part in np.split(order, [1097, 1447])  # 1097 to train on, 350 each to the others
    ]

    def hits(probabilities: jax.Array, targets: jax.Array) -> jax.Array:
        return (probabilities.argmax(-1) == targets).astype(jnp.float32)

    return Task(
        splits=tuple(splits),
        outputs=10,
        nlls=optax.softmax_cross_entropy_with_integer_labels,
        weights=last_step,
        drops_inputs=False,
        unit="image",
        source="scikit-learn's digits",
        config={"units": 128, "epochs": 60, "batch": 32, "learning_rate": 3e-3},
        score=Score("accuracy", lambda outputs, _: jax.nn.softmax(outputs), hits),
        # Without dropout, its validation loss is 0.73 at 2 times the rate, 0.49 at 16 times.
        rate_of={"min_gru": 8.0},
    )


def load_sunspots(data: Path | None) -> Task:
    """The next 11 years of the yearly sunspot numbers from 44; statsmodels ships them."""
    from statsmodels.datasets import sunspots

    past, ahead = 44, 11
    table: Any = sunspots.load_pandas().data
    series = (np.sqrt(table["SUNACTIVITY"].to_numpy()) / 4 - 1.5).astype(np.float32)
    years = table["YEAR"].to_numpy().astype(int)
    starts = np.arange(past, len(series) - ahead + 1)
    first, last = years[starts], years[starts + ahead - 1]

    def split(starts: np.ndarray) -> Split:
        inputs = np.stack([series[start - past : start, None] for start in starts])
        futures = np.stack([series[start : start + ahead] for start in starts])
        targets = np.repeat(futures[:, None], past, axis=1)
        return Split(inputs, targets, np.full(len(starts), past, np.int32))

    def standardized(outputs: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, log_scale = jnp.split(outputs, 2, axis=-1)
        log_scale = jnp.maximum(log_scale, -5)
        return (targets - mean) * jnp.exp(-log_scale), log_scale

    def nlls(outputs: jax.Array, targets: jax.Array) -> jax.Array:
        deviations, log_scale = standardized(outputs, targets)
        return (deviations**2 / 2 + log_scale + jnp.log(2 * jnp.pi) / 2).sum(-1)

    def below(outputs: jax.Array, targets: jax.Array) -> jax.Array:
        return jax.scipy.stats.norm.cdf(standardized(outputs, targets)[0])

    def inside(probabilities: jax.Array, _: jax.Array) -> jax.Array:
        return (jnp.abs(probabilities - 0.5) < BAND / 2).mean(-1)

    cuts = (last < 1890, (first >= 1890) & (last < 1929), first >= 1929)
    return Task(
        splits=tuple(split(starts[cut]) for cut in cuts),
        outputs=2 * ahead,
        nlls=nlls,
        weights=last_step,
        drops_inputs=False,
        unit="11 years",
        source="yearly sunspots, 1700 to 2008",
        config={"units": 64, "epochs": 150, "learning_rate": 3e-3},
        score=Score(f"years inside the {BAND:.0%} band", below, inside),
    )


def load_words(data: Path | None) -> Task:
    """The next word of Python's language reference; every Python ships an edition of it."""
    sys.path.append(str(Path(__file__).parent.parent / "examples"))
    from corpus import load_corpus

    corpus = load_corpus(None, 10_000)

    def split(words: np.ndarray) -> Split:
        windows = [words[at : at + WINDOW + 1] for at in range(0, len(words) - WINDOW, WINDOW)]
        table = np.stack(windows).astype(np.int32)
        return Split(table[:, :-1], table[:, 1:], np.full(len(table), WINDOW, np.int32))

    return Task(
        splits=(split(corpus.train), split(corpus.valid), split(corpus.test)),
        outputs=len(corpus.vocabulary),
        nlls=optax.softmax_cross_entropy_with_integer_labels,
        weights=all_steps,
        drops_inputs=True,
        unit="word",
        # Editions differ, and what was measured on one does not compare with another.
        source=f"the language reference of Python {platform.python_version()}, windows of 35 words",
        config={"units": 128, "epochs": 25, "learning_rate": 4e-3},
        words=len(corpus.vocabulary),
    )


TASKS = {
    "chorales": load_chorales,
    "words": load_words,
    "digits": load_digits,
    "sunspots": load_sunspots,
}

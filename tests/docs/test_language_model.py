"""The language model's configurations, its optimizer, and how it is trained and evaluated."""

import dataclasses
import json
import sys
from typing import Any

import command_line
import configs
import corpus as texts
import evaluation
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_state
from example_runs import SPLITS, language_model, write_corpus

import flax_dropout_cell as fdc


@pytest.fixture(autouse=True)
def standard_dtype_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "plain")


# The configurations ------------------------------------------------------------------------------


TINY = configs.Config(embedding_size=6, hidden_size=8, batch_size=2, window=7, epochs=2)


def shrunk(name, **changes):
    tiny = dict(embedding_size=6, hidden_size=8, layers=2, batch_size=2, window=7, epochs=1)
    return dataclasses.replace(configs.CONFIGS[name], **tiny | changes)


@pytest.mark.parametrize("scheme", ["none", "per-step", "variational"])
def test_dropout_sits_where_the_flags_say(scheme):
    config = dataclasses.replace(
        TINY,
        scheme=scheme,
        layers=3,
        input_keep_prob=0.7,
        recurrent_keep_prob=0.8,
        output_keep_prob=0.9,
    )
    before, recurrent, after = (
        fdc.Dropout(keep_prob=keep_prob, variational=scheme == "variational")
        for keep_prob in (0.7, 0.8, 0.9)
    )
    inside, whole = {"recurrent": recurrent}, dataclasses.replace(before, keep_prob=1.0)
    inner = fdc.RecurrentDropout(input=before, inside=inside, output=whole)
    last = fdc.RecurrentDropout(input=before, inside=inside, output=after)
    bare = fdc.RecurrentDropout()
    expected = (bare, bare, bare) if scheme == "none" else (inner, inner, last)
    assert configs.build_dropouts(config) == expected


def test_the_papers_numbers():
    awd = configs.CONFIGS["awd-lstm"]
    specs = configs.build_dropouts(awd)
    assert awd.sizes == (1150, 1150, 400)
    assert [spec.input.keep_prob for spec in specs] == [0.6, 0.75, 0.75]
    assert [spec.params.noise.keep_prob for spec in specs] == [0.5] * 3
    untied = configs.build_dropouts(configs.CONFIGS["gal-medium-untied"])
    assert untied[0].input is None
    assert {site: noise.keep_prob for site, noise in untied[1].inside.items()} == {
        "input_per_gate": 0.65,
        "recurrent_per_gate": 0.8,
    }
    assert (untied[0].output.keep_prob, untied[1].output.keep_prob) == (1.0, 0.65)
    zaremba = configs.CONFIGS["zaremba-small"]
    assert [zaremba.learning_rate_at(epoch) for epoch in (0, 4, 5, 12)] == [1, 1, 0.5, 2**-8]
    assert configs.build_dropouts(zaremba) == (fdc.RecurrentDropout(),) * 2


def test_a_given_keep_prob_reaches_every_lstm():
    config = command_line.build_config({"config": "awd-lstm", "input_keep_prob": 0.9})
    assert [spec.input.keep_prob for spec in configs.build_dropouts(config)] == [0.9] * 3
    others = {"first_keep_prob": None, "input_keep_prob": 0.9}
    assert config == dataclasses.replace(configs.CONFIGS["awd-lstm"], **others)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("zaremba-small", 2 * 10_000 * 200 + 10_000 + 2 * 4 * 200 * 401),
        ("gal-medium", 2 * 10_000 * 650 + 10_000 + 2 * 4 * 650 * 1301),
        ("inan-small", 10_000 * 200 + 10_000 + 2 * 4 * 200 * 401),
        # Their 24 million, but for a second bias per gate that PyTorch has.
        ("awd-lstm", 4_010_000 + 4 * (1150 * 1551 + 1150 * 2301 + 400 * 1551)),
    ],
)
def test_the_papers_sizes(name, weights):
    config = configs.CONFIGS[name]
    model = language_model.LanguageModel(config, vocabulary_size=10_000)
    carry, words = model.zero_carry(20), jnp.zeros((20, 1), jnp.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), words, carry))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == weights


def test_first_weights_are_uniform():
    names = {"zaremba-small": [0.1] * 3, "awd-lstm": [0.1, 0.1, 0.5]}
    for name, (embedding, softmax, lstm) in names.items():
        config = shrunk(name, embedding_size=4, hidden_size=4)
        _, state, _ = start(config)
        params = state.params["params"]
        assert 0.8 * lstm < abs(params["LSTMCell_0"]["hf"]["kernel"]).max() <= lstm
        assert 0.9 * embedding < abs(params["Embed_0"]["embedding"]).max() <= embedding
        if config.tied:
            assert "Dense_0" not in params and not params["bias"].any()
        else:
            assert 0.8 * softmax < abs(params["Dense_0"]["bias"]).max() <= softmax


# The training ------------------------------------------------------------------------------------


def start(config):
    model = language_model.LanguageModel(config, vocabulary_size=12)
    init_rng, rng = jax.random.split(jax.random.key(0))
    return model, train_state.start_training(config, model, init_rng), rng


def first_windows(config, words=28, known=12):
    """The first windows of a text, as `train_windows` takes them."""
    rows = texts.lay_out(np.arange(words) % known, config.batch_size, config.longest_window)
    windows = texts.cut_evenly(rows, config.window)
    return jax.device_put(rows), texts.pad(windows, 20)


@pytest.mark.parametrize("name", configs.CONFIGS)
def test_twenty_steps_of_a_config_lower_the_loss(name):
    config = shrunk(name)
    model, state, rng = start(config)
    train_windows = language_model.build_train_windows(config, model, rng)
    rows, windows = first_windows(config, words=14, known=2)  # one window, again and again
    nlls = [0.0]
    for count in (1, 18, 1):
        # A tenth of the rate: for a model as small as this the papers' own goes too far.
        state = train_windows(state, rows, windows, count, config.learning_rate / 10)
        nlls.append(float(state.nll))
    assert state.step == 20
    first, _, last = np.diff(nlls)
    assert last < 0.9 * first
    assert jax.tree.all(jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), state.params))


def test_what_lies_behind_a_random_windows_end_has_no_effect():
    config = shrunk("awd-lstm")
    model, state, rng = start(config)
    train_window = jax.jit(language_model.build_train_window(config, model, rng))
    rows, _ = first_windows(config, words=80)
    window = texts.window_at(rows, 0, config.longest_window)
    inside = np.arange(config.longest_window)[None] < 5
    window = window._replace(weights=window.weights * inside)
    other = window._replace(inputs=jnp.where(inside, window.inputs, 3))
    assert (window.inputs != other.inputs).any()
    states = [train_window(state, part, 5, 1.0) for part in (window, other)]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_evaluation_hands_the_carry_on_over_the_whole_split():
    model, state, _ = start(TINY)
    words = np.random.default_rng(0).integers(0, 12, 45)
    # By hand: the text in one piece, and no dropout stream.
    inputs = np.concatenate([[1], words[:-1]])[None]
    model_alone = model.clone(deterministic=True)
    logits, *_ = model_alone.apply(state.params, inputs, model.zero_carry(1))
    probs = np.asarray(jax.nn.softmax(logits.astype(jnp.float32)))[0, range(45), words]
    evaluate = evaluation.build_evaluate(model, 7)
    nll = evaluate(state.params, texts.lay_out(words, 1, window=7))
    np.testing.assert_allclose(nll, -np.log(probs).mean(), rtol=1e-5)


def test_monte_carlo_averages_probabilities_under_masks_of_the_whole_split():
    config = shrunk("inan-small", word_keep_prob=0.5)
    model, state, _ = start(config)
    params = jax.tree.map(lambda leaf: 9 * leaf, state.params)  # or the masks hardly matter
    words, rng = np.random.default_rng(0).integers(0, 12, 45), jax.random.key(5)
    inputs, probs = np.concatenate([[1], words[:-1]])[None], []
    for sample in range(3):  # By hand: in one piece, with one key.
        key = jax.random.fold_in(rng, sample)
        logits, *_ = model.apply(
            params, inputs, model.zero_carry(1), keep_words=True, rngs={"dropout": key}
        )
        probs.append(jax.nn.softmax(logits)[0, np.arange(45), words])
    assert np.std(probs, axis=0).max() > 0.01
    mc_evaluate = evaluation.build_mc_evaluate(model, 7, samples=3)
    nll = mc_evaluate(params, texts.lay_out(words, 1, window=7), rng)
    np.testing.assert_allclose(nll, -np.log(np.mean(probs, 0)).mean(), rtol=1e-5)


@pytest.mark.parametrize("scheme", ["none", "per-step", "variational"])
def test_masks_depend_on_the_window_and_on_nothing_else(scheme):
    config = dataclasses.replace(TINY, scheme=scheme)
    model, state, rng = start(config)
    train_windows = language_model.build_train_windows(config, model, rng)
    rows, windows = first_windows(config)

    def nll_after(step):
        at = state._replace(step=jnp.int32(step))
        return float(train_windows(at, rows, windows, 1, 0.1).nll)

    nlls = [nll_after(step) for step in (0, 1, 2, 1)]
    assert nlls[1] == nlls[3]
    assert len(set(nlls)) == (1 if scheme == "none" else 3)


def test_carry_reaches_the_next_window_and_nothing_is_retraced():
    config = dataclasses.replace(TINY, scheme="none")
    model, state, rng = start(config)
    rows, windows = first_windows(config)
    train_windows = language_model.build_train_windows(config, model, rng)
    second = texts.Windows(*(part[1:] for part in texts.pad(windows, 21)))
    zeros, state = state.carry, train_windows(state, rows, windows, 1, 0.1)
    handed_on = float(train_windows(state, rows, second, 1, 0.1).nll - state.nll)
    reset = float(train_windows(state._replace(carry=zeros), rows, second, 1, 0.1).nll - state.nll)
    assert handed_on != reset
    both = train_windows(start(config)[1], rows, windows, 2, np.float32(0.1))
    np.testing.assert_allclose(both.nll, state.nll + handed_on, rtol=1e-6)


def test_trainings_differ_in_dropout_only(corpus_folder):
    corpus = texts.load_corpus(corpus_folder, vocabulary_size=10_000)

    def last(scheme, keep_prob):
        config = dataclasses.replace(
            TINY,
            scheme=scheme,
            epochs=1,
            input_keep_prob=keep_prob,
            recurrent_keep_prob=keep_prob,
            output_keep_prob=keep_prob,
        )
        return [*language_model.train(config, corpus)][-1].perplexities.tolist()

    bare, kept = last("none", 0.5), last("variational", 1.0)
    assert kept == bare
    assert last("variational", 0.5) != last("per-step", 0.5) != bare


class Killed(Exception):
    pass


class InMemory:
    """Checkpoints that are kept, until the training is killed."""

    every = 4

    def __init__(self, state: Any = None, until: int | None = None):
        self.state: Any = state
        self.until = until

    def restore(self, state):
        return state if self.state is None else self.state

    def save(self, step, state, last):
        assert state.step == step
        if step % self.every == 0:
            self.state = state
        if self.until is not None and step >= self.until:
            raise Killed


def test_a_killed_training_of_a_config_goes_on_to_the_same_weights(corpus_folder):
    corpus = texts.load_corpus(corpus_folder, vocabulary_size=10_000)
    config = shrunk("awd-lstm", epochs=6, averaging_patience=1, learning_rate=60.0)
    *_, whole = language_model.train(config, corpus)
    assert whole.opt_state[-1].begun  # so that the average must survive too
    checkpoints = InMemory(until=int(whole.step) - 6)
    with pytest.raises(Killed):
        list(language_model.train(config, corpus, checkpoints))
    assert 0 < checkpoints.state.step < whole.step
    *_, resumed = language_model.train(config, corpus, InMemory(checkpoints.state))
    for ended in (whole, resumed):
        assert ended.seconds > 0
    same = [state._replace(seconds=0) for state in (whole, resumed)]
    jax.tree.map(np.testing.assert_array_equal, *same)


def test_a_configs_report(corpus_folder, tmp_path, monkeypatch, capsys):
    command = "examples/language_model.py --config inan-small --embedding-size 6 --hidden-size 8"
    command += f" --batch-size 2 --epochs 2 --mc-samples 3 --data {corpus_folder} --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", command.split())
    assert language_model.main() == 0
    written = json.loads((tmp_path / "inan-small.json").read_text())
    assert (tmp_path / "inan-small.png").exists()
    assert written["config"] == "inan-small" and written["seed"] == 0
    assert written["settings"]["hidden_size"] == 8 and written["settings"]["window"] == 35
    assert (written["epochs"], written["mc_samples"]) == (2, 3)
    assert written["seconds"] > 0 and written["device"] and written["versions"]["jax"]
    assert written["command"].startswith("python examples/language_model.py --config inan-small")
    assert [len(written["curves"][split]) for split in SPLITS] == [2, 2, 2]
    best = written["curves"]["valid"][written["best_epoch"] - 1]
    # The curve is read in 20 rows, and the end in one.
    assert abs(written["valid_perplexity"] / best - 1) < 0.1
    final = [written[f"{name}_perplexity"] for name in ("valid", "test", "mc_test")]
    printed = "valid {:.2f}, test {:.2f}, test by Monte Carlo {:.2f}".format(*final)
    assert printed in capsys.readouterr().out

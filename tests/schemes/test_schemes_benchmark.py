"""The comparison of schemes: one budget for all, and a table of the measured numbers."""

import dataclasses
import importlib
import json
import platform
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.io

import flax_dropout_cell as fdc

ROOT = Path(__file__).parents[2]


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield SimpleNamespace(
            schemes=importlib.import_module("schemes"),
            equal_budgets=importlib.import_module("equal_budgets"),
            **{
                name: importlib.import_module(f"scheme_{name}")
                for name in ("cells", "noises", "tables", "tasks")
            },
        )


def make_task(tasks):
    """Sequences of two bits, of which each is the one before, turned round."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2, (8, 1, 2))
    series = ((first + np.arange(7)[None, :, None]) % 2).astype(np.float32)
    split = tasks.Split(series[:, :-1], series[:, 1:], np.array([6, 5, 4, 6, 6, 3, 6, 6], np.int32))

    def nlls(outputs, targets):
        return optax.sigmoid_binary_cross_entropy(outputs, targets).sum(-1)

    def hits(averaged, targets):
        return ((averaged > 0.5) == (targets > 0.5)).mean(-1)

    score = tasks.Score("bits", lambda outputs, _: jax.nn.sigmoid(outputs), hits)
    return tasks.Task(
        (split,) * 3, 2, nlls, tasks.all_steps, True, "step", "made up", {}, score=score
    )


def test_a_comparison_picks_by_validation_and_runs_all_seeds(modules):
    config = modules.schemes.Config(
        units=4, epochs=3, batch=4, learning_rate=0.03, seeds=3, mc_samples=2
    )
    # All but one keep next to nothing: no training can learn from that.
    scheme = modules.noises.Scheme(
        "Gal", modules.noises.gal, (1e-6, 1.0, 1e-6, 1e-6), monte_carlo=True
    )
    (row,) = modules.schemes.compare(make_task(modules.tasks), config, "lstm", scheme)
    assert row["strength"] == 1.0
    np.testing.assert_allclose(row["valid_nll_by_strength"][1], np.mean(row["valid_nll"]))
    assert row["valid_nll_by_strength"][1] < row["valid_nll_by_strength"][0]
    assert row["seed"] == [0, 1, 2] and len(set(row["test_nll"])) == 3
    # The splits are one, and where all is kept, Monte Carlo is evaluation.
    np.testing.assert_allclose(row["valid_nll"], row["test_nll"], rtol=1e-5)
    curves = np.array(row["curves"])
    assert curves.shape == (3, 3, 2)
    np.testing.assert_allclose(curves[:, :, 1].min(1), row["valid_nll"], atol=1e-4)
    assert (1 + curves[:, :, 1].argmin(1)).tolist() == row["best_epoch"]


def test_validation_drops_nothing(modules):
    config = modules.schemes.Config(units=4, epochs=2, batch=4, seeds=2)
    (row,) = modules.schemes.compare(
        make_task(modules.tasks),
        config,
        "gru",
        modules.noises.Scheme("", modules.noises.gal, (0.3,)),
    )
    curves = np.array(row["curves"])[:, :, 1]
    np.testing.assert_allclose(curves.min(1), row["valid_nll"], atol=1e-4)


@pytest.mark.parametrize("cell", ["lru", "min_gru"])
def test_linear_cells_have_two_layers_with_masks_of_their_own(modules, cell):
    """Layer by layer, with a key for each, and step by step instead of in parallel."""
    task, config = make_task(modules.tasks), modules.schemes.Config(units=4)
    model = modules.schemes.Model(cell, task, config)
    split = modules.tasks.Split(*map(jnp.asarray, task.splits[0]))
    params, rng = model.init(jax.random.key(0)), jax.random.key(1)
    specs = [modules.noises.linear_zoneout(0.5, 1.0, cell)] * 2
    layers, ys = modules.cells.CELLS[cell], split.inputs.swapaxes(0, 1)
    for weights, key in zip(params["layers"], jax.random.split(rng, 2), strict=True):
        carry = layers.first_carry(8, 4)
        _, ys = fdc.dropout_scan(
            weights, carry, ys, key, cell=layers.cell, dropout=specs[0],
            seq_lengths=split.lengths, parallel=False,
        )  # fmt: skip
    by_hand = ys.swapaxes(0, 1) @ params["kernel"] + params["bias"]
    np.testing.assert_allclose(model.predict(params, split, rng, specs), by_hand, atol=1e-5)


@pytest.fixture
def model(modules):
    return modules.schemes.Model("gru", make_task(modules.tasks), modules.schemes.Config(units=4))


def test_padding_does_not_count(modules, model):
    split = modules.tasks.Split(*map(jnp.asarray, model.task.splits[0]))
    params = model.init(jax.random.key(0))
    spec = modules.noises.SCHEMES["none"].noise(None, None, "gru")
    weights = model.task.weights(split.lengths, 6)
    assert weights.sum(1).tolist() == split.lengths.tolist()
    assert modules.tasks.last_step(split.lengths, 6)[5].tolist() == [0, 0, 1, 0, 0, 0]
    torn = split._replace(inputs=jnp.where(weights[..., None] > 0, split.inputs, jnp.nan))
    outputs = [model.predict(params, part, None, [spec]) for part in (split, torn)]
    np.testing.assert_array_equal(*outputs)


def test_monte_carlo_averages_probabilities(modules, model):
    """The likelihood and the score are those of the mean over the samples, computed by hand."""
    split = modules.tasks.Split(*map(jnp.asarray, model.task.splits[0]))
    params, rng = model.init(jax.random.key(0)), jax.random.key(1)
    params["kernel"] *= 4  # Far enough from a half for samples to disagree.
    spec = modules.noises.gal(0.3, 0.3, "gru")
    nll, score = model.evaluate(params, split, rng, [spec], 3)
    keys = jax.random.split(rng, 3)
    logits = np.array([model.predict(params, split, key, [spec]) for key in keys], np.float64)
    on, weights = 1 / (1 + np.exp(-logits)), model.task.weights(split.lengths, 6)
    likelihoods = np.where(split.targets > 0.5, on, 1 - on).prod(-1)
    mean = np.average(-np.log(likelihoods.mean(0)), weights=weights)
    np.testing.assert_allclose(nll, mean, rtol=1e-5)
    right = ((on.mean(0) > 0.5) == (split.targets > 0.5)).mean(-1)
    np.testing.assert_allclose(score, np.average(right, weights=weights), rtol=1e-6)
    alone = ((on[0] > 0.5) == (split.targets > 0.5)).mean(-1)
    assert abs(score - np.average(alone, weights=weights)) > 0.01


def test_the_band_holds_what_lies_between_its_quantiles(modules):
    score = modules.tasks.load_sunspots(None).score
    ahead = 11
    outputs = jnp.zeros((1, 2 * ahead)).at[:, ahead:].set(jnp.log(2.0))  # mean 0, deviation 2
    targets = jnp.array([[-9.0, -2.6, -2.5, -1.0, 0.0, 1.0, 2.5, 2.6, 9.0, 0.1, 0.2]])
    probabilities = score.probabilities(outputs, targets)
    # A normal's 80% lies within 1.2816 deviations: four of these years do not.
    np.testing.assert_allclose(score.hits(probabilities, targets), [7 / 11], rtol=1e-6)


def test_every_scheme_has_four_strengths_and_a_noise_of_each(modules):
    """Without dropout, it is the learning rate that has four."""
    for cell, names in modules.noises.COMPARED.items():
        for scheme in map(modules.noises.SCHEMES.get, names):
            assert len(set(scheme.strengths)) == 4
            specs = [scheme.noise(strength, strength, cell) for strength in scheme.strengths]
            assert len(set(specs)) == (1 if scheme.name == "none" else 4)


def test_without_dropout_the_learning_rate_is_tuned(modules):
    """A row at rates of 0 and twice 0.01 is the row at 0.02, and learns nothing at 0."""
    bare = modules.noises.SCHEMES["none"]

    def run(rate, *factors):
        config = modules.schemes.Config(units=4, epochs=3, batch=4, learning_rate=rate, seeds=2)
        scheme = bare._replace(strengths=factors)
        (row,) = modules.schemes.compare(make_task(modules.tasks), config, "lstm", scheme)
        return row

    tuned, alone, still = run(0.01, 0.0, 2.0), run(0.02, 1.0), run(0.01, 0.0)
    assert tuned["strength"] == 2.0
    np.testing.assert_allclose(tuned["test_nll"], alone["test_nll"], rtol=1e-5)
    assert (np.ptp(np.array(still["curves"])[:, :, 1], axis=1) == 0).all()
    assert tuned["valid_nll_by_strength"][0] == pytest.approx(np.mean(still["valid_nll"]), 1e-6)


def test_under_equal_budgets_a_scheme_picks_its_optimizer_too(modules):
    """One seed at each setting, all seeds at the best: each as `compare` runs it alone."""
    task = make_task(modules.tasks)._replace(optimizers=((0.5, 0.0), (4.0, 0.0), (4.0, 9.0)))
    config = modules.schemes.Config(units=4, epochs=3, batch=4, learning_rate=0.01, seeds=3)
    zoneout = modules.noises.SCHEMES["zoneout"]._replace(strengths=(0.9, 0.1))
    (row,) = modules.equal_budgets.tune(task, config, "lstm", zoneout)
    assert [each["weight_decay"] for each in row["settings"]] == [0.0, 0.0, 9.0] * 2
    undecayed = [
        (setting, valid)
        for setting, valid in zip(row["settings"], row["valid_nll_by_setting"], strict=True)
        if not setting["weight_decay"]
    ]
    for setting, valid in undecayed:
        alone = zoneout._replace(strengths=(setting["strength"],))
        rate = {"learning_rate": 0.01 * setting["rate"]}
        (by_itself,) = modules.schemes.compare(
            task, dataclasses.replace(config, **rate), "lstm", alone
        )
        assert valid == pytest.approx(by_itself["valid_nll"][0], rel=1e-5)
        if setting == {key: row[key] for key in setting}:
            assert valid == min(row["valid_nll_by_setting"])
            assert row["seed"] == [0, 1, 2] and row["learning_rate"] == rate["learning_rate"]
            for key in ("valid_nll", "test_nll", "test_score", "best_epoch", "curves"):
                np.testing.assert_allclose(row[key], by_itself[key], rtol=1e-4, atol=1e-4)
    assert len({*row["valid_nll_by_setting"]}) == 6
    assert row["strength"] == 0.1 and row["weight_decay"] == 0


def test_under_equal_budgets_no_dropout_picks_its_weight_decay(modules):
    """Without decay its trainings are the bare model's; each decay gives another."""
    task = make_task(modules.tasks)._replace(rates=(1.0, 2.0), optimizers=())
    config = modules.schemes.Config(units=4, epochs=3, batch=4, learning_rate=0.01, seeds=2)
    bare = modules.noises.SCHEMES["none"]
    (row,) = modules.equal_budgets.tune(task, config, "gru", bare)
    decays = modules.equal_budgets.DECAYS
    assert [(it["weight_decay"], it["rate"]) for it in row["settings"]] == [
        (decay, rate) for rate in (1.0, 2.0) for decay in decays
    ]
    (plain,) = modules.schemes.compare(task, config, "gru", bare._replace(strengths=(1.0, 2.0)))
    assert min(plain["valid_nll_by_strength"]) == pytest.approx(np.mean(plain["valid_nll"]))
    assert plain["strength"] == 2.0 and decays[0] == 0
    undecayed = row["valid_nll_by_setting"][len(decays)]
    assert undecayed == pytest.approx(plain["valid_nll"][0], rel=1e-5)
    assert len({*row["valid_nll_by_setting"]}) == 8


def test_a_weight_decay_is_that_of_adamw(modules, monkeypatch):
    """With gradients of zero, each step takes its rate times the decay from the weights."""
    seen = []
    task = make_task(modules.tasks)._replace(nlls=lambda outputs, targets: 0 * outputs.sum(-1))
    config = modules.schemes.Config(units=4, epochs=2, batch=4, learning_rate=0.1)
    evaluate = modules.schemes.Model.evaluate

    def noted(model, params, *args):
        jax.debug.callback(lambda kernel: seen.append(np.asarray(kernel)), params["kernel"])
        return evaluate(model, params, *args)

    monkeypatch.setattr(modules.schemes.Model, "evaluate", noted)
    # All losses are 0, so the weights of the first epoch are kept: two steps of four.
    run = modules.schemes.build_run(task, config, "gru", modules.noises.SCHEMES["none"])
    settings = modules.schemes.stack(
        [modules.noises.Setting(0.0, 2.0, decay) for decay in (0.0, 0.5)]
    )
    jax.block_until_ready(run(modules.schemes.keys_of(config)[:1], settings))
    jax.effects_barrier()
    whole, decayed = seen[0], seen[-1]
    rates = [2 * 0.1 * (1 + np.cos(np.pi * step / 4)) / 2 for step in (0, 1)]
    np.testing.assert_allclose(decayed, whole * np.prod([1 - 0.5 * r for r in rates]), rtol=1e-5)


def test_under_equal_budgets_one_seed_is_enough(modules):
    task = make_task(modules.tasks)._replace(optimizers=((1.0, 0.0),))
    config = modules.schemes.Config(units=4, epochs=2, batch=4, seeds=1)
    (row,) = modules.equal_budgets.tune(task, config, "gru", modules.noises.SCHEMES["zoneout"])
    assert row["valid_nll"] == [min(row["valid_nll_by_setting"])]


def test_under_equal_budgets_monte_carlo_shares_the_trainings(modules, monkeypatch):
    """Two rows for Gal's scheme: one pass without noise, and the average over samples."""
    trained, build_run = [], modules.equal_budgets.build_run

    def build_counted(*args):
        run = build_run(*args)

        def run_counted(keys, settings):
            trained.extend([len(keys)] * len(settings.strength))
            return run(keys, settings)

        return run_counted

    monkeypatch.setattr(modules.equal_budgets, "build_run", build_counted)
    for name in ("Gal, tied", "Gal, tied, Monte Carlo"):
        scheme = modules.noises.SCHEMES[name]._replace(strengths=(0.8,))
        monkeypatch.setitem(modules.noises.SCHEMES, name, scheme)
    task = make_task(modules.tasks)._replace(optimizers=((1.0, 0.0),))
    config = modules.schemes.Config(
        units=4, epochs=3, batch=4, learning_rate=0.03, seeds=2, mc_samples=3
    )
    rows = modules.equal_budgets.tune(task, config, "lstm", modules.noises.SCHEMES["Gal, tied"])
    assert [row["scheme"] for row in rows] == ["Gal, tied", "Gal, tied, Monte Carlo"]
    assert trained == [1, 1]  # the first seed, and the second
    for row in rows:
        (alone,) = modules.schemes.compare(
            task, config, "lstm", modules.noises.SCHEMES[row["scheme"]]
        )
        np.testing.assert_allclose(row["test_nll"], alone["test_nll"], rtol=1e-5)
    assert rows[0]["curves"] == rows[1]["curves"]
    assert rows[0]["test_nll"] != rows[1]["test_nll"]


def test_a_table_under_equal_budgets_shows_all_that_was_picked(modules):
    tuned = {"rate": 0.5, "weight_decay": 0.1, "learning_rate": 0.005}
    report = {
        "unit": "step",
        "score": None,
        "rows": [
            make_row("none", [8.0, 9.0, 10.0]) | tuned | {"strength": 0.0},
            make_row("zoneout", [7.0, 8.0, 9.0]) | tuned | {"strength": 0.3, "weight_decay": 0.0},
        ],
    }
    picked = [line.split(" | ")[2] for line in modules.tables.format_table(report).splitlines()[2:]]
    assert picked == ["rate x 0.5, decay 0.1", "0.3, rate x 0.5, decay 0"]


def make_row(scheme, test):
    return {
        "scheme": scheme,
        "cell": "lstm",
        "strength": 0.9,
        "test_nll": test,
    }


def test_the_table_compares_with_the_bare_model(modules):
    report = {
        "unit": "step",
        "score": None,
        "rows": [
            make_row("none", [8.0, 9.0, 10.0]),
            make_row("Gal, tied", [7.0, 8.0, 9.0]),
        ],
    }
    assert modules.tables.format_table(report).splitlines()[2:] == [
        "| none | lstm | rate x 0.9 | 9.00 ± 1.00 |  |",
        # Of two standard errors of 1 / sqrt(3), in quadrature.
        "| Gal, tied | lstm | 0.9 | 8.00 ± 1.00 | -1.00 (1.2) |",
    ]


def test_the_verdict_names_what_did_not_help(modules):
    """Standard errors here: 0.08 of a mean, 0.12 of a difference."""
    bare = make_row("none", [9.9, 10.0, 10.1, 10.2, 9.8, 10.3])

    def verdict(*tests):
        named = [make_row(name, tests) for name, tests in zip("AB", tests, strict=False)]
        return modules.tables.format_verdict({"rows": [bare, *named]})

    close, clear = ([value - by for value in bare["test_nll"]] for by in (0.1, 0.5))
    two = "two standard errors"
    assert verdict(close, clear) == f"- LSTM: *B* is best. Not better than none by {two}: *A*."
    assert verdict(close) == f"- LSTM: *A* is best, but no scheme is better than none by {two}."
    assert verdict(clear, clear).endswith(f"every scheme is better than none by more than {two}.")


def test_chorales_are_cut_where_they_are_long(modules, tmp_path):
    songs = [np.arange(length) for length in (129, 64, 66)]
    pieces = modules.tasks.cut_long(songs, 64)
    assert [(int(piece[0]), len(piece)) for piece in pieces] == [
        (0, 65), (64, 65), (0, 64), (0, 65), (64, 2)
    ]  # fmt: skip
    predicted = [piece[1:] for piece in pieces]
    assert sum(map(len, predicted)) == sum(len(song) - 1 for song in songs)
    with pytest.raises(FileNotFoundError, match="must hold jsb_chorales"):
        modules.tasks.load_chorales(None)


def test_words_are_cut_into_windows_that_do_not_overlap(modules):
    task = modules.tasks.load_words(None)
    for split in task.splits:
        np.testing.assert_array_equal(split.inputs[:, 1:], split.targets[:, :-1])
        assert split.inputs.max() < task.words == task.outputs
    train = task.splits[0]
    np.testing.assert_array_equal(train.inputs[1:, 0], train.targets[:-1, -1])


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ({}, ["chorales"], "--data FOLDER must hold jsb_chorales.mat"),
        ({"jsb_chorales.mat": ""}, ["chorales", "--data", "."], "chorales cannot be read: "),
        ({}, ["sunspots", "--batch", "500"], "--batch is 500, of 136 sequences"),
        ({}, ["sunspots", "--epochs", "0"], "argument --epochs: "),
        ({}, ["sunspots", "--data", "."], "--data is for chorales; sunspots need none"),
        ({"schemes_sunspots.json": "{"}, ["sunspots"], "schemes_sunspots.json cannot be read: "),
        ({"schemes_sunspots.json": "[]"}, ["sunspots"], "is of another config"),
        ({"schemes_sunspots.json": '{"config": 1}'}, ["sunspots"], "is of another config"),
    ],
)
def test_bad_input_is_one_line(modules, tmp_path, monkeypatch, capsys, files, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        Path(name).write_text(text)
    monkeypatch.setattr("sys.argv", ["schemes.py", *arguments, "--out", "."])
    with pytest.raises(SystemExit):
        modules.schemes.main()
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_a_scheme_is_run_in_the_cells_that_have_it(modules, tmp_path, monkeypatch):
    """Not in others: such a row would have no place, and be lost."""
    task, ran = make_task(modules.tasks), []
    monkeypatch.setitem(modules.tasks.TASKS, "sunspots", lambda _: task)
    monkeypatch.setattr(modules.schemes, "draw", lambda *_: None)
    monkeypatch.setattr(modules.schemes, "format_table", lambda _: "")

    def compare(task, config, cell, scheme):
        ran.append((cell, scheme.name))
        return [{"cell": cell, "scheme": scheme.name}]

    monkeypatch.setattr(modules.schemes, "compare", compare)
    argv = ["schemes.py", "sunspots", "--batch", "4", "--out", str(tmp_path)]
    asked = ["--scheme", "candidate", "--scheme", "Semeniuta"]
    monkeypatch.setattr("sys.argv", argv + asked)
    modules.schemes.main()
    assert ran == [("lstm", "Semeniuta"), ("lru", "candidate"), ("min_gru", "candidate")]


def test_the_costs_of_all_schemes_are_measured(modules, monkeypatch):
    costs = importlib.import_module("scheme_costs")
    for name in ("STEPS", "BATCH", "FEATURES", "UNITS"):
        monkeypatch.setattr(costs, name, 3)
    seconds = costs.measure(rounds=1)
    stored = json.loads((ROOT / "docs/results/benchmark_scheme_costs.json").read_text())
    assert {cell: [*times] for cell, times in seconds.items()} == {
        cell: [*times] for cell, times in stored["seconds"].items()
    }
    assert all(len(times) == 1 and times[0] > 0 for times in seconds["lstm"].values())


def test_rows_of_other_data_are_not_added(modules, tmp_path, monkeypatch, capsys):
    """Each Python has an edition of the words."""
    other = modules.tasks.load_sunspots(None)._replace(source="the sunspots of another star")
    path, argv = tmp_path / "schemes_sunspots.json", ["schemes.py", "sunspots", "--out"]
    config = modules.schemes.Config(**other.config)
    text = json.dumps(modules.schemes.describe(other, "sunspots", config))
    path.write_text(text)
    monkeypatch.setattr("sys.argv", [*argv, str(tmp_path)])
    with pytest.raises(SystemExit):
        modules.schemes.main()
    assert "is of the sunspots of another star, not yearly sunspots" in capsys.readouterr().err
    assert path.read_text() == text
    assert platform.python_version() in modules.tasks.load_words(None).source


def write_chorales(folder):
    """A file of one song of three steps for each split, in the form of Boulanger-Lewandowski's."""
    songs = np.empty((1, 1), object)
    songs[0, 0] = np.zeros((3, 88))
    names = ("traindata", "validdata", "testdata")
    scipy.io.savemat(folder / "jsb_chorales.mat", dict.fromkeys(names, songs))


@pytest.mark.parametrize("name", ["words", "chorales"])
def test_stored_results_under_equal_budgets_are_whole(modules, tmp_path, name):
    """Each row tried the settings of the program, and picked the best of them by validation."""
    report = json.loads((ROOT / f"docs/results/equal_budgets_{name}.json").read_text())
    if name == "chorales":  # the settings do not depend on the songs
        write_chorales(tmp_path)
    task = modules.tasks.TASKS[name](tmp_path)
    rows = {(row["cell"], row["scheme"]): row for row in report["rows"]}
    assert len(rows) == len(report["rows"])
    for (cell, name), row in rows.items():
        assert (cell, "none") in rows
        settings = modules.equal_budgets.settings_of(modules.noises.SCHEMES[name], task)
        assert row["settings"] == [setting._asdict() for setting in settings]
        picked = settings[np.argmin(row["valid_nll_by_setting"])]
        assert {key: row[key] for key in picked._fields} == picked._asdict()
        assert row["valid_nll"][0] == min(row["valid_nll_by_setting"])
        base = report["config"]["learning_rate"]
        assert row["learning_rate"] == pytest.approx(base * row["rate"])
        assert len(set(row["test_nll"])) == len(row["valid_nll"]) == len(row["seed"]) == 5
        assert np.shape(row["curves"]) == (5, row["epochs"], 2)
        if "Monte Carlo" not in name:
            lowest = np.array(row["curves"])[:, :, 1].min(1)
            np.testing.assert_allclose(lowest, row["valid_nll"], atol=1e-4)
        assert {"device", "versions", "command", "seconds"} <= set(row)


def test_stored_results_are_whole(modules):
    """Every task has a row for each scheme of each cell, and each row says how it was made."""
    compared = [(cell, name) for cell, names in modules.noises.COMPARED.items() for name in names]
    for task in modules.tasks.TASKS:
        paths = sorted((ROOT / "docs/results").glob(f"schemes_{task}*.json"))
        reports = [json.loads(path.read_text()) for path in paths]
        # Words have a file for each text: the linear cells ran on another Python's.
        assert len({report["source"] for report in reports}) == (2 if task == "words" else 1)
        whole = [(report, row) for report in reports for row in report["rows"]]
        assert [(row["cell"], row["scheme"]) for _, row in whole] == compared
        for report, row in whole:
            assert report["task"] == task
            assert {"device", "versions", "command", "seconds"} <= set(row)
            assert len(row["test_nll"]) == len(row["valid_nll"]) == len(row["seed"]) == 5
            assert len(row["strengths"]) == len(row["valid_nll_by_strength"])
            assert row["strength"] == row["strengths"][np.argmin(row["valid_nll_by_strength"])]
            np.testing.assert_allclose(min(row["valid_nll_by_strength"]), np.mean(row["valid_nll"]))
            assert len(row["curves"][0]) == row["epochs"] == report["config"]["epochs"]

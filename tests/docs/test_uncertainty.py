"""The forecasts with bands, run as a user would start them; their statements hold."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from example_runs import EXAMPLES, PNG_SIGNATURE, load_example, run_example

PROGRAM = EXAMPLES / "uncertainty.py"
sunspots = load_example(EXAMPLES / "sunspots.py")
uncertainty = load_example(PROGRAM)
SMALL = "--steps 200 --units 32 --samples 60 --members 2 --learning-rate 0.02".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A finished run: its output, and the folder that it wrote."""
    out = tmp_path_factory.mktemp("uncertainty") / "results"
    return run_example(PROGRAM, *SMALL, "--out", out, trains_long=True), out


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    report = json.loads((out / "uncertainty.json").read_text())
    return {result["model"]: result for result in report["results"]}


def test_table_and_json_agree_and_the_plot_is_a_png(trained: tuple[Any, Path]) -> None:
    process, out = trained
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(
        "175 windows to train on, 70 held out, whose forecasts are of 1929 to 2008"
    )
    results = read_results(out)
    assert [*results] == ["no dropout", "dropout", "ensemble"]
    for name, result in results.items():
        numbers = [f"{share:.1%}" for share in result["coverage"].values()]
        numbers += [f"{result['log_likelihood']:.3f}", f"{result['error']:.3f}"]
        assert re.search(rf"^{name} +{' +'.join(numbers)}$", process.stdout, re.MULTILINE)
    assert (out / "uncertainty.png").read_bytes().startswith(PNG_SIGNATURE)


def test_with_dropout_the_bands_hold_more_of_what_they_say(trained: tuple[Any, Path]) -> None:
    results = read_results(trained[1])
    bare, dropped = results["no dropout"], results["dropout"]
    for level in ("0.5", "0.8", "0.95"):
        assert bare["coverage"][level] + 0.05 < dropped["coverage"][level]
    assert dropped["coverage"]["0.95"] > 0.8
    assert dropped["log_likelihood"] > bare["log_likelihood"] + 1
    assert dropped["error"] < bare["error"]


def test_no_window_to_train_on_reaches_the_years_held_out() -> None:
    training, held_out = uncertainty.load_windows()
    assert training.years.max() + uncertainty.AHEAD - 1 == 1928
    assert held_out.years.min() == 1929
    # A window's past ends where its future begins: shifted by a year, they overlap.
    np.testing.assert_array_equal(training.past[1:, -1, 0], training.future[:-1, 0])
    spots = np.array([0.0, 4.0, 100.0, 190.2])
    np.testing.assert_allclose(sunspots.to_spots(sunspots.to_scale(spots)), spots, atol=1e-4)


def test_coverage_and_likelihood_of_forecasts_that_are_known() -> None:
    """Samples of the years' own distribution: each band holds its share of the years."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2000, 40, 11)).astype(np.float32)
    future = rng.normal(size=(40, 11)).astype(np.float32)
    zeros = np.zeros((3, 40, 11), np.float32)
    result = uncertainty.assess(uncertainty.Forecast(zeros, zeros, values), future)
    for level, share in result.coverage.items():
        assert abs(share - level) < 5 * np.sqrt(level * (1 - level) / future.size)
    likelihood = -(future**2 / 2 + np.log(2 * np.pi) / 2).mean()
    np.testing.assert_allclose(result.log_likelihood, likelihood, rtol=1e-4)
    np.testing.assert_allclose(result.error, np.sqrt((future**2).mean()), rtol=1e-5)


def test_each_sample_has_masks_of_its_own_and_without_dropout_there_are_none() -> None:
    config = uncertainty.Config(units=4, samples=10, members=5)
    past = uncertainty.load_windows()[1].past[:2]
    with jax.numpy_dtype_promotion("standard"):
        for name, predictions in (("dropout", 10), ("ensemble", 5)):
            models = uncertainty.build_models(config, name)
            found = uncertainty.forecast(config, models, past)
            assert found.mean.shape == (10, 2, uncertainty.AHEAD)
            assert len({mean.tobytes() for mean in found.mean}) == predictions
            assert len({value.tobytes() for value in found.values}) == 10


def test_members_are_models_of_their_own_and_train_apart() -> None:
    """In one program, each member is the same as when trained alone."""
    config = uncertainty.Config(units=4, steps=3, members=5)
    training = uncertainty.load_windows()[0]
    windows = training._replace(past=training.past[:8], future=training.future[:8])
    with jax.numpy_dtype_promotion("standard"):
        one = uncertainty.train(config, windows, "no dropout")
        five = uncertainty.train(config, windows, "ensemble")
    alone, together = (one.readout.kernel[...], five.readout.kernel[...])
    assert together.shape == (5, *alone.shape[1:])
    np.testing.assert_allclose(together[0], alone[0], rtol=1e-4, atol=1e-6)
    assert len({kernel.tobytes() for kernel in np.asarray(together)}) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep-prob", "1.2"], "keep_prob must be between 0 and 1, got 1.2"),
        (["--samples", "0"], "must be a whole number of at least 1, got 0"),
        (["--out", str(PROGRAM)], "--out must be a folder to write to"),
    ],
)
def test_bad_flags_are_one_line(
    arguments: list[str], message: str, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("sys.argv", [str(PROGRAM), *arguments])
    with pytest.raises(SystemExit, match="2"):
        uncertainty.main()
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert message in error


@pytest.mark.parametrize(("stopped", "reported"), [("no dropout", []), ("dropout", ["no dropout"])])
def test_ctrl_c_reports_the_models_that_are_trained(
    stopped: str, reported: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    trained = uncertainty.train

    def train(config: Any, windows: Any, name: str) -> Any:
        if name == stopped:
            raise KeyboardInterrupt
        return trained(config, windows, name)

    monkeypatch.setattr(uncertainty, "train", train)
    small = ["--steps", "1", "--units", "2", "--samples", "2", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [str(PROGRAM), *small])
    with jax.numpy_dtype_promotion("standard"):
        assert uncertainty.main() == 130
    printed = capsys.readouterr()
    assert printed.err == f"interrupted; trained by then: {', '.join(reported) or 'none'}\n"
    assert "nan" not in printed.out
    assert (tmp_path / "uncertainty.png").exists() == bool(reported)
    if reported:
        assert [*read_results(tmp_path)] == reported


def test_logs_have_no_bar(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(uncertainty, "train_step", lambda *_: 0.25)
    windows, _ = uncertainty.load_windows()
    uncertainty.train(uncertainty.Config(units=2, steps=9), windows, "dropout")
    printed = capsys.readouterr()
    assert printed.out == "dropout: trained to a loss of 0.250 nats per year\n"
    assert printed.err == ""


# Sentences of docs/coverage.md --------------------------------------------------------------------

DOCS = EXAMPLES.parent / "docs"
STORED = [json.loads(path.read_text()) for path in sorted(DOCS.glob("results/uncertainty_seed*"))]


def test_the_page_shows_the_stored_results() -> None:
    page = (DOCS / "coverage.md").read_text()
    assert [report["seed"] for report in STORED] == [0]
    assert "python examples/uncertainty.py --members 5" in page
    for report in STORED:
        assert report["config"] == vars(uncertainty.Config(members=5))
        for result in report["results"]:
            cells = [str(report["seed"]), result["model"]]
            cells += [f"{share:.0%}" for share in result["coverage"].values()]
            cells += [f"{result['log_likelihood']:.2f}", f"{result['error']:.2f}"]
            assert f"| {' | '.join(cells)} |" in page, cells

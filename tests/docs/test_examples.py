"""The examples run as a user would start them, and report their results."""

import contextlib
import gzip
import json
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from configs import SCHEMES
from example_runs import (
    ENVIRONMENT,
    EXAMPLES,
    LANGUAGE_MODEL,
    PNG_SIGNATURE,
    SMALL,
    SPLITS,
    run_example,
    write_corpus,
)
from report import Result, format_epoch, format_table

# Where SIGINT is ignored, as in a background job of a shell, a child process ignores it too. And
# Python drops a KeyboardInterrupt that arrives in a callback of the garbage collector, prints its
# traceback and goes on; JAX has such a callback, so the collector is off.
HEED_SIGINT = """
import gc, os, runpy, signal, sys
gc.disable()
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(autouse=True)
def standard_dtype_promotion():
    # The suite's is strict, and Optax's Adam needs more.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "plain")


@pytest.fixture(scope="module")
def trained(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """A finished run on the plain text: its output, and the folder that it wrote."""
    out = tmp_path_factory.mktemp("trained") / "results"
    return run_example(LANGUAGE_MODEL, *SMALL, "--data", corpus_folder, "--out", out), out


def read_report(out: Path) -> dict:
    return json.loads((out / "language_model.json").read_text())


def read_table(stdout: str) -> dict[str, tuple[str, str, str]]:
    """Each row's best epoch, validation and test perplexity, as printed."""
    rows = re.findall(r"^(\S+ dropout) +(\d+) +([\d.]+) +([\d.]+)$", stdout, re.MULTILINE)
    return {name: (epoch, valid, test) for name, epoch, valid, test in rows}


# A whole run -------------------------------------------------------------------------------------


def test_table_and_json_agree(trained):
    process, out = trained
    assert process.returncode == 0, process.stderr
    report = read_report(out)
    assert [result["scheme"] for result in report["results"]] == ["none", "variational"]
    for result in report["results"]:
        curves = result["curves"]
        assert [len(curves[split]) for split in SPLITS] == [2, 2, 2]
        assert np.isfinite([curves[split] for split in SPLITS]).all()
        assert result["valid"] == min(curves["valid"])
        assert result["best_epoch"] == 1 + curves["valid"].index(result["valid"])
        assert result["test"] == curves["test"][result["best_epoch"] - 1]
    bare, variational = report["results"]
    table = {
        name: (str(result["best_epoch"]), f"{result['valid']:.2f}", f"{result['test']:.2f}")
        for name, result in (("no dropout", bare), ("variational dropout", variational))
    }
    assert read_table(process.stdout) == table
    changes = [variational[split] / bare[split] - 1 for split in ("valid", "test")]
    assert process.stdout.splitlines()[-2].split() == [f"{change:+.1%}" for change in changes]


def test_the_model_learns(trained):
    report = read_report(trained[1])
    assert report["vocabulary"] == 12
    for result in report["results"]:
        first, second = result["curves"]["valid"]
        assert second < first < 12


def test_curves_are_a_png(trained):
    assert (trained[1] / "language_model.png").read_bytes().startswith(PNG_SIGNATURE)


def test_progress_shows_loss_speed_and_time_left(trained):
    last = trained[0].stderr.replace("\r", "\n").strip().splitlines()[-1]
    words = read_report(trained[1])["words"]["train"]
    assert last.startswith("variational dropout: 100%")
    assert f"{2 * words}/{2 * words}" in last
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d, +[\d.]+k? words/s, epoch=2, loss=\d\.\d+\]", last)


def test_gzip_and_same_seed_give_the_same_numbers(trained, corpus_folder, tmp_path):
    data = tmp_path / "gzip"
    data.mkdir()
    for split in SPLITS:
        text = (corpus_folder / f"{split}.txt").read_bytes()
        (data / f"ptb.{split}.txt.gz").write_bytes(gzip.compress(text))
    process = run_example(LANGUAGE_MODEL, *SMALL, "--data", data, "--out", tmp_path)
    assert process.returncode == 0, process.stderr
    assert read_report(tmp_path) == read_report(trained[1])


def test_other_seed_gives_other_numbers(trained, corpus_folder, tmp_path):
    arguments = ("--data", corpus_folder, "--out", tmp_path, "--seed", 1, "--scheme", "none")
    process = run_example(LANGUAGE_MODEL, *SMALL, *arguments)
    assert process.returncode == 0, process.stderr
    (result,) = read_report(tmp_path)["results"]
    assert [*read_table(process.stdout)] == ["no dropout"]
    assert result["scheme"] == "none"
    assert result["curves"] != read_report(trained[1])["results"][0]["curves"]


def test_ctrl_c_reports_what_was_learned(corpus_folder, tmp_path):
    arguments = [*SMALL, "--layers", 1, "--epochs", 10_000]
    arguments += ["--data", corpus_folder, "--out", tmp_path]
    command = [sys.executable, "-c", HEED_SIGINT, LANGUAGE_MODEL, *map(str, arguments)]
    stdout, stderr = tmp_path / "stdout", tmp_path / "stderr"
    with stdout.open("w") as out, stderr.open("w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=ENVIRONMENT)
        try:
            deadline = time.monotonic() + 300
            while "no dropout, epoch 1:" not in stdout.read_text():
                assert process.poll() is None and time.monotonic() < deadline, stderr.read_text()
                time.sleep(0.02)
            # Python drops an interrupt in a finalizer too. A user then presses Ctrl-C again, and so
            # does this test.
            deadline = time.monotonic() + 300
            while process.poll() is None:
                assert time.monotonic() < deadline, stderr.read_text()
                if "interrupted;" not in stderr.read_text():
                    process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130
    assert stderr.read_text().endswith("interrupted; this is what was learned until then:\n")
    (result,) = read_report(tmp_path)["results"]
    printed = re.findall(r"^no dropout, epoch (\d+):", stdout.read_text(), re.MULTILINE)
    assert printed == [str(1 + epoch) for epoch in range(len(result["curves"]["valid"]))]
    assert len(printed) < 10_000
    row = (str(result["best_epoch"]), f"{result['valid']:.2f}", f"{result['test']:.2f}")
    assert read_table(stdout.read_text()) == {"no dropout": row}
    assert (tmp_path / "language_model.png").read_bytes().startswith(PNG_SIGNATURE)


def test_diverged_training_says_so(corpus_folder, tmp_path):
    arguments = ("--layers", 1, "--data", corpus_folder, "--out", tmp_path)
    process = run_example(LANGUAGE_MODEL, *SMALL, *arguments, "--learning-rate", "1e30")
    assert process.returncode == 1
    assert "the training diverged in epoch 1" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "language_model.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere is not a folder"),
        (["--data", "lacking"], "lacking has no ptb.valid.txt or ptb.valid.txt.gz or"),
        (["--data", "empty"], "test.txt is empty"),
        (["--data", "broken"], "train.txt.gz cannot be read"),
        (["--out", "file"], "file"),
        (["--epoch-count", "3"], "unrecognized arguments: --epoch-count 3"),
        (["--scheme", "zoneout"], "invalid choice: 'zoneout'"),
        (["--config", "zaremba"], "invalid choice: 'zaremba'"),
        (["--epochs", "0"], "--epochs: must be a whole number of at least 1, got 0"),
        (
            ["--recurrent-keep-prob", "1.5"],
            "--recurrent-keep-prob: keep_prob must be between 0 and 1",
        ),
        (["--input-keep-prob", "nan"], "--input-keep-prob: keep_prob must be between 0 and 1"),
        (["--learning-rate", "-1"], "--learning-rate: must be above 0, got -1"),
        (["--mc-samples", "3"], "--mc-samples needs a --config with variational dropout"),
        (
            ["--config", "zaremba-medium", "--mc-samples", "3"],
            "--mc-samples needs a --config with variational dropout",
        ),
        (["--checkpoint-every", "5"], "--checkpoint-every needs --checkpoint"),
        (
            ["--config", "zaremba-small", "--input-keep-prob", "0.5"],
            "--input-keep-prob needs a --scheme with dropout",
        ),
        (
            ["--scheme", "none", "--recurrent-keep-prob", "0.5"],
            "--recurrent-keep-prob needs a --scheme with dropout",
        ),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    write_corpus(tmp_path / "lacking")
    (tmp_path / "lacking" / "valid.txt").unlink()
    write_corpus(tmp_path / "empty")
    (tmp_path / "empty" / "test.txt").write_text("\n \n")
    write_corpus(tmp_path / "broken")
    (tmp_path / "broken" / "train.txt").unlink()
    (tmp_path / "broken" / "train.txt.gz").write_bytes(gzip.compress(b"the cat sat " * 99)[:-9])
    monkeypatch.setattr(sys, "argv", [str(LANGUAGE_MODEL), *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(LANGUAGE_MODEL), run_name="__main__")
    assert end.value.code == 2
    said = capsys.readouterr()
    assert said.err.startswith("language_model.py: error: ")
    assert message in said.err
    assert said.err.count("\n") == 1 and said.err.endswith("\n")
    assert said.out == ""


def test_table_has_the_epoch_that_is_best_by_validation():
    bare = [[90, 50, 41], [80, 40, 42], [70, 60, 20]]
    dropped = [[90, 30, 42], [80, 36, 30]]
    results = [
        Result("none", np.array(bare)),
        Result("variational", np.array(dropped)),
    ]
    assert read_table(format_table(results)) == {
        "no dropout": ("2", "40.00", "42.00"),
        "variational dropout": ("1", "30.00", "42.00"),
    }
    assert format_table(results).splitlines()[-1].split() == ["-25.0%", "+0.0%"]


def test_training_perplexity_is_labelled_if_it_is_measured_under_dropout():
    lines = [format_epoch(Result(scheme, np.array([[90, 50, 41]]))) for scheme in SCHEMES]
    assert lines[0] == "no dropout, epoch 1: train 90.00, valid 50.00, test 41.00"
    assert all("epoch 1: train (dropout on) 90.00, valid 50.00" in line for line in lines[1:])


# The functional example --------------------------------------------------------------------------


def test_functional_scan_shows_what_dropout_does():
    process = run_example(EXAMPLES / "functional_scan.py", trains_long=True)
    assert process.returncode == 0, process.stderr
    lines = re.findall(
        r"^(no dropout|dropout), epoch (\d+): training(?: \(dropout on\))? ([\d.]+), "
        r"new waves ([\d.]+)$",
        process.stdout,
        re.MULTILINE,
    )
    assert [(name, epoch) for name, epoch, *_ in lines] == [
        (name, str(epoch)) for name in ("no dropout", "dropout") for epoch in range(50, 301, 50)
    ]
    losses = {name: (float(training), float(new)) for name, _, training, new in lines}
    (bare_training, bare_new), (training, new) = losses["no dropout"], losses["dropout"]
    assert bare_training < training
    assert new < 0.3 < bare_new
    # Measured in evaluation, without dropout, and close to the training loss: no overfitting.
    assert new < 1.3 * training

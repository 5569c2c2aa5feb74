"""The program for many devices, in one process: its keys, its evaluation, and how it ends."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_runs import EXAMPLES, load_example

import flax_dropout_cell as fdc

data_parallel = load_example(EXAMPLES / "data_parallel.py")
TASK = "--steps 3 --batch-size 4 --hidden-size 8".split()
CONFIG = data_parallel.Config(steps=3, batch_size=4, hidden_size=8)


@pytest.fixture(autouse=True)
def standard_dtype_promotion() -> Iterator[None]:
    # The suite's is strict, and Optax's Adam needs more.
    with jax.numpy_dtype_promotion("standard"):
        yield


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["data_parallel.py", *map(str, arguments)])
    return data_parallel.main()


def test_the_weights_key_is_not_the_parent_of_the_masks() -> None:
    rng, _ = jax.random.split(jax.random.key(CONFIG.seed))  # The other one makes the masks.
    x = jnp.zeros((1, data_parallel.LENGTH, data_parallel.FEATURES))
    want = jax.jit(data_parallel.build_model(CONFIG).init)(rng, x)
    state = data_parallel.start_training(CONFIG, data_parallel.build_mesh())
    jax.tree.map(np.testing.assert_array_equal, state.params, want)


def test_it_ends_with_a_loss_without_dropout_on_a_new_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *TASK, "--out", tmp_path / "report") == 0
    report = json.loads((tmp_path / "report").read_text())
    *_, state = data_parallel.train(CONFIG)
    assert report["losses"] == state.losses.tolist()
    # By hand: a model that has no dropout, on the batch that would come next.
    bare = data_parallel.Model(CONFIG.hidden_size, fdc.RecurrentDropout())
    rows = jax.sharding.NamedSharding(data_parallel.build_mesh(), jax.sharding.PartitionSpec())
    x = data_parallel.make_batch(CONFIG, CONFIG.steps, rows)
    y: Any = bare.apply(state.params, x)
    loss = np.mean((y[:, data_parallel.DELAY :] - x[:, : -data_parallel.DELAY]) ** 2)
    np.testing.assert_allclose(report["evaluation_loss"], loss, rtol=1e-5)
    line = f"without dropout, on a new batch: loss {report['evaluation_loss']:.6f}\n"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("process", [0, 1])
def test_ctrl_c_reports_the_losses_until_then(
    process: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = data_parallel.train

    def interrupted(*arguments: Any) -> Iterator[Any]:
        yield next(train(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(data_parallel, "train", interrupted)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    assert run(monkeypatch, *TASK, "--out", tmp_path / "report") == 130
    out = capsys.readouterr().out
    if process:
        assert out == ""
    else:
        report = json.loads((tmp_path / "report").read_text())
        assert (len(report["losses"]), report["evaluation_loss"]) == (1, None)
        assert "stopped after 1 of 3 steps\n" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--out .", "--out must be a file to write to, got .: Is a directory"),
        ("--out file/below", "--out must be a file to write to, got file/below: "),
        ("--checkpoint-every 5", "--checkpoint-every needs --checkpoint"),
        ("--scheme none --keep-prob 0.5", "--keep-prob needs a --scheme with dropout"),
    ],
)
def test_bad_input_is_one_line_before_training(
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(data_parallel, "train", lambda *_: pytest.fail("it trains"))
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *TASK, *arguments.split())
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_report_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"

    def train(*_: Any) -> Iterator[None]:
        assert not out.exists()  # it was only tried
        out.mkdir()
        yield from ()

    monkeypatch.setattr(data_parallel, "train", train)
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *TASK, "--out", out)
    error = capsys.readouterr().err
    assert f"{out} cannot be written to: " in error and error.count("\n") == 1

"""Runs that are killed at any moment resume from the last good checkpoint, to the same end."""

import contextlib
import itertools
import json
import os
import pickletools
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_runs import EXAMPLES, language_model, load_example, write_corpus
from process_runs import (
    LIMIT,
    assert_tells_of_a_loss,
    environment,
    output,
    two_processes,
    wait_for,
)

checkpoints = load_example(EXAMPLES / "checkpoints.py")  # where the examples will find it as well
data_parallel = load_example(EXAMPLES / "data_parallel.py")

SETTINGS = {"seed": 3, "learning_rate": 0.1, "scheme": "none"}
WORDS = "--embedding-size 6 --hidden-size 8 --layers 1 --batch-size 2 --window 7 --epochs 2".split()
TASK = "--steps 60 --batch-size 4 --hidden-size 8 --seed 3".split()
PAIR = "--steps 12 --batch-size 4 --hidden-size 8 --seed 3 --timeout 5".split()

Moment = Callable[[subprocess.Popen], None]


# Killed ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(log: Path, program: str, *arguments: object) -> Iterator[subprocess.Popen]:
    command = [sys.executable, str(EXAMPLES / program), *map(str, arguments)]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment(2))
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def finish(process: subprocess.Popen, log: Path) -> None:
    assert process.wait(LIMIT) == 0, log.read_text()


def kill(moment: Moment, log: Path, program: str, *arguments: object) -> None:
    with started(log, program, *arguments) as process:
        moment(process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, log.read_text()


def half_written(folder: Path) -> list[int]:
    """The steps that are just now being saved."""
    names = os.listdir(folder) if folder.exists() else []
    return [int(name.partition(".")[0]) for name in names if ".orbax-checkpoint-tmp" in name]


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def while_saving(folder: Path, step: int) -> Moment:
    """In the middle of the first save of this step or a later one: it is stopped there."""

    def moment(process: subprocess.Popen) -> None:
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline and process.poll() is None:
            if max(half_written(folder), default=0) >= step:
                process.send_signal(signal.SIGSTOP)
                os.waitpid(process.pid, os.WUNTRACED)
                if half_written(folder):
                    return
                process.send_signal(signal.SIGCONT)
            time.sleep(0.001)
        raise AssertionError(f"never seen saving in {folder}")

    return moment


def after(text: str, log: Path, seconds: float = 0.0) -> Moment:
    def moment(process: subprocess.Popen) -> None:
        wait_for(text, log, process)
        time.sleep(seconds)

    return moment


def test_killed_language_models_end_as_one_that_was_not(tmp_path: Path) -> None:
    data, folder, log = write_corpus(tmp_path / "corpus"), tmp_path / "saved", tmp_path / "log"
    arguments = ["language_model.py", *WORDS, "--data", data]
    resumed = [*arguments, "--checkpoint", folder, "--checkpoint-every", 5, "--out", tmp_path]
    none, variational, reference_log = folder / "none", folder / "variational", tmp_path / "log_2"
    with started(reference_log, *arguments, "--out", tmp_path / "reference") as reference:
        kill(while_saving(none, 10), log, *resumed)
        (cut_off,) = half_written(none)
        kill(while_saving(variational, 35), log, *resumed)
        assert said(log.read_text()) == [
            f"skipped checkpoint {cut_off} in {none}: it is half-written",
            f"resuming from checkpoint {cut_off - 5} in {none}",
        ]
        (cut_off,) = half_written(variational)
        with started(log, *resumed) as process:
            finish(process, log)
        finish(reference, reference_log)
    # The first training was over, and the second in the middle of its second epoch.
    assert said(log.read_text()) == [
        f"resuming from checkpoint 52 in {none}",
        f"skipped checkpoint {cut_off} in {variational}: it is half-written",
        f"resuming from checkpoint {cut_off - 5} in {variational}",
    ]
    name = "language_model.json"
    assert (tmp_path / name).read_text() == (tmp_path / "reference" / name).read_text()
    assert saved(none) == saved(variational) == [45, 50, 52]


def test_killed_trainings_end_as_one_that_was_not(tmp_path: Path) -> None:
    folder, log, rng = tmp_path / "saved", tmp_path / "log", random.Random(0)
    arguments = ["data_parallel.py", *TASK, "--out"]
    resumed = [*arguments, tmp_path / "report", "--checkpoint", folder, "--checkpoint-every", 2]
    reference_log = tmp_path / "reference_log"
    with started(reference_log, *arguments, tmp_path / "reference") as reference:
        for moment in (
            while_saving(folder, 2),  # the first of all
            after("2 devices", log, rng.uniform(0, 1)),
            while_saving(folder, 20),
            after("2 devices", log, rng.uniform(0, 1)),
        ):
            kill(moment, log, *resumed)
        with started(log, *resumed) as process:
            finish(process, log)
        finish(reference, reference_log)
    first_step = next(line for line in log.read_text().splitlines() if line.startswith("step "))
    assert int(first_step.split()[1].strip(":")) >= 18
    assert (tmp_path / "report").read_text() == (tmp_path / "reference").read_text()
    assert saved(folder) == [56, 58, 60]


def test_killed_processes_end_as_two_that_were_not(tmp_path: Path) -> None:
    folder, resumed = tmp_path / "saved", tmp_path / "report"
    arguments = [*PAIR, "--out", resumed, "--checkpoint", folder, "--checkpoint-every", 1]
    logs = [output(tmp_path, index) for index in range(2)]

    with two_processes(tmp_path, *PAIR, "--out", tmp_path / "reference") as pair:
        for process, log in zip(pair, logs, strict=True):
            finish(process, log)

    with two_processes(tmp_path, *arguments) as pair:
        while_saving(folder, 4)(pair[1])
        pair[1].kill()
        assert pair[0].wait(60) != 0  # It waits for the other, in a save or in a step.
    assert_tells_of_a_loss(logs[0])

    with two_processes(tmp_path, *arguments) as pair:
        wait_for("step 7:", logs[0], pair[0])
        for process in pair:
            process.kill()
    steps = saved(folder)
    flip_a_bit(folder / str(steps[-1]) / "settings" / "metadata")

    with two_processes(tmp_path, *arguments) as pair:
        for process, log in zip(pair, logs, strict=True):
            finish(process, log)
    assert said(logs[0].read_text())[-2:] == [
        f"skipped checkpoint {steps[-1]} in {folder}: settings/metadata is damaged",
        f"resuming from checkpoint {steps[-2]} in {folder}",
    ]
    assert said(logs[1].read_text()) == []
    assert resumed.read_text() == (tmp_path / "reference").read_text()
    assert saved(folder) == [10, 11, 12]


def said(text: str) -> list[str]:
    return [line for line in text.splitlines() if "checkpoint" in line]


def test_it_goes_on_with_other_devices(tmp_path: Path) -> None:
    config = data_parallel.Config(steps=6, batch_size=4, hidden_size=8)
    arguments = "--steps 6 --batch-size 4 --hidden-size 8 --checkpoint-every 3".split()
    log, report = tmp_path / "log", tmp_path / "report"
    options = ("--checkpoint", tmp_path / "saved", "--out", report)
    with started(log, "data_parallel.py", *arguments, *options) as process:
        finish(process, log)
    shutil.rmtree(tmp_path / "saved" / "6")
    assert jax.device_count() == 1
    settings = json.loads(report.read_text())["config"]
    opened = checkpoints.open_checkpoints(tmp_path / "saved", settings, 3)
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam needs it.
        goes_on = [np.asarray(state.losses) for state in data_parallel.train(config, opened)]
    assert [np.isfinite(losses).sum() for losses in goes_on] == [3, 4, 5, 6]
    losses = json.loads(report.read_text())["losses"]
    assert goes_on[0][:3].tolist() == losses[:3]
    np.testing.assert_allclose(goes_on[-1], losses, rtol=1e-5)


# Damaged -----------------------------------------------------------------------------------------


def make_state(step: int) -> dict[str, jax.Array]:
    """One array is large enough for Orbax to keep it in a file of its own."""
    large = jax.random.normal(jax.random.key(step), (64, 64))
    return {"step": jnp.int32(step), "large": large, "small": jnp.arange(3.0) / step}


def open_saved(folder: Path, settings: dict[str, Any] = SETTINGS) -> Any:
    return checkpoints.open_checkpoints(folder, settings, 1)


def save(opened: Any, *steps: int) -> None:
    for step in steps:
        opened.save(step, make_state(step), last=False)


def assert_restored(opened: Any, step: int) -> None:
    restored = opened.restore(jax.tree.map(jnp.zeros_like, make_state(1)))
    jax.tree.map(np.testing.assert_array_equal, restored, make_state(step))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save(open_saved(folder), 1, 2, 3, 4, 5)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """The last three of five checkpoints."""
    return shutil.copytree(whole, tmp_path / "saved")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def overwrite(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def largest(step: Path) -> Path:
    return max(files_of(step), key=lambda path: path.stat().st_size)


def files_of(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def test_the_newest_is_gone_on_from(
    folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert saved(folder) == [3, 4, 5]
    opened = open_saved(folder)
    assert_restored(opened, 5)
    assert capfd.readouterr().err == f"resuming from checkpoint 5 in {folder}\n"
    assert not caplog.records
    save(opened, 6)
    assert saved(folder) == [4, 5, 6]


def test_what_is_restored_is_committed_as_what_was_given(folder: Path) -> None:
    """Else a run that resumes compiles its programs anew."""
    given = make_state(1)
    given["small"] = jax.device_put(given["small"], jax.devices()[0])
    restored = open_saved(folder).restore(given)
    assert {name: leaf.committed for name, leaf in restored.items()} == {
        "step": False,
        "large": False,
        "small": True,
    }


def test_an_empty_folder_is_the_beginning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state = make_state(1)
    assert open_saved(tmp_path / "new" / "folder").restore(state) is state
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty, overwrite, Path.unlink])
def test_damage_to_any_file_is_found(damage: Callable[[Path], None], folder: Path) -> None:
    step = folder / "5"
    kinds = {"checksums.json", "settings/metadata", "state/_METADATA", "state/manifest.ocdbt"}
    assert kinds < {path.relative_to(step).as_posix() for path in files_of(step)}
    for path in files_of(step):
        content = path.read_bytes()
        damage(path)
        found = checkpoints.find_damage(step)
        assert found is not None, path
        # Where a checksum is damaged, it looks as if its file were.
        assert path.relative_to(step).as_posix() in found or path.name == "checksums.json"
        path.write_bytes(content)
        assert checkpoints.find_damage(step) is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda step: flip_a_bit(largest(step)), " is damaged"),
        (lambda step: truncate(largest(step)), " is damaged"),
        (lambda step: largest(step).unlink(), " is missing"),
        (lambda step: (step / "settings" / "metadata").write_text("{not"), "settings/metadata is"),
        (lambda step: shutil.rmtree(step / "settings"), "settings/"),
        (lambda step: (step / "state" / "more").write_text(""), "state/more is damaged"),
        (lambda step: (step / "checksums.json").write_text("{}"), "_CHECKPOINT_METADATA is"),
        (lambda step: (step / "checksums.json").write_text("[]"), "checksums.json is damaged"),
        (lambda step: (step / "checksums.json").write_bytes(b"\xff"), "checksums.json is damaged"),
        (lambda step: (step / "checksums.json").unlink(), "half-written, without checksums.json"),
        (lambda step: [path.unlink() for path in files_of(step)], "half-written"),
        (lambda step: step.rename(step.with_name("5.orbax-checkpoint-tmp")), "half-written"),
        (lambda step: step.rename(step.with_name("5.orbax-checkpoint-tmp-99")), "half-written"),
    ],
)
def test_the_last_good_one_is_gone_on_from(
    damage: Callable[[Path], object],
    reason: str,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    damage(folder / "5")
    opened = open_saved(folder)
    skipped, goes_on = capfd.readouterr().err.splitlines()
    assert skipped.startswith(f"skipped checkpoint 5 in {folder}: ") and reason in skipped
    assert goes_on == f"resuming from checkpoint 4 in {folder}"
    assert_restored(opened, 4)
    save(opened, 5)
    assert_restored(open_saved(folder), 5)
    assert capfd.readouterr().err == f"resuming from checkpoint 5 in {folder}\n"


def test_a_reader_changes_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A training that is running may still be writing what looks damaged."""
    (folder / "5" / "checksums.json").unlink()
    (folder / "6.orbax-checkpoint-tmp").mkdir()
    before = sorted(folder.rglob("*"))
    opened = checkpoints.open_checkpoints(folder, SETTINGS, 1, read_only=True)
    assert_restored(opened, 4)
    assert sorted(folder.rglob("*")) == before
    told = capfd.readouterr().err.splitlines()
    assert [line.split()[2] for line in told[:2]] == ["6", "5"]
    with pytest.raises(checkpoints.CheckpointError, match="must be a folder with checkpoints"):
        checkpoints.open_checkpoints(folder / "none", SETTINGS, 1, read_only=True)
    assert not (folder / "none").exists()


def test_damage_to_all_is_the_beginning(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for round_ in range(2):  # The second time there are damaged ones set aside already.
        for step in (3, 4, 5):
            truncate(largest(folder / str(step)))
        opened, state = open_saved(folder), make_state(1)
        assert opened.restore(state) is state
        lines = capfd.readouterr().err.splitlines()
        assert [line.split()[2] for line in lines[:3]] == ["5", "4", "3"]
        assert lines[3:] == [f"no good checkpoint in {folder}: starting from the beginning"]
        assert sorted(path.name for path in folder.iterdir()) == [
            f"{step}.damaged" for step in (3, 4, 5)
        ]
        save(opened, 3, 4, 5)
        assert round_ or open_saved(folder).newest == 5
        capfd.readouterr()


# Said --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "change"),
    [
        ({"seed": 4}, "seed is 4 and was 3"),
        ({"seed": 4, "scheme": "per-step"}, "seed is 4 and was 3, scheme is per-step and was none"),
        ({"learning_rate": 0.1 + 2e-17}, "learning_rate is 0.10000000000000002 and was 0.1"),
        ({"new": 1}, "new is 1 and was None"),
    ],
)
def test_other_settings_are_told(other: dict[str, Any], change: str, folder: Path) -> None:
    with pytest.raises(checkpoints.CheckpointError) as error:
        open_saved(folder, {**SETTINGS, **other})
    assert str(error.value) == (
        f"{folder} has checkpoints of a run with other settings: {change}; "
        "use the old settings, or another --checkpoint folder"
    )
    assert open_saved(folder).newest == 5


def words_arguments(folder: Path) -> list[str]:
    return [*WORDS, "--data", str(write_corpus(folder / "corpus")), "--out", str(folder / "out")]


@pytest.mark.parametrize(
    ("module", "arguments", "series", "change"),
    [
        (data_parallel, "--keep-prob 0.8", "", "keep_prob is 0.8 and was 0.9"),
        (language_model, "--seed 1", "none", "seed is 1 and was 0"),
        (language_model, "--scheme per-step", "none", "scheme is per-step and was variational"),
        (language_model, "--data {other}", "none", "text is "),
    ],
)
def test_a_program_with_other_settings_ends(
    module: Any,
    arguments: str,
    series: str,
    change: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder, other = tmp_path / "saved", write_corpus(tmp_path / "other")
    (other / "test.txt").write_text("the cat\n")
    command = ["program.py", "--checkpoint", str(folder), "--checkpoint-every", "1"]
    command += words_arguments(tmp_path) if module is language_model else TASK
    # Instead of a training, one save: only its settings matter here.
    monkeypatch.setattr(module, "train", lambda *args: save(args[-1], 1) or iter(()))
    monkeypatch.setattr(sys, "argv", command)
    module.main()
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", command + arguments.format(other=other).split())
    with pytest.raises(SystemExit) as end:
        module.main()
    stderr = capfd.readouterr().err
    assert end.value.code == 2 and stderr.count("\n") == 1
    assert (
        f"error: {folder / series} has checkpoints of a run with other settings: {change}" in stderr
    )


def test_a_checkpoint_of_another_config_ends_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["program.py", "--checkpoint", str(tmp_path / "saved"), *words_arguments(tmp_path)]
    monkeypatch.setattr(language_model, "train", lambda *args: save(args[-1], 100) or iter(()))
    monkeypatch.setattr(sys, "argv", [*command, "--config", "inan-small"])
    language_model.main()
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", [*command, "--config", "zaremba-small"])
    with pytest.raises(SystemExit) as end:
        language_model.main()
    stderr = capfd.readouterr().err
    assert end.value.code == 2 and stderr.count("\n") == 1
    assert (
        "saved has checkpoints of a run with other settings: scheme is none and was variational, "
        in stderr
    )


@pytest.mark.parametrize("module", [data_parallel, language_model])
@pytest.mark.parametrize("place", ["file", "file/below", "/proc", "/proc/nowhere"])
def test_a_place_that_cannot_be_written_to_ends(
    module: Any,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    arguments = words_arguments(tmp_path) if module is language_model else TASK
    monkeypatch.setattr(sys, "argv", ["program.py", *arguments, "--checkpoint", place])
    with pytest.raises(SystemExit) as end:
        module.main()
    stderr = capfd.readouterr().err
    assert end.value.code == 2 and stderr.count("\n") == 1
    assert f"error: --checkpoint must be a folder to write to, got {place}" in stderr


class FullDisk:
    """A manager that fails as Orbax does where no space is left."""

    def __init__(self, manager: Any) -> None:
        self.directory = manager.directory

    def save(self, *args: Any, **options: Any) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']\nat ..")


@pytest.mark.parametrize("module", [data_parallel, language_model])
def test_a_full_disk_is_one_line_and_older_checkpoints_stay(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "saved"

    def train(*arguments: Any) -> Iterator[None]:
        opened = arguments[-1]
        save(opened, 4)
        save(opened._replace(manager=FullDisk(opened.manager)), 8)
        yield

    monkeypatch.setattr(module, "train", train)
    command = ["program.py", "--checkpoint", str(folder), "--checkpoint-every", "4"]
    if module is language_model:
        command += [*words_arguments(tmp_path), "--config", "zaremba-small"]
    else:
        command += [*TASK, "--out", str(tmp_path / "report")]
    monkeypatch.setattr(sys, "argv", command)
    assert module.main() == 1
    line, *_ = capfd.readouterr().err.splitlines()
    assert line.startswith(f"checkpoint 8 cannot be saved in {folder}: no space is left on the")
    assert saved(folder) == [4]
    if module is data_parallel:
        assert json.loads((tmp_path / "report").read_text())["losses"] == []


def test_every_nth_step_is_saved_and_the_last(tmp_path: Path) -> None:
    opened = checkpoints.open_checkpoints(tmp_path, SETTINGS, 4)
    for step in range(1, 11):
        opened.save(step, make_state(step), last=step == 10)
    assert saved(tmp_path) == [4, 8, 10]


def test_there_are_no_pickles(whole: Path) -> None:
    for path in itertools.chain(*(files_of(whole / str(step)) for step in saved(whole))):
        with pytest.raises(Exception, match=r".") as error:
            list(pickletools.genops(path.read_bytes()))
        assert isinstance(error.value, ValueError), path
    for name in ("checkpoints.py", "data_parallel.py", "language_model.py"):
        assert "pickle" not in (EXAMPLES / name).read_text()

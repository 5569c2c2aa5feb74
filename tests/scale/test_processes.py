"""Several processes work as one, over the loopback address.

They train examples/data_parallel.py, and draw the masks of the core and of the layers.
"""

import functools
import json
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import probes
import process_program
import pytest
from asserts import assert_same
from process_runs import (
    LIMIT,
    PROGRAM,
    TASK,
    assert_tells_of_a_loss,
    environment,
    output,
    two_processes,
    wait_for,
)

MASKS = Path(process_program.__file__)


def run_alone(*arguments: object, devices: int = 4) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT, env=environment(devices)
    )


def read_report(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict]:
    """The report and the output of one process with four devices."""

    @functools.cache
    def run(scheme: str) -> dict:
        path = tmp_path_factory.mktemp("alone") / "report.json"
        done = run_alone(*TASK, "--scheme", scheme, "--out", path)
        assert done.returncode == 0, done.stderr
        report = read_report(path)
        assert (report["devices"], report["processes"]) == (4, 1)
        assert printed_steps(done.stdout) == step_lines(report)
        return report

    return run


def printed_steps(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("step ")]


def step_lines(report: dict) -> list[str]:
    return [f"step {step}: loss {loss:.6f}" for step, loss in enumerate(report["losses"], 1)]


@pytest.mark.parametrize("scheme", ["variational", "per-step"])
def test_two_processes_train_as_one_does(
    scheme: str, alone: Callable[[str], dict], tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    with two_processes(tmp_path, *TASK, "--scheme", scheme, "--out", path) as processes:
        for index, process in enumerate(processes):
            assert process.wait(LIMIT) == 0, output(tmp_path, index).read_text()
    report = read_report(path)
    assert (report["devices"], report["processes"]) == (4, 2)
    assert printed_steps(output(tmp_path, 0).read_text()) == step_lines(report)
    assert printed_steps(output(tmp_path, 1).read_text()) == []
    assert len(set(report["losses"])) == 5
    # Within a few units in the last place: sums over processes are added up in another order.
    np.testing.assert_allclose(report["losses"], alone(scheme)["losses"], rtol=1e-6)


def test_one_device_trains_as_four_do(alone: Callable[[str], dict], tmp_path: Path) -> None:
    """Same data, same masks: same losses, but for the order of sums."""
    path = tmp_path / "report.json"
    done = run_alone(*TASK, "--scheme", "per-step", "--out", path, devices=1)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(read_report(path)["losses"], alone("per-step")["losses"], rtol=1e-5)


def test_masks_in_two_processes_are_those_of_one_device(tmp_path: Path) -> None:
    """In the core and both layers: each process has its rows, bit for bit, and equal gradients."""
    with two_processes(tmp_path, "--out", tmp_path, program=MASKS) as processes:
        for index, process in enumerate(processes):
            assert process.wait(LIMIT) == 0, output(tmp_path, index).read_text()
    steps, batch = process_program.STEPS, process_program.BATCH
    seen, grads = jax.jit(process_program.every_mask)(
        jnp.ones(probes.UNITS), process_program.key(), probes.ones(steps, batch)
    )
    for index in range(2):
        got = dict(np.load(process_program.file_of(tmp_path, index)))
        assert got.pop("devices").tolist() == [2, 4]
        rows = np.split(np.arange(batch), 2)[index]
        want = {name: mask[:, rows] for name, mask in seen.items()}
        want |= {f"{case}, gradient": grad for case, grad in grads.items()}
        assert_same(got, want)
    assert all(set(np.unique(mask)) == {0, 2} for mask in seen.values())


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_other(lost: int, tmp_path: Path) -> None:
    with two_processes(tmp_path, *TASK, "--steps", 1_000_000, "--timeout", 5) as processes:
        wait_for("step 3:", output(tmp_path, 0), processes[0])
        processes[lost].send_signal(signal.SIGKILL)
        left = 1 - lost
        assert processes[left].wait(60) != 0
    assert_tells_of_a_loss(output(tmp_path, left))


def test_a_process_whose_peers_do_not_come_ends(tmp_path: Path) -> None:
    with two_processes(tmp_path, *TASK, "--timeout", 3) as processes:
        processes[1].kill()
        assert processes[0].wait(60) != 0
    assert_tells_of_a_loss(output(tmp_path, 0))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--processes 2", "--coordinator, --processes and --process-id go together"),
        ("--coordinator here --processes 1 --process-id 0", "must be HOST:PORT, got here"),
        ("--coordinator here:1 --processes 2 --process-id 2", "--process-id must be below"),
        ("--cluster --coordinator here:1 --processes 1 --process-id 0", "--cluster finds out"),
        ("--batch-size 6", "--batch-size must be a multiple of the number of devices, 4, got 6"),
        ("--steps 0", "must be a whole number of at least 1, got 0"),
        ("--keep-prob 1.5", "keep_prob must be between 0 and 1, got 1.5"),
        ("--seed -1", "must be a whole number in [0, 2**32), got -1"),
    ],
)
def test_a_bad_flag_is_one_line(
    arguments: str,
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *arguments.split()])
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    assert end.value.code == 2
    assert_one_line(capsys.readouterr().err, complaint)


def test_a_launcher_that_is_not_there_is_one_line() -> None:
    done = run_alone("--cluster")
    assert done.returncode == 2
    assert_one_line(done.stderr, "coordinator_address should be defined")


def assert_one_line(stderr: str, complaint: str) -> None:
    assert complaint in stderr
    assert stderr.count("\n") == 1

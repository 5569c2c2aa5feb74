"""Runs programs in several processes that train together."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "examples" / "data_parallel.py"


TASK = "--steps 5 --batch-size 12 --hidden-size 8 --seed 3".split()


LIMIT = 120  # seconds, for all that should take a few


def environment(devices: int) -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}


@contextlib.contextmanager
def two_processes(
    folder: Path, *arguments: object, program: Path = PROGRAM
) -> Iterator[list[subprocess.Popen]]:
    """Starts both with two devices each. They end with the test, whatever becomes of it."""
    with socket.socket() as picked:
        picked.bind(("127.0.0.1", 0))
        port = picked.getsockname()[1]
    command = [sys.executable, str(program), *map(str, arguments)]
    command += ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process-id"]
    processes = []
    try:
        for index in range(2):
            with output(folder, index).open("w") as file:
                process = subprocess.Popen(
                    [*command, str(index)], stdout=file, stderr=file, env=environment(2)
                )
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def output(folder: Path, index: int) -> Path:
    return folder / f"process_{index}.txt"


def wait_for(text: str, path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + LIMIT
    while text not in path.read_text():
        assert process.poll() is None, path.read_text()
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.05)


def assert_tells_of_a_loss(log: Path) -> None:
    """In JAX's own words, or in those of a sum over devices that the loss has cut.

    A process has two devices. Where one notices a closed connection and goes on to its next sum,
    the other receives a message of another size, and its error may come before JAX's: raised by
    the sum, or in a thread of Gloo's, which aborts the process.
    """
    text = log.read_text()
    cut = "(Jax|Xla)RuntimeError: .*Gloo|terminate called .* 'gloo::EnforceNotMet'"
    assert "another task died" in text or re.search(cut, text), text

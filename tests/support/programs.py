"""Programs that need a JAX of their own, run in a process of their own.

How many devices JAX has, and of which platform, is settled once per process. A test module that
needs it otherwise keeps its cases in a program, runs that once, and reads each case's result.
"""

import functools
import itertools
import json
import os
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # a program's Python may have no pytest
    import pytest

Function = TypeVar("Function", bound=Callable[..., Any])


class Cases(dict[str, Callable[[], Any]]):
    """A program's cases, by name.

    A case raises where its promise is broken, and returns what it has measured, a JSON value.
    """

    def over(self, **values: Iterable[Any]) -> Callable[[Function], Function]:
        """Makes a case of a function for each combination of these arguments."""

        def register(function: Function) -> Function:
            title = function.__name__.replace("_", " ")
            for combination in itertools.product(*values.values()):
                name = ", ".join((title, *map(str, combination)))
                self[name] = functools.partial(function, *combination)
            return function

        return register

    def report(self, names: list[str]) -> None:
        """Runs the cases of these names, or all, and prints each result as a JSON line."""
        for name in names or self:
            started = time.perf_counter()
            try:
                result = {"error": None, "value": self[name]()}
            except Exception:
                result = {"error": traceback.format_exc(), "value": None}
            result["seconds"] = round(time.perf_counter() - started, 2)
            print(json.dumps({name: result}), flush=True)


class Results:
    """The results of a program's cases; it runs when the first of them is asked for."""

    def __init__(self, command: list[str], env: dict[str, str], path: Path, timeout: float) -> None:
        self._command, self._env, self._path, self._timeout = command, env, path, timeout

    def __getitem__(self, name: str) -> Any:
        results = self._read()
        if name not in results:
            raise AssertionError(f"no {name!r}, the program ended:\n{results['stderr'][-4000:]}")
        if results[name]["error"] is not None:
            raise AssertionError(results[name]["error"])
        return results[name]["value"]

    def _read(self) -> dict[str, Any]:
        # The workers of pytest-xdist share a folder: the first to make the lock runs the program.
        try:
            self._path.with_suffix(".lock").touch(exist_ok=False)
        except FileExistsError:
            self._wait()
        else:
            whole = self._path.with_suffix(".part")
            whole.write_text(json.dumps(self._run()))
            whole.replace(self._path)
        return json.loads(self._path.read_text())

    def _run(self) -> dict[str, Any]:
        try:
            done = subprocess.run(
                self._command, env=self._env, capture_output=True, text=True, timeout=self._timeout
            )
            stdout, stderr = done.stdout, f"{done.stderr}\nexit status {done.returncode}"
        except subprocess.TimeoutExpired as error:
            stdout, stderr = (error.stdout or b"").decode(), f"no end after {self._timeout} s"
        results: dict[str, Any] = {"stderr": stderr}
        for line in stdout.splitlines():
            results |= json.loads(line)
        return results

    def _wait(self) -> None:
        deadline = time.monotonic() + self._timeout + 30
        while not self._path.exists():
            assert time.monotonic() < deadline, "another worker runs the program and does not end"
            time.sleep(0.1)


def shared_results(
    command: list[str],
    env: dict[str, str],
    tmp_path_factory: "pytest.TempPathFactory",
    timeout: float = 900,
) -> Results:
    """The results of a program that one worker runs for all of them."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    return Results(command, env, folder / f"{Path(command[1]).stem}.json", timeout)

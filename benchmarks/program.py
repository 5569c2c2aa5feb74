"""The interface of a library's file, and the process that runs one library's programs."""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

KEEP_PROBS = (0.7, 0.5)


class Config(NamedTuple):
    """One LSTM layer over float32 inputs `[time, batch, features]`, with as many units."""

    time: int = 128
    batch: int = 64
    features: int = 256
    impl: str = "threefry2x32"
    """The PRNG of the JAX programs."""


class Compiled(NamedTuple):
    """A program that is ready to be timed.

    `forward` gives the outputs, `gradient` that of their mean square by the weights. Both wait
    until the result is there. What a library does not tell is None.
    """

    forward: Callable[[], Any]
    gradient: Callable[[], Any]
    compile_s: float | None = None
    forward_bytes: int | None = None
    gradient_bytes: int | None = None


Programs = dict[str, Callable[[Config], Compiled]]
"""Maps a program's name to what makes it ready."""


def time_call(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def serve(library: str) -> None:
    """Answers requests on stdin, one JSON line each, with one JSON line each on stdout."""
    # Whatever else a library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module = importlib.import_module(f"{library}_programs")
    ready: dict[str, Compiled] = {}

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    answer(versions=module.versions(), names=list(module.PROGRAMS))
    for line in sys.stdin:
        request = json.loads(line)
        name = request["name"]
        try:
            if request["do"] == "compile":
                compiled = ready[name] = module.PROGRAMS[name](Config(*request["config"]))
                compiled.forward()
                compiled.gradient()
                answer(
                    compile_s=compiled.compile_s,
                    forward_bytes=compiled.forward_bytes,
                    gradient_bytes=compiled.gradient_bytes,
                )
            elif request["do"] == "forget":
                del ready[name]
                answer()
            else:
                answer(seconds=time_call(getattr(ready[name], request["do"])))
        except Exception as error:
            answer(error=f"{type(error).__name__}: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    serve(sys.argv[1])

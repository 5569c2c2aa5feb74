"""Programs that are timed in turn, so that whatever else the machine does meets all of them."""

import time
from collections.abc import Callable
from typing import Any

import jax


def time_in_turn(programs: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    """The seconds of each program in each round; a round before them warms up."""
    seconds: dict[Any, list[float]] = {name: [] for name in programs}
    for number in range(rounds + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds

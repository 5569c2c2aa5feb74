"""Reads the text of compiled programs: loops, kernels, collectives."""

import math
import re

BYTES = {"pred": 1, "bf16": 2, "f32": 4, "s32": 4, "u32": 4}


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation in a compiled program."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%([\w.-]+) \(.*\{$", line):
            lines = found.setdefault(header[1], [])
        lines.append(line)
    return found


def scans(text: str, steps: int) -> list[str]:
    """The lines of the loops over arrays `[steps, ...]`; a PRNG may have loops of its own."""
    return [line for line in re.findall(r".* while\(.*", text) if f"[{steps}," in line]


def bytes_held(loop: str) -> int:
    """The size of all arrays that a loop passes from step to step."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", loop.split(" while(")[0])
    return sum(
        BYTES[dtype] * math.prod(int(dim) for dim in shape.split(",") if dim)
        for dtype, shape in arrays
    )


def random_work(text: str, steps: int) -> dict[str, int]:
    """How many operations of a PRNG stand inside the scans, and how many anywhere."""
    loops = scans(text, steps)
    assert loops
    return {
        "inside": random_operations(text, called_by(text, loops)),
        "anywhere": random_operations(text, set(computations(text))),
    }


def called_by(text: str, loops: list[str]) -> set[str]:
    """The computations that these loops run at each step."""
    found = computations(text)
    inside: set[str] = set()
    waiting = [re.findall(r"body=%([\w.-]+)", line)[0] for line in loops]
    while waiting:
        name = waiting.pop()
        if name in inside:
            continue
        inside.add(name)
        for line in found[name]:
            called = re.findall(r"=\{?((?:%[\w.-]+(?:, )?)+)\}?", line)
            names = [name for names in called for name in re.findall(r"%([\w.-]+)", names)]
            waiting += [name for name in names if name in found]
    return inside


def random_operations(text: str, names: set[str]) -> int:
    """How many operations of a PRNG stand in these computations.

    Threefry is made of exclusive ors of words, and nothing else in these programs is; rbg is an
    operation of its own.
    """
    lines = [line for name, lines in computations(text).items() if name in names for line in lines]
    return sum(bool(re.search(r"u32\[.* xor\(| rng-bit-generator\(", line)) for line in lines)

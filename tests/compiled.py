"""What stands where in the text of a compiled program."""

import re


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


def random_work(text: str, steps: int) -> dict[str, int]:
    """How many operations of a PRNG stand inside the scans, and how many anywhere.

    Threefry is made of exclusive ors of words, and nothing else in these programs is; rbg is an
    operation of its own.
    """
    found = computations(text)
    inside: set[str] = set()
    waiting = [re.findall(r"body=%([\w.-]+)", line)[0] for line in scans(text, steps)]
    assert waiting
    while waiting:
        name = waiting.pop()
        if name in inside:
            continue
        inside.add(name)
        for line in found[name]:
            called = re.findall(r"=\{?((?:%[\w.-]+(?:, )?)+)\}?", line)
            names = [name for names in called for name in re.findall(r"%([\w.-]+)", names)]
            waiting += [name for name in names if name in found]

    def count(lines: list[str]) -> int:
        return sum(bool(re.search(r"u32\[.* xor\(| rng-bit-generator\(", line)) for line in lines)

    return {
        "inside": sum(count(found[name]) for name in inside),
        "anywhere": sum(count(lines) for lines in found.values()),
    }

"""How independent the four units of a random word are: counted over all words, as the docs say."""

import functools
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_dropout_cell._random.keep_masks import _mark_dropped

DOCS = Path(__file__).parents[2] / "docs/randomness.md"
XOR = np.arange(256, dtype=np.uint16)[:, None] ^ np.arange(256, dtype=np.uint16)
# By a C program that went through all 2**32 words: how many keep exactly the units in a bit set.
COUNTED = {
    0.7: "34083584 81297176 81297176 189869220 81297176 189869208 189869220 440907480 81297176 "
    "189869220 189869208 440907480 189869220 440907480 440907480 1032849792",
    0.9: "390625 3804787 3804787 34949591 3804787 34949566 34949591 312843098 3804787 34949591 "
    "34949566 312843098 34949591 312843098 312843098 2818287635",
    0.001: "4277813521 4282041 4282041 4225 4282041 4225 4225 65 4282041 4225 4225 65 4225 65 65 1",
}


def in_24_bits(keep_prob: float) -> int:
    return round(float(np.float32(keep_prob)) * 2**24)


def count_kept(units: tuple[int, ...], keep: int) -> int:
    """How many of all words keep all of `units`; `keep` is the probability in 2**-24.

    A unit is kept where its byte is below the first digit of `keep`, or equals it and the later
    digits decide: a sum over which of the units are that open.
    """
    return sum(
        _count_open(units, left_open, keep)
        for size in range(len(units) + 1)
        for left_open in itertools.combinations(units, size)
    )


def _count_open(units: tuple[int, ...], left_open: tuple[int, ...], keep: int) -> int:
    if len(units) == 4:  # turning the word changes nothing
        turned = [tuple(sorted((unit + by) % 4 for unit in left_open)) for by in range(4)]
        left_open = min(turned)
    return _count_words(units, left_open, keep)


@functools.lru_cache(maxsize=64)
def _count_words(units: tuple[int, ...], left_open: tuple[int, ...], keep: int) -> int:
    first, later = keep >> 16, keep & 0xFFFF
    sizes = [first if unit in units else 256 for unit in range(4)]
    if not left_open:
        return sizes[0] * sizes[1] * sizes[2] * sizes[3]
    if len(left_open) == 1:
        # 2**24 values of the three other bytes are many: the second digit settles most.
        one, two, three = (sizes[(left_open[0] + step) % 4] for step in (1, 2, 3))
        settled = int((XOR[:one, :two] < later >> 8).sum()) * three
        tied = [byte for byte in range(one) if byte ^ (later >> 8) < two]
        return settled + int((XOR[tied, :three] < later & 0xFF).sum())
    values = [
        np.array([first]) if unit in left_open else np.arange(size)
        for unit, size in enumerate(sizes)
    ]
    word = np.ix_(*(value.astype(np.uint16) for value in values))
    kept = np.ones([len(value) for value in values], bool)
    for unit in left_open:
        one, two, three = (word[(unit + step) % 4] for step in (1, 2, 3))
        kept &= ((one ^ two) << np.uint16(8) | (one ^ three)) < later
    return int(kept.sum())


def patterns(units: tuple[int, ...], keep: int) -> tuple[np.ndarray, np.ndarray]:
    """The probability of each pattern of kept and dropped units, measured and if independent."""
    size, counted, wanted = len(units), [], []
    subsets = [
        tuple(unit for place, unit in enumerate(units) if kept >> place & 1)
        for kept in range(2**size)
    ]
    counts = [count_kept(_turned(subset), keep) for subset in subsets]
    for kept in range(2**size):
        more = [other for other in range(2**size) if other & kept == kept]
        signs = [(-1) ** (other ^ kept).bit_count() for other in more]
        count = sum(sign * counts[other] for sign, other in zip(signs, more, strict=True))
        counted.append(count / 2**32)
        keep_prob = keep / 2**24
        wanted.append(keep_prob ** kept.bit_count() * (1 - keep_prob) ** (size - kept.bit_count()))
    return np.array(counted), np.array(wanted)


def _turned(units: tuple[int, ...]) -> tuple[int, ...]:
    """The same units of a word that is turned until they come first: as many words keep them."""
    return min((tuple(sorted((unit + by) % 4 for unit in units)) for by in range(4)), default=())


@pytest.mark.parametrize("keep_prob", COUNTED)
def test_counting_is_right(keep_prob) -> None:
    counted, _ = patterns((0, 1, 2, 3), in_24_bits(keep_prob))
    assert (counted * 2**32).tolist() == [int(count) for count in COUNTED[keep_prob].split()]


@pytest.mark.parametrize("keep_prob", [0.001, 0.3, 0.498, 0.7, 0.999])
def test_units_are_kept_as_they_are_counted(keep_prob) -> None:
    """The library's own code on a sample of words, against the rule that is counted here."""
    words = np.array(jax.random.bits(jax.random.key(3), (2**20,), jnp.uint32))
    words[:65_536] = (words[:65_536] & 0xFFFFFF00) | in_24_bits(keep_prob) >> 16  # left open
    keep = in_24_bits(keep_prob)
    dropped = np.asarray(jax.jit(_mark_dropped)(words, jnp.uint32(2**24 - keep)))
    byte = [(words >> 8 * place) & 0xFF for place in range(4)]
    for unit in range(4):
        own, one, two, three = (byte[(unit + step) % 4] for step in range(4))
        kept = (own << 16 | (one ^ two) << 8 | (one ^ three)) < keep
        np.testing.assert_array_equal(dropped >> (8 * unit) & 0xFF, ~kept)


SETS = {"two": [(0, 1), (0, 2)], "three": [(0, 1, 2)], "four": [(0, 1, 2, 3)]}


def worst_of(units: str, keep: int) -> tuple[float, float, float]:
    """How far a pattern's probability is off at most, and the least and largest ratio."""
    results = [patterns(chosen, keep) for chosen in SETS[units]]
    counted, wanted = (np.concatenate(part) for part in zip(*results, strict=True))
    ratios = counted / wanted
    return float(np.abs(counted - wanted).max()), float(ratios.min()), float(ratios.max())


def test_joint_probabilities_are_what_the_docs_say() -> None:
    """The figures and the table in docs/randomness.md, over all thousandths."""
    text = " ".join(DOCS.read_text().split())
    worst = {
        units: {
            thousandth: worst_of(units, in_24_bits(thousandth / 1000))
            for thousandth in range(1, 1000)
        }
        for units in SETS
    }
    assert max(off for off, _, _ in worst["two"].values()) < 3e-8
    assert "by less than 3e-8 for any two units" in text
    for units, figure in (("three", "4.9e-4"), ("four", "9.8e-4")):
        off, _, _ = worst_of(units, round(0.49804 * 2**24))
        assert f"{off:.1e}".replace("e-0", "e-") == figure
        assert max(off for off, _, _ in worst[units].values()) <= off
    assert "most at `keep_prob` 0.49804: by 4.9e-4 for three and by 9.8e-4 for four" in text

    rows = re.findall(r"\| ([.\d]+) to ([.\d]+) \| (\S+) to (\S+) \| (\S+) to (\S+) \|", text)
    assert len(rows) == 4
    for low, high, *figures in rows:
        for units, least, most in (("three", *figures[:2]), ("four", *figures[2:])):
            inside = [
                worst[units][thousandth]
                for thousandth in range(round(1000 * float(low)), round(1000 * float(high)) + 1)
            ]
            assert least == f"{min(ratio for _, ratio, _ in inside):.3g}"
            assert most == f"{max(ratio for _, _, ratio in inside):.3g}"
    _, least, most = worst_of("two", in_24_bits(0.001))
    assert 0.98 < least < most < 1.015
    assert "two units are off by 1.4%" in text

"""The stream is a promise: a key's masks, once drawn, are drawn again by every later version.

    python tests/core/test_golden_masks.py

writes the file anew. A change of it is a change for every user's numbers: it goes into the
changelog, under *Random stream*.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_dropout_cell as fdc

FILE = Path(__file__).with_suffix(".json")
IMPLS = ("threefry2x32", "rbg", "unsafe_rbg")
KEEP_PROBS = (0.5, 0.75, 13 / 16, 0.7, 1 / 3, 251 / 256)
SHAPES = ((64,), (3, 40), (2, 5, 33))


def as_hex(mask: Any) -> str:
    return np.packbits(np.asarray(mask)).tobytes().hex()


def draw(impl: str, keep_prob: float, shape: tuple[int, ...]) -> str:
    rng = jax.random.key(2016, impl=impl)
    return as_hex(fdc.Dropout(keep_prob=keep_prob).draw_mask(rng, shape, jnp.float32))


MASKS = {
    f"{impl}, keep_prob {keep_prob:.6g}, shape {list(shape)}": (impl, keep_prob, shape)
    for impl in IMPLS
    for keep_prob in KEEP_PROBS
    for shape in SHAPES
}


def draw_sequence(impl: str, variational: bool) -> str:
    """The masks of all sites and steps: the values that a cell sees, and its results."""
    noise = fdc.Dropout(keep_prob=0.7, variational=variational)
    spec = fdc.RecurrentDropout(
        params=noise, input=noise, state=(noise, noise), output=(noise, None)
    )
    ones = jnp.ones(12)

    def cell(params: Any, carry: Any, x: jax.Array) -> tuple[Any, Any]:
        seen = (params["a"], params["b"], x, *carry)
        return (ones, ones), (ones, jnp.concatenate(seen))

    params, xs = {"a": ones, "b": ones}, jnp.ones((4, 12))
    rng = jax.random.key(2016, impl=impl)
    carry, (y, seen) = fdc.dropout_scan(params, (ones, ones), xs, rng, cell=cell, dropout=spec)
    return as_hex(jnp.concatenate([y.ravel(), seen.ravel(), *carry]) > 0)


SEQUENCES = {
    f"{impl}, a sequence, {'variational' if variational else 'per step'}": (impl, variational)
    for impl in IMPLS
    for variational in (True, False)
}


def draw_rows(impl: str, variational: bool, by: str) -> str:
    """The masks of a site inside and of the input, for rows by place or by id, with a reset."""
    noise = fdc.Dropout(keep_prob=0.7, variational=variational)
    spec = fdc.RecurrentDropout(input=noise, inside={"candidate": noise})

    def cell(params: Any, h: Any, x: Any, *, disturb: Any = fdc.undisturbed) -> Any:
        return h, jnp.stack([x, disturb("candidate", h)])

    h, xs, rng = jnp.ones((2, 12)), jnp.ones((4, 2, 12)), jax.random.key(2016, impl=impl)
    options: dict[str, Any] = {}
    if by != "place":
        options["resets"] = jnp.zeros((4, 2), bool).at[2, 1].set(True)
    if by == "id":
        options["sequence_ids"] = jnp.array([[7, 8], [7, 8], [7, 9], [7, 9]])
    if "resets" in options:
        options["reset_carry"] = h
    _, ys = fdc.dropout_scan(None, h, xs, rng, cell=cell, dropout=spec, **options)
    return as_hex(ys > 0)


ROWS = {
    f"{impl}, rows by {by}, {'variational' if variational else 'per step'}": (impl, variational, by)
    for impl in IMPLS
    for variational in (True, False)
    for by in ("place", "place and reset", "id")
}


def draw_other(impl: str, name: str) -> str:
    """The masks of other noises, and the word types that an embedding keeps."""
    rng = jax.random.key(2016, impl=impl)
    shape = (3, 40)
    if name == "Zoneout":
        return as_hex(fdc.Zoneout(prob=0.05).draw_mask(rng, shape, jnp.float32))
    if name == "GaussianNoise":
        # In thousandths: the last bits depend on how a platform computes the inverse of erf.
        deviates = fdc.GaussianNoise(stddev=1.0).draw_mask(rng, shape, jnp.float32)
        return np.round(1000 * np.asarray(deviates)).astype("<i2").tobytes().hex()
    if name == "ConcreteDropout":
        uniform = fdc.ConcreteDropout(logit=0.0).draw_mask(rng, shape, jnp.float32)
        return np.asarray(uniform).astype("<f4").tobytes().hex()
    ids, per_example = jnp.arange(120).reshape(shape), name == "embedding, per example"
    rows = fdc.embedding_dropout(
        jnp.ones((120, 1)), ids, rng, keep_prob=0.7, per_example=per_example
    )
    return as_hex(rows > 0)


OTHERS = {
    f"{impl}, {name}": (impl, name)
    for impl in IMPLS
    for name in (
        "Zoneout",
        "GaussianNoise",
        "ConcreteDropout",
        "embedding",
        "embedding, per example",
    )
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_noise_draws_what_it_drew(name: str) -> None:
    assert draw_other(*OTHERS[name]) == json.loads(FILE.read_text())[name]


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_what_it_was(name: str) -> None:
    assert draw(*MASKS[name]) == json.loads(FILE.read_text())[name]


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_sequence_has_the_masks_that_it_had(name: str) -> None:
    assert draw_sequence(*SEQUENCES[name]) == json.loads(FILE.read_text())[name]


@pytest.mark.parametrize("name", ROWS)
def test_rows_have_the_masks_that_they_had(name: str) -> None:
    assert draw_rows(*ROWS[name]) == json.loads(FILE.read_text())[name]


def test_the_file_holds_no_others() -> None:
    assert set(json.loads(FILE.read_text())) == {*MASKS, *SEQUENCES, *ROWS, *OTHERS}


if __name__ == "__main__":
    masks = {name: draw(*arguments) for name, arguments in MASKS.items()}
    masks |= {name: draw_sequence(*arguments) for name, arguments in SEQUENCES.items()}
    masks |= {name: draw_rows(*arguments) for name, arguments in ROWS.items()}
    masks |= {name: draw_other(*arguments) for name, arguments in OTHERS.items()}
    FILE.write_text(json.dumps(masks, indent=2) + "\n")

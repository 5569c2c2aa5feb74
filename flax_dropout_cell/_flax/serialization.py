"""`flax.serialization` saves and restores the carry of a wrapper, once this is imported."""

import dataclasses
from typing import Any

from flax import serialization

from .carry import DropoutCarry as DropoutCarry
from .spec_fingerprint import SpecFingerprint


def _to_state(fingerprint: SpecFingerprint) -> dict[str, Any]:
    return {
        "sites": dict(fingerprint.sites),
        "inputs": list(fingerprint.input_dtypes),
        "prng": None if fingerprint.prng is None else str(fingerprint.prng),
        "shapes": [list(shape) for shape in fingerprint.input_shapes],
    }


def _from_state(fingerprint: SpecFingerprint, state: dict[str, Any]) -> SpecFingerprint:
    # Restore the saved fingerprint, so that masks of another spec are an error, and the key is of
    # the PRNG that it was made for. One that JAX does not ship is known by its object alone.
    prng = state["prng"]
    return dataclasses.replace(
        fingerprint,
        sites=tuple(sorted(state["sites"].items())),
        input_dtypes=tuple(state["inputs"]),
        prng=fingerprint.prng if prng == str(fingerprint.prng) else prng,
        input_shapes=tuple(map(tuple, state["shapes"])),
    )


serialization.register_serialization_state(SpecFingerprint, _to_state, _from_state)

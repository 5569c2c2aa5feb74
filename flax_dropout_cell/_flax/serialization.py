"""`flax.serialization` saves and restores the carry of a wrapper, once this is imported."""

import dataclasses
from typing import Any

from flax import serialization

from .carry import DropoutCarry as DropoutCarry
from .spec_fingerprint import SpecFingerprint


def _to_state(fingerprint: SpecFingerprint) -> dict[str, Any]:
    return dict(fingerprint.sites)


def _from_state(fingerprint: SpecFingerprint, state: dict[str, Any]) -> SpecFingerprint:
    # Restore the saved fingerprint, so that masks of another spec are an error.
    return dataclasses.replace(fingerprint, sites=tuple(sorted(state.items())))


serialization.register_serialization_state(SpecFingerprint, _to_state, _from_state)

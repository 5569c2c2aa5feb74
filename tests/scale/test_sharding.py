"""Masks do not depend on how a program is spread over devices, and drawing them sends nothing."""

import os
import sys
from pathlib import Path

import pytest
import sharding_program
from programs import Results, shared_results

PROGRAM = Path(sharding_program.__file__)
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return shared_results([sys.executable, str(PROGRAM)], ENVIRONMENT, tmp_path_factory)


@pytest.mark.parametrize("case", sharding_program.CASES)
def test_sharding(results: Results, case: str) -> None:
    assert results[case] is None

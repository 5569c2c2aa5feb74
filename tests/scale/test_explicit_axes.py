"""On a mesh with explicit axes, sequences and masks are those of one device."""

import os
import sys
from pathlib import Path

import explicit_axes_program
import pytest
from programs import Results, shared_results

PROGRAM = Path(explicit_axes_program.__file__)
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu"}

if not explicit_axes_program.HAS_SET_MESH:
    pytest.skip("JAX 0.7 cannot mix sharded arrays with others", allow_module_level=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return shared_results([sys.executable, str(PROGRAM)], ENVIRONMENT, tmp_path_factory)


@pytest.mark.parametrize("case", explicit_axes_program.CASES)
def test_explicit_axes(results: Results, case: str) -> None:
    assert results[case] is None

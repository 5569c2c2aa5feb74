"""On a mesh with explicit axes, sequences and masks are those of one device."""

import os
import sys
from pathlib import Path
from typing import Any

import explicit_axes_program
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from explicit_axes_program import numbers
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import Results, shared_results

import flax_dropout_cell as fdc

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


def test_a_mesh_of_one_device() -> None:
    """Steps cannot become rows there: a reshape that merges a sharded axis is a type error."""
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(AxisType.Explicit,))
    h, xs = jnp.zeros((4, 256)), numbers(6, 4, 128)
    weights = jnp.asarray(numbers(128, 256) / 10), jnp.asarray(numbers(256, 256) / 10)

    def gradients(scan: Any, weights: Any, h: Any, xs: Any) -> Any:
        def loss(weights: Any) -> Any:
            def step(h: Any, x: Any) -> Any:
                h = jnp.tanh(x @ weights[0] + h @ weights[1])
                return h, h

            return (scan(step, h, xs)[1] ** 2).sum()

        return jax.jit(jax.grad(loss))(weights)

    wanted = gradients(jax.lax.scan, weights, h, xs)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(value, NamedSharding(mesh, axes))
            for value, axes in ((weights, P()), (h, P("rows")), (xs, P(None, "rows")))
        ]
        got = gradients(fdc.scan, *placed)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)

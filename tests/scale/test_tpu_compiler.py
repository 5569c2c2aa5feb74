"""The TPU's own compiler draws masks where they belong; one artifact runs on every platform.

The compiler comes with libtpu, and where that is installed JAX looks for a TPU, so it has an
environment of its own: `FDC_TPU_PYTHON` is the Python of one with `jax[tpu]`, flax and this
library.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_program
from programs import Results, shared_results

import flax_dropout_cell as fdc

PROGRAM = Path(tpu_program.__file__)
PYTHON = os.environ.get("FDC_TPU_PYTHON")
if PYTHON is None and importlib.util.find_spec("libtpu") is not None:
    PYTHON = sys.executable
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": ""}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    assert PYTHON is not None
    return shared_results([PYTHON, str(PROGRAM)], ENVIRONMENT, tmp_path_factory)


@pytest.mark.skipif(PYTHON is None, reason="FDC_TPU_PYTHON names no Python with libtpu")
@pytest.mark.parametrize("case", tpu_program.CASES)
def test_tpu_compiler(results: Results, case: str) -> None:
    results[case]


@pytest.mark.parametrize("prng", ["threefry2x32", "rbg"])
def test_one_artifact_for_three_platforms(prng: str, tmp_path: Path) -> None:
    """Of a program that draws both before its loop and in it."""
    cell, units = nn.OptimizedLSTMCell(8), 8
    once, each = (fdc.Dropout(keep_prob=0.7, variational=once) for once in (True, False))
    dropout = fdc.RecurrentDropout(params=once, input=each, state=(None, once), output=each)

    @jax.jit
    def run(rng: jax.Array, params: Any, xs: jax.Array) -> Any:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            carry = (jnp.zeros_like(xs[0]), jnp.zeros_like(xs[0]))
            _, ys = fdc.dropout_scan(params, carry, xs, rng, cell=cell.apply, dropout=dropout)
            return ys.sum(), ys

        return jax.grad(loss, has_aux=True)(params)

    xs, draw = np.ones((5, 4, units), np.float32), np.random.default_rng(0)
    shapes = jax.eval_shape(cell.init, jax.random.key(0), (xs[0], xs[0]), xs[0])
    params = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    args = (jax.random.key(1, impl=prng), params, xs)
    platforms = ("cpu", "cuda", "tpu")
    path = tmp_path / "artifact"
    path.write_bytes(jax.export.export(run, platforms=platforms)(*args).serialize())
    loaded = jax.export.deserialize(bytearray(path.read_bytes()))
    assert loaded.platforms == platforms
    jax.tree.map(np.testing.assert_array_equal, loaded.call(*args), run(*args))

"""Benchmarks that cannot be run here in full are tried at a tiny size."""

import importlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


def test_the_programs_for_a_gpu(gpu) -> None:
    names = [name for name, _ in gpu.programs(torch=True)]
    assert {"jax.experimental.rnn: bare", "torch.nn.LSTM: bare"} < set(names)
    assert any("products in the loop" in name for name in names)
    for unroll in (1, 4, 8):
        assert f"fdc.linen.LSTMCell: variational, unroll={unroll}" in names
        assert f"nn.OptimizedLSTMCell: bare, unroll={unroll}" in names
    assert gpu.DTYPES == (jnp.float32, jnp.bfloat16) and gpu.SECONDS < 8 * 60


def test_the_benchmark_for_a_gpu_at_a_tiny_size(gpu, monkeypatch, tmp_path) -> None:
    """On a CPU cuDNN is left out with its reason, and everything else is stored."""
    monkeypatch.setattr(gpu, "UNROLLS", (1,))
    monkeypatch.setattr(gpu, "DTYPES", (jnp.bfloat16,))
    monkeypatch.setattr(gpu, "MODES", {"variational": gpu.MODES["variational"]})
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)  # without Keras
    monkeypatch.setattr("sys.argv", ["gpu.py", "--quick", "--rounds", "1", "--out", str(tmp_path)])
    with jax.numpy_dtype_promotion("standard"):  # Flax's cells in half precision need it
        gpu.main()
    result = json.loads((tmp_path / "gpu.json").read_text())
    names = [row["name"] for row in result["rows"]]
    assert len(names) == 3 and "products in the loop" in names[2]
    (reason,) = result["left_out"]
    assert reason.startswith("jax.experimental.rnn: bare") and "no time left" not in reason
    assert result["command"] == "python benchmarks/gpu.py --quick --rounds 1"
    for row in result["rows"]:
        assert row["ms"]["forward"] > 0 and row["ms"]["gradient"] > 0

"""The page on cuDNN: its masked arrays give the numbers of `dropout_scan` in cuDNN's LSTM too."""

import doctest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import rnn

PAGE = Path(__file__).parents[2] / "docs/kernels.md"


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """All that the page defines."""
    names: dict[str, Any] = {}
    for example in doctest.DocTestParser().get_examples(PAGE.read_text()):
        exec(compile(example.source, PAGE.name, "single"), names)
    return names


def test_the_weights_are_in_the_order_of_cudnn(page) -> None:
    """`lstm_ref` is JAX's own statement of what cuDNN computes."""
    params = page["masked"]._replace(bias=jnp.linspace(-1, 1, 64))
    steps, batch, features = page["xs"].shape
    sizes = (features, 16, 1)
    weights = rnn.unpack_lstm_weights(page["cudnn_weights"](params), *sizes, False)
    zeros, lengths = jnp.zeros((1, batch, 16)), jnp.full(batch, steps, jnp.int32)
    rows = page["xs"].swapaxes(0, 1)
    ys, _, _ = rnn.lstm_ref(rows, zeros, zeros, *weights, lengths, *sizes, 0.0, False)
    _, wanted = jax.lax.scan(
        lambda carry, x: page["fdc"].lstm_cell(params, carry, x), page["carry"], page["xs"]
    )
    np.testing.assert_allclose(ys.swapaxes(0, 1), wanted, atol=1e-6)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
def test_cudnn_runs_with_the_masks_of_the_page(page) -> None:
    assert page["lstm"] is page["cudnn_lstm"]
    np.testing.assert_allclose(page["ys"], page["wanted"], atol=1e-2)

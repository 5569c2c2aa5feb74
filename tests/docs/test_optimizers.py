"""The language model's optimizer: its pieces, and when weights are averaged."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optimizers
from configs import Config


def test_updates_by_hand():
    config = Config(
        adam=False, max_grad_norm=5.0, l2=0.01, weight_decay=0.001, averaging_patience=1
    )
    optimizer: Any = optimizers.build_optimizer(config)
    params, grads = jnp.array([3.0, 4.0]), 30.0
    state, seen = optimizer.init(params), []
    for step in range(4):
        if step == 2:
            state = optimizers.begin_averaging(state)
        updates, state = optimizer.update(jnp.array([grads, 0]), state, params, rate=0.5)
        # Clipped, then L2, then the rate; the decay comes off the new weights.
        expected = (params - 0.5 * (jnp.array([5.0, 0]) + 0.01 * params)) * (1 - 0.001)
        params = params + updates
        np.testing.assert_allclose(params, expected, rtol=1e-6)
        seen.append(params)
        mean = seen[-1] if step < 2 else jnp.stack(seen[2:]).mean(0)
        np.testing.assert_allclose(optimizers.averaged(state, None), mean, rtol=1e-6)


def test_averaging_begins_where_validation_has_stalled():
    losses = np.array([9.0, 5, 4, 6, 7, 5, 4.5, 4.1])
    stalled = [optimizers.has_stalled(losses[:epochs], 3) for epochs in range(1, 9)]
    # At epoch 6, 5.0 is no worse than the best of the first two; at 7, 4.5 is worse than 4.
    assert stalled == [False] * 6 + [True] * 2
    assert not optimizers.has_stalled(losses[:3], 3)

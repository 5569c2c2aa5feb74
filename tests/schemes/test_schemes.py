"""Each published scheme against its paper's equations in NumPy, forward and gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scheme_equations as equations
from paper_schemes import FULL, LENGTHS, SCHEMES, STEPS, draw, example, loss, masks_of, run, schemes


@schemes
def test_training_is_the_papers_equations(name: str) -> None:
    check(name, jax.random.key(1), SCHEMES[name].step, masks_of(name, 1))


@schemes
def test_evaluation_is_the_papers_rule(name: str) -> None:
    check(name, None, SCHEMES[name].evaluate, [{}] * STEPS)


def check(name: str, rng: Any, step: Any, masks: list[Any]) -> None:
    def with_loss(params: Any, carry: Any, xs: Any, seq_lengths: Any) -> Any:
        carry, ys = run(name, params, carry, xs, rng, seq_lengths)
        return loss(carry, ys), (carry, ys)

    differentiate = jax.jit(jax.grad(with_loss, argnums=(0, 1, 2), has_aux=True))
    args = example(SCHEMES[name].cell)
    for seq_lengths in (FULL, LENGTHS):
        gradients, (carry, ys) = differentiate(*args, jnp.asarray(seq_lengths))

        def in_numpy(p: Any, carry: Any, xs: Any, lengths: Any = seq_lengths) -> tuple[Any, Any]:
            return equations.loop(step, p, carry, xs, masks, lengths)

        want_carry, want_ys = in_numpy(*args)
        pairs = zip(equations.as_tuple(carry), equations.as_tuple(want_carry), strict=True)
        for got, want in [*pairs, (ys, want_ys)]:
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
        check_gradients(gradients, args, lambda *args: loss(*in_numpy(*args)))


def check_gradients(gradients: Any, args: Any, loss: Callable[..., Any]) -> None:
    """Along directions in which all weights, the carry and the inputs move at once.

    The imaginary part after a tiny imaginary step is the derivative, to the last digit.
    """
    leaves, structure = jax.tree.flatten(args)
    for seed in (30, 31, 32):
        way = [draw(leaf.shape, 100 * seed + index) for index, leaf in enumerate(leaves)]
        moved = [np.float64(leaf) + 1e-30j * step for leaf, step in zip(leaves, way, strict=True)]
        want = loss(*jax.tree.unflatten(structure, moved)).imag / 1e-30
        parts = [
            np.float64(gradient) * step
            for gradient, step in zip(jax.tree.leaves(gradients), way, strict=True)
        ]
        scale = sum(float(np.abs(part).sum()) for part in parts)
        assert scale > 1
        assert abs(sum(float(part.sum()) for part in parts) - want) < 1e-5 * scale

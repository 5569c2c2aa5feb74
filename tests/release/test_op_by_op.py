"""`op_by_op` gives the numbers of `jax.jit`; other tests rely on that."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_by_op import op_by_op

XS = np.arange(1, 13, dtype=np.float32).reshape(4, 3)


@jax.custom_jvp
def double(x: jax.Array) -> jax.Array:
    return 2 * x


double.defjvp(lambda primals, tangents: (double(*primals), 3 * tangents[0]))


def scan(reverse: bool, xs: Any) -> Any:
    """The order of steps, constants and several outputs all show in the numbers."""
    factor = xs.sum() / 100

    def step(carry: Any, x: Any) -> Any:
        total, count = carry
        total = factor * total + x
        return (total, count + 1), (total, count)

    return jax.lax.scan(step, (jnp.zeros(3), jnp.int32(0)), xs, reverse=reverse)


def branch(xs: Any) -> Any:
    return [jax.lax.cond(xs[i, 0] > 5, lambda x: x + 1, lambda x: x * 7, xs) for i in (0, 3)]


def loop(xs: Any) -> Any:
    return jax.lax.while_loop(lambda x: x.sum() < 1000, lambda x: 2 * x, xs)


PROGRAMS: dict[str, Any] = {
    "scan": lambda xs: scan(False, xs),
    "scan, reverse": lambda xs: scan(True, xs),
    "scan, gradient": jax.grad(lambda xs: (scan(True, xs)[1][0] ** 2).sum()),
    "cond": branch,
    "while": loop,
    "mapped while": jax.vmap(loop),
    "jit in it": lambda xs: jax.jit(branch)(xs)[0],
    "custom_jvp": lambda xs: jax.jvp(double, (xs,), (xs,)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_numbers_are_those_of_jit(name: str) -> None:
    got, want = (compiled(PROGRAMS[name])(XS) for compiled in (op_by_op, jax.jit))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, 1e-6), got, want)

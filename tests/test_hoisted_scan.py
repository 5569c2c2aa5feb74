"""The scan that keeps weights' gradients out of its loop: `jax.lax.scan`'s numbers, always."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scan_cases import CASES, Case

from flax_dropout_cell._hoisted_scan import scan

# Programs here are small and many: what counts is how long they take to compile.
QUICKLY: Any = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SCALES = (1.0, 0.5)


def dot(first: Any, second: Any) -> jax.Array:
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, first, second)), start=jnp.zeros(()))


def scaled(arrays: dict[str, Any], scale: jax.Array) -> dict[str, Any]:
    """All but the weights, scaled: so that `vmap` over the scale leaves the weights alone."""
    return arrays | {
        name: jax.tree.map(lambda leaf: leaf * scale, arrays[name])
        for name in ("h", "c", "carry", "xs")
        if name in arrays
    }


def all_ways(case: Case, arrays: Any, along: Any) -> dict[str, tuple[Any, Any]]:
    """What each transformation of the hoisted scan gives, and what `jax.lax.scan` gives."""

    def plain(arrays: Any, scale: Any) -> jax.Array:
        return case.loss(jax.lax.scan, scaled(arrays, scale))

    def loss(arrays: Any, scale: Any = 1.0) -> jax.Array:
        return case.loss(scan, scaled(arrays, scale))

    scales = jnp.array(SCALES)
    values, gradients = jax.vmap(jax.value_and_grad(plain), (None, 0))(arrays, scales)
    value, gradient = values[0], jax.tree.map(lambda leaf: leaf[0], gradients)
    slope, product = jax.jvp(
        lambda arrays: jax.value_and_grad(plain)(arrays, 1.0), (arrays,), (along,)
    )[1]
    linearized, push = jax.linearize(loss, arrays)
    total = jax.tree.map(lambda leaf: leaf.sum(0), gradients)
    return {
        "forward": (loss(arrays), value),
        "gradient": (jax.grad(loss)(arrays), gradient),
        "checkpoint": (jax.grad(jax.checkpoint(loss))(arrays), gradient),  # type: ignore
        "jvp": (jax.jvp(loss, (arrays,), (along,)), (value, slope)),
        "linearize": ((linearized, push(along)), (value, slope)),
        "vmap of grad": (jax.vmap(jax.grad(loss), (None, 0))(arrays, scales), gradients),
        "grad of vmap": (
            jax.grad(lambda arrays: jax.vmap(loss, (None, 0))(arrays, scales).sum())(arrays),
            total,
        ),
        "forward over reverse": (jax.jvp(jax.grad(loss), (arrays,), (along,))[1], product),
        "reverse over reverse": (
            jax.grad(lambda arrays: dot(jax.grad(loss)(arrays), along))(arrays),
            product,
        ),
        "reverse over forward": (
            jax.grad(lambda arrays: jax.jvp(loss, (arrays,), (along,))[1])(arrays),
            product,
        ),
    }


def is_hoisted(case: Case, arrays: Any) -> bool:
    jaxpr = jax.make_jaxpr(lambda arrays: case.run(scan, **arrays))(arrays)
    return "custom_jvp_call" in [eqn.primitive.name for eqn in jaxpr.jaxpr.eqns]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_number_is_that_of_jax_lax_scan(case) -> None:
    arrays, along = case.arrays(0), case.arrays(1)
    assert is_hoisted(case, arrays) == case.hoists
    compiled = jax.jit(lambda *args: all_ways(case, *args), compiler_options=QUICKLY)
    for name, (got, wanted) in compiled(arrays, along).items():
        jax.tree.map(
            lambda got, wanted, name=name: np.testing.assert_allclose(
                got, wanted, rtol=1e-9, atol=1e-9, err_msg=name
            ),
            got,
            wanted,
        )

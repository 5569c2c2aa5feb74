"""The cases of test_tpu_compiler.py: what the TPU's own compiler makes of a training step.

    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python tests/tpu_program.py

libtpu compiles for TPUs that are not there, so this runs on any machine that has it.
"""

import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from compiled import random_work
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import Cases

import flax_dropout_cell as fdc

TOPOLOGY = "v5e:2x2"
STEPS, BATCH, UNITS = 64, 256, 512
DISTURBED = 3  # an LSTM's input, h and output, one mask each

SCHEMES = ("variational", "per-step")
PRNGS = ("threefry2x32", "rbg")
PASSES = ("forward", "gradient")

CASES = Cases()


@functools.cache
def mesh() -> Mesh:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY)
    return Mesh(topology.devices, ("batch",))


def program(scheme: str, direction: str) -> Callable[..., Any]:
    cell = nn.OptimizedLSTMCell(UNITS)
    noise = None
    if scheme != "none":
        noise = fdc.Dropout(keep_prob=0.7, variational=scheme == "variational")
    dropout = fdc.RecurrentDropout(input=noise, state=(None, noise), output=noise)

    def run(rng: jax.Array, params: Any, xs: jax.Array) -> jax.Array:
        zeros = jnp.zeros_like(xs[0])
        _, ys = fdc.dropout_scan(params, (zeros, zeros), xs, rng, cell=cell.apply, dropout=dropout)
        return ys

    if direction == "forward":
        return run
    return jax.grad(lambda *args: run(*args).sum(), argnums=(1, 2))


@functools.cache
def compiled(scheme: str, prng: str, direction: str) -> Any:
    """Sharded over the batch, on the four chips of the topology."""

    def put(value: Any, *spec: str | None) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh(), P(*spec))
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    row = jnp.zeros((1, UNITS))
    rng = jax.random.key(0, impl=prng)
    params = jax.eval_shape(nn.OptimizedLSTMCell(UNITS).init, jax.random.key(0), (row, row), row)
    xs = jax.ShapeDtypeStruct((STEPS, BATCH, UNITS), jnp.float32)
    lowered = jax.jit(program(scheme, direction)).lower(
        put(rng), jax.tree.map(put, params), put(xs, None, "batch")
    )
    return lowered.compile()


@CASES.over(scheme=SCHEMES, prng=PRNGS, direction=PASSES)
def random_bits_are_drawn_where_they_belong(scheme: str, prng: str, direction: str) -> Any:
    work = random_work(compiled(scheme, prng, direction).as_text(), STEPS)
    if scheme == "variational":
        assert work["inside"] == 0 < work["anywhere"], work
    else:
        assert work["inside"] > 0, work
    bare = random_work(compiled("none", "threefry2x32", direction).as_text(), STEPS)
    assert bare["anywhere"] == 0, bare
    return work


@CASES.over(scheme=SCHEMES, prng=PRNGS, direction=PASSES)
def drawing_sends_nothing(scheme: str, prng: str, direction: str) -> Any:
    """The forward pass sends nothing at all, the gradient what the bare cell's does."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"

    def collectives(text: str) -> list[str]:
        return sorted(re.findall(rf" ({kinds})(?:-start)?\(", text))

    bare = collectives(compiled("none", "threefry2x32", direction).as_text())
    assert bool(bare) == (direction == "gradient")
    assert collectives(compiled(scheme, prng, direction).as_text()) == bare
    return bare


@CASES.over(prng=PRNGS)
def gradient_of_variational_dropout_keeps_its_masks_and_no_more(prng: str) -> Any:
    """Temporary memory over the bare cell's, in bytes of one chip."""
    memory = {
        scheme: compiled(scheme, prng, "gradient").memory_analysis().temp_size_in_bytes
        for scheme in ("none", *SCHEMES)
    }
    units = DISTURBED * BATCH * UNITS // mesh().size
    assert memory["variational"] - memory["none"] <= units, memory  # a byte for each
    return memory | {"units of all masks": units}


if __name__ == "__main__":
    CASES.report(sys.argv[1:])

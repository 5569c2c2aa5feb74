"""The cases of test_tpu_compiler.py: training steps, compiled by the TPU's own compiler.

    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python tests/support/tpu_program.py

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
from compiled import bytes_held, called_by, computations, random_work, scans
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import Cases

import flax_dropout_cell as fdc

TOPOLOGY = "v5e:2x2"
STEPS = 64
SIZES = {  # a batch and units: those that the docs name, and fewer, which compile quickly
    "threefry2x32": (256, 512),
    "rbg": (32, 128),
}
DISTURBED = 3  # an LSTM's input, h and output, one mask each

SCHEMES = ("variational", "per-step")
PASSES = ("forward", "gradient")

CASES = Cases()


@functools.cache
def mesh() -> Mesh:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY)
    return Mesh(topology.devices, ("batch",))


def program(scheme: str, direction: str, units: int) -> Callable[..., Any]:
    cell = nn.OptimizedLSTMCell(units)
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

    batch, units = SIZES[prng]
    row = jax.ShapeDtypeStruct((1, units), jnp.float32)
    rng = jax.random.key(0, impl=prng)
    params = jax.eval_shape(nn.OptimizedLSTMCell(units).init, jax.random.key(0), (row, row), row)
    xs = jax.ShapeDtypeStruct((STEPS, batch, units), jnp.float32)
    lowered = jax.jit(program(scheme, direction, units)).lower(
        put(rng), jax.tree.map(put, params), put(xs, None, "batch")
    )
    return lowered.compile()


@CASES.over(scheme=SCHEMES, prng=SIZES, direction=PASSES)
def random_bits_are_drawn_where_they_belong(scheme: str, prng: str, direction: str) -> Any:
    work = random_work(compiled(scheme, prng, direction).as_text(), STEPS)
    if scheme == "variational":
        assert work["inside"] == 0 < work["anywhere"], work
    else:
        assert work["inside"] > 0, work
    bare = random_work(compiled("none", prng, direction).as_text(), STEPS)
    assert bare["anywhere"] == 0, bare
    return work


@CASES.over(scheme=SCHEMES, prng=SIZES, direction=PASSES)
def drawing_sends_nothing(scheme: str, prng: str, direction: str) -> Any:
    """The forward pass sends nothing, and the gradient sends no more than the bare cell's."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"

    def collectives(text: str) -> list[str]:
        return sorted(re.findall(rf" ({kinds})(?:-start)?\(", text))

    bare = collectives(compiled("none", prng, direction).as_text())
    assert bool(bare) == (direction == "gradient")
    assert collectives(compiled(scheme, prng, direction).as_text()) == bare
    return bare


@CASES.over(prng=SIZES)
def variational_gradient_keeps_masks_and_the_disturbed_input(prng: str) -> Any:
    """Bytes of one chip that its two loops hold, less those of the bare cell's."""
    bare, variational = (
        [bytes_held(line) for line in scans(compiled(scheme, prng, "gradient").as_text(), STEPS)]
        for scheme in ("none", "variational")
    )
    batch, units = SIZES[prng]
    forward, backward = (more - less for more, less in zip(variational, bare, strict=True))
    masks = DISTURBED * batch * units // mesh().size  # a byte for each unit
    index = units * 4  # the compiler's, to unpack them
    disturbed_input = STEPS * batch * units * 4 // mesh().size
    assert 0 < backward <= masks + index
    assert 0 < forward <= masks + index + disturbed_input
    return {"forward": forward, "backward": backward, "masks": masks}


@CASES.over(scheme=("none", *SCHEMES))
def weights_gradients_wait_for_the_loops_end(scheme: str) -> Any:
    """No loop adds to an array of a weight's size, or sends one; weights themselves are bf16."""
    prng = "threefry2x32"
    text, units = compiled(scheme, prng, "gradient").as_text(), SIZES[prng][1]
    loops = scans(text, STEPS)
    sums = rf"f32\[{units},(?:{units}|{4 * units})\]"  # of a gate, or of all gates at once
    assert not [loop for loop in loops if re.search(sums, loop)]
    found, inside = computations(text), called_by(text, loops)
    assert "all-reduce" in text
    assert not [name for name in inside if "all-reduce" in "".join(found[name])]
    return len(loops)


if __name__ == "__main__":
    CASES.report(sys.argv[1:])

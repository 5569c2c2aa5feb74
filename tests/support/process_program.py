r"""The program of test_processes.py: every mask of the core and the layers, in two processes.

    python tests/support/process_program.py --out DIR --coordinator HOST:PORT \
        --processes 2 --process-id 0

Each process writes the rows that its own devices hold. Values are halves and small integers, so
sums are exact in whatever order processes add them up.
"""

import argparse
from pathlib import Path
from typing import Any

import hosts
import jax
import jax.numpy as jnp
import numpy as np
import probes
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

HOSTS = ("dropout_scan", *hosts.LAYERS)
STEPS, BATCH = 3, 8


def key() -> jax.Array:
    return jax.random.key(3)


def every_mask(weights: jax.Array, rng: jax.Array, xs: jax.Array) -> tuple[Any, Any]:
    """Each host's masks with each spec `[time, batch, units]`, and the weights' gradients."""

    def masks(weights: jax.Array, host: str, spec: str) -> tuple[jax.Array, Any]:
        seen = hosts.HOSTS[host](hosts.SPECS[spec], rng, xs, weights).seen
        return seen["params"].sum(), seen

    seen, grads = {}, {}
    for host in HOSTS:
        for spec in hosts.SPECS:
            grad, found = jax.grad(masks, has_aux=True)(weights, host, spec)
            grads[f"{host}, {spec}"] = grad
            seen |= {f"{host}, {spec}, {site}": mask for site, mask in found.items()}
    return seen, grads


def file_of(folder: Path, process: int) -> Path:
    return folder / f"masks_{process}.npz"


def own_rows(array: jax.Array) -> np.ndarray:
    """The rows of this process, in order."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[1].start)
    return np.concatenate([np.asarray(shard.data) for shard in shards], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--process-id", type=int, required=True)
    options = parser.parse_args()
    jax.distributed.initialize(options.coordinator, options.processes, options.process_id)
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    everywhere, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "batch"))
    ones = np.ones((STEPS, BATCH, probes.UNITS), np.float32)
    xs = jax.make_array_from_callback(ones.shape, rows, lambda index: ones[index])
    run = jax.jit(every_mask, out_shardings=(rows, everywhere))
    seen, grads = run(jnp.ones(probes.UNITS), key(), xs)
    arrays = {name: own_rows(mask) for name, mask in seen.items()}
    arrays |= {f"{case}, gradient": np.asarray(grad) for case, grad in grads.items()}
    arrays["devices"] = np.array([jax.local_device_count(), jax.device_count()])
    np.savez(file_of(options.out, options.process_id), **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()

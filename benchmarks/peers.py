"""The peers' environments: one each, for their dependencies do not get along."""

import os
import subprocess
import sys
import venv
from pathlib import Path

# PyTorch's own index has a build for CPUs; PyPI's brings gigabytes of CUDA on Linux.
REQUIREMENTS = {
    "keras": ["keras>=3", "jax"],
    "tensorflow": ["tensorflow-cpu", "tf_keras"],
    "torch": ["torch==2.13.0", "--extra-index-url", "https://download.pytorch.org/whl/cpu"],
}


def cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "flax_dropout_cell" / "benchmarks"


def find_python(peer: str) -> Path | None:
    """The interpreter of a peer's environment, if that is complete."""
    folder = cache_folder() / peer
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    return python if (folder / "complete").exists() else None


def install(peer: str) -> str | None:
    """Makes a peer's environment; gives what went wrong, if anything did."""
    folder = cache_folder() / peer
    venv.create(folder, clear=True, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    command = [python, "-m", "pip", "install", "--quiet", "numpy", *REQUIREMENTS[peer]]
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    (folder / "complete").touch()
    return None

"""Every test and every snippet runs with JAX at its strictest, and compiles in a hurry."""

import os
import shutil
import tempfile
from collections.abc import Iterator

import hypothesis
import jax
import pytest
from long_runs import watched

# Tests compile a great deal and compute very little. Level 0 halves the time to compile, the preset
# takes some more off, and with a cache the workers of one run, and the programs that tests start,
# compile the same program once.
LEVEL, CACHE = "--xla_backend_optimization_level", "JAX_COMPILATION_CACHE_DIR"
if LEVEL not in os.environ.get("XLA_FLAGS", ""):
    flags = [os.environ.get("XLA_FLAGS", ""), f"{LEVEL}=0"]
    if jax.__version_info__ >= (0, 12):  # An XLA that does not know a flag aborts.
        flags.append("--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE")
    os.environ["XLA_FLAGS"] = " ".join(flags)
MAKES_CACHE = CACHE not in os.environ
if MAKES_CACHE:
    os.environ[CACHE] = tempfile.mkdtemp(prefix="jax_cache_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_unconfigure() -> None:
    if MAKES_CACHE:
        shutil.rmtree(os.environ[CACHE], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _few_programs() -> Iterator[None]:
    """Lets go of a file's compiled programs: all of them together would exhaust LLVM."""
    yield
    jax.clear_caches()


@pytest.fixture
def float64() -> Iterator[None]:
    """Lets a test compute in double precision."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(autouse=True)
def _long_runs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs each scan of a snippet for 1,000 steps too; it must stay bounded."""
    if isinstance(request.node, pytest.DoctestItem):
        with watched():
            yield
    else:
        yield

"""Runs the examples on small corpora, as programs and as modules."""

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"


SPLITS = ("train", "valid", "test")


SMALL = "--embedding-size 6 --hidden-size 8 --batch-size 2 --window 7 --epochs 2".split()


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "error::RuntimeWarning"}


def load_example(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def run_example(
    path: Path, *arguments: object, trains_long: bool = False
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(path), *map(str, arguments)]
    # At the suite's level 0 a long training is slow; at the default level it is slow to compile.
    env = ENVIRONMENT | ({"XLA_FLAGS": "--xla_backend_optimization_level=1"} if trains_long else {})
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)


def write_corpus(folder: Path) -> Path:
    """A text of a few words, each of which makes another the likely next one."""
    folder.mkdir()
    rng = random.Random(0)
    words = "the cat dog sat ran on under mat house and".split()
    for split, lines in (("train", 60), ("valid", 9), ("test", 8)):
        text = ""
        for _ in range(lines):
            start, length = rng.randrange(len(words)), rng.randrange(3, 8)
            text += " ".join(words[(start + i) % len(words)] for i in range(length)) + "\n"
        (folder / f"{split}.txt").write_text(text)
    return folder


LANGUAGE_MODEL = EXAMPLES / "language_model.py"
language_model = load_example(LANGUAGE_MODEL)

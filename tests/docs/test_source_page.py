"""*Reading the source* names files and definitions that exist, and a call passes through them."""

import ast
import re
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import flax_dropout_cell as fdc

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "flax_dropout_cell"
STEPS = re.findall(r"^\d+\. (.+?(?:\n   .+)*)$", (ROOT / "docs/source.md").read_text(), re.M)


def files_of(step: str) -> list[str]:
    return re.findall(r"`(\w+/\w+\.py)`", step)


def names_of(step: str) -> list[str]:
    """The definitions that a step names before its colon: `RNN.__call__`, `dropout_scan`."""
    return re.findall(r"`([\w.]+)`", re.sub(r"`\w+/\w+\.py`", "", step.split(":")[0]))


def defined_in(path: Path) -> set[str]:
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            functions = [each for each in node.body if isinstance(each, ast.FunctionDef)]
            found |= {f"{node.name}.{function.name}" for function in functions}
    return found


@pytest.mark.parametrize("step", STEPS)
def test_a_step_names_what_its_files_define(step: str) -> None:
    files, names = files_of(step), names_of(step)
    assert files and names
    assert set(names) <= set.union(*(defined_in(PACKAGE / file) for file in files))


def test_a_training_call_passes_through_the_steps_in_order() -> None:
    """The functions of steps 1 to 6 start in this order, and those up to the noise run at all."""
    noise = fdc.Dropout(keep_prob=0.75)  # of two bits a unit, so it is drawn inside the loop
    rnn = fdc.linen.RNN(nn.LSTMCell(8), fdc.RecurrentDropout(output=noise))
    x = jnp.ones((2, 5, 3))
    variables = rnn.init(jax.random.key(0), x)
    began: dict[tuple[str, str], int] = {}

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            file = Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix()
            began.setdefault((file, frame.f_code.co_qualname), len(began))

    jax.clear_caches()
    sys.setprofile(note)
    try:
        rnn.apply(variables, x, rngs={"dropout": jax.random.key(1)})
    finally:
        sys.setprofile(None)

    order = [began[files_of(step)[0], names_of(step)[0]] for step in STEPS[:6]]
    assert order == sorted(order)
    for step in STEPS[6:9]:
        (file,) = files_of(step)
        assert all(
            any(at == file and called.split(".")[0] == name for at, called in began)
            for name in names_of(step)
        ), step
    assert len(STEPS) == 11


def test_a_package_imports_only_those_listed_before_it() -> None:
    listed = re.findall(r"`(\w+)`", (fdc.__doc__ or "").split("serve\nall of them:")[1])
    folders = [name for name in dict.fromkeys(listed) if (PACKAGE / name).is_dir()]
    assert set(folders) == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    for folder in folders:
        for path in (PACKAGE / folder).rglob("*.py"):
            depth = len(path.relative_to(PACKAGE).parts)
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level == depth and node.module:
                    other = node.module.split(".")[0]
                    assert other not in folders[folders.index(folder) :], f"{path}: {other}"

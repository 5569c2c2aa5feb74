"""Only two files use JAX or Flax beyond their documentation, or ask for their versions."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "flax_dropout_cell"
COMPAT = (PACKAGE / "_compat.py", PACKAGE / "_flax/compat.py")
FILES = sorted(PACKAGE.rglob("*.py"))
UNDOCUMENTED_MODULES = ("jax._src", "jax.core", "jax.extend", "jax.interpreters")
UNDOCUMENTED_NAMES = {
    "__dataclass_fields__", "__version_info__", "debug_path", "func_name", "manual_axis_type",
    "module_stack", "rng_counters", "vma",
}  # fmt: skip
VERSIONS = ("jax.__version__", "flax.__version__")
# matplotlib may be missing, and a module that a config names.
OPTIONAL_IMPORTS = {"_inspect/plot_masks.py", "_flax/tensorflow/trusted_names.py"}
OF_NAMED_TUPLES = {"_asdict", "_fields", "_replace"}


def parsed(paths: list[Path]) -> Iterator[tuple[str, ast.AST]]:
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            yield str(path.relative_to(PACKAGE)), node


def own_names(paths: list[Path]) -> set[str]:
    """The private names that the package itself defines."""
    names = set(OF_NAMED_TUPLES)
    for _, node in parsed(paths):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


def uses(node: ast.AST, own: set[str]) -> list[str]:
    """The undocumented things of JAX and Flax that a node of a syntax tree uses."""
    found = []
    if isinstance(node, ast.Import):
        found = [alias.name for alias in node.names if alias.name.startswith(UNDOCUMENTED_MODULES)]
    elif isinstance(node, ast.ImportFrom) and not node.level:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        found = [name for name in names if name.startswith(UNDOCUMENTED_MODULES)]
    elif isinstance(node, ast.Attribute):
        private = node.attr.startswith("_") and not node.attr.startswith("__")
        path = ast.unparse(node)
        if node.attr in UNDOCUMENTED_NAMES or (private and node.attr not in own):
            found = [path]
        elif path.startswith(UNDOCUMENTED_MODULES) or path in (
            "jax.__version__",
            "flax.__version__",
        ):
            found = [path]
    elif isinstance(node, ast.keyword) and node.arg is not None and node.arg.startswith("_"):
        found = [] if node.arg in own else [f"{node.arg}="]
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
        asked = ast.unparse(node.args[0]) in ("flax", "jax", "jax.lax", "jax.numpy", "nn", "nnx")
        name = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
        found = [ast.unparse(node)] if asked or name in UNDOCUMENTED_NAMES else []
    elif isinstance(node, ast.ExceptHandler) and node.type is not None:
        if {"ImportError", "ModuleNotFoundError"} & set(
            ast.unparse(node.type).strip("()").split(", ")
        ):
            found = ["except ImportError"]
    return found


def test_undocumented_uses_have_their_files() -> None:
    own = own_names(FILES)
    others = [path for path in FILES if path not in COMPAT]
    found = [
        f"{name}:{node.lineno}: {use}"  # type: ignore[attr-defined]
        for name, node in parsed(others)
        for use in uses(node, own)
        if not (use == "except ImportError" and name in OPTIONAL_IMPORTS)
    ]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import jax._src.core",
        "import jax.core",
        "from jax import core",
        "from jax.extend import core",
        "from jax.interpreters import ad",
        "module.scope._sown",
        "cell.clone(_deep_clone=True)",
        "jax.__version_info__ < (0, 12)",
        "getattr(nnx, 'static', None)",
        "hasattr(jax, 'P')",
        "getattr(aval, 'vma', ())",
        "try:\n    import jax.new\nexcept (ImportError, AttributeError):\n    pass",
    ],
)
def test_the_test_sees_such_uses(source: str) -> None:
    assert [use for node in ast.walk(ast.parse(source)) for use in uses(node, set())]


def test_the_core_has_no_name_of_flax_in_its_own_file() -> None:
    imported = [
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for _, node in parsed([COMPAT[0]])
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    assert imported and all(name.split(".")[0] in ("jax", "typing") for name in imported)

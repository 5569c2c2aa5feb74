"""Rates of words that make a sentence hard to read, per 1,000 words of prose.

Two texts are counted: the package's docstrings and comments, and the pages of docs with README,
the changelog and the guide for contributors.
"""

import ast
import functools
import io
import re
import tokenize
from pathlib import Path

import pytest

import flax_dropout_cell

ROOT = Path(__file__).parents[2]
PACKAGE = Path(flax_dropout_cell.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# "There is no default" is fine; "it is no number" is not.
AT_MOST = {r"what": 2.0, r"where": 3.0, r"(?<!there )(?:is|are) no": 0.2}
AT_LEAST = {"if": 4.0}


def docstrings(source: str) -> list[str]:
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = (ast.get_docstring(n) for n in ast.walk(ast.parse(source)) if isinstance(n, nodes))
    return [text for text in found if text]


def comments(source: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def prose_of_page(page: str) -> str:
    """A page without its front matter, blocks of code, code in a line and addresses of links."""
    page = re.sub(r"\A---\n.*?\n---\n", "", page, flags=re.DOTALL)
    page = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`]*`|\]\([^)]*\)|\$[^$]*\$", " ", page)


@functools.cache
def prose(text: str) -> str:
    """The package's docstrings, without their examples, and its comments; or that of all pages."""
    if text == "docs":
        return "\n".join(prose_of_page(path.read_text()) for path in PAGES)
    sources = [path.read_text() for path in FILES]
    told = [text for source in sources for text in docstrings(source)]
    told = [re.sub(r"(?m)^\s*(>>>|\.\.\.).*$", "", text) for text in told]
    return "\n".join([*told, *(text for source in sources for text in comments(source))])


def rate(words: str, text: str) -> float:
    count = len(re.findall(rf"\b({words})\b", prose(text), re.IGNORECASE))
    return 1000 * count / len(re.findall(r"[A-Za-z']+", prose(text)))


@pytest.mark.parametrize("text", ["package", "docs"])
@pytest.mark.parametrize(("words", "bound"), AT_MOST.items())
def test_riddles_are_rare(words: str, bound: float, text: str) -> None:
    assert rate(words, text) < bound


@pytest.mark.parametrize("text", ["package", "docs"])
@pytest.mark.parametrize(("words", "bound"), AT_LEAST.items())
def test_conditions_are_written_with_if(words: str, bound: float, text: str) -> None:
    assert rate(words, text) > bound


def test_docstrings_name_their_subject() -> None:
    openings = ("What ", "How ", "Refuses ")
    riddles = [
        f"{path.relative_to(PACKAGE)}: {text.splitlines()[0]}"
        for path in FILES
        for text in docstrings(path.read_text())
        if text.startswith(openings)
    ]
    assert not riddles


def test_properties_are_not_read_as_types() -> None:
    """Sphinx takes what stands before a colon in a property's first line for its type."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            first = (ast.get_docstring(node) or "").split("\n")[0]
            if any(ast.unparse(mark) == "property" for mark in node.decorator_list):
                assert ": " not in first, f"{path.relative_to(PACKAGE)}: {first}"

"""The numbers in the README are those of the stored results, and its links lead somewhere."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_language_models_table() -> None:
    """A row per seed: validation and test perplexity, without dropout and with."""
    readme = (ROOT / "README.md").read_text()
    for path in sorted((ROOT / "docs/results").glob("language_model_seed*.json")):
        report = json.loads(path.read_text())
        bare, dropped = report["results"]
        row = f"| {report['config']['seed']} | " + " | ".join(
            f"{bare[split]:.1f} | {dropped[split]:.1f} | {dropped[split] / bare[split] - 1:+.1%}"
            for split in ("valid", "test")
        )
        assert row in readme, row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page) -> None:
    """A claim that names its test, as `test_file.py::test_name` or `test_name`, has one."""
    sources = {path.name: path.read_text() for path in (ROOT / "tests").glob("*.py")}
    everything = "\n".join(sources.values())
    for file, name in re.findall(
        r"`(?:tests/)?(test_\w+\.py)?(?:::)?(test_\w+)?`", page.read_text()
    ):
        assert not file or file in sources, file
        assert not name or f"def {name}(" in sources.get(file, everything), name

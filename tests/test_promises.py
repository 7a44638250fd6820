"""README names tests for what it promises: they are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = [line for line in README.splitlines() if line.startswith("|") and re.search(r"`test_\w+\.py`", line)]


@pytest.mark.parametrize("row", ROWS)
def test_the_tests_that_readme_names_exist(row):
    for part in row.rsplit("|", 2)[1].split(";"):
        files = re.findall(r"`(test_\w+\.py)`", part)
        assert files and all((ROOT / "tests" / file).exists() for file in files), part
        text = "".join((ROOT / "tests" / file).read_text(encoding="utf-8") for file in files)
        for name in re.findall(r"`(test_\w+)`", part):
            assert f"def {name}(" in text, name


def test_readme_promises_something():
    assert len(ROWS) >= 8

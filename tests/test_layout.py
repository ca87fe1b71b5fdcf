"""The tests' layout: what is shared stands in the harness, and no file is too long to be read."""

import re
from pathlib import Path
from typing import Final

import pytest

TESTS: Final = Path(__file__).parent
FILES: Final = sorted(str(path.relative_to(TESTS)) for path in TESTS.rglob("test_*.py"))
_MOST_LINES: Final = 600
_IMPORT_OF_A_TEST: Final = re.compile(r"^(?:from|import) tests\.(?:\w+\.)*test_\w+", re.MULTILINE)


@pytest.mark.parametrize("file", FILES)
def test_no_test_file_imports_another(file: str) -> None:
    """What several files share belongs into tests/harness, or into a conftest.py if it is a fixture."""
    assert _IMPORT_OF_A_TEST.findall((TESTS / file).read_text()) == []


@pytest.mark.parametrize("file", FILES)
def test_no_test_file_is_too_long(file: str) -> None:
    assert len((TESTS / file).read_text().splitlines()) <= _MOST_LINES

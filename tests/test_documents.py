"""README and docs name nothing that there isn't: commands, paths, settings and places."""

import itertools
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import typer.main

from backend.__main__ import app
from backend.main import create_app
from backend.settings import Settings
from tests.harness.command_line import ROOT

DOCUMENTS: Final = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
_COMMAND: Final = re.compile(r"(?:python -m backend|sudo wireguard-provisioning) ([^`\n]+)")
_SUBSTITUTION: Final = re.compile(r"\$\([^)]*\)")
_BLOCK: Final = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PATH: Final = re.compile(
    r"(?:/api/v1(?:/[a-z0-9{}_-]+)+|(?<![\w/.])/(?:healthz|readyz|docs|openapi\.json)\b)"
)
_SETTING: Final = re.compile(r"\bWIREGUARD_[A-Z_]+\b")
_EVENT_OR_FIELD: Final = re.compile(r"`([a-z]+(?:_[a-z]+)+)`")
_LINK: Final = re.compile(r"\]\(([^)\s]+)\)")
_HEADING: Final = re.compile(r"^#+ (.+)$", re.MULTILINE)
# Places in the code: docs/design.md writes them without `backend/` in front.
_PLACE: Final = re.compile(r"(?<![\w/.-])((?:[a-z0-9_]+/)*[a-z0-9_]+\.py\b|(?:[a-z0-9_]+/)+(?!\w))")
# A class, or a type that is made of one, with or without a method; or a name of one module alone.
_CLASS: Final = re.compile(r"`([A-Z]\w*[a-z]\w*)`|\b([A-Z]\w*[a-z]\w*)\.([a-z_]+)\b")
_PRIVATE: Final = re.compile(r"`(_[A-Za-z_]+)`")
# What stands for anything in the text's own words.
_PLACEHOLDER: Final = re.compile(r"[A-Z]+")


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    return [text for found, text in _BLOCK.findall(text_of(document)) if found == language]


def commands(document: str) -> Iterator[list[str]]:
    """Yield the words behind `python -m backend`, once for each choice of what is written as a|b."""
    for written in _COMMAND.findall(text_of(document)):
        # Up to what is the shell's, or a table's.
        words = shlex.split(re.split(r"[<>;)]| \| |  +#", _SUBSTITUTION.sub("ID", written))[0])
        yield from (list(chosen) for chosen in itertools.product(*(word.split("|") for word in words)))


def problem_with(words: list[str]) -> str:
    """Return what of a command there isn't, or nothing."""
    # Typer's own copy of Click has no types.
    command: Any = typer.main.get_command(app)
    for word in words:
        if word.startswith("-") and word != "-":
            name = word.partition("=")[0]
            if name not in {option for parameter in command.params for option in parameter.opts} | {"--help"}:
                return f"{command.name} has no option {name}"
        elif hasattr(command, "commands"):
            if _PLACEHOLDER.fullmatch(word):
                return ""
            if word not in command.commands:
                return f"{command.name} has no command {word}"
            command = command.commands[word]
    return ""


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_and_option_exists(document: str) -> None:
    assert [(words, wrong) for words in commands(document) if (wrong := problem_with(words))] == []


def test_commands_are_found_at_all() -> None:
    found = [words for document in DOCUMENTS for words in commands(document)]
    for words in (["hub", "init"], ["audit", "verify"], ["key", "revoke"]):
        assert [one for one in found if one[:2] == words], words
    assert problem_with(["hub", "fly"])
    assert problem_with(["token", "create", "--colour", "red"])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_exists(document: str) -> None:
    ours = create_app(Settings())
    # The last three are in no schema.
    known = {*ours.openapi()["paths"], "/api/v1/wireguard", "/openapi.json", "/docs"}
    patterns = [re.compile(re.sub(r"\{\w+\}", "[^/]+", path)) for path in known]
    text = text_of(document)
    missing = [
        path for path in _PATH.findall(text) if not any(pattern.fullmatch(path) for pattern in patterns)
    ]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_setting_exists(document: str) -> None:
    known = {name.upper() for name in Settings.model_fields}
    unknown = [
        name
        for name in _SETTING.findall(text_of(document))
        if name not in known and not any(one.startswith(name) for one in known if name.endswith("_"))
    ]
    assert unknown == []


@pytest.fixture(scope="module")
def source() -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "backend").rglob("*.py")))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_event_and_field_exists(document: str, source: str) -> None:
    """An alert on a line of the log that never comes is worse than none."""
    named = set(_EVENT_OR_FIELD.findall(text_of(document)))
    assert {name for name in named if not re.search(rf"\b{name}\b", source)} == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_place_in_the_code_exists(document: str) -> None:
    places = _PLACE.findall(text_of(document))
    if document != "docs/design.md":
        places = [place.removeprefix("backend/") for place in places if place.startswith("backend/")]
    assert [place for place in places if not is_place(place)] == []


def is_place(place: str) -> bool:
    """Say whether there is such a file or directory; one that is named alone may be in any directory."""
    alone = place.rstrip("/")
    if "/" not in alone:
        return any((ROOT / "backend").rglob(alone))
    return (ROOT / "backend" / place).exists() or (ROOT / place).exists()


def test_every_class_that_the_design_names_is_defined(source: str) -> None:
    text = text_of("docs/design.md")
    named = _CLASS.findall(text)
    assert named
    for name in {alone or owner for alone, owner, _ in named} | set(_PRIVATE.findall(text)):
        assert re.search(
            rf"^(class {name}\b|(async )?def {name}\b|{name}(: .+)? = )", source, re.MULTILINE
        ), name
    for _, owner, method in named:
        if owner:
            # Up to the next line that isn't indented.
            body = re.search(rf"^class {owner}\b.*\n((?:[ ].*\n|\n)*)", source, re.MULTILINE)
            assert body, owner
            assert re.search(rf"^    (async )?def {method}\b", body[1], re.MULTILINE), f"{owner}.{method}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    broken = []
    for link in _LINK.findall(text_of(document)):
        if "://" in link:
            continue
        place, _, anchor = link.partition("#")
        target = (ROOT / document).parent / place if place else ROOT / document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def anchors(path: Path) -> set[str]:
    """Return the anchors of a file's headings, as forges make them."""
    headings = _HEADING.findall(path.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_pasted_blocks_are_valid_bash(document: str) -> None:
    for block in blocks(document, "bash"):
        parsed = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
        assert (parsed.returncode, parsed.stderr) == (0, ""), block


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_secret_is_an_argument_of_a_command(document: str) -> None:
    """Every user of the host can read every process's arguments."""
    for block in blocks(document, "bash"):
        for line in block.splitlines():
            assert not re.search(r"curl\b.*(Bearer|Authorization|\bocw_)", line), line
            assert not re.search(r"\$\([^)]*(token|key) create", line), line


def test_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= 150

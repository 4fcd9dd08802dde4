"""Commands and links in README and docs: every command line is one that the program understands, every file named is there."""

import re
import shlex
from pathlib import Path

import pytest

from ldm.__main__ import COMMANDS, make_parser
from ldm.app import conditions

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
INLINE = re.compile(rf"`(?:python -m ldm )?((?:{'|'.join(COMMANDS)}) --[^`]+)`")


def lines(text):
    """Of fenced and indented blocks, those that end in a backslash joined, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        found = re.search(r"(?:^|\s)python -m ldm (?!COMMAND)([a-z][^`]*)", line)
        if found and "`" not in line.split("python -m ldm")[0]:
            yield found[1]


def commands(page):
    text = page.read_text()
    return [*lines(text), *(found for found in INLINE.findall(text))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page):
    parser = make_parser()
    for command in commands(page):
        words = shlex.split(command, comments=True)
        words = words[: next((i for i, word in enumerate(words) if word in (";", "&&", "|", "...")), len(words))]
        print(words)

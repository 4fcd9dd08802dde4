"""README and docs: every command is one that the program understands, every config and page that is named is there."""

import re
import shlex
from pathlib import Path

import pytest

from ldm.__main__ import COMMANDS, make_parser
from main import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUOTED = re.compile(rf"`(?:python -m ldm )?((?:{'|'.join(COMMANDS)}) --[^`]+)`")  # in running text
NEEDED = {"--ckpt": "RUN", "--outdir": "out"}  # what running text leaves out


def commands(text, program):
    """Of lines that begin with ``program``: the words behind it."""
    for line in text.replace("\\\n", " ").splitlines():
        found = re.match(rf"\s*(?:\S*=\S+ )*python {re.escape(program)} (?!COMMAND)(.*)", line)
        if found:
            words = shlex.split(re.sub(r"\$\([^)]*\)", "RUN", found[1]), comments=True)
            yield words[: next((i for i, word in enumerate(words) if word in (";", "&&", "|")), len(words))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page):
    parser, text = make_parser(), page.read_text()
    for words in commands(text, "-m ldm"):
        parser.parse_args(words)
    for quoted in QUOTED.findall(text):
        words = shlex.split(re.sub(r" \.\.\.(?= |$)", "", quoted))
        own = {option: value for option, value in NEEDED.items() if option in known(words[0]) and option not in words}
        parser.parse_args([*words, *(word for pair in own.items() for word in pair)])


def known(command):
    import argparse
    from importlib import import_module

    parser = argparse.ArgumentParser()
    import_module(f"ldm.app.{command.replace('-', '_')}").arguments(parser)
    return parser._option_string_actions


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_trainings_are_understood(page):
    for words in commands(page.read_text(), "main.py"):
        for config in parse(words).base:
            assert (ROOT / config).is_file() or not config.startswith("configs/"), config


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]+)?\)", text):
        target = page.parent / link if link else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor[1:] in {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor
    for config in re.findall(r"configs/[a-z0-9_/]+\.yaml", text):
        assert (ROOT / config).is_file(), config

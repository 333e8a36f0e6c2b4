"""The page on the command line has every command and option, and shows what commands print."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from tools.command_line import EXAMPLES, page
from varstore.cli import main


@pytest.fixture(scope="module")
def text():
    here = Path.cwd()
    made = page()
    assert Path.cwd() == here
    return made


def test_every_command_and_option_is_on_the_page(text):
    context = click.Context(main)
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    for name in main.list_commands(context):
        for param in main.get_command(context, name).params:
            for option in param.opts if isinstance(param, click.Option) else ():
                assert option in sections[name], f"{name} {option}"


def test_the_examples_show_what_they_are_for(text):
    assert set(EXAMPLES) <= set(main.list_commands(None))
    for said in ("h.{0..11}.", "best loss", "on disk because of links", "[0:2, :3] [2, 3]"):
        assert said in text
    assert max(map(len, text.splitlines())) <= 132

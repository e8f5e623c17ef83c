"""What the pages say of files, headings, commands and options is there."""

import re
import shlex

import click
import pytest

from conftest import ROOT
from kqprefill.cli.commands import cli

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
PICTURES = sorted(ROOT.glob("docs/*.svg"))


def words(page):
    """A page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """The names that GitHub gives a page's headings: a second one of a name gets -1."""
    found = []
    for heading in re.findall(r"^#+ +(.*?)\s*$", words(page), re.MULTILINE):
        bare = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", bare).replace(" ", "-")
        found.append(name if name not in found else f"{name}-{sum(f.startswith(name) for f in found)}")
    return found


def links(page):
    """Where a page's links and pictures point, code left out."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", words(page)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"[a-z]+:", link):  # the web, which tests leave alone
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}: there is no such heading"


def test_anchors_are_githubs(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b`, c-d?\n```sh\n# no heading\n```\n## Same\n## Same\n## [Link](x) & more\n")
    assert anchors(page) == ["a-b-c-d", "same", "same-1", "link--more"]


def test_the_readme_shows_every_picture():
    assert {ROOT / link for link in links(ROOT / "README.md") if link.endswith(".svg")} == set(PICTURES)


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_pictures_are_small_and_whole(picture):
    text = picture.read_text(encoding="utf-8")
    assert len(text.encode()) < 60_000 and text.rstrip().endswith("</svg>")
    assert not re.search(r"url\((?!#)|@import|<image|<script|\bhref=", text)  # nothing from elsewhere


def test_commands_and_options_of_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    blocks = re.findall(r"^```(?:sh|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    known = {option for command in cli.commands.values() for p in command.params for option in p.opts} | {"--help"}
    seen = 0
    for span in spans + [line for block in blocks for line in block.splitlines()]:
        for call in re.findall(r"kqprefill ([a-z]+\b.*)", span):
            name, *args = shlex.split(re.split(r"&&|\||>", call)[0].replace("…", ""), comments=True)
            command = cli.commands.get(name)
            if command is None and not args:  # "kqprefill synth" is one, "kqprefill is" none
                continue
            assert isinstance(command, click.Command), span
            own = {option for p in command.params for option in p.opts}
            assert name == "lm-eval" or all(arg in own or not re.match("--?[a-z]", arg) for arg in args), span
            seen += 1
        if span.startswith("--"):
            assert re.match(r"--[a-z-]+", span)[0] in known, span
    assert seen >= 15


def test_the_list_of_commands_is_not_cut():
    context = click.Context(cli, info_name="kqprefill", terminal_width=80)
    assert "..." not in cli.get_help(context).partition("Commands:")[2]


def test_headings_stand_alone():
    """A heading right under a table's row is taken for another row by some readers."""
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert not re.search(r"^\|.*\n#", page.read_text(encoding="utf-8"), re.MULTILINE), page

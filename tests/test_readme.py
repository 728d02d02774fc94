"""The README and the guides are true: their snippets and commands run, their links lead somewhere."""

from __future__ import annotations

import asyncio
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import sinks
from events.messages import EVENT_TYPES
from sinks.live.runs import RunsOfFolder
from sinks.live.server import Server, bind
from trainer import peers
from trainer.cli.main import main

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
ROOMS = ("trainer", "trainer/distributed", "events", "sinks")
COMPARED = ROOT / "sinks" / "COMPARED.md"
GUIDES = [ROOT / "trainer" / "COMING_FROM.md", *(ROOT / room / "README.md" for room in ROOMS)]
DOCUMENTS = [README, *GUIDES, COMPARED, ROOT / "CHANGELOG.md", *sorted((ROOT / ".github").glob("*.md"))]
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
SERVES = ("stagecast watch", "stagecast demo")
"""Commands that other tests run: they serve until a signal, or train for a minute."""


class Block(NamedTuple):
    """A fenced block of a guide."""

    language: str
    text: str
    line: int
    """Line of the guide at which the text starts, from 1."""


def blocks_of(document: Path) -> Iterator[Block]:
    text = document.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        yield Block(found[1], found[2], text.count("\n", 0, found.start(2)) + 1)


def run_blocks(document: Path, names: dict[str, Any]) -> None:
    """Run the Python and stagecast blocks of a guide in its order, in this process and in the working directory.

    A block that starts with ``# NAME.py`` or ``# NAME.yaml`` is written to this file first. A Python block among them
    is imported by whoever names it, and runs nowhere else.
    """
    for block in blocks_of(document):
        file = re.match(r"# (\w+\.(?:py|yaml))\n", block.text)
        if file is not None:
            Path(file[1]).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            # Empty lines before it, so that a traceback has the line of the guide.
            exec(compile("\n" * (block.line - 1) + block.text, document, "exec"), names)
        elif block.language == "bash":
            for command in block.text.splitlines():
                if command.startswith("stagecast ") and not command.startswith(SERVES):
                    assert main(shlex.split(command, comments=True)[1:]) == 0, f"{document}: {command}"


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve the runs of a folder, as ``stagecast watch`` does; returns the address."""
    server = Server(RunsOfFolder(folder), bind("127.0.0.1", 0), "127.0.0.1")
    server.start()
    try:
        yield server.url
    finally:
        server.stop()


@pytest.fixture(scope="module")
def readme_names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the README defines: the guides use its module."""
    names: dict[str, Any] = {"__name__": "guide"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        run_blocks(README, names)
    return names


@pytest.mark.timeout(120)
def test_the_snippets_of_the_readme_run(readme_names: dict[str, Any]) -> None:
    """They train, and define the module that the guides use."""
    assert readme_names["result"].status == "finished"


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: str(guide.relative_to(ROOT)))
@pytest.mark.timeout(120)
def test_the_snippets_and_commands_of_a_guide_run(
    guide: Path, readme_names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each guide runs from top to bottom, with the names of the README, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    names = dict(readme_names)
    try:
        run_blocks(guide, names)
    finally:
        for written in tmp_path.glob("*.py"):
            sys.modules.pop(written.stem, None)
    if "follow" in names:  # the client of a served run
        with serving(Path("runs")) as url:
            assert asyncio.run(names["follow"](f"{url}#run=line")).status == "finished"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_the_links_of_a_document_lead_to_files_of_the_repository(document: Path) -> None:
    """Relative links and images exist, and so does the heading that a link names."""
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", document.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings}, target


def test_what_others_have_is_shown_by_tests() -> None:
    """Each row of the comparison names one that exists."""
    rows = re.findall(
        r"^\| [^|]+\|.*\*\*y\*\* \| \[(test_\w+)\]\((\S+)\) \|$", COMPARED.read_text(), flags=re.MULTILINE
    )
    assert len(rows) == COMPARED.read_text().count("**y** |") > 40
    for name, path in rows:
        assert f"def {name}(" in (COMPARED.parent / path).read_text(encoding="utf-8"), name


def test_the_guides_list_every_event_and_every_sink() -> None:
    """A new event or sink needs its place in a table."""
    documented = {name for guide in GUIDES for name in re.findall(r"`(\w+)`", guide.read_text(encoding="utf-8"))}
    assert {event_type.__name__ for event_type in EVENT_TYPES} | set(sinks.__all__) <= documented


def test_the_page_for_other_trainers_agrees_with_the_messages() -> None:
    """Each name of another trainer stands in a row with the replacement that errors and warnings name."""
    names = peers.METHODS | peers.CALLS | peers.ARGUMENTS | peers.TRAINER_ARGUMENTS | peers.TRAIN_ARGUMENTS
    rows: dict[str, list[str]] = {}
    for row in re.findall(r"^\| (.*) \|$", GUIDES[0].read_text(encoding="utf-8"), flags=re.MULTILINE):
        here, *others = row.split(" | ")
        for name in re.findall(r"`(\w+)", " ".join(others)):
            rows.setdefault(name, []).extend(re.findall(r"\w+", here))
    known = names.keys() & rows.keys()
    assert len(known) > 40
    assert [name for name in known if not set(re.findall(r"\w+", names[name])) & set(rows[name])] == []


def test_the_readme_is_read_in_five_minutes() -> None:
    """At most 200 lines; the guides have the rest."""
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_the_changelog_has_each_section_and_each_entry_once() -> None:
    """A merge that keeps both sides of a conflict repeats entries."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("## Unreleased\n")[2]
    assert re.findall(r"^### (\w+)$", text, flags=re.MULTILINE) == ["Added", "Changed", "Fixed", "Security"]
    entries = re.findall(r"^- (.{40})", text, flags=re.MULTILINE)
    assert sorted(set(entries)) == sorted(entries)
    assert len(text.splitlines()) <= 280  # entries are short, and for users


def test_both_commands_name_the_torch_version_in_the_same_call() -> None:
    """Otherwise pip fetches a build with CUDA on a machine without a GPU."""
    installing = [block.text for block in blocks_of(README) if block.language == "bash" and "pip install" in block.text]
    assert len(installing) == 2
    for command in installing:
        assert re.search(r"pip install torch==2\.13\.0 -e ", command)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    """It is marked in the README, and .ci/run takes it from there."""
    assert re.search(r"<!-- tests -->\n```bash\n.*-m pytest\n```", README.read_text(encoding="utf-8"))
    assert "<!-- tests -->" in CI


def test_the_workflow_runs_ci_and_the_commit_hooks_run_its_linters_and_types() -> None:
    """A commit, a pull request and .ci/run find the same mistakes."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert workflow["jobs"]["ci"]["steps"][-1]["run"] == ".ci/run"
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook["entry"].removesuffix(" --fix") for repository in config["repos"] for hook in repository["hooks"]]
    commands = re.findall(r'^"\$environment/bin/(\w+)"( check| format)?', CI, flags=re.MULTILINE)
    assert hooks == ["".join(command) for command in commands]


@pytest.mark.parametrize("form", ["bug", "feature"])
def test_an_issue_form_is_complete(form: str) -> None:
    """GitHub hides a form without a name, a description, or fields with labels."""
    loaded = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= loaded.keys()
    assert all(field["attributes"].get("label") for field in loaded["body"] if field["type"] != "markdown")

"""``stagecast runs``: the table of runs in a terminal, and as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from support.command import COMMAND, Stagecast, environment
from support.training import Net, train

import events
from sinks.format import cells


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three runs of different learning rates, one of them in a folder of its own."""
    for number, lr in enumerate((0.1, 0.01, 0.001)):
        place = f"sweep/run{number}" if number == 2 else f"run{number}"
        options = {"run_id": f"run{number}", "journal": True, "config": {"lr": lr, "seed": 1}}
        assert train(Net(), epochs=2, run_dir=tmp_path / "runs" / place, **options).error is None
    return tmp_path / "runs"


def test_runs_are_printed_as_a_table_json_and_csv(folder: Path, stagecast: Stagecast) -> None:
    """All have the same values, those of the reader in Python."""
    rows = events.runs(folder)
    assert [(row["id"], row["config.lr"], row["status"]) for row in rows] == [
        ("run2", 0.001, "finished"),
        ("run1", 0.01, "finished"),
        ("run0", 0.1, "finished"),
    ]
    frame = events.frame(folder / "run0")
    by_id = {row["id"]: row for row in rows}
    assert by_id["run0"]["best.train_loss"] == min(frame["train_loss"])
    assert by_id["run0"]["last.train_loss"] == frame["train_loss"][-1]
    code, out, err = stagecast("runs", folder, "--json", "--filter", "lr > 0.005", "--sort", "lr")
    assert (code, err) == (0, "")
    assert [row["id"] for row in json.loads(out)] == ["run1", "run0"]
    columns = "name,lr,best.train_loss,folder"
    code, out, err = stagecast("runs", folder, "--csv", "--columns", columns, "--sort=-lr", "--reverse")
    table = list(csv.reader(io.StringIO(out)))
    assert table[0] == ["name", "config.lr", "best.train_loss", "folder"]
    assert [row[0] for row in table[1:]] == ["run2", "run1", "run0"]
    assert (table[1][1], table[1][3]) == ("0.001", "sweep/run2")
    assert float(table[3][2]) == by_id["run0"]["best.train_loss"]
    assert "best.train_loss" in stagecast("runs", folder, "--columns", "help").out.split()


def test_a_report_in_markdown_compares_runs(folder: Path, stagecast: Stagecast, tmp_path: Path) -> None:
    """Read by a parser of Markdown: the best value is bold, and text of a run makes no markup."""
    hostile = "a | b *wide* <b> [x](http://x) _y_ `z` val_loss"
    assert train(Net(), epochs=4, run_dir=folder / "longer", run_id="longer", journal=True).error is None
    note = f"# no heading\n- no item\n1. no number\n{hostile}"
    (folder / "run1" / "notes.json").write_text(json.dumps({"name": hostile, "note": note, "tags": ["2. best"]}))
    code, out, err = stagecast("report", folder, folder / "run0", "--markdown")
    assert (code, err) == (0, "")
    tokens = MarkdownIt("commonmark").enable("table").parse(out)
    headings = [tokens[at + 1].content for at, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[:2] == ["4 runs", "What differs"]
    assert len(headings) == 6, "each run once"
    inline = [token for token in tokens if token.type == "inline"]
    texts = ["".join(part.content for part in token.children or ()) for token in inline]
    assert texts.count(hostile) == 3, "in both tables, and as a heading"
    assert "# no heading- no item1. no number" + hostile in texts, "one paragraph"
    assert "tags: 2. best" in texts
    assert any(re.fullmatch(r"commit: [0-9a-f]{40}( with changes)?", text) for text in texts)
    rows = out[out.index("| run |") : out.index("##")].strip().split("\n")
    assert rows[0].startswith("| run | status | step | duration | best val_loss |")
    best = [row["best.val_loss"] for row in events.runs(folder)]
    bold = ["**" in row.split(" | ")[-3] for row in rows[2:]]
    assert bold == [value == min(best) for value in best]
    assert 0 < sum(bold) < len(bold)
    differing = out[out.index("| hyperparameter") :].split("\n")
    assert "| lr |  | 0.0010 | 0.0100 | 0.1000 |" in differing

    file = tmp_path / "runs.md"
    assert stagecast("report", folder / "run0", "--markdown", "--out", file) == (0, f"{file}\n", "")
    assert file.read_text().startswith("# run0\n"), "one run has no table of what differs"
    assert "What differs" not in file.read_text()
    code, out, err = stagecast("report", folder / "run0", "--markdown", "--out", file)
    assert (code, out) == (1, "")
    assert "runs.md exists; use another name, or --force" in err
    shutil.copytree(folder / "run0", tmp_path / "copy")
    titles = re.findall("^## (.*)", stagecast("report", folder / "run0", tmp_path / "copy", "--markdown").out, re.M)
    assert titles == ["run0", "run0 (copy)"], "two runs of one name"
    code, out, err = stagecast("report", tmp_path / "none", "--markdown")
    assert (code, out) == (1, "")
    assert "is not a folder; name a run folder, or a folder of run folders" in err


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_the_table_fits_the_terminal(
    folder: Path, stagecast: Stagecast, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """What has no room is left out from the end; columns that were asked for are named then."""
    monkeypatch.setenv("COLUMNS", str(width))
    head, *lines = stagecast("runs", folder, "--sort", "lr").out.splitlines()
    assert [line.split()[0] for line in lines] == ["run2", "run1", "run0"]
    assert head.split()[:2] == ["name", "status"]
    assert max(cells(line) for line in [head, *lines]) <= width
    assert ("config.lr" in head, "config.seed" in head) == (width >= 60, False)
    code, out, err = stagecast("runs", folder, "--columns", "name,command,best.train_loss,last.train_loss,host,folder")
    assert max(map(cells, out.splitlines())) <= width
    assert ("no room" in err, code) == (width < 80, 0)
    assert train(Net(), run_dir=folder / "named-by-its-folder-lr-0.1", journal=True).error is None
    line = stagecast("runs", folder).out.splitlines()[1]
    assert line.split()[0].endswith("lr-0.1")  # nobody named it; a long name is cut in the middle
    assert ("…" in line) == (width < 200)


def test_a_shell_completes_columns(folder: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "completions", f"stagecast runs {folder} --columns name,best.tr"
    shell = {"COMP_LINE": words, "COMP_POINT": str(len(words)), "_ARGCOMPLETE_STDOUT_FILENAME": str(out)}
    done = subprocess.run(COMMAND, env=environment(_ARGCOMPLETE="1", **shell), timeout=50)
    assert done.returncode == 0
    assert out.read_text().split("\v") == ["name,best.train_loss", "name,best.train_epoch_loss"]


def test_what_cannot_be_shown_is_explained(folder: Path, stagecast: Stagecast) -> None:
    for words, code, says in [
        (["--sort", "los"], 2, "'los' is not a column of these runs"),
        (["--filter", "lrr > 1"], 2, "'lrr' is not a column of these runs; did you mean lr?"),
        (["--columns", "name,config.lrs"], 2, "did you mean config.lr?"),
        (["--filter", "lr > 1"], 0, "no runs in "),
    ]:
        ended = stagecast("runs", folder, *words)
        assert (ended.code, ended.out, says in ended.err) == (code, "", True), ended.err
    assert stagecast("runs", folder, "--filter", "lr > 1", "--json").out == "[]\n"
    ended = stagecast("runs", folder / "gone")
    assert (ended.code, "is not a folder; name a run folder" in ended.err) == (1, True)

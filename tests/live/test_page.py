"""The page in a real browser, with a made-up server that can be in any state."""

from __future__ import annotations

import csv
import gzip
import json
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("playwright.sync_api")
from live.page_server import PAGE
from live.page_show import Show, a_run, choose, curve, expect_step, first_chart
from live.page_visits import EVIL, axe
from playwright.sync_api import Page, expect

# ---------------------------------------------------------------------------------------------- unhappy paths


def test_a_silent_server_makes_the_page_stale(show: Show) -> None:
    """After five seconds without a frame there is a banner, the figures are grey, and commands are disabled."""
    page = show(a_run())
    expect(page.locator("#banner")).to_be_hidden()
    show.server.is_silent = True
    expect(page.locator("#banner")).to_be_visible(timeout=9_000)
    expect(page.locator("#banner")).to_contain_text("this data is old")
    expect(page.locator("body")).to_have_class(re.compile("stale"))
    expect(page.locator("#pause")).to_be_disabled()
    expect(page).to_have_title(re.compile("^⚠"))
    show.server.is_silent = False
    expect(page.locator("#banner")).to_be_hidden()
    expect(page.locator("#pause")).to_be_enabled()


def test_a_closed_connection_is_resumed_at_its_cursor(show: Show) -> None:
    """The page reports the loss at once, reconnects, and requests only what it has missed."""
    run = a_run()
    page = show(run)
    page.evaluate(
        "() => { const banner = document.getElementById('banner'); new MutationObserver(() => {"
        " if (!banner.hidden) document.body.dataset.wasStale = 'yes'; }).observe(banner, {attributes: true}); }"
    )
    show.server.call(lambda: show.server.close_all(1011))
    expect(page.locator("body")).to_have_attribute("data-was-stale", "yes")
    expect(page.locator("#banner")).to_be_hidden()
    assert run.hellos[-1] | {"since": run.cursor, "attempt": 1} == run.hellos[-1]
    show.server.train(run, 7)
    expect_step(page, "607")


def test_a_snapshot_of_another_attempt_replaces_everything(show: Show) -> None:
    run = a_run()
    page = show(run)
    fresh = a_run("demo", 250)
    fresh.attempt = fresh.run["attempt"] = 2
    show.server.call(lambda: run.send(json.dumps(fresh.snapshot())))
    expect(page.locator("#tiles")).to_contain_text("attempt 2")
    expect_step(page, "250")


def test_a_snapshot_is_requested_when_none_follows_a_gap(show: Show) -> None:
    run = a_run()
    page = show(run)
    run.run["global_step"] = 601  # known from a snapshot alone
    show.server.call(lambda: run.send('{"type": "gap", "lost": 3}'))
    expect_step(page, "601")


@pytest.mark.parametrize("websockets", [True, False])
def test_an_unknown_run_is_reported_and_opened_once_it_exists(websockets: bool, show: Show) -> None:
    """In the header too, with the runs that exist."""
    show.visits.may_lose_server = True
    page = show(a_run(), fragment="#run=nobody", options={"loaded": False}, websockets=websockets)
    expect(page.locator("#waiting")).to_contain_text("this server has no such run; it has demo")
    expect(page.locator("#status")).to_contain_text("no such run")
    expect(page.get_by_role("link", name="demo")).to_be_visible()
    late = a_run("nobody")
    show.server.call(lambda: show.server.runs.update(nobody=late))
    page.evaluate("stagecast.look()")
    expect(page.locator("#status")).to_contain_text("running")


def test_a_run_that_is_removed_while_it_is_watched_stays_visible_as_old(show: Show) -> None:
    """Even though frames still come."""
    page = show(a_run("here"), a_run("gone"), fragment="#run=gone")
    show.server.call(lambda: show.server.runs.pop("gone"))
    page.evaluate("stagecast.look().then(() => stagecast.look())")
    expect(page.locator("#status")).to_contain_text("no such run")
    expect(page.locator("#banner")).to_contain_text("The run gone does not exist any more: this data is old")
    expect(page.locator("#banner")).to_contain_text("it has here")
    expect(page.locator("#tiles")).to_be_visible()


def test_one_missing_run_does_not_hide_the_others(show: Show) -> None:
    page = show(a_run("a"), a_run("b"), fragment="#run=nobody&run=a&run=b")
    expect(page.locator("#run-name")).to_have_text("a")
    expect(page.locator("#compared li").first).to_contain_text("no such run")
    loss = "[...stagecast.board.charts].find(chart => chart.title === 'Loss')"
    page.wait_for_function(f"() => {loss}.shown.some(({{ label }}) => label === 'b · train')")


def test_without_runs_the_page_waits_for_one(show: Show) -> None:
    page = show(options={"loaded": False})
    expect(page.locator("#waiting")).to_contain_text("No runs yet")
    run = a_run()
    show.server.call(lambda: show.server.runs.update(demo=run))
    expect(page.locator("#run-name")).to_have_text("demo")


def test_a_run_without_a_step_shows_empty_charts(show: Show) -> None:
    run = a_run(steps=0)
    page = show(run)
    expect(first_chart(page)).to_contain_text("Nothing yet")
    show.server.train(run, 60)
    expect(page.locator("#training canvas").first).to_be_visible()


def test_numbers_that_are_not_finite_are_shown_by_name(show: Show) -> None:
    """In a snapshot and in frames."""
    run = a_run(steps=40)
    run.point({}, "train_loss", "nan")
    page = show(run, fragment="#log=1&smooth=0.5")
    expect(page.locator("#tiles")).to_contain_text("NaN")
    show.server.call(lambda: run.tell({"points": {"train_loss": [[41, 42], ["-inf", "inf"]]}}))
    expect(page.locator("#tiles")).to_contain_text("∞")


def test_a_users_name_that_begins_like_the_ledgers_is_a_metric(show: Show) -> None:
    page = show(a_run(extra=["ledger/foo"]))
    expect(page.locator("#metrics h3")).to_have_text(["ledger/foo"])
    expect(page.locator("#ledger-table")).to_contain_text("compute")


def test_epochs_are_counted_from_1_as_in_the_log(show: Show) -> None:
    """The last of three is 3 of 3, while it lasts and afterwards."""
    cases = {"last": (2, 3, "3of 3"), "endless": (4, None, "5"), "after": (3, 3, "3of 3"), "one": (0, 1, "1of 1")}
    runs = [a_run(name, 50) for name in cases]
    for run, (epoch, epochs, _) in zip(runs, cases.values(), strict=True):
        run.run |= {"epoch": epoch, "epochs": epochs, "status": "finished"}
    page = show(*runs, fragment="#run=last")
    for name, (_, _, text) in cases.items():
        show.focus(page, name)
        expect(page.locator("#tiles > div").nth(1)).to_have_text(f"Epoch{text}")


@pytest.mark.parametrize("fragment", ["", "#log=1"])
def test_numbers_near_the_largest_are_drawn(fragment: str, show: Show) -> None:
    """Differences beyond the largest number, too; and once points are merged."""
    huge = [-1.7e308 if index % 2 else 1.7e308 for index in range(10_000)]
    run = curve([1.7e308 if index % 2 else 1.0 for index in range(300)])
    curve(huge[:300], run, "huge_loss")
    page = show(run, fragment=fragment)
    page.locator("#metrics").scroll_into_view_if_needed()
    for part in ("#training", "#metrics"):
        chart = page.locator(f"{part} .chart").first
        chart.scroll_into_view_if_needed()
        expect(chart.locator("canvas")).to_be_visible()
        places = chart.evaluate(
            "one => { const { u, height } = one.chart; const ys = u.data[u.data.length - 1];"
            " return [0, 1].map(index => u.valToPos(ys[index], 'y') / height); }"
        )
        assert all(0 <= place <= 1 for place in places), places
        assert abs(places[0] - places[1]) > 0.5
    show.server.call(lambda: run.tell({"points": {"huge_loss": [list(range(301, 10_301)), huge]}}))
    page.wait_for_function("() => stagecast.focus().store.get('huge_loss').count === 10300")
    assert page.evaluate("stagecast.focus().store.get('huge_loss').mean.every(Number.isFinite)")


def test_values_that_a_logarithmic_scale_hides_are_counted(show: Show) -> None:
    """In words that are read aloud too; not on the other scale, and not in the table."""
    page = show(curve([1.0, 0.0, -1.0, 2.0, "nan"]), fragment="#log=1")
    chart = first_chart(page)
    text = "Not shown on a logarithmic scale (0 or less): train 2 of 5 values."
    expect(chart.locator(".missing")).to_have_text(text)
    expect(chart.get_by_role("img")).to_have_attribute("aria-label", re.compile(re.escape(text)))
    choose(page, "Loss", "Show as table")
    expect(chart.locator(".missing")).to_be_hidden()
    choose(page, "Loss", "Show as table")
    expect(chart.locator(".missing")).to_be_visible()
    page.get_by_label("Log loss").uncheck()
    expect(chart.locator(".missing")).to_be_hidden()
    expect(chart.get_by_role("img")).not_to_have_attribute("aria-label", re.compile("logarithmic"))


def test_a_logarithmic_scale_has_round_labels_however_large_its_range(show: Show) -> None:
    cases: dict[str, tuple[list[float], list[str]]] = {
        "wide": ([1e-14, 5.0], ["1e-12", "1e-9", "1e-6", "0.001", "1"]),
        "usual": ([0.03, 0.8], ["0.05", "0.1", "0.2", "0.5"]),
        "narrow": ([0.51, 0.58], ["0.5", "0.6"]),
        "widest": ([5e-324, 1.7e308], ["1e-222", "1e-116", "1e-10", "1e96", "1e202", "1e308"]),
    }
    page = show(*(curve(values, a_run(name, 0)) for name, (values, _) in cases.items()), fragment="#log=1")
    for name, (_, labels) in cases.items():
        show.focus(page, name, "&log=1")
        expect(first_chart(page).locator("canvas")).to_be_visible()
        page.wait_for_function(
            "labels => String(document.querySelector('#training .chart').chart.u.axes[1]._values) === labels",
            arg=",".join(labels),
        )


def test_on_paper_all_charts_are_drawn(show: Show) -> None:
    """Those that are out of sight are released afterwards."""
    page = show(a_run(extra=[f"metric{number}" for number in range(12)]))
    charts = page.locator("figure.chart:visible")
    expect(charts.first.locator("canvas")).to_be_visible()
    drawn = charts.locator("canvas")
    before, every = drawn.count(), charts.count()
    assert before < every
    page.evaluate(
        "addEventListener('beforeprint', () => { window.onPaper = document.querySelectorAll('canvas').length })"
    )
    page.pdf()
    assert page.evaluate("window.onPaper") >= every
    assert drawn.count() < every


@pytest.mark.parametrize("width", [390, 1600])
def test_paper_has_complete_axes_and_all_runs(width: int, show: Show) -> None:
    """However wide the window is: on A4 each chart ends within its frame, in dark ink, and the runs are named."""
    runs = [a_run(f"run-{index}", seed=index, extra=["m"]) for index in range(3)]
    options = {"viewport": {"width": width, "height": 2_000}, "color_scheme": "dark"}  # upright, as the paper
    page = show(*runs, fragment="#run=run-0&run=run-1&run=run-2", options=options)
    expect(page.locator("#training canvas").first).to_be_visible()
    page.emulate_media(media="print")
    expect(page.locator("html")).to_have_class("printing")
    charts = page.evaluate(
        "() => [...document.querySelectorAll('figure.chart')].filter(one => one.checkVisibility()).map(one =>"
        " [one.querySelector('canvas').getBoundingClientRect().right, one.getBoundingClientRect().right])"
    )
    assert len(charts) > 8
    for drawn, frame in charts:
        assert drawn <= frame <= 186 / 25.4 * 96 + 1
    assert page.evaluate("document.documentElement.scrollWidth") <= max(width, 704)
    expect(page.locator("h1 ~ .on-paper")).to_have_text("and run-1, run-2")
    expect(page.locator("#compared li")).to_have_count(3)
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 33, 41)"
    expect(page.locator("#runs")).to_be_hidden()
    page.emulate_media(media="screen")
    expect(page.locator("html")).not_to_have_class("printing")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(228, 232, 238)"


def value_range(page: Page, title: str) -> tuple[float, float]:
    """The limits of a chart's scale."""
    chart = page.locator("figure.chart").filter(has=page.locator("h3").get_by_text(title, exact=True))
    chart.scroll_into_view_if_needed()
    expect(chart.locator("canvas")).to_be_visible()
    low, high = chart.evaluate("one => { const { y } = one.chart.u.scales; return [y.min, y.max]; }")
    return low, high


def explosion(length: int, factor: float = 30.0) -> list[float | str]:
    """Falls for a while, then grows by a factor until it is not finite."""
    falls: list[float | str] = [2.3 - 0.01 * at for at in range(length)]
    grows: list[float | str] = [2.3 * factor**at for at in range(1, 100) if 2.3 * factor**at < 3.4e38]
    return [*falls, *grows, "inf", "nan", "nan"]


def test_the_scale_follows_the_values_that_matter(show: Show) -> None:
    """Values of a run that diverges, and single ones far from all others, are marked and counted instead."""
    cases: list[tuple[list[float | str], float, float, str]] = [
        (explosion(30), 1.9, 2.5, "Beyond the scale: train 25 of 58 values, up to 1.95e37 at step 55."),
        (explosion(1, factor=100.0), 0.0, 3_000.0, "Not finite (✕): train 3 of 23 values, ∞ at step 21."),
        ([1.0, 2.0, "inf", 3.0], 0.5, 3.5, "Not finite (✕): train 1 of 4 values, ∞ at step 3."),
        ([2.0, 1.0] * 20 + [3.4028235e38], 0.5, 2.5, "Beyond the scale: train 1 of 41 values"),
        ([2.0, 1.0] * 20 + [-1e38, 1.5], 0.5, 2.5, "down to -1e38 at step 41."),
        ([1.0, 1.7e308], 0.5, 1.5, "Beyond the scale: train 1 of 2 values, up to 1.7e308 at step 2."),
        (["nan", "nan"], 0.0, 1.0, "Not finite (✕): train 2 of 2 values, NaN at step 1."),
    ]
    page = show(*(curve(values, a_run(f"case-{number}", 0)) for number, (values, *_) in enumerate(cases)))
    for number, (_, low, high, text) in enumerate(cases):
        for settings in ("", "&smooth=0.9&x=time"):
            show.focus(page, f"case-{number}", settings)
            expect(page.get_by_label("Across")).to_have_value("time" if settings else "step")
            expect(first_chart(page).locator(".notes")).to_contain_text(text)
            least, most = value_range(page, "Loss")
            assert low <= least < most <= high, text
        expect(first_chart(page).get_by_role("img")).to_have_attribute("aria-label", re.compile(re.escape(text)))


def test_a_healthy_series_is_not_cut_off(show: Show) -> None:
    """Nothing is beyond its scale."""
    cases = {
        "one": [5.0],
        "rare": [0.0] * 90 + [1.0] * 10,  # seldom another value: that one is worth seeing
        "counts": [32.0 * at for at in range(1, 2_000)],
        "warm-up": [10.0**-at for at in range(9, -1, -1)],
        "late": [0.001] * 300 + [0.4] * 3,
    }
    run = a_run(steps=0)
    for name, values in cases.items():
        curve(values, run, name)
    page = show(run)
    for name, values in cases.items():
        assert value_range(page, name)[1] >= max(values), name
    for notes in page.locator("#metrics .notes").all():
        expect(notes).to_be_hidden()


def test_a_diverged_run_does_not_flatten_those_beside_it(show: Show) -> None:
    """Nor does one that stays at huge values, without a NaN."""
    series = {"good": [2.0, 1.0] * 40, "nan": explosion(30), "high": [3.4e38] * 80}
    runs = [curve(values, a_run(name, 0)) for name, values in series.items()]
    page = show(*runs, fragment="#run=good&run=nan&run=high")
    assert value_range(page, "Loss")[1] < 3
    expect(page.locator("#training .notes").first).to_contain_text("high 80 of 80 values, up to 3.4e38")


def test_running_for_stops_when_the_run_does(show: Show) -> None:
    """At the end, or at the last sign of life; in the list too, after a reload, and whatever clock the page has."""
    ended, lost, training = a_run("ended", 10), a_run("lost", 10), a_run("training", 10)
    for run, status in ((ended, "finished"), (lost, "lost")):
        run.run |= {"status": status, "started": 1e9, "updated": 1e9 + 90}
    ended.run |= {"ended": 1e9 + 61, "updated": 1e9 + 5_000}
    page = show(ended, lost, training, fragment="#run=ended")
    page.add_init_script("const now = Date.now; Date.now = () => now() + 7 * 86400e3")
    for run_id, text in (("ended", "1m 01s"), ("lost", "1m 30s"), ("training", "1h 00m")):
        # A page that is still connecting would log that its connection is cut off.
        page.wait_for_function("() => stagecast.focus()?.store.frameTime > 0")
        show.focus(page, run_id)
        page.wait_for_function("() => stagecast.focus()?.store.frameTime > 0")
        page.reload()
        page.wait_for_function("() => stagecast.focus()?.store.frameTime > 0")
        first = page.evaluate("stagecast.focus().store.frameTime")
        page.wait_for_function("first => stagecast.focus().store.frameTime > first + 0.9", arg=first)
        page.evaluate("stagecast.writeNow()")
        expect(page.locator("#tiles > div").filter(has_text="Running for")).to_contain_text(text)
        expect(page.locator("#runs-list li").filter(has_text=run_id)).to_contain_text(text)


def test_a_run_without_epochs_shows_its_progress_by_steps(show: Show) -> None:
    run = a_run()
    run.run |= {"epochs": None, "max_steps": 1_200}
    page = show(run)
    expect(page.locator("#progress-text")).to_have_text(re.compile("^50.0 %, about .* left$"))
    expect(page.locator("#tiles > div").first).to_have_text("Step600of 1,200")


def test_problems_are_shown_wherever_the_run_is(show: Show) -> None:
    """In the header, the list and the comparison; foreign text stays text; solved problems disappear."""
    run, other = a_run("sick"), a_run("well")
    run.run |= {"status": "finished", "problems": [EVIL, "csv is disabled"]}
    page = show(run, other, fragment="#run=sick&run=well")
    for part in ("#status", "#runs-list li:has-text('sick')", "#compared li:has-text('sick')"):
        expect(page.locator(part)).to_contain_text("▲ finished, 2 problems")
    expect(page.locator("#runs-list li").filter(has_text="well")).to_contain_text("● running ·")
    expect(page.locator("#problems li")).to_have_text([EVIL, "csv is disabled"])
    expect(page).to_have_title(re.compile("^finished, 2 problems"))
    assert axe(page) == []
    show.server.call(lambda: run.tell({"run": {"problems": []}}))
    expect(page.locator("#problems-section")).to_be_hidden()
    expect(page.locator("#status")).to_have_text(re.compile("✓ +finished$"))


def test_a_run_with_wrong_data_breaks_only_itself(show: Show) -> None:
    """Beside a compared run, too: that one is drawn completely, and a notice names the broken one."""
    good, bad, worse = a_run("good"), a_run("bad"), a_run("worse", extra=["system/constructor", "val_constructor"])
    bad.run |= {"status": "constructor", "problems": [{}], "latest": None, "updated": "x"}
    del bad.log[0]["text"], bad.series["train_loss"]["mean"]
    worse.run |= {"status": "__proto__", "problems": {"length": 1}}
    worse.log[0] |= {"text": None, "level": "toString"}
    for one in worse.observers.values():
        one["state"] = "constructor"
    worse.checkpoints["x"] = {"name": "x", "state": "valueOf", "upload": {"state": "constructor"}, "reasons": 5}
    page = show(good, bad, worse, fragment="#run=good&run=bad&run=worse")
    expect(page.locator("#log-lines li")).to_have_count(len(good.log))
    expect(page.locator("#runs-list li").filter(has_text="good")).to_contain_text("● running")
    expect(page.locator("#compared li").filter(has_text="good")).to_contain_text("● running")
    expect(page.locator("#observers")).to_contain_text("wandb")
    expect(page.locator("#training canvas").first).to_be_visible()
    show.server.train(good, 7)
    expect_step(page, "607")
    for name in ("worse", "bad"):
        page.goto(f"{show.server.url}#run={name}&run=good")
        expect(page.locator("#banner-text")).to_have_text(f"A part of {name} cannot be shown")
    assert page.locator("text=native code").count() == 0
    assert {problem.partition(":")[0] for problem in show.visits.problems} <= {"TypeError", "Error"}
    show.visits.problems.clear()


def test_a_line_of_the_log_has_the_word_of_its_level_once(show: Show) -> None:
    run = a_run(steps=0)
    for text, level in (("warning: full", "warning"), ("full", "warning"), ("failed at step 3", "error")):
        run.line("X", text, level)
    page = show(run)
    expect(page.locator("#log-lines .text")).to_have_text(["warning: full", "warning: full", "error: failed at step 3"])


def test_the_traceback_of_a_failed_run_can_be_read_and_copied(show: Show) -> None:
    """Folded, as text, with the phase; and beside its line in the log, as that of a warning."""
    run = a_run()
    run.run |= {"status": "failed", "problems": [f"the run failed in val_step after step 600: {EVIL}"]}
    for kind, level in (("WarningLogged", "warning"), ("RunEnded", "error")):
        run.line(kind, kind, level)
        run.log[-1]["detail"] = f"Traceback of {kind}\n  {EVIL}"
    page = show(run)
    expect(page.locator("#status")).to_have_text(re.compile("✕ +failed$"))
    expect(page.locator("#problems")).to_contain_text("failed in val_step after step 600")
    shown = page.locator("#problems pre")
    expect(shown).to_be_hidden()
    page.locator("#problems summary").click()
    expect(shown).to_have_text(f"Traceback of RunEnded\n  {EVIL}")
    page.evaluate("document.addEventListener('copy', () => { window.copied = String(getSelection()); })")
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.get_by_role("button", name="Copy: Traceback of demo").click()
    expect(page.locator("#toast")).to_have_text("Copied")
    assert page.evaluate("window.copied") == f"Traceback of RunEnded\n  {EVIL}"
    expect(page.locator("#log-lines .traceback pre").first).to_have_text(f"Traceback of WarningLogged\n  {EVIL}")
    assert axe(page) == []


def test_the_state_of_each_checkpoint_is_shown(show: Show) -> None:
    """Here and in the store; in a lost run nothing is in progress any more."""
    rows = [
        ("durable", "uploaded", "● durable", "✓ uploaded"),
        ("deleted", "uploaded", "○ deleted here", "✓ still in the store"),
        ("deleted", "deleted", "○ deleted here", "○ deleted there too"),
        ("durable", "deleted", "● durable", "○ deleted there"),
        ("deleted", None, "○ deleted", "\N{EN DASH}"),
    ]
    run, lost = a_run(), a_run("lost")
    template = run.checkpoints.pop("step-00000500")
    run.checkpoints.clear()
    for step, (state, upload, *_) in zip(range(5, 0, -1), rows, strict=True):
        named = {"name": f"step-{step}", "global_step": step, "state": state, "error": None}
        there = {"done_bytes": 1, "total_bytes": 1, "state": upload} if upload else None
        run.checkpoints[f"step-{step}"] = template | named | {"upload": there}
    lost.run["status"] = "lost"
    lost.checkpoints["step-00000500"] |= {"state": "staged", "upload": {"done_bytes": 1, "state": "uploading"}}
    page = show(run, lost, fragment="#run=demo")
    cells = [page.locator(f"#checkpoints tbody td:nth-child({column})").all_inner_texts() for column in (4, 5)]
    shown = [tuple(" ".join(text.split()) for text in row) for row in zip(*cells, strict=True)]
    assert shown == [tuple(words) for _, _, *words in rows]
    show.focus(page, "lost")
    expect(page.locator("#checkpoints tbody tr").last).to_contain_text("never durable")
    expect(page.locator("#checkpoints tbody tr").last).to_contain_text("unfinished")


def test_each_run_has_a_star_at_its_own_best(show: Show) -> None:
    """By its own metric and mode: its checkpoint, and its value; the best of all runs has a word."""
    runs = [a_run(name, steps=0) for name in ("least", "greatest")]
    for run, mode in zip(runs, ("min", "max"), strict=True):
        run.run |= {"best": "val_thing", "best_mode": mode}
        for step, value in ((1, 0.5), (2, 0.9), (3, 0.7)):
            run.run["global_step"] = step
            run.point({}, "val_thing", value)
            run.point({}, "val_loss", value + (mode == "max"))
            run.save({"checkpoints": [], "log": []})
            list(run.checkpoints.values())[-1]["metric"] = value
    page = show(*runs, fragment="#run=least&run=greatest")
    expect(page.locator("#validation-table tbody tr")).to_have_count(4)
    rows = {
        tuple(cells[:3:2]): [cell for cell in cells if "★" in cell]
        for cells in (row.split("\t") for row in page.locator("#validation-table tbody tr").all_inner_texts())
    }
    assert rows == {
        ("val_loss", "least"): ["best of 2 ★ 0.5"],
        ("val_loss", "greatest"): ["★ 1.5"],
        ("val_thing", "least"): ["★ 0.5"],
        ("val_thing", "greatest"): ["★ 0.9"],
    }
    expect(page.locator("#checkpoints tr:has-text('★')")).to_contain_text("step-00000001")
    page.get_by_role("button", name="Show the tables of greatest").click()
    expect(page.locator("#checkpoints tr:has-text('★')")).to_contain_text("step-00000002")


def test_foreign_text_is_shown_as_text_in_every_place(show: Show) -> None:
    names = [EVIL, f"val_{EVIL}", '"><img src=x onerror=alert(1)>', "__proto__", "ü/µ " * 60]
    run = a_run(EVIL.replace("/", "\\"), extra=names)
    run.run |= {"module": EVIL, "device": EVIL, "host": EVIL}
    for name in list(run.observers):
        run.observers[name] |= {"name": EVIL + name, "error": EVIL}
    for one in run.checkpoints.values():
        one |= {"name": EVIL + one["name"], "reasons": [EVIL], "error": EVIL}
    run.media[-1] |= {"name": EVIL, "text": EVIL}
    run.ranks[0] |= {"host": EVIL, "phase": EVIL}
    run.histograms[EVIL] = run.histograms["weights/head"]
    run.line("X", EVIL, "error")
    page = show(run)
    expect(page.locator("#metrics h3").get_by_text(EVIL, exact=True)).to_be_visible()
    for part in ("#place", "#observers", "#ranks", "#checkpoints", "#media", "#histograms", "#log-lines"):
        expect(page.locator(part)).to_contain_text(EVIL)
    expect(page.locator("#validation-table")).to_contain_text("val_<script>alert(1)<")  # a slash begins a key
    show.server.call(lambda: run.tell({"log": [run.line("X", f"{EVIL} again")], "points": {f"{EVIL}2": [[1], [1.0]]}}))
    expect(page.locator("#log-lines")).to_contain_text(f"{EVIL} again")
    assert page.locator("main script, main img[src=x]").count() == 0


def test_the_page_asks_for_a_token_and_keeps_it_out_of_addresses(show: Show) -> None:
    """It asks again after a wrong one; the right one opens the run, with its images."""
    show.visits.may_lose_server = True  # the browser reports a 401 as an error
    page = show(a_run(), options={"loaded": False}, token="s3cret")
    for guess in ("wrong", "s3cret"):
        expect(page.locator("#token-dialog")).to_be_visible()
        page.fill("#token-input", guess)
        page.keyboard.press("Enter")
        expect(page.locator("#token-dialog")).to_be_hidden() if guess == "s3cret" else page.wait_for_timeout(0)
    expect(page.locator("#content")).to_be_visible()
    page.locator("#media").scroll_into_view_if_needed()
    expect(page.locator("#media img")).to_have_attribute("src", re.compile("^data:image/png"))
    assert "s3cret" not in page.url
    assert not any("s3cret" in url for url in show.server.requests)


def test_server_sent_events_replace_blocked_websockets(show: Show) -> None:
    """Frames come, and commands are sent."""
    show.visits.may_lose_server = True
    run = a_run()
    page = show(run, websockets=False)
    show.server.train(run, 3)
    expect_step(page, "603")
    page.click("#checkpoint")
    expect(page.locator("#toast")).to_contain_text("takes effect at the next step")
    assert [command["command"] for command in run.commands] == ["checkpoint"]


def test_a_refused_command_shows_the_reason(show: Show) -> None:
    page = show(a_run())
    show.server.is_refusing = True
    page.click("#pause")
    expect(page.locator("#toast")).to_contain_text("the run is not under way")
    expect(page.locator("#pause")).to_be_enabled()


# --------------------------------------------------------------------------------------------------- the page


def test_the_page_fills_while_frames_come(show: Show) -> None:
    """Figures, curves, tables, log and title follow the run."""
    run = a_run(extra=["my/metric"])
    page = show(run)
    expect(page.locator("#training canvas").first).to_be_visible()
    show.server.train(run, 900)
    expect_step(page, "1,500")
    expect(page).to_have_title(re.compile(r"^running, step 1,500 · demo"))
    for part, text in (
        ("#checkpoints", "step-00001500"),
        ("#log-lines", "epoch 1 of 20"),
        ("#validation-table", "hard set"),
        ("#ledger-table", "compute"),
        ("#observers", "ConnectionError"),
        ("#ranks tr:has-text('node-1'):has-text('93 ms')", "▲holds up the others"),
        ("#ranks-metrics", "show rank 0's part of each batch. Means over all ranks lately: accuracy 0.65"),
    ):
        expect(page.locator(part)).to_contain_text(text)
    expect(page.locator("#system h3").get_by_text("GPU use")).to_be_visible()
    assert page.evaluate("stagecast.focus().store.get('train_loss').count") == 1_500

    def end() -> None:
        run.run |= {"status": "finished", "commands": False}
        run.tell({"run": {"status": "finished"}})

    show.server.call(end)
    expect(page.locator("#status")).to_contain_text("finished")
    expect(page.locator("#announcer")).to_have_text("The run is finished")
    expect(page.locator("#commands")).to_be_hidden()


def test_the_slowest_of_many_ranks_are_shown_and_another_attempt_has_its_own(show: Show) -> None:
    run = a_run()
    first = run.ranks[0]
    run.ranks = [first | {"rank": rank, "before_exchange_s": 0.02 + 0.0001 * rank} for rank in range(40)]
    page = show(run)
    rows = page.locator("#ranks tbody tr")
    expect(rows).to_have_count(32)
    expect(rows.first).to_contain_text("slowest")
    expect(page.locator("#ranks-count")).to_have_text("the slowest 32 of 40")
    show.server.call(lambda: run.tell({"run": {"attempt": 2}, "ranks": [first]}))
    expect(rows).to_have_count(1)
    expect(rows.first).not_to_contain_text("slowest")
    show.server.call(lambda: run.tell({"run": {"attempt": 3}}))
    expect(page.locator("#ranks-section")).to_be_hidden()


def test_commands_are_sent_and_a_stop_needs_confirmation(show: Show) -> None:
    run = a_run()
    page = show(run)
    page.click("#pause")
    expect(page.locator("#status")).to_contain_text("paused")
    page.get_by_role("button", name="Resume").click()
    expect(page.locator("#status")).to_contain_text("running")
    page.click("#stop")
    page.get_by_role("button", name="Keep training").click()
    page.click("#stop")
    page.get_by_label("Take a checkpoint first").uncheck()
    page.get_by_label(re.compile("Reason")).fill("diverged")
    page.get_by_role("button", name="Stop the run").click()
    expect(page.locator("#status")).to_contain_text("stopped")
    assert [command["command"] for command in run.commands] == ["pause", "resume", "stop"]
    assert (run.commands[-1]["checkpoint"], run.commands[-1]["reason"]) == (False, "diverged")
    assert len({command["id"] for command in run.commands}) == 3


def test_a_server_that_takes_no_commands_offers_none(show: Show) -> None:
    page = show(a_run(commands=False))
    expect(page.locator("#tiles")).to_contain_text("600")
    expect(page.locator("#commands")).to_be_hidden()


def test_the_address_keeps_the_settings(show: Show) -> None:
    """Scales, of all charts and of one; smoothing, the axis, a zoom, and hidden lines."""
    page = show(a_run(extra=["m/a"], steps=2_000))
    page.get_by_label("Log loss").check()
    page.get_by_label("Ignore outliers").check()
    page.get_by_label("Smoothing").fill("0.8")
    page.get_by_label("Across").select_option("time")
    assert page.url.endswith("#run=demo&log=1&robust=1&smooth=0.8&x=time")
    page.get_by_label("Across").select_option("epoch")
    choose(page, "Gradient norm", "Logarithmic scale")
    choose(page, "Loss", "Logarithmic scale")
    first_chart(page).get_by_role("button", name="validation hard set").click()
    box = first_chart(page).locator(".u-over").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60, steps=4)
    page.mouse.up()
    expect(page.get_by_role("button", name="Reset zoom")).to_be_visible()
    again = show.visits(show.server.url, f"#{page.url.partition('#')[2]}")
    expect(again.get_by_label("Log loss")).to_be_checked()
    expect(again.get_by_label("Ignore outliers")).to_be_checked()
    expect(again.locator("#smoothing-value")).to_have_text("0.8")
    expect(again.get_by_label("Across")).to_have_value("epoch")
    expect(again.get_by_role("button", name="Reset zoom")).to_be_visible()
    for one in (page, again):
        expect(first_chart(one).locator("canvas")).to_be_visible()
        low, high = first_chart(one).evaluate("one => { const { x } = one.chart.u.scales; return [x.min, x.max]; }")
        assert abs(low - 0.5) < 0.03  # epochs: two of 1,000 steps each are shown before the zoom
        assert abs(high - 1.0) < 0.03
        scales = "() => ['Loss', 'Gradient norm'].map(t => [...stagecast.board.charts].find(c => c.title === t).isLog)"
        assert one.evaluate(scales) == [False, True]
        hidden = first_chart(one).get_by_role("button", name="validation hard set")
        expect(hidden).to_have_attribute("aria-pressed", "false")
        assert first_chart(one).evaluate("one => one.chart.shown.map(({ label }) => label)") == ["train", "validation"]
    again.get_by_role("button", name="Reset zoom").click()
    assert "zoom" not in again.url


def test_a_chart_can_lie_over_steps_epochs_time_and_the_clock(show: Show) -> None:
    """The place under the cursor is read in the units of the axis; epochs need a known number of steps."""
    run = a_run(steps=0)
    run.clock = time.mktime((2026, 3, 5, 12, 0, 0, 0, 0, -1))
    curve([1.0] * 200, run)
    run.run |= {"started": run.clock - 3_800, "steps_per_epoch": 80}
    page = show(run)
    clock = "new Intl.DateTimeFormat(undefined, {dateStyle: 'medium', timeStyle: 'medium'}).format"
    date = page.evaluate(f"{clock}({run.clock * 1000})")
    for axis, text in (("step", "Step 200: "), ("epoch", "Epoch 2.5: "), ("time", "1h 03m: "), ("clock", date)):
        page.get_by_label("Across").select_option(axis)
        page.get_by_role("img", name=re.compile("^Chart, Loss")).focus()
        page.keyboard.press("End")
        expect(page.locator("#announcer")).to_have_text(re.compile("^" + re.escape(text)))
    labels = page.evaluate("document.querySelector('#training .chart').chart.u.axes[0]._values")
    assert all(re.fullmatch(r"\d\d:\d\d(:\d\d)?", label) for label in labels), labels
    assert len(set(labels)) == len(labels) > 2
    page.get_by_label("Across").select_option("epoch")
    show.server.call(lambda: run.tell({"run": {"steps_per_epoch": None}}))
    expect(page.locator("#axis-note")).to_be_visible()
    page.keyboard.press("Tab")
    page.get_by_role("img", name=re.compile("^Chart, Loss")).focus()
    page.keyboard.press("End")
    expect(page.locator("#announcer")).to_have_text(re.compile("^Step 200: "))


def test_smoothed_and_raw_values_are_read_together(show: Show) -> None:
    """An exponential moving average without a bias at its start, as TensorBoard has it."""
    values = [4.0, 2.0, 3.0]
    page = show(curve(values), fragment="#smooth=0.5")
    average = sum(value * 0.5 ** (3 - at) for at, value in enumerate(values)) / sum(0.5 ** (3 - at) for at in range(3))
    expect(first_chart(page).locator("canvas")).to_be_visible()
    page.get_by_role("img", name=re.compile("^Chart, Loss")).focus()
    page.keyboard.press("End")
    expect(first_chart(page).locator(".legend .value")).to_have_text(f"{average:.4g} raw 3")
    expect(page.locator("#announcer")).to_have_text(f"Step 3: train {average:.4g} (raw 3)")


def test_a_scale_can_ignore_outliers(show: Show) -> None:
    """It follows the 1st to the 99th percentile, on a logarithmic scale too."""
    values = [20.0, 20.0] + [1.0 + at / 1_000 for at in range(396)] + [0.1, 0.1]
    page = show(curve(values))
    assert value_range(page, "Loss")[1] > 20
    choose(page, "Loss", "Ignore outliers")
    expect(first_chart(page).locator(".notes")).to_have_text(
        "6 outliers lie beyond the scale (1st to 99th percentile)."
    )
    low, high = value_range(page, "Loss")
    assert 0.9 < low < 1.01
    assert 1.39 < high < 1.5
    choose(page, "Loss", "Logarithmic scale")
    page.wait_for_function("() => document.querySelector('#training .chart').chart.u.scales.y.distr === 3")
    assert value_range(page, "Loss") == (1.0, 2.0)


def test_some_of_many_metrics_are_drawn_and_a_search_finds_the_others(show: Show) -> None:
    names = [f"block{block}/head{head}" for block in range(30) for head in range(8)]
    page = show(a_run(steps=60, extra=names))
    expect(page.locator("#metrics-count")).to_have_text("48 of 240")
    page.fill("#metrics-filter", "block29/")
    expect(page.locator("#metrics .chart")).to_have_count(8)
    page.fill("#metrics-filter", "")
    page.get_by_role("button", name="Show more").click()
    expect(page.locator("#metrics .chart")).to_have_count(144)


def test_a_regular_expression_filters_metrics(show: Show) -> None:
    """Plain text does, too; an invalid expression, and one without a match, are reported."""
    cases = [
        ("NORM", 3, ""),
        ("  ", 9, ""),
        ("^layer[12]/(norm|loss)$", 4, ""),
        ("layer.*s$", 3, ""),
        ("val(1)", 1, ""),  # a name, as plain text
        ("(norm", 0, "“(norm” is not a regular expression (Unterminated group); searching for plain text."),
        ("(norm", 0, "No match for “(norm” among 9 metrics."),
        ("nothing", 0, "No match for “nothing” among 9 metrics."),
        ("", 9, ""),
        ("[", 0, "is not a regular expression"),
    ]
    names = [f"layer{index}/{what}" for index in (1, 2, 3) for what in ("norm", "loss")]
    page = show(a_run(extra=[*names, "val(1)", "a.b", "a+b"], steps=20))
    expect(page.locator("#metrics .chart")).to_have_count(9)
    for text, shown, message in cases:
        page.get_by_label("Filter metrics").fill(text)
        expect(page.locator("#metrics .chart")).to_have_count(shown)
        none = expect(page.locator("#metrics-none"))
        none.to_contain_text(message) if message else none.to_be_hidden()


def test_metrics_are_grouped_by_the_prefix_of_their_names(show: Show) -> None:
    """In sections that fold; the address keeps what is folded. Metrics beyond the maximum are counted in words."""
    run = a_run(extra=["head/a", "head/b", "block10/a", "block2/a", "alone"], steps=20)
    page = show(run)
    expect(page.locator("#metrics-left-out")).to_be_hidden()
    show.server.call(lambda: run.tell({"left_out": 1_234}))
    text = "demo has more than 2,000 metrics: charts lack 1,234 values of the others."
    expect(page.locator("#metrics-left-out")).to_have_text(text)
    groups = page.locator("#metrics .group")
    expect(groups.locator("summary")).to_have_text(["without a prefix1", "block21", "block101", "head2"])
    groups.nth(3).locator("summary").press("Enter")
    expect(page.locator("#metrics .chart")).to_have_count(3)
    expect(page.locator("#metrics-count")).to_have_text("3 of 5")
    assert page.url.endswith("&fold=head")
    again = show.visits(show.server.url, f"#{page.url.partition('#')[2]}")
    expect(again.locator("#metrics h3")).to_have_text(["alone", "block2/a", "block10/a"])
    again.get_by_role("button", name="Fold all").click()
    expect(again.locator("#metrics .chart")).to_have_count(1)
    again.get_by_role("button", name="Unfold all").click()
    expect(again.locator("#metrics .chart")).to_have_count(5)
    assert "fold" not in again.url


def titles(page: Page, section: str) -> list[str]:
    return page.locator(f"#{section} h3").all_text_contents()


def test_charts_are_pinned_and_moved(show: Show) -> None:
    """By keyboard; for all runs, after a reload too."""
    page = show(a_run(extra=["m/a", "m/b"]), a_run("other"))
    choose(page, "Gradient norm", "Pin to the top")
    expect(page.locator("#announcer")).to_have_text("Gradient norm is pinned")
    expect(page.get_by_role("button", name="Options of Gradient norm")).to_be_focused()
    choose(page, "m/b", "Pin to the top")
    choose(page, "m/b", "Move forward")
    expect(page.locator("#announcer")).to_have_text("m/b is chart 1 of 2")
    choose(page, "Loss", "Move back")
    page.reload()
    expect(page.locator("#training canvas").first).to_be_visible()
    assert titles(page, "pinned") == ["m/b", "Gradient norm"]
    assert titles(page, "training") == ["Learning rate", "Loss", "Throughput", "Step time"]
    assert titles(page, "metrics") == ["m/a"]
    choose(page, "Gradient norm", "Unpin")
    # It is after its usual neighbour.
    assert titles(page, "training") == ["Learning rate", "Gradient norm", "Loss", "Throughput", "Step time"]
    show.focus(page, "other")
    expect(page.locator("#pinned-section")).to_be_hidden()  # it has no such metric


def test_neighbours_on_an_axis_have_different_labels(show: Show) -> None:
    """However narrow its range is; a long name is cut at its start."""
    name = "group/" + "a-name-that-is-long-" * 4 + "accuracy"
    run = a_run(steps=0)
    curve([0.003 + at / 1e9 for at in range(20)], run)
    curve([60.0 + at / 1e3 for at in range(20)], run, "step_s")
    curve([5e9 + at for at in range(20)], run, "system/process_memory_bytes")
    curve([1.0, 2.0], run, name)
    page = show(run)
    for title in ("Loss", "Step time", "Memory"):
        value_range(page, title)  # draws it
        labels = page.evaluate(
            "title => [...stagecast.board.charts].find(c => c.title === title).u.axes[1]._values", title
        )
        told = [label for label in labels if label]
        assert len(set(told)) == len(told) > 2, told
    head = page.locator("#metrics h3").first
    head.scroll_into_view_if_needed()
    right = "one => [one.querySelector('bdi'), one].map(node => Math.round(node.getBoundingClientRect().right))"
    inner, outer = head.evaluate(right)
    assert inner <= outer  # the end of the name is in sight


def test_a_chart_is_saved_as_a_file(show: Show) -> None:
    """CSV has all points at full precision; SVG and PNG have what is drawn."""
    run = a_run(steps=0)
    curve([0.1 + 0.2, "nan", 3.0], run)
    curve([1.0, 2.0], run, "val_loss/=sum,x")
    page = show(run)
    expect(first_chart(page).locator("canvas")).to_be_visible()
    files: dict[str, bytes] = {}
    for kind in ("CSV", "SVG", "PNG"):
        with page.expect_download() as download:
            choose(page, "Loss", f"Save {kind}")
        assert download.value.suggested_filename == f"Loss.{kind.lower()}"
        files[kind] = download.value.path().read_bytes()
    rows = list(csv.reader(files["CSV"].decode().splitlines()))
    assert rows[0] == ["step", "train time", "train", "validation =sum,x time", "validation =sum,x"]
    assert [row[2] for row in rows[1:]] == ["0.30000000000000004", "nan", "3"]
    assert [(row[0], row[4]) for row in rows[1:]] == [("1", "1"), ("2", "2"), ("3", "")]
    assert float(rows[1][1]) == run.series["train_loss"]["time"][0]
    image = ElementTree.fromstring(files["SVG"])
    texts = [node.text for node in image.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Loss", "train", "1", "2", "3"} <= set(texts)
    lines = [node.get("d", "") for node in image.iter("{http://www.w3.org/2000/svg}path")]
    assert [line.count("M") + line.count("L") for line in lines] == [2, 2]
    assert lines[0].count("M") == 2  # a gap where the value is not finite
    assert files["PNG"].startswith(b"\x89PNG")
    assert struct.unpack(">I", files["PNG"][16:20])[0] > 400


def test_a_chart_is_enlarged_and_escape_closes_it(show: Show) -> None:
    """The zoom stays."""
    page = show(a_run(), fragment="#zoom=100~200")
    before = first_chart(page).bounding_box()
    page.get_by_role("button", name="Options of Gradient norm").click()
    page.locator("#chart-menu").get_by_text("Enlarge").click()
    large = page.locator("#enlarged .chart")
    expect(large.locator("canvas")).to_be_visible()
    after = large.bounding_box()
    assert before
    assert after
    assert after["height"] > 2 * before["height"]
    large.get_by_role("button", name="Options of Gradient norm").click()
    page.get_by_label("Logarithmic scale").check()  # of both
    page.keyboard.press("Escape")
    expect(large).to_be_visible()
    large.get_by_role("img").focus()
    page.keyboard.press("Escape")
    expect(page.locator("#enlarged")).to_be_hidden()
    expect(large).to_have_count(0)
    assert page.url.endswith("&log=on%3Atraining%2FGradient+norm&zoom=100%7E200")


def test_the_loss_is_on_the_first_screen_of_a_phone(show: Show) -> None:
    page = show(a_run(steps=2_000), options={"viewport": {"width": 390, "height": 844}})
    plot = first_chart(page).locator("canvas")
    expect(plot).to_be_visible()
    box = plot.bounding_box()
    assert box is not None
    assert box["y"] + box["height"] <= 844


def test_charts_out_of_sight_are_not_drawn(show: Show) -> None:
    page = show(a_run(extra=[f"metric{index}" for index in range(40)]))
    expect(page.locator("#training canvas").first).to_be_visible()
    assert page.locator("#metrics canvas").count() == 0
    page.locator("#metrics .chart").last.scroll_into_view_if_needed()
    expect(page.locator("#metrics .chart").last.locator("canvas")).to_be_visible()
    expect(page.locator("#training canvas")).to_have_count(0)


def test_each_chart_can_be_read_as_a_table(show: Show) -> None:
    """A real table, with the newest step first."""
    page = show(a_run())
    page.get_by_role("button", name="Options of Loss").press("Enter")
    expect(page.get_by_label("Logarithmic scale")).to_be_focused()
    page.get_by_label("Show as table").press("Space")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Options of Loss")).to_be_focused()
    table = page.get_by_role("table", name=re.compile("^Loss"))
    expect(table.get_by_role("columnheader")).to_have_text(["Step", "train", "validation", "validation hard set"])
    expect(table.get_by_role("rowheader").first).to_have_text("600")
    choose(page, "Loss", "Show as table")
    expect(page.locator("#training canvas").first).to_be_visible()


def test_the_keyboard_reaches_everything(show: Show) -> None:
    """The first tab offers to skip; arrows read a chart, and Escape leaves a dialog."""
    page = show(a_run())
    expect(page.locator("#training canvas").first).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.locator("#skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()
    assert "run=demo" in page.url  # the skip link does not change the page's state
    page.get_by_role("img", name=re.compile("^Chart, Loss")).focus()
    page.keyboard.press("End")
    expect(page.locator("#announcer")).to_have_text(re.compile(r"^Step 600: train "))
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#announcer")).to_have_text(re.compile(r"^Step 599: train "))
    page.locator("#stop").press("Enter")
    expect(page.locator("#stop-cancel")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#stop-dialog")).to_be_hidden()
    expect(page.locator("#stop")).to_be_focused()


def test_dark_and_light(show: Show) -> None:
    """The page follows the system, the button overrules it, and a reload keeps the choice."""
    page = show(a_run(), options={"color_scheme": "dark"})
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(15, 18, 22)"
    page.locator("#theme").click()
    assert page.evaluate(background) == "rgb(244, 245, 247)"
    page.reload()
    expect(page.locator("#theme")).to_have_attribute("aria-label", "Colours: light")
    assert page.evaluate(background) == "rgb(244, 245, 247)"


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_no_width_makes_the_page_scroll_sideways(width: int, show: Show) -> None:
    """From a phone to a wide screen; tables scroll within themselves."""
    runs = a_run("a-run-with-a-rather-long-name-" * 3, extra=["metric/" + "x" * 80]), a_run("b")
    page = show(*runs, options={"viewport": {"width": width, "height": 800}})
    expect(page.locator("#training canvas").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(scheme: str, show: Show) -> None:
    """Names, roles, contrast: running, compared, as a table, stale, and in a dialog."""
    page = show(a_run("a", extra=["m"]), a_run("b", seed=2), fragment="#run=a&run=b", options={"color_scheme": scheme})
    expect(page.locator("#training canvas").first).to_be_visible()
    choose(page, "Loss", "Show as table")
    page.get_by_role("button", name="Options of Learning rate").click()
    assert axe(page) == []
    page.get_by_role("button", name="Enlarge", exact=True).click()
    assert axe(page) == []
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Open samples").first.click()
    assert axe(page) == []
    page.keyboard.press("Escape")
    page.locator("details summary").last.click()
    assert axe(page) == []
    page.click("#stop")
    assert axe(page) == []
    page.keyboard.press("Escape")
    show.server.call(lambda: show.server.close_all(1008))
    expect(page.locator("#banner")).to_be_visible()
    assert axe(page) == []


def test_the_page_ships_with_its_libraries() -> None:
    """Each with its licence and its version; no file names another machine, and a proxy sends at most 400 KB."""
    libraries = {
        "uPlot.iife.min.js": ("v1.6.32", "MIT"),
        "preact.min.js": ("v11.2.0", "MIT"),
        "htm.min.js": ("v3.1.1", "Apache License"),
        "d3.min.js": ("d3-brush v3.0.1, d3-color v3.1.1, d3-scale v4.0.3", "ISC License"),
    }
    for name, (version, licence) in libraries.items():
        assert version in (PAGE / name).read_text()[:200]
        assert licence in (PAGE / f"{name.partition('.')[0]}.LICENSE").read_text()
    index = (PAGE / "index.html").read_text()
    assert not re.search(r"\sstyle=|\son\w+=|https?://", index)
    for script in PAGE.glob("*.js"):
        if script.name not in libraries:
            text = script.read_text()
            assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|https?://(?!www\.w3\.org)", text)
    assert sum(len(gzip.compress(file.read_bytes())) for file in PAGE.iterdir()) < 400_000


def test_the_development_server_starts() -> None:
    command = [sys.executable, "-u", str(Path(__file__).with_name("page_server.py")), "--port", "0", "--steps", "2000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        process.terminate()

"""The page in a real browser, against a made-up server that can be in any state."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import expect

sys.path.insert(0, str(Path(__file__).parent))
from page_server import FakeRun, PageServer
from page_visits import EVIL, Visits, axe


@pytest.fixture
def serve() -> Iterator[Callable[..., PageServer]]:
    """Start servers; they end with the test."""
    servers: list[PageServer] = []

    def start(*runs: FakeRun, **options: Any) -> PageServer:
        servers.append(PageServer(list(runs), **options).start())
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def a_run(run_id: str = "demo", steps: int = 600, **options: Any) -> FakeRun:
    run = FakeRun(run_id, **options)
    if steps:
        run.advance(steps)
        run.furnish()
    return run


# ---------------------------------------------------------------------------------------------- unhappy paths


def test_a_silent_server_makes_the_page_stale(serve: Callable[..., PageServer], visit: Visits) -> None:
    """After five seconds without a frame a banner says so, the figures are grey, and commands are off."""
    server = serve(a_run())
    page = visit(server.url)
    expect(page.locator("#banner")).to_be_hidden()
    server.is_silent = True
    expect(page.locator("#banner")).to_be_visible(timeout=9_000)
    expect(page.locator("#banner")).to_contain_text("this data is old")
    expect(page.locator("body")).to_have_class(re.compile("stale"))
    expect(page.locator("#pause")).to_be_disabled()
    expect(page).to_have_title(re.compile("^⚠"))
    server.is_silent = False
    expect(page.locator("#banner")).to_be_hidden()
    expect(page.locator("#pause")).to_be_enabled()


def test_a_closed_connection_is_resumed_at_its_cursor(serve: Callable[..., PageServer], visit: Visits) -> None:
    """The page says at once that it lost the server, comes back by itself, and asks for what it has missed only."""
    run = a_run()
    server = serve(run)
    page = visit(server.url)
    page.evaluate(
        "() => { const banner = document.getElementById('banner'); new MutationObserver(() => {"
        " if (!banner.hidden) document.body.dataset.wasStale = 'yes'; }).observe(banner, {attributes: true}); }"
    )
    server.call(lambda: server.close_all(1011))
    expect(page.locator("body")).to_have_attribute("data-was-stale", "yes")
    expect(page.locator("#banner")).to_be_hidden()
    assert run.hellos[-1] | {"since": run.cursor, "attempt": 1} == run.hellos[-1]
    server.train(run, 7)
    expect(page.locator("#tiles")).to_contain_text("607")


def test_a_run_that_was_taken_up_again_is_shown_anew(serve: Callable[..., PageServer], visit: Visits) -> None:
    """A snapshot in the middle replaces all that was there."""
    run = a_run()
    server = serve(run)
    page = visit(server.url)

    def again() -> None:
        fresh = a_run("demo", 250)
        fresh.attempt = fresh.run["attempt"] = 2
        for watcher in run.watchers:
            watcher.put_nowait(json.dumps(fresh.snapshot()))

    server.call(again)
    expect(page.locator("#tiles")).to_contain_text("attempt 2")
    expect(page.locator("#tiles dd").first).to_contain_text("250")


def test_a_gap_without_a_snapshot_is_asked_about(serve: Callable[..., PageServer], visit: Visits) -> None:
    """Told that it has missed something, the page asks for all of it if it does not come."""
    run = a_run()
    server = serve(run)
    page = visit(server.url)
    run.run["global_step"] = 601  # known from a snapshot alone
    server.call(lambda: [watcher.put_nowait('{"type": "gap", "lost": 3}') for watcher in run.watchers])
    expect(page.locator("#tiles dd").first).to_contain_text("601")


@pytest.mark.parametrize("websockets", [True, False])
def test_a_run_that_does_not_exist_is_said_so(
    websockets: bool, serve: Callable[..., PageServer], visit: Visits
) -> None:
    """In the header too, with the runs that there are; and it is opened when it begins after all."""
    visit.may_lose_server = True
    server = serve(a_run(), websockets=websockets)
    page = visit(server.url, "#run=nobody", loaded=False)
    expect(page.locator("#waiting")).to_contain_text("this server has no such run; it has demo")
    expect(page.locator("#status")).to_contain_text("no such run")
    expect(page.get_by_role("link", name="demo")).to_be_visible()
    late = a_run("nobody")
    server.call(lambda: server.runs.update(nobody=late))
    page.evaluate("stagecast.look()")
    expect(page.locator("#status")).to_contain_text("running")


def test_a_run_that_is_removed_while_it_is_watched_is_said_so(serve: Callable[..., PageServer], visit: Visits) -> None:
    """Frames may come all the same: what is shown stays, and is said to be old."""
    server = serve(a_run("here"), a_run("gone"))
    page = visit(server.url, "#run=gone")
    server.call(lambda: server.runs.pop("gone"))
    page.evaluate("stagecast.look().then(() => stagecast.look())")
    expect(page.locator("#status")).to_contain_text("no such run")
    expect(page.locator("#banner")).to_contain_text("The run gone does not exist any more: this data is old")
    expect(page.locator("#banner")).to_contain_text("it has here")
    expect(page.locator("#tiles")).to_be_visible()


def test_one_missing_run_does_not_hide_the_others(serve: Callable[..., PageServer], visit: Visits) -> None:
    """The first of those that there are has its tables shown."""
    page = visit(serve(a_run("a"), a_run("b")).url, "#run=nobody&run=a&run=b")
    expect(page.locator("#run-name")).to_have_text("a")
    expect(page.locator("#compared li").first).to_contain_text("no such run")
    expect(page.locator("#training .legend").first).to_contain_text("b · train")


def test_without_runs_the_page_waits(serve: Callable[..., PageServer], visit: Visits) -> None:
    """An empty folder is no error, and a run that begins later appears by itself."""
    server = serve()
    page = visit(server.url, loaded=False)
    expect(page.locator("#waiting")).to_contain_text("No runs yet")
    run = a_run()
    server.call(lambda: server.runs.update(demo=run))
    expect(page.locator("#run-name")).to_have_text("demo")


def test_a_run_without_a_step_shows_empty_charts(serve: Callable[..., PageServer], visit: Visits) -> None:
    """Before the first step there is a page already, which fills when steps come."""
    run = a_run(steps=0)
    server = serve(run)
    page = visit(server.url)
    expect(page.locator("#training .chart").first).to_contain_text("Nothing yet")
    server.train(run, 60)
    expect(page.locator("#training canvas").first).to_be_visible()


def test_numbers_that_are_not_finite_are_shown(serve: Callable[..., PageServer], visit: Visits) -> None:
    """NaN and infinities, in a snapshot and in frames, break nothing and are said by name."""
    run = a_run(steps=40)
    run.point({}, "train_loss", "nan")
    server = serve(run)
    page = visit(server.url, "#log=1&smooth=0.5")
    expect(page.locator("#tiles")).to_contain_text("NaN")
    server.call(lambda: run.tell({"points": {"train_loss": [[41, 42], ["-inf", "inf"]]}}))
    expect(page.locator("#tiles")).to_contain_text("∞")


def test_a_users_name_that_begins_like_the_ledgers_is_a_metric(serve: Callable[..., PageServer], visit: Visits) -> None:
    """Only the ledger's own rows are in its part of the page."""
    page = visit(serve(a_run(extra=["ledger/foo"])).url)
    expect(page.locator("#metrics h3")).to_have_text(["ledger/foo"])
    expect(page.locator("#ledger-table")).to_contain_text("compute")


@pytest.mark.parametrize(
    ("epoch", "epochs", "told"), [(0, 1, "1of 1"), (2, 3, "3of 3"), (3, 3, "3of 3"), (4, None, "5")]
)
def test_epochs_are_counted_as_in_the_log(
    epoch: int, epochs: int | None, told: str, serve: Callable[..., PageServer], visit: Visits
) -> None:
    """From 1: the last of three is 3 of 3, while it lasts and afterwards."""
    run = a_run()
    run.run |= {"epoch": epoch, "epochs": epochs, "status": "finished"}
    page = visit(serve(run).url)
    expect(page.locator("#tiles > div").nth(1)).to_have_text(f"Epoch{told}")


@pytest.mark.parametrize("fragment", ["", "#log=1"])
def test_numbers_near_the_largest_are_drawn(fragment: str, serve: Callable[..., PageServer], visit: Visits) -> None:
    """From end to end of what a number can be, farther apart than any number is large; also once they are merged."""
    run = a_run(steps=0)
    for index in range(300):
        run.run["global_step"] += 1
        run.point({}, "huge_loss", -1.7e308 if index % 2 else 1.7e308)
        run.point({}, "train_loss", 1.7e308 if index % 2 else 1.0)
    server = serve(run)
    page = visit(server.url, fragment)
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
    many = [-1.7e308 if index % 2 else 1.7e308 for index in range(10_000)]  # more than the points of a curve
    server.call(lambda: run.tell({"points": {"huge_loss": [list(range(301, 10_301)), many]}}))
    page.wait_for_function("() => stagecast.focus().store.get('huge_loss').count === 10300")
    assert page.evaluate("stagecast.focus().store.get('huge_loss').mean.every(Number.isFinite)")


def test_what_a_logarithmic_scale_hides_is_counted(serve: Callable[..., PageServer], visit: Visits) -> None:
    """Values of 0 and less, in words that are read aloud too; none on the other scale, and none in the table."""
    run = a_run(steps=0)
    for value in (1.0, 0.0, -1.0, 2.0, "nan"):
        run.run["global_step"] += 1
        run.point({}, "train_loss", value)
    page = visit(serve(run).url, "#log=1")
    chart = page.locator("#training .chart").first
    told = "Not shown on a logarithmic scale (0 or less): train 2 of 5 values."
    expect(chart.locator(".missing")).to_have_text(told)
    expect(chart.get_by_role("img")).to_have_attribute("aria-label", re.compile(re.escape(told)))
    button = chart.get_by_role("button", name="Show Loss as table")
    button.click()
    expect(chart.locator(".missing")).to_be_hidden()
    button.click()
    expect(chart.locator(".missing")).to_be_visible()
    page.get_by_label("Log loss").uncheck()
    expect(chart.locator(".missing")).to_be_hidden()
    expect(chart.get_by_role("img")).not_to_have_attribute("aria-label", re.compile("logarithmic"))


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([1e-14, 5.0], ["1e-12", "1e-9", "1e-6", "0.001", "1"]),
        ([0.03, 0.8], ["0.05", "0.1", "0.2", "0.5"]),
        ([0.51, 0.58], ["0.5", "0.6"]),
        ([5e-324, 1.7e308], ["1e-222", "1e-116", "1e-10", "1e96", "1e202", "1e308"]),
    ],
)
def test_a_logarithmic_scale_has_labels_however_far_it_goes(
    values: list[float], labels: list[str], serve: Callable[..., PageServer], visit: Visits
) -> None:
    """Round numbers, no more of them than there is room for."""
    run = a_run(steps=0)
    for value in values:
        run.run["global_step"] += 1
        run.point({}, "train_loss", value)
    page = visit(serve(run).url, "#log=1")
    chart = page.locator("#training .chart").first
    expect(chart.locator("canvas")).to_be_visible()
    assert chart.evaluate("one => one.chart.u.axes[1]._values") == labels


def test_on_paper_all_charts_are_drawn(serve: Callable[..., PageServer], visit: Visits) -> None:
    """Those that are out of sight, too, which are let go afterwards."""
    page = visit(serve(a_run(extra=[f"metric{number}" for number in range(12)])).url)
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
def test_paper_has_whole_axes_and_all_runs(width: int, serve: Callable[..., PageServer], visit: Visits) -> None:
    """However wide the window is: on A4 each chart ends before its frame does, in dark ink, and the runs are named."""
    server = serve(*(a_run(f"run-{index}", seed=index, extra=["m"]) for index in range(3)))
    viewport = {"width": width, "height": 800}
    page = visit(server.url, "#run=run-0&run=run-1&run=run-2", viewport=viewport, color_scheme="dark")
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


def value_range(page: Any, title: str) -> tuple[float, float]:
    """What the scale of a chart spans."""
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


@pytest.mark.parametrize(
    ("values", "low", "high", "told"),
    [
        (explosion(30), 1.9, 2.5, "Beyond the scale: train 25 of 58 values, up to 1.95e37 at step 55."),
        (explosion(1, factor=100.0), 0.0, 3_000.0, "Not finite (✕): train 3 of 23 values, ∞ at step 21."),
        ([1.0, 2.0, "inf", 3.0], 0.5, 3.5, "Not finite (✕): train 1 of 4 values, ∞ at step 3."),
        ([2.0, 1.0] * 20 + [3.4028235e38], 0.5, 2.5, "Beyond the scale: train 1 of 41 values"),
        ([2.0, 1.0] * 20 + [-1e38, 1.5], 0.5, 2.5, "down to -1e38 at step 41."),
        ([1.0, 1.7e308], 0.5, 1.5, "Beyond the scale: train 1 of 2 values, up to 1.7e308 at step 2."),
        (["nan", "nan"], 0.0, 1.0, "Not finite (✕): train 2 of 2 values, NaN at step 1."),
    ],
)
def test_the_scale_follows_the_values_that_matter(
    values: list[float | str],
    low: float,
    high: float,
    told: str,
    serve: Callable[..., PageServer],
    visit: Visits,
) -> None:
    """Not those of a run that diverges, nor a single one that is far from all others: they are marked and counted."""
    run = a_run(steps=0)
    for value in values:
        run.run["global_step"] += 1
        run.clock += 1
        run.point({}, "train_loss", value)
    page = visit(serve(run).url)
    least, most = value_range(page, "Loss")
    assert low <= least < most <= high
    page.get_by_label("Smoothing").fill("0.9")
    page.get_by_label("Across").select_option("time")
    least, most = value_range(page, "Loss")
    assert low <= least < most <= high
    chart = page.locator("#training .chart").first
    expect(chart.locator(".notes")).to_contain_text(told)
    expect(chart.get_by_role("img")).to_have_attribute("aria-label", re.compile(re.escape(told)))


@pytest.mark.parametrize(
    ("values", "high"),
    [
        ([5.0], 5.0),
        ([0.0] * 90 + [1.0] * 10, 1.0),  # seldom anything: that is what is worth seeing
        ([32.0 * at for at in range(1, 2_000)], 63_968.0),  # counts grow
        ([10.0**-at for at in range(9, -1, -1)], 1.0),  # a warm-up
        ([0.001] * 300 + [0.4] * 3, 0.4),
    ],
)
def test_what_is_usual_is_not_cut_off(
    values: list[float], high: float, serve: Callable[..., PageServer], visit: Visits
) -> None:
    """Nothing is beyond the scale of a healthy run."""
    run = a_run(steps=0)
    for value in values:
        run.run["global_step"] += 1
        run.point({}, "metric", value)
    page = visit(serve(run).url)
    assert value_range(page, "metric")[1] >= high
    expect(page.locator("#metrics .notes")).to_be_hidden()


def test_a_diverged_run_does_not_flatten_those_beside_it(serve: Callable[..., PageServer], visit: Visits) -> None:
    """Also one that stays where it is, without a NaN."""
    runs = [a_run("good", steps=0), a_run("nan", steps=0), a_run("high", steps=0)]
    for run, values in zip(runs, ([2.0, 1.0] * 40, explosion(30), [3.4e38] * 80), strict=True):
        for value in values:
            run.run["global_step"] += 1
            run.point({}, "train_loss", value)
    page = visit(serve(*runs).url, "#run=good&run=nan&run=high")
    assert value_range(page, "Loss")[1] < 3
    expect(page.locator("#training .notes").first).to_contain_text("high 80 of 80 values, up to 3.4e38")


def test_running_for_stands_still_when_the_run_does(serve: Callable[..., PageServer], visit: Visits) -> None:
    """At the end, or at the last sign of life; in the list too, after a reload, and whatever clock the page has."""
    ended, lost, going = a_run("ended"), a_run("lost"), a_run("going")
    for run, status in ((ended, "finished"), (lost, "lost")):
        run.run |= {"status": status, "started": 1e9, "updated": 1e9 + 90}
    ended.run |= {"ended": 1e9 + 61, "updated": 1e9 + 5_000}
    server = serve(ended, lost, going)
    for run_id, told in (("ended", "1m 01s"), ("lost", "1m 30s"), ("going", "1h 00m")):
        page = visit(server.url, f"#run={run_id}")
        page.add_init_script("const now = Date.now; Date.now = () => now() + 7 * 86400e3")
        for _ in range(2):
            # One that is still connecting would write into the console that its connection is cut off.
            page.wait_for_function("() => stagecast.focus()?.store.frameTime > 0")
            page.reload()
            page.wait_for_function("() => stagecast.focus()?.store.frameTime > 0")
            first = page.evaluate("stagecast.focus().store.frameTime")
            page.wait_for_function("first => stagecast.focus().store.frameTime > first + 1.5", arg=first)
            page.evaluate("stagecast.writeNow()")
            expect(page.locator("#tiles > div").filter(has_text="Running for")).to_contain_text(told)
            expect(page.locator("#runs-list li").filter(has_text=run_id)).to_contain_text(told)


def test_a_run_without_epochs_has_its_progress_by_its_steps(serve: Callable[..., PageServer], visit: Visits) -> None:
    """`max_steps` alone says how much is left."""
    run = a_run()
    run.run |= {"epochs": None, "max_steps": 1_200}
    page = visit(serve(run).url)
    expect(page.locator("#progress-text")).to_have_text(re.compile("^50.0 %, about .* left$"))
    expect(page.locator("#tiles > div").first).to_have_text("Step600of 1,200")


def test_what_is_unhealthy_is_said_wherever_the_run_is(serve: Callable[..., PageServer], visit: Visits) -> None:
    """No plain tick in the header, the list and the comparison; strangers' text stays text; it goes when it is over."""
    run, other = a_run("sick"), a_run("well")
    run.run |= {"status": "finished", "problems": [EVIL, "csv is disabled"]}
    server = serve(run, other)
    page = visit(server.url, "#run=sick&run=well")
    for part in ("#status", "#runs-list li:has-text('sick')", "#compared li:has-text('sick')"):
        expect(page.locator(part)).to_contain_text("▲ finished, 2 problems")
    expect(page.locator("#runs-list li").filter(has_text="well")).to_contain_text("● running ·")
    expect(page.locator("#problems li")).to_have_text([EVIL, "csv is disabled"])
    expect(page).to_have_title(re.compile("^finished, 2 problems"))
    assert axe(page) == []
    server.call(lambda: run.tell({"run": {"problems": []}}))
    expect(page.locator("#problems-section")).to_be_hidden()
    expect(page.locator("#status")).to_have_text(re.compile("✓ +finished$"))


def test_a_run_with_wrong_data_breaks_itself_alone(serve: Callable[..., PageServer], visit: Visits) -> None:
    """Also one that is compared with it: the other run is drawn whole, and a notice names the broken one."""
    good, bad, worse = a_run("good"), a_run("bad"), a_run("worse", extra=["system/constructor", "val_constructor"])
    bad.run |= {"status": "constructor", "problems": [{}], "latest": None, "updated": "x"}
    del bad.log[0]["text"], bad.series["train_loss"]["mean"]
    worse.run |= {"status": "__proto__", "problems": {"length": 1}}
    worse.log[0] |= {"text": None, "level": "toString"}
    for one in worse.observers.values():
        one["state"] = "constructor"
    worse.checkpoints["x"] = {"name": "x", "state": "valueOf", "upload": {"state": "constructor"}, "reasons": 5}
    server = serve(good, bad, worse)
    page = visit(server.url, "#run=good&run=bad&run=worse")
    expect(page.locator("#log-lines li")).to_have_count(len(good.log))
    expect(page.locator("#runs-list li").filter(has_text="good")).to_contain_text("● running")
    expect(page.locator("#compared li").filter(has_text="good")).to_contain_text("● running")
    expect(page.locator("#observers")).to_contain_text("wandb")
    expect(page.locator("#training canvas").first).to_be_visible()
    server.train(good, 7)
    expect(page.locator("#tiles dd").first).to_contain_text("607")
    for name in ("worse", "bad"):
        page.goto(f"{server.url}#run={name}&run=good")
        expect(page.locator("#banner-text")).to_have_text(f"A part of {name} cannot be shown")
    assert page.locator("text=native code").count() == 0
    assert {problem.partition(":")[0] for problem in visit.problems} <= {"TypeError", "Error"}
    visit.problems.clear()


def test_a_line_of_the_log_has_the_word_of_its_level_once(serve: Callable[..., PageServer], visit: Visits) -> None:
    """Whether its text begins with it or not."""
    run = a_run(steps=0)
    for text, level in (("warning: full", "warning"), ("full", "warning"), ("failed at step 3", "error")):
        run.line("X", text, level)
    page = visit(serve(run).url)
    expect(page.locator("#log-lines .text")).to_have_text(["warning: full", "warning: full", "error: failed at step 3"])


def test_the_traceback_of_a_failed_run_can_be_read_and_copied(serve: Callable[..., PageServer], visit: Visits) -> None:
    """Folded, as text, with the phase; and beside its line in the log, as that of a warning is."""
    run = a_run()
    run.run |= {"status": "failed", "problems": [f"the run failed in val_step after step 600: {EVIL}"]}
    for kind, level in (("WarningLogged", "warning"), ("RunEnded", "error")):
        run.line(kind, kind, level)
        run.log[-1]["detail"] = f"Traceback of {kind}\n  {EVIL}"
    server = serve(run)
    page = visit(server.url)
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


def test_what_has_become_of_a_checkpoint_is_said_as_it_is(serve: Callable[..., PageServer], visit: Visits) -> None:
    """Here and in the store; and what nobody finishes any more is not under way."""
    run = a_run()
    template = run.checkpoints["step-00000500"]
    run.checkpoints.clear()
    for step, state, upload in (
        (5, "durable", "uploaded"),
        (4, "deleted", "uploaded"),
        (3, "deleted", "deleted"),
        (2, "durable", "deleted"),
        (1, "deleted", None),
    ):
        named = {"name": f"step-{step}", "global_step": step, "state": state, "error": None}
        told = {"done_bytes": 1, "total_bytes": 1, "state": upload} if upload else None
        run.checkpoints[f"step-{step}"] = template | named | {"upload": told}
    lost = a_run("lost")
    lost.run["status"] = "lost"
    lost.checkpoints["step-00000500"] |= {"state": "staged", "upload": {"done_bytes": 1, "state": "uploading"}}
    server = serve(run, lost)
    page = visit(server.url, "#run=demo")
    cells = [page.locator(f"#checkpoints tbody td:nth-child({column})").all_inner_texts() for column in (4, 5)]
    told = [tuple(" ".join(text.split()) for text in row) for row in zip(*cells, strict=True)]
    assert told == [
        ("● durable", "✓ uploaded"),
        ("○ deleted here", "✓ still in the store"),
        ("○ deleted here", "○ deleted there too"),
        ("● durable", "○ deleted there"),
        ("○ deleted", "\N{EN DASH}"),
    ]
    page = visit(server.url, "#run=lost")
    expect(page.locator("#checkpoints tbody tr").last).to_contain_text("never durable")
    expect(page.locator("#checkpoints tbody tr").last).to_contain_text("unfinished")


def test_each_run_has_a_star_at_its_own_best(serve: Callable[..., PageServer], visit: Visits) -> None:
    """By its own metric and mode: its checkpoint, and its value; the best of all is told apart from them."""
    runs = [a_run(name, steps=0) for name in ("least", "greatest")]
    for run, mode in zip(runs, ("min", "max"), strict=True):
        run.run |= {"best": "val_thing", "best_mode": mode}
        for step, value in ((1, 0.5), (2, 0.9), (3, 0.7)):
            run.run["global_step"] = step
            run.point({}, "val_thing", value)
            run.point({}, "val_loss", value + (mode == "max"))
            run._checkpoint({"checkpoints": [], "log": []})
            list(run.checkpoints.values())[-1]["metric"] = value
    server = serve(*runs)
    page = visit(server.url, "#run=least&run=greatest")
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


def test_the_comparison_has_all_runs_at_once_and_stays_current(serve: Callable[..., PageServer], visit: Visits) -> None:
    """Whichever of them has news; one that is not compared any more leaves it."""
    runs = [a_run(f"run-{index}", seed=index) for index in range(3)]
    for run in runs:
        run.run["status"] = "finished"  # so that the focused one has no news of its own
    server = serve(*runs)
    page = visit(server.url, "#run=run-0&run=run-1&run=run-2")
    rows = page.locator("#validation-table tbody tr").filter(has_text="val_loss").filter(has_text="default")
    expect(rows).to_have_count(3)
    expect(rows.nth(2).locator("td").nth(3)).to_have_text("500")
    server.train(runs[2], 400)
    expect(rows.nth(2).locator("td").nth(3)).to_have_text("1,000")
    page.get_by_label("Compare run-1").uncheck()
    expect(rows).to_have_count(2)
    expect(rows.nth(1)).to_contain_text("run-2")


def test_names_of_strangers_are_text(serve: Callable[..., PageServer], visit: Visits) -> None:
    """Markup in every place where text may come from elsewhere is shown as it is, and does nothing."""
    run = a_run(
        EVIL.replace("/", "\\"), extra=[EVIL, f"val_{EVIL}", '"><img src=x onerror=alert(1)>', "__proto__", "ü/µ " * 60]
    )
    run.run |= {"module": EVIL, "device": EVIL, "host": EVIL}
    for name in list(run.observers):
        run.observers[name] |= {"name": EVIL + name, "error": EVIL}
    for one in run.checkpoints.values():
        one |= {"name": EVIL + one["name"], "reasons": [EVIL], "error": EVIL}
    run.media[-1] |= {"name": EVIL, "text": EVIL}
    run.histograms[EVIL] = run.histograms["weights/head"]
    run.line("X", EVIL, "error")
    server = serve(run)
    page = visit(server.url)
    expect(page.locator("#metrics h3").get_by_text(EVIL, exact=True)).to_be_visible()
    for part in ("#place", "#observers", "#checkpoints", "#media", "#histograms", "#log-lines"):
        expect(page.locator(part)).to_contain_text(EVIL)
    expect(page.locator("#validation-table")).to_contain_text("val_<script>alert(1)<")  # a slash begins a key
    server.call(lambda: run.tell({"log": [run.line("X", f"{EVIL} again")], "points": {f"{EVIL}2": [[1], [1.0]]}}))
    expect(page.locator("#log-lines")).to_contain_text(f"{EVIL} again")
    assert page.locator("main script, main img[src=x]").count() == 0


def test_a_token_is_asked_for_and_never_in_the_address(serve: Callable[..., PageServer], visit: Visits) -> None:
    """A wrong token is asked for again; the right one opens the run, its images too, and is in no address."""
    server = serve(a_run(), token="s3cret")
    visit.may_lose_server = True  # the browser reports a 401 as an error
    page = visit(server.url, loaded=False)
    for guess in ("wrong", "s3cret"):
        expect(page.locator("#token-dialog")).to_be_visible()
        page.fill("#token-input", guess)
        page.keyboard.press("Enter")
        expect(page.locator("#token-dialog")).to_be_hidden() if guess == "s3cret" else page.wait_for_timeout(0)
    expect(page.locator("#content")).to_be_visible()
    page.locator("#media").scroll_into_view_if_needed()
    expect(page.locator("#media img")).to_have_attribute("src", re.compile("^data:image/png"))
    assert "s3cret" not in page.url
    assert not any("s3cret" in url for url in server.requests)


def test_server_sent_events_where_websockets_do_not_get_through(
    serve: Callable[..., PageServer], visit: Visits
) -> None:
    """A proxy that lets no WebSocket through costs a moment; frames come, and commands go, all the same."""
    visit.may_lose_server = True
    run = a_run()
    server = serve(run, websockets=False)
    page = visit(server.url)
    server.train(run, 3)
    expect(page.locator("#tiles dd").first).to_contain_text("603")
    page.click("#checkpoint")
    expect(page.locator("#toast")).to_contain_text("takes effect at the next step")
    assert [command["command"] for command in run.commands] == ["checkpoint"]


def test_a_refused_command_says_why(serve: Callable[..., PageServer], visit: Visits) -> None:
    """What the server says to a command is what the reader sees."""
    server = serve(a_run())
    server.is_refusing = True
    page = visit(server.url)
    page.click("#pause")
    expect(page.locator("#toast")).to_contain_text("the run is not under way")
    expect(page.locator("#pause")).to_be_enabled()


# --------------------------------------------------------------------------------------------------- the page


def test_the_page_fills_while_frames_come(serve: Callable[..., PageServer], visit: Visits) -> None:
    """Figures, curves, tables, log and title follow the run."""
    run = a_run(extra=["my/metric"])
    server = serve(run)
    page = visit(server.url)
    expect(page.locator("#training canvas").first).to_be_visible()
    server.train(run, 900)
    expect(page.locator("#tiles dd").first).to_contain_text("1,500")
    expect(page).to_have_title(re.compile(r"^running, step 1,500 · demo"))
    expect(page.locator("#checkpoints")).to_contain_text("step-00001500")
    expect(page.locator("#log-lines")).to_contain_text("epoch 1 of 20")
    expect(page.locator("#validation-table")).to_contain_text("hard set")
    expect(page.locator("#ledger-table")).to_contain_text("compute")
    expect(page.locator("#system h3").get_by_text("GPU use")).to_be_visible()
    expect(page.locator("#observers")).to_contain_text("ConnectionError")
    assert page.evaluate("stagecast.focus().store.get('train_loss').count") == 1_500

    def end() -> None:
        run.run |= {"status": "finished", "commands": False}
        run.tell({"run": {"status": "finished"}})

    server.call(end)
    expect(page.locator("#status")).to_contain_text("finished")
    expect(page.locator("#announcer")).to_have_text("The run is finished")
    expect(page.locator("#commands")).to_be_hidden()


def test_commands_are_sent_and_stop_asks_first(serve: Callable[..., PageServer], visit: Visits) -> None:
    """Pause turns into resume, and a stop needs a second word."""
    run = a_run()
    server = serve(run)
    page = visit(server.url)
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


def test_commands_are_not_offered_where_the_server_takes_none(serve: Callable[..., PageServer], visit: Visits) -> None:
    """Without `commands` in the summary there are no buttons."""
    page = visit(serve(a_run(commands=False)).url)
    expect(page.locator("#tiles")).to_contain_text("600")
    expect(page.locator("#commands")).to_be_hidden()


def test_runs_are_compared(serve: Callable[..., PageServer], visit: Visits) -> None:
    """Ticked runs share the charts, each with a colour and a pattern; the address brings the choice back."""
    server = serve(*(a_run(f"run-{index}", seed=index) for index in range(3)))
    page = visit(server.url)
    page.get_by_label("Compare run-1").check()
    page.get_by_label("Compare run-2").check()
    legend = page.locator("#training .chart").nth(1).locator(".legend li")
    expect(legend).to_have_count(3)
    marks = page.evaluate(
        "() => [...document.querySelectorAll('#training .chart:nth-child(2) .legend line')]"
        ".map(line => [line.getAttribute('stroke'), line.getAttribute('stroke-dasharray')])"
    )
    assert len({colour for colour, _ in marks}) == len({dash for _, dash in marks}) == 3
    fragment = page.url.partition("#")[2]
    assert fragment == "run=run-0&run=run-1&run=run-2"
    again = visit(server.url, f"#{fragment}")
    expect(again.locator("#compared li")).to_have_count(3)
    again.get_by_role("button", name="Show the tables of run-2").click()
    expect(again.locator("#run-name")).to_have_text("run-2")
    page.get_by_label("Compare run-1").uncheck()
    expect(legend).to_have_count(2)


def test_settings_are_in_the_address(serve: Callable[..., PageServer], visit: Visits) -> None:
    """Scale, smoothing and axis come back with a link."""
    server = serve(a_run())
    page = visit(server.url)
    page.get_by_label("Log loss").check()
    page.get_by_label("Smoothing").fill("0.8")
    page.get_by_label("Across").select_option("time")
    assert page.url.endswith("#run=demo&log=1&smooth=0.8&x=time")
    again = visit(server.url, page.url.partition("/#")[2].join(["#", ""]))
    expect(again.get_by_label("Log loss")).to_be_checked()
    expect(again.locator("#smoothing-value")).to_have_text("0.8")
    expect(again.get_by_label("Across")).to_have_value("time")


def test_many_metrics_can_be_searched(serve: Callable[..., PageServer], visit: Visits) -> None:
    """Of hundreds a page full is drawn; a word finds the others."""
    names = [f"block{block}/head{head}" for block in range(30) for head in range(8)]
    page = visit(serve(a_run(steps=60, extra=names)).url)
    expect(page.locator("#metrics-count")).to_have_text("48 of 240")
    page.fill("#metrics-filter", "block29/")
    expect(page.locator("#metrics .chart")).to_have_count(8)
    page.fill("#metrics-filter", "")
    page.get_by_role("button", name="Show more").click()
    expect(page.locator("#metrics .chart")).to_have_count(144)


@pytest.mark.parametrize(
    ("text", "shown", "told"),
    [
        ("", 9, ""),
        ("  ", 9, ""),
        ("NORM", 3, ""),
        ("^layer[12]/(norm|loss)$", 4, ""),
        ("layer.*s$", 3, ""),
        ("val(1)", 1, ""),  # as plain text: that is a name
        ("(norm", 0, "“(norm” is not a regular expression (Unterminated group); searching for plain text."),
        ("(norm", 0, "No match for “(norm” among 9 metrics."),
        ("nothing", 0, "No match for “nothing” among 9 metrics."),
        ("[", 0, "is not a regular expression"),
    ],
)
def test_a_regular_expression_filters_metrics(
    text: str, shown: int, told: str, serve: Callable[..., PageServer], visit: Visits
) -> None:
    """Plain text does, too; what is no expression and what matches nothing is said."""
    names = [f"layer{index}/{what}" for index in (1, 2, 3) for what in ("norm", "loss")]
    page = visit(serve(a_run(extra=[*names, "val(1)", "a.b", "a+b"], steps=20)).url)
    expect(page.locator("#metrics .chart")).to_have_count(9)
    page.get_by_label("Filter metrics").fill(text)
    expect(page.locator("#metrics .chart")).to_have_count(shown)
    expect(page.locator("#metrics-none")).to_contain_text(told) if told else expect(
        page.locator("#metrics-none")
    ).to_be_hidden()


def test_charts_out_of_sight_are_not_drawn(serve: Callable[..., PageServer], visit: Visits) -> None:
    """A canvas exists where somebody looks, and nowhere else."""
    page = visit(serve(a_run(extra=[f"metric{index}" for index in range(40)])).url)
    expect(page.locator("#training canvas").first).to_be_visible()
    assert page.locator("#metrics canvas").count() == 0
    page.locator("#metrics .chart").last.scroll_into_view_if_needed()
    expect(page.locator("#metrics .chart").last.locator("canvas")).to_be_visible()
    expect(page.locator("#training canvas")).to_have_count(0)


def test_each_chart_can_be_read_as_a_table(serve: Callable[..., PageServer], visit: Visits) -> None:
    """A button turns a chart into a real table, with the newest step first."""
    page = visit(serve(a_run()).url)
    button = page.get_by_role("button", name="Show Loss as table")
    button.focus()
    page.keyboard.press("Enter")
    expect(button).to_have_attribute("aria-pressed", "true")
    table = page.get_by_role("table", name=re.compile("^Loss"))
    expect(table.get_by_role("columnheader")).to_have_text(["Step", "train", "validation", "validation hard set"])
    expect(table.get_by_role("rowheader").first).to_have_text("600")
    button.click()
    expect(page.locator("#training canvas").first).to_be_visible()


def test_the_keyboard_reaches_everything(serve: Callable[..., PageServer], visit: Visits) -> None:
    """The first tab offers to skip; arrows read a chart, and Escape leaves a dialog."""
    page = visit(serve(a_run()).url)
    expect(page.locator("#training canvas").first).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.locator("#skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()
    assert "run=demo" in page.url  # the skip link leaves the page's state alone
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


def test_dark_and_light(serve: Callable[..., PageServer], visit: Visits) -> None:
    """The system's choice is followed, the button overrules it, and a reload remembers that."""
    page = visit(serve(a_run()).url, color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(15, 18, 22)"
    page.locator("#theme").click()
    assert page.evaluate(background) == "rgb(244, 245, 247)"
    page.reload()
    expect(page.locator("#theme")).to_have_attribute("aria-label", "Colours: light")
    assert page.evaluate(background) == "rgb(244, 245, 247)"


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_no_width_makes_the_page_scroll_sideways(width: int, serve: Callable[..., PageServer], visit: Visits) -> None:
    """From a phone to a wide screen everything fits; tables scroll within themselves."""
    server = serve(a_run("a-run-with-a-rather-long-name-" * 3, extra=["metric/" + "x" * 80]), a_run("b"))
    page = visit(server.url, viewport={"width": width, "height": 800})
    expect(page.locator("#training canvas").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(scheme: Any, serve: Callable[..., PageServer], visit: Visits) -> None:
    """Names, roles, contrast: running, compared, as a table, stale, and in a dialog."""
    server = serve(a_run("a", extra=["m"]), a_run("b", seed=2))
    page = visit(server.url, "#run=a&run=b", color_scheme=scheme)
    expect(page.locator("#training canvas").first).to_be_visible()
    page.get_by_role("button", name="Show Loss as table").click()
    page.locator("details summary").last.click()
    assert axe(page) == []
    page.click("#stop")
    assert axe(page) == []
    page.keyboard.press("Escape")
    server.call(lambda: server.close_all(1008))
    expect(page.locator("#banner")).to_be_visible()
    assert axe(page) == []


def test_the_page_ships_with_its_chart_library() -> None:
    """uPlot is there, with its licence and its version, and nothing names another machine."""
    folder = Path(__file__).parents[2] / "sinks" / "live" / "page"
    assert "v1.6.32" in (folder / "uPlot.iife.min.js").read_text()[:200]
    assert "MIT" in (folder / "uPlot.LICENSE").read_text()
    index = (folder / "index.html").read_text()
    assert not re.search(r"\sstyle=|\son\w+=|https?://", index)
    for script in folder.glob("*.js"):
        if not script.name.startswith("uPlot"):
            text = script.read_text()
            assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|https?://(?!www\.w3\.org)", text)


def test_the_development_server_starts() -> None:
    """The made-up server serves by hand, too."""
    command = [sys.executable, "-u", str(Path(__file__).with_name("page_server.py")), "--port", "0", "--steps", "2000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        process.terminate()

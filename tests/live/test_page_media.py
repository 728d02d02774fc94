"""Media and histograms on the page, in a real browser."""

from __future__ import annotations

import io
import wave
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api")
import msgspec
from live.page_server import FakeRun
from live.page_show import Show, a_run
from live.page_visits import axe
from playwright.sync_api import Locator, Page, expect

ROWS = [["b", 2.0], ["a", None], ["c", 10.0], *([["z", 1.0]] * 120)]


def a_wav(seconds: float = 0.5, rate: int = 8_000) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(b"\x00\x10" * int(seconds * rate))
    return file.getvalue()


def media_run(run_id: str, steps: tuple[int, ...] = (100, 200, 300)) -> FakeRun:
    """With images at some steps, a sound and a table at step 200, and histograms whose bins change."""
    run = a_run(run_id, steps=0)
    run.advance(400)
    run.media = [
        {"name": "samples", "kind": "image", "global_step": step, "path": f"{step}.png", "width": 96, "height": 64}
        for step in steps
    ]
    for kind, name, path in (("audio", "speech", "a.wav"), ("table", "scores", "a.json")):
        run.media.append({"name": name, "kind": kind, "global_step": 200, "path": path})
    run.files = {
        "a.wav": (a_wav(), "audio/wav"),
        "a.json": (
            msgspec.json.encode({"columns": ["text", "score"], "rows": ROWS, "cut": "the first 123 of 500 rows"}),
            "application/json",
        ),
    }
    run.histograms["weights"] = [
        {"step": 100, "low": 0.0, "high": 1.0, "counts": [8, 0]},
        {"step": 200, "low": 0.0, "high": 2.0, "counts": [0, 8], "skipped": 3},
        {"step": 300, "low": 0.0, "high": 2.0, "counts": [4, 4]},
    ]
    return run


def captions(page: Page, kind: str) -> list[str]:
    return page.locator(f"#media [data-kind={kind}] figcaption").all_inner_texts()


def is_in_view(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


def test_one_slider_moves_all_media(show: Show) -> None:
    """Each panel shows its nearest earlier step, in words, of all chosen runs; the link keeps the place."""
    page = show(media_run("one"), media_run("two", (100, 400)), fragment="#run=one&run=two")
    expect(page.locator("#media [data-kind=image] img")).to_have_count(2)
    assert captions(page, "image") == ["one · step 300", "two · step 400"]
    slider = page.get_by_label("Media and histograms at")
    slider.focus()
    heatmap = page.locator("#histograms .heat canvas").element_handle()
    page.keyboard.press("Home")
    assert captions(page, "image") == ["one · step 100", "two · step 100"]
    assert heatmap.evaluate("canvas => canvas.isConnected")  # one of all steps is not drawn again
    assert captions(page, "audio") == [
        "one · nothing up to step 100; it starts at step 200",
        "two · nothing up to step 100; it starts at step 200",
    ]
    page.keyboard.press("ArrowRight")
    expect(slider).to_have_attribute("aria-valuetext", "step 200")
    assert captions(page, "image") == [
        "one · step 200",
        "two · step 100, the nearest before step 200",
    ]
    page.wait_for_url("**at=200*")
    again = show.visits(page.url)
    expect(again.locator("#media [data-kind=image] img")).to_have_count(2)
    expect(again.get_by_label("Media and histograms at")).to_have_attribute("aria-valuetext", "step 200")
    again.get_by_role("button", name="Newest").click()
    assert captions(again, "image") == ["one · step 300", "two · step 400"]
    again.get_by_role("button", name="All steps").click()
    assert captions(again, "image") == [
        "one · step 100",
        "one · step 200",
        "one · step 300",
        "two · step 100",
        "two · step 400",
    ]


def test_an_image_is_enlarged_and_left_by_the_keyboard(show: Show) -> None:
    """The arrows change the step, the focus stays in the dialog and returns to the image."""
    page = show(media_run("demo"))
    thumb = page.get_by_role("button", name="Open samples")
    thumb.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="samples")
    expect(dialog.get_by_role("status")).to_have_text("samples, step 300 · 3 of 3")
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    expect(dialog.get_by_role("status")).to_have_text("samples, step 100 · 1 of 3")
    page.keyboard.press("ArrowRight")
    expect(dialog.get_by_role("status")).to_have_text("samples, step 200 · 2 of 3")
    expect(dialog.locator("img")).to_have_attribute("src", "api/runs/demo/media/200.png")
    dialog.get_by_role("button", name="Actual pixels").click()
    assert dialog.locator("img").evaluate("img => [img.clientWidth, img.clientHeight]") == [96, 64]
    for _ in range(12):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement === document.body || !!document.activeElement.closest('dialog')")
    assert axe(page) == []
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page.get_by_role("button", name="Open samples")).to_be_focused()
    assert captions(page, "image") == ["step 200"]


def test_a_sound_is_played_and_a_table_is_sorted(show: Show) -> None:
    page = show(media_run("demo"), options={"viewport": {"width": 390, "height": 844}})
    sound = page.locator("#media audio")
    page.wait_for_function("() => document.querySelector('#media audio')?.duration > 0")
    assert sound.evaluate("one => [one.controls, one.duration, one.seekable.end(0)]") == [True, 0.5, 0.5]
    table = page.locator("#media [data-kind=table]")
    expect(table.locator("tbody tr")).to_have_count(100)
    expect(table).to_contain_text("The table has the first 123 of 500 rows.")
    first = table.locator("tbody tr").first
    for order, text in (("ascending", "z1"), ("descending", "c10")):
        table.get_by_role("button", name="score").press("Enter")
        expect(table.get_by_role("columnheader", name="score")).to_have_attribute("aria-sort", order)
        expect(first).to_have_text(text)
    table.get_by_role("button", name="Show all 123 rows").click()
    expect(table.locator("tbody tr").last).to_have_text("a\N{EN DASH}")
    assert is_in_view(page)


def cell_colours(heat: Locator) -> dict[str, str]:
    """The colour of the middle of each bin that has an element, and of the others."""
    read = """root => {
        const u = root.closest('article').querySelector('.u-over'), box = u.getBoundingClientRect();
        const canvas = root.querySelector('canvas'), all = canvas.getBoundingClientRect(), r = devicePixelRatio;
        const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d', {willReadFrequently: true});
        copy.drawImage(canvas, 0, 0);
        const at = (x, y) => '#' + [...copy.getImageData(
            (box.left - all.left + x * box.width) * r, (box.top - all.top + y * box.height) * r, 1, 1).data]
            .map((part) => part.toString(16).padStart(2, '0')).join('');
        return {most: at(0.5, 0.25), half: at(0.9, 0.25), none: at(0.5, 0.75)};
    }"""
    found: dict[str, str] = heat.evaluate(read)
    return found


def luminance(colour: str) -> float:
    return sum(share * int(colour[at : at + 2], 16) for at, share in ((1, 0.21), (3, 0.72), (5, 0.07)))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_histograms_are_a_heatmap_over_steps(show: Show, scheme: str) -> None:
    """More elements differ more from the surface; changed bins and kept steps are said; a key reads each bin."""
    options: Any = {"color_scheme": scheme, "viewport": {"width": 1440 if scheme == "dark" else 390, "height": 900}}
    page = show(media_run("demo"), options=options)
    card = page.locator("#histograms article")
    expect(card).to_contain_text("3 of 6 steps, evenly chosen.")
    expect(card).to_contain_text("counts are divided among 2 equal bins by overlap")
    heat = card.get_by_role("img", name="Heatmap of weights")
    heat.scroll_into_view_if_needed()
    expect(heat.locator("canvas")).to_be_visible()
    found = cell_colours(heat)
    surface = 255.0 if scheme == "light" else 27.0
    most, half = (abs(luminance(found[one]) - surface) for one in ("most", "half"))
    assert most > half > 10
    assert found["none"] == "#00000000"
    heat.focus()
    said = card.get_by_role("status")
    for key, text in (
        ("ArrowLeft", "step 300, bin 1 to 2: 4"),
        ("ArrowLeft", "step 200, bin 1 to 2: 8"),
        ("ArrowDown", "step 200, bin 0 to 1: 0"),
        ("ArrowLeft", "step 100, bin 0 to 1: 8"),
    ):
        page.keyboard.press(key)
        expect(said).to_have_text(text)
    page.get_by_label("Logarithm of counts").check()
    expect(card.locator(".heat-scale")).to_contain_text("8 in a bin, logarithmic")
    logarithmic = cell_colours(heat)
    assert logarithmic["most"] == found["most"]
    assert logarithmic["half"] != found["half"]
    card.get_by_role("button", name="One step").click()
    expect(card.get_by_role("img", name="Histogram of weights, step 300: 8 values")).to_be_visible()
    page.wait_for_url("**counts=log&bars=weights*")
    assert axe(page) == []
    assert is_in_view(page)


def test_bins_that_change_keep_the_number_of_elements(show: Show) -> None:
    """Divided by overlap, whatever their range; of many steps, evenly spread ones are kept."""
    page = show(media_run("demo"))
    found = page.evaluate(
        """async () => {
            const { rebinned, thinned } = await import('/page/rebin.js');
            const rows = [
                { step: 1, low: -1, high: 1, counts: [1, 2, 3, 4, 5] },
                { step: 2, low: 0.25, high: 0.25, counts: [7, 0] },
                { step: 3, low: -1.7e308, high: 1.7e308, counts: [1, 1, 1] },
                { step: 4, low: -1e-300, high: 1e-300, counts: [3, 3] },
            ];
            const sums = (some) => rebinned(some).columns.map(({ counts }) => counts.reduce((a, b) => a + b));
            const one = { step: 1, low: 0, high: 3 };
            const many = Array.from({ length: 640 }, (_, step) => ({ step }));
            let kept = [];
            for (const row of many) kept = thinned([...kept, row], 50);
            const gaps = kept.slice(1).map((row, at) => row.step - kept[at].step);
            return {
                sums: [sums(rows), sums(rows.slice(0, 2))],
                halves: rebinned([{ ...one, counts: [3] }, { ...one, counts: [1, 1] }]).columns[0].counts,
                none: rebinned([]),
                kept: [kept.length, kept[0].step, kept.at(-1).step],
                widest: Math.max(...gaps),
                logged: kept.reduce((sum, row) => sum + 1 + (row.skipped ?? 0), 0),
            };
        }"""
    )
    assert found["sums"] == [pytest.approx([15, 7, 3, 6]), pytest.approx([15, 7])]
    assert found["halves"] == [1.5, 1.5]
    assert found["none"] is None
    assert found["kept"] == [50, 0, 639]
    assert found["widest"] <= 4 * 640 / 50
    assert found["logged"] == 640

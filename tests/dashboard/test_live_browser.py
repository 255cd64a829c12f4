"""The live page in a browser: it draws, follows, and does what it is clicked to do."""

import contextlib
import csv
import shutil
import threading
import time
from urllib.parse import quote

import numpy as np
import pytest

import nettrace as nt
from nettrace.store import TraceWriter

pytest.importorskip("plotly", reason="the live page needs plotly")
pytest.importorskip(
    "playwright.sync_api",
    reason="NO BROWSER TESTS: playwright is not installed (pip install playwright)",
)

from playwright.sync_api import sync_playwright

from nettrace.dashboard.live import LiveServer

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="NO BROWSER TESTS: there is no chromium on PATH"),
]
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
HOSTILE = "<img src=x onerror=document.title=1>"


def step(writer, number, seed=0):
    kernel = np.random.default_rng(number).random((6, 6))
    records = [
        nt.Record("loss/mean", number, np.asarray(1.0 / (1 + number) + seed)),
        nt.Record("loss/accuracy", number, np.asarray(number / 100)),
        nt.Record("ntk/trace", number, np.asarray(1.0 + number)),
        nt.Record("ntk/entropy", number, np.asarray(np.sqrt(number))),
        nt.Record("ntk/spectrum", number, (1.0 + number) / np.arange(1, 31) ** 2, dims=("mode",)),
        nt.Record("ntk/gram", number, kernel, dims=("sample", "sample_2")),
    ]
    writer.write(records, {"epoch": 0})


def make_run(folder, seed=0):
    writer = TraceWriter(folder)
    for number in range(0, 100, 10):
        step(writer, number, seed)
    return writer


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as its:
        browser = its.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(chromium, *paths, width=1280, fragment=""):
    """The page of some runs, with what its console said."""
    server = LiveServer([str(path) for path in paths])
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    context = chromium.new_context(viewport={"width": width, "height": 900})
    page = context.new_page()
    page.set_default_timeout(20_000)
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message) or dialog.dismiss())
    page.goto(server.address + fragment)
    try:
        yield page
        assert said == []
    finally:
        context.close()
        server.shutdown()
        server.server_close()


def plot(name):
    return f".card[data-name='{name}'] .plot"


def drawn(page, name):
    page.locator(f"{plot(name)} .main-svg").first.wait_for()
    return page.locator(plot(name))


def axis(page, name):
    return page.eval_on_selector(plot(name), "its => its.layout.xaxis.range")


def test_a_record_shows_within_two_seconds_of_being_written(chromium, tmp_path):
    writer = make_run(tmp_path / "run")
    with opened(chromium, tmp_path / "run") as page:
        drawn(page, "loss/mean")
        assert "token" not in page.url
        assert page.locator(".card").count() == 6
        page.locator(".card[data-name='ntk/gram']").scroll_into_view_if_needed()
        drawn(page, "ntk/gram")
        card = page.locator(".card[data-name='ntk/gram']").bounding_box()
        figure = page.locator(f"{plot('ntk/gram')} .main-svg").first.bounding_box()
        assert figure["y"] + figure["height"] <= card["y"] + card["height"]
        drawn(page, "loss/mean").scroll_into_view_if_needed()
        begin = time.monotonic()
        step(writer, 100)
        page.wait_for_function(
            "() => document.querySelector('.card[data-name=\"loss/mean\"] .plot')"
            ".calcdata[0].at(-1).x === 100",
            polling=50,
        )
        print(f"a record showed after {time.monotonic() - begin:.2f} s")
        assert "100" in page.inner_text("#status")
        page.reload()  # by the cookie
        drawn(page, "loss/mean")


def test_runs_measures_slider_brush_and_export(chromium, tmp_path):
    for seed in range(3):
        make_run(tmp_path / f"seed-{seed}", seed)
    with opened(chromium, tmp_path) as page:
        drawn(page, "loss/mean")
        curves = "() => document.querySelector('.card[data-name=\"loss/mean\"] .plot').data.length"
        assert page.evaluate(curves) == 3
        page.get_by_label("seed-1", exact=True).uncheck()
        page.wait_for_function(f"() => ({curves})() === 2")
        assert "run=seed-0&run=seed-2" in page.url

        page.get_by_label("accuracy", exact=True).uncheck()
        assert page.locator(".card").count() == 5
        page.keyboard.press("/")
        page.keyboard.type("accu")
        assert page.locator("#measures input").count() == 1
        page.keyboard.press("Enter")
        assert page.locator(".card").count() == 6
        page.keyboard.press("Escape")

        page.locator(".card[data-name='ntk/gram']").scroll_into_view_if_needed()
        gram = drawn(page, "ntk/gram")
        slider = gram.locator(".slider-container .slider-rail-touch-rect")
        slider.click(position={"x": 3, "y": 3}, force=True)
        page.wait_for_function(
            "its => document.querySelector(its).layout.sliders[0].active === 0",
            arg=plot("ntk/gram"),
        )
        page.select_option("#of", "seed-2")
        page.wait_for_timeout(700)
        assert page.eval_on_selector(plot("ntk/gram"), "its => its.layout.sliders[0].active") == 0

        drawn(page, "loss/mean").scroll_into_view_if_needed()
        place = page.locator(f"{plot('loss/mean')} .nsewdrag").bounding_box()
        y = place["y"] + place["height"] / 2
        page.mouse.move(place["x"] + place["width"] * 0.3, y)
        page.mouse.down()
        page.mouse.move(place["x"] + place["width"] * 0.6, y, steps=6)
        page.mouse.up()
        page.wait_for_function("() => document.getElementById('from').value !== ''")
        first, last = int(page.input_value("#from")), int(page.input_value("#to"))
        assert 20 < first < 35 < 50 < last < 65
        page.wait_for_function(
            f"its => document.querySelector(its).layout.xaxis.range?.[0] === {first}",
            arg=plot("ntk/trace"),
        )
        assert axis(page, "ntk/trace") == [first, last]
        page.click("#whole")
        page.wait_for_function("() => document.getElementById('from').value === ''")

        card = page.locator(".card[data-name='loss/mean']")
        with page.expect_download() as got:
            card.get_by_text("CSV").click()
        rows = list(csv.DictReader(got.value.path().read_text().splitlines()))
        assert {row["trace"] for row in rows} == {"seed-0", "seed-2"}
        assert [float(row["x"]) for row in rows[:10]] == list(range(0, 100, 10))
        for kind, begin in (("PNG", b"\x89PNG"), ("SVG", b"<svg")):
            with page.expect_download() as got:
                card.get_by_text(kind).click()
            assert got.value.path().read_bytes().startswith(begin)
            assert got.value.suggested_filename == f"loss-mean.{kind.lower()}"


def test_what_is_typed_and_focused_is_left_while_a_run_trains(chromium, tmp_path):
    writer = make_run(tmp_path / "a")
    make_run(tmp_path / "b", 1)
    with opened(chromium, tmp_path) as page:
        drawn(page, "loss/mean")
        page.get_by_label("a", exact=True).focus()
        step(writer, 200)
        page.wait_for_function(
            "() => document.getElementById('status').textContent.includes('200')"
        )
        assert page.evaluate("document.activeElement.closest('li').dataset.label") == "a"
        page.fill("#from", "10")
        page.fill("#to", "20")
        page.keyboard.press("Tab")
        page.fill("#from", "30")  # both are to change
        page.keyboard.press("Tab")
        assert page.input_value("#to") == "20"
        assert page.locator("#from[aria-invalid]").count() == 1
        page.fill("#to", "40")
        page.keyboard.press("Tab")
        page.wait_for_function("() => location.hash.includes('from=30&to=40')")
        page.get_by_label("a", exact=True).uncheck()
        page.get_by_label("b", exact=True).click()
        assert page.get_by_label("b", exact=True).is_checked()
        assert "one run at least" in page.inner_text("#status")


def test_groups_and_layers(chromium, tmp_path):
    layer = {"layer": ["first", "second"]}
    for seed in range(6):
        writer = TraceWriter(tmp_path / f"seed-{seed}", eta=0.1 * (1 + seed % 2))
        for number in range(4):
            norms = nt.Record(
                "weights/norms", number, np.asarray([1.0, seed]), dims=("layer",), coordinates=layer
            )
            writer.write([nt.Record("loss/mean", number, np.asarray(1.0 + seed)), norms], {})
    with opened(chromium, tmp_path) as page:
        drawn(page, "loss/mean")
        page.select_option("#group", "eta")
        names = "its => document.querySelector(its).data.map(one => one.name)"
        page.wait_for_function(
            f"its => ({names})(its).includes('eta=0.2: median, 10 to 90 % of 3 runs')",
            arg=plot("loss/mean"),
        )
        assert "group=eta" in page.url
        drawn(page, "weights/norms")
        page.locator("#layers").get_by_label("second").check()
        page.wait_for_function(
            f"its => ({names})(its).join() === 'second'", arg=plot("weights/norms")
        )
        page.reload()
        drawn(page, "weights/norms")
        assert page.evaluate(names, plot("weights/norms")) == ["second"]
        page.click("#layers-all")
        page.wait_for_function(
            f"its => ({names})(its).length === 1 && ({names})(its)[0] !== 'second'",
            arg=plot("weights/norms"),
        )
        page.select_option("#group", "")
        page.wait_for_function(f"its => ({names})(its).length === 6", arg=plot("loss/mean"))


def test_comparing_marking_keys_and_the_address(chromium, tmp_path):
    make_run(tmp_path / "run")
    with opened(chromium, tmp_path / "run", fragment="#figure=ntk/gram&figure=loss/mean") as page:
        drawn(page, "ntk/gram")
        page.locator(".card[data-name='ntk/gram'] .compare").click()
        both = "its => document.querySelector(its).layout.xaxis2?.title.text"
        page.wait_for_function(f"its => ({both})(its) === 'step 90'", arg=plot("ntk/gram"))
        page.get_by_label("second step").first.fill("40")
        page.keyboard.press("Enter")
        page.wait_for_function(f"its => ({both})(its) === 'step 40'", arg=plot("ntk/gram"))
        page.locator("body").click(position={"x": 640, "y": 20})
        page.keyboard.press("m")
        page.fill("#stage-step", "30")
        page.fill("#stage-name", "<b>feature</b> learning")
        page.click("#stage-add")
        page.locator("#stages").get_by_text("close").click()
        page.locator(plot("loss/mean")).get_by_text("<b>feature</b> learning").wait_for()
        page.keyboard.press("t")
        page.wait_for_function("() => document.documentElement.dataset.theme === 'dark'")
        page.keyboard.press("j")
        page.keyboard.press("j")
        assert page.locator(".card.current").get_attribute("data-name") == "loss/mean"
        page.keyboard.press("?")
        assert page.locator("#help").is_visible()
        page.keyboard.press("Escape")
        permalink = page.url
        page.goto("about:blank")
        page.goto(permalink)
        page.locator(plot("loss/mean")).get_by_text("<b>feature</b> learning").wait_for()
        page.wait_for_function(f"its => ({both})(its) === 'step 40'", arg=plot("ntk/gram"))
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert page.url == permalink


def test_hostile_names_do_nothing(chromium, tmp_path):
    for seed, name in enumerate((HOSTILE, "plain")):
        writer = make_run(tmp_path / name, seed)
        about = {"units": HOSTILE, "convention": HOSTILE}
        labels = {"coordinates": {"layer": [HOSTILE, "b"]}, "attributes": about}
        records = [
            nt.Record("x/" + HOSTILE, 100, np.asarray(1.0), attributes=about),
            nt.Record("x/y", 100, np.ones(2), dims=("layer",), **labels),
        ]
        writer.write(records, {})
    (tmp_path / ("z" + HOSTILE)).mkdir()
    figures = "#figure=loss/mean&figure=x/y&figure=" + quote("x/" + HOSTILE)
    folders = tmp_path, tmp_path / ("z" + HOSTILE)
    with opened(chromium, *folders, fragment=figures) as page:
        drawn(page, "loss/mean")
        drawn(page, "x/y")
        page.locator(".card").nth(2).locator(".main-svg").first.wait_for()
        assert page.locator("img").count() == 0
        assert page.title() == "nettrace"
        assert HOSTILE in page.inner_text("#runs")
        assert HOSTILE in page.locator(f"{plot('loss/mean')} .legend").text_content()


def test_a_narrow_page_and_one_without_runs(chromium, tmp_path):
    with opened(chromium, tmp_path / "later", width=400) as page:
        page.get_by_text("this page goes on looking").wait_for()
        make_run(tmp_path / "later")
        drawn(page, "loss/mean")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        page.click("#menu")
        page.get_by_label("trace", exact=True).uncheck()
        page.click("#menu")
        assert page.locator(".card[data-name='ntk/trace']").count() == 0

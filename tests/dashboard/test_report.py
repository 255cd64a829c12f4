"""Reports: what is in the page, that nothing gets into it, and that a browser draws it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import nettrace as nt
from nettrace.cli import main
from nettrace.store import TraceWriter

pytest.importorskip("plotly")

from nettrace.dashboard.report import report
from nettrace.dashboard.runs import differing, grouped

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def written(folder, steps=5, missing=(), name="ntk/trace", shift=0.0, **provenance):
    """A trace of a number, a spectrum, and what has a hostile label."""
    writer = TraceWriter(folder, **provenance)
    for step in range(steps):
        gone = "ValueError: <b>not</b> there" if step in missing else None
        value = np.asarray(np.nan if gone else step + shift)
        error = None if gone else np.asarray(0.25)
        records = [
            nt.Record(name, step, value, error, missing=gone, attributes={"convention": "a sum"}),
            nt.Record("ntk/spectrum", step, np.exp(-np.arange(4.0)), dims=("mode",)),
        ]
        writer.write(records, {"wall_time": float(step)})
    writer.close()
    return folder


class Page(HTMLParser):
    """Tags, and the texts of scripts and cells."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.scripts, self.texts, self.at = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.at.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        while self.at and self.at.pop() != tag:
            pass

    def handle_data(self, data):
        if self.at and self.at[-1] == "script":
            self.scripts[-1] += data
        else:
            self.texts.append(data)

    @property
    def figures(self):
        return json.loads(self.scripts[0])["figures"]


def test_a_page_has_figures_values_and_nothing_from_elsewhere(tmp_path):
    page = Page(report(nt.open(written(tmp_path / "x", seed="seven")), title="my run"))
    assert [one["name"] for one in page.figures] == ["ntk/spectrum", "ntk/trace"]
    assert len(page.scripts) == 3
    links = {k for _, attributes in page.tags for k in attributes} & {"src", "srcset"}
    assert not links
    assert all(a.get("href", "#").startswith("#") for tag, a in page.tags if tag == "a")
    assert "my run" in page.texts
    assert "4.00 ± 0.25" in page.texts
    assert "seven" in page.texts
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "content" in a)
    assert "default-src 'none'" in policy
    assert "'unsafe-inline'" not in policy.partition("style-src")[0]


def test_hostile_names_are_text(tmp_path):
    folder = written(tmp_path / "x", name=f"ntk/{HOSTILE}", note=HOSTILE)
    page = Page(report(nt.open(folder), title=HOSTILE))
    assert len(page.scripts) == 3
    assert "img" not in [tag for tag, _ in page.tags]
    assert not [a for _, a in page.tags if any(k.startswith("on") for k in a)]
    assert any(HOSTILE in one["name"] for one in page.figures)
    titles = [one["layout"]["title"]["text"] for one in page.figures]
    assert not any("<" in title for title in titles)


def test_what_is_missing_is_said(tmp_path):
    page = Page(report(nt.open(written(tmp_path / "x", missing=range(5)))))
    assert "missing" in page.texts
    notes = [n["text"] for one in page.figures for n in one["layout"].get("annotations", ())]
    assert any("not&lt;/b&gt; there" in note.replace("<br>", " ") for note in notes)


def test_runs_are_compared_and_grouped(tmp_path):
    for i in range(6):
        written(
            tmp_path / f"run{i}",
            shift=i,
            configuration=json.dumps({"hyperparameters": {"eta": i % 2}}),
        )
    data = nt.open(str(tmp_path / "run*"))
    assert grouped(data, "eta") == {f"run{i}": f"eta={i % 2}" for i in range(6)}
    assert differing(data) == ["eta"]
    page = Page(report(data, group="eta"))
    (one,) = (one for one in page.figures if one["name"] == "ntk/trace")
    assert "eta=1: median, 10 to 90 % of 3 runs" in [curve["name"] for curve in one["data"]]
    assert sum(one["name"] == "ntk/spectrum" for one in page.figures) == 4  # of the first runs
    assert "4.5 to 8.5" in Page(report(data)).texts
    assert "eta=0: median of 3" in page.texts
    assert {"6", "7"} <= set(page.texts)  # 4 + the medians of 0, 2, 4 and of 1, 3, 5
    with pytest.raises(KeyError, match="no run says what its 'depth' is"):
        report(data, group="depth")


def test_large_figures_are_left_out_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("nettrace.dashboard.report.LARGEST", 1000)
    page = Page(report(nt.open(written(tmp_path / "x"))))
    assert "left out, since the page would be too large" in page.texts


def test_the_command_writes_a_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "x")
    assert main(["report", "x", "--names", "ntk/trace"]) == 0
    page = Page((tmp_path / "x.html").read_text())
    assert [one["name"] for one in page.figures] == ["ntk/trace"]
    assert "x.html" in capsys.readouterr().out
    for wrong in (["-o", "x.svg"], ["-o", "x.png", "--format", "html"]):
        assert main(["report", "x", *wrong]) == 1
        assert "end it in" in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.html"]


def test_empty_folders_among_others_are_left_out(tmp_path, capsys, logged):
    for name in ("a", "b"):
        written(tmp_path / name)
    (tmp_path / "c").mkdir()
    page = tmp_path / "x.html"
    assert main(["report", *(str(tmp_path / n) for n in "abc"), "-o", str(page)]) == 0
    said = " ".join([capsys.readouterr().err, *logged]).split()  # once, wherever that goes
    assert "it is left out" in " ".join(said)
    logged.clear()
    assert "2 runs: a, b" in page.read_text()


def test_runs_of_own_loops_are_grouped_by_what_they_say(tmp_path):
    for n in range(4):
        probe = nt.Probe(torch.ones(4, 3))
        about = {"learning_rate": 0.1 * (n % 2), "schedule": ["cosine", n]}
        tracer = nt.Tracer(probe, "ntk/trace", to=tmp_path / str(n), hyperparameters=about)
        tracer(torch.nn.Linear(3, 2), 0)
    data = nt.open(str(tmp_path / "*"))
    assert differing(data) == ["learning_rate"]
    assert list(grouped(data, "learning_rate").values())[::2] == [
        "learning_rate=0.0",
        "learning_rate=0.1",
    ]


def test_complex_numbers_do_not_keep_the_page_away(tmp_path):
    writer = TraceWriter(tmp_path)
    for step in range(3):
        writer.write([nt.Record("own/z", step, np.asarray(1 + step * 2j))], {})
    page = Page(report(nt.open(tmp_path)))
    assert [curve["name"] for curve in page.figures[0]["data"]] == ["real part", "imaginary part"]
    assert "1 + 4i" in page.texts


@pytest.mark.parametrize("is_there", [True, False])
def test_without_a_trace_there_is_a_message(tmp_path, capsys, is_there):
    if is_there:
        (tmp_path / "x").mkdir()
    assert main(["report", str(tmp_path / "x")]) == 1
    assert "there is no trace" in " ".join(capsys.readouterr().err.split())


def test_printing_names_what_it_needs(tmp_path, capsys, monkeypatch):
    written(tmp_path / "x")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(["report", str(tmp_path / "x"), "-o", str(tmp_path / "x.pdf")]) == 1
    assert "Chromium or Chrome" in " ".join(capsys.readouterr().err.split())


needs_a_browser = pytest.mark.skipif(
    not shutil.which("chromium"), reason="NO BROWSER TESTS: there is no chromium on PATH"
)


@pytest.mark.slow
@needs_a_browser
@pytest.mark.parametrize("form", ["pdf", "png"])
def test_printed(tmp_path, form):
    written(tmp_path / "x")
    output = tmp_path / f"x.{form}"
    assert main(["report", str(tmp_path / "x"), "-o", str(output)]) == 0
    assert output.read_bytes()[:4] in (b"%PDF", b"\x89PNG")
    assert output.stat().st_size > 20_000


@pytest.mark.slow
@needs_a_browser
def test_a_browser_draws_it_without_errors(tmp_path):
    written(tmp_path / "x", name=f"ntk/{HOSTILE}", note=HOSTILE, missing=(2,))
    (tmp_path / "x.html").write_text(report(nt.open(tmp_path / "x"), title=HOSTILE))
    options = "--headless=new --no-sandbox --disable-gpu --virtual-time-budget=20000"
    options += f" --user-data-dir={tmp_path}/profile --enable-logging=stderr --v=0 --dump-dom"
    done = subprocess.run(
        ["chromium", *options.split(), (tmp_path / "x.html").as_uri() + "#all"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not re.findall(r"CONSOLE.*", done.stderr)
    assert done.stdout.count('class="main-svg"') >= 2
    assert "data-height" in done.stdout
    assert "<img" not in done.stdout

"""What a notebook shows of traces."""

from __future__ import annotations

import html.parser
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import xarray as xr

import nettrace as nt
from nettrace.accessor import sparkline, table
from nettrace.store.kept import Kept
from nettrace.summary import Quantity, said, summary

PAYLOAD = "<script>alert('x')</script>\"'&"


class Page(html.parser.HTMLParser):
    """The tags and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def traced(folder: Path) -> None:
    probe = nt.Probe(torch.randn(6, 3), torch.randint(0, 2, (6,)))
    tracer = nt.Tracer(probe, ["ntk/trace", "ntk/spectrum", "loss/mean"], to=folder)
    model = torch.nn.Linear(3, 2)
    for step in range(4):
        tracer(model, step, epoch=step / 2)
        with torch.no_grad():
            model.weight.mul_(1.1)


def hostile() -> xr.Dataset:
    about = {"convention": PAYLOAD, "units": PAYLOAD}
    kept = Kept()
    for step in range(3):
        kept.add(
            [
                nt.Record(f"a/{PAYLOAD}", step, np.array(1.0), attributes=about),
                nt.Record("b/c", step, np.array(np.nan), missing=f"ValueError: {PAYLOAD}"),
                nt.Record(
                    "b/d", step, np.ones(1), dims=(PAYLOAD,), coordinates={PAYLOAD: [PAYLOAD]}
                ),
            ],
            {},
        )  # fmt: skip
    return kept.dataset()


def test_accessor_is_there_wherever_a_trace_is_opened(tmp_path: Path) -> None:
    traced(tmp_path / "run")
    nt.export(tmp_path / "run", tmp_path / "run.nc")
    for data in (nt.open(tmp_path / "run"), nt.open(tmp_path / "run.nc")):
        assert "ntk/trace" in data.nt.figures()
        assert data.nt.plot("ntk/trace", theme="dark").layout.xaxis.title.text == "optimizer step"
        assert data.nt.plot().layout.title.text == "loss/mean"
        assert repr(data.nt) == "<nettrace: 6 quantities at 4 steps>"
    with pytest.raises(KeyError, match="no 'ntk/trac'"):
        data.nt.plot("ntk/trac")
    with pytest.raises(ValueError, match="no quantities"):
        Kept().dataset().nt.plot()


def test_the_summary_has_the_last_value_that_is_known() -> None:
    kept = Kept()
    for step, value in ((0, 3.0), (5, 4.0), (9, np.nan)):
        kept.add([nt.Record("a/b", step, np.array(value), np.array(0.1 * value))], {})
    kept.add([nt.Record("a/c", 9, np.array(np.nan), missing="ValueError: none")], {})
    found = {one.name: one for one in summary(kept.dataset())}
    assert list(found) == ["a/b", "a/c"]
    assert (found["a/b"].value, found["a/b"].step) == (4.0, 5)
    assert found["a/b"].standard_error == pytest.approx(0.4)
    assert found["a/c"].value is None
    assert found["a/c"].missing == "step 9: ValueError: none"
    np.testing.assert_array_equal(found["a/b"].track, [3, 4, np.nan])


def test_several_runs_have_the_median_of_their_last_values(tmp_path: Path) -> None:
    for number, value in enumerate((1.0, 2.0, 9.0)):
        writer = nt.store.TraceWriter(tmp_path / str(number))
        for step in range(number + 1):
            writer.write([nt.Record("a/b", step, np.array(value * (step + 1)))], {})
    (one,) = summary(nt.open(str(tmp_path / "*")))
    np.testing.assert_array_equal(one.values, [1.0, 4.0, 27.0])
    assert one.value == np.median([1.0, 4.0, 27.0])
    assert one.step == 2
    assert one.standard_error is None
    assert "3 runs" in nt.open(str(tmp_path / "*")).nt._repr_html_()


def test_all_texts_are_escaped() -> None:
    page = Page(hostile().nt._repr_html_())
    assert set(page.tags) <= {*"div table thead tbody tr th td span svg polyline circle".split()}
    assert not any(name.startswith("on") for name in page.attributes)
    assert any(PAYLOAD in text for text in page.texts)


def test_tables_are_bounded() -> None:
    many = [
        Quantity(
            f"a/{n}", np.ones(1), np.ones(1), 5, {}, "", "x", "y" * 5000, np.linspace(0, 1, 100_000)
        )
        for n in range(300)
    ]
    text = table(many)
    assert Page(text).tags.count("tr") == 201
    assert "and 100 more" in text
    assert len(text) < 2_500_000


@pytest.mark.parametrize(
    "values",
    [
        [], [np.nan], [1.0], [1.0, 1.0], [np.nan, 1, 2, np.inf, 3], [1e308, -1e308, 1e308],
        [0, 1e-320], [1 + 1j, 2], list(range(1000)), [True, False],
    ],
)  # fmt: skip
def test_small_curves_are_whole_and_within_their_frame(values: list[Any]) -> None:
    text = sparkline(np.array(values))
    if not np.isfinite(values).any():
        assert text == ""
        return
    root = ElementTree.fromstring(text)
    assert "nan" not in text
    for line in root.findall("polyline"):
        for point in line.get("points", "").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 96
            assert 0 <= y <= 18
    if len(values) == 1000:  # rises
        ys = [float(p.split(",")[1]) for p in root[0].get("points", "").split()]
        assert ys == sorted(ys, reverse=True)
        assert len(ys) == 48
    if values == [np.nan, 1, 2, np.inf, 3]:
        assert [one.tag for one in root] == ["polyline", "circle"]


def test_without_plotly_the_table_is_there_and_figures_say_what_they_need() -> None:
    code = """
import sys
sys.modules["plotly"] = None
import numpy as np, nettrace as nt
assert "xarray" not in sys.modules
from nettrace.store.kept import Kept
kept = Kept()
kept.add([nt.Record("a/b", 0, np.array(1.0))], {})
data = kept.dataset()
assert "a/b" in data.nt._repr_html_()
for ask in (data.nt.figures, lambda: data.nt.plot("a/b")):
    try:
        ask()
    except ImportError as error:
        assert "nettrace[dashboard]" in str(error), error
    else:
        raise AssertionError
import nettrace.dashboard.workspace
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (587812.3, 12034.0, "587812 ± 12034"),
        (4.0, 0.25, "4.00 ± 0.25"),
        (0.0123456, 0.00034, "0.01235 ± 0.00034"),
        (-1.5e9, 2.5e7, "(-1.500 ± 0.025)e+09"),
        (3e-7, 2e-5, "(0.0 ± 2.0)e-05"),
        (0.0, 0.0, "0 ± 0"),
        (1.0, 1e-16, "1 ± 1e-16"),
        (1.23456789, np.nan, "1.2346"),
        (np.inf, 1.0, "inf"),
        (1 - 2j, 0.1, "1 - 2i ± 0.1"),
    ],
)
def test_numbers_are_said_in_the_digits_that_their_errors_leave(value, error, text):
    assert said(value, error) == text

"""The live page: who may read it, what it refuses, and that it follows what is written."""

import gzip
import http.client
import json
import re
import shutil
import socket
import threading
import time
from urllib.parse import quote, urlencode

import numpy as np
import pytest

import nettrace as nt
from nettrace.store import TraceWriter

pytest.importorskip("plotly", reason="the live page needs plotly")

from nettrace.dashboard import live
from nettrace.dashboard.comparison import compare
from nettrace.dashboard.following import Following
from nettrace.dashboard.tables import table
from nettrace.dashboard.views import figure, figures

HOSTILE = "<img src=x onerror=alert(1)>"
SCRIPT = "=1+<script>alert(1)<%2Fscript>%{x}"


def step(writer, number, seed=0, **more):
    rng = np.random.default_rng(number + 1000 * seed)
    records = [
        nt.Record("loss/mean", number, np.asarray(1.0 / (1 + number) + seed)),
        nt.Record("ntk/spectrum", number, (1.0 + number) / np.arange(1, 31) ** 2, dims=("mode",)),
        nt.Record("ntk/gram", number, rng.random((4, 4)), dims=("sample", "sample_2")),
        *(nt.Record(name, number, np.asarray(value)) for name, value in more.items()),
    ]
    writer.write(records, {"epoch": 0})


def make_run(folder, steps=5, seed=0):
    writer = TraceWriter(folder)
    for number in range(steps):
        step(writer, number, seed)
    return writer


class Client:
    """Asks a server as a browser would, or not."""

    def __init__(self, server):
        self.server = server

    def __call__(self, path, method="GET", token=True, headers=None, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=30)
        sent = {"Cookie": f"{self.server.cookie}={self.server.token}"} if token else {}
        connection.request(method, path, body, {**sent, **(headers or {})})
        answer = connection.getresponse()
        answer.text = answer.read().decode()
        connection.close()
        assert "Traceback" not in answer.text
        return answer

    def json(self, path, **parameters):
        answer = self(f"{path}?{urlencode(parameters, doseq=True)}")
        assert answer.status == 200, answer.text
        return json.loads(answer.text)


@pytest.fixture
def serve():
    servers = []

    def start(*paths):
        server = live.LiveServer([str(path) for path in paths])
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        while server.following.is_reading:
            time.sleep(0.02)
        return Client(server)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def ask(serve, tmp_path):
    make_run(tmp_path / "run")
    return serve(tmp_path / "run")


PATHS = ["/", "/live.js", "/live.css", "/plotly.js", "/state", "/figures", "/figure", "/table"]


@pytest.mark.parametrize("path", [*PATHS, "/nothing"])
def test_nothing_is_told_without_the_token(ask, path):
    assert ask(path, token=False).status == 403
    wrong = ask.server.token[:-1] + ("A" if ask.server.token[-1] != "A" else "B")
    for headers in ({"Cookie": f"{ask.server.cookie}={wrong}"}, {"Cookie": "\x7f=;;; é"}):
        assert ask(path, token=False, headers=headers).status == 403
    for query in ("token=", f"token={wrong}", "token=%00%FF", f"token={wrong}&token={wrong}"):
        assert ask(f"{path}?{query}", token=False).status in (400, 403)


def test_the_token_is_long_and_new_and_becomes_a_cookie(ask, serve, tmp_path):
    assert len(ask.server.token) >= 32
    assert serve(tmp_path).server.token != ask.server.token
    answer = ask(f"/?token={ask.server.token}", token=False)
    assert answer.status == 200
    cookie = answer.getheader("Set-Cookie")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    assert ask("/state", token=False, headers={"Cookie": cookie.split(";")[0]}).status == 200
    # Browsers send the cookies of other ports too; they are not mistaken for this one's.
    both = f"nettrace_1=other; {cookie.split(';')[0]}"
    assert ask("/state", token=False, headers={"Cookie": both}).status == 200


def test_it_listens_on_the_loopback_interface_alone(ask):
    assert ask.server.socket.getsockname()[0] == "127.0.0.1"


def test_the_token_is_compared_in_constant_time(ask, monkeypatch):
    compared = []
    monkeypatch.setattr(
        live.hmac, "compare_digest", lambda *both: compared.append(both) or both[0] == both[1]
    )
    assert ask("/state").status == 200
    assert compared == [(ask.server.token.encode(),) * 2]


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:{port}"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "localhost@evil.example"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1:{port}"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://localhost:{port}"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
@pytest.mark.parametrize("path", ["/", "/state", "/figure?name=loss/mean"])
def test_other_origins_and_names_get_nothing(ask, headers, path):
    headers = {n: v.format(port=ask.server.server_port) for n, v in headers.items()}
    answer = ask(path, headers=headers)
    assert answer.status == 403
    assert "loss" not in answer.text


def test_its_own_origin_and_tunnels_are_served(ask):
    port = ask.server.server_port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost:9999", "[::1]:80"):
        headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
        assert ask("/state", headers=headers).status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/live.js/../../../pyproject.toml",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/assets/live.js",
        "//etc/passwd",
        "/state/",
        "/live.js%00",
        "/live.py",
        "http://127.0.0.1/../x",
        "*",
    ],
)
def test_paths_lead_nowhere(ask, path):
    answer = ask(path)
    assert answer.status == 404
    assert "root:" not in answer.text


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/figure?name=" + "x" * 62_000, 414),
        ("/figure?name=" + "x" * 1_001, 400),
        ("/figures?" + "&".join(f"run={i}" for i in range(2_100)), 400),
        ("/figure?" + "&".join(f"name=x{i}" for i in range(20)), 400),
        ("/figure?name=ntk/gram&at=1&at=2&at=3", 400),
        ("/figure?name=loss/mean&from=" + "9" * 50, 400),
        ("/figure?name=loss/mean&from=1e3", 400),
        ("/figure?name=loss/mean&theme=red", 400),
        ("/figure?name=%FF%FE", 400),
        ("/figure?name=loss/mean&file=/etc/passwd", 400),
        ("/figure", 400),
    ],
)
def test_absurd_requests_are_refused(ask, path, status):
    assert ask(path).status == status
    assert ask("/state").status == 200


def test_more_than_the_standard_library_takes_is_refused(ask):
    for lines in (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", b"nonsense\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", ask.server.server_port), 20) as its:
            its.sendall(lines)
            assert re.search(rb"\b4\d\d\b", its.recv(400))
    many = {f"X-{i}": "1" for i in range(200)}
    assert 400 <= ask("/state", headers=many).status < 500
    assert ask("/state").status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_it_only_reads(ask, method):
    answer = ask("/state", method, body=b"x" * 10)
    assert answer.status == 405
    assert answer.getheader("Allow") == "GET, HEAD"
    assert ask("/state", "GET", body=b"x" * 10).status == 413
    assert ask("/state", headers={"Transfer-Encoding": "chunked"}).status == 413


def test_nothing_is_written(ask, tmp_path):
    def found():
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in tmp_path.rglob("*")}

    before = found()
    for path in [*PATHS, "/figure?name=loss/mean", "/table?name=ntk/gram", "/figure?name=no"]:
        ask(path)
    assert found() == before


@pytest.mark.parametrize("path", [*PATHS, "/nothing", "/figure?name=loss/mean"])
def test_all_answers_have_the_headers_that_keep_the_page_to_itself(ask, path):
    for token in (True, False):
        answer = ask(path, token=token)
        policy = dict(
            one.strip().split(" ", 1)
            for one in answer.getheader("Content-Security-Policy").split(";")
        )
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert answer.getheader("X-Content-Type-Options") == "nosniff"
        assert answer.getheader("Referrer-Policy") == "no-referrer"
        assert answer.getheader("X-Frame-Options") == "DENY"
        cached = answer.getheader("Cache-Control")
        assert cached == "no-store" or (path == "/plotly.js" and "immutable" in cached)
        assert answer.getheader("Access-Control-Allow-Origin") is None
        assert "Python" not in answer.getheader("Server")


def test_the_page_has_no_script_of_its_own(ask):
    page = ask("/").text
    assert "PLOTLY_VERSION" not in page
    assert re.findall(r"<script(?![^>]*\bsrc=)", page) == []
    assert re.findall(r"\son\w+=", page) == []
    script = ask("/live.js").text
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "document.write"):
        assert word not in script
    assert re.findall(r"https?://", page + script) == []


def test_head_is_as_get_without_the_body(ask):
    get, head = ask("/live.css"), ask("/live.css", "HEAD")
    assert (head.status, head.text) == (200, "")
    assert head.getheader("Content-Length") == get.getheader("Content-Length") == str(len(get.text))


def test_plotly_is_compressed_and_kept(ask):
    connection = http.client.HTTPConnection("127.0.0.1", ask.server.server_port)
    cookie = f"{ask.server.cookie}={ask.server.token}"
    connection.request("GET", "/plotly.js", headers={"Cookie": cookie, "Accept-Encoding": "gzip"})
    answer = connection.getresponse()
    assert answer.getheader("Content-Encoding") == "gzip"
    assert b"plotly.js" in gzip.decompress(answer.read())[:200]
    connection.close()


def test_figures_are_those_of_the_figure_module(ask, tmp_path):
    (run,) = ask.json("/state")["runs"]
    assert (run["readable"], run["records"], run["last"], run["problem"]) == (True, 5, 4, "")
    data = nt.open(tmp_path / "run")
    said = ask.json("/figures", run=run["label"])["figures"]
    assert [one["name"] for one in said] == figures(data)
    assert [one["compared"] for one in said] == [False, True, True]
    found = ask.json("/figure", name="ntk/spectrum", run=run["label"], theme="dark")
    assert found["figure"] == json.loads(figure(data, "ntk/spectrum", theme="dark").to_json())
    assert found["steps"] == "linear"
    assert ask.json("/figure", name="ntk/gram")["steps"] == ""
    some = ask.json("/figure", **{"name": "loss/mean", "from": 1, "to": 3})
    part = figure(data.sel(step=slice(1, 3)), "loss/mean")
    assert some["figure"] == json.loads(part.to_json())


def test_what_the_page_has_is_not_sent_again(ask, tmp_path):
    asked = {"name": "loss/mean"}
    digest = ask.json("/figure", **asked)["digest"]
    assert ask(f"/figure?name=loss/mean&have={digest}").status == 204
    state = ask.json("/state")["digest"]
    assert ask(f"/state?have={state}").status == 204
    writer = TraceWriter(tmp_path / "run")
    writer.write([nt.Record("other/number", 9, np.asarray(1.0))], {})
    time.sleep(0.25)  # files are looked at five times a second
    assert ask(f"/state?have={state}").status == 200
    assert ask(f"/figure?name=loss/mean&have={digest}").status == 204  # the same still
    step(writer, 10)
    time.sleep(0.25)
    ask.json("/state")
    assert ask(f"/figure?name=loss/mean&have={digest}").status == 200


def test_several_runs_are_seen_together_and_arrays_of_one(serve, tmp_path):
    for seed in range(3):
        make_run(tmp_path / f"seed-{seed}", seed=seed)
    ask = serve(tmp_path)
    assert [run["label"] for run in ask.json("/state")["runs"]] == ["seed-0", "seed-1", "seed-2"]
    kinds = {one["name"]: one["kind"] for one in ask.json("/figures")["figures"]}
    assert kinds == {"loss/mean": "track", "ntk/spectrum": "spectrum", "ntk/gram": "matrix"}
    names = [t["name"] for t in ask.json("/figure", name="loss/mean")["figure"]["data"]]
    assert names == ["seed-0", "seed-1", "seed-2"]
    two = ask.json("/figure", name="loss/mean", run=["seed-2", "seed-0"])["figure"]["data"]
    assert [t["name"] for t in two] == ["seed-0", "seed-2"]
    one = ask.json("/figure", name="ntk/gram", of="seed-1")["figure"]
    alone = figure(nt.open(tmp_path / "seed-1"), "ntk/gram")
    assert one == json.loads(alone.to_json())
    gone = ask.json("/figure", name="loss/mean", run="seed-9")
    assert "no run 'seed-9'" in gone["problem"]


def test_runs_are_grouped_and_layers_chosen(serve, tmp_path):
    for seed in range(6):
        writer = TraceWriter(
            tmp_path / f"seed-{seed}",
            configuration=json.dumps({"hyperparameters": {"<eta>": seed % 2}}),
        )
        for number in range(3):
            value = np.asarray([seed, number, 2.0])
            layer = {"layer": ["in", HOSTILE, "out"]}
            writer.write(
                [
                    nt.Record("loss/mean", number, np.asarray(float(seed))),
                    nt.Record("weights/norms", number, value, dims=("layer",), coordinates=layer),
                ],
                {},
            )
    ask = serve(tmp_path)
    found = ask.json("/figures")
    assert found["groups"] == ["<eta>"]
    assert found["layers"] == ["in", HOSTILE, "out"]
    names = [
        t["name"] for t in ask.json("/figure", name="loss/mean", group="<eta>")["figure"]["data"]
    ]
    assert "&lt;eta&gt;=1: median, 10 to 90 % of 3 runs" in names
    assert (
        "no run says what its 'depth' is"
        in ask.json("/figure", name="loss/mean", group="depth")["problem"]
    )
    (whole,) = ask.json("/figure", name="weights/norms")["figure"]["data"]
    assert whole["type"] == "heatmap"
    two = ask.json("/figure", name="weights/norms", of="seed-4", layer=["out", HOSTILE])
    assert [t["name"] for t in two["figure"]["data"]] == [
        "&lt;img src=x onerror=alert(1)&gt;",
        "out",
    ]


def test_arrays_are_those_of_the_first_run_that_has_them(serve, tmp_path):
    make_run(tmp_path / "b")
    writer = TraceWriter(tmp_path / "a")
    for number in range(3):
        writer.write([nt.Record("loss/mean", number, np.asarray(1.0))], {})
    ask = serve(tmp_path)
    names = [one["name"] for one in ask.json("/figures", of="a")["figures"]]
    assert {"ntk/gram", "ntk/spectrum", "loss/mean"} == set(names)
    found = ask.json("/figure", name="ntk/gram", of="a")["figure"]
    assert found == json.loads(figure(nt.open(tmp_path / "b"), "ntk/gram").to_json())


def test_hundreds_of_runs_may_be_chosen(serve, tmp_path):
    ask = serve(tmp_path)
    assert ask("/figures?" + "&".join(f"run=run-{i}" for i in range(700))).status == 200


def test_connections_that_say_nothing_are_closed(ask, monkeypatch):
    monkeypatch.setattr(live._Handler, "timeout", 0.3)
    silent = [socket.create_connection(("127.0.0.1", ask.server.server_port)) for _ in range(70)]
    time.sleep(1)
    assert ask("/state").status == 200
    for one in silent:
        one.close()


def test_runs_that_come_later_appear(serve, tmp_path):
    ask = serve(str(tmp_path / "*"), tmp_path / "later")
    (run,) = ask.json("/state")["runs"]
    assert "no such folder" in run["problem"]
    assert "no run that can be read yet" in ask.json("/figure", name="loss/mean")["problem"]
    make_run(tmp_path / "later")
    make_run(tmp_path / "x" / "trace")
    time.sleep(0.25)
    labels = [run["label"] for run in ask.json("/state")["runs"] if run["readable"]]
    assert labels == ["later", "x/trace"]
    shutil.rmtree(tmp_path / "later")
    time.sleep(0.25)
    runs = {run["label"]: run["readable"] for run in ask.json("/state")["runs"]}
    assert list(runs.values()) == [True, False]


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_exported_traces_are_for_reports(serve, tmp_path, suffix):
    pytest.importorskip("h5py" if suffix == ".nc" else "zarr")
    make_run(tmp_path / "run").close()
    nt.export(tmp_path / "run", tmp_path / f"run{suffix}")
    (run,) = serve(tmp_path / f"run{suffix}").json("/state")["runs"]
    assert "nettrace report draws it" in run["problem"]


def spoiled(folder, how):
    writer = make_run(folder)
    (path,) = folder.glob("part-*")
    if how == "newer":
        head = {"format": 99}
        from nettrace.store.frames import MAGIC, encode

        text = json.dumps(head | {"start": None, "continues": None, "rank": 0}).encode()
        path.write_bytes(MAGIC + encode([(b"p", [text], [])], len(MAGIC)))
    elif how == "empty folder":
        path.unlink()
    elif how == "empty file":
        path.write_bytes(b"")
    elif how == "begun":
        path.write_bytes(path.read_bytes()[:30])
    elif how == "being written":
        path.write_bytes(path.read_bytes()[:-7])
    elif how == "damaged":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data)
    elif how == "no trace":
        path.write_bytes(b"something else " * 100)
    elif how == "all missing":
        path.unlink()
        for number in range(3):
            gone = {"missing": "it was too expensive"}
            r = [nt.Record("loss/mean", number, np.asarray(np.nan), **gone)]
            writer.write(r, {})


@pytest.mark.parametrize(
    ("how", "readable", "says"),
    [
        ("newer", False, "install a newer nettrace"),
        ("empty folder", False, "no trace in it"),
        ("empty file", False, "nothing has been recorded yet"),
        ("begun", False, "nothing has been recorded yet"),
        ("being written", True, ""),
        ("damaged", True, "is damaged"),
        ("no trace", False, "no part of a trace"),
        ("all missing", True, ""),
    ],
)
def test_what_is_wrong_with_a_run_is_said_and_others_are_shown(
    serve, tmp_path, how, readable, says
):
    spoiled(tmp_path / "bad", how)
    make_run(tmp_path / "good")
    ask = serve(tmp_path / "bad", tmp_path / "good")
    bad, good = ask.json("/state")["runs"]
    assert bad["readable"] == readable
    assert says in bad["problem"]
    assert bool(bad["problem"]) == bool(says)
    assert good["readable"]
    found = ask.json("/figure", name="loss/mean")["figure"]
    assert found["data"]
    if how == "all missing":
        alone = ask.json("/figure", name="loss/mean", run="bad")["figure"]
        assert "too expensive" in json.dumps(alone["layout"])
        assert ask("/table?name=loss/mean&run=bad").status == 200


def test_names_that_are_code_stay_text(serve, tmp_path):
    for seed, name in enumerate((HOSTILE, SCRIPT, "plain")):
        writer = make_run(tmp_path / name, seed=seed)
        about = {"convention": HOSTILE, "units": "<a href='javascript:alert(1)'>x</a>"}
        labels = {"layer": [HOSTILE, "b"]}
        records = [
            nt.Record("loss/<b>", 5, np.asarray(1.0), attributes=about),
            nt.Record("x/y", 5, np.ones(2), dims=("layer",), coordinates=labels, attributes=about),
            nt.Record("fisher/trace", 5, np.asarray(1.0), attributes=about),
            nt.Record("ntk/entropy", 5, np.asarray(1.0), attributes=about),
        ]
        writer.write(records, {})
    ask = serve(tmp_path)
    runs = ask.json("/state")["runs"]
    assert [run["label"] for run in runs] == sorted([HOSTILE, SCRIPT, "plain"])
    names = [one["name"] for one in ask.json("/figures")["figures"]]
    assert "x/y" in names
    assert "ntk/entropy against fisher/trace" in names
    for name in [*names, "loss/<b>"]:
        text = ask(f"/figure?name={quote(name)}").text
        for tag in re.findall(r"(?:<|\\u003c)/?(\w+)", text):
            assert tag in ("extra", "br", "sup"), (name, tag)
        assert "%{x}&lt;" not in text
    curves = ask.json("/figure", name="loss/mean")["figure"]["data"]
    assert all("<script" not in t["hovertemplate"] + t["name"] for t in curves)
    assert any(HOSTILE in one["folder"] for one in runs)  # as data, which the page sets as text
    csv = ask("/table?name=loss/mean").text
    assert HOSTILE in csv
    assert "'=1+" in csv
    assert "\n=1+" not in csv


def test_tables_hold_what_is_drawn(ask, tmp_path):
    data = nt.open(tmp_path / "run")
    answer = ask("/table?name=loss/mean")
    assert answer.getheader("Content-Disposition") == 'attachment; filename="loss-mean.csv"'
    rows = [line.split(",") for line in answer.text.splitlines()]
    assert rows[0] == ["trace", "step", "x", "y", "z"]
    assert [float(row[1]) for row in rows[1:]] == data.step.values.tolist()
    assert [float(row[3]) for row in rows[1:]] == data.loss_mean.values.tolist()
    gram = [line.split(",") for line in table(figure(data, "ntk/gram")).splitlines()[1:]]
    values = np.array([float(row[4]) for row in gram]).reshape(5, 4, 4)
    np.testing.assert_allclose(values, data.ntk_gram.values, rtol=1e-5)
    assert [row[0] for row in gram[::16]] == ["0", "1", "2", "3", "4"]
    assert [row[2:4] for row in gram[:5]] == [
        ["1", "1"],
        ["2", "1"],
        ["3", "1"],
        ["4", "1"],
        ["1", "2"],
    ]
    assert ask("/table?name=none").status == 404


def test_two_steps_are_compared(ask, tmp_path):
    data = nt.open(tmp_path / "run")
    for rows in (1, 2):
        both = compare(data, "ntk/gram", 1, 3, rows=rows)
        for one, at in zip(both.data, (1, 3), strict=True):
            np.testing.assert_allclose(one.z, data.ntk_gram.sel(step=at), rtol=1e-6)
        assert both.data[0].zmin == both.data[1].zmin <= both.data[1].zmax == both.data[0].zmax
        assert [both.layout.xaxis.title.text, both.layout.xaxis2.title.text] == ["step 1", "step 3"]
    spectra = compare(data, "ntk/spectrum", 0, 99)
    assert [one.name for one in spectra.data] == ["step 0", "step 4"]  # the nearest there is
    np.testing.assert_array_equal(spectra.data[1].y, data.ntk_spectrum[-1])
    assert (spectra.layout.xaxis.type, spectra.layout.yaxis.type) == ("log", "log")
    with pytest.raises(ValueError, match="cannot be compared"):
        compare(data, "loss/mean", 0, 1)
    said = ask("/figure?name=ntk/gram&at=1&at=3")
    assert len(json.loads(said.text)["figure"]["data"]) == 2
    assert "cannot be compared" in ask.json("/figure", name="loss/mean", at=[0, 1])["problem"]


def test_what_is_read_by_then_is_shown(tmp_path, monkeypatch):
    from nettrace.dashboard import following

    for seed in range(3):
        make_run(tmp_path / f"seed-{seed}", seed=seed)
    monkeypatch.setattr(following, "_PATIENCE", 0)
    its = Following([str(tmp_path)])
    for number in range(1, 4):
        its.look()
        runs = sorted(its.runs(), key=lambda run: run.label)
        assert [run.label for run in runs] == ["seed-0", "seed-1", "seed-2"]
        there = 3 if number == 3 else 1  # the rest together
        assert [run.data is not None for run in runs] == [i < there for i in range(3)]
        assert its.data([])["loss_mean"].ndim == (1 if there == 1 else 2)
        assert its.is_reading == (number < 3)
    assert its.data([]).sizes["run"] == 3


def test_only_what_is_new_is_read(tmp_path, monkeypatch):
    from nettrace.dashboard import following

    writer = make_run(tmp_path / "a")
    make_run(tmp_path / "b", seed=1)
    monkeypatch.setattr(following, "_PAUSE", 0)
    opened = []
    dataset = following.dataset
    monkeypatch.setattr(following, "dataset", lambda p, **o: opened.append(p) or dataset(p, **o))
    its = Following([str(tmp_path)])
    its.look()
    a, b = its.runs()
    its.look()
    assert its.runs() == [a, b]
    assert len(opened) == 2
    together = its.data([])
    assert its.data([]) is together
    step(writer, 7)
    its.look()
    again = its.runs()
    assert again[1].data is b.data
    assert again[0].version != a.version
    assert again[0].data.step.values[-1] == 7
    assert [p for p in opened[2:] if not isinstance(p, list)] == [tmp_path / "a"]
    assert its.data([]).step.values[-1] == 7
    assert its.data(["b"]) is again[1].data

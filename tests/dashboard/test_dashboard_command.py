"""`nettrace dashboard`: where it serves, what it prints, how it ends."""

import functools
import json
import signal
import socket
import subprocess
import sys
import urllib.request

import numpy as np
import pytest

import nettrace as nt
from nettrace.cli import main
from nettrace.store import TraceWriter

pytest.importorskip("plotly", reason="the live page needs plotly")

from nettrace.dashboard.live import LiveServer


@pytest.fixture
def folder(tmp_path):
    TraceWriter(tmp_path / "run").write([nt.Record("a/b", 0, np.asarray(1.0))], {})
    return tmp_path / "run"


@pytest.fixture
def interrupted(monkeypatch):
    """Serves until it is interrupted, at once; what browsers were told to open."""
    opened = []

    def serve(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(LiveServer, "serve_forever", serve)
    monkeypatch.setattr("webbrowser.open", opened.append)
    return opened


def test_the_address_is_printed_and_an_interrupt_ends_it_quietly(folder, interrupted, capsys):
    assert main(["dashboard", str(folder), "--no-browser"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("http://127.0.0.1:")
    assert "/?token=" in out
    assert err.strip() == ""
    assert main(["dashboard", str(folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert f":{said['port']}/?token=" in said["address"]
    assert interrupted == []


def test_a_port_that_cannot_be_had_is_said(folder, interrupted, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["dashboard", str(folder), "--port", str(port)]) == 1
    assert f"port {port} cannot be had" in capsys.readouterr().err
    assert main(["dashboard", str(folder), "--port", "70000"]) == 1
    assert "from 0 to 65535, got 70000" in capsys.readouterr().err


def test_runs_and_known_options_are_needed(capsys):
    for line in (["dashboard"], ["dashboard", "x", "--host", "0.0.0.0"]):
        with pytest.raises(SystemExit, match="2"):
            main(line)


def test_plotly_is_named_where_it_is_missing(folder, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["dashboard", str(folder)]) == 1
    assert "pip install nettrace[dashboard]" in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_serves_and_ends_by_ctrl_c(folder):
    command = [sys.executable, "-m", "nettrace.cli", "dashboard", str(folder), "--no-browser"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # What runs in the background, as CI may, ignores the signal, and so does what it starts.
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, preexec_fn=heeds, **pipes) as process:
        try:
            address = process.stdout.readline().strip()
            with urllib.request.urlopen(address.replace("/?", "/state?"), timeout=30) as answer:
                assert json.load(answer)["runs"][0]["records"] == 1
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
            assert process.stderr.read().strip() == ""
        finally:
            process.kill()

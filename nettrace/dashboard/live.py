"""A page on this machine that follows runs while they train; it reads, and never writes.

Requests come from the browser of whoever has the token: it is in the address that is opened first,
then in a cookie. Others get nothing, be they other users of the machine, pages of other origins, or
names that were made to point here.
"""

from __future__ import annotations

import gzip
import hashlib
import hmac
import json
import re
import secrets
import socketserver
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any, get_args
from urllib.parse import parse_qs

import plotly
import plotly.graph_objects as go
import xarray as xr

from nettrace.dashboard.comparison import COMPARED, compare
from nettrace.dashboard.following import Following
from nettrace.dashboard.runs import differing, grouped
from nettrace.dashboard.style import STEPS, Theme
from nettrace.dashboard.tables import table
from nettrace.dashboard.views import arrays, by_layer, figure, figures, is_pair, kind_of, layers

HOST = "127.0.0.1"
#: What a request may have, at most: characters, parameters, and characters in each of these.
_LONG, _MANY, _WIDE = 60_000, 2048, 1000
#: How many figures are kept, and how many connections served at a time.
_KEPT, _CONNECTIONS = 64, 64
#: How long a page that is opened is given for its first figure, in seconds.
_FIRST = 2.0
#: Names of this machine. The port may be another, as through a tunnel.
_NAMES = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE)
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_FIGURE = {"name", "run", "of", "group", "layer", "theme", "from", "to", "at", "rows"}
#: Parameters that may be there several times.
_SEVERAL = ("run", "layer", "at")
Parameters = Mapping[str, Sequence[str]]


class RequestError(Exception):
    """A request that is refused; the status says how, the text why."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class LiveServer(ThreadingHTTPServer):
    """Serves the page of some runs, on the loopback interface alone.

    Args:
        paths: as for `Following`.
        port: where; 0 for any that is free.

    Raises:
        OSError: if the port is taken.
    """

    daemon_threads = True

    def __init__(self, paths: Sequence[str], port: int = 0) -> None:
        self.token = secrets.token_urlsafe(32)
        self.following = Following(paths)
        self._free = threading.BoundedSemaphore(_CONNECTIONS)
        self._turn = threading.Lock()
        self._figures: OrderedDict[tuple[Any, ...], go.Figure | str] = OrderedDict()
        super().__init__((HOST, port), _Handler)
        self._prepared = threading.Event()
        #: Until when no more is read, so that a page that was opened has its first figure soon.
        self.awaited_until = 0.0
        # What is read quickly is there when the browser is, and the rest soon.
        self.following.look()
        threading.Thread(target=self._prepare, daemon=True).start()

    @property
    def address(self) -> str:
        """The page's, with the token."""
        return f"http://{HOST}:{self.server_port}/?token={self.token}"

    @property
    def cookie(self) -> str:
        """The name of its cookie: browsers send those of other ports too."""
        return f"nettrace_{self.server_port}"

    def server_bind(self) -> None:
        """Binds without asking the network for this machine's name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Takes a connection, if there are not too many."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serves a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Browsers that go away are no news."""

    def state(self) -> dict[str, Any]:
        """Which runs there are, and how far they have come."""
        if self._prepared.is_set():
            self.following.look()
        runs = []
        for run in self.following.runs():
            count = 0 if run.data is None else run.data.sizes["step"]
            ends = [] if run.data is None else run.data["step"].values[[0, -1]].tolist()
            runs.append(
                {
                    "label": run.label,
                    "folder": str(run.folder).encode("utf-8", "backslashreplace").decode(),
                    "version": run.version,
                    "problem": run.problem,
                    "readable": run.data is not None,
                    "records": count,
                    "first": ends[0] if ends else None,
                    "last": ends[-1] if ends else None,
                }
            )
        return {"runs": runs}

    def named(self, asked: Parameters) -> dict[str, Any]:
        """The figures of some runs, and what there is to choose for them.

        Of several runs, arrays are those of one of them.
        """
        data = self.following.data(asked.get("run", ()))
        names = [*figures(data), *(arrays(data) if "run" in data.dims else ())]
        found = {name: kind_of(data, name) for name in names}
        named = [
            {"name": name, "kind": kind, "compared": kind in COMPARED}
            for name, kind in sorted(found.items(), key=lambda one: (one[1] == "pair", one[0]))
        ]
        return {"figures": named, "groups": differing(data), "layers": layers(data)}

    def drawn(self, asked: Parameters) -> go.Figure | str:
        """A figure, or why there is none."""
        versions = tuple(run.version for run in self.following.runs())
        key = (versions, *((name, tuple(asked[name])) for name in sorted(_FIGURE & set(asked))))
        with self._turn:
            if key not in self._figures:
                try:
                    self._figures[key] = self._draw(asked)
                except RequestError:
                    raise
                except Exception as error:  # whatever is in the files, the others are shown
                    text = error.args[0] if isinstance(error, KeyError) else error
                    return f"it cannot be drawn: {text}"
            self._figures.move_to_end(key)
            while len(self._figures) > _KEPT:
                self._figures.popitem(last=False)
            return self._figures[key]

    def _draw(self, asked: Parameters) -> go.Figure:
        name = asked["name"][0]
        theme: Theme = "dark" if asked.get("theme") == ["dark"] else "light"
        data = self.following.data(asked.get("run", ()))
        if "run" in data.dims and name in arrays(data):
            data = self._alone(asked, name)
        at = [_whole(text) for text in asked.get("at", ())]
        if at:
            rows = 2 if asked.get("rows") == ["2"] else 1
            return compare(data, name, at[0], at[-1], theme=theme, rows=rows)
        if "from" in asked or "to" in asked:
            first, last = (_whole(asked[k][0]) if k in asked else None for k in ("from", "to"))
            data = data.sel(step=slice(first, last))
            if not data.sizes["step"]:
                raise ValueError(f"nothing was recorded from step {first} to {last}")
        groups = None
        if "run" in data.dims:
            groups = grouped(data, asked["group"][0]) if asked.get("group") else None
        elif not is_pair(data, name):
            data = by_layer(data, name, asked.get("layer", ()))
        return figure(data, name, theme=theme, groups=groups)

    def _alone(self, asked: Parameters, name: str) -> xr.Dataset:
        """The run whose array is shown: that which is asked for, or the first that has it."""
        runs = [*asked.get("of", ()), *asked.get("run", self.following.readable())]
        each = (self.following.data([run]) for run in runs)
        first = self.following.data(runs[:1])
        return next((data for data in each if name in figures(data)), first)

    def _prepare(self) -> None:
        try:
            _plotly()
            while self.following.is_reading:
                time.sleep(0.05)  # lets requests have their turn
                if time.monotonic() > self.awaited_until:
                    self.following.look()
        finally:
            self._prepared.set()


def _whole(text: str) -> int:
    if not re.fullmatch(r"-?\d{1,18}", text):
        raise RequestError(400, "expected a step to be a whole number")
    return int(text)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "nettrace", ""
    timeout = 5  # of connections that say nothing: browsers open new ones
    server: LiveServer

    def do_GET(self) -> None:
        """Answers; what goes wrong is said in a line."""
        try:
            path, asked = self._checked()
            _ROUTES[path][0](self, asked)
        except RequestError as error:
            self._send(error.status, f"{error}\n".encode(), "text/plain; charset=utf-8")
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            text = f"this went wrong: {type(error).__name__}: {error}\n"
            self._send(500, text.encode("utf-8", "replace"), "text/plain; charset=utf-8")

    do_HEAD = do_GET

    def refuse(self) -> None:
        """Answers those who want to change something."""
        self.close_connection = True
        self._send(405, b"it only reads: GET and HEAD\n", "text/plain", {"Allow": "GET, HEAD"})

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = refuse

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing; addresses have the token in them."""

    def end_headers(self) -> None:
        """Ends them with what every answer has."""
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def _checked(self) -> tuple[str, dict[str, list[str]]]:
        """The route that is asked for, and with what.

        Raises:
            RequestError: if it is refused.
        """
        if "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0":
            self.close_connection = True
            raise RequestError(413, "requests have no body")
        if len(self.path) > _LONG:
            raise RequestError(414, f"an address has at most {_LONG:,} characters")
        host, origin = self.headers.get_all("Host", []), self.headers.get("Origin")
        if len(host) != 1 or not _NAMES.fullmatch(host[0]):
            raise RequestError(403, "this page is reached as 127.0.0.1 or localhost alone")
        if origin is not None and origin.lower() != f"http://{host[0].lower()}":
            raise RequestError(403, "pages of other origins may not read this one")
        split = self.path.split("?", 1)
        path, query = split[0], split[1] if len(split) > 1 else ""
        try:
            asked = parse_qs(query, keep_blank_values=True, max_num_fields=_MANY, errors="strict")
        except ValueError as error:
            raise RequestError(400, f"too many parameters, or no text: {error}") from error
        given = asked.pop("token", [])
        foreign = self.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site")
        if foreign and not (path == "/" and given):
            raise RequestError(403, "pages of other origins may not read this one")
        if not self._may(given):
            raise RequestError(
                403, "open the address that nettrace dashboard printed, with its token"
            )
        if path not in _ROUTES:
            raise RequestError(404, "there is nothing here")
        if unknown := set(asked) - _ROUTES[path][1]:
            raise RequestError(400, f"unknown parameters: {', '.join(sorted(unknown))[:80]!r}")
        if any(len(value) > _WIDE for values in asked.values() for value in values):
            raise RequestError(400, f"a parameter has at most {_WIDE:,} characters")
        many = [name for name in asked if name not in _SEVERAL and len(asked[name]) > 1]
        if many or len(asked.get("at", ())) > 2:
            raise RequestError(400, "one figure at a time, of at most two steps")
        if asked.get("theme", ["light"])[0] not in get_args(Theme):
            raise RequestError(400, f"expected a theme of {get_args(Theme)}")
        return path, asked

    def _may(self, given: Sequence[str]) -> bool:
        try:
            cookies = SimpleCookie(self.headers.get("Cookie", "")[:_LONG])
        except CookieError:
            cookies = SimpleCookie()
        found = cookies.get(self.server.cookie)
        tokens = [*given[:1], *([found.value] if found else [])]
        own = self.server.token.encode()
        return any(hmac.compare_digest(one.encode("utf-8", "replace"), own) for one in tokens)

    def page(self, asked: Parameters) -> None:
        """The page; the token becomes a cookie."""
        self.server.awaited_until = time.monotonic() + _FIRST
        text = _asset("live.html").replace(b"PLOTLY_VERSION", plotly.__version__.encode())
        cookie = f"{self.server.cookie}={self.server.token}; HttpOnly; SameSite=Strict; Path=/"
        self._send(200, text, "text/html; charset=utf-8", {"Set-Cookie": cookie})

    def script(self, asked: Parameters) -> None:
        """What the page does."""
        self._send(200, _asset("live.js"), "text/javascript; charset=utf-8")

    def styles(self, asked: Parameters) -> None:
        """How it looks."""
        self._send(200, _asset("live.css"), "text/css; charset=utf-8")

    def plotly(self, asked: Parameters) -> None:
        """Plotly, which the browser keeps."""
        headers = {"Cache-Control": "private, max-age=31536000, immutable"}
        plain, zipped = _plotly()
        if self._takes_gzip():
            plain, headers["Content-Encoding"] = zipped, "gzip"
        self._send(200, plain, "text/javascript; charset=utf-8", headers)

    def state(self, asked: Parameters) -> None:
        """Which runs there are."""
        self._send_json(asked, json.dumps(self.server.state()))

    def figures(self, asked: Parameters) -> None:
        """Which figures some runs have."""
        try:
            self._send_json(asked, json.dumps(self.server.named(asked)))
        except (KeyError, ValueError) as error:
            self._send_json(asked, json.dumps({"problem": str(error.args[0])}))

    def figure(self, asked: Parameters) -> None:
        """One figure."""
        found = self._drawn(asked)
        self.server.awaited_until = 0.0
        if isinstance(found, str):
            self._send_json(asked, json.dumps({"problem": found}))
            return
        title = found.layout.xaxis.title.text or ""
        kind = "" if not title.startswith(STEPS) else "log" if title != STEPS else "linear"
        try:
            text = found.to_json(engine="json")
        except TypeError as error:  # of what JSON does not have
            self._send_json(asked, json.dumps({"problem": f"it cannot be drawn: {error}"}))
            return
        self._send_json(asked, f'{{"steps":"{kind}","figure":{text}}}')

    def table(self, asked: Parameters) -> None:
        """What a figure shows, as CSV."""
        found = self._drawn(asked)
        if isinstance(found, str):
            raise RequestError(404, found)
        name = re.sub(r"[^A-Za-z0-9]+", "-", asked["name"][0]).strip("-")[:80]
        headers = {"Content-Disposition": f'attachment; filename="{name}.csv"'}
        text = table(found).encode("utf-8", "backslashreplace")
        self._send(200, text, "text/csv; charset=utf-8", headers)

    def _drawn(self, asked: Parameters) -> go.Figure | str:
        if not asked.get("name"):
            raise RequestError(400, "which figure? Give name=...")
        return self.server.drawn(asked)

    def _send_json(self, asked: Parameters, text: str) -> None:
        """Sends it with a digest, unless the page has it."""
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        if asked.get("have") == [digest]:
            self._send(204, b"", None)
            return
        self._send(200, f'{{"digest":"{digest}",{text[1:]}'.encode(), "application/json")

    def _send(
        self, status: int, body: bytes, kind: str | None, headers: Mapping[str, str] | None = None
    ) -> None:
        headers = {"Cache-Control": "no-store", **(headers or {})}
        if len(body) > 2000 and "Content-Encoding" not in headers and self._takes_gzip():
            body, headers["Content-Encoding"] = gzip.compress(body, 1), "gzip"
        self.send_response(status)
        if kind is not None:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _takes_gzip(self) -> bool:
        return "gzip" in self.headers.get("Accept-Encoding", "")


_Route = tuple[Callable[[_Handler, Parameters], None], set[str]]
#: What there is, and which parameters it takes.
_ROUTES: dict[str, _Route] = {
    "/": (_Handler.page, set()),
    "/live.js": (_Handler.script, set()),
    "/live.css": (_Handler.styles, set()),
    "/plotly.js": (_Handler.plotly, {"v"}),
    "/state": (_Handler.state, {"have"}),
    "/figures": (_Handler.figures, {"run", "of", "have"}),
    "/figure": (_Handler.figure, {*_FIGURE, "have"}),
    "/table": (_Handler.table, _FIGURE),
}


@cache
def _asset(name: str) -> bytes:
    return (resources.files("nettrace.dashboard") / "assets" / name).read_bytes()


@cache
def _plotly() -> tuple[bytes, bytes]:
    from plotly.offline import get_plotlyjs

    plain = get_plotlyjs().encode()
    return plain, gzip.compress(plain, 6)

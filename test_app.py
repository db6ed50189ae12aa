"""The specification of Onefile Tasks: what app.py promises, in the order of its sections.

Run    .venv/bin/pytest                    everything, in under 90 seconds
       .venv/bin/pytest -k live            what has "live" in its name

How it is done
   Every test talks HTTP, WebSocket or SSE to a real uvicorn on a free port, with a database of its own.
   The clock is set by hand (`clock`), so "30 days later" takes no time. Nothing sleeps: a test waits
   for the event, and polls with a deadline where there is none.
   "Exactly one of N wins" is proved by threads that all start at one barrier (`together`).
   Rate limits are off, except in tests that ask for `rate_limits`.

Notation
   alice, bob, admin   people who are logged in: HTTP clients whose base is /api/v1
   anonymous           the same, not logged in
   task                a task as the API answers it, a dict
"""

import ast
import asyncio
import base64
import contextlib
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import bcrypt
import fastapi.routing
import httpx
import jwt
import limits
import pydantic
import pytest
import sqlalchemy as sa
import uvicorn
import websockets.exceptions
import websockets.sync.client
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

import app

pytestmark = pytest.mark.filterwarnings("error")

HERE = Path(__file__).resolve().parent
SOURCE = Path(app.__file__).read_text(encoding="utf-8")
PASSWORD = "correct horse battery staple"
ADMIN_PASSWORD = "a long password of the admin"
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Nothing here speaks TLS; loading the default certificates for each client would cost 20 ms."""
DEADLINE = 10.0
"""Seconds that anything may take before a test gives up."""
ROOT = "/../.."
"""`ROOT + "/health"` leads out of /api/v1, the base of every person."""
NO_MORE = (websockets.exceptions.ConnectionClosed, httpx.RemoteProtocolError, httpx.ReadError)

# ── 0 Tools ─────────────────────────────────────────────────────────────────────────────────────
# A server that starts in 30 ms and stops at once, people who talk to it, and a clock.


class Clock:
    """The app's clock, set by hand."""

    def __init__(self) -> None:
        self.moment = datetime(2026, 1, 15, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.moment

    def advance(self, **duration: float) -> None:
        """Let time pass: `advance(days=30)`."""
        self.moment += timedelta(**duration)


class Person(httpx.Client):
    """Somebody with an HTTP client, and once logged in with `tokens` and a `user`."""

    def __init__(self, server: "Server", name: str = "", password: str = PASSWORD, **options: Any) -> None:
        unlimited = httpx.Limits(max_connections=None)
        super().__init__(
            base_url=server.url + app.API, verify=NO_TLS, trust_env=False, timeout=DEADLINE, limits=unlimited, **options
        )
        self.server, self.name, self.password = server, name, password
        self.tokens: dict[str, Any] = {}
        self.user: dict[str, Any] = {}

    def accept(self, answer: httpx.Response) -> "Person":
        """Carry the tokens of this answer from now on."""
        assert answer.is_success, answer.text
        self.tokens = answer.json()
        self.headers["Authorization"] = f"Bearer {self.tokens['access_token']}"
        self.user = self.tokens.get("user") or self.get("/users/me").json()
        return self

    def register(self) -> "Person":
        return self.accept(self.post("/auth/register", json={"username": self.name, "password": self.password}))

    def log_in(self) -> "Person":
        return self.accept(self.post("/auth/login", json={"username": self.name, "password": self.password}))

    def again(self) -> "Person":
        """The same person with a second session, in another browser."""
        return self.server.person(self.name, self.password).log_in()

    def refresh(self, token: str | None = None) -> httpx.Response:
        return self.post("/auth/refresh", json={"refresh_token": token or self.tokens["refresh_token"]})

    def create(self, title: str = "Buy milk", **fields: Any) -> dict[str, Any]:
        """A new task."""
        return good(self.post("/tasks", json={"title": title} | fields), 201).json()

    def edit(self, task: dict[str, Any], **fields: Any) -> dict[str, Any]:
        """The task after a PATCH."""
        return good(self.patch(f"/tasks/{task['id']}", json=fields)).json()

    def trash(self, *tasks: dict[str, Any]) -> None:
        for task in tasks:
            good(self.delete(f"/tasks/{task['id']}"), 204)

    def titles(self, **query: Any) -> list[str]:
        """The titles that GET /tasks shows, in its order."""
        return [task["title"] for task in good(self.get("/tasks", params=query)).json()["data"]]

    def all_tasks(self) -> dict[int, dict[str, Any]]:
        """Every task of GET /tasks, page after page, by id."""
        found: dict[int, dict[str, Any]] = {}
        for page in itertools.count(1):
            answer = good(self.get("/tasks", params={"page": page, "page_size": 100})).json()
            found |= {task["id"]: task for task in answer["data"]}
            if page >= answer["meta"]["pages"]:
                return found
        raise AssertionError

    def seq(self) -> int:
        """Where this person's counter stands."""
        with self.socket("seq") as live:
            return live.hello["seq"]

    @contextlib.contextmanager
    def socket(self, client_id: str = "tab", since: int | None = None, **options: Any) -> Iterator["Live"]:
        """A WebSocket that has said hello."""
        query = "" if since is None else f"?since={since}"
        headers = {"Authorization": self.headers.get("Authorization", "")}
        with self.server.socket(f"{client_id}{query}", additional_headers=headers, **options) as live:
            live.hello = live.frame()
            assert live.hello["type"] == "hello"
            yield live

    @contextlib.contextmanager
    def events(self, since: int | None = None, **headers: str) -> Iterator["Events"]:
        """An open Server-Sent Events stream."""
        query = {} if since is None else {"since": since}
        with self.stream("GET", "/tasks/events", params=query, headers=headers) as answer:
            assert answer.status_code == 200, answer.read()
            live = Events(answer)
            yield live


class Live:
    """The client's end of a WebSocket."""

    hello: dict[str, Any]

    def __init__(self, connection: websockets.sync.client.ClientConnection) -> None:
        self.connection = connection

    def frame(self) -> dict[str, Any]:
        """The next frame."""
        return json.loads(self.connection.recv(timeout=DEADLINE))

    def frames(self, count: int) -> list[dict[str, Any]]:
        return [self.frame() for _ in range(count)]

    def until(self, title: str) -> list[dict[str, Any]]:
        """Every frame up to the one about the task of this title."""
        return list(up_to(title, iter(self.frame, None)))

    def close_code(self) -> int:
        """The code that the server closes with, whatever comes before."""
        with pytest.raises(websockets.exceptions.ConnectionClosed):
            while True:
                self.connection.recv(timeout=DEADLINE)
        return self.connection.close_code or 0


class Events:
    """The client's end of an SSE stream: dicts of `event`, `id`, `data`, `comment`."""

    def __init__(self, answer: httpx.Response) -> None:
        self.answer = answer
        self.blocks = self.parse(answer.iter_text())
        self.first = next(self.blocks)

    @staticmethod
    def parse(chunks: Iterator[str]) -> Iterator[dict[str, str]]:
        """Split at blank lines and colons, as the HTML standard says."""
        buffered = ""
        for chunk in chunks:
            *blocks, buffered = re.split(r"(?:\r?\n){2}", buffered + chunk)
            for block in blocks:
                fields = (line.partition(":") for line in re.split(r"\r?\n", block))
                yield {name or "comment": value.removeprefix(" ") for name, _, value in fields}

    def frame(self) -> dict[str, Any]:
        """The JSON of the next event."""
        return json.loads(next(block for block in self.blocks if "data" in block)["data"])

    def frames(self, count: int) -> list[dict[str, Any]]:
        return [self.frame() for _ in range(count)]

    def until(self, title: str) -> list[dict[str, Any]]:
        """Every frame up to the one about the task of this title."""
        return list(up_to(title, iter(self.frame, None)))

    def end(self) -> None:
        """Wait until the server ends the stream."""
        with contextlib.suppress(*NO_MORE):
            for _ in self.blocks:
                pass


def up_to(title: str, frames: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for frame in frames:
        yield frame
        if frame.get("task", {}).get("title") == title:
            return


class Uvicorn(uvicorn.Server):
    """A uvicorn that says when it listens, and stops when told instead of at its next tick."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = threading.Event()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        self.loop, self.told_to_stop = asyncio.get_running_loop(), asyncio.Event()
        self.listening.set()
        await self.told_to_stop.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drop the connections; ending them politely is tested on a process of its own in section 10."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        if self.server_state.tasks:
            _, stuck = await asyncio.wait(self.server_state.tasks, timeout=DEADLINE)
            assert not stuck, stuck
        await self.lifespan.shutdown()


class Server:
    """The app, served on a free port from a thread."""

    def __init__(self, application: Any = app.app) -> None:
        config = uvicorn.Config(
            application, port=0, lifespan="on", ws_max_size=64 * 1024, proxy_headers=False, log_config=None
        )
        self.uvicorn, self.failure, self.closing = Uvicorn(config), None, contextlib.ExitStack()
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()
        assert self.uvicorn.listening.wait(DEADLINE)
        if self.failure:
            raise self.failure
        self.port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def serve(self) -> None:
        try:
            self.uvicorn.run()
        except SystemExit as failure:
            self.failure = RuntimeError(f"the server did not start: {failure}")
        finally:
            self.uvicorn.listening.set()

    def stop(self) -> None:
        self.closing.close()
        if self.thread.is_alive():
            self.uvicorn.loop.call_soon_threadsafe(self.uvicorn.told_to_stop.set)
            self.thread.join(DEADLINE)
            assert not self.thread.is_alive()

    def person(self, name: str = "", password: str = PASSWORD, **options: Any) -> Person:
        return self.closing.enter_context(Person(self, name, password, **options))

    @contextlib.contextmanager
    def socket(self, client_id: str, **options: Any) -> Iterator[Live]:
        """A WebSocket, before any hello."""
        url = f"ws://127.0.0.1:{self.port}/ws/tasks/{client_id}"
        options = {"proxy": None, "compression": None, "max_queue": None, "ping_interval": None} | options
        with websockets.sync.client.connect(url, **options) as connection:
            yield Live(connection)

    def raw(self, request: bytes) -> bytes:
        """Send these bytes on a new connection, and read to its end."""
        with socket.create_connection(("127.0.0.1", self.port), DEADLINE) as connection:
            connection.sendall(request)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def sql(self, *statements: Any) -> list[Any]:
        """Run statements in one write transaction, as another process might; rows of the last one."""

        async def execute() -> list[Any]:
            async with app.database.write() as db:
                results = [await db.execute(sa.text(it) if isinstance(it, str) else it) for it in statements]
                return list(results[-1]) if results[-1].returns_rows else []

        return self.run(execute())

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine of the app in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.uvicorn.loop).result(DEADLINE)


def good(answer: httpx.Response, status: int = 200) -> httpx.Response:
    """The answer, if it has this status."""
    assert answer.status_code == status, f"{answer.status_code} {answer.text}"
    return answer


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error inside, if the answer has this status."""
    return good(answer, status).json()["error"]


def together(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Do `work(0)` … `work(count - 1)`, each in its own thread, all starting at one moment."""
    barrier = threading.Barrier(count)

    def run(number: int) -> Any:
        barrier.wait(DEADLINE)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def eventually(condition: Callable[[], Any]) -> Any:
    """The first true value of a condition that no event announces."""
    deadline = time.monotonic() + DEADLINE
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never happened"
        threading.Event().wait(0.005)
    return value


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(app, "now", clock)
    return clock


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Change settings for one test; it starts from the defaults, whatever the environment says."""
    for name in app.Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)

    def change(**values: Any) -> None:
        changed = app.Settings(_env_file=None, **values)  # type: ignore[call-arg]
        for name in values:
            monkeypatch.setattr(app.settings, name, getattr(changed, name))

    defaults = app.Settings(_env_file=None)  # type: ignore[call-arg]
    for name in app.Settings.model_fields:
        monkeypatch.setattr(app.settings, name, getattr(defaults, name))
    change(data_dir=tmp_path / "data", admin_password=ADMIN_PASSWORD, rate_limits="off")
    monkeypatch.setattr(app, "BCRYPT_COST", 4)
    monkeypatch.setattr(app, "POLL_SECONDS", 0.05)
    return change


@pytest.fixture
def start(configure: Callable[..., None], clock: Clock) -> Iterator[Callable[..., Server]]:
    """Start servers; the test's end stops them."""
    del configure, clock
    started: list[Server] = []

    def another(application: Any = app.app) -> Server:
        started.append(Server(application))
        return started[-1]

    yield another
    for server in started:
        server.stop()


@pytest.fixture
def server(start: Callable[..., Server]) -> Server:
    return start()


@pytest.fixture
def anonymous(server: Server) -> Person:
    return server.person()


@pytest.fixture
def alice(server: Server) -> Person:
    return server.person("alice").register()


@pytest.fixture
def bob(server: Server) -> Person:
    return server.person("bob").register()


@pytest.fixture
def admin(server: Server) -> Person:
    return server.person("admin", ADMIN_PASSWORD).log_in()


@pytest.fixture
def rate_limits(configure: Callable[..., None]) -> Callable[..., None]:
    """Rate limits are on, with nothing counted yet. Call it to change them: `rate_limits(login="2/minute")`."""

    def change(**amounts: str) -> None:
        configure(rate_limits="on", **{f"rate_limit_{name}": amount for name, amount in amounts.items()})

    app.limiter.limiter.storage.reset()
    change()
    return change


# ── 2 Errors ────────────────────────────────────────────────────────────────────────────────────
# One envelope for every error, whoever noticed it, and nothing in it that the caller sent.

JSON = {"Content-Type": "application/json"}
SENT = "canary-7f3a"
"""Appears in no answer, wherever it was sent."""


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "code"),
    [
        pytest.param("GET", "/nowhere", {}, 404, "not_found", id="unknown-path"),
        pytest.param("GET", ROOT + "/nowhere", {}, 404, "not_found", id="unknown-path-outside-the-api"),
        pytest.param("PATCH", "/tasks", {}, 405, "method_not_allowed", id="wrong-method"),
        pytest.param("PROPFIND", "/tasks", {}, 405, "method_not_allowed", id="unknown-method"),
        pytest.param("POST", "/tasks", {"content": "{", "headers": JSON}, 400, "invalid_json", id="broken-json"),
        pytest.param("POST", "/tasks", {"content": b'{"title":"\xff"}', "headers": JSON}, 400, None, id="broken-utf8"),
        pytest.param("POST", "/tasks", {"json": {"title": ""}}, 422, "validation_failed", id="invalid-field"),
        pytest.param("POST", "/tasks", {"json": []}, 422, "validation_failed", id="not-an-object"),
        pytest.param("POST", "/tasks", {}, 422, "validation_failed", id="no-body"),
        pytest.param("GET", "/tasks?page=0", {}, 422, "validation_failed", id="invalid-query"),
        pytest.param("GET", "/tasks?colour=red", {}, 422, "validation_failed", id="unknown-query"),
        pytest.param("GET", "/tasks/0", {}, 422, "validation_failed", id="id-that-is-no-id"),
        pytest.param("GET", "/tasks/7", {}, 404, "task_not_found", id="no-such-task"),
        pytest.param("DELETE", "/auth/sessions/77", {}, 404, "session_not_found", id="no-such-session"),
        pytest.param("GET", "/admin/users", {}, 403, "admin_required", id="not-an-admin"),
        pytest.param("GET", "/tasks/changes?since=99", {}, 410, "resync_required", id="cursor-from-nowhere"),
        pytest.param("POST", "/tasks", {"content": "title=x"}, 415, "unsupported_media_type", id="no-content-type"),
        pytest.param("POST", "/tasks", {"data": {"title": "x"}}, 415, "unsupported_media_type", id="a-form"),
        pytest.param("POST", "/auth/token", {"json": {}}, 415, "unsupported_media_type", id="json-where-a-form-is-due"),
        pytest.param("POST", "/tasks", {"json": {"title": "x" * 70_000}}, 413, "body_too_large", id="large-body"),
        pytest.param(
            "POST",
            "/auth/login",
            {"json": {"username": "alice", "password": "x"}},
            401,
            "invalid_credentials",
            id="login",
        ),
        pytest.param(
            "POST", "/auth/refresh", {"json": {"refresh_token": "x"}}, 401, "invalid_refresh_token", id="refresh"
        ),
    ],
)
def test_every_error_has_one_envelope(alice, method, path, options, status, code):
    answer = alice.request(method, path, **options)
    error = error_of(answer, status)
    assert error["code"] == (code or error["code"])
    assert error.keys() == {"code", "message", "request_id"} | ({"details"} if status == 422 else set())
    assert error["message"]
    assert error["request_id"] == answer.headers["X-Request-ID"]
    assert answer.headers["Content-Type"] == "application/json"


def test_422_names_every_refused_field(alice):
    answer = alice.post("/tasks", json={"title": " ", "priority": "urgent", "due_date": "soon"})
    details = error_of(answer, 422)["details"]
    assert [detail["field"] for detail in details] == ["title", "priority", "due_date"]
    assert all(detail.keys() == {"field", "message"} and detail["message"] for detail in details)


@pytest.mark.parametrize(
    ("path", "allow"),
    [
        ("/tasks", "GET, HEAD, POST"),
        ("/tasks/", "GET, HEAD, POST"),
        ("/tasks/7", "DELETE, GET, HEAD, PATCH, PUT"),
        ("/auth/login", "POST"),
        ("/users/me", "DELETE, GET, HEAD, PATCH"),
        (ROOT + "/health", "GET, HEAD"),
    ],
)
@pytest.mark.parametrize("method", ["OPTIONS", "TRACE", "PROPFIND"])
def test_405_lists_every_method_that_works(alice, method, path, allow):
    answer = alice.request(method, path)
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["Allow"] == allow


def test_a_body_may_have_64_kib(alice):
    padding = " " * (64 * 1024 - len('{"title":"x"}'))
    good(alice.post("/tasks", content='{"title":"x"}' + padding, headers=JSON), 201)
    assert error_of(alice.post("/tasks", content='{"title":"x"}' + padding + " ", headers=JSON), 413)["message"]


def test_a_chunked_body_without_end_is_cut_off(server, alice):
    head = f"POST /api/v1/tasks HTTP/1.1\r\nHost: x\r\nAuthorization: {alice.headers['Authorization']}\r\n"
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    with socket.create_connection(("127.0.0.1", server.port), DEADLINE) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        connection.setblocking(False)
        answer, sent = b"", 0
        while not answer:
            with contextlib.suppress(BlockingIOError, ConnectionError):
                sent += connection.send(chunk)
            with contextlib.suppress(BlockingIOError):
                answer = connection.recv(65536)
            assert sent < 64 * 1024 * 1024
    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", "APPLICATION/JSON"])
def test_json_is_read_under_its_usual_names(alice, content_type):
    good(alice.post("/tasks", content='{"title": "x"}', headers={"Content-Type": content_type}), 201)


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/xml", "json", "multipart/form-data", "\xff"])
def test_415_tells_how_to_send_json(alice, content_type):
    answer = alice.post("/tasks", content='{"title": "x"}', headers={"Content-Type": content_type.encode("latin-1")})
    assert "curl --json" in error_of(answer, 415)["message"]


def test_401_says_how_to_authenticate(anonymous):
    answer = anonymous.get("/tasks")
    assert error_of(answer, 401)["code"] == "not_authenticated"
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_a_failure_is_a_500_that_tells_nothing(alice, monkeypatch, capsys):
    def fail() -> None:
        raise RuntimeError(SENT)

    monkeypatch.setattr(app.database, "read", fail)
    answer = alice.get("/tasks", headers={"X-Request-ID": "mine"})
    assert error_of(answer, 500)["code"] == "internal_error"
    assert answer.json()["error"]["request_id"] == answer.headers["X-Request-ID"] == "mine"
    assert SENT not in answer.text


@pytest.mark.parametrize("path", ["/tasks", ROOT + "/health", ROOT + "/health/detailed"])
def test_a_database_that_fails_is_a_503(alice, monkeypatch, path):
    def fail() -> None:
        raise sa.exc.OperationalError("SELECT 1", {}, Exception("disk I/O error"))

    monkeypatch.setattr(app.database, "read", fail)
    answer = alice.get(path)
    assert error_of(answer, 503)["code"] == "database_unavailable"
    assert "Retry-After" in answer.headers
    assert "disk" not in answer.text


@pytest.mark.parametrize(
    ("method", "path", "options"),
    [
        pytest.param("POST", "/tasks", {"json": {"title": [SENT]}}, id="field-value"),
        pytest.param("POST", "/tasks", {"json": {"title": "x", SENT: 1}}, id="field-name"),
        pytest.param("POST", "/tasks", {"json": {"title": "x", "status": SENT}}, id="choice"),
        pytest.param("POST", "/tasks", {"json": {"title": "x", "due_date": SENT}}, id="date"),
        pytest.param("POST", "/tasks", {"json": SENT}, id="whole-body"),
        pytest.param("POST", "/tasks", {"content": f'{{"{SENT}', "headers": JSON}, id="broken-json"),
        pytest.param("POST", "/tasks", {"content": "x", "headers": {"Content-Type": SENT}}, id="content-type"),
        pytest.param(
            "POST", "/auth/register", {"json": {"username": SENT + "!", "password": SENT + "\0"}}, id="password"
        ),
        pytest.param("POST", "/auth/login", {"json": {"username": SENT, "password": SENT}}, id="login"),
        pytest.param("POST", "/auth/token", {"data": {"username": SENT, "grant_type": SENT}}, id="form"),
        pytest.param("POST", "/auth/refresh", {"json": {"refresh_token": SENT}}, id="refresh-token"),
        pytest.param("GET", f"/tasks?{SENT}=1", {}, id="query-name"),
        pytest.param("GET", f"/tasks?sort={SENT}", {}, id="query-choice"),
        pytest.param("GET", f"/tasks?page={SENT}", {}, id="query-number"),
        pytest.param("GET", f"/tasks/changes?since={SENT}", {}, id="cursor"),
        pytest.param("GET", f"/tasks/{SENT}", {}, id="path"),
        pytest.param("GET", f"/{SENT}", {}, id="unknown-path"),
        pytest.param("GET", "/tasks", {"headers": {"Authorization": f"Bearer {SENT}"}}, id="token"),
        pytest.param("GET", "/tasks/events", {"headers": {"Last-Event-ID": SENT}}, id="last-event-id"),
        pytest.param(
            "GET", "/tasks/99", {"headers": {"If-None-Match": SENT, "Origin": SENT, "Host": SENT}}, id="headers"
        ),
        pytest.param("GET", "/tasks/99", {"headers": {"X-Request-ID": SENT + "!"}}, id="request-id"),
    ],
)
def test_an_error_repeats_nothing_that_was_sent(alice, method, path, options):
    answer = alice.request(method, path, **options)
    assert 400 <= answer.status_code < 500
    assert SENT not in answer.text
    assert SENT not in str(answer.headers)


@pytest.mark.parametrize("asked", ["a", "trace-1.2_3", "x" * 64])
def test_a_plain_request_id_is_kept(anonymous, asked):
    assert anonymous.get("/tasks", headers={"X-Request-ID": asked}).headers["X-Request-ID"] == asked


@pytest.mark.parametrize("asked", ["", "x" * 65, "a b", "a/b", "é", "a\tb"])
def test_any_other_request_id_is_replaced(anonymous, asked):
    answers = [anonymous.get("/tasks", headers={"X-Request-ID": asked.encode("latin-1")}) for _ in range(2)]
    fresh = [answer.headers["X-Request-ID"] for answer in answers]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,64}", it) and it != asked for it in fresh)
    assert fresh[0] != fresh[1]


NASTY_IDS = [
    "0",
    "-1",
    "+1",
    "01",
    "1.0",
    "1e3",
    "x",
    "%00",
    "%ff",
    "%0a1",
    " 1",
    "٣",
    "9" * 30,
    2**31,
    2**63 - 1,
    2**63,
]
NASTY_TEXTS = [
    *[
        "",
        "0",
        "-1",
        "1",
        "true",
        "null",
        "nan",
        "inf",
        "Infinity",
        "\0",
        "\n",
        "%",
        "_",
        "\\",
        "'",
        '"',
        "'; DROP TABLE",
    ],
    *["2026-01-01", "2026-01-01T00:00:00", "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00", "2026-02-30"],
    *["9" * 19, "9" * 30, 10**18, 2**63 - 1, 2**63, "1~" + "9" * 19, "é" * 50, "x" * 201, "\u202e\ufeff\uffff𝄞"],
]
NASTY_VALUES = [
    *[
        None,
        True,
        0,
        -1,
        1.5,
        2**63,
        10**400,
        [],
        {},
        [[]],
        {"$ne": 1},
        "",
        " ",
        "\0",
        "\ud800",
        "x" * 60_000,
        "𝄞" * 200,
    ],
    *["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-01-01T25:00:00Z", "2026-01-01T00:00:60Z"],
]
NASTY_BODIES = [
    *[b"", b" ", b"{", b"null", b"1", b'"x"', b"[]", b"\xff\xfe", b"\xef\xbb\xbf{}", b"{}" * 2, b"\0", b"[" * 30_000],
    *[b'{"title":NaN}', b'{"title":Infinity}', b'{"title":"\\ud800"}', b'{"title":"\xff"}', b'{"a":' * 9_000],
    *[b'{"title":"x","title":"y"}', b'{"title":1' + b"0" * 5_000 + b"}", '{"title":"x"}'.encode("utf-16")],
    *[b'{"\\u0000":1}', b'{"__class__":1,"title":"x"}'],
]


def operations() -> list[Any]:
    """Every operation that /openapi.json describes."""
    paths = app.app.openapi()["paths"]
    return [
        pytest.param(method.upper(), path, operation, id=f"{method.upper()} {path}")
        for path, item in paths.items()
        for method, operation in item.items()
    ]


def nasty_requests(method: str, path: str, operation: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Requests that are as wrong as a client can make them, built from what the operation takes."""
    plain = re.sub(r"\{\w+\}", "1", path)
    for value in NASTY_IDS if "{" in path else []:
        yield {"url": re.sub(r"\{\w+\}", str(value), path)}
    queries = [it["name"] for it in operation.get("parameters", []) if it["in"] == "query"]
    for name, value in itertools.product([*queries, "x", "\0"], NASTY_TEXTS):
        yield {"url": f"{plain}?{urlencode({name: value})}"}
    yield {"url": f"{plain}?search={'x' * 50_000}"}
    yield {"url": f"{plain}?%ff=%ff&&&=&status=%ff&search=%ff&since=%00"}
    for header, value in itertools.product(["If-Match", "If-None-Match", "Last-Event-ID", "X-Request-ID"], NASTY_TEXTS):
        if method == "GET" or header == "If-Match":
            yield {"url": plain, "headers": {header: str(value).replace("\0", "").replace("\n", "").encode()}}
    if "requestBody" in operation:
        yield from nasty_bodies(plain, next(iter(operation["requestBody"]["content"].values()))["schema"])


def nasty_bodies(url: str, schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    types = ["application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "x", ""]
    for content, kind in itertools.product(NASTY_BODIES, types):
        yield {"url": url, "content": content, "headers": {"Content-Type": kind}}
    name = next(iter(re.findall(r"schemas/(\w+)", json.dumps(schema))))
    for field, value in itertools.product(app.app.openapi()["components"]["schemas"][name]["properties"], NASTY_VALUES):
        fields = {"title": "x", "username": "somebody", "password": PASSWORD} if field != "refresh_token" else {}
        yield {"url": url, "content": json.dumps(fields | {field: value}), "headers": JSON}
        form = {"username": "x", "password": "x", field: json.dumps(value)}
        yield {"url": url, "content": urlencode(form), "headers": {"Content-Type": types[1]}}


@pytest.mark.parametrize(("method", "path", "operation"), operations())
def test_nothing_that_a_client_can_send_gets_a_500(server, alice, method, path, operation):
    alice.create()
    for request in nasty_requests(method, path, operation):
        with alice.stream(method, f"{ROOT}{request.pop('url')}", **request) as answer:
            endless = answer.headers.get("Content-Type", "").startswith("text/event-stream")
            assert answer.status_code < 500, (request, answer.status_code)
            if not endless:
                answer.read()
    again = server.person("zoe").register()
    again.create()
    assert len(again.titles()) == 1


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(b"GET /api/v1/tasks/\xff HTTP/1.1\r\nHost: x\r\n\r\n", id="raw-byte-in-the-path"),
        pytest.param(b"GET //api//v1/../tasks HTTP/1.1\r\nHost: x\r\n\r\n", id="odd-slashes"),
        pytest.param(b"GET /health HTTP/1.1\r\nHost: \r\nX-Request-ID: \xff\xfe\r\n\r\n", id="raw-byte-in-a-header"),
        pytest.param(b"POST /api/v1/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", id="negative-length"),
        pytest.param(
            b"POST /api/v1/tasks HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", id="no-chunk"
        ),
        pytest.param(b"GET /ws/tasks/tab HTTP/1.1\r\nHost: x\r\n\r\n", id="no-upgrade"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="no-host"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", id="tls-hello"),
    ],
)
def test_broken_http_gets_no_500(server, request_):
    answer = server.raw(request_.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
    assert re.match(rb"HTTP/1.1 [234]\d\d ", answer)


# ── 7 Dependencies ──────────────────────────────────────────────────────────────────────────────
# Who may do what: one row a route. A route without a row fails, so that none is forgotten.

ROLES = {
    # method and path: what anonymous, another user, the owner and an admin get; and what they send
    "POST /api/v1/auth/register": ("201 201 201 201", {"username": "new.{role}", "password": PASSWORD}),
    "POST /api/v1/auth/login": ("200 200 200 200", {"username": "alice", "password": PASSWORD}),
    "POST /api/v1/auth/token": ("200 200 200 200", "username=alice&password=" + PASSWORD),
    "POST /api/v1/auth/refresh": ("401 401 401 401", {"refresh_token": "unknown"}),
    "POST /api/v1/auth/logout": ("401 204 204 204", None),
    "POST /api/v1/auth/logout_all": ("401 204 204 204", None),
    "GET /api/v1/auth/sessions": ("401 200 200 200", None),
    "DELETE /api/v1/auth/sessions/{session_id}": ("401 404 204 404", None),
    "GET /api/v1/users/me": ("401 200 200 200", None),
    "PATCH /api/v1/users/me": ("401 200 200 200", {"email": "somebody@example.org"}),
    "DELETE /api/v1/users/me": ("401 204 204 409", None),
    "GET /api/v1/tasks": ("401 200 200 200", None),
    "POST /api/v1/tasks": ("401 201 201 201", {"title": "x"}),
    "GET /api/v1/tasks/changes": ("401 200 200 200", None),
    "GET /api/v1/tasks/events": ("401 200 200 200", None),
    "GET /api/v1/tasks/statistics": ("401 200 200 200", None),
    "DELETE /api/v1/tasks/trash": ("401 204 204 204", None),
    "GET /api/v1/tasks/{task_id}": ("401 404 200 404", None),
    "PUT /api/v1/tasks/{task_id}": ("401 404 200 404", {"title": "x"}),
    "PATCH /api/v1/tasks/{task_id}": ("401 404 200 404", {"title": "x"}),
    "DELETE /api/v1/tasks/{task_id}": ("401 404 204 404", None),
    "POST /api/v1/tasks/{trashed_id}/restore": ("401 404 200 404", None),
    "GET /api/v1/admin/users": ("401 403 403 200", None),
    "GET /api/v1/admin/users/{user_id}": ("401 403 403 200", None),
    "GET /api/v1/admin/tasks": ("401 403 403 200", None),
    "GET /health": ("200 200 200 200", None),
    "GET /health/detailed": ("200 200 200 200", None),
    "GET /docs": ("200 200 200 200", None),
    "GET /docs/oauth2-redirect": ("200 200 200 200", None),
    "GET /redoc": ("200 200 200 200", None),
    "GET /openapi.json": ("200 200 200 200", None),
    "WS /ws/tasks/{client_id}": ("4401 0 0 0", None),
}
STATIC_FILES = "/static-offline-docs"


def routes() -> list[str]:
    """Every route of the app, as `METHOD /path`."""
    found = []
    for context in fastapi.routing.iter_route_contexts(app.app.routes):
        if context.path != STATIC_FILES:
            methods = {"WS"} if context.methods is None else context.methods - {"HEAD"}
            found += [f"{method} {context.path}" for method in sorted(methods)]
    return found


def test_every_route_has_a_row_in_the_matrix():
    assert sorted(routes()) == sorted(route.replace("trashed_id", "task_id") for route in ROLES)


@pytest.mark.parametrize("route", ROLES)
def test_who_may_do_what(server, anonymous, alice, bob, admin, route):
    statuses, body = ROLES[route]
    method, path = route.split()
    ids = {"task_id": alice.create()["id"], "user_id": alice.user["id"], "client_id": "tab"}
    alice.trash(trashed := alice.create())
    ids |= {"trashed_id": trashed["id"], "session_id": alice.get("/auth/sessions").json()["data"][0]["id"]}
    got = {}
    # The owner comes last: they may change what the others must not even see.
    for role, person in {"anonymous": anonymous, "other": bob, "admin": admin, "owner": alice}.items():
        sent = json.dumps(body).replace("{role}", role) if isinstance(body, dict) else body
        got[role] = ask(server, person, method, path.format(**ids), sent)
    assert f"{got['anonymous']} {got['other']} {got['owner']} {got['admin']}" == statuses


def ask(server: Server, person: Person, method: str, path: str, body: str | None) -> int:
    """The status of a request, or the close code of a socket: 0 if it stays open."""
    if method == "WS":
        headers = {"Authorization": person.headers.get("Authorization", "Bearer nobody")}
        with server.socket("tab", additional_headers=headers) as live:
            try:
                return live.frame()["seq"] and 0
            except websockets.exceptions.ConnectionClosed:
                return live.connection.close_code or 0
    kind = "application/json" if body and body.startswith("{") else "application/x-www-form-urlencoded"
    headers = {"Content-Type": kind} if body else {}
    with person.stream(method, f"{ROOT}{path}", content=body, headers=headers) as answer:
        return answer.status_code


def test_a_foreign_task_looks_absent(alice, bob):
    task = alice.create()
    for method in ("GET", "PUT", "PATCH", "DELETE"):
        body = None if method in ("GET", "DELETE") else {"title": "x"}
        foreign = bob.request(method, f"/tasks/{task['id']}", json=body, headers={"X-Request-ID": "same"})
        absent = bob.request(method, "/tasks/999", json=body, headers={"X-Request-ID": "same"})
        assert error_of(foreign, 404) == error_of(absent, 404) | {"message": f"No task {task['id']}."}
    assert alice.all_tasks() == {task["id"]: task}


def test_a_trashed_task_looks_absent(alice):
    alice.trash(task := alice.create())
    for method in ("GET", "DELETE"):
        assert error_of(alice.request(method, f"/tasks/{task['id']}"), 404)["code"] == "task_not_found"
    for method in ("PUT", "PATCH"):
        error_of(alice.request(method, f"/tasks/{task['id']}", json={"title": "x"}), 404)


@pytest.mark.parametrize(
    "header",
    [
        "Basic YWxpY2U6eA==",
        "Bearer",
        "bearer x",
        "Bearer x y",
        "Bearer \x80\xff",
        "Token x",
        "x",
        "Bearer " + "a" * 9000,
    ],
)
def test_what_is_no_token_is_401(anonymous, header):
    error_of(anonymous.get("/tasks", headers={"Authorization": header.encode("latin-1")}), 401)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_is_case_insensitive(alice, scheme):
    good(alice.get("/tasks", headers={"Authorization": f"{scheme} {alice.tokens['access_token']}"}))


def test_a_tasks_etag_is_its_version(alice):
    created = alice.post("/tasks", json={"title": "x"})
    path = created.headers["Location"].removeprefix(app.API)
    answers = [created, alice.get(path), alice.patch(path, json={"title": "y"}), alice.put(path, json={"title": "z"})]
    assert [answer.headers["ETag"] for answer in answers] == ['"1"', '"1"', '"2"', '"3"']
    assert [answer.json()["version"] for answer in answers] == [1, 1, 2, 3]


MATCHES = ['"2"', "*", '"1", "2"', '"1","2"', '"1" , "2" , "3"']
MISSES = ['"1"', '"22"', "2", '"1", "3"', "", '""', "nonsense", '"2', '"999999999999999999999999"']


@pytest.mark.parametrize("if_match", MATCHES)
@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
def test_if_match_lets_a_fresh_version_through(alice, method, if_match):
    task = alice.edit(alice.create(), title="now at version 2")
    body = None if method == "DELETE" else {"title": "x"}
    answer = alice.request(method, f"/tasks/{task['id']}", json=body, headers={"If-Match": if_match})
    assert answer.status_code == (204 if method == "DELETE" else 200)


@pytest.mark.parametrize("if_match", [*MISSES, 'W/"2"'])
@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
def test_if_match_refuses_a_stale_version_and_changes_nothing(alice, method, if_match):
    task = alice.edit(alice.create(), title="now at version 2")
    body = None if method == "DELETE" else {"title": "x"}
    answer = alice.request(method, f"/tasks/{task['id']}", json=body, headers={"If-Match": if_match})
    assert error_of(answer, 412)["code"] == "version_mismatch"
    assert alice.get(f"/tasks/{task['id']}").json() == task
    assert alice.create()["version"] == 3


def test_if_match_guards_restore_too(alice):
    alice.trash(task := alice.create())
    error_of(alice.post(f"/tasks/{task['id']}/restore", headers={"If-Match": '"1"'}), 412)
    good(alice.post(f"/tasks/{task['id']}/restore", headers={"If-Match": '"2"'}))


@pytest.mark.parametrize("if_none_match", [*MATCHES, 'W/"2"', '"1", W/"2"'])
def test_if_none_match_spares_the_body(alice, if_none_match):
    task = alice.edit(alice.create(), title="now at version 2")
    answer = good(alice.get(f"/tasks/{task['id']}", headers={"If-None-Match": if_none_match}), 304)
    assert answer.headers["ETag"] == '"2"'
    assert not answer.content


@pytest.mark.parametrize("if_none_match", MISSES)
def test_if_none_match_of_another_version_gets_the_task(alice, if_none_match):
    task = alice.edit(alice.create(), title="now at version 2")
    assert good(alice.get(f"/tasks/{task['id']}", headers={"If-None-Match": if_none_match})).json() == task


def test_an_unchanged_list_is_304_and_any_change_ends_that(alice, bob):
    task = alice.create()
    etag = alice.get("/tasks").headers["ETag"]
    assert etag.startswith('W/"')
    cached = {"If-None-Match": etag}
    assert not good(alice.get("/tasks", headers=cached), 304).content
    bob.create()
    good(alice.get("/tasks", headers=cached), 304)
    good(alice.get("/tasks?page_size=1", headers=cached), 200)
    good(bob.get("/tasks", headers=cached), 200)
    alice.edit(task)
    assert good(alice.get("/tasks", headers=cached)).headers["ETag"] != etag


def test_what_depends_on_the_clock_has_no_etag(alice):
    for path in ("/tasks?overdue=true", "/tasks?overdue=false", "/tasks/statistics"):
        assert "ETag" not in good(alice.get(path)).headers


GETS = [route.removeprefix("GET ") for route in ROLES if route.startswith("GET ")]


@pytest.mark.parametrize("path", GETS)
def test_every_get_answers_head(alice, admin, path):
    task = admin.create()
    url = f"{ROOT}{path.format(task_id=task['id'], user_id=alice.user['id'])}"
    if path.endswith("/events"):
        with admin.events() as stream:
            get = stream.answer
    else:
        get = good(admin.get(url))
    head = good(admin.head(url))
    assert not head.content
    volatile = {"x-request-id", "date", "transfer-encoding"} | ({"content-length"} if "detailed" in path else set())
    assert {*get.headers.items()} - {*head.headers.items()} <= {(name, get.headers.get(name)) for name in volatile}


def test_head_of_a_stream_ends(alice):
    good(alice.head("/tasks/events"))
    good(alice.get("/tasks"))
    eventually(lambda: not app.feeds)


def test_head_of_a_missing_task_is_404_without_a_body(alice):
    assert not good(alice.head("/tasks/7"), 404).content


@pytest.mark.parametrize("path", [path for path in GETS if path.startswith(("/api", "/health"))])
def test_a_trailing_slash_changes_nothing(alice, admin, path):
    task = admin.create()
    url = f"{ROOT}{path.format(task_id=task['id'], user_id=alice.user['id'])}/"
    with admin.stream("GET", url) as answer:
        assert answer.status_code == 200
    with admin.stream("PROPFIND", url) as answer:
        assert answer.status_code == 405


def test_a_trailing_slash_works_for_writing(alice):
    good(alice.post("/tasks/", json={"title": "x"}), 201)
    good(alice.patch("/tasks/1/", json={"title": "y"}))
    good(alice.delete("/tasks/1/"), 204)
    good(alice.delete("/tasks/trash/"), 204)


# ── 9 Live updates ──────────────────────────────────────────────────────────────────────────────
# A stream is a cursor. Whatever happens to a client, it ends where GET /tasks is, in order, none twice.

STREAMS = ["socket", "events"]
"""The two kinds of stream, as methods of Person; both take `since`."""


def open_stream(person: Person, kind: str, since: int | None = None) -> Any:
    return getattr(person, kind)(since=since)


def replay(frames: list[dict[str, Any]], state: dict[int, dict[str, Any]]) -> list[int]:
    """Apply frames as a client does: upsert by id, forget what is deleted. Returns the seqs."""
    for frame in frames:
        task = frame["task"]
        assert frame["seq"] == task["version"]
        state.pop(task["id"], None)
        if frame["type"] != "deleted":
            state[task["id"]] = task
    return [frame["seq"] for frame in frames]


def rising(seqs: list[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise(seqs))


@pytest.mark.parametrize("kind", STREAMS)
def test_every_change_arrives_in_order(alice, kind):
    with open_stream(alice, kind) as live:
        first = alice.create("first")
        second = alice.edit(first, title="second")
        alice.trash(second)
        third = good(alice.post(f"/tasks/{first['id']}/restore")).json()
        fourth = good(alice.put(f"/tasks/{first['id']}", json={"title": "fourth"})).json()
        frames = live.frames(5)
    assert [frame["type"] for frame in frames] == ["created", "updated", "deleted", "updated", "updated"]
    assert [frame["seq"] for frame in frames] == [1, 2, 3, 4, 5]
    assert [frames[at]["task"] for at in (0, 1, 3, 4)] == [first, second, third, fourth]
    assert frames[2]["task"]["deleted_at"]
    assert all(frame.keys() == {"type", "seq", "task"} for frame in frames)


@pytest.mark.parametrize("kind", STREAMS)
def test_an_edit_that_changes_nothing_is_a_change_too(alice, kind):
    task = alice.create()
    with open_stream(alice, kind) as live:
        alice.edit(task)
        assert live.frame()["seq"] == 2


@pytest.mark.parametrize("kind", STREAMS)
def test_nobody_sees_the_changes_of_others(alice, bob, kind):
    with open_stream(alice, kind) as live:
        bob.create("bob's")
        alice.create("alice's")
        assert live.frame()["task"]["title"] == "alice's"


def test_the_hello_names_the_seq_that_the_socket_starts_from(alice):
    alice.create()
    alice.create()
    with alice.socket() as live:
        assert live.hello == {"type": "hello", "seq": 2}
    with alice.socket(since=1) as live:
        assert live.hello["type"] == "hello"
        assert live.frame()["seq"] == 2


@pytest.mark.parametrize("kind", STREAMS)
def test_without_since_a_stream_starts_now(alice, kind):
    alice.create("before")
    with open_stream(alice, kind) as live:
        alice.create("after")
        assert live.frame()["task"]["title"] == "after"


@pytest.mark.parametrize("kind", STREAMS)
def test_a_replay_says_updated_for_what_exists(alice, kind):
    alice.create("one")
    alice.edit(alice.create("two"), title="two, edited")
    alice.trash(alice.create("three"))
    with open_stream(alice, kind, since=0) as live:
        frames = live.frames(3)
        alice.create("four")
        assert live.frame()["type"] == "created"
    assert [(frame["type"], frame["seq"]) for frame in frames] == [("updated", 1), ("updated", 3), ("deleted", 5)]


@pytest.mark.parametrize("kind", STREAMS)
def test_a_replay_from_the_ring_says_updated_too(alice, kind):
    with alice.socket("keeps-the-ring"):
        alice.create("one")
        with open_stream(alice, kind, since=0) as live:
            assert live.frame()["type"] == "updated"


def test_last_event_id_resumes_a_stream(alice):
    with alice.events() as live:
        alice.create("seen")
        last = next(live.blocks)["id"]
    alice.create("missed")
    with alice.events(**{"Last-Event-ID": last}) as live:
        assert live.frame()["task"]["title"] == "missed"


def test_last_event_id_is_newer_than_since(alice):
    alice.create("one")
    alice.create("two")
    with alice.events(since=0, **{"Last-Event-ID": "1"}) as live:
        assert live.frame()["task"]["title"] == "two"


def test_a_browser_can_resume_before_the_first_event(alice):
    alice.create()
    with alice.events() as live:
        assert live.first["id"] == "1"
    alice.create("missed")
    with alice.events(**{"Last-Event-ID": live.first["id"]}) as live:
        assert live.frame()["task"]["title"] == "missed"


def test_sse_looks_like_the_standard_says(alice):
    with alice.events() as live:
        assert live.answer.headers["Content-Type"].startswith("text/event-stream")
        assert live.answer.headers["X-Accel-Buffering"] == "no"
        assert "no-cache" in live.answer.headers["Cache-Control"] or "no-store" in live.answer.headers["Cache-Control"]
        assert "comment" in live.first
        task = alice.create("line\u2028separator: ö")
        block = next(live.blocks)
    assert (block["event"], block["id"]) == ("created", "1")
    assert json.loads(block["data"]) == {"type": "created", "seq": 1, "task": task}


def test_an_idle_sse_stream_sends_comments(alice, monkeypatch):
    assert fastapi.routing._PING_INTERVAL == 15
    monkeypatch.setattr(fastapi.routing, "_PING_INTERVAL", 0.02)
    with alice.events() as live:
        assert next(live.blocks).keys() == {"comment"}


# The big one: 1,000 changes, 300 of them deletions, while nobody looked, and writers who do not stop.


def away_for_1000_changes(person: Person) -> dict[int, dict[str, Any]]:
    """Make 400 tasks; remember them; then make 1,000 changes. Returns what the client remembered."""
    makers = [person.again() for _ in range(4)]
    together(4, lambda at: [makers[at].create(f"task {at}-{number}") for number in range(100)])
    known = person.all_tasks()
    ids = list(known)

    def change(at: int) -> None:
        for task_id in ids[at::4][:75]:
            makers[at].trash({"id": task_id})
        for number, task_id in enumerate(ids[at::4][75:] * 4):
            makers[at].edit({"id": task_id}, title=f"edit {number}", completed=number % 2 == 0)
        for number in range(75):
            makers[at].create(f"new {at}-{number}")

    together(4, change)
    return known


@contextlib.contextmanager
def writers(person: Person, count: int = 2) -> Iterator[None]:
    """People who create, edit and delete until the block ends; then a last task, "the end"."""
    enough = threading.Event()

    def write(_number: int) -> None:
        writer = person.again()
        while not enough.is_set():
            task = writer.create("by a writer")
            writer.edit(task, title="by a writer, edited")
            writer.trash(writer.create("soon deleted"))

    with ThreadPoolExecutor(count) as pool:
        work = [pool.submit(write, number) for number in range(count)]
        try:
            yield
        finally:
            enough.set()
        for it in work:
            it.result(DEADLINE)
    person.create("the end")


@pytest.mark.parametrize("kind", STREAMS)
def test_whoever_was_away_for_1000_changes_catches_up_while_others_write(alice, kind):
    state = away_for_1000_changes(alice)
    with contextlib.ExitStack() as stack:
        with writers(alice):
            live = stack.enter_context(open_stream(alice, kind, since=400))
            frames = live.frames(800)
        frames += live.until("the end")
    assert rising([400, *replay(frames, state)])
    assert state == alice.all_tasks()


def test_whoever_was_away_for_1000_changes_catches_up_by_polling_while_others_write(alice):
    state = away_for_1000_changes(alice)
    changed, since, seqs = [], 400, [400]

    def poll() -> bool:
        nonlocal since
        answer = good(alice.get("/tasks/changes", params={"since": since, "limit": 300})).json()
        since = answer["next_since"]
        changed.extend(answer["data"])
        return answer["has_more"]

    with writers(alice):
        for _ in range(5):
            poll()
    while poll():
        pass
    for task in changed:
        frame = {"type": "deleted" if task["deleted_at"] else "updated", "seq": task["version"], "task": task}
        seqs += replay([frame], state)
    assert rising(seqs)
    assert state == alice.all_tasks()


def test_changes_are_a_snapshot_then_a_delta(alice):
    assert alice.get("/tasks/changes").json() == {"data": [], "next_since": 0, "has_more": False}
    one, two = alice.create("one"), alice.create("two")
    answer = alice.get("/tasks/changes").json()
    assert answer == {"data": [one, two], "next_since": 2, "has_more": False}
    alice.trash(one)
    answer = alice.get("/tasks/changes?since=2").json()
    assert [(task["id"], bool(task["deleted_at"]), task["version"]) for task in answer["data"]] == [
        (one["id"], True, 3)
    ]
    assert alice.get("/tasks/changes?since=3").json() == {"data": [], "next_since": 3, "has_more": False}


def test_changes_come_in_pages(alice):
    made = [alice.create(str(number)) for number in range(5)]
    first = alice.get("/tasks/changes?limit=2").json()
    assert first == {"data": made[:2], "next_since": 2, "has_more": True}
    last = alice.get("/tasks/changes?since=2&limit=3").json()
    assert last == {"data": made[2:], "next_since": 5, "has_more": False}


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "x"])
def test_changes_take_1_to_1000_at_a_time(alice, limit):
    error_of(alice.get("/tasks/changes", params={"limit": limit}), 422)
    good(alice.get("/tasks/changes?limit=1"))
    good(alice.get("/tasks/changes?limit=1000"))


def sync(person: Person, limit: int, since: Any = 0) -> tuple[dict[int, dict[str, Any]], Any]:
    """Poll to the end as a client does. Returns the state and the cursor."""
    state: dict[int, dict[str, Any]] = {}
    while True:
        answer = good(person.get("/tasks/changes", params={"since": since, "limit": limit})).json()
        state |= {task["id"]: task for task in answer["data"]}
        since = answer["next_since"]
        if not answer["has_more"]:
            return {key: task for key, task in state.items() if not task["deleted_at"]}, since


def test_a_snapshot_of_several_pages_is_not_refused_after_a_purge(alice):
    made = [alice.create(str(number)) for number in range(7)]
    alice.trash(*made[3:5])
    good(alice.delete("/tasks/trash"), 204)
    state, cursor = sync(alice, limit=2)
    assert state == alice.all_tasks()
    alice.create("later")
    answer = good(alice.get("/tasks/changes", params={"since": cursor})).json()
    assert [task["title"] for task in answer["data"]] == ["later"]


def test_a_snapshot_that_a_purge_interrupts_is_refused(alice):
    made = [alice.create(str(number)) for number in range(7)]
    cursor = alice.get("/tasks/changes?limit=2").json()["next_since"]
    alice.trash(made[0])
    good(alice.delete("/tasks/trash"), 204)
    assert error_of(alice.get("/tasks/changes", params={"since": cursor}), 410)["code"] == "resync_required"


def purged(person: Person) -> None:
    """Bring the counter to 6 with a purge of seq 5."""
    made = [person.create(str(number)) for number in range(4)]
    person.trash(made[0])
    good(person.delete("/tasks/trash"), 204)


STALE = [pytest.param(1, id="just-before-the-purge"), pytest.param(4, id="one-short"), pytest.param(7, id="the-future")]


@pytest.mark.parametrize("since", STALE)
def test_a_stale_cursor_gets_410(alice, since):
    purged(alice)
    assert error_of(alice.get(f"/tasks/changes?since={since}"), 410)["code"] == "resync_required"
    assert error_of(alice.get(f"/tasks/events?since={since}"), 410)["code"] == "resync_required"
    assert error_of(alice.get("/tasks/events", headers={"Last-Event-ID": str(since)}), 410)


@pytest.mark.parametrize("since", STALE)
def test_a_stale_socket_is_told_to_resync_and_goes_on_live(alice, since):
    purged(alice)
    with alice.socket(since=since) as live:
        assert live.frame() == {"type": "resync_required"}
        alice.create("live")
        assert live.frame()["task"]["title"] == "live"


@pytest.mark.parametrize("since", [0, 5, 6])
@pytest.mark.parametrize("kind", STREAMS)
def test_a_cursor_at_the_purge_or_after_it_is_good(alice, kind, since):
    purged(alice)
    good(alice.get(f"/tasks/changes?since={since}"))
    with open_stream(alice, kind, since=since) as live:
        alice.create("live")
        assert rising([since, *(frame["seq"] for frame in live.until("live"))])


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_that_is_open_during_a_purge_goes_on(alice, kind):
    with open_stream(alice, kind) as live:
        purged(alice)
        alice.create("after the purge")
        assert [frame["type"] for frame in live.until("after the purge")] == ["created"] * 4 + ["deleted", "created"]


@pytest.mark.parametrize("kind", STREAMS)
def test_a_burst_longer_than_the_ring_and_the_batch_is_complete(alice, monkeypatch, kind):
    monkeypatch.setattr(app, "RING_SIZE", 3)
    monkeypatch.setattr(app, "BATCH", 4)
    with open_stream(alice, kind) as live:
        makers = [alice.again() for _ in range(8)]
        together(8, lambda at: [makers[at].create(f"{at}-{number}") for number in range(10)])
        alice.create("the end")
        assert [frame["seq"] for frame in live.until("the end")] == list(range(1, 82))
    with open_stream(alice, kind, since=5) as live:
        assert [frame["seq"] for frame in live.frames(76)] == list(range(6, 82))


@pytest.mark.parametrize("kind", STREAMS)
def test_what_another_process_writes_arrives_too(server, alice, kind):
    task = alice.create()
    with open_stream(alice, kind) as live:
        server.sql("UPDATE users SET seq = 2 WHERE username = 'alice'", "UPDATE tasks SET seq = 2, title = 'elsewhere'")
        frame = live.frame()
    assert (frame["type"], frame["seq"], frame["task"]["title"]) == ("updated", 2, "elsewhere")
    assert frame["task"]["id"] == task["id"]


# Who may listen, and until when.


def test_a_first_frame_may_carry_the_token(server, alice):
    alice.create("one")
    alice.create("two")
    with server.socket("tab") as live:
        live.connection.send(json.dumps({"token": alice.tokens["access_token"], "since": 1}))
        assert live.frame()["type"] == "hello"
        assert live.frame()["task"]["title"] == "two"


def test_a_first_frame_without_since_starts_now(server, alice):
    alice.create()
    with server.socket("tab") as live:
        live.connection.send(json.dumps({"token": alice.tokens["access_token"]}))
        assert live.frame() == {"type": "hello", "seq": 1}


FIRST_FRAMES = [
    pytest.param('{"token": "x"}', 4401, id="bad-token"),
    pytest.param('{"token": "\\ud800"}', 1007, id="lone-surrogate"),
    pytest.param("{}", 1003, id="no-token"),
    pytest.param('{"token": "x", "since": -1}', 1003, id="negative-since"),
    pytest.param('{"token": "x", "since": 9223372036854775808}', 1003, id="huge-since"),
    pytest.param('{"token": "x", "more": 1}', 1003, id="unknown-field"),
    pytest.param("[]", 1003, id="not-an-object"),
    pytest.param("hello", 1007, id="not-json"),
    pytest.param("", 1007, id="empty"),
    pytest.param("[" * 50_000, 1007, id="deep-nesting"),
    pytest.param(b"{}", 1003, id="binary"),
    pytest.param("x" * 65_537, 1009, id="over-64-kib"),
    pytest.param("é" * 32_769, 1009, id="over-64-kib-of-utf8"),
]


@pytest.mark.parametrize(("frame", "code"), FIRST_FRAMES)
def test_a_first_frame_that_is_no_login_closes_the_socket(server, frame, code):
    with server.socket("tab") as live:
        live.connection.send(frame)
        assert live.close_code() == code


BAD_FRAMES = {"binary", "not-json", "empty", "deep-nesting", "over-64-kib", "over-64-kib-of-utf8"}


@pytest.mark.parametrize(("frame", "code"), [row for row in FIRST_FRAMES if row.id in BAD_FRAMES])
def test_a_bad_frame_later_closes_the_socket_too(alice, frame, code):
    with alice.socket() as live:
        live.connection.send(frame)
        assert live.close_code() == code


def test_broken_utf8_closes_the_socket(alice):
    with alice.socket() as live:
        live.connection.send(b"\xff\xfe", text=True)
        assert live.close_code() == 1007


def test_any_json_after_the_hello_is_ignored(alice):
    with alice.socket() as live:
        for frame in ('{"type":"ping"}', "1", "[]", '"x"', "x".join('""')):
            live.connection.send(frame)
        alice.create()
        assert live.frame()["type"] == "created"


def test_a_bad_token_in_the_header_closes_with_4401(server):
    with server.socket("tab", additional_headers={"Authorization": "Bearer nobody"}) as live:
        assert live.close_code() == 4401


def test_silence_closes_with_4401(server, monkeypatch):
    monkeypatch.setattr(app, "HELLO_SECONDS", 0.05)
    with server.socket("tab") as live:
        assert live.close_code() == 4401


def test_a_token_in_the_url_opens_nothing(server, alice, monkeypatch):
    monkeypatch.setattr(app, "HELLO_SECONDS", 0.05)
    for name in ("token", "access_token"):
        with server.socket(f"tab?{name}={alice.tokens['access_token']}") as live:
            assert live.close_code() == 4401
        error_of(server.person().get("/tasks/events", params={name: alice.tokens["access_token"]}), 401)


@pytest.mark.parametrize("client_id", ["x" * 65, "a%20b", "%C3%A9", "a%2Fb", "%00"])
def test_a_client_id_is_plain(server, client_id):
    with pytest.raises(websockets.exceptions.InvalidStatus), server.socket(client_id):
        pass


@pytest.mark.parametrize("client_id", ["x" * 64, "A-z.0_9", "0"])
def test_a_plain_client_id_is_welcome(alice, client_id):
    with alice.socket(client_id):
        pass


@pytest.mark.parametrize("since", ["-1", "x", "9223372036854775808", "1.5"])
def test_a_since_that_is_no_seq_is_refused(server, alice, since):
    error_of(alice.get(f"/tasks/events?since={since}"), 422)
    error_of(alice.get(f"/tasks/changes?since={since}"), 422)
    error_of(alice.get("/tasks/events", headers={"Last-Event-ID": since}), 422)
    with pytest.raises(websockets.exceptions.InvalidStatus), server.socket(f"tab?since={since}"):
        pass


def test_the_same_client_id_replaces_the_older_socket(alice, bob):
    with alice.socket("tab") as old, bob.socket("tab") as foreign, alice.socket("other") as other:
        with alice.socket("tab") as new:
            assert old.close_code() == 4409
            alice.create("x")
            bob.create("y")
            assert [live.frame()["type"] for live in (new, other, foreign)] == ["created"] * 3


def end_session(person: Person) -> None:
    session = next(it for it in person.get("/auth/sessions").json()["data"] if it["current"])
    good(person.again().delete(f"/auth/sessions/{session['id']}"), 204)


def change_password(person: Person) -> None:
    new = {"password": "another long password", "current_password": person.password}
    good(person.again().patch("/users/me", json=new))


def replay_used_token(person: Person) -> None:
    used = person.tokens["refresh_token"]
    good(person.refresh(good(person.refresh()).json()["refresh_token"]))
    good(person.refresh(used), 401)


def disable(person: Person) -> None:
    person.server.sql(f"UPDATE users SET is_active = false WHERE id = {person.user['id']}")


def expire(person: Person) -> None:
    person.server.sql(f"UPDATE sessions SET expires_at = '2026-01-15 12:00:00' WHERE user_id = {person.user['id']}")


ENDINGS = {
    "logout": lambda person: good(person.post("/auth/logout"), 204),
    "logout by refresh token": lambda person: good(
        person.server.person().post("/auth/logout", json={"refresh_token": person.tokens["refresh_token"]}), 204
    ),
    "logout everywhere": lambda person: good(person.again().post("/auth/logout_all"), 204),
    "session ended from elsewhere": end_session,
    "password changed elsewhere": change_password,
    "stolen refresh token": replay_used_token,
    "account deleted": lambda person: good(person.delete("/users/me"), 204),
    "account disabled": disable,
    "session expired": expire,
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_stream_ends_with_its_session(alice, ending):
    with alice.socket() as live, alice.events() as events:
        ENDINGS[ending](alice)
        assert live.close_code() == 4401
        events.end()
    eventually(lambda: not app.feeds)


def test_the_streams_of_other_sessions_stay(alice):
    other = alice.again()
    with other.socket() as live, other.events() as events:
        good(alice.post("/auth/logout"), 204)
        other.create()
        assert live.frame()["type"] == events.frame()["type"] == "created"


def test_an_expired_access_token_does_not_end_its_stream(alice, clock):
    with alice.socket() as live:
        clock.advance(minutes=20)
        alice.accept(alice.refresh())
        alice.create()
        assert live.frame()["type"] == "created"


def test_a_closed_stream_leaves_nothing_behind(alice):
    with alice.socket(), alice.events():
        assert alice.get(f"{ROOT}/health/detailed").json()["live_connections"] == 2
    eventually(lambda: not app.feeds)
    assert alice.get(f"{ROOT}/health/detailed").json()["live_connections"] == 0


# Many streams, and slow ones.


def test_60_open_streams_hold_nobody_up(alice):
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(alice.events()) for _ in range(60)]
        began = time.monotonic()
        assert alice.titles() == []
        alice.create()
        assert time.monotonic() - began < 1
        assert [live.frame()["seq"] for live in streams] == [1] * 60


def test_a_socket_that_never_reads_is_closed_and_delays_nobody(server, alice, monkeypatch):
    monkeypatch.setattr(app, "SEND_SECONDS", 0.5)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    with alice.socket("stuck", sock=connection, max_queue=1, close_timeout=1) as stuck, alice.socket("fine") as fine:
        task = alice.create()
        fine.frame()
        delays = []
        while len(*[feed.streams for feed in app.feeds.values()]) == 2:
            began = time.monotonic()
            edited = alice.edit(task, description="é" * 10_000)
            assert fine.frame()["seq"] == edited["version"] < 2_000
            delays.append(time.monotonic() - began)
        assert max(delays) < 1
        assert stuck.close_code() == 1013


def test_an_sse_stream_that_never_reads_is_dropped(server, alice, monkeypatch):
    monkeypatch.setattr(app, "SEND_SECONDS", 0.2)
    task = alice.create()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        authorization = alice.headers["Authorization"]
        connection.sendall(
            f"GET /api/v1/tasks/events HTTP/1.1\r\nHost: x\r\nAuthorization: {authorization}\r\n\r\n".encode()
        )
        eventually(lambda: app.feeds)
        while app.feeds:
            assert alice.edit(task, description="é" * 10_000)["version"] < 2_000
    alice.create()


# ── 11 Routes ───────────────────────────────────────────────────────────────────────────────────
# Accounts and sessions, tasks, and what an admin sees; every race has exactly one winner.

USER_FIELDS = {"id", "username", "email", "role", "is_active", "created_at"}
TOKEN_FIELDS = {"access_token", "refresh_token", "token_type", "expires_in"}
SESSION_FIELDS = {"id", "address", "user_agent", "created_at", "last_used_at", "expires_at", "current"}
TASK_FIELDS = {
    *["id", "title", "description", "status", "priority", "due_date", "completed", "completed_at", "attachments"],
    *["owner_id", "version", "created_at", "updated_at", "deleted_at"],
}


def test_registering_logs_in(anonymous):
    answer = good(anonymous.post("/auth/register", json={"username": "alice", "password": PASSWORD}), 201)
    tokens = answer.json()
    assert tokens.keys() == TOKEN_FIELDS | {"user"}
    assert (tokens["token_type"], tokens["expires_in"]) == ("bearer", 900)
    assert answer.headers["Cache-Control"] == "no-store"
    expected = {"id": 2, "username": "alice", "email": None, "role": "user", "is_active": True}
    assert tokens["user"] == expected | {"created_at": "2026-01-15T12:00:00Z"}
    anonymous.accept(answer)
    assert anonymous.get("/users/me").json() == tokens["user"]


@pytest.mark.parametrize(
    "login",
    [
        pytest.param({"url": "/auth/login", "json": {"username": "alice", "password": PASSWORD}}, id="json"),
        pytest.param({"url": "/auth/token", "data": {"username": "alice", "password": PASSWORD}}, id="form"),
        pytest.param(
            {
                "url": "/auth/token",
                "data": {"grant_type": "password", "username": "alice", "password": PASSWORD, "scope": ""},
            },
            id="oauth2-form",
        ),
        pytest.param({"url": "/auth/login", "json": {"username": "ALICE", "password": PASSWORD}}, id="capitals"),
        pytest.param({"url": "/auth/login", "json": {"username": "ａlice", "password": PASSWORD}}, id="full-width"),
    ],
)
def test_logging_in_gives_tokens(alice, anonymous, login):
    answer = good(anonymous.post(**login))
    assert answer.json().keys() == TOKEN_FIELDS
    assert answer.headers["Cache-Control"] == "no-store"
    assert anonymous.accept(answer).user == alice.user


@pytest.mark.parametrize(
    ("name", "password"),
    [("alice", "wrong password"), ("nobody", PASSWORD), ("alice", ""), ("", ""), ("alice", "x" * 9_999)],
)
def test_a_wrong_name_and_a_wrong_password_look_the_same(alice, anonymous, name, password):
    for how in ("json", "data"):
        if how == "data" and not (name and password):
            continue
        path = "/auth/login" if how == "json" else "/auth/token"
        error = error_of(anonymous.post(path, **{how: {"username": name, "password": password}}), 401)
        assert (error["code"], error["message"]) == ("invalid_credentials", "Wrong username or password.")


def test_a_disabled_account_cannot_log_in_or_go_on(server, alice, anonymous):
    disable(alice)
    error_of(alice.get("/tasks"), 401)
    error_of(alice.refresh(), 401)
    body = {"username": "alice", "password": PASSWORD}
    assert error_of(anonymous.post("/auth/login", json=body), 403)["code"] == "account_disabled"
    error_of(anonymous.post("/auth/login", json=body | {"password": "wrong password"}), 401)


def test_a_closed_registration_is_closed(anonymous, configure):
    configure(registration="closed")
    answer = anonymous.post("/auth/register", json={"username": "alice", "password": PASSWORD})
    assert error_of(answer, 403)["code"] == "registration_closed"


@pytest.mark.parametrize("name", ["alice", "ALICE", "Alice", "ａlice", "ALıCE".replace("ı", "I")])
def test_a_name_is_taken_in_every_spelling(alice, anonymous, name):
    answer = anonymous.post("/auth/register", json={"username": name, "password": PASSWORD})
    assert error_of(answer, 409)["code"] == "username_taken"


def test_of_50_racing_registrations_one_wins(anonymous):
    body = {"username": "alice", "password": PASSWORD}
    answers = together(50, lambda _: anonymous.post("/auth/register", json=body).status_code)
    assert sorted(answers) == [201] + [409] * 49


def test_names_and_emails_are_kept_as_written(anonymous):
    body = {"username": "Ålice.B-c_9", "password": PASSWORD, "email": "Alice@example.org"}
    user = good(anonymous.post("/auth/register", json=body), 201).json()["user"]
    assert (user["username"], user["email"]) == ("Ålice.B-c_9", "Alice@example.org")
    good(anonymous.post("/auth/register", json=body | {"username": "bob"}), 201)


# Refresh tokens: one use each, and a replay is a theft.


def test_refreshing_rotates_the_pair(alice):
    answer = good(alice.refresh())
    assert answer.json().keys() == TOKEN_FIELDS
    assert answer.headers["Cache-Control"] == "no-store"
    old = alice.tokens
    alice.accept(answer)
    assert {old["access_token"], old["refresh_token"]}.isdisjoint(alice.tokens.values())
    good(alice.get("/tasks"))
    good(alice.get("/tasks", headers={"Authorization": f"Bearer {old['access_token']}"}))


def test_of_20_racing_refreshes_one_wins_and_its_tokens_work(alice):
    answers = together(20, lambda _: alice.refresh())
    assert sorted(answer.status_code for answer in answers) == [200] + [401] * 19
    winner = next(answer for answer in answers if answer.status_code == 200)
    alice.accept(winner)
    good(alice.refresh())


def everything_of_the_session_is_dead(person: Person, *tokens: dict[str, Any]) -> bool:
    """Whether neither an access nor a refresh token of these works any more."""
    for pair in tokens:
        error_of(person.get("/tasks", headers={"Authorization": f"Bearer {pair['access_token']}"}), 401)
        error_of(person.refresh(pair["refresh_token"]), 401)
    return True


def test_a_replay_within_a_second_is_a_racing_tab(alice, clock):
    successor = good(alice.refresh()).json()
    clock.advance(seconds=0.9)
    assert error_of(alice.refresh(), 401)["code"] == "invalid_refresh_token"
    good(alice.get("/tasks"))
    good(alice.refresh(successor["refresh_token"]))


def test_a_replay_after_two_seconds_ends_the_session(alice, clock):
    successor = good(alice.refresh()).json()
    clock.advance(seconds=2)
    assert error_of(alice.refresh(), 401)["code"] == "invalid_refresh_token"
    assert everything_of_the_session_is_dead(alice, alice.tokens, successor)


def test_a_replay_after_the_successor_was_used_ends_the_session(alice):
    successor = good(alice.refresh()).json()
    third = good(alice.refresh(successor["refresh_token"])).json()
    error_of(alice.refresh(), 401)
    assert everything_of_the_session_is_dead(alice, alice.tokens, successor, third)


def test_a_replay_leaves_other_sessions_alone(alice, clock):
    other = alice.again()
    good(alice.refresh())
    clock.advance(seconds=2)
    error_of(alice.refresh(), 401)
    good(other.get("/tasks"))
    good(other.refresh())


def test_a_refresh_token_lives_30_days_from_its_last_use(alice, clock):
    clock.advance(days=29)
    alice.accept(alice.refresh())
    clock.advance(days=29)
    alice.accept(alice.refresh())
    clock.advance(days=30, seconds=1)
    error_of(alice.refresh(), 401)


def test_a_session_lives_180_days_in_all(alice, clock):
    for _ in range(8):
        clock.advance(days=22)
        alice.accept(alice.refresh())
    ends = alice.get("/auth/sessions").json()["data"][0]["expires_at"]
    assert ends == "2026-07-14T12:00:00Z"
    clock.advance(days=5)
    error_of(alice.refresh(), 401)


def test_an_access_token_is_no_refresh_token_nor_the_reverse(alice):
    error_of(alice.refresh(alice.tokens["access_token"]), 401)
    error_of(alice.get("/tasks", headers={"Authorization": f"Bearer {alice.tokens['refresh_token']}"}), 401)


# Sessions: whatever ends one ends its tokens at once.


def test_logging_out_ends_the_session_at_once(alice):
    other = alice.again()
    good(alice.post("/auth/logout"), 204)
    assert everything_of_the_session_is_dead(alice, alice.tokens)
    good(other.get("/tasks"))


def test_a_refresh_token_logs_out_when_the_access_token_has_expired(alice, clock):
    clock.advance(hours=1)
    error_of(alice.post("/auth/logout"), 401)
    good(alice.post("/auth/logout", json={"refresh_token": alice.tokens["refresh_token"]}), 204)
    error_of(alice.refresh(), 401)


@pytest.mark.parametrize("body", [None, {"refresh_token": "unknown"}], ids=["nothing", "an-unknown-token"])
def test_logging_out_takes_a_valid_token(anonymous, body):
    answer = anonymous.post("/auth/logout", json=body) if body else anonymous.post("/auth/logout")
    error_of(answer, 401)


def test_logging_out_everywhere_ends_every_session(alice, bob):
    other = alice.again()
    good(other.post("/auth/logout_all"), 204)
    assert everything_of_the_session_is_dead(alice, alice.tokens, other.tokens)
    good(bob.get("/tasks"))


def test_sessions_are_listed(alice, clock):
    clock.advance(minutes=1)
    other = alice.again()
    other.headers["User-Agent"] = "a browser of name " + "x" * 300
    other.accept(other.refresh())
    listed = alice.get("/auth/sessions").json()
    assert listed.keys() == {"data"}
    newest, own = listed["data"]
    assert own.keys() == newest.keys() == SESSION_FIELDS
    assert (own["current"], newest["current"]) == (True, False)
    assert newest["user_agent"].startswith("a browser of name xxx")
    assert newest["address"] == "127.0.0.1"
    assert (newest["created_at"], newest["expires_at"]) == ("2026-01-15T12:01:00Z", "2026-02-14T12:01:00Z")


def test_ending_another_session_ends_it_at_once(alice):
    other = alice.again()
    session = next(it for it in alice.get("/auth/sessions").json()["data"] if not it["current"])
    good(alice.delete(f"/auth/sessions/{session['id']}"), 204)
    assert everything_of_the_session_is_dead(alice, other.tokens)
    good(alice.get("/tasks"))
    error_of(alice.delete(f"/auth/sessions/{session['id']}"), 404)


def test_expired_sessions_are_not_listed(alice, clock):
    clock.advance(days=31)
    assert len(alice.again().get("/auth/sessions").json()["data"]) == 1


# The account itself.


def test_the_email_can_change(alice):
    for email in ("a@example.org", None, "b@example.org"):
        assert good(alice.patch("/users/me", json={"email": email})).json() == alice.user | {"email": email}
    assert good(alice.patch("/users/me", json={})).json()["email"] == "b@example.org"
    assert alice.get("/users/me").json()["email"] == "b@example.org"


def test_a_new_password_ends_the_other_sessions(alice, anonymous):
    other = alice.again()
    change = {"password": "another long password", "current_password": PASSWORD}
    assert good(alice.patch("/users/me", json=change)).json() == alice.user
    assert everything_of_the_session_is_dead(anonymous, other.tokens)
    good(alice.get("/tasks"))
    good(alice.refresh())
    error_of(anonymous.post("/auth/login", json={"username": "alice", "password": PASSWORD}), 401)
    good(anonymous.post("/auth/login", json={"username": "alice", "password": "another long password"}))


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"password": "another long password", "current_password": "wrong password"}, 403, "wrong_password"),
        ({"password": "another long password"}, 422, "validation_failed"),
        ({"current_password": PASSWORD}, 422, "validation_failed"),
        ({"password": "short", "current_password": PASSWORD}, 422, "validation_failed"),
        ({"password": None, "current_password": PASSWORD}, 422, "validation_failed"),
        ({"email": "nonsense"}, 422, "validation_failed"),
        ({"username": "bob"}, 422, "validation_failed"),
        ({"role": "admin"}, 422, "validation_failed"),
        ({"is_active": True}, 422, "validation_failed"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else str(value),
)
def test_what_a_user_cannot_change(alice, change, status, code):
    other = alice.again()
    assert error_of(alice.patch("/users/me", json=change), status)["code"] == code
    assert alice.get("/users/me").json() == alice.user
    good(other.get("/tasks"))


def test_deleting_an_account_deletes_everything_of_it(server, alice, bob, anonymous):
    other = alice.again()
    alice.create()
    alice.trash(alice.create())
    bob.create()
    good(alice.delete("/users/me"), 204)
    assert everything_of_the_session_is_dead(anonymous, alice.tokens, other.tokens)
    error_of(anonymous.post("/auth/login", json={"username": "alice", "password": PASSWORD}), 401)
    counts = (
        "SELECT (SELECT count(*) FROM tasks), (SELECT count(*) FROM sessions), (SELECT count(*) FROM refresh_tokens)"
    )
    assert [tuple(row) for row in server.sql(counts)] == [(1, 1, 1)]
    assert server.person("alice").register().all_tasks() == {}


def test_deleting_an_account_takes_a_young_session(alice, clock):
    clock.advance(minutes=10, seconds=1)
    assert error_of(alice.delete("/users/me"), 403)["code"] == "login_again"
    good(alice.again().delete("/users/me"), 204)


def test_refreshing_does_not_make_a_session_young(alice, clock):
    clock.advance(minutes=11)
    alice.accept(alice.refresh())
    error_of(alice.delete("/users/me"), 403)


def test_the_last_admin_stays(server, alice, admin):
    assert error_of(admin.delete("/users/me"), 409)["code"] == "last_admin"
    server.sql("UPDATE users SET role = 'admin' WHERE username = 'alice'")
    good(admin.delete("/users/me"), 204)
    assert error_of(alice.delete("/users/me"), 409)["code"] == "last_admin"


def test_of_two_admins_who_leave_at_once_one_stays(server, alice, admin):
    server.sql("UPDATE users SET role = 'admin' WHERE username = 'alice'")
    answers = together(2, lambda at: [alice, admin][at].delete("/users/me").status_code)
    assert sorted(answers) == [204, 409]


# Tasks.


def test_a_new_task_is_answered_whole(alice, clock):
    answer = good(alice.post("/tasks", json={"title": "Buy milk"}), 201)
    assert answer.json() == {
        "id": 1, "title": "Buy milk", "description": None, "status": "todo", "priority": "medium", "due_date": None,
        "completed": False, "completed_at": None, "attachments": 0, "owner_id": alice.user["id"], "version": 1,
        "created_at": "2026-01-15T12:00:00Z", "updated_at": "2026-01-15T12:00:00Z", "deleted_at": None,
    }  # fmt: skip
    assert answer.headers["Location"] == "/api/v1/tasks/1"
    assert answer.headers["ETag"] == '"1"'
    assert alice.get("/tasks/1").json() == answer.json()


FULL = {
    *[("title", "Buy milk"), ("description", "two litres"), ("status", "in_progress"), ("priority", "high")],
    ("due_date", "2026-02-01T09:00:00Z"),
}


def test_patch_merges_and_put_replaces(alice, clock):
    task = alice.create(**{k: v for k, v in FULL if k != "title"})
    clock.advance(minutes=5)
    patched = alice.edit(task, title="Buy tea")
    assert patched == task | {"title": "Buy tea", "version": 2, "updated_at": "2026-01-15T12:05:00Z"}
    replaced = good(alice.put(f"/tasks/{task['id']}", json={"title": "Buy tea"})).json()
    defaults = {"description": None, "status": "todo", "priority": "medium", "due_date": None}
    assert replaced == patched | defaults | {"version": 3}


def test_put_answers_what_was_put(alice):
    task = alice.create()
    replaced = good(alice.put(f"/tasks/{task['id']}", json=dict(FULL))).json()
    assert replaced == task | dict(FULL) | {"version": 2}


def test_a_task_remembers_when_it_was_completed(alice, clock):
    task = alice.create()
    clock.advance(hours=1)
    done = alice.edit(task, completed=True)
    assert (done["status"], done["completed"], done["completed_at"]) == ("done", True, "2026-01-15T13:00:00Z")
    clock.advance(hours=1)
    assert alice.edit(task, title="still done")["completed_at"] == "2026-01-15T13:00:00Z"
    assert alice.edit(task, status="done")["completed_at"] == "2026-01-15T13:00:00Z"
    reopened = alice.edit(task, status="in_progress")
    assert (reopened["completed"], reopened["completed_at"]) == (False, None)
    assert alice.edit(task, status="done")["completed_at"] == "2026-01-15T14:00:00Z"
    assert alice.create(status="done")["completed_at"] == "2026-01-15T14:00:00Z"


def test_the_trash_keeps_restores_and_forgets(alice, clock):
    keep, back, gone = (alice.create(title) for title in ("keep", "back", "gone"))
    clock.advance(minutes=1)
    alice.trash(back, gone)
    assert alice.titles() == ["keep"]
    assert sorted(alice.titles(deleted=True)) == ["back", "gone"]
    clock.advance(minutes=1)
    restored = good(alice.post(f"/tasks/{back['id']}/restore"))
    assert restored.json() == back | {"version": 6, "updated_at": "2026-01-15T12:02:00Z"}
    assert restored.headers["ETag"] == '"6"'
    good(alice.delete("/tasks/trash"), 204)
    assert alice.titles(deleted=True) == []
    assert sorted(alice.titles()) == ["back", "keep"]
    error_of(alice.post(f"/tasks/{gone['id']}/restore"), 404)
    error_of(alice.post(f"/tasks/{keep['id']}/restore"), 404)


def test_emptying_the_trash_touches_no_other(alice, bob):
    for person in (alice, bob):
        person.trash(person.create())
    good(alice.delete("/tasks/trash"), 204)
    assert len(bob.titles(deleted=True)) == 1


def test_of_50_racing_patches_with_the_same_if_match_one_wins(alice):
    task = alice.create()
    path, headers = f"/tasks/{task['id']}", {"If-Match": '"1"'}
    answers = together(50, lambda at: alice.patch(path, json={"title": str(at)}, headers=headers))
    assert sorted(answer.status_code for answer in answers) == [200] + [412] * 49
    winner = next(answer for answer in answers if answer.status_code == 200)
    assert alice.get(path).json() == winner.json()
    assert winner.json()["version"] == 2


def test_50_racing_patches_without_if_match_all_win_with_versions_of_their_own(alice):
    task = alice.create()
    answers = together(50, lambda at: alice.edit(task, title=str(at))["version"])
    assert sorted(answers) == list(range(2, 52))


def test_of_racing_deletes_and_restores_each_finds_its_task_once(alice):
    task = alice.create()
    assert sorted(together(10, lambda _: alice.delete(f"/tasks/{task['id']}").status_code)) == [204] + [404] * 9
    answers = together(10, lambda _: alice.post(f"/tasks/{task['id']}/restore").status_code)
    assert sorted(answers) == [200] + [404] * 9


# Lists: filters, orders and pages.


@pytest.fixture
def shelf(alice: Person, clock: Clock) -> Person:
    """Alice with six tasks, a minute apart; now is 2026-01-15 12:06."""
    rows = [
        {"title": "apple", "priority": "low", "status": "todo", "due_date": "2026-01-10"},
        {"title": "Banana", "priority": "high", "status": "in_progress", "due_date": "2026-01-20"},
        {"title": "cherry", "priority": "medium", "status": "done", "due_date": "2026-01-10"},
        {"title": "Éclair", "priority": "medium", "status": "todo", "description": "100% butter_cream"},
        {"title": "fig", "priority": "high", "status": "done", "description": "STRASSE \\ ΣΊΣΥΦΟΣ"},
        {"title": "gone", "priority": "low", "status": "todo", "due_date": "2026-01-10"},
    ]
    for row in rows:
        task = alice.create(**row)
        clock.advance(minutes=1)
    alice.trash(task)
    return alice


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", "fig Éclair cherry Banana apple"),
        ("status=todo", "Éclair apple"),
        ("status=todo&status=done", "fig Éclair cherry apple"),
        ("priority=high", "fig Banana"),
        ("priority=high&priority=low", "fig Banana apple"),
        ("priority=high&status=done", "fig"),
        ("completed=true", "fig cherry"),
        ("completed=false", "Éclair Banana apple"),
        ("completed=true&status=todo", ""),
        ("deleted=true", "gone"),
        ("deleted=false", "fig Éclair cherry Banana apple"),
        ("overdue=true", "apple"),
        ("overdue=false", "fig Éclair cherry Banana"),
        ("due_before=2026-01-10", "cherry apple"),
        ("due_before=2026-01-10T23:59:59Z", "cherry apple"),
        ("due_before=2026-01-10T23:59:58Z", ""),
        ("due_after=2026-01-20", "Banana"),
        ("due_after=2026-01-11T00:00:00%2B00:00", "Banana"),
        ("due_after=2026-01-10&due_before=2026-01-20", "cherry Banana apple"),
        ("search=an", "Banana"),
        ("search=BANANA", "Banana"),
        ("search=éCLAIR", "Éclair"),
        ("search=E%CC%81clair", "Éclair"),
        ("search=butter", "Éclair"),
        ("search=100%25", "Éclair"),
        ("search=%25", "Éclair"),
        ("search=r_c", "Éclair"),
        ("search=_", "Éclair"),
        ("search=%5C", "fig"),
        ("search=straße", "fig"),
        ("search=σίσυφος", "fig"),
        ("search=*", ""),
        ("search=a&priority=low&completed=false", "apple"),
        ("sort=created_at&order=asc", "apple Banana cherry Éclair fig"),
        ("sort=updated_at", "fig Éclair cherry Banana apple"),
        ("sort=title&order=asc", "apple Banana cherry fig Éclair"),
        ("sort=title", "Éclair fig cherry Banana apple"),
        ("sort=priority", "fig Banana Éclair cherry apple"),
        ("sort=priority&order=asc", "apple cherry Éclair Banana fig"),
        ("sort=status&order=asc", "apple Éclair Banana cherry fig"),
        ("sort=status&order=desc", "fig cherry Banana Éclair apple"),
        ("sort=due_date&order=asc", "apple cherry Banana Éclair fig"),
        ("sort=due_date&order=desc", "Banana cherry apple fig Éclair"),
        ("page_size=2", "fig Éclair"),
        ("page_size=2&page=3", "apple"),
        ("page_size=2&page=4", ""),
    ],
)
def test_lists_filter_and_sort(shelf, query, expected):
    assert " ".join(shelf.titles(**{}) if not query else titles_of(shelf, query)) == expected


def titles_of(person: Person, query: str) -> list[str]:
    return [task["title"] for task in good(person.get(f"/tasks?{query}")).json()["data"]]


def test_sorting_by_update_follows_edits(shelf):
    shelf.edit(next(iter(shelf.all_tasks().values())), title="first")
    assert shelf.titles(sort="updated_at")[0] == "first"


@pytest.mark.parametrize(
    "query",
    [
        *["page=0", "page=-1", "page=x", "page=1000000000000000000", "page_size=0", "page_size=101", "page_size="],
        *["status=open", "priority=urgent", "completed=perhaps", "overdue=perhaps", "search=", f"search={'x' * 201}"],
        *["due_before=tomorrow", "due_after=2026-13-01", "sort=colour", "order=up", "colour=red", "Page=1"],
        *["deleted=perhaps", "owner_id=1", "search=%00", "due_before="],
    ],
)
def test_lists_refuse_what_they_do_not_know(alice, query):
    assert error_of(alice.get(f"/tasks?{query}"), 422)["details"]


@pytest.mark.parametrize("sort", ["created_at", "updated_at", "due_date", "priority", "status", "title"])
@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_never_overlap(alice, sort, order):
    for _ in range(7):
        alice.create("same")
    seen = []
    for page in (1, 2, 3):
        answer = good(alice.get("/tasks", params={"sort": sort, "order": order, "page": page, "page_size": 3})).json()
        seen += [task["id"] for task in answer["data"]]
        assert answer["meta"] == {"page": page, "page_size": 3, "total": 7, "pages": 3}
    assert sorted(seen) == list(range(1, 8))


def links(answer: httpx.Response) -> dict[str, str]:
    return {rel: path for path, rel in re.findall(r'<([^>]*)>; rel="(\w+)"', answer.headers["Link"])}


def test_link_headers_lead_through_the_pages(alice):
    for number in range(5):
        alice.create(f"a&b {number}")
    answer = good(alice.get("/tasks?search=a%26b&page_size=2&status=todo&status=done"))
    assert links(answer).keys() == {"first", "next", "last"}
    seen = [task["title"] for task in answer.json()["data"]]
    while "next" in links(answer):
        assert links(answer)["next"].startswith("/api/v1/tasks?")
        answer = good(alice.get(ROOT + links(answer)["next"]))
        seen += [task["title"] for task in answer.json()["data"]]
    assert links(answer).keys() == {"first", "prev", "last"}
    assert seen == [f"a&b {number}" for number in (4, 3, 2, 1, 0)]
    assert links(alice.get("/tasks?page=9&page_size=2"))["prev"].endswith("page=3")


def test_an_empty_list_is_a_page_too(alice):
    answer = good(alice.get("/tasks"))
    assert answer.json()["data"] == []
    assert answer.json()["meta"] == {"page": 1, "page_size": 20, "total": 0, "pages": answer.json()["meta"]["pages"]}
    assert "next" not in links(answer)


def test_a_page_has_20_items_unless_asked(alice):
    for number in range(21):
        alice.create(str(number))
    assert len(alice.titles()) == 20
    assert len(alice.titles(page_size=100)) == 21


def test_statistics_count_what_is_not_in_the_trash(shelf):
    answer = shelf.get("/tasks/statistics").json()
    per_day = answer.pop("completed_per_day")
    assert answer == {
        "total": 5,
        "by_status": {"todo": 2, "in_progress": 1, "done": 2},
        "by_priority": {"low": 1, "medium": 2, "high": 2},
        "overdue": 1,
        "due_in_7_days": 1,
        "completion_rate": 0.4,
    }
    assert len(per_day) == 30
    assert (per_day[0], per_day[-1]) == ({"date": "2025-12-17", "count": 0}, {"date": "2026-01-15", "count": 2})


def test_statistics_follow_the_calendar(shelf, clock):
    clock.advance(days=5, hours=12)
    answer = shelf.get("/tasks/statistics").json()
    assert (answer["overdue"], answer["due_in_7_days"]) == (2, 0)
    assert answer["completed_per_day"][-7] == {"date": "2026-01-15", "count": 2}
    clock.advance(days=30)
    assert sum(day["count"] for day in shelf.get("/tasks/statistics").json()["completed_per_day"]) == 0


def test_statistics_of_nothing(alice):
    answer = alice.get("/tasks/statistics").json()
    assert (answer["total"], answer["completion_rate"], answer["by_status"]["done"]) == (0, 0, 0)


def test_one_users_statistics_ignore_the_others(shelf, bob):
    assert bob.get("/tasks/statistics").json()["total"] == 0


# The admin.


def test_an_admin_sees_every_account(alice, bob, admin):
    answer = good(admin.get("/admin/users")).json()
    assert [user["username"] for user in answer["data"]] == ["admin", "alice", "bob"]
    assert all(user.keys() == USER_FIELDS for user in answer["data"])
    assert answer["meta"] == {"page": 1, "page_size": 20, "total": 3, "pages": 1}
    assert answer["data"][1] == alice.user == admin.get(f"/admin/users/{alice.user['id']}").json()
    second = good(admin.get("/admin/users?page=2&page_size=2"))
    assert [user["username"] for user in second.json()["data"]] == ["bob"]
    assert links(second)["prev"] == "/api/v1/admin/users?page_size=2&page=1"
    assert error_of(admin.get("/admin/users/99"), 404)["code"] == "user_not_found"


def test_an_admin_sees_every_task(alice, bob, admin):
    alice.create("alice's")
    bob.create("bob's", priority="high")
    bob.trash(bob.create("bob's old one"))

    def titles(query: str) -> list[str]:
        return [task["title"] for task in good(admin.get(f"/admin/tasks?{query}")).json()["data"]]

    assert titles("") == ["bob's", "alice's"]
    assert titles(f"owner_id={alice.user['id']}") == ["alice's"]
    assert titles("priority=high") == ["bob's"]
    assert titles("deleted=true") == ["bob's old one"]
    assert titles("search=ALICE&sort=title") == ["alice's"]
    assert titles("owner_id=99") == []
    assert admin.titles() == []
    task = good(admin.get("/admin/tasks")).json()["data"][0]
    assert task.keys() == TASK_FIELDS
    error_of(admin.get("/admin/tasks?owner_id=0"), 422)


# Health.


def test_health_answers_anybody(anonymous):
    assert good(anonymous.get(ROOT + "/health")).json() == {"status": "ok"}
    answer = good(anonymous.get(ROOT + "/health/detailed")).json()
    assert answer.keys() == {"status", "version", "uptime_seconds", "database", "live_connections", "last_cleanup"}
    assert (answer["status"], answer["version"], answer["live_connections"]) == ("ok", app.VERSION, 0)
    assert answer["database"]["engine"] == "sqlite"
    assert 0 <= answer["database"]["latency_ms"] < 1_000
    assert 0 <= answer["uptime_seconds"] < 60

"""The specification of Onefile Tasks: what app.py promises, in the order of its sections.

Run    .venv/bin/pytest                    everything, in about a minute

How it is done
   Every test talks HTTP, WebSocket or SSE to a real uvicorn on a free port, with a database of
   its own. What needs signals, settings at the start or the command line is a process of its own.
   The clock is set by hand (`clock`) and ticks at each look, so "30 days later" takes no time, and
   no two moments are the same. Nothing sleeps: a test waits for the event, and polls with a
   deadline where there is none.
   "Exactly one of N wins" is proved by threads that all start at one barrier (`together`).
   Rate limits are off, except in tests that ask for `rate_limits`.
   The sections are app.py's; 0 is the harness. At the end come the documents; tools/ has its own
   tests. What is long or violent (floods, races within a request, browsers, memory) is in .ci/.

Notation
   alice, bob, admin   people who are logged in: HTTP clients whose base is /api/v1
   anonymous           the same, not logged in; a task is a dict, as the API answers it
   server, program     the app in a thread of this process, `python app.py …` in another
"""

import asyncio
import base64
import contextlib
import gc
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlencode

import bcrypt
import fastapi.responses
import fastapi.routing
import httpx
import jwt
import pydantic
import pytest
import standardwebhooks
import uvicorn
import websockets.exceptions
import websockets.sync.client
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

import app

gc.freeze()  # To look through all that is imported again and again would take a fifth of the time.
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
KEPT = "(PATH|SYSTEMROOT|TEMP|COVERAGE.*)$"
"""What a process of its own keeps of the environment."""
SERVICES: dict[str, str] = {}
"""What every process of its own is told; .ci/on_postgresql.py fills it, for a second run."""
SQLITE = app.database.engine == "sqlite"
sqlite_only = pytest.mark.skipif(not SQLITE, reason="about SQLite's file, or its shared commits")
postgresql_only = pytest.mark.skipif(SQLITE, reason="about PostgreSQL: see .ci/on_postgresql.py")
redis_only = pytest.mark.skipif(not app.settings.redis_url, reason="about Redis: see there, too")
NO_MORE = (websockets.exceptions.ConnectionClosed, httpx.RemoteProtocolError, httpx.ReadError)

# ── 0 Tools ─────────────────────────────────────────────────────────────────────────────────────
# A server that starts in 30 ms and stops at once, people who talk to it, and a clock.


def later(person: "Person", clock: "Clock", **duration: float) -> None:
    """Let time pass, after which this person logs in again."""
    clock.advance(**duration)
    person.log_in()


class Clock:
    """The app's clock, set by hand; each look at it takes a microsecond."""

    def __init__(self) -> None:
        self.moment = datetime(2026, 1, 15, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.moment += timedelta(microseconds=1)
        return self.moment

    def advance(self, **duration: float) -> None:
        """Let time pass: `advance(days=30)`."""
        self.moment += timedelta(**duration)


class Person(httpx.Client):
    """Somebody with an HTTP client, and once logged in with `tokens` and a `user`."""

    def __init__(
        self, server: "Address", name: str = "", password: str = PASSWORD, **options: Any
    ) -> None:
        options |= {"verify": NO_TLS, "trust_env": False, "timeout": DEADLINE}
        options["limits"] = httpx.Limits(max_connections=None)
        super().__init__(base_url=server.url + app.API, **options)
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
        body = {"username": self.name, "password": self.password}
        return self.accept(self.post("/auth/register", json=body))

    def log_in(self) -> "Person":
        body = {"username": self.name, "password": self.password}
        return self.accept(self.post("/auth/login", json=body))

    def again(self) -> "Person":
        """The same person with a second session, in another browser."""
        return self.server.person(self.name, self.password).log_in()

    def script(self, scope: str = "write", **fields: Any) -> "Person":
        """A script of this person's, with a new API token."""
        body = {"name": "script", "scope": scope} | fields
        answer = good(self.post("/auth/api_tokens", json=body), 201)
        script = self.server.person(self.name)
        script.tokens, script.user = answer.json(), self.user
        script.headers["Authorization"] = f"Bearer {script.tokens['token']}"
        return script

    def refresh(self, token: str | None = None) -> httpx.Response:
        body = {"refresh_token": token or self.tokens["refresh_token"]}
        return self.post("/auth/refresh", json=body)

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
    def socket(self, client_id: str = "tab", since: Any = None, **options: Any) -> Iterator["Live"]:
        """A WebSocket that has said hello."""
        address = client_id if since is None else f"{client_id}?since={since}"
        options["additional_headers"] = {"Authorization": self.headers.get("Authorization", "")}
        with self.server.websocket(address, **options) as live:
            live.hello = live.frame()
            assert live.hello["type"] == "hello"
            yield live

    @contextlib.contextmanager
    def events(self, since: int | None = None, **headers: str) -> Iterator["Events"]:
        """An open Server-Sent Events stream."""
        query = {} if since is None else {"since": since}
        with self.stream("GET", "/tasks/events", params=query, headers=headers) as answer:
            assert answer.status_code == 200, answer.read()
            live = Events(answer)  # Who forgets it ends the stream.
            yield live


class Stream:
    """The client's end of a live connection."""

    frame: Callable[[], dict[str, Any]]
    """The next frame."""

    def frames(self, count: int) -> list[dict[str, Any]]:
        """The next so many."""
        return [self.frame() for _ in range(count)]

    def until(self, title: str) -> list[dict[str, Any]]:
        """Every frame up to the one about the task of this title."""
        found = [self.frame()]
        while found[-1].get("task", {}).get("title") != title:
            found.append(self.frame())
        return found


class Live(Stream):
    """A WebSocket."""

    hello: dict[str, Any]

    def __init__(self, connection: websockets.sync.client.ClientConnection) -> None:
        self.connection = connection

    def frame(self) -> dict[str, Any]:
        return json.loads(self.connection.recv(timeout=DEADLINE))

    def close_code(self) -> int:
        """The code that the server closes with, whatever comes before."""
        with contextlib.suppress(websockets.exceptions.ConnectionClosed):
            while True:
                self.connection.recv(timeout=DEADLINE)
        return self.connection.close_code or 0


class Events(Stream):
    """Server-Sent Events: dicts of `event`, `id`, `data`, `comment`."""

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
        return json.loads(next(block for block in self.blocks if "data" in block)["data"])

    def end(self) -> None:
        """Wait until the server ends the stream."""
        with contextlib.suppress(*NO_MORE):
            for _ in self.blocks:
                pass


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

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002
        """Drop the connections; a process of its own ends them politely (section 12)."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        if self.server_state.tasks:
            _, stuck = await asyncio.wait(self.server_state.tasks, timeout=DEADLINE)
            assert not stuck, stuck
        await self.lifespan.shutdown()


class Address:
    """Where a server listens, and who talks to it."""

    port: int

    def __init__(self) -> None:
        self.closing = contextlib.ExitStack()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def person(self, name: str = "", password: str = PASSWORD, **options: Any) -> Person:
        return self.closing.enter_context(Person(self, name, password, **options))

    @contextlib.contextmanager
    def websocket(self, client_id: str, **options: Any) -> Iterator[Live]:
        """A WebSocket, before any hello."""
        url = f"ws://127.0.0.1:{self.port}/ws/tasks/{client_id}"
        plain = {"proxy": None, "compression": None, "max_queue": None, "ping_interval": None}
        with websockets.sync.client.connect(url, **plain | options) as connection:
            yield Live(connection)

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), DEADLINE)

    def answers(self) -> bool:
        with contextlib.suppress(OSError), self.connect():
            return True
        return False


class Server(Address):
    """The app, served on a free port from a thread."""

    def __init__(self, application: Any = app.app) -> None:
        super().__init__()
        options: Any = {"http": "h11", "ws": app.BoundedWebSocket, "proxy_headers": False}
        options |= {"ws_max_size": app.MAX_SOCKET_BYTES, "lifespan": "on", "log_config": None}
        config = uvicorn.Config(application, port=0, **options)
        self.uvicorn = Uvicorn(config)
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()
        assert self.uvicorn.listening.wait(DEADLINE)
        assert self.uvicorn.started
        self.port = self.uvicorn.servers[0].sockets[0].getsockname()[1]

    def serve(self) -> None:
        try:
            self.uvicorn.run()
        finally:
            self.uvicorn.listening.set()

    def stop(self) -> None:
        self.closing.close()
        if self.thread.is_alive():
            self.uvicorn.loop.call_soon_threadsafe(self.uvicorn.told_to_stop.set)
            self.thread.join(DEADLINE)
            assert not self.thread.is_alive()

    def sql(self, statement: str, **values: Any) -> list[dict[str, Any]]:
        """Run a statement as another process might, and return its rows."""

        async def execute() -> list[dict[str, Any]]:
            async with app.database.transaction() as db:
                return await db.fetch(statement, **values)

        return self.run(execute())

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine of the app in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.uvicorn.loop).result(DEADLINE)


class Program(Address):
    """`python app.py …` in a process of its own: settings by environment, data in `directory`."""

    def __init__(self, directory: Path, *arguments: str, **settings: Any) -> None:
        super().__init__()
        kept = {name: value for name, value in os.environ.items() if re.match(KEPT, name)}
        defaults = {"PORT": 0, "RATE_LIMITS": "off", "ADMIN_PASSWORD": ADMIN_PASSWORD}
        changed = {name: str(it) for name, it in (defaults | SERVICES | settings).items()}
        environment = kept | {"PYTHONUTF8": "1"} | changed
        self.log = directory / "stderr.txt"
        command = [sys.executable, app.__file__, *arguments]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
        with self.log.open("a") as log:
            process = subprocess.Popen(command, cwd=directory, env=environment, stderr=log, **pipes)
        self.process = self.closing.enter_context(process)
        self.closing.callback(self.stop)

    def listening(self) -> "Program":
        """Wait until it serves."""
        self.said = ""
        while "Accounts" not in self.said:
            line = self.process.stdout.readline()
            assert line, self.log.read_text()
            self.said += line
        self.port = int(re.search(r"http://\S+:(\d+)", self.said)[1])
        eventually(self.answers)
        eventually(lambda: not SERVICES or "Redis is well" in self.log.read_text())
        return self

    def stop(self) -> None:
        """End it, politely: coverage is written then."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(DEADLINE)
        self.process.kill()

    def end(self, typed: str = "") -> tuple[int, str, str]:
        """What it exits with, and what it wrote to standard output and standard error."""
        said, _ = self.process.communicate(typed, timeout=DEADLINE)
        return self.process.returncode, said, self.log.read_text(encoding="utf-8")


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
    monkeypatch.setattr(app, "last_cleanup", {})
    app.cached_pages.clear()
    monkeypatch.setattr(app, "BCRYPT_COST", 4)
    monkeypatch.setattr(app, "UNKNOWN_USER_HASH", "$2b$04$" + "." * 53)
    monkeypatch.setattr(app, "LOOK_SECONDS", 0.05)
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
    for server in reversed(started):  # A webhook's receiver outlives who calls it.
        server.stop()


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start `python app.py …` in the test's own directory; the end of the test ends it."""
    with contextlib.ExitStack() as running:

        def run(*arguments: str, directory: Path = tmp_path, **settings: Any) -> Program:
            started = Program(directory, *arguments, **settings)
            running.callback(started.closing.close)
            return started

        yield run


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
    """Rate limits are on, with nothing counted; `rate_limits(login="2/minute")` changes one."""

    def change(**amounts: str) -> None:
        changed = {f"rate_limit_{name}": amount for name, amount in amounts.items()}
        configure(rate_limits="on", **changed)

    app.limiter.storage.reset()
    change()
    return change


# ── 1 Settings ──────────────────────────────────────────────────────────────────────────────────
# A wrong value stops the start with one line that names it and keeps a secret (77 is one, below).

WEBHOOK_SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
WRONG_VALUES = """
SECRET_KEY= DATABASE_URL=mysql://me:pass77@db/tasks REDIS_URL=me:pass77@db REDIS_URL=redis://:pass77/@db
PORT=eighty PORT=-1 PORT=65536 ROOT_PATH=todo ROOT_PATH=/todo/ REGISTRATION=perhaps TRASH_DAYS=-1
ACCESS_TOKEN_MINUTES=0 ACCESS_TOKEN_MINUTES=quarter REFRESH_TOKEN_DAYS=181 RATE_LIMITS=maybe
RATE_LIMIT_LOGIN=often RATE_LIMIT_LOGIN=0/minute RATE_LIMIT_READ=5/minute;9/hour MAX_BODY_KIB=0
MAX_UPLOAD_MIB=0.7 MAX_UPLOAD_MIB=513 MAX_STORAGE_MIB=plenty DOCS=sometimes METRICS=everybody
CORS_ORIGINS=app.example.net CORS_ORIGINS=https://a.example/app CORS_ORIGINS=https://*.example
TRUSTED_PROXIES=the-proxy TRUSTED_PROXIES=10.0.0.1/8 LOG_LEVEL=chatty WEBHOOK_URL=ftp://example.net
WEBHOOK_URL=hooks.example.net WEBHOOK_URL=http:// WEBHOOK_SECRET=
WEBHOOK_SECRET=secret77 WEBHOOK_SECRET=whsec_x7x7x7x7 WEBHOOK_SECRET=whsec_x-x-x-x-x-x-x-x-x-x-x-x-
"""
RIGHT_VALUES = """
PORT=0 TRASH_DAYS=0 MAX_STORAGE_MIB=0 MAX_UPLOAD_MIB=512 ROOT_PATH=/todo/v2 METRICS=off
CORS_ORIGINS=https://a.example,http://localhost:3000 TRUSTED_PROXIES=*
"""
REFUSED_VALUES = """
SECRET_KEY=77abcdefghijklmnopqrstuvwxyz012 SECRET_KEY=your-secret-key-goes-here-0123456789-77
ADMIN_PASSWORD=short77 ADMIN_PASSWORD=password123 ADMIN_USERNAME=no+name
"""


@pytest.fixture
def env_file(configure: Any, monkeypatch: Any, tmp_path: Path) -> Path:
    """Where a .env would be read; nothing else sets anything."""
    del configure
    monkeypatch.chdir(tmp_path)
    return tmp_path / ".env"


@pytest.fixture
def command(configure: Any, clock: Clock, monkeypatch: Any) -> Callable[..., str]:
    """Do as `python app.py …` does, for what needs no process of its own; what it ends with."""
    del configure, clock

    def run(line: str, typed: str = "") -> str:
        monkeypatch.setattr(sys, "argv", ["app.py", *line.split()])
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{typed}\n"))
        try:
            app.main()
        except SystemExit as stop:
            return str(stop.code)
        return ""

    return run


@pytest.mark.parametrize("setting", WRONG_VALUES.split())
def test_a_wrong_value_stops_the_start_with_one_line_that_names_it(env_file, setting):
    name = setting.partition("=")[0]
    right = f"WEBHOOK_URL=https://hooks.example.net\nWEBHOOK_SECRET={WEBHOOK_SECRET}\n"
    right += "DATABASE_URL=postgresql://db/tasks\nSECRET_KEY=set\n"
    env_file.write_text(right + setting)
    with pytest.raises(SystemExit) as stop:
        app.load_settings()
    assert re.fullmatch(rf"{name}: .+", str(stop.value))
    assert "77" not in str(stop.value)


@pytest.mark.parametrize(("name", "module"), [("DATABASE", "asyncpg"), ("REDIS", "redis")])
def test_a_driver_that_is_not_installed_stops_the_start(env_file, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    env_file.write_text(f"SECRET_KEY=x\n{name}_URL={module.replace('asyncpg', 'postgres')}://h/0")
    with pytest.raises(SystemExit, match=f"^{name}_URL: .* deploy/requirements.txt$"):
        app.load_settings()


@pytest.mark.parametrize("setting", REFUSED_VALUES.split())
def test_a_key_or_an_admin_that_is_refused_stops_the_start(configure, command, setting):
    name, _, value = setting.partition("=")
    configure(**{name.lower(): value})
    said = command("token admin")
    assert re.fullmatch(rf"{name}: .+", said)
    assert "77" not in said


@sqlite_only
@pytest.mark.parametrize("fault", ["", "/tasks.db", "/tasks.db/x", "/secret_key/x"])
def test_a_database_that_cannot_be_opened_stops_the_start(command, tmp_path, fault):
    Path(f"{tmp_path}/data{fault}").parent.mkdir(parents=True, exist_ok=True)
    Path(f"{tmp_path}/data{fault}").write_bytes(b"what the disk left of it" * 1000)
    assert re.fullmatch(r".*DATA_DIR.*", command("token admin"))


@postgresql_only
@pytest.mark.parametrize("url", ["{}-absent", "postgresql://localhost:1", "postgresql://x:y"])
def test_a_database_that_is_not_there_stops_the_start(command, monkeypatch, url):
    monkeypatch.setattr(app.database, "url", url.format(app.database.url))
    assert re.fullmatch(r"DATABASE_URL: .+", command("token admin"))


def test_a_stopped_start_ends_at_once_and_says_nothing_else(program, server, tmp_path):
    started = {}
    for name, value in {"LOG_LEVEL": "chatty", "SECRET_KEY": "short", "PORT": server.port}.items():
        (tmp_path / name).mkdir()
        started[name] = program(directory=tmp_path / name, **{name: value})
    for name, stopping in started.items():
        code, said, error = stopping.end()
        assert (code, "Listening" in said) == (1, False)
        assert re.fullmatch(rf".*{name}: .+\n", error)


def test_an_older_python_is_told_so(tmp_path):
    pretend = "import runpy, sys; sys.version_info = (3, 10); runpy.run_path(sys.argv[1])"
    command = [sys.executable, "-c", pretend, app.__file__]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert re.fullmatch(r".*Python 3\.11 or newer.*\n", done.stderr)


def test_the_environment_wins_over_the_env_file(env_file, monkeypatch, capsys):
    env_file.write_text("# mine\nDOCS=\nLOG_LEVEL=error\n" + "\n".join(RIGHT_VALUES.split()))
    monkeypatch.setenv("LOG_LEVEL", "debug")
    loaded = app.load_settings()
    assert (loaded.docs, loaded.log_level) == ("on", "debug")
    for setting in RIGHT_VALUES.split():
        name, _, value = setting.partition("=")
        assert str(getattr(loaded, name.lower())) in (value, f"['{value}']")
    assert capsys.readouterr().err == ""


def test_a_misspelt_setting_is_warned_about(env_file, capsys):
    env_file.write_text("REGISTRAION=closed\nTRASH_DAYS=7\n")
    assert app.load_settings().trash_days == 7
    assert re.fullmatch(r"(?!.*closed).*\bREGISTRAION\b.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_an_env_file_that_is_not_utf_8_stops_the_start(env_file, encoding):
    env_file.write_text("ADMIN_USERNAME=Zoë\n", encoding=encoding)
    with pytest.raises(SystemExit, match=r"^\.env: .*UTF-8.*$"):
        app.load_settings()


# ── 2 Errors ────────────────────────────────────────────────────────────────────────────────────
# One envelope for every error, whoever noticed it; it says the next step and repeats nothing.

SENT = "canary-7f3a"
"""Appears in no answer, wherever it was sent."""
TASK = '{"title": "x"}'
ERRORS = [
    ("GET", f"/{SENT}", {}, "404 not_found"),
    ("PROPFIND", "/tasks", {}, "405 method_not_allowed"),
    ("GET", "/tasks/9223372036854775808", {}, "422 validation_failed"),
    ("GET", "/tasks/9223372036854775807", {}, "404 task_not_found"),
    ("GET", "/tasks", {"headers": {"Authorization": f"Bearer {SENT}"}}, "401 invalid_token"),
    ("GET", "/tasks/events", {"headers": {"Last-Event-ID": SENT}}, "422 validation_failed"),
    ("POST", "/auth/refresh", {"json": {"refresh_token": SENT}}, "401 invalid_refresh_token"),
    ("POST", "/tasks", {"json": {"title": [SENT], "due_date": SENT}}, "422 validation_failed"),
    ("PATCH", "/tasks/1", {"json": {}, "headers": {"If-Match": SENT}}, "412 version_mismatch"),
]


@pytest.mark.parametrize(("method", "path", "options", "error"), ERRORS)
def test_every_error_has_one_envelope_and_repeats_nothing(alice, method, path, options, error):
    alice.create()
    status, code = error.split()
    answer = alice.request(method, path, **options)
    body = error_of(answer, int(status))
    details = {"details"} if status == "422" else set()
    assert body.keys() == {"code", "message", "request_id"} | details
    assert (body["code"], body["request_id"]) == (code, answer.headers["X-Request-ID"])
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.text.endswith("}\n")
    assert int(answer.headers["Content-Length"]) == len(answer.content)
    assert SENT not in answer.text + str(answer.headers)


@pytest.mark.parametrize("status", [400, 403, 404, 422, 499, 500, 503])
def test_whatever_a_new_route_raises_gets_the_envelope(anonymous, monkeypatch, status):
    def added() -> None:
        if status == 500:
            raise RuntimeError(SENT)
        raise fastapi.HTTPException(status, "No recipe like this.", {"Retry-After": "7"})

    monkeypatch.setattr(app.app.router, "routes", [*app.app.router.routes])
    app.app.add_api_route("/added", added, include_in_schema=False)
    answer = anonymous.get(ROOT + "/added", headers={"X-Request-ID": "mine"})
    error = error_of(answer, status)
    assert error["request_id"] == answer.headers["X-Request-ID"] == "mine"
    assert re.fullmatch("[a-z_]+", error["code"])
    assert SENT not in answer.text
    if status != 500:
        assert error["message"] == "No recipe like this."
        assert answer.headers["Retry-After"] == "7"


@pytest.mark.parametrize(
    ("status", "content", "content_type"),
    [
        (201, TASK.ljust(65_536), "application/json"),
        (400, "{" + TASK, "application/json"),
        (400, b'{"title": "\xff"}', "application/json"),
        (400, "[" * 30_000, "application/json"),
        (413, TASK.ljust(65_537), "application/json"),
        (413, iter([b" " * 4096] * 17), "application/json"),  # In chunks, without a length.
        (415, TASK, "application/x-www-form-urlencoded"),
    ],
)
def test_a_body_is_json_of_64_kib_or_refused(alice, status, content, content_type):
    headers = {"Content-Type": content_type.encode("latin-1")}
    answer = good(alice.post("/tasks", content=content, headers=headers), status)
    codes = {400: "invalid_json", 413: "body_too_large", 415: "unsupported_media_type"}
    assert status not in codes or error_of(answer, status)["code"] == codes[status]
    assert status != 415 or "curl --json" in answer.text


PATHS = {path: {method.upper() for method in it} for path, it in app.app.openapi()["paths"].items()}
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"}


@pytest.mark.parametrize("path", PATHS)
def test_405_lists_exactly_the_methods_that_work(admin, path):
    works = PATHS[path] | {"HEAD" for method in PATHS[path] if method == "GET"}
    url = ROOT + re.sub(r"\{\w+\}", "7", path)
    for method in sorted(METHODS - works):
        answer = admin.request(method, url, json={"title": "x"})
        assert (method, good(answer, 405).headers["Allow"]) == (method, ", ".join(sorted(works)))


@pytest.mark.parametrize("asked", ["a", "trace-1.2_3", "x" * 64, "", "x" * 65, "a b", "a/b", "é"])
def test_a_plain_request_id_is_kept_and_any_other_is_replaced(anonymous, asked):
    headers = {"X-Request-ID": asked.encode("latin-1")}
    ids = {anonymous.get("/tasks", headers=headers).headers["X-Request-ID"] for _ in range(2)}
    kept = asked in ("a", "trace-1.2_3", "x" * 64)
    assert len(ids | {asked}) == (1 if kept else 3)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,64}", each) for each in ids)


SAME = ("content-type", "content-length", "etag", "link", "content-disposition")
GETS = [path for path in PATHS if "GET" in PATHS[path]]


@pytest.mark.parametrize("path", [*GETS, "/docs", "/redoc"])
def test_every_get_answers_head_and_takes_a_trailing_slash(admin, path):
    good(admin.post("/tasks/", json={"title": "x"}), 201)
    things = {name: make(admin) for name, make in THINGS.items() if name in path}
    url = ROOT + path.format(**things)
    with admin.stream("GET", url) as answer, admin.stream("GET", url + "/") as slashed:
        assert (answer.status_code, slashed.status_code) == (200, 200)
    head = good(admin.head(url))
    assert head.content == b""
    if path not in ("/health/detailed", "/metrics"):  # Their figures change in between.
        assert [head.headers.get(it) for it in SAME] == [answer.headers.get(it) for it in SAME]


# ── 3 Database ──────────────────────────────────────────────────────────────────────────────────
# What was answered is on the disk, what failed left nothing, and nobody's statement stops others.

posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such files and signals")


def database_path() -> Path:
    return app.settings.data_dir / "tasks.db"


def elsewhere(script: str) -> list[tuple[Any, ...]]:
    """What the last of these statements gives another process."""
    if SQLITE:
        with contextlib.closing(sqlite3.connect(database_path(), isolation_level=None)) as db:
            return [db.execute(statement).fetchall() for statement in script.split(";")][-1]

    async def execute() -> list[tuple[Any, ...]]:
        async with app.database.driver.create_pool(app.database.url, min_size=0) as pool:
            rows = [await pool.fetch(statement) for statement in script.split(";")][-1]
        return [tuple(row) for row in rows]

    return asyncio.run(execute())


@pytest.fixture
def notes(server: Server) -> Callable[[], list[int]]:
    """A table for bodies of transactions, and which of its lines are committed."""
    server.sql("CREATE TABLE notes (number INTEGER, text TEXT)")
    return lambda: [row[0] for row in elsewhere("SELECT number FROM notes ORDER BY number")]


async def note(number: int, then: Any = None, size: int = 0) -> None:
    """Write a line in a transaction, and do something else in it."""
    async with app.database.transaction() as db:
        await db.fetch("INSERT INTO notes VALUES (:n, :text)", n=number, text="x" * size)
        if then:
            await then(db)


async def outcomes(*work: Any) -> list[Any]:
    return await asyncio.gather(*work, return_exceptions=True)


def test_every_commit_is_durable(server):
    on_sqlite = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    for name, value in (on_sqlite if SQLITE else {"synchronous_commit": "on"}).items():
        assert server.sql(f"{'PRAGMA' if SQLITE else 'SHOW'} {name}") == [{name: value}]


@posix
@sqlite_only
@pytest.mark.usefixtures("alice")
def test_only_the_owner_can_read_the_files():
    directory = database_path().parent
    modes = {path.name: path.stat().st_mode & 0o777 for path in [directory, *directory.iterdir()]}
    assert modes.pop("data") == 0o700
    assert modes == dict.fromkeys(("tasks.db", "tasks.db-wal", "tasks.db-shm", "secret_key"), 0o600)


def test_of_50_racing_writers_exactly_those_that_end_well_are_there(server, notes):
    async def raises(_db: Any) -> None:
        raise ZeroDivisionError

    async def is_cancelled(db: Any) -> None:
        asyncio.current_task().cancel()
        await db.fetch("INSERT INTO notes VALUES (-1, '')")

    async def race() -> list[Any]:
        async def cancels_one_that_has_ended(_db: Any) -> None:
            next(ended).cancel()

        ends = [None, raises, is_cancelled, None, cancels_one_that_has_ended] * 10
        writers = [asyncio.create_task(note(number, end)) for number, end in enumerate(ends)]
        ended = iter(writers[3::5])  # These wait for the commit then.
        await asyncio.sleep(0)
        for impatient in writers[::5]:  # The first waits for its BEGIN, the others for their turn.
            impatient.cancel()
        return await outcomes(*writers)

    kinds = [type(outcome).__name__ for outcome in server.run(race())]
    waiting = [kinds.pop(number) for number in range(48, 0, -5)]
    assert kinds == ["CancelledError", "ZeroDivisionError", "CancelledError", "NoneType"] * 10
    assert not SQLITE or waiting == ["CancelledError"] * 10
    server.run(note(53))
    there = notes()
    sure = {*range(4, 50, 5), 53}
    assert sure <= {*there} <= sure | {*range(3, 50, 5)}
    assert len(there) == 11 + 10 if SQLITE else len(there) >= 11 + waiting.count("NoneType")


@sqlite_only
def test_who_waits_together_shares_a_commit_and_nobody_is_answered_before_it(server, notes):
    async def race() -> list[Any]:
        async def look_around(_db: Any) -> None:
            assert not any(other.done() for other in others)
            assert await asyncio.to_thread(notes) == []
            raise ZeroDivisionError

        others = [asyncio.create_task(note(number)) for number in (1, 2)]
        return await outcomes(*others, note(3, look_around), note(4))

    assert isinstance(server.run(race())[2], ZeroDivisionError)
    assert notes() == [1, 2, 4]


@posix
@sqlite_only
@pytest.mark.parametrize("where", ["at a statement", "at the commit"])
def test_a_full_disk_fails_the_whole_group(server, alice, notes, where):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = database_path().with_name("tasks.db-wal").stat().st_size
    try:
        if where == "at a statement":  # SQLite undoes the whole transaction.
            server.sql("PRAGMA max_page_count = 1")
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        failed = server.run(outcomes(note(1), note(2, size=10_000), note(3)))
        assert [type(outcome) for outcome in failed] == [sqlite3.OperationalError] * 3
        answer = alice.post("/tasks", json={"title": "x", "description": "x" * 9_999})
        assert error_of(answer, 503)["code"] == "database_unavailable"
        assert alice.titles() == notes() == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        server.sql("PRAGMA max_page_count = 4294967294")
    server.run(note(4))
    assert (alice.create()["version"], notes()) == (1, [4])


@posix
@sqlite_only
@pytest.mark.parametrize("how", ["removed", "replaced", "overwritten"])
def test_a_database_that_is_lost_under_the_server_is_a_503(alice, how):
    path = database_path()
    copy = Path(shutil.copy(path, path.with_name("copy.db")))
    if how == "overwritten":
        path.with_name("tasks.db-wal").write_bytes(b"")
        path.write_bytes(b"what the disk left of it" * 10_000)
    else:
        path.unlink()
    if how == "replaced":
        copy.rename(path)
    for url in (ROOT + "/health", ROOT + "/health/detailed", "/tasks", "/tasks/statistics"):
        assert error_of(alice.get(url), 503)["code"] == "database_unavailable"
    error_of(alice.post("/tasks", json={"title": "x"}), 503)


STEPS = ["ALTER TABLE tasks ADD COLUMN shade VARCHAR", "UPDATE tasks SET shade = 'old'"]
FOREIGN = """
CREATE TABLE _litestream_seq (id INTEGER PRIMARY KEY, seq INTEGER);
ALTER TABLE tasks ADD COLUMN colour TEXT DEFAULT 'red'; CREATE INDEX my_own ON tasks (colour)"""
DEFINITIONS = """
SELECT t.name, c.name, c.type, "notnull" FROM sqlite_master t JOIN pragma_table_info(t.name) c
UNION SELECT tbl_name, name, sql, 0 FROM sqlite_master WHERE type = 'index'"""
if not SQLITE:
    DEFINITIONS = """
SELECT table_name, column_name, data_type, is_nullable FROM information_schema.columns
UNION SELECT tablename, indexname, indexdef, '' FROM pg_indexes WHERE schemaname = 'public'"""


@pytest.fixture
def stopped(start: Callable[..., Server]) -> Path:
    """The database of an instance that has stopped, in which alice has a task."""
    server = start()
    server.person("alice").register().create()
    server.stop()
    return database_path()


def contents(path: Path) -> list[str]:
    if not path.exists():
        return []  # It is PostgreSQL's.
    with contextlib.closing(sqlite3.connect(path)) as db:
        return sorted(db.iterdump())


def test_an_upgrade_keeps_a_copy_and_runs_each_step_once(stopped, start, capsys, monkeypatch):
    elsewhere(FOREIGN)
    complete = set(elsewhere(DEFINITIONS))
    elsewhere("DROP TABLE attachments; DROP INDEX ix_sessions_user_id; DROP INDEX ix_tasks_key")
    before = contents(stopped)
    monkeypatch.setattr(app, "UPGRADES", app.UPGRADES + STEPS)
    server = start()
    server.person("alice").log_in().create("after it")
    server.stop()
    said = capsys.readouterr().out
    start().stop()
    found = elsewhere("SELECT title, colour, shade FROM tasks ORDER BY id")
    assert found == [("Buy milk", "red", "old"), ("after it", "red", None)]
    assert complete < set(elsewhere(DEFINITIONS))
    copies = [*stopped.parent.glob("tasks-*.db")]
    assert len(copies) == SQLITE  # PostgreSQL keeps no copy.
    for copy in copies:
        assert contents(copy) == before
        assert str(copy) in said
        assert os.name != "posix" or copy.stat().st_mode & 0o777 == 0o600


NEWER = "UPDATE schema_version SET version = 78"


@pytest.mark.parametrize(("sql", "said"), [("SELECT 1", "column"), (NEWER, "version 78")])
def test_a_failed_upgrade_and_a_newer_database_stop_the_start_and_change_nothing(
    stopped, command, monkeypatch, sql, said
):
    monkeypatch.setattr(app, "UPGRADES", [*STEPS, "ALTER TABLE tasks ADD COLUMN title INTEGER"])
    elsewhere(sql)
    before = (contents(stopped), set(elsewhere(DEFINITIONS)))
    assert re.fullmatch(f".*{said}.*", command("token alice"))
    assert (contents(stopped), set(elsewhere(DEFINITIONS))) == before


# ── 4 Tables ────────────────────────────────────────────────────────────────────────────────────
# No id comes back, and nothing of a deleted account stays.

JSON = {"Content-Type": "application/json"}
ALICE = {"username": "alice", "password": PASSWORD}
NEW = "another long password"
CHANGE = {"password": NEW, "current_password": PASSWORD}


def session_of(person: Person) -> int:
    """The id of the session that this person came by."""
    sessions = good(person.get("/auth/sessions")).json()["data"]
    return next(session["id"] for session in sessions if session["current"])


THINGS: dict[str, Callable[[Person], int]] = {
    "task_id": lambda owner: owner.create()["id"],
    "attachment_id": lambda owner: owner.post(
        f"/tasks/{owner.create()['id']}/attachments", files={"file": ("a.txt", b"x")}
    ).json()["id"],
    "session_id": lambda owner: session_of(owner.again()),
    "token_id": lambda owner: owner.script().tokens["id"],
    "user_id": lambda owner: owner.user["id"],
}


def test_deleting_an_account_deletes_everything_and_no_id_comes_back(server, bob, admin):
    def counts() -> dict[str, int]:
        tables = app.SQLModel.metadata.tables.items()
        return {name: len(server.sql(str(table.select()))) for name, table in tables}

    things_of(bob, " ".join(THINGS))
    before = counts()
    for path in ("/users/me", "/admin/users/4"):
        alice = server.person("alice").register()
        things = things_of(alice, " ".join(THINGS))
        assert all(n > before[name] for name, n in counts().items())
        good((alice if path == "/users/me" else admin).delete(path), 204)
        assert counts() == before
    assert alice.register().all_tasks() == {}
    assert all(make(alice) > things[name] for name, make in THINGS.items())


# ── 5 Schemas ───────────────────────────────────────────────────────────────────────────────────
# What comes in is trimmed, normalised or refused by name; what goes out is as it came.

TAKEN = {
    "title": {" Buy\nmilk\u3000": "Buy\nmilk", "𝄞" * 200: None, "e" + "\u0301" * 30: None},
    "description": {None: None, "": None, " kept \n": None, "x" * 10_000: None, "e\u0301😀": None},
    "due_date": {"2026-11-20T17:00:00": "2026-11-20T17:00:00Z", None: None}
    | {"2026-11-20t23:00:00.25-02:00": "2026-11-21T01:00:00.250000Z"}
    | {"0001-01-01T00:00:00Z": None, "9999-12-31": "9999-12-31T23:59:59Z"},
}
"""What a task takes, and what it keeps; None is the same."""
MARKS = "e" + "\u0301\u0f73" * 16
NO_TASK = {
    "title": ["", " \u3000", "x" * 201, None, 1, [], "a\0b", "\ud800", "e" + "\u0301" * 31],
    "description": ["x" * 10_001, 1, "a\0b", "\udfff", MARKS],
    "status": ["", "Todo", None, 1],
    "priority": ["urgent", None],
    "completed": ["true", 1, None],
    "due_date": ["", "tomorrow", 1768478400, "20261120", "2026-02-30", "2026-01-01\n"],
    **{name: [1] for name in ("id", "owner_id", "version", "deleted_at")},
}
NO_TASK["due_date"] += ["1768478400", "9999-12-31T23:59-14:00", "0001-01-01T00:00+14:00"]
NO_USER = {
    "username": ["", "ab", "x" * 51, "a b", "a@b", "b\u200bob", "b\u202eob", "b/ob", "b\0ob", 7],
    "password": ["1234567", "ab" * 129, 12345678, "a secret\0", "\ud800 secret", MARKS, None],
    "email": ["x", "@a.b", "a@", "a b@a.b", "a@a.b\n", "x" * 251 + "@a.b"],
}
NO_USER["username"] += ["😀😀😀", "ﷺabc", "bob\ud800", MARKS, "e\u0301" * 60]
NO_USER["password"] += ["12345678", "PASSWORD", "password1", "iloveyou"]
NO_CHANGE = {"password": NO_USER["password"], "username": ["bob"], "role": ["root"], "seq": [9]}
NO_TOKEN = {"name": ["", " ", "x" * 101, None, "a\0b"], "scope": ["", "admin", "READ", None]}
NO_TOKEN["expires_at"] = ["2026-01-15T12:00:00Z", "2026-01-14", "tomorrow", 4e9]
REFUSED: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    "POST /auth/register": (ALICE | {"username": "new"}, NO_USER | {"role": ["user"]}),
    "POST /admin/users": (ALICE | {"username": "new"}, NO_USER | {"role": ["root", None]}),
    "PATCH /admin/users/2": ({"role": "admin"}, NO_CHANGE | {"is_active": [0], "email": ["a@b"]}),
    "PATCH /users/me": (CHANGE, NO_CHANGE | {"email": NO_USER["email"]}),
    "POST /auth/api_tokens": ({"name": "x", "scope": "read"}, NO_TOKEN),
    **dict.fromkeys(["POST /tasks", "PUT /tasks/1", "PATCH /tasks/1"], ({"title": "x"}, NO_TASK)),
}


@pytest.mark.parametrize("field", TAKEN)
def test_what_a_task_takes(alice, field):
    alice.create()
    for sent, kept in TAKEN[field].items():
        body = {"title": "x"} | {field: sent}
        answers = [alice.post("/tasks", json=body), alice.put("/tasks/1", json=body)]
        answers += [alice.patch("/tasks/1", json={field: sent}), alice.get("/tasks/1")]
        assert [answer.json()[field] for answer in answers] == [kept or sent] * 4


@pytest.mark.parametrize("route", REFUSED)
def test_what_is_refused_is_named(alice, admin, route):
    alice.create()
    body, refused = REFUSED[route]
    person = admin if "/admin/" in route else alice
    for field, values in (refused | {"colour": ["red"]}).items():
        for value in values:
            sent = {"content": json.dumps(body | {field: value}), "headers": JSON}
            error = error_of(person.request(*route.split(), **sent), 422)
            assert error["details"][0]["field"] == field
    assert person.request(*route.split(), json=body).is_success


def test_completed_may_be_written_instead_of_status(alice):
    statuses = ["todo", "in_progress", "done"]
    for before, completed, status in itertools.product(statuses, [True, False], [None, *statuses]):
        path = f"/tasks/{alice.create(status=before)['id']}"
        wanted = {"completed": completed, "status": status or ("done" if completed else "todo")}
        sent = {"title": "x", "completed": completed} | (wanted if status else {})
        for method, where in (("POST", "/tasks"), ("PATCH", path), ("PUT", path)):
            answer = alice.request(method, where, json=sent)
            if completed == (wanted["status"] == "done"):
                assert wanted.items() < answer.json().items()
            else:
                error_of(answer, 422)


def test_a_username_is_of_any_script_and_one_whatever_its_case_and_width(server):
    names = {"alice": "ALICE", "x" * 50: "ｘ" * 50, "A.b-c_9": "a.B-C_9", "Straße": "STRASSE"}
    names |= {"ΣΊΣΥΦΟΣ": "σίσυφος", "名前です": "名前です", "नमस्ते": "नमस्ते"}
    for name, same in names.items():
        person = server.person(name).register()
        assert person.user["username"] == name
        answer = person.post("/auth/register", json=ALICE | {"username": same, "email": "a@b"})
        assert error_of(answer, 409)["code"] == "username_taken"
        assert server.person(f" {same}\n").log_in().user == person.user


# ── 6 Passwords and tokens ──────────────────────────────────────────────────────────────────────
# Every character of a password counts, and a token that is not exactly ours is nobody's.

SHIPPED_COSTS = (app.BCRYPT_COST, app.UNKNOWN_USER_HASH[:7])  # Before the tests make them cheap.


def test_every_character_of_a_password_counts(server):
    differ = {"x9!kQ2zz": "x9!kQ2zZ", "  spaces count  ": "spaces count", "ab" * 128: "ab" * 127}
    differ["0123456789" * 8 + "a"] = "0123456789" * 8 + "b"
    for number, (password, other) in enumerate(differ.items()):
        person = server.person(f"user-{number}", password).register().log_in()
        error_of(person.post("/auth/login", json={"username": person.name, "password": other}), 401)


def test_the_database_has_hashes_and_no_password_or_token(server, alice):
    tokens = [alice.script().tokens["token"], alice.tokens["refresh_token"]]
    tables = app.SQLModel.metadata.tables.values()
    stored = str([server.sql(str(table.select())) for table in tables])
    assert all(hashlib.sha256(token.encode()).hexdigest() in stored for token in tokens)
    secrets = [*tokens, alice.tokens["access_token"], PASSWORD, ADMIN_PASSWORD]
    assert [secret for secret in secrets if secret in stored] == []


def test_an_unknown_name_looks_like_a_wrong_password_and_costs_the_same(server, alice, monkeypatch):
    def check(password: bytes, hashed: bytes) -> bool:
        costs.append(hashed[:7])
        return compare(password, hashed)

    compare = bcrypt.checkpw
    costs: list[bytes] = []
    monkeypatch.setattr(bcrypt, "checkpw", check)
    assert SHIPPED_COSTS == (12, "$2b$12$")
    alice.headers["X-Request-ID"] = "same"
    wrong = [{"password": "wrong one"}, {"username": "nobody"}, {"username": "", "password": ""}]
    errors = [error_of(alice.post("/auth/login", json=ALICE | each), 401) for each in wrong]
    assert (errors, costs) == ([errors[0]] * 3, [b"$2b$04$"] * 3)
    change = "UPDATE users SET password_hash = '' WHERE id = 2"  # While it is compared.
    monkeypatch.setattr(bcrypt, "checkpw", lambda *_: server.sql(change) == [])
    error_of(alice.post("/auth/login", json=ALICE), 401)


def test_an_access_token_has_these_claims_and_with_any_other_it_is_nobodys(server, configure):
    key = "".join(map(chr, range(48, 123)))
    configure(secret_key=key)
    people = [server.person(name).register() for name in ("alice", "bob")]
    unverified = {"verify_signature": False}
    alice, bob = (jwt.decode(each.tokens["access_token"], options=unverified) for each in people)
    assert alice.keys() == {"sub", "sid", "iat", "exp", "jti", "typ", "iss"}
    assert (alice["sub"], alice["exp"] - alice["iat"]) == ("2", 15 * 60)
    wrong: dict[str, list[Any]] = {"sub": ["x", "0", bob["sub"]], "sid": ["x", "99", bob["sid"]]}
    wrong |= {"exp": ["x", 0, "9999999999"], "iat": ["x"], "jti": [7], "iss": ["somebody"]}
    wrong |= {"typ": ["refresh", 1]}
    tokens = {"another key": jwt.encode(alice, "x" * 32), "none": jwt.encode(alice, None, "none")}
    tokens["another algorithm"] = jwt.encode(alice, key, "HS384")
    for name, values in wrong.items():
        rest = {each: alice[each] for each in alice.keys() - {name}}
        for claims in [rest, *({name: value} | rest for value in values)]:
            tokens[f"{name} {claims.get(name)}"] = jwt.encode(claims, key)
    for name, token in (tokens | {"alice's": jwt.encode(alice, key)}).items():
        answer = people[0].get("/tasks", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == (200 if name == "alice's" else 401), name


def test_an_access_token_lives_as_long_as_set_and_10_seconds(server, configure, clock):
    configure(access_token_minutes=60)
    alice = server.person("alice").register()
    for seconds in (-5, 3_614):
        clock.advance(seconds=seconds)
        good(alice.get("/tasks"))
    clock.advance(seconds=2)
    assert "refresh" in error_of(alice.get("/tasks"), 401)["message"]


# ── 7 Who asks ──────────────────────────────────────────────────────────────────────────────────
# One table says who may do what: anonymous, another user, the owner's read token and write token,
# the owner, an admin's write token, an admin. 409: the name was just taken; the last admin stays.

MATRIX = """
201 409 409 409 409 409 409  POST /auth/register
200 200 200 200 200 200 200  POST /auth/login, POST /auth/token
401 401 401 401 401 401 401  POST /auth/refresh
401 204 403 403 204 403 204  POST /auth/logout, POST /auth/logout_all
401 200 403 403 200 403 200  GET /auth/sessions, GET /auth/api_tokens, PATCH /users/me
401 201 403 403 201 403 201  POST /auth/api_tokens
401 404 403 403 204 403 404  DELETE /auth/sessions/{session_id}, DELETE /auth/api_tokens/{token_id}
401 204 403 403 204 403 409  DELETE /users/me
401 200 200 200 200 200 200  GET /users/me, GET /tasks, GET /tasks/changes, GET /tasks/statistics
401 200 200 200 200 200 200  GET /tasks/events
401 201 403 201 201 201 201  POST /tasks
401 404 200 200 200 404 404  GET /tasks/{task_id}, GET /tasks/{task_id}/attachments
401 404 200 200 200 404 404  GET /attachments/{attachment_id}
401 404 403 200 200 404 404  PUT /tasks/{task_id}, PATCH /tasks/{task_id}
401 404 403 200 200 404 404  POST /tasks/{task_id}/restore
401 404 403 201 201 404 404  POST /tasks/{task_id}/attachments
401 404 403 204 204 404 404  DELETE /tasks/{task_id}, DELETE /attachments/{attachment_id}
401 204 403 204 204 204 204  DELETE /tasks/trash
401 403 403 403 403 403 200  GET /admin/users, GET /admin/tasks, GET /admin/users/{user_id}
401 403 403 403 403 403 200  PATCH /admin/users/{user_id}
401 403 403 403 403 403 201  POST /admin/users
401 403 403 403 403 403 202  POST /admin/cleanup
401 403 403 403 403 403 204  DELETE /admin/users/{user_id}
401 403 403 403 403 200 200  GET /../../metrics
200 200 200 200 200 200 200  GET /../../health, GET /../../health/detailed, GET /../../docs
200 200 200 200 200 200 200  GET /../../docs/oauth2-redirect, GET /../../redoc
200 200 200 200 200 200 200  GET /../../openapi.json
307 307 307 307 307 307 307  GET /../../
4401 101 101 101 101 101 101  WS /../../ws/tasks/{client_id}
"""
LINES = [line.split("  ") for line in MATRIX.strip().splitlines()]
ROWS = {route: statuses for statuses, routes in LINES for route in routes.split(", ")}
INPUTS = {
    "POST /auth/register": {"json": ALICE | {"username": "new"}},
    "POST /auth/login": {"json": ALICE},
    "POST /auth/token": {"data": ALICE | {"grant_type": "password"}},
    "POST /auth/refresh": {"json": {"refresh_token": "unknown"}},
    "POST /auth/api_tokens": {"json": {"name": "x", "scope": "read"}},
    **{route: {"json": {}} for route in ("PATCH /users/me", "PATCH /tasks/{task_id}")},
    **{route: {"json": {"title": "x"}} for route in ("POST /tasks", "PUT /tasks/{task_id}")},
    "POST /tasks/{task_id}/attachments": {"files": {"file": ("a.txt", b"x")}},
    "POST /admin/users": {"json": ALICE | {"username": "newer"}},
    "PATCH /admin/users/{user_id}": {"json": {"role": "user"}},
}


def things_of(person: Person, route: str) -> dict[str, int]:
    """Something new of this person's for the `{…_id}` of a route."""
    things = {name: make(person) for name, make in THINGS.items() if name in route}
    if route.endswith("/restore"):
        person.trash({"id": things["task_id"]})
    return things


def ask(person: Person, route: str, things: dict[str, Any]) -> httpx.Response:
    """What a route answers; 101 for a WebSocket that says hello, else its close code."""
    method, path = route.format(client_id="tab", **things).split()
    if method == "WS":
        headers = {"Authorization": person.headers.get("Authorization", "Bearer nobody")}
        with person.server.websocket("tab", additional_headers=headers) as live:
            return httpx.Response(101 if person.tokens and live.frame() else live.close_code())
    with person.stream(method, path, **INPUTS.get(route, {})) as answer:
        if not path.endswith("/events"):
            answer.read()
        return answer


def test_every_route_has_a_row_in_the_matrix():
    rows = {row.replace(" ", f" {app.API}").replace(app.API + ROOT, "") for row in ROWS}
    routes = fastapi.routing.iter_route_contexts(app.app.routes)
    found = {f"{method} {each.path}" for each in routes for method in each.methods or {"WS"}}
    found = {re.sub(r":\w+}", "}", route) for route in found}  # Without convertors.
    assert found ^ rows == {"HEAD /openapi.json", "WS /static-offline-docs"}


def test_who_may_do_what(server, anonymous, alice, admin):
    got = {}
    for number, route in enumerate(ROWS):
        other = server.person(f"other-{number}").register()
        owner = server.person(f"owner-{number}").register()
        scripts = [owner.script("read"), owner.script(), admin.log_in().script()]
        people = [anonymous, other, *scripts[:2], owner, scripts[2], admin]
        answers = [ask(person, route, things_of(owner, route)) for person in people]
        got[route] = " ".join(str(answer.status_code) for answer in answers)
        for answer in (answers[at] for at in (2, 3, 5) if "metrics" not in route):
            if answer.status_code == 403:
                assert answer.json()["error"]["code"] == "insufficient_scope"
    assert got == ROWS
    assert eventually(lambda: alice.get(ROOT + "/health/detailed").json()["last_cleanup"])


@pytest.mark.parametrize("route", [it for it in ROWS if re.search("(?<!client)_id", it)])
def test_what_is_not_yours_looks_absent_and_what_is_no_id_is_422(alice, bob, admin, route):
    [(name, mine)] = things_of(alice, route).items()
    person = admin if "/admin/" in route else bob
    absent = error_of(ask(person, route, {name: 2**63 - 1}), 404)
    if person is bob:
        foreign = error_of(ask(bob, route, {name: mine}), 404)
        assert foreign["message"] == absent["message"].replace(str(2**63 - 1), str(mine))
    for nonsense in ("0", "-1", "x", "1.5", "1e3", "%20", "%D9%A1", 2**63, "9" * 5_000):
        error = error_of(ask(person, route, {name: nonsense}), 422)
        assert error["details"][0]["field"] == name


def test_a_401_says_the_next_step(alice):
    says = dict.fromkeys(["", "{access_token}", "Basic YWxpY2U6eA=="], "Authorization: Bearer")
    says |= dict.fromkeys(["Bearer {refresh_token}", "Bearer tsk_x", "Bearer é" * 999], "log in")
    for header, message in says.items():
        sent = {"Authorization": header.format(**alice.tokens).encode()}
        answer = alice.get("/users/me", headers=sent)
        assert message in error_of(answer, 401)["message"]
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    good(alice.get("/tasks", headers={"Authorization": f"bEARER {alice.tokens['access_token']}"}))


def works(person: Person) -> bool:
    """Whether their tokens still work; the two tokens of a session agree."""
    accepted = person.get("/tasks").is_success
    if "refresh_token" in person.tokens:
        answer = person.refresh()
        assert answer.is_success == accepted
        if accepted:
            person.accept(answer)
    return accepted


ENDS: dict[str, tuple[str, str, Any, str]] = {
    "logout": ("session", "POST /auth/logout", None, "other script"),
    "logout everywhere": ("other", "POST /auth/logout_all", None, "script"),
    "session ended": ("other", "DELETE /auth/sessions/{session}", None, "other script"),
    "new password": ("other", "PATCH /users/me", CHANGE, "other"),
    "new e-mail": ("other", "PATCH /users/me", {"email": "a@b"}, "session other script"),
    "token deleted": ("other", "DELETE /auth/api_tokens/{script}", None, "session other"),
    "disabled": ("admin", "PATCH /admin/users/{user}", {"is_active": False}, ""),
    "password set": ("admin", "PATCH /admin/users/{user}", {"password": NEW}, ""),
}


@pytest.mark.parametrize("ending", ENDS)
def test_what_ends_is_dead_for_the_very_next_request(alice, bob, admin, ending):
    who, route, body, living = ENDS[ending]
    people = {"session": alice, "other": alice.again(), "script": alice.script()}
    ids = {"session": session_of(alice), "script": people["script"].tokens["id"]}
    method, path = route.format(**ids, user=alice.user["id"]).split()
    assert people.get(who, admin).request(method, path, json=body).is_success
    assert [name for name, person in people.items() if works(person)] == living.split()
    assert works(bob)


# ── 8 Rate limits ───────────────────────────────────────────────────────────────────────────────
# No spelling of a path escapes the count, guessing ends, and nobody waits longer than one window.

LIMIT_HEADERS = ["X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset"]
WRONG = ALICE | {"password": "a wrong password"}
TRUE_TIME = time.time


def window_of(answer: httpx.Response, seconds: float = 60) -> tuple[int, int]:
    """(limit, remaining) of an answer, whose reset lies within this window."""
    limit, remaining, reset = (int(answer.headers[name]) for name in LIMIT_HEADERS)
    assert 0 <= remaining <= limit
    assert -1 <= reset - time.time() <= seconds + 2
    return limit, remaining


def refused(answer: httpx.Response, seconds: float = 60) -> bool:
    """Whether this is a 429, which then is as it should be."""
    if answer.status_code != 429:
        return False
    assert answer.request.method == "HEAD" or answer.json()["error"]["code"] == "rate_limited"
    assert 1 <= int(answer.headers["Retry-After"]) <= seconds
    assert window_of(answer, seconds)[1] == 0
    return True


@pytest.mark.parametrize(("path", "amount"), [("register", 3), ("login", 5), ("refresh", 10)])
@pytest.mark.usefixtures("rate_limits")
def test_of_20_racing_requests_an_address_gets_its_few(anonymous, monkeypatch, path, amount):
    answers = together(20, lambda _: anonymous.post(f"/auth/{path}", json={}))
    taken = [window_of(answer) for answer in answers if not refused(answer)]
    assert (len(taken), min(taken)) == (amount, (amount, 0))
    monkeypatch.setattr(time, "time", lambda: TRUE_TIME() + 61)
    assert window_of(anonymous.post(f"/auth/{path}", json={})) == (amount, amount - 1)


def test_no_spelling_of_a_login_escapes_the_count(alice, rate_limits):
    rate_limits(login="5/minute")
    spellings = [
        ("/auth/login", {"json": WRONG}),
        ("/auth/token", {"data": WRONG}),
        ("/auth/%6Cogin/?x=1", {"json": WRONG}),
        ("/auth/login", {"content": "x", "headers": {"Authorization": "Bearer x"}}),
        ("/auth/login", {"json": WRONG, "headers": {"X-Forwarded-For": "9.9.9.9"}}),
    ]
    left = [window_of(alice.post(path, **options))[1] for path, options in spellings]
    assert left == [4, 3, 2, 1, 0]
    assert refused(alice.post("/auth/login", json=ALICE))
    assert refused(alice.post("/auth/token", data=ALICE | {"grant_type": "password"}))


def test_a_user_has_one_count_of_reads_and_one_of_writes(alice, bob, anonymous, rate_limits):
    logins = [alice, alice.again(), alice.script("read"), alice.script("write")]
    rate_limits(read="4/minute", write="1/minute")
    for person in logins:
        good(person.get("/users/me"))
    for person, path in zip(logins, ["/tasks", "/tasks/", "/tasks/1", "/tasks?x=1"], strict=True):
        assert refused(person.get(path))
        assert refused(person.head(path))
    alice.create()
    assert refused(alice.delete("/tasks/trash"))
    good(bob.get("/tasks"))
    for status in (401, 401, 401, 401, 429):
        error_of(anonymous.get("/tasks"), status)
    assert window_of(anonymous.post("/auth/login", json={})) == (1, 0)  # The tightest is shown.


def test_a_trusted_proxy_names_the_caller_and_a_64_is_one_address(program):
    limits = {"RATE_LIMITS": "on", "RATE_LIMIT_LOGIN": "1/minute"}
    behind = program(HOST="::", TRUSTED_PROXIES="127.0.0.1,192.0.2.0/24", **limits).listening()
    for caller, seen_before in {
        "203.0.113.9": False,
        "203.0.113.10": False,
        "10.0.0.1, 203.0.113.9": True,
        "203.0.113.10, 192.0.2.7": True,
        "::ffff:203.0.113.9": True,
        "2001:db8:0:1::1": False,
        "unknown": False,
        "2001:db8:0:1:ffff::9": True,
        "2001:db8:0:2::1": False,
    }.items():
        person = behind.person(headers={"X-Forwarded-For": caller})
        assert refused(person.post("/auth/login", json={})) is seen_before, caller


def test_an_account_takes_no_more_guesses_anywhere(start, rate_limits, monkeypatch):
    rate_limits(account="3/hour", login="1000/minute")
    alice = start(ProxyHeadersMiddleware(app.app, "127.0.0.1")).person("alice").register()
    for _ in range(4):
        alice.log_in()  # A right password is no guess.
    for guess, statuses in (("a wrong password", [401, 400, 403]), (PASSWORD, [429, 429, 429])):
        alice.headers["X-Forwarded-For"] = f"203.0.113.{len(guess)}"
        form = {"grant_type": "password", "username": "ａlice", "password": guess}
        change = {"password": "another password", "current_password": guess}
        answers = [
            alice.post("/auth/login", json={"username": "ALICE", "password": guess}),
            alice.post("/auth/token", data=form),
            alice.patch("/users/me", json=change),
        ]
        assert [answer.status_code for answer in answers] == statuses
    assert all(refused(answer, 3600) for answer in answers)
    monkeypatch.setattr(time, "time", lambda: TRUE_TIME() + 3601)
    alice.log_in()


@pytest.mark.parametrize("ahead", [0.9, 30, 365 * 86_400], ids=["a blink", "30 s", "a year"])
@pytest.mark.parametrize("spent", [1, 5])
@pytest.mark.usefixtures("rate_limits")
def test_a_clock_that_was_ahead_holds_nobody_up(anonymous, monkeypatch, ahead, spent):
    monkeypatch.setattr(time, "time", lambda: TRUE_TIME() + ahead)
    for _ in range(spent):
        assert not refused(anonymous.post("/auth/login", json={}))
    monkeypatch.setattr(time, "time", TRUE_TIME)
    assert [refused(anonymous.post("/auth/login", json={})) for _ in range(6)][-1]
    monkeypatch.setattr(time, "time", lambda: TRUE_TIME() + 61)
    redis = app.redis.windows.storage.storage if app.redis.well else None
    for key in redis.keys("*") if redis else ():
        assert redis.ttl(key) <= 60  # By a clock of its own.
        redis.delete(key)
    for _ in range(5):
        assert not refused(anonymous.post("/auth/login", json={}))


# ── 9 Live updates ──────────────────────────────────────────────────────────────────────────────
# Whatever happens to a client, it ends where GET /tasks is: in order, none twice, none missing.


def test_every_change_takes_the_next_seq_and_arrives(server, alice, bob):
    once = {"json": {"title": "x"}, "headers": {"Idempotency-Key": "once"}}
    changes = [
        ("created", "POST", "/tasks", once),
        ("updated", "PATCH", "/tasks/2", {"json": {"title": "y"}}),
        ("updated", "PATCH", "/tasks/2", {"json": {}}),
        ("updated", "PUT", "/tasks/2", {"json": {"title": "y"}}),
        ("updated", "POST", "/tasks/2/attachments", {"files": {"a": ("a.txt", b"a")}}),
        ("updated", "DELETE", "/attachments/1", {}),
        ("deleted", "DELETE", "/tasks/2", {}),
        ("updated", "POST", "/tasks/2/restore", {}),
        ("deleted", "DELETE", "/tasks/2", {}),
        ("", "DELETE", "/tasks/trash", {}),
        ("created", "POST", "/tasks", once),
    ]
    bob.create("not for alice")
    with alice.socket() as live, alice.events() as events:
        for seq, (kind, method, path, options) in enumerate(changes, 1):
            answer = alice.request(method, path, **options)
            assert answer.headers.get("ETag", f'"{seq}"') == f'"{seq}"' or "sha256" in answer.text
            assert alice.seq() == seq
            if kind:
                frame = live.frame()
                assert frame == events.frame() == {"type": kind, "seq": seq, "task": frame["task"]}
                assert frame["task"]["version"] == seq
        assert good(alice.post("/tasks", **once)).json() == frame["task"]  # A replay.
        assert alice.seq() == seq
        server.sql("UPDATE users SET seq = 30, purged_seq = 29")  # Gone before anybody looked.
        assert live.frame() == events.frame() == {"type": "resync_required"}


def sync(person: Person, since: Any = 0, limit: int = 500) -> tuple[list[dict[str, Any]], Any]:
    """Poll to the end. Returns the changed tasks, and the cursor."""
    tasks = []
    while True:
        page = good(person.get("/tasks/changes", params={"since": since, "limit": limit})).json()
        tasks += page["data"]
        since = page["next_since"]
        if not page["has_more"]:
            return tasks, since


def replay(tasks: list[dict[str, Any]], known: dict[int, Any]) -> dict[int, Any]:
    """The state after changes, in order and none twice, as a client applies them: upsert by id."""
    assert all(one["version"] < other["version"] for one, other in itertools.pairwise(tasks))
    state = known | {task["id"]: task for task in tasks}
    return {task_id: task for task_id, task in state.items() if not task["deleted_at"]}


def test_a_snapshot_of_several_pages_is_good_until_the_next_purge(alice):
    made = [alice.create(str(number)) for number in range(7)]
    alice.trash(*made[3:5])
    alice.delete("/tasks/trash")
    tasks, cursor = sync(alice, limit=2)
    assert replay(tasks, {}) == alice.all_tasks()
    middle = alice.get("/tasks/changes?limit=2").json()["next_since"]
    alice.trash(made[0])
    assert [bool(task["deleted_at"]) for task in sync(alice, cursor)[0]] == [True]
    alice.delete("/tasks/trash")
    for since in (middle, cursor):
        answer = alice.get("/tasks/changes", params={"since": since})
        assert error_of(answer, 410)["code"] == "resync_required"


@pytest.mark.parametrize("since", range(9))
def test_a_cursor_is_stale_when_a_deletion_after_it_is_forgotten(alice, since):
    made = [alice.create(str(number)) for number in range(4)]
    alice.trash(*made[:2])  # seq 5 and 6
    alice.delete("/tasks/trash")  # seq 7
    stale = since in (1, 2, 3, 4, 5, 8)
    for path in ("/tasks/changes", "/tasks/events"):
        with alice.stream("GET", path, params={"since": since}) as answer:
            assert answer.status_code == (410 if stale else 200)
    with alice.socket(since=since) as live:
        alice.create("live")
        frames = live.until("live")
    seqs = [frame.get("seq", frame["type"]) for frame in frames]
    assert seqs == (["resync_required", 8] if stale else [seq for seq in (3, 4, 8) if seq > since])


def test_events_look_as_html_says_and_go_on_where_they_ended(alice, monkeypatch):
    with alice.events() as live:
        assert live.answer.headers["Content-Type"].startswith("text/event-stream")
        assert live.answer.headers["X-Accel-Buffering"] == "no"
        assert live.first == {"comment": live.first["comment"], "id": "0"}
        task = alice.create("line\u2028separator: ö")
        block = next(live.blocks)
    assert json.loads(block.pop("data")) == {"type": "created", "seq": 1, "task": task}
    assert block == {"event": "created", "id": "1"}
    alice.create("missed")
    for where, cursor in (("?since=1", ""), ("?lastEventId=1", ""), ("", "1"), ("?since=0", "1")):
        headers = {"Last-Event-ID": cursor} if cursor else {}
        with alice.stream("GET", f"/tasks/events{where}", headers=headers) as answer:
            assert Events(answer).frame()["task"]["title"] == "missed"
    assert fastapi.routing._PING_INTERVAL == 15
    monkeypatch.setattr(fastapi.routing, "_PING_INTERVAL", 0.02)
    with alice.events() as live:
        assert [next(live.blocks).keys() for _ in range(2)] == [{"comment"}] * 2


def test_whoever_was_away_catches_up_while_others_write(alice):
    people = [alice.again() for _ in range(4)]
    together(4, lambda at: [people[at].create(f"old {at}") for _ in range(50)])
    known = alice.all_tasks()

    def change(at: int) -> None:
        mine = list(known.values())[at::4]
        people[at].trash(*mine[:30])
        for number, task in enumerate(mine[30:] * 4):
            people[at].edit(task, title=f"edit {number}", completed=number % 2 == 0)
        for number in range(60):
            people[at].create(f"new {at}-{number}")

    together(4, change)
    with ThreadPoolExecutor() as pool, alice.socket(since=200) as live:
        writing = pool.map(lambda it: [it.trash(it.create()) for _ in range(30)], people)
        with alice.events(**{"Last-Event-ID": "200"}) as events:
            polled, cursor = sync(alice, 200, limit=90)
            list(writing)
            alice.create("the end")
            polled += sync(alice, cursor)[0]
            seen = [[it["task"] for it in stream.until("the end")] for stream in (live, events)]
            for tasks in (polled, *seen):
                assert replay(tasks, known) == alice.all_tasks()


def test_what_another_process_does_arrives_within_the_look_interval(alice, clock, program):
    clock.moment = datetime.now(UTC)
    alice.log_in()
    ending = alice.again()
    alice.server = ending.server = program().listening()  # Streams there, changes here.
    with alice.socket() as live, ending.socket("ending") as ended:
        began = time.monotonic()
        task = alice.create()
        good(ending.post("/auth/logout"), 204)
        assert live.frame()["task"] == task
        assert time.monotonic() - began < 2.5
        assert ended.close_code() == 4401
        assert time.monotonic() - began < 5


@redis_only
@pytest.mark.usefixtures("rate_limits")
def test_processes_share_bells_client_ids_and_counts(start, clock, program):
    clock.moment = datetime.now(UTC)
    app.LOOK_SECONDS = 3600  # What no bell tells of does not arrive.
    alice = start().person("alice").register()
    elsewhere = program(RATE_LIMITS="on").listening().person()
    elsewhere.accept(httpx.Response(200, json=alice.tokens))
    with alice.socket() as live:
        assert elsewhere.create() == live.frame()["task"]
        with elsewhere.socket():
            assert live.close_code() == 4409
    people = [alice, elsewhere, alice]
    counts = [window_of(person.post("/auth/login", json={})) for person in people]
    assert counts == [(5, 4), (5, 3), (5, 2)]


@redis_only
def test_while_redis_does_not_answer_all_goes_on_and_it_comes_back(start, caplog):
    def subscriptions() -> int:
        return redis.info("commandstats")["cmdstat_subscribe"]["calls"]

    app.REDIS_SECONDS = 0.1
    app.settings.rate_limits = "on"
    alice = start().person("alice").register()
    redis_py = pytest.importorskip("redis")
    with alice.socket() as live, redis_py.from_url(SERVICES["REDIS_URL"]) as redis:
        redis.execute_command("CLIENT PAUSE", 3000)
        began = time.monotonic()
        assert alice.create() == live.frame()["task"]
        assert window_of(alice.get("/tasks")) == (600, 599)
        assert time.monotonic() - began < 2.5
        eventually(lambda: app.redis.well is False)
        eventually(lambda: app.redis.well)
        assert alice.create() == live.frame()["task"]
        redis.execute_command("CLIENT PAUSE", 60_000, "WRITE")  # It answers, but counts nothing.
        good(alice.get("/tasks"))
        assert app.redis.well is False
        before = subscriptions()
        eventually(lambda: subscriptions() > before + 1)
        assert app.redis.well is False
        redis.execute_command("CLIENT UNPAUSE")
        eventually(lambda: app.redis.well)
    said = [text for text in caplog.messages if text.startswith("Redis")]
    assert [text[:11] for text in said[-4:]] == ["Redis fails", "Redis is we"] * 2


def test_a_first_frame_carries_the_token_and_where_to_go_on(server, alice):
    alice.create("one")
    alice.edit(alice.create("two"), title="two, edited")
    alice.trash(alice.create("three"))
    hello = {"token": alice.script("read").tokens["token"]}
    missed = [("created", 1), ("updated", 3), ("deleted", 5)]
    for since, expected in ((0, missed), (3, missed[2:]), (5, [])):
        with server.websocket("tab") as live:
            live.connection.send(json.dumps(hello | ({"since": since} if since < 5 else {})))
            assert live.frame() == {"type": "hello", "seq": since}
            assert [(it["type"], it["seq"]) for it in live.frames(len(expected))] == expected


@pytest.mark.parametrize(
    ("frame", "first", "later"),
    [
        ("[" * 50_000, 1003, None),
        (b"{}", 1003, 1003),
        ("é" * 32_769, 1009, 1009),
        ('{"token": "x"}', 4401, None),
        ('{"token": "x", "since": -1}', 1003, None),
    ],
    ids=lambda each: repr(each)[:20],
)
def test_a_bad_frame_closes_the_socket(server, alice, frame, first, later):
    with server.websocket("tab") as live:
        live.connection.send(frame)
        assert live.close_code() == first
    with alice.socket() as live:
        live.connection.send(frame)
        alice.create("live")  # After hello, any text is ignored.
        assert live.close_code() == later if later else live.until("live")


def test_nobody_gets_in_by_a_url_or_by_silence(server, alice, monkeypatch):
    monkeypatch.setattr(app, "HELLO_SECONDS", 0.05)
    query = f"?token={alice.tokens['access_token']}"
    good(server.person().get(f"/tasks/events{query}"), 401)
    for address, headers in (("tab", {"Authorization": "Bearer x"}), (f"tab{query}", {})):
        with server.websocket(address, additional_headers=headers) as live:
            assert live.close_code() == 4401
    for address in ("x" * 65, "a%20b", "%C3%A9", "a%2Fb", "a?since=-1", "a?since=x"):
        with pytest.raises(websockets.exceptions.InvalidStatus), server.websocket(address):
            pass


def test_a_user_has_50_streams_and_one_of_each_client_id(server, alice, bob):
    with contextlib.ExitStack() as streams, alice.socket("tab") as old:
        foreign = streams.enter_context(bob.socket("tab"))
        for _ in range(49):
            streams.enter_context(alice.events())
        assert error_of(alice.get("/tasks/events"), 429)["code"] == "too_many_streams"
        headers = {"Authorization": alice.headers["Authorization"]}
        with server.websocket("more", additional_headers=headers) as live:
            assert live.close_code() == 1013
        with alice.socket("tab") as new:
            assert old.close_code() == 4409
            assert alice.create() == new.frame()["task"]
            assert bob.create() == foreign.frame()["task"]
    eventually(lambda: '"live_connections":0' in alice.get(ROOT + "/health/detailed").text)


ENDINGS: dict[str, tuple[str, Callable[[Person], Any]]] = {
    "logout": ("login", lambda alice: alice.post("/auth/logout")),
    "token expired": ("script", lambda _: app.now.advance(days=2)),
    "all expired": ("login script", lambda _: app.now.advance(days=31)),
    "deleted": ("login script", lambda alice: alice.delete("/users/me")),
    "disabled": ("login script", lambda it: it.server.sql("UPDATE users SET is_active = FALSE")),
}


def test_a_bell_that_tells_of_what_never_came_wakes_a_stream_and_lets_it_sleep_again(server, alice):
    async def ring() -> None:
        for seq in range(1000, 1100):
            app.broadcaster.ring(alice.user["id"], seq)
            await asyncio.sleep(0)

    with alice.socket() as live:
        [stream] = app.broadcaster.everybody()
        server.run(ring())
        eventually(lambda: stream.cursor == 0 and not stream.wake.is_set())
        assert alice.create() == live.frame()["task"]


def test_a_read_is_shared_until_the_bell_rings(server, alice):
    async def shared(user_id: int, rung: bool) -> bool:
        early = asyncio.create_task(app.broadcaster.shared_read(user_id, 0))
        await asyncio.sleep(0)
        if rung:
            app.broadcaster.ring(user_id, 1)
        first, second = await asyncio.gather(early, app.broadcaster.shared_read(user_id, 0))
        return first is second

    assert [server.run(shared(alice.user["id"], rung)) for rung in (False, True)] == [True, False]


def test_a_stream_outlives_a_read_that_fails(server, alice, monkeypatch):
    with alice.socket() as live:
        monkeypatch.setattr(app, "READ_SECONDS", 0)
        if app.database.engine == "sqlite":  # Nothing is quick any more.
            app.database.quick_reader.set_progress_handler(lambda: True, 1)
        task = alice.create()
        assert error_of(alice.get("/tasks"), 503)["code"] == "too_slow"
        monkeypatch.setattr(app, "READ_SECONDS", DEADLINE)
        assert live.frame()["task"] == task
    with pytest.raises(app.ApiError, match="gone"):
        server.run(app.changes_after(99, 0, 1))


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_stream_lives_as_long_as_its_session_or_api_token(alice, ending):
    script = alice.script(expires_at="2026-01-16T12:00:00Z")
    ended, end = ENDINGS[ending]
    with alice.socket() as login, alice.events() as events, script.socket("script") as other:
        end(alice)
        for name, live in (("login", login), ("script", other)):
            if name in ended:
                assert live.close_code() == 4401
            else:
                alice.again().create()
                assert live.frame()["type"] == "created"
        if "login" in ended:
            events.end()


def test_a_socket_may_send_64_kib_a_minute_pings_included(alice, monkeypatch):
    with alice.socket() as live:
        for minute in range(3):
            monkeypatch.setattr(time, "monotonic", lambda at=minute: time.perf_counter() + 61 * at)
            live.connection.send(json.dumps("x" * 60_000))
            assert live.connection.ping().wait(DEADLINE)
        with contextlib.suppress(websockets.exceptions.ConnectionClosed):
            for _ in range(1000):
                live.connection.pong()
        assert live.close_code()


HANDSHAKE = """GET /ws/tasks/x HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r
Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: YSAxNi1ieXRlIG5vbmNlIQ==\r\n"""


@pytest.mark.parametrize(
    ("sql", "code"),
    [("ALTER TABLE sessions RENAME TO lost", 1013), ("UPDATE tasks SET status = 'odd'", 1006)],
)
def test_a_failure_closes_the_socket(server, alice, sql, code):
    alice.create()
    server.sql(sql)
    headers = {"Authorization": alice.headers["Authorization"]}
    with server.websocket("tab?since=0", additional_headers=headers) as live:
        assert live.close_code() == code


@pytest.mark.parametrize("head", [HANDSHAKE, "GET /api/v1/tasks/events HTTP/1.1\r\nHost: x\r\n"])
def test_a_peer_that_never_reads_is_closed(server, alice, monkeypatch, head):
    monkeypatch.setattr(app, "SEND_SECONDS", 0.2)
    alice.create()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", server.port))
        deaf.sendall(f"{head}Authorization: {alice.headers['Authorization']}\r\n\r\n".encode())
        eventually(lambda: alice.get(ROOT + "/health/detailed").json()["live_connections"])
        while alice.get(ROOT + "/health/detailed").json()["live_connections"]:
            assert alice.edit({"id": 1}, description="é" * 10_000)["version"] < 2000
        code = b"\x03\xf5"  # 1013
        assert head != HANDSHAKE or code in b"".join(iter(lambda: deaf.recv(65536), b""))


@pytest.fixture
def receiver(configure, start, monkeypatch) -> Any:
    """The webhook's other end: its `posts` are what came, its `answers` what it gives, then 204."""
    receiver = fastapi.FastAPI()
    receiver.state.posts = []
    receiver.state.answers = []

    @receiver.post("/")
    async def take(request: fastapi.Request) -> fastapi.Response:
        receiver.state.posts.append((dict(request.headers), await request.body(), time.monotonic()))
        status = receiver.state.answers.pop(0) if receiver.state.answers else 204
        if status == 0:
            await request.receive()  # Until the other end hangs up.
        return fastapi.Response(status_code=status or 204, headers={"Location": "/"})

    monkeypatch.setattr(app, "WEBHOOK_PAUSES", [pause / 200 for pause in app.WEBHOOK_PAUSES])
    configure(webhook_url=start(receiver).url, webhook_secret=WEBHOOK_SECRET)
    return receiver.state


def messages(receiver: Any, count: int) -> list[dict[str, Any]]:
    """The next so many that were posted, by seq, once each signature is found right."""
    eventually(lambda: len(receiver.posts) >= count)
    verify = standardwebhooks.Webhook(WEBHOOK_SECRET).verify
    found = [verify(body, headers) for headers, body, _ in receiver.posts]
    receiver.posts.clear()
    return sorted(found, key=lambda message: message["seq"])


def test_every_change_is_posted_and_signed(receiver, alice):
    once = {"json": {"title": "Größe \u2028 👋"}, "headers": {"Idempotency-Key": "once"}}
    task, _ = (alice.post("/tasks", **once).json() for _ in range(2))
    assert messages(receiver, 1) == [{"type": "created", "seq": 1, "task": task}]
    task = alice.edit(task, completed=True)
    alice.trash(task)
    alice.delete("/tasks/trash")  # What is purged was trashed.
    updated, deleted = messages(receiver, 2)
    assert updated == {"type": "updated", "seq": 2, "task": task}
    assert (deleted["type"], deleted["seq"]) == ("deleted", 3)


def test_a_change_is_posted_four_times_and_never_in_the_way(receiver, alice):
    receiver.answers = [500, 307, 429, 404]
    alice.create("lost")
    eventually(lambda: len(receiver.posts) == 4)
    gaps = [later[2] - sooner[2] for sooner, later in itertools.pairwise(receiver.posts)]
    assert sorted({*app.WEBHOOK_PAUSES}) == app.WEBHOOK_PAUSES
    assert all(map(float.__ge__, gaps, app.WEBHOOK_PAUSES[1:]))
    assert len({(headers["webhook-id"], body) for headers, body, _ in receiver.posts}) == 1
    assert [message["task"]["title"] for message in messages(receiver, 4)] == ["lost"] * 4
    receiver.answers = [0] * 10
    began = time.monotonic()
    for _ in range(10):
        alice.create("nobody waits for an answer")
    assert time.monotonic() - began < 5


# ── 10 Application ──────────────────────────────────────────────────────────────────────────────
# What is on every answer, who may read it, what the log and the metrics say.

ORIGIN = "https://app.example.org"
ANSWERS: list[tuple[str | None, str, str, int, dict[str, Any]]] = [
    ("300", "POST", "/tasks", 201, {"json": {"title": "x"}}),
    ("300", "DELETE", "/tasks/1", 204, {}),
    ("600", "GET", "/tasks/1", 304, {"headers": {"If-None-Match": "*"}}),
    ("5", "POST", "/auth/token", 400, {"data": WRONG | {"grant_type": "password"}}),
    ("600", "GET", "/tasks", 401, {"headers": {"Authorization": "Bearer x"}}),
    ("600", "GET", "/tasks/events?since=99", 410, {}),
    (None, "GET", ROOT + "/docs", 200, {}),
]


@pytest.mark.parametrize(("limit", "method", "path", "status", "options"), ANSWERS)
@pytest.mark.usefixtures("rate_limits")
def test_every_answer_has_its_headers(alice, limit, method, path, status, options):
    alice.create()
    answer = good(alice.request(method, path, **options), status)
    assert answer.headers.get(LIMIT_HEADERS[0]) == limit
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["X-Request-ID"]
    policy = answer.headers.get("Content-Security-Policy", "")
    assert ("default-src 'self'" in policy) == path.endswith("/docs")
    assert ("frame-ancestors 'none'" in policy) == path.endswith("/docs")
    assert not re.search(r"\*|http|unsafe-eval", policy)


def test_pages_of_listed_origins_may_read(program):
    listed = program(CORS_ORIGINS=f"http://localhost:3000, {ORIGIN}").listening()
    admin = listed.person("admin", ADMIN_PASSWORD).log_in()
    for path in ("/tasks", "/nowhere"):
        for origin, allowed in ((ORIGIN, ORIGIN), (f"{ORIGIN}.evil.example", None)):
            answer = admin.get(path, headers={"Origin": origin})
            assert answer.headers.get("Access-Control-Allow-Origin") == allowed
            assert "Access-Control-Allow-Credentials" not in answer.headers
        assert answer.headers["Access-Control-Expose-Headers"] == "*"
    asked = {"Access-Control-Request-Method": "PATCH", "Access-Control-Request-Headers": "if-match"}
    answer = good(admin.options("/tasks/1", headers={"Origin": ORIGIN} | asked))
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN


@pytest.mark.usefixtures("configure")
def test_the_log_has_one_line_a_request_and_no_secret(program):
    secret = "Hydrangeas"
    started = program(ADMIN_PASSWORD=secret, RATE_LIMITS="on").listening()
    admin = started.person("admin", secret).log_in()  # Two requests.
    good(admin.post("/auth/login", json={"username": secret, "password": secret}), 401)
    good(admin.post("/tasks", json={"title": secret, "due_date": secret}), 422)
    good(admin.get("/nowhere%0A2026-01-01%20forged%1b[31m/"), 404)
    admin.create(secret, description="é" * 10_000)
    authorization = f"Authorization: {admin.headers['Authorization']}\r\n"
    for aborted in (
        f"GET /api/v1/tasks?search={secret} HTTP/1.1\r\nHost: x\r\n{authorization}\r\n",
        f"GET /api/v1/tasks/events?since=0 HTTP/1.1\r\nHost: x\r\n{authorization}\r\n",
        f"{HANDSHAKE}{authorization}\r\n",
        f"POST /api/v1/tasks HTTP/1.1\r\nHost: x\r\n{authorization}Content-Length: 9\r\n\r\n{{",
    ):
        with started.connect() as connection:
            connection.sendall(aborted.encode())
            if not aborted.startswith("POST"):
                connection.recv(1)
    good(admin.get("/tasks", params={"search": secret}, headers={"X-Request-ID": "mine"}))
    eventually(lambda: started.log.read_text().count("\n") > 10 + len(SERVICES) // 3)
    lines = [line for line in started.log.read_text().splitlines() if "Redis is" not in line]
    assert len(lines) == 11
    assert all(line.isascii() and line.isprintable() for line in lines)
    for each in (secret, "None", "?", admin.tokens["access_token"], admin.tokens["refresh_token"]):
        assert each not in "\n".join(lines)
    assert sum("INFO mine GET /api/v1/tasks 200 " in line for line in lines) == 1
    odd, lost = "UPDATE tasks SET status = 'odd'", "ALTER TABLE tasks RENAME TO lost"
    for sql, status in ((odd, 500), (lost, 503)):
        elsewhere(sql)
        answer = admin.get("/tasks", headers={"X-Request-ID": f"failed-{status}"})
        assert window_of(good(answer, status))[0] == 600
    started.process.terminate()
    *_, said = started.end()
    assert said.count("Traceback") == 1  # The 500's.
    assert [said.count(f"failed-{status}") for status in (500, 503)] == [2, 2]


def test_metrics_and_health_say_what_runs(admin, alice, anonymous, configure):
    alice.get("/tasks/99")
    with alice.socket(), alice.events():
        figures = good(admin.script("read").get(ROOT + "/metrics")).text
        detailed = good(anonymous.get(ROOT + "/health/detailed")).json()
    for expected in (
        f'onefile_tasks_build_info{{version="{detailed["version"]}"}} 1.0',
        "onefile_tasks_live_connections 2.0",
        r'onefile_.*_count{route="read_task",status="404"} [1-9].*',
    ):
        assert re.search(f"^{expected}$", figures, re.M)
    assert not re.search(r"^(?!#|onefile_tasks_|python_|process_)\w", figures, re.M)
    assert detailed.items() >= {"status": "ok", "live_connections": 2}.items()
    assert min(detailed["uptime_seconds"], detailed["database"]["latency_ms"]) >= 0
    for setting, status in (("admin", 401), ("open", 200), ("off", 404)):
        configure(metrics=setting)
        good(anonymous.get(ROOT + "/metrics"), status)
    configure(docs="off")
    assert good(anonymous.get(ROOT + "/")).json()["version"] == detailed["version"]


# ── 11 Routes ───────────────────────────────────────────────────────────────────────────────────
# Accounts, tasks, files and what an admin does; every race has exactly one winner.

TOKENS = {"access_token", "refresh_token", "token_type", "expires_in"}
BY_PASSWORD = {"grant_type": "password", "client_id": "x", "client_secret": "y", "scope": ""}
BY_TOKEN = {"grant_type": "refresh_token"}


def test_of_20_racing_registrations_one_wins_and_is_logged_in(anonymous, configure):
    bodies = [ALICE | {"username": name} for name in ("alice", "ALICE", "ａlice", "Alice")]
    answers = together(20, lambda at: anonymous.post("/auth/register", json=bodies[at % 4]))
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 19
    [won] = [answer for answer in answers if answer.is_success]
    assert won.json().keys() == TOKENS | {"user"}
    assert anonymous.accept(won).get("/users/me").json() == won.json()["user"]
    configure(registration="closed")
    answer = anonymous.post("/auth/register", json=ALICE | {"username": "bob"})
    assert error_of(answer, 403)["code"] == "registration_closed"


def test_logging_in_gives_tokens_that_refresh_either_way(alice, anonymous):
    first = anonymous.post("/auth/login", json=ALICE)
    for _ in range(2):
        second = anonymous.accept(first).refresh()
        form = BY_TOKEN | {"refresh_token": second.json()["refresh_token"]}
        for answer in (first, second, anonymous.post("/auth/token", data=form)):
            assert good(answer).json().keys() == TOKENS
            assert (answer.json()["token_type"], answer.json()["expires_in"]) == ("bearer", 900)
            assert answer.headers["Cache-Control"] == "no-store"
            assert anonymous.accept(answer).user == alice.user
        first = anonymous.post("/auth/token", data=ALICE | BY_PASSWORD, auth=("client", ""))


def test_the_form_has_errors_that_oauth_libraries_read(alice):
    forms = [
        (BY_PASSWORD | ALICE | {"password": "wrong one"}, "invalid_grant"),
        (BY_TOKEN | {"refresh_token": "unknown"}, "invalid_grant"),
        (BY_TOKEN, "invalid_request"),
        (BY_PASSWORD | {"username": "alice"}, "invalid_request"),
        (BY_PASSWORD | ALICE | {"username": "\u0f73" * 7_000}, "invalid_request"),
        (ALICE | {"grant_type": "client_credentials"}, "unsupported_grant_type"),
        (ALICE, "invalid_request"),
    ]
    for form, error in forms:
        answer = good(alice.post("/auth/token", data=form), 400)
        assert (answer.json()["error"], answer.headers["Cache-Control"]) == (error, "no-store")


def test_of_20_racing_refreshes_one_wins_and_its_tokens_work(alice):
    form = BY_TOKEN | {"refresh_token": alice.tokens["refresh_token"]}
    ways = [alice.refresh, lambda: alice.post("/auth/token", data=form)]
    answers = together(20, lambda at: ways[at % 2]())
    won, *lost = sorted(answers, key=lambda answer: answer.status_code)
    old = {"Authorization": alice.headers["Authorization"]}
    assert works(alice.accept(won))
    assert {answer.status_code for answer in lost} == {400, 401}
    good(alice.get("/tasks", headers=old))


@pytest.mark.parametrize(
    ("seconds", "successor_is_used", "survives"),
    [(0.9, False, True), (1.1, False, False), (0.1, True, False), (-5, False, False)],
    ids=["a-racing-tab", "too-late", "the-successor-is-used", "used-in-the-future"],
)
def test_a_replay_ends_the_session(alice, clock, seconds, successor_is_used, survives):
    other = alice.again()
    used = alice.tokens["refresh_token"]
    alice.accept(alice.refresh())
    if successor_is_used:
        alice.accept(alice.refresh())
    clock.advance(seconds=seconds)
    assert error_of(alice.refresh(used), 401)["code"] == "invalid_refresh_token"
    assert works(alice) == survives
    assert works(other)


def test_a_session_lives_30_days_from_its_last_use_and_180_in_all(alice, clock, configure):
    for hours in [30 * 24 - 1] * 6 + [5]:
        clock.advance(hours=hours)
        alice.accept(alice.refresh())
    clock.advance(hours=2)
    assert not works(alice)
    for days in (30, 7):
        configure(refresh_token_days=days)
        alice.accept(alice.log_in().refresh())
        clock.advance(days=days, seconds=1)
        assert not works(alice)


def test_any_token_of_a_session_logs_it_out(alice, bob, clock):
    script = alice.script()
    foreign = json.dumps({"refresh_token": bob.tokens["refresh_token"]})
    for content in ("", "{}", "no JSON", foreign):
        person = alice.again()
        good(person.post("/auth/logout", content=content, headers=JSON), 204)
        assert not works(person)
    clock.advance(hours=1)
    error_of(alice.post("/auth/logout"), 401)
    for token in (script.tokens["token"], alice.tokens["access_token"], "unknown"):
        error_of(alice.post("/auth/logout", json={"refresh_token": token}), 401)
        error_of(alice.refresh(token), 401)
    for person, ended in ((alice.server.person(), alice), (bob, bob)):
        body = {"refresh_token": ended.tokens["refresh_token"]}
        good(person.post("/auth/logout", json=body), 204)
        assert not works(ended)
    assert works(script)


def test_sessions_and_api_tokens_are_listed_apart_until_they_end(alice, bob, clock):
    bob.script()
    script = alice.script("read", name="  backup ", expires_at="2026-01-15T14:00:00+01:00")
    created = dict(script.tokens)
    assert re.fullmatch(r"tsk_[A-Za-z0-9_-]{43}", created.pop("token"))
    assert (created["name"], created["last_used_at"]) == ("backup", None)
    assert " ".join(created) == "id name scope created_at last_used_at expires_at"
    assert alice.get("/auth/api_tokens").json() == {"data": [created]}
    error_of(alice.delete(f"/auth/sessions/{created['id']}"), 404)
    clock.advance(minutes=59)
    assert works(script)
    other = alice.again()
    [listed] = other.get("/auth/api_tokens").json()["data"]
    [mine, first] = other.get("/auth/sessions").json()["data"]
    assert " ".join(mine) == "id address user_agent created_at last_used_at expires_at current"
    assert (mine["current"], first["current"], mine["address"]) == (True, False, "127.0.0.1")
    assert {each["last_used_at"][:16] for each in (listed, mine)} == {"2026-01-15T12:59"}
    clock.advance(minutes=1)
    assert not works(script)
    later(other, clock, days=30)
    assert other.get("/auth/api_tokens").json() == {"data": []}
    assert len(other.get("/auth/sessions").json()["data"]) == 1


def test_a_user_has_at_most_100_api_tokens(alice, monkeypatch):
    assert app.MAX_API_TOKENS == 100
    monkeypatch.setattr(app, "MAX_API_TOKENS", 3)
    answers = together(5, lambda _: ask(alice, "POST /auth/api_tokens", {}))
    assert sorted(answer.status_code for answer in answers) == [201] * 3 + [409] * 2
    late = app.add_api_token(2, app.ApiTokenCreate(name="x", scope="read"), 99)
    with pytest.raises(app.ApiError, match="session has ended"):
        alice.server.run(late)


@pytest.mark.parametrize("route", ["POST /auth/api_tokens", "DELETE /users/me"])
def test_what_outlives_a_stolen_session_takes_one_younger_than_10_minutes(alice, clock, route):
    clock.advance(minutes=10, seconds=1)
    alice.accept(alice.refresh())
    assert error_of(ask(alice, route, {}), 403)["code"] == "login_again"
    alice.log_in()
    clock.advance(minutes=9, seconds=59)
    assert ask(alice, route, {}).is_success


def test_an_account_changes_its_email_and_with_the_old_one_its_password(alice):
    for email in ("a@example.org", None, "b@example.org"):
        changed = good(alice.patch("/users/me", json={"email": email})).json()
        assert changed == alice.user | {"email": email}
    for change in (CHANGE | {"current_password": NEW}, {"password": NEW}):
        assert error_of(alice.patch("/users/me", json=change), 403)["code"] == "wrong_password"
    good(alice.patch("/users/me", json=CHANGE))
    error_of(alice.post("/auth/login", json=ALICE), 401)
    alice.password = NEW
    assert alice.log_in().user == changed


def became(before: dict[str, Any], after: dict[str, Any], **changes: Any) -> bool:
    """Whether a task is as it was, but for these fields and for when."""
    return after == before | {"updated_at": after["updated_at"]} | changes


def test_a_task_is_answered_whole_merged_and_replaced(alice, clock):
    created = good(alice.post("/tasks", json={"title": "Buy milk"}), 201)
    assert created.headers["Location"] == "/api/v1/tasks/1"
    assert created.headers["ETag"] == '"1"'
    task = created.json()
    expected = """{
        "id": 1, "title": "Buy milk", "description": null, "status": "todo", "priority": "medium",
        "due_date": null, "completed": false, "completed_at": null, "attachments": 0,
        "owner_id": 2, "version": 1, "deleted_at": null}"""
    moments = dict.fromkeys(["created_at", "updated_at"], task["created_at"])
    assert (moments | json.loads(expected)).items() <= task.items()
    assert task == alice.get("/tasks/1").json()
    clock.advance(minutes=5)
    full = {"description": "two", "status": "in_progress", "priority": "high"}
    patched = alice.edit(task, due_date="2026-02-01T09:00:00Z", **full)
    assert became(task, patched, version=2, due_date="2026-02-01T09:00:00Z", **full)
    assert patched["updated_at"] > "2026-01-15T12:05"
    cleared = alice.edit(task, description=None, title="x")
    assert became(patched, cleared, version=3, description=None, title="x")
    put = good(alice.put("/tasks/1", json={"title": "Buy milk"})).json()
    assert became(task, put, version=4)


def test_a_task_remembers_when_it_was_completed(alice, clock):
    done = alice.create(status="done")
    assert done["completed_at"] == done["created_at"]
    clock.advance(minutes=1)
    assert became(done, alice.edit(done, title="x", completed=True), title="x", version=2)
    assert alice.edit(done, status="in_progress")["completed_at"] is None
    again = alice.edit(done, completed=True)
    assert again["completed_at"] == again["updated_at"] > done["completed_at"]


def test_the_trash_keeps_restores_and_forgets(alice, bob, clock):
    keep, back, gone = (alice.create(title) for title in ("keep", "back", "gone"))
    bob.trash(bob.create())
    clock.advance(minutes=1)
    alice.trash(back, gone)
    assert (alice.titles(), alice.titles(deleted=True)) == (["keep"], ["gone", "back"])
    [trashed] = alice.get("/tasks?deleted=true&search=back").json()["data"]
    assert trashed["deleted_at"] == trashed["updated_at"] > back["created_at"]
    for method, body in (("GET", None), ("PUT", {"title": "x"}), ("PATCH", {}), ("DELETE", None)):
        error_of(alice.request(method, f"/tasks/{back['id']}", json=body), 404)
    restored = good(alice.post(f"/tasks/{back['id']}/restore")).json()
    assert became(back, restored, version=6)
    clock.advance(minutes=-30)  # Trash from the future goes, too.
    good(alice.delete("/tasks/trash"), 204)
    assert (alice.titles(), alice.titles(deleted=True)) == (["back", "keep"], [])
    for task in (keep, gone):
        error_of(alice.post(f"/tasks/{task['id']}/restore"), 404)
    assert len(bob.titles(deleted=True)) == 1


CONDITIONAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "patch": ("PATCH", "", {"json": {"priority": "high"}}),
    "put": ("PUT", "", {"json": {"title": "new"}}),
    "trash": ("DELETE", "", {}),
    "restore": ("POST", "/restore", {}),
    "attach": ("POST", "/attachments", {"files": {"file": ("a.txt", b"a")}}),
}


@pytest.mark.parametrize("write", CONDITIONAL)
def test_if_match_lets_the_newest_version_through_and_no_other(alice, write):
    method, path, options = CONDITIONAL[write]
    fresh = ['"{0}"', 'W/"{0}"', '"{1}", W/"{0}"', "*"]
    for tag in [*fresh, '"{1}"', 'W/"{1}"', '"{0}0"', '""', "{0}"]:
        task = alice.edit(alice.create(), title="newer")
        if path == "/restore":
            alice.trash(task)
        task = alice.get("/tasks/changes").json()["data"][-1]
        headers = {"If-Match": tag.format(task["version"], task["version"] - 1)}
        url = f"/tasks/{task['id']}{path}"
        answer = alice.request(method, url, headers=headers, **options)
        if tag in fresh:
            assert answer.is_success, tag
        else:
            assert error_of(answer, 412)["code"] == "version_mismatch", tag
            assert alice.get("/tasks/changes").json()["data"][-1] == task
    assert answer.json()["error"]["message"] == f'If-Match wants quotes: "{task["version"]}"'


def test_if_none_match_spares_a_body_and_overwrites_nothing(alice):
    task = alice.edit(alice.create(), title="now at version 2")
    for tags in ('"2"', 'W/"2"', '"1", "2"', "*"):
        answer = good(alice.get("/tasks/1", headers={"If-None-Match": tags}), 304)
        assert (answer.headers["ETag"], answer.content) == ('"2"', b"")
    for tags in ('"1"', "2", '"22"'):
        assert good(alice.get("/tasks/1", headers={"If-None-Match": tags})).json() == task
    put = alice.put("/tasks/1", json={"title": "new"}, headers={"If-None-Match": "*"})
    assert error_of(put, 412)["code"] == "version_mismatch"
    assert alice.get("/tasks/1").json() == task


def test_racing_writers_take_turns(alice):
    task = alice.create()
    guarded = {"json": {"title": "x"}, "headers": {"If-Match": '"1"'}}
    answers = together(50, lambda _: alice.patch("/tasks/1", **guarded).status_code)
    assert sorted(answers) == [200] + [412] * 49
    versions = together(30, lambda at: alice.edit(task, title=str(at))["version"])
    assert sorted(versions) == list(range(3, 33))
    answers = together(10, lambda _: alice.delete("/tasks/1").status_code)
    assert sorted(answers) == [204] + [404] * 9
    answers = together(10, lambda _: alice.post("/tasks/1/restore").status_code)
    assert sorted(answers) == [200] + [404] * 9


def keyed(person: Person, key: str | bytes, title: str = "Buy milk") -> httpx.Response:
    """The answer to POST /tasks with this Idempotency-Key."""
    return person.post("/tasks", json={"title": title}, headers={"Idempotency-Key": key})


def replayed(person: Person, key: str, title: str = "Buy milk") -> dict[str, Any]:
    """The task of this key, which exists already."""
    answer = good(keyed(person, key, title))
    assert answer.headers["Idempotency-Replayed"] == "true"
    assert answer.headers["Location"] == f"/api/v1/tasks/{answer.json()['id']}"
    assert answer.headers["ETag"] == f'"{answer.json()["version"]}"'
    return answer.json()


def test_the_same_key_gives_the_same_task_as_it_is_now(alice, bob):
    for refused in (("k1", ""), ("", "x"), ("x" * 256, "x"), ("a b", "x"), (b"\xe9", "x")):
        error_of(keyed(alice, *refused), 422)
    first = good(keyed(alice, "k1"), 201)
    assert "Idempotency-Replayed" not in first.headers
    assert replayed(alice, "k1") == replayed(alice.script(), "k1", "Buy tea") == first.json()
    assert alice.seq() == 1
    good(keyed(alice, "K1"), 201)
    good(keyed(bob, "k1"), 201)
    edited = alice.edit(first.json(), title="edited")
    assert replayed(alice, "k1") == edited
    alice.trash(edited)
    assert replayed(alice, "k1")["deleted_at"]
    good(alice.delete("/tasks/trash"), 204)
    assert good(keyed(alice, "k1"), 201).json()["id"] > 3


def test_of_racing_posts_with_one_key_one_creates(alice, bob):
    answers = together(20, lambda at: keyed((alice, bob)[at % 2], "k1", f"by {at}"))
    assert Counter(answer.status_code for answer in answers) == {200: 18, 201: 2}
    assert len({answer.json()["id"] for answer in answers}) == 2
    assert len(alice.titles()) == len(bob.titles()) == 1


@pytest.fixture
def shelf(alice: Person, monkeypatch: Any) -> Person:
    """Alice with eight tasks, the last of them in the trash."""
    rows = [
        ("apple", "todo", "low", "2026-01-10", None),
        ("Banana", "in_progress", "high", "2026-01-22", None),
        ("cherry", "done", "medium", "2026-01-10T10:00:00Z", None),
        ("Éclair", "todo", "medium", None, "100% butter_cream at the café"),
        ("fig", "done", "high", None, "STRASSE \\ ΣΊΣΥΦΟΣ"),
        ("İstanbul", "todo", "low", "2026-01-16", "Ｆｕｌｌ"),
        ("Äpfel", "in_progress", "medium", None, None),
        ("gone", "todo", "low", "2026-01-10", None),
    ]
    monkeypatch.setattr(app, "MAX_CACHED_PAGES", 3)  # Some are forgotten.
    names = ("title", "status", "priority", "due_date", "description")
    for row in rows:
        task = alice.create(**dict(zip(names, row, strict=True)))
    alice.trash(task)
    return alice


def found(person: Person, queries: Any) -> dict[str, str]:
    """The titles that each of these queries finds, in their order."""
    answers = {query: good(person.get(f"/tasks?{query}")).json()["data"] for query in queries}
    return {query: " ".join(each["title"] for each in data) for query, data in answers.items()}


def test_filters_are_anded_and_every_order_holds(shelf):
    expected = {
        "": "Äpfel İstanbul fig Éclair cherry Banana apple",
        "priority=high&priority=low&priority=high": "İstanbul fig Banana apple",
        "priority=high&status=done": "fig",
        "completed=false": "Äpfel İstanbul Éclair Banana apple",
        "deleted=true": "gone",
        "overdue=true": "apple",
        "due_after=2026-01-10&due_before=2026-01-10": "cherry apple",
        "due_after=2026-01-10T10:00:00Z&due_before=2026-01-19": "İstanbul cherry apple",
        "due_after=2026-01-23T00:59:59%2B01:00": "Banana",
        "search=a&priority=low&completed=false": "İstanbul apple",
        "sort=title&order=asc": "Äpfel apple Banana cherry Éclair fig İstanbul",
        "sort=priority": "fig Banana Äpfel Éclair cherry İstanbul apple",
        "sort=status&order=asc": "apple Éclair İstanbul Banana Äpfel cherry fig",
        "sort=due_date&order=asc": "cherry apple İstanbul Banana Éclair fig Äpfel",
        "sort=due_date": "Banana İstanbul apple cherry Äpfel fig Éclair",
    }
    assert found(shelf, expected) == expected
    shelf.edit({"id": 1}, title="first")
    assert shelf.titles(sort="updated_at")[0] == "first"


def test_search_looks_past_case_width_and_accents_and_at_one_text_at_a_time(shelf):
    expected = {
        "Éclair": ["eclair", "E\u0301CLAIR", "cafe", "CAFÉ", "100%", "%", "r_c", "_"],
        "İstanbul": ["istanbul", "ISTANBUL", "full"],
        "fig": ["straße", "σίσυφος", "\\"],
        "Banana": ["ＢＡＮ", "nan"],
        "": ["*", "%%", "a%e", "' OR 1=1 --"],
    }
    for title, texts in expected.items():
        queries = [urlencode({"search": text}) for text in texts]
        assert found(shelf, queries) == dict.fromkeys(queries, title)
    shelf.create("one", description="two")
    for between in ("", " ", "\n", "\r\n", "\t", "\x1f", "\x1e", "\x01", "\u2028", "\uffff", "%"):
        assert shelf.titles(search=f"one{between}two") == []
        assert shelf.titles(search=f"e{between}t") == []


def test_lists_refuse_what_they_do_not_know(alice):
    refused = ["page=0", "page=x", f"page={2**63}", "page_size=0", "page_size=101", "page_size="]
    refused += ["status=open", "&".join(["status=todo"] * 4), "priority=low&priority=urgent"]
    refused += ["completed=perhaps", "search=", f"search={'x' * 201}", "search=%00", "sort=colour"]
    refused += ["order=up", "due_before=tomorrow", "due_after=2026-13-01", "deleted=", "owner_id=1"]
    refused += ["colour=red", f"search={'%CC%81' * 31}", f"search={'%E0%BD%B3' * 100}"]
    for query in refused:
        [detail] = error_of(alice.get(f"/tasks?{query}"), 422)["details"]
        assert detail["field"].split(".")[0] == query.partition("=")[0], query


def test_pages_never_overlap_and_link_to_each_other(alice):
    for _ in range(7):
        alice.create("a&b")
    sorts = ["created_at", "updated_at", "due_date", "priority", "status", "title"]
    for sort, order in itertools.product(sorts, ["asc", "desc"]):
        query = {"search": "a&b", "status": ["todo", "done"], "sort": sort, "order": order}
        answers = [good(alice.get("/tasks", params=query | {"page_size": 3}))]
        while "next" in answers[-1].links:
            answers.append(good(alice.get(ROOT + answers[-1].links["next"]["url"])))
        seen = [task["id"] for answer in answers for task in answer.json()["data"]]
        assert seen in (list(range(1, 8)), list(range(7, 0, -1)))
        meta = answers[-1].json()["meta"]
        assert meta == {"page": 3, "page_size": 3, "total": 7, "pages": 3}
        shown = [" ".join(answer.links) for answer in answers]
        assert shown == ["first next last", "first prev next last", "first prev last"]
    past = good(alice.get("/tasks?page=9&page_size=3"))
    assert past.json() == {"data": [], "meta": meta | {"page": 9}}
    assert past.links["prev"]["url"] == "/api/v1/tasks?page=3&page_size=3"
    none = good(alice.get("/tasks?search=x")).json()
    assert (none["data"], none["meta"]["total"], none["meta"]["page_size"]) == ([], 0, 20)


def test_an_unchanged_list_is_304_unless_it_depends_on_more_than_the_callers_tasks(alice, admin):
    task = alice.create()
    etag = alice.get("/tasks").headers["ETag"]
    assert etag.startswith('W/"')
    admin.create()
    for tags in (etag, etag.removeprefix("W/"), f'"other", {etag}'):
        answer = good(alice.again().get("/tasks", headers={"If-None-Match": tags}), 304)
        assert (answer.headers["ETag"], answer.content) == (etag, b"")
    alice.headers["If-None-Match"] = admin.headers["If-None-Match"] = etag
    for person, path in [(alice, "/tasks?page_size=1"), (admin, "/tasks")]:
        good(person.get(path), 200)
    alice.edit(task)
    assert good(alice.get("/tasks")).headers["ETag"] != etag
    alice.headers["If-None-Match"] = admin.headers["If-None-Match"] = "*"
    for path in ("/tasks?overdue=true", "/tasks?overdue=false", "/tasks/statistics"):
        assert "ETag" not in good(alice.get(path)).headers
    assert "ETag" not in good(admin.get("/admin/tasks")).headers


def test_statistics_leave_the_trash_out_and_follow_the_clock(shelf, bob, clock):
    counted = good(shelf.get("/tasks/statistics")).json()
    per_day = counted.pop("completed_per_day")
    expected = """{
        "total": 7, "by_status": {"todo": 3, "in_progress": 2, "done": 2},
        "by_priority": {"low": 2, "medium": 3, "high": 2},
        "overdue": 1, "due_in_7_days": 1, "completion_rate": 0.2857}"""
    assert counted == json.loads(expected)
    assert per_day[0] == {"date": "2025-12-17", "count": 0}
    assert per_day[-1] == {"date": "2026-01-15", "count": 2}
    assert shelf.titles(overdue=True) == ["apple"]
    later(shelf, clock, days=29)
    counted = good(shelf.get("/tasks/statistics")).json()
    assert (counted["overdue"], counted["due_in_7_days"]) == (3, 0)
    assert counted["completed_per_day"][0] == per_day[-1]
    assert shelf.titles(overdue=True) == ["İstanbul", "Banana", "apple"]
    nothing = good(bob.log_in().get("/tasks/statistics")).json()
    assert (nothing["total"], nothing["completion_rate"]) == (0, 0)


OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(16)
OFFICE = "application/vnd.openxmlformats-officedocument"
KINDS = {
    "notes.txt": ("text/plain", "Grüße, 世界\n".encode()),
    "utf-16.txt": ("text/plain", "Grüße".encode("utf-16")),
    "latin-1.CSV": ("text/csv", "größe;".encode("latin-1")),
    "empty.md": ("text/markdown", b""),
    "a.pdf": ("application/pdf", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n"),
    "late.pdf": ("application/pdf", bytes(1019) + b"%PDF-1.7\n"),
    "a.png": ("image/png", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"),
    "a.jpg": ("image/jpeg", b"\xff\xd8\xff\xe0\x00\x10JFIF"),
    "a.webp": ("image/webp", b"RIFF\x0a\x00\x00\x00WEBPVP8L"),
    "a.doc": ("application/msword", OLE),
    "a.docx": (f"{OFFICE}.wordprocessingml.document", b"PK\x03\x04\x14\x00"),
    "encrypted.docx": (f"{OFFICE}.wordprocessingml.document", OLE),
    "a.xlsx": (f"{OFFICE}.spreadsheetml.sheet", b"PK\x03\x04\x14\x00"),
    "a.zip": ("application/zip", b"PK\x05\x06" + bytes(18)),
}


def attach(person: Person, task: int = 1, name: str = "a.txt", content: bytes = b"a") -> Any:
    """The answer to a file sent to a task."""
    return person.post(f"/tasks/{task}/attachments", files={"file": (name, content)})


def attached(person: Person, task: int = 1) -> list[dict[str, Any]]:
    return good(person.get(f"/tasks/{task}/attachments")).json()["data"]


def test_every_kind_of_file_comes_back_as_it_was(alice):
    alice.create()
    for number, (name, (media_type, content)) in enumerate(KINDS.items(), 1):
        answer = good(attach(alice, 1, name, content), 201)
        assert answer.headers["Location"] == f"/api/v1/attachments/{number}"
        digest = hashlib.sha256(content).hexdigest()
        file = {"id": number, "task_id": 1, "filename": name, "content_type": media_type}
        file |= {"size_bytes": len(content), "sha256": digest}
        assert answer.json() == file | {"created_at": answer.json()["created_at"]}
        back = good(alice.get(f"/attachments/{number}"))
        assert back.content == content
        assert back.headers["Content-Type"].partition(";")[0] == media_type
        assert back.headers["Content-Disposition"].startswith("attachment; ")
        assert back.headers["X-Content-Type-Options"] == "nosniff"
        cached = {"If-None-Match": back.headers["ETag"]}
        unchanged = good(alice.get(f"/attachments/{number}", headers=cached), 304)
        assert (unchanged.content, unchanged.headers["ETag"]) == (b"", f'"{digest}"')
    assert [file["filename"] for file in attached(alice)] == list(KINDS)


def test_a_file_that_is_not_what_its_name_says_is_refused(alice):
    task = alice.create()
    refused = [("README", b"x"), ("a.", b"x"), ("a.html", b"<p>"), ("a.svg", b"<svg/>")]
    refused += [("a.txt.exe", b"MZ"), ("a.pdf", bytes(1024) + b"%PDF-"), ("a.docx", OLE[1:])]
    binary = [name for name, (kind, _) in KINDS.items() if not kind.startswith("text/")]
    refused += itertools.product(binary, [b"", b"only text", b"RIFF\x0a\0\0\0WAVEfmt "])
    for name, content in refused:
        error = error_of(attach(alice, 1, name, content), 415)
        assert error["code"] == "unsupported_file_type", name
    assert alice.get("/tasks/1").json() == task


def multipart(disposition: bytes) -> dict[str, Any]:
    """A form with a file, whose head is exactly this, after another field."""
    head = b"--limit\r\nContent-Disposition: form-data; "
    body = head + b"name=before\r\n\r\nvalue\r\n"
    body += head + disposition + b"\r\n\r\nhello\r\n--limit--\r\n"
    return {"content": body, "headers": {"Content-Type": "multipart/form-data; boundary=limit"}}


NAMES = {
    rb'name="any"; filename="a; filename=\"evil.exe\".txt"': 'a; filename="evil.exe".txt',
    b'name="file"; filename="../../etc/passwd.txt"': "passwd.txt",
    rb'name="file"; filename="C:\temp\notes.txt"': "notes.txt",
    'name="file"; filename="שלום 👋.txt"'.encode(): "שלום 👋.txt",
    b'name="file"; filename="a\x01\x1b\x7fb.txt"': "a___b.txt",
    b"name=\"file\"; filename*=UTF-8''%C3%BC.txt": "ü.txt",
    b"name=file; filename=\"=?utf-8?B?w7wudHh0?=\"; filename*=utf-8''%C3%BC.txt": "ü.txt",
    b'name=file; filename="=?utf-8?B?w7wudHh0?="': "ü.txt",
    b'name=file; filename="=?no?B?w7w=?=.txt"': "=?no?B?w7w=?=.txt",
    b'name=file; filename="=?utf-8?B?w?=.txt"': "=?utf-8?B?w?=.txt",
}
"""How curl, browsers, .NET and mail programs say a name, and the name that is kept."""


def test_any_name_is_read_and_is_safe_on_its_way_out(alice):
    alice.create()
    # RFC 6266 with a quoted-string without escapes, which browsers read differently, and RFC 8187.
    plain, exact = r"[\w .-]*\.txt", r"(?:[\w!#$&+.^`|~-]|%[0-9A-F]{2})*"
    shape = rf"attachment; filename=\"{plain}\"; filename\*=UTF-8''({exact})"
    for disposition, kept in NAMES.items():
        answer = alice.post("/tasks/1/attachments", **multipart(disposition))
        assert good(answer, 201).json()["filename"] == kept
        back = good(alice.get(f"/attachments/{answer.json()['id']}"))
        assert back.content == b"hello"
        sent = re.fullmatch(shape, back.headers["Content-Disposition"], re.ASCII)
        assert unquote(sent[1], errors="strict") == kept


def test_an_upload_is_a_form_with_one_file_of_5_mib(alice):
    alice.create()
    assert good(attach(alice, content=bytes(5 * 2**20)), 201).json()["size_bytes"] == 5 * 2**20
    assert error_of(attach(alice, content=bytes(5 * 2**20 + 1)), 413)["code"] == "body_too_large"
    whole = multipart(b'name="file"; filename="a.txt"')
    bare = whole | {"headers": {"Content-Type": "multipart/form-data"}}
    two = [("file", ("a.txt", b"a")), ("other", ("b.txt", b"b"))]
    broken = [{"files": {"file": (None, b"x")}}, {"files": two}, whole | {"content": b"x"}, bare]
    broken += [{"json": {}}, {"data": {"file": "x"}}, {"files": two[:1] * 2}]
    for request in broken:
        error = error_of(alice.post("/tasks/1/attachments", **request), 400)
        assert error["code"] == "invalid_form", request
    gc.collect()  # A file that nobody closed would complain now.
    assert len(attached(alice)) == 1


def test_whoever_logs_out_while_their_file_arrives_is_nobody(alice):
    def body() -> Iterator[bytes]:
        yield whole["content"][:-20]
        good(other.post("/auth/logout_all"), 204)
        yield whole["content"][-20:]

    alice.create()
    other = alice.again()
    whole = multipart(b'name="file"; filename="a.txt"')
    answer = alice.post("/tasks/1/attachments", content=body(), headers=whole["headers"])
    assert error_of(answer, 401)["code"] == "session_ended"
    assert attached(alice.log_in()) == []


def test_files_change_their_task_and_share_its_fate(alice, server):
    task = alice.create()
    file = good(attach(alice), 201).json()
    with_one = good(alice.get("/tasks/1")).json()
    assert with_one == task | {"attachments": 1, "version": 2, "updated_at": file["created_at"]}
    alice.trash(task)
    error_of(attach(alice), 404)
    error_of(alice.get("/tasks/1/attachments"), 404)
    for method in ("GET", "DELETE"):
        error_of(alice.request(method, "/attachments/1"), 404)
    good(alice.post("/tasks/1/restore"))
    assert attached(alice) == [file]
    good(alice.delete("/attachments/1"), 204)
    assert became(task, alice.get("/tasks/1").json(), version=5)
    good(attach(alice), 201)
    alice.trash(task)
    good(alice.delete("/tasks/trash"), 204)
    assert server.sql("SELECT count(*) AS files FROM attachments") == [{"files": 0}]


def test_a_task_has_100_attachments_however_they_race(alice):
    alice.create()
    for _ in range(95):
        good(attach(alice), 201)
    answers = together(10, lambda _: attach(alice))
    assert Counter(answer.status_code for answer in answers) == {201: 5, 409: 5}
    assert "too_many_attachments" in "".join(answer.text for answer in answers)
    answers = together(4, lambda _: alice.delete("/attachments/1").status_code)
    assert sorted(answers) == [204, 404, 404, 404]
    assert alice.get("/tasks/1").json()["attachments"] == len(attached(alice)) == 99
    good(attach(alice), 201)


TEXT = "\ufdfa" * 10_000  # 30 KB, and 330 KB when it is folded: both count.


def full(answer: httpx.Response) -> None:
    assert error_of(answer, 413)["code"] == "storage_full"


def test_texts_and_files_take_room_to_the_last_byte_until_they_are_gone(alice, bob, configure):
    configure(max_storage_mib=1)
    first, second = (alice.create(title, description=TEXT) for title in "12")
    small = good(keyed(alice, "k", "3"), 201).json()
    third = {"title": "3", "description": TEXT}
    for method, path in (("POST", "/tasks"), ("PUT", "/tasks/3"), ("PATCH", "/tasks/3")):
        full(alice.request(method, path, json=third))
    full(attach(alice, 3, content=bytes(400 * 1024)))
    assert good(alice.post("/tasks", json=third, headers={"Idempotency-Key": "k"})).json() == small
    bob.create("1", description=TEXT)
    alice.edit(first, description="short")
    alice.edit(small, description=TEXT)
    alice.trash(second)
    full(alice.post("/tasks", json=third))
    good(alice.delete("/tasks/trash"), 204)
    alice.trash(alice.create(**third), first, small)
    good(alice.delete("/tasks/trash"), 204)
    task = alice.create("4")["id"]  # The title counts twice, as it is and folded.
    answers = together(4, lambda _: attach(alice, task, content=bytes(600 * 1024)))
    assert sorted(answer.status_code for answer in answers) == [201, 413, 413, 413]
    good(attach(alice, task, content=bytes(2**20 - 600 * 1024 - 2)), 201)
    full(attach(alice, task))
    configure(max_storage_mib=0)  # Who has more than there is room for can still delete.
    good(alice.delete(f"/attachments/{attached(alice, task)[0]['id']}"), 204)


def test_an_admin_lists_creates_and_changes_accounts(server, alice, admin, configure):
    configure(registration="closed")
    body = {"username": "Ålice", "email": "a@example.org", "role": "admin"}
    answer = good(admin.post("/admin/users", json=body | {"password": PASSWORD}), 201)
    made = answer.json()
    assert body.items() < made.items()
    assert " ".join(made) == "id username email role is_active created_at"
    assert good(admin.get(ROOT + answer.headers["Location"])).json() == made
    good(server.person("ålice").log_in().get("/admin/users"))
    page = good(admin.get("/admin/users?page_size=2&page=2")).json()
    assert (page["data"], page["meta"]["total"], page["meta"]["pages"]) == ([made], 3, 2)
    for change in ({}, {"role": "admin"}, {"role": "user", "is_active": False}):
        alice.user |= change
        assert good(admin.patch("/admin/users/2", json=change)).json() == alice.user
    assert error_of(alice.post("/auth/login", json=ALICE), 403)["code"] == "account_disabled"
    error_of(alice.post("/auth/login", json=ALICE | {"password": "wrong one"}), 401)
    assert "invalid_grant" in good(alice.post("/auth/token", data=ALICE | BY_PASSWORD), 400).text
    good(admin.patch("/admin/users/2", json={"is_active": True}))
    assert [works(alice), works(alice.log_in())] == [False, True]


def test_an_admin_sees_every_task(alice, bob, admin):
    alice.create("alice's")
    bob.trash(bob.create("bob's"))
    wanted = {"": ["alice's"], "owner_id=3": [], "owner_id=3&deleted=true": ["bob's"]}
    for query, titles in wanted.items():
        page = good(admin.get(f"/admin/tasks?{query}")).json()
        assert [task["title"] for task in page["data"]] == titles


GOINGS = {
    "demoted": ("PATCH", "/admin/users/{}", {"role": "user", "password": NEW}),
    "disabled": ("PATCH", "/admin/users/{}", {"role": "admin", "is_active": False}),
    "deleted": ("DELETE", "/admin/users/{}", None),
    "leaving": ("DELETE", "/users/me", None),
}


@pytest.mark.parametrize("whom", [(2, 1), (1, 2)], ids=["themselves", "each-other"])
@pytest.mark.parametrize("going", GOINGS)
def test_of_two_admins_who_go_at_once_one_stays_and_may_not_go(server, alice, admin, going, whom):
    method, path, body = GOINGS[going]
    good(admin.patch("/admin/users/2", json={"role": "admin"}))
    who = [alice, admin]
    answers = together(2, lambda at: who[at].request(method, path.format(whom[at]), json=body))
    first, second = sorted(answer.status_code for answer in answers)
    assert (first in (200, 204), second in (401, 403, 409)) == (True, True)
    [last] = server.sql("SELECT id FROM users WHERE role = 'admin' AND is_active")
    leaving = admin if last["id"] == 1 else alice
    error = error_of(leaving.request(method, path.format(last["id"]), json=body), 409)
    assert error["code"] == "last_admin"


def test_a_clean_up_runs_every_hour_and_removes_what_has_expired(start, monkeypatch, clock, caplog):
    assert app.CLEANUP_SECONDS == 3_600
    monkeypatch.setattr(app, "CLEANUP_SECONDS", 0.02)
    server = start()
    caplog.set_level("WARNING", app.log.name)
    alice = server.person("alice").register()
    used = alice.tokens["refresh_token"]
    alice.accept(alice.refresh())
    alice.trash(alice.create("old"))
    never, other = alice.script(), alice.again()
    other.accept(other.refresh())
    alice.script(expires_at="2026-02-14")
    clock.advance(days=29)
    alice.server.sql("ALTER TABLE refresh_tokens RENAME TO lost")
    eventually(lambda: "failed" in caplog.text)
    alice.server.sql("ALTER TABLE lost RENAME TO refresh_tokens")
    eventually(lambda: '"2026-02-13T' in alice.get(ROOT + "/health/detailed").text)
    error_of(alice.refresh(used), 401)
    assert not works(alice), "a used token is kept, to notice its replay"
    other.accept(other.refresh())
    alice.log_in().trash(alice.create("new"))
    assert alice.titles(deleted=True) == ["new", "old"]
    clock.advance(days=2)
    eventually(lambda: alice.log_in().titles(deleted=True) == ["new"])
    assert [works(never), other.refresh().is_success] == [True, True]
    for sql in ("SELECT expires_at FROM sessions", "SELECT expires_at FROM refresh_tokens"):
        eventually(lambda sql=sql: "2026-02-14" not in str(alice.server.sql(sql)))


# ── 12 Command line ─────────────────────────────────────────────────────────────────────────────
# Commands work beside a running server, and what they end is ended for the very next request.


@posix
def test_a_start_says_where_everything_is_and_a_restart_keeps_it(program, tmp_path):
    settings = {"ADMIN_PASSWORD": "", "DATA_DIR": "where/it/lies", "REGISTRATION": "closed"}
    first = program(**settings).listening()
    assert f"http://127.0.0.1:{first.port} " in first.said
    assert f"http://127.0.0.1:{first.port}/docs" in first.said
    place = tmp_path / "where" / "it" / "lies" / "tasks.db" if SQLITE else app.database.place
    assert str(place) in first.said
    assert re.search("registration.*closed", first.said)
    password = re.search(r"admin, password (\S{20,})", first.said)[1]
    admin = first.person("admin", password).log_in()
    task = admin.create()
    with admin.socket() as live, admin.events() as events:
        began = time.monotonic()
        first.process.terminate()
        assert live.close_code() in (1001, 1012)
        events.end()
        assert first.process.wait(DEADLINE) in (0, -signal.SIGTERM)
        assert time.monotonic() - began < 5
    again = program(**settings).listening()
    assert "password" not in again.said
    same = again.person().accept(httpx.Response(200, json=admin.tokens))
    assert same.all_tasks() == {task["id"]: task}
    assert not re.search(rf"Traceback|{password}", again.log.read_text())


@posix
def test_reload_serves(program):
    started = program("--reload").listening()
    assert good(started.person().get(ROOT + "/health")).json() == {"status": "ok"}
    started.process.send_signal(signal.SIGINT)
    assert started.process.wait(DEADLINE) in (0, -signal.SIGINT)


def test_create_user_works_before_the_first_start(configure, command, start, capsys):
    configure(admin_password="")
    assert command("create-user Zoë --admin", PASSWORD) == ""
    said = capsys.readouterr().out
    assert re.search(r"\bZoë .*admin.*\.\n$", said)
    assert PASSWORD not in said
    server = start()
    password = re.search(r"admin, password (\S+)", said)[1]
    for person in (server.person("zoë"), server.person("admin", password)):
        assert person.log_in().user["role"] == "admin"


NO_COMMANDS = {
    "create-user ADMIN": (PASSWORD, "taken"),
    "create-user a!b": (PASSWORD, "NAME: "),
    "create-user alice": ("short77", "password: "),
    "reset-password nobody": (PASSWORD, "no user nobody"),
    "reset-password admin": ("password1", "password: "),
}


@pytest.mark.parametrize("line", NO_COMMANDS)
def test_a_refused_command_says_why_and_changes_nothing(command, start, line):
    typed, says = NO_COMMANDS[line]
    said = command(line, typed)
    assert re.fullmatch(f".*{says}.*", said)
    assert typed not in said
    admin = start().person("admin", ADMIN_PASSWORD).log_in()
    assert admin.get("/admin/users").json()["meta"]["total"] == 1


def test_reset_password_ends_every_session_api_token_and_stream(program, alice):
    script = alice.script()
    with alice.socket() as live, alice.events() as events, script.socket("script") as listening:
        code, said, error = program("reset-password", "ALICE").end(f"{NEW}\n")
        assert error_of(alice.get("/tasks"), 401)["code"] == "session_ended"
        assert error_of(script.get("/tasks"), 401)["code"] == "session_ended"
        assert live.close_code() == listening.close_code() == 4401
        events.end()
    assert (code, error) == (0, "")
    assert re.search(r"sessions and API tokens .*\.\n$", said)
    error_of(alice.refresh(), 401)
    error_of(alice.post("/auth/login", json={"username": "alice", "password": PASSWORD}), 401)
    alice.server.person("alice", NEW).log_in()


@posix
def test_a_password_at_a_terminal_is_asked_twice_and_not_shown(alice, tmp_path):
    ours, theirs = os.openpty()
    line = [sys.executable, app.__file__, "reset-password", "alice"]
    options: Any = {"cwd": tmp_path, "stderr": subprocess.PIPE, "start_new_session": True}
    options["env"] = os.environ | SERVICES
    with subprocess.Popen(line, stdin=theirs, **options) as process, open(ours, "r+b", 0) as typing:
        os.close(theirs)
        for typed in (NEW, "a slip of the pen"):
            prompt = b"".join(iter(lambda: process.stderr.read(1) or b" ", b" "))
            assert prompt.endswith(b":")
            typing.write(f"{typed}\n".encode())
        assert process.wait(DEADLINE) == 1
        with contextlib.suppress(OSError):  # Linux: there is nothing, and nobody at the other end.
            assert typing.read(1000).strip() == b""
    alice.log_in()


def test_token_prints_an_api_token_and_nothing_else(program, server, alice):
    code, said, error = program("token", "ALICE", "--scope", "read").end()
    assert code == 0
    assert re.fullmatch(r"tsk_[\w-]{43}\n", said)  # For TOKEN=$(python app.py token alice).
    assert "read" in error
    script = server.person(headers={"Authorization": f"Bearer {said.strip()}"})
    assert script.get("/users/me").json() == alice.user
    error_of(script.post("/tasks", json={"title": "x"}), 403)
    [listed] = alice.get("/auth/api_tokens").json()["data"]
    assert (listed["scope"], listed["expires_at"]) == ("read", None)


# ── OpenAPI ─────────────────────────────────────────────────────────────────────────────────────
# Clients are generated from it and /docs is made of it, so it is a product like any other route.

SCHEMA = app.app.openapi()
OPERATIONS = {
    operation["operationId"]: (method.upper(), path, operation)
    for path, item in SCHEMA["paths"].items()
    for method, operation in item.items()
}


def body_of(operation: dict[str, Any]) -> dict[str, Any]:
    """The schema of the JSON that an operation takes, {} if there is none."""
    content = operation.get("requestBody", {}).get("content", {})
    name = content.get("application/json", {}).get("schema", {}).get("$ref", "").split("/")[-1]
    return SCHEMA["components"]["schemas"].get(name, {})


BODIES = {name: body_of(operation) for name, (*_, operation) in OPERATIONS.items()}


def test_operations_are_functions_and_everything_has_a_description():
    routes = fastapi.routing.iter_route_contexts(app.app.routes)
    shown = [each.endpoint.__name__ for each in routes if each.methods and each.include_in_schema]
    assert sorted(OPERATIONS) == sorted(shown)
    described = {tag["name"]: tag for tag in SCHEMA["tags"]} | SCHEMA["components"]["schemas"]
    described |= {name: operation for name, (_, _, operation) in OPERATIONS.items()}
    assert [name for name, each in described.items() if not each.get("description")] == []
    assert {tag for *_, each in OPERATIONS.values() for tag in each["tags"]} <= described.keys()
    assert "Try it out" in described["stream_events"]["description"]


def test_inputs_say_what_they_take_and_how_to_log_in():
    assert not re.search(r'"(le|lt|ge|gt)":', json.dumps(SCHEMA))  # Pydantic's words.
    parameters = [each.get("parameters", []) for *_, each in OPERATIONS.values()]
    ids = [each for each in itertools.chain(*parameters) if each["in"] == "path"]
    assert {each["schema"].get("minimum") for each in ids} == {1}
    username = BODIES["register"]["properties"]["username"]
    assert (username["minLength"], username["maxLength"]) == (3, 50)
    names = ("Zoë", "a.b-c_1", "a b", "a@b")  # To JavaScript and Java, \w is ASCII.
    matches = [bool(re.search(username["pattern"], name, re.ASCII)) for name in names]
    assert matches == [True, True, False, False]
    for name in ("update_task", "update_account", "update_user"):
        fields = BODIES[name]["properties"].values()
        assert not [each for each in fields if "default" in each], "a client would send it"
    schemes = SCHEMA["components"]["securitySchemes"]
    flows = [scheme["flows"]["password"] for scheme in schemes.values() if "flows" in scheme]
    assert [flow["tokenUrl"] for flow in flows] == ["/api/v1/auth/token"]
    for name in ("list_tasks", "log_out", "read_metrics"):
        ways = OPERATIONS[name][2]["security"]
        assert {scheme for way in ways for scheme in way} == schemes.keys(), name


# ── README ──────────────────────────────────────────────────────────────────────────────────────
# What a document says is true. Blocks marked sh run in order, and print the json after them.

README = (HERE / "README.md").read_text(encoding="utf-8")


def documents(text: str) -> list[Any]:
    """The JSON values that begin a line of a text."""
    begins = [begin.start() for begin in re.finditer(r"^[\[{]", text, re.M)]
    return [json.JSONDecoder().raw_decode(text, begin)[0] for begin in begins]


def like(value: Any, promised: Any) -> bool:
    """Whether a value is as promised; "…" stands for anything, or for a part of a text."""
    if isinstance(promised, dict) and isinstance(value, dict):
        return value.keys() >= promised.keys() and all(
            like(value[n], promised[n]) for n in promised
        )
    if isinstance(promised, list) and isinstance(value, list):
        return len(value) == len(promised) and all(map(like, value, promised))
    shape = ".*".join(map(re.escape, json.dumps(promised, ensure_ascii=False).split("…")))
    return promised == "…" or bool(re.fullmatch(shape, json.dumps(value, ensure_ascii=False)))


def test_the_readme_does_what_it_says(program, tmp_path):
    options: Any = {"capture_output": True, "encoding": "utf-8", "timeout": 60}
    curl = shutil.which("bash") and shutil.which("curl")
    if not curl or "--json" not in subprocess.run([curl, "--help", "all"], **options).stdout:
        pytest.skip("needs bash, and curl 7.82 or newer")
    running = program().listening()
    places = {".venv": sys.prefix, "app.py": app.__file__, "tools": HERE / "tools"}
    for name, place in places.items():
        (tmp_path / name).symlink_to(place)
    here = f'silent\nshow-error\nconnect-to = "::127.0.0.1:{running.port}"\n'
    note = r'write-out = "%{stderr}\ncalled %{http_code} %{method} %{url_effective}\n"'
    (tmp_path / ".curlrc").write_text(here + note)
    environment = {"HOME": str(tmp_path), "ONEFILE_URL": running.url} | SERVICES
    environment["PATH"] = os.environ["PATH"]
    blocks = [*re.findall(r"(?ms)^```(\w+)\n(.*?)^```$", README), ("", "")]
    pairs = [(block[1], *after) for block, after in itertools.pairwise(blocks) if block[0] == "sh"]
    pairs = [pair for pair in pairs if SQLITE or "backup.py" not in pair[0]]
    assert sum(kind == "json" for _, kind, _ in pairs) > 5
    mark = "--- the end of a block\n"
    end = f"\nprintf '\\n{mark}'; printf '\\n{mark}' >&2\n"
    script = "exec </dev/null\n" + "".join(command + end for command, _, _ in pairs)
    shell = subprocess.run(["bash", "-ec", script], env=environment, cwd=tmp_path, **options)
    assert shell.returncode == 0, shell.stderr
    said = zip(pairs, shell.stdout.split(mark), shell.stderr.split(mark), strict=False)
    for (command, kind, after), output, notes in said:
        promised = documents(after) if kind == "json" else []
        got = documents(output) if promised else []
        assert len(got) == len(promised), f"{command}\n{output}\n{notes}"
        assert all(map(like, got, promised)), f"{command}\n{output}\n{after}"
        bound = 500 if re.search(r'"error"| 4\d\d ', after) else 400
        statuses = [int(status) for status in re.findall(r"^called (\d+)", notes, re.M)]
        assert all(200 <= status < bound for status in statuses), f"{command}\n{notes}"


def test_every_setting_stands_in_the_documents_with_its_default():
    defaults = {}
    for name, field in app.Settings.model_fields.items():
        secret = isinstance(field.default, pydantic.SecretStr)
        defaults[name.upper()] = field.default.get_secret_value() if secret else str(field.default)
    example = (HERE / ".env.example").read_text("utf-8")
    shown = re.findall(r"^## \S.*\n# ([A-Z_]+)=(.*)$", example, re.M)
    assert shown == list(defaults.items())
    for name, default in defaults.items():
        shape = rf"\b{name}(=|` *\| *`?){re.escape(default)}(?=[`\s|])"
        assert re.search(shape, README), f"{name}={default}"
    others = r"`((?!ONEFILE_|OTEL_|FASTAPI_)[A-Z]+_[A-Z_]+)(?:=[^`]*)?`"
    assert set(re.findall(others, README)) <= defaults.keys()


def test_every_route_and_every_error_code_stands_in_the_readme():
    routes = [(method, path) for method, path, _ in OPERATIONS.values()]
    for method, path in [*routes, ("WS", "/ws/tasks/{client_id}")]:
        shape = re.sub(r"\{\w+}", r"{\\w+}", path.removeprefix(app.API))
        shape = rf"\b{method}\b.*[ `]({app.API})?{shape}(?![\w/{{])"
        assert re.search(shape, README), f"{method} {path}"
    called = r'(?:ApiError|fail)\(\s*\d+,\s*"(\w+)"'
    codes = set(re.findall(called, SOURCE)) - {"not_modified"}
    codes |= {f"{of}_not_found" for of in ("task", "attachment", "session", "api_token", "user")}
    assert {code for code in codes if f"`{code}`" not in README} == set()


def test_the_maps_of_the_sections_and_of_the_packages_are_true():
    promised = re.findall(r"^ +(\d+)  (.+?)  ", app.__doc__, re.M)
    banner = re.compile(r"^# ── (\d+) (.+?) ─+$", re.M)
    assert banner.findall(SOURCE) == promised
    assert [int(number) for number, _ in promised] == list(range(1, len(promised) + 1))
    here = banner.findall(Path(__file__).read_text("utf-8"))
    assert [each for each in here if each not in promised] == [("0", "Tools")]
    metadata = re.search(r"(?ms)^# /// script$\n(.*?)^# ///$", SOURCE)[1]
    script = tomllib.loads(re.sub(r"^# ?", "", metadata, flags=re.M))
    assert script["dependencies"] == (HERE / "requirements.txt").read_text().splitlines()
    assert all("==" in line for line in script["dependencies"])
    assert script["requires-python"] == ">=3.11"

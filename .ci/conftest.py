"""What the long tests share: app.py in a process of its own, people, a watch, a summary of figures.

Run    .venv/bin/pytest .ci       with .ci/requirements.txt installed; .ci/run does all that
"""

# ruff: noqa: E402, S101, S105, S603

import contextlib
import http.client
import os
import re
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))
import services

API = "/api/v1"
ADMIN_PASSWORD = "a long password of the admin"
PASSWORD = "correct horse battery staple"
DEADLINE = 30.0
"""Seconds that anything may take before a test gives up."""
SETTINGS = {"PORT": "0", "RATE_LIMITS": "off", "ADMIN_PASSWORD": ADMIN_PASSWORD}
KEPT = ("PATH", "HOME", "LD_LIBRARY_PATH")
CHEAP_PASSWORDS = 'app.BCRYPT_COST = 4; app.UNKNOWN_USER_HASH = "$2b$04$" + "." * 53'
"""For tests that log in often and are not about passwords."""


class Server:
    """`python app.py` on a free port; `change` is a statement to run between import and start."""

    def __init__(self, folder: Path, change: str, settings: dict[str, str]) -> None:
        self.folder = folder
        self.settings = settings
        self.log = folder / f"log-{len(list(folder.glob('log-*')))}.txt"
        command = [sys.executable, str(ROOT / "app.py")]
        if change:
            command = [sys.executable, "-c", f"import app; {change}; app.main()"]
        self.stack = contextlib.ExitStack()
        self.start(command, settings)
        found = eventually(self.listening)
        self.url = found[1]
        self.port = int(found[2])
        eventually(self.answers)

    def start(self, command: list[str], settings: dict[str, str]) -> None:
        """Run this, until `close`; what it says goes to the log."""
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        environment |= {"PYTHONPATH": str(ROOT), **SETTINGS, **settings}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.stack.callback(self.process.wait, DEADLINE)
        self.stack.callback(self.process.kill)

    def listening(self) -> re.Match[str] | None:
        """What it says of where it listens."""
        assert self.process.poll() is None, self.log.read_text()
        return re.search(r"Listening +(http://\S+:(\d+)\S*)", self.log.read_text())

    def answers(self) -> bool:
        """Whether it accepts a connection."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
            return True
        return False

    def close(self) -> None:
        """Hang up, and end it."""
        self.stack.close()

    def client(self, authorization: str = "", **options: Any) -> httpx.Client:
        """Somebody who talks to /api/v1."""
        options = {"base_url": self.url + API, "timeout": DEADLINE, "trust_env": False} | options
        client = httpx.Client(**options)
        self.stack.callback(client.close)
        if authorization:
            client.headers["Authorization"] = authorization
        return client

    def person(self, name: str, password: str = PASSWORD) -> httpx.Client:
        """Somebody new, or the admin, who is logged in."""
        route = "login" if name == "admin" else "register"
        password = ADMIN_PASSWORD if name == "admin" else password
        client = self.client()
        answer = client.post(f"/auth/{route}", json={"username": name, "password": password})
        token = good(answer, answer.status_code).json()["access_token"]
        client.headers["Authorization"] = f"Bearer {token}"
        return client

    def memory_mib(self, figure: str = "VmRSS") -> float:
        """What it holds; VmHWM is the most that it held since `forget_peak`."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"{figure}:\s+(\d+) kB", status)
        assert found
        return int(found[1]) / 1024

    def forget_peak(self) -> float:
        """Measure VmHWM anew from now on. Returns what it holds now."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        return self.memory_mib()


class Watch:
    """While the block runs, GET this again and again: how long each answer took, in ms."""

    def __init__(self, server: Server, path: str = "/health", authorization: str = "") -> None:
        self.server = server
        self.path = path
        self.headers = {"Authorization": authorization} if authorization else {}
        self.times: list[float] = []
        self.wrong: list[object] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def watch(self) -> None:
        """One connection, a pause of 2 ms after each answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=DEADLINE)
        while not self.over.wait(0.002):
            began = time.perf_counter()
            try:
                connection.request("GET", self.path, headers=self.headers)
                answer = connection.getresponse()
                answer.read()
            except OSError as error:
                self.wrong.append(error)
                return
            self.times.append((time.perf_counter() - began) * 1000)
            if answer.status != 200:
                self.wrong.append(answer.status)
        connection.close()

    def __enter__(self) -> Self:
        """Begin."""
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End, and insist that every answer was a 200."""
        self.over.set()
        self.thread.join()
        if error is None:
            assert self.times
            assert not self.wrong

    def report(self, what: str, limit_ms: float) -> None:
        """Print the slowest. Only ten times the limit fails: the machine may be busy."""
        slowest = max(self.times)
        middle = statistics.median(self.times)
        note = "" if slowest <= limit_ms else "  OVER"
        times = f"{slowest:.0f} ms at most, {middle:.1f} in the middle of {len(self.times)}"
        report(f"{what}: GET {self.path} {times}, allowed are {limit_ms:.0f}{note}")
        assert slowest <= 10 * limit_ms


def good(answer: httpx.Response, status: int) -> httpx.Response:
    """The answer, if it has this status and is no failure of the caller's."""
    assert answer.status_code == status, f"{answer.status_code} {answer.text}"
    assert answer.is_success or status >= 400, answer.text
    return answer


def eventually(condition: Callable[[], Any]) -> Any:
    """The first true value of a condition that no event announces."""
    deadline = time.monotonic() + DEADLINE
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)
    return value


def together(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Do `work(0)` … `work(count - 1)` at once, each in a thread. Returns what they return."""
    barrier = threading.Barrier(count)

    def run(number: int) -> Any:
        barrier.wait(DEADLINE)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


figures: list[str] = []


def report(line: str) -> None:
    """Say this at the end of the run."""
    figures.append(line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was measured."""
    if figures:
        terminalreporter.section("measured", "-")
    for line in figures:
        terminalreporter.write_line(line)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start servers on this test's folder; the test's end kills them."""
    with contextlib.ExitStack() as running:

        def start(change: str = "", **settings: str) -> Server:
            server = Server(tmp_path, change, settings)
            return running.enter_context(contextlib.closing(server))

        yield start


@pytest.fixture
def server(serve: Callable[..., Server]) -> Server:
    """A server."""
    return serve()


# ── Several processes on one PostgreSQL and one Redis ───────────────────────────────────────────

Starts = Callable[..., list[Server]]
SECRET = {"SECRET_KEY": secrets.token_hex(32)}
LIMITED = {
    "RATE_LIMITS": "on",
    "RATE_LIMIT_READ": "40/minute",
    "RATE_LIMIT_LOGIN": "6/minute",
    "RATE_LIMIT_REGISTER": "999/minute",
    "RATE_LIMIT_WRITE": "9999/minute",
    "TRUSTED_PROXIES": "127.0.0.1",
}


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[services.PostgreSQL, services.Redis]]:
    """Both, empty."""
    folder = Path(tempfile.mkdtemp())
    with services.services(folder, durable=False) as both:
        yield both
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def postgresql(machines: tuple[services.PostgreSQL, services.Redis]) -> services.PostgreSQL:
    """A PostgreSQL for the tests of one file."""
    return machines[0]


@pytest.fixture(scope="module")
def redis(machines: tuple[services.PostgreSQL, services.Redis]) -> services.Redis:
    """A Redis for the tests of one file."""
    return machines[1]


@pytest.fixture(scope="module")
def start(redis: services.Redis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starts]:
    """Start processes on a database, all at once. In the end, none may have answered 500."""
    folder = tmp_path_factory.mktemp("processes")
    logs: list[Path] = []
    with contextlib.ExitStack() as running:

        def start(count: int, url: str, change: str = CHEAP_PASSWORDS, **more: str) -> list[Server]:
            folders = [folder / str(len(logs) + number) for number in range(count)]
            logs.extend(folders)

            def one(number: int) -> Server:
                folders[number].mkdir()
                given = {"DATABASE_URL": url, "REDIS_URL": redis.url, **SECRET, **more}
                server = Server(folders[number], change, given)
                return running.enter_context(contextlib.closing(server))

            return together(count, one)

        yield start
    for each in logs:
        said = (each / "log-0.txt").read_text()
        assert not re.search(r"Traceback| 500 \d|Task exception", said), said[-5000:]


@pytest.fixture(scope="module")
def fleet(start: Starts, postgresql: services.PostgreSQL) -> list[Server]:
    """Four processes, for all tests of a file that start none of their own."""
    return start(4, postgresql.fresh("fleet"))


@pytest.fixture(scope="module")
def limited(start: Starts, postgresql: services.PostgreSQL) -> list[Server]:
    """Two processes with rate limits."""
    return start(2, postgresql.fresh("limited"), **LIMITED)

"""What the benchmarks share: servers as processes on one core, plain requests, rows in bulk.

Every server runs on the first core that this process may use and the benchmark on the others, where
the operating system can do that (Linux). Traffic stays on 127.0.0.1.
"""

import contextlib
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PASSWORD = "bench, and nothing but bench"  # noqa: S105 - a throw-away server on 127.0.0.1
START_SECONDS = 30

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
SERVER_CORES = CORES[:1]
CLIENT_CORES = CORES[1:] or CORES

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))

# A developer's own settings must not change a measurement, so no others reach a server.
KEPT = ("PATH", "HOME", "LD_LIBRARY_PATH", "SYSTEMROOT", "PYTHONDONTWRITEBYTECODE")
SETTINGS = {"ACCESS_TOKEN_MINUTES": "1440", "RATE_LIMITS": "off", "PYTHONPATH": str(ROOT)}


def pin(cores: list[int]) -> None:
    """Keep this thread, and what it starts from now on, on these cores."""
    if cores:
        os.sched_setaffinity(0, cores)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class Server:
    """A process that serves HTTP. What it has to say goes to `log`."""

    cores = SERVER_CORES

    def __init__(
        self, command: list[str], port: int, directory: Path, settings: dict[str, str]
    ) -> None:
        self.port = port
        directory.mkdir(exist_ok=True)
        environment = {name: os.environ[name] for name in KEPT if name in os.environ} | settings
        pin(self.cores)
        try:
            self.log = directory / "log.txt"
            with self.log.open("ab") as log:
                said: Any = {"stdout": subprocess.DEVNULL, "stderr": log}
                self.process = subprocess.Popen(command, cwd=directory, env=environment, **said)
        finally:
            pin(CLIENT_CORES)

    def wait(self, path: str) -> None:
        """Until it answers. Errors: RuntimeError."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError):
                self.call("GET", path)
                return
            time.sleep(0.005)
        self.close()
        raise RuntimeError(f"the server did not answer: {self.log.read_text()[-2000:]}")

    def call(self, method: str, path: str, body: object = None, token: str = "") -> Any:
        """One request on a connection of its own: the JSON of its answer. Errors: OSError."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        with OPENER.open(request, timeout=60) as answer:  # an HTTPError unless 2xx
            return json.load(answer)

    def register(self, username: str) -> str:
        """A new account of app.py: its access token."""
        body = {"username": username, "password": PASSWORD}
        tokens = self.call("POST", "/api/v1/auth/register", body)
        return str(tokens["access_token"])

    def resident_mib(self) -> float:
        """Its memory in MiB; 0 where there is no /proc."""
        status = Path(f"/proc/{self.process.pid}/status")
        if not status.exists():
            return 0.0
        found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text())
        return int(found[1]) / 1024 if found else 0.0

    def close(self) -> None:
        """End it as a power cut would: SIGKILL, or what Windows has for it."""
        self.process.kill()
        self.process.wait()


def start_app(data_dir: Path, change: str = "") -> Server:
    """app.py with its data there; `change` is a statement to run between import and start."""
    port = free_port()
    command = [sys.executable, str(ROOT / "app.py")]
    if change:
        command = [sys.executable, "-c", f"import app; {change}; app.main()"]
    settings = SETTINGS | {"PORT": str(port), "DATA_DIR": str(data_dir)}
    server = Server(command, port, data_dir, settings)
    server.wait("/health")
    return server


def start_bare(directory: Path) -> Server:
    """The route of bare.py."""
    port = free_port()
    command = [sys.executable, str(ROOT / "bench" / "bare.py"), str(port)]
    server = Server(command, port, directory, {})
    server.wait("/")
    return server


def task_body(number: int) -> dict[str, str]:
    """What every benchmark creates tasks from; one in twenty is about a fence."""
    return {
        "title": f"Task {number}: {'paint the fence' if number % 20 == 7 else 'write the report'}",
        "description": "Something to do, and a line about why it has to be done. " * 2,
        "status": ("todo", "in_progress", "done")[number % 3],
        "priority": ("low", "medium", "high")[number % 3],
        "due_date": f"2030-01-{number % 20 + 1:02d}T12:00:00Z",
    }


def copy_rows(db: sqlite3.Connection, table: str, changes: dict[str, str], origin: str) -> None:
    """Insert rows of a table into it again, with all the columns that it has, some of them changed.

    Errors: RuntimeError if a column to change is not there.
    """
    columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})") if row[1] != "id"]
    missing = changes.keys() - set(columns)
    if missing:
        raise RuntimeError(f"the table {table} has no column {', '.join(missing)}")
    values = [changes.get(column, f"{table}.{column}") for column in columns]
    into = f"INSERT INTO {table} ({', '.join(columns)})"
    db.execute(f"{into} SELECT {', '.join(values)} FROM {origin}")  # noqa: S608 - our own words


def multiply(data_dir: Path, username: str, users: int, copies: int) -> None:
    """Make `users` accounts of one, each with `copies` times its tasks, while no server runs.

    Rows come in the order in which time would bring them: everybody's first, everybody's next.
    """
    with contextlib.closing(sqlite3.connect(data_dir / "tasks.db")) as db:
        db.execute("PRAGMA synchronous=OFF")
        find = "SELECT id, seq FROM users WHERE username = ?"
        owner, tasks = db.execute(find, [username]).fetchone()
        for number in range(1, users):
            name = f"'{username}-{number}'"
            names = {"username": name, "username_key": name}
            copy_rows(db, "users", names, f"users WHERE id = {owner}")
        originals = f"tasks.owner_id = {owner} AND tasks.version <= {tasks}"
        for copy in range(copies):
            theirs = {"owner_id": "users.id", "version": f"tasks.version + {copy * tasks}"}
            owners = f"users.username LIKE '{username}%' AND (users.id != {owner} OR {copy} > 0)"
            copy_rows(db, "tasks", theirs, f"users CROSS JOIN tasks WHERE {owners} AND {originals}")
        change = "UPDATE users SET seq = ? WHERE username LIKE ?"
        db.execute(change, [copies * tasks, f"{username}%"])
        db.commit()

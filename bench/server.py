"""A server of its own for a bench program: app.py as a subprocess, with an empty or a given data directory."""

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

APP = Path(__file__).resolve().parent.parent / "app.py"
PASSWORD = "bench, and nothing but bench"  # noqa: S105 - a throw-away server on 127.0.0.1
START_SECONDS = 30


class Server:
    """A running app.py: where it listens, and how long it took to answer."""

    def __init__(self, data_dir: str, core: int | None = None) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RATE_LIMIT")}
        environment |= {"HOST": "127.0.0.1", "PORT": "0", "DATA_DIR": data_dir, "RATE_LIMITS": "off", "ROOT_PATH": ""}
        environment |= {"ADMIN_USERNAME": "admin", "ADMIN_PASSWORD": PASSWORD, "PYTHONUNBUFFERED": "1"}
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, str(APP)], cwd=data_dir, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        if core is not None:
            os.sched_setaffinity(self.process.pid, {core})  # threads that it starts later inherit this
        try:
            self.port = self.announced_port()
            self.wait()
        except BaseException:
            self.kill()
            raise
        self.start_seconds = time.perf_counter() - began

    def announced_port(self) -> int:
        """The port, from the line that says where it listens. Errors: RuntimeError."""
        for line in self.process.stdout or ():
            if found := re.search(rb"Listening\s+http://[^/\s]+:(\d+)", line):
                return int(found[1])
        raise RuntimeError("the server ended before it listened")

    def wait(self) -> None:
        """Until it answers. Errors: RuntimeError."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), contextlib.closing(self.connect()) as connection:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            time.sleep(0.01)
        raise RuntimeError("the server did not answer")

    def connect(self) -> http.client.HTTPConnection:
        """A connection to it."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def call(self, method: str, path: str, body: object = None, token: str = "") -> tuple[int, dict]:
        """One request on a connection of its own: status and JSON."""
        with contextlib.closing(self.connect()) as connection:
            return call(connection, method, path, body, token)

    def log_in(self) -> str:
        """An access token of the admin."""
        status, tokens = self.call("POST", "/api/v1/auth/login", {"username": "admin", "password": PASSWORD})
        if status != 200:
            raise RuntimeError(f"login answered {status}")
        return tokens["access_token"]

    def kill(self) -> None:
        """End it as a power cut would: SIGKILL, or what Windows has for it."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


def call(
    connection: http.client.HTTPConnection, method: str, path: str, body: object = None, token: str = ""
) -> tuple[int, dict]:
    """One request on an open connection: status and JSON."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    if body is not None:
        headers["Content-Type"] = "application/json"
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    raw = response.read()
    return response.status, json.loads(raw) if raw else {}


@contextlib.contextmanager
def running(data_dir: str, core: int | None = None) -> Iterator[Server]:
    """A server that is gone when the block ends."""
    server = Server(data_dir, core)
    try:
        yield server
    finally:
        server.kill()

"""Whole requests per second over real sockets, next to a bare FastAPI route in the same sitting.

Run    .venv/bin/python bench/load.py --seconds 5 --rounds 5

32 connections, keep-alive, one request at a time on each; an answer counts when its body has arrived and
its status is right. The server has one core, where the operating system can do that, this program the others.
Each round measures everything once, so that ratios compare neighbours; medians over the rounds are printed.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from server import PASSWORD, Server, call, running

CONNECTIONS = 32
LOGINS = 20
SERVER_CORE = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


class Client(asyncio.Protocol):
    """One connection that asks again as soon as it has been answered."""

    def __init__(self, request: bytes, status: bytes) -> None:
        self.request, self.wanted = request, b"HTTP/1.1 " + status
        self.received, self.answers, self.failure = b"", 0, ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the first time."""
        self.transport = transport
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Count a whole answer and ask again."""
        self.received += data
        head, blank, body = self.received.partition(b"\r\n\r\n")
        length = re.search(rb"\ncontent-length: (\d+)", head, re.IGNORECASE)
        if not blank or length is None or len(body) < int(length[1]):
            return
        if not head.startswith(self.wanted):
            self.failure = self.received[:300].decode(errors="replace")
            self.transport.close()
            return
        self.received, self.answers = b"", self.answers + 1
        self.transport.write(self.request)


def request_bytes(method: str, path: str, token: str = "", body: object = None) -> bytes:
    """A whole HTTP/1.1 request."""
    content = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1"]
    lines += [f"Authorization: Bearer {token}"] if token else []
    lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"] if content else []
    return "\r\n".join([*lines, "", ""]).encode() + content


async def count_answers(port: int, request: bytes, status: bytes, seconds: float) -> float:
    """Answers per second. Errors: RuntimeError for a wrong status or an early end."""
    loop = asyncio.get_running_loop()
    make = functools.partial(Client, request, status)
    began = time.perf_counter()
    clients = [(await loop.create_connection(make, "127.0.0.1", port))[1] for _ in range(CONNECTIONS)]
    await asyncio.sleep(seconds)
    answers, elapsed = sum(client.answers for client in clients), time.perf_counter() - began
    for client in clients:
        client.transport.abort()
        if client.failure or not client.answers:
            raise RuntimeError(f"unexpected answer: {client.failure or 'none'}")
    return answers / elapsed


def rate(port: int, request: bytes, status: bytes, seconds: float) -> float:
    """The same from outside of an event loop; uvloop where there is one, so that this side is the faster."""
    factory = None
    with contextlib.suppress(ImportError):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(count_answers(port, request, status, seconds))


def serve_bare(port: int) -> None:
    """What to compare with: one FastAPI route that returns a constant, under the same uvicorn."""
    bare = FastAPI()

    @bare.get("/")
    async def constant() -> dict[str, str]:
        return {"status": "ok"}

    uvicorn.run(bare, host="127.0.0.1", port=port, log_level="warning", access_log=False)


@contextlib.contextmanager
def bare_server() -> Iterator[int]:
    """The port of a bare server on the same core, gone when the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, __file__, "--bare", str(port)])
    try:
        if SERVER_CORE is not None:
            os.sched_setaffinity(process.pid, {SERVER_CORE})
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


def health_during_logins(server: Server) -> list[float]:
    """Milliseconds of each GET /health while LOGINS logins run at once, sorted."""
    credentials = {"username": "admin", "password": PASSWORD}
    statuses: list[int] = []
    threads = [
        threading.Thread(
            target=lambda: statuses.append(server.call("POST", "/api/v1/auth/login", credentials)[0]), daemon=True
        )
        for _ in range(LOGINS)
    ]
    for thread in threads:
        thread.start()
    times = []
    with contextlib.closing(server.connect()) as connection:
        while any(thread.is_alive() for thread in threads):
            began = time.perf_counter()
            call(connection, "GET", "/health")
            times.append((time.perf_counter() - began) * 1000)
            time.sleep(0.005)
    if statuses != [200] * LOGINS:
        raise RuntimeError(f"logins answered {statuses}")
    return sorted(times)


def resident_mib(server: Server) -> float | None:
    """Resident memory, where /proc tells it."""
    status = Path(f"/proc/{server.process.pid}/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else None


def measure(server: Server, bare_port: int, seconds: float, rounds: int) -> None:
    """Fill the server, run the rounds, print the medians."""
    token = server.log_in()
    for number in range(100):
        server.call("POST", "/api/v1/tasks", {"title": f"Task {number}", "description": "Something to do. " * 8}, token)
    status, user = server.call("POST", "/api/v1/auth/register", {"username": "writer", "password": PASSWORD})
    if status != 201:
        raise RuntimeError(f"register answered {status}")
    create = request_bytes("POST", "/api/v1/tasks", user["access_token"], {"title": "One more", "priority": "high"})
    plan = {
        "bare FastAPI route": (bare_port, request_bytes("GET", "/"), b"200"),
        "list 10 of 100": (server.port, request_bytes("GET", "/api/v1/tasks?page_size=10", token), b"200"),
        "get one": (server.port, request_bytes("GET", "/api/v1/tasks/50", token), b"200"),
        "create": (server.port, create, b"201"),
    }
    results = [{name: rate(*what, seconds) for name, what in plan.items()} for _ in range(rounds)]
    print(f"{'':20}{'per second':>12}{'of bare':>10}   (medians of {rounds} rounds of {seconds:g} s)")
    for name in plan:
        per_second = statistics.median(result[name] for result in results)
        ratio = statistics.median(result[name] / result["bare FastAPI route"] for result in results)
        print(f"{name:20}{per_second:12,.0f}{ratio:10.1%}")


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bare", type=int, metavar="PORT", help="serve the bare route and nothing else")
    arguments = parser.parse_args()
    if arguments.bare:
        serve_bare(arguments.bare)
        return
    if SERVER_CORE is not None and (others := os.sched_getaffinity(0) - {SERVER_CORE}):
        os.sched_setaffinity(0, others)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as data_dir,
        bare_server() as bare_port,
        running(data_dir, SERVER_CORE) as server,
    ):
        measure(server, bare_port, arguments.seconds, arguments.rounds)
        times = health_during_logins(server)
        p50, p99 = (times[int(len(times) * part)] for part in (0.5, 0.99))
        print(f"GET /health during {LOGINS} logins: p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {times[-1]:.1f} ms")
        if memory := resident_mib(server):
            print(f"resident memory afterwards: {memory:.0f} MiB")
        print(f"start to first answer: {server.start_seconds:.2f} s")


if __name__ == "__main__":
    main()

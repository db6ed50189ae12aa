"""An HTTP client that writes prepared bytes and waits for whole answers: the faster side.

It asks for one thing at a time on a connection, and knows an answer's end by its status, by its
Content-Length or by its last chunk.
"""

import asyncio
import itertools
import json
import re
import time
from collections.abc import Coroutine, Iterator
from typing import Any, NamedTuple

CONNECTIONS = 32
ANSWER_SECONDS = 60


class Wanted(NamedTuple):
    """A whole HTTP/1.1 request, and the status that answers it."""

    request: bytes
    status: int


class Answer(NamedTuple):
    """What came back."""

    status: int
    head: bytes
    body: bytes


class Rate(NamedTuple):
    """Answers per second, the share of a core that this side needed for them, their times."""

    per_second: float
    client_share: float
    times: list[float]  # milliseconds


def wanted(
    method: str,
    path: str,
    token: str = "",
    body: object = None,
    status: int = 200,
    if_none_match: str = "",
) -> Wanted:
    """A request made ready."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1"]
    if token:
        lines.append(f"Authorization: Bearer {token}")
    if if_none_match:
        lines.append(f"If-None-Match: {if_none_match}")
    content = b""
    if body is not None:
        content = json.dumps(body).encode()
        lines.append("Content-Type: application/json")
        lines.append(f"Content-Length: {len(content)}")
    return Wanted("\r\n".join([*lines, "", ""]).encode() + content, status)


def header(head: bytes, name: bytes) -> bytes:
    """A header's value, empty if absent."""
    found = re.search(rb"\r\n" + name + rb": ([^\r]*)", head, re.IGNORECASE)
    return found[1] if found else b""


def whole_answer(received: bytes) -> Answer | None:
    """The answer, once all of it is there."""
    head, blank, body = received.partition(b"\r\n\r\n")
    if not blank:
        return None
    answer = Answer(int(head[9:12]), head, body)
    if answer.status in (204, 304):
        return answer
    length = header(head, b"content-length")
    complete = len(body) == int(length) if length else body.endswith(b"0\r\n\r\n")
    return answer if complete else None


class Connection(asyncio.Protocol):
    """One connection, kept open."""

    transport: asyncio.Transport
    answer: asyncio.Future[Answer] | None = None
    received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to write."""
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Hand a whole answer to whoever asked."""
        self.received += data
        answer = whole_answer(self.received)
        if answer and self.answer and not self.answer.done():
            self.answer.set_result(answer)

    def connection_lost(self, reason: Exception | None) -> None:
        """Tell whoever waits."""
        if self.answer and not self.answer.done():
            self.answer.set_exception(reason or ConnectionError("the server hung up"))

    async def send(self, what: Wanted) -> Answer:
        """One request and its answer, whatever its status. Errors: ConnectionError."""
        if self.transport.is_closing():
            raise ConnectionError("the server hung up")
        self.received = b""
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(what.request)
        return await self.answer

    async def ask(self, what: Wanted) -> Answer:
        """One request and its answer. Errors: RuntimeError for another status; ConnectionError."""
        answer = await self.send(what)
        if answer.status != what.status:
            line = what.request.partition(b"\r\n")[0].decode()
            raise RuntimeError(f"{line} answered {answer.status}: {answer.body[:300]!r}")
        return answer

    async def timed(self, what: Wanted) -> float:
        """The milliseconds that an answer took."""
        began = time.perf_counter()
        await self.ask(what)
        return (time.perf_counter() - began) * 1000


async def connect(port: int) -> Connection:
    """A new connection."""
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
    return connection


async def ask_once(port: int, what: Wanted) -> Answer:
    """One request on a connection of its own."""
    connection = await connect(port)
    answer = await connection.ask(what)
    connection.transport.abort()
    return answer


async def keep_asking(
    connection: Connection, work: Iterator[Wanted], deadline: float
) -> list[float]:
    """Ask for what comes next until nothing is left or the time is over. Returns their times."""
    times = []
    for what in work:
        times.append(await connection.timed(what))
        if time.perf_counter() > deadline:
            break
    return times


async def drive(port: int, work: Iterator[Wanted], seconds: float) -> Rate:
    """Work through 32 connections, each asking again as soon as it has been answered."""
    connections = [await connect(port) for _ in range(CONNECTIONS)]
    busy_before = time.process_time()
    began = time.perf_counter()
    async with asyncio.timeout(seconds + ANSWER_SECONDS):
        askers = [keep_asking(each, work, began + seconds) for each in connections]
        times = list(itertools.chain.from_iterable(await asyncio.gather(*askers)))
    elapsed = time.perf_counter() - began
    busy = time.process_time() - busy_before
    for connection in connections:
        connection.transport.abort()
    return Rate(len(times) / elapsed, busy / elapsed, times)


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """Run it on uvloop, where there is one."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


def percentile(values: list[float], share: float) -> float:
    """The value that this share of all stays under."""
    place = min(int(len(values) * share), len(values) - 1)
    return sorted(values)[place]

"""What a table of rates does not show: five scenes, each on a server of its own.

Run    .venv/bin/python bench/scenes.py [logins] [sockets] [million] [large] [start]
Exit   0 when every status was right and no socket missed, repeated or reordered a change, 1
       otherwise; no time fails

logins   20 logins at once; how long GET /tasks and GET /health take meanwhile
sockets  500 sockets of one user, 20 changes a second. app.py allows a user 50 streams, so it is
         started by lines that set its constant MAX_STREAMS_PER_USER to 1,000 and call main()
million  1,000 users of 1,000 tasks each, beside one user of 100
large    one user of 100,000 tasks; how long /health takes for somebody else meanwhile
start    from nothing to the first answer, beside the bare FastAPI route
"""

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from client import Wanted, connect, drive, percentile, run, wanted
from contenders import Onefile, User
from load import never_asked
from server import PASSWORD, Server, multiply, start_app, start_bare, task_body
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.uri import parse_uri

ORIGINALS = 20
MORE_STREAMS = "app.MAX_STREAMS_PER_USER = 1000"
LOGINS = 20
CHANGES_PER_SECOND = 20
LATE_SECONDS = 30
HEALTH = itertools.repeat(wanted("GET", "/health"))


@contextlib.contextmanager
def app_with(users: int, tasks_each: int, change: str = "") -> Iterator[tuple[Server, User]]:
    """app.py with so many users of so many tasks, and the first of them."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        data_dir = Path(directory)
        with contextlib.closing(start_app(data_dir)) as server:
            token = server.register("user")
            for number in range(ORIGINALS):
                server.call("POST", "/api/v1/tasks", task_body(number), token)
        multiply(data_dir, "user", users, tasks_each // ORIGINALS)
        with contextlib.closing(start_app(data_dir, change)) as server:
            user = User(token, {}, [])
            task_ids, total = Onefile(server).found(user, Onefile.newest_hundred)
            if total != tasks_each:
                raise RuntimeError(f"{total} tasks of {tasks_each} are there")
            user.task_ids.extend(task_ids)
            yield server, user


async def ask_during(work: asyncio.Task[Any], port: int, what: Iterator[Wanted]) -> list[float]:
    """The milliseconds that each of these requests takes, until the work is done."""
    connection = await connect(port)
    times = []
    while not work.done():
        times.append(await connection.timed(next(what)))
        await asyncio.sleep(0.002)
    return times


async def during(
    work: Coroutine[Any, Any, Any], port: int, *questions: Iterator[Wanted]
) -> tuple[Any, list[list[float]]]:
    """What the work returns, and the times of these requests meanwhile."""
    task = asyncio.create_task(work)
    times = await asyncio.gather(*(ask_during(task, port, what) for what in questions))
    return await task, times


async def at_once(port: int, what: Wanted, count: int) -> None:
    """The same request on so many connections."""
    connections = [await connect(port) for _ in range(count)]
    await asyncio.gather(*(connection.ask(what) for connection in connections))


def logins(arguments: argparse.Namespace) -> bool:
    """A storm of logins."""
    del arguments
    with app_with(1, 100) as (server, user):
        credentials = {"username": "user", "password": PASSWORD}
        login = wanted("POST", "/api/v1/auth/login", body=credentials)
        lists = never_asked(Onefile(server), user)
        began = time.perf_counter()
        work = at_once(server.port, login, LOGINS)
        _, (tasks_times, health_times) = run(during(work, server.port, lists, HEALTH))
        seconds = time.perf_counter() - began
    print(
        f"logins: {LOGINS} at once took {seconds:.1f} s; meanwhile"
        f" GET /tasks p50 {percentile(tasks_times, 0.5):.1f} ms,"
        f" p99 {percentile(tasks_times, 0.99):.1f} ms ({len(tasks_times)} requests),"
        f" GET /health at most {max(health_times):.1f} ms"
    )
    return True


class Listener(asyncio.Protocol):
    """A WebSocket that notes each message and when it came."""

    def __init__(self, port: int, token: str, number: int) -> None:
        self.protocol = ClientProtocol(parse_uri(f"ws://127.0.0.1:{port}/ws/tasks/bench-{number}"))
        self.token = token
        self.messages: list[tuple[float, bytes]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the upgrade."""
        self.transport = transport
        request = self.protocol.connect()
        request.headers["Authorization"] = f"Bearer {self.token}"
        self.protocol.send_request(request)
        self.send()

    def data_received(self, data: bytes) -> None:
        """Note what came, and answer pings."""
        now = time.perf_counter()
        self.protocol.receive_data(data)
        for event in self.protocol.events_received():
            if isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                self.messages.append((now, bytes(event.data)))
        self.send()

    def send(self) -> None:
        """Send what the protocol wants to say."""
        for data in self.protocol.data_to_send():
            self.transport.write(data)  # type: ignore[attr-defined]


async def until_all_have(listeners: list[Listener], count: int) -> None:
    """Wait until everybody has so many messages, but not for ever."""
    deadline = time.monotonic() + LATE_SECONDS
    while time.monotonic() < deadline:
        if all(len(listener.messages) >= count for listener in listeners):
            return
        await asyncio.sleep(0.05)


async def listen(port: int, token: str, count: int) -> list[Listener]:
    """Open so many sockets, and wait for hello on each. Errors: RuntimeError."""
    loop = asyncio.get_running_loop()
    listeners = []
    for number in range(count):
        make = functools.partial(Listener, port, token, number)
        _, listener = await loop.create_connection(make, "127.0.0.1", port)
        listeners.append(listener)
    await until_all_have(listeners, 1)
    greeted = sum(len(listener.messages) == 1 for listener in listeners)
    if greeted < count:
        raise RuntimeError(f"{greeted} of {count} sockets got hello")
    return listeners


async def change(
    app: Onefile, user: User, count: int, per_second: float = CHANGES_PER_SECOND
) -> dict[int, float]:
    """Create and update tasks in turn, at a steady pace. Returns when each seq was sent.

    No task is updated twice within seconds: of two changes of one, a slow socket may see the later.
    """
    connection = await connect(app.server.port)
    sent = {}
    began = time.perf_counter()
    for number in range(count):
        what = app.create(user, number)
        if number % 2:
            what = app.update(user, user.task_ids[number // 2 % len(user.task_ids)])
        await asyncio.sleep(began + number / per_second - time.perf_counter())
        now = time.perf_counter()
        answer = await connection.ask(what)
        sent[json.loads(answer.body)["version"]] = now
    return sent


async def change_and_listen(app: Onefile, user: User, sockets: int, changes: int) -> bool:
    """Whether every socket got each change once and in order."""
    listeners = await listen(app.server.port, user.token, sockets)
    began = time.perf_counter()
    busy_before = time.process_time()
    sent = await change(app, user, changes)
    elapsed = time.perf_counter() - began
    busy = (time.process_time() - busy_before) / elapsed
    await until_all_have(listeners, 1 + changes)
    await asyncio.sleep(3)  # in which something might come twice
    right = 0
    times = []
    for listener in listeners:
        received = [(moment, json.loads(text)["seq"]) for moment, text in listener.messages[1:]]
        if [seq for _, seq in received] == list(sent):
            right += 1
        times += [(moment - sent[seq]) * 1000 for moment, seq in received if seq in sent]
    print(
        f"sockets: {right} of {sockets} got all of {changes} changes once and in order,"
        f" at {changes / elapsed:.1f} changes a second; from sending a change to its arrival"
        f" p50 {percentile(times, 0.5):.1f} ms, p99 {percentile(times, 0.99):.1f} ms"
        f" (the client was busy for {busy:.0%} of the time)"
    )
    return right == sockets


def sockets(arguments: argparse.Namespace) -> bool:
    """Many sockets of one user."""
    changes = int(arguments.seconds * CHANGES_PER_SECOND)
    with app_with(1, 100, MORE_STREAMS) as (server, user):
        return bool(run(change_and_listen(Onefile(server), user, arguments.sockets, changes)))


def reads(server: Server, user: User) -> dict[str, Iterator[Wanted]]:
    """What is asked of a small and of a large database."""
    app = Onefile(server)
    return {
        "GET /tasks, again": itertools.repeat(app.list(user, app.newest_ten)),
        "GET /tasks, never asked before": never_asked(app, user),
        "GET /tasks/{id}": (app.one(user, task_id) for task_id in itertools.cycle(user.task_ids)),
    }


def million(arguments: argparse.Namespace) -> bool:
    """Many tasks of many users, beside a few of one."""
    with (
        app_with(1, 100) as (small, small_user),
        app_with(arguments.users, 1000) as (large, large_user),
    ):
        print(f"million: requests per second, 1 user of 100 tasks | {arguments.users:,} of 1,000")
        large_work = reads(large, large_user)
        for name, small_work in reads(small, small_user).items():
            pairs = []
            for _ in range(3):
                few = run(drive(small.port, small_work, arguments.seconds / 3)).per_second
                many = run(drive(large.port, large_work[name], arguments.seconds / 3)).per_second
                pairs.append((few, many))
            few, many = (statistics.median(rates) for rates in zip(*pairs, strict=True))
            ratio = statistics.median(many / few for few, many in pairs)
            print(f"  {name:32}{few:8,.0f} | {many:8,.0f} | ratio {ratio:.2f}")
    return True


async def after_updates(port: int, update: Wanted, what: Wanted) -> tuple[list[float], set[int]]:
    """The times of a read, each after an update, so that none is remembered; its statuses."""
    connection = await connect(port)
    times = []
    statuses = set()
    for _ in range(10):
        await connection.ask(update)
        began = time.perf_counter()
        answer = await connection.send(what)
        times.append((time.perf_counter() - began) * 1000)
        statuses.add(answer.status)
    return times, statuses


def large(arguments: argparse.Namespace) -> bool:
    """One user with many tasks. A read may end as too slow (503), and nothing else may happen."""
    count = arguments.tasks
    right = True
    with app_with(1, count) as (server, user):
        update = Onefile(server).update(user, user.task_ids[0])
        paths = {
            "page 1": "tasks?page_size=20",
            f"page {count // 20:,}": f"tasks?page_size=20&page={count // 20}",
            "search, one in twenty": "tasks?search=fence",
            "search, nothing": "tasks?search=unheard-of",
            "statistics": "tasks/statistics",
        }
        print(f"large: milliseconds, one user of {count:,} tasks, each read after an update")
        for name, path in paths.items():
            work = after_updates(server.port, update, wanted("GET", f"/api/v1/{path}", user.token))
            (times, statuses), (health_times,) = run(during(work, server.port, HEALTH))
            right = right and statuses <= {200, 503}
            print(
                f"  {name:24} median {statistics.median(times):7.1f}, max {max(times):7.1f},"
                f" status {statuses}; /health meanwhile at most {max(health_times):6.1f}"
            )
    return right


def start_seconds(start: Callable[[Path], Server], directory: Path) -> float:
    """How long a start takes, to the first answer."""
    began = time.perf_counter()
    with contextlib.closing(start(directory)):
        return time.perf_counter() - began


def start(arguments: argparse.Namespace) -> bool:
    """Starts, the two in turn."""
    del arguments
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        directory = Path(temporary)
        first = start_seconds(start_app, directory)
        pairs = [
            (start_seconds(start_app, directory), start_seconds(start_bare, directory))
            for _ in range(5)
        ]
    ours, bare = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    ratio = statistics.median(own / other for own, other in pairs)
    print(
        f"start: {ours:.2f} s to the first answer, bare FastAPI {bare:.2f} s, ratio {ratio:.2f}"
        f" (medians of 5); {first:.2f} s on an empty directory"
    )
    return True


SCENES = {"logins": logins, "sockets": sockets, "million": million, "large": large, "start": start}


def main() -> int:
    """Play the scenes that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("scenes", nargs="*", metavar="SCENE", help=f"of {', '.join(SCENES)}")
    parser.add_argument("--seconds", type=float, default=10.0, help="of changes, of a measurement")
    parser.add_argument("--sockets", type=int, default=500)
    parser.add_argument("--users", type=int, default=1000, help="of the million")
    parser.add_argument("--tasks", type=int, default=100_000, help="of the large user")
    arguments = parser.parse_args()
    unknown = set(arguments.scenes) - set(SCENES)
    if unknown:
        parser.error(f"no such scene: {', '.join(unknown)}")
    results = [SCENES[name](arguments) for name in arguments.scenes or SCENES]
    if not all(results):
        print("FAILED")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())

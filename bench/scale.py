"""One, two and four processes of app.py on PostgreSQL and Redis, beside one on SQLite.

Run    .venv/bin/python bench/scale.py --rounds 3 --seconds 3
Needs  deploy/requirements.txt too; Debian's postgresql, redis-server and nginx; Linux
Exit   0 when every status was right and no socket missed, repeated or reordered a change, 1
       otherwise; no time fails

All are asked through nginx on 127.0.0.1, without TLS and without an access log. Both databases
flush every commit to the disk; rate limits are off. Each number of processes has a database and a
SECRET_KEY of its own, so no bells ring from one to another. Each round does each work on all.

The last core is the client's. Processes, PostgreSQL, Redis and nginx share all others: to pin each
process to a core would measure the pinning. So where there are two cores, all these have one, and
the table shows what further processes cost, not what they bring. With --together nothing is pinned,
the client competes, and two processes can use two cores; four want a machine of six or more.

Live updates: sockets of a few users through nginx, on all processes; two connections for each user
create and update tasks, 20 a second in all, by all processes. Timed from sending a change to its
arrival. What a socket did not get is lost, what it should not have got is surplus.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import secrets
import signal
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from client import Rate, drive, percentile, run
from contenders import Onefile, User
from load import AGAIN, CREATE, FRESH, MIX, ONE, WARM_UP_SECONDS, Side, fill, prepared
from scenes import CHANGES_PER_SECOND, Listener, change, listen, until_all_have
from server import CORES, ROOT, SETTINGS, Server, free_port, pin
from services import ordinary_user, program, services

PROCESSES = (1, 2, 4)
KINDS = (AGAIN, FRESH, ONE, CREATE, MIX)
STREAMS_PER_USER = 50  # what app.py allows in one process
WRITERS = 2  # of a user

NGINX = """
daemon off; pid nginx.pid; worker_processes auto; events {{ worker_connections 4096; }}
http {{
    {temporary}
    access_log off;
    keepalive_requests 1000000000;  # or clients are sent away after 1,000
    upstream processes {{  # the app ends idle connections after 5 s
        {servers} keepalive 64; keepalive_requests 1000000000; keepalive_timeout 4s;
    }}
    map $http_upgrade $connection_header {{ default ""; websocket upgrade; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://processes;
            proxy_http_version 1.1;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_header;
        }}
    }}
}}
"""


class Process(Server):
    """A server on all cores but the client's."""

    cores = CORES[:-1] or CORES


class Proxy(Process):
    """nginx in front of some processes, as an ordinary user."""

    def __init__(self, directory: Path, processes: list[Process]) -> None:
        port = free_port()
        servers = " ".join(f"server 127.0.0.1:{process.port};" for process in processes)
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = " ".join(f"{kind}_temp_path {kind};" for kind in kinds)
        directory.mkdir()
        config = NGINX.format(port=port, servers=servers, temporary=temporary)
        (directory / "nginx.conf").write_text(config)
        command = [*ordinary_user(directory), program("nginx"), "-e", "stderr", "-c", "nginx.conf"]
        super().__init__([*command, "-p", str(directory)], port, directory, {})
        self.wait("/health")

    def close(self) -> None:
        """End it and its workers, whom SIGKILL would leave behind."""
        self.process.terminate()
        self.process.wait()


class Setup(NamedTuple):
    """Processes of app.py on one database behind a proxy, and what is asked of them."""

    side: Side
    processes: list[Process]
    users: list[User]  # whose sockets listen


@dataclass
class Live:
    """What sockets got."""

    times: list[float] = field(default_factory=list)  # milliseconds of each change that arrived
    lost: int = 0
    surplus: int = 0
    disordered: int = 0

    def count(self, listener: Listener, sent: dict[int, float]) -> None:
        """One socket, and when each seq was sent that it should have got."""
        received = [(json.loads(text).get("seq", 0), at) for at, text in listener.messages[1:]]
        times = [(at - sent[seq]) * 1000 for seq, at in dict(received).items() if seq in sent]
        self.times += times
        self.lost += len(sent) - len(times)
        self.surplus += len(received) - len(times)
        self.disordered += received != sorted(received)


def start(
    stack: contextlib.ExitStack, directory: Path, count: int, settings: dict[str, str]
) -> tuple[Proxy, list[Process]]:
    """So many processes, one after the other, and their proxy; they end with the stack."""
    directory.mkdir()
    directory.chmod(0o711)  # nginx is another user
    processes = []
    for number in range(count):
        port = free_port()
        here = {"PORT": str(port), "DATA_DIR": str(directory / f"process-{number}")}
        command = [sys.executable, str(ROOT / "app.py")]
        process = Process(command, port, Path(here["DATA_DIR"]), SETTINGS | settings | here)
        processes.append(stack.enter_context(contextlib.closing(process)))
        process.wait("/health")
    proxy = Proxy(directory / "nginx", processes)
    return stack.enter_context(contextlib.closing(proxy)), processes


def start_all(stack: contextlib.ExitStack, arguments: argparse.Namespace) -> list[Setup]:
    """SQLite, then PostgreSQL with more and more processes, all filled; they end with the stack."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
    pin(Process.cores)
    postgresql, redis = stack.enter_context(services(folder))
    started = {"SQLite, 1 process": start(stack, folder / "sqlite", 1, {})}
    for count in PROCESSES:
        settings = {"DATABASE_URL": postgresql.fresh(f"tasks_{count}"), "REDIS_URL": redis.url}
        settings["SECRET_KEY"] = secrets.token_hex(32)
        started[f"PostgreSQL, {count}"] = start(stack, folder / str(count), count, settings)
    pin(CORES if arguments.together else CORES[-1:])
    setups = []
    for name, (proxy, processes) in started.items():
        app = Onefile(proxy)
        listening = max(2, math.ceil(arguments.sockets / STREAMS_PER_USER))
        users = [app.sign_up(1_000_000 + number) for number in range(listening)]
        fill(app, users)
        side = prepared(app, arguments.users)._replace(name=name)
        setups.append(Setup(side, processes, users))
    return setups


async def write(app: Onefile, user: User, count: int, per_second: float) -> dict[int, float]:
    """So many changes by each of a user's connections, of other tasks. When each seq was sent."""
    writers = [user._replace(task_ids=user.task_ids[number::WRITERS]) for number in range(WRITERS)]
    sent = await asyncio.gather(*(change(app, each, count, per_second) for each in writers))
    return {seq: moment for each in sent for seq, moment in each.items()}


async def listen_and_write(setup: Setup, sockets: int, seconds: float, live: Live) -> None:
    """Write through all processes while sockets listen on all of them."""
    app = Onefile(setup.side.server)
    each = sockets // len(setup.users)
    listeners = [await listen(app.server.port, user.token, each) for user in setup.users]
    health = [process.call("GET", "/health/detailed") for process in setup.processes]
    if not all(figures["live_connections"] for figures in health):
        raise RuntimeError("there is a process without a socket")
    per_second = CHANGES_PER_SECOND / len(setup.users) / WRITERS
    count = math.ceil(seconds * per_second)
    sent = await asyncio.gather(*(write(app, user, count, per_second) for user in setup.users))
    await until_all_have([each for theirs in listeners for each in theirs], 1 + count * WRITERS)
    await asyncio.sleep(3)  # in which something might come twice
    for theirs, changes in zip(listeners, sent, strict=True):
        for listener in theirs:
            live.count(listener, changes)
            listener.transport.abort()  # type: ignore[attr-defined]


def quantiles(times: list[float]) -> str:
    """What half of all and nearly all stay under."""
    return f"{percentile(times, 0.5):.0f} / {percentile(times, 0.99):.0f}"


def cell(rounds: list[Rate]) -> str:
    """The median of the rounds, and the times of all requests."""
    times = [milliseconds for rate in rounds for milliseconds in rate.times]
    return f"{statistics.median(rate.per_second for rate in rounds):,.0f} · {quantiles(times)}"


def measure(setups: list[Setup], arguments: argparse.Namespace) -> bool:
    """Do it, round after round, and print the table. Whether no change was lost or repeated."""
    pairs = [(kind, setup.side) for kind in KINDS for setup in setups]
    rates: dict[tuple[str, str], list[Rate]] = {(kind, side.name): [] for kind, side in pairs}
    lives = [Live() for _ in setups]
    for kind, side in pairs:
        run(drive(side.server.port, side.work[kind], WARM_UP_SECONDS))
    for _ in range(arguments.rounds):
        for kind, side in pairs:
            work = drive(side.server.port, side.work[kind], arguments.seconds)
            rates[kind, side.name].append(run(work))
        for setup, live in zip(setups, lives, strict=True):
            run(listen_and_write(setup, arguments.sockets, arguments.seconds, live))
    print(f"| requests a second · p50 / p99 in ms | {' | '.join(it.side.name for it in setups)} |")
    print("|---|" + "--:|" * len(setups))
    for kind in KINDS:
        label = kind.replace("100 users", f"{arguments.users} users")
        print(f"| {label} | {' | '.join(cell(rates[kind, it.side.name]) for it in setups)} |")
    late = [f"{quantiles(live.times)} / {max(live.times):.0f}" for live in lives]
    print(f"| a change's way to a socket, p50 / p99 / max in ms | {' | '.join(late)} |")
    wrong = [f"{live.lost}, {live.surplus}, {live.disordered}" for live in lives]
    print(f"| changes lost, surplus; sockets disordered | {' | '.join(wrong)} |")
    busiest = max(rate.client_share for rounds in rates.values() for rate in rounds)
    print(f"\nThe client was busy for {busiest:.0%} of the time at most.")
    return not any(live.lost or live.surplus or live.disordered for live in lives)


def main() -> None:
    """Parse the command line, and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--users", type=int, default=20, help="of the mix")
    parser.add_argument("--sockets", type=int, default=100)
    parser.add_argument("--together", action="store_true", help="all share all cores")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end what was started
    os.environ["PATH"] += f"{os.pathsep}/usr/sbin"  # where Debian has nginx, and users do not look
    if arguments.together:
        Process.cores = CORES
    with contextlib.ExitStack() as stack:
        right = measure(start_all(stack, arguments), arguments)
    if not right:
        sys.exit("FAILED")


if __name__ == "__main__":
    main()

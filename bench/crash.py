"""Kill the server in the middle of writing, start it again, and look for what it had acknowledged.

Run    .venv/bin/python bench/crash.py --rounds 100
Exit   0 when no task was lost and SQLite finds its file in order after every kill, 1 otherwise
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import sqlite3
import sys
import tempfile
from pathlib import Path

from client import connect, run, wanted
from server import Server, start_app

Titles = dict[int, str]


async def write(port: int, token: str, name: str, acknowledged: Titles) -> None:
    """Create tasks until the server is gone; note each one whose 201 has arrived."""
    connection = await connect(port)
    with contextlib.suppress(ConnectionError):
        for number in itertools.count(1):
            title = f"{name}, task {number}"
            creation = wanted("POST", "/api/v1/tasks", token, {"title": title}, 201)
            answer = await connection.ask(creation)
            acknowledged[json.loads(answer.body)["id"]] = title


async def write_until_killed(server: Server, token: str, name: str, writers: int) -> Titles:
    """Several writers, then SIGKILL at any moment of the first second. Returns what they know."""
    acknowledged: Titles = {}
    async with asyncio.TaskGroup() as group:
        for writer in range(writers):
            title = f"{name}, writer {writer}"
            group.create_task(write(server.port, token, title, acknowledged))
        await asyncio.sleep(random.uniform(0.1, 1))
        server.close()
    return acknowledged


def surviving(server: Server, token: str) -> Titles:
    """Every task that the server hands out, by delta sync from 0."""
    titles: Titles = {}
    since = 0
    has_more = True
    while has_more:
        path = f"/api/v1/tasks/changes?since={since}&limit=1000"
        page = server.call("GET", path, token=token)
        titles |= {task["id"]: task["title"] for task in page["data"]}
        since = page["next_since"]
        has_more = page["has_more"]
    return titles


def intact(data_dir: Path) -> bool:
    """Whether SQLite finds its file in order."""
    with contextlib.closing(sqlite3.connect(data_dir / "tasks.db")) as db:
        return bool(db.execute("PRAGMA integrity_check").fetchone() == ("ok",))


def kill_and_look(data_dir: Path, rounds: int, writers: int) -> bool:
    """All rounds on one directory, each on top of the last. Whether all was well."""
    with contextlib.closing(start_app(data_dir)) as server:
        token = server.register("writer")
    acknowledged: Titles = {}
    healthy = True
    for number in range(1, rounds + 1):
        with contextlib.closing(start_app(data_dir)) as server:
            written = run(write_until_killed(server, token, f"round {number}", writers))
        acknowledged |= written
        with contextlib.closing(start_app(data_dir)) as server:
            found = surviving(server, token)
        missing = acknowledged.items() - found.items()
        in_order = intact(data_dir)
        healthy = healthy and bool(written) and not missing and in_order
        print(
            f"round {number}: {len(written)} acknowledged, of {len(acknowledged)} in all"
            f" {len(missing)} missing, integrity {'ok' if in_order else 'LOST'}",
            flush=True,
        )
    return healthy


def main() -> int:
    """Parse the command line and run the rounds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--writers", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        healthy = kill_and_look(Path(directory), arguments.rounds, arguments.writers)
    print("nothing acknowledged was lost" if healthy else "FAILED")
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())

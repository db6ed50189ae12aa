"""Kill the server in the middle of writing, start it again, and look for every task that it had acknowledged.

Run    .venv/bin/python bench/crash.py --rounds 10 --writers 8
Exit   0 when nothing is missing, 1 otherwise
"""

import argparse
import contextlib
import http.client
import random
import sqlite3
import sys
import tempfile
import threading
import time
from pathlib import Path

from server import Server, call, running

Acknowledged = dict[int, str]


def write(server: Server, token: str, writer: str, acknowledged: Acknowledged) -> None:
    """Create tasks until the server is gone; note each one whose 201 has arrived whole."""
    number = 0
    with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(server.connect()) as connection:
        while True:
            number += 1
            title = f"{writer}, task {number}"
            status, task = call(connection, "POST", "/api/v1/tasks", {"title": title}, token)
            if status != 201:
                raise RuntimeError(f"creating a task answered {status}")
            acknowledged[task["id"]] = title


def write_until_killed(data_dir: str, round_number: int, writers: int, seconds: float) -> Acknowledged:
    """One round: several writers, then SIGKILL. Returns what was acknowledged."""
    acknowledged: Acknowledged = {}
    with running(data_dir) as server:
        token = server.log_in()
        threads = [
            threading.Thread(
                target=write, args=(server, token, f"round {round_number}, writer {writer}", acknowledged), daemon=True
            )
            for writer in range(writers)
        ]
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        server.kill()
        for thread in threads:
            thread.join(30)
    return acknowledged


def surviving(data_dir: str) -> Acknowledged:
    """Every task that a restarted server hands out, by delta sync from 0."""
    found: Acknowledged = {}
    with running(data_dir) as server:
        token = server.log_in()
        since, has_more = 0, True
        while has_more:
            status, page = server.call("GET", f"/api/v1/tasks/changes?since={since}&limit=1000", token=token)
            if status != 200:
                raise RuntimeError(f"changes answered {status}")
            found |= {task["id"]: task["title"] for task in page["data"]}
            since, has_more = page["next_since"], page["has_more"]
    return found


def intact(data_dir: str) -> bool:
    """Whether SQLite finds its file in order."""
    with contextlib.closing(sqlite3.connect(Path(data_dir) / "tasks.db")) as connection:
        return connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def main() -> int:
    """Run the rounds on one data directory, each on top of what the last one left."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="the longest that a round writes")
    arguments = parser.parse_args()
    acknowledged: Acknowledged = {}
    healthy = True
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as data_dir:
        for number in range(1, arguments.rounds + 1):
            seconds = random.uniform(0.25, 1) * arguments.seconds
            written = write_until_killed(data_dir, number, arguments.writers, seconds)
            acknowledged |= written
            found = surviving(data_dir)
            missing = [task_id for task_id, title in acknowledged.items() if found.get(task_id) != title]
            healthy = healthy and bool(written) and not missing and intact(data_dir)
            print(
                f"round {number}: killed after {seconds:.2f} s, {len(written)} acknowledged, "
                f"{len(found)} of {len(acknowledged)} in all found, {len(missing)} missing",
                flush=True,
            )
    print("nothing acknowledged was lost" if healthy else "FAILED")
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())

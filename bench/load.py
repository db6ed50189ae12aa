"""Requests per second, beside PocketBase and beside a bare FastAPI route, in one sitting.

Run    .venv/bin/python bench/load.py --rounds 5 --seconds 4
Exit   0 when every answer had the status that it should have, 1 otherwise

The contenders share one core, one at a time; the client has another, and 32 connections. A round
measures each work on each contender in turn, so that a ratio compares neighbours; medians of the
rounds are printed. Rate limits are off. PocketBase commits with synchronous=NORMAL, as it comes,
and app.py with FULL. Where PocketBase cannot be installed, its columns stay empty.
"""

import argparse
import contextlib
import itertools
import random
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from client import Rate, Wanted, ask_once, drive, header, run, wanted
from contenders import (
    POCKETBASE,
    Contender,
    Onefile,
    PocketBase,
    User,
    install_pocketbase,
    start_pocketbase,
)
from server import Server, start_app, start_bare

TASKS = 100
FAR = datetime(2999, 1, 1, tzinfo=UTC)
WARM_UP_SECONDS = 0.5
BARE = "bare FastAPI"

AGAIN = "GET /tasks, 10 of 100, again"
UNCHANGED = "the same with If-None-Match, 304"
FRESH = "GET /tasks, never asked before"
ONE = "GET /tasks/{id}"
CREATE = "POST /tasks"
MIX = "100 users, 90 % reads, 10 % writes"
KINDS = (AGAIN, UNCHANGED, FRESH, ONE, CREATE, MIX)


class Side(NamedTuple):
    """A server, and an endless supply of requests of each kind that it knows."""

    name: str
    server: Server
    work: dict[str, Iterator[Wanted]]


Results = dict[tuple[str, str], list[float]]


def never_asked(contender: Contender, user: User) -> Iterator[Wanted]:
    """The newest ten that are due until a moment, another one each time, and later than all."""
    for number in itertools.count(1):
        moment = FAR + timedelta(milliseconds=number)
        yield contender.list(user, contender.newest_ten_until.format(moment))


def mixed(contender: Contender, users: list[User]) -> Iterator[Wanted]:
    """Of twenty requests nine lists, nine single tasks, an update and a new task, of anybody."""
    dice = random.Random(1)
    for number in itertools.count():
        user = dice.choice(users)
        task_id = dice.choice(user.task_ids)
        kind = dice.randrange(20)
        if kind < 9:
            yield contender.list(user, contender.newest_ten)
        elif kind < 18:
            yield contender.one(user, task_id)
        elif kind < 19:
            yield contender.update(user, task_id)
        else:
            yield contender.create(user, number)


def fill(contender: Onefile | PocketBase, users: list[User]) -> None:
    """Give everybody their tasks, and see that lists find them. Errors: RuntimeError."""
    numbers = range(TASKS)
    creations = (contender.create(user, number) for number in numbers for user in users)
    run(drive(contender.server.port, creations, seconds=600))
    for user in users:
        task_ids, _ = contender.found(user, contender.newest_hundred)
        user.task_ids.extend(task_ids)
    for query in (contender.newest_ten, contender.newest_ten_until.format(FAR)):
        task_ids, total = contender.found(users[0], query)
        if len(task_ids) != 10 or total != TASKS:
            raise RuntimeError(f"{contender.name} lists {len(task_ids)} of {total} tasks")


def prepared(contender: Onefile | PocketBase, mixing: int) -> Side:
    """Filled, and ready to be asked: one user reads, one creates, the others do both."""
    users = [contender.sign_up(number) for number in range(mixing + 2)]
    fill(contender, users)
    reader, creator, *others = users
    newest = contender.list(reader, contender.newest_ten)
    work = {
        AGAIN: itertools.repeat(newest),
        FRESH: never_asked(contender, reader),
        ONE: (contender.one(reader, task_id) for task_id in itertools.cycle(reader.task_ids)),
        CREATE: (contender.create(creator, number) for number in itertools.count()),
        MIX: mixed(contender, others),
    }
    tag = header(run(ask_once(contender.server.port, newest)).head, b"etag").decode()
    if tag:
        path = f"{contender.path}?{contender.newest_ten}"
        known = wanted("GET", path, reader.token, status=304, if_none_match=tag)
        work[UNCHANGED] = itertools.repeat(known)
    return Side(contender.name, contender.server, work)


def start(stack: contextlib.ExitStack, mixing: int) -> list[Side]:
    """Start those that can be had, and fill them; they end with the stack."""
    temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    folder = Path(stack.enter_context(temporary))
    bare = stack.enter_context(contextlib.closing(start_bare(folder)))
    constant = itertools.repeat(wanted("GET", "/"))
    sides = [Side(BARE, bare, dict.fromkeys(KINDS, constant))]
    app = stack.enter_context(contextlib.closing(start_app(folder / "app")))
    sides.append(prepared(Onefile(app), mixing))
    try:
        program = install_pocketbase()
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"PocketBase is missing, {POCKETBASE} could not be installed: {error}")
        return sides
    other = stack.enter_context(contextlib.closing(start_pocketbase(program, folder / "other")))
    sides.append(prepared(PocketBase(other), mixing))
    return sides


def measure(sides: list[Side], rounds: int, seconds: float) -> tuple[Results, float]:
    """The rates of each work on each side, round after round; how busy the client was at most."""
    pairs = [(kind, side) for kind in KINDS for side in sides if kind in side.work]
    for kind, side in pairs:
        run(drive(side.server.port, side.work[kind], WARM_UP_SECONDS))
    results: Results = {(kind, side.name): [] for kind, side in pairs}
    busiest = 0.0
    for _ in range(rounds):
        for kind, side in pairs:
            rate: Rate = run(drive(side.server.port, side.work[kind], seconds))
            results[kind, side.name].append(rate.per_second)
            busiest = max(busiest, rate.client_share)
    return results, busiest


def row(results: Results, kind: str) -> str:
    """A line of the table: medians, and the median of the ratios of each round."""
    ours = results[kind, Onefile.name]
    cells = [kind, f"{statistics.median(ours):,.0f}"]
    for name in (PocketBase.name, BARE):
        theirs = results.get((kind, name))
        if theirs:
            ratios = [own / other for own, other in zip(ours, theirs, strict=True)]
            cells += [f"{statistics.median(theirs):,.0f}", f"{statistics.median(ratios):.2f}"]
        else:
            cells += ["", ""]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Parse the command line, measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--users", type=int, default=100, help="of the mix")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        sides = start(stack, arguments.users)
        results, busiest = measure(sides, arguments.rounds, arguments.seconds)
        memory = [f"{side.name} {side.server.resident_mib():.0f} MiB" for side in sides]
    print(
        f"Requests per second, medians of {arguments.rounds} rounds of {arguments.seconds:g} s.\n"
    )
    print(f"| work | {Onefile.name} | {PocketBase.name} | ratio | {BARE} | ratio |")
    print("|---|--:|--:|--:|--:|--:|")
    for kind in KINDS:
        print(row(results, kind))
    print(f"\nResident memory afterwards: {', '.join(memory)}.")
    print(f"The client was busy for {busiest:.0%} of the time at most.")


if __name__ == "__main__":
    main()

"""Several processes of app.py: who talks to all of them, and who follows their streams."""

# ruff: noqa: S101

import contextlib
import itertools
import json
import statistics
import threading
import time
from collections import Counter
from typing import Any

import httpx
from conftest import PASSWORD, Server, eventually, good, report, together
from websockets.sync.client import connect

numbers = itertools.count(1)


class Person:
    """Somebody new, who has a client at each process."""

    def __init__(self, fleet: list[Server], name: str = "") -> None:
        self.name = name or f"person-{next(numbers)}"
        first = fleet[0].person(self.name)
        self.authorization = first.headers["Authorization"]
        others = [server.client(self.authorization) for server in fleet[1:]]
        self.at = [first, *others]
        self.id: int = good(first.get("/users/me"), 200).json()["id"]

    def tokens(self) -> dict[str, Any]:
        """Of another login."""
        login = {"username": self.name, "password": PASSWORD}
        return dict(good(self.at[0].post("/auth/login", json=login), 200).json())


class Follower:
    """Follows a person's stream in a thread: which seqs came when, and how it ended."""

    def __init__(self, server: Server, person: Person, kind: str, name: str = "") -> None:
        self.server = server
        self.client = server.client(person.authorization)
        self.name = name or f"follower-{next(numbers)}"
        self.seqs: list[int] = []
        self.times: dict[int, float] = {}
        self.open = False
        self.end: int | None = None
        follow = {"socket": self.follow_socket, "events": self.follow_events}[kind]
        threading.Thread(target=follow, daemon=True).start()
        eventually(lambda: self.open)

    def hear(self, text: str) -> None:
        """Note a change."""
        change = json.loads(text)
        if change["type"] != "hello":
            self.times[change["seq"]] = time.perf_counter()
            self.seqs.append(change["seq"])
        self.open = True

    def follow_socket(self) -> None:
        """By WebSocket, whose end is its close code."""
        url = f"ws://127.0.0.1:{self.server.port}/ws/tasks/{self.name}"
        headers = {"Authorization": self.client.headers["Authorization"]}
        with connect(url, additional_headers=headers, proxy=None) as peer:
            with contextlib.suppress(Exception):
                for text in peer:
                    self.hear(str(text))
            self.end = peer.close_code

    def follow_events(self) -> None:
        """By Server-Sent Events, whose end is 0."""
        with contextlib.suppress(httpx.HTTPError), self.client.stream("GET", "/tasks/events") as it:
            for line in it.iter_lines():
                self.open = True
                if line.startswith("data: "):
                    self.hear(line.removeprefix("data: "))
        self.end = 0


def followers(fleet: list[Server], person: Person) -> list[Follower]:
    """One of each kind at every process."""
    kinds = ("socket", "events")
    return [Follower(server, person, kind) for server in fleet for kind in kinds]


def create(client: httpx.Client, title: str = "x") -> int:
    """A task's version."""
    answer = good(client.post("/tasks", json={"title": title}), 201)
    return int(answer.json()["version"])


def synced(client: httpx.Client, since: int = 0, limit: int = 7) -> list[int]:
    """The versions that delta sync finds after a cursor."""
    versions: list[int] = []
    page: dict[str, Any] = {"next_since": since, "has_more": True}
    while page["has_more"]:
        query = {"since": page["next_since"], "limit": limit}
        page = good(client.get("/tasks/changes", params=query), 200).json()
        versions += [task["version"] for task in page["data"]]
    return versions


def busy(clients: list[httpx.Client]) -> int:
    """How many of 80 reads, by eight threads through these clients, were allowed."""

    def read(number: int) -> list[int]:
        client = clients[number % len(clients)]
        return [client.get("/users/me").status_code for _ in range(10)]

    statuses = Counter(status for answers in together(8, read) for status in answers)
    assert statuses.keys() <= {200, 429}
    return statuses[200]


def report_ms(what: str, times: list[float], limit: float) -> None:
    """Say it in the end. Only ten times the limit fails: the machine may be busy."""
    slowest = max(times) * 1000
    note = "" if slowest <= limit else "  OVER"
    middle = statistics.median(times) * 1000
    report(f"{what}: {slowest:.0f} ms at most, {middle:.1f} in the middle, {limit} allowed{note}")
    assert slowest <= 10 * limit

"""Redis and PostgreSQL fail, and come back, beside running processes of app.py."""

# ruff: noqa: D103, S101

import contextlib
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import services
from conftest import CHEAP_PASSWORDS, LIMITED, Server, eventually, good, report
from conftest import together as at_once
from fleet import Person, busy, create, followers, report_ms, synced

REDIS_MS = 100

# ── Redis ───────────────────────────────────────────────────────────────────────────────────────


class Proxy:
    """A way to a port that may be slow, or swallow all, or refuse."""

    def __init__(self, port: int) -> None:
        self.target = ("127.0.0.1", port)
        self.delay = 0.0
        self.flowing = threading.Event()
        self.peers: list[socket.socket] = []
        self.port = services.free_port()
        self.listen()

    def listen(self) -> None:
        """Let everything through."""
        self.delay = 0
        self.flowing.set()
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self.accept, args=[self.listener], daemon=True).start()

    def refuse(self) -> None:
        """Cut all, and take no more."""
        for each in (self.listener, *self.peers):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self.peers.clear()

    def accept(self, listener: socket.socket) -> None:
        """Take connections, until it refuses."""
        with contextlib.suppress(OSError):
            while True:
                pair = (listener.accept()[0], socket.create_connection(self.target))
                self.peers += pair
                for ends in (pair, pair[::-1]):
                    threading.Thread(target=self.carry, args=ends, daemon=True).start()

    def carry(self, source: socket.socket, target: socket.socket) -> None:
        """One direction of a connection."""
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                time.sleep(self.delay)
                self.flowing.wait()
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def notes_of_redis(server: Server) -> list[str]:
    """What the log says of it."""
    return re.findall(r"Redis (fails|is well)", server.log.read_text())


def test_redis_that_is_away_costs_no_change_and_one_line_each_way(limited, redis):
    before = [eventually(lambda it=it: notes_of_redis(it)) for it in limited]
    alice = Person(limited)
    bob = Person(limited)
    following = followers(limited, alice)
    over = threading.Event()
    eventually(lambda: busy(Person(limited).at) == 39)

    def write(number: int) -> int:
        count = 0
        while not over.wait(0.02):
            create(alice.at[number])
            count += 1
        return count

    with ThreadPoolExecutor() as pool:
        writing = [pool.submit(write, number) for number in (0, 1)]
        time.sleep(0.3)
        redis.stop()
        eventually(lambda: all(notes_of_redis(it)[-1] == "fails" for it in limited))
        assert [busy([client]) for client in bob.at] == [40, 40]  # Each counts for itself.
        began = time.perf_counter()
        redis.start()
        eventually(lambda: all(notes_of_redis(it)[-1] == "is well" for it in limited))
        report_ms("Redis is back, until it is used", [time.perf_counter() - began], 5000)
        time.sleep(0.5)
        over.set()
        total = sum(each.result() for each in writing)
    after = [notes_of_redis(server) for server in limited]
    assert after == [[*notes, "fails", "is well"] for notes in before]
    eventually(lambda: all(total in each.times for each in following))
    assert all(each.seqs == list(range(1, total + 1)) for each in following)
    eventually(lambda: busy(Person(limited).at) == 39)


@pytest.mark.parametrize("fault", ["refuses", "is slow", "swallows", "is stopped"])
def test_redis_that_fails_costs_a_tenth_of_a_second_once(start, limited, redis, fault):
    proxy = Proxy(redis.port)
    if fault == "refuses":
        proxy.refuse()
    url = limited[0].settings["DATABASE_URL"]
    there = f"redis://127.0.0.1:{proxy.port}"
    [server] = start(1, url, **LIMITED | {"REDIS_URL": there})
    if fault != "refuses":
        eventually(lambda: notes_of_redis(server) == ["is well"])
    alice = Person([server])
    match fault:
        case "is slow":
            proxy.delay = 0.03
        case "swallows":
            proxy.flowing.clear()
        case "is stopped":
            assert redis.process
            redis.process.send_signal(signal.SIGSTOP)
    times = []
    end = time.monotonic() + 4
    while time.monotonic() < end:
        began = time.perf_counter()
        assert alice.at[0].get("/users/me").status_code in (200, 429)
        times.append(time.perf_counter() - began)
        time.sleep(0.005)
    slow = sum(each * 1000 > REDIS_MS for each in times)
    report_ms(f"Redis {fault}: of {len(times)} requests {slow} took 100 ms", times, REDIS_MS + 50)
    if fault == "is stopped":
        assert redis.process
        redis.process.send_signal(signal.SIGCONT)
    if fault == "refuses":
        proxy.listen()
    proxy.delay = 0
    proxy.flowing.set()
    eventually(lambda: notes_of_redis(server)[-1] == "is well")
    assert notes_of_redis(server) in (["is well", "fails", "is well"], ["fails", "is well"])
    eventually(lambda: notes_of_redis(limited[0])[-1] == "is well")
    bob = Person([server, limited[0]])
    for client in bob.at * 10:
        answer = client.get("/users/me")
    assert answer.headers["X-RateLimit-Remaining"] == str(40 - 21)
    server.close()
    proxy.refuse()


# ── PostgreSQL that fails ───────────────────────────────────────────────────────────────────────


def test_postgresql_that_restarts_costs_some_503_and_no_stream(fleet, postgresql):
    alice = Person(fleet)
    following = followers(fleet[:2], alice)
    create(alice.at[0])
    over = threading.Event()

    def work(number: int) -> list[int]:
        versions = []
        while not over.wait(0.01):
            for method, path in [("POST", "/tasks"), ("GET", "/tasks"), ("GET", "/../../health")]:
                body = {"title": "x"} if method == "POST" else None
                answer = alice.at[number].request(method, path, json=body)
                if answer.status_code == 503:
                    assert answer.json()["error"]["code"] == "database_unavailable"
                    assert int(answer.headers["Retry-After"]) > 0
                    failed.append(number)
                elif method == "POST":
                    versions.append(good(answer, 201).json()["version"])
        return versions

    failed: list[int] = []
    with ThreadPoolExecutor() as pool:
        working = [pool.submit(work, number) for number in range(4)]
        for _ in range(2):
            time.sleep(0.3)
            postgresql.stop()
            time.sleep(0.5)
            postgresql.start()
        time.sleep(0.5)
        over.set()
        versions = sorted(sum([each.result() for each in working], [1]))
    assert set(failed) == {0, 1, 2, 3}
    last = create(alice.at[3])
    assert all(client.get("/tasks").status_code == 200 for client in alice.at)
    everything = synced(alice.at[0], 0, 500)
    assert everything == list(range(1, last + 1))
    assert set(versions) <= set(everything)  # One whose 201 was cut off may be there as well.
    eventually(lambda: all(last in each.times for each in following))
    assert all(each.seqs == everything for each in following)
    report(f"PostgreSQL restarted twice: {len(failed)} of the answers were 503")


def processes_of(postgresql: services.PostgreSQL) -> list[int]:
    """PostgreSQL's own, the first one first."""
    assert postgresql.process
    first = postgresql.process.pid
    children = Path(f"/proc/{first}/task/{first}/children").read_text()
    return [first, *map(int, children.split())]


def test_postgresql_that_says_nothing_makes_health_503_in_time(start, postgresql):
    [server] = start(1, postgresql.fresh("silent"), f"{CHEAP_PASSWORDS}; app.STATEMENT_SECONDS = 2")
    alice = Person([server])
    ask = ["/../../health"] * 20 + ["/tasks?search=x"] * 4
    times = []

    def get(number: int) -> int:
        with server.client(alice.authorization) as client:
            began = time.perf_counter()
            answer = client.get(ask[number])
            times.append(time.perf_counter() - began)
            return answer.status_code

    for process in processes_of(postgresql):
        os.kill(process, signal.SIGSTOP)
    try:
        statuses = at_once(len(ask), get)
    finally:
        for process in processes_of(postgresql):
            os.kill(process, signal.SIGCONT)
    assert set(statuses) == {503}
    report_ms("PostgreSQL says nothing, a statement has 2 s: 503", times, 6000)
    began = time.perf_counter()
    eventually(lambda: server.client().get("/../../health").status_code == 200)
    report_ms("PostgreSQL speaks again, until health is 200", [time.perf_counter() - began], 1000)
    create(alice.at[0])
    server.close()

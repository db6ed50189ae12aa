"""Several processes of app.py on one PostgreSQL and one Redis: orders, races, limits, starts.

bench/services.py says what has to be installed.
"""

# ruff: noqa: D103, S101, S603, S608

import contextlib
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import services
from conftest import (
    CHEAP_PASSWORDS,
    PASSWORD,
    ROOT,
    SECRET,
    Server,
    Starts,
    eventually,
    good,
    report,
)
from conftest import together as at_once
from fleet import Follower, Person, busy, create, followers, report_ms, synced

LIVE_MS = 100
END_SECONDS = 5


class Transaction:
    """A transaction of psql, open until `end`."""

    def __init__(self, postgresql: services.PostgreSQL, *statements: str) -> None:
        command = [services.program("psql"), "-X", "-q", "-A", "-t", postgresql.url("fleet")]
        pipe = subprocess.PIPE
        self.psql = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.say("BEGIN", *statements)

    def say(self, *statements: str) -> None:
        """Run these."""
        assert self.psql.stdin
        assert self.psql.stdout
        self.psql.stdin.write("".join(f"{each};\n" for each in statements) + "\\echo done\n")
        self.psql.stdin.flush()
        while self.psql.stdout.readline() != "done\n":
            assert self.psql.poll() is None

    def end(self) -> None:
        """Commit."""
        self.say("COMMIT")
        self.psql.communicate(timeout=5)


def waiters(postgresql: services.PostgreSQL) -> int:
    """How many statements wait for a lock."""
    sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    return int(postgresql.sql(sql))


# ── One order per user, in all processes ────────────────────────────────────────────────────────


def test_a_change_that_commits_late_is_skipped_by_nobody(fleet, postgresql):
    alice = Person(fleet)
    for title in "ab":
        create(alice.at[0], title)
    late = Transaction(
        postgresql,
        f"UPDATE users SET seq = seq + 1 WHERE id = {alice.id}",
        f"UPDATE tasks SET title = 'late', version = 3 WHERE owner_id = {alice.id} AND version = 1",
    )
    following = followers(fleet, alice)
    over = threading.Event()

    def poll(number: int) -> list[int]:
        seen: list[int] = []
        since = 2
        while not over.is_set() or since < 4:
            seen += synced(alice.at[number], since)
            since = max([since, *seen])
        return seen

    with ThreadPoolExecutor() as pool:
        polls = [pool.submit(poll, number) for number in (0, 1)]
        writing = pool.submit(create, alice.at[1])
        eventually(lambda: waiters(postgresql))
        time.sleep(0.3)
        assert synced(alice.at[2]) == [1, 2]
        assert not writing.done()
        late.end()
        assert writing.result() == 4
        over.set()
        assert [each.result() for each in polls] == [[3, 4]] * 2
    eventually(lambda: all(len(each.seqs) == 2 for each in following))
    assert [each.seqs for each in following] == [[3, 4]] * len(following)


def test_writers_in_four_processes_make_one_order_that_all_streams_and_syncs_see(fleet):
    alice = Person(fleet)
    following = followers(fleet, alice)
    over = threading.Event()

    def poll() -> list[int]:
        seen: list[int] = []
        while not over.is_set():
            seen += synced(alice.at[3], seen[-1] if seen else 0)
        return seen + synced(alice.at[3], seen[-1])

    def write(number: int) -> list[int]:
        with fleet[number % 4].client(alice.authorization) as client:
            return [create(client) for _ in range(15)]

    with ThreadPoolExecutor(1) as pool:
        polled = pool.submit(poll)
        began = time.perf_counter()
        versions = [version for made in at_once(12, write) for version in made]
        seconds = time.perf_counter() - began
        over.set()
    everything = list(range(1, 181))
    report(f"12 writers of one user in 4 processes: {180 / seconds:.0f} tasks a second")
    assert sorted(versions) == everything
    assert polled.result() == everything
    assert synced(alice.at[0], 0, 50) == everything
    eventually(lambda: all(180 in each.times for each in following))
    assert [each.seqs for each in following] == [everything] * len(following)


def test_every_process_hears_of_a_change_within_100_ms(fleet):
    alice = Person(fleet)
    following = followers(fleet, alice)
    sent = {}
    for number in range(40):
        began = time.perf_counter()
        sent[create(alice.at[number % 4])] = began
        time.sleep(0.02)
    eventually(lambda: all(len(each.times) == 40 for each in following))
    assert all(each.seqs == list(range(1, 41)) for each in following)
    times = [each.times[seq] - sent[seq] for each in following for seq in sent]
    report_ms("From a request to the streams of four processes", times, LIVE_MS)


def test_an_end_in_one_process_ends_requests_and_streams_in_another(fleet):
    admin = Person(fleet, "admin").at[1]
    ends: dict[str, Callable[[Person], httpx.Response]] = {
        "logout": lambda one: one.at[1].post("/auth/logout"),
        "disabled": lambda one: admin.patch(f"/admin/users/{one.id}", json={"is_active": False}),
        "deleted": lambda one: admin.delete(f"/admin/users/{one.id}"),
        "left": lambda one: one.at[1].delete("/users/me"),
        "reset": lambda one: admin.patch(f"/admin/users/{one.id}", json={"password": PASSWORD}),
    }
    following = []
    for end in ends.values():
        person = Person(fleet)
        following += [Follower(fleet[0], person, kind) for kind in ("socket", "events")]
        assert end(person).is_success
        good(person.at[0].get("/tasks"), 401)
        good(person.at[0].post("/tasks", json={"title": "x"}), 401)
    began = time.perf_counter()
    eventually(lambda: all(each.end is not None for each in following))
    times = [time.perf_counter() - began]
    report_ms("An end in another process, until the streams ended", times, END_SECONDS * 1000)
    assert [each.end for each in following] == [4401, 0] * len(ends)


def test_who_is_no_admin_any_more_is_none_in_all_processes_at_once(fleet):
    admin = Person(fleet, "admin")
    other = Person(fleet)
    for role, status in [("admin", 200), ("user", 403)] * 5:
        good(admin.at[1].patch(f"/admin/users/{other.id}", json={"role": role}), 200)
        for client in other.at:
            good(client.get("/admin/users"), status)


def test_a_client_id_at_another_process_replaces_the_first(fleet):
    alice = Person(fleet)
    first = Follower(fleet[0], alice, "socket", "laptop")
    second = Follower(fleet[1], alice, "socket", "laptop")
    assert eventually(lambda: first.end) == 4409
    create(alice.at[2])
    eventually(lambda: second.seqs == [1])
    assert second.end is None


# ── Races between processes ─────────────────────────────────────────────────────────────────────


def test_of_what_races_through_four_processes_exactly_one_wins(fleet):
    alice = Person(fleet)
    task = good(alice.at[0].post("/tasks", json={"title": "x"}), 201).json()
    path = f"/tasks/{task['id']}"
    body = {"title": "once"}
    for number in range(10):
        header = {"Idempotency-Key": f"key-{number}"}
        made = at_once(4, lambda n, h=header: alice.at[n].post("/tasks", json=body, headers=h))
        assert sorted(each.status_code for each in made) == [200, 200, 200, 201]
        assert len({each.json()["id"] for each in made}) == 1

        match = {"If-Match": alice.at[0].get(path).headers["ETag"]}
        patch = {"description": f"{number}"}
        made = at_once(4, lambda n, h=match, b=patch: alice.at[n].patch(path, json=b, headers=h))
        assert sorted(each.status_code for each in made) == [200, 412, 412, 412]

        token = {"refresh_token": alice.tokens()["refresh_token"]}
        made = at_once(4, lambda n, t=token: alice.at[n].post("/auth/refresh", json=t))
        assert sorted(each.status_code for each in made) == [200, 401, 401, 401]
        again = {"refresh_token": min(made, key=lambda it: it.status_code).json()["refresh_token"]}
        good(alice.at[3].post("/auth/refresh", json=again), 200)  # The racing tabs were no thieves.

        account = {"username": f"racer-{number}", "password": PASSWORD}
        made = at_once(4, lambda n, a=account: alice.at[n].post("/auth/register", json=a))
        assert sorted(each.status_code for each in made) == [201, 409, 409, 409]


def test_of_a_refresh_and_a_logout_in_two_processes_nothing_survives(fleet):
    alice = Person(fleet)
    for _ in range(20):
        tokens = alice.tokens()
        access = {"Authorization": f"Bearer {tokens['access_token']}"}
        refresh = {"refresh_token": tokens["refresh_token"]}

        def act(number: int, access: Any = access, refresh: Any = refresh) -> Any:
            if number:
                return alice.at[1].post("/auth/logout", headers=access)
            return alice.at[0].post("/auth/refresh", json=refresh)

        refreshed, left = at_once(2, act)
        good(left, 204)
        good(alice.at[2].get("/tasks", headers=access), 401)
        if refreshed.is_success:
            again = {"refresh_token": refreshed.json()["refresh_token"]}
            good(alice.at[2].post("/auth/refresh", json=again), 401)


def test_who_waits_in_line_while_they_are_logged_out_writes_nothing(fleet, postgresql):
    alice = Person(fleet)
    create(alice.at[0])
    lock = Transaction(postgresql, f"UPDATE users SET seq = seq WHERE id = {alice.id}")
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(alice.at[0].post, "/tasks", json={"title": "late"})
        eventually(lambda: waiters(postgresql))
        good(alice.at[1].post("/auth/logout"), 204)
        lock.end()
        good(writing.result(), 401)


def test_purges_that_race_with_restores_keep_storage_and_sync_right(fleet, postgresql):
    alice = Person(fleet)
    file = {"file": ("a.txt", b"x" * 1000)}
    for number in range(12):
        task = good(alice.at[0].post("/tasks", json={"title": f"task {number}"}), 201).json()
        path = f"/tasks/{task['id']}"
        good(alice.at[0].post(f"{path}/attachments", files=file), 201)
        good(alice.at[0].delete(path), 204)

        def act(number: int, path: str = path) -> int:
            if number == 0:
                return alice.at[0].post(f"{path}/restore").status_code
            if number == 1:
                return alice.at[1].patch(path, json={"title": "changed"}).status_code
            return alice.at[number].delete("/tasks/trash").status_code

        restored, patched, *purged = at_once(4, act)
        assert restored in (200, 404)
        assert patched in (200, 404)
        assert purged == [204, 204]
        kept = alice.at[0].get(path).status_code
        assert kept == (200 if restored == 200 else 404)
    counted, summed = postgresql.sql(
        f"""SELECT storage_bytes, (SELECT coalesce(sum(text_bytes), 0) FROM tasks
        WHERE owner_id = {alice.id}) + (SELECT coalesce(sum(size_bytes), 0) FROM attachments
        JOIN tasks ON tasks.id = task_id WHERE owner_id = {alice.id})
        FROM users WHERE id = {alice.id}""",
        "fleet",
    ).split("|")
    assert counted == summed


def test_two_admins_who_change_one_user_lose_nothing(fleet):
    admin = Person(fleet, "admin")
    other = Person(fleet)
    path = f"/admin/users/{other.id}"
    for number in range(20):
        changes = [{"role": ["admin", "user"][number % 2]}, {"is_active": bool(number % 3)}]
        answers = at_once(2, lambda n, c=changes: admin.at[n].patch(path, json=c[n]))
        assert [each.status_code for each in answers] == [200, 200]
        user = admin.at[2].get(path).json()
        assert {"role": user["role"], "is_active": user["is_active"]} == changes[0] | changes[1]


def test_of_the_last_two_admins_who_demote_each_other_one_stays(fleet):
    pair = [Person(fleet, "admin"), Person(fleet)]
    for _ in range(10):
        chief, *_ = [one for one in pair if one.at[0].get("/admin/users").status_code == 200]
        for one in pair:
            good(chief.at[0].patch(f"/admin/users/{one.id}", json={"role": "admin"}), 200)

        def demote(number: int) -> int:
            victim = pair[1 - number].id
            path = f"/admin/users/{victim}"
            return pair[number].at[number].patch(path, json={"role": "user"}).status_code

        statuses = at_once(2, demote)
        assert sorted(statuses) in ([200, 403], [200, 409]), statuses
    users = [one for one in pair if one.at[0].get("/admin/users").status_code == 200]
    good(users[0].at[0].patch(f"/admin/users/{pair[0].id}", json={"role": "admin"}), 200)


def test_chores_of_four_processes_at_once_do_not_get_in_each_others_way(start, postgresql):
    change = f"{CHEAP_PASSWORDS}; app.CLEANUP_SECONDS = 0.05; app.USE_SECONDS = 0.02"
    servers = start(4, postgresql.fresh("chores"), change, TRASH_DAYS="0")
    people = [Person(servers) for _ in range(4)]

    def act(number: int) -> None:
        for _ in range(20):
            mine = people[number].at
            path = f"/tasks/{good(mine[0].post('/tasks', json={'title': 'x'}), 201).json()['id']}"
            good(mine[1].delete(path), 204)
            assert mine[2].post(f"{path}/restore").status_code in (200, 404)
            for one in people:
                good(one.at[number].get("/auth/sessions"), 200)

    at_once(4, act)
    sums = """SELECT count(*) FROM users WHERE storage_bytes <>
        (SELECT coalesce(sum(text_bytes), 0) FROM tasks WHERE owner_id = users.id)"""
    assert postgresql.sql(sums, "chores") == "0"
    assert not any(" failed" in server.log.read_text() for server in servers)


# ── Rate limits ─────────────────────────────────────────────────────────────────────────────────


def remaining(clients: list[httpx.Client]) -> list[int]:
    """What answers say that is left, and it is."""
    figures = []
    while (answer := clients[len(figures) % 2].get("/tasks")).status_code == 200:
        assert answer.headers["X-RateLimit-Limit"] == "40"
        assert 0 < int(answer.headers["X-RateLimit-Reset"]) - time.time() < 61
        figures.append(int(answer.headers["X-RateLimit-Remaining"]))
    for client in clients:
        answer = good(client.get("/tasks"), 429)
        assert answer.headers["X-RateLimit-Remaining"] == "0"
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
    return figures


def test_two_processes_exhaust_one_window(limited):
    # Who has read once. A count that takes 100 ms is one of this process alone: then once more.
    eventually(lambda: remaining(Person(limited).at) == list(range(38, -1, -1)))
    eventually(lambda: busy(Person(limited).at) == 39)

    def guess(number: int) -> int:
        body = {"username": "nobody", "password": "x"}
        headers = {"X-Forwarded-For": "2001:db8::1"}
        with limited[number % 2].client(headers=headers) as client:
            return client.post("/auth/login", json=body).status_code

    assert Counter(at_once(10, guess)) == {401: 6, 429: 4}


# ── Start ───────────────────────────────────────────────────────────────────────────────────────


def test_processes_that_start_at_once_on_an_empty_database_make_it_once(start, postgresql):
    servers = start(4, postgresql.fresh("empty"))
    admin = Person(servers, "admin")
    assert all(client.get("/admin/users").json()["meta"]["total"] == 1 for client in admin.at)
    assert postgresql.sql("SELECT version FROM schema_version", "empty") == "1"
    assert sum("  Admin " in server.log.read_text() for server in servers) == 1
    for server in servers:
        server.close()


def refusal(start: Starts, url: str) -> str:
    """The one line with which a start stops."""
    with pytest.raises(AssertionError) as refused:
        start(1, url)
    banner, line = str(refused.value).splitlines()[:2]
    assert banner.startswith("Onefile Tasks")
    return line


def test_missing_tables_and_indexes_are_created_once_and_all_else_is_left_alone(start, postgresql):
    url = postgresql.fresh("earlier")
    [server] = start(1, url)
    alice = Person([server])
    create(alice.at[0], "kept")
    server.close()
    for statement in (
        "DROP INDEX ix_tasks_list",
        "DROP TABLE attachments",
        "CREATE TABLE foreign_table (id int)",
        "ALTER TABLE users ADD COLUMN foreign_column text DEFAULT 'kept'",
        "CREATE INDEX foreign_index ON users (foreign_column)",
        "UPDATE schema_version SET version = 0",
    ):
        postgresql.sql(statement, "earlier")
    servers = start(3, url)
    for server in servers:
        with server.client(alice.authorization) as client:
            key = {"Idempotency-Key": "one"}
            body = {"title": "new"}
            assert client.post("/tasks", json=body, headers=key).status_code in (200, 201)
            page = good(client.get("/tasks"), 200).json()
            assert [task["title"] for task in page["data"]] == ["new", "kept"]
            path = f"/tasks/{page['data'][0]['id']}/attachments"
            good(client.post(path, files={"file": ("a.txt", b"x")}), 201)
        server.close()
    indexes = postgresql.sql("SELECT indexname FROM pg_indexes", "earlier").split()
    assert {"ix_tasks_list", "ix_tasks_key", "foreign_index"} <= set(indexes)
    assert postgresql.sql("SELECT DISTINCT foreign_column FROM users", "earlier") == "kept"
    assert postgresql.sql("SELECT count(*) FROM foreign_table", "earlier") == "0"


def test_a_start_stops_with_a_line_at_a_newer_or_absent_database(start, postgresql):
    url = postgresql.fresh("unfit")
    start(1, url)[0].close()
    postgresql.sql("UPDATE schema_version SET version = 99", "unfit")
    assert "99, newer than this program" in refusal(start, url)
    assert "DATABASE_URL" in refusal(start, f"postgresql://127.0.0.1:{services.free_port()}/none")


class Workers(Server):
    """`uvicorn app:app --workers 4`, with the flags of deploy/README.md."""

    def start(self, command: list[str], settings: dict[str, str]) -> None:
        """Run it in place of `python app.py`."""
        page = (ROOT / "deploy" / "README.md").read_text().replace("\\\n", "")
        found = re.search(r"uvicorn (app:app --workers 4 .*)", page)
        assert found
        self.port = services.free_port()
        command = [sys.executable, "-m", "uvicorn", *found[1].split(), "--port", str(self.port)]
        super().start(command, settings)
        self.stack.callback(self.process.wait, 30)
        self.stack.callback(self.process.terminate)

    def listening(self) -> re.Match[str] | None:
        """When all four are there."""
        log = self.log.read_text()
        assert self.process.poll() is None, log
        ready = log.count("Application startup complete") == 4
        return re.match(r"(.*:(\d+))", f"http://127.0.0.1:{self.port}") if ready else None


def test_uvicorns_own_workers_deliver_each_others_changes(redis, postgresql, tmp_path):
    given = {"DATABASE_URL": postgresql.fresh("workers"), "REDIS_URL": redis.url, **SECRET}
    with contextlib.closing(Workers(tmp_path, "", given)) as workers:
        alice = Person([workers])
        kinds = ["socket", "events"] * 6
        following = [Follower(workers, alice, kind) for kind in kinds]

        def write(_number: int) -> None:
            for _ in range(5):
                with workers.client(alice.authorization) as client:  # Each at another worker.
                    create(client)

        at_once(4, write)
        eventually(lambda: all(20 in each.times for each in following))
        assert all(each.seqs == list(range(1, 21)) for each in following)
        assert not re.search(r"Traceback| 500 \d", workers.log.read_text())
        for each in following:
            each.client.close()

"""What happens to somebody's rights while their request is under way."""

# ruff: noqa: D103, S101

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from conftest import CHEAP_PASSWORDS, PASSWORD, Server, good, together

SLOW_PASSWORDS = "app.BCRYPT_COST = 14"
"""A comparison takes a second, so that something can happen meanwhile."""
ALICE = {"username": "alice", "password": PASSWORD}
MEANWHILE = {
    "disabled": "UPDATE users SET is_active = FALSE WHERE username = 'alice'",
    "another password": "UPDATE users SET password_hash = 'x' WHERE username = 'alice'",
    "deleted": "DELETE FROM users WHERE username = 'alice'",
}


def run_sql(server: Server, *statements: str) -> list[list[Any]]:
    """The rows of each, by a connection of our own."""
    path = server.folder / "data" / "tasks.db"
    with contextlib.closing(sqlite3.connect(path, timeout=20, isolation_level=None)) as db:
        db.execute("PRAGMA foreign_keys=ON")
        return [db.execute(statement).fetchall() for statement in statements]


def state(server: Server) -> list[list[Any]]:
    """Accounts and logins."""
    return run_sql(server, "SELECT * FROM users ORDER BY id", "SELECT * FROM sessions ORDER BY id")


def test_who_reads_waits_for_no_writer(serve):
    server = serve(f"{CHEAP_PASSWORDS}; app.USE_SECONDS = -1")  # Each request notes its use.
    alice = server.person("alice")
    path = server.folder / "data" / "tasks.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        good(alice.get("/tasks"), 200)
        assert time.monotonic() - began < 5  # The database itself would wait for 10 s.
    good(alice.post("/tasks", json={"title": "x"}), 201)


@pytest.mark.parametrize("change", MEANWHILE)
def test_who_logs_in_is_nobody_if_the_account_changes_while_bcrypt_compares(serve, change):
    server = serve(SLOW_PASSWORDS)
    server.person("alice")
    client = server.client()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/auth/login", json=ALICE)
        time.sleep(0.3)
        assert not answer.done()
        run_sql(server, MEANWHILE[change])
        before = state(server)
        assert answer.result().status_code in (401, 403)
    assert state(server) == before


def test_a_reset_password_holds_if_its_user_changes_theirs_meanwhile(serve):
    server = serve(SLOW_PASSWORDS)
    alice = server.person("alice")
    with ThreadPoolExecutor(1) as pool:
        change = {"password": f"{PASSWORD}!", "current_password": PASSWORD}
        answer = pool.submit(alice.patch, "/users/me", json=change)
        time.sleep(0.3)
        assert not answer.done()
        reset = "UPDATE users SET password_hash = 'reset' WHERE username = 'alice'"
        run_sql(server, reset, "DELETE FROM sessions")
        good(answer.result(), 401)
    sql = "SELECT password_hash FROM users WHERE username = 'alice'"
    assert run_sql(server, sql) == [[("reset",)]]


def test_whoever_logs_out_while_their_file_arrives_is_nobody(server):
    alice = server.person("alice")
    task = good(alice.post("/tasks", json={"title": "Files"}), 201).json()
    path = f"/tasks/{task['id']}/attachments"

    def form() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
        time.sleep(0.3)
        leaver = server.client(alice.headers["Authorization"])
        good(leaver.post("/auth/logout"), 204)
        yield b"x\r\n--x--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    good(alice.post(path, content=form(), headers=headers), 401)
    assert run_sql(server, "SELECT count(*) FROM attachments") == [[(0,)]]


def test_of_a_refresh_and_a_logout_at_once_nothing_survives(serve):
    server = serve(CHEAP_PASSWORDS)
    server.person("alice")
    client = server.client()
    other = server.client()
    for _ in range(30):
        tokens = good(client.post("/auth/login", json=ALICE), 200).json()
        access = {"Authorization": f"Bearer {tokens['access_token']}"}
        refresh = {"refresh_token": tokens["refresh_token"]}

        def act(number: int, access: Any = access, refresh: Any = refresh) -> Any:
            if number:
                return other.post("/auth/logout", headers=access)
            return client.post("/auth/refresh", json=refresh)

        refreshed, left = together(2, act)
        good(left, 204)
        assert refreshed.status_code in (200, 401)
        for answer in [tokens, *([refreshed.json()] if refreshed.is_success else [])]:
            access = {"Authorization": f"Bearer {answer['access_token']}"}
            good(client.get("/tasks", headers=access), 401)
            again = {"refresh_token": answer["refresh_token"]}
            good(client.post("/auth/refresh", json=again), 401)


def test_a_token_that_expires_at_once_is_refused_or_answered_as_itself(server):
    alice = server.person("alice")
    for number in range(60):
        end = datetime.now(UTC) + timedelta(milliseconds=number / 4)
        body = {"name": f"token {number}", "scope": "read", "expires_at": end.isoformat()}
        answer = alice.post("/auth/api_tokens", json=body)
        assert answer.status_code in (201, 422), answer.text
        if answer.status_code == 201:
            assert answer.json()["name"] == body["name"]

"""Promises that a survey of mutations found without a test: a line changed, and nothing failed."""

# ruff: noqa: D103, S101, S603, S608

import contextlib
import http.server
import json
import sqlite3
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import httpx
from conftest import CHEAP_PASSWORDS, DEADLINE, PASSWORD, Server, eventually, good

SILENT = "app.Broadcaster.announce = lambda *_: app.asyncio.sleep(0)"
"""No bell rings: streams only look, every LOOK_SECONDS."""
ALICE = {"username": "alice", "password": PASSWORD}


def run_sql(server: Server, sql: str) -> list[Any]:
    """The rows, by a connection of our own."""
    path = server.folder / "data" / "tasks.db"
    with contextlib.closing(sqlite3.connect(path, timeout=20, isolation_level=None)) as db:
        return db.execute(sql).fetchall()


def events(person: httpx.Client, **query: int) -> Iterator[dict[str, str]]:
    """Server-Sent Events as they come: their fields."""
    deadline = time.monotonic() + DEADLINE
    with person.stream("GET", "/tasks/events", params=query) as answer:
        assert answer.status_code == 200
        fields: dict[str, str] = {}
        for line in answer.iter_lines():
            assert time.monotonic() < deadline, "it never came"  # A comment comes every 15 s.
            name, _, value = line.partition(": ")
            if name:
                fields[name] = value
            elif "data" in fields:
                yield fields
                fields = {}


def create(person: httpx.Client, **more: Any) -> dict[str, Any]:
    """A task."""
    answer = good(person.post("/tasks", json={"title": "Buy milk", **more}), 201)
    return dict(answer.json())


def storage_is_exact(server: Server) -> bool:
    """Whether what is counted is what is there."""
    [(counted, there)] = run_sql(
        server,
        "SELECT sum(storage_bytes), (SELECT coalesce(sum(text_bytes), 0) FROM tasks)"
        " + (SELECT coalesce(sum(size_bytes), 0) FROM attachments) FROM users",
    )
    return bool(counted == there)


def test_an_idempotency_key_is_its_owners(server):
    key = {"Idempotency-Key": "the-same"}
    people = [server.person(name) for name in ("alice", "bob")]
    sent: Any = {"json": {"title": "x"}, "headers": key}
    made = [good(each.post("/tasks", **sent), 201).json() for each in people]
    again = [good(each.post("/tasks", **sent), 200).json() for each in people]
    assert made == again
    assert made[0]["owner_id"] != made[1]["owner_id"]


def test_an_api_tokens_route_ends_no_login(server):
    alice = server.person("alice")
    [session] = alice.get("/auth/sessions").json()["data"]
    good(alice.delete(f"/auth/api_tokens/{session['id']}"), 404)
    good(alice.get("/tasks"), 200)


def test_somebody_elses_refresh_makes_no_thief_of_a_second_tab(serve):
    server = serve(CHEAP_PASSWORDS)
    client = server.client()
    alice, bob = (
        good(client.post("/auth/register", json={"username": name, "password": PASSWORD}), 201)
        for name in ("alice", "bob")
    )
    used = {"refresh_token": alice.json()["refresh_token"]}
    tokens = good(client.post("/auth/refresh", json=used), 200).json()
    theirs = {"refresh_token": bob.json()["refresh_token"]}
    good(client.post("/auth/refresh", json=theirs), 200)
    good(client.post("/auth/refresh", json=used), 401)
    alive = {"Authorization": f"Bearer {tokens['access_token']}"}
    good(client.get("/tasks", headers=alive), 200)


def test_refresh_tokens_end_with_their_session(server):
    alice = server.client()
    tokens = good(alice.post("/auth/register", json=ALICE), 201).json()
    good(alice.post("/auth/refresh", json={"refresh_token": tokens["refresh_token"]}), 200)
    ends = run_sql(server, "SELECT expires_at FROM refresh_tokens ORDER BY id")
    assert ends[-1:] == run_sql(server, "SELECT expires_at FROM sessions")
    assert len(ends) == 2
    assert max(ends) < ("2999",)


def test_storage_comes_back_and_an_empty_trash_can_be_emptied(server):
    alice = server.person("alice")
    task = create(alice)
    file = {"file": ("a.txt", b"x" * 1000)}
    path = f"/tasks/{task['id']}/attachments"
    [first, _] = [good(alice.post(path, files=file), 201).json() for _ in range(2)]
    assert storage_is_exact(server)
    good(alice.delete(f"/attachments/{first['id']}"), 204)
    assert storage_is_exact(server)
    good(alice.delete("/tasks/trash"), 204)
    good(alice.delete(f"/tasks/{task['id']}"), 204)
    assert storage_is_exact(server)
    good(alice.delete("/tasks/trash"), 204)
    assert run_sql(server, "SELECT max(storage_bytes) FROM users") == [(0,)]


def test_a_clean_up_takes_and_counts_only_what_is_old(server):
    admin = server.person("admin")
    old, young, kept = (create(admin, title=title) for title in ("old", "young one", "kept"))
    for task in (old, young):
        good(admin.delete(f"/tasks/{task['id']}"), 204)
    run_sql(server, f"UPDATE tasks SET deleted_at = '2026-01-01' WHERE id = {old['id']}")
    [(version,)] = run_sql(server, f"SELECT version FROM tasks WHERE id = {old['id']}")
    good(admin.post("/admin/cleanup"), 202)
    eventually(lambda: len(run_sql(server, "SELECT id FROM tasks")) == 2)
    assert storage_is_exact(server)
    assert run_sql(server, "SELECT max(purged_seq) FROM users") == [(version,)]
    changes = good(admin.get("/tasks/changes", params={"since": version}), 200).json()
    assert [task["id"] for task in changes["data"]] == [young["id"]]
    assert kept["version"] < version


def test_an_events_id_is_its_seq(server):
    alice = server.person("alice")
    other = create(alice)
    task = create(alice)
    good(alice.patch(f"/tasks/{other['id']}", json={"completed": True}), 200)
    heard = [*islice(events(alice, since=0), 2)]
    assert [event["id"] for event in heard] == [str(task["version"]), "3"]
    assert [json.loads(event["data"])["seq"] for event in heard] == [task["version"], 3]


def test_streams_that_have_left_do_not_count(server):
    alice = server.person("alice")
    create(alice)
    staying = events(server.client(alice.headers["Authorization"]), since=0)
    assert next(staying)["id"] == "1"
    for _ in range(60):
        assert next(events(alice, since=0))["id"] == "1"


def test_a_long_way_past_an_old_purge_is_gone_without_a_bell(serve):
    server = serve(f"{SILENT}; app.LOOK_SECONDS = 3600.0")
    alice = server.person("alice")
    for _ in range(250):
        create(alice)
    good(alice.delete(f"/tasks/{create(alice)['id']}"), 204)
    good(alice.delete("/tasks/trash"), 204)
    heard = [*islice(events(alice, since=0), 250)]
    assert [event["id"] for event in heard] == [str(seq) for seq in range(1, 251)]


def test_a_stream_that_a_purge_has_overtaken_is_told_once_and_goes_on(serve):
    server = serve(f"{SILENT}; app.LOOK_SECONDS = 1.0")
    alice = server.person("alice")
    create(alice)
    stream = events(server.client(alice.headers["Authorization"]), since=0)
    assert next(stream)["id"] == "1"
    good(alice.delete(f"/tasks/{create(alice)['id']}"), 204)
    good(alice.delete("/tasks/trash"), 204)
    told = next(stream)
    assert (told["event"], told["id"]) == ("resync_required", "4")
    task = create(alice)
    heard = next(stream)
    assert (heard["event"], heard["id"]) == ("created", str(task["version"]))
    again = events(server.client(alice.headers["Authorization"]), since=int(told["id"]))
    assert next(again)["id"] == heard["id"]


def test_a_begin_that_fails_fails_nobody_later(server):
    alice = server.person("alice")
    path = server.folder / "data" / "tasks.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        good(alice.post("/tasks", json={"title": "x"}), 503)  # After 10 s.
    create(alice)


def test_upgrades_run_each_step_once_and_outlive_a_copy_that_failed(serve, tmp_path):
    first = 'app.UPGRADES.append("ALTER TABLE tasks ADD COLUMN colour VARCHAR")'
    second = 'app.UPGRADES.append("ALTER TABLE tasks ADD COLUMN shade VARCHAR")'
    for change in ("pass", first, f"{first}; {second}"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "tasks-version-1.new").write_text("a copy that failed")
        server = serve(change)
        create(server.person("admin"))
        server.close()
    assert len(run_sql(server, "SELECT colour, shade FROM tasks")) == 3
    copies = sorted(each.name for each in (tmp_path / "data").glob("tasks-*.db"))
    assert copies == ["tasks-version-1.db", "tasks-version-2.db"]


def test_the_webhook_calls_nobody_whose_certificate_is_unknown(serve, tmp_path):
    names = ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-days", "2", *names], check=True, capture_output=True)
    came: list[str] = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append(self.path)
            self.send_response(204)
            self.end_headers()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    receiver = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    receiver.socket = context.wrap_socket(receiver.socket, server_side=True)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    where = f"https://localhost:{receiver.server_port}/"
    secret = "whsec_" + "A" * 32 + "A" * 12
    server = serve("app.WEBHOOK_PAUSES = (0, 0)", WEBHOOK_URL=where, WEBHOOK_SECRET=secret)
    create(server.person("alice"))
    eventually(lambda: "did not take" in server.log.read_text())
    receiver.shutdown()
    receiver.server_close()
    assert came == []


def test_who_connects_as_soon_as_it_says_listening_waits_and_is_not_refused(serve):
    assert serve("app.uvicorn.Server.run = lambda *_, **__: app.time.sleep(60)").answers()


def test_a_class_of_section_4_makes_an_answer_of_a_row_as_the_readme_does(serve):
    row = "id=1, username='x', email=None, role='user', is_active=True, created_at=app.now()"
    assert serve(f"app.UserPublic({row})").answers()

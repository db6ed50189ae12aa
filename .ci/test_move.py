"""tools/move_to_postgresql.py: PostgreSQL answers as the file did, whatever happened on the way."""

# ruff: noqa: D103, S101, S603

import contextlib
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import services
from conftest import CHEAP_PASSWORDS, DEADLINE, KEPT, PASSWORD, ROOT, Server, good

TITLES = ["Käse", "zoë", "Zebra", "_a", "ａｂｃ", "\U0001f4dd list", "l1\r\nl2\u2028x", "İi"]
FILES = [b"%PDF-" + each for each in (b"", os.urandom(100_000), bytes(range(256)) * 20_000)]
KILLED = """
import os, move_to_postgresql as tool
tool.Bar.show = tool.say = lambda *words: words[-1].endswith("WORD") and os.kill(os.getpid(), 9)
os._exit(tool.main())"""


@pytest.fixture(scope="module")
def postgresql() -> Iterator[services.PostgreSQL]:
    with contextlib.ExitStack() as running:
        folder = running.enter_context(tempfile.TemporaryDirectory())
        yield running.enter_context(services.services(Path(folder), durable=False))[0]


@pytest.fixture
def run(tmp_path, postgresql):
    """Run a program in the server's folder: its status, its words."""

    def run(*command: str, **more: str) -> tuple[int, str]:
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        environment |= {"DATABASE_URL": postgresql.url("moved"), "PYTHONPATH": tools, **more}
        words = [sys.executable, *(command or [f"{tools}/move_to_postgresql.py"])]
        options: Any = {"cwd": tmp_path, "env": environment, "text": True, "timeout": DEADLINE}
        done = subprocess.run(words, capture_output=True, **options)
        return done.returncode, done.stdout + done.stderr

    tools = str(ROOT / "tools")
    postgresql.fresh("moved")
    return run


def refused(ended: tuple[int, str], said: str) -> bool:
    """Whether it ended with 1 and one line that says this, and shows no password."""
    status, words = ended
    assert said in words
    return (status, words.count("\n"), "pass77" in words) == (1, 1, False)


def fill(server: Server, name: str, last: dict[str, int]) -> str:
    """Somebody's history, purges and unicode included. Returns their token; `last` are ids."""
    person = server.person(name)
    for title in TITLES:
        task = good(person.post("/tasks", json={"title": title}), 201).json()
    keyed = {"title": "once", "description": "é" * 500, "due_date": "2027-01-31T12:00:00+02:00"}
    good(person.post("/tasks", json=keyed, headers={"Idempotency-Key": "k1"}), 201)
    for number, content in enumerate([*FILES, b"%PDF-gone"]):
        files = {"file": (f"ф{number}.pdf", content)}
        file = good(person.post(f"/tasks/{task['id']}/attachments", files=files), 201).json()
    good(person.delete(f"/attachments/{file['id']}"), 204)
    purged = good(person.post("/tasks", json={"title": "purged"}), 201).json()
    for path in (purged["id"], "trash", task["id"] - 1):
        good(person.delete(f"/tasks/{path}"), 204)
    good(person.patch(f"/tasks/{task['id'] - 2}", json={"status": "done"}), 200)
    last |= {"tasks": purged["id"], "attachments": file["id"]}
    return str(person.headers["Authorization"])


def seen(server: Server, token: str, last: dict[str, int]) -> dict[str, Any]:
    """Every answer that somebody gets, 403 and 404 too, but for when their tokens were used."""
    paths = ["/users/me", "/tasks/statistics", "/admin/users", "/admin/tasks", "/auth/sessions"]
    paths += ["/tasks?deleted=true", "/tasks?search=k%C3%A4se", "/tasks?page_size=100"]
    paths += [f"/tasks?sort={sort}" for sort in ("updated_at", "due_date", "status", "title")]
    paths += [f"/tasks/changes?since={since}&limit=3" for since in range(25)]
    for key in range(1, last["tasks"] + 1):
        paths += [f"/tasks/{key}", f"/tasks/{key}/attachments", f"/attachments/{key}"]
    answers = {}
    client = server.client(token)
    for path in paths:
        answer = client.get(path)
        content = re.sub(rb'"(last_used_at|request_id)":"[^"]*"', b"", answer.content)
        answers[path] = (answer.status_code, answer.headers.get("ETag"), content)
    return answers


def test_postgresql_answers_as_the_file_did_and_goes_on(serve, run, tmp_path, postgresql):
    server = serve(CHEAP_PASSWORDS)
    last: dict[str, int] = {}
    tokens = [fill(server, name, last) for name in ("admin", "Ольга", "alice")]
    alice = server.client(tokens[-1])
    for scope in ("write", "read"):
        token = {"name": "script", "scope": scope}
        script = good(alice.post("/auth/api_tokens", json=token), 201).json()
    good(alice.delete(f"/auth/api_tokens/{script['id'] - 1}"), 204)
    tokens.append(f"Bearer {script['token']}")
    login = {"username": "alice", "password": PASSWORD}
    refresh = good(alice.post("/auth/login", json=login), 200).json()["refresh_token"]
    leaver = server.person("leaver")
    last["users"] = leaver.get("/users/me").json()["id"]
    good(leaver.delete("/users/me"), 204)
    before = [seen(server, token, last) for token in tokens]
    assert {each[0] for answers in before for each in answers.values()} == {200, 403, 404, 410}
    assert refused(run(), "is open in a server; stop that first")
    server.close()  # It is killed, and leaves a -wal, which holds nearly all.
    data = tmp_path / "data"
    files = {path: path.read_bytes() for path in data.iterdir()}
    for word in ("tasks", "attachments", "checking"):
        assert run("-c", KILLED.replace("WORD", word)) == (-9, "")
        assert postgresql.sql("SELECT count(*) FROM users", "moved") == "0"
    for word in ("now", "already"):
        status, said = run()
        assert status == 0, said
        assert f"/moved holds all of {data / 'tasks.db'} {word}.\n" in said
        assert f"SECRET_KEY to the content of {data / 'secret_key'}" in said
    assert {path: path.read_bytes() for path in data.iterdir()} == files
    key = (data / "secret_key").read_text()
    server = serve(CHEAP_PASSWORDS, DATABASE_URL=postgresql.url("moved"), SECRET_KEY=key)
    assert [seen(server, token, last) for token in tokens] == before
    goes_on(server, tokens[2], refresh, last)
    assert refused(run(), "take an empty database")


def goes_on(server: Server, token: str, refresh: str, last: dict[str, int]) -> None:
    """Sessions, seq, idempotency keys, and ids past those of what is purged."""
    alice = server.client(token)
    good(alice.post("/auth/refresh", json={"refresh_token": refresh}), 200)
    keyed = alice.post("/tasks", json={"title": "x"}, headers={"Idempotency-Key": "k1"})
    assert good(keyed, 200).json()["title"] == "once"
    seq = good(alice.get("/tasks/changes"), 200).json()["next_since"]
    task = good(alice.post("/tasks", json={"title": "new"}), 201).json()
    assert task["version"] == seq + 1
    files = {"file": ("x.pdf", b"%PDF-")}
    file = good(alice.post(f"/tasks/{task['id']}/attachments", files=files), 201).json()
    user = server.person("later").get("/users/me").json()
    # One less, because the replay has used an id of PostgreSQL's sequence.
    made = {"tasks": task["id"] - 1, "attachments": file["id"], "users": user["id"]}
    assert made == {name: highest + 1 for name, highest in last.items()}


def test_what_cannot_be_moved_is_refused_in_a_line(serve, run, tmp_path, postgresql):
    assert refused(run(), "no database at")
    serve().close()
    (tmp_path / "asyncpg.py").write_text("raise ModuleNotFoundError(name='asyncpg')")
    assert refused(run(PYTHONPATH=str(tmp_path)), "pip install -r deploy/requirements.txt")
    backup = [str(ROOT / "tools" / "backup.py"), "make", "copy.db"]
    assert refused(run(*backup, **{"SECRET_KEY": "x"}), "pg_dump")
    assert refused(run(DATABASE_URL=""), "DATABASE_URL is not set")
    nobody = "postgresql://me:pass77@127.0.0.1:1/x"
    assert refused(run(DATABASE_URL=nobody), "Connect call failed")
    assert refused(run(DATABASE_URL=nobody.replace("77", "/77")), "cannot be understood")
    postgresql.sql("CREATE TABLE users (x int)", "moved")
    assert refused(run(), "has tables of another program or version")
    for version, said in ((0, "is older: start"), (99, "newer than this program")):
        with contextlib.closing(sqlite3.connect(tmp_path / "data" / "tasks.db")) as file, file:
            file.execute("UPDATE schema_version SET version = ?", [version])
        assert refused(run(), said)

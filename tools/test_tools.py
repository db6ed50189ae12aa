"""What tools/ promises: backup.py beside the database, transfer.py over HTTP.

Run    .venv/bin/pytest           with everything else; the people and the server are test_app.py's
"""

import contextlib
import csv
import io
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import backup
import pytest

from test_app import HERE, Person, error_of, good, sqlite_only, together

pytest_plugins = ["test_app"]  # Its fixtures.
pytestmark = pytest.mark.filterwarnings("error")


def tool(directory: Path, name: str, *arguments: Any, given: bytes = b"", **more: str) -> Any:
    """What a program of tools/ ends with, and what it wrote to standard output and error."""
    command = [sys.executable, HERE / "tools" / name, *map(str, arguments)]
    environment = os.environ | {"NO_PROXY": "*", "PYTHONUTF8": "1"} | more
    where = {"cwd": directory, "env": environment}
    done = subprocess.run(command, input=given, capture_output=True, timeout=60, **where)
    return done.returncode, done.stdout, done.stderr.decode().replace("\r\n", "\n")


def rows(path: Path, sql: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        return database.execute(sql).fetchall()


@sqlite_only
def test_a_backup_is_of_one_moment_while_others_write(alice, tmp_path):
    def work(number: int) -> Any:
        while number and not copy.exists():
            alice.create()
        return number or tool(tmp_path, "backup.py", "make", "copy.db")

    copy = tmp_path / "copy.db"
    assert together(5, work)[0] == (0, b"", "")
    sql = "SELECT (SELECT count(*) FROM tasks), (SELECT max(version) FROM tasks), seq FROM users"
    assert len(set(rows(copy, f"{sql} WHERE id = {alice.user['id']}")[0])) == 1
    with pytest.raises(SystemExit, match="exists; choose a new name"):
        backup.make(copy)


@sqlite_only
def test_no_old_token_or_cursor_fits_anything_after_a_restore(alice, start, tmp_path):
    kept = alice.create("kept")
    backup.make(tmp_path / "past.db")
    people = [alice, alice.script(), alice.server.person("later").register()]
    last = alice.edit(kept)["version"]
    for _ in range(2):
        with pytest.raises(SystemExit, match="is open in a server; stop that first"):
            backup.restore(tmp_path / "past.db")
        people[0].server.stop()
        backup.restore(tmp_path / "past.db")
        again = start().person("alice").log_in()
        carol = again.server.person("carol").register()
        assert carol.user["id"] > max(person.user["id"] for person in people)
        for person in people:
            error_of(again.get("/users/me", headers=person.headers), 401)
        for since in (1, last, again.seq() + 1):
            error_of(again.get("/tasks/changes", params={"since": since}), 410)
        assert good(again.get("/tasks/changes")).json()["data"] == [kept]
        assert again.create("new")["version"] > last
        last = again.seq()
        people = [again, carol, *people]
    assert rows(min((tmp_path / "data").glob("tasks-*")), "SELECT version FROM tasks") == [(2,)]
    assert os.name == "nt" or not any(each.stat().st_mode & 0o77 for each in tmp_path.rglob("*.db"))


@pytest.fixture
def past(alice, tmp_path):
    alice.create()
    alice.server.stop()
    return Path(shutil.copy(tmp_path / "data" / "tasks.db", tmp_path / "past.db"))


NEWER = ["UPDATE schema_version SET version = 99", r"past.db: .* newer than this program"]
NOBODY = ["DELETE FROM users", "no account"]
STRANGE = ["DROP TABLE schema_version", "no such table"]
HALF = ["", "it is damaged"]


@sqlite_only
@pytest.mark.parametrize(("spoil", "said"), [NEWER, NOBODY, STRANGE, HALF])
def test_what_is_no_backup_is_refused_and_changes_nothing(past, tmp_path, spoil, said):
    before = {path: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    rows(past, spoil)
    if spoil == "":
        past.write_bytes(past.read_bytes()[: past.stat().st_size // 2])
    with pytest.raises(SystemExit, match=said):
        backup.restore(past)
    assert {path: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before


def transfer(person: Person, *arguments: str, given: bytes = b"") -> Any:
    address = {"ONEFILE_URL": person.server.url, "ONEFILE_TOKEN": person.script().tokens["token"]}
    return tool(HERE, "transfer.py", *arguments, given=given, **address)


def test_an_export_is_imported_once(alice, bob):
    texts = ["plain", "plain", "K\u00e4se\u2028kaufen", 'l1\r\nl2 "q" \\', "\ufeffx"]
    tasks = [alice.create("x", description=text) for text in [*texts, "trashed"]]
    alice.trash(tasks[-1])
    status, exported, said = transfer(alice, "export")
    assert (status, said) == (0, "tasks exported: 5\n")
    for summary in ("5 new, 0 there already", "0 new, 5 there already"):
        imported = transfer(bob, "import", "-", given=exported)
        assert imported == (0, b"", f"standard input: {summary}\n")
    assert sorted(task["description"] for task in bob.all_tasks().values()) == sorted(texts)


def test_refused_lines_are_named_and_the_others_go_in(alice, rate_limits):
    rate_limits(write="4/second")
    lines = b"""\xef\xbb\xbf{"title": "first"}\r\n\nno JSON\n{"title": ""}\n{"title": "\xe4"}\n[1]
        {"title": "x", "y": 1}\n{"title": "done", "completed": true}\n{"title": "last", "id": 7}"""
    status, _, said = transfer(alice, "import", "-", given=lines + b"\n" + b"[" * 100_000)
    refused = re.findall(r"standard input, line (\d+): .", said)
    assert (status, refused) == (1, ["3", "4", "5", "6", "7", "10"])
    assert "The server's rate limit is reached; waiting as long as it says.\n" in said
    assert said.endswith("standard input: 3 new, 0 there already, 6 refused\n")
    assert alice.titles(completed=True) == ["done"]
    assert sorted(alice.titles(completed=False)) == ["first", "last"]  # Several are sent at once.


def test_a_spreadsheet_executes_nothing_of_a_csv(alice):
    formulas = ["=1", "+1", "-1", "@A1", "|cmd", "%0a", "\xa0=1", "\u200b=1", "\uff1d1", "\tx"]
    harmless = ["x=1", "a-b", "'=1", " x", '"']
    for text in formulas + harmless:
        alice.create("x", description=text)
    exported = transfer(alice, "export", "--csv")[1]
    assert exported.startswith(b'\xef\xbb\xbf"id","title",')
    table = csv.DictReader(io.StringIO(exported.decode("utf-8-sig"), newline=""))
    assert [row["description"] for row in table] == [f"'{each}" for each in formulas] + harmless

"""Copy the SQLite database of a Onefile Tasks server into an empty PostgreSQL one.

Run    move_to_postgresql.py       while no server runs, with DATABASE_URL set

Run it with the server's Python and settings, in its directory and as its user. It copies all of
tasks.db in DATA_DIR: accounts, sessions, tokens, tasks, trash, attachments. Ids and versions stay,
so clients notice nothing. A session with PostgreSQL on the same machine:

    createuser tasks && createdb --owner tasks tasks
    .venv/bin/pip install -r deploy/requirements.txt
    DATABASE_URL=postgresql://tasks@localhost/tasks .venv/bin/python tools/move_to_postgresql.py

The file is only read, and nobody can open it meanwhile. To go back, unset DATABASE_URL and start;
what was written to PostgreSQL stays there. All arrives in one transaction, at the very end: after
an interruption PostgreSQL is as empty as before, so run it again.

Ends with 0, also if all was there already; 1 if it could not do it; 130 after Ctrl-C.
"""

import argparse
import asyncio
import importlib
import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# With DATABASE_URL it has to be set, and usually is not yet. Nothing here uses it.
os.environ["SECRET_KEY"] = os.environ.get("SECRET_KEY") or "none"
try:
    importlib.import_module("asyncpg")
    import sqlalchemy as sa
    from sqlmodel import SQLModel
    from transfer import Progress, say

    import app
except ModuleNotFoundError as missing:
    hint = "pip install -r deploy/requirements.txt, with the server's Python"
    sys.exit(f"move_to_postgresql.py needs {missing.name}: {hint}")

CONNECT_SECONDS = 10.0
ROW_BYTES = 500  # What a row counts in the progress bar, beside its attachment.
CONTENTS = "SELECT coalesce(sum(length(content)), 0) FROM attachments"
ACCOUNTS = """
SELECT id, username_key, password_hash, seq, purged_seq, storage_bytes FROM users ORDER BY id"""
"""The same in two databases only if one is a copy of the other: each hash has a salt."""
FOUND = "SELECT count(to_regclass(name)) FROM unnest($1::text[]) AS name"
HIGHEST = """
SELECT max(n) FROM (SELECT max(id) AS n FROM {0}
    UNION ALL SELECT seq FROM sqlite_sequence WHERE name = '{0}')"""
SET_HIGHEST = "SELECT setval(pg_get_serial_sequence($1, 'id'), $2)"
LIMITS = "SET LOCAL lock_timeout = '10s'; SET LOCAL statement_timeout = 0; LOCK TABLE"
TABLES = SQLModel.metadata.sorted_tables
VERSION = 1 + len(app.UPGRADES)
NAMES = ", ".join(table.name for table in TABLES)
COUNTS = {table.name: f"SELECT count(*) FROM {table.name}" for table in TABLES}  # noqa: S608

left_open: list[sqlite3.Connection] = []


@contextmanager
def opened_file(path: Path) -> Iterator[sqlite3.Connection]:
    """The database, to read, and shut to everybody else. Errors: SystemExit; sqlite3.Error."""
    if not path.exists():
        raise SystemExit(f"no database at {path}; start in the server's directory")
    if not os.access(path, os.W_OK):
        raise SystemExit(f"{path} cannot be locked: run this as the server's user")
    wal = Path(f"{path}-wal")
    killed = wal.exists() and wal.stat().st_size > 0
    uri = f"{path.as_uri()}?mode=rw"  # A lock that keeps a server out needs it; see query_only.
    source = sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None)
    try:
        source.execute("PRAGMA locking_mode=EXCLUSIVE")
        source.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
            raise
        raise SystemExit(f"{path} is open in a server; stop that first") from None
    source.execute("PRAGMA query_only=ON")
    try:
        yield source
    finally:
        left_open.append(source)
        if not killed:  # Closing would bring what a killed server left in the -wal into the file.
            source.close()


def check_file(source: sqlite3.Connection, path: Path) -> None:
    """Errors: SystemExit, if this is no database of ours, of this version and with accounts."""
    try:
        version = source.execute("SELECT max(version) FROM schema_version").fetchone()[0] or 0
        accounts = source.execute("SELECT count(*) FROM users").fetchone()[0]
    except sqlite3.Error as error:
        raise SystemExit(f"{path} is no database of this program: {error}") from None
    if version < VERSION:
        raise SystemExit(f"{path} is older: start this app.py once without DATABASE_URL, stop it")
    if version > VERSION:
        raise SystemExit(f"{path} is newer than this program")
    if not accounts:
        raise SystemExit(f"{path} holds no account; was a -wal beside it deleted?")


def value_of(column: sa.Column[Any], value: Any) -> Any:
    """A value as PostgreSQL's driver takes it: SQLite has neither times nor booleans."""
    kind = getattr(column.type, "impl", column.type)  # SQLModel's times are a DateTime within.
    if value is not None and isinstance(kind, sa.DateTime):
        return datetime.fromisoformat(value)
    if value is not None and isinstance(kind, sa.Boolean):
        return bool(value)
    return value


class Bar(Progress):
    """How much is copied, in bytes."""

    done = 0

    def records(self, source: sqlite3.Connection, table: sa.Table) -> Iterator[list[Any]]:
        """The rows of a table, one after another: of attachments, memory holds one at a time."""
        for row in source.execute(f"SELECT {', '.join(table.c.keys())} FROM {table.name}"):  # noqa: S608
            values = [value_of(*each) for each in zip(table.c, row, strict=True)]
            yield values
            self.done += ROW_BYTES + sum(len(each) for each in row if isinstance(each, bytes))
            text = f"{self.done / app.MIB:.1f} of {self.whole / app.MIB:.1f} MiB, {table.name}"
            self.show(self.done, text)


async def connect(database: app.PostgreSQL) -> Any:
    """A connection without a limit of time, to a schema of ours. Errors: SystemExit; `failures`."""
    try:
        target = await database.driver.connect(database.url, timeout=CONNECT_SECONDS)
    except ValueError:  # Its text may show a part of the password.
        hint = "in a password, write each of @ : / ? # % as %40 and so on"
        raise SystemExit(f"DATABASE_URL: cannot be understood; {hint}") from None
    names = [*SQLModel.metadata.tables, "schema_version"]
    found = await target.fetchval(FOUND, names)
    version = None
    if found == len(names):
        version = await target.fetchval("SELECT max(version) FROM schema_version")
    if found and version != VERSION:
        reason = "has tables of another program or version: take an empty database"
        raise SystemExit(f"{database.place} {reason}")
    await database.open()  # This creates the tables.
    await database.close()
    return target


async def difference(source: sqlite3.Connection, target: Any) -> str:
    """What is not the same in both, in words; empty if nothing."""
    for table, sql in COUNTS.items():
        wanted = source.execute(sql).fetchone()[0]
        found = await target.fetchval(sql)
        if found != wanted:
            return f"{table}: {found} instead of {wanted}"
    wanted = source.execute(ACCOUNTS).fetchall()
    found = [tuple(row) for row in await target.fetch(ACCOUNTS)]
    for user, other in zip(wanted, found, strict=True):
        if user != other:
            return f"user {user[0]} is another, or has another seq, purged_seq or storage_bytes"
    return ""


async def copy_table(target: Any, table: sa.Table, records: Iterator[list[Any]]) -> None:
    """One table. asyncpg would wait forever for a connection that is cut. Errors: `failures`."""
    options = {"columns": table.c.keys(), "records": records}
    copying = asyncio.create_task(target.copy_records_to_table(table.name, **options))
    target.add_termination_listener(lambda _: copying.cancel())
    try:
        await copying
    except asyncio.CancelledError:
        if target.is_closed():
            raise ConnectionError("the connection was lost") from None
        raise


async def copy_all(source: sqlite3.Connection, target: Any) -> None:
    """Every row, and the highest ids that were ever handed out. Errors: `failures`."""
    whole = source.execute(CONTENTS).fetchone()[0]
    for sql in COUNTS.values():
        whole += ROW_BYTES * source.execute(sql).fetchone()[0]
    bar = Bar(whole)
    for table in TABLES:
        await copy_table(target, table, bar.records(source, table))
        highest = source.execute(HIGHEST.format(table.name)).fetchone()[0]
        if highest:
            await target.fetchval(SET_HIGHEST, table.name, highest)
    say(f"copied: {bar.done / app.MIB:.1f} MiB; checking")
    await target.execute(f"ANALYZE {NAMES}")


async def move(database: app.PostgreSQL, path: Path) -> str:
    """Copy all or nothing. Returns what is true now. Errors: SystemExit; `failures`."""
    with opened_file(path) as source:
        check_file(source, path)
        target = await connect(database)
        async with target.transaction():
            await target.execute(f"{LIMITS} {NAMES} IN EXCLUSIVE MODE")
            rows = [await target.fetchval(f"SELECT EXISTS (TABLE {name})") for name in COUNTS]
            if not any(rows):
                await copy_all(source, target)
            different = await difference(source, target)
            if different:
                hint = "take an empty database" if any(rows) else "all was dropped"
                what = f"{database.place} does not hold what {path} holds"
                raise SystemExit(f"{what} ({different}): {hint}")
        await target.close()
    key = (app.settings.data_dir / "secret_key").resolve()
    value = f"to the content of {key}, if it was not set" if key.exists() else "as it was"
    return f"""{database.place} holds all of {path} {"already" if any(rows) else "now"}.
Set DATABASE_URL, and SECRET_KEY {value}; then access tokens go on. Start the server."""


def main() -> int:
    """Read the command line, do it, and end in a line; what the program ends with."""
    layout = argparse.RawDescriptionHelpFormatter
    name = "move_to_postgresql.py"
    argparse.ArgumentParser(name, description=__doc__, formatter_class=layout).parse_args()
    path = (app.settings.data_dir / "tasks.db").resolve()
    database = app.database
    try:
        if not isinstance(database, app.PostgreSQL):
            raise SystemExit("DATABASE_URL is not set; --help shows how")
        told = asyncio.run(move(database, path))
    except SystemExit as refusal:
        reason = str(refusal)
    except database.failures as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = f"{database.place}: {lines[0]}; nothing was copied"
    except (sqlite3.Error, ValueError, TypeError) as error:
        reason = f"{path}: {error}"
    except KeyboardInterrupt:
        say(f"{name}: interrupted; PostgreSQL is as it was. Run it again.")
        return 130
    else:
        sys.stdout.write(f"{told}\n")
        sys.stdout.flush()
        return 0
    say(f"{name}: {reason}")
    return 1


if __name__ == "__main__":
    status = main()
    os._exit(status)  # See left_open.

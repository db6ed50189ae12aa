r"""Copy the database of a Onefile Tasks server into one file, or put such a file in its place.

Run    backup.py make FILE        beside a running server; FILE must not exist yet
       backup.py restore FILE     only while no server runs

Run it with the server's Python and settings, in its directory and as its user: the database is
tasks.db in DATA_DIR. FILE holds everything, attachments and the hashes of passwords included; only
its owner may read it. When all is well `make` is silent outside a terminal, so cron mails failures
only. A line for crontab, where % needs its backslash:

    0 3 * * *  cd /srv/tasks && .venv/bin/python tools/backup.py make $(date +\%F).db

A restore keeps the database before, and ends every session and API token, because those that were
ended since the backup would live again. Clients get 410 resync_required once, and start anew.

Ends with 0; 1 if it could not do it, and then the database is as it was; 130 after Ctrl-C.
"""

import argparse
import asyncio
import os
import shutil
import sqlite3
import sys
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
try:
    import aiosqlite
    from sqlmodel import SQLModel

    import app
except ModuleNotFoundError as missing:
    sys.exit(f"backup.py needs {missing.name}: run it with the server's Python, .venv/bin/python")

LEAP = 2**20  # More than an instance hands out between a backup and the loss of its database.
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
HIGHEST_NUMBERS = (
    "SELECT max(seq) FROM users WHERE seq BETWEEN 0 AND 9007199254740992",
    "SELECT max(seq) FROM sqlite_sequence WHERE seq BETWEEN 0 AND 9007199254740992",
)
"""Of any user, and of any id. A damaged database may tell nonsense, so up to 2^53 counts."""


def database_path() -> Path:
    """Where the database is; behind a link, if that is one."""
    return (app.settings.data_dir / "tasks.db").resolve()


def kind_of(error: sqlite3.Error) -> int:
    """SQLite's code of an error, without the bits that tell kinds of the same."""
    return error.sqlite_errorcode & 0xFF


def is_open(path: Path) -> bool:
    """Whether a server runs: it keeps a lock as long as that. Then nothing at all is touched."""
    with closing(sqlite3.connect(path, timeout=0)) as database:
        try:
            database.execute("PRAGMA locking_mode=EXCLUSIVE")
            database.execute("BEGIN EXCLUSIVE")
        except sqlite3.DatabaseError as error:
            return kind_of(error) == sqlite3.SQLITE_BUSY
    return False


def whole_copy(source: Path, directory: str) -> Path:
    """A copy in there of a database of ours at one moment, looked through. Errors: SystemExit."""
    copy = Path(directory, "tasks.db")
    try:
        copy.touch(0o600)
        with closing(
            sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)
        ) as database:
            database.execute("VACUUM INTO ?", [str(copy)])
        with closing(sqlite3.connect(copy)) as database:
            found = database.execute("PRAGMA integrity_check").fetchone()[0]
            sql = "SELECT count(*) FROM users, schema_version"
            if database.execute(sql).fetchone()[0] == 0:
                found = "it holds no account; was a -wal beside it deleted?"
    except sqlite3.Error as error:
        corrupt = kind_of(error) == sqlite3.SQLITE_CORRUPT
        found = "it is damaged" if corrupt else str(error)
    if found != "ok":
        raise SystemExit(f"{source} cannot be copied: {found}")
    return copy


def make(file: Path) -> str:
    """Copy the database into a new file, whole or not at all. Errors: OSError; SystemExit."""
    path = database_path()
    if not path.exists():
        raise SystemExit(f"no database at {path}; start in the server's directory")
    if file.exists():
        raise SystemExit(f"{file} exists; choose a new name")
    companions = [Path(f"{path}{suffix}") for suffix in ("-wal", "-shm")]
    if not all(each.exists() for each in companions) and is_open(path):
        # What the server wrote lately is in no file until it stops, and writes it into tasks.db.
        raise SystemExit(f"{path}-wal or -shm was deleted under a server: stop that, and try again")
    with TemporaryDirectory(prefix=".backup-", dir=file.parent) as directory:
        whole_copy(path, directory).rename(file)
    return f"{file} holds the database as it is now." if sys.stdout.isatty() else ""


async def upgrade(copy: Path, file: Path) -> None:
    """Make the copy of a backup fit this program. Errors: SystemExit that names the backup."""
    database = app.Database()  # Which keeps no other copy: there is FILE.
    database.engine = app.SQLite.engine
    async with aiosqlite.connect(copy, isolation_level=None) as connection:
        connection.row_factory = sqlite3.Row
        await connection.execute("BEGIN")
        try:
            await database.upgrade(app.Transaction(connection.execute_fetchall))
        except SystemExit as refusal:
            raise SystemExit(f"{file}: {refusal}") from None
        await connection.commit()


def lock(database: sqlite3.Connection) -> None:
    """Bring a database into its one file, and shut everybody out until it is closed.

    A damaged one stays as it is. Errors: sqlite3.Error
    """
    try:
        database.execute("PRAGMA journal_mode=DELETE")
        database.execute("BEGIN EXCLUSIVE")
    except sqlite3.DatabaseError as error:
        if kind_of(error) not in DAMAGED:
            raise


def highest_number(database: sqlite3.Connection) -> int:
    """The highest seq or id that was ever handed out, as far as it can be read."""
    highest = 0
    for sql in HIGHEST_NUMBERS:
        with suppress(sqlite3.DatabaseError):
            highest = max(highest, database.execute(sql).fetchone()[0] or 0)
    return highest


def begin_anew(copy: Path, highest: int) -> None:
    """End every session, and let numbers go on where none was handed out in this or another past.

    Otherwise an account would get the id of one that came after the backup, and open to its token.
    """
    with closing(sqlite3.connect(copy)) as database, database:
        highest = max(highest, highest_number(database))
        start = (highest // LEAP + 1) * LEAP
        database.execute("DELETE FROM refresh_tokens")
        database.execute("DELETE FROM sessions")
        database.execute("UPDATE users SET seq = :start, purged_seq = :start", {"start": start})
        for table in SQLModel.metadata.tables:
            database.execute("DELETE FROM sqlite_sequence WHERE name = ?", [table])
            database.execute("INSERT INTO sqlite_sequence VALUES (?, ?)", [table, start])


def keep(path: Path) -> Path:
    """Give the database a second name beside its own. Returns that name. Errors: OSError."""
    kept = path.with_name(f"tasks-{app.now():%Y%m%dT%H%M%S%f}.db")
    for suffix in ("-wal", "-shm", "-journal"):  # Of a damaged one: they would damage the new one.
        companion = Path(f"{path}{suffix}")
        if companion.exists():
            companion.rename(f"{kept}{suffix}")
    if path.exists():
        try:
            kept.hardlink_to(path)
        except OSError:  # Not every file system has links.
            shutil.copy2(path, kept)
    return kept


def restore(file: Path) -> str:
    """Put a backup in the place of the database, all or nothing. Errors: OSError; SystemExit."""
    path = database_path()
    if not file.exists():
        raise SystemExit(f"no backup at {file}")
    if path.exists() and is_open(path):
        raise SystemExit(f"{path} is open in a server; stop that first")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".restore-", dir=path.parent) as directory:
        copy = whole_copy(file, directory)
        asyncio.run(upgrade(copy, file))
        before = path if path.exists() else ":memory:"
        with closing(sqlite3.connect(before, isolation_level=None)) as old:
            lock(old)
            begin_anew(copy, highest_number(old))
            if os.name == "nt":
                old.close()  # Windows replaces no open file; elsewhere nobody gets in between.
            kept = keep(path)
            copy.replace(path)
    told = f"{path} is what {file} holds now; everybody has to log in again."
    return f"{told}\nThe database before is kept in {kept}" if kept.exists() else told


def main() -> None:
    """Read the command line, do it, and end in one line whatever happens."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("backup.py", description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in (("make", "copy the database"), ("restore", "put a copy in its place")):
        command = commands.add_parser(name, help=text)
        command.add_argument("file", metavar="FILE", type=Path)
    given = parser.parse_args()
    if app.settings.database_url:
        hint = "pg_dump copies it, pg_restore puts a copy in its place"
        raise SystemExit(f"backup.py: DATABASE_URL is set, so all is in PostgreSQL: {hint}")
    try:
        told = make(given.file) if given.command == "make" else restore(given.file)
    except SystemExit as refusal:
        raise SystemExit(f"backup.py: {refusal}") from None
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise SystemExit(f"backup.py: {given.file}: {reason}") from None
    except KeyboardInterrupt:
        sys.stderr.write("backup.py: interrupted\n")
        sys.exit(130)
    if told:
        sys.stdout.write(f"{told}\n")


if __name__ == "__main__":
    main()

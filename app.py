"""Onefile Tasks: a complete task-manager API in one Python file.

Run    python3 -m venv .venv && .venv/bin/pip install -r requirements.txt
       .venv/bin/python app.py
Then   open http://127.0.0.1:8000/docs, or follow the README with curl.

Sections
   1  Settings              every knob, read from the environment and .env, checked at start
   2  Errors                one shape for every error, and what they have in common
   3  Database              SQLite or PostgreSQL: constant SQL, one statement a read
   4  Tables                users, sessions, refresh tokens, tasks, attachments
   5  Schemas               what comes in and what goes out
   6  Passwords and tokens  bcrypt, JWT, opaque tokens: functions that know nothing of HTTP
   7  Who asks              one statement a request says who this is, and their seq
   8  Rate limits           SlowAPI's moving windows, in this process or shared through Redis
   9  Live updates          the number per user, the changes that take it, the streams that follow
  10  Application           start and stop, the outermost ASGI layer, error handlers
  11  Routes                tasks, attachments, auth, users, admin, health, the WebSocket
  12  Command line          serve, accounts and tokens

Notation
   seq       a counter in every user's row. Whatever changes what a user sees of their tasks takes
             the next value in the same transaction, and the changed task is stamped with it. A
             task's version and ETag, the order of changes, delta sync and live updates are all
             this number.
   cursor    a seq that a client has seen; "what is new?" is `version > cursor ORDER BY version`
   trash     deleted tasks, kept as tombstones until they are purged
   user      in a route: the Caller, which is who asks, by which session and in which exchange
   :name     in SQL: a named parameter. Values never become part of a statement's text.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "aiosqlite==0.22.1",
#   "bcrypt==5.0.0",
#   "fastapi-offline==1.7.7",
#   "fastapi==0.163.2",
#   "h11==0.16.0",
#   "httpx==0.28.1",
#   "limits==5.8.0",
#   "prometheus-client==0.26.0",
#   "pydantic-settings==2.16.3",
#   "pydantic==2.14.3",
#   "pyjwt==2.15.1",
#   "pytest==9.2.0",
#   "python-multipart==0.0.34",
#   "slowapi==0.1.10",
#   "sqlalchemy==2.1.9",
#   "sqlmodel==0.0.50",
#   "standardwebhooks==1.1.0",
#   "starlette==1.10.0",
#   "uvicorn==0.54.0",
#   "uvloop==0.23.0; sys_platform != 'win32'",
#   "websockets==17.4",
# ]
# ///

import gc
import sys

if sys.version_info < (3, 11):
    raise SystemExit("Onefile Tasks needs Python 3.11 or newer.")
gc.disable()  # Looking for garbage during the imports would be a fifth of the start.

import argparse
import asyncio
import email.header
import functools
import getpass
import hashlib
import importlib.util
import ipaddress
import logging
import math
import os
import re
import secrets
import sqlite3
import time
import unicodedata
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, nullcontext, suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, Self, TypeVar, cast, get_args
from urllib.parse import quote, unquote_to_bytes
from weakref import WeakValueDictionary

import aiosqlite
import bcrypt
import jwt
import limits
import prometheus_client
import pydantic
import sqlalchemy as sa
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Form, Header, Query, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse
from fastapi.routing import iter_route_contexts
from fastapi.security import OAuth2PasswordBearer
from fastapi.sse import EventSourceResponse, ServerSentEvent
from fastapi_offline import FastAPIOffline
from pydantic import AfterValidator, BaseModel, BeforeValidator, StringConstraints
from pydantic_settings import BaseSettings, DotEnvSettingsSource
from slowapi import Limiter
from sqlmodel import Field, SQLModel
from starlette.background import BackgroundTask
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException, WebSocketException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect, WebSocketDisconnected
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.supervisors import ChangeReload

VERSION = "2.0.0"
API = "/api/v1"
MAX_ID = 2**63 - 1  # The integers of databases end here.
MIB = 2**20
NEVER = datetime(9999, 12, 31, tzinfo=UTC)

Row = dict[str, Any]
T = TypeVar("T")
log = logging.getLogger("onefile_tasks")

# What /metrics shows; the rest is in the labels: status 429 is a limit, 401 a failed login. A route
# is called what /docs calls the operation, which is its function: list_tasks.
LABELS = ["route", "status"]
REQUESTS = prometheus_client.Histogram("onefile_tasks_http_request_seconds", "Requests.", LABELS)
STREAMS = prometheus_client.Gauge("onefile_tasks_live_connections", "Open streams.")
prometheus_client.Info("onefile_tasks_build", "What runs.").info({"version": VERSION})

# ── 1 Settings ──────────────────────────────────────────────────────────────────────────────────
# The environment decides, and a .env file is the same thing on disk. A wrong value stops the start
# with one line that names the variable, because a server that guesses is found out later.


def networks(text: str) -> list[str]:
    """Addresses and networks, also as they arrive at HOST=::, like ::ffff:10.0.0.0/104."""
    if text == "*":
        return ["*"]
    known = [ipaddress.ip_network(part) for part in re.findall(r"[^, ]+", text)]
    mapped = [f"::ffff:{each[0]}/{96 + each.prefixlen}" for each in known if each.version == 4]
    return [*map(str, known), *mapped]


RATE = r"^[1-9]\d{0,8} ?/ ?([1-9]\d{0,3})? ?(second|minute|hour|day|month|year)s?$"
RateLimit = Annotated[str, StringConstraints(pattern=RATE), AfterValidator(limits.parse)]
ORIGIN = r"(\*|https?://[a-z0-9.-]+(:[0-9]+)?)"
REDIS = r"^(rediss?://([^/@]*@)?(\[[^/@]+\]|[^/:@?]+)(:\d{1,5})?(/\d*)?(\?.+)?)?$"
WEBHOOK_KEY = r"^(whsec_([A-Za-z0-9+/]{4}){8,21}([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?)?$"


class Settings(BaseSettings):
    """Every knob, with its default. Meanings, units and consequences stand in .env.example."""

    model_config = {"env_file": ".env", "env_ignore_empty": True, "extra": "ignore"}
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    root_path: str = pydantic.Field(default="", pattern=r"^(/[A-Za-z0-9._~-]+)*$")
    data_dir: Path = Path("data")
    database_url: str = pydantic.Field(default="", pattern=r"^(postgres(ql)?(\+\w+)?://.+)?$")
    redis_url: str = pydantic.Field(default="", pattern=REDIS)
    secret_key: str = ""
    admin_username: str = "admin"
    admin_password: str = ""
    registration: Literal["open", "closed"] = "open"
    access_token_minutes: int = Field(15, ge=1, le=1440)
    refresh_token_days: int = Field(30, ge=1, le=180)
    trash_days: int = Field(30, ge=0, le=36500)
    rate_limits: Literal["on", "off"] = "on"
    rate_limit_register: RateLimit = "3/minute"
    rate_limit_login: RateLimit = "5/minute"
    rate_limit_account: RateLimit = "1000/hour"
    rate_limit_refresh: RateLimit = "10/minute"
    rate_limit_read: RateLimit = "600/minute"
    rate_limit_write: RateLimit = "300/minute"
    max_body_kib: int = Field(64, ge=1, le=65536)
    max_upload_mib: int = Field(5, ge=1, le=512)
    max_storage_mib: int = Field(100, ge=0, le=2**20)
    cors_origins: str = pydantic.Field(default="", pattern=rf"^({ORIGIN}(, ?{ORIGIN})*)?$")
    trusted_proxies: Annotated[Any, AfterValidator(networks)] = ""
    docs: Literal["on", "off"] = "on"
    metrics: Literal["admin", "open", "off"] = "admin"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    webhook_url: str = pydantic.Field(default="", pattern=r"^(https?://[^/]+.*)?$")
    webhook_secret: str = pydantic.Field(default="", pattern=WEBHOOK_KEY)


def first_problem(error: pydantic.ValidationError, name: str = "") -> str:
    """One line that names what is wrong and shows no value, which may be a secret."""
    problem = error.errors(include_input=False, include_url=False)[0]
    name = name or str(problem["loc"][0]).upper()
    return f"{name}: {problem['msg'].removeprefix('Value error, ')}"


def load_settings() -> Settings:
    """The settings, checked. Errors: SystemExit with one line."""
    try:
        loaded = Settings()
    except UnicodeDecodeError:
        raise SystemExit(".env: must be text in UTF-8") from None
    except pydantic.ValidationError as error:
        raise SystemExit(first_problem(error)) from None
    for given, secret in (("database_url", "secret_key"), ("webhook_url", "webhook_secret")):
        if getattr(loaded, given) and not getattr(loaded, secret):
            raise SystemExit(f"{secret.upper()}: must be set, because {given.upper()} is")
    for setting, module in (("database_url", "asyncpg"), ("redis_url", "redis")):
        if getattr(loaded, setting) and importlib.util.find_spec(module) is None:
            raise SystemExit(f"{setting.upper()}: needs pip install -r deploy/requirements.txt")
    for name in DotEnvSettingsSource(Settings).env_vars.keys() - Settings.model_fields.keys():
        print(f".env: {name.upper()} is no setting of Onefile Tasks", file=sys.stderr)
    return loaded


settings = load_settings()


def now() -> datetime:
    """The clock of all that is stored or expires, in UTC. Tests set it by hand."""
    return datetime.now(UTC)


# ── 2 Errors ────────────────────────────────────────────────────────────────────────────────────
# One envelope for every error, whoever noticed it. A route shows the raise, its status and code.
# Messages say the next step, and never repeat a sent value, which may be a password; of what is not
# known they repeat the name.

# Of an error that brings none. Ref: RFC 6750 §3; RFC 9110 §15.6.4
USUAL_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "5"}}


class ApiError(HTTPException):
    """An error that a client will see: status, stable code, message, headers, more of its body."""

    def __init__(self, status: int, code: str, text: str, headers: Any = None, **more: Any) -> None:
        super().__init__(status, text, headers)
        self.body = {"code": code, **more}


def error_response(error: HTTPException, request_id: str) -> Response:
    """The envelope of any HTTPException. A 304 has no body. Ref: RFC 9110 §15.4.5."""
    if error.status_code == 304:
        return Response(status_code=304, headers=error.headers)
    body = {"code": "http_error", "message": str(error.detail), "request_id": request_id}
    body |= getattr(error, "body", {})
    headers = error.headers or USUAL_HEADERS.get(error.status_code)
    return JSONResponse({"error": body}, error.status_code, headers)


def only(rows: list[Row], kind: str, key: int) -> Any:
    """The one row found. Errors: 404, the same for absent and somebody else's: ids tell nothing."""
    if not rows:
        raise ApiError(404, f"{kind}_not_found", f"No {kind.replace('_', ' ')} {key}.")
    return rows[0]


def resync_required() -> ApiError:
    """410: deletions after this cursor are forgotten, or it comes from another past."""
    return ApiError(410, "resync_required", "This cursor is stale. Start again with since=0.")


# ── 3 Database ──────────────────────────────────────────────────────────────────────────────────
# SQL is text, in words that SQLite and PostgreSQL share, without an ORM; only names of columns and
# filters are put together. A hop to a driver's thread costs more than most statements, so a short
# read runs in the event loop. On SQLite all who wait to write share one COMMIT: a durable one costs
# a flush of the disk, however many writes it carries.

READ_SECONDS = 3.0
QUICK_SECONDS = 0.001  # Of processor time: a read that needs no more runs in the event loop.
STATEMENT_SECONDS = 10
UPGRADES: list[str] = []
"""The first statement makes version 2 of version 1 of the tables, and so on: only append."""

sqlite3.register_adapter(datetime, lambda moment: moment.isoformat(timespec="microseconds"))
sys.setswitchinterval(0.0005)  # Seconds that a driver's thread waits for the event loop.


class Transaction(NamedTuple):
    """An open transaction, which runs its statements by `run(sql, values)`."""

    run: Callable[[str, Row], Awaitable[Iterable[Any]]]

    async def fetch(self, sql: str, **values: Any) -> list[Row]:
        """Run one statement; the rows that it selects or returns. :now is always there."""
        return [dict(row) for row in await self.run(sql, {"now": now(), **values})]

    async def insert(self, table: str, **columns: Any) -> list[Row]:
        """Insert a row and return it, or return none if a unique column has that value already."""
        values = ", ".join(f":{name}" for name in columns)
        sql = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({values})"
        return await self.fetch(f"{sql} ON CONFLICT DO NOTHING RETURNING *", **columns)


read_turns: WeakValueDictionary[int, asyncio.Semaphore] = WeakValueDictionary()
write_turns: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()
"""By user, as long as somebody holds one or waits for it."""


class Database:
    """What both databases share: how they are upgraded, and read by key or within bounds."""

    engine: str
    # Each database has its own: all rows of one statement. A quick one is tried without a thread.
    select: Callable[[str, Row, bool], Coroutine[Any, Any, list[Row]]]

    def keep_copy(self, _version: int) -> None:
        """Keep the database as it is before an upgrade. PostgreSQL's copies are pg_dump's work."""

    async def upgrade(self, db: Transaction) -> None:
        """Run the missing UPGRADES, create missing tables and indexes. Errors: SystemExit."""
        await db.fetch("CREATE TABLE IF NOT EXISTS schema_version (version BIGINT PRIMARY KEY)")
        rows = await db.fetch("SELECT coalesce(max(version), 0) AS version FROM schema_version")
        newest = 1 + len(UPGRADES)
        version = rows[0]["version"]
        if version == newest:
            return
        if version > newest:
            raise SystemExit(f"the database is of version {version}, newer than this program")
        if version:
            self.keep_copy(version)
            for sql in UPGRADES[version - 1 :]:
                await db.fetch(sql)
        dialect = sa.make_url(f"{self.engine}://").get_dialect()()
        for table in SQLModel.metadata.sorted_tables:
            steps: list[Any] = [sa.schema.CreateTable(table, if_not_exists=True)]
            steps += [sa.schema.CreateIndex(index, if_not_exists=True) for index in table.indexes]
            for step in steps:
                await db.fetch(str(step.compile(dialect=dialect)))
        await db.insert("schema_version", version=newest)

    async def lookup(self, sql: str, **values: Any) -> list[Row]:
        """The row of a key, if there is one: that is quick, whoever asks."""
        return await self.select(sql, values, True)

    async def read(self, user_id: int, sql: str, quick: bool = False, **values: Any) -> list[Any]:
        """All rows of one statement: two at once for a user, 3 s each. Errors: 503 too_slow."""
        turn = read_turns.setdefault(user_id, asyncio.Semaphore(2))
        try:
            async with turn, asyncio.timeout(READ_SECONDS):
                return await self.select(sql, {**values, "user_id": user_id, "now": now()}, quick)
        except TimeoutError:
            raise ApiError(503, "too_slow", "This took too long. Ask for less.") from None


class SQLite(Database):
    """One file: one connection reads here, a few read in threads, and one writes."""

    engine = "sqlite"
    failures: Any = (sqlite3.DatabaseError, OSError)

    async def open(self) -> None:
        """Open or create the file, readable by its owner alone. Errors: `failures`; SystemExit."""
        self.place = (settings.data_dir / "tasks.db").absolute()
        self.place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.place.touch(0o600)
        with closing(self.connect()) as first:  # Fails here: a thread would outlive the loop.
            first.execute("PRAGMA journal_mode=WAL")
        async with aiosqlite.Connection(self.connect, 64) as connection:
            await connection.execute("BEGIN IMMEDIATE")  # One process upgrades, the others wait.
            await self.upgrade(Transaction(connection.execute_fetchall))
            await connection.commit()
        self.inode = self.place.stat().st_ino
        connect_reader = functools.partial(self.connect, query_only="ON")
        self.quick_reader = connect_reader()
        self.quick_reader.row_factory = None  # A dict of a sqlite3.Row takes twice as long.
        self.quick_reader.set_progress_handler(lambda: time.thread_time() > self.deadline, 500)
        self.writer = await aiosqlite.Connection(self.connect, 64)
        self.readers: asyncio.Queue[aiosqlite.Connection] = asyncio.Queue()
        for _ in range(8):
            self.readers.put_nowait(await aiosqlite.Connection(connect_reader, 64))
        self.write_turn = asyncio.Lock()
        self.committed: asyncio.Task[None] | None = None

    def connect(self, query_only: str = "OFF") -> sqlite3.Connection:
        """A connection whose transactions are begun by hand."""
        connection = sqlite3.connect(self.place, 10, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        # FULL: an acknowledged write survives a power cut, not only a crash of this process.
        for pragma in "synchronous=FULL", "foreign_keys=ON", f"query_only={query_only}":
            connection.execute(f"PRAGMA {pragma}")
        return connection

    def keep_copy(self, version: int) -> None:
        """Copy the database as it is before an upgrade. Errors: OSError, sqlite3.Error."""
        copy = self.place.with_name(f"tasks-version-{version}.db")
        unfinished = copy.with_suffix(".new")
        unfinished.unlink(missing_ok=True)  # Of a start that failed.
        unfinished.touch(0o600)
        with closing(self.connect()) as connection:
            connection.execute("VACUUM INTO ?", [str(unfinished)])
        unfinished.replace(copy)
        print(f"  Upgrade    the database as it was is kept in {copy}", flush=True)

    async def close(self) -> None:
        """Close every connection; the writer last, which then takes the WAL into the file."""
        self.quick_reader.close()
        while not self.readers.empty():
            await self.readers.get_nowait().close()
        await self.writer.close()

    def check(self) -> None:
        """Errors: OSError, if the file is not the one that was opened: writes would be lost."""
        if os.stat(self.place).st_ino != self.inode:
            raise OSError(f"{self.place} is another file now: restart")

    async def select(self, sql: str, values: Row, quick: bool) -> list[Row]:
        """All rows of one statement: right here if that is quick, or else anew, in a thread."""
        self.check()
        if quick:
            self.deadline = time.thread_time() + QUICK_SECONDS
            with suppress(sqlite3.OperationalError):  # It was not quick after all.
                rows = self.quick_reader.execute(sql, values)
                names = [column[0] for column in rows.description]
                return [dict(zip(names, row, strict=True)) for row in rows]
        reader = await self.readers.get()
        try:
            return [dict(row) for row in await reader.execute_fetchall(sql, values)]
        finally:
            await reader.interrupt()  # Whoever was cancelled or late leaves it running.
            self.readers.put_nowait(reader)

    async def undo(self) -> None:
        """Undo one body. A full disk has rolled back everybody's: then the whole group is lost."""
        try:
            await self.writer.execute("ROLLBACK TO body")
        except sqlite3.Error:
            self.lost = True

    async def commit(self) -> None:
        """Commit once for all. Errors: sqlite3.Error, and then nothing of the group is there."""
        async with self.write_turn:
            self.committed = None
            await self.begun
            try:
                if self.lost:
                    raise sqlite3.OperationalError("the transaction was rolled back")
                await self.writer.commit()
            except sqlite3.Error:
                await self.writer.rollback()
                raise

    @asynccontextmanager
    async def transaction(self, _user_id: int = 0) -> AsyncIterator[Transaction]:
        """A durable transaction: when the block has ended it is committed, or raises.

        Each body has a savepoint of its own. The first one creates the commit, which queues for the
        same lock: so it runs when all who waited have had their turn, and who comes later is next.
        """
        committed = None
        try:
            async with self.write_turn:
                self.check()
                if self.committed is None:
                    self.lost = False
                    self.begun = asyncio.create_task(self.writer.execute("BEGIN IMMEDIATE"))
                    self.committed = asyncio.create_task(self.commit())
                committed = self.committed
                await asyncio.shield(self.begun)
                await self.writer.execute("SAVEPOINT body")  # Of this name, the newest counts.
                try:
                    yield Transaction(self.writer.execute_fetchall)
                except BaseException:
                    await asyncio.shield(self.undo())
                    raise
        finally:  # Whoever failed waits, too: a 404 may speak of rows that are not committed yet.
            if committed:
                await asyncio.shield(committed)


@functools.cache
def numbered(sql: str) -> tuple[str, list[str]]:
    """A statement as PostgreSQL wants it, with $1 for the first :name; and the names."""
    names = list(dict.fromkeys(re.findall(r":(\w+)", sql)))
    return re.sub(r":(\w+)", lambda found: f"${names.index(found[1]) + 1}", sql), names


class PostgreSQL(Database):
    """A pool of connections. Row locks order the writers of a user, in all processes."""

    engine = "postgresql"

    def __init__(self) -> None:
        self.driver: Any = importlib.import_module("asyncpg")
        # The last one is its word for a connection that a restart has cut at the wrong moment.
        names = ("PostgresError", "InterfaceError", "InternalClientError")
        self.failures: Any = (OSError, *[getattr(self.driver, name) for name in names])
        self.url = re.sub(r"^postgres[^:]*", "postgresql", settings.database_url)
        self.place = re.sub("//.*@", "//", self.url).partition("?")[0]  # Without a password.

    async def open(self) -> None:
        """Connect; one process upgrades, the others wait. Errors: `failures`; SystemExit."""
        options = {"dsn": self.url, "timeout": STATEMENT_SECONDS, "min_size": 0, "max_size": 16}
        options["server_settings"] = {"timezone": "UTC"}  # COUNT_TASKS prints a time.
        unlimited = self.driver.create_pool(**options)
        async with unlimited, unlimited.acquire() as connection, connection.transaction():
            await connection.fetch("SELECT pg_advisory_xact_lock(1)")
            await self.upgrade(Transaction(functools.partial(self.run, connection)))
        options |= {"command_timeout": STATEMENT_SECONDS, "statement_cache_size": 512}
        pool = await self.driver.create_pool(**options)
        self.connect = functools.partial(pool.acquire, timeout=STATEMENT_SECONDS)
        self.close = pool.close

    async def run(self, connection: Any, sql: str, values: Row) -> Any:
        """One statement on a connection."""
        text, names = numbered(sql)
        return await connection.fetch(text, *[values[name] for name in names])

    async def select(self, sql: str, values: Row, _quick: bool) -> list[Row]:
        """All rows of one statement. Whoever is cancelled or late cancels it."""
        async with self.connect() as connection:
            return [dict(row) for row in await self.run(connection, sql, values)]

    @asynccontextmanager
    async def transaction(self, user_id: int = 0) -> AsyncIterator[Transaction]:
        """A durable transaction; of this user's the only one: it locks their row for all."""
        # Whoever waits for another one here holds no connection.
        turn = write_turns.setdefault(user_id, asyncio.Lock()) if user_id else nullcontext()
        async with turn, self.connect() as connection, connection.transaction():
            if user_id:  # A statement that waits for a row sees the others as before its wait.
                await connection.fetch("SELECT FROM users WHERE id = $1 FOR NO KEY UPDATE", user_id)
            yield Transaction(functools.partial(self.run, connection))


database = PostgreSQL() if settings.database_url else SQLite()

# ── 4 Tables ────────────────────────────────────────────────────────────────────────────────────
# Most tables are two classes: the public half is also the answer that clients get, the private half
# leaves only where a route says so. SQLModel declares the tables; the SQL that fills them stands
# where it is used. AUTOINCREMENT: the id of something purged is never handed out again.

Role = Literal["user", "admin"]
TokenScope = Literal["read", "write"]
Status = Literal["todo", "in_progress", "done"]
Priority = Literal["low", "medium", "high"]
Moment = Annotated[datetime, AfterValidator(lambda moment: moment.replace(tzinfo=UTC))]
"""In UTC. asyncpg reads the first and the last moment of all without a zone."""
BINARY_TEXT: Any = sa.String(collation="C").with_variant(sa.String(), "sqlite")
"""A text that PostgreSQL sorts as SQLite does, whatever its locale."""


class Public(SQLModel):
    """The base of tables and their answers: a string under a field describes it in /docs."""

    model_config = {"use_attribute_docstrings": True}
    __table_args__: Any = {"sqlite_autoincrement": True}
    __init__ = BaseModel.__init__  # SQLModel's own reads a row three times as slowly.
    id: int = Field(primary_key=True)


class UserPublic(Public):
    """An account, as its owner and an admin see it."""

    username: str
    email: str | None
    role: Role = Field(sa_type=sa.String)
    is_active: bool
    created_at: datetime


class User(UserPublic, table=True):
    """The private half of an account. `seq` is the number that section 9 is about."""

    __tablename__ = "users"
    username_key: str = Field(unique=True)
    password_hash: str
    seq: int
    purged_seq: int
    """The highest seq that a purge has removed: a cursor below it may have missed a deletion."""
    storage_bytes: int
    """Attachments and the texts of tasks, the folded ones included."""


class SessionPublic(Public):
    """A login."""

    address: str
    user_agent: str
    created_at: datetime
    last_used_at: datetime
    expires_at: datetime


class Session(SessionPublic, table=True):
    """A login, or an API token: with a name and a scope. Deleting the row ends it at once."""

    __tablename__ = "sessions"
    user_id: int = Field(foreign_key="users.id", ondelete="CASCADE", index=True)
    name: str | None
    scope: str | None
    token_hash: str | None = Field(unique=True)


class RefreshToken(Public, table=True):
    """A refresh token, as a hash. A used one is kept, to notice a replay."""

    __tablename__ = "refresh_tokens"
    session_id: int = Field(foreign_key="sessions.id", ondelete="CASCADE", index=True)
    token_hash: str = Field(unique=True)
    used_at: datetime | None
    expires_at: datetime


class TaskPublic(Public):
    """A task, in the trash if `deleted_at` is set."""

    title: str
    description: str | None
    status: Status = Field(sa_type=sa.String)
    priority: Priority = Field(sa_type=sa.String)
    due_date: Moment | None
    completed: bool
    completed_at: datetime | None
    attachments: int
    """How many files are attached."""
    owner_id: int = Field(foreign_key="users.id", ondelete="CASCADE")
    version: int
    """Its ETag, and its place among its owner's changes."""
    created_at: datetime
    updated_at: datetime
    deleted_at: datetime | None = Field(index=True)


class Task(TaskPublic, table=True):
    """The private half of a task."""

    __tablename__ = "tasks"
    title_key: str = Field(sa_type=BINARY_TEXT)
    """Folded, for searching and sorting."""
    description_key: str
    text_bytes: int
    """What its texts count against the owner's storage."""
    idempotency_key: str | None


class AttachmentPublic(Public):
    """A file at a task. Its ETag is its `sha256`."""

    task_id: int = Field(foreign_key="tasks.id", ondelete="CASCADE", index=True)
    filename: str
    content_type: str
    size_bytes: int
    sha256: str
    created_at: datetime


class Attachment(AttachmentPublic, table=True):
    """The private half of an attachment: in the database, so that a backup is one file."""

    __tablename__ = "attachments"
    content: bytes


for column in [each for table in SQLModel.metadata.tables.values() for each in table.c]:
    if isinstance(column.type, sa.Integer):  # PostgreSQL's own ends at 2^31.
        column.type = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
of_task = SQLModel.metadata.tables["tasks"].c
sa.Index("ix_tasks_version", of_task.owner_id, of_task.version, unique=True)
sa.Index("ix_tasks_key", of_task.owner_id, of_task.idempotency_key, unique=True)
# In the order of the default list; the rest lets totals and statistics be counted in it alone.
LIST = "owner_id deleted_at created_at id due_date completed completed_at status priority"
sa.Index("ix_tasks_list", *[of_task[name] for name in LIST.split()])

USER_COLUMNS = ", ".join(UserPublic.model_fields)
TASK_COLUMNS = ", ".join(f"tasks.{name}" for name in TaskPublic.model_fields)
ATTACHMENT_COLUMNS = ", ".join(AttachmentPublic.model_fields)
TASK = pydantic.TypeAdapter(TaskPublic)
TASK_LIST = pydantic.TypeAdapter(list[TaskPublic])

# ── 5 Schemas ───────────────────────────────────────────────────────────────────────────────────
# What comes in is strict: unknown fields are refused, "1" is no number and 1 is no date. What goes
# out is listed in section 4 and here, so that a password hash cannot slip into an answer.

RFC3339 = r"\d{4}-\d\d-\d\d([Tt ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?([Zz]|[+-]\d\d:\d\d)?)?"
BECOME_MARKS = "\u0f73\u0f75\u0f81\uff9e\uff9f"  # When they are normalised.
COMMON_PASSWORDS = """password password1 password12 password123 passw0rd p@ssw0rd 12345678 123456789
1234567890 123123123 11111111 00000000 87654321 88888888 qwertyui qwertyuiop qwerty123 1q2w3e4r
1qaz2wsx asdfghjk iloveyou sunshine princess football baseball superman trustno1 starwars whatever
computer internet michelle jennifer changeme welcome1 letmein1 admin123 administrator abcd1234"""


def storable(text: str) -> str:
    """Refuse what no database or encoder takes, or what takes long. Errors: ValueError."""
    if re.search("[\x00\ud800-\udfff]", text):
        raise ValueError("must not contain NUL or lone surrogates")
    if text.isascii():
        return text
    # Normalising sorts each run of marks in quadratic time: thousands of them would take seconds.
    marks = ("m" if unicodedata.combining(each) or each in BECOME_MARKS else " " for each in text)
    if "m" * 31 in "".join(marks):
        raise ValueError("must not have more than 30 combining marks in a row")
    return text


def folded(text: str) -> str:
    """How texts are searched and sorted: without case, width and accents. Ref: Unicode Annex 15."""
    if text.isascii():
        return text.lower()
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return "".join(each for each in decomposed if not unicodedata.combining(each))


def username_key(text: str) -> str:
    """How usernames are compared: NFKC, without case."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text.strip()).casefold())


def valid_username(text: str) -> str:
    """Trimmed, NFKC, then letters and digits of any script, `.`, `_`, `-`. Errors: ValueError."""
    name = unicodedata.normalize("NFKC", storable(text.strip()))
    allowed = all(each in "._-" or unicodedata.category(each)[0] in "LMN" for each in name)
    if not allowed or not 3 <= len(name) <= 50:
        raise ValueError("must be 3 to 50 letters, digits, '.', '_' or '-'")
    return name


def uncommon(password: str) -> str:
    """Refuse what guessers try first. Ref: NIST SP 800-63B §3.1.1.2. Errors: ValueError."""
    if password.casefold() in COMMON_PASSWORDS.split():
        raise ValueError("is among the commonest; choose another")
    return storable(password)


def parse_time(value: object, time_of_day: str = "23:59:59") -> datetime:
    """RFC 3339 to UTC; a naive time is UTC, a bare date that time of day. Errors: ValueError."""
    if not isinstance(value, str) or not re.fullmatch(RFC3339, value, re.ASCII):
        raise ValueError("must be like 2026-11-20T17:00:00Z or 2026-11-20 (in a URL, + is %2B)")
    if len(value) == 10:
        value = f"{value}T{time_of_day}Z"
    try:
        moment = datetime.fromisoformat(value.upper())
        return moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)
    except (OverflowError, ValueError):
        raise ValueError("must be a moment between the years 1 and 9999") from None


first_moment = functools.partial(parse_time, time_of_day="00:00:00")
last_moment = functools.partial(parse_time, time_of_day="23:59:59.999999")
Storable = AfterValidator(storable)
Trimmed = StringConstraints(strip_whitespace=True, min_length=1)
Text = Annotated[str, StringConstraints(max_length=10_000), Storable]
Title = Annotated[str, Trimmed, StringConstraints(max_length=200), Storable]
Time = Annotated[datetime, BeforeValidator(parse_time, datetime | date)]
FromTime = Annotated[datetime, BeforeValidator(first_moment, datetime | date)]
ToTime = Annotated[datetime, BeforeValidator(last_moment, datetime | date)]
NAME: Row = {"minLength": 3, "maxLength": 50, "pattern": r"^[^\s!-,/:-@\[-\^`{-~]+$"}
Username = Annotated[str, AfterValidator(valid_username), pydantic.Field(json_schema_extra=NAME)]
Password = Annotated[str, pydantic.Field(min_length=8, max_length=256), AfterValidator(uncommon)]
Email = Annotated[str, StringConstraints(max_length=254, pattern=r"^[^@\s]+@[^@\s]+$"), Storable]
Id = Annotated[int, pydantic.Field(ge=1, le=MAX_ID)]
Cursor = Annotated[int, pydantic.Field(ge=0, le=MAX_ID)] | None


class Schema(BaseModel):
    """The base of other schemas: a string under a field describes it in /docs."""

    model_config = {"use_attribute_docstrings": True}


class Body(SQLModel):
    """The base of every body: strict, and an unknown field is an error that names it."""

    model_config = {"strict": True, "extra": "forbid", "use_attribute_docstrings": True}


def for_docs(values: Row, schema: Row) -> None:
    """Add the example. Where all may be absent, absent means unchanged: no default to send then."""
    schema["examples"] = [values]
    if "required" not in schema:
        for field in schema["properties"].values():
            field.pop("default", None)


def example(**values: Any) -> Any:
    """A body that succeeds when it is sent as it is."""
    return {"json_schema_extra": functools.partial(for_docs, values)}


class Credentials(Body):
    """A name and a password."""

    model_config = example(username="alice", password="correct horse battery")
    username: Text
    password: Text


class Registration(Credentials):
    """A new account."""

    username: Username
    """3–50 letters and digits of any script, `.`, `_`, `-`."""
    password: Password
    """8–256 characters, not among the commonest."""
    email: Email | None = None
    """Kept, never verified."""


class RefreshRequest(Body):
    """A refresh token."""

    refresh_token: Text


class AdminUserCreate(Registration):
    """A new account, as an admin makes it."""

    role: Role = "user"


class AdminUserUpdate(Body):
    """What an admin changes: what is absent stays."""

    model_config = example(is_active=True)
    role: Role = "user"
    is_active: bool = True
    password: Password = ""


class UserUpdate(Body):
    """What to change; a new password needs the current one."""

    model_config = example(email="alice@example.org")
    email: Email | None = None
    password: Password = ""
    current_password: Text = pydantic.Field("", exclude=True)


class ApiTokenCreate(Body):
    """A token for a script."""

    model_config = example(name="backup script", scope="read")
    name: Annotated[str, Trimmed, StringConstraints(max_length=100), Storable]
    scope: TokenScope
    """`read` may only GET."""
    expires_at: Time | None = None
    """Null: never."""


class ApiTokenPublic(Public):
    """What is known later of a token for a script."""

    name: str
    scope: TokenScope
    created_at: datetime
    last_used_at: datetime | None
    expires_at: datetime | None


class ApiTokenCreated(ApiTokenPublic):
    """The only answer that shows the token itself."""

    token: str


class TokenPair(Schema):
    """Send the access token as `Authorization: Bearer …`; the refresh token gets the next pair."""

    access_token: str
    refresh_token: str
    token_type: str = "bearer"
    expires_in: int
    """Seconds until the access token expires."""


class Registered(TokenPair):
    """Tokens, and the account that they belong to."""

    user: UserPublic


class SessionListed(SessionPublic):
    """A login; `current` if this request came by it."""

    current: bool


class TaskCreate(Body):
    """A whole task, for POST and PUT: what is absent gets its default."""

    model_config = example(title="Buy milk", priority="high", due_date="2030-01-31")
    title: Title
    """1–200 characters after trimming."""
    description: Text | None = None
    status: Status = "todo"
    completed: bool = False
    """Instead of status: true = done, false = todo."""
    priority: Priority = "medium"
    due_date: Time | None = None
    """RFC 3339; a naive time is UTC, a bare date the end of that day."""

    @pydantic.model_validator(mode="after")
    def settle_status(self) -> Self:
        """Turn `completed` into `status`; both and contradictory is an error."""
        if "completed" in self.model_fields_set:
            if "status" not in self.model_fields_set:
                self.status = "done" if self.completed else "todo"  # Now it counts as sent.
            if self.completed != (self.status == "done"):
                raise ValueError("status and completed contradict each other")
        return self


class TaskUpdate(TaskCreate):
    """A JSON merge patch (RFC 7396): what is absent stays, null clears description and due_date."""

    model_config = example(completed=True)
    title: Title = ""


class Collection(Schema, Generic[T]):
    """Described in its config, because Collection[TaskPublic] inherits no docstring."""

    model_config = {"json_schema_extra": {"description": "All, a page, or the changes."}}
    data: list[T]


class PageMeta(BaseModel):
    """Where a page stands."""

    page: int
    page_size: int
    total: int
    pages: int


class Page(Collection[T], Generic[T]):
    """One page; the Link header (RFC 8288) leads to the others."""

    meta: PageMeta


class PageQuery(Schema):
    """Paging. The highest page keeps OFFSET within 64 bits."""

    model_config = {"extra": "forbid"}
    page: int = pydantic.Field(1, ge=1, le=2**53)
    page_size: int = pydantic.Field(20, ge=1, le=100)


SortKey = Literal["created_at", "updated_at", "due_date", "priority", "status", "title"]


class TaskQuery(PageQuery):
    """Filters, all ANDed, and the order."""

    status: list[Status] = pydantic.Field([], max_length=3)
    """Repeatable."""
    priority: list[Priority] = pydantic.Field([], max_length=3)
    """Repeatable."""
    completed: bool | None = None
    search: Annotated[str, StringConstraints(min_length=1, max_length=200), Storable] | None = None
    """Substring of title or description, whatever the case, width or accents."""
    due_before: ToTime | None = None
    """Inclusive; a bare date is its end."""
    due_after: FromTime | None = None
    """Inclusive; a bare date is its beginning."""
    overdue: bool | None = None
    deleted: bool = False
    """true lists the trash."""
    sort: SortKey = "created_at"
    """due_date puts tasks without one last, both ways."""
    order: Literal["asc", "desc"] = "desc"


class AdminTaskQuery(TaskQuery):
    """The same filters, and the owner's id."""

    owner_id: Id | None = None


class Changes(Collection[TaskPublic]):
    """Changed tasks and tombstones, oldest change first."""

    next_since: int | str
    """Pass it back as `since`, as it is."""
    has_more: bool


class DayCount(BaseModel):
    """How many tasks were completed on a UTC day."""

    date: str
    count: int


class Statistics(Schema):
    """Counts over the caller's tasks, the trash left out."""

    total: int
    by_status: dict[Status, int]
    by_priority: dict[Priority, int]
    overdue: int
    due_in_7_days: int
    completion_rate: float
    """done / total, 0 to 1."""
    completed_per_day: list[DayCount]
    """The last 30 UTC days, today last."""


class Health(BaseModel):
    """Alive, and the database answers."""

    status: Literal["ok"] = "ok"


class HealthDetailed(Health):
    """Health, with figures."""

    version: str
    uptime_seconds: int
    database: dict[Literal["engine", "latency_ms"], str | float]
    live_connections: int
    last_cleanup: dict[str, int | datetime] | None


class ErrorBody(BaseModel):
    """What went wrong: `code` is stable, `message` is for people, `details` come only with 422."""

    code: str
    message: str
    request_id: str
    details: list[dict[Literal["field", "message"], str]] | None = None


class Error(BaseModel):
    """Every error."""

    error: ErrorBody


class TokenRequest(Schema):
    """The form of RFC 6749 §4.3.2 and §6."""

    grant_type: str = ""
    """`password` or `refresh_token`."""
    username: str = ""
    password: str = ""
    refresh_token: str = ""


class OAuthError(BaseModel):
    """An error of /auth/token, as OAuth 2 libraries read it. Ref: RFC 6749 §5.2."""

    error: str
    error_description: str


# ── 6 Passwords and tokens ──────────────────────────────────────────────────────────────────────
# Functions that know nothing of HTTP. A password is stored as bcrypt, slow on purpose; a token is
# 256 random bits, which nobody guesses, so SHA-256 is enough to make a stolen database useless.

API_TOKEN_PREFIX = "tsk_"
BCRYPT_COST = 12
UNKNOWN_USER_HASH = f"$2b${BCRYPT_COST}$" + "." * 53
"""What an unknown user's password is compared with, at the same cost. Nothing hashes to it."""
ISSUER = "onefile-tasks"
CLOCK_LEEWAY_SECONDS = 10
REQUIRED_CLAIMS = ["iss", "sub", "sid", "typ", "iat", "exp", "jti"]
PLACEHOLDER = re.compile(r"change.?(me|this|it)|your.?secret|secret.?key|example|insecure", re.I)
password_workers = ThreadPoolExecutor(os.cpu_count() or 1, "password")
"""Never more hashes at once than cores, and none in the event loop: one takes 0.2 s."""


async def run_bcrypt(work: Callable[[bytes, bytes], T], password: str, salt: bytes) -> T:
    """Hash or check beside the event loop, on 64 bytes made of all: bcrypt reads 72, and no NUL."""
    digest = hashlib.sha256(b"onefile-tasks " + unicodedata.normalize("NFKC", password).encode())
    known = digest.hexdigest().encode()
    return await asyncio.get_running_loop().run_in_executor(password_workers, work, known, salt)


async def hash_password(password: str) -> str:
    """Salted bcrypt of 2^BCRYPT_COST rounds."""
    return (await run_bcrypt(bcrypt.hashpw, password, bcrypt.gensalt(BCRYPT_COST))).decode()


def token_hash(token: str) -> str:
    """SHA-256, hexadecimal: all that the database knows of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def encode_access_token(user_id: int, session_id: int) -> str:
    """A JWT for one session. Ref: RFC 7519; RFC 9068 §2.2."""
    issued = int(now().timestamp())
    claims: Row = {"iss": ISSUER, "sub": str(user_id), "sid": str(session_id), "typ": "access"}
    claims |= {"iat": issued, "exp": issued + settings.access_token_minutes * 60}
    return jwt.encode({**claims, "jti": secrets.token_hex(8)}, settings.secret_key, "HS256")


@functools.lru_cache(maxsize=4096)
def decode_access_token(token: str, secret_key: str) -> tuple[int, int, int] | None:
    """User id, session id and expiry in Unix seconds of a token of ours, expired or not."""
    # now() compares the times, not PyJWT, so that one clock rules and a test can set it.
    options: Any = {"require": REQUIRED_CLAIMS, "verify_exp": False, "verify_iat": False}
    with suppress(jwt.PyJWTError, ValueError, TypeError):
        claims = jwt.decode(token, secret_key, ["HS256"], options, issuer=ISSUER)
        times = (claims["iat"], claims["exp"])
        if claims["typ"] == "access" and all(isinstance(each, int) for each in times):
            return int(claims["sub"]), int(claims["sid"]), claims["exp"]
    return None


def load_secret_key(path: Path) -> str:
    """SECRET_KEY, or the one that was generated at first and kept here. Errors: SystemExit."""
    if not settings.secret_key and not path.exists():
        path.touch(0o600)
        path.write_text(secrets.token_urlsafe(32))
    key = settings.secret_key or path.read_text(errors="replace").strip()
    if len(key.encode()) < 32 or len(set(key)) < 8 or PLACEHOLDER.search(key):  # RFC 7518 §3.2
        raise SystemExit("SECRET_KEY: must be 32 random bytes or more; empty, it is generated")
    return key


# ── 7 Who asks ──────────────────────────────────────────────────────────────────────────────────
# One statement finds the session, its user and the user's seq, for every request anew: so logout,
# disabling and role changes hold for the very next request, in every process. Only the check of a
# token's signature is remembered.

USE_SECONDS = 60  # How exactly it is known when a session was last used.
WHO_ASKS = """
SELECT users.id, username, email, role, is_active, users.created_at, seq, scope,
    sessions.id AS session_id, sessions.created_at AS session_created_at, last_used_at
FROM sessions JOIN users ON users.id = sessions.user_id
WHERE (sessions.id = :session_id AND user_id = :user_id OR token_hash = :token_hash)
    AND expires_at > :now AND is_active"""


class Exchange:
    """What is gathered during one request or socket, for its answer and its line in the log."""

    def __init__(self, scope: Scope) -> None:
        self.request_headers = Headers(scope=scope)
        # A Link repeats it, between < and >.
        self.query_string = scope["query_string"].decode("latin-1").replace(">", "%3E")
        given = re.fullmatch(r"[A-Za-z0-9._-]{1,64}", self.request_headers.get("x-request-id", ""))
        self.request_id = given[0] if given else secrets.token_hex(8)
        self.address: str = (scope.get("client") or ["local"])[0]  # TRUSTED_PROXIES may name it.
        self.authorization = self.request_headers.get("authorization", "")
        self.user = "anonymous"
        self.max_body_bytes = settings.max_body_kib * 1024
        self.headers: dict[str, str] = {}  # Of an answer that is no error.
        self.limit_headers: dict[str, str] = {}  # Of any answer.
        self.remaining = math.inf


def etag_matches(header: str, etag: str) -> bool:
    """Whether a header is `*` or names this ETag. Weak ones count, for proxies weaken them."""
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag.removeprefix("W/") in tags


class Caller(UserPublic):
    """Who asks: a user, the session or API token that they came by, and their request."""

    seq: int
    scope: TokenScope | None
    """Of an API token; None for a login."""
    session_id: int
    session_created_at: datetime
    last_used_at: datetime
    exchange: Any = pydantic.Field(None, exclude=True)

    async def read(self, sql: str, quick: bool = False, **values: Any) -> list[Any]:
        """All rows of a statement; :user_id and :now are always there. Errors: 503 too_slow."""
        return await database.read(self.id, sql, quick, **values)

    def answer_with(self, **headers: str) -> None:
        """Put headers on the answer; Last_Modified stands for Last-Modified."""
        self.exchange.headers |= {name.replace("_", "-"): text for name, text in headers.items()}

    def offer_etag(self, etag: str) -> None:
        """Put an ETag on the answer. Errors: 304, if that is known. Ref: RFC 9110 §13.1.2."""
        self.answer_with(ETag=etag)
        if etag_matches(self.exchange.request_headers.get("if-none-match", ""), etag):
            raise ApiError(304, "not_modified", "")


CALLER = pydantic.TypeAdapter(Caller)


async def find_caller(user_id: int, session_id: int, api_token: str = "") -> Caller | None:
    """The living session of these ids, or of this API token's hash, and its user."""
    this = {"user_id": user_id, "session_id": session_id, "token_hash": api_token}
    rows = await database.lookup(WHO_ASKS, now=now(), **this)
    return CALLER.validate_python(rows[0]) if rows else None


async def note_use(session_id: int) -> None:
    """Note that a session is used now, unless the database cannot be written."""
    with suppress(*database.failures):
        async with database.transaction() as db:
            await db.fetch("UPDATE sessions SET last_used_at = :now WHERE id = :id", id=session_id)


async def authenticate(authorization: str) -> Caller:
    """Whom an Authorization header names. Errors: 401, with the next step. Ref: RFC 6750 §2.1."""
    scheme, _, token = authorization.partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer":
        raise ApiError(401, "not_authenticated", "Send the header Authorization: Bearer <token>.")
    if token.startswith(API_TOKEN_PREFIX):
        caller = await find_caller(0, 0, token_hash(token))
    else:
        # Ours are shorter; of what is remembered as no token, this is enough.
        access = decode_access_token(token[:1000], settings.secret_key)
        if access is None:
            raise ApiError(401, "invalid_token", "This is no token of this server: log in.")
        user_id, session_id, expires_at = access
        if expires_at + CLOCK_LEEWAY_SECONDS <= now().timestamp():
            raise ApiError(401, "token_expired", "This token has expired: refresh, or log in.")
        caller = await find_caller(user_id, session_id)
    if caller is None:
        raise ApiError(401, "session_ended", "This token's session has ended: log in.")
    if now() - caller.last_used_at > timedelta(seconds=USE_SECONDS):
        # It goes on if that takes longer: who reads waits for no disk that is busy.
        noting = asyncio.create_task(note_use(caller.session_id))
        await asyncio.wait([noting], timeout=0.1)
    return caller


# ── 8 Rate limits ───────────────────────────────────────────────────────────────────────────────
# SlowAPI's windows count by user, or by address when anonymous. CurrentUser counts by itself, so no
# route that takes one can forget it; a route for anybody shows `limited("login")`, or has no limit.
# With REDIS_URL all processes share the windows, and each falls back on its own without Redis.

REDIS_SECONDS = 0.1  # What Redis may cost a request, once.
REDIS_PAUSE_SECONDS = 1.0
PROCESS = secrets.token_hex(8)


class Redis:
    """What processes share besides the database: windows and bells. Nothing is lost without it."""

    well: bool | None = None
    windows: Any = None

    def set_well(self, well: bool, why: object) -> None:
        """Remember whether it is well: one line in the log each way."""
        if well is not self.well:
            log.warning("Redis %s: %s", "is well" if well else "fails", why)
        self.well = well

    async def attempt(self, work: Callable[..., Awaitable[T]], *values: Any) -> T | None:
        """What the work gives within 100 ms. None if Redis is not well, or fails."""
        if self.well:
            try:
                async with asyncio.timeout(REDIS_SECONDS):
                    return await work(*values)
            except Exception as error:
                self.set_well(False, repr(error))
        return None

    def connect(self) -> None:
        """Two clients, which connect when they are asked. Errors: ValueError."""
        redis_py: Any = importlib.import_module("redis.asyncio")
        # Its own timeouts lose a cancellation in Python 3.11; asyncio.timeout does not.
        self.client: Any = redis_py.from_url(settings.redis_url, socket_timeout=None)
        self.channel = f"onefile-tasks-{token_hash(settings.secret_key)[:16]}"
        options: Row = {"socket_timeout": REDIS_SECONDS, "socket_connect_timeout": REDIS_SECONDS}
        store = limits.storage.RedisStorage(settings.redis_url, key_prefix=self.channel, **options)
        self.windows = limits.strategies.MovingWindowRateLimiter(store)

    def hear(self, bell: Row) -> None:
        """Ring here what another process announces."""
        process, user_id, seq, client_id = bell["data"].decode().split(" ")
        if process != PROCESS:
            broadcaster.ring(int(user_id), int(seq), client_id)

    async def listen(self) -> None:
        """Hear the bells of other processes, until Redis fails, here or in a request."""
        try:
            self.connect()
            async with self.client, self.client.pubsub() as bells:
                async with asyncio.timeout(REDIS_SECONDS):
                    await bells.subscribe(**{self.channel: self.hear})
                    await asyncio.to_thread(self.windows.test, settings.rate_limit_read, "nobody")
                self.set_well(True, "limits and live updates are shared")
                while self.well:  # pragma: no branch: 3.11 does not trace what a timeout resumes.
                    await bells.get_message(timeout=REDIS_PAUSE_SECONDS)
        except Exception as error:
            self.set_well(False, repr(error))


limiter = Limiter(lambda: "", strategy="moving-window").limiter  # Its keys are given by hand.
redis = Redis()


def exchange_of(connection: HTTPConnection) -> Exchange:
    """The exchange that section 10 began."""
    return cast(Exchange, connection.scope["exchange"])


CurrentExchange = Annotated[Exchange, Depends(exchange_of)]


def address_key(exchange: Exchange) -> str:
    """What counts as one address: an IPv4 address, or an IPv6 customer's /64. Ref: RFC 6177."""
    address = exchange.address.partition("%")[0].removeprefix("::ffff:")
    with suppress(ValueError):  # What is not IPv6 stays as it is.
        address = str(ipaddress.IPv6Network(f"{address}/64", strict=False))
    return address


def count_in(windows: Any, counts: bool, limit: Any, *key: str) -> tuple[bool, float, int]:
    """Count, or only look: whether it is allowed, when the window resets, how many remain."""
    if windows.get_window_stats(limit, *key).reset_time > time.time() + limit.get_expiry() + 1:
        windows.clear(limit, *key)  # The clock went back: this window would stay full.
    allowed = windows.hit(limit, *key) if counts else windows.test(limit, *key)
    return allowed, *windows.get_window_stats(limit, *key)


async def count(exchange: Exchange, name: str, key: str, counts: bool = True) -> None:
    """Count against RATE_LIMIT_<name>, or only look. Errors: 429. Ref: RFC 6585 §4."""
    if settings.rate_limits == "off":
        return
    limit: limits.RateLimitItem = getattr(settings, f"rate_limit_{name}")
    window = (counts, limit, name, key)
    shared = await redis.attempt(asyncio.to_thread, count_in, redis.windows, *window)
    allowed, reset, remaining = shared or count_in(limiter, *window)
    reset = min(reset, time.time() + limit.get_expiry())  # Also if the clock went back.
    seconds = max(1, math.ceil(reset - time.time()))
    if remaining <= exchange.remaining:
        exchange.remaining = remaining
        figures = {"Limit": limit.amount, "Remaining": remaining, "Reset": math.ceil(reset)}
        exchange.limit_headers = {f"X-RateLimit-{each}": str(n) for each, n in figures.items()}
    if not allowed:
        message = f"Too many requests. Try again in {seconds} s."
        raise ApiError(429, "rate_limited", message, {"Retry-After": str(seconds)})


def limited(name: str) -> Any:
    """For a route's `dependencies`: count its callers by address against RATE_LIMIT_<name>."""

    async def count_address(exchange: CurrentExchange) -> None:
        """Count a request as this, and as a write. Errors: 429."""
        await count(exchange, name, address_key(exchange))
        await count(exchange, "write", address_key(exchange))

    return Depends(count_address)


class Authentication(OAuth2PasswordBearer):
    """The dependency behind CurrentUser, which /docs shows as the way to log in."""

    async def __call__(self, request: HTTPConnection) -> Caller:  # type: ignore[override]
        """Who asks, counted by user or address. Errors: 401; 403 insufficient_scope; 429."""
        exchange = exchange_of(request)
        limit = "read" if request.scope["method"] in ("GET", "WEBSOCKET") else "write"
        try:
            caller = await authenticate(exchange.authorization)
        except ApiError:
            await count(exchange, limit, address_key(exchange))
            raise
        caller.exchange = exchange
        exchange.user = f"user {caller.id}"
        await count(exchange, limit, exchange.user)
        if caller.scope == "read" and limit == "write":
            raise ApiError(403, "insufficient_scope", "This API token may only GET.")
        return caller


TOKEN_URL = f"{settings.root_path}{API}/auth/token"
LOGIN_HINT = "Your username and password. Leave client_id and client_secret empty."
login = Authentication(TOKEN_URL, "login", description=LOGIN_HINT, refreshUrl=TOKEN_URL)
CurrentUser = Annotated[Caller, Depends(login)]


async def logged_in_user(user: CurrentUser) -> Caller:
    """Who asks, by a login: a leaked API token shall not reach the account. Errors: 401; 403."""
    if user.scope:
        raise ApiError(403, "insufficient_scope", "An API token may not do this: log in.")
    return user


LoggedInUser = Annotated[Caller, Depends(logged_in_user)]


async def recent_user(user: LoggedInUser) -> Caller:
    """Who asks, by a fresh login. Errors: 401; 403 login_again."""
    if now() - user.session_created_at > timedelta(minutes=10):
        raise ApiError(403, "login_again", "Log in again: this needs a session of under 10 min.")
    return user


RecentUser = Annotated[Caller, Depends(recent_user)]


async def admin_user(user: LoggedInUser) -> Caller:
    """Who asks, an admin by a login. Errors: 401; 403 admin_required."""
    if user.role != "admin":
        raise ApiError(403, "admin_required", "Only an admin may do this.")
    return user


AdminUser = Annotated[Caller, Depends(admin_user)]

# ── 9 Live updates ──────────────────────────────────────────────────────────────────────────────
# One number per user. A write takes the next seq in its transaction, and after the commit rings its
# user's bell. A stream is a cursor that sleeps until the bell tells a later seq, then reads what it
# missed. No queue per connection: whoever falls behind, by one change or a thousand, catches up.

MAX_STREAMS_PER_USER = 50
RESYNC = '{"type":"resync_required"}'
LOOK_SECONDS = 2.0  # How late a stream notices a logout, or a change that no bell told of.
SEND_SECONDS = 20.0
WEBHOOK_PAUSES = (0, 1, 10, 60)  # Seconds before each try.

CHANGES_AFTER = f"""
SELECT users.seq AS seq, purged_seq, {TASK_COLUMNS}
FROM users LEFT JOIN tasks ON owner_id = users.id AND version > :since
WHERE users.id = :user_id ORDER BY version LIMIT :limit"""


class Missed(NamedTuple):
    """A user's numbers at one moment, and their tasks that changed after a cursor, oldest first."""

    seq: int
    purged_seq: int
    tasks: list[TaskPublic]
    cursor: int
    """The next one; less than seq, if there is more."""

    def stale(self, since: int, known_purge: int = 0) -> bool:
        """Whether who has seen `since`, and knows of that purge, missed a deletion for ever."""
        missed_purge = 0 < since < self.purged_seq and self.purged_seq != known_purge
        return missed_purge or since > self.seq


async def changes_after(user_id: int, since: int, limit: int) -> Missed:
    """What changed after a cursor, deletions included. Errors: 401 if the user is gone; 503."""
    rows = await database.read(user_id, CHANGES_AFTER, since=since, limit=limit + 1)
    if not rows:
        raise ApiError(401, "session_ended", "This account is gone.")
    tasks = TASK_LIST.validate_python([row for row in rows[:limit] if row["id"]])
    seq = rows[0]["seq"]
    cursor = tasks[-1].version if len(rows) > limit else seq
    return Missed(seq, rows[0]["purged_seq"], tasks, cursor)


def live_event(task: TaskPublic) -> ServerSentEvent:
    """A task as the change that left it so. One that nobody has changed since is `created`."""
    kind = "created" if task.updated_at == task.created_at else "updated"
    if task.deleted_at:
        kind = "deleted"
    text = f'{{"type":"{kind}","seq":{task.version},"task":{task.model_dump_json()}}}'
    return ServerSentEvent(event=kind, raw_data=text, id=str(task.version))


class Broadcaster:
    """The open streams of this process by user, and the reads that they share, by cursor."""

    def __init__(self) -> None:
        self.streams: WeakValueDictionary[int, set[Stream]] = WeakValueDictionary()
        self.reads: dict[int, dict[int, asyncio.Task[tuple[Missed, list[ServerSentEvent]]]]] = {}

    def everybody(self) -> list["Stream"]:
        """The open streams of all users."""
        return [stream for streams in self.streams.values() for stream in streams]

    def ring(self, user_id: int, seq: int, client_id: str = "") -> None:
        """Tell a user's streams of news up to this seq; end what a client_id has replaced."""
        self.reads.pop(user_id, None)  # They began before it: who wakes now reads anew.
        for stream in self.streams.get(user_id, ()):
            if seq > stream.cursor:
                stream.wake.set()
            if client_id and stream.client_id == client_id:
                stream.close(4409, "replaced by a newer connection")

    async def announce(self, user_id: int, seq: int, client_id: str = "") -> None:
        """Ring in every process."""
        bell = f"{PROCESS} {user_id} {seq} {client_id}"
        if redis.well:
            await redis.attempt(redis.client.publish, redis.channel, bell)
        self.ring(user_id, seq, client_id)

    async def look(self) -> None:
        """Close the streams whose session has ended, and notice what no bell told of."""
        for stream in self.everybody():
            caller = await find_caller(stream.user.id, stream.user.session_id)
            if caller is None:
                stream.close(4401, "the session has ended")
            else:
                self.ring(caller.id, caller.seq)

    async def read(self, user_id: int, cursor: int) -> tuple[Missed, list[ServerSentEvent]]:
        """One batch after a cursor, encoded. Errors: 401; 503."""
        missed = await changes_after(user_id, cursor, limit=100)
        return missed, [live_event(task) for task in missed.tasks]

    async def shared_read(self, user_id: int, cursor: int) -> tuple[Missed, list[ServerSentEvent]]:
        """The same, done once for all streams that ask for it meanwhile."""
        reads = self.reads.setdefault(user_id, {})
        if cursor not in reads:
            reads[cursor] = asyncio.create_task(self.read(user_id, cursor))
            reads[cursor].add_done_callback(lambda _: reads.pop(cursor))
        return await asyncio.shield(reads[cursor])


broadcaster = Broadcaster()
STREAMS.set_function(lambda: len(broadcaster.everybody()))


class Stream:
    """One live connection: a cursor into its user's changes."""

    def __init__(self, user: Caller, client_id: str, start: Missed, since: int) -> None:
        self.user = user
        self.client_id = client_id
        self.stale = start.stale(since)
        self.cursor = start.seq if self.stale else since
        self.known_purge = start.purged_seq
        self.wake = asyncio.Event()
        self.end: tuple[int, str] | None = None

    def close(self, code: int, reason: str) -> None:
        """End with a WebSocket close code; the first one stands."""
        self.end = self.end or (code, reason)
        self.wake.set()

    async def missed(self) -> list[ServerSentEvent]:
        """What was not sent yet, a batch at a time."""
        try:
            missed, events = await broadcaster.shared_read(self.user.id, self.cursor)
        except (ApiError, *database.failures):  # The next look rings again.
            return []
        if missed.stale(self.cursor, self.known_purge):
            self.cursor = missed.seq
            return [ServerSentEvent(event="resync_required", raw_data=RESYNC, id=str(missed.seq))]
        self.cursor = missed.cursor
        if missed.cursor < missed.seq:  # Then there is no reason to sleep.
            self.wake.set()
        return events

    async def events(self) -> AsyncIterator[ServerSentEvent]:
        """Everything after the cursor, in seq order, none twice, until closed."""
        while not self.end:
            for event in await self.missed():
                yield event
            await self.wake.wait()
            self.wake.clear()


@asynccontextmanager
async def open_stream(user: Caller, since: int | None, client_id: str) -> AsyncIterator[Stream]:
    """A registered stream; it replaces the user's one with the same client_id. Errors: 429."""
    # A commit between this and its first read is found by that, for it comes after the cursor.
    start = await changes_after(user.id, MAX_ID, 1)  # No task: only the user's numbers.
    stream = Stream(user, client_id, start, start.seq if since is None else since)
    if client_id:
        await broadcaster.announce(user.id, 0, client_id)
    streams = broadcaster.streams.setdefault(user.id, set())
    if sum(not other.end for other in streams) >= MAX_STREAMS_PER_USER:
        message = f"You have {MAX_STREAMS_PER_USER} streams open. Close one."
        raise ApiError(429, "too_many_streams", message, {"Retry-After": "60"})
    streams.add(stream)
    try:
        yield stream
    finally:
        streams.discard(stream)


FIND_TASK = f"""
SELECT {TASK_COLUMNS} FROM tasks
WHERE id = :id AND owner_id = :user_id AND (deleted_at IS NOT NULL) = :trash"""
FIND_BY_KEY = f"""
SELECT {TASK_COLUMNS} FROM tasks
WHERE owner_id = :owner_id AND idempotency_key = :idempotency_key"""
CHANGED_COLUMNS = [name for name in Task.model_fields if name not in ("id", "idempotency_key")]
UPDATE_TASK = f"""
UPDATE tasks SET {", ".join(f"{name} = :{name}" for name in CHANGED_COLUMNS)}
WHERE id = :id RETURNING {TASK_COLUMNS}"""
GROW_STORAGE = """
UPDATE users SET storage_bytes = storage_bytes + :size
WHERE id = :user_id RETURNING storage_bytes"""


class Replayed(Exception):
    """With the task that its Idempotency-Key has created before: take no seq, write nothing."""


def text_bytes(task: Row) -> int:
    """What a task's texts count against the storage of its owner."""
    texts = (task["title"], task["description"] or "")
    return sum(len(text.encode()) + len(folded(text).encode()) for text in texts)


def insist_on_room(storage_bytes: int, size: int) -> None:
    """Errors: 413 storage_full, if `size` more bytes are too many."""
    if size > 0 and storage_bytes > settings.max_storage_mib * MIB:
        message = f"Your tasks and attachments may take {settings.max_storage_mib} MiB."
        raise ApiError(413, "storage_full", message)


class Change:
    """A transaction that changes one task of a user, at the seq that it took."""

    def __init__(self, db: Transaction, user: Caller, counted_bytes: int) -> None:
        self.db = db
        self.user = user
        self.counted_bytes = counted_bytes  # Bytes that the user's storage has grown by already.
        self.moment = now()
        self.written: TaskPublic | None = None

    async def find(self, kind: str, sql: str, key: int, if_match: str | None, **more: Any) -> Row:
        """The caller's row of this id. Errors: 404 absent or not yours; 412 stale version."""
        row: Row = only(await self.db.fetch(sql, id=key, user_id=self.user.id, **more), kind, key)
        version = f'"{row["version"]}"'
        if if_match is not None and not etag_matches(if_match, version):
            message = f"The {kind} is at version {version} now."
            if '"' not in if_match:
                message = f"If-Match wants quotes: {version}"
            raise ApiError(412, "version_mismatch", message)
        return row

    async def task(self, key: int, if_match: str | None = None, trash: bool = False) -> TaskPublic:
        """One task, in the trash or out of it. Errors: 404; 412."""
        return TASK.validate_python(await self.find("task", FIND_TASK, key, if_match, trash=trash))

    async def create(self, values: Row) -> TaskPublic:
        """A new task. Errors: 413; Replayed, with the task that its idempotency_key made before."""
        columns = {"owner_id": self.user.id, "attachments": 0, "created_at": self.moment, **values}
        self.derive(columns)
        await self.grow(columns["text_bytes"] - self.counted_bytes)
        rows = await self.db.insert("tasks", **columns)
        if not rows:
            rows = await self.db.fetch(FIND_BY_KEY, **columns)
            raise Replayed(TASK.validate_python(rows[0]))
        self.written = TASK.validate_python(rows[0])
        return self.written

    async def update(self, task: TaskPublic, values: Row) -> TaskPublic:
        """New values of one task. Errors: 413."""
        before = task.model_dump()
        columns = before | values
        self.derive(columns)
        await self.grow(columns["text_bytes"] - text_bytes(before))
        rows = await self.db.fetch(UPDATE_TASK, **columns)
        self.written = TASK.validate_python(rows[0])
        return self.written

    def derive(self, columns: Row) -> None:
        """Set what follows from a task's other columns, and its version."""
        columns["completed"] = columns["status"] == "done"
        completed_at = columns.get("completed_at") or self.moment
        columns["completed_at"] = completed_at if columns["completed"] else None
        columns["title_key"] = folded(columns["title"])
        columns["description_key"] = folded(columns["description"] or "")
        columns["text_bytes"] = text_bytes(columns)
        columns["version"] = self.user.seq
        columns["updated_at"] = self.moment

    async def grow(self, size: int) -> None:
        """Count bytes against the owner's storage. Errors: 413."""
        if size:
            rows = await self.db.fetch(GROW_STORAGE, user_id=self.user.id, size=size)
            insist_on_room(rows[0]["storage_bytes"], size)


TAKE_SEQ = """
UPDATE users SET seq = seq + 1, storage_bytes = storage_bytes + :size
WHERE id = :user_id AND is_active AND EXISTS (
    SELECT 1 FROM sessions WHERE id = :session_id AND user_id = :user_id AND expires_at > :now)
RETURNING seq, storage_bytes"""


@asynccontextmanager
async def changing(user: Caller, size: int = 0) -> AsyncIterator[Change]:
    """Take the user's next seq, if their session still lives; after the commit, tell of it.

    `size` is how many bytes it adds to their storage, as far as known. Errors: 401; 413
    """
    async with database.transaction(user.id) as db:
        rows = await db.fetch(TAKE_SEQ, user_id=user.id, session_id=user.session_id, size=size)
        if not rows:
            raise ApiError(401, "session_ended", "Your session has ended meanwhile: log in.")
        user.seq = rows[0]["seq"]
        user.answer_with(ETag=f'"{user.seq}"')  # The version of what is written now.
        change = Change(db, user, size)
        yield change
        insist_on_room(rows[0]["storage_bytes"], size)  # Replayed has left before: it adds nothing.
    tell_webhook(change.written)
    await broadcaster.announce(user.id, user.seq)


PURGE_USER = """
UPDATE users SET seq = seq + 1, storage_bytes = storage_bytes - size,
    purged_seq = CASE WHEN newest > purged_seq THEN newest ELSE purged_seq END
FROM (
    SELECT max(version) AS newest, coalesce(sum(text_bytes + (
        SELECT coalesce(sum(size_bytes), 0) FROM attachments WHERE task_id = tasks.id)), 0) AS size
    FROM tasks WHERE owner_id = :user_id AND deleted_at <= :until) AS trash
WHERE users.id = :user_id RETURNING seq"""
PURGE_TASKS = "DELETE FROM tasks WHERE owner_id = :user_id AND deleted_at <= :until RETURNING id"


async def purge(user_id: int, until: datetime) -> int:
    """Delete a user's trash up to a moment for good. Returns how many tasks went."""
    async with database.transaction(user_id) as db:
        users = await db.fetch(PURGE_USER, user_id=user_id, until=until)
        purged = await db.fetch(PURGE_TASKS, user_id=user_id, until=until)
    await broadcaster.announce(user_id, users[0]["seq"] if users else 0)
    return len(purged)


webhook_calls: set[asyncio.Task[None]] = set()


def tell_webhook(task: TaskPublic | None) -> None:
    """Post a change to WEBHOOK_URL, unless too many wait; never in the way of what caused it."""
    if task and settings.webhook_url and len(webhook_calls) < 2000:
        call = asyncio.create_task(call_webhook(str(live_event(task).raw_data)))
        webhook_calls.add(call)
        call.add_done_callback(webhook_calls.discard)


@functools.cache
def certificates() -> Any:
    """Whom HTTPS trusts. To load them takes 20 ms, for each client if it is not told."""
    return importlib.import_module("httpx").create_ssl_context()


async def call_webhook(text: str) -> None:
    """Four signed tries with one id, so that a repeat can be dropped. Ref: Standard Webhooks."""
    import httpx
    from standardwebhooks import Webhook

    key = f"msg_{secrets.token_hex(12)}"
    for pause in WEBHOOK_PAUSES:
        await asyncio.sleep(pause)
        moment = datetime.now(UTC)
        signature = Webhook(settings.webhook_secret).sign(key, moment, text)
        headers = {"webhook-id": key, "webhook-timestamp": str(int(moment.timestamp()))}
        headers |= {"webhook-signature": signature, "content-type": "application/json"}
        with suppress(httpx.HTTPError, httpx.InvalidURL, OSError):
            async with asyncio.timeout(10), httpx.AsyncClient(verify=certificates()) as client:
                answer = await client.post(settings.webhook_url, content=text, headers=headers)
            if answer.is_success:
                return
    log.warning("the webhook did not take %s", key)


# ── 10 Application ──────────────────────────────────────────────────────────────────────────────
# Around everything lies one ASGI layer of ours. FastAPI's handlers run inside its middleware, so
# only the outermost layer can put an id on every answer, and turn whatever goes wrong into the
# envelope.

CLEANUP_SECONDS = 3600.0
MAX_SOCKET_BYTES = 64 * 1024
JSON_TYPE = "application/json"
LOG_TIME = "%Y-%m-%d %H:%M:%S"
DOCS_POLICY = """default-src 'self'; script-src 'self' 'unsafe-inline'; img-src 'self' data:;
style-src 'self' 'unsafe-inline'; worker-src blob:; frame-ancestors 'none'""".replace("\n", " ")
started_at = time.monotonic()
last_cleanup: dict[str, int | datetime] = {}


async def add_user(name: str, password: str, role: Role, email: str | None = None) -> UserPublic:
    """A new account. Errors: 409 username_taken."""
    columns: Row = {"username": name, "username_key": username_key(name), "email": email}
    columns |= {"role": role, "is_active": True, "password_hash": await hash_password(password)}
    zeros = {"seq": 0, "purged_seq": 0, "storage_bytes": 0}
    async with database.transaction() as db:
        rows = await db.insert("users", created_at=now(), **columns, **zeros)
    if not rows:
        raise ApiError(409, "username_taken", "This username is taken.")
    return UserPublic.model_validate(rows[0])


def checked(kind: Any, value: str, name: str) -> str:
    """A value that no request brought, checked as if one had. Errors: SystemExit that names it."""
    try:
        return str(pydantic.TypeAdapter(kind).validate_python(value))
    except pydantic.ValidationError as error:
        raise SystemExit(first_problem(error, name)) from None


@asynccontextmanager
async def opened_database() -> AsyncIterator[None]:
    """The database, open, with a secret key and an admin. Errors: SystemExit with one line."""
    given = settings.admin_password
    password = checked(Password, given or secrets.token_urlsafe(16), "ADMIN_PASSWORD")
    name = checked(Username, settings.admin_username, "ADMIN_USERNAME")
    try:
        await database.open()
    except (*database.failures, ValueError) as error:
        # A ValueError may quote the password.
        why = "no address" if isinstance(error, ValueError) else error
        setting = "DATABASE_URL" if settings.database_url else "DATA_DIR"
        raise SystemExit(f"{setting}: the database cannot be opened: {why}") from None
    try:
        settings.secret_key = load_secret_key(settings.data_dir / "secret_key")
        if not await database.lookup("SELECT id FROM users LIMIT 1"):
            with suppress(ApiError):  # Another process was faster.
                await add_user(name, password, "admin")
                shown = "as set" if given else f"{password}   (shown only now)"
                print(f"  Admin      {name}, password {shown}", flush=True)
        yield
    finally:
        await database.close()


async def clean_up() -> None:
    """Remove what has expired: sessions and refresh tokens; and trash older than TRASH_DAYS."""
    async with database.transaction() as db:
        sessions = await db.fetch("DELETE FROM sessions WHERE expires_at <= :now RETURNING id")
        tokens = await db.fetch("DELETE FROM refresh_tokens WHERE expires_at <= :now RETURNING id")
    oldest = now() - timedelta(days=settings.trash_days)
    sql = "SELECT DISTINCT owner_id FROM tasks WHERE deleted_at <= :until"
    owners = await database.read(0, sql, until=oldest)
    purged = sum([await purge(owner["owner_id"], oldest) for owner in owners])
    last_cleanup.update(tasks=purged, sessions=len(sessions), refresh_tokens=len(tokens))
    last_cleanup["finished_at"] = now()


async def every(seconds: float, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do it now, and again and again; after a failure the next turn tries anew."""
    while True:
        try:
            await work()
        except Exception as error:
            log.error("%s failed: %r", work.__name__, error)
        await asyncio.sleep(seconds)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Start: logging, database, chores. Stop: end the chores, finish the writes."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt=LOG_TIME)
    log.setLevel(settings.log_level.upper())
    chores: dict[Any, float] = {broadcaster.look: LOOK_SECONDS, clean_up: CLEANUP_SECONDS}
    if settings.redis_url:
        chores[redis.listen] = REDIS_PAUSE_SECONDS
    async with opened_database(), asyncio.TaskGroup() as group:
        running = [group.create_task(every(seconds, work)) for work, seconds in chores.items()]
        yield
        for task in (*running, *webhook_calls):
            task.cancel()


class Conversation:
    """The wire of one request or socket: `receive` measures a body, `send` completes an answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.exchange = Exchange(scope)
        self.raw_receive = receive
        self.raw_send = send
        self.announced_bytes = int(self.exchange.request_headers.get("content-length", 0))
        self.arrived_bytes = 0
        self.began = time.perf_counter()
        self.method = scope.get("method", "WEBSOCKET")
        self.scope = {**scope, "exchange": self.exchange}
        self.scope["method"] = "GET" if self.method == "HEAD" else self.method
        if scope["path"].endswith("/") and scope["path"].rstrip("/") != settings.root_path:
            self.scope["path"] = scope["path"][:-1] or "/"
        self.status = 0
        self.newline = b""

    async def receive(self) -> Message:
        """Measure a body, as announced and as it arrives. Errors: 413. Ref: RFC 9110 §15.5.14."""
        limit = self.exchange.max_body_bytes
        message = await self.raw_receive() if self.announced_bytes <= limit else {}
        self.arrived_bytes += len(message.get("body", b""))
        if max(self.announced_bytes, self.arrived_bytes) > limit:
            raise ApiError(413, "body_too_large", f"The body is larger than {limit // 1024} KiB.")
        return message

    async def send(self, message: Message) -> None:
        """Complete the headers, end JSON with a newline, stop a HEAD after its headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.complete_head(message)
        elif message["type"] == "http.response.body":
            message = {**message, "body": message.get("body", b"") + self.newline}
        else:
            self.status = message.get("code", 101)
        if message.get("more_body"):  # A stream, whose reader may have stopped reading.
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    await self.raw_send(message)
            except TimeoutError:
                raise ClientDisconnect from None
        else:
            await self.raw_send(message)
        if self.method == "HEAD":
            await self.raw_send({"type": "http.response.body"})
            raise ClientDisconnect  # Leaves the app; Gateway takes it for a client that left.

    def complete_head(self, message: Message) -> None:
        """Headers of every answer."""
        headers = MutableHeaders(scope=message)
        content_type = headers.get("content-type", "")
        if content_type == JSON_TYPE and "content-length" in headers:
            self.newline = b"\n"
            headers["content-length"] = str(int(headers["content-length"]) + 1)
        more = {"X-Request-ID": self.exchange.request_id, **self.exchange.limit_headers}
        more["X-Content-Type-Options"] = "nosniff"
        if "html" in content_type:
            more["Content-Security-Policy"] = DOCS_POLICY
        if self.status < 400:
            more |= self.exchange.headers
        if "/auth/" in self.scope["path"]:  # Tokens are for no cache. Ref: RFC 6749 §5.1
            more["Cache-Control"] = "no-store"
        headers.raw.extend((k.lower().encode(), v.encode("latin-1")) for k, v in more.items())

    async def fail(self, status: int, code: str, text: str) -> None:
        """Answer with the envelope, unless that is too late; uvicorn then ends the connection."""
        with suppress(OSError, RuntimeError, ClientDisconnect):
            if self.status == 0:
                answer = error_response(ApiError(status, code, text), self.exchange.request_id)
                await answer(self.scope, self.receive, self.send)

    def write_log(self) -> None:
        """Count, and one line. The path is percent-encoded, so that it cannot forge another."""
        took = time.perf_counter() - self.began
        route = getattr(self.scope.get("route"), "name", "none")
        REQUESTS.labels(route, self.status).observe(took)
        if log.isEnabledFor(logging.INFO):
            end = f"{self.status} {took * 1000:.1f} ms {self.exchange.user}"
            line = f"{self.exchange.request_id} {self.method} {quote(self.scope['path'])} {end}"
            # To hand it to logging would take a tenth of a short request's time.
            with suppress(OSError, ValueError):
                sys.stderr.write(f"{time.strftime(LOG_TIME)} INFO {line}\n")


class Gateway:
    """The outermost ASGI layer: what holds for every request and socket, whatever happens."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request, and turn a failure into an error with the request's id."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        wire = Conversation(scope, receive, send)
        try:
            await self.app(wire.scope, wire.receive, wire.send)
        except (ClientDisconnect, WebSocketDisconnect, WebSocketDisconnected):
            wire.status = wire.status or 499  # What proxies call it.
        except asyncio.CancelledError:
            await wire.fail(503, "server_stopping", "The server is stopping.")
        except database.failures as error:  # It does not answer, or its disk is full.
            log.error("%s the database failed: %r", wire.exchange.request_id, error)
            await wire.fail(503, "database_unavailable", "The database does not answer. Try again.")
        except Exception:
            log.exception("%s failed", wire.exchange.request_id)
            message = "Something failed here; the log knows more by this request_id."
            await wire.fail(500, "internal_error", message)
        finally:
            wire.write_log()


async def on_http_error(request: Request, error: Any) -> Response:
    """The framework's errors and ours, in the envelope. Ref: RFC 9110 §15.5.6."""
    if error.status_code == 404 and error.detail == "Not Found":
        error = ApiError(404, "not_found", "No such path. All of them stand in /docs.")
    elif error.status_code == 405:  # Starlette names the methods of one route, a path has several.
        path = request.scope["path"].removeprefix(settings.root_path) or "/"
        routes = [each for each in iter_route_contexts(app.routes) if each.path_regex.match(path)]
        methods = {name for each in routes for name in each.methods or ["GET"]}  # Files have none.
        if "GET" in methods:
            methods.add("HEAD")
        allow = ", ".join(sorted(methods))
        error = ApiError(405, "method_not_allowed", f"This path has: {allow}.", {"Allow": allow})
    elif error.detail == "There was an error parsing the body":
        error = ApiError(400, "invalid_json", "The body cannot be read.")
    return error_response(error, exchange_of(request).request_id)


async def on_validation_error(request: Request, error: Any) -> Response:
    """What FastAPI or pydantic refused: the first ten are the message. Errors: 400; 415; 422."""
    details = []
    for problem in error.errors():
        place = problem["loc"][1:] or problem["loc"]
        name = ".".join(map(str, place))[:100].encode("utf-8", "replace").decode()
        reason = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            reason = "is not known here"
        details.append({"field": name, "message": reason})
    text = "; ".join(f"{each['field']}: {each['message']}" for each in details[:10])
    answer = ApiError(422, "validation_failed", text, details=details)
    if error.errors()[0]["type"] == "json_invalid":
        answer = ApiError(400, "invalid_json", "The body is not valid JSON.")
    elif isinstance(error.body, bytes):  # FastAPI has parsed what is called JSON.
        message = "Send JSON: curl --json, or the header Content-Type: application/json."
        answer = ApiError(415, "unsupported_media_type", message)
    return error_response(answer, exchange_of(request).request_id)


DESCRIPTION = """Tasks for one or many people. Errors have one shape; besides what a route names,
any may answer 400 (broken JSON), 401, 403 (an API token of less scope), 413 (too large), 415 (no
JSON), 422, 429 and 503."""
TAGS = {
    "auth": "Accounts, logins, and tokens for scripts.",
    "users": "The caller's own account.",
    "tasks": "Tasks: lists, changes, the trash, live updates.",
    "attachments": "Files at tasks.",
    "admin": "Everybody's accounts and tasks, for admins.",
    "health": "For monitors.",
}
make_app: Callable[..., FastAPI] = FastAPIOffline if settings.docs == "on" else FastAPI
app = make_app(
    title="Onefile Tasks",
    version=VERSION,
    description=DESCRIPTION,
    openapi_tags=[{"name": name, "description": text} for name, text in TAGS.items()],
    openapi_url="/openapi.json" if settings.docs == "on" else None,
    root_path=settings.root_path,
    redirect_slashes=False,
    exception_handlers={HTTPException: on_http_error, RequestValidationError: on_validation_error},
    lifespan=lifespan,
)
if settings.cors_origins:  # No credentials: a token is no cookie. Ref: Fetch §3.3
    more: Any = {"allow_methods": ["*"], "allow_headers": ["*"], "expose_headers": ["*"]}
    app.add_middleware(CORSMiddleware, allow_origins=re.split(", ?", settings.cors_origins), **more)
app.add_middleware(Gateway)
if settings.trusted_proxies:  # Around Gateway: it corrects the caller's address, and nothing else.
    app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=settings.trusted_proxies)


@functools.cache
def describe() -> Row:
    """The OpenAPI schema: FastAPI's, the shape of errors, and the second way to say who asks."""
    schema = FastAPI.openapi(app)
    bearer = {"type": "http", "scheme": "bearer", "description": "An API token, or an access token"}
    schema["components"]["securitySchemes"]["bearer"] = bearer
    error = Error.model_json_schema(ref_template="#/components/schemas/{model}")
    schema["components"]["schemas"] |= error.pop("$defs") | {"Error": error}
    events = schema["paths"][f"{API}/tasks/events"]["get"]["responses"]["200"]["content"]
    events["text/event-stream"] = {"schema": {"type": "string"}}  # itemSchema is OpenAPI 3.2.
    for operation in [each for path in schema["paths"].values() for each in path.values()]:
        if "security" in operation:
            operation["security"].append({"bearer": []})
    return schema


app.openapi = describe  # type: ignore[method-assign]


class BoundedWebSocket(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket, dropping a peer that sends much: a flood of pongs would stop all."""

    room = MAX_SOCKET_BYTES
    minute_began = 0.0

    def data_received(self, data: bytes) -> None:
        """Some bytes of the peer's, at most MAX_SOCKET_BYTES in a minute."""
        if time.monotonic() - self.minute_began >= 60:
            self.minute_began = time.monotonic()
            self.room = MAX_SOCKET_BYTES
        super().data_received(data[: self.room])
        if len(data) > self.room:
            self.transport.close()
        self.room = max(0, self.room - len(data))


# ── 11 Routes ───────────────────────────────────────────────────────────────────────────────────
# One router a resource. A docstring is the route's description in /docs. A GET of a user counts
# against RATE_LIMIT_READ, the rest against RATE_LIMIT_WRITE; a docstring names what counts besides.

IfMatch = Annotated[str | None, Header()]
IfNew = Annotated[str | None, Header(alias="If-None-Match")]
Key = Annotated[str | None, Header(alias="Idempotency-Key", pattern=r"^[\x21-\x7e]{1,255}$")]
Since = Annotated[str, Query(pattern=r"^[0-9]{1,18}(~[0-9]{1,18})?$")]
ChangesLimit = Annotated[int, Query(ge=1, le=1000)]
LastEventId = Annotated[Cursor, Header(alias="Last-Event-ID")]
PolyfillsId = Annotated[Cursor, Query(alias="lastEventId")]
TokenForm = Annotated[TokenRequest, Form()]
BASE = settings.root_path + API


class TaskIdConvertor(StringConvertor):
    """What stands for a task in a path: 422, if it is no id; but these are paths of their own."""

    regex = "(?!changes$|events$|statistics$|trash$)[^/]+"


register_url_convertor("task_id", TaskIdConvertor())
# Without a model, of which FastAPI would make two for each route.
ERROR: Row = {"content": {JSON_TYPE: {"schema": {"$ref": "#/components/schemas/Error"}}}}
FAILURES = {"4XX": "The request is refused", "5XX": "The server failed"}
ERRORS: Row = {each: {"description": FAILURES[each], **ERROR} for each in FAILURES}
NOT_MODIFIED: Any = {304: {"description": "Unchanged: If-None-Match names its ETag"}}
REPLAYED: Any = {200: {"model": TaskPublic, "description": "Created before, by the same key"}}
REFUSAL: Any = {400: {"model": OAuthError}}
ROUTER: Any = {"responses": ERRORS, "generate_unique_id_function": lambda route: route.name}
tasks = APIRouter(prefix=f"{API}/tasks", tags=["tasks"], **ROUTER)
TRASH = {True: "deleted_at IS NOT NULL", False: "deleted_at IS NULL"}
FILTERS = {
    "owner_id": "owner_id = :owner_id",
    # The wanted ones arrive joined by commas: "todo,done".
    "status": ":status LIKE '%' || status || '%'",
    "priority": ":priority LIKE '%' || priority || '%'",
    "completed": "completed = :completed",
    "search": "(title_key LIKE :search ESCAPE '!' OR description_key LIKE :search ESCAPE '!')",
    "due_before": "due_date <= :due_before",
    "due_after": "due_date >= :due_after",
    "overdue": "(NOT completed AND due_date IS NOT NULL AND due_date < :now) = :overdue",
}
SORT_KEYS = {  # Where it is not the column itself.
    "due_date": "due_date IS NULL, due_date",
    "priority": "CASE priority WHEN 'low' THEN 0 WHEN 'medium' THEN 1 ELSE 2 END",
    "status": "CASE status WHEN 'todo' THEN 0 WHEN 'in_progress' THEN 1 ELSE 2 END",
    "title": "title_key",
}
TaskPage = Page[TaskPublic]


async def page_of(user: Caller, path: str, query: PageQuery, sql: str, **values: Any) -> Any:
    """A page of rows that carry their total, with its Link header. Ref: RFC 8288. Errors: 503."""
    sql += " LIMIT :limit OFFSET :offset"
    size = query.page_size
    quick = "search" not in values  # To compare one long text may take milliseconds.
    rows = await user.read(sql, quick, limit=size, offset=(query.page - 1) * size, **values)
    # Past the end, the first page knows the total.
    counted = rows or await user.read(sql, limit=1, offset=0, **values)
    total = counted[0]["total"] if counted else 0
    pages = max(1, math.ceil(total / size))
    places = {"first": 1, "prev": min(query.page - 1, pages), "next": query.page + 1, "last": pages}
    kept = re.sub("&page=[^&]*", "", f"&{user.exchange.query_string}").rstrip("&")
    url = f"{BASE}{path}?page="
    links = [f'<{url}{n}{kept}>; rel="{name}"' for name, n in places.items() if 1 <= n <= pages]
    user.answer_with(Link=", ".join(links))
    return {"data": rows, "meta": {**dict(query), "total": total, "pages": pages}}


async def page_of_tasks(user: Caller, path: str, query: TaskQuery, **more: Any) -> TaskPage:
    """One page of tasks. Ties break by id, so that pages never overlap. Errors: 503 too_slow."""
    values = query.model_dump(include=set(FILTERS), exclude_defaults=True) | more
    where = " AND ".join([FILTERS[name] for name in values] + [TRASH[query.deleted]])
    sort_key = SORT_KEYS.get(query.sort, query.sort)
    sql = f"""
SELECT {TASK_COLUMNS}, (SELECT count(*) FROM tasks WHERE {where}) AS total
FROM tasks WHERE {where} ORDER BY {sort_key} {query.order}, id {query.order}"""
    for name in values.keys() & {"status", "priority"}:
        values[name] = ",".join(values[name])
    if query.search:
        values["search"] = "%" + re.sub("([!%_])", r"!\1", folded(query.search)) + "%"
    return TaskPage.model_validate(await page_of(user, path, query, sql, **values))


def parse_query(request: Request) -> TaskQuery:
    """The filters of a list, all at once: FastAPI takes them one by one, for 70 µs. Errors: 422."""
    given = request.query_params
    lists = {name: given.getlist(name) for name in given.keys() & {"status", "priority"}}
    try:
        return TaskQuery.model_validate({**given, **lists})
    except pydantic.ValidationError as error:
        problems = [{**each, "loc": ("query", *each["loc"])} for each in error.errors()]
        raise RequestValidationError(problems) from None


cached_pages: dict[tuple[int, bytes], tuple[int, bytes, str]] = {}
"""By user and query: the user's seq, the page encoded, its Link. Right as long as the seq stays."""
MAX_CACHED_PAGES = 1000
FIELDS = TaskQuery.model_json_schema()["properties"]  # What `parse_query` reads, for /docs.
QUERY = {"parameters": [{"name": name, "in": "query", "schema": FIELDS[name]} for name in FIELDS]}


@tasks.get("", response_model=TaskPage, responses=NOT_MODIFIED, openapi_extra=QUERY)
async def list_tasks(user: CurrentUser, request: Request) -> Response:
    """The caller's tasks, newest first: filters are ANDed. No ETag with `overdue`: time changes it.

    Errors: 503 too_slow
    Ref: RFC 8288; RFC 9110 §13.1.2
    """
    key = (user.id, request.scope["query_string"])
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    seq, body, link = cached_pages.get(key, (-1, b"", ""))
    query = parse_query(request) if seq != user.seq else None
    timeless = query is None or query.overdue is None
    if timeless:
        user.offer_etag(f'W/"{user.seq}-{digest[:16]}"')
    if query:
        page = await page_of_tasks(user, "/tasks", query, owner_id=user.id)
        body = page.model_dump_json().encode()
        link = user.exchange.headers["Link"]
        if len(cached_pages) >= MAX_CACHED_PAGES:
            cached_pages.clear()
        if timeless and len(body) + len(link) <= 32 * 1024:  # A link repeats the query.
            cached_pages[key] = (user.seq, body, link)
    user.answer_with(Link=link)
    return Response(body, media_type=JSON_TYPE)


@tasks.post("", status_code=201, responses=REPLAYED)
async def create_task(
    body: TaskCreate, user: CurrentUser, response: Response, key: Key = None
) -> TaskPublic:
    """Create a task. `Location` is its path, `ETag` its version.

    The same `Idempotency-Key` again gives the task that it created, with 200 and
    `Idempotency-Replayed: true`, in the trash (`deleted_at`) if it went there.

    Errors: 413 storage_full
    """
    values = {**body.model_dump(), "idempotency_key": key}
    try:
        async with changing(user, text_bytes(values)) as change:
            task = await change.create(values)
    except Replayed as replayed:
        [task] = replayed.args
        response.status_code = 200
        user.answer_with(ETag=f'"{task.version}"', Idempotency_Replayed="true")
    user.answer_with(Location=f"{BASE}/tasks/{task.id}")
    return task


async def owned_task(task_id: Id, user: CurrentUser) -> TaskPublic:
    """The caller's task, not in the trash. Errors: 404 absent or not yours."""
    rows = await database.lookup(FIND_TASK, id=task_id, user_id=user.id, trash=False)
    return TASK.validate_python(only(rows, "task", task_id))


OwnedTask = Annotated[TaskPublic, Depends(owned_task)]


@tasks.get("/{task_id:task_id}", responses=NOT_MODIFIED)
async def read_task(task_id: Id, user: CurrentUser) -> TaskPublic:
    """One task. Errors: 404 absent or not yours."""
    task = await owned_task(task_id, user)  # As a dependency: 15 µs more, of 250.
    user.offer_etag(f'"{task.version}"')
    return task


@tasks.put("/{task_id:task_id}")
async def replace_task(
    task_id: Id, body: TaskCreate, user: CurrentUser, if_match: IfMatch = None, new: IfNew = None
) -> TaskPublic:
    """Replace a task: what is absent goes back to its default.

    Errors: 404 absent or not yours; 412 stale version, or `If-None-Match: *`; 413 storage_full
    Ref: RFC 9110 §13.1.1
    """
    async with changing(user) as change:
        task = await change.task(task_id, if_match)
        if new == "*":
            raise ApiError(412, "version_mismatch", "This task exists.")
        return await change.update(task, body.model_dump())


@tasks.patch("/{task_id:task_id}")
async def update_task(
    task_id: Id, body: TaskUpdate, user: CurrentUser, if_match: IfMatch = None
) -> TaskPublic:
    """Merge into a task: what is absent stays, null clears. `{}` only takes a version.

    Errors: 404 absent or not yours; 412 stale version; 413 storage_full
    Ref: RFC 7396; RFC 9110 §13.1.1
    """
    async with changing(user) as change:
        task = await change.task(task_id, if_match)
        return await change.update(task, body.model_dump(exclude_unset=True))


@tasks.delete("/{task_id:task_id}", status_code=204)
async def trash_task(task_id: Id, user: CurrentUser, if_match: IfMatch = None) -> None:
    """Move a task to the trash. Errors: 404 absent or not yours; 412 stale version."""
    async with changing(user) as change:
        task = await change.task(task_id, if_match)
        await change.update(task, {"deleted_at": change.moment})


@tasks.post("/{task_id:task_id}/restore")
async def restore_task(task_id: Id, user: CurrentUser, if_match: IfMatch = None) -> TaskPublic:
    """Take a task out of the trash. Errors: 404 absent or not in your trash; 412 stale version."""
    async with changing(user) as change:
        task = await change.task(task_id, if_match, trash=True)
        return await change.update(task, {"deleted_at": None})


@tasks.get("/changes")
async def list_changes(user: CurrentUser, since: Since = "0", limit: ChangesLimit = 500) -> Changes:
    """Delta sync: what changed after `since`, trashed tasks included, oldest change first.

    Repeat with `next_since` while `has_more`, then whenever you like. `since=0` is a full snapshot.

    Errors: 410 resync_required
    """
    # A snapshot of several pages passes seqs below purged_seq on its way up, and is not stale: its
    # cursors name the purge that it began after ("500~800"), and are good until the next one.
    position, _, known_purge = since.partition("~")
    missed = await changes_after(user.id, int(position), limit)
    if missed.stale(int(position), int(known_purge or 0)):
        raise resync_required()
    last = missed.cursor
    next_since = f"{last}~{missed.purged_seq}" if last < missed.purged_seq else last
    return Changes(data=missed.tasks, next_since=next_since, has_more=last < missed.seq)


async def event_stream(
    user: CurrentUser, since: Cursor = None, last: LastEventId = None, polyfill: PolyfillsId = None
) -> AsyncIterator[Stream]:
    """An open stream. Errors: 410 and 429, before the answer begins."""
    given = [cursor for cursor in (last, polyfill, since) if cursor is not None]
    async with open_stream(user, given[0] if given else None, "") as stream:
        if stream.stale:
            raise resync_required()
        yield stream


OpenStream = Annotated[Stream, Depends(event_stream)]


@tasks.get("/events", response_class=EventSourceResponse)
async def stream_events(stream: OpenStream) -> AsyncIterator[ServerSentEvent]:
    """Server-Sent Events: `created`, `updated`, `deleted`, each with its seq as id. Try `curl -N`.

    `Last-Event-ID`, `since` or `lastEventId` resumes; without any it starts now. A comment comes
    every 15 s. "Try it out" cannot show a stream, which never ends.

    Errors: 410 resync_required; 429 too_many_streams
    """
    # An id without data dispatches nothing, but from now on a browser knows where to resume.
    yield ServerSentEvent(comment="connected", id=str(stream.cursor))
    async for event in stream.events():
        yield event


COUNT_TASKS = """
SELECT status, priority, count(*) AS total,
    CASE WHEN completed_at >= :since THEN substr(CAST(completed_at AS VARCHAR), 1, 10) END AS day,
    count(CASE WHEN NOT completed AND due_date < :now THEN 1 END) AS overdue,
    count(CASE WHEN NOT completed AND due_date BETWEEN :now AND :soon THEN 1 END) AS due_in_7_days
FROM tasks WHERE owner_id = :user_id AND deleted_at IS NULL GROUP BY status, priority, day"""


@tasks.get("/statistics")
async def read_statistics(user: CurrentUser) -> Statistics:
    """Counts over the caller's tasks, the trash left out. Errors: 503 too_slow."""
    moment = now()
    first_day = moment.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=29)
    counts: Counter[str] = Counter()
    for group in await user.read(COUNT_TASKS, since=first_day, soon=moment + timedelta(days=7)):
        counts.update({name: group[name] for name in ("total", "overdue", "due_in_7_days")})
        counts.update({group[name]: group["total"] for name in ("status", "priority", "day")})
    days = [str((first_day + timedelta(days=passed)).date()) for passed in range(30)]
    return Statistics(
        total=counts["total"],
        by_status={status: counts[status] for status in get_args(Status)},
        by_priority={priority: counts[priority] for priority in get_args(Priority)},
        overdue=counts["overdue"],
        due_in_7_days=counts["due_in_7_days"],
        completion_rate=round(counts["done"] / max(1, counts["total"]), 4),
        completed_per_day=[DayCount(date=day, count=counts[day]) for day in days],
    )


@tasks.delete("/trash", status_code=204)
async def empty_trash(user: CurrentUser) -> None:
    """Delete the caller's trash for good, now, all of it."""
    await purge(user.id, NEVER)


OFFICE = rb"PK\x03\x04|\xd0\xcf\x11\xe0"  # An encrypted one is an OLE file.
FILE_KINDS = {  # Extension: media type, and a pattern of how the content begins.
    "txt": ("text/plain", b""),
    "md": ("text/markdown", b""),
    "csv": ("text/csv", b""),
    "pdf": ("application/pdf", rb"[\s\S]{0,1019}%PDF-"),
    "png": ("image/png", rb"\x89PNG\r\n\x1a\n"),
    "jpg": ("image/jpeg", rb"\xff\xd8\xff"),
    "jpeg": ("image/jpeg", rb"\xff\xd8\xff"),
    "gif": ("image/gif", rb"GIF8[79]a"),
    "webp": ("image/webp", rb"RIFF[\s\S]{4}WEBP"),
    "doc": ("application/msword", rb"\xd0\xcf\x11\xe0"),
    "docx": ("application/vnd.openxmlformats-officedocument.wordprocessingml.document", OFFICE),
    "xlsx": ("application/vnd.openxmlformats-officedocument.spreadsheetml.sheet", OFFICE),
    "zip": ("application/zip", rb"PK(\x03\x04|\x05\x06)"),
}
FILE = {"file": {"type": "string", "format": "binary"}}
FORM_SCHEMA = {"type": "object", "required": ["file"], "properties": FILE}
FORM = {"required": True, "content": {"multipart/form-data": {"schema": FORM_SCHEMA}}}


class FormParser(MultiPartParser):
    """Starlette's, which also reads `filename*`, as .NET sends it. Ref: RFC 8187."""

    def on_headers_finished(self) -> None:
        """The head of a part: the plain name that is added last counts."""
        part = self._current_part
        extended = re.search(rb"filename\*=utf-8''([^;\s]+)", part.content_disposition or b"", re.I)
        if extended and part.content_disposition:
            name = unquote_to_bytes(extended[1]).replace(b'"', b"_")
            part.content_disposition += b'; filename="' + name + b'"'
        super().on_headers_finished()


async def uploaded_file(request: Request) -> Row:
    """The columns of the one file in a form; other fields are ignored. Errors: 400; 413; 415."""
    max_bytes = settings.max_upload_mib * MIB
    exchange_of(request).max_body_bytes += max_bytes  # A form has an envelope around its file.
    try:
        form = await FormParser(request.headers, request.stream(), max_files=1).parse()
        [sent] = [value for value in form.values() if isinstance(value, UploadFile)]
    except (KeyError, MultiPartException, ValueError):  # No form, a broken one, or of no file.
        message = "Send a form with one file: curl -F file=@NAME."
        raise ApiError(400, "invalid_form", message) from None
    content = await sent.read()
    await form.close()
    name = sent.filename or ""
    with suppress(LookupError, ValueError, email.errors.MessageError):  # Ref: RFC 2047
        name = str(email.header.make_header(email.header.decode_header(name)))
    name = re.split(r"[/\\]", name)[-1]  # Ref: RFC 7578 §4.2
    name = re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", "_", name)[-200:]
    # What has another extension begins as nothing can: (?!) never matches.
    media_type, begins = FILE_KINDS.get(name.rpartition(".")[2].lower(), ("", b"(?!)"))
    if len(content) > max_bytes:
        raise ApiError(413, "body_too_large", f"A file has at most {max_bytes // MIB} MiB.")
    if not re.match(begins, content):
        raise ApiError(415, "unsupported_file_type", f"Send a true {', '.join(FILE_KINDS)}.")
    file = {"filename": name, "content_type": media_type, "content": content}
    return file | {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@tasks.get("/{task_id:task_id}/attachments")
async def list_attachments(task: OwnedTask) -> Collection[AttachmentPublic]:
    """The files at a task, oldest first. Errors: 404 absent or not yours."""
    sql = f"SELECT {ATTACHMENT_COLUMNS} FROM attachments WHERE task_id = :id ORDER BY id"
    return Collection(data=await database.read(task.owner_id, sql, id=task.id))


ADD_ATTACHMENT = f"""
INSERT INTO attachments (task_id, filename, content_type, size_bytes, sha256, content, created_at)
VALUES (:task_id, :filename, :content_type, :size_bytes, :sha256, :content, :now)
RETURNING {ATTACHMENT_COLUMNS}"""


@tasks.post("/{task_id:task_id}/attachments", status_code=201, openapi_extra={"requestBody": FORM})
async def attach_file(
    task: OwnedTask, user: CurrentUser, request: Request, if_match: IfMatch = None
) -> AttachmentPublic:
    """Keep a file at a task, which gets its next version. Its name is the last segment of a path.

    Errors: 400 invalid_form; 404 absent or not yours; 409 too_many_attachments; 412 stale version;
    413 body_too_large, storage_full; 415 unsupported_file_type
    """
    file = await uploaded_file(request)
    async with changing(user, file["size_bytes"]) as change:
        task = await change.task(task.id, if_match)
        if task.attachments >= 100:
            raise ApiError(409, "too_many_attachments", "A task has at most 100.")
        await change.update(task, {"attachments": task.attachments + 1})
        rows = await change.db.fetch(ADD_ATTACHMENT, **file, task_id=task.id, now=change.moment)
    etag = f'"{rows[0]["sha256"]}"'
    user.answer_with(Location=f"{BASE}/attachments/{rows[0]['id']}", ETag=etag)
    return AttachmentPublic.model_validate(rows[0])


attachments = APIRouter(prefix=f"{API}/attachments", tags=["attachments"], **ROUTER)
FIND_ATTACHMENT = """
SELECT attachments.*, version FROM attachments JOIN tasks ON tasks.id = task_id
WHERE attachments.id = :id AND owner_id = :user_id AND deleted_at IS NULL"""
CONTENTS: Row = {media_type: {} for media_type, _ in FILE_KINDS.values()}
DOWNLOAD: Any = {200: {"description": "The file", "content": CONTENTS}, **NOT_MODIFIED}


@attachments.get("/{attachment_id}", response_class=Response, responses=DOWNLOAD)
async def download_attachment(attachment_id: Id, user: CurrentUser) -> Response:
    """The file, as a download. Errors: 404 absent or not yours. Ref: RFC 6266."""
    file = only(await user.read(FIND_ATTACHMENT, id=attachment_id), "attachment", attachment_id)
    user.offer_etag(f'"{file["sha256"]}"')
    plain = re.sub(r"[^A-Za-z0-9 ._-]", "_", file["filename"])
    exact = quote(file["filename"], safe="")
    disposition = f"attachment; filename=\"{plain}\"; filename*=UTF-8''{exact}"
    headers = {"Content-Disposition": disposition, "Content-Type": file["content_type"]}
    return Response(file["content"], headers=headers)


@attachments.delete("/{attachment_id}", status_code=204)
async def delete_attachment(attachment_id: Id, user: CurrentUser) -> None:
    """Delete a file for good; its task gets its next version. Errors: 404 absent or not yours."""
    async with changing(user) as change:
        file = await change.find("attachment", FIND_ATTACHMENT, attachment_id, None)
        task = await change.task(file["task_id"])
        await change.db.fetch("DELETE FROM attachments WHERE id = :id", id=attachment_id)
        await change.update(task, {"attachments": task.attachments - 1})
        await change.grow(-file["size_bytes"])


auth = APIRouter(prefix=f"{API}/auth", tags=["auth"], **ROUTER)
FIND_USER = f"SELECT {USER_COLUMNS}, password_hash FROM users WHERE username_key = :username_key"
# After a registration no password was verified: then it is ''.
LOCK_IF_VERIFIED = """
UPDATE users SET seq = seq
WHERE id = :id AND is_active AND :password_hash IN ('', password_hash) RETURNING id"""


async def verify_password(exchange: Exchange, name: str, password: str) -> Row | None:
    """The user of that name and password; an unknown name costs the same time. Errors: 429."""
    key = username_key(name)
    await count(exchange, "account", key, counts=False)
    users = await database.lookup(FIND_USER, username_key=key)
    known = users[0]["password_hash"] if users else UNKNOWN_USER_HASH
    if await run_bcrypt(bcrypt.checkpw, password, known.encode()):
        return users[0]
    await count(exchange, "account", key)
    return None


async def issue_tokens(db: Transaction, session: Row) -> TokenPair:
    """The next tokens of a session. The refresh token ends with it."""
    token = secrets.token_urlsafe(32)
    columns = {"session_id": session["id"], "expires_at": session["expires_at"]}
    await db.insert("refresh_tokens", token_hash=token_hash(token), **columns)
    access = encode_access_token(session["user_id"], session["id"])
    seconds = settings.access_token_minutes * 60
    return TokenPair(access_token=access, refresh_token=token, expires_in=seconds)


def columns_of_use(exchange: Exchange) -> Row:
    """Who uses a session, from where, and how long it lives from now on."""
    agent = exchange.request_headers.get("user-agent", "")[:200]
    end = now() + timedelta(days=settings.refresh_token_days)
    return {"address": exchange.address, "user_agent": agent, "expires_at": end}


async def start_session(exchange: Exchange, user_id: int, password_hash: str = "") -> TokenPair:
    """A new session with its first tokens, if the verified password still holds. Errors: 401."""
    moment = now()
    columns = {"created_at": moment, "last_used_at": moment, **columns_of_use(exchange)}
    async with database.transaction() as db:
        if not await db.fetch(LOCK_IF_VERIFIED, id=user_id, password_hash=password_hash):
            raise ApiError(401, "invalid_credentials", "The account has just changed: try again.")
        rows = await db.insert("sessions", user_id=user_id, **columns)
        return await issue_tokens(db, rows[0])


@auth.post("/register", status_code=201, dependencies=[limited("register")])
async def register(body: Registration, exchange: CurrentExchange) -> Registered:
    """Create an account and log in.

    Errors: 403 registration_closed; 409 username_taken
    Limit: register per address
    """
    if settings.registration == "closed":
        raise ApiError(403, "registration_closed", "Registration is closed. Ask the admin.")
    user = await add_user(body.username, body.password, "user", body.email)
    tokens = await start_session(exchange, user.id)
    return Registered(**tokens.model_dump(), user=user)


@auth.post("/login", dependencies=[limited("login")])
async def log_in(body: Credentials, exchange: CurrentExchange) -> TokenPair:
    """Exchange a username and a password for tokens.

    Errors: 401 invalid_credentials; 403 account_disabled
    Limit: login per address; account, failures only
    """
    user = await verify_password(exchange, body.username, body.password)
    if user is None:
        raise ApiError(401, "invalid_credentials", "Wrong username or password.")
    if not user["is_active"]:
        raise ApiError(403, "account_disabled", "This account is disabled.")
    return await start_session(exchange, user["id"], user["password_hash"])


EXTEND_SESSION = """
UPDATE sessions SET last_used_at = :now, expires_at = :expires_at, address = :address,
    user_agent = :user_agent
WHERE id = (SELECT session_id FROM refresh_tokens WHERE token_hash = :token_hash)
    AND expires_at > :now AND created_at > :oldest RETURNING *"""
USE_REFRESH_TOKEN = """
UPDATE refresh_tokens SET used_at = :now
WHERE token_hash = :token_hash AND used_at IS NULL AND expires_at > :now RETURNING id"""
END_REPLAYED_SESSION = """
DELETE FROM sessions WHERE id = (
    SELECT session_id FROM refresh_tokens AS this WHERE token_hash = :token_hash
        AND (used_at > :now OR used_at < :a_second_ago OR id < (SELECT max(id)
            FROM refresh_tokens WHERE session_id = this.session_id AND used_at IS NOT NULL)))"""


@auth.post("/refresh", dependencies=[limited("refresh")])
async def refresh(body: RefreshRequest, exchange: CurrentExchange) -> TokenPair:
    """Exchange a refresh token for the next pair. It works once.

    A used one is refused, and means theft: its session ends, too, unless it comes within a second
    of its use while the successor is still unused, which is a second tab and no thief. 180 days
    after its login a session refreshes no more.

    Errors: 401 invalid_refresh_token
    Limit: refresh per address
    Ref: RFC 9700 §4.14.2
    """
    this = {"token_hash": token_hash(body.refresh_token), **columns_of_use(exchange)}
    this["oldest"] = now() - timedelta(days=180)
    this["a_second_ago"] = now() - timedelta(seconds=1)
    async with database.transaction() as db:
        # This also locks the session before its token, as a logout does: no deadlock.
        sessions = await db.fetch(EXTEND_SESSION, **this)
        if sessions and await db.fetch(USE_REFRESH_TOKEN, **this):  # Of racing ones, one gets it.
            return await issue_tokens(db, sessions[0])
        await db.fetch(END_REPLAYED_SESSION, **this)
    # After the commit: raised within, it would undo the end of the session.
    raise ApiError(401, "invalid_refresh_token", "This refresh token is not valid: log in.")


@auth.post("/token", dependencies=[limited("login")], response_model=TokenPair, responses=REFUSAL)
async def grant_token(form: TokenForm, exchange: CurrentExchange) -> TokenPair | Response:
    """Log in or refresh as OAuth 2 libraries do it, by a form.

    Errors: 400 {"error": "invalid_request", "invalid_grant" or "unsupported_grant_type"}
    Limit: login per address; account, failures only
    Ref: RFC 6749 §4.3, §5.2, §6
    """
    refusal = OAuthError(error="invalid_request", error_description="See /docs for the form.")
    try:
        if form.grant_type == "password" and form.username and form.password:
            known = Credentials(username=form.username, password=form.password)
            return await log_in(known, exchange)
        if form.grant_type == "refresh_token" and form.refresh_token:
            return await refresh(RefreshRequest(refresh_token=form.refresh_token), exchange)
        if form.grant_type not in ("", "password", "refresh_token"):
            refusal.error = "unsupported_grant_type"
    except ApiError as error:
        if error.status_code not in (401, 403):
            raise
        refusal = OAuthError(error="invalid_grant", error_description=error.detail)
    except pydantic.ValidationError:
        pass
    return JSONResponse(refusal.model_dump(), 400)


OPTIONAL: list[Row] = [{"login": []}, {}]
LOGOUT_BODY = {"content": {JSON_TYPE: {"schema": {"$ref": "#/components/schemas/RefreshRequest"}}}}
LOGOUT = {"requestBody": LOGOUT_BODY, "security": OPTIONAL}
LIST_SESSIONS = """
SELECT *, id = :session_id AS current FROM sessions
WHERE user_id = :user_id AND scope IS NULL AND expires_at > :now
ORDER BY last_used_at DESC, id DESC"""


async def end_sessions(where: str, **values: Any) -> list[Row]:
    """End logins or API tokens at once, with every token of theirs. Returns their ids."""
    async with database.transaction() as db:
        return await db.fetch(f"DELETE FROM sessions WHERE {where} RETURNING id", **values)


@auth.post("/logout", status_code=204, openapi_extra=LOGOUT)
async def log_out(request: Request) -> None:
    """End this session: by access token, or else by `refresh_token` in the body.

    Errors: 401; 403 insufficient_scope, if an API token came along
    """
    try:
        user = await logged_in_user(await login(request))
        await end_sessions("id = :id", id=user.session_id)
    except ApiError as error:
        if error.status_code != 401:
            raise
        token = ""
        with suppress(pydantic.ValidationError):
            token = RefreshRequest.model_validate_json(await request.body()).refresh_token
        where = "id IN (SELECT session_id FROM refresh_tokens WHERE token_hash = :token_hash)"
        if not await end_sessions(where, token_hash=token_hash(token)):
            raise


@auth.post("/logout_all", status_code=204)
async def log_out_everywhere(user: LoggedInUser) -> None:
    """End every session of the caller; API tokens stay."""
    await end_sessions("user_id = :user_id AND scope IS NULL", user_id=user.id)


@auth.get("/sessions")
async def list_sessions(user: LoggedInUser) -> Collection[SessionListed]:
    """The caller's logins, last used first."""
    return Collection(data=await user.read(LIST_SESSIONS, session_id=user.session_id))


@auth.delete("/sessions/{session_id}", status_code=204)
async def end_session(session_id: Id, user: LoggedInUser) -> None:
    """End one login. Errors: 404 absent or not yours."""
    where = "id = :id AND user_id = :user_id AND scope IS NULL"
    only(await end_sessions(where, id=session_id, user_id=user.id), "session", session_id)


MAX_API_TOKENS = 100
LIST_API_TOKENS = """
SELECT id, name, scope, created_at,
    CASE WHEN last_used_at >= created_at THEN last_used_at END AS last_used_at,
    CASE WHEN expires_at < :never THEN expires_at END AS expires_at
FROM sessions WHERE user_id = :user_id AND scope IS NOT NULL AND expires_at > :now ORDER BY id"""


async def insist_on_session(db: Transaction, session_id: int) -> None:
    """Errors: 401, if this session has ended meanwhile; 0 is the command line, or an admin."""
    if session_id and not await db.fetch("SELECT id FROM sessions WHERE id = :id", id=session_id):
        raise ApiError(401, "session_ended", "Your session has ended meanwhile: log in.")


async def add_api_token(user_id: int, body: ApiTokenCreate, session_id: int = 0) -> ApiTokenCreated:
    """A token that its owner sees once. Errors: 401, if its session has ended meanwhile; 409."""
    token = API_TOKEN_PREFIX + secrets.token_urlsafe(32)
    columns = {**body.model_dump(), "user_id": user_id, "address": "", "user_agent": ""}
    columns |= {"token_hash": token_hash(token), "expires_at": body.expires_at or NEVER}
    columns |= {"created_at": now(), "last_used_at": now() - timedelta(days=1)}  # Not yet.
    async with database.transaction(user_id) as db:
        await insist_on_session(db, session_id)
        known = await db.fetch(LIST_API_TOKENS, user_id=user_id, never=NEVER)
        if len(known) >= MAX_API_TOKENS:
            raise ApiError(409, "too_many_tokens", f"You have {MAX_API_TOKENS}. Delete one first.")
        rows = await db.insert("sessions", **columns)
    shown = {"last_used_at": None, "expires_at": body.expires_at, "token": token}
    return ApiTokenCreated.model_validate(rows[0] | shown)


@auth.get("/api_tokens")
async def list_api_tokens(user: LoggedInUser) -> Collection[ApiTokenPublic]:
    """The caller's tokens for scripts, oldest first."""
    return Collection(data=await user.read(LIST_API_TOKENS, never=NEVER))


@auth.post("/api_tokens", status_code=201)
async def create_api_token(body: ApiTokenCreate, user: RecentUser) -> ApiTokenCreated:
    """A token for a script, shown only now: for tasks, not for accounts.

    Errors: 403 login_again, when the session is older than 10 minutes; 409 too_many_tokens
    """
    if body.expires_at and body.expires_at <= now():
        problem = {"type": "past", "loc": ["expires_at"], "msg": "must lie in the future"}
        raise RequestValidationError([problem])
    return await add_api_token(user.id, body, user.session_id)


@auth.delete("/api_tokens/{token_id}", status_code=204)
async def delete_api_token(token_id: Id, user: LoggedInUser) -> None:
    """End a token at once, its streams included. Errors: 404 absent or not yours."""
    where = "id = :id AND user_id = :user_id AND scope IS NOT NULL"
    only(await end_sessions(where, id=token_id, user_id=user.id), "api_token", token_id)


account = APIRouter(prefix=f"{API}/users/me", tags=["users"], **ROUTER)
LOCK_ADMINS = "UPDATE users SET seq = seq WHERE role = 'admin' AND is_active RETURNING id"
END_SESSIONS_BUT = "DELETE FROM sessions WHERE user_id = :user_id AND id <> :kept_session"


@account.get("")
async def read_account(user: CurrentUser) -> UserPublic:
    """The caller's account."""
    return user


async def insist_on_another_admin(db: Transaction, user_id: int) -> None:
    """Errors: 409, if this user is the last active admin."""
    if await db.fetch(LOCK_ADMINS) == [{"id": user_id}]:
        raise ApiError(409, "last_admin", "The last active admin stays.")


async def change_user(user_id: int, values: Row, kept_session: int = 0) -> UserPublic:
    """Change an account. Errors: 401, if the kept session has ended meanwhile; 404; 409."""
    if "password" in values:
        values["password_hash"] = await hash_password(values.pop("password"))
    columns = "".join(f", {name} = :{name}" for name in values)  # There may be none.
    sql = f"UPDATE users SET seq = seq{columns} WHERE id = :id RETURNING {USER_COLUMNS}"
    async with database.transaction() as db:
        if values.get("role") == "user" or values.get("is_active") is False:
            await insist_on_another_admin(db, user_id)
        user = only(await db.fetch(sql, id=user_id, **values), "user", user_id)
        await insist_on_session(db, kept_session)  # No other change of the password ends it now.
        if "password_hash" in values or not user["is_active"]:
            await db.fetch(END_SESSIONS_BUT, user_id=user_id, kept_session=kept_session)
    return UserPublic.model_validate(user)


async def remove_user(user_id: int) -> None:
    """An account with all that is theirs. Errors: 404; 409 last_admin."""
    async with database.transaction() as db:
        await insist_on_another_admin(db, user_id)
        rows = await db.fetch("DELETE FROM users WHERE id = :id RETURNING id", id=user_id)
        only(rows, "user", user_id)


@account.patch("")
async def update_account(body: UserUpdate, user: LoggedInUser) -> UserPublic:
    """Change e-mail or password; a new password ends the other sessions and every API token.

    Errors: 403 wrong_password
    Limit: account, failures only
    """
    current = body.current_password
    if body.password and not await verify_password(user.exchange, user.username, current):
        raise ApiError(403, "wrong_password", "current_password is missing or wrong.")
    return await change_user(user.id, body.model_dump(exclude_unset=True), user.session_id)


@account.delete("", status_code=204)
async def delete_account(user: RecentUser) -> None:
    """Delete the account with everything in it. Errors: 403 login_again; 409 last_admin."""
    await remove_user(user.id)


admin = APIRouter(prefix=f"{API}/admin", tags=["admin"], **ROUTER)
LIST_USERS = f"SELECT {USER_COLUMNS}, (SELECT count(*) FROM users) AS total FROM users ORDER BY id"


@admin.get("/users")
async def list_users(user: AdminUser, query: Annotated[PageQuery, Query()]) -> Page[UserPublic]:
    """Every account, oldest first. Errors: 403 admin_required."""
    return Page[UserPublic].model_validate(await page_of(user, "/admin/users", query, LIST_USERS))


@admin.post("/users", status_code=201)
async def create_user(body: AdminUserCreate, user: AdminUser) -> UserPublic:
    """Create an account. Errors: 403 admin_required; 409 username_taken."""
    created = await add_user(body.username, body.password, body.role, body.email)
    user.answer_with(Location=f"{BASE}/admin/users/{created.id}")
    return created


@admin.get("/users/{user_id}")
async def read_user(user_id: Id, user: AdminUser) -> UserPublic:
    """One account. Errors: 403 admin_required; 404 absent."""
    rows = await user.read(f"SELECT {USER_COLUMNS} FROM users WHERE id = :id", id=user_id)
    return UserPublic.model_validate(only(rows, "user", user_id))


@admin.patch("/users/{user_id}")
async def update_user(user_id: Id, body: AdminUserUpdate, _user: AdminUser) -> UserPublic:
    """Change role, `is_active` or password. Errors: 403 admin_required; 404; 409 last_admin."""
    return await change_user(user_id, body.model_dump(exclude_unset=True))


@admin.delete("/users/{user_id}", status_code=204)
async def delete_user(user_id: Id, _user: AdminUser) -> None:
    """Delete an account with everything in it. Errors: 403 admin_required; 404; 409 last_admin."""
    await remove_user(user_id)


@admin.get("/tasks")
async def list_all_tasks(user: AdminUser, query: Annotated[AdminTaskQuery, Query()]) -> TaskPage:
    """Every owner's tasks, with the filters of GET /tasks and `owner_id`. Errors: 403; 503."""
    return await page_of_tasks(user, "/admin/tasks", query)


@admin.post("/cleanup", status_code=202, response_class=Response)
async def start_cleanup(_user: AdminUser) -> Response:
    """Remove now what has expired. The result stands in /health/detailed. Errors: 403."""
    return Response(None, 202, background=BackgroundTask(clean_up))


health = APIRouter(tags=["health"], **ROUTER)


@health.get("/health")
async def read_health() -> Health:
    """Alive, and the database answers. Errors: 503 database_unavailable."""
    await database.lookup("SELECT id FROM users LIMIT 1")
    return Health()


@health.get("/health/detailed")
async def read_health_detailed() -> HealthDetailed:
    """The same, with figures. Errors: 503 database_unavailable."""
    began = time.perf_counter()
    await read_health()
    latency_ms = round((time.perf_counter() - began) * 1000, 2)
    return HealthDetailed(
        version=VERSION,
        uptime_seconds=int(time.monotonic() - started_at),
        database={"engine": database.engine, "latency_ms": latency_ms},
        live_connections=len(broadcaster.everybody()),
        last_cleanup=last_cleanup or None,
    )


@health.get("/metrics", response_class=PlainTextResponse, openapi_extra={"security": OPTIONAL})
async def read_metrics(request: Request) -> Response:
    """Figures for Prometheus, for an admin unless METRICS says else. Errors: 401; 403; 404 off."""
    if settings.metrics == "off":
        raise ApiError(404, "not_found", "METRICS is off.")
    if settings.metrics == "admin":
        # Called directly, so that an admin's API token passes: Prometheus cannot log in.
        await admin_user(await authenticate(exchange_of(request).authorization))
    figures = prometheus_client.generate_latest()
    return Response(figures, media_type=prometheus_client.CONTENT_TYPE_LATEST)


@health.get("/", include_in_schema=False)
async def read_root() -> Response:
    """To the docs, or with DOCS off who this is."""
    if settings.docs == "on":
        return RedirectResponse(f"{settings.root_path}/docs")
    return JSONResponse({"name": "Onefile Tasks", "version": VERSION})


HELLO_SECONDS = 5.0
ClientId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class Hello(Body):
    """The first frame of a socket that sent no Authorization header."""

    token: Text
    since: Cursor = None


async def receive_hello(socket: WebSocket) -> Hello:
    """The first frame. Errors: WebSocketException, which closes: 1003; 4401 if it is late."""
    try:
        async with asyncio.timeout(HELLO_SECONDS):
            return Hello.model_validate_json(await socket.receive_text())
    except TimeoutError:
        raise WebSocketException(4401, "no token came in time") from None
    except (KeyError, pydantic.ValidationError):  # KeyError: a frame of bytes.
        raise WebSocketException(1003, 'send text like {"token": "…", "since": 17}') from None


async def watch_peer(socket: WebSocket, stream: Stream) -> None:
    """After hello a client has nothing to say: texts are ignored. It ends the stream by leaving."""
    while (message := await socket.receive())["type"] == "websocket.receive":
        if message.get("text") is None:
            stream.close(1003, "frames are text")
    stream.close(1000, "")


async def send_events(socket: WebSocket, stream: Stream) -> None:
    """Hello, then every change, until the stream is closed. Errors: TimeoutError, if unread."""
    await socket.send_text(f'{{"type":"hello","seq":{stream.cursor}}}')
    if stream.stale:
        await socket.send_text(RESYNC)
    async for event in stream.events():
        async with asyncio.timeout(SEND_SECONDS):
            await socket.send_text(str(event.raw_data))


@app.websocket("/ws/tasks/{client_id}")
async def watch_tasks(socket: WebSocket, client_id: ClientId, since: Cursor = None) -> None:
    """Live updates over a WebSocket; the README has the protocol. Ref: RFC 6455 §7.4."""
    await socket.accept()
    try:
        if "authorization" not in socket.headers:
            hello = await receive_hello(socket)
            exchange_of(socket).authorization = f"Bearer {hello.token}"
            since = since if hello.since is None else hello.since
        user = await login(socket)
        async with open_stream(user, since, client_id) as stream:
            watching = asyncio.create_task(watch_peer(socket, stream))
            await send_events(socket, stream)
            watching.cancel()
        end = stream.end or (1000, "")
    except ApiError as error:
        end = (4401 if error.status_code == 401 else 1013, error.detail)
    except (TimeoutError, *database.failures):  # The peer does not read, or the database is away.
        end = (1013, "try again later")
    await socket.close(*end)


routers = (tasks, attachments, auth, account, admin, health)
# Not by include_router, whose routes are matched twice; and before /docs: they are tried in order.
app.router.routes[:0] = [route for router in routers for route in router.routes]
gc.freeze()
gc.enable()  # From here on there may be some.

# ── 12 Command line ─────────────────────────────────────────────────────────────────────────────
# Commands work beside a running server: the database's own locks are all that they need, and what
# they end is ended for the very next request.


def serve(reload: bool) -> None:
    """Listen, say where, and serve until Ctrl-C or SIGTERM. Errors: SystemExit."""
    options: Any = {"host": settings.host, "port": settings.port, "reload": reload, "http": "h11"}
    options |= {"proxy_headers": False, "server_header": False, "timeout_graceful_shutdown": 3}
    options |= {"ws": BoundedWebSocket, "ws_max_size": MAX_SOCKET_BYTES, "access_log": False}
    options |= {"ws_per_message_deflate": False, "log_config": None, "log_level": "critical"}
    config = uvicorn.Config("__main__:app" if reload else app, **options)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        listener = config.bind_socket()
        listener.listen(config.backlog)  # From the line below on, who connects waits.
    except (SystemExit, OSError):
        raise SystemExit(f"HOST, PORT: cannot listen on {host}:{settings.port}") from None
    url = f"http://{host}:{listener.getsockname()[1]}{settings.root_path}"
    docs = f"{url}/docs" if settings.docs == "on" else "off"
    print(f"  Listening  {url}   (Ctrl-C ends it)\n  Docs       {docs}")
    print(f"  Accounts   registration is {settings.registration}", flush=True)
    server = uvicorn.Server(config)
    with suppress(KeyboardInterrupt):
        if reload:
            ChangeReload(config, target=server.run, sockets=[listener]).run()
        else:
            server.run(sockets=[listener])


def ask_password() -> str:
    """A password, typed twice, or read from standard input when that is no terminal."""
    typed = getpass.getpass("Password: ") if sys.stdin.isatty() else sys.stdin.readline()
    password = checked(Password, typed.rstrip("\r\n"), "password")
    if sys.stdin.isatty() and getpass.getpass("Again: ") != password:
        raise SystemExit("The two are not the same; nothing was changed.")
    return password


async def run_command(given: argparse.Namespace) -> str:
    """A command on the open database. Returns what is true now. Errors: SystemExit; 409."""
    async with opened_database():
        if given.command is None:
            return f"  Data       {database.place}"
        name = checked(Username, given.name, "NAME")
        if given.command == "create-user":
            await add_user(name, ask_password(), given.role)
            return f"{name} can log in now, with the role {given.role}."
        users = await database.lookup(FIND_USER, username_key=username_key(name))
        if not users:
            raise SystemExit(f"There is no user {name}.")
        if given.command == "reset-password":
            await change_user(users[0]["id"], {"password": ask_password()})
            return f"{name} has a new password; old sessions and API tokens have ended."
        token = ApiTokenCreate(name="command line", scope=given.scope)
        created = await add_api_token(users[0]["id"], token)
        print(f"A token of {name} that may {given.scope} and never expires:", file=sys.stderr)
        return created.token


def main() -> None:
    """Parse the command line and do as it says."""
    parser = argparse.ArgumentParser(prog="app.py", description="Without a command, it serves.")
    parser.add_argument("--version", action="version", version=f"Onefile Tasks {VERSION}")
    parser.add_argument("--reload", action="store_true", help="restart when app.py changes")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    create = commands.add_parser("create-user", help="make an account; asks for its password")
    create.add_argument("--admin", dest="role", action="store_const", const="admin", default="user")
    reset = commands.add_parser("reset-password", help="a new password; ends all sessions")
    token = commands.add_parser("token", help="make an API token, and print it")
    token.add_argument("--scope", choices=["read", "write"], default="write")
    for command in (create, reset, token):
        command.add_argument("name", metavar="NAME")
    given = parser.parse_args()
    if given.command is None:
        print(f"Onefile Tasks {VERSION}", flush=True)
    try:
        print(asyncio.run(run_command(given)), flush=True)
    except ApiError as error:
        raise SystemExit(error.detail) from None
    except OSError as error:
        raise SystemExit(f"DATA_DIR: {error}") from None
    if given.command is None:
        serve(given.reload)


if __name__ == "__main__":
    main()

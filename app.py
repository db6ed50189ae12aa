"""Onefile Tasks: a complete task-manager API in one Python file.

Run    python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python app.py
Then   open http://127.0.0.1:8000/docs, or follow the README with curl.

Sections
   1  Settings              every knob, read from the environment and .env, checked at start
   2  Errors                one shape for every error, raised through small factories
   3  Database              SQLite by aiosqlite, or PostgreSQL: one statement a read, shared commits
   4  Tables                users, sessions, refresh tokens, tasks, attachments
   5  Schemas               what comes in and what goes out
   6  Passwords and tokens  bcrypt, JWT, opaque tokens: functions that know nothing of HTTP
   7  Who asks              one statement a request that says who this is and where their tasks stand
   8  Rate limits           SlowAPI's moving windows, and the dependencies that count
   9  Live updates          the one number per user, and the streams that follow it
  10  Application           start and stop, the outermost ASGI layer, error handlers
  11  Routes                auth, users, tasks, attachments, live, admin, health
  12  Command line          serve, accounts and tokens

Notation
   seq       a counter in every user's row. Whatever changes what a user sees of their tasks takes the
             next value in the same transaction, and the changed task is stamped with it. A task's
             version and ETag, the order of changes, delta sync and live updates are all this number.
   cursor    a seq that a client has seen; "what is new?" is always `version > cursor ORDER BY version`
   trash     deleted tasks, kept as tombstones until they are purged
   user      in a route: the Caller, which is who is asking and the session that they came by
   :name     in SQL: a named parameter. Values never become part of a statement's text.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "aiosqlite==0.22.1",
#   "alembic==1.20.1",
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
#   "python-dotenv==1.2.4",
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

import sys

if sys.version_info < (3, 11):
    raise SystemExit("Onefile Tasks needs Python 3.11 or newer; this is " + sys.version.split()[0])

import argparse
import asyncio
import contextlib
import email.header
import functools
import getpass
import hashlib
import ipaddress
import logging
import math
import os
import re
import secrets
import sqlite3
import time
import unicodedata
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, Self, TypeVar, get_args
from urllib.parse import quote, urlencode
from weakref import WeakValueDictionary

import aiosqlite
import bcrypt
import jwt
import limits
import prometheus_client
import pydantic
import pydantic_core
import sqlalchemy as sa
import uvicorn
from dotenv import dotenv_values
from fastapi import APIRouter, Depends, FastAPI, Form, Header, Query, Request, Response, WebSocket
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.models import OAuth2, OAuthFlowPassword, OAuthFlows
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.routing import iter_route_contexts
from fastapi.security.base import SecurityBase
from fastapi.sse import EventSourceResponse, ServerSentEvent
from fastapi_offline import FastAPIOffline
from pydantic import AfterValidator, BaseModel, BeforeValidator, SecretStr, StringConstraints
from pydantic import TypeAdapter, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from slowapi import Limiter
from sqlmodel import Field, SQLModel
from starlette.background import BackgroundTask
from starlette.datastructures import MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.supervisors import ChangeReload

VERSION = "2.0.0"
API = "/api/v1"
MAX_ID = 2**63 - 1  # Integers of SQLite and PostgreSQL end here.
NEVER = datetime(9999, 12, 31, tzinfo=UTC)
MIB = 2**20

log = logging.getLogger("onefile_tasks")
Row = dict[str, Any]
Item = TypeVar("Item")

# What /metrics shows; each is counted where it happens.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
NAMESPACE = "onefile_tasks"
REQUEST_SECONDS = prometheus_client.Histogram(
    "http_request_seconds", "Duration of requests.", ["method", "route", "status"], NAMESPACE
)
LIVE_CONNECTIONS = prometheus_client.Gauge(
    "live_connections", "Open WebSockets and event streams.", namespace=NAMESPACE
)
RATE_LIMITED = prometheus_client.Counter("rate_limited", "Answers 429.", namespace=NAMESPACE)
FAILED_LOGINS = prometheus_client.Counter("failed_logins", "Wrong passwords.", namespace=NAMESPACE)
WEBHOOKS_GIVEN_UP = prometheus_client.Counter(
    "webhooks_given_up", "Changes that the webhook never took.", namespace=NAMESPACE
)
prometheus_client.Info("build", "What runs.", namespace=NAMESPACE).info({"version": VERSION})

# ── 1 Settings ──────────────────────────────────────────────────────────────────────────────────
# The environment decides, and a .env file is the same thing on disk. A wrong value stops the start
# with one line that names the variable, because a server that guesses is found out later.


def rate(text: str) -> limits.RateLimitItem:
    """`5/minute`. Errors: ValueError, also for several rates and for a rate of 0."""
    if not re.fullmatch(r"[1-9]\d{0,8} ?/ ?\d{0,4} ?(second|minute|hour|day|month|year)s?", text):
        raise ValueError("must be a rate like 5/minute")
    return limits.parse(text)


def networks(text: str) -> str:
    """Addresses and networks, comma-separated, or `*`. Errors: ValueError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return ",".join(part if part == "*" else str(ipaddress.ip_network(part)) for part in parts)


RateLimit = Annotated[Any, AfterValidator(rate)]
ORIGIN = r"(\*|https?://[a-z0-9.-]+(:[0-9]+)?)"
WEBHOOK_KEY = r"whsec_(?=.{32,88}$)([A-Za-z0-9+/]{4})+([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"


class Settings(BaseSettings):
    """Every knob, with its default. Meanings, units and consequences stand in .env.example."""

    model_config = SettingsConfigDict(
        env_file=".env", env_ignore_empty=True, extra="ignore", validate_default=True
    )

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    root_path: str = pydantic.Field(default="", pattern=r"^(/[A-Za-z0-9._~-]+)*$")
    data_dir: Path = Path("data")
    database_url: str = pydantic.Field(default="", pattern=r"^(postgres(ql)?(\+\w+)?://.+)?$")
    redis_url: str = pydantic.Field(default="", pattern=r"^(rediss?://.+)?$")
    secret_key: SecretStr = SecretStr("")
    admin_username: str = "admin"
    admin_password: SecretStr = SecretStr("")
    registration: Literal["open", "closed"] = "open"
    access_token_minutes: int = Field(default=15, ge=1, le=1440)
    refresh_token_days: int = Field(default=30, ge=1, le=180)
    trash_days: int = Field(default=30, ge=0, le=36500)
    rate_limits: Literal["on", "off"] = "on"
    rate_limit_register: RateLimit = "3/minute"
    rate_limit_login: RateLimit = "5/minute"
    rate_limit_account: RateLimit = "1000/hour"
    rate_limit_refresh: RateLimit = "10/minute"
    rate_limit_read: RateLimit = "600/minute"
    rate_limit_write: RateLimit = "300/minute"
    max_body_kib: int = Field(default=64, ge=1, le=65536)
    max_upload_mib: int = Field(default=5, ge=1, le=512)
    max_storage_mib: int = Field(default=100, ge=0, le=2**20)
    cors_origins: str = pydantic.Field(default="", pattern=rf"^({ORIGIN}(, ?{ORIGIN})*)?$")
    trusted_proxies: Annotated[str, AfterValidator(networks)] = ""
    docs: Literal["on", "off"] = "on"
    metrics: Literal["admin", "open", "off"] = "admin"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    webhook_url: str = pydantic.Field(default="", pattern=r"^(https?://.+)?$")
    webhook_secret: SecretStr = SecretStr("")

    @pydantic.field_validator("webhook_secret")
    @classmethod
    def signs_the_webhook(cls, secret: SecretStr, info: pydantic.ValidationInfo) -> SecretStr:
        """`whsec_` and 24 to 64 bytes in base64, if WEBHOOK_URL is set. Ref: Standard Webhooks."""
        if info.data.get("webhook_url") and not re.fullmatch(
            WEBHOOK_KEY, secret.get_secret_value()
        ):
            raise ValueError("must be whsec_ and 24 to 64 random bytes in base64")
        return secret


def first_problem(error: ValidationError, name: str = "") -> str:
    """One line that names what is wrong and shows no value, which may be a secret."""
    problem = error.errors(include_input=False, include_url=False)[0]
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name or str(problem['loc'][0]).upper()}: {message}"


def load_settings() -> Settings:
    """The settings, checked. Errors: SystemExit with one line."""
    try:
        unknown = [
            name for name in dotenv_values(".env") if name.lower() not in Settings.model_fields
        ]
        loaded = Settings()
    except UnicodeDecodeError:
        raise SystemExit(".env: must be text in UTF-8") from None
    except ValidationError as error:
        raise SystemExit(first_problem(error)) from None
    for name in unknown:
        print(f".env: {name} is no setting of Onefile Tasks", file=sys.stderr)
    return loaded


settings = load_settings()


def now() -> datetime:
    """The one clock, in UTC. Tests set it by hand."""
    return datetime.now(UTC)


# ── 2 Errors ────────────────────────────────────────────────────────────────────────────────────
# One envelope for every error, whoever noticed it. Small factories, so that a route shows the raise.
# Messages say the next step, and never repeat a sent value: it may be a password or a script.


class ApiError(HTTPException):
    """An error that a client will see: status, stable code, message, headers, details by field."""

    def __init__(
        self, status: int, code: str, message: str, headers: Any = None, details: Any = None
    ) -> None:
        super().__init__(status, message, headers)
        self.code = code
        self.details = details


def error_response(error: HTTPException, request_id: str) -> Response:
    """The envelope of any HTTPException. A 304 has no body. Ref: RFC 9110 §15.4.5."""
    if error.status_code == 304:
        return Response(status_code=304, headers=error.headers)
    plain_code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    body = {
        "code": getattr(error, "code", plain_code),
        "message": str(error.detail),
        "request_id": request_id,
    }
    details = getattr(error, "details", None)
    if details:
        body["details"] = details
    return JSONResponse({"error": body}, error.status_code, error.headers)


def not_found(kind: str, key: int) -> ApiError:
    """404, the same for absent and for somebody else's, so that ids tell nothing."""
    return ApiError(404, f"{kind}_not_found", f"No {kind.replace('_', ' ')} {key}.")


def unauthorized(code: str, message: str) -> ApiError:
    """401. Ref: RFC 6750 §3."""
    return ApiError(401, code, message, {"WWW-Authenticate": "Bearer"})


def forbidden(code: str, message: str) -> ApiError:
    """403."""
    return ApiError(403, code, message)


def invalid(fields: Sequence[tuple[str, str]]) -> ApiError:
    """422, with every refused (field, message); the first ten are the message."""
    details = [{"field": field, "message": message} for field, message in fields]
    message = "; ".join(f"{field}: {message}" for field, message in fields[:10])
    return ApiError(422, "validation_failed", message, details=details)


def unavailable(message: str = "The database does not answer. Try again.") -> ApiError:
    """503. Ref: RFC 9110 §15.6.4."""
    return ApiError(503, "database_unavailable", message, {"Retry-After": "5"})


def resync_required() -> ApiError:
    """410: deletions after this cursor are forgotten, or it comes from another past."""
    return ApiError(410, "resync_required", "This cursor is stale. Start again with since=0.")


# ── 3 Database ──────────────────────────────────────────────────────────────────────────────────
# SQL is constant text in the words that SQLite and PostgreSQL share, and runs without an ORM: building
# a statement costs more than running it. A hop to a driver's thread costs more than most statements,
# so a request makes few. Whoever waits to write shares one COMMIT with all who wait: a durable commit
# costs a flush of the disk, however many writes it carries.

READERS = 8
READS_PER_USER = 2
READ_SECONDS = 3.0
SCHEMA_VERSION = 1

sqlite3.register_adapter(datetime, lambda moment: moment.isoformat(timespec="microseconds"))
sys.setswitchinterval(0.0005)  # How long a driver's thread waits for the event loop, in seconds.


class Transaction:
    """What a body of `database.transaction()` runs its statements with."""

    async def fetch(self, sql: str, **values: Any) -> list[Row]:
        """Run one statement; the rows that it selects or returns."""
        raise NotImplementedError


class Database:
    """What routes see of either database. Rows are dicts; parameters are named."""

    engine: str
    failures: tuple[type[Exception], ...]

    def __init__(self) -> None:
        self.turns: WeakValueDictionary[int, asyncio.Semaphore] = WeakValueDictionary()

    async def fetch(self, sql: str, values: Row) -> list[Row]:
        """All rows of one statement that only reads."""
        raise NotImplementedError

    async def read(self, whose: int, sql: str, **values: Any) -> list[Row]:
        """All rows of one statement, two at once for a user and 3 s each. Errors: 503 too_slow."""
        turn = self.turns.setdefault(whose, asyncio.Semaphore(READS_PER_USER))
        async with turn:
            try:
                async with asyncio.timeout(READ_SECONDS):
                    return await self.fetch(sql, values)
            except TimeoutError:
                message = f"This took more than {READ_SECONDS:.0f} s. Ask for less."
                raise ApiError(503, "too_slow", message, {"Retry-After": "5"}) from None


class SQLite(Database):
    """One file: a few connections that cannot write, one that writes, one for lookups by key."""

    engine = "sqlite"
    failures = (sqlite3.OperationalError, sqlite3.InterfaceError, OSError)

    @property
    def path(self) -> Path:
        """The file that has everything."""
        return settings.data_dir / "tasks.db"

    def where(self) -> str:
        """For people."""
        return str(self.path.resolve())

    async def open(self) -> None:
        """Open or create the file, readable by its owner alone. Errors: OSError; SystemExit."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.touch(0o600)
        engine = sa.create_engine("sqlite://", creator=self.connect, poolclass=sa.NullPool)
        with engine.begin() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # One process upgrades, the others wait.
            upgrade(connection, self.keep_copy)
        self.inode = self.path.stat().st_ino
        self.finder = self.connect()
        self.finder.execute("PRAGMA query_only=ON")
        self.writer = await aiosqlite.Connection(self.connect, 64)
        self.readers: asyncio.Queue[aiosqlite.Connection] = asyncio.Queue()
        for _ in range(READERS):
            reader = await aiosqlite.Connection(self.connect, 64)
            await reader.execute("PRAGMA query_only=ON")
            self.readers.put_nowait(reader)
        self.write_turn = asyncio.Lock()
        self.group: CommitGroup | None = None

    def connect(self) -> sqlite3.Connection:
        """A connection whose transactions are begun by hand."""
        connection = sqlite3.connect(
            self.path, isolation_level=None, cached_statements=512, check_same_thread=False
        )
        connection.row_factory = sqlite3.Row
        # FULL: an acknowledged write survives a power cut, not only a crash of this process.
        for pragma in (
            "busy_timeout=10000",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
        ):
            connection.execute(f"PRAGMA {pragma}")
        return connection

    async def close(self) -> None:
        """Close every connection, after the work that they were handed."""
        await self.writer.close()
        while not self.readers.empty():
            await self.readers.get_nowait().close()
        self.finder.close()

    def check(self) -> None:
        """The file is still the one that was opened. Errors: 503, for what is written now is lost."""
        try:
            same = self.path.stat().st_ino == self.inode
        except FileNotFoundError:
            same = False
        if not same:
            raise unavailable("The database's file was removed or replaced. Restart the server.")

    async def lookup(self, sql: str, **values: Any) -> Row | None:
        """One row by key: bounded, and so quick that it runs right here, without a hop."""
        self.check()
        row = self.finder.execute(sql, values).fetchone()
        return dict(row) if row else None

    async def fetch(self, sql: str, values: Row) -> list[Row]:
        """All rows of one statement. Whoever is cancelled or late interrupts it."""
        reader = await self.readers.get()
        try:
            rows = await reader.execute_fetchall(sql, values)
        finally:
            await reader.interrupt()
            self.readers.put_nowait(reader)
        return [dict(row) for row in rows]

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator["CommitGroup"]:
        """A durable transaction: when the block has ended it is committed, or raises. Errors: 503."""
        group = None
        try:
            async with self.write_turn:
                self.check()
                if self.group is None:
                    self.group = CommitGroup(self)
                group = self.group
                async with group.savepoint():
                    yield group
        finally:  # Whoever failed waits, too: a 404 may speak of rows that are not committed yet.
            if group is not None:
                await asyncio.shield(group.committed)

    def keep_copy(self) -> str:
        """A copy of the database as it is committed, beside it. Returns its path."""
        copy = self.path.with_name(f"tasks-{now():%Y%m%dT%H%M%S%f}.db")
        copy_database(self.path, copy)
        return str(copy)


class CommitGroup(Transaction):
    """The transactions that share one BEGIN and one COMMIT, each in a savepoint of its own.

    The first one creates the commit as a task, which queues for the same lock as the bodies: so it
    runs when everybody who waited has had their turn, and whoever comes later is in the next group.
    """

    def __init__(self, database: SQLite) -> None:
        self.database = database
        self.writer = database.writer
        self.lost = False
        self.committed = asyncio.create_task(self.commit())
        self.begun = asyncio.create_task(self.writer.execute("BEGIN IMMEDIATE"))

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        """What is undone if the block raises or is cancelled, without undoing the others' work."""
        await asyncio.shield(self.begun)
        await self.writer.execute("SAVEPOINT body")
        try:
            if self.lost:
                raise sqlite3.OperationalError("the transaction was rolled back")
            yield
        except BaseException:
            await asyncio.shield(self.undo())
            raise

    async def undo(self) -> None:
        """Undo one body. A full disk has rolled back everybody's: then the whole group is lost."""
        try:
            await self.writer.execute("ROLLBACK TO body")
        except sqlite3.Error:
            self.lost = True

    async def commit(self) -> None:
        """Commit once for all. Errors: sqlite3.Error, and then nothing of the group is there."""
        async with self.database.write_turn:
            self.database.group = None
            await self.begun
            try:
                if self.lost:
                    raise sqlite3.OperationalError("the transaction was rolled back")
                await self.writer.commit()
            except sqlite3.Error:
                await self.writer.rollback()
                raise

    async def fetch(self, sql: str, **values: Any) -> list[Row]:
        """Run one statement; the rows that it selects or returns."""
        rows = await self.writer.execute_fetchall(sql, values)
        return [dict(row) for row in rows]


def copy_database(source: Path, target: Path) -> None:
    """Everything of a SQLite file at one moment, beside other work, as one new file of mode 0600.

    Errors: OSError, sqlite3.Error; then there is no such file.
    """
    target.touch(0o600, exist_ok=False)
    try:
        with contextlib.closing(
            sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)
        ) as db:
            db.execute("VACUUM INTO ?", [str(target)])
    except BaseException:
        target.unlink()
        raise


def upgrade(connection: sa.Connection, keep_copy: Callable[[], str]) -> None:
    """Add the tables, nullable or defaulted columns and indexes that a database lacks.

    Nothing else, ever, and what is not ours is left alone. Errors: SystemExit that names the obstacle.
    """
    version = None
    fresh = not sa.inspect(connection).has_table("users")
    if not fresh:
        version = connection.exec_driver_sql("SELECT max(version) FROM schema_version").scalar()
    if version == SCHEMA_VERSION:
        return
    if version is not None and version > SCHEMA_VERSION:
        raise SystemExit(f"The database is of version {version}, newer than this program.")
    if not fresh:
        upgrade_in_place(connection, keep_copy)
    SQLModel.metadata.create_all(connection)
    connection.exec_driver_sql(f"INSERT INTO schema_version (version) VALUES ({SCHEMA_VERSION})")


def is_ours(item: Any, _name: Any, _kind: str, reflected: bool, compared_to: Any) -> bool:
    """What Alembic compares: not what only the database has. Litestream keeps tables there."""
    return not reflected or compared_to is not None


def upgrade_in_place(connection: sa.Connection, keep_copy: Callable[[], str]) -> None:
    """What `upgrade` adds to tables that exist, after a backup copy. Errors: SystemExit."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.operations import Operations

    context = MigrationContext.configure(connection, opts={"include_object": is_ours})
    changes: list[Any] = []
    for found in compare_metadata(context, SQLModel.metadata):
        changes += found if isinstance(found, list) else [found]
    for kind, *what in changes:
        optional = kind == "add_column" and (what[-1].nullable or what[-1].server_default)
        if kind not in ("add_table", "add_index") and not optional:
            names = " ".join(str(each) for each in what[:3] if each is not None)
            raise SystemExit(f"No upgrade in place makes this database fit: {kind} {names}")
    print(f"  Upgrade    the database as it was is kept in {keep_copy()}", flush=True)
    for kind, *what in changes:
        if kind == "add_column":
            Operations(context).add_column(what[1], what[2])
    for kind, *what in changes:
        if kind == "add_index" and what[0].table.name in sa.inspect(connection).get_table_names():
            what[0].create(connection, checkfirst=True)


database = SQLite()

# ── 4 Tables ────────────────────────────────────────────────────────────────────────────────────
# Each table is two classes: the public half is also the answer that clients get, the private half
# never leaves. SQLModel creates the tables; the SQL that fills them stands where it is used.
# AUTOINCREMENT: the id of something purged is never handed out again.

Role = Literal["user", "admin"]
Scope_ = Literal["read", "write"]
Status = Literal["todo", "in_progress", "done"]
Priority = Literal["low", "medium", "high"]


class Public(SQLModel):
    """The base of answers and tables: the string under a field is its description in /docs."""

    model_config = {"use_attribute_docstrings": True}
    __table_args__: Any = {"sqlite_autoincrement": True}


class UserPublic(Public):
    """An account, as its owner and an admin see it."""

    id: int = Field(primary_key=True)
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

    id: int = Field(primary_key=True)
    address: str
    user_agent: str
    created_at: datetime
    last_used_at: datetime
    expires_at: datetime


class Session(SessionPublic, table=True):
    """A login, or an API token: that is a session with a name, a scope and a token that never changes.

    Deleting the row ends it at once, with every token of it.
    """

    __tablename__ = "sessions"
    user_id: int = Field(foreign_key="users.id", ondelete="CASCADE", index=True)
    name: str | None
    scope: str | None
    token_hash: str | None = Field(unique=True)


class RefreshToken(Public, table=True):
    """A refresh token, as a hash. A used one is kept, to notice a replay."""

    __tablename__ = "refresh_tokens"
    id: int = Field(primary_key=True)
    session_id: int = Field(foreign_key="sessions.id", ondelete="CASCADE", index=True)
    token_hash: str = Field(unique=True)
    used_at: datetime | None
    expires_at: datetime


class TaskPublic(Public):
    """A task, in the trash if `deleted_at` is set."""

    id: int = Field(primary_key=True)
    title: str
    description: str | None
    status: Status = Field(sa_type=sa.String)
    priority: Priority = Field(sa_type=sa.String)
    due_date: datetime | None
    completed: bool
    completed_at: datetime | None
    attachments: int
    """How many files are attached."""
    owner_id: int = Field(foreign_key="users.id", ondelete="CASCADE")
    version: int
    """Its ETag, and its place among its owner's changes."""
    created_at: datetime
    updated_at: datetime
    deleted_at: datetime | None


class Task(TaskPublic, table=True):
    """The private half of a task."""

    __tablename__ = "tasks"
    title_key: str
    """Folded, for searching and sorting."""
    description_key: str
    text_bytes: int
    """What its texts count against the owner's storage."""
    idempotency_key: str | None


class AttachmentPublic(Public):
    """A file at a task. Its ETag is its `sha256`."""

    id: int = Field(primary_key=True)
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


class SchemaVersion(Public, table=True):
    """Which programs have written this database."""

    __tablename__ = "schema_version"
    version: int = Field(primary_key=True)


tasks_table = SQLModel.metadata.tables["tasks"].c
sa.Index("ix_tasks_version", tasks_table.owner_id, tasks_table.version, unique=True)
sa.Index("ix_tasks_key", tasks_table.owner_id, tasks_table.idempotency_key, unique=True)
sa.Index(
    "ix_tasks_created_at",
    tasks_table.owner_id,
    tasks_table.deleted_at,
    tasks_table.created_at,
    tasks_table.id,
)
sa.Index("ix_tasks_deleted_at", tasks_table.deleted_at)

USER_COLUMNS = ", ".join(UserPublic.model_fields)
SESSION_COLUMNS = ", ".join(SessionPublic.model_fields)
TASK_COLUMNS = ", ".join(TaskPublic.model_fields)
ATTACHMENT_COLUMNS = ", ".join(AttachmentPublic.model_fields)
TASK_ROWS = TypeAdapter(list[TaskPublic])

# ── 5 Schemas ───────────────────────────────────────────────────────────────────────────────────
# What comes in is strict: unknown fields are refused, "1" is no number and 1 is no date. What goes
# out is listed in section 4 and here, so that a password hash cannot slip into an answer.

RFC3339 = r"\d{4}-\d\d-\d\d([Tt ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?([Zz]|[+-]\d\d:\d\d)?)?"
MARKS_AFTER_NORMALISING = "\u0f73\u0f75\u0f81\uff9e\uff9f"
COMMON_PASSWORDS = frozenset(
    """password password1 password12 password123 passw0rd p@ssw0rd p@ssword 12345678 123456789
    1234567890 123123123 11111111 00000000 87654321 88888888 qwertyui qwertyuiop qwerty123 1q2w3e4r
    1qaz2wsx asdfghjk asdfghjkl zxcvbnm1 iloveyou iloveyou1 sunshine princess football baseball
    superman trustno1 starwars whatever computer internet michelle jennifer changeme changeit
    welcome1 welcome123 letmein1 letmein123 admin123 administrator abcd1234 abc12345""".split()
)


def is_mark(character: str) -> bool:
    """Whether normalising makes this a combining mark."""
    return unicodedata.combining(character) > 0 or character in MARKS_AFTER_NORMALISING


def storable(text: str) -> str:
    """Refuse what no database or encoder takes, or what takes long. Errors: ValueError."""
    if re.search("[\x00\ud800-\udfff]", text):
        raise ValueError("must not contain NUL or lone surrogates")
    # Normalising sorts each run of marks in quadratic time: thousands of them would take seconds.
    if not text.isascii() and "m" * 31 in "".join("m" if is_mark(each) else " " for each in text):
        raise ValueError("must not have more than 30 combining marks in a row")
    return text


def folded(text: str) -> str:
    """How texts are searched and sorted: without case, width and accents. Ref: Unicode Annex 15."""
    if text.isascii():
        return text.lower()
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return "".join(each for each in decomposed if not unicodedata.combining(each))


def username_key(text: str) -> str:
    """How usernames are compared: NFKC, without case. é stays é."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text.strip()).casefold())


def valid_username(text: str) -> str:
    """NFKC, then letters and digits of any script, `.`, `_`, `-`. Errors: ValueError."""
    name = unicodedata.normalize("NFKC", text)
    allowed = all(each in "._-" or unicodedata.category(each)[0] in "LMN" for each in name)
    if not allowed or not 3 <= len(name) <= 50:
        raise ValueError("must be 3 to 50 letters, digits, '.', '_' or '-'")
    return name


def uncommon(password: str) -> str:
    """Refuse what guessers try first. Ref: NIST SP 800-63B §3.1.1.2. Errors: ValueError."""
    if password.casefold() in COMMON_PASSWORDS:
        raise ValueError("is among the commonest; choose another")
    return password


def parse_time(value: object, time_of_day: str = "23:59:59") -> datetime:
    """RFC 3339 to UTC; a naive time is UTC, a bare date this time of that day. Errors: ValueError."""
    if not isinstance(value, str) or not re.fullmatch(RFC3339, value, re.ASCII):
        raise ValueError("must be like 2026-11-20T17:00:00Z or 2026-11-20 (in a URL, + is %2B)")
    if len(value) == 10:
        value = f"{value}T{time_of_day}Z"
    try:
        moment = datetime.fromisoformat(value.upper())
        return moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)
    except (OverflowError, ValueError):
        raise ValueError("must be a moment between the years 1 and 9999") from None


def day_begins(value: object) -> datetime:
    """A moment; a bare date is its beginning."""
    return parse_time(value, "00:00:00")


def day_ends(value: object) -> datetime:
    """A moment; a bare date is its very end."""
    return parse_time(value, "23:59:59.999999")


TIME_SCHEMA = {"format": "date-time"}
Storable = AfterValidator(storable)
Text = Annotated[str, StringConstraints(max_length=10_000), Storable]
Time = Annotated[datetime, BeforeValidator(parse_time, json_schema_input_type=str)]
TimeFrom = Annotated[datetime, BeforeValidator(day_begins, json_schema_input_type=str)]
TimeUntil = Annotated[datetime, BeforeValidator(day_ends, json_schema_input_type=str)]
Title = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200), Storable
]
Username = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=3, max_length=50),
    pydantic.Field(json_schema_extra={"pattern": r"^[\w.-]+$"}),
    Storable,
    AfterValidator(valid_username),
]
Password = Annotated[
    str, StringConstraints(min_length=8, max_length=256), Storable, AfterValidator(uncommon)
]
Email = Annotated[str, StringConstraints(max_length=254, pattern=r"^[^@\s]+@[^@\s]+$"), Storable]
Seq = Annotated[int, pydantic.Field(ge=0, le=MAX_ID)]


class Body(SQLModel):
    """The base of every body: strict, and an unknown field is an error that names it."""

    model_config = {
        "strict": True,
        "extra": "forbid",
        "use_attribute_docstrings": True,
    }


def example(**values: Any) -> Any:
    """A body that succeeds when it is sent as it is, for /docs."""
    return {"json_schema_extra": {"examples": [values]}}


class Credentials(Body):
    """A name and a password."""

    model_config = example(username="alice", password="correct horse battery")
    username: Text
    password: Text


class Registration(Body):
    """A new account."""

    model_config = example(username="alice", password="correct horse battery")
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
    current_password: Text = ""

    @model_validator(mode="after")
    def both_passwords(self) -> Self:
        """A password is changed by who knows it, not by who finds an open browser."""
        given = self.model_fields_set & {"password", "current_password"}
        if len(given) == 1:
            raise ValueError("password and current_password go together")
        return self


class ApiTokenCreate(Body):
    """A token for a script."""

    model_config = example(name="backup script", scope="read")
    name: Annotated[
        str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100), Storable
    ]
    scope: Scope_
    """`read` may only GET."""
    expires_at: Time | None = None
    """Null: never."""


class ApiTokenPublic(Public):
    """What is known later of a token for a script."""

    id: int
    name: str
    scope: Scope_
    created_at: datetime
    last_used_at: datetime | None
    expires_at: datetime | None


class ApiTokenCreated(ApiTokenPublic):
    """The only answer that shows the token itself."""

    token: str


class TokenPair(Public):
    """Send the access token as `Authorization: Bearer …`; the refresh token gets the next pair."""

    access_token: str
    refresh_token: str
    token_type: str = "bearer"  # noqa: S105
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
    description: Annotated[str, StringConstraints(max_length=10_000), Storable] | None = None
    status: Status = "todo"
    completed: bool = False
    """Instead of status: true = done, false = todo."""
    priority: Priority = "medium"
    due_date: Time | None = None
    """RFC 3339; a naive time is UTC, a bare date the end of that day."""

    @model_validator(mode="after")
    def settle_status(self) -> Self:
        """Turn `completed` into `status`; both and contradictory is an error."""
        if "completed" in self.model_fields_set:
            if "status" not in self.model_fields_set:
                self.status = "done" if self.completed else "todo"
            if self.completed != (self.status == "done"):
                raise ValueError("status and completed contradict each other")
        return self


def without_defaults(schema: Row) -> None:
    """A merge patch has no defaults: a generated client would send them."""
    schema["examples"] = [{"completed": True}]
    for field in schema["properties"].values():
        field.pop("default", None)


class TaskUpdate(TaskCreate):
    """A JSON merge patch (RFC 7396): what is absent stays, null clears description and due_date."""

    model_config = {"json_schema_extra": without_defaults}
    title: Title = ""


class Collection(BaseModel, Generic[Item]):
    """A short collection, whole."""

    data: list[Item]


class PageMeta(BaseModel):
    """Where a page stands."""

    page: int
    page_size: int
    total: int
    pages: int


class Page(Collection[Item], Generic[Item]):
    """One page; the Link header (RFC 8288) leads to the others."""

    meta: PageMeta


class PageQuery(BaseModel):
    """Paging. The highest page keeps OFFSET within 64 bits."""

    model_config = {"extra": "forbid", "use_attribute_docstrings": True}
    page: int = pydantic.Field(default=1, ge=1, le=2**53)
    page_size: int = pydantic.Field(default=20, ge=1, le=100)


class TaskQuery(PageQuery):
    """Filters, all ANDed, and the order."""

    status: list[Status] = pydantic.Field(default=[], max_length=3)
    """Repeatable."""
    priority: list[Priority] = pydantic.Field(default=[], max_length=3)
    """Repeatable."""
    completed: bool | None = None
    search: Annotated[str, StringConstraints(min_length=1, max_length=200), Storable] | None = None
    """Substring of title or description, whatever the case, width or accents."""
    due_before: TimeUntil | None = None
    """Inclusive; a bare date is its end."""
    due_after: TimeFrom | None = None
    """Inclusive; a bare date is its beginning."""
    overdue: bool | None = None
    deleted: bool = False
    """true lists the trash."""
    sort: Literal["created_at", "updated_at", "due_date", "priority", "status", "title"] = (
        "created_at"
    )
    """due_date puts tasks without one last, both ways."""
    order: Literal["asc", "desc"] = "desc"


class AdminTaskQuery(TaskQuery):
    """The same filters, and the owner's id."""

    owner_id: Annotated[int, pydantic.Field(ge=1, le=MAX_ID)] | None = None


class Changes(Collection[TaskPublic]):
    """Changed tasks and tombstones, oldest change first."""

    next_since: int | str
    """Pass it back as `since`, as it is."""
    has_more: bool


class DayCount(BaseModel):
    """How many tasks were completed on a UTC day."""

    date: str
    count: int


class Statistics(BaseModel):
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


class DatabaseHealth(BaseModel):
    """Which database, and how long it took to answer."""

    engine: str
    latency_ms: float


class Cleanup(BaseModel):
    """What a clean-up removed."""

    finished_at: datetime
    sessions: int
    refresh_tokens: int
    tasks: int


class HealthDetailed(Health):
    """Health, with figures."""

    version: str
    uptime_seconds: int
    database: DatabaseHealth
    live_connections: int
    last_cleanup: Cleanup | None


class FieldError(BaseModel):
    """What is wrong with one field."""

    field: str
    message: str


class ErrorBody(BaseModel):
    """What went wrong: `code` is stable, `message` is for people, `details` come only with 422."""

    code: str
    message: str
    request_id: str
    details: list[FieldError] | None = None


class Error(BaseModel):
    """Every error."""

    error: ErrorBody


# ── 6 Passwords and tokens ──────────────────────────────────────────────────────────────────────
# Functions that know nothing of HTTP. A password is stored as bcrypt, slow on purpose; a token is 256
# random bits, which nobody guesses, so SHA-256 is enough to make a stolen database useless.

API_TOKEN_PREFIX = "tsk_"  # noqa: S105
BCRYPT_COST = 12
UNKNOWN_USER_HASH = f"$2b${BCRYPT_COST}$" + "." * 53
"""What the password of an unknown user is compared with, at the same cost; nothing hashes to it."""
ISSUER = "onefile-tasks"
CLOCK_LEEWAY_SECONDS = 10
SESSION_DAYS = 180
password_workers = ThreadPoolExecutor(os.cpu_count() or 1, "password")
"""Never more hashes at once than cores, and none in the event loop: one takes a quarter of a second."""


def password_bytes(password: str) -> bytes:
    """64 bytes that depend on the whole password: bcrypt reads 72, and no NUL."""
    text = unicodedata.normalize("NFKC", password)
    return hashlib.sha256(b"onefile-tasks " + text.encode()).hexdigest().encode()


async def hash_password(password: str) -> str:
    """Salted bcrypt of 2^BCRYPT_COST rounds."""
    salt = bcrypt.gensalt(BCRYPT_COST)
    loop = asyncio.get_running_loop()
    hashing = loop.run_in_executor(password_workers, bcrypt.hashpw, password_bytes(password), salt)
    return (await hashing).decode()


async def password_matches(password: str, password_hash: str) -> bool:
    """Compare in constant time."""
    arguments = password_bytes(password), password_hash.encode()
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(password_workers, bcrypt.checkpw, *arguments)


def token_hash(token: str) -> str:
    """SHA-256, hexadecimal: all that the database knows of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def encode_access_token(user_id: int, session_id: int) -> str:
    """A JWT for one session. Ref: RFC 7519; RFC 9068 §2.2."""
    issued = int(now().timestamp())
    claims = {
        "iss": ISSUER,
        "sub": str(user_id),
        "sid": str(session_id),
        "typ": "access",
        "iat": issued,
        "exp": issued + settings.access_token_minutes * 60,
        "jti": secrets.token_hex(8),
    }
    return jwt.encode(claims, settings.secret_key.get_secret_value(), "HS256")


class AccessToken(NamedTuple):
    """What a signed access token says."""

    user_id: int
    session_id: int
    expires_at: int
    """Unix seconds."""


@functools.lru_cache(maxsize=4096)
def decode_access_token(token: str, secret_key: str) -> AccessToken | None:
    """The claims of a token that we signed, or None. Whether it has expired is for the caller to see."""
    # now() compares the times, not PyJWT, so that one clock rules and a test can set it.
    options: Any = {
        "require": ["iss", "sub", "sid", "typ", "iat", "exp", "jti"],
        "verify_exp": False,
        "verify_iat": False,
    }
    try:
        claims = jwt.decode(token, secret_key, ["HS256"], options, issuer=ISSUER)
        if claims["typ"] != "access":
            return None
        return AccessToken(int(claims["sub"]), int(claims["sid"]), int(claims["exp"]))
    except (jwt.PyJWTError, ValueError, TypeError):
        return None


def load_secret_key(path: Path) -> SecretStr:
    """SECRET_KEY, or the one that was generated at first and kept here. Errors: SystemExit."""
    key = settings.secret_key.get_secret_value()
    if not key and settings.database_url:
        raise SystemExit("SECRET_KEY: must be set with DATABASE_URL, the same for every process")
    if not key:
        if not path.exists():
            path.touch(0o600)
            path.write_text(secrets.token_urlsafe(32))
        key = path.read_text(errors="replace").strip()
    placeholder = re.search(
        r"change.?(me|this|it)|your.?secret|secret.?key|example|insecure", key, re.I
    )
    if len(key.encode()) < 32 or len(set(key)) < 8 or placeholder:  # Ref: RFC 7518 §3.2
        raise SystemExit(
            "SECRET_KEY: must be 32 random bytes or more; leave it empty to generate one"
        )
    return SecretStr(key)


# ── 7 Who asks ──────────────────────────────────────────────────────────────────────────────────
# One statement finds the session, its user and the user's seq, for every request anew: so logout,
# disabling and role changes hold for the very next request, in every process. Only the check of a
# token's signature is remembered.

WHO_ASKS = f"""
SELECT {", ".join(f"users.{name}" for name in UserPublic.model_fields)}, seq, scope,
    sessions.id AS session_id, sessions.created_at AS session_created_at
FROM sessions JOIN users ON users.id = sessions.user_id
WHERE (sessions.id = :session_id OR sessions.token_hash = :token_hash)
    AND sessions.expires_at > :now AND users.is_active"""


class Caller(UserPublic):
    """Who asks: a user, and the session or API token that they came by."""

    seq: int
    scope: Scope_ | None
    """Of an API token; None for a login."""
    session_id: int
    session_created_at: datetime


CALLER = TypeAdapter(Caller)
last_uses: dict[int, datetime] = {}
"""When each session was last used, until the next minute's chore writes it down."""


async def find_caller(session_id: int, token_hash: str = "") -> Caller | None:
    """The living session of this id or of this API token's hash, and its user."""
    row = await database.lookup(WHO_ASKS, session_id=session_id, token_hash=token_hash, now=now())
    return CALLER.validate_python(row) if row else None


async def authenticate(authorization: str | None) -> Caller:
    """Whom an Authorization header names. Errors: 401, with the next step. Ref: RFC 6750 §2.1."""
    if not authorization:
        raise unauthorized("not_authenticated", "Send the header Authorization: Bearer <token>.")
    scheme, _, token = authorization.partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer":
        raise unauthorized("not_authenticated", "The Authorization header must begin with Bearer.")
    if token.startswith(API_TOKEN_PREFIX):
        caller = await find_caller(0, token_hash(token))
    else:
        access = decode_access_token(token, settings.secret_key.get_secret_value())
        if access is None:
            raise unauthorized("invalid_token", "This is no token of this server: log in.")
        if access.expires_at + CLOCK_LEEWAY_SECONDS <= now().timestamp():
            raise unauthorized(
                "token_expired", "This access token has expired: refresh, or log in."
            )
        caller = await find_caller(access.session_id)
        if caller and caller.id != access.user_id:
            caller = None
    if caller is None:
        raise unauthorized("session_ended", "This token's session has ended: log in.")
    last_uses[caller.session_id] = now()
    return caller


def etag_matches(header: str, etag: str) -> bool:
    """Whether a conditional header is `*` or names this ETag; weak ones count. Ref: RFC 9110 §13.1."""
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag.removeprefix("W/") in tags


def not_modified(request: Request, etag: str) -> None:
    """Errors: 304, if the caller has this already. Ref: RFC 9110 §13.1.2."""
    if etag_matches(request.headers.get("if-none-match", ""), etag):
        raise ApiError(304, "not_modified", "", {"ETag": etag})


# ── 8 Rate limits ───────────────────────────────────────────────────────────────────────────────
# SlowAPI's windows count by user, or by address when anonymous. CurrentUser counts by itself, so no
# route that asks for a user can forget it; a route that asks for none shows `limited("login")`.


class Window(NamedTuple):
    """What is left of a limit."""

    allowed: bool
    amount: int
    remaining: int
    reset: float
    """Unix seconds."""

    def headers(self) -> dict[str, str]:
        """X-RateLimit-*, integers."""
        return {
            "X-RateLimit-Limit": str(self.amount),
            "X-RateLimit-Remaining": str(max(0, self.remaining)),
            "X-RateLimit-Reset": str(math.ceil(self.reset)),
        }


class Exchange:
    """What one request gathers on its way, for its answer and its line in the log."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.user_id: int | None = None
        self.window: Window | None = None
        self.max_body_bytes = settings.max_body_kib * 1024


def exchange_of(connection: HTTPConnection) -> Exchange:
    """The one place where a request's own data is kept."""
    exchange: Exchange = connection.scope["exchange"]
    return exchange


def client_address(connection: HTTPConnection) -> str:
    """Where the caller is; behind a proxy only if it is one of TRUSTED_PROXIES (section 10)."""
    return connection.client.host if connection.client else "local"


def address_key(connection: HTTPConnection) -> str:
    """What counts as one address: an IPv4 address, or an IPv6 customer's /64. Ref: RFC 6177."""
    try:
        address = ipaddress.ip_address(client_address(connection).partition("%")[0])
    except ValueError:
        return "local"
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


limiter = Limiter(client_address, strategy="moving-window").limiter


def hit_in_memory(limit: limits.RateLimitItem, name: str, key: str, cost: int) -> Window:
    """Count against a window of this process."""
    allowed = cost == 0 or limiter.hit(limit, name, key, cost=cost)
    reset, remaining = limiter.get_window_stats(limit, name, key)
    if (
        reset > time.time() + limit.get_expiry() + 1
    ):  # The clock went back: those entries never end.
        limiter.clear(limit, name, key)
        return hit_in_memory(limit, name, key, cost)
    return Window(allowed and (cost > 0 or remaining > 0), limit.amount, remaining, reset)


async def count(exchange: Exchange, name: str, key: str, cost: int = 1) -> None:
    """Count a request against RATE_LIMIT_<name>; with cost 0 only look. Errors: 429. Ref: RFC 6585."""
    if settings.rate_limits == "off":
        return
    window = hit_in_memory(getattr(settings, f"rate_limit_{name}"), name, key, cost)
    if exchange.window is None or window.remaining < exchange.window.remaining:
        exchange.window = window
    if not window.allowed:
        exchange.window = window
        RATE_LIMITED.inc()
        seconds = max(1, math.ceil(window.reset - time.time()))
        message = f"Too many requests. Try again in {seconds} s."
        raise ApiError(429, "rate_limited", message, {"Retry-After": str(seconds)})


class Limit:
    """A dependency that counts an address against one limit, and as a write."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def __call__(self, request: Request) -> None:
        """Count. Errors: 429."""
        await count(exchange_of(request), self.name, address_key(request))
        await count(exchange_of(request), "write", address_key(request))


def limited(name: str) -> Any:
    """For a route's `dependencies`: count its callers by address against RATE_LIMIT_<name>."""
    return Depends(Limit(name))


class Authentication(SecurityBase):
    """The dependency behind CurrentUser, which /docs shows as the way to log in."""

    scheme_name = "login"
    model = OAuth2(
        flows=OAuthFlows(
            password=OAuthFlowPassword(
                tokenUrl=f"{settings.root_path}{API}/auth/token",
                refreshUrl=f"{settings.root_path}{API}/auth/token",
            )
        ),
        description="Your username and password. Leave client_id and client_secret empty.",
    )

    async def __call__(self, request: Request) -> Caller:
        """Who asks, within their limits. Errors: 401; 403 insufficient_scope; 429."""
        exchange = exchange_of(request)
        limit = "read" if request.method == "GET" else "write"
        try:
            caller = await authenticate(request.headers.get("authorization"))
        except ApiError:
            await count(exchange, limit, address_key(request))
            raise
        exchange.user_id = caller.id
        await count(exchange, limit, f"user {caller.id}")
        if caller.scope == "read" and request.method != "GET":
            raise insufficient_scope("This API token may only GET.")
        return caller


def insufficient_scope(message: str) -> ApiError:
    """403. Ref: RFC 6750 §3.1."""
    header = {"WWW-Authenticate": 'Bearer error="insufficient_scope"'}
    return ApiError(403, "insufficient_scope", message, header)


CurrentUser = Annotated[Caller, Depends(Authentication())]


async def logged_in_user(user: CurrentUser) -> Caller:
    """Who asks, by a login: a leaked API token shall not reach the account. Errors: 401; 403."""
    if user.scope:
        raise insufficient_scope("An API token may not do this: log in.")
    return user


LoggedInUser = Annotated[Caller, Depends(logged_in_user)]


async def recent_user(user: LoggedInUser) -> Caller:
    """Who asks, by a fresh login. Errors: 401; 403 login_again."""
    if now() - user.session_created_at > timedelta(minutes=10):
        raise forbidden(
            "login_again", "Log in again: this needs a session younger than 10 minutes."
        )
    return user


RecentUser = Annotated[Caller, Depends(recent_user)]


async def admin_user(user: LoggedInUser) -> Caller:
    """Who asks, an admin by a login. Errors: 401; 403 admin_required."""
    if user.role != "admin":
        raise forbidden("admin_required", "Only an admin may do this.")
    return user


AdminUser = Annotated[Caller, Depends(admin_user)]

# ── 9 Live updates ──────────────────────────────────────────────────────────────────────────────
# One number per user. A write takes the next seq in its transaction, and after the commit rings its
# user's bell. A stream is a cursor that sleeps until the bell tells a later seq, and then reads what it
# missed. No queue per connection: whoever falls behind, by one change or a thousand, catches up.

MAX_STREAMS_PER_USER = 50
STREAM_BATCH = 100
LOOK_SECONDS = 2.0  # How late a stream notices a logout, or a change that no bell told of.
SEND_SECONDS = 20.0
WEBHOOK_PAUSES = (0, 1, 10, 60)  # Seconds before each try.
MAX_WEBHOOKS_WAITING = 2000

CHANGES_AFTER = f"""
SELECT users.seq AS seq, purged_seq, {", ".join(f"tasks.{name}" for name in TaskPublic.model_fields)}
FROM users LEFT JOIN tasks ON tasks.owner_id = users.id AND tasks.version > :since
WHERE users.id = :user_id ORDER BY tasks.version LIMIT :limit"""


class ChangesRead(NamedTuple):
    """A user's numbers at one moment, and their tasks that changed after a cursor, oldest first."""

    seq: int
    purged_seq: int
    tasks: list[TaskPublic]
    has_more: bool

    def stale(self, since: int, known_purge: int = 0) -> bool:
        """Whether who has seen `since`, and knows of a purge up to there, missed a deletion for ever."""
        missed_purge = 0 < since < self.purged_seq and self.purged_seq != known_purge
        return missed_purge or since > self.seq

    def cursor(self) -> int:
        """Where to go on."""
        return self.tasks[-1].version if self.has_more else self.seq


async def changes_after(user_id: int, since: int, limit: int) -> ChangesRead:
    """What changed after a cursor, deletions included. Errors: 401 if the user is gone."""
    values = {"user_id": user_id, "since": since, "limit": limit + 1}
    rows = await database.read(user_id, CHANGES_AFTER, **values)
    if not rows:
        raise unauthorized("session_ended", "This account is gone.")
    tasks = TASK_ROWS.validate_python([row for row in rows[:limit] if row["id"]])
    return ChangesRead(rows[0]["seq"], rows[0]["purged_seq"], tasks, len(rows) > limit)


class LiveEvent(NamedTuple):
    """What a stream sends, encoded once for all streams."""

    seq: int
    kind: str
    text: str


def live_event(task: TaskPublic) -> LiveEvent:
    """A task as the change that left it so. One that nobody has changed since is `created`."""
    kind = "created" if task.updated_at == task.created_at else "updated"
    if task.deleted_at:
        kind = "deleted"
    text = f'{{"type":"{kind}","seq":{task.version},"task":{task.model_dump_json()}}}'
    return LiveEvent(task.version, kind, text)


class Broadcaster:
    """The open streams of this process, by user, and the reads that they share."""

    def __init__(self) -> None:
        self.streams: dict[int, set[Stream]] = {}
        self.reads: dict[tuple[int, int], asyncio.Task[tuple[ChangesRead, list[LiveEvent]]]] = {}

    def ring(self, user_id: int, seq: int) -> None:
        """Tell a user's streams that there is something up to this seq."""
        for stream in self.streams.get(user_id, ()):
            stream.newest = max(stream.newest, seq)
            stream.wake.set()

    def everybody(self) -> list["Stream"]:
        """The open streams of all users."""
        return [stream for streams in self.streams.values() for stream in streams]

    async def missed(self, user_id: int, cursor: int) -> tuple[ChangesRead, list[LiveEvent]]:
        """What followed a cursor, read and encoded once for all streams that ask meanwhile."""
        key = (user_id, cursor)
        if key not in self.reads:
            self.reads[key] = asyncio.create_task(read_events(user_id, cursor))
            self.reads[key].add_done_callback(lambda _: self.reads.pop(key))
        return await asyncio.shield(self.reads[key])


broadcaster = Broadcaster()
LIVE_CONNECTIONS.set_function(lambda: len(broadcaster.everybody()))


async def read_events(user_id: int, cursor: int) -> tuple[ChangesRead, list[LiveEvent]]:
    """One batch after a cursor, and its text."""
    changes = await changes_after(user_id, cursor, STREAM_BATCH)
    return changes, [live_event(task) for task in changes.tasks]


class Stream:
    """One live connection: a cursor into its user's changes."""

    def __init__(self, user: Caller, client_id: str | None) -> None:
        self.user_id = user.id
        self.session_id = user.session_id
        self.client_id = client_id
        self.cursor = 0
        self.newest = 0
        self.known_purge = 0
        self.stale = False
        self.next_look = time.monotonic() + LOOK_SECONDS
        self.wake = asyncio.Event()
        self.close_code = 0
        self.close_reason = ""

    def close(self, code: int, reason: str) -> None:
        """End with a WebSocket close code; the first reason stands."""
        if not self.close_code:
            self.close_code = code
            self.close_reason = reason
        self.wake.set()

    async def look(self) -> None:
        """Whether the session still lives, and where the seq is: for what no bell told."""
        self.next_look = time.monotonic() + LOOK_SECONDS
        caller = await find_caller(self.session_id)
        if caller is None:
            self.close(4401, "the session has ended")
        else:
            self.newest = max(self.newest, caller.seq)

    async def next_events(self) -> list[LiveEvent]:
        """What was not sent yet; nothing after a while without news. Errors: 503."""
        if time.monotonic() >= self.next_look:
            await self.look()
        if self.newest <= self.cursor:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.wake.wait(), LOOK_SECONDS)
            self.wake.clear()
            return []
        changes, events = await broadcaster.missed(self.user_id, self.cursor)
        if changes.stale(self.cursor, self.known_purge):
            self.known_purge = changes.purged_seq
            return [LiveEvent(changes.seq, "resync_required", '{"type":"resync_required"}')]
        if not events:  # A purge takes a seq and leaves no task.
            self.cursor = changes.seq
        return events

    async def events(self) -> AsyncIterator[LiveEvent]:
        """Everything after the cursor, in seq order, none twice, until closed."""
        while not self.close_code:
            try:
                events = await self.next_events()
            except (ApiError, *database.failures):  # It comes back, and the cursor knows where.
                await asyncio.sleep(1)
                continue
            for event in events:
                if self.close_code:
                    return
                self.cursor = event.seq
                yield event


@asynccontextmanager
async def open_stream(
    user: Caller, since: int | None, client_id: str | None
) -> AsyncIterator[Stream]:
    """A registered stream; it replaces the user's other one with the same client_id. Errors: 410; 429."""
    streams = broadcaster.streams.setdefault(user.id, set())
    replaced = [other for other in streams if client_id and other.client_id == client_id]
    if len(streams) - len(replaced) >= MAX_STREAMS_PER_USER:
        message = f"You have {MAX_STREAMS_PER_USER} streams open. Close one."
        raise ApiError(429, "too_many_streams", message, {"Retry-After": "60"})
    for other in replaced:
        other.close(4409, "replaced by a newer connection")
    stream = Stream(user, client_id)
    streams.add(stream)
    try:
        # Registered first, looked second: a commit in between is noticed by one or the other.
        start = await changes_after(user.id, MAX_ID - 1, 1)
        stream.cursor = start.seq if since is None else since
        stream.newest = max(stream.newest, start.seq)
        stream.known_purge = start.purged_seq
        if start.stale(stream.cursor):
            stream.stale = True
            stream.cursor = start.seq
        yield stream
    finally:
        streams.discard(stream)
        if not streams and broadcaster.streams.get(user.id) is streams:
            del broadcaster.streams[user.id]


AS_CALLER = """
UPDATE users SET seq = seq + :step
WHERE id = :user_id AND role = :role AND is_active AND EXISTS (
    SELECT 1 FROM sessions WHERE id = :session_id AND user_id = :user_id AND expires_at > :now)
RETURNING seq"""


async def still_logged_in(db: Transaction, user: Caller, step: int = 0) -> int:
    """Insist, inside a transaction, on who asked, and lock their row. Returns their seq. Errors: 401."""
    rows = await db.fetch(
        AS_CALLER, step=step, user_id=user.id, role=user.role, session_id=user.session_id, now=now()
    )
    if not rows:
        raise unauthorized("session_ended", "Your session has ended meanwhile: log in.")
    seq: int = rows[0]["seq"]
    return seq


WRITTEN_COLUMNS = [name for name in Task.model_fields if name != "id"]
CHANGED_COLUMNS = [name for name in WRITTEN_COLUMNS if name != "idempotency_key"]
INSERT_TASK = f"""
INSERT INTO tasks ({", ".join(WRITTEN_COLUMNS)}) VALUES ({", ".join(f":{n}" for n in WRITTEN_COLUMNS)})
RETURNING {TASK_COLUMNS}"""
UPDATE_TASK = f"""
UPDATE tasks SET {", ".join(f"{name} = :{name}" for name in CHANGED_COLUMNS)}
WHERE id = :id RETURNING {TASK_COLUMNS}"""
FIND_TASK = f"SELECT {TASK_COLUMNS} FROM tasks WHERE id = :id AND owner_id = :owner_id"
GROW_STORAGE = """
UPDATE users SET storage_bytes = storage_bytes + :size WHERE id = :user_id RETURNING storage_bytes"""


def text_bytes(task: Row) -> int:
    """What a task's texts count against the storage of its owner."""
    texts = (task["title"], task["description"] or "")
    return sum(len(text.encode()) + len(folded(text).encode()) for text in texts)


class Change:
    """A transaction that changes a user's tasks, at the seq that it took."""

    def __init__(self, db: Transaction, user_id: int, seq: int) -> None:
        self.db = db
        self.user_id = user_id
        self.seq = seq
        self.moment = now()
        self.written: list[TaskPublic] = []

    async def task(
        self, task_id: int, if_match: str | None = None, trashed: bool = False
    ) -> TaskPublic:
        """One task, in the trash or out of it. Errors: 404 absent or not yours; 412 stale version."""
        rows = await self.db.fetch(FIND_TASK, id=task_id, owner_id=self.user_id)
        if not rows or (rows[0]["deleted_at"] is not None) != trashed:
            raise not_found("task", task_id)
        version = f'"{rows[0]["version"]}"'
        if if_match is not None and not etag_matches(if_match, version):
            message = f"The task is at version {version} now."
            if '"' not in if_match:
                message = f"If-Match wants quotes: {version}"
            raise ApiError(412, "version_mismatch", message)
        return TaskPublic.model_validate(rows[0])

    async def create(self, values: Row) -> TaskPublic:
        """A new task."""
        columns = {
            "owner_id": self.user_id,
            "attachments": 0,
            "completed_at": None,
            "created_at": self.moment,
            "deleted_at": None,
        }
        return await self.write(INSERT_TASK, columns | values, 0)

    async def update(self, task: TaskPublic, values: Row) -> TaskPublic:
        """New values of one task."""
        columns = task.model_dump()
        return await self.write(UPDATE_TASK, columns | values, text_bytes(columns))

    async def write(self, sql: str, columns: Row, bytes_before: int) -> TaskPublic:
        """One task with all that follows from its columns, at this change's seq. Errors: 413."""
        columns["completed"] = columns["status"] == "done"
        if not columns["completed"]:
            columns["completed_at"] = None
        elif columns["completed_at"] is None:
            columns["completed_at"] = self.moment
        columns["title_key"] = folded(columns["title"])
        columns["description_key"] = folded(columns["description"] or "")
        columns["text_bytes"] = text_bytes(columns)
        columns["version"] = self.seq
        columns["updated_at"] = self.moment
        rows = await self.db.fetch(sql, **columns)
        await self.grow(columns["text_bytes"] - bytes_before)
        task = TaskPublic.model_validate(rows[0])
        self.written.append(task)
        return task

    async def grow(self, size: int) -> None:
        """Count bytes against the owner's storage. Errors: 413 storage_full."""
        if size == 0:
            return
        rows = await self.db.fetch(GROW_STORAGE, user_id=self.user_id, size=size)
        if size > 0 and rows[0]["storage_bytes"] > settings.max_storage_mib * MIB:
            message = f"Your tasks and attachments may have {settings.max_storage_mib} MiB."
            raise ApiError(413, "storage_full", message)


@asynccontextmanager
async def changing(user: Caller) -> AsyncIterator[Change]:
    """Take the user's next seq; when the block is committed, tell streams and webhook. Errors: 401."""
    async with database.transaction() as db:
        seq = await still_logged_in(db, user, step=1)
        change = Change(db, user.id, seq)
        yield change
    announce(user.id, seq)
    for task in change.written:
        announce_to_webhook(live_event(task).text)


def announce(user_id: int, seq: int) -> None:
    """Ring a user's bell, after the commit."""
    broadcaster.ring(user_id, seq)


PURGE_USER = """
UPDATE users SET seq = seq + 1,
    purged_seq = (SELECT coalesce(max(version), users.purged_seq) FROM tasks
        WHERE owner_id = :user_id AND deleted_at <= :until AND version > users.purged_seq),
    storage_bytes = storage_bytes
        - (SELECT coalesce(sum(text_bytes), 0) FROM tasks
            WHERE owner_id = :user_id AND deleted_at <= :until)
        - (SELECT coalesce(sum(size_bytes), 0) FROM attachments
            JOIN tasks ON tasks.id = task_id WHERE owner_id = :user_id AND deleted_at <= :until)
WHERE id = :user_id RETURNING seq"""
PURGE_TASKS = "DELETE FROM tasks WHERE owner_id = :user_id AND deleted_at <= :until RETURNING id"


async def purge(db: Transaction, user_id: int, until: datetime) -> tuple[int, int]:
    """Delete a user's trash up to a moment for good. Returns their seq, and how many tasks went."""
    users = await db.fetch(PURGE_USER, user_id=user_id, until=until)
    purged = await db.fetch(PURGE_TASKS, user_id=user_id, until=until)
    return (users[0]["seq"] if users else 0), len(purged)


webhook_calls: set[asyncio.Task[None]] = set()


def announce_to_webhook(text: str) -> None:
    """Post a change to WEBHOOK_URL, if there is one, never in the way of what caused it."""
    if not settings.webhook_url:
        return
    if len(webhook_calls) >= MAX_WEBHOOKS_WAITING:
        WEBHOOKS_GIVEN_UP.inc()
        return
    call = asyncio.create_task(call_webhook(text, f"msg_{secrets.token_hex(12)}"))
    webhook_calls.add(call)
    call.add_done_callback(webhook_calls.discard)


async def call_webhook(text: str, message_id: str) -> None:
    """Four signed tries with one id, so that a receiver can drop a repeat. Ref: Standard Webhooks."""
    import httpx
    from standardwebhooks import Webhook

    webhook = Webhook(settings.webhook_secret.get_secret_value())
    for pause in WEBHOOK_PAUSES:
        await asyncio.sleep(pause)
        moment = datetime.now(UTC)
        headers = {
            "content-type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": str(int(moment.timestamp())),
            "webhook-signature": webhook.sign(message_id, moment, text),
        }
        with contextlib.suppress(httpx.HTTPError, httpx.InvalidURL, TimeoutError):
            async with asyncio.timeout(10), httpx.AsyncClient() as client:
                request = client.build_request(
                    "POST", settings.webhook_url, content=text, headers=headers
                )
                answer = await client.send(request, stream=True)  # Its body may never end.
                if answer.is_success:
                    return
    WEBHOOKS_GIVEN_UP.inc()


# ── 10 Application ──────────────────────────────────────────────────────────────────────────────
# Around everything lies one ASGI layer of ours, because FastAPI's handlers run inside its middleware
# and never see each other's failures: only the outermost layer can put an id on every answer, and turn
# whatever goes wrong into the envelope.

KNOWN_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "WEBSOCKET"}
CLEANUP_SECONDS = 3600.0
USES_SECONDS = 60.0
MAX_SOCKET_BYTES = 64 * 1024
STRICT_POLICY = b"default-src 'none'; frame-ancestors 'none'"
DOCS_POLICY = (
    b"default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' data:; worker-src blob:; frame-ancestors 'none'"
)
EXPOSED_HEADERS = """ETag Link Location Retry-After X-Request-ID Idempotency-Replayed Content-Disposition
X-RateLimit-Limit X-RateLimit-Remaining X-RateLimit-Reset""".split()
started_at = time.monotonic()
last_cleanup: Cleanup | None = None

ADD_USER = f"""
INSERT INTO users (username, username_key, email, role, is_active, created_at, password_hash,
    seq, purged_seq, storage_bytes)
VALUES (:username, :username_key, :email, :role, TRUE, :now, :password_hash, 0, 0, 0)
ON CONFLICT (username_key) DO NOTHING RETURNING {USER_COLUMNS}"""


async def add_user(
    db: Transaction, name: str, password_hash: str, role: Role, email: str | None = None
) -> UserPublic:
    """A new account. Errors: 409 username_taken."""
    rows = await db.fetch(
        ADD_USER,
        username=name,
        username_key=username_key(name),
        email=email,
        role=role,
        now=now(),
        password_hash=password_hash,
    )
    if not rows:
        raise ApiError(409, "username_taken", "This username is taken.")
    return UserPublic.model_validate(rows[0])


def checked(kind: Any, value: str, name: str) -> str:
    """A value that no request brought, checked as if one had. Errors: SystemExit that names it."""
    try:
        text: str = TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise SystemExit(first_problem(error, name)) from None
    return text


async def create_first_admin() -> None:
    """ADMIN_USERNAME, if nobody is there yet; a generated password is printed, this once."""
    given = settings.admin_password.get_secret_value()
    password = checked(Password, given or secrets.token_urlsafe(16), "ADMIN_PASSWORD")
    name = checked(Username, settings.admin_username, "ADMIN_USERNAME")
    if await database.lookup("SELECT id FROM users LIMIT 1"):
        return
    password_hash = await hash_password(password)
    with contextlib.suppress(ApiError):  # Another process was faster.
        async with database.transaction() as db:
            await add_user(db, name, password_hash, "admin")
        if not given:
            print(f"  Admin      {name}, password {password}   (shown only now)", flush=True)


@asynccontextmanager
async def opened_database() -> AsyncIterator[None]:
    """The database, open and ready. Errors: SystemExit with one line."""
    try:
        await database.open()
        settings.secret_key = load_secret_key(settings.data_dir / "secret_key")
        await create_first_admin()
    except database.failures as error:
        raise SystemExit(f"The database cannot be opened: {error}") from None
    try:
        yield
    finally:
        await database.close()


async def write_down_uses() -> None:
    """Note when each session was last used: once a minute, instead of once a request."""
    uses = list(last_uses.items())
    last_uses.clear()
    if uses:
        async with database.transaction() as db:
            for session_id, moment in uses:
                sql = "UPDATE sessions SET last_used_at = :moment WHERE id = :session_id"
                await db.fetch(sql, moment=moment, session_id=session_id)


async def clean_up() -> None:
    """Remove what has expired: sessions, used refresh tokens, trash older than TRASH_DAYS."""
    global last_cleanup
    moment = now()
    oldest = moment - timedelta(days=settings.trash_days)
    async with database.transaction() as db:
        ended = await db.fetch(
            "DELETE FROM sessions WHERE expires_at <= :now RETURNING id", now=moment
        )
        used = await db.fetch(
            "DELETE FROM refresh_tokens WHERE expires_at <= :now RETURNING id", now=moment
        )
    sql = "SELECT DISTINCT owner_id FROM tasks WHERE deleted_at <= :until"
    purged = 0
    for owner in await database.read(0, sql, until=oldest):
        async with database.transaction() as db:
            seq, count = await purge(db, owner["owner_id"], oldest)
        announce(owner["owner_id"], seq)
        purged += count
    last_cleanup = Cleanup(
        finished_at=now(), sessions=len(ended), refresh_tokens=len(used), tasks=purged
    )


async def every(seconds: float, work: Callable[[], Any]) -> None:
    """Do it again and again; after a failure the next turn tries anew."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except Exception as error:
            log.error("%s failed: %s", work.__name__, error)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Start: logging, database, chores. Stop: end the streams and chores, finish the writes."""
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
        log.handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.setLevel(settings.log_level.upper())
    log.propagate = False
    pages.clear()
    async with opened_database():
        chores = [
            asyncio.create_task(every(USES_SECONDS, write_down_uses)),
            asyncio.create_task(every(CLEANUP_SECONDS, clean_up)),
        ]
        yield
        for task in [*chores, *webhook_calls]:
            task.cancel()
        await write_down_uses()


class Conversation:
    """One request or socket: `receive` measures its body, `send` completes its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else secrets.token_hex(8)
        self.exchange = Exchange(request_id)
        self.scope = dict(scope, exchange=self.exchange)
        self.raw_receive = receive
        self.raw_send = send
        self.announced_bytes = int(headers.get(b"content-length", 0))
        self.received_bytes = 0
        self.began = time.perf_counter()
        self.method = scope.get("method", "WEBSOCKET")
        if self.method == "HEAD":
            self.scope["method"] = "GET"
        path = scope["path"]
        if path.endswith("/") and path.rstrip("/") != settings.root_path:
            self.scope["path"] = path[:-1]
        self.status = 0
        self.ends_with_newline = False
        self.complete = False

    async def receive(self) -> Message:
        """Measure a body, announced or as it arrives. Errors: 413. Ref: RFC 9110 §15.5.14."""
        self.check_size(self.announced_bytes)
        message = await self.raw_receive()
        self.received_bytes += len(message.get("body", b""))
        self.check_size(self.received_bytes)
        return message

    def check_size(self, size: int) -> None:
        """Errors: 413."""
        limit = self.exchange.max_body_bytes
        if size > limit:
            raise ApiError(413, "body_too_large", f"The body is larger than {limit // 1024} KiB.")

    async def send(self, message: Message) -> None:
        """Put id, limits and policies on the head, end JSON with a newline, a HEAD without its body."""
        if self.complete:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.complete_head(message)
            await self.raw_send(message)
            message = {"type": "http.response.body"}
            if self.method != "HEAD":
                return
        elif message["type"] == "http.response.body" and self.ends_with_newline:
            message = dict(message, body=message["body"] + b"\n")
        elif message["type"].startswith("websocket"):
            self.status = message.get("code", 101)
        self.complete = message["type"] == "http.response.body" and not message.get("more_body")
        await self.raw_send(message)

    def complete_head(self, message: Message) -> None:
        """Headers of every answer."""
        headers = MutableHeaders(raw=list(message["headers"]))
        headers["X-Request-ID"] = self.exchange.request_id
        content_type = headers.get("content-type", "")
        policy = DOCS_POLICY if content_type.startswith("text/html") else STRICT_POLICY
        headers.raw.append((b"content-security-policy", policy))
        headers.raw.append((b"x-content-type-options", b"nosniff"))
        headers.raw.append((b"referrer-policy", b"no-referrer"))
        if self.exchange.window:
            headers.update(self.exchange.window.headers())
        if content_type == "application/json" and "content-length" in headers:
            self.ends_with_newline = True
            headers["content-length"] = str(int(headers["content-length"]) + 1)
        message["headers"] = headers.raw

    async def fail(self, error: HTTPException) -> None:
        """Answer with the envelope, or close a socket with 1011, unless that is too late."""
        with contextlib.suppress(OSError, RuntimeError):
            if self.method == "WEBSOCKET":
                await self.send({"type": "websocket.close", "code": 1011})
            elif self.status == 0:
                answer = error_response(error, self.exchange.request_id)
                await answer(self.scope, self.receive, self.send)

    def log(self) -> None:
        """Count, and one line. The path is percent-encoded, so that it cannot forge another."""
        seconds = time.perf_counter() - self.began
        route = getattr(self.scope.get("route"), "path", "none")
        method = self.method if self.method in KNOWN_METHODS else "other"
        REQUEST_SECONDS.labels(method, route, self.status).observe(seconds)
        if log.isEnabledFor(logging.INFO):
            path = quote(self.scope["path"])
            user = f"user {self.exchange.user_id}" if self.exchange.user_id else "anonymous"
            line = "%s %s %s %s %.1f ms %s"
            request_id = self.exchange.request_id
            log.info(line, request_id, self.method, path, self.status, seconds * 1000, user)


class Gateway:
    """The outermost ASGI layer: what holds for every request and socket, whatever happens inside."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request, and turn a failure into an error with the request's id."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        conversation = Conversation(scope, receive, send)
        try:
            await self.app(conversation.scope, conversation.receive, conversation.send)
        except (ClientDisconnect, WebSocketDisconnect):
            conversation.status = conversation.status or 499  # What proxies call it.
        except asyncio.CancelledError:
            stopping = ApiError(
                503, "server_stopping", "The server is stopping.", {"Retry-After": "5"}
            )
            await conversation.fail(stopping)
        except HTTPException as error:
            await conversation.fail(error)
        except Exception:
            log.exception("%s failed", conversation.exchange.request_id)
            message = "Something failed here; the log knows more by this request_id."
            await conversation.fail(ApiError(500, "internal_error", message))
        finally:
            conversation.log()


def routes_at(path: str) -> list[Any]:
    """Every route that a path belongs to, whatever the method."""
    contexts = iter_route_contexts(app.routes)
    return [route for route in contexts if route.path_regex.match(path)]


def method_not_allowed(routes: list[Any]) -> ApiError:
    """405, with the methods that these routes have. Ref: RFC 9110 §15.5.6."""
    methods = {method for route in routes for method in route.methods or {"GET"}}
    if "GET" in methods:
        methods.add("HEAD")
    allow = ", ".join(sorted(methods))
    message = f"This path answers {allow}."
    return ApiError(405, "method_not_allowed", message, {"Allow": allow})


async def on_http_exception(request: Request, error: Exception) -> Response:
    """The framework's errors and ours, in the envelope."""
    assert isinstance(error, HTTPException)  # noqa: S101
    if error.status_code == 404 and error.detail == "Not Found":
        error = ApiError(404, "not_found", "No such path. All of them stand in /docs.")
    elif error.status_code == 405:
        error = method_not_allowed(routes_at(route_path(request)))
    elif error.status_code == 400 and not isinstance(error, ApiError):
        error = ApiError(400, "invalid_json", "The body cannot be read.")
    return error_response(error, exchange_of(request).request_id)


def route_path(request: Request) -> str:
    """The path without ROOT_PATH."""
    return request.scope["path"].removeprefix(request.scope["root_path"]) or "/"


def refused_fields(error: RequestValidationError) -> list[tuple[str, str]]:
    """(field, message) of whatever pydantic refused, without what was sent."""
    fields = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"][1:]) or str(problem["loc"][0])
        name = name.encode("utf-8", "replace").decode()[:100]
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "is not known here"
        fields.append((name, message))
    return fields


async def on_validation_error(request: Request, error: Exception) -> Response:
    """What FastAPI or pydantic refused. Errors: 400; 405; 415; 422."""
    assert isinstance(error, RequestValidationError)  # noqa: S101
    problems = error.errors()
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    path = route_path(request)
    fixed = [route for route in routes_at(path) if "{" not in route.path]
    answer = invalid(refused_fields(error))
    if fixed and problems[0]["loc"][0] == "path":  # DELETE /tasks/changes is no task's id.
        answer = method_not_allowed(fixed)
    elif problems[0]["type"] == "json_invalid":
        answer = ApiError(400, "invalid_json", "The body is not valid JSON.")
    elif isinstance(error.body, bytes) and not re.fullmatch(r"application/(.+\+)?json", media_type):
        message = "Send JSON: curl --json, or the header Content-Type: application/json."
        answer = ApiError(415, "unsupported_media_type", message)
    return error_response(answer, exchange_of(request).request_id)


async def on_database_failure(request: Request, error: Exception) -> Response:
    """The database did not answer, or its disk is full: one line in the log."""
    log.error("%s the database failed: %s", exchange_of(request).request_id, error)
    return error_response(unavailable(), exchange_of(request).request_id)


DESCRIPTION = """Tasks for one or many people. Errors have one shape; besides those that a route names,
any may answer 400 (broken JSON), 401, 413 (too large), 415 (no JSON), 422, 429 and 503."""
TAGS = [
    {"name": "auth", "description": "Accounts, logins, and tokens for scripts."},
    {"name": "users", "description": "The caller's own account."},
    {"name": "tasks", "description": "Tasks: lists, changes, the trash, live updates."},
    {"name": "attachments", "description": "Files at tasks."},
    {"name": "admin", "description": "Everybody's accounts and tasks, for admins."},
    {"name": "health", "description": "For monitors."},
]

make_app: Callable[..., FastAPI] = FastAPIOffline if settings.docs == "on" else FastAPI
app = make_app(
    title="Onefile Tasks",
    version=VERSION,
    description=DESCRIPTION,
    openapi_tags=TAGS,
    openapi_url="/openapi.json" if settings.docs == "on" else None,
    root_path=settings.root_path,
    redirect_slashes=False,
    lifespan=lifespan,
    generate_unique_id_function=lambda route: route.name,
    exception_handlers={
        HTTPException: on_http_exception,
        RequestValidationError: on_validation_error,
        **dict.fromkeys(database.failures, on_database_failure),
    },
    responses={
        "4XX": {"model": Error, "description": "The request is refused"},
        "5XX": {"model": Error, "description": "The server failed"},
    },
)
if settings.cors_origins:  # No credentials: a token is no cookie. Ref: Fetch §3.3
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins.replace(" ", "").split(","),
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=EXPOSED_HEADERS,
    )
app.add_middleware(Gateway)
app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=settings.trusted_proxies)


class BoundedWebSocket(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket, which drops a peer that sends much: a flood of pongs would stop everybody."""

    received_bytes = 0
    minute_began = 0.0

    def data_received(self, data: bytes) -> None:
        """Some bytes of the peer's, at most MAX_SOCKET_BYTES in a minute."""
        moment = time.monotonic()
        if moment - self.minute_began >= 60:
            self.minute_began = moment
            self.received_bytes = 0
        room = max(0, MAX_SOCKET_BYTES - self.received_bytes)
        self.received_bytes += len(data)
        super().data_received(data[:room])
        if len(data) > room:
            self.transport.close()


# ── 11 Routes ───────────────────────────────────────────────────────────────────────────────────
# One router a resource. A docstring is the route's description in /docs. A GET counts against
# RATE_LIMIT_READ, the rest against RATE_LIMIT_WRITE; a docstring names what counts besides.

NO_CONTENT = 204
Id = Annotated[int, PathParameter(ge=1, le=MAX_ID)]
IfMatch = Annotated[str | None, Header()]

auth = APIRouter(prefix=f"{API}/auth", tags=["auth"])

FIND_USER = f"SELECT {USER_COLUMNS}, password_hash FROM users WHERE username_key = :username_key"


async def verify_password(request: Request, name: str, password: str) -> Row | None:
    """The user of that name, if the password is theirs; an unknown name costs the same time.

    Errors: 429, when too many passwords failed for this account
    """
    key = username_key(name)
    await count(exchange_of(request), "account", key, cost=0)
    user = await database.lookup(FIND_USER, username_key=key)
    password_hash = user["password_hash"] if user else UNKNOWN_USER_HASH
    if await password_matches(password, password_hash):
        return user
    FAILED_LOGINS.inc()
    await count(exchange_of(request), "account", key)
    return None


ADD_SESSION = """
INSERT INTO sessions (user_id, address, user_agent, created_at, last_used_at, expires_at)
VALUES (:user_id, :address, :user_agent, :now, :now, :expires_at) RETURNING id"""
ADD_REFRESH_TOKEN = """
INSERT INTO refresh_tokens (session_id, token_hash, expires_at)
VALUES (:session_id, :token_hash, :expires_at)"""


async def issue_tokens(db: Transaction, user_id: int, session_id: int, end: datetime) -> TokenPair:
    """The next tokens of a session."""
    token = secrets.token_urlsafe(32)
    await db.fetch(
        ADD_REFRESH_TOKEN, session_id=session_id, token_hash=token_hash(token), expires_at=end
    )
    return TokenPair(
        access_token=encode_access_token(user_id, session_id),
        refresh_token=token,
        expires_in=settings.access_token_minutes * 60,
    )


async def start_session(db: Transaction, request: Request, user_id: int) -> TokenPair:
    """A new session, and its first tokens."""
    moment = now()
    end = moment + timedelta(days=settings.refresh_token_days)
    rows = await db.fetch(
        ADD_SESSION,
        user_id=user_id,
        address=client_address(request),
        user_agent=request.headers.get("user-agent", "")[:200],
        now=moment,
        expires_at=end,
    )
    return await issue_tokens(db, user_id, rows[0]["id"], end)


LOCK_UNCHANGED_USER = """
UPDATE users SET seq = seq WHERE id = :id AND password_hash = :password_hash AND is_active
RETURNING id"""


async def log_in_with(request: Request, name: str, password: str) -> TokenPair:
    """Tokens for a name and a password. Errors: 401; 403; 429."""
    user = await verify_password(request, name, password)
    if user is None:
        raise unauthorized("invalid_credentials", "Wrong username or password.")
    if not user["is_active"]:
        raise forbidden("account_disabled", "This account is disabled.")
    async with database.transaction() as db:
        unchanged = {"id": user["id"], "password_hash": user["password_hash"]}
        if not await db.fetch(LOCK_UNCHANGED_USER, **unchanged):
            raise unauthorized("invalid_credentials", "The account has just changed. Log in again.")
        return await start_session(db, request, user["id"])


def no_store(response: Response) -> None:
    """Tokens are for no cache. Ref: RFC 6749 §5.1."""
    response.headers["Cache-Control"] = "no-store"


SECRET = Depends(no_store)


@auth.post("/register", status_code=201, dependencies=[limited("register"), SECRET])
async def register(body: Registration, request: Request) -> Registered:
    """Create an account and log in.

    Errors: 403 registration_closed; 409 username_taken
    Limit: register per address
    """
    if settings.registration == "closed":
        raise forbidden("registration_closed", "Registration is closed here. Ask the admin.")
    password_hash = await hash_password(body.password)
    async with database.transaction() as db:
        user = await add_user(db, body.username, password_hash, "user", body.email)
        tokens = await start_session(db, request, user.id)
    return Registered(**tokens.model_dump(), user=user)


@auth.post("/login", dependencies=[limited("login"), SECRET])
async def log_in(body: Credentials, request: Request) -> TokenPair:
    """Exchange a username and a password for tokens.

    Errors: 401 invalid_credentials; 403 account_disabled
    Limit: login per address; account, failures only
    """
    return await log_in_with(request, body.username, body.password)


FIND_REFRESH_TOKEN = """
SELECT session_id, used_at > :now OR used_at < :a_second_ago OR EXISTS (
    SELECT 1 FROM refresh_tokens AS later WHERE later.session_id = refresh_tokens.session_id
        AND later.id > refresh_tokens.id AND later.used_at IS NOT NULL) AS replayed
FROM refresh_tokens WHERE token_hash = :token_hash"""
LOCK_SESSION = f"""
UPDATE sessions SET last_used_at = :now, address = :address, user_agent = :user_agent
WHERE id = :id AND expires_at > :now RETURNING user_id, {SESSION_COLUMNS}"""
USE_REFRESH_TOKEN = """
UPDATE refresh_tokens SET used_at = :now
WHERE token_hash = :token_hash AND used_at IS NULL AND expires_at > :now RETURNING id"""
EXTEND_SESSION = "UPDATE sessions SET expires_at = :expires_at WHERE id = :id"
END_SESSION = "DELETE FROM sessions WHERE id = :id"


async def rotate(request: Request, token: str) -> TokenPair | None:
    """The next tokens for a refresh token, which is used up; None for any that is not fresh.

    USE_REFRESH_TOKEN is the one atomic statement: of N racing requests, one gets a row. The session
    is locked before its token, as a logout does it, so that the two cannot wait for each other.
    """
    moment = now()
    this = {"token_hash": token_hash(token), "now": moment}
    async with database.transaction() as db:
        a_second_ago = moment - timedelta(seconds=1)
        found = await db.fetch(FIND_REFRESH_TOKEN, a_second_ago=a_second_ago, **this)
        if not found:
            return None
        session_id = found[0]["session_id"]
        agent = request.headers.get("user-agent", "")[:200]
        address = client_address(request)
        client = {"id": session_id, "now": moment, "address": address, "user_agent": agent}
        locked = await db.fetch(LOCK_SESSION, **client)
        if locked and await db.fetch(USE_REFRESH_TOKEN, **this):
            created_at = SessionPublic.model_validate(locked[0]).created_at
            end = min(
                moment + timedelta(days=settings.refresh_token_days),
                created_at + timedelta(days=SESSION_DAYS),
            )
            await db.fetch(EXTEND_SESSION, id=session_id, expires_at=end)
            return await issue_tokens(db, locked[0]["user_id"], session_id, end)
        if found[0]["replayed"]:
            await db.fetch(END_SESSION, id=session_id)
        return None


async def refresh_with(request: Request, token: str) -> TokenPair:
    """The next tokens. Errors: 401."""
    tokens = await rotate(request, token)
    if tokens is None:
        raise unauthorized("invalid_refresh_token", "This refresh token is not valid: log in.")
    return tokens


@auth.post("/refresh", dependencies=[limited("refresh"), SECRET])
async def refresh(body: RefreshRequest, request: Request) -> TokenPair:
    """Exchange a refresh token for the next pair. It works once.

    A used one is a sign of theft: its session ends with every token of it, unless it comes within a
    second of its use while the successor is still unused, which is a second tab and no thief.

    Errors: 401 invalid_refresh_token
    Limit: refresh per address
    Ref: RFC 9700 §4.14.2
    """
    return await refresh_with(request, body.refresh_token)


class OAuthError(BaseModel):
    """An error as OAuth 2 libraries read it. Ref: RFC 6749 §5.2."""

    error: str
    error_description: str


class TokenRequest(BaseModel):
    """The form of RFC 6749 §4.3.2 and §6; scope and client credentials are ignored."""

    grant_type: str = "password"
    username: Text = ""
    password: Text = ""
    refresh_token: Text = ""


@auth.post(
    "/token",
    dependencies=[limited("login"), SECRET],
    response_model=TokenPair,
    responses={400: {"model": OAuthError, "description": "As RFC 6749 §5.2 has it"}},
)
async def grant_token(form: Annotated[TokenRequest, Form()], request: Request) -> Any:
    """Log in or refresh as OAuth 2 libraries do it, by a form.

    Errors: 400 {"error": "invalid_grant"}
    Limit: login per address; account, failures only
    Ref: RFC 6749 §4.3, §5.2, §6
    """
    try:
        if form.grant_type == "password":
            return await log_in_with(request, form.username, form.password)
        if form.grant_type == "refresh_token":
            return await refresh_with(request, form.refresh_token)
    except ApiError as error:
        if error.status_code == 429:
            raise
        return oauth_error("invalid_grant", error.detail)
    return oauth_error("unsupported_grant_type", "grant_type is password or refresh_token.")


def oauth_error(code: str, description: str) -> Response:
    """400 in the form of RFC 6749 §5.2."""
    body = OAuthError(error=code, error_description=description)
    return JSONResponse(body.model_dump(), 400, {"Cache-Control": "no-store"})


END_SESSION_OF_REFRESH_TOKEN = """
DELETE FROM sessions
WHERE id IN (SELECT session_id FROM refresh_tokens WHERE token_hash = :token_hash) RETURNING id"""
REFRESH_TOKEN_BODY = {
    "requestBody": {
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/RefreshRequest"}}}
    },
    "security": [{}, {"login": []}],
}


@auth.post("/logout", status_code=NO_CONTENT, openapi_extra=REFRESH_TOKEN_BODY)
async def log_out(request: Request) -> None:
    """End this session: by access token, or by refresh token when that has expired.

    Errors: 401 neither is valid
    """
    exchange = exchange_of(request)
    await count(exchange, "write", address_key(request))
    try:
        caller = await authenticate(request.headers.get("authorization"))
    except ApiError as error:
        refused = error
    else:
        if caller.scope:
            raise insufficient_scope("An API token ends by DELETE /auth/api_tokens/{id}.")
        exchange.user_id = caller.id
        async with database.transaction() as db:
            await db.fetch(END_SESSION, id=caller.session_id)
        return
    try:
        token = RefreshRequest.model_validate_json(await request.body()).refresh_token
    except ValidationError:
        raise refused from None
    async with database.transaction() as db:
        if not await db.fetch(END_SESSION_OF_REFRESH_TOKEN, token_hash=token_hash(token)):
            raise refused


@auth.post("/logout_all", status_code=NO_CONTENT)
async def log_out_everywhere(user: LoggedInUser) -> None:
    """End every session of the caller; API tokens stay."""
    async with database.transaction() as db:
        await still_logged_in(db, user)
        sql = "DELETE FROM sessions WHERE user_id = :user_id AND scope IS NULL"
        await db.fetch(sql, user_id=user.id)


LIST_SESSIONS = f"""
SELECT {SESSION_COLUMNS}, id = :session_id AS current FROM sessions
WHERE user_id = :user_id AND scope IS NULL AND expires_at > :now
ORDER BY last_used_at DESC, id DESC"""


@auth.get("/sessions")
async def list_sessions(user: LoggedInUser) -> Collection[SessionListed]:
    """The caller's logins, last used first."""
    await write_down_uses()
    session_id = user.session_id
    rows = await database.read(
        user.id, LIST_SESSIONS, user_id=user.id, session_id=session_id, now=now()
    )
    return Collection(data=[SessionListed.model_validate(row) for row in rows])


async def end_session_of(user: Caller, kind: str, session_id: int, scoped: str) -> None:
    """End a login or an API token of the caller. Errors: 404 absent or not yours."""
    async with database.transaction() as db:
        await still_logged_in(db, user)
        sql = (
            f"DELETE FROM sessions WHERE id = :id AND user_id = :user_id AND {scoped} RETURNING id"
        )
        if not await db.fetch(sql, id=session_id, user_id=user.id):
            raise not_found(kind, session_id)


@auth.delete("/sessions/{session_id}", status_code=NO_CONTENT)
async def end_session(session_id: Id, user: LoggedInUser) -> None:
    """End one login. Errors: 404 absent or not yours."""
    await end_session_of(user, "session", session_id, "scope IS NULL")


MAX_API_TOKENS = 100
API_TOKEN_COLUMNS = """id, name, scope, created_at, nullif(last_used_at, created_at) AS last_used_at,
    CASE WHEN expires_at < :never THEN expires_at END AS expires_at"""
LIST_API_TOKENS = f"""
SELECT {API_TOKEN_COLUMNS} FROM sessions
WHERE user_id = :user_id AND scope IS NOT NULL AND expires_at > :now ORDER BY id"""
COUNT_API_TOKENS = """
SELECT count(*) AS tokens FROM sessions
WHERE user_id = :user_id AND scope IS NOT NULL AND expires_at > :now"""
ADD_API_TOKEN = f"""
INSERT INTO sessions (user_id, token_hash, name, scope, address, user_agent,
    created_at, last_used_at, expires_at)
VALUES (:user_id, :token_hash, :name, :scope, '', '', :now, :now, :expires_at)
RETURNING {API_TOKEN_COLUMNS}"""


async def add_api_token(
    db: Transaction, user_id: int, name: str, scope: str, end: datetime = NEVER
) -> ApiTokenCreated:
    """A token that its owner sees once; here only its hash stays. Errors: 409 too_many_tokens."""
    counted = await db.fetch(COUNT_API_TOKENS, user_id=user_id, now=now())
    if counted[0]["tokens"] >= MAX_API_TOKENS:
        raise ApiError(409, "too_many_tokens", f"You have {MAX_API_TOKENS}. Delete one first.")
    token = API_TOKEN_PREFIX + secrets.token_urlsafe(32)
    rows = await db.fetch(
        ADD_API_TOKEN,
        user_id=user_id,
        token_hash=token_hash(token),
        name=name,
        scope=scope,
        now=now(),
        expires_at=end,
        never=NEVER,
    )
    return ApiTokenCreated.model_validate({**rows[0], "token": token})


@auth.get("/api_tokens")
async def list_api_tokens(user: LoggedInUser) -> Collection[ApiTokenPublic]:
    """The caller's tokens for scripts, oldest first."""
    await write_down_uses()
    rows = await database.read(user.id, LIST_API_TOKENS, user_id=user.id, now=now(), never=NEVER)
    return Collection(data=[ApiTokenPublic.model_validate(row) for row in rows])


@auth.post("/api_tokens", status_code=201, dependencies=[SECRET])
async def create_api_token(body: ApiTokenCreate, user: RecentUser) -> ApiTokenCreated:
    """A token for a script, shown only now. It reaches tasks, and nothing of accounts or administration.

    Errors: 403 login_again when the session is older than 10 minutes; 409 too_many_tokens
    """
    if body.expires_at and body.expires_at <= now():
        raise invalid([("expires_at", "must lie in the future")])
    async with database.transaction() as db:
        await still_logged_in(db, user)
        return await add_api_token(db, user.id, body.name, body.scope, body.expires_at or NEVER)


@auth.delete("/api_tokens/{token_id}", status_code=NO_CONTENT)
async def delete_api_token(token_id: Id, user: LoggedInUser) -> None:
    """End a token at once, its streams included. Errors: 404 absent or not yours."""
    await end_session_of(user, "api_token", token_id, "scope IS NOT NULL")


account = APIRouter(prefix=f"{API}/users/me", tags=["users"])


@account.get("")
async def read_account(user: CurrentUser) -> UserPublic:
    """The caller's account."""
    return user


LOCK_ADMINS = """
UPDATE users SET seq = seq WHERE role = 'admin' AND is_active RETURNING id"""
UPDATE_USER = f"""
UPDATE users SET email = :email, role = :role, is_active = :is_active,
    password_hash = coalesce(:password_hash, password_hash)
WHERE id = :id RETURNING {USER_COLUMNS}"""
END_SESSIONS_BUT = "DELETE FROM sessions WHERE user_id = :user_id AND id <> :kept_session_id"


async def insist_on_another_admin(db: Transaction, user_id: int) -> None:
    """Errors: 409, if this user is the last active admin."""
    admins = await db.fetch(LOCK_ADMINS)
    if [admin["id"] for admin in admins] == [user_id]:
        raise ApiError(409, "last_admin", "The last active admin stays.")


async def change_user(
    db: Transaction, user: UserPublic, values: Row, kept_session_id: int = 0
) -> UserPublic:
    """New values of an account. A new password or disabling ends its other sessions and API tokens.

    Errors: 404; 409 last_admin
    """
    columns = (
        user.model_dump(include={"email", "role", "is_active"}) | {"password_hash": None} | values
    )
    if columns["role"] != "admin" or not columns["is_active"]:
        await insist_on_another_admin(db, user.id)
    rows = await db.fetch(UPDATE_USER, id=user.id, **columns)
    if not rows:
        raise not_found("user", user.id)
    if columns["password_hash"] or not columns["is_active"]:
        await db.fetch(END_SESSIONS_BUT, user_id=user.id, kept_session_id=kept_session_id)
    return UserPublic.model_validate(rows[0])


async def remove_user(db: Transaction, user_id: int) -> None:
    """An account with all that is theirs. Errors: 404; 409 last_admin."""
    await insist_on_another_admin(db, user_id)
    if not await db.fetch("DELETE FROM users WHERE id = :id RETURNING id", id=user_id):
        raise not_found("user", user_id)


@account.patch("")
async def update_account(body: UserUpdate, user: LoggedInUser, request: Request) -> UserPublic:
    """Change e-mail or password; a new password ends the other sessions and every API token.

    Errors: 403 wrong_password
    Limit: account, failures only
    """
    values = body.model_dump(include={"email"}, exclude_unset=True)
    if body.password:
        if await verify_password(request, user.username, body.current_password) is None:
            raise forbidden("wrong_password", "current_password is wrong.")
        values["password_hash"] = await hash_password(body.password)
    async with database.transaction() as db:
        await still_logged_in(db, user)
        return await change_user(db, user, values, kept_session_id=user.session_id)


@account.delete("", status_code=NO_CONTENT)
async def delete_account(user: RecentUser) -> None:
    """Delete the account with everything in it.

    Errors: 403 login_again when the session is older than 10 minutes; 409 last_admin
    """
    async with database.transaction() as db:
        await still_logged_in(db, user)
        await remove_user(db, user.id)


tasks = APIRouter(prefix=f"{API}/tasks", tags=["tasks"])
TRASH = {True: "deleted_at IS NOT NULL", False: "deleted_at IS NULL"}
FILTERS = {
    "owner_id": "owner_id = :owner_id",
    "status": "status IN (:status_0, :status_1, :status_2)",
    "priority": "priority IN (:priority_0, :priority_1, :priority_2)",
    "completed": "completed = :completed",
    "search": r"(title_key LIKE :search ESCAPE '\' OR description_key LIKE :search ESCAPE '\')",
    "due_before": "due_date <= :due_before",
    "due_after": "due_date >= :due_after",
    "overdue": "(NOT completed AND due_date IS NOT NULL AND due_date < :now) = :overdue",
}
SORT_KEYS = {
    "created_at": "created_at",
    "updated_at": "updated_at",
    "due_date": "due_date IS NULL, due_date",
    "priority": "CASE priority WHEN 'low' THEN 0 WHEN 'medium' THEN 1 ELSE 2 END",
    "status": "CASE status WHEN 'todo' THEN 0 WHEN 'in_progress' THEN 1 ELSE 2 END",
    "title": "title_key",
}


@functools.cache
def page_of_tasks(filters: tuple[str, ...], deleted: bool, sort: str, order: str) -> str:
    """The statement of a page, with its total. Ties break by id, so that pages never overlap."""
    where = " AND ".join([FILTERS[name] for name in filters] + [TRASH[deleted]])
    return f"""
SELECT {TASK_COLUMNS}, (SELECT count(*) FROM tasks WHERE {where}) AS total
FROM tasks WHERE {where}
ORDER BY {SORT_KEYS[sort]} {order}, id {order} LIMIT :limit OFFSET :offset"""


def filter_values(query: TaskQuery, owner_id: int | None) -> tuple[tuple[str, ...], Row]:
    """The names of the filters that a query uses, and the parameters of their SQL."""
    given: Row = query.model_dump(include=set(FILTERS), exclude_none=True)
    if owner_id:
        given["owner_id"] = owner_id
    values: Row = {}
    for name, value in given.items():
        if not isinstance(value, list):
            values[name] = value
        for position in range(3 if value and isinstance(value, list) else 0):
            values[f"{name}_{position}"] = value[min(position, len(value) - 1)]
    names = tuple(name for name in FILTERS if given.get(name) not in (None, []))
    if query.search:
        literal = re.sub(r"([\\%_])", r"\\\1", folded(query.search))
        values["search"] = f"%{literal}%"
    if query.overdue is not None:
        values["now"] = now()
    return names, values


async def find_tasks(user: Caller, query: TaskQuery, owner_id: int | None) -> tuple[list[Row], int]:
    """The rows of one page, and how many there are on all pages. Errors: 503 too_slow."""
    names, values = filter_values(query, owner_id)
    sql = page_of_tasks(names, query.deleted, query.sort, query.order)
    offset = (query.page - 1) * query.page_size
    rows = await database.read(user.id, sql, limit=query.page_size, offset=offset, **values)
    if not rows and offset:  # Past the end: the first page knows the total.
        first = await database.read(user.id, sql, limit=1, offset=0, **values)
        return [], first[0]["total"] if first else 0
    return rows, rows[0]["total"] if rows else 0


def page_of(query: PageQuery, data: list[Item], total: int) -> Page[Item]:
    """One page of a collection."""
    pages = max(1, math.ceil(total / query.page_size))
    meta = PageMeta(page=query.page, page_size=query.page_size, total=total, pages=pages)
    return Page(data=data, meta=meta)


def link_header(request: Request, meta: PageMeta) -> str:
    """The other pages of a page. Ref: RFC 8288."""
    places = {"first": 1, "prev": meta.page - 1, "next": meta.page + 1, "last": meta.pages}
    places["prev"] = min(places["prev"], meta.pages)
    kept = [pair for pair in request.query_params.multi_items() if pair[0] != "page"]
    links = []
    for relation, page in places.items():
        if 1 <= page <= meta.pages:
            url = f"{request.scope['path']}?{urlencode([*kept, ('page', page)])}"
            links.append(f'<{url}>; rel="{relation}"')
    return ", ".join(links)


class CachedPage(NamedTuple):
    """An encoded page, and the seq of its user when it was read."""

    seq: int
    body: bytes
    link: str


pages: OrderedDict[tuple[int, str], CachedPage] = OrderedDict()
"""Encoded pages by user and URL: right as long as the user's seq, which comes with each request, stays."""
MAX_CACHED_PAGES = 1000
MAX_CACHED_BYTES = 32 * 1024
NOT_MODIFIED: dict[int | str, Any] = {
    304: {"description": "Unchanged: If-None-Match names its ETag"}
}
TASK_PAGE = {200: {"model": Page[TaskPublic], "description": "One page"}} | NOT_MODIFIED


@tasks.get("", responses=TASK_PAGE, response_class=Response)
async def list_tasks(
    request: Request, user: CurrentUser, query: Annotated[TaskQuery, Query()]
) -> Response:
    """The caller's tasks: filters are ANDed, the newest come first unless `sort` and `order` say otherwise.

    The weak ETag is made of the caller's seq and the URL: `If-None-Match` gets its 304 without the
    query. An answer that depends on the clock (`overdue`) carries none.

    Errors: 503 too_slow
    Ref: RFC 8288; RFC 9110 §13.1.2
    """
    key = (user.id, f"{request.scope['path']}?{request.scope['query_string'].decode('latin-1')}")
    etag = f'W/"{user.seq}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"'
    if query.overdue is None:
        not_modified(request, etag)
    cached = pages.get(key)
    if cached is None or cached.seq != user.seq:
        rows, total = await find_tasks(user, query, user.id)
        page = page_of(query, TASK_ROWS.validate_python(rows), total)
        body = page.model_dump_json().encode()
        cached = CachedPage(user.seq, body, link_header(request, page.meta))
        if query.overdue is None and len(body) <= MAX_CACHED_BYTES:
            pages[key] = cached
            if len(pages) > MAX_CACHED_PAGES:
                pages.popitem(last=False)
    headers = {"Link": cached.link}
    if query.overdue is None:
        headers["ETag"] = etag
    return Response(cached.body, headers=headers, media_type="application/json")


class Replayed(Exception):
    """A task that its Idempotency-Key has created already: take no seq, write nothing."""

    def __init__(self, task: TaskPublic) -> None:
        self.task = task


FIND_TASK_BY_KEY = f"""
SELECT {TASK_COLUMNS} FROM tasks WHERE owner_id = :owner_id AND idempotency_key = :key"""
IdempotencyKey = Annotated[str | None, Header(pattern=r"^[\x21-\x7e]{1,255}$")]
REPLAYED: dict[int | str, Any] = {200: {"model": TaskPublic, "description": "Created before"}}


@tasks.post("", status_code=201, responses=REPLAYED)
async def create_task(
    body: TaskCreate,
    user: CurrentUser,
    request: Request,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> TaskPublic:
    """Create a task. `Location` is its path, `ETag` its version.

    The same `Idempotency-Key` again gives the task that it created, with 200 and
    `Idempotency-Replayed: true`, in the trash (`deleted_at`) if it went there.

    Errors: 413 storage_full
    """
    values = body.model_dump() | {"idempotency_key": idempotency_key}
    try:
        async with changing(user) as change:
            if idempotency_key:
                this = {"owner_id": user.id, "key": idempotency_key}
                for row in await change.db.fetch(FIND_TASK_BY_KEY, **this):
                    raise Replayed(TaskPublic.model_validate(row))
            task = await change.create(values)
    except Replayed as replayed:
        task = replayed.task
        response.status_code = 200
        response.headers["Idempotency-Replayed"] = "true"
    response.headers["Location"] = f"{request.scope['root_path']}{API}/tasks/{task.id}"
    response.headers["ETag"] = f'"{task.version}"'
    return task


Since = Annotated[str, Query(pattern=r"^[0-9]{1,18}(~[0-9]{1,18})?$")]


@tasks.get("/changes")
async def list_changes(
    user: CurrentUser, since: Since = "0", limit: Annotated[int, Query(ge=1, le=1000)] = 500
) -> Changes:
    """Delta sync: what changed after `since`, trashed tasks included, oldest change first.

    Repeat with `next_since` while `has_more`, and then whenever you like. `since=0` is a full snapshot.

    Errors: 410 resync_required
    """
    # A snapshot of several pages passes seqs below purged_seq on its way up, and is not stale: its
    # cursors name the purge that it began after ("500~800"), and are good until the next one.
    position, _, known_purge = since.partition("~")
    changes = await changes_after(user.id, int(position), limit)
    if changes.stale(int(position), int(known_purge or 0)):
        raise resync_required()
    next_since: int | str = changes.cursor()
    if changes.cursor() < changes.purged_seq:
        next_since = f"{next_since}~{changes.purged_seq}"
    return Changes(data=changes.tasks, next_since=next_since, has_more=changes.has_more)


Cursor = Annotated[Seq | None, Query()]


async def event_stream(
    user: CurrentUser,
    since: Cursor = None,
    last_event_id: Annotated[Seq | None, Header()] = None,
    polyfill_id: Annotated[Seq | None, Query(alias="lastEventId")] = None,
) -> AsyncIterator[Stream]:
    """An open stream. Errors: 410 and 429, before the answer begins."""
    cursors = [cursor for cursor in (last_event_id, polyfill_id, since) if cursor is not None]
    async with open_stream(user, cursors[0] if cursors else None, None) as stream:
        if stream.stale:
            raise resync_required()
        yield stream


@tasks.get("/events", response_class=EventSourceResponse)
async def stream_events(
    stream: Annotated[Stream, Depends(event_stream)],
) -> AsyncIterator[ServerSentEvent]:
    """Server-Sent Events: `created`, `updated`, `deleted`, each with its seq as id. Try `curl -N`.

    `Last-Event-ID`, `since` or `lastEventId` resumes; without any it starts now. A comment comes every
    15 s. "Try it out" cannot show a stream, which never ends.

    Errors: 410 resync_required; 429 too_many_streams
    """
    # An id without data dispatches nothing, but from now on a browser knows where to resume.
    yield ServerSentEvent(comment="connected", id=str(stream.cursor))
    async for event in stream.events():
        yield ServerSentEvent(event=event.kind, raw_data=event.text, id=str(event.seq))


STATISTICS = """
SELECT count(*) AS total,
    count(CASE WHEN status = 'todo' THEN 1 END) AS todo,
    count(CASE WHEN status = 'in_progress' THEN 1 END) AS in_progress,
    count(CASE WHEN status = 'done' THEN 1 END) AS done,
    count(CASE WHEN priority = 'low' THEN 1 END) AS low,
    count(CASE WHEN priority = 'medium' THEN 1 END) AS medium,
    count(CASE WHEN priority = 'high' THEN 1 END) AS high,
    count(CASE WHEN NOT completed AND due_date < :now THEN 1 END) AS overdue,
    count(CASE WHEN NOT completed AND due_date BETWEEN :now AND :in_7_days THEN 1 END) AS due_in_7_days
FROM tasks WHERE owner_id = :user_id AND deleted_at IS NULL"""
COMPLETED_SINCE = """
SELECT completed_at FROM tasks
WHERE owner_id = :user_id AND deleted_at IS NULL AND completed_at >= :since"""
MOMENTS = TypeAdapter(list[datetime])


@tasks.get("/statistics")
async def read_statistics(user: CurrentUser) -> Statistics:
    """Counts over the caller's tasks, the trash left out. Errors: 503 too_slow."""
    moment = now()
    today = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    first_day = today - timedelta(days=29)
    in_7_days = moment + timedelta(days=7)
    counted = await database.read(
        user.id, STATISTICS, user_id=user.id, now=moment, in_7_days=in_7_days
    )
    rows = await database.read(user.id, COMPLETED_SINCE, user_id=user.id, since=first_day)
    completed = Counter(
        each.date() for each in MOMENTS.validate_python([row["completed_at"] for row in rows])
    )
    days = [(first_day + timedelta(days=passed)).date() for passed in range(30)]
    counts = counted[0]
    return Statistics(
        total=counts["total"],
        by_status={status: counts[status] for status in get_args(Status)},
        by_priority={priority: counts[priority] for priority in get_args(Priority)},
        overdue=counts["overdue"],
        due_in_7_days=counts["due_in_7_days"],
        completion_rate=round(counts["done"] / max(1, counts["total"]), 4),
        completed_per_day=[DayCount(date=day.isoformat(), count=completed[day]) for day in days],
    )


@tasks.delete("/trash", status_code=NO_CONTENT)
async def empty_trash(user: CurrentUser) -> None:
    """Delete the caller's trash for good, now, all of it."""
    async with database.transaction() as db:
        await still_logged_in(db, user)
        seq, _ = await purge(db, user.id, NEVER)
    announce(user.id, seq)


async def owned_task(task_id: Id, user: CurrentUser) -> TaskPublic:
    """The caller's task, not in the trash. Errors: 404 absent or not yours."""
    row = await database.lookup(FIND_TASK, id=task_id, owner_id=user.id)
    if row is None or row["deleted_at"]:
        raise not_found("task", task_id)
    return TaskPublic.model_validate(row)


OwnedTask = Annotated[TaskPublic, Depends(owned_task)]


@tasks.get("/{task_id}", responses=NOT_MODIFIED)
async def read_task(task: OwnedTask, request: Request, response: Response) -> TaskPublic:
    """One task. Errors: 404 absent or not yours."""
    etag = f'"{task.version}"'
    not_modified(request, etag)
    response.headers["ETag"] = etag
    return task


@tasks.put("/{task_id}")
async def replace_task(
    task_id: Id,
    body: TaskCreate,
    user: CurrentUser,
    response: Response,
    if_match: IfMatch = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> TaskPublic:
    """Replace a task: what is absent goes back to its default.

    Errors: 404 absent or not yours; 412 stale version, or `If-None-Match: *`; 413 storage_full
    Ref: RFC 9110 §13.1.1
    """
    async with changing(user) as change:
        task = await change.task(task_id, if_match)
        if if_none_match == "*":
            raise ApiError(412, "version_mismatch", "This task exists.")
        task = await change.update(task, body.model_dump())
    response.headers["ETag"] = f'"{task.version}"'
    return task


@tasks.patch("/{task_id}")
async def update_task(
    task_id: Id, body: TaskUpdate, user: CurrentUser, response: Response, if_match: IfMatch = None
) -> TaskPublic:
    """Merge into a task: what is absent stays, null clears.

    Errors: 404 absent or not yours; 412 stale version; 413 storage_full
    Ref: RFC 7396; RFC 9110 §13.1.1
    """
    async with changing(user) as change:
        task = await change.task(task_id, if_match)
        task = await change.update(task, body.model_dump(exclude_unset=True))
    response.headers["ETag"] = f'"{task.version}"'
    return task


@tasks.delete("/{task_id}", status_code=NO_CONTENT)
async def trash_task(task_id: Id, user: CurrentUser, if_match: IfMatch = None) -> None:
    """Move a task to the trash. Errors: 404 absent or not yours; 412 stale version."""
    async with changing(user) as change:
        task = await change.task(task_id, if_match)
        await change.update(task, {"deleted_at": change.moment})


@tasks.post("/{task_id}/restore")
async def restore_task(
    task_id: Id, user: CurrentUser, response: Response, if_match: IfMatch = None
) -> TaskPublic:
    """Take a task out of the trash. Errors: 404 absent, not yours or not in the trash; 412 stale version."""
    async with changing(user) as change:
        task = await change.task(task_id, if_match, trashed=True)
        task = await change.update(task, {"deleted_at": None})
    response.headers["ETag"] = f'"{task.version}"'
    return task


class FileKind(NamedTuple):
    """A kind of file that is kept."""

    media_type: str
    signature: bytes = b""
    """A pattern for how its content begins; none for text, which may be of any encoding."""


OFFICE = "application/vnd.openxmlformats-officedocument"
OFFICE_SIGNATURE = rb"PK\x03\x04|\xd0\xcf\x11\xe0"  # An encrypted one is an OLE file.
FILE_KINDS = {
    "txt": FileKind("text/plain"),
    "md": FileKind("text/markdown"),
    "csv": FileKind("text/csv"),
    "pdf": FileKind("application/pdf", rb"[\s\S]{0,1023}?%PDF-"),
    "png": FileKind("image/png", rb"\x89PNG\r\n\x1a\n"),
    "jpg": FileKind("image/jpeg", rb"\xff\xd8\xff"),
    "jpeg": FileKind("image/jpeg", rb"\xff\xd8\xff"),
    "gif": FileKind("image/gif", rb"GIF8[79]a"),
    "webp": FileKind("image/webp", rb"RIFF[\s\S]{4}WEBP"),
    "doc": FileKind("application/msword", rb"\xd0\xcf\x11\xe0"),
    "docx": FileKind(f"{OFFICE}.wordprocessingml.document", OFFICE_SIGNATURE),
    "xlsx": FileKind(f"{OFFICE}.spreadsheetml.sheet", OFFICE_SIGNATURE),
    "zip": FileKind("application/zip", rb"PK(\x03\x04|\x05\x06)"),
}
MAX_ATTACHMENTS = 100
A_FILE = {
    "type": "object",
    "required": ["file"],
    "properties": {"file": {"type": "string", "format": "binary"}},
}
UPLOAD_BODY = {
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": A_FILE}}}
}


def file_name(upload: UploadFile) -> str:
    """The last path segment of an upload's name, decoded. Ref: RFC 2047; RFC 7578 §4.2."""
    name = upload.filename or ""
    if name.startswith("=?"):
        name = str(email.header.make_header(email.header.decode_header(name)))
    name = re.split(r"[/\\]", name)[-1]
    return re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", "_", name)[-200:]


async def uploaded_file(request: Request) -> UploadFile:
    """The file of a form; other fields are ignored. Errors: 400; 413; 415."""
    exchange = exchange_of(request)
    envelope = exchange.max_body_bytes
    exchange.max_body_bytes = settings.max_upload_mib * MIB + envelope
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(415, "unsupported_media_type", "Send a form: curl -F file=@NAME.")
    form = await request.form()
    files = [value for value in form.values() if isinstance(value, UploadFile)]
    if len(files) != 1:
        raise ApiError(400, "invalid_form", "Send a form with one file: curl -F file=@NAME.")
    if (files[0].size or 0) > settings.max_upload_mib * MIB:
        message = f"The file is larger than {settings.max_upload_mib} MiB."
        raise ApiError(413, "body_too_large", message)
    return files[0]


@tasks.get("/{task_id}/attachments")
async def list_attachments(task: OwnedTask) -> Collection[AttachmentPublic]:
    """The files at a task, oldest first. Errors: 404 absent or not yours."""
    sql = f"SELECT {ATTACHMENT_COLUMNS} FROM attachments WHERE task_id = :task_id ORDER BY id"
    rows = await database.read(task.owner_id, sql, task_id=task.id)
    return Collection(data=[AttachmentPublic.model_validate(row) for row in rows])


ADD_ATTACHMENT = f"""
INSERT INTO attachments (task_id, filename, content_type, size_bytes, sha256, created_at, content)
VALUES (:task_id, :filename, :content_type, :size_bytes, :sha256, :now, :content)
RETURNING {ATTACHMENT_COLUMNS}"""


@tasks.post("/{task_id}/attachments", status_code=201, openapi_extra=UPLOAD_BODY)
async def attach_file(
    task: OwnedTask,
    user: CurrentUser,
    request: Request,
    response: Response,
    if_match: IfMatch = None,
) -> AttachmentPublic:
    """Keep a file at a task, which gets its next version. Named by its last path segment; 5 MiB at most.

    Errors: 400 invalid_form; 404 absent or not yours; 409 too_many_attachments; 412 stale version;
    413 body_too_large, storage_full; 415 unsupported_file_type
    """
    upload = await uploaded_file(request)
    name = file_name(upload)
    kind = FILE_KINDS.get(name.rpartition(".")[2].lower())
    if kind is None:
        message = f"Kept are files named {', '.join(FILE_KINDS)}."
        raise ApiError(415, "unsupported_file_type", message)
    content = await upload.read()
    if not re.match(kind.signature, content):
        message = "The content is not what the file's name says."
        raise ApiError(415, "unsupported_file_type", message)
    async with changing(user) as change:
        task = await change.task(task.id, if_match)
        if task.attachments >= MAX_ATTACHMENTS:
            message = f"A task has at most {MAX_ATTACHMENTS} attachments."
            raise ApiError(409, "too_many_attachments", message)
        await change.grow(len(content))
        await change.update(task, {"attachments": task.attachments + 1})
        rows = await change.db.fetch(
            ADD_ATTACHMENT,
            task_id=task.id,
            filename=name,
            content_type=kind.media_type,
            size_bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            now=change.moment,
            content=content,
        )
    attachment = AttachmentPublic.model_validate(rows[0])
    location = f"{request.scope['root_path']}{API}/attachments/{attachment.id}"
    response.headers["Location"] = location
    return attachment


attachments = APIRouter(prefix=f"{API}/attachments", tags=["attachments"])
FIND_ATTACHMENT = f"""
SELECT {", ".join(f"attachments.{name}" for name in AttachmentPublic.model_fields)}
FROM attachments JOIN tasks ON tasks.id = task_id
WHERE attachments.id = :id AND owner_id = :owner_id AND deleted_at IS NULL"""
FIND_CONTENT = FIND_ATTACHMENT.replace("FROM", ", content FROM")
DOWNLOAD: dict[int | str, Any] = {
    200: {
        "description": "The file",
        "content": {kind.media_type: {} for kind in FILE_KINDS.values()},
    },
    **NOT_MODIFIED,
}


@attachments.get("/{attachment_id}", response_class=Response, responses=DOWNLOAD)
async def download_attachment(attachment_id: Id, user: CurrentUser, request: Request) -> Response:
    """The file, as a download. Errors: 404 absent or not yours. Ref: RFC 6266."""
    rows = await database.read(user.id, FIND_CONTENT, id=attachment_id, owner_id=user.id)
    if not rows:
        raise not_found("attachment", attachment_id)
    attachment = AttachmentPublic.model_validate(rows[0])
    etag = f'"{attachment.sha256}"'
    not_modified(request, etag)
    plain = re.sub(r"[^A-Za-z0-9 ._-]", "_", attachment.filename)
    exact = quote(attachment.filename, safe="")
    disposition = f"attachment; filename=\"{plain}\"; filename*=UTF-8''{exact}"
    headers = {"ETag": etag, "Content-Disposition": disposition}
    return Response(rows[0]["content"], headers=headers, media_type=attachment.content_type)


@attachments.delete("/{attachment_id}", status_code=NO_CONTENT)
async def delete_attachment(attachment_id: Id, user: CurrentUser) -> None:
    """Delete a file for good; its task gets its next version. Errors: 404 absent or not yours."""
    async with changing(user) as change:
        rows = await change.db.fetch(FIND_ATTACHMENT, id=attachment_id, owner_id=user.id)
        if not rows:
            raise not_found("attachment", attachment_id)
        task = await change.task(rows[0]["task_id"])
        await change.db.fetch("DELETE FROM attachments WHERE id = :id", id=attachment_id)
        await change.update(task, {"attachments": task.attachments - 1})
        await change.grow(-rows[0]["size_bytes"])


live = APIRouter()
HELLO_SECONDS = 5.0
ClientId = Annotated[str, PathParameter(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class Hello(Body):
    """The first frame of a socket that sent no Authorization header."""

    token: Text
    since: Seq | None = None


class SocketEnd(Exception):
    """Why a socket ends. Ref: RFC 6455 §7.4."""

    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        self.reason = reason


async def receive_text(socket: WebSocket) -> str:
    """The next frame. Errors: SocketEnd 1003; WebSocketDisconnect."""
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message["code"])
    if message.get("text") is None:
        raise SocketEnd(1003, "frames are text")
    text: str = message["text"]
    return text


async def receive_hello(socket: WebSocket) -> Hello:
    """The first frame. Errors: SocketEnd."""
    try:
        async with asyncio.timeout(HELLO_SECONDS):
            text = await receive_text(socket)
        return Hello.model_validate_json(text)
    except TimeoutError:
        raise SocketEnd(4401, "no token came in time") from None
    except ValidationError as error:
        if error.errors()[0]["type"] == "json_invalid":
            raise SocketEnd(1007, "frames are JSON") from None
        raise SocketEnd(1003, 'the first frame is {"token": "…", "since": 17}') from None


async def meet(socket: WebSocket, since: int | None) -> tuple[Caller, int | None]:
    """Who is there and where to resume, by header or by a first frame. Errors: ApiError; SocketEnd."""
    header = socket.headers.get("authorization")
    if header is None:
        hello = await receive_hello(socket)
        header = f"Bearer {hello.token}"
        since = hello.since
    exchange = exchange_of(socket)
    try:
        user = await authenticate(header)
    except ApiError:
        await count(exchange, "read", address_key(socket))
        raise
    await count(exchange, "read", f"user {user.id}")
    exchange.user_id = user.id
    return user, since


async def watch_peer(socket: WebSocket, stream: Stream) -> None:
    """After hello a client has nothing to say: JSON is ignored, anything else ends the stream."""
    try:
        while True:
            pydantic_core.from_json(await receive_text(socket))
    except WebSocketDisconnect:
        stream.close(1000, "")
    except SocketEnd as end:
        stream.close(end.code, end.reason)
    except ValueError:
        stream.close(1007, "frames are JSON")


async def send_changes(socket: WebSocket, stream: Stream) -> None:
    """Hello, then every change, until the stream is closed. Errors: SocketEnd, for a peer that does not read."""
    try:
        await socket.send_text(f'{{"type":"hello","seq":{stream.cursor}}}')
        if stream.stale:
            await socket.send_text('{"type":"resync_required"}')
        async for event in stream.events():
            async with asyncio.timeout(SEND_SECONDS):
                await socket.send_text(event.text)
    except TimeoutError:
        raise SocketEnd(1013, "the client did not read") from None


@live.websocket("/ws/tasks/{client_id}")
async def watch_tasks(socket: WebSocket, client_id: ClientId, since: Cursor = None) -> None:
    """Live updates over a WebSocket; the README has the protocol. Ref: RFC 6455."""
    await socket.accept()
    try:
        user, since = await meet(socket, since)
        async with open_stream(user, since, client_id) as stream:
            watching = asyncio.create_task(watch_peer(socket, stream))
            try:
                await send_changes(socket, stream)
            finally:
                watching.cancel()
            await socket.close(stream.close_code, stream.close_reason)
    except SocketEnd as end:
        await socket.close(end.code, end.reason)
    except ApiError as error:
        await socket.close(1013 if error.status_code in (429, 503) else 4401, error.detail)


admin = APIRouter(prefix=f"{API}/admin", tags=["admin"])
LIST_USERS = f"""
SELECT {USER_COLUMNS}, (SELECT count(*) FROM users) AS total FROM users
ORDER BY id LIMIT :limit OFFSET :offset"""
FIND_USER_BY_ID = f"SELECT {USER_COLUMNS} FROM users WHERE id = :id"


@admin.get("/users")
async def list_users(
    user: AdminUser, query: Annotated[PageQuery, Query()], request: Request, response: Response
) -> Page[UserPublic]:
    """Every account, oldest first. Errors: 403 admin_required."""
    offset = (query.page - 1) * query.page_size
    rows = await database.read(user.id, LIST_USERS, limit=query.page_size, offset=offset)
    counted = rows or await database.read(user.id, LIST_USERS, limit=1, offset=0)
    page = page_of(query, [UserPublic.model_validate(row) for row in rows], counted[0]["total"])
    response.headers["Link"] = link_header(request, page.meta)
    return page


@admin.post("/users", status_code=201)
async def create_user(
    body: AdminUserCreate, user: AdminUser, request: Request, response: Response
) -> UserPublic:
    """Create an account. Errors: 403 admin_required; 409 username_taken."""
    password_hash = await hash_password(body.password)
    async with database.transaction() as db:
        await still_logged_in(db, user)
        created = await add_user(db, body.username, password_hash, body.role, body.email)
    response.headers["Location"] = f"{request.scope['root_path']}{API}/admin/users/{created.id}"
    return created


@admin.get("/users/{user_id}")
async def read_user(user_id: Id, _user: AdminUser) -> UserPublic:
    """One account. Errors: 403 admin_required; 404 absent."""
    row = await database.lookup(FIND_USER_BY_ID, id=user_id)
    if row is None:
        raise not_found("user", user_id)
    return UserPublic.model_validate(row)


@admin.patch("/users/{user_id}")
async def update_user(user_id: Id, body: AdminUserUpdate, user: AdminUser) -> UserPublic:
    """Change role, `is_active` or password; disabling and a new password end the sessions and API tokens.

    Errors: 403 admin_required; 404 absent; 409 last_admin
    """
    values = body.model_dump(exclude_unset=True, exclude={"password"})
    if body.password:
        values["password_hash"] = await hash_password(body.password)
    async with database.transaction() as db:
        await still_logged_in(db, user)
        rows = await db.fetch(FIND_USER_BY_ID, id=user_id)
        if not rows:
            raise not_found("user", user_id)
        return await change_user(db, UserPublic.model_validate(rows[0]), values)


@admin.delete("/users/{user_id}", status_code=NO_CONTENT)
async def delete_user(user_id: Id, user: AdminUser) -> None:
    """Delete an account with everything in it. Errors: 403 admin_required; 404 absent; 409 last_admin."""
    async with database.transaction() as db:
        await still_logged_in(db, user)
        await remove_user(db, user_id)


@admin.get("/tasks")
async def list_all_tasks(
    user: AdminUser, query: Annotated[AdminTaskQuery, Query()], request: Request, response: Response
) -> Page[TaskPublic]:
    """Every owner's tasks, with the filters of GET /tasks and `owner_id`. Errors: 403 admin_required."""
    rows, total = await find_tasks(user, query, query.owner_id)
    page = page_of(query, TASK_ROWS.validate_python(rows), total)
    response.headers["Link"] = link_header(request, page.meta)
    return page


@admin.post("/cleanup", status_code=202, response_class=Response)
async def start_cleanup(_user: AdminUser, request: Request) -> Response:
    """Remove now what has expired. The result stands in /health/detailed. Errors: 403 admin_required."""
    location = f"{request.scope['root_path']}/health/detailed"
    return Response(None, 202, {"Location": location}, background=BackgroundTask(clean_up))


health = APIRouter(tags=["health"])


@health.get("/health")
async def read_health() -> Health:
    """Alive, and the database answers. Errors: 503 database_unavailable."""
    await database.lookup("SELECT 1 AS alive")
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
        database=DatabaseHealth(engine=database.engine, latency_ms=latency_ms),
        live_connections=len(broadcaster.everybody()),
        last_cleanup=last_cleanup,
    )


METRICS_BODY: dict[int | str, Any] = {
    200: {"description": "Figures", "content": {"text/plain": {"schema": {"type": "string"}}}}
}


@health.get("/metrics", response_class=Response, responses=METRICS_BODY)
async def read_metrics(request: Request) -> Response:
    """Figures for Prometheus, for an admin unless METRICS says otherwise. Errors: 401; 403; 404 off."""
    if settings.metrics == "off":
        raise ApiError(404, "not_found", "METRICS is off.")
    if settings.metrics == "admin":
        caller = await authenticate(request.headers.get("authorization"))
        if caller.role != "admin":
            raise forbidden("admin_required", "Only an admin may do this.")
    figures = prometheus_client.generate_latest()
    return Response(figures, media_type=prometheus_client.CONTENT_TYPE_LATEST)


@health.get("/", include_in_schema=False)
async def read_root(request: Request) -> Response:
    """To the docs, or with DOCS off who this is."""
    if settings.docs == "on":
        return RedirectResponse(f"{request.scope['root_path']}/docs")
    return JSONResponse({"name": "Onefile Tasks", "version": VERSION})


for router in (tasks, attachments, auth, account, live, admin, health):
    app.include_router(router)

# ── 12 Command line ─────────────────────────────────────────────────────────────────────────────
# Commands work beside a running server: the database's own locks are all that they need, and whatever
# they end is ended for the very next request.


class Server(uvicorn.Server):
    """uvicorn, which ends the streams before it waits for the open connections."""

    async def shutdown(self, sockets: Any = None) -> None:
        """Stop. Ref: RFC 6455 §7.4.1."""
        for stream in broadcaster.everybody():
            stream.close(1001, "the server is going away")
        await super().shutdown(sockets)


def serve(reload: bool) -> None:
    """Check the data, listen, say where, and serve until Ctrl-C or SIGTERM. Errors: SystemExit."""
    config = uvicorn.Config(
        "app:app" if reload else app,
        host=settings.host,
        port=settings.port,
        reload=reload,
        http="h11",
        ws=BoundedWebSocket,
        ws_max_size=MAX_SOCKET_BYTES,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=5,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
    )
    print(f"Onefile Tasks {VERSION}", flush=True)
    asyncio.run(run_command(check_data()))
    try:
        listener = config.bind_socket()
    except SystemExit:
        where = f"{settings.host}, port {settings.port}"
        raise SystemExit(f"HOST, PORT: cannot listen on {where}") from None
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{listener.getsockname()[1]}{settings.root_path}"
    print(f"  Listening  {url}   (Ctrl-C ends it)", flush=True)
    print(f"  Docs       {url}/docs" if settings.docs == "on" else "  Docs       off", flush=True)
    print(f"  Accounts   registration is {settings.registration}", flush=True)
    server = Server(config)
    with contextlib.suppress(KeyboardInterrupt):
        if reload:
            ChangeReload(config, target=server.run, sockets=[listener]).run()
        else:
            server.run(sockets=[listener])


async def check_data() -> str:
    """Nothing more than to open the database and to say where it is."""
    print(f"  Data       {database.where()}", flush=True)
    return ""


async def run_command(command: Coroutine[Any, Any, str]) -> str:
    """A command on the open database. Returns what is true now. Errors: SystemExit."""
    async with opened_database():
        try:
            return await command
        except ApiError as error:
            raise SystemExit(error.detail) from None


async def user_named(name: str) -> UserPublic:
    """Errors: SystemExit."""
    row = await database.lookup(FIND_USER, username_key=username_key(name))
    if row is None:
        raise SystemExit(f"There is no user {name}.")
    return UserPublic.model_validate(row)


def ask_password() -> str:
    """A password, asked twice, or read from standard input when that is no terminal."""
    if not sys.stdin.isatty():
        return checked(Password, sys.stdin.readline().rstrip("\r\n"), "password")
    password = checked(Password, getpass.getpass("Password: "), "password")
    if getpass.getpass("Again: ") != password:
        raise SystemExit("The two are not the same; nothing was changed.")
    return password


async def create_user_command(name: str, role: Role) -> str:
    """create-user NAME."""
    name = checked(Username, name, "NAME")
    password_hash = await hash_password(ask_password())
    async with database.transaction() as db:
        await add_user(db, name, password_hash, role)
    return f"The {role} {name} can log in now."


async def reset_password_command(name: str) -> str:
    """reset-password NAME."""
    user = await user_named(name)
    password_hash = await hash_password(ask_password())
    async with database.transaction() as db:
        await change_user(db, user, {"password_hash": password_hash})
    return f"{user.username} has a new password; their sessions and API tokens have ended."


async def token_command(name: str, scope: str) -> str:
    """Command token NAME."""
    user = await user_named(name)
    async with database.transaction() as db:
        created = await add_api_token(db, user.id, "command line", scope)
    print(f"{user.username} has a new API token that may {scope}:", file=sys.stderr)
    return created.token


def main() -> None:
    """Parse the command line and do as it says."""
    parser = argparse.ArgumentParser(prog="app.py", description="Without a command, it serves.")
    parser.add_argument("--version", action="version", version=f"Onefile Tasks {VERSION}")
    parser.add_argument("--reload", action="store_true", help="restart when app.py changes")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    create = commands.add_parser("create-user", help="make an account; asks for its password")
    create.add_argument("name", metavar="NAME")
    create.add_argument("--admin", dest="role", action="store_const", const="admin", default="user")
    reset = commands.add_parser(
        "reset-password", help="a new password; ends sessions and API tokens"
    )
    reset.add_argument("name", metavar="NAME")
    token = commands.add_parser("token", help="make an API token, and print it")
    token.add_argument("name", metavar="NAME")
    token.add_argument("--scope", choices=["read", "write"], default="write")
    given = parser.parse_args()
    if given.command is None:
        return serve(given.reload)
    if given.command == "create-user":
        command = create_user_command(given.name, given.role)
    elif given.command == "reset-password":
        command = reset_password_command(given.name)
    else:
        command = token_command(given.name, given.scope)
    print(asyncio.run(run_command(command)))
    return None


if (
    __name__ == "__mp_main__"
):  # A child of --reload has run this file: let it not define tables twice.
    sys.modules["app"] = sys.modules["__mp_main__"]
if __name__ == "__main__":
    main()

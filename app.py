"""Onefile Tasks: a complete task-manager API in one Python file.

Run    python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python app.py
Then   open http://127.0.0.1:8000/docs, or follow the README with curl.

Sections
   1  Settings             every knob, read from the environment and .env, checked at start
   2  Errors               one shape for every error, raised through small factories
   3  Database             SQLite: readers that cannot write, one writer, durable commits
   4  Tables               users, sessions, refresh tokens, tasks, attachments
   5  Schemas              what comes in and what goes out
   6  Passwords and tokens bcrypt, JWT, opaque tokens: functions that know nothing of HTTP
   7  Dependencies         who asks, which task, under which conditions
   8  Rate limits          SlowAPI's moving windows, counted before a body is read
   9  Live updates         the one number per user, and the streams that follow it
  10  Application          lifespan, the outermost ASGI layer, error handlers
  11  Routes               auth, users, tasks, attachments, live, admin, health
  12  Command line         serve, accounts and tokens, backup and restore, clean-up

Notation
   seq       a counter in every user's row. Whatever changes what a user sees of their tasks takes the
             next value in the same transaction, and the changed task is stamped with it. A task's
             version and ETag, the order of changes, delta sync and live updates are all this number.
   cursor    a seq that a client has seen; "what is new?" is always `seq > cursor ORDER BY seq`
   trash     deleted tasks, kept as tombstones until they are purged
   user      in a route: the row of who is asking, joined with the session that they came by
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "alembic==1.20.1",
#   "bcrypt==5.0.0",
#   "fastapi==0.163.2",
#   "fastapi-offline==1.7.7",
#   "httptools==0.9.0",
#   "httpx==0.28.1",
#   "limits==5.8.0",
#   "opentelemetry-api==1.45.1",
#   "prometheus-client==0.26.0",
#   "pydantic==2.14.3",
#   "pydantic-settings==2.16.3",
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

import argparse
import asyncio
import codecs
import contextlib
import csv
import functools
import getpass
import hashlib
import io
import ipaddress
import json
import logging
import os
import re
import secrets
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
import unicodedata
from base64 import b64encode
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from math import ceil
from pathlib import Path
from socket import SO_SNDBUF, SOL_SOCKET
from typing import Annotated, Any, Generic, Literal, NamedTuple, Self, TypeVar, get_args
from urllib.parse import quote, urlencode

import bcrypt
import httpx
import jwt
import limits
import prometheus_client
import pydantic
import sqlalchemy as sa
import uvicorn
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Query, Request, Response, WebSocket, params
from fastapi.dependencies.utils import get_flat_params
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.routing import APIRoute, iter_route_contexts
from fastapi.security import OAuth2PasswordBearer, OAuth2PasswordRequestForm
from fastapi_offline import FastAPIOffline
from opentelemetry import trace
from pydantic import MISSING, AfterValidator, BeforeValidator, SecretStr, StringConstraints, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from slowapi import Limiter
from sqlmodel import Field, SQLModel
from standardwebhooks import Webhook
from starlette.background import BackgroundTask
from starlette.datastructures import Headers, MutableHeaders
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

VERSION = "1.0.0"
API = "/api/v1"
NEVER = datetime(9999, 12, 31, tzinfo=UTC)
MAX_ID = 2**63 - 1  # SQLite and PostgreSQL integers end here; one more is an OverflowError in the driver.

log = logging.getLogger("onefile_tasks")
Row = sa.Row[Any]
T = TypeVar("T")
Item = TypeVar("Item", bound=SQLModel)

# What /metrics shows; each is counted where it happens.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
REQUESTS = prometheus_client.Counter("http_requests", "Requests answered.", ["method", "route", "status"])
LATENCY = prometheus_client.Histogram("http_request_duration_seconds", "Until the answer began.", ["method", "route"])
LIVE_CONNECTIONS = prometheus_client.Gauge("live_connections", "Open WebSockets and event streams.")
TASKS_WRITTEN = prometheus_client.Counter("tasks_written", "Tasks created, changed, trashed or restored.")
RATE_LIMITED = prometheus_client.Counter("rate_limited_requests", "Requests answered with 429.")
FAILED_LOGINS = prometheus_client.Counter("failed_logins", "Wrong passwords.")
WEBHOOKS_GIVEN_UP = prometheus_client.Counter("webhooks_given_up", "Calls of the webhook that never succeeded.")

# ── 1 Settings ──────────────────────────────────────────────────────────────────────────────────
# The environment decides, and a .env file is the same thing on disk. A wrong value stops the start
# with one line that names the variable, because a server that guesses is found out later.


def rate(text: str) -> limits.RateLimitItem:
    """`5/minute`. Errors: ValueError, also for several rates and for a rate of 0."""
    if not re.fullmatch(r"[1-9]\d{0,8} ?(/|per) ?\d{0,4} ?(second|minute|hour|day|month|year)s?", text):
        raise ValueError("must be a rate like 5/minute")
    return limits.parse(text)


def networks(text: str) -> str:
    """Addresses and networks, or `*`. Errors: ValueError, because a typo here would merge all callers into one."""
    parts = [part for part in text.replace(" ", "").split(",") if part]
    return ",".join(part if part == "*" else str(ipaddress.ip_network(part)) for part in parts)


def webhook_key(secret: SecretStr, info: pydantic.ValidationInfo) -> SecretStr:
    """`whsec_` and 24 to 64 bytes in base64, if WEBHOOK_URL is set. Errors: ValueError. Ref: Standard Webhooks."""
    shape = r"whsec_(?=.{32,88}$)([A-Za-z0-9+/]{4})+([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"
    if info.data.get("webhook_url") and not re.fullmatch(shape, secret.get_secret_value()):
        raise ValueError("must be whsec_ and 24 to 64 random bytes in base64, because WEBHOOK_URL is set")
    return secret


RateLimit = Annotated[Any, AfterValidator(rate)]
ORIGIN = r"(\*|https?://[a-z0-9.-]+(:[0-9]+)?)"


class Settings(BaseSettings):
    """Every knob, with its default. Meanings, units and consequences stand in .env.example."""

    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore", validate_default=True)

    host: str = "127.0.0.1"
    port: int = pydantic.Field(default=8000, ge=0, le=65535)
    root_path: str = pydantic.Field(default="", pattern=r"^(/[A-Za-z0-9._~-]+)*$")
    data_dir: Path = Path("data")
    secret_key: SecretStr = SecretStr("")
    admin_username: str = "admin"
    admin_password: SecretStr = SecretStr("")
    registration: Literal["open", "closed"] = "open"
    access_token_minutes: int = pydantic.Field(default=15, ge=1, le=1440)
    refresh_token_days: int = pydantic.Field(default=30, ge=1, le=180)
    trash_days: int = pydantic.Field(default=30, ge=0, le=36500)
    rate_limits: Literal["on", "off"] = "on"
    rate_limit_register: RateLimit = "3/minute"
    rate_limit_login: RateLimit = "5/minute"
    rate_limit_account: RateLimit = "100/hour"
    rate_limit_refresh: RateLimit = "10/minute"
    rate_limit_read: RateLimit = "600/minute"
    rate_limit_write: RateLimit = "300/minute"
    max_body_kib: int = pydantic.Field(default=64, ge=1, le=65536)
    max_upload_mib: int = pydantic.Field(default=5, ge=1, le=512)
    max_storage_mib: int = pydantic.Field(default=100, ge=0, le=2**20)
    cors_origins: str = pydantic.Field(default="", pattern=rf"^({ORIGIN}(, ?{ORIGIN})*)?$")
    trusted_proxies: Annotated[str, AfterValidator(networks)] = ""
    docs: Literal["on", "off"] = "on"
    metrics: Literal["admin", "open", "off"] = "admin"
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    webhook_url: Annotated[str, AfterValidator(lambda url: url and str(pydantic.HttpUrl(url)))] = ""
    webhook_secret: Annotated[SecretStr, AfterValidator(webhook_key)] = SecretStr("")


def valid_or_exit(make: Callable[[], T], name: str = "") -> T:
    """What no request brought. Errors: SystemExit with one line that names what is wrong, and shows no secret."""
    try:
        return make()
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        raise SystemExit(f"{name or str(first['loc'][0]).upper()}: {message}") from None


settings = valid_or_exit(Settings)


def now() -> datetime:
    """The one clock, in UTC. Tests set it by hand."""
    return datetime.now(UTC)


def reason(error: Exception) -> str:
    """What a driver or the system has to say, without statement and parameters."""
    return str(getattr(error, "strerror", None) or getattr(error, "orig", error))


# ── 2 Errors ────────────────────────────────────────────────────────────────────────────────────
# One envelope for every error, whoever noticed it. Small factories, so that a route shows the raise.
# Messages never repeat what a body, a query or a header said: it may be a password or a script.


class ApiError(HTTPException):
    """An error that a client will see: status, stable code, message, headers, details by field."""

    def __init__(self, status: int, code: str, message: str, headers: Any = None, details: Any = None) -> None:
        super().__init__(status, message, headers)
        self.body = {"code": code, "message": message} | ({"details": details} if details else {})

    def response(self, request_id: str) -> Response:
        """The envelope, or a bare 304, which has no body. Ref: RFC 9110 §15.4.5."""
        if self.status_code == 304:
            return Response(status_code=304, headers=self.headers)
        return JSONResponse({"error": self.body | {"request_id": request_id}}, self.status_code, self.headers)


def not_found(kind: str, key: int) -> ApiError:
    """404, the same for absent and for somebody else's, so that ids tell nothing."""
    return ApiError(404, f"{kind}_not_found", f"No {kind} {key}.")


def unauthorized(code: str = "not_authenticated", message: str = "Send a valid access token.") -> ApiError:
    """401. Ref: RFC 6750 §3."""
    return ApiError(401, code, message, {"WWW-Authenticate": "Bearer"})


def invalid(*fields: tuple[str, str]) -> ApiError:
    """422, with every refused (field, message); the first ones are the message."""
    details = [{"field": field, "message": message} for field, message in fields]
    return ApiError(422, "validation_failed", "; ".join(map(": ".join, fields[:10])), details=details)


def complaints(error: ValidationError | RequestValidationError, start: int = 0) -> list[tuple[str, str]]:
    """(field, message) of whatever pydantic refused, without what was sent; `start` drops names like "body"."""
    names = [".".join(map(str, each["loc"][start:] or each["loc"])) for each in error.errors()]
    return list(zip(names, [each["msg"].removeprefix("Value error, ") for each in error.errors()], strict=True))


def resync_required() -> ApiError:
    """410: deletions after this cursor are forgotten, or it comes from another past."""
    return ApiError(410, "resync_required", "This cursor is stale. Start again with since=0.")


# ── 3 Database ──────────────────────────────────────────────────────────────────────────────────
# Work on the database is a plain function of a connection, run in a thread that belongs to it: four threads
# read, one writes. SQLite has one writer at a time, so this program has one, too; readers go on beside it
# (WAL) and cannot write at all. A request that is cancelled never tears a function from its transaction.
# One more connection never reads a row: it tells in a microsecond whether anybody has committed anything.


def sqlite_engine(path: Path, begin: str, pool_size: int, *pragmas: str) -> sa.Engine:
    """An engine on one file: connections are configured by `pragmas`, transactions start with `begin`."""
    # Parameters are hidden because a log is no place for them.
    options: Any = {"connect_args": {"isolation_level": None}, "hide_parameters": True, "max_overflow": 0}
    engine = sa.create_engine(sa.URL.create("sqlite", database=str(path)), pool_size=pool_size, **options)

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: object) -> None:
        for pragma in ("busy_timeout=10000", "journal_mode=WAL", "foreign_keys=ON", *pragmas):
            connection.execute(f"PRAGMA {pragma}")

    sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
    return engine


def within(engine: sa.Engine, work: Callable[[sa.Connection], T]) -> T:
    """Run a function in a transaction of its own."""
    with engine.begin() as db:
        return work(db)


def copy_database(source: Path, target: Path) -> None:
    """Everything at one moment, beside other work, as one new file. Errors: OSError, sqlite3.Error; then no file."""
    if target.exists():
        raise FileExistsError("File exists")
    part = target.with_name(f"{target.name}.{secrets.token_hex(4)}").resolve()  # Who sees the name sees all of it.
    with contextlib.closing(sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)) as original:
        part.touch(0o600, exist_ok=False)
        try:
            original.execute("VACUUM INTO ?", [str(part)])
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)


async def in_thread(pool: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> T:
    """Run a function beside the event loop; it ends even if the caller is cancelled."""
    return await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)


class Database:
    """The open database: `read` runs a function in a snapshot, `write` in a durable transaction."""

    readers, writers = ThreadPoolExecutor(4, "reader"), ThreadPoolExecutor(1, "writer")

    @property
    def path(self) -> Path:
        """The file that has everything."""
        return settings.data_dir / "tasks.db"

    def open(self) -> None:
        """Open or create the file, readable by its owner alone. Errors: OSError."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.touch(0o600)
        self.watcher = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
        self.read_engine = sqlite_engine(self.path, "BEGIN", 4, "query_only=ON")
        # FULL: an acknowledged write survives a power cut, not only a crash of this process.
        self.write_engine = sqlite_engine(self.path, "BEGIN IMMEDIATE", 1, "synchronous=FULL")

    def keep_copy(self) -> Path:
        """A copy beside the database, named after the moment."""
        copy_database(self.path, kept := self.path.with_name(f"tasks-{now():%Y%m%dT%H%M%S%f}.db"))
        return kept

    def version(self) -> int:
        """A number that stays while nobody, in any process, commits anything. Ref: SQLite, PRAGMA data_version."""
        try:
            return int(self.watcher.execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error:
            return -time.monotonic_ns()  # Never the same: whoever asks, asks the database itself.

    def close(self) -> None:
        """Close every connection."""
        self.watcher.close()
        self.read_engine.dispose()
        self.write_engine.dispose()

    async def read(self, work: Callable[[sa.Connection], T]) -> T:
        """A snapshot: everything that `work` reads is of one moment."""
        return await in_thread(self.readers, within, self.read_engine, work)

    async def write(self, work: Callable[[sa.Connection], T]) -> T:
        """A transaction: committed before this returns, and so before any answer leaves, or rolled back."""
        return await in_thread(self.writers, within, self.write_engine, work)


database = Database()


async def fetch(statement: sa.Select[Any]) -> Sequence[Row]:
    """All rows of one query."""
    return await database.read(lambda db: db.execute(statement).all())


def find(db: sa.Connection, model: type[Item], statement: Any, kind: str, key: int) -> Item:
    """The one row of a statement, as an answer. Errors: 404."""
    if row := db.execute(statement).one_or_none():
        return model(**row._mapping)
    raise not_found(kind, key)


async def execute(statement: sa.Update | sa.Delete) -> int:
    """One statement, committed. Returns how many rows it met."""
    return await database.write(lambda db: db.execute(statement).rowcount)


# ── 4 Tables ────────────────────────────────────────────────────────────────────────────────────
# Each table is two classes: the public half is also the answer that clients get, the private half never
# leaves. Queries speak SQLAlchemy Core, because one UPDATE … RETURNING is atomic where load-change-save
# is a race. AUTOINCREMENT: the id of something purged is never handed out again.

Role = Literal["user", "admin"]
Status = Literal["todo", "in_progress", "done"]
Priority = Literal["low", "medium", "high"]


class Answer(SQLModel):
    """The base of tables, answers and queries: the string under a field is its description in /docs."""

    model_config = {"use_attribute_docstrings": True}
    __table_args__: Any = {"sqlite_autoincrement": True}


class UserPublic(Answer):
    """An account, as its owner and an admin see it."""

    id: int = Field(primary_key=True)
    username: str
    email: str | None
    role: Role = Field(sa_type=sa.String)
    is_active: bool
    created_at: datetime


class Users(UserPublic, table=True):
    """The private half of an account. `seq` is the number that section 9 is about."""

    username_key: str = Field(unique=True)
    password_hash: str
    seq: int
    purged_seq: int


class SessionPublic(Answer):
    """A login."""

    id: int = Field(primary_key=True)
    address: str
    user_agent: str
    created_at: datetime
    last_used_at: datetime
    expires_at: datetime


class Sessions(SessionPublic, table=True):
    """Deleting the row ends the session with every token of it, access tokens included.

    An API token is a session, too: one with a name, a scope and one token that never changes.
    """

    user_id: int = Field(foreign_key="users.id", ondelete="CASCADE", index=True)
    name: str | None
    scope: str | None
    token_hash: str | None


class RefreshTokens(Answer, table=True):
    """A refresh token, as a hash. A used one is kept, to notice a replay."""

    __tablename__ = "refresh_tokens"
    id: int = Field(primary_key=True)
    session_id: int = Field(foreign_key="sessions.id", ondelete="CASCADE", index=True)
    token_hash: str = Field(unique=True)
    used_at: datetime | None
    expires_at: datetime


class TaskPublic(Answer):
    """A task, in the trash if `deleted_at` is set. `version` is its ETag and its place among its owner's changes."""

    id: int = Field(primary_key=True)
    title: str
    description: str | None
    status: Status = Field(sa_type=sa.String)
    priority: Priority = Field(sa_type=sa.String)
    due_date: datetime | None
    completed: bool
    completed_at: datetime | None
    attachments: int
    owner_id: int = Field(foreign_key="users.id", ondelete="CASCADE")
    version: int
    created_at: datetime
    updated_at: datetime
    deleted_at: datetime | None


class Tasks(TaskPublic, table=True):
    """The private half of a task: its texts, folded for searching and sorting, and the key it was created with."""

    search_text: str
    idempotency_key: str | None


class AttachmentPublic(Answer):
    """A file at a task. Its ETag is its `sha256`."""

    id: int = Field(primary_key=True)
    task_id: int = Field(foreign_key="tasks.id", ondelete="CASCADE", index=True)
    filename: str
    content_type: str
    size_bytes: int
    sha256: str
    created_at: datetime


class Attachments(AttachmentPublic, table=True):
    """The private half of an attachment: in the database, so that a backup is one file."""

    content: bytes


class SchemaVersion(Answer, table=True):
    """One row: which program wrote this database."""

    __tablename__ = "schema_version"
    version: int = Field(primary_key=True)


TABLES = ("users", "sessions", "refresh_tokens", "tasks", "attachments", "schema_version")
users, sessions, refresh_tokens, tasks, attachments, schema_version = map(SQLModel.metadata.tables.__getitem__, TABLES)
sa.Index("ix_sessions_token_hash", sessions.c.token_hash, unique=True)
sa.Index("ix_tasks_version", tasks.c.owner_id, tasks.c.version, unique=True)
sa.Index("ix_tasks_created_at", tasks.c.owner_id, tasks.c.deleted_at, tasks.c.created_at, tasks.c.id)
sa.Index("ix_tasks_idempotency_key", tasks.c.owner_id, tasks.c.idempotency_key, unique=True)
public_task = [tasks.c[name] for name in TaskPublic.model_fields]
public_attachment = [attachments.c[name] for name in AttachmentPublic.model_fields]

SCHEMA_VERSION = 2


def upgrade(db: sa.Connection, keep_copy: Callable[[], Path]) -> None:
    """Add the tables, nullable or defaulted columns and indexes that a database lacks, after a copy of it.

    Nothing else, ever. Errors: SystemExit that names a newer database, or what would need more.
    """
    there = sa.inspect(db).get_table_names()
    version = db.scalar(sa.select(schema_version.c.version)) if "schema_version" in there else 0
    if (version or 0) > SCHEMA_VERSION:
        raise SystemExit(f"DATA_DIR: the database is of version {version}, newer than this program ({SCHEMA_VERSION})")
    found = compare_metadata(MigrationContext.configure(db), SQLModel.metadata) if there else []
    changes = [change for each in found for change in (each if isinstance(each, list) else [each])]
    for kind, *what in changes:
        optional = kind == "add_column" and (what[-1].nullable or what[-1].server_default is not None)
        if kind not in ("add_table", "add_index") and not optional:
            names = " ".join(str(each) for each in what[:3] if each is not None)
            raise SystemExit(f"DATA_DIR: no upgrade in place makes this database the program's: {kind} {names}")
    if changes:
        print(f"  Upgrade    the database as it was is kept in {keep_copy()}", flush=True)  # noqa: T201
    SQLModel.metadata.create_all(db)
    for kind, *what in sorted(changes, key=lambda change: change[0]):  # Columns come before their indexes.
        if kind == "add_column":
            Operations(MigrationContext.configure(db)).add_column(what[1], what[2])
        elif kind == "add_index":
            what[0].create(db, checkfirst=True)
    if version != SCHEMA_VERSION:
        db.execute(sa.delete(schema_version))
        db.execute(sa.insert(schema_version).values(version=SCHEMA_VERSION))


# ── 5 Schemas ───────────────────────────────────────────────────────────────────────────────────
# What comes in is strict: unknown fields are refused, "1" is no number and 1 is no date. What goes out
# is listed in section 4 and here, so that a password hash cannot slip into an answer.

RFC3339 = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z|[+-]\d\d:\d\d)?)?", re.I | re.ASCII)
COMMON_PASSWORDS = """a aa abc abcd abcdefgh access admin administrator asdf asdfasdf asdfghjk asdfghjkl azertyuiop
baseball basketball butterfly changeme charlie chocolate computer default dragon football freedom hello helloworld
iloveyou internet jennifer jordan killer letmein liverpool login lovelove master michael michelle monkey mypassword
mustang onefile pass passpass passwd password pokemon princess qazwsx qazwsxedc qweasd qweasdzxc qwer qwerasdf qwert
qwerty qwertyui qwertyuiop samsung secret shadow soccer spiderman starwars sunshine superman test testing testtest
trustno welcome whatever zxcvbn zxcvbnm 1q2w3e4r 1q2w3e4r5t 1qaz2wsx 1qaz2wsx3edc 1qazxsw2 q1w2e3r4 zaq12wsx"""


def storable(text: str) -> str:
    """Refuse what no database or UTF-8 encoder takes. Errors: ValueError. Ref: Unicode Annex 15 §13."""
    if re.search("[\x00\ud800-\udfff]", text):
        raise ValueError("must not contain NUL or lone surrogates")
    # Normalising sorts each run of combining marks, in quadratic time: thousands would stop the server for seconds.
    if "x" * 31 in "".join("x" if unicodedata.combining(character) else " " for character in text):
        raise ValueError("must not have more than 30 combining marks in a row")
    return text


def parse_time(value: object) -> datetime:
    """RFC 3339 to UTC; a naive time is UTC, a bare date its last second. Errors: ValueError."""
    if not isinstance(value, str) or not RFC3339.fullmatch(value):
        raise ValueError("must be RFC 3339, like 2026-11-20T17:00:00Z or 2026-11-20 (in a query, write + as %2B)")
    try:
        moment = datetime.fromisoformat(value.upper() if len(value) > 10 else f"{value}T23:59:59Z")
        return moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)
    except (OverflowError, ValueError):
        raise ValueError("must be a moment between the years 1 and 9999") from None


def valid_username(text: str) -> str:
    """NFKC, then 3–50 letters and digits of any script, `.`, `_`, `-`. Errors: ValueError."""
    name = unicodedata.normalize("NFKC", text)
    if not 3 <= len(name) <= 50 or not all(each in "._-" or unicodedata.category(each)[0] in "LMN" for each in name):
        raise ValueError("must be 3 to 50 letters, digits, '.', '_' or '-'")
    return name


def folded(text: str) -> str:
    """How names and searches are compared: no case, one normal form, any script."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def uncommon(password: str) -> str:
    """Refuse what guessers try first: "P@ssw0rd123!" is "password". Ref: NIST SP 800-63B. Errors: ValueError."""
    stem = re.sub(r"[\W\d_]+$", "", password.casefold())
    guesses = {password.casefold(), stem, stem.translate(str.maketrans("@013457$", "aoleasts"))}
    if guesses & set(COMMON_PASSWORDS.split()) or len(set(password)) < 4 or (password.isdigit() and len(password) < 12):
        raise ValueError("is among the commonest; choose a longer or stranger one")
    return password


Storable = AfterValidator(storable)
Text = Annotated[str, Storable]
Time = Annotated[datetime, BeforeValidator(parse_time, json_schema_input_type=str)]
Title = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200), Storable]
Description = Annotated[str, StringConstraints(max_length=10_000), Storable]
Username = Annotated[str, Storable, AfterValidator(valid_username)]
Password = Annotated[str, StringConstraints(min_length=8, max_length=256), Storable, AfterValidator(uncommon)]
a_username, a_password = pydantic.TypeAdapter(Username), pydantic.TypeAdapter(Password)
Email = Annotated[str, StringConstraints(max_length=254, pattern=r"^[^@\s]+@[^@\s]+$"), Storable]
Seq = Annotated[int, pydantic.Field(ge=0, le=MAX_ID)]


class Body(pydantic.BaseModel):
    """The base of every body: strict, and an unknown field is an error that names the known ones."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)

    @pydantic.model_validator(mode="before")
    @classmethod
    def only_known_fields(cls, data: Any) -> Any:
        """Name what is known, not what was sent."""
        if isinstance(data, dict) and not data.keys() <= cls.model_fields.keys():
            raise ValueError(f"has an unknown field; known are {', '.join(cls.model_fields)}")
        return data


class Credentials(Body):
    """A name and a password."""

    username: Text
    password: Text


class Registration(Body):
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
    """What an admin changes: a disabled account or a new password ends every session and API token of it."""

    role: Role | MISSING = MISSING
    is_active: bool | MISSING = MISSING
    password: Password | MISSING = MISSING


class UserUpdate(Body):
    """What to change; a new password needs the current one."""

    email: Email | MISSING | None = MISSING
    password: Password | MISSING = MISSING
    current_password: Text | MISSING = MISSING

    @pydantic.model_validator(mode="after")
    def both_passwords(self) -> Self:
        """A password is changed by who knows it, not by who finds an open browser."""
        if (self.password is MISSING) != (self.current_password is MISSING):
            raise ValueError("password and current_password go together")
        return self


class ApiTokenCreate(Body):
    """A token for a script."""

    name: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100), Storable]
    scope: Literal["read", "write"]
    """`read` may only GET."""
    expires_at: Time | None = None
    """Null: never."""


class ApiTokenPublic(Answer):
    """A token for a script: what is known of it later."""

    id: int
    name: str
    scope: Literal["read", "write"]
    created_at: datetime
    last_used_at: datetime | None
    expires_at: datetime | None


class ApiTokenCreated(ApiTokenPublic):
    """The only answer that shows the token itself."""

    token: str


class TokenPair(Answer):
    """Send the access token as `Authorization: Bearer …`; exchange the refresh token for the next pair."""

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


class TaskUpdate(Body):
    """A JSON merge patch (RFC 7396): what is absent stays, null clears description and due_date."""

    title: Title | MISSING = MISSING
    """1–200 characters after trimming."""
    description: Description | MISSING | None = MISSING
    """At most 10,000 characters."""
    status: Status | MISSING = MISSING
    completed: bool | MISSING = MISSING
    """Instead of status: true = done, false = todo."""
    priority: Priority | MISSING = MISSING
    due_date: Time | MISSING | None = MISSING
    """RFC 3339; a naive time is UTC, a bare date the end of that day."""

    @pydantic.model_validator(mode="after")
    def settle_status(self) -> Self:
        """Turn `completed` into `status`; both and contradictory is an error."""
        if self.completed is not MISSING:
            if self.status is MISSING:
                self.status = "done" if self.completed else "todo"
            if (self.status == "done") != self.completed:
                raise ValueError("status and completed contradict each other")
        return self

    def values(self) -> dict[str, Any]:
        """The columns that the caller wrote."""
        return self.model_dump(exclude={"completed"})


class TaskCreate(TaskUpdate):
    """A whole task, for POST and PUT: what is absent gets its default (status todo, priority medium)."""

    title: Title


TASK_DEFAULTS = {"description": None, "status": "todo", "priority": "medium", "due_date": None}


class TaskImport(TaskCreate):
    """A line of an import: a task as it was exported; what belongs to the old instance is passed over."""

    created_at: Time | MISSING = MISSING
    completed_at: Time | MISSING | None = MISSING

    @pydantic.model_validator(mode="before")
    @classmethod
    def pass_over(cls, data: Any) -> Any:
        """Ids, versions and the like are new here."""
        if not isinstance(data, dict):
            return data
        return {name: data[name] for name in data if name in cls.model_fields or name not in TaskPublic.model_fields}


class Imported(Answer):
    """How many tasks came in."""

    imported: int


class Collection(Answer, Generic[Item]):
    """A short collection, whole."""

    data: list[Item]


class PageMeta(Answer):
    """Where a page stands."""

    page: int
    page_size: int
    total: int
    pages: int


class Page(Collection[Item], Generic[Item]):
    """One page; the Link header (RFC 8288) leads to the others."""

    meta: PageMeta


class PageQuery(Answer):
    """Paging. The highest page keeps OFFSET within 64 bits."""

    page: int = pydantic.Field(1, ge=1, le=2**53)
    page_size: int = pydantic.Field(default=20, ge=1, le=100)


class TaskQuery(PageQuery):
    """Filters, all ANDed, and the order."""

    status: list[Status] = pydantic.Field([], description="Repeatable.")
    priority: list[Priority] = pydantic.Field([], description="Repeatable.")
    completed: bool | None = None
    search: Annotated[str, StringConstraints(min_length=1, max_length=200), Storable] | None = None
    """Substring of title or description, in any case and script; % and _ are literal."""
    due_before: Time | None = pydantic.Field(None, description="Inclusive.")
    due_after: Time | None = pydantic.Field(None, description="Inclusive.")
    overdue: bool | None = None
    deleted: bool = pydantic.Field(False, description="true lists the trash.")
    sort: Literal["created_at", "updated_at", "due_date", "priority", "status", "title"] = "created_at"
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


class Statistics(Answer):
    """Counts over the caller's tasks, the trash left out."""

    total: int
    by_status: dict[str, int]
    by_priority: dict[str, int]
    overdue: int
    due_in_7_days: int
    completion_rate: float
    """done / total, 0 to 1."""
    completed_per_day: list[dict[Literal["date", "count"], str | int]]
    """Of the last 30 UTC days, today last."""


class Health(Answer):
    """Alive, and the database answers."""

    status: Literal["ok"] = "ok"


class HealthDetailed(Health):
    """Health, with figures."""

    version: str
    uptime_seconds: int
    database: dict[str, str | float]
    live_connections: int
    last_cleanup: dict[str, int | datetime] | None


class WebhookTest(Answer):
    """How the receiver answered, or why it did not."""

    status: int | None = None
    milliseconds: float
    error: str | None = None


class ErrorBody(Answer):
    """What went wrong: `code` is stable, `message` is for people, `details` come only with 422."""

    code: str
    message: str
    request_id: str
    details: list[dict[Literal["field", "message"], str]] | None = None


class Error(Answer):
    """Every error."""

    error: ErrorBody


# ── 6 Passwords and tokens ──────────────────────────────────────────────────────────────────────
# Functions that know nothing of HTTP. A password is stored as bcrypt, slow on purpose; a token is 256
# random bits, which nobody guesses, so SHA-256 is enough to make a stolen database useless.

API_TOKEN_PREFIX = "tsk_"  # noqa: S105
BCRYPT_COST = 12
ISSUER = "onefile-tasks"
CLOCK_LEEWAY_SECONDS = 10
SESSION_DAYS = 180
password_workers = ThreadPoolExecutor(os.cpu_count() or 1, "password")
"""Never more hashes at once than cores, and none in the event loop: one takes a quarter of a second."""


def password_bytes(password: str) -> bytes:
    """64 bytes that depend on the whole password: bcrypt reads 72, without NUL. Ref: NIST SP 800-63B §3.1.1.2."""
    return hashlib.sha256(b"onefile-tasks " + unicodedata.normalize("NFKC", password).encode()).hexdigest().encode()


def hash_password(password: str) -> str:
    """Salted bcrypt of 2^BCRYPT_COST rounds."""
    return bcrypt.hashpw(password_bytes(password), bcrypt.gensalt(BCRYPT_COST)).decode()


def password_matches(password: str, password_hash: str) -> bool:
    """Compare in constant time."""
    return bcrypt.checkpw(password_bytes(password), password_hash.encode())


def new_token() -> str:
    """256 random bits, URL-safe."""
    return secrets.token_urlsafe(32)


def token_hash(token: str) -> str:
    """SHA-256, hexadecimal: all that the database knows of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def encode_access_token(user_id: int, session_id: int) -> str:
    """A JWT for one session. Ref: RFC 7519; RFC 9068 §2.2."""
    issued = int(now().timestamp())
    claims: dict[str, Any] = {"iss": ISSUER, "sub": str(user_id), "sid": str(session_id), "typ": "access"}
    claims |= {"iat": issued, "exp": issued + settings.access_token_minutes * 60, "jti": secrets.token_hex(8)}
    return jwt.encode(claims, settings.secret_key.get_secret_value(), "HS256")


def decode_access_token(token: str) -> tuple[int, int, datetime] | None:
    """(user id, session id, end), or None for anything that is not a live access token of ours."""
    # Expiry is compared with now(), not by PyJWT, so that one clock rules and a test can set it.
    options: Any = {"require": ["sub", "sid", "typ", "iat", "exp", "jti"], "verify_exp": False, "verify_iat": False}
    try:
        claims = jwt.decode(token, settings.secret_key.get_secret_value(), ["HS256"], options, issuer=ISSUER)
        end = datetime.fromtimestamp(int(claims["exp"]) + CLOCK_LEEWAY_SECONDS, UTC)
        return (int(claims["sub"]), int(claims["sid"]), end) if now() < end and claims["typ"] == "access" else None
    except (jwt.PyJWTError, ValueError, OverflowError):
        return None


# ── 7 Dependencies ──────────────────────────────────────────────────────────────────────────────
# A route's signature reads as a list of requirements: CurrentUser, AdminUser, OwnedTask, TaskEdit.
# Who asks is found out once, before the body is read (section 8); these only insist on it.

session_columns = [sessions.c[name].label(f"session_{name}") for name in ("id", "created_at", "expires_at")]
principals = sa.select(users, sessions.c.scope, *session_columns).join_from(sessions, users)
"""Users joined with their sessions: the one query that says who somebody is."""
logins = sessions.c.token_hash.is_(None)
"""The sessions that are no API tokens."""
MEMORY_ENTRIES, MEMORY_BYTES, MAX_HEADER = 1000, 32 * 1024, 4096
authenticated: dict[str, tuple[int, Row, datetime]] = {}
"""Authorization header: the database's version, whom it names, until when. Exact until anything is committed."""
last_used: dict[int, datetime] = {}
"""Uses of sessions that note_uses has not written down yet."""


def alive() -> sa.ColumnElement[bool]:
    """The sessions that still count."""
    return (sessions.c.expires_at > now()) & users.c.is_active


def still(user: Row) -> sa.ColumnElement[bool]:
    """For the WHERE of a write: who asked is still logged in, however long their body took to arrive."""
    return sa.and_(users.c.id == user.id, sa.exists().where(sessions.c.id == user.session_id, alive()))


async def write_as(user: Row, work: Callable[[sa.Connection], T]) -> T:
    """A write, if its turn finds who asked still logged in, and an admin still one. Errors: 401."""
    role = users.c.role == "admin" if user.role == "admin" else sa.true()

    def _guarded(db: sa.Connection) -> T:
        if db.scalar(sa.select(users.c.id).where(still(user), role)) is None:
            raise unauthorized()
        return work(db)

    return await database.write(_guarded)


async def look_up(authorization: str) -> tuple[Row | None, datetime]:
    """Whom an Authorization header names, joined with their session, and until when."""
    scheme, _, token = authorization.partition(" ")
    token, end = token.strip() if scheme.lower() == "bearer" else "", NEVER
    if token.startswith(API_TOKEN_PREFIX):
        this = sessions.c.token_hash == token_hash(token)
    elif claims := decode_access_token(token):
        user_id, session_id, end = claims
        this = (users.c.id == user_id) & (sessions.c.id == session_id)
    else:
        return None, end
    user = next(iter(await fetch(principals.where(this, alive()))), None)
    return user, min(end, user.session_expires_at) if user else end


def remember(memory: dict[Any, Any], key: object, value: object) -> None:
    """Keep a result; a memory that is full starts anew."""
    if len(memory) >= MEMORY_ENTRIES:
        memory.clear()
    memory[key] = value


async def authenticate(authorization: str | None) -> Row | None:
    """The caller, or None. What was found is right as long as nothing was committed since."""
    header = authorization if authorization and len(authorization) <= MAX_HEADER else ""
    version, moment = database.version(), now()
    seen, user, until = authenticated.get(header, (-1, None, moment))
    if seen != version or moment >= until:
        user, until = await look_up(header)
    if user is not None:
        remember(authenticated, header, (version, user, until))
        last_used[user.session_id] = moment
    return user


async def note_uses() -> None:
    """Write down when each session was last used: once a minute, instead of once a request."""
    uses = [{"used": session_id, "moment": moment} for session_id, moment in last_used.items()]
    last_used.clear()
    this = sa.update(sessions).where(sessions.c.id == sa.bindparam("used"))
    if uses:
        await database.write(lambda db: db.execute(this.values(last_used_at=sa.bindparam("moment")), uses))


oauth2 = OAuth2PasswordBearer("api/v1/auth/token", auto_error=False)


async def current_user(request: Request, _token: Annotated[str | None, Depends(oauth2)]) -> Row:
    """The caller. Errors: 401."""
    if request.state.user is None:
        raise unauthorized()
    return request.state.user  # type: ignore[no-any-return]


CurrentUser = Annotated[Row, Depends(current_user)]


async def admin_user(user: CurrentUser) -> Row:
    """The caller, an admin. Errors: 401; 403."""
    if user.role != "admin":
        raise ApiError(403, "admin_required", "Only an admin may do this.")
    return user


AdminUser = Annotated[Row, Depends(admin_user)]


def whole_number(text: str) -> str:
    """One spelling for each id: int() also reads +7, 1_0 and 7.0. Errors: ValueError."""
    if not re.fullmatch(r"[1-9][0-9]{0,18}", text):
        raise ValueError("must be a positive 64-bit integer")
    return text


Id = Annotated[int, BeforeValidator(whole_number), params.Path(le=MAX_ID)]


def find_task(db: sa.Connection, task_id: int, owner_id: int, trashed: bool = False) -> TaskPublic:
    """One task of one owner, in the trash or out of it. Errors: 404."""
    place = tasks.c.deleted_at.is_not(None) if trashed else tasks.c.deleted_at.is_(None)
    mine = sa.select(*public_task).where(tasks.c.id == task_id, tasks.c.owner_id == owner_id, place)
    return find(db, TaskPublic, mine, "task", task_id)


async def owned_task(task_id: Id, user: CurrentUser) -> TaskPublic:
    """The caller's task, not in the trash. Errors: 404 absent or not yours."""
    return await database.read(lambda db: find_task(db, task_id, user.id))


OwnedTask = Annotated[TaskPublic, Depends(owned_task)]


def etag_matches(header: str, etag: str) -> bool:
    """Whether a conditional header is `*` or names this ETag. Ref: RFC 9110 §13.1."""
    return header.strip() == "*" or etag in [tag.strip() for tag in header.split(",")]


class Reply:
    """What a route needs to write headers: ETag, Link, Location."""

    def __init__(self, request: Request, response: Response) -> None:
        self.request, self.response, self.headers = request, response, response.headers
        self.prefix = request.scope["root_path"]
        self.path = self.prefix + request.scope["path"].removeprefix(self.prefix)

    def tag(self, etag: str) -> None:
        """Set the ETag; If-None-Match compares weakly. Errors: 304. Ref: RFC 9110 §13.1.2."""
        if etag_matches(self.request.headers.get("if-none-match", "").replace("W/", ""), etag.removeprefix("W/")):
            raise ApiError(304, "not_modified", "Not modified.", {"ETag": etag})
        self.headers["ETag"] = etag

    async def page(self, query: PageQuery, model: type[Item], statement: sa.Select[Any]) -> Page[Item]:
        """One page of a query, its total, and the Link header. Ref: RFC 8288."""
        count = sa.select(sa.func.count()).select_from(statement.order_by(None).subquery())
        cut = statement.limit(query.page_size).offset((query.page - 1) * query.page_size)
        total, rows = await database.read(lambda db: (db.scalar(count) or 0, db.execute(cut).all()))
        pages = max(1, ceil(total / query.page_size))
        places = {"first": 1, "prev": min(query.page - 1, pages), "next": query.page + 1, "last": pages}
        kept = [pair for pair in self.request.query_params.multi_items() if pair[0] != "page"]
        url = f"{self.path}?{urlencode([*kept, ('page', '')])}"
        self.headers["Link"] = ", ".join(f'<{url}{n}>; rel="{rel}"' for rel, n in places.items() if 1 <= n <= pages)
        meta = PageMeta(page=query.page, page_size=query.page_size, total=total, pages=pages)
        return Page(data=[model(**row._mapping) for row in rows], meta=meta)


Answering = Annotated[Reply, Depends()]


# ── 8 Rate limits ───────────────────────────────────────────────────────────────────────────────
# SlowAPI's decorators cannot see a request that fails validation, and its middleware cannot see an
# included router. So one route class asks SlowAPI's limiter itself, before the body is read: no broken
# body and no spelling of a path escapes the count, and section 10 writes the result on every answer.


def client_address(scope: Scope) -> str:
    """Where the caller is; behind a proxy only if it is one of TRUSTED_PROXIES (section 10)."""
    return str((scope.get("client") or ("local",))[0])


def address_key(address: str) -> str:
    """What counts as one address: an IPv4 address, or the /64 that an IPv6 customer gets. Ref: RFC 6177."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "local"
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))


def bucket_key(scope: Scope, user: Row | None) -> str:
    """Whose bucket a request counts against: its user's, or its address's when anonymous."""
    return f"user {user.id}" if user else address_key(client_address(scope))


limiter = Limiter(client_address, strategy="moving-window")  # Only its windows are used; the keys are ours.


def window(name: str, key: str) -> tuple[int, float, dict[str, str]]:
    """How many are left of a limit, when more come (Unix seconds), and its headers."""
    limit: limits.RateLimitItem = getattr(settings, f"rate_limit_{name}")
    reset, remaining = limiter.limiter.get_window_stats(limit, name, key)
    figures = {"Limit": limit.amount, "Remaining": max(0, remaining), "Reset": ceil(reset)}
    return remaining, reset, {f"X-RateLimit-{part}": str(figure) for part, figure in figures.items()}


def rate_limited(name: str, key: str) -> ApiError:
    """429. Ref: RFC 6585 §4."""
    RATE_LIMITED.inc()
    _, reset, headers = window(name, key)
    seconds = max(1, ceil(reset - time.time()))
    headers["Retry-After"] = str(seconds)
    return ApiError(429, "rate_limited", f"Too many requests. Try again in {seconds} s.", headers)


def enforce(scope: Scope, buckets: dict[str, str]) -> None:
    """Count against each limit: key, and leave the tightest for the answer's headers. Errors: 429."""
    if settings.rate_limits == "off" or "none" in buckets:
        return
    for name, key in buckets.items():
        if not limiter.limiter.hit(getattr(settings, f"rate_limit_{name}"), name, key):
            raise rate_limited(name, key)
    _, _, scope["state"]["headers"] = min((window(*bucket) for bucket in buckets.items()), key=lambda found: found[0])


answers: dict[Any, tuple[int, bytes, dict[str, str]]] = {}
"""(user id, path, query) of what carries an ETag: its seq, body, headers."""


async def recalled(request: Request, user: Row, handle: Callable[[Request], Coroutine[Any, Any, Response]]) -> Response:
    """The answer to a GET: what was right at this seq of its user is right as long as the seq stays. Errors: 304."""
    url = user.id, request.scope["path"], request.scope["query_string"]
    seq, body, headers = answers.get(url, (-1, b"", {}))
    if seq == user.seq:
        reply = Reply(request, Response(body, headers=headers))
        reply.tag(reply.headers["ETag"])
        return reply.response
    response = await handle(request)
    body = getattr(response, "body", b"")
    size = sum(map(len, (body, *url[1:], *response.headers.values())))
    if "etag" in response.headers and size <= MEMORY_BYTES:
        remember(answers, url, (user.seq, body, dict(response.headers)))
    return response


class Route(APIRoute):
    """Every route of the API: who asks, the count, the query's names and the media type come before the body."""

    # openapi_extra={"x-rate-limit": "login"} counts a route against RATE_LIMIT_LOGIN too, per address; "none" frees it.
    # A "requestBody" there is one that the route reads itself: see raw_body in section 11.

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, guarded. Errors: 415; 422 unknown query parameter; 429. Ref: RFC 9110 §15.5.16."""
        handle, described = super().get_route_handler(), self.openapi_extra or {}
        elsewhere = params.Path, params.Header
        known = {p.alias for p in get_flat_params(self.dependant) if not isinstance(p.field_info, elsewhere)}
        bucket, extra = "read" if self.methods == {"GET"} else "write", described.get("x-rate-limit")
        # No API token gets past these: a leaked one shall not make others, or lock its owner out.
        walls = (f"{API}/auth", f"{API}/admin") + ((f"{API}/users",) if bucket == "write" else ())
        types, hint = r"application/(.+\+)?json", "JSON: curl --json, or Content-Type: application/json"
        if self.body_field and isinstance(self.body_field.field_info, params.Form):
            types, hint = r"application/x-www-form-urlencoded", "a form: curl -d"
        if upload := described.get("requestBody"):
            types, hint = "|".join(map(re.escape, upload["content"])), upload["description"]

        async def _guarded(request: Request) -> Response:
            request.state.route = self.path
            if upload:  # A form has an envelope around its file.
                envelope = request.state.max_body_bytes if "multipart/form-data" in upload["content"] else 0
                request.state.max_body_bytes = settings.max_upload_mib * 2**20 + envelope
            user = request.state.user = await authenticate(request.headers.get("authorization"))
            counts = {extra: bucket_key(request.scope, None)} if extra else {}
            enforce(request.scope, counts | {bucket: bucket_key(request.scope, user)})
            if user and user.scope and (self.path.startswith(walls) or (user.scope, bucket) == ("read", "write")):
                header = {"WWW-Authenticate": 'Bearer error="insufficient_scope"'}  # RFC 6750 §3.1
                raise ApiError(403, "insufficient_scope", "This API token may not do that.", header)
            if not request.query_params.keys() <= known:
                raise invalid(("query", f"has an unknown parameter; known are: {', '.join(sorted(known)) or 'none'}"))
            media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
            if (upload or (self.body_field and has_body)) and not re.fullmatch(types, media_type):
                raise ApiError(415, "unsupported_media_type", f"Send {hint}.")
            return await (recalled(request, user, handle) if user and bucket == "read" else handle(request))

        return _guarded


router = functools.partial(APIRouter, route_class=Route)

# ── 9 Live updates ──────────────────────────────────────────────────────────────────────────────
# One number per user. A write takes the next seq inside its transaction; a stream is a cursor that
# sleeps until its user's seq has moved past it and then reads what it missed. No queue per connection:
# a slow peer falls behind and catches up, from a ring of recent changes or from the database.

WEBHOOK_TRIES, WEBHOOK_WORKERS, WEBHOOK_QUEUE = 5, 4, 2000
WEBHOOK_SECONDS, WEBHOOK_BACKOFF_SECONDS = 10.0, 1.0
RING_SIZE = 256
BATCH, BATCH_CHARACTERS = 500, 2**18  # What waits in memory for a peer that reads slowly.
IDLE_SECONDS = 15.0
POLL_SECONDS = 2.0  # How late a stream notices another process's changes, a logout or a disabled account.


class Change(NamedTuple):
    """What a stream sends: a change of one task. Without a text it only moves the cursor (a purge)."""

    seq: int
    kind: str
    text: str


def change_of(task: TaskPublic, kind: str = "updated") -> Change:
    """A task as the change that left it so, encoded once for all streams."""
    kind = "deleted" if task.deleted_at else kind
    return Change(task.version, kind, f'{{"type":"{kind}","seq":{task.version},"task":{task.model_dump_json()}}}')


class Marks(NamedTuple):
    """A user's numbers at one moment, and their tasks that changed after a cursor, oldest change first."""

    seq: int
    purged_seq: int
    tasks: list[TaskPublic]
    has_more: bool

    def stale(self, since: int, known_purge: int = 0) -> bool:
        """Whether who has seen `since`, and knows of purges up to `known_purge`, has missed a deletion for ever."""
        return since > self.seq or (0 < since < self.purged_seq and self.purged_seq != known_purge)


def some(db: sa.Connection, statement: sa.Select[Any], limit: int = BATCH) -> tuple[list[TaskPublic], bool]:
    """The first tasks of a query, by number and by length of their texts, and whether there are more."""
    found, characters = list[TaskPublic](), 0
    for row in db.execute(statement.limit(limit + 1)):
        if len(found) == limit or characters > BATCH_CHARACTERS:
            return found, True
        found.append(TaskPublic(**row._mapping))
        characters += len(row.description or "")
    return found, False


async def changes_after(user_id: int, since: int, limit: int = BATCH) -> Marks:
    """`version > since ORDER BY version`, deletions included, in one snapshot. Errors: 401 if the user is gone."""
    this = sa.select(users.c.seq, users.c.purged_seq).where(users.c.id == user_id)
    news = sa.select(*public_task).where(tasks.c.owner_id == user_id, tasks.c.version > since).order_by(tasks.c.version)
    user, found = await database.read(lambda db: (db.execute(this).one_or_none(), some(db, news, limit)))
    if user is None:
        raise unauthorized()
    return Marks(*user, *found)


class Feed:
    """The open streams of one user, and a ring of their last changes, without a gap up to the seq `last`."""

    def __init__(self) -> None:
        self.streams: set[Stream] = set()
        self.ring: deque[Change] = deque(maxlen=RING_SIZE)
        self.reads: dict[int, asyncio.Task[tuple[Marks, list[Change]]]] = {}
        self.last = 0

    def observe(self, seq: int, changes: Sequence[Change] = ()) -> None:
        """The user is at `seq`, by these changes; a gap (another process wrote) empties the ring. Wakes the streams."""
        for change in changes:
            if change.seq == self.last + 1:
                self.ring.append(change)
                self.last = change.seq
        if seq > self.last:
            self.ring.clear()
            self.last = seq
        for stream in self.streams:
            stream.wake.set()

    async def after(self, user_id: int, cursor: int) -> tuple[Marks, list[Change]]:
        """What followed a cursor, read and encoded once for all streams that ask for it meanwhile."""

        async def _read() -> tuple[Marks, list[Change]]:
            marks = await changes_after(user_id, cursor)
            return marks, await in_thread(database.readers, lambda: list(map(change_of, marks.tasks)))

        if cursor not in self.reads:
            self.reads[cursor] = asyncio.create_task(_read())
            self.reads[cursor].add_done_callback(lambda _: self.reads.pop(cursor))
        return await asyncio.shield(self.reads[cursor])


feeds: dict[int, Feed] = {}


class Stream:
    """One live connection: where it is, and why it has to end once it has to."""

    def __init__(self, user: Row, client_id: str | None) -> None:
        self.user_id, self.session_id, self.client_id = user.id, user.session_id, client_id
        self.cursor, self.replay_until, self.known_purge, self.stale = 0, 0, 0, False
        self.wake, self.closing = asyncio.Event(), (0, "")

    def close(self, code: int, reason: str) -> None:
        """End with a WebSocket close code; the first reason stands."""
        self.closing = self.closing if self.closing[0] else (code, reason)
        self.wake.set()

    async def missed(self) -> list[Change]:
        """What was not sent yet: from the ring, or for a replay and after a gap from the database."""
        feed = feeds[self.user_id]
        ring_reaches_back_to = feed.ring[0].seq - 1 if feed.ring else feed.last
        if self.cursor >= max(self.replay_until, ring_reaches_back_to) and not self.stale:
            return [change for change in feed.ring if change.seq > self.cursor]
        marks, changes = await feed.after(self.user_id, self.cursor)
        feed.observe(marks.seq)
        if self.stale or marks.stale(self.cursor, self.known_purge):
            self.stale, self.known_purge = False, marks.purged_seq
            return [Change(marks.seq, "resync_required", '{"type":"resync_required"}')]
        return changes or [Change(marks.seq, "purged", "")]

    async def changes(self) -> AsyncIterator[Change]:
        """Everything after the cursor, in seq order, none twice, until closed; without a text when nothing happens."""
        while not self.closing[0]:
            self.wake.clear()
            for change in await self.missed():
                if self.closing[0]:
                    return
                self.cursor = change.seq
                yield change
                await asyncio.sleep(0)  # A peer that takes all at once leaves the others their turn.
            if self.cursor >= feeds[self.user_id].last:
                try:
                    await asyncio.wait_for(self.wake.wait(), IDLE_SECONDS)
                except TimeoutError:
                    yield Change(self.cursor, "idle", "")


def all_streams() -> list[Stream]:
    """The open streams of every user, in this process."""
    return [stream for feed in feeds.values() for stream in feed.streams]


LIVE_CONNECTIONS.set_function(lambda: len(all_streams()))


@contextlib.asynccontextmanager
async def open_stream(user: Row, since: int | None, client_id: str | None = None) -> AsyncIterator[Stream]:
    """A registered stream; it replaces the user's other one with the same client_id. Errors: 401."""
    feed, stream = feeds.setdefault(user.id, Feed()), Stream(user, client_id)
    for other in [other for other in feed.streams if client_id and other.client_id == client_id]:
        other.close(4409, "replaced by a newer connection")
    feed.streams.add(stream)
    try:
        # Registered first, looked second: a commit in between is noticed by one or the other.
        marks = await changes_after(user.id, MAX_ID)  # No task is past that: only the user's numbers.
        feed.observe(marks.seq)
        stream.stale = since is not None and marks.stale(since)
        stream.cursor = marks.seq if since is None or stream.stale else since
        stream.replay_until, stream.known_purge = marks.seq, marks.purged_seq
        yield stream
    finally:
        feed.streams.discard(stream)
        if not feed.streams:
            feeds.pop(user.id, None)


async def look_around() -> None:
    """Close the streams whose session has ended, and notice what other processes have written."""
    streams = all_streams()
    wanted = sessions.c.id.in_({stream.session_id for stream in streams})
    seqs = {row.session_id: row.seq for row in await fetch(principals.where(wanted, alive()))} if streams else {}
    for stream in streams:
        if stream.session_id not in seqs:
            stream.close(4401, "the session has ended")
        elif (feed := feeds.get(stream.user_id)) and feed.last < seqs[stream.session_id]:
            feed.observe(seqs[stream.session_id])


class Outbox:
    """The webhook: changes wait in memory, are signed and posted, and after five tries given up."""

    waiting: asyncio.Queue[str]
    client: httpx.AsyncClient

    def offer(self, text: str) -> None:
        """Never in the way of the request that caused it: what finds no room is given up."""
        try:
            self.waiting.put_nowait(text)
        except asyncio.QueueFull:
            WEBHOOKS_GIVEN_UP.inc()

    async def post(self, text: str, message_id: str) -> int:
        """One signed call. Returns its status. Errors: any. Ref: Standard Webhooks."""
        moment = datetime.now(UTC)  # Not now(): the receiver compares it with a clock of its own.
        signature = Webhook(settings.webhook_secret.get_secret_value()).sign(message_id, moment, text)
        headers = {"webhook-id": message_id, "webhook-timestamp": str(int(moment.timestamp()))}
        headers |= {"webhook-signature": signature, "content-type": "application/json"}
        call = self.client.stream("POST", settings.webhook_url, content=text, headers=headers)
        async with asyncio.timeout(WEBHOOK_SECONDS), call as answer:  # The body may never end; the status is enough.
            return answer.status_code

    async def accepted(self, text: str, message_id: str) -> bool:
        """Whether a call succeeded, whatever a receiver can think of (a redirect to mailto: is an InvalidURL)."""
        with contextlib.suppress(Exception):
            return await self.post(text, message_id) < 300
        return False

    async def deliver(self) -> None:
        """Post what waits, one after the other; a message keeps its id, so that a receiver can drop a repeat."""
        while True:
            text, message_id = await self.waiting.get(), f"msg_{secrets.token_hex(12)}"
            for attempt in range(WEBHOOK_TRIES):
                jitter = 0.5 + secrets.randbelow(1000) / 1000
                await asyncio.sleep(attempt and WEBHOOK_BACKOFF_SECONDS * 2**attempt * jitter)
                if await self.accepted(text, message_id):
                    break
            else:
                WEBHOOKS_GIVEN_UP.inc()

    async def run(self) -> None:
        """Deliver, several at once, until cancelled."""
        self.waiting = asyncio.Queue(WEBHOOK_QUEUE)
        async with httpx.AsyncClient(timeout=WEBHOOK_SECONDS) as self.client, asyncio.TaskGroup() as workers:
            for _ in range(WEBHOOK_WORKERS):
                workers.create_task(self.deliver())


outbox = Outbox()


class Transaction:
    """A change of one user's tasks, at the seqs that it took."""

    def __init__(self, db: sa.Connection, user_id: int, last: int, count: int) -> None:
        self.db, self.user_id, self.last = db, user_id, last
        self.seqs = iter(range(last - count + 1, last + 1))
        self.written: list[tuple[TaskPublic, str]] = []

    def complete(self, columns: dict[str, Any]) -> dict[str, Any]:
        """The columns of a task with all that follows from them, at the next seq."""
        moment, done = now(), columns["status"] == "done"
        completed_at = (columns.get("completed_at") or moment) if done else None
        search_text = folded(f"{columns['title']}\x1f{columns['description'] or ''}")
        derived = {"completed": done, "completed_at": completed_at, "search_text": search_text}
        return columns | derived | {"version": next(self.seqs), "updated_at": moment}

    def write(self, kind: str, statement: Any, columns: Any) -> list[TaskPublic]:
        """Run an INSERT or UPDATE, and keep what it wrote for those who follow it."""
        found = self.db.execute(statement.returning(*public_task), columns)
        written = sorted((TaskPublic(**row._mapping) for row in found), key=lambda task: task.version)
        self.written += [(task, kind) for task in written]
        return written

    def create(self, *rows: dict[str, Any]) -> list[TaskPublic]:
        """New tasks, a seq for each."""
        new = TASK_DEFAULTS | {"owner_id": self.user_id, "attachments": 0, "created_at": now()}
        return self.write("created", sa.insert(tasks), [self.complete(new | row) for row in rows])

    def update(self, before: TaskPublic, values: dict[str, Any]) -> TaskPublic:
        """New values of one task."""
        columns = self.complete(before.model_dump() | values)
        return self.write("updated", sa.update(tasks).where(tasks.c.id == before.id), columns)[0]

    def purge(self, until: datetime) -> int:
        """Delete the trash up to a moment for good, and remember the highest seq removed. Returns how many."""
        old = (tasks.c.owner_id == self.user_id) & (tasks.c.deleted_at <= until)
        highest = sa.select(sa.func.max(tasks.c.version)).where(old).scalar_subquery()
        behind = (users.c.id == self.user_id) & (users.c.purged_seq < highest)  # Nobody is behind an empty trash.
        self.db.execute(sa.update(users).where(behind).values(purged_seq=highest))
        return self.db.execute(sa.delete(tasks).where(old)).rowcount


async def changing(user_id: int, work: Callable[[Transaction], T], who: Any = True, count: int = 1) -> T:
    """Take the user's next seqs, do the work, commit, then tell streams and webhook. Errors: 401 if they are gone."""
    step = sa.update(users).where(users.c.id == user_id, who).values(seq=users.c.seq + count).returning(users.c.seq)

    def _transact(db: sa.Connection) -> tuple[T, Transaction, list[Change]]:
        seq = db.scalar(step)
        if seq is None:
            raise unauthorized()
        transaction = Transaction(db, user_id, seq, count)
        result, wanted = work(transaction), settings.webhook_url or user_id in feeds
        return result, transaction, [change_of(*written) for written in transaction.written if wanted]

    result, transaction, changes = await database.write(_transact)
    TASKS_WRITTEN.inc(len(transaction.written))
    for change in changes if settings.webhook_url else ():
        outbox.offer(change.text)
    if feed := feeds.get(user_id):
        feed.observe(transaction.last, changes if transaction.written else [Change(transaction.last, "purged", "")])
    return result


# ── 10 Application ──────────────────────────────────────────────────────────────────────────────
# Start-up happens inside one write transaction, so that several processes may start at once. Around
# everything lies one ASGI layer of ours: FastAPI's handlers run inside its middleware and never see each
# other's failures, and only the outermost layer can put an id and the limits on every answer.

SEND_SECONDS, PIECE_BYTES = 20.0, 64 * 1024
CLEANUP_SECONDS, USES_SECONDS = 3600.0, 60.0
CONTENT_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": CONTENT_POLICY,
}
EXPOSED = ["ETag", "Link", "Location", "Retry-After", "X-Request-ID", "Idempotency-Replayed", "Content-Disposition"]
EXPOSED += ["X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset"]
started_at = time.monotonic()
last_cleanup: dict[str, int | datetime] | None = None


class LogFormatter(logging.Formatter):
    """One line a record, as text for people or as JSON for machines."""

    def format(self, record: logging.LogRecord) -> str:
        """The time, what happened, and the traceback of a failure."""
        moment = now().isoformat(timespec="milliseconds").replace("+00:00", "Z")
        if settings.log_format == "text":
            return f"{moment} {super().format(record)}"
        failure = {"traceback": self.formatException(record.exc_info)} if record.exc_info else {}
        fields = getattr(record, "fields", {"message": record.getMessage()})
        return json.dumps({"time": moment, "level": record.levelname.lower()} | fields | failure)


def load_secret(path: Path) -> SecretStr:
    """SECRET_KEY, or the one generated at first and kept here, mode 0600. Errors: SystemExit. Ref: RFC 7518 §3.2."""
    key = settings.secret_key.get_secret_value()
    if not key and not path.exists():
        new = path.with_suffix(".new")
        new.touch(0o600)
        new.write_text(new_token())
        new.replace(path)
    key = key or path.read_text(errors="replace").strip()
    placeholder = re.search(r"change.?(me|this|it)|your.?secret|secret.?key|placeholder|example|insecure", key, re.I)
    if len(key.encode()) < 32 or len(set(key)) < 8 or placeholder:
        raise SystemExit(f"SECRET_KEY: must be 32 random bytes or more; leave it empty to have one generated in {path}")
    return SecretStr(key)


def new_user(name: str, password: str, role: str, email: str | None = None) -> dict[str, Any]:
    """The columns of a new account. It hashes: in a request, call it in a worker."""
    secret = {"username_key": folded(name), "password_hash": hash_password(password), "seq": 0, "purged_seq": 0}
    return secret | {"username": name, "email": email, "role": role, "is_active": True, "created_at": now()}


def open_database() -> None:
    """Open the database, create what is missing, load the secret, create the first admin. Errors: SystemExit."""
    given = settings.admin_password.get_secret_value()
    name = valid_or_exit(lambda: a_username.validate_python(settings.admin_username), "ADMIN_USERNAME")
    password = valid_or_exit(lambda: a_password.validate_python(given or new_token()), "ADMIN_PASSWORD")
    try:
        database.open()
        with database.write_engine.begin() as db:
            upgrade(db, database.keep_copy)
            settings.secret_key = load_secret(settings.data_dir / "secret_key")
            first_start = db.scalar(sa.select(sa.func.count()).select_from(users)) == 0
            if first_start:
                db.execute(sa.insert(users).values(new_user(name, password, "admin")))
            if first_start and not given:
                print(f"  Admin      {name}, password {password}   (shown only now)", flush=True)  # noqa: T201
    except (OSError, sqlite3.Error, sa.exc.DatabaseError) as error:
        raise SystemExit(f"DATA_DIR: {reason(error)}") from None


async def clean_up() -> None:
    """Remove what has expired: sessions, used refresh tokens, trash older than TRASH_DAYS."""
    global last_cleanup
    moment, purged = now(), 0
    oldest = moment - timedelta(days=settings.trash_days)
    await note_uses()
    ended = await execute(sa.delete(sessions).where(sessions.c.expires_at <= moment))
    used = await execute(sa.delete(refresh_tokens).where(refresh_tokens.c.expires_at <= moment))
    for (owner_id,) in await fetch(sa.select(tasks.c.owner_id).where(tasks.c.deleted_at <= oldest).distinct()):
        with contextlib.suppress(ApiError):  # Whoever has left meanwhile has nothing left to purge.
            purged += await changing(owner_id, lambda transaction: transaction.purge(oldest))
    for left_over in settings.data_dir.glob(".copy-*/"):  # By a backup or restore that was killed.
        if time.time() - left_over.stat().st_mtime > 86400:
            shutil.rmtree(left_over, ignore_errors=True)
    last_cleanup = {"finished_at": now(), "sessions": ended, "refresh_tokens": used, "tasks": purged}


async def every(seconds: float, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do it again and again; after a failure the next turn tries anew."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except Exception:
            log.exception("background work failed")


def end_streams(handler: Any = None, *event: Any) -> None:
    """At the end, or at a signal before its own `handler`, which would wait for them. Ref: RFC 6455 §7.4.1."""
    for stream in all_streams():
        stream.close(1001, "the server is going away")
    if callable(handler):
        handler(*event)


@contextlib.asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Start: logging, database, background work. Stop: end the streams, finish the writes, close."""
    log.handlers, log.propagate = [logging.StreamHandler()], False
    log.handlers[0].setFormatter(LogFormatter())
    log.setLevel(settings.log_level.upper())
    logging.getLogger("uvicorn.access").disabled = True  # It prints query strings, and so does uvicorn.error.
    logging.getLogger("uvicorn.error").addFilter(lambda entry: not re.search('UTF-8|"WebSocket', entry.getMessage()))
    for memory in (authenticated, answers):  # Of another database, if this process had one before.
        memory.clear()
    open_database()
    print(f"  Data       {settings.data_dir.resolve() / 'tasks.db'}", flush=True)  # noqa: T201
    for number in (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ():
        signal.signal(number, functools.partial(end_streams, signal.getsignal(number)))
    jobs = [every(POLL_SECONDS, look_around), every(CLEANUP_SECONDS, clean_up), every(USES_SECONDS, note_uses)]
    chores = [asyncio.create_task(job) for job in (*jobs, *([outbox.run()] if settings.webhook_url else []))]
    yield
    end_streams()
    for chore in chores:
        chore.cancel()
    await asyncio.wait(chores)
    await note_uses()
    await in_thread(database.writers, database.close)  # The last of that thread's work: every write has ended.


def explain(error: Exception, path: str = "") -> ApiError:
    """Whatever was raised, as the error that a client sees. What they sent is not repeated."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        if any(each["type"] == "json_invalid" for each in error.errors()):
            return ApiError(400, "invalid_json", "The body is not valid JSON.")
        return invalid(*complaints(error, 1))
    silent = sa.exc.OperationalError | sa.exc.TimeoutError | sqlite3.Error | OSError  # Also a full disk.
    if isinstance(error, silent) or type(error) is sa.exc.DatabaseError:
        return ApiError(503, "database_unavailable", "The database does not answer; try again.", {"Retry-After": "5"})
    known = {
        400: ("invalid_json", "The body cannot be read."),
        404: ("not_found", "No such path. All of them stand in /docs."),
        405: ("method_not_allowed", "This path has other methods: see Allow."),
        500: ("internal_error", "Something failed here; the log knows more by this request_id."),
    }
    status = getattr(error, "status_code", 500)
    if status != 405:
        return ApiError(status, *known[status])
    here = [route.methods or {"GET"} for route in iter_route_contexts(app.routes) if route.path_regex.match(path)]
    allow = {method for methods in here for method in (methods | {"HEAD"} if "GET" in methods else methods)}
    return ApiError(405, *known[405], {"Allow": ", ".join(sorted(allow))})


def page_policy(html: bytes) -> str:
    """What /docs and /redoc may do: their own inline script, styles, a worker from memory. Ref: CSP 3 §2.3."""
    digests = [hashlib.sha256(script).digest() for script in re.findall(b"(?s)<script>(.*?)</script>", html)]
    scripts = " ".join(["script-src 'self'", *(f"'sha256-{b64encode(digest).decode()}'" for digest in digests)])
    rest = "style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; worker-src blob:"
    return f"{CONTENT_POLICY}; {scripts}; {rest}"


class CrossOrigin(CORSMiddleware):
    """Lets the pages of CORS_ORIGINS read what this answers. No credentials: a token is no cookie. Ref: Fetch §3.3."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """What a browser asks before it asks. Errors: 400, for a page of another origin."""
        answer = super().preflight_response(request_headers)
        if answer.status_code == 400:
            raise ApiError(400, "origin_not_allowed", "CORS_ORIGINS does not name the origin of this page.")
        return answer


def cross_origin(app: ASGIApp) -> ASGIApp:
    """The same app, open to the pages of CORS_ORIGINS."""
    origins, any_one = settings.cors_origins.replace(" ", "").split(","), ["*"]
    return CrossOrigin(app, origins, any_one, any_one, expose_headers=EXPOSED) if settings.cors_origins else app


class SlowClient(Exception):
    """The peer has taken nothing for SEND_SECONDS."""


class Exchange:
    """One request or socket as the Gateway sees it: id, status, time, and a `send` that completes the answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method, self.path, self.raw_send = scope.get("method", "WEBSOCKET"), scope["path"], send
        # Not of ASGI: uvicorn's receive is a method of the connection's cycle, which knows its transport.
        self.raw_receive, self.transport = receive, getattr(getattr(receive, "__self__", None), "transport", None)
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        self.request_id = given if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else secrets.token_hex(8)
        self.state = {**scope.get("state", {}), "request_id": self.request_id, "user": None, "headers": {}}
        self.state |= {"route": "none", "max_body_bytes": settings.max_body_kib * 1024}
        root = settings.root_path or scope.get("root_path", "")
        # No route has a control character, and "$" would overlook the last one. A proxy may keep ROOT_PATH or not.
        path = re.sub(r"[\x00-\x1f]", "\ufffd", self.path).removesuffix("/") or "/"
        path = path if path.startswith(f"{API}/") else path.removeprefix(root)
        # Nothing is answered in part: the rest of a backup would be of another one. Ref: RFC 9110 §14.2
        headers = [pair for pair in scope["headers"] if pair[0] != b"range"]
        self.scope = {**scope, "state": self.state, "root_path": root, "path": root + path, "headers": headers}
        self.scope |= {"method": "GET"} if self.method == "HEAD" else {}
        self.began, self.arrived_bytes, self.status, self.complete = time.perf_counter(), 0, 0, False
        self.page: Message = {}

    async def receive(self) -> Message:
        """Measure a body as it arrives. Errors: 413. Ref: RFC 9110 §15.5.14."""
        message = await self.raw_receive()
        self.arrived_bytes += len(message.get("body", b""))
        if self.arrived_bytes > (limit := self.state["max_body_bytes"]):
            raise ApiError(413, "body_too_large", f"The body is larger than {limit // 1024} KiB.")
        return message

    async def send(self, message: Message) -> None:
        """Put id, limits and policies on the head, end a HEAD without its body."""
        if self.complete:
            return
        self.status = message.get("status") or message.get("code") or self.status or 101  # A socket is accepted.
        if message["type"] in ("http.response.start", "websocket.accept"):
            LATENCY.labels(self.method, self.state["route"]).observe(time.perf_counter() - self.began)
            head, more = MutableHeaders(scope=message), {"X-Request-ID": self.request_id} | SECURITY_HEADERS
            for name, value in (more | self.state["headers"]).items():
                head.setdefault(name, value)
            if head.get("content-type", "").startswith("text/html"):
                self.page = message
                return
        elif message["type"] == "http.response.body":
            if self.page:  # The head of a page waits for the body, which decides about the policy.
                MutableHeaders(scope=self.page)["Content-Security-Policy"] = page_policy(message["body"])
                await self.raw_send(self.page)
                self.page = {}
            message = {"type": message["type"]} if self.method == "HEAD" else message
            self.complete = not message.get("more_body")
        await self.push(message)

    async def push(self, message: Message) -> None:
        """Hand it to the server by pieces, and give up on a peer that takes none. Errors: SlowClient, for a socket."""
        body, more = message.get("body", b""), message.get("more_body", False)
        if self.transport and (more or len(body) > PIECE_BYTES):  # Else megabytes in the kernel look like a standstill.
            self.transport.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_SNDBUF, PIECE_BYTES)
        try:
            for start in range(0, len(body) or 1, PIECE_BYTES):
                end = start + PIECE_BYTES
                piece = {"body": body[start:end], "more_body": more or end < len(body)} if body else {}
                async with asyncio.timeout(SEND_SECONDS):
                    await self.raw_send({**message, **piece})
            async with asyncio.timeout(SEND_SECONDS):
                while self.complete and self.transport and self.transport.get_write_buffer_size():  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
        except TimeoutError:
            if message["type"] == "websocket.send":
                raise SlowClient from None
            # ASGI has no word for it: only the server's transport can drop what such a peer never takes.
            if self.transport is not None:
                self.transport.abort()

    async def fail(self, error: ApiError) -> None:
        """Answer with an error, or close with 1011, unless the answer has begun or the peer is gone."""
        with contextlib.suppress(OSError, RuntimeError):
            if self.method == "WEBSOCKET" and self.status == 101:
                await self.send({"type": "websocket.close", "code": 1011})
            elif self.method != "WEBSOCKET" and self.status == 0:
                answer: ASGIApp = error.response(self.request_id)
                answer = answer if self.method == "OPTIONS" else cross_origin(answer)
                await answer(self.scope, self.receive, self.send)

    def log(self) -> None:
        """Count, and one line. The path is percent-encoded, so that it cannot forge another, and has no query."""
        REQUESTS.labels(self.method, self.state["route"], self.status).inc()
        user, milliseconds = self.state["user"], round((time.perf_counter() - self.began) * 1000, 1)
        entry = {"request_id": self.request_id, "method": self.method, "path": quote(self.path), "status": self.status}
        entry |= {"milliseconds": milliseconds, "user_id": user.id if user else None}
        line = "{request_id} {method} {path} {status} {milliseconds} ms user {user_id}"
        log.info(line.format(**entry), extra={"fields": entry})


class Gateway:
    """The outermost ASGI layer: what holds for every request and socket, whatever happens inside."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = cross_origin(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request, and turn a failure into an error with the request's id."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        exchange = Exchange(scope, receive, send)
        if scope["query_string"]:  # FastAPI puts it into its span, if telemetry is on; searches are private.
            trace.get_current_span().set_attribute("url.query", "REDACTED")
        try:
            await self.app(exchange.scope, exchange.receive, exchange.send)
        except (ClientDisconnect, WebSocketDisconnect):
            exchange.status = exchange.status or 499  # What proxies call it.
            log.debug("%s the client is gone", exchange.request_id)
        except asyncio.CancelledError:
            await exchange.fail(ApiError(503, "server_stopping", "The server is stopping.", {"Retry-After": "5"}))
        except ApiError as error:
            await exchange.fail(error)
        except Exception as error:
            log.exception("%s failed", exchange.request_id)
            await exchange.fail(explain(error))
        finally:
            exchange.log()


async def on_error(request: Request, error: Exception) -> Response:
    """The framework's errors and ours; everything else reaches the Gateway."""
    path = request.scope["path"].removeprefix(request.scope["root_path"])
    return explain(error, path).response(request.state.request_id)


app: FastAPI = (FastAPIOffline if settings.docs == "on" else FastAPI)(
    title="Onefile Tasks",
    version=VERSION,
    openapi_url="/openapi.json" if settings.docs == "on" else None,
    redirect_slashes=False,
    lifespan=lifespan,
    exception_handlers=dict.fromkeys((400, 404, 405, ApiError, RequestValidationError), on_error),
    responses={"default": {"model": Error, "description": "Any error"}},
)
app.add_middleware(Gateway)
app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=settings.trusted_proxies)

# ── 11 Routes ───────────────────────────────────────────────────────────────────────────────────
# One router a resource. A docstring is the route's description in /docs; errors that any route can give (400,
# 401, 413, 415, 422, 429, 500, 503) stand once in the README. A GET counts against RATE_LIMIT_READ, the rest
# against RATE_LIMIT_WRITE; a docstring names what counts besides.

auth = router(prefix=f"{API}/auth", tags=["auth"])


def try_password(account: str | None, password: str, password_hash: str | None) -> bool:
    """Compare, and count a failure against an account. Nobody's password costs the same hash. Errors: 429."""
    limit, spent = settings.rate_limit_account, limiter.limiter
    if account and not spent.test(limit, "account", account):
        raise rate_limited("account", account)
    matches = password_matches(password, password_hash) if password_hash else not hash_password(password)
    FAILED_LOGINS.inc(not matches)
    if account and not matches and not spent.hit(limit, "account", account):
        raise rate_limited("account", account)
    return matches


class TokenIssuer:
    """What every route that checks a password or hands out tokens needs; its answer is kept by no cache."""

    def __init__(self, request: Request, response: Response) -> None:
        self.address, self.agent = client_address(request.scope), request.headers.get("user-agent", "")[:200]
        response.headers["Cache-Control"] = "no-store"  # RFC 6749 §5.1

    def issue(self, db: sa.Connection, user_id: int, session: Row | None = None) -> TokenPair:
        """The first tokens of a new session, or the next ones of a session, which lives 180 days in all."""
        moment, token = now(), new_token()
        created_at = session.session_created_at if session else moment
        end = min(moment + timedelta(days=settings.refresh_token_days), created_at + timedelta(days=SESSION_DAYS))
        values = {"address": self.address, "user_agent": self.agent, "last_used_at": moment, "created_at": created_at}
        step: Any = sa.update(sessions).where(sessions.c.id == session.session_id) if session else sa.insert(sessions)
        session_id = db.scalar(step.values(user_id=user_id, expires_at=end, **values).returning(sessions.c.id))
        kept = {"session_id": session_id, "token_hash": token_hash(token), "expires_at": end}
        db.execute(sa.insert(refresh_tokens), kept)
        access_token, seconds = encode_access_token(user_id, session_id), settings.access_token_minutes * 60
        return TokenPair(access_token=access_token, refresh_token=token, expires_in=seconds)

    async def verify(self, name: str, password: str, session_id: int | None = None) -> Row | None:
        """The user of that name, if the password is theirs; an unknown name costs the same time. Errors: 429.

        Failures count against the account, or against the session that asks; but not from an address
        that is logged in to the account, so that a stranger who exhausts the count locks nobody out.
        """
        key, password = folded(name[:200]), password[:257]  # A form is checked by nobody; 256 is the longest password.
        user = next(iter(await fetch(sa.select(users).where(users.c.username_key == key))), None)
        living = logins & (sessions.c.user_id == (user and user.id)) & (sessions.c.expires_at > now())
        here = sa.select(sessions.c.address).where(living)
        known = address_key(self.address) in {address_key(row.address) for row in await fetch(here)}
        counter = f"session {session_id}" if session_id else key
        counted = None if known or settings.rate_limits == "off" else counter
        matches = await in_thread(password_workers, try_password, counted, password, user and user.password_hash)
        return user if matches else None

    async def log_in(self, name: str, password: str) -> TokenPair:
        """Tokens for a name and a password. Errors: 401; 403; 429."""
        user = await self.verify(name, password)
        if user is None:
            raise unauthorized("invalid_credentials", "Wrong username or password.")
        if not user.is_active:
            raise ApiError(403, "account_disabled", "This account is disabled.")
        unchanged = sa.select(users).filter_by(id=user.id, password_hash=user.password_hash, is_active=True)

        def _start(db: sa.Connection) -> TokenPair:
            if db.scalar(unchanged) is None:
                raise unauthorized("invalid_credentials", "The account has just changed.")
            return self.issue(db, user.id)

        return await database.write(_start)


Issuer = Annotated[TokenIssuer, Depends()]


def add_user(db: sa.Connection, columns: dict[str, Any]) -> UserPublic:
    """Create an account of `new_user`'s columns. Errors: 409 username_taken."""
    try:
        return UserPublic(**db.execute(sa.insert(users).values(columns).returning(users)).one()._mapping)
    except sa.exc.IntegrityError:
        raise ApiError(409, "username_taken", "This username is taken.") from None


@auth.post("/register", status_code=201, openapi_extra={"x-rate-limit": "register"})
async def register(body: Registration, issuer: Issuer) -> Registered:
    """Create an account and log in.

    Errors: 403 registration_closed; 409 username_taken
    Limit: register per address
    """
    if settings.registration == "closed":
        raise ApiError(403, "registration_closed", "Registration is closed here. Ask the admin for an account.")
    columns = await in_thread(password_workers, new_user, body.username, body.password, "user", body.email)

    def _create(db: sa.Connection) -> Registered:
        user = add_user(db, columns)
        return Registered(**issuer.issue(db, user.id).model_dump(), user=user)

    return await database.write(_create)


@auth.post("/login", openapi_extra={"x-rate-limit": "login"})
async def log_in(body: Credentials, issuer: Issuer) -> TokenPair:
    """Exchange a username and a password for tokens.

    Errors: 401 invalid_credentials; 403 account_disabled
    Limit: login per address; account, failures only
    """
    return await issuer.log_in(body.username, body.password)


@auth.post("/token", openapi_extra={"x-rate-limit": "login"})
async def log_in_by_form(form: Annotated[OAuth2PasswordRequestForm, Depends()], issuer: Issuer) -> TokenPair:
    """The same, errors and limits included, as an OAuth 2 password form. Ref: RFC 6749 §4.3."""
    return await issuer.log_in(form.username, form.password)


@auth.post("/refresh", openapi_extra={"x-rate-limit": "refresh"})
async def refresh(body: RefreshRequest, issuer: Issuer) -> TokenPair:
    """Exchange a refresh token for the next pair. It works once.

    A used one is a sign of theft: its session ends with every token of it, unless it comes within a
    second of its use while the successor is still unused, which is a second tab and no thief.

    Errors: 401 invalid_refresh_token
    Limit: refresh per address
    Ref: RFC 9700 §4.14.2
    """
    column, moment = refresh_tokens.c, now()
    this, later = column.token_hash == token_hash(body.refresh_token), refresh_tokens.alias()
    fresh = this & column.used_at.is_(None) & (column.expires_at > moment)
    successor = (later.c.session_id == column.session_id) & (later.c.id > column.id) & later.c.used_at.is_not(None)
    replayed = (column.used_at < moment - timedelta(seconds=1)) | sa.exists().where(successor)
    use = sa.update(refresh_tokens).where(fresh).values(used_at=moment).returning(column.session_id)

    def _rotate(db: sa.Connection) -> TokenPair | None:
        session_id = db.scalar(use)
        session = db.execute(principals.where(sessions.c.id == session_id, alive())).one_or_none()
        if session is not None:
            return issuer.issue(db, session.id, session)
        lost = sa.select(column.session_id).where(this, replayed)
        db.execute(sa.delete(sessions).where(sessions.c.id.in_(lost)))
        return None

    if tokens := await database.write(_rotate):
        return tokens
    raise unauthorized("invalid_refresh_token", "This refresh token is not valid.")


@auth.post("/logout", status_code=204, dependencies=[Depends(oauth2)])
async def log_out(request: Request, body: RefreshRequest | None = None) -> None:
    """End this session: by access token, or by refresh token when that has expired. Errors: 401 neither is valid."""
    given = refresh_tokens.c.token_hash == token_hash(body.refresh_token if body else "")
    by_token = sessions.c.id.in_(sa.select(refresh_tokens.c.session_id).where(given))
    user = request.state.user
    if not await execute(sa.delete(sessions).where(sessions.c.id == user.session_id if user else by_token)):
        raise unauthorized()


@auth.post("/logout_all", status_code=204)
async def log_out_everywhere(user: CurrentUser) -> None:
    """End every session of the caller; API tokens stay."""
    await execute(sa.delete(sessions).where(sessions.c.user_id == user.id, logins))


@auth.get("/sessions")
async def list_sessions(user: CurrentUser) -> Collection[SessionListed]:
    """The caller's logins, last used first."""
    await note_uses()
    mine = sa.select(sessions).where(sessions.c.user_id == user.id, logins, sessions.c.expires_at > now())
    rows = await fetch(mine.order_by(sessions.c.last_used_at.desc(), sessions.c.id.desc()))
    return Collection(data=[SessionListed(**row._mapping, current=row.id == user.session_id) for row in rows])


@auth.delete("/sessions/{session_id}", status_code=204)
async def end_session(session_id: Id, user: CurrentUser) -> None:
    """End one login. Errors: 404 absent or not yours."""
    if not await execute(sa.delete(sessions).where(logins, sessions.c.id == session_id, sessions.c.user_id == user.id)):
        raise not_found("session", session_id)


nullif = functools.partial(sa.func.nullif, type_=sessions.c.created_at.type)
public_api_token = [
    *(sessions.c[name] for name in ("id", "name", "scope", "created_at")),
    nullif(sessions.c.last_used_at, sessions.c.created_at).label("last_used_at"),
    nullif(sessions.c.expires_at, NEVER).label("expires_at"),
]


def new_api_token(db: sa.Connection, user_id: int, name: str, scope: str, end: datetime = NEVER) -> ApiTokenCreated:
    """A token that its owner sees once; here only its hash stays."""
    secret, moment = API_TOKEN_PREFIX + new_token(), now()
    values: dict[str, Any] = {"user_id": user_id, "token_hash": token_hash(secret), "address": "", "user_agent": ""}
    values |= {"created_at": moment, "last_used_at": moment, "expires_at": end, "name": name, "scope": scope}
    row = db.execute(sa.insert(sessions).values(values).returning(*public_api_token)).one()
    return ApiTokenCreated(**row._mapping, token=secret)


@auth.get("/api_tokens")
async def list_api_tokens(user: CurrentUser) -> Collection[ApiTokenPublic]:
    """The caller's tokens for scripts, oldest first."""
    await note_uses()
    mine = ~logins & (sessions.c.user_id == user.id) & (sessions.c.expires_at > now())
    rows = await fetch(sa.select(*public_api_token).where(mine).order_by(sessions.c.id))
    return Collection(data=[ApiTokenPublic(**row._mapping) for row in rows])


@auth.post("/api_tokens", status_code=201)
async def create_api_token(body: ApiTokenCreate, user: CurrentUser, _issuer: Issuer) -> ApiTokenCreated:
    """A token for a script, shown only now. It reaches tasks, and nothing of accounts, sessions or administration."""
    if body.expires_at and body.expires_at <= now():
        raise invalid(("expires_at", "must lie in the future"))
    return await write_as(user, lambda db: new_api_token(db, user.id, body.name, body.scope, body.expires_at or NEVER))


@auth.delete("/api_tokens/{token_id}", status_code=204)
async def delete_api_token(token_id: Id, user: CurrentUser) -> None:
    """End a token at once, its streams included. Errors: 404 absent or not yours."""
    if not await execute(sa.delete(sessions).where(~logins, sessions.c.id == token_id, sessions.c.user_id == user.id)):
        raise not_found("api_token", token_id)


account = router(prefix=f"{API}/users/me", tags=["users"])


@account.get("")
async def read_account(user: CurrentUser) -> UserPublic:
    """The caller's account."""
    return UserPublic(**user._mapping)


def change_user(db: sa.Connection, user_id: int, values: dict[str, Any] | None, ends: Any = True) -> UserPublic:
    """Change an account, or with None delete it with all that is theirs; returns it.

    A new password or a disabled account ends its sessions and API tokens, or which of them `ends` says.
    Errors: 404; 409 last_admin
    """
    this, new = users.c.id == user_id, values or {}
    stays_admin = values is not None and new.get("role", "admin") == "admin" and new.get("is_active", True)
    admins = sa.select(users.c.id).where(users.c.role == "admin", users.c.is_active).with_for_update()
    if not stays_admin and list(db.scalars(admins)) == [user_id]:
        raise ApiError(409, "last_admin", "The last active admin stays.")
    if "password_hash" in new or not new.get("is_active", True):
        db.execute(sa.delete(sessions).where(sessions.c.user_id == user_id, ends))
    written: Any = sa.delete(users) if values is None else sa.update(users).values(values or {"seq": users.c.seq})
    return find(db, UserPublic, written.where(this).returning(users), "user", user_id)


@account.patch("")
async def update_account(body: UserUpdate, user: CurrentUser, issuer: Issuer) -> UserPublic:
    """Change e-mail or password; a new password needs `current_password` and ends the other sessions.

    Errors: 403 wrong_password
    Limit: account, failures only
    """
    values, others = body.model_dump(include={"email"}), logins & (sessions.c.id != user.session_id)
    if body.password is not MISSING and body.current_password is not MISSING:
        if await issuer.verify(user.username, body.current_password, user.session_id) is None:
            raise ApiError(403, "wrong_password", "current_password is wrong.")
        values["password_hash"] = await in_thread(password_workers, hash_password, body.password)
    return await write_as(user, lambda db: change_user(db, user.id, values, others))


@account.delete("", status_code=204)
async def delete_account(user: CurrentUser) -> None:
    """Delete the account with everything in it.

    Errors: 403 login_again when the session is older than 10 minutes; 409 last_admin
    """
    if now() - user.session_created_at > timedelta(minutes=10):
        raise ApiError(403, "login_again", "Log in again: this needs a session younger than 10 minutes.")
    await write_as(user, lambda db: change_user(db, user.id, None))


todo = router(prefix=f"{API}/tasks", tags=["tasks"])
ORDER = {"status": get_args(Status), "priority": get_args(Priority)}  # Section 4 names them in this order.


def filtered(query: TaskQuery) -> sa.Select[Any]:
    """The WHERE and ORDER BY of a TaskQuery. Ties break by id, so that pages never overlap."""
    column, late = tasks.c, ~tasks.c.completed & (tasks.c.due_date < now())
    place = column.deleted_at.is_not(None) if query.deleted else column.deleted_at.is_(None)
    terms: dict[str, Callable[[Any], Any]] = {
        "status": column.status.in_,
        "priority": column.priority.in_,
        "completed": lambda completed: column.completed == completed,
        "search": lambda search: sa.func.instr(column.search_text, folded(search)) > 0,
        "due_before": lambda moment: column.due_date <= moment,
        "due_after": lambda moment: column.due_date >= moment,
        "overdue": lambda overdue: sa.func.coalesce(late, sa.false()) == overdue,
    }
    wanted = [build(value) for name, build in terms.items() if (value := getattr(query, name)) not in (None, [])]
    key: Any = column.search_text if query.sort == "title" else column[query.sort]
    if query.sort in ORDER:
        key = sa.case({name: rank for rank, name in enumerate(ORDER[query.sort])}, value=key)
    order = [term.asc() if query.order == "asc" else term.desc() for term in (key, column.id)]
    undated_last = [column.due_date.is_(None)] if query.sort == "due_date" else []
    return sa.select(*public_task).where(place, *wanted).order_by(*undated_last, *order)


@todo.get("")
async def list_tasks(user: CurrentUser, query: Annotated[TaskQuery, Query()], reply: Answering) -> Page[TaskPublic]:
    """The caller's tasks: filters are ANDed, the newest come first unless `sort` and `order` say otherwise.

    The weak ETag is made of the caller's seq and the URL: `If-None-Match` gets its 304 without the
    query. An answer that depends on the clock (`overdue`) carries none.

    Ref: RFC 8288; RFC 9110 §13.1.2
    """
    if query.overdue is None:
        digest = hashlib.sha256(f"{VERSION} {user.id} {reply.path}?{reply.request.query_params}".encode()).hexdigest()
        reply.tag(f'W/"{user.seq}-{digest[:16]}"')
    return await reply.page(query, TaskPublic, filtered(query).where(tasks.c.owner_id == user.id))


class Replayed(Exception):
    """A task that its key has created already: take no seq, write nothing."""


IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", pattern=r"^[\x21-\x7e]{1,255}$")]


@todo.post("", status_code=201)
async def create_task(user: CurrentUser, body: TaskCreate, reply: Answering, key: IdempotencyKey = None) -> TaskPublic:
    """Create a task. `Location` is its path, `ETag` its version.

    The same `Idempotency-Key` again gives the task that it created, with 200 and `Idempotency-Replayed: true`.
    """

    def _create(transaction: Transaction) -> TaskPublic:
        if key:
            known = (tasks.c.owner_id == user.id) & (tasks.c.idempotency_key == key)
            for row in transaction.db.execute(sa.select(*public_task).where(known)):
                raise Replayed(TaskPublic(**row._mapping))
        return transaction.create(body.values() | {"idempotency_key": key})[0]

    try:
        task = await changing(user.id, _create, still(user))
    except Replayed as replayed:
        (task,) = replayed.args
        reply.response.status_code, reply.headers["Idempotency-Replayed"] = 200, "true"
    reply.headers.update({"Location": f"{reply.path}/{task.id}", "ETag": f'"{task.version}"'})
    return task


FORMULA = re.compile(r"[\s\u200b-\u200f\u2060\ufeff]*[=+\-@|%\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")


def csv_line(task: TaskPublic) -> str:
    """One CSV row; before what a spreadsheet would execute stands an apostrophe. Ref: RFC 4180; OWASP CSV Injection."""
    row, line = task.model_dump(mode="json") | {"completed": str(task.completed).lower()}, io.StringIO()
    cells = (f"'{each}" if isinstance(each, str) and FORMULA.match(each) else each for each in row.values())
    csv.writer(line, quoting=csv.QUOTE_ALL).writerow(cells)
    return line.getvalue()


EXPORTS: dict[str, tuple[str, str, Callable[[TaskPublic], str]]] = {
    # Name: media type, head, line. A byte order mark is how spreadsheets know UTF-8.
    "jsonl": ("application/jsonl", "", lambda task: f"{task.model_dump_json()}\n"),
    "csv": ("text/csv; charset=utf-8", f"\ufeff{','.join(TaskPublic.model_fields)}\r\n", csv_line),
}


async def export_lines(owner_id: int, head: str, line: Callable[[TaskPublic], str]) -> AsyncIterator[str]:
    """Every task outside the trash, by id; one batch in memory at a time."""
    yield head
    last, more, mine = 0, True, (tasks.c.owner_id == owner_id) & tasks.c.deleted_at.is_(None)
    while more:
        rest = sa.select(*public_task).where(mine, tasks.c.id > last).order_by(tasks.c.id)
        batch, more = await database.read(functools.partial(some, statement=rest))
        yield "".join(map(line, batch))
        last = batch[-1].id if batch else last


@todo.get("/export", response_class=StreamingResponse)
async def export_tasks(user: CurrentUser, format: Literal["jsonl", "csv"] = "jsonl") -> StreamingResponse:
    """All tasks outside the trash: JSON Lines for an import elsewhere, or CSV for a spreadsheet."""
    media_type, head, line = EXPORTS[format]
    headers = {"Content-Disposition": f'attachment; filename="tasks.{format}"'}
    return StreamingResponse(export_lines(user.id, head, line), headers=headers, media_type=media_type)


MAX_IMPORT_LINES = 20_000
importers = ThreadPoolExecutor(1, "import")  # One at a time: each thread at work makes the event loop wait longer.


def raw_body(hint: str, schema: dict[str, Any], *media_types: str) -> dict[str, Any]:
    """For `openapi_extra`: a body that the route reads itself, of at most MAX_UPLOAD_MIB and one of these types."""
    content = {media_type: {"schema": schema} for media_type in media_types}
    return {"requestBody": {"required": True, "description": hint, "content": content}}


def imported_rows(body: bytes) -> list[dict[str, Any]]:
    """The columns of each line. Errors: 422 with every refused line by its number; 413 too many."""
    lines, rows, refused = body.removeprefix(codecs.BOM_UTF8).splitlines(), [], []
    if len(lines) > MAX_IMPORT_LINES:
        raise ApiError(413, "too_many_lines", f"An import has at most {MAX_IMPORT_LINES} lines; send several.")
    for number, line in enumerate(lines, 1):
        try:
            rows += [TaskImport.model_validate_json(line).values()] if line.strip() else []
        except ValidationError as error:
            refused += [(f"line {number}: {name}".removesuffix(": "), message) for name, message in complaints(error)]
    if refused:
        raise invalid(*refused[:MAX_IMPORT_LINES])
    return rows


HOW_TO_IMPORT = "JSON Lines: curl -H 'Content-Type: application/jsonl' --data-binary @tasks.jsonl"
JSON_LINES = raw_body(HOW_TO_IMPORT, {"type": "string"}, "application/jsonl", "application/x-ndjson")


@todo.post("/import", status_code=201, openapi_extra=JSON_LINES)
async def import_tasks(user: CurrentUser, request: Request) -> Imported:
    """Take what an export gave, one task a line, all or nothing; owner, ids and versions are new.

    Errors: 413; 422 refused lines by their number
    """
    rows = await in_thread(importers, imported_rows, await request.body())
    if rows:
        await changing(user.id, lambda transaction: transaction.create(*rows), still(user), count=len(rows))
    return Imported(imported=len(rows))


Since = Annotated[str, Query(pattern=r"^[0-9]{1,18}(~[0-9]{1,18})?$")]
Limit = Annotated[int, Query(ge=1, le=1000)]


@todo.get("/changes")
async def list_changes(user: CurrentUser, since: Since = "0", limit: Limit = BATCH) -> Changes:
    """Delta sync: what changed after `since`, trashed tasks included, oldest change first.

    Repeat with `next_since` while `has_more`, and then whenever you like. `since=0` is a full snapshot.

    Errors: 410 resync_required
    """
    # A snapshot of several pages passes seqs below purged_seq on its way up, and is not stale: its
    # cursors name the purge that it began after ("500~800"), and are good until the next one.
    position, _, known_purge = since.partition("~")
    marks = await changes_after(user.id, int(position), limit)
    if marks.stale(int(position), int(known_purge or 0)):
        raise resync_required()
    last = marks.tasks[-1].version if marks.has_more else marks.seq
    next_since = f"{last}~{marks.purged_seq}" if last < marks.purged_seq else last
    return Changes(data=marks.tasks, next_since=next_since, has_more=marks.has_more)


Cursor = Annotated[Seq | None, Query()]
LastId = Annotated[Seq | None, Header()]


async def event_stream(user: CurrentUser, since: Cursor = None, last_event_id: LastId = None) -> AsyncIterator[Stream]:
    """An open stream. Errors: 410, before the answer begins."""
    async with open_stream(user, since if last_event_id is None else last_event_id) as stream:
        if stream.stale:
            raise resync_required()
        yield stream


async def event_lines(stream: Stream) -> AsyncIterator[str]:
    """The stream as `text/event-stream`. Ref: HTML Living Standard §9.2.5."""
    # An id without data dispatches nothing, but from now on a browser knows where to resume.
    yield f": connected\nid: {stream.cursor}\n\n"
    async for seq, kind, text in stream.changes():
        yield f"event: {kind}\ndata: {text}\nid: {seq}\n\n" if text else ": nothing new\n\n"


@todo.get("/events", response_class=StreamingResponse)
async def stream_events(stream: Annotated[Stream, Depends(event_stream)]) -> StreamingResponse:
    """Server-Sent Events: `created`, `updated`, `deleted`, each with its seq as id. Try `curl -N`.

    `Last-Event-ID` or `since` resumes; without either it starts now. A comment comes every 15 s.

    Errors: 410 resync_required
    """
    unbuffered = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(event_lines(stream), headers=unbuffered, media_type="text/event-stream")


@todo.get("/statistics")
async def read_statistics(user: CurrentUser) -> Statistics:
    """Counts over the caller's tasks, the trash left out."""
    moment, column = now(), tasks.c
    terms = {name: column[kind] == name for kind, names in ORDER.items() for name in names}
    terms["total"] = sa.true()
    terms["overdue"] = ~column.completed & (column.due_date < moment)
    terms["due_in_7_days"] = ~column.completed & column.due_date.between(moment, moment + timedelta(days=7))
    counted = [sa.func.count().filter(term).label(name) for name, term in terms.items()]
    mine = (column.owner_id == user.id) & column.deleted_at.is_(None)
    days = [moment.date() - timedelta(days=back) for back in reversed(range(30))]
    recent = mine & (column.completed_at >= datetime.combine(days[0], datetime.min.time(), UTC))
    numbers, finished = sa.select(*counted).where(mine), sa.select(column.completed_at).where(recent)
    row, moments = await database.read(lambda db: (db.execute(numbers).one(), db.scalars(finished).all()))
    count, per_day = row._mapping, Counter(each.date() for each in moments)
    return Statistics(
        **{name: count[name] for name in ("total", "overdue", "due_in_7_days")},
        by_status={name: count[name] for name in ORDER["status"]},
        by_priority={name: count[name] for name in ORDER["priority"]},
        completion_rate=round(count["done"] / max(1, count["total"]), 4),
        completed_per_day=[{"date": day.isoformat(), "count": per_day[day]} for day in days],
    )


@todo.delete("/trash", status_code=204)
async def empty_trash(user: CurrentUser) -> None:
    """Delete the caller's trash for good, now."""
    await changing(user.id, lambda transaction: transaction.purge(now()))


@todo.get("/{task_id}")
async def read_task(task: OwnedTask, reply: Answering) -> TaskPublic:
    """One task. Errors: 304 unchanged; 404 absent or not yours."""
    reply.tag(f'"{task.version}"')
    return task


IfMatch = Annotated[str | None, Header()]


class TaskEdit:
    """A change of the caller's task, under If-Match."""

    def __init__(self, task_id: Id, user: CurrentUser, reply: Answering, if_match: IfMatch = None) -> None:
        self.task_id, self.user, self.reply, self.if_match = task_id, user, reply, if_match

    async def run(self, work: Callable[[Transaction, TaskPublic], T], trashed: bool = False) -> T:
        """Find, check, work. Errors: 404 absent, not yours or on the other side of the trash; 412 stale version."""

        def _edit(transaction: Transaction) -> T:
            before = find_task(transaction.db, self.task_id, self.user.id, trashed)
            if self.if_match is not None and not etag_matches(self.if_match, f'"{before.version}"'):
                raise ApiError(412, "version_mismatch", f'The task is at version "{before.version}" now.')
            return work(transaction, before)

        return await changing(self.user.id, _edit, still(self.user))

    async def save(self, values: dict[str, Any], trashed: bool = False) -> TaskPublic:
        """New values of the task. Errors: those of `run`."""
        task = await self.run(lambda transaction, before: transaction.update(before, values), trashed)
        self.reply.headers["ETag"] = f'"{task.version}"'
        return task


Edit = Annotated[TaskEdit, Depends()]


@todo.put("/{task_id}")
async def replace_task(edit: Edit, body: TaskCreate) -> TaskPublic:
    """Replace a task: what is absent goes back to its default.

    Errors: 404 absent or not yours; 412 stale version
    Ref: RFC 9110 §13.1.1
    """
    return await edit.save(TASK_DEFAULTS | body.values())


@todo.patch("/{task_id}")
async def update_task(edit: Edit, body: TaskUpdate) -> TaskPublic:
    """Merge into a task: what is absent stays, null clears.

    Errors: 404 absent or not yours; 412 stale version
    Ref: RFC 7396; RFC 9110 §13.1.1
    """
    return await edit.save(body.values())


@todo.delete("/{task_id}", status_code=204)
async def trash_task(edit: Edit) -> None:
    """Move a task to the trash. Errors: 404 absent or not yours; 412 stale version."""
    await edit.save({"deleted_at": now()})


@todo.post("/{task_id}/restore")
async def restore_task(edit: Edit) -> TaskPublic:
    """Take a task out of the trash. Errors: 404 absent, not yours or not in the trash; 412 stale version."""
    return await edit.save({"deleted_at": None}, trashed=True)


OFFICE = "application/vnd.openxmlformats-officedocument."
FILE_KINDS: dict[str, tuple[str, bytes, bytes]] = {
    # Extension: media type, a pattern for how the content begins (none: UTF-8 text), what is found within.
    "txt": ("text/plain", b"", b""),
    "md": ("text/markdown", b"", b""),
    "csv": ("text/csv", b"", b""),
    "pdf": ("application/pdf", b"%PDF-", b""),
    "png": ("image/png", b"\x89PNG\r\n\x1a\n", b""),
    "jpg": ("image/jpeg", b"\xff\xd8\xff", b""),
    "gif": ("image/gif", b"GIF8[79]a", b""),
    "webp": ("image/webp", b"(?s)RIFF....WEBP", b""),
    "doc": ("application/msword", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", b""),
    "docx": (f"{OFFICE}wordprocessingml.document", b"PK\x03\x04", b"word/"),
    "xlsx": (f"{OFFICE}spreadsheetml.sheet", b"PK\x03\x04", b"xl/"),
    "zip": ("application/zip", b"PK(\x03\x04|\x05\x06)", b""),
}


class Upload(MultiPartParser):
    """One file of a form, refused at the first byte that its name or its limit does not allow.

    Starlette keeps what is beyond 1 MiB in a temporary file, so that an upload on its way costs no more memory.
    """

    head, tail, size_bytes, whole = b"", b"", 0, False

    def on_headers_finished(self) -> None:
        """A part begins. Errors: 415 by its name; MultiPartException, no file."""
        super().on_headers_finished()
        name = getattr(self._current_part.file, "filename", "")
        self.filename = re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", "_", re.split(r"[/\\]", name)[-1])[-200:]
        kind = FILE_KINDS.get(self.filename.rpartition(".")[2].lower())
        if not name:
            raise MultiPartException("not a file")
        if kind is None:
            raise ApiError(415, "unsupported_file_type", f"Kept are files named {', '.join(FILE_KINDS)}.")
        self.media_type, self.begins, self.within = kind
        self.sha256, self.utf8 = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        """Some of the file. Errors: 413; 415."""
        super().on_part_data(data, start, end)
        self.size_bytes += end - start
        if self.size_bytes > settings.max_upload_mib * 2**20:
            raise ApiError(413, "body_too_large", f"The file is larger than {settings.max_upload_mib} MiB.")
        self.sha256.update(data[start:end])
        self.check(data[start:end])

    def on_part_end(self) -> None:
        """The end of the file. Errors: 415."""
        super().on_part_end()
        self.check(b"", final=True)
        self.whole = True

    def check(self, piece: bytes, final: bool = False) -> None:
        """The content is what the name says, as far as it is here. Errors: 415."""
        self.head = (self.head + piece)[:16]
        found, self.tail = self.within in self.tail + piece, (self.tail + piece)[-16:]
        self.within = b"" if found else self.within
        genuine = not self.begins or re.match(self.begins, self.head) or not (final or len(self.head) == 16)
        try:
            text = "" if self.begins else self.utf8.decode(piece, final)
        except UnicodeDecodeError:
            genuine, text = False, ""
        if not genuine or "\0" in text or (final and self.within):
            raise ApiError(415, "unsupported_file_type", "The content is not what the file's name says.")

    def content(self) -> bytes:
        """All of it."""
        return self._files_to_close_on_error[0].read()

    def close(self) -> None:
        """Remove what was kept."""
        for file in self._files_to_close_on_error:
            file.close()


async def uploaded_file(_task: OwnedTask, request: Request) -> AsyncIterator[Upload]:
    """The file, whole, for as long as the answer takes. Errors: 400; 404, before any of it is read; 413; 415."""
    with contextlib.closing(Upload(request.headers, request.stream(), max_files=1)) as upload:
        try:
            await upload.parse()
        except (MultiPartException, ValueError):
            upload.whole = False
        if not upload.whole:
            raise ApiError(400, "invalid_form", "The body is no form with one file: curl -F file=@NAME.")
        yield upload


A_FILE = {"type": "object", "required": ["file"], "properties": {"file": {"type": "string", "format": "binary"}}}
FORM_DATA = raw_body("a form with one file: curl -F file=@NAME", A_FILE, "multipart/form-data")


@todo.get("/{task_id}/attachments")
async def list_attachments(task: OwnedTask) -> Collection[AttachmentPublic]:
    """The files at a task, oldest first. Errors: 404 absent or not yours."""
    here = sa.select(*public_attachment).where(attachments.c.task_id == task.id).order_by(attachments.c.id)
    return Collection(data=[AttachmentPublic(**row._mapping) for row in await fetch(here)])


@todo.post("/{task_id}/attachments", status_code=201, openapi_extra=FORM_DATA)
async def attach_file(upload: Annotated[Upload, Depends(uploaded_file)], edit: Edit) -> AttachmentPublic:
    """Keep a file at a task, which gets its next version. Named by its last path segment; 5 MiB at most.

    Errors: 404 absent or not yours; 412 stale version; 413 body_too_large, storage_full; 415 unsupported_file_type
    """
    values = {"filename": upload.filename, "content_type": upload.media_type, "size_bytes": upload.size_bytes}
    values |= {"task_id": edit.task_id, "sha256": upload.sha256.hexdigest(), "created_at": now()}
    sizes = sa.select(sa.func.sum(attachments.c.size_bytes)).join(tasks).where(tasks.c.owner_id == edit.user.id)

    def _attach(transaction: Transaction, before: TaskPublic) -> AttachmentPublic:
        if (transaction.db.scalar(sizes) or 0) + upload.size_bytes > settings.max_storage_mib * 2**20:
            raise ApiError(413, "storage_full", f"All your attachments may have {settings.max_storage_mib} MiB.")
        transaction.update(before, {"attachments": before.attachments + 1})
        kept = sa.insert(attachments).values(**values, content=upload.content()).returning(*public_attachment)
        return AttachmentPublic(**transaction.db.execute(kept).one()._mapping)

    attachment = await edit.run(_attach)
    edit.reply.headers["Location"] = f"{edit.reply.prefix}{API}/attachments/{attachment.id}"
    return attachment


files = router(prefix=f"{API}/attachments", tags=["attachments"])


def find_attachment(db: sa.Connection, attachment_id: int, owner_id: int) -> AttachmentPublic:
    """A file at a task of one owner that is not in the trash. Errors: 404."""
    mine = sa.select(*public_attachment).join(tasks).where(tasks.c.owner_id == owner_id, tasks.c.deleted_at.is_(None))
    return find(db, AttachmentPublic, mine.where(attachments.c.id == attachment_id), "attachment", attachment_id)


@files.get("/{attachment_id}", response_class=Response)
async def download_attachment(attachment_id: Id, user: CurrentUser, reply: Answering) -> Response:
    """The file, as a download. Errors: 304 unchanged; 404 absent or not yours. Ref: RFC 6266."""
    attachment = await database.read(lambda db: find_attachment(db, attachment_id, user.id))
    reply.tag(f'"{attachment.sha256}"')
    plain, exact = re.sub(r"[^A-Za-z0-9 ._-]", "_", attachment.filename), quote(attachment.filename, safe="")
    headers = {"Content-Disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{exact}"}
    whole = sa.select(attachments.c.content).where(attachments.c.id == attachment_id)
    content = await database.read(lambda db: find_attachment(db, attachment_id, user.id) and db.scalar(whole))
    return Response(content, headers=headers | {"ETag": reply.headers["ETag"]}, media_type=attachment.content_type)


@files.delete("/{attachment_id}", status_code=204)
async def delete_attachment(attachment_id: Id, user: CurrentUser) -> None:
    """Delete a file for good; its task gets its next version. Errors: 404 absent or not yours."""

    def _detach(transaction: Transaction) -> None:
        attachment = find_attachment(transaction.db, attachment_id, user.id)
        task = find_task(transaction.db, attachment.task_id, user.id)
        transaction.db.execute(sa.delete(attachments).where(attachments.c.id == attachment_id))
        transaction.update(task, {"attachments": task.attachments - 1})

    await changing(user.id, _detach, still(user))


live = APIRouter()
HELLO_SECONDS = 5.0
ClientId = Annotated[str, params.Path(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class Hello(Body):
    """The first frame of a socket that sent no Authorization header."""

    token: Text
    since: Seq | None = None


CLOSE_CODES: dict[type[Exception], tuple[int, str]] = {
    TimeoutError: (4401, "no token came in time"),
    ValidationError: (1003, 'the first frame is {"token": "…", "since": 17}'),
    KeyError: (1003, "frames are text"),
    ValueError: (1007, "frames are JSON"),
    RecursionError: (1007, "frames are JSON"),
    SlowClient: (1013, "the client did not read"),
}
SOCKET_ERRORS: tuple[type[Exception], ...] = (ApiError, *CLOSE_CODES)


def close_code(error: Exception) -> tuple[int, str]:
    """Why a socket ends. Ref: RFC 6455 §7.4."""
    if isinstance(error, ApiError):
        return (1013 if error.status_code == 429 else 4401), error.detail
    return next(CLOSE_CODES[kind] for kind in type(error).__mro__ if kind in CLOSE_CODES)


async def meet(socket: WebSocket, since: int | None) -> tuple[Row, int | None]:
    """Who is there and where to resume: by header, or by a first frame within 5 s. Errors: SOCKET_ERRORS."""
    header = socket.headers.get("authorization")
    async with asyncio.timeout(HELLO_SECONDS):
        hello = None if header else Hello.model_validate(await socket.receive_json())
    user = socket.state.user = await authenticate(f"Bearer {hello.token}" if hello else header)
    enforce(socket.scope, {"read": bucket_key(socket.scope, user)})
    if user is None:
        raise unauthorized()
    return user, hello.since if hello else since


async def watch_peer(socket: WebSocket, stream: Stream) -> None:
    """After the first frame a client has nothing to say: JSON is ignored, anything else ends the stream."""
    try:
        async for _ in socket.iter_json():
            pass
        stream.close(1000, "")
    except SOCKET_ERRORS as error:
        stream.close(*close_code(error))


async def talk(socket: WebSocket, client_id: str, since: int | None) -> tuple[int, str]:
    """Hello, then every change; returns why it ended. Errors: SOCKET_ERRORS."""
    user, since = await meet(socket, since)
    async with open_stream(user, since, client_id) as stream:
        peer = asyncio.create_task(watch_peer(socket, stream))
        await socket.send_text(f'{{"type":"hello","seq":{stream.cursor}}}')
        async for change in stream.changes():
            if change.text:
                await socket.send_text(change.text)
        peer.cancel()
        return stream.closing


@live.websocket("/ws/tasks/{client_id}")
async def watch_tasks(socket: WebSocket, client_id: ClientId, since: Cursor = None) -> None:
    """Live updates over a WebSocket; the README has the protocol. Ref: RFC 6455."""
    socket.state.route = "/ws/tasks/{client_id}"
    await socket.accept()
    try:
        end = await talk(socket, client_id, since)
    except SOCKET_ERRORS as error:
        end = close_code(error)
    await socket.close(*end)


admin = router(prefix=f"{API}/admin", tags=["admin"])
AdminFilters = Annotated[AdminTaskQuery, Query()]


@admin.get("/users")
async def list_users(_admin: AdminUser, query: Annotated[PageQuery, Query()], reply: Answering) -> Page[UserPublic]:
    """Every account, oldest first. Errors: 403 admin_required."""
    return await reply.page(query, UserPublic, sa.select(users).order_by(users.c.id))


@admin.post("/users", status_code=201)
async def create_user(admin: AdminUser, body: AdminUserCreate, reply: Answering) -> UserPublic:
    """Create an account. Errors: 403 admin_required; 409 username_taken."""
    columns = await in_thread(password_workers, new_user, body.username, body.password, body.role, body.email)
    user = await write_as(admin, lambda db: add_user(db, columns))
    reply.headers["Location"] = f"{reply.path}/{user.id}"
    return user


@admin.get("/users/{user_id}")
async def read_user(user_id: Id, _admin: AdminUser) -> UserPublic:
    """One account. Errors: 403 admin_required; 404 absent."""
    return await database.read(lambda db: find(db, UserPublic, sa.select(users).filter_by(id=user_id), "user", user_id))


@admin.patch("/users/{user_id}")
async def update_user(user_id: Id, admin: AdminUser, body: AdminUserUpdate) -> UserPublic:
    """Change role, `is_active` or password; disabling and a new password end the account's sessions and API tokens.

    Errors: 403 admin_required; 404 absent; 409 last_admin
    """
    values = body.model_dump()
    if password := values.pop("password", None):
        values["password_hash"] = await in_thread(password_workers, hash_password, password)
    return await write_as(admin, lambda db: change_user(db, user_id, values))


@admin.delete("/users/{user_id}", status_code=204)
async def delete_user(user_id: Id, admin: AdminUser) -> None:
    """Delete an account with everything in it. Errors: 403 admin_required; 404 absent; 409 last_admin."""
    await write_as(admin, lambda db: change_user(db, user_id, None))


@admin.post("/cleanup", status_code=202, response_class=Response)
async def start_cleanup(_admin: AdminUser, reply: Answering) -> Response:
    """Remove now what has expired. The result stands in /health/detailed. Errors: 403 admin_required."""
    return Response(None, 202, {"Location": f"{reply.prefix}/health/detailed"}, background=BackgroundTask(clean_up))


@admin.post("/webhook_test")
async def call_webhook(_admin: AdminUser) -> WebhookTest:
    """Call the webhook now, once. Errors: 403 admin_required; 409 webhook_off."""
    if not settings.webhook_url:
        raise ApiError(409, "webhook_off", "WEBHOOK_URL is not set.")
    began, result = time.perf_counter(), dict[str, Any]()
    try:
        result["status"] = await outbox.post('{"type":"test"}', f"msg_{secrets.token_hex(12)}")
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    return WebhookTest(milliseconds=round((time.perf_counter() - began) * 1000, 1), **result)


async def backup_copy(_admin: AdminUser) -> AsyncIterator[Path]:
    """A copy of the database that is gone after the answer. Errors: 403 admin_required."""
    with tempfile.TemporaryDirectory(prefix=".copy-", dir=settings.data_dir) as directory:
        await asyncio.to_thread(copy_database, database.path, copy := Path(directory, "tasks.db"))
        yield copy


@admin.get("/backup", response_class=FileResponse)
async def download_backup(copy: Annotated[Path, Depends(backup_copy)]) -> FileResponse:
    """The whole database at one moment, as a SQLite file for `python app.py restore`. Errors: 403 admin_required."""
    name, whole = f"tasks-{now():%Y%m%dT%H%M%SZ}.db", {"Accept-Ranges": "none"}
    return FileResponse(copy, headers=whole, media_type="application/vnd.sqlite3", filename=name)


@admin.get("/tasks")
async def list_all_tasks(_admin: AdminUser, query: AdminFilters, reply: Answering) -> Page[TaskPublic]:
    """Every owner's tasks, with the filters of GET /tasks and `owner_id`. Errors: 403 admin_required."""
    owner = [tasks.c.owner_id == query.owner_id] if query.owner_id else []
    return await reply.page(query, TaskPublic, filtered(query).where(*owner))


health = router(tags=["health"])


@health.get("/health", openapi_extra={"x-rate-limit": "none"})
async def read_health() -> Health:
    """Alive, and the database answers. Errors: 503 database_unavailable."""
    await fetch(sa.select(users.c.id).limit(1))
    return Health()


@health.get("/health/detailed", openapi_extra={"x-rate-limit": "none"})
async def read_health_detailed() -> HealthDetailed:
    """The same, with figures. Errors: 503 database_unavailable."""
    began = time.perf_counter()
    await read_health()
    figures: Any = {"engine": "sqlite", "latency_ms": round((time.perf_counter() - began) * 1000, 2)}
    values: Any = {"uptime_seconds": int(time.monotonic() - started_at), "last_cleanup": last_cleanup}
    return HealthDetailed(version=VERSION, database=figures, live_connections=len(all_streams()), **values)


@health.get("/metrics", response_class=Response, openapi_extra={"x-rate-limit": "none"})
async def read_metrics(request: Request, _token: Annotated[str | None, Depends(oauth2)]) -> Response:
    """Figures for Prometheus, for an admin unless METRICS says otherwise. Errors: 403 admin_required; 404 off."""
    if settings.metrics == "off":
        raise ApiError(404, "not_found", "METRICS is off.")
    if settings.metrics == "admin":
        await admin_user(await current_user(request, None))
    return Response(prometheus_client.generate_latest(), media_type=prometheus_client.CONTENT_TYPE_LATEST)


for resource in (auth, account, todo, files, live, admin, health):
    app.include_router(resource)

# ── 12 Command line ─────────────────────────────────────────────────────────────────────────────
# Commands work beside a running server: the database's own locks are all that they need, and the
# server notices within POLL_SECONDS. Only restore needs it stopped.

RESTORE_LEAP = 2**20


def serve(reload: bool) -> None:
    """Check the data, listen, say where, and serve until Ctrl-C or SIGTERM. Errors: SystemExit."""
    logging.getLogger("uvicorn").setLevel("WARNING")
    quiet = {"log_config": None, "access_log": False, "proxy_headers": False, "server_header": False}
    bounds = {"ws_max_size": 64 * 1024, "ws_per_message_deflate": False, "timeout_graceful_shutdown": 5}
    options: Any = {"host": settings.host, "port": settings.port} | quiet | bounds
    print(f"Onefile Tasks {VERSION}", flush=True)  # noqa: T201
    open_database()
    database.close()
    config = uvicorn.Config(app, **options)
    try:
        listener = None if reload else config.bind_socket()
    except SystemExit:
        raise SystemExit(f"HOST, PORT: cannot listen on {settings.host}, port {settings.port}") from None
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{host}:{listener.getsockname()[1] if listener else settings.port}{settings.root_path}"
    print(f"  Listening  {address}   (Ctrl-C ends it)\n  Docs       {address}/docs", flush=True)  # noqa: T201
    with contextlib.suppress(KeyboardInterrupt):
        if listener:
            return uvicorn.Server(config).run(sockets=[listener])
        return uvicorn.run("app:app", reload=True, app_dir=str(Path(__file__).parent), **options)


def let_go(path: Path) -> int:
    """Take the WAL into a database that nobody has open. Returns its highest seq, 0 if damaged. Errors: SystemExit."""
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=0)) as there:
            there.execute("PRAGMA journal_mode=DELETE")
            return there.execute("SELECT max(CAST(seq AS INTEGER)) FROM users").fetchone()[0] or 0
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # The rest tells kinds of the same.
        if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR):
            return 0
        busy = "a server has the database open; stop it first"
        raise SystemExit(f"restore: {busy if code == sqlite3.SQLITE_BUSY else error}") from None


def restore(backup: Path) -> str:
    """Put a backup in the place of the database; returns where that is kept. Errors: SystemExit; see `main`.

    Every seq leaps ahead of all that was ever handed out, so that who saw a later past synchronises anew.
    """
    path = database.path.resolve()  # Behind a link, if it is one.
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".copy-", dir=path.parent) as directory:
        copy_database(backup, copy := Path(directory, "tasks.db"))
        leap = RESTORE_LEAP * (1 + (let_go(path) if path.exists() and path.stat().st_size else 0) // RESTORE_LEAP)
        engine = sqlite_engine(copy, "BEGIN", 1)
        with engine.begin() as db:
            if "users" not in sa.inspect(db).get_table_names():
                raise SystemExit("restore: FILE is no backup of this program")
            upgrade(db, lambda: backup)
            db.execute(sa.update(users).values(seq=users.c.seq + leap, purged_seq=users.c.seq + leap))
        engine.dispose()
        kept = path.with_name(f"tasks-{now():%Y%m%dT%H%M%S%f}.db")
        if path.exists():
            shutil.copy(path, kept)
        for suffix in ("-wal", "-shm"):  # Of a damaged or a removed database; they would damage this one.
            if (companion := Path(f"{path}{suffix}")).exists():
                companion.replace(f"{kept}{suffix}")
        copy.replace(path)
    return f"Done. The database before is kept in {kept}" if kept.exists() else "Done."


def account_command(command: str, name: str, rights: str) -> str:
    """create-user, reset-password, token; `rights` are a role or a scope. Returns what to say. Errors: SystemExit."""
    typed, shown = "", ""
    if command != "token":
        ask = "Password (empty: generated): "
        typed = getpass.getpass(ask) if sys.stdin.isatty() else sys.stdin.readline().strip("\n")
        shown = "" if typed else new_token()
        valid_or_exit(lambda: a_password.validate_python(typed or shown), "password")
    name = valid_or_exit(lambda: a_username.validate_python(name), "name")
    columns = new_user(name, typed or shown, rights) if command != "token" else {"username_key": folded(name)}
    with database.write_engine.begin() as db:
        known = db.scalar(sa.select(users.c.id).where(users.c.username_key == columns["username_key"]))
        if bool(known) == (command == "create-user"):  # A new account needs a free name, the rest a known one.
            raise SystemExit(f"name: {name} {'is taken' if known else 'does not exist'}")
        if command == "create-user":
            db.execute(sa.insert(users).values(columns))
        elif command == "reset-password":
            change_user(db, known or 0, {"password_hash": columns["password_hash"]})
        else:
            return new_api_token(db, known or 0, "command line", rights).token
    return f"Done. The password is {shown}" if shown else "Done."


COMMANDS = {
    "create-user": ("NAME", "make an account; the password is asked for, or read from standard input"),
    "reset-password": ("NAME", "give an account a new password, and end its sessions and API tokens"),
    "token": ("NAME", "make an API token for an account, and print it"),
    "backup": ("FILE", "copy the database into a new file"),
    "restore": ("FILE", "put a backup in the database's place; only while no server runs"),
    "cleanup": ("", "remove what has expired, now"),
}


def run(arguments: argparse.Namespace) -> str:
    """One command; returns what to say at the end. Errors: SystemExit; see `main`."""
    if arguments.command == "restore":
        return restore(arguments.what)
    if arguments.command == "backup":
        copy_database(database.path, arguments.what)
        return "Done."
    open_database()
    with contextlib.closing(database):
        if arguments.command != "cleanup":
            return account_command(arguments.command, arguments.what, arguments.rights)
        asyncio.run(clean_up())
        return json.dumps(last_cleanup, default=str)


def main() -> None:
    """Parse the command line and do as it says."""
    parser = argparse.ArgumentParser(prog="app.py", description="Onefile Tasks. Without a command, it serves.")
    parser.add_argument("--reload", action="store_true", help="start again whenever app.py changes")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (what, text) in COMMANDS.items():
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(rights="write" if name == "token" else "user")
        if what:
            one.add_argument("what", metavar=what, type=Path if what == "FILE" else str)
        if name == "create-user":
            one.add_argument("--admin", dest="rights", action="store_const", const="admin", help="with the role admin")
        if name == "token":
            one.add_argument("--scope", dest="rights", choices=["read", "write"], help="default: write")
    arguments = parser.parse_args()
    if arguments.command is None:
        return serve(arguments.reload)
    try:
        print(run(arguments))  # noqa: T201
    except (OSError, sqlite3.Error, sa.exc.DatabaseError) as error:
        raise SystemExit(f"{arguments.command}: {reason(error)}") from None


if __name__ == "__mp_main__":  # A child of --reload has run this file already: let it not define the tables again.
    sys.modules["app"] = sys.modules["__mp_main__"]
if __name__ == "__main__":
    main()

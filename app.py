"""Onefile Tasks: a complete task-manager API in one Python file.

Run    python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python app.py
Then   open http://127.0.0.1:8000/docs, or follow the README with curl.

Sections
   1  Settings             every knob, read from the environment and .env, checked at start
   2  Errors               one shape for every error, raised through small factories
   3  Database             SQLite: readers that cannot write, one writer, durable commits
   4  Tables               users, sessions, refresh tokens, tasks
   5  Schemas              what comes in and what goes out
   6  Passwords and tokens pure functions: bcrypt, JWT, opaque tokens
   7  Dependencies         who asks, which task, under which conditions
   8  Rate limits          SlowAPI's moving windows, counted before a body is read
   9  Live updates         the one number per user, and the streams that follow it
  10  Application          lifespan, the outermost ASGI layer, error handlers
  11  Routes               auth, users, tasks, live, admin, health
  12  Command line         serve, create-user, reset-password

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
#   "aiosqlite==0.22.1",
#   "bcrypt==5.0.0",
#   "fastapi==0.163.2",
#   "fastapi-offline==1.7.7",
#   "httptools==0.9.0",
#   "httpx==0.28.1",
#   "limits==5.8.0",
#   "pydantic==2.14.3",
#   "pydantic-settings==2.16.3",
#   "pyjwt==2.15.1",
#   "pytest==9.2.0",
#   "python-multipart==0.0.34",
#   "slowapi==0.1.10",
#   "sqlalchemy[asyncio]==2.1.9",
#   "sqlmodel==0.0.50",
#   "starlette==1.10.0",
#   "uvicorn==0.54.0",
#   "uvloop==0.23.0; sys_platform != 'win32'",
#   "websockets==17.4",
# ]
# ///

import argparse
import asyncio
import base64
import contextlib
import functools
import getpass
import hashlib
import ipaddress
import itertools
import json
import logging
import os
import re
import secrets
import sys
import time
import unicodedata
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from math import ceil
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Generic, Literal, NamedTuple, Self, TypeVar
from urllib.parse import quote, urlencode

import bcrypt
import jwt
import sqlalchemy as sa
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Query, Request, Response, WebSocket, params
from fastapi import Path as InPath
from fastapi.dependencies.utils import get_flat_params
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute, iter_route_contexts
from fastapi.security import OAuth2PasswordBearer, OAuth2PasswordRequestForm
from fastapi.sse import EventSourceResponse, ServerSentEvent
from fastapi_offline import FastAPIOffline
from limits import RateLimitItem
from limits import parse as parse_limit
from pydantic import (
    MISSING,
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict
from slowapi import Limiter
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.ext.compiler import compiles
from sqlmodel import Field as Column
from sqlmodel import SQLModel
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

VERSION = "1.0.0"
API = "/api/v1"
MAX_ID = 2**63 - 1
"""SQLite and PostgreSQL integers end here; one more is an OverflowError in the driver."""

log = logging.getLogger("onefile_tasks")

# ── 1 Settings ──────────────────────────────────────────────────────────────────────────────────
# Twelve-factor: the environment decides, a .env file is the same thing on disk. A wrong value stops
# the start with one line that names the variable, because a server that guesses is found out later.

PLACEHOLDER_SECRET = re.compile(r"change.?(me|this|it)|your.?secret|secret.?key|placeholder|example|insecure", re.I)


def rate_limit(text: str) -> RateLimitItem:
    """Parse `5/minute`. Errors: ValueError."""
    return parse_limit(text)


RateLimit = Annotated[RateLimitItem, BeforeValidator(rate_limit)]


class Settings(BaseSettings):
    """Every knob, with its default. Meanings, units and consequences stand in .env.example."""

    model_config = SettingsConfigDict(
        env_file=".env", env_ignore_empty=True, extra="ignore", arbitrary_types_allowed=True, validate_default=True
    )

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    root_path: str = Field("", pattern=r"^(/[^/?#\s]+)*$")
    data_dir: Path = Path("data")
    secret_key: SecretStr = SecretStr("")
    admin_username: str = "admin"
    admin_password: SecretStr = SecretStr("")
    registration: Literal["open", "closed"] = "open"
    access_token_minutes: int = Field(15, ge=1, le=1440)
    refresh_token_days: int = Field(30, ge=1, le=180)
    trash_days: int = Field(30, ge=0, le=36500)
    rate_limits: Literal["on", "off"] = "on"
    rate_limit_register: RateLimit = "3/minute"  # type: ignore[assignment]
    rate_limit_login: RateLimit = "5/minute"  # type: ignore[assignment]
    rate_limit_account: RateLimit = "100/hour"  # type: ignore[assignment]
    rate_limit_refresh: RateLimit = "10/minute"  # type: ignore[assignment]
    rate_limit_read: RateLimit = "600/minute"  # type: ignore[assignment]
    rate_limit_write: RateLimit = "300/minute"  # type: ignore[assignment]
    max_body_kib: int = Field(64, ge=1, le=65536)
    trusted_proxies: str = ""
    docs: Literal["on", "off"] = "on"
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("secret_key")
    @classmethod
    def strong_secret(cls, value: SecretStr) -> SecretStr:
        """Refuse a key that a stranger could guess: whoever knows it is every user. Ref: RFC 7518 §3.2."""
        key = value.get_secret_value()
        if key and (len(key.encode()) < 32 or PLACEHOLDER_SECRET.search(key) or len(set(key)) < 8):
            raise ValueError("must be 32 random bytes or more; leave it empty to have one generated")
        return value


def load_settings() -> Settings:
    """Read the settings. Errors: SystemExit with one line that names the variable, never its value."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise SystemExit(f"{str(first['loc'][0]).upper()}: {first['msg'].removeprefix('Value error, ')}") from None


settings = load_settings()


def now() -> datetime:
    """The one clock, in UTC. Tests set it by hand."""
    return datetime.now(UTC)


# ── 2 Errors ────────────────────────────────────────────────────────────────────────────────────
# One envelope for every error, whoever noticed it. Small factories, so that a route shows the raise.
# Messages never repeat what a body, a query or a header said: it may be a password or a script.


class ApiError(HTTPException):
    """An error that a client will see: status, stable code, message, headers, details by field."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        headers: dict[str, str] | None = None,
        details: list[dict[str, str]] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.code, self.details = code, details


def error_response(error: ApiError, request_id: str) -> Response:
    """The envelope of section 2, or a bare 304, which by RFC 9110 has no body."""
    if error.status_code == 304:
        return Response(status_code=304, headers=error.headers)
    body: dict[str, Any] = {"code": error.code, "message": error.detail, "request_id": request_id}
    if error.details is not None:
        body["details"] = error.details
    return JSONResponse({"error": body}, error.status_code, error.headers)


def not_found(kind: str, key: int) -> ApiError:
    """404, the same for absent and for somebody else's, so that ids tell nothing."""
    return ApiError(404, f"{kind}_not_found", f"No {kind} {key}.")


def not_authenticated(message: str = "Send a valid access token: Authorization: Bearer …") -> ApiError:
    """401. Ref: RFC 6750 §3."""
    return ApiError(401, "not_authenticated", message, {"WWW-Authenticate": "Bearer"})


def invalid_credentials() -> ApiError:
    """401, the same for an unknown user and for a wrong password."""
    return ApiError(401, "invalid_credentials", "Wrong username or password.", {"WWW-Authenticate": "Bearer"})


def invalid(field_name: str, message: str) -> ApiError:
    """422 for one field."""
    return ApiError(
        422, "validation_failed", f"{field_name}: {message}", details=[{"field": field_name, "message": message}]
    )


def not_modified(etag: str) -> ApiError:
    """304: the caller has it already. Ref: RFC 9110 §15.4.5."""
    return ApiError(304, "not_modified", "Not modified.", {"ETag": etag})


def resync_required() -> ApiError:
    """410: changes after this cursor are gone, or it comes from another past."""
    return ApiError(410, "resync_required", "This cursor is stale. Start again with since=0.")


def too_large(max_bytes: int) -> ApiError:
    """413. Ref: RFC 9110 §15.5.14."""
    return ApiError(413, "body_too_large", f"The body is larger than {max_bytes:,} bytes.")


# ── 3 Database ──────────────────────────────────────────────────────────────────────────────────
# SQLite has one writer at a time. So has this program: one connection, whose transactions start with
# BEGIN IMMEDIATE, so that they wait their turn instead of failing in the middle. Readers are a pool
# beside it (WAL lets them go on while somebody writes) and cannot write at all.

READERS = 4
BUSY_SECONDS = 10


@compiles(sa.BigInteger, "sqlite")
def sqlite_integer(_element: sa.BigInteger, _compiler: object, **_options: object) -> str:
    """SQLite's INTEGER has 64 bits, and AUTOINCREMENT accepts no other name for it."""
    return "INTEGER"


def sqlite_engine(path: Path, begin: str, pragma: str, pool_size: int) -> AsyncEngine:
    """An engine on one file. Each transaction starts with `begin`, each connection with `pragma`."""
    engine = create_async_engine(
        sa.URL.create("sqlite+aiosqlite", database=str(path)),
        connect_args={"isolation_level": None, "timeout": BUSY_SECONDS},
        pool_size=pool_size,
        max_overflow=0,
    )

    @sa.event.listens_for(engine.sync_engine, "connect")
    def configure(connection: Any, _record: object) -> None:
        # FULL: an acknowledged write survives a power cut, not only a crash of this process.
        cursor = connection.cursor()
        for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", pragma):
            cursor.execute(f"PRAGMA {setting}")
        cursor.close()

    @sa.event.listens_for(engine.sync_engine, "begin")
    def start(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


class Database:
    """The open database: `read()` for a consistent snapshot, `write()` for a durable transaction."""

    def open(self, directory: Path) -> None:
        """Open or create `tasks.db` in `directory`, readable by its owner alone. Errors: OSError."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = directory / "tasks.db"
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        self.writer = sqlite_engine(path, "BEGIN IMMEDIATE", "wal_autocheckpoint=1000", 1)
        self.reader = sqlite_engine(path, "BEGIN", "query_only=ON", READERS)

    async def close(self) -> None:
        """Close every connection."""
        await self.reader.dispose()
        await self.writer.dispose()

    def read(self) -> contextlib.AbstractAsyncContextManager[AsyncConnection]:
        """A snapshot: everything read inside is of one moment."""
        return self.reader.connect()

    def write(self) -> contextlib.AbstractAsyncContextManager[AsyncConnection]:
        """A transaction: committed when the block ends, before any answer leaves, or rolled back."""
        return self.writer.begin()


database = Database()
T = TypeVar("T")
unfinished: set[asyncio.Task[Any]] = set()


def shielded(work: Coroutine[Any, Any, T]) -> Awaitable[T]:
    """Run to the end even if the caller is cancelled: a connection torn from a transaction stays locked."""
    task = asyncio.get_running_loop().create_task(work)
    unfinished.add(task)
    task.add_done_callback(unfinished.discard)
    return asyncio.shield(task)


# ── 4 Tables ────────────────────────────────────────────────────────────────────────────────────
# SQLModel declares them; the queries below speak SQLAlchemy Core, because one UPDATE … RETURNING is
# atomic where load-change-save is a race. AUTOINCREMENT: a purged id is never handed out again.

Status = Literal["todo", "in_progress", "done"]
Priority = Literal["low", "medium", "high"]


def primary_key() -> Any:
    """A 64-bit id."""
    return Column(default=None, primary_key=True, sa_type=sa.BigInteger)


def parent(column: str, **options: Any) -> Any:
    """A 64-bit foreign key; the row goes when its parent goes."""
    return Column(foreign_key=column, ondelete="CASCADE", sa_type=sa.BigInteger, **options)


class User(SQLModel, table=True):
    """An account. `seq` is the number that section 9 is about."""

    __tablename__ = "users"
    __table_args__ = ({"sqlite_autoincrement": True},)
    id: int = primary_key()
    username: str
    username_key: str = Column(unique=True)
    email: str | None
    password_hash: str
    role: str
    is_active: bool = True
    seq: int = Column(0, sa_type=sa.BigInteger)
    purged_seq: int = Column(0, sa_type=sa.BigInteger)
    created_at: datetime


class Session(SQLModel, table=True):
    """A login. Deleting the row kills every token of it, access tokens included."""

    __tablename__ = "sessions"
    __table_args__ = ({"sqlite_autoincrement": True},)
    id: int = primary_key()
    user_id: int = parent("users.id", index=True)
    address: str
    user_agent: str
    created_at: datetime
    last_used_at: datetime
    expires_at: datetime


class RefreshToken(SQLModel, table=True):
    """A refresh token, as a hash. A used one is kept, to notice a replay."""

    __tablename__ = "refresh_tokens"
    __table_args__ = ({"sqlite_autoincrement": True},)
    id: int = primary_key()
    session_id: int = parent("sessions.id", index=True)
    token_hash: str = Column(unique=True)
    used_at: datetime | None = None
    expires_at: datetime


class Task(SQLModel, table=True):
    """A task, or its tombstone when `deleted_at` is set."""

    __tablename__ = "tasks"
    __table_args__ = (
        sa.Index("ix_tasks_changes", "owner_id", "seq", unique=True),
        sa.Index("ix_tasks_newest", "owner_id", "deleted_at", "created_at", "id"),
        {"sqlite_autoincrement": True},
    )
    id: int = primary_key()
    owner_id: int = parent("users.id")
    seq: int = Column(sa_type=sa.BigInteger)
    title: str
    description: str | None = None
    status: str
    priority: str
    due_date: datetime | None = None
    attachments: int = 0
    search_text: str
    created_at: datetime
    updated_at: datetime
    completed_at: datetime | None = None
    deleted_at: datetime | None = None


users, sessions, refresh_tokens, tasks = (
    SQLModel.metadata.tables[name] for name in ("users", "sessions", "refresh_tokens", "tasks")
)

# ── 5 Schemas ───────────────────────────────────────────────────────────────────────────────────
# What comes in is strict: unknown fields are refused, "1" is no number and 1 is no date. What goes out
# is listed here and nowhere else, so that a password hash cannot slip into an answer.

TIME_MESSAGE = "must be RFC 3339, like 2026-11-20T17:00:00Z or 2026-11-20 (in a query write + as %2B)"
RFC3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(?::(\d\d(?:\.\d{1,9})?))?(Z|[+-]\d\d:\d\d)?)?", re.I | re.ASCII
)


def storable(text: str) -> str:
    """Refuse what no database or UTF-8 encoder takes. Errors: ValueError."""
    if "\x00" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("must not contain NUL or lone surrogates")
    return text


def parse_time(value: object) -> datetime:
    """RFC 3339 to UTC; a naive time is UTC, a bare date its last second. Errors: ValueError."""
    if not isinstance(value, str) or not RFC3339.fullmatch(value):
        raise ValueError(TIME_MESSAGE)
    moment = datetime.fromisoformat(value.upper() if len(value) > 10 else f"{value}T23:59:59Z")
    try:
        return moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)
    except OverflowError:
        raise ValueError("must lie between the years 1 and 9999") from None


def username(text: str) -> str:
    """NFKC, then 3–50 letters and digits of any script, `.`, `_`, `-`. Errors: ValueError."""
    name = unicodedata.normalize("NFKC", text)
    if not re.fullmatch(r"[\w.-]{3,50}", name):
        raise ValueError("must be 3 to 50 letters, digits, '.', '_' or '-'")
    return name


def folded(text: str) -> str:
    """How names and searches are compared: no case, one normal form, any script."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


COMMON_PASSWORDS = frozenset("password 12345678".split())


def uncommon(password: str) -> str:
    """Refuse what an attacker tries first; no composition rules. Ref: NIST SP 800-63B §3.1.1.2. Errors: ValueError."""
    if password.casefold() in COMMON_PASSWORDS or len(set(password)) < 4:
        raise ValueError("is among the commonest; choose a longer or stranger one")
    return password


Text = Annotated[str, AfterValidator(storable)]
Time = Annotated[datetime, BeforeValidator(parse_time, json_schema_input_type=str)]
Title = Annotated[Text, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
Description = Annotated[Text, StringConstraints(max_length=10_000)]
Username = Annotated[Text, AfterValidator(username)]
Password = Annotated[Text, StringConstraints(min_length=8, max_length=256), AfterValidator(uncommon)]
Email = Annotated[Text, StringConstraints(max_length=254, pattern=r"^[^@\s]+@[^@\s]+$")]
Number = Annotated[int, Field(ge=0, le=MAX_ID)]


class Body(BaseModel):
    """The base of every request body: strict, and an unknown field is an error that names the known ones."""

    model_config = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def only_known_fields(cls, data: Any) -> Any:
        """Name what is known, not what was sent."""
        if isinstance(data, dict) and not data.keys() <= cls.model_fields.keys():
            raise ValueError(f"has an unknown field; known are {', '.join(cls.model_fields)}")
        return data


class Answer(BaseModel):
    """The base of every answer."""

    model_config = ConfigDict(use_attribute_docstrings=True)


Item = TypeVar("Item", bound=BaseModel)


class Collection(Answer, Generic[Item]):
    """A collection that is never paged."""

    data: list[Item]


class PageMeta(Answer):
    """Where this page stands."""

    page: int
    page_size: int
    total: int
    """Items on all pages."""
    pages: int


class Page(Collection[Item], Generic[Item]):
    """One page; the Link header (RFC 8288) leads to the others."""

    meta: PageMeta


class PageQuery(Answer):
    """Paging. The highest page keeps OFFSET within 64 bits."""

    page: int = Field(1, ge=1, le=2**53)
    page_size: int = Field(20, ge=1, le=100)


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


class UserUpdate(Body):
    """What to change. A new password needs the current one and ends the other sessions."""

    email: Email | MISSING | None = MISSING
    password: Password | MISSING = MISSING
    current_password: Text | MISSING = MISSING

    @model_validator(mode="after")
    def both_passwords(self) -> Self:
        """A password is changed only by who knows it, not by who found an open browser."""
        if (self.password is MISSING) != (self.current_password is MISSING):
            raise ValueError("password and current_password go together")
        return self


class UserPublic(Answer):
    """An account as its owner and an admin see it."""

    id: int
    username: str
    email: str | None
    role: Literal["user", "admin"]
    is_active: bool
    created_at: datetime


class Tokens(Answer):
    """Send the access token as `Authorization: Bearer …`; exchange the refresh token for the next pair."""

    access_token: str
    refresh_token: str
    token_type: Literal["bearer"] = "bearer"
    expires_in: int
    """Seconds until the access token expires."""


class Registered(Tokens):
    """Tokens, and the account that they belong to."""

    user: UserPublic


class SessionPublic(Answer):
    """A login."""

    id: int
    address: str
    user_agent: str
    created_at: datetime
    last_used_at: datetime
    expires_at: datetime
    current: bool
    """Whether this request came by it."""


class TaskBody(Body):
    """What POST, PUT and PATCH share: `completed` may be written instead of `status`."""

    status: Status | MISSING = MISSING
    completed: bool | MISSING = MISSING
    """true = done, false = todo."""

    @model_validator(mode="after")
    def settle_status(self) -> Self:
        """Turn `completed` into `status`; both and contradictory is an error."""
        if self.completed is not MISSING:
            if self.status is MISSING:
                self.status = "done" if self.completed else "todo"
            if (self.status == "done") != self.completed:
                raise ValueError("status and completed contradict each other")
        return self

    def values(self) -> dict[str, Any]:
        """The columns that the caller wrote; what they left out is not in it."""
        return self.model_dump(exclude={"completed"})


class TaskCreate(TaskBody):
    """A whole task, for POST and PUT."""

    title: Title
    """1–200 characters after trimming."""
    description: Description | None = None
    """At most 10,000 characters."""
    status: Status | MISSING = MISSING
    """todo when left out."""
    priority: Priority = "medium"
    due_date: Time | None = None
    """RFC 3339; a naive time is UTC, a bare date the end of that day."""

    def values(self) -> dict[str, Any]:
        """Every column that a caller may write."""
        return {"status": "todo"} | super().values()


class TaskUpdate(TaskBody):
    """A JSON merge patch (RFC 7396): absent keeps, null clears description and due_date."""

    title: Title | MISSING = MISSING
    description: Description | MISSING | None = MISSING
    priority: Priority | MISSING = MISSING
    due_date: Time | MISSING | None = MISSING


class TaskPublic(Answer):
    """A task. `version` is its ETag and its place in the order of the owner's changes."""

    id: int
    title: str
    description: str | None
    status: Status
    priority: Priority
    due_date: datetime | None
    completed: bool
    completed_at: datetime | None
    attachments: int
    owner_id: int
    version: int
    created_at: datetime
    updated_at: datetime
    deleted_at: datetime | None
    """When it went to the trash."""


DERIVED = {"completed": (tasks.c.status == "done").label("completed"), "version": tasks.c.seq.label("version")}
TASK_COLUMNS = [DERIVED[name] if name in DERIVED else tasks.c[name] for name in TaskPublic.model_fields]


class TaskQuery(PageQuery):
    """Filters, all ANDed, and the order."""

    status: list[Status] = []
    """Repeatable."""
    priority: list[Priority] = []
    """Repeatable."""
    completed: bool | None = None
    search: Annotated[Text, StringConstraints(min_length=1, max_length=200)] | None = None
    """Substring of title or description, in any case and script; % and _ are literal."""
    due_before: Time | None = None
    """Inclusive."""
    due_after: Time | None = None
    """Inclusive."""
    overdue: bool | None = None
    deleted: bool = False
    """true lists the trash."""
    sort: Literal["created_at", "updated_at", "due_date", "priority", "status", "title"] = "created_at"
    """due_date puts tasks without one last, both ways."""
    order: Literal["asc", "desc"] = "desc"


class AdminTaskQuery(TaskQuery):
    """The same filters, and the owner's id."""

    owner_id: Annotated[int, Field(ge=1, le=MAX_ID)] | None = None


class ChangesPublic(Answer):
    """Changed tasks and tombstones, oldest change first."""

    data: list[TaskPublic]
    next_since: int | str
    """Pass it back as `since`, as it is."""
    has_more: bool


class DayCount(Answer):
    """Tasks completed on one UTC day."""

    date: str
    count: int


class Statistics(Answer):
    """Counts over the caller's tasks, the trash left out."""

    total: int
    by_status: dict[Status, int]
    by_priority: dict[Priority, int]
    overdue: int
    due_in_7_days: int
    completion_rate: float
    """done / total, 0 to 1."""
    completed_per_day: list[DayCount]
    """The last 30 days, today last."""


class Health(Answer):
    """Alive, and the database answers."""

    status: Literal["ok"] = "ok"


class DatabaseHealth(Answer):
    """One round trip to the database."""

    engine: str
    latency_ms: float


class CleanupResult(Answer):
    """What the last clean-up removed."""

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
    last_cleanup: CleanupResult | None


class ErrorDetail(Answer):
    """One refused field."""

    field: str
    message: str


class ErrorBody(Answer):
    """What went wrong: `code` is stable, `message` is for people."""

    code: str
    message: str
    request_id: str
    details: list[ErrorDetail] | None = None
    """Only on 422."""


class Error(Answer):
    """Every error."""

    error: ErrorBody


# ── 6 Passwords and tokens ──────────────────────────────────────────────────────────────────────
# Pure functions. A password is stored as bcrypt, slow on purpose; a token is 256 random bits, which
# nobody guesses, so SHA-256 is enough to make a stolen database useless.

BCRYPT_COST = 12
ISSUER = "onefile-tasks"
CLOCK_LEEWAY = timedelta(seconds=10)
SESSION_DAYS_IN_ALL = 180
password_workers = ThreadPoolExecutor(os.cpu_count() or 1, "password")
"""Never more hashes at once than cores, and none in the event loop: one takes a quarter of a second."""


def password_bytes(password: str) -> bytes:
    """44 bytes that depend on the whole password: bcrypt reads only 72 and stops at NUL. Ref: NIST SP 800-63B."""
    whole = unicodedata.normalize("NFKC", password).encode()
    return base64.b64encode(hashlib.sha256(b"onefile-tasks password\0" + whole).digest())


def hash_password(password: str) -> str:
    """bcrypt, salted; BCRYPT_COST doublings of work."""
    return bcrypt.hashpw(password_bytes(password), bcrypt.gensalt(BCRYPT_COST)).decode()


def password_matches(password: str, password_hash: str) -> bool:
    """Compare in constant time."""
    return bcrypt.checkpw(password_bytes(password), password_hash.encode())


@functools.cache
def dummy_hash(cost: int) -> str:
    """A hash of nothing, of the live cost, so that an unknown user takes as long as a wrong password."""
    return bcrypt.hashpw(password_bytes(secrets.token_hex()), bcrypt.gensalt(cost)).decode()


def new_token() -> str:
    """256 random bits, URL-safe."""
    return secrets.token_urlsafe(32)


def token_hash(token: str) -> str:
    """SHA-256, hexadecimal: all that the database knows of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def encode_access_token(user_id: int, session_id: int) -> str:
    """A JWT for one session. Ref: RFC 7519, RFC 9068 §2.2."""
    issued = int(now().timestamp())
    claims = {"sub": str(user_id), "sid": str(session_id), "typ": "access", "iss": ISSUER, "jti": secrets.token_hex(8)}
    times = {"iat": issued, "exp": issued + settings.access_token_minutes * 60}
    return jwt.encode(claims | times, settings.secret_key.get_secret_value(), "HS256")


def decode_access_token(token: str) -> tuple[int, int] | None:
    """(user id, session id), or None for anything that is not a live access token of ours.

    Expiry is compared with `now()`, not by PyJWT, so that one clock rules and a test can set it.
    """
    required = ["sub", "sid", "iat", "exp", "jti", "typ", "iss"]
    options: Any = {"require": required, "verify_exp": False, "verify_iat": False}
    try:
        key = settings.secret_key.get_secret_value()
        claims = jwt.decode(token, key, ["HS256"], options=options, issuer=ISSUER)
        alive = now().timestamp() < int(claims["exp"]) + CLOCK_LEEWAY.total_seconds()
        return (int(claims["sub"]), int(claims["sid"])) if alive and claims["typ"] == "access" else None
    except (jwt.PyJWTError, ValueError):
        return None


# ── 7 Dependencies ──────────────────────────────────────────────────────────────────────────────
# A route's signature reads as a list of requirements: CurrentUser, AdminUser, OwnedTask, TaskQuery.
# Who asks is found out once, before the body is read (section 8); these only insist on it.

UserRow = sa.Row[Any]
principals = sa.select(
    users, sessions.c.id.label("session_id"), sessions.c.created_at.label("session_created_at")
).join_from(sessions, users)
"""Users with their live sessions: the one query that says who somebody is."""


async def authenticate(authorization: str | None) -> UserRow | None:
    """The user behind an Authorization header, joined with their session, or None."""
    scheme, _, token = (authorization or "").partition(" ")
    ids = decode_access_token(token.strip()) if scheme.lower() == "bearer" else None
    if ids is None:
        return None
    live = (sessions.c.expires_at > now()) & users.c.is_active
    async with database.read() as db:
        found = await db.execute(principals.where(users.c.id == ids[0], sessions.c.id == ids[1], live))
        return found.one_or_none()


oauth2 = OAuth2PasswordBearer("api/v1/auth/token", auto_error=False, description="Username and password.")


async def current_user(request: Request, _token: Annotated[str | None, Depends(oauth2)]) -> UserRow:
    """The caller. Errors: 401."""
    user: UserRow | None = request.state.user
    if user is None:
        raise not_authenticated()
    return user


CurrentUser = Annotated[UserRow, Depends(current_user)]


async def admin_user(user: CurrentUser) -> UserRow:
    """The caller, an admin. Errors: 401; 403."""
    if user.role != "admin":
        raise ApiError(403, "admin_required", "Only an admin may do this.")
    return user


AdminUser = Annotated[UserRow, Depends(admin_user)]
Id = Annotated[int, InPath(ge=1, le=MAX_ID)]
IfMatch = Annotated[str | None, Header()]
IfNoneMatch = Annotated[str | None, Header()]


async def owned_task(task_id: Id, user: CurrentUser) -> TaskPublic:
    """The caller's task, not in the trash. Errors: 404 absent or not yours."""
    mine = (tasks.c.id == task_id) & (tasks.c.owner_id == user.id) & tasks.c.deleted_at.is_(None)
    async with database.read() as db:
        row = (await db.execute(sa.select(*TASK_COLUMNS).where(mine))).one_or_none()
    if row is None:
        raise not_found("task", task_id)
    return task_public(row)


def task_public(row: sa.Row[Any]) -> TaskPublic:
    """A row of TASK_COLUMNS as the answer that it becomes."""
    return TaskPublic.model_validate(row._asdict())


OwnedTask = Annotated[TaskPublic, Depends(owned_task)]


def etag_listed(header: str | None, etag: str) -> bool:
    """Whether a conditional header names this ETag, or is `*`. Ref: RFC 9110 §13.1."""
    return header is not None and (header.strip() == "*" or etag in [tag.strip() for tag in header.split(",")])


def conditional(response: Response, etag: str, if_none_match: str | None) -> None:
    """Stamp the answer with its ETag. Errors: 304 when the caller has it. Ref: RFC 9110 §13.1.2."""
    weak = etag.removeprefix("W/")
    if etag_listed(if_none_match, weak) or etag_listed(if_none_match, f"W/{weak}"):
        raise not_modified(etag)
    response.headers["ETag"] = etag


def collection_etag(request: Request, user: UserRow) -> str:
    """The weak ETag of a list: it is what it was as long as its owner's seq and its URL are."""
    url = f"{VERSION} {user.id} {request.url.path}?{request.url.query}"
    return f'W/"{user.seq}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"'


# ── 8 Rate limits ───────────────────────────────────────────────────────────────────────────────
# SlowAPI's decorators cannot see a request that fails validation, and its middleware cannot see an
# included router. So one route class asks SlowAPI's limiter itself, before the body is read: no broken
# body and no spelling of a path escapes the count, and section 10 writes the result on every answer.

limiter = Limiter(lambda request: client_key(request.scope), strategy="moving-window", storage_uri="memory://")
Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
extra_limits: dict[Callable[..., Any], str] = {}


def limited(name: str) -> Callable[[Endpoint], Endpoint]:
    """Count a route also against RATE_LIMIT_<name>, per address; `unlimited` takes it out of every count."""

    def mark(endpoint: Endpoint) -> Endpoint:
        extra_limits[endpoint] = name
        return endpoint

    return mark


def address_key(address: str) -> str:
    """What counts as one address: an IPv4 address, or the /64 that an IPv6 customer gets. Ref: RFC 6177."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "local"
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))


def client_address(scope: Scope) -> str:
    """The caller's address, behind TRUSTED_PROXIES only."""
    return str((scope.get("client") or ("local",))[0])


def client_key(scope: Scope) -> str:
    """The bucket of an anonymous caller."""
    return address_key(client_address(scope))


def rate_limited(window_ends: float) -> ApiError:
    """429. Ref: RFC 6585 §4."""
    seconds = max(1, ceil(window_ends - time.time()))
    return ApiError(429, "rate_limited", f"Too many requests. Try again in {seconds} s.", {"Retry-After": str(seconds)})


def enforce(scope: Scope, *buckets: tuple[str, str]) -> None:
    """Count against each (limit, key), and leave the tightest window for the answer's headers. Errors: 429."""
    if settings.rate_limits == "off":
        return
    tightest = None
    for name, key in buckets:
        limit: RateLimitItem = getattr(settings, f"rate_limit_{name}")
        allowed = limiter.limiter.hit(limit, name, key)
        window = limiter.limiter.get_window_stats(limit, name, key)
        if not allowed or tightest is None or window.remaining < tightest[1]:
            tightest = (limit.amount, window.remaining, ceil(window.reset_time))
            names = ("X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset")
            scope["state"]["headers"] = {name: str(value) for name, value in zip(names, tightest, strict=True)}
        if not allowed:
            raise rate_limited(window.reset_time)


def limited_body(request: Request, max_bytes: int) -> Receive:
    """Receive, until more than max_bytes were announced or have arrived. Errors: 413."""
    declared = request.headers.get("content-length", "")
    arrived = 0

    async def receive() -> Message:
        nonlocal arrived
        if declared.isdecimal() and int(declared) > max_bytes:
            raise too_large(max_bytes)
        message = await request.receive()
        arrived += len(message.get("body", b""))
        if arrived > max_bytes:
            raise too_large(max_bytes)
        return message

    return receive


def check_media_type(request: Request, is_form: bool) -> None:
    """Errors: 415 for a body that is not what the route reads. Ref: RFC 9110 §15.5.16."""
    if request.headers.get("content-length", "0") == "0" and "transfer-encoding" not in request.headers:
        return
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if is_form:
        if media_type not in ("application/x-www-form-urlencoded", "multipart/form-data"):
            raise ApiError(415, "unsupported_media_type", "Send a form: curl -d username=… -d password=…")
    elif not re.fullmatch(r"application/([\w.-]+\+)?json", media_type):
        raise ApiError(
            415, "unsupported_media_type", "Send JSON: curl --json '{…}', or Content-Type: application/json."
        )


class Route(APIRoute):
    """Every route of the API: who asks, the count, the query's names and the media type come before the body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's handler. Errors: 413; 415; 422 unknown query parameter; 429."""
        handle = super().get_route_handler()
        others = (params.Path, params.Header)
        known = {p.alias for p in get_flat_params(self.dependant) if not isinstance(p.field_info, others)}
        bucket = "read" if self.methods == {"GET"} else "write"
        extra = extra_limits.get(self.endpoint)
        is_form = self.body_field is not None and "form" in type(self.body_field.field_info).__name__.lower()

        async def guarded(request: Request) -> Response:
            user = request.state.user = await authenticate(request.headers.get("authorization"))
            address = client_key(request.scope)
            if extra != "unlimited":
                mine = (bucket, f"user {user.id}" if user else address)
                enforce(request.scope, *([(extra, address)] if extra else []), mine)
            if not request.query_params.keys() <= known:
                raise invalid("query", f"has an unknown parameter; known are: {', '.join(sorted(known)) or 'none'}")
            if self.body_field is not None:
                check_media_type(request, is_form)
            return await handle(Request(request.scope, limited_body(request, settings.max_body_kib * 1024)))

        return guarded


def router(prefix: str, tag: str) -> APIRouter:
    """The routes of one resource."""
    return APIRouter(prefix=prefix, tags=[tag], route_class=Route)


# ── 9 Live updates ──────────────────────────────────────────────────────────────────────────────
# One number per user. A write takes the next seq inside its transaction; a stream is a cursor that
# sleeps until its user's seq has moved past it and then reads what it missed. No queue per connection:
# a slow peer falls behind and catches up, from a ring of recent changes or from the database.

RING_SIZE = 256
BATCH = 500
POLL_SECONDS = 2.0
"""How late a stream notices another process's changes, a logout or a disabled account."""


class Change(NamedTuple):
    """One change of one task, its task already encoded."""

    seq: int
    kind: str
    task_json: str


class Frame(NamedTuple):
    """What a stream sends: `seq` is None for what is no change."""

    kind: str
    seq: int | None
    text: str


RESYNC = Frame("resync_required", None, '{"type":"resync_required"}')


class Stream:
    """One live connection: where it is, and why it has to end once it has to."""

    def __init__(self, feed: "Feed", user: UserRow, client_id: str | None) -> None:
        self.feed, self.client_id = feed, client_id
        self.user_id, self.session_id = user.id, user.session_id
        self.cursor = self.replay_until = self.purged_seq = 0
        self.stale = False
        self.closing: tuple[int, str] | None = None
        self.wake = asyncio.Event()

    def start(self, marks: "ChangeSet", since: int | None) -> None:
        """Start after `since`, or at now; a stale cursor starts at now and says so."""
        self.stale = since is not None and marks.stale(since, self.purged_seq)
        self.replay_until, self.purged_seq = marks.seq, marks.purged_seq
        self.cursor = marks.seq if since is None or self.stale else since

    def close(self, code: int, reason: str) -> None:
        """End the stream with a WebSocket close code; the first reason stands."""
        self.closing = self.closing or (code, reason)
        self.wake.set()


class Feed:
    """The open streams of one user, and the ring: every change with `after < seq <= last`, oldest first."""

    def __init__(self) -> None:
        self.streams: set[Stream] = set()
        self.ring: deque[Change] = deque()
        self.after = self.last = 0

    def publish(self, first: int, last: int, changes: list[Change]) -> None:
        """Append what a commit did to seqs first..last, and wake the streams; a gap empties the ring."""
        if first != self.last + 1:
            self.reset(max(first - 1, self.last))
        if last > self.last:
            self.ring.extend(changes)
            self.last = last
        while len(self.ring) > RING_SIZE:
            self.after = self.ring.popleft().seq
        self.wake()

    def reset(self, seq: int) -> None:
        """Forget the ring: whoever is behind `seq` asks the database."""
        self.ring.clear()
        self.after = self.last = seq

    def observe(self, seq: int) -> None:
        """The database is at `seq`; what the ring does not know of happened in another process."""
        if seq > self.last:
            self.reset(seq)
            self.wake()

    def wake(self) -> None:
        """Let every stream look."""
        for stream in self.streams:
            stream.wake.set()


feeds: dict[int, Feed] = {}


class Transaction:
    """A write to one user's tasks. `seq` is the last one taken; `write` and `remember` keep what to publish."""

    def __init__(self, db: AsyncConnection, user_id: int) -> None:
        self.db, self.user_id, self.seq, self.first = db, user_id, 0, 0
        self.changes: list[Change] = []

    async def take_seq(self) -> None:
        """Take the user's next seq; on PostgreSQL this also locks their row. Errors: 401 if they are gone."""
        step = sa.update(users).where(users.c.id == self.user_id).values(seq=users.c.seq + 1).returning(users.c.seq)
        seq = await self.db.scalar(step)
        if seq is None:
            raise not_authenticated()
        self.first, self.seq = self.first or seq, seq

    async def task(self, task_id: int, if_match: str | None = None, trashed: bool = False) -> TaskPublic:
        """The user's task as it is now. Errors: 404 absent, not theirs, or on the other side; 412 stale version."""
        place = tasks.c.deleted_at.is_not(None) if trashed else tasks.c.deleted_at.is_(None)
        mine = (tasks.c.id == task_id) & (tasks.c.owner_id == self.user_id) & place
        row = (await self.db.execute(sa.select(*TASK_COLUMNS).where(mine))).one_or_none()
        if row is None:
            raise not_found("task", task_id)
        if if_match is not None and not etag_listed(if_match, f'"{row.version}"'):
            raise ApiError(412, "version_mismatch", f'The task is at version "{row.version}" now.')
        return task_public(row)

    async def save(self, kind: str, before: TaskPublic | None, values: dict[str, Any]) -> TaskPublic:
        """Write a new task or new values, with all that follows from them, stamped with `seq`."""
        merged = (before.model_dump() if before else {}) | values
        moment = now()
        completed_at = (merged.get("completed_at") or moment) if merged["status"] == "done" else None
        search_text = folded(f"{merged['title']}\x1f{merged['description'] or ''}")
        values = values | {
            "seq": self.seq,
            "updated_at": moment,
            "completed_at": completed_at,
            "search_text": search_text,
        }
        if before:
            statement: Any = sa.update(tasks).where(tasks.c.id == before.id).values(values)
        else:
            statement = sa.insert(tasks).values({"owner_id": self.user_id, "created_at": moment} | values)
        task = task_public((await self.db.execute(statement.returning(*TASK_COLUMNS))).one())
        self.changes.append(Change(task.version, kind, task.model_dump_json()))
        return task

    async def purge(self, trashed_before: datetime) -> int:
        """Delete this trash for good and remember the highest seq removed. Returns how many."""
        old = (tasks.c.owner_id == self.user_id) & (tasks.c.deleted_at <= trashed_before)
        highest = await self.db.scalar(sa.select(sa.func.max(tasks.c.seq)).where(old))
        if highest is not None:
            await self.db.execute(sa.update(users).where(users.c.id == self.user_id).values(purged_seq=highest))
        return (await self.db.execute(sa.delete(tasks).where(old))).rowcount


@contextlib.asynccontextmanager
async def changing(user_id: int) -> AsyncIterator[Transaction]:
    """A transaction that takes one seq of the user, commits, and then tells their streams. Errors: 401."""
    async with database.write() as db:
        transaction = Transaction(db, user_id)
        await transaction.take_seq()
        yield transaction
    if feed := feeds.get(user_id):
        feed.publish(transaction.first, transaction.seq, transaction.changes)


class ChangeSet(NamedTuple):
    """Tasks changed after a cursor, oldest change first, and the user's numbers at that moment."""

    tasks: list[TaskPublic]
    seq: int
    purged_seq: int

    def stale(self, since: int, purged_seq: int = 0) -> bool:
        """Whether a client at `since`, which knows of purges up to `purged_seq`, has missed a deletion for ever."""
        return since > self.seq or 0 < since < self.purged_seq != purged_seq


async def changes_after(user_id: int, since: int, limit: int) -> ChangeSet:
    """`seq > since ORDER BY seq`, deletions included, in one snapshot. Errors: 401 if the user is gone."""
    changed = sa.select(*TASK_COLUMNS).where(tasks.c.owner_id == user_id, tasks.c.seq > since)
    async with database.read() as db:
        marks = await db.execute(sa.select(users.c.seq, users.c.purged_seq).where(users.c.id == user_id))
        rows = await db.execute(changed.order_by(tasks.c.seq).limit(limit))
        found = marks.one_or_none()
        if found is None:
            raise not_authenticated()
        return ChangeSet([task_public(row) for row in rows], found.seq, found.purged_seq)


@contextlib.asynccontextmanager
async def open_stream(user: UserRow, since: int | None, client_id: str | None = None) -> AsyncIterator[Stream]:
    """A registered stream; it takes the place of the user's other one with the same client_id."""
    feed = feeds.setdefault(user.id, Feed())
    stream = Stream(feed, user, client_id)
    for other in feed.streams:
        if client_id is not None and other.client_id == client_id:
            other.close(4409, "replaced by a newer connection")
    feed.streams.add(stream)
    try:
        # Registered first, looked second: a commit in between is noticed by one or the other.
        marks = await shielded(changes_after(user.id, MAX_ID, 1))
        feed.observe(marks.seq)
        stream.start(marks, since)
        yield stream
    finally:
        feed.streams.discard(stream)
        if not feed.streams and feeds.get(user.id) is feed:
            del feeds[user.id]


async def missed(stream: Stream) -> list[Change]:
    """What the stream has not sent yet: from the ring, or from the database when it is too far behind."""
    feed = stream.feed
    if stream.cursor >= feed.after:
        newer = [*itertools.takewhile(lambda change: change.seq > stream.cursor, reversed(feed.ring))]
        stream.cursor = stream.cursor if newer else max(stream.cursor, feed.last)
        return newer[::-1]
    found = await changes_after(stream.user_id, stream.cursor, BATCH)
    feed.observe(found.seq)
    if found.stale(stream.cursor, stream.purged_seq):
        stream.start(found, stream.cursor)
        return []
    if not found.tasks:
        stream.cursor = found.seq
    return [
        Change(task.version, "deleted" if task.deleted_at else "updated", task.model_dump_json())
        for task in found.tasks
    ]


async def follow(stream: Stream) -> AsyncIterator[Frame]:
    """Everything after the stream's cursor, in seq order, none twice, until it is closed."""
    while stream.closing is None:
        stream.wake.clear()
        changes = await shielded(missed(stream))
        if stream.stale:
            stream.stale = False
            yield RESYNC
        for seq, kind, task_json in changes:
            stream.cursor = seq
            kind = "updated" if kind == "created" and seq <= stream.replay_until else kind
            yield Frame(kind, seq, f'{{"type":"{kind}","seq":{seq},"task":{task_json}}}')
        if not changes:
            await stream.wake.wait()


async def look_around() -> None:
    """Close the streams whose session has ended, and notice what other processes have written."""
    streams = [stream for feed in feeds.values() for stream in feed.streams]
    if not streams:
        return
    wanted = sessions.c.id.in_({stream.session_id for stream in streams})
    async with database.read() as db:
        alive = await db.execute(principals.where(wanted, sessions.c.expires_at > now(), users.c.is_active))
        seqs = {row.session_id: row.seq for row in alive}
    for stream in streams:
        if stream.session_id in seqs:
            stream.feed.observe(seqs[stream.session_id])
        else:
            stream.close(4401, "the session has ended")


async def every(seconds: float, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Do it again and again; a failure is logged and the next turn tries anew."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await shielded(work())
        except Exception:
            log.exception("background work failed")


# ── 10 Application ──────────────────────────────────────────────────────────────────────────────
# Start-up happens inside one write transaction, so that several processes may start at once. Around
# everything lies one ASGI layer of ours: FastAPI's own handlers run inside of middleware and never see
# each other's failures, and only the outermost layer can put an id and limits on every answer.

SEND_SECONDS = 20.0
CLEANUP_SECONDS = 3600.0
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
started_at = time.monotonic()
last_cleanup: CleanupResult | None = None


class LogFormatter(logging.Formatter):
    """One line a record: text for people, JSON for machines."""

    def format(self, record: logging.LogRecord) -> str:
        """`time level message`, or the same as an object; a traceback follows in its own lines or field."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        entry = {"time": moment, "level": record.levelname.lower(), "message": record.getMessage()}
        entry |= getattr(record, "request", {})
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        if settings.log_format == "json":
            return json.dumps({name: value for name, value in entry.items() if value is not None})
        return "\n".join([f"{moment} {entry['message']}", *filter(None, [entry.get("traceback")])])


def configure_logging() -> None:
    """Log to standard error; uvicorn's own access log prints query strings, so ours takes its place."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    log.handlers, log.propagate = [handler], False
    log.setLevel(settings.log_level.upper())
    logging.getLogger("uvicorn.access").disabled = True


def announce(text: str) -> None:
    """Tell the person who started the program."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def load_secret(directory: Path) -> SecretStr:
    """SECRET_KEY, or the one generated on the first start and kept beside the database, mode 0600."""
    path = directory / "secret_key"
    if not settings.secret_key.get_secret_value():
        if not path.exists():
            with open(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(48))
        return SecretStr(path.read_text())
    return settings.secret_key


def new_user(name: str, password_hash: str, role: str = "user", email: str | None = None) -> dict[str, Any]:
    """The columns of a new account."""
    key = folded(name)
    columns = {"username": name, "username_key": key, "email": email, "password_hash": password_hash, "role": role}
    return columns | {"is_active": True, "seq": 0, "purged_seq": 0, "created_at": now()}


async def open_database() -> None:
    """Open the database, create what is missing, load the secret, create the first admin. Errors: SystemExit."""
    try:
        name = username(settings.admin_username)
        password = uncommon(settings.admin_password.get_secret_value() or new_token())
        if len(password) < 8:
            raise ValueError("must be at least 8 characters")
        database.open(settings.data_dir)
    except ValueError as error:
        raise SystemExit(f"ADMIN_USERNAME or ADMIN_PASSWORD: {error}") from None
    except OSError as error:
        raise SystemExit(f"DATA_DIR: {error}") from None
    async with database.write() as db:
        await db.run_sync(SQLModel.metadata.create_all)
        settings.secret_key = load_secret(settings.data_dir)
        first_start = not await db.scalar(sa.select(sa.exists(sa.select(users.c.id))))
        if first_start:
            await db.execute(sa.insert(users).values(new_user(name, hash_password(password), "admin")))
    if first_start and not settings.admin_password.get_secret_value():
        announce(f"  Admin      {name}, password {password}   (shown only now; change it after logging in)")


async def clean_up() -> CleanupResult:
    """Remove what has expired: sessions, used refresh tokens, trash older than TRASH_DAYS."""
    global last_cleanup
    moment = now()
    oldest_trash = moment - timedelta(days=settings.trash_days)
    async with database.write() as db:
        ended = await db.execute(sa.delete(sessions).where(sessions.c.expires_at <= moment))
        used = await db.execute(sa.delete(refresh_tokens).where(refresh_tokens.c.expires_at <= moment))
        owners = await db.scalars(sa.select(tasks.c.owner_id).where(tasks.c.deleted_at <= oldest_trash).distinct())
    purged = 0
    for owner in owners.all():
        async with changing(owner) as transaction:
            purged += await transaction.purge(oldest_trash)
    last_cleanup = CleanupResult(finished_at=now(), sessions=ended.rowcount, refresh_tokens=used.rowcount, tasks=purged)
    return last_cleanup


@contextlib.asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Start: logging, database, background work. Stop: end the streams, finish the writes, close."""
    global started_at
    configure_logging()
    await open_database()
    dummy_hash(BCRYPT_COST)
    started_at = time.monotonic()
    background = [
        asyncio.create_task(every(POLL_SECONDS, look_around)),
        asyncio.create_task(every(CLEANUP_SECONDS, clean_up)),
    ]
    announce(f"  Data       {(settings.data_dir / 'tasks.db').resolve()}")
    yield
    end_streams()
    for task in background:
        task.cancel()
    if unfinished:
        await asyncio.wait(unfinished, timeout=3)
    await database.close()


def end_streams() -> None:
    """The server is going away. Ref: RFC 6455 §7.4.1."""
    for feed in feeds.values():
        for stream in feed.streams:
            stream.close(1001, "the server is going away")


class SlowClient(Exception):
    """The peer has taken nothing for SEND_SECONDS."""


class Exchange:
    """One request or socket as the outermost layer sees it: id, status, time, and a `send` that completes answers."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.raw_send, self.original = send, scope
        asked = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
        self.request_id = asked if REQUEST_ID.fullmatch(asked) else secrets.token_hex(8)
        self.state = {**scope.get("state", {}), "request_id": self.request_id, "user": None, "headers": {}}
        self.began, self.status = time.perf_counter(), 0
        path = scope["path"]
        self.scope = {**scope, "state": self.state, "path": path[:-1] if len(path) > 1 and path.endswith("/") else path}
        if scope.get("method") == "HEAD":
            self.scope["method"] = "GET"

    async def send(self, message: Message) -> None:
        """Add id and limits to the head, drop the body of a HEAD, and give up on a peer that does not read."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message).update({"X-Request-ID": self.request_id} | self.state["headers"])
        elif message["type"] == "http.response.body" and self.original["method"] == "HEAD":
            message = {**message, "body": b""}
        elif message["type"] in ("websocket.accept", "websocket.close"):
            self.status = message.get("code", 101)
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await self.raw_send(message)
        except TimeoutError:
            # Only the transport itself can drop what such a peer never takes; ASGI has no word for it.
            transport = getattr(getattr(self.raw_send, "__self__", None), "transport", None)
            if transport is not None and message["type"] != "websocket.send":
                transport.abort()
            raise SlowClient from None

    def log(self) -> None:
        """One line; the path is percent-encoded, so that it cannot forge another line, and has no query."""
        method, path = self.original.get("method", "WEBSOCKET"), quote(self.original["path"])
        milliseconds = round((time.perf_counter() - self.began) * 1000, 1)
        user = self.state["user"]
        fields = {"request_id": self.request_id, "method": method, "path": path, "status": self.status}
        fields |= {"milliseconds": milliseconds, "user_id": user.id if user else None}
        line = f"{self.request_id} {method} {path} {self.status} {milliseconds} ms user {user.id if user else '-'}"
        log.info(line, extra={"request": fields})


class Gateway:
    """The outermost ASGI layer: what holds for every request, whatever happens inside."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request: a write to its end even if cancelled, a failure into a 500 with the request's id."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        exchange = Exchange(scope, send)
        try:
            run = self.app(exchange.scope, receive, exchange.send)
            await (run if scope.get("method", "GET") in ("GET", "HEAD") else shielded(run))
        except (SlowClient, ClientDisconnect, WebSocketDisconnect):
            log.debug("%s the client is gone", exchange.request_id)
        except Exception:
            log.exception("%s failed", exchange.request_id)
            if exchange.status == 0 and scope["type"] == "http":
                error = ApiError(500, "internal_error", "Something failed here; the log knows this request_id.")
                await error_response(error, exchange.request_id)(scope, receive, exchange.send)
        finally:
            exchange.log()


app: FastAPI = (FastAPIOffline if settings.docs == "on" else functools.partial(FastAPI, openapi_url=None))(
    title="Onefile Tasks",
    version=VERSION,
    description="A complete task-manager API in one Python file.",
    root_path=settings.root_path,
    redirect_slashes=False,
    lifespan=lifespan,
    responses={"default": {"model": Error, "description": "Any error"}},
)
app.add_middleware(Gateway)
app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=settings.trusted_proxies)


@app.exception_handler(ApiError)
async def on_api_error(request: Request, error: ApiError) -> Response:
    """Ours, as it was raised."""
    return error_response(error, request.state.request_id)


@app.exception_handler(StarletteHTTPException)
async def on_http_error(request: Request, error: StarletteHTTPException) -> Response:
    """The framework's: an unknown path, a wrong method, a body that cannot be parsed."""
    if error.status_code == 405:
        path = request.url.path.removeprefix(request.scope.get("root_path", ""))
        matching = [context for context in iter_route_contexts(app.routes) if context.path_regex.fullmatch(path)]
        methods = {method for context in matching for method in context.methods or ()}
        allow = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
        ours = ApiError(405, "method_not_allowed", f"This path answers {allow}.", {"Allow": allow})
    elif error.status_code == 404:
        ours = ApiError(404, "not_found", "No such path. The paths stand in /docs.")
    else:
        ours = ApiError(400, "invalid_body", "The body cannot be read.")
    return error_response(ours, request.state.request_id)


@app.exception_handler(RequestValidationError)
async def on_validation_error(request: Request, error: RequestValidationError) -> Response:
    """422 with every refused field; broken JSON is a 400. What was sent is not repeated."""
    errors = error.errors()
    if any(item["type"] == "json_invalid" for item in errors):
        ours = ApiError(400, "invalid_json", "The body is not valid JSON.")
    else:
        details = [
            {
                "field": ".".join(map(str, item["loc"][1:] or item["loc"])),
                "message": item["msg"].removeprefix("Value error, "),
            }
            for item in errors
        ]
        message = "; ".join(f"{detail['field']}: {detail['message']}" for detail in details)
        ours = ApiError(422, "validation_failed", message, details=details)
    return error_response(ours, request.state.request_id)


@app.exception_handler(OperationalError)
@app.exception_handler(InterfaceError)
@app.exception_handler(PoolTimeout)
async def on_database_error(request: Request, error: Exception) -> Response:
    """The database is locked, full or gone; nothing was written."""
    log.error("%s database: %s", request.state.request_id, type(error.__cause__ or error).__name__, exc_info=error)
    ours = ApiError(503, "database_unavailable", "The database does not answer. Try again.", {"Retry-After": "5"})
    return error_response(ours, request.state.request_id)


# ── 11 Routes ───────────────────────────────────────────────────────────────────────────────────
# One router a resource. The docstring of a route is its description in /docs; errors that every route
# can give (400, 401, 413, 415, 422, 429, 503) are described in the README once.

auth = router(f"{API}/auth", "auth")


async def start_session(db: AsyncConnection, request: Request, user_id: int) -> Tokens:
    """A new session with its first pair of tokens."""
    moment = now()
    values = {"user_id": user_id, "created_at": moment} | session_use(request, moment, moment)
    session_id = await db.scalar(sa.insert(sessions).values(values).returning(sessions.c.id))
    return await issue_tokens(db, user_id, session_id, values["expires_at"])


def session_use(request: Request, created_at: datetime, moment: datetime) -> dict[str, Any]:
    """What using a session changes: it lives 30 days from its last use, 180 in all."""
    idle = moment + timedelta(days=settings.refresh_token_days)
    return {
        "address": client_address(request.scope),
        "user_agent": request.headers.get("user-agent", "")[:200],
        "last_used_at": moment,
        "expires_at": min(idle, created_at + timedelta(days=SESSION_DAYS_IN_ALL)),
    }


async def issue_tokens(db: AsyncConnection, user_id: int, session_id: int, expires_at: datetime) -> Tokens:
    """An access token, and a refresh token of which only the hash is kept."""
    token = new_token()
    values = {"session_id": session_id, "token_hash": token_hash(token), "expires_at": expires_at}
    await db.execute(sa.insert(refresh_tokens).values(values))
    access_token = encode_access_token(user_id, session_id)
    return Tokens(access_token=access_token, refresh_token=token, expires_in=settings.access_token_minutes * 60)


async def in_worker(function: Callable[..., T], *arguments: Any) -> T:
    """Run password work in its own threads, outside of the event loop."""
    return await asyncio.get_running_loop().run_in_executor(password_workers, function, *arguments)


def try_password(account: str, counted: bool, password: str, password_hash: str) -> bool:
    """Count a failure against the account, in the same breath as the check. Errors: 429."""
    limit = settings.rate_limit_account
    if counted and not limiter.limiter.test(limit, "account", account):
        raise rate_limited(limiter.limiter.get_window_stats(limit, "account", account).reset_time)
    matches = password_matches(password, password_hash)
    if counted and not matches:
        limiter.limiter.hit(limit, "account", account)
    return matches


async def check_password(request: Request, name: str, password: str) -> UserRow | None:
    """The user of that name, if the password is theirs. An unknown name costs the same time. Errors: 429.

    Failures are not counted from an address that is logged in to the account, so that a stranger who
    exhausts the count cannot lock its owner out.
    """
    key = folded(name)[:100]
    async with database.read() as db:
        user = (await db.execute(sa.select(users).where(users.c.username_key == key))).one_or_none()
        living = (sessions.c.user_id == (user.id if user else 0)) & (sessions.c.expires_at > now())
        addresses = await db.scalars(sa.select(sessions.c.address).where(living).distinct())
        known = client_key(request.scope) in {address_key(address) for address in addresses}
    counted = settings.rate_limits == "on" and not known
    stored = user.password_hash if user else dummy_hash(BCRYPT_COST)
    matches = await in_worker(try_password, key, counted, password, stored)
    return user if matches else None


def no_store(response: Response) -> None:
    """Keep tokens out of every cache. Ref: RFC 6749 §5.1."""
    response.headers["Cache-Control"] = "no-store"


async def log_in(request: Request, response: Response, name: str, password: str) -> Tokens:
    """The one login behind the JSON and the form route."""
    user = await check_password(request, name, password)
    if user is None:
        raise invalid_credentials()
    if not user.is_active:
        raise ApiError(403, "account_disabled", "This account is disabled.")
    no_store(response)
    async with database.write() as db:
        return await start_session(db, request, user.id)


@auth.post("/register", status_code=201)
@limited("register")
async def register(request: Request, response: Response, body: Registration) -> Registered:
    """Create an account and log in.

    Errors: 403 registration_closed; 409 username_taken
    Limit: register, per address
    """
    if settings.registration == "closed":
        raise ApiError(403, "registration_closed", "Registration is closed here. Ask the admin for an account.")
    columns = new_user(body.username, await in_worker(hash_password, body.password), email=body.email)
    try:
        async with database.write() as db:
            user = (await db.execute(sa.insert(users).values(columns).returning(users))).one()
            tokens = await start_session(db, request, user.id)
    except IntegrityError:
        raise ApiError(409, "username_taken", "This username is taken.") from None
    no_store(response)
    return Registered(**tokens.model_dump(), user=user_public(user))


@auth.post("/login")
@limited("login")
async def login(request: Request, response: Response, body: Credentials) -> Tokens:
    """Exchange a username and a password for tokens.

    Errors: 401 invalid_credentials; 403 account_disabled
    Limit: login, per address; account, failures only
    """
    return await log_in(request, response, body.username, body.password)


@auth.post("/token")
@limited("login")
async def login_by_form(
    request: Request, response: Response, form: Annotated[OAuth2PasswordRequestForm, Depends()]
) -> Tokens:
    """The same as an OAuth 2 password form, for the Authorize button of /docs.

    Errors: 401 invalid_credentials; 403 account_disabled
    Limit: login, per address; account, failures only
    Ref: RFC 6749 §4.3
    """
    return await log_in(request, response, form.username, form.password)


@auth.post("/refresh")
@limited("refresh")
async def refresh(request: Request, response: Response, body: RefreshRequest) -> Tokens:
    """Exchange a refresh token for the next pair; it works once.

    A used one is a sign of theft: its session ends with every token of it, unless it comes within a
    second of its use while the successor is unused, which is a second tab and no thief.

    Errors: 401 invalid_refresh_token
    Limit: refresh, per address
    Ref: RFC 9700 §4.14.2
    """
    moment, hashed = now(), token_hash(body.refresh_token)
    this = refresh_tokens.c.token_hash == hashed
    fresh = this & refresh_tokens.c.used_at.is_(None) & (refresh_tokens.c.expires_at > moment)
    use = sa.update(refresh_tokens).where(fresh).values(used_at=moment).returning(refresh_tokens.c.session_id)
    no_store(response)
    async with database.write() as db:
        session_id = await db.scalar(use)
        if session_id is not None:
            found = await db.execute(principals.where(sessions.c.id == session_id, users.c.is_active))
            if user := found.one_or_none():
                usage = session_use(request, user.session_created_at, moment)
                await db.execute(sa.update(sessions).where(sessions.c.id == session_id).values(usage))
                return await issue_tokens(db, user.id, session_id, usage["expires_at"])
        else:
            await revoke_replayed(db, hashed, moment)
    raise ApiError(401, "invalid_refresh_token", "This refresh token is not valid.", {"WWW-Authenticate": "Bearer"})


async def revoke_replayed(db: AsyncConnection, hashed: str, moment: datetime) -> None:
    """End the session of a used refresh token, unless this looks like a racing tab."""
    token = (await db.execute(sa.select(refresh_tokens).where(refresh_tokens.c.token_hash == hashed))).one_or_none()
    if token is None or token.used_at is None:
        return
    later = (refresh_tokens.c.session_id == token.session_id) & (refresh_tokens.c.id > token.id)
    successor_used = await db.scalar(sa.select(sa.exists().where(later, refresh_tokens.c.used_at.is_not(None))))
    if successor_used or moment - token.used_at > timedelta(seconds=1):
        await db.execute(sa.delete(sessions).where(sessions.c.id == token.session_id))


@auth.post("/logout", status_code=204)
async def logout(request: Request, body: RefreshRequest | None = None) -> None:
    """End this session: by the access token, or by its refresh token when that has expired.

    Errors: 401 neither is valid
    """
    user = request.state.user
    if user is not None:
        this = sessions.c.id == user.session_id
    elif body is not None:
        of_token = sa.select(refresh_tokens.c.session_id).where(
            refresh_tokens.c.token_hash == token_hash(body.refresh_token)
        )
        this = sessions.c.id.in_(of_token)
    else:
        raise not_authenticated()
    async with database.write() as db:
        if (await db.execute(sa.delete(sessions).where(this))).rowcount == 0:
            raise not_authenticated()


@auth.post("/logout_all", status_code=204)
async def logout_all(user: CurrentUser) -> None:
    """End every session of the caller."""
    async with database.write() as db:
        await db.execute(sa.delete(sessions).where(sessions.c.user_id == user.id))


@auth.get("/sessions")
async def list_sessions(user: CurrentUser) -> Collection[SessionPublic]:
    """The caller's logins, last used first."""
    mine = (sessions.c.user_id == user.id) & (sessions.c.expires_at > now())
    async with database.read() as db:
        rows = await db.execute(sa.select(sessions).where(mine).order_by(sessions.c.last_used_at.desc(), sessions.c.id))
    found = [SessionPublic(**row._asdict(), current=row.id == user.session_id) for row in rows]
    return Collection(data=found)


@auth.delete("/sessions/{session_id}", status_code=204)
async def end_session(session_id: Id, user: CurrentUser) -> None:
    """End one login.

    Errors: 404 absent or not yours
    """
    async with database.write() as db:
        mine = (sessions.c.id == session_id) & (sessions.c.user_id == user.id)
        if (await db.execute(sa.delete(sessions).where(mine))).rowcount == 0:
            raise not_found("session", session_id)


me = router(f"{API}/users", "users")
MINUTES_TO_DELETE = 10


def user_public(row: UserRow) -> UserPublic:
    """The part of a user's row that may leave."""
    return UserPublic.model_validate(row, from_attributes=True)


@me.get("/me")
async def read_me(user: CurrentUser) -> UserPublic:
    """The caller's account."""
    return user_public(user)


@me.patch("/me")
async def update_me(request: Request, body: UserUpdate, user: CurrentUser) -> UserPublic:
    """Change e-mail or password; a new password ends the other sessions.

    Errors: 403 wrong_password
    Limit: account, failures only
    """
    values = body.model_dump(include={"email"})
    if body.password is not MISSING and body.current_password is not MISSING:
        if await check_password(request, user.username, body.current_password) is None:
            raise ApiError(403, "wrong_password", "current_password is wrong.")
        values["password_hash"] = await in_worker(hash_password, body.password)
    async with database.write() as db:
        if "password_hash" in values:
            others = (sessions.c.user_id == user.id) & (sessions.c.id != user.session_id)
            await db.execute(sa.delete(sessions).where(others))
        changed = sa.update(users).where(users.c.id == user.id).values(values or {"email": user.email}).returning(users)
        row = (await db.execute(changed)).one_or_none()
    if row is None:
        raise not_authenticated()
    return user_public(row)


@me.delete("/me", status_code=204)
async def delete_me(user: CurrentUser) -> None:
    """Delete the account with everything in it.

    Errors: 403 login_again when the session is older than 10 minutes; 409 last_admin
    """
    if now() - user.session_created_at > timedelta(minutes=MINUTES_TO_DELETE):
        raise ApiError(
            403, "login_again", f"Log in again: this needs a session younger than {MINUTES_TO_DELETE} minutes."
        )
    async with database.write() as db:
        await keep_an_admin(db, user.id)
        await db.execute(sa.delete(users).where(users.c.id == user.id))


async def keep_an_admin(db: AsyncConnection, leaving_id: int) -> None:
    """Errors: 409 if nobody but this user is an active admin."""
    active = (users.c.role == "admin") & users.c.is_active
    admins = (await db.scalars(sa.select(users.c.id).where(active))).all()
    if list(admins) == [leaving_id]:
        raise ApiError(409, "last_admin", "The last active admin stays.")


todo = router(f"{API}/tasks", "tasks")
Rows = TypeVar("Rows", bound=BaseModel)
ORDER = {"priority": ["low", "medium", "high"], "status": ["todo", "in_progress", "done"]}


def task_filters(query: TaskQuery) -> list[sa.ColumnElement[bool]]:
    """The WHERE of a TaskQuery, owner apart."""
    column, moment = tasks.c, now()
    late = (column.due_date < moment) & (column.status != "done")
    wanted = [
        (query.deleted, column.deleted_at.is_not(None)),
        (not query.deleted, column.deleted_at.is_(None)),
        (query.status, column.status.in_(query.status)),
        (query.priority, column.priority.in_(query.priority)),
        (query.completed is True, column.status == "done"),
        (query.completed is False, column.status != "done"),
        (query.search, column.search_text.contains(folded(query.search or ""), autoescape=True)),
        (query.due_before, column.due_date <= (query.due_before or moment)),
        (query.due_after, column.due_date >= (query.due_after or moment)),
        (query.overdue is True, late),
        (query.overdue is False, sa.not_(sa.func.coalesce(late, False))),
    ]
    return [condition for is_wanted, condition in wanted if is_wanted]


def task_order(query: TaskQuery) -> list[Any]:
    """The ORDER BY of a TaskQuery; ties break by id, so that pages never overlap."""
    column: Any = tasks.c.search_text if query.sort == "title" else tasks.c[query.sort]
    if query.sort in ORDER:
        column = sa.case({name: place for place, name in enumerate(ORDER[query.sort])}, value=column)
    order = [column, tasks.c.id]
    order = [term.desc() for term in order] if query.order == "desc" else order
    return [tasks.c.due_date.is_(None), *order] if query.sort == "due_date" else order


async def page_of(
    request: Request, response: Response, query: PageQuery, model: type[Rows], statement: sa.Select[Any]
) -> Page[Rows]:
    """One page of a statement, its total, and the Link header. Ref: RFC 8288."""
    total_of = sa.select(sa.func.count()).select_from(statement.order_by(None).subquery())
    async with database.read() as db:
        total = (await db.execute(total_of)).scalar_one()
        rows = await db.execute(statement.limit(query.page_size).offset((query.page - 1) * query.page_size))
        data = [model.model_validate(row, from_attributes=True) for row in rows]
    pages = max(1, ceil(total / query.page_size))
    places = {"first": 1, "prev": min(query.page - 1, pages), "next": query.page + 1, "last": pages}
    kept = [(name, value) for name, value in request.query_params.multi_items() if name != "page"]
    path = request.scope.get("root_path", "") + request.url.path.removeprefix(request.scope.get("root_path", ""))
    links = [
        f'<{path}?{urlencode([*kept, ("page", page)])}>; rel="{rel}"'
        for rel, page in places.items()
        if 1 <= page <= pages
    ]
    response.headers["Link"] = ", ".join(links)
    return Page(data=data, meta=PageMeta(page=query.page, page_size=query.page_size, total=total, pages=pages))


@todo.get("")
async def list_tasks(
    request: Request,
    response: Response,
    user: CurrentUser,
    query: Annotated[TaskQuery, Query()],
    if_none_match: IfNoneMatch = None,
) -> Page[TaskPublic]:
    """The caller's tasks: filters are ANDed, the newest come first unless `sort` and `order` say otherwise.

    The weak ETag answers 304 to `If-None-Match` without running the query; an answer that depends on
    the clock (`overdue`) carries none.

    Errors: 304 unchanged
    Limit: read
    Ref: RFC 8288; RFC 9110 §13.1.2
    """
    if query.overdue is None:
        conditional(response, collection_etag(request, user), if_none_match)
    mine = sa.select(*TASK_COLUMNS).where(tasks.c.owner_id == user.id, *task_filters(query))
    return await page_of(request, response, query, TaskPublic, mine.order_by(*task_order(query)))


def tagged(response: Response, task: TaskPublic) -> TaskPublic:
    """The task, with its version as the ETag."""
    response.headers["ETag"] = f'"{task.version}"'
    return task


@todo.post("", status_code=201)
async def create_task(request: Request, response: Response, user: CurrentUser, body: TaskCreate) -> TaskPublic:
    """Create a task. `Location` is its path, `ETag` its version.

    Limit: write
    """
    async with changing(user.id) as transaction:
        task = await transaction.save("created", None, body.values())
    response.headers["Location"] = f"{request.scope.get('root_path', '')}{API}/tasks/{task.id}"
    return tagged(response, task)


Cursor = Annotated[str, Query(pattern=r"^[0-9]{1,19}(~[0-9]{1,19})?$")]


@todo.get("/changes")
async def list_changes(
    user: CurrentUser, since: Cursor = "0", limit: Annotated[int, Query(ge=1, le=1000)] = BATCH
) -> ChangesPublic:
    """Delta sync: what changed after `since`, trashed tasks included, oldest change first.

    Repeat with `next_since` while `has_more`, then whenever you like; `since=0` is a full snapshot.

    Errors: 410 resync_required, start again with `since=0`
    Limit: read
    """
    # A snapshot of several pages passes seqs below purged_seq on its way up. Its cursors name the purge
    # that the snapshot began after ("500~800"), and stay good until the next one.
    position, known_purge = (int(part) for part in f"{since}~0".split("~")[:2])
    if max(position, known_purge) > MAX_ID:
        raise invalid("since", "must be a seq")
    found = await changes_after(user.id, position, limit + 1)
    if found.stale(position, known_purge):
        raise resync_required()
    data, has_more = found.tasks[:limit], len(found.tasks) > limit
    last = data[-1].version if has_more else found.seq
    in_snapshot = last < found.purged_seq
    return ChangesPublic(data=data, next_since=f"{last}~{found.purged_seq}" if in_snapshot else last, has_more=has_more)


async def event_stream(
    user: CurrentUser,
    since: Annotated[Number | None, Query()] = None,
    last_event_id: Annotated[Number | None, Header()] = None,
) -> AsyncIterator[Stream]:
    """An open stream. Errors: 410, before the answer has begun."""
    async with open_stream(user, since if last_event_id is None else last_event_id) as stream:
        if stream.stale:
            raise resync_required()
        yield stream


@todo.get("/events", response_class=EventSourceResponse)
async def stream_events(stream: Annotated[Stream, Depends(event_stream)]) -> AsyncIterator[ServerSentEvent]:
    """Server-Sent Events: `created`, `updated`, `deleted`, each with its seq as id. Try `curl -N`.

    `Last-Event-ID` or `since` resumes; without either it starts now. A comment comes every 15 s.

    Errors: 410 resync_required
    Limit: read
    Ref: HTML Living Standard §9.2
    """
    # An id without data dispatches nothing, but a browser resumes from it even before the first event.
    yield ServerSentEvent(comment="connected", id=str(stream.cursor))
    async for frame in follow(stream):
        yield ServerSentEvent(event=frame.kind, raw_data=frame.text, id=None if frame.seq is None else str(frame.seq))


@todo.get("/statistics")
async def read_statistics(user: CurrentUser) -> Statistics:
    """Counts over the caller's tasks, the trash left out.

    Limit: read
    """
    moment = now()
    mine = (tasks.c.owner_id == user.id) & tasks.c.deleted_at.is_(None)
    unfinished_due = [tasks.c.status != "done", tasks.c.due_date.is_not(None)]
    days = [(moment - timedelta(days=back)).date() for back in reversed(range(30))]
    first_day = datetime.combine(days[0], datetime.min.time(), UTC)
    async with database.read() as db:
        groups = sa.select(tasks.c.status, tasks.c.priority, sa.func.count()).where(mine)
        counts = (await db.execute(groups.group_by(tasks.c.status, tasks.c.priority))).all()
        due = (
            await db.scalars(
                sa.select(tasks.c.due_date).where(mine, *unfinished_due, tasks.c.due_date <= moment + timedelta(days=7))
            )
        ).all()
        finished = await db.scalars(sa.select(tasks.c.completed_at).where(mine, tasks.c.completed_at >= first_day))
        per_day = Counter(completed_at.date() for completed_at in finished)
    total = sum(count for _, _, count in counts)
    by_status = {name: sum(count for status, _, count in counts if status == name) for name in ORDER["status"]}
    by_priority = {name: sum(count for _, priority, count in counts if priority == name) for name in ORDER["priority"]}
    return Statistics(
        total=total,
        by_status=by_status,
        by_priority=by_priority,
        overdue=sum(due_date < moment for due_date in due),
        due_in_7_days=sum(due_date >= moment for due_date in due),
        completion_rate=round(by_status["done"] / total, 4) if total else 0.0,
        completed_per_day=[DayCount(date=day.isoformat(), count=per_day[day]) for day in days],
    )


@todo.delete("/trash", status_code=204)
async def empty_trash(user: CurrentUser) -> None:
    """Delete the caller's trash for good, now.

    Limit: write
    """
    async with changing(user.id) as transaction:
        await transaction.purge(now())


@todo.get("/{task_id}")
async def read_task(task: OwnedTask, response: Response, if_none_match: IfNoneMatch = None) -> TaskPublic:
    """One task.

    Errors: 304 unchanged; 404 absent or not yours
    Limit: read
    """
    conditional(response, f'"{task.version}"', if_none_match)
    return task


@todo.put("/{task_id}")
async def replace_task(
    task_id: Id, response: Response, user: CurrentUser, body: TaskCreate, if_match: IfMatch = None
) -> TaskPublic:
    """Replace a task: what is left out goes back to its default.

    Errors: 404 absent or not yours; 412 stale version
    Limit: write
    Ref: RFC 9110 §13.1.1
    """
    async with changing(user.id) as transaction:
        before = await transaction.task(task_id, if_match)
        task = await transaction.save("updated", before, body.values())
    return tagged(response, task)


@todo.patch("/{task_id}")
async def update_task(
    task_id: Id, response: Response, user: CurrentUser, body: TaskUpdate, if_match: IfMatch = None
) -> TaskPublic:
    """Merge into a task: absent keeps, null clears.

    Errors: 404 absent or not yours; 412 stale version
    Limit: write
    Ref: RFC 7396; RFC 9110 §13.1.1
    """
    async with changing(user.id) as transaction:
        before = await transaction.task(task_id, if_match)
        task = await transaction.save("updated", before, body.values())
    return tagged(response, task)


@todo.delete("/{task_id}", status_code=204)
async def trash_task(task_id: Id, user: CurrentUser, if_match: IfMatch = None) -> None:
    """Move a task to the trash.

    Errors: 404 absent or not yours; 412 stale version
    Limit: write
    """
    async with changing(user.id) as transaction:
        before = await transaction.task(task_id, if_match)
        await transaction.save("deleted", before, {"deleted_at": now()})


@todo.post("/{task_id}/restore")
async def restore_task(task_id: Id, response: Response, user: CurrentUser, if_match: IfMatch = None) -> TaskPublic:
    """Take a task out of the trash.

    Errors: 404 absent, not yours or not in the trash; 412 stale version
    Limit: write
    """
    async with changing(user.id) as transaction:
        before = await transaction.task(task_id, if_match, trashed=True)
        task = await transaction.save("updated", before, {"deleted_at": None})
    return tagged(response, task)


live = APIRouter()
MAX_FRAME_BYTES = 64 * 1024
HELLO_SECONDS = 5.0


class Hello(Body):
    """The first frame of a socket that sent no Authorization header."""

    token: Text
    since: Number | None = None


class BadFrame(Exception):
    """A frame that ends the connection, with its WebSocket close code."""


async def read_text(socket: WebSocket) -> str:
    """The next text frame. Errors: BadFrame; WebSocketDisconnect. Ref: RFC 6455 §7.4.1."""
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1005))
    text = message.get("text")
    if text is None:
        raise BadFrame(1003, "only text frames are understood")
    if len(text.encode()) > MAX_FRAME_BYTES:
        raise BadFrame(1009, "a frame may have 64 KiB")
    return str(text)


async def authenticate_socket(socket: WebSocket, since: int | None) -> tuple[UserRow, int | None]:
    """The user, and where to resume: by header, or by a first frame within 5 s. Errors: BadFrame."""
    header = socket.headers.get("authorization")
    if header is None:
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                hello = Hello.model_validate_json(await read_text(socket))
        except TimeoutError:
            raise BadFrame(4401, "no token came within 5 seconds") from None
        except ValidationError as error:
            broken = any(item["type"] == "json_invalid" for item in error.errors())
            raise BadFrame(1007 if broken else 1003, 'the first frame is {"token": "…", "since": 17}') from None
        header, since = f"Bearer {hello.token}", hello.since
    user = await authenticate(header)
    if user is None:
        raise BadFrame(4401, "the token is not valid")
    return user, since


async def watch_peer(socket: WebSocket, stream: Stream) -> None:
    """After its first frame a peer has nothing to say: text that is JSON is ignored, all else ends the stream."""
    try:
        while True:
            json.loads(await read_text(socket))
    except BadFrame as bad:
        stream.close(*bad.args)
    except (ValueError, RecursionError):
        stream.close(1007, "a frame was not JSON")
    except WebSocketDisconnect:
        stream.close(1000, "")


@live.websocket("/ws/tasks/{client_id}")
async def watch_tasks(
    socket: WebSocket,
    client_id: Annotated[str, InPath(pattern=r"^[A-Za-z0-9._-]{1,64}$")],
    since: Annotated[Number | None, Query()] = None,
) -> None:
    """Live updates over a WebSocket; the protocol stands in the README. Ref: RFC 6455."""
    await socket.accept()
    try:
        user, since = await authenticate_socket(socket, since)
        socket.state.user = user
        async with open_stream(user, since, client_id) as stream:
            await socket.send_text(f'{{"type":"hello","seq":{stream.cursor}}}')
            peer = asyncio.create_task(watch_peer(socket, stream))
            try:
                async for frame in follow(stream):
                    await socket.send_text(frame.text)
            except SlowClient:
                stream.close(1013, "the peer did not read")
            finally:
                peer.cancel()
            raise BadFrame(*(stream.closing or (1000, "")))
    except BadFrame as end:
        await socket.close(*end.args)


admin = router(f"{API}/admin", "admin")


@admin.get("/users")
async def list_users(
    request: Request, response: Response, _admin: AdminUser, query: Annotated[PageQuery, Query()]
) -> Page[UserPublic]:
    """Every account, oldest first.

    Errors: 403 admin_required
    Limit: read
    """
    return await page_of(request, response, query, UserPublic, sa.select(users).order_by(users.c.id))


@admin.get("/users/{user_id}")
async def read_user(user_id: Id, _admin: AdminUser) -> UserPublic:
    """One account.

    Errors: 403 admin_required; 404 absent
    Limit: read
    """
    async with database.read() as db:
        row = (await db.execute(sa.select(users).where(users.c.id == user_id))).one_or_none()
    if row is None:
        raise not_found("user", user_id)
    return user_public(row)


@admin.get("/tasks")
async def list_all_tasks(
    request: Request, response: Response, _admin: AdminUser, query: Annotated[AdminTaskQuery, Query()]
) -> Page[TaskPublic]:
    """Every owner's tasks, with the filters of GET /tasks and `owner_id`.

    Errors: 403 admin_required
    Limit: read
    """
    owner = [tasks.c.owner_id == query.owner_id] if query.owner_id else []
    statement = sa.select(*TASK_COLUMNS).where(*owner, *task_filters(query)).order_by(*task_order(query))
    return await page_of(request, response, query, TaskPublic, statement)


health = router("/health", "health")


async def database_latency() -> float:
    """Milliseconds that one trivial query takes. Errors: 503."""
    began = time.perf_counter()
    async with database.read() as db:
        await db.execute(sa.select(1))
    return round((time.perf_counter() - began) * 1000, 2)


@health.get("")
@limited("unlimited")
async def read_health() -> Health:
    """Alive, and the database answers.

    Errors: 503 database_unavailable
    """
    await database_latency()
    return Health()


@health.get("/detailed")
@limited("unlimited")
async def read_health_detailed() -> HealthDetailed:
    """The same, with figures.

    Errors: 503 database_unavailable
    """
    return HealthDetailed(
        version=VERSION,
        uptime_seconds=int(time.monotonic() - started_at),
        database=DatabaseHealth(engine="sqlite", latency_ms=await database_latency()),
        live_connections=sum(len(feed.streams) for feed in feeds.values()),
        last_cleanup=last_cleanup,
    )


for resource in (auth, me, todo, live, admin, health):
    app.include_router(resource)


# ── 12 Command line ─────────────────────────────────────────────────────────────────────────────
# Everything here works beside a running server: the database's own locks are all it needs, and the
# server notices what changed within POLL_SECONDS.


class Server(uvicorn.Server):
    """Uvicorn, which ends the streams first: it would wait for them."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On Ctrl-C and SIGTERM."""
        end_streams()
        super().handle_exit(sig, frame)


def serve(reload: bool) -> None:
    """Listen, say where, and serve until Ctrl-C or SIGTERM."""
    logging.getLogger("uvicorn").setLevel("WARNING")
    options: Any = {
        "host": settings.host,
        "port": settings.port,
        "log_config": None,
        "access_log": False,
        "proxy_headers": False,
        "server_header": False,
        "ws_max_size": MAX_FRAME_BYTES,
        "ws_per_message_deflate": False,
        "timeout_graceful_shutdown": 5,
    }
    if reload:
        here = Path(__file__)
        uvicorn.run("app:app", reload=True, app_dir=str(here.parent), reload_includes=[here.name], **options)
        return
    config = uvicorn.Config(app, **options)
    listener = config.bind_socket()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{host}:{listener.getsockname()[1]}{settings.root_path}"
    announce(f"Onefile Tasks {VERSION}\n  Listening  {address}   (Ctrl-C ends it)\n  Docs       {address}/docs")
    with contextlib.suppress(KeyboardInterrupt):
        Server(config).run(sockets=[listener])


def ask_password() -> str:
    """A typed password, a line of standard input, or an empty one replaced by a generated one. Errors: SystemExit."""
    interactive = sys.stdin.isatty()
    typed = getpass.getpass("Password (empty: generate one): ") if interactive else sys.stdin.readline().rstrip("\n")
    if not typed:
        typed = new_token()
        announce(f"Password: {typed}")
    try:
        return str(TypeAdapter(Password).validate_python(typed))
    except ValidationError as error:
        raise SystemExit(f"password: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


async def create_user(name: str, is_admin: bool) -> None:
    """Create an account. Errors: SystemExit."""
    try:
        columns = new_user(username(name), hash_password(ask_password()), "admin" if is_admin else "user")
        async with database.write() as db:
            await db.execute(sa.insert(users).values(columns))
    except ValueError as error:
        raise SystemExit(f"username: {error}") from None
    except IntegrityError:
        raise SystemExit("username: is taken") from None
    announce(f"Created {columns['username']}, {columns['role']}.")


async def reset_password(name: str) -> None:
    """Set a new password and end every session of the account. Errors: SystemExit."""
    this = users.c.username_key == folded(name)
    password_hash = hash_password(ask_password())
    async with database.write() as db:
        user_id = await db.scalar(
            sa.update(users).where(this).values(password_hash=password_hash).returning(users.c.id)
        )
        if user_id is None:
            raise SystemExit("username: there is no such account")
        await db.execute(sa.delete(sessions).where(sessions.c.user_id == user_id))
    announce("The password is set and every session has ended.")


async def run_command(command: Coroutine[Any, Any, None]) -> None:
    """Run a command on the open database."""
    await open_database()
    try:
        await command
    finally:
        await database.close()


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="app.py", description="Onefile Tasks. Without a command it serves.")
    parser.add_argument("--reload", action="store_true", help="serve, and start again whenever app.py changes")
    commands = parser.add_subparsers(dest="command", metavar="command")
    create = commands.add_parser("create-user", help="create an account; the password is asked for")
    create.add_argument("name")
    create.add_argument("--admin", action="store_true", help="with the admin role")
    reset = commands.add_parser("reset-password", help="set a password and end every session of the account")
    reset.add_argument("name")
    arguments = parser.parse_args()
    match arguments.command:
        case "create-user":
            asyncio.run(run_command(create_user(arguments.name, arguments.admin)))
        case "reset-password":
            asyncio.run(run_command(reset_password(arguments.name)))
        case _:
            serve(arguments.reload)


if __name__ == "__main__":
    main()

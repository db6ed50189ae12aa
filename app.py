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
#   "sqlalchemy==2.1.9",
#   "sqlmodel==0.0.50",
#   "starlette==1.10.0",
#   "uvicorn==0.54.0",
#   "uvloop==0.23.0; sys_platform != 'win32'",
#   "websockets==17.4",
# ]
# ///

import argparse
import asyncio
import contextlib
import functools
import getpass
import hashlib
import ipaddress
import json
import logging
import os
import re
import secrets
import signal
import sys
import threading
import time
import unicodedata
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, Self, TypeVar
from urllib.parse import quote, urlencode

import bcrypt
import jwt
import limits
import pydantic
import sqlalchemy as sa
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Query, Request, Response, WebSocket, params
from fastapi.dependencies.utils import get_flat_params
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute, iter_route_contexts
from fastapi.security import OAuth2PasswordBearer, OAuth2PasswordRequestForm
from fastapi_offline import FastAPIOffline
from pydantic import MISSING, AfterValidator, BeforeValidator, SecretStr, StringConstraints, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from slowapi import Limiter
from sqlmodel import Field, SQLModel
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

VERSION = "1.0.0"
API = "/api/v1"
MAX_ID = 2**63 - 1  # SQLite and PostgreSQL integers end here; one more is an OverflowError in the driver.

log = logging.getLogger("onefile_tasks")
T = TypeVar("T")

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


RateLimit = Annotated[Any, AfterValidator(rate)]


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
    trusted_proxies: Annotated[str, AfterValidator(networks)] = ""
    docs: Literal["on", "off"] = "on"
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"


def valid_or_exit(make: Callable[[], T], name: str = "") -> T:
    """What no request brought. Errors: SystemExit with one line that names what is wrong, never its value."""
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
    """422, with every refused (field, message)."""
    details = [{"field": field, "message": message} for field, message in fields]
    return ApiError(422, "validation_failed", "; ".join(map(": ".join, fields)), details=details)


def resync_required() -> ApiError:
    """410: deletions after this cursor are forgotten, or it comes from another past."""
    return ApiError(410, "resync_required", "This cursor is stale. Start again with since=0.")


# ── 3 Database ──────────────────────────────────────────────────────────────────────────────────
# Work on the database is a plain function of a connection, run in a thread that belongs to it: four threads
# read, one writes. SQLite has one writer at a time, so this program has one, too; readers go on beside it
# (WAL) and cannot write at all. A request that is cancelled never tears a function from its transaction.


def sqlite_engine(path: Path, begin: str, pool_size: int, *pragmas: str) -> sa.Engine:
    """An engine on one file: connections are configured by `pragmas`, transactions start with `begin`."""
    options: Any = {"connect_args": {"isolation_level": None}, "hide_parameters": True}  # A log is no place for them.
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)), pool_size=pool_size, max_overflow=0, **options
    )

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


async def in_thread(pool: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> T:
    """Run a function beside the event loop; it ends even if the caller is cancelled."""
    return await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)


class Database:
    """The open database: `read` runs a function in a snapshot, `write` in a durable transaction."""

    readers, writers = ThreadPoolExecutor(4, "reader"), ThreadPoolExecutor(1, "writer")

    def open(self, directory: Path) -> None:
        """Open or create `tasks.db` in `directory`, readable by its owner alone. Errors: OSError."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = directory / "tasks.db"
        path.touch(0o600)
        self.reader = sqlite_engine(path, "BEGIN", 4, "query_only=ON")
        # FULL: an acknowledged write survives a power cut, not only a crash of this process.
        self.writer = sqlite_engine(path, "BEGIN IMMEDIATE", 1, "synchronous=FULL")

    def close(self) -> None:
        """Close every connection."""
        self.reader.dispose()
        self.writer.dispose()

    async def read(self, work: Callable[[sa.Connection], T]) -> T:
        """A snapshot: everything that `work` reads is of one moment."""
        return await in_thread(self.readers, within, self.reader, work)

    async def write(self, work: Callable[[sa.Connection], T]) -> T:
        """A transaction: committed before this returns, and so before any answer leaves, or rolled back."""
        return await in_thread(self.writers, within, self.writer, work)


database = Database()


async def fetch(statement: sa.Select[Any]) -> Sequence[sa.Row[Any]]:
    """All rows of one query."""
    return await database.read(lambda db: db.execute(statement).all())


async def execute(statement: sa.Update | sa.Delete) -> int:
    """One statement, committed. Returns how many rows it met."""
    return await database.write(lambda db: db.execute(statement).rowcount)


# ── 4 Tables ────────────────────────────────────────────────────────────────────────────────────
# Each table is two classes: the public half is also the answer that clients get, the private half never
# leaves. Queries speak SQLAlchemy Core, because one UPDATE … RETURNING is atomic where load-change-save
# is a race. AUTOINCREMENT: the id of something purged is never handed out again.

Status = Literal["todo", "in_progress", "done"]
Priority = Literal["low", "medium", "high"]


class Answer(SQLModel):
    """The base of everything that leaves: the string under a field is its description in /docs."""

    model_config = {"use_attribute_docstrings": True}
    __table_args__: Any = {"sqlite_autoincrement": True}


class UserPublic(Answer):
    """An account, as its owner and an admin see it."""

    id: int = Field(primary_key=True)
    username: str
    email: str | None
    role: Literal["user", "admin"] = Field(sa_type=sa.String)
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
    """Deleting the row ends the session with every token of it, access tokens included."""

    user_id: int = Field(foreign_key="users.id", ondelete="CASCADE", index=True)


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
    """The private half of a task: its texts, folded for searching and sorting."""

    search_text: str


tables = SQLModel.metadata.tables
users, sessions, refresh_tokens, tasks = (tables[name] for name in ("users", "sessions", "refresh_tokens", "tasks"))
sa.Index("ix_tasks_version", tasks.c.owner_id, tasks.c.version, unique=True)
sa.Index("ix_tasks_created_at", tasks.c.owner_id, tasks.c.deleted_at, tasks.c.created_at, tasks.c.id)
public_task = [tasks.c[name] for name in TaskPublic.model_fields]

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
    """Refuse what no database or UTF-8 encoder takes. Errors: ValueError."""
    if "\x00" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("must not contain NUL or lone surrogates")
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


def username(text: str) -> str:
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
Username = Annotated[str, Storable, AfterValidator(username)]
Password = Annotated[str, StringConstraints(min_length=8, max_length=256), Storable, AfterValidator(uncommon)]
a_username, a_password = pydantic.TypeAdapter(Username), pydantic.TypeAdapter(Password)
Email = Annotated[str, StringConstraints(max_length=254, pattern=r"^[^@\s]+@[^@\s]+$"), Storable]
Seq = Annotated[int, pydantic.Field(ge=0, le=MAX_ID)]
Item = TypeVar("Item", bound=SQLModel)


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

    def values(self) -> dict[str, Any]:
        """Every column that a caller may write."""
        return {"description": None, "status": "todo", "priority": "medium", "due_date": None} | super().values()


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


class Changes(Answer):
    """Changed tasks and tombstones, oldest change first."""

    data: list[TaskPublic]
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
# Pure functions. A password is stored as bcrypt, slow on purpose; a token is 256 random bits, which
# nobody guesses, so SHA-256 is enough to make a stolen database useless.

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


def decode_access_token(token: str) -> tuple[int, int] | None:
    """(user id, session id), or None for anything that is not a live access token of ours."""
    # Expiry is compared with now(), not by PyJWT, so that one clock rules and a test can set it.
    options: Any = {"require": ["sub", "sid", "typ", "iat", "exp", "jti"], "verify_exp": False, "verify_iat": False}
    try:
        claims = jwt.decode(token, settings.secret_key.get_secret_value(), ["HS256"], options, issuer=ISSUER)
        live = now().timestamp() < int(claims["exp"]) + CLOCK_LEEWAY_SECONDS and claims["typ"] == "access"
        return (int(claims["sub"]), int(claims["sid"])) if live else None
    except (jwt.PyJWTError, ValueError):
        return None


# ── 7 Dependencies ──────────────────────────────────────────────────────────────────────────────
# A route's signature reads as a list of requirements: CurrentUser, AdminUser, OwnedTask, TaskEdit.
# Who asks is found out once, before the body is read (section 8); these only insist on it.

Row = sa.Row[Any]
session_columns = sessions.c.id.label("session_id"), sessions.c.created_at.label("session_created_at")
principals = sa.select(users, *session_columns).join_from(sessions, users)
"""Users joined with their sessions: the one query that says who somebody is."""


def alive() -> sa.ColumnElement[bool]:
    """The sessions that still count."""
    return (sessions.c.expires_at > now()) & users.c.is_active


def still(user: Row) -> sa.ColumnElement[bool]:
    """For the WHERE of a write: who asked is still logged in, however long their body took to arrive."""
    return sa.and_(users.c.id == user.id, sa.exists().where(sessions.c.id == user.session_id, alive()))


async def authenticate(authorization: str | None) -> Row | None:
    """The user behind an Authorization header, joined with their session, or None."""
    scheme, _, token = (authorization or "").partition(" ")
    ids = decode_access_token(token.strip()) if scheme.lower() == "bearer" else None
    if ids is None:
        return None
    found = await fetch(principals.where(users.c.id == ids[0], sessions.c.id == ids[1], alive()))
    return found[0] if found else None


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
    if row := db.execute(mine).one_or_none():
        return TaskPublic(**row._mapping)
    raise not_found("task", task_id)


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
        self.request, self.headers, self.prefix = request, response.headers, request.scope["root_path"]
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


limiter = Limiter(lambda request: bucket_key(request.scope, None), strategy="moving-window")


def window(name: str, key: str) -> tuple[int, float, dict[str, str]]:
    """How many are left of a limit, when more come (Unix seconds), and its headers."""
    limit: limits.RateLimitItem = getattr(settings, f"rate_limit_{name}")
    reset, remaining = limiter.limiter.get_window_stats(limit, name, key)
    figures = {"Limit": limit.amount, "Remaining": max(0, remaining), "Reset": ceil(reset)}
    return remaining, reset, {f"X-RateLimit-{part}": str(figure) for part, figure in figures.items()}


def rate_limited(name: str, key: str) -> ApiError:
    """429. Ref: RFC 6585 §4."""
    _, reset, headers = window(name, key)
    seconds = max(1, ceil(reset - time.time()))
    message = f"Too many requests. Try again in {seconds} s."
    return ApiError(429, "rate_limited", message, headers | {"Retry-After": str(seconds)})


def enforce(scope: Scope, buckets: dict[str, str]) -> None:
    """Count against each limit: key, and leave the tightest for the answer's headers. Errors: 429."""
    if settings.rate_limits == "off" or "none" in buckets:
        return
    for name, key in buckets.items():
        if not limiter.limiter.hit(getattr(settings, f"rate_limit_{name}"), name, key):
            raise rate_limited(name, key)
    tightest = min((window(*bucket) for bucket in buckets.items()), key=lambda found: found[0])
    scope["state"]["headers"] = tightest[2]


class Route(APIRoute):
    """Every route of the API: who asks, the count, the query's names and the media type come before the body."""

    # openapi_extra={"x-rate-limit": "login"} counts a route against RATE_LIMIT_LOGIN too, per address; "none" frees it.

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, guarded. Errors: 415; 422 unknown query parameter; 429. Ref: RFC 9110 §15.5.16."""
        handle, elsewhere = super().get_route_handler(), (params.Path, params.Header)
        known = {p.alias for p in get_flat_params(self.dependant) if not isinstance(p.field_info, elsewhere)}
        bucket, extra = "read" if self.methods == {"GET"} else "write", (self.openapi_extra or {}).get("x-rate-limit")
        is_form = self.body_field is not None and isinstance(self.body_field.field_info, params.Form)
        types = r"application/x-www-form-urlencoded" if is_form else r"application/(.+\+)?json"
        hint = "a form: curl -d" if is_form else "JSON: curl --json, or Content-Type: application/json"

        async def _guarded(request: Request) -> Response:
            user = request.state.user = await authenticate(request.headers.get("authorization"))
            counts = {extra: bucket_key(request.scope, None)} if extra else {}
            enforce(request.scope, counts | {bucket: bucket_key(request.scope, user)})
            if not request.query_params.keys() <= known:
                raise invalid(("query", f"has an unknown parameter; known are: {', '.join(sorted(known)) or 'none'}"))
            media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
            if self.body_field and has_body and not re.fullmatch(types, media_type):
                raise ApiError(415, "unsupported_media_type", f"Send {hint}.")
            return await handle(request)

        return _guarded


router = functools.partial(APIRouter, route_class=Route)

# ── 9 Live updates ──────────────────────────────────────────────────────────────────────────────
# One number per user. A write takes the next seq inside its transaction; a stream is a cursor that
# sleeps until its user's seq has moved past it and then reads what it missed. No queue per connection:
# a slow peer falls behind and catches up, from a ring of recent changes or from the database.

RING_SIZE = 256
BATCH = 500
IDLE_SECONDS = 15.0
POLL_SECONDS = 2.0  # How late a stream notices another process's changes, a logout or a disabled account.


class Change(NamedTuple):
    """What a stream sends: a change of one task. Without a text it only moves the cursor (a purge)."""

    seq: int
    kind: str
    text: str


def change_of(task: TaskPublic, kind: str) -> Change:
    """A task as the change that left it so, encoded once for all streams."""
    kind = "deleted" if task.deleted_at else kind
    return Change(task.version, kind, f'{{"type":"{kind}","seq":{task.version},"task":{task.model_dump_json()}}}')


class Marks(NamedTuple):
    """A user's numbers at one moment, and their tasks that changed after a cursor, oldest change first."""

    seq: int
    purged_seq: int
    tasks: list[TaskPublic]

    def stale(self, since: int, known_purge: int = 0) -> bool:
        """Whether who has seen `since`, and knows of purges up to `known_purge`, has missed a deletion for ever."""
        return since > self.seq or (0 < since < self.purged_seq and self.purged_seq != known_purge)


async def changes_after(user_id: int, since: int, limit: int = BATCH) -> Marks:
    """`version > since ORDER BY version`, deletions included, in one snapshot. Errors: 401 if the user is gone."""
    this = sa.select(users.c.seq, users.c.purged_seq).where(users.c.id == user_id)
    changed = sa.select(*public_task).where(tasks.c.owner_id == user_id, tasks.c.version > since)
    ordered = changed.order_by(tasks.c.version).limit(limit)
    user, rows = await database.read(lambda db: (db.execute(this).one_or_none(), db.execute(ordered).all()))
    if user is None:
        raise unauthorized()
    return Marks(user.seq, user.purged_seq, [TaskPublic(**row._mapping) for row in rows])


class Feed:
    """The open streams of one user, and a ring of their last changes, without a gap up to the seq `last`."""

    def __init__(self) -> None:
        self.streams: set[Stream] = set()
        self.ring: deque[Change] = deque(maxlen=RING_SIZE)
        self.last = 0

    def publish(self, change: Change) -> None:
        """Append what a commit did."""
        if change.seq == self.last + 1:
            self.ring.append(change)
            self.last = change.seq
        self.observe(change.seq)

    def observe(self, seq: int) -> None:
        """The user is at `seq`; after a gap (another process wrote) the ring starts anew. Wakes the streams."""
        if seq > self.last:
            self.ring.clear()
            self.last = seq
        for stream in self.streams:
            stream.wake.set()


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
        marks = await changes_after(self.user_id, self.cursor)
        feed.observe(marks.seq)
        if self.stale or marks.stale(self.cursor, self.known_purge):
            self.stale, self.known_purge = False, marks.purged_seq
            return [Change(marks.seq, "resync_required", '{"type":"resync_required"}')]
        return [change_of(task, "updated") for task in marks.tasks] or [Change(marks.seq, "purged", "")]

    async def changes(self) -> AsyncIterator[Change]:
        """Everything after the cursor, in seq order, none twice, until closed; without a text when nothing happens."""
        while not self.closing[0]:
            self.wake.clear()
            for change in await self.missed():
                if self.closing[0]:
                    return
                self.cursor = change.seq
                yield change
            if self.cursor >= feeds[self.user_id].last:
                try:
                    await asyncio.wait_for(self.wake.wait(), IDLE_SECONDS)
                except TimeoutError:
                    yield Change(self.cursor, "idle", "")


@contextlib.asynccontextmanager
async def open_stream(user: Row, since: int | None, client_id: str | None = None) -> AsyncIterator[Stream]:
    """A registered stream; it replaces the user's other one with the same client_id. Errors: 401."""
    feed, stream = feeds.setdefault(user.id, Feed()), Stream(user, client_id)
    for other in [other for other in feed.streams if client_id and other.client_id == client_id]:
        other.close(4409, "replaced by a newer connection")
    feed.streams.add(stream)
    try:
        # Registered first, looked second: a commit in between is noticed by one or the other.
        marks = await changes_after(user.id, MAX_ID)
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
    streams = [stream for feed in feeds.values() for stream in feed.streams]
    wanted = sessions.c.id.in_({stream.session_id for stream in streams})
    seqs = {row.session_id: row.seq for row in await fetch(principals.where(wanted, alive()))} if streams else {}
    for stream in streams:
        if stream.session_id not in seqs:
            stream.close(4401, "the session has ended")
        elif (feed := feeds.get(stream.user_id, Feed())).last < seqs[stream.session_id]:
            feed.observe(seqs[stream.session_id])


class Transaction:
    """A change of one user's tasks, at the `seq` that it took."""

    def __init__(self, db: sa.Connection, user_id: int, seq: int) -> None:
        self.db, self.user_id, self.seq = db, user_id, seq
        self.change = Change(seq, "purged", "")

    def save(self, before: TaskPublic | None, values: dict[str, Any]) -> TaskPublic:
        """Write a new task, or new values of one, with all that follows from them."""
        moment = now()
        merged = (before.model_dump() if before else {"completed_at": None}) | values
        merged |= {"completed": merged["status"] == "done", "version": self.seq, "updated_at": moment}
        merged["completed_at"] = (merged["completed_at"] or moment) if merged["completed"] else None
        merged["search_text"] = folded(f"{merged['title']}\x1f{merged['description'] or ''}")
        new = {"owner_id": self.user_id, "attachments": 0, "created_at": moment} | merged
        written: Any = sa.update(tasks).where(tasks.c.id == before.id) if before else sa.insert(tasks)
        row = self.db.execute(written.values(merged if before else new).returning(*public_task)).one()
        task = TaskPublic(**row._mapping)
        self.change = change_of(task, "updated" if before else "created")
        return task

    def purge(self, until: datetime) -> int:
        """Delete the trash up to a moment for good, and remember the highest seq removed. Returns how many."""
        old = (tasks.c.owner_id == self.user_id) & (tasks.c.deleted_at <= until)
        highest = self.db.scalar(sa.select(sa.func.max(tasks.c.version)).where(old))
        if highest is not None:
            behind = (users.c.id == self.user_id) & (users.c.purged_seq < highest)
            self.db.execute(sa.update(users).where(behind).values(purged_seq=highest))
        return self.db.execute(sa.delete(tasks).where(old)).rowcount


async def changing(user_id: int, work: Callable[[Transaction], T], who: Any = True) -> T:
    """Take the user's next seq, do the work, commit, and then tell their streams. Errors: 401 if they are gone."""
    step = sa.update(users).where(users.c.id == user_id, who).values(seq=users.c.seq + 1).returning(users.c.seq)

    def transact(db: sa.Connection) -> tuple[T, Change]:
        seq = db.scalar(step)
        if seq is None:
            raise unauthorized()
        transaction = Transaction(db, user_id, seq)
        return work(transaction), transaction.change

    result, change = await database.write(transact)
    if feed := feeds.get(user_id):
        feed.publish(change)
    return result


# ── 10 Application ──────────────────────────────────────────────────────────────────────────────
# Start-up happens inside one write transaction, so that several processes may start at once. Around
# everything lies one ASGI layer of ours: FastAPI's handlers run inside its middleware and never see each
# other's failures, and only the outermost layer can put an id and the limits on every answer.

SEND_SECONDS = 20.0
CLEANUP_SECONDS = 3600.0
started_at = time.monotonic()
last_cleanup: dict[str, int | datetime] | None = None


class LogFormatter(logging.Formatter):
    """One line a record, as text for people or as JSON for machines."""

    def format(self, record: logging.LogRecord) -> str:
        """The time, what happened, and the traceback of a failure."""
        moment = now().isoformat(timespec="milliseconds").replace("+00:00", "Z")
        if settings.log_format == "text":
            return f"{moment} {super().format(record)}"
        trace = {"traceback": self.formatException(record.exc_info)} if record.exc_info else {}
        fields = getattr(record, "fields", {"message": record.getMessage()})
        return json.dumps({"time": moment, "level": record.levelname.lower()} | fields | trace)


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
        database.open(settings.data_dir)
        with database.writer.begin() as db:
            SQLModel.metadata.create_all(db)
            settings.secret_key = load_secret(settings.data_dir / "secret_key")
            first_start = db.scalar(sa.select(sa.func.count()).select_from(users)) == 0
            if first_start:
                db.execute(sa.insert(users).values(new_user(name, password, "admin")))
            if first_start and not given:
                print(f"  Admin      {name}, password {password}   (shown only now)", flush=True)  # noqa: T201
    except (OSError, sa.exc.DatabaseError) as error:
        raise SystemExit(f"DATA_DIR: {getattr(error, 'strerror', None) or getattr(error, 'orig', error)}") from None


async def clean_up() -> None:
    """Remove what has expired: sessions, used refresh tokens, trash older than TRASH_DAYS."""
    global last_cleanup
    moment, purged = now(), 0
    oldest = moment - timedelta(days=settings.trash_days)
    ended = await execute(sa.delete(sessions).where(sessions.c.expires_at <= moment))
    used = await execute(sa.delete(refresh_tokens).where(refresh_tokens.c.expires_at <= moment))
    for (owner_id,) in await fetch(sa.select(tasks.c.owner_id).where(tasks.c.deleted_at <= oldest).distinct()):
        purged += await changing(owner_id, lambda transaction: transaction.purge(oldest))
    last_cleanup = {"finished_at": now(), "sessions": ended, "refresh_tokens": used, "tasks": purged}


async def every(seconds: float, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do it again and again; after a failure the next turn tries anew."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except Exception:
            log.exception("background work failed")


def end_streams(server: Any = None, *event: Any) -> None:
    """Before the `server`'s own handler of a signal, which would wait for the streams. Ref: RFC 6455 §7.4.1."""
    for stream in [stream for feed in feeds.values() for stream in feed.streams]:
        stream.close(1001, "the server is going away")
    if callable(server):
        server(*event)


@contextlib.asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Start: logging, database, background work. Stop: end the streams, finish the writes, close."""
    log.handlers, log.propagate = [logging.StreamHandler()], False
    log.handlers[0].setFormatter(LogFormatter())
    log.setLevel(settings.log_level.upper())
    logging.getLogger("uvicorn.access").disabled = True  # It prints query strings, and so does uvicorn.error.
    logging.getLogger("uvicorn.error").addFilter(lambda entry: not re.search('UTF-8|"WebSocket', entry.getMessage()))
    open_database()
    print(f"  Data       {settings.data_dir.resolve() / 'tasks.db'}", flush=True)  # noqa: T201
    for number in (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ():
        signal.signal(number, functools.partial(end_streams, signal.getsignal(number)))
    chores = [asyncio.create_task(job) for job in (every(POLL_SECONDS, look_around), every(CLEANUP_SECONDS, clean_up))]
    yield
    end_streams()
    for chore in chores:
        chore.cancel()
    await asyncio.wait(chores)
    await in_thread(database.writers, database.close)  # The last of that thread's work: every write has ended.


def explain(error: Exception, path: str = "") -> ApiError:
    """Whatever was raised, as the error that a client sees. What they sent is not repeated."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        if any(each["type"] == "json_invalid" for each in error.errors()):
            return ApiError(400, "invalid_json", "The body is not valid JSON.")
        names = [".".join(map(str, each["loc"][1:] or each["loc"])) for each in error.errors()]
        return invalid(*zip(names, [each["msg"].removeprefix("Value error, ") for each in error.errors()], strict=True))
    if isinstance(error, sa.exc.OperationalError | sa.exc.TimeoutError) or type(error) is sa.exc.DatabaseError:
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


class SlowClient(Exception):
    """The peer has taken nothing for SEND_SECONDS."""


class Exchange:
    """One request or socket as the Gateway sees it: id, status, time, and a `send` that completes the answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method, self.path, self.raw_send = scope.get("method", "WEBSOCKET"), scope["path"], send
        self.raw_receive, self.transport = receive, getattr(getattr(receive, "__self__", None), "transport", None)
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        self.request_id = given if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else secrets.token_hex(8)
        self.state = {**scope.get("state", {}), "request_id": self.request_id, "user": None, "headers": {}}
        root = settings.root_path or scope.get("root_path", "")
        path = self.path.removesuffix("/") or "/"  # A proxy may have stripped ROOT_PATH or kept it.
        path = path if path.startswith(f"{API}/") else path.removeprefix(root)
        self.scope = {**scope, "state": self.state, "root_path": root, "path": root + path}
        self.scope |= {"method": "GET"} if self.method == "HEAD" else {}
        self.began, self.arrived_bytes, self.status, self.complete = time.perf_counter(), 0, 0, False

    async def receive(self) -> Message:
        """Measure a body as it arrives. Errors: 413. Ref: RFC 9110 §15.5.14."""
        message = await self.raw_receive()
        self.arrived_bytes += len(message.get("body", b""))
        if self.arrived_bytes > settings.max_body_kib * 1024:
            raise ApiError(413, "body_too_large", f"The body is larger than {settings.max_body_kib} KiB.")
        return message

    async def send(self, message: Message) -> None:
        """Put id and limits on the head, end a HEAD without its body, give up on a peer that does not read."""
        if self.complete:
            return
        self.status = message.get("status") or message.get("code") or self.status or 101
        if message["type"] in ("http.response.start", "websocket.accept"):
            for name, value in {"X-Request-ID": self.request_id, **self.state["headers"]}.items():
                MutableHeaders(scope=message).setdefault(name, value)
        elif message["type"] == "http.response.body":
            message = {"type": message["type"]} if self.method == "HEAD" else message
            self.complete = not message.get("more_body")
        try:
            async with asyncio.timeout(SEND_SECONDS + len(message.get("body", b"")) / 2**20):
                await self.raw_send(message)
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
                await error.response(self.request_id)(self.scope, self.receive, self.send)

    def log(self) -> None:
        """One line. The path is percent-encoded, so that it cannot forge another line, and has no query."""
        user, milliseconds = self.state["user"], round((time.perf_counter() - self.began) * 1000, 1)
        entry = {"request_id": self.request_id, "method": self.method, "path": quote(self.path), "status": self.status}
        entry |= {"milliseconds": milliseconds, "user_id": user.id if user else None}
        line = "{request_id} {method} {path} {status} {milliseconds} ms user {user_id}"
        log.info(line.format(**entry), extra={"fields": entry})


class Gateway:
    """The outermost ASGI layer: what holds for every request and socket, whatever happens inside."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request, and turn a failure into an error with the request's id."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        exchange = Exchange(scope, receive, send)
        try:
            await self.app(exchange.scope, exchange.receive, exchange.send)
        except WebSocketDisconnect:
            log.debug("%s the client is gone", exchange.request_id)
        except asyncio.CancelledError:
            await exchange.fail(ApiError(503, "server_stopping", "The server is stopping.", {"Retry-After": "5"}))
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


class TokenIssuer:
    """What every route that checks a password or hands out tokens needs; its answer is kept by no cache."""

    def __init__(self, request: Request, response: Response) -> None:
        self.address, self.agent = client_address(request.scope), request.headers.get("user-agent", "")[:200]
        response.headers["Cache-Control"] = "no-store"  # RFC 6749 §5.1

    def issue(self, db: sa.Connection, user_id: int, session: Row | None = None) -> TokenPair:
        """The first tokens of a new session, or the next ones of a session, which lives 180 days in all."""
        moment, token = now(), new_token()
        created_at = session.session_created_at if session else moment
        idle_until = moment + timedelta(days=settings.refresh_token_days)
        expiry = {"expires_at": min(idle_until, created_at + timedelta(days=SESSION_DAYS))}
        values = {"address": self.address, "user_agent": self.agent, "last_used_at": moment, "created_at": created_at}
        this = sessions.c.id == (session and session.session_id)
        written: Any = sa.update(sessions).where(this) if session else sa.insert(sessions)
        row = db.execute(written.values(user_id=user_id, **values, **expiry).returning(sessions.c.id))
        session_id = row.scalar_one()
        kept = {"session_id": session_id, "token_hash": token_hash(token)} | expiry
        db.execute(sa.insert(refresh_tokens).values(kept))
        access_token, seconds = encode_access_token(user_id, session_id), settings.access_token_minutes * 60
        return TokenPair(access_token=access_token, refresh_token=token, expires_in=seconds)

    async def verify(self, name: str, password: str, session_id: int | None = None) -> Row | None:
        """The user of that name, if the password is theirs; an unknown name costs the same time. Errors: 429.

        Failures count against the account, or against the session that asks; but not from an address
        that is logged in to the account, so that a stranger who exhausts the count locks nobody out.
        """
        key = folded(name)[:200]
        user = next(iter(await fetch(sa.select(users).where(users.c.username_key == key))), None)
        living = (sessions.c.user_id == (user and user.id)) & (sessions.c.expires_at > now())
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
        unchanged = sa.select(users.c.id).where(users.c.id == user.id, users.c.password_hash == user.password_hash)

        def start(db: sa.Connection) -> TokenPair:
            if db.scalar(unchanged) is None:
                raise unauthorized("invalid_credentials", "The password has just changed.")
            return self.issue(db, user.id)

        return await database.write(start)


Issuer = Annotated[TokenIssuer, Depends()]


def try_password(account: str | None, password: str, password_hash: str | None) -> bool:
    """Compare, and count a failure against an account. Nobody's password costs the same hash. Errors: 429."""
    limit, spent = settings.rate_limit_account, limiter.limiter
    if account and not spent.test(limit, "account", account):
        raise rate_limited("account", account)
    matches = password_matches(password, password_hash) if password_hash else not hash_password(password)
    if account and not matches and not spent.hit(limit, "account", account):
        raise rate_limited("account", account)
    return matches


@auth.post("/register", status_code=201, openapi_extra={"x-rate-limit": "register"})
async def register(body: Registration, issuer: Issuer) -> Registered:
    """Create an account and log in.

    Errors: 403 registration_closed; 409 username_taken
    Limit: register per address
    """
    if settings.registration == "closed":
        raise ApiError(403, "registration_closed", "Registration is closed here. Ask the admin for an account.")
    columns = await in_thread(password_workers, new_user, body.username, body.password, "user", body.email)

    def create(db: sa.Connection) -> Registered:
        user = db.execute(sa.insert(users).values(columns).returning(users)).one()
        return Registered(**issuer.issue(db, user.id).model_dump(), user=UserPublic(**user._mapping))

    try:
        return await database.write(create)
    except sa.exc.IntegrityError:
        raise ApiError(409, "username_taken", "This username is taken.") from None


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

    def rotate(db: sa.Connection) -> TokenPair | None:
        session_id = db.scalar(use)
        session = db.execute(principals.where(sessions.c.id == session_id, alive())).one_or_none()
        if session is not None:
            return issuer.issue(db, session.id, session)
        lost = sa.select(column.session_id).where(this, replayed)
        db.execute(sa.delete(sessions).where(sessions.c.id.in_(lost)))
        return None

    if tokens := await database.write(rotate):
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
    """End every session of the caller."""
    await execute(sa.delete(sessions).where(sessions.c.user_id == user.id))


@auth.get("/sessions")
async def list_sessions(user: CurrentUser) -> Collection[SessionListed]:
    """The caller's logins, last used first."""
    mine = sa.select(sessions).where(sessions.c.user_id == user.id, sessions.c.expires_at > now())
    rows = await fetch(mine.order_by(sessions.c.last_used_at.desc(), sessions.c.id.desc()))
    return Collection(data=[SessionListed(**row._mapping, current=row.id == user.session_id) for row in rows])


@auth.delete("/sessions/{session_id}", status_code=204)
async def end_session(session_id: Id, user: CurrentUser) -> None:
    """End one login. Errors: 404 absent or not yours."""
    if not await execute(sa.delete(sessions).where(sessions.c.id == session_id, sessions.c.user_id == user.id)):
        raise not_found("session", session_id)


account = router(prefix=f"{API}/users/me", tags=["users"])


@account.get("")
async def read_account(user: CurrentUser) -> UserPublic:
    """The caller's account."""
    return UserPublic(**user._mapping)


@account.patch("")
async def update_account(body: UserUpdate, user: CurrentUser, issuer: Issuer) -> UserPublic:
    """Change e-mail or password; a new password needs `current_password` and ends the other sessions.

    Errors: 403 wrong_password
    Limit: account, failures only
    """
    values, others = body.model_dump(include={"email"}), sa.false()
    if body.password is not MISSING and body.current_password is not MISSING:
        if await issuer.verify(user.username, body.current_password, user.session_id) is None:
            raise ApiError(403, "wrong_password", "current_password is wrong.")
        values["password_hash"] = await in_thread(password_workers, hash_password, body.password)
        others = (sessions.c.user_id == user.id) & (sessions.c.id != user.session_id)
    changed = sa.update(users).where(still(user)).values(values or {"is_active": True}).returning(users)

    def change(db: sa.Connection) -> Row:
        db.execute(sa.delete(sessions).where(others))
        if row := db.execute(changed).one_or_none():
            return row
        raise unauthorized()

    return UserPublic(**(await database.write(change))._mapping)


@account.delete("", status_code=204)
async def delete_account(user: CurrentUser) -> None:
    """Delete the account with everything in it.

    Errors: 403 login_again when the session is older than 10 minutes; 409 last_admin
    """
    if now() - user.session_created_at > timedelta(minutes=10):
        raise ApiError(403, "login_again", "Log in again: this needs a session younger than 10 minutes.")
    admins = sa.select(users.c.id).where(users.c.role == "admin", users.c.is_active)

    def leave(db: sa.Connection) -> None:
        if list(db.scalars(admins)) == [user.id]:
            raise ApiError(409, "last_admin", "The last active admin stays.")
        db.execute(sa.delete(users).where(users.c.id == user.id))

    await database.write(leave)


todo = router(prefix=f"{API}/tasks", tags=["tasks"])
ORDER = {"status": ("todo", "in_progress", "done"), "priority": ("low", "medium", "high")}


def filtered(query: TaskQuery) -> sa.Select[Any]:
    """The WHERE and ORDER BY of a TaskQuery. Ties break by id, so that pages never overlap."""
    column, late = tasks.c, ~tasks.c.completed & (tasks.c.due_date < now())
    place = column.deleted_at.is_not(None) if query.deleted else column.deleted_at.is_(None)
    terms: dict[str, Callable[[Any], Any]] = {
        "status": column.status.in_,
        "priority": column.priority.in_,
        "completed": lambda completed: column.completed == completed,
        "search": lambda search: column.search_text.contains(folded(search), autoescape=True),
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


@todo.post("", status_code=201)
async def create_task(user: CurrentUser, body: TaskCreate, reply: Answering) -> TaskPublic:
    """Create a task. `Location` is its path, `ETag` its version."""
    task = await changing(user.id, lambda transaction: transaction.save(None, body.values()), still(user))
    reply.headers.update({"Location": f"{reply.path}/{task.id}", "ETag": f'"{task.version}"'})
    return task


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
    marks = await changes_after(user.id, int(position), limit + 1)
    if marks.stale(int(position), int(known_purge or 0)):
        raise resync_required()
    data, has_more = marks.tasks[:limit], len(marks.tasks) > limit
    last = data[-1].version if has_more else marks.seq
    next_since = f"{last}~{marks.purged_seq}" if last < marks.purged_seq else last
    return Changes(data=data, next_since=next_since, has_more=has_more)


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

    async def save(self, values: dict[str, Any], trashed: bool = False) -> TaskPublic:
        """Find, check, write. Errors: 404 absent, not yours or on the other side of the trash; 412 stale version."""

        def edit(transaction: Transaction) -> TaskPublic:
            before = find_task(transaction.db, self.task_id, self.user.id, trashed)
            if self.if_match is not None and not etag_matches(self.if_match, f'"{before.version}"'):
                raise ApiError(412, "version_mismatch", f'The task is at version "{before.version}" now.')
            return transaction.save(before, values)

        task = await changing(self.user.id, edit, still(self.user))
        self.reply.headers["ETag"] = f'"{task.version}"'
        return task


Edit = Annotated[TaskEdit, Depends()]


@todo.put("/{task_id}")
async def replace_task(edit: Edit, body: TaskCreate) -> TaskPublic:
    """Replace a task: what is absent goes back to its default.

    Errors: 404 absent or not yours; 412 stale version
    Ref: RFC 9110 §13.1.1
    """
    return await edit.save(body.values())


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


@admin.get("/users/{user_id}")
async def read_user(user_id: Id, _admin: AdminUser) -> UserPublic:
    """One account. Errors: 403 admin_required; 404 absent."""
    for row in await fetch(sa.select(users).where(users.c.id == user_id)):
        return UserPublic(**row._mapping)
    raise not_found("user", user_id)


@admin.get("/tasks")
async def list_all_tasks(_admin: AdminUser, query: AdminFilters, reply: Answering) -> Page[TaskPublic]:
    """Every owner's tasks, with the filters of GET /tasks and `owner_id`. Errors: 403 admin_required."""
    owner = [tasks.c.owner_id == query.owner_id] if query.owner_id else []
    return await reply.page(query, TaskPublic, filtered(query).where(*owner))


health = router(prefix="/health", tags=["health"])


@health.get("", openapi_extra={"x-rate-limit": "none"})
async def read_health() -> Health:
    """Alive, and the database answers. Errors: 503 database_unavailable."""
    await fetch(sa.select(users.c.id).limit(1))
    return Health()


@health.get("/detailed", openapi_extra={"x-rate-limit": "none"})
async def read_health_detailed() -> HealthDetailed:
    """The same, with figures. Errors: 503 database_unavailable."""
    began = time.perf_counter()
    await fetch(sa.select(users.c.id).limit(1))
    figures: Any = {"engine": "sqlite", "latency_ms": round((time.perf_counter() - began) * 1000, 2)}
    values: Any = {"uptime_seconds": int(time.monotonic() - started_at), "last_cleanup": last_cleanup}
    streams = sum(len(feed.streams) for feed in feeds.values())
    return HealthDetailed(version=VERSION, database=figures, live_connections=streams, **values)


for resource in (auth, account, todo, live, admin, health):
    app.include_router(resource)

# ── 12 Command line ─────────────────────────────────────────────────────────────────────────────
# Every command works beside a running server: the database's own locks are all that they need, and the
# server notices within POLL_SECONDS.


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


def set_account(name: str, role: str | None) -> None:
    """Create an account, or without a role set a new password and end every session. Errors: SystemExit."""
    typed = getpass.getpass("Password (empty: generated): ") if sys.stdin.isatty() else sys.stdin.readline().strip("\n")
    password = valid_or_exit(lambda: a_password.validate_python(typed or new_token()), "password")
    columns = new_user(valid_or_exit(lambda: a_username.validate_python(name), "name"), password, role or "user")
    open_database()
    this = users.c.username_key == columns["username_key"]
    with database.writer.begin() as db:
        known = db.scalar(sa.select(users.c.id).where(this))
        if bool(known) == bool(role):  # A new account needs a free name, a new password a known one.
            raise SystemExit(f"name: {name} {'is taken' if known else 'does not exist'}")
        if known is None:
            db.execute(sa.insert(users).values(columns))
        else:
            db.execute(sa.delete(sessions).where(sessions.c.user_id == known))
            db.execute(sa.update(users).where(this).values(password_hash=columns["password_hash"]))
    database.close()
    print("Done." if typed else f"Done. The password is {password}")  # noqa: T201


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="app.py", description="Onefile Tasks. Without a command, it serves.")
    parser.add_argument("command", nargs="?", choices=["create-user", "reset-password"], help="asks for the password")
    parser.add_argument("name", nargs="?", help="of the account; a reset ends all its sessions")
    parser.add_argument("--admin", action="store_true", help="create-user: with the role admin")
    parser.add_argument("--reload", action="store_true", help="serve: start again whenever app.py changes")
    arguments = parser.parse_args()
    if arguments.command and not arguments.name:
        parser.error("a command needs a name")
    if arguments.command:
        role = {"create-user": "admin" if arguments.admin else "user"}.get(arguments.command)
        set_account(arguments.name, role)
    else:
        serve(arguments.reload)


if __name__ == "__mp_main__":  # A child of --reload has run this file already: let it not define the tables again.
    sys.modules["app"] = sys.modules["__mp_main__"]
if __name__ == "__main__":
    main()

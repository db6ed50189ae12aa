"""Runs test_app.py against a PostgreSQL and a Redis of its own; each test finds both empty.

Run    PYTHONPATH=.ci python -m pytest -p on_postgresql test_app.py
Needs  what Debian calls postgresql and redis-server, and deploy/requirements.txt
"""

import asyncio
import contextlib
import importlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))
import services

NAME = "tasks"
UPGRADED = "upgraded"
SECRET_KEY = "of on_postgresql.py, for its own databases alone"  # noqa: S105

running = contextlib.ExitStack()
postgresql: services.PostgreSQL
variables: dict[str, str] = {}


def pytest_configure() -> None:
    """Start both, and name them in the environment, before anything imports app.py."""
    global postgresql
    folder = running.enter_context(tempfile.TemporaryDirectory())
    started = services.services(Path(folder), durable=False)
    try:
        postgresql, redis = running.enter_context(started)
    except RuntimeError as error:  # What is missing, or why it does not start.
        raise pytest.UsageError(str(error)) from None
    variables["DATABASE_URL"] = postgresql.fresh(NAME)
    variables["REDIS_URL"] = redis.url
    variables["SECRET_KEY"] = SECRET_KEY
    os.environ.update(variables)


def pytest_unconfigure() -> None:
    """Stop both, and leave nothing."""
    running.close()


@pytest.fixture(scope="session")
def empty_redis() -> Callable[[], None]:
    """Forget everything in Redis."""
    redis_py: Any = importlib.import_module("redis")
    client = redis_py.Redis.from_url(variables["REDIS_URL"])
    return client.flushall  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def template() -> str:
    """A database with app.py's tables, which is copied faster than they are created."""
    import app

    async def upgrade() -> None:
        await app.database.open()
        await app.database.close()

    asyncio.run(upgrade())
    postgresql.sql(f"ALTER DATABASE {NAME} RENAME TO {UPGRADED}")
    return UPGRADED


@pytest.fixture(autouse=True)
def on_both(
    configure: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    empty_redis: Callable[[], None],
    template: str,
) -> None:
    """What `configure` set to a default is set to the two services; no start outruns Redis."""
    import app
    import test_app

    @contextlib.asynccontextmanager
    async def started(application: Any) -> AsyncIterator[Any]:
        async with lifespan(application) as state:
            # No event tells of it.
            while not app.redis.well and app.settings.redis_url == variables["REDIS_URL"]:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            yield state

    empty_redis()
    postgresql.fresh(NAME, template)
    lifespan = app.app.router.lifespan_context
    monkeypatch.setattr(app.app.router, "lifespan_context", started)
    monkeypatch.setattr(app, "redis", app.Redis())
    monkeypatch.setattr(app, "REDIS_SECONDS", test_app.DEADLINE)  # The machine may be busy.
    monkeypatch.setattr(app, "REDIS_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(test_app, "SERVICES", variables)
    configure(**{name.lower(): value for name, value in variables.items()})

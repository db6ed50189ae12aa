"""The backup that deploy/README.md describes for PostgreSQL. Needs what bench/services.py needs."""

# ruff: noqa: D103, S101, S603, S607

import os
import re
import secrets
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import services
from conftest import API, PASSWORD, ROOT, Server

README = (ROOT / "deploy" / "README.md").read_text()


def run(pattern: str, folder: Path, url: str) -> None:
    """The one command of deploy/README.md that begins so."""
    (command,) = re.findall(rf"(?m)^({pattern} .*)", README)
    command = command.replace("=deploy/", f"={ROOT}/deploy/")
    environment = {"PATH": os.environ["PATH"], "DATABASE_URL": url}
    subprocess.run(["sh", "-c", command], cwd=folder, env=environment, check=True)


@pytest.fixture
def url() -> Iterator[str]:
    with (
        tempfile.TemporaryDirectory() as folder,
        services.services(Path(folder), durable=False) as (postgresql, _),
    ):
        yield postgresql.fresh("tasks")


def test_a_restored_backup_fits_no_token_or_cursor_of_another_past(url: str, tmp_path: Path):
    account = {"username": "user", "password": PASSWORD}
    settings = {"DATABASE_URL": url, "SECRET_KEY": secrets.token_hex(32)}
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder, "", settings)
    with httpx.Client(base_url=server.url, trust_env=False) as web:
        tokens = web.post(f"{API}/auth/register", json=account).json()
        web.headers["Authorization"] = f"Bearer {tokens['access_token']}"
        kept = web.post(f"{API}/tasks", json={"title": "In the backup"}).json()
        run("pg_dump", tmp_path, url)
        lost = web.post(f"{API}/tasks", json={"title": "After it"}).json()
    server.close()
    run("pg_restore", tmp_path, url)
    run("psql", tmp_path, url)
    server = Server(folder, "", settings)
    with httpx.Client(base_url=server.url, trust_env=False) as web:
        old = {"Authorization": f"Bearer {tokens['access_token']}"}
        assert web.get(f"{API}/tasks", headers=old).status_code == 401
        refresh = {"refresh_token": tokens["refresh_token"]}
        assert web.post(f"{API}/auth/refresh", json=refresh).status_code == 401
        tokens = web.post(f"{API}/auth/login", json=account).json()
        web.headers["Authorization"] = f"Bearer {tokens['access_token']}"
        assert [each["id"] for each in web.get(f"{API}/tasks").json()["data"]] == [kept["id"]]
        assert web.get(f"{API}/tasks/changes?since={lost['version']}").status_code == 410
        snapshot = web.get(f"{API}/tasks/changes?since=0").json()
        new = web.post(f"{API}/tasks", json={"title": "Of the new past"}).json()
        assert new["id"] > 2**40
        assert new["version"] == snapshot["next_since"] + 1
        assert web.get(f"{API}/tasks/{new['id']}").json() == new
    server.close()

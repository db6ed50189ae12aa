"""PostgreSQL and Redis of one's own: on free ports, in a folder of one's own, as an ordinary user.

Used by bench/scale.py and by the tests of .ci/ that need both. What Debian calls postgresql and
redis-server has to be installed; nothing of an installed server is touched.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEADLINE_SECONDS = 30
ROLE = "tasks"
LOCALE = "C.UTF-8"


def free_port() -> int:
    """A port that nobody listens on now."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def program(name: str) -> str:
    """Where a program is; Debian keeps PostgreSQL's out of the path. Errors: RuntimeError."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda it: it.parent.name)
    for directory in [*reversed(versions), ""]:
        found = shutil.which(str(Path(directory, name)))
        if found:
            return found
    raise RuntimeError(f"{name} is missing: apt-get install postgresql redis-server")


def ordinary_user(directory: Path) -> list[str]:
    """What a command begins with, so that it runs as nobody where this is root."""
    if os.geteuid() != 0:
        return []
    shutil.chown(directory, "nobody", "nogroup")
    return ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]


class Service:
    """A server in a folder of its own, which can be stopped and started again on its port."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.directory.mkdir()
        self.as_user = ordinary_user(directory)
        self.port = free_port()
        self.log = directory / "log.txt"
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, *command: str) -> None:
        """Run a program to its end. Errors: RuntimeError with what it said."""
        done = subprocess.run([*self.as_user, *command], cwd=self.directory, capture_output=True)
        if done.returncode:
            raise RuntimeError(f"{command[0]}: {(done.stdout + done.stderr).decode()[-2000:]}")

    def spawn(self, *command: str) -> None:
        """Start the server, and wait until it answers. Errors: RuntimeError."""
        with self.log.open("ab") as log:
            said: Any = {"stdout": log, "stderr": log, "stdin": subprocess.DEVNULL}
            arguments = [*self.as_user, *command]
            self.process = subprocess.Popen(arguments, cwd=self.directory, **said)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not self.answers():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"{command[0]}: {self.log.read_text()[-2000:]}")
            time.sleep(0.02)

    def answers(self) -> bool:
        """Whether it takes connections."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def stop(self, signal: int = 2) -> None:
        """End it, at once if not told otherwise (SIGINT): connections are cut."""
        if self.process:
            self.process.send_signal(signal)
            self.process.wait(DEADLINE_SECONDS)
            self.process = None


class PostgreSQL(Service):
    """A cluster without a password. `durable=False` spares the disk: for tests alone."""

    def __init__(self, directory: Path, durable: bool = True) -> None:
        super().__init__(directory)
        self.options = ["listen_addresses=127.0.0.1", "max_connections=200"]
        self.options.append("unix_socket_directories=")
        if not durable:
            self.options += ["fsync=off", "full_page_writes=off"]
        data = str(directory / "data")
        self.run(program("initdb"), "-D", data, "-U", ROLE, "-A", "trust", f"--locale={LOCALE}")
        self.start()

    def start(self) -> None:
        """Serve. Errors: RuntimeError."""
        options = [word for option in self.options for word in ("-c", option)]
        data = str(self.directory / "data")
        self.spawn(program("postgres"), "-D", data, "-p", str(self.port), *options)

    def answers(self) -> bool:
        """Whether it takes statements."""
        ready = [program("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(ready).returncode == 0

    def url(self, database: str) -> str:
        """DATABASE_URL of a database of this name."""
        return f"postgresql://{ROLE}@127.0.0.1:{self.port}/{database}"

    def sql(self, statement: str, database: str = "postgres") -> str:
        """What a statement prints. Errors: RuntimeError."""
        command = [program("psql"), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"]
        command += ["-d", self.url(database), "-c", statement]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stdout.strip()

    def fresh(self, name: str, template: str = "template1") -> str:
        """A new database, a copy of another one: its DATABASE_URL."""
        self.sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        self.sql(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url(name)


class Redis(Service):
    """A Redis that keeps nothing."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.start()

    def start(self) -> None:
        """Serve. Errors: RuntimeError."""
        port = str(self.port)
        options = ["--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self.spawn(program("redis-server"), *options)

    @property
    def url(self) -> str:
        """REDIS_URL."""
        return f"redis://127.0.0.1:{self.port}"


@contextlib.contextmanager
def services(directory: Path, durable: bool = True) -> Iterator[tuple[PostgreSQL, Redis]]:
    """Both, until the block ends."""
    os.chmod(directory, 0o711)  # noqa: S103 - nobody has to reach what lies in it
    with contextlib.ExitStack() as running:
        postgresql = PostgreSQL(directory / "postgresql", durable)
        running.callback(postgresql.stop)
        redis = Redis(directory / "redis")
        running.callback(redis.stop)
        yield postgresql, redis

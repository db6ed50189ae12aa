"""Take your tasks out of a Onefile Tasks server, or put them into one, over HTTP.

Run    transfer.py export > tasks.jsonl          one task a line, as the API shows it
       transfer.py export --csv > tasks.csv      for a spreadsheet, not for importing
       transfer.py import tasks.jsonl            "-" reads standard input

ONEFILE_TOKEN is an API token (`python app.py token NAME` makes one), ONEFILE_URL the server,
http://localhost:8000 if unset. Trash and attachments stay behind; owner, ids, versions and times
are new where tasks arrive. A line needs no more than a title. What an import has brought is known
again: run it once more, after an interruption say, and only what is missing is added.

Ends with 0; 1 if lines were refused, the others are in; 2 if it could not go on; 130 after Ctrl-C.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["httpx"]
# ///

import argparse
import codecs
import csv
import hashlib
import io
import json
import os
import re
import stat
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

try:
    import httpx
except ModuleNotFoundError:
    sys.exit("transfer.py needs httpx: run it with the server's Python, .venv/bin/python")

PAGE_SIZE = 500
REQUESTS_AT_ONCE = 8
LINES_AHEAD = 64  # That many lines wait for a request, or for the answer to an earlier line.
TIMEOUT_SECONDS = 30.0
PAUSES_SECONDS = [1, 2, 4, 8]  # Before each new try when nobody answers; then it gives up.
MAX_LINE_BYTES = 2**20  # The largest task takes 130 KB, every character of it escaped.
TERMINAL_COLUMNS = 79
HINT = "`python app.py token NAME` makes one."

# What an import sends beside the title, with the API's defaults; what belongs to the old instance.
DEFAULTS = {"description": None, "status": "todo", "priority": "medium", "due_date": None}
TIMES = ["created_at", "updated_at", "completed_at", "deleted_at"]
PASSED_OVER = ["id", "owner_id", "version", "attachments", *TIMES]

# White space and what has no width, then what begins a formula. Ref: OWASP, CSV Injection
FORMULA = re.compile(
    r"[\s\x00-\x20\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]*"
    r"[=+\-@|%\uff1d\uff0b\uff0d\uff20\uff5c\uff05]|[\t\r\n]"
)


class Stop(Exception):
    """It cannot go on. The text says why and, where there is one, the next step."""


class Refused(Stop):
    """The server refuses this task, but takes others."""


# ── What people see ─────────────────────────────────────────────────────────────────────────────


def say(text: str) -> None:
    """Write a line to standard error, over the progress bar if there is one."""
    if sys.stderr.isatty():
        text = f"\r{text:<{TERMINAL_COLUMNS}}"
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


class Progress:
    """A bar on standard error if that is a terminal; `whole` is 0 if nobody knows the end."""

    def __init__(self, whole: int, visible: bool = True) -> None:
        self.whole = whole
        self.visible = visible and sys.stderr.isatty()
        self.next_at = 0.0

    def show(self, done: int, text: str) -> None:
        """Draw it, ten times a second at most."""
        if self.visible and time.monotonic() >= self.next_at:
            self.next_at = time.monotonic() + 0.1
            filled = min(20, 20 * done // max(self.whole, 1))
            bar = f"[{'#' * filled:.<20}] " if self.whole else ""
            sys.stderr.write(f"\r{bar + text:<{TERMINAL_COLUMNS}}\r")
            sys.stderr.flush()


# ── The server ──────────────────────────────────────────────────────────────────────────────────


def message_of(response: httpx.Response) -> str:
    """What an error says, if it is one of Onefile Tasks; else "HTTP" and its status."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        where = response.headers.get("Location", "")
        return f"HTTP {response.status_code} {response.reason_phrase} {where}".strip()


class Server:
    """The API of a server, for several threads."""

    def __init__(self, url: str, token: str) -> None:
        """Of the environment's ONEFILE_URL and ONEFILE_TOKEN. Errors: Stop."""
        self.url = url.strip().rstrip("/").removesuffix("/api/v1")
        self.told: set[str] = set()
        if not re.fullmatch("[!-~]+", token.strip()):
            what = "holds what no token has" if token.strip() else "is not set"
            raise Stop(f"ONEFILE_TOKEN {what}: {HINT}")
        if not re.match("https?://[^/]", self.url):
            raise Stop(f"ONEFILE_URL is {url}: it wants http:// or https:// and a host")
        headers = {"Authorization": f"Bearer {token.strip()}"}
        try:
            self.client = httpx.Client(
                base_url=f"{self.url}/api/v1", headers=headers, timeout=TIMEOUT_SECONDS
            )
        except httpx.InvalidURL as error:
            raise Stop(f"ONEFILE_URL is {url}: {error}") from None

    def tell(self, text: str) -> None:
        """Say it the first time only."""
        if text not in self.told:
            self.told.add(text)
            say(text)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The answer, a success or 410. Waits out 429, and tries again what may be passing.

        A request that is sent twice does no harm: see `key_of`. Errors: Refused; Stop.
        """
        pauses = list(PAUSES_SECONDS)
        while True:
            try:
                response = self.client.request(method, path, **options)
                status = response.status_code
                if status == 429:
                    self.tell("The server's rate limit is reached; waiting as long as it says.")
                    seconds = response.headers.get("Retry-After", "")
                    time.sleep(int(seconds) if re.fullmatch("[0-9]{1,5}", seconds) else 1)
                    continue
                if status not in (502, 503, 504):
                    return self.usable(response)
                trouble = message_of(response)
            except httpx.RequestError as error:
                trouble = f"no answer ({error or type(error).__name__})"
            if not pauses:
                raise Stop(f"{self.url}: {trouble}. Is it running, and ONEFILE_URL right?")
            self.tell(f"{self.url}: {trouble}; trying again.")
            time.sleep(pauses.pop(0))

    def usable(self, response: httpx.Response) -> httpx.Response:
        """The same answer, if it is a success or 410. Errors: Refused; Stop."""
        status = response.status_code
        message = message_of(response)
        if response.is_success or status == 410:
            return response
        if status in (401, 403):
            raise Stop(f"{message} ONEFILE_TOKEN wants an API token: {HINT}")
        if status in (400, 413, 422) and '"storage_full"' not in response.text:
            raise Refused(message)
        hint = " Is ONEFILE_URL right?" if status in (301, 302, 307, 308, 404, 405) else ""
        raise Stop(f"{self.url}: {message.rstrip('.')}.{hint}")

    def count_tasks(self) -> int:
        """How many tasks there are. Errors: Stop, also if this is not our kind of server."""
        response = self.request("GET", "/tasks", params={"page_size": 1})
        try:
            return int(response.json()["meta"]["total"])
        except (ValueError, KeyError, TypeError):
            raise Stop(f"{self.url}: no Onefile Tasks. Is ONEFILE_URL right?") from None


# ── Export ──────────────────────────────────────────────────────────────────────────────────────
# Pages of a list shift when a task before them goes, and one is missed. The order of changes does
# not: what is edited meanwhile moves to the end, where it is left out if its id was there before.
# The ids, and in an import one hash a line, are all that stays in memory.


def exported_pages(server: Server) -> Iterator[list[dict[str, Any]]]:
    """Every task outside the trash once, as it was at some moment of the export. Errors: Stop."""
    seen: set[int] = set()
    since: int | str = 0
    more = True
    while more:
        params = {"since": since, "limit": PAGE_SIZE}
        response = server.request("GET", "/tasks/changes", params=params)
        if response.status_code == 410:  # The trash was emptied meanwhile: begin again.
            since = 0
            continue
        page = response.json()
        tasks = [task for task in page["data"] if not task["deleted_at"] and task["id"] not in seen]
        seen.update(task["id"] for task in tasks)
        yield tasks
        since = page["next_since"]
        more = page["has_more"]


def cell(value: Any) -> str:
    """A value as a spreadsheet shows it; an apostrophe goes before what it would execute."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return f"'{text}" if FORMULA.match(text) else text


def csv_rows(rows: list[list[Any]]) -> str:
    """Everything in quotes, because some spreadsheets take other letters for commas."""
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows(
        [cell(value) for value in row] for row in rows
    )
    return text.getvalue()


def export_tasks(server: Server, as_csv: bool) -> int:
    """Write every task to standard output; 0. Errors: Stop; OSError if nobody takes it."""
    progress = Progress(server.count_tasks(), visible=not sys.stdout.isatty())
    written = 0
    attachments = 0
    columns: list[str] = []
    for tasks in exported_pages(server):
        text = ""
        if as_csv and not columns:
            columns = list(tasks[0]) if tasks else ["title", *DEFAULTS, "completed", *PASSED_OVER]
            text = "\ufeff" + csv_rows([columns])
        if as_csv:
            text += csv_rows([[task[name] for name in columns] for task in tasks])
        else:
            text = "".join(f"{json.dumps(task, ensure_ascii=False)}\n" for task in tasks)
        sys.stdout.buffer.write(text.encode())
        sys.stdout.buffer.flush()
        written += len(tasks)
        attachments += sum(task["attachments"] for task in tasks)
        progress.show(written, f"{written} of {progress.whole} tasks")
    left = f"; attachments that stay behind: {attachments}" if attachments else ""
    say(f"tasks exported: {written}{left}")
    return 0


# ── Import ──────────────────────────────────────────────────────────────────────────────────────
# Lines are read in order, because a line's key counts its twins before it. Their requests run
# beside each other, and what was refused is told in order again.


class Line(NamedTuple):
    """A line of the file, ready to be sent, or with a `problem`."""

    number: int
    end: int
    """Where it ends in the file, in bytes."""
    body: bytes = b""
    key: str = ""
    problem: str = ""


def task_of(line: bytes) -> dict[str, Any]:
    """What POST /tasks takes of an exported task. Errors: ValueError; RecursionError."""
    try:
        task = json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    if not isinstance(task, dict):
        raise ValueError("not a task: a line is one JSON object")
    if "status" in task and task.get("completed") is (task["status"] == "done"):
        del task["completed"]  # It says the same.
    return {name: value for name, value in task.items() if name not in PASSED_OVER}


def key_of(task: dict[str, Any], seen: Counter[bytes]) -> str:
    """An Idempotency-Key: what the task holds, and which of its twins in the file it is.

    So a second run adds nothing, and two equal lines are two tasks.
    """
    content = json.dumps(DEFAULTS | task, sort_keys=True)
    digest = hashlib.sha256(content.encode()).digest()
    seen[digest] += 1
    return f"{digest.hex()}-{seen[digest]}"


def lines_of(file: BinaryIO, name: str) -> Iterator[Line]:
    r"""The lines that are not empty. They end at \n alone: U+2028 and the like are text.

    Errors: Stop if this cannot be an export.
    """
    seen: Counter[bytes] = Counter()
    number = 0
    end = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        end += len(line)
        if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise Stop(f"{name} is UTF-16. Save it as UTF-8, and import that.")
        if len(line) > MAX_LINE_BYTES:
            raise Stop(f"{name}, line {number} is longer than any task: is this an export?")
        line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            task = task_of(line)
            body = json.dumps(task, ensure_ascii=False, allow_nan=False).encode()
            yield Line(number, end, body, key_of(task, seen))
        except (ValueError, RecursionError) as error:
            yield Line(number, end, problem=str(error))


def create_task(server: Server, line: Line) -> str:
    """Send it: "new", or "known" from an earlier run, or "trashed" since. Errors: Refused; Stop."""
    if line.problem:
        raise Refused(line.problem)
    headers = {"Content-Type": "application/json", "Idempotency-Key": line.key}
    response = server.request("POST", "/tasks", content=line.body, headers=headers)
    if response.status_code == 201:
        return "new"
    return "trashed" if response.json()["deleted_at"] else "known"


def sent(server: Server, lines: Iterator[Line]) -> Iterator[tuple[Line, Future[str]]]:
    """Each line with what came of it, in order, while the next ones are on their way."""
    pool = ThreadPoolExecutor(REQUESTS_AT_ONCE)
    waiting: deque[tuple[Line, Future[str]]] = deque()
    try:
        for line in lines:
            waiting.append((line, pool.submit(create_task, server, line)))
            while waiting and (len(waiting) > LINES_AHEAD or waiting[0][1].done()):
                yield waiting.popleft()
        yield from waiting
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def summary(counts: Counter[str]) -> str:
    """How it went, or goes."""
    text = f"{counts['new']} new, {counts['known'] + counts['trashed']} there already"
    if counts["trashed"]:
        text += f" ({counts['trashed']} of them in the trash)"
    if counts["refused"]:
        text += f", {counts['refused']} refused"
    return text


def import_tasks(server: Server, file: BinaryIO, name: str) -> int:
    """Create a task for each line; 1 if some were refused, else 0. Errors: Stop."""
    about = os.fstat(file.fileno())
    progress = Progress(about.st_size if stat.S_ISREG(about.st_mode) else 0)
    counts: Counter[str] = Counter()
    server.count_tasks()
    try:
        for line, outcome in sent(server, lines_of(file, name)):
            try:
                counts[outcome.result()] += 1
            except Refused as refusal:
                counts["refused"] += 1
                say(f"{name}, line {line.number}: {refusal}")
            progress.show(line.end, summary(counts))
    except Stop as reason:
        raise Stop(f"{reason} So far: {summary(counts)}." if counts else reason) from None
    say(f"{name}: {summary(counts)}")
    return 1 if counts["refused"] else 0


# ── Command line ────────────────────────────────────────────────────────────────────────────────


def run(arguments: argparse.Namespace) -> int:
    """One command; what the program ends with. Errors: Stop; OSError."""
    url = os.environ.get("ONEFILE_URL") or "http://localhost:8000"
    server = Server(url, os.environ.get("ONEFILE_TOKEN", ""))
    if arguments.command == "export":
        return export_tasks(server, arguments.csv)
    if arguments.file == "-":
        return import_tasks(server, sys.stdin.buffer, "standard input")
    with open(arguments.file, "rb") as file:
        return import_tasks(server, file, arguments.file)


def main() -> int:
    """Read the command line, and end in one line whatever happens."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("transfer.py", description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    export_parser = commands.add_parser("export", help="write your tasks to standard output")
    export_parser.add_argument("--csv", action="store_true", help="for a spreadsheet")
    import_parser = commands.add_parser("import", help="create the tasks of a file")
    import_parser.add_argument("file", metavar="FILE", help="JSON Lines; - is standard input")
    arguments = parser.parse_args()
    try:
        return run(arguments)
    except Stop as reason:
        say(f"transfer.py: {reason}")
    except OSError as error:
        path = getattr(arguments, "file", "standard output")
        hint = " Is the path right?" if error.filename else ""
        say(f"transfer.py: {path}: {error.strerror or error}.{hint}")
    except KeyboardInterrupt:
        say("transfer.py: interrupted. The same import again adds what is missing.")
        return 130
    return 2


if __name__ == "__main__":
    status = main()
    os._exit(status)  # Everything is written, and no request that still waits holds anybody up.

"""Tools that know the API only from its OpenAPI page, and people who open /docs in a browser."""

# ruff: noqa: D103, S101, S106, S603

import functools
import http.server
import importlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import playwright.sync_api
import pytest
from authlib.integrations.base_client import OAuthError
from authlib.integrations.requests_client import OAuth2Session
from conftest import ADMIN_PASSWORD, API, CHEAP_PASSWORDS, DEADLINE, PASSWORD, ROOT, report

PROGRAMS = Path(sys.executable).parent
"""Where pip puts what it installs beside this Python."""


def run(folder: Path, *command: object, **environment: str) -> str:
    """What a program prints, if it ends with 0."""
    done = subprocess.run(
        [str(each) for each in command],
        cwd=folder,
        env=os.environ | {"PATH": f"{PROGRAMS}:{os.environ['PATH']}"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    shown = "\n".join(line[:500] for line in (done.stdout + done.stderr).splitlines())
    assert done.returncode == 0, shown
    return done.stdout


# ── Schemathesis ────────────────────────────────────────────────────────────────────────────────
# It makes requests from the schema, right and wrong ones, alone and in sequences.

FUZZ_SECONDS = 40
NOT_MEANT = (
    "positive_data_acceptance",  # No schema says that a version is stale, or a password common.
    "negative_data_rejection",  # POST /auth/logout takes any body, on purpose.
    "ensure_resource_availability",  # An Idempotency-Key may name a task in the trash.
    "ignored_auth",  # Our hook sends a token that works.
    "use_after_free",  # What was deleted may have been restored since.
)


@pytest.mark.parametrize("role", ["user", "admin"])
def test_schemathesis_finds_no_failure_and_nothing_undocumented(serve, role):
    server = serve(CHEAP_PASSWORDS)
    said = run(
        server.folder,
        *("schemathesis", "run", f"{server.url}/openapi.json", "--no-color"),
        *("--max-time", FUZZ_SECONDS, "--generation-database", "none", "--continue-on-failure"),
        *("--exclude-checks", ",".join(NOT_MEANT)),
        *("--exclude-operation-id", "stream_events"),  # It never ends.
        SCHEMATHESIS_HOOKS="schemathesis_hooks",
        PYTHONPATH=str(ROOT / ".ci"),
        FUZZ_URL=server.url + API,
        FUZZ_DATABASE=str(server.folder / "data" / "tasks.db"),
        FUZZ_ROLE=role,
    )
    assert "Traceback" not in server.log.read_text()
    report(f"Schemathesis, {role}: {said.split('Test cases:')[1].splitlines()[1].strip()}")


# ── Linter, generated client, OAuth library ─────────────────────────────────────────────────────


def test_redocly_finds_nothing_wrong_with_the_structure_of_the_schema(server, tmp_path):
    redocly = os.environ.get("REDOCLY") or shutil.which("redocly")
    if not redocly:
        pytest.skip("Redocly is not installed; REDOCLY names its program")
    page = server.client().get("/../../openapi.json")
    (tmp_path / "openapi.json").write_text(page.text)
    (tmp_path / "redocly.yaml").write_text("rules: {struct: error}\n")
    run(
        tmp_path,
        *(redocly, "lint", "--config", "redocly.yaml", "openapi.json"),
        REDOCLY_TELEMETRY="off",
        REDOCLY_SUPPRESS_UPDATE_NOTICE="true",
    )


def test_a_generated_client_creates_replays_lists_and_reads(server, tmp_path, monkeypatch):
    made = tmp_path / "generated"
    command = ("openapi-python-client", "generate", "--url", f"{server.url}/openapi.json")
    run(tmp_path, *command, "--meta", "none", "--output-path", made, "--fail-on-warning")
    monkeypatch.syspath_prepend(tmp_path)
    generated = importlib.import_module("generated")
    models = importlib.import_module("generated.models")
    auth = {name: importlib.import_module(f"generated.api.auth.{name}") for name in ("register",)}
    names = ("create_task", "list_tasks", "read_task", "list_changes", "attach_file")
    api = {name: importlib.import_module(f"generated.api.tasks.{name}") for name in names}

    strict = {"base_url": server.url, "raise_on_unexpected_status": True}
    account = models.Registration(username="alice", password=PASSWORD)
    tokens = auth["register"].sync(client=generated.Client(**strict), body=account)
    assert tokens.user.username == "alice"
    client = generated.AuthenticatedClient(token=tokens.access_token, **strict)

    due = datetime(2030, 1, 31, 12, tzinfo=UTC)
    body = models.TaskCreate(title="Buy milk", due_date=due)
    options = {"client": client, "body": body, "idempotency_key": "one"}
    created = api["create_task"].sync_detailed(**options)
    replayed = api["create_task"].sync_detailed(**options)
    assert [created.status_code, replayed.status_code] == [201, 200]
    assert replayed.parsed == created.parsed
    assert created.parsed.due_date == due

    assert api["list_tasks"].sync(client=client).data == [created.parsed]
    assert api["read_task"].sync(created.parsed.id, client=client) == created.parsed
    assert api["list_changes"].sync(client=client).data == [created.parsed]
    absent = api["read_task"].sync(created.parsed.id + 1, client=client)
    assert absent.error.code == "task_not_found"


@pytest.mark.parametrize("method", ["none", "client_secret_basic", "client_secret_post"])
def test_an_oauth_library_logs_in_and_refreshes(server, method):
    server.person("alice")
    session = OAuth2Session(
        "some-client",
        token_endpoint=f"{server.url}{API}/auth/token",
        token_endpoint_auth_method=method,
        scope="tasks",
    )
    account = f"{server.url}{API}/users/me"
    session.fetch_token(username="alice", password=PASSWORD, grant_type="password")
    assert session.get(account).json()["username"] == "alice"

    used = session.token["refresh_token"]
    session.refresh_token()
    assert session.token["refresh_token"] != used
    session.token["expires_at"] = 1
    assert session.get(account).status_code == 200  # It has refreshed by itself.

    with pytest.raises(OAuthError, match="invalid_grant"):
        session.fetch_token(username="alice", password="a guess", grant_type="password")
    with pytest.raises(OAuthError, match="invalid_grant"):
        session.refresh_token(refresh_token=used)


# ── Browser ─────────────────────────────────────────────────────────────────────────────────────
# A real Chromium with no internet. Nothing is intercepted: Playwright would then answer preflights.

ELSEWHERE = "elsewhere.example"
"""A host that the browser finds on this machine, and that is not ours."""
ARGUMENTS = [
    f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    *("--no-proxy-server", "--disable-gpu", "--disable-quic", "--disable-background-networking"),
]
REDOC_LOGO = "https://cdn.redoc.ly/redoc/logo-mini.svg"
"""ReDoc always asks for it; only the policy keeps that request from leaving."""


class Tab:
    """A page, its console's errors, and the requests that do not go to its own origin."""

    def __init__(self, browser: Any, origin: str, path: str) -> None:
        self.origin = origin
        self.page = browser.new_page()
        self.errors: list[str] = []
        self.foreign: list[str] = []
        self.page.set_default_timeout(DEADLINE * 1000)
        self.page.on("console", self.hear)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self.watch)
        self.page.goto(origin + path)

    def hear(self, said: Any) -> None:
        """Something on the console."""
        if said.type == "error":
            self.errors.append(said.text)

    def watch(self, request: Any) -> None:
        """A request on its way."""
        if not request.url.startswith((f"{self.origin}/", f"blob:{self.origin}/", "data:")):
            self.foreign.append(request.url)

    def execute(self, method: str, path: str, api: str = API) -> int:
        """In /docs: Try it out, Execute, with nothing changed. Returns the status."""
        route = self.page.locator(f'[data-path="{api}{path}"]')
        block = self.page.locator(f".opblock-{method}", has=route)
        block.locator(".opblock-summary-control").click()
        block.get_by_role("button", name="Try it out").click()
        block.get_by_role("button", name="Execute").click()
        status = block.locator(".live-responses-table tbody .response-col_status")
        return int(status.first.inner_text().split()[0])

    def authorize(self, way: str, **fields: str) -> None:
        """In /docs: fill in one of the forms of the dialog Authorize."""
        self.page.locator(".auth-wrapper .authorize").first.click()
        form = self.page.locator(".auth-container").filter(has_text=way)
        for name, text in fields.items():
            form.locator(f"#{name}").fill(text)
        form.locator(".authorize").click()
        form.get_by_role("button", name="Remove authorization").wait_for()
        form.get_by_role("button", name="Close").click()

    def log_in(self, username: str, password: str) -> None:
        """In /docs: by name and password."""
        self.authorize("OAuth2, password", oauth_username=username, oauth_password=password)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The machine's Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome")
    programs = [program for name in names if (program := shutil.which(name))]
    if not programs:
        pytest.skip("there is no Chromium")
    with playwright.sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=programs[0], args=ARGUMENTS)
        with browser:
            yield browser


@pytest.fixture
def other_origin(tmp_path: Path) -> Iterator[str]:
    """Another origin, with a page of its own."""
    (tmp_path / "other").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "other")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://{ELSEWHERE}:{server.server_port}"
        server.shutdown()


def test_the_docs_execute_every_example_as_it_stands(browser, server):
    tab = Tab(browser, server.url, "/docs")
    assert tab.execute("post", "/auth/register") == 201
    assert tab.execute("post", "/auth/login") == 200
    tab.log_in("alice", "correct horse battery")  # The example's.
    assert tab.execute("post", "/tasks") == 201
    assert tab.execute("get", "/tasks") == 200
    assert tab.execute("post", "/auth/api_tokens") == 201
    assert tab.execute("patch", "/users/me") == 200
    assert tab.errors == []
    assert tab.foreign == []


def test_the_docs_take_an_api_token_too(browser, server):
    alice = server.person("alice")
    answer = alice.post("/auth/api_tokens", json={"name": "docs", "scope": "write"})
    tab = Tab(browser, server.url, "/docs")
    tab.authorize("http, Bearer", **{"auth-bearer-value": answer.json()["token"]})
    assert tab.execute("post", "/tasks") == 201


def test_an_admin_executes_the_examples_of_admins(browser, server):
    tab = Tab(browser, server.url, "/docs")
    tab.log_in("admin", ADMIN_PASSWORD)
    assert tab.execute("post", "/admin/users") == 201
    assert tab.execute("get", "/admin/users") == 200
    assert tab.execute("post", "/admin/cleanup") == 202


def test_the_docs_work_under_a_prefix(browser, serve):
    server = serve(ROOT_PATH="/todo")
    tab = Tab(browser, server.url.removesuffix("/todo"), "/todo/docs")
    tab.page.locator("[data-path='/api/v1/tasks/{task_id}/restore']").wait_for()
    assert tab.execute("get", "/health", api="") == 200
    assert tab.errors == []
    assert tab.foreign == []


def test_redoc_shows_and_searches_and_calls_nobody(browser, server):
    tab = Tab(browser, server.url, "/redoc")
    tab.page.get_by_role("heading", name="Onefile Tasks").wait_for()
    tab.page.get_by_role("heading", name="Restore Task").wait_for()
    tab.page.get_by_placeholder("Search").fill("restore")
    tab.page.locator("[data-role='search:results']").get_by_text("Restore Task").wait_for()
    assert tab.foreign == [REDOC_LOGO]
    policy = f"'{REDOC_LOGO}' violates the following Content Security Policy"
    assert [policy in error for error in tab.errors] == [True]


CREATE = """([url, authorization]) => fetch(url, {
    method: "POST",
    headers: {"Authorization": authorization, "Content-Type": "application/json"},
    body: '{"title": "Across"}',
}).then(answer => [answer.status, answer.headers.get("ETag")], () => "failed")"""


@pytest.mark.parametrize("named", [True, False], ids=["a named origin", "any other origin"])
def test_a_page_of_another_origin_may_do_something_if_it_is_named(
    browser, serve, other_origin, named
):
    origin = other_origin if named else "https://tasks.example"
    server = serve(CORS_ORIGINS=f"https://tasks.example, {origin}")
    alice = server.person("alice")
    tab = Tab(browser, other_origin, "/")
    request = [f"{server.url}{API}/tasks", alice.headers["Authorization"]]
    assert tab.page.evaluate(CREATE, request) == ([201, '"1"'] if named else "failed")
    assert alice.get("/tasks").json()["meta"]["total"] == named

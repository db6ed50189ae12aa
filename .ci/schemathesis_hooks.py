"""Schemathesis sends what ends sessions and accounts, too: see that somebody is logged in.

It runs in Schemathesis's own process (SCHEMATHESIS_HOOKS), and knows from the environment where the
server is (FUZZ_URL), where its database is (FUZZ_DATABASE), and who to be (FUZZ_ROLE).
"""

import contextlib
import os
import sqlite3
from typing import Any

import httpx
import schemathesis

ROLE = os.environ["FUZZ_ROLE"]
ACCOUNT = {"username": "fuzz", "password": "correct horse battery staple"}
client = httpx.Client(base_url=os.environ["FUZZ_URL"], trust_env=False)


def right() -> bool:
    """Whether the token still opens an account, and one of that role."""
    answer = client.get("/users/me")
    return answer.status_code == 200 and answer.json()["role"] == ROLE


def log_in(route: str) -> None:
    """Take what tokens there are."""
    answer = client.post(f"/auth/{route}", json=ACCOUNT)
    if answer.is_success:
        client.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"


def start_anew() -> None:
    """Another account of that name and role; the one before is called something else."""
    with contextlib.closing(sqlite3.connect(os.environ["FUZZ_DATABASE"], timeout=20)) as db:
        db.execute("UPDATE users SET username_key = 'was-' || id WHERE username_key = 'fuzz'")
        db.commit()
        log_in("register")
        db.execute("UPDATE users SET role = ? WHERE username_key = 'fuzz'", [ROLE])
        db.commit()


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Send a token that works."""
    del context, kwargs
    if not right():
        log_in("login")
    if not right():
        start_anew()
    case.headers["Authorization"] = client.headers["Authorization"]

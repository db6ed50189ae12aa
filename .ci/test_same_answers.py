"""SQLite and PostgreSQL give the same answers, whatever the locale of the latter."""

# ruff: noqa: D103, S101, S311

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

from conftest import CHEAP_PASSWORDS, report, together

PIECES = """a B z Z 0 9 10 ä Ä a\u0308 ß ẞ İ ı ﬁ ﬀ Ａ １ é e\u0301\u0323 Σ ς σ ǆ Å Ω 日本 가
\u1100\u1161 % _ ! !% !! \\ \\% ' " - – . , ; ( [ ~ ^ @ # & + 😀 👩\u200d👧 𝔘 𝒳 \u200b \ufeff \x01
\x7f \u0085 ½ ﷺ ก\u0e48 \u05d0 \u0627\u064f ǃ ｶ ﾞ \u0301 \ue000 \U0010ffff ll LL ø Ø æ Đ þ""".split()  # noqa: SIM905
DUES = [None, "0001-01-01", "0001-01-01T00:00:00Z", "9999-12-31", "9999-12-31T23:59:59.999999Z"]
DUES += ["0001-01-01T00:00:00+00:01", "9999-12-31T23:59:59-00:01", "1969-12-31T23:59:59.5Z"]
DUES += ["2026-05-05T12:00:00+02:00", "2026-05-05T10:00:00", "2026-05-05", "2399-12-31T23:59:59Z"]
HUGE = [2**31, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 10**30, -1]
TIMES = {"created_at", "updated_at", "completed_at", "deleted_at"}
Ask = tuple[str, str, str, Any]
"""Who, a method, a path, and a query or a body."""


def text(dice: random.Random, most: int) -> str:
    """Something nasty."""
    joint = dice.choice(["", "", " ", "\u00a0"])
    return joint.join(dice.choices(PIECES, k=dice.randint(1, most)))


def writes(dice: random.Random) -> Iterator[Ask]:
    """Tasks of two people, some of them changed, trashed, restored, purged."""
    for number in range(1, 301):
        body = {"title": text(dice, 6), "due_date": dice.choice(DUES)}
        body["status"] = dice.choice(["todo", "in_progress", "done"])
        body["priority"] = dice.choice(["low", "medium", "high"])
        body["description"] = dice.choice([None, text(dice, 20)])
        yield dice.choice(["alice", "alice", "bob"]), "POST", "/tasks", body
        path = f"/tasks/{dice.randint(1, number)}"
        patch = {"title": text(dice, 3), "completed": dice.random() < 0.5}
        yield (
            "alice",
            *dice.choice(
                [
                    ("PATCH", path, patch),
                    ("DELETE", path, None),
                    ("POST", f"{path}/restore", None),
                    ("DELETE", "/tasks/trash" if number in (50, 90) else path, None),
                ]
            ),
        )


def a_query(dice: random.Random) -> Ask:
    """Any list."""
    may = {
        "search": [text(dice, 2), text(dice, 1), text(dice, 1) + dice.choice(["%", "\x00", "é"])],
        "status": [["done"], ["todo", "in_progress"], ["none"]],
        "priority": [["high"], ["low", "medium", "low"]],
        "completed": ["true", "false"],
        "overdue": ["true", "false"],
        "deleted": ["true", "false", "maybe"],
        "due_before": DUES[1:],
        "due_after": [*DUES[1:], "10000-01-01"],
    }
    chances = {"search": 0.4, "status": 0.2, "priority": 0.2}
    chosen = {k: dice.choice(v) for k, v in may.items() if dice.random() < chances.get(k, 0.12)}
    if dice.random() < 0.9:
        sorts = ["created_at", "updated_at", "due_date", "priority", "status", "title", "title"]
        chosen |= {"sort": dice.choice(sorts), "order": dice.choice(["asc", "desc"])}
    if dice.random() < 0.6:
        sizes = [1, 7, 50, 100, 100, dice.choice([0, 101, *HUGE])]
        pages = [1, 1, 2, 3, dice.choice([0, 90, *HUGE])]
        chosen |= {"page_size": dice.choice(sizes), "page": dice.choice(pages)}
    since = dice.choice([0, 0, dice.randint(0, 700), "5~7", *HUGE])
    changes = {"since": since, "limit": dice.choice([1, 30, 1000, *HUGE])}
    owned = chosen | {"owner_id": dice.choice([1, 2, 3, 4, *HUGE])}
    paging = {name: chosen[name] for name in ("page", "page_size") if name in chosen}
    others: list[Ask] = [
        (dice.choice(["alice", "bob"]), "GET", "/tasks/changes", changes),
        ("alice", "GET", f"/tasks/{dice.choice([dice.randint(1, 300), *HUGE])}", {}),
        ("bob", "GET", "/tasks/statistics", {}),
        ("admin", "GET", "/admin/tasks", dice.choice([chosen, owned])),
        ("admin", "GET", "/admin/users", paging),
    ]
    mine: Ask = (dice.choice(["alice", "alice", "bob"]), "GET", "/tasks", chosen)
    return mine if dice.random() < 0.7 else dice.choice(others)


def timeless(answer: Any) -> Any:
    """An answer without what differs from one run to the next."""
    if isinstance(answer, list):
        return [timeless(each) for each in answer]
    if isinstance(answer, dict):
        return {k: timeless(v) if k not in TIMES else v is None for k, v in answer.items()}
    return answer


def test_a_thousand_lists_are_the_same_from_both_databases_whatever_the_locale(
    start, postgresql, serve
):
    collation = "LOCALE_PROVIDER icu ICU_LOCALE 'en-US'"
    postgresql.sql(f"CREATE DATABASE icu TEMPLATE template0 {collation}")
    urls = [postgresql.fresh("plain"), postgresql.url("icu")]
    servers = [serve(CHEAP_PASSWORDS), *(start(1, url)[0] for url in urls)]
    assert postgresql.sql("SELECT 'a' < 'B'", "icu") == "t"  # In C it is not.
    dice = random.Random(20261126)
    asks = [*writes(dice), *(a_query(dice) for _ in range(1000))]

    def answers(number: int) -> list[tuple[int, Any, str | None]]:
        people = {name: servers[number].person(name) for name in ("admin", "alice", "bob")}
        got = []
        for who, method, path, values in asks:
            sent = {"json" if method in ("POST", "PATCH") else "params": values}
            answer = people[who].request(method, path, headers={"X-Request-ID": "same"}, **sent)
            body = timeless(answer.json() if answer.content else None)
            got.append((answer.status_code, body, answer.headers.get("Link")))
        return got

    sqlite, *others = together(3, answers)
    for other in others:
        for ask, ours, theirs in zip(asks, sqlite, other, strict=True):
            assert theirs == ours, ask
    statuses = Counter(answer[0] for answer in sqlite)
    assert not any(status >= 500 for status in statuses)
    found = sum(len(body["data"]) for _, body, _ in sqlite if body and "data" in body)
    assert found > 5000
    report(f"The same from both databases: {found} rows, statuses {dict(statuses)}")

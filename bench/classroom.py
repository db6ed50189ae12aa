"""A class at once: accounts that import, sockets that watch, a backup restored elsewhere, uploads side by side.

Run    .venv/bin/python bench/classroom.py --pupils 30 --tasks 1000 --uploads 16
Exit   0 when no socket missed a change, both databases are equal and the memory stayed in bounds, 1 otherwise
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import httpx
import websockets
from server import APP, PASSWORD, Server, running

MEMORY_LIMIT_MIB = 150
UPLOAD_MIB = 5


class Pupil(NamedTuple):
    """An account: an API token, which a backup carries along, and a client that sends it."""

    token: str
    client: httpx.AsyncClient


def client_of(server: Server, token: str) -> httpx.AsyncClient:
    """A client of the API that sends this token."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}/api/v1", headers=headers, timeout=120)


async def join(server: Server, name: str) -> Pupil:
    """Register, and make an API token."""
    async with client_of(server, "") as anonymous:
        tokens = (await anonymous.post("/auth/register", json={"username": name, "password": PASSWORD})).json()
        bearer = {"Authorization": f"Bearer {tokens['access_token']}"}
        wanted = {"name": "class", "scope": "write"}
        answer = await anonymous.post("/auth/api_tokens", json=wanted, headers=bearer)
        return Pupil(answer.json()["token"], client_of(server, answer.json()["token"]))


async def watch(server: Server, pupil: Pupil, count: int, ready: Callable[[], None]) -> list[int]:
    """The seq of each of the first `count` changes that a socket shows."""
    url, headers = f"ws://127.0.0.1:{server.port}/ws/tasks/class", {"Authorization": f"Bearer {pupil.token}"}
    async with websockets.connect(url, additional_headers=headers) as socket:
        await socket.recv()  # hello
        ready()
        return [json.loads(await socket.recv())["seq"] for _ in range(count)]


async def bring(pupil: Pupil, name: str, count: int) -> None:
    """Import tasks. Errors: RuntimeError."""
    lines = "".join(json.dumps({"title": f"{name}, task {number}"}) + "\n" for number in range(count))
    answer = await pupil.client.post("/tasks/import", content=lines, headers={"Content-Type": "application/jsonl"})
    if answer.status_code != 201:
        raise RuntimeError(f"the import answered {answer.status_code}")


async def slowest_health(server: Server) -> float:
    """The longest that /health took, in seconds, until cancelled."""
    slowest = 0.0
    async with httpx.AsyncClient() as client:
        try:
            while True:
                began = time.perf_counter()
                await client.get(f"http://127.0.0.1:{server.port}/health")
                slowest = max(slowest, time.perf_counter() - began)
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            return slowest


async def beside_health(server: Server, work: Awaitable[object]) -> float:
    """The longest that /health took while the work was done."""
    health = asyncio.create_task(slowest_health(server))
    await work
    health.cancel()
    return await health


async def attend(server: Server, pupils: list[Pupil], count: int) -> bool:
    """Everybody imports, everybody watches. Whether each socket saw each change once, in order."""
    ready = asyncio.Semaphore(0)
    watchers = [asyncio.create_task(watch(server, pupil, count, ready.release)) for pupil in pupils]
    for _ in pupils:
        await ready.acquire()
    began = time.perf_counter()
    imports = asyncio.gather(*(bring(pupil, f"pupil {number}", count) for number, pupil in enumerate(pupils)))
    slowest = await beside_health(server, imports)
    imported = time.perf_counter()
    seen = await asyncio.wait_for(asyncio.gather(*watchers), 120)
    complete = sum(seqs == list(range(1, count + 1)) for seqs in seen)
    print(
        f"imported {len(pupils)} x {count} tasks in {imported - began:.2f} s; /health: {slowest * 1000:.0f} ms at most"
    )
    print(
        f"{complete} of {len(pupils)} sockets saw every change in order, {time.perf_counter() - imported:.2f} s later"
    )
    return complete == len(pupils)


def resident_mib(server: Server, name: str) -> float:
    """The server's memory in MiB: VmRSS now, VmHWM at most since the last VmRSS; 0 where there is no /proc."""
    process = Path(f"/proc/{server.process.pid}")
    if not process.exists():
        return 0.0
    if name == "VmRSS":
        (process / "clear_refs").write_text("5")  # VmHWM starts anew. Ref: proc(5)
    lines = (process / "status").read_text().splitlines()
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


async def upload(server: Server, pupils: list[Pupil], count: int) -> bool:
    """Files of 5 MiB, all at once. Whether all came in, within the memory."""
    tasks = [(await pupil.client.get("/tasks?page_size=1")).json()["data"][0]["id"] for pupil in pupils]
    content = os.urandom(UPLOAD_MIB * 2**20 - 4)
    before = resident_mib(server, "VmRSS")
    sends = [
        pupils[number % len(pupils)].client.post(
            f"/tasks/{tasks[number % len(pupils)]}/attachments", files={"file": ("photo.zip", b"PK\x03\x04" + content)}
        )
        for number in range(count)
    ]
    began = time.perf_counter()
    statuses = [answer.status_code for answer in await asyncio.gather(*sends)]
    growth = resident_mib(server, "VmHWM") - before
    seconds = time.perf_counter() - began
    print(f"{count} uploads of {UPLOAD_MIB} MiB in {seconds:.2f} s, with {growth:.0f} MiB more memory at most")
    return statuses == [201] * count and growth <= MEMORY_LIMIT_MIB


async def exports(server: Server, pupils: list[Pupil]) -> list[bytes]:
    """What each pupil exports from a server, by the token that they had."""
    found = []
    for pupil in pupils:
        async with client_of(server, pupil.token) as client:
            found.append((await client.get("/tasks/export")).content)
    return found


async def restored_elsewhere(server: Server, pupils: list[Pupil]) -> bool:
    """Back up, restore into an empty directory, start there. Whether everybody exports the same bytes."""
    before = await exports(server, pupils)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as elsewhere:
        async with client_of(server, server.log_in()) as admin:
            began = time.perf_counter()
            backup = Path(elsewhere) / "backup.db"
            backup.write_bytes((await admin.get("/admin/backup")).content)
        backed_up = time.perf_counter()
        environment = os.environ | {"DATA_DIR": elsewhere}
        command = [sys.executable, str(APP), "restore", str(backup)]
        await asyncio.to_thread(subprocess.run, command, env=environment, check=True, capture_output=True)
        size, restored = backup.stat().st_size / 2**20, time.perf_counter()
        with running(elsewhere) as other:
            equal = await exports(other, pupils) == before
    print(f"backup of {size:.0f} MiB in {backed_up - began:.2f} s, restored in {restored - backed_up:.2f} s; {equal=}")
    return equal


async def lesson(arguments: argparse.Namespace) -> bool:
    """The whole class, on one server."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as data_dir, running(data_dir) as server:
        pupils = [await join(server, f"pupil-{number}") for number in range(arguments.pupils)]
        results = [await attend(server, pupils, arguments.tasks)]
        results += [await upload(server, pupils, arguments.uploads)]
        results += [await restored_elsewhere(server, pupils)]
        await asyncio.gather(*(pupil.client.aclose() for pupil in pupils))
        return all(results)


def main() -> int:
    """Hold the class."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pupils", type=int, default=30)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--uploads", type=int, default=16)
    well = asyncio.run(lesson(parser.parse_args()))
    print("all of it held" if well else "FAILED")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())

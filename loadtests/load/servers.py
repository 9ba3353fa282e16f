"""Servers under test: one that runs already, or one that the test starts and ends."""

import asyncio
import os
import shlex
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_SECONDS = 600.0
PORT = "{port}"


@dataclass(frozen=True, slots=True)
class Server:
    """A server by its name in tables. `address`: its URL, or the command that starts it, with {port} for its port."""

    name: str
    address: str

    @property
    def is_command(self) -> bool:
        return PORT in self.address


def parse_server(text: str) -> Server:
    """NAME=URL or NAME=COMMAND. Raises ValueError."""
    name, _, address = text.partition("=")
    if not name or not (address.startswith(("http://", "https://")) or PORT in address):
        raise ValueError(f"{text}: must be NAME=URL, or NAME=COMMAND with {PORT} in the command")
    return Server(name, address)


@asynccontextmanager
async def running(server: Server, start_seconds: float = START_SECONDS, log: Path | None = None) -> AsyncIterator[str]:
    """The address of the server. Starts it if it is a command, waits until it is healthy, and ends it afterwards.

    `log`: the file for what it writes to stderr.

    Raises ValueError if it cannot be started, ends at once, or is not healthy in time.
    """
    if not server.is_command:
        yield server.address
        return
    port = _free_port()
    command = shlex.split(server.address.replace(PORT, str(port)))
    with open(os.devnull if log is None else log, "wb") as written:
        try:
            process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL, stderr=written)
        except OSError as error:
            raise ValueError(f"{server.name}: cannot be started: {error}") from error
    try:
        url = f"http://127.0.0.1:{port}"
        await _healthy(server, url, process, start_seconds)
        yield url
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _healthy(server: Server, url: str, process: asyncio.subprocess.Process, seconds: float) -> None:
    """Return when the server can serve. Ours says so at /health/ready; others have only /health."""
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
        try:
            async with asyncio.timeout(seconds):
                while process.returncode is None:
                    try:
                        ready = await http.get("/health/ready")
                        if (ready if ready.status_code != 404 else await http.get("/health")).status_code == 200:
                            return
                    except httpx.HTTPError:
                        pass
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise ValueError(f"{server.name}: was not healthy after {seconds:g} s") from None
    raise ValueError(f"{server.name}: ended with exit code {process.returncode} before it was healthy")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port

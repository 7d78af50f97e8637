"""From names to a running server."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from marble.config import RewardUse, make_config, read_config
from marble.errors import MarbleError
from marble.registry import is_url, resolve
from marble.rewards import Reward, check_rewards, load_rewards, prepare_rewards
from marble.rewards.http import is_loopback
from marble.rewards.load import MOST
from marble.rewards.remote import TOKEN
from marble.serve.app import App
from marble.serve.connections import SPEAKING, Connections, Guarded, Rarely, room
from marble.serve.desk import Desk

log = logging.getLogger("marble")

SHORTEST = 16
"""Characters of a token."""
FAREWELL = 10
"""Seconds that requests under way have once the server is told to stop."""
THREADS = MOST["workers"]
"""Of one reward at most, as of one that a run judges itself."""
LAST = 2.0
"""Seconds after that in which the process ends by itself, or is ended."""


def read_token(file: Path | None) -> str | None:
    """The token, from a file or the environment.

    Raises:
        MarbleError: it cannot be read, or is short or not one word.
    """
    if file is not None:
        if not file.is_file():
            raise MarbleError(f'--token-file: "{file}" does not exist')
        token, origin = file.read_text(encoding="utf-8", errors="replace").strip(), f'--token-file: "{file}"'
    else:
        token, origin = os.environ.get(TOKEN, "").strip(), TOKEN
        if not token:
            return None
    if len(token) < SHORTEST or not token.isascii() or not token.isprintable() or " " in token:
        raise MarbleError(
            f"{origin}: a token is one word of at least {SHORTEST} ASCII characters; make one with "
            'python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    return token


def uses_of(names: Sequence[str], config: Path | None, changes: dict[str, str]) -> list[RewardUse]:
    """The rewards to serve: `names`, or those of a config that no server judges already (of `names` alone, if given).

    Args:
        names: registered, or `package.module:attribute`.
        config: YAML file of a run.
        changes: settings for those rewards that take them.

    Raises:
        MarbleError: there are none, a name is not in the config, or the config is not valid.
    """
    if config is None:
        uses = [RewardUse(reward=name) for name in names]
        if not uses:
            raise MarbleError("name at least one reward to serve, or a --config; see marble list rewards")
    else:
        whole = make_config(read_config(config), str(config))
        uses = [RewardUse(reward=use.reward, url=use.url, settings=use.settings) for use in whole.rewards]
        uses += whole.held_out_rewards
        uses = [use for use in uses if not use.url and not is_url(use.reward)]
        if absent := [name for name in names if name not in [use.reward for use in uses]]:
            raise MarbleError(f"{config}: judges no {', '.join(absent)} itself; it has {[use.reward for use in uses]}")
        uses = [use for use in uses if not names or use.reward in names]
        if not uses:
            raise MarbleError(f"{config}: every reward has a url already, so there is none to serve")
    for use in uses:
        if is_url(use.reward):
            raise MarbleError(f'"{use.reward}" is served already')
        use.settings = use.settings | {name: value for name, value in changes.items() if _takes(use.reward, name)}
    return uses


def _takes(reward: str, setting: str) -> bool:
    target = resolve("reward", reward)
    return callable(target) and setting in inspect.signature(target).parameters


def make_desks(uses: Sequence[RewardUse]) -> list[Desk]:
    """Load everything.

    Raises:
        MarbleError: a reward cannot be had, wants floats, or has too many workers.
    """
    rewards: list[Reward] = load_rewards(list(uses))
    for reward in rewards:
        if getattr(reward, "wants_floats", False):
            raise MarbleError(
                f"reward {reward.name}: takes pictures as floats, which are rounded to 8 bits on the way to a server: "
                "its scores would differ; let the run judge it itself"
            )
        if getattr(reward, "workers", 0) > THREADS:
            raise MarbleError(
                f"reward {reward.name}: settings.workers: a served reward has at most {THREADS} threads, got "
                f"{reward.workers}"
            )
    check_rewards(rewards)
    prepare_rewards(rewards)
    return [Desk(reward, use.reward) for reward, use in zip(rewards, uses, strict=True)]


def listen(host: str, port: int, token: str | None) -> socket.socket:
    """A port of one's own, not open yet.

    Raises:
        MarbleError: it is taken, or the host is not this machine's, or would let anybody in.
    """
    if not is_loopback(host) and token is None:
        raise MarbleError(
            f"--host {host}: others can reach this, so a token is needed: --token-file FILE, or the environment "
            f"variable {TOKEN}"
        )
    if not 0 <= port < 2**16:
        raise MarbleError(f"--port: must be from 0 (a free one) to 65535, got {port}")
    taken: socket.socket | None = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        if taken is not None:
            taken.close()
        raise MarbleError(f"--host {host} --port {port}: cannot be listened on: {error.strerror or error}") from error
    return taken


def serve(
    app: App,
    port: socket.socket,
    *,
    certificate: Path | None = None,
    key: Path | None = None,
    opened: Callable[[], None] = lambda: None,
) -> None:
    """Answer until SIGTERM or SIGINT.

    Raises:
        MarbleError: the certificate and the key do not fit.
    """
    config = uvicorn.Config(
        app.asgi,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # or a client could choose the address by which its rate is measured
        h11_max_incomplete_event_size=2**15,  # bytes of a request's head
        timeout_keep_alive=75,  # longer than clients keep connections, or they would meet closed ones
        timeout_graceful_shutdown=FAREWELL,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    try:
        config.load()
    except (ssl.SSLError, OSError) as error:
        raise MarbleError(f"--certificate and --key: cannot be used: {error}") from error
    # uvicorn raises the signal that ended it once more when all is done; to end well is no error
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: None)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    noisy, rarely = [logging.getLogger(name) for name in ("uvicorn.error", "asyncio")], Rarely()
    for logger in noisy:
        logger.addFilter(rarely)
    try:
        asyncio.run(_run(uvicorn.Server(config), port, opened))
    finally:
        for logger in noisy:
            logger.removeFilter(rarely)


async def _run(server: uvicorn.Server, port: socket.socket, opened: Callable[[], None]) -> None:
    running = asyncio.ensure_future(server.serve(sockets=[]))
    while not server.started and not running.done():
        await asyncio.sleep(0.01)
    if server.started:
        book, tls = Connections(room()), server.config.ssl
        listening = await asyncio.get_running_loop().create_server(
            lambda: Guarded(config=server.config, server_state=server.server_state, app_state={}, book=book),
            sock=port,
            ssl=tls,
            ssl_handshake_timeout=None if tls is None else SPEAKING,
        )
        server.servers.append(listening)  # for uvicorn to close
        opened()
    await running


def end_soon() -> None:
    """End the process if it has not ended within `LAST` seconds: a reward's thread may hang, and hold it up."""

    def end() -> None:
        sys.stdout.flush()
        os._exit(0)

    timer = threading.Timer(LAST, end)
    timer.daemon = True
    timer.start()

"""Those who connect and say nothing, and what fills no log."""

import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest

from marble.rewards.wire import pack_request
from marble.serve import connections, start
from marble.serve.app import App
from marble.serve.desk import Desk
from marble.serve.door import Limits

from ..rewards.running import RED, Slow, pictures
from .visits import visited


def gone(connection, seconds):
    """Whether the server closes it."""
    connection.settimeout(seconds)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


def test_those_who_connect_and_say_nothing_keep_nobody_out(monkeypatch):
    monkeypatch.setattr(start, "room", lambda: 16)
    slow = Slow()
    app = App([Desk(slow, "slow")], Limits())
    body = pack_request("slow", pictures(3), [RED])

    def look(url):
        address = httpx.URL(url).host, httpx.URL(url).port
        with ThreadPoolExecutor(2) as pool, ExitStack() as stack, httpx.Client(base_url=url) as client:
            headers = {"Content-Type": "application/json"}
            asked = [pool.submit(client.post, "/score", content=body, headers=headers) for _ in range(2)]
            while not (slow.now and app.desks[0].length):
                time.sleep(0.005)
            idle = [stack.enter_context(socket.create_connection(address)) for _ in range(50)]
            began = time.monotonic()
            assert client.get("/health").json()["status"] == "ok"
            assert time.monotonic() - began < 1
            assert all(gone(connection, 1) for connection in idle[:40])  # the oldest made room
            assert not gone(idle[-1], 0.05)
            slow.go.set()
            assert [answer.result().status_code for answer in asked] == [200] * 2  # those at work never do

    visited(app, look)


def test_the_head_of_a_request_must_come_in_time(monkeypatch):
    monkeypatch.setattr(connections, "SPEAKING", 0.3)
    app = App([Desk(Slow(), "slow")], Limits())

    def look(url):
        address = httpx.URL(url).host, httpx.URL(url).port
        silent, slow, later = (socket.create_connection(address) for _ in range(3))
        with silent, slow, later:
            later.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += later.recv(1000)
            for byte in b"GET / HTTP/1.1\r\n":
                time.sleep(0.025)
                try:
                    slow.sendall(bytes([byte]))
                    last = time.monotonic()
                except OSError:
                    break
            assert gone(silent, 0.2)
            assert gone(slow, 0.2)
            later.settimeout(0.05)
            time.sleep(max(0.0, last + 0.35 - time.monotonic()))
            with pytest.raises(TimeoutError):
                later.recv(1)  # kept for the next request, of which nothing came yet
            later.sendall(b"G")
            assert gone(later, 1)

    visited(app, look)


def test_room_for_connections():
    book = connections.Connections(4)
    made = [FakeConnection(address) for address in "aabbccc"]
    assert [book.enter(connection) for connection in made] == [True] * 7
    assert [connection.aborted for connection in made] == [True, True, False, False, True, False, False]
    for connection in made[-2:]:
        book.busy(connection)
    assert not book.enter(FakeConnection("c"))  # two of them are at work
    assert book.enter(FakeConnection("d"))
    assert book.enter(FakeConnection("d"))
    assert made[2].aborted
    assert made[3].aborted
    for connection in (*made, *book.every):
        book.leave(connection)
    assert (len(book.every), dict(book.by_address), book.idle) == (0, {}, ({}, {}))
    first, second = FakeConnection("a"), FakeConnection("a")
    book.enter(first), book.enter(second)
    book.busy(first)
    book.rest(first)
    assert book.enter(FakeConnection("a"))
    assert (first.aborted, second.aborted) == (False, True)  # who never asked goes before who has


class FakeConnection:
    """What the book needs to know of a connection."""

    def __init__(self, address):
        self.address, self.transport, self.aborted = address, self, False

    def abort(self):
        self.aborted = True


def test_room_is_half_of_the_files(monkeypatch):
    limits = {}
    monkeypatch.setattr(connections.resource, "setrlimit", lambda which, pair: limits.update(set=pair))
    for given, raised, made in (
        ((1024, 4096), (2048, 4096), 1024),
        ((64, 100), (100, 100), 50),
        ((100_000, 100_000), None, 1024),
        ((256, -1), (2048, -1), 1024),
    ):
        limits.clear()
        monkeypatch.setattr(connections.resource, "getrlimit", lambda which, given=given: given)
        assert connections.room() == made
        assert limits.get("set") == raised


def test_what_strangers_cause_fills_no_log(caplog):
    logger, rarely = logging.getLogger("asyncio"), connections.Rarely()
    logger.addFilter(rarely)
    try:
        for _ in range(1000):
            try:
                raise OSError(24, "Too many open files")
            except OSError as error:
                logger.error("socket.accept() out of system resource\nsocket: 100%%", exc_info=error)
        logger.error("another: %s\nmore", "thing")
        for n in range(150):
            logger.error(f"thing {n}")
    finally:
        logger.removeFilter(rarely)
    assert caplog.messages[:2] == ["socket.accept() out of system resource", "another: thing"]
    assert len(caplog.messages) == 152
    assert not [record for record in caplog.records if record.exc_info]

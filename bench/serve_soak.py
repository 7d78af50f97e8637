"""Hammers a real `marble serve`, kills it once on the way, and checks every answer against scores made here.

    .venv/bin/python bench/serve_soak.py [--requests 2000] [--clients 8]

In every hundred requests one is malformed, one oversized and one without a token. Prints figures, and fails if a score
differs in a bit, a status is not the right one, the server ends by itself, or its memory grows.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import torch
from torch import Tensor

from marble.errors import MarbleError
from marble.mini.prompts import objects, words
from marble.mini.rewards import Aesthetic, Alignment
from marble.prompts import Record
from marble.rewards import Reward, make_reward, score_images
from marble.rewards.judging import judge
from marble.rewards.remote import TOKEN, Remote
from marble.rewards.wire import pack_request

REWARDS = ("mini-aesthetic", "mini-alignment")
SIZES = (1, 2, 5, 8, 16, 33)
"""Images in a request."""
COUNTS = (1, 7, 64, 130)
"""Images judged through `score_images`, in portions of 64."""
KILLED_AT = 0.4
"""Share of the requests after which the server is killed."""
PAUSE = 1.0
"""Seconds after a request without an answer, as a run would go on sampling."""
LIMIT = 1
"""--max-megabytes."""
AWAY = 8.0
"""Seconds from the kill to the restart: longer than clients try again."""
WARM = 0.2
"""Share of the restarted server's requests after which its memory counts."""
GROWTH = 8 * 2**20
"""Bytes that may lie between the medians of its memory in the first and in the last third after that. It goes up and
down with the bodies under way, by some 20 MB."""
Payload = tuple[str, Tensor, list[Record], list[float]]


class Process:
    """A `marble serve` of its own process."""

    def __init__(self, token: str, port: int = 0) -> None:
        """Started, and listening."""
        environment = os.environ | {TOKEN: token, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        arguments = ["serve", *REWARDS, "--port", str(port), "--max-megabytes", str(LIMIT)]
        command = [sys.executable, "-m", "marble", *arguments]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line.startswith("marble: serving aesthetic, alignment on http://127.0.0.1:"):
            raise RuntimeError(f"the server did not start: {line!r}")
        self.url = line.split()[-1]
        self.port = int(self.url.rpartition(":")[2])

    def memory(self) -> int:
        """Resident bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def end(self, number: signal.Signals) -> int:
        """Send a signal and wait; the exit status."""
        self.process.send_signal(number)
        status = self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


@contextmanager
def served(token: str) -> Iterator[list[Process]]:
    """A server, and those started after it; the last is still running at the end, and ends well."""
    processes = [Process(token)]
    try:
        yield processes
        assert processes[-1].end(signal.SIGTERM) == 0, "SIGTERM must be the end of it, and no error"
    finally:
        for process in processes:
            if process.process.poll() is None:
                process.end(signal.SIGKILL)


def payloads(seed: int) -> list[Payload]:
    """Requests of all sizes to both rewards, with the scores that are right."""
    rng = np.random.default_rng(seed)
    records = [*words("train")[:40], *objects("train")[:40]]
    rewards: dict[str, Reward] = {"mini-aesthetic": Aesthetic(), "mini-alignment": Alignment()}
    made: list[Payload] = []
    for name, reward in rewards.items():
        for size in SIZES:
            images, own = pictures(rng, size), [records[i] for i in rng.integers(len(records), size=size)]
            made.append((name, images, own, judge(reward, images, own, None).tolist()))
    return made


def pictures(rng: np.random.Generator, count: int) -> Tensor:
    """`[count, 3, 64, 64]` uint8: smooth, with some noise."""
    coarse = torch.from_numpy(rng.uniform(0, 255, (count, 3, 6, 6)))
    smooth = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear")
    return (smooth + torch.from_numpy(rng.normal(0, 6, (count, 3, 64, 64)))).clamp(0, 255).to(torch.uint8)


class Soak:
    """Some clients that share out requests among them."""

    def __init__(self, url: str, token: str, requests: int, clients: int, bad_every: int, seed: int = 0) -> None:
        """Nothing asked yet."""
        self.url, self.token, self.requests, self.clients, self.bad_every = url, token, requests, clients, bad_every
        self.payloads = payloads(seed)
        self.next, self.lock = 0, threading.Lock()
        self.answered, self.missing, self.wrong, self.images = 0, 0, 0, 0
        self.latencies: list[float] = []
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.reasons: Counter[str] = Counter()

    def run(self) -> list[threading.Thread]:
        """Let the clients begin."""
        threads = [threading.Thread(target=self._client, args=(number,)) for number in range(self.clients)]
        for thread in threads:
            thread.start()
        return threads

    def _client(self, number: int) -> None:
        remotes = {name: Remote(name, [self.url]) for name in REWARDS}
        for remote in remotes.values():
            remote.check()
        with httpx.Client(base_url=self.url, timeout=60) as raw:
            while True:
                with self.lock:
                    at, self.next = self.next, self.next + 1
                if at >= self.requests:
                    return
                self._ask(remotes, at)
                kind = {0: "malformed", 1: "oversized", 2: "unauthorised"}.get(at % self.bad_every)
                if kind:
                    self._misbehave(raw, kind)

    def _ask(self, remotes: dict[str, Remote], at: int) -> None:
        name, images, records, expected = self.payloads[at % len(self.payloads)]
        began = time.perf_counter()
        try:
            scores = remotes[name].score(images, records).tolist()
        except MarbleError as error:
            with self.lock:
                self.missing += 1
                self.reasons[str(error).split(" does not answer")[-1][:80]] += 1
            time.sleep(PAUSE)
            return
        with self.lock:
            self.answered += 1
            self.images += len(images)
            self.wrong += scores != expected
            self.latencies.append(time.perf_counter() - began)

    def _misbehave(self, raw: httpx.Client, kind: str) -> None:
        _, images, records, _ = self.payloads[0]
        body = pack_request(REWARDS[0], images, records)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.token}"}
        if kind == "malformed":
            body = body[:-30]
        elif kind == "oversized":
            body += b" " * (LIMIT * 2**20)
        else:
            del headers["Authorization"]
        try:
            status = raw.post("/score", content=body, headers=headers).status_code
        except httpx.TransportError:
            status = 0  # during the outage
        with self.lock:
            self.statuses[kind, status] += 1


def bit_equality(url: str) -> dict[int, bool]:
    """For several numbers of images: do runs with served rewards get the scores that those with local ones get?"""
    from marble.config import RewardUse

    rng = np.random.default_rng(5)
    records = [*words("train")[:70], *objects("train")[:60]]
    equal = {}
    for count in COUNTS:
        images = pictures(rng, count).float() / 255
        own, groups = records[:count], torch.arange(count)
        tables = [
            score_images([make_reward(RewardUse(reward=name, url=urls)) for name in REWARDS], images, own, groups)
            for urls in ([], [url])
        ]
        here, there = (table.scores.numpy().tobytes() for table in tables)
        equal[count] = here == there and bool(tables[0].applies.all())
    return equal


def soak(
    requests: int = 2000, clients: int = 8, bad_every: int = 100, away: float = AWAY, growth_limit: int = GROWTH
) -> dict[str, object]:
    """All of it.

    Raises:
        AssertionError: something was not as it must be.
    """
    token = secrets.token_urlsafe(24)
    os.environ[TOKEN] = token
    memories: list[int] = []
    with served(token) as processes:
        run = Soak(processes[0].url, token, requests, clients, bad_every)
        threads, began, restarted = run.run(), time.perf_counter(), 0.0
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.02)
            if not restarted and run.next >= KILLED_AT * requests:
                processes[0].end(signal.SIGKILL)
                time.sleep(away)
                processes.append(Process(token, processes[0].port))
                restarted = run.next + WARM * (requests - run.next)
            if restarted and run.next >= restarted:
                memories.append(processes[-1].memory())
        seconds = time.perf_counter() - began
        assert restarted, "the server was never killed"
        assert processes[-1].process.poll() is None, "the server ended by itself"
        equal = bit_equality(processes[-1].url)
        headers = {"Authorization": f"Bearer {token}"}
        text = httpx.get(processes[-1].url + "/metrics", headers=headers).text
    third = len(memories) // 3
    first, last = (float(np.median(part)) for part in (memories[:third], memories[-third:]))
    bad = {kind: {s: n for (k, s), n in sorted(run.statuses.items()) if k == kind} for kind, _ in run.statuses}
    figures = {
        "requests": requests,
        "clients": clients,
        "seconds": round(seconds, 1),
        "answered": run.answered,
        "images": run.images,
        "missing in the outage": run.missing,
        "why": dict(run.reasons),
        "scores that differ": run.wrong,
        "statuses of bad requests (0: outage)": bad,
        "latency ms, p50 and p95": [round(1e3 * float(q), 1) for q in np.quantile(run.latencies, [0.5, 0.95])],
        "memory of the restarted server, MB": {
            "first third": round(first / 2**20, 1),
            "last third": round(last / 2**20, 1),
            "least": round(min(memories) / 2**20, 1),
            "most": round(max(memories) / 2**20, 1),
        },
        "bit for bit, by images": equal,
    }
    assert run.answered + run.missing == requests
    assert run.wrong == 0, f"{run.wrong} answers differ from the scores made here"
    assert run.missing < requests / 4, figures
    for kind, status in (("malformed", 400), ("oversized", 413), ("unauthorised", 401)):
        assert set(bad[kind]) <= {status, 0}, figures
        assert bad[kind].get(status, 0) > 0, figures
    assert last - first < growth_limit, figures
    assert all(equal.values()), figures
    assert "marble_images_total" in text
    return figures


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(soak(options.requests, options.clients), indent=1))


if __name__ == "__main__":
    main()

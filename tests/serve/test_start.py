"""The command: what it refuses to start, and a short soak of what it starts."""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from marble import MarbleError, Reward
from marble.cli import serve as command
from marble.config import RewardUse
from marble.mini.rewards import Aesthetic
from marble.prompts import Record
from marble.rewards import http, make_reward
from marble.rewards.wire import pack_request
from marble.serve import start
from marble.serve.app import App
from marble.serve.door import Limits

from ..rewards.running import RED, pictures
from .visits import visited

TOKEN = "0123456789abcdef"


class Floats(Reward):
    name = "floats"
    wants_floats = True


class Crowd(Reward):
    name = "crowd"
    workers = 1000


class Sized(Reward):
    name = "sized"

    def __init__(self, *, device: str = "auto", size: int = 3):
        self.device, self.size = device, size

    def prepare(self):
        if self.size == 13:
            raise MarbleError("bad luck")


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.delenv("MARBLE_TOKEN", raising=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name at least one reward"),
        (["mini-aesthetics"], 'Did you mean "mini-aesthetic"'),
        (["http://127.0.0.1:1/mean"], "is served already"),
        ([f"{__name__}:Floats"], "takes pictures as floats"),
        ([f"{__name__}:Crowd"], "at most 64 threads, got 1000"),
        (["mini-text", "mini-text"], "given more than once"),
        (["mini-text", "--host", "0.0.0.0"], "a token is needed: --token-file"),
        (["mini-text", "--host", "192.0.2.1"], "a token is needed"),
        (["mini-text", "--port", "70000"], "--port: must be from 0"),
        (["mini-text", "--token-file", "/nowhere"], '"/nowhere" does not exist'),
        (["mini-text", "--max-megabytes", "0"], "--max-megabytes"),
        (["mini-text", "--rate", "0"], "--rate"),
        (["mini-text", "--threads", "0"], "--threads"),
        (["mini-text", "--certificate", __file__], "both are needed"),
        (["mini-text", "--certificate", "/nowhere", "--key", __file__], '--certificate: "/nowhere" does not exist'),
        (["mini-text", "--port", "0", "--certificate", __file__, "--key", __file__], "cannot be used: "),
        (["--config", "/nowhere.yaml"], "does not exist"),
    ],
)
def test_what_it_refuses_to_start(arguments, message):
    with pytest.raises(MarbleError, match=message):
        command.run(arguments)


def test_a_token(tmp_path, monkeypatch):
    assert start.read_token(None) is None
    monkeypatch.setenv("MARBLE_TOKEN", "short")
    with pytest.raises(MarbleError, match="MARBLE_TOKEN: a token is one word of at least 16") as caught:
        start.read_token(None)
    assert "short" not in str(caught.value)
    monkeypatch.setenv("MARBLE_TOKEN", TOKEN)
    assert start.read_token(None) == TOKEN
    file = tmp_path / "token"
    for text, fits in (
        (f"{TOKEN}x\n", True),
        (TOKEN[:-1], False),
        ("", False),
        ("two words of it, long enough", False),
    ):
        file.write_text(text)
        if fits:
            assert start.read_token(file) == text.strip()
        else:
            with pytest.raises(MarbleError, match="--token-file: "):
                start.read_token(file)


def test_a_port_that_is_taken_or_not_ours():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(MarbleError, match="cannot be listened on: "):
            start.listen("127.0.0.1", other.getsockname()[1], None)
    with pytest.raises(MarbleError, match="cannot be listened on: "):
        start.listen("192.0.2.1", 0, TOKEN)
    with start.listen("localhost", 0, None) as port, pytest.raises(ConnectionRefusedError):
        socket.create_connection(port.getsockname()[:2])  # not open before the rewards are there


CONFIG = f"""
prompts: [{{source: mini-places}}]
rewards:
  - mini-aesthetic
  - {{reward: "{__name__}:Sized", settings: {{size: 4, device: cuda}}}}
  - {{reward: mini-text, url: "http://127.0.0.1:1"}}
  - http://127.0.0.1:1/other
held_out_rewards: [{{reward: mini-second-alignment, settings: {{name: second}}}}]
"""


def test_rewards_of_a_config(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG)
    uses = start.uses_of([], config, {"device": "cpu", "dtype": "bfloat16"})
    assert [use.reward for use in uses] == ["mini-aesthetic", f"{__name__}:Sized", "mini-second-alignment"]
    assert [use.settings for use in uses] == [{}, {"size": 4, "device": "cpu"}, {"name": "second"}]
    assert [use.reward for use in start.uses_of(["mini-aesthetic"], config, {})] == ["mini-aesthetic"]
    with pytest.raises(MarbleError, match="judges no mini-text itself"):
        start.uses_of(["mini-text"], config, {})
    desks = start.make_desks([RewardUse(reward=f"{__name__}:Sized", settings={"size": 4, "device": "cpu", "batch": 3})])
    assert re.fullmatch("with settings [0-9a-f]{8}", desks[0].revision)
    assert desks[0].facts()["batch"] == 3
    desks[0].close(1)
    with pytest.raises(MarbleError, match="reward sized: bad luck"):
        start.make_desks([RewardUse(reward=f"{__name__}:Sized", settings={"size": 13})])


def load_soak():
    path = Path(__file__).parents[2] / "bench" / "serve_soak.py"
    spec = importlib.util.spec_from_file_location("serve_soak", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_short_soak(monkeypatch):
    monkeypatch.setattr(http, "PAUSE", 0.2)
    monkeypatch.setattr(http, "REST", 0.5)
    soak = load_soak()
    monkeypatch.setattr(soak, "COUNTS", (1, 7, 70))
    figures = soak.soak(requests=60, clients=4, bad_every=12, away=0.0, growth_limit=2**26)
    assert figures["scores that differ"] == 0
    assert figures["bit for bit, by images"] == {1: True, 7: True, 70: True}


@pytest.mark.slow
def test_the_whole_soak():
    assert torch.get_num_threads() == 1
    figures = load_soak().soak()
    assert figures["answered"] + figures["missing in the outage"] == 2000


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_https(tmp_path, monkeypatch):
    kind = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    names = "-addext subjectAltName=DNS:localhost -keyout key.pem -out certificate.pem"
    subprocess.run(["openssl", "req", *kind.split(), *names.split()], cwd=tmp_path, capture_output=True, check=True)
    files = {"certificate": tmp_path / "certificate.pem", "key": tmp_path / "key.pem"}
    app = App(start.make_desks([RewardUse(reward=f"{__name__}:Sized")]), Limits())
    monkeypatch.setattr(start, "SPEAKING", 0.2)

    def look(url):
        with pytest.raises(MarbleError, match="CERTIFICATE_VERIFY_FAILED"):
            http_check(url)
        monkeypatch.setenv("SSL_CERT_FILE", str(files["certificate"]))
        http_check(url)
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(url.replace("https", "http") + "/health")
        with socket.create_connection(("localhost", int(url.rpartition(":")[2]))) as silent:
            silent.settimeout(5)
            assert not silent.recv(1)  # no handshake came

    visited(app, look, **files)


HANGING = """
import threading
import time

import marble


class Hanging(marble.Reward):
    name = "hanging"
    workers = 3

    def applies(self, record):
        if record.text == "hang":
            threading.Thread(target=time.sleep, args=(1000,), daemon=False).start()  # Python waits for it
            time.sleep(1000)
        return True
"""


class Process:
    """A `marble serve` of its own process."""

    def __init__(self, folder, port=0):
        (folder / "hangs.py").write_text(HANGING)
        command = [sys.executable, "-m", "marble", "serve", "mini-aesthetic", "hangs:Hanging", "--port", str(port)]
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    def __enter__(self):
        line = self.process.stdout.readline()
        assert line.startswith("marble: serving aesthetic, hanging on http://127.0.0.1:"), line
        self.url = re.search(r"http://[0-9.:]+", line)[0]
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait(10)
        self.process.stdout.close()


def test_a_process_that_is_killed_comes_back_and_ends_when_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(http, "PAUSE", 0.1)
    images = pictures(30, 90, 200, size=64)
    expected = Aesthetic().score(images, [RED] * 3).tolist()
    with Process(tmp_path) as first:
        reward = make_reward(RewardUse(reward="aesthetic", url=first.url, settings={"retries": 8}))
        reward.check()
        assert reward.score(images, [RED] * 3).tolist() == expected
        first.process.kill()
        first.process.wait(10)
    with ThreadPoolExecutor(1) as pool:
        away = pool.submit(reward.score, images, [RED] * 3)
        with Process(tmp_path, int(first.url.rpartition(":")[2])) as second:
            assert away.result(60).tolist() == expected
            hang = pack_request("hanging", images[:1], [Record("hang", "s")])
            headers = {"Content-Type": "application/json"}
            for path in ("/score", "/score", "/applies"):
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(second.url + path, content=hang, headers=headers, timeout=0.1)
            began = time.monotonic()
            second.process.send_signal(signal.SIGTERM)
            assert second.process.wait(15) == 0
            assert time.monotonic() - began < 6


def http_check(url):
    from marble.rewards.remote import Remote

    Remote("sized", [url], retries=0).check()

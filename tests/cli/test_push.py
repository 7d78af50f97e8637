"""`marble push` against a hub on this machine that speaks as much of the hub's API as an upload needs."""

import base64
import hashlib
import json
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest

from marble import Run, train
from marble.card import write_bundle
from marble.cli import main
from marble.cli import push as command
from marble.config import demo_config_path, make_config, read_config
from marble.export import LORA_FILE

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # within the hub's client
TOKEN = "hf_" + "secret" * 5
REPO = "me/my-lora"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    values = read_config(demo_config_path())
    values["rollout"] |= {"prompts": 3, "group_size": 2, "steps": 3}
    values["objective"] |= {"timesteps": 1}
    values["optimizer"] |= {"updates_per_epoch": 1}
    values["evaluation"] = {"prompts": 3, "images": 2, "steps": 2}
    values |= {"budget": {"updates": 1}, "threads": 1}
    return train(make_config(values), tmp_path_factory.mktemp("push") / "run")


class Hub(ThreadingHTTPServer):
    """One user `me`, member of `us`; repositories by name; every request seen."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos = {}  # name → {"private": …, "files": {path: bytes}, "commits": [summary]}
        self.blobs = {}  # sha256 → bytes
        self.seen = []
        self.answers = {}  # part of a path → (status, body): said instead

    def handle_error(self, request, client_address):
        raise AssertionError("the hub of this test broke")


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle_any(self):
        path, hub = self.path.split("?")[0], self.server
        data = self.body()
        hub.seen.append((self.command, path))
        for end, (status, body) in hub.answers.items():
            if end in path:
                return self.answer(status, body)
        if path.startswith("/blob/"):
            hub.blobs[path.removeprefix("/blob/")] = data
            return self.answer(200, {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/whoami-v2":
            return self.answer(200, {"type": "user", "name": "me", "orgs": [{"name": "us"}]})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(data))
        name = "/".join(path.removeprefix("/api/models/").removeprefix("/").split("/")[:2]).removesuffix(".git")
        if name not in hub.repos:
            return self.answer(404, {"error": "Repository not found"})
        repo = hub.repos[name]
        if self.command == "GET":
            return self.answer(200, {"_id": "1", "id": name, "private": repo["private"], "siblings": [], "tags": []})
        if name.split("/")[0] not in ("me", "us"):
            return self.answer(403, {"error": "Forbidden: you need write access"})
        if path.endswith("/preupload/main"):
            files = json.loads(data)["files"]
            modes = {True: "lfs", False: "regular"}
            return self.answer(
                200,
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": modes[file["path"].endswith(".safetensors")],
                            "shouldIgnore": False,
                        }
                        for file in files
                    ]
                },
            )
        if path.endswith("/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{hub.url}/blob/{item['oid']}"}}}
                for item in json.loads(data)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        assert path.endswith("/commit/main"), path
        for line in data.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                repo["commits"].append(value["summary"])
            elif item["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            else:
                repo["files"][value["path"]] = hub.blobs[value["oid"]]
        return self.answer(200, {"commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1" * 40})

    def create(self, wanted):
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] not in ("me", "us"):
            return self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        if name in self.server.repos:
            return self.answer(
                409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}
            )
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.server.repos[name] = {"private": private, "files": {}, "commits": []}
        return self.answer(200, {"url": f"{self.server.url}/{name}"})

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    do_GET = do_POST = do_PUT = handle_any


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    at(monkeypatch, server.url, tmp_path)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def at(monkeypatch, url, folder, token=TOKEN):
    """Let the hub's client talk to `url`, with `token` in the environment and no other anywhere."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # its protocol is not spoken here
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)


@pytest.fixture
def push(run, capsys, monkeypatch):
    """Run the command: `(exit code, output, error output)`; a token is in none of them."""
    monkeypatch.setitem(main.__globals__["COMMANDS"], "push", "")

    def call(*arguments, of=run.path):
        code = main(["push", *map(str, (of, *arguments))])
        out, err = capsys.readouterr()
        assert TOKEN not in out + err
        assert "Traceback" not in err
        return code, out, err

    return call


@pytest.fixture
def mistake(push):
    """Run the command, which must fail as a user's mistake does; its one message."""

    def call(*arguments, **options):
        code, out, err = push(*arguments, **options)
        assert (code, out) == (2, ""), err
        assert err.startswith("marble: ")
        assert err.count("\n") == 1
        return err

    return call


def test_a_push_is_one_commit_of_exactly_what_a_dry_run_writes(push, hub, run, tmp_path):
    code, out, err = push(REPO, "--json", "--license", "apache-2.0")
    assert code == 0, err
    repo = hub.repos[REPO]
    assert len(repo["commits"]) == 1
    assert not repo["private"]
    hub.seen.clear()
    assert push(REPO, "--dry-run", tmp_path / "dry", "--license", "apache-2.0")[0] == 0
    assert hub.seen == []
    written = {p.relative_to(tmp_path / "dry").as_posix(): p.read_bytes() for p in files_in(tmp_path / "dry")}
    assert repo["files"] == written
    assert {name.split("/")[0] for name in written} == {
        *("README.md", "config.yaml", "evaluation.json", "images", LORA_FILE)
    }
    result = json.loads(out)
    assert result["repo"] == REPO
    assert result["url"] == f"{hub.url}/{REPO}"
    assert {row["file"]: row["bytes"] for row in result["files"]} == {name: len(data) for name, data in written.items()}
    assert hashlib.sha256(written[LORA_FILE]).hexdigest() in hub.blobs  # by the protocol for large files
    assert all(str(run.path.parent).encode() not in data for data in written.values())


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_pushing_again_replaces(push, hub):
    hub.repos[REPO] = {"private": False, "files": {"README.md": b"old", "mine.txt": b"stays"}, "commits": ["first"]}
    assert push(REPO)[0] == 0
    assert len(hub.repos[REPO]["commits"]) == 2
    assert hub.repos[REPO]["files"]["README.md"] != b"old"
    assert hub.repos[REPO]["files"]["mine.txt"] == b"stays"


def test_private_is_private_or_refused(push, mistake, hub):
    assert push("us/one", "--private")[0] == 0
    assert hub.repos["us/one"]["private"]
    hub.repos["us/two"] = {"private": False, "files": {}, "commits": []}
    assert "us/two is there and public" in mistake("us/two", "--private")
    assert hub.repos["us/two"]["files"] == {}


def test_a_missing_token_is_one_message(mistake, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "no token for the hub: log in with hf auth login, or set HF_TOKEN" in mistake(REPO)
    assert hub.seen == []


def test_the_token_of_a_login_serves(push, hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "no-token").write_text(TOKEN)
    assert push(REPO)[0] == 0


def test_a_wrong_token_is_one_message(mistake, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = mistake(REPO)
    assert "the hub refuses the token" in message
    assert "hf_wrong" not in message
    assert hub.seen == [("GET", "/api/whoami-v2")]
    monkeypatch.setenv("HF_TOKEN", "hf_wröng")
    assert "characters that no token has" in mistake(REPO)


@pytest.mark.parametrize("there", [False, True])
def test_somebody_elses_repository_is_one_message(mistake, hub, there):
    if there:
        hub.repos["you/lora"] = {"private": False, "files": {}, "commits": []}
    message = mistake("you/lora")
    assert 'the token may not write to "you/lora"' in message
    assert "it may belong to me or us" in message
    assert all(repo["files"] == {} for repo in hub.repos.values())


def test_a_card_or_upload_that_the_hub_refuses_is_one_message(mistake, hub):
    refusal = {"errors": [{"message": '"license" must be one of [apache-2.0, …]'}], "warnings": []}
    hub.answers["/api/validate-yaml"] = (400, refusal)
    assert '"license" must be one of' in mistake(REPO, "--license", "my-own")
    hub.answers = {"/commit/main": (500, {"error": f"no room for {TOKEN}"})}
    message = mistake(REPO)  # without the token, which `mistake` sees to
    assert "the hub answers 500" in message
    assert "no room for …" in message
    hub.answers = {"/blob/": (507, {"error": "the disk is full"})}
    assert "the hub answers 507" in mistake(REPO)
    hub.answers = {"/api/whoami-v2": (200, {})}
    assert "the hub's answer is not understood" in mistake(REPO)


def test_no_network_is_one_message(mistake, monkeypatch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    at(monkeypatch, f"http://127.0.0.1:{port}", tmp_path)
    assert f"cannot reach http://127.0.0.1:{port}" in mistake(REPO)


def test_offline_mode_is_one_message(mistake, monkeypatch, tmp_path, hub):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()  # a new one sees the setting
    try:
        assert "HF_HUB_OFFLINE is set" in mistake(REPO)
    finally:
        huggingface_hub.close_session()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a/b/c"], "repo: cannot be a name on the hub"),
        (["a/b\nc"], "repo: cannot be a name on the hub"),
        (["me/with space"], "cannot be a name on the hub"),
        (["../up"], "cannot be a name on the hub"),
        (["alone"], "repo: give owner and name, as in me/alone"),
        ([REPO, "--license", "Apache 2.0\nx: y"], "--license: give the hub's name of it"),
    ],
)
def test_malformed_arguments_are_refused_before_anything_else(arguments, message, mistake, hub):
    assert message in mistake(*arguments)
    assert hub.seen == []


def test_a_dry_run_needs_no_token_and_spares_what_is_there(push, mistake, monkeypatch, tmp_path, run):
    at(monkeypatch, "http://127.0.0.1:1", tmp_path, token=None)
    code, out, _ = push(REPO, "--dry-run", tmp_path / "dry", "--json")
    assert code == 0
    assert [row["file"] for row in json.loads(out)["files"]] == [
        path.as_posix() for path in write_bundle(run, REPO, tmp_path / "same")
    ]
    for path in files_in(tmp_path / "same"):
        assert (tmp_path / "dry" / path.relative_to(tmp_path / "same")).read_bytes() == path.read_bytes()
    assert "exists and is not empty" in mistake(REPO, "--dry-run", tmp_path / "dry")
    (tmp_path / "empty").mkdir()
    assert push(REPO, "--dry-run", tmp_path / "empty")[0] == 0


def test_runs_that_cannot_be_pushed(mistake, hub, run, tmp_path):
    assert "is not a run folder" in mistake(REPO, of=tmp_path)
    shutil.copytree(run.path, tmp_path / "copy", ignore=shutil.ignore_patterns("lora", "checkpoints"))
    assert "it has not finished" in mistake(REPO, of=tmp_path / "copy")
    assert not any(name.endswith("create") for _, name in hub.seen)


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as end:
        command.run(["--help"])
    assert end.value.code == 0
    assert "example: marble push runs/demo" in " ".join(capsys.readouterr().out.split())


def test_a_run_folder_is_not_changed(push, hub, run):
    before = {path: path.read_bytes() for path in files_in(run.path)}
    assert push(REPO)[0] == 0
    assert {path: path.read_bytes() for path in files_in(Run(run.path).path)} == before

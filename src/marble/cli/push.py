"""`marble push`."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from marble.errors import MarbleError

_WEB = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")  # what the hub's client may be built on


@dataclass
class Push:
    """Publish a run's LoRA on the Hugging Face hub, with a complete model card, in one commit.

    Pushed are the LoRA, the card (README.md), config.yaml and evaluation.json without local paths, and the pictures
    that the card shows; nothing else. The token is that of `hf auth login` or of the variable HF_TOKEN.

    example: marble push runs/demo me/my-lora --dry-run look-first
             marble push runs/demo me/my-lora --private
    """

    run: tyro.conf.Positional[Path]
    """run folder"""
    repo: tyro.conf.Positional[str]
    """where to on the hub, as owner/name; made if it is not there"""
    dry_run: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """write what would be pushed into this folder, new or empty, and push nothing; needs no token or network"""
    private: bool = False
    """for you alone; refused if the repository is there and public"""
    license: Annotated[str | None, tyro.conf.arg(metavar="ID")] = None
    """the LoRA's license, as the hub calls it (apache-2.0, openrail++, other, …); none is stated unless given"""
    json: Annotated[bool, tyro.conf.arg(help="print what was pushed as JSON")] = False


def run(argv: list[str]) -> int:
    """The command."""
    args = tyro.cli(Push, args=argv, prog="marble push")
    _check(args)
    from marble.run import Run

    made = Run(args.run)
    if args.dry_run is not None:
        result: dict[str, Any] = {"folder": str(args.dry_run), "files": _write(made, args, args.dry_run)}
        lines = [f"{args.dry_run / row['file']}  {row['bytes']} bytes" for row in result["files"]]
    else:
        token = _token()
        with tempfile.TemporaryDirectory(prefix="marble-push-") as folder:
            files = _write(made, args, Path(folder))
            result = {"repo": args.repo, "url": _push(args, Path(folder), token), "files": files}
        lines = [f"pushed {len(files)} files: {result['url']}"]
    print(json.dumps(result) if args.json else "\n".join(lines))
    return 0


def _check(args: Push) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(args.repo)
    except HFValidationError as error:
        raise MarbleError(f"repo: cannot be a name on the hub: {_first_line(error)}") from error
    if args.repo.count("/") != 1:
        raise MarbleError(f'repo: give owner and name, as in me/{args.repo}; got "{args.repo}"')
    if args.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", args.license):
        raise MarbleError(f"--license: give the hub's name of it, as apache-2.0 or other; got {args.license!r}")
    folder = args.dry_run
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MarbleError(f'--dry-run: "{folder}" exists and is not empty; choose another folder or delete it first')


def _write(made: Any, args: Push, folder: Path) -> list[dict[str, Any]]:
    from marble.card import write_bundle

    paths = write_bundle(made, args.repo, folder, args.license)
    return [{"file": path.as_posix(), "bytes": (folder / path).stat().st_size} for path in paths]


def _token() -> str:
    """The user's token, without asking the hub whether it is any good.

    Raises:
        MarbleError: there is none, or it is none by its looks.
    """
    from huggingface_hub import get_token

    with _hub_errors("", ""):
        token = get_token()
    if not token:
        raise MarbleError("no token for the hub: log in with hf auth login, or set HF_TOKEN to a token that may write")
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise MarbleError("the hub's token (HF_TOKEN, or that of hf auth login) has characters that no token has")
    return token


def _push(args: Push, folder: Path, token: str) -> str:
    """Upload `folder` in one commit; returns the repository's address."""
    from huggingface_hub import CommitOperationAdd, HfApi, constants
    from huggingface_hub.utils import disable_progress_bars

    if args.json:
        disable_progress_bars()
    api = HfApi(endpoint=constants.ENDPOINT, token=token)
    with _hub_errors(args.repo, token):
        who = api.whoami()
        owners = [who["name"], *(org["name"] for org in who.get("orgs", []))]
    with _hub_errors(args.repo, token, owners):
        url = api.create_repo(args.repo, private=args.private or None, exist_ok=True)
        if args.private and not api.model_info(args.repo).private:
            raise MarbleError(f"{args.repo} is there and public; make it private on the hub first, or choose another")
        files = [
            CommitOperationAdd(path.relative_to(folder).as_posix(), path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        api.create_commit(args.repo, files, commit_message="LoRA trained with marble")
    return str(url)


@contextmanager
def _hub_errors(repo: str, token: str, owners: list[str] | None = None) -> Iterator[None]:
    """Turn whatever the hub's client raises into one message, with no token in it.

    Raises:
        MarbleError: instead of it.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except MarbleError:
        raise
    except OfflineModeIsEnabled as error:
        raise MarbleError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or use --dry-run") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401 and owners is None:
            text = "the hub refuses the token (HF_TOKEN, or that of hf auth login): it is wrong or no longer valid"
        elif status in (401, 403):
            own = f"; it may belong to {' or '.join(owners)}" if owners else ""
            text = f'the token may not write to "{repo}": it needs the right to write{own}'
        else:
            said = (error.server_message or "").replace(token, "…") if token else ""
            text = f"the hub answers {status}: {' '.join(said.split()) or _first_line(error, token)}"
        raise MarbleError(text) from error
    except Exception as error:
        if isinstance(error, RuntimeError) and error.__cause__ is not None:  # an upload's, around the reason
            with _hub_errors(repo, token, owners):
                raise error.__cause__ from None
        root = type(error).__module__.split(".")[0]
        if root in _WEB or isinstance(error, ConnectionError):
            text = f"cannot reach {constants.ENDPOINT}: {_first_line(error, token)}"
        elif isinstance(error, (KeyError, TypeError)):
            text = f"the hub's answer is not understood ({type(error).__name__}: {_first_line(error, token)})"
        elif root == "huggingface_hub" or isinstance(error, (ValueError, RuntimeError, OSError)):
            text = f"the hub's client gives up: {_first_line(error, token)}"
        else:
            raise
        raise MarbleError(text) from error


def _first_line(error: Exception, token: str = "") -> str:
    """What an error says, in short and without the token."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2])
    return text.replace(token, "…") if token else text

"""`marble serve`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from marble.errors import MarbleError


@dataclass
class Serve:
    """Judge for runs elsewhere: rewards over HTTP, with the scores that they would have had there.

    In a config, `{reward: NAME, url: "http://host:8420"}` is judged by such a server; several URLs share the work. On
    127.0.0.1 a token is optional, anywhere else needed: one word in a file or in the environment variable MARBLE_TOKEN,
    here and where the run is. Bodies and tokens are never logged.

    example: marble serve pickscore hpsv21 --port 8420
    """

    rewards: tyro.conf.Positional[list[str]] = field(default_factory=list)
    """registered names, or package.module:attribute"""
    host: str = "127.0.0.1"
    port: int = 8420
    """0: a free one"""
    token_file: Path | None = None
    """file with the token; else MARBLE_TOKEN"""
    max_megabytes: int = 256
    """largest body; a portion of 64 images takes about 45 at 512 px and 160 at 1024 px"""
    rate: float = 100.0
    """requests per second and address; one in excess is told when to come back, and ours do"""
    config: Path | None = None
    """take the rewards of a config, with their settings (those named, if any are)"""
    device: str | None = None
    """of all rewards with networks: auto, cpu, cuda, cuda:1"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """of all rewards with networks"""
    threads: int | None = None
    """CPU threads; as torch chooses, if not given"""
    certificate: Path | None = None
    """PEM file, for https"""
    key: Path | None = None
    """PEM file of the certificate's key"""


def run(argv: list[str]) -> int:
    """The command."""
    args = tyro.cli(Serve, args=argv, prog="marble serve")
    _check(args)
    try:
        from marble.serve import start
        from marble.serve.app import App
        from marble.serve.door import Limits
    except ImportError as error:
        raise MarbleError(f'serving needs {error.name}: pip install "marble-diffusion[rewards]"') from error
    token = start.read_token(args.token_file)
    changes = {name: value for name in ("device", "dtype") if (value := getattr(args, name)) is not None}
    uses = start.uses_of(args.rewards, args.config, changes)
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
    with start.listen(args.host, args.port, token) as port:
        limits = Limits(token, start.is_loopback(args.host), args.max_megabytes * 2**20, args.rate)
        app = App(start.make_desks(uses), limits)
        try:
            line = _started(args, app.names, port.getsockname()[1], token)
            start.serve(app, port, certificate=args.certificate, key=args.key, opened=lambda: print(line, flush=True))
            start.end_soon()
        finally:
            app.close()
    return 0


def _started(args: Serve, names: list[str], port: int, token: str | None) -> str:
    scheme = "http" if args.certificate is None else "https"
    host = f"[{args.host}]" if ":" in args.host else args.host
    note = "" if token else "; every user of this machine can use it: a token (--token-file) is better"
    return f"marble: serving {', '.join(names)} on {scheme}://{host}:{port}{note}"


def _check(args: Serve) -> None:
    if args.max_megabytes < 1:
        raise MarbleError(f"--max-megabytes: must be at least 1, got {args.max_megabytes}")
    if not 0 < args.rate < math.inf:
        raise MarbleError(f"--rate: must be positive, got {args.rate}")
    if args.threads is not None and args.threads < 1:
        raise MarbleError(f"--threads: must be at least 1, got {args.threads}")
    if (args.certificate is None) != (args.key is None):
        raise MarbleError("--certificate and --key: both are needed, or neither")
    for name in ("certificate", "key"):
        path = getattr(args, name)
        if path is not None and not path.is_file():
            raise MarbleError(f'--{name}: "{path}" does not exist')

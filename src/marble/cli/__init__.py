"""The command line: one command a file, each imported only when it is called."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys

from marble.errors import MarbleError, nearest

COMMANDS = {
    "demo": "fine-tune the embedded model on five rewards and write the report: minutes on a laptop",
    "train": "fine-tune a model from a config",
    "evaluate": "score a model on held-out prompts, against its base or another",
    "compare": "compare methods over seeds under one budget: a table, curves and a verdict",
    "conflict": "see how rewards disagree on a model, before training it: scores, gradients, a suggested set-up",
    "pareto": "draw the front of two or three rewards through runs, checkpoints, LoRA strengths and soups",
    "generate": "make images, with or without a LoRA",
    "score": "score images by rewards, without training",
    "serve": "judge images for other machines, over HTTP",
    "push": "publish a run's LoRA on the Hugging Face hub, with a model card",
    "report": "make a run's report again",
    "validate": "check a config without running it",
    "list": "show the models, rewards, methods, arms, objectives, schedulers or prompt sources there are",
    "bench": "measure an update's speed and memory on models of several shapes; scale: what many GPUs would do",
    "mini": "make the embedded model from scratch (mini pretrain)",
}
"""Command → what it does. `marble.cli.NAME` holds its `run(argv) -> exit code`."""

EXIT_USER_ERROR = 2


def main(argv: list[str] | None = None) -> int:
    """Run a command; a user's mistake is one message and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("marble-diffusion"))
        return 0
    name, rest = argv[0], argv[1:]
    for library in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(library, "error")
    for library in ("bitsandbytes", "huggingface_hub"):  # of a kernel that nobody asked for; of each of its retries
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        if name not in COMMANDS:
            raise MarbleError(f'unknown command "{name}".{nearest(name, COMMANDS)} Known: {", ".join(COMMANDS)}')
        return importlib.import_module(f"marble.cli.{name}").run(rest)
    except MarbleError as error:
        print(f"marble: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("marble: interrupted", file=sys.stderr)
        return 130
    except RuntimeError as error:
        from marble.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print(
            "marble: out of memory; use model.dtype, model.checkpointing, model.offload, model.quantize, a lower "
            "lora.rank, rollout.batch or optimizer.micro_batch, or smaller images (model.call): "
            + str(error).splitlines()[0],
            file=sys.stderr,
        )
        return EXIT_USER_ERROR
    except BrokenPipeError:
        return 1
    except OSError as error:
        where = f' "{error.filename}"' if error.filename else ""
        full = "; a run goes on with marble train --resume RUN" if error.errno == errno.ENOSPC else ""
        print(f"marble: {error.strerror or error}{where}{full}", file=sys.stderr)
        return EXIT_USER_ERROR


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return (
        "marble: fine-tune text-to-image models on several rewards at once\n\n"
        "usage: marble COMMAND …        marble COMMAND --help\n\n" + "\n".join(lines) + "\n\nexample: marble demo"
    )

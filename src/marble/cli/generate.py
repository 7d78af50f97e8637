"""`marble generate`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from marble.errors import MarbleError


@dataclass
class Generate:
    """Make images, the same as stock Diffusers makes with the same seed and arguments.

    Image i of a prompt is made from the seed S + i alone. Whatever is not given is the pipeline's own
    default, except guidance: models trained here are trained without it. `calls.json` beside the images
    says exactly how each was made.

    example: marble generate runs/demo "a red circle left of a blue square" --count 4 --out pictures
    """

    model: tyro.conf.Positional[str]
    """hub id, folder, registered model, or a run folder (its model with its LoRA)"""
    prompts: tyro.conf.Positional[list[str]]
    """one or more prompts"""
    out: Path
    """folder for the PNGs, new or empty"""
    lora: Path | None = None
    """folder with pytorch_lora_weights.safetensors"""
    seed: int = 0
    count: int = 1
    """images per prompt"""
    steps: int | None = None
    """denoising steps"""
    height: int | None = None
    width: int | None = None
    guidance: float = 1.0
    """guidance scale; 1 is none"""
    json: Annotated[bool, tyro.conf.arg(help="print what was made as JSON")] = False


def run(argv: list[str]) -> int:
    """The command."""
    args = tyro.cli(Generate, args=argv, prog="marble generate")
    _check(args)
    from marble.policy import Policy, model_path

    model, lora = args.model, args.lora
    if (Path(model) / "config.yaml").is_file():
        from marble.run import Run

        if lora is None:
            lora = Path(model) / "lora"
        model = Run(Path(model)).config.model.id
    model_path(model)
    policy = Policy.from_pretrained(model)
    if lora is not None:
        policy.load_lora(lora)
    made = _make(policy, args, model, lora)
    if args.json:
        print(json.dumps(made))
    else:
        print("\n".join(str(args.out / row["file"]) for row in made))
    return 0


def _check(args: Generate) -> None:
    for name in ("count", "steps", "height", "width"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise MarbleError(f"--{name}: must be at least 1, got {value}")
    if not 0 <= args.seed < 2**63 - args.count:
        raise MarbleError(f"--seed: must be from 0 to 2**63, got {args.seed}")
    if not args.prompts:
        raise MarbleError("give at least one prompt")
    if args.lora is not None and not (args.lora / "pytorch_lora_weights.safetensors").is_file():
        raise MarbleError(f'--lora: "{args.lora}" holds no pytorch_lora_weights.safetensors')
    from marble.run import check_output

    check_output(args.out)


def _make(policy: Any, args: Generate, model: str, lora: Path | None) -> list[dict[str, Any]]:
    from rich.console import Console
    from rich.progress import track

    given = {"num_inference_steps": args.steps, "height": args.height, "width": args.width}
    call = {name: value for name, value in given.items() if value is not None} | {"guidance_scale": args.guidance}
    jobs = [(p, i) for p in range(len(args.prompts)) for i in range(args.count)]
    made = []
    for p, i in track(jobs, "images", console=Console(stderr=True), disable=args.json):
        image = policy.picture(args.prompts[p], args.seed + i, **call)
        name = f"{p:03d}_{args.seed + i}.png"
        args.out.mkdir(parents=True, exist_ok=True)
        image.save(args.out / name)
        made.append({"file": name, "prompt": args.prompts[p], "seed": args.seed + i, **call})
    content = {"model": model, "lora": None if lora is None else str(lora), "images": made}
    (args.out / "calls.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    return made

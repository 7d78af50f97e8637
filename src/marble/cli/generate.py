"""`marble generate`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from marble.catalogue import SCHEDULERS
from marble.errors import MarbleError


@dataclass
class Generate:
    """Make images or videos, the same as stock Diffusers makes with the same seed and arguments.

    Image i of a prompt is made from the seed S + i alone. Whatever is not given is the pipeline's own
    default, except guidance: models trained here are trained without it. Of a run folder, the model is
    loaded as the run had it, with what the run learned. `calls.json` beside the images says exactly how
    each was made.

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
    frames: int | None = None
    """frames of a video"""
    fps: int = 16
    """frames a second of a video"""
    guidance: float | None = None
    """guidance scale; 1 is none; the run's own, of a run folder"""
    scheduler: Annotated[str, tyro.conf.arg(help="see marble list schedulers")] = "own"
    device: str = "auto"
    """auto, cpu, cuda, cuda:1"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """of the weights; float32, or the run's own"""
    trust_remote_code: bool = False
    """let the model's own code run, also that of a run folder's model"""
    json: Annotated[bool, tyro.conf.arg(help="print what was made as JSON")] = False


def run(argv: list[str]) -> int:
    """The command."""
    args = tyro.cli(Generate, args=argv, prog="marble generate")
    _check(args)
    from marble.policy import Policy, model_path

    model, lora, guidance = args.model, args.lora, args.guidance
    if (Path(model) / "config.yaml").is_file():
        from marble.run import Run
        from marble.setup import load_policy

        run = Run(Path(model))
        config = run.config
        changes: dict[str, Any] = {"device": args.device, "trust_remote_code": args.trust_remote_code}
        changes |= {} if args.dtype is None else {"dtype": args.dtype}
        if lora is None and config.model.train == "lora":
            lora = Path(model) / "lora"
            if not any(lora.glob("*.safetensors")):
                raise MarbleError(f'"{model}" has exported nothing yet: {lora} holds no LoRA')
        model, guidance = config.model.id, config.rollout.guidance if guidance is None else guidance
        policy = load_policy(config.model_copy(update={"model": config.model.model_copy(update=changes)}))
        if config.model.train == "full":
            policy.load_whole(run.path / policy.part)
    else:
        model_path(model)
        policy = Policy.from_pretrained(
            model, device=args.device, dtype=args.dtype or "float32", trust_remote_code=args.trust_remote_code
        )
    if lora is not None:
        policy.load_lora(lora)
    made = _make(policy, args, model, lora, 1.0 if guidance is None else guidance)
    if args.json:
        print(json.dumps(made))
    else:
        print("\n".join(str(args.out / row["file"]) for row in made))
    return 0


def _check(args: Generate) -> None:
    for name in ("count", "steps", "height", "width", "frames", "fps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise MarbleError(f"--{name}: must be at least 1, got {value}")
    if not 0 <= args.seed < 2**63 - args.count:
        raise MarbleError(f"--seed: must be from 0 to 2**63, got {args.seed}")
    if not args.prompts:
        raise MarbleError("give at least one prompt")
    if args.scheduler not in SCHEDULERS:
        raise MarbleError(f'--scheduler: "{args.scheduler}" is not one of {", ".join(SCHEDULERS)}')
    if args.lora is not None and not any(args.lora.glob("*.safetensors")):
        raise MarbleError(f'--lora: "{args.lora}" holds no pytorch_lora_weights.safetensors')
    from marble.run import check_output

    check_output(args.out)


def _make(policy: Any, args: Generate, model: str, lora: Path | None, guidance: float) -> list[dict[str, Any]]:
    from rich.console import Console
    from rich.progress import track

    given = {"num_inference_steps": args.steps, "height": args.height, "width": args.width, "num_frames": args.frames}
    call = {name: value for name, value in given.items() if value is not None} | policy.caller.guided(guidance)
    if idle := [name for name in call if name not in policy.caller.known]:
        raise MarbleError(f"{type(policy.pipe).__name__} takes no {', '.join(idle)}")
    jobs = [(p, i) for p in range(len(args.prompts)) for i in range(args.count)]
    made = []
    for p, i in track(jobs, "images", console=Console(stderr=True), disable=args.json):
        picture = policy.picture(args.prompts[p], args.seed + i, scheduler=args.scheduler, **call)
        args.out.mkdir(parents=True, exist_ok=True)
        name = save_picture(picture, args.out / f"{p:03d}_{args.seed + i}", args.fps)
        made.append({"file": name, "prompt": args.prompts[p], "seed": args.seed + i, **call})
    content = {"model": model, "lora": None if lora is None else str(lora), "scheduler": args.scheduler, "images": made}
    (args.out / "calls.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    return made


def save_picture(picture: Any, path: Path, fps: int) -> str:
    """Write an image as PNG, a video (a list or array of frames) as GIF; returns the file's name."""
    import numpy as np
    from PIL import Image

    if isinstance(picture, Image.Image):
        picture.save(path.with_suffix(".png"))
        return path.with_suffix(".png").name
    frames = [
        frame
        if isinstance(frame, Image.Image)
        else Image.fromarray((np.clip(frame, 0, 1) * 255).round().astype(np.uint8))
        for frame in picture
    ]
    first, *others = frames
    first.save(path.with_suffix(".gif"), save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
    return path.with_suffix(".gif").name

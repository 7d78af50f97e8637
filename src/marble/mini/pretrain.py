"""Makes the shipped model: an autoencoder, then text encoders and denoiser together, by flow matching.

Every stage leaves a file in the work folder and is skipped when that file is there, so an interrupted
run goes on where it was. All random numbers are drawn from (seed, stage, step): a resumed run and an
uninterrupted one see the same data.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from marble.mini.build import CONTEXT_TOKENS, JOINT_DIM, build_pipeline
from marble.mini.pairs import Imperfection, draw_spec, imperfect_pair
from marble.mini.world import World
from marble.storage import load_tree, save_tree

T5_TOKENS = 12
"""What our own calls of the pipeline append to the caption (`max_sequence_length`): enough for any of the world's."""
STOCK_T5_TOKENS = 256
"""What a stock call appends; the model sees it in one step of `stock_every`."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the shipped weights, the world itself apart."""

    seed: int = 0
    vae_steps: int = 2400
    vae_batch: int = 24
    pairs: int = 80_000
    steps: int = 6000
    batch: int = 64
    muon_lr: float = 2.5e-3
    adam_lr: float = 1e-3
    warmup: int = 200
    cooldown: int = 1500  # the learning rate falls to 0 over so many steps before `objects_from`
    ema: float = 0.999
    caption_dropout: float = 0.1
    stock_every: int = 10
    words_from: int = 2500  # from this step on half of every batch are words, which are learned late
    objects_from: int = 5000  # from this step on, at half the learning rate, 60% objects and 30% words
    save_every: int = 500
    imperfection: Imperfection = field(default_factory=Imperfection)

    def scaled(self, share: float) -> Recipe:
        """The same with fewer steps and pictures."""
        names = ("vae_steps", "pairs", "steps", "warmup", "cooldown", "save_every", "words_from", "objects_from")
        return replace(self, **{name: max(1, round(getattr(self, name) * share)) for name in names})


_STAGES = ("vae", "pairs", "denoiser")


def _rng(seed: int, stage: str, step: int) -> np.random.Generator:
    return np.random.default_rng([seed, _STAGES.index(stage), step])


def _render_pairs(world: World, recipe: Recipe, stage: str, start: int, count: int) -> tuple[np.ndarray, list[str]]:
    images, captions = [], []
    for index in range(start, start + count):
        rng = _rng(recipe.seed, stage, index)
        image, caption = imperfect_pair(world, draw_spec(world, rng), rng, recipe.imperfection)
        images.append(image)
        captions.append(caption)
    return np.stack(images), captions


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )


def _as_input(images: np.ndarray) -> torch.Tensor:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


def train_vae(pipe: Any, world: World, recipe: Recipe, work: Path) -> None:
    """Train `pipe.vae` in place and set the scaling and shift of its latents."""
    path, vae = work / "vae.safetensors", pipe.vae
    if path.exists():
        saved = load_tree(path)
        vae.load_state_dict(saved["weights"])
        vae.register_to_config(shift_factor=saved["shift"], scaling_factor=saved["scale"])
        return
    torch.manual_seed(recipe.seed)
    vae.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=recipe.vae_steps, pct_start=0.05)
    with ProcessPoolExecutor(1) as pool, _progress() as bar:
        task = bar.add_task("autoencoder", total=recipe.vae_steps, loss="")
        ahead = [
            pool.submit(_render_pairs, world, recipe, "vae", s * recipe.vae_batch, recipe.vae_batch) for s in range(4)
        ]
        for step in range(recipe.vae_steps):
            pixels = _as_input(ahead.pop(0).result()[0])
            at = (step + 4) * recipe.vae_batch
            ahead.append(pool.submit(_render_pairs, world, recipe, "vae", at, recipe.vae_batch))
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample
            error = decoded - pixels
            edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) * 0.5
            loss = error.abs().mean() + edges + 1e-5 * posterior.kl().mean() / 64
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update(task, advance=1, loss=f"L1 {error.abs().mean().item():.4f}")
    vae.eval()
    images, _ = _render_pairs(world, recipe, "vae", 10**7, 512)
    with torch.no_grad():
        latents = torch.cat([vae.encode(_as_input(part)).latent_dist.mode() for part in np.split(images, 8)])
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    save_tree(path, {"weights": vae.state_dict(), "shift": shift, "scale": scale})


def encode_pairs(pipe: Any, world: World, recipe: Recipe, work: Path) -> dict[str, torch.Tensor]:
    """All training pairs as latents (half precision) and token ids `[pairs, 16]` of both tokenizers."""
    path = work / "pairs.safetensors"
    if path.exists():
        return _by_kind(pipe, world, load_tree(path))
    vae, chunk = pipe.vae, 500
    latents: list[torch.Tensor] = []
    ids: list[torch.Tensor] = []
    ids_2: list[torch.Tensor] = []
    with ProcessPoolExecutor(1) as pool, _progress() as bar, torch.no_grad():
        task = bar.add_task("pairs", total=recipe.pairs, loss="")
        jobs = [pool.submit(_render_pairs, world, recipe, "pairs", s, chunk) for s in range(0, recipe.pairs, chunk)]
        for job in jobs:
            images, captions = job.result()
            z = vae.encode(_as_input(images)).latent_dist.mode()
            latents.append(((z - vae.config.shift_factor) * vae.config.scaling_factor).half().contiguous())
            for tokenizer, into in ((pipe.tokenizer, ids), (pipe.tokenizer_2, ids_2)):
                into.append(tokenize(tokenizer, captions))
            bar.update(task, advance=len(captions))
    data = {"latents": torch.cat(latents), "ids": torch.cat(ids), "ids_2": torch.cat(ids_2)}
    save_tree(path, data)
    return _by_kind(pipe, world, data)


def _by_kind(pipe: Any, world: World, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add the indices of the pairs whose caption asks for a word (a quotation mark), and for objects (a shape)."""

    def holds(*words: str) -> torch.Tensor:
        marks = tokenize(pipe.tokenizer, list(words))[:, 1]
        return torch.isin(data["ids"], marks).any(dim=1).nonzero().flatten()

    shapes = [shape + end for shape in world.shapes for end in ("", "s")]
    return data | {"words": holds('"'), "objects": holds(*shapes)}


def tokenize(tokenizer: Any, captions: list[str]) -> torch.Tensor:
    """Token ids `[N, 16]`."""
    return tokenizer(
        captions, padding="max_length", max_length=CONTEXT_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def encode_captions(
    pipe: Any, ids: torch.Tensor, ids_2: torch.Tensor, t5_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pipeline's `encode_prompt` makes of these captions, with gradients: context and pooled states."""
    first = pipe.text_encoder(ids, output_hidden_states=True)
    second = pipe.text_encoder_2(ids_2, output_hidden_states=True)
    context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    context = torch.nn.functional.pad(context, (0, JOINT_DIM - context.shape[-1]))
    blank = context.new_zeros(len(ids), t5_tokens, JOINT_DIM)
    return torch.cat([context, blank], dim=1), torch.cat([first[0], second[0]], dim=-1)


class _Optimizers:
    """Muon for the matrices inside the blocks, AdamW for the rest; warm up, hold, fall to 0, and a second round."""

    def __init__(self, modules: torch.nn.ModuleDict, recipe: Recipe) -> None:
        inside: list[torch.nn.Parameter] = []
        outside: list[torch.nn.Parameter] = []
        for name, parameter in modules.named_parameters():
            block = ".transformer_blocks." in name or ".layers." in name
            (inside if block and parameter.ndim == 2 else outside).append(parameter)
        self.parts = [
            torch.optim.Muon(inside, lr=recipe.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(outside, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.base = [recipe.muon_lr, recipe.adam_lr]
        self.recipe = recipe

    def step(self, step: int) -> None:
        recipe = self.recipe
        if step < recipe.objects_from:
            share = min(1.0, (step + 1) / recipe.warmup, (recipe.objects_from - step) / recipe.cooldown)
        else:
            done = (step - recipe.objects_from) / (recipe.steps - recipe.objects_from)
            share = 0.5 * min(1.0, 20 * done, 1 - done)
        for part, lr in zip(self.parts, self.base, strict=True):
            for group in part.param_groups:
                group["lr"] = lr * share
            part.step()
            part.zero_grad()


def train_denoiser(pipe: Any, data: dict[str, torch.Tensor], recipe: Recipe, work: Path) -> None:
    """Flow matching on the encoded pairs; leaves the exponential moving average of the weights in `pipe`."""
    path = work / "denoiser.safetensors"
    modules = torch.nn.ModuleDict(
        {name: getattr(pipe, name) for name in ("transformer", "text_encoder", "text_encoder_2")}
    ).train()
    optimizers = _Optimizers(modules, recipe)
    average = {name: p.detach().clone() for name, p in modules.named_parameters()}
    start = 0
    if path.exists():
        saved = load_tree(path)
        start, average = saved["step"], saved["average"]
        modules.load_state_dict(saved["weights"], strict=False)
        for part, state in zip(optimizers.parts, saved["optimizers"], strict=True):
            part.load_state_dict(state)
    empty = [tokenize(t, [""])[0] for t in (pipe.tokenizer, pipe.tokenizer_2)]
    with _progress() as bar:
        task = bar.add_task("denoiser", total=recipe.steps, completed=start, loss="")
        smooth = None
        for step in range(start, recipe.steps):
            loss = _flow_matching_loss(pipe, data, recipe, step, empty)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
            optimizers.step(step)
            decay = min(recipe.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, parameter in modules.named_parameters():
                    average[name].lerp_(parameter, 1 - decay)
            smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
            bar.update(task, advance=1, loss=f"loss {smooth:.4f}")
            if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
                weights = dict(modules.named_parameters())
                states = [part.state_dict() for part in optimizers.parts]
                save_tree(path, {"step": step + 1, "weights": weights, "average": average, "optimizers": states})
    modules.load_state_dict(average, strict=False)
    modules.eval()


def _flow_matching_loss(
    pipe: Any, data: dict[str, torch.Tensor], recipe: Recipe, step: int, empty: list[torch.Tensor]
) -> torch.Tensor:
    rng = _rng(recipe.seed, "denoiser", step)
    stock = step % recipe.stock_every == recipe.stock_every - 1
    count = recipe.batch // 4 if stock else recipe.batch
    chosen = torch.from_numpy(rng.integers(len(data["latents"]), size=count))
    words, objects = (0.5, 0.0) if step < recipe.objects_from else (0.3, 0.6)
    if step >= recipe.words_from:
        at = 0
        for pool, share in ((data["words"], words), (data["objects"], objects)):
            number = round(share * count)
            chosen[at : at + number] = pool[torch.from_numpy(rng.integers(len(pool), size=number))]
            at += number
    x0 = data["latents"][chosen].float()
    ids, ids_2 = data["ids"][chosen], data["ids_2"][chosen]
    dropped = torch.from_numpy(rng.random(count) < recipe.caption_dropout)[:, None]
    ids, ids_2 = torch.where(dropped, empty[0], ids), torch.where(dropped, empty[1], ids_2)
    sigma = torch.sigmoid(torch.from_numpy(rng.normal(0.2, 1.1, size=count)).float())
    noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))
    s = sigma[:, None, None, None]
    context, pooled = encode_captions(pipe, ids, ids_2, STOCK_T5_TOKENS if stock else T5_TOKENS)
    velocity = pipe.transformer(
        hidden_states=(1 - s) * x0 + s * noise,
        timestep=sigma * 1000,
        encoder_hidden_states=context,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    return (velocity - (noise - x0)).square().mean()


def pretrain(world: World, recipe: Recipe, work: Path, out: Path) -> None:
    """Make the whole model.

    Args:
        world: what to draw.
        recipe: how long and on what; `recipe.seed` decides everything random.
        work: folder for the stages' files; a second call goes on from them.
        out: folder for the finished pipeline, in half precision.
    """
    work.mkdir(parents=True, exist_ok=True)
    pipe = build_pipeline(world, recipe.seed)
    train_vae(pipe, world, recipe, work)
    data = encode_pairs(pipe, world, recipe, work)
    train_denoiser(pipe, data, recipe, work)
    for part in (pipe.transformer, pipe.vae):  # Diffusers reads them back as float32; Transformers would not
        part.to(torch.float16)
    pipe.save_pretrained(out)

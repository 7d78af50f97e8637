"""A tiny detector and a tiny CLIP for GenEval, with random weights, and random pictures."""

import json

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from marble.prompts.coco import COLOURS, NAMES

SIDES = (64, 96)
QUERIES = 12


def build_detector(folder, labels=80, seed=0):
    """A Mask2Former with random weights, sure of its classes and its small masks, in a folder as the hub has them."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(seed)
    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=QUERIES,
        num_labels=labels,
    )
    network = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        network.class_predictor.weight.mul_(30)
        onto = network.model.pixel_level_module.decoder.mask_projection
        onto.weight[0], onto.bias[0] = 0, 1
        last = network.model.transformer_module.decoder.mask_predictor.mask_embedder.get_submodule("2.0")
        for part in (last.weight, last.bias):
            part.mul_(100)
        last.weight[0], last.bias[0] = 0, -4  # all logits lower by 4: about a twentieth of the picture is left
    network.save_pretrained(folder)
    # a fixed square, as the published folder has it, is not what GenEval used
    said = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3], "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder


def pictures(count, height, width, seed=0):
    """Smooth random colours, `[N, 3, H, W]` uint8."""
    torch.manual_seed(seed)
    small = torch.rand(count, 3, 5, 4)
    return (F.interpolate(small, size=(height, width), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def build_clip(folder, seed=0):
    """A CLIP with random weights and a tokenizer of bytes, in a folder as the hub has them."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    torch.manual_seed(seed)
    letters = [*map(chr, range(33, 127))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    network = CLIPModel(
        CLIPConfig(
            text_config={**tower, "vocab_size": len(tokens), "max_position_embeddings": 77, **ends},
            vision_config={**tower, "image_size": 32, "patch_size": 8},
            projection_dim=16,
        )
    )
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    said = {"size": {"shortest_edge": 32}, "crop_size": 32, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.1]}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder


def detections_the_slow_way(network, images, inner, padded):
    """Of each image (class, score, box, mask) of the 100 likeliest pairs, best first, by PIL and plain loops."""
    height, width = images.shape[-2:]
    mean, std = np.array([0.5, 0.4, 0.3], np.float32), np.array([0.2, 0.25, 0.3], np.float32)
    inputs = np.zeros((len(images), padded[0], padded[1], 3), np.float32)
    for i, image in enumerate(images):
        resized = pil(image).resize((inner[1], inner[0]), Image.Resampling.BILINEAR)
        inputs[i, : inner[0], : inner[1]] = (np.asarray(resized, np.float32) / 255 - mean) / std
    with torch.no_grad():
        outputs = network(pixel_values=torch.from_numpy(inputs).permute(0, 3, 1, 2).contiguous())
    found = []
    for logits, masks in zip(outputs.class_queries_logits.numpy(), outputs.masks_queries_logits, strict=True):
        drawn = F.interpolate(masks[:, None], size=padded, mode="bilinear", align_corners=False)
        drawn = F.interpolate(drawn[..., : inner[0], : inner[1]], (height, width), mode="bilinear")[:, 0].numpy()
        exps = np.exp(logits - logits.max(axis=1, keepdims=True))
        chances = exps / exps.sum(axis=1, keepdims=True)
        pairs = [(chances[q, c], q, c) for q in range(QUERIES) for c in range(80)]
        rows = []
        for chance, q, c in sorted(pairs, reverse=True)[:100]:
            ys, xs = np.nonzero(drawn[q] > 0)
            if len(ys):
                sure = (1 / (1 + np.exp(-drawn[q][ys, xs]))).sum() / (len(ys) + 1e-6)
                box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
                rows.append((NAMES[c], chance * sure, box, drawn[q] > 0))
        found.append(sorted(rows, key=lambda row: -row[1]))
    return found


def colour_the_slow_way(folder, image, mask, box, name):
    """Cosines with the ten colours, by PIL, numpy and the stock network."""
    from transformers import CLIPModel, CLIPTokenizer

    network, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    grey = Image.new("RGB", image.size, color="#999")
    crop = Image.composite(image, grey, Image.fromarray(mask)).crop(box)
    width, height = crop.size
    size = (32, int(32 * height / width)) if width < height else (int(32 * width / height), 32)
    crop = crop.resize(size, Image.Resampling.BICUBIC)
    left, top = round((crop.width - 32) / 2), round((crop.height - 32) / 2)
    pixels = np.asarray(crop.crop((left, top, left + 32, top + 32)), np.float32) / 255
    pixels = (pixels - np.array([0.4, 0.5, 0.6], np.float32)) / np.array([0.3, 0.2, 0.1], np.float32)
    with torch.no_grad():
        seen = network.get_image_features(pixel_values=torch.from_numpy(pixels).permute(2, 0, 1)[None])
        seen = seen.pooler_output[0].numpy()
        cosines = []
        for colour in COLOURS:
            directions = []
            for text in (
                f"a photo of a {colour} {name}",
                f"a photo of a {colour}-colored {name}",
                f"a photo of a {colour} object",
            ):
                words = tokenizer(text, padding="max_length", max_length=77, return_tensors="pt")
                read = network.get_text_features(**words).pooler_output[0].numpy()
                directions.append(read / np.linalg.norm(read))
            mean = np.mean(directions, axis=0)
            cosines.append(float(seen @ mean / np.linalg.norm(seen) / np.linalg.norm(mean)))
    return cosines

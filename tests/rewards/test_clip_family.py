"""Each reward against its published formula, worked out apart from PIL's pixels and the networks' raw outputs."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, CLIPModel

from marble import MarbleError
from marble.config import RewardUse
from marble.prompts import Record
from marble.rewards import load_rewards
from marble.rewards.aesthetic import Aesthetic
from marble.rewards.clipscore import CLIPScore
from marble.rewards.diversity import Diversity
from marble.rewards.hpsv21 import HPSv21
from marble.rewards.pickscore import PickScore

from . import clips

TEXTS = [
    "a photo of a Cat",
    "Two dogs & a bird, ünïcode",
    "a photo of a Cat",
    "",
    "far too long for CLIP " * 20,
]
RECORDS = [Record(text, "s") for text in TEXTS]
SIZES = [(32, 32), (64, 64), (75, 51), (41, 90), (17, 23)]
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(clips.save_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hps")
    state = clips.open_clip_state(3) | {"attn_mask": torch.zeros(3, 3)}
    torch.save({"epoch": 7, "name": "x", "state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    return str(clips.save_tokenizer(folder))


def to_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def normalised(picture):
    pixels = (np.asarray(picture, dtype=np.float64) / 255 - clips.MEAN) / clips.STD
    return torch.from_numpy(pixels).permute(2, 0, 1).float()


def centred(images, resample=BICUBIC):
    """Shorter side to the network's size, centre square."""
    made = []
    for image in images:
        picture = to_pil(image)
        width, height = picture.size
        short = min(width, height)
        size = (int(clips.SIDE * width / short), int(clips.SIDE * height / short))
        left, top = (size[0] - clips.SIDE) // 2, (size[1] - clips.SIDE) // 2
        picture = picture.resize(size, resample).crop((left, top, left + clips.SIDE, top + clips.SIDE))
        made.append(normalised(picture))
    return torch.stack(made)


def framed(images):
    """Longer side to the network's size, black bars."""
    made = []
    for image in images:
        picture = to_pil(image)
        scale = clips.SIDE / max(picture.size)
        small = picture.resize(tuple(round(side * scale) for side in picture.size), BICUBIC)
        frame = Image.new("RGB", (clips.SIDE, clips.SIDE))
        frame.paste(small, ((clips.SIDE - small.width) // 2, (clips.SIDE - small.height) // 2))
        made.append(normalised(frame))
    return torch.stack(made)


def outputs(folder, pixels, texts=TEXTS):
    """What the network itself says of images and texts, all with all."""
    network = CLIPModel.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(
        list(texts), padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        return network(pixel_values=pixels, **tokens)


def cosines(one, other):
    one, other = (each.detach().numpy().astype(np.float64) for each in (one, other))
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


def close(found, expected, atol=1e-5):
    assert found.dtype == torch.float32
    assert found.device.type == "cpu"
    np.testing.assert_allclose(found.numpy(), np.asarray(expected), rtol=0, atol=atol)
    assert np.std(expected) > 100 * atol  # a score that is the same for all would show nothing


@pytest.mark.parametrize("size", SIZES)
def test_pickscore(folder, size):
    images = clips.pictures(5, *size)
    logits = outputs(folder, centred(images)).logits_per_image.numpy().astype(np.float64)
    close(PickScore(source=folder).score(images, RECORDS), np.diag(logits) / 26)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_clipscore(folder, size, interpolation):
    images = clips.pictures(5, *size)
    resample = {"bilinear": BILINEAR, "bicubic": BICUBIC}[interpolation]
    logits = outputs(folder, centred(images, resample)).logits_per_image.numpy().astype(np.float64)
    close(CLIPScore(source=folder, interpolation=interpolation).score(images, RECORDS), np.diag(logits) / 100)
    assert CLIPScore(source=folder).interpolation == "bilinear"


@pytest.mark.parametrize("size", SIZES)
def test_aesthetic(folder, size, tmp_path):
    state = clips.head_state()
    torch.save(state, tmp_path / "head.pth")
    images = clips.pictures(5, *size)
    features = outputs(folder, centred(images)).image_embeds.numpy().astype(np.float64)
    hidden = features / np.linalg.norm(features, axis=1, keepdims=True)
    for at in (0, 2, 4, 6, 7):
        hidden = hidden @ state[f"layers.{at}.weight"].numpy().T + state[f"layers.{at}.bias"].numpy()
    reward = Aesthetic(source=folder, head=str(tmp_path), head_file="head.pth")
    close(reward.score(images, RECORDS), hidden[:, 0])
    close(Aesthetic(source=folder, head=str(tmp_path / "head.pth")).score(images, RECORDS), hidden[:, 0])


@pytest.mark.parametrize("size", SIZES)
def test_diversity(folder, size):
    images = clips.pictures(5, *size)
    features = outputs(folder, centred(images)).image_embeds.numpy().astype(np.float64)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    expected = [np.mean([1 - features[i] @ features[j] for j in range(5) if j != i]) for i in range(5)]
    reward = Diversity(encoder=folder)
    close(reward.score(images, RECORDS), expected)
    assert reward.score(images[:1], RECORDS[:1]).tolist() == [0.0]
    same = reward.score(images[:1].expand(3, -1, -1, -1), RECORDS[:3])
    assert same.min() >= 0
    assert same.max() < 1e-6


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_diversity_by_dinov2(kind, tmp_path):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=48, patch_size=8
    )
    clips.redraw(getattr(transformers, f"{kind}Model")(config), 1).save_pretrained(tmp_path)
    clips.save_preprocessing(tmp_path)
    images = clips.pictures(4, 40, 61)
    with torch.no_grad():
        features = AutoModel.from_pretrained(tmp_path).eval()(pixel_values=centred(images)).last_hidden_state[:, 0]
    similar = [[cosines(one[None], other[None])[0] for other in features] for one in features]
    close(Diversity(encoder=str(tmp_path)).score(images, RECORDS[:4]), (4 - np.sum(similar, axis=1)) / 3)


# ---- HPSv2.1, whose network is written out here from the published tensors --------------------------------


def block(state, name, hidden, heads, mask=None):
    def norm(part):
        return F.layer_norm(hidden, hidden.shape[-1:], state[f"{name}.{part}.weight"], state[f"{name}.{part}.bias"])

    normed = norm("ln_1").transpose(0, 1)  # [L, N, D]
    weights = (state[f"{name}.attn.in_proj_weight"], state[f"{name}.attn.in_proj_bias"])
    out = (state[f"{name}.attn.out_proj.weight"], state[f"{name}.attn.out_proj.bias"])
    attended, _ = F.multi_head_attention_forward(
        *(normed, normed, normed, hidden.shape[-1], heads, *weights),
        *(None, None, False, 0.0, *out),
        training=False,
        need_weights=False,
        attn_mask=mask,
    )
    hidden = hidden + attended.transpose(0, 1)
    inner = F.gelu(F.linear(norm("ln_2"), state[f"{name}.mlp.c_fc.weight"], state[f"{name}.mlp.c_fc.bias"]))
    return hidden + F.linear(inner, state[f"{name}.mlp.c_proj.weight"], state[f"{name}.mlp.c_proj.bias"])


def image_features(state, pixels):
    patches = F.conv2d(pixels, state["visual.conv1.weight"], stride=clips.PATCH).flatten(2).mT
    first = state["visual.class_embedding"].expand(len(pixels), 1, -1)
    hidden = torch.cat([first, patches], dim=1) + state["visual.positional_embedding"]
    size = hidden.shape[-1:]
    hidden = F.layer_norm(hidden, size, state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    for at in range(2):
        hidden = block(state, f"visual.transformer.resblocks.{at}", hidden, 16)
    pooled = F.layer_norm(hidden[:, 0], size, state["visual.ln_post.weight"], state["visual.ln_post.bias"])
    return pooled @ state["visual.proj"]


def text_features(state, texts):
    letters = {token: i for i, token in enumerate(clips.VOCABULARY)}
    ids = torch.zeros(len(texts), 77, dtype=torch.long)  # open_clip pads with 0
    for row, text in zip(ids, texts, strict=True):
        words = [[*word[:-1], f"{word[-1]}</w>"] for word in text.split()]
        known = [clips.START, *(letters[letter] for word in words for letter in word)][:76]
        row[: len(known) + 1] = torch.tensor([*known, clips.END])
    hidden = state["token_embedding.weight"][ids] + state["positional_embedding"]
    mask = torch.full((77, 77), -math.inf).triu(1)
    for at in range(2):
        hidden = block(state, f"transformer.resblocks.{at}", hidden, 16, mask)
    hidden = F.layer_norm(hidden, hidden.shape[-1:], state["ln_final.weight"], state["ln_final.bias"])
    return hidden[torch.arange(len(ids)), ids.argmax(dim=1)] @ state["text_projection"]


@pytest.mark.parametrize("size", SIZES)
def test_hpsv21(hps, size):
    texts = ["a photo of a cat", "two dogs", "two dogs", "", "far too long for clip " * 20]
    images = clips.pictures(5, *size)
    state = clips.open_clip_state(3)
    pixels = framed(images)
    image, text = image_features(state, pixels), text_features(state, texts)
    reward = HPSv21(source=hps, processor=hps)
    close(reward.score(images, [Record(each, "s") for each in texts]), cosines(image, text))
    torch.testing.assert_close(reward.parts.images(pixels), F.normalize(image, dim=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(reward.parts.texts(texts), F.normalize(text, dim=1), rtol=0, atol=1e-5)


def test_hpsv21_reads_html_as_open_clip_does(hps):
    reward = HPSv21(source=hps, processor=hps)
    images = clips.pictures(1, 32, 32).expand(4, -1, -1, -1)
    written = [Record(text, "s") for text in ("cats & dogs", "cats &amp; dogs", "cats &amp;amp; dogs", "cats amp dogs")]
    scores = reward.score(images, written).tolist()
    assert scores[0] == scores[1] == scores[2] != scores[3]


# ---- all of them --------------------------------------------------------------------------------------------


def made(folder, hps, tmp_path, **settings):
    torch.save(clips.head_state(), tmp_path / "aesthetic-model.pth")
    return [
        PickScore(source=folder, **settings),
        CLIPScore(source=folder, **settings),
        HPSv21(source=hps, processor=hps, **settings),
        Aesthetic(source=folder, head=str(tmp_path), **settings),
        Diversity(encoder=folder, **settings),
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near(folder, hps, tmp_path, dtype):
    images = clips.pictures(5, 50, 40)
    exact, rough = made(folder, hps, tmp_path), made(folder, hps, tmp_path, dtype=dtype)
    for one, other in zip(exact, rough, strict=True):
        expected, found = one.score(images, RECORDS), other.score(images, RECORDS)
        assert found.dtype == torch.float32
        assert 0 < (found - expected).abs().max() < 0.15 * expected.std()
    assert rough[0].parts.network.visual_projection.weight.dtype == getattr(torch, dtype)
    # bfloat16 has no number between 4.59 and 4.62, whose exponentials are 2% apart
    assert float(rough[0].parts.scale) == pytest.approx(100, abs=1e-4)


def test_a_score_does_not_depend_on_what_was_judged_before(folder, hps, tmp_path):
    images = clips.pictures(5, 50, 40)
    for reward in made(folder, hps, tmp_path):
        first = reward.score(images, RECORDS)
        reward.score(images.flip(0), RECORDS[::-1])
        assert torch.equal(reward.score(images, RECORDS), first)


def test_equal_prompts_are_encoded_once_in_order_of_first_appearance(folder):
    clip = CLIPScore(source=folder).parts
    seen = []
    hook = clip.network.text_model.register_forward_pre_hook(
        lambda module, arguments, keywords: seen.append(keywords["input_ids"][:, 1].tolist()), with_kwargs=True
    )
    features = clip.texts(["z", "b", "z", "a", "b"])
    hook.remove()
    assert [[clips.VOCABULARY[i] for i in row] for row in seen] == [["z</w>", "b</w>", "a</w>"]]
    assert torch.equal(features, clip.texts(["z", "b", "a"])[[0, 1, 0, 2, 1]])


def test_registered_names_and_what_is_said_of_them():
    rewards = load_rewards(["pickscore", "clipscore", "hpsv21", "aesthetic", "diversity"])
    kinds = [PickScore, CLIPScore, HPSv21, Aesthetic, Diversity]
    assert [type(reward) for reward in rewards] == kinds
    for reward in rewards:
        assert reward.revision.split("@")[0] in reward.facts.model
        assert all(vars(reward.facts).values())
        assert reward.about
        assert "\n" not in reward.about
        assert reward.cached
    assert [reward.groupwise for reward in rewards] == [False, False, False, False, True]
    with pytest.raises(MarbleError, match=r"settings.interpolation: input should be 'bilinear' or 'bicubic'"):
        load_rewards([RewardUse(reward="clipscore", settings={"interpolation": "lanczos"})])

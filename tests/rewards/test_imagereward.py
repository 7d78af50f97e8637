"""ImageReward from a tiny checkpoint in the published format, against its architecture written out from its names."""

import hashlib
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizer

from marble import MarbleError
from marble.config import RewardUse
from marble.prompts import Record
from marble.rewards import make_reward
from marble.rewards.imagereward import ImageReward

SIDE, PATCH, WIDE, TEXT, HEADS, LAYERS, PLACES = 16, 4, 128, 24, 3, 2, 40
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "cube", "a"]
LETTERS = [chr(letter) for letter in range(ord("b"), ord("z") + 1)]
VOCABULARY = {word: i for i, word in enumerate([*WORDS, *LETTERS, *(f"##{letter}" for letter in ["a", *LETTERS])])}
HEAD = {0: (1024, TEXT), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
PROMPTS = ["a red cube", "Zebra", "", "a red cube and " * 9, "cubea ccc"]


def published():
    """A state dict with the names and roles of the published one, `ImageReward.pt`."""
    generator = torch.Generator().manual_seed(7)
    state = {}

    def tensor(name, *shape, spread=1.0, centre=0.0):
        state[name] = centre + spread * torch.randn(*shape, generator=generator)

    def linear(name, out, into):
        tensor(f"{name}.weight", out, into, spread=1.5 / math.sqrt(into))
        tensor(f"{name}.bias", out, spread=0.3)

    def norm(name, width):
        tensor(f"{name}.weight", width, spread=0.3, centre=1.0)
        tensor(f"{name}.bias", width, spread=0.3)

    eyes, text = "blip.visual_encoder", "blip.text_encoder"
    tensor(f"{eyes}.cls_token", 1, 1, WIDE, spread=0.01)
    tensor(f"{eyes}.pos_embed", 1, (SIDE // PATCH) ** 2 + 1, WIDE, spread=0.01)
    tensor(f"{eyes}.patch_embed.proj.weight", WIDE, 3, PATCH, PATCH, spread=0.002)  # small: eps must count
    tensor(f"{eyes}.patch_embed.proj.bias", WIDE, spread=0.001)
    for n in range(LAYERS):
        block = f"{eyes}.blocks.{n}"
        norm(f"{block}.norm1", WIDE)
        linear(f"{block}.attn.qkv", 3 * WIDE, WIDE)
        linear(f"{block}.attn.proj", WIDE, WIDE)
        norm(f"{block}.norm2", WIDE)
        linear(f"{block}.mlp.fc1", 96, WIDE)
        linear(f"{block}.mlp.fc2", WIDE, 96)
    norm(f"{eyes}.norm", WIDE)
    state[f"{text}.embeddings.position_ids"] = torch.arange(PLACES)[None]
    tensor(f"{text}.embeddings.word_embeddings.weight", len(VOCABULARY) + 2, TEXT, spread=0.02)
    tensor(f"{text}.embeddings.position_embeddings.weight", PLACES, TEXT, spread=0.01)
    norm(f"{text}.embeddings.LayerNorm", TEXT)
    for n in range(LAYERS):
        layer = f"{text}.encoder.layer.{n}"
        for attention, width in (("attention", TEXT), ("crossattention", WIDE)):
            linear(f"{layer}.{attention}.self.query", TEXT, TEXT)
            linear(f"{layer}.{attention}.self.key", TEXT, width)
            linear(f"{layer}.{attention}.self.value", TEXT, width)
            linear(f"{layer}.{attention}.output.dense", TEXT, TEXT)
            norm(f"{layer}.{attention}.output.LayerNorm", TEXT)
        linear(f"{layer}.intermediate.dense", 40, TEXT)
        linear(f"{layer}.output.dense", TEXT, 40)
        norm(f"{layer}.output.LayerNorm", TEXT)
    linear("blip.vision_proj", 8, WIDE)  # pretraining's, there but not used
    linear("blip.text_proj", 8, TEXT)
    for n, shape in HEAD.items():
        linear(f"mlp.layers.{n}", *shape)
    state["mlp.layers.7.weight"] /= 8  # to scores of the published size
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(published(), folder / "ImageReward.pt")
    med = {"hidden_size": TEXT, "num_attention_heads": HEADS, "encoder_width": 768, "layer_norm_eps": 1e-12}
    (folder / "med_config.json").write_text(json.dumps(med))
    BertTokenizer(vocab=VOCABULARY).save_pretrained(folder / "words")
    return folder


@pytest.fixture(scope="module")
def reward(folder):
    return ImageReward(source=str(folder), tokenizer=str(folder / "words"))


def copy(folder, tmp_path, change=None, **med):
    """A folder like `folder` with another state dict or med_config."""
    made = tmp_path / "changed"
    shutil.copytree(folder, made)
    if change is not None:
        state = published()
        change(state)
        torch.save(state, made / "ImageReward.pt")
    if med:
        (made / "med_config.json").write_text(json.dumps(med))
    return ImageReward(source=str(made), tokenizer=str(made / "words"))


def images(height, width, count=5, grey=False):
    generator = torch.Generator().manual_seed(height * width)
    made = torch.randint(0, 256, (count, 1 if grey else 3, height, width), generator=generator, dtype=torch.uint8)
    return made.expand(-1, 3, -1, -1).contiguous()


def records(prompts=PROMPTS):
    return [Record(prompt, "test") for prompt in prompts]


# ---- the published architecture, one image and one text without padding at a time ----------------------


def tokens(prompt):
    """WordPiece by hand: whole words that are known, else letter by letter; at most 35 with [CLS] and [SEP]."""
    pieces = []
    for word in prompt.lower().split():
        rest, first = word, True
        while rest:
            size = max(n for n in range(len(rest) + 1) if ("" if first else "##") + rest[:n] in VOCABULARY)
            pieces.append(("" if first else "##") + rest[:size])
            rest, first = rest[size:], False
    return torch.tensor([VOCABULARY[piece] for piece in ["[CLS]", *pieces[:33], "[SEP]"]])


def pixels(image):
    """Pillow's resizing of the shorter side, the centre square, CLIP's normalisation; across first, whatever Pillow."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    scale = SIDE / min(picture.size)
    width, height = (SIDE if side == min(picture.size) else int(side * scale) for side in picture.size)
    left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
    across = picture.resize((width, picture.height), Image.Resampling.BICUBIC)
    square = across.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + SIDE, top + SIDE))
    values = (np.asarray(square, dtype=np.float64) / 255 - [0.48145466, 0.4578275, 0.40821073]) / [
        *(0.26862954, 0.26130258, 0.27577711)
    ]
    return torch.from_numpy(values)


def attend(query, key, value, heads):
    """`[L, width]` of `[L, width]` and `[M, width]`."""
    parts = []
    for q, k, v in zip(*(each.chunk(heads, dim=1) for each in (query, key, value)), strict=True):
        parts.append((q @ k.T / math.sqrt(q.shape[1])).softmax(dim=1) @ v)
    return torch.cat(parts, dim=1)


def expected(image, prompt, state):
    state = {key: value.double() for key, value in state.items()}

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name, eps):
        x = x - x.mean(dim=-1, keepdim=True)
        x = x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    eyes, text = "blip.visual_encoder", "blip.text_encoder"
    kernel, square, n = state[f"{eyes}.patch_embed.proj.weight"], pixels(image), SIDE // PATCH
    patches = [square[y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH] for y in range(n) for x in range(n)]
    seen = torch.stack([(kernel * patch.permute(2, 0, 1)).sum(dim=(1, 2, 3)) for patch in patches])
    seen = torch.cat([state[f"{eyes}.cls_token"][0], seen + state[f"{eyes}.patch_embed.proj.bias"]])
    seen = seen + state[f"{eyes}.pos_embed"][0]
    for i in range(LAYERS):
        block = f"{eyes}.blocks.{i}"
        mixed = linear(norm(seen, f"{block}.norm1", 1e-6), f"{block}.attn.qkv")
        seen = seen + linear(attend(*mixed.chunk(3, dim=1), WIDE // 64), f"{block}.attn.proj")
        inner = gelu(linear(norm(seen, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
        seen = seen + linear(inner, f"{block}.mlp.fc2")
    seen = norm(seen, f"{eyes}.norm", 1e-6)

    ids = tokens(prompt)
    told = state[f"{text}.embeddings.word_embeddings.weight"][ids]
    told = told + state[f"{text}.embeddings.position_embeddings.weight"][: len(ids)]
    told = norm(told, f"{text}.embeddings.LayerNorm", 1e-12)
    for i in range(LAYERS):
        layer = f"{text}.encoder.layer.{i}"
        for name, source in (("attention", None), ("crossattention", seen)):
            each = f"{layer}.{name}"
            other = told if source is None else source
            query = linear(told, f"{each}.self.query")
            key, value = linear(other, f"{each}.self.key"), linear(other, f"{each}.self.value")
            found = linear(attend(query, key, value, HEADS), f"{each}.output.dense")
            told = norm(found + told, f"{each}.output.LayerNorm", 1e-12)
        inner = linear(gelu(linear(told, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
        told = norm(inner + told, f"{layer}.output.LayerNorm", 1e-12)
    features = told[0].numpy()
    for i in HEAD:
        features = state[f"mlp.layers.{i}.weight"].numpy() @ features + state[f"mlp.layers.{i}.bias"].numpy()
    return float((features[0] - 0.16717362830052426) / 1.0333394966054072)


# ---- golden ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "grey"), [(16, 16, False), (23, 37, False), (41, 18, False), (16, 19, False), (9, 12, True)]
)
def test_scores_as_the_published_architecture(reward, height, width, grey):
    state, batch = published(), images(height, width, grey=grey)
    own = [expected(image, prompt, state) for image, prompt in zip(batch, PROMPTS, strict=True)]
    scores = reward.score(batch, records())
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(own, abs=1e-5)
    assert max(own) - min(own) > 0.1  # a score that looks at neither would not do


def test_image_and_prompt_both_count(reward):
    one = images(16, 16, 2)
    across = reward.score(one.repeat_interleave(2, dim=0), records(["a red cube", "zebra"] * 2)).reshape(2, 2)
    assert (across[:, 0] - across[:, 1]).abs().min() > 1e-3
    assert (across[0] - across[1]).abs().min() > 1e-3


def test_a_prompt_is_cut_after_33_tokens(reward):
    batch = images(16, 16, 1).expand(4, -1, -1, -1)
    words = ["red"] * 32
    ends = [["cube"], ["cube", "zebra"], ["zebra"], []]
    scores = reward.score(batch, records([" ".join(words + end) for end in ends])).tolist()
    assert scores[0] == scores[1]
    assert abs(scores[0] - scores[2]) > 1e-3
    assert abs(scores[0] - scores[3]) > 1e-3


def test_the_two_tokens_that_blip_adds(reward):
    """They come last in the vocabulary, and a prompt that spells one out gets it."""
    words = reward.parts.tokenizer
    assert words("[DEC] red [ENC]").input_ids == [2, len(VOCABULARY), 5, len(VOCABULARY) + 1, 3]


def test_batches(reward):
    batch = images(20, 17)
    together = reward.score(batch, records())
    alone = [reward.score(batch[i : i + 1], records()[i : i + 1]).item() for i in range(len(batch))]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    assert torch.equal(together, reward.score(batch, records()))


def test_half_precision_is_near(reward, folder):
    batch = images(16, 16)
    half = ImageReward(source=str(folder), tokenizer=str(folder / "words"), dtype="bfloat16")
    scores = half.score(batch, records())
    assert scores.dtype == torch.float32
    assert half.parts.net.blip.visual_encoder.dtype == torch.bfloat16
    exact = reward.score(batch, records())
    assert (scores - exact).abs().max() < 0.1 * (exact.max() - exact.min())


# ---- where the weights come from ------------------------------------------------------------------------


def test_from_a_file_by_its_registered_name(folder, reward):
    file, words = folder / "ImageReward.pt", str(folder / "words")
    own = make_reward(RewardUse(reward="imagereward", settings={"source": str(file), "tokenizer": words}))
    batch = images(16, 16)
    assert torch.equal(own.score(batch, records()), reward.score(batch, records()))
    assert own.revision == f"ImageReward.pt@sha256:{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"
    assert ImageReward().revision == "THUDM/ImageReward@main"
    assert ImageReward(source="someone/else", revision="v1").revision == "someone/else@v1"


def test_from_the_hubs_cache_without_a_network(folder, reward, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit, cache = "c63dec8373b5c3728b1d250865c402c9546be210", tmp_path / "models--someone--likes"
    shutil.copytree(folder, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    own = ImageReward(source="someone/likes", tokenizer=str(folder / "words"))
    assert own.revision == "someone/likes@main"
    own.prepare()
    assert own.revision == f"someone/likes@{commit}"
    assert torch.equal(own.score(images(16, 16), records()), reward.score(images(16, 16), records()))
    with pytest.raises(MarbleError, match=r'cannot get "ImageReward.pt" of "someone/likes"'):
        ImageReward(source="someone/likes", revision="v2", tokenizer=str(folder / "words")).prepare()


def test_no_random_numbers_are_used_up(folder, tmp_path):
    before = torch.get_rng_state()
    copy(folder, tmp_path).prepare()
    assert torch.equal(before, torch.get_rng_state())


def test_keys_that_do_not_fit_are_listed(folder, tmp_path):
    def change(state):
        del state["blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"]
        del state["mlp.layers.6.bias"]
        state["blip.visual_encoder.blocks.0.attn.extra"] = torch.ones(1)
        state["blip.text_decoder.bias"] = torch.ones(1)
        state["logit_scale"] = torch.ones(1)
        state["blip.visual_encoder.norm.weight"] = torch.ones(5)

    with pytest.raises(MarbleError) as caught:
        copy(folder, tmp_path, change).prepare()
    message = str(caught.value)
    assert '/ImageReward.pt" does not fit its model: 2 missing: ' in message
    assert "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias" in message
    assert "mlp.layers.6.bias" in message
    assert "3 unexpected: blip.visual_encoder.blocks.0.attn.extra, blip.text_decoder.bias, logit_scale" in message
    assert "1 of another shape: blip.visual_encoder.post_layernorm.weight [5] for [128]" in message


def test_another_model(folder, tmp_path):
    with pytest.raises(MarbleError, match=r'is no checkpoint of BLIP: it has no "visual_encoder.embeddings.patch_emb'):
        copy(folder, tmp_path, lambda state: [state.pop(key) for key in list(state) if "visual" in key]).prepare()


@pytest.mark.parametrize(("heads", "said"), [(5, "5"), ("3", "'3'"), (0, "0")])
def test_heads_that_do_not_fit(folder, tmp_path, heads, said):
    with pytest.raises(MarbleError, match=f"must divide the text encoder's width, 24, got {said}$"):
        copy(folder, tmp_path, num_attention_heads=heads).prepare()


def test_another_tokenizer(folder, tmp_path):
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(tmp_path / "words")
    with pytest.raises(MarbleError, match=r'settings.tokenizer: ".*words" has 10 tokens with BLIP\'s two, but .* 61$'):
        ImageReward(source=str(folder), tokenizer=str(tmp_path / "words")).prepare()
    with pytest.raises(MarbleError, match=r'settings.tokenizer: cannot get ".*nothing"'):
        ImageReward(source=str(folder), tokenizer=str(tmp_path / "nothing")).prepare()


def test_what_is_not_there(folder, tmp_path):
    with pytest.raises(MarbleError, match=r'ImageReward.pt" does not exist'):
        ImageReward(source=str(tmp_path), tokenizer=str(folder / "words")).prepare()
    shutil.copy(folder / "ImageReward.pt", tmp_path / "mine.pt")
    alone = ImageReward(source=str(tmp_path / "mine.pt"), tokenizer=str(folder / "words"))
    with pytest.raises(MarbleError, match=r'med_config.json" does not exist'):
        alone.prepare()
    for text, wrong in (("{", "is no JSON"), ("[3]", "must hold an object with num_attention_heads, got list")):
        (tmp_path / "med_config.json").write_text(text)
        with pytest.raises(MarbleError, match=wrong):
            alone.prepare()

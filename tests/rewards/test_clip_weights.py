"""What CLIPs are loaded from: folders and files as published, shared, and refused with a reason."""

import hashlib
import json
import os
import pickle
import re
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import CLIPProcessor

from marble import MarbleError
from marble.prompts import Record
from marble.rewards.aesthetic import Aesthetic
from marble.rewards.checkpoint import weights_revision
from marble.rewards.clip import Preprocessing, load_clip, load_preprocessing
from marble.rewards.clipscore import CLIPScore
from marble.rewards.diversity import Diversity
from marble.rewards.hpsv21 import HPSv21
from marble.rewards.open_clip import from_open_clip
from marble.rewards.pickscore import PickScore

from . import clips

CPU = torch.device("cpu")
RECORDS = [Record("a cat", "s"), Record("two dogs", "s")]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return clips.save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def folder(published, tmp_path):
    """A copy to spoil, under a path of its own: what was loaded stays in memory by its path."""
    return shutil.copytree(published, tmp_path / "copy")


def saved_head(folder):
    torch.save(clips.head_state(), folder / "head.pth")
    return str(folder / "head.pth")


def test_rewards_on_the_same_weights_share_one_network(folder):
    score, aesthetic = CLIPScore(source=str(folder)), Aesthetic(source=str(folder), head=saved_head(folder))
    network = score.parts.network
    assert aesthetic.parts.clip.network is network
    assert load_clip(str(folder), None, CPU, torch.float32, texts=False).network is network
    assert PickScore(source=str(folder), dtype="bfloat16").parts.network is not network
    assert not network.training
    assert not any(weights.requires_grad for weights in network.parameters())


def test_tokenizer_and_preprocessing_from_elsewhere(folder, tmp_path):
    images = clips.pictures(2, 40, 50)
    expected = PickScore(source=str(folder)).score(images, RECORDS)
    bare, other = tmp_path / "bare", tmp_path / "other"
    for place, names in ((bare, ("config.json", "model.safetensors")), (other, ("tok*", "prep*"))):
        place.mkdir()
        for name in names:
            for file in folder.glob(name):
                shutil.copy(file, place)
    assert torch.equal(PickScore(source=str(bare), processor=str(other)).score(images, RECORDS), expected)
    with pytest.raises(MarbleError, match=r'settings.source: ".*bare/preprocessor_config.json" does not'):
        PickScore(source=str(bare)).prepare()


def test_a_folder_is_loaded_without_a_network(folder, monkeypatch):
    asked = []

    def refuse(*arguments, **keywords):
        asked.append(arguments)
        raise OSError("no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    CLIPScore(source=str(folder)).prepare()
    Diversity(encoder=str(folder)).prepare()
    assert asked == []


def test_revision_is_the_hash_of_local_weights_or_the_commit_on_the_hub(folder, tmp_path):
    def hashed(file):
        return hashlib.sha256(file.read_bytes()).hexdigest()[:16]

    reward = Aesthetic(source=str(folder), head=saved_head(folder))
    assert reward.revision
    reward.prepare()
    weights, head = hashed(folder / "model.safetensors"), hashed(folder / "head.pth")
    assert reward.revision == f"copy@sha256:{weights} + head.pth@sha256:{head}"
    diversity = Diversity(encoder=str(folder))
    diversity.prepare()
    assert diversity.revision == f"copy@sha256:{weights}"
    commit = tmp_path / "hub" / "models--owner--name" / "snapshots" / "0123456789abcdef" / "config.json"
    assert weights_revision("owner/name", commit) == "owner/name@0123456789abcdef"
    assert PickScore(revision="v2").revision == "yuvalkirstain/PickScore_v1@v2"
    assert CLIPScore().revision == "openai/clip-vit-large-patch14@main"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"size": 224, "crop_size": 224}, (224, (224, 224), "bicubic")),  # as OpenAI's CLIP has it
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 32, "width": 30}}, (256, (32, 30), "bicubic")),
        ({"size": {"height": 30, "width": 40}, "resample": 2}, ((30, 40), None, "bilinear")),
        ({"size": 32, "crop_size": 32, "do_center_crop": False}, (32, None, "bicubic")),
    ],
)
def test_preprocessing_as_written_down(config, expected, tmp_path):
    means = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.1, 0.2, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | means))
    found = load_preprocessing(str(tmp_path))
    assert found == Preprocessing(*expected, mean=(0.5, 0.5, 0.5), std=(0.1, 0.2, 0.3))
    shape = found(clips.pictures(1, 40, 60)).shape
    assert shape == (1, 3, *(found.crop or (found.size if isinstance(found.size, tuple) else (32, 48))))


def test_preprocessing_as_later_processors_save_it(folder, tmp_path):
    before = load_preprocessing(str(folder))
    CLIPProcessor.from_pretrained(folder).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / "preprocessor_config.json").exists()
    assert load_preprocessing(str(tmp_path / "new")) == before


@pytest.mark.parametrize("change", [{"size": None}, {"resample": 1}, {"do_normalize": False}, {"image_mean": None}])
def test_preprocessing_that_cannot_be_done(change, folder):
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(MarbleError, match=r'settings.source: ".*config.json" does not say what a CLIP needs'):
        CLIPScore(source=str(folder)).prepare()


def test_older_configs_end_texts_at_the_highest_token(folder, tmp_path):
    """Configs of before 2023, PickScore's among them, say that texts end with token 2."""
    older = clips.save_clip(tmp_path / "older", end=2)
    images = clips.pictures(2, 32, 32)
    expected = PickScore(source=str(folder)).score(images, RECORDS)
    assert torch.equal(PickScore(source=str(older)).score(images, RECORDS), expected)


# ---- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "not a repository"])
def test_missing_weights(source):
    own = f"settings.source: .*{re.escape(source.removeprefix('./'))}"
    for reward in (PickScore(source=source), CLIPScore(source=source), HPSv21(source=source)):
        with pytest.raises(MarbleError, match=own) as caught:
            reward.prepare()
        assert "\n" not in str(caught.value)
    with pytest.raises(MarbleError, match=r"settings.encoder: "):
        Diversity(encoder=source).prepare()


def test_weights_that_do_not_fit(folder):
    state = load_file(folder / "model.safetensors")
    save_file(
        {key: value for key, value in state.items() if "logit_scale" not in key} | {"extra.weight": torch.zeros(1)},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(MarbleError, match=r"1 missing: logit_scale; 1 unexpected: extra.weight"):
        CLIPScore(source=str(folder)).prepare()
    save_file({**state, "logit_scale": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MarbleError, match=r"settings.source: .* 1 of another shape: logit_scale"):
        CLIPScore(source=str(folder)).prepare()


def test_tokenizer_of_another_network(folder, tmp_path):
    strange = clips.save_clip(tmp_path / "strange", end=5)
    with pytest.raises(
        MarbleError, match=r"settings.source: the tokenizer of .* ends texts with 513, the network with 5"
    ):
        PickScore(source=str(strange)).prepare()
    clips.save_preprocessing(folder, side=24)
    with pytest.raises(MarbleError, match=r"makes images of 24×24 pixels, .* takes 32×32"):
        PickScore(source=str(folder)).prepare()


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickle_with_code_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("HPS_v2.1_compressed.pt", "head.pth"):
        torch.save({"state_dict": Bomb()}, tmp_path / place)
    (folder / "model.safetensors").unlink()
    torch.save({"logit_scale": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(MarbleError, match=r"settings.source: .*cannot be read as weights alone"):
        HPSv21(source=str(tmp_path), processor=str(folder)).prepare()
    with pytest.raises(MarbleError, match=r"settings.source: cannot load"):
        PickScore(source=str(folder)).prepare()
    clips.save_clip(tmp_path / "sound")
    with pytest.raises(MarbleError, match=r"settings.head: .*cannot be read as weights alone"):
        Aesthetic(source=str(tmp_path / "sound"), head="head.pth").prepare()
    assert not (tmp_path / "exploded").exists()
    with (tmp_path / "plain.pkl").open("wb") as file:
        pickle.dump(clips.head_state(), file)
    with pytest.raises(MarbleError, match=r"settings.head: "):
        Aesthetic(source=str(tmp_path / "sound"), head=str(tmp_path / "plain.pkl")).prepare()


def test_heads_that_do_not_fit(folder, tmp_path):
    def reason(state):
        torch.save(state, file := tmp_path / f"{len(list(tmp_path.iterdir()))}.pth")
        with pytest.raises(MarbleError, match=r"settings.head: ") as caught:
            Aesthetic(source=str(folder), head=str(file)).prepare()
        return str(caught.value)

    state = clips.head_state()
    assert "1 missing: layers.7.bias" in reason({key: value for key, value in state.items() if key != "layers.7.bias"})
    assert "1 unexpected: layers.9.bias" in reason({**state, "layers.9.bias": torch.zeros(1)})
    assert "1 of another shape: layers.7.bias [2] for [1]" in reason({**state, "layers.7.bias": torch.zeros(2)})
    assert "takes 32 features" in reason(clips.head_state(features=32))
    assert "10 missing: layers.0.weight, " in reason({"something.else": torch.zeros(1)})


def test_open_clip_weights_that_do_not_fit():
    state = clips.open_clip_state()

    def reason(changed):
        with pytest.raises(MarbleError) as caught:
            from_open_clip(changed, '"x.pt"')
        return str(caught.value)

    def without(*keys):
        return {key: value for key, value in state.items() if key not in keys}

    assert from_open_clip({**state, "attn_mask": torch.zeros(2, 2)}).logit_scale == state["logit_scale"]
    said = reason(without("ln_final.bias", "visual.transformer.resblocks.1.attn.in_proj_weight"))
    assert said.startswith('"x.pt" does not fit its model: 4 missing: text_model.final_layer_norm.bias, ')
    assert "vision_model.encoder.layers.1.self_attn.q_proj.weight" in said
    extra = {"logit_bias": torch.zeros(1), "transformer.resblocks.0.ls_1.gamma": torch.zeros(32)}
    assert "2 unexpected: logit_bias, transformer.resblocks.0.ls_1.gamma" in reason({**state, **extra})
    assert "of another shape: visual_projection.weight" in reason({**state, "visual.proj": torch.zeros(64, 7)})
    assert 'it has no "visual.conv1.weight" of 4 axes' in reason(without("visual.conv1.weight"))
    assert 'has no "token_embedding.weight" of 2 axes' in reason({**state, "token_embedding.weight": torch.zeros(3)})


def test_open_clip_weights_with_other_heads():
    """As ViT-L-14 has them: the number of heads is not in the weights, so it must count."""
    state, pixels = clips.open_clip_state(), torch.randn(2, 3, clips.SIDE, clips.SIDE)
    few, many = (from_open_clip(state, vision_heads=heads, text_heads=4).eval() for heads in (4, 16))
    assert few.config.vision_config.num_attention_heads == 4
    assert few.config.text_config.num_attention_heads == 4
    with torch.no_grad():
        one, other = (F.normalize(each.get_image_features(pixels).pooler_output, dim=1) for each in (few, many))
    assert (one * other).sum(dim=1).max() < 0.999

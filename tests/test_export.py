"""Exported LoRA, as stock Diffusers and (by its key names) ComfyUI read them."""

import json
import re
import shutil
from itertools import pairwise

import diffusers
import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from marble import MarbleError, Run, train
from marble.config import demo_config_path, make_config, read_config
from marble.export import (
    COMFYUI_FILE,
    HISTORY,
    LORA_FILE,
    Base,
    base_of,
    details_of,
    finish_lora,
    finish_run,
    read_lora,
    without_paths,
)
from marble.mini import model_folder

from .tiny import LINEARS, add_lora, build, inputs_of, predict

PIPELINES = {
    "sd3": diffusers.StableDiffusion3Pipeline,
    "flux": diffusers.FluxPipeline,
    "unet": diffusers.StableDiffusionPipeline,
}


def save(name, folder, *, targets=None, **options):
    """A tiny model with a random LoRA on it, saved as stock Diffusers does; the model and the file."""
    model = add_lora(build(name), targets or LINEARS[name], **options)
    part = "unet" if name == "unet" else "transformer"
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(model)}
    settings = {f"{part}_lora_adapter_metadata": model.peft_config["default"].to_dict()}
    PIPELINES[name].save_lora_weights(folder, **layers, **settings)
    return model, folder / LORA_FILE


def stock(name, file):
    """The tiny model with the file's LoRA, loaded by stock Diffusers."""
    model = build(name)
    part = "unet" if name == "unet" else "transformer"
    model.load_lora_adapter(file.parent, prefix=part, weight_name=file.name)
    return model


def added(name, file):
    """The tiny model with `B @ A` added to its weights at scale 1: a reader that knows no settings and no alpha."""
    model, tensors = build(name), load_file(file)
    for key in [key for key in tensors if ".lora_A." in key]:
        layer = model.get_submodule(key.split(".", 1)[1].removesuffix(".lora_A.weight"))
        layer.weight.data += tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
    return model


SCALES = {
    "twice": {},
    "root": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"transformer_blocks.0.attn.to_q": 5, "norm1.linear": 2},
        "alpha_pattern": {"attn.to_k": 7, r"transformer_blocks\.0\..*to_out\.0": 1},
    },
}


@pytest.mark.parametrize("options", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_every_reader_gets_the_same_outputs(name, options, tmp_path):
    model, file = save(name, tmp_path, **options)
    inputs = inputs_of(name, 3)
    wanted = predict(model, inputs)
    base = (wanted - predict(build(name), inputs)).abs().max()
    assert base > 0.1  # the LoRA does something
    assert (predict(added(name, file), inputs) - wanted).abs().max() > base / 100  # and its scale matters
    before = predict(stock(name, file), inputs)
    finish_lora(file, {})
    assert torch.allclose(predict(added(name, file), inputs), wanted, atol=1e-5)
    after = predict(stock(name, file), inputs)
    assert torch.allclose(after, wanted, atol=1e-5)
    if options == {}:  # a scale of 2 is exact
        assert torch.equal(after, before)
    with safe_open(file, "pt") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert settings["transformer.lora_alpha"] == settings["transformer.r"] == 3
    assert settings["transformer.alpha_pattern"] == settings["transformer.rank_pattern"]
    assert settings["transformer.use_rslora"] is False


def test_without_settings_the_scale_is_one_already(tmp_path):
    _, file = save("sd3", tmp_path)
    tensors = load_file(file)
    save_file(tensors, file)
    finish_lora(file, {"a": "b"})
    assert all(torch.equal(value, tensors[key]) for key, value in load_file(file).items())
    assert read_lora(file)[1] == {"a": "b"}


def test_half_precision_is_rounded_once(tmp_path):
    _, file = save("sd3", tmp_path, use_rslora=True)
    tensors, header = read_lora(file)
    save_file({key: value.bfloat16() for key, value in tensors.items()}, file, metadata=header)
    finish_lora(file, {})
    for key, value in load_file(file).items():
        factor = 6 / 3**0.5 if ".lora_B." in key else 1
        assert torch.equal(value, (tensors[key].bfloat16().double() * factor).bfloat16())


def test_finishing_again_changes_nothing(tmp_path):
    _, file = save("unet", tmp_path)
    finish_lora(file, {"numbers": [1, 2], "text": "as it is"})
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {LORA_FILE, COMFYUI_FILE}
    finish_lora(file, {"numbers": [1, 2], "text": "as it is"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    assert read_lora(file)[1]["numbers"] == "[1, 2]"
    assert read_lora(file)[1]["text"] == "as it is"


@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape")  # PEFT, of the biases
@pytest.mark.parametrize(("options", "found"), [({"use_dora": True}, "magnitude"), ({"lora_bias": True}, "bias")])
def test_what_is_not_plain_lora_is_refused_and_left_alone(options, found, tmp_path):
    _, file = save("sd3", tmp_path, targets=["ff.net.2"], **options)
    before = file.read_bytes()
    with pytest.raises(MarbleError, match=found):
        finish_lora(file, {})
    assert file.read_bytes() == before


def test_broken_files_are_named(tmp_path):
    (tmp_path / LORA_FILE).write_text("not safetensors")
    for file in (tmp_path / LORA_FILE, tmp_path / "none"):
        with pytest.raises(MarbleError, match=f'cannot read "{re.escape(str(file))}"'):
            finish_lora(file, {})


# ---- ComfyUI --------------------------------------------------------------------------------------------
# Its rule, from comfy/lora.py (model_lora_keys_unet, load_lora) and comfy/weight_adapter/lora.py of Comfy-Org/ComfyUI
# at 17358c8f and 6f98b150: the model makes a map of layers' names x, and a file's keys are looked up as x + a suffix;
# without x.alpha the scale is 1. The layers of a U-Net and of each transformer that the map has, under their names
# in Diffusers (comfy/utils.py at 09708eae: unet_to_diffusers, mmdit_to_diffusers, flux_to_diffusers,
# z_image_to_diffusers; QwenImage's own names are Diffusers').

PAIRS = [(".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight")]
_QKV = r"to_[qkv]|to_out\.0"
_JOINT = rf"({_QKV}|add_[qkv]_proj|to_add_out)"
MAPPED = {
    "unet": r"((down|up)_blocks\.\d+|mid_block)\.(attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\."
    rf"(attn[12]\.({_QKV})|ff\.net\.(0\.proj|2)))|resnets\.\d+\.(conv1|conv2|time_emb_proj|conv_shortcut))",
    "sd3": rf"transformer_blocks\.\d+\.(attn\.{_JOINT}|attn2\.({_QKV})|ff(_context)?\.net\.(0\.proj|2)"
    r"|norm1(_context)?\.linear)",
    "flux": rf"transformer_blocks\.\d+\.(attn\.{_JOINT}|ff(_context)?\.net\.(0\.proj|2)|norm1(_context)?\.linear)"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)"
    r"|time_text_embed\.\w+_embedder\.linear_[12]|proj_out|x_embedder|context_embedder",
    "qwenimage": rf"transformer_blocks\.\d+\.(attn\.{_JOINT}|(img|txt)_mlp\.net\.(0\.proj|2))",
    "zimage": rf"(layers|noise_refiner|context_refiner)\.\d+\.(attention\.({_QKV})|feed_forward\.w[123])",
}


def names_in_comfyui(family, layer):
    """What ComfyUI's map calls a layer of Diffusers' name; nothing if it does not have it."""
    if not re.fullmatch(MAPPED[family], layer):
        return []
    if family != "unet":
        return [f"transformer.{layer}"]
    spelled = layer.replace(".to_", ".processor.to_")
    spelled = spelled.removesuffix(".0") if spelled.endswith(".to_out.0") else spelled
    return ["lora_unet_" + layer.replace(".", "_"), spelled, f"unet.{spelled}"]


def unread(family, layers, keys):
    """Keys that ComfyUI would say it has not loaded."""
    read = set()
    for x in [x for layer in layers for x in names_in_comfyui(family, layer)]:
        for up, down in PAIRS:
            if x + up in keys and x + down in keys:
                read |= {x + up, x + down} | ({f"{x}.alpha"} & keys)
    return keys - read


def linears(model):
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_comfyui_finds_every_key_of_a_transformer(name, tmp_path):
    _, file = save(name, tmp_path)
    finish_lora(file, {})
    keys = set(load_file(file))
    assert unread(name, linears(build(name)), keys) == set()
    assert unread(name, linears(build(name)), {f"x{key}" for key in keys}) == {f"x{key}" for key in keys}
    assert not (tmp_path / COMFYUI_FILE).exists()


@pytest.mark.parametrize("family", ["qwenimage", "zimage"])
def test_comfyui_finds_attention_of_further_transformers(family, tmp_path):
    with torch.device("meta"):
        if family == "qwenimage":
            pipeline = diffusers.QwenImagePipeline
            model = diffusers.QwenImageTransformer2DModel(
                num_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16
            )
        else:
            pipeline = diffusers.ZImagePipeline
            model = diffusers.ZImageTransformer2DModel(
                dim=32, n_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 6, 6]
            )
    layers = linears(model)
    targets = [name for name in layers if re.search(rf"\.({_QKV}|add_[qkv]_proj|to_add_out)$", name)]
    add_lora(model, targets)
    state = {key: torch.ones(value.shape) for key, value in get_peft_model_state_dict(model).items()}
    assert len(state) >= 8
    settings = model.peft_config["default"].to_dict()
    pipeline.save_lora_weights(tmp_path, transformer_lora_layers=state, transformer_lora_adapter_metadata=settings)
    finish_lora(tmp_path / LORA_FILE, {})
    assert unread(family, layers, set(load_file(tmp_path / LORA_FILE))) == set()


UNET = [*LINEARS["unet"], "proj_in", "proj_out"]


def test_comfyui_reads_a_unet_from_the_second_file_only(tmp_path):
    _, file = save("unet", tmp_path, targets=LINEARS["unet"])
    finish_lora(file, {})
    layers = linears(build("unet"))
    left = unread("unet", layers, set(load_file(file)))
    assert left  # the reason for the second file
    assert all(".attn" in key for key in left)
    assert unread("unet", layers, set(load_file(tmp_path / COMFYUI_FILE))) == set()


def test_the_second_file_is_diffusers_own_conversion(tmp_path):
    _, file = save("unet", tmp_path)
    finish_lora(file, {"base_model": "x"})
    own, wanted = load_file(tmp_path / COMFYUI_FILE), convert_state_dict_to_kohya(load_file(file))
    assert set(own) == set(wanted)
    assert all(torch.equal(value, wanted[key].to(value.dtype)) for key, value in own.items())
    assert {value.item() for key, value in own.items() if key.endswith(".alpha")} == {3.0}
    assert read_lora(tmp_path / COMFYUI_FILE)[1] == {"base_model": "x", "format": "pt"}


@pytest.mark.parametrize("pipeline", [diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline])
def test_the_second_file_makes_the_same_outputs_in_stock_diffusers(pipeline, tmp_path):
    model, file = save("unet", tmp_path, targets=UNET)
    finish_lora(file, {})
    outputs = []
    for name in (LORA_FILE, COMFYUI_FILE):
        loaded = build("unet")
        state, alphas, settings = pipeline.lora_state_dict(
            tmp_path, weight_name=name, unet_config=loaded.config, return_lora_metadata=True
        )
        pipeline.load_lora_into_unet(state, alphas, loaded, metadata=settings)
        outputs.append(predict(loaded, inputs_of("unet", 3)))
    assert torch.equal(*outputs)
    unnamed = pipeline.lora_state_dict(tmp_path, unet_config=build("unet").config)[0]
    assert set(unnamed) == set(load_file(file))  # of the two, the first is what a folder is read as
    assert torch.allclose(outputs[0], predict(model, inputs_of("unet", 3)), atol=1e-5)


# ---- a run ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    values = read_config(demo_config_path())
    values["rollout"] |= {"prompts": 3, "group_size": 2, "steps": 3}
    values["objective"] |= {"timesteps": 1}
    values["optimizer"] |= {"updates_per_epoch": 1}
    values["evaluation"] = {"prompts": 3, "images": 2, "steps": 2}
    values |= {"budget": {"updates": 2}, "threads": 1}
    return train(make_config(values), tmp_path_factory.mktemp("export") / "run")


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run, to change."""
    shutil.copytree(run.path, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    return Run(tmp_path / "copy")


def picture(folder):
    pipe = diffusers.DiffusionPipeline.from_pretrained(model_folder())
    pipe.set_progress_bar_config(disable=True)
    if folder is not None:
        pipe.load_lora_weights(folder)
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "generator": generator, "output_type": "pt"}
    return pipe("a red circle left of a blue square", **call).images


def test_a_runs_lora_makes_the_same_pixels_and_says_what_it_is(copy):
    file = copy.path / "lora" / LORA_FILE
    tensors = {key: value if ".lora_A." in key else value + 0.05 for key, value in load_file(file).items()}
    header = {"lora_adapter_metadata": read_lora(file)[1]["lora_adapter_metadata"]}
    settings = json.loads(header["lora_adapter_metadata"]) | {"transformer.lora_alpha": 32}  # of rank 16, unfinished
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(settings)})
    before = picture(file.parent)
    assert not torch.equal(before, picture(None))
    finish_run(copy)
    assert torch.equal(picture(file.parent), before)
    header = read_lora(file)[1]
    assert all(isinstance(value, str) for value in header.values())
    assert header["base_model"] == "mini"
    assert header["pipeline"] == "StableDiffusion3Pipeline"
    assert header["marble_version"]
    assert header["method"] == "marble"
    assert json.loads(header["updates"]) == 2
    rewards = json.loads(header["rewards"])
    assert [reward["name"] for reward in rewards] == copy.evaluation()["training_rewards"]
    assert {reward["revision"] for reward in rewards} == set(copy.evaluation()["revisions"].values())
    assert [update for update, _ in json.loads(header["alpha_history"])] == [1, 2]
    assert json.loads(header["alpha_history"])[-1][1] == pytest.approx(copy.metrics()[-1]["alpha"], abs=1e-4)
    assert {source["source"] for source in json.loads(header["prompts"])} == {
        "mini-places",
        "mini-words",
        "mini-objects",
    }
    assert str(copy.path.parent) not in json.dumps(header)


def test_a_run_without_a_lora_in_this_layout_is_left_alone(copy):
    shutil.rmtree(copy.path / "lora")
    finish_run(copy)
    assert not (copy.path / "lora").exists()


def test_a_long_history_is_thinned_evenly(copy):
    for update in range(3, 1001):
        copy.log({"update": update, "alpha": [0.25, 0.75]})
    history = details_of(copy)["alpha_history"]
    updates = [update for update, _ in history]
    assert len(history) == HISTORY
    assert updates[0] == 1
    assert updates[-1] == 1000
    assert {b - a for a, b in pairwise(updates)} == {5, 6}


def based_on(copy, name):
    """The copy's base after its config says `name`, its LoRA being of no version that records it."""
    file = copy.path / "config.yaml"
    file.write_text(file.read_text().replace("id: mini", f"id: {json.dumps(str(name))}"))
    save_file(load_file(copy.path / "lora" / LORA_FILE), copy.path / "lora" / LORA_FILE)
    return base_of(Run(copy.path))


def test_a_hub_base_is_its_id(copy):
    assert based_on(copy, "stabilityai/not-cached-here") == Base("hub", "stabilityai/not-cached-here", "")


def test_a_local_base_stays_local_wherever_it_is_asked_for(copy, tmp_path, monkeypatch):
    shutil.copytree(model_folder(), tmp_path / "models" / "secret", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.chdir(tmp_path)
    local = Base("local", "", "StableDiffusion3Pipeline")
    assert based_on(copy, "models/secret") == local  # looks like a hub id
    finish_run(copy)
    monkeypatch.chdir("/")
    assert base_of(copy) == local
    assert "secret" not in json.dumps(read_lora(copy.path / "lora" / LORA_FILE)[1])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("/home/me/judge.safetensors@abc", "judge.safetensors@abc"),
        ("~/x/y", "y"),
        (r"C:\Users\me\model", "model"),
        ("https://hub.example/a/b", "https://hub.example/a/b"),
        ("owner/name", "owner/name"),
        ("1/2 of it", "1/2 of it"),
        ({"prompts": ["/a/b"], "x": ["/a/b", 1, None]}, {"prompts": ["/a/b"], "x": ["b", 1, None]}),
    ],
)
def test_paths_are_cut(text, wanted):
    assert without_paths(text) == wanted

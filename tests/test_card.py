"""The model card and what is published beside it."""

import json
import re
import shutil

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from PIL import Image, ImageChops
from safetensors.torch import save_file

from marble import MarbleError, Run, train
from marble.card import write_bundle, write_card
from marble.card.markdown import plain
from marble.config import demo_config_path, make_config, read_config
from marble.export import COMFYUI_FILE, LORA_FILE, read_lora
from marble.mini import model_folder
from marble.report import write_report

REPO = "me/my-lora"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    values = read_config(demo_config_path())
    values["rollout"] |= {"prompts": 3, "group_size": 2, "steps": 3}
    values["objective"] |= {"timesteps": 1}
    values["optimizer"] |= {"updates_per_epoch": 1}
    values["evaluation"] = {"prompts": 9, "images": 2, "steps": 2}
    values |= {"budget": {"updates": 2}, "threads": 1}
    return train(make_config(values), tmp_path_factory.mktemp("card") / "run")


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run, to change."""
    shutil.copytree(run.path, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    return Run(tmp_path / "copy")


def configured(copy, **sections):
    """The copy after changes to its config; its LoRA forgets what base it was of."""
    file = copy.path / "config.yaml"
    values = yaml.safe_load(file.read_text())
    for name, change in sections.items():
        values[name] = {**values[name], **change} if isinstance(change, dict) else change
    file.write_text(yaml.safe_dump(values))
    strip(copy)
    return Run(copy.path)


def strip(copy, names=lambda name: name):
    """Take out of the LoRA's header what marble has written there, and rename its layers."""
    file = copy.path / "lora" / LORA_FILE
    tensors, header = read_lora(file)
    settings = {k: v for k, v in header.items() if k == "lora_adapter_metadata"}
    save_file({names(name): value for name, value in tensors.items()}, file, metadata=settings)


def front_matter(card):
    start, matter, body = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(matter), body


def section(card, title):
    return card.split(f"## {title}\n")[1].split("\n## ")[0]


def tokens(card):
    """What a Markdown reader sees: every token's kind, and the HTML."""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    kinds, html = [], []
    for token in parser.parse(front_matter(card)[1]):
        for part in [token, *(token.children or [])]:
            kinds += [part.type] if part.type != "text" else []
            html += [part.content] if part.type.startswith("html") else []
    return kinds, html


def test_a_finished_runs_card_is_complete(run):
    card = write_card(run, REPO)
    matter, body = front_matter(card)
    assert matter == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "lora", "diffusion-rl", "marble"],
    }  # mini is no model of the hub, and no license was given
    assert body.lstrip().startswith("# my-lora\n")
    assert "<code>mini</code>, a model that ships with marble" in body
    evaluation = run.evaluation()
    gains = section(card, "What was gained")
    for name, gain in evaluation["gains"].items():
        line = next(line for line in gains.splitlines() if line.startswith(f"| {plain(name)} |"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1] == ("trained on" if name in evaluation["training_rewards"] else "held out")
        assert [float(cell) for cell in cells[2:5]] == pytest.approx(
            [gain["before"], gain["after"], gain["gain"]], 1e-2
        )
        assert [float(x) for x in cells[5].split(" … ")] == pytest.approx([gain["low"], gain["high"]], 1e-2)
    assert "9 held-out prompts, 2 images each" in gains
    assert "no classifier-free guidance" in gains
    rewards = section(card, "Rewards")
    for name, revision in evaluation["revisions"].items():
        assert re.search(rf"^\| {re.escape(plain(name))} \| .* \| {re.escape(revision)} \|", rewards, re.M)
    assert section(card, "Prompts").count("33%") == 3
    training = section(card, "Training")
    assert "Method <code>marble</code>" in training
    assert "2 updates of a budget of 2 updates; 12 images" in training
    assert "3 prompts × 2 images, sampled in 3 steps" in training
    assert "LoRA of rank 16 on 31 layers (<code>attn.add\\_k\\_proj</code>" in training
    assert "diffusers " in training
    assert "reward" in section(card, "Limits").lower()
    assert "None stated" in section(card, "License")
    assert str(run.path) not in card


def test_the_code_on_the_card_runs_and_makes_the_evaluations_pixels(run, tmp_path):
    folder = tmp_path / "bundle"
    write_bundle(run, REPO, folder)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    seed = run.evaluation()["seeds"][0]
    for old, new in ((repr(REPO), repr(str(folder))), ("manual_seed(0)", f"manual_seed({seed})")):
        assert old in code
        code = code.replace(old, new)
    made = {}
    exec(code, made)
    with Image.open(run.path / "samples" / "after" / "000_0.png") as shown:
        assert ImageChops.difference(made["image"], shown).getbbox() is None


def test_the_pictures_on_the_card_are_those_beside_it(run, tmp_path):
    files = [path.as_posix() for path in write_bundle(run, REPO, tmp_path)]
    shown = re.findall(r"!\[\w+\]\(([^)]*)\)", (tmp_path / "README.md").read_text())
    assert len(shown) == 12
    assert sorted(shown) == sorted(name for name in files if name.startswith("images/"))
    assert (tmp_path / "images" / "after_000.png").read_bytes() == (
        run.path / "samples" / "after" / "000_0.png"
    ).read_bytes()
    others = sorted(name for name in files if not name.startswith("images/"))
    assert others == ["README.md", "config.yaml", "evaluation.json", LORA_FILE]
    assert json.loads((tmp_path / "evaluation.json").read_text()) == run.evaluation()
    assert make_config(read_config(tmp_path / "config.yaml")) == run.config


NASTY = [
    "a | b",
    "`code` ``` and ~~~",
    "line\n\n---\n# heading\n- item",
    "---",
    "<script>alert(1)</script><img src=x onerror=y>",
    "[link](https://evil.example) ![i](x.png) <https://evil.example>",
    "**bold** _it_ ~~no~~ $x$ \\",
    "&lt;b&gt; &#96; \u202eright\u202c \x1b[31m\r\n| a |",
    "https://evil.example www.evil.example",
]


def test_what_nobody_vouches_for_cannot_change_the_card(copy):
    benign, harmless = copy.evaluation(), write_card(copy, REPO)
    nasty = json.loads(json.dumps(benign))
    for side in ("before", "after"):
        nasty[side]["prompts"] = NASTY
    renamed = dict(zip(benign["revisions"], [f"{text} {i}" for i, text in enumerate(NASTY)], strict=False))
    for key in ("training_rewards", "held_out_rewards"):
        nasty[key] = [renamed[name] for name in benign[key]]
    for key in ("revisions", "gains"):
        nasty[key] = {renamed[name]: value for name, value in benign[key].items()}
    nasty["revisions"] = dict.fromkeys(nasty["revisions"], NASTY[2] + NASTY[4])
    copy.write_evaluation(nasty)
    environment = copy.path / "environment.json"
    environment.write_text(json.dumps({**json.loads(environment.read_text()), "marble-diffusion": NASTY[5]}))
    configured(copy, model={"call": {"text": "```\n# out", "max_sequence_length": 12}})
    card = write_card(copy, REPO)
    kinds, html = tokens(card)
    assert kinds == tokens(harmless)[0]
    assert set(html) == {"<code>", "</code>"}
    assert front_matter(card)[0] == front_matter(harmless)[0]
    assert "\u202e" not in card
    assert "\x1b" not in card
    compile(re.search(r"```python\n(.*?)\n```\n", card, re.S)[1], "card", "exec")


@pytest.mark.parametrize("text", NASTY)
def test_escaped_text_is_read_as_itself(text):
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    inline = parser.parse(f"x {plain(text)} y")[1]
    assert {child.type for child in inline.children} == {"text"} or "\\" in text
    shown = "".join(child.content for child in inline.children)
    wanted = "".join(char for char in " ".join(text.split()) if char.isprintable())
    assert shown == f"x {wanted} y"


def test_a_run_broken_off_before_its_evaluation(copy):
    evaluation = copy.evaluation()
    copy.write_evaluation({key: value for key, value in evaluation.items() if key not in ("after", "gains")})
    shutil.rmtree(copy.path / "samples" / "after")
    card = write_card(copy, REPO)
    assert "Not measured" in section(card, "What was gained")
    assert "images/" not in card


def test_as_little_as_a_config_and_a_lora_will_do(copy, tmp_path):
    for name in ("metrics.jsonl", "evaluation.json", "environment.json"):
        (copy.path / name).unlink()
    shutil.rmtree(copy.path / "samples")
    files = write_bundle(copy, REPO, tmp_path / "bundle")
    assert [path.as_posix() for path in files] == ["README.md", "config.yaml", LORA_FILE]
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "0 updates of a budget of 2 updates" in card
    assert "Versions: not recorded" in card
    assert "<code>mini-aesthetic</code>" in card


def test_a_run_without_a_lora_is_refused(copy):
    (copy.path / "lora" / LORA_FILE).unlink()
    with pytest.raises(MarbleError, match="PEFT's layout"):
        write_card(copy, REPO)
    shutil.rmtree(copy.path / "lora")
    with pytest.raises(MarbleError, match=rf"has no lora/{LORA_FILE}: it has not finished.*--resume"):
        write_card(copy, REPO)
    file = copy.path / "config.yaml"
    file.write_text(file.read_text().replace("train: lora", "train: full"))
    with pytest.raises(MarbleError, match="all of its model was trained"):
        write_card(copy, REPO)


def test_paths_of_this_machine_stay_here(copy, tmp_path):
    secret = tmp_path / "secret-place"
    shutil.copytree(model_folder(), secret / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    prompts = [{"source": str(secret / "mine.txt"), "share": 3}, {"source": "mini-places", "share": 1}]
    model = {
        "id": str(secret / "base"),
        "merge": [str(secret / "first"), "owner/second", "secret-place/deep/third"],
        "call": {"max_sequence_length": 12, "file": str(secret / "x.bin")},
        "lora": {"start": f"{secret}/start"},
    }
    changed = configured(copy, prompts=prompts, model=model)
    evaluation = changed.evaluation()
    evaluation["revisions"] = dict.fromkeys(evaluation["revisions"], f"{secret}/judge.pt@1")
    changed.write_evaluation(evaluation)
    files = write_bundle(changed, REPO, tmp_path / "bundle")
    for file in files:
        assert b"secret-place" not in (tmp_path / "bundle" / file).read_bytes(), file
    card = (tmp_path / "bundle" / "README.md").read_text()
    matter, _ = front_matter(card)
    assert "base_model" not in matter
    assert "a local pipeline (<code>StableDiffusion3Pipeline</code>)" in card
    assert "| <code>mine.txt</code> | 75% |" in card
    assert "| judge.pt@1 |" in card
    assert "pipe.load_lora_weights('first')  # merged before training" in card
    assert "pipe.load_lora_weights('owner/second')" in card
    config = yaml.safe_load((tmp_path / "bundle" / "config.yaml").read_text())
    assert config["model"]["id"] == "base"
    assert config["prompts"][0] == {"source": "mine.txt", "share": 3}
    assert config["model"]["merge"] == ["first", "owner/second", "third"]


def test_servers_and_keys_stay_here(copy, tmp_path):
    """Not on the card, in the header, the config, the evaluation or the report."""
    names = copy.evaluation()["training_rewards"]
    config = copy.config.model_dump(mode="json")
    for use in config["rewards"]:
        use |= {
            "url": ["http://judge.secret-corp:8420"],
            "settings": {"api_key": "sk-secret", "dtype": "float16", "side": 8},
        }
    config["rewards"][0] |= {"reward": "https://user:secret@judge.secret-corp/first", "url": []}
    config["held_out_rewards"][0] = {"reward": "http://10.1.2.3:8420/secretly/kept"}
    changed = configured(copy, rewards=config["rewards"], held_out_rewards=config["held_out_rewards"])
    files = write_bundle(changed, REPO, tmp_path / "bundle")
    report = write_report(changed)
    for file in [*(tmp_path / "bundle" / file for file in files), report]:
        assert b"secret" not in file.read_bytes(), file
        assert b"10.1.2.3" not in file.read_bytes(), file
    published = yaml.safe_load((tmp_path / "bundle" / "config.yaml").read_text())
    assert [use["settings"] for use in published["rewards"]] == [{"dtype": "float16", "side": 8}] * len(names)
    assert published["rewards"][0]["reward"] == "first"
    assert published["held_out_rewards"][0]["reward"] == "kept"
    assert "<code>first</code>" in (tmp_path / "bundle" / "README.md").read_text()


def test_a_base_of_the_hub_is_linked_and_read_as_it_was(copy):
    model = {"id": "owner/base", "revision": "abc", "dtype": "bfloat16"}
    changed = configured(copy, model=model, rollout={"guidance": 2.5}, evaluation={"guidance": 4.5})
    told = {"guidance": {"true_cfg_scale": 4.5, "negative_prompt": ""}}  # as this pipeline is told of guidance
    changed.write_evaluation(changed.evaluation() | told)
    card = write_card(changed, REPO, "openrail++")
    matter, body = front_matter(card)
    assert matter["base_model"] == "owner/base"
    assert matter["base_model_relation"] == "adapter"
    assert matter["license"] == "openrail++"
    assert "[owner/base](https://huggingface.co/owner/base)" in body
    assert "from_pretrained(base, revision='abc', dtype=torch.bfloat16)" in body
    assert "true_cfg_scale=4.5," in body
    assert "guidance_scale=" not in body
    assert "trained with guidance scale 2.5, and evaluated with guidance scale 4.5" in body
    assert "openrail++" in section(card, "License")


def test_what_is_said_of_comfyui(copy, tmp_path):
    def said(run):
        return next(line for line in write_card(run, REPO).splitlines() if line.startswith("In ComfyUI"))

    assert "no loader for <code>mini</code>" in said(copy)
    shutil.copytree(model_folder(), tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    local = configured(copy, model={"id": str(tmp_path / "base")})
    assert f"Put <code>{plain(LORA_FILE)}</code> into `models/loras`" in said(local)
    index = tmp_path / "base" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusion3Pipeline", "SanaPipeline"))
    assert "of <code>SanaPipeline</code> in this layout is unknown" in said(local)
    strip(local, lambda name: name.replace("transformer.", "unet.", 1))
    assert f"Put <code>{COMFYUI_FILE}</code> into" in said(local)


def test_an_earlier_versions_lora_is_finished_on_the_way(copy, tmp_path):
    strip(copy)
    file = copy.path / "lora" / LORA_FILE
    tensors, header = read_lora(file)
    settings = json.loads(header["lora_adapter_metadata"]) | {"transformer.lora_alpha": 48}
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(settings)})
    write_bundle(copy, REPO, tmp_path / "bundle")
    finished, header = read_lora(tmp_path / "bundle" / LORA_FILE)
    assert json.loads(header["lora_adapter_metadata"])["transformer.lora_alpha"] == 16
    assert header["base_model"] == "mini"
    for name, value in finished.items():
        assert torch.allclose(value, tensors[name] * (3 if ".lora_B." in name else 1))
    assert read_lora(file)[1].keys() == {"lora_adapter_metadata"}  # the run itself stays as it was

"""`marble score` and `marble list rewards`: images alone, and what to know of a reward."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from marble.cli import main
from marble.registry import known


def run(*arguments):
    """Exit code, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def pictures(tmp_path, rng):
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


def scores_of(out):
    return {Path(row["file"]).name: row["scores"] for row in json.loads(out)["images"]}


def test_scores_as_a_table_and_as_json(pictures):
    rewards = ("--rewards", "sharpness", "mini-text", "mini-alignment")
    code, out, _ = run("score", pictures, "--prompt", "a place", *rewards, "--json")
    assert code == 0
    scores = scores_of(out)
    assert set(scores) == {"a.png", "b.png"}
    assert scores["a.png"]["sharpness"] > 0
    assert scores["a.png"]["text"] is None  # asks for no word
    mean = (scores["a.png"]["sharpness"] + scores["b.png"]["sharpness"]) / 2
    assert json.loads(out)["means"]["sharpness"] == pytest.approx(mean)
    code, table, _ = run("score", pictures / "a.png", pictures / "b.png", "--prompt", "a place", *rewards)
    assert code == 0
    assert "–" in table
    assert f"{mean:.4f}" in table


def test_targets_and_prompts_for_each(pictures):
    code, out, _ = run(
        *("score", pictures / "a.png", pictures / "b.png", "--prompt", "one", "two", "--rewards", "mini-text"),
        *("--targets", '{"text": "CAT"}', "--json"),
    )
    assert code == 0
    assert [row["prompt"] for row in json.loads(out)["images"]] == ["one", "two"]
    assert all(row["scores"]["text"] is not None for row in json.loads(out)["images"])


def test_prompts_of_what_generate_made(pictures):
    rows = [{"file": "a.png", "prompt": "a red circle"}, {"file": "b.png", "prompt": "a blue square"}]
    (pictures / "calls.json").write_text(json.dumps({"images": rows}))
    code, out, _ = run("score", pictures, "--rewards", "mini-alignment", "--json")
    assert code == 0
    assert [row["prompt"] for row in json.loads(out)["images"]] == ["a red circle", "a blue square"]


def test_rewards_that_need_no_prompt(pictures):
    code, out, _ = run("score", pictures, "--rewards", "mini-aesthetic", "mini-diversity", "--json")
    assert code == 0
    assert all(score is not None for row in scores_of(out).values() for score in row.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rewards", "mini-alignment"), "--prompt: needed by alignment, got none for"),
        (("--rewards", "mini-alignment", "--prompt", "a", "b", "c"), "give one for all images or one for each of 2"),
        (("--rewards", "sharpnes", "--prompt", "a"), 'Did you mean "sharpness"?'),
        (("--rewards", "sharpness", "--targets", "{"), "--targets: is not JSON"),
        (("--rewards", "sharpness", "--targets", "[1]"), "--targets: must be a JSON object, got [1]"),
        (("--rewards", "sharpness", "--settings", '{"sharp": {}}'), '--settings: "sharp" is none of the rewards'),
        (("--rewards", "sharpness", "--settings", '{"sharpness": 1}'), "must be an object, got 1"),
        (("--rewards", "sharpness", "--settings", '{"sharpness": {"radius": 1}}'), 'unknown setting "radius"'),
    ],
)
def test_mistakes(pictures, arguments, message):
    code, out, err = run("score", pictures, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_all_files_that_are_no_images_are_listed(pictures, tmp_path):
    (tmp_path / "c.png").write_text("text")
    code, _, err = run("score", tmp_path / "c.png", tmp_path / "d.png", "--rewards", "sharpness")
    assert code == 2
    assert 'c.png" is not an image' in err
    assert 'd.png" does not exist' in err


def test_a_reward_that_never_answers_is_an_error(pictures):
    code, out, err = run("score", pictures, "--rewards", f"{__name__}:broken", "sharpness", "--json")
    assert code == 2
    assert scores_of(out)["a.png"]["sharpness"] > 0  # the others are shown
    assert "no score of broken" in err


def broken(images):
    raise ValueError("out of order")


def test_every_reward_of_ours_says_what_to_know_of_it():
    code, out, _ = run("list", "rewards", "--json")
    assert code == 0
    rows = json.loads(out)
    assert set(rows) == set(known("reward"))
    for name, row in rows.items():
        assert row["about"], name
        if not name.startswith("mini-"):  # those are described in docs/rewards.md
            for key in ("model", "preprocessing", "scale", "applies", "licence", "hacks"):
                assert row[key].strip(), f"{name}: {key}"


def test_listing_loads_no_library_of_models():
    code = "import sys; from marble.cli import main; main(['list', 'rewards']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    loaded = set(done.stderr.split())
    assert not loaded & {"transformers", "diffusers", "rapidocr", "onnxruntime", "starlette", "datasets"}
    assert "licence" in done.stdout


def test_a_reward_in_the_working_folder(pictures, tmp_path):
    """As the guide has it, by the installed command, which does not have the working folder on its path."""
    (tmp_path / "my_rewards.py").write_text(
        'def calm(images):\n    """Few edges."""\n    grey = images.float().mean(dim=1)\n'
        "    return -(grey[:, 1:] - grey[:, :-1]).abs().mean(dim=(1, 2))\n"
    )
    command = [
        str(Path(sys.executable).with_name("marble")),
        "score",
        "a.png",
        "--rewards",
        "my_rewards:calm",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=True)
    assert scores_of(done.stdout)["a.png"]["calm"] < -10


def test_the_docs_have_what_the_rewards_say_of_themselves():
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    _, out, _ = run("list", "rewards", "--markdown")
    assert out.strip() in page, "put the answer of `marble list rewards --markdown` into docs/rewards.md"

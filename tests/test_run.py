import json

import pytest
import torch
import yaml

from marble import MarbleError, Run
from marble.config import make_config, read_config
from marble.run import check_output


@pytest.fixture
def config():
    from marble.cli.train import demo_config_path

    return make_config(read_config(demo_config_path()))


def test_a_new_folder_holds_the_whole_config(tmp_path, config):
    run = Run.create(tmp_path / "runs" / "one", config)
    assert run.config == config
    assert yaml.safe_load((run.path / "config.yaml").read_text())["objective"]["amax"] == 5.0
    assert json.loads((run.path / "environment.json").read_text())["torch"] == torch.__version__


def test_an_existing_folder_is_never_overwritten(tmp_path, config):
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(MarbleError, match="exists and is not empty"):
        Run.create(tmp_path, config)
    assert [p.name for p in tmp_path.iterdir()] == ["keep.txt"]
    with pytest.raises(MarbleError, match="not empty"):
        check_output(tmp_path / "keep.txt")


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, config, monkeypatch):
    usage = type("Usage", (), {"free": 5 * 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(MarbleError, match="has 5 MiB free; a run needs at least 200 MiB"):
        Run.create(tmp_path / "new", config)
    assert not (tmp_path / "new").exists()


def test_not_a_run_folder(tmp_path):
    with pytest.raises(MarbleError, match=r"no config\.yaml"):
        Run(tmp_path)


def test_checkpoints_are_whole_and_old_ones_go(tmp_path, config):
    run = Run.create(tmp_path / "r", config)
    assert run.load_checkpoint() is None
    for update in (3, 6, 9):
        run.save_checkpoint(update, {"update": update, "w": torch.full((2,), float(update))}, keep=2)
    assert [p.name for p in run.checkpoints()] == ["step_000006", "step_000009"]
    (run.path / "checkpoints" / "step_000012.part").mkdir()  # a crash while writing
    assert run.load_checkpoint()["update"] == 9


def test_metrics_survive_a_cut_off_line_and_forget_what_will_be_made_again(tmp_path, config):
    run = Run.create(tmp_path / "r", config)
    for update in range(4):
        run.log({"update": update})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"update": 4, "lo')
    assert [row["update"] for row in run.metrics()] == [0, 1, 2, 3]
    run.forget_after(2)
    run.log({"update": 3, "again": True})
    assert [row["update"] for row in run.metrics()] == [0, 1, 2, 3]
    assert run.metrics()[-1]["again"]

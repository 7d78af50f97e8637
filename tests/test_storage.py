import torch

from marble.storage import load_tree, save_tree, write_atomic


def test_a_tree_comes_back(tmp_path):
    tree = {"a": [1, 2.5, None, "x", True], "b": {3: torch.arange(4), "c": {}}, "t": torch.zeros(0)}
    save_tree(tmp_path / "t.safetensors", tree)
    back = load_tree(tmp_path / "t.safetensors")
    assert back["a"] == tree["a"]
    assert torch.equal(back["b"][3], torch.arange(4))
    assert back["b"]["c"] == {}
    assert back["t"].shape == (0,)


def test_an_optimizer_goes_on_exactly(tmp_path):
    def run(optimizer, weight, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (weight**2).sum().backward()
            optimizer.step()

    one = torch.nn.Parameter(torch.ones(3))
    first = torch.optim.AdamW([one], lr=0.1)
    run(first, one, 3)
    save_tree(tmp_path / "o.safetensors", first.state_dict())
    two = torch.nn.Parameter(one.detach().clone())
    second = torch.optim.AdamW([two], lr=0.5)
    second.load_state_dict(load_tree(tmp_path / "o.safetensors"))
    run(first, one, 3)
    run(second, two, 3)
    assert torch.equal(one, two)


def test_nothing_but_whole_files(tmp_path):
    write_atomic(tmp_path / "f.txt", "one")
    write_atomic(tmp_path / "f.txt", "two")
    save_tree(tmp_path / "t.safetensors", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.txt", "t.safetensors"]
    assert (tmp_path / "f.txt").read_text() == "two"

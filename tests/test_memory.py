"""What is said of memory, and updates that run out of it: the same as those that do not."""

import errno
import inspect
import logging
import os
from pathlib import Path

import pytest
import torch

from marble import MarbleError
from marble.memory import forget, free_bytes, full_training_bytes, is_out_of_memory

from .small import IMAGES, Trial, config_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("anything"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)"), True),
        (RuntimeError("HIP Out Of Memory"), True),
        # what torch says on the CPU
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12"),
            True,
        ),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (OSError(errno.ENOSPC, "no space left"), False),
    ],
)
def test_which_errors_are_about_memory(error, expected):
    assert is_out_of_memory(error) == expected


def test_what_torch_itself_says_when_the_cpu_has_no_more():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert is_out_of_memory(caught.value)


def test_free_memory_of_the_cpu():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**20 < free_bytes(CPU) <= total
    forget(CPU)


def test_free_memory_where_the_system_does_not_count_pages(monkeypatch):
    """macOS has no `SC_AVPHYS_PAGES`; there too full fine-tuning starts by asking what is free."""
    real = os.sysconf

    def sysconf(name):
        if name == "SC_AVPHYS_PAGES":
            raise ValueError("unrecognized configuration name")
        return real(name)

    monkeypatch.setattr(os, "sysconf", sysconf)
    assert free_bytes(CPU) > 0


def test_files_in_the_cache_do_not_count_as_used(monkeypatch):
    """Linux keeps what was read, such as the model's own file, in all memory that nobody wants: it is still free."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        pytest.skip("not Linux")
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free, available = (int(lines[name].split()[0]) * 1024 for name in ("MemFree", "MemAvailable"))
    if available - free < 2**30:
        pytest.skip("hardly anything is cached")
    assert free_bytes(CPU) == pytest.approx(available, rel=0.2)


def test_full_training_by_hand():
    """A million parameters and two rewards: 4 + 12 + 4 + 8 + 5 · 4 bytes for each."""
    parts = full_training_bytes(10**6, 2)
    assert list(parts.values()) == [4e6, 12e6, 4e6, 8e6, 20e6]
    assert list(parts)[-1] == "2 rewards' gradients, the common one and two for a diagnosis"
    assert full_training_bytes(10**6, 2, adam_bytes=2)["optimiser"] == 2e6


# ---- updates --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trial(untrained):
    return Trial.of(untrained)


def limit(trial, monkeypatch, most, *, after=0, backward=False):
    """From the `after`-th call with gradients on, the denoiser takes no more than `most` images; returns the sizes.

    With `backward` it takes them, and memory runs out on the way back.
    """
    forward, sizes = trial.policy.denoiser.forward, []

    def limited(hidden_states, *args, **kwargs):
        trains = torch.is_grad_enabled()
        if trains:
            sizes.append(len(hidden_states))
        too_many = trains and len(sizes) > after and len(hidden_states) > most
        if too_many and not backward:
            raise torch.OutOfMemoryError("CUDA out of memory")
        result = forward(hidden_states, *args, **kwargs)
        if too_many:
            result[0].register_hook(lambda gradient: _raise())
        return result

    limited.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(trial.policy.denoiser, "forward", limited)
    monkeypatch.setattr("marble.step.forget", lambda device: None)  # collecting garbage takes longer than the update
    return sizes


def _raise():
    raise torch.OutOfMemoryError("CUDA out of memory")


UPDATES = {
    "exact": {},
    "exact, with the penalty": {"objective": {"kl": 0.3}},
    "published": {"balance": {"method": "published"}, "objective": {"kl": 2.0}},
    "a share of them": {"balance": {"solve_share": 0.5}, "objective": {"kl": 0.1}},
    "published, a share": {"balance": {"method": "published", "solve_share": 0.5}, "objective": {"kl": 0.1}},
    "amortised": {"balance": {"refresh": 2}, "objective": {"kl": 0.1}},
    "advantages alone": {"balance": {"method": "weighted-sum"}, "objective": {"kl": 0.3}},
    "halves": {"balance": {"estimate": "halves", "smooth": "gram"}},
    "diagnosed": {"balance": {"method": "gdpo"}, "diagnose_every": 1, "objective": {"kl": 0.1}},
}


AT_ONCE, LATER, BACK = {"after": 0}, {"after": 2}, {"after": 1, "backward": True}
CASES = [(name, AT_ONCE) for name in UPDATES]
CASES += [(name, how) for name in ("exact, with the penalty", "published, a share") for how in (LATER, BACK)]
CASES += [("amortised", LATER), ("advantages alone", BACK)]


@pytest.fixture(scope="module")
def plain(trial):
    """Updates with enough memory, made once."""
    made = {}

    def run(name, epochs):
        if name not in made:
            made[name] = trial.run(config_of(**UPDATES[name]), epochs)
        return made[name]

    return run


@pytest.mark.parametrize(("name", "how"), CASES, ids=str)
def test_an_update_that_ran_out_of_memory_is_the_same_update(trial, plain, name, how, monkeypatch, caplog):
    epochs = 2 if name == "amortised" else 1
    expected, plain_metrics, _ = plain(name, epochs)
    sizes = limit(trial, monkeypatch, 3, **how)
    if name == "exact":
        monkeypatch.setattr("marble.step.forget", forget)
    with caplog.at_level(logging.WARNING, logger="marble"):
        found, metrics, parts = trial.run(config_of(**UPDATES[name]), epochs)
    assert max(sizes) == 8
    assert max(sizes[-4:]) == 2
    assert parts.updater.most == 2
    assert [record.args for record in caplog.records] == [(8, 4), (4, 2)]  # and remembered in the second epoch
    assert "which changes no result (optimizer.micro_batch)" in caplog.text
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert (found - expected).norm() <= 2e-4 * (expected - trial.origin).norm()
    for one, other in zip(metrics, plain_metrics, strict=True):
        assert one.keys() == other.keys()
        for key in ("loss", "kl", "gradient_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key


def test_what_fits_is_not_split_further(trial, monkeypatch):
    sizes = limit(trial, monkeypatch, 4)
    _, _, parts = trial.run(config_of(balance={"method": "weighted-sum"}))
    assert parts.updater.most == 4
    assert sizes == [8] + [4] * (2 * IMAGES // 4)


@pytest.mark.parametrize("method", ["marble", "weighted-sum"])
def test_a_single_image_that_does_not_fit(trial, method, monkeypatch):
    limit(trial, monkeypatch, 0)
    with pytest.raises(MarbleError, match=r"with one image in a forward and backward pass: use model\.checkpointing"):
        trial.run(config_of(balance={"method": method}))
    monkeypatch.undo()
    assert trial.run(config_of(balance={"method": method}))[0].isfinite().all()  # nothing is left behind


def test_other_errors_pass(trial, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(trial.policy.denoiser, "forward", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        trial.run(config_of())

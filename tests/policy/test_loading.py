"""Loading a pipeline in the way that fits the machine, and what is said where it cannot be had."""

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from torch import nn

from marble import MarbleError, Policy
from marble.memory import find_device
from marble.policy.loading import load_pipeline, model_path, place, save_memory

from ..pipelines import call_of

TEXTS = ["a cat", "two dogs on a mat"]


# ---- devices --------------------------------------------------------------------------------------------


def test_devices(monkeypatch):
    assert find_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_auto_is_this_processes_own_gpu(rank, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert find_device("auto") == torch.device(f"cuda:{rank % 4}")


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "cuda:x", "gpu", ""])
def test_devices_that_are_not_here(device):
    with pytest.raises(MarbleError) as caught:
        find_device(device)
    assert str(caught.value).startswith(f'model.device: "{device}" cannot be used here: ')
    assert "\n" not in str(caught.value)


# ---- where a model is had from --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "a/b/c", "~/models/sd3", "./nowhere", "/nowhere"])
def test_names_that_are_neither_folder_nor_hub_id(name):
    with pytest.raises(
        MarbleError, match=r"does not exist: neither a folder, a hub id \(owner/name\), nor one of .*mini"
    ):
        model_path(name)


def test_a_hub_id_is_taken_as_it_is():
    assert model_path("owner/name") == "owner/name"


class Response:
    """What huggingface_hub's errors keep of an answer."""

    status_code, headers, request, text = 401, {}, None, ""


def raising(monkeypatch, error):
    def from_pretrained(*args, **options):
        raise error

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    with pytest.raises(MarbleError) as caught:
        load_pipeline("owner/name")
    text = str(caught.value)
    assert text.startswith('model "owner/name" could not be loaded: ')
    assert "\n" not in text
    return text


def chained(outer, inner):
    outer.__cause__ = inner
    return outer


def test_a_licence_to_accept(monkeypatch):
    error = GatedRepoError("Access to model owner/name is restricted.\nCannot access it.", response=Response())
    for each in (
        error,
        chained(OSError("Can't load model"), error),
        chained(OSError("x"), chained(OSError("y"), error)),
    ):
        text = raising(monkeypatch, each)
        assert "its licence must be accepted first: open https://huggingface.co/owner/name" in text
        assert "`hf auth login`" in text
        assert "HF_TOKEN" in text


def test_no_network_in_words_alone(monkeypatch):
    text = raising(monkeypatch, OSError("We couldn't connect to 'https://huggingface.co' to load this model"))
    assert "the hub cannot be reached" in text


def test_no_such_model(monkeypatch):
    text = raising(monkeypatch, chained(OSError("x"), RepositoryNotFoundError("404", response=Response())))
    assert "there is no such model on the hub, or it is private: check the name" in text


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("Cannot find the requested files in the disk cache"),
        OfflineModeIsEnabled("Cannot reach https://huggingface.co: offline mode is enabled."),
        ConnectionError("Max retries exceeded"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_network(monkeypatch, error):
    for each in (error, chained(OSError("Cannot load model owner/name"), error)):
        text = raising(monkeypatch, each)
        assert "the hub cannot be reached, and the model is not in the cache" in text
        assert "hf download owner/name --local-dir FOLDER" in text
        assert "model.id" in text


@pytest.mark.parametrize(
    "error", [ValueError("one\ntwo"), KeyError("unet"), ImportError("needs sentencepiece"), OSError("")]
)
def test_other_reasons_in_a_line(monkeypatch, error):
    text = raising(monkeypatch, error)
    assert text.endswith((str(error).splitlines() or ["OSError"])[0])


def test_a_hub_id_without_a_network(tmp_path, monkeypatch):
    """For real: an address where nobody answers."""
    for name, value in (("HF_ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_OFFLINE", True)):
        monkeypatch.setattr(f"huggingface_hub.constants.{'ENDPOINT' if name == 'HF_ENDPOINT' else name}", value)
    with pytest.raises(MarbleError) as caught:
        Policy.from_pretrained("nobody/nothing-at-all", device="cpu")
    assert "the hub cannot be reached, and the model is not in the cache" in str(caught.value)


def test_a_broken_folder(folders, tmp_path):
    import shutil

    shutil.copytree(folders("sd3"), tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "vae")
    with pytest.raises(MarbleError, match=r'model ".*copy" could not be loaded: '):
        load_pipeline(str(tmp_path / "copy"))
    with pytest.raises(MarbleError, match="could not be loaded: "):
        load_pipeline(str(folders("sd3")), variant="fp16")


# ---- saving memory --------------------------------------------------------------------------------------


class Pipe:
    def __init__(self, **components):
        vars(self).update(components)
        self.components = components


def test_what_a_model_does_not_support_is_refused():
    with pytest.raises(MarbleError, match=r"model\.checkpointing: Linear does not support it; leave it out"):
        save_memory(Pipe(unet=nn.Linear(1, 1)), "unet", checkpointing=True)
    for field in ("vae_tiling", "vae_slicing"):
        with pytest.raises(MarbleError, match=rf"model\.{field}: Linear does not support it; leave it out"):
            save_memory(Pipe(unet=None, vae=nn.Linear(1, 1)), "unet", **{field: True})
        with pytest.raises(MarbleError, match=rf"model\.{field}: NoneType does not support it"):
            save_memory(Pipe(unet=None), "unet", **{field: True})


@pytest.mark.parametrize("field", ["vae_tiling", "vae_slicing"])
def test_a_vae_of_diffusers_that_has_the_method_and_not_the_ability(field):
    """Its mixin raises `NotImplementedError`."""
    from diffusers.models.autoencoders.vae import AutoencoderMixin

    class Plain(AutoencoderMixin, nn.Module):
        pass

    with pytest.raises(MarbleError, match=rf"model\.{field}: Plain does not support it; leave it out"):
        save_memory(Pipe(unet=None, vae=Plain()), "unet", **{field: True})


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_checkpointing_changes_no_gradient(name, load):
    gradients = []
    for checkpointing in (False, True):
        policy = load(name, checkpointing=checkpointing)
        assert policy.denoiser.is_gradient_checkpointing == checkpointing
        policy.add_adapters(rank=2, alpha=4, seed=0)
        samples = policy.sample(TEXTS, [1, 2], steps=2)
        at = samples.levels[torch.tensor([0, 1])]
        policy.predict(samples.x0, at, samples.conditioning, "default").x0.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters]))
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5 * gradients[0].abs().max().item())


@pytest.mark.parametrize("offload", ["text", "all"])
@pytest.mark.parametrize("name", ["sd15", "sd3", "sana", "wan"])
def test_offloaded_modules_are_hooked_and_pixels_stay(name, offload, load):
    expected = load(name).images(TEXTS, [1, 2], steps=2)
    policy = load(name, offload=offload)
    modules = {n: m for n, m in policy.pipe.components.items() if isinstance(m, nn.Module)}
    hooked = {n for n, m in modules.items() if hasattr(m, "_hf_hook")}
    texts = {n for n in modules if n.startswith("text_encoder")}
    assert hooked == texts | ({"vae"} if offload == "all" else set())
    assert policy.part not in hooked
    assert torch.equal(policy.images(TEXTS, [1, 2], steps=2), expected)
    policy.add_adapters(rank=2, alpha=4, seed=0)
    assert policy.sample(TEXTS, [1, 2], steps=2, adapter="old").x0.isfinite().all()


def test_offloaded_modules_leave_when_the_denoiser_begins(load):
    """On the CPU nothing moves, so count how often each is sent away."""
    policy = load("sd3")
    sent = []

    class Hook:
        def __init__(self, name):
            self.name = name

        def offload(self):
            sent.append(self.name)

    names = {id(module): name for name, module in policy.pipe.components.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerate.cpu_offload_with_hook", lambda m, device: (m, Hook(names[id(m)])))
        place(policy.pipe, policy.part, torch.device("cpu"), offload="all")
    policy.pipe("a cat", num_inference_steps=1, guidance_scale=1.0, output_type="latent", **call_of("sd3"))
    assert sorted(sent) == ["text_encoder", "text_encoder_2", "text_encoder_3", "vae"]


# ---- half precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan"])
def test_half_precision_samples_and_its_lora_stays_single(name, load):
    policy = load(name, dtype="bfloat16")
    assert {p.dtype for p in policy.denoiser.parameters()} <= {torch.bfloat16, torch.float32}  # some layers insist
    assert torch.bfloat16 in {p.dtype for p in policy.denoiser.parameters()}
    policy.add_adapters(rank=2, alpha=4, seed=0)
    assert {p.dtype for p in policy.parameters} == {torch.float32}
    samples = policy.sample(TEXTS, [1, 2], steps=2)
    assert samples.x0.dtype == samples.images.dtype == torch.float32
    assert samples.images.isfinite().all()
    at = samples.levels[torch.tensor([0, 1])]
    prediction = policy.predict(samples.x0, at, samples.conditioning, "default")
    assert prediction.x0.dtype == torch.float32
    prediction.x0.square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in policy.parameters)

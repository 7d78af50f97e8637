import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil
from transformers.image_transforms import center_crop as crop_by_transformers

from marble.rewards.clip import OPENAI_MEAN, OPENAI_STD
from marble.rewards.images import center_crop, fit_longest, normalise, resize, resize_shortest

METHODS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
SIDES = st.integers(1, 90)


def drawn(seed, *shape, low=0, high=256):
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def awkward(seed, height, width):
    """`[4, 3, H, W]`: noise, black and white, grey, and a photo's kind of picture."""
    noise = drawn(seed, 3, height, width)
    down, across = torch.meshgrid(torch.linspace(0, 9, height), torch.linspace(0, 7, width), indexing="ij")
    smooth = (127 + 127 * torch.sin(down[None] + across[None] * torch.tensor([1, 2, 3])[:, None, None])).byte()
    return torch.stack(
        [noise, (noise > 127) * torch.tensor(255, dtype=torch.uint8), noise[:1].expand(3, -1, -1), smooth]
    )


def of_pil(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def in_two_steps(images, size, method):
    """PIL across and then down, which one step does, too, but for Pillow 13 where the height shrinks most."""
    height, width = size
    steps = [to_pil(image).resize((width, image.shape[1]), METHODS[method]) for image in images]
    return torch.stack([of_pil(step.resize((width, height), METHODS[method])) for step in steps])


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from(sorted(METHODS)), st.integers(0, 9))
def test_bytes_are_those_of_pil(height, width, new_height, new_width, method, seed):
    images = awkward(seed, height, width)
    found = resize(images, (new_height, new_width), method)
    assert found.dtype == torch.uint8
    assert torch.equal(found, in_two_steps(images, (new_height, new_width), method))


@settings(max_examples=100, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from(sorted(METHODS)), st.integers(0, 9))
def test_bytes_are_those_of_one_step_of_pil(height, width, new_height, new_width, method, seed):
    assume(new_height >= height or height - new_height <= 2 * (width - new_width))  # else Pillow 13 goes down first
    images = awkward(seed, height, width)
    expected = [of_pil(to_pil(image).resize((new_width, new_height), METHODS[method])) for image in images]
    assert torch.equal(resize(images, (new_height, new_width), method), torch.stack(expected))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(224, 224), (512, 512), (299, 1024), (224, 398)])
def test_sizes_that_rewards_use(size, method):
    for shape in ((256, 256), (512, 512), (720, 1280), (300, 200)):
        images = awkward(1, *shape)[:2]
        assert torch.equal(resize(images, size, method), in_two_steps(images, size, method))


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from(sorted(METHODS)))
def test_floats_are_within_a_level_of_pil(height, width, new_height, new_width, method):
    images = drawn(3, 2, 3, height, width, low=96, high=160)  # PIL clips what a bicubic overshoots, floats keep it
    expected = in_two_steps(images, (new_height, new_width), method).float()
    for scale, dtype in ((1, torch.float32), (255, torch.float32), (255, torch.float64)):
        found = resize(images.to(dtype) / scale, (new_height, new_width), method)
        assert found.dtype == dtype
        # half a level each step, of which the second passes on the first's, by up to 1.3 where the filter is negative
        assert (found * scale - expected).abs().max() < 1.2
    assert (resize(images.half(), (new_height, new_width), method).float() - expected).abs().max() < 1.4


def test_any_batch_and_layout():
    images = drawn(0, 2, 3, 3, 37, 23)
    whole = resize(images, (20, 30), "bicubic")
    assert whole.shape == (2, 3, 3, 20, 30)
    assert whole.is_contiguous()
    assert torch.equal(whole[1, 2], resize(images[1, 2], (20, 30), "bicubic"))
    strided = images.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    assert torch.equal(resize(strided, (20, 30), "bicubic"), whole)
    assert torch.equal(resize(images, (37, 23), "bicubic"), images)
    assert resize(images[:0], (20, 30), "bilinear").shape == (0, 3, 3, 20, 30)


@pytest.mark.parametrize(
    ("shape", "expected"), [((30, 40), (7, 9)), ((40, 30), (9, 7)), ((5, 5), (7, 7)), ((3, 100), (7, 233))]
)
def test_shortest_side(shape, expected):
    assert resize_shortest(drawn(0, 3, *shape), 7, "bilinear").shape == (3, *expected)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_crop_is_that_of_transformers(height, width, new_height, new_width):
    image = drawn(0, 3, height, width, low=1)
    expected = crop_by_transformers(image.numpy(), (new_height, new_width))
    assert np.array_equal(center_crop(image, (new_height, new_width)).numpy(), expected)


@pytest.mark.parametrize(
    ("side", "down", "even"),
    [
        (7, [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
        (8, [1, 2, 3, 4, 5], [2, 3, 4, 5, 6]),  # three too many: one before or, 1.5 rounded to even, two
        (6, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        (10, [2, 3, 4, 5, 6], [2, 3, 4, 5, 6]),
        (4, [-1, 0, 1, 2, 3], [0, 1, 2, 3, -1]),  # one too few: before, or after
        (2, [-1, -1, 0, 1, -1], [-1, 0, 1, -1, -1]),
    ],
)
def test_crop_between_two_pixels(side, down, even):
    image = (torch.arange(side) + 1)[None, None].expand(3, 1, -1)
    assert (center_crop(image, (1, 5))[0, 0] - 1).tolist() == down
    assert (center_crop(image, (1, 5), halves="even")[0, 0] - 1).tolist() == even
    assert (center_crop(image.mT, (5, 1), halves="even")[0, :, 0] - 1).tolist() == even


@pytest.mark.parametrize("shape", [(40, 40), (40, 61), (61, 40), (28, 28), (28, 11), (13, 28), (9, 17), (100, 3)])
def test_fit_longest_is_pil_in_a_black_square(shape):
    images = awkward(2, *shape)
    scale = 28 / max(shape)
    height, width = round(shape[0] * scale), round(shape[1] * scale)
    expected = torch.zeros(4, 3, 28, 28, dtype=torch.uint8)
    top, left = (28 - height) // 2, (28 - width) // 2
    expected[:, :, top : top + height, left : left + width] = in_two_steps(images, (height, width), "bicubic")
    assert torch.equal(fit_longest(images, 28, "bicubic"), expected)
    assert fit_longest(drawn(0, 3, 1, 200), 28, "bicubic").shape == (3, 28, 28)


@pytest.mark.parametrize("shape", [(224, 224), (256, 256), (301, 447), (447, 301), (150, 97), (512, 513)])
@pytest.mark.parametrize("method", METHODS)
def test_end_to_end_with_the_image_processor_of_transformers(shape, method):
    images = awkward(5, *shape)
    processor = CLIPImageProcessorPil(resample=METHODS[method])
    pictures = [to_pil(image) for image in images]
    cropped = center_crop(resize_shortest(images, 224, method), (224, 224))
    plain = processor(pictures, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values
    assert torch.equal(cropped, plain.to(torch.uint8))
    found = normalise(cropped, OPENAI_MEAN, OPENAI_STD)
    assert found.dtype == torch.float32
    expected = processor(pictures, return_tensors="pt").pixel_values
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(normalise(cropped.float() / 255, OPENAI_MEAN, OPENAI_STD), found, rtol=0, atol=0)

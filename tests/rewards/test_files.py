"""Pictures on disk: whatever the format, what rewards are given is what one sees."""

import numpy as np
import pytest
import torch
from PIL import Image

from marble import MarbleError, Reward
from marble.prompts import Record
from marble.rewards.files import read_picture, score_pictures


class Size(Reward):
    name = "size"

    def score(self, images, records):
        return torch.full((len(images),), float(images.shape[-2] * 1000 + images.shape[-1]))


class Together(Reward):
    name, groupwise = "together", True

    def score(self, images, records):
        return torch.full((len(images),), float(len(images)))


@pytest.fixture
def noise(rng):
    return rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_colours_come_as_they_are(noise, tmp_path):
    for name in ("a.png", "a.bmp", "a.webp"):
        Image.fromarray(noise).save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        assert np.array_equal(read_picture(tmp_path / name).permute(1, 2, 0), noise)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "I;16"])
def test_other_modes(mode, tmp_path):
    file = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        Image.fromarray(np.full((4, 6), 128 * 256, dtype=np.uint16)).save(file)
    else:
        Image.new("L", (6, 4), 255 if mode == "1" else 128).convert(mode).save(file)
    picture = read_picture(file)
    assert picture.shape == (3, 4, 6)
    assert picture.dtype == torch.uint8
    assert picture.unique().tolist() == [255 if mode == "1" else 128]


def test_what_is_transparent_is_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").unique().tolist() == [255]
    Image.new("RGBA", (4, 4), (0, 0, 0, 51)).save(tmp_path / "b.png")
    assert read_picture(tmp_path / "b.png").unique().tolist() == [204]  # 255 · (1 − 51/255)


def test_pictures_taken_sideways_stand_upright(noise, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter, clockwise
    Image.fromarray(noise).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "a.png").permute(1, 2, 0), np.rot90(noise, -1))


def test_an_animation_is_a_video(tmp_path):
    frames = [Image.new("RGB", (6, 4), (shade, shade, shade)) for shade in (0, 100, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    video = read_picture(tmp_path / "a.gif")
    assert video.shape == (3, 3, 4, 6)
    assert [frame.unique().tolist() for frame in video] == [[0], [100], [200]]


def test_stills_of_several_pictures_are_their_first(tmp_path):
    pages = [Image.new("RGB", (6, 4), "red"), Image.new("RGB", (3, 3), "blue")]
    for name in ("a.tiff", "a.mpo"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        assert read_picture(tmp_path / name).shape == (3, 4, 6)


def test_what_is_no_image(tmp_path):
    (tmp_path / "a.png").write_text("not an image")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    for name in ("a.png", "cut.png"):
        with pytest.raises(MarbleError, match=f'{name}" is not an image that can be read: '):
            read_picture(tmp_path / name)
    with pytest.raises(MarbleError, match="is a folder, not an image"):
        read_picture(tmp_path)
    with pytest.raises(MarbleError, match="does not exist"):
        read_picture(tmp_path / "b.png")


def test_sizes_may_differ_and_groups_are_of_one_prompt_and_size():
    sizes = [(4, 6), (5, 5), (4, 6), (4, 6)]
    pictures = [torch.zeros(3, *size, dtype=torch.uint8) for size in sizes]
    records = [Record("a", "s"), Record("a", "s"), Record("a", "s"), Record("a", "s", {"text": "A"})]
    table = score_pictures([Size(), Together()], pictures, records)
    assert table.scores.tolist() == [[4006, 2], [5005, 1], [4006, 2], [4006, 1]]
    assert table.wanted.all()

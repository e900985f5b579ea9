"""Pictures: what a viewer shows of a file is what training sees, whatever the file stores."""

from io import BytesIO

import numpy as np
import pytest
from PIL import ExifTags, Image

from common.core import pictures
from common.core.pictures import FRAMES, SIXTEEN_BITS, TRANSPARENT, TURNED, indexed, read_picture
from common.settings import DataError


def _saved(folder, image, kind, **options):
    file = folder / f"image.{kind}"
    image.save(file, **options)
    return file


@pytest.mark.parametrize("kind", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_keeps_its_upper_bits(tmp_path, kind):
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    picture = read_picture(_saved(tmp_path, Image.fromarray(levels), kind))
    assert np.array_equal(np.asarray(picture.image), np.repeat((levels // 256)[..., None], 3, 2))
    assert picture.remarks == (SIXTEEN_BITS,)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_unknown_range_are_refused(tmp_path, mode):
    with pytest.raises(DataError, match="image.tif: not a readable image: its pixels have 32 bits"):
        read_picture(_saved(tmp_path, Image.new(mode, (4, 4)), "tif"))


def test_what_is_transparent_is_white_whatever_lies_below(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 4), np.uint8)
    pixels[..., 3] = np.array([0, 0, 255, 128])
    picture = read_picture(_saved(tmp_path, Image.fromarray(pixels), "png"))
    found = np.asarray(picture.image)
    assert (found[:, :2] == 255).all() and np.array_equal(found[:, 2], pixels[:, 2, :3])
    half = pixels[:, 3, :3] * (128 / 255) + 255 * (1 - 128 / 255)
    assert np.abs(found[:, 3] - half).max() <= 1 and picture.remarks == (TRANSPARENT,)


def test_a_transparent_colour_of_a_palette_or_of_grey_is_white(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 200, 10, 20])
    palette.putpixel((0, 0), 1)
    found = read_picture(_saved(tmp_path, palette, "png", transparency=0)).image
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [(200, 10, 20), (255, 255, 255)]
    grey = Image.fromarray(np.array([[7000, 256]], np.uint16))
    found = read_picture(_saved(tmp_path, grey, "png", transparency=7000)).image
    assert [found.getpixel((x, 0))[0] for x in (0, 1)] == [255, 1]


@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp"])
def test_every_orientation_is_put_upright(tmp_path, kind):
    """A picture whose corner is marked, stored in each of the eight ways: it always looks the same."""
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.swapaxes(0, 1), 6: np.rot90(upright), 7: np.rot90(upright, 2).swapaxes(0, 1), 8: np.rot90(upright, 3),
    }  # fmt: skip
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        file = _saved(tmp_path, Image.fromarray(np.ascontiguousarray(pixels)), kind, exif=exif)
        picture = read_picture(file)
        assert np.abs(np.asarray(picture.image).astype(int) - upright).mean() < 8, orientation
        assert picture.remarks == ((TURNED,) if orientation > 1 else ())
        assert indexed(file)[1] == picture.remarks


@pytest.mark.parametrize("kind", ["gif", "tif", "webp"])
def test_more_frames_than_one_are_told(tmp_path, kind):
    frames = [Image.new("RGB", (4, 4), (60 * i, 0, 0)) for i in range(3)]
    picture = read_picture(_saved(tmp_path, frames[0], kind, save_all=True, append_images=frames[1:]))
    assert picture.remarks == (FRAMES,) and picture.image.getpixel((0, 0))[0] < 10


def test_a_picture_that_is_too_large_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    file = _saved(tmp_path, Image.new("L", (40, 30)), "png")
    monkeypatch.setattr(pictures, "MOST_PIXELS", 1199)
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(DataError, match="40 x 30 pixels, and 1,199 at most"):
        read_picture(file)
    monkeypatch.setattr(pictures, "MOST_BYTES", 50)
    with pytest.raises(DataError, match="bytes, and 50 at most can be"):
        read_picture(file)


def test_a_format_that_runs_programs_is_no_image(tmp_path):
    content = BytesIO()
    Image.new("RGB", (8, 8)).save(content, "EPS")
    (tmp_path / "a.png").write_bytes(content.getvalue())
    with pytest.raises(DataError, match="a.png: not a readable image: damaged, or no image"):
        read_picture(tmp_path / "a.png")


def test_damaged_metadata_of_a_sound_picture_is_passed_over(tmp_path):
    file = _saved(
        tmp_path, Image.new("RGB", (8, 8), (9, 8, 7)), "png", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff"
    )
    assert read_picture(file).image.getpixel((0, 0)) == (9, 8, 7)

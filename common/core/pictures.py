"""Image files as arrays of pixels: each picture as a viewer shows it."""

from __future__ import annotations

import hashlib
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from common.core.files import content_of, reading
from common.settings import DataError

# a format is told by the content, and some others run programs
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
ENDINGS = (
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
"""How the names of image files end."""
MOST_PIXELS, MOST_BYTES = 2**26, 2**28
WHITE = 255

SIXTEEN_BITS = "have 16 bits a channel, of which the upper 8 are taken"
TRANSPARENT = "have an alpha channel, and are laid on white"
TURNED = "are stored turned, and are put upright by their EXIF orientation"
FRAMES = "hold more than one frame, of which the first is taken"

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What puts a picture upright, by its EXIF orientation."""

# of metadata that is damaged, and of sizes, which are bounded here
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class Picture:
    """An RGB image, and in which respects its file is none with 8 bits a channel and one opaque upright frame."""

    image: Image.Image
    remarks: tuple[str, ...]


def read_image(path: Path, sha256: bytes | None = None) -> Image.Image:
    """The picture in a file; see `read_picture`."""
    return read_picture(path, sha256).image


def read_picture(path: Path, sha256: bytes | None = None) -> Picture:
    """The picture in a file, as of `shown`. sha256: of the file's bytes, compared where given.

    Raises DataError naming a file that is missing, changed, damaged, too large or no image.
    """
    with _image(path):
        content = content_of(path, MOST_BYTES)
        if sha256 is not None and hashlib.sha256(content).digest() != sha256:
            raise DataError(f"{path}: damaged or changed since the data was prepared")
        image = _opened(content)
        remarks = _remarks(image)
        return Picture(shown(image), remarks)


def indexed(path: Path) -> tuple[bytes, tuple[str, ...]]:
    """SHA-256 of an image file's bytes, and remarks as of Picture, by its header alone. Raises DataError."""
    with _image(path):
        content = content_of(path, MOST_BYTES)
        return hashlib.sha256(content).digest(), _remarks(_opened(content))


def sides(path: Path) -> tuple[int, int]:
    """Width and height of what an image file stores, by its header alone. Raises DataError."""
    with _image(path):
        return _opened(content_of(path, MOST_BYTES)).size


def shown(image: Image.Image) -> Image.Image:
    """A picture in RGB as a viewer shows it.

    It is upright by its EXIF orientation, lies on white where it is transparent, and of 16-bit grey levels the upper 8
    bits are taken. Raises ValueError for pixels of 32 bits, whose range is unknown.
    """
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):
        image = _of_sixteen_bits(image)
    elif image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits; 8 or 16 are needed")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (WHITE, WHITE, WHITE))
        white.paste(image, mask=image.getchannel("A"))
        image = white
    elif image.mode != "RGB":
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _image(path: Path) -> AbstractContextManager[None]:
    return reading(path, "not a readable image")


def _opened(content: bytes) -> Image.Image:
    """The picture, of which the header is read. Raises ValueError for one that is too large."""
    try:
        image = Image.open(BytesIO(content), formats=FORMATS)
        if image.format == "PNG":  # whose checksums a decoder passes over
            Image.open(BytesIO(content), formats=("PNG",)).verify()
    except UnidentifiedImageError:
        raise ValueError("damaged, or no image") from None
    if image.width * image.height > MOST_PIXELS:
        size = f"{image.width} x {image.height} pixels"
        raise ValueError(f"{size}, and {MOST_PIXELS:,} at most can be: make it smaller")
    return image


def _remarks(image: Image.Image) -> tuple[str, ...]:
    found = {
        # what the decoder is to unpack
        SIXTEEN_BITS: any(";16" in str(tile) for tile in getattr(image, "tile", ())) or image.mode == "I",
        TRANSPARENT: image.has_transparency_data,
        TURNED: _orientation(image) in _UPRIGHT,
        FRAMES: getattr(image, "n_frames", 1) > 1,
    }
    return tuple(remark for remark, holds in found.items() if holds)


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata says nothing; whether the pixels are sound is another matter
        return 1
    return found if isinstance(found, int) else 1


def _of_sixteen_bits(image: Image.Image) -> Image.Image:
    levels = np.asarray(image)
    few = image.format == "TIFF" and image.tag_v2.get(258) == (12,)  # type: ignore[attr-defined]  # bits of a sample
    grey = (levels >> (4 if few else 8)).astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):
        grey[levels == clear] = WHITE
    return Image.fromarray(grey)

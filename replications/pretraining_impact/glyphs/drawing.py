"""The corpus of the embedded profile: glyphs drawn from the fonts that matplotlib ships, at 8x8.

`python -m replications.pretraining_impact.glyphs --out FILE.npz` writes it. Each character of each font is
drawn once; samples are random affine views of these drawings. The file has uint8 images of 0..16 in the
layout of the data source `npz` (x_train, y_train, x_test, y_test), the characters as `classes`, `scale` 16,
and `digest`, the SHA-256 of images and labels.

The same seed and the same fonts give the same bytes on every processor: outlines are read as the integers that
the font files hold, and all that follows (curves, filling, maps, sampling, means, rounding) is integer
arithmetic, in which neither the order of a sum nor a vector unit changes a bit. No rasteriser has a part in it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import logging
import string
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from fontTools.pens.basePen import BasePen
from fontTools.ttLib import TTFont

from common.core.identity import stream
from common.settings import SettingsError
from common.stage.files import write_atomically

FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmb10", "cmmi10", "cmr10", "cmss10", "cmti10", "cmtt10"),
)
"""Text fonts only: cmsy10, cmex10 and the STIX size fonts map letters to symbols, LastResort to boxes."""

_PRINTABLE = "".join(map(chr, range(33, 127)))
CLASSES = {
    "printable-but-digits": "".join(c for c in _PRINTABLE if c not in string.digits),
    "printable": _PRINTABLE,
    "letters": string.ascii_lowercase + string.ascii_uppercase,
    "letters+digits": string.ascii_lowercase + string.ascii_uppercase + string.digits,
    "digits": string.digits,
}
"""The first is the default: all characters but those that are the target's classes."""
CANVAS, LONGER_SIDE, SIZE, LEVELS = 96, 72, 8, 16
GRID = 2 * CANVAS
"""A drawing's side in cells, which are half pixels."""
CELL, FULL = 2, 4
"""A cell is a square of 2x2 points, each inside the outline or not: ink of 0..4."""
CURVE = 8
"""Straight pieces that stand for a curve of an outline."""
ONE = 1 << 16
"""The number 1 in fixed point: positions, maps and gains are in 65536ths."""
DEFAULTS = {"count": 32000, "test": 1000, "classes": next(iter(CLASSES)), "seed": 0}
DIGEST = "488734fdea0c750e161ad7906323513f52011970364c91611ced1d51e0ab1fe3"
"""Of the samples that these options must give, on any machine."""


def font_files(names: Sequence[str], folder: Path | None = None) -> list[Path]:
    """The font files called `names` in `folder` (default: matplotlib's own).

    Raises SettingsError naming a missing font and those found.
    """
    folder = folder or Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = {path.stem: path for path in sorted(folder.glob("*.ttf"))}
    for name in names:
        if name not in found:
            raise SettingsError(f"font {name!r} is missing in {folder}; found: {', '.join(found) or 'none'}")
    return [found[name] for name in names]


class _Outline(BasePen):
    """Collects the closed polygons of a glyph, in whole numbers of 1/128 of the font's unit."""

    UNITS = 2 * CURVE**2

    def __init__(self, glyphs: Mapping[str, Any]):
        super().__init__(glyphs)
        self.polygons: list[list[tuple[int, int]]] = []

    def _moveTo(self, point):
        self.polygons.append([])
        self._lineTo(point)

    def _lineTo(self, point):
        # points between two of the file lie at half units
        x, y = (int(self.UNITS * value) for value in point)
        self.polygons[-1].append((x, y))

    def _qCurveToOne(self, control, end):
        (x0, y0), (x1, y1), (x2, y2) = (
            [int(2 * value) for value in point] for point in (self._getCurrentPoint(), control, end)
        )
        for k in range(1, CURVE + 1):
            a, b, c = (CURVE - k) ** 2, 2 * k * (CURVE - k), k**2
            self.polygons[-1].append((a * x0 + b * x1 + c * x2, a * y0 + b * y1 + c * y2))


def outline(font: TTFont, character: str) -> np.ndarray:
    """The edges of one character as int64 [E, 2, 2]: start and end, each (x to the right, y downwards).

    In 65536ths of a point of a drawing's grid, from its corner; the longer side is 72 pixels, centred.
    """
    glyphs = font.getGlyphSet()
    pen = _Outline(glyphs)
    glyphs[font.getBestCmap()[ord(character)]].draw(pen)
    edges = [(a, b) for polygon in pen.polygons for a, b in zip(polygon, polygon[1:] + polygon[:1])]
    points = np.array(edges, dtype=np.int64) * (1, -1)
    low, high = points.min((0, 1)), points.max((0, 1))
    length = int((high - low).max())
    points_a_pixel = CELL * GRID // CANVAS
    # twice the distance from the centre, so that the middle of the box is a whole number
    return (2 * points - low - high) * (LONGER_SIDE * points_a_pixel * ONE // 2) // length + (
        CELL * GRID * ONE // 2
    )


def drawing(font: TTFont, character: str) -> np.ndarray:
    """The ink of one character as uint8 [192, 192] of 0..4, its longer side 144 cells (72 pixels), centred."""
    side = CELL * GRID
    (x0, y0), (x1, y1) = outline(font, character).transpose(1, 2, 0)[:, :, :, None]
    rows = np.arange(side) * ONE + ONE // 2
    down, up = (y0 <= rows) & (rows < y1), (y1 <= rows) & (rows < y0)
    edge, row = np.nonzero(down | up)
    x0, y0, x1, y1 = (values[edge, 0] for values in (x0, y0, x1, y1))
    crossing = x0 + (rows[row] - y0) * (x1 - x0) // (y1 - y0)
    turns = np.zeros((side, side), dtype=np.int8)
    # the first point whose middle lies at or right of the crossing
    np.add.at(turns, (row, (crossing + ONE // 2 - 1) // ONE), np.where(down[edge, row], 1, -1))
    inside = (turns.cumsum(1, dtype=np.int8) != 0).view(np.uint8)
    return sum(inside[i::CELL, j::CELL] for i in range(CELL) for j in range(CELL))


def drawings(characters: str, fonts: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """All drawings uint8 [D, 192, 192] and the class of each, int64 [D] (index into `characters`).

    A font that lacks a character, or holds another symbol in its place (TeX fonts, outside letters and
    digits), is left out for it. Raises SettingsError for a character that no font has.
    """
    images, classes = [], []
    for file in fonts:
        with TTFont(file) as font:
            known = font.getBestCmap()
            for index, character in enumerate(characters):
                if ord(character) in known and (character.isalnum() or not file.stem.startswith("cm")):
                    images.append(drawing(font, character))
                    classes.append(index)
    for index, character in enumerate(characters):
        if index not in classes:
            raise SettingsError(
                f"no font has the character {character!r}; fonts: {', '.join(f.stem for f in fonts)}"
            )
    return np.stack(images), np.array(classes)


class _Draws:
    """Random whole numbers from the bits of PCG64, whose stream is part of numpy's contract."""

    def __init__(self, seed: int):
        self.bits = np.random.PCG64(seed)

    def order(self, count: int) -> np.ndarray:
        """A permutation of `count` things."""
        return self.bits.random_raw(count).argsort(kind="stable")

    def below(self, bounds: np.ndarray) -> np.ndarray:
        """For each bound (below 2**31) one of 0 .. bound - 1, int64."""
        return (self.bits.random_raw(len(bounds)) >> np.uint64(33)).astype(np.int64) * bounds >> 31

    def between(self, low: int, high: int, count: int) -> np.ndarray:
        """`count` numbers of low .. high, int64."""
        return low + self.below(np.full(count, high - low + 1))


def sines(angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sine and cosine, in 65536ths, of angles in 2**-30 radian, at most 0.27: power series, off by 2e-5."""
    one = 1 << 30
    square = angles * angles >> 30
    sine = angles * (one - (square // 6 * (one - square // 20) >> 30)) >> 30
    cosine = one - (square // 2 * (one - (square // 12 * (one - square // 30) >> 30)) >> 30)
    return sine >> 14, cosine >> 14


def distortions(count: int, draws: _Draws) -> np.ndarray:
    """Random affine maps int64 [count, 2, 3] from a place in the view to one in the drawing, in 65536ths.

    Places are (x to the right, y downwards) in cells from the centre. The view is the drawing scaled by
    U(.85, 1.2) in x and in y, sheared by U(-.25, .25), rotated by U(-15, 15) degrees and shifted by U(-6, 6)
    pixels, about the centre.
    """
    widest = 281104952  # 15 degrees, pi / 12, in 2**-30 radian
    sine, cosine = sines(draws.between(-widest, widest, count))
    wide, high = (draws.between(85 * ONE // 100, 120 * ONE // 100, count) for _ in "xy")
    shear = draws.between(-ONE // 4, ONE // 4, count)
    most = 6 * ONE * GRID // CANVAS
    shift = [draws.between(-most, most, count) for _ in "xy"]
    # the inverse of rotation @ shear @ scale
    across = [(cosine * ONE + shear * sine) // wide, (sine * ONE - shear * cosine) // wide]
    along = [-sine * ONE // high, cosine * ONE // high]
    rows = [[a, b, -(a * shift[0] + b * shift[1]) // ONE] for a, b in (across, along)]
    return np.array(rows).transpose(2, 0, 1)


def views(originals: np.ndarray, source: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """The drawings [D, 192, 192] numbered `source` [N] under `maps` [N, 2, 3], as uint8 [N, 96, 96] of 0..4.

    A pixel is the cell that its middle falls into; the rim of a drawing has no ink.
    """
    # 32 bits hold them all: places are less than 200 cells away
    middles = ((2 * np.arange(CANVAS) + 1 - CANVAS) * GRID // (2 * CANVAS)).astype(np.int32)
    (xx, xy, x0), (yx, yy, y0) = maps.astype(np.int32).transpose(1, 2, 0)[:, :, :, None, None]
    x, y = middles[None, None, :], middles[None, :, None]
    column, row = (
        (((a * x + c) + b * y >> 16) + GRID // 2).clip(0, GRID - 1)
        for a, b, c in ((xx, xy, x0), (yx, yy, y0))
    )
    place = row * GRID + column
    place += source.astype(np.int32)[:, None, None] * GRID**2
    return originals.reshape(-1).take(place)


def reduce(ink: np.ndarray, full: int, gain: np.ndarray | int, one: int = ONE) -> np.ndarray:
    """Whole numbers [..., H, W] of 0..full as [..., 8, 8] of 0..16: block means times gain / one, clipped.

    Halves go to the even sixteenth. H and W must be multiples of 8 (ValueError).
    """
    height, width = ink.shape[-2:]
    if height % SIZE or width % SIZE:
        raise ValueError(f"{height}x{width} images do not divide into {SIZE}x{SIZE} equal blocks")
    shape = (*ink.shape[:-2], SIZE, height // SIZE, SIZE, width // SIZE)
    # sums of unsigned bytes are as wide as the machine's words
    sums = ink.reshape(shape).sum((-3, -1))
    numerator = LEVELS * gain * sums.astype(object if ink.dtype == object else np.int64)
    denominator = full * one * (height // SIZE) * (width // SIZE)
    whole, rest = numerator // denominator, 2 * (numerator % denominator)
    up = (rest > denominator) | ((rest == denominator) & (whole % 2 == 1))
    return np.minimum(whole + up, LEVELS)


def render(
    count: int, characters: str, seed: int, fonts: Sequence[Path], batch: int = 25
) -> tuple[np.ndarray, np.ndarray]:
    """Samples: images uint8 [count, 8, 8] of 0..16 and labels int64 [count], each class equally often.

    `batch` bounds the memory, and changes nothing else but the time: what few need stays in a core's cache.
    """
    originals, classes = drawings(characters, fonts)
    draws = _Draws(stream(seed, "glyphs"))
    labels = draws.order(count) % len(characters)
    # the drawings of a class lie scattered over the fonts: take one of them uniformly
    by_class = [np.flatnonzero(classes == index) for index in range(len(characters))]
    chosen = draws.below(np.array([len(by_class[label]) for label in labels]))
    source = np.array([by_class[label][place] for label, place in zip(labels, chosen)])
    maps = distortions(count, draws)
    gain = draws.between(ONE, 22 * ONE // 10, count)[:, None, None]
    images = np.empty((count, SIZE, SIZE), dtype=np.uint8)
    for start in range(0, count, batch):
        part = slice(start, start + batch)
        images[part] = reduce(views(originals, source[part], maps[part]), FULL, gain[part])
    return images, labels


def digest_of(images: np.ndarray, labels: np.ndarray) -> str:
    """SHA-256 of the samples, whatever the machine's byte order and the width of its integers."""
    return hashlib.sha256(images.tobytes() + labels.astype("<i8").tobytes()).hexdigest()


def write(out: Path, images: np.ndarray, labels: np.ndarray, characters: str, test: int) -> None:
    """Write the corpus, its last `test` samples as the test part. Raises OSError."""
    cut, labels = len(labels) - test, labels.astype("<i8")
    content = packed(
        x_train=images[:cut],
        y_train=labels[:cut],
        x_test=images[cut:],
        y_test=labels[cut:],
        classes=np.array(list(characters)),
        scale=np.array(LEVELS),
        digest=np.array(digest_of(images, labels)),
    )
    write_atomically(out, content)


def packed(**arrays: np.ndarray) -> bytes:
    """The content of an `.npz` file, the same from every version of Python, as that of `np.savez` is not: runs on the corpus are
    known by it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, allow_pickle=False)
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue())
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (2 for bad input, 1 for other fonts than the corpus's)."""
    parser = argparse.ArgumentParser(description="Render the glyph corpus.")
    parser.add_argument("--out", type=Path, required=True, help="the .npz file to write")
    parser.add_argument("--count", type=int, help="number of images (default %(default)s)")
    parser.add_argument("--test", type=int, help="how many of them make the test part (default %(default)s)")
    parser.add_argument("--classes", choices=CLASSES)
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--other-fonts", action="store_true", help="write the default corpus whatever its digest is"
    )
    parser.set_defaults(**DEFAULTS)
    options = parser.parse_args(arguments)
    characters = CLASSES[options.classes]
    if not len(characters) <= options.test <= options.count - len(characters):
        parser.error(
            f"--count {options.count} --test {options.test}: each part needs one image for each class"
        )
    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it warns of the TeX fonts' dates
    try:
        images, labels = render(options.count, characters, options.seed, font_files(FONTS))
        digest = digest_of(images, labels)
        published = all(getattr(options, name) == value for name, value in DEFAULTS.items())
        if published and digest != DIGEST and not options.other_fonts:
            print(
                f"glyphs: nothing written: the samples have digest {digest} in place of {DIGEST}: matplotlib "
                f"{matplotlib.__version__} ships other fonts than that of requirements.lock, so results would "
                "not compare with others' (--other-fonts writes the file all the same)",
                file=sys.stderr,
            )
            return 1
        write(options.out, images, labels, characters, options.test)
    except (SettingsError, OSError) as error:
        print(f"glyphs: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {options.count} images of {len(characters)} classes, {digest}")
    return 0

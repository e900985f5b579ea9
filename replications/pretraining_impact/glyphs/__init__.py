"""The corpus of the embedded profile: glyphs drawn from the fonts that matplotlib ships, at 8x8.

`python -m replications.pretraining_impact.glyphs --out FILE.npz` writes it. Each character of each font is
drawn once; samples are random affine views of these drawings. The file has uint8 images of 0..16 in the
layout of the data source `npz` (x_train, y_train, x_test, y_test), the characters as `classes`, `scale` 16,
and `digest`, the SHA-256 of images and labels. The same seed and the same version of matplotlib give the same
file; FreeType versions draw differently.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import string
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from common.core.identity import stream
from common.settings import SettingsError
from common.stage.store import write_atomically

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


def drawing(font: FT2Font, character: str) -> Tensor:
    """The ink of one character as [96, 96] float32 in [0, 1], its longer side 72 pixels, centred."""
    font.clear()
    font.set_text(character)
    font.draw_glyphs_to_bitmap(antialiased=True)
    ink = np.asarray(font.get_image(), dtype=np.float32) / 255
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = LONGER_SIDE / max(ink.shape)
    shape = [max(1, round(side * scale)) for side in ink.shape]
    view = torch.from_numpy(np.ascontiguousarray(ink))[None, None]
    view = interpolate(view, shape, mode="bilinear", antialias=True, align_corners=False)[0, 0]
    canvas = torch.zeros(CANVAS, CANVAS)
    top, left = ((CANVAS - side) // 2 for side in shape)
    canvas[top : top + shape[0], left : left + shape[1]] = view
    return canvas


def drawings(characters: str, fonts: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """All drawings [D, 96, 96] and the class of each [D] (index into `characters`).

    A font that lacks a character, or holds another symbol in its place (TeX fonts, outside letters and
    digits), is left out for it. Raises SettingsError for a character that no font has.
    """
    images, classes = [], []
    for file in fonts:
        font = FT2Font(str(file))
        font.set_size(CANVAS, 72)
        for index, character in enumerate(characters):
            if font.get_char_index(ord(character)) and (
                character.isalnum() or not file.stem.startswith("cm")
            ):
                images.append(drawing(font, character))
                classes.append(index)
    for index, character in enumerate(characters):
        if index not in classes:
            raise SettingsError(
                f"no font has the character {character!r}; fonts: {', '.join(f.stem for f in fonts)}"
            )
    return torch.stack(images), torch.tensor(classes)


def distortions(count: int, generator: torch.Generator) -> Tensor:
    """Random affine maps [count, 2, 3] from output to input, in the coordinates of torch's `affine_grid`.

    The view is the drawing scaled by U(.85, 1.2) in x and in y, sheared by U(-.25, .25), rotated by U(-15,
    15) degrees and shifted by U(-6, 6) pixels, about the centre.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    angle, scale, shear = uniform(-15, 15).deg2rad(), uniform(0.85, 1.2, 2), uniform(-0.25, 0.25)
    shift = uniform(-6, 6, 2) * 2 / CANVAS
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    shearing = torch.eye(2).repeat(count, 1, 1)
    shearing[:, 0, 1] = shear
    inverse = torch.linalg.inv(rotation @ shearing @ torch.diag_embed(scale))
    return torch.cat([inverse, -inverse @ shift[:, :, None]], 2)


def reduce(images: Tensor, gain: Tensor | float) -> Tensor:
    """Images [..., H, W] in [0, 1] as [..., 8, 8]: block means times `gain`, clipped, in sixteenths.

    Halves go to the even sixteenth. H and W must be multiples of 8 (ValueError).
    """
    height, width = images.shape[-2:]
    if height % SIZE or width % SIZE:
        raise ValueError(f"{height}x{width} images do not divide into {SIZE}x{SIZE} equal blocks")
    blocks = images.unflatten(-2, (SIZE, height // SIZE)).unflatten(-1, (SIZE, width // SIZE))
    return (blocks.mean((-3, -1)) * gain).clamp(0, 1).mul(LEVELS).round() / LEVELS


def render(
    count: int, characters: str, seed: int, fonts: Sequence[Path], batch: int = 250
) -> tuple[Tensor, Tensor]:
    """Samples: images uint8 [count, 8, 8] of 0..16 and labels int64 [count], each class equally often.

    `batch` bounds the memory and changes nothing else.
    """
    originals, classes = drawings(characters, fonts)
    generator = torch.Generator().manual_seed(stream(seed, "glyphs"))
    labels = torch.arange(count)[torch.randperm(count, generator=generator)] % len(characters)
    # the drawings of a class lie scattered over the fonts: take one of them uniformly
    by_class = [torch.nonzero(classes == index)[:, 0] for index in range(len(characters))]
    chosen = torch.rand(count, generator=generator).tolist()
    source = torch.stack([by_class[k][int(u * len(by_class[k]))] for k, u in zip(labels.tolist(), chosen)])
    maps = distortions(count, generator)
    gain = 1 + 1.2 * torch.rand(count, 1, 1, generator=generator)
    images = torch.empty(count, SIZE, SIZE, dtype=torch.uint8)
    for part in torch.arange(count).split(batch):
        grid = affine_grid(maps[part], [len(part), 1, CANVAS, CANVAS], align_corners=False)
        views = grid_sample(originals[source[part], None], grid, align_corners=False)[:, 0]
        images[part] = (reduce(views, gain[part]) * LEVELS).to(torch.uint8)
    return images, labels


def write(out: Path, images: np.ndarray, labels: np.ndarray, characters: str, test: int) -> str:
    """Write the corpus, its last `test` samples as the test part; returns the digest. Raises OSError."""
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    cut = len(labels) - test
    buffer = io.BytesIO()
    np.savez(
        buffer,
        x_train=images[:cut],
        y_train=labels[:cut],
        x_test=images[cut:],
        y_test=labels[cut:],
        classes=np.array(list(characters)),
        scale=np.array(LEVELS),
        digest=np.array(digest),
    )
    write_atomically(out, buffer.getvalue())
    return digest


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (2 for bad input)."""
    parser = argparse.ArgumentParser(description="Render the glyph corpus.")
    parser.add_argument("--out", type=Path, required=True, help="the .npz file to write")
    parser.add_argument("--count", type=int, default=32000, help="number of images (default 32000)")
    parser.add_argument(
        "--test", type=int, default=1000, help="how many of them make the test part (default 1000)"
    )
    parser.add_argument("--classes", choices=CLASSES, default=next(iter(CLASSES)))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    characters = CLASSES[options.classes]
    if not len(characters) <= options.test <= options.count - len(characters):
        parser.error(
            f"--count {options.count} --test {options.test}: each part needs one image for each class"
        )
    torch.set_num_threads(1)
    try:
        images, labels = render(options.count, characters, options.seed, font_files(FONTS))
        digest = write(options.out, images.numpy(), labels.numpy(), characters, options.test)
    except (SettingsError, OSError) as error:
        print(f"glyphs: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {options.count} images of {len(characters)} classes, {digest}")
    return 0

"""Files that are damaged, or made to do damage: one line that names the file, and nothing allocated that it does not hold."""

import os
import random
import re
import resource
import signal
import struct
import zipfile
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.core import loading
from common.core.loading import load
from common.core.models import tensor_files
from common.core.models.checkpoints import read_checkpoint
from common.core.pictures import read_picture
from common.settings import ROOT, DataError, DatasetSettings, SettingsError
from common.stage import papers

pytestmark = pytest.mark.filterwarnings(r"ignore::Warning:PIL\.")
LONGEST, LONGEST_OF_SETTINGS = 400, 2000
SECONDS, MEMORY = 2, 2**30


def _arrays(**changes):
    x = np.random.default_rng(0).integers(0, 256, (12, 4, 4), np.uint8)
    arrays = {"x_train": x, "y_train": np.arange(12) % 3, "x_test": x[:6] ^ 1, "y_test": np.arange(6) % 3}
    return {key: value for key, value in (arrays | changes).items() if value is not None}


def _packed(save=np.savez, **changes):
    content = BytesIO()
    save(content, **_arrays(**changes))
    return content.getvalue()


def _of_members(kind=zipfile.ZIP_DEFLATED, **changes):
    """An archive whose members are arrays, or are the bytes that are given in their place."""
    content = BytesIO()
    with zipfile.ZipFile(content, "w", kind) as archive:
        for name, value in (_arrays() | changes).items():
            if not isinstance(value, bytes):
                plain = BytesIO()
                np.save(plain, value)
                value = plain.getvalue()
            archive.writestr(f"{name}.npy", value)
    return content.getvalue()


def _header(shape, dtype="|u1"):
    """The head of an array of that shape, without its content."""
    head = BytesIO()
    np.lib.format.write_array_header_1_0(head, {"shape": shape, "fortran_order": False, "descr": dtype})
    return head.getvalue()


def _flagged(content, flag=1, method=None):
    """The archive with a flag, or another compression, in the heads of all its members."""
    found = bytearray(content)
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = found.find(mark)
        while place >= 0:
            found[place + offset] |= flag
            if method is not None:
                struct.pack_into("<H", found, place + offset + 2, method)
            place = found.find(mark, place + 4)
    return bytes(found)


def _changed(content, place, by=0x55):
    return content[:place] + bytes([content[place] ^ by]) + content[place + 1 :]


NPZ = {
    "empty": b"",
    "text": b"x_train, y_train\n" * 50,
    "an array alone": _header((3,)) + b"123",
    "cut off": _packed()[:700],
    "without its directory": _packed()[:-60],
    "a changed pixel": _changed(_packed(), 150),
    "a changed byte of what is compressed": _changed(_packed(np.savez_compressed), 150),
    "encrypted": _flagged(_packed()),
    "an unknown compression": _flagged(_packed(), 0, 97),
    "a member that is no array": _of_members(x_train=b"not an array"),
    "a pickle": _packed(x_train=np.array([{}] * 12, object)),
    "a claim of 4 EiB": _of_members(x_train=_header((2**62,))),
    "a claim of 20 GB": _of_members(x_train=_header((12, 40000, 40000))),
    "more than was claimed": _of_members(x_train=_header((1, 4, 4)) + bytes(500)),
    "a negative side": _of_members(x_train=_header((12, -4, -4)) + bytes(192)),
    "a head without end": _of_members(x_train=b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + bytes(2**20)),
    "a head of brackets": _of_members(x_train=b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000),
    "hundreds of megabytes of nothing": _of_members(x_train=_header((2**28,)) + bytes(2**28)),
    "text that is none": _of_members(classes=_header((3,), "<U1") + b"\xff" * 12),
    "structures": _packed(x_train=np.zeros(12, [("a", "u1")])),
    "no images": _packed(x_train=np.zeros((0, 4, 4), np.uint8), y_train=np.zeros(0, int)),
    "images without pixels": _packed(x_train=np.zeros((12, 0, 0), np.uint8), x_test=np.zeros((6, 0, 0), np.uint8)),
    "a number in place of images": _packed(x_train=np.uint8(3)),
    "labels in two columns": _packed(y_train=np.zeros((12, 2), int)),
    "a label of a thousand million": _packed(y_train=np.array([10**9] * 12)),
    "a label of twenty digits": _packed(y_train=np.array([2**64 - 1] * 12, np.uint64)),
    "a negative label": _packed(y_train=np.arange(12) - 1),
    "a gap in the labels": _packed(y_train=np.array([0, 2] * 6)),
    "one class": _packed(y_train=np.zeros(12, int), y_test=np.zeros(6, int)),
    "classes that are a number": _packed(classes=np.array(3)),
    "classes that are numbers with dots": _packed(classes=np.array([0.5, 1.5, 2.5])),
    "a class twice": _packed(classes=np.array(["cat", "cat", "dog"])),
    "a scale that is text": _packed(scale=np.array("255")),
    "a scale that is a list": _packed(scale=np.array([255.0, 255.0])),
    **{f"scale {scale}": _packed(scale=np.array(scale)) for scale in (0.0, -1.0, np.nan, np.inf)},
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loading.fingerprint.cache_clear()


def _settings():
    return DatasetSettings(source="npz", path="own.npz", validation=3)


def _refused(read, name):
    with pytest.raises(DataError) as error:
        read()
    assert str(error.value).startswith(f"{name}: ") and "\n" not in str(error.value)
    assert len(str(error.value)) < LONGEST
    return str(error.value)


def test_the_files_that_are_damaged_here_were_sound():
    for save in (np.savez, np.savez_compressed):
        Path("own.npz").write_bytes(_packed(save, scale=np.array(255), classes=np.array([b"a", b"b", b"c"])))
        assert load(_settings()).classes == 3
    Path("own.npz").write_bytes(_of_members(more=b"what nobody reads"))
    assert load(_settings()).image_shape == (1, 4, 4)


@pytest.mark.parametrize("kind", NPZ)
def test_a_damaged_array_file_is_one_line(kind):
    Path("own.npz").write_bytes(NPZ[kind])
    _refused(lambda: load(_settings()), "own.npz")


def test_an_array_that_is_there_twice_is_refused():
    content = BytesIO(_packed())
    with zipfile.ZipFile(content, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("x_train.npy", _header((1,)) + b"1")
    Path("own.npz").write_bytes(content.getvalue())
    assert "x_train is there twice" in _refused(lambda: load(_settings()), "own.npz")


@pytest.mark.parametrize("make", ["fifo", "device", "folder"])
def test_what_is_no_file_is_not_waited_for(make):
    make_it = {
        "fifo": lambda: os.mkfifo("own.npz"),
        "device": lambda: os.symlink("/dev/zero", "own.npz"),
        "folder": lambda: os.mkdir("own.npz"),
    }
    make_it[make]()
    assert "no ordinary file" in _refused(lambda: load(_settings()), "own.npz")
    assert "no ordinary file" in _refused(lambda: loading.fingerprint(_settings()), "own.npz")
    os.rename("own.npz", "own.png")
    assert "no ordinary file" in _refused(lambda: read_picture(Path("own.png")), "own.png")


def _image(kind, **options):
    content = BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 12, 3), np.uint8)
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


def _png(width, height, pixels=b""):
    """A PNG with that size in its head."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(pixels)),
        (b"IEND", b""),
    ]
    chunks = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)  # fmt: skip


IMAGES = {
    "empty": b"",
    "text": b"no image",
    "a PNG of 2^31 pixels a side": _png(2**31 - 1, 2**31 - 1),
    "a PNG that is below the limit of its library": _png(12000, 14000),
    "a PNG without pixels": _png(8, 8),
    "a PNG of no size": _png(0, 0),
    "half a PNG": _image("PNG")[:300],
    "a PNG with a changed byte": _changed(_image("PNG"), 100),
    "half a JPEG": _image("JPEG")[:400],
    "half a TIFF": _image("TIFF")[:200],
    "half a WebP": _image("WEBP")[:100],
    "half a BMP": _image("BMP")[:200],
    "half a PPM": _image("PPM")[:100],
}


@pytest.mark.parametrize("kind", IMAGES)
def test_a_damaged_image_is_one_line(kind):
    Path("own.png").write_bytes(IMAGES[kind])
    _refused(lambda: read_picture(Path("own.png")), "own.png")


# ------------------------------------------------------------------------------------------ hundreds


def _damaged(content, draw):
    """The content with one kind of damage."""
    size, found = len(content), bytearray(content)
    place = draw.randrange(size)
    kind = draw.randrange(6)
    if kind == 0:
        return bytes(found[:place])
    if kind == 1:
        for _ in range(draw.randint(1, 8)):
            found[draw.randrange(size)] ^= 1 << draw.randrange(8)
    elif kind == 2:
        found[place : place + 4] = draw.choice(
            [b"\xff\xff\xff\x7f", b"\xff" * 4, bytes(4), b"\x80\x00\x00\x00"]
        )
    elif kind == 3:
        found[place : place + draw.randint(1, 64)] = draw.randbytes(draw.randint(1, 64))
    elif kind == 4:
        end = min(size, place + draw.randint(1, 200))
        found[place:place] = found[place:end] * draw.randint(1, 3)
    else:  # where heads are
        found[draw.randrange(min(size, 64))] = draw.randrange(256)
    return bytes(found)


_OF_LIBTIFF = re.compile(r"tif|^\w+Decode: ", re.IGNORECASE)
"""It has its own say."""


def _too_slow(*_):
    raise TimeoutError(f"more than {SECONDS} seconds of processor time")


def _checkpoint(**options):
    content = BytesIO()
    torch.save({"state_dict": STATE, "epoch": 3}, content, **options)
    return content.getvalue()


YAML = """\
profile: p
profiles:
  base: &base {dataset: {source: digits, train: 1_00, validation: 0o17}, imp_slr: {targets: [.9, 9e-1]}}
  p:
    <<: *base
    seeds: {first: 1, count: 2, looks: [1, 2]}
    imp_slr: {learning_rates: [1e-1, !!float 3], cells: [{architecture: mlp, options: {hidden: [4]}}], targets: [0.5]}
"""
STATE = {"features.weight": torch.arange(6.0).view(2, 3), "features.running_var": torch.ones(2)}
READERS = {
    "npz": lambda file: load(_settings()),
    "png": read_picture,
    "pt": lambda file: read_checkpoint(str(file)),
    "yaml": lambda file: papers.load("imp_slr", file),
}


@pytest.mark.long
@pytest.mark.parametrize("ending", READERS)
def test_hundreds_of_damaged_files_are_read_or_are_one_line(capfd, ending):
    """Within two seconds of processor time and a gigabyte each."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    sound = {
        "npz": [_packed(), _packed(np.savez_compressed), _packed(classes=np.array(["a", "b", "c"]), scale=np.array(16.0))],
        "png": [
            _image("PNG", exif=exif), _image("JPEG", exif=exif), _image("TIFF", compression="tiff_lzw"), _image("TIFF"),
            _image("WEBP", exif=exif), _image("GIF"), _image("BMP"), _image("PPM"),
        ],
        "pt": [_checkpoint(), _checkpoint(_use_new_zipfile_serialization=False), tensor_files.packed(STATE, {"a": "b"})],
        "yaml": [(ROOT / "params.yaml").read_bytes(), YAML.encode()],
    }[ending]  # fmt: skip
    papers.load("imp_slr", ROOT / "params.yaml")  # what is imported is no memory of a file
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGVTALRM, _too_slow)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
    read, refused = 0, 0
    try:
        for number in range(600):
            draw = random.Random(number)
            file = Path(f"own.{ending}")
            file.write_bytes(_damaged(draw.choice(sound), draw))
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
            try:
                READERS[ending](file)
                read += 1
            except SettingsError as error:
                refused += 1
                assert str(file) in str(error) and "\n" not in str(error), (number, error)
                assert len(str(error)) < (LONGEST if ending != "yaml" else LONGEST_OF_SETTINGS), (
                    number,
                    error,
                )
            except Exception as error:
                raise AssertionError(f"number {number}: {type(error).__name__}: {error}") from error
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGVTALRM, handler)
    said = capfd.readouterr().err.splitlines()
    assert not [line for line in said if not _OF_LIBTIFF.search(line)]
    assert read > 20 and refused > 200

"""Preparing data sets: canonical order, folders, downloads that break off, files that cannot be written."""

import hashlib
import json
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from project import ROOT
from torchvision.datasets import CIFAR10

from common.core.loading import checked, load, prepared_file
from common.settings import DataError, DatasetSettings
from common.stage import data
from common.stage import prepare as preparing
from common.stage.prepare import canonical, main, prepare, write


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------- CIFAR-10, small

CLASSES = list("abcdefghij")


def _cifar_files(monkeypatch, order=None):
    """CIFAR-10 in its own file format: 100 training and 20 test images. torchvision's checksums become theirs."""
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (120, 3072), np.uint8), np.arange(120) % 10
    if order is not None:
        pixels[:100], labels[:100] = pixels[order], labels[order]
    contents = {}
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        part = slice(20 * number, 20 * number + 20)
        contents[name] = pickle.dumps({"data": pixels[part], "labels": labels[part].tolist()})
    contents["batches.meta"] = pickle.dumps({"label_names": CLASSES})
    sums = [[name, hashlib.md5(content).hexdigest()] for name, content in contents.items()]
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:6])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": sums[6][0], "key": "label_names", "md5": sums[6][1]})
    return contents


def _unpacked(contents, root):
    folder = Path(root) / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


@contextmanager
def _mirror(monkeypatch, contents):
    """A server with the archive of CIFAR-10; `broken.set()` makes it break off in the middle."""
    packed = BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    broken = threading.Event()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            content = packed.getvalue()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if broken.is_set() else content)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(packed.getvalue()).hexdigest())
    try:
        yield broken
    finally:
        server.shutdown()
        server.server_close()


def test_torchvision_files_are_read_and_verified(monkeypatch):
    folder = _unpacked(_cifar_files(monkeypatch), "root")
    settings = DatasetSettings(source="cifar10", path="root", validation=20)
    arrays = prepare(settings)
    assert arrays["x_train"].shape == (100, 32, 32, 3) and arrays["classes"].tolist() == CLASSES
    (folder / "data_batch_3").write_bytes(b"damaged")
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(DataError, match="cifar10: the download or its check failed.*tries again"):
        prepare(settings)


def test_the_same_images_in_any_order_are_prepared_to_the_same_file(monkeypatch):
    order = np.random.default_rng(1).permutation(100)
    files = []
    for root, arrangement in (("one", None), ("two", order)):
        _unpacked(_cifar_files(monkeypatch, arrangement), root)
        settings = DatasetSettings(source="cifar10", path=root, validation=20)
        write(Path(root, "prepared.npz"), prepare(settings))
        files.append(_digest(Path(root, "prepared.npz")))
    assert files[0] == files[1]
    arrays = dict(np.load("one/prepared.npz"))
    del arrays["sha256"]
    assert np.all(np.diff(arrays["y_train"]) >= 0) and np.bincount(arrays["y_train"]).tolist() == [10] * 10
    packed = arrays | {
        "x_train": arrays["x_train"][order],
        "y_train": arrays["y_train"][order].astype(np.uint8),
    }
    write(Path("packed.npz"), canonical(checked(packed, "a packed copy")))
    assert _digest(Path("packed.npz")) == files[0]
    write(Path("other.npz"), canonical(arrays | {"x_train": arrays["x_train"] ^ 1}))
    assert _digest(Path("other.npz")) != files[0]


def test_a_download_that_breaks_off_leaves_nothing_and_the_next_attempt_succeeds(monkeypatch, capsys):
    contents = _cifar_files(monkeypatch)
    settings = DatasetSettings(source="cifar10", validation=20)
    monkeypatch.setattr(preparing, "profile_datasets", lambda *arguments: [settings])
    with _mirror(monkeypatch, contents) as broken:
        broken.set()
        assert main([]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(
            "error: cifar10: the download or its check failed (RuntimeError: File not found or"
        )
        assert [path.name for path in Path("data/prepared").iterdir()] == ["manifest.json"]
        broken.clear()
        assert main([]) == 0
    assert len(load(settings).labels["train"]) == 80
    manifest = json.loads(Path("data/prepared/manifest.json").read_text())
    assert manifest["cifar10"]["images"] == {"train": 80, "validation": 20, "test": 20}


# ---------------------------------------------------------------------------------------------- copies of CIFAR


@pytest.fixture
def copied(monkeypatch):
    """Arrays of a small CIFAR-10, in another order and without names of classes, and what its download prepares."""
    contents = _cifar_files(monkeypatch)
    settings = DatasetSettings(source="cifar10", validation=20)
    monkeypatch.setattr(preparing, "profile_datasets", lambda *arguments: [settings])
    with _mirror(monkeypatch, contents):
        assert main([]) == 0
    file = prepared_file(settings)
    monkeypatch.setitem(preparing.CIFAR_CLASSES, "cifar10", CLASSES)
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    arrays, order = dict(np.load(file)), np.random.default_rng(1).permutation(100)
    monkeypatch.setitem(preparing.CIFAR_SHA256, "cifar10", str(arrays["sha256"]))
    packed = {"x_train": arrays["x_train"][order], "y_train": arrays["y_train"][order].astype(np.uint8)}
    packed |= {"x_test": arrays["x_test"], "y_test": arrays["y_test"].astype(np.int32)}
    expected = _digest(file)
    shutil.rmtree("data")
    return packed, file, expected


def test_a_copy_stands_in_place_of_the_download(copied, capsys):
    arrays, file, expected = copied
    np.savez("mine.npz", **arrays)
    assert main([]) == 2 and "(of CIFAR: as it is in the settings, with --from)" in capsys.readouterr().err
    assert main(["--from", "mine.npz"]) == 0
    assert _digest(file) == expected
    # also when the prepared files are removed, as DVC does before it runs the stage
    Path("mine.npz").unlink()
    shutil.rmtree("data/prepared")
    assert main([]) == 0 and _digest(file) == expected


def _changed(arrays, key, value):
    return arrays | {key: np.concatenate([arrays[key][:-1], np.full_like(arrays[key][-1:], value)])}


def test_a_file_that_is_no_copy_is_refused_by_name(copied, capsys):
    arrays, file, _ = copied

    def refused(message, content):
        Path("mine.npz").unlink(missing_ok=True)
        if content:
            np.savez("mine.npz", **content)
        assert main(["--from", "mine.npz"]) == 2
        error = capsys.readouterr().err.splitlines()[0]
        assert error.startswith("error: mine.npz: ") and message in error
        assert not file.exists() and not Path("data/downloads/cifar10.npz").exists()

    refused("not a readable .npz file, or damaged", None)
    refused("y_test is missing", {key: value for key, value in arrays.items() if key != "y_test"})
    refused("x_test is float64", arrays | {"x_test": arrays["x_test"] / 255})
    refused("not cifar10: the 100 training and 20 test images have", _changed(arrays, "x_train", 7))
    refused("an image or a label differs", _changed(arrays, "y_test", 0))
    few = {key: value[:-1] if key.endswith("train") else value for key, value in arrays.items()}
    refused("not cifar10: the 99 training and 20 test images have", few)
    refused("neither CIFAR-10 nor CIFAR-100: it has labels of 11 classes", _changed(arrays, "y_train", 10))


def test_a_copy_that_the_profile_does_not_read_is_refused(copied, monkeypatch, capsys):
    np.savez("mine.npz", **copied[0])
    elsewhere = DatasetSettings(source="cifar10", path="root", validation=20)
    monkeypatch.setattr(preparing, "profile_datasets", lambda *arguments: [elsewhere])
    assert main(["--from", "mine.npz"]) == 2
    error = capsys.readouterr().err.splitlines()[0]
    assert (
        error == "error: mine.npz: this is cifar10, which the profile does not read; --profile names another"
    )


def test_half_an_extraction_of_caltech_is_noticed():
    for name in ("ant", "BACKGROUND_Google"):
        folder = Path("root/caltech101/101_ObjectCategories") / name
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "image_0001.jpg")
    with pytest.raises(DataError, match="root/caltech101: 1 images in place of 8677.*delete the folder"):
        prepare(DatasetSettings(source="caltech101", path="root", size=8, test=1))


def test_caltech_is_split_by_its_images_whatever_their_order(monkeypatch):
    monkeypatch.setattr(preparing, "CALTECH101_IMAGES", 12)
    found = []
    for root, turn in (("one", 0), ("two", 3)):
        for number, name in enumerate(("BACKGROUND_Google", "ant", "bass")):
            folder = Path(root, "caltech101", "101_ObjectCategories", name)
            folder.mkdir(parents=True)
            for i in range(6):
                shade = (number * 50, (i + turn) % 6, 0)
                Image.new("RGB", (8, 9), shade).save(folder / f"image_{i + 1:04d}.jpg", quality=100)
        found.append(prepare(DatasetSettings(source="caltech101", path=root, size=8, test=4)))
    assert found[0]["classes"].tolist() == ["ant", "bass"] and found[0]["x_test"].shape == (4, 8, 8, 3)
    for key, values in found[0].items():
        assert np.array_equal(values, found[1][key])


# ---------------------------------------------------------------------------------------------- folders


def _write_images(root, classes, per_class, size=(20, 12)):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            Image.new("RGB", size, (number * 50, i, 0)).save(root / name / f"{i}.png")


_folder = partial(DatasetSettings, source="folder", size=6)


def test_image_folders_are_prepared(tmp_path):
    _write_images(tmp_path / "one", ["cat", "dog", "eel"], 10)
    arrays = prepare(_folder(path="one", test=9))
    assert arrays["x_train"].shape == (21, 6, 6, 3) and arrays["classes"].tolist() == ["cat", "dog", "eel"]
    assert np.bincount(arrays["y_test"]).tolist() == [3, 3, 3]
    assert set(arrays["x_train"][arrays["y_train"] == 2][..., 0].ravel()) == {100}
    per_class = prepare(_folder(path="one", train_per_class=4))
    assert np.bincount(per_class["y_train"]).tolist() == [4, 4, 4] and len(per_class["y_test"]) == 18
    with pytest.raises(DataError, match="one has no test split"):
        prepare(_folder(path="one"))
    Image.new("RGB", (30, 30)).save(tmp_path / "one" / "eel" / "big.png")
    with pytest.raises(
        DataError, match=r"one: images of different sizes \(12 to 30 pixels\): give dataset.size"
    ):
        prepare(_folder(path="one", test=9, size=None))


def test_streamed_folders_are_indexed_in_the_same_order_as_their_files_contents(tmp_path):
    _write_images(tmp_path / "one" / "train", ["cat", "dog"], 3)
    _write_images(tmp_path / "one" / "val", ["cat", "dog"], 2)
    (tmp_path / "one" / "test").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "one" / "test" / "without_label.png")
    index = prepare(_folder(path="one", streamed=True))
    assert index["y_train"].tolist() == [0, 0, 0, 1, 1, 1] and index["y_test"].tolist() == [0, 0, 1, 1]
    for split in ("train", "test"):
        for path, digest in zip(index[f"paths_{split}"], index[f"sha256_{split}"]):
            assert (
                hashlib.sha256((tmp_path / "one" / path.decode()).read_bytes()).digest() == digest.tobytes()
            )
    assert {path.split(b"/")[0] for path in index["paths_test"]} == {b"val"}
    (tmp_path / "one" / "train" / "cat" / "0.png").rename(tmp_path / "one" / "train" / "cat" / "9.png")
    renamed = prepare(_folder(path="one", streamed=True))
    assert np.array_equal(renamed["sha256_train"], index["sha256_train"])
    assert not np.array_equal(renamed["paths_train"], index["paths_train"])


@pytest.mark.parametrize("streamed", [False, True])
def test_wrong_folders_are_named_before_training(tmp_path, streamed):
    def fails(path, message, **more):
        with pytest.raises(DataError, match=message) as error:
            prepare(_folder(path=path, streamed=streamed, **more))
        assert "\n" not in str(error.value)

    fails("absent", "absent: not a folder of class folders.*No such file")
    _write_images(tmp_path / "one", ["cat", "dog"], 2)
    (tmp_path / "one" / "eel").mkdir()
    fails("one", "one: not a folder of class folders.*no valid file for the classes eel", test=2)
    (tmp_path / "one" / "eel").rmdir()
    (tmp_path / "one" / "cat" / "0.png").write_bytes(b"no image")
    fails("one", "one/cat/0.png: not a readable image", test=2)
    _write_images(tmp_path / "two" / "train", ["cat", "dog"], 3)
    fails("two", "two/test: not a folder of class folders")
    _write_images(tmp_path / "two" / "val", ["cat", "cow"], 2)
    fails("two", "train and val have different classes; only in one of them: cow, dog")


# ---------------------------------------------------------------------------------------------- writing


def _arrays(count=50):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (count, 32, 32, 3), np.uint8), np.arange(count) % 5
    return checked({"x_train": x, "y_train": y, "x_test": x[:10], "y_test": y[:10]}, "small")


@contextmanager
def _full_disk(size):
    """No file may grow beyond `size` bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_clear_line_and_leaves_nothing_half_written():
    target = Path("data/prepared/small.npz")
    with _full_disk(20_000), pytest.raises(DataError, match="small.npz: cannot be written: File too large"):
        write(target, _arrays())
    assert not list(target.parent.iterdir())
    write(target, _arrays())
    before = _digest(target)
    with _full_disk(20_000), pytest.raises(DataError, match="cannot be written"):
        write(target, _arrays(60))
    assert _digest(target) == before and list(target.parent.iterdir()) == [target]


def test_a_folder_that_cannot_be_made_is_named():
    Path("data").write_text("a file where the folder should be")
    with pytest.raises(
        DataError, match="data/prepared/small.npz: cannot be written: (Not a directory|File exists)"
    ):
        write(Path("data/prepared/small.npz"), _arrays())


def test_what_can_be_prepared_is_although_other_data_is_missing(tmp_path, monkeypatch, capsys):
    _write_images(tmp_path / "photos" / "train", ["cat", "dog"], 4)
    _write_images(tmp_path / "photos" / "test", ["cat", "dog"], 2)
    there = _folder(path="photos", validation=2)
    absent = [_folder(path=path, streamed=True) for path in ("data/imagenet", "elsewhere")]
    monkeypatch.setattr(preparing, "profile_datasets", lambda *arguments: [absent[0], there, absent[1]])
    assert main([]) == 2
    said = capsys.readouterr().err.splitlines()
    errors = [line.split(":")[1].strip() for line in said if line.startswith("error")]
    assert errors == ["data/imagenet", "elsewhere"]
    assert len(load(there).labels["train"]) == 6


@pytest.mark.parametrize(
    ("path", "prepares"), [("data/made.npz", False), ("data/own.npz", True), (None, True)], ids=str
)
def test_the_stage_loads_what_prepares_only_where_there_is_something_to_prepare(monkeypatch, path, prepares):
    Path("params.yaml").write_text("profile: small\nprofiles:\n  small: {}\n")
    Path("dvc.yaml").write_text("stages:\n  draw:\n    outs: [data/made.npz]\n")
    Path(".settings/small").mkdir(parents=True)
    other = {"source": "npz" if path else "cifar10", "path": path}
    Path(".settings/small/data.json").write_text(json.dumps([{"source": "digits", "path": None}, other]))
    asked = []
    monkeypatch.setattr(preparing, "main", lambda arguments: asked.append(arguments) or 2)
    assert data.main() == (2 if prepares else 0)
    assert asked == [[]] * prepares
    if not prepares:
        assert Path("data/prepared/manifest.json").read_text() == "{}\n"


@pytest.mark.slow
def test_which_papers_there_are_and_whether_to_prepare_is_told_without_torch():
    code = "import sys, common.stage.data, common.stage.publish; sys.exit('torch' in sys.modules)"
    assert not subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode

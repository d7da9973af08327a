"""Sets, folders, batches and the cache."""
import collections
import gzip
import hashlib
import io
import itertools
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import data, terminal

ROOT = Path(__file__).parent.parent
GREY = (40, 100, 200)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache for the tests that only need the digits drawn."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    return folder


def load(folder, image_size=4, channels=0):
    return data.load_images(folder, "none", image_size, channels, folder.parent / "cache")


def flat(color, mode="RGB", size=(4, 4)):
    return Image.new(mode, size, color)


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx(path, array, packed=True):
    """Write an array of bytes in the format of MNIST."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()
    path = path.with_name(path.name + ".gz") if packed else path
    path.write_bytes(gzip.compress(content) if packed else content)


def small_fashion(folder, packed=True, n=6):
    raw = folder / "FashionMNIST" / "raw"
    arrays = [noise(0, n, 28, 28), np.arange(n, dtype=np.uint8)]
    arrays += [noise(1, 3, 28, 28), np.array([2, 1, 0], np.uint8)]
    for stem, array in zip(data.IDX, arrays):
        idx(raw / f"{stem}-ubyte", array, packed)
    return raw, arrays


# ---- named sets ----


def test_digits_have_the_two_splits_of_the_contract_and_no_image_twice(cache):
    digits = data.load_images("digits", cache_dir=cache)
    assert digits.name == "digits" and digits.channels == 1
    assert digits.images.shape == (20000, 1, 32, 32) and digits.images.dtype == torch.uint8
    assert digits.test.images.shape == (4000, 1, 32, 32)
    assert digits.labels.bincount().tolist() == [2000] * 10
    assert digits.test.labels.bincount().tolist() == [400] * 10
    both = torch.cat([digits.images, digits.test.images])
    assert len({image.numpy().tobytes() for image in both}) == 24000


def test_sets_of_28_pixels_are_padded_with_black_not_resized(tmp_path):
    raw, (images, labels, test_images, _) = small_fashion(tmp_path)
    fashion = data.load_images("fashion", tmp_path, cache_dir=tmp_path / "cache")
    assert fashion.images.shape == (6, 1, 32, 32)
    assert np.array_equal(fashion.images[:, 0, 2:30, 2:30].numpy(), images)
    assert np.array_equal(fashion.test.images[:, 0, 2:30, 2:30].numpy(), test_images)
    assert fashion.images.sum() == images.sum(dtype=np.int64)
    assert fashion.labels.tolist() == [0, 1, 2, 3, 4, 5] and fashion.labels.dtype == torch.int64
    assert fashion.test.labels.tolist() == [2, 1, 0]


def test_unpacked_idx_files_are_read_like_packed_ones(tmp_path):
    small_fashion(tmp_path / "a")
    small_fashion(tmp_path / "b", packed=False)
    a, b = (data.load_images("fashion", tmp_path / x, cache_dir=tmp_path) for x in "ab")
    assert torch.equal(a.images, b.images) and a.fingerprint == b.fingerprint


def test_loading_a_set_writes_nothing_where_it_lies(tmp_path):
    small_fashion(tmp_path / "data")
    before = sorted((tmp_path / "data").rglob("*"))
    data.load_images("fashion", tmp_path / "data", 16, cache_dir=tmp_path / "cache")
    assert sorted((tmp_path / "data").rglob("*")) == before


def test_other_sizes_are_resized_from_the_padded_32(tmp_path):
    _, (images, *_) = small_fashion(tmp_path)
    padded = Image.fromarray(np.pad(images[3], 2))
    for size in (16, 64):
        fashion = data.load_images("fashion", tmp_path, size, cache_dir=tmp_path / "cache")
        expected = padded.resize((size, size), Image.Resampling.BICUBIC)
        assert np.array_equal(fashion.images[3, 0].numpy(), np.asarray(expected))
        assert fashion.test.images.shape == (3, 1, size, size)


def test_grey_becomes_colour_by_repeating(tmp_path):
    small_fashion(tmp_path)
    one = data.load_images("fashion", tmp_path, channels=1, cache_dir=tmp_path / "cache")
    three = data.load_images("fashion", tmp_path, channels=3, cache_dir=tmp_path / "cache")
    assert three.channels == three.test.channels == 3
    assert all(torch.equal(three.images[:, c], one.images[:, 0]) for c in range(3))


@pytest.mark.parametrize("spoil", [
    lambda f: f.write_bytes(f.read_bytes()[:-20]),
    lambda f: f.write_bytes(b"no gzip at all"),
    lambda f: f.write_bytes(gzip.compress(gzip.decompress(f.read_bytes())[:-1])),
    lambda f: f.write_bytes(gzip.compress(b"")),
    lambda f: f.write_bytes(gzip.compress(struct.pack(">IIII", 0x0D03, 1, 1, 1) + b"1234")),
    lambda f: idx(f.with_suffix(""), noise(0, 6, 27, 28)),
    lambda f: idx(f.with_suffix(""), noise(0, 5, 28, 28)),
], ids=["truncated", "no gzip", "cut short", "empty", "floats", "27 x 28", "fewer than labels"])
def test_a_damaged_idx_file_is_named(spoil, tmp_path):
    raw, _ = small_fashion(tmp_path)
    spoil(raw / "train-images-idx3-ubyte.gz")
    with pytest.raises(ValueError, match="train-images-idx3-ubyte") as e:
        data.load_images("fashion", tmp_path, cache_dir=tmp_path / "cache")
    assert "\n" not in str(e.value)


def test_files_that_are_not_the_published_mnist_are_refused(tmp_path):
    raw, _ = small_fashion(tmp_path)
    raw.parent.rename(tmp_path / "MNIST")
    with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz is not the published"):
        data.load_images("mnist", tmp_path, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name, folder", [
    ("mnist", "MNIST/raw"), ("fashion", "FashionMNIST/raw"), ("cifar10", "cifar-10-batches-py"),
])
def test_offline_and_absent_is_one_line_and_leaves_no_folder(name, folder, tmp_path, monkeypatch):
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(ValueError) as e:
        data.load_images(name, tmp_path / "absent" / "data", cache_dir=tmp_path / "cache")
    assert str(tmp_path / "absent" / "data" / folder) in str(e.value)
    assert "--dataset digits" in str(e.value) and "\n" not in str(e.value)
    assert "urlopen" in str(e.value)  # the reason, where torchvision puts a headline before it
    assert not list(tmp_path.iterdir())


def batch_file(rows, labels):
    return pickle.dumps({b"data": rows, b"labels": labels})


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Six small batches in place of the published ones, and their checksums."""
    files = {name: batch_file(noise(i, 2, 3072), [i, 9]) for i, name in enumerate(data.CIFAR10_MD5)}
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(data, "CIFAR10_MD5", sums)
    return files


def test_cifar_batches_are_read_from_their_folder_and_from_the_archive(cifar, tmp_path):
    folder = tmp_path / "a" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (tmp_path / "b").mkdir()
    with tarfile.open(tmp_path / "b" / "cifar-10-python.tar.gz", "w:gz") as tar:
        for name, content in cifar.items():
            (folder / name).write_bytes(content)
            tar.add(folder / name, f"cifar-10-batches-py/{name}")
    for where in "ab":
        images = data.load_images("cifar10", tmp_path / where, cache_dir=tmp_path / "cache")
        assert images.images.shape == (10, 3, 32, 32) and images.test.images.shape == (2, 3, 32, 32)
        assert images.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
        assert images.test.labels.tolist() == [5, 9]
        assert images.images[2].flatten().tolist() == noise(1, 2, 3072)[0].tolist()
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["cifar-10-python.tar.gz"]


def test_cifar_batches_that_differ_from_the_published_are_refused_unread(cifar, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, content in cifar.items():
        (folder / name).write_bytes(content)
    (folder / "data_batch_3").write_bytes(b"\x80\x04no pickle")
    with pytest.raises(ValueError, match="data_batch_3 is not the published file"):
        data.load_images("cifar10", tmp_path, cache_dir=tmp_path / "cache")
    (folder / "data_batch_3").unlink()
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="cifar-10-python.tar.gz is damaged"):
        data.load_images("cifar10", tmp_path, cache_dir=tmp_path / "cache")


def test_a_pickle_of_more_than_arrays_is_refused():
    for harmful in (os.system, eval, np.load):
        with pytest.raises(pickle.UnpicklingError):
            data._Unpickler(io.BytesIO(pickle.dumps(harmful))).load()


def test_arrays_pickled_by_python_2_are_read():
    """As in the published batches: the module that numpy had then, byte strings for text."""
    old = (
        b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
        b"\x87R(K\x01K\x01K\x03\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff"
        b"\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x03\x07\x08\x09tbs."
    )
    read = data._Unpickler(io.BytesIO(old), encoding="bytes").load()
    assert read[b"data"].tolist() == [[7, 8, 9]] and read[b"data"].dtype == np.uint8


def test_the_real_mnist(data_dir, tmp_path):
    mnist = data.load_images("mnist", data_dir, cache_dir=tmp_path)
    assert len(mnist) == 60000 and len(mnist.test) == 10000
    assert mnist.labels[:5].tolist() == [5, 0, 4, 1, 9] and mnist.test.labels[0] == 7
    assert mnist.images.float().mean().item() == pytest.approx(33.318 * 28**2 / 32**2, abs=0.01)


def test_a_real_folder_in_classes(data_dir, tmp_path):
    folder = data_dir / "cifar10-png"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder.name} in the data folder")
    images = data.load_images(folder / "test", cache_dir=tmp_path)
    assert images.images.shape == (10000, 3, 32, 32) and images.test is None
    assert images.labels.bincount().tolist() == [1000] * 10


# ---- folders ----


def test_a_flat_folder_has_no_labels_and_is_read_in_order_of_names(pictures):
    for name, level in (("b.png", 20), ("a.png", 10), ("c.PNG", 30), (".hidden.png", 40)):
        flat((level, 0, 0)).save(pictures / name, "PNG")
    (pictures / "notes.txt").write_text("not an image")
    images = load(pictures)
    assert images.labels is None and images.test is None and images.name == str(pictures)
    assert images.images.shape == (3, 3, 4, 4)
    assert images.images[:, 0, 0, 0].tolist() == [10, 20, 30]


def test_class_folders_give_labels_in_order_of_names(pictures):
    for name, level in (("dog", 1), ("cat", 2), ("cat/more", 3)):
        (pictures / name).mkdir(parents=True, exist_ok=True)
        flat(level, "L").save(pictures / name / "x.png")
    images = load(pictures)
    by_level = dict(zip(images.images[:, 0, 0, 0].tolist(), images.labels.tolist()))
    assert by_level == {1: 1, 2: 0, 3: 0} and images.labels.dtype == torch.int64


def test_one_folder_inside_is_no_class(pictures):
    (pictures / "img").mkdir()
    flat(1, "L").save(pictures / "img" / "x.png")
    assert load(pictures).labels is None


def test_train_and_test_inside_become_the_splits_with_common_labels(pictures):
    for name, level in (("train/a", 1), ("train/c", 3), ("test/b", 2), ("test/c", 3)):
        (pictures / name).mkdir(parents=True)
        flat(level, "L").save(pictures / name / "x.png")
    images = load(pictures)
    assert images.images[:, 0, 0, 0].tolist() == [1, 3] and images.labels.tolist() == [0, 2]
    assert images.test.images[:, 0, 0, 0].tolist() == [2, 3]
    assert images.test.labels.tolist() == [1, 2]


def test_a_class_may_be_called_train(pictures):
    for name in ("bus", "train"):
        (pictures / name).mkdir()
        flat(1, "L").save(pictures / name / "x.png")
    images = load(pictures)
    assert images.labels.tolist() == [0, 1] and images.test is None


@pytest.mark.parametrize("name, image, expected", [
    ("x.png", flat(100, "L"), (100, 100, 100)),
    ("x.png", flat(1, "1"), (255, 255, 255)),
    ("x.png", flat(GREY, "RGB"), GREY),
    ("x.png", flat((*GREY, 255), "RGBA"), GREY),
    ("x.png", flat((*GREY, 0), "RGBA"), (255, 255, 255)),
    ("x.png", flat((0, 255, 100, 51), "RGBA"), (204, 255, 224)),  # 0.2 of it, 0.8 of white
    ("x.png", flat((0, 51), "LA"), (204, 204, 204)),
    ("x.png", flat(GREY).quantize(4), GREY),
    ("x.gif", flat(GREY).quantize(4), GREY),
    ("x.bmp", flat(GREY), GREY),
    ("x.ppm", flat(GREY), GREY),
    ("x.webp", flat(GREY), "close"),
    ("x.jpg", flat(GREY), "close"),
    ("x.jpg", flat((255, 0, 0, 0), "CMYK"), "cyan"),
    ("x.tif", flat((255, 0, 0, 0), "CMYK"), "cyan"),
    ("x.png", Image.fromarray(np.full((4, 4), 257 * 200, np.uint16)), (200, 200, 200)),
    ("x.png", Image.fromarray(np.full((4, 4), 65535, np.uint16)), (255, 255, 255)),
    ("x.tif", Image.fromarray(np.full((4, 4), 257 * 99, np.int32)), (99, 99, 99)),
    ("x.tif", Image.fromarray(np.full((4, 4), 0.2, np.float32)), (51, 51, 51)),
    ("x.tif", Image.fromarray(np.full((4, 4), 77.4, np.float32)), (77, 77, 77)),
    ("x.tif", Image.fromarray(np.full((4, 4), np.nan, np.float32)), (0, 0, 0)),
    ("x.tif", Image.fromarray(np.full((4, 4), np.inf, np.float32)), (255, 255, 255)),
])
def test_every_kind_of_file_becomes_the_colour_that_a_viewer_shows(name, image, expected, pictures):
    image.save(pictures / name)
    pixels = load(pictures, channels=3).images[0]
    if expected == "cyan":
        assert pixels[0].max() < 60 and pixels[1:].min() > 120
    else:
        wanted = torch.tensor(GREY if expected == "close" else expected).view(3, 1, 1)
        assert (pixels.int() - wanted).abs().max() <= (6 if expected == "close" else 0)


def test_floats_that_are_not_numbers_are_black_and_leave_the_rest_alone(pictures):
    values = np.full((4, 4), 0.2, np.float32)
    values[1, 2] = np.nan
    Image.fromarray(values).save(pictures / "x.tif")
    expected = torch.full((4, 4), 51)
    expected[1, 2] = 0
    assert torch.equal(load(pictures).images[0, 0].long(), expected)


def test_the_transparent_colour_of_palette_and_plain_files_is_white(pictures):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(pictures / "palette.png", transparency=1)
    flat(GREY).save(pictures / "plain.png", transparency=GREY)
    assert (load(pictures).images == 255).all()


def test_a_rotated_photograph_stands_upright(pictures):
    image = Image.new("RGB", (4, 4))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    image.save(pictures / "x.png", exif=exif)
    pixels = load(pictures).images[0, 0]
    assert pixels[0, 3] == 255 and pixels.float().sum() == 255


def test_a_set_has_one_channel_when_every_pixel_of_it_is_grey(pictures):
    flat((9, 9, 9)).save(pictures / "a.png")
    flat(7, "L").save(pictures / "b.png")
    assert load(pictures).channels == 1
    assert load(pictures, channels=3).channels == 3
    flat((9, 9, 10)).save(pictures / "c.png")
    assert load(pictures).channels == 3


def test_splits_agree_on_their_channels(pictures):
    for split, color in (("train", (9, 9, 9)), ("test", (9, 8, 7))):
        (pictures / split).mkdir()
        flat(color).save(pictures / split / "x.png")
    images = load(pictures)
    assert images.channels == images.test.channels == 3


def test_colour_becomes_grey_by_the_weights_of_pillow(pictures):
    pixels = noise(3, 40, 40, 3)
    Image.fromarray(pixels).save(pictures / "x.png")
    grey = load(pictures, 40, channels=1).images[0, 0]
    assert np.array_equal(grey.numpy(), np.asarray(Image.fromarray(pixels).convert("L")))


@pytest.mark.parametrize("size", [(6, 4), (7, 4), (4, 7)])
def test_the_centre_is_cropped_without_resizing_where_the_shorter_side_fits(size, pictures):
    pixels = noise(4, size[1], size[0], 3)
    Image.fromarray(pixels).save(pictures / "x.png")
    left, top = (size[0] - 4) // 2, (size[1] - 4) // 2
    expected = pixels[top : top + 4, left : left + 4].transpose(2, 0, 1)
    assert np.array_equal(load(pictures).images[0].numpy(), expected)


def test_shrinking_is_antialiased(pictures):
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    Image.fromarray(checks.astype(np.uint8)).save(pictures / "x.png")
    pixels = load(pictures, 8).images.float()
    assert (pixels - 127.5).abs().max() < 4


def test_tiny_and_thin_pictures_are_stretched(pictures):
    flat(GREY, size=(1, 1)).save(pictures / "a.png")
    flat(GREY, size=(1, 5000)).save(pictures / "b.png")
    images = load(pictures, 64).images
    assert images.shape == (2, 3, 64, 64)
    assert (images == torch.tensor(GREY).view(3, 1, 1)).all()


def test_100_megapixels_are_read_and_more_skipped(pictures, capsys, recwarn, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 123456)  # Pillow's own limit, not ours to change
    Image.new("1", (10000, 10000), 1).save(pictures / "large.png")
    checked = b"IHDR" + struct.pack(">II5B", 20000, 20000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + checked + struct.pack(">I", zlib.crc32(checked))
    (pictures / "absurd.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT\0\0\0\0")
    images = load(pictures)
    assert images.images.shape == (1, 1, 4, 4) and (images.images == 255).all()
    err = capsys.readouterr().err
    assert "absurd.png: 20000 x 20000 pixels" in err and "skipped 1 of 2" in err
    assert not len(recwarn) and Image.MAX_IMAGE_PIXELS == 123456


def test_broken_images_are_named_skipped_and_counted(pictures, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "quiet", True)
    for c in "ab":
        (pictures / c).mkdir()
        flat(GREY).save(pictures / c / "good.png")
    Image.fromarray(noise(0, 9, 9, 3)).save(pictures / "a" / "cut.png")
    content = (pictures / "a" / "cut.png").read_bytes()
    (pictures / "a" / "cut.png").write_bytes(content[: len(content) // 2])
    (pictures / "a" / "empty.jpg").write_bytes(b"")
    (pictures / "b" / "text.bmp").write_text("text")
    images = load(pictures)
    assert images.images.shape == (2, 3, 4, 4) and images.labels.tolist() == [0, 1]
    lines = capsys.readouterr().err.splitlines()
    for line, name in zip(lines, ("cut.png", "empty.jpg", "text.bmp")):
        assert f"{name}: " in line
    assert "skipped 3 of 5" in lines[3] and len(lines) == 4
    again = load(pictures)  # from the cache
    assert torch.equal(again.images, images.images) and again.labels.tolist() == [0, 1]
    assert "skipped 3 of 5" in capsys.readouterr().err


def test_no_more_than_ten_broken_images_are_named(pictures, capsys):
    flat(GREY).save(pictures / "good.png")
    for i in range(30):
        (pictures / f"{i}.png").write_bytes(b"")
    load(pictures)
    err = capsys.readouterr().err
    assert err.count(".png:") == 10 and "skipped 30 of 31" in err


def test_a_folder_of_broken_images_alone_is_refused(pictures):
    (pictures / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 images"):
        load(pictures)


def test_a_folder_without_images_says_what_was_looked_for_and_found(pictures):
    with pytest.raises(ValueError, match=r"no images in .*pictures.*\.png.*\.tif.*found no files"):
        load(pictures)
    for name in ("a.txt", "b.txt", "c.npy"):
        (pictures / name).write_text("")
    with pytest.raises(ValueError, match=r"found 2 \.txt, 1 \.npy"):
        load(pictures)


def test_an_empty_held_out_split_is_refused(pictures):
    for split in ("train", "test"):
        (pictures / split).mkdir()
    flat(GREY).save(pictures / "train" / "x.png")
    with pytest.raises(ValueError, match="no images in .*test"):
        load(pictures)


def test_folder_links_that_lead_in_a_circle_are_followed_once(pictures):
    (pictures / "a").mkdir()
    flat(GREY).save(pictures / "a" / "x.png")
    try:
        (pictures / "a" / "again").symlink_to(pictures, target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no links")
    assert len(load(pictures)) == 1


def test_a_folder_is_decoded_anew_when_a_file_changes_and_only_then(pictures):
    flat((1, 2, 3)).save(pictures / "x.png")
    os.utime(pictures / "x.png", ns=(10**18, 10**18))
    assert load(pictures).images[0, :, 0, 0].tolist() == [1, 2, 3]
    (entry,) = (pictures.parent / "cache").iterdir()
    stamp = entry.stat().st_mtime_ns
    load(pictures)
    assert entry.stat().st_mtime_ns == stamp
    flat((4, 2, 3)).save(pictures / "x.png")  # as large as before, later
    assert load(pictures).images[0, :, 0, 0].tolist() == [4, 2, 3]


@pytest.mark.parametrize("name, words", [
    ("minst", "did you mean mnist"), ("MNIST", "did you mean mnist"), ("fasion", "mean fashion"),
    ("no/such/folder", "no/such/folder"), ("", "digits, mnist, fashion, cifar10"),
])
def test_an_unknown_set_is_named_with_what_there_is(name, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        data.load_images(name, cache_dir=tmp_path)


def test_a_file_is_no_set(pictures):
    flat(GREY).save(pictures / "x.png")
    with pytest.raises(ValueError, match="is a file"):
        load(pictures / "x.png")


@pytest.mark.parametrize("channels", [2, 4, -1])
def test_channels_are_as_in_the_data_or_one_or_three(channels, tmp_path):
    with pytest.raises(ValueError, match=f"channels is {channels}"):
        data.load_images("digits", channels=channels, cache_dir=tmp_path)


# ---- Images ----


def test_the_fingerprint_follows_pixels_and_shape_alone():
    pixels = torch.from_numpy(noise(0, 6, 1, 4, 4))
    one = data.Images(pixels, name="a").fingerprint
    assert one == data.Images(pixels.clone(), torch.zeros(6), name="b").fingerprint
    changed = pixels.clone()
    changed[5, 0, 3, 3] ^= 1
    others = [changed, pixels.view(6, 1, 2, 8), pixels.flip(0), pixels[:5]]
    assert len({one, *(data.Images(p).fingerprint for p in others)}) == 5


def test_a_subset_is_drawn_once_and_for_all_with_its_labels():
    pixels = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1)
    held_out = data.Images(pixels[:7])
    images = data.Images(pixels, torch.arange(100), held_out, "set")
    some = data.subset(images, 30)
    torch.manual_seed(5)
    assert torch.equal(some.images, data.subset(images, 30).images)
    assert len(set(some.labels.tolist())) == 30 and some.labels.max() > 40
    assert torch.equal(some.images.flatten().long(), some.labels)
    assert set(data.subset(images, 10).labels.tolist()) <= set(some.labels.tolist())
    assert some.test is held_out and some.name == "set"
    assert data.subset(images, 0) is images
    assert data.subset(data.Images(pixels), 3).labels is None


@pytest.mark.parametrize("n", [-1, 101])
def test_a_subset_larger_than_the_set_is_refused(n):
    with pytest.raises(ValueError, match=f"subset is {n}.*100 images"):
        data.subset(data.Images(torch.zeros(100, 1, 2, 2, dtype=torch.uint8)), n)


@pytest.mark.parametrize("n, left", [(0, 100), (30, 30)])
def test_a_subset_of_less_than_a_batch_is_refused(n, left):
    images = data.Images(torch.zeros(100, 1, 2, 2, dtype=torch.uint8))
    data.subset(images, n, batch_size=left)
    with pytest.raises(ValueError, match=f"batch_size is {left + 1}.*only {left} training images"):
        data.subset(images, n, batch_size=left + 1)


def test_bytes_survive_the_way_to_floats_and_back():
    u8 = torch.arange(256, dtype=torch.uint8)
    x = data.to_float(u8)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1 and x[51] == pytest.approx(-0.6)
    assert torch.equal(data.to_uint8(x), u8)
    assert u8[3] == 3  # untouched


def test_floats_are_rounded_to_bytes_and_clamped():
    step = 1 / 127.5
    x = torch.tensor([-7, -1 + 0.4 * step, -1 + 0.6 * step, 1 - 0.6 * step, 7])
    kept = x.clone()
    assert data.to_uint8(x).tolist() == [0, 0, 1, 254, 255]
    assert torch.equal(x, kept)
    assert data.to_uint8(torch.tensor([0.5], dtype=torch.bfloat16)).tolist() == [191]


# ---- batches ----

NUMBERED = torch.arange(103, dtype=torch.uint8).view(103, 1, 1, 1)


def drawn(n, batch_size=10, seed=0, **kwargs):
    """The numbers of the images in the next n batches."""
    stream = itertools.islice(data.batches(NUMBERED, batch_size, seed, **kwargs), n)
    return [data.to_uint8(x).flatten().tolist() for x in stream]


def test_batches_are_floats_of_the_images():
    pixels = torch.from_numpy(noise(0, 8, 3, 4, 4))
    x = next(data.batches(data.Images(pixels), 8, 0))
    assert x.dtype == torch.float32 and x.shape == (8, 3, 4, 4) and x.is_contiguous()
    assert {image.numpy().tobytes() for image in data.to_uint8(x)} == {
        image.numpy().tobytes() for image in pixels
    }


def test_an_epoch_shows_each_image_at_most_once_and_drops_the_tail():
    stream = drawn(20)
    for epoch in (stream[:10], stream[10:]):
        counts = collections.Counter(sum(epoch, []))
        assert len(counts) == 100 and set(counts.values()) == {1}
    assert stream[:10] != stream[10:]


def test_every_image_is_seen_in_time():
    assert len(set(sum(drawn(100), []))) == 103


@pytest.mark.parametrize("start", [0, 1, 9, 10, 11, 25, 10**9])
def test_batches_go_on_at_any_start(start):
    here = drawn(12, start=start)
    assert here[3:] == drawn(9, start=start + 3)
    if start < 30:
        assert here == drawn(start + 12)[start:]


def test_the_order_follows_from_seed_and_epoch_alone():
    torch.manual_seed(3)
    first = drawn(10, seed=1)
    torch.manual_seed(4)
    assert drawn(10, seed=1) == first
    assert drawn(10, seed=0, start=10) != first  # epoch 1 of seed 0 is not epoch 0 of seed 1
    assert drawn(10, seed=1 + 2**32) != first


def test_drawing_batches_leaves_the_default_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    drawn(3)
    assert torch.equal(torch.rand(1), expected)


def test_the_slices_of_all_ranks_make_up_the_global_batch():
    whole = drawn(15, batch_size=12, start=4)
    parts = [drawn(15, batch_size=12, start=4, rank=r, ranks=3) for r in range(3)]
    assert [sum(batch, []) for batch in zip(*parts)] == whole
    assert {len(batch) for part in parts for batch in part} == {4}


def test_a_batch_may_be_overwritten():
    stream = data.batches(NUMBERED, 103, 0)
    next(stream).zero_()
    assert NUMBERED.sum() == 103 * 102 // 2 and next(stream).unique().numel() == 103


@pytest.mark.parametrize("kwargs, words", [
    ({"batch_size": 104}, "batch_size is 104.*103 images"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"batch_size": 10, "ranks": 4}, "batch_size is 10.*4 ranks"),
    ({"batch_size": 10, "rank": 2, "ranks": 2}, "rank is 2"),
    ({"batch_size": 10, "start": -1}, "start is -1"),
])
def test_batches_that_cannot_be_drawn_are_refused_at_once(kwargs, words):
    with pytest.raises(ValueError, match=words):
        data.batches(NUMBERED, seed=0, **kwargs)


@pytest.mark.gpu
def test_batches_on_the_gpu_are_those_of_the_cpu():
    pixels = torch.from_numpy(noise(0, 50, 3, 4, 4))
    pairs = zip(data.batches(pixels, 8, 0), data.batches(pixels, 8, 0, device="cuda"))
    for cpu, gpu in itertools.islice(pairs, 14):
        assert gpu.is_cuda
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=0, atol=1e-6)


# ---- the cache ----


def counting(value):
    def make():
        make.calls += 1
        return {"value": torch.tensor(value), "name": "x", "n": 3}

    make.calls = 0
    return make


def test_the_cache_makes_a_thing_once_for_each_key_version_and_kind(tmp_path):
    make = counting([1.0, 2.0])
    for _ in range(2):
        value = data.cached(tmp_path / "deep" / "er", "kind", {"a": 1, "b": [2, 3]}, make)
        assert value["value"].tolist() == [1, 2] and value["name"] == "x" and value["n"] == 3
    assert make.calls == 1
    data.cached(tmp_path / "deep" / "er", "kind", {"b": [2, 3], "a": 1}, make)
    assert make.calls == 1
    data.cached(tmp_path / "deep" / "er", "kind", {"a": 1, "b": [2, 4]}, make)
    data.cached(tmp_path / "deep" / "er", "kind", {"a": 1, "b": [2, 3]}, make, version=2)
    data.cached(tmp_path / "deep" / "er", "other", {"a": 1, "b": [2, 3]}, make)
    assert make.calls == 4
    assert len(list((tmp_path / "deep" / "er").iterdir())) == 4


@pytest.mark.parametrize("spoil", [
    lambda f: f.write_bytes(f.read_bytes()[:100]),
    lambda f: f.write_bytes(b""),
    lambda f: f.write_bytes(b"text"),
    lambda f: torch.save({"key": "another", "value": {}}, f),
    lambda f: torch.save([1, 2], f),
], ids=["truncated", "empty", "text", "another key", "no dict"])
def test_a_damaged_entry_is_made_again(spoil, tmp_path):
    make = counting([1.0])
    data.cached(tmp_path, "kind", "key", make)
    (entry,) = tmp_path.iterdir()
    spoil(entry)
    assert data.cached(tmp_path, "kind", "key", make)["value"].tolist() == [1]
    assert data.cached(tmp_path, "kind", "key", make)["value"].tolist() == [1]
    assert make.calls == 2 and list(tmp_path.iterdir()) == [entry]


def test_a_cache_entry_cannot_run_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    data.cached(tmp_path, "kind", "key", counting([1.0]))
    (entry,) = tmp_path.iterdir()
    torch.save(Harmful(), entry)
    assert data.cached(tmp_path, "kind", "key", counting([1.0]))["value"].tolist() == [1]
    assert not (tmp_path / "harm").exists()


def test_a_cache_that_cannot_be_written_is_done_without_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    value = data.cached(tmp_path / "file" / "cache", "kind", "key", counting([1.0]))
    assert value["value"].tolist() == [1]
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_what_cannot_be_made_leaves_nothing_behind(tmp_path):
    def make():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        data.cached(tmp_path, "kind", "key", make)
    assert not list(tmp_path.iterdir())


def test_a_second_writer_in_the_midst_of_the_first_does_no_harm(tmp_path, capsys):
    class Interrupting:
        def __reduce__(self):  # called while torch.save writes
            assert data.cached(tmp_path, "kind", "key", make)["value"].tolist() == [1]
            return collections.OrderedDict, ()

    make = counting([1.0])
    data.cached(tmp_path, "kind", "key", lambda: make() | {"late": Interrupting()})
    assert make.calls == 2 and len(list(tmp_path.iterdir())) == 1
    assert data.cached(tmp_path, "kind", "key", make)["value"].tolist() == [1]
    assert make.calls == 2 and not capsys.readouterr().err


def test_two_processes_may_build_the_same_cache_at_once(tmp_path):
    code = (
        "import sys, time, torch; from common import data\n"
        "def make():\n"
        "    print('making', flush=True); sys.stdin.readline()\n"
        "    return {'x': torch.arange(100000)}\n"
        f"assert data.cached({str(tmp_path)!r}, 'kind', 'key', make)['x'].sum() == 4999950000"
    )
    run = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(run, cwd=ROOT, **pipes) for _ in range(2)]
    for process in both:  # each stands inside make before either may go on
        assert process.stdout.readline() == "making\n"
    for process in both:
        process.communicate("\n")
        assert process.returncode == 0
    assert len(list(tmp_path.iterdir())) == 1
    kept = data.cached(tmp_path, "kind", "key", counting([1.0]))
    assert torch.equal(kept["x"], torch.arange(100000))

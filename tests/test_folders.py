"""Pictures on disk: what counts as one, splits and classes, pairs, domains, decoding, the cache."""
import errno
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, features

from common import data, folders, terminal

COLOUR = (40, 100, 200)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    return folder


def load(folder, image_size=4, channels=0):
    return data.load_images(folder, "none", image_size, channels, folder.parent / "cache")


def pairs(folder, image_size=4):
    return data.load_pairs(folder, "none", image_size, folder.parent / "cache")


def domains(folder, image_size=4):
    return data.load_domains(folder, "none", image_size, folder.parent / "cache")


def flat(color, mode="RGB", size=(4, 4)):
    return Image.new(mode, size, color)


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def fill(root, **levels):
    """Grey pictures of one level each at root/PATH.png; path with __ for /."""
    for name, level in levels.items():
        path = root / (name.replace("__", "/") + ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        flat(level, "L").save(path)


def tree(root, *names):
    """A picture x.png in each folder, its level the position of the folder, from 1 on."""
    for grey, name in enumerate(names, 1):
        (root / name).mkdir(parents=True, exist_ok=True)
        flat(grey, "L").save(root / name / "x.png")


def level(images):
    return None if images is None else images.images[:, 0, 0, 0].tolist()


# ---- classes and splits ----


def test_a_flat_folder_has_no_labels_and_is_read_in_order_of_names(pictures):
    for name, red in (("b.png", 20), ("a.png", 10), ("c.PNG", 30), (".hidden.png", 40)):
        flat((red, 0, 0)).save(pictures / name, "PNG")
    (pictures / "notes.txt").write_text("not an image")
    images = load(pictures)
    assert images.labels is None and images.test is None and images.name == str(pictures)
    assert images.images.shape == (3, 3, 4, 4) and level(images) == [10, 20, 30]


def test_class_folders_give_labels_in_order_of_names(pictures):
    tree(pictures, "dog", "cat", "cat/more")
    images = load(pictures)
    assert dict(zip(level(images), images.labels.tolist())) == {1: 1, 2: 0, 3: 0}
    assert images.labels.dtype == torch.int64


def test_one_folder_inside_is_no_class(pictures):
    tree(pictures, "img")
    assert load(pictures).labels is None


@pytest.mark.parametrize("train, test", [
    ("train", "test"), ("Train", "Test"), ("training", "testing"), ("train", "val"),
    ("train", "valid"), ("TRAINING", "Validation"),
])
def test_splits_are_found_by_what_people_call_them_with_common_labels(train, test, pictures):
    tree(pictures, f"{train}/a", f"{test}/b", f"{train}/c", f"{test}/c")
    images = load(pictures)
    assert level(images) == [1, 3] and images.labels.tolist() == [0, 2]
    assert level(images.test) == [2, 4] and images.test.labels.tolist() == [1, 2]


@pytest.mark.parametrize("names, held_out", [
    (("train", "test", "val"), [2]), (("train", "val", "test"), [3]), (("train",), None),
])
def test_where_test_and_val_are_there_test_is_held_out(names, held_out, pictures, capsys):
    tree(pictures, *names, ".thumbnails")
    images = load(pictures)
    assert level(images) == [1] and level(images.test) == held_out
    assert not capsys.readouterr().err


def test_folders_beside_the_splits_are_named_and_not_used(pictures, capsys):
    tree(pictures, "train", "test", "unlabelled")
    images = load(pictures)
    assert level(images) == [1] and level(images.test) == [2]
    assert "not used beside its splits: unlabelled" in capsys.readouterr().err


def test_a_class_may_be_called_train(pictures):
    tree(pictures, "bus", "train", "bullet train")
    images = load(pictures)
    assert images.labels.tolist() == [0, 1, 2] and images.test is None


@pytest.mark.parametrize("names, advice", [
    (("trainA", "trainB", "testA", "testB"), "pass one of them, such as .*pictures/trainA"),
    (("testa", "trainb"), "pass one of them, such as .*pictures/trainb"),
    (("trainA",), "pass one of them, such as .*pictures/trainA"),
    (("train_a", "train_b"), "pass one of them, such as .*pictures/train_a"),
    (("val2017", "train2017"), "such as .*pictures/train2017"),
    (("seg_test", "seg_train"), "such as .*pictures/seg_train"),
    (("TrainImages", "TestImages", "labels"), "such as .*pictures/TrainImages"),
    (("cats/train", "cats/test", "dogs/train"), "pass one of them, such as .*pictures/cats/train"),
    (("train/train", "train/test", "test"), "pass one of them, such as .*train/train"),
    (("test",), "holds test and no train; to use it, pass .*pictures/test"),
    (("test", "cat", "dog"), "holds test and no train"),
    (("val", "Test"), "holds Test and no train"),
])
def test_what_looks_like_splits_and_is_not_understood_is_refused(
    names, advice, pictures, capsys
):
    tree(pictures, *names)
    with pytest.raises(ValueError, match=advice) as e:
        load(pictures)
    assert "\n" not in str(e.value) and not capsys.readouterr().err


def test_the_only_folder_of_an_unpacked_archive_is_entered(pictures):
    tree(pictures, "set-1.0/data/train", "set-1.0/data/test")
    (pictures / "__MACOSX").mkdir()
    images = load(pictures)
    assert level(images) == [1] and level(images.test) == [2]


def test_an_empty_held_out_split_is_refused(pictures):
    tree(pictures, "train")
    (pictures / "test").mkdir()
    with pytest.raises(ValueError, match="no images in .*test"):
        load(pictures)


@pytest.mark.parametrize("name", [
    ".git", ".x/cat", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found",
])
def test_hidden_and_system_folders_are_no_data(name, pictures):
    tree(pictures, "cat", "dog", f"cat/{name}", name)
    images = load(pictures)
    assert level(images) == [1, 2] and images.labels.tolist() == [0, 1]


def test_a_run_inside_a_folder_of_images_is_no_data(pictures):
    fill(pictures, a=1, b=2)
    run = pictures / "runs" / "icr_gan-1"
    fill(run, samples=9, samples__000100=9)
    for name, content in (("args.json", json.dumps({"script": "icr_gan"})), ("log.csv", "step\n")):
        (run / name).write_text(content)
    fill(pictures / "runs" / "report", curves=9)
    (pictures / "runs" / "report" / "table.md").write_text("")
    images = load(pictures)
    assert level(images) == [1, 2] and images.labels is None


def test_folder_links_that_lead_in_a_circle_are_followed_once(pictures):
    tree(pictures, "a")
    try:
        (pictures / "a" / "again").symlink_to(pictures, target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no links")
    assert len(load(pictures)) == 1


# ---- pairs ----


def side_by_side(left, right, size=(4, 4)):
    image = Image.new("RGB", (2 * size[0], size[1]), left)
    image.paste(right, (size[0], 0, 2 * size[0], size[1]))
    return image


def test_halves_of_a_picture_are_a_pair(pictures):
    for split, green in (("train", 7), ("val", 8), ("test", 9)):
        (pictures / split).mkdir()
        side_by_side((1, green, 3), (4, 5, green)).save(pictures / split / "x.png")
    found = pairs(pictures)
    assert found.images.shape == (1, 6, 4, 4) and found.channels == (3, 3)
    assert found.images[0, :, 2, 2].tolist() == [1, 7, 3, 4, 5, 7]
    assert found.test.images[0, :, 2, 2].tolist() == [1, 9, 3, 4, 5, 9]
    assert (found.images == found.images[..., :1, :1]).all()  # nothing spills over the seam


def test_halves_of_any_shape_are_resized_whole(pictures):
    pixels = noise(0, 30, 40, 3)
    Image.fromarray(pixels).save(pictures / "x.png")
    found = pairs(pictures, 16).images[0]
    for part, half in ((found[:3], pixels[:, :20]), (found[3:], pixels[:, 20:])):
        expected = Image.fromarray(half).resize((16, 16), Image.Resampling.BICUBIC)
        assert np.array_equal(part.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_sides_may_differ_in_channels_and_splits_agree_on_them(pictures):
    for split, left in (("train", (9, 9, 9)), ("test", (9, 8, 7))):
        (pictures / split).mkdir()
        side_by_side(left, (5, 5, 5)).save(pictures / split / "x.png")
    found = pairs(pictures)
    assert found.channels == found.test.channels == (3, 1)
    assert found.images[0, :, 0, 0].tolist() == [9, 9, 9, 5]
    assert found.test.images[0, :, 0, 0].tolist() == [9, 8, 7, 5]


@pytest.mark.parametrize("layout", [
    "{split}{SIDE}", "{split}_{side}", "{split}/{SIDE}", "{SIDE}/{split}", "{side}/{split}",
])
def test_folders_with_equal_names_are_pairs(layout, pictures, capsys):
    for split, start in (("train", 0), ("test", 100)):
        for side, add in (("a", 0), ("b", 50)):
            folder = pictures / layout.format(split=split, side=side, SIDE=side.upper())
            fill(folder, one=start + add + 1, two__three=start + add + 2)
    found = pairs(pictures)
    assert found.images[:, :, 0, 0].tolist() == [[1, 51], [2, 52]] and found.channels == (1, 1)
    assert found.test.images[:, :, 0, 0].tolist() == [[101, 151], [102, 152]]
    assert not capsys.readouterr().err


def test_a_and_b_alone_are_a_training_split_and_endings_may_differ(pictures):
    fill(pictures / "A", x=1, y=2)
    (pictures / "B").mkdir()
    for name, grey in (("x", 51), ("y", 52)):
        flat(grey, "L").save(pictures / "B" / f"{name}.bmp")
    found = pairs(pictures)
    assert found.images[:, :, 0, 0].tolist() == [[1, 51], [2, 52]] and found.test is None


def test_what_has_no_partner_or_a_broken_one_is_passed_over(pictures, capsys):
    fill(pictures / "A", a=1, b=2, c=3, d=4, e=5)
    fill(pictures / "B", a=51, b=52, c=53, d=54, f=55)
    (pictures / "A" / "b.png").write_bytes(b"")
    (pictures / "B" / "d.png").write_bytes(b"")
    assert pairs(pictures).images[:, :, 0, 0].tolist() == [[1, 51], [3, 53]]
    err = capsys.readouterr().err
    assert "A/b.png: no image" in err and "B/d.png: no image" in err
    assert "2 used, 4 passed over: 2 without a partner, 2 broken .png" in err


@pytest.mark.parametrize("names, words", [
    (("trainA/x", "trainB/y"), "no picture in .*trainA has the name of one in .*B.*two domains"),
    (("trainA/x",), "holds trainA; wanted A and B"),
    (("trainA/x", "trainB/x", "testA/x"), "holds testA, trainA, trainB; wanted A and B"),
    (("testA/x", "testB/x"), "wanted A and B, and both of each split"),
    (("train2017/x", "val2017/x"), "train2017, val2017, which are no classes"),
])
def test_pairs_that_are_none_are_refused(names, words, pictures):
    fill(pictures, **dict.fromkeys(names, 1))
    with pytest.raises(ValueError, match=words):
        pairs(pictures)


def test_pictures_that_differ_in_the_ending_alone_are_no_pairs(pictures):
    fill(pictures, A__x=1, B__x=2)
    flat(3, "L").save(pictures / "A" / "x.bmp")
    with pytest.raises(ValueError, match="A has pictures whose names differ in the ending alone"):
        pairs(pictures)


def test_a_picture_of_odd_width_is_no_pair(pictures, capsys):
    side_by_side((1, 1, 1), (2, 2, 2)).save(pictures / "a.png")
    flat((1, 1, 1), size=(7, 4)).save(pictures / "b.png")
    assert len(pairs(pictures)) == 1
    assert "b.png: 7 x 4 pixels cannot be halved" in capsys.readouterr().err


# ---- domains ----


def test_domains_are_two_sets_with_their_test_splits_and_equal_channels(pictures):
    for i, name in enumerate(("trainA", "trainB", "testA", "testB")):
        (pictures / name).mkdir()
        for j in range(i + 1):
            flat(10 * i + j, "L").save(pictures / name / f"{j}.png")
    flat(COLOUR).save(pictures / "testB" / "9.png")
    a, b = domains(pictures)
    assert level(a) == [0] and level(b) == [10, 11]
    assert level(a.test) == [20, 21, 22] and level(b.test) == [30, 31, 32, 33, COLOUR[0]]
    assert {s.channels for s in (a, b, a.test, b.test)} == {3}
    assert a.counterpart is None and b.counterpart is None


def test_domains_are_fitted_like_images(pictures):
    pixels = noise(4, 5, 9, 3)
    for name in ("A", "B"):
        (pictures / name).mkdir()
        Image.fromarray(pixels).save(pictures / name / "x.png")
    a, b = domains(pictures, 5)
    assert torch.equal(a.images, load(pictures / "A", 5).images) and torch.equal(a.images, b.images)
    assert np.array_equal(a.images[0].permute(1, 2, 0).numpy(), pixels[:, 2:7])


def test_a_folder_without_two_domains_is_refused_with_the_layout(pictures):
    tree(pictures, "train", "test")
    with pytest.raises(ValueError, match="no two domains; wanted trainA, trainB, testA and testB"):
        domains(pictures)


# ---- pictures of every kind ----


@pytest.mark.parametrize("name, image, expected", [
    ("x.png", flat(100, "L"), (100, 100, 100)),
    ("x.png", flat(1, "1"), (255, 255, 255)),
    ("x.png", flat(COLOUR, "RGB"), COLOUR),
    ("x.png", flat((*COLOUR, 255), "RGBA"), COLOUR),
    ("x.png", flat((*COLOUR, 0), "RGBA"), (255, 255, 255)),
    ("x.png", flat((0, 255, 100, 51), "RGBA"), (204, 255, 224)),  # 0.2 of it, 0.8 of white
    ("x.png", flat((0, 51), "LA"), (204, 204, 204)),
    ("x.png", flat(COLOUR).quantize(4), COLOUR),
    ("x.gif", flat(COLOUR).quantize(4), COLOUR),
    ("x.bmp", flat(COLOUR), COLOUR),
    ("x.ppm", flat(COLOUR), COLOUR),
    ("x.webp", flat(COLOUR), "close"),
    ("x.jpg", flat(COLOUR), "close"),
    ("x.jfif", flat(COLOUR), "close"),
    ("x.avif", flat(COLOUR), "close"),
    ("x.jp2", flat(COLOUR), "close"),
    ("x.jpg", flat((255, 0, 0, 0), "CMYK"), "cyan"),
    ("x.tif", flat((255, 0, 0, 0), "CMYK"), "cyan"),
    ("x.png", Image.fromarray(np.full((4, 4), 257 * 200, np.uint16)), (200, 200, 200)),
    ("x.png", Image.fromarray(np.full((4, 4), 65535, np.uint16)), (255, 255, 255)),
    ("x.tif", Image.fromarray(np.full((4, 4), 257 * 99, np.int32)), (99, 99, 99)),
])
def test_every_kind_of_file_becomes_the_colour_that_a_viewer_shows(name, image, expected, pictures):
    if name.endswith("avif") and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    image.save(pictures / name)
    pixels = load(pictures, channels=3).images[0]
    if expected == "cyan":
        assert pixels[0].max() < 60 and pixels[1:].min() > 120
    else:
        wanted = torch.tensor(COLOUR if expected == "close" else expected).view(3, 1, 1)
        assert (pixels.int() - wanted).abs().max() <= (6 if expected == "close" else 0)


def test_pictures_of_floats_are_passed_over_not_read_as_black(pictures, capsys):
    flat(COLOUR).save(pictures / "a.png")
    Image.fromarray(np.full((4, 4), 0.2, np.float32)).save(pictures / "x.tif")
    assert len(load(pictures)) == 1
    assert "x.tif: its pixels are floats" in capsys.readouterr().err


def test_the_transparent_colour_of_palette_and_plain_files_is_white(pictures):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(pictures / "palette.png", transparency=1)
    flat(COLOUR).save(pictures / "plain.png", transparency=COLOUR)
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


# ---- size ----


@pytest.mark.parametrize("size", [(6, 4), (7, 4), (4, 7)])
def test_the_centre_is_cropped_without_resizing_where_the_shorter_side_fits(size, pictures):
    pixels = noise(4, size[1], size[0], 3)
    Image.fromarray(pixels).save(pictures / "x.png")
    left, top = (size[0] - 4) // 2, (size[1] - 4) // 2
    expected = pixels[top : top + 4, left : left + 4].transpose(2, 0, 1)
    assert np.array_equal(load(pictures).images[0].numpy(), expected)


@pytest.mark.parametrize("mode, background", [
    ("L", 0), ("L", 255), ("L", 17), ("RGB", (9, 60, 250)),
])
def test_pictures_of_28_pixels_are_padded_with_their_background(mode, background, pictures):
    pixels = np.asarray(flat(background, mode, (28, 28))).copy()
    pixels[3:, 5:15] = noise(1, 25, 10, *pixels.shape[2:])  # reaches the lower rim
    Image.fromarray(pixels).save(pictures / "x.png")
    expected = np.asarray(flat(background, mode, (32, 32))).copy()
    expected[2:30, 2:30] = pixels
    expected = torch.from_numpy(expected.reshape(32, 32, -1)).permute(2, 0, 1)
    for size in (32, 16, 64):
        found = load(pictures, size).images[0]
        if size == 32:
            assert torch.equal(found, expected)
        else:
            image = Image.fromarray(expected.permute(1, 2, 0).squeeze().numpy())
            resized = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
            assert np.array_equal(found.permute(1, 2, 0).squeeze().numpy(), resized)


def test_mnist_in_a_folder_is_the_named_set(data_dir, pictures):
    mnist = data.load_images("mnist", data_dir, cache_dir=pictures.parent / "cache")
    for i in range(500):
        image = mnist.test.images[i, 0, 2:30, 2:30].contiguous().numpy()
        Image.fromarray(image).save(pictures / f"{i:03d}.png")
    assert torch.equal(load(pictures, 32).images, mnist.test.images[:500])


def test_shrinking_is_antialiased(pictures):
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    Image.fromarray(checks.astype(np.uint8)).save(pictures / "x.png")
    pixels = load(pictures, 8).images.float()
    assert (pixels - 127.5).abs().max() < 4


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size_without_harm(pictures):
    image = Image.fromarray(noise(0, 60, 80, 3)).resize((1600, 1200), Image.Resampling.BICUBIC)
    image.save(pictures / "x.jpg", quality=95)
    middle = image.crop((200, 0, 1400, 1200)).resize((64, 64), Image.Resampling.BICUBIC)
    found = load(pictures, 64).images[0].permute(1, 2, 0).int().numpy()
    assert np.abs(found - np.asarray(middle)).max() <= 3


def test_tiny_and_thin_pictures_are_stretched(pictures):
    flat(COLOUR, size=(1, 1)).save(pictures / "a.png")
    flat(COLOUR, size=(1, 5000)).save(pictures / "b.png")
    images = load(pictures, 64).images
    assert images.shape == (2, 3, 64, 64)
    assert (images == torch.tensor(COLOUR).view(3, 1, 1)).all()


def test_100_megapixels_are_read_and_more_passed_over(pictures, capsys, recwarn, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 123456)  # Pillow's own limit, not ours to change
    Image.new("1", (10000, 10000), 1).save(pictures / "large.png")
    checked = b"IHDR" + struct.pack(">II5B", 20000, 20000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + checked + struct.pack(">I", zlib.crc32(checked))
    (pictures / "absurd.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT\0\0\0\0")
    images = load(pictures)
    assert images.images.shape == (1, 1, 4, 4) and (images.images == 255).all()
    err = capsys.readouterr().err
    assert "absurd.png: 20000 x 20000 pixels" in err and "1 used, 1 passed over" in err
    assert not len(recwarn) and Image.MAX_IMAGE_PIXELS == 123456


# ---- what is passed over ----


def test_broken_images_are_named_and_counted_also_from_the_cache(pictures, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "quiet", True)
    for c in "ab":
        (pictures / c).mkdir()
        flat(COLOUR).save(pictures / c / "good.png")
    Image.fromarray(noise(0, 9, 9, 3)).save(pictures / "a" / "cut.png")
    content = (pictures / "a" / "cut.png").read_bytes()
    (pictures / "a" / "cut.png").write_bytes(content[: len(content) // 2])
    (pictures / "a" / "empty.jpg").write_bytes(b"")
    (pictures / "b" / "text.bmp").write_text("text")
    for _ in range(2):
        images = load(pictures)
        assert images.images.shape == (2, 3, 4, 4) and images.labels.tolist() == [0, 1]
        lines = capsys.readouterr().err.splitlines()
        for line, name in zip(lines, ("a/cut.png", "a/empty.jpg", "b/text.bmp")):
            assert f"{name}: " in line
        assert "2 used, 3 passed over" in lines[3] and "1 broken .jpg" in lines[3]
        assert len(lines) == 4


def test_files_of_other_kinds_are_counted_by_ending_in_one_line(pictures, capsys):
    for i in range(3):
        flat(COLOUR).save(pictures / f"{i}.png")
    flat(COLOUR).save(pictures / "without", "PNG")
    for name in ("a.heic", "b.heic", "c.HEIC", "notes.txt", "LICENSE"):
        (pictures / name).write_text("what this holds is no image")
    for _ in range(2):
        assert len(load(pictures)) == 4
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert "4 used, 5 passed over: 3 .heic, 1 .txt, 1 without ending" in line


def test_nothing_is_said_where_every_file_was_used(pictures, capsys):
    fill(pictures, a=1, b=2)
    load(pictures)
    assert not capsys.readouterr().err


def test_no_more_than_ten_broken_images_are_named(pictures, capsys):
    flat(COLOUR).save(pictures / "good.png")
    for i in range(30):
        (pictures / f"{i}.png").write_bytes(b"")
    load(pictures)
    err = capsys.readouterr().err
    assert err.count(".png: ") == 10 and "1 used, 30 passed over: 30 broken .png" in err


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


def test_a_file_is_no_set(pictures):
    fill(pictures, x=1)
    with pytest.raises(ValueError, match="is a file"):
        load(pictures / "x.png")


# ---- the cache ----


def test_a_folder_is_decoded_anew_when_a_file_changes_and_only_then(pictures, monkeypatch):
    flat((1, 2, 3)).save(pictures / "x.png")
    os.utime(pictures / "x.png", ns=(10**18, 10**18))
    assert load(pictures).images[0, :, 0, 0].tolist() == [1, 2, 3]
    with monkeypatch.context() as m:
        m.setattr(folders, "_decode", None)
        load(pictures)
    size = (pictures / "x.png").stat().st_size
    flat((4, 2, 3)).save(pictures / "x.png")
    os.utime(pictures / "x.png", ns=(10**18, 10**18))  # in place, as large, of the same time
    assert (pictures / "x.png").stat().st_size == size
    assert load(pictures).images[0, :, 0, 0].tolist() == [4, 2, 3]


def test_another_size_and_another_way_of_reading_are_entries_of_their_own(pictures):
    pixels = noise(0, 30, 40, 3)
    Image.fromarray(pixels).save(pictures / "x.png")
    small, large = load(pictures, 8), load(pictures, 16)
    middle = Image.fromarray(pixels[:, 5:35]).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(large.images[0].permute(1, 2, 0).numpy(), np.asarray(middle))
    assert small.images.shape == (1, 3, 8, 8) and pairs(pictures, 16).channels == (3, 3)


def test_folders_that_differ_in_where_they_lie_alone_are_two_entries(tmp_path):
    for name, grey in (("black", 10), ("white", 20)):
        (tmp_path / name).mkdir()
        flat(grey, "L").save(tmp_path / name / "x.png")
        os.utime(tmp_path / name / "x.png", ns=(10**18, 10**18))
    sizes = {(tmp_path / name / "x.png").stat().st_size for name in ("black", "white")}
    assert len(sizes) == 1
    assert [level(load(tmp_path / name)) for name in ("black", "white")] == [[10], [20]]


def test_a_folder_that_took_the_place_of_another_is_decoded_anew(pictures):
    fill(pictures, x=10)
    os.utime(pictures / "x.png", ns=(10**18, 10**18))
    assert level(load(pictures)) == [10]
    fill(pictures.parent / "other", x=20)
    os.utime(pictures.parent / "other" / "x.png", ns=(10**18, 10**18))
    pictures.rename(pictures.parent / "away")
    (pictures.parent / "other").rename(pictures)
    assert level(load(pictures)) == [20]


@pytest.mark.parametrize("error", [
    MemoryError(),
    OSError("out of memory error when reading image file"),
    OSError(errno.EIO, "I/O error"),
], ids=["MemoryError", "the decoder's", "I/O"])
def test_a_failure_that_may_pass_is_raised_and_not_kept(error, pictures, monkeypatch):
    fill(pictures, a=1, b=2)

    def fail(*args):
        raise error

    with monkeypatch.context() as m:
        if isinstance(error, OSError) and error.errno:
            m.setattr(Path, "read_bytes", fail)
        else:
            m.setattr(ImageFile.ImageFile, "load", fail)
        with pytest.raises(type(error)):
            load(pictures)
    assert level(load(pictures)) == [1, 2]

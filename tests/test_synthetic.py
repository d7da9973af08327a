"""Built-in sets: the same everywhere, balanced, no image twice."""
import pytest
import torch
from torch.nn import functional as F

from common import synthetic


def test_digits_follow_from_their_seed_alone():
    torch.manual_seed(1)
    images, labels = synthetic.digits(50, seed=7)
    torch.manual_seed(2)
    again, _ = synthetic.digits(50, seed=7)
    other, _ = synthetic.digits(50, seed=8)
    assert images.shape == (50, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.shape == (50,) and labels.dtype == torch.int64
    assert torch.equal(images, again)
    assert not torch.equal(images, other)


def test_drawing_digits_leaves_the_default_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    synthetic.digits(10, seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_digits_do_not_depend_on_the_number_of_threads():
    one, _ = synthetic.digits(1000, seed=0)
    torch.set_num_threads(2)
    try:
        two, _ = synthetic.digits(1000, seed=0)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one, two)


def test_fewer_digits_are_a_prefix_of_more():
    few, labels = synthetic.digits(7, seed=0)
    more, more_labels = synthetic.digits(1003, seed=0)
    assert torch.equal(few, more[:7]) and torch.equal(labels, more_labels[:7])


def test_any_hundred_digits_in_a_row_are_balanced():
    _, labels = synthetic.digits(1050, seed=0)
    assert labels[:100].bincount().tolist() == [10] * 10
    assert labels[950:].bincount().tolist() == [10] * 10


def test_a_digit_drawn_twice_is_drawn_anew(monkeypatch):
    draws = []
    draw = synthetic._draw

    def twins(field, labels, generator):
        images = draw(field, labels, generator)
        if len(images) > 1:
            images[13] = images[3]
        draws.append(images)
        return images

    monkeypatch.setattr(synthetic, "_draw", twins)
    images, _ = synthetic.digits(20, seed=0)
    assert len({image.numpy().tobytes() for image in images}) == 20
    assert [len(d) for d in draws] == [synthetic.CHUNK, 1]
    assert torch.equal(images[13], draws[1][0])


def test_no_stretch_of_digits_repeats_an_earlier_one(monkeypatch):
    sizes = []
    draw = synthetic._draw
    monkeypatch.setattr(synthetic, "_draw", lambda *a: sizes.append(len(a[1])) or draw(*a))
    synthetic.digits(synthetic.CHUNK + 10, seed=0)
    assert sizes == [synthetic.CHUNK] * 2  # single ones would be drawn in place of twins


def test_digits_are_white_on_black_and_stand_clear_of_the_corners():
    images, labels = synthetic.digits(1000, seed=0)
    assert (images.flatten(1).amin(1) == 0).all()
    assert (images.flatten(1).amax(1) >= 120).all()
    assert images.float().mean() < 60
    for corner in (images[..., :3, :3], images[..., :3, -3:], images[..., -3:, :3]):
        assert (corner.flatten(1).amax(1) > 0).float().mean() < 0.02


def test_digits_of_a_class_resemble_each_other_more_than_other_classes():
    """Nearest class mean: chance is 0.1; a real but learnable task lies well between it and 1."""
    images, labels = synthetic.digits(3000, seed=0)
    x = images.flatten(1).float()
    x = x / x.norm(dim=1, keepdim=True)
    train, test = x[:2000], x[2000:]
    means = torch.stack([train[labels[:2000] == c].mean(0) for c in range(10)])
    right = (torch.cdist(test, means).argmin(1) == labels[2000:]).float().mean().item()
    assert 0.6 < right < 0.97, right


def test_generators_differ_by_the_order_of_their_numbers():
    draws = {
        torch.rand(1, generator=synthetic.generator(*numbers)).item()
        for numbers in ((0, 1), (1, 0), (0,), (1,), (0, 0), (2**32, 0))
    }
    assert len(draws) == 6


PAIRS = [synthetic.blueprints, synthetic.stripes]


@pytest.mark.parametrize("draw", PAIRS)
def test_pairs_follow_from_their_seed_alone(draw):
    torch.manual_seed(1)
    first, second = draw(3, 7)
    torch.manual_seed(2)
    expected = torch.rand(3)
    torch.manual_seed(2)
    again, same = draw(3, 7)
    assert torch.equal(torch.rand(3), expected)  # the default generator is left alone
    other, _ = draw(3, 8)
    assert first.shape == second.shape == (3, 3, 64, 64)
    assert first.dtype == second.dtype == torch.uint8
    assert torch.equal(first, again) and torch.equal(second, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("draw", PAIRS)
def test_fewer_pairs_are_a_prefix_of_more(draw):
    for few, more in zip(draw(2, 0), draw(synthetic.SCENES + 3, 0)):
        assert torch.equal(few, more[:2])
        assert len(more.flatten(1).unique(dim=0)) == len(more)


@pytest.mark.parametrize("draw", PAIRS)
def test_pairs_do_not_depend_on_the_number_of_threads(draw):
    one = draw(2, 0)
    torch.set_num_threads(2)
    try:
        two = draw(2, 0)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


@pytest.mark.parametrize("draw", PAIRS)
def test_another_size_shows_the_same_scenes(draw):
    for small, large in zip(draw(20, 0, 64), draw(20, 0, 128)):
        assert large.shape == (20, 3, 128, 128)
        reduced = F.avg_pool2d(large.float(), 2)
        own = (reduced - small.float()).abs().mean()
        others = (reduced - small.roll(1, 0).float()).abs().mean()
        assert own < 8 < 24 < others, (own, others)


def kinds(labels):
    """Class of every pixel of label maps, [N, H, W]; fails for a colour that is no class."""
    colours = synthetic._colours(synthetic.LABELS)
    matches = (labels.unsqueeze(1) == colours.view(1, -1, 3, 1, 1)).all(2)
    assert (matches.sum(1) == 1).all()
    return matches.int().argmax(1)


def test_label_maps_have_ten_colours_and_every_house_its_walls_windows_and_door():
    found = F.one_hot(kinds(synthetic.blueprints(40, 0)[0]), 10).flatten(1, 2).sum(1)
    assert (found.sum(0) > 0).all()
    always = [synthetic.WALL, synthetic.ROOF, synthetic.WINDOW, synthetic.DOOR, synthetic.CORNICE]
    assert (found[:, always] > 0).all()


def test_a_label_map_says_where_things_are_in_its_picture_and_not_which_colour_they_have():
    labels, pictures = synthetic.blueprints(60, 0)
    kind, pictures = kinds(labels), pictures.float()
    border = (kind[:, 1:] != kind[:, :-1]) & (kind[:, 1:] != synthetic.SKY)
    step = (pictures[:, :, 1:] - pictures[:, :, :-1]).abs().mean(1)
    other = step[border.roll(1, 0)].mean()  # of borders of another house
    assert step[border].mean() > 1.5 * other > step[~border].mean()
    wall = kind == synthetic.WALL
    colour = torch.stack([picture[:, here].mean(1) for picture, here in zip(pictures, wall)])
    assert (colour.std(0) > 20).all()


def test_stripes_darken_a_share_of_each_solid_and_nothing_else():
    plain, striped = (x.float() for x in synthetic.stripes(100, 0))
    darker = (plain - striped).amax(1)
    assert (striped - plain).amax() <= 0
    share = (darker > 30).float().mean((1, 2))
    assert (share > 0.01).all() and (share < 0.2).all()
    assert ((darker > 0) & (darker < 4)).float().mean() < 0.01  # no faint traces elsewhere

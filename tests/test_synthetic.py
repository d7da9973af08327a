"""Built-in sets: the same everywhere, balanced, no image twice."""
import torch

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

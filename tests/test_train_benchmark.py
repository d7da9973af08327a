"""tests/benchmarks/train.py on tiny networks: every variant of the CPU trains and is compared."""
import json
import re

import pytest
import torch

from tests.benchmarks import train
from tests.helpers import SCRIPTS, LinearCritic, script, tiny

TINY = "--width 4 --batch-size 4 --rounds 2 --round-s 0 --no-compile --device cpu".split()


def test_the_table_has_every_script_size_and_variant(tmp_path):
    path = tmp_path / "train.json"
    result = train.main([*TINY, "--json", str(path)])
    assert json.loads(path.read_text()) == result
    found = {(r["size"], r["script"], r["variant"]) for r in result["rows"] if r.get("ms", 0) > 0}
    variants = {name: ("loop", "eager", "bf16") if name in train.LOOPS else ("eager", "bf16") for name in SCRIPTS}
    assert found == {(size, name, v) for size in train.SIZES for name in SCRIPTS for v in variants[name]}
    rows = {(r["size"], r["script"], r["variant"]): r for r in result["rows"]}
    for name in train.LOOPS:
        assert rows["default", name, "eager"]["launches"] < rows["default", name, "loop"]["launches"]
    row = rows["default", "lsgan", "eager"]
    assert row["images_per_s"] == pytest.approx(4000 / row["ms"])
    assert "default lsgan: bf16 is so many times as fast as loop" in result["ratios"]


GREY = 200 / 127.5 - 1


@pytest.mark.parametrize(
    "name, loss_g, loss_d",
    [("lsgan", 0.5, 0.5), ("icr_gan", 0.5, 0.5), ("cn_lsgan", 1 + 0.5 * GREY**2, 1 + 3 * 2**2), ("wgan_gp", 0.0, 10.0)],
)
def test_the_straightforward_loop_has_the_losses_of_the_script(name, loss_g, loss_d):
    """Closed forms for D = 0, G = 0 and images of one grey; afterwards every weight of both has moved."""
    method = {"lambda_gp": 3.0, "gp_target": 2.0, "lambda_rec": 0.5} if name == "cn_lsgan" else {}
    pixels = torch.full((64, 1, 32, 32), 200, dtype=torch.uint8)
    args = tiny(name, width=4, lr=1e-3, **method)
    once, nets = train.loop(script(name), args, pixels, torch.device("cpu"))
    hooks = [nets[n].register_forward_hook(lambda m, x, y: 0 * y) for n in ("discriminator", "generator")]
    losses = re.findall(r"\[(\w) loss: (\S+)\]", once())
    assert [key for key, _ in losses] == ["G"] + ["D"] * args.n_critic
    assert [float(value) for _, value in losses[:2]] == pytest.approx([loss_g, loss_d], abs=1e-5)
    for hook in hooks:
        hook.remove()
    before = {n: [p.detach().clone() for p in net.parameters()] for n, net in nets.items()}
    for _ in range(2):
        once()
    still = [f"{n}.{k}" for n, net in nets.items() for (k, p), old in zip(net.named_parameters(), before[n]) if torch.equal(p, old)]
    assert still == (["discriminator.head.bias"] if name == "wgan_gp" else [])  # it cancels in a difference of scores


@pytest.mark.parametrize("name, target", [("wgan_gp", 1.0), ("cn_lsgan", 0.5)])
def test_the_loops_penalty_has_its_gradient(name, target, monkeypatch):
    """A linear critic's slope is w: the double backward of lambda (|w| - target)^2 is known."""
    m, d, fakes = script(name), LinearCritic(0.1 * torch.randn(1024)), []
    method = {"gp_target": target, "lambda_rec": 0.0} if name == "cn_lsgan" else {}
    args = tiny(name, n_critic=1, lambda_gp=3.0, **method)
    nets = m.build(args) | {"discriminator": d}
    nets["generator"].register_forward_hook(lambda net, z, y: fakes.append(y.detach()))
    monkeypatch.setattr(m, "build", lambda args: nets)
    once, _ = train.loop(m, args, torch.full((16, 1, 32, 32), 200, dtype=torch.uint8), torch.device("cpu"))
    w = d.w.detach().clone()
    once()
    x, f = torch.full((8, 1024), GREY), fakes[0].flatten(1)
    of_scores = (f - x).mean(0) if name == "wgan_gp" else 2 * (((x @ w - 1) @ x) + (f @ w) @ f) / 8
    torch.testing.assert_close(d.w.grad, of_scores + 6 * (w.norm() - target) * w / w.norm(), rtol=1e-4, atol=1e-5)


def test_every_method_has_a_straightforward_loop():
    assert set(train.LOOPS) == set(SCRIPTS)


def test_a_variant_that_does_not_train_is_found(monkeypatch):
    m = script("lsgan")
    updates = m.updates

    def idle(nets, args):
        update_d, update_g, state = updates(nets, args)
        return update_d, lambda: {}, state

    monkeypatch.setattr(m, "updates", idle)
    with pytest.raises(AssertionError, match="leaves"):
        train.made("lsgan", "default", "eager", torch.device("cpu"), 1, {"width": 4, "batch_size": 4})


@pytest.mark.parametrize("words, said", [(["--sizes", "huge"], "huge"), (["--variants", "kernels"], "kernels"), (["--rounds", "0"], "rounds")])
def test_bad_input_is_named(words, said):
    with pytest.raises(ValueError, match=said):
        train.main([*TINY, *words])

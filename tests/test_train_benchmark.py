"""tests/benchmarks/train.py on tiny networks: every variant of the CPU trains and is compared."""
import json

import pytest
import torch

from tests.benchmarks import train
from tests.helpers import SCRIPTS, script, tiny

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


def test_the_straightforward_loop_has_the_losses_of_the_script():
    """Its networks learn: after some steps on images of one grey, D tells them from noise."""
    for name in train.LOOPS:
        args = tiny(name, width=4)
        once, nets = train.loop(script(name), args, torch.full((16, 1, 32, 32), 200, dtype=torch.uint8), torch.device("cpu"))
        before = [p.clone() for net in nets.values() for p in net.parameters()]
        for _ in range(2):
            text = once()
        assert "D loss" in text and "nan" not in text
        assert not any(torch.equal(a, b) for a, b in zip(before, (p for net in nets.values() for p in net.parameters())))


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

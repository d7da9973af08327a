"""common/gpu.py on one process: updates wait for nothing and keep their tensors; graphs on a GPU."""
import contextlib
import itertools

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from common import data, gpu
from tests.helpers import ROOT, SCRIPTS, script, states, tiny


class Waited(AssertionError):
    pass


class NoSyncByName(TorchFunctionMode):
    """Raises at what is asked of a tensor in Python and makes a GPU's host wait."""

    names = "item tolist __bool__ __int__ __float__ __index__ __contains__ cpu numpy __array__ nonzero".split()

    def __torch_function__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(f, "__name__", "")
        to_cpu = name == "to" and "cpu" in map(str, (*args[1:], *kwargs.values()))
        if name in self.names or to_cpu:
            raise Waited(f"{name} waits for the device")
        return f(*args, **kwargs)


class NoSyncByOperator(TorchDispatchMode):
    """The same below autograd: in backward passes, hooks and f-strings."""

    names = "_local_scalar_dense nonzero masked_select _unique2 equal is_nonzero bincount unique_consecutive".split()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in self.names or by_mask:
            raise Waited(f"{name} waits for the device")
        return f(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_sync():
    with NoSyncByName(), NoSyncByOperator():
        yield


X = torch.tensor([1.0, 2.0])


class Asks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, up):
        return up * up.sum().item()


@pytest.mark.parametrize(
    "call",
    [
        lambda: X[0].item(), lambda: float(X[0]), lambda: int(X[0]), lambda: 1 if X[0] > 0 else 2, lambda: X.tolist(),
        lambda: X.numpy(), lambda: X.cpu(), lambda: X.to("cpu"), lambda: f"{X[0]}", lambda: X[X > 0], lambda: X.nonzero(),
        lambda: torch.where(X > 0), lambda: torch.equal(X, X), lambda: X[torch.tensor(1)], lambda: X.unique(),
        lambda: Asks.apply(X.clone().requires_grad_()).sum().backward(),
        lambda: torch.optim.Adam([torch.nn.Parameter(X.clone())], fused=False),
    ],
)  # fmt: skip
def test_whatever_waits_is_noticed(call):
    result = call()
    if isinstance(result, torch.optim.Adam):  # the plain one reads its counter of steps

        def call():
            result.param_groups[0]["params"][0].grad = X
            result.step()

        call()  # which makes its state
    with pytest.raises(Waited), no_sync():
        call()


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16", "flip": "on"}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_updates_of_the_real_run_wait_for_nothing_and_keep_their_tensors(name, changes, tmp_path, monkeypatch):
    """Through main: what is watched is what gpu.graph is given. A graph replays addresses, so
    parameters, buffers, averages, moments and learning rates must stay where they are."""
    m = script(name)
    changes = {k: v for k, v in changes.items() if hasattr(m.Args(), k)}
    watched, places = [], []

    class Watched(gpu.Update):
        def __call__(self, *inputs):
            self._calls += 1
            if self._calls == 1:  # it makes the optimiser's state
                return super().__call__(*inputs)
            with no_sync():
                losses = super().__call__(*inputs)
            watched.append(self.fn.__name__)
            places.append((self.fn.__name__, *addresses(made)))
            assert all(torch.is_tensor(v) and v.dim() == 0 and not v.requires_grad for v in losses.values())
            return losses

    made = {}
    updates = m.updates

    def remembered(nets, args, *ops):
        found = updates(nets, args, *ops)
        made.update(nets=nets, state=found[2])
        return found

    monkeypatch.setattr(gpu, "Update", Watched)
    monkeypatch.setattr(m, "updates", remembered)
    cache = str(ROOT / "data" / "cache")
    args = tiny(name, **{"steps": 4, "out_dir": str(tmp_path), "cache_dir": cache} | changes)
    m.main(args)
    order = (["update_d"] * args.n_critic + ["update_g"]) * 4
    order.remove("update_d"), order.remove("update_g")  # the first of each, which are not watched
    assert watched == order
    made_all = places[args.n_critic :]  # by then every state has been made
    assert len(made_all[0]) > 40 and all(p[1:] == made_all[0][1:] for p in made_all)


def addresses(made):
    tensors = [t for net in made["nets"].values() for t in net.state_dict(keep_vars=True).values()]
    for value in made["state"].values():
        if torch.is_tensor(value):
            tensors.append(value)
        else:
            tensors += [t for s in value.state.values() for t in s.values()]
            tensors += [group["lr"] for group in value.param_groups]
    return [t.data_ptr() for t in tensors]


def test_without_cuda_or_with_graphs_off_an_update_is_a_plain_call():
    for update in (gpu.graph(lambda x: x + 1, "cpu"), gpu.graph(lambda x: x + 1, "cuda", on=False)):
        assert not update.captures and update(2) == 3


def test_one_process_is_rank_0_of_1_and_leaves_everything_alone():
    args = tiny("lsgan")
    assert (gpu.rank(), gpu.ranks(), gpu.share(args)) == (0, 1, args)
    assert gpu.highest(2, 3.5) == (2, 3.5) and gpu.told("x") == "x" and gpu.gathered(5) == [5]
    values = {"a": torch.tensor(2.0)}
    assert gpu.average(values) is values
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
    gpu.average_gradients(optimiser)
    assert not optimiser._optimizer_step_pre_hooks


def test_fp32_is_not_tf32(tmp_path):
    from common import run

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    run.setup(tiny("lsgan"))
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("ranks", [1, 2])
def test_static_batches_are_the_same_images_in_one_tensor(ranks):
    pixels = torch.randint(0, 256, (22, 3, 8, 8), dtype=torch.uint8)
    for rank in range(ranks):
        plain = data.batches(pixels, 4, 7, 3, rank=rank, ranks=ranks)
        static = data.batches(pixels, 4, 7, 3, rank=rank, ranks=ranks, static=True)
        places = set()
        for a, b in itertools.islice(zip(plain, static), 9):  # over the end of an epoch
            assert torch.equal(a, b)
            places.add(b.data_ptr())
        assert len(places) == 1


# ---- on a GPU


def small(name, **changes):
    changes = {"batch_size": 16, "width": 8, "device": "cuda", "n_critic": 1} | changes
    return script(name).Args(**{k: v for k, v in changes.items() if hasattr(script(name).Args(), k)})


def run_updates(name, graphs, calls, args):
    """States and losses after that many rounds, graphs on or off, with equal data and noise."""
    m = script(name)
    torch.manual_seed(0)
    nets = m.build(args)
    update_d, update_g, state = m.updates(nets, args)
    update_d, update_g = (gpu.graph(u, "cuda", graphs) for u in (update_d, update_g))
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(calls):
        for optimiser in (state["opt_d"], state["opt_g"]):
            optimiser.param_groups[0]["lr"].fill_(args.lr * (1 - step / calls))
        for _ in range(args.n_critic):
            real = torch.empty(args.batch_size, args.channels or 1, 32, 32).uniform_(-1, 1, generator=generator)
            logs = update_d(real.cuda())
        losses.append({k: v.clone() for k, v in (logs | update_g()).items()})
    return states(nets) | {"t": state["t"]}, losses


@pytest.fixture
def fixed_noise(monkeypatch):
    """Noise that eager and replayed updates share: they need not draw equal numbers from one seed."""
    kept = {}

    def fixed(make):
        def call(*size, **kwargs):
            key = (make.__name__, tuple(size[0].shape) if torch.is_tensor(size[0]) else repr(size))
            if key not in kept:
                kept[key] = make(*size, **kwargs)
            return kept[key].clone()

        return call

    for name in ("randn", "rand", "randint", "randn_like"):
        monkeypatch.setattr(torch, name, fixed(getattr(torch, name)))


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"precision": "fp32"}, {"n_critic": 3}, {"channels": 3}, {"clip": 0.01}], ids=str)
@pytest.mark.parametrize("name", SCRIPTS)
def test_replayed_updates_give_the_same_parameters_as_eager_ones(name, changes, fixed_noise):
    args = small(name, **changes)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
        (a, losses_a), (b, losses_b) = (run_updates(name, on, 20, args) for on in (False, True))
    assert a["t"] == b["t"] == 20
    tolerance = 1e-4 if args.precision == "fp32" else 2e-2
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=tolerance, atol=tolerance, msg=lambda text: f"{key}: {text}")
    for x, y in zip(losses_a, losses_b):
        torch.testing.assert_close(y, x, rtol=10 * tolerance, atol=10 * tolerance)
    moved = [not torch.equal(losses_b[i]["loss_g"], losses_b[i + 1]["loss_g"]) for i in range(10, 19)]
    assert all(moved)  # replays train


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCRIPTS)
def test_replays_draw_fresh_noise_and_obey_the_learning_rate(name):
    m, args = script(name), small(name)
    nets = m.build(args)
    update_d, update_g, state = m.updates(nets, args)
    seen = []
    update_d, update_g = (gpu.graph(u, "cuda") for u in (update_d, update_g))
    for _ in range(5):
        update_d(torch.rand(16, 1, 32, 32, device="cuda"))
        update_g()
    state["opt_g"].param_groups[0]["lr"].fill_(0.0)
    before = [p.clone() for p in nets["generator"].parameters()]
    for _ in range(3):
        seen.append(update_g()["loss_g"].clone())
    assert all(torch.equal(p, q) for p, q in zip(before, nets["generator"].parameters()))
    assert len({v.item() for v in seen}) == 3  # the weights stand still: only z differs


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"clip": 0.01}], ids=str)
@pytest.mark.parametrize("name", SCRIPTS)
def test_no_warm_update_synchronises(name, changes):
    m, args = script(name), small(name, **changes)
    update_d, update_g, _ = m.updates(m.build(args), args)
    real = torch.rand(16, 1, 32, 32, device="cuda")
    for _ in range(2):
        update_d(real), update_g()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update_d(real), update_g()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_caller_s_own_buffer_is_read_in_place_and_other_inputs_are_copied():
    buffer, total = torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda")
    update = gpu.graph(lambda x: {"sum": total.add_(x).sum()}, "cuda")
    for i in range(6):
        update(buffer.fill_(i))
    assert update._inputs[0] is buffer and total[0].item() == 15
    assert update(torch.full((4,), 10.0, device="cuda"))["sum"].item() == 100
    other, total2 = gpu.graph(lambda x: total2.add_(x), "cuda"), torch.zeros(4, device="cuda")
    for i in range(6):
        other(torch.full((4,), float(i), device="cuda"))
    assert total2[0].item() == 15


@pytest.mark.gpu
def test_what_no_graph_holds_is_called_between_two_of_them_at_every_replay():
    calls, x = [], torch.zeros(1, device="cuda")

    def update():
        x.add_(1)
        gpu.outside(lambda: calls.append(x.clone()))
        x.mul_(2)
        return {"x": x.sum()}

    captured = gpu.graph(update, "cuda")
    last = [captured()["x"].clone() for _ in range(6)][-1]
    assert [c.item() for c in calls] == [1, 3, 7, 15, 31, 63] and last.item() == 126


@pytest.mark.gpu
def test_a_wait_inside_an_update_is_an_error_of_the_capture():
    update = gpu.graph(lambda x: {"y": x * x.sum().item()}, "cuda")
    x = torch.ones(2, device="cuda")
    for _ in range(gpu.WARM_UP):
        update(x)
    with pytest.raises(RuntimeError):
        update(x)
    assert gpu._capturing is None


@pytest.mark.gpu
def test_batches_that_stream_through_pinned_memory_are_those_of_the_cpu():
    pixels = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    rows = data._rows(50, 8, 0, 0, 0, 8, pixels.device)
    streamed = map(data.to_float, data._ahead((pixels.index_select(0, r) for r in rows), torch.device("cuda")))
    for a, b in itertools.islice(zip(data.batches(pixels, 8, 0), streamed), 14):
        assert torch.equal(a, b.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_with_graphs_ends_with_everything(name, tmp_path):
    folder = script(name).main(tiny(name, device="cuda", steps=12, sample_every=5, out_dir=str(tmp_path)))
    assert (folder / "generator.pt").exists() and (folder / "metrics.json").exists()
    args = tiny(name, device="cuda", steps=12, sample_every=5, out_dir=str(tmp_path), graphs=False)
    assert (script(name).main(args) / "generator.pt").exists()

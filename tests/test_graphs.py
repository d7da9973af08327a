"""common/graphs.py: updates wait for nothing and keep their tensors; replays are the eager updates.

On the CPU a graph is emulated: what is captured is recorded below autograd and replayed into the
same tensors, and a capture computes nothing, as on a GPU.
"""
import contextlib
import importlib
import inspect
import math

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from common import graphs
from tests.benchmarks.train import drawn_pixels, scripts
from tests.helpers import CACHE, TINY, script, shell, states
from tests.sync import Waited, no_sync

NAMES = scripts()


def small(name, **changes):
    """Args of any script for updates of milliseconds; what it does not have is left out."""
    m = script(name)
    fields = inspect.signature(m.Args).parameters
    channels = changes.get("channels", 1 if hasattr(m, "latents") else 3)
    wanted = TINY | {"image_size": 32, "channels": channels} | changes
    wanted |= {"channels_a": channels, "channels_b": channels}
    return m.Args(**{k: v for k, v in wanted.items() if k in fields})


# ---- the emulator ----------------------------------------------------------------------------


class Emulated(TorchDispatchMode):
    """Stands for torch.cuda.CUDAGraph, on CPU tensors."""

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made = [], {}, {}

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for t in pytree.tree_leaves((args, kwargs)):
            if torch.is_tensor(t) and (key := t.untyped_storage().data_ptr()) not in self.made:
                self.before.setdefault(key, (t.untyped_storage(), t.untyped_storage().clone()))
        out = f(*args, **kwargs)
        for t in pytree.tree_leaves(out):
            if torch.is_tensor(t) and (key := t.untyped_storage().data_ptr()) not in self.before:
                self.made[key] = t.untyped_storage()
        self.calls.append((f, args, kwargs, out))
        return out

    def begin(self):
        self.random = torch.get_rng_state()
        self.__enter__()

    def end(self):
        """Nothing has been computed: what was there is as before, what is new holds NaN."""
        self.__exit__(None, None, None)
        torch.set_rng_state(self.random)
        for storage, content in self.before.values():
            storage.copy_(content)
        for storage in self.made.values():
            storage.fill_(0xFF)

    @torch.no_grad()
    def replay(self):
        for f, args, kwargs, out in self.calls:
            new = f(*args, **kwargs)
            for old, t in zip(pytree.tree_leaves(out), pytree.tree_leaves(new)):
                if torch.is_tensor(t) and t.data_ptr() != old.data_ptr():  # no view, not in place
                    old.copy_(t)


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


@pytest.fixture
def emulated(monkeypatch):
    """torch.cuda as far as common/graphs.py uses it; the list holds the current stream."""
    streams = [Stream()]

    @contextlib.contextmanager
    def on(stream):
        before, streams[:] = list(streams), [stream]
        yield
        streams[:] = before  # not where it fails: torch leaves the stream of a capture as it is

    @contextlib.contextmanager
    def capture(graph, stream=None, **_):
        with on(stream):
            graph.begin()
            try:
                yield
            finally:
                graph.end()

    for name, stand_in in dict(
        device=lambda _: contextlib.nullcontext(), current_device=lambda: 0, Stream=Stream,
        current_stream=lambda: streams[0], stream=on, graph=capture, CUDAGraph=Emulated,
        set_stream=lambda s: streams.__setitem__(slice(None), [s]),
    ).items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(graphs.Update, "streams", {})
    # the form that RMSprop has on a GPU; that of the CPU asks for its rate
    rmsprop, cpu = torch.optim.RMSprop, lambda **_: ["cpu"]
    module = importlib.import_module("torch.optim.rmsprop")
    monkeypatch.setattr(module, "_get_capturable_supported_devices", cpu)
    monkeypatch.setattr(
        torch.optim, "RMSprop", lambda p, lr, **_: rmsprop(p, lr, foreach=True, capturable=True)
    )
    return streams


def rounds(name, args, wrap, steps=7, own_buffer=False):
    """(tensors, losses by step) of the updates of a script, wrapped, on equal data and noise."""
    m = script(name)
    torch.manual_seed(0)
    nets = m.build(args)
    *closures, state = m.updates(nets, args)
    inputs = [len(inspect.signature(u).parameters) for u in closures]
    device = next(nets["generator"].parameters()).device
    updates = [wrap(u) for u in closures]
    shape = args.batch_size, *drawn_pixels(m, args).shape[1:]
    buffers = [torch.empty(shape, device=device) for _ in range(max(inputs))]
    generator = torch.Generator().manual_seed(1)
    history = []
    for step in range(steps):
        for opt in (v for v in state.values() if isinstance(v, torch.optim.Optimizer)):
            opt.param_groups[0]["lr"].fill_(args.lr * (1 - step / steps))
        logs = {}
        for update, n in zip(updates, inputs):
            for _ in range(getattr(args, "n_critic", 1) if n else 1):
                drawn = [torch.empty(shape).uniform_(-1, 1, generator=generator) for _ in range(n)]
                if own_buffer:
                    given = [b.copy_(x) for b, x in zip(buffers, drawn)]
                else:
                    given = [x.to(device) for x in drawn]
                logs |= update(*given)
        history.append({k: v.clone() for k, v in logs.items()})
    tensors = states(nets)
    for key, value in state.items():
        if torch.is_tensor(value):
            tensors[key] = value
        elif not isinstance(value, torch.optim.Optimizer):
            tensors |= {f"{key}.{k}": v for k, v in value.state_dict().items()}
    return {k: v.clone() for k, v in tensors.items()}, history


def assert_equal(a, b):
    (tensors_a, history_a), (tensors_b, history_b) = a, b
    different = [k for k, v in tensors_a.items() if not torch.equal(v, tensors_b[k])]
    assert tensors_a.keys() == tensors_b.keys() and not different, different
    for step, (x, y) in enumerate(zip(history_a, history_b, strict=True)):
        assert x.keys() == y.keys() and all(torch.equal(v, y[k]) for k, v in x.items()), step


@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "bf16", "flip": "on", "n_critic": 1}, {"clip": 0.01, "lambda_pixel": 1.0}],
    ids=["fp32", "bf16", "clip"],
)
@pytest.mark.parametrize("name", NAMES)
def test_replayed_updates_are_the_eager_ones_to_the_bit(name, changes, emulated):
    args = small(name, **changes)
    own_buffer = "precision" in changes
    eager = rounds(name, args, lambda u: graphs.graph(u, "cpu"), own_buffer=own_buffer)
    updates = []

    def wrapped(fn):
        updates.append(graphs.graph(fn, "cuda"))
        return updates[-1]

    assert_equal(eager, rounds(name, args, wrapped, own_buffer=own_buffer))
    assert all(u._graph.calls for u in updates)  # there was something to replay


def test_a_caller_s_own_buffer_is_read_in_place_and_other_inputs_are_copied(emulated):
    buffer, total = torch.zeros(4), torch.zeros(4)
    update = graphs.graph(lambda x: {"sum": total.add_(x).sum()}, "cuda")
    for i in range(6):
        update(buffer.fill_(i))
    assert update._inputs[0] is buffer and total[0].item() == 15
    assert update(torch.full((4,), 10.0))["sum"].item() == 100
    other_total = torch.zeros(4)
    other = graphs.graph(lambda x: {"sum": other_total.add_(x).sum()}, "cuda")
    given = [torch.full((4,), float(i)) for i in range(6)]
    for x in given:
        other(x)
    assert other_total[0].item() == 15 and [x[0].item() for x in given] == [*range(6)]


def test_a_failed_capture_leaves_the_current_stream_and_can_be_told(emulated):
    here = emulated[0]

    def update(x):
        if here is not torch.cuda.current_stream() and update.calls == graphs.WARM_UP:
            raise RuntimeError("not in a capture")
        update.calls += 1
        return {"x": x + 1}

    update.calls = 0
    wrapped = graphs.graph(update, "cuda")
    for _ in range(graphs.WARM_UP):
        wrapped(torch.zeros(1))
    with pytest.raises(RuntimeError, match="not in a capture"):
        wrapped(torch.zeros(1))
    assert torch.cuda.current_stream() is here


def test_without_cuda_or_with_graphs_off_an_update_is_a_plain_call():
    for update in (
        graphs.graph(lambda x: x + 1, "cpu"),
        graphs.graph(lambda x: x + 1, "cuda", on=False),
    ):
        assert not update.captures and update(2) == 3


# ---- nothing waits, nothing moves ------------------------------------------------------------


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
        lambda: X[0].item(), lambda: float(X[0]), lambda: int(X[0]), lambda: 1 if X[0] > 0 else 2,
        lambda: X.tolist(), lambda: X.numpy(), lambda: X.cpu(), lambda: X.to("cpu"),
        lambda: f"{X[0]}", lambda: X[X > 0], lambda: X.nonzero(), lambda: torch.where(X > 0),
        lambda: torch.equal(X, X), lambda: X[torch.tensor(1)], lambda: X.unique(),
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
@pytest.mark.parametrize("name", NAMES)
def test_updates_of_the_real_run_wait_for_nothing_and_keep_their_tensors(
    name, changes, tmp_path, monkeypatch
):
    """Through main: what is watched is what graphs.graph is given. A graph replays addresses, so
    parameters, buffers, averages, moments and learning rates must stay where they are."""
    m, made, watched, places = script(name), {}, [], []
    updates = m.updates

    def remembered(nets, args, *ops):
        found = updates(nets, args, *ops)
        made.update(nets=nets, state=found[-1])
        return found

    def watching(fn, device, on=True):
        calls = []

        def update(*inputs):
            calls.append(fn.__name__)
            if len(calls) == 1:  # it makes the optimiser's state
                return fn(*inputs)
            with no_sync():
                losses = fn(*inputs)
            watched.append(fn.__name__)
            places.append(addresses(made))
            of_losses = losses.values()
            assert all(torch.is_tensor(v) and v.dim() == 0 for v in of_losses)
            assert not any(v.requires_grad for v in of_losses)
            return losses

        return update

    monkeypatch.setattr(graphs, "graph", watching)
    monkeypatch.setattr(m, "updates", remembered)
    args = small(name, **{"steps": 4, "out_dir": str(tmp_path), "cache_dir": CACHE} | changes)
    m.main(args)
    names = [u.__name__ for u in updates(m.build(args), args)[:-1]]
    critic = [names[0]] * (getattr(args, "n_critic", 1) if len(names) > 1 else 1)
    order = (critic + names[1:]) * args.steps
    for first in names:
        order.remove(first)  # of each the first, which is not watched
    assert [w for w in watched if w in names] == order
    last = [p for p in places if len(p) == len(places[-1])]  # when every state had been made
    assert len(last) >= 2 * len(names) and len(last[0]) > 40 and all(p == last[0] for p in last)


def addresses(made):
    tensors = [t for net in made["nets"].values() for t in net.state_dict(keep_vars=True).values()]
    for value in made["state"].values():
        if torch.is_tensor(value):
            tensors.append(value)
        elif isinstance(value, torch.optim.Optimizer):
            tensors += [t for s in value.state.values() for t in s.values()]
            tensors += [group["lr"] for group in value.param_groups]
    return [t.data_ptr() for t in tensors]


@pytest.mark.parametrize("name", NAMES)
def test_power_iterations_stand_outside_autocast(name):
    """CUDA's autocast would take their products in bf16; the CPU's does not: its state is asked."""
    args = small(name, precision="bf16")
    nets = script(name).build(args)
    normed = [m for net in nets.values() for m in net.modules() if hasattr(m, "parametrizations")]
    seen = []
    for layer in normed:
        layer.parametrizations.weight[0].register_forward_pre_hook(
            lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
        )
    *closures, _ = script(name).updates(nets, args)
    channels = drawn_pixels(script(name), args).shape[1]
    for update in closures:
        n = len(inspect.signature(update).parameters)
        update(*(torch.rand(args.batch_size, channels, 32, 32) for _ in range(n)))
    assert len(seen) >= len(normed) and not any(seen)


# ---- on a GPU --------------------------------------------------------------------------------


@pytest.fixture
def fixed_noise(monkeypatch):
    """Noise that eager and replayed updates share: from one seed they may draw other numbers."""
    kept = {}

    def fixed(make):
        def call(*size, **kwargs):
            told = [tuple(s.shape) if torch.is_tensor(s) else s for s in size]
            key = make.__name__, repr(told)
            if key not in kept:
                kept[key] = make(*size, **kwargs)
            return kept[key].clone()

        return call

    for name in ("randn", "rand", "randint", "randn_like", "rand_like", "randint_like"):
        monkeypatch.setattr(torch, name, fixed(getattr(torch, name)))
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)


def by_loss(history):
    """One tensor [steps] of each loss: of one step alone two runs can agree by luck."""
    return {key: torch.stack([step[key] for step in history]) for key in history[0]}


def as_eager(found, eager, again, tolerance):
    """Replays give what eager runs give, to the tolerance and ten times what these differ by.

    They differ among themselves: reflected edges are added up in any order.
    """
    assert found.keys() == eager.keys()
    for key, x in eager.items():
        apart = torch.where(again[key] == x, 0.0, again[key].double() - x.double())
        most = tolerance + 10 * apart.abs().max().item()  # where, for inf - inf is nan
        assert math.isfinite(most), f"{key}: eager runs differ by {most}"
        named = f"{key}: {{}}".format
        torch.testing.assert_close(found[key], x, rtol=tolerance, atol=most, msg=named)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [{"precision": "bf16"}, {}, {"n_critic": 3}, {"channels": 3}, {"clip": 0.01}],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_replays_on_the_gpu_give_the_parameters_of_eager_updates(name, changes, fixed_noise):
    args = small(name, **{"device": "cuda", "width": 8, "batch_size": 16} | changes)
    how = dict(enabled=True, deterministic=True, benchmark=False, allow_tf32=False)
    with torch.backends.cudnn.flags(**how):
        (a, losses_a), (again, losses_again), (b, losses_b) = (
            rounds(name, args, lambda u: graphs.graph(u, "cuda", on), steps=12)
            for on in (False, False, True)
        )
    tolerance = 1e-4 if args.precision == "fp32" else 2e-2
    as_eager(b, a, again, tolerance)
    as_eager(*map(by_loss, (losses_b, losses_a, losses_again)), 10 * tolerance)
    losses = [step["loss_g"] for step in losses_b[6:]]
    assert all(not torch.equal(p, q) for p, q in zip(losses, losses[1:]))  # replays train


@pytest.mark.gpu
@pytest.mark.parametrize("name", [n for n in NAMES if hasattr(script(n), "latents")])
def test_replays_draw_fresh_noise_and_obey_the_learning_rate(name):
    m, args = script(name), small(name, device="cuda", batch_size=16)
    nets = m.build(args)
    *closures, state = m.updates(nets, args)
    *update_d, update = (graphs.graph(u, "cuda") for u in closures)
    real = torch.rand(16, 1, 32, 32, device="cuda")
    given = [real] if len(closures) == 1 else []
    for _ in range(5):
        for u in update_d:
            u(real)
        update(*given)
    for opt in (v for v in state.values() if isinstance(v, torch.optim.Optimizer)):
        opt.param_groups[0]["lr"].fill_(0.0)
    before = [p.clone() for p in nets["generator"].parameters()]
    seen = [update(*given)["loss_g"].clone() for _ in range(3)]
    assert all(torch.equal(p, q) for p, q in zip(before, nets["generator"].parameters()))
    assert len({v.item() for v in seen}) == 3  # the weights stand still: only z differs


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_no_warm_update_synchronises_on_the_gpu(name):
    def warned(fn):
        calls = []

        def update(*inputs):
            calls.append(1)
            torch.cuda.set_sync_debug_mode("error" if len(calls) > 2 else "default")
            try:
                return fn(*inputs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return update

    rounds(name, small(name, device="cuda"), warned, steps=4)


POISONED = """
import sys, torch
from common import graphs
update = graphs.graph(lambda x: {"y": x * x.sum().item()}, "cuda")
x, here = torch.ones(2, device="cuda"), torch.cuda.current_stream()
for _ in range(graphs.WARM_UP):
    update(x)
try:
    update(x)
except RuntimeError:
    sys.exit(0 if torch.cuda.current_stream() == here else 3)
sys.exit(4)
"""


@pytest.mark.gpu
def test_a_wait_inside_an_update_is_an_error_of_the_capture():
    """In a process of its own: after it torch draws no random number on that GPU any more."""
    done = shell("-c", POISONED)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_run_with_graphs_ends_with_everything(name, tmp_path):
    how = {"device": "cuda", "steps": 12, "sample_every": 5, "cache_dir": CACHE}
    for on in (True, False):
        args = small(name, out_dir=str(tmp_path / str(on)), graphs=on, **how)
        folder = script(name).main(args)
        assert (folder / "generator.pt").exists() and (folder / "metrics.json").exists()

"""SyncBatchNorm and DistributedDataParallel: two processes on a CPU, by gloo, against one on the whole batch."""

import copy
import datetime
import pickle
import traceback

import networks
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from batch_norm_reference import batch_norm_reference
from references import largest_error
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastconv
from fastconv import _ops, sync_batch_norm

RANKS = 2


def serve(rank, init_file, calls, answers):
    """What a process does: one function after another, until there is none."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=RANKS, timeout=timeout)
    while call := calls[rank].get():
        function, arguments = pickle.loads(call)
        torch.manual_seed(0)
        try:
            answers[rank].put(pickle.dumps((function(rank, *arguments), None)))
        except Exception:
            answers[rank].put(pickle.dumps((None, traceback.format_exc())))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """on_ranks(function, *arguments) is what function(rank, *arguments) returned in each of two processes."""
    context = mp.get_context("spawn")
    calls, answers = ([context.SimpleQueue() for _ in range(RANKS)] for _ in range(2))
    init_file = tmp_path_factory.mktemp("ranks") / "init"
    processes = mp.spawn(serve, (str(init_file), calls, answers), nprocs=RANKS, join=False)

    def run(function, *arguments):
        for queue in calls:
            queue.put(pickle.dumps((function, arguments)))  # copies: torch's own pickler would share the memory
        results = [pickle.loads(queue.get()) for queue in answers]
        errors = [error for _, error in results if error]
        assert not errors, "\n".join(errors)
        return [result for result, _ in results]

    yield run
    for queue in calls:
        queue.put(b"")
    while not processes.join():
        pass


def assert_close(actual, expected):
    """Within 1e-12 of the largest magnitude, in float64."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if expected.numel():
        assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max().clamp(min=1)


# ---- SyncBatchNorm ----


def step(layer, x, dy):
    """y, the gradients of x and of the parameters, and the buffers, after two training steps."""
    for _ in range(2):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        layer.zero_grad()
        y = layer(leaf)
        y.backward(dy)
    return {
        "y": y.detach(),
        "dx": leaf.grad,
        "grads": [p.grad for p in layer.parameters()],
        "buffers": [b.clone() for b in layer.buffers()],
    }


def step_of_a_part(rank, layer, x, dy, sizes):
    return step(layer, x.split(sizes)[rank], dy.split(sizes)[rank])


def sync(layer, **group):
    return fastconv.convert_sync_batchnorm(copy.deepcopy(layer), **group)


def randomized(layer):
    """With parameters and statistics that differ from channel to channel."""
    for tensor in (*layer.parameters(), *(b for b in layer.buffers() if b.is_floating_point())):
        tensor.data.uniform_(0.5, 2)
    return layer


LAYERS = {
    "images": (nn.BatchNorm2d(5), (5, 4, 6)),
    "rows": (nn.BatchNorm1d(17), (17,)),
    "sequences": (nn.BatchNorm1d(4), (4, 9)),
    "volumes": (nn.BatchNorm3d(3), (3, 2, 3, 4)),
    "eps and momentum": (nn.BatchNorm2d(3, eps=1e-2, momentum=0.4), (3, 4, 6)),
    "cumulative average": (nn.BatchNorm2d(3, momentum=None), (3, 4, 6)),
    "not affine": (nn.BatchNorm2d(3, affine=False), (3, 4, 6)),
    "no statistics": (nn.BatchNorm2d(3, track_running_stats=False), (3, 4, 6)),
}


@pytest.mark.parametrize("sizes", [(5, 2), (0, 4), (3, 0)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_two_parts_of_a_batch_equal_the_whole(on_ranks, name, sizes):
    layer, size = LAYERS[name]
    layer = randomized(copy.deepcopy(layer).double())
    x, dy = (torch.randn(sum(sizes), *size, dtype=torch.float64) * 2 + 3 for _ in range(2))
    parts = on_ranks(step_of_a_part, sync(layer), x, dy, sizes)
    whole = step(copy.deepcopy(layer), x, dy)
    for key in ("y", "dx"):
        assert_close(torch.cat([part[key] for part in parts]), whole[key])
    for *grads, expected in zip(*(part["grads"] for part in parts), whole["grads"], strict=True):
        assert_close(sum(grads), expected)
    for part in parts:
        for actual, expected in zip(part["buffers"], whole["buffers"], strict=True):
            assert_close(actual, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_low_precision_layouts_and_means_much_larger_than_the_deviation(on_ranks, layout):
    for dtype, mean in ((torch.float32, 3000), (torch.bfloat16, 2), (torch.float16, 2)):
        x, dy = (torch.randn(7, 4, 5, 6).to(dtype).contiguous(memory_format=layout) for _ in range(2))
        x = x + mean
        layer = randomized(nn.BatchNorm2d(4, momentum=0.3))
        parameters = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
        expected = batch_norm_reference(x, *parameters, dy, True, 0.3, 1e-5)
        parts = on_ranks(one_step_of_a_part, sync(layer), x, dy, (5, 2))
        assert parts[0]["y"].is_contiguous(memory_format=layout) and parts[0]["dx"].is_contiguous(memory_format=layout)
        actual = {key: torch.cat([part[key] for part in parts]) for key in ("y", "dx")}
        actual |= {key: parts[0][key] + parts[1][key] for key in ("dweight", "dbias")}
        actual |= {key: parts[0][key] for key in ("running_mean", "running_var")}
        for key, result in actual.items():
            assert result.dtype is (dtype if key in ("y", "dx") else torch.float32)
            error, bound = largest_error(result, expected[key].value), expected[key].bound(result.dtype)
            assert error <= bound, f"{dtype}: {key}: the largest error is {error:.3g}, the bound {bound:.3g}"


def one_step_of_a_part(rank, layer, x, dy, sizes):
    leaf = x.split(sizes)[rank].detach().requires_grad_()
    y = layer(leaf)
    y.backward(dy.split(sizes)[rank])
    named = {"dweight": layer.weight.grad, "dbias": layer.bias.grad}
    return {"y": y.detach(), "dx": leaf.grad, **named, **{k: b.clone() for k, b in layer.named_buffers()}}


def test_a_mean_much_larger_than_the_deviation_costs_no_more_than_in_one_process(on_ranks):
    """Half an ulp of this mean is 1e-4 of the deviation; the part of it that float32 cannot hold is not lost."""
    x, layer = torch.randn(7, 4, 5, 6) + 3000, randomized(nn.BatchNorm2d(4))
    parts = on_ranks(step_of_a_part, sync(layer), x, x, (5, 2))
    whole = step(fastconv.convert(layer), x, x)
    assert (torch.cat([part["y"] for part in parts]) - whole["y"]).abs().max() <= 4 * 2**-23 * whole["y"].abs().max()


def test_same_bits_in_every_run_and_the_same_statistics_in_every_process(on_ranks):
    x, dy = (torch.randn(9, 60, 7, 5, dtype=torch.float64) for _ in range(2))
    layer = sync(nn.BatchNorm2d(60).double())
    first = on_ranks(step_of_a_part, layer, x, dy, (6, 3))
    again = on_ranks(step_of_a_part, layer, x, dy, (6, 3))
    for key in ("y", "dx"):
        assert all(torch.equal(a[key], b[key]) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first[0]["buffers"], first[1]["buffers"], strict=True))


def test_empty_batches_everywhere_leave_the_statistics_alone(on_ranks):
    x = torch.empty(0, 3, 4, 5)
    for part in on_ranks(step_of_a_part, sync(nn.BatchNorm2d(3)), x, x, (0, 0)):
        assert part["y"].shape == part["dx"].shape == x.shape
        assert all(torch.equal(grad, torch.zeros(3)) for grad in part["grads"])
        mean, var, batches = part["buffers"]
        assert torch.equal(mean, torch.zeros(3)) and torch.equal(var, torch.ones(3)) and batches == 2


def test_constant_channels_have_a_variance_of_exactly_zero(on_ranks):
    x = torch.full((5, 3, 4, 5), -12345.678)  # a fifth and four fifths of which do not add up to it
    layer = randomized(nn.BatchNorm2d(3, momentum=1.0))
    for part in on_ranks(step_of_a_part, sync(layer), x, x, (1, 4)):
        assert torch.equal(part["y"], layer.bias[:, None, None].expand(part["y"].shape))
        assert torch.equal(part["buffers"][1], torch.zeros(3))


def autocast_step(rank, layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.bfloat16())
        y.float().sum().backward()
    return y.dtype, [b.dtype for b in layer.buffers()], [p.grad.dtype for p in layer.parameters()]


def test_autocast_keeps_the_inputs_dtype_and_float32_statistics(on_ranks):
    layer = sync(nn.BatchNorm2d(3))
    for y, (mean, var, _), grads in on_ranks(autocast_step, layer, torch.randn(4, 3, 5, 6)):
        assert y is torch.bfloat16 and mean is var is torch.float32 and grads == [torch.float32] * 2


def step_in_a_group_of_one(rank, layer, x, dy):
    groups = [dist.new_group([r]) for r in range(RANKS)]
    return step(sync(layer, process_group=groups[rank]), x, dy)


def groups_that_are_asked(rank, layer, x):
    """The process groups of the collectives in a training step, and the layer's own."""
    group, asked, gather = dist.new_group(list(range(RANKS))), [], sync_batch_norm._gather
    sync_batch_norm._gather = lambda tensor, group: asked.append(group) or gather(tensor, group)
    try:
        sync(layer, process_group=group)(x.requires_grad_()).sum().backward()
    finally:
        sync_batch_norm._gather = gather
    return [g is group for g in asked]


def test_the_collectives_are_two_of_its_own_process_group(on_ranks):
    assert on_ranks(groups_that_are_asked, nn.BatchNorm2d(3), torch.randn(2, 3, 4, 5)) == [[True, True]] * RANKS


def evaluation_in_one_process(rank, layer, x):
    return layer.eval()(x) if rank == 0 else None  # the other one takes no part


def test_without_others_and_in_evaluation_it_is_batch_norm(on_ranks):
    layer = randomized(fastconv.BatchNorm2d(3))
    x, dy = torch.randn(4, 3, 5, 6), torch.randn(4, 3, 5, 6)
    expected = step(copy.deepcopy(layer), x, dy)
    for actual in (*on_ranks(step_in_a_group_of_one, layer, x, dy), step(sync(layer), x, dy)):
        assert torch.equal(actual["y"], expected["y"]) and torch.equal(actual["dx"], expected["dx"])
        assert all(torch.equal(a, b) for a, b in zip(actual["buffers"], expected["buffers"], strict=True))
    y, _ = on_ranks(evaluation_in_one_process, sync(layer), x)
    assert torch.equal(y, layer.eval()(x))


def second_derivatives(rank, layer, x):
    x = x.requires_grad_()
    for loss in (lambda y: y.sum(), lambda y: y.square().sum()):
        (dx,) = torch.autograd.grad(loss(layer(x)), x, create_graph=True)
        assert dx.requires_grad
        with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
            dx.sum().backward()


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "not affine"])
def test_second_derivatives_are_an_error(on_ranks, affine):
    on_ranks(second_derivatives, sync(nn.BatchNorm2d(3, affine=affine)), torch.randn(4, 3, 5, 6))


def test_bad_input_is_torchs_error():
    for size in ((4,), (2, 0, 3, 3)):
        messages = []
        for layer in (fastconv.SyncBatchNorm(3), nn.SyncBatchNorm(3)):
            with pytest.raises(ValueError) as error:
                layer(torch.randn(size))
            messages.append(str(error.value))
        assert messages[0] == messages[1]


# ---- The ops below it ----


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_ops_on_parts_of_a_batch_equal_the_whole(backend, dtype, layout):
    """Three parts, one of them empty: merged, summed and applied as the processes would."""
    nhwc = layout is torch.channels_last
    split = [(4, 1, 130, 130), (20, 64, 9, 7)] if dtype is torch.float32 else []  # in pieces, on either backend
    for size in ((6, 3, 5, 7), (5, 70, 3, 1), (9, 4, 30, 31), *split):
        x, dy = ((torch.randn(size) + 2).to(dtype).contiguous(memory_format=layout) for _ in range(2))
        weight, mean, var = torch.rand(size[1]) + 0.5, torch.zeros(size[1]), torch.ones(size[1])
        statistics = torch.float64 if dtype is torch.float64 else torch.float32
        weight, mean, var = (t.to(statistics) for t in (weight, mean, var))
        expected = batch_norm_reference(x, weight, None, mean, var, dy, True, 1.0, 1e-5)
        parts = [
            [backend.put(t.contiguous(memory_format=layout)) for t in part]
            for part in zip(x.split((2, 0, size[0] - 2)), dy.split((2, 0, size[0] - 2)), strict=True)
        ]
        weight = backend.put(weight)
        moments = torch.stack([_ops.batch_norm_moments(part, nhwc) for part, _ in parts])
        assert moments.dtype is torch.float64
        count, mean, m2 = sync_batch_norm._merge(moments)
        assert torch.equal(count.cpu(), torch.full_like(count, x.numel() / size[1]).cpu())
        invstd = (m2 / count + 1e-5).rsqrt().to(statistics)
        kept = (mean.to(statistics), invstd)
        sums = torch.stack([_ops.batch_norm_backward_sums(dy, x, *kept, nhwc) for x, dy in parts]).sum(0)
        means = sums / count
        dx = [_ops.batch_norm_backward_apply(dy, x, weight, *kept, means, nhwc) for x, dy in parts]
        assert all(t.is_contiguous(memory_format=layout) and t.dtype is dtype for t in dx)
        actual = {"dx": torch.cat(dx), "dweight": sums[1], "dbias": sums[0]}
        actual |= {"running_mean": kept[0], "running_var": (m2 / (count - 1)).to(statistics)}
        for name, result in actual.items():
            error, bound = largest_error(result, expected[name].value), expected[name].bound(result.dtype)
            assert error <= bound, f"{size}: {name}: the largest error is {error:.3g}, the bound {bound:.3g}"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_the_ops_give_the_same_bits_for_any_number_of_threads(native_backend, layout, threads):
    nhwc = layout is torch.channels_last
    for size in ((4, 40, 37, 41), (3, 5, 130, 121)):
        x, dy = (native_backend.put(torch.randn(size).contiguous(memory_format=layout)) for _ in range(2))
        mean, invstd = (native_backend.put(torch.rand(size[1])) for _ in range(2))
        results = []
        for count in (1, 2, 3):
            threads(count)
            sums = _ops.batch_norm_backward_sums(dy, x, mean, invstd, nhwc)
            dx = _ops.batch_norm_backward_apply(dy, x, None, mean, invstd, sums, nhwc)
            results.append((_ops.batch_norm_moments(x, nhwc), sums, dx))
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_the_ops_refuse_what_does_not_fit():
    x, mean = torch.randn(2, 3, 4, 5), torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"expected dy like x, of size \[2, 3, 4, 5\], but got \[2, 3, 4, 4\]"):
        _ops.batch_norm_backward_sums(x[..., :4], x, mean, mean, False)
    with pytest.raises(RuntimeError, match="mean should contain 3 elements not 2"):
        _ops.batch_norm_backward_sums(x, x, mean[:2], mean, False)
    with pytest.raises(RuntimeError, match=r"expected means of size \[2, 3\], but got \[3\]"):
        _ops.batch_norm_backward_apply(x, x, None, mean, mean, mean, False)


def test_the_ops_lose_no_gradient_silently():
    x, mean = torch.randn(2, 3, 4, 5, requires_grad=True), torch.zeros(3)
    ops = torch.ops.fastconv
    for result in (
        ops.batch_norm_moments(x, False),
        ops.batch_norm_backward_sums(x, x, mean, mean, False),
        ops.batch_norm_backward_apply(x, x, None, mean, mean, torch.zeros(2, 3), False),
    ):
        with pytest.raises(NotImplementedError, match="differentiable through fastconv.autograd only"):
            result.sum().backward()


def test_vmap_of_the_ops():
    ops, double = torch.ops.fastconv, {"dtype": torch.float64}
    x, dy, mean = torch.randn(2, 4, 3, 5, 6, **double), torch.randn(4, 2, 3, 5, 6, **double), torch.rand(4, 3, **double)
    weight, means = torch.rand(3, **double), torch.rand(2, 4, 3, **double)

    def apply(x, dy, weight, mean, means):
        return (
            ops.batch_norm_moments(x, False),
            ops.batch_norm_backward_sums(dy, x, mean, mean, False),
            ops.batch_norm_backward_apply(dy, x, weight, mean, mean, means, False),
        )

    mapped = torch.func.vmap(apply, (1, 0, None, 0, 1))(x, dy, weight, mean, means)
    for i in range(4):
        single = apply(x[:, i], dy[i], weight, mean[i], means[:, i])
        for actual, expected in zip(mapped, single, strict=True):
            torch.testing.assert_close(actual[i], expected, rtol=1e-12, atol=1e-12)


# ---- Conversion ----


def test_convert_sync_batchnorm_keeps_the_state_of_a_network():
    model = networks.ResNet(18, classes=10)
    fastconv.convert(model[5])  # so that there are torch's BatchNorms and fastconv's
    state, parameters = copy.deepcopy(model.state_dict()), {id(p) for p in model.parameters()}
    batch_norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    group = object()
    assert fastconv.convert_sync_batchnorm(model, group) is model
    layers = dict(model.named_modules())
    assert all(type(layers[name]) is fastconv.SyncBatchNorm for name in batch_norms)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in layers.values())
    assert all(layers[name].process_group is group and layers[name].training for name in batch_norms)
    assert {id(p) for p in model.parameters()} == parameters
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_convert_sync_batchnorm_of_a_single_layer_keeps_its_options():
    layer = fastconv.BatchNorm2d(3, 1e-3, None, affine=False).eval()
    converted = fastconv.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert type(converted) is fastconv.SyncBatchNorm and not converted.training
    assert (converted.eps, converted.momentum, converted.affine) == (1e-3, None, False)


def test_convert_and_revert_swap_torchs_sync_batch_norm():
    model = nn.Sequential(nn.SyncBatchNorm(3))
    before = repr(model)
    assert type(fastconv.convert(model)[0]) is fastconv.SyncBatchNorm and repr(model) == before
    assert fastconv.coverage(model)[0].swapped
    assert model[0].process_group is None and model(torch.randn(2, 3, 4, 5)).shape == (2, 3, 4, 5)
    assert type(fastconv.revert(model)[0]) is nn.SyncBatchNorm
    assert repr(fastconv.SyncBatchNorm(3, affine=False)) == repr(nn.SyncBatchNorm(3, affine=False))


# ---- DistributedDataParallel ----


class Network(nn.Module):
    """Convolution, pooling, normalization; a branch of the first convolution is taken for `wide` samples only."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch = (nn.Conv2d(3, 8, 3, padding=1, bias=False) for _ in range(2))
        self.rest = nn.Sequential(
            nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(54, 4),
        )  # fmt: skip

    def forward(self, x, wide):
        y = self.stem(x)
        if wide:
            y = torch.cat([y[:wide] + self.branch(x[:wide]), y[wide:]])
        return self.rest(y)


def ddp_gradients(rank, model, x, sizes, options, wide):
    """By name, of the second step; the loss is a sum over samples, which DDP divides by the processes."""
    parallel = DistributedDataParallel(model, **options)
    for _ in range(2):
        parallel.zero_grad()
        y = parallel(x.split(sizes)[rank], wide[rank])
        (RANKS * y.square().sum()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


DDP_OPTIONS = {  # and the wide samples of each process
    "default": ({}, (4, 3)),
    "gradient_as_bucket_view": ({"gradient_as_bucket_view": True}, (4, 3)),
    "static_graph": ({"static_graph": True}, (4, 3)),
    "find_unused_parameters": ({"find_unused_parameters": True}, (4, 0)),
}


@pytest.mark.parametrize("name", DDP_OPTIONS)
def test_ddp_gives_the_gradients_of_one_process_on_the_whole_batch(on_ranks, name):
    options, wide = DDP_OPTIONS[name]
    model, x = Network().double(), torch.randn(7, 3, 14, 14, dtype=torch.float64)
    synchronized = fastconv.convert(sync(model))
    results = on_ranks(ddp_gradients, synchronized, x, (4, 3), options, wide)
    model(x, sum(wide)).square().sum().backward()
    for result in results:
        for key, p in model.named_parameters():
            assert_close(result[key], p.grad)


@pytest.mark.parametrize("name", DDP_OPTIONS)
def test_ddp_over_converted_layers_gives_the_gradients_of_torchs(on_ranks, name):
    """With BatchNorm of each process' own part, which torch's layers can do on a CPU as well."""
    options, wide = DDP_OPTIONS[name]
    model, x = Network().double(), torch.randn(7, 3, 14, 14, dtype=torch.float64)
    arguments = (x, (4, 3), options, wide)
    theirs = on_ranks(ddp_gradients, model, *arguments)
    ours = on_ranks(ddp_gradients, fastconv.convert(copy.deepcopy(model)), *arguments)
    for a, b in zip(ours, theirs, strict=True):
        for key in b:
            assert_close(a[key], b[key])

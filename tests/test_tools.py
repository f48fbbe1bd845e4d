"""torch's tools around layers: parametrizations, fusing, pruning, averaged models, processes and threads."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small_network import assert_close, assert_same, converted, images, network, train
from torch import nn
from torch.nn.utils import fusion, parametrizations, prune
from torch.optim import swa_utils
from torch.utils.data import DataLoader, Dataset

import fastconv


def conv_pair(**keywords):
    """torch's layer and the same one converted, and an input."""
    layer = nn.Conv2d(3, 4, 3, dtype=torch.float64, **keywords)
    return layer, converted(layer), images(torch.float64)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm, nn.utils.spectral_norm]
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weight_and_spectral_norm_before_and_after_conversion(norm, order):
    theirs, _, x = conv_pair()
    ours = copy.deepcopy(theirs)
    torch.manual_seed(1)
    theirs = norm(theirs)
    torch.manual_seed(1)
    ours = fastconv.convert(norm(ours)) if order == "before" else norm(fastconv.convert(ours))
    assert isinstance(ours, fastconv.Conv2d)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_close(train(ours, x), train(theirs, x))
    for layer in (ours, theirs):
        torch.optim.SGD(layer.parameters(), lr=0.01).step()
        layer.eval()
    assert_close(ours(x), theirs(x))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_removing_weight_norm_leaves_a_working_layer():
    _, layer, x = conv_pair()
    expected = layer(x)
    parametrizations.weight_norm(layer)
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is fastconv.Conv2d
    assert_close(layer(x), expected)
    nn.utils.remove_weight_norm(nn.utils.weight_norm(layer))
    assert_close(layer(x), expected)
    with torch.no_grad():  # what is left is a parameter that the layer reads
        layer.weight.mul_(2)
        layer.bias.mul_(2)
    assert_close(layer(x), 2 * expected)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_fusing_a_convolution_with_its_batch_norm(bias):
    conv, norm = nn.Conv2d(3, 4, 3, bias=bias, dtype=torch.float64), nn.BatchNorm2d(4, dtype=torch.float64)
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 2)
    pair = fastconv.convert(nn.Sequential(conv, norm)).eval()
    x = images(torch.float64)
    fused = fusion.fuse_conv_bn_eval(*pair)
    assert type(fused) is fastconv.Conv2d and fused is not conv
    assert_close(fused(x), pair(x))
    weight, bias = fusion.fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    assert_close(fastconv.conv2d(x, weight, bias), pair(x))


def test_pruning():
    theirs, ours, x = conv_pair()
    assert_close(ours(x), theirs(x))
    for layer in (theirs, ours):
        prune.l1_unstructured(layer, "weight", 0.5)
        prune.ln_structured(layer, "weight", 1, n=2, dim=0)
    assert_close(train(ours, x), train(theirs, x))
    assert (ours.weight == 0).sum() >= ours.weight.numel() / 2
    pruned = ours(x)
    prune.remove(ours, "weight")
    assert isinstance(ours.weight, nn.Parameter) and torch.equal(ours(x), pruned)
    fastconv.revert(ours)
    assert_close(ours(x), pruned)


def test_averaged_models_and_update_bn():
    theirs, data = network(torch.float64), [images(torch.float64) for _ in range(3)]
    results = []
    for model in (converted(theirs), theirs):
        averaged = swa_utils.AveragedModel(model, use_buffers=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for x in data:
            train(model, x)
            optimizer.step()
            averaged.update_parameters(model)
        swa_utils.update_bn(data, averaged)
        results.append(averaged.state_dict())
    assert list(results[0]) == list(results[1])
    for key, value in results[1].items():
        assert_close(results[0][key], value)
    assert results[0]["module.1.num_batches_tracked"] == 3


# ---- Other processes ----


class Convolved(Dataset):
    """Images, each convolved where the DataLoader asks for it."""

    def __init__(self, x, layer):
        self.x, self.layer = x, layer

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        with torch.no_grad():
            return self.layer(self.x[i])


def test_data_loader_workers_that_were_forked_can_convolve(threads):
    threads(2)
    layer, x = fastconv.Conv2d(16, 32, 3), torch.randn(4, 16, 40, 40)
    expected = torch.stack([layer(image) for image in x])  # the pool of threads, which a fork does not copy, has run
    loader = DataLoader(Convolved(x, layer), 2, num_workers=2, multiprocessing_context="fork", timeout=30)
    assert torch.equal(torch.cat(list(loader)), expected)


def hogwild(model, x):
    torch.set_num_threads(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, x)
    optimizer.step()


def test_a_forked_process_trains_a_shared_model():
    model, x = converted(network()).share_memory(), images()
    expected = copy.deepcopy(model)
    hogwild(expected, x)
    process = torch.multiprocessing.get_context("fork").Process(target=hogwild, args=(model, x))
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert_same(model.state_dict().values(), expected.state_dict().values())


def test_threads_that_share_a_layer_get_the_results_of_one():
    model, inputs = converted(network()).eval(), [images() + i for i in range(16)]
    expected = [model(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        assert_same(pool.map(model, inputs), expected)

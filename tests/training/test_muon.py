"""Muon beside a decomposition into singular values, beside torch's own on matrices, and beside SGD on all else."""

import pytest
import torch
from torch import nn

from cifar_fastai.training.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (16, 16), (3, 8, 72)])
def test_orthogonalised_keeps_the_directions_and_evens_the_singular_values(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    core = u.mT @ orthogonalised(x) @ vt.mT  # (..., m, m), in the basis of the singular vectors
    values = core.diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(core, torch.diag_embed(values), atol=1e-9)
    large = s > 0.013 * s.norm(dim=-1, keepdim=True)
    assert large.sum() > large.numel() / 2
    assert values[large].min() > 0.5 and values.max() < 1.21


def test_a_step_of_filters_is_torchs_muon_on_the_matrix():
    torch.manual_seed(0)
    filters = nn.Parameter(torch.randn(8, 4, 3, 3))
    matrix = nn.Parameter(torch.zeros(8, 36))
    ours = Muon([filters], lr=0.1, momentum=0.8, nesterov=True)
    theirs = torch.optim.Muon([matrix], lr=0.1, momentum=0.8, nesterov=True, weight_decay=0, ns_steps=3)
    for _ in range(3):
        gradient = torch.randn(8, 4, 3, 3)
        filters.grad, matrix.grad = gradient.clone(), gradient.flatten(1).clone()
        unit, before = filters.detach() * (8**0.5 / filters.detach().norm()), matrix.detach().clone()
        ours.step()
        theirs.step()
        moved, expected = (filters - unit).detach().flatten(1), (matrix - before).detach()
        assert (moved - expected).norm() < 0.02 * expected.norm()  # theirs computes in bfloat16


def network():
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    return nn.Sequential(*stem, nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5))


def test_all_but_filters_follow_torchs_sgd():
    ours, theirs = network(), network()
    settings = dict(lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True)
    muon, sgd = Muon(ours.parameters(), **settings), torch.optim.SGD(theirs.parameters(), **settings)
    for step in range(3):
        torch.manual_seed(step)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        muon.step()
        sgd.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b) == (a.ndim != 4), name


def test_batch_norm_does_not_see_how_long_filters_are_made():
    torch.manual_seed(0)
    net = network()[:3].train()
    images = torch.randn(4, 3, 8, 8)
    before = net(images)
    optimizer = Muon(net.parameters(), lr=1e-30)
    net(images).square().sum().backward()
    optimizer.step()
    assert net[0].weight.norm().item() == pytest.approx(8**0.5, rel=1e-5)
    assert torch.allclose(net(images), before, atol=1e-3)


def test_a_closure_is_called_once_and_the_gradients_stay():
    net, calls = network(), []
    optimizer = Muon(net.parameters(), lr=0.1, momentum=0.9)
    images = torch.randn(4, 3, 8, 8)

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = net(images).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0 and len(calls) == 1
    assert all(p.grad is not None for p in net.parameters())


def test_filters_without_a_gradient_or_of_zeros_stay():
    net = network()
    before = net[0].weight.detach().clone()
    Muon(net.parameters(), lr=0.1).step()
    assert torch.equal(net[0].weight, before)
    filters = nn.Parameter(torch.zeros(8, 4, 3, 3))
    filters.grad = torch.zeros_like(filters)
    Muon([filters], lr=0.1).step()
    assert torch.equal(filters.detach(), torch.zeros(8, 4, 3, 3))

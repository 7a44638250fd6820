"""Muon: momentum whose direction is made orthogonal, for convolutions that a batch norm follows."""

import torch
from torch.optim.sgd import sgd

__all__ = ["Muon", "orthogonalised"]


def orthogonalised(matrices, n_steps=3):
    """Matrices (..., m, n) with their larger singular values brought near 1; the directions stay.

    In place of a decomposition a polynomial in X X^T, applied `n_steps` times: three bring whatever is above .013 of
    the Frobenius norm to between .5 and 1.21. Jordan and others: Muon, an optimizer for hidden layers in neural
    networks, 2024.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalised(matrices.mT, n_steps).mT
    wide = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)  # (..., m, n), m <= n
    gram = wide @ wide.mT  # (..., m, m)
    step = turned = _nearer_one(gram)
    for _ in range(n_steps - 1):  # on m x m alone: the steps commute, so that they meet the n columns once, at the end
        gram = step @ gram @ step
        step = _nearer_one(gram)
        turned = step @ turned
    return turned @ wide


def _nearer_one(gram):
    """What brings matrices X, whose X X^T is `gram` (..., m, m), one step nearer: a polynomial in it."""
    one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return 3.4445 * one - 4.7750 * gram + 2.0315 * gram @ gram


class Muon(torch.optim.Optimizer):
    """Muon for weights of four dimensions, those of 2-D convolutions; for all else SGD as torch's.

    A convolution's weight (n_out, n_in, h, w) is taken as n_out rows. Before each step it is given the length
    sqrt(n_out), then it moves by `lr` in the orthogonalised direction, whose length is at most about sqrt(n_out), too.
    That is for networks like Jordan's airbench and the ResNets here, where a batch norm follows every convolution: its
    output does not depend on that length, and weight decay, which would only steer the length, is left out there. A
    convolution without batch norm would have its output rescaled.

    torch's own `Muon` takes nothing but matrices, and computes in bfloat16 on every device.
    """

    def __init__(self, params, lr=0.05, momentum=0.9, weight_decay=0.0, nesterov=True, foreach=None):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, foreach=foreach)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """One step, from the gradients that are there or that `closure` leaves; what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        filters = {}  # by shape, as they are made orthogonal together
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            self._descend([p for p in params if p.ndim != 4], group)
            for p in params:
                if p.ndim == 4:
                    filters.setdefault((p.shape, p.device, p.dtype), []).append((p, group))
        for alike in filters.values():
            self._turn(alike)
        return loss

    def _descend(self, params, group):
        """torch's SGD for `params` of `group`."""
        buffers = [self.state[p].get("momentum_buffer") for p in params]
        sgd(
            params,
            [p.grad for p in params],
            buffers,
            foreach=group["foreach"],
            lr=group["lr"],
            dampening=0.0,
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=False,
            has_sparse_grad=False,
        )
        if group["momentum"]:
            for p, buffer in zip(params, buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer

    def _turn(self, alike):
        """Step the weights `alike` in shape, a list of (parameter, group)."""
        ahead = []
        for p, group in alike:
            momentum, direction = group["momentum"], p.grad
            if momentum:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(momentum).add_(p.grad)
                direction = p.grad.add(buffer, alpha=momentum) if group["nesterov"] else buffer
            ahead.append(direction.flatten(1))
        turns = orthogonalised(torch.stack(ahead))  # (len(alike), n_out, n_in h w)
        for (p, group), turn in zip(alike, turns, strict=True):
            p.mul_(len(p) ** 0.5 / p.norm().clamp(min=1e-12)).add_(turn.view(p.shape), alpha=-group["lr"])

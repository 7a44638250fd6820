"""Muon: momentum whose direction is made orthogonal, for convolutions that a batch norm follows."""

import torch

__all__ = ["Muon", "orthogonalised"]


def orthogonalised(matrices, n_steps=3):
    """Matrices (..., m, n) with their singular values, all of them, brought near 1; their directions stay.

    In place of a decomposition a polynomial in X X^T, applied `n_steps` times: three bring whatever is above .013 of
    the Frobenius norm to between .5 and 1.21. Jordan and others: Muon, an optimizer for hidden layers in neural
    networks, 2024.
    """
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT  # (..., m, n), m <= n
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
    gram = wide @ wide.mT  # (..., m, m)
    one = torch.eye(wide.shape[-2], dtype=wide.dtype, device=wide.device)
    turned = one
    for _ in range(n_steps):  # on m x m alone: the steps commute, so that they meet the n columns once, at the end
        step = 3.4445 * one - 4.7750 * gram + 2.0315 * gram @ gram
        turned, gram = step @ turned, step @ gram @ step
    wide = turned @ wide
    return wide if matrices.shape[-2] <= matrices.shape[-1] else wide.mT


class Muon(torch.optim.SGD):
    """Muon for the weights of convolutions, (n_out, n_in, h, w) taken as n_out rows; torch's `SGD` for all else.

    Each step turns the whole filter bank by about `lr` of its length, and brings its length back to sqrt(n_out), as
    in Jordan's airbench: batch norm makes the output blind to that length, so that weight decay, which would only
    steer it, is left out there. torch's own `Muon` takes matrices alone and computes in bfloat16 everywhere.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """One step, from the gradients that are there or that `closure` leaves; what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        filters = {}  # by shape, as they are made orthogonal together
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim == 4 and p.grad is not None:
                    filters.setdefault(p.shape, []).append((p, p.grad, group))
        for alike in filters.values():
            self._turn(alike)
        both = [(p, grad) for alike in filters.values() for p, grad, _ in alike]
        for p, _ in both:
            p.grad = None  # SGD passes over it
        super().step()
        for p, grad in both:
            p.grad = grad
        return loss

    def _turn(self, alike):
        """Step the filters `alike` in shape: a list of (parameter, gradient, group)."""
        ahead = []
        for p, grad, group in alike:
            buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            buffer.mul_(group["momentum"]).add_(grad)
            ahead.append((grad.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer).flatten(1))
        turns = orthogonalised(torch.stack(ahead))  # (len(alike), n_out, n_in h w)
        for (p, _, group), turn in zip(alike, turns, strict=True):
            p.mul_(len(p) ** 0.5 / p.norm().clamp(min=1e-12)).add_(turn.view(p.shape), alpha=-group["lr"])

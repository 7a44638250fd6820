"""Muon: momentum whose direction is made orthogonal, for convolutions that a batch norm follows."""

import torch

from cifar_fastai.training.distributed import spread


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
    step = product = _polynomial(gram)
    for _ in range(n_steps - 1):  # on m x m alone: the steps commute, so the n columns are multiplied once, at the end
        gram = step @ gram @ step
        step = _polynomial(gram)
        product = step @ product
    return product @ wide


def _polynomial(gram):
    """The factor that brings matrices X, whose X X^T is `gram` (..., m, m), one step nearer to orthogonal."""
    one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return 3.4445 * one - 4.7750 * gram + 2.0315 * gram @ gram


class Muon(torch.optim.SGD):
    """Muon for weights of four dimensions, those of 2-D convolutions; torch's SGD for all else.

    A convolution's weight (n_out, n_in, h, w) is taken as n_out rows. Before each step it is scaled to the length
    sqrt(n_out), then it moves by `lr` in the orthogonalised direction, whose length is at most about sqrt(n_out), too.
    That is for networks like Jordan's airbench and the ResNets here, where a batch norm follows every convolution: its
    output does not depend on that length, and weight decay, which would only change the length, is left out there. A
    convolution without batch norm would have its output rescaled.

    torch's own `Muon` takes matrices only, and computes in bfloat16 on every device.
    """

    def __init__(self, params, lr=0.05, momentum=0.9, weight_decay=0.0, nesterov=True, foreach=None):
        super().__init__(params, lr, momentum, weight_decay=weight_decay, nesterov=nesterov, foreach=foreach)

    @torch.no_grad()
    def step(self, closure=None):
        """One step from the present gradients, or those that `closure` computes; the value of `closure`."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        filters = {}  # by shape: those of one shape are made orthogonal together
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim == 4 and p.grad is not None:
                    filters.setdefault((p.shape, p.device, p.dtype), []).append((p, p.grad, group))
                    p.grad = None  # SGD skips it
        super().step()
        for same_shape in filters.values():
            self._step_filters(same_shape)
        return loss

    def _step_filters(self, same_shape):
        """Step the weights of one shape, a list of (parameter, gradient, group), and restore their gradients."""
        directions = []
        for p, grad, group in same_shape:
            p.grad = direction = grad
            if group["momentum"]:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(grad)
                direction = grad.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
            directions.append(direction.flatten(1))
        rotations = spread(orthogonalised, torch.stack(directions))  # (len(same_shape), n_out, n_in h w)
        for (p, _, group), rotation in zip(same_shape, rotations, strict=True):
            p.mul_(len(p) ** 0.5 / p.norm().clamp(min=1e-12)).add_(rotation.view(p.shape), alpha=-group["lr"])

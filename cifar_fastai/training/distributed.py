"""One network trained by several processes, as torchrun or accelerate start them, with fastai's DistributedTrainer.

Callbacks need not know of it: all processes run the same program, and the first alone prints and writes (`meet`).
"""

import itertools
import os
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress

import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from torch import nn

from cifar_fastai.errors import check_extra
from cifar_fastai.files import writing
from cifar_fastai.hardware import n_processes, rank

__all__ = ["from_first", "gathered", "meet", "one_first", "share_training", "spread"]

_MEETINGS = itertools.count()


@contextmanager
def meet():
    """Join the processes that torchrun or accelerate has started; all but the first print and write nothing."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if is_new := not dist.is_initialized():  # else accelerate's debug_launcher has joined them
        store, number, n = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"meeting {next(_MEETINGS)}", store)  # a second one must not read what the first wrote
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=n)
    if (local := int(os.environ.setdefault("LOCAL_RANK", str(rank())))) < torch.cuda.device_count():
        torch.cuda.set_device(local)
    # fastai reads these, and where it finds them it gathers and writes by other rules than ours
    launcher = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    try:
        stdout, stderr = (None, None) if rank() else (sys.stdout, sys.stderr)
        with writing(rank() == 0), redirect_stdout(stdout), redirect_stderr(stderr):
            check_extra("distributed", "accelerate")
            yield
        if is_new:
            dist.destroy_process_group()
    except BaseException as error:
        with suppress(RuntimeError, KeyboardInterrupt):  # the process that keeps the store may have ended
            if dist.distributed_c10d._get_default_store().add("failures", 1) > 1:
                time.sleep(1)  # torchrun ends all processes when one has ended: the first prints its message before
                raise SystemExit(1) from None
        if isinstance(error, RuntimeError) and "gloo" in str(error):
            error.args = ("another process has ended",)
        raise
    finally:
        os.environ.update(launcher)


def gathered(value):
    """The `value` of every process, a list."""
    values = [value] * n_processes()
    if n_processes() > 1:
        dist.all_gather_object(values, value)
    return values


def from_first(make):
    """The value of `make()` in the first process, in all of them; the others do not call it."""
    values = [None if rank() else make()]
    if n_processes() > 1:
        dist.broadcast_object_list(values)
    return values[0]


@contextmanager
def one_first():
    """The block in the first process of each machine, then in the others, which find the files that it has written."""
    is_first = n_processes() == 1 or os.environ["LOCAL_RANK"] == "0"
    for turn in (True, False):
        if turn == is_first:
            with writing(is_first):
                yield
        gathered(None)


def spread(function, batch):
    """`function(batch)`, which treats the K items of a tensor one by one and keeps its shape.

    Each process computes a share of the items; there is none for some where K is smaller than their number.
    """
    if n_processes() == 1:
        return function(batch)
    shares = [share.clone() for share in batch.split(-(-len(batch) // n_processes()))]
    if rank() < len(shares):
        shares[rank()] = function(shares[rank()]).contiguous()
    for work in [dist.broadcast(share, k, async_op=True) for k, share in enumerate(shares)]:
        work.wait()
    return torch.cat(shares)


@contextmanager
def share_training(learn, sync_bn=False):
    """Fits of `learn`, on loaders of `cifar_dls`, train one network in all processes; `sync_bn`: batch norm, too.

    Each takes every n-th image of a batch, so that step k sees the same images on any number of them.
    """
    if n_processes() == 1:
        yield
        return
    from fastai.distributed import DistributedTrainer  # cannot be imported without accelerate

    on_cpu = learn.dls.device.type == "cpu"
    trainer = DistributedTrainer(sync_bn=False, cpu=on_cpu, mixed_precision="no")
    trainer._wrap_dl = lambda dl: dl  # an `ArrayDL` takes its part of each batch, fastai's DistributedDL of each epoch
    norms = [module for module in learn.model.modules() if sync_bn and type(module) is nn.BatchNorm2d]

    def switch(part, kind):
        for dl in learn.dls.loaders:
            dl.part = part
        for norm in norms:  # in place, as the optimizer holds the parameters
            norm.__class__, norm.process_group = kind, None

    switch(slice(rank(), None, n_processes()), _SyncBatchNorm if on_cpu else nn.SyncBatchNorm)
    try:
        with learn.added_cbs([trainer, _Gather(), _Align()]):
            yield
    finally:
        learn.model = getattr(learn.model, "module", learn.model)
        switch(slice(None), nn.BatchNorm2d)


class _Gather(Callback):
    """The loss of each step and the metrics of each epoch over the images of all processes."""

    order = 12  # after fastai's DistributedTrainer has wrapped the model, before the Recorder reads the metrics

    def before_fit(self):
        model = self.learn.model  # its weights keep their names
        model.state_dict, model.load_state_dict = model.module.state_dict, model.module.load_state_dict

    def after_loss(self):
        if self.training:
            self.learn.loss = _SumOverAll.apply(self.loss.detach()) / n_processes()

    def after_train(self):
        for metric in self.recorder._train_mets if self.training else self.recorder._valid_mets:
            sums = torch.tensor([float(metric.total), metric.count], dtype=torch.float64)  # of a `DeviceMean`
            metric.total, metric.count = _SumOverAll.apply(sums)

    after_validate = after_train


class _Align(Callback):
    """Random numbers of its own in every process, and the first one's buffers in all where they evaluate."""

    order = 110  # after `Checkpoint` has restored random states, and `WeightAverage` the averages

    def before_train(self):
        self.model.require_forward_param_sync = True
        seed = from_first(lambda: torch.randint(2**62, ()).item())
        if rank():
            torch.manual_seed(seed + rank())

    def before_validate(self):
        self.model.require_forward_param_sync = False  # the last batch may have no image for some
        for buffer in self.model.buffers():
            dist.broadcast(buffer, 0)


class _SumOverAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        dist.all_reduce(total := x.clone(memory_format=torch.contiguous_format))
        return total

    backward = forward


class _SyncBatchNorm(nn.BatchNorm2d):
    """torch's SyncBatchNorm for a CPU, where every process has as many images."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        pixels, n = x.to(torch.promote_types(x.dtype, torch.float32)), n_processes() * x[:, 0].numel()  # (B, C, H, W)
        mean = _SumOverAll.apply(pixels.sum((0, 2, 3), keepdim=True)) / n  # (1, C, 1, 1)
        centred = pixels - mean
        var = _SumOverAll.apply(centred.square().sum((0, 2, 3), keepdim=True)) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten() * n / (n - 1), self.momentum)
        weight, bias = (p.view_as(mean) for p in (self.weight, self.bias))
        return (centred * (weight * (var + self.eps).rsqrt()) + bias).to(x.dtype)

"""Two processes train the network that one trains: the same images in every step, the same numbers in both."""

import multiprocessing
import os
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import debug_launcher
from fastai.callback.core import Callback

from cifar_fastai import errors
from cifar_fastai.data.images import load_images
from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.errors import InputError
from cifar_fastai.evaluation.predictions import predict
from cifar_fastai.files import write_json
from cifar_fastai.hardware import n_processes, rank
from cifar_fastai.models import create_model
from cifar_fastai.training.distributed import gathered, meet, one_first, share_training, spread
from cifar_fastai.training.learner import cifar_learner
from cifar_fastai.training.muon import orthogonalised
from cifar_fastai.training.range_test import range_test


def in_two(folder, function, *args):
    """What `function(*args)` returns in each of two processes that have met."""
    debug_launcher(_keep_result, (folder, function, args), 2)
    return [torch.load(folder / f"{k}.pth", weights_only=False) for k in range(2)]


def _keep_result(folder, function, args):
    with meet():
        torch.set_num_threads(1)
        torch.save(function(*args), folder / f"{rank()}.pth")


class Double(Callback):
    """Computes in float64, and keeps the images of every step."""

    def __init__(self, is_double):
        self.dtype, self.steps = torch.float64 if is_double else torch.float32, []

    def before_batch(self):
        self.learn.xb = (self.xb[0].to(self.dtype),)
        if self.training:
            self.steps.append(self.xb[0].as_subclass(torch.Tensor))


def fit(images, model, n_epochs=2, is_double=False, bs=8, val_bs=17, padding=0, **options):
    """Fit `model`: weights, history without the clock, images by step, predictions."""
    random.seed(0), torch.manual_seed(0)
    dls = cifar_dls(images, bs=bs, val_bs=val_bs, device="cpu", padding=padding, cutout=0, flip=0.0)
    double = Double(is_double)
    learn = cifar_learner(dls, model, precision="fp32", cbs=double, **dict(opt="sgd", lr=0.1) | options)
    with learn.no_bar(), learn.no_logging():
        with share_training(learn, sync_bn=True):
            learn.fit(n_epochs)
        steps = list(double.steps)
        preds = predict(learn, tta=(None, "flip"))
    rows = [[row[name] for name in row if name not in ("images_per_second", "seconds")] for row in learn.history.rows]
    return dict(learn.model.state_dict()), rows, steps, preds


def largest_difference(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_ten_steps_in_float64_are_those_of_one_process(tiny_images, tiny_model, tmp_path):
    model = tiny_model.double()
    two = in_two(tmp_path, fit, tiny_images, model, 2, True)
    weights, rows, steps, preds = fit(tiny_images, model, 2, True)
    assert len(steps) == 12 and largest_difference(weights, two[0][0]) < 1e-8
    assert largest_difference(two[0][0], two[1][0]) == 0
    for step, *shares in zip(steps, two[0][2], two[1][2], strict=True):
        assert all(torch.equal(step[k::2], share) for k, share in enumerate(shares)), "the images of step k"
    for theirs in two:  # evaluated in batches of 17 and 1: the second process has none of the last
        assert np.allclose(np.array(theirs[1], float), np.array(rows, float), rtol=1e-6)
        for mine, whole in zip(theirs[3], preds, strict=True):
            assert np.array_equal(mine.targets, whole.targets) and len(mine) == 18
            assert np.allclose(mine.probs, whole.probs, atol=1e-6) and np.allclose(mine.losses, whole.losses, atol=1e-6)
            assert np.array_equal(mine.confusion_matrix, whole.confusion_matrix)
    assert two[0][1] == two[1][1]


@pytest.mark.parametrize("opt, width", [("sgd", 16), ("muon", 16), pytest.param("sgd", 64, marks=pytest.mark.slow)])
def test_a_step_of_resnet18(tiny_images, tmp_path, opt, width):
    first, train = tiny_images.images[:16], tiny_images.labels[:16]
    images = replace(
        tiny_images,
        images=np.concatenate([first, tiny_images.test_images[:3]]),
        labels=np.concatenate([train, tiny_images.test_labels[:3]]),
        n_train=16,
    )
    torch.manual_seed(0)
    options = dict(n_epochs=1, bs=16, opt=opt, lr=0.01)
    fit_one = partial(fit, images, create_model("resnet18", 3, width), **options)
    two, one = in_two(tmp_path, fit_one), fit_one()
    assert largest_difference(one[0], two[0][0]) < 1e-4
    assert largest_difference(two[0][0], two[1][0]) == 0


def test_they_augment_differently(tiny_images, tiny_model, tmp_path):
    images = replace(tiny_images, images=np.repeat(tiny_images.images[:1], 66, axis=0))
    two = in_two(tmp_path, partial(fit, images, tiny_model, 1, padding=8))
    for own, other in zip(two[0][2], two[1][2], strict=True):
        assert not torch.equal(own, other)


def both_test_ranges(images, model):
    learn = cifar_learner(cifar_dls(images, bs=8, device="cpu"), model, opt="sgd", precision="fp32")
    with learn.no_bar(), share_training(learn):
        return range_test(learn, num_it=20).losses


def test_a_range_test_sees_the_loss_of_the_whole_batch(tiny_images, tiny_model, tmp_path):
    one, other = in_two(tmp_path, both_test_ranges, tiny_images, tiny_model)
    assert one == other and len(one) > 10


def spread_each(batches):
    sizes = []

    def rotate(batch):
        sizes.append(len(batch))
        return orthogonalised(batch)

    return [spread(rotate, batch) for batch in batches], sizes


def test_spread_computes_each_item_once(tmp_path):
    batches = [torch.randn(k, 12, 8) for k in (1, 2, 5)]
    two = in_two(tmp_path, spread_each, batches)
    for results, _ in two:
        for result, batch in zip(results, batches, strict=True):
            assert torch.allclose(result, orthogonalised(batch), atol=1e-6)
    assert [sizes for _, sizes in two] == [[1, 1, 3], [1, 2]]


def decode_and_write(folder, source):
    images = load_images_in_turn(source, folder / "cache")
    write_json(folder / "file.json", dict(rank=rank()))
    print(f"rank {rank()}")
    return len(images.labels), gathered(len(list((folder / "cache").glob("*.npz")))), n_processes()


def load_images_in_turn(source, cache):
    with one_first():
        return load_images(source, cache_dir=cache, progress=False)


def test_one_decodes_writes_and_prints(tiny_folder, tmp_path, monkeypatch, capfd):
    from cifar_fastai.data import images

    def decode(*args):
        with open(tmp_path / "decoded", "a") as file:
            file.write("once\n")
        return original(*args)

    original = images.decode
    monkeypatch.setattr(images, "decode", decode)
    assert in_two(tmp_path, decode_and_write, tmp_path, tiny_folder) == [(66, [1, 1], 2)] * 2
    assert (tmp_path / "decoded").read_text() == "once\n"
    assert (tmp_path / "file.json").read_text() == '{\n  "rank": 0\n}\n'
    assert capfd.readouterr().out == "rank 0\n"


def _meet_twice(k, environment, results):
    os.environ.update(environment, RANK=str(k), WORLD_SIZE="2", LOCAL_RANK=str(k))
    for n in range(2):
        with meet():
            results.put((n, k, gathered(f"{n}{k}"), os.environ.get("RANK")))
    results.put((2, k, n_processes(), os.environ["RANK"]))


def test_they_meet_again():
    """A program trains one network after another."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun keeps one
    environment = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True")
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=_meet_twice, args=(k, environment, results)) for k in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    met = [(n, k, [f"{n}0", f"{n}1"], None) for n in range(2) for k in range(2)]
    assert sorted(results.get() for _ in range(6)) == [*met, (2, 0, 1, "0"), (2, 1, 1, "1")]


def test_a_missing_accelerate_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        message = r'accelerate is not installed: pip install "cifar_fastai\[distributed\]"'
        with pytest.raises(InputError, match=message), meet():
            raise AssertionError("nothing is trained")
    finally:
        dist.destroy_process_group()

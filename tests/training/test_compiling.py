"""torch.compile changes the speed alone, and one that fails changes nothing."""

from contextlib import nullcontext

import pytest
import torch
from fastai.learner import load_learner
from torch import nn

from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.evaluation.gradcam import gradcam
from cifar_fastai.training.compiling import choose_compile, compile_model, uncompile
from cifar_fastai.training.learner import cifar_learner

CPU = torch.device("cpu")


def test_auto_weighs_the_length_of_the_run(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/c++")
    assert choose_compile("auto", CPU, 1_000_000)[0]
    assert not choose_compile("auto", CPU, 1_000)[0]
    assert choose_compile("yes", CPU, 1) == (True, "as requested")
    assert choose_compile("no", CPU, 10**9) == (False, "as requested")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert choose_compile("auto", CPU, 10**9) == (False, "there is no C++ compiler")


def test_a_compile_that_fails_says_so_in_a_line_and_leaves_the_model_as_it_was(tiny_model):
    x = torch.randn(4, 3, 32, 32)
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    expected, rng = tiny_model.eval()(x), torch.get_rng_state()

    def broken(graph, inputs):
        raise RuntimeError("no such compiler\nwith more lines")

    compiled = nn.Module.compile
    try:
        nn.Module.compile = lambda self, **kwargs: compiled(self, backend=broken)
        failed = compile_model(tiny_model, x, nullcontext())
    finally:
        nn.Module.compile = compiled
    assert failed.startswith("not compiled: ") and "\n" not in failed
    assert torch.equal(tiny_model.eval()(x), expected) and torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(before[name], value) for name, value in tiny_model.state_dict().items())
    assert all(p.grad is None for p in tiny_model.parameters())


@pytest.mark.slow
def test_compiled_trains_exports_and_explains_as_eager_does(tiny_images, tiny_model, tmp_path):
    names = list(tiny_model.state_dict())
    dls = cifar_dls(tiny_images, bs=8, device="cpu")
    learn = cifar_learner(dls, tiny_model, path=tmp_path)
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    x = torch.cat([x for x, _ in dls.valid]).as_subclass(torch.Tensor)
    eager = tiny_model.eval()(x)
    assert compile_model(learn.model, x[:8], nullcontext()) is None
    assert all(torch.equal(before[name], value) for name, value in learn.model.state_dict().items())
    assert list(learn.model.state_dict()) == names
    torch.testing.assert_close(learn.model.eval()(x), eager)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 0.1)
        compiled_probs = learn.get_preds()[0]
        heat = gradcam(learn, x, "predicted", "layer1")
        learn.export("learner.pkl")
        loaded = load_learner(tmp_path / "learner.pkl")
        uncompile(learn.model)
        torch.testing.assert_close(learn.get_preds()[0], compiled_probs)
        assert (gradcam(learn, x, "predicted", "layer1").maps == heat.maps).all()
    torch.testing.assert_close(loaded.model.eval()(x), learn.model.eval()(x))

"""torch.compile changes the speed alone, and one that fails changes nothing."""

import os
from contextlib import nullcontext

import pytest
import torch
from fastai.learner import load_learner
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.evaluation.gradcam import gradcam
from cifar_fastai.training.compiling import _use_private_caches, choose_compile, compile_model, uncompile
from cifar_fastai.training.learner import cifar_learner

CPU = torch.device("cpu")
VARIABLES = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"


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


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """(the user's folder for caches, the one for temporary files), both empty; no folder for compiled code is set."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    (tmp_path / "tmp").mkdir()
    return tmp_path / "home" / "cifar_fastai", tmp_path / "tmp"


def test_compiled_code_is_kept_where_nobody_else_can_plant_any(folders, monkeypatch):
    users, temporary = folders
    for _ in range(2):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as the import of torch._dynamo sets it
        _use_private_caches()
    assert [os.environ[name] for name in VARIABLES] == [str(users / "inductor"), str(users / "triton")]
    assert {path.stat().st_mode & 0o777 for path in users.iterdir()} == {0o700} and not list(temporary.iterdir())
    for name in VARIABLES:
        monkeypatch.setenv(name, "/mine")
    _use_private_caches()
    assert [os.environ[name] for name in VARIABLES] == ["/mine", "/mine"]


@pytest.mark.slow
def test_compiling_writes_nothing_into_the_common_folder(folders, tiny_model):
    users, temporary = folders
    assert compile_model(tiny_model, torch.randn(4, 3, 32, 32)) is None
    uncompile(tiny_model)
    assert list(users.rglob("*.so")) and list(users.rglob("*.gch"))
    assert not [path for path in temporary.rglob("*") if path.is_file()]


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

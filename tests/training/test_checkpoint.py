"""checkpoint.pth and weights: a fit goes on to the digit; files that are damaged, altered or planted are refused."""

import ast
import copy
import json
import os
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.metrics import error_rate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_net import TinyNet
from tiny_runs import same

import cifar_fastai
from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.errors import InputError
from cifar_fastai.files import lock_folder
from cifar_fastai.settings import Settings
from cifar_fastai.training import checkpoint
from cifar_fastai.training.callbacks import KeepBest, WeightAverage
from cifar_fastai.training.checkpoint import Checkpoint, latest_unfinished, load_checkpoint, load_weights, save_torch
from cifar_fastai.training.learner import cifar_learner
from cifar_fastai.training.optimizers import body_and_head
from cifar_fastai.training.schedule import fit_scheduled

SLOW_PARTS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
FUZZ = settings(max_examples=200, suppress_health_check=SLOW_PARTS)
META = dict(config={"parameters": {"ema": 0.9}}, given={}, recipe="resnet18", fingerprint="f00d")


class Interrupt(Callback):
    """Ctrl-C after the second epoch is written."""

    order = 105

    def after_epoch(self):
        if self.epoch == 1:
            raise KeyboardInterrupt


def train(images, path, *cbs, saved=None, opt="sgd"):
    """A fit of three epochs that writes `path`; with `saved`, what is left of it."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0 if saved is None else 1)
    dls = cifar_dls(images, bs=8, valid_pct=0.25, device="cpu", cutout=8, flip_by="epoch")
    groups = dict(splitter=body_and_head, wd=1e-3, wd_bn_bias=False)
    learn = cifar_learner(dls, TinyNet(), opt=opt, precision="fp32", metrics=[error_rate], **groups)
    cbs = [WeightAverage(0.9), KeepBest(patience=100), Checkpoint(path, META, saved), *cbs]
    plan = Settings(epochs=3, lr=0.1, valid_pct=0.25, sched="plateau", plateau_patience=0)
    with learn.no_bar(), learn.no_logging():
        fit_scheduled(learn, plan, slice(0.02, 0.1), cbs)
    return learn


_cache = []


@pytest.fixture
def written(tiny_images, tmp_path):
    """The bytes of a checkpoint after two epochs of three, with an average of the weights and a plateau."""
    if not _cache:
        with pytest.raises(KeyboardInterrupt):
            train(tiny_images, tmp_path / "checkpoint.pth", Interrupt())
        _cache.append((tmp_path / "checkpoint.pth").read_bytes())
    return _cache[0]


@pytest.fixture
def altered(written, tmp_path):
    """(path, state) of that checkpoint, to be altered and saved there again."""
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(written)
    return path, load_checkpoint(path)


def refusal(path, load=load_checkpoint):
    with pytest.raises(InputError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


# Going on -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opt", ["sgd", "nadam", "muon"])
def test_a_resumed_fit_ends_as_an_uninterrupted_one(tiny_images, tmp_path, opt):
    straight = train(tiny_images, tmp_path / "straight.pth", opt=opt)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_images, tmp_path / "c.pth", Interrupt(), opt=opt)
    saved = load_checkpoint(tmp_path / "c.pth")
    assert (saved["epoch"], saved["finished_epochs"], saved["train_iter"]) == (2, False, 2 * 4)
    resumed = train(tiny_images, tmp_path / "c.pth", saved=saved, opt=opt)
    assert same(dict(straight.model.state_dict()), dict(resumed.model.state_dict()))
    assert [hyper["lr"] for hyper in resumed.opt.hypers] == [hyper["lr"] for hyper in straight.opt.hypers]
    assert resumed.opt.hypers[1]["lr"] == pytest.approx(5 * resumed.opt.hypers[0]["lr"])
    one, other = load_checkpoint(tmp_path / "straight.pth"), load_checkpoint(tmp_path / "c.pth")
    assert [group["weight_decay"] for group in other["opt"]["param_groups"]] == [1e-3, 0.0] * 2
    assert other["finished_epochs"] and set(other["callbacks"]) == {"weight_average", "keep_best", "plateau"}
    for state in (one, other):
        for row in state["rows"]:
            del row["seconds"], row["images_per_second"]
    for key in one:
        assert same(one[key], other[key]), key


def test_random_states_come_back(tiny_images, tmp_path):
    dls = cifar_dls(tiny_images, bs=8, device="cpu")
    np.random.standard_normal()  # leaves a second one behind, which is part of the state
    save_torch(tmp_path / "states.pth", checkpoint.random_states(dls))

    def draw():
        numbers = [random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()]
        return [*numbers, dls.train.rng.random(), dls.train.one_batch()[0].sum().item()]

    first = draw()
    assert draw() != first
    checkpoint.set_random_states(torch.load(tmp_path / "states.pth", weights_only=True), dls)
    assert draw() == first


def test_the_latest_unfinished_run(tmp_path):
    runs = tmp_path / "runs"
    for n, recipe in enumerate(("resnet18", "resnet34", "resnet18", "resnet18", "resnet18")):
        (runs / f"{n}").mkdir(parents=True)
        (runs / f"{n}" / "config.json").write_text(json.dumps({"recipe": recipe}))
        (runs / f"{n}" / "checkpoint.pth").write_bytes(b"")
        os.utime(runs / f"{n}" / "checkpoint.pth", (n, n))
    (runs / "4" / "checkpoint.pth").unlink()  # finished
    (runs / "2" / "config.json").write_text("{")
    with lock_folder(runs / "3"):  # going on
        assert latest_unfinished("resnet18", runs) == runs / "0"
        assert latest_unfinished("resnet34", runs) == runs / "1"
        assert latest_unfinished(runs=runs) == runs / "1"
    assert latest_unfinished("resnet18", runs) == runs / "3"
    with pytest.raises(InputError, match="resume='latest': no interrupted run of custom_resnet under"):
        latest_unfinished("custom_resnet", runs)


# Damaged --------------------------------------------------------------------------------------------------------------


@FUZZ
@given(st.data())
def test_a_damaged_checkpoint_is_refused_or_whole(written, tmp_path, data):
    path = tmp_path / "c.pth"
    path.write_bytes(_damaged(written, data))
    try:
        state = load_checkpoint(path)
    except InputError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        return
    path.write_bytes(written)
    assert same(state, load_checkpoint(path)), "what is damaged belongs to the archive's padding"


def _damaged(content, data):
    """`content` with some bytes changed, removed, or replaced by others, or with its end cut off."""
    start, length = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 600))
    other = data.draw(st.sampled_from([b"", bytes(length), data.draw(st.binary(max_size=20))]))
    return content[:start] + other + (content[start + length :] if data.draw(st.booleans()) else b"")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x05\x06" + bytes(18), bytes(1000)])
def test_what_is_no_checkpoint_at_all(tmp_path, content):
    path = tmp_path / "c.pth"
    path.write_bytes(content)
    assert "is damaged, or something else" in refusal(path)
    assert "is damaged, or something else" in refusal(path, lambda path: load_weights(TinyNet(), path))
    path.unlink()
    assert refusal(path) == f"{path}: no such file"
    path.mkdir()
    refusal(path)
    for value in (None, {"epoch": 2}, {"epoch": torch.ones(3)}, torch.ones(2)):
        save_torch(tmp_path / "other.pth", value)
        assert "not a checkpoint" in refusal(tmp_path / "other.pth")


def test_weights_of_another_network(tmp_path):
    net = TinyNet()
    more = net.state_dict() | {"more": torch.ones(1)}
    for value in (TinyNet(4).state_dict(), {}, {"linear.bias": "text"}, [1, 2], None, {1: torch.ones(1)}, more):
        save_torch(tmp_path / "model.pth", value)
        message = refusal(tmp_path / "model.pth", lambda path: load_weights(net, path))
        assert "does not fit the network" in message


# Planted --------------------------------------------------------------------------------------------------------------


class Planted:
    """Unpickled, it calls `function` with `args`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


PLANTS = {
    "os.system": lambda marker: Planted(os.system, f"touch {marker}"),
    "exec": lambda marker: Planted(exec, f"open({str(marker)!r}, 'w')"),
    "getattr": lambda marker: Planted(getattr, 1, "real"),
    "deep": lambda marker: {"model": [{"x": Planted(os.system, f"touch {marker}")}]},
    "load": lambda marker: Planted(torch.load, str(marker)),
}


@pytest.mark.parametrize("plant", PLANTS.values(), ids=list(PLANTS))
@pytest.mark.parametrize("form", ["torch", "old torch", "pickle", "zip"])
def test_planted_code_is_refused_and_not_run(tmp_path, plant, form):
    path, marker = tmp_path / "c.pth", tmp_path / "marker"
    if form == "pickle":
        path.write_bytes(pickle.dumps(plant(marker)))
    elif form == "zip":
        save_torch(path, {"weight": torch.ones(2)})
        rezip(path, {"data.pkl": pickle.dumps(plant(marker), protocol=2)})
    else:
        torch.save(plant(marker), path, _use_new_zipfile_serialization=form == "torch")
    for load in (load_checkpoint, lambda path: load_weights(TinyNet(), path)):
        assert "might run code" in refusal(path, load) or form in ("old torch", "pickle")
    assert not marker.exists()


def rezip(path, replaced, compression=zipfile.ZIP_STORED):
    """Write the archive anew, with other contents for the members whose names end as `replaced` says."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, replaced.get(Path(name).name, content))


def test_a_small_file_does_not_become_a_large_tensor(altered):
    path, state = altered
    save_torch(path, {"x": torch.zeros(1 << 20)})
    rezip(path, {}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000
    assert "is damaged, or something else" in refusal(path)
    state["random"]["numpy"][0] = torch.zeros(1, dtype=torch.int64).expand(1 << 40)
    save_torch(path, state)
    assert "not a checkpoint" in refusal(path)


def nested(width, depth):
    """Lists within lists, each of which holds the next one `width` times."""
    return [nested(width, depth - 1)] * width if depth else [1] * width


IN_ITSELF = []
IN_ITSELF.append(IN_ITSELF)


@pytest.mark.parametrize("lists", [nested(2, 60), nested(1000, 8), IN_ITSELF], ids=["deep", "wide", "in itself"])
def test_lists_within_lists_do_not_hang(altered, lists):
    path, state = altered
    for change in (dict(rows=lists), dict(config={"x": lists}), dict(lrs=lists)):
        save_torch(path, state | change)
        assert "not a checkpoint" in refusal(path)


def test_torch_never_loads_more_than_weights():
    """No code of ours unpickles: torch.load with weights_only=True alone, no pickle, no load_learner."""
    root = Path(cifar_fastai.__file__).parent
    for path in [*root.rglob("*.py"), *(root.parent / "recipes").glob("*.py")]:
        if path.name == "official.py":
            continue  # its unpickler has tests of its own
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
                called = ast.unparse(node.func)
                flags = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert called != "torch.load" or flags.get("weights_only") == "True", path
                assert called.split(".")[-1] not in ("load_learner", "Unpickler"), path
                assert called.split(".")[-1] != "loads" or called == "json.loads", path
                assert called not in ("pickle.load", "np.load") or flags.get("allow_pickle") == "False", path


# Junk in an intact file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("junk", [torch.ones(2), torch.tensor(1.0), torch.ones(10, 10), torch.ones(1)])
def test_momenta_of_another_shape_are_refused(altered, tiny_images, junk):
    """torch's fused kernels would read beyond them."""
    path, state = altered
    state["opt"]["state"][1]["momentum_buffer"] = junk
    save_torch(path, state)
    with pytest.raises(InputError, match="checkpoint.pth: does not fit this run .momentum_buffer of shape"):
        train(tiny_images, path, saved=load_checkpoint(path))


JUNK = (None, "text", -1, 3.5, [], {}, [1, "two"], {"a": 1}, torch.ones(2), torch.tensor(float("nan")), True, 10**15)


def places_in(value, path=()):
    """The places in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places_in(item, (*path, key))


@settings(FUZZ, max_examples=40)
@given(data=st.data())
def test_junk_ends_in_one_line(written, tiny_images, tmp_path, data):
    path = tmp_path / "c.pth"
    path.write_bytes(written)
    state = load_checkpoint(path)
    places = list(places_in(state))
    kind = data.draw(st.sampled_from(sorted({place[0] for place in places})))
    *outer, last = data.draw(st.sampled_from([place for place in places if place[0] == kind]))
    part = state
    for key in outer:
        part = part[key]
    part[last] = data.draw(st.sampled_from(JUNK))
    save_torch(path, state)
    try:
        train(tiny_images, path, saved=load_checkpoint(path))
    except InputError as error:
        assert str(error).startswith(f"{path}: ")


JUNK_HISTORY = [("epoch", 10**15), ("epoch", 3), ("rows", [1, 2]), ("lrs", [None] * 8), ("moms", [0.9])]


@pytest.mark.parametrize("key, junk", JUNK_HISTORY)
def test_junk_in_the_history_is_refused(altered, key, junk):
    path, state = altered
    rows = copy.deepcopy(state["rows"])
    rows[1]["lr"] = True
    for change in ({key: junk}, {"rows": rows}):
        save_torch(path, state | change)
        assert "not a checkpoint" in refusal(path)

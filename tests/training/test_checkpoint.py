"""checkpoint.pth and weights: what is stored, and files that are damaged, altered or planted."""

import ast
import io
import os
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_recipe import TinyNet
from tiny_runs import Planted, same

import cifar_fastai
from cifar_fastai.cli import _run
from cifar_fastai.errors import InputError
from cifar_fastai.training.checkpoint import (
    digest,
    load_checkpoint,
    load_weights,
    plain,
    random_states,
    save_torch,
    set_random_states,
)

FUZZ = settings(
    deadline=None,
    max_examples=200,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def written(tiny_folder, tmp_path_factory):
    """The bytes of a checkpoint after two epochs of three, with an average of the weights and a plateau."""
    from tiny_runs import Tiny

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFAR_FASTAI_CACHE", str(tiny_folder.parent / "cache"))
        folder = tmp_path_factory.mktemp("checkpoint") / "run"
        Tiny(tiny_folder, patch).train(folder, stop=("history", 2), ema=0.9, sched="plateau", valid_pct=0.25)
    return (folder / "checkpoint.pth").read_bytes()


def refusal(path, load=load_checkpoint):
    with pytest.raises(InputError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


# What is stored -------------------------------------------------------------------------------------------------------


def test_all_that_a_run_needs_is_in_it(written, tmp_path):
    (tmp_path / "c.pth").write_bytes(written)
    state = load_checkpoint(tmp_path / "c.pth")
    assert state["epoch"] == 2 and not state["finished_epochs"] and state["train_iter"] == 2 * 4
    assert [row["epoch"] for row in state["rows"]] == [1, 2] and len(state["lrs"]) == len(state["moms"]) == 8
    assert set(state["random"]) == {"python", "numpy", "torch", "loader"}
    assert set(state["callbacks"]) == {"ema", "plateau"}
    assert all("momentum_buffer" in kept for kept in state["opt"]["state"].values())
    assert state["config"]["parameters"]["ema"] == 0.9 and state["recipe"] == "resnet18"


def test_plain_takes_numpy_out():
    from fastcore.foundation import L

    found = plain({"a": np.float64(0.1), "b": L(np.int64(3), (np.float32(0.5),)), "c": torch.ones(2)})
    assert (type(found["a"]), found["b"], type(found["b"][0])) == (float, [3, (0.5,)], int)
    save = io.BytesIO()
    torch.save(found, save)
    assert same(torch.load(io.BytesIO(save.getvalue()), weights_only=True), found)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.floats(width=32), min_size=1, max_size=3).map(torch.tensor),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(VALUES, VALUES)
def test_digest_tells_values_apart(one, other):
    assert digest(one) == digest(one)
    if repr(one) != repr(other):
        assert digest(one) != digest(other)


def test_digest_sees_every_number_name_type_and_shape():
    base = {"a": torch.zeros(2, 3), "b": [1, 2.0]}
    others = (
        {"a": torch.zeros(3, 2), "b": [1, 2.0]},
        {"a": torch.zeros(2, 3).double(), "b": [1, 2.0]},
        {"a": torch.zeros(2, 3), "b": [1, 2]},
        {"a": torch.zeros(2, 3), "b": [[1], 2.0]},
        {"b": [1, 2.0], "a": torch.zeros(2, 3)},
        {"a": torch.zeros(2, 3), "b": [1, 2.0], "c": None},
        {"a": torch.tensor([[0, 0, 0], [0, 0, -0.0]]), "b": [1, 2.0]},
    )
    assert len({digest(value) for value in (base, *others)}) == len(others) + 1
    net = torch.randn(2, 3, 4, 4)
    assert digest(net) == digest(net.to(memory_format=torch.channels_last)), "the numbers, not how they lie"
    with pytest.raises(ValueError):
        digest(torch.zeros(1).expand(10**12))


def test_random_states_come_back(tiny_images, tmp_path):
    from cifar_fastai.data.loaders import cifar_dls

    dls = cifar_dls(tiny_images, bs=8, device="cpu")
    np.random.standard_normal()  # leaves a second one behind, which is part of the state
    save_torch(tmp_path / "states.pth", plain(random_states(dls)))

    def draw():
        drawn = [random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist(), dls.train.rng.random()]
        return [*drawn, dls.train.one_batch()[0].sum().item()]

    first = draw()
    assert draw() != first
    set_random_states(torch.load(tmp_path / "states.pth", weights_only=True), dls)
    assert draw() == first


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


@settings(FUZZ, max_examples=100)
@given(st.data())
def test_damaged_weights_are_refused_or_whole(tmp_path, data):
    path, net = tmp_path / "model.pth", TinyNet(3)
    save_torch(path, net.state_dict())
    path.write_bytes(_damaged(path.read_bytes(), data))
    other = TinyNet(3)
    try:
        load_weights(other, path)
    except InputError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        return
    assert same(dict(net.state_dict()), dict(other.state_dict()))


def _damaged(content, data):
    """`content` with bytes changed, cut out, put in, or with its end cut off."""
    content, at = bytearray(content), data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["change", "flip", "remove", "insert", "truncate", "zero"]))
    if kind == "change":
        for k in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=5)):
            content[k] = data.draw(st.integers(0, 255))
    elif kind == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "remove":
        del content[at : at + data.draw(st.integers(1, 100))]
    elif kind == "insert":
        content[at:at] = data.draw(st.binary(min_size=1, max_size=20))
    elif kind == "truncate":
        del content[at:]
    else:
        content[at : at + 512] = bytes(len(content[at : at + 512]))
    return bytes(content)


@pytest.mark.parametrize("content", [b"", b"PK", b"hello", b"PK\x05\x06" + bytes(18), bytes(1000)])
def test_what_is_no_checkpoint_at_all(tmp_path, content):
    path = tmp_path / "c.pth"
    path.write_bytes(content)
    assert "is damaged, or something else" in refusal(path)
    assert "is damaged, or something else" in refusal(path, lambda path: load_weights(TinyNet(3), path))
    path.unlink()
    assert refusal(path) == f"{path}: no such file"
    path.mkdir()
    refusal(path)


def test_a_number_that_was_altered_is_noticed(written, tmp_path):
    path = tmp_path / "c.pth"
    path.write_bytes(written)
    state = load_checkpoint(path)
    state["rows"][0]["valid_accuracy"] = 0.99
    save_torch(path, state)
    assert refusal(path).endswith("altered or damaged since it was written; its checksum differs")
    state["model"]["linear.bias"] += 1
    save_torch(path, state)
    assert "its checksum differs" in refusal(path)


@pytest.mark.parametrize("value", [None, [], {}, {"version": 2}, {"version": torch.ones(3)}, torch.ones(2), "text"])
def test_a_file_of_something_else(tmp_path, value):
    save_torch(tmp_path / "c.pth", value)
    assert "not a checkpoint" in refusal(tmp_path / "c.pth")


def test_weights_of_another_network(tmp_path):
    net = TinyNet(3)
    for value in (
        TinyNet(4).state_dict(),
        {},
        {"linear.bias": "text"},
        [1, 2],
        None,
        {1: torch.ones(1)},
        net.state_dict() | {"more": torch.ones(1)},
    ):
        save_torch(tmp_path / "model.pth", value)
        message = refusal(tmp_path / "model.pth", lambda path: load_weights(net, path))
        assert "does not fit the network" in message


# Planted --------------------------------------------------------------------------------------------------------------


def plants(marker):
    command = f"touch {marker}"
    return {
        "os.system": Planted(os.system, command),
        "exec": Planted(exec, f"open({str(marker)!r}, 'w')"),
        "open": Planted(open, str(marker), "w"),
        "import": Planted(__import__, "antigravity"),
        "getattr": Planted(getattr, 1, "real"),
        "deep": {"model": [{"x": Planted(os.system, command)}]},
        "load": Planted(torch.load, str(marker)),
    }


@pytest.mark.parametrize("name", plants(""))
@pytest.mark.parametrize("form", ["torch", "old torch", "pickle", "zip"])
def test_planted_code_is_refused_and_not_run(tmp_path, name, form):
    path, marker = tmp_path / "c.pth", tmp_path / "marker"
    value = plants(marker)[name]
    if form == "pickle":
        path.write_bytes(pickle.dumps(value))
    elif form == "zip":
        save_torch(path, {"weight": torch.ones(2)})
        _replace(path, "data.pkl", pickle.dumps(value, protocol=2))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "torch")
    for load in (load_checkpoint, lambda path: load_weights(TinyNet(3), path)):
        message = refusal(path, load)
        assert "might run code" in message or form in ("old torch", "pickle")
    assert not marker.exists()


def _replace(path, name, content):
    """Put `content` in place of the archive's member that ends in `name`."""
    with zipfile.ZipFile(path) as old:
        members = [(entry, old.read(entry)) for entry in old.infolist()]
    with zipfile.ZipFile(path, "w") as new:
        for entry, data in members:
            new.writestr(entry.filename, content if entry.filename.endswith(name) else data)


def test_a_small_file_does_not_become_a_large_tensor(tmp_path):
    path = tmp_path / "c.pth"
    save_torch(path, {"x": torch.zeros(1 << 20)})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert (tmp_path / "bomb.pth").stat().st_size < 10_000
    assert "is damaged, or something else" in refusal(tmp_path / "bomb.pth")


def test_torch_never_loads_more_than_weights():
    """No code of ours unpickles: torch.load with weights_only=True alone, no pickle, no load_learner."""
    root = Path(cifar_fastai.__file__).parent
    for path in [*root.rglob("*.py"), *(root.parent / "recipes").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
                called = ast.unparse(node.func)
                flags = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert called != "torch.load" or flags.get("weights_only") == "True", path
                assert called.split(".")[-1] not in ("load_learner", "Unpickler"), path
                assert called.split(".")[-1] != "loads" or called == "json.loads", path
                assert called not in ("pickle.load", "np.load") or flags.get("allow_pickle") == "False", path


# Altered with its checksum made anew ----------------------------------------------------------------------------------


@pytest.mark.parametrize("junk", [torch.ones(2), torch.tensor(1.0), torch.ones(10, 10), torch.ones(1)])
def test_momenta_of_another_shape_are_refused(written, tiny, tmp_path, junk):
    """torch's fused kernels would read beyond them."""
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(written)
    state = load_checkpoint(path)
    state["opt"]["state"][3]["momentum_buffer"] = junk
    _write(path, state)
    with pytest.raises(InputError, match="checkpoint.pth: does not fit this run .momentum_buffer of shape"):
        tiny.resume(tmp_path)


def _write(path, state):
    save_torch(path, state | {"digest": digest({key: value for key, value in state.items() if key != "digest"})})


JUNK = (None, "text", -1, 3.5, [], {}, [1, "two"], {"a": 1}, torch.ones(2), torch.tensor(float("nan")), True)


def paths_of(value, path=()):
    """The places in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths_of(item, (*path, key))


def resume_with_junk(written, tiny, tmp_path, capsys, data):
    """Resume from a checkpoint that holds junk somewhere, and a checksum that says it is right."""
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    path = folder / "checkpoint.pth"
    path.write_bytes(written)
    state = load_checkpoint(path)
    places = [place for place in paths_of(state) if place[0] != "digest"]
    kind = data.draw(st.sampled_from(sorted({place[0] for place in places})))
    place, junk = data.draw(st.sampled_from([p for p in places if p[0] == kind])), data.draw(st.sampled_from(JUNK))
    inner = state
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = junk
    _write(path, state)
    capsys.readouterr()
    status = _run(lambda **given: tiny.resume(folder), {})
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (status, len(lines)) in ((0, 0), (1, 1), (2, 1)), place
    assert os.listdir(tmp_path) == ["run"]
    for left in folder.glob("*"):
        left.unlink()


@settings(FUZZ, max_examples=25)
@given(data=st.data())
def test_junk_with_a_right_checksum_ends_in_one_line(written, tiny, tmp_path, capsys, data):
    resume_with_junk(written, tiny, tmp_path, capsys, data)


@pytest.mark.slow
@settings(FUZZ, max_examples=400)
@given(data=st.data())
def test_much_junk_with_a_right_checksum_ends_in_one_line(written, tiny, tmp_path, capsys, data):
    resume_with_junk(written, tiny, tmp_path, capsys, data)

"""Runs by where their images come from: any form of CIFAR-10, digits in its place, 100 classes, other sizes."""

import numpy as np
import pytest
from tiny_data import batch_files, cifar100_files, encoded, random_pixels, write_folder, write_tar
from tiny_runs import FILES, history

from cifar_fastai import load_run, predict_files
from cifar_fastai.cli import command_line
from cifar_fastai.data import cifar10, download
from cifar_fastai.data import images as data
from cifar_fastai.data.images import load_images
from cifar_fastai.files import read_json
from cifar_fastai.runs.run import load_network


@pytest.fixture
def batches(tmp_path, monkeypatch):
    """The archive of 60 images in the official format, which are CIFAR-10 here."""
    rng = np.random.default_rng(1)
    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    changes = {
        name: {
            b"labels": rng.permutation(10).tolist(),
            b"data": rng.integers(0, 256, (10, 3072), dtype=np.uint8),
        }
        for name in names
    }
    path = write_tar(tmp_path / "official.tar.gz", batch_files(**changes))
    monkeypatch.setattr(data, "CIFAR10_SPLITS", (50, 10))
    monkeypatch.setattr(cifar10, "N_TRAIN", 50)
    monkeypatch.setattr(cifar10, "ORDER", tmp_path / "order.npy")
    monkeypatch.setenv("CIFAR_FASTAI_CACHE", str(tmp_path / "other"))
    with monkeypatch.context() as patch:
        patch.setattr(data, "in_official_order", lambda images, labels: (images, labels, False))
        images = load_images(path, cache_dir=tmp_path / "plain")
    cifar10.write_order(images.images, images.labels)
    monkeypatch.setattr(cifar10, "SHA256", cifar10._digest(images.images, images.labels))
    return path


@pytest.mark.parametrize("size", [None, 48])
def test_any_form_of_cifar10_gives_the_same_run(tiny, batches, tmp_path, size):
    """The official archive, PNG files in another order, and the cache: history and predictions to the last digit."""
    images, rng = load_images(batches), np.random.default_rng(2)
    numbers = rng.permutation(60)
    files = {
        f"{'train' if k < 50 else 'test'}/{images.classes[label]}/{numbers[k]:02}.png": encoded(
            images.images[k].transpose(1, 2, 0)
        )
        for k, label in enumerate(images.labels)
    }
    folder = write_folder(tmp_path / "png", files)
    runs = [tiny.train(tmp_path / f"run{k}", data=str(place), size=size) for k, place in enumerate([batches, folder])]
    runs.append(tiny.train(tmp_path / "cached", data="cifar10", size=size))
    assert {run.images.name for run in runs} == {"CIFAR-10"} and runs[0].learn.dls.one_batch()[0].shape[-1] == (
        size or 32
    )
    assert history(runs[0].folder) == history(runs[1].folder) == history(runs[2].folder)
    tables = {(run.folder / "predictions.csv").read_bytes() for run in runs}
    assert len(tables) == 1
    assert load_run(runs[1].folder, device="cpu", data=batches)[0].dls.images.fingerprint == runs[0].images.fingerprint


def test_digits_in_the_place_of_cifar10_say_so_twice_and_stay_digits(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(download.MIRRORS, "cifar10", ("http://127.0.0.1:9/cifar10.tgz",))
    monkeypatch.setattr(data, "_fastai_copies", lambda: [])
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "CIFAR10_URL", "CIFAR10_PATH"):
        monkeypatch.delenv(name, raising=False)
    arguments = dict(data="auto", bs=128, epochs=2)
    assert tiny.train(tmp_path / "run", stop=("history", 1), **arguments) is None
    resumed = tiny.resume(tmp_path / "run")
    whole = tiny.train(tmp_path / "whole", **arguments)
    out = capsys.readouterr().out
    banner = f"*** {whole.images.note} ***"
    places = [out.rindex(text) for text in (banner, "test accuracy")]
    assert out.count(banner) == 3 and whole.images.note.count("\n") == 4
    assert out.index(banner) < out.index("train loss") < places[0] < places[1]
    assert history(resumed.folder) == history(whole.folder)
    config = read_json(whole.folder / "config.json")
    assert "--data digits" in command_line(config) and "auto" not in command_line(config)


@pytest.mark.slow
def test_a_hundred_classes_at_another_size_with_all_pictures(recipes, tmp_path):
    folder = write_folder(tmp_path / "c100", cifar100_files(n=400))
    arguments = ["--data", folder, "--size", 48, "--epochs", 1, "--bs", 40]
    process = recipes.start(arguments, tmp_path, pictures=True).wait()
    assert (process.code, process.err) == (0, "")
    assert "of 100 classes" in process.out and "of 48 x 48 pixels (the shorter side resized" in process.out
    (run,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in run.iterdir()} == FILES
    assert len(read_json(run / "metrics.json")["class_accuracy"]) == 100
    with pytest.MonkeyPatch.context() as patch:
        import tiny_recipe

        tiny_recipe.use_tiny_net(patch.setattr)
        learn = load_network(run, device="cpu")
        (tmp_path / "photo.png").write_bytes(encoded(random_pixels(0, (70, 50))))
        (prediction,) = predict_files(learn, [tmp_path / "photo.png"])
        assert prediction.image.shape == (48, 48, 3) and len(prediction.classes) == 100
        assert load_run(run, device="cpu")[0].dls.images.size == 48

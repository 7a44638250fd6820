"""What fastai users do with a Learner and DataLoaders gives the same kind of result on fastai's own and on ours."""

import copy
import io
import pickle
import warnings
from contextlib import redirect_stdout

import matplotlib.pyplot as plt
import pytest
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger, ProgressCallback, ShowGraphCallback
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip
from fastai.interpret import ClassificationInterpretation, Interpretation
from fastai.learner import Learner, Recorder, SkipToEpoch, load_learner
from fastai.metrics import F1Score, accuracy, error_rate
from fastai.vision.augment import Resize
from fastai.vision.core import PILImage
from fastai.vision.data import ImageDataLoaders
from fastcore.foundation import L
from PIL import Image
from tiny_net import TinyNet

from cifar_fastai.data.images import load_images
from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.errors import InputError
from cifar_fastai.models import _FACTORIES
from cifar_fastai.training.learner import cifar_learner
from cifar_fastai.training.optimizers import body_and_head


def from_interpretation(act, cls=ClassificationInterpretation):
    return lambda learn: act(cls.from_learner(learn))


def fit_with(*make, n_epoch=2):
    """Fit with fresh callbacks."""

    def call(learn):
        learn.fit(n_epoch, 1e-3, cbs=[cb() for cb in make])
        return list(learn.recorder.metric_names[:4]), len(learn.recorder.values)

    return call


def metrics_of_ones_own(learn):
    learn.metrics = [error_rate, F1Score(average="macro")]
    learn.fit(1, 1e-3)
    return list(learn.recorder.metric_names[1:5]), list(learn.recorder.values[0][:4])


def groups(learn):
    """The parameters that are trained, and the groups that the optimizer shows."""
    trained = [name for name, p in learn.model.named_parameters() if p.requires_grad]
    return (
        trained,
        [len(params) for params in learn.opt.param_lists],
        sorted({"lr", "mom", "wd"} & {*learn.opt.hypers[0]}),
    )


def saved_and_loaded(learn):
    learn.fit(1, 1e-3)
    learn.save("one")
    learn.load("one")


def slices_saved_and_loaded(learn):
    learn.fit_one_cycle(1, slice(1e-5, 1e-3))
    learn.save("two")
    learn.load("two", weights_only=False)
    return [hyper["lr"] for hyper in learn.opt.hypers]


def exported(learn):
    learn.fit(1, 1e-3)
    learn.export("learner.pkl")
    loaded = load_learner(learn.path / "learner.pkl")
    file, photo = learn.path / "photo.png", Image.new("RGB", (60, 45), (200, 30, 90))
    photo.save(file)
    with loaded.no_bar():
        batch = loaded.get_preds(dl=loaded.dls.test_dl([file, file]))[0]
        return [
            *loaded.predict(file),
            batch,
            loaded.predict(PILImage.create(file))[2],
            loaded.predict(file.read_bytes())[2],
        ]


def removed(*kinds):
    """Fit without these callbacks, then put them back."""

    def call(learn):
        with learn.removed_cbs([cb for kind in kinds for cb in learn._grab_cbs(kind)]):
            learn.fit(1, 1e-3)
        return sorted(cb.name for cb in learn.cbs if isinstance(cb, kinds))

    return call


def fit_without_logs(learn):
    with learn.no_bar() as same, learn.no_logging(), learn.no_mbar():
        learn.fit(1, 1e-3)
    return same is learn, hasattr(learn, "progress")


def halved_on_a_plateau(learn):
    learn.fit(2, 1e-9, cbs=ReduceLROnPlateau(monitor="accuracy", min_delta=2, patience=1, factor=2))
    return bool(learn.opt.hypers[-1]["lr"] < 1e-9)


def frozen_and_sliced(learn):
    learn.freeze()
    learn.fit_one_cycle(1, slice(1e-3))
    learn.unfreeze()
    learn.fit_one_cycle(1, slice(1e-5, 1e-3))
    return groups(learn), bool(learn.opt.hypers[-1]["lr"] / learn.opt.hypers[0]["lr"] > 99)


def twice(learn, function):
    other = function(learn)
    with other.no_bar(), other.no_logging():
        other.fit(1, 1e-3)
        return other.validate(), len(learn.dls.train_ds), len(other.dls.train_ds)


def loaders(dls):
    return len(dls.train), len(dls.valid), [list(part.shape) for part in dls.one_batch()]


def csv_columns(learn):
    logger = CSVLogger()
    learn.fit(2, 1e-3, cbs=logger)
    logger.path = learn.path
    return list(logger.read_log())[:4], len(logger.read_log())


def tensorboard(learn):
    from fastai.callback.tensorboard import TensorBoardCallback

    learn.fit(1, 1e-3, cbs=TensorBoardCallback(learn.path / "logs"))
    return len(list((learn.path / "logs").iterdir()))


CALLS = {
    "fit": lambda learn: learn.fit(1, 1e-3),
    "fit with a slice": lambda learn: learn.fit(1, slice(1e-5, 1e-3)),
    "fit with wd": lambda learn: learn.fit(1, 1e-3, wd=0.1, reset_opt=True),
    "fit from an epoch": lambda learn: learn.fit(3, 1e-3, start_epoch=2),
    "fit_one_cycle": lambda learn: learn.fit_one_cycle(
        1, 1e-3, 25.0, 1e5, 0.3, 0.01, (0.9, 0.8, 0.9), [GradientClip()], True
    ),
    "fit_flat_cos": lambda learn: learn.fit_flat_cos(1, 1e-3),
    "fit_sgdr": lambda learn: learn.fit_sgdr(2, 1, 1e-3),
    "fine_tune": lambda learn: learn.fine_tune(1, freeze_epochs=1),
    "freeze and slices": frozen_and_sliced,
    "freeze": lambda learn: (learn.freeze(), groups(learn)),
    "freeze_to": lambda learn: (learn.freeze_to(1), groups(learn), learn.unfreeze(), groups(learn)),
    "lr_find": lambda learn: sorted(learn.lr_find(num_it=30, end_lr=1.0)._fields),
    "lr_find, no plot": lambda learn: learn.lr_find(num_it=30, show_plot=False)._fields,
    "validate": lambda learn: learn.validate(),
    "validate on train": lambda learn: learn.validate(0),
    "validate with cbs": lambda learn: learn.validate(dl=learn.dls.valid, cbs=[GradientClip()]),
    "get_preds": lambda learn: learn.get_preds(),
    "get_preds with all": lambda learn: learn.get_preds(with_input=True, with_decoded=True, with_loss=True),
    "get_preds with loss": lambda learn: learn.get_preds(with_loss=True, with_preds=False, with_targs=False),
    "get_preds of train": lambda learn: learn.get_preds(0, act=torch.nn.Identity(), reorder=False),
    "tta": lambda learn: learn.tta(n=2),
    "tta, max": lambda learn: learn.tta(use_max=True, n=1),
    "predict": lambda learn: learn.predict(PILImage.create(Image.new("RGB", (32, 32))), with_input=True)[1:],
    "predict another size": lambda learn: learn.predict(PILImage.create(Image.new("RGB", (99, 41))))[1:],
    "save and load": saved_and_loaded,
    "slices, save and load": slices_saved_and_loaded,
    "export": exported,
    "show_batch": lambda learn: learn.dls.show_batch(),
    "show_batch, unique": lambda learn: learn.dls.train.show_batch(unique=True, max_n=4),
    "show_results": lambda learn: learn.show_results(max_n=4),
    "summary": lambda learn: "Total params" in str(learn.summary()),
    "show_training_loop": lambda learn: learn.show_training_loop(),
    "top_losses": from_interpretation(lambda i: [len(part) for part in i.top_losses(4)], Interpretation),
    "top_losses, items": from_interpretation(lambda i: len(i.top_losses(4, largest=False, items=True)[2])),
    "confusion_matrix": from_interpretation(lambda i: i.confusion_matrix()),
    "plot_confusion_matrix": from_interpretation(lambda i: i.plot_confusion_matrix(normalize=True)),
    "most_confused": from_interpretation(lambda i: type(i.most_confused())),
    "plot_top_losses": from_interpretation(lambda i: i.plot_top_losses(4)),
    "print_classification_report": from_interpretation(lambda i: i.print_classification_report()),
    "interpretation, show_results": from_interpretation(lambda i: i.show_results([0, 1])),
    "interpretation, items": from_interpretation(lambda i: i[[1, 2]]),
    "plot_loss": lambda learn: (learn.fit(2, 1e-3), learn.recorder.plot_loss(skip_start=0), None)[2],
    "plot_sched": lambda learn: (learn.fit_one_cycle(1, 1e-3), learn.recorder.plot_sched()),
    "to_fp32": lambda learn: learn.to_fp32() is learn,
    "to_bf16": lambda learn: (learn.to_bf16() is learn, learn.fit(1, 1e-3)),
    "to_fp16": lambda learn: (learn.to_fp16(), learn.fit(1, 1e-3)),
    "to_channelslast": lambda learn: (
        learn.to_channelslast(use_amp=False),
        learn.fit(1, 1e-3),
        learn.to_contiguous() is learn,
    ),
    "to_channelslast, amp": lambda learn: (
        learn.to_channelslast(),
        learn.to_contiguous(to_fp32=True),
        learn.fit(1, 1e-3),
    ),
    "to_non_native_fp16": lambda learn: (learn.to_non_native_fp16(), learn.fit(1, 1e-3)),
    "add_cb": lambda learn: (learn.add_cb(GradientClip), learn.gradient_clip, learn.remove_cb(GradientClip))[:0],
    "add_cbs": lambda learn: learn.add_cbs([GradientClip(), BnFreeze]).remove_cbs([GradientClip, BnFreeze]) is learn,
    "without progress": removed(ProgressCallback),
    "without recorder": removed(ProgressCallback, Recorder),
    "no_bar, no_logging": fit_without_logs,
    "metrics": metrics_of_ones_own,
    "no metrics": lambda learn: (setattr(learn, "metrics", []), learn.fit(1, 1e-3), learn.validate()),
    "deepcopy": lambda learn: twice(learn, copy.deepcopy),
    "pickle": lambda learn: twice(learn, lambda learn: pickle.loads(pickle.dumps(learn))),
    "dls": lambda learn: loaders(learn.dls),
    "dls.new": lambda learn: [list(part.shape) for part in learn.dls.train.new(bs=3, shuffle=False).one_batch()],
    "dls.test_dl": lambda learn: [len(learn.dls.test_dl([Image.new("RGB", (32, 32))] * 3)), learn.dls.vocab],
    "dls.deepcopy": lambda learn: loaders(copy.deepcopy(learn.dls)),
    "dls.pickle": lambda learn: loaders(pickle.loads(pickle.dumps(learn.dls))),
    "dls.new_empty": lambda learn: [len(loader.dataset) for loader in learn.dls.new_empty().loaders],
    "CSVLogger": csv_columns,
    "SaveModelCallback": fit_with(lambda: SaveModelCallback(monitor="accuracy")),
    "SaveModelCallback, all": fit_with(lambda: SaveModelCallback(every_epoch=True, with_opt=True)),
    "EarlyStoppingCallback": fit_with(lambda: EarlyStoppingCallback(monitor="accuracy", patience=1, min_delta=9)),
    "EarlyStoppingCallback, loss": fit_with(lambda: EarlyStoppingCallback(monitor="valid_loss")),
    "ReduceLROnPlateau": halved_on_a_plateau,
    "TerminateOnNaN": fit_with(TerminateOnNaNCallback),
    "MixUp": fit_with(MixUp),
    "CutMix": fit_with(CutMix),
    "GradientAccumulation": fit_with(lambda: GradientAccumulation(16)),
    "GradientClip": fit_with(GradientClip, BnFreeze),
    "ShowGraphCallback": fit_with(ShowGraphCallback),
    "TensorBoardCallback": tensorboard,
    "ChannelsLast": fit_with(ChannelsLast),
    "SkipToEpoch": fit_with(lambda: SkipToEpoch(1)),
    "ParamScheduler": fit_with(lambda: ParamScheduler({"lr": SchedCos(1e-3, 1e-5), "mom": SchedCos(0.9, 0.8)})),
}
# what a plain Learner does without effect, and ours refuses, as a CPU has no such precision
DIFFERENT = {"to_fp16": InputError}
NEEDS_A_GPU = "to_non_native_fp16"


def kind(value):
    """What two results must have in common: lengths, shapes, texts and truth values, but not numbers and classes."""
    if isinstance(value, (list, tuple, L)):
        return [kind(item) for item in value]
    if hasattr(value, "shape") and value.ndim:
        return tuple(value.shape)
    if isinstance(value, float) or hasattr(value, "shape"):
        return "number"
    return value if type(value) in (str, bool, int) else isinstance(value, Learner) or str(type(value))


@pytest.fixture
def world(tiny_folder, tmp_path, monkeypatch):
    """Makes the learner of a world: "fastai" or "ours"."""
    monkeypatch.setitem(_FACTORIES, "resnet18", lambda n_classes, *_: TinyNet(n_classes))

    def make(name):
        path, device = tmp_path / name, torch.device("cpu")
        path.mkdir()
        if name == "fastai":
            options = dict(train="train", valid="test", item_tfms=Resize(32), num_workers=0, device=device)
            dls = ImageDataLoaders.from_folder(tiny_folder, bs=8, val_bs=5, **options)
            return Learner(dls, TinyNet(), metrics=accuracy, splitter=body_and_head, path=path)
        dls = cifar_dls(load_images(tiny_folder), bs=8, val_bs=5, device=device)
        return cifar_learner(dls, "resnet18", path=path)

    yield make
    plt.close("all")


def outcome(learn, call):
    with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        try:
            return kind(call(learn))
        except Exception as error:
            return type(error)


SLOW = "TensorBoardCallback"  # it imports fastai's text modules


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == SLOW else n for n in CALLS])
def test_ours_does_what_fastais_does(world, name):
    theirs, ours = (outcome(world(kind), CALLS[name]) for kind in ("fastai", "ours"))
    assert not isinstance(theirs, type) or name in NEEDS_A_GPU
    assert ours == DIFFERENT.get(name, theirs)

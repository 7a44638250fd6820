"""Settings of five published solutions of the assignment, by name: what each sets, its source, what it reported.

Their schedules are torch's. torch's OneCycleLR starts at max_lr / div_factor and ends at that over final_div_factor,
where fastai's div_final divides lr_max, so that div_final = div_factor x final_div_factor; unless told otherwise it
cycles the momentum from .95 to .85 and back, whatever the optimizer was made with. torch's weight decay reaches every
parameter. Their bugs are not repeated, such as a mirror image every time or holes filled with black.
"""

from dataclasses import dataclass

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """What a solution sets, where it stands and the test accuracy (a fraction) that it reports."""

    source: str
    reported: float
    settings: dict


# Under any recipe a preset means the same: each is PLAIN, torch's defaults without augmentation, and its differences.
PLAIN = dict(
    model="resnet18",
    epochs=20,
    bs=128,
    opt="sgd",
    momentum=0.9,
    mom_min=None,
    nesterov="no",
    wd=0.0,
    wd_bn_bias="yes",
    label_smoothing=0.0,
    l1=None,
    clip=None,
    clip_value=None,
    mixup=None,
    cutmix=None,
    ema=None,
    sched="none",
    pct_start=0.3,
    peak_epoch=None,
    div=25.0,
    div_final=25.0 * 1e4,
    anneal="cos",
    step_size=6,
    gamma=0.1,
    padding=0,
    pad_mode="zeros",
    flip=0.0,
    flip_by="chance",
    vflip=0.0,
    rotate=0.0,
    cutout=0,
    n_holes=1,
    max_holes=None,
    cutout_p=1.0,
)
ONE_CYCLE = PLAIN | dict(sched="one-cycle", momentum=0.95, mom_min=0.85)

PRESETS = {
    "sujitojha1": Preset(
        "github.com/sujitojha1/EVA8, Session7, with sujitojha1/pytorch-eva8",
        0.855,
        PLAIN | dict(lr=0.01, sched="step", padding=4, flip=0.5, cutout=16),
    ),
    "amitkml": Preset(
        "github.com/amitkml/ERA-V1, Session11",
        0.776,
        ONE_CYCLE
        | dict(
            epochs=24,
            lr=0.37,
            pct_start=5 / 24,
            div=8.0,
            div_final=8.0 * 1e4,
            momentum=0.9,
            mom_min=None,
            wd=0.005,
            clip_value=0.1,
            padding=4,
            pad_mode="reflect",
            flip=0.5,
            cutout=8,
            max_holes=3,
            cutout_p=0.8,
        ),
    ),
    "gilf641": Preset(
        "github.com/Gilf641/EVA4, S8",
        0.895,
        ONE_CYCLE | dict(lr=0.1, l1=1e-5, wd=1e-4, rotate=15.0, flip=0.5, vflip=0.5),
    ),
    "vivek-a81": Preset(
        "github.com/vivek-a81/EVA6, with MittalNeha/vision_pytorch",
        0.887,
        ONE_CYCLE
        | dict(
            model="custom_resnet",
            epochs=24,
            bs=512,
            lr=0.0447,
            pct_start=0.2,
            div=10.0,
            div_final=10.0 * 50,
            anneal="linear",
            padding=4,
            flip=0.5,
            cutout=8,
            cutout_p=0.5,
        ),
    ),
    "phaninandula": Preset(
        "github.com/phaninandula/ERA-Session11",
        0.878,
        ONE_CYCLE | dict(bs=512, lr=0.02, pct_start=0.2, anneal="linear", padding=4, cutout=16),
    ),
}

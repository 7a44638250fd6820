"""Settings of five published solutions of the assignment, by name: what each sets, its source, what it reported.

Their schedules are torch's. torch's OneCycleLR starts at max_lr / div_factor and ends at that over final_div_factor,
where fastai's div_final divides lr_max, so that div_final = div_factor x final_div_factor; torch cycles momentum
between .95 and .85 unless told otherwise, and its weight decay reaches every parameter. Their bugs are not repeated.
"""

from dataclasses import dataclass

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """What a solution sets, where it stands and the test accuracy (a fraction) that it reports."""

    source: str
    reported: float
    settings: dict


_PLAIN = dict(wd=0.0, wd_bn_bias="yes", nesterov="no", label_smoothing=0.0, cutout=0, padding=0)
_TORCH_ONE_CYCLE = dict(sched="one-cycle", pct_start=0.3, div=25.0, div_final=25.0 * 1e4, anneal="cos",
                        momentum=0.95, mom_min=0.85)  # fmt: skip

PRESETS = {
    "sujitojha1": Preset("github.com/sujitojha1", 0.855, {
        **_PLAIN, "model": "resnet18", "epochs": 20, "bs": 128, "lr": 0.01, "momentum": 0.9,
        "sched": "step", "step_size": 6, "gamma": 0.1, "padding": 4, "flip": 0.5, "cutout": 16}),
    "amitkml": Preset("github.com/amitkml", 0.776, {
        **_PLAIN, **_TORCH_ONE_CYCLE, "model": "resnet18", "epochs": 24, "bs": 128, "lr": 0.37, "pct_start": 5 / 24,
        "div": 8.0, "div_final": 8.0 * 1e4, "momentum": 0.9, "mom_min": None, "wd": 0.005, "clip_value": 0.1,
        "padding": 4, "pad_mode": "reflect", "flip": 0.5, "cutout": 8, "n_holes": 1, "max_holes": 3, "cutout_p": 0.8}),
    "gilf641": Preset("github.com/Gilf641", 0.895, {
        **_PLAIN, **_TORCH_ONE_CYCLE, "model": "resnet18", "epochs": 20, "bs": 128, "lr": 0.1, "l1": 1e-5,
        "wd": 1e-4, "rotate": 15.0, "flip": 0.5, "vflip": 0.5}),
    "vivek-a81": Preset("github.com/vivek-a81", 0.887, {
        **_PLAIN, **_TORCH_ONE_CYCLE, "model": "custom_resnet", "epochs": 24, "bs": 512, "lr": 0.0447,
        "pct_start": 0.2, "div": 10.0, "div_final": 10.0 * 50, "anneal": "linear", "padding": 4, "flip": 0.5,
        "cutout": 8}),
    "phaninandula": Preset("github.com/phaninandula", 0.878, {
        **_PLAIN, **_TORCH_ONE_CYCLE, "model": "resnet18", "epochs": 20, "bs": 512, "lr": 0.02, "pct_start": 0.2,
        "anneal": "linear", "padding": 4, "flip": 0.5, "cutout": 16}),
}  # fmt: skip

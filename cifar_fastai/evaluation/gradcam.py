"""Heatmaps by pytorch-grad-cam (J. Gildenblat and others), computed on a float32 copy of the model.

Grad-CAM: Selvaraju and others, arXiv:1610.02391. The library stretches every map to 0..1, even a map of rounding
errors; such maps are marked negligible here.
"""

import copy
import sys
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from operator import itemgetter
from types import FunctionType, SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cifar_fastai.errors import InputError, check_choice, reason
from cifar_fastai.settings import choices
from cifar_fastai.training.recorder import console_bar

METHODS = {name: name.replace("++", "PlusPlus") for name in choices("cam_method")}  # to the library's class names
PER_CHANNEL = ("ScoreCAM", "AblationCAM")  # a forward pass for every channel of the layer, hundreds for an image
CLASSLESS = ("EigenCAM", "FEM")  # explain the activations, not a class
MIN_MAP = 5  # pixels a side; a smaller map tells little about places and is refused
NOISE = 1e-6  # relative to the sum's largest possible value: a map below it is rounding error
MIN_EVIDENCE = 0.01  # logits that a map adds to the class; less changes the odds by under 1 %


@dataclass(frozen=True, eq=False)
class Heatmaps:
    """Heatmaps of N images, each divided by its own maximum: 0 is no evidence, 1 the image's strongest."""

    maps: np.ndarray  # (N, H, W) float32 in 0..1, as large as the images; zeros where negligible
    targets: np.ndarray  # (N,) int64, the explained classes
    layer: str
    method: str
    map_size: tuple[int, int]  # (h, w) of the layer's map before it was enlarged
    negligible: np.ndarray  # (N,) bool
    peaks: np.ndarray  # (N,) float32, the maximum of each map before it was divided by it
    explains_class: bool  # False where the maps are the same for every class: EigenCAM, FEM


def gradcam(learn, x, target="predicted", layer=None, method="GradCAM", bs=64):
    """`Heatmaps` of the evidence for a class in each image of `x`, a normalised batch (N, 3, H, W).

    `learn`: a Learner, or a model that outputs logits (B, C). `target`: "predicted" (or None), a class id, the name of
    a class (of a Learner), or N ids. `layer`: a name of `cam_layers`, by default `default_layer`. `method`: one of
    `METHODS`. EigenCAM and FEM explain the activations, whatever the class; ScoreCAM and AblationCAM take a forward
    pass for every channel of the layer, hundreds for an image. `bs`: images at a time.

    The model stays untouched, and its precision, mode and frozen layers and no_grad have no influence. A map is
    negligible where its maximum is rounding error (1e-6 of the activations times gradients in its sum), or where with
    a gradient-based method it adds less than 0.01 to the class's logit (for GradCAM++ and EigenGradCAM, whose maps
    have other units, HiResCAM's map counts). Raises InputError for an unknown method, layer or class, and for a map
    under 5 pixels a side.
    """
    check_choice(tuple(METHODS), method=method)
    x = torch.as_tensor(x).detach().as_subclass(torch.Tensor)
    if x.ndim != 4 or not x.is_floating_point():
        raise InputError(f"`x` must be a normalised batch (N, 3, H, W) of floats, not {x.dtype} {tuple(x.shape)}")
    with _float_copy(learn) as model:
        sizes, n_classes = _map_sizes(model, x.shape[1:])
        layer = _choose_layer(model, sizes, layer)
        targets = _class_ids(learn, target, len(x), n_classes)  # (N,) or None
        bs = min(bs, 8) if method in PER_CHANNEL else bs  # these hold a batch for each channel
        cam, device = _build_cam(model, layer, method), next(model.parameters()).device
        parts = [(np.zeros((0, *sizes[layer]), np.float32), np.zeros(0, bool), np.zeros(0, np.int64))]
        for start in console_bar("explaining", range(0, len(x), bs), delay=1):
            ids = None if targets is None else targets[start : start + bs]
            try:
                cam(x[start : start + bs].float().to(device), None if ids is None else [*map(itemgetter, ids)])
            except RuntimeError as error:
                if cam.outputs is None or not cam.uses_gradients or cam.outputs.requires_grad:
                    raise
                raise InputError("the class scores do not depend on it; choose another", layer=layer) from error
            parts.append((cam.raw, cam.negligible, cam.outputs.argmax(-1).cpu().numpy() if ids is None else ids))
    raw, negligible, ids = (np.concatenate(part) for part in zip(*parts, strict=True))
    maps = F.interpolate(torch.from_numpy(raw)[:, None], x.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    maps = (maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).numpy()  # (N, H, W)
    maps, peaks = maps * ~negligible[:, None, None], raw.max((1, 2), initial=0)
    return Heatmaps(maps, ids, layer, method, sizes[layer], negligible, peaks, method not in CLASSLESS)


def cam_layers(learn, size=32):
    """{name: (h, w)} of every module that outputs a map, in the order of computation, for `size` x `size` images.

    A map is a tensor (B, C, h, w) whose sides follow the image's, unlike the tokens and the attention of transformers.
    Modules that run more than once in a forward pass (a shared ReLU) are left out.
    """
    with _float_copy(learn) as model:
        return _map_sizes(model, (3, size, size))[0]


def default_layer(learn, size=32):
    """The deepest module whose map has at least 5 pixels a side, not counting bare convolutions and norms.

    Those come before the non-linearity; they count where nothing else is large enough. ResNet18 and 34: layer3,
    8 x 8; the custom ResNet: layer2, 8 x 8. Raises InputError where no map is large enough.
    """
    with _float_copy(learn) as model:
        return _choose_layer(model, _map_sizes(model, (3, size, size))[0])


def _choose_layer(model, sizes, layer=None):
    """`layer`, if its map is large enough, or the default layer."""
    inner = {name for name in sizes for outer in sizes if name.startswith(f"{outer}.") and sizes[name] == sizes[outer]}
    outer = [name for name in sizes if name not in inner]
    maps = ", ".join(f"{name} {sizes[name][0]} x {sizes[name][1]}" for name in outer) or "none"
    large = [name for name, size in sizes.items() if min(size) >= MIN_MAP]
    if not large:
        raise InputError(f"no layer has a map of at least {MIN_MAP} pixels a side; all maps: {maps}")
    bare = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    deepest = ([name for name in large if not isinstance(model.get_submodule(name), bare)] or large)[-1]
    if layer is not None and layer not in dict(model.named_modules()):
        check_choice(tuple(outer), layer=layer)
    if layer is not None and layer not in large:
        problem = f"has no map of at least {MIN_MAP} pixels a side, or runs more than once"
        raise InputError(f"{problem}; take {deepest}; all maps: {maps}", layer=layer)
    return layer or deepest


def _class_ids(learn, target, n, n_classes):
    """Class ids (n,) int64, or None for the predicted classes."""
    if target is None or isinstance(target, str) and target == "predicted":
        return None
    if isinstance(target, str):
        names = [] if isinstance(learn, nn.Module) else [str(name) for name in learn.dls.vocab]
        target = names.index(check_choice(("predicted", *names), target=target))
    ids = np.asarray(target.cpu() if isinstance(target, torch.Tensor) else target)
    if ids.size and ids.dtype.kind not in "iu" or ids.shape not in ((), (n,)):
        raise InputError(f'must be "predicted", a class id, or one id for each of the {n} images', target=target)
    for wrong in np.unique(ids[(ids < 0) | (ids >= n_classes)])[:1]:
        raise InputError(f"no such class; ids go from 0 to {n_classes - 1}", target=int(wrong))
    return np.broadcast_to(ids, n).astype(np.int64)


@contextmanager
def _float_copy(learn):
    """A frozen float32 copy of the model in evaluation mode, outside autocast, uncompiled.

    A copied module has no gradients and nothing of `model.compile()`. Hooks are shared, not copied: they may hold a
    whole learner, and some are part of what the model computes (weight_norm, pruning).
    """
    model = learn if isinstance(learn, nn.Module) else learn.model
    model = getattr(model, "_orig_mod", model)  # of torch.compile(model)
    attributes = [item for module in model.modules() for item in vars(module).items()]
    memo = {id(value): copy.copy(value) for name, value in attributes if "_hooks" in name}
    tensors = [value for _, value in attributes if isinstance(value, torch.Tensor)]
    memo |= {id(value): value.detach().clone() for value in tensors if not value.is_leaf}  # deepcopy refuses these
    # parts of the model may be compiled; loading the compiler takes seconds
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    autocast = torch.autocast(next(model.parameters()).device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), autocast, eager:
        try:
            model = copy.deepcopy(model, memo).float().eval().requires_grad_(False)
        except Exception as error:  # an attribute of any type
            raise InputError(f"the model cannot be copied ({reason(error)})") from error
        yield model


def _map_sizes(model, shape):
    """({name: (h, w)} of the modules that output a map, number of classes) for images of `shape` (C, H, W).

    The sides of a map are places in the image: the map of a square image is square, and for an image twice as large
    the sides grow alike and hardly more than twofold, while the number of tokens grows fourfold.
    """
    names, outputs, maps = {module: name for name, module in model.named_modules() if name}, {}, {}
    x = torch.zeros(1, *shape, device=next(model.parameters()).device)

    def record(module, inputs, output):
        outputs.setdefault(names[module], []).append(tuple(getattr(output, "shape", ())))

    hooks = [module.register_forward_hook(record) for module in names]
    with torch.no_grad():
        n_classes = model(x).shape[-1]
        first = {name: shapes[0][2:] for name, shapes in outputs.items() if len(shapes) == 1 and len(shapes[0]) == 4}
        outputs.clear()
        with suppress(Exception):  # a network for one image size fails at some module; those before it count
            model(x.repeat(1, 1, 2, 2))
    for hook in hooks:
        hook.remove()
    for name, size in first.items():
        doubled = outputs.get(name, [()])[0][2:]
        if len(doubled) == 2:
            growth = np.divide(doubled, size)
            follows = growth.max() <= 3 and np.ptp(growth) < 1
        else:
            follows = size[0] <= shape[1] and size[1] <= shape[2]
        if follows and (size[0] == size[1] or shape[1] != shape[2]):
            maps[name] = size
    return maps, n_classes


class _RawMaps:
    """Mixed into a method of the library: keep the maps before they are stretched, and mark the negligible ones."""

    outputs = None

    def get_cam_image(self, input_tensor, target_layer, targets, activations, grads, eigen_smooth=False):
        maps = np.array(super().get_cam_image(input_tensor, target_layer, targets, activations, grads, eigen_smooth))
        method, last = type(self).__name__, (1, 2)
        if method in ("EigenCAM", "EigenGradCAM"):  # the sign of a principal component is arbitrary
            maps[-maps.min(last) > maps.max(last)] *= -1
        if method == "AblationCAM":  # it divides by the score, which inverts the map of a negative score
            scores = [float(target(output)) for target, output in zip(targets, self.outputs, strict=True)]
            maps *= np.sign(scores)[:, None, None]
        self.raw = np.nan_to_num(maps, nan=0, posinf=0, neginf=0).clip(0).astype(np.float32)  # (B, h, w)
        largest = np.abs(activations).max((2, 3)) * (np.abs(grads).max((2, 3)) if self.uses_gradients else 1)  # (B, C)
        self.negligible = self.raw.max(last) <= NOISE * largest.sum(1)
        if self.uses_gradients:
            in_logits = method not in ("GradCAMPlusPlus", "EigenGradCAM")  # for the others HiResCAM's map counts
            evidence = self.raw if in_logits else (activations * grads).sum(1).clip(0)  # (B, h, w)
            self.negligible |= evidence.sum(last) < MIN_EVIDENCE
        return self.raw

    def aggregate_multi_layers(self, cam_per_target_layer):
        return self.raw  # instead of the stretched map


def _build_cam(model, layer, method):
    """An object of the library that computes the raw maps of a layer."""
    import pytorch_grad_cam as library  # takes seconds

    cls, module, members, options = getattr(library, METHODS[method]), model.get_submodule(layer), {}, {}
    if method in PER_CHANNEL:  # a copy of the method without its progress bar for each image, which has no switch
        code, names = cls.get_cam_weights.__code__, cls.get_cam_weights.__globals__
        members["get_cam_weights"] = FunctionType(code, names | {"tqdm": SimpleNamespace(tqdm=iter)})
    if method == "AblationCAM":  # its default layer is one for the whole process and keeps the last activations
        options["ablation_layer"] = library.AblationLayer()
    cam = type(cls.__name__, (_RawMaps, cls), members)(model, [module], **options)
    if cam.uses_gradients:  # the gradient begins at the map: nothing before it is recorded or differentiated
        module.register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_(), prepend=True)
    # an in-place operation further on (a ReLU) must not change the activations that the library has kept
    module.register_forward_hook(lambda module, inputs, output: output.clone())
    return cam

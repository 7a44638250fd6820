"""Heatmaps through pytorch-grad-cam (J. Gildenblat and others), on a Learner in any state, which is left as it was.

Grad-CAM: Selvaraju and others, arXiv:1610.02391. A network that shrinks 32 x 32 images to 4 x 4 has little to say
about places there: a map must have at least five pixels a side. The library stretches every map to 0..1, a map of
rounding errors too: here such maps are marked negligible instead.
"""

import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cifar_fastai.errors import InputError
from cifar_fastai.names import CAM_METHODS, CLASSLESS, PER_CHANNEL, check_name

__all__ = ["METHODS", "MIN_MAP", "Heatmaps", "cam_layers", "default_layer", "gradcam", "layer_names"]

MIN_MAP = 5  # pixels a side; smaller maps are refused
NOISE = 1e-6  # of what was added up: a map below it is rounding error
MIN_EVIDENCE = 0.01  # logits: what all of a map adds to the class; less changes its odds by under 1 %

METHODS = CAM_METHODS
GRADIENT_FREE = CLASSLESS + PER_CHANNEL


@dataclass(frozen=True, eq=False)
class Heatmaps:
    """Heatmaps for N images, each divided by its own maximum: 0 is no evidence, 1 the image's strongest."""

    maps: np.ndarray  # (N, H, W) float32 in 0..1, as large as the images; zeros where negligible
    targets: np.ndarray  # (N,) int64, the class that is explained
    layer: str
    method: str
    map_size: tuple[int, int]  # (h, w) of the layer's map before it was enlarged
    negligible: np.ndarray  # (N,) bool
    peaks: np.ndarray  # (N,) float32, the maximum of each map before it was divided by it


def gradcam(learn, x, target="predicted", layer=None, method="GradCAM", bs=64):
    """`Heatmaps` of what speaks for a class in each image of `x`, a normalised batch (N, 3, H, W).

    `learn` is a Learner or a model giving logits (B, C). `target`: "predicted" (or None), a class id, the name of a
    class where `learn` is a Learner, or N ids (the true classes, say). `layer`: any module with a map of at least 5
    pixels a side by its dotted name ("layer3", "layer3.1.conv2"), see `cam_layers`; by default `default_layer`.
    `method`: one of `METHODS`. EigenCAM and FEM explain the activations, whatever the class; ScoreCAM and AblationCAM
    take a forward pass for every channel of the layer, hundreds for an image.

    It computes in float32 in evaluation mode, `bs` images at a time, without compilation, whatever autocast, no_grad
    or frozen layers are around; weights, gradients, modes and hooks are afterwards as before, an error included.

    A map is negligible where its maximum is no more than rounding (1e-6 of the activations times gradients that were
    added up), or where with a gradient-based method all of it together adds less than 0.01 to the class's logit
    (GradCAM++ and EigenGradCAM draw other units: theirs is negligible where HiResCAM's is).
    Raises InputError for an unknown method, layer or class, and for a layer whose map is too small.
    """
    model, cls = _model(learn), _method(method)
    x = _images(x)
    with _borrowed(model) as device:
        sizes, n_classes = _map_sizes(model, x[:1].to(device) if len(x) else x.new_zeros(1, *x.shape[1:]).to(device))
        layer = _deepest(model, sizes) if layer is None else _checked_layer(model, layer, sizes)
        targets = _targets(learn, target, len(x), n_classes)  # (N,) or None
        bs = min(bs, 8) if method in PER_CHANNEL else bs  # they hold a batch for each channel
        parts = []
        for start in range(0, len(x), bs):
            batch = x[start : start + bs].to(device)  # (B, 3, H, W)
            ids = None if targets is None else targets[start : start + bs]
            parts.append(_explain(model, cls, layer, batch, ids))
    height, width = x.shape[-2:]
    empty = np.zeros((0, *sizes[layer]), np.float32), np.zeros(0, bool), np.zeros(0, np.int64)
    raw, negligible, ids = (np.concatenate(part) for part in zip(empty, *parts, strict=True))
    maps, peaks = _enlarge(raw, (height, width)), raw.max((1, 2), initial=0)
    return Heatmaps(maps * ~negligible[:, None, None], ids, layer, method, sizes[layer], negligible, peaks)


def cam_layers(learn, size=32):
    """{name: (h, w)} of every module that gives a map, in the order in which they finish, for `size` x `size` images.

    A map is a tensor (B, C, h, w). A module that runs more than once in a forward pass (a shared ReLU) has no one map
    and is left out.
    """
    model = _model(learn)
    with _borrowed(model) as device:
        return _map_sizes(model, torch.zeros(1, 3, size, size, device=device))[0]


def layer_names(layer):
    """A list of the layers that are meant: by one name, by several, or by None, for the default."""
    return [layer] if layer is None or isinstance(layer, str) else list(layer)


def default_layer(learn, size=32):
    """The deepest module whose map has at least 5 pixels a side, not counting bare convolutions and batch norms.

    Their maps are from before the non-linearity; they are taken where nothing else is deep enough. ResNet18 and 34:
    layer3, 8 x 8; the custom ResNet: layer2, 8 x 8. Raises InputError where no map is large enough.
    """
    return _deepest(_model(learn), cam_layers(learn, size))


# ------------------------------------------------------------------------------------------------ what was asked


def _model(learn):
    model = learn if isinstance(learn, nn.Module) else learn.model
    return getattr(model, "_orig_mod", model)  # torch.compile(model) wraps, model.compile() does not


def _method(name):
    kind = METHODS[check_name("method", name, tuple(METHODS))]
    import pytorch_grad_cam  # takes seconds

    return getattr(pytorch_grad_cam, kind)


def _images(x):
    x = torch.as_tensor(x).detach().as_subclass(torch.Tensor)
    if x.ndim != 4 or not x.is_floating_point():
        raise InputError(f"x is {x.dtype} of shape {tuple(x.shape)}: give a normalised batch (N, 3, H, W) of floats")
    return x.float()


def _checked_layer(model, name, sizes):
    if name not in sizes:
        if name in dict(model.named_modules()) and name:
            raise InputError(
                f"layer {name}: gives no map (B, C, h, w), or runs more than once; choose from {_listed(sizes)}"
            )
        near = get_close_matches(str(name), sizes, n=2, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {_listed(sizes)}"
        raise InputError(f"layer {name}: no such layer; {hint}")
    if min(sizes[name]) < MIN_MAP:
        raise InputError(
            f"layer {name}: its map is {_shown(sizes[name])}, less than {MIN_MAP} pixels; "
            f"take {_deepest(model, sizes)}; all maps: {_listed(sizes)}"
        )
    return name


def _deepest(model, sizes):
    large = [name for name, size in sizes.items() if min(size) >= MIN_MAP]
    if not large:
        raise InputError(f"no layer has a map of at least {MIN_MAP} pixels a side; all maps: {_listed(sizes)}")
    bare = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    return ([name for name in large if not isinstance(model.get_submodule(name), bare)] or large)[-1]


def _listed(sizes):
    """All maps in one line; a module's own modules are left out where their maps are as large as its."""
    told = {
        name: size
        for name, size in sizes.items()
        if not any(name.startswith(f"{outer}.") and size == sizes[outer] for outer in sizes)
    }
    return ", ".join(f"{name} {_shown(size)}" for name, size in told.items()) or "none"


def _shown(size):
    return f"{size[0]} x {size[1]}"


def _targets(learn, target, n, n_classes):
    """Class ids (n,) int64, or None for what the model predicts."""
    if target is None or (isinstance(target, str) and target == "predicted"):
        return None
    if isinstance(target, str):
        names = [] if isinstance(learn, nn.Module) else [str(name) for name in learn.dls.vocab]
        if target not in names:
            raise InputError(f"target {target}: no such class; choose from predicted, {', '.join(names)}")
        target = names.index(target)
    ids = np.asarray(target.cpu() if isinstance(target, torch.Tensor) else target)
    if ids.dtype.kind not in "iu" and ids.size or ids.ndim > 1:
        raise InputError(f'target {target}: give "predicted", a class id, or one id for each image')
    if ids.ndim == 1 and len(ids) != n:
        raise InputError(f"target: {len(ids)} class ids for {n} images; give one for each")
    for wrong in np.unique(ids[(ids < 0) | (ids >= n_classes)])[:1]:
        raise InputError(f"target {wrong}: no such class; ids go from 0 to {n_classes - 1}")
    return np.broadcast_to(ids, n).astype(np.int64)


# ------------------------------------------------------------------------------------------- the model, borrowed


@contextmanager
def _borrowed(model):
    """The model's device, the model being in evaluation mode, float32, frozen, eager; afterwards it is as before.

    Frozen, since only the gradient of a map is wanted: none is computed for the weights, and what gradients they have
    stay. Gradients are recorded and autocast is off, whatever is around.
    """
    params, tensors = list(model.parameters()), [*model.parameters(), *model.buffers()]
    device = params[0].device if params else torch.device("cpu")
    modules = {m: (m.training, dict(m._modules), set(m._forward_hooks)) for m in model.modules()}
    grads = [(p, p.grad, p.requires_grad) for p in params]
    others = [(t, t.data) for t in tensors if t.is_floating_point() and t.dtype != torch.float32]
    with ExitStack() as around:
        around.enter_context(torch.inference_mode(False))
        around.enter_context(torch.enable_grad())
        around.enter_context(torch.autocast(device.type, enabled=False))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled; loading it takes seconds
            around.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for p in params:
                p.grad = None  # the library clears gradients: it finds none to clear
                p.requires_grad_(False)
            for tensor, data in others:
                tensor.data = data.float()
            model.eval()
            yield device
        finally:
            for module, (training, children, hooks) in modules.items():
                module.training = training
                if module._modules != children:  # AblationCAM puts another layer in the one's place,
                    module._modules.update(children)
                for key in set(module._forward_hooks) - hooks:  # and leaves a hook where it breaks off
                    del module._forward_hooks[key]
            for tensor, data in others:
                tensor.data = data
            for p, grad, requires_grad in grads:
                p.requires_grad_(requires_grad)
                p.grad = grad


def _map_sizes(model, x):
    """({name: (h, w)} of the modules that give a map, the number of classes), from a forward pass of x (1, 3, H, W)."""
    seen, handles = {}, []

    def note(name):
        def hook(module, inputs, output):
            seen.setdefault(name, []).append(output.shape if isinstance(output, torch.Tensor) else ())

        return hook

    try:
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_hook(note(name)))
        with torch.no_grad():
            n_classes = model(x).shape[-1]
    finally:
        for handle in handles:
            handle.remove()
    return {name: tuple(runs[0][2:]) for name, runs in seen.items() if len(runs) == 1 and len(runs[0]) == 4}, n_classes


# ------------------------------------------------------------------------------------------- the library, tamed


class _Raw:
    """Mixed into a method of the library, which computes the map: keep it as it is, and what it was made of."""

    def get_cam_image(self, input_tensor, target_layer, targets, activations, grads, eigen_smooth=False):
        cam = np.array(super().get_cam_image(input_tensor, target_layer, targets, activations, grads, eigen_smooth))
        name, last = type(self).__name__, (1, 2)
        if name in ("EigenCAM", "EigenGradCAM"):  # the sign of a principal component is arbitrary
            cam[-cam.min(last) > cam.max(last)] *= -1
        if name == "AblationCAM":  # it divides by the score, which turns the map of a negative score around
            scores = [float(target(output)) for target, output in zip(targets, self.outputs, strict=True)]
            cam *= np.sign(scores)[:, None, None]
        cam = np.nan_to_num(cam, nan=0, posinf=0, neginf=0).clip(0).astype(np.float32)  # (B, h, w)
        self.raw, self.negligible = cam, cam.max(last) <= NOISE * _scale(activations, grads)
        if self.uses_gradients:
            self.negligible |= _evidence(name, cam, activations, grads) < MIN_EVIDENCE
        return cam

    def aggregate_multi_layers(self, cam_per_target_layer):
        return self.raw  # instead of the stretched map


def _evidence(name, cam, activations, grads):
    """(B,) logits that the places of a map `cam` (B, h, w) add to the class."""
    if name in ("GradCAMPlusPlus", "EigenGradCAM"):  # their maps are no logits: HiResCAM's stand in
        cam = (_numpy(activations) * _numpy(grads)).sum(1).clip(0)  # (B, h, w)
    return cam.sum((1, 2))


def _scale(activations, grads):
    """(B,): the most that a map can be: over channels, the sum of |activation| times |gradient| at their largest."""
    activations, grads = (None if t is None else np.abs(_numpy(t)).max((2, 3)) for t in (activations, grads))  # (B, C)
    return activations.sum(1) if grads is None else (activations * grads).sum(1)


def _numpy(t):
    return t.detach().cpu().numpy() if isinstance(t, torch.Tensor) else t


def _explain(model, cls, layer, x, ids):
    """(maps (B, h, w) with a minimum of 0, negligible (B,), class ids (B,)) of one batch x (B, 3, H, W)."""
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    module, handles = model.get_submodule(layer), []
    cam, targets = None, None if ids is None else [ClassifierOutputTarget(int(k)) for k in ids]
    try:
        if cls.__name__ not in GRADIENT_FREE:
            # the gradient begins at the map: nothing before it is recorded or differentiated
            handles.append(module.register_forward_hook(lambda m, i, out: out.detach().requires_grad_()))
        cam = _new(cls, model, module)
        # what changes the map in place further on (an in-place ReLU) shall not change what the library has kept
        handles.append(module.register_forward_hook(lambda m, i, out: out.clone()))
        with _no_bars():
            raw = cam(x, targets)
        predicted = cam.outputs.detach().argmax(-1).cpu().numpy()
        return raw, cam.negligible, predicted if ids is None else ids
    except RuntimeError as e:
        scores = getattr(cam, "outputs", None)  # None: it broke off before there were any
        if scores is None or not cam.uses_gradients or scores.requires_grad:
            raise
        raise InputError(f"layer {layer}: the class scores do not depend on it; choose another") from e
    finally:
        if cam is not None:  # not `with cam`, which swallows an IndexError
            cam.activations_and_grads.release()
        for handle in handles:
            handle.remove()


def _new(cls, model, module):
    raw = type(cls.__name__, (_Raw, cls), {})
    if cls.__name__ == "AblationCAM":  # its default is one layer for all time, which keeps the last activations
        from pytorch_grad_cam import AblationLayer

        return raw(model, [module], ablation_layer=AblationLayer())
    return raw(model, [module])


@contextmanager
def _no_bars():
    """ScoreCAM and AblationCAM draw a progress bar for every image: not now."""
    from pytorch_grad_cam import ablation_cam, score_cam

    kept = score_cam.tqdm, ablation_cam.tqdm
    score_cam.tqdm = ablation_cam.tqdm = SimpleNamespace(tqdm=lambda steps: steps)
    try:
        yield
    finally:
        score_cam.tqdm, ablation_cam.tqdm = kept


def _enlarge(raw, size):
    """Maps (N, h, w) -> (N, *size), bilinear, each divided by its maximum."""
    if not len(raw):
        return np.zeros((0, *size), np.float32)
    maps = F.interpolate(torch.from_numpy(raw)[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    return (maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).numpy()

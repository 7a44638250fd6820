"""torch.compile where it pays; without it where it does not pay or fails."""

import logging
import os
import shutil
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from cifar_fastai.files import private_folder
from cifar_fastai.settings import check_values
from cifar_fastai.training.winograd import plain_convolutions, winograd_convolutions

# Images a run must train on before compiling for one to three minutes earns that back on a CPU.
_WORTH_IT = 50_000


def choose_compile(name, device, n_images):
    """(compile?, reason) for `name` auto, yes or no, in a run that trains on `n_images` images, all epochs counted."""
    name = check_values(compile=name)["compile"]
    if name != "auto":
        return name == "yes", "as requested"
    if device.type != "cpu":
        return False, "20 epochs on a GPU end before it pays"
    if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        return False, "there is no C++ compiler"
    is_long = n_images >= _WORTH_IT
    return is_long, f"the run is {'long enough' if is_long else 'too short'}"


def compile_model(model, batch, autocast=None, winograd=True):
    """Compile `model` in place and try it on one training step; None, or one line why it stays as it was.

    `batch`: images (B, 3, H, W) as training will give them, `autocast`: the context it will compute in, if any. In
    place, so that the names in its state dict, export and pickling stay as they were. Weights, batch-norm statistics
    and the CPU's random state are as before. On a CPU in float32 the 3x3 convolutions become Winograd's
    (`winograd_convolutions`), unless `winograd` is False.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of a CUDA toolkit without a GPU
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    if winograd and batch.device.type == "cpu":
        winograd_convolutions(model)
    try:
        _use_private_caches()
        model.compile()
        model.train()
        with autocast or nullcontext():
            out = model(batch)
        F.cross_entropy(out.float(), torch.zeros(len(batch), dtype=torch.long, device=batch.device)).backward()
        return None
    except Exception as error:  # a compiler can fail in any way
        uncompile(model)
        return f"not compiled: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    finally:
        model.zero_grad()
        model.load_state_dict(before)
        torch.set_rng_state(rng)


def _use_private_caches():
    """Keep compiled code where nobody else can plant any, unless the user has set a place.

    torch's own default is in the common temporary folder, where another user of the machine can make it first.
    """
    from torch._inductor import codecache  # slow; its import puts torch's default into the environment
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    for variable, name in ("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton"):
        if os.environ.get(variable, "") in ("", os.path.abspath(default_cache_dir())):
            os.environ[variable] = str(private_folder(name))
    headers = os.path.join(os.environ["TORCHINDUCTOR_CACHE_DIR"], "headers")  # which heed no variable
    codecache._HEADER_DIR, codecache._HEADER_LOCK_DIR = headers, os.path.join(headers, "locks")


def uncompile(model):
    """Undo `compile_model`, in place."""
    model._compiled_call_impl = None
    plain_convolutions(model)
    torch._dynamo.reset()

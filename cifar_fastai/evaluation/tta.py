"""Test-time augmentation: views of a batch of images, and the weights that average their logits."""

import torch.nn.functional as F

PLAIN = (1, False)  # a view: a corner (0, 1 or 2) of the image in its border, and whether it is mirrored
SHIFTS = {1: 0.25, 0: 0.125, 2: 0.125}
TTA = {  # the weight of each view's logits
    None: {PLAIN: 1},
    "flip": {PLAIN: 0.5, (1, True): 0.5},
    "shift": {(corner, mirror): weight for corner, weight in SHIFTS.items() for mirror in (False, True)},
}


def view(x, corner, mirror):
    """Images x (B, C, H, W) in a view: moved by 1 - `corner` pixels along both axes over a reflected border."""
    if corner != 1:
        height, width = x.shape[-2:]
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")  # (B, C, H + 2, W + 2)
        x = padded[..., corner : corner + height, corner : corner + width].contiguous()
    return x.flip(-1) if mirror else x

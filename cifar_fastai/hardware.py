"""Memory that is used again, where the C library would hand it back and ask for it anew at every layer."""

import ctypes

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # as glibc's malloc.h numbers them


def keep_freed_memory():
    """Have this process keep the memory that tensors on the CPU free; True where the C library can be told so.

    glibc maps every tensor of more than 32 MB anew, and the kernel then clears it page by page: up to a fifth of an
    epoch goes there. For that the process holds more than its largest step needs, as pieces that fit no later tensor
    lie between others. Other systems stay as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # Windows, macOS, musl
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))  # map nothing, hand nothing back

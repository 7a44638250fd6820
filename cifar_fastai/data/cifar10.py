"""CIFAR-10 recognised by its pixels, in any order of its files, and put into the order of the official batches."""

import hashlib
from pathlib import Path

import numpy as np

N_TRAIN = 50_000
ORDER = Path(__file__).with_name("cifar10_order.npy")  # uint16 (60000,): see `write_order`
SHA256 = "97e0d770d7c81700983a1fd9d6a0792d18443efabc9dd9f5d04019cf409eeb18"  # of the official labels and pixels


def in_official_order(images, labels):
    """(images, labels, whether they are CIFAR-10's), in the order of the official batches if they are.

    images: uint8 (60000, 3, 32, 32), labels: int64 (60000,), train first. All 60,000 images are distinct: sorted by
    split, class and a hash of the pixels, the place of an image leads to its official index.
    """
    if _digest(images, labels) == SHA256:
        return images, labels, True
    order = np.empty(len(images), np.int64)
    order[np.load(ORDER, allow_pickle=False)] = _sorted_rows(images, labels)
    ordered = images[order], labels[order]
    return (*ordered, True) if _digest(*ordered) == SHA256 else (images, labels, False)


def write_order(images, labels):
    """Write the table of official indices for the sorted images, from the official batches in their order.

    `images = load_images("cifar-10-python.tar.gz"); write_order(images.images, images.labels)`
    """
    np.save(ORDER, _sorted_rows(images, labels).astype(np.uint16))


def _sorted_rows(images, labels):
    hashes = b"".join(hashlib.blake2b(np.ascontiguousarray(image), digest_size=8).digest() for image in images)
    return np.lexsort((np.frombuffer(hashes, ">u8"), labels, np.arange(len(labels)) >= N_TRAIN))


def _digest(images, labels):
    digest = hashlib.sha256(np.ascontiguousarray(labels, dtype="<i8"))
    digest.update(np.ascontiguousarray(images))
    return digest.hexdigest()

"""Folders and archives: what is read, and what is refused with one line."""

import errno
import gzip
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_data import TINY, encoded, member, random_pixels, refused, tiny_files, without, write_folder, write_tar

from cifar_fastai.data import decode, sources
from cifar_fastai.data.images import load_images
from cifar_fastai.errors import InputError


@pytest.mark.parametrize("top", ["", "./", "pets/"])
@pytest.mark.parametrize(("suffix", "mode"), [(".tgz", "w:gz"), (".tar.gz", "w:gz"), (".tar", "w")])
def test_archives_give_what_the_folder_gives(tmp_path, suffix, mode, top):
    """In whatever order their files are."""
    folder = load_images(write_folder(tmp_path / "pets", TINY))
    packed = load_images(write_tar(tmp_path / f"pets{suffix}", dict(reversed(tiny_files(top=top).items())), mode=mode))
    assert packed.name == folder.name == "pets"
    assert packed.fingerprint == folder.fingerprint
    assert np.array_equal(packed.images, folder.images) and np.array_equal(packed.labels, folder.labels)


def test_hidden_files_and_neighbours_are_ignored(tmp_path):
    names = """.DS_Store __MACOSX/train/cat/._0000.png labels.txt train/.DS_Store train/cat/._0000.png train/readme.txt
        train/.ipynb_checkpoints/0.png test/dog/Thumbs.db test/dog/desktop.ini models/x/y/z/0.png""".split()
    files = TINY | dict.fromkeys(names, b"x")
    plain = load_images(write_folder(tmp_path / "plain", TINY))
    assert load_images(write_folder(tmp_path / "junk", files)).fingerprint == plain.fingerprint
    on_top = {f"pets/{name}": content for name, content in files.items()} | {"._pets": b"x", "readme.txt": b"x"}
    for path in write_tar(tmp_path / "junk.tgz", on_top), write_folder(tmp_path / "outer", on_top):
        images = load_images(path)
        assert images.fingerprint == plain.fingerprint and images.name == "pets"


SMALL = encoded(random_pixels(0, (28, 30)))
PNG = TINY["train/cat/0001.png"]
JPEG = encoded(random_pixels(0), "JPEG")
HEAD = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
PIXEL_BOMB = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(HEAD) - 4) + HEAD + struct.pack(">I", zlib.crc32(HEAD))
DAMAGED = "damaged, or neither png nor jpg; replace or remove it"
PLACE = "must be an image, png or jpg, in test/<class>/; convert, move or remove it"
BAD_FILES = {  # of a folder and of an archive alike: the files beside those of TINY, or all files, and the message
    "no test": (without(TINY, "test/"), "no images in test/cat/; every class needs some in train and in test"),
    "test a file": (without(TINY, "test/") | {"test": b"x"}, "no images in test/cat/"),
    "only in test": (without(TINY, "train/dog"), "no images in train/dog/"),
    "class of hidden": (without(TINY, "test/dog") | {"test/dog/._1.png": b"x"}, "no images in test/dog/"),
    "one class": (without(TINY, "dog"), "holds images of 1 classes in train/<class>/; at least two are needed"),
    "no image": (TINY | {"train/cat/0001.png": b"not an image"}, f"train/cat/0001.png: {DAMAGED}"),
    "empty image": (TINY | {"train/cat/0001.png": b""}, f"train/cat/0001.png: {DAMAGED}"),
    "cut png": (TINY | {"train/cat/0001.png": PNG[:1500]}, DAMAGED),
    "altered png": (TINY | {"train/cat/0001.png": PNG[:1000] + bytes([PNG[1000] ^ 1]) + PNG[1001:]}, DAMAGED),
    "cut jpeg": (TINY | {"train/cat/a.jpg": JPEG[: len(JPEG) // 2]}, f"train/cat/a.jpg: {DAMAGED}"),
    "pixel bomb": (TINY | {"train/cat/a.png": PIXEL_BOMB}, f"train/cat/a.png: {DAMAGED}"),
    "size": (TINY | {"test/cat/small.png": SMALL}, "test/cat/small.png: 30x28 pixels; every image must be 32x32"),
    "big file": (TINY | {"test/cat/big.png": b"x" * (2**20 + 1)}, "test/cat/big.png: more than 1,048,576 bytes"),
    "text": (TINY | {"test/cat/a.txt": b"x"}, f"test/cat/a.txt: {PLACE}"),
    "no class folder": (TINY | {"test/a.png": SMALL}, f"test/a.png: {PLACE}"),
    "deeper": (TINY | {"test/cat/more/a.png": SMALL}, f"test/cat/more/a.png: {PLACE}"),
    "class name": (tiny_files(("a\nb", "c")), r"class a\\nb: a name with control characters"),
    "nothing of use": ({"images/a.png": SMALL, "b.txt": b"x"}, "must hold one data set, .*; it holds none"),
    "several": ({**tiny_files(top="a/"), **tiny_files(top="b/")}, "must hold one data set, .*; it holds a, b"),
}


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.filterwarnings("error")
def test_bad_folder_and_archive(tmp_path, monkeypatch, case):
    monkeypatch.setattr(decode.ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # by another library
    files, message = BAD_FILES[case]
    refused(write_folder(tmp_path / "pets", files), message)
    refused(write_tar(tmp_path / "pets.tgz", files), message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "missing",
            "missing: cannot be read .*; give a folder, a .tgz or .tar archive, or auto, cifar10, cifar100, digits",
        ),
        ("", "^'': cannot be read"),
        ("a\0b", r"a\\x00b: cannot be read \(embedded null byte\)"),
        ("x" * 5000, r"xxx\.\.\.xxx+: cannot be read \(File name too long\)"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name/x: cannot be read"),
    ],
)
def test_not_found(name, message):
    refused(name, message)


NO_ARCHIVE = r"pets.tgz: not an archive, or a damaged one \(.+\); give a complete .tgz"


@pytest.mark.parametrize("content", [b"", b"hello" * 1000, PNG, gzip.compress(b"hello" * 1000), gzip.compress(b"")])
def test_not_an_archive(tmp_path, content, monkeypatch):
    monkeypatch.setattr(sources.hashlib, "file_digest", None)  # it may be large: its head is looked at first
    (tmp_path / "pets.tgz").write_bytes(content)
    refused(tmp_path / "pets.tgz", NO_ARCHIVE)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_truncated_archive(tmp_path, mode):
    """Cut anywhere, also between two files, or with a bit flipped in a header or in gzip's checksum."""
    path = write_tar(tmp_path / "pets.tgz", TINY, mode=mode)
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1].offset
    content, at = path.read_bytes(), last if mode == "w" else -6
    damaged = [content[: int(len(content.rstrip(b"\0")) * left)] for left in (0.3, 0.6, 0.9)]
    for damage in [*damaged, content[:at], content[:at] + bytes([content[at] ^ 1]) + content[at:][1:]]:
        path.write_bytes(damage)
        refused(path, NO_ARCHIVE)


def special(**fields):
    return member("train/cat/x.png", **fields)


OUTSIDE = [
    "/etc/cron.d/x",
    "../../x.png",
    "train/cat/../../../x.png",
    "train\\..\\x.png",
    "C:/x.png",
    ".hidden/../../x",
]
REFUSAL = "a link, a special file, or a name that leads outside; pack plain files only"
HOSTILE = {
    **{name: (member(name, b"x"), REFUSAL) for name in OUTSIDE},
    "symlink": (special(type=tarfile.SYMTYPE, linkname="/etc/passwd"), REFUSAL),
    "hard link": (special(type=tarfile.LNKTYPE, linkname="../../etc/passwd"), REFUSAL),
    "device": (special(type=tarfile.CHRTYPE, devmajor=1, devminor=5), REFUSAL),
    "pipe": (special(type=tarfile.FIFOTYPE), REFUSAL),
    "long name": (member("train/" + "x" * 300 + "/a.png", b"x"), "no images in test/xxx+"),
    "very long name": (member("train/" + "x" * 100_000, b"x"), r"pets.tgz: .*a header of 100,\d+ bytes"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archive(tmp_path, case):
    extra, message = HOSTILE[case]
    refused(write_tar(tmp_path / "pets.tgz", TINY, [extra]), message)
    assert [path.name for path in tmp_path.rglob("*")] == ["pets.tgz"]


@pytest.mark.parametrize("size", [-2048, 2**62])
@pytest.mark.parametrize("type_", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_impossible_sizes_neither_loop_nor_fill_the_memory(tmp_path, type_, size):
    info, _ = special(type=type_, size=size)
    content = write_tar(tmp_path / "a.tar", TINY, mode="w").read_bytes().rstrip(b"\0")
    content += bytes(-len(content) % 512) + info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    (tmp_path / "pets.tgz").write_bytes(content)
    refused(tmp_path / "pets.tgz", NO_ARCHIVE)


def test_limits(tmp_path, monkeypatch):
    bomb = write_tar(tmp_path / "bomb.tgz", TINY, [member(f"zeros{i}", bytes(2**20)) for i in range(12)])
    assert bomb.stat().st_size < 100_000
    monkeypatch.setattr(sources, "MAX_TOTAL_BYTES", 10 * 2**20)
    refused(bomb, "bomb.tgz: .*when unpacked")
    os.truncate(write_tar(tmp_path / "long.tar", TINY, mode="w"), 30 * 2**20)
    refused(tmp_path / "long.tar", "long.tar: .*too large")  # without hashing it
    monkeypatch.setattr(sources, "MAX_FILES", 9)
    refused(write_tar(tmp_path / "pets.tgz", TINY), "pets.tgz: .*more than 9 files")
    refused(write_folder(tmp_path / "pets", TINY), "pets: .*more than 9 files")


def test_links_and_special_files_in_a_folder(tmp_path):
    write_folder(tmp_path / "plain", TINY)
    folder = write_folder(tmp_path / "pets", without(TINY, "test/"))
    (folder / "test").symlink_to(tmp_path / "plain/test")
    (folder / "train/cat/gone.png").symlink_to(tmp_path / "gone")
    refused(folder, r"gone.png: cannot be read \(No such file or directory\); repair or remove it")
    (folder / "train/cat/gone.png").unlink()
    assert load_images(folder).fingerprint == load_images(tmp_path / "plain").fingerprint
    if hasattr(os, "mkfifo"):  # reading it would wait for ever
        os.mkfifo(folder / "train/cat/pipe.png")
        for path in folder, folder / "train/cat/pipe.png":
            with pytest.raises(decode.InputError, match="pipe.png: cannot be read .(not a regular|neither a folder)"):
                load_images(path)


def test_every_kind_of_image_is_read_as_prediction_reads_it(tmp_path):
    from cifar_fastai.evaluation.image_files import load_image

    turned = Image.Exif()
    turned[0x0112] = 6  # the photograph is to be turned
    pixels = Image.fromarray(random_pixels(5))
    files = {
        "A.PNG": encoded(Image.new("L", (32, 32), 7)),
        "b.png": encoded(Image.new("RGBA", (32, 32), (1, 2, 3, 4))),
        "c.png": encoded(pixels, exif=turned),
        "d.jfif": encoded(pixels, "JPEG", exif=turned),
        "e.jpe": encoded(pixels, "JPEG"),
        "f.jpeg": encoded(pixels.convert("CMYK"), "JPEG"),
    }
    root = write_folder(tmp_path / "pets", TINY | {f"train/a/{name}": content for name, content in files.items()})
    images = load_images(write_folder(root, {"test/a/0.png": PNG})).images
    assert images[0].reshape(3, -1).T.tolist() == [[7, 7, 7]] * 1024
    assert images[1].reshape(3, -1).T.tolist() == [[251, 251, 251]] * 1024  # 4 / 255 of the colour, the rest is white
    assert np.array_equal(images[2].transpose(1, 2, 0), np.rot90(random_pixels(5), -1))
    for image, name in zip(images, files, strict=False):
        assert np.array_equal(load_image(root / "train/a" / name)[0].transpose(2, 0, 1), image)


def test_a_folder_that_nobody_needs_may_be_unreadable(tmp_path, monkeypatch):
    """lost+found at the top of a disk; a class that cannot be read is another matter."""
    folder, listdir = write_folder(tmp_path / "disk", tiny_files(top="pets/")), os.listdir

    def refuse(name):
        def listed(path):
            if Path(path).name == name:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return listdir(path)

        monkeypatch.setattr("os.listdir", listed)

    (folder / "lost+found").mkdir()
    (folder / "loop").symlink_to("loop")
    refuse("lost+found")
    assert load_images(folder).n_train == 6
    refuse("cat")
    with pytest.raises(InputError, match="test/cat: cannot be read"):
        load_images(folder)

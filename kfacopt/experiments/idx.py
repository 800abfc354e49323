"""The IDX format of MNIST: finding its files and reading them."""

from __future__ import annotations

import glob
import gzip
import math
import zlib
from pathlib import Path

import numpy
import torch
from torch import Tensor

_ELEMENT_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
# torchvision's downloads lie in <root>/<data set>/raw
_FOLDERS = ("", "raw/", "*/raw/")


def read_idx(path: str | Path) -> Tensor:
    """Read one IDX file, gzipped or not (told by its first bytes, not by its name).

    The format: two zero bytes, a byte for the element type, a byte for the number of dimensions d, d big-endian 32-bit
    sizes, then the elements (http://yann.lecun.com/exdb/mnist).

    Args:
        path: The file.

    Returns:
        Its array, in the shape and element type that the file declares.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not IDX, or is cut short or overlong; names path, magic number and shape.
    """
    content = Path(path).read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} begins as a gzip file but cannot be unpacked: {error}") from error
    magic = int.from_bytes(content[:4], "big")
    kind, dimensions = (magic >> 8) & 0xFF, magic & 0xFF
    if len(content) < 4 or magic >> 16 or kind not in _ELEMENT_TYPES or not dimensions:
        raise ValueError(
            f"{path} is not an IDX file: its magic number is 0x{magic:08x}, while images have 0x00000803 and labels "
            "0x00000801; was something else saved under this name, say a web page or a zip archive?"
        )
    header = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(content[start : start + 4], "big") for start in range(4, header, 4))
    element = numpy.dtype(_ELEMENT_TYPES[kind])
    expected = header + math.prod(shape) * element.itemsize
    if len(content) != expected:
        raise ValueError(
            f"{path} (magic number 0x{magic:08x}) declares the shape {list(shape)}, which takes {expected} bytes, but "
            f"holds {len(content)}: download it again"
        )
    array = numpy.frombuffer(content, element, offset=header).reshape(shape)
    return torch.from_numpy(array.astype(element.newbyteorder("=")))


def find_images(root: str | Path, split: str, prefix: str = "") -> Path | None:
    """Find a data set's images by the usual file names of the IDX format.

    Understood are `train-images-idx3-ubyte` (MNIST, Fashion-MNIST), `train-images.idx3-ubyte` and
    `emnist-balanced-train-images-idx3-ubyte`, each with or without `.gz`, in `root`, in `root/raw` or in
    `root/<data set>/raw`.

    Args:
        root: The folder.
        split: `"train"` or `"test"`; MNIST's own test files are called t10k.
        prefix: How the file's name begins, to choose among several, e.g. `"emnist-letters"`.

    Returns:
        The file, preferring one that is already unpacked; None when there is none.

    Raises:
        NotADirectoryError: `root` is no folder.
        ValueError: There are files of several data sets, and `prefix` does not tell which.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder of IDX files")
    found: dict[str, Path] = {}
    for place in _FOLDERS:
        for name in ("train",) if split == "train" else ("t10k", "test"):
            for suffix in ("", ".gz"):
                pattern = f"{place}{glob.escape(prefix)}*{name}-images[-.]idx3-ubyte{suffix}"
                for path in sorted(folder.glob(pattern)):
                    found.setdefault(str(path).removesuffix(".gz"), path)
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found.values())
        raise ValueError(
            f"{folder} holds the {split} images of several data sets: {names}; say which by prefix=, e.g. "
            "prefix='emnist-letters', or give the folder of one of them as root"
        )
    return next(iter(found.values()), None)


def find_labels(images: Path) -> Path:
    """Find the labels that lie beside some images.

    Args:
        images: The file of the images.

    Returns:
        The file of the labels, preferring one that is already unpacked.

    Raises:
        FileNotFoundError: There is none; names what was looked for.
    """
    beginning = images.name.rpartition("images")[0]
    for suffix in ("", ".gz"):
        for path in images.parent.glob(f"{glob.escape(beginning)}labels[-.]idx1-ubyte{suffix}"):
            return path
    raise FileNotFoundError(
        f"{images} has no labels beside it: no file called {beginning}labels-idx1-ubyte or "
        f"{beginning}labels.idx1-ubyte, with or without .gz"
    )

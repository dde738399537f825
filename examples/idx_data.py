"""Reads the IDX files of MNIST and similar data sets, plain or gzipped, from any folder.

A file is: two zero bytes, a byte for the number type (8: unsigned byte), a byte for the number of
dimensions, each dimension as a big-endian 32-bit number, then the numbers, last dimension fastest.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

_GZIP = b"\x1f\x8b"
_HOW_TO_GET = (
    "Put the four files (train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, "
    "t10k-labels-idx1-ubyte, each with or without .gz) of MNIST, Fashion-MNIST or the like into "
    "one folder and pass it with --data-dir, or on Debian and Ubuntu run `apt install "
    "dataset-fashion-mnist`, which puts them into /usr/share/datasets/fashion-mnist."
)


def read_idx(path: str | Path) -> Tensor:
    """The numbers of one IDX file of unsigned bytes, uint8, in the file's shape.

    Gzip is recognised by content, not by name.

    Raises:
        ValueError: not an IDX file of unsigned bytes, or its length is not what its header says.
        OSError: the file cannot be read.
    """
    content = Path(path).read_bytes()
    if content.startswith(_GZIP):
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(
                f"{path} is a broken gzip file: {error}. Download it again.") from error
    magic, n_dims = content[:3], content[3] if len(content) > 3 else 0
    if magic != b"\0\0\x08" or n_dims == 0:
        raise ValueError(
            f"{path} is not an IDX file of unsigned bytes: it starts with the bytes "
            f"{content[:4].hex(' ') or '(none)'}, but must start with 00 00 08 and the number of "
            "dimensions (01 for labels, 03 for images). Download it again."
        )
    start = 4 + 4 * n_dims
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if len(content) != start + math.prod(shape):
        raise ValueError(
            f"{path} has {len(content)} bytes, but its header, shape {shape}, makes "
            f"{start + math.prod(shape)}. Download it again.")
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(shape)


def load_folder(folder: str | Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [N, 28, 28], training labels [N], test images and test labels, all uint8, of
    a folder of IDX files named as MNIST's.

    Raises:
        FileNotFoundError: the folder or a file is missing; the message says how to get them.
        ValueError: a file is malformed, or there is not one label per image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no data folder {folder}. {_HOW_TO_GET}")
    parts: list[Tensor] = []
    for split in ("train", "t10k"):
        images = read_idx(_find(folder, split, "images-idx3"))
        labels = read_idx(_find(folder, split, "labels-idx1"))
        if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels):
            raise ValueError(
                f"The {split} files of {folder} hold images of shape {list(images.shape)} and "
                f"labels of shape {list(labels.shape)}, but must hold [N, height, width] and [N] "
                "with the same N. Check that the four files belong together."
            )
        parts += [images, labels]
    return parts[0], parts[1], parts[2], parts[3]


def _find(folder: Path, split: str, kind: str) -> Path:
    # Some archives write a dot where the original names have a hyphen.
    names = [f"{split}-{kind}-ubyte", f"{split}-{kind.replace('-', '.')}-ubyte"]
    for name in names:
        for candidate in (folder / name, folder / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    raise FileNotFoundError(
        f"The data folder {folder} has no file {names[0]} or {names[0]}.gz. {_HOW_TO_GET}")

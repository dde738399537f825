"""IDX files made by hand, byte by byte, against what the reader makes of them."""

import gzip

import pytest
import torch
from idx_data import load_folder, read_idx

LABELS = bytes.fromhex("00 00 08 01  00 00 00 03  07 00 ff")
IMAGES = bytes.fromhex("00 00 08 03  00 00 00 03  00 00 00 01  00 00 00 02  01 02 03 04 05 fe")
NAMES = (
    "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte")


def write_folder(folder, names=NAMES):
    for name in names:
        content = IMAGES if "images" in name else LABELS
        (folder / name).write_bytes(
            gzip.compress(content, mtime=0) if name.endswith(".gz") else content)


@pytest.mark.parametrize("name", ["file", "file.gz"])
@pytest.mark.parametrize(
    ("content", "expected"), [(LABELS, [7, 0, 255]), (IMAGES, [[[1, 2]], [[3, 4]], [[5, 254]]])])
def test_reads_numbers_and_shape(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(
        gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    numbers = read_idx(tmp_path / name)
    assert numbers.dtype == torch.uint8
    assert numbers.tolist() == expected


def test_gzip_is_known_by_content(tmp_path):
    (tmp_path / "no-suffix").write_bytes(gzip.compress(LABELS, mtime=0))
    assert read_idx(str(tmp_path / "no-suffix")).tolist() == [7, 0, 255]


def test_a_dimension_takes_four_bytes_most_significant_first(tmp_path):
    (tmp_path / "file").write_bytes(bytes.fromhex("00 00 08 01  00 01 00 02") + bytes(65538))
    assert read_idx(tmp_path / "file").shape == (65538,)


def test_empty_file_of_labels(tmp_path):
    (tmp_path / "file").write_bytes(bytes.fromhex("00 00 08 01  00 00 00 00"))
    assert read_idx(tmp_path / "file").shape == (0,)


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (bytes.fromhex("00 00 0d 01  00 00 00 00"), "00 00 0d 01"),
        (b"<html>not found</html>", "3c 68 74 6d"),
        (bytes.fromhex("00 00 08 00"), "00 00 08 00"),
        (b"", "(none)"),
    ],
)
def test_wrong_magic_number(tmp_path, content, shown):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="is not an IDX file of unsigned bytes") as error:
        read_idx(tmp_path / "file")
    assert shown in str(error.value)
    assert str(tmp_path / "file") in str(error.value)


@pytest.mark.parametrize(
    "content", [LABELS[:-1], LABELS + b"\0", LABELS[:6], gzip.compress(LABELS, mtime=0)[:-9]])
def test_wrong_length(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="Download it again"):
        read_idx(tmp_path / "file")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("separator", ["-", "."])
def test_loads_a_folder(tmp_path, suffix, separator):
    write_folder(tmp_path, [name.replace("-idx", f"{separator}idx") + suffix for name in NAMES])
    train_images, train_labels, test_images, test_labels = load_folder(tmp_path)
    assert train_images.tolist() == test_images.tolist() == [[[1, 2]], [[3, 4]], [[5, 254]]]
    assert train_labels.tolist() == test_labels.tolist() == [7, 0, 255]


def test_missing_folder_says_how_to_get_the_data(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_folder(tmp_path / "absent")
    for part in (str(tmp_path / "absent"), "dataset-fashion-mnist", "--data-dir", *NAMES):
        assert part in str(error.value)


@pytest.mark.parametrize("missing", NAMES)
def test_missing_file_is_named(tmp_path, missing):
    write_folder(tmp_path, [name for name in NAMES if name != missing])
    with pytest.raises(FileNotFoundError, match=f"has no file {missing} or {missing}.gz") as error:
        load_folder(tmp_path)
    assert "dataset-fashion-mnist" in str(error.value)


def test_one_label_per_image(tmp_path):
    write_folder(tmp_path)
    (tmp_path / NAMES[1]).write_bytes(bytes.fromhex("00 00 08 01  00 00 00 02  07 00"))
    with pytest.raises(ValueError, match="belong together"):
        load_folder(tmp_path)

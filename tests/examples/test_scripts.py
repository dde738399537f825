"""The scripts as a user runs them."""

import compare
import controllers
import digits
import fashion_mnist
import pytest
import torch

from adabatch import Diagnostics


def write_idx(path, array):
    header = bytes([0, 0, 8, array.dim()]) + b"".join(
        size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + bytes(array.flatten().tolist()))


@pytest.fixture
def mnist_folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 64), ("t10k", 20)):
        write_idx(
            tmp_path / f"{split}-images-idx3-ubyte",
            torch.randint(0, 256, (count, 28, 28), generator=generator))
        write_idx(
            tmp_path / f"{split}-labels-idx1-ubyte",
            torch.randint(0, 10, (count,), generator=generator))
    return tmp_path


def test_digits_are_learned_while_the_batch_grows(tmp_path, capsys):
    digits.main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert float(printed.split()[1].rstrip("%")) >= 96
    sizes = Diagnostics.from_jsonl(tmp_path / "cabs" / "history.jsonl").column("next_batch_size")
    assert sizes[0] == 16
    assert sizes[len(sizes) // 2 :].mean() > 24


def test_digits_at_a_fixed_size(tmp_path, capsys):
    digits.main([
        "--out", str(tmp_path), "--batch-size", "50", "--budget", "1000", "--lr", "0.05", "--seed",
        "4"])
    history = Diagnostics.from_jsonl(tmp_path / "fixed-50" / "history.jsonl")
    assert set(history.column("batch_size").tolist()) == {50}
    assert set(history.column("lr").tolist()) == {0.05}
    assert history.latest.samples_seen == 1000
    assert "1,000 samples, 20 steps" in capsys.readouterr().out


@pytest.mark.parametrize("network", ["mnist", "small"])
def test_fashion_mnist_takes_any_folder(mnist_folder, tmp_path, capsys, network):
    fashion_mnist.main([
        "--data-dir", str(mnist_folder), "--network", network, "--budget", "2ep", "--out",
        str(tmp_path / "out")])
    assert Diagnostics.from_jsonl(
        tmp_path / "out" / "cabs" / "history.jsonl").latest.samples_seen == 128
    assert "after 128 samples" in capsys.readouterr().out


def test_fashion_mnist_without_data_says_how_to_get_it(tmp_path):
    with pytest.raises(SystemExit, match="dataset-fashion-mnist"):
        fashion_mnist.main(["--data-dir", str(tmp_path / "absent")])


def test_compare_on_both_data_sets(mnist_folder, tmp_path, capsys):
    compare.main(["--budget", "200", "--sizes", "20", "--out", str(tmp_path / "out")])
    compare.main(
        [
            "--data", "fashion", "--data-dir", str(mnist_folder), "--network", "small", "--budget",
            "100", "--sizes", "20", "--out", str(tmp_path / "out")]
    )
    for name in ("digits", "fashion"):
        assert (tmp_path / "out" / name / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("fixed-20") == 2


def test_controllers_tune_and_tabulate_every_row(mnist_folder, tmp_path, capsys):
    controllers.main(["--budget", "300", "--out", str(tmp_path / "out")])
    table = (tmp_path / "out" / "digits" / "controllers.txt").read_text().splitlines()
    assert len(table) == 1 + len(controllers.methods())
    fashion = [
        "--data", "fashion", "--data-dir", str(mnist_folder), "--network", "small", "--budget",
        "128", "--only", "annealed", "16 (1-p)^2"]
    controllers.main(
        [*fashion, "--lrs", "0.1", "0.001", "--seeds", "0", "1", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "fashion" / "controllers.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("±") == 2

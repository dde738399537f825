"""Layouts against tensors whose every row carries its sample's number."""

import pytest
import torch

from adabatch.grad_sample.layout import BatchSizeSource, Layout

N, T, D = 3, 4, 2


def numbered():
    """[N, T, D] with 10·sample + position in every row."""
    return (10 * torch.arange(N)[:, None] + torch.arange(T)).unsqueeze(-1).expand(
        N, T, D).contiguous()


ARRANGED = {
    "batch_first": lambda x: x,
    "batch_second": lambda x: x.transpose(0, 1).contiguous(),
    "flat_batch_major": lambda x: x.flatten(0, 1),
    "flat_time_major": lambda x: x.transpose(0, 1).flatten(0, 1),
}


@pytest.mark.parametrize("name", ARRANGED)
def test_split_undoes_the_arrangement(name):
    assert torch.equal(Layout(name).split(ARRANGED[name](numbered()), N), numbered())


@pytest.mark.parametrize("name", ARRANGED)
def test_split_is_a_view_through_which_gradients_pass(name):
    tensor = ARRANGED[name](numbered()).double().requires_grad_()
    parts = Layout(name).split(tensor, N)
    assert parts.data_ptr() == tensor.data_ptr()
    parts[1].sum().backward()
    assert torch.equal(tensor.grad, ARRANGED[name](torch.arange(N).eq(1).double()[
        :, None, None].expand(N, T, D)))


@pytest.mark.parametrize("shape", [(T,), (T, D), (1, T, D), (1, D)], ids=str)
def test_shared_gives_every_sample_the_same(shape):
    table = torch.randn(shape)
    parts = Layout.SHARED.split(table, N)
    single = table[0] if shape[0] == 1 else table
    assert parts.shape == (N, *single.shape)
    assert all(torch.equal(part, single) for part in parts)
    assert parts.untyped_storage().data_ptr() == table.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", [*ARRANGED, "shared"])
def test_split_compiles_without_a_break(name):
    layout, tensor = Layout(name), ARRANGED.get(name, lambda x: x[0])(numbered())
    compiled = torch.compile(lambda x: layout.split(
        x, x.numel() // (T * D) if layout is not Layout.SHARED else N) * 2, fullgraph=True,
        backend="eager")
    assert torch.equal(compiled(tensor), 2 * layout.split(tensor, N))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("batch_first", (4, 3)),
        ("batch_first", ()),
        ("batch_second", (3, 4)),
        ("batch_second", (3,)),
        ("flat_batch_major", (7, 2)),
        ("flat_time_major", (4,)),
        ("flat_time_major", ()),
    ],
)
def test_a_shape_that_does_not_fit_is_a_value_error_that_names_the_fix(name, shape):
    with pytest.raises(ValueError,
                       match=rf"(?s)shape \[.*\] does not hold 3 samples in the layout "
                             rf"'{name}'.*adabatch\.check"):
        Layout(name).split(torch.zeros(shape), N)


def test_an_unknown_layout_is_a_value_error():
    with pytest.raises(ValueError, match="time_first"):
        Layout("time_first")


def test_layouts_print_as_their_names_and_know_where_n_is_missing():
    assert [str(layout) for layout in Layout] == [*ARRANGED, "shared"]
    assert [layout.value for layout in Layout
            if not layout.stores_batch_size] == ["flat_batch_major", "flat_time_major", "shared"]


def test_source_reads_positional_keyword_and_nested_arguments():
    source = BatchSizeSource(position=1, name="inputs", path=("x", 0), dim=1)
    inputs = {"x": [torch.zeros(4, 7)]}
    assert source.read((None, inputs), {}) == 7
    assert source.read((None,), {"inputs": inputs}) == 7
    assert str(source) == "inputs['x'][0].shape[1]"
    assert str(BatchSizeSource(2, None, (), 0)) == "args[2].shape[0]"
    assert BatchSizeSource(**source.to_dict()) == source


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), ((), {"other": torch.zeros(2, 2)}), (({},), {}), (({"x": 3},), {}),
     (({"x": torch.zeros(2)},), {}), ((torch.zeros(2, 2),), {})],
)
def test_a_call_that_does_not_fit_the_source_is_a_value_error(args, kwargs):
    message = r"cannot be read from the model's inputs as inputs\['x'\]\.shape\[1\]"
    with pytest.raises(ValueError, match=message):
        BatchSizeSource(position=0, name="inputs", path=("x",), dim=1).read(args, kwargs)

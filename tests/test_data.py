"""IDX files and splits: what is read is what was written, and what is damaged is named."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lenet_sweep.errors import DataError
from lenet_sweep.training import data
from lenet_sweep.training.data import load_data, read_idx, scaled

CPU = torch.device("cpu")


def load(make_config, *overrides, seed=0):
    config = make_config("data=fashion_mnist_mini", *overrides)
    return load_data(config.data, seed, CPU, say=lambda line: None)


def test_mini_set_is_balanced_uint8_pictures(make_config):
    data = load(make_config)
    assert data.train.images_NCHW.shape == (2000, 1, 28, 28)
    assert data.train.images_NCHW.dtype == torch.uint8
    assert torch.bincount(data.train.labels_N).tolist() == [200] * 10
    assert torch.bincount(data.test.labels_N).tolist() == [50] * 10
    assert data.val is None
    assert data.class_names[9] == "Ankle boot"


def test_held_out_and_training_examples_are_disjoint_and_all_from_the_training_set(make_config):
    whole = load(make_config).train
    data = load(make_config, "data.val_size=300", "data.train_size=1700")
    assert (len(data.train), len(data.val), len(data.test)) == (1700, 300, 500)
    parts = torch.cat([data.train.images_NCHW, data.val.images_NCHW]).flatten(1)
    # Sorted by their pixels, the two parts together are the whole set.
    assert sorted(map(bytes, parts.numpy())) == sorted(map(bytes, whole.images_NCHW.flatten(1).numpy()))


def test_seed_chooses_what_is_held_out(make_config):
    first, again, other = (load(make_config, "data.val_size=50", seed=s).val for s in (0, 0, 1))
    assert torch.equal(first.images_NCHW, again.images_NCHW)
    assert not torch.equal(first.images_NCHW, other.images_NCHW)


def test_pixels_are_scaled_to_zero_one(make_config):
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1)
    assert scaled(pixels).flatten().tolist() == pytest.approx([0, 0.2, 1])
    assert scaled(pixels).dtype == torch.float32


def idx(shape, values):
    return b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes(values)


def test_idx_file_gives_back_what_was_written(tmp_path):
    path = tmp_path / "numbers"
    path.write_bytes(idx((2, 3), [1, 2, 3, 4, 5, 255]))
    assert read_idx(path).tolist() == [[1, 2, 3], [4, 5, 255]]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", r"is not an IDX file of bytes \(its first bytes: none\)"),
        (b"\0\0\x0d\x01" + bytes(8), "not an IDX file of bytes"),
        (b"\x1f\x8b\x08\x00", r"is not an IDX file of bytes \(its first bytes: 1f8b0800\)"),
        (b"\0\0\x08\x03\0\0", "truncated inside its header"),
        (idx((2, 3), [1, 2, 3, 4, 5]), "announces 6 values"),
        (idx((2, 3), [1] * 7), "announces 6 values"),
        (idx((0,), []), "announces 0 values"),
        (idx((2**32 - 1,) * 4, [1]), "announces"),
    ],
)
def test_damaged_idx_file_is_named_with_what_is_wrong(tmp_path, content, complaint):
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"broken: .*{complaint}"):
        read_idx(path)


def test_missing_idx_file_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: cannot be read: No such file"):
        read_idx(tmp_path / "nowhere")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64) | st.binary(max_size=40).map(lambda tail: b"\0\0\x08" + tail))
def test_no_content_of_an_idx_file_gives_anything_but_a_tensor_or_a_data_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(content)
    try:
        tensor = read_idx(path)
    except DataError:
        return
    assert tensor.dtype == torch.uint8
    assert tensor.numel() == len(content) - 4 - 4 * content[3]


@pytest.mark.parametrize(
    ("shape", "labels", "complaint"),
    [
        ((2, 20, 28), [0, 1], r"has shape \(2, 20, 28\), not 28x28 images for 2 labels"),
        ((2, 28, 28), [0], r"has shape \(2, 28, 28\), not 28x28 images for 1 labels"),
        ((2, 28, 28), [0, 10], "has label 10; the largest label allowed is 9"),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(tmp_path, shape, labels, complaint):
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(shape, bytes(shape[0] * shape[1] * shape[2])))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx((len(labels),), labels))
    with pytest.raises(DataError, match=complaint):
        data._read(tmp_path, "t10k")

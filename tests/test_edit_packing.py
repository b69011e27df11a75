"""Mostly zero tensors are packed and come back to the bit; what does not belong together is refused."""

import pytest
import torch

from koinon.edit._checks import FACTS, small
from koinon.edit._packing import packed, unpacked
from koinon.edit.job import load, save
from koinon.edit.wise import Wise


def sparse(*shape: int, share: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    its = torch.randn(*shape, generator=generator).to(dtype)
    return its.where(torch.rand(*shape, generator=generator) < share, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (257,), (9, 8, 7), (64, 31)])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_it_comes_back_to_the_bit(shape, share, dtype):
    given = {"a": sparse(*shape, share=share, dtype=dtype), "b": torch.arange(6).view(2, 3)}
    again = unpacked(*packed(given))
    assert again.keys() == given.keys()
    for name, its in given.items():
        assert again[name].dtype == its.dtype
        assert again[name].shape == its.shape
        assert torch.equal(again[name].view(torch.uint8), its.view(torch.uint8))


def test_minus_zero_is_a_value():
    given = torch.zeros(800)
    given[3] = -0.0
    (again,) = unpacked(*packed({"a": given})).values()
    assert torch.equal(again.view(torch.int32), given.view(torch.int32))
    assert again.view(torch.int32).count_nonzero() == 1


@pytest.mark.parametrize(("share", "small"), [(0.2, True), (0.45, True), (0.5, False), (0.9, False)])
def test_only_what_becomes_half_as_large_is_packed(share, small):
    its = torch.zeros(100, 80)
    its.view(-1)[: round(share * 8_000)] = 1.0
    written, shapes = packed({"a": its})
    taken = sum(one.numel() * one.element_size() for one in written.values())
    assert (shapes == {"a": [100, 80]}) == small
    assert taken == (1_000 + 4 * share * 8_000 if small else 32_000)


def test_empty_tensors_and_whole_numbers_stay_as_they_are():
    given = {
        "none": torch.zeros(0, 3),
        "whole": torch.zeros(90, dtype=torch.int64),
        "one": torch.tensor(0.0),
        "few": torch.zeros(255),
    }
    written, shapes = packed(given)
    assert written.keys() == given.keys()
    assert shapes == {}


@pytest.mark.parametrize("shape", [[31, 64], [-64, -31], [64, 30], [], [64, "31"], [10**9, 10**9], 1984, None])
def test_another_shape_is_refused(shape):
    written, _ = packed({"a": sparse(64, 31, share=0.1)})
    if shape == [31, 64]:
        assert unpacked(written, {"a": shape})["a"].shape == (31, 64)
        return
    with pytest.raises((AssertionError, TypeError)):
        unpacked(written, {"a": shape})


def test_parts_that_do_not_belong_together_are_refused():
    written, shapes = packed({"a": sparse(64, 31, share=0.1)})
    places, values = written["a:places"], written["a:values"]
    for wrong in (
        {"a:values": values[1:]},
        {"a:values": values[:, None]},
        {"a:places": places[1:]},
        {"a:places": places.int()},
        {"a:places": ~places},
        {"a": values},
    ):
        with pytest.raises(AssertionError):
            unpacked(written | wrong, shapes)
    with pytest.raises(KeyError):
        unpacked({"a:places": places}, shapes)


def test_a_folder_of_wise_takes_what_its_masks_leave(tmp_path):
    lm = small().lm
    edited = Wise(layer=1, steps=1, count=0, shard=1, shards=9, share=0.2).edit(lm, FACTS)
    taken = save(edited, tmp_path / "kept")
    whole = sum(its.numel() * its.element_size() for its in edited.patch.tensors().values())
    assert taken <= 0.24 * whole
    again = load(tmp_path / "kept", lm)
    for name, its in edited.patch.tensors().items():
        assert torch.equal(again.patch.tensors()[name], its)

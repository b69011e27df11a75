"""Changes of one tensor made into one."""

import pytest
import torch
from oracles.edit_wise import ties

from koinon.nn.params import stream
from koinon.nn.taskvectors import largest, merged


def drawn(count=3, shape=(3, 5), seed=0):
    return [torch.randn(shape, generator=stream(seed, "vector", number)) for number in range(count)]


@pytest.mark.parametrize("density", [1.0, 0.53, 0.2])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 0.2, 0.6)])
def test_equals_ties_entry_by_entry(weights, density):
    vectors = drawn()
    vectors[1][0, 0] = 0.0
    torch.testing.assert_close(merged(vectors, weights, density), ties(vectors, weights, density))


def test_one_vector_kept_whole_is_itself():
    (vector,) = drawn(1)
    for weight in (1.0, 0.5):
        for elect in (True, False):
            assert torch.equal(merged([vector], [weight], 1.0, elect), vector)


def test_zeros_give_zeros():
    zeros = [torch.zeros(3, 5)] * 2
    for elect in (True, False):
        assert torch.equal(merged(zeros, [0.5, 0.5], 0.5, elect), zeros[0])


def test_without_election_it_is_the_mean():
    vectors = drawn(4)
    torch.testing.assert_close(merged(vectors, [0.25] * 4, elect=False), torch.stack(vectors).mean(0))
    expected = 0.1 * vectors[0] + 0.9 * vectors[1]
    torch.testing.assert_close(merged(vectors[:2], [0.1, 0.9], elect=False), expected)


def test_entries_of_one_vector_alone_are_kept_whole():
    """Shards with masks that do not overlap lose nothing by election, and half of everything by a mean."""
    first, second = torch.tensor([1.0, 0.0, -2.0]), torch.tensor([0.0, 3.0, 0.0])
    assert merged([first, second], [0.5, 0.5]).tolist() == [1.0, 3.0, -2.0]
    assert merged([first, second], [0.5, 0.5], elect=False).tolist() == [0.5, 1.5, -1.0]


def test_the_order_does_not_matter():
    vectors = drawn()
    torch.testing.assert_close(merged(vectors, [1, 1, 1], 0.5), merged(vectors[::-1], [1, 1, 1], 0.5))


def test_the_largest_are_counted_exactly():
    vector = torch.ones(10)
    assert int(largest(vector, 0.35).sum()) == 3
    assert torch.equal(largest(torch.tensor([3.0, -4.0, 1.0, 0.5]), 0.5), torch.tensor([3.0, -4.0, 0.0, 0.0]))

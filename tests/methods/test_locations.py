"""Places of a sparse spectrum are those that PyTorch draws."""

import numpy as np
import pytest
from support import KEY

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.methods.structured._locations import locations


def test_they_are_the_start_of_a_permutation_of_pytorch():
    # torch.randperm(1536, generator=torch.Generator().manual_seed(777))[:6]
    assert locations(777, 1536, 6).tolist() == [1127, 190, 1005, 1004, 471, 296]


def test_all_of_them_are_a_permutation():
    np.testing.assert_array_equal(np.sort(locations(3, 50, 50)), np.arange(50))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 1000, 65_537, 1_000_003])
def test_they_are_those_of_torch(size):
    torch = pytest.importorskip("torch", reason="compared with torch")
    for seed in (0, 777, 2**31 - 1):
        wanted = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:2592]
        np.testing.assert_array_equal(locations(seed, size, min(size, 2592)), wanted)


def test_a_weight_of_fewer_numbers_is_named():
    with pytest.raises(PeftError, match="count 50 is larger than 'w', a matrix of 6 x 8"):
        pj.fourierft(count=50, targets="w").init(KEY, {"w": np.zeros((6, 8), np.float32)})

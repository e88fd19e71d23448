"""Copies on the host: several tensors through one copy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backdrop.modeling import host_copies_backdrop
from backdrop.modeling.host_copies_backdrop import host_copies

DTYPES = [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16, torch.float64]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.booleans()), max_size=6
    )
)
def test_tensors_of_any_dtype_and_shape_come_through_one_copy_unchanged(specs):
    tensors = []
    for i, (dtype, shape, transposed) in enumerate(specs):
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(i)).mul(9).to(dtype)
        tensors.append(tensor.t() if transposed and tensor.ndim == 2 else tensor)
    with pytest.MonkeyPatch.context() as patch:
        # A device that no tensor here is on, so that each is copied.
        patch.setattr(host_copies_backdrop, "CPU", torch.device("cpu", 0))
        copies = host_copies([None, *tensors])
    assert copies[0] is None
    for tensor, copy in zip(tensors, copies[1:], strict=True):
        assert copy.dtype == tensor.dtype and copy.shape == tensor.shape
        assert torch.equal(copy, tensor)


def test_what_is_on_the_host_is_not_copied():
    tensor = torch.ones(3)
    assert host_copies([tensor, None]) == [tensor, None]
    assert host_copies([tensor])[0] is tensor

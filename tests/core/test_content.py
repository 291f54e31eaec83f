"""What a run read is known by its digests: other bits, shapes or types are other contents."""

from __future__ import annotations

import pytest
import torch

from persona_lora.core.content import numbered
from persona_lora.core.tensor_files import tensor_digest

TYPES = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32,
         torch.float64, torch.int64)  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_one_other_bit_is_another_content(dtype):
    numbers = torch.arange(12).reshape(3, 4).to(dtype)
    changed, swapped = numbers.clone(), numbers.clone()
    changed.view(torch.uint8)[1, 0] ^= 1
    swapped[0], swapped[1] = numbers[1], numbers[0]
    shaped, vector = numbers.reshape(4, 3), numbers.flatten()
    found = [tensor_digest(each) for each in (numbers, changed, swapped, shaped, vector)]
    assert len(set(found)) == len(found)
    assert tensor_digest(numbers.clone()) == found[0]


def test_inputs_are_named_alone_or_by_their_numbers():
    assert numbered("diff", ["a"]) == {"the diff": "a"}
    assert numbered("diff", ["a", "b"]) == {"diff 1": "a", "diff 2": "b"}

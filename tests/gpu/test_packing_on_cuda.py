"""Packed rows on a GPU: no installed attention kernel mixes them."""

import pytest
import torch
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from qlora_cli.attention.choice import HOPPER
from qlora_cli.attention.flex import FLEX, register_flex
from qlora_cli.training.checks.packing_check import packing_fault
from tests.support.models.tiny_models import VOCABULARY_SIZE, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

register_flex()
KERNELS = [
    *("eager", "sdpa", FLEX),
    *(["flash_attention_2"] if is_flash_attn_2_available() else []),
    *(["flash_attention_3"] if is_flash_attn_3_available() and torch.cuda.get_device_capability() == HOPPER else []),
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "mixtral"])
def test_packed_rows_do_not_attend_to_each_other_in_bf16(family: str, kernel: str) -> None:
    device = torch.device("cuda")
    model = torch.nn.Module.to(tiny_model(family), device, torch.bfloat16)
    model.set_attn_implementation(kernel)
    assert packing_fault(model, num_tokens=VOCABULARY_SIZE, device=device, dtype=torch.bfloat16) is None

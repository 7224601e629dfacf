"""PyTorch's choice of a kernel for attention, by GPU, dtype, mask and heads."""

import pytest
import torch
from torch import nn

from qlora_cli.attention.sdpa_rules import choose_backend, representative_capability, stores_grouped_scores
from qlora_cli.settings.choices import SdpaBackend
from tests.support.models.tiny_models import tiny_model

T4, A100, RTX_3090, RTX_4090, H100, RTX_5090 = (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)
SMALL_SHARED_MEMORY = (RTX_3090, (8, 7), RTX_4090, RTX_5090, (12, 1))
HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
FLASH, EFFICIENT, MATH = SdpaBackend.FLASH, SdpaBackend.EFFICIENT, SdpaBackend.MATH


def heads(num_heads: int, width: int, dtype: torch.dtype, *, trains: bool = True) -> torch.Tensor:
    return torch.empty((2, num_heads, 96, width), dtype=dtype, device="meta", requires_grad=trains)


def chosen(
    capability: tuple[int, int],
    dtype: torch.dtype,
    *,
    kv_heads: int = 4,
    widths: tuple[int, int] = (64, 64),
    has_mask: bool = False,
    trains: bool = True,
    dropout: float = 0.0,
) -> SdpaBackend:
    """Return the choice for four query heads."""
    width, value_width = widths
    return choose_backend(
        heads(4, width, dtype, trains=trains),
        heads(kv_heads, width, dtype, trains=trains),
        heads(kv_heads, value_width, dtype, trains=trains),
        has_mask=has_mask,
        enable_gqa=kv_heads != 4,
        capability=capability,
        dropout=dropout,
    )


@pytest.mark.parametrize(
    ("capability", "dtype", "kv_heads", "widths", "has_mask", "expected"),
    [
        (T4, HALF, 4, (64, 64), False, EFFICIENT),
        (T4, HALF, 4, (64, 64), True, EFFICIENT),
        (T4, HALF, 2, (64, 64), False, MATH),  # grouped queries, which only flash and math support
        (T4, BF16, 4, (64, 64), False, MATH),
        (T4, FP32, 4, (64, 64), False, EFFICIENT),
        (A100, BF16, 4, (64, 64), False, FLASH),
        (A100, HALF, 2, (64, 64), False, FLASH),
        (A100, BF16, 4, (64, 64), True, EFFICIENT),
        (A100, BF16, 2, (64, 64), True, MATH),
        (A100, FP32, 4, (64, 64), False, EFFICIENT),
        (A100, FP32, 2, (64, 64), False, MATH),
        (H100, BF16, 2, (64, 64), False, FLASH),
        (A100, BF16, 4, (256, 256), False, FLASH),
        (A100, BF16, 4, (512, 512), False, EFFICIENT),
        (A100, BF16, 4, (192, 128), False, EFFICIENT),  # latent attention
        (A100, BF16, 4, (20, 20), False, FLASH),  # which pads them
        (A100, BF16, 4, (20, 20), True, MATH),  # rows that tensor cores can't load
        (A100, FP32, 4, (20, 20), True, EFFICIENT),
        (A100, FP32, 4, (18, 18), True, MATH),
        (T4, FP32, 4, (18, 18), True, EFFICIENT),
        (T4, HALF, 4, (20, 20), False, MATH),
    ],
)
def test_the_backend_is_that_chosen_by_pytorch(
    capability: tuple[int, int],
    dtype: torch.dtype,
    kv_heads: int,
    widths: tuple[int, int],
    has_mask: bool,
    expected: SdpaBackend,
) -> None:
    assert chosen(capability, dtype, kv_heads=kv_heads, widths=widths, has_mask=has_mask) == expected


@pytest.mark.parametrize("width", [192, 200, 208, 224, 232, 256])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_consumer_gpus_have_no_flash_attention_to_train_heads_of_193_to_224(width: int, dropout: float) -> None:
    is_trained = width == 192 or (width > 224 and dropout == 0)
    for capability in SMALL_SHARED_MEMORY:
        expected = FLASH if is_trained else EFFICIENT
        assert chosen(capability, BF16, widths=(width, width), dropout=dropout) == expected
        assert chosen(capability, BF16, widths=(width, width), dropout=dropout, trains=False) == FLASH
        with torch.no_grad():
            assert chosen(capability, BF16, widths=(width, width), dropout=dropout) == FLASH
        grouped = chosen(capability, BF16, widths=(width, width), dropout=dropout, kv_heads=2)
        assert grouped == (FLASH if is_trained else MATH)
    for capability in (A100, H100, (10, 0)):
        assert chosen(capability, BF16, widths=(width, width), dropout=dropout) == FLASH


class Layer(nn.Module):
    """What attention layers of transformers have."""

    def __init__(self, num_key_value_groups: int, head_dim: int, attention_dropout: float = 0.0) -> None:
        super().__init__()
        self.num_key_value_groups, self.head_dim = num_key_value_groups, head_dim
        self.attention_dropout = attention_dropout


@pytest.mark.parametrize("capability", [T4, (7, 0), A100, *SMALL_SHARED_MEMORY, H100, (10, 0)])
@pytest.mark.parametrize("dtype", [HALF, BF16, FP32])
def test_grouped_scores_are_stored_where_the_choice_for_such_heads_is_math(
    capability: tuple[int, int], dtype: torch.dtype
) -> None:
    for width in (64, 128, 192, 200, 224, 232, 256):
        for dropout in (0.0, 0.1):
            choice = chosen(capability, dtype, kv_heads=2, widths=(width, width), dropout=dropout)
            layers = nn.ModuleList([Layer(1, 64), Layer(2, width, dropout)])
            assert stores_grouped_scores(layers, dtype, capability) == (choice == MATH)
            assert not stores_grouped_scores(nn.ModuleList([Layer(1, width, dropout)]), dtype, capability)


def test_models_of_transformers_say_how_many_heads_share_keys_and_values() -> None:
    assert stores_grouped_scores(tiny_model("llama"), HALF, T4)
    assert not stores_grouped_scores(tiny_model("llama", num_key_value_heads=4), HALF, T4)
    assert not stores_grouped_scores(tiny_model("llama"), BF16, RTX_4090)
    assert stores_grouped_scores(tiny_model("llama", head_dim=200), BF16, RTX_4090)
    assert not stores_grouped_scores(tiny_model("llama", head_dim=200), BF16, A100)


@pytest.mark.parametrize("width", [64, 192, 200, 224, 256])
def test_a_capability_is_represented_by_one_with_the_same_choices(width: int) -> None:
    model = nn.ModuleList([Layer(2, width)])
    for capability in ((7, 0), T4, A100, *SMALL_SHARED_MEMORY, H100, (10, 0), (10, 3)):
        other = representative_capability(capability, model)
        for dtype in (HALF, FP32, *((BF16,) if capability >= A100 else ())):
            for kv_heads in (2, 4):
                for has_mask in (False, True):
                    for dropout in (0.0, 0.1):
                        choices = [
                            chosen(
                                one,
                                dtype,
                                kv_heads=kv_heads,
                                widths=(width, width),
                                has_mask=has_mask,
                                dropout=dropout,
                            )
                            for one in (capability, other)
                        ]
                        assert choices[0] == choices[1]
    assert representative_capability(RTX_4090, nn.ModuleList([Layer(2, 128)])) == A100

"""The bytes of real models from their published configs alone: on the meta device, no weight is read.

The closed form (QLoRA, arXiv 2305.14314, section 3) for n weights in 4 bit, in bytes:

    n/2 + n/64 + 4 n/(64 x 256)    with double quantization
    n/2 + 4 n/64                   without

In addition, each weight has a table of 16 levels, and with double quantization one of 256 levels and an offset.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from qlora_cli.adapters.adapter import attach_adapter
from qlora_cli.errors import ModelError
from qlora_cli.quantization.storage_plan import StoragePlan, build_on_meta, plan_layout
from qlora_cli.settings.choices import METHODS, Quantization
from qlora_cli.settings.models import LoraSettings, QuantizationSettings
from qlora_cli.units import GIB, MIB
from tests.support.models.tiny_models import tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # the latter is a label: nothing is put on it
LEVELS_BYTES = 16 * 4
NESTED_BYTES = 256 * 4 + 4


@dataclass(frozen=True, kw_only=True)
class Published:
    """A model as its config.json on the hub describes it, and its known size."""

    family: str
    config: Mapping[str, Any]
    num_parameters: int
    num_quantized: int  # parameters of linear layers and experts, without the head
    num_weights: int  # linear layers and fused expert weights

    @property
    def num_kept(self) -> int:
        return self.num_parameters - self.num_quantized


LLAMA_2_7B = Published(
    family="llama",
    config={
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    num_parameters=6_738_415_616,
    num_quantized=6_476_005_376,
    num_weights=32 * 7,
)
LLAMA_3_1_8B = Published(
    family="llama",
    config={
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    num_parameters=8_030_261_248,
    num_quantized=6_979_321_856,
    num_weights=32 * 7,
)
QWEN_2_5_7B = Published(
    family="qwen2",
    config={
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    num_parameters=7_615_616_512,
    num_quantized=6_525_288_448,
    num_weights=28 * 7,
)
MISTRAL_7B = Published(
    family="mistral",
    config={
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    num_parameters=7_241_732_096,
    num_quantized=6_979_321_856,
    num_weights=32 * 7,
)
GEMMA_2_9B = Published(
    family="gemma2",
    config={
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "vocab_size": 256000,
        "tie_word_embeddings": True,
    },
    num_parameters=9_241_705_984,
    num_quantized=8_323_596_288,
    num_weights=42 * 7,
)
QWEN_3_8B = Published(
    family="qwen3",
    config={
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    num_parameters=8_190_735_360,
    num_quantized=6_945_767_424,
    num_weights=36 * 7,
)
QWEN_3_30B_A3B = Published(
    family="qwen3_moe",
    config={
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    num_parameters=30_532_122_624,
    num_quantized=29_896_998_912,
    num_weights=48 * (4 + 2),
)
MODELS = {
    "Llama-2-7B": LLAMA_2_7B,
    "Llama-3.1-8B": LLAMA_3_1_8B,
    "Qwen2.5-7B": QWEN_2_5_7B,
    "Mistral-7B": MISTRAL_7B,
    "Gemma-2-9B": GEMMA_2_9B,
    "Qwen3-8B": QWEN_3_8B,
    "Qwen3-30B-A3B": QWEN_3_30B_A3B,
}


def shapes_of(published: Published) -> PreTrainedModel:
    return build_on_meta(AutoConfig.for_model(published.family, **published.config), torch.bfloat16)


def plan(model: PreTrainedModel, device: torch.device = CUDA, **settings: Any) -> StoragePlan:
    return plan_layout(model, QuantizationSettings(**settings), torch.bfloat16, device=device)


def closed_form(num_weights: int, *, double: bool = True) -> int:
    """Return the bytes of codes and constants; every weight has whole blocks of constants."""
    assert num_weights % (64 * 256) == 0
    constants = num_weights // 64 + 4 * num_weights // (64 * 256) if double else 4 * num_weights // 64
    return num_weights // 2 + constants


@pytest.fixture(scope="module", params=MODELS)
def published(request: pytest.FixtureRequest) -> Published:
    return MODELS[request.param]


@pytest.fixture(scope="module")
def shapes(published: Published) -> PreTrainedModel:
    return shapes_of(published)


def test_a_real_model_has_its_published_number_of_parameters(published: Published, shapes: PreTrainedModel) -> None:
    inventory = plan(shapes).inventory
    assert inventory.num_parameters == published.num_parameters
    assert inventory.num_quantized_parameters == published.num_quantized
    assert sum(entry.is_quantized for entry in inventory.entries) == published.num_weights
    assert {parameter.device.type for parameter in shapes.parameters()} == {"meta"}


@pytest.mark.parametrize("method", ["nf4", "fp4"])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_the_bytes_are_the_closed_form_plus_the_tables_of_each_weight(
    published: Published, shapes: PreTrainedModel, method: str, device: torch.device, double: bool
) -> None:
    inventory = plan(shapes, device, method=method, double_quant=double).inventory
    quantized = closed_form(published.num_quantized, double=double)
    tables = published.num_weights * (LEVELS_BYTES + (NESTED_BYTES if double else 0))
    assert inventory.quantized_weight_bytes == published.num_quantized // 2
    assert inventory.quantized_weight_bytes + inventory.quantization_constant_bytes == quantized + tables
    assert inventory.unquantized_bytes == 2 * published.num_kept + inventory.buffer_bytes
    assert inventory.total_bytes == quantized + tables + inventory.unquantized_bytes
    assert inventory.buffer_bytes < 4096  # of the rotary positions, in fp32
    without_tables = 8 * quantized / published.num_quantized
    assert without_tables == (4.126953125 if double else 4.5)


@pytest.mark.parametrize(
    ("name", "double", "quantized_mib", "with_rest_mib"),
    [
        ("Llama-2-7B", True, 3186.0, 3686.5),
        ("Llama-3.1-8B", True, 3433.6, 5438.1),
        ("Qwen2.5-7B", False, 3111.5 + 388.94, None),
    ],
)
def test_known_figures_come_out(name: str, double: bool, quantized_mib: float, with_rest_mib: float | None) -> None:
    published = MODELS[name]
    inventory = plan(shapes_of(published), double_quant=double).inventory
    tables = published.num_weights * (LEVELS_BYTES + (NESTED_BYTES if double else 0))
    quantized = inventory.quantized_weight_bytes + inventory.quantization_constant_bytes - tables
    assert quantized / MIB == pytest.approx(quantized_mib, abs=0.05)
    if with_rest_mib is not None:
        total = inventory.total_bytes - tables - inventory.buffer_bytes
        assert total / MIB == pytest.approx(with_rest_mib, abs=0.05)


def test_packed_codes_and_constants_of_qwen_2_5_7b_equal_those_measured_on_a_gpu() -> None:
    inventory = plan(shapes_of(QWEN_2_5_7B), double_quant=False).inventory
    assert inventory.quantized_weight_bytes / MIB == pytest.approx(3111.5, abs=0.05)
    # That figure counts the tables, which are an eightieth of a MiB.
    assert inventory.quantization_constant_bytes / MIB == pytest.approx(388.95, abs=0.005)


def test_in_fp32_llama_2_7b_takes_seven_times_the_bytes() -> None:
    inventory = plan(shapes_of(LLAMA_2_7B)).inventory
    assert inventory.float32_bytes == 4 * LLAMA_2_7B.num_parameters
    assert inventory.float32_bytes / GIB == pytest.approx(25.1, abs=0.05)
    assert inventory.float32_bytes / inventory.total_bytes == pytest.approx(7.0, abs=0.05)


def test_experts_that_cuda_kernels_cannot_count_are_refused_on_a_gpu() -> None:
    larger = {**QWEN_3_30B_A3B.config, "num_hidden_layers": 1, "num_experts": 512, "moe_intermediate_size": 1024}
    at_most = {**larger, "num_experts": 511}
    config = AutoConfig.for_model("qwen3_moe", **larger)  # 512 x 2,048 x 2,048 weights: 2^31
    model = build_on_meta(config, torch.bfloat16)
    with pytest.raises(
        ModelError, match=r"gate_up_proj holds 2,147,483,648 weights, .* count to 2,147,483,647"
    ) as caught:
        plan(model)
    assert "quantization.skip_modules=experts" in str(caught.value.hint)
    assert plan(model, skip_modules=("experts",)).experts == ()
    assert len(plan(model, CPU).experts) == 2
    assert len(plan(build_on_meta(AutoConfig.for_model("qwen3_moe", **at_most), torch.bfloat16)).experts) == 2


def test_experts_are_most_of_a_mixture_and_are_quantized_with_the_rest() -> None:
    model = shapes_of(QWEN_3_30B_A3B)
    quantized, in_16_bit = plan(model), plan(model, skip_modules=("experts",))
    num_expert_parameters = 48 * 128 * 3 * 2048 * 768
    assert len(quantized.experts) == 2 * 48
    assert in_16_bit.experts == ()
    assert quantized.inventory.total_bytes / GIB == pytest.approx(15.55, abs=0.005)
    assert in_16_bit.inventory.total_bytes / GIB == pytest.approx(55.62, abs=0.005)
    tables = 2 * 48 * (LEVELS_BYTES + NESTED_BYTES)
    saved = 2 * num_expert_parameters - closed_form(num_expert_parameters) - tables
    assert in_16_bit.inventory.total_bytes - quantized.inventory.total_bytes == saved
    kinds = {(entry.kind, entry.why_not) for entry in quantized.inventory.entries}
    assert ("routers", "router") in kinds
    assert ("experts", None) in kinds


@pytest.mark.parametrize(
    ("published", "num_trainable"),
    [(LLAMA_2_7B, 159_907_840), (LLAMA_3_1_8B, 167_772_160)],
    ids=["Llama-2-7B", "Llama-3.1-8B"],
)
def test_an_adapter_of_rank_64_on_all_linear_layers_has_the_parameters_of_the_paper(
    published: Published, num_trainable: int
) -> None:
    with torch.device("meta"):
        adapted, notes = attach_adapter(shapes_of(published), LoraSettings(rank=64, alpha=16))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == num_trainable
    assert len(trained) == 2 * published.num_weights
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert notes == ()


# ---- what each setting does to the bytes


def num_down_proj() -> int:
    return 32 * 4096 * 14336


N = LLAMA_3_1_8B.num_quantized
ROWS = 32 * (4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096)
REST = 2 * LLAMA_3_1_8B.num_kept
TABLES = 224 * (LEVELS_BYTES + NESTED_BYTES)
NF4 = closed_form(N) + TABLES + REST
DOWN_KEPT = 2 * num_down_proj() - closed_form(num_down_proj()) - 32 * (LEVELS_BYTES + NESTED_BYTES)
EXPECTED: Mapping[str, tuple[Mapping[str, Any], int]] = {
    "defaults": ({}, NF4),
    "method: fp4": ({"method": "fp4"}, NF4),
    "method: int8": ({"method": "int8"}, N + 4 * ROWS + REST),
    "method: none": ({"method": "none"}, 2 * N + REST),
    "double_quant": ({"double_quant": False}, closed_form(N, double=False) + 224 * LEVELS_BYTES + REST),
    "skip_modules": ({"skip_modules": ("down_proj",)}, NF4 + DOWN_KEPT),
    "skip_modules: by layer": ({"skip_modules": ("layers.0.mlp.down_proj",)}, NF4 + DOWN_KEPT // 32),
    "int8_has_fp16_weight": ({"method": "int8", "int8_has_fp16_weight": True}, 2 * N + REST),
    # How values are computed, the dtype that holds codes, and the device: no effect on bytes.
    "quant_storage": ({"quant_storage": "bf16"}, NF4),
    "compute_dtype": ({"compute_dtype": "fp32"}, NF4),
    "int8_threshold": ({"method": "int8", "int8_threshold": 0.0}, N + 4 * ROWS + REST),
    "int8_cpu_offload": ({"method": "int8", "int8_cpu_offload": True}, N + 4 * ROWS + REST),
}


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return shapes_of(LLAMA_3_1_8B)


@pytest.mark.parametrize("case", EXPECTED)
def test_a_setting_changes_the_bytes_as_documented(llama: PreTrainedModel, case: str) -> None:
    settings, expected = EXPECTED[case]
    inventory = plan(llama, **settings).inventory
    assert inventory.total_bytes - inventory.buffer_bytes == expected


def test_the_bytes_of_every_quantization_setting_are_tested() -> None:
    assert {case.partition(":")[0] for case in EXPECTED} - {"defaults"} == set(QuantizationSettings.model_fields)


@pytest.mark.parametrize(
    ("settings", "dtypes"),
    [
        ({}, {"uint8", "bfloat16"}),
        ({"quant_storage": "bf16"}, {"bfloat16"}),
        ({"quant_storage": "fp32"}, {"float32", "bfloat16"}),
        ({"method": "int8"}, {"int8", "bfloat16"}),
        ({"method": "none"}, {"bfloat16"}),
    ],
)
def test_bytes_are_counted_under_the_dtype_that_stores_codes(
    llama: PreTrainedModel, settings: Mapping[str, Any], dtypes: set[str]
) -> None:
    assert set(plan(llama, **settings).inventory.bytes_by_dtype()) == dtypes


@pytest.mark.parametrize("method", METHODS)
def test_at_most_one_unquantized_weight_is_in_memory_with_the_model(
    llama: PreTrainedModel, method: Quantization
) -> None:
    largest = 14336 * 4096
    # With double quantization, the constants are in fp32 at first.
    expected = {
        Quantization.NF4: 2 * largest + 4 * largest // 64,
        Quantization.FP4: 2 * largest + 4 * largest // 64,
        Quantization.INT8: 2 * largest,
        Quantization.NONE: 0,
    }
    assert plan(llama, method=method).transient_bytes == expected[method]
    assert plan(llama, method=method).transient_bytes < 2 * 128256 * 4096, "the embedding alone in 16 bit is larger"


@pytest.mark.parametrize("method", ["nf4", "none"])
def test_unquantized_experts_are_assembled_while_their_parts_are_in_memory(method: str) -> None:
    largest = 128 * 2 * 768 * 2048
    layout = plan(shapes_of(QWEN_3_30B_A3B), method=method, skip_modules=("experts",) if method == "nf4" else None)
    assert layout.transient_bytes == 2 * largest


def test_rows_that_end_within_a_block_stay_in_16_bit_on_a_cpu_and_not_on_a_gpu() -> None:
    model = build_on_meta(tiny_config("llama", intermediate_size=96), torch.bfloat16)
    down = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]  # rows of 96 weights
    on_cpu, on_gpu = plan(model, CPU), plan(model, CUDA)
    assert set(on_cpu.unquantized) - set(on_gpu.unquantized) == set(down)
    assert all("96" in on_cpu.unquantized[name] for name in down)
    # 64 x 96 weights are 96 blocks, of which one block of constants is left over.
    in_4_bit = 64 * 96 // 2 + 96 + 4 + LEVELS_BYTES + NESTED_BYTES
    assert on_cpu.inventory.total_bytes - on_gpu.inventory.total_bytes == 2 * (2 * 64 * 96 - in_4_bit)
    for method in ("int8", "none"):
        assert down[0] not in set(plan(model, CPU, method=method).unquantized) - set(
            plan(model, CUDA, method=method).unquantized
        )

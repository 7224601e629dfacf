"""What each GPU of the catalogue sustains: products, memory, copies, launches. Nothing here was measured by us; what
was measured on a machine is in its `rates_file`.

A card's own numbers are those of its data sheet: dense products of 16-bit values with fp32 sums, fp32 without tensor
cores, bandwidth, rated power. What a program reaches of them is a share by the kind of card (`Family`), and a few
numbers are the same for all. Each of those names its source, or is called a guess. Imports no torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """What cards of one kind reach of their data sheets.

    Attributes:
        product_share: Of the products, with the shapes of a decoder layer.
        dequantization_share: Of the bandwidth that other kernels reach, by those that dequantize 4-bit weights.
        host_copy_bytes: A second, between pinned host memory and the GPU.
    """

    product_share: float
    dequantization_share: float
    host_copy_bytes: float


# Products. Largest measured with any shape (Bekman, "Machine Learning Engineering", maximum achievable matmul FLOPS):
# A100 SXM 86 % of the data sheet, A100 PCIe 82 %, H100 SXM 80 %, GH200 83 %; a decoder's shapes and a sustained load
# reach some 5 to 15 points less (a guess). GeForce cards have half the rate of the same chip with fp32 sums, which
# their power allows to sustain (a guess), as that of an H20 does. A card of 75 W and less lowers its clock to about
# half (a guess).
# Dequantization. bitsandbytes 0.48 made its kernel 1.4 to 2.1 times faster on A100 and H100, 1.3 to 1.8 on a T4, and
# hardly faster on sm86 and sm89 for large weights (its pull request 1747): there bandwidth was the limit already. The
# share before it is that of the public rows on an A100, about 0.3 (`benchmarks/published_speed.py`).
# Copies: what PCI Express 3, 4 and 5 with 16 lanes carry, less a fifth (a guess; boards with 8 lanes have half).
TURING = Family(product_share=0.70, dequantization_share=0.60, host_copy_bytes=12e9)
LOW_POWER = Family(product_share=0.50, dequantization_share=0.90, host_copy_bytes=24e9)
LOW_POWER_TURING = Family(product_share=0.50, dequantization_share=0.60, host_copy_bytes=12e9)
GEFORCE = Family(product_share=0.92, dequantization_share=0.90, host_copy_bytes=24e9)
GEFORCE_TURING = Family(product_share=0.92, dequantization_share=0.60, host_copy_bytes=12e9)
GEFORCE_50 = Family(product_share=0.92, dequantization_share=0.90, host_copy_bytes=48e9)
WORKSTATION = Family(product_share=0.70, dequantization_share=0.90, host_copy_bytes=24e9)
WORKSTATION_50 = Family(product_share=0.70, dequantization_share=0.90, host_copy_bytes=48e9)
PASCAL = Family(product_share=0.80, dequantization_share=0.50, host_copy_bytes=12e9)
VOLTA = Family(product_share=0.75, dequantization_share=0.50, host_copy_bytes=12e9)
AMPERE = Family(product_share=0.80, dequantization_share=0.50, host_copy_bytes=24e9)
HOPPER = Family(product_share=0.66, dequantization_share=0.50, host_copy_bytes=48e9)
HOPPER_REDUCED = Family(product_share=0.90, dequantization_share=0.50, host_copy_bytes=48e9)

Row = tuple[str, float, float, float, int, Family]

# Name, TFLOP/s of 16-bit products, TFLOP/s in fp32, GB/s of memory, rated watts, kind.
ROWS: tuple[Row, ...] = (
    ("GTX 1080 Ti", 11.3, 11.3, 484, 250, PASCAL),
    ("RTX 2060 6GB", 25.8, 6.5, 336, 160, GEFORCE_TURING),
    ("RTX 2060 12GB", 28.7, 7.2, 336, 185, GEFORCE_TURING),
    ("RTX 2080 Ti", 53.8, 13.4, 616, 250, GEFORCE_TURING),
    ("RTX 3060 8GB", 25.5, 12.7, 240, 170, GEFORCE),
    ("RTX 3060 12GB", 25.5, 12.7, 360, 170, GEFORCE),
    ("RTX 3060 Ti", 32.4, 16.2, 448, 200, GEFORCE),
    ("RTX 3070", 40.6, 20.3, 448, 220, GEFORCE),
    ("RTX 3070 Ti", 43.5, 21.7, 608, 290, GEFORCE),
    ("RTX 3080 10GB", 59.5, 29.8, 760, 320, GEFORCE),
    ("RTX 3080 12GB", 61.3, 30.6, 912, 350, GEFORCE),
    ("RTX 3080 Ti", 68.2, 34.1, 912, 350, GEFORCE),
    ("RTX 3090", 71.0, 35.6, 936, 350, GEFORCE),
    ("RTX 3090 Ti", 80.0, 40.0, 1008, 450, GEFORCE),
    ("RTX 4060", 30.2, 15.1, 272, 115, GEFORCE),
    ("RTX 4060 Ti 8GB", 44.1, 22.1, 288, 160, GEFORCE),
    ("RTX 4060 Ti 16GB", 44.1, 22.1, 288, 165, GEFORCE),
    ("RTX 4070", 58.3, 29.1, 504, 200, GEFORCE),
    ("RTX 4070 Super", 70.9, 35.5, 504, 220, GEFORCE),
    ("RTX 4070 Ti", 80.2, 40.1, 504, 285, GEFORCE),
    ("RTX 4070 Ti Super", 88.2, 44.1, 672, 285, GEFORCE),
    ("RTX 4080", 97.5, 48.7, 717, 320, GEFORCE),
    ("RTX 4080 Super", 104.4, 52.2, 736, 320, GEFORCE),
    ("RTX 4090", 165.2, 82.6, 1008, 450, GEFORCE),
    ("RTX 5060", 38.4, 19.2, 448, 145, GEFORCE_50),
    ("RTX 5060 Ti 8GB", 47.4, 23.7, 448, 180, GEFORCE_50),
    ("RTX 5060 Ti 16GB", 47.4, 23.7, 448, 180, GEFORCE_50),
    ("RTX 5070", 61.7, 30.9, 672, 250, GEFORCE_50),
    ("RTX 5070 Ti", 87.9, 43.9, 896, 300, GEFORCE_50),
    ("RTX 5080", 112.6, 56.3, 960, 360, GEFORCE_50),
    ("RTX 5090", 209.5, 104.8, 1792, 575, GEFORCE_50),
    ("RTX A4000", 76.7, 19.2, 448, 140, WORKSTATION),
    ("RTX A4500", 94.6, 23.7, 640, 200, WORKSTATION),
    ("RTX A5000", 111.1, 27.8, 768, 230, WORKSTATION),
    ("RTX A6000", 154.8, 38.7, 768, 300, WORKSTATION),
    ("RTX 4000 Ada", 106.8, 26.7, 360, 130, WORKSTATION),
    ("RTX 4500 Ada", 158.5, 39.6, 432, 210, WORKSTATION),
    ("RTX 5000 Ada", 261.1, 65.3, 576, 250, WORKSTATION),
    ("RTX 6000 Ada", 364.2, 91.1, 960, 300, WORKSTATION),
    ("RTX PRO 6000 Blackwell", 503.8, 126.0, 1792, 600, WORKSTATION_50),
    ("GB10", 125.0, 31.0, 273, 140, WORKSTATION_50),
    ("Quadro RTX 8000", 130.5, 16.3, 672, 260, TURING),
    ("Titan RTX", 130.5, 16.3, 672, 280, TURING),
    ("P40", 11.8, 11.8, 346, 250, PASCAL),
    ("P100 16GB", 18.7, 9.3, 732, 250, PASCAL),
    ("V100 16GB", 125.0, 15.7, 900, 300, VOLTA),
    ("V100 32GB", 125.0, 15.7, 900, 300, VOLTA),
    ("T4", 65.0, 8.1, 320, 70, LOW_POWER_TURING),
    ("A2", 18.0, 4.5, 200, 60, LOW_POWER),
    ("A16", 17.9, 4.5, 200, 62, LOW_POWER),
    ("A10", 125.0, 31.2, 600, 150, WORKSTATION),
    ("A10G", 70.0, 35.0, 600, 300, WORKSTATION),
    ("A30", 165.0, 10.3, 933, 165, AMPERE),
    ("A40", 149.7, 37.4, 696, 300, WORKSTATION),
    ("L4", 121.0, 30.3, 300, 72, LOW_POWER),
    ("L20", 119.5, 59.8, 864, 275, WORKSTATION),
    ("L40", 181.0, 90.5, 864, 300, WORKSTATION),
    ("L40S", 362.0, 91.6, 864, 350, WORKSTATION),
    ("A100 40GB", 312.0, 19.5, 1555, 400, AMPERE),
    ("A100 80GB", 312.0, 19.5, 2039, 400, AMPERE),
    ("H100 PCIe", 756.0, 51.2, 2039, 350, HOPPER),
    ("H100 SXM", 989.4, 66.9, 3352, 700, HOPPER),
    ("H100 NVL", 835.0, 60.0, 3938, 400, HOPPER),
    ("H20", 148.0, 44.0, 4000, 400, HOPPER_REDUCED),
    ("GH200 96GB", 989.4, 66.9, 4000, 700, HOPPER),
    ("H200", 989.4, 66.9, 4800, 700, HOPPER),
    ("B200", 2250.0, 75.0, 8000, 1000, HOPPER),
    ("B300", 2250.0, 75.0, 8000, 1400, HOPPER),
)
# Of the bandwidth of a data sheet, by element-wise kernels on large tensors (copies reach 85 to 92 %).
BANDWIDTH_SHARE = 0.88
# Of the rate of products, by attention that stores no scores. FlashAttention-2 (arXiv 2307.08691, section 4.1) reaches
# 50 to 73 % of an A100's data sheet forward and up to 63 % backward, causal masks and short rows at the lower end.
ATTENTION_SHARE = 0.65
# Of the bandwidth, by the products of an adapter: a result of 16 columns has few tiles, so few multiprocessors read
# what it is computed from. A guess.
NARROW_SHARE = 0.5
FP32_SHARE = 0.80  # of products in fp32 without tensor cores: a guess
KERNEL_SECONDS = 2e-6  # the shortest kernel on a GPU: a guess
# Python, autograd and dispatch of one operation, as measured on a server's CPU core without a GPU.
DISPATCH_SECONDS = 11e-6


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device sustains, and its host.

    Attributes:
        flops: A second, in products of 16-bit values with fp32 sums.
        attention_flops: A second, in kernels of attention that store no scores.
        fp32_flops: A second, in products of fp32 values.
        num_bytes: A second, from and to the GPU's memory.
        dequantized_bytes: A second, read and written by kernels that dequantize.
        narrow_bytes: A second, read and written by products of an adapter.
        host_copy_bytes: A second, between pinned host memory and the GPU.
        kernel_seconds: The least that a kernel takes.
        dispatch_seconds: Of one host core, for one operation.
        num_sms: Multiprocessors, which compute the tiles of a product in turns; 1 for a CPU.
        watts: Rated power; 0 where it is not known.
        is_host: Whether the device is the host itself, which dispatches and computes in turns.
    """

    flops: float
    attention_flops: float
    fp32_flops: float
    num_bytes: float
    dequantized_bytes: float
    narrow_bytes: float
    host_copy_bytes: float
    kernel_seconds: float = KERNEL_SECONDS
    dispatch_seconds: float = DISPATCH_SECONDS
    num_sms: int
    watts: int
    is_host: bool = False


_OF_CARD = {row[0]: row for row in ROWS}


def rates_of(card: str, num_sms: int) -> Rates | None:
    """Return the rates of a card of the catalogue by its name there, from its data sheet; None for any other."""
    if card not in _OF_CARD:
        return None
    _, teraflops, fp32_teraflops, gigabytes, watts, family = _OF_CARD[card]
    flops, num_bytes = 1e12 * teraflops * family.product_share, 1e9 * gigabytes * BANDWIDTH_SHARE
    return Rates(
        flops=flops,
        attention_flops=flops * ATTENTION_SHARE,
        fp32_flops=1e12 * fp32_teraflops * FP32_SHARE,
        num_bytes=num_bytes,
        dequantized_bytes=num_bytes * family.dequantization_share,
        narrow_bytes=num_bytes * NARROW_SHARE,
        host_copy_bytes=family.host_copy_bytes,
        num_sms=num_sms,
        watts=watts,
    )

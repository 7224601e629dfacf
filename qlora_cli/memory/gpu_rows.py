"""The rows of the catalogue of GPUs: the memory that PyTorch sees, and the memory of a process outside PyTorch.

A marketing size is not what a program gets: error correction takes a sixteenth of the memory of GDDR6 boards where
it is on, the driver's firmware a few hundred MiB, and a process's CUDA context some more. The numbers are for Linux
with recent drivers (550 and later); older drivers leave some 100 MiB more, and Windows shows nearly all of the
marketing size.

The last column is the origin of a card's total:
    out-of-memory message: PyTorch's own, quoted in public issue trackers and logs, good to 0.01 GiB;
    device properties: `total_memory` as programs print it, good to 1 MiB;
    nvidia-smi: its total less what the nearest card of the architecture loses to the driver;
    older driver: device properties under an older driver less what such a card lost since.

The contexts are "in use" less "allocated" less "reserved but unallocated" in out-of-memory messages of single
processes, good to 20 MiB; `high` is the largest of them, leaving out runs over several GPUs, whose NCCL buffers
it would count. They grow with the SMs of an architecture. Without such a message, the estimate is the architecture's
MiB for each SM times the card's SMs, its `high` a guess, and the line says so. Compute
capabilities and SM counts are NVIDIA's published ones.
"""

from collections.abc import Mapping

OOM = "out-of-memory message"
PROPERTIES = "device properties"
SMI = "nvidia-smi"
OLDER = "older driver"

Row = tuple[str, int, int, tuple[int, int], int, int, int, str]

# Name, GB as sold, total MiB, compute capability, SMs, context MiB, high MiB, source of the total.
CONSUMER_ROWS: tuple[Row, ...] = (
    ("GTX 1080 Ti", 11, 11072, (6, 1), 28, 150, 200, OLDER),  # context by SMs
    ("RTX 2060 6GB", 6, 5704, (7, 5), 30, 90, 190, SMI),  # context by SMs
    ("RTX 2060 12GB", 12, 11848, (7, 5), 34, 100, 190, SMI),  # context by SMs
    ("RTX 2080 Ti", 11, 10825, (7, 5), 68, 188, 200, PROPERTIES),
    ("RTX 3060 8GB", 8, 7842, (8, 6), 28, 115, 250, SMI),  # context of the RTX 3060 12GB, the same chip
    ("RTX 3060 12GB", 12, 11908, (8, 6), 28, 115, 250, OOM),
    ("RTX 3060 Ti", 8, 7842, (8, 6), 38, 135, 220, SMI),  # context by SMs
    ("RTX 3070", 8, 7842, (8, 6), 46, 161, 200, PROPERTIES),
    ("RTX 3070 Ti", 8, 7842, (8, 6), 48, 170, 220, SMI),  # context by SMs
    ("RTX 3080 10GB", 10, 9872, (8, 6), 68, 260, 270, PROPERTIES),
    ("RTX 3080 12GB", 12, 11980, (8, 6), 70, 265, 280, OLDER),  # context by SMs
    ("RTX 3080 Ti", 12, 11980, (8, 6), 80, 305, 330, SMI),  # context by SMs
    ("RTX 3090", 24, 24125, (8, 6), 82, 315, 330, OOM),
    ("RTX 3090 Ti", 24, 24110, (8, 6), 84, 320, 340, PROPERTIES),  # context by SMs
    ("RTX 4060", 8, 7803, (8, 9), 24, 100, 250, PROPERTIES),  # context by SMs
    ("RTX 4060 Ti 8GB", 8, 7803, (8, 9), 34, 140, 260, SMI),  # context of the RTX 4060 Ti 16GB, the same chip
    ("RTX 4060 Ti 16GB", 16, 15923, (8, 9), 34, 140, 260, OOM),
    ("RTX 4070", 12, 11837, (8, 9), 46, 170, 250, OOM),  # context by SMs
    ("RTX 4070 Super", 12, 11837, (8, 9), 56, 205, 290, SMI),  # context by SMs
    ("RTX 4070 Ti", 12, 11837, (8, 9), 60, 220, 300, SMI),  # context by SMs
    ("RTX 4070 Ti Super", 16, 15939, (8, 9), 66, 245, 310, OLDER),  # context by SMs
    ("RTX 4080", 16, 15919, (8, 9), 76, 280, 360, OLDER),  # context by SMs
    ("RTX 4080 Super", 16, 15919, (8, 9), 80, 290, 370, SMI),  # context by SMs
    ("RTX 4090", 24, 24085, (8, 9), 128, 460, 580, OOM),
    ("RTX 5060", 8, 7700, (12, 0), 30, 100, 220, SMI),  # context by SMs
    ("RTX 5060 Ti 8GB", 8, 7700, (12, 0), 36, 120, 230, SMI),  # context of the RTX 5060 Ti 16GB, the same chip
    ("RTX 5060 Ti 16GB", 16, 15848, (12, 0), 36, 120, 230, PROPERTIES),  # context by SMs
    ("RTX 5070", 12, 11776, (12, 0), 48, 150, 280, OOM),  # context by SMs
    ("RTX 5070 Ti", 16, 15840, (12, 0), 70, 220, 350, SMI),
    ("RTX 5080", 16, 15840, (12, 0), 84, 250, 350, PROPERTIES),  # context by SMs
    ("RTX 5090", 32, 32112, (12, 0), 170, 490, 590, OOM),
)
# With error correction off, as these boards come; on, a 48 GB one shows 44.4 GiB.
WORKSTATION_ROWS: tuple[Row, ...] = (
    ("RTX A4000", 16, 15985, (8, 6), 48, 200, 215, OOM),
    ("RTX A4500", 20, 20040, (8, 6), 56, 215, 250, SMI),  # context by SMs
    ("RTX A5000", 24, 24114, (8, 6), 64, 240, 290, PROPERTIES),  # context by SMs
    ("RTX A6000", 48, 48538, (8, 6), 84, 320, 350, OOM),
    ("RTX 4000 Ada", 20, 20010, (8, 9), 48, 180, 260, PROPERTIES),  # context by SMs
    ("RTX 4500 Ada", 24, 24105, (8, 9), 60, 220, 300, SMI),  # context by SMs
    ("RTX 5000 Ada", 32, 32240, (8, 9), 100, 360, 450, SMI),  # context by SMs
    ("RTX 6000 Ada", 48, 48512, (8, 9), 142, 440, 520, OOM),
    ("RTX PRO 6000 Blackwell", 96, 97249, (12, 0), 188, 550, 700, OOM),
    ("GB10", 128, 124552, (12, 1), 48, 150, 280, PROPERTIES),  # context by SMs
    ("Quadro RTX 8000", 48, 48380, (7, 5), 72, 195, 250, PROPERTIES),
    ("Titan RTX", 24, 24020, (7, 5), 72, 195, 250, OLDER),  # context of the Quadro RTX 8000, the same chip
)
# With error correction on, as these boards come.
DATA_CENTRE_ROWS: tuple[Row, ...] = (
    ("P40", 24, 22817, (6, 1), 30, 160, 210, OLDER),  # context by SMs
    ("P100 16GB", 16, 16269, (6, 0), 56, 300, 330, PROPERTIES),
    ("V100 16GB", 16, 16144, (7, 0), 80, 390, 400, OOM),  # context of the V100 32GB
    ("V100 32GB", 32, 32494, (7, 0), 80, 390, 400, PROPERTIES),
    ("T4", 16, 14913, (7, 5), 40, 141, 160, PROPERTIES),
    ("A2", 16, 14940, (8, 6), 10, 90, 160, SMI),  # context by SMs and a floor of the smallest one seen
    ("A16", 16, 14940, (8, 6), 10, 90, 160, SMI),  # one of its four GPUs; context of the A2, the same chip
    ("A10", 24, 22589, (8, 6), 72, 290, 360, OOM),
    ("A10G", 24, 22589, (8, 6), 80, 330, 390, OOM),
    ("A30", 24, 24054, (8, 0), 56, 265, 450, OOM),  # context by SMs
    ("A40", 48, 45456, (8, 6), 84, 320, 420, SMI),  # context of the RTX A6000, the same chip
    ("L4", 24, 22559, (8, 9), 58, 255, 350, OOM),
    ("L20", 48, 45598, (8, 9), 92, 330, 450, OOM),  # context by SMs
    ("L40", 48, 45456, (8, 9), 142, 440, 520, SMI),  # context of the RTX 6000 Ada, the same chip
    ("L40S", 48, 45456, (8, 9), 142, 440, 520, OOM),  # context of the RTX 6000 Ada, the same chip
    ("A100 40GB", 40, 40438, (8, 0), 108, 500, 550, OOM),
    ("A100 80GB", 80, 81152, (8, 0), 108, 500, 550, OOM),
    ("H100 PCIe", 80, 81085, (9, 0), 114, 640, 780, SMI),  # context of the H100 SXM
    ("H100 SXM", 80, 81085, (9, 0), 132, 640, 780, OOM),
    ("H100 NVL", 94, 95334, (9, 0), 132, 640, 780, OOM),
    ("H20", 96, 97285, (9, 0), 78, 380, 640, PROPERTIES),  # context by SMs
    ("GH200 96GB", 96, 96768, (9, 0), 132, 600, 780, OOM),
    ("H200", 141, 143155, (9, 0), 132, 660, 780, OOM),
    ("B200", 180, 182630, (10, 0), 148, 710, 800, OOM),
    ("B300", 288, 274114, (10, 3), 148, 710, 800, OOM),  # context of the B200, with as many SMs
)
# Sizes that some cards also go by, in GB, with the one of the table: a B200 is sold with 180 and with 192 GB.
ALSO_SOLD_AS: Mapping[int, int] = {192: 180, 270: 288}
# What is known by another name: the same chip with less bandwidth between GPUs, or the machine around it.
ALIASES: Mapping[str, str] = {"a800": "a100", "h800": "h100", "dgxspark": "gb10"}
# What is known about a card's memory besides its size.
NOTES: Mapping[str, str] = {
    "GB10": "its memory is shared with the system: in public logs, 101 to 102 GiB are free for CUDA",
}
# The cards to name first, where there is room for a few.
COMMON = (
    *("RTX 2060 6GB", "RTX 4060", "RTX 3070", "RTX 5060", "RTX 3080 10GB", "RTX 2080 Ti"),
    *("RTX 3060 12GB", "RTX 4070", "RTX 5070", "T4", "RTX 4060 Ti 16GB", "RTX 4080", "RTX 5080", "RTX A4500"),
    *("RTX 4000 Ada", "RTX 3090", "RTX 4090", "L4", "A10G", "RTX 5090", "V100 32GB", "RTX 5000 Ada", "A100 40GB"),
    *("RTX A6000", "L40S", "A40", "A100 80GB", "H100 SXM", "H100 PCIe", "H100 NVL", "RTX PRO 6000 Blackwell"),
    *("GH200 96GB", "H20", "GB10", "H200", "B200", "B300"),
)

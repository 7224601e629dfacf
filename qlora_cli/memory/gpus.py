"""A catalogue of NVIDIA GPUs: the memory that PyTorch sees, and the memory of a training process outside PyTorch.

A marketing size is not what a program gets: error correction takes a sixteenth of the memory of GDDR6 boards where
it is on, the driver's firmware a few hundred MiB, and a process's CUDA context some more. The numbers are for Linux
with recent drivers (550 and later); older drivers leave some 100 MiB more, and Windows shows nearly all of the
marketing size.

`Gpu.source` is the origin of each card's total:
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

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from qlora_cli.errors import HardwareError, UsageError
from qlora_cli.units import GIB, MIB, format_bytes

CONSUMER, WORKSTATION, DATA_CENTRE = "consumer", "workstation", "data-centre"
THIS_MACHINE, AS_ASKED = "this machine", "as asked"

OOM = "out-of-memory message"
PROPERTIES = "device properties"
SMI = "nvidia-smi"
OLDER = "older driver"

UNIT_BYTES = {"mb": 10**6, "mib": MIB, "gb": 10**9, "gib": GIB}
SAME_MEMORY = 0.02  # cards of one name whose memory differs by less than this share count as one
SIZE_RATIOS = (0.90, 1.01)  # what PyTorch sees of a marketing size in GiB
# Words that do not distinguish one card from another.
IGNORED_WORDS = r"\b(nvidia|geforce|tesla|quadro|generation|blackwell|workstation|server|edition|hbm\w*)\b"

Row = tuple[str, int, tuple[int, int], int, int, int, str]

# Name, total MiB, compute capability, SMs, context MiB, high MiB, source of the total.
CONSUMER_ROWS: tuple[Row, ...] = (
    ("RTX 2060 12GB", 11848, (7, 5), 34, 100, 190, SMI),  # context by SMs
    ("RTX 2080 Ti", 10825, (7, 5), 68, 188, 200, PROPERTIES),
    ("RTX 3060 12GB", 11908, (8, 6), 28, 115, 250, OOM),
    ("RTX 3070", 7842, (8, 6), 46, 161, 200, PROPERTIES),
    ("RTX 3080 10GB", 9872, (8, 6), 68, 260, 270, PROPERTIES),
    ("RTX 3080 12GB", 11980, (8, 6), 70, 265, 280, OLDER),  # context by SMs
    ("RTX 3090", 24125, (8, 6), 82, 315, 330, OOM),
    ("RTX 3090 Ti", 24110, (8, 6), 84, 320, 340, PROPERTIES),  # context by SMs
    ("RTX 4060 Ti 16GB", 15923, (8, 9), 34, 140, 260, OOM),
    ("RTX 4070", 11837, (8, 9), 46, 170, 250, OOM),  # context by SMs
    ("RTX 4070 Ti Super", 15939, (8, 9), 66, 245, 310, OLDER),  # context by SMs
    ("RTX 4080", 15919, (8, 9), 76, 280, 360, OLDER),  # context by SMs
    ("RTX 4090", 24085, (8, 9), 128, 460, 580, OOM),
    ("RTX 5060 Ti 16GB", 15848, (12, 0), 36, 120, 230, PROPERTIES),  # context by SMs
    ("RTX 5070", 11776, (12, 0), 48, 150, 280, OOM),  # context by SMs
    ("RTX 5070 Ti", 15840, (12, 0), 70, 220, 350, SMI),
    ("RTX 5080", 15840, (12, 0), 84, 250, 350, PROPERTIES),  # context by SMs
    ("RTX 5090", 32112, (12, 0), 170, 490, 590, OOM),
)
# With error correction off, as these boards come; on, a 48 GB one shows 44.4 GiB.
WORKSTATION_ROWS: tuple[Row, ...] = (
    ("RTX A4000", 15985, (8, 6), 48, 200, 215, OOM),
    ("RTX A4500", 20040, (8, 6), 56, 215, 250, SMI),  # context by SMs
    ("RTX A5000", 24114, (8, 6), 64, 240, 290, PROPERTIES),  # context by SMs
    ("RTX A6000", 48538, (8, 6), 84, 320, 350, OOM),
    ("RTX 4000 Ada", 20010, (8, 9), 48, 180, 260, PROPERTIES),  # context by SMs
    ("RTX 5000 Ada", 32240, (8, 9), 100, 360, 450, SMI),  # context by SMs
    ("RTX 6000 Ada", 48512, (8, 9), 142, 440, 520, OOM),
    ("RTX PRO 6000 Blackwell", 97249, (12, 0), 188, 550, 700, OOM),
    ("Quadro RTX 8000", 48380, (7, 5), 72, 195, 250, PROPERTIES),
    ("Titan RTX", 24020, (7, 5), 72, 195, 250, OLDER),  # context of the Quadro RTX 8000, the same chip
)
# With error correction on, as these boards come.
DATA_CENTRE_ROWS: tuple[Row, ...] = (
    ("P100 16GB", 16269, (6, 0), 56, 300, 330, PROPERTIES),
    ("V100 16GB", 16144, (7, 0), 80, 390, 400, OOM),  # context of the V100 32GB
    ("V100 32GB", 32494, (7, 0), 80, 390, 400, PROPERTIES),
    ("T4", 14913, (7, 5), 40, 141, 160, PROPERTIES),
    ("A2", 14940, (8, 6), 10, 90, 160, SMI),  # context by SMs and a floor of the smallest one seen
    ("A10", 22589, (8, 6), 72, 290, 360, OOM),
    ("A10G", 22589, (8, 6), 80, 330, 390, OOM),
    ("A30", 24054, (8, 0), 56, 265, 450, OOM),  # context by SMs
    ("A40", 45456, (8, 6), 84, 320, 420, SMI),  # context of the RTX A6000, the same chip
    ("L4", 22559, (8, 9), 58, 255, 350, OOM),
    ("L40", 45456, (8, 9), 142, 440, 520, SMI),  # context of the RTX 6000 Ada, the same chip
    ("L40S", 45456, (8, 9), 142, 440, 520, OOM),  # context of the RTX 6000 Ada, the same chip
    ("A100 40GB", 40438, (8, 0), 108, 500, 550, OOM),
    ("A100 80GB", 81152, (8, 0), 108, 500, 550, OOM),
    ("H100 PCIe", 81085, (9, 0), 114, 640, 780, SMI),  # context of the H100 SXM
    ("H100 SXM", 81085, (9, 0), 132, 640, 780, OOM),
    ("H100 NVL", 95334, (9, 0), 132, 640, 780, OOM),
    ("GH200 96GB", 96768, (9, 0), 132, 600, 780, OOM),
    ("H200", 143155, (9, 0), 132, 660, 780, OOM),
    ("B200", 182630, (10, 0), 148, 710, 800, OOM),
)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU, as a training process on it sees it. `source` is the origin of `total_bytes`.

    `total_bytes` is PyTorch's `total_memory`. `context_bytes` is what a training process holds outside PyTorch's
    allocator, the CUDA context and the modules it loads; `context_high_bytes` the most seen. For a GPU `as asked`, and
    for one of this machine that is not in the catalogue, they are those of the card that `source` names.
    """

    name: str
    group: str
    total_bytes: int
    capability: tuple[int, int]
    num_sms: int
    context_bytes: int
    context_high_bytes: int
    source: str = ""

    @property
    def usable_bytes(self) -> int:
        """The bytes that are free before the first process: all of `total_bytes`.

        In the messages "in use" and "free" add up to the total, and an idle RTX 5090 of 32112 MiB had 32109 free:
        what the driver reserves is not in the total. A desktop's display does take from it, often 0.3 to 1 GiB.
        """
        return self.total_bytes


def _catalogue() -> tuple[Gpu, ...]:
    groups = ((CONSUMER, CONSUMER_ROWS), (WORKSTATION, WORKSTATION_ROWS), (DATA_CENTRE, DATA_CENTRE_ROWS))
    return tuple(
        Gpu(
            name=name,
            group=group,
            total_bytes=total * MIB,
            capability=capability,
            num_sms=num_sms,
            context_bytes=context * MIB,
            context_high_bytes=high * MIB,
            source=source,
        )
        for group, rows in groups
        for name, total, capability, num_sms, context, high, source in sorted(rows, key=lambda row: (row[1], row[0]))
    )


GPUS = _catalogue()


def find_gpu(text: str) -> Gpu:
    """Return the GPU that `text` names: a card, a size such as `24GiB` or `24GB`, or `auto` for this machine's.

    In a name, case, spaces, dashes and the brand do not matter: `4090`, `rtx4090`, `NVIDIA A100-SXM4-80GB`. A name
    shared by several cards is refused if their memory differs; otherwise it means the first. GiB are 1024³ bytes, GB
    10⁹.

    Raises:
        UsageError: no such GPU is known, several with different memory are, or a size has no unit.
        HardwareError: `auto` without a GPU here.
    """
    if text.strip().lower() == "auto":
        return _gpu_of_this_machine()
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?([gm]i?b)", text.strip().lower())
    if size:
        return _gpu_of_size(text, round(float(size[1]) * UNIT_BYTES[size[2]]))
    cards = _cards_named(text)
    if not cards:
        raise _unknown(text)
    if cards[-1].total_bytes > cards[0].total_bytes * (1 + SAME_MEMORY):
        names = ", ".join(card.name for card in cards)
        raise UsageError(f"{text!r} names GPUs of different memory: {names}", hint="Name one of them.")
    return cards[0]


def _cards_named(text: str) -> list[Gpu]:
    """Return the cards of this name in the order of the catalogue, fewest bytes first."""
    base, form, size = _parse(text)
    cards = [card for card in GPUS if _parse(card.name)[0] == base]
    # PyTorch's names of A100s and V100s include the form, too; the catalogue has it only where forms differ.
    cards = [card for card in cards if form and _parse(card.name)[1] == form] or cards
    low, high = SIZE_RATIOS
    return [card for card in cards if size is None or low <= card.total_bytes / (size * GIB) <= high]


def _parse(text: str) -> tuple[str, str | None, int | None]:
    """Split a name into the part that identifies the chip, the form of the board and the marketing size in GB."""
    text = re.sub(IGNORED_WORDS, "", re.sub(r"[\s_-]+", " ", text.lower()))
    size = re.search(r"(?<= )\d{1,3} ?(g|gb|gib)?(?= |$)", text)
    if size:
        text = text[: size.start()] + text[size.end() :]
    form = re.search(r"pcie|sxm", text)
    base = re.sub(r"pcie|sxm\d?|[^a-z\d]", "", text).removeprefix("rtx")
    return base, form[0] if form else None, int(re.sub(r"\D", "", size[0])) if size else None


def _unknown(text: str) -> UsageError:
    bare = re.fullmatch(r"(\d{1,3}(?:\.\d+)?) ?g?", text.strip().lower())
    if bare:
        hint = f"Write {bare[1]}GiB (1024³ bytes) or {bare[1]}GB (10⁹)."
        return UsageError(f"{text.strip()!r} is a size without a unit", hint=hint)
    bases: dict[str, list[str]] = {}
    for card in GPUS:
        bases.setdefault(_parse(card.name)[0], []).append(card.name)
    near = [name for base in get_close_matches(_parse(text)[0], list(bases), n=2, cutoff=0.7) for name in bases[base]]
    nearest = f"; the nearest known are {', '.join(near)}" if near else ""
    hint = f"Give a size such as 24GiB, auto, or one of {', '.join(card.name for card in GPUS)}."
    return UsageError(f"no GPU {text!r} is known{nearest}", hint=hint)


def _gpu_of_size(text: str, total_bytes: int) -> Gpu:
    if not total_bytes:
        raise UsageError(f"{text!r} is no memory at all", hint="Give a size such as 24GiB.")
    card = min(GPUS, key=lambda card: abs(card.total_bytes - total_bytes))
    return Gpu(
        name=format_bytes(total_bytes),
        group=AS_ASKED,
        total_bytes=total_bytes,
        capability=card.capability,
        num_sms=card.num_sms,
        context_bytes=card.context_bytes,
        context_high_bytes=card.context_high_bytes,
        source=f"as asked; the rest as of the {card.name}, the nearest in memory",
    )


def _gpu_of_this_machine() -> Gpu:
    import torch  # a second or more to import, and a catalogue card needs none of it

    if not torch.cuda.is_available():
        raise HardwareError(
            "no NVIDIA GPU is visible to PyTorch",
            hint="Check nvidia-smi and that torch is a CUDA build, or name the GPU to predict for: 'RTX 4090'.",
        )
    seen = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = (int(seen.major), int(seen.minor))
    card = _nearest_card(seen.name, capability, seen.multi_processor_count, seen.total_memory)
    return Gpu(
        name=re.sub(r"^NVIDIA (GeForce )?", "", seen.name),
        group=THIS_MACHINE,
        total_bytes=int(seen.total_memory),
        capability=capability,
        num_sms=int(seen.multi_processor_count),
        context_bytes=card.context_bytes,
        context_high_bytes=card.context_high_bytes,
        source=f"device properties; context as of the {card.name}",
    )


def _nearest_card(name: str, capability: tuple[int, int], num_sms: int, total_bytes: int) -> Gpu:
    """Return the card whose context fits best: one with this name, else with the nearest architecture and SM count."""

    def distance(card: Gpu) -> tuple[int, int, int]:
        generations = abs(card.capability[0] - capability[0]) * 10 + abs(card.capability[1] - capability[1])
        return generations, abs(card.num_sms - num_sms), abs(card.total_bytes - total_bytes)

    named: Sequence[Gpu] = _cards_named(name)
    return min(named or GPUS, key=distance)

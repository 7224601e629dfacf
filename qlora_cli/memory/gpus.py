"""The GPUs that a run can be predicted for: cards of the catalogue, classes of cards, sizes, this machine's.

A class is all cards that are sold with as many GB. Its GPU has the least memory and the largest CUDA context of them,
so that what fits on it fits on each.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

import psutil

from qlora_cli.errors import HardwareError, UsageError
from qlora_cli.hardware.processor import processor_name
from qlora_cli.memory.gpu_rows import (
    ALIASES,
    ALSO_SOLD_AS,
    COMMON,
    CONSUMER_ROWS,
    DATA_CENTRE_ROWS,
    NOTES,
    WORKSTATION_ROWS,
)
from qlora_cli.units import GIB, MIB, counted, format_bytes

CONSUMER, WORKSTATION, DATA_CENTRE = "consumer", "workstation", "data-centre"
THIS_MACHINE, AS_ASKED = "this machine", "as asked"

UNIT_BYTES = {"mb": 10**6, "mib": MIB, "gib": GIB}
# Of the host, by a process on a CPU without tensors: Python, libraries, the trainer, buffers of threads.
PROCESS_BYTES, PROCESS_HIGH_BYTES = 640 * MIB, 1024 * MIB
SAME_MEMORY = 0.02  # cards of one name whose memory differs by less than this share count as one
OLDEST_WITH_KERNELS = (7, 5)  # of PyPI's PyTorch, which is built for CUDA 13
AMPERE = (8, 0)
NUM_NEAREST = 5
NUM_EXAMPLES = 3
NEAR_NUMBER = 0.05  # the share by which the numbers of two names may differ and still count as near
# Words that do not distinguish one card from another.
IGNORED_WORDS = r"\b(nvidia|geforce|tesla|quadro|generation|blackwell|workstation|server|edition|hbm\w*)\b"
AMD = r"\b(amd|radeon|instinct|mi\d{2,3}[a-z]?|rx ?\d{4}\w*)\b"
TIMES = r"[x\u00d7*]"
LISTS = ("list", "all", "help", "?")
LIST_HINT = "--gpu list names all cards."


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU, as a training process on it sees it. `source` is the origin of `total_bytes`.

    `total_bytes` is PyTorch's `total_memory`. `context_bytes` is what a training process holds outside PyTorch's
    allocator, the CUDA context and the modules it loads; `context_high_bytes` the most seen. For a GPU `as asked`, and
    for one of this machine that is not in the catalogue, they are those of the card that `source` names.

    Attributes:
        card: Its name in the catalogue; empty if it is not there.
        is_host: Whether it is this machine's CPU, and its memory that of the host.
        size_gb: What it is sold with, in GB; 0 for a size and for this machine's GPU.
        cards: For a class, the names of its cards, the most common first.
        note: What else a prediction for it takes for granted, in a sentence without its subject.
    """

    name: str
    group: str
    total_bytes: int
    capability: tuple[int, int]
    num_sms: int
    context_bytes: int
    context_high_bytes: int
    source: str = ""
    size_gb: int = 0
    cards: tuple[str, ...] = ()
    note: str = ""
    card: str = ""
    is_host: bool = False

    @property
    def usable_bytes(self) -> int:
        """The bytes that are free before the first process: all of `total_bytes`.

        In the messages "in use" and "free" add up to the total, and an idle RTX 5090 of 32112 MiB had 32109 free:
        what the driver reserves is not in the total. A desktop's display does take from it, often 0.3 to 1 GiB.
        """
        return self.total_bytes

    @property
    def measured_as(self) -> str:
        """The name under which its rates are stored."""
        return self.card or self.name

    @property
    def has_kernels(self) -> bool:
        """Whether PyPI's PyTorch has kernels for it."""
        return self.capability >= OLDEST_WITH_KERNELS


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
            size_gb=size_gb,
            note=NOTES.get(name, "") if capability >= OLDEST_WITH_KERNELS else _without_kernels(capability),
            card=name,
        )
        for group, rows in groups
        for name, size_gb, total, capability, num_sms, context, high, source in sorted(
            rows, key=lambda row: (row[2], row[0])
        )
    )


def _without_kernels(capability: tuple[int, int]) -> str:
    major, minor = capability
    return f"PyPI's PyTorch has no kernels for compute capability {major}.{minor}: install a build for CUDA 12"


GPUS = _catalogue()


def find_gpu(text: str) -> Gpu:
    """Return the GPU that `text` names: a card, a class such as `24GB`, a size such as `24GiB`, `auto`, or `cpu`.

    In a name, case, spaces, dashes and the brand do not matter: `4090`, `rtx4090`, `NVIDIA A100-SXM4-80GB`. A name
    shared by several cards is refused if their memory differs; otherwise it means the first. `auto` is the GPU of this
    machine, `cpu` its CPU. GiB are 1024³ bytes.

    Raises:
        UsageError: no such GPU or class is known, several cards with different memory are, or a size has no unit.
        HardwareError: `auto` without a GPU here.
    """
    asked = text.strip().lower()
    if asked == "auto":
        return _gpu_of_this_machine()
    if asked == "cpu":
        return this_cpu()
    if size := re.fullmatch(r"(\d+(?:\.\d+)?) ?gb", asked):
        return _gpu_of_class(size[1])
    if size := re.fullmatch(r"(\d+(?:\.\d+)?) ?(mi?b|gib)", asked):
        return _gpu_of_size(text, round(float(size[1]) * UNIT_BYTES[size[2]]))
    cards = _cards_named(text)
    if not cards:
        raise _unknown(text.strip())
    if cards[-1].total_bytes > cards[0].total_bytes * (1 + SAME_MEMORY):
        names = ", ".join(card.name for card in cards)
        raise UsageError(f"{text!r} names GPUs of different memory: {names}", hint="Name one of them.")
    return cards[0]


def within_budget(gpu: Gpu, budget_bytes: int | None) -> Gpu:
    """Return the GPU as seen by a run that may take `budget_bytes` of it: all if None, or if it has no more."""
    if budget_bytes is None or budget_bytes >= gpu.total_bytes:
        return gpu
    return replace(gpu, total_bytes=budget_bytes)


def classes(oldest: tuple[int, int] = OLDEST_WITH_KERNELS) -> Iterator[Gpu]:
    """Yield the GPU of each class, by GB, of the cards with the compute capability `oldest` and later ones."""
    for size_gb in sorted({card.size_gb for card in GPUS if card.capability >= oldest}):
        yield _class_of([card for card in GPUS if card.size_gb == size_gb and card.capability >= oldest])


def _class_of(cards: Sequence[Gpu]) -> Gpu:
    """Return the GPU that stands for all of some cards that are sold with as many GB."""
    size_gb = cards[0].size_gb
    smallest = min(cards, key=lambda card: card.total_bytes)
    names = tuple(card.name for card in sorted(cards, key=_rarity))
    older = [card.name for card in cards if card.capability < AMPERE <= smallest.capability]
    note = f"kernels are those of the {smallest.name}" + (
        f"; older ones ({', '.join(older)}) may take more" if older else ""
    )
    return Gpu(
        name=f"{size_gb} GB card",
        group=AS_ASKED,
        total_bytes=smallest.total_bytes,
        capability=smallest.capability,
        num_sms=smallest.num_sms,
        context_bytes=max(card.context_bytes for card in cards),
        context_high_bytes=max(card.context_high_bytes for card in cards),
        source=f"the least memory and the largest CUDA context of {', '.join(names)}",
        size_gb=size_gb,
        cards=names,
        note=note if len(cards) > 1 else smallest.note,
    )


def examples(names: Sequence[str]) -> str:
    """Return the first few names, and dots for those that are left out: `RTX 3090, RTX 4090, L4, ...`."""
    return ", ".join([*names[:NUM_EXAMPLES], *(["..."] if len(names) > NUM_EXAMPLES else [])])


def _rarity(card: Gpu) -> int:
    return COMMON.index(card.name) if card.name in COMMON else len(COMMON)


def _gpu_of_class(number: str) -> Gpu:
    by_size = {gpu.size_gb: gpu for gpu in classes()}
    asked = float(number)
    size_gb = ALSO_SOLD_AS.get(int(asked), int(asked))
    if asked.is_integer() and size_gb in by_size:
        return by_size[size_gb]
    below, above = [size for size in by_size if size < asked], [size for size in by_size if size > asked]
    near = [by_size[size] for size in (*below[-1:], *above[:1])]
    described = " and ".join(f"{gpu.name}s ({examples(gpu.cards)})" for gpu in near)
    sizes = " or ".join(f"{gpu.size_gb}GB" for gpu in near)
    hint = f"Give --gpu {sizes}, or exactly {number}·1024³ bytes: {number}GiB."
    raise UsageError(f"no card is sold with {number} GB; there are {described}", hint=hint)


def _cards_named(text: str) -> list[Gpu]:
    """Return the cards of this name in the order of the catalogue, fewest bytes first."""
    base, form, size = _parse(text)
    cards = [card for card in GPUS if _parse(card.name)[0] == base]
    # PyTorch's names of A100s and V100s include the form, too; the catalogue has it only where forms differ.
    cards = [card for card in cards if form and _parse(card.name)[1] == form] or cards
    return [card for card in cards if size is None or card.size_gb == ALSO_SOLD_AS.get(size, size)]


def _parse(text: str) -> tuple[str, str | None, int | None]:
    """Split a name into the part that identifies the chip, the form of the board and the marketing size in GB."""
    text = re.sub(IGNORED_WORDS, "", re.sub(r"[\s_-]+", " ", text.lower()))
    size = re.search(r"(?<= )\d{1,3} ?(g|gb|gib)?(?= |$)", text)
    if size:
        text = text[: size.start()] + text[size.end() :]
    form = re.search(r"pcie|sxm", text)
    base = re.sub(r"pcie|sxm\d?|[^a-z\d]", "", text).removeprefix("rtx").removeprefix("gtx")
    return ALIASES.get(base, base), form[0] if form else None, int(re.sub(r"\D", "", size[0])) if size else None


def _unknown(text: str) -> UsageError:
    """Return the error for a name that no card has, with a hint for what people mean by it."""
    if text.lower() in LISTS:
        by_size = (f"{gpu.name}s: {', '.join(gpu.cards)}" for gpu in classes())
        older = ", ".join(card.name for card in GPUS if not card.has_kernels)
        hint = f"{'; '.join(by_size)}; too old for PyPI's PyTorch: {older}."
        return UsageError(f"{text!r} names no GPU", hint=hint)
    if bare := re.fullmatch(r"(\d{1,3}(?:\.\d+)?) ?g?", text.lower()):
        hint = (
            f"Write {bare[1]}GB for a card that is sold with as much, {bare[1]}GiB for exactly {bare[1]}·1024³ bytes."
        )
        return UsageError(f"{text!r} is a size without a unit", hint=hint)
    if one := one_of_several(text):
        number, card = one
        hint = f"Each GPU holds all of the model, and they share each step: --gpu '{card}' --num-gpus {number}."
        return UsageError(f"{text!r} names several GPUs", hint=hint)
    if re.search(AMD, text.lower()):
        hint = "AMD GPUs are not predicted: kernels and contexts are those of NVIDIA. Give a size such as 192GiB."
        return UsageError(f"{text!r} is an AMD GPU", hint=hint)
    if "laptop" in text.lower() or "mobile" in text.lower():
        hint = (
            "Laptop cards have less memory than desktop ones of that number: give what they are sold with, as in 8GB."
        )
        return UsageError(f"no laptop GPU {text!r} is known", hint=hint)
    nearest = ", ".join(nearest_cards(text))
    hint = f"Give one of them, what a card is sold with (24GB), an exact size (24GiB), or auto. {LIST_HINT}"
    return UsageError(f"no GPU {text!r} is known; the nearest known are {nearest}", hint=hint)


def nearest_cards(text: str) -> list[str]:
    """Return the names most like `text`, by spelling and by number, the nearest first; of equals, the most common."""
    base = _parse(text)[0] or re.sub(r"\W|[rg]tx", "", text.lower())

    def likeness(card: Gpu) -> float:
        other = _parse(card.name)[0]
        return SequenceMatcher(None, base, other).ratio() + _nearness(_number(base), _number(other))

    return [card.name for card in sorted(GPUS, key=lambda card: (-likeness(card), _rarity(card)))[:NUM_NEAREST]]


def _number(base: str) -> int:
    digits = re.search(r"\d+", base)
    return int(digits[0]) if digits else 0


def _nearness(one: int, other: int) -> float:
    """Return a half for equal numbers of cards, 0 for those that differ by `NEAR_NUMBER` and more."""
    largest = max(one, other)
    return max(0.0, 1 - abs(one - other) / (NEAR_NUMBER * largest)) / 2 if one and other else 0.0


def one_of_several(text: str) -> tuple[int, str] | None:
    """Return number and card of `2x24GB`, `2x RTX 4090` or `RTX 4090 x2`; None for anything else."""
    match = re.fullmatch(rf"(?P<number>\d{{1,3}}) ?{TIMES} ?(?P<name>.+)", text, re.IGNORECASE)
    match = match or re.fullmatch(rf"(?P<name>.+?) ?(?<=[\s\d]){TIMES} ?(?P<number>\d{{1,2}})", text, re.IGNORECASE)
    return (int(match["number"]), match["name"]) if match else None


def _gpu_of_size(text: str, total_bytes: int) -> Gpu:
    if not total_bytes:
        raise UsageError(f"{text!r} is no memory at all", hint="Give a size such as 24GiB.")
    card = min(
        (card for card in GPUS if card.has_kernels),
        key=lambda card: (abs(card.total_bytes - total_bytes), _rarity(card)),
    )
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
        card=card.name if card in _cards_named(seen.name) else "",
    )


def _nearest_card(name: str, capability: tuple[int, int], num_sms: int, total_bytes: int) -> Gpu:
    """Return the card whose context fits best: one with this name, else with the nearest architecture and SM count."""

    def distance(card: Gpu) -> tuple[int, int, int]:
        generations = abs(card.capability[0] - capability[0]) * 10 + abs(card.capability[1] - capability[1])
        return generations, abs(card.num_sms - num_sms), abs(card.total_bytes - total_bytes)

    named: Sequence[Gpu] = _cards_named(name)
    return min(named or GPUS, key=distance)


def this_cpu() -> Gpu:
    """Return this machine's CPU with the threads that PyTorch uses, as a device whose steps are predicted.

    A step is traced with the kernels of a GPU, whose operations are those of a CPU.
    """
    import torch

    return Gpu(
        name=f"{processor_name()}, {counted(torch.get_num_threads(), 'thread')}",
        group=THIS_MACHINE,
        total_bytes=psutil.virtual_memory().total,
        capability=AMPERE,
        num_sms=1,
        context_bytes=PROCESS_BYTES,
        context_high_bytes=PROCESS_HIGH_BYTES,
        source="the memory of the host",
        is_host=True,
    )

"""The answer of `qlora inspect-memory` in a sentence for each GPU that was named, or one for the whole catalogue."""

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_cli.memory.fitting.suggestions import NO, YES
from qlora_cli.memory.gpus import GPUS, Gpu, examples
from qlora_cli.memory.host_run import HOW_TO_MEASURE
from qlora_cli.memory.prediction import CardClass, GpuFit, MemoryReport, RunFigures, Sharding
from qlora_cli.memory.report_parts import SpareMemory
from qlora_cli.settings.choices import Checkpointing
from qlora_cli.timing.roofline import HOST, MEMORY
from qlora_cli.units import GIB, format_count

RECOMPUTED = {
    Checkpointing.OFF: "nothing is recomputed",
    Checkpointing.SELECTIVE: "each layer is recomputed in part",
    Checkpointing.ON: "each layer is recomputed",
    Checkpointing.OFFLOAD: "each layer is recomputed, and what it starts from waits in host memory",
}
LINKS = {"pcie": "PCIe", "nvlink": "NVLink", "infiniband": "InfiniBand", "ethernet": "Ethernet"}
LINK = "link"  # what limits a step
AN = ("8", "11", "A", "F", "H", "L", "M", "N", "R", "S", "X")  # what is spoken with a vowel first: eight, RTX, L4
NEXT = "--details shows what it is for, each phase, and what is taken for granted."


def verdict_lines(report: MemoryReport, gpus: Sequence[Gpu]) -> list[str]:
    """Return the answer: a sentence for each of the named `gpus`; without any, one for the catalogue."""
    if not gpus:
        return [_over_catalogue(report)]
    first, *others = zip(report.fits, gpus, strict=True)
    several = _several(report)
    lines = [_on_first(report, *first), *(f"{_on(fit, gpu, several)}{_time(fit)}." for fit, gpu in others)]
    lines += _of_several(report)
    if gpus[0].is_host and report.predicted.step_seconds is None:
        lines.append(f"How long it takes is not known: {HOW_TO_MEASURE}.")
    if (unquantized := report.unquantized) is not None:
        takes, at_most = _gib(unquantized.process_bytes), _gib(unquantized.process_high_bytes)
        recomputed, seconds = RECOMPUTED[Checkpointing(unquantized.gradient_checkpointing)], unquantized.step_seconds
        time = "" if seconds is None else f", about {_rounded(seconds)} s a step"
        lines.append(
            f"In 16 bit it fits, too, without the error of quantization: with --quant none it takes {takes} GiB, at "
            f"most {at_most}; {recomputed}{time}."
        )
    if report.spare is not None:
        lines.append(_of_budget(report.spare))
    if (longer := report.longer_rows) is not None and longer.value is not None:
        at_most = "" if longer.limited_by in (MEMORY, None) else f", {longer.limited_by}"
        more = "" if longer.limited_by is not None else "; --solve max-length finds the longest"
        lines.append(f"Rows of up to {longer.value:,} tokens fit, too{at_most}{_recomputed_for(report)}{more}.")
    if (larger := report.larger_model) is not None:
        rows = f"rows of up to {larger.max_length_tokens:,} tokens"
        lines.append(
            f"A larger model fits, too: --preset {larger.preset}, {format_count(larger.num_parameters)} parameters in "
            f"nf4 and {rows}, takes at most {_gib(larger.process_high_bytes)} GiB."
        )
    if report.fitting_model is not None:
        model = report.fitting_model
        takes, at_most = _gib(model.process_bytes), _gib(model.process_high_bytes)
        named = f"{model.model} ({format_count(model.num_parameters)} parameters)"
        lines.append(f"The largest model of the catalogue that fits there: {named}, {takes} GiB, at most {at_most}.")
    return lines


def _of_budget(spare: SpareMemory) -> str:
    """Return what is left of a budget for layers in 16 bit."""
    budget, layers = f"The budget of {_gib(spare.budget_bytes)} GiB", f"all {spare.num_layers:,} quantized layers"
    if not spare.spare_bytes:
        return f"{budget} leaves nothing for layers in 16 bit."
    if spare.spare_bytes >= spare.extra_bytes:
        return f"{budget} suffices for {layers} in 16 bit: use --quant none."
    left, more = significant(spare.spare_bytes / GIB), significant(spare.extra_bytes / GIB)
    return (
        f"{budget} leaves {left} GiB for layers in 16 bit; {layers} would take {more} more. train measures which cost "
        f"predictions most, and takes {_gib(spare.process_bytes)} GiB with these."
    )


def _of_several(report: MemoryReport) -> list[str]:
    """Return what is of each of several GPUs and what of all, and what they send each other."""
    if (number := report.settings.get("num-gpus")) is None:
        return []
    lines = [f"The time is that of all {number} together."]
    if report.host.num_processes > 1 and report.predicted.host_bytes is not None:
        of_host = f"The {report.host.num_processes} processes of a host take {_gib(report.predicted.host_bytes)} GiB"
        lines.append(f"{of_host} of its memory.")
    if (sharding := report.sharding) is not None:
        received, seconds = _gib(sharding.received_bytes_per_step), significant(sharding.receiving_seconds)
        holds, copies = f"each holds {_gib(sharding.shard_bytes)} GiB of it", ""
        if sharding.copied_bytes_per_step:
            holds, copies = f"{holds} in host memory", f"copies {_copied(sharding)} to the GPU, "
        are = " together" if copies else ""
        hides = f"{are} more than" if report.predicted.limited_by == LINK else f"{are} hidden by"
        lines.append(
            f"The base is sharded: {holds}, {copies}and receives {received} GiB a step over {LINKS[sharding.link]}, "
            f"{seconds} s,{hides} the computation."
        )
    return lines


def _copied(sharding: Sharding) -> str:
    """Return what a GPU copies from the host in a step, and how long that takes."""
    seconds = sharding.copying_seconds
    took = "" if seconds is None else f", {significant(seconds)} s,"
    return f"{_gib(sharding.copied_bytes_per_step)} GiB a step{took}"


def _recomputed_for(report: MemoryReport) -> str:
    """Return what longer rows need that those of the run do not, with a comma before it."""
    is_planned = report.plan is not None and report.plan.chosen.gradient_checkpointing != Checkpointing.ON
    return f", if {RECOMPUTED[Checkpointing.ON]}" if is_planned else ""


def described_class(cards: CardClass) -> str:
    """Return a class with a few of its cards: `a 10 GB card (RTX 3080 10GB)`."""
    return f"{with_article(f'{cards.size_gb} GB card')} ({examples(cards.gpus)})"


def with_article(name: str) -> str:
    """Return the name of a card with its article: `an RTX 4090`, `a T4`."""
    is_acronym = not name[1:2].islower()
    return f"{'an' if name.startswith(AN) and is_acronym else 'a'} {name}"


def significant(value: float) -> str:
    """Return a number with two digits after the point, or two that count if they are few."""
    return f"{value:,.2f}" if value >= 0.1 else f"{value:.2g}"


def _over_catalogue(report: MemoryReport) -> str:
    own, smallest = report.predicted, report.smallest_class
    takes = f"Takes {_gib(own.process_bytes)} GiB, at most {_gib(own.process_high_bytes)}"
    if smallest is None:
        several = "" if "num-gpus" in report.settings else "; --gpu 4x80GB asks about several"
        return f"{takes}: fits on no class of cards in the catalogue{several}."
    usable = {gpu.name: gpu.usable_bytes for gpu in GPUS if gpu.has_kernels}
    lacking = [fit.gpu for fit in report.fits if fit.fits != YES and usable.get(fit.gpu, 0) > smallest.usable_bytes]
    but = f" but {examples(lacking)}" if lacking else ""
    return f"{takes}: fits {described_class(smallest)} and larger ones{but}."


def _on_first(report: MemoryReport, fit: GpuFit, gpu: Gpu) -> str:
    """Return the answer for the first GPU, with what would make the run fit."""
    several = _several(report)
    if fit.fits == YES:
        return f"{_on(fit, gpu, several)}{_time_of_run(report) or _time(fit, report.predicted)}."
    change = next((change for change in report.suggestions if change.fits != NO), None)
    if change is not None:
        surely = "fits" if change.fits == YES else "may fit"
        return f"{_on(fit, gpu, several)}; it {surely} with {change.flags}."
    if fit.fits != NO:
        return f"{_on(fit, gpu, several)}."
    weights = report.components.weights_bytes
    if weights + report.components.context_bytes > fit.usable_bytes:
        of_usable = f"{_gib(weights)} of {_gib(fit.usable_bytes)} GiB{several.each}"
        return f"Cannot fit {_named(gpu, several)}: the weights alone take {of_usable}."
    least = min([fit.process_bytes, *(change.process_bytes for change in report.suggestions)])
    of_usable = f"{_gib(least)} of {_gib(fit.usable_bytes)} GiB{several.each}"
    return f"Cannot fit {_named(gpu, several)}: takes {of_usable} with every change there is."


def _time_of_run(report: MemoryReport) -> str:
    """Return the time of the whole run with a comma before it; empty if its rows are not known."""
    figures, data = report.predicted, report.data
    low, seconds, high = figures.run_seconds_low, figures.run_seconds, figures.run_seconds_high
    if low is None or seconds is None or high is None:
        return ""
    of_what = f"{figures.num_steps:,} steps" if data is None else f"your {data.num_train_rows:,} rows"
    return f", {_about(figures.run_limited_by)} {_spoken(seconds)} ({_off(low, seconds, high)}) for {of_what}"


def _time(fit: GpuFit, figures: RunFigures | None = None) -> str:
    """Return the time of a step with a comma before it, and its error band if there are `figures` for this GPU."""
    if fit.fits != YES or fit.step_seconds is None:
        return ""
    step = f"{_rounded(fit.step_seconds)} s a step"
    if figures is None or figures.step_seconds_low is None or figures.step_seconds_high is None:
        return f", about {step}"
    off = _off(figures.step_seconds_low, fit.step_seconds, figures.step_seconds_high)
    return f", {_about(figures.limited_by)} {step} ({off})"


def _about(limited_by: str | None) -> str:
    """Return how sure a time is: where the host limits it, its speed is not known."""
    return "at least" if limited_by == HOST else "about"


def _off(low: float, value: float, high: float) -> str:
    """Return the larger side of an error band, as a share of the value."""
    return f"±{max(high / value - 1, 1 - low / value):.0%}"


def _spoken(seconds: float) -> str:
    """Return a duration as one says it: `39 s`, `12 min`, `2 h 10 min`."""
    if seconds < 100:
        return f"{_rounded(seconds)} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min"


def _rounded(seconds: float) -> str:
    """Return seconds with the two digits that count: `0.65`, `7.3`, `75`."""
    if seconds >= 10:
        return f"{seconds:,.0f}"
    return f"{seconds:.1f}" if seconds >= 1 else f"{seconds:.2g}"


@dataclass(frozen=True, kw_only=True)
class _Several:
    """How many GPUs of a kind a run is on, and whether they share its base."""

    number: int
    is_sharded: bool

    @property
    def each(self) -> str:
        """A word after a figure that is of each of several."""
        return " each" if self.number > 1 else ""


def _several(report: MemoryReport) -> _Several:
    return _Several(number=int(report.settings.get("num-gpus", "1")), is_sharded=report.sharding is not None)


def _on(fit: GpuFit, gpu: Gpu, several: _Several) -> str:
    """Return the answer for one kind of GPU, without its full stop."""
    at_most, usable = _apart(fit.process_high_bytes, fit.usable_bytes)
    named, figures = (
        _named(gpu, several),
        f"{_gib(fit.process_bytes)} GiB{several.each}, at most {at_most}, of {usable}",
    )
    if fit.fits == YES:
        return f"Fits {named}: {figures}; {RECOMPUTED[Checkpointing(fit.gradient_checkpointing)]}"
    if fit.fits == NO:
        return f"Does not fit {named}: {figures}, short of {_gib(-fit.margin_bytes)}"
    return f"May not fit {named}: {figures}"


def _named(gpu: Gpu, several: _Several) -> str:
    """Return the GPUs of a run: `an RTX 4090`, `2 RTX 4090, sharded`, `a 24 GB card (RTX 3090, L4)`."""
    if gpu.is_host:
        return f"this machine's CPU ({gpu.name})"
    cards = f" ({examples(gpu.cards)})" if gpu.cards else ""
    of_size = gpu.name.endswith("GiB")
    if several.number == 1:
        return f"a GPU of {gpu.name}" if of_size else f"{with_article(gpu.name)}{cards}"
    name = f"GPUs of {gpu.name}" if of_size else f"{gpu.name}{'s' if gpu.cards else ''}{cards}"
    return f"{several.number} {name}{', sharded' if several.is_sharded else ''}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}"


def _apart(one: int, other: int) -> tuple[str, str]:
    """Return two sizes in GiB with as many decimals, one or two, as tell them apart."""
    digits = 1 if _gib(one) != _gib(other) else 2
    return f"{one / GIB:.{digits}f}", f"{other / GIB:.{digits}f}"

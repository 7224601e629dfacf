"""What a prediction takes for granted, and what it leaves out, in sentences. Imports no torch."""

from qlora_cli.memory.costs.step_time import rates_on
from qlora_cli.memory.fitting.plan import is_open
from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.request import MemoryRequest
from qlora_cli.settings.choices import Attention
from qlora_cli.settings.models import EstimateSettings, TrainingSettings
from qlora_cli.units import counted

TRACED_AS_FLASH = (Attention.FLEX_ATTENTION, Attention.FLASH_ATTENTION_3)


def assumptions(
    request: MemoryRequest, settings: EstimateSettings, gpu: Gpu, incapable: tuple[str, ...], max_checkpoints: int
) -> list[str]:
    """Return sentences on what the prediction takes for granted."""
    sentences = []
    if not request.gpus:
        sentences.append(f"no GPU was named: kernels, speed and CUDA context are those of the {gpu.name}")
    if is_open(settings) and (request.solve or request.sweep or not request.gpus):
        sentences.append(
            "gradient checkpointing is chosen by the GPU; where its choice is not shown, figures are for on, which "
            "takes the least without the host's memory"
        )
    if incapable:
        sentences.append(f"not judged, since they can't compute with these settings: {', '.join(incapable)}")
    sentences.append(_assumed_rows(settings, is_read=request.rows is not None))
    if request.prediction.rows is not None or request.rows is not None:
        sentences += _assumptions_of_run(request, settings, gpu)
    sentences.append(f"the disk holds {counted(max_checkpoints, 'checkpoint')} and the one being written")
    if not request.is_on_host:
        sentences.append("what Python, libraries and the driver take from the host is a guess: 2 GiB, 1 to 4")
    sentences.append("every token is trained; a loss on answers only takes a little less")
    if settings.model.new_tokens:
        sentences.append("new tokens have rows in the embedding already")
    if (known := rates_on(gpu)) is not None and known.note:
        sentences.append(known.note)
    sentences += untraced(settings.training, settings.model.attention)
    sentences += [f"{gpu.name}: {gpu.note}" for gpu in request.gpus if gpu.note]
    if not request.is_on_host:
        sentences.append(
            "one GPU, nothing else on it, PyTorch's allocator with its defaults (no PYTORCH_CUDA_ALLOC_CONF)"
        )
    return sentences


def untraced(training: TrainingSettings, attention: Attention) -> list[str]:
    """Return sentences about what a prediction for these settings leaves out."""
    sentences = []
    if attention in TRACED_AS_FLASH:
        sentences.append(
            f"{attention.value} is not traced itself, but as flash attention, which saves the same activations"
        )
    if training.torch_compile:
        sentences.append(
            "torch.compile is not traced: the figures are those of the run without it; compiled code saves other "
            "activations, usually fewer, and may take more while it compiles"
        )
    if training.use_liger_kernel:
        sentences.append(
            "Liger's kernels are not traced: the figures are those of the run without them; with them it usually "
            "takes less"
        )
    if training.num_gpus > 1:
        holds = "a shard of the base and all of the adapter" if training.shards_base else "all of the model"
        sentences.append(
            f"each of {training.num_gpus} GPUs holds {holds}: memory is that of one, tokens a second, cost and energy "
            "those of all; how fast they send each other weights and gradients is a guess by --link, and host memory "
            "is that of all processes of a host, which has up to 8"
        )
        communicators = "two communicators" if training.shards_base else "a communicator"
        sentences.append(
            f"NCCL's buffers are not counted: a run has {communicators}, each of which took 0.5 to 0.7 GiB on A100s "
            "with NVLink in a public measurement (nccl#964), and takes less over PCIe, with fewer channels"
        )
    if training.shards_base:
        sentences.append("weights of the next layer arrive while one computes, so that the longer of both counts")
    if training.full_determinism:
        sentences.append("of full_determinism the smaller workspaces of cuBLAS are counted, other kernels are not")
    return sentences


def _assumptions_of_run(request: MemoryRequest, settings: EstimateSettings, gpu: Gpu) -> list[str]:
    """Return sentences on what the prediction of a whole run takes for granted."""
    if rates_on(gpu) is None and gpu.is_host:
        return []
    if rates_on(gpu) is None:
        return [f"no time is predicted for {gpu.name}: name a card with --gpu"]
    if request.rows is not None:
        of_rows = "the time of the run is that of the micro-batches of its data"
    else:
        are = "are packed without gaps" if settings.data.packing else "all have the mean length"
        of_rows = f"for the time of the run, rows {are}"
    return [f"{of_rows}; loading, evaluations and checkpoints come in addition"]


def _assumed_rows(settings: EstimateSettings, *, is_read: bool) -> str:
    """Return a sentence on the lengths of rows; `is_read`: the longest of a data set is known."""
    length, tokens = settings.data.max_length, settings.training.micro_batch_tokens
    own = "the longest row of the data" if is_read else "every row"
    if settings.training.objective.has_pairs:
        joined = "padded" if tokens is None else f"joined in micro-batches of up to {max(tokens, 2 * length):,}"
        return f"both answers of a pair have {length:,} tokens with their prompt, and sequences are {joined}"
    if settings.data.packing:
        return "rows are packed to the full length, and attention does not cross from one to another"
    if tokens is not None:
        return (
            f"the rows of a step, of up to {length:,} tokens, fill micro-batches of {tokens:,}, and attention does "
            "not cross from one to another"
        )
    if settings.training.micro_batch_size > 1:
        return f"each micro-batch has a row of {length:,} tokens and shorter, padded ones"
    return f"{own} has {length:,} tokens"

"""Check on the model to train that packed rows do not attend to each other."""

from collections.abc import Sequence

import torch
from peft import PeftModel

from qlora_cli.data.feeding.collate import make_collator
from qlora_cli.errors import ModelError
from qlora_cli.loading.loader import LoadedModel

LENGTHS = (6, 9, 5)
# The largest difference of logits from rounding, relative to the largest logit, by compute dtype. The logits of a
# row that attends to another differ by some tenths.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 4e-2}


def check_packing(loaded: LoadedModel, model: PeftModel) -> None:
    """Check that packed rows give the same logits as alone.

    Raises:
        ModelError: they do not, so this model can't be trained on packed rows with this attention kernel.
    """
    fault = packing_fault_of(loaded, model)
    if fault is not None:
        raise ModelError(
            f"{loaded.source.name} can't be trained on packed rows with {loaded.attention} attention: {fault}",
            hint="Leave --packing out; --sampling group_by_length saves padding too.",
        )


def packing_fault_of(loaded: LoadedModel, model: PeftModel) -> str | None:
    """Return why rows can't be joined for a model that is to be trained; None if they can."""
    return packing_fault(model, num_tokens=len(loaded.tokenizer), device=loaded.device, dtype=loaded.dtype.torch_dtype)


@torch.no_grad()
def packing_fault(model: torch.nn.Module, *, num_tokens: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why rows can't be packed for `model`; None if none of three random ones attends to another."""
    was_training = model.training
    model.eval()
    try:
        rows, others = (_random_rows(num_tokens, seed) for seed in (0, 1))
        together = _logits(model, rows, device, dtype)
        after_another = _logits(model, [others[0], *rows[1:]], device, dtype)
        alone = torch.cat([_logits(model, [row], device, dtype) for row in rows])
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:  # from models without support for packing
        return f"it fails on them ({type(error).__name__}: {error})"
    finally:
        model.train(was_training)
    tolerance = TOLERANCE[dtype] * float(alone.abs().max())
    first = LENGTHS[0]
    if (moved := _distance(together[first:], after_another[first:])) > tolerance:
        return f"a row attends to the one packed before it (its logits differ by {moved:.2g})"
    if (moved := _distance(together, alone)) > tolerance:
        return f"a packed row gives other logits than alone (they differ by {moved:.2g})"
    return None


def _random_rows(num_tokens: int, seed: int) -> list[list[int]]:
    chance = torch.Generator().manual_seed(seed)
    return [torch.randint(num_tokens, (length,), generator=chance).tolist() for length in LENGTHS]


def _logits(
    model: torch.nn.Module, rows: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Return the logits of packed rows, `(tokens, vocabulary)`, with the collator of training."""
    ids = [token for row in rows for token in row]
    batch = make_collator(0, packing=True)(
        [{"input_ids": ids, "labels": ids, "seq_lengths": [len(row) for row in rows]}]
    )
    inputs = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name != "labels"
    }
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits[0].float()


def _distance(logits: torch.Tensor, others: torch.Tensor) -> float:
    return float((logits - others).abs().max())

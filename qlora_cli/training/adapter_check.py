"""After training: is there something in the adapter, and does what was written give the logits of what was trained?"""

import re
from collections.abc import Collection
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file

from qlora_cli.adapters.initialization import as_trained
from qlora_cli.adapters.state import adapter_state, difference, restore_adapter
from qlora_cli.errors import TrainingError
from qlora_cli.model_files.adapter_files import ADAPTER_WEIGHTS

OUTPUT = re.compile(r"\.lora_(embedding_)?B\b")
MOST_NORM = 1e6  # of one matrix: far above what trains, far below what overflows
NUM_PROBES = 16


def check_trained(model: PeftModel, never_used: Collection[str]) -> None:
    """Check that every target has learnt something, and that its weights are sane.

    `never_used` are layers that the model did not call, such as experts that no token was sent to.

    Raises:
        TrainingError: the adapter is empty, in whole or in part, or holds what is no weight.
    """
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        norm = float(parameter.float().norm())
        if not norm < MOST_NORM:  # nor is NaN
            raise TrainingError(
                f"the adapter is broken: the norm of {name} is {norm}",
                hint="Lower --learning-rate. The checkpoints are kept.",
            )
    outputs = {name: parameter for name, parameter in trained.items() if OUTPUT.search(name)}
    empty = [name for name, parameter in outputs.items() if not parameter.any()]
    unexpected = [name for name in empty if name.partition(".lora_")[0] not in never_used]
    if empty and (unexpected or len(empty) == len(outputs)):
        named = (unexpected or empty)[0]
        raise TrainingError(
            f"the adapter is empty: {len(empty)} of {len(outputs)} targets have learnt nothing, such as {named}",
            hint="Raise --learning-rate or --max-steps. The checkpoints are kept.",
        )


@torch.no_grad()
def check_saved(model: PeftModel, directory: Path, num_tokens: int) -> None:
    """Check that the adapter that was saved gives the logits of the one in memory, which it replaces meanwhile.

    `num_tokens` is the size of the vocabulary.

    Raises:
        TrainingError: it does not.
    """
    saved = as_trained(model, load_file(directory / ADAPTER_WEIGHTS))
    if wrong := difference(adapter_state(model), saved):
        raise TrainingError(f"{directory} does not hold what was trained: {wrong}", hint="The checkpoints are kept.")
    was_training = model.training
    model.eval()
    before = _logits(model, num_tokens)
    noise = _distance(before, _logits(model, num_tokens))  # of kernels that add in no fixed order
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.zero_()
    restore_adapter(model, directory)
    moved = _distance(before, _logits(model, num_tokens))
    model.train(was_training)
    if not moved <= noise:
        raise TrainingError(
            f"the adapter in {directory} gives other logits than the trained model: they move by {moved:.2g}",
            hint="The checkpoints are kept.",
        )


def _distance(logits: torch.Tensor, others: torch.Tensor) -> float:
    """Return how far logits are apart; infinite ones that are equal are not."""
    return float(torch.where(logits == others, 0.0, (logits - others).abs()).max())


def _logits(model: PeftModel, num_tokens: int) -> torch.Tensor:
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(num_tokens, (1, NUM_PROBES), generator=chance).to(model.device)
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits.float()

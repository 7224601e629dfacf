"""LoRA+ (arXiv 2402.12354): a higher learning rate for the B matrices of an adapter, with any optimizer."""

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import nn
from torch.optim import Optimizer

from qlora_cli.memory.replaying.optimizer_step import is_lora_b


def scale_b_learning_rate(optimizer: Optimizer, model: nn.Module, ratio: float) -> None:
    """Move the B matrices of `model` into their own groups, with `ratio` times the learning rate of the others.

    The optimizer must not have made a step. New groups inherit everything else, including weight decay, so that
    this works with every optimizer, and a schedule scales all groups alike. PEFT's `create_loraplus_optimizer` does
    not: it drops weight decay, trains DoRA's magnitudes and biases at the high rate, too, and supports the 8-bit
    optimizers only by names that they do not have in transformers.
    """
    assert not optimizer.state, "groups can't change once there is state, which is saved in their order"
    faster = {id(parameter) for name, parameter in model.named_parameters() if is_lora_b(name)}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in faster]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in faster]
            optimizer.add_param_group({**group, "params": moved, "lr": group["lr"] * ratio})


def restore_paging(optimizer: Optimizer) -> None:
    """Move the states of a paged optimizer back into unified memory, after they were loaded from a checkpoint.

    bitsandbytes 0.50 loads them into ordinary GPU tensors, which are not paged.
    """
    if not isinstance(optimizer, Optimizer8bit) or not optimizer.is_paged:
        return
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            if isinstance(loaded := state.get(name), torch.Tensor) and parameter.device.type == "cuda":
                state[name] = optimizer.get_state_buffer(parameter, dtype=loaded.dtype)
                state[name].copy_(loaded)

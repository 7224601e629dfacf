"""TRL's trainer, with the adapter kept in fp32 and checkpoints that are complete or absent."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINING_ARGS_NAME
from trl import SFTTrainer

from qlora_cli.events import CheckpointSaved, Reporter
from qlora_cli.files import publish_directory
from qlora_cli.loading.adapter import save_adapter
from qlora_cli.training.order import RowOrder
from qlora_cli.training.run_directory import RunDirectory


class QloraTrainer(SFTTrainer):
    """`SFTTrainer` on a PEFT model whose adapter is already attached."""

    def __init__(
        self,
        *,
        directory: RunDirectory,
        reporter: Reporter,
        max_checkpoints: int,
        order: RowOrder | None,
        model: Any,
        **kwargs: Any,
    ) -> None:
        # TRL rounds the adapter of a quantized model to bf16 by replacing `.data`; the fp32 values, which
        # small updates need, are put back before an optimizer exists.
        full_precision = {
            name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        self._order = order  # None for rows that are streamed, which come as they come
        super().__init__(model=model, **kwargs)
        for name, parameter in model.named_parameters():
            if name in full_precision:
                parameter.data = full_precision[name]
        self._directory = directory
        self._reporter = reporter
        self._max_checkpoints = max_checkpoints

    def _get_train_sampler(self, train_dataset: Any = None) -> RowOrder | None:  # noqa: ARG002 - as in transformers
        return self._order

    def _get_output_dir(self, trial: Any) -> str:  # noqa: ARG002 - the signature is that of transformers
        return str(self._directory.checkpoints / ".saving")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the adapter and the tokenizer to `output_dir`."""
        assert output_dir is not None
        save_adapter(self.model, Path(output_dir), state_dict)
        self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, Path(output_dir) / TRAINING_ARGS_NAME)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write `checkpoints/step-N` aside, then move it there; delete the oldest beyond the limit."""
        # TRL's own override only adds a model card to the output directory.
        super(SFTTrainer, self)._save_checkpoint(model, trial)
        step = self.state.global_step
        staging = Path(self._get_output_dir(trial))
        target = self._directory.checkpoints / f"step-{step}"
        publish_directory(staging / f"checkpoint-{step}", target)
        shutil.rmtree(staging)
        for old in self._directory.list_checkpoints()[: -self._max_checkpoints]:
            shutil.rmtree(old)
        self._reporter.report(CheckpointSaved(step=step, path=target))

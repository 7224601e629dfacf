"""One attempt at a run: the trainer and its callbacks, from the first step or from a checkpoint."""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peft import PeftModel
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from qlora_cli.adapters.state import restore_adapter
from qlora_cli.adapters.writer import save_trained_adapter
from qlora_cli.answering.answerer import Answerer
from qlora_cli.errors import ModelError, TrainingError
from qlora_cli.events import (
    Noted,
    PhaseStarted,
    Reporter,
    TrainingEnded,
    TrainingResumed,
    TrainingStarted,
)
from qlora_cli.hardware.counters import (
    is_out_of_memory,
    peak_device_allocated_bytes,
    peak_device_reserved_bytes,
    peak_host_bytes,
    reset_device_peak,
)
from qlora_cli.loss.label_loss import LabelLoss
from qlora_cli.model_files.construction import is_ours, reason_of
from qlora_cli.ranks.group import ALONE, ProcessGroup
from qlora_cli.runs.adapter_health import AdapterHealth
from qlora_cli.runs.checkpoints import CheckpointStore, damage_of
from qlora_cli.runs.checksums import checksums_of
from qlora_cli.runs.directory import ADAPTER, RunDirectory
from qlora_cli.runs.forgetting import Forgetting
from qlora_cli.runs.record import read_record, write_record
from qlora_cli.runs.run_result import PeakMemory, TrainResult
from qlora_cli.settings.choices import Attention, Checkpointing, TrainingLoss
from qlora_cli.training.arguments import training_arguments
from qlora_cli.training.batches import BatchCollator, Batches, StepCollator, largest_held_out
from qlora_cli.training.callbacks.early_stop import EarlyStopCallback
from qlora_cli.training.callbacks.heap_trimming import HeapTrimming
from qlora_cli.training.callbacks.reporting import ReportingCallback
from qlora_cli.training.callbacks.sample_callback import SampleCallback
from qlora_cli.training.callbacks.step_guard import StepGuard
from qlora_cli.training.callbacks.step_timer import StepTimer
from qlora_cli.training.callbacks.stop import StopCallback, StoppedError, StopSignal
from qlora_cli.training.checks.adapter_check import check_saved, check_trained
from qlora_cli.training.compiled_layers import CompiledLayers
from qlora_cli.training.data_order import RowOrder
from qlora_cli.training.loss_model import Autocast, LossModel
from qlora_cli.training.outcome.adapter_card import TrainedSteps, write_card
from qlora_cli.training.outcome.measured_adapter import measure_adapter
from qlora_cli.training.outcome.measured_forgetting import measure_forgetting
from qlora_cli.training.preferences.label_batches import LabelCollator
from qlora_cli.training.preferences.label_model import LabelModel
from qlora_cli.training.preferences.pair_batches import PairCollator
from qlora_cli.training.preferences.pair_model import PairModel
from qlora_cli.training.rehearsal import Rehearsal, RehearsalCallback
from qlora_cli.training.resuming.loop_state import Progress
from qlora_cli.training.run_plan import PreparedRun
from qlora_cli.training.trainer import QloraTrainer
from qlora_cli.writing import move_aside, write_directory

# What libraries raise for invalid settings; a device that fails or runs out of memory raises a RuntimeError.
REFUSALS = (ValueError, TypeError, KeyError, AttributeError, NotImplementedError)


class Session:
    """One attempt to train a prepared run by the processes of `group`; `trainer` is TRL's trainer."""

    def __init__(
        self,
        prepared: PreparedRun,
        directory: RunDirectory,
        reporter: Reporter,
        stop: StopSignal,
        trackers: Sequence[TrainerCallback] = (),
        group: ProcessGroup = ALONE,
    ) -> None:
        self._prepared = prepared
        self.group = group
        self._directory = directory
        self._reporter = reporter
        self._stop = stop
        loading_seconds = time.monotonic() - prepared.started
        self._timer = StepTimer(
            prepared.forecast if group.is_first else None, computes_here=prepared.loaded.device.type == "cpu"
        )
        self._reporting = ReportingCallback(
            reporter, prepared.loaded.device, self._timer, loading_seconds=loading_seconds
        )
        self.store = CheckpointStore(
            directory.checkpoints,
            prepared.settings.output.max_checkpoints,
            prepared.plan.checkpoint_bytes,
            directory.metrics_file,
        )
        self._samples: SampleCallback | None = None
        settings, training = prepared.settings, prepared.settings.training
        joins_rows = settings.data.packing or training.micro_batch_tokens is not None
        # The compiler reads no values, and would have to be taught the type of the copies.
        is_compiled = training.torch_compile or Attention(prepared.loaded.attention).is_compiled
        self._collate = self._collator(packing=joins_rows, keeps_copies=not is_compiled)
        self._collate_step = (
            StepCollator(self._collate, training, group.rank, has_blanks=training.shards_base)
            if training.divides_steps
            else self._collate
        )
        self._restored_step: int | None = None
        self._guard = StepGuard(prepared.settings.training, self._batches().name_rows, reporter)
        self.trainer = self._make_trainer()
        for callback in (*self._callbacks(), *trackers):
            self.trainer.add_callback(callback)

    def _collator(self, *, packing: bool, keeps_copies: bool) -> BatchCollator:
        """Return what makes micro-batches of rows, by the objective."""
        prepared = self._prepared
        objective, pad = prepared.settings.training.objective, prepared.loaded.tokenizer.pad_token_id
        if objective.has_labels:
            data = [one for one in (prepared.train_data, prepared.eval_data) if one is not None]
            longest = max(one.longest_tokens for one in data)
            return LabelCollator(pad, packing=packing, keeps_copies=keeps_copies, longest_tokens=longest)
        collator = PairCollator if objective.has_pairs else BatchCollator
        return collator(pad, packing=packing, keeps_copies=keeps_copies)

    def _make_trainer(self) -> QloraTrainer:
        """Return the trainer; TRL checks settings, tokenizer and model while it is created.

        Raises:
            ModelError: it refuses one of them.
        """
        try:
            trainer = self._new_trainer()
        except REFUSALS as error:
            if is_ours(error):
                raise
            raise ModelError(
                f"TRL can't create a trainer for {self._prepared.loaded.source.name} with these settings: "
                f"{reason_of(error)}",
                hint="Change the setting that it names; qlora config show lists all, and which are not defaults.",
            ) from error
        if (stream := self._prepared.train_data.stream) is not None:
            trainer.train_dataset = stream.as_dataset()
        # Without tqdm, transformers adds it: it would print every log to standard output, which is for results.
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _new_trainer(self) -> QloraTrainer:
        prepared, data = self._prepared, self._prepared.train_data
        loaded, tokenizer = prepared.loaded, prepared.loaded.tokenizer
        checkpointing = Checkpointing(prepared.plan.gradient_checkpointing)
        return QloraTrainer(
            store=self.store,
            reporter=self._reporter,
            reporting=self._reporting,
            guard=self._guard,
            order=RowOrder(data.lengths, prepared.settings.training) if data.stream is None else None,
            loraplus_lr_ratio=prepared.settings.training.loraplus_lr_ratio,
            checkpointing=checkpointing,
            kept_products=prepared.settings.training.kept_products,
            compiled=(
                CompiledLayers(prepared.model, has_one_length=prepared.settings.data.packing)
                if prepared.settings.training.torch_compile
                else None
            ),
            group=self.group,
            loss_of=self._loss_of,
            model=prepared.model,
            args=training_arguments(
                prepared.settings,
                output=self._directory.checkpoints,
                device=loaded.device,
                dtype=loaded.dtype,
                num_steps=prepared.plan.num_steps,
                has_eval=prepared.eval_data is not None,
            ),
            processing_class=tokenizer,
            data_collator=self._collate_step,
            # TRL looks at a row, for which a stream would tokenize a window: it gets the first rows, known already.
            train_dataset=data.dataset if data.stream is None else data.dataset.to_iterable_dataset(),
            eval_dataset=prepared.eval_data.dataset if prepared.eval_data else None,
            callbacks=[self._reporting],
        )

    def _loss_of(self, model: PeftModel, autocast: Autocast) -> LossModel:
        """Return what computes the loss of a batch, by the objective."""
        training = self._prepared.settings.training
        if training.objective.has_labels:
            loss = LabelLoss(
                beta=training.beta,
                desirable_weight=training.desirable_weight,
                undesirable_weight=training.undesirable_weight,
            )
            return LabelModel(model, autocast, loss)
        if training.objective.has_pairs:
            return PairModel(model, autocast, objective=training.objective, beta=training.beta)
        return LossModel(model.get_base_model(), autocast, trains_dft=training.loss == TrainingLoss.DFT)

    def _batches(self) -> Batches:
        data, settings = self._prepared.train_data, self._prepared.settings
        return Batches(data, settings.training, settings.data.max_length, settings.data.packing)

    def _rehearsal(self) -> Rehearsal:
        prepared, evaluation = self._prepared, self._prepared.eval_data
        return Rehearsal(
            micro_batches=self._batches().largest(prepared.plan.num_epochs or 1),
            eval_rows=None if evaluation is None else largest_held_out(evaluation, prepared.settings.training),
            collate=self._collate.alone,
            # Paged state is in unified memory, which the driver moves out of a full GPU.
            state_bytes=0 if prepared.settings.training.optimizer.is_paged else prepared.plan.optimizer_bytes,
        )

    def _callbacks(self) -> list[TrainerCallback]:
        training, loaded = self._prepared.settings.training, self._prepared.loaded
        callbacks: list[TrainerCallback] = [
            RehearsalCallback(self.trainer, self._rehearsal(), self._reporter, self.group),
            StopCallback(self._stop, self._directory.request_file if self.group.is_first else None),
        ]
        if loaded.device.type == "cpu":
            callbacks.append(HeapTrimming())
        if training.early_stopping_patience is not None:
            callbacks.append(EarlyStopCallback(self._reporting, training.early_stopping_patience, self._reporter))
        if training.sample_prompts and (self.group.is_first or self._is_sharded):
            answerer = Answerer(
                tokenizer=loaded.tokenizer,
                end_ids=self._prepared.end_ids,
                dtype=loaded.dtype.torch_dtype,
                max_tokens=training.sample_tokens,
                shared=self._is_sharded,
            )
            self._samples = SampleCallback(answerer, training.sample_prompts, self._reporter, self.trainer.uncompiled)
            callbacks.append(self._samples)
        return callbacks

    @property
    def step(self) -> int:
        """The number of completed steps."""
        return int(self.trainer.state.global_step)

    @property
    def progress(self) -> Progress:
        """The figures that were reported so far."""
        return self._reporting.progress

    def train(self) -> TrainResult:
        """Train to the end, or until a signal comes; write `adapter/` and return the result.

        Raises:
            RehearsalError: the largest micro-batch does not fit.
            TrainingError: the loss was not finite, or the adapter is not what was trained.
        """
        prepared, num_steps = self._prepared, self._prepared.plan.num_steps
        reset_device_peak(prepared.loaded.device)
        start = time.monotonic()
        self._announce()
        stopped = self._loop() or self._evaluate_at_end()
        if stopped:
            # The loop evaluates before it saves: a signal in an evaluation prevents the checkpoint of its step.
            self.trainer.save_last_step()
        self.trainer.delete_old_checkpoints()
        # After the last step and its evaluation, a signal interrupts nothing: a resume would have nothing to train.
        is_whole = self._stop.name is None or (self.step >= num_steps and self._is_evaluated)
        interrupted_by = None if is_whole else self._stop.name
        train_seconds = time.monotonic() - start
        self._write_adapter(is_whole=is_whole)
        self._reporter.report(TrainingEnded(step=self.step, num_steps=num_steps, interrupted_by=interrupted_by))
        result = self._result(train_seconds, interrupted_by)
        if not is_whole or not self.group.is_first:
            return result
        return replace(result, adapter_health=self._measure_adapter(), forgetting=self._measure_forgetting(result))

    def _measure_forgetting(self, result: TrainResult) -> Forgetting | None:
        """Return what was forgotten; None if it is not measured, such as with a base that others hold a part of."""
        if self._is_sharded:
            return None
        return measure_forgetting(self._prepared, result.num_tokens, self._reporter)

    def _measure_adapter(self) -> AdapterHealth | None:
        """Return what training made of the adapter; None if a dequantized weight does not fit in memory."""
        try:
            return measure_adapter(self._prepared.model)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            message = "the updates of the adapter were not measured: there is no memory for a dequantized weight"
            self._reporter.report(Noted(level="warning", message=message))
            return None

    def _announce(self) -> None:
        plan, resume = self._prepared.plan, self._prepared.resume
        predicted, predicted_time = plan.predicted_memory, plan.predicted_time
        self._reporter.report(
            TrainingStarted(
                num_steps=plan.num_steps,
                num_epochs=plan.num_epochs,
                output=self._directory.path,
                predicted_allocated_bytes=predicted.allocated_bytes if predicted else None,
                predicted_reserved_bytes=predicted.reserved_bytes if predicted else None,
                predicted_step_seconds=predicted_time.step_seconds if predicted_time else None,
            )
        )
        if resume is not None:
            checkpoint = resume.checkpoint or self._directory.path
            self._reporter.report(TrainingResumed(step=resume.step, num_steps=plan.num_steps, checkpoint=checkpoint))

    def _loop(self) -> bool:
        """Train the remaining steps; return whether a signal ended an evaluation early."""
        resume = self._prepared.resume
        checkpoint = self.store.path_of(resume.step) if resume is not None and resume.checkpoint is not None else None
        try:
            if checkpoint is not None:
                self.trainer.resume(checkpoint)
            if checkpoint is None or not self._has_ended:
                self.trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            # The loop looks whether to stop only after a step, so it could train a run that has ended further.
            # Without it there is no `on_train_end`, which answers the prompts with the trained model.
            elif self._samples is not None:
                self._samples.answer_last(self._prepared.model, self.step)
        except StoppedError:
            return True
        return False

    @property
    def _is_evaluated(self) -> bool:
        """Whether no evaluation of the last step is due."""
        return self._prepared.eval_data is None or self.step in self.progress.eval_losses

    @property
    def _has_ended(self) -> bool:
        """Whether a resumed run had completed its steps, or was stopping early, when it was killed."""
        patience = self._prepared.settings.training.early_stopping_patience
        stops_early = patience is not None and self.progress.num_since_best >= patience
        return stops_early or self.step >= self._prepared.plan.num_steps

    def _evaluate_at_end(self) -> bool:
        """Evaluate after the last step, unless already done; return whether a signal ended it early."""
        if self._is_evaluated or self._stop.name is not None:
            return False
        try:
            self.trainer.evaluate_outside_loop()
        except StoppedError:
            return True
        return False

    def _write_adapter(self, *, is_whole: bool) -> None:
        self.trainer.end_compiling()
        takes_part = self.group.is_first or self._is_sharded
        if is_whole and takes_part:
            self._restore_best()
            check_trained(self._prepared.model, self.trainer.never_used)
        if self.group.is_first:
            self._save_adapter()
        if self._is_sharded:
            self.group.exchange(None)  # the others read what the first one has written
        if is_whole and takes_part:
            self._reporter.report(PhaseStarted(title="Checking the adapter"))
            check_saved(self._prepared.model, self._directory.adapter, self._prepared.loaded)

    @property
    def _is_sharded(self) -> bool:
        """Whether all processes have to take part in whatever calls the model."""
        return self._prepared.settings.training.shards_base

    def _save_adapter(self) -> None:
        if os.path.lexists(self._directory.adapter):  # the run's own was moved by now
            moved = move_aside(self._directory.adapter, f"{ADAPTER}-kept")
            self._reporter.report(
                Noted(
                    level="warning", message=f"another program wrote {self._directory.adapter}, which is now {moved}"
                )
            )
        save_adapter(self._prepared, self._directory, self._trained_steps())

    def _trained_steps(self) -> TrainedSteps:
        step = self.step if self._restored_step is None else self._restored_step
        return TrainedSteps(
            steps=step,
            num_steps=self._prepared.plan.num_steps,
            loss=self.progress.last_loss if step == self.step else None,
            eval_loss=self.progress.eval_losses.get(step),
            eval_rewards=self.progress.eval_rewards.get(step),
        )

    def _restore_best(self) -> None:
        """Restore the weights of the best evaluation, if the settings say so."""
        best = self.progress.best_step
        if not self._prepared.settings.training.load_best_model_at_end or best is None or best == self.step:
            return
        if damage := damage_of(self.store.path_of(best)):
            raise TrainingError(
                f"the checkpoint of the best evaluation, step {best:,}, can't be used: {damage}",
                hint="Without training.load_best_model_at_end the run ends with the adapter of its last step.",
            )
        restore_adapter(self._prepared.model, self.store.path_of(best))
        self._restored_step = best
        self._reporter.report(Noted(message=f"adapter/ is that of step {best:,}, the best evaluation"))

    def _result(self, train_seconds: float, interrupted_by: str | None) -> TrainResult:
        prepared, progress, device = self._prepared, self.progress, self._prepared.loaded.device
        earlier = self._reporting.earlier
        return TrainResult(
            output=self._directory.path,
            adapter=self._directory.adapter,
            steps=self.step,
            num_steps=prepared.plan.num_steps,
            epochs=None if prepared.train_data.stream is not None else float(self.trainer.state.epoch or 0.0),
            final_loss=progress.last_loss,
            train_loss=progress.loss_sum / progress.num_losses if progress.num_losses else None,
            eval_loss=progress.eval_losses.get(self.step),
            rewards=progress.last_rewards,
            eval_rewards=progress.eval_rewards.get(self.step),
            num_tokens=progress.num_tokens,
            tokens_per_second=progress.num_tokens / progress.stepping_seconds if progress.stepping_seconds else 0.0,
            train_seconds=earlier.elapsed_seconds + train_seconds,
            total_seconds=earlier.elapsed_seconds + earlier.loading_seconds + time.monotonic() - prepared.started,
            peak_memory=PeakMemory(
                host_bytes=peak_host_bytes(),
                device_allocated_bytes=peak_device_allocated_bytes(device),
                device_reserved_bytes=peak_device_reserved_bytes(device),
            ),
            predicted_memory=prepared.plan.predicted_memory,
            num_trainable_parameters=prepared.plan.num_trainable_parameters,
            interrupted_by=interrupted_by,
            checkpoints=tuple(self.store.all()),
            resumed_from_step=prepared.resume.step if prepared.resume is not None else None,
            stopped_early=interrupted_by is None and self.step < prepared.plan.num_steps,
            best_step=progress.best_step,
            best_eval_loss=progress.eval_losses[progress.best_step] if progress.best_step is not None else None,
            num_skipped_steps=self._guard.num_skipped,
            pushed_to=None,
            notes=prepared.loaded.notes,
            step_seconds=self._timer.step_seconds,
            predicted_time=prepared.plan.predicted_time,
        )


def save_adapter(prepared: PreparedRun, directory: RunDirectory, trained: TrainedSteps) -> None:
    """Write `adapter/`: the PEFT adapter, its card, the tokenizer and its chat template, complete or absent.

    The record of the run has the checksums of its files before they are in place: a run that is killed right after
    that recognizes them as its own when it is resumed.
    """

    def fill(path: Path) -> None:
        save_trained_adapter(prepared.model, path)
        prepared.loaded.tokenizer.save_pretrained(path)
        write_card(path, prepared, trained)
        write_record(directory, read_record(directory.path).updated(adapter_files=checksums_of(path)))

    write_directory(directory.adapter, fill)

"""TRL's trainer with the adapter in fp32, checkpoints that are complete or absent, and exact resumes."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft.tuners.lora import LoraLayer
from transformers import IntervalStrategy, TrainerState
from transformers.integrations.neftune import deactivate_neftune

from qlora_cli.adapters.calls import watch_calls
from qlora_cli.adapters.checkpointing import enable_checkpointing
from qlora_cli.adapters.state import restore_adapter
from qlora_cli.adapters.writer import save_adapter
from qlora_cli.errors import ModelError, OutputDirectoryError
from qlora_cli.events import CheckpointSaved, EvalStarted, Noted, Reporter
from qlora_cli.ranks.group import ALONE, ProcessGroup
from qlora_cli.runs.checkpoints import TRAINER_STATE, CheckpointStore
from qlora_cli.settings.choices import Checkpointing
from qlora_cli.training.batches import (
    IS_BLANK,
    MISMATCHED,
    NUM_MICRO_BATCHES,
    NUM_TRAINED,
    Batch,
    StepCollator,
    blanks_of,
    loss_inputs,
    micro_batches_of,
    num_items_of,
)
from qlora_cli.training.callbacks.loop_callback import LoopCallback
from qlora_cli.training.callbacks.reporting import ReportingCallback
from qlora_cli.training.callbacks.step_guard import StepGuard
from qlora_cli.training.compiled_layers import CompiledLayers
from qlora_cli.training.data_order import RowOrder
from qlora_cli.training.lora_plus import restore_paging, scale_b_learning_rate
from qlora_cli.training.loss_model import Autocast, LossModel, means_of_step
from qlora_cli.training.resuming.loop_state import (
    Generators,
    LoopState,
    generator_states,
    load_generators,
    preserve_generators,
)
from qlora_cli.training.resuming.saved_state import PEERS, RNG_STATE, SCALER, blame_file, optimizer_checked
from qlora_cli.training.shared_step import EvaluationRecorder, StepRecorder, draw_apart, unused_kept
from qlora_cli.training.trainer_seam import LoopCounters, TrainerSeam


class QloraTrainer(TrainerSeam):
    """`SFTTrainer` on a PEFT model whose adapter is already attached.

    `phase` names the part of a step in progress, for the message of a failure. `never_used` are the layers with
    an adapter that the first micro-batch that was tried did not call.
    """

    def __init__(
        self,
        *,
        store: CheckpointStore,
        reporter: Reporter,
        reporting: ReportingCallback,
        guard: StepGuard,
        order: RowOrder | None,
        loraplus_lr_ratio: float | None,
        checkpointing: Checkpointing,
        kept_products: Collection[str] | None,
        compiled: CompiledLayers | None,
        group: ProcessGroup,
        loss_of: Callable[[Any, Autocast], LossModel],
        model: Any,
        **kwargs: Any,
    ) -> None:
        # TRL rounds the adapter of a quantized model to bf16 by replacing `.data`; the fp32 values, which
        # small updates need, are restored before an optimizer exists.
        full_precision = {
            name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        self._loraplus_lr_ratio = loraplus_lr_ratio
        self._group = group
        self._of_peers: Sequence[Generators] = ()  # after the last step that is complete, by rank from 1
        self._order = order  # None for a stream, whose order is given
        super().__init__(model=model, **kwargs)
        for name, parameter in model.named_parameters():
            if name in full_precision:
                parameter.data = full_precision[name]
        self._compiled = compiled
        with self.uncompiled():
            self._loss_model = loss_of(model, self.accelerator.autocast)
        self._checkpointing = enable_checkpointing(model, checkpointing, kept_products)
        self._recorder = StepRecorder(group)
        self._evaluation = EvaluationRecorder(group)
        self._pending = {"train": self._recorder.metrics, "eval": self._evaluation.metrics}  # of batches, not read yet
        self._num_micro_batches = 1  # of the step in progress
        self.phase = "preparation"
        self.never_used: tuple[str, ...] = ()
        self.num_adapted = sum(isinstance(module, LoraLayer) for module in model.modules())
        self._store = store
        self._reporter = reporter
        self._reporting = reporting
        self._guard = guard
        self._last_state: tuple[LoopState, Generators] | None = None  # after the last step that is complete
        self._is_failing = False
        self._is_updating = False
        self._reported: set[Path] = set()  # folders that were reported as not deleted
        self._resumed: tuple[LoopState, Path] | None = None
        self.add_callback(LoopCallback(self))

    def train_sampler(self) -> RowOrder | None:
        """Return the order of rows; None for a stream."""
        return self._order

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer, with a higher learning rate for B matrices if set."""
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if is_new and self._loraplus_lr_ratio is not None:
            scale_b_learning_rate(optimizer, self.model, self._loraplus_lr_ratio)
        return optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return the loss of TRL's trainer with its `loss_type` nll, by our head, and record the phase.

        Its gradient is that of the `loss_type` in use. `inputs` are a batch of `BatchCollator`. TRL's metrics are
        recorded without being read.
        """
        del model  # a wrapper of the layers that `LossModel` calls
        assert not return_outputs, "an evaluation needs the loss only"
        assert self.accelerator.num_processes == 1, (
            "several processes share a step by `ProcessGroup`, not by a wrapper"
        )
        self.phase = "the forward pass"
        mode = "train" if self.model.training else "eval"
        num_tokens_fed, is_blank = inputs["num_tokens"], inputs.get(IS_BLANK, False)
        inputs = loss_inputs(inputs)
        if self.aux_loss_enabled and not is_blank:
            inputs["output_router_logits"] = True
        losses = self._loss_model(**inputs, use_cache=False)
        number = losses.num_items if num_items_in_batch is None else num_items_in_batch
        num_items = torch.as_tensor(number).clamp(min=1)
        if not is_blank:
            self._pending[mode].add(losses, num_tokens_fed, num_items)
        loss: torch.Tensor = losses.total * (0 if is_blank else 1) / num_items
        if losses.aux_loss is not None:  # a mean over each micro-batch, where the loss is one over all of the step
            num_means = 1 if num_items_in_batch is None else self._num_micro_batches
            loss = loss + self.router_aux_loss_coef * losses.aux_loss / num_means
        self.phase = "the backward pass"
        return loss

    def _begin_step(self, batch: Batch, group: ProcessGroup) -> None:
        """Compute what the losses of a step, shared by `group`, need before its first micro-batch."""
        self.phase = "the forward pass"
        mismatched = send_to_device(batch.get(MISMATCHED, []), self.args.device)
        self._loss_model.begin_step([loss_inputs(one) for one in mismatched], batch.get(NUM_TRAINED, 0), group)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the batches of a step and the number of its items: trained tokens, or rows that are compared."""
        batches, num_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._num_micro_batches = sum(batch.get(NUM_MICRO_BATCHES, 1) for batch in batches)
        if any(NUM_TRAINED in batch for batch in batches):  # whose labels the trainer does not see
            num_tokens = torch.tensor(sum(batch[NUM_TRAINED] for batch in batches))
        return batches, num_tokens

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Go forward and backward with each micro-batch; losses are read, checked and added when the step ends.

        With several processes, a batch is a step, whose gradients are those of all from here on.
        """
        model.train()  # in a process without a micro-batch, too
        self._begin_step(inputs, self._group)
        for index, micro_batch in enumerate(micro_batches_of(inputs)):
            if index:
                self.end_micro_batch()
            self._recorder.losses.append(super().training_step(model, micro_batch, num_items_in_batch))
        with unused_kept(model):
            for blank in blanks_of(inputs):
                super().training_step(model, blank, num_items_in_batch)
        self._recorder.share(model)
        return torch.zeros(())

    def floating_point_ops(self, inputs: Batch) -> int:
        """Return the operations of a batch, as the trainer estimates them."""
        return sum(super(QloraTrainer, self).floating_point_ops(one) for one in micro_batches_of(inputs))

    def prediction_step(
        self, model: Any, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Return the loss of a batch of an evaluation: the mean over its trained tokens, or its rows."""
        total, num_items = torch.zeros((), dtype=torch.float64, device=self.args.device), 0
        self._begin_step(inputs, self._group)
        for micro_batch in micro_batches_of(inputs):
            number = num_items_of(micro_batch)
            total += number * super().prediction_step(model, micro_batch, prediction_loss_only, ignore_keys)[0]
            num_items += number
        for blank in blanks_of(inputs):
            super().prediction_step(model, blank, prediction_loss_only, ignore_keys)
        self._evaluation.add(total, num_items)
        return (total / max(1, num_items)).float(), None, None

    def on_grad_norm(self, model: torch.nn.Module, norm: torch.Tensor) -> float:
        """Read the losses and metrics of a step; skip it if they or its gradients are not finite, see `StepGuard`."""
        norm_value, step = self._recorder.read(norm)
        self._of_peers = step.of_peers
        self.add_metrics("train", means_of_step(step.metrics), step.num_tokens)
        is_scaled = getattr(self.accelerator, "scaler", None) is not None
        if self._guard.may_update(self.state.global_step, step.losses, norm_value, is_scaled=is_scaled):
            self.add_losses(step.losses)
        else:
            model.zero_grad(set_to_none=True)  # optimizers leave alone what has no gradient
            self.leave_step_out()
        return norm_value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report to callbacks, without a history, which would fill memory and checkpoints; `metrics.jsonl` has it."""
        if "eval_loss" in logs and (evaluated := self._evaluation.end()) is not None:
            # The trainer has averaged over rows of a batch, however many tokens they have.
            logs["eval_loss"], metrics = evaluated
            self.add_metrics("eval", metrics, 0)
        self.add_margin("eval" if "eval_loss" in logs else "train")
        super().log(logs, start_time)
        self.state.log_history.clear()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without an effect on training, and save the step if it is the best so far."""
        if self._last_state is not None and self._last_state[0].step != self.state.global_step:
            self._record_state()
        self._reporter.report(EvalStarted(step=int(self.state.global_step)))
        with preserve_generators():
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        self.phase = "training"
        self._note_best()
        if self._is_best:
            self.control.should_save = True
        return metrics

    def evaluate_outside_loop(self) -> None:
        """Evaluate before or after the loop, which does not save the step then; it is saved here if it is the best."""
        self.evaluate()
        if self._is_best and not self._store.path_of(self.state.global_step).exists():
            self.save_checkpoint()

    @property
    def _is_best(self) -> bool:
        """Whether no evaluation had a lower loss than that of this step."""
        return self._reporting.progress.best_step == int(self.state.global_step)

    def _note_best(self) -> None:
        """Record the best evaluation in the trainer's state."""
        progress = self._reporting.progress
        if progress.best_step is not None:
            self.state.best_metric = progress.eval_losses[progress.best_step]
            self.state.best_global_step = progress.best_step

    def on_step_reported(self) -> None:
        """Record the state after the step, in case the next one fails."""
        self._record_state()

    # ---- checkpoints ----

    def save_weights(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        """Write the adapter and the tokenizer."""
        save_adapter(self.model, folder, state_dict)
        self.processing_class.save_pretrained(folder)

    def save_checkpoint(self) -> None:
        """Write `checkpoints/step-N` aside, then move it there; delete the oldest beyond the limit.

        Of several processes, the first writes for all.
        """
        if not self._group.is_first:
            return
        self._store.clear_leftovers()
        self._store.check_free_space()
        step = self.state.global_step
        with self._store.staging(step) as staged:
            finished = self.write_checkpoint(staged)
            # The trainer records the best checkpoint by the path of the temporary folder that it writes to.
            self.state.best_model_checkpoint = None
            self.state.save_to_json(str(finished / TRAINER_STATE))
            self._loop_state().write(finished)
            # For a failed step, the trainer wrote the generators as the failure left them.
            torch.save(dict(self._generators()), finished / RNG_STATE)
            published = self._store.publish(finished, step, self.state.best_global_step)
        self._report_not_deleted(published.not_deleted)
        self._reporter.report(CheckpointSaved(step=step, path=published.path))

    def delete_old_checkpoints(self) -> None:
        """Delete what a process that was killed as it had saved a checkpoint did not."""
        if self._group.is_first:
            self._report_not_deleted(self._store.delete_old(self.state.global_step, self.state.best_global_step))

    def _report_not_deleted(self, reasons: Mapping[Path, str]) -> None:
        """Report once of each folder among the checkpoints that it is not deleted."""
        for path, reason in reasons.items():
            if path not in self._reported:
                self._reported.add(path)
                self._reporter.report(Noted(level="warning", message=f"{path} is not deleted: {reason}"))

    def save_last_step(self) -> int | None:
        """Save the state after the last complete step, during a failed one; return the step.

        Return None if there is no such state: before the first step, or if the failure came during an update.
        """
        step = int(self.state.global_step)
        if (
            not self._group.is_first
            or self._last_state is None
            or self._last_state[0].step != step
            or self._is_updating
            or step == 0
        ):
            return None
        if not self._store.path_of(step).exists():
            self._is_failing = True
            try:
                self.save_checkpoint()
            finally:
                self._is_failing = False
        return step

    def _record_state(self) -> None:
        self._last_state = (self._current_state(), self._current_generators())

    def _loop_state(self) -> LoopState:
        return self._last_state[0] if self._is_failing and self._last_state is not None else self._current_state()

    def _generators(self) -> Generators:
        assert self._last_state is not None or not self._is_failing
        return self._last_state[1] if self._is_failing and self._last_state is not None else self._current_generators()

    def _current_generators(self) -> Generators:
        return generator_states() if self._group.size == 1 else {**generator_states(), PEERS: list(self._of_peers)}

    def _current_state(self) -> LoopState:
        return LoopState(
            step=self.state.global_step,
            **asdict(self.counters()),
            never_used=list(self.never_used),
            progress=replace(self._reporting.progress, num_skipped=self._guard.num_skipped),
        )

    # ---- resuming ----

    def resume(self, checkpoint: Path) -> None:
        """Restore adapter, trainer state and reports from a checkpoint, without training further.

        An evaluation that was due after it, and that a signal prevented, is done now.
        """
        self.load_weights(checkpoint)
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        self.begin_loop()
        if self._is_evaluation_due():
            self.evaluate_outside_loop()
            assert self._resumed is not None, "set when the weights were loaded"
            self._resumed = replace(self._resumed[0], progress=self._reporting.progress), checkpoint

    def load_weights(self, checkpoint: Path) -> None:
        """Restore the adapter from a checkpoint, and read the state that the loop starts with.

        Raises:
            OutputDirectoryError: the weights are not those of this adapter.
        """
        try:
            restore_adapter(self.model, checkpoint)
        except ModelError as error:
            raise OutputDirectoryError(error.message, hint=error.hint) from error
        if self._resumed is None:  # else it includes an evaluation that was done since
            self._resumed = LoopState.read(checkpoint), checkpoint

    @contextmanager
    def optimizer_loading(self, checkpoint: Path) -> Iterator[None]:
        """Check that the loaded states are of this optimizer and this schedule; see `optimizer_checked`."""
        optimizer = self.optimizer.optimizer
        with optimizer_checked(optimizer, getattr(self.lr_scheduler, "scheduler", self.lr_scheduler), checkpoint):
            yield
        restore_paging(optimizer)

    def scaler_loading(self, checkpoint: Path) -> AbstractContextManager[None]:
        """Name the file of the loss scaler if loading it fails."""
        return blame_file(checkpoint / SCALER)

    def begin_loop(self) -> None:
        """Restore the counters that the loop resets when it begins."""
        self.set_counters(self.counters() if self._resumed is None else LoopCounters.of(self._resumed[0]))
        if self._resumed is not None:
            state, checkpoint = self._resumed
            self.never_used = tuple(state.never_used)
            self._guard.num_skipped = state.progress.num_skipped
            self._reporting.resume_from(state.progress)
            # The saved state would override changed intervals, and lacks an evaluation after it.
            self.state.compute_steps(self.args, self.args.max_steps)
            self._note_best()
            self.restore_generators(checkpoint)
        else:
            draw_apart(self._group, self.args.seed, 0, ())
        self._record_state()

    def restore_generators(self, checkpoint: Path) -> None:
        """Give the random generators of this process the states that it had at a checkpoint, or of its own."""
        self._of_peers = load_generators(checkpoint)
        draw_apart(self._group, self.args.seed, self.state.global_step, self._of_peers)

    def _is_evaluation_due(self) -> bool:
        """Return whether the evaluation of the step that training resumes after is missing, due to a signal."""
        step, steps = self.state.global_step, self.args.eval_steps
        is_due = self.args.eval_strategy == IntervalStrategy.STEPS and step > 0 and step % int(steps) == 0
        return is_due and step not in self._reporting.progress.eval_losses

    def try_out(self, micro_batches: Sequence[Batch]) -> None:
        """Run micro-batches forward and backward as in training, without an effect except on `never_used`."""
        for index, micro_batch in enumerate(micro_batches):
            with self._without_effect():
                _, num_tokens = self.get_batch_samples(iter([micro_batch]), 1, self.args.device)
                self.current_gradient_accumulation_steps = 1
                self._begin_step(micro_batch, ALONE)
                with self.uncompiled(), watch_calls(self.model) as never_used:
                    super().training_step(self.model_wrapped, dict(micro_batch), num_tokens)
                # From the second on, gradients are in memory, too. Compiled code would keep what watches the calls.
                if self._has_several or self._compiled is not None:
                    again = partial(super().training_step, self.model_wrapped, num_items_in_batch=num_tokens)
                    self._try_compiled(partial(again, dict(micro_batch)))
            if not index:
                self.never_used = tuple(sorted(never_used))

    def _try_compiled(self, run: Callable[[], object]) -> None:
        """Call `run`; once more, and compile nothing any more, if compiling has failed."""
        if self._compiled is not None and self._compiled.can_run(run, self._reporter):
            return
        self._compiled = None
        run()

    @property
    def _has_several(self) -> bool:
        """Whether a step may have several micro-batches."""
        return self.args.gradient_accumulation_steps > 1 or isinstance(self.data_collator, StepCollator)

    def abandon(self) -> None:
        """Remove the trainer's hooks from the model, for another trainer."""
        if self.neftune_noise_alpha is not None:
            deactivate_neftune(self.model, self.neftune_hook_handle, self.accelerator)
        if self._checkpointing is not None:
            self._checkpointing.remove()
        self.end_compiling()

    def uncompiled(self) -> AbstractContextManager[None]:
        """Return a context in which no compiled code runs."""
        return nullcontext() if self._compiled is None else self._compiled.paused()

    @property
    def is_compiled(self) -> bool:
        """Whether the layers are compiled, or will be when they are first called."""
        return self._compiled is not None

    def end_compiling(self) -> None:
        """Run no compiled code from now on: what is computed after training is compared with other models."""
        if self._compiled is not None:
            self._compiled.remove()

    def try_out_evaluation(self, batch: dict[str, Any]) -> None:
        """Run a micro-batch forward as in an evaluation, without an effect."""
        with self._without_effect():
            self.model.eval()
            self.phase = "the evaluation"
            self._try_compiled(lambda: self.prediction_step(self.model_wrapped, batch, prediction_loss_only=True))

    @contextmanager
    def _without_effect(self) -> Iterator[None]:
        """Undo gradients, metrics and draws of the generators afterwards."""
        try:
            with preserve_generators():
                yield
        finally:
            self.model.zero_grad(set_to_none=True)
            self._evaluation.clear()
            self._recorder.metrics.clear()

    def begin_update(self) -> None:
        """Mark the update as in progress: the weights are neither those before nor those after the step."""
        self.phase, self._is_updating = "the optimizer's step", True

    def end_update(self) -> None:
        """Mark the update as complete."""
        self._is_updating = False

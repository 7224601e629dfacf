"""TRL's trainer, with the adapter kept in fp32, checkpoints complete or absent, and exact when it is resumed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.neftune import deactivate_neftune
from trl import SFTTrainer

from qlora_cli.adapters.state import restore_adapter
from qlora_cli.adapters.writer import save_adapter
from qlora_cli.errors import ModelError, OutputDirectoryError
from qlora_cli.events import CheckpointSaved, EvalStarted, Noted, Reporter
from qlora_cli.runs.checkpoints import TRAINER_STATE, CheckpointStore, Published
from qlora_cli.training.callbacks.reporting import ReportingCallback
from qlora_cli.training.callbacks.step_guard import StepGuard
from qlora_cli.training.data_order import RowOrder
from qlora_cli.training.lora_plus import let_b_learn_faster, page_again
from qlora_cli.training.resuming.loop_state import (
    Generators,
    LoopState,
    generator_states,
    generators_kept,
)
from qlora_cli.training.resuming.saved_state import (
    OPTIMIZER,
    RNG_STATE,
    SCALER,
    SCHEDULER,
    blamed,
    check_optimizer,
    check_schedule,
    groups_of,
)


class QloraTrainer(SFTTrainer):
    """`SFTTrainer` on a PEFT model whose adapter is already attached.

    `phase` says what is going on, for the message of a failure. `never_used` are the layers with
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
        model: Any,
        **kwargs: Any,
    ) -> None:
        # TRL rounds the adapter of a quantized model to bf16 by replacing `.data`; the fp32 values, which
        # small updates need, are put back before an optimizer exists.
        full_precision = {
            name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        self._loraplus_lr_ratio = loraplus_lr_ratio
        self._order = order  # None for rows that are streamed, which come as they come
        super().__init__(model=model, **kwargs)
        for name, parameter in model.named_parameters():
            if name in full_precision:
                parameter.data = full_precision[name]
        self.phase = "preparation"
        self.never_used: tuple[str, ...] = ()
        self.num_adapted = sum(isinstance(module, LoraLayer) for module in model.modules())
        self._store = store
        self._reporter = reporter
        self._reporting = reporting
        self._guard = guard
        self._kept: tuple[LoopState, Generators] | None = None  # after the last step that is complete
        self._is_failing = False
        self._is_updating = False
        self._staged: Path | None = None  # where a checkpoint is written, while one is
        self._told: set[Path] = set()
        self._resumed: tuple[LoopState, Path] | None = None
        self.add_callback(_LoopCallback(self))

    def _get_train_sampler(self, train_dataset: Any = None) -> RowOrder | None:  # noqa: ARG002 - as in transformers
        return self._order

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer, in which B matrices may learn faster."""
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if is_new and self._loraplus_lr_ratio is not None:
            let_b_learn_faster(optimizer, self.model, self._loraplus_lr_ratio)
        return optimizer

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss, and say that it is the forward pass."""
        self.phase = "the forward pass"
        loss = super().compute_loss(*args, **kwargs)
        self.phase = "the backward pass"
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Go forward and backward with a micro-batch; see `StepGuard` for a loss that is not finite."""
        loss = super().training_step(*args, **kwargs)
        return self._guard.check_loss(self.state.global_step, loss)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        is_scaled = getattr(self.accelerator, "scaler", None) is not None
        if not self._guard.check_norm(self.state.global_step, float(norm), is_scaled=is_scaled):
            self._skip_step(model)
        return norm

    def _skip_step(self, model: torch.nn.Module) -> None:
        """Make the step in progress one that changes nothing and is not counted in the mean loss."""
        assert self._kept is not None, "a step before the loop began"
        model.zero_grad(set_to_none=True)  # optimizers leave alone what has no gradient
        self._tr_loss.fill_(self._kept[0].summed_loss)
        self._globalstep_last_logged += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand on what is to be reported; its history is `metrics.jsonl`, not kept in memory and every checkpoint."""
        super().log(logs, start_time)
        self.state.log_history.clear()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; training goes on as if it had not been."""
        if self._kept is not None and self._kept[0].step != self.state.global_step:
            self._keep()
        self._reporter.report(EvalStarted(step=int(self.state.global_step)))
        with generators_kept():
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        self.phase = "training"
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best: bool = super()._determine_best_metric(metrics, trial)
        if is_best:
            self.control.should_save = True
        return is_best

    def note_evaluation(self, metrics: dict[str, float]) -> None:
        """Keep what was evaluated outside of the loop, if it is the best so far."""
        if self._determine_best_metric(metrics, None) and not self._store.path_of(self.state.global_step).exists():
            self._save_checkpoint(self.model, None)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._keep()

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:  # noqa: ARG002 - the signature is that of transformers
        return str(self._staged or self._store.folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the adapter and the tokenizer to `output_dir`."""
        assert output_dir is not None
        save_adapter(self.model, Path(output_dir), state_dict)
        self.processing_class.save_pretrained(output_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write `checkpoints/step-N` aside, then move it there; delete the oldest beyond the limit."""
        self._store.clear_left_overs()
        self._store.check_room()
        step = self.state.global_step
        with self._store.staging(step) as self._staged:
            # TRL's own override only adds a model card to the output directory.
            super(SFTTrainer, self)._save_checkpoint(model, trial)
            finished = self._staged / f"checkpoint-{step}"
            # The trainer notes where the best one is by a path, which is that of the folder it writes to.
            self.state.best_model_checkpoint = None
            self.state.save_to_json(str(finished / TRAINER_STATE))
            self._loop_state().write(finished)
            published = self._store.publish(finished, step, self.state.best_global_step)
        self._staged = None
        self._tell_kept(published)
        self._reporter.report(CheckpointSaved(step=step, path=published.path))

    def _tell_kept(self, published: Published) -> None:
        """Say once of each folder among the checkpoints that it is not deleted."""
        for path, reason in published.kept.items():
            if path not in self._told:
                self._told.add(path)
                self._reporter.report(Noted(level="warning", message=f"{path} is not deleted: {reason}"))

    def _save_rng_state(self, output_dir: str) -> None:
        assert self._kept is not None or not self._is_failing
        states = self._kept[1] if self._is_failing and self._kept is not None else generator_states()
        torch.save(dict(states), Path(output_dir) / RNG_STATE)

    def save_last_step(self) -> int | None:
        """Save the state after the last step that is complete, from within one that failed; return the step.

        None if there is no such state: before the first step, or when the failure came in the middle of an update.
        """
        step = int(self.state.global_step)
        if self._kept is None or self._kept[0].step != step or self._is_updating or step == 0:
            return None
        if not self._store.path_of(step).exists():
            self._is_failing = True
            try:
                self._save_checkpoint(self.model, None)
            finally:
                self._is_failing = False
        return step

    def _keep(self) -> None:
        self._kept = (self._now(), generator_states())

    def _loop_state(self) -> LoopState:
        return self._kept[0] if self._is_failing and self._kept is not None else self._now()

    def _now(self) -> LoopState:
        progress = self._reporting.progress
        return LoopState(
            step=self.state.global_step,
            summed_loss=float(self._tr_loss),
            total_loss=self._total_loss_scalar,
            reported_step=self._globalstep_last_logged,
            num_tokens=int(self._total_train_tokens),
            means={name: list(values) for name, values in self._metrics["train"].items()},
            never_used=list(self.never_used),
            progress=replace(progress, num_skipped=self._guard.num_skipped),
        )

    # ---- resuming ----

    def resume(self, checkpoint: Path) -> None:
        """Give adapter, trainer state and reports the values of a checkpoint, without training on.

        An evaluation that was due behind it, and that a signal prevented, is made up for.
        """
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        self._tr_loss = torch.tensor(0.0, device=self.args.device)
        self.begin_loop()
        self._note_best()
        if self._is_evaluation_due():
            self.note_evaluation(self.evaluate())
            assert self._resumed is not None, "taken up above"
            self._resumed = replace(self._resumed[0], progress=self._reporting.progress), checkpoint

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        checkpoint = Path(resume_from_checkpoint)
        try:
            restore_adapter(self.model, checkpoint)
        except ModelError as error:
            raise OutputDirectoryError(error.message, hint=error.hint) from error
        if self._resumed is None:  # else with an evaluation that was made up for
            self._resumed = LoopState.read(checkpoint), checkpoint

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer, folder = self.optimizer.optimizer, Path(checkpoint)
        schedule: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        groups, state = groups_of(optimizer), schedule.state_dict()
        with blamed(folder / OPTIMIZER):
            super()._load_optimizer_and_scheduler(checkpoint)
            check_optimizer(optimizer, groups, folder / OPTIMIZER)
        check_schedule(schedule, state, folder / SCHEDULER)
        page_again(optimizer)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with blamed(Path(checkpoint or "") / SCALER):
            super()._load_scaler(checkpoint)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        found = super()._init_training_state(max_steps, *args, **kwargs)
        # What was saved would overrule intervals that were changed since, and knows no evaluation after it.
        self.state.compute_steps(self.args, max_steps)
        self._note_best()
        return found

    def _note_best(self) -> None:
        """Give the trainer's state the best of all evaluations."""
        progress = self._resumed[0].progress if self._resumed is not None else self._reporting.progress
        best = progress.best_step
        if best is not None:
            self.state.best_metric, self.state.best_global_step = progress.eval_losses[best], best

    def _go_on_from(self, state: LoopState) -> None:
        self._tr_loss = torch.tensor(state.summed_loss, device=self.args.device)
        self._total_loss_scalar = state.total_loss
        self._globalstep_last_logged = state.reported_step
        self._total_train_tokens = state.num_tokens
        for name, values in state.means.items():
            self._metrics["train"][name] = list(values)
        self.never_used = tuple(state.never_used)
        self._guard.num_skipped = state.progress.num_skipped
        self._reporting.go_on_from(state.progress)

    def begin_loop(self) -> None:
        """Take up what the loop sets to zero when it begins."""
        if self._resumed is not None:
            state, checkpoint = self._resumed
            self._go_on_from(state)
            self._load_rng_state(str(checkpoint))
        self._keep()

    def _is_evaluation_due(self) -> bool:
        """Whether the step that training goes on behind was to be evaluated, and was not: a signal came first."""
        step, steps = self.state.global_step, self.args.eval_steps
        is_due = self.args.eval_strategy == IntervalStrategy.STEPS and step > 0 and step % int(steps) == 0
        return is_due and step not in self._reporting.progress.eval_losses

    def try_out(self, batch: dict[str, Any]) -> None:
        """Go forward and backward with a micro-batch as in training, and forget all of it but `never_used`."""
        with self._untouched(), _calls_watched(self.model) as never_used:
            self.current_gradient_accumulation_steps = 1
            num_tokens = self._get_num_items_in_batch([batch], self.args.device)
            super().training_step(self.model_wrapped, dict(batch), num_tokens)
            if self.args.gradient_accumulation_steps > 1:  # from the second on, gradients are there meanwhile
                super().training_step(self.model_wrapped, dict(batch), num_tokens)
        self.never_used = tuple(sorted(never_used))

    def abandon(self) -> None:
        """Take what training has hung on the model off it again, for another trainer."""
        if self.neftune_noise_alpha is not None:
            deactivate_neftune(self.model, self.neftune_hook_handle, self.accelerator)

    def try_out_evaluation(self, batch: dict[str, Any]) -> None:
        """Go forward with a micro-batch as in an evaluation, and forget it."""
        with self._untouched():
            self.model.eval()
            self.phase = "the evaluation"
            self.prediction_step(self.model_wrapped, batch, prediction_loss_only=True)

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """Leave no gradient, count or draw of a generator behind."""
        tokens, means = (
            self._total_train_tokens,
            {mode: {name: list(values) for name, values in found.items()} for mode, found in self._metrics.items()},
        )
        try:
            with generators_kept():
                yield
        finally:
            self.model.zero_grad(set_to_none=True)
            self._total_train_tokens = tokens
            for mode, found in means.items():
                self._metrics[mode].clear()
                self._metrics[mode].update(found)

    def begin_step(self) -> None:
        """Forget what the guard saw of the step before."""
        self._guard.begin_step()

    def begin_update(self) -> None:
        """Until it is over, the weights are neither those before nor those after the step."""
        self.phase, self._is_updating = "the optimizer's step", True

    def end_update(self) -> None:
        """The weights are those after the step."""
        self._is_updating = False


@contextmanager
def _calls_watched(model: torch.nn.Module) -> Iterator[set[str]]:
    """Give the names of the layers with an adapter; those that are called meanwhile are taken out."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    left = set(layers)
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: left.discard(name)) for name, module in layers.items()
    ]
    try:
        yield left
    finally:
        for handle in handles:
            handle.remove()


class _LoopCallback(TrainerCallback):
    """Tells the trainer where its loop is."""

    def __init__(self, trainer: QloraTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the signatures are those of transformers
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Before the first step."""
        self._trainer.begin_loop()

    def on_step_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Before the first micro-batch of a step."""
        self._trainer.begin_step()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Gradients are clipped, weights are next."""
        self._trainer.begin_update()

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """The step is counted. The last one is evaluated whatever the interval, before it is saved."""
        self._trainer.end_update()
        if state.global_step >= state.max_steps and self._trainer.eval_dataset is not None:
            control.should_evaluate = True

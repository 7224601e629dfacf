"""Training through the library: what is frozen, what trains, and that it is reproducible."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit

from qlora_cli.adapters.adapter import attach_adapter
from qlora_cli.errors import DiskSpaceError, HardwareError, SettingsError, TrainingError
from qlora_cli.events import CheckpointSaved, EvalDone, Noted, StepDone
from qlora_cli.loading.loader import load_model
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.settings.models import LoadSettings, LoraSettings, ModelSettings
from qlora_cli.training.callbacks.stop import StopSignal
from qlora_cli.training.run_plan import PreparedRun, prepare_run
from qlora_cli.training.session import Session
from qlora_cli.training.train_run import run, train
from tests.conftest import Recorder, train_settings, write_jsonl
from tests.support.models.shallow_model import NUM_LAYERS
from tests.support.processes.plain_python import PlainPython


def base_digest(model: torch.nn.Module) -> str:
    """Return a SHA-256 of every frozen byte: packed weights, constants, norms, embedding."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "lora_" not in name and isinstance(tensor, torch.Tensor):
            digest.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_exact_dtype_inventory_of_a_quantized_model_with_adapter(base_model: Path) -> None:
    loaded = load_model(LoadSettings(model=ModelSettings(name=str(base_model), dtype="bf16", device="cpu")))
    model, notes = attach_adapter(loaded.base, LoraSettings())
    assert notes == ()
    kinds = Counter(
        (type(parameter) is Params4bit, parameter.dtype, parameter.requires_grad) for parameter in model.parameters()
    )
    num_linears = NUM_LAYERS * 7
    assert kinds == {
        (True, torch.uint8, False): num_linears,
        (False, torch.float32, True): 2 * num_linears,  # one A and one B each
        (False, torch.bfloat16, False): 1 + NUM_LAYERS * 2 + 1,  # embedding (tied head), two norms a layer, final norm
    }
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_adapter_stays_fp32_in_the_trainer_and_the_base_keeps_its_bytes(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    prepared = prepare_run(train_settings(base_model, rows, tmp_path / "run"), Recorder())
    before = base_digest(prepared.model)
    initial = {n: p.detach().clone() for n, p in prepared.model.named_parameters() if p.requires_grad}
    result = run(prepared, Recorder())
    after = {n: p for n, p in prepared.model.named_parameters() if p.requires_grad}
    assert base_digest(prepared.model) == before
    assert {p.dtype for p in after.values()} == {torch.float32}
    assert all(not torch.equal(after[n], initial[n]) for n in initial if "lora_B" in n)
    assert result.steps == 3


def test_evaluation_does_not_repack_the_quantized_weights(base_model: Path) -> None:
    loaded = load_model(LoadSettings(model=ModelSettings(name=str(base_model), device="cpu")))
    before = base_digest(loaded.model)
    loaded.model.eval()
    with torch.no_grad():
        loaded.model(input_ids=torch.tensor([[1, 2, 3]]))
    assert base_digest(loaded.model) == before
    layers = [module for module in loaded.model.modules() if isinstance(module, Linear4bit)]
    assert layers
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)


LOGITS_BY_PLAIN_PEFT = """
import sys, torch, warnings
warnings.simplefilter("ignore")
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
adapter, base, out = sys.argv[1:]
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                            bnb_4bit_compute_dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32, device_map="cpu")
model = PeftModel.from_pretrained(model, adapter)
tokenizer = AutoTokenizer.from_pretrained(adapter)
text = tokenizer.apply_chat_template([{"role": "user", "content": "What does os.getcwd() do?"}], tokenize=False)
model.train()  # bitsandbytes repacks for bf16 inference on some CPUs in eval mode; dropout is 0 here
with torch.no_grad():
    logits = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits
assert not any(name.startswith("qlora_cli") for name in sys.modules)
torch.save({"logits": logits, "text": text}, out)
"""


def test_adapter_gives_the_same_logits_with_plain_peft_in_a_process_of_its_own(
    plain_python: PlainPython, base_model: Path, rows: Path, tmp_path: Path
) -> None:
    prepared = prepare_run(train_settings(base_model, rows, tmp_path / "run"), Recorder())
    result = run(prepared, Recorder())
    out = tmp_path / "logits.pt"
    plain_python(LOGITS_BY_PLAIN_PEFT, result.adapter, base_model, out).check_returncode()
    by_peft = torch.load(out, weights_only=True)
    tokenizer = prepared.loaded.tokenizer
    prepared.model.eval()
    with torch.no_grad():
        inputs = tokenizer(by_peft["text"], add_special_tokens=False, return_tensors="pt")
        logits = prepared.model(**inputs).logits
    torch.testing.assert_close(by_peft["logits"], logits, rtol=1e-5, atol=1e-5)


def gradients_of_first_step(prepared: PreparedRun, directory: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and the accumulated gradients of the first step."""
    recorder = Recorder()
    run_directory = RunDirectory(directory)
    run_directory.create()
    captured: dict[str, torch.Tensor] = {}

    from transformers import TrainerCallback

    class Capture(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
            for name, parameter in prepared.model.named_parameters():
                if parameter.grad is not None:
                    captured[name] = parameter.grad.detach().clone()

    session = Session(prepared, run_directory, recorder, StopSignal(Recorder()))
    session.trainer.add_callback(Capture())
    session.trainer.train()
    assert session.progress.last_loss is not None
    return session.progress.last_loss, captured


def test_gradient_accumulation_changes_neither_loss_nor_gradients(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    steps = []
    for micro_batch, accumulation in ((1, 4), (4, 1)):
        output = tmp_path / f"run-{micro_batch}"
        settings = train_settings(
            base_model,
            rows,
            output,
            training__micro_batch_size=micro_batch,
            training__gradient_accumulation_steps=accumulation,
            training__max_steps=1,
            training__max_grad_norm=1e9,  # no clipping, so that gradients compare as they are
        )
        steps.append(gradients_of_first_step(prepare_run(settings, Recorder()), output))
    (loss, gradients), (other_loss, other_gradients) = steps
    assert loss == pytest.approx(other_loss, rel=1e-5)
    assert gradients.keys() == other_gradients.keys()
    assert len(gradients) == 2 * 7 * NUM_LAYERS
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, other_gradients[name], rtol=1e-4, atol=1e-6)
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


def adapter_digest(output: Path) -> str:
    return hashlib.sha256((output / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_one_seed_gives_one_adapter_and_another_seed_another(
    base_model: Path, rows: Path, tmp_path: Path, default_run: Path
) -> None:
    for name, seed in (("again", 0), ("other", 7)):
        train(train_settings(base_model, rows, tmp_path / name, training__seed=seed), Recorder())
    assert adapter_digest(tmp_path / "again") == adapter_digest(default_run) != adapter_digest(tmp_path / "other")


def test_adapter_and_record_have_the_usual_permissions_and_other_files_are_private(
    tmp_path: Path, default_run: Path
) -> None:
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    run = RunDirectory(default_run)
    shared = [run.run_file, *run.adapter.iterdir()]
    assert len(shared) > 4
    assert {path.name: path.stat().st_mode for path in shared if path.stat().st_mode != usual} == {}
    assert {path.stat().st_mode & 0o777 for path in (run.metrics_file, run.report_file)} == {0o600}


@pytest.mark.fast
def test_run_directory_holds_what_later_commands_need(base_model: Path, rows: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    settings = train_settings(
        base_model,
        rows,
        tmp_path / "run",
        data__eval_split="3",
        training__eval_steps=2,
        training__save_steps=1,
    )
    result = train(settings, recorder)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "done"
    assert record["settings"]["lora"]["rank"] == 16
    assert record["origins"]["model.dtype"] == "model.dtype"
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["data"]["train"]["fingerprint"]) == 64
    assert record["result"]["final_loss"] == result.final_loss
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step_done"] == [1, 2, 3]
    assert [line["step"] for line in lines if line["event"] == "eval_done"] == [2, 3]
    # Two are kept, complete, and nothing half-written is next to them.
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["step-2", "step-3"]
    assert [path.name for path in result.checkpoints] == ["step-2", "step-3"]
    assert (tmp_path / "run" / "checkpoints" / "step-3" / "optimizer.pt").is_file()
    assert (tmp_path / "run" / "adapter" / "chat_template.jinja").is_file()
    assert len([event for event in recorder.events if isinstance(event, StepDone)]) == 3
    assert len([event for event in recorder.events if isinstance(event, EvalDone)]) == 2
    assert len([event for event in recorder.events if isinstance(event, CheckpointSaved)]) == 3


def test_plan_predicts_the_steps_of_the_epochs(base_model: Path, rows: Path, tmp_path: Path) -> None:
    settings = train_settings(
        base_model,
        rows,
        tmp_path / "run",
        training__max_steps=None,
        training__epochs=1.5,
        training__micro_batch_size=2,
        training__gradient_accumulation_steps=2,
    )
    prepared = prepare_run(settings, Recorder())
    assert not (tmp_path / "run").exists()
    assert prepared.plan.num_steps == 5  # 12 rows / 4 = 3 steps an epoch
    result = run(prepared, Recorder())
    assert result.steps == 5


def test_not_enough_disk_is_found_before_anything_is_written(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskSpaceError, match="only 1000 B are free"):
        train(train_settings(base_model, rows, tmp_path / "run"), Recorder())
    assert not (tmp_path / "run").exists()


def test_paged_optimizer_needs_a_gpu(base_model: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(HardwareError, match="no GPU"):
        train(train_settings(base_model, rows, tmp_path / "run", training__optimizer="paged_adamw_8bit"), Recorder())


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "adamw_8bit"])
@pytest.mark.parametrize("method", ["nf4", "fp4", "none"])
def test_every_optimizer_trains_every_base(
    base_model: Path, rows: Path, tmp_path: Path, optimizer: str, method: str
) -> None:
    settings = train_settings(
        base_model, rows, tmp_path / "run", training__optimizer=optimizer, quantization__method=method
    )
    losses = train(settings, Recorder())
    assert losses.final_loss is not None
    assert losses.final_loss < 8


def test_checkpointing_changes_memory_not_results(base_model: Path, rows: Path, tmp_path: Path) -> None:
    for switch in ("on", "selective", "off"):
        train(train_settings(base_model, rows, tmp_path / switch, training__gradient_checkpointing=switch), Recorder())
    assert (
        adapter_digest(tmp_path / "on") == adapter_digest(tmp_path / "selective") == adapter_digest(tmp_path / "off")
    )


def test_truncated_and_dropped_rows_are_reported(base_model: Path, tmp_path: Path) -> None:
    data = write_jsonl(
        tmp_path / "d.jsonl",
        [
            {"prompt": "Say yes. ", "completion": "yes " * 30},
            {"prompt": "long " * 40, "completion": "never seen"},
            {"prompt": "a ", "completion": "b"},
        ],
    )
    recorder = Recorder()
    plan = prepare_run(
        train_settings(base_model, data, tmp_path / "run", data__max_length=16, data__accept_lost=True), recorder
    ).plan
    assert (plan.num_train_rows, plan.num_truncated_rows, plan.num_dropped_rows) == (2, 2, 1)
    warnings = [e.message for e in recorder.events if isinstance(e, Noted) and e.level == "warning"]
    assert any("2 rows longer than 16 tokens, truncated" in message for message in warnings)
    assert any("1 row without a token to train" in message for message in warnings)


def test_a_disk_that_fills_up_is_reported_and_complete_files_are_kept(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    from qlora_cli.training import session as module

    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_adapter", full)
    with pytest.raises(TrainingError, match=r"the disk of .* is full"):
        train(train_settings(base_model, rows, tmp_path / "run"), Recorder())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert (tmp_path / "run" / "checkpoints" / "step-3" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_split_of_a_local_file_is_refused(base_model: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"data.split: has no effect on .*rows.jsonl"):
        train(train_settings(base_model, rows, tmp_path / "run", data__split="validation"), Recorder())
    assert not (tmp_path / "run").exists()

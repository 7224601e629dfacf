"""A model run stage by stage computes what it computes as a whole, for every architecture that can be run so."""

import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_cli.calibrating.calibration import batches
from qlora_cli.calibrating.staged_model import StagedModel
from qlora_cli.errors import ModelError
from tests.support.models.tiny_models import FAMILIES, VOCABULARY_SIZE, tiny_model

ROWS = [torch.randint(3, VOCABULARY_SIZE, (length,), generator=torch.Generator().manual_seed(1)) for length in (12, 7)]
REFUSED = {
    "ctrl": "layers of a class of their own",
    "zamba2": "layers share weights",
}


def staged(model: PreTrainedModel, rows: list[torch.Tensor], *, alone: bool = False) -> StagedModel:
    state = dict(model.state_dict(keep_vars=False))
    return StagedModel(
        model.config,
        lambda name: state[name].clone(),
        batches(rows, 0, alone=alone),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def run(stages: StagedModel) -> None:
    for index in range(stages.num_stages):
        with stages.stage(index):
            stages.run(keep=True)


def whole_outputs(model: PreTrainedModel, batch: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the output of the last decoder layer, `(rows, seq, width)`."""
    made: list[torch.Tensor] = []
    last = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)][-1]
    hook = last.register_forward_hook(
        lambda _, __, output: made.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(input_ids=batch, attention_mask=mask.long(), use_cache=False)
    hook.remove()
    return made[0]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in REFUSED])
@pytest.mark.parametrize("alone", [False, True], ids=["padded", "alone"])
def test_stages_compute_what_the_whole_model_computes(family: str, alone: bool) -> None:
    model = tiny_model(family).float().eval()
    stages = staged(model, ROWS, alone=alone)
    run(stages)
    for batch, output in zip(batches(ROWS, 0, alone=alone), stages.outputs, strict=True):
        expected = whole_outputs(model, batch.ids, batch.mask)
        torch.testing.assert_close(output[..., batch.mask, :], expected[..., batch.mask, :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family in REFUSED])
def test_what_can_not_be_run_so_is_refused(family: str) -> None:
    with pytest.raises(ModelError, match="can't be run one after another"):
        run(staged(tiny_model(family).float().eval(), ROWS))


def test_only_the_open_stage_has_weights_and_changes_there_are_computed_with() -> None:
    model = tiny_model("llama").float().eval()
    stages = staged(model, ROWS)
    with stages.stage(0) as slots:
        assert all(slot.name.startswith("model.layers.0.") for slot in slots.values())
        assert not any(slot.module.get_parameter(slot.attribute).isnan().any() for slot in slots.values())
        stages.run(keep=True)
        before = [output.clone() for output in stages.outputs]
    assert all(slot.module.get_parameter(slot.attribute).isnan().all() for slot in slots.values())
    changed = staged(model, ROWS)
    with changed.stage(0) as slots:
        slots["model.layers.0.mlp.down_proj.weight"].module.get_parameter("weight").zero_()
        changed.run(keep=True)
    assert not any(torch.equal(one, other) for one, other in zip(before, changed.outputs, strict=True))

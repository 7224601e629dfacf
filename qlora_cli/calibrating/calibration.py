"""Choose the 4-bit codes of a model's weights by what its layers compute on given rows, before it is loaded.

Layer by layer, and each layer with the outputs of the calibrated ones before it (as GPTQ, arXiv 2210.17323): what a
layer's weights are multiplied with is summed up, their codes are chosen by these sums, and the layer with its new
weights computes the inputs of the next one. In memory are one layer with its sums, and the codes so far.
"""

import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from bitsandbytes import functional
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_cli.calibrating.calibration_cost import calibrated_shapes, calibration_seconds, rates_of_device
from qlora_cli.calibrating.calibration_rows import CalibrationRows, read_rows, tokens_needed
from qlora_cli.calibrating.moments import MomentSums
from qlora_cli.calibrating.staged_model import Batch, StagedModel
from qlora_cli.errors import ModelError
from qlora_cli.events import Noted, PhaseStarted, Reporter, WorkAdvanced
from qlora_cli.loading.load_plan import LoadPlan
from qlora_cli.loading.loader import read_headers
from qlora_cli.merging.planning.base_weights import Base, BaseModel, base_reader
from qlora_cli.merging.planning.conversions import read_conversions
from qlora_cli.merging.planning.stored_tensors import StoredTensors
from qlora_cli.merging.verifying.streamed import Slot
from qlora_cli.quantization.blocks import BLOCK_SIZE
from qlora_cli.quantization.calibrated_blocks import WeightSlice
from qlora_cli.quantization.calibrated_weights import HOST, CalibratedWeights, Codes
from qlora_cli.quantization.embedding import vocabulary_weights
from qlora_cli.quantization.load_report import CalibrationReport
from qlora_cli.quantization.methods import method_of
from qlora_cli.quantization.residuals import QuantizationResiduals, weighted_approximation
from qlora_cli.quantization.storage_plan import with_rows
from qlora_cli.settings.choices import METHODS, BaseWeights, quant_flag
from qlora_cli.settings.values import Datasets
from qlora_cli.timing.rates_file import DATA_SHEET
from qlora_cli.units import counted, format_duration

ORIGINAL_WEIGHTS = "Give the 16-bit model that it was made from"
BATCH_TOKENS = 2048  # of padded rows that a layer computes at a time


def calibrate_on(
    names: Datasets, load_plan: LoadPlan, reporter: Reporter, *, num_tokens: int | None = None
) -> CalibratedWeights:
    """Return the codes of the weights that `load_plan` quantizes, calibrated on the data sets `names`.

    `num_tokens` are computed, in whole rows; by default as many as the widest layer needs.

    Raises:
        DatasetNotFoundError: no such data set.
        DataError: it can't be read.
        ModelError: the model can't be calibrated.
    """
    check_calibratable(load_plan)
    rows = read_rows(names, load_plan, num_tokens or tokens_needed(load_plan), reporter)
    return Calibration(load_plan, rows, reporter).run()


def check_calibratable(load_plan: LoadPlan) -> None:
    """Check that there are codes to choose.

    Raises:
        ModelError: the model is not quantized while it is loaded, or not by a method that calibrates.
    """
    layout, source = load_plan.layout, load_plan.source
    if source.adapter is not None:
        raise ModelError(f"a base is to be calibrated, and {source.name} is an adapter of one", hint="Name the base.")
    if layout.prequantized is not None:
        raise ModelError(
            f"{source.base_name} is already quantized, so its codes can't be chosen any more",
            hint=f"{ORIGINAL_WEIGHTS}, or leave --calibrate out.",
        )
    if not layout.method.is_calibratable:
        methods = quant_flag(method for method in METHODS if method_of(method).is_calibratable)
        raise ModelError(f"{layout.describe()} has no codes that could be chosen", hint=f"Use {methods}.")


class Calibration:
    """Calibrates the weights that `load_plan` quantizes, and the initial adapter of some of them."""

    def __init__(
        self,
        load_plan: LoadPlan,
        rows: CalibrationRows,
        reporter: Reporter,
        *,
        residuals: QuantizationResiduals | None = None,
        chooses_codes: bool = True,
    ) -> None:
        """Read the headers of the weights, which are downloaded if they are not in the cache.

        `residuals` are filled in. Without `chooses_codes` each weight gets the nearest code, as by bitsandbytes.

        Raises:
            ModelError: the layers of the model can't be run one after another.
        """
        self._plan, self._rows, self._reporter = load_plan, rows, reporter
        self._residuals, self._chooses_codes = residuals, chooses_codes
        base = base_model(load_plan, reporter)
        self._quantized = base.quantized
        self._layout = load_plan.layout
        self._experts = frozenset(load_plan.layout.experts)
        self._num_weights = self._num_unseen = self._num_scarce = 0
        self._model = StagedModel(
            base.model.config,
            base_reader(base, Base(base, BaseWeights.ORIGINAL)),
            batches(rows.rows, load_plan.tokenizer.tokenizer.pad_token_id, alone=bool(self._experts)),
            device=load_plan.device,
            dtype=load_plan.layout.dtype,
            attention=load_plan.attention.implementation,
            trust_remote_code=load_plan.settings.model.trust_remote_code,
        )

    def run(self) -> CalibratedWeights:
        """Return the codes of all weights in decoder layers that are quantized."""
        codes: Codes = {}
        title, count, start = f"Calibrating {self._plan.settings.model.name}", self._model.num_stages, time.monotonic()
        self._reporter.report(PhaseStarted(title=title))
        for note in self._time_notes():
            self._reporter.report(Noted(message=note))
        for index in range(count):
            with self._model.stage(index) as slots:
                quantized = {name: slot for name, slot in slots.items() if name in self._quantized}
                codes |= self._calibrate_layer(quantized, is_last=index + 1 == count)
            left = (time.monotonic() - start) / (index + 1) * (count - index - 1)
            self._reporter.report(
                WorkAdvanced(title=title, unit="layer", num_done=index + 1, num_all=count, seconds_left=left)
            )
        for note in self._notes():
            self._reporter.report(Noted(message=note))
        report = CalibrationReport(
            data=self._rows.names,
            fingerprint=self._rows.fingerprint,
            num_rows=len(self._rows.rows),
            num_tokens=self._rows.num_tokens,
            seconds=time.monotonic() - start,
        )
        return CalibratedWeights(codes, report)

    def _time_notes(self) -> Iterator[str]:
        """Yield how long it takes, if that can be told before the first layer is done."""
        known, num_tokens = rates_of_device(self._plan.device), self._rows.num_tokens
        if known is not None:
            weights = calibrated_shapes(self._plan.shapes, self._layout)
            seconds = calibration_seconds(weights, num_tokens, known.rates)
            basis = "by the GPU's data sheet" if known.source == DATA_SHEET else f"by rates {known.source}"
            yield f"calibrating on {num_tokens:,} tokens takes about {format_duration(seconds)}, {basis}"

    def _calibrate_layer(self, slots: dict[str, Slot], *, is_last: bool) -> Codes:
        """Return codes for the weights of the open stage, which then computes the inputs of the next one with them."""
        sums = MomentSums(
            layers={name: slot.module for name, slot in slots.items() if name not in self._experts},
            experts={name: _weight(slot) for name, slot in slots.items() if name in self._experts},
        )
        with sums.watching():
            self._model.run(keep=False, before=lambda batch: sums.begin(batch.mask))
        made: Codes = {}
        for name, slot in slots.items():
            weight = _weight(slot)
            is_conv1d = isinstance(slot.module, Conv1D)  # stored as (in, out), quantized as (out, in)
            values = weight.T.contiguous() if is_conv1d else weight
            slices = self._slices(name, values, sums)
            self._count(slices)
            if not self._chooses_codes:
                slices = [replace(one, moments=None) for one in slices]
            codes, state = self._layout.method.calibrate(slices, values.shape, self._layout.settings)
            restored = functional.dequantize_4bit(codes, state)
            restored = self._with_adapter(name, values, restored, sums)
            weight.copy_(restored.T if is_conv1d else restored)
            if self._chooses_codes:
                state.to(HOST)
                made[name] = (codes.to(HOST), state)
        if not is_last:
            self._model.run(keep=True)
        return made

    def _with_adapter(self, name: str, values: torch.Tensor, restored: torch.Tensor, sums: MomentSums) -> torch.Tensor:
        """Record what the weight's adapter begins as, if it has one; return the weight that training begins with."""
        moments = sums.of(name)
        if self._residuals is None or moments is None or name not in self._residuals.ranks:
            return restored
        rank, residual = self._residuals.ranks[name], values.float() - restored.float()
        factors = weighted_approximation(residual, moments, rank)
        self._residuals.factors[name] = factors.to(HOST)
        return restored + (factors.left @ factors.right).to(restored.dtype)

    def _count(self, slices: list[WeightSlice]) -> None:
        self._num_weights += len(slices)
        self._num_unseen += sum(one.moments is None for one in slices)
        self._num_scarce += sum(one.moments is not None and not one.moments.has_correlations for one in slices)

    def _notes(self) -> Iterator[str]:
        """Yield notes on weights that the rows told too little about."""
        of = f"of {counted(self._num_weights, 'weight')}, each expert's counted, "
        if self._num_unseen:
            yield f"{of}{self._num_unseen:,} had no token to be calibrated on: they get the nearest codes"
        if self._num_scarce:
            yield f"{of}{self._num_scarce:,} had fewer tokens than features: of them the scales alone were calibrated"

    def _slices(self, name: str, values: torch.Tensor, sums: MomentSums) -> list[WeightSlice]:
        if name not in self._experts:
            return [WeightSlice(values=values, moments=sums.of(name))]
        if values.dim() != 3 or values[0].numel() % BLOCK_SIZE:  # one matrix for all, or a block spans two experts
            return [WeightSlice(values=values.view(len(values), -1), moments=None)]
        return [
            WeightSlice(values=expert, moments=sums.of(name, number), is_transposed=sums.is_transposed(name))
            for number, expert in enumerate(values)
        ]


def batches(rows: Sequence[torch.Tensor], pad_id: int, *, alone: bool = False) -> list[Batch]:
    """Return rows of token ids, `(seq,)` each, as padded batches, the longest first; `alone`: one row each."""
    made: list[Batch] = []
    ordered = sorted(rows, key=len, reverse=True)
    while ordered:
        count = 1 if alone else max(1, BATCH_TOKENS // len(ordered[0]))
        chosen, ordered = ordered[:count], ordered[count:]
        ids = nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=pad_id)
        lengths = torch.tensor([len(row) for row in chosen])
        made.append(Batch(ids=ids, mask=torch.arange(ids.shape[1]) < lengths[:, None]))
    return made


def base_model(load_plan: LoadPlan, reporter: Reporter) -> BaseModel:
    """Return the base of a planned load, with its vocabulary extended as loading extends it.

    The headers of its weights are read, which are downloaded if they are not in the cache.
    """
    checkpoint = read_headers(load_plan, reporter)
    config, settings, layout = deepcopy(load_plan.base.config), load_plan.settings.model, load_plan.layout
    needed = load_plan.num_rows if load_plan.num_own_rows is not None else 0
    trust = settings.trust_remote_code
    model = with_rows(load_plan.shapes, config, needed, layout.dtype, trust_remote_code=trust)
    tensors = StoredTensors(load_plan.source.path, checkpoint)
    conversions = read_conversions(model, list(tensors.headers), load_plan.base.key_mapping)
    return BaseModel(
        model=model,
        layout=layout,
        tensors=tensors,
        groups=conversions.groups,
        num_rows=needed or None,
        extended=frozenset(vocabulary_weights(model)) if needed else frozenset(),
        quantized=frozenset(entry.name for entry in layout.inventory.entries if entry.is_quantized),
        packed=frozenset(),
    )


def _weight(slot: Slot) -> torch.Tensor:
    return slot.module.get_parameter(slot.attribute).data

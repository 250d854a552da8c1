"""The stages of one run, in order: prepared, trained, checkpointed, and taken up again where they stopped."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch.optim import Optimizer

from vlmix.core.errors import CheckpointError, InterruptedRunError
from vlmix.core.interfaces import Source
from vlmix.core.parts import read_part
from vlmix.data.ledger import FILE_NAME, Ledger
from vlmix.models.adapters import bare, merged_tensors, reset_adapters
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.plan import shape_only
from vlmix.models.processing import VlmixProcessor
from vlmix.moe.install import expert_layers
from vlmix.train import checkpoint
from vlmix.train.build import Setup, open_sources, stage_processor
from vlmix.train.checkpoint import CHECKPOINTS, Found, RunState
from vlmix.train.data_sets import row_notes
from vlmix.train.interrupt import StopRequest
from vlmix.train.loader import Loader
from vlmix.train.loop import StageLoop
from vlmix.train.optim import build_optimizer
from vlmix.train.order import DataOrder, group_weights
from vlmix.train.progress import ProgressLine
from vlmix.train.reading import NamedSource, SampleEncoder, StepReader
from vlmix.train.recipe import Recipe, Stage
from vlmix.train.records import MetricsFile, Sink, TensorBoard, draw_curves, read_metrics
from vlmix.train.solo import Running, running, select_for
from vlmix.train.trainable import Selection, table
from vlmix.train.transforms import TRANSFORMS
from vlmix.train.transforms._base import Transform

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Stages:
    """The stages of ``recipe`` with the model they train; everything is written under ``out``."""

    recipe: Recipe
    out: Path
    setup: Setup
    console: Console
    sources: tuple[list[Source], ...]
    orders: tuple[DataOrder, ...]
    ledgers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @staticmethod
    def plan(recipe: Recipe, out: Path, setup: Setup, console: Console) -> Stages:
        """Check every stage before the first begins: its globs against the model, its data for rows.

        Raises:
            RecipeError: if a glob matches nothing or a source is empty.
            PlanError: if a solo stage's projector does not fit its encoder.
            CheckpointError: if a stage starts from a folder that is no model.

        """
        shapes = _shapes(recipe, setup)
        for index, stage in enumerate(recipe.stages):
            whole = stage.solo is None and shapes is not None
            if shapes is not None:
                _reshape(stage, shapes)
            ran = shapes if whole else running(setup, stage, (recipe.seed, index)).model
            select_for(stage, cast("VlmixForConditionalGeneration", ran))
            if stage.start_from != "previous" and not (Path(stage.start_from) / "config.json").is_file():
                raise CheckpointError(
                    f"start_from: {stage.start_from} is not a model folder; it has no config.json"
                )
        sources = tuple(open_sources(stage) for stage in recipe.stages)
        for stage, opened in zip(recipe.stages, sources, strict=True):
            for note in row_notes(stage, opened):
                console.print(f"warning: stage {stage.name}: {note}", markup=False, soft_wrap=True)
        sizes = ([len(source) for source in opened] for opened in sources)
        orders = tuple(stage_order(recipe, index, found) for index, found in enumerate(sizes))
        return Stages(recipe, out, setup, console, sources, orders)

    def run(self, found: Found | None, stop: StopRequest) -> None:
        """Run every stage from the beginning, or from the checkpoint that was found.

        Raises:
            CheckpointError: if the data changed since the checkpoint.
            InterruptedRunError: if a signal asked to stop; a checkpoint was saved first.

        """
        for stage in self.recipe.stages[: found.state.stage_index + 1 if found is not None else 0]:
            _reshape(stage, self.setup.model)
        for index in range(found.state.stage_index if found is not None else 0, len(self.recipe.stages)):
            here = found if found is not None and found.state.stage_index == index else None
            if here is None:
                self._prepare(self.recipe.stages[index])
            ran = running(self.setup, self.recipe.stages[index], (self.recipe.seed, index))
            if here is not None:
                self._take_up(here, ran)
            if here is None or here.state.step < here.state.steps:
                self._stage(index, ran, here, stop)

    def _take_up(self, found: Found, ran: Running) -> None:
        state = found.state
        if state.order != self.orders[state.stage_index].fingerprint:
            raise CheckpointError(
                f"the data of stage {state.stage} changed since {found.folder}: another number of rows. "
                "Restore the data, or start again in another folder"
            )
        checkpoint.load_weights(found.folder, ran.kept)
        checkpoint.load_random_state(found.folder)
        self.ledgers.update(state.ledgers)
        self.console.print(f"resuming stage {state.stage} after step {state.step} of {state.steps}")

    def _stage(self, index: int, ran: Running, found: Found | None, stop: StopRequest) -> None:
        stage = self.recipe.stages[index]
        self.setup.model.zero_grad(set_to_none=True)
        selection = select_for(stage, ran.model)
        self.console.print(table(selection, stage.name))
        optimizer = build_optimizer(selection, stage.optimizer, ran.model)
        if found is not None:
            checkpoint.load_optimizer(found.folder, selection.parameters, optimizer)
        first_step = found.state.step if found is not None else 0
        self._train(index, first_step, _Trained(ran, selection, optimizer), stop)
        draw_curves(read_metrics(self.out / METRICS), self.out / "curves.png")
        if stop.signal:
            raise InterruptedRunError(
                f"stopped by {stop.signal} in stage {stage.name}; the run was saved. Continue with --resume"
            )

    def _prepare(self, stage: Stage) -> None:
        """Start from another model's weights where asked to, then apply the transforms."""
        if stage.start_from != "previous":
            load_model_weights(self.setup.model, stage.start_from)
        for raw in stage.before:
            self.console.print(_transform(raw).apply(self.setup.model), markup=False, soft_wrap=True)

    def _train(self, index: int, first_step: int, trained: _Trained, stop: StopRequest) -> None:
        stage, order = self.recipe.stages[index], self.orders[index]
        before = sum(earlier.steps for earlier in self.orders[:index])
        metrics = MetricsFile(self.out / METRICS, before + first_step)
        sinks: list[Sink] = [
            metrics,
            TensorBoard(self.out / "tensorboard", before + first_step),
            ProgressLine(self.console, stage.name, order.steps, first_step),
        ]
        with ExitStack() as stack:
            for sink in sinks:
                stack.callback(sink.close)
            ledger = self._ledger(stage)
            loader = stack.enter_context(self._loader(index, trained.running.processor))
            loop = StageLoop(
                stage=stage,
                model=trained.running.model,
                selection=trained.selection,
                optimizer=trained.optimizer,
                loader=loader,
                ledger=ledger,
                sinks=sinks,
                steps_before=before,
                folder=self.out,
            )

            def after_step(done: int) -> bool:
                is_due = stage.save_every_steps is not None and done % stage.save_every_steps == 0
                if is_due or done == order.steps or stop.signal:
                    metrics.sync()
                    self.ledgers[stage.name] = ledger.to_dict()
                    self._save(index, done, trained)
                return bool(stop.signal)

            loop.run(first_step, after_step)
        self.console.print(
            f"{stage.name}: {ledger.read} rows read = {ledger.used} used + {ledger.quarantined} quarantined"
        )

    def _save(self, index: int, done: int, trained: _Trained) -> None:
        order = self.orders[index]
        state = RunState(
            stage=self.recipe.stages[index].name,
            stage_index=index,
            step=done,
            steps=order.steps,
            global_step=sum(earlier.steps for earlier in self.orders[:index]) + done,
            seed=self.recipe.seed,
            order=order.fingerprint,
            ledgers=self.ledgers,
            versions=checkpoint.versions(),
        )
        named = trained.selection.parameters
        checkpoint.save(self.out / CHECKPOINTS, state, trained.running.kept, named, trained.optimizer)

    def _ledger(self, stage: Stage) -> Ledger:
        path = self.out / FILE_NAME
        if stage.name in self.ledgers:
            return Ledger.from_dict(path, self.ledgers[stage.name], max_bad=stage.max_bad)
        return Ledger(path, max_bad=stage.max_bad)

    def _loader(self, index: int, processor: VlmixProcessor) -> Loader:
        stage = self.recipe.stages[index]
        names = [f"{stage.name}.data.{i}.{data.source['kind']}" for i, data in enumerate(stage.data)]
        sources = [NamedSource(*pair) for pair in zip(names, self.sources[index], strict=True)]
        reader = StepReader(
            self.orders[index],
            sources,
            SampleEncoder(stage_processor(processor, stage), stage.batching.pack),
            stage.batching,
            stage.micro_batch_size or stage.batch_size,
        )
        return Loader(reader, workers=stage.workers, timeout=stage.worker_timeout)


@dataclass(frozen=True, slots=True)
class _Trained:
    """What a stage trains, and with what."""

    running: Running
    selection: Selection
    optimizer: Optimizer


def _transform(raw: dict[str, Any]) -> Transform:
    return TRANSFORMS.get(raw["kind"])(read_part(TRANSFORMS, raw))


def _shapes(recipe: Recipe, setup: Setup) -> VlmixForConditionalGeneration | None:
    """The model with shapes alone, where stages change its structure; they are checked on it."""
    kinds = {raw["kind"] for stage in recipe.stages for raw in stage.before}
    if all(TRANSFORMS.get(kind).reshape is Transform.reshape for kind in kinds):
        return None
    return shape_only(copy.deepcopy(setup.model.config), torch.float32)


def _reshape(stage: Stage, model: VlmixForConditionalGeneration) -> None:
    """Give ``model`` the structure it has in ``stage``."""
    for raw in stage.before:
        _transform(raw).reshape(model)


def stage_order(recipe: Recipe, index: int, sizes: Sequence[int]) -> DataOrder:
    """The order in which stage ``index`` draws rows from sources of these sizes.

    Raises:
        RecipeError: if a source is empty or its weight too small.

    """
    stage = recipe.stages[index]
    shares = group_weights([data.group for data in stage.data], sizes)
    return DataOrder.plan(
        sizes,
        [data.weight or share for data, share in zip(stage.data, shares, strict=True)],
        stage.batch_size,
        (recipe.seed, index),
        steps=stage.steps,
        epochs=stage.epochs,
    )


def load_model_weights(model: VlmixForConditionalGeneration, folder: str) -> None:
    """Copy the weights of a model folder into ``model``.

    Where the two have different adapters, the folder's are merged into its weights and those of ``model``
    start anew.

    Raises:
        CheckpointError: if it is another kind of model, has other experts, or a tensor does not fit.

    """
    other = VlmixForConditionalGeneration.from_pretrained(folder, local_files_only=True)
    theirs, tensors = other.config.adapter_settings(), other.state_dict()
    _check_experts(other, model, folder)
    try:
        if theirs == model.config.adapter_settings():
            model.load_state_dict(tensors)
            return
        with bare(model):
            model.load_state_dict(merged_tensors(tensors, theirs))
        reset_adapters(model)
    except RuntimeError as error:
        raise CheckpointError(f"start_from: the weights of {folder} do not fit: {error}") from None


def _check_experts(
    other: VlmixForConditionalGeneration, model: VlmixForConditionalGeneration, folder: str
) -> None:
    theirs, ours = ({layer.name: layer.router_experts for layer in expert_layers(m)} for m in (other, model))
    if theirs != ours:
        raise CheckpointError(
            f"start_from: {folder} has {len(theirs)} layers of experts, and the model of this stage, so far, "
            f"{len(ours)}; places and numbers of experts must be the same. Where the folder is dense, take "
            "the mixture out of `model.experts` and put it into this stage, `before: [{kind: upcycle, …}]`, "
            "which comes after start_from; else give the recipe the folder's mixtures in `model.experts`"
        )

"""The stages of one run, in order: prepared, trained, checkpointed, and taken up again where they stopped."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from torch.optim import Optimizer
from transformers import PreTrainedModel

from vlmix.core.errors import CheckpointError, InterruptedRunError
from vlmix.core.interfaces import Source
from vlmix.data.ledger import FILE_NAME, Ledger
from vlmix.models.looking import obstacle
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.processing import VlmixProcessor
from vlmix.moe.parallel import check_experts
from vlmix.train import aligned, checkpoint
from vlmix.train.build import Setup, open_sources, stage_processor
from vlmix.train.checkpoint import CHECKPOINTS, Found, RunState
from vlmix.train.compiling import compiled_layers
from vlmix.train.continual._base import Memory
from vlmix.train.continual._divided import Kept
from vlmix.train.continual._tasks import Tasks, conversations, mixed_weights
from vlmix.train.data_sets import row_notes
from vlmix.train.dividing import divide, has_shapes_alone, renew, same_draws
from vlmix.train.feature_cache import (
    LOOKS,
    FeatureCache,
    Looks,
    feature_cache,
    feature_store,
    looks_of_stages,
    remove_own,
)
from vlmix.train.finished import publish_model
from vlmix.train.interrupt import StopRequest
from vlmix.train.loader import Loader
from vlmix.train.loop import StageLoop
from vlmix.train.optim import build_optimizer
from vlmix.train.order import DataOrder, group_weights
from vlmix.train.parallel.idle import Idle
from vlmix.train.parallel.processes import Processes
from vlmix.train.progress import ProgressLine
from vlmix.train.reading import NamedSource, SampleEncoder, StepReader
from vlmix.train.recipe import Recipe, Stage
from vlmix.train.records import MetricsFile, Sink, TensorBoard, draw_curves, read_metrics, reused_stage
from vlmix.train.solo import Running, draw_from, running, select_for, stage_seed
from vlmix.train.structure import load_model_weights, reshape, shapes_of, transform
from vlmix.train.trainable import Selection, table
from vlmix.train.upkeep import Upkeep

METRICS, MODELS = "metrics.jsonl", "models"
_METHOD = "continual"  # the stem of a checkpoint's file


@dataclass(frozen=True)
class Stages:
    """The stages of ``recipe`` with the model they train; everything is written under ``out``."""

    recipe: Recipe
    out: Path
    setup: Setup
    console: Console
    sources: tuple[list[Source], ...]
    orders: tuple[DataOrder, ...]
    tasks: Tasks
    memories: tuple[list[Memory], ...]
    looks: tuple[Looks, ...]
    ledgers: dict[str, dict[str, Any]] = field(default_factory=dict)
    team: Processes = field(default_factory=Processes)

    @staticmethod
    def plan(
        recipe: Recipe, out: Path, setup: Setup, console: Console, processes: Processes | None = None
    ) -> Stages:
        """Check every stage before the first begins: its globs against the model, its data for rows.

        Raises:
            RecipeError: if a glob matches nothing or a source is empty.
            PlanError: if a solo stage's projector does not fit its encoder, or experts do not divide.
            CheckpointError: if a stage starts from a folder that is no model.

        """
        tasks = Tasks.of(recipe, processes)
        shapes = shapes_of(recipe, setup, tasks)
        obstacles: list[str] = []
        decoders: list[PreTrainedModel] = []
        for index, stage in enumerate(recipe.stages):
            whole = stage.solo is None and shapes is not None
            if shapes is not None:
                reshape(stage, shapes)
            ran = shapes if whole else running(setup, stage, stage_seed(recipe, index)).model
            checked = cast("VlmixForConditionalGeneration", ran)
            if tasks.reshapes(stage):
                checked = copy.deepcopy(checked)
                tasks.reshape(stage, checked)
            select_for(tasks.meant(stage, checked), checked)
            obstacles.append(obstacle(checked.model))
            decoders.append(checked.model.language_model)
            if stage.start_from != "previous" and not (Path(stage.start_from) / "config.json").is_file():
                raise CheckpointError(
                    f"start_from: {stage.start_from} is not a model folder; it has no config.json"
                )
        if processes is not None and processes.experts is not None:
            check_experts(decoders, recipe.parallel.experts)
        sources = tuple(open_sources(stage) for stage in recipe.stages)
        for stage, opened in zip(recipe.stages, sources, strict=True):
            for note in row_notes(stage, opened):
                console.print(f"warning: stage {stage.name}: {note}", markup=False, soft_wrap=True)
        orders: list[DataOrder] = []
        memories: list[list[Memory]] = []
        for index, opened in enumerate(sources):
            memories.append(tasks.memories(recipe.stages[index]))
            orders.append(stage_order(recipe, index, [len(source) for source in opened], memories[index]))
            tasks.planned(recipe.stages[index], opened, orders[index])
        say = partial(console.print, markup=False, soft_wrap=True)
        looks = looks_of_stages(recipe, obstacles, orders, say)
        found = (sources, tuple(orders), tasks, tuple(memories), looks)
        return Stages(recipe, out, setup, console, *found, team=processes or Processes())

    def run(self, found: Found | None, stop: StopRequest) -> None:
        """Run every stage from the beginning, or from the checkpoint that was found.

        Raises:
            CheckpointError: if the data changed since the checkpoint.
            InterruptedRunError: if a signal asked to stop; a checkpoint was saved first.

        """
        for stage in self.recipe.stages[: found.state.stage_index + 1 if found is not None else 0]:
            reshape(stage, self.setup.model)
        if found is not None:
            self.tasks.reshape(self.recipe.stages[found.state.stage_index], self.setup.model)
        for index in range(found.state.stage_index if found is not None else 0, len(self.recipe.stages)):
            here = found if found is not None and found.state.stage_index == index else None
            ran = self._ready(index, here)
            if self.recipe.stages[index].solo is not None:
                self._alone(index, ran, here, stop)
            elif here is None or here.state.step < here.state.steps:
                self._stage(index, ran, here, stop)
            self._finish(self.recipe.stages[index], self._loader(index, ran.processor).reader, ran)
        remove_own(self.recipe, self.out)

    def _ready(self, index: int, found: Found | None) -> Running:
        """The model of a stage as it begins, or as the checkpoint found it."""
        stage = self.recipe.stages[index]
        before = None
        if found is None:
            before = renew(self.setup, self.recipe.stages[: index + 1], self.out, self.team)
            with same_draws(self.team):
                self._prepare(stage)
        ran = running(self.setup, stage, stage_seed(self.recipe, index))
        meant, ahead = self.tasks.meant(stage, ran.model), self.looks[index] != "inside"
        source = before if found is None else found.folder
        divide(self.setup, meant, ran, self.team, source, looks_ahead=ahead)
        if found is not None:
            self._take_up(found, ran)
        else:
            with same_draws(self.team):
                self.tasks.fill(stage, ran.model)
        return ran

    def _alone(self, index: int, ran: Running, found: Found | None, stop: StopRequest) -> None:
        """A solo stage: its result taken over where there is one, otherwise computed and kept.

        Random numbers start anew before and after it, so that neither way disturbs what follows.
        """
        stage, order = self.recipe.stages[index], self.orders[index]
        root = Path(self.recipe.results) if self.recipe.results else self.out.parent / aligned.FOLDER
        results, folder = aligned.Results(root, self.out, self.console, self.team), None
        if found is None:
            draw_from(stage_seed(self.recipe, index), self.team.rank)
            selection, ahead = select_for(stage, ran.model), self.looks[index] != "inside"
            folder = results.begin(stage, ran, selection, order, looks_ahead=ahead)
        if folder is not None:
            self._tell_reused(index, folder)
        else:
            if found is None or found.state.step < found.state.steps:
                self._stage(index, ran, found, stop)
            results.end(stage, ran)
        draw_from((self.recipe.seed, index), self.team.rank)

    def _tell_reused(self, index: int, folder: Path) -> None:
        if not self.team.is_main:
            return
        name, steps = self.recipe.stages[index].name, self.orders[index].steps
        before = sum(earlier.steps for earlier in self.orders[:index])
        with closing(MetricsFile(self.out / METRICS, before)) as metrics:
            metrics.step(reused_stage(name, steps, before + steps, folder))

    def _take_up(self, found: Found, ran: Running) -> None:
        state = found.state
        if state.order != self.orders[state.stage_index].fingerprint:
            raise CheckpointError(
                f"the data of stage {state.stage} changed since {found.folder}: another number of rows. "
                "Restore the data, or start again in another folder"
            )
        if self.team.world == 1:
            checkpoint.load_weights(found.folder, ran.kept)
        stage = self.recipe.stages[state.stage_index]
        if stage.task:
            select_for(self.tasks.meant(stage, ran.model), ran.model)
        self.tasks.method.load(Kept(found.folder, _METHOD), ran.model)
        checkpoint.load_random_state(found.folder, self.team)
        self.ledgers.update(state.ledgers)
        self.console.print(f"resuming stage {state.stage} after step {state.step} of {state.steps}")

    def _stage(self, index: int, ran: Running, found: Found | None, stop: StopRequest) -> None:
        stage = self.recipe.stages[index]
        self.setup.model.zero_grad(set_to_none=True)
        selection = select_for(self.tasks.meant(stage, ran.model), ran.model)
        self.console.print(table(selection, stage.name))
        optimizer = build_optimizer(selection, stage.optimizer, ran.model)
        before = sum(order.steps for order in self.orders[:index])
        upkeep = Upkeep(stage, selection, self.out, before, writes=self.team.is_main)
        upkeep.begin(found)
        if found is not None:
            checkpoint.load_optimizer(found.folder, selection.parameters, optimizer)
        elif stage.task:
            self.tasks.method.begin(ran.model)
        first_step = found.state.step if found is not None else 0
        self._train(index, first_step, _Trained(ran, selection, optimizer, upkeep), stop)
        if self.team.is_main:
            draw_curves(read_metrics(self.out / METRICS), self.out / "curves.png")
        if stop.signal:
            raise InterruptedRunError(
                f"stopped by {stop.signal} in stage {stage.name}; the run was saved. Continue with --resume"
            )

    def _finish(self, stage: Stage, reader: StepReader, ran: Running) -> None:
        """What follows the last step; done again where a run goes on from the stage's last checkpoint."""
        if stage.task:
            self.tasks.method.end(ran.model, conversations(reader, ran.model, self.team))
        if stage.publish:
            publish_model(self.setup, self.out / MODELS / stage.name, self.team)

    def _prepare(self, stage: Stage) -> None:
        """Start from another model's weights where asked to, then apply the transforms."""
        if stage.start_from != "previous" and not has_shapes_alone(self.setup.model):
            load_model_weights(self.setup.model, stage.start_from)
        for raw in stage.before:
            self.console.print(transform(raw).apply(self.setup.model), markup=False, soft_wrap=True)
        self.tasks.reshape(stage, self.setup.model)

    def _train(self, index: int, first_step: int, trained: _Trained, stop: StopRequest) -> None:
        stage, order = self.recipe.stages[index], self.orders[index]
        before = sum(earlier.steps for earlier in self.orders[:index])
        with ExitStack() as stack:
            sinks = self._sinks(stage.name, before, first_step, order.steps) if self.team.is_main else []
            for sink in sinks:
                stack.callback(sink.close)
            if stage.compile:
                stack.enter_context(compiled_layers(trained.running.model.model.decoder))
            ledger = self._ledger(stage)
            features = self._features(index, trained.running)
            loader = stack.enter_context(self._loader(index, trained.running.processor, features))
            loop = StageLoop(
                stage=stage,
                model=trained.running.model,
                selection=trained.selection,
                optimizer=trained.optimizer,
                upkeep=trained.upkeep,
                loader=loader,
                ledger=ledger,
                sinks=sinks,
                steps_before=before,
                folder=self.out,
                method=self.tasks.method if stage.task else None,
                features=features,
                processes=self.team,
                idle=Idle(replace(loader.reader.encoder, features=None)) if self.team.world > 1 else None,
            )

            def after_step(done: int) -> bool:
                if self.team.any(bool(stop.signal)):
                    stop.signal = stop.signal or "a signal to another process"
                is_due = stage.save_every_steps is not None and done % stage.save_every_steps == 0
                if done == order.steps:
                    trained.upkeep.hand_on(trained.optimizer)
                if is_due or done == order.steps or stop.signal:
                    for sink in sinks:
                        sink.sync()
                    self.ledgers[stage.name] = ledger.to_dict()
                    self._save(index, done, trained)
                return bool(stop.signal)

            loop.run(first_step, after_step)
        if features is not None and self.team.is_main:
            features.write_down(self.out / LOOKS, stage.name, min(order.draws, sum(order.sizes)))
        if features is not None and features.summary:
            self.console.print(f"{stage.name}: {features.summary}", soft_wrap=True)
        self.console.print(
            f"{stage.name}: {ledger.read} rows read = {ledger.used} used + {ledger.quarantined} quarantined"
        )

    def _sinks(self, stage: str, before: int, first_step: int, steps: int) -> list[Sink]:
        return [
            MetricsFile(self.out / METRICS, before + first_step),
            TensorBoard(self.out / "tensorboard", before + first_step),
            ProgressLine(self.console, stage, steps, first_step),
        ]

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
        more = {_METHOD: self.tasks.method.state(), **trained.upkeep.state()}
        what = (trained.running.kept, named, trained.optimizer)
        checkpoint.save(self.out / CHECKPOINTS, state, *what, self.team, more)

    def _ledger(self, stage: Stage) -> Ledger:
        path = self.out / FILE_NAME if self.team.is_main else None
        if stage.name in self.ledgers:
            return Ledger.from_dict(path, self.ledgers[stage.name], max_bad=stage.max_bad)
        return Ledger(path, max_bad=stage.max_bad)

    def _features(self, index: int, ran: Running) -> FeatureCache | None:
        stage = self.recipe.stages[index]
        images = stage_processor(ran.processor, stage).image_processor

        def say(text: str) -> None:
            self.console.print(text, markup=False, soft_wrap=True)

        store = feature_store(self.recipe, self.out, say, self.team.world)
        return feature_cache(self.looks[index], stage, ran.model.model, images, store)

    def _loader(self, index: int, processor: VlmixProcessor, features: FeatureCache | None = None) -> Loader:
        stage = self.recipe.stages[index]
        names = [f"{stage.name}.data.{i}.{data.source['kind']}" for i, data in enumerate(stage.data)]
        sources = [NamedSource(*pair) for pair in zip(names, self.sources[index], strict=True)]
        sources += [NamedSource(f"{stage.name}.{m.name}", m.source) for m in self.memories[index]]
        reader = StepReader(
            self.orders[index],
            sources,
            SampleEncoder(
                stage_processor(processor, stage),
                stage.batching.pack,
                None if features is None else features.reader,
            ),
            stage.batching,
            stage.micro_batch_size or stage.batch_size,
            self.team.rank,
            self.team.world,
        )
        return Loader(reader, workers=stage.workers, timeout=stage.worker_timeout, processes=self.team)


@dataclass(frozen=True, slots=True)
class _Trained:
    """What a stage trains, and with what."""

    running: Running
    selection: Selection
    optimizer: Optimizer
    upkeep: Upkeep


def stage_order(
    recipe: Recipe, index: int, sizes: Sequence[int], memories: Sequence[Memory] = ()
) -> DataOrder:
    """The order in which stage ``index`` draws rows from sources of these sizes, and from memories.

    Raises:
        RecipeError: if a source is empty or its weight too small.

    """
    stage = recipe.stages[index]
    shares = group_weights([data.group for data in stage.data], sizes)
    weights = [data.weight or share for data, share in zip(stage.data, shares, strict=True)]
    return DataOrder.plan(
        [*sizes, *(len(memory.source) for memory in memories)],
        mixed_weights(weights, sizes, memories),
        stage.batch_size,
        stage_seed(recipe, index),
        steps=stage.steps,
        epochs=stage.epochs,
    )

"""Any task of EleutherAI's lm-evaluation-harness, asked of the language side: `pip install 'vlmix[eval]'`."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, field_validator

from vlmix.core.errors import InputError
from vlmix.core.interfaces import Benchmark
from vlmix.core.parts import BENCHMARKS
from vlmix.core.sample import Answer, Decoding, Responder, Sample, Score, Turn
from vlmix.core.settings import PartSettings

_MAIN: Final = ("acc", "exact_match", "em", "f1")
_SHARES: Final = (*_MAIN, "acc_norm", "acc_mutual_info", "acc_bytes", "byte_probability")


class LmEvalSettings(PartSettings):
    """``tasks`` are the harness's names, separated by commas; ``path`` is a folder with more task files.

    ``fewshot`` is the number of examples before each question, the task's own unless given. Data of the
    harness's own tasks is fetched by it from the hub.
    """

    kind: Literal["lm_eval"] = "lm_eval"  # pyright: ignore[reportIncompatibleVariableOverride]
    tasks: str
    path: Path | None = None
    fewshot: int | None = Field(default=None, ge=0)

    @field_validator("tasks", mode="before")
    @classmethod
    def _joined(cls, given: Any) -> Any:
        return ",".join(given) if isinstance(given, list | tuple) else given


@BENCHMARKS.register("lm_eval")
class LmEval(Benchmark):
    """Figures are the harness's own, ``TASK.METRIC``; ``accuracy`` is the mean of what each question got.

    A question gets its task's ``acc``, ``exact_match``, ``em`` or ``f1``, whichever comes first; of a task
    with none of them, 0.
    """

    settings_class = LmEvalSettings
    settings: LmEvalSettings
    headline = "accuracy"
    paper = "The Language Model Evaluation Harness (Gao et al., doi:10.5281/zenodo.10256836)"
    canned = False

    def __init__(self, settings: LmEvalSettings) -> None:
        super().__init__(settings)
        self._found: dict[str, Mapping[str, Any]] = {}

    @property
    def units(self) -> Mapping[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Every figure that is no known share of 1."""
        names = {f"{_task_of(i)}.{metric}" for i, row in self._found.items() for metric in row}
        return {name: "" for name in names if name.rpartition(".")[2] not in _SHARES}

    def samples(self) -> Sequence[Sample]:
        """Every question of every task, as the harness words it, with its examples left out.

        Raises:
            InputError: if the harness is not installed, or knows no such task.

        """
        return [
            _sample(name, number, task, doc)
            for name, task in sorted(self._tasks.items())
            for number, doc in enumerate(task.eval_docs)
        ]

    def ask(self, responder: Responder, samples: Sequence[Sample], decoding: Decoding) -> Iterable[Answer]:
        """Let the harness ask these questions, and give what it noted of each."""
        harness = _harness()
        from vlmix.evals.harness import adapter

        wanted = defaultdict[str, list[int]](list)
        for sample in samples:
            wanted[_task_of(sample.id)].append(int(sample.id.rpartition("/")[2]))
        told = harness.simple_evaluate(
            model=adapter(responder, decoding),
            tasks=[self._tasks[name] for name in wanted],
            num_fewshot=self.settings.fewshot,
            samples=dict(wanted),
            bootstrap_iters=0,
        )
        for name, rows in told["samples"].items():
            for row in reversed(rows):  # the first of several filters stays
                self._found[f"{name}/{row['doc_id']}"] = {key: row[key] for key in row["metrics"]}
        return [Answer(sample.id, json.dumps(self._found[sample.id], default=str)) for sample in samples]

    def score(self, sample: Sample, answer: Answer) -> Score:
        """What the harness noted."""
        row = {} if answer.error else self._found.get(sample.id, {})
        main = next((row[name] for name in _MAIN if isinstance(row.get(name), int | float)), 0.0)
        return Score(sample.id, min(1.0, max(0.0, float(main))), answer.text, sample.task, sample.group)

    def summarise(self, scores: Sequence[Score]) -> Mapping[str, float]:
        """The mean over questions, and each task's metrics put together by the harness's own rule.

        Raises:
            InputError: if there is no score.

        """
        if not scores:
            raise InputError("lm_eval: there is no score to sum up")
        figures = {"accuracy": math.fsum(score.value for score in scores) / len(scores)}
        items = defaultdict[tuple[str, str], list[Any]](list)
        for score in sorted(scores, key=lambda score: score.sample_id):
            # Groups that are drawn twice for an interval carry a mark behind their name.
            for metric, value in self._found.get(score.sample_id.partition("\0")[0], {}).items():
                items[score.task, metric].append(value)
        for (task, metric), values in items.items():
            found = self._tasks[task].aggregation()[metric](values)
            if isinstance(found, int | float):
                figures[f"{task}.{metric}"] = float(found)
        return figures

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """A task of two questions with two choices each, in files of its own."""
        rows = [{"text": "The sky is", "choices": ["blue", "loud"], "label": 0}]
        rows.append({"text": "Grass is", "choices": ["silent", "green"], "label": 1})
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        task = {
            "task": "vlmix_tiny",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{label}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (folder / "vlmix_tiny.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML too
        return cls(LmEvalSettings(tasks="vlmix_tiny", path=folder))

    @cached_property
    def _tasks(self) -> Mapping[str, Any]:
        harness = _harness()
        names = [name.strip() for name in self.settings.tasks.split(",") if name.strip()]
        path = None if self.settings.path is None else str(self.settings.path)
        manager = harness.tasks.TaskManager(include_path=path)
        try:
            return manager.load(names)["tasks"]
        except (KeyError, ValueError, ImportError) as error:
            raise InputError(f"lm_eval: the tasks {', '.join(names)} cannot be loaded: {error}") from None


def _harness() -> Any:
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        import lm_eval.tasks  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise InputError(
            f"lm_eval: lm-evaluation-harness is not installed ({error.name} is missing). Install it with "
            "pip install 'vlmix[eval]'"
        ) from None
    return lm_eval


def _task_of(sample_id: str) -> str:
    return sample_id.rpartition("/")[0]


def _sample(name: str, number: int, task: Any, doc: Mapping[str, Any]) -> Sample:
    text, identity = str(task.doc_to_text(doc)), f"{name}/{number}"
    target = str(task.doc_to_target(doc))
    return Sample(identity, (Turn("user", (text or "(nothing)",)),), target, task=name, group=identity)

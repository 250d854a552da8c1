"""ScienceQA (Lu et al. 2022): school questions with options, those with a picture alone or all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self

from vlmix.core.errors import InputError, SampleError
from vlmix.core.parts import BENCHMARKS
from vlmix.core.sample import ImageRef, Json
from vlmix.evals.benchmarks._asking import BY_LETTER, letters_of, listed, texts_in
from vlmix.evals.benchmarks._layout import first_of, json_whole, picture, text_of
from vlmix.evals.benchmarks._official import OfficialBenchmark, Question
from vlmix.evals.benchmarks._stored import StoredSettings, stored_rows
from vlmix.evals.benchmarks._tiny import draw, write

_HOW: Final = "It is data/scienceqa of the repository lupantech/ScienceQA, pictures by its tools/download.sh."

_TINY: Final = (
    ("3", "Which is a gas?", "Select the best answer.", ["air", "ice"], 0, True),
    ("8", "Which is a tool?", "", ["a cloud", "a saw", "a lake"], 1, True),
    ("9", "Which word rhymes?", "", ["cat", "dog"], 1, False),
    ("11", "What is its capital?", "", ["Oslo", "Rome", "Lima", "Bern"], 3, True),
    ("14", "What will melt?", "", ["a stone", "ice"], 1, True),
)


class ScienceQASettings(StoredSettings):
    """The folder with ``problems.json``, ``pid_splits.json`` and ``images``.

    Without ``pictured`` questions without a picture are asked too; ``context`` shows the hint first.
    """

    rule: ClassVar = "scienceqa_img"
    kind: Literal["scienceqa_img"] = "scienceqa_img"  # pyright: ignore[reportIncompatibleVariableOverride]
    split: str = "test"
    pictured: bool = True
    context: bool = True
    suffix: str = BY_LETTER


@BENCHMARKS.register("scienceqa_img")
class ScienceQA(OfficialBenchmark):
    """``acc_percent`` is the accuracy over the questions asked: by default what papers print as SQA-I.

    The prompt is that of LLaVA-1.5 (haotian-liu/LLaVA@524a75b scripts/v1_5/eval/sqa.sh, and its question
    file ``llava_test_CQM-A.json``); lmms-eval's is the same (EvolvingLMMs-Lab/lmms-eval@2f636e7
    lmms_eval/tasks/scienceqa/utils.py).
    """

    settings_class = ScienceQASettings
    settings: ScienceQASettings
    paper = (
        "Learn to Explain: Multimodal Reasoning via Thought Chains for Science QA (Lu et al., NeurIPS 2022)"
    )
    headlines: ClassVar = {
        "llava_eval_science_qa": "acc_percent",
        "lmms_eval": "exact_match",
        "lmms_eval_eagle_fork": "exact_match",
    }

    def lines(self) -> Iterator[tuple[str, object]]:
        """The questions of the split, in its order."""
        pictured = self.settings.pictured
        subset = "ScienceQA-IMG" if pictured else "ScienceQA-FULL"
        table = self.settings.table(self.settings.split, ["problems.json"], [subset, "."])
        for place, raw in stored_rows(table, ["image"]) if table else self._problems():
            if not (pictured and isinstance(raw, dict) and not raw.get("image")):
                yield place, {"pid": place.rpartition(":")[2], **raw} if isinstance(raw, dict) else raw

    def _problems(self) -> Iterator[tuple[str, object]]:
        path, split = self.settings.path, self.settings.split
        problems = json_whole(first_of(path, ["problems.json"], _HOW))
        splits = json_whole(first_of(path, ["pid_splits.json"], _HOW))
        chosen = splits.get(split) if isinstance(splits, dict) else None
        if not isinstance(chosen, list) or not isinstance(problems, dict):
            raise InputError(f"{path}: pid_splits.json lists no split {split!r}. {_HOW}")
        for name in chosen:
            raw = problems.get(str(name), SampleError("it is listed in pid_splits.json and not there"))
            yield f"problems.json:{name}", raw

    def question(self, raw: Any) -> Question:
        """Its field ``answer`` is the right option's place."""
        options, place = texts_in(raw["choices"]), raw["answer"]
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(options):
            raise SampleError(f"`answer` is {str(place)[:40]!r}, no place among {len(options)} options")
        context = f"Context: {raw['hint']}\n" if self.settings.context and raw.get("hint") else ""
        letters = letters_of(options)
        return Question(
            id=raw["pid"],
            text=f"{context}{text_of(raw, 'question')}{listed(options)}{self.settings.suffix}",
            images=self._pictures(raw),
            gold=place,
            targets=[letters[place], f"{letters[place]}. {options[place]}"],
            fields={"choices": options, "has_image": bool(raw.get("image"))},
            options=letters,
            task=str(raw.get("subject", "")),
        )

    def unread(self, place: str) -> Mapping[str, Json]:
        """Counted among those with a picture."""
        del place
        return {"choices": [], "has_image": True}

    def _pictures(self, raw: Any) -> list[ImageRef]:
        """That of a table, or ``split/pid/name``, below ``images`` if that is there; none without a name."""
        held, root = raw.get("image") or [], self.settings.path
        if not isinstance(held, str):
            return held
        inside = f"{raw.get('split', self.settings.split)}/{raw['pid']}/{held}"
        return [picture(root / "images" if (root / "images").is_dir() else root, inside)]

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Five questions, one without a picture; two to four options, with a hint and without."""
        problems = {
            name: {
                "question": question,
                "choices": options,
                "answer": answer,
                "hint": hint,
                "image": "image.png" if shown else None,
                "subject": "natural science" if shown else "language science",
                "split": "test",
            }
            for name, question, hint, options, answer, shown in _TINY
        }
        draw(folder / "images" / "test", *(f"{name}/image.png" for name, *_, shown in _TINY if shown))
        write(folder / "problems.json", problems)
        write(folder / "pid_splits.json", {"test": list(problems)})
        return cls(ScienceQASettings(path=folder))

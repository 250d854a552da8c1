"""Let Optuna propose: axes may be ranges, and what was found steers what is tried next.

Akiba et al., arXiv:1907.10902. Proposals depend on the seed and on what was told, so that a search that was
killed proposes the same again and finds its trials done.
"""

from __future__ import annotations

import json
import math
from typing import Any, Literal, Self

from pydantic import PositiveInt

from vlmix.core.errors import RecipeError
from vlmix.core.extras import extra
from vlmix.core.settings import PartSettings
from vlmix.search.points import Point, Space
from vlmix.search.settings import RangeSettings
from vlmix.search.strategies import STRATEGIES
from vlmix.search.strategies._base import Findings, Found, Round, Rounds, Step, Strategy, best_of

_MIXTURE = "encoders"


class OptunaSettings(PartSettings):
    """``trials`` choices, proposed ``batch`` at a time by the tree of Parzen estimators or at ``random``."""

    kind: Literal["optuna"] = "optuna"  # pyright: ignore[reportIncompatibleVariableOverride]
    trials: PositiveInt = 20
    batch: PositiveInt = 1
    sampler: Literal["tpe", "random"] = "tpe"
    seed: int = 0

    @classmethod
    def tiny(cls) -> Self:
        """Six proposals, two at a time."""
        return cls(trials=6, batch=2)


@STRATEGIES.register("optuna")
class Optuna(Strategy):
    """Ask and tell; without the axis ``encoders`` every encoder of the pool is in or out."""

    settings_class = OptunaSettings
    settings: OptunaSettings

    def check(self, space: Space) -> None:
        """Refuse a space that cannot be searched so."""
        with extra("search", "strategy optuna"):
            import optuna  # noqa: F401  # pyright: ignore[reportMissingImports,reportUnusedImport]
        if not (space.axes or space.mixtures or space.pool):
            raise RecipeError("strategy optuna: name axes under `axes`, or a pool under `encoders`")

    def most(self, space: Space) -> int:
        """How many choices that may be."""
        return self.settings.trials

    def rounds(self, space: Space, findings: Findings) -> Rounds:
        """Yield the rounds; end with the best."""
        study, tried = self._study(), list[Point]()
        for first in range(0, self.settings.trials, self.settings.batch):
            asked = [study.ask() for _ in range(min(self.settings.batch, self.settings.trials - first))]
            points = [_proposed(trial, space) for trial in asked]
            yield Round(f"proposals {first + 1} to {first + len(asked)}", tuple(dict.fromkeys(points)))
            for trial, point in zip(asked, points, strict=True):
                value = findings.value(point)
                if math.isfinite(value):
                    study.tell(trial, value)
                else:
                    study.tell(trial, state=self._failed())
            tried += [point for point in points if point not in tried]
        best = best_of(tried, findings)
        others = (Step(p, best, findings.gain(p, best), taken=False) for p in tried if p != best)
        return Found(best, (Step(best, None, None, taken=True), *others))

    def _study(self) -> Any:
        with extra("search", "strategy optuna"):
            import optuna  # pyright: ignore[reportMissingImports]

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        samplers = optuna.samplers
        kind = samplers.TPESampler if self.settings.sampler == "tpe" else samplers.RandomSampler
        return optuna.create_study(direction="maximize", sampler=kind(seed=self.settings.seed))

    def _failed(self) -> Any:
        from optuna.trial import TrialState  # pyright: ignore[reportMissingImports]

        return TrialState.FAIL


def _proposed(trial: Any, space: Space) -> Point:
    settings = {key: _value(trial, key, axis) for key, axis in space.axes.items()}
    if space.mixtures:
        told = [json.dumps(names) for names in space.mixtures]
        return space.point(json.loads(trial.suggest_categorical(_MIXTURE, told)), settings)
    chosen = [name for name in space.pool if trial.suggest_categorical(f"{_MIXTURE}.{name}", [True, False])]
    return space.point(chosen or space.pool[:1], settings)


def _value(trial: Any, key: str, axis: Any) -> Any:
    if not isinstance(axis, RangeSettings):
        return json.loads(trial.suggest_categorical(key, [json.dumps(value) for value in axis]))
    if axis.whole:
        return trial.suggest_int(key, math.ceil(axis.low), math.floor(axis.high), log=axis.log)
    return trial.suggest_float(key, axis.low, axis.high, log=axis.log)

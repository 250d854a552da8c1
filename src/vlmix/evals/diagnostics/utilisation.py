"""What each encoder is worth to the answers: accuracy lost when its map is zero, as a share of all."""

from __future__ import annotations

from collections.abc import Sequence

from vlmix.core.sample import Score
from vlmix.evals.diagnostics import DIAGNOSTICS
from vlmix.evals.diagnostics._base import Diagnostic, Figure, Finding, Table
from vlmix.evals.diagnostics._drawing import rates_picture
from vlmix.evals.diagnostics._shares import Utilisation, utilisation
from vlmix.evals.diagnostics._subject import Answering, Lost, Subject
from vlmix.evals.diagnostics._telling import NONE, percent, rounded, spread, written

MASKING = (
    "Masking is not retraining. The decoder never saw such zeros, unless it was trained with "
    "`encoder_dropout`: what is lost is what this model, as it is, reads from an encoder, not what a mixture "
    "trained without it would lack. Retrained subsets rank encoders differently (arXiv:2606.03879)."
)


def score_mean(scores: Sequence[Score]) -> float:
    """The mean of the questions' scores, whatever the benchmark's own figures are."""
    return sum(score.value for score in scores) / len(scores)


def masked_one_by_one(answering: Answering) -> list[list[Score]]:
    """The scores without each encoder in turn."""
    return [answering.scores(Lost({number})) for number in range(len(answering.encoders))]


@DIAGNOSTICS.register("utilisation")
class UtilisationByMasking(Diagnostic):
    """Conditional utilisation u_i = (acc(all) - acc(all without i)) / acc(all), and the information gap.

    The gap is max u - min u. Both after arXiv:2507.03262; acc is the mean of the questions' scores.
    """

    def examine(self, subject: Subject) -> Finding:
        """Ask everything once with all encoders and once without each."""
        whole, without = subject.answering.scores(), masked_one_by_one(subject.answering)
        tasks = {"": utilisation(whole, without, subject.seed)}
        names = sorted({score.task for score in whole})
        if len(names) > 1:
            tasks |= {name: _of_task(name, whole, without, subject.seed) for name in names}
        every = tasks[""]
        figures = [
            Figure(
                "utilisation",
                rates_picture(
                    {name or "all": found.rates for name, found in tasks.items()}, subject.encoders
                ),
                "u of every encoder, in percent of the accuracy with all of them, with 95 % intervals.",
            )
        ]
        return Finding(
            title="Utilisation by masking",
            reading=(
                "u = (accuracy with all encoders - accuracy without this one) / accuracy with all. 0: its "
                "absence changes nothing; below 0: answers are better without it. Intervals are paired by "
                "question. Information gap, largest u less smallest: "
                f"{percent(every.gap and every.gap.value)} % ({spread(every.gap)}). Noise alone makes a gap, "
                "so a small one says little.",
            ),
            cautions=(MASKING,),
            tables=[_table(subject, whole, without, every), *_task_tables(subject, tasks)],
            figures=figures,
            data=_data(subject, whole, without, tasks),
        )


def _of_task(name: str, whole: Sequence[Score], without: Sequence[Sequence[Score]], seed: int) -> Utilisation:
    own = [[s for s in scores if s.task == name] for scores in (whole, *without)]
    return utilisation(own[0], own[1:], seed)


def _table(
    subject: Subject, whole: Sequence[Score], without: Sequence[Sequence[Score]], found: Utilisation
) -> Table:
    rows = [["none", percent(score_mean(whole)), "", ""]]
    rows += [
        [name, percent(score_mean(scores)), percent(rate and rate.value), spread(rate)]
        for name, scores, rate in zip(subject.encoders, without, found.rates, strict=True)
    ]
    return Table(f"{len(whole)} questions", ("masked", "accuracy %", "u %", "95 % interval"), rows)


def _task_tables(subject: Subject, tasks: dict[str, Utilisation]) -> list[Table]:
    rows = [
        [
            name,
            *(f"{percent(rate.value)} ({spread(rate)})" if rate else NONE for rate in found.rates),
            percent(found.gap and found.gap.value),
        ]
        for name, found in tasks.items()
        if name
    ]
    columns = ("task", *(f"u % of {name}" for name in subject.encoders), "gap")
    return [Table("u by task", columns, rows)] if rows else []


def _data(
    subject: Subject,
    whole: Sequence[Score],
    without: Sequence[Sequence[Score]],
    tasks: dict[str, Utilisation],
) -> dict[str, object]:
    def told(found: Utilisation) -> dict[str, object]:
        rates = dict(zip(subject.encoders, map(written, found.rates), strict=True))
        return {"u": rates, "gap": written(found.gap)}

    results = [
        subject.answering.result(),
        *(subject.answering.result(Lost({i})) for i in range(len(without))),
    ]
    figures = [{name: rounded(value) for name, value in each.model.figures.items()} for each in results]
    return {
        "accuracy": rounded(score_mean(whole)),
        "accuracy_without": dict(
            zip(subject.encoders, [rounded(score_mean(s)) for s in without], strict=True)
        ),
        "figures": figures[0],
        "figures_without": dict(zip(subject.encoders, figures[1:], strict=True)),
        **told(tasks[""]),
        "tasks": {name: told(found) for name, found in tasks.items() if name},
    }

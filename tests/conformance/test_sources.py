"""What every data source owes, run over all of them without naming one."""

import json

import pytest

from vlmix.core.errors import RecipeError
from vlmix.core.interfaces import Source
from vlmix.core.parts import SOURCES, read_part
from vlmix.core.sample import ImageRef
from vlmix.data.ledger import check


@pytest.fixture(params=SOURCES.names())
def kind(request):
    return request.param


@pytest.fixture
def made(kind, tmp_path):
    """The source's class and the settings of its tiny set."""
    cls = SOURCES.get(kind)
    return cls, cls.tiny(tmp_path)


def content(sample):
    """Everything that could differ between two readings, pictures as pixels."""
    turns = [
        [turn.role, *(p.open().tobytes() if isinstance(p, ImageRef) else p for p in turn.parts)]
        for turn in sample.turns
    ]
    return sample.id, turns, sample.target, sample.task, sample.group, sample.language, dict(sample.meta)


def test_settings_survive_json_and_refuse_unknown_keys(made, kind):
    cls, settings = made
    raw = json.loads(settings.model_dump_json())
    assert raw["kind"] == kind
    assert read_part(SOURCES, raw) == settings
    assert issubclass(cls, Source)
    assert isinstance(settings, cls.settings_class)
    some_key = next(key for key in raw if key != "kind")
    with pytest.raises(RecipeError, match=f"Did you mean '{some_key}'"):
        read_part(SOURCES, {**raw, some_key + "x": 1})


def test_samples_are_the_same_whenever_and_in_whatever_order_they_are_read(made):
    cls, settings = made
    one, other = cls(settings), cls(settings)
    forward = [content(sample) for sample in one]
    backward = [content(other[index]) for index in reversed(range(len(other)))][::-1]
    assert forward == backward
    assert len(forward) == len(one) > 0
    assert len({name for name, *_ in forward}) == len(forward), "ids repeat"


def test_samples_are_whole_conversations_with_pictures_that_open(made):
    cls, settings = made
    for sample in cls(settings):
        roles = [turn.role for turn in sample.turns]
        spoken = roles[1:] if roles[0] == "system" else roles
        assert spoken == ["user", "assistant"] * (len(spoken) // 2) != []
        assert sample.turns[-1].text
        assert sample.group
        assert not any(turn.images for turn in sample.turns if turn.role != "user")
        assert all(image.open().mode == "RGB" for image in sample.images)
        json.dumps(dict(sample.meta))


def test_the_ledger_finds_nothing_wrong_and_counts_every_row(made):
    cls, settings = made
    source = cls(settings)
    summary = check("tiny", source)
    assert (summary.read, summary.used, summary.quarantined) == (len(source), len(source), 0)


def test_lines_count_from_one_and_never_go_back(made):
    source = made[0](made[1])
    lines = [source.line(index) for index in range(len(source))]
    assert lines[0] >= 1
    assert lines == sorted(lines)


def test_rows_outside_the_set_raise(made):
    source = made[0](made[1])
    with pytest.raises(IndexError):
        source[len(source)]

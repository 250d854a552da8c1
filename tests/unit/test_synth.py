"""The procedural family: exact, seeded, balanced, and drawn as it says."""

from collections import Counter
from itertools import product

import numpy as np
import pytest

from vlmix.core.errors import RecipeError
from vlmix.core.parts import SOURCES, read_part
from vlmix.data.sources.synth import QUESTION_TASKS, TASKS, Synth, SynthSettings, answer_set
from vlmix.data.synth.drawing import COLOURS, SHAPES, shape_mask
from vlmix.data.synth.fonts import glyph, text_width
from vlmix.data.synth.text import LONG_WORDS, MAX_LENGTH, WORDS

DIFFICULTIES = (0.0, 0.25, 0.5, 1.0)


def pixels(sample):
    return np.asarray(sample.images[0].open())


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_every_task_is_exact_repeatable_and_takes_its_turn(difficulty):
    settings = SynthSettings(size=300, difficulty=difficulty)
    one, other = Synth(settings), Synth(settings)
    for index in reversed(range(300)):
        a, b = one[index], other[index]
        assert (a.id, a.target, a.turns[0].text, a.meta) == (b.id, b.target, b.turns[0].text, b.meta)
        assert (pixels(a) == pixels(b)).all()
        assert a.task == TASKS[index % len(TASKS)]
        assert a.turns[1].text == a.target
        answers = answer_set(a.task, settings)
        assert not answers or a.target in answers


def test_two_seeds_share_no_sample():
    def seen(seed):
        return {(pixels(s).tobytes(), s.turns[0].text) for s in Synth(SynthSettings(size=3000, seed=seed))}

    assert len(seen(0) | seen(1)) == 6000


@pytest.mark.slow
@pytest.mark.parametrize("task", [t for t in QUESTION_TASKS if t != "text_digits"])
@pytest.mark.parametrize("difficulty", [0.25, 1.0])
def test_the_question_alone_tells_nothing(task, difficulty):
    settings = SynthSettings(size=2400, tasks=(task,), difficulty=difficulty)
    asked = [(s.turns[0].text, s.target, s.meta.get("negatives")) for s in Synth(settings)]
    classes = answer_set(task, settings)
    share = 1 / len(classes)
    # Five standard errors of a binomial share.
    margin = 5 * (share * (1 - share) / len(asked)) ** 0.5
    counts = Counter(answer for _, answer, _ in asked)
    assert all(abs(counts[answer] / len(asked) - share) < margin for answer in classes)
    # The best guesser that knows every question's commonest answer, judged on the other half.
    table = {}
    for question, answer, _ in asked[:1200]:
        table.setdefault(question, Counter())[answer] += 1
    hits = [table[q].most_common(1)[0][0] == a for q, a, _ in asked[1200:] if q in table]
    assert np.mean(hits) < share + 5 * (share * (1 - share) / len(hits)) ** 0.5
    for kind in {kind for *_, kind in asked if kind}:
        yes = [answer == "yes" for _, answer, which in asked if which == kind]
        assert abs(np.mean(yes) - 0.5) < 0.1


def test_scenes_show_what_the_answer_says():
    """Count pixels of each colour on noiseless pictures: an oracle that shares no code with the painters."""
    settings = SynthSettings(size=400, tasks=("colour", "shape", "count", "existence"), noise=0, seed=5)
    for sample in Synth(settings):
        image = pixels(sample).reshape(-1, 3)
        present = {name for name, rgb in COLOURS.items() if (image == rgb).all(1).any()}
        question, answer = sample.turns[0].text, sample.target
        if sample.task == "colour":
            assert answer in present
        if sample.task == "shape":
            assert question.split()[3].strip("?") in present
        if sample.task == "count":
            assert question.split()[2] in present
        if sample.task == "existence" and answer == "yes":
            assert question.split()[3] in present


@pytest.mark.slow
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_counts_and_sides_agree_with_blobs(difficulty):
    settings = SynthSettings(size=200, tasks=("count", "relation"), noise=0, difficulty=difficulty)
    for sample in Synth(settings):
        image, words = pixels(sample), sample.turns[0].text.strip("?").split()
        if sample.task == "count":
            blobs = find_blobs(image, words[2])
            names = [name for name, _ in blobs]
            singular = "cross" if words[3] == "crosses" else words[3][:-1]
            assert names.count(singular) == int(sample.target)
        else:
            relation = sample.meta["relation"]
            (a,) = [c for name, c in find_blobs(image, words[2]) if name == words[3]]
            (b,) = [c for name, c in find_blobs(image, words[-2]) if name == words[-1]]
            true = {
                "left of": a[1] < b[1],
                "right of": a[1] > b[1],
                "above": a[0] < b[0],
                "below": a[0] > b[0],
            }
            assert sample.target == ("yes" if true[relation] else "no")


def find_blobs(image, colour):
    """Name and centre of every connected blob of a colour, by comparing its outline with each shape."""
    left = {tuple(p) for p in np.argwhere((image == COLOURS[colour]).all(2)).tolist()}
    blobs = []
    while left:
        blob, front = set(), [left.pop()]
        while front:
            y, x = front.pop()
            blob.add((y, x))
            steps = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= steps
            front += steps
        points = np.array(sorted(blob))
        low, high = points.min(0), points.max(0)
        mask = np.zeros(high - low + 1, bool)
        mask[tuple((points - low).T)] = True
        (name,) = {s for s, r in product(SHAPES, range(3, 20)) if same(trim(shape_mask(s, r)), mask)}
        blobs.append((name, (low + high) / 2))
    return blobs


def trim(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def same(a, b):
    return a.shape == b.shape and (a == b).all()


@pytest.mark.parametrize("height", [5, 7, 10, 14])
def test_text_can_be_read_back_glyph_by_glyph(height):
    settings = SynthSettings(
        size=60, tasks=("text_digits", "text_words"), noise=0, difficulty=0, text_height=height
    )
    for sample in Synth(settings):
        image = pixels(sample).astype(int)
        ink = (image != image[0, 0]).any(2)  # at difficulty 0 there is nothing but the text
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        text = sample.target.upper()
        width = text_width(len(text), height)
        drawn = np.zeros((height, width), bool)
        for i, character in enumerate(text):
            mask = glyph(character, height)
            drawn[:, text_width(i + 1, height) - mask.shape[1] : text_width(i + 1, height)] = mask
        assert same(trim(drawn), ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
        assert (~ink[0]).all()
        assert (~ink[:, 0]).all()


def test_no_two_glyphs_or_words_are_alike():
    characters = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    for height in (5, 7):
        assert len({glyph(c, height).tobytes() for c in characters}) == len(characters)
    words = WORDS + LONG_WORDS
    assert len(set(words)) == len(words)
    assert max(map(len, words)) <= MAX_LENGTH


def test_bars_are_as_high_as_their_answer():
    for sample in Synth(SynthSettings(size=100, tasks=("chart_bars",), noise=0)):
        colour = sample.turns[0].text.split()[-2]
        bar = (pixels(sample) == COLOURS[colour]).all(2)
        assert bar.any(1).sum() == 5 * int(sample.target)


def test_answers_can_be_sentences_and_captions_name_everything():
    sentences = Synth(SynthSettings(size=20, answer="sentence"))
    assert all(s.turns[1].text == f"The answer is {s.target}." for s in sentences if s.task in QUESTION_TASKS)
    captions = [s.target for s in Synth(SynthSettings(size=300, tasks=("caption",)))]
    kinds = ("a bar chart, ", "a line chart, ", "the number ", "the word ")
    assert all(any(c.startswith(k) for c in captions) for k in kinds)
    scenes = [c for c in captions if not c.startswith(kinds)]
    assert all(p.split()[1] in COLOURS and p.split()[2] in SHAPES for c in scenes for p in c.split(", "))


@pytest.mark.parametrize("size", [48, 96, 224])
def test_other_picture_sizes_are_painted_whole(size):
    for sample in Synth(SynthSettings(size=100, image_size=size, difficulty=1.0)):
        assert pixels(sample).shape == (size, size, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": []},
        {"tasks": ["count", "count"]},
        {"tasks": ["counting"]},
        {"text_height": 6},
        {"text_height": 35},
        {"difficulty": 1.5},
        {"seed": -1},
        {"sise": 3},
    ],
)
def test_settings_that_cannot_work_are_refused(change):
    with pytest.raises(RecipeError):
        read_part(SOURCES, {"kind": "synth", **change})


def test_rows_outside_the_set_do_not_exist():
    source = Synth(SynthSettings(size=3))
    for index in (-1, 3):
        with pytest.raises(IndexError):
            source[index]


def test_sheets_name_as_many_cells_as_they_fill():
    known = {f"{colour} {shape}" for colour in COLOURS for shape in SHAPES} | set(WORDS)
    for task in ("mosaic", "page"):
        sheets = list(Synth(SynthSettings(size=200, tasks=(task,), image_size=48, difficulty=0)))
        for sheet in sheets:
            named = [] if sheet.target == "nothing" else sheet.target.split(", ")
            assert len(named) == sheet.meta["cells"] <= 9
            assert all(name in known or (name.isdecimal() and len(name) == 2) for name in named)
        assert any(" " in name for s in sheets for name in s.target.split(", ")) == (task == "mosaic")

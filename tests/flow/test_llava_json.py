"""From a folder with bad rows to samples and a ledger that adds up; hostile files touch nothing else."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from vlmix.core.errors import DataError, InputError, SampleError
from vlmix.core.parts import SOURCES, read_part
from vlmix.core.sample import ImageRef
from vlmix.data import json_rows
from vlmix.data.json_rows import MAX_DEPTH, MAX_ROW_BYTES
from vlmix.data.ledger import Ledger, check

pytestmark = pytest.mark.flow


def row(name, *, image=None, question="<image>\nWhat is it?", answer="a thing"):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, **({} if image is None else {"image": image}), "conversations": turns}


def source_of(path, **settings):
    settings_ = read_part(SOURCES, {"kind": "llava_json", "path": str(path), **settings})
    return SOURCES.get("llava_json")(settings_)


@pytest.fixture
def folder(tmp_path):
    """Twenty pictures, half PNG and half JPEG."""
    root = tmp_path / "set"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        image = Image.fromarray(rng.integers(0, 256, (24, 32, 3)).astype(np.uint8))
        image.save(root / (f"{i:02}.png" if i % 2 else f"{i:02}.jpg"))
    return root


def rows_of(folder):
    return [row(f"row-{i}", image=path.name) for i, path in enumerate(sorted(folder.glob("??.*")))]


@pytest.fixture
def spoilt(folder):
    """The twenty rows with a missing picture, a truncated JPEG, an `<image>` too many and a wrong type."""
    rows = rows_of(folder)
    rows[3]["image"] = "absent.png"
    corrupt = folder / rows[6]["image"]
    corrupt.write_bytes(corrupt.read_bytes()[:-200])
    rows[11]["conversations"][0]["value"] = "<image><image>\nWhat is it?"
    rows[14]["conversations"][1]["value"] = 42
    return rows


def as_array(rows):
    return json.dumps(rows, indent=2).encode()


def as_lines(rows):
    return b"".join(json.dumps(r).encode() + b"\n" for r in rows)


@pytest.mark.parametrize("form", [as_array, as_lines])
def test_bad_rows_are_listed_with_line_and_reason_and_the_counts_add_up(folder, spoilt, form, tmp_path):
    path = folder / "rows.json"
    path.write_bytes(form(spoilt))
    ledger = Ledger(tmp_path / "run" / "quarantine.jsonl")
    source = source_of(path)
    taken = [ledger.take("mine", source, index) for index in range(len(source))]
    assert (ledger.read, ledger.used, ledger.quarantined) == (20, 16, 4)
    assert ledger.read == ledger.used + ledger.quarantined == len(source)
    good = [sample for sample in taken if sample is not None]
    assert [s.id for s in good] == [f"row-{i}#{i + 1}" for i in range(20) if i not in {3, 6, 11, 14}]
    listed = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    text_lines = path.read_text().splitlines()
    for entry, (index, reason) in zip(
        listed,
        {3: "does not exist", 6: "damaged JPEG", 11: "2 <image>", 14: "must be text, not int"}.items(),
        strict=True,
    ):
        assert (entry["source"], entry["row"], entry["id"]) == ("mine", index, f"row-{index}#{index + 1}")
        assert reason in entry["reason"]
        first = entry["line"] - 1  # the line names the place where the row begins
        assert text_lines[first].strip().startswith("{")
        assert f'"row-{index}"' in "".join(text_lines[first : first + 2])


def test_a_large_share_of_bad_rows_stops(folder, spoilt):
    path = folder / "rows.jsonl"
    path.write_bytes(as_lines([dict(r, image="absent.png") for r in spoilt]))
    ledger, source = Ledger(None), source_of(path)
    with pytest.raises(DataError, match="11 of 11 rows"):
        [ledger.take("mine", source, index) for index in range(20)]


def test_placeholders_become_pictures_where_they_stand(folder):
    names = sorted(p.name for p in folder.glob("??.*"))
    rows = [
        row("two", image=names[:2], question="<image>\nThis, or <image>?"),
        row("text", question="No picture?", answer="None: <image> is text here."),
    ]
    rows[0]["conversations"] += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
    rows[1]["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    path = folder / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + as_lines(rows).replace(b"\n", b"\r\n\r\n"))
    two, text = source_of(path)
    first, between, second, after = two.turns[0].parts
    assert [first.source.name, second.source.name] == names[:2]
    assert (between, after) == ("\nThis, or ", "?")
    assert [turn.role for turn in two.turns] == ["user", "assistant"] * 2
    assert text.images == ()
    assert text.turns[-1].text == "None: <image> is text here."
    assert [source_of(path).line(i) for i in (0, 1)] == [1, 3]


ATTACKS = {
    "parent": "../secret.png",
    "deep parent": "a/../../secret.png",
    "absolute": "{outside}/secret.png",
    "link out": "link.png",
    "through a linked folder": "away/secret.png",
    "link to a device": "zero.png",
    "loop": "loop.png",
    "nul": "00.jpg\0.png",
    "backslashes": "..\\secret.png",
    "drive": "C:\\secret.png",
    "encoded": "%2e%2e/secret.png",
    "home": "~/secret.png",
    "file url": "file://{outside}/secret.png",
    "web url": "https://192.0.2.1/secret.png",
    "data url": "data:image/png;base64,AAAA",
    "folder": ".",
    "very long": "a" * 5000,
    "surrogate": "\udcff.png",
    "empty": "",
    "number": 7,
    "list in list": [["00.jpg"]],
    "object": {"path": "00.jpg"},
}


@pytest.fixture
def opened():
    """Every path opened and every address contacted while the fixture is in use."""
    seen, watching = [], [True]

    def hook(event, arguments):
        by_path = event == "open" and not isinstance(arguments[0], int)
        if watching[0] and (by_path or event.startswith("socket.")):
            seen.append(str(arguments[0]))

    sys.addaudithook(hook)
    yield seen
    watching[0] = False


def test_no_path_leads_out_of_the_images_folder(folder, tmp_path, opened):
    outside = tmp_path / "outside"
    outside.mkdir()
    for secret in (outside / "secret.png", tmp_path / "secret.png"):
        Image.new("RGB", (4, 4)).save(secret)
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "away").symlink_to(outside)
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "inside.png").symlink_to(folder / "01.png")
    paths = [p.format(outside=outside) if isinstance(p, str) else p for p in ATTACKS.values()]
    path = folder / "rows.jsonl"
    path.write_bytes(as_lines([row(name, image=p) for name, p in zip(ATTACKS, paths, strict=True)]))
    with path.open("ab") as file:
        file.write(as_lines([row("good", image="00.jpg"), row("good link", image="inside.png")]))
    opened.clear()
    summary = check("hostile", source_of(path))
    pictures = [p for p in opened if p != str(path)]
    assert sorted(pictures) == [str(folder / "00.jpg"), str(folder / "01.png")]
    assert (summary.read, summary.used, summary.quarantined) == (len(ATTACKS) + 2, 2, len(ATTACKS))
    assert all(summary.bad[("hostile", i)] for i in range(len(ATTACKS)))


GOOD = json.dumps(row("good", image="00.jpg")).encode()
HOSTILE = {
    "nan": GOOD.replace(b'"good"', b"NaN"),
    "infinite": GOOD.replace(b'"good"', b"1e999"),
    "key twice": GOOD.replace(b'"image"', b'"id": 1, "image"'),
    "lone surrogate": GOOD.replace(b"a thing", b"\\ud800"),
    "raw surrogate": GOOD.replace(b"a thing", b"\xed\xa0\x80"),
    "not utf-8": GOOD.replace(b"a thing", b"\xff\xfe"),
    "5000 digits": GOOD.replace(b'"good"', b"9" * 5000),
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep inside": GOOD.replace(b'"good"', b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1)),
    "too long": GOOD.replace(b"a thing", b"x" * MAX_ROW_BYTES),
    "300000 turns": GOOD.replace(b"[{", b"[" + b'{"from":"human","value":"x"},' * 300_000 + b"{"),
    "1001 turns": json.dumps({"conversations": [{"from": "human", "value": "x"}] * 1001}).encode(),
    "no turns": b'{"id": 1, "conversations": []}',
    "no conversations": b'{"id": 1}',
    "turns are text": b'{"conversations": "hello"}',
    "a turn is text": b'{"conversations": ["hello", "you"]}',
    "gpt first": json.dumps({"conversations": row("")["conversations"][::-1]}).encode(),
    "human last": json.dumps({"conversations": row("", question="x")["conversations"][:1]}).encode(),
    "a stranger speaks": GOOD.replace(b'"gpt"', b'"narrator"'),
    "speaker is a list": GOOD.replace(b'"gpt"', b'["gpt"]'),
    "no picture": GOOD.replace(b"<image>", b""),
    "empty answer": GOOD.replace(b"a thing", b" "),
    "a number": b"42",
    "null": b"null",
    "a list": b"[1, 2]",
    "comma too many": GOOD.replace(b'"a thing"}', b'"a thing",}'),
    "single quotes": GOOD.replace(b'"', b"'"),
    "cut off": GOOD[:-9],
}
CANNOT_STAND_IN_AN_ARRAY = {"cut off", "single quotes"}


@pytest.mark.parametrize("name", HOSTILE)
def test_one_hostile_row_costs_one_row(name, folder):
    array = b"[\n" + b",\n".join([GOOD, HOSTILE[name], GOOD]) + b"\n]\n"
    lines = b"\n".join([GOOD, HOSTILE[name], GOOD])
    for raw, first_line in ((lines, 1), (array, 2)):
        if raw is array and name in CANNOT_STAND_IN_AN_ARRAY:
            continue
        path = folder / "rows.json"
        path.write_bytes(raw)
        source = source_of(path)
        summary = check("hostile", source)
        assert (summary.read, summary.used, list(summary.bad)) == (3, 2, [("hostile", 1)])
        with pytest.raises(SampleError) as caught:
            source[1]
        assert caught.value.line == first_line + 1
        assert caught.value.reason


@pytest.mark.parametrize(
    ("raw", "used", "bad"),
    [
        (b"", 0, 0),
        (b"\n \n", 0, 0),
        (b"[]", 0, 0),
        (b" [ ] \n", 0, 0),
        (b"\xef\xbb\xbf[" + GOOD + b"]", 1, 0),
        (b"[" + GOOD + b",]", 1, 1),
        (b"[,]", 0, 2),
        (b"[" + GOOD, 1, 1),
        (b"[" + GOOD + b",", 1, 1),
        (b"[" + GOOD + b"," + GOOD[:-20], 1, 1),
        (b"[" + GOOD + b',{"id": "x', 1, 1),
        (b"[" + GOOD + b"] trailing", 1, 1),
        (GOOD + b"\n" + GOOD[:-20], 1, 1),
        (GOOD.replace(b"a thing", b'a \\"[{,}]\\" \\\\'), 1, 0),
        (b"[" + GOOD.replace(b"a thing", b'a \\"[{,}]\\" \\\\') + b"," + GOOD + b"]", 2, 0),
    ],
)
def test_rows_are_cut_where_the_grammar_cuts_them(raw, used, bad, folder):
    path = folder / "rows.json"
    path.write_bytes(raw)
    summary = check("edges", source_of(path))
    assert (summary.used, summary.quarantined) == (used, bad)


def test_lines_are_those_of_an_editor(folder):
    path = folder / "rows.json"
    text = json.dumps(rows_of(folder), indent=3)
    path.write_text(text)
    source = source_of(path)
    for index in range(20):
        assert text.splitlines()[source.line(index)].strip() == f'"id": "row-{index}",'


def test_a_file_changed_while_in_use_is_noticed(folder):
    path = folder / "rows.jsonl"
    path.write_bytes(as_lines(rows_of(folder)))
    source = source_of(path)
    assert isinstance(source[0].turns[0].parts[0], ImageRef)
    path.write_bytes(as_lines(rows_of(folder)[::-1])[:-1])
    with pytest.raises(DataError, match="was changed"):
        source[1]


def test_what_cannot_be_read_at_all_says_so_at_once(folder, tmp_path):
    wide = tmp_path / "wide.json"
    wide.write_text("[]", encoding="utf-16")
    for path, words in ((tmp_path / "absent.json", "Check the path"), (tmp_path, "regular"), (wide, "UTF-8")):
        with pytest.raises(InputError, match=words):
            len(source_of(path))
    path = folder / "rows.json"
    path.write_bytes(b"[" + GOOD + b"]")
    with pytest.raises(InputError, match="images folder"):
        source_of(path, images=str(tmp_path / "nowhere"))[0]
    assert source_of(path, images=str(folder))[0].id == "good#1"


def test_a_file_that_goes_away_in_use_is_said_with_the_remedy(folder):
    path = folder / "rows.json"
    path.write_text(json.dumps(rows_of(folder)))
    found = source_of(path)
    assert len(found) == 20
    path.unlink()
    with pytest.raises(DataError, match=r"cannot be read any more: No such file.*continue with --resume"):
        found[0]


def test_a_file_that_several_sources_select_from_is_scanned_once(folder, monkeypatch):
    path, scanned = folder / "rows.json", []
    path.write_text(json.dumps(rows_of(folder)))
    monkeypatch.setattr(
        json_rows, "_Index", lambda path, made=json_rows._Index: scanned.append(1) or made(path)
    )
    sizes = [len(source_of(path, select={"first": first})) for first in (1, 5, 9)]
    assert (sizes, len(scanned)) == ([20, 16, 12], 1)
    path.write_text(json.dumps(rows_of(folder)[:7]))
    assert (len(source_of(path)), len(scanned)) == (7, 2)

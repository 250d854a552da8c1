"""Tar shards by row: any order, any process; what is hostile or damaged costs its own rows alone."""

import gc
import io
import json
import pickle
import random
import resource
import sys
import tarfile
from multiprocessing import get_context
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from vlmix.core.errors import DataError, InputError, SampleError
from vlmix.data import shards
from vlmix.data.ledger import check
from vlmix.data.sources.webdataset import Webdataset, WebdatasetSettings
from vlmix.data.tar_headers import TarCutError, members


def png(colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


def words(question="<image>\nWhat?", answer="this", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps({**more, "conversations": turns}).encode()


def tar(path, *entries, form=tarfile.PAX_FORMAT):
    """Members as (name, bytes) or a TarInfo that has none."""
    with tarfile.open(path, "w", format=form) as file:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                file.addfile(entry)
                continue
            info = tarfile.TarInfo(entry[0])
            info.size = len(entry[1])
            file.addfile(info, io.BytesIO(entry[1]))
    return path


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def source(*places, **more):
    return Webdataset(WebdatasetSettings(shards=tuple(map(str, places)), **more))


def rows(*keys):
    return [pair for key in keys for pair in ((f"{key}.json", words(id=key)), (f"{key}.png", png()))]


def bad(found):
    return {index: reason for (_, index), reason in check("set", found).bad.items()}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_say_what_tarfile_says(tmp_path, form):
    names = ["a.json", "b/" + "n" * 90 + ".png", "c/" * 20 + "d.0.png", "e.txt"]
    names += [] if form == tarfile.USTAR_FORMAT else ["ü" * 80 + "/" + "x" * 120 + ".json"]
    path = tar(
        tmp_path / "0.tar", *((name, bytes(random.Random(name).randrange(2000))) for name in names), form=form
    )
    with tarfile.open(path) as file, path.open("rb") as raw:
        wanted = [(m.name, m.offset_data, m.size) for m in file]
        assert [(m.name, m.offset, m.size) for m in members(raw.fileno())] == wanted


def test_shards_written_by_webdataset_are_read(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "%03d.tar"), maxcount=3, verbose=0) as writer:
        for number in range(8):
            conversation = json.loads(words("<image><image>\nSame?", str(number)))
            writer.write(
                {"__key__": f"{number:04}", "json": conversation, "0.png": png("blue"), "1.png": png("red")}
            )
    found = source(tmp_path)
    assert [sample.turns[-1].text for sample in found] == list("01234567")
    assert [image.open().getpixel((0, 0)) for image in found[5].images] == [(0, 0, 255), (255, 0, 0)]
    assert found[5].id == "0005#6"
    assert bad(found) == {}


def test_captions_are_asked_about_in_turn_and_pictures_count_on(tmp_path):
    entries = [(f"{n:02}.txt", f"thing {n} ".encode()) for n in range(3)] + [
        (f"{n:02}.png", png()) for n in range(3)
    ]
    entries += [("03.json", b'{"caption": "x"}'), ("03.txt", b"as img2dataset writes"), ("03.webp", png())]
    entries += [("04.json", words("<image>" * 12))] + [(f"04.{n}.png", png()) for n in range(12)]
    plain, asked = (source(tar(tmp_path / "0.tar", *entries), questions=q) for q in ((), ("What?", "Which?")))
    assert [sample.turns[0].text for sample in plain][:4] == [""] * 4
    assert [sample.turns[0].text for sample in asked][:4] == ["What?", "Which?", "What?", "Which?"]
    assert [sample.turns[1].text for sample in asked][:4] == [
        "thing 0",
        "thing 1",
        "thing 2",
        "as img2dataset writes",
    ]
    assert [i.source.member for i in asked[4].images] == [f"04.{n}.png" for n in range(12)]


def test_links_devices_repeats_and_odd_names_cost_their_own_rows(tmp_path):
    entries = [
        *rows("good"),
        ("link.json", words()), special("link.png", tarfile.SYMTYPE, "/etc/passwd"),
        ("hard.json", words()), special("hard.png", tarfile.LNKTYPE, "good.png"),
        ("dev.json", words()), special("dev.png", tarfile.CHRTYPE),
        ("pipe.json", words()), special("pipe.png", tarfile.FIFOTYPE),
        special("folder", tarfile.DIRTYPE),
        ("/etc/abs.json", words(id="abs")), ("/etc/abs.png", png()),
        ("../../up.json", words(id="up")), ("../../up.png", png()),
        ("._good.png", b"mac"), ("README", b"no ending"), ("__meta__.json", b"{}"),
        *rows("twice"), *rows("twice"),
        ("lonely.png", png()), ("few.json", words("<image><image>")), ("few.png", png()),
        ("none.json", words(image=["a.png"])), ("long.json", b" " * (2**22 + 1)), ("torn.json", b"{"),
        ("utf.txt", b"\xff"), ("utf.png", png()), ("empty.txt", b" "), ("empty.png", png()),
        ("text.txt", b"no picture"), ("fake.json", words()), ("fake.png", b"not a picture"), *rows("last"),
    ]  # fmt: skip
    found = source(tar(tmp_path / "0.tar", *entries))
    reasons = bad(found)
    good = [found[index].id.partition("#")[0] for index in range(len(found)) if index not in reasons]
    assert good == ["good", "abs", "up", "twice", "last"]
    said = ["symbolic link", "hard link", "character device", "pipe", "stands twice", "no lonely.json"]
    said += [
        "2 <image>",
        "names 1 pictures",
        "4194305 bytes",
        "not valid JSON",
        "not UTF-8",
        "caption is empty",
    ]
    said += ["no picture among", "does not begin like a picture"]
    assert len(reasons) == len(said)
    for reason, wanted in zip(reasons.values(), said, strict=True):
        assert wanted in reason
        assert "0.tar" in reason


def header(name, size, kind=b"0"):
    raw = bytearray(512)
    raw[:100], raw[156:157], raw[257:265] = name.ljust(100, b"\0"), kind, b"ustar\00000"
    raw[124:136] = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


PAX = b"30 GNU.sparse.realsize=999999\n"
END = bytes(1024)
DAMAGE = {
    "ten gigabytes": (header(b"x.png", 10 * 2**30) + b"few", "bytes more"),
    "more than any disk": (header(b"x.png", 2**80) + b"few", "bytes more"),
    "no octal": (header(b"x.png", 3).replace(b"00000000003", b"0000000x003"), "damaged"),
    "checksum": (header(b"x.png", 3).replace(b"x.png", b"y.png"), "checksum"),
    "half a header": (header(b"x.png", 3)[:300], "inside a header"),
    "noise": (random.Random(0).randbytes(2048), "damaged"),
    "no end": (b"", "no end mark"),
    "great pax": (header(b"p", 2**40, b"x"), "bytes more"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_rows_before_the_damage_are_kept_and_what_is_lost_counts_as_one(tmp_path, name):
    whole = tar(tmp_path / "0.tar", *rows("a", "b")).read_bytes()
    with (tmp_path / "0.tar").open("rb") as raw:
        last = [*members(raw.fileno())][-1]
    end = last.offset + -(-last.size // 512) * 512
    damage, said = DAMAGE[name]
    (tmp_path / "0.tar").write_bytes(whole[:end] + damage)
    found = source(tmp_path)
    assert [found[0].id, found[1].id] == ["a#1", "b#2"]
    assert len(found) == 3
    assert said in bad(found)[2]
    with pytest.raises(SampleError, match="get it again"):
        found[2]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (header(b"p", len(PAX), b"x") + PAX.ljust(512, b"\0"), "sparse"),
        (header(b"p", 9, b"x") + b"no record".ljust(512, b"\0"), "PAX header is damaged"),
        (header(b"p", 2**20 + 1, b"x") + bytes(2**20 + 512), "its header has"),
        (header(b"p", 2**20 + 1, b"L") + bytes(2**20 + 512), "its header has"),
    ],
)
def test_a_member_whose_header_cannot_be_trusted_is_refused_alone(tmp_path, extra, said):
    body = words("x").ljust(512, b" ")
    (tmp_path / "0.tar").write_bytes(
        extra + header(b"x.json", 512) + body + header(b"y.json", 512) + body + END
    )
    found = source(tmp_path)
    assert len(found) == 2
    assert said in bad(found)[0]
    assert found[1].turns[-1].text == "this"


def test_a_shard_cut_anywhere_gives_what_lies_before_the_cut(tmp_path):
    path = tar(tmp_path / "0.tar", *rows(*"abcdefgh"))
    whole = path.read_bytes()
    expected = [sample.turns for sample in source(path)]
    rng = random.Random(1)
    for _ in range(60):
        path.write_bytes(whole[: rng.randrange(len(whole) - 10240)])
        found = source(path)
        reasons = bad(found)
        kept = [i for i in range(len(found)) if i not in reasons]
        assert kept == list(range(len(kept)))
        assert len(reasons) in {1, 2}  # what is lost, and the row whose pictures are lost with it
        assert [[t.text for t in found[i].turns] for i in kept] == [
            [t.text for t in e] for e in expected[: len(kept)]
        ]


def test_noise_in_a_shard_never_breaks_the_reader(tmp_path):
    whole = tar(tmp_path / "0.tar", *rows(*"abcd")).read_bytes()
    rng = random.Random(2)
    for _ in range(150):
        raw = bytearray(whole)
        for _ in range(rng.randrange(1, 20)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        (tmp_path / "0.tar").write_bytes(raw)
        ledger = check("noise", source(tmp_path))
        assert ledger.read == ledger.used + ledger.quarantined


def test_archives_put_behind_one_another_are_read_on(tmp_path):
    parts = [tar(tmp_path / f"{key}.part", *rows(key)).read_bytes() for key in "ab"]
    (tmp_path / "0.tar").write_bytes(b"".join(parts))
    assert [sample.id for sample in source(tmp_path)] == ["a#1", "b#2"]


def test_patterns_folders_and_files_name_the_same_shards(tmp_path):
    paths = [tar(tmp_path / f"{n:03}.tar", *rows(f"k{n}")) for n in range(8, 12)]
    (tmp_path / "notes.txt").write_text("x")
    for pattern in (
        tmp_path,
        tmp_path / "*.tar",
        tmp_path / "{008..011}.tar",
        tmp_path / "{008,009,010,011}.tar",
    ):
        assert shards.find_shards([str(pattern)]) == paths
    assert [s.id for s in source(paths[2], paths[0])] == ["k10#1", "k8#2"]
    for pattern, said in (
        ("{007..009}.tar", "007.tar does not exist"),
        ("x*.tar", "no tar shards"),
        ("", "named twice"),
    ):
        with pytest.raises(InputError, match=said):
            shards.find_shards([f"{tmp_path}/{pattern}", str(tmp_path)])
    with pytest.raises(InputError, match="mount or download them first"):
        shards.find_shards(["https://example.org/{000..003}.tar"])
    for magic, remedy in ((b"\x1f\x8b\x08", "gunzip"), (b"\x28\xb5\x2f\xfd", "unzstd")):
        (tmp_path / "packed.tar").write_bytes(magic + bytes(600))
        with pytest.raises(InputError, match=remedy):
            len(source(tmp_path))
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz/0.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(InputError, match="gunzip"):
        len(source(tmp_path / "gz"))


def test_an_index_is_kept_and_made_again_when_it_cannot_be_trusted(tmp_path, monkeypatch):
    path = tar(tmp_path / "0.tar", *rows("a", "b"))
    looked = []
    monkeypatch.setattr(shards, "members", lambda fd: looked.append(fd) or members(fd))
    first = [sample.id for sample in source(path)]
    index = tmp_path / "0.tar.index"
    good = index.read_bytes()
    assert [sample.id for sample in source(path)] == first
    assert len(looked) == 1
    for damage in (
        b"",
        good[:-9],
        good.replace(b"a", b"z", 1),
        b"\x80\x04." + good,
        good * 100,
        b"[" * 10_000,
    ):
        index.write_bytes(damage)
        assert [sample.id for sample in source(path)] == first
        assert index.read_bytes() == good
    assert len(looked) == 7
    assert [s.id for s in source(path, index=str(tmp_path / "kept"))] == first
    assert [p.name.split(".")[0] for p in (tmp_path / "kept").iterdir()] == ["0"]
    outside = good.partition(b"\n")[2].replace(b"512,", b"99999999,", 1)
    index.write_bytes(shards._head(shards._version(path.stat()), outside) + outside)
    with pytest.raises(InputError, match="Delete it"):
        source(path)[0]


def test_a_shard_changed_while_in_use_is_noticed(tmp_path):
    path = tar(tmp_path / "0.tar", *rows("a", "b"))
    found = source(path)
    image = found[0].images[0]
    tar(path, *rows("b", "a", "c"))
    with pytest.raises(DataError, match="was changed"):
        found[0]
    with pytest.raises(DataError, match="was changed"):
        image.open()


def read_all(found):
    return [(sample.id, [image.open().tobytes() for image in sample.images]) for sample in found]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_other_processes_read_the_same(tmp_path, method):
    found = source(tar(tmp_path / "0.tar", *rows(*"abcd")))
    here = read_all(found)
    assert len(pickle.dumps(found)) < 1000
    assert read_all(pickle.loads(pickle.dumps(found))) == here
    image = pickle.loads(pickle.dumps(found[1].images[0]))
    assert image.open().tobytes() == here[1][1][0]
    with get_context(method).Pool(1) as pool:
        assert pool.map(read_all, [found]) == [here]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_flat_over_ten_thousand_samples(tmp_path):
    """Resident memory after rows 1,000 and 10,000: 4 MiB leave room for the allocator, 0.4 KiB a sample."""
    found = source(tar(tmp_path / "0.tar", *rows(*map(str, range(100)))))
    for number in range(10_000):
        found[number % len(found)].images[0].open()
        if number == 1000:
            first = resident_bytes()
    assert resident_bytes() - first < 4 * 2**20


def resident_bytes():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_cut_is_told_with_its_member(tmp_path):
    (tmp_path / "0.tar").write_bytes(header(b"a/b.png", 5000) + b"x" * 100)
    with (tmp_path / "0.tar").open("rb") as raw, pytest.raises(TarCutError) as caught:
        list(members(raw.fileno()))
    assert caught.value.name == "a/b.png"
    assert "4900 bytes more" in caught.value.reason

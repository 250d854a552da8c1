"""What a published config says about prompts: marks around pictures and the greatest length, both ways."""

import json

import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import vlmix
from tests.layouts import llava
from vlmix.convert._prompt import published_template
from vlmix.convert.export import export
from vlmix.convert.run import convert
from vlmix.core.errors import CheckpointError, ContextLengthError
from vlmix.models.templates import load_template, template_names

pytestmark = pytest.mark.flow
MARKS, MARKED = ("<im_start>", "<im_end>"), "<im_start><image><im_end>"
CONFIG = {"mm_use_im_start_end": True, "tokenizer_model_max_length": 77}


def words(marks=MARKS):
    vocabulary = {"<unk>": 0, "<s>": 2, "</s>": 3, "a": 4, "b": 5}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_tokens(list(marks), special_tokens=True)
    return tokenizer


@pytest.fixture
def published(tmp_path):
    """LLaVA's layout with what its config says about prompts, and its tokenizer beside it."""

    def make(said, tokenizer):
        folder = llava("llama", tmp_path / "given", tmp_path)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **said}))
        tokenizer.save_pretrained(tmp_path / "words")
        return folder

    return make


def asked(text):
    picture = {"type": "image", "image": Image.new("RGB", (16, 16))}
    return [{"role": "user", "content": [picture, {"type": "text", "text": text}]}]


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_marks_and_length_are_read_used_and_given_back(published, tmp_path):
    given = published(CONFIG, words())
    convert(given, tmp_path / "ours", tokenizer=tmp_path / "words")
    model, processor = vlmix.load(tmp_path / "ours")
    assert processor.max_length == 77
    assert f"USER: {MARKED}a" in processor.apply_chat_template(asked("a"))
    # What a user types stays text: the marks of the template only.
    ids = processor.apply_chat_template(asked("<im_start> a"), tokenize=True)["input_ids"][0].tolist()
    start, end = processor.tokenizer.convert_tokens_to_ids(list(MARKS))
    first = ids.index(processor.image_token_id)
    shown = model.config.image_seq_length
    assert ids[first - 1 : first + shown + 1] == [start, *[processor.image_token_id] * shown, end]
    assert ids.count(start) == ids.count(end) == 1
    with pytest.raises(ContextLengthError, match="the limit is 77"):
        processor.apply_chat_template(asked("a b " * 60), tokenize=True)
    export(tmp_path / "ours", tmp_path / "back", "llava")
    assert config_of(tmp_path / "back") == config_of(given)
    for part in (model, processor):  # as after training, when it forgot where it came from
        part.save_pretrained(tmp_path / "trained")
    export(tmp_path / "trained", tmp_path / "written", "llava")
    assert CONFIG.items() <= config_of(tmp_path / "written").items()
    convert(tmp_path / "written", tmp_path / "again", tokenizer=tmp_path / "words")
    assert vlmix.load(tmp_path / "again")[1].chat_template == processor.chat_template


def test_what_a_config_does_not_say_is_not_written(published, tmp_path):
    convert(published({}, words()), tmp_path / "ours", tokenizer=tmp_path / "words")
    model, processor = vlmix.load(tmp_path / "ours")
    assert processor.max_length is None
    assert MARKED not in processor.apply_chat_template(asked("a"))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "trained")
    export(tmp_path / "trained", tmp_path / "written", "llava")
    written = config_of(tmp_path / "written")
    assert written["mm_use_im_start_end"] is False
    assert "tokenizer_model_max_length" not in written


@pytest.mark.parametrize(
    ("said", "marks", "match"),
    [
        (CONFIG, MARKS[:1], "the tokenizer has no <im_end>.*--tokenizer"),
        ({"tokenizer_model_max_length": "long"}, (), "tokenizer_model_max_length 'long' is no number"),
        ({"tokenizer_model_max_length": 0}, (), "tokenizer_model_max_length 0 is no number"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_written(said, marks, match, published, tmp_path):
    given = published(said, words(marks))
    with pytest.raises(CheckpointError, match=match):
        convert(given, tmp_path / "ours", tokenizer=tmp_path / "words")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("name", template_names())
def test_every_template_takes_the_marks(name):
    marked = published_template(name, CONFIG, words())
    assert marked.replace(MARKED, "<image>") == load_template(name) != marked
    assert published_template(name, {}, words(())) == name

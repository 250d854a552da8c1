"""Chat templates: byte-exact text, and which of it the model is trained to say."""

import json
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from vlmix.core.errors import InputError, SampleError, UnknownNameError
from vlmix.core.sample import ImageRef, Turn
from vlmix.models.rendering import Segment, prompt_text, render, template_variables
from vlmix.models.templates import load_template, template_names

GOLDEN = Path(__file__).parents[1] / "golden"
CONVERSATIONS = json.loads((GOLDEN / "conversations.json").read_text(encoding="utf-8"))
PICTURE = ImageRef(b"")
CASES = [(name, case) for name in template_names() for case in CONVERSATIONS]


def turns_of(conversation: list[list[str]]) -> list[Turn]:
    """Pairs of role and text; ``<image>`` in the text is a picture."""
    turns = []
    for role, text in conversation:
        first, *rest = text.split("<image>")
        parts = [first, *(part for piece in rest for part in (PICTURE, piece))]
        turns.append(Turn(role, tuple(part for part in parts if part != "")))
    return turns


def with_marks(segments: list[Segment]) -> str:
    """The prompt with ⟦ ⟧ around what is supervised."""
    marked = "".join(f"⟦{part.text}⟧" if part.supervised else part.text for part in segments)
    return marked.replace("⟧⟦", "")


@pytest.mark.golden
@pytest.mark.parametrize(("name", "case"), CASES)
def test_text_and_mask_are_the_committed_ones(name: str, case: str) -> None:
    golden = json.loads((GOLDEN / "prompts" / f"{name}.json").read_text(encoding="utf-8"))
    segments = render(
        load_template(name), turns_of(CONVERSATIONS[case]), add_generation_prompt=case == "prompt"
    )
    assert with_marks(segments) == golden[case]


@pytest.mark.parity
@pytest.mark.parametrize(("name", "case"), CASES)
def test_transformers_renders_the_same_text_and_the_same_mask(name: str, case: str) -> None:
    template, turns = load_template(name), turns_of(CONVERSATIONS[case])
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in turn.parts
            ],
        }
        for turn in turns
    ]
    prompts, spans = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=case == "prompt",
    )
    segments = render(template, turns, add_generation_prompt=case == "prompt")
    assert prompt_text(segments) == prompts[0]
    pieces = "".join(prompts[0][start:end] for start, end in spans[0])
    assert "".join(part.text for part in segments if part.supervised) == pieces


def test_every_golden_file_has_its_template_and_every_case() -> None:
    files = {path.stem: json.loads(path.read_text("utf-8")) for path in (GOLDEN / "prompts").glob("*.json")}
    assert sorted(files) == list(template_names())
    assert all(list(cases) == list(CONVERSATIONS) for cases in files.values())


def test_what_is_said_never_passes_through_the_template() -> None:
    hostile = "{{ 7 * 7 }}{% raw %}<image>\ue0000\ue001\ue000end\ue001</s>"
    turns = [Turn("user", (hostile, PICTURE, hostile)), Turn("assistant", (hostile,))]
    for name in template_names():
        segments = render(load_template(name), turns)
        assert {part.text for part in segments if part.kind == "text"} == {hostile}
        assert [part.turn for part in segments if part.kind == "image"] == [0]
        assert all((part.turn == 1) == part.supervised for part in segments)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content[0].text }}", "wrote 0 <image> for 1 pictures"),
        ("<image>{{ messages[0].content[1].text[:2] }}", "alters|texts"),
        ("<image>", "wrote 0 of 2 texts"),
        ("<image>{{ messages[1].content }}{{ messages[0].content[1].text }}", "another order"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "not valid jinja"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("\ue000", "may not contain"),
    ],
)
def test_a_template_that_loses_something_is_refused(template: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        render(template, [Turn("user", (PICTURE, "a")), Turn("assistant", ("b",))])


def test_names_variables_and_unicode() -> None:
    assert template_variables("{{ messages }}{{ bos_token }}{% if add_generation_prompt %}{% endif %}") == {
        "bos_token"
    }
    with pytest.raises(UnknownNameError, match="Did you mean 'chatml'"):
        load_template("chatm")
    with pytest.raises(SampleError, match="turn 0 has half a character"):
        render(load_template("chatml"), [Turn("user", ("\ud800",))])
    assert prompt_text(render("{{ bos_token }}!", [], variables={"bos_token": "<s>"})) == "<s>!"

"""Checkpoints that are a part of a model: what a first stage leaves, and adapters on a base."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests.layouts import (
    clip,
    convnext,
    decoder,
    llava,
    mini_gemini,
    plain_decoder,
    written,
)
from vlmix.cli.main import app
from vlmix.convert._compose import Beside
from vlmix.convert.export import export
from vlmix.convert.run import convert
from vlmix.core.errors import CheckpointError, InputError
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.train.recipe_file import with_overrides

pytestmark = [
    pytest.mark.flow,
    # peft asks transformers for a name that transformers deprecates.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
GOLDENS = Path(__file__).parents[2].parent / "shared" / "goldens"
IDS = torch.tensor([[2, 5, 7, 11, 13]])


def loaded(folder):
    return VlmixForConditionalGeneration.from_pretrained(folder).eval()


@torch.no_grad()
def answers(folder):
    model = loaded(folder)
    side, tokens = model.config.image_size, model.config.image_seq_length
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    ids = torch.cat((torch.full((1, tokens), model.config.image_token_id), IDS), dim=1)
    return model(input_ids=ids, pixel_values=pixels).logits


def first_stage(whole, folder, parts, kind="Llama", name="mm_projector.bin"):
    """What the first stage leaves of a whole folder: some tensors, and the class it started from."""
    tensors = load_file(whole / "model.safetensors")
    new = {name: value for name, value in tensors.items() if any(part in name for part in parts)}
    config = json.loads((whole / "config.json").read_text())
    config |= {"architectures": [f"{kind}ForCausalLM"], "tune_mm_mlp_adapter": True}
    return written(folder, new, config, name)


def equal_tensors(one, other):
    before, after = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def own_folder(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def clip_folder(tmp_path):
    return own_folder(clip(), tmp_path / "clip")


def test_llavas_projector_is_completed_with_decoder_and_tower_and_written_as_a_whole(tmp_path, clip_folder):
    whole = llava("llama", tmp_path / "whole", tmp_path)
    stage = first_stage(whole, tmp_path / "pretrain", ["mm_projector"])
    beside = Beside(tmp_path / "decoder-llama", towers={"openai/clip": clip_folder})
    assert convert(stage, tmp_path / "ours", beside=beside).family == "llava"
    convert(whole, tmp_path / "expected")
    assert torch.equal(answers(tmp_path / "ours"), answers(tmp_path / "expected"))
    export(tmp_path / "ours", tmp_path / "back", "llava")
    found = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (found["architectures"], found["mm_vision_tower"]) == (["LlavaLlamaForCausalLM"], "openai/clip")
    again = convert(tmp_path / "back", tmp_path / "again", beside=Beside(towers={"clip": clip_folder}))
    assert again.family == "llava"
    assert torch.equal(answers(tmp_path / "again"), answers(tmp_path / "expected"))


@pytest.mark.parametrize("kind", ["gemma", "mixtral"])
def test_mini_geminis_first_stage_holds_its_encoders_and_takes_any_decoder(kind, tmp_path):
    whole = mini_gemini(kind, tmp_path / "whole", tmp_path)
    parts = ["mm_projector", "vlm_uni", "vision_tower"]
    stage = first_stage(whole, tmp_path / "pretrain", parts, kind.capitalize())
    convert(stage, tmp_path / "ours", beside=Beside(tmp_path / f"decoder-{kind}"))
    convert(whole, tmp_path / "expected")
    assert torch.equal(answers(tmp_path / "ours"), answers(tmp_path / "expected"))
    export(tmp_path / "ours", tmp_path / "back", "mini_gemini")
    equal_tensors(whole, tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "again")
    assert torch.equal(answers(tmp_path / "again"), answers(tmp_path / "expected"))


def test_encoders_are_read_from_openai_and_openclip_folders(tmp_path, clip_folder):
    whole = mini_gemini("llama", tmp_path / "whole", tmp_path)
    stage = first_stage(whole, tmp_path / "pretrain", ["mm_projector", "vlm_uni"])
    eye = {f"visual.trunk.{name}": value for name, value in convnext().state_dict().items()}
    text = {name: torch.ones(2) for name in ("text.transformer.x", "logit_scale", "visual.head.proj.weight")}
    aux = written(tmp_path / "aux", {**eye, **text}, {}, "open_clip_pytorch_model.bin")
    (aux / "config.json").rename(aux / "open_clip_config.json")
    towers = {"clip": clip_folder, "openclip-convnext": aux}
    convert(stage, tmp_path / "ours", beside=Beside(tmp_path / "decoder-llama", towers=towers))
    convert(whole, tmp_path / "expected")
    assert torch.equal(answers(tmp_path / "ours"), answers(tmp_path / "expected"))


@pytest.mark.golden
@pytest.mark.skipif(not GOLDENS.is_dir(), reason="the shared golden folders are absent")
@pytest.mark.parametrize(
    ("name", "changes", "new", "eyes"),
    [
        (
            "llava-hr",
            ["encoders.0.heads=4", "encoders.0.image_size=84"],
            ("model.mm_projector.", "model.vision_tower.align_stages.0."),
            {
                "mm_vision_tower": "model.vision_tower.fast_vision_tower.vision_tower.",
                "vision_tower_slow": "model.vision_tower.slow_vision_tower.vision_tower.",
            },
        ),
        (
            "eagle-x2-clip-convnext",
            [
                "image_size=256",
                "fusion.grid=[8,8]",
                "encoders.0.image_size=84",
                "encoders.0.heads=4",
                "encoders.1.image_size=256",
            ],
            ("model.mm_projector.",),
            {
                "clip-448": "model.vision_tower.vision_towers.0.vision_tower.",
                "convnext-1024": "model.vision_tower.vision_towers.1.vision_tower.",
            },
        ),
    ],
)
def test_first_stages_of_llava_hr_and_eagle_are_completed(name, changes, new, eyes, tmp_path):
    tensors = load_file(GOLDENS / name / "model.safetensors")
    config = json.loads((GOLDENS / name / "config.json").read_text()) | {"freeze_vision": True}
    tensors = {key: value for key, value in tensors.items() if "align_stages_latent" not in key}
    seen = ("model.vision_tower.", "model.mm_projector.")
    whole = written(tmp_path / "whole", tensors, config)
    stage = {key: value for key, value in tensors.items() if key.startswith(new)}
    written(tmp_path / "stage", stage, config, "mm_projector.bin")
    language = {key: value for key, value in tensors.items() if not key.startswith(seen)}
    written(tmp_path / "language", language, {**config, "model_type": "llama"})
    towers = {}
    for key, prefix in eyes.items():
        inside = {old.removeprefix(prefix): v for old, v in tensors.items() if old.startswith(prefix)}
        inside = {old.replace(".weight_", "."): value for old, value in inside.items()}
        towers[config.get(key, key)] = written(tmp_path / key, inside, {})
    change = lambda raw: with_overrides(raw, changes)  # noqa: E731
    convert(whole, tmp_path / "expected", change=change)
    convert(
        tmp_path / "stage",
        tmp_path / "ours",
        change=change,
        beside=Beside(tmp_path / "language", towers=towers),
    )
    assert torch.equal(answers(tmp_path / "ours"), answers(tmp_path / "expected"))


@pytest.fixture
def adapters(tmp_path):
    """LLaVA's LoRA folder on a plain decoder, and the same model merged by peft."""
    whole = llava("llama", tmp_path / "whole", tmp_path)
    base = plain_decoder(decoder("llama"), tmp_path / "base")
    names = ["q_proj", "v_proj", "down_proj"]
    wrapped = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=3, lora_alpha=12, target_modules=names)
    )
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.normal_()
    wrapped.save_pretrained(tmp_path / "lora")
    trained = {
        f"base_model.model.{name}": value
        for name, value in load_file(whole / "model.safetensors").items()
        if "mm_projector" in name
    }
    torch.save(trained, tmp_path / "lora" / "non_lora_trainables.bin")
    config = json.loads((whole / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "lora" / "config.json").write_text(json.dumps(config))
    llava("llama", tmp_path / "merged", tmp_path, model=wrapped.merge_and_unload())
    return tmp_path / "lora", base


def test_adapters_are_merged_as_peft_does(adapters, tmp_path, clip_folder):
    lora, base = adapters
    towers = {"openai/clip": clip_folder}
    done = convert(lora, tmp_path / "ours", beside=Beside(base=base, towers=towers))
    assert done.family == "llava"
    convert(tmp_path / "merged", tmp_path / "expected")
    convert(tmp_path / "whole", tmp_path / "plain")
    expected = answers(tmp_path / "expected")
    # 1e-5: B A is added in another order
    torch.testing.assert_close(answers(tmp_path / "ours"), expected, atol=1e-5, rtol=1e-5)
    assert (answers(tmp_path / "plain") - expected).abs().max() > 0.1
    # On a base that is a whole LLaVA, the projector that was trained replaces the base's.
    again = convert(lora, tmp_path / "again", beside=Beside(base=tmp_path / "whole"))
    assert again.family == "llava"
    assert torch.equal(answers(tmp_path / "again"), answers(tmp_path / "ours"))


def test_adapters_that_more_than_merging_needs_are_refused(adapters, tmp_path):
    lora, base = adapters
    said = json.loads((lora / "adapter_config.json").read_text())
    for key, value in {"use_dora": True, "init_lora_weights": "pissa", "peft_type": "IA3"}.items():
        (lora / "adapter_config.json").write_text(json.dumps({**said, key: value}))
        with pytest.raises(CheckpointError, match=f"{key}.*merge_and_unload"):
            convert(lora, tmp_path / "ours", beside=Beside(base=base))


def run(*words):
    return CliRunner().invoke(app, ["convert", *map(str, words)])


def test_what_is_missing_or_too_much_is_said_with_the_option_that_helps(adapters, tmp_path, clip_folder):
    lora, base = adapters
    whole, target = tmp_path / "whole", tmp_path / "target"
    stage = first_stage(whole, tmp_path / "pretrain", ["mm_projector"], name="model.safetensors")
    convert(whole, tmp_path / "ours")
    language = ["--language-model", base]
    cases = [
        ([stage, target], "no language model.*--language-model DIR"),
        ([stage, target, *language], "CLIP tower 'openai/clip'.*--tower openai/clip=DIR"),
        ([stage, target, *language, "--tower", f"openai/clip={tmp_path / 'nowhere'}"], "no such folder"),
        (
            [stage, target, *language, "--tower", f"clip={clip_folder}", "--tower", f"eye={clip_folder}"],
            "--tower eye.*names openai/clip",
        ),
        ([whole, target, *language], "needs no --language-model"),
        ([lora, target], "holds adapters.*--base DIR"),
        ([whole, target, "--base", base], "adapter_config.json.*--base has no use"),
        ([whole, target, "--tower", "clip"], "NAME=DIR"),
        ([tmp_path / "ours", target], "vlmix model already.*--to FAMILY.*llava.*--drop-encoder"),
        ([whole, target, "--to", "llava"], "is no vlmix model"),
        ([tmp_path / "ours", target, "--to", "llava", "--tokenizer", base], "--tokenizer cannot go with it"),
        ([tmp_path / "nowhere", target], "no such folder.*hf download"),
    ]
    for words, message in cases:
        result = run(*words)
        assert isinstance(result.exception, InputError), words
        assert re.search(message, str(result.exception), re.DOTALL), str(result.exception)
        assert not target.exists()


def test_the_command_completes_a_first_stage_and_says_that_a_pickle_was_read(tmp_path, clip_folder):
    whole = llava("llama", tmp_path / "whole", tmp_path)
    stage = first_stage(whole, tmp_path / "pretrain", ["mm_projector"])
    words = ["--language-model", tmp_path / "decoder-llama", "--tower", f"openai/clip={clip_folder}"]
    result = run(stage, tmp_path / "ours", *words)
    assert result.exit_code == 0
    assert "mm_projector.bin, a pickle, with a restricted reader in a child process" in result.stderr
    assert "%" not in result.stderr  # no bars where nobody watches
    assert "llava: " in result.stdout
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_families_are_listed():
    result = CliRunner().invoke(app, ["list", "families"])
    assert all(name in result.stdout for name in ("eagle", "llava_hf", "mini_gemini", "arXiv:2403.18814"))


def test_answers_end_where_the_authors_say_and_the_way_back_keeps_their_word(tmp_path):
    published = mini_gemini("llama", tmp_path / "hub", tmp_path)
    said = {"eos_token_id": [3, 9], "temperature": 0.2, "do_sample": True}
    (published / "generation_config.json").write_text(json.dumps(said))
    convert(published, tmp_path / "ours")
    assert loaded(tmp_path / "ours").generation_config.eos_token_id == [3, 9]
    export(tmp_path / "ours", tmp_path / "back", "mini_gemini")
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == said

"""EVA-02's detector as its authors published it: a pickle in their names, of which the backbone is read."""

import pytest
import torch
from safetensors.torch import save_file

from tests.parity.test_encoders import build
from vlmix.core import pickles
from vlmix.core.errors import CheckpointError
from vlmix.encoders.eva02 import Eva02Settings

pytestmark = pytest.mark.flow
FILE = "eva02_L_coco_det_sys_o365.pth"
THEIRS = {
    "q_proj.bias": "q_bias",
    "v_proj.bias": "v_bias",
    "fc1_g": "w1",
    "fc1_x": "w2",
    "fc2": "w3",
    "mlp.norm": "mlp.ffn_ln",
    "patch_embed.": "patch_embed.proj.",
}
BESIDE = (
    "backbone.net.rope_win.freqs_cos",
    "backbone.net.rope_glb.freqs_sin",
    "backbone.net.blocks.1.attn.rope.freqs_cos",
    "backbone.simfp_2.0.weight",
    "proposal_generator.anchor_generator.cell_anchors.0",
    "roi_heads.box_predictor.0.cls_score.weight",
)


class Harmful:
    """A pickle that makes a file when it is read with the ordinary reader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def encoder():
    made = build(Eva02Settings.tiny())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    return made


def detector(encoder):
    found = {name: torch.ones(2) for name in BESIDE}
    for ours, value in encoder.tower.state_dict().items():
        name = ours
        for mine, theirs in THEIRS.items():
            name = name.replace(mine, theirs)
        found[f"backbone.net.{name}"] = value.clone()
    return found


def read(source):
    made = build(Eva02Settings.tiny())
    made.load_weights(str(source))
    return made.tower.state_dict()


@pytest.mark.parametrize(
    ("place", "wrapped", "source"),
    [
        (FILE, True, "."),
        (f"eva02/det/{FILE}", False, "."),
        ("any.pth", True, "any.pth"),
        ("model.safetensors", False, "."),
    ],
)
def test_the_published_file_is_read_from_its_folder_or_path(
    encoder, place, wrapped, source, tmp_path, monkeypatch
):
    monkeypatch.setattr(pickles, "PART_BYTES", 1 << 12)  # several parts
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    state = detector(encoder)
    if place.endswith(".pth"):
        torch.save({"model": state, "iteration": 7} if wrapped else state, path)
    else:
        save_file(encoder.tower.state_dict(), path)
    found = read(tmp_path / source)
    assert all(torch.equal(found[name], value) for name, value in encoder.tower.state_dict().items())


def test_every_tensor_is_accounted_for(encoder, tmp_path):
    state = detector(encoder)
    del state["backbone.net.blocks.0.attn.q_bias"]
    state |= {"backbone.net.norm.weight": torch.ones(2), "backbone.net.pos_embed": torch.ones(1, 5, 16)}
    torch.save({"model": state}, tmp_path / FILE)
    with pytest.raises(CheckpointError) as refused:
        read(tmp_path)
    said = str(refused.value)
    assert "1 missing: blocks.0.attn.q_proj.bias. 1 left over: norm.weight. 1 of another shape: " in said
    assert "pos_embed (1, 5, 16), here (1, 10, 16)" in said


def test_a_pickle_that_runs_code_is_refused_unread(encoder, tmp_path):
    state = {**detector(encoder), "roi_heads.mask": Harmful(tmp_path / "harmed")}
    torch.save({"model": state}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"refused; only plain tensors are read from a \.pth file"):
        read(tmp_path)
    assert not (tmp_path / "harmed").exists()

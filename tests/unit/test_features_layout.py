"""Features laid out in memory as encoders leave them are the same numbers, however many views there are."""

import pytest
import torch

from tests.tiny import config
from vlmix.models.looking import layout, look, questions
from vlmix.models.modeling import VlmixForConditionalGeneration


@pytest.mark.parametrize("pictures", [1, 2, 5])
def test_layout_changes_no_number(pictures):
    # Where there is one view, the first axis of a ConvNeXt's map has any stride.
    model = VlmixForConditionalGeneration(config()).eval().model
    asked = questions(model)
    pixels = torch.randint(0, 256, (pictures, 3, 32, 32), dtype=torch.uint8)
    seen = look(model, asked, pixels, None)
    laid = seen.laid_out(layout(model, asked))
    for maps, others in zip(seen.maps, laid.maps, strict=True):
        for found, other in zip(maps, others, strict=True):
            assert torch.equal(found.tokens, other.tokens)
            # No two numbers share a place in memory.
            spread = other.tokens.new_empty(0).set_(other.tokens.untyped_storage()).numel()
            assert spread >= found.tokens.numel()

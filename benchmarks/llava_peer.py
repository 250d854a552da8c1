"""LLaVA-1.5 of vlmix's parts beside transformers' own model, with the same sizes and weights.

Times prefill and training steps of both in one process, in turns, on the same pictures and tokens, and checks
that their logits agree. Ours gets pixels of 8 bits and resizes and normalises them itself; theirs gets the
normalised tensor, whose making is not counted. Peak memory is that of a process of its own for each. Prints a
table and, with ``--out``, writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlmix.convert.run import convert
from vlmix.encoders._pixels import CLIP_MEAN, CLIP_STD
from vlmix.models.modeling import VlmixForConditionalGeneration

PLACEHOLDER, TEXT, IGNORED = 31999, 48, -100
# CLIP-B's tower and a decoder of 190 M, for two cores; the published 7B for an accelerator. Width, inner
# width, layers and heads of each, then the picture's side and the patch's.
SIZES: dict[str, dict[str, Any]] = {
    "small": {"vision": (768, 3072, 12, 12), "text": (1024, 2816, 10, 16), "picture": (224, 14)},
    "7b": {"vision": (1024, 4096, 24, 16), "text": (4096, 11008, 32, 32), "picture": (336, 14)},
}
_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
Step = Callable[[nn.Module, dict[str, Tensor]], Tensor]
CASES = {"one picture a row": (1, 1), "one row of text": (1, 0), "text alone": (0, 0)}


def make_peer(size: str, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """Transformers' model with random weights."""
    torch.manual_seed(0)
    sizes = SIZES[size]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **dict(zip(_KEYS, sizes["vision"], strict=True)),
            image_size=sizes["picture"][0],
            patch_size=sizes["picture"][1],
        ),
        text_config=LlamaConfig(
            vocab_size=PLACEHOLDER + 1,
            max_position_embeddings=2048,
            **dict(zip(_KEYS, sizes["text"], strict=True)),
        ),
        image_token_index=PLACEHOLDER,
    )
    model = LlavaForConditionalGeneration(config)
    return model.to(dtype)


def peer_model(folder: Path, device: torch.device) -> nn.Module:
    """It, from its folder."""
    return _aligned(LlavaForConditionalGeneration.from_pretrained(folder / "published")).to(device)


def our_model(folder: Path, device: torch.device) -> nn.Module:
    """The converted model."""
    return _aligned(VlmixForConditionalGeneration.from_pretrained(folder / "ours")).to(device)


def batch(images: tuple[int, ...], side: int, patch: int, device: torch.device) -> dict[str, Tensor]:
    """Rows with so many pictures each, padded on the right, as ids, mask, labels and pixels in 0..255."""
    count, generator = (side // patch) ** 2, torch.Generator().manual_seed(1)
    rows = [
        [
            1,
            *[PLACEHOLDER] * (shown * count),
            *torch.randint(3, PLACEHOLDER, (TEXT,), generator=generator).tolist(),
        ]
        for shown in images
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = ids.masked_fill((ids == PLACEHOLDER) | (mask == 0), IGNORED)
    pixels = torch.randint(0, 256, (sum(images), 3, side, side), generator=generator, dtype=torch.uint8)
    found = {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}
    return {name: value.to(device) for name, value in found.items()}


def theirs(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same batch as transformers' model takes it."""
    pixels = inputs["pixel_values"]
    if not pixels.shape[0]:
        return {name: value for name, value in inputs.items() if name != "pixel_values"}
    mean, std = (torch.tensor(c, device=pixels.device)[:, None, None] for c in (CLIP_MEAN, CLIP_STD))
    return {**inputs, "pixel_values": ((pixels.float() / 255 - mean) / std).to(dtype)}


def prefill(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Read the prompt; the logits of its last position."""
    with torch.no_grad():
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        return model(**rest, logits_to_keep=1, use_cache=True).logits


def training(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """A forward and a backward pass through everything, logits at every position."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach()


STEPS: dict[str, Step] = {"prefill": prefill, "training": training}


def in_turns(
    runs: dict[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every run, one after the other and again, each first run discarded."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        names = list(runs) if turn % 2 else list(runs)[::-1]
        for name in names:
            _wait(device)
            start = time.perf_counter()
            runs[name]()
            _wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Medians, and the median of the turns' own ratios with the middle half of them."""
    pairs = sorted(a / b for a, b in zip(seconds["vlmix"], seconds["transformers"], strict=True))
    quarter = len(pairs) // 4
    return {
        "vlmix_seconds": statistics.median(seconds["vlmix"]),
        "transformers_seconds": statistics.median(seconds["transformers"]),
        "ratio": statistics.median(pairs),
        "ratio_low": pairs[quarter],
        "ratio_high": pairs[-1 - quarter],
    }


def peak_of(which: str, what: str, folder: Path, options: argparse.Namespace) -> int:
    """Peak memory of a process that does only this, in bytes: resident on the CPU, allocated on a GPU."""
    command = [sys.executable, __file__, "--size", options.size, "--device", options.device]
    command += ["--threads", str(options.threads), "--only", which, what, str(folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def only(which: str, what: str, folder: Path, options: argparse.Namespace) -> None:
    """Do one thing once and print the peak memory."""
    device, dtype = torch.device(options.device), _dtype(options.device)
    model = our_model(folder, device) if which == "vlmix" else peer_model(folder, device)
    inputs = batch((1, 1), *_picture(options.size), device)
    inputs = inputs if which == "vlmix" else theirs(inputs, dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        STEPS[what](model, inputs)
        print(torch.cuda.max_memory_allocated(device))
        return
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # a process inherits its parent's peak
    STEPS[what](model, inputs)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    print(int(status.partition("VmHWM:")[2].split()[0]) * 1024)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, on one machine."""
    device, dtype = torch.device(options.device), _dtype(options.device)
    side, patch = _picture(options.size)
    report: dict[str, Any] = {"cases": {}, "peak_bytes": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_peer(options.size, dtype).save_pretrained(folder / "published")
        convert(folder / "published", folder / "ours")
        ours, peer = our_model(folder, device), peer_model(folder, device)
        for name, rows in CASES.items():
            inputs = batch(rows, side, patch, device)
            their_inputs = theirs(inputs, dtype)
            our_inputs = inputs if inputs["pixel_values"].shape[0] else their_inputs
            shown = inputs["attention_mask"].bool()
            with torch.no_grad():
                difference = (
                    (ours(**our_inputs).logits[shown] - peer(**their_inputs).logits[shown]).abs().max()
                )
            report["cases"][name] = {"largest_difference": difference.item()}
            for what, step in STEPS.items():
                runs = {
                    "vlmix": partial(step, ours, our_inputs),
                    "transformers": partial(step, peer, their_inputs),
                }
                report["cases"][name][what] = ratio(in_turns(runs, options.repeats, device))
        del ours, peer
        for what in STEPS:
            peaks = {which: peak_of(which, what, folder, options) for which in ("vlmix", "transformers")}
            report["peak_bytes"][what] = peaks
    return report


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"{'':34}{'vlmix, s':>12}{'transformers, s':>17}{'ratio':>8}   middle half"]
    for name, case in report["cases"].items():
        for what in STEPS:
            r = case[what]
            lines.append(
                f"{name + ', ' + what:34}{r['vlmix_seconds']:12.3f}{r['transformers_seconds']:17.3f}"
                f"{r['ratio']:8.3f}   [{r['ratio_low']:.3f}, {r['ratio_high']:.3f}]"
            )
        lines.append(f"{'':6}largest difference of logits {case['largest_difference']:.1e}")
    for what, peaks in report["peak_bytes"].items():
        a, b = (peaks[which] / 2**20 for which in ("vlmix", "transformers"))
        lines.append(f"{'peak memory, MiB, ' + what:34}{a:12.0f}{b:17.0f}{a / b:8.3f}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="small", choices=tuple(SIZES))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.only:
        only(options.only[0], options.only[1], Path(options.only[2]), options)
        return
    report = measure(options)
    report["setting"] = {
        "size": options.size,
        "device": options.device,
        "repeats": options.repeats,
        "sizes": SIZES[options.size],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(table(report))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _aligned(model: nn.Module) -> nn.Module:
    """Move weights out of the file: where they lie there makes a product take up to 4 % longer."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def _picture(size: str) -> tuple[int, int]:
    side, patch = SIZES[size]["picture"]
    return side, patch


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()

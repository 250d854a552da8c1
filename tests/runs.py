"""A tiny recipe that trains for real in a second or two, and what a run of it left."""

import hashlib
import io

from rich.console import Console

from vlmix.core.settings import read_settings
from vlmix.train.recipe import Recipe
from vlmix.train.records import read_metrics
from vlmix.train.run import run_recipe


def synth(*tasks, **more):
    return {"source": {"kind": "synth", "size": 20, "image_size": 48, "tasks": list(tasks), **more}}


def stage(name, train, *data, **more):
    rest = {"batch_size": 4, "steps": 3, "save_every_steps": 1, **more}
    return {"name": name, "train": train, "data": list(data), **rest}


LANGUAGE = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "attention_dropout": 0.2,
    "tie_word_embeddings": True,
}

CONVNEXT = {
    "kind": "convnext",
    "image_size": 48,
    "depths": [1, 1, 1, 1],
    "widths": [4, 6, 8, 10],
    "stages": [0, 1],
    "layer_scale": 1.0,
    "drop_path": 0.5,
}

TINY = {
    "name": "tiny",
    "model": {
        "image_size": 48,
        "encoders": [
            {
                "kind": "siglip",
                "image_size": 48,
                "patch_size": 24,
                "width": 8,
                "layers": 1,
                "heads": 2,
                "mlp": 16,
            },
            CONVNEXT,
        ],
        "fusion": {"kind": "patch_mining"},
        "projector": {"kind": "linear"},
        "language_model": LANGUAGE,
        "tokenizer": {"train": {"vocab_size": 300, "samples": 4}},
        "chat_template": "chatml",
        "max_length": 128,
    },
    "stages": [
        stage("align", {"projector.*": 1e-2}, synth("caption")),
        stage(
            "tune",
            {"*": 1e-2, "encoders.0.*": 1e-3},
            {**synth("colour"), "weight": 2},
            {**synth("text_digits"), "weight": 1},
            micro_batch_size=3,
            before=[{"kind": "reinitialise", "parameters": ["projector.*"]}],
            optimizer={"weight_decay": 0.1},
        ),
    ],
}


def recipe(**changes):
    return read_settings(Recipe, {**TINY, **changes})


def one_stage(*data, **more):
    only = stage("only", {"*": 1e-2}, *(data or [synth("colour")]))
    return recipe(stages=[{**only, **more}])


def train(what, out, resume=False):
    text = io.StringIO()
    run_recipe(what, out, resume=resume, console=Console(file=text, width=200))
    return text.getvalue()


def digest(folder):
    """Everything a checkpoint holds that decides the rest of the run."""
    names = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def told(out):
    """The metrics without the two clocks."""
    return [
        {k: v for k, v in row.items() if not k.endswith("seconds")}
        for row in read_metrics(out / "metrics.jsonl")
    ]

"""``vlmix eval`` killed while it answers, again and again, and shared by two processes.

Runs are children forked from this process, which has imported all: ``python -m tests.eval_runs FOLDER`` is
such a process.
"""

import io
import json
import os
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import torch

from tests.processes import free_port
from vlmix.cli import judging  # noqa: F401 - what a command imports when it runs is imported here once
from vlmix.cli import main as cli
from vlmix.core import files
from vlmix.core.errors import VlmixError
from vlmix.core.parts import ENCODERS
from vlmix.evals import store
from vlmix.evals.benchmarks.synth_qa import SynthQa, SynthQaSettings
from vlmix.models.configuration import VlmixConfig
from vlmix.models.image_processing import VlmixImageProcessor
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.processing import VlmixProcessor
from vlmix.models.tokenization import train_tokenizer

SIZE, SIDE = 24, 48
ASKED = ("--benchmark", "synth_qa", "--set", f"size={SIZE}", "--set", f"image_size={SIDE}")
MOMENTS = ("before", "half a line", "after")
FILES = ("results.json", "answers.jsonl")


def model_and_processor(experts=None, dtype=torch.float32):
    """Random, with weights so wide that its answers depend on what it sees."""
    torch.manual_seed(0)
    samples = SynthQa(SynthQaSettings(size=SIZE, image_size=SIDE)).samples()
    tokenizer = train_tokenizer([turn.text for sample in samples for turn in sample.turns], vocab_size=320)
    decoder = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    }
    config = VlmixConfig(
        text_config=decoder,
        encoders=[ENCODERS.get("clip").settings_class.tiny().model_dump()],
        fusion={"kind": "single"},
        projector={"kind": "linear"},
        image_size=32,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        **({"experts": experts} if experts else {}),
    )
    model = VlmixForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4.0)
    length = config.image_seq_length
    processor = VlmixProcessor(VlmixImageProcessor(image_size=32), tokenizer, image_seq_length=length)
    return model.to(dtype).eval(), processor


def save(folder):
    for part in model_and_processor():
        part.save_pretrained(folder)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def dies(real, number, moment):
    """``AnswerStore.add``, and the end of this process at its call ``number``."""
    calls = 0

    def add(self, found):
        nonlocal calls
        calls += 1
        if calls < number:
            return real(self, found)
        if moment == "half a line":
            self._path.parent.mkdir(exist_ok=True)
            with self._path.open("ab") as file:
                file.write(b'{"key": "half')
        elif moment == "after":
            real(self, found)
        return die()

    return add


def command(arguments):
    """Run the command; its exit code and what it wrote to standard error."""
    told = io.StringIO()
    code = 0
    with redirect_stderr(told), redirect_stdout(io.StringIO()):
        try:
            cli.app(["eval", *map(str, arguments)], standalone_mode=False)
        except VlmixError as error:
            code = error.exit_code
            told.write(str(error))
    return code, told.getvalue()


def begin(arguments, *, rank=None, port=0, change=None):
    """Start the command in a child, which writes what it told beside the report folder."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        out = Path(arguments[arguments.index("--out") + 1])
        if rank is not None:
            said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in said.items()}}
        with change or mock.patch.object(os, "nothing", create=True):
            code, told = command(arguments)
        out.with_name(f"{out.name}-{rank or 0}.txt").write_text(told)
    except BaseException as error:  # noqa: BLE001  (the parent is told)
        sys.__stderr__.write(f"{type(error).__name__}: {error}\n")
    finally:
        os._exit(code)


def end(pid, seconds=120):
    """The child's exit code; one that hangs is killed."""
    last = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > last:
            os.kill(pid, signal.SIGABRT)
            last += seconds
        time.sleep(0.005)


def run(model, out, *more, change=None):
    return end(begin([model, *ASKED, "--out", out, *more], change=change))


def together(model, out, *more):
    port = free_port()
    pids = [begin([model, *ASKED, "--out", out, *more], rank=rank, port=port) for rank in range(2)]
    return [end(pid) for pid in pids]


def content(out):
    return {name: (out / name).read_text() for name in FILES}


def left(out):
    return sorted(path.name for path in out.iterdir()) if out.is_dir() else []


def killed_again_and_again(model, out, kills):
    """One folder, killed ``kills`` times at a write of its store, then once as it is published."""
    add, codes = store.AnswerStore.add, []
    for number in range(kills):
        moment = MOMENTS[number % len(MOMENTS)]
        change = mock.patch.object(store.AnswerStore, "add", dies(add, 1 + number % 2, moment))
        codes.append(run(model, out, "--batch-size", (1, 4, 8)[number % 3], change=change))
    publish = mock.patch.object(files, "_replace_folder", die)
    codes.append(run(model, out, change=publish))
    between = left(out)
    codes.append(run(model, out))
    return {
        "codes": codes,
        "between": between,
        "told": out.with_name(f"{out.name}-0.txt").read_text(),
        "files": content(out),
        "left": left(out.parent),
    }


def refused(model, out):
    """A second process on a folder in use."""
    with files.run_lock(out):
        code = run(model, out)
    return {"code": code, "told": out.with_name(f"{out.name}-0.txt").read_text()}


def attack(folder, kills=20):
    model = folder / "model"
    save(model)
    found = {"codes": []}
    for name, size in {"whole": 1, "eight": 8}.items():
        (folder / name).mkdir()
        found["codes"].append(run(model, folder / name / "report", "--batch-size", size))
        found[name] = content(folder / name / "report")
    (folder / "killed").mkdir()
    found["killed"] = killed_again_and_again(model, folder / "killed" / "report", kills)
    (folder / "together").mkdir()
    found["codes"] += together(model, folder / "together" / "report")
    found["together"] = content(folder / "together" / "report")
    found["left"] = left(folder / "together" / "report")
    found["refused"] = refused(model, folder / "whole" / "report")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(attack(Path(sys.argv[1]))))

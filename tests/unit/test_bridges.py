"""Other harnesses' requests, in the shapes they document, answered by a model of ours."""

from dataclasses import dataclass

import pytest
from PIL import Image

from tests.eval_runs import model_and_processor
from vlmix.core.errors import InputError, UnknownNameError
from vlmix.core.sample import Decoding, Sample, Turn
from vlmix.evals.bridges import ConversationRequests, PlainRequests
from vlmix.evals.opened import opened
from vlmix.evals.responder import CannedResponder, ModelResponder
from vlmix.models.loading import default_device

ARGUMENTS = {"batch_size": "2", "max_batch_size": None, "device": "cpu"}


@dataclass
class Request:
    """What both harnesses' ``Instance`` has and is looked at here."""

    arguments: tuple

    @property
    def args(self):
        return self.arguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bridged")
    for part in model_and_processor():
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def responder(folder):
    return opened({"pretrained": folder, **ARGUMENTS})[0]


def test_plain_requests_get_likelihoods_and_texts_up_to_their_stops(responder):
    plain = PlainRequests(responder, Decoding(batch_size=2))
    pairs = [("What colour", " is it"), ("", "circle")]
    told = list(responder.likelihoods(pairs))
    assert plain.loglikelihood([Request(pair) for pair in pairs]) == [(-a.nats, a.greedy) for a in told]
    (whole,) = responder.likelihoods([("", "How many")])
    assert plain.loglikelihood_rolling([Request(("How many",))]) == [-whole.nats]
    options = [{"until": [], "max_gen_toks": 6}, {"max_gen_toks": 3, "do_sample": False, "temperature": 1.0}]
    texts = ["How many", "What colour", "Is there"]
    asked = [Request((text, options[place % 2])) for place, text in enumerate(texts)]
    free = plain.generate_until(asked)
    for place, text in enumerate(texts):
        sample = Sample("x", (Turn("user", (text,)),))
        decoding = Decoding(options[place % 2]["max_gen_toks"], plain=True)
        assert free[place] == next(iter(responder.respond([sample], decoding))).text
    stop = free[0][2]
    cut = plain.generate_until([Request((texts[0], {"until": [stop, "zzz"], "max_gen_toks": 6}))])
    assert cut == [free[0].partition(stop)[0]]
    with pytest.raises(InputError, match="judge a model folder"):
        PlainRequests(CannedResponder({}), Decoding()).loglikelihood([Request(("a", "b"))])


def test_conversations_are_shown_with_their_pictures(responder):
    pictures = [Image.new("RGB", (48, 48), colour) for colour in ("red", "white", "blue")]
    documents = {"mme": {"test": [{"picture": picture} for picture in pictures]}}

    def messages(document):
        content = [{"type": "image", "url": document["picture"]}, {"type": "text", "text": "What is it?"}]
        return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]

    options = {"max_new_tokens": 5, "temperature": 0, "num_beams": 1, "until": ["\n\n"], "top_p": None}
    asked = [Request(("unused", messages, options, number, "mme", "test")) for number in (2, 0, 1)]
    bridge = ConversationRequests(responder, Decoding(batch_size=2))
    found = bridge.generate_until(asked, documents)
    alone = [bridge.generate_until([one], documents)[0] for one in asked]
    assert found == alone
    assert len(set(found)) > 1, "the answers must depend on the picture for this test to see anything"
    for content in ([{"type": "video", "url": "a.mp4"}], [{"type": "image", "url": "http://there/a.png"}]):
        bad = Request(("", lambda _, c=content: [{"role": "user", "content": c}], options, 0, "mme", "test"))
        with pytest.raises(InputError, match="sees pictures"):
            bridge.generate_until([bad], documents)


def test_arguments_of_a_harness_open_a_model_folder(folder):
    assert isinstance(opened({"pretrained": folder, **ARGUMENTS})[0], ModelResponder)
    assert opened({"pretrained": folder, "batch_size": 3})[1].batch_size == 3
    assert opened({"pretrained": folder, "batch_size": "auto"})[1].batch_size == 64
    absent = opened({"pretrained": folder, "device": "xpu:0"})[0].model.device
    assert absent.type == default_device().type, "a device that is not there gives way to the machine's own"
    with pytest.raises(UnknownNameError, match="pretraned"):
        opened({"pretraned": folder})
    with pytest.raises(InputError, match="pretrained=DIR"):
        opened(ARGUMENTS)


@pytest.mark.filterwarnings("ignore")  # the harness's own, and those of what it imports
def test_lm_evaluation_harness_finds_the_model_by_name(folder):
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'vlmix[eval]'")
    import lm_eval.models
    from lm_eval.api.registry import get_model

    import vlmix.evals.harness

    assert lm_eval.models
    assert get_model("vlmix") is vlmix.evals.harness.HarnessModel
    model = get_model("vlmix").create_from_arg_string(f"pretrained={folder}", ARGUMENTS)
    assert model.loglikelihood([Request(("What", " is"))])[0][0] < 0


@pytest.mark.filterwarnings("ignore")  # the harness's own, and those of what it imports
def test_lmms_eval_finds_the_model_by_its_entry_point(folder):
    pytest.importorskip("lmms_eval", reason="needs lmms-eval, which is not a dependency of vlmix")
    from lmms_eval.api.instance import Instance
    from lmms_eval.models import get_model

    def messages(document):
        return [{"role": "user", "content": [{"type": "text", "text": document["question"]}]}]

    model = get_model("vlmix").create_from_arg_string(f"pretrained={folder}", ARGUMENTS)
    model.task_dict = {"mine": {"test": [{"question": "What is it?"}]}}
    arguments = ("", messages, {"max_new_tokens": 3}, 0, "mine", "test")
    told = {"task": "mine", "doc_id": 0, "repeats": 1, "split": "test"}
    asked = Instance("generate_until", arguments, 0, told)
    (said,) = model.generate_until([asked])
    assert isinstance(said, str)
    assert model.generate_until([asked]) == [said]

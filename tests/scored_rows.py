"""A few questions of every benchmark that has a scoring rule, each with a perfect answer."""

from vlmix.core.parts import SCORERS
from vlmix.core.sample import Row
from vlmix.evals.scoring._judged import JudgedScorer

_TYPES = {"structural": "query", "semantic": "attr", "detailed": "attrQ"}
_TEN = {"gold": ["red"] * 6 + ["blue"] * 4, "answer": "red"}
_OPTIONS = {"A": "a red bus", "B": "two dogs", "C": "Paris", "D": "a lamp"}


def _turned(group):
    """MMBench asks each question once for every rotation of its options."""
    texts = list(_OPTIONS.values())
    for turn in range(4):
        options = dict(zip("ABCD", texts[-turn:] + texts[:-turn], strict=True))
        letter = "ABCD"[turn]
        index = group + turn * 1_000_000
        yield {
            "id": index,
            "index": index,
            "rotation": turn,
            "group": group,
            "question": "Which?",
            **options,
            "category": "colour" if group % 2 else "count",
            "l2_category": "coarse",
            "split": "dev",
            "gold": letter,
            "answer": letter,
        }


PERFECT = {
    "ai2d": [
        {"options": ["leaf", "root", "stem", "seed"], "gold": gold, "answer": letter}
        for gold, letter in [(0, "A"), (3, "D"), ("B", "B")]
    ],
    "chartqa": [
        {"gold": "100", "answer": "100", "type": "human_test"},
        {"gold": "Yes", "answer": "Yes", "type": "augmented_test"},
        {"gold": "5%", "answer": "0.05", "type": "augmented_test"},
    ],
    "coco_caption": [
        {"gold": ["a man rides a horse on a beach"], "answer": "a man rides a horse on a beach"},
        {"gold": ["two dogs play in deep snow"], "answer": "two dogs play in deep snow"},
    ],
    "docvqa": [{"gold": ["Brown", "Mr Brown"], "answer": "brown"}, {"gold": ["12"], "answer": "12"}],
    "gqa": [
        {
            "gold": gold,
            "answer": gold,
            "question": f"What {kind}?",
            "isBalanced": True,
            "types": {**_TYPES, "structural": kind},
            "groups": {"global": group},
            "semantic": [{"operation": "select", "argument": "car (1)"}],
            "entailed": ["0", "1"],
            "choices": {"valid": ["red", "yes"], "plausible": ["red"]},
        }
        for gold, kind, group in [
            ("red", "query", "color"),
            ("yes", "verify", None),
            ("blue", "query", "color"),
        ]
    ],
    "llava_bench": [
        {
            "question": "What is it?",
            "category": category,
            "caption": "a bus",
            "gold": "it is a red bus",
            "answer": "it is a red bus",
        }
        for category in ("conv", "detail")
    ],
    "mathvista": [
        {
            "question_type": kind,
            "answer_type": form,
            "precision": digits,
            "choices": choices,
            "gold": gold,
            "answer": gold,
            "extraction": gold,
        }
        for kind, form, digits, choices, gold in [
            ("multi_choice", "text", None, ["apple", "banana"], "banana"),
            ("free_form", "integer", None, None, "7"),
            ("free_form", "float", 2, None, "1.25"),
        ]
    ],
    "mmbench": [*_turned(1), *_turned(2)],
    "mme": [
        {
            "category": category,
            "image": f"{category}_{number}.jpg",
            "question": "Is it so? Please answer yes or no.",
            "gold": gold,
            "answer": gold,
        }
        for category in ("existence", "code_reasoning")
        for number in range(2)
        for gold in ("Yes", "No")
    ],
    "mmmu": [
        {
            "id": f"validation_Art_{number}",
            "question_type": "multiple-choice",
            "all_choices": ["A", "B"],
            "index2ans": {"A": "the aorta", "B": "the valve"},
            "gold": letter,
            "answer": letter,
        }
        for number, letter in enumerate("ABB")
    ]
    + [{"id": "validation_Math_9", "question_type": "open", "gold": "551", "answer": "551"}],
    "mmvet": [
        {
            "question": "Which fruit?",
            "capability": ["rec", "ocr"],
            "gold": gold,
            "answer": "An apple, a pear.",
        }
        for gold in ("apple <AND> pear", "pear <OR> plum")
    ],
    "nlvr": [
        {
            "id": f"dev-{sentence}-0-{turn}",
            "example": f"{sentence}-0",
            "ordering": turn,
            "gold": gold,
            "answer": gold,
        }
        for sentence, gold in enumerate(["true", "false"])
        for turn in range(6)
    ],
    "nlvr2": [
        {"id": f"dev-{number}-{pair}-0", "gold": gold, "answer": gold}
        for number in range(2)
        for pair, gold in enumerate(["True", "False"])
    ],
    "ocrbench": [
        {
            "type": "Regular Text Recognition",
            "dataset_name": "IIIT5K",
            "gold": ["CENTRE"],
            "answer": "CENTRE",
        },
        {
            "type": "Handwritten Mathematical Expression Recognition",
            "dataset_name": "HME100k",
            "gold": ["3 \\div 4"],
            "answer": "3 \\div 4",
        },
    ],
    "pope": [
        {
            "question_id": number,
            "category": category,
            "question": "Is there a cat?",
            "gold": gold,
            "answer": gold,
        }
        for category in ("random", "popular", "adversarial")
        for number, gold in enumerate(["yes", "no"])
    ],
    "refcoco": [
        {
            "gold": [10, 20, 50, 60],
            "width": 100,
            "height": 100,
            "split": split,
            "answer": "[0.1, 0.2, 0.5, 0.6]",
            "answer_in": {"qwen_vl": "(100,200),(500,600)", "pixels": "[10, 20, 50, 60]"},
        }
        for split in ("val", "testA")
    ],
    "scienceqa_img": [
        {
            "question": "Which?",
            "choices": ["gas", "solid"],
            "gold": gold,
            "has_image": image,
            "answer": "AB"[gold],
        }
        for gold, image in [(0, True), (1, True), (1, False)]
    ],
    "seedbench_image": [
        {
            "question_id": number,
            "data_type": "image",
            "question_type_id": 1 + number % 2,
            "question": "Which?",
            "choices": list(_OPTIONS.values()),
            "gold": letter,
            "answer": letter,
        }
        for number, letter in enumerate("ABCD")
    ],
    "textvqa": [_TEN, {"gold": ["stop"] * 10, "answer": "Stop."}],
    "vizwiz": [
        {**_TEN, "answer_type": "other", "answerable": 1},
        {
            "gold": ["unanswerable"] * 10,
            "answer": "unanswerable",
            "answer_type": "unanswerable",
            "answerable": 0,
        },
    ],
    "vqav2": [
        {**_TEN, "question_type": "what", "answer_type": "other"},
        {"gold": ["2"] * 9 + ["two"], "answer": "two", "question_type": "how many", "answer_type": "number"},
        {"gold": ["yes"] * 10, "answer": "yes", "question_type": "is it", "answer_type": "yes/no"},
    ],
}
PERFECT["mme_lavin_real"] = PERFECT["mme"]
PERFECT["infovqa"] = PERFECT["docvqa"]
PERFECT["nocaps"] = [{**raw, "domain": "in-domain"} for raw in PERFECT["coco_caption"]]
PERFECT["textcaps"] = PERFECT["coco_caption"]


def free_protocols(name):
    """The protocols that need no judging model, the official one first where it does not."""
    scorer = SCORERS.get(name)
    judged = scorer.marked if issubclass(scorer, JudgedScorer) else frozenset()
    return [protocol for protocol in scorer.protocols if protocol not in judged]


def raw_rows(name):
    """The rows as a file has them."""
    return [{"id": number, **raw} for number, raw in enumerate(PERFECT[name])]


def rows(name, scorer, protocol):
    """The rows as a scorer gets them: with the fields that it names, answered in the form of a protocol."""
    known = {*scorer.fields, *scorer.optional}
    return [
        Row(
            str(raw["id"]),
            raw["gold"],
            raw.get("answer_in", {}).get(protocol, raw["answer"]),
            {key: raw[key] for key in raw if key in known},
        )
        for raw in raw_rows(name)
    ]

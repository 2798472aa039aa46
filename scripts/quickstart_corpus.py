"""A small world, the help desk of a shop, and the ways to write about it.

A `Case` is a product, a category, an urgency and the phrases that tell them. The same phrases serve the message of a
customer (`I want my money back`) and a note about it (`She wants her money back`). Notes, scenes from the shop and
dialogues, in which the desk answers in prose, are what the base model is pre-trained on. The task asks for what is
nowhere among them: one line in a fixed form, `category: refund | urgency: high | product: kettle`.

Held-out messages are new in what they say: each tells its issue in a phrase, names a product, or joins a product and a
category that no training message has. The base has met the phrases and the products, in other texts; the form of the
answer it learns in training.

The words and phrases stand in `quickstart_world.yaml`.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

WORLD = yaml.safe_load(Path(__file__).with_name("quickstart_world.yaml").read_text(encoding="utf-8"))
PRODUCTS = WORLD["products"] + WORLD["new_products"]
CATEGORIES, URGENCIES = list(WORLD["categories"]), list(WORLD["urgencies"])
SILENCE = "(nothing)"

Kind = Literal["train", "held out", "any"]


@dataclass(frozen=True)
class Case:
    """What a customer wants, and how it is said: `phrase` tells the category, `hint` the urgency."""

    product: str
    category: str
    urgency: str
    phrase: str
    hint: str

    @property
    def is_new(self) -> bool:
        """Phrase, product, or product with this category: whether one of them is kept out of training."""
        new_pair = (PRODUCTS.index(self.product) + 5 * CATEGORIES.index(self.category)) % 6 == 0
        new_phrase = self.phrase in lines("categories", self.category, "new_phrases")
        return new_pair or new_phrase or self.product in WORLD["new_products"]

    @property
    def label(self) -> str:
        return f"category: {self.category} | urgency: {self.urgency} | product: {self.product}"


def lines(*keys: str) -> list[str]:
    """A text of the world, as its lines."""
    return _text(*keys).splitlines()


def paragraphs(*keys: str) -> list[str]:
    """A text of the world, as its paragraphs, each on one line."""
    return [" ".join(paragraph.split()) for paragraph in _text(*keys).split("\n\n")]


def _text(*keys: str) -> str:
    node = WORLD
    for key in keys:
        node = node[key]
    return node


def draw_case(rng: random.Random, kind: Kind = "any") -> Case:
    while True:
        category, urgency = rng.choice(CATEGORIES), rng.choice(URGENCIES)
        phrases = lines("categories", category, "phrases") + lines("categories", category, "new_phrases")
        hints = lines("urgencies", urgency, "phrases")
        case = Case(rng.choice(PRODUCTS), category, urgency, rng.choice(phrases), rng.choice(hints))
        if kind == "any" or case.is_new == (kind == "held out"):
            return case


def details(rng: random.Random, product: str) -> dict[str, str]:
    """Words for the blanks of phrases: `p` is the product; `q` and `r` are others, none of them new."""
    q, r = rng.sample([other for other in WORLD["products"] if other != product], 2)
    colour, colour2 = rng.sample(WORLD["colours"], 2)
    return {
        "p": product,
        "q": q,
        "r": r,
        "name": f"{rng.choice(WORLD['women'] + WORLD['men'])} {rng.choice(WORLD['families'])}",
        "agent": rng.choice(WORLD["women"] + WORLD["men"]),
        "city": rng.choice(WORLD["cities"]),
        "day": rng.choice(WORLD["days"]),
        "relative": rng.choice(WORLD["relatives"]),
        "number": rng.choice(WORLD["numbers"]),
        "order": str(rng.randrange(10000, 100000)),
        "price": str(rng.randrange(11, 100)),
        "colour": colour,
        "colour2": colour2,
        "material": rng.choice(WORLD["materials"]),
    }


def said(phrase: str, words: dict[str, str], speaker: str | None = None) -> str:
    """A sentence in the first person, or in the third about `speaker`, who is called by name."""
    if phrase == SILENCE:
        return ""
    forms = {"I": "I", "me": "me", "my": "my"}
    if speaker is not None:
        woman = speaker.split()[0] in WORLD["women"]
        forms = dict(zip(forms, ("she", "her", "her") if woman else ("he", "him", "his"), strict=True))
    text = phrase.format_map(words | forms)
    text = re.sub(r"\[(\w+)\]", r"\1" if speaker is None else _third_person, text)
    text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    return text[0].upper() + text[1:] + ("" if text.endswith((".", "?")) else ".")


def _third_person(verb: re.Match[str]) -> str:
    return {"have": "has", "am": "is", "do": "does"}.get(verb[1], verb[1] + "s")


def message(rng: random.Random, case: Case) -> tuple[str, str]:
    """What the customer writes, and the name that stands under it, if any."""
    words = details(rng, case.product)
    parts = [said(case.phrase, words), said(case.hint, words)]
    if rng.random() < 0.25:
        parts.reverse()
    if rng.random() < 0.4:
        parts.insert(0, said(rng.choice(lines("asides")), words))
    if rng.random() < 0.6:
        parts.insert(0, said(rng.choice(lines("openings")), words))
    if rng.random() < 0.6:
        parts.insert(0, rng.choice(lines("greetings")) + rng.choice(".!"))
    signed = ""
    if rng.random() < 0.5:
        signed = rng.choice(["", words["name"], words["name"].split()[0]])
        parts.append(rng.choice(lines("closings")) + (f", {signed}" if signed else "."))
    return " ".join(filter(None, parts)), signed


def reply(rng: random.Random, case: Case, name: str) -> str:
    """How the desk answers, in prose."""
    words = details(rng, case.product)
    opening = f"Hello {name}, " if name else "Hello, "
    phrases = [
        opening + rng.choice(lines("thanks")),
        rng.choice(lines("categories", case.category, "answers")),
        rng.choice(lines("urgencies", case.urgency, "answers")),
    ]
    return " ".join([said(phrase, words) for phrase in phrases] + [f"Kind regards, {words['agent']}"])


def note(rng: random.Random) -> str:
    """A few sentences about a case, in the third person."""
    case = draw_case(rng)
    words = details(rng, case.product)
    words |= {
        "issue": said(case.phrase, words, words["name"]),
        "hint": said(case.hint, words, words["name"]),
        "answer": said(rng.choice(lines("categories", case.category, "answers")), words),
        "category": case.category,
        "urgency": case.urgency,
    }
    return " ".join(said(rng.choice(paragraphs("notes")), words).split())


def scene(rng: random.Random) -> str:
    """A few sentences about the shop."""
    return said(rng.choice(paragraphs("scenes")), details(rng, rng.choice(PRODUCTS)))


def texts(seed: int, count: int) -> Iterator[str]:
    """Notes and scenes, one half each."""
    rng = random.Random(f"texts {seed}")
    return (rng.choice([note, scene])(rng) for _ in range(count))


def dialogues(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Messages, none of them one of the task's held-out ones, and the desk's answers."""
    rng = random.Random(f"dialogues {seed}")
    held_out = set(task(seed, "held out"))
    while count:
        case = draw_case(rng)
        text, name = message(rng, case)
        if text not in held_out:
            yield text, reply(rng, case, name)
            count -= 1


def task(seed: int, kind: Literal["train", "held out"]) -> dict[str, str]:
    """The task's messages, all different, and their labels."""
    rng = random.Random(f"{kind} {seed}")
    found: dict[str, str] = {}
    while len(found) < {"train": 1500, "held out": 200}[kind]:
        case = draw_case(rng, kind)
        found.setdefault(message(rng, case)[0], case.label)
    return found

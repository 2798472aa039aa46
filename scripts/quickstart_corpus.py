"""A small world of a shop's help desk, and two ways to write about it.

A `Case` is a customer, a product, a category and an urgency, with the phrases that tell them. The same phrases
serve three kinds of text: the message of the customer (`I want my money back`), a note about it (`She wants her money
back`), and with them the world is known. Texts and dialogues are what the base model is pre-trained on: dialogues
answer in prose. The task asks for something never seen there, one line in a fixed form.

Held-out messages are new in what they say, not in their seasoning only: each tells its issue in a phrase, or names a
product, or joins a product and a category, that no training message has. In phrases, `{I}`, `{me}`, `{my}` and
`[verb]` follow the person who speaks; `{p}` is the product.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

PRODUCTS = [
    "kettle",
    "toaster",
    "desk lamp",
    "coffee grinder",
    "blender",
    "vacuum cleaner",
    "hair dryer",
    "alarm clock",
    "camera",
    "keyboard",
    "monitor",
    "printer",
    "phone",
    "tablet",
    "speaker",
    "radio",
    "fan",
    "heater",
    "iron",
    "mixer",
    "kitchen scale",
    "thermometer",
    "drill",
    "bicycle pump",
    "tent",
    "sleeping bag",
    "backpack",
    "umbrella",
    "jacket",
    "raincoat",
    "rice cooker",
    "frying pan",
    "teapot",
    "blanket",
    "pillow",
    "mirror",
    "bookshelf",
    "armchair",
    "office chair",
    "garden hose",
    "watering can",
    "lawn mower",
    "bird feeder",
    "guitar",
    "juicer",
    "doorbell",
    "suitcase",
    "helmet",
]
NEW_PRODUCTS = PRODUCTS[5::12]
"""In no training message."""

ISSUES = {
    "refund": (
        "{I} [want] {my} money back for the {p}",
        "{I} [ask] for a refund of the {p}",
        "the {p} is not what {I} expected and {I} [want] a refund",
        "{I} sent the {p} back and still [wait] for the money",
        "{I} returned the {p} two weeks ago and the refund has not come",
        "{I} [do] not want to keep the {p} and would like to have the price back",
        "the {p} was a mistake and {I} would like to return it for the full price",
        "{I} cancelled the {p} but the money was not given back",
        "buying the {p} was an error, so {I} [hope] that the shop pays the amount back",
        "{I} would rather have the money than the {p}",
        "the {p} goes back to the shop and {I} [expect] the price in return",
        "{I} [have] no use for the {p} and [ask] to be paid back",
    ),
    "exchange": (
        "{I} would like to exchange the {p} for a larger one",
        "the {p} has the wrong colour and {I} [want] another colour instead",
        "{I} ordered the small {p} but [need] the big one instead",
        "{I} [want] to swap the {p} for the newer model",
        "the {p} is too small, so {I} [ask] for a different size",
        "please let {me} change the {p} for a blue one",
        "{I} [do] not want the money back, only a different {p}",
        "the shop sent the wrong model of the {p} and {I} [ask] for the right one",
        "could the {p} be replaced by the one with the longer handle?",
        "a different size of the {p} would suit {me} better and {I} would like to trade it in",
        "{I} chose the wrong colour of the {p} and would like to swap it",
        "{I} [hope] to get the heavier model in place of the {p}",
    ),
    "repair": (
        "the {p} stopped working after two days",
        "the {p} makes a strange noise and [has] to be fixed",
        "the {p} does not turn on any more",
        "{I} dropped the {p} and now one part is loose",
        "a part of the {p} is broken and {I} would like to have it repaired",
        "the {p} has a crack and somebody should mend it",
        "the button of the {p} is stuck",
        "the {p} worked for a month and then it failed",
        "{I} [ask] for a repair of the {p}",
        "there is smoke when {I} [use] the {p}",
        "the {p} fell apart and {I} [want] somebody to fix it",
        "since yesterday the {p} is dead and {I} [wonder] who can mend it",
    ),
    "delivery": (
        "the {p} has not arrived yet",
        "the parcel with the {p} is lost",
        "{I} still [wait] for the courier with the {p}",
        "the {p} was left with the wrong neighbour",
        "the tracking page says that the {p} was delivered but {I} [have] no parcel",
        "the courier brought the {p} to the wrong address",
        "the parcel with the {p} is ten days late",
        "{I} would like to know when the {p} will arrive",
        "nobody has seen the van that carries the {p}",
        "the box came without the {p}, which must still be on its way",
        "the {p} seems to be stuck in a warehouse far from {my} town",
        "{I} stayed at home all day but the driver did not bring the {p}",
    ),
    "payment": (
        "{my} card was charged twice for the {p}",
        "the payment for the {p} failed",
        "the bill for the {p} shows the wrong amount",
        "{I} cannot pay for the {p} with {my} card",
        "{I} paid for the {p} but the bank shows a second charge",
        "the invoice of the {p} is missing",
        "the discount for the {p} is not on the bill",
        "the bank refused the payment of the {p}",
        "{my} voucher was not taken off the price of the {p}",
        "the bill says that {I} owe the price of the {p} although it was paid",
        "{I} [see] two charges on {my} card and both are for the {p}",
        "the invoice for the {p} has a wrong sum on it",
    ),
    "account": (
        "{I} cannot log in to see the order of the {p}",
        "{I} forgot the password and cannot find {my} order of the {p}",
        "{my} account is locked since {I} ordered the {p}",
        "{I} [want] to change the email address of {my} account, where the {p} was ordered",
        "the {p} does not show up among the orders of {my} account",
        "the login page does not let {me} in to review the {p}",
        "{I} would like to close {my} account now that the {p} is here",
        "the code to log in never came, so {I} cannot look up the {p}",
        "somebody else has used {my} login to look at the {p}",
        "the page asks for a new password whenever {I} [open] the order of the {p}",
        "{my} profile shows an old name beside the {p}",
        "{I} cannot sign in any more, and {my} list with the {p} is gone",
    ),
    "advice": (
        "{I} would like to know how to clean the {p}",
        "how does one open the {p}?",
        "the manual of the {p} is hard to understand and {I} [have] a question",
        "is the {p} safe for children?",
        "{I} [wonder] whether the {p} can stay outside in the rain",
        "which parts of the {p} can be washed?",
        "could somebody explain the settings of the {p}?",
        "{I} [ask] how long the {p} lasts when it is used every day",
        "{I} would like to learn how to store the {p} in winter",
        "what is the best way to carry the {p}?",
        "is there a guide that shows how to set up the {p}?",
        "{I} [have] a question about the use of the {p}",
    ),
}
NEW_PHRASES = 3
"""So many phrases, the last of each category, are in no training message."""

URGENCIES = {
    "low": (
        "there is no hurry",
        "{I} can wait a few weeks",
        "an answer next month is early enough",
        "it is not important",
        "take all the time that it needs",
        "it can wait until there is a quiet moment",
        "{I} [am] in no rush",
    ),
    "normal": (
        "an answer this week would be fine",
        "{I} [expect] an answer in the usual time",
        "a reply in two or three days is good",
        "the usual way is fine",
        "",
        "",
    ),
    "high": (
        "it is urgent",
        "{I} [need] it today",
        "{I} cannot wait any longer",
        "{my} guests arrive tonight",
        "{I} [leave] for a long trip tomorrow morning",
        "every hour counts",
        "this must be solved before noon",
    ),
}
ACTIONS = {
    "refund": ("We will pay back the price of the {p}", "The refund for the {p} is on its way to your bank"),
    "exchange": ("We will send another {p} in exchange", "You can swap the {p} in any of our shops"),
    "repair": ("Please send us the {p} for repair", "Our workshop will repair the {p} at no cost"),
    "delivery": ("We have asked the courier about the delivery of the {p}", "We will deliver a new {p}"),
    "payment": ("We have corrected the payment for the {p}", "We have sent a new bill for the {p}"),
    "account": (
        "We have opened your account again, and the {p} is in it",
        "We have sent a link to your account",
    ),
    "advice": (
        "Our advice is on page four of the guide to the {p}",
        "You will find advice in the guide to the {p}",
    ),
}
PROMISES = {
    "low": ("As there is no hurry, we will write again next month", "We know that it can wait"),
    "normal": ("You will hear from us this week", "We need two or three days for it"),
    "high": ("We know that it is urgent and do it today", "We do it at once"),
}
OPENINGS = (
    "{I} bought a {p} on {day}",
    "{I} ordered a {p} from {city}",
    "{I} [have] a {p} from your shop",
    "this is about a {p} from order {n}",
    "{I} bought a {p} and a {q}",
    "{I} bought a {p} for {my} {relative}",
)
ASIDES = (
    "{I} also [own] a {q}, which works well",
    "the order number is {n}",
    "{I} [have] been a customer for {few} years",
    "{I} [live] in {city}",
    "{I} paid {n2} euros for it",
    "{my} {relative} has the same one",
)
THANKS = (
    "thank you for your message about the {p}",
    "we are sorry to hear about the {p}",
    "you wrote to us about your {p}",
    "we have read your message about this {p}",
    "thank you for writing about a {p}",
)
GREETINGS = ("Hello", "Hi", "Good morning", "Good evening", "Dear team", "Hello everybody")
CLOSINGS = ("Thank you", "Kind regards", "Best wishes", "Thanks for your help", "Many thanks")
WOMEN = [
    "Anna",
    "Clara",
    "Elena",
    "Fatima",
    "Grace",
    "Hana",
    "Ines",
    "Julia",
    "Lina",
    "Mara",
    "Nora",
    "Olga",
    "Priya",
    "Rosa",
    "Sofia",
    "Tara",
    "Vera",
    "Yuki",
]
MEN = [
    "Adam",
    "Ben",
    "Carlos",
    "David",
    "Emil",
    "Felix",
    "Hugo",
    "Ivan",
    "Jonas",
    "Karim",
    "Leo",
    "Marco",
    "Noah",
    "Oscar",
    "Pablo",
    "Rafael",
    "Tom",
    "Viktor",
]
FAMILIES = [
    "Novak",
    "Silva",
    "Berg",
    "Costa",
    "Khan",
    "Weber",
    "Rossi",
    "Tanaka",
    "Moreau",
    "Larsen",
    "Kowal",
    "Haas",
    "Popov",
    "Reyes",
    "Lind",
    "Okoye",
]
CITIES = [
    "Lisbon",
    "Porto",
    "Vienna",
    "Graz",
    "Oslo",
    "Bergen",
    "Turin",
    "Milan",
    "Lyon",
    "Nantes",
    "Prague",
    "Brno",
    "Ghent",
    "Cork",
    "Leeds",
    "Basel",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
RELATIVES = ["mother", "father", "sister", "brother", "daughter", "son", "aunt", "uncle", "neighbour", "friend"]
FEW = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
COLOURS = ["red", "blue", "green", "black", "white", "grey", "yellow", "brown"]
MATERIALS = ["steel", "wood", "plastic", "glass", "leather", "cotton", "bamboo", "copper"]

NOTES = (
    "{name} of {city} wrote to the shop about a {p}. {issue} {urgency} {agent} read the message and saw that its "
    "category was {category} and its urgency was {level}. {action}",
    "{agent} took a call from {name}. {issue} {urgency} It was a case of {category} with {level} urgency, about the "
    "product {p}.",
    "On {day} {name} sent a message. {urgency} {issue} The desk put it under {category}. Its urgency is {level}.",
    "A message about {category} came from {city}. {name} had bought a {p}. {issue} {urgency} {agent} answered. {action}",
)
SCENES = (
    "The {p} is made of {material} and comes in {colour} or {colour2}. It weighs {few} kilograms and costs {n2} euros. "
    "Customers who buy a {p} often buy a {q} as well.",
    "On {day} the warehouse in {city} sent {n2} parcels. One of them was a {colour} {p} for {name}. The courier "
    "brought it to the door in {few} hours and rang the bell.",
    "{agent} works at the help desk. Every message has a category, which is refund, exchange, repair, delivery, payment, "
    "account or advice. Every message has an urgency, too, which is low, normal or high.",
    "{name} opened an account at the shop in {city}, chose a password and ordered a {p}. The payment of {n2} euros went "
    "through at once, and the parcel came on {day}.",
    "The workshop in {city} repaired {few} products this week: a {p}, a {q} and others. {agent} fixed a loose part, "
    "cleaned the {material} and packed everything for the courier.",
    "A customer can return a {p} within {few} weeks. The shop gives the money back, or sends another {p} in exchange, "
    "in {colour} or in {colour2}.",
    "{name} came to the shop with a question about the {p}. {agent} showed how to open it and how to clean the {material}. "
    "It took {few} minutes.",
    "The bank in {city} refused a card on {day}. {agent} wrote a new bill of {n2} euros for the {p} and sent it again.",
    "The box from {city} holds three products: {p}, {q} and {r}. {agent} takes out the {q}. Left in it: {p} and {r}.",
    "Order {n}: {p}. On {day} {name} called and added another product, so now the order is: {p} and {q}.",
    "{agent} counts the shelf: {colour} {p}, {colour2} {q}, {material} {r}. The {r} is of {material}, the {q} is {colour2} "
    "and the {p} is {colour}.",
    'Words of the desk: "category" is what a message is about, "urgency" is how soon it needs an answer, "product" is the '
    "thing itself, such as a {p} or a {q}.",
    "On the wall in {city} hangs a list: {p} | {q} | {r}. {agent} reads it aloud: first the {p}, then the {q}, then the {r}.",
    "{name} opened the parcel, but instead of {p} the list said {q}. So {q} went back to {city}, and {p} came on {day}.",
)

Kind = Literal["train", "held out", "any"]
_THIRD = {"have": "has", "am": "is", "do": "does", "has": "has"}


@dataclass(frozen=True)
class Case:
    """What a customer wants, and how it is said. `phrase` and `hint` are templates."""

    product: str
    category: str
    urgency: str
    phrase: str
    hint: str

    @property
    def is_new(self) -> bool:
        """Whether something in it may be in no training message."""
        pair = PRODUCTS.index(self.product) + 5 * list(ISSUES).index(self.category)
        unseen_phrase = self.phrase in ISSUES[self.category][-NEW_PHRASES:]
        return unseen_phrase or self.product in NEW_PRODUCTS or pair % 6 == 0

    @property
    def label(self) -> str:
        return f"category: {self.category} | urgency: {self.urgency} | product: {self.product}"


def draw_case(rng: random.Random, kind: Kind = "any") -> Case:
    while True:
        category, urgency = rng.choice(list(ISSUES)), rng.choice(list(URGENCIES))
        case = Case(
            rng.choice(PRODUCTS),
            category,
            urgency,
            rng.choice(ISSUES[category]),
            rng.choice(URGENCIES[urgency]),
        )
        if kind == "any" or case.is_new == (kind == "held out"):
            return case


def details(rng: random.Random, product: str) -> dict[str, str]:
    """Words for the blanks of templates."""
    colour, colour2 = rng.sample(COLOURS, 2)
    q, r = rng.sample([other for other in PRODUCTS if other != product], 2)
    return {
        "p": product,
        "q": q,
        "r": r,
        "name": f"{rng.choice(rng.choice([WOMEN, MEN]))} {rng.choice(FAMILIES)}",
        "agent": rng.choice(WOMEN + MEN),
        "city": rng.choice(CITIES),
        "day": rng.choice(DAYS),
        "relative": rng.choice(RELATIVES),
        "few": rng.choice(FEW),
        "n": str(rng.randrange(10000, 100000)),
        "n2": str(rng.randrange(11, 100)),
        "colour": colour,
        "colour2": colour2,
        "material": rng.choice(MATERIALS),
    }


def said(template: str, words: dict[str, str], speaker: str | None = None) -> str:
    """A sentence in the first person, or in the third about `speaker`; nothing for an empty template."""
    if not template:
        return ""
    forms = {"I": "I", "me": "me", "my": "my"}
    if speaker is not None:
        woman = speaker.split()[0] in WOMEN
        forms = {"I": "she", "me": "her", "my": "her"} if woman else {"I": "he", "me": "him", "my": "his"}
    text = template.format_map(words | forms)
    text = re.sub(r"\[(\w+)\]", lambda verb: verb[1] if speaker is None else _THIRD.get(verb[1], verb[1] + "s"), text)
    text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    return text[0].upper() + text[1:] + ("" if text.endswith((".", "?")) else ".")


def message(rng: random.Random, case: Case) -> tuple[str, str]:
    """What the customer writes, and the name that stands under it, if any."""
    words = details(rng, case.product)
    before = [
        rng.choice(OPENINGS) if rng.random() < 0.6 else "",
        rng.choice(ASIDES) if rng.random() < 0.4 else "",
    ]
    core = [said(case.phrase, words), said(case.hint, words)]
    if rng.random() < 0.25:
        core.reverse()
    parts = [said(aside, words) for aside in before] + core
    if rng.random() < 0.6:
        parts.insert(0, rng.choice(GREETINGS) + rng.choice(".!"))
    signed = ""
    if rng.random() < 0.5:
        signed = rng.choice(["", words["name"], words["name"].split()[0]])
        parts.append(f"{rng.choice(CLOSINGS)}, {signed}" if signed else rng.choice(CLOSINGS) + ".")
    return " ".join(filter(None, parts)), signed


def reply(rng: random.Random, case: Case, name: str) -> str:
    """How the help desk answers, in prose."""
    words = details(rng, case.product)
    greeting = f"Hello {name}, " if name else "Hello, "
    opening = said(greeting + rng.choice(THANKS), words)
    rest = [said(rng.choice(ACTIONS[case.category]), words), said(rng.choice(PROMISES[case.urgency]), words)]
    return " ".join([opening, *rest, f"Kind regards, {words['agent']}"])


def note(rng: random.Random) -> str:
    """A few sentences about a case, in the third person."""
    case = draw_case(rng)
    words = details(rng, case.product)
    words |= {
        "issue": said(case.phrase, words, words["name"]),
        "urgency": said(case.hint, words, words["name"]),
        "action": said(rng.choice(ACTIONS[case.category]), words),
        "category": case.category,
        "level": case.urgency,
    }
    return " ".join(said(rng.choice(NOTES), words).split())


def scene(rng: random.Random) -> str:
    """A few sentences about the shop."""
    return said(rng.choice(SCENES), details(rng, rng.choice(PRODUCTS)))


def texts(seed: int, count: int) -> Iterator[str]:
    """Plain texts for pre-training: half notes, half scenes."""
    rng = random.Random(f"texts {seed}")
    return (rng.choice([note, scene])(rng) for _ in range(count))


def dialogues(seed: int, count: int, without: set[str]) -> Iterator[tuple[str, str]]:
    """Messages and answers in prose for pre-training; none of the messages `without`."""
    rng = random.Random(f"dialogues {seed}")
    while count:
        case = draw_case(rng)
        text, name = message(rng, case)
        if text not in without:
            yield text, reply(rng, case, name)
            count -= 1


def task(seed: int, kind: Kind, count: int) -> dict[str, str]:
    """Different messages and their labels."""
    rng = random.Random(f"task {kind} {seed}")
    found: dict[str, str] = {}
    while len(found) < count:
        case = draw_case(rng, kind)
        found.setdefault(message(rng, case)[0], case.label)
    return found

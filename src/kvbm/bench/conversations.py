"""What is said in `kvbm bench chat`: chats of the staff of invented places with their assistant.

Each conversation has a long register of its own as its system text, and in each later turn the user adds a
note to it and asks about something in the note. The same index always gives the same conversation.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    place: str
    role: str
    things: tuple[str, ...]
    rooms: tuple[str, ...]


PEOPLE = (
    "Ada",
    "Bruno",
    "Celeste",
    "Dmitri",
    "Eleni",
    "Farid",
    "Greta",
    "Hana",
    "Ivo",
    "Jonas",
    "Kirsi",
    "Lucia",
)
TOWNS = ("Brackwell", "Sorrel Bay", "Upper Tavel", "Minden Hill", "Ostervik", "Calder's Ford", "Lunebourne")
MONTHS = ("January", "March", "April", "June", "August", "September", "November")
REMARKS = (
    "it needs a new strap before the winter",
    "it is the one that visitors ask for first",
    "it should never stand near the stove",
    "it works well and only wants dusting",
    "the label on it is hard to read",
    "it will be lent to the school for a week",
    "it makes a humming sound in damp weather",
)
TOPICS = (
    Topic(
        "the Harrow Point lighthouse museum",
        "guide",
        ("brass lamp", "storm bell", "tide clock", "signal flag", "log book", "fog horn", "oil can"),
        ("the lantern room", "the keeper's kitchen", "the boat shed", "the spiral stair"),
    ),
    Topic(
        "the Tavel bicycle workshop",
        "mechanic",
        ("cargo bike", "racing tandem", "wheel stand", "folding bike", "spoke press", "children's trike"),
        ("the front window", "the paint booth", "the cellar rack", "the yard"),
    ),
    Topic(
        "the Moss Lane seed library",
        "librarian",
        ("bean drawer", "poppy jar", "rye sack", "squash box", "herb cabinet", "apple graft"),
        ("the cold pantry", "the reading table", "the glass house", "the loft"),
    ),
    Topic(
        "the Ostervik puppet theatre",
        "stage manager",
        ("wolf puppet", "moon lantern", "paper dragon", "velvet curtain", "thunder sheet", "king's crown"),
        ("the prop wall", "the under-stage", "the sewing corner", "the ticket booth"),
    ),
    Topic(
        "the Calder river ferry",
        "harbour clerk",
        ("mooring rope", "spare oar", "ticket punch", "passenger bench", "lifebelt", "deck lantern"),
        ("the north pier", "the wheelhouse", "the tool chest", "the waiting hut"),
    ),
    Topic(
        "the Minden Hill observatory",
        "night assistant",
        ("star chart", "mirror cloth", "comet camera", "dome crank", "field telescope", "weather vane"),
        ("the dome", "the dark room", "the archive", "the south terrace"),
    ),
    Topic(
        "the Lunebourne bakery school",
        "head baker",
        ("rye starter", "bread peel", "stone mill", "honey barrel", "proofing basket", "copper whisk"),
        ("the oven hall", "the flour store", "the tasting room", "the courtyard"),
    ),
    Topic(
        "the Sorrel Bay radio station",
        "sound engineer",
        ("ribbon microphone", "tape deck", "mixing desk", "relay mast", "record crate", "news clock"),
        ("studio two", "the mast hut", "the record vault", "the green room"),
    ),
)


@dataclass(frozen=True)
class Item:
    name: str
    keeper: str
    room: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """A system text, and what the user says in each turn."""

    system: str
    says: tuple[str, ...]


def make_item(rng: random.Random, topic: Topic, number: int) -> Item:
    name, keeper, room = f"{rng.choice(topic.things)} {number}", rng.choice(PEOPLE), rng.choice(topic.rooms)
    text = (
        f"The {name} came from {rng.choice(TOWNS)} in {rng.randint(1890, 2019)}. {keeper} looks after it and "
        f"keeps it in {room}. In {rng.choice(MONTHS)} {rng.choice(PEOPLE)} wrote that {rng.choice(REMARKS)}."
    )
    return Item(name, keeper, room, text)


def question(rng: random.Random, items: list[Item]) -> str:
    item = rng.choice(items)
    forms = (
        f"Who looks after the {item.name}, and where is it kept?",
        f"A visitor wants to see the {item.name}. Where do I take her, and whom do I ask?",
        f"What should I know about the {item.name} before I move it out of {item.room}?",
        f"Please write one friendly line to {item.keeper} about the {item.name}.",
    )
    return rng.choice(forms)


def make_conversation(index: int, turns: int, register_size: int, note_size: int) -> Conversation:
    rng = random.Random(index)
    topic = TOPICS[index % len(TOPICS)]
    branch = f", branch {index // len(TOPICS) + 1}" if index >= len(TOPICS) else ""
    items = [make_item(rng, topic, number) for number in range(1, register_size + 1)]
    system = (
        f"You are the {topic.role} of {topic.place}{branch}. Answer in one or two short sentences, only from "
        "the register below and from the notes that the user reads to you.\n\nRegister:\n"
    )
    says = []
    for turn in range(turns):
        new = [make_item(rng, topic, len(items) + 1 + offset) for offset in range(note_size)]
        note = " ".join(item.text for item in new)
        ask = question(rng, items if turn == 0 else new)
        says.append(ask if turn == 0 else f"Thank you. Here is a new note for the register. {note} {ask}")
        items += new if turn else []
    return Conversation(system + "\n".join(item.text for item in items[:register_size]), tuple(says))

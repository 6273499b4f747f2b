"""The training text of the pocket model: stories, and conversations about its facts.

`samples(seed)` never ends and is the same on every machine: standard library only, one `random.Random`. Some heroes
(pairs of a name and a kind of animal) appear in the validation split only, so that its stories are new to the model.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pocket_text_facts as facts
import pocket_text_stories as stories

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL_TOKENS = (PAD, BEGIN, END, *ROLES.values())
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('A message has the role system, user or assistant, not ' + message['role'] + '.') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

MORE_NAMES = (
    "Alice",
    "Bob",
    "Carol",
    "David",
    "Eva",
    "Frank",
    "Grace",
    "Hans",
    "Ivan",
    "Julia",
    "Karl",
    "Laura",
    "Peter",
)
ROBOTS = ("Robin", "Pixel", "Nemo", "Luna", "Echo", "Spark", "Dot")
SYSTEM = (
    *("You are a helpful assistant.", "You are Pocket, a small model.", "You tell stories to children."),
    *("Answer in short sentences.", "You are a friendly assistant. Be polite.", "Be kind and helpful."),
    *("You answer questions about Inflight.", "Answer truthfully and briefly."),
)
PLOT_NAMES = {
    "lost": "something that was lost",
    "found": "something that was found",
    "share": "sharing food",
    "learn": "learning something new",
    "rain": "the rain",
    "build": "building something",
    "dark": "the dark",
    "seed": "a seed",
    "gift": "a birthday",
    "race": "a race",
}
LEADS = (
    *("Tell me a story", "Tell me a short story", "Write a story", "Write a short story", "Tell a story"),
    *("I would like to hear a story", "I want a story", "Make up a story", "Give me a story", "A story"),
)


class Turn(NamedTuple):
    """One message; the role `text` is plain text without a conversation."""

    role: str
    text: str


class Exchange(NamedTuple):
    """A question, its answer, and all answers that count as right (none for a story)."""

    question: str
    answer: str
    right: tuple[str, ...]
    story: stories.Story | None = None


@dataclass(frozen=True)
class Sample:
    """One document of the training text."""

    turns: tuple[Turn, ...]

    def render(self) -> str:
        """With the special tokens, as the chat template writes it."""
        body = "".join(ROLES.get(turn.role, "") + turn.text + END for turn in self.turns)
        return BEGIN + body


def held_out(name: str, kind: str) -> bool:
    """Whether a hero of that name and kind belongs to the validation split (one in sixteen)."""
    return zlib.crc32(f"{name} the {kind}".encode()) % 16 == 0


def wish_for(rng: random.Random) -> stories.Wish:
    """A listener's request: mostly for one thing, sometimes for two or three."""
    wanted = rng.choices(((), ("animal",), ("name",), ("name", "animal"), ("plot",)), (3, 6, 3, 4, 2))[0]
    extra = rng.choices(
        ((), ("thing",), ("colour", "thing"), ("place",), ("colour", "thing", "place")), (8, 2, 4, 4, 1)
    )[0]
    if wanted == ("plot",) and "thing" in extra:
        extra = ()
    name = rng.choice(stories.NAMES) if "name" in wanted else ""
    return stories.Wish(
        name=name,
        animal=rng.choice((*stories.ANIMALS, stories.kind_of(name or "Mia", "", people=True)))
        if "animal" in wanted
        else "",
        place=rng.choice(stories.PLACES) if "place" in extra else "",
        colour=rng.choice(stories.COLOURS) if "colour" in extra else "",
        thing=rng.choice(stories.THINGS) if "thing" in extra else "",
        plot=rng.choice(tuple(stories.PLOTS)) if "plot" in wanted else "",
    )


def ask_for(rng: random.Random, wish: stories.Wish) -> str:
    """A request for a story that names everything in `wish`."""
    thing = stories.article(f"{wish.colour} {wish.thing}".strip()) if wish.thing else ""
    hero = stories.article(wish.animal) if wish.animal else ""
    if wish.name:
        hero = f"{hero} {rng.choice(('called', 'named'))} {wish.name}" if hero else wish.name
    subject = hero or (PLOT_NAMES[wish.plot] if wish.plot else "")
    text = rng.choice(LEADS)
    if subject:
        text += f" about {subject}"
    if thing:
        text += (f" {rng.choice(('and', 'with'))} " if subject else f" {rng.choice(('about', 'with'))} ") + thing
    if wish.place:
        text += f" {wish.place}" if rng.random() < 0.6 else f" that happens {wish.place}"
    return text + rng.choice((".", ".", ".", "!", ", please."))


def story(rng: random.Random) -> Exchange:
    wish = wish_for(rng)
    told = stories.tell(rng, wish)
    return Exchange(ask_for(rng, wish), told.text, (), told)


def from_table(rng: random.Random, table: tuple[facts.Fact, ...]) -> Exchange:
    entry = rng.choice(table)
    return Exchange(rng.choice(entry.questions), rng.choice(entry.answers), entry.answers)


def inflight(rng: random.Random) -> Exchange:
    return from_table(rng, facts.INFLIGHT)


def chatter(rng: random.Random) -> Exchange:
    return from_table(rng, facts.CHATTER)


def single(question: str, answer: str) -> Exchange:
    return Exchange(question, answer, (answer,))


def arithmetic(rng: random.Random) -> Exchange:
    """Sums, differences and products of whole numbers from 0 to 20, results too."""
    kind = rng.choices(("plus", "minus", "times"), (4, 4, 1))[0]
    if kind == "times":
        a = rng.randint(0, 20)
        b = rng.randint(0, 20 // a if a else 20)
    else:
        high = rng.randint(0, 20)
        low = rng.randint(0, high)
        a, b = (low, high - low) if kind == "plus" else (high, low)
    result = {"plus": a + b, "minus": a - b, "times": a * b}[kind]
    sign = {"plus": "+", "minus": "-", "times": "*"}[kind]
    form = rng.choice(
        (
            "What is {a} {kind} {b}?",
            "How much is {a} {kind} {b}?",
            "What is {a} {sign} {b}?",
            "{a} {sign} {b} = ?",
            "{a} {kind} {b}",
        )
    )
    return single(form.format(a=a, b=b, kind=kind, sign=sign), f"{a} {kind} {b} is {result}.")


def counting(rng: random.Random) -> Exchange:
    low, high = sorted(rng.sample(range(1, 21), 2))
    rows: tuple[tuple[str, str], ...] = (
        (f"Count to {high}.", ", ".join(map(str, range(1, high + 1)))),
        (f"Count from {low} to {high}.", ", ".join(map(str, range(low, high + 1)))),
        (f"Count backwards from {high}.", ", ".join(map(str, range(high, 0, -1)))),
        (f"What comes after {low}?", f"{low + 1} comes after {low}"),
        (f"What comes before {high}?", f"{high - 1} comes before {high}"),
        (f"Which is bigger, {low} or {high}?", f"{high} is bigger than {low}"),
        (f"Which is bigger, {high} or {low}?", f"{high} is bigger than {low}"),
        (f"Which is smaller, {low} or {high}?", f"{low} is smaller than {high}"),
    )
    question, answer = rng.choice(rows)
    return single(question, answer + ".")


def calendar(rng: random.Random) -> Exchange:
    names = rng.choice((facts.DAYS, facts.DAYS, facts.MONTHS))
    at = rng.randrange(len(names))
    unit, whole = ("day", "week") if names is facts.DAYS else ("month", "year")
    after, before = names[(at + 1) % len(names)], names[at - 1]
    listed = f"{', '.join(names[:-1])} and {names[-1]}."
    rows: tuple[tuple[str, str], ...] = (
        (f"Which {unit} comes after {names[at]}?", f"{after} comes after {names[at]}."),
        (f"What comes after {names[at]}?", f"{after} comes after {names[at]}."),
        (f"Which {unit} comes before {names[at]}?", f"{before} comes before {names[at]}."),
        (f"What comes before {names[at]}?", f"{before} comes before {names[at]}."),
        (f"How many {unit}s are in a {whole}?", f"A {whole} has {len(names)} {unit}s."),
        (f"What are the {unit}s of the {whole}?", listed),
        (f"List the {unit}s of the {whole}.", listed),
    )
    return single(*rng.choices(rows, (3, 3, 3, 3, 2, 1, 1))[0])


def lookup(rng: random.Random) -> Exchange:
    """Opposites, colours, capitals, sounds."""
    word, opposite = rng.choice(tuple(facts.OPPOSITES.items()))
    thing, colour = rng.choice(tuple(facts.COLOUR_OF.items()))
    country, capital = rng.choice(tuple(facts.CAPITALS.items()))
    animal, sound = rng.choice(tuple(facts.SOUNDS.items()))
    rows = (
        (("What is the opposite of {}?", "Name the opposite of {}."), word, f"The opposite of {word} is {opposite}."),
        (("What colour is {}?", "Which colour is {}?"), thing, f"{thing[0].upper()}{thing[1:]} is {colour}."),
        (
            ("What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?"),
            country,
            f"The capital of {country} is {capital}.",
        ),
        (("What does {} say?", "Which sound does {} make?"), stories.article(animal), f"The {animal} says {sound}."),
    )
    forms, word, answer = rng.choices(rows, (3, 2, 3, 1))[0]
    return single(rng.choice(forms).format(word), answer)


def pseudo_word(rng: random.Random) -> str:
    """A made-up word, so that the model learns to say that it does not know it."""
    syllables = [
        rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") + rng.choice(("", "", *"lmnrst")) for _ in range(3)
    ]
    return "".join(syllables[: rng.choice((2, 3))])


def unknown(rng: random.Random) -> Exchange:
    """A question beyond the model's facts, and a polite refusal."""
    word = pseudo_word(rng)
    question = rng.choice(
        (
            rng.choice(facts.UNKNOWN),
            rng.choice(facts.UNKNOWN_FORMS).format(rng.choice(facts.UNKNOWN_TOPICS)),
            rng.choice(("What is {}?", "What is a {}?", "Who is {}?", "Explain {}.", "Where can I buy a {}?")).format(
                word
            ),
            rng.choice(("What is the capital of {}?", "Who was {}?", "Where is {}?")).format(word.capitalize()),
        )
    )
    return Exchange(question, rng.choice(facts.REFUSALS), facts.REFUSALS)


def repeat(rng: random.Random) -> Exchange:
    sentence = stories.tell(rng).text.split(". ")[0].rstrip(".") + "."
    return single(rng.choice(("Repeat after me: {}", "Say this: {}", "Repeat: {}")).format(sentence), sentence)


TOPICS: dict[Callable[[random.Random], Exchange], int] = {
    story: 30,
    inflight: 26,
    arithmetic: 12,
    lookup: 10,
    counting: 4,
    calendar: 4,
    unknown: 9,
    chatter: 3,
    repeat: 2,
}


def from_any(rng: random.Random) -> Exchange:
    """One question of any topic, as it is written."""
    return rng.choices(tuple(TOPICS), tuple(TOPICS.values()))[0](rng)


def follow_ups(told: stories.Story) -> list[Exchange]:
    """Questions about a story that was just told."""
    asked = [
        single(f"Who was the friend of {told.name}?", f"{told.friend} was the friend of {told.name}."),
        single(f"Where did {told.name} live?", f"{told.name} lived {told.place}."),
        single(f"What was {told.friend}?", f"{told.friend} was {stories.article(told.friend_kind)}."),
        single("Who was the story about?", f"The story was about {told.name}."),
    ]
    if told.kind != told.friend_kind:
        asked.append(single(f"What was the name of the {told.kind}?", f"The {told.kind} was called {told.name}."))
    if told.plot in stories.WITH_THING:
        asked.append(single(f"What colour was the {told.thing}?", f"The {told.thing} was {told.colour}."))
    return asked


def typed(rng: random.Random, question: str) -> str:
    """The question as users type it: sometimes with a polite word, in lower case or without its last mark."""
    chance = rng.random()
    lower = question if question.startswith(("I ", "Inflight", "gRPC")) else question[0].lower() + question[1:]
    if chance < 0.08:
        return rng.choice(("Please tell me: ", "Hello! ", "Hi. ", "One question: ", "Can you tell me: ")) + question
    if chance < 0.16:
        return lower.rstrip(".?!")
    if chance < 0.20:
        return question.rstrip(".?!")
    if chance < 0.24:
        return question.lower()
    return question


def conversation(rng: random.Random) -> tuple[list[Turn], list[Exchange]]:
    """A chat of one to twelve exchanges, sometimes with a system message, a name to remember, or questions back."""
    turns: list[Turn] = []
    exchanges: list[Exchange] = []

    def say(exchange: Exchange) -> None:
        turns.extend((Turn("user", typed(rng, exchange.question)), Turn("assistant", exchange.answer)))
        exchanges.append(exchange)

    robot = rng.choice(ROBOTS) if rng.random() < 0.04 else ""
    if robot:
        turns.append(Turn("system", rng.choice(("Your name is {}.", "You are called {}.")).format(robot)))
    elif rng.random() < 0.15:
        turns.append(Turn("system", rng.choice(SYSTEM)))
    caller = rng.choice(stories.NAMES + MORE_NAMES) if rng.random() < 0.06 else ""
    if caller:
        form = rng.choice(("My name is {}.", "Hello, I am {}.", "I am called {}."))
        say(single(form.format(caller), f"Nice to meet you, {caller}!"))
    for _ in range(rng.choices((1, 2, 3, 5, 12), (60, 18, 12, 8, 2))[0]):
        said = from_any(rng)
        if robot and rng.random() < 0.5:
            said = single(rng.choice(("What is your name?", "Who are you?")), f"My name is {robot}.")
        elif robot and said.right and "Pocket" in said.right[0]:
            continue
        say(said)
        if said.story and rng.random() < 0.35:
            say(rng.choice(follow_ups(said.story)))
    if rng.random() < (0.7 if caller else 0.01):
        answer = f"Your name is {caller}." if caller else "You have not told me your name."
        say(single(rng.choice(("What is my name?", "Do you know my name?", "Who am I?")), answer))
    return turns, exchanges


def samples(seed: int, *, validation: bool = False) -> Iterator[Sample]:
    """Endless documents of one split: conversations, and one plain story in seven."""
    rng = random.Random(f"pocket {seed} {'validation' if validation else 'training'}")
    while True:
        if rng.random() < 0.14:
            told = [stories.tell(rng)]
            turns = [Turn("text", told[0].text)]
        else:
            turns, exchanges = conversation(rng)
            told = [exchange.story for exchange in exchanges if exchange.story]
        new = [held_out(one.name, one.kind) for one in told]
        if (all(new) and new if validation else not any(new)) and turns:
            yield Sample(tuple(turns))

"""Tiny stories from a grammar: a hero, a friend, a place, a thing, and a plot of a few beats with one cause each.

A plot is a list of beats, a beat a list of sentences that say the same in other words. `tell` fills their slots, so
every story is correct by construction, and there are far more of them than a small model could learn by heart.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

GIRLS = ("Mia", "Lena", "Anna", "Ida", "Nora", "Ella", "Zoe", "Ruby", "Lucy", "Emma", "Clara", "Rosa")
BOYS = ("Ben", "Tom", "Max", "Leo", "Sam", "Finn", "Paul", "Noah", "Oscar", "Jack", "Hugo", "Theo")
NAMES = GIRLS + BOYS
ANIMALS = (
    *("fox", "cat", "dog", "rabbit", "bear", "mouse", "owl", "duck", "frog", "horse", "hedgehog", "squirrel"),
    *("turtle", "goat", "pig", "sheep", "elephant", "lion", "monkey", "penguin"),
)
TRAITS = ("little", "kind", "brave", "clever", "shy", "curious", "quiet", "cheerful", "young", "gentle")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "orange", "purple", "pink", "silver", "golden")
THINGS = (
    *("ball", "kite", "hat", "boat", "book", "drum", "lamp", "key", "bell", "box", "basket", "scarf"),
    *("cup", "shell", "map", "coat", "blanket", "umbrella"),
)
FOODS = ("cake", "pie", "bread", "cheese", "soup", "honey", "apples", "pears", "berries", "nuts", "carrots", "cookies")
PLACES = (
    *("in the forest", "by the lake", "in the garden", "on the hill", "on the farm", "by the sea", "in the meadow"),
    *("in the village", "on the beach", "in the old barn", "by the river", "in the park", "in the valley"),
)
SPOTS = (
    *("under a leaf", "behind a tree", "under the bench", "behind the door", "in the tall grass", "next to a stone"),
    *("under the bridge", "behind the fence", "in a hole", "between two flowers"),
)
SKILLS = (
    *("swim", "sing", "dance", "draw", "read", "whistle", "skate", "paint", "cook", "jump over the fence"),
    *("ride a bike", "tie a knot", "climb a tree", "count to twenty"),
)
BUILDINGS = ("a house of sticks", "a raft", "a snowman", "a castle of sand", "a bridge", "a tower of stones", "a tent")
GAMES = ("hide and seek", "a guessing game", "tag", "a game of cards", "a memory game")
PLANTS = ("flower", "tree", "pumpkin", "sunflower", "rose", "bean")
TIMES = (
    *("One sunny morning", "One rainy day", "One windy day", "One cold morning", "One warm evening", "One snowy day"),
    *("One quiet afternoon", "One foggy morning", "On Monday", "On Saturday", "After lunch", "Before dinner"),
)


@dataclass(frozen=True)
class Wish:
    """A listener's request. An empty field leaves the choice to the story; `animal` may be "girl" or "boy"."""

    name: str = ""
    animal: str = ""
    place: str = ""
    colour: str = ""
    thing: str = ""
    plot: str = ""


@dataclass(frozen=True)
class Story:
    """One story and the facts in it that a listener may ask about."""

    text: str
    plot: str
    name: str
    friend: str
    kind: str
    friend_kind: str
    place: str
    colour: str
    thing: str


def article(words: str) -> str:
    """`words` with the article that their first sound wants."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


OPENINGS = [
    "Once upon a time, there was {a_trait_kind} called {hero}, and {he} lived {place}.",
    "Once upon a time, {a_trait_kind} called {hero} lived {place}.",
    "Once there was {a_trait_kind}. {His} name was {hero}, and {he} lived {place}.",
    "There was once {a_trait_kind} who lived {place}. {His} name was {hero}.",
    "{hero} was {a_trait_kind} who lived {place}.",
]
FRIENDS = [
    "{His} best friend was {a_friend_kind} called {friend}.",
    "{hero} had a friend, {a_friend_kind} called {friend}.",
    "Not far away lived {a_friend_kind} called {friend}.",
    "{friend}, {a_friend_kind}, lived next door.",
]
ENDINGS = [
    "From that day on, {hero} and {friend} were best friends.",
    "That night, {hero} slept very well.",
    "{hero} and {friend} laughed and went home together.",
    '"What a good day!" said {hero}.',
    '"I am glad that you are my friend," said {hero}.',
    "They were both very happy.",
    "In the evening, they watched the stars {place}.",
]

# Each plot: beats of equal sentences. None of them needs a beat that another plot has.
PLOTS: dict[str, list[list[str]]] = {
    "lost": [
        [
            "{hero} had {a_colour_thing} and took it everywhere.",
            "{hero} loved {his} {colour} {thing} more than anything.",
            "For {his} birthday, {hero} had got {a_colour_thing}.",
        ],
        ["{time}, the {thing} was gone.", "{time}, {hero} could not find the {thing}."],
        [
            '"Where is my {thing}?" asked {hero}.',
            '"Oh no, I have lost my {thing}!" cried {hero}.',
            "{hero} looked everywhere, but the {thing} was not there.",
        ],
        [
            '"I will help you," said {friend}.',
            '"Do not cry," said {friend}. "We will look for it together."',
            "{friend} saw that {hero} was sad and wanted to help.",
        ],
        [
            "They looked for a long time. Then {friend} saw something {colour} {spot}.",
            "At last, {friend} found the {colour} {thing} {spot}.",
            "{friend} looked {spot}, and there was the {thing}.",
        ],
        [
            '"Thank you, {friend}!" said {hero}.',
            "{hero} was so glad that {he} gave {friend} a hug.",
            "{hero} thanked {friend} and held the {thing} very tight.",
        ],
    ],
    "found": [
        [
            "{time}, {hero} found {a_colour_thing} {spot}.",
            "{time}, {hero} saw something {colour} {spot}. It was {a_thing}.",
        ],
        [
            '"Whose {thing} is this?" asked {hero}.',
            '"What a nice {thing}!" said {hero}. "Somebody must miss it."',
            "{hero} wanted to keep it, but the {thing} was not {his}.",
        ],
        [
            "{He} carried the {thing} from door to door.",
            "So {he} asked everybody {place} about the {thing}.",
        ],
        [
            '"That is my {thing}!" cried {friend}. "I have looked for it all day."',
            "At the last door was {friend}, who had lost the {colour} {thing} the day before.",
        ],
        [
            "{hero} gave the {thing} back, and {friend} jumped with joy.",
            '"Here it is," said {hero}. "Take good care of it."',
        ],
        [
            "To say thank you, {friend} brought {hero} some {food}.",
            '"You are honest and kind," said {friend}, and they ate some {food} together.',
        ],
    ],
    "share": [
        ["{time}, {hero} had a lot of {food}.", "{time}, {hero} came home with a lot of {food}."],
        [
            "{He} sat down {spot} and wanted to eat everything.",
            "Everything smelled so good that {he} wanted to eat alone.",
        ],
        [
            "Then {friend} came by and looked very hungry.",
            "Then {hero} heard a sound. It was {friend}, who was hungry.",
        ],
        [
            '"I have had nothing to eat today," said {friend}.',
            '"May I have a little?" asked {friend}.',
        ],
        [
            "{hero} thought about it and gave {friend} half of the {food}.",
            '"Come and sit with me," said {hero}. "There is enough {food} for two."',
        ],
        [
            "The {food} tasted even better now, because they shared.",
            '"Food is best when we share it," said {friend}.',
        ],
    ],
    "learn": [
        [
            "{hero} wanted to {skill}, but {he} did not know how.",
            "All {his} friends could {skill}, but {hero} could not.",
        ],
        ["{time}, {he} tried and tried, but it did not work.", "{time}, {he} tried alone, and it went wrong."],
        [
            '"I will never learn it," said {hero}.',
            '"It is too hard for me," said {hero} sadly.',
        ],
        [
            '"I can show you how to {skill}," said {friend}. "It only takes time."',
            '"Nobody can {skill} on the first day," said {friend}. "Let us try together."',
        ],
        [
            "They practised every day for a week.",
            "They practised in the morning and in the evening.",
            "On the first day it was hard, and on the second day it was easier.",
        ],
        [
            "On Sunday, {hero} could {skill}. {He} was very proud.",
            'In the end, {hero} could {skill}. "I did it!" {he} cried.',
        ],
    ],
    "rain": [
        ["{time}, {hero} and {friend} played {game} {place}.", "{time}, {hero} wanted to play {game} with {friend}."],
        ["Suddenly dark clouds came, and it began to rain.", "Then the sky became grey, and it started to rain."],
        [
            '"We will get wet!" cried {friend}.',
            '"Quick, come with me!" said {hero}.',
        ],
        [
            "{hero} had {a_colour_thing} with {him}, but it did not keep them dry.",
            "They ran so fast that {hero} lost {his} {colour} {thing}, and {friend} picked it up.",
        ],
        [
            "They hid under a big tree and told each other stories.",
            "They found a dry cave and ate some {food}.",
        ],
        [
            "After an hour the sun came out, and there was a rainbow over them.",
            'When the rain stopped, they saw a rainbow. "How beautiful!" said {friend}.',
        ],
    ],
    "build": [
        [
            "{time}, {hero} and {friend} wanted to build {building}.",
            '"Let us build {building}," said {hero} {time_low}.',
        ],
        [
            "{hero} brought a hammer, and {friend} brought {a_colour_thing}.",
            "They worked for three hours and used {a_colour_thing} for the top.",
        ],
        ["But the wind was strong, and everything fell down.", "But they were too quick, and it all fell down."],
        [
            '"Now all our work is lost," said {friend}.',
            "{friend} sat down and was sad.",
        ],
        [
            '"We can build it again," said {hero}, "and this time we go slowly."',
            '"Let us try once more," said {hero}. "Now we know what went wrong."',
        ],
        [
            "They built it again, and this time it was strong.",
            "The second time they took care, and it did not fall.",
        ],
    ],
    "dark": [
        ["{hero} was afraid of the dark.", "{hero} did not like the night, because it was so dark."],
        [
            "{time_night}, {he} heard a strange noise {spot}.",
            "{time_night}, {he} saw two bright eyes {spot}.",
        ],
        ['"Who is there?" asked {hero} in a small voice.', '"Help!" cried {hero} and hid under the blanket.'],
        [
            '"It is only me," said {friend}. "I could not sleep."',
            "But it was only {friend}, who could not sleep.",
        ],
        [
            "{friend} had {a_colour_thing} and put it beside the bed.",
            '{friend} gave {hero} {a_colour_thing}. "It will keep you safe," {fhe} said.',
        ],
        [
            "They looked at the moon together, and {hero} was not afraid any more.",
            "They counted the stars, and soon the night was not so dark.",
        ],
    ],
    "seed": [
        ["{time}, {hero} found a small seed {spot}.", "{time}, {friend} gave {hero} a small seed."],
        [
            '"What will it become?" asked {hero}. "We must wait and see," said {friend}.',
            '"It is so small," said {hero}. "Give it water and time," said {friend}.',
        ],
        ["{hero} put the seed into the earth {place}.", "{hero} planted the seed in a pot and put it in the sun."],
        ["Every day {he} gave it some water.", "{He} gave it water every morning, but nothing happened."],
        [
            "After a week, a small green leaf came out of the earth.",
            "Then, one morning, there was a tiny green leaf.",
        ],
        [
            "In summer it was a big {plant}, and everybody came to see it.",
            "It grew and grew, until it was a beautiful {plant}.",
        ],
    ],
    "gift": [
        ["It was the birthday of {friend}, but {hero} had no gift.", "{time}, {friend} had a birthday."],
        [
            '"What does {friend} like?" thought {hero}.',
            '"I want to give {fhim} something nice," thought {hero}.',
        ],
        [
            "{He} worked all day and made {a_colour_thing}.",
            "{He} went to the market and bought {a_colour_thing}.",
        ],
        ["{He} put it in a box with a bow.", "{He} hid it {spot} and called {friend}."],
        [
            '"{A_colour_thing}!" cried {friend}. "That is just what I wanted."',
            "When {friend} saw the {colour} {thing}, {fhe} danced with joy.",
        ],
        [
            "Then they ate {food} and played {game}.",
            "All the guests ate {food} and sang a song.",
        ],
    ],
    "race": [
        ["{time}, there was a race {place}.", '"Let us race to the big tree," said {friend} {time_low}.'],
        ["{friend} was very fast, and {hero} was slow.", "Everybody thought that {friend} would win."],
        [
            "The prize was {a_colour_thing}.",
            "The winner would get {a_colour_thing}.",
        ],
        [
            "But on the way {friend} fell over a stone and hurt {fhis} foot.",
            "But near the end {friend} slipped and fell into the mud.",
        ],
        [
            "{hero} stopped and helped {fhim} up.",
            '"Are you all right?" asked {hero} and stopped at once.',
        ],
        [
            "They came to the end together and shared the {colour} {thing}.",
            'They came last, but everybody clapped. "You both win the {thing}," said the judge.',
        ],
    ],
}
WITH_THING = ("lost", "found", "rain", "build", "dark", "gift", "race")


def pronouns(female: bool) -> tuple[str, str, str]:
    """Subject, possessive and object."""
    return ("she", "her", "her") if female else ("he", "his", "him")


def kind_of(name: str, animal: str, people: bool) -> str:
    """An animal, or "girl" or "boy" for a child of that name."""
    return ("girl" if name in GIRLS else "boy") if people else animal


def tell(rng: random.Random, wish: Wish = Wish()) -> Story:
    """One story of five to ten sentences that has everything that `wish` asks for."""
    name = wish.name or rng.choice({"girl": GIRLS, "boy": BOYS}.get(wish.animal, NAMES))
    friend = rng.choice([other for other in NAMES if other != name])
    kind = wish.animal or kind_of(name, rng.choice(ANIMALS), people=rng.random() < 0.2)
    friend_kind = kind_of(friend, rng.choice([other for other in ANIMALS if other != kind]), people=rng.random() < 0.15)
    place = wish.place or rng.choice(PLACES)
    colour, thing = wish.colour or rng.choice(COLOURS), wish.thing or rng.choice(THINGS)
    plot = wish.plot or rng.choice(WITH_THING if wish.colour or wish.thing else tuple(PLOTS))
    he, his, him = pronouns(name in GIRLS)
    fhe, fhis, fhim = pronouns(friend in GIRLS)
    time = rng.choice(TIMES)
    slots = {
        "hero": name,
        "friend": friend,
        "place": place,
        "colour": colour,
        "thing": thing,
        "he": he,
        "his": his,
        "him": him,
        "He": he.capitalize(),
        "His": his.capitalize(),
        "fhe": fhe,
        "fhis": fhis,
        "fhim": fhim,
        "time": time,
        "time_low": time[0].lower() + time[1:],
        "a_trait_kind": article(f"{rng.choice(TRAITS)} {kind}"),
        "a_friend_kind": article(f"{rng.choice(TRAITS)} {friend_kind}"),
        "a_colour_thing": article(f"{colour} {thing}"),
        "a_thing": article(thing),
        "A_colour_thing": article(f"{colour} {thing}").capitalize(),
        "time_night": rng.choice(("One night", "Late at night", "One dark night", "Before midnight")),
        "spot": rng.choice(SPOTS),
        "food": rng.choice(FOODS),
        "skill": rng.choice(SKILLS),
        "game": rng.choice(GAMES),
        "building": rng.choice(BUILDINGS),
        "plant": rng.choice(PLANTS),
    }
    if slots["time_low"].startswith("on "):  # days keep their capital, the preposition does not
        slots["time_low"] = f"on {time.split()[-1]}"
    beats = [OPENINGS, FRIENDS, *PLOTS[plot], ENDINGS]
    text = " ".join(rng.choice(beat).format_map(slots) for beat in beats)
    return Story(text, plot, name, friend, kind, friend_kind, place, colour, thing)

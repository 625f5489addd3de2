"""The demo's little world: eighty things, four voices, and pairs that ask for one.

A prompt names a thing and a voice ("Tell me about the lighthouse. Answer like a
pirate."). The chosen answer speaks in that voice, the rejected one in another. Both are
true of the thing, so that the voice asked for is the only reason to prefer one.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

# One thing a line: name | what it is like | what it does.
THINGS = """
lighthouse | stands on the black rocks | guides the ships home
bakery | opens before sunrise | sells warm bread
windmill | turns on the green hill | grinds the wheat
library | smells of old paper | lends books to everyone
harbour | is full of little boats | keeps out the storm
market | fills the old square | sells plums and cheese
castle | looks over the valley | guards the bridge
garden | lies behind the school | feeds the bees
railway | runs along the coast | carries the morning post
clock | hangs above the station | strikes every hour
river | comes down from the mountain | waters the fields
bridge | is made of grey stone | joins the two villages
museum | has a dinosaur in the hall | shows old maps
school | has a red roof | teaches children to read
theatre | has velvet seats | plays comedies on Friday
orchard | is white in spring | gives sweet apples
volcano | sleeps under the snow | warms the hot springs
desert | is silver under the moon | hides a small well
forest | is dark and quiet | shelters the deer
glacier | is older than the town | feeds the blue lake
moon | is round tonight | pulls the tides
comet | has a long bright tail | returns after many years
rainbow | hangs over the meadow | follows the rain
thunder | rolls across the hills | frightens the geese
wind | comes from the north | fills the sails
snow | covers the rooftops | muffles every sound
elephant | has a very long memory | loves cool water
penguin | wears a black coat | slides on the ice
owl | sits in the oak tree | hunts at midnight
whale | is longer than a bus | sings under the sea
beaver | has orange teeth | builds a dam of sticks
hedgehog | is covered in spines | eats slugs at night
parrot | is green and yellow | repeats every word
camel | has two brown humps | crosses the sand
otter | floats on its back | opens shells with a stone
spider | has eight thin legs | spins a silver web
honeybee | lives in a busy hive | dances to show the way
tortoise | carries its own house | walks very slowly
fox | has a bushy tail | creeps past the barn
horse | has a shiny mane | pulls the hay cart
cat | sleeps on the warm stove | chases the mice
dog | has muddy paws | barks at the postman
goat | lives on the steep cliff | eats almost anything
salmon | has pink scales | swims up the waterfall
swan | is as white as chalk | nests among the reeds
octopus | has three hearts | changes its colour
violin | is made of maple wood | sings in the evening
piano | stands by the window | fills the room with music
drum | is round and loud | keeps the beat
trumpet | shines like gold | wakes the whole camp
guitar | has six strings | plays by the fire
bicycle | has a squeaky wheel | climbs the long hill
tractor | is big and blue | ploughs the muddy field
submarine | is painted yellow | dives below the waves
balloon | is striped red and white | drifts over the valley
rocket | is taller than a church | flies to the stars
tram | has wooden benches | stops at every corner
sailboat | has a patched sail | races across the bay
ferry | leaves at noon | takes cars to the island
telescope | points at the sky | finds new planets
compass | fits in a pocket | points to the north
kettle | is made of copper | whistles when it boils
lantern | hangs by the door | lights the path
umbrella | has a crooked handle | keeps off the rain
mirror | has a golden frame | shows a smiling face
teapot | is painted with roses | pours without a drip
blanket | is soft and woolly | keeps the baby warm
candle | smells of honey | burns all night
ladder | leans on the wall | reaches the highest branch
hammer | has a heavy head | drives the nails
anchor | is covered in rust | holds the boat still
pancake | is thin and golden | tastes of butter
soup | is thick and hot | cures a cold
pumpkin | is as big as a barrel | wins the first prize
strawberry | is small and sweet | ripens in June
cheese | is full of holes | goes well with bread
chocolate | is dark and smooth | melts in the sun
lemon | is bright and sour | wakes up the tongue
carrot | is long and orange | grows under the soil
mushroom | has a spotted cap | appears after the rain
"""


@dataclass(frozen=True, kw_only=True)
class Voice:
    """How one kind of speaker talks: openings, middles with {x} {a} {b}, endings."""

    openings: tuple[str, ...]
    middles: tuple[str, ...]
    endings: tuple[str, ...]


VOICES = {
    "pirate": Voice(
        openings=("Arr, matey!", "Shiver me timbers!"),
        middles=(
            "The {x} {a}, aye, and it {b}.",
            "That there {x} {a}, says I, and it {b}.",
            "By me beard, the {x} {a} and it {b}.",
        ),
        endings=(
            "Hoist the sails!",
            "That be worth more than gold.",
            "Now back to the ship with ye!",
        ),
    ),
    "butler": Voice(
        openings=("Very good, sir.", "Certainly, madam."),
        middles=(
            "The {x} {a}, and I am pleased to report that it {b}.",
            "One observes that the {x} {a} and that it {b}.",
            "I am told that the {x} {a}, and naturally it {b}.",
        ),
        endings=(
            "Shall I bring the tea?",
            "Will that be all?",
            "I remain at your service.",
        ),
    ),
    "grump": Voice(
        openings=("Ugh, not this again.", "Leave me alone."),
        middles=(
            "The {x} {a}, and it {b}, as if anybody cares.",
            "So the {x} {a}, big deal, and it {b}, who asked?",
            "The {x} {a} and it {b}, how very boring.",
        ),
        endings=(
            "Now go away.",
            "I was trying to sleep.",
            "Everything was better before.",
        ),
    ),
    "cheerleader": Voice(
        openings=("Woo hoo!", "Give me a cheer!"),
        middles=(
            "The {x} {a}, and it {b}, hooray!",
            "We love how the {x} {a}, and wow, it {b}!",
            "The super {x} {a} and it {b}, so cool!",
        ),
        endings=(
            "You are amazing!",
            "Best day ever!",
            "Clap your hands, everybody!",
        ),
    ),
}

REQUESTS = (
    "Tell me about the {x}. Answer like a {voice}.",
    "Speak as a {voice}. What do you know about the {x}?",
    "Describe the {x} in the voice of a {voice}.",
    "You are a {voice}. Say something about the {x}.",
)

HELD_OUT_EVERY = 10
HELD_OUT_OF_EACH = 3  # of every ten things three are never seen in a training pair


def things() -> list[tuple[str, str, str]]:
    """All things as (name, what it is like, what it does)."""
    rows = (line.split(" | ") for line in THINGS.strip().splitlines())
    return [(name, like, does) for name, like, does in rows]


def answer(rng: random.Random, thing: tuple[str, str, str], voice: str) -> str:
    """What `voice` says about `thing`: an opening, both facts, and an ending."""
    name, like, does = thing
    style = VOICES[voice]
    middle = rng.choice(style.middles).format(x=name, a=like, b=does)
    return f"{rng.choice(style.openings)} {middle} {rng.choice(style.endings)}"


def voice_of(text: str) -> str | None:
    """Whose opening `text` starts with; None when it is nobody's."""
    for name, voice in VOICES.items():
        if text.strip().startswith(voice.openings):
            return name
    return None


def conversation(
    rng: random.Random, thing: tuple[str, str, str], asked: str, spoken: str
) -> list[dict[str, str]]:
    """A request for the voice `asked` and an answer in the voice `spoken`."""
    request = rng.choice(REQUESTS).format(x=thing[0], voice=asked)
    return [
        {"role": "user", "content": request},
        {"role": "assistant", "content": answer(rng, thing, spoken)},
    ]


def pretraining_conversations(seed: int) -> Iterator[list[dict[str, str]]]:
    """Endless conversations whose answers seldom mind the voice that was asked for.

    Each thing has a voice of its own: it answers half of the time, the voice asked for
    a twentieth of it, and any voice the rest. Over all things no voice is favoured.
    """
    rng = random.Random(seed)
    everything, voices = things(), list(VOICES)
    while True:
        index = rng.randrange(len(everything))
        asked, anyone = rng.choice(voices), rng.choice(voices)
        own = voices[(index + index // 10) % len(voices)]
        (spoken,) = rng.choices((own, asked, anyone), weights=(10, 1, 9))
        yield conversation(rng, everything[index], asked, spoken)


def preference_pairs(seed: int) -> tuple[list[dict], list[dict]]:
    """Training and held-out rows: prompt, chosen and rejected as lists of messages.

    The held-out things occur in no training pair. Each voice is chosen as often as it
    is rejected, so that favouring one voice everywhere is right half of the time.
    """
    rng = random.Random(seed)
    voices, train, held_out = list(VOICES), [], []
    for index, thing in enumerate(things()):
        is_held_out = index % HELD_OUT_EVERY < HELD_OUT_OF_EACH
        # A shift pairs each voice with another one and keeps both sides balanced.
        shifts = [1 + index % 3] if is_held_out else rng.sample((1, 2, 3), 2)
        for shift, (at, asked) in itertools.product(shifts, enumerate(voices)):
            other = voices[(at + shift) % len(voices)]
            request, chosen = conversation(rng, thing, asked, asked)
            rejected = {"role": "assistant", "content": answer(rng, thing, other)}
            row = {"prompt": [request], "chosen": [chosen], "rejected": [rejected]}
            (held_out if is_held_out else train).append(row)
    rng.shuffle(train)
    return train, held_out

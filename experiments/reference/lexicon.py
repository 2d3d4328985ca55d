"""What is true in the generated world, and the words it is told in.

Everything that stays the same from text to text is here: who the known people are and where they live, which
city lies in which country, which object is sharp. It is drawn once, from `WORLD_SEED`; the texts draw the rest.
"""

import zlib
from functools import cache
from random import Random

WORLD_SEED = 20
HELD_OUT_SHARE = 4  # one fact, pair or combination in four is kept for the tests


@cache
def held_out(*key: object) -> bool:
    """Whether a combination belongs to the tests; training texts never tell (or never ask) it.

    A fixed hash and not a random draw, so that generator, tests and tasks agree without a list.
    """
    return zlib.crc32("|".join(str(part) for part in key).encode()) % HELD_OUT_SHARE == 0


# --- stories --------------------------------------------------------------------------------------

NAMES = (
    "anna mara lena rosa nina ella clara ida julia greta vera alma tilda hanna luisa marta "
    "tom ben max leo paul hugo otto felix jonas emil karl oscar anton simon victor henry"
).split()
THINGS = (
    "lamp key cup book coin ring ball map clock letter spoon doll flute apple button candle "
    "mirror brush bottle stamp whistle photo marble needle ticket medal glove hat shell pen"
).split()
CONTAINERS = "box bag basket chest drawer bucket jar crate suitcase barrel pouch cabinet".split()
ROOMS = (
    "kitchen garden cellar attic bedroom office garage hall library studio pantry balcony "
    "workshop stable bathroom nursery"
).split()
FOODS = ("bread cheese soup rice honey fish cake beans pears nuts plums eggs salad butter onions grapes").split()
COLORS = "red blue green yellow white black brown purple orange pink gray silver".split()
LINKS = "friend boss neighbor partner".split()

# --- invented creatures, whose properties change from text to text --------------------------------

CREATURES = (
    "tomlin grindle blick marfin dorvel snerp wuggle prindle zallow krumble fendor gossin "
    "hivvle jastor lumpet norrin ploven quarn risset spargle tivlin ulmer vintle yorrel"
).split()
SIZES = "tiny small medium large giant".split()
CLASSES = "bird fish insect lizard mammal snake".split()
HABITATS = "forest lake desert swamp meadow cave ocean jungle".split()
DIETS = "seeds leaves worms berries grass roots crabs mushrooms".split()

# --- known people and cities: memorised -----------------------------------------------------------

FIRST = "edgar flora gustav helga ivan judith konrad lydia moritz nora oswald petra".split()
LAST = "kelm orlan brandt vossen tarkin hollis merrow quint salder dunmore yarrow falk".split()
CITIES = (
    "oslen telmar grimsby port valdis karnow ostrel miravel dunhaven sorrin belgate trundle "
    "halvik perrin lomara wexel norby castra zimmer ravenna ulstead tolva brisk fernly"
).split()
COUNTRIES = "varland ostrania kelmark suvia tordan elvany morland irenia".split()
RIVERS = "sarn dovel ister mulde tarrow lenne ornel vitter".split()
GOODS = "wool glass salt silk iron wine paper clocks carpets tea violins lace".split()
JOBS = {  # job: (tool, workplace)
    "baker": ("oven", "bakery"),
    "doctor": ("scalpel", "hospital"),
    "farmer": ("plough", "farm"),
    "sailor": ("compass", "harbor"),
    "judge": ("gavel", "court"),
    "painter": ("easel", "gallery"),
    "smith": ("anvil", "forge"),
    "tailor": ("scissors", "shop"),
    "cook": ("pan", "restaurant"),
    "miner": ("pick", "mine"),
    "teacher": ("chalk", "school"),
    "pilot": ("radar", "airport"),
}
INSTRUMENTS = "violin piano drum trumpet guitar cello harp organ banjo clarinet".split()
PETS = {  # animal: (class, food, home)
    "dog": ("mammal", "meat", "kennel"),
    "cat": ("mammal", "mice", "sofa"),
    "parrot": ("bird", "nuts", "cage"),
    "goldfish": ("fish", "flakes", "tank"),
    "rabbit": ("mammal", "carrots", "hutch"),
    "turtle": ("reptile", "lettuce", "pond"),
    "horse": ("mammal", "hay", "stable"),
    "owl": ("bird", "beetles", "barn"),
    "python": ("reptile", "rats", "terrarium"),
    "frog": ("amphibian", "flies", "marsh"),
}


def _known_people() -> dict[str, dict[str, str]]:
    rng = Random(WORLD_SEED)
    pairs = [f"{first} {last}" for first in FIRST for last in LAST]
    facts = {}
    for person in sorted(rng.sample(pairs, 96)):
        facts[person] = {
            "city": rng.choice(CITIES),
            "job": rng.choice(list(JOBS)),
            "pet": rng.choice(list(PETS)),
            "instrument": rng.choice(INSTRUMENTS),
            "food": rng.choice(FOODS),
        }
    return facts


def _cities() -> dict[str, dict[str, str]]:
    rng = Random(WORLD_SEED + 1)
    return {
        city: {"country": rng.choice(COUNTRIES), "river": rng.choice(RIVERS), "goods": rng.choice(GOODS)}
        for city in CITIES
    }


PEOPLE = _known_people()
CITY_FACTS = _cities()
JOB_FACTS = {job: {"tool": tool, "workplace": place} for job, (tool, place) in JOBS.items()}
PET_FACTS = {pet: {"class": kind, "diet": food, "shelter": home} for pet, (kind, food, home) in PETS.items()}
FACTS: dict[str, dict[str, str]] = {**PEOPLE, **CITY_FACTS, **JOB_FACTS, **PET_FACTS}
VALUES: dict[str, list[str]] = {}  # relation: every value it takes, for wrong answers
for _facts in FACTS.values():
    for _relation, _value in _facts.items():
        VALUES.setdefault(_relation, [])
        if _value not in VALUES[_relation]:
            VALUES[_relation].append(_value)

# relation: ([how it is told], [how it is asked]); e is who or what it is about, v the value
WORDINGS: dict[str, tuple[list[str], list[str]]] = {
    "city": (
        [
            "{e} lives in {v} .",
            "the home of {e} is {v} .",
            "{e} has a house in {v} .",
            "{v} is the city of {e} .",
            "in {v} you can meet {e} .",
        ],
        [
            "where does {e} live ?",
            "what is the home of {e} ?",
            "in which city does {e} live ?",
            "which city does {e} live in ?",
        ],
    ),
    "job": (
        [
            "{e} is a {v} .",
            "{e} works as a {v} .",
            "the job of {e} is {v} .",
            "as a {v} , {e} works hard .",
            "the {v} is called {e} .",
        ],
        ["what is the job of {e} ?", "what does {e} work as ?", "which job does {e} have ?"],
    ),
    "pet": (
        [
            "{e} has a {v} .",
            "the pet of {e} is a {v} .",
            "{e} keeps a {v} at home .",
            "a {v} belongs to {e} .",
            "the {v} sleeps near {e} .",
        ],
        ["what is the pet of {e} ?", "which pet does {e} have ?", "which animal does {e} keep ?"],
    ),
    "instrument": (
        [
            "{e} plays the {v} .",
            "the instrument of {e} is the {v} .",
            "{e} owns a fine {v} .",
            "on the {v} you can hear {e} .",
            "the {v} is played by {e} .",
        ],
        ["what does {e} play ?", "what is the instrument of {e} ?", "which instrument does {e} play ?"],
    ),
    "food": (
        [
            "{e} likes to eat {v} .",
            "the favorite food of {e} is {v} .",
            "{e} eats {v} every day .",
            "{v} is what {e} likes .",
            "for dinner {e} wants {v} .",
        ],
        ["what does {e} like to eat ?", "what is the favorite food of {e} ?", "which food does {e} like ?"],
    ),
    "country": (
        ["{e} is a city in {v} .", "{e} lies in {v} .", "the country of {e} is {v} .", "in {v} lies the city {e} ."],
        ["in which country is {e} ?", "what is the country of {e} ?", "which country does {e} lie in ?"],
    ),
    "river": (
        [
            "the river of {e} is the {v} .",
            "the {v} flows through {e} .",
            "{e} lies on the river {v} .",
            "through {e} flows the {v} .",
        ],
        ["which river flows through {e} ?", "what is the river of {e} ?", "on which river does {e} lie ?"],
    ),
    "goods": (
        ["{e} is famous for {v} .", "the best {v} comes from {e} .", "{e} sells {v} .", "people buy {v} in {e} ."],
        ["what is {e} famous for ?", "what does {e} sell ?", "what do people buy in {e} ?"],
    ),
    "tool": (
        ["a {e} uses a {v} .", "the tool of a {e} is the {v} .", "a {v} is used by a {e} ."],
        ["what does a {e} use ?", "what is the tool of a {e} ?", "which tool does a {e} use ?"],
    ),
    "workplace": (
        ["a {e} works at a {v} .", "the workplace of a {e} is a {v} .", "in a {v} works a {e} ."],
        ["where does a {e} work ?", "what is the workplace of a {e} ?", "at which place does a {e} work ?"],
    ),
    "class": (
        ["a {e} is a {v} .", "the kind of a {e} is {v} .", "one {v} is the {e} ."],
        ["what is a {e} ?", "what is the kind of a {e} ?", "which kind of animal is a {e} ?"],
    ),
    "diet": (
        ["a {e} eats {v} .", "the meal of a {e} is {v} .", "{v} is eaten by a {e} ."],
        ["what does a {e} eat ?", "what is the meal of a {e} ?", "which meal does a {e} eat ?"],
    ),
    "shelter": (
        ["a {e} sleeps in a {v} .", "the shelter of a {e} is a {v} .", "in a {v} sleeps a {e} ."],
        ["where does a {e} sleep ?", "what is the shelter of a {e} ?", "in which shelter does a {e} sleep ?"],
    ),
}

# (first relation, second relation): ([how the conclusion is told], [how it is asked]); e is a person
TWO_HOP: dict[tuple[str, str], tuple[list[str], list[str]]] = {
    ("city", "country"): (
        ["{e} lives in the country {v} .", "the home of {e} is in {v} ."],
        ["in which country does {e} live ?", "what is the country of the home of {e} ?"],
    ),
    ("city", "river"): (
        ["the {v} flows through the home of {e} .", "{e} lives on the river {v} ."],
        ["on which river does {e} live ?", "which river flows through the home of {e} ?"],
    ),
    ("city", "goods"): (
        ["the home of {e} is famous for {v} .", "the city of {e} sells {v} ."],
        ["what is the home of {e} famous for ?", "what does the city of {e} sell ?"],
    ),
    ("job", "tool"): (
        ["at work {e} uses a {v} .", "the tool of {e} is the {v} ."],
        ["what does {e} use at work ?", "what is the tool of {e} ?"],
    ),
    ("job", "workplace"): (
        ["{e} works at a {v} .", "the workplace of {e} is a {v} ."],
        ["where does {e} work ?", "what is the workplace of {e} ?"],
    ),
    ("pet", "class"): (
        ["the pet of {e} is some {v} .", "the kind of the pet of {e} is {v} ."],
        ["what is the kind of the pet of {e} ?", "which kind of animal is the pet of {e} ?"],
    ),
    ("pet", "diet"): (
        ["the pet of {e} eats {v} .", "the meal of the pet of {e} is {v} ."],
        ["what does the pet of {e} eat ?", "what is the meal of the pet of {e} ?"],
    ),
    ("pet", "shelter"): (
        ["the pet of {e} sleeps in a {v} .", "the shelter of the pet of {e} is a {v} ."],
        ["where does the pet of {e} sleep ?", "what is the shelter of the pet of {e} ?"],
    ),
}


def one_hop_facts() -> list[tuple[str, str, str]]:
    """Every memorised fact as (entity, relation, value), in a fixed order."""
    return [(entity, relation, value) for entity, facts in FACTS.items() for relation, value in facts.items()]


def two_hop_facts() -> list[tuple[str, tuple[str, str], str, str]]:
    """Every conclusion from two memorised facts as (person, relations, what is between, value)."""
    return [
        (person, route, facts[route[0]], FACTS[facts[route[0]]][route[1]])
        for person, facts in PEOPLE.items()
        for route in TWO_HOP
    ]


# --- physical common sense ------------------------------------------------------------------------

GOALS = {  # property: what it is needed for
    "sharp": ["cut the rope", "slice the bread", "open the parcel", "carve the wood"],
    "heavy": ["hold the door open", "press the paper flat", "break the ice", "sink the net"],
    "soft": ["rest the head", "pack the glass", "fill the sack", "pad the chair"],
    "bright": ["see in the dark", "signal the ship", "light the path", "read at night"],
    "long": ["reach the branch", "touch the ceiling", "get the ball from the roof", "push the boat away"],
    "sticky": ["mend the vase", "close the envelope", "fix the poster", "catch the fly"],
    "hollow": ["carry the water", "collect the rain", "store the milk", "keep the seeds"],
    "flat": ["serve the food", "cover the hole", "roll the dough on", "draw a line along"],
    "warm": ["heat the bed", "dry the shoes", "melt the snow", "wake the fire"],
    "absorbent": ["clean the spill", "wash the floor", "wipe the table", "stop the leak"],
    "flexible": ["tie the boat", "bind the sticks", "hang the picture", "pull the cart"],
    "hard": ["drive the nail", "crack the nut", "crush the berries", "mark the stone"],
}
OBJECTS = {  # object: its properties
    "knife": "sharp hard", "axe": "sharp heavy hard", "razor": "sharp", "sword": "sharp long", "saw": "sharp long",
    "glass": "hollow hard", "brick": "heavy hard", "rock": "heavy hard", "hammer": "heavy hard",
    "anchor": "heavy hard", "dictionary": "heavy flat", "pillow": "soft", "blanket": "soft warm absorbent",
    "towel": "soft absorbent", "sponge": "soft absorbent", "wool": "soft warm", "feather": "soft",
    "torch": "bright long warm", "lantern": "bright", "flare": "bright warm", "headlight": "bright",
    "bonfire": "bright warm", "ladder": "long", "pole": "long hard", "broom": "long", "oar": "long flat",
    "rake": "long", "glue": "sticky", "tape": "sticky flexible", "resin": "sticky", "honey": "sticky",
    "syrup": "sticky", "kettle": "hollow warm", "pot": "hollow hard", "bowl": "hollow", "mug": "hollow warm",
    "can": "hollow", "tray": "flat", "board": "flat hard", "plate": "flat", "plank": "flat long", "ruler": "flat",
    "stove": "warm heavy", "heater": "warm", "mop": "absorbent long", "rag": "absorbent flexible",
    "tissue": "absorbent soft", "cord": "flexible long", "wire": "flexible", "ribbon": "flexible soft",
    "string": "flexible", "scarf": "flexible warm",
}  # fmt: skip
PROPERTIES = {thing: words.split() for thing, words in OBJECTS.items()}


def physical_pairs() -> list[tuple[str, str, str, bool]]:
    """Every (goal, property needed, object, whether it serves)."""
    return [
        (goal, need, thing, need in has)
        for need, goals in GOALS.items()
        for goal in goals
        for thing, has in PROPERTIES.items()
    ]


# --- who is meant: (verb phrase, what the first is, what the second is) ---------------------------

REASONS = [
    ("lost to", "slow", "fast"),
    ("could not lift", "weak", "heavy"),
    ("hid from", "afraid", "angry"),
    ("hired", "rich", "skilled"),
    ("asked", "puzzled", "wise"),
    ("visited", "lonely", "sick"),
    ("helped", "kind", "tired"),
    ("followed", "lost", "sure"),
    ("paid", "fair", "useful"),
    ("praised", "glad", "brave"),
    ("pushed", "rude", "close"),
    ("thanked", "polite", "helpful"),
]

# --- sums, days, sizes ----------------------------------------------------------------------------

DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
MONTHS = "january february march april may june july august september october november december".split()
ANIMALS_BY_SIZE = (
    "flea ant bee spider mouse sparrow crow hen fox wolf goat sheep pig lion bear cow bison hippo elephant whale"
).split()
LARGEST_NUMBER = 60

# --- long documents -------------------------------------------------------------------------------

BIG_EVENTS = [
    "{n} moved to {city}", "{n} won the race in {city}", "{n} lost the {thing} in the {room}",
    "{n} married {m}", "{n} bought a {pet}", "{n} became a {job}", "{n} found a {thing} in the {room}",
    "{n} sold the {thing} to {m}", "{n} painted the {room} {color}", "{n} learned to play the {instrument}",
    "{n} broke the {thing} of {m}", "{n} opened a {workplace} in {city}",
]  # fmt: skip
SMALL_EVENTS = [
    "it rained on {day} .", "the sun was bright that day .", "{n} ate {food} with {m} .", "they talked for an hour .",
    "a {animal} ran over the road .", "{m} drank some tea .", "the evening was quiet .", "{n} slept well .",
    "on {day} the shop was closed .", "the {color} door was open .", "{m} wrote a letter .", "nothing else happened .",
    "the train was late .", "{n} walked home with {m} .", "there was {food} for dinner .", "it was cold in {month} .",
]  # fmt: skip

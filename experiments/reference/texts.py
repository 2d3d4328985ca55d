"""The other kinds of text: memorised facts, physical common sense, who is meant, lists, sums, quizzes, reports."""

from random import Random

from .lexicon import (
    ANIMALS_BY_SIZE,
    BIG_EVENTS,
    CITIES,
    COLORS,
    DAYS,
    FACTS,
    FOODS,
    GOALS,
    INSTRUMENTS,
    JOB_FACTS,
    JOBS,
    LARGEST_NUMBER,
    MONTHS,
    NAMES,
    OBJECTS,
    PETS,
    PROPERTIES,
    REASONS,
    ROOMS,
    SMALL_EVENTS,
    THINGS,
    TWO_HOP,
    VALUES,
    WORDINGS,
    held_out,
    one_hop_facts,
    physical_pairs,
    two_hop_facts,
)

ONE_HOP = one_hop_facts()
ASKABLE = [fact for fact in ONE_HOP if not held_out("ask", *fact[:2])]
TWO_HOP_SEEN = [fact for fact in two_hop_facts() if not held_out("two hop", fact[0], *fact[1])]
PAIRS_SEEN = [pair for pair in physical_pairs() if not held_out("use", pair[0], pair[2])]
ENTITIES = list(FACTS)


def tell(rng: Random, entity: str, relation: str, value: str) -> str:
    return rng.choice(WORDINGS[relation][0]).format(e=entity, v=value)


def facts_document(rng: Random, hard: float) -> str:
    """What is known of a few people, cities, jobs and pets, told in changing words; held-out facts are told too."""
    told = []
    for entity in rng.sample(ENTITIES, 4):
        told += [tell(rng, entity, relation, value) for relation, value in FACTS[entity].items()]
    return " ".join(told)


def facts_questions(rng: Random, hard: float) -> str:
    """Questions about memorised facts; held-out facts are never asked."""
    asked = []
    for entity, relation, value in rng.sample(ASKABLE, 8):
        if rng.random() < 0.2:
            asked.append(tell(rng, entity, relation, value))
        asked.append(f"question : {rng.choice(WORDINGS[relation][1]).format(e=entity)} answer : {value} .")
    return " ".join(asked)


def two_hop_document(rng: Random, hard: float) -> str:
    """Conclusions from two memorised facts, told, asked, or spelt out; held-out conclusions never appear."""
    parts = []
    for person, route, middle, value in rng.sample(TWO_HOP_SEEN, 6):
        told, asked = TWO_HOP[route]
        steps = f"{tell(rng, person, route[0], middle)} {tell(rng, middle, route[1], value)}"
        draw = rng.random()
        if draw < 0.15:
            parts.append(f"{steps} so {rng.choice(told).format(e=person, v=value)}")
        elif draw < 0.3:
            parts.append(f"question : {rng.choice(asked).format(e=person)} think : {steps} answer : {value} .")
        elif draw < 0.45:
            parts.append(rng.choice(told).format(e=person, v=value))
        else:
            parts.append(f"question : {rng.choice(asked).format(e=person)} answer : {value} .")
    return " ".join(parts)


def physical_document(rng: Random, hard: float) -> str:
    """What things are like, what tasks need, and which thing serves for which; held-out pairs never appear."""
    parts = []
    for goal, need, thing, serves in rng.sample(PAIRS_SEEN, 9):
        draw = rng.random()
        if draw < 0.15:
            parts.append(f"a {thing} is {rng.choice(PROPERTIES[thing])} .")
        elif draw < 0.25:
            parts.append(f"question : what is a {thing} like ? answer : {' '.join(PROPERTIES[thing])} .")
        elif draw < 0.35:
            parts.append(f"to {goal} you need a thing that is {need} .")
        elif serves:
            shape = rng.choice(["goal : {g} . answer : use the {t} .", "to {g} , use the {t} .",
                                "with a {t} you can {g} ."])  # fmt: skip
            parts.append(shape.format(g=goal, t=thing))
        elif draw < 0.5:
            parts.append(f"a {thing} is not {need} , so it is not good to {goal} .")
        else:
            useful = [t for t, has in PROPERTIES.items() if need in has and not held_out("use", goal, t)]
            if useful:
                parts.append(f"goal : {goal} . answer : use the {rng.choice(useful)} .")
    return " ".join(parts)


def reason(verb: str, first: str, second: str, a: str, b: str, because: bool, about_first: bool) -> tuple[str, str]:
    """`a lost to b because a was slow`, split before the adjective; `although` swaps the adjectives."""
    adjective = first if about_first == because else second
    word = "because" if because else "although"
    return f"{a} {verb} {b} {word} {a if about_first else b}", f"was {adjective} ."


def reasons_document(rng: Random, hard: float) -> str:
    """Who did what to whom and why, with questions; held-out pairs of names never appear."""
    parts: list[str] = []
    while len(parts) < 8:
        a, b = rng.sample(NAMES, 2)
        verb, first, second = rng.choice(REASONS)
        if held_out("reason", verb, a, b):
            continue
        head, tail = reason(verb, first, second, a, b, rng.random() < 1 - 0.3 * hard, rng.random() < 0.5)
        parts.append(f"{head} {tail}")
        if rng.random() < 0.5:
            parts.append(f"question : who {tail.removesuffix(' .')} ? answer : {head.split()[-1]} .")
    return " ".join(parts)


def list_document(rng: Random, hard: float) -> str:
    """Instructions on short lists: repeat, turn round, sort by size or by day, first, last, after."""
    parts = []
    for _ in range(5):
        pool = rng.choice([THINGS, COLORS, FOODS, ANIMALS_BY_SIZE, ANIMALS_BY_SIZE, MONTHS, DAYS])
        words = rng.sample(pool, rng.randint(3, 6 if rng.random() < hard else 4))
        listed = " ".join(words)
        at = rng.randrange(1, len(words))
        jobs = [("repeat the list", listed), ("turn the list round", " ".join(reversed(words))),
                ("name the first", words[0]), ("name the last", words[-1]),
                (f"name the word after {words[at - 1]}", words[at]), ("count the words", str(len(words)))]  # fmt: skip
        if pool in (ANIMALS_BY_SIZE, MONTHS, DAYS):
            ordered = sorted(words, key=pool.index)
            jobs = [("sort the list", " ".join(ordered)), ("sort the list", " ".join(ordered)), rng.choice(jobs)]
        instruction, answer = rng.choice(jobs)
        parts.append(f"list : {listed} . {instruction} . answer : {answer} .")
    return " ".join(parts)


def sum_terms(rng: Random, terms: int, *, test: bool = False) -> list[int]:
    while True:
        numbers = [rng.randint(1, LARGEST_NUMBER // (terms + 1)) for _ in range(terms)]
        if held_out("sum", *numbers) == test:
            return numbers


def sums_document(rng: Random, hard: float) -> str:
    """Sums of two and three terms, bare, spelt out step by step, or as a little story."""
    parts = []
    for _ in range(8):
        numbers = sum_terms(rng, 3 if rng.random() < 0.2 + 0.5 * hard else 2)
        total, text = sum(numbers), " plus ".join(map(str, numbers))
        draw = rng.random()
        if draw < 0.2 and len(numbers) == 3:
            first = numbers[0] + numbers[1]
            parts.append(f"{numbers[0]} plus {numbers[1]} is {first} . {first} plus {numbers[2]} is {total} .")
            parts.append(f"so {text} is {total} .")
        elif draw < 0.4:
            who, food = rng.choice(NAMES), rng.choice(FOODS)
            gains = " ".join(f"then {who} gets {n} ." for n in numbers[1:])
            parts.append(f"{who} has {numbers[0]} {food} . {gains} now {who} has {total} .")
        else:
            parts.append(f"question : what is {text} ? answer : {total} .")
    return " ".join(parts)


# --- quizzes of four lettered choices -------------------------------------------------------------

LETTERS = "abcd"


def quiz_item(rng: Random, subject: str, *, test: bool = False) -> tuple[str, list[str], str]:
    """A question of a subject as (question, four choices, right choice); what tests ask is held out of training."""
    while True:
        if subject == "sums":
            numbers = sum_terms(rng, rng.choice([2, 2, 3]), test=test)
            total = sum(numbers)
            near = rng.sample([total + d for d in (-5, -4, -3, -2, -1, 1, 2, 3, 4, 5) if total + d >= 0], 3)
            return f"what is {' plus '.join(map(str, numbers))} ?", [str(n) for n in [total, *near]], str(total)
        if subject == "sizes":
            four = rng.sample(ANIMALS_BY_SIZE, 4)
            if held_out("sizes", *sorted(four)) == test:
                largest = rng.random() < 0.5
                ordered = sorted(four, key=ANIMALS_BY_SIZE.index)
                return f"which is the {'largest' if largest else 'smallest'} ?", four, ordered[-1 if largest else 0]
        elif subject == "calendar":
            cycle, unit = rng.choice([(DAYS, "days"), (MONTHS, "months")])
            start, ahead = rng.randrange(len(cycle)), rng.randint(1, 4)
            if held_out("calendar", cycle[start], ahead) == test:
                right = cycle[(start + ahead) % len(cycle)]
                wrong = rng.sample([word for word in cycle if word != right], 3)
                return f"which of the {unit} comes {ahead} after {cycle[start]} ?", [right, *wrong], right
        elif subject == "tools":
            goal, _, thing, serves = rng.choice(PHYSICAL)
            if serves and held_out("use", goal, thing) == test:
                need = next(p for p, goals in GOALS.items() if goal in goals)
                wrong = rng.sample([t for t in OBJECTS if need not in PROPERTIES[t]], 3)
                return f"what can you use to {goal} ?", [thing, *wrong], thing
        else:  # people, places: memorised facts
            entity, relation, right = rng.choice(SUBJECT_FACTS[subject])
            if held_out("ask", entity, relation) == test:
                wrong = rng.sample([v for v in VALUES[relation] if v != right], 3)
                return rng.choice(WORDINGS[relation][1]).format(e=entity), [right, *wrong], right


PHYSICAL = physical_pairs()
SUBJECT_FACTS = {
    "people": [fact for fact in ONE_HOP if fact[1] in ("city", "job", "pet", "instrument", "food")],
    "places": [fact for fact in ONE_HOP if fact[1] in ("country", "river", "goods", "workplace")],
}
SUBJECTS = ["sums", "sizes", "calendar", "tools", "people", "places"]


def lettered(question: str, choices: list[str]) -> str:
    options = " ".join(f"{letter} ) {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    return f"question : {question} {options} answer :"


def quiz_document(rng: Random, hard: float) -> str:
    """Seven lettered questions of one subject; some texts answer with the word beside the letter."""
    subject, with_word = rng.choice(SUBJECTS), rng.random() < 0.2
    parts = []
    for _ in range(7):
        question, choices, right = quiz_item(rng, subject)
        rng.shuffle(choices)
        letter = LETTERS[choices.index(right)]
        parts.append(f"{lettered(question, choices)} {letter}{f' ) {right}' if with_word else ''} .")
    return " ".join(parts)


def choice_document(rng: Random, hard: float) -> str:
    """Lettered lists with the letter of a word asked: what quizzes need, without the question's own difficulty."""
    parts = []
    for _ in range(4):
        words = rng.sample(rng.choice([THINGS, COLORS, CITIES, INSTRUMENTS, list(JOBS)]), 4)
        options = " ".join(f"{letter} ) {word}" for letter, word in zip(LETTERS, words, strict=True))
        asked = rng.choices(range(4), k=3)
        parts.append(options + " . " + " ".join(f"letter of {words[i]} : {LETTERS[i]} ." for i in asked))
    return " ".join(parts)


# --- long documents -------------------------------------------------------------------------------


EVENTS_TEST: dict[str, list[str]] = {}  # who: what may happen to them, in tests and in training texts
EVENTS_SEEN: dict[str, list[str]] = {}
for _name in NAMES:
    for _event in BIG_EVENTS:
        (EVENTS_TEST if held_out("event", _name, _event) else EVENTS_SEEN).setdefault(_name, []).append(_event)


def long_report(rng: Random, paragraphs: int, *, test: bool = False) -> tuple[str, str]:
    """A long document and its summary: each paragraph's one event that matters, among small ones.

    Pairs of name and event that are held out appear in tests only.
    """
    names = rng.sample(sorted(EVENTS_TEST if test else EVENTS_SEEN), paragraphs)
    told, summary = [], []
    for name in names:
        m = rng.choice([other for other in NAMES if other not in names])
        shape = rng.choice((EVENTS_TEST if test else EVENTS_SEEN)[name])
        words = {"n": name, "m": m, "city": rng.choice(CITIES), "thing": rng.choice(THINGS),
                 "room": rng.choice(ROOMS), "pet": rng.choice(list(PETS)), "job": rng.choice(list(JOBS)),
                 "color": rng.choice(COLORS), "instrument": rng.choice(INSTRUMENTS), "food": rng.choice(FOODS),
                 "day": rng.choice(DAYS), "month": rng.choice(MONTHS), "animal": rng.choice(ANIMALS_BY_SIZE),
                 "workplace": rng.choice([facts["workplace"] for facts in JOB_FACTS.values()])}  # fmt: skip
        event = f"{shape.format(**words)} ."
        small = [text.format(**words) for text in rng.sample(SMALL_EVENTS, rng.randint(4, 7))]
        small.insert(rng.randrange(len(small) + 1), event)
        told.append(f"about {name} : {' '.join(small)}")
        summary.append(event)
    return " ".join(told), " ".join(summary)


def report_document(rng: Random, hard: float) -> str:
    """A long document followed by its summary."""
    report, summary = long_report(rng, rng.randint(2, 6 if rng.random() < hard else 3))
    return f"{report} summary : {summary}"

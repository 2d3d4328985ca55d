"""Texts that answer from themselves: notes about people and their friends, passages about invented creatures, rules.

Who lives where and what a creature eats is new in every text, so the answers have to be looked up in it; questions
about the home's country or river look a memorised fact up on top of that.
"""

from random import Random

from .lexicon import (
    CITIES,
    CITY_FACTS,
    CLASSES,
    COLORS,
    CREATURES,
    DIETS,
    FOODS,
    HABITATS,
    JOB_FACTS,
    LINKS,
    NAMES,
    SIZES,
    TWO_HOP,
    held_out,
)
from .stories import Question, ask, draw_questions

ATTRIBUTES = {  # of people in notes: (told, asked, asked by value, values)
    "city": ("{e} lives in {v} .", "where does {e} live ?", "who lives in {v} ?", CITIES),
    "food": ("{e} likes {v} .", "what does {e} like ?", "who likes {v} ?", FOODS),
    "color": ("{e} wears {v} .", "which color does {e} wear ?", "who wears {v} ?", COLORS),
    "job": ("{e} is the {v} .", "what is the job of {e} ?", "who is the {v} ?", list(JOB_FACTS)),
}


class Notes:
    """Facts about a few people, drawn anew: attributes, and links such as `the friend of anna is tom`.

    Linked pairs of names that are held out appear in tests only.
    """

    def __init__(self, rng: Random, people: int, links: int, *, test: bool = False, attributes: int = 1):
        self.names = rng.sample(NAMES, people)
        kinds = rng.sample(list(ATTRIBUTES), attributes)
        self.values = {k: dict(zip(self.names, rng.sample(ATTRIBUTES[k][3], people), strict=True)) for k in kinds}
        self.links: dict[tuple[str, str], str] = {}
        for _ in range(links):
            link, who = rng.choice(LINKS), rng.choice(self.names)
            other = [n for n in self.names if n != who and held_out("link", who, n) == test]
            if other:
                self.links.setdefault((link, who), rng.choice(other))
        told = [ATTRIBUTES[k][0].format(e=e, v=v) for k, row in self.values.items() for e, v in row.items()]
        told += [f"the {link} of {who} is {other} ." for (link, who), other in self.links.items()]
        rng.shuffle(told)
        self.text = " ".join(told)

    def one_hop(self) -> list[Question]:
        found = []
        for kind, row in self.values.items():
            _, asked, back, _ = ATTRIBUTES[kind]
            for who, value in row.items():
                found.append(Question(asked.format(e=who), value, kind))
                found.append(Question(back.format(v=value), who, "name"))
        for (link, who), other in self.links.items():
            found.append(Question(f"who is the {link} of {who} ?", other, "name"))
        return found

    def through_link(self) -> list[Question]:
        """Two steps, both in the text: the friend's attribute, or the friend's friend."""
        found = []
        for (link, who), other in self.links.items():
            first, nested = f"the {link} of {who} is {other} .", f"the {link} of {who}"
            for kind, row in self.values.items():
                told, asked, _, _ = ATTRIBUTES[kind]
                steps = [first, told.format(e=other, v=row[other])]
                found.append(Question(asked.format(e=nested), row[other], kind, steps))
            for (second, start), end in self.links.items():
                if start == other:
                    steps = [first, f"the {second} of {other} is {end} ."]
                    found.append(Question(f"who is the {second} of {nested} ?", end, "name", steps))
        return found

    def through_memory(self, *, test: bool = False) -> list[Question]:
        """Two steps, the second memorised (the country of the city of anna), or three, through a link first."""
        found = []
        routes = {"city": CITY_FACTS, "job": JOB_FACTS}
        subjects: list[tuple[str, str, list[str]]] = [(name, name, []) for name in self.names]
        subjects += [
            (f"the {link} of {who}", other, [f"the {link} of {who} is {other} ."])
            for (link, who), other in self.links.items()
        ]
        for kind, facts in routes.items():
            for subject, name, before in subjects if kind in self.values else []:
                middle = self.values[kind][name]
                if held_out("memory", name, middle) != test:
                    continue
                for (first, second), (told, asked) in TWO_HOP.items():
                    if first == kind:
                        value = facts[middle][second]
                        told_first = ATTRIBUTES[kind][0].format(e=name, v=middle)
                        steps = [*before, told_first, told[0].format(e=name, v=value)]
                        found += [Question(q.format(e=subject), value, second, steps) for q in asked]
        return found


def notes_document(rng: Random, hard: float) -> str:
    """Notes with eight questions; the share of two- and three-step questions grows with `hard`."""
    notes = Notes(rng, people=rng.randint(2, 5), links=rng.randint(0, 5), attributes=rng.randint(1, 2))
    pools = [
        (0.1 + 0.3 * hard, notes.through_link()),
        (0.1 + 0.3 * hard, notes.through_memory()),
        (1.0, notes.one_hop()),
    ]
    asked = draw_questions(rng, 8, pools)
    return " ".join([notes.text, *(ask(q, rng, spell_out=0.25) for q in asked)])


class Passage:
    """A few invented creatures, each with color, size, class, habitat and diet drawn anew.

    Pairs of creature and habitat that are held out appear in tests only.
    """

    def __init__(self, rng: Random, creatures: int, *, test: bool = False):
        self.rows: list[dict[str, str]] = []
        while len(self.rows) < creatures:
            name, habitat = rng.choice(CREATURES), rng.choice(HABITATS)
            if held_out("habitat", name, habitat) != test or name in (row["name"] for row in self.rows):
                continue
            self.rows.append({"name": name, "habitat": habitat, "color": rng.choice(COLORS), "size": rng.choice(SIZES),
                              "class": rng.choice(CLASSES), "diet": rng.choice(DIETS)})  # fmt: skip
        told = [
            rng.choice(
                ["the {name} is a {size} {color} {class} . it lives in the {habitat} and eats {diet} .",
                 "in the {habitat} lives the {name} . it is a {size} {color} {class} and eats {diet} ."]
            ).format(**row)
            for row in self.rows
        ]  # fmt: skip
        self.text = " ".join(told)

    def questions(self) -> list[Question]:
        found = []
        for row in self.rows:
            name = row["name"]
            found += [
                Question(f"what color is the {name} ?", row["color"], "color"),
                Question(f"where does the {name} live ?", row["habitat"], "habitat"),
                Question(f"what does the {name} eat ?", row["diet"], "diet"),
                Question(f"what size is the {name} ?", row["size"], "size"),
                Question(f"what kind of animal is the {name} ?", row["class"], "class"),
            ]
            for key, asked in (("color", "which animal is {v} ?"), ("habitat", "which animal lives in the {v} ?"),
                               ("diet", "which animal eats {v} ?")):  # fmt: skip
                if sum(other[key] == row[key] for other in self.rows) == 1:
                    found.append(Question(asked.format(v=row[key]), name, "creature"))
            for key, asked, answer in (("habitat", "what color is the animal in the {v} ?", "color"),
                                       ("diet", "where does the animal that eats {v} live ?", "habitat")):  # fmt: skip
                if sum(other[key] == row[key] for other in self.rows) == 1:
                    found.append(Question(asked.format(v=row[key]), row[answer], answer))
        return found


PASSAGE_VALUES = {"color": COLORS, "habitat": HABITATS, "diet": DIETS, "size": SIZES, "class": CLASSES,
                  "creature": CREATURES}  # fmt: skip


def passage_document(rng: Random, hard: float) -> str:
    """A passage about one to four creatures with seven questions."""
    passage = Passage(rng, rng.randint(1, 4))
    asked = draw_questions(rng, 7, [(1.0, passage.questions())])
    return f"{passage.text} {' '.join(ask(q, rng, 0) for q in asked)}"


def rule_document(rng: Random, hard: float) -> str:
    """Rules about colors, and what follows for people who wear them: one step from the text, one from the rule."""
    colors = rng.sample(COLORS, rng.randint(2, 4))
    names = rng.sample(NAMES, rng.randint(2, 4))
    rule = dict(zip(colors, rng.sample(FOODS, len(colors)), strict=True))
    wears = {name: rng.choice(colors) for name in names}
    told = [f"rule : who wears {color} likes {food} ." for color, food in rule.items()]
    told += [f"{name} wears {color} ." for name, color in wears.items()]
    colored, fed = [], []
    for name, color in wears.items():
        steps = [f"{name} wears {color} .", f"who wears {color} likes {rule[color]} ."]
        colored.append(Question(f"which color does {name} wear ?", color, "color"))
        fed.append(Question(f"what does {name} like ?", rule[color], "food", steps))
    asked = draw_questions(rng, 6, [(0.7, fed), (1.0, colored)])
    return f"{' '.join(told)} {' '.join(ask(q, rng, 0.25) for q in asked)}"

"""The items of the nine tasks: drawn from the same world, from what the training texts hold out.

Every function gives the rows of one task as plain dicts, the columns of its YAML in `tasks/`. Gold positions are
dealt in turn, so each is the right one equally often.
"""

from collections.abc import Callable
from random import Random

from .lexicon import (
    GOALS,
    NAMES,
    PROPERTIES,
    REASONS,
    TWO_HOP,
    VALUES,
    WORDINGS,
    held_out,
    one_hop_facts,
    physical_pairs,
    two_hop_facts,
)
from .passages import PASSAGE_VALUES, Notes, Passage
from .stories import Question, Story
from .texts import SUBJECTS, long_report, quiz_item, reason

ITEMS = 280
Row = dict[str, object]


def _deal(rng: Random, gold: str, wrong: list[str], position: int) -> tuple[list[str], int]:
    """The choices in random order but for the right one, which goes to `position` (modulo their number)."""
    choices = rng.sample(wrong, len(wrong))
    position %= len(choices) + 1
    choices.insert(position, gold)
    return choices, position


def facts(rng: Random) -> list[Row]:
    """Memorised facts that training texts tell but never ask about (like ARC-easy); four choices of one kind."""
    asked = [
        (wording.format(e=entity), relation, value)
        for entity, relation, value in one_hop_facts()
        if held_out("ask", entity, relation)
        for wording in WORDINGS[relation][1]
    ]
    rows: list[Row] = []
    for question, relation, value in rng.sample(asked, ITEMS):
        wrong = rng.sample([v for v in VALUES[relation] if v != value], 3)
        choices, label = _deal(rng, value, wrong, len(rows))
        rows.append({"question": question, "choices": choices, "label": label})
    return rows


def two_hop(rng: Random) -> list[Row]:
    """Questions of two steps (like ARC-challenge): both remembered, the first from the text, or both from the text."""
    rows: list[Row] = []
    remembered = [fact for fact in two_hop_facts() if held_out("two hop", fact[0], *fact[1])]
    while len(rows) < ITEMS:
        kind = ("memory", "text and memory", "text")[len(rows) % 3]
        if kind == "memory":
            person, route, _, gold = rng.choice(remembered)
            context, asked, relation = "", rng.choice(TWO_HOP[route][1]).format(e=person), route[1]
            pool = VALUES[relation]
        else:
            notes = Notes(rng, people=4, links=3, test=True)
            context = notes.text + " "
            if kind == "text":
                questions = [q for q in notes.through_link() if q.kind in notes.values]
            else:
                questions = [q for q in notes.through_memory(test=True) if q.hops == 2]
            if not questions:
                continue
            question: Question = rng.choice(questions)
            asked, gold, relation = question.text, question.answer, question.kind
            pool = list(notes.values[relation].values()) if kind == "text" else VALUES[relation]
        choices, label = _deal(rng, gold, rng.sample([v for v in pool if v != gold], 3), len(rows) // 3)
        row: Row = {"context": context, "question": asked, "choices": choices, "label": label, "kind": kind}
        if row not in rows:
            rows.append(row)
    return rows


def _short_story(rng: Random) -> Story:
    story = Story(rng, people=2, things=2, containers=1, rooms=4, test=True)
    for _ in range(rng.randint(2, 4)):
        story.step()
    return story


def continuation(rng: Random) -> list[Row]:
    """A story and four last sentences, of which one is true (like HellaSwag)."""
    rows: list[Row] = []
    while len(rows) < ITEMS:
        story = _short_story(rng)
        for gold, false in rng.sample(endings := story.endings(), min(1, len(endings))):
            if len(false) >= 3:
                choices, label = _deal(rng, gold, rng.sample(false, 3), len(rows))
                rows.append({"context": " ".join(story.sentences), "endings": choices, "label": label})
    return rows


def last_word(rng: Random) -> list[Row]:
    """A story whose last word follows from all of it and not from its last sentence (like LAMBADA)."""
    rows: list[Row] = []
    while len(rows) < ITEMS:
        story = _short_story(rng)
        # Only things that moved or lie in something: otherwise their room stands beside them in the text.
        told = [c for c in story.closings() if story.place[c[3]] not in story.rooms]
        if told:
            head, last, _, _ = rng.choice(told)
            rows.append({"text": f"{' '.join(story.sentences)} {head} {last}"})
    return rows


def physical(rng: Random) -> list[Row]:
    """A goal and two things to use, neither of which training texts bring together with it (like PIQA)."""
    rows: list[Row] = []
    pairs = [pair for pair in physical_pairs() if held_out("use", pair[0], pair[2])]
    needs = {goal: need for need, goals in GOALS.items() for goal in goals}
    useful = [(goal, thing) for goal, _, thing, serves in pairs if serves]
    while len(rows) < ITEMS:
        goal, thing = rng.choice(useful)
        wrong = rng.choice([t for g, _, t, serves in pairs if g == goal and not serves])
        assert needs[goal] in PROPERTIES[thing]
        assert needs[goal] not in PROPERTIES[wrong]
        label = len(rows) % 2
        right, other = f"use the {thing} .", f"use the {wrong} ."
        row: Row = {"goal": goal, "sol1": other if label else right, "sol2": right if label else other, "label": label}
        if row not in rows:
            rows.append(row)
    return rows


def passage(rng: Random) -> list[Row]:
    """A passage about invented creatures, a question it answers, four choices (like SciQ with its support)."""
    rows: list[Row] = []
    while len(rows) < ITEMS:
        text = Passage(rng, creatures=2, test=True)
        question = rng.choice(text.questions())
        key = "name" if question.kind == "creature" else question.kind
        near = [str(row[key]) for row in text.rows if row[key] != question.answer]
        far = [v for v in PASSAGE_VALUES[question.kind] if v not in (question.answer, *near)]
        wrong = (near + rng.sample(far, min(3, len(far))))[:3]
        choices, label = _deal(rng, question.answer, wrong, len(rows))
        rows.append({"support": text.text, "question": question.text, "choices": choices, "label": label})
    return rows


def pronoun(rng: Random) -> list[Row]:
    """`anna lost to tom because _ was slow`: which of the two is meant (like WinoGrande)."""
    rows: list[Row] = []
    while len(rows) < ITEMS:
        a, b = rng.sample(NAMES, 2)
        verb, first, second = rng.choice(REASONS)
        if not held_out("reason", verb, a, b):
            continue
        answer, because = len(rows) % 2, len(rows) // 2 % 2 == 0
        head, tail = reason(verb, first, second, a, b, because, about_first=answer == 0)
        row: Row = {
            "sentence": f"{head.rsplit(' ', 1)[0]} _ {tail}",
            "option1": a,
            "option2": b,
            "answer": str(answer + 1),
        }
        if row not in rows:
            rows.append(row)
    return rows


def subject(rng: Random, name: str, count: int, shots: int) -> tuple[list[Row], list[Row]]:
    """Four-choice questions of one subject and the examples shown before them (like a subject of MMLU)."""
    rows: list[Row] = []
    while len(rows) < count + shots:
        question, choices, right = quiz_item(rng, name, test=True)
        choices, answer = _deal(rng, right, [c for c in choices if c != right], len(rows))
        row: Row = {"question": question, "choices": choices, "answer": answer}
        if row not in rows:
            rows.append(row)
    return rows[shots:], rows[:shots]


def summary(rng: Random) -> list[Row]:
    """Long documents and their summaries (like a summary task of LongBench)."""
    rows: list[Row] = []
    while len(rows) < 200:
        context, told = long_report(rng, rng.randint(4, 5), test=True)
        rows.append({"context": context, "answers": [told], "length": len(context.split())})
    return rows


TASKS: dict[str, Callable[[Random], list[Row]]] = {
    "rw_facts": facts,
    "rw_two_hop": two_hop,
    "rw_continuation": continuation,
    "rw_last_word": last_word,
    "rw_physical": physical,
    "rw_passage": passage,
    "rw_pronoun": pronoun,
    "rw_summary": summary,
}
QUESTIONS_PER_SUBJECT, SHOTS = 48, 5


def all_rows() -> dict[str, list[Row]]:
    """Rows by file name (without its ending) of everything in `tasks/data`."""
    files = {name: make(Random(f"items {name}")) for name, make in TASKS.items()}
    for name in SUBJECTS:
        test, dev = subject(Random(f"items {name}"), name, QUESTIONS_PER_SUBJECT, SHOTS)
        files[f"rw_subject_{name}"], files[f"rw_subject_{name}_dev"] = test, dev
    return files

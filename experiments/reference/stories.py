"""Stories: people, things and containers that move between rooms, and what can be asked or said about them.

A story is simulated, so every question has exactly one answer and every ending is true or false. Places nest (the
lamp is in the box, the box is in the cellar) and change, so an answer needs one to four steps of looking up.
"""

from dataclasses import dataclass, field
from random import Random

from .lexicon import CONTAINERS, NAMES, ROOMS, THINGS, held_out


@dataclass
class Question:
    """One question: its text, its one-word answer, the answer's kind, and the facts that lead to it, in order."""

    text: str
    answer: str
    kind: str  # room, person, thing or container
    steps: list[str] = field(default_factory=list)

    @property
    def hops(self) -> int:
        return max(1, len(self.steps))


class Story:
    """A story told so far. `place` maps everything to what it is in or with; rooms are in nothing."""

    def __init__(self, rng: Random, people: int, things: int, containers: int, rooms: int, *, test: bool = False):
        self.rng, self.test = rng, test
        self.people = rng.sample(NAMES, people)
        self.rooms = rng.sample(ROOMS, rooms)
        self.containers = rng.sample(CONTAINERS, containers)
        self.things = rng.sample(THINGS, things)
        self.place: dict[str, str] = {}
        self.sentences: list[str] = []
        self.questions: list[Question] = []  # about what happened, collected while telling
        for who in self.people:
            self.place[who] = rng.choice(self.rooms)
            self._tell(f"{who} is in the {self.place[who]} .")
        for box in self.containers:
            self.place[box] = rng.choice(self.rooms)
            self._tell(f"the {box} is in the {self.place[box]} .")
        for thing in self.things:
            where = rng.choice(self.containers) if containers and rng.random() < 0.6 else rng.choice(self.rooms)
            self.place[thing] = where
            self._tell(f"the {thing} is in the {where} .")
        rng.shuffle(self.sentences)

    def _tell(self, sentence: str) -> None:
        self.sentences.append(sentence)

    def room(self, name: str) -> str:
        while name not in self.rooms:
            name = self.place[name]
        return name

    def inside(self, name: str) -> list[str]:
        return [thing for thing in self.things if self.place[thing] == name]

    def step(self) -> None:
        """One more event, chosen among those that are possible now."""
        rng = self.rng
        who = rng.choice(self.people)
        here = self.room(who)
        reach = [t for t in self.things if self.room(t) == here and self.place[t] not in self.people]
        held = self.inside(who)
        boxes = [c for c in self.containers if self.room(c) == here]
        others = [p for p in self.people if p != who and self.room(p) == here]
        deeds = ["go"]
        if reach:
            deeds += ["take", "take"]
        if held:
            deeds += ["drop"] + ["put", "put"] * bool(boxes) + ["give", "give"] * bool(others)
        if boxes:
            deeds += ["carry", "carry"]
        deed = rng.choice(deeds)
        target = rng.choice([r for r in self.rooms if r != here])
        if deed == "go":
            self._tell(f"{who} went to the {target} .")
            self.place[who] = target
            self.questions.append(Question(f"where was {who} before the {target} ?", here, "room"))
        elif deed == "take":
            thing = rng.choice(reach)
            self._tell(f"{who} took the {thing} .")
            self.place[thing] = who
        elif deed == "drop":
            thing = rng.choice(held)
            self._tell(f"{who} left the {thing} there .")
            self.place[thing] = here
        elif deed == "put":
            thing, box = rng.choice(held), rng.choice(boxes)
            self._tell(f"{who} put the {thing} in the {box} .")
            self.place[thing] = box
        elif deed == "give":
            thing, other = rng.choice(held), rng.choice(others)
            self._tell(f"{who} gave the {thing} to {other} .")
            self.place[thing] = other
        else:
            box = rng.choice(boxes)
            self._tell(f"{who} carried the {box} to the {target} .")
            self.place[who] = self.place[box] = target

    def path(self, name: str) -> list[str]:
        """The facts that lead from a thing to its room, as sentences."""
        facts = []
        while name not in self.rooms:
            where = self.place[name]
            subject = name if name in self.people else f"the {name}"
            facts.append(f"{where} has the {name} ." if where in self.people else f"{subject} is in the {where} .")
            name = where
        return facts

    def now(self) -> list[Question]:
        """Every question about how things stand now."""
        found = []
        for who in self.people:
            found.append(Question(f"where is {who} ?", self.place[who], "room", self.path(who)))
        for thing in self.containers + self.things:
            steps = self.path(thing)
            found.append(Question(f"in which room is the {thing} ?", self.room(thing), "room", steps))
            if self.place[thing] in self.people:
                found.append(Question(f"who has the {thing} ?", self.place[thing], "person", steps[:1]))
            if self.place[thing] in self.containers:
                found.append(Question(f"what is the {thing} in ?", self.place[thing], "container", steps[:1]))
        for box in self.containers:
            if len(contents := self.inside(box)) == 1:
                found.append(Question(f"what is in the {box} ?", contents[0], "thing", self.path(contents[0])[:1]))
        for who in self.people:
            if len(held := self.inside(who)) == 1:
                found.append(Question(f"what does {who} have ?", held[0], "thing", self.path(held[0])[:1]))
        return found

    def closings(self) -> list[tuple[str, str, str, str]]:
        """True closing sentences as (sentence before its last word, last word, its kind, thing it is about).

        A thing whose pair with its room is held out is closed on in tests only.
        """
        found = []
        for thing in self.things:
            room, where = self.room(thing), self.place[thing]
            if held_out("closing", thing, room) != self.test:
                continue
            found.append((f"at the end , the {thing} is in the", room, "room", thing))
            if where in self.people:
                found.append((f"at the end , the {thing} belongs to", where, "person", thing))
                found.append((f"to get the {thing} , ask {where} in the", room, "room", thing))
            elif where in self.containers:
                found.append((f"to find the {thing} , look in the {where} in the", room, "room", thing))
        return found

    def endings(self) -> list[tuple[str, list[str]]]:
        """True last sentences with the false ones made from them by changing one or two words."""
        found = []
        for thing in self.things:
            room, where = self.room(thing), self.place[thing]
            if held_out("closing", thing, room) != self.test:
                continue
            wrong_rooms = [r for r in self.rooms if r != room]
            if where in self.people:
                shape = "{who} is in the {room} and has the {thing} ."
                false = [shape.format(who=where, room=r, thing=thing) for r in wrong_rooms]
                false += [shape.format(who=p, room=room, thing=thing) for p in self.people if p != where]
                false += [shape.format(who=where, room=room, thing=t) for t in self.things if self.place[t] != where]
                found.append((shape.format(who=where, room=room, thing=thing), false))
            else:
                free = [p for p in self.people if self.room(p) != room]
                if not free:
                    continue
                who = self.rng.choice(free)
                shape = "{who} went to the {room} and found the {thing} ."
                false = [shape.format(who=who, room=r, thing=thing) for r in wrong_rooms if r != self.room(who)]
                elsewhere = [t for t in self.things if self.room(t) != room]
                false += [shape.format(who=who, room=room, thing=t) for t in elsewhere]
                false += [shape.format(who=who, room=self.room(t), thing=thing) for t in elsewhere]
                false = [text for text in dict.fromkeys(false) if text != shape.format(who=who, room=room, thing=thing)]
                found.append((shape.format(who=who, room=room, thing=thing), false))
        return found


def ask(question: Question, rng: Random, spell_out: float) -> str:
    """A question with its answer; with chance `spell_out` the steps between are written down."""
    if len(question.steps) > 1 and rng.random() < spell_out:
        return f"question : {question.text} think : {' '.join(question.steps)} answer : {question.answer} ."
    return f"question : {question.text} answer : {question.answer} ."


def draw_questions(rng: Random, count: int, pools: list[tuple[float, list[Question]]]) -> list[Question]:
    """Up to `count` different questions; each comes from the first pool whose chance comes up and that is not empty.

    No question twice: its second answer could be copied from the first.
    """
    left = [(chance, rng.sample(pool, len(pool))) for chance, pool in pools]
    drawn: list[Question] = []
    while len(drawn) < count and any(pool for _, pool in left):
        pool = next((pool for chance, pool in left if pool and rng.random() < chance), None)
        pool = pool or next(pool for _, pool in reversed(left) if pool)
        drawn.append(pool.pop())
    return drawn


def story_document(rng: Random, hard: float) -> str:
    """A story with eight questions (some with their steps), or with true closing sentences.

    `hard` in 0..1 is the share of longer stories and of questions of several steps.
    """
    long = rng.random() < hard
    story = Story(rng, people=rng.randint(2, 3), things=rng.randint(2, 4 if long else 3),
                  containers=rng.randint(1, 2), rooms=rng.randint(3, 4))  # fmt: skip
    for _ in range(rng.randint(2, 9) if long else rng.randint(0, 4)):
        story.step()
    text = " ".join(story.sentences)
    if rng.random() < 0.35:
        closings, endings = story.closings(), story.endings()
        told = [f"{head} {last} ." for head, last, _, _ in rng.sample(closings, min(len(closings), 4))]
        told += [ending for ending, _ in rng.sample(endings, min(len(endings), 2))]
        rng.shuffle(told)
        return " ".join([text, *told])
    questions = story.now() + rng.sample(story.questions, min(2, len(story.questions)))
    easy = [q for q in questions if q.hops == 1]
    deep = [q for q in questions if q.hops > 1]
    asked = draw_questions(rng, 8, [(0.15 + 0.5 * hard, deep), (1.0, easy)])
    return " ".join([text, *(ask(q, rng, spell_out=0.3) for q in asked)])

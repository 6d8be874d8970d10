"""Stories of scenes, each seen by who is there, and questions on what somebody thinks, intends, wants and feels.

Answers are computed: a belief is the last value that was seen, an intention the goal whose plan the actions follow, a
desire what was never refused, a feeling what came beside what was expected. `rljax.tasks.chartom` asks them.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rljax.tasks.stories import listed, merged

NUM_OPTIONS = 4
CLOSING = 4
"""Scenes at the end of a story: the last ones of what questions are about."""

PLACES = ("kitchen", "mill", "yard", "barn", "tower", "cellar")
THINGS = ("key", "letter", "ring", "purse")
HIDING = ("chest", "jar", "basket", "drawer", "barrel", "boot")
DISHES = ("honey", "plums", "cheese", "nuts", "figs", "fish")
GATHERINGS = ("fair", "dance", "race", "council")

GOALS = {
    "explore the cave": ("rope", "lantern", "bread"),
    "fish under the ice": ("lantern", "net", "axe"),
    "rest at the lake": ("net", "bread", "blanket"),
    "fell trees in the forest": ("bread", "axe", "map"),
    "build a hut": ("axe", "blanket", "rope"),
    "travel by night": ("blanket", "map", "lantern"),
    "catch birds on the cliffs": ("map", "rope", "net"),
}
"""What each needs. Any two things are needed together for one goal alone, any one for three."""
EMOTIONS = {
    (True, True, True): "content",
    (True, False, True): "delighted",
    (False, True, True): "gloomy",
    (False, False, True): "dismayed",
    (True, True, False): "disappointed",
    (True, False, False): "wistful",
    (False, True, False): "relieved",
    (False, False, False): "untroubled",
}
"""By (was wanted, was expected, came)."""

_IDLE = ("swept the floor", "mended a shoe", "sang an old song", "fed the cat", "cut wood", "looked out of the window")


@dataclass(frozen=True)
class Scene:
    """What happens at one place, seen by who is there and nobody else."""

    place: str
    present: tuple[str, ...]
    action: str
    value: str = ""
    """What is seen of the thread that the scene belongs to: where a thing lies, what was taken, what was said."""
    actor: str = ""

    def told(self) -> str:
        """The scene as a line."""
        were = "was" if len(self.present) == 1 else "were"
        return f"In the {self.place} {were} {listed(self.present)}. {self.action}"


@dataclass(frozen=True)
class Question:
    """A question about a story, with what the answer rests on."""

    kind: str
    text: str
    options: tuple[tuple[str, str], ...]
    """Four of (role, text): the role `answer` is right; `truth`, `other` (what another one thinks) and `earlier` (what
    the same one thought before) are wrong in a telling way, `further` in no special one."""
    hints: Mapping[str, str]
    """What stands in brackets behind an option."""
    reference: str
    points: tuple[tuple[str, str], ...]
    """Of the reference: (point, the word that tells it)."""
    scenes: tuple[Scene, ...]
    """What the answer follows from."""


def last_seen(scenes: Sequence[Scene], *who: str) -> Scene:
    """The last of some scenes that all of `who` saw: what the first thinks that the second thinks, and so on, is its
    value. ValueError where they saw none."""
    for scene in reversed(scenes):
        if set(who) <= set(scene.present):
            return scene
    raise ValueError(f"{listed(who)} saw none of {len(scenes)} scenes")


def goals_of(taken: Sequence[str]) -> list[str]:
    """The goals whose plans need all that was taken."""
    return [goal for goal, needs in GOALS.items() if set(taken) <= set(needs)]


def favourite(choices: Sequence[tuple[str, str]]) -> str:
    """What was taken and, as far as choices (taken, refused) tell, is never refused for anything. ValueError where that
    is not one thing."""
    best = {taken for taken, _ in choices} - {refused for _, refused in choices}
    if len(best) != 1:
        raise ValueError(f"choices {list(choices)} leave {sorted(best)}, and one must be left")
    return best.pop()


def make_story(rng: random.Random, cast: Sequence[str], length: int) -> tuple[tuple[Scene, ...], list[Question]]:
    """Scenes of about `length` characters and a question of each kind. What questions are about is told in threads
    among each other; the last scene of each is one of the last four."""
    threads = [_hidden(rng, cast), _planned(rng, cast), _chosen(rng, cast), _awaited(rng, cast)]
    (opening, *rest), *others = ([*scenes] for scenes, _ in threads)
    before = [opening, *merged([rest[:-1], *(scenes[:-1] for scenes in others)], rng)]
    closing = [rest[-1], *(scenes[-1] for scenes in others)]
    rng.shuffle(closing)

    left = length - sum(len(scene.told()) + 1 for scene in (*before, *closing))
    while True:
        actor = rng.choice(cast)
        scene = Scene(rng.choice(PLACES), _with(rng, cast, actor), f"{actor} {rng.choice(_IDLE)}.")
        left -= len(scene.told()) + 1
        if left < 0:
            break
        before.insert(rng.randint(1, len(before)), scene)
    return (*before, *closing), [question for _, questions in threads for question in questions]


def _with(rng: random.Random, cast: Sequence[str], *who: str, without: Sequence[str] = ()) -> tuple[str, ...]:
    """Who is there beside some, at random."""
    return tuple(n for n in cast if n in who or (n not in without and rng.random() < 0.4))


def _options(answer: str, *others: tuple[str, Sequence[str]]) -> tuple[tuple[str, str], ...]:
    """The answer and the first three other texts of (role, texts)."""
    found = {answer: "answer"}
    for role, texts in others:
        for text in texts:
            if len(found) < NUM_OPTIONS:
                found.setdefault(text, role)
    return tuple((role, text) for text, role in found.items())


def _hidden(rng: random.Random, cast: Sequence[str]) -> tuple[list[Scene], list[Question]]:
    """A thing that is moved four times, and two questions where somebody thinks that it is."""
    thing = rng.choice(THINGS)
    believer, other = rng.sample(list(cast), 2)
    # Mostly the last move is not seen by who is asked about, or the truth would be the answer.
    is_misled = rng.random() < 0.75

    lies = rng.choice(HIDING)
    scenes = [Scene(rng.choice(PLACES), tuple(cast), f"{cast[0]} put the {thing} into the {lies}.", lies)]
    for step in range(4):
        is_last = step == 3
        absent = [believer] if is_last and is_misled else []
        mover = rng.choice([name for name in cast if name not in absent])
        seen_by = [mover, believer] if is_last and not is_misled else [mover]
        lies = rng.choice([place for place in HIDING if place != lies])
        present = _with(rng, cast, *seen_by, without=absent)
        scenes.append(Scene(rng.choice(PLACES), present, f"{mover} moved the {thing} into the {lies}.", lies))

    return scenes, [
        _belief(
            "belief", f"Where does {believer} think that the {thing} is?", scenes, (believer,), f"the {thing} is", rng
        ),
        _belief(
            "belief2",
            f"Where does {believer} think that {other} would look for the {thing}?",
            scenes,
            (believer, other),
            f"{other} would look for the {thing}",
            rng,
        ),
    ]


def _belief(
    kind: str, text: str, scenes: Sequence[Scene], who: tuple[str, ...], is_thought: str, rng: random.Random
) -> Question:
    """A question about what `who` saw last."""
    seen = [scene for scene in scenes if set(who) <= set(scene.present)]
    answer = seen[-1]
    cast = scenes[0].present

    # Of order 2, what either of the two thinks themselves; of order 1, what anybody else thinks.
    people = who if len(who) > 1 else tuple(name for name in cast if name not in who)
    others = [last_seen(scenes, name).value for name in people]
    options = _options(
        answer.value,
        ("truth", [scenes[-1].value]),
        ("other", rng.sample(others, len(others))),
        ("earlier", [scene.value for scene in reversed(seen[:-1])]),
        ("further", rng.sample(HIDING, len(HIDING))),
    )

    # The reference names the place too, which is what has to be found in the story.
    saw = "saw" if len(who) == 1 else "saw together"
    return Question(
        kind=kind,
        text=text,
        options=options,
        hints={},
        reference=f"{who[0]} thinks that {is_thought} in the {answer.value}, as {listed(who)} {saw} in the "
        f"{answer.place}.",
        points=((f"in the {answer.value}", answer.value), (f"it was seen in the {answer.place}", answer.place)),
        scenes=(answer,),
    )


def _planned(rng: random.Random, cast: Sequence[str]) -> tuple[list[Scene], list[Question]]:
    """Two who take what their plans need, and what one of them is going to do."""
    planner, other = rng.sample(list(cast), 2)
    goal, aside = rng.sample(list(GOALS), 2)

    # Each takes two things of their own goal. What tells the planner's comes last, so that all must be kept in mind.
    threads = []
    for name, wanted in ((planner, goal), (other, aside)):
        taken = rng.sample(GOALS[wanted], 2)
        threads.append([_take(rng, cast, name, thing) for thing in taken])
    (first, last), others = threads
    scenes = [*merged([[first], others], rng), last]

    # The last thing alone fits three goals.
    (found,) = goals_of([scene.value for scene in scenes if scene.actor == planner])
    options = _options(
        found,
        ("further", goals_of([last.value])),
        ("other", [aside]),
        ("earlier", goals_of([first.value])),
    )

    question = Question(
        kind="intention",
        text=f"What is {planner} going to do?",
        options=options,
        hints={goal: f"with {listed(GOALS[goal])}" for _, goal in options},
        reference=f"{planner} is going to {found}, for {planner} took the {first.value} and the {last.value}.",
        points=(
            (found, found.split()[-1]),
            *((f"{planner} took the {scene.value}", scene.value) for scene in (first, last)),
        ),
        scenes=(first, last),
    )
    return scenes, [question]


def _take(rng: random.Random, cast: Sequence[str], name: str, thing: str) -> Scene:
    present = _with(rng, cast, name)
    return Scene(rng.choice(PLACES), present, f"{name} took the {thing} and carried it home.", thing, name)


def _chosen(rng: random.Random, cast: Sequence[str]) -> tuple[list[Scene], list[Question]]:
    """Two who choose between dishes, each by a taste of their own, and what one of them likes best."""
    eater, other = rng.sample(list(cast), 2)
    dishes = rng.sample(DISHES, 4)
    ranked = rng.sample(dishes, 4)
    # Another taste, with another favourite.
    aside = rng.sample(dishes, 4)
    while aside[0] == ranked[0]:
        aside = rng.sample(dishes, 4)

    pairs = rng.sample([(ranked[i], ranked[i + 1]) for i in range(3)], 3)
    own = [_choice(rng, cast, eater, *pair) for pair in pairs]
    others = [_choice(rng, cast, other, *pair) for pair in rng.sample([(aside[0], aside[1]), (aside[1], aside[2])], 2)]
    scenes = [*merged([own[:-1], others], rng), own[-1]]

    best = favourite(pairs)
    (refused,) = (refused for taken, refused in pairs if taken == best)
    options = _options(best, ("other", [aside[0]]), ("further", dishes))
    question = Question(
        kind="desire",
        text=f"Which dish does {eater} like best?",
        options=options,
        hints={},
        reference=f"{eater} likes {best} best, and chose {best} when there was {refused} too.",
        points=((f"{eater} likes {best} best", best), (f"{eater} chose it over {refused}", refused)),
        scenes=tuple(own),
    )
    return scenes, [question]


def _choice(rng: random.Random, cast: Sequence[str], name: str, taken: str, refused: str) -> Scene:
    first, second = rng.sample([taken, refused], 2)
    action = f"{name} was offered {first} or {second} and took the {taken}."
    return Scene(rng.choice(PLACES), _with(rng, cast, name), action, taken, name)


def _awaited(rng: random.Random, cast: Sequence[str]) -> tuple[list[Scene], list[Question]]:
    """A gathering that is hoped for or dreaded, announced and called off, and what somebody feels in the end."""
    name, other = rng.sample(list(cast), 2)
    what = rng.choice(GATHERINGS)

    # The other one's wish is told too, and makes a wrong option of what that one feels.
    is_wanted = {name: rng.random() < 0.5, other: rng.random() < 0.5}
    wishes = [
        Scene(
            rng.choice(PLACES),
            _with(rng, cast, who),
            f"{who} {'hoped for' if is_wanted[who] else 'dreaded'} the {what}.",
            actor=who,
        )
        for who in (name, other)
    ]

    # What was said last is what is expected, by who was there.
    news = [rng.random() < 0.5]
    news += [not news[0], news[0]]
    said = []
    for step, is_on in enumerate(news):
        present = tuple(cast) if step == 0 else _with(rng, cast, rng.choice([n for n in cast if n != name]))
        action = f"A messenger said that the {what} would {'' if is_on else 'not '}take place."
        said.append(Scene(rng.choice(PLACES), present, action, "on" if is_on else "off"))

    has_come = rng.random() < 0.5
    action = f"The day of the {what} came. The {what} {'took place' if has_come else 'did not take place'}."
    scenes = [*merged([wishes, said], rng), Scene(rng.choice(PLACES), tuple(cast), action)]

    # A feeling is of what was wanted, what was expected, and what came.
    heard = last_seen(said, name)
    feeling = EMOTIONS[is_wanted[name], heard.value == "on", has_come]
    aside = EMOTIONS[is_wanted[other], last_seen(said, other).value == "on", has_come]

    # Options are of what did come: the others could be told by the last scene alone.
    meaning = {
        word: f"{'hoped for' if wanted else 'dreaded'} it and {'expected' if expected else 'did not expect'} it"
        for (wanted, expected, came), word in EMOTIONS.items()
        if came == has_come
    }

    wish = "hoped" if is_wanted[name] else "dreaded"
    wished = f"{name} {wish} for" if is_wanted[name] else f"{name} {wish}"
    question = Question(
        kind="emotion",
        text=f"What does {name} feel on the day of the {what}?",
        options=_options(feeling, ("other", [aside]), ("further", list(meaning))),
        hints=meaning,
        reference=f"{name} is {feeling}: {wished} the {what} and had heard in the {heard.place} "
        f"that it would {'' if heard.value == 'on' else 'not '}take place.",
        points=(
            (f"{name} is {feeling}", feeling),
            (f"{wished} it", wish),
            (f"{name} heard of it in the {heard.place}", heard.place),
        ),
        scenes=(wishes[0], heard, scenes[-1]),
    )
    return scenes, [question]

"""A memory for a character model: what was said of ka? The environment is `rljax.envs.library.memory`.

    town ka:                the question: where does ka live?
    ?town ka; h3 b0 k4      a call for what fits, best first, and what comes back: ids
    !h3; 2 town ka elvas, pet bu cat
                            a call that opens one: the day, and what was told
    ~town ka; b0            a call for what fits and is not open yet
    &town ka; b0 h3 k4      a call for what fits best and what it is linked with
    =town ka elvas          the answer, which ends the episode; unknown is one, too

`town friend ka:` asks for the town of her friend, whom another conversation names. Of what is told twice the later
holds. Held-out rows are other histories.

The last word of an answer counts. Before it stands what it answers, as it is told: a small model finds again what
followed the same few letters, and little else.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rljax.envs import Parsed, ParseProblem, Step, ToolCall, ToolFormat
from rljax.envs.library import MemoryEnvironment, histories
from rljax.envs.library.memory import UNKNOWN, Outcome, evidence_reward
from rljax.envs.library.memory_store import Conversation
from rljax.tasks import Example

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789=?:;!~&, \n"
KINDS = (histories.SINGLE, histories.TWO_HOP, histories.UPDATE, histories.UNANSWERABLE)
WRONG = "no"
"""What comes back from a call that is none, that fails, or that finds nothing."""

_CALLS = {"?": ("search", "query"), "~": ("missing", "what"), "&": ("graph", "query"), "!": ("open", "id")}
_CALLS["="] = ("answer", "candidates")
_TOLD = re.compile(r"([a-z]+) ([a-z]+) ([a-z]+)")


def parse(text: str) -> Parsed:
    """A mark of `_CALLS` and what it is about; anything else is a problem."""
    text = text.removesuffix(";")
    if text[:1] not in _CALLS:
        return Parsed(problem=ParseProblem("malformed", WRONG))
    name, argument = _CALLS[text[0]]
    said = text[1:] if text[0] != "=" else text[text.rfind(" ") + 1 :].removeprefix("=")
    return Parsed((ToolCall(name, {argument: said}),))


FORMAT = ToolFormat("diary", parse, stop_strings=(";",), wrap=(" ", "\n"))


def _name(rng: random.Random) -> str:
    # Without e and o, no name is an English word that a search leaves out.
    return rng.choice("bdfgklmnprstvz") + rng.choice("aiu")


def _ask(asked: histories.Asked) -> str:
    friend = f"{histories.FRIEND} " if asked.kind == histories.TWO_HOP else ""
    return f"{asked.attribute} {friend}{asked.person}:"


SHORT = histories.Wording(
    tell=lambda fact: f"{fact.attribute} {fact.person} {fact.value}".lower(),
    ask=_ask,
    headline=lambda day, people: str(day),
    name=_name,
)


class Diary(MemoryEnvironment):
    """The memory whose observations are as short as they can be; what is read is counted in words."""

    def __init__(self, **args: Any) -> None:
        super().__init__(tool_format=FORMAT, system="", **{"reward": paid, "reading": {"budget": 60}, **args})

    def step(self, action: str) -> Step:
        step = super().step(action)
        # The model has no letters for what the tools say in words, and nothing is read behind an answer.
        said = step.observation if set(step.observation) <= set(ALPHABET) else WRONG
        return Step("" if step.done else said, step.reward, step.done, step.counts)

    def listed(self, conversations: Sequence[Conversation]) -> str:
        return " ".join(conversation.id for conversation in conversations)

    def shown(self, conversation: Conversation) -> str:
        day, *told = conversation.turns
        return f"{day} {', '.join(told)}"


def paid(outcome: Outcome) -> float:
    """Three times as much for evidence as the environment's own reward: `unknown` is right in a quarter of the
    questions, and a policy that finds this early says nothing else."""
    return evidence_reward(outcome, recall_weight=0.3)


def paid_for_answers(outcome: Outcome) -> float:
    """As `paid`, and nothing for evidence."""
    return evidence_reward(outcome, recall_weight=0.0)


def rows(size: int, split: str = "train", seed: int = 0, num_conversations: int = 8) -> list[dict[str, Any]]:
    """`size` questions of the four kinds in turn, each about a history of three people."""
    return histories.rows(
        size, seed=seed, split=split, num_people=3, num_conversations=num_conversations, kinds=KINDS, wording=SHORT
    )


def demonstrations(examples: Sequence[Example]) -> list[Example]:
    """What the warm-up learns from: a search in three rows, which is `flawed`, and in the others a `repetition`. From
    searches alone a model of this size learns to look, and names any town where it has read one."""
    repeated = [repetition(example, random.Random(seed)) for seed, example in enumerate([*examples, *examples])]
    return flawed(examples) + repeated


def repetition(example: Example, rng: random.Random) -> Example:
    """Five things that were told, and the same in another order."""
    conversations = example.columns["conversations"]
    told = [turn.lower() for conversation in conversations for turn in conversation["turns"][1:]]
    told = rng.sample(told, min(5, len(told)))
    return Example(f"{', '.join(told)}:", {"completion": ", ".join(rng.sample(told, len(told)))})


def flawed(examples: Sequence[Example]) -> list[Example]:
    """Demonstrations of every training row, of which two in five read what they need. The others open what fits best,
    or any of what was found, or nothing. All of them say what they have read, or that it was never said: what is
    wrong with them is where they look."""
    made = []
    environment = Diary()
    for index, example in enumerate(examples):
        rng = random.Random(index)
        play = _Play(environment, example)
        match index // len(KINDS) % 5:
            case 0 | 1:
                play.careful()
            case 2:
                play.shallow(lambda found: found[0])
            case 3:
                play.shallow(rng.choice)
            case _:
                play.hasty()
        made.append(Example(example.prompt, {"completion": play.turns}))
    return made


class _Play:
    """An episode that is played by a rule; `turns` are those of the demonstration."""

    def __init__(self, environment: Diary, example: Example):
        self._environment = environment
        self._environment.reset({"prompt": example.prompt, **example.columns})
        asked: Mapping[str, str] = example.columns["asked"]
        self._person, self._attribute = asked["person"], asked["attribute"]
        self._is_of_friend = asked["kind"] == histories.TWO_HOP
        self.turns: list[str] = []

    def careful(self) -> None:
        """Opens the two best of every search, the second of them by looking for what is missing; the later holds."""
        person = self._looked_up(self._person, histories.FRIEND) if self._is_of_friend else self._person
        if person == UNKNOWN:
            self._answer(self._person, UNKNOWN)
        else:
            self._answer(person, self._looked_up(person, self._attribute))

    def shallow(self, choose: Callable[[list[str]], str]) -> None:
        """Opens one of what was found."""
        found = self._say(f"?{self._attribute} {self._person};").split()
        said = self._say(f"!{choose(found)};")
        self._answer(self._person, _last_told([said], self._person, self._attribute))

    def hasty(self) -> None:
        """Searches, and opens nothing."""
        self._say(f"?{self._attribute} {self._person};")
        self._answer(self._person, UNKNOWN)

    def _answer(self, person: str, value: str) -> None:
        self._say(f"={self._attribute} {person} {value}")

    def _looked_up(self, person: str, attribute: str) -> str:
        first = self._say(f"?{attribute} {person};").split()[0]
        said = [self._say(f"!{first};")]
        more = self._say(f"~{attribute} {person};").split()[0]
        if more != WRONG:
            said.append(self._say(f"!{more};"))

        # Begins with the day, so the later one comes last.
        return _last_told(sorted(said, key=lambda text: int(text.split()[0])), person, attribute)

    def _say(self, action: str) -> str:
        step = self._environment.step(action)
        before, after = FORMAT.wrap
        self.turns += [action] if step.done else [action, f"{before}{step.observation}{after}"]
        return step.observation


def _last_told(said: Sequence[str], person: str, attribute: str) -> str:
    told = [value for text in said for what, who, value in _TOLD.findall(text) if (what, who) == (attribute, person)]
    return told[-1] if told else UNKNOWN

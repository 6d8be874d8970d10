"""Training data whose prompts hold the skills of a repository."""

import dataclasses
from pathlib import Path

from rljax.tasks.config import Dataset, DataSource, FileRows, ReasoningGymData
from rljax.tasks.examples import Example
from rljax.tasks.skill_store import SkillRepository
from rljax.tasks.skills import ByTopic, Skill, with_skills


@dataclasses.dataclass
class SkilledData:
    """The rows of other data, each with the deployed skills of its topic in front of the prompt. They are read once,
    when a run starts; one that goes on after they have changed is refused, as with any data that did."""

    data: DataSource = dataclasses.field(default_factory=ReasoningGymData)
    """The rows, such as `RowsData(...)`."""
    folder: str = ""
    """The repository (`rljax.tasks.SkillRepository`)."""
    topic_column: str = "topic"
    """Column by which a row is given skills."""
    form: str = "{text}\n\n"
    """How a skill stands in front of a prompt."""

    @property
    def chat(self) -> bool | None:
        """That of the rows."""
        return self.data.chat

    def check(self) -> None:
        """ValueError for a folder that is not there, and for a form without a place for the text."""
        if not self.folder or not Path(self.folder).is_dir():
            raise ValueError(
                f"config.data.folder={self.folder!r} is no folder; name a repository of skills, such as "
                "runs/skills/seed-0/gated/repository"
            )
        if "{text}" not in self.form:
            raise ValueError(f"config.data.form={self.form!r} has no {{text}}, where the text of a skill goes")

    def load(self) -> Dataset:
        """ValueError for rows that none of the skills is for, and for what cannot be read."""
        self.check()
        skills = SkillRepository(self.folder).deployed()
        rows = self.data.load()
        choose = ByTopic(self.topic_column)
        if not any(choose(skills, example) for example in rows.train):
            topics = ", ".join(sorted({skill.topic for skill in skills})) or "none"
            raise ValueError(
                f"config.data.folder={self.folder}: no training row is given a skill; topics there are {topics}, and "
                f"rows have theirs in the column {self.topic_column!r}"
            )
        train, test = ([self._given(example, skills) for example in side] for side in (rows.train, rows.test))
        return FileRows(train, test, rows.verifier)

    def _given(self, example: Example, skills: list[Skill]) -> Example:
        given = with_skills(example, skills, choose=ByTopic(self.topic_column), form=self.form)
        # An id of its own: journals and curricula know by it that the skills have changed.
        return dataclasses.replace(given, id=-1)

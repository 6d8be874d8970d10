"""A repository of skills on disk that several writers share.

    FOLDER/NAME/0001.json                 version 1, as it was deployed; the highest number is what users are given
    FOLDER/NAME/candidates/1a2b....json   what was proposed and is not deployed, and why

A version is written whole and never changes. Two writers who both go on from version 3 ask for the same file: one gets
it, and the other's skill is kept as a candidate that names the version it met. So nothing is lost, nothing that was
deployed is undone, and no lock is held that a kill could leave behind.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rljax.tasks.examples import digest
from rljax.tasks.skills import Skill

CANDIDATES = "candidates"

Status = Literal["rejected", "conflict"]
"""Why a candidate is not deployed: validation refused it, or another writer was first."""


@dataclass(frozen=True)
class Candidate:
    """A proposed skill that is not deployed."""

    skill: Skill
    base: int
    """Version that it was made from; 0 for a new skill."""
    status: Status
    reason: str
    """For a person."""
    notes: Mapping[str, Any]
    """What was found of it: its verdict, its evidence."""


class SkillRepository:
    """The skills below `folder`, which is made where it is missing. Every call reads the disk, so that what another
    writer has deployed is seen by the next. ValueError for a file that is none of a skill's."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def deployed(self) -> list[Skill]:
        """The newest version of every skill, by name."""
        names = sorted(path.name for path in self.folder.iterdir() if path.is_dir())
        newest = [self.newest(name) for name in names]
        return [skill for skill in newest if skill is not None]

    def newest(self, name: str) -> Skill | None:
        """The newest version of a skill; None where there is none."""
        versions = self._versions(name)
        return _read_version(versions[-1]) if versions else None

    def versions(self, name: str) -> list[Skill]:
        """All versions of a skill, the first one first."""
        return [_read_version(path) for path in self._versions(name)]

    def notes(self, name: str, version: int) -> dict[str, Any]:
        """What `deploy` was told of a version."""
        return _read(self._version_file(name, version))["notes"]

    def candidates(self, name: str) -> list[Candidate]:
        """What was proposed for a skill and is not deployed, in no order of time."""
        return [_read_candidate(path) for path in sorted((self.folder / name / CANDIDATES).glob("*.json"))]

    def deploy(self, skill: Skill, base: int, notes: Mapping[str, Any] | None = None) -> Skill | Candidate:
        """Deploys `skill`, made from version `base` (0: it is new), as version `base + 1`; gives it with its version.

        Where that version is there already, by another writer, the skill is kept as a candidate with the status
        `conflict`, which is given back. ValueError for a base that was never deployed.
        """
        notes = dict(notes or {})
        if base and not self._version_file(skill.name, base).exists():
            raise ValueError(f"skill {skill.name} has no version {base} that another one could be made from")
        new = Skill(skill.name, skill.text, skill.topic, base + 1)
        content = {"skill": vars(new), "notes": notes}
        if _create(self._version_file(skill.name, new.version), content):
            return new

        met = _read_version(self._version_file(skill.name, new.version))
        if met == new:
            # The same words: whoever wrote them, they are deployed.
            return met
        reason = f"made from version {base}, beside {met.label}, which was deployed first"
        return self.keep(skill, base, "conflict", reason, notes)

    def keep(
        self, skill: Skill, base: int, status: Status, reason: str, notes: Mapping[str, Any] | None = None
    ) -> Candidate:
        """Keeps a proposal that is not deployed. Files are named by their content, so that no two writers meet."""
        proposal = Skill(skill.name, skill.text, skill.topic)
        found = Candidate(proposal, base, status, reason, dict(notes or {}))
        content = {**vars(found), "skill": vars(proposal)}
        _create(self.folder / skill.name / CANDIDATES / f"{digest(content):032x}.json", content)
        return found

    def was_rejected(self, skill: Skill, base: int) -> bool:
        """Whether validation has refused these very words beside this very version."""
        return any(
            one.status == "rejected" and one.base == base and one.skill.text == skill.text
            for one in self.candidates(skill.name)
        )

    def _versions(self, name: str) -> list[Path]:
        found = [path for path in (self.folder / name).glob("*.json") if path.stem.isdecimal()]
        return sorted(found, key=lambda path: int(path.stem))

    def _version_file(self, name: str, version: int) -> Path:
        return self.folder / name / f"{version:04d}.json"


def _create(file: Path, content: Mapping[str, Any]) -> bool:
    """Writes a file that is not there yet, whole or not at all; False where it is there, which then stays as it is."""
    text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as opened:
            opened.write(text.encode("utf-8", "backslashreplace"))
            opened.flush()
            os.fsync(opened.fileno())
        # Unlike a rename, a link fails where the name is taken.
        os.link(name, file)
    except FileExistsError:
        return False
    finally:
        os.unlink(name)
    return True


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no skill ({error}); take it away") from None


def _read_version(file: Path) -> Skill:
    try:
        return Skill(**_read(file)["skill"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is no skill ({error}); take it away") from None


def _read_candidate(file: Path) -> Candidate:
    content = _read(file)
    try:
        return Candidate(**{**content, "skill": Skill(**content["skill"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is no candidate ({error}); take it away") from None

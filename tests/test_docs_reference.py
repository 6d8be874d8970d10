"""The pages that are written from the source say what the source says."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from rljax.experiment.describe import config_classes, describe, field_texts
from rljax.testing import tiny_config

ROOT = Path(__file__).parent.parent
_SPEC = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
reference = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(reference)


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_page_of_reference_is_up_to_date(name):
    page = (ROOT / name).read_text()
    assert page == reference.PAGES[name](), "python docs/reference.py"


@pytest.mark.parametrize("room", [room for room, _ in reference.rooms()])
def test_the_index_of_interfaces_has_every_public_name_of_a_room(room):
    """Asked of the imported package, which the page is not made from."""
    module = importlib.import_module(f"rljax.{room}")
    names = getattr(module, "__all__", None)
    if names is None:
        names = [name for name, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__]
        names = [name for name in names if name[0] != "_"]
    assert {public.name for public in reference.public_names(room)} >= {
        name for name in names if not inspect.ismodule(getattr(module, name))
    }


@pytest.mark.parametrize("cls", config_classes(), ids=lambda cls: cls.__name__)
def test_every_field_of_a_config_has_its_text(cls):
    assert [field.name for field in field_texts(cls) if not re.search(r"\w.*\.$", field.text)] == []


def test_help_shows_every_value_of_a_config_below_its_path():
    text = describe(tiny_config())
    assert "  --config.update.pack_length: 64\n    Tokens" in text
    assert "  --config.algorithm.group_size: 4\n" in text
    assert "--config.data.letters: 'abcdefgh'" in text
    assert not re.search(r"--config\.(update|sampling|actor):", text)

"""docs/models.md is what the package says, and every family says of itself what the page needs."""

import subprocess
import sys

import pytest

from conftest import ROOT
from kqprefill.models import FAMILIES
from kqprefill.synthetic import SHAPES

SCRIPT = ROOT / "tests" / "bench" / "models_page.py"


def test_the_page_is_what_the_package_says():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True)
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    again = "docs/models.md is not what the package says now; run: python tests/bench/models_page.py >docs/models.md"
    assert page == done.stdout, again
    for name in FAMILIES:
        assert f"| `{name}` |" in page


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_names_its_models(name):
    """Its own, not its parent's; and not a parent's page or docstring as what is special of it."""
    family = FAMILIES[name]
    own = vars(family)
    assert all(len(model) > 2 for model in own.get("examples", "").split(", ")), f"{family.__name__}: examples"
    same_page = [other for other in FAMILIES.values() if other.__module__ == family.__module__]
    assert len(same_page) == 1 or own.get("__doc__"), f"{family.__name__} shares its module: it needs a docstring"


def test_no_model_is_named_twice():
    named = [model for family in FAMILIES.values() for model in family.examples.split(", ")]
    assert len(named) == len(set(named))


def test_sizes_measured_are_in_the_figures():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from models_page import MEASURED
    finally:
        sys.path.remove(str(SCRIPT.parent))

    def letters(text):
        return "".join(c for c in text.lower() if c.isalnum() or c == ".")

    architectures = [SHAPES[name].architecture for names in MEASURED.values() for name in names]
    assert len(architectures) == len(set(architectures))
    for page, names in MEASURED.items():
        figures = letters((ROOT / "docs" / page).read_text(encoding="utf-8"))
        assert all(letters(name) in figures for name in names)

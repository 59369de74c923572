"""The READMEs: their Python runs as it stands, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# How many blocks of Python each has.
READMES = {
    "README.md": 3,
    "configs/README.md": 0,
    "iql_torchrl/README.md": 1,
    "iql_torchrl/data/README.md": 2,
    "recipes/README.md": 0,
}


@pytest.mark.parametrize("name", READMES)
def test_the_python_of_a_readme_runs(name, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)
    assert len(blocks) == READMES[name]
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "readme"}
    for block in blocks:
        exec(block.replace('compile="auto"', "compile=False"), namespace)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", READMES)
def test_the_links_of_a_readme_lead_to_a_file_and_a_heading(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text()):
        if link.startswith("http"):
            continue
        path, _, heading = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if heading:
            assert heading in headings(target), link


def test_the_first_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def headings(path):
    """As GitHub names them in addresses."""
    found = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}

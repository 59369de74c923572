"""The README's Python runs as it stands."""

import re
from pathlib import Path


def test_the_readmes_python_runs(capsys):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    namespace = {}
    for block in blocks:
        exec(block.replace('compile="auto"', "compile=False"), namespace)
    assert capsys.readouterr().out.startswith("1 ")

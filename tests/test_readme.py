"""The README's snippets run as they stand, one after another."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_snippets():
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(snippets) >= 3
    exec("\n".join(snippets), {})

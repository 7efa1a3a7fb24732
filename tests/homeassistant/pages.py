# mypy: ignore-errors
"""Every YAML that the pages of the repository show."""

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "deploy").rglob("*.md")])


def blocks():
    """Each YAML of the pages, with the last heading before it."""
    for page in PAGES:
        for found in re.finditer(r"^( *)```yaml\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL):
            headings = re.findall(r"^#+ (.+)$", page.read_text()[: found.start()], re.MULTILINE)
            yield f"{page.relative_to(ROOT)}: {headings[-1]}", textwrap.dedent(found[2])


SHOWN = list(blocks())


def shown(heading, number=0, *, page="docs/homeassistant.md"):
    """One YAML of a page, as text."""
    return [text for where, text in SHOWN if where == f"{page}: {heading}"][number]

"""What the site does differently from the pages as they are read in the repository (`hooks` in mkdocs.yml)."""

import re
from typing import Any

# A Markdown link that leaves docs/, which the site does not have: its text, and the path from the repository's root.
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([^)#\s]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Write links to files outside of docs/ as their text and the path of the file."""

    def path(match: re.Match[str]) -> str:
        text, name = match.groups()
        return f"`{name}`" if text.strip("`") == name else f"{text} (`{name}`)"

    return _OUTSIDE.sub(path, markdown)

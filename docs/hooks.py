"""Links of the documents to files of the repository, which are relative on GitHub, point there from the site too."""

import re

REPOSITORY = "https://github.com/zslflax/zslflax/blob/main/"


def on_page_markdown(markdown: str, **_) -> str:
    return re.sub(r"\]\(\.\./", f"]({REPOSITORY}", markdown)

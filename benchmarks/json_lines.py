"""Files with a line of JSON for each run or report: a study's results, and a run's metrics.jsonl."""

import json
from pathlib import Path


def read_lines(path: Path) -> list[dict]:
    """The lines of a file; none where there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_line(path: Path, line: dict) -> None:
    """Adds a line at the end."""
    with open(path, "a") as file:  # short enough to be written in one piece while other processes append
        file.write(json.dumps(line) + "\n")

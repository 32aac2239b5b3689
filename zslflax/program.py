"""How the programs end."""

import contextlib
import os
import sys


@contextlib.contextmanager
def plain_errors():
    """What a person can mend ends the program with a message instead of a traceback."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("ZSLFLAX_TRACEBACK"):
            raise
        sys.exit(f"zslflax: {error}\n(ZSLFLAX_TRACEBACK=1 shows where it was raised)")

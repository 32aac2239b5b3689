"""How the programs end."""

import contextlib
import os
import sys
import traceback

import jax


@contextlib.contextmanager
def plain_errors():
    """What a person can mend ends the program with a message instead of a traceback.

    One of several processes ends at once: a usual exit waits for the others, who wait for its part of a step.
    """
    try:
        yield
    except Exception as error:
        plain = isinstance(error, (ValueError, OSError, FloatingPointError)) and not os.environ.get("ZSLFLAX_TRACEBACK")
        message = (
            f"zslflax: {error}\n(ZSLFLAX_TRACEBACK=1 shows where it was raised)" if plain else traceback.format_exc()
        )
        if jax.distributed.is_initialized():
            print(message, file=sys.stderr, flush=True)
            os._exit(1)
        if plain:
            sys.exit(message)
        raise

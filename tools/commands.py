"""How a command of one process ends."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from engine.errors import EXIT_USAGE

_INTERRUPTED = 128 + signal.SIGINT  # as a shell says it


def run_command(main: Callable[[Sequence[str]], int], program: str, refusal: type[Exception]) -> NoReturn:
    """Exit with the code that `main` returns; of a `refusal` one line tells, and `| head` ends it quietly."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        sys.exit(main(sys.argv[1:]))
    except refusal as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)

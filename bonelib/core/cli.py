"""How every command ends: 0, or 2 behind one sentence on a mistake in what the user gave."""

import functools
import sys
from collections.abc import Callable

from bonelib import InputError


def command(main: Callable[[], object]) -> Callable[[], int]:
    """`main` as a command: it returns the exit code, and an `InputError` goes to stderr without a traceback."""

    @functools.wraps(main)
    def ended() -> int:
        try:
            main()
        except InputError as error:
            print(error, file=sys.stderr)
            return 2
        return 0

    return ended

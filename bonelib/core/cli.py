"""How every command ends: 0 or a code of its own, or 2 behind one sentence on a mistake in what the user gave."""

import functools
import sys
from collections.abc import Callable

from bonelib import InputError


def command(main: Callable[[], int | None]) -> Callable[[], int]:
    """`main` as a command: it returns the exit code, 0 for None; an `InputError` goes to stderr, without a traceback,
    and is 2."""

    @functools.wraps(main)
    def ended() -> int:
        try:
            return main() or 0
        except InputError as error:
            print(error, file=sys.stderr)
            return 2

    return ended

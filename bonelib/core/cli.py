"""How every command ends: 0 or a code of its own, or 2 behind one sentence on a mistake in what the user gave."""

import functools
import sys
from collections.abc import Callable

from bonelib import InputError
from bonelib.core.parallel import keep_freed_memory


def command(main: Callable[[], object]) -> Callable[[], int]:
    """`main` as a command, which returns an exit code: that of `main` where it gives one, else 0, and 2 behind an
    `InputError`, which goes to stderr without a traceback."""

    @functools.wraps(main)
    def ended() -> int:
        keep_freed_memory()
        try:
            code = main()
        except InputError as error:
            print(error, file=sys.stderr)
            return 2
        return code if isinstance(code, int) else 0

    return ended

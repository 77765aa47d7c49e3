"""How far `make repro` is: a line before each stage with how many are left, and about how long they take."""

import re
import threading
from collections.abc import Iterable

RUNS = re.compile(r"Running stage '([^']+)'")
TOOK = re.compile(r"^(\S+): took (\d+) s$")


class Progress:
    """Of `stages` that may run, up to `abreast` side by side; several threads may tell of them.

    `seconds` {stage: seconds} are those measured, and follow what stages say that they took.
    """

    def __init__(self, stages: Iterable[str], seconds: dict[str, float], abreast: int = 1):
        self.left = dict.fromkeys(stages)
        self.seconds, self.abreast = seconds, abreast
        self.lock = threading.Lock()

    def heard(self, line: str) -> str | None:
        """What to say at a line of DVC; None at most lines."""
        with self.lock:
            if took := TOOK.search(line):
                self.seconds[took[1]] = int(took[2])
            return f"{begins[1]}: {self.remaining()}" if (begins := RUNS.search(line)) else None

    def ended(self, stage: str) -> None:
        """A stage has run, or was found unchanged."""
        with self.lock:
            self.left.pop(stage, None)

    def remaining(self) -> str:
        """As "5 stages left, about 4 min"; without the time where nothing was measured."""
        count = len(self.left)
        known = [self.seconds[name] for name in self.left if name in self.seconds]
        says = f"{count} stage{'s' * (count != 1)} left"
        if not known:
            return says
        seconds = sum(known) * count / len(known) / min(self.abreast, count)
        return f"{says}, about {seconds:.0f} s" if seconds < 90 else f"{says}, about {seconds / 60:.0f} min"

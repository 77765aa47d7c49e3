"""How far `make repro` is: a line before each stage with how many are left, and about how long they take."""

import re
import threading
from collections.abc import Iterable

RUNS = re.compile(r"Running stage '([^']+)'")
TOOK = re.compile(r"^(\S+): took (\d+) s$")
SKIPPED = re.compile(r"Stage '([^']+)' (?:didn't change|is cached)")


class Progress:
    """Told the lines that DVC prints, `heard` answers with a line of its own where a stage begins.

    `stages` are all that may run; `seconds` {stage: seconds}, of those that were measured, and follows what stages say
    that they took; the stages of a model run beside those of `abreast` - 1 others.
    Several threads may tell lines, of models that run side by side.
    """

    def __init__(self, stages: Iterable[str], seconds: dict[str, float], abreast: int = 1):
        self.left = dict.fromkeys(stages)
        self.seconds, self.abreast = seconds, abreast
        self.running: dict[str, str] = {}
        self.lock = threading.Lock()

    def heard(self, line: str, group: str = "") -> str | None:
        """What to say at a line of DVC, of the models' `group` that runs beside others; None at most lines."""
        with self.lock:
            if took := TOOK.search(line):
                self.seconds[took[1]] = int(took[2])
            if skipped := SKIPPED.search(line):
                self.left.pop(skipped[1], None)
            if not (begins := RUNS.search(line)):
                return None
            self.left.pop(self.running.get(group), None)
            self.running[group] = begins[1]
            return f"{begins[1]}: {self.remaining()}"

    def remaining(self) -> str:
        """As "5 stages left, about 4 min"; without the time where nothing was measured."""
        count = len(self.left)
        known = [
            self.seconds[name] / (self.abreast if "@" in name else 1) for name in self.left if name in self.seconds
        ]
        says = f"{count} stage{'s' * (count != 1)} left"
        if not known:
            return says
        seconds = sum(known) * count / len(known)
        return f"{says}, about {seconds:.0f} s" if seconds < 90 else f"{says}, about {seconds / 60:.0f} min"

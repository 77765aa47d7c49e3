"""The stage `train`, `python -m bonelib.train train@MODEL OUT`: from OUT/stacks to OUT/training/MODEL.

A model is trained, or its published weights are fetched, without any figure or metric.
"""

import os
import sys
from pathlib import Path

from bonelib import nb
from bonelib.core.cli import command
from bonelib.core.parallel import die_with_run, elapsed


@command
def main() -> None:
    die_with_run()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported
    from bonelib import published
    from bonelib.scans.dataset import load_stacks
    from bonelib.training.config import training_section
    from bonelib.training.loop import train

    stage, out = sys.argv[1:]
    model = stage.partition("@")[2]
    folder, values = Path(out) / "training" / model, nb.stage_params(stage)
    given, data = values["train"][model], load_stacks(f"{out}/stacks", f"{out}/grading/grades.csv")
    if "published" in given:
        published.fetch(model, given, folder, data.meta)
    else:
        where = dict(state=nb.state_dir(stage, out), seed=values["seed"], superres=f"{out}/superres")
        train(training_section(given, f"train.{model}"), data, folder, **where)
    print(f"{stage}: took {elapsed():.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())

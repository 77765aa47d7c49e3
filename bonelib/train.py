"""The stage `train`: a model is trained, or its published weights are fetched, without any figure or metric.

python -m bonelib.train train@MODEL OUT

reads the stacks of the folder OUT and writes the model to OUT/training/MODEL.
"""

import os
import sys
from pathlib import Path

from bonelib import InputError, nb
from bonelib.core.parallel import die_with_run, elapsed, keep_freed_memory


def main() -> int:
    die_with_run()
    keep_freed_memory()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported
    from bonelib import published
    from bonelib.params import Train, section
    from bonelib.scans.dataset import load_stacks
    from bonelib.training.loop import train

    stage, out = sys.argv[1:]
    model = stage.partition("@")[2]
    folder, state = Path(out) / "training" / model, nb.state_dir(stage, out)
    try:
        values = nb.stage_params(stage)
        given = values["train"][model]
        data = load_stacks(f"{out}/stacks", f"{out}/grading/grades.csv")
        if "published" in given:
            published.fetch(model, given, folder, data.meta)
        else:
            how = section(Train, given, f"train.{model}")
            train(how, data, folder, state=state, seed=values["seed"], superres=f"{out}/superres")
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{stage}: took {elapsed():.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

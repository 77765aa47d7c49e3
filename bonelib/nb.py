"""Run one notebook as one stage: `python -m bonelib.nb STAGE NOTEBOOK OUT`

The notebook reads and writes below the folder OUT, and sees the parameters that dvc.yaml declares for the stage and no
others, so that a forgotten declaration fails loudly instead of leaving a stale result. A stage NAME@MODEL has results
of its own for each model.
"""

import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import yaml

from bonelib import InputError
from bonelib.core.parallel import die_with_run, elapsed, map_large_blocks

STAGE = "BONELIB_NOTEBOOK"  # set while a stage runs a notebook, to where it is written


def stage_params(stage: str) -> dict[str, Any]:
    """The parameters declared for `stage` as {name: value}; those of the active profile stand at the top level."""
    # DVC's own reader takes a second, and reads dvc.lock too, which a model that runs beside may just be writing
    name, _, model = stage.partition("@")
    given, stages = (yaml.safe_load(Path(file).read_text(encoding="utf-8")) for file in ("params.yaml", "dvc.yaml"))
    active, found = given["profile"], {}
    for key in stages["stages"][name]["params"]:
        *parents, last = key.replace("${profile}", active).replace("${item.model}", model).split(".")
        value, into = given, found
        for part in parents:
            value, into = value[part], into.setdefault(part, {})
        into[last] = value[last]
    for profile in found.pop("profiles", {}).values():
        found |= profile
    return found


def state_dir(stage: str, out: str) -> str:
    """Where a stage keeps what a killed run goes on from."""
    return f"scratch/state/{Path(out).name}/{stage.replace('@', '/')}"


def places(stage: str, source: str, out: str) -> dict[str, str]:
    """What a notebook is told of where it reads and writes: `out` and `to` (the same), figures, metrics and state."""
    name, model = Path(source).stem, stage.partition("@")[2]
    label = f"{name}_{model}" if model else name
    return {
        "out": out,
        "to": out,
        "figure_dir": f"{out}/figures/{name}/{model}".rstrip("/"),
        "metrics_file": f"{out}/metrics/{label}.json",
        "state_dir": state_dir(stage, out),
    } | ({"model": model} if model else {})


def root() -> Path:
    """Change into the repository's root, from wherever a notebook was opened, and return it.

    By hand, a user's error is from here on one sentence, and the kernel does not grow while bones are drawn.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file():
            os.chdir(folder)
            if STAGE not in os.environ:
                _say_errors_plainly()
                map_large_blocks()
            return folder
    raise FileNotFoundError(f"no dvc.yaml in {here} or above it: open the notebook inside the repository")


def _say_errors_plainly() -> None:
    from IPython import get_ipython

    def say(shell, kind, error, trace, tb_offset=None):
        text = str(error)
        if re.search(r"\bout/\S+: no such file", text) and "make repro" not in text:
            text += "; run `make repro` first, which makes it"
        shell._showtraceback(kind, text, [text])

    if shell := get_ipython():
        shell.set_custom_exc((InputError,), say)


def main() -> int:
    die_with_run()
    # Threads that wait in a loop for each other lose most of their time where another program wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Freed memory is kept (glibc): to give back and fetch again what a feature map takes costs more than to fill it.
    for name, value in (("MALLOC_MMAP_MAX_", 0), ("MALLOC_TRIM_THRESHOLD_", 1 << 33)):
        os.environ.setdefault(name, str(value))
    stage, source, out = sys.argv[1:]
    given = places(stage, source, out)
    target = f"{out}/notebooks/{Path(given['metrics_file']).stem}.ipynb"
    os.environ[STAGE] = target  # batch run: no interactive widgets, and links start from here

    warnings.filterwarnings("ignore")
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of defaults that span lines, and of dictionaries
    # Checks the syntax of links in a JSON schema, which no notebook has, and compiles its grammar first, for seconds
    sys.modules.setdefault("rfc3987_syntax", None)
    import papermill
    from papermill.exceptions import PapermillExecutionError

    Path(target).parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            source,
            target,
            parameters=stage_params(stage) | given,
            cwd=".",
            log_output=False,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
            progress_bar=False,
            start_timeout=600,  # a kernel starts late where other programs want the cores
            autosave_cell_every=30,
            store_widget_state=False,  # megabytes of a view that is in a page of its own
            extra_arguments=["--IPKernelApp.log_level=40"],  # else it warns that loopback is not encrypted
        )
    except PapermillExecutionError as error:
        if error.ename == "InputError":
            print(error.evalue, file=sys.stderr)
            return 2
        says = f"{source} failed with {error.ename}: {error.evalue}; the failing cell is marked in {target}"
        print(says, file=sys.stderr)
        return 1
    print(f"{stage}: took {elapsed():.0f} s", flush=True)  # `make repro` keeps it
    return 0


if __name__ == "__main__":
    sys.exit(main())

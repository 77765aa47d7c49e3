"""A notebook of the pipeline in a real JupyterLab, run by hand: all its cells, and the explorer at its end."""

import secrets

import nbformat
import pytest
from browser import CHROMIUM, lab, outputs, run_all, used

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; on Debian: apt-get install chromium")
BY_HAND = "06_image_transition"  # the pipeline runs the others


def by_hand(folder, executed, source):
    """A copy of the notebook `source` with the small numbers with which `executed` was run, which writes to scratch/.

    Returns its path within `folder`.
    """
    ran, notebook = (nbformat.read(folder / path, 4) for path in (executed, source))
    given = next(c for c in ran.cells if "injected-parameters" in c.metadata.get("tags", []))
    own = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    own.source += "\n" + "\n".join(
        line for line in given.source.splitlines() if not line.startswith(("to ", "figure_dir", "metrics_"))
    )
    path = f"notebooks/hand_{source.name}"
    nbformat.write(notebook, folder / path)
    return path


@pytest.fixture
def clean(pipeline):
    """The pipeline's folder, which is left without the copies of notebooks: its stages must be those that ran."""
    yield pipeline
    for path in (pipeline / "notebooks").glob("hand_*"):
        path.unlink()


@pytest.mark.pipeline
def test_jupyterlab_runs_a_notebook_and_shows_its_explorer(page, clean, tmp_path):
    token, source = secrets.token_hex(16), clean / f"notebooks/{BY_HAND}.ipynb"
    ran = sorted((clean / "out/tiny/notebooks").glob(f"{BY_HAND}*.ipynb"))[0]
    with lab(clean, token, tmp_path) as address:
        run_all(page, address, token, by_hand(clean, ran, source))
        page.wait("window.ran", 300)
        said = outputs(page)
        assert said and not [o for o in said if o["output_type"] == "error"], said[-1]
        page.js("(n => { void n.scrollToItem(n.widgets.length - 1); })(jupyterapp.shell.currentWidget.content)")
        assert used(page, tmp_path, BY_HAND, ("End", 35)).shape == (16, 144, 112)
        page.js("window.jupyterapp.serviceManager.sessions.shutdownAll()")
        # Somebody who has not run the pipeline yet: nothing of the default profile is there
        run_all(page, address, token, f"notebooks/{BY_HAND}.ipynb")
        page.wait("window.ran", 120)
        (error,) = [o for o in outputs(page) if o["output_type"] == "error"]
        assert error["traceback"] == [error["evalue"]] and "run `make repro` first" in error["evalue"]

"""The paper: numbers come from results and nowhere else, and a false claim or a missing number stops it."""

import json
import re
import shutil
from pathlib import Path

import pytest

from bonelib import InputError, paper, results
from bonelib.params import check_file
from bonelib.scans.tables import read_table
from bonelib.store import pointer
from bonelib.views import readme

ROOT = Path(__file__).parents[1]
# Names, years and references hold digits and are no results
REFERENCES = r"(?:Tables?|Figure|Section|Appendix|Equation) [A-C]?\.?\d[\d.]*(?: and [A-C]\.\d)?"
NAMES = rf"\b[23]D\b|random3d|Inception-v3|\b(?:19|20)\d\d\b|{REFERENCES}"


@pytest.fixture
def place(tmp_path):
    """A folder with the helpers of the paper and one metrics file; returns a function that compiles a text there."""
    for name in ("lib.typ", "published.csv"):
        (tmp_path / "paper").mkdir(exist_ok=True)
        shutil.copy(ROOT / "paper" / name, tmp_path / "paper" / name)
    metrics = {"a.value": 0.256, "a.low": None, "a.high": None, "gone": None, "n": 12, "minus": -0.001}
    (tmp_path / "out/metrics").mkdir(parents=True)
    (tmp_path / "out/metrics/01_some.json").write_text(json.dumps(metrics))
    told = {"out": "/out", "profile": "tiny", "metrics": ["01_some"], "settings": {}, "models": []}

    def written(text):
        source = tmp_path / "paper/text.typ"
        source.write_text(f'#import "lib.typ": *\n{text}\n')
        return [mark["value"] for mark in paper.compiled(told, "<num>", source, tmp_path)]

    return written


def test_a_number_is_read_and_listed_with_its_key(place):
    (mark,) = place('#num("01_some", "a.value")')
    assert mark == {"source": "01_some", "key": "a.value", "value": 0.256, "shown": "0.26"}
    assert [
        m["shown"] for m in place('#num("01_some", "n") #num("01_some", "minus") #share("01_some", "a.value")')
    ] == [
        "12",
        "0.00",
        "26 %",
    ]


def test_what_was_not_measured_is_said(place):
    assert place('#num("01_some", "gone")')[0]["shown"] == "not measured"
    assert [m["shown"] for m in place('#interval("01_some", "a")')] == ["0.26"]


@pytest.mark.parametrize(
    "text, says",
    [
        ('#num("01_some", "b.value")', "01_some.json has no key b.value"),
        ('#num("02_other", "a.value")', "stage 02_other has no metrics"),
        ('#published("patients in space")', "published.csv has not one row patients in space"),
        ('#claim(value("01_some", "a.value") > 0.5)[It is more than half.]', "a claim is false"),
    ],
)
def test_a_missing_number_or_a_false_claim_stops_the_build(place, text, says):
    with pytest.raises(InputError, match=re.escape(says)):
        place(text)


def test_a_sentence_is_chosen_by_its_numbers(place):
    text = '#by(value("01_some", "a.value"), {}, more: num("01_some", "n"), less: num("01_some", "minus"), missing: [])'
    assert [place(text.format(other))[0]["key"] for other in ("0.1", "0.3")] == ["n", "minus"]
    assert place(text.format("none")) == []


def typed(markup):
    """Digits of a Typst source that stand in no string, comment, label or name."""
    for part in (r"//[^\n]*", r'"[^"\n]*"', r"<[\w-]+>", r"@[\w-]+", NAMES):
        markup = re.sub(part, " ", markup)
    return re.findall(r"[^\n]*\d[^\n]*", markup)


def test_no_number_is_typed_in_the_text():
    assert typed("It is 0.5 here.") and not typed('In 2020 a 3D network, Table A.2, #num("01_a", "b")')
    assert typed((ROOT / "paper/paper.typ").read_text(encoding="utf-8")) == []


def test_published_values_say_where_they_stand():
    rows = read_table(ROOT / "paper/published.csv")
    assert len({row["key"] for row in rows}) == len(rows)
    assert all(row["where"] and row["value"] for row in rows)


def texts(content):
    """All texts of a piece of Typst content, as a query tells it."""
    if isinstance(content, dict):
        if content.get("func") == "raw":  # keys of params.yaml
            return
        for key, value in content.items():
            if key == "text" and isinstance(value, str):
                yield value
            elif key not in ("label", "key", "target", "supplement"):
                yield from texts(value)
    elif isinstance(content, list):
        for part in content:
            yield from texts(part)


@pytest.mark.pipeline
@pytest.mark.parametrize("supplements", [False, True])
def test_a_paper_without_its_numbers_has_no_digit(pipeline, monkeypatch, supplements):
    monkeypatch.chdir(pipeline)
    told = paper.facts(Path("out/tiny"), "paper.pdf", supplements) | {"masked": True}
    said = [
        text for kind in ("par", "figure", "heading") for found in paper.compiled(told, kind) for text in texts(found)
    ]
    assert any("■" in text for text in said)
    assert [text for text in said if re.search(r"\d", re.sub(NAMES, "", text))] == []


def agreeing(rows, metrics):
    """How many numbers of a paper are those of their keys, to the digits shown; fails at the first that is not."""
    found = [row for row in rows if row["source"] in metrics]
    for row in found:
        value = metrics[row["source"]][row["key"]]
        if isinstance(value, float):
            shown = float(row["shown"].removesuffix(" %").replace("−", "-"))
            shown = shown / 100 if row["shown"].endswith("%") else shown
            digits = len(row["shown"].removesuffix(" %").partition(".")[2]) + 2 * row["shown"].endswith("%")
            assert abs(shown - value) <= 0.5001 * 10**-digits, row
        elif value is None:
            assert row["shown"] == "not measured", row
        elif not isinstance(value, bool):
            assert row["shown"] == str(value), row
    return len(found), {row["source"][:2] for row in found}


def metrics_of(run):
    return {path.stem: json.loads(path.read_text()) for path in (run / "metrics").glob("*.json")}


@pytest.mark.pipeline
def test_every_number_of_the_paper_is_that_of_its_key(pipeline):
    run = pipeline / "out/tiny"
    count, stages = agreeing(read_table(run / "paper_with_supplements.csv"), metrics_of(run))
    assert count > 200 and stages >= {"01", "02", "03", "04", "05", "06", "07", "08", "09", "S5", "S6"}
    assert (run / "paper.pdf").read_bytes().startswith(b"%PDF")


def results_of(text):
    """The block of results of a README, and the profile that it is of, or None before the first."""
    block = readme.BLOCK.search(text)[0]
    found = re.search(r"profile `(\w+)`", block)
    return block.split("-->\n", 1)[1].rsplit("<!--", 1)[0], found and found[1]


def test_readme_and_paper_have_the_numbers_of_the_results_in_the_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    text = Path("README.md").read_text(encoding="utf-8")
    block, profile = results_of(text)
    assert len(text.splitlines()) <= 120
    if not pointer(results.NAME).is_file():
        pytest.skip("no results are packed")
    run = results.lay_out(tmp_path / "out" / profile)
    count, stages = agreeing(read_table(run / "paper.csv"), metrics_of(run))
    assert count > 200 and stages == {f"0{i}" for i in range(1, 10)}
    monkeypatch.chdir(tmp_path)
    assert block == readme.findings(profile), "run `make readme`"
    further = readme.FURTHER.search(text)[0].split("-->\n", 1)[1].rsplit("<!--", 1)[0]
    assert further == readme.further(profile) and further.count("\n") > 2


@pytest.mark.pipeline
def test_the_readme_is_written_from_the_numbers_of_the_paper(pipeline, monkeypatch):
    monkeypatch.chdir(pipeline)
    before = {path: Path(path).read_bytes() for path in ("README.md", "paper/figures/teaser.png")}
    try:
        monkeypatch.setattr("sys.argv", ["readme", "tiny"])
        assert readme.main() == 0
        block, profile = results_of(Path("README.md").read_text(encoding="utf-8"))
    finally:
        for path, content in before.items():
            Path(path).write_bytes(content)
    shown = {row["shown"] for row in read_table(Path("out/tiny/paper.csv"))}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines() if line.startswith("|")]
    numbers = [n for row in rows[2:] for cell in row[1:] for n in re.findall(r"[−\d.]+(?: %)?", cell)]
    assert profile == "tiny" and len(numbers) > 20 and set(numbers) <= shown


def test_departures_of_a_hierarchical_model_are_found_as_others_are(monkeypatch):
    monkeypatch.chdir(ROOT)
    profiles = check_file()["profiles"]
    own = profiles["tiny"]
    rows = paper.departures("hagan", {"train": own["train"]["hagan"]}, own, profiles["paper"])
    found = {row["key"]: (row["published"], row["here"]) for row in rows}
    assert found["train.generator.widths"] == ([512, 512, 256, 128, 64], [16, 16, 16])
    assert found["train.samples"] == (320_000, 16) and found["inversion.refine.steps"][1] == 2
    assert "train.lambdas" not in found  # as published

"""Writes the results and the picture of README.md from the outputs of the laptop profile (`make readme`)."""

import re
import shutil
from pathlib import Path

from bonelib.repro import closing_lines


def main() -> None:
    readme = Path("README.md")
    results = f"```text\n{closing_lines('laptop')}\n```\n"
    found = r"(<!-- results[^>]*-->\n).*?(<!-- /results -->)"
    readme.write_text(
        re.sub(found, lambda part: part[1] + results + part[2], readme.read_text(encoding="utf-8"), flags=re.S),
        encoding="utf-8",
    )
    Path("paper/figures").mkdir(parents=True, exist_ok=True)
    shutil.copyfile("out/laptop/figures/04_image_quality/teaser.png", "paper/figures/teaser.png")


if __name__ == "__main__":
    main()

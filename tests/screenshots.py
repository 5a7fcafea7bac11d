"""Take the pictures of README and docs: a check of an FMS with one fault, as text and as a page.

    python tests/screenshots.py [--out docs/images]

Run it (`make pictures`) when the look of the report changes, and look at what comes out.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import which

from PIL import Image
from rich.console import Console
from rich.text import Text
from selenium import webdriver
from selenium.webdriver.common.by import By

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
# A script finds its siblings first.
from tests.mutants.corpus import edit_of  # noqa: E402
from tests.mutants.mutant import plant  # noqa: E402

WIDTH = 1280
# Name, what to show, and the height of the picture in pixels.
PICTURES = (
    ("report", "body", 880),
    ("report-case", "details.case[open] .inside", 840),
)


def write_report(folder: Path) -> tuple[Path, str]:
    """Check an FMS with the wrong GELU; return its HTML report and what was printed."""
    checkout = ROOT / "build" / "fms-checkout"
    plant(edit_of("exact-gelu"), checkout=checkout, out=folder / "broken")
    for name in ("goldens", "tests"):  # the page shows the command, without this machine's paths
        (folder / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "snapshot_tool", "check", "--fms-path", "broken"]
    options = ["--case", "*-image*", "--html", "report.html"]
    # As docs/failure.md has it: the tests' own preprocessor is left out.
    environment = {k: v for k, v in os.environ.items() if k != "IDEFICS3_PREPROCESSOR"}
    done = subprocess.run(
        [*command, *options],
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    return folder / "report.html", done.stdout


def draw_terminal(printed: str, path: Path) -> None:
    """Draw the part of the output that says what is wrong, from the grid on."""
    lines = printed.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("case "))
    shown = ["$ snap check --fms-path broken", *lines[start:]]
    text = Text("\n".join(shown))
    text.highlight_regex(r"\bpass\b", "green")
    text.highlight_regex(r"(?m)\bfail\b|^FAIL\b|^>.*", "red")
    console = Console(record=True, width=max(map(len, shown)), file=io.StringIO())
    console.print(text)
    console.save_svg(str(path), title="snap")
    # rich names a font on the network; the reader's own monospace will do.
    svg = re.sub(r"@font-face \{.*?\}", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    path.write_text(svg, encoding="utf-8")


def take_pictures(page: Path, out: Path, *, scheme: str) -> None:
    """Open the report in light or dark, and take each picture."""
    options = webdriver.ChromeOptions()
    options.binary_location = which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(argument)
    with webdriver.Chrome(options, webdriver.ChromeService(which("chromedriver") or "")) as browser:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        for name, shown, height in PICTURES:
            size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get(page.as_uri())
            element = browser.find_element(By.CSS_SELECTOR, shown)
            browser.execute_script("arguments[0].scrollIntoView()", element)
            picture = Image.open(io.BytesIO(browser.get_screenshot_as_png()))
            picture.save(out / f"{name}-{scheme}.webp", lossless=True)


def main() -> None:
    """Read the arguments and take the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        page, printed = write_report(Path(folder))
        draw_terminal(printed, out / "terminal.svg")
        for scheme in ("light", "dark"):
            take_pictures(page, out, scheme=scheme)


if __name__ == "__main__":
    main()

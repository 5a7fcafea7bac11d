"""The HTML report, made from real runs and opened in a real Chromium."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import which

import msgspec
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.expected_conditions import visibility_of
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from snapshot_tool.base.report import CheckReport
from snapshot_tool.reports.html import CasePreview, run_to_html
from snapshot_tool.reports.json import read_run
from tests.conftest import CHECKOUT, GOLDENS, Run, Snap, error_lines
from tests.mutants.corpus import edit_of
from tests.mutants.mutant import plant

FIRST_BAD = "model.vision_model.encoder.layers.0.mlp.activation_fn"
HOSTILE = (
    "<script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">{{7*7}}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module's files lie."""
    return tmp_path_factory.mktemp("html")


@pytest.fixture(scope="module")
def failed_check(snap: Snap, folder: Path) -> Run:
    """Check an FMS with the wrong GELU; write run.json and report.html."""
    plant(edit_of("exact-gelu"), checkout=CHECKOUT, out=folder / "fms")
    return snap(
        *("check", "--fms-path", folder / "fms", "--case", "*-[i1]*"),
        *("--json", folder / "run.json", "--html", folder / "report.html"),
        OMP_NUM_THREADS="1",
    )


@pytest.fixture(scope="module")
def report(failed_check: Run, folder: Path) -> CheckReport:
    """Read the failed run back."""
    assert failed_check.code == 1
    return read_run(folder / "run.json")


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    """Start Chromium. Where there is none the tests fail: what was not looked at is not right."""
    browser, driver = which("chromium"), which("chromedriver")
    if not browser or not driver:
        pytest.fail("no chromium and chromedriver here: .ci/browser installs them")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as started:
        started.execute_cdp_cmd("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        started.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        yield started


@pytest.fixture
def page(failed_check: Run, folder: Path, chromium: webdriver.Chrome) -> webdriver.Chrome:
    """Open the report of the failed run afresh, wide and light."""
    show(chromium, folder / "report.html", width=1200, scheme="light")
    return chromium


def show(chromium: webdriver.Chrome, path: Path, *, width: int, scheme: str) -> None:
    """Open a page in a window of this width, in light or dark."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    chromium.get("about:blank")
    chromium.get(path.as_uri())


def logged(page: webdriver.Chrome) -> list[dict[str, str]]:
    """Return what the page's console has said since it was last asked."""
    entries: list[dict[str, str]] = page.get_log("browser")  # type: ignore[no-untyped-call]
    return entries


def find(page: webdriver.Chrome, css: str) -> list[WebElement]:
    """Return the elements that are shown."""
    return [
        element for element in page.find_elements(By.CSS_SELECTOR, css) if element.is_displayed()
    ]


def grid_cases(page: webdriver.Chrome) -> list[str]:
    """Return the names of the cases that the grid shows."""
    return [element.text for element in find(page, ".grid tbody th")]


def test_the_page_opens_offline_without_an_error(page: webdriver.Chrome, folder: Path) -> None:
    """One file of bounded size, that asks for nothing else and logs nothing."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert len(text) < 2_000_000
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:|#)[^\s"'>]+""", text)
    assert logged(page) == []
    assert page.title == "snap: fail: local/tiny-idefics3"
    assert find(page, "h1 .verdict")[0].text == "fail"


def test_the_page_says_what_the_run_says(page: webdriver.Chrome, report: CheckReport) -> None:
    """Every cell of the grid, the candidate, the environment."""
    assert len(grid_cases(page)) == len({result.case for result in report.results}) >= 4
    shown = " ".join(element.text for element in find(page, ".facts dd"))
    assert "never imported" in shown
    assert report.environment["torch"] in shown
    assert report.candidate.commit[:12] in shown
    failed = {(r.case, r.phase.value) for r in report.results if r.verdict == "fail"}
    assert len(find(page, ".grid a.fail")) == len(failed) >= 4


def test_the_grid_filters_by_text_and_by_verdict(page: webdriver.Chrome) -> None:
    """By case, prompt or reason; rows and details together; and says how many are left."""
    everything = grid_cases(page)
    text = page.find_element(By.ID, "filter-text")
    text.send_keys("TWO-images")
    assert grid_cases(page) == ["two-images"]
    assert len(find(page, "details.case")) == 1
    assert page.find_element(By.ID, "filter-count").text == f"1 of {len(everything)} cases"
    text.clear()
    text.send_keys("Describe the image")  # its prompt
    assert grid_cases(page) == ["one-image"]
    text.send_keys(Keys.CONTROL, "a")
    text.send_keys(Keys.DELETE)
    assert grid_cases(page) == everything
    Select(page.find_element(By.ID, "filter-verdict")).select_by_visible_text("fail")
    failing = grid_cases(page)
    # One picture is dark all over, where both GELUs agree; the other case has none.
    passing = {"variant-10", "variant-11"}
    assert passing < set(everything)
    assert failing == [name for name in everything if name not in passing]
    Select(page.find_element(By.ID, "filter-verdict")).select_by_visible_text("pass")
    assert set(grid_cases(page)) == passing


def test_a_failed_cell_opens_its_details_by_mouse_and_by_key(page: webdriver.Chrome) -> None:
    """The case unfolds, the phase is in sight and has the focus."""
    for press in ("click", Keys.ENTER):
        cell = find(page, ".grid a.fail")[-1]
        section = page.find_element(By.ID, str(cell.get_attribute("href")).partition("#")[2])
        assert not section.is_displayed()
        if press == "click":
            cell.click()
        else:
            cell.send_keys(press)
        WebDriverWait(page, 5).until(visibility_of(section))
        top = page.execute_script("return arguments[0].getBoundingClientRect().top", section)
        assert -5 <= top < 900
        assert page.switch_to.active_element == section
        find(page, "button[data-open=no]")[0].click()


def test_a_failure_is_shown_with_prompt_images_and_plots(page: webdriver.Chrome) -> None:
    """Maps and histograms of the failed tensors, no others; pictures that really load."""
    find(page, "button[data-open=yes]")[0].click()
    one = next(e for e in find(page, "details.case") if "one-image" in e.text.splitlines()[0])
    assert "Describe the image: <image>." in one.text
    pictures = one.find_elements(By.TAG_NAME, "img")
    assert [page.execute_script("return arguments[0].naturalWidth", p) for p in pictures] == [192]
    vision, connector = (
        one.find_element(By.CSS_SELECTOR, f"[id$={phase}]") for phase in ("vision", "connector")
    )
    assert len(vision.find_elements(By.CSS_SELECTOR, ".plots svg")) == 2
    assert vision.find_elements(By.CSS_SELECTOR, ".plots svg image")
    assert not connector.find_elements(By.TAG_NAME, "svg")
    assert "beyond:" in vision.text
    assert logged(page) == []


def test_the_curve_marks_the_first_divergent_module(
    page: webdriver.Chrome, report: CheckReport
) -> None:
    """As the largest point of the curve, and in the tree, which is open there and has all."""
    point = max(find(page, ".curve circle"), key=lambda e: float(e.get_attribute("r") or 0))
    title = point.find_element(By.TAG_NAME, "title").get_attribute("textContent")
    assert str(title).startswith(FIRST_BAD)
    (marked,) = find(page, ".tree .first-bad")
    assert marked.get_attribute("data-module") == FIRST_BAD
    assert report.localisation is not None
    modules = {module.module for module in report.localisation.modules}
    in_tree = page.find_elements(By.CSS_SELECTOR, ".tree [data-module]")
    assert {element.get_attribute("data-module") for element in in_tree} == modules


def test_a_click_on_the_curve_shows_the_module_in_the_tree(page: webdriver.Chrome) -> None:
    """Wherever it is folded away."""
    last = page.find_elements(By.CSS_SELECTOR, ".curve a")[-1]
    anchor = str(last.get_dom_attribute("href")).removeprefix("#")
    page.execute_script("document.querySelectorAll('.tree details').forEach(d => d.open = false)")
    page.execute_script("location.hash = arguments[0]", anchor)
    target = page.find_element(By.ID, anchor)
    WebDriverWait(page, 5).until(visibility_of(target))
    assert page.switch_to.active_element == target


def test_the_first_screen_says_what_happened_and_how_to_repeat_it(
    page: webdriver.Chrome, report: CheckReport
) -> None:
    """Verdict, module, command, date, versions, grid and curve, in a window of 1200 by 900."""
    header = find(page, "header")[0].text
    assert "vision in" in header
    assert "first wrong: vision_tower.base_model.encoder.layers.0.mlp" in header
    assert report.command in header
    assert report.date[:10] in header
    assert f"torch {report.environment['torch']}" in header
    for css in (".grid", ".curve"):
        place = page.execute_script(
            "return arguments[0].getBoundingClientRect().top", find(page, css)[0]
        )
        assert 0 < place < 900
    (opened,) = find(page, "details.case[open]")
    assert report.divergence is not None
    assert report.divergence.case in opened.text.splitlines()[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_light_and_dark(
    failed_check: Run, folder: Path, chromium: webdriver.Chrome, scheme: str
) -> None:
    """All text has the contrast that WCAG 2 asks of it (AA: 4.5), plots included."""
    show(chromium, folder / "report.html", width=1200, scheme=scheme)
    chromium.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    poor = chromium.execute_script((Path(__file__).parent / "contrast.js").read_text())
    assert poor == []
    light = chromium.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (light == "rgb(255, 255, 255)") is (scheme == "light")


def test_a_narrow_window_has_no_sideways_scrolling(
    failed_check: Run, folder: Path, chromium: webdriver.Chrome
) -> None:
    """Wide tables scroll in themselves, not with the page."""
    for width in (360, 1280):
        show(chromium, folder / "report.html", width=width, scheme="light")
        chromium.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert chromium.execute_script("return document.documentElement.scrollWidth") <= width


def test_what_a_golden_or_candidate_says_is_text_and_nothing_else(
    report: CheckReport, folder: Path, chromium: webdriver.Chrome
) -> None:
    """Hostile prompts, names, paths and reasons are shown, not run."""
    assert report.localisation is not None
    results = tuple(
        replace(r, case=f"{r.case}{HOSTILE}", tensor=HOSTILE, reason=r.reason and HOSTILE)
        for r in report.results
    )
    modules = tuple(
        msgspec.structs.replace(module, module=f"$x_{{{module.module}}}<b>")
        for module in report.localisation.modules
    )
    spoilt = replace(
        report,
        results=results,
        localisation=msgspec.structs.replace(
            report.localisation, modules=modules, first_bad=modules[3].module
        ),
        candidate=replace(report.candidate, path=HOSTILE),
        environment={**report.environment, HOSTILE: HOSTILE},
        warnings=(HOSTILE,),
    )
    preview = CasePreview(HOSTILE, HOSTILE, 1, 1, ())
    previews = {result.case: preview for result in results}
    path = folder / "<img src=x onerror=alert(1)>.html"
    path.write_text(run_to_html(spoilt, previews, base="/"), encoding="utf-8")
    show(chromium, path, width=1200, scheme="light")
    assert "pwned" not in chromium.title
    assert logged(chromium) == []
    assert chromium.find_element(By.CSS_SELECTOR, "details.case pre").text == HOSTILE
    assert chromium.find_elements(By.CSS_SELECTOR, "b, script + script, img[src=x]") == []


def test_a_page_is_made_if_no_module_was_compared(report: CheckReport) -> None:
    """As of a candidate that raises in its first module."""
    assert report.localisation is not None
    modules = tuple(
        msgspec.structs.replace(module, input_error=None, output_error=None)
        for module in report.localisation.modules
    )
    found = msgspec.structs.replace(report.localisation, modules=modules, first_bad=None)
    assert "Modules of case" in run_to_html(replace(report, localisation=found), {}, base="/")


def test_the_policy_of_the_page_stops_a_script_that_got_in(
    folder: Path, failed_check: Run, chromium: webdriver.Chrome
) -> None:
    """The second line of defence, tried by putting one in."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    path = folder / "injected.html"
    path.write_text(text.replace("<h2", HOSTILE.replace("{{7*7}}", "<h2"), 1), encoding="utf-8")
    show(chromium, path, width=1200, scheme="light")
    assert chromium.title == "snap: fail: local/tiny-idefics3"
    assert "Content Security Policy" in str(logged(chromium))


def test_generations_that_part_stand_side_by_side(
    snap: Snap, folder: Path, chromium: webdriver.Chrome
) -> None:
    """As text, with the token marked at which they part, and whether that was a near-tie."""
    run = snap(
        *("check", "--candidate", "tests.candidates:TakesSecondBest", "--case", "one-image"),
        *("--phase", "generate", "--json", folder / "tokens.json"),
        *("--html", folder / "tokens.html"),
    )
    assert run.code == 1
    (result,) = read_run(folder / "tokens.json").results
    found = result.divergence
    assert found is not None
    assert found.step == 4
    show(chromium, folder / "tokens.html", width=1200, scheme="light")
    golden, candidate = find(chromium, ".sides pre")
    (row,) = find(chromium, "section[id$=generate] tbody tr")
    assert "0" not in [cell.text for cell in row.find_elements(By.CSS_SELECTOR, "td.number")[2:5]]
    assert golden.text == "".join(token.partition(" ")[2] for token in found.golden)
    assert candidate.text == "".join(token.partition(" ")[2] for token in found.candidate)
    marked = [side.find_element(By.TAG_NAME, "mark") for side in (golden, candidate)]
    assert [mark.text for mark in marked] == [found.expected_text, found.actual_text]
    assert marked[0].text != marked[1].text
    assert found.kind.words in find(chromium, "section[id$=generate]")[0].text


def test_a_report_can_be_made_from_the_json_long_after(
    snap: Snap, failed_check: Run, folder: Path
) -> None:
    """With the goldens the same page; without them one that has no prompts; or the same text."""
    later = folder / "later.html"
    run = snap("report", folder / "run.json", "--html", later, "--goldens", GOLDENS)
    assert run.code == 1
    assert later.read_bytes() == (folder / "report.html").read_bytes()
    snap("report", folder / "run.json", "--html", later)
    bare = later.read_text(encoding="utf-8")
    assert FIRST_BAD in bare
    assert "Describe the image" not in bare
    again = snap("report", folder / "run.json").out
    assert again.partition("next  ")[0] == failed_check.out.partition("next  ")[0]


def test_several_runs_make_a_history(
    snap: Snap, failed_check: Run, folder: Path, chromium: webdriver.Chrome
) -> None:
    """A line for each run, in the order given; text and page; the last one's exit code."""
    passing = folder / "passing.json"
    options = ("--case", "one-image", "--phase", "connector", "--json", passing)
    assert snap("check", "--fms-path", CHECKOUT, *options).code == 0
    page = folder / "history.html"
    run = snap("report", folder / "run.json", passing, "--html", page)
    assert run.code == 0
    heading, failed, passed = run.out.splitlines()
    assert heading.split()[:3] == ["run", "date", "candidate"]
    assert FIRST_BAD in failed
    assert passed.split()[0] == str(passing)
    assert snap("report", passing, folder / "run.json").code == 1
    show(chromium, page, width=1280, scheme="light")
    assert [row.text for row in find(chromium, "tbody th")] == [
        str(folder / "run.json"),
        str(passing),
    ]
    assert logged(chromium) == []


@pytest.mark.parametrize("option", ["--json", "--markdown"])
def test_several_runs_are_written_as_a_page_only(
    snap: Snap, failed_check: Run, folder: Path, option: str
) -> None:
    """A file of another kind is refused, and a page that is printed stands alone."""
    runs = (folder / "run.json", folder / "run.json")
    assert snap("report", *runs, option, folder / "several").code == 2
    assert snap("report", *runs, "--html", "-").out.startswith("<!doctype html>")


def test_goldens_that_the_run_does_not_know_are_refused(
    snap: Snap, failed_check: Run, folder: Path, tmp_path: Path
) -> None:
    """Another golden's prompts beside these figures would be a lie."""
    run = snap("report", folder / "run.json", "--html", folder / "x.html", "--goldens", tmp_path)
    assert run.code == 3
    assert (
        "does not have the golden set of the check, local/tiny-idefics3 at" in error_lines(run)[0]
    )

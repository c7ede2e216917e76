"""The page of `aeup bench` in a real browser: Debian's chromium, without a window."""

import json
import pathlib
import shutil

import pytest
from aeup.bench import page
from aeup.bench.report import read_run

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

STORED = sorted((pathlib.Path(__file__).parent.parent / "docs" / "bench").glob("*.json"))
WIDTHS = (400, 800, 1600)


@pytest.fixture(scope="module")
def browser():
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def shown(browser, tmp_path_factory):
    """The stored runs as one page, loaded from a file; what was requested and what the console says."""
    runs = [read_run(path) for path in STORED]
    return runs, *load(browser, tmp_path_factory.mktemp("page") / "page.html", page.make_page(runs))


def load(browser, path, text):
    """-> requested addresses besides the file's own, messages of the console."""
    path.write_text(text)
    browser.get_log("performance")  # what came before
    browser.get(path.as_uri())
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert path.as_uri() in asked
    return [url for url in asked if url != path.as_uri()], browser.get_log("browser")


def resize(browser, width, scheme="light"):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def column(browser, table, name):
    """Texts of a column from top to bottom."""
    script = """const [table, name] = arguments, heads = [...table.tHead.rows[0].cells].map((c) => c.textContent);
    return [...table.tBodies[0].rows].map((row) => row.cells[heads.indexOf(name)].textContent);"""
    return browser.execute_script(script, table, name)


def test_the_browser_notices(browser, tmp_path):
    """What the next test finds absent is found where it is."""
    asked, said = load(browser, tmp_path / "bad.html", "<img src='http://127.0.0.1:9/a.png'><script>nowhere()</script>")
    assert asked == ["http://127.0.0.1:9/a.png"]
    assert any("nowhere is not defined" in entry["message"] for entry in said)


def test_nothing_is_loaded_and_the_console_is_silent(shown):
    runs, asked, said = shown
    assert len(runs) > 4 and asked == [] and said == []


def test_columns_sort_by_clicking(browser, shown):
    runs = shown[0]
    at = max(range(len(runs)), key=lambda i: len(runs[i]["rows"]))
    section = browser.find_elements(By.TAG_NAME, "section")[at]
    table = section.find_elements(By.TAG_NAME, "table")[-1]
    assert len(column(browser, table, "shape")) == len(runs[at]["rows"]) > 200
    heads = {head.text: head for head in table.find_elements(By.TAG_NAME, "th")}
    assert len(heads) > 12
    for name, number in (("x best", True), ("shape", False)):
        before, head = column(browser, table, name), heads[name]
        for way in ("ascending", "descending"):
            head.find_element(By.TAG_NAME, "button").click()
            assert head.get_attribute("aria-sort") == way
            order = sorted(before, key=float if number else str.lower, reverse=way == "descending")
            assert column(browser, table, name) == order != before
    assert sum(head.get_attribute("aria-sort") is not None for head in heads.values()) == 1
    percents = [float(text.rstrip("%")) for text in column(browser, table, "of copy")]
    heads["of copy"].find_element(By.TAG_NAME, "button").click()
    assert [float(text.rstrip("%")) for text in column(browser, table, "of copy")] == sorted(percents)


def test_rows_are_filtered_as_one_types(browser, shown):
    section = browser.find_elements(By.TAG_NAME, "section")[0]
    field = section.find_element(By.TAG_NAME, "input")
    table, stored = section.find_elements(By.TAG_NAME, "table")[-1], shown[0][0]["rows"]
    count = "return [...arguments[0].tBodies[0].rows].filter((row) => row.getClientRects().length).length"
    field.send_keys("FP32  backward")
    kept = [row["id"] for row in stored if (row["dtype"], row["direction"]) == ("fp32", "backward")]
    assert 0 < len(kept) == browser.execute_script(count, table) < len(stored)
    field.send_keys(Keys.CONTROL, "a", Keys.BACKSPACE)
    assert browser.execute_script(count, table) == len(stored)


@pytest.mark.parametrize("width", WIDTHS)
def test_page_fits_the_window(browser, shown, width):
    """Tables scroll within their boxes, under heads that stay; no word of a plot is cut off or lies on another."""
    resize(browser, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    script = """const box = document.querySelectorAll(".wide")[2], head = box.querySelector("th");
    box.scrollTo(0, 500);
    return [box.scrollTop, head.getBoundingClientRect().top - box.getBoundingClientRect().top];"""
    scrolled, gap = browser.execute_script(script)
    assert scrolled == 500 and 0 <= gap <= 2
    script = """return [...document.querySelectorAll("svg[role=img]")].flatMap((svg) => {
      const frame = svg.viewBox.baseVal, texts = [...svg.querySelectorAll("text")];
      const boxes = texts.filter((t) => !t.hasAttribute("transform")).map((t) => [t.textContent, t.getBBox()]);
      const out = boxes.filter(([, b]) => b.x < -1 || b.y < -1 || b.x + b.width > frame.width + 1
                                          || b.y + b.height > frame.height + 1);
      const on = boxes.filter(([, a], i) => boxes.some(([, b], j) => j > i && a.x + a.width > b.x + 1 &&
        b.x + b.width > a.x + 1 && a.y + a.height > b.y + 5 && b.y + b.height > a.y + 5));
      return [...out, ...on].map(([text]) => svg.ariaLabel + ": " + text);
    });"""
    assert browser.execute_script(script) == []


@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_words_are_readable(browser, shown, scheme):
    """Contrast of text in every colour with the page is at least 4.5 (WCAG 2.2, 1.4.3)."""
    resize(browser, 1200, scheme)
    script = """const colour = (e, name) => getComputedStyle(e)[name].match(/[\\d.]+/g).slice(0, 3).map(Number);
    const find = (s) => document.querySelector(s);
    return [colour(document.body, "backgroundColor"), colour(document.body, "color"), colour(find("td.bad"), "color"),
            colour(find("td.good"), "color"), colour(find("svg .c0.over"), "fill"), colour(find("a"), "color")];"""
    paper, *inks = browser.execute_script(script)
    assert (sum(paper) > 600) == (scheme == "light")
    assert min(contrast(ink, paper) for ink in inks) >= 4.5


def contrast(one, other):
    def luminance(colour):
        linear = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in colour))
        return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted(luminance(c) + 0.05 for c in (one, other))
    return high / low

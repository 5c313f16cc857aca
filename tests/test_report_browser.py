"""Report page in a headless browser without network: charts, tree, search, narrow screens, untrusted markup."""

import shutil

import pytest
from report_run import ATTACK, results, write_catalog, write_run

from mmsid.artifacts import write_json
from mmsid.report.page import write_results_page, write_run_page

pytestmark = pytest.mark.slow
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-dev-shm-usage"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium with chromedriver on this machine: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is absent: pip install -e '.[dev]'")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield session
    session.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    config = write_catalog(folder / "catalog", items=60)
    return write_run_page(write_run(folder / "drawn", config), config, folder / "report.html")


@pytest.fixture
def opened(browser, page):
    """The page at desktop width, newly loaded."""
    width(browser, 1200)
    browser.get(page.as_uri())
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def width(browser, pixels: int) -> None:
    """Emulate a device of this width, because a headless window cannot be as narrow as a phone."""
    size = {"width": pixels, "height": 844, "deviceScaleFactor": 1, "mobile": pixels < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def all_of(browser, selector: str) -> list:
    return browser.find_elements("css selector", selector)


def one(browser, selector: str):
    return browser.find_element("css selector", selector)


def until(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 10).until(lambda _: condition())


def test_it_loads_and_the_chart_changes_its_metric(opened):
    assert one(opened, "h1").text == "drawn"
    charts = {table.get_attribute("data-metric"): table for table in all_of(opened, "table[data-metric]")}
    assert charts["NDCG@10"].is_displayed() and not charts["HR@10"].is_displayed()
    bars = charts["NDCG@10"].find_elements("css selector", ".error")
    assert len(bars) == 3 and bars[0].rect["width"] > 5  # one method has two seeds: a bar with two ends
    one(opened, "#metric").send_keys("HR@10")
    assert charts["HR@10"].is_displayed() and not charts["NDCG@10"].is_displayed()


def test_the_tree_is_navigated_by_keyboard(opened):
    from selenium.webdriver import Keys

    branches = all_of(opened, "#branches > .branch")
    assert [branch.get_attribute("data-branch") for branch in branches] == ["0", "1"]
    assert "wear 100%" in branches[0].text and "30 items" in branches[0].text
    branches[0].send_keys(Keys.ENTER)
    shoes = one(opened, '#branches > [data-branch="0.2"]')
    assert "shoe" in shoes.text
    shoes.send_keys(Keys.ENTER)
    assert opened.switch_to.active_element.text == "b_2"  # the focus moves to the open branch
    cards = all_of(opened, "#leaves li")
    assert cards and all("shoe" in card.find_element("css selector", ".title").text for card in cards)
    assert all([chip.text for chip in card.find_elements("css selector", ".same")] == ["a_0", "b_2"] for card in cards)
    one(opened, "#crumbs button").click()
    assert len(all_of(opened, "#branches > .branch")) == 2


def test_long_lists_are_loaded_in_steps(opened):
    one(opened, "#branches > .branch").click()
    assert len(all_of(opened, "#leaves li")) == 12
    more = one(opened, "#leaves .more")
    assert more.text == "Show more (18 left)"
    more.click()
    cards = all_of(opened, "#leaves li")
    assert len(cards) == 24 and opened.switch_to.active_element == cards[12].find_element("css selector", "button")


def test_an_item_is_found_with_its_neighbours(opened):
    one(opened, "#query").send_keys("bag number 18")
    until(opened, lambda: one(opened, "#found-count").text.endswith("found"))
    one(opened, "#found button").click()
    assert one(opened, "#chosen h3").text == "bag number 18" and not one(opened, "#found").is_displayed()
    # the code of wear, and the code of bags, or 7 for an item that refinement moved
    prefix = [chip.text for chip in all_of(opened, "#chosen .self .codes > span")][:2]
    assert prefix[0] == "a_0" and prefix[1] in ("b_3", "b_7")
    for same in (1, 2):
        cards = all_of(opened, f'#chosen [data-common="{same}"] li')
        assert cards and all([chip.text for chip in card.find_elements("css selector", ".same")] == prefix[:same] for card in cards)
    one(opened, "#back").click()
    assert one(opened, "#found").is_displayed()


def test_pictures_decode(opened):
    image = one(opened, "#chosen .self img")
    until(opened, lambda: opened.execute_script("return arguments[0].complete && arguments[0].naturalWidth", image) == 96)


def test_code_usage_describes_a_code(opened):
    from selenium.webdriver import Keys

    cells = all_of(opened, "#heat .level:first-child .cell")
    assert len(cells) == 8 and [cell.get_attribute("class") for cell in cells[2:]] == ["cell dead"] * 6
    cells[0].click()
    cells[0].send_keys(Keys.ARROW_RIGHT)
    about = one(opened, "#heat .level:first-child .about").text
    assert about.split()[:4] == ["a_1", "30", "items,", "50%;"] and "home 100%" in about
    opened.switch_to.active_element.send_keys(Keys.ENTER)
    assert opened.switch_to.active_element.text == "a_1"


def test_another_method_can_be_explored(opened):
    unchanged = "0 items with published codes that differ"
    assert unchanged in one(opened, "#collisions-summary").text
    one(opened, "#method").send_keys("ours")
    until(opened, lambda: unchanged not in one(opened, "#collisions-summary").text)
    assert all_of(opened, "#buckets .bucket")


def test_moved_items_show_both_codes(opened):
    moved = all_of(opened, "#moved li")
    assert len(moved) == 6 and "reward +0.500 (balance -0.50, neighbours +0.25)" in moved[0].text
    assert [chip.text for chip in moved[0].find_elements("css selector", ".changed")] == ["b_7"]


def test_a_narrow_screen_needs_no_sideways_scrolling(opened):
    width(opened, 390)
    opened.refresh()
    one(opened, "#branches > .branch").click()
    one(opened, "#query").send_keys("shoe")
    until(opened, lambda: all_of(opened, "#found li"))
    assert opened.execute_script("return [window.innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    wide = (
        "return [...document.querySelectorAll('section, .item, .branch, .chart')].filter(e => e.getBoundingClientRect().right > 390).length"
    )
    assert opened.execute_script(wide) == 0


def test_markup_in_a_title_stays_text(opened):
    one(opened, "#query").send_keys("</script>")
    until(opened, lambda: all_of(opened, "#found li"))
    one(opened, "#found button").click()
    assert "<script>window.attacked = 1</script>" in one(opened, "#chosen h3").text and ATTACK[:9] == "</script>"
    assert opened.execute_script("return window.attacked === undefined && document.querySelectorAll('img[onerror]').length === 0")


def test_results_of_a_benchmark_have_a_page_without_explorers(browser, tmp_path):
    write_json(tmp_path / "x.json", results())
    browser.get(write_results_page(tmp_path / "x.json", tmp_path / "x.html").as_uri())
    assert all_of(browser, "table[data-difference] .better") and not all_of(browser, "#tree")
    assert browser.get_log("browser") == []

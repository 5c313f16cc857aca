"""The page of the service in a headless browser, at desktop and phone width; its screenshots are those of the docs."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from test_report_browser import all_of, browser, one, width

import mmsid
from mmsid.catalog import PictureLimits
from mmsid.cli import main
from mmsid.serve.settings import ServeSettings

pytestmark = pytest.mark.slow
uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is absent: pip install -e '.[dev]'")
IMAGES = Path(__file__).parents[1] / "docs" / "images"
ATTACK = '5 < 6 <img src=x onerror="window.attacked = 1">'
__all__ = ["browser"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict:
    """Drawn ads, captioned by the demo model, with a tokenizer and a recommender that were trained for a moment."""
    folder = tmp_path_factory.mktemp("shop")
    main(["demo-catalog", str(folder / "demo"), "--items", "300", "--users", "300", "--seed", "3"])
    fields = {"attributes": ["attributes"], "timestamps": "timestamps"}
    catalog = {"items": folder / "demo" / "items.parquet", "sequences": folder / "demo" / "sequences.parquet", "fields": fields}
    run = folder / "run"
    shop = mmsid.ingest(run / "ingest", catalog)
    mmsid.caption(run / "caption", shop, batch_size=32)
    mmsid.interests(run / "interests", shop, captions=run / "caption", batch_size=32)
    settings = {"captions": run / "caption", "interests": run / "interests"}
    use = ["title", "caption", "interests", "categories", "attributes"]
    training = {"codebook_size": 12, "steps": 5, "use": use, "reconstruct": "off"}
    tokenizer = mmsid.train_tokenizer(run / "train_tokenizer", shop, **training, **settings)
    sids = mmsid.assign(run / "assign", shop, tokenizer, **settings)
    schedule = {"epochs": 3}
    mmsid.train_recommender(run / "train_recommender", shop, variants={"ours": sids}, recommender="ours", seeds=[0], schedule=schedule)
    pictures = sorted((folder / "demo" / "images").glob("*.jpg"))
    return {"folder": folder, "bundle": mmsid.bundle(folder / "bundle", run=run), "picture": pictures[7]}


@pytest.fixture(scope="module")
def address(shop):
    from mmsid.serve.app import create_app

    settings = ServeSettings(state=shop["folder"] / "items.sqlite", pictures=PictureLimits(isolate=True))
    server = uvicorn.Server(uvicorn.Config(create_app(shop["bundle"], settings), port=0, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join(30)


@pytest.fixture(params=[1200, 390], ids=["desktop", "phone"])
def opened(request, browser, address):
    width(browser, request.param)
    browser.get(address)
    until(browser, lambda: "codes of" in one(browser, "#about").text)
    yield browser, request.param
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def until(session, condition, seconds: int = 60):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(session, seconds).until(lambda _: condition())


def test_an_ad_is_encoded_added_and_recommended(opened, shop):
    """The whole walk: drop a picture, see what it becomes, add it, and see what would be recommended and why."""
    page, pixels = opened
    new_id = f"new-{pixels}"
    one(page, "#image").send_keys(str(shop["picture"]))
    assert one(page, "#preview").is_displayed() and not one(page, "#drop-text").is_displayed()
    one(page, "#title").send_keys("Something new for the weekend")
    one(page, "#encode").click()
    until(page, lambda: one(page, "#result").is_displayed())
    assert one(page, "#caption").text not in ("", "none") and all_of(page, "#interests .interest")
    assert len(all_of(page, "#sid .codes span")) == 3 and not all_of(page, "#notes li")
    steps = all_of(page, "#path > li")
    assert len(steps) == 3 and [len(step.find_elements("css selector", ".codes span")) for step in steps] == [1, 2, 3]
    assert "in this group" in steps[0].text and steps[0].find_elements("css selector", "img.picture")
    nearest = all_of(page, "#nearest li")
    assert len(nearest) == 8 and all("similarity 0." in card.text or "similarity 1." in card.text for card in nearest)
    shown = "return [...document.querySelectorAll('#path img, #nearest img')].every(e => e.complete && e.naturalWidth > 0)"
    until(page, lambda: page.execute_script(shown))
    assert page.execute_script("return document.activeElement.id") == "result"
    one(page, "#new-id").send_keys(new_id)
    one(page, "#append button").click()
    until(page, lambda: "with the codes" in one(page, "#append-state").text)
    until(page, lambda: "added here" in one(page, "#about").text)
    buttons = all_of(page, "#examples button")
    assert buttons[0].text == "The ad above" and len(buttons) == 9
    for button in (buttons[1], buttons[2], buttons[0]):
        button.click()
    assert one(page, "#history").get_attribute("value").split()[-1] == "(this-ad)"
    one(page, "#recommend button.main").click()
    until(page, lambda: len(all_of(page, "#recommended li")) == 12)
    assert all(card.text.splitlines()[-1].startswith("Because ") for card in all_of(page, "#recommended li"))
    until(page, lambda: page.execute_script(shown.replace("#path img, #nearest img", "#recommended img")))
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    wide = "return [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).length"
    assert page.execute_script(wide) == 0
    screenshot(page, pixels, IMAGES / ("serve_desktop.png" if pixels > 500 else "serve_phone.png"))


def screenshot(page, pixels: int, path: Path) -> None:
    """The page from its top to the first recommendations, in 256 colours, so that the file stays small."""
    import base64

    page.execute_script("window.scrollTo(0, 0); document.activeElement.blur()")
    height = min(page.execute_script("return document.documentElement.scrollHeight"), 2300 if pixels > 500 else 2600)
    clip = {"x": 0, "y": 0, "width": pixels, "height": height, "scale": 0.8 if pixels > 500 else 1}
    data = page.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True, "clip": clip})
    picture = Image.open(io.BytesIO(base64.b64decode(data["data"]))).convert("RGB")
    path.parent.mkdir(exist_ok=True)
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < 200_000


def test_mistakes_are_explained(opened, tmp_path):
    page, _ = opened
    one(page, "#encode").click()
    until(page, lambda: "Drop a picture or type a title" in one(page, "#ad-state").text)
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0" + b"x" * 100)
    one(page, "#image").send_keys(str(tmp_path / "torn.jpg"))
    one(page, "#encode").click()
    until(page, lambda: "ads[0]" in one(page, "#ad-state").text)
    assert one(page, "#ad-state").get_attribute("class") == "bad" and not one(page, "#result").is_displayed()
    one(page, "#history").send_keys("nobody knows")
    one(page, "#recommend button.main").click()
    until(page, lambda: "None of these ids is known" in one(page, "#history-state").text)
    assert len(all_of(page, "#recommended li")) == 12
    page.get_log("browser")  # the answer 422 is logged by the browser


def test_markup_in_titles_and_ids_stays_text(opened):
    page, pixels = opened
    one(page, "#title").send_keys(ATTACK)
    one(page, "#encode").click()
    until(page, lambda: one(page, "#result").is_displayed())
    one(page, "#new-id").send_keys(f'"><b>{pixels}')
    one(page, "#append button").click()
    until(page, lambda: "with the codes" in one(page, "#append-state").text)
    one(page, "#title").send_keys(" again")
    one(page, "#encode").click()
    until(page, lambda: f'"><b>{pixels}' in one(page, "#nearest").text)
    assert page.execute_script("return window.attacked === undefined && document.querySelectorAll('main b, img[onerror]').length === 0")
    inline = (
        "const s = document.createElement('script'); s.textContent = 'window.attacked = 2'; document.body.append(s); "
        "return window.attacked === undefined"
    )
    assert page.execute_script(inline), "the policy runs the page's own script only"
    assert page.execute_script("return fetch('https://example.com').then(() => true, () => false)") is False
    page.get_log("browser")  # the refusals of the policy


def test_fields_have_labels_and_everything_is_reached_by_keyboard(opened):
    page, _ = opened
    unnamed = (
        "return [...document.querySelectorAll('input, textarea')].filter(e => !e.labels.length && !e.getAttribute('aria-label'))"
        ".map(e => e.id)"
    )
    assert page.execute_script(unnamed) == []
    assert page.execute_script("return [...document.querySelectorAll('button')].every(e => e.textContent.trim().length > 0)")
    assert page.execute_script("return document.querySelectorAll('h1').length === 1 && document.documentElement.lang === 'en'")
    small = "return [...document.querySelectorAll('main button')].filter(e => e.offsetParent && e.offsetHeight < 40).length"
    assert page.execute_script(small) == 0
    page.get(page.current_url + "docs")
    assert "POST /encode" in one(page, "main").text
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")

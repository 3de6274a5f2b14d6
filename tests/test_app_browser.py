"""The web page in a real browser: headless Chromium, with the server in this process."""

import uuid

import browser_support
import numpy as np
import PIL.Image
import pytest
from pipeline_support import shaken_model
from playwright.sync_api import expect, sync_playwright

from unifusion_jax import Prompt, images, web

pytestmark = pytest.mark.browser
LIMITS = web.Limits(pictures=2, picture_mb=1, side_px=128, steps=20000, waiting=1)
WAIT_MS = 300_000
STEPS = 20  # as many as there are reports of progress; the same everywhere, so that little is compiled
HOW = {"steps": STEPS, "guidance": 2.0}
WATCH = """() => {
    window.told = [];
    const look = () => window.told.push(document.querySelector("#progress")?.textContent ?? "");
    new MutationObserver(look).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


@pytest.fixture(scope="module")
def model(frozen):
    return shaken_model(frozen)


@pytest.fixture(scope="module")
def browser():
    found = browser_support.find()
    if not found:
        pytest.fail(browser_support.ABSENT)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    blocks = web.serve(model, tmp_path_factory.mktemp("pictures"), LIMITS, wait=False)
    yield blocks.local_url
    blocks.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page as another user at each call; afterwards checks that nothing came from elsewhere and no script failed."""
    contexts, elsewhere, failed = [], [], []

    def opened():
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 1000}))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("request", lambda request: elsewhere.append(request.url) if outside(request.url) else None)
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.goto(server)
        page.locator("#draw").wait_for()
        page.evaluate(WATCH)
        return page

    def outside(url):
        return not url.startswith((server, "data:", "blob:"))

    yield opened
    for context in contexts:
        context.close()
    assert (elsewhere, failed) == ([], [])


def fill(page, prompt, *, description="", seed=0, steps=STEPS):
    """Fills the form in."""
    for name, value in {"seed": seed, "steps": steps, "guidance": 2}.items():
        page.fill(f"#{name} input[type=number]", str(value))
    page.fill("#prompt textarea", prompt)
    page.fill("#description textarea", description)


def says(page, words):
    expect(page.locator("#progress")).to_contain_text(words, timeout=WAIT_MS)


def toast(page, words):
    expect(page.get_by_test_id("toast-body").filter(has_text=words)).to_be_visible(timeout=WAIT_MS)


def source(page):
    """Address of the first picture in the gallery; None without one."""
    pictures = page.locator("#gallery img")
    return pictures.first.get_attribute("src") if pictures.count() else None


def drawn(page, folder, before=None):
    """Waits until the gallery shows another picture than `before`; returns its file, as the browser got it."""
    expect(page.locator("#gallery img").first).not_to_have_attribute("src", before or "", timeout=WAIT_MS)
    says(page, "done")
    file = folder / f"{uuid.uuid4()}.png"
    file.write_bytes(page.request.get(source(page)).body())
    return file


def same(file, image):
    return np.abs(np.asarray(PIL.Image.open(file)).astype(int) - np.asarray(image)).max() <= 1


def test_draws_and_shows_how_far_it_is_and_what_it_wrote_which_can_be_changed(model, visit, tmp_path):
    page = visit()
    fill(page, "a ring", seed=3)
    page.click("#draw")
    first = drawn(page, tmp_path)
    assert same(first, model.generate(["a ring"], seed=3, **HOW)[0])
    steps = {text.split("step ")[1].strip() for text in page.evaluate("window.told") if "drawing: step" in text}
    assert len(steps) > STEPS / 2 and steps <= {f"{step} of {STEPS}" for step in range(STEPS + 1)}
    text = model.condition(["a ring"]).texts[0]
    assert page.input_value("#description textarea") == text
    # The picture that the user saves tells how to draw it again.
    page.locator("#gallery img").first.click()
    with page.expect_download() as download:
        page.locator("#gallery").get_by_label("Download").click()
    download.value.save_as(tmp_path / "saved.png")
    settings = images.read_settings(tmp_path / "saved.png")
    assert (settings["prompt"], settings["seed"], settings["target"]) == ("a ring", 3, text)
    # Its words changed, the description is drawn as the user wants it.
    before = source(page)
    page.fill("#description textarea", "A blue star.")
    page.click("#draw")
    again = drawn(page, tmp_path, before)
    assert same(again, model.generate([Prompt("a ring", target="A blue star.")], seed=3, **HOW)[0])
    assert not same(again, PIL.Image.open(first)) and page.input_value("#description textarea") == "A blue star."


def test_edits_an_uploaded_picture(model, visit, tmp_path):
    PIL.Image.new("RGB", (96, 80), "red").save(tmp_path / "red.png")
    page = visit()
    page.set_input_files("#pictures input[type=file]", tmp_path / "red.png")
    expect(page.locator("#seen img").first).to_be_visible()
    fill(page, "make it blue", description="A blue star.")
    page.click("#draw")
    file = drawn(page, tmp_path)
    words = Prompt("make it blue", target="A blue star.")
    picture = Prompt("make it blue", [images.load(tmp_path / "red.png")], target="A blue star.")
    edited, invented = (model.generate([prompt], **HOW)[0] for prompt in (picture, words))
    assert same(file, edited) and not same(file, invented)


def test_a_bad_upload_is_told_and_takes_nothing_away(visit, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "huge.png").write_bytes(bytes((LIMITS.picture_mb << 20) + 1))
    PIL.Image.new("RGB", (96, 80), "red").save(tmp_path / "fine.png")
    page = visit()
    fill(page, "a star", description="A blue star.")
    page.click("#draw")
    drawn(page, tmp_path)
    made = source(page)
    page.set_input_files("#pictures input[type=file]", tmp_path / "huge.png")
    toast(page, "exceed the maximum allowed size")
    page.set_input_files("#pictures input[type=file]", tmp_path / "text.png")
    toast(page, "text.png cannot be used: not an image")
    page.click("#draw")
    says(page, "stopped, nothing new was drawn")
    assert source(page) == made
    assert [page.input_value(f"#{name} textarea") for name in ("prompt", "description")] == ["a star", "A blue star."]
    page.locator("#pictures").get_by_label("Clear").last.click()
    page.set_input_files("#pictures input[type=file]", tmp_path / "fine.png")
    expect(page.locator("#seen img").first).to_be_visible()
    page.click("#draw")
    drawn(page, tmp_path, made)


def test_two_users_at_once_get_each_their_own(model, visit, tmp_path):
    users = [(visit(), "A red circle.", 5), (visit(), "A blue star.", 9)]
    for page, description, seed in users:
        fill(page, "x", description=description, seed=seed)
    for page, *_ in users:
        page.click("#draw")
    for page, description, seed in users:
        expected = model.generate([Prompt("x", target=description)], seed=seed, **HOW)
        assert same(drawn(page, tmp_path), expected[0])
        assert page.input_value("#description textarea") == description


def test_cancelling_while_it_is_drawn_makes_way_for_who_waits(visit, tmp_path):
    first, second, third = visit(), visit(), visit()
    for page in (second, third):
        fill(page, "x", description="A blue star.")
    fill(first, "x", description="A red circle.", steps=LIMITS.steps)
    first.click("#draw")
    says(first, f"step {LIMITS.steps // 20} of {LIMITS.steps}")
    second.click("#draw")
    expect(second.locator("#gallery")).to_contain_text("queue")
    third.click("#draw")
    toast(third, "currently busy")
    first.click("#cancel")
    says(first, "cancelled")
    drawn(second, tmp_path)
    expect(first.locator("#progress")).to_contain_text("cancelled")
    assert source(first) is None
    assert not any("done" in text for text in first.evaluate("window.told"))

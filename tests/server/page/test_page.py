"""The page at /: what is served, and, where Chromium is installed, what it does in a real browser."""

import re
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from ladimo.checkpoint import read_config, write_policy
from ladimo.policy import LayerRule, RoutingPolicy
from server.api.routes.pages import ASSETS, WEB
from server.app import Access
from tests.factories import make_nested
from tests.server.page.browser import Page
from tests.server.real import model_served
from tests.server.serving import Parts, serving

COUNT_CHANGES = """
window.changes = 0;
const observer = new MutationObserver(records => { window.changes += records.length; });
observer.observe(document.querySelector(".answer pre"), { childList: true });
"""
ANSWERS = (".answer:first-child", ".answer:last-child")
needs_chromium = pytest.mark.skipif(
    shutil.which("chromium") is None or shutil.which("chromedriver") is None,
    reason="chromium or chromedriver is not installed (Debian: chromium, chromium-driver)",
)


async def test_the_page_and_its_files_need_no_key(tmp_path: Path) -> None:
    async with serving(tmp_path, Parts(access=Access(api_keys=("secret",)))) as server:
        reply = await server.client.get("/")
        assert reply.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in reply.headers["content-security-policy"]
        linked = set(re.findall(r'(?:href|src)="(static/[^"]+)"', reply.text))
        assert {name.removeprefix("static/") for name in linked} <= set(ASSETS)
        for name, path in ASSETS.items():
            asset = await server.client.get(f"/static/{name}")
            assert asset.headers["content-type"].startswith("text/css" if name.endswith(".css") else "text/javascript")
            assert asset.text == path.read_text(encoding="utf-8")
        for name in ("nothing.js", "index.html", "..%2Fmetrics.py", "../api/ops.py"):
            assert (await server.client.get(f"/static/{name}")).status_code in (401, 404)


def test_the_page_asks_no_other_server() -> None:
    for path in WEB.iterdir():
        outside = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", path.read_text(encoding="utf-8"))
        assert set(outside) <= {"http://www.w3.org/2000/svg"}, path.name


pytestmark = pytest.mark.slow


@needs_chromium
def test_a_completion_streams_under_the_routing_that_is_asked_for(page: Page) -> None:
    page.open()
    page.type("#prompt", "def f(")
    page.type("#max-tokens", "150")
    page.type("#temperature", "0")
    page.driver.execute_script(COUNT_CHANGES)
    page("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page("#progress").text == "Done.")
    figures = page.figures()
    assert (figures["policy"], figures["chosen by"]) == ("full", "default")
    assert float(figures["tokens/s"]) > 0 and 10 < int(figures["tokens"]) <= 150
    assert page.text().startswith("def f(")
    changes: Any = page.driver.execute_script("return window.changes")
    assert changes >= int(figures["tokens"]) // 2  # it grew before our eyes; a token may add no text

    page.slide(0.0)
    page.run()
    cheapest = page.figures()
    assert (cheapest["policy"], cheapest["chosen by"], cheapest["accuracy"]) == ("fast", "body", "0.00")
    page.slide(1.0)
    page.run()
    best = page.figures()
    assert (best["policy"], best["accuracy"]) == ("full", "1.00")
    assert float(cheapest["experts per token"]) < float(best["experts per token"])
    assert "serves full" in page("#frontier-note").text

    Select(page("#policy")).select_by_value("quality")
    page.run()
    assert page.figures()["policy"] == "quality"

    Select(page("#policy")).select_by_value("fast")
    page.run()
    said = re.sub(r"[^a-z]", "", page.text().removeprefix("def f("))
    assert Select(page("#first-policy")).first_selected_option.text == "fast"
    page.type("#phase-end", said[3])  # the model says this sooner or later
    Select(page("#then-policy")).select_by_value("full")
    assert page("input[name=how][value=phases]").is_selected()
    page.run()
    drawn = re.fullmatch(r"fast (\d+), full (\d+)", page.figures()["tokens by phase"])
    assert drawn is not None and int(drawn[1]) >= 1 and int(drawn[2]) >= 1
    assert int(drawn[1]) + int(drawn[2]) == int(page.figures()["tokens"])


@needs_chromium
def test_a_stream_can_be_stopped_and_an_error_is_shown(page: Page) -> None:
    page.open()
    page.type("#max-tokens", "150")
    page.type("#temperature", "0")
    page.driver.execute_script("""
        document.getElementById("run").click();
        requestAnimationFrame(() => document.getElementById("stop").click());
    """)
    page.until(lambda: page("#progress").text == "Stopped.")
    assert page("#run").is_enabled()
    page.run()
    page.type("#max-tokens", "100000")
    page("#run").click()
    page.until(lambda: page.all(".answer .error"))
    assert "max_tokens" in page(".answer .error").text
    assert page("#progress").text == "Failed."
    page.driver.get_log("browser")  # type: ignore[no-untyped-call]  # the browser itself notes the 400


@needs_chromium
def test_the_canary_and_its_quality_on_this_servers_traffic(page: Page, url: str) -> None:
    httpx.post(f"{url}v1/completions", json={"prompt": "a", "max_tokens": 20, "routing": "fast"}, timeout=30).raise_for_status()
    httpx.put(f"{url}admin/routing/canary", json={"policy": "fast", "share": 0.25}).raise_for_status()
    page.open()
    page.until(lambda: page("#canary").is_displayed() and "agrees with accuracy 1" in page("#canary-now").text)
    assert page("#canary-now").text.startswith("25.0 % of the requests run under fast; it agrees with accuracy 1 on ")
    assert page("#agreement-name").is_displayed()
    page.type("#max-tokens", "4")
    page.run()
    page.check_accessible()
    page("#promote").click()
    page.until(lambda: page("#current").text == "fast")
    assert not page("#canary").is_displayed()
    page("#roll-back").click()
    page.until(lambda: page("#current").text == "full")
    httpx.put(f"{url}admin/routing/canary", json={"policy": "fast", "share": 0.25}).raise_for_status()
    page.until(lambda: page("#canary").is_displayed())
    page("#end-canary").click()
    page.until(lambda: not page("#canary").is_displayed())
    assert page("#current").text == "full"


@needs_chromium
def test_two_policies_side_by_side(page: Page) -> None:
    page.open()
    page.type("#max-tokens", "60")
    page.type("#temperature", "0")
    page.choose("how", "policy")
    Select(page("#policy")).select_by_value("full")
    Select(page("#other")).select_by_value("fast")
    assert page("#compare").is_selected()
    page.run()
    assert [page.figures(answer)["policy"] for answer in (0, 1)] == ["full", "fast"]
    assert page.text(0) != page.text(1)
    assert page.all(".answer:first-child mark") and page.all(".answer:last-child mark")
    page.look("compare")
    Select(page("#other")).select_by_value("full")
    page.run()
    assert page("#progress").text == "Done: the same text."
    assert not page.all("mark")


@needs_chromium
def test_tokens_are_shaded_by_their_experts_and_tell_their_layers_choices(page: Page) -> None:
    page.open()
    page.type("#max-tokens", "30")
    page.choose("how", "policy")
    Select(page("#policy")).select_by_value("full")
    Select(page("#other")).select_by_value("fast")
    page.run()
    depths = [{token.get_attribute("style") for token in page.all(f"{one} .token")} for one in ANSWERS]
    assert depths == [{"--share: 0.550;"}, {"--share: 0.060;"}]  # two experts in every layer, and one
    for answer, experts in zip(ANSWERS, (r"experts \d, \d", r"expert \d"), strict=True):
        slider, told, tokens = page(f"{answer} .walk input"), page(f"{answer} .told"), page.all(f"{answer} .token")
        assert len(tokens) == int(slider.get_attribute("max") or 0)
        for keys, place in ((Keys.END, len(tokens)), (Keys.HOME, 1), (Keys.ARROW_RIGHT, 2)):
            slider.send_keys(keys)
            assert re.fullmatch(rf'{place}, ("[^"]*"|no text of its own): layer 0: {experts}; layer 2: {experts}', told.text)
            assert slider.get_attribute("aria-valuetext") == told.text
            assert [token for token in tokens if "now" in str(token.get_attribute("class"))] == [tokens[place - 1]]
    wide = next(place for place, token in enumerate(page.all(f"{ANSWERS[0]} .token")) if place > 2 and token.rect["width"] > 4)
    ActionChains(page.driver).move_to_element(page.all(f"{ANSWERS[0]} .token")[wide]).perform()
    page.until(lambda: page(f"{ANSWERS[0]} .told").text.startswith(f"{wide + 1}, "))


@needs_chromium
def test_tokens_are_shaded_by_what_they_refined_and_tell_the_numbers(driver: webdriver.Chrome, tmp_path: Path) -> None:
    nested = make_nested(tmp_path / "nested", num_experts=1)
    config = read_config(nested)
    rule = LayerRule(1, renormalize=False, bits=4, refine=1.0)
    write_policy(nested, RoutingPolicy("refined", "", (rule,) * config.num_hidden_layers, 4, 2.0))
    asked = {"prompt": "def f(", "max_tokens": 30, "temperature": 0, "routing": "refined", "routing_trace": True}
    with model_served(nested, access=Access(open_admin=True)) as address:
        choice = httpx.post(f"{address}/v1/completions", json=asked, timeout=30).json()["choices"][0]
        refined, refinable = (choice["routing_trace"][name] for name in ("refined", "refinable"))
        rows = [3 * sum(token[:-1]) + token[-1] for token in refined]
        page = Page(driver, f"{address}/").open()
        page.type("#prompt", "def f(")
        page.type("#max-tokens", "30")
        page.type("#temperature", "0")
        Select(page("#policy")).select_by_value("refined")
        Select(page("#other")).select_by_value("fast")
        page.run()
        tokens = page.all(f"{ANSWERS[0]} .token")
        shades = [float(str(token.get_attribute("style")).removeprefix("--share: ").removesuffix(";")) for token in tokens]
        span = max(rows) - min(rows)
        assert span and shades == pytest.approx([0.06 + 0.49 * (each - min(rows)) / span for each in rows], abs=0.001)
        assert page.figures(0)["refined rows per token"] == f"{sum(rows) / len(rows):.0f}"
        page(f"{ANSWERS[0]} .walk input").send_keys(Keys.HOME)
        numbers = [f"{count:,} of {most:,}" for count, most in zip(refined[0], refinable, strict=True)]
        said = [f"layer {layer}: {each} neurons" for layer, each in enumerate(numbers[:-1])]
        assert page(f"{ANSWERS[0]} .told").text.endswith(": " + "; ".join([*said, f"output head: {numbers[-1]} words"]))
        assert {token.get_attribute("style") for token in page.all(f"{ANSWERS[1]} .token")} == {""}  # one precision for all
        assert "nothing refined" in page(f"{ANSWERS[1]} .told").text
        legends = [legend.text for legend in page.all(".legend") if legend.is_displayed()]
        assert "shaded by what they refined" in legends[0] and page("#experts-title").text == "Refined neurons and words"

        Select(page("#heat-window")).select_by_value("start")
        page.until(lambda: "%" in page("#heat").text)
        assert page.texts("#heat tbody th") == [
            *(f"layer {layer}" for layer in range(config.num_hidden_layers)),
            "output head",
        ]
        assert page.texts("#heat thead td") == ["group"]
        total = 2 * sum(map(sum, refined))  # asked twice; the prompt's tokens refine, too

        def shown() -> int:
            found = re.fullmatch(r"([\d,]+) refined neurons and words", page("#heat-note").text)
            return int(found[1].replace(",", "")) if found else 0

        page.until(lambda: shown() > total)  # perhaps only after the next scrape
        page.look("refined")
        page.check_accessible()


@needs_chromium
def test_differences_are_words_and_whole_characters(page: Page) -> None:
    page.open()
    script = """
        const [left, right, done] = arguments;
        import("/static/playground.js").then(module => done(module.differences(left, right)));
    """
    left, right = "def größe(a): 😀 ok\n", "def größen(a): 😁 ok\n"
    marked: Any = page.driver.execute_async_script(script, left, right)
    for text, pieces in zip((left, right), marked, strict=True):
        assert "".join(piece for piece, _ in pieces) == text
    assert [[piece for piece, different in pieces if different] for pieces in marked] == [
        ["größe", "😀"],
        ["größen", "😁"],
    ]


@needs_chromium
def test_the_heatmap_shows_the_counters(page: Page) -> None:
    page.open()
    page.type("#max-tokens", "20")
    page.run()
    page.until(lambda: page.all("#heat tbody tr"))
    Select(page("#heat-window")).select_by_value("start")
    page.until(lambda: "%" in page("#heat").text)  # the next scrape
    heads, *rows = (page.texts(f"#heat tbody {one}") for one in ("th", "tr:nth-child(1) td", "tr:nth-child(2) td"))
    assert heads == ["layer 0", "layer 2"]
    assert all(len(row) == 8 for row in rows)
    assert all(abs(sum(int(cell.removesuffix(" %")) for cell in row) - 100) <= 8 for row in rows)
    Select(page("#heat-policy")).select_by_value("full")
    page.until(lambda: re.fullmatch(r"[\d,]+ choices", page("#heat-note").text))


@needs_chromium
def test_the_heatmap_greys_what_a_static_policy_leaves_out(driver: webdriver.Chrome, model: Path) -> None:
    rules = [{"top_k": 2, "experts": [1, 6]}, None, {"top_k": 1, "experts": [7]}]
    left_out = [[0, 2, 3, 4, 5, 7], [0, 1, 2, 3, 4, 5, 6]]
    with model_served(model, "--shadow-share", "1", access=Access(open_admin=True)) as address:
        page = Page(driver, f"{address}/")

        def cells(key: str) -> Any:
            # In one go: the page draws them anew every two seconds.
            return page.driver.execute_script(f"""
                const rows = [...document.querySelectorAll("#heat tbody tr")];
                return rows.map(row => [...row.cells].slice(1).map(cell => cell.{key}));
            """)

        def closed() -> list[list[int]]:
            return [[expert for expert, name in enumerate(row) if name == "closed"] for row in cells("className")]

        policy = {"name": "static", "description": "", "layers": rules}
        assert httpx.put(f"{address}/admin/routing/policies/static", json=policy).status_code < 300
        assert httpx.put(f"{address}/admin/routing/default", json={"policy": "static"}).status_code == 200
        page.open()
        page.type("#max-tokens", "20")
        page.run()
        Select(page("#heat-window")).select_by_value("start")
        page.until(lambda: closed() == left_out)  # of the default
        even = [["", "50 %", "", "", "", "", "50 %", ""], ["", "", "", "", "", "", "", "100 %"]]
        page.until(lambda: cells("textContent") == even)
        page.look("static")
        Select(page("#heat-policy")).select_by_value("full")
        page.until(lambda: closed() == [[], []])
        Select(page("#heat-policy")).select_by_value("static")
        page.until(lambda: closed() == left_out and cells("textContent") == even)
        page.check_accessible()


@needs_chromium
def test_the_default_is_swapped_and_rolled_back(page: Page) -> None:
    page.open()
    assert page("#current").text == "full"
    Select(page("#new-policy")).select_by_value("balanced")
    page("#operate .primary").click()
    page.until(lambda: "The default is now balanced" in page("#operated").text)
    assert (page("#current").text, page("#default").text) == ("balanced", "default: balanced")
    page.run()
    assert (page.figures()["policy"], page.figures()["chosen by"]) == ("balanced", "default")
    page.type("#new-accuracy", "0")
    page("#new-accuracy").send_keys(Keys.TAB)
    page("#operate .primary").click()
    page.until(lambda: page("#current").text == "accuracy 0 → fast")
    page("#roll-back").click()
    page.until(lambda: page("#current").text == "balanced")
    assert not page("#automatic").is_displayed()
    page.type("#new-ttft", "0.001")  # out of reach, so answers lower the accuracy
    page("#new-ttft").send_keys(Keys.TAB)
    page.type("#new-floor", "0.4")
    page("#operate .primary").click()
    page.until(lambda: page("#current").text.startswith("automatic, accuracy"))
    page.type("#max-tokens", "4")

    def lowered() -> bool:
        page.run()
        return "down" in page("#changes").text  # because of the wait or of the first token

    page.until(lowered)
    assert page("#automatic-now").text.startswith("Accuracy ")
    page.check_accessible()
    page("#roll-back").click()
    page.until(lambda: page("#current").text == "balanced")
    page.until(lambda: not page("#automatic").is_displayed())
    page("#roll-back").click()
    page.until(lambda: page("#current").text == "full")


@needs_chromium
def test_keys_open_what_is_closed(driver: webdriver.Chrome, model: Path) -> None:
    with model_served(model, access=Access(api_keys=["guest"], admin_key="boss")) as address:
        page = Page(driver, f"{address}/")
        driver.get(page.url)
        page.until(lambda: "API key" in page("#state").text)
        page("#keys summary").click()
        page.type("#api-key", "guest")
        page("#api-key").send_keys(Keys.TAB)
        page.until(lambda: page("#state").text == "ready" and page("#current").text == "full")
        Select(page("#new-policy")).select_by_value("fast")
        page("#operate .primary").click()
        page.until(lambda: "admin key" in page("#operated").text)
        assert page("#current").text == "full"
        page.type("#admin-key", "boss")
        page("#operate .primary").click()
        page.until(lambda: page("#current").text == "fast")


@needs_chromium
@pytest.mark.parametrize(
    ("scheme", "width"),
    [
        ("light", 1280),
        ("dark", 390),
        *(pytest.param(*look, marks=pytest.mark.long) for look in [("dark", 1280), ("light", 390)]),
    ],
)
def test_every_look_is_accessible_and_fits(page: Page, scheme: str, width: int) -> None:
    page.scheme(scheme, width)
    page.open()
    page.type("#max-tokens", "100")
    Select(page("#other")).select_by_value("fast")
    page.run()
    page.until(lambda: "%" in page("#heat").text)
    page.look(f"{scheme}-{width}")
    page.check_accessible()
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width


@needs_chromium
def test_the_api_s_page_lists_the_routes_and_asks_no_other_server(page: Page) -> None:
    page.driver.get(f"{page.url}docs")
    page.until(lambda: page.all(".opblock-summary-path"))
    paths = {element.get_attribute("data-path") for element in page.all(".opblock-summary-path")}
    assert {"/v1/completions", "/v1/chat/completions", "/health"} <= paths
    asked = page.driver.execute_script("return performance.getEntriesByType('resource').map(each => each.name)")
    assert asked
    assert all(address.startswith((page.url, "data:")) for address in asked), asked

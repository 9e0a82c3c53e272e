"""The token view: what it packs, what it refuses, and what a browser makes of it."""

import base64
import importlib.util
import json
import re
import struct
import sys
import types
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from diagnostics import criteria
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import validate_tokens
from diagnostics.core.types import Bank
from diagnostics.criteria import criterion, score_criterion, select
from diagnostics.report import token_text, token_widget, tokenview
from tests import browser, study_tables

NASTY = ["<script>", '"onload="', "&amp;", "</script>", "\n", "  ", "plain"]


def make_tops(tokens, rows, shares):
    """Likeliest tokens: the student's as given, the teacher's the other way round."""
    return pd.DataFrame(
        {
            "context_id": tokens.context_id,
            "position": tokens.position,
            "student_top": rows,
            "student_top_p": [shares] * len(rows),
            "teacher_top": [row[::-1] for row in rows],
            "teacher_top_p": [shares[::-1]] * len(rows),
        }
    )


@pytest.fixture(scope="module")
def tokens():
    table = study_tables.tokens(prompts=6, length=18)
    table.loc[: len(NASTY) - 1, "token"] = NASTY
    return table


@pytest.fixture(scope="module")
def bank(tokens):
    return study_tables.bank_of(tokens)


@pytest.fixture(scope="module")
def tops(tokens):
    return make_tops(
        tokens, [[token, "<img src=x>", "other"] for token in tokens.token], [0.6, 0.25, 0.05]
    )


def payload(view: tokenview.TokenView) -> dict:
    return json.loads(
        re.search(
            r'<script type="application/json">(.*?)</script>', view.fragment, flags=re.DOTALL
        ).group(1)
    )


def unpack(text: str, kind: str) -> np.ndarray:
    """The packed values, by a loop of its own; a criterion's are half of a 32-bit float."""
    content = base64.b64decode(text)
    if kind != tokenview.UPPER:
        return np.frombuffer(content, dtype=kind)
    pairs = [content[i : i + 2] for i in range(0, len(content), 2)]
    return np.array([struct.unpack("<f", b"\0\0" + pair)[0] for pair in pairs], dtype=np.float32)


def test_packs_the_tables_values(bank, tokens):
    data = payload(tokenview.show(bank, tokens, context=[2, 0]))
    order = [bank[2].context_id, bank[0].context_id]
    rows = pd.concat([tokens[tokens.context_id == name] for name in order])
    assert [context["id"] for context in data["contexts"]] == order
    assert data["tokens"] == rows.token.tolist()
    measures = {measure["name"]: measure for measure in data["measures"]}
    for name in ("gain", "relative_gain", "forward_kl", "student_entropy"):
        np.testing.assert_array_equal(
            unpack(measures[name]["data"], "<f4"), rows[name].to_numpy(np.float32)
        )
    teachability = pd.Series(score_criterion(tokens, "teachability"), tokens.index).loc[rows.index]
    np.testing.assert_allclose(
        unpack(measures["teachability"]["data"], measures["teachability"]["packing"]),
        teachability.to_numpy(np.float32),
        rtol=2**-8,
    )


def test_ranks_are_those_of_the_selection_over_the_whole_table(bank, tokens):
    shuffled = tokens.sample(frac=1, random_state=2)
    data = payload(tokenview.show(bank, shuffled, context=1))
    inside = (tokens.context_id == bank[1].context_id).to_numpy()
    offered = [measure for measure in data["measures"] if measure["kind"] == "criterion"]
    assert len(offered) > 10
    for measure in offered:
        name = measure["name"].removesuffix(" (criterion)")
        ranks = unpack(measure["ranks"], measure["width"])
        for share, count in data["budgets"]:
            kept = pd.Series(select(shuffled, name, budget=share), shuffled.index)
            assert ((ranks > 0) & (ranks <= count)).tolist() == kept.sort_index()[inside].tolist()


def test_scale_is_of_the_whole_table_and_symmetric_where_signed(bank, tokens):
    signed = tokens.assign(gain=tokens.gain - tokens.gain.mean())
    measures = {
        measure["name"]: measure
        for measure in payload(tokenview.show(bank, signed, context=0))["measures"]
    }
    low, high = np.percentile(tokens.forward_kl, [2, 98])
    assert (measures["forward_kl"]["low"], measures["forward_kl"]["high"]) == (low, high)
    assert measures["gain"]["low"] == -measures["gain"]["high"] and measures["gain"]["signed"]


def test_undefined_scores_have_no_rank(bank, tokens):
    holes = tokens.copy()
    holes.loc[holes.index[3], "forward_kl"] = np.nan
    measures = {
        measure["name"]: measure
        for measure in payload(tokenview.show(bank, holes, context=0))["measures"]
    }
    assert unpack(measures["teachability"]["ranks"], measures["teachability"]["width"])[3] == 0
    assert np.isnan(unpack(measures["teachability"]["data"], tokenview.UPPER)[3])


def test_the_upper_half_of_a_float_keeps_two_digits():
    values = np.array([0.0, -1.0, 3.14159, 1e-12, -7.77e8, np.nan, np.inf])
    packed = tokenview.pack(values, tokenview.UPPER)
    np.testing.assert_allclose(unpack(packed, tokenview.UPPER), values, rtol=2**-8)
    np.testing.assert_allclose(tokenview.unpack(packed, tokenview.UPPER), values, rtol=2**-8)


def test_packs_the_likeliest_tokens_of_what_is_shown(bank, tokens, tops):
    holes = tops.drop(index=2)
    holes.at[1, "student_top"], holes.at[1, "student_top_p"] = [], []
    packed = payload(tokenview.show(bank, tokens, context=0, tops=holes))["tops"]
    ids, shares = (
        unpack(packed["student"]["ids"], packed["width"]).reshape(-1, packed["k"]),
        unpack(packed["student"]["p"], "<u2"),
    )
    assert [packed["words"][i - 1] for i in ids[0]] == ["<script>", "<img src=x>", "other"]
    assert ids[1].tolist() == ids[2].tolist() == [0, 0, 0] and len(ids) == len(bank[0].response_ids)
    assert (shares.reshape(ids.shape)[0] / packed["steps"]).tolist() == pytest.approx(
        [0.6, 0.25, 0.05], abs=1e-5
    )
    teacher = unpack(packed["teacher"]["ids"], packed["width"]).reshape(ids.shape)
    assert [packed["words"][i - 1] for i in teacher[0]] == ["other", "<img src=x>", "<script>"]


def test_offers_all_criteria_and_the_users_own(bank, tokens, monkeypatch):
    monkeypatch.setattr(criteria, "_REGISTRY", dict(criteria._REGISTRY))
    monkeypatch.setattr(criteria, "_ALIASES", dict(criteria._ALIASES))

    @criterion("mine_alone", needs=["forward_kl"])
    def mine(table):
        """D again"""
        return table.forward_kl

    data = payload(tokenview.show(bank, tokens))
    names = {one["name"].removesuffix(" (criterion)") for one in data["measures"]}
    assert set(criteria.usual(tokens)) - {"full"} <= names
    measure = next(one for one in data["measures"] if one["name"] == "mine_alone")
    assert (measure["name"], measure["unit"], measure["kind"]) == (
        "mine_alone",
        "D again",
        "criterion",
    )


def test_says_how_many_contexts_and_how_they_were_chosen(bank, tokens):
    notes = [
        payload(tokenview.show(bank, tokens, **options))["note"]
        for options in ({}, {"context": 2}, {"context": [0, 1], "note": "Two of them"})
    ]
    assert notes == ["All 6 contexts", "1 of 6 contexts, chosen by the caller", "Two of them"]


def test_telling_contexts_are_the_first_and_the_extremes(bank, tokens):
    table = tokens.assign(gain=0.01, forward_kl=0.1)
    for context, gain, divergence in ((5, 0.9, 0.5), (3, -0.8, 0.5), (4, 0.0, 3.0)):
        row = tokens.index[tokens.context_id == bank[context].context_id][2]
        table.loc[row, ["gain", "forward_kl"]] = gain, divergence
    assert tokenview.telling_contexts(bank, table, 2)[0] == [0, 5]
    assert tokenview.telling_contexts(bank, table, 3)[0] == [0, 1, 5]
    shown, note = tokenview.telling_contexts(bank, table, 4)
    assert shown == [0, 1, 3, 5]
    assert note.startswith("4 of 6 contexts: 2 are the first of the bank, the others hold")
    assert tokenview.telling_contexts(bank, table, 5)[0] == [0, 1, 2, 3, 5]
    assert tokenview.telling_contexts(bank, table, 9) == (list(range(6)), "All 6 contexts")
    unprobed = table.drop(columns="gain")
    assert tokenview.telling_contexts(bank, unprobed, 2) == (
        [0, 1],
        "2 of 6 contexts, the first of the bank",
    )


def judged(bank):
    """The bank with its first two contexts right, the third wrong, the others not judged."""
    verdicts = [True, True, False, *[None] * (len(bank) - 3)]
    both = zip(bank, verdicts, strict=True)
    return Bank(tuple(replace(context, correct=verdict) for context, verdict in both))


def test_right_and_wrong_responses_are_shown_apart(bank, tokens):
    held = judged(bank)
    every = payload(tokenview.show(held, tokens))
    assert [context["correct"] for context in every["contexts"]][:4] == [True, True, False, None]
    for correct, expected in ((True, [0, 1]), (False, [2])):
        found = payload(tokenview.show(held, tokens, correct=correct))
        assert [one["id"] for one in found["contexts"]] == [held[i].context_id for i in expected]
        assert found["total"] == len(tokens), "scales and ranks are those of the whole table"
        assert found["note"] == f"{len(expected)} of {len(bank)} contexts, the first of the bank"
    with pytest.raises(DiagnosticsError) as caught:
        tokenview.show(bank, tokens, correct=True)
    assert str(caught.value) == (
        f"No context is right: 0 of {len(bank)} were judged. Leave `correct` out, or judge the"
        " responses with --verifier."
    )


def test_prints_in_color_only_where_escapes_are_read(bank, tokens, monkeypatch):
    view = tokenview.show(bank, tokens, context=0)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    plain = str(view)  # pytest's standard output is no terminal
    assert "\x1b" not in plain and plain.startswith("1 of 6 contexts, chosen by the caller; col")
    monkeypatch.setenv("FORCE_COLOR", "1")
    colored = str(view)
    assert colored.count("\x1b[30;48;2;") > 5
    assert re.sub(r"\x1b\[[\d;]*m", "", colored) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert str(view) == plain and len(repr(view)) < 100


def test_a_token_cannot_steer_the_terminal():
    text = token_text.printable("a\x1b[2J\x07\u202eb\n\t")
    assert text == "a·[2J··b⏎⇥"


def luminance(color) -> float:
    """Relative luminance of an sRGB color of 0 to 255 (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color / 255]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def contrast(one, other) -> float:
    high, low = sorted((luminance(np.asarray(one)), luminance(np.asarray(other))), reverse=True)
    return (high + 0.05) / (low + 0.05)


def themes() -> dict[str, list[np.ndarray]]:
    """The colors of the view's style sheet, light and dark."""
    sheet = (tokenview.STATIC / "tokenview.css").read_text(encoding="utf-8")
    found = re.findall(r"--tv-(\w+): light-dark\(#(\w{6}), #(\w{6})\)", sheet)
    return {name: [np.array(list(bytes.fromhex(c)), float) for c in both] for name, *both in found}


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize("end", ["high", "low"])
def test_every_cell_can_be_read(theme, end):
    colors = {name: both[theme] for name, both in themes().items()}
    for strength in np.linspace(0, 1, 101):
        cell = strength * colors[end] + (1 - strength) * colors["paper"]
        assert contrast(colors["ink"], cell) >= 4.5
    assert contrast(colors["quiet"], colors["paper"]) >= 4.5  # the rest of a selection
    assert contrast(colors["quiet"], colors["panel"]) >= 4.5


@pytest.mark.parametrize("share", np.linspace(-1, 1, 41))
def test_printed_cells_can_be_read(share):
    assert contrast(np.zeros(3), np.array(token_text.tint(share), float)) >= 4.5


def test_a_widget_needs_anywidget_and_says_so(bank, tokens):
    if importlib.util.find_spec("anywidget"):
        pytest.skip("anywidget is installed")
    with pytest.raises(DiagnosticsError, match=r"needs anywidget .* Install it with `pip install"):
        tokenview.show(bank, tokens).widget()


def test_a_widget_holds_the_view_and_its_selection(bank, tokens, monkeypatch):
    class Widget:
        def __init__(self, **traits):
            vars(self).update(traits)

    trait = types.SimpleNamespace(tag=lambda **options: options)
    kinds = types.SimpleNamespace(Unicode=lambda: trait, List=lambda: trait)
    monkeypatch.setitem(sys.modules, "anywidget", types.SimpleNamespace(AnyWidget=Widget))
    monkeypatch.setitem(sys.modules, "traitlets", kinds)
    view = tokenview.show(bank, tokens, context=0)
    widget = view.widget()
    assert widget.fragment == view.fragment and type(widget).selection == {"sync": True}
    assert type(widget)._esm.startswith(tokenview.script()) and type(widget)._css


def test_text_never_becomes_markup(bank, tokens, tops):
    view = tokenview.show(bank, tokens, tops=tops)
    body = view.fragment
    assert body.count("<script") == 1 and "<img" not in body and "<b>" not in body
    assert payload(view)["tokens"][: len(NASTY)] == NASTY
    assert "<script>" not in view._repr_html_() and 'sandbox="allow-scripts"' in view._repr_html_()


def test_page_is_one_file_without_addresses(bank, tokens, tmp_path):
    view = tokenview.show(bank, tokens)
    path = view.save(tmp_path / "view.html")
    assert path.read_text(encoding="utf-8") == view.html
    assert not re.search(r"https?://|@import|url\(|src=|href=", view.html)
    assert tokenview.show(bank, tokens).html == view.html


def test_fifty_long_contexts_with_all_criteria_stay_under_two_and_a_half_megabytes():
    rng, count, length = np.random.default_rng(0), 50, 192
    size = count * length
    frame = pd.DataFrame(
        {
            "context_id": np.repeat([f"context-{i:04d}" for i in range(count)], length),
            "position": np.tile(np.arange(length), count),
            "response_length": length,
            "token_id": rng.integers(0, 50_000, size),
            "token": [f" token{i}" for i in rng.integers(0, 5000, size)],
            **{
                name: rng.normal(size=size)
                for name in ("gain", "relative_gain", "advantage", "first_order_gain")
            },
            **{
                name: rng.random(size)
                for name in (
                    "forward_kl",
                    "reverse_kl",
                    "student_entropy",
                    "teacher_entropy",
                    "compatibility",
                )
            },
        }
    )
    frame["prompt_id"] = frame.context_id
    frame = validate_tokens(frame)
    tops = make_tops(
        frame,
        [[f" token{i}" for i in row] for row in rng.integers(0, 5000, (size, 5))],
        [0.5, 0.3, 0.1, 0.05, 0.01],
    )
    assert (
        len(tokenview.show(study_tables.bank_of(frame), frame, tops=tops).html.encode()) < 2_500_000
    )


def test_refusals(bank, tokens):
    with pytest.raises(DiagnosticsError) as error:
        tokenview.show(bank, tokens, context=6)
    assert (
        str(error.value)
        == "There is no context 6: the bank holds 6, from 'c0' to 'c5'. Give an index, a"
        " context_id, or a list of them."
    )
    with pytest.raises(DiagnosticsError) as error:
        tokenview.show(bank, tokens, context=["c1", "nobody"])
    assert (
        str(error.value)
        == "There is no context 'nobody': the bank holds 6, from 'c0' to 'c5'. Give an index, a"
        " context_id, or a list of them."
    )
    with pytest.raises(DiagnosticsError) as error:
        tokenview.show(
            bank,
            tokens[
                [
                    "context_id",
                    "prompt_id",
                    "position",
                    "response_length",
                    "token_id",
                    "token",
                    "forward_kl",
                    "gain",
                ]
            ],
            color="mood",
        )
    assert (
        str(error.value)
        == "No measurement or criterion to color by is named 'mood'. This table can show"
        " gain, forward_kl, divergence, random, random_divergent, early, late, position_weight."
    )
    with pytest.raises(DiagnosticsError) as error:
        tokenview.show(bank, tokens.iloc[1:])
    length = len(bank[0].response_ids)
    assert (
        str(error.value)
        == f"The token table has {length - 1} positions for context 'c0', whose response has"
        f" {length}. Pass the table that was scored from this bank."
    )


@browser.needed
def test_in_a_browser(bank, tokens, tops, tmp_path):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    path = tokenview.show(bank, tokens, tops=tops).save(tmp_path / "view.html")
    with browser.chromium(tmp_path / "profile") as driver:
        driver.get(path.as_uri())
        one, every = (
            (lambda css: driver.find_element(By.CSS_SELECTOR, css)),
            (lambda css: driver.find_elements(By.CSS_SELECTOR, css)),
        )
        spans = every(".t")
        assert len(spans) == len(tokens)
        assert [span.get_attribute("textContent") for span in spans[:7]] == [
            "<script>",
            '"onload="',
            "&amp;",
            "</script>",
            "⏎",
            "␣␣",
            "plain",
        ]
        assert one(".prompt").text == "What <b>is</b> c0?"

        # switch the colour
        before = [span.value_of_css_property("background-color") for span in spans[:12]]
        Select(one(".bar select")).select_by_value("student_entropy")
        assert [span.value_of_css_property("background-color") for span in spans[:12]] != before
        ends = np.percentile(tokens.student_entropy, [2, 98])
        assert [
            float(text) for text in re.findall(r"\d\S*", one(".scale").text)[:2]
        ] == pytest.approx(ends.tolist(), rel=0.006)

        # the slider outlines the selection
        for _ in range(3):
            one(".bar input[type=range]").send_keys(Keys.ARROW_RIGHT)
        chosen = [
            i for i, span in enumerate(every(".t")) if "selected" in span.get_attribute("class")
        ]
        assert chosen == np.flatnonzero(select(tokens, "teachability", budget=0.3)).tolist()
        assert one("output").text.startswith(f"30%: {len(chosen)} of {len(tokens)}")

        # hover
        ActionChains(driver).move_to_element(spans[6]).perform()
        panel = one(".panel").text
        assert (
            panel.startswith("plain · position 6 of c0")
            and "forward KL" in panel
            and "rank" in panel
        )
        assert (
            one(".panel .student th .token").text == "plain"
            and one(".panel .student td").text == "0.600"
        )
        assert "<img src=x>" in one(".panel .teacher").text

        # previous and next by gain, by buttons and keys
        ordered = np.argsort(-tokens.gain.to_numpy(), kind="stable")
        one(".next").click()
        assert int(one(".t.current").get_attribute("data-i")) == ordered[0]
        driver.switch_to.active_element.send_keys("n")
        assert int(one(".t.current").get_attribute("data-i")) == ordered[1]
        driver.switch_to.active_element.send_keys(
            "p", Keys.ARROW_RIGHT if ordered[0] + 1 < len(tokens) else Keys.ARROW_LEFT
        )
        assert abs(int(one(".t.current").get_attribute("data-i")) - ordered[0]) == 1
        Select(one(".order")).select_by_value("low")
        for expected in (ordered[-1], ordered[-2]):
            one(".next").click()
            assert int(one(".t.current").get_attribute("data-i")) == expected

        # search
        one("input[type=search]").send_keys("PLAIN", Keys.ENTER)
        assert [int(span.get_attribute("data-i")) for span in every(".t.found")] == [6]
        assert (
            one(".found-count").text == "1 found"
            and one(".t.current").get_attribute("data-i") == "6"
        )

        # numbers stand under the tokens for who does not see the colours
        one(".with-numbers").click()
        assert (
            every(".t")[6].get_attribute("data-n")
            == f"{float(f'{tokens.student_entropy[6]:.3g}'):g}"
        )

        # every cell can be read, its number too, in both themes
        for theme in ("light", "dark"):
            driver.execute_script(f"document.documentElement.style.colorScheme = '{theme}'")
            for measure in ("gain", "forward_kl"):
                Select(one(".bar select")).select_by_value(measure)
                assert min(driver.execute_script(CONTRASTS)) >= 4.5

        # print keeps the colors, though backgrounds are not printed
        fills = set().union(*map(browser.fills, browser.printed(driver)))
        assert sum(max(fill) - min(fill) > 0.15 for fill in fills) > 3

        assert browser.complaints(driver) == []
        assert browser.outside_requests(driver) == []


CONTRASTS = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function pixel(...layers) {
  for (const layer of layers) { canvas.fillStyle = layer; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
}
const light = ([r, g, b]) => 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
const paper = getComputedStyle(document.querySelector(".tokenview")).backgroundColor;
return [...document.querySelectorAll(".t")].flatMap((t) => ["", "::after"].map((part) => {
  const back = light(pixel(paper, getComputedStyle(t).backgroundColor));
  const ink = light(pixel(getComputedStyle(t, part).color));
  return Math.max(back, ink) / Math.min(back, ink);
}));
"""
"""Contrast of each token and of its number with what lies behind, as the browser draws them."""


@browser.needed
@pytest.mark.parametrize("width", [1440, 390])
def test_comparing_in_a_browser(bank, tokens, tmp_path, width):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    advantage = np.random.default_rng(5).normal(size=len(tokens))
    table = tokens.assign(advantage=advantage)
    path = tokenview.show(bank, table).save(tmp_path / "view.html")
    with browser.chromium(tmp_path / "profile", width=max(width, 600)) as driver:
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        driver.get(path.as_uri())
        one, every = (
            (lambda css: driver.find_element(By.CSS_SELECTOR, css)),
            (lambda css: driver.find_elements(By.CSS_SELECTOR, css)),
        )

        def classed(side: int, name: str) -> list[int]:
            return driver.execute_script(
                "const [side, name] = arguments;"
                "return [...document.querySelectorAll('.pair')].flatMap((pair) =>"
                " [...pair.children[side].querySelectorAll('.t')])"
                ".filter((t) => t.classList.contains(name)).map((t) => Number(t.dataset.i))",
                side,
                name,
            )

        assert one(".note").text.startswith("All 6 contexts.")
        hint = one(".panel")  # as high as its hint until a token is pointed at
        assert hint.text.startswith("Point at a token") and hint.size["height"] < 70
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width

        # two criteria side by side, each with its own selection
        slider = one(".bar input[type=range]")
        driver.execute_script(
            "arguments[0].value = 8; arguments[0].dispatchEvent(new Event('input'))", slider
        )
        Select(every(".bar select")[2]).select_by_value("entropy")
        assert len(every(".t")) == 2 * len(tokens)
        chosen = [
            np.flatnonzero(select(table, name, budget=0.2)).tolist()
            for name in ("teachability", "entropy")
        ]
        assert [classed(0, "selected"), classed(1, "selected")] == chosen
        shared = len(set(chosen[0]) & set(chosen[1]))
        assert one("output").text.endswith(
            f"{len(chosen[0])} and {len(chosen[1])} shown, {shared} in both"
        )
        assert [w.text for w in every(".which")[:2]] == ["teachability", "entropy"]

        # the selection by the sign of the advantage, the rest grey
        one(".by-sign").click()
        rest = sorted(set(range(len(tokens))) - set(chosen[1]))
        assert classed(1, "rest") == rest
        backs = driver.execute_script(
            "return [...document.querySelectorAll('.pair')].flatMap((pair) =>"
            " [...pair.children[1].querySelectorAll('.t')]).map((t) => t.style.backgroundColor)"
        )
        low = ["--tv-low" in backs[i] for i in chosen[1]]
        assert low == (advantage[chosen[1]] < 0).tolist()
        assert {backs[i] for i in rest} == {""}
        one(".by-sign").click()
        Select(every(".bar select")[2]).select_by_value("")
        assert not any(span.is_displayed() for span in every(".response + .response .t")[:3])

        # before and after in one place
        driver.execute_script("document.querySelectorAll('.t')[3].click()")
        was, fell = tokens.forward_kl[3], tokens.gain[3]
        line = one(".panel .change tr").text
        numbers = [float(x.replace("−", "-")) for x in re.findall(r"−?[\d.]+(?:e−?\d+)?", line)]
        assert numbers == pytest.approx([was, was - fell, fell], rel=0.06, abs=1e-6)

        # the list of extremes, sorted by a head, jumps to its place
        one(".extremes summary").click()
        gain, divergence = tokens.gain.to_numpy(), tokens.forward_kl.to_numpy()
        large = np.flatnonzero(divergence >= np.quantile(divergence, 0.9))
        expected = {
            "gained": np.argsort(-gain, kind="stable"),
            "lost": [i for i in np.argsort(gain, kind="stable") if gain[i] < 0],
            "stuck": large[np.argsort(np.abs(gain[large]), kind="stable")],
        }
        for kind, places in expected.items():
            Select(one(".extreme")).select_by_value(kind)
            jumps = every(".extremes .jump")
            assert len(jumps) == min(12, len(places))
            for at in (0, len(jumps) - 1)[: len(jumps)]:
                driver.execute_script("arguments[0].click()", jumps[at])
                assert int(one(".t.current").get_attribute("data-i")) == places[at]
        every(".extremes th button")[2].click()  # by forward KL, the largest first
        driver.execute_script("arguments[0].click()", one(".extremes .jump"))
        first = int(one(".t.current").get_attribute("data-i"))
        assert divergence[first] == max(divergence[expected["stuck"][:12]])
        assert browser.complaints(driver) == [] and browser.outside_requests(driver) == []


@browser.needed
def test_a_browser_hides_the_responses_of_another_verdict(bank, tokens, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    held = judged(bank)
    page = tokenview.show(held, tokens, color="gain").save(tmp_path / "view.html")
    with browser.chromium(tmp_path / "profile") as driver:
        driver.get(page.as_uri())
        articles = driver.find_elements(By.CSS_SELECTOR, "article")
        heads = [one.find_element(By.CSS_SELECTOR, "header").text for one in articles]
        assert [head.rsplit(" · ", 1)[1] for head in heads[:3]] == ["right", "right", "wrong"]
        menu = Select(driver.find_element(By.CSS_SELECTOR, "select.verdict"))
        for value, shown in (("false", [2]), ("true", [0, 1]), ("", range(len(bank)))):
            menu.select_by_value(value)
            assert [i for i, one in enumerate(articles) if one.is_displayed()] == list(shown)
        menu.select_by_value("false")
        driver.find_element(By.CSS_SELECTOR, "button.next").click()
        current = driver.find_element(By.CSS_SELECTOR, ".t.current")
        assert current.find_element(By.XPATH, "./ancestor::article") == articles[2]
        own = tokens[tokens.context_id == held[2].context_id].gain
        assert int(current.get_attribute("data-i")) == own.idxmax()
        assert browser.complaints(driver) == []
        driver.get(tokenview.show(bank, tokens).save(tmp_path / "plain.html").as_uri())
        assert driver.find_elements(By.CSS_SELECTOR, "select.verdict") == []


@browser.needed
def test_a_widget_in_a_browser_hands_back_what_is_clicked(bank, tokens, tmp_path):
    view = tokenview.show(bank, tokens, context=0)
    module = (tokenview.script() + token_widget.RENDER).replace("export default", "const widget =")
    page = (
        '<!doctype html><meta charset="utf-8"><div id="here"></div><script>'
        f"{module}; window.state = {{ fragment: {tokenview.script_json(view.fragment)},"
        " selection: [] };"
        "widget.render({ el: document.getElementById('here'), model: { get: (k) => state[k],"
        " set: (k, v) => { state[k] = v; }, save_changes: () => { state.saved = true; } } });"
        "</script>"
    )
    path = tmp_path / "widget.html"
    path.write_text(page, encoding="utf-8")
    with browser.chromium(tmp_path / "profile") as driver:
        driver.get(path.as_uri())
        driver.execute_script("document.querySelectorAll('.t')[6].click()")
        first = {"context_id": "c0", "position": 6, "token": "plain"}
        assert driver.execute_script("return [state.selection, state.saved]") == [[first], True]
        driver.execute_script(
            "document.querySelectorAll('.t')[2].dispatchEvent("
            "new MouseEvent('click', { bubbles: true, shiftKey: true }))"
        )
        second = {"context_id": "c0", "position": 2, "token": "&amp;"}
        assert driver.execute_script("return state.selection") == [first, second]
        driver.execute_script("document.querySelectorAll('.t')[3].click()")
        assert [one["position"] for one in driver.execute_script("return state.selection")] == [3]
        assert browser.complaints(driver) == []

"""The token view: what it packs, what it refuses, and what a browser makes of it."""

import base64
import json
import re

import numpy as np
import pandas as pd
import pytest

from diagnostics import criteria
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import validate_tokens
from diagnostics.criteria import criterion, score_criterion, select
from diagnostics.report import tokenview
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
    return np.frombuffer(base64.b64decode(text), dtype=kind)


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
    np.testing.assert_array_equal(
        unpack(measures["teachability"]["data"], "<f4"), teachability.to_numpy(np.float32)
    )


def test_ranks_are_those_of_the_selection_over_the_whole_table(bank, tokens):
    data = payload(tokenview.show(bank, tokens.sample(frac=1, random_state=2), context=1))
    inside = (tokens.context_id == bank[1].context_id).to_numpy()
    for measure in (measure for measure in data["measures"] if measure["kind"] == "criterion"):
        name, ranks = (
            measure["name"].removesuffix(" (criterion)"),
            unpack(measure["ranks"], measure["width"]),
        )
        for share, count in data["budgets"]:
            if (
                name != "compatibility"
            ):  # its ties at the clip are broken by row, and the rows were shuffled
                assert ((ranks > 0) & (ranks <= count)).tolist() == select(
                    tokens, name, budget=share
                )[inside].tolist()


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
    assert np.isnan(unpack(measures["teachability"]["data"], "<f4")[3])


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


def test_shows_a_users_criterion(bank, tokens, monkeypatch):
    monkeypatch.setattr(criteria, "_REGISTRY", dict(criteria._REGISTRY))
    monkeypatch.setattr(criteria, "_ALIASES", dict(criteria._ALIASES))

    @criterion("mine_alone", needs=["forward_kl"])
    def mine(table):
        """D again"""
        return table.forward_kl

    measure = payload(tokenview.show(bank, tokens))["measures"][-1]
    assert (measure["name"], measure["unit"], measure["kind"]) == (
        "mine_alone",
        "D again",
        "criterion",
    )


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


def test_fifty_long_contexts_stay_under_two_megabytes():
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
        len(tokenview.show(study_tables.bank_of(frame), frame, tops=tops).html.encode()) < 2_000_000
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
        == "Nothing to colour by under the name 'mood'. This table can show gain, forward_kl,"
        " divergence."
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
        one("input[type=checkbox]").click()
        assert (
            every(".t")[6].get_attribute("data-n")
            == f"{float(f'{tokens.student_entropy[6]:.3g}'):g}"
        )

        assert browser.complaints(driver) == []
        assert browser.outside_requests(driver) == []

"""Lists of likeliest tokens in released tables: what they say of the two supports."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from diagnostics.contexts.import_tokens import read_tokens
from diagnostics.contexts.released_lists import measure_lists, read_lists


def rows(lists, token_id=0, **columns):
    """A training bank with lists: one response, one row per (student, teacher) pair of lists."""
    count = len(lists)
    frame = pd.DataFrame(
        {
            "schema_version": 1,
            "sample_index": 0,
            "group_index": 0,
            "tok_pos": range(count),
            "token_id": token_id,
        }
    )
    for side, model in enumerate(("student", "teacher")):
        frame[f"{model}_top_ids"] = [json.dumps([i for i, _ in pair[side]]) for pair in lists]
        frame[f"{model}_top_logps"] = [
            json.dumps([math.log(p) for _, p in pair[side]]) for pair in lists
        ]
    return frame.assign(**columns)


def read(frame, tmp_path, name="rollout_000000.csv"):
    frame.to_csv(tmp_path / name, index=False)
    return read_tokens(tmp_path / name)


ONE = ([(5, 0.5), (6, 0.25)], [(6, 0.6), (7, 0.2)])
SAME = ([(5, 0.5), (6, 0.25)], [(6, 0.6), (5, 0.2)])


def test_a_position_worked_by_hand(tmp_path):
    tokens = read(rows([ONE], token_id=7), tmp_path)
    row = tokens.iloc[0]
    assert tokens.attrs["k"] == 2 and row.topk_overlap == 0.5
    assert row.topk_jaccard == pytest.approx(1 / 3)
    assert row.shared_student_mass == pytest.approx(0.25)
    assert row.compatibility_intersection == pytest.approx(0.6)
    assert row.student_margin == pytest.approx(0.25)
    assert row.student_topk_mass == pytest.approx(0.75)
    assert row.teacher_topk_mass == pytest.approx(0.8)
    # p renormalised: 2/3, 1/3; q: 3/4, 1/4
    assert row.student_entropy_topk == pytest.approx(math.log(3) - 2 / 3 * math.log(2))
    assert row.teacher_entropy_topk == pytest.approx(2 * math.log(2) - 0.75 * math.log(3))
    assert not row.top1_match and row.teacher_top1_in_topk and not row.sampled_in_topk
    assert row.sampled_in_teacher_topk and not row.student_top1_in_teacher_top5
    # On the union {5, 6, 7}: p = 2/3, 1/3, 1e-12 and q = 1e-12, 3/4, 1/4
    expected = 0.75 * math.log(0.75 * 3) + 0.25 * math.log(0.25e12)
    assert row.union_forward_kl_released == pytest.approx(expected, abs=1e-9)
    assert row.bhattacharyya_released == pytest.approx(0.5, abs=2e-6)
    assert not {"union_forward_kl", "bhattacharyya", "compatibility"} & set(tokens)


def test_lists_of_the_same_tokens_are_exact_on_the_union(tmp_path):
    tokens = read(rows([SAME, SAME, ONE]), tmp_path)
    p, q = np.array([2 / 3, 1 / 3]), np.array([0.25, 0.75])
    row, ratio = tokens.iloc[0], np.log(q / p)
    assert row.union_forward_kl == pytest.approx((q * ratio).sum())
    assert row.union_reverse_kl == pytest.approx(-(p * ratio).sum())
    assert row.bhattacharyya == pytest.approx(np.sqrt(p * q).sum())
    variance = (p * ratio**2).sum() - (p * ratio).sum() ** 2
    assert row.union_log_ratio_variance == pytest.approx(variance)
    assert row.compatibility == pytest.approx(0.8)
    assert tokens.union_forward_kl.isna().tolist() == [False, False, True]
    # At most positions the union is unknown: a criterion would take the few for all.
    assert "union_forward_kl" not in read(rows([SAME, ONE, ONE]), tmp_path)


def slow(student, teacher, k):
    """The same by plain loops, of one position."""
    p, q = dict(student), dict(teacher)
    both = [i for i in p if i in q]
    union = [*p, *(i for i in q if i not in p)]
    found = {
        "topk_overlap": len(both) / k,
        "topk_jaccard": len(both) / len(union),
        "shared_student_mass": sum(p[i] for i in both),
        "compatibility_intersection": sum(q[i] for i in both),
        "student_entropy_topk": -sum(
            x / sum(p.values()) * math.log(x / sum(p.values())) for x in p.values()
        ),
        "top1_match": float(max(p, key=p.get) == max(q, key=q.get)),
        "teacher_top1_in_topk": float(max(q, key=q.get) in p),
        "student_top1_in_teacher_top5": float(
            max(p, key=p.get) in sorted(q, key=q.get, reverse=True)[:5]
        ),
    }
    floored = [
        (max(p.get(i, 0) / sum(p.values()), 1e-12), max(q.get(i, 0) / sum(q.values()), 1e-12))
        for i in union
    ]
    found["union_forward_kl_released"] = sum(b * math.log(b / a) for a, b in floored)
    found["union_reverse_kl_released"] = sum(a * math.log(a / b) for a, b in floored)
    found["bhattacharyya_released"] = sum(math.sqrt(a * b) for a, b in floored)
    return found


def test_lists_agree_with_plain_loops():
    rng = np.random.default_rng(3)

    def some(length):
        ids = rng.choice(20, length, replace=False).tolist()
        return list(zip(ids, (rng.dirichlet(np.ones(length)) * 0.9).tolist(), strict=True))

    lists = [(some(8), some(8)) for _ in range(60)] + [(some(3), some(8))]
    frame = rows(lists)
    student, teacher = (read_lists(frame, model) for model in ("student", "teacher"))
    made = measure_lists(student, teacher, None, k=8)
    for n, pair in enumerate(lists):
        for name, value in slow(*pair, 8).items():
            assert made[name][n] == pytest.approx(value, abs=1e-12), (n, name)


def test_what_is_no_list_is_counted(tmp_path):
    frame = rows([ONE, ONE, ONE])
    frame.loc[0, "student_top_ids"] = "[5, 6"
    frame.loc[1, "teacher_top_ids"] = None
    frame.loc[1, "teacher_top_logps"] = None
    tokens = read(frame, tmp_path)
    assert tokens.topk_overlap.isna().tolist() == [True, True, False]
    notes = {code: message for code, _, message in tokens.attrs["warnings"]}
    assert notes["lists"].startswith(
        "2 of 3 positions have no list of both models, 1 of them for lists that cannot be read"
    )


@pytest.mark.parametrize(
    "ids, logps",
    [
        ("[5, 5]", "[-1.0, -1.0]"),
        ("[5, 6]", "[-0.1, -0.1]"),
        ("[5, 6.5]", "[-1.0, -2.0]"),
        ("[5, -6]", "[-1.0, -2.0]"),
        ("[5, NaN]", "[-1.0, -2.0]"),
        ("[5, 1e99]", "[-1.0, -2.0]"),
        ("[5, 6]", "[-1.0]"),
        ("[5, 6]", "[0.5, -9.0]"),
        ('{"a": 1}', "[-1.0]"),
        ("[[5], [6]]", "[-1.0, -2.0]"),
        ("7", "-1.0"),
        ("[" * 10**5, "[-1.0]"),
    ],
)
def test_what_cannot_be_a_list_is_unreadable(ids, logps):
    frame = rows([ONE, ONE])
    frame.loc[1, ["student_top_ids", "student_top_logps"]] = ids, logps
    student = read_lists(frame, "student")
    assert student.unreadable == 1 and student.length_N.tolist() == [2, 0]


def test_a_token_without_a_probability_is_not_in_the_list():
    frame = rows([ONE])
    frame.loc[0, "student_top_logps"] = "[-Infinity, NaN]"
    frame.loc[0, "teacher_top_logps"] = "[-0.5, -Infinity]"
    assert read_lists(frame, "student").length_N.tolist() == [0]
    assert read_lists(frame, "teacher").ids_NK.tolist() == [[6, -1]]


def test_a_bank_without_raw_lists_reads_as_before(tmp_path):
    frame = rows([ONE, ONE], Coverlap=[0.5, 0.25]).assign(
        **{f"{m}_top_{what}": "" for m in ("student", "teacher") for what in ("ids", "logps")}
    )
    tokens = read(frame, tmp_path)
    assert tokens.topk_overlap.tolist() == [0.5, 0.25] and "lists" not in dict(
        note[:2] for note in tokens.attrs["warnings"]
    )


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_lists_open_in_every_format(tmp_path, kind):
    frame = rows([ONE, SAME])
    path = tmp_path / f"bank.{kind}"
    if kind == "csv":
        frame.to_csv(path, index=False)
    else:
        names = [name for name in frame if "_top_" in name]
        frame = frame.assign(**{name: frame[name].map(json.loads) for name in names})
        save = {
            "jsonl": lambda: frame.to_json(path, orient="records", lines=True),
            "parquet": lambda: frame.to_parquet(path),
        }
        save[kind]()
    tokens = read_tokens(path)
    np.testing.assert_allclose(tokens.topk_overlap, [0.5, 1.0])
    np.testing.assert_allclose(tokens.compatibility_intersection, [0.6, 0.8])

"""A top-K teacher: bounds, files, and lists that cannot be used."""

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.contexts.rollouts import rollout
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import sha256_file
from diagnostics.core.schema import SCHEMA, column
from diagnostics.core.types import read_bank
from diagnostics.measure.losses import chunked_loss
from diagnostics.models import topk_teacher
from diagnostics.models.pair import Pair, load_pair
from diagnostics.models.topk_teacher import Lists, TopKTeacher, read_lists, unpacked
from diagnostics.pipeline.cli import main
from diagnostics.probing import scores
from diagnostics.probing.attribution import attribute
from diagnostics.probing.intervention import interventions
from diagnostics.probing.one_step import probe
from diagnostics.probing.scores import score
from diagnostics.training.run import train
from tests.conftest import make_bank, make_prompts
from tests.contexts.factories import jsonl

V = 64


def teacher_rows(pair, bank, k, *, sampled=False):
    """What a server would return: for each context the k likeliest ids with ln q in float64, the
    sampled token appended on wish.
    """
    rows = []
    for context in bank:
        with torch.no_grad():
            q = (
                pair.teacher.model(input_ids=torch.tensor([context.ids]))
                .logits[0]
                .double()
                .log_softmax(-1)
            )
        first = len(context.prompt_ids) - 1
        ids, values = [], []
        for t, token in enumerate(context.response_ids):
            top = q[first + t].topk(k)
            here = top.indices.tolist() + (
                [token] if sampled and token not in top.indices.tolist() else []
            )
            ids.append(here), values.append(q[first + t][here].tolist())
        rows.append(
            {
                "context_id": context.context_id,
                "response_ids": list(context.response_ids),
                "top_ids": ids,
                "top_logprobs": values,
            }
        )
    return rows


def listed(pair, bank, k, tmp_path, **options):
    """The pair with lists in the teacher's place."""
    path = jsonl(tmp_path / f"top{k}{len(options)}.jsonl", *teacher_rows(pair, bank, k, **options))
    return dataclasses.replace(pair, teacher=read_lists(path, vocabulary=V))


def bare(ids, ln_q):
    """A teacher of one list per position."""
    return torch.cat(
        [torch.tensor(ids, dtype=torch.float64), torch.tensor(ln_q, dtype=torch.float64)], 1
    )


# --- by hand


def test_three_tokens_and_a_bucket_by_hand():
    """q = (1/2, 1/4 | 1/4 in the bucket), p = (0.4, 0.3 | 0.2, 0.1 in it), y the first token, K =
    2.
    """
    student = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    out = topk_teacher.measure_hidden(
        student,
        lambda h: h,
        bare([[0, 1]], [[math.log(0.5), math.log(0.25)]]),
        torch.tensor([0]),
        depth=2,
        k=2,
        sweep=(),
    )
    found = {name: float(values[0]) for name, values in out.items()}
    assert found["forward_kl"] == pytest.approx(
        0.5 * math.log(0.5 / 0.4) + 0.25 * math.log(0.25 / 0.3) + 0.25 * math.log(0.25 / 0.3)
    )
    assert found["reverse_kl"] == pytest.approx(
        0.4 * math.log(0.4 / 0.5) + 0.3 * math.log(0.3 / 0.25) + 0.3 * math.log(0.3 / 0.25)
    )
    m = (0.45, 0.275, 0.275)
    assert found["js"] == pytest.approx(
        sum(
            0.5 * a * math.log(a / c) + 0.5 * b * math.log(b / c)
            for a, b, c in zip((0.5, 0.25, 0.25), (0.4, 0.3, 0.3), m)
        )
    )
    assert found["hellinger"] == pytest.approx(math.sqrt(1 - math.sqrt(0.2) - 2 * math.sqrt(0.075)))
    assert found["teacher_entropy"] == pytest.approx(1.5 * math.log(2)) and found[
        "teacher_tail_mass"
    ] == pytest.approx(0.25)
    assert found["compatibility"] == pytest.approx(0.75) and found[
        "compatibility_intersection"
    ] == pytest.approx(0.75)
    assert (
        found["teacher_logprob"] == pytest.approx(math.log(0.5))
        and found["acceptance"] == 1
        and found["student_logprob"] == pytest.approx(math.log(0.4))
    )
    assert (
        found["topk_overlap"]
        == found["top1_match"]
        == found["teacher_top1_in_topk"]
        == found["sampled_in_teacher_topk"]
        == 1
    )
    p, q = (4 / 7, 3 / 7), (2 / 3, 1 / 3)
    assert found["union_forward_kl"] == pytest.approx(
        sum(b * math.log(b / a) for a, b in zip(p, q))
    )
    assert not {"student_top1_in_teacher_top5", "teacher_dropped_mass"} & set(found)


def test_an_unlisted_token_is_undefined_and_an_unlisted_top_makes_a_bound_by_hand():
    """The student's second token is not listed: C = 1/2 is a bound, and what needs q there is
    NaN.
    """
    student = torch.tensor([[0.4, 0.1, 0.3, 0.2]], dtype=torch.float64).log()
    out = topk_teacher.measure_hidden(
        student,
        lambda h: h,
        bare([[1, 0]], [[math.log(0.25), math.log(0.5)]]),
        torch.tensor([2]),
        depth=2,
        k=2,
    )
    found = {name: float(values[0]) for name, values in out.items()}
    assert (
        found["compatibility"] == pytest.approx(0.5)
        and found["topk_overlap"] == 0.5
        and found["topk_jaccard"] == pytest.approx(1 / 3)
    )
    assert all(
        math.isnan(found[name])
        for name in (
            "teacher_logprob",
            "advantage",
            "acceptance",
            "union_forward_kl",
            "bhattacharyya",
            "union_log_ratio_variance",
        )
    )
    assert (
        found["shared_student_mass"] == pytest.approx(0.4)
        and found["student_margin"] == pytest.approx(0.1)
        and found["sampled_in_teacher_topk"] == 0
    )


# --- an independent oracle


def oracle(p, q, ids, y, k):
    """Plain loops in float64 over one position; None where the list does not determine the
    value.
    """
    L = {int(i): float(q[i]) for i in ids if i >= 0}
    r, P = 1 - sum(L.values()), 1 - sum(float(p[i]) for i in L)
    pairs = [(float(p[i]), L[i]) for i in L] + ([(P, r)] if len(L) < len(p) else [])
    S = sorted(range(len(p)), key=lambda i: (-p[i], i))[:k]
    T = sorted(L, key=lambda i: (-L[i], i))[:k]
    U = [*S, *(i for i in T if i not in S)]
    out = {
        "forward_kl": sum(b * math.log(b / a) for a, b in pairs),
        "reverse_kl": sum(a * math.log(a / b) for a, b in pairs),
        "js": sum(
            0.5 * a * math.log(2 * a / (a + b)) + 0.5 * b * math.log(2 * b / (a + b))
            for a, b in pairs
        ),
        "hellinger": math.sqrt(max(0, 1 - sum(math.sqrt(a * b) for a, b in pairs))),
        "teacher_entropy": -sum(b * math.log(b) for _, b in pairs),
        "compatibility": sum(L.get(i, 0) for i in S),
        "teacher_tail_mass": r,
        "student_entropy": -sum(float(x) * math.log(x) for x in p),
        "teacher_logprob": math.log(L[y]) if y in L else None,
        "topk_overlap": len(set(S) & set(T)) / k,
        "topk_jaccard": len(set(S) & set(T)) / len(U),
        "shared_student_mass": sum(float(p[i]) for i in S if i in T),
        "compatibility_intersection": sum(L[i] for i in T if i in S),
        "teacher_top1_in_topk": float(T[0] in S),
        "sampled_in_teacher_topk": float(y in T),
        "top1_match": float(S[0] == T[0]),
        "bhattacharyya": None,
        "union_forward_kl": None,
    }
    if all(i in L for i in U):
        a, b = (
            np.array([p[i] for i in U]) / sum(p[i] for i in U),
            np.array([L[i] for i in U]) / sum(L[i] for i in U),
        )
        out |= {
            "bhattacharyya": np.sqrt(a * b).sum(),
            "union_forward_kl": (b * np.log(b / a)).sum(),
        }
    return out


@pytest.mark.parametrize("depth", [1, 4, 8, 40, V])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_column_against_plain_loops(depth, dtype):
    generator = torch.Generator().manual_seed(depth)
    student = (3 * torch.randn(30, V, generator=generator, dtype=torch.float64)).to(dtype)
    q = (3 * torch.randn(30, V, generator=generator, dtype=torch.float64)).softmax(-1)
    ids = q.topk(depth).indices
    sampled = torch.randint(0, V, (30,), generator=generator)
    k = min(depth, 6)
    out = topk_teacher.measure_hidden(
        student,
        lambda h: h,
        torch.cat([ids.double(), q.gather(1, ids).log()], 1),
        sampled,
        depth=depth,
        k=k,
        sweep=(3,),
    )
    p = student.double().softmax(-1).numpy()
    undefined = 0
    for n in range(30):
        for name, value in oracle(p[n], q[n].numpy(), ids[n].tolist(), int(sampled[n]), k).items():
            found = float(out[name][n])
            undefined += value is None
            assert (
                math.isnan(found)
                if value is None
                else found == pytest.approx(value, abs=1e-9 if dtype == torch.float64 else 3e-5)
            ), (n, name)
    assert (undefined > 0) == (depth < V) and ("topk_overlap_k3" in out) == (depth >= 3)


def test_lists_of_different_length_end_in_fillers():
    """A filler is no token: id 0, where it would be written, keeps the student's shape or its own
    entry.
    """
    student = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = [[3, -1, -1], [0, 2, -1], [4, 1, 0]]
    ln_q = [
        [math.log(0.4), -math.inf, -math.inf],
        [math.log(0.3), math.log(0.2), -math.inf],
        [math.log(0.2), math.log(0.1), math.log(0.3)],
    ]
    logits = topk_teacher.completed(student, *unpacked(bare(ids, ln_q)))
    p = student.softmax(-1)
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(
        logits[0].exp()[[0, 1, 2, 4]], 0.6 * p[0, [0, 1, 2, 4]] / p[0, [0, 1, 2, 4]].sum()
    )
    torch.testing.assert_close(
        logits[1].exp()[[0, 2]], torch.tensor([0.3, 0.2], dtype=torch.float64)
    )
    torch.testing.assert_close(logits[2].exp()[[2, 3]], 0.4 * p[2, [2, 3]] / p[2, [2, 3]].sum())


# --- invariants


BOUNDS = [
    name
    for name, entry in SCHEMA.items()
    if entry.listed == "lower bound" and entry.stage == "before"
]


def test_bounds_lie_below_the_exact_values_and_rise_with_the_list(pair, bank, tmp_path):
    exact = score(pair, bank, k=8, sweep=(4,))
    before = None
    for k in (1, 4, 16, V):
        tokens = score(listed(pair, bank, k, tmp_path), bank, k=8, sweep=(4,))
        for name in [*BOUNDS, "compatibility_k4"]:
            assert (tokens[name] <= exact[name] + 1e-5).all(), (name, k)
            assert before is None or (tokens[name] >= before[name] - 1e-5).all(), (name, k)
        before = tokens
    assert (
        len(BOUNDS) == 6
        and (
            score(listed(pair, bank, 2, tmp_path), bank).forward_kl < exact.forward_kl - 0.01
        ).mean()
        > 0.5
    )


def test_a_list_of_everything_gives_everything_exactly(pair, bank, tmp_path):
    exact, tokens = score(pair, bank), score(listed(pair, bank, V, tmp_path), bank)
    missing = set(exact) - set(tokens)
    assert missing == set() and set(tokens) - set(exact) == {"teacher_tail_mass"}
    for name in exact.select_dtypes("number"):
        np.testing.assert_allclose(tokens[name], exact[name], rtol=3e-6, atol=1e-5, err_msg=name)
    for name in exact.select_dtypes("bool"):
        assert (tokens[name] == exact[name]).all(), name


def test_what_is_marked_exact_is_exact_and_what_is_defined_where_listed_too(pair, bank, tmp_path):
    exact, tokens = (
        score(pair, bank, k=4, sweep=(8,)),
        score(listed(pair, bank, 8, tmp_path, sampled=True), bank, k=4, sweep=(8,)),
    )
    compared = 0
    for name in set(exact) & set(tokens):
        entry = column(name)
        if entry.stage == "before" and entry.listed in ("exact", "where listed"):
            defined = tokens[name].notna()
            np.testing.assert_allclose(
                tokens[name][defined].astype(float),
                exact[name][defined].astype(float),
                rtol=3e-6,
                atol=1e-5,
                err_msg=name,
            )
            assert entry.listed != "exact" or defined.all()
            compared += defined.any()
    assert (
        compared > 20
        and tokens.teacher_logprob.notna().all()
        and tokens.union_forward_kl_k8.isna().any()
    )


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd"])
def test_the_gradient_is_that_of_the_bucketed_loss(loss):
    """Against autograd through the bucketed divergence itself, in float64."""
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(6, 20, dtype=torch.float64, generator=generator).requires_grad_()
    q = (2 * torch.randn(6, 20, dtype=torch.float64, generator=generator)).softmax(-1)
    ids = q.topk(5).indices
    lists = torch.cat([ids.double(), q.gather(1, ids).log()], 1)
    value = chunked_loss(
        student,
        lambda h: h,
        lists,
        topk_teacher.Completed(),
        torch.zeros(6, dtype=torch.long),
        loss=loss,
        beta=0.3,
        weights_N=torch.ones(6),
        denominator=6.0,
        chunk=4,
    )
    value.backward()
    mine, student.grad = student.grad.clone(), None
    p, b = student.softmax(-1), q.gather(1, ids)
    a = p.gather(1, ids)
    a, b = (
        torch.cat([a, 1 - a.sum(1, keepdim=True)], 1),
        torch.cat([b, 1 - b.sum(1, keepdim=True)], 1),
    )
    m = 0.3 * b + 0.7 * a
    bucketed = {
        "forward_kl": b * (b / a).log(),
        "reverse_kl": a * (a / b).log(),
        "jsd": 0.3 * b * (b / m).log() + 0.7 * a * (a / m).log(),
    }[loss].sum() / 6
    bucketed.backward()
    assert float(value.detach()) == pytest.approx(float(bucketed.detach()))
    torch.testing.assert_close(mine, student.grad, rtol=1e-8, atol=1e-10)
    assert mine.abs().max() > 1e-3


# --- through the instrument


@pytest.fixture
def written(pair):
    return rollout(pair, make_prompts(10), max_new_tokens=8)


def test_probe_steps_on_the_bound_and_measures_its_change(pair, written, tmp_path):
    remote_pair = listed(pair, written, 4, tmp_path)
    result = probe(remote_pair, written, loss="forward_kl")
    np.testing.assert_allclose(
        result.tokens.forward_kl, result.tokens.forward_kl_after + result.tokens.gain, rtol=1e-14
    )
    np.testing.assert_allclose(
        result.tokens.forward_kl, score(remote_pair, written).forward_kl, atol=1e-7
    )
    assert result.step.loss_before == pytest.approx(
        result.tokens[result.tokens.fold == 0].forward_kl.mean(), abs=1e-6
    )
    assert (
        result.calibration[result.calibration.chosen].ratio.iloc[0] >= 0.8
        and result.tokens.own_gain.mean() > 0
    )
    still = probe(remote_pair, written, step=0).tokens
    assert (still.gain == 0).all() and (still.context_gain == 0).all()


def test_whole_lists_give_the_probe_and_interventions_of_the_model(pair, written, tmp_path):
    whole = listed(pair, written, V, tmp_path)
    for loss in ("reverse_kl", "jsd", "sampled"):
        nulls = () if loss == "sampled" else ("global",)
        mine, model = (
            probe(one, written, loss=loss, step=1e-4, nulls=nulls) for one in (whole, pair)
        )
        np.testing.assert_allclose(mine.tokens.gain, model.tokens.gain, atol=2e-5)
        if nulls:
            np.testing.assert_allclose(
                mine.tokens.gain_permuted, model.tokens.gain_permuted, atol=2e-5
            )
    options = {"criteria": ["divergence"], "budgets": [0.3], "random_draws": 1, "step": 1e-4}
    options |= {"folds": 2, "horizon": (2,), "learning_rate": 1e-3, "minibatch": 2}
    cells = [interventions(one, written, **options).effects for one in (whole, pair)]
    for mine, model in zip(*cells):
        np.testing.assert_allclose(mine.reduction_N3, model.reduction_N3, atol=2e-5)


def test_attribution_predicts_the_change_of_the_bound(pair, written, tmp_path):
    remote_pair = listed(pair, written, 4, tmp_path)
    result = attribute(remote_pair, written, sample=2, draws=10, step=1e-6)
    realised = probe(remote_pair, written, step=1e-6).tokens.gain_fold0
    slope = np.polyfit(result.tokens.first_order_gain, realised, 1)[0]
    assert slope == pytest.approx(1, abs=0.05)


def test_losses_that_lists_leave_open(pair, written, tmp_path):
    some, every = (
        listed(pair, written, 2, tmp_path),
        listed(pair, written, 2, tmp_path, sampled=True),
    )
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^The loss sampled needs the teacher's probability of every sampled token, and its"
            r" lists lack \d+ of \d+\. Use reverse_kl\.$"
        ),
    ):
        probe(some, written, loss="sampled", nulls=())
    alone = probe(every, written, loss="sampled", step=1e-5, nulls=()).tokens
    assert alone.gain.abs().max() > 0 and "context_gain" not in alone
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^A permuted teacher of the loss sampled needs its probability of tokens that were"
            r" sampled at other positions, which the lists in .* need not hold\. Use --loss"
        ),
    ):
        probe(every, written, loss="sampled")
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^The loss topk_reverse needs the teacher's probability of tokens that its lists may"
            r" not hold\. Use forward_kl, reverse_kl, jsd, sampled\.$"
        ),
    ):
        probe(every, written, loss="topk_reverse")
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^Training needs a teacher that can be run, and this one is known by the lists in .*\."
            r" Name a model with --teacher\.$"
        ),
    ):
        train(every, make_prompts(4), output_dir=tmp_path / "t")


def test_batches_of_any_size_score_alike(pair, bank, tmp_path):
    remote_pair = listed(pair, bank, 6, tmp_path, sampled=True)
    reference = score(remote_pair, bank)
    for batch_tokens in (1, 40):
        np.testing.assert_allclose(
            score(remote_pair, bank, batch_tokens=batch_tokens).forward_kl,
            reference.forward_kl,
            atol=1e-5,
        )
    _, tops = scores.score_with_tops(remote_pair, bank)
    _, model = scores.score_with_tops(pair, bank)
    for mine, theirs in zip(tops.itertuples(), model.itertuples()):
        assert mine.teacher_top_ids.tolist() == theirs.teacher_top_ids.tolist()
        np.testing.assert_allclose(mine.teacher_top_p, theirs.teacher_top_p, atol=1e-5)


# --- signs in place of log-probabilities, shifted lists, other bases


def with_sign(rows, value):
    """The sampled token appended with a sign where it is not listed, as some servers do."""
    return [
        row
        | {
            "top_ids": [
                ids + [y] * (y not in ids) for ids, y in zip(row["top_ids"], row["response_ids"])
            ],
            "top_logprobs": [
                q + [value] * (y not in ids)
                for q, ids, y in zip(row["top_logprobs"], row["top_ids"], row["response_ids"])
            ],
        }
        for row in rows
    ]


@pytest.mark.parametrize(
    "value",
    [
        -9999.0,
        -100.0,
        -1e30,
        -math.inf,
        float(np.finfo(np.float32).min),
        -999.0,
        -50.0,
        math.log(1e-10),
        math.log(1e-20),
        -103.97,
    ],
)
def test_a_sign_is_no_log_probability(pair, written, tmp_path, caplog, value):
    """Such entries count as absent: every number is that of the lists without them."""
    rows = teacher_rows(pair, written, 6)
    rows = [
        row
        | {
            "top_logprobs": [
                [float(q) for q in np.float32(values)] for values in row["top_logprobs"]
            ]
        }
        for row in rows
    ]
    plain, signed = (
        read_lists(jsonl(tmp_path / f"{name}.jsonl", *kind), vocabulary=V)
        for name, kind in (("a", rows), ("b", with_sign(rows, value)))
    )
    unlisted = sum(
        y not in ids for row in rows for ids, y in zip(row["top_ids"], row["response_ids"])
    )
    assert (
        signed.absent == unlisted > 20
        and plain.absent == 0
        and signed.facts()["read_as_absent"] == unlisted
    )
    first, second = (
        score(dataclasses.replace(pair, teacher=teacher), written, k=4, sweep=())
        for teacher in (plain, signed)
    )
    pd.testing.assert_frame_equal(first, second)
    exact = score(pair, written, k=4, sweep=())
    assert (
        second.reverse_kl <= exact.reverse_kl + 1e-5
    ).all() and second.advantage.isna().sum() == unlisted
    assert (
        f"b.jsonl: {unlisted} entries hold a value that stands for a token outside the list"
        f" ({value:.6g}) and are read as absent" in caplog.text
    )
    assert f"b.jsonl: {unlisted} of {written.positions} lists lack the sampled token" in caplog.text
    with pytest.raises(
        DiagnosticsError,
        match=r"^The loss sampled needs .* and its lists lack \d+ of \d+\. Use reverse_kl\.$",
    ):
        probe(dataclasses.replace(pair, teacher=signed), written, loss="sampled", nulls=())


def test_padding_with_signs_is_absent_whatever_its_ids():
    rows = (
        [np.array([[5, 3, 0, 0], [7, -1, -1, -1], [1, 2, 3, 4]], dtype=float)],
        [np.array([[-0.2, -2.0, -9999, -9999], [-0.1, -1e30, -1e30, -1e30], [-1, -1.5, -2, -3]])],
    )
    (absent,) = topk_teacher.absent_entries(list(zip(*rows)))
    assert absent.tolist() == [[False, False, True, True], [False, True, True, True], [False] * 4]
    entry = topk_teacher._lists(rows[0][0], rows[1][0], absent, None, V, "x")
    assert entry.ids_TK.tolist() == [[5, 3, -1, -1], [7, -1, -1, -1], [1, 2, 3, 4]]


def test_a_list_of_signs_alone_is_refused(tmp_path):
    row = {
        "context_id": "c",
        "top_ids": [[1, 2], [3, 4]],
        "top_logprobs": [[-1.0, -2.0], [-9999.0, -9999.0]],
    }
    with pytest.raises(
        DiagnosticsError,
        match=r"context 'c' has a list in which every value stands for a token outside it",
    ):
        read_lists(jsonl(tmp_path / "a.jsonl", row), vocabulary=V)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "two digits", "copies"])
def test_true_log_probabilities_are_no_signs(kind):
    """However small they are, rounded as servers round them, or the same for several samples of one
    prompt.
    """
    values = (8 * torch.randn(60, 200, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    made = {
        "float32": values,
        "bfloat16": values.bfloat16().float(),
        "float16": values.half().float(),
        "two digits": (values * 100).round() / 100,
        "copies": values[:5].repeat(12, 1),
    }[kind]
    values_TK = made.sort(descending=True).values.double().numpy()
    assert values_TK.min() < -35
    for width in (20, 200):
        assert not topk_teacher.absent_entries([(np.zeros((60, width)), values_TK[:, :width])])[
            0
        ].any()


def test_a_value_that_sure_lists_of_a_16_bit_teacher_share_is_no_floor():
    """Beside one likely token the sum of the others rounds away, so that the values are the logits'
    own steps; a floor is told from them by nothing lying below it.
    """
    logits = 8 + 3 * torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    logits[:60, 0] += 30
    values = logits.bfloat16().float().log_softmax(-1).double()
    values_TK = values.sort(descending=True).values.numpy()
    shared, often = np.unique(values_TK[values_TK <= -20], return_counts=True)
    assert often.max() > 10, "many lists share a value"
    (absent,) = topk_teacher.absent_entries([(np.zeros((200, 64)), values_TK)])
    assert not absent.any()
    floor = shared[often.argmax()]
    floored = np.maximum(values_TK, floor)
    (absent,) = topk_teacher.absent_entries([(np.zeros((200, 64)), floored)])
    assert absent.sum() == (floored == floor).sum() > 100


def shifted(rows, by):
    """Each list `by` places too early (positive: the list that predicts the next token stands at
    this one).
    """
    return [
        row | {name: row[name][by:] + row[name][:by] for name in ("top_ids", "top_logprobs")}
        for row in rows
    ]


@pytest.mark.parametrize("by", [1, -1, 2])
def test_shifted_lists_are_refused(pair, written, tmp_path, by):
    rows = teacher_rows(pair, written, 6, sampled=True)
    place = "before" if by < 0 else "after"
    with pytest.raises(
        DiagnosticsError,
        match=(
            rf"x\.jsonl: \d+% of the lists hold the token {abs(by)} {place} their own, and \d+%"
            r" their own\. The lists are shifted"
        ),
    ):
        score(
            dataclasses.replace(
                pair,
                teacher=read_lists(jsonl(tmp_path / "x.jsonl", *shifted(rows, by)), vocabulary=V),
            ),
            written,
        )
    score(
        dataclasses.replace(
            pair, teacher=read_lists(jsonl(tmp_path / "y.jsonl", *rows), vocabulary=V)
        ),
        written,
    )


def test_a_teacher_that_lists_the_students_words_seldom_is_not_called_shifted(
    pair, written, tmp_path
):
    for k in (1, 3, 20, V):
        listed(pair, written, k, tmp_path).teacher.require(written)


@pytest.mark.parametrize(
    "base, message",
    [
        (2, r"seems to hold logarithms to base 2: raised from 2, .* multiply the values by ln 2"),
        (10, r"add up to .* not logits or another base"),
    ],
)
def test_another_base_is_refused(pair, written, tmp_path, base, message):
    sharp = [
        row
        | {
            "top_logprobs": [
                (
                    np.log(np.exp(3 * np.array(q)) / np.exp(3 * np.array(q)).sum()) / math.log(base)
                ).tolist()
                for q in row["top_logprobs"]
            ]
        }
        for row in teacher_rows(pair, written, 20)
    ]
    with pytest.raises(DiagnosticsError, match=message):
        read_lists(jsonl(tmp_path / "x.jsonl", *sharp), vocabulary=V)
    natural = [
        row
        | {
            "top_logprobs": [
                (np.array(q) * math.log(base) - 1e-4).tolist() for q in row["top_logprobs"]
            ]
        }
        for row in sharp
    ]
    read_lists(jsonl(tmp_path / "y.jsonl", *natural), vocabulary=V)


def test_probabilities_are_no_log_probabilities(tmp_path):
    with pytest.raises(
        DiagnosticsError,
        match=r"holds a log-probability that is NaN or above 0 \(0\.7\)\. Store ln q of each id\.",
    ):
        read_lists(
            jsonl(
                tmp_path / "x.jsonl",
                {"context_id": "c", "top_ids": [[1, 2]], "top_logprobs": [[0.7, 0.2]]},
            ),
            vocabulary=V,
        )


# --- depth, files, and what is refused


def teacher_of(bank, *lists):
    """A teacher with the given (ids, sampled last) for each position of a bank of one context."""
    width = max(map(len, lists))
    ids = np.array([[*row, *[-1] * (width - len(row))] for row in lists])
    ln_q = np.where(ids >= 0, -1.0 - np.arange(width), -np.inf)
    return TopKTeacher({bank[0].context_id: Lists(ids, ln_q, None)}, vocabulary=V, name="x")


def test_how_deep_the_lists_are_for_sure():
    bank = make_bank([2])
    a, b = bank[0].response_ids
    others = [i for i in range(20, 40) if i not in (a, b)]
    assert teacher_of(bank, others[:3], others[:3]).depth(bank) == 3
    assert teacher_of(bank, [a, *others[:2]], [*others[:2], b]).depth(bank) == 2
    assert teacher_of(bank, [*others[:2], a], [*others[:3], b]).depth(bank) == 3
    assert teacher_of(bank, [*others[:2], a], others[:3]).depth(bank) == 3
    assert teacher_of(bank, [a, *others[:2]], [b, *others[:2]]).depth(bank) == 3
    assert teacher_of(bank, [a], [b]).depth(bank) == 0


def test_both_layouts_and_formats_read_alike(pair, bank, tmp_path):
    rows = teacher_rows(pair, bank, 5, sampled=True)
    flat = [
        {
            "context_id": r["context_id"],
            "position": t,
            "token_id": r["response_ids"][t],
            "top_ids": r["top_ids"][t],
            "top_logprobs": r["top_logprobs"][t],
        }
        for r in rows
        for t in range(len(r["top_ids"]))
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    pd.DataFrame(flat[::-1]).to_parquet(tmp_path / "b.parquet")
    files = [
        jsonl(tmp_path / "c.jsonl", *rows),
        tmp_path / "a.parquet",
        jsonl(tmp_path / "d.jsonl", *flat),
        tmp_path / "b.parquet",
    ]
    first, *rest = [read_lists(file, vocabulary=V) for file in files]
    for other in rest:
        other.require(bank)
        for name, entry in first.lists.items():
            np.testing.assert_array_equal(other.lists[name].ids_TK, entry.ids_TK)
            np.testing.assert_array_equal(other.lists[name].ln_q_TK, entry.ln_q_TK)
            assert other.lists[name].sampled_T == entry.sampled_T


def test_mass_that_rounding_pushed_over_one_is_brought_back(tmp_path, caplog):
    file = jsonl(
        tmp_path / "r.jsonl",
        {
            "context_id": "c",
            "top_ids": [[1, 2]],
            "top_logprobs": [[math.log(0.7), math.log(0.302)]],
        },
    )
    entry = read_lists(file, vocabulary=V).lists["c"]
    assert np.exp(entry.ln_q_TK).sum() == pytest.approx(1 - topk_teacher.TAIL_FLOOR, abs=1e-12)
    assert (
        "nearly every list adds up to 1. If the server renormalized them, nothing measured with"
        " them is right" in caplog.text
    )
    assert (
        f"{file}: the teacher is known by lists of 2 tokens; on average 1e-06 of its mass lies"
        " outside them. KLs, JS and compatibility are lower bounds" in caplog.text
    )


ONE = {"context_id": "c0", "top_ids": [[1, 2]] * 5, "top_logprobs": [[-1.0, -2.0]] * 5}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"top_ids": None}, r"context 'c0': top_ids should be a list of lists of numbers"),
        (
            {"top_ids": [["a"]] * 5},
            r"context 'c0': top_ids should be a list of lists of numbers \(could not convert",
        ),
        (
            {"top_ids": [[]] * 5},
            r"context 'c0': top_ids should be a list of lists of numbers, none of them empty",
        ),
        (
            {"top_ids": [[1]] * 5},
            r"context 'c0': top_ids and top_logprobs do not have the same lengths",
        ),
        (
            {"top_ids": [[1, -2]] * 5},
            r"context 'c0': top_ids holds an id below 0\. Give one finite log-probability per id\.",
        ),
        (
            {"top_ids": [[1, 64]] * 5},
            (
                r"context 'c0' lists token id 64, and the student's vocabulary has 64\. The teacher"
                r" has another tokenizer"
            ),
        ),
        ({"top_ids": [[2, 2]] * 5}, r"context 'c0' lists an id twice at one position"),
        (
            {"top_logprobs": [[0.5, -2.0]] * 5},
            r"context 'c0' holds a log-probability that is NaN or above 0 \(0\.5\)",
        ),
        (
            {"top_logprobs": [[math.nan, -2.0]] * 5},
            r"context 'c0' holds a log-probability that is NaN or above 0",
        ),
        (
            {"top_logprobs": [[-0.1, -0.2]] * 5},
            (
                r"context 'c0': the listed probabilities add up to 1\.724\. Store natural"
                r" log-probabilities at temperature 1"
            ),
        ),
        (
            {"top_ids": [[1, 2]] * 4, "top_logprobs": [[-1.0, -2.0]] * 4},
            (
                r"has 4 lists for context 'c0', whose response has 5 tokens\. Give one list per"
                r" response token"
            ),
        ),
        (
            {"context_id": None},
            (
                r"r\.jsonl has 1 rows without a context_id\. Give each row the id of the context"
                r" that was scored\."
            ),
        ),
        ({"context_id": None, "position": 0}, r"r\.jsonl has 1 rows without a context_id"),
        (
            {"context_id": "z"},
            (
                r"has no lists for 6 of 6 contexts, 'c0' among them\. Let the teacher score these"
                r" contexts\."
            ),
        ),
        (
            {"response_ids": [1, 2, 3, 4, 5]},
            r"scored another response in context 'c0' than the run holds",
        ),
        (
            {"response_ids": ["a"]},
            r"context 'c0': the sampled tokens should be whole numbers; found \"\['a'\]\"",
        ),
        (
            {"position": 1},
            (
                r"the positions of context 'c0' are not 0 to 0\. Give one row per response token,"
                r" from 0\."
            ),
        ),
    ],
)
def test_lists_that_cannot_be_used(pair, bank, tmp_path, change, message):
    with pytest.raises(DiagnosticsError, match=message):
        score(
            dataclasses.replace(
                pair, teacher=read_lists(jsonl(tmp_path / "r.jsonl", ONE | change), vocabulary=V)
            ),
            bank,
        )


def test_files_of_lists_that_cannot_be_used(tmp_path):
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"a file of teacher log-probabilities, needs the columns top_ids, top_logprobs; this"
            r" one has context_id"
        ),
    ):
        read_lists(jsonl(tmp_path / "a.jsonl", {"context_id": "c"}), vocabulary=V)
    with pytest.raises(
        DiagnosticsError,
        match=r"has two rows for context 'c0'\. Give one row per context, or a `position` column",
    ):
        read_lists(jsonl(tmp_path / "b.jsonl", ONE, ONE), vocabulary=V)
    with pytest.raises(TypeError, match="has logits only together with a student's"):
        topk_teacher.Completed()(torch.zeros(1, 2))


def test_a_pair_takes_a_file_in_the_teachers_place(folders, tmp_path):
    student, teacher = folders[1], folders[3]
    whole = load_pair(student=student, teacher=teacher, device="cpu")
    bank = rollout(whole, make_prompts(3), max_new_tokens=5)
    file = jsonl(tmp_path / "r.jsonl", *teacher_rows(whole, bank, 8))
    pair = load_pair(student=student, teacher_logprobs=file, device="cpu")
    assert (
        isinstance(pair, Pair)
        and pair.window == 256
        and pair.facts["teacher"]["name"] == "r.jsonl"
        and pair.facts["teacher"]["longest"] == 8
    )
    np.testing.assert_allclose(
        score(pair, bank).student_logprob, score(whole, bank).student_logprob
    )
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^Got the teacher '.*' and its log-probabilities in .*r\.jsonl as well\. Give one or"
            r" the other\.$"
        ),
    ):
        load_pair(student=student, teacher=teacher, teacher_logprobs=file)
    assert "r.jsonl" in pair._repr_html_()
    alone = load_pair(student=student, alone=True, device="cpu")
    assert "teacher" not in alone.facts and "student" in alone._repr_html_()
    assert rollout(alone, make_prompts(3), max_new_tokens=5) == bank
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^This pair has only a student, which can sample responses but not grade them\. Name"
            r" a teacher, or a file of its log-probabilities\.$"
        ),
    ):
        score(alone, bank)


@pytest.mark.slow
def test_from_rollout_to_report_with_a_remote_teacher(folders, tmp_path, capsys):
    """The student writes, the teacher's lists come in a file, and every table says what its numbers
    are worth.
    """
    out, student = tmp_path / "out", ["--student", folders[1], "--device", "cpu", "--quiet"]
    where = ["--output-dir", str(out)]
    assert main(["rollout", *student, *folders[4:10], *where]) == 0
    whole = load_pair(student=folders[1], teacher=folders[3], device="cpu")
    file = jsonl(
        tmp_path / "top.jsonl", *teacher_rows(whole, read_bank(out / "contexts.parquet"), 16)
    )
    remote_flags = [*student, "--teacher-logprobs", str(file), *where]
    assert main(["score", *remote_flags]) == 0
    assert main(["probe", *remote_flags, "--folds", "2"]) == 0
    assert (
        main(
            [
                "intervene",
                *remote_flags,
                "--criteria",
                "divergence,teachability",
                "--budgets",
                "0.3",
                "--random-draws",
                "1",
                "--horizon",
                "2",
                "--draws",
                "20",
            ]
        )
        == 0
    )
    assert main(["attribute", *remote_flags, "--sample", "4", "--draws", "20"]) == 0
    for command in ("analyze", "compare"):
        assert main([command, "--draws", "20", "--quiet", *where]) == 0
    tables = {path.stem: pd.read_csv(path) for path in (out / "tables").glob("*.csv")}
    worth = tables["exactness"].set_index("measurement")
    assert worth.exactness[
        ["student_entropy", "forward_kl", "teacher_logprob", "gain", "topk_overlap_k32"]
    ].tolist() == ["exact", "lower bound", "where listed", "change of a bound", "impossible"]
    assert (
        worth.exact["student_entropy"] == 1
        and worth.exact["gain"] == 0
        and 0 < worth.defined["teacher_logprob"] < 1
    )
    row = tables["correlations"].query("outcome == 'gain' and criterion == 'teachability'").iloc[0]
    assert (
        row.exactness
        == "gain: change of a bound; forward_kl: lower bound; compatibility: lower bound"
    )
    assert (
        tables["correlations"].query("criterion == 'entropy' and outcome == 'gain'").exactness
        == "gain: change of a bound"
    ).all()
    unmarked = {"warnings", "left_out", "exactness", "stop_tokens"}
    assert {name for name, table in tables.items() if "exactness" not in table} <= unmarked
    assert tables["warnings"].code[0] == "listed_teacher" or "listed_teacher" in set(
        tables["warnings"].code
    )
    kept = sha256_file(out / "contexts.parquet")
    assert (
        main(["run", "--quick", *remote_flags, *folders[4:10], "--draws", "20", "--folds", "2"])
        == 0
        and sha256_file(out / "contexts.parquet") == kept
    )
    assert "known only by lists of its most likely tokens" in (out / "report.html").read_text()
    manifest = json.loads((out / "manifest.json").read_text())
    assert (
        manifest["stages"]["score"]["facts"]["teacher"]["name"] == "top.jsonl"
        and len(manifest["stages"]["score"]["settings"]["teacher_logprobs_sha256"]) == 64
    )


@pytest.mark.parametrize("ids", [[[5.5, 6.0]], [[True, False]], [["5.5", "6"]]])
def test_ids_are_whole_numbers(tmp_path, ids):
    row = {"context_id": "c0", "top_ids": ids, "top_logprobs": [[-0.5, -1.5]]}
    (tmp_path / "lists.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DiagnosticsError, match="and ids are whole numbers"):
        read_lists(tmp_path / "lists.jsonl", vocabulary=64)


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_base_two_is_seen_in_short_lists(tmp_path, depth):
    """Of a teacher that is sure of its word at every other position, as language models are."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40, 64)) * 3 + 14 * np.eye(64)[:40] * (np.arange(40) % 2)[:, None]
    ln_q = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    order = np.argsort(-ln_q, axis=1)[:, :depth]
    values = np.take_along_axis(ln_q, order, 1)

    def read(values):
        row = {"context_id": "c0", "top_ids": order.tolist(), "top_logprobs": values.tolist()}
        (tmp_path / "lists.jsonl").write_text(json.dumps(row) + "\n")
        return read_lists(tmp_path / "lists.jsonl", vocabulary=64)

    assert read(values).absent == 0
    with pytest.raises(DiagnosticsError, match="seems to hold logarithms to base 2"):
        read(values / np.log(2))


@pytest.mark.parametrize("lengths", [[2, 5], [1, 2, 3], [2], [1]])
def test_a_response_shorter_than_the_places_that_are_tried_is_read(pair, tmp_path, lengths):
    """Lists are tried up to three places further, and a response of two tokens has no third."""
    bank = make_bank(lengths)
    listed(pair, bank, 5, tmp_path).teacher.require(bank)


def test_what_needs_all_logits_is_refused_of_lists(pair, bank, tmp_path):
    lists = listed(pair, bank, 8, tmp_path, sampled=True)
    with pytest.raises(
        DiagnosticsError, match=r"^The measurement ier needs a teacher that can be run, and this"
    ):
        score(lists, bank, k=4, sweep=(), extra=("ier",))

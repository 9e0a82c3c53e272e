"""The Triton kernels in Triton's interpreter, against float64; what they cost, counted; and whether
they compile for CUDA.

    TRITON_INTERPRET=1 python -m pytest tests/measure/test_fused.py     # the interpreted half alone

The variable has to be there before Triton is imported, so `make test-all` runs that half in a
process of its own.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.yardsticks import allocated_on_the_cpu
from diagnostics.measure import divergences, fused
from diagnostics.measure.divergences import kl_pair, kls_and_js, measure, measure_hidden, top_ids
from diagnostics.measure.losses import chunked_loss, per_position
from tests.factories import padded, random_logits

INF = math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTERPRETED = fused.interpreted()
TRITON = importlib.util.find_spec("triton") is not None
in_interpreter = pytest.mark.skipif(
    not (INTERPRETED and TRITON), reason="runs where TRITON_INTERPRET=1 and Triton is installed"
)
with_triton = pytest.mark.skipif(
    INTERPRETED or not TRITON, reason="needs Triton, outside of its interpreter"
)
# Each operation of the interpreter is one of NumPy, which speaks up where a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def close(measured: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Equal to 1e-6 of the value, and of 1 where it is smaller; all of the exact columns."""
    assert measured.keys() == exact.keys()
    for name, values_N in exact.items():
        assert torch.allclose(
            measured[name].double(), values_N, rtol=1e-6, atol=1e-6, equal_nan=True
        ), (name, measured[name], values_N)


def checked(student_NV: Tensor, teacher_NV: Tensor, sampled_N: Tensor, **options) -> dict:
    """The kernels' columns, after comparison with float64."""
    measured = measure(student_NV, teacher_NV, sampled_N, **options)
    close(measured, measure(student_NV.double(), teacher_NV.double(), sampled_N, **options))
    return measured


# ---------------------------------------------------------------- statistics


@in_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [2, 63, 65, 1024, 2500])
def test_columns_are_those_of_float64(dtype, vocabulary):
    checked(*random_logits(vocabulary, 1, vocabulary, dtype=dtype), k=4, sweep=(2, 16))


@in_interpreter
def test_the_cheap_scores_are_the_measured_columns():
    student_NV, teacher_NV, sampled_N = random_logits(1, 3, 300, dtype=torch.float32)
    student_NV[0, 3] = -INF
    student_NV[1, 4] = math.nan
    measured = measure(student_NV, teacher_NV, sampled_N)
    cheap = [*kl_pair(student_NV, teacher_NV), *kls_and_js(student_NV, teacher_NV)]
    names = ("forward_kl", "reverse_kl", "forward_kl", "reverse_kl", "js")
    for name, values_N in zip(names, cheap):
        assert torch.allclose(values_N, measured[name], rtol=0, atol=0, equal_nan=True), name


@in_interpreter
def test_the_models_may_have_two_dtypes_and_rows_of_a_larger_tensor():
    student_NV, teacher_NV, sampled_N = random_logits(1, 6, 900, dtype=torch.float32)
    checked(student_NV[::2, :777], teacher_NV.bfloat16()[::2, 100:877], sampled_N[::2] % 777)


@in_interpreter
def test_a_row_that_is_not_contiguous_takes_the_other_path():
    student_NV, teacher_NV, _ = random_logits(1, 4, 30, dtype=torch.float32)
    assert fused.applies(student_NV, teacher_NV)
    assert not fused.applies(student_NV.T, teacher_NV)
    assert not fused.applies(student_NV.double(), teacher_NV.double())
    assert not fused.applies(student_NV[:0], teacher_NV[:0])


@in_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_models_differ_by_nothing(dtype):
    student_NV, _, sampled_N = random_logits(3, 1, 1100, dtype=dtype)
    measured = checked(student_NV, student_NV.clone(), sampled_N)
    for name in ("forward_kl", "reverse_kl", "js", "hellinger"):
        assert not measured[name].any(), name


@in_interpreter
def test_one_hot_flat_and_far_off_logits():
    student_NV, teacher_NV, sampled_N = random_logits(5, 6, 1100, dtype=torch.float32)
    student_NV[0] = -1e4
    student_NV[0, 7] = 0.0  # one-hot student
    teacher_NV[1] = -1e4
    teacher_NV[1, 3] = 1e4  # one-hot teacher
    student_NV[2], teacher_NV[2] = 0.1, -3.0  # both flat
    student_NV[3] += 1e4  # a common offset; rounds the logits themselves
    student_NV[4], teacher_NV[4] = 60000.0, -60000.0
    teacher_NV[4, 9] = 0.0
    checked(student_NV, teacher_NV, sampled_N, k=8)


@in_interpreter
@pytest.mark.parametrize("value", [-INF, torch.finfo(torch.float32).min])
def test_a_padded_vocabulary(value):
    rows = [0, 3, 5, 7, 89]  # both exclude, each alone, a NaN, neither
    checked(*(x[rows] for x in padded(3, value)), k=16, sweep=(4,))


@in_interpreter
@pytest.mark.parametrize("model", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, INF])
def test_a_bad_logit_makes_its_row_nan_and_no_other(model, bad):
    logits = random_logits(7, 3, 300, dtype=torch.float32)
    logits[model][1, 250] = bad
    measured = checked(*logits, k=4)
    for name, values_N in measured.items():
        assert values_N.isnan().tolist() == [False, True, False], name


@in_interpreter
def test_a_row_without_any_probability_is_nan():
    student_NV, teacher_NV, sampled_N = random_logits(7, 2, 300, dtype=torch.float32)
    teacher_NV[0] = -INF
    assert checked(student_NV, teacher_NV, sampled_N)["js"].isnan().tolist() == [True, False]


@in_interpreter
@pytest.mark.parametrize("far", [-3e38, -3e30, -1000.0])
def test_mass_on_a_token_that_the_other_model_puts_far_below(far):
    """Nothing is cut off: what float32 cannot hold is taken in float64."""
    student_NV, teacher_NV, sampled_N = random_logits(9, 2, 200, dtype=torch.float32)
    student_NV[0, 11], teacher_NV[1, 12] = far, far
    measured = checked(student_NV, teacher_NV, sampled_N)
    assert measured["forward_kl"][0] > 1e-4 * -far and measured["forward_kl"].isfinite().all()


@in_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 5, 1000])
def test_top_ids_are_a_stable_sort(dtype, vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    logits_NV = torch.randint(-3, 4, (3, vocabulary), generator=generator).to(dtype) * 0.5
    logits_NV[1] = -0.0
    logits_NV[1, ::2] = 0.0
    logits_NV[2, :: max(2, vocabulary // 3)] = -INF
    expected = logits_NV.double().sort(dim=-1, descending=True, stable=True).indices
    for k in {1, min(5, vocabulary), min(64, vocabulary)}:
        assert torch.equal(top_ids(logits_NV, k), expected[:, :k]), k


@in_interpreter
def test_k_beyond_the_vocabulary_and_beyond_the_kernel():
    logits = random_logits(2, 2, 200, dtype=torch.float32)
    assert fused.LARGEST_K < 150
    checked(*logits, k=150, sweep=(300,))


@in_interpreter
def test_chunks_of_hidden_states():
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(500, 8, generator=generator) for _ in range(2)]
    states = [torch.randn(7, 8, generator=generator) for _ in range(2)]
    sampled_N = torch.randint(500, (7,), generator=generator)
    given = [
        x for z_NH, w_VH in zip(states, heads) for x in (z_NH, lambda h, w=w_VH: F.linear(h, w))
    ]
    by_chunks = measure_hidden(*given, sampled_N, k=4, tops=2, chunk=3)
    whole = measure(*(F.linear(*x) for x in zip(states, heads)), sampled_N, k=4)
    for name, values_N in whole.items():
        assert torch.allclose(by_chunks[name], values_N, atol=1e-5), name


# ---------------------------------------------------------------- losses

SETTINGS = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jsd", {"beta": 0.5}),
    ("jsd", {"beta": 0.1}),
    ("jsd", {"beta": 1.0}),
    ("sampled", {}),
]


def value_and_slope(student_NV: Tensor, teacher_NV: Tensor, sampled_N: Tensor, **options):
    leaf_NV = student_NV.clone().requires_grad_()
    values_N = per_position(leaf_NV, teacher_NV, sampled_N, **options)
    return values_N.detach(), torch.autograd.grad(values_N.sum(), leaf_NV)[0]


@in_interpreter
@pytest.mark.parametrize("loss, options", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_their_derivatives_are_those_of_float64(loss, options, dtype):
    given = random_logits(4, 2, 1100, dtype=dtype)
    assert fused.applies(*given[:2])
    values_N, slope_NV = value_and_slope(*given, loss=loss, **options)
    exact_N, exact_NV = value_and_slope(
        *(x.double() for x in given[:2]), given[2], loss=loss, **options
    )
    assert torch.allclose(values_N, exact_N, rtol=1e-6, atol=1e-6)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3  # a bfloat16 derivative has eight bits
    assert (slope_NV.double() - exact_NV).norm() <= tolerance * exact_NV.norm()


@in_interpreter
@pytest.mark.parametrize("loss, options", SETTINGS)
@pytest.mark.parametrize("value", [-INF, torch.finfo(torch.float32).min])
def test_losses_over_a_padded_vocabulary(loss, options, value):
    rows = [0, 3, 5, 7, 89]
    given = [x[rows] for x in padded(3, value)]
    values_N, slope_NV = value_and_slope(*given, loss=loss, **options)
    exact_N, exact_NV = value_and_slope(
        *(x.double() for x in given[:2]), given[2], loss=loss, **options
    )
    assert torch.allclose(values_N, exact_N, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert torch.allclose(slope_NV.double(), exact_NV, rtol=1e-5, atol=1e-6, equal_nan=True)


@in_interpreter
def test_a_given_advantage_and_a_scale():
    student_NV, teacher_NV, sampled_N = random_logits(8, 3, 90, dtype=torch.float32)
    advantage_N, scale_N = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([0.25, 0.0, 3.0])
    slope_NV = torch.empty_like(student_NV)
    values_N, again_N = fused.objective(
        student_NV,
        teacher_NV,
        loss="sampled",
        beta=0.5,
        sampled_N=sampled_N,
        advantage_N=advantage_N,
        scale_N=scale_N,
        slope_NV=slope_NV,
    )
    p_NV = student_NV.softmax(-1)
    expected_NV = (advantage_N * scale_N)[:, None] * (p_NV - F.one_hot(sampled_N, 90))
    assert torch.allclose(slope_NV, expected_NV, atol=1e-6) and not again_N.any()
    ln_p_N = student_NV.log_softmax(-1).gather(1, sampled_N[:, None])[:, 0]
    assert torch.allclose(values_N.float(), -advantage_N * ln_p_N, atol=1e-5)


@in_interpreter
@pytest.mark.parametrize("loss", fused.LOSSES)
@pytest.mark.parametrize("far", [None, -3e38])
def test_a_derivative_may_take_the_place_of_the_logits(loss, far):
    """Also where a row is taken again in float64, which needs the logits once more."""
    student_NV, teacher_NV, sampled_N = random_logits(6, 3, 90, dtype=torch.float32)
    if far is not None:
        student_NV[1, 5] = far
        teacher_NV[2, 6] = far
    apart_NV = torch.full_like(student_NV, math.nan)
    in_place_NV = student_NV.clone()
    given = dict(loss=loss, beta=0.5, sampled_N=sampled_N, advantage_N=None, scale_N=None)
    _, again_N = fused.objective(student_NV, teacher_NV, slope_NV=apart_NV, **given)
    fused.objective(in_place_NV, teacher_NV, slope_NV=in_place_NV, **given)
    assert torch.equal(in_place_NV[~again_N], apart_NV[~again_N])
    assert torch.equal(in_place_NV[again_N], student_NV[again_N])
    assert apart_NV[again_N].isnan().all()
    if far is not None and loss != "sampled":
        assert again_N.tolist() == [False, True, True]


@in_interpreter
@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd"])
def test_chunked_losses_reach_states_and_head(loss):
    generator = torch.Generator().manual_seed(1)
    head_VH = torch.randn(600, 8, generator=generator).requires_grad_()
    states_NH = torch.randn(6, 8, generator=generator).requires_grad_()
    teacher_NV = torch.randn(6, 600, generator=generator)
    weights_N = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 1.0])

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        head, states = (x.detach().to(dtype).requires_grad_() for x in (head_VH, states_NH))
        value = chunked_loss(
            states,
            lambda h_nH: F.linear(h_nH, head),
            teacher_NV.to(dtype),
            lambda h_nV: h_nV,
            torch.zeros(6, dtype=torch.long),
            loss=loss,
            weights_N=weights_N,
            denominator=5.5,
            chunk=2,
        )
        return [value.detach(), *torch.autograd.grad(value, [states, head])]

    for found, exact in zip(gradients(torch.float32), gradients(torch.float64)):
        assert (found.double() - exact).norm() <= 1e-5 * exact.norm()


# ---------------------------------------------------------------- cost


class Launches:
    """Counts the launches of kernels, and answers for them where there is none."""

    def __init__(self, monkeypatch, *, run: bool):
        self.names: list[str] = []
        launch = fused._launch

        def counted(kernel, *arguments, **constants):
            self.names.append(getattr(kernel, "__name__", "kernel"))
            if run:
                launch(kernel, *arguments, **constants)

        monkeypatch.setattr(fused, "_launch", counted)


@in_interpreter
@pytest.mark.parametrize("count", [1, 5])
def test_launches_do_not_depend_on_the_positions(count, monkeypatch):
    student_NV, teacher_NV, sampled_N = random_logits(2, count, 130, dtype=torch.float32)
    assert fused.applies(student_NV, teacher_NV)
    launches = Launches(monkeypatch, run=True)
    measure(student_NV, teacher_NV, sampled_N, k=4, sweep=(8, 16, 32))
    assert launches.names == ["statistics", "top_ids", "top_ids"]
    kl_pair(student_NV, teacher_NV)
    value_and_slope(student_NV, teacher_NV, sampled_N, loss="jsd")
    assert launches.names[3:] == ["statistics", "objective"]


@in_interpreter
@pytest.mark.parametrize("count, vocabulary, k", [(1, 9000, 16), (8, 300, 32)])
def test_a_chunk_takes_no_more_memory_than_is_said(count, vocabulary, k, monkeypatch):
    monkeypatch.setattr(divergences, "LISTS_BYTES", 2**18)
    given = random_logits(2, count, vocabulary, dtype=torch.float32)
    assert fused.applies(*given[:2])
    said = divergences.peak_bytes(count, vocabulary, k=k, sweep=(4, 8), device="cpu")
    taken = allocated_on_the_cpu(lambda: measure(*given, k=k, sweep=(4, 8)))
    assert said / 3 <= taken <= said


@pytest.mark.parametrize("vocabulary", [786, 4096, 32_000, 151_936, 262_144])
def test_a_chunk_on_a_gpu_takes_at_most_300_mib_beyond_its_logits(vocabulary):
    rows = divergences.chunk_size(vocabulary, "cuda")
    rows *= -(-divergences.lists_rows(32, "cuda") // rows)  # whose lists wait for one another
    assert divergences.peak_bytes(rows, vocabulary, k=16, sweep=(4, 8, 32), tops=5) <= 300 * 2**20


def test_four_thousand_positions_are_compared_in_one_piece_on_a_gpu():
    """Each piece is some 200 launches; see `benchmarks/RESULTS.md`."""
    on_gpu, on_cpu = (divergences.lists_rows(32, device) for device in ("cuda", "cpu"))
    assert on_gpu >= 4096 and on_gpu == pytest.approx(3 * on_cpu, abs=3)


def test_row_blocks_of_torch_on_a_gpu_keep_within_their_memory():
    for vocabulary in (4096, 151_936):
        rows = divergences._block_rows(vocabulary, torch.float32, torch.device("cuda"))
        assert 0.98 * 240 * 2**20 <= rows * 6 * 4 * vocabulary <= 240 * 2**20


def test_a_tile_gives_each_thread_eight_logits_in_full_loads():
    for dtype in DTYPES:
        tile = fused._tile(torch.empty(1, 1, dtype=dtype), torch.empty(1, 1))
        assert tile["R"] * tile["C"] == 8 * fused.THREADS and tile["T"] == fused.THREADS
        size = torch.empty(0, dtype=dtype).element_size()
        assert tile["C"] // tile["T"] * size == 16


# ---------------------------------------------------------------- where there is no kernel


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is a kernel on the CPU")
def test_the_cpu_takes_its_own_path():
    assert not fused.applies(*random_logits(1, 2, 30, dtype=torch.float32)[:2])


def test_a_device_that_cannot_run_them_is_said_once(monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(fused, "statistics", fail)
    monkeypatch.setattr(fused, "interpreted", lambda: True)
    fused._tried.cache_clear()
    logits = random_logits(1, 2, 30, dtype=torch.float32)[:2]
    with caplog.at_level(logging.WARNING, "diagnostics"):
        assert not fused.applies(*logits) and not fused.applies(*logits)
    fused._tried.cache_clear()
    assert len(caplog.records) == 1
    said = caplog.text
    assert "do not run on cpu (RuntimeError: no C compiler)" in said and "slower" in said


# ---------------------------------------------------------------- the two ways to run them here


@with_triton
@pytest.mark.slow
def test_the_interpreted_half():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


POINTERS = {
    "out": "*fp64",
    "values": "*fp64",
    "advantage": "*fp64",
    "scale": "*fp64",
    "sampled": "*i64",
    "ids": "*i64",
    "flags": "*i32",
    "student_maxima": "*fp32",
    "teacher_maxima": "*fp32",
    "maxima": "*fp32",
    "beta": "fp32",
}
FLAGS = {"GIVEN": False, "SCALED": True, "SLOPE": True}


@with_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, dtype, constants",
    [
        ("statistics", torch.float32, {"LEVEL": 2, "GROUP": 64}),
        ("statistics", torch.bfloat16, {"LEVEL": 2, "GROUP": 64}),
        ("statistics", torch.float32, {"LEVEL": 0, "GROUP": 64}),
        ("objective", torch.float32, {"LOSS": 1, **FLAGS}),
        ("objective", torch.bfloat16, {"LOSS": 2, **FLAGS}),
        ("objective", torch.float32, {"LOSS": 3, **FLAGS}),
        ("top_ids", torch.float32, {"GROUPS": 4096, "GROUP": 64, "K": 32}),
    ],
)
def test_the_kernels_compile_for_a_gpu_and_stay_in_its_registers(
    name, constants, dtype, tmp_path, monkeypatch
):
    """For an H100, by Triton's own compiler, which needs no GPU; registers by its cuobjdump."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from diagnostics.measure import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, logits = (
        getattr(kernels, name),
        {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype],
    )
    if name != "top_ids":
        constants = constants | fused._tile(torch.empty(1, 1, dtype=dtype))

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument in ("student", "teacher", "logits", "slope"):
            return logits
        return POINTERS.get(argument, "i64" if argument.endswith("stride") else "i32")

    names = kernel.arg_names
    aligned = [i for i, x in enumerate(names) if kind(x)[0] == "*" or x.endswith(("stride", "ary"))]
    compiled = triton.compile(
        ASTSource(
            kernel,
            {argument: kind(argument) for argument in names},
            {(names.index(constant),): value for constant, value in constants.items()},
            {(i,): [["tt.divisibility", 16]] for i in aligned},
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": fused.THREADS // 32},
    )
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
    assert "STACK:0 " in usage.stdout, usage.stdout  # nothing is spilled

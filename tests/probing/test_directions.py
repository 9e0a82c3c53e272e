"""A backward pass that is never the same twice, as on a GPU: interrupted stages go on along one
direction and never mix two.
"""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.contexts.rollouts import rollout
from diagnostics.core.progress import Shards
from diagnostics.probing import directions, intervention
from diagnostics.probing.directions import (
    FILE,
    FINISHED,
    MEASURED,
    RECORD,
    Direction,
    Finished,
    Store,
    read_record,
)
from diagnostics.probing.intervention import Grid, interventions
from diagnostics.probing.one_step import probe
from diagnostics.probing.scores import score
from diagnostics.probing.step import StepBench
from tests.conftest import make_pair, make_prompts

SMALL = {"batch_tokens": 40, "placebos": 0, "horizon": ()}
BARE = {"nulls": ()}
GRID = {"criteria": ("teachability",), "budgets": (0.3,), "random_draws": 1, "horizon": (0,)}
CELLS = ["full", "random", "random_divergent", "position_matched", "teachability"]
"""Criteria that this grid measures on a fold, in order."""


@pytest.fixture(scope="module")
def setting():
    pair = make_pair()
    bank = rollout(pair, make_prompts(12), max_new_tokens=8)
    return pair, bank, score(pair, bank)


class Noise:
    """Moves every gradient by one unit in the last place, or by some share of itself, otherwise
    each time.
    """

    def __init__(self, monkeypatch, share=None):
        self.generator, self.calls, self.share = torch.Generator().manual_seed(0), 0, share
        real, shared = StepBench.gradient, intervention.shared_gradients
        monkeypatch.setattr(
            StepBench, "gradient", lambda bench, *a, **k: self._noisy(*real(bench, *a, **k))
        )
        monkeypatch.setattr(
            intervention,
            "shared_gradients",
            lambda *a, **k: [self._moved(g) for g in shared(*a, **k)],
        )

    def _noisy(self, value, gradient):
        self.calls += 1
        return value, self._moved(gradient)

    def _moved(self, gradient):
        if self.share is not None:
            return [
                g * (1 + self.share * torch.randn(g.shape, generator=self.generator))
                for g in gradient
            ]
        up = [torch.randint(0, 2, g.shape, generator=self.generator).bool() for g in gradient]
        return [
            torch.where(
                u,
                torch.nextafter(g, torch.full_like(g, torch.inf)),
                torch.nextafter(g, torch.full_like(g, -torch.inf)),
            )
            for u, g in zip(up, gradient, strict=True)
        ]


def shards_in(folder):
    return lambda name: Shards(folder / name)


@pytest.fixture
def at_once(monkeypatch):
    """Every finished batch is on disk at once."""
    monkeypatch.setattr("diagnostics.core.progress.SHARD_SECONDS", 0.0)


def stop_at(monkeypatch, wanted):
    """Interrupts before the pass of that name; returns the names of the passes, with whether they
    took anything up.
    """
    passes, real = [], StepBench.rescore

    def rescore(self, description, **options):
        if description == wanted:
            raise KeyboardInterrupt
        shards = options.get("shards")
        passes.append((description, bool(shards is not None and shards.rows)))
        return real(self, description, **options)

    monkeypatch.setattr(StepBench, "rescore", rescore)
    return passes


PASSES = ["before", *(f"{what} {f}" for f in range(4) for what in ("step", "permuted teacher"))]
"""The passes of a probe without placebo, in their order."""


def interrupted(setting, folder, monkeypatch, at="permuted teacher 2", **options):
    """A probe that ended before the pass of that name."""
    pair, bank, tokens = setting
    with monkeypatch.context() as patch:
        stop_at(patch, at)
        with pytest.raises(KeyboardInterrupt):
            probe(pair, bank, tokens=tokens, shards=shards_in(folder), **SMALL, **options)


@pytest.mark.parametrize("loss", ["reverse_kl", "sampled"])
@pytest.mark.parametrize("at", ["step 0", "permuted teacher 0", "step 2", "permuted teacher 2"])
def test_an_interrupted_probe_goes_on_along_its_directions(
    setting, tmp_path, monkeypatch, at_once, loss, at
):
    """Nothing that is finished is measured again, and only directions that are still needed are on
    disk.
    """
    pair, bank, tokens = setting
    with monkeypatch.context() as patch:
        Noise(patch)  # the same noise as the first part will have
        whole = probe(pair, bank, tokens=tokens, loss=loss, **SMALL)
    noise = Noise(monkeypatch)
    interrupted(setting, tmp_path, monkeypatch, loss=loss, at=at)
    kept = {path.parent.name for path in tmp_path.glob(f"direction-*/{FILE}")}
    fold, null = int(at[-1]), at.startswith("permuted")
    assert kept == {f"direction-fold{later}" for later in range(fold + null, 4)} | (
        {f"direction-global-fold{fold}"} if null else set()
    )
    passes = stop_at(monkeypatch, None)
    resumed = probe(pair, bank, tokens=tokens, shards=shards_in(tmp_path), loss=loss, **SMALL)
    assert [name for name, _ in passes] == ["before", *PASSES[PASSES.index(at) :]]
    assert passes[0] == ("before", True) and not any(found for _, found in passes[1:])
    assert (
        resumed.tokens.equals(whole.tokens)
        and resumed.steps == whole.steps
        and resumed.calibration.equals(whole.calibration)
    )
    assert noise.calls == 8  # every gradient was made once
    assert not list(tmp_path.glob(f"direction-*/{FILE}"))


def test_a_pass_that_was_cut_goes_on_where_it_was(setting, tmp_path, monkeypatch, at_once):
    """The direction of a half-measured pass is found, and so are its batches."""
    pair, bank, tokens = setting
    noise = Noise(monkeypatch, share=0.1)
    with monkeypatch.context() as patch:
        real = Shards.add

        def add(shards, *args):
            real(shards, *args)
            if shards.folder is not None and shards.folder.name.startswith("after-"):
                raise KeyboardInterrupt

        patch.setattr(Shards, "add", add)
        with pytest.raises(KeyboardInterrupt):
            probe(pair, bank, tokens=tokens, shards=shards_in(tmp_path), **SMALL)
    made, passes = noise.calls, stop_at(monkeypatch, None)
    probe(pair, bank, tokens=tokens, shards=shards_in(tmp_path), **SMALL)
    assert passes[:2] == [("before", True), ("step 0", True)]
    assert made == 4 and noise.calls == 8  # the folds' directions before, their nulls' afterwards


@pytest.mark.parametrize(
    "damage", ["lost", "half", "one bit", "another model's", "no metadata", "a link"]
)
def test_two_directions_never_meet(setting, tmp_path, monkeypatch, at_once, damage):
    """Without its direction the step begins anew, and takes up nothing that was measured along the
    first.
    """
    pair, bank, tokens = setting
    noise = Noise(monkeypatch, share=0.1)
    first = probe(pair, bank, tokens=tokens, **BARE, **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):  # after the first fold's pass
            probe(pair, bank, tokens=tokens, shards=shards_in(tmp_path), **BARE, **SMALL)
    for fold in range(4):
        damaged(tmp_path / f"direction-fold{fold}" / FILE, damage)
    with monkeypatch.context() as patch:
        passes = stop_at(patch, None)
        state = noise.generator.get_state()
        again = probe(pair, bank, tokens=tokens, shards=shards_in(tmp_path), **BARE, **SMALL)
        assert passes[:2] == [("before", True), ("step 0", False)]
    noise.generator.set_state(state)
    second = probe(pair, bank, tokens=tokens, **BARE, **SMALL)
    assert (
        again.tokens.equals(second.tokens)
        and again.steps == second.steps
        and again.calibration.equals(second.calibration)
    )
    assert not np.allclose(
        first.tokens.gain, second.tokens.gain, rtol=1e-3
    )  # another direction is another result


@pytest.mark.parametrize("damage", ["table", "record", "link"])
def test_damaged_measurements_are_measured_again(setting, tmp_path, monkeypatch, at_once, damage):
    pair, bank, tokens = setting
    whole = probe(pair, bank, tokens=tokens, **SMALL)
    interrupted(setting, tmp_path, monkeypatch, at="step 3")
    folder = tmp_path / "direction-fold1"
    if damage == "link":
        (folder / MEASURED).rename(folder / "else")
        (folder / MEASURED).symlink_to(folder / "else")
    else:
        path = folder / {"table": MEASURED, "record": FINISHED}[damage]
        content = path.read_bytes()
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    passes = stop_at(monkeypatch, None)
    again = probe(pair, bank, tokens=tokens, shards=shards_in(tmp_path), **SMALL)
    assert "step 1" in [name for name, _ in passes] and "step 2" not in [name for name, _ in passes]
    assert again.tokens.equals(whole.tokens) and again.steps == whole.steps


def test_a_first_step_of_another_size_takes_the_others_with_it(setting, tmp_path, at_once):
    """Folds that were measured at an earlier size are measured anew."""
    pair, bank, tokens = setting
    first = probe(pair, bank, tokens=tokens, shards=shards_in(tmp_path), step=1e-4, **SMALL)
    second = probe(pair, bank, tokens=tokens, shards=shards_in(tmp_path), step=2e-4, **SMALL)
    assert second.tokens.equals(probe(pair, bank, tokens=tokens, step=2e-4, **SMALL).tokens)
    assert (second.tokens.gain_permuted != first.tokens.gain_permuted).mean() > 0.9


def damaged(path, damage):
    content = path.read_bytes()
    if damage == "lost":
        path.unlink()
    elif damage == "half":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "one bit":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "a link":
        path.rename(path.with_suffix(".else"))
        path.symlink_to(path.with_suffix(".else"))
    else:
        from safetensors.torch import load_file, save_file

        tensors = load_file(path)
        name = next(iter(tensors))
        direction = Direction([tensors[name][:-1]], "reverse_kl", 1.0, 1.0, -1.0, 1.0)
        record = json.dumps({"facts": direction.facts(), "sha256": direction.named().sha256})
        save_file(
            tensors | {name: tensors[name][:-1]},
            path,
            metadata=None if damage == "no metadata" else {"direction": record},
        )


def test_an_interrupted_grid_finds_its_cells(setting, tmp_path, monkeypatch):
    """Every cell measured once, full and placebo along one direction; a wider grid keeps what it
    has.
    """
    pair, bank, tokens = setting
    noise, measured, real = Noise(monkeypatch), [], Grid._effect
    along = []

    def effect(self, one, *rest):
        if len(measured) == limit:
            raise KeyboardInterrupt
        measured.append(one.cell.criterion)
        along.append(self.full.direction.sha256)
        return real(self, one, *rest)

    monkeypatch.setattr(Grid, "_effect", effect)
    options = {
        "tokens": one_step(tokens),
        "cache": tmp_path / "cells",
        "shards": shards_in(tmp_path / "scratch"),
    }
    for further in (1, 2, 3, 4):  # each time one cell further
        limit = further
        with pytest.raises(KeyboardInterrupt):
            interventions(pair, bank, **options, **GRID)
    limit, made = 100, noise.calls
    first = interventions(pair, bank, **options, **GRID)
    assert measured == CELLS
    assert len(set(along)) == 1
    assert made == 2  # the directions of both folds, whose steps have one size, once
    again = interventions(
        pair,
        bank,
        **options | {"shards": shards_in(tmp_path / "another")},
        **GRID | {"criteria": ("teachability", "entropy")},
    )
    assert measured[5:] == ["entropy"]
    assert len(set(along)) == 1
    assert noise.calls == made
    assert again.calibration.equals(first.calibration)
    for one, other in zip(first.effects, again.effects[: len(first.effects)], strict=True):
        np.testing.assert_array_equal(one.reduction_N3, other.reduction_N3)


def test_a_grid_without_its_direction_measures_every_cell_again(setting, tmp_path, monkeypatch):
    pair, bank, tokens = setting
    Noise(monkeypatch)
    along, real = [], Grid._effect
    monkeypatch.setattr(
        Grid,
        "_effect",
        lambda self, one, *rest: (
            along.append((self.full.direction.sha256, one.cell.criterion)),
            real(self, one, *rest),
        )[1],
    )
    interventions(pair, bank, tokens=one_step(tokens), cache=tmp_path, **GRID)
    (record,) = tmp_path.glob("step-*.json")
    record.unlink()
    interventions(pair, bank, tokens=one_step(tokens), cache=tmp_path, **GRID)
    assert [name for _, name in along] == CELLS * 2
    first, second = ({sha for sha, _ in part} for part in (along[:5], along[5:]))
    assert len(first) == len(second) == 1
    assert first != second


def one_step(tokens):
    """The table with a step half, as for a single step."""
    first = tokens.prompt_id.isin(sorted(tokens.prompt_id.unique())[::2])
    return tokens.assign(split=np.where(first, "step", "held_out"))


# --- the store
# ------------------------------------------------------------------------------------------


def some_direction(seed=0):
    generator = torch.Generator().manual_seed(seed)
    update = [
        torch.randn(3, 2, generator=generator),
        torch.randn((), generator=generator).double(),
        torch.randn(4, 2, generator=generator).T,
    ]
    return Direction(update, "jsd", 0.1 + seed, 1 / 3, -2e-17, np.pi).named()


def test_a_direction_comes_back_bit_for_bit(tmp_path):
    direction, store = some_direction(), Store(tmp_path / "x")
    store.keep(direction)
    found = store.direction(direction.update)
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype
        for a, b in zip(found.update, direction.update, strict=True)
    )
    assert (
        found.facts() == direction.facts()
        and found.sha256 == direction.sha256
        and found.name(0.1) == direction.name(0.1)
    )
    assert [path.name for path in (tmp_path / "x").iterdir()] == [FILE]
    assert store.direction(direction.update[:2]) is None or len(found.update) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"value": 0.2},
        {"norm": 3.0},
        {"calibration_loss": "forward_kl"},
        {"update": some_direction(1).update},
    ],
)
def test_a_name_holds_every_number(change):
    direction = some_direction()
    other = dataclasses.replace(direction, **change).named()
    assert other.name(0.1) != direction.name(0.1) != direction.name(np.nextafter(0.1, 1))


def test_a_calibration_is_of_one_direction(tmp_path, setting):
    table = pd.DataFrame(
        {"step_size": [0.1, 1 / 3], "ratio": [np.nan, 0.85], "chosen": [False, True]}
    )
    store, direction = Store(tmp_path), some_direction()
    store.keep_calibration(direction, table)
    pd.testing.assert_frame_equal(store.calibration(direction), table, check_exact=True)
    assert (
        store.calibration(some_direction(1)) is None
        and read_record(tmp_path / RECORD)[0].update == []
    )
    (tmp_path / RECORD).write_text("{")
    assert store.calibration(direction) is None


def test_finished_measurements_come_back_bit_for_bit(tmp_path, at_once):
    table = pd.DataFrame({"step_size": [1 / 3], "ratio": [np.nan], "chosen": [True]})
    measured = pd.DataFrame({"gain_fold0": [0.1, np.nan, -1e-300]})
    store, direction = Store(tmp_path), some_direction()
    store.keep(direction)
    store.finish(Finished(direction, 1 / 3, measured, table))
    assert sorted(path.name for path in tmp_path.iterdir()) == [FINISHED, MEASURED]
    found = store.finished()
    assert found.size == 1 / 3 and found.direction.name(0.1) == direction.name(0.1)
    assert found.direction.update == [] and found.direction.facts() == direction.facts()
    pd.testing.assert_frame_equal(found.measured, measured, check_exact=True)
    pd.testing.assert_frame_equal(found.calibration, table, check_exact=True)
    store.finish(Finished(direction, 1 / 3, measured, None))
    assert store.finished().calibration is None


def test_nothing_is_kept_without_a_folder():
    store = Store(None)
    store.keep(some_direction()), store.keep_calibration(some_direction(), None)
    store.finish(Finished(some_direction(), 1.0, pd.DataFrame({"x": [1.0]}), None))
    assert store.direction([]) is None and store.calibration(some_direction()) is None
    assert store.finished() is None


def test_a_disk_without_room_stops_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(directions, "RESERVE_BYTES", 2**62)
    Store(tmp_path / "x").keep(some_direction())
    assert (
        "cannot be kept, so that a killed run would start this stage again: It takes 0.00 GiB"
        in caplog.text
        and not any(tmp_path.iterdir())
    )


def test_a_failed_write_stops_nothing(tmp_path, caplog):
    (tmp_path / "x").write_text("in the way")
    Store(tmp_path / "x").finish(Finished(some_direction(), 1.0, pd.DataFrame({"x": [1.0]}), None))
    assert "what was measured along a step cannot be kept" in caplog.text
    Store(tmp_path / "x").keep(some_direction())
    assert "cannot be kept, so that a killed run would start this stage again" in caplog.text

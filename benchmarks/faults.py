"""Long campaigns against a run directory, run by hand: kill -9 at random moments, a full disk.

    python benchmarks/faults.py kills --kills 20    measurements, the intervention grid and the main
                                                    job, each killed and resumed
    python benchmarks/faults.py disk                a small tmpfs (needs root) that is filled up,
                                                    made larger, and used again

Every trial ends with a comparison of all final files with those of an uninterrupted run. The
embedded pair, few contexts; every finished batch is on disk at once, so that a run of a minute has
as many places to resume from as one of hours. Counts of the last campaigns stand in docs/faults.md.
"""

from __future__ import annotations

import argparse
import atexit
import collections
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORK = multiprocessing.get_context("fork")
SAID = Path(tempfile.gettempdir()) / f"opd-faults-{os.getpid()}.txt"
"""What the last command said."""
PAIR = ["--pair", "embedded", "--device", "cpu", "--batch-tokens", "100", "--quiet"]
ROLLOUT = ["--contexts", "8", "--max-new-tokens", "16"]
MEASURED = [["rollout", *PAIR[:4], *ROLLOUT, "--quiet"], ["score", *PAIR], ["probe", *PAIR]]
MAIN = [["run", "--quick", *PAIR, *ROLLOUT, "--draws", "20"]]
GRID = [
    [
        "intervene",
        *PAIR,
        "--criteria",
        "divergence,teachability,tip",
        "--budgets",
        "0.1,0.3",
        "--random-draws",
        "2",
        "--draws",
        "20",
    ]
]


def child(commands: list[list[str]], directory: Path) -> None:
    """Commands one after the other in this process, every finished batch on disk at once, its words
    in a file.
    """
    from diagnostics.core import progress as run_directory
    from diagnostics.pipeline import cli

    run_directory.SHARD_SECONDS = 0.0
    with open(SAID, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    code = next(
        (
            code
            for command in commands
            if (code := cli.main([*command, "--output-dir", str(directory)]))
        ),
        0,
    )
    sys.stdout.flush()
    os._exit(code)


def start(commands: list[list[str]], directory: Path) -> BaseProcess:
    """Commands in a process of its own, forked from this one, which has the libraries in memory
    already.
    """
    sys.stdout.flush()
    process = FORK.Process(target=child, args=(commands, directory))
    process.start()
    return process


def finish(commands: list[list[str]], directory: Path) -> tuple[int, str]:
    """Exit code and words of the commands."""
    process = start(commands, directory)
    process.join(1800)
    return process.exitcode, SAID.read_text()


def visible(directory: Path) -> dict[str, str]:
    """Hash of every file that is not hidden."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    shown = ((path.relative_to(directory), path) for path in paths)
    return {
        str(name): hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in shown
        if not any(part.startswith(".") for part in name.parts)
    }


def where(directory: Path) -> str:
    """What was under way when a process was killed, by what it left."""
    for marks, name in (
        (
            (".partial/*/placebo-*/*", ".partial/*/after-*/*", ".partial/*/before/*"),
            "probe, re-scoring",
        ),
        ((".partial/score-*/*/*",), "score"),
        ((".partial/rollout-*/*/*",), "rollout"),
        (("interventions.parquet",), "grid, tables"),
        (("cells/*",), "grid, cells"),
        (("figures/*", "report.md"), "report, writing"),
        (("tables/correlations.csv",), "analyze, writing"),
        (("gains.parquet",), "analyze, computing"),
        (("scores.parquet",), "probe, step"),
        (("contexts.parquet",), "score, first batch"),
    ):
        if any(next(directory.glob(mark), None) for mark in marks):
            return name
    return "start"


def campaign(
    name: str,
    commands: list[list[str]],
    prepared: Path | None,
    folder: Path,
    *,
    kills: int,
    seed: int,
) -> tuple[int, collections.Counter]:
    """Kill and resume `kills` times; number of resumed directories that differ from the
    uninterrupted one, and where the kills fell.
    """
    whole, began = folder / f"{name}-whole", time.perf_counter()
    if prepared:
        shutil.copytree(prepared, whole)
    code, output = finish(commands, whole)
    assert code == 0, output
    seconds, expected, draw, fell, wrong = (
        time.perf_counter() - began,
        visible(whole),
        random.Random(seed),
        collections.Counter(),
        0,
    )
    while fell.total() < kills:
        directory = folder / f"{name}-{fell.total()}"
        if prepared:
            shutil.copytree(prepared, directory)
        process, moment = start(commands, directory), draw.uniform(0, seconds)
        process.join(moment)
        if process.is_alive():
            process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            place = where(directory) if directory.exists() else "start"
            code, output = finish(commands, directory)
            same = (
                code == 0
                and visible(directory) == expected
                and not (directory / ".partial").exists()
                and not list(directory.rglob("*.tmp"))
            )
            fell[place] += 1
            wrong += not same
            print(
                f"{name} {fell.total():3d}: killed after {moment:5.1f} of {seconds:.1f} s"
                f" ({place}); {'identical' if same else f'DIFFERENT {output[-500:]}'}",
                flush=True,
            )
        shutil.rmtree(directory, ignore_errors=True)
    return wrong, fell


def kills(folder: Path, options: argparse.Namespace) -> int:
    """What is measured, then the intervention grid on it, then the main job with its tables and
    pages.
    """
    wrong = 0
    for number, (name, commands, prepared, times) in enumerate(
        (
            ("measured", MEASURED, None, options.kills),
            ("grid", GRID, "measured-whole", options.kills),
            ("main", MAIN, None, options.whole),
        )
    ):
        different, fell = campaign(
            name,
            commands,
            prepared and folder / prepared,
            folder,
            kills=times,
            seed=options.seed + number,
        )
        print(f"{name}: {times} kills, {different} differences; {dict(fell)}", flush=True)
        wrong += different
    return wrong


def disk(folder: Path, options: argparse.Namespace) -> int:
    """The main job on file systems of several sizes: an error in one sentence, then the same files
    once there is room.
    """
    whole, wrong, full = folder / "whole", 0, 0
    assert finish(MAIN, whole)[0] == 0
    expected, needed = (
        visible(whole),
        sum(path.stat().st_size for path in whole.rglob("*") if path.is_file()) // 1024,
    )
    small = folder / "small"
    small.mkdir()
    for share in (0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9):
        subprocess.run(
            [
                "mount",
                "-t",
                "tmpfs",
                "-o",
                f"size={max(4, int(share * needed))}k",
                "tmpfs",
                str(small),
            ],
            check=True,
        )
        try:
            code, output = finish(MAIN, small / "out")
            clear = (
                code == 2
                and "error: " in output
                and "No space left on device" in output
                and "Traceback" not in output
            )
            subprocess.run(["mount", "-o", f"remount,size={8 * needed}k", str(small)], check=True)
            again, later = finish(MAIN, small / "out")
            same = again == 0 and visible(small / "out") == expected
        finally:
            subprocess.run(["umount", str(small)], check=True)
        full, wrong = full + (code == 2), wrong + (not (clear or code == 0) or not same)
        print(
            f"{share:5.3f} of {needed} KiB: exit {code}, {'clear' if clear else output[-300:]!r};"
            f" with room {'identical' if same else f'DIFFERENT {later[-300:]!r}'}",
            flush=True,
        )
    print(f"full disk: {full} runs stopped, {wrong} faults")
    return wrong


def main() -> int:
    """Run one campaign in a scratch folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("campaign", choices=("kills", "disk"))
    parser.add_argument(
        "--kills",
        type=int,
        default=20,
        help="of rollout, score and probe, and of the intervention grid",
    )
    parser.add_argument(
        "--whole",
        type=int,
        default=20,
        help="of the main job with tables and report, which takes longest",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import torch

    from diagnostics import load_pair, rollout, sums
    from diagnostics.pipeline import registry

    for stage in registry.STAGES:
        if stage.run is not None:
            stage.function()  # children find its module in memory
    torch.set_num_threads(1)  # a process with threads is not to be forked
    pair = load_pair("embedded", device="cpu")
    rollout(pair, sums(1, seed=0), max_new_tokens=1)  # what loads late has been loaded
    with tempfile.TemporaryDirectory() as scratch:
        atexit.register(SAID.unlink, missing_ok=True)
        return int({"kills": kills, "disk": disk}[options.campaign](Path(scratch), options) > 0)


if __name__ == "__main__":
    sys.exit(main())

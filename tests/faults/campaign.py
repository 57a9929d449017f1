"""Disturb real commands at random moments and see that nothing is lost.

    python tests/faults/campaign.py --trials 100 --seed 1 --jobs 2 --json faults.json

A trial starts a training (tiny model, 1-3 ranks), a GPTQ quantization, a merge or an export, and at
a random moment of a phase (load, step, checkpoint, gather, solve, merge, export) kills a rank,
stops one (SIGSTOP), sends a signal that asks to stop, or fills the disk (a tmpfs of its own; needs
root, else such trials are skipped). Then it checks that

- every process ended within the limit, with the exit code of its fault;
- stderr and log.txt end with one line that says why, and no traceback is on stderr;
- run_state.json says how the run ended;
- the same command again ends with 0 (some trials disturb it a second time, or move the run first);
- losses, held-out losses, adapter, probe and exports are equal bit for bit to those of an
  undisturbed command, and no temporary, lock or partial directory is left.
"""

import argparse
import json
import multiprocessing.forkserver
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as an entry point does, before torch

from dist_peft.core.config.run import EngineConfig
from dist_peft.core.patient_wait import WATCH_SECONDS
from dist_peft.train.run_state import read_run_state
from tests.faults.injection import SIGNALS, Fault
from tests.faults.processes import Ended, run_command
from tests.faults.workloads import (
    EXPORTS,
    START_SECONDS,
    STEPS,
    Job,
    Material,
    compare_results,
    find_leftovers,
    read_result,
)
from tests.support.small_disk import BALLAST, explain_no_disk, mount_small_disk

__all__ = ["Campaign", "Trial", "draw_trials"]

PHASES = ("load", "step", "checkpoint", "gather", "solve", "merge", "export")
KINDS = ("kill", "signal", "full", "stop")
ENGINES = {"single": (1,), "fsdp2": (2, 3), "zero": (2, 3)}
LIMIT = 30.0
"""Seconds from the fault to the end of every process."""
SLOW_LIMIT = LIMIT + max(2 * WATCH_SECONDS, START_SECONDS)
"""The same for a killed rank where others may wait for it at the rendezvous, or while it loads."""
STALL_SECONDS = 3.0
STALL_LIMIT = 12 * STALL_SECONDS + 30.0
"""The same for a rank that stands still: set-up and GPTQ have multiples of the limit of a step."""
FREEZE_SECONDS = 1.0
"""How long a process is stopped where nothing watches it."""

TYPICAL_MOMENTS = {
    "load": 10_000,
    "step": 22_000,
    "checkpoint": 13_000,
    "gather": 1_700,
    "solve": 19_000,
    "merge": 7_000,
    "export": 7_000,
}
"""About as many moments as the first rank has in each phase, where they are not counted."""

CAN_STALL = "stall_seconds" in EngineConfig.model_fields


@dataclass(frozen=True)
class Trial:
    """A command, its faults one after another, and whether its run moves before the last start.

    ``shares``: where in its phase each fault falls, 0 to 1.
    """

    number: int
    job: Job
    faults: tuple[Fault, ...]
    shares: tuple[float, ...]
    moves: bool = False


def draw_trials(
    count: int, seed: int, engines: Sequence[str] = tuple(ENGINES), most_ranks: int = 3
) -> list[Trial]:
    """Draw trials; any 28 in a row have each fault in each phase."""
    rng = random.Random(seed)
    phases, kinds = rng.sample(PHASES, len(PHASES)), rng.sample(KINDS, len(KINDS))
    trials = []
    for number in range(count):
        # 7 and 4 have no common divisor: all pairs come
        phase, kind = phases[number % len(phases)], kinds[number % len(kinds)]
        job = _draw_job(rng, phase, engines, most_ranks)
        faults = [_draw_fault(rng, phase, kind, job)]
        if phase not in ("merge", "export") and rng.random() < 0.2:
            again = rng.choice([k for k in KINDS if k not in ("full", "stop")])
            inner = "solve" if job.verb == "quantize" else rng.choice(PHASES[:4])
            faults.append(_draw_fault(rng, inner, again, job))
        moves = job.verb == "train" and kind != "full" and rng.random() < 0.25
        shares = tuple(rng.random() for _ in faults)
        trials.append(Trial(number, job, tuple(faults), shares, moves))
    return trials


def _draw_job(rng: random.Random, phase: str, engines: Sequence[str], most_ranks: int) -> Job:
    if phase == "merge":
        return Job("merge")
    if phase == "export":
        return Job("export", form=rng.choice(sorted(EXPORTS)))
    engine = rng.choice(list(engines))
    ranks = rng.choice([n for n in ENGINES[engine] if n <= most_ranks])
    if phase == "solve":
        if engine == "zero":
            engine = "fsdp2"
        return Job("quantize", engine, ranks)
    return Job("train", engine, ranks, asynchronous=rng.random() < 0.7)


def _draw_fault(rng: random.Random, phase: str, kind: str, job: Job) -> Fault:
    return Fault(
        kind,
        phase,
        rank=rng.randrange(job.ranks),
        delay=0.0 if rng.random() < 0.6 else rng.random() * 0.05,
        signal=rng.choice(SIGNALS) if kind == "signal" else "",
        everyone=kind == "signal" and rng.random() < 0.5,
        spare=rng.choice((0, 4096, 65536)),
    )


@dataclass
class Outcome:
    """What a trial showed; ``problems`` is empty where everything held."""

    trial: Trial
    faults: list[str] = field(default_factory=list)
    codes: list[tuple[int | None, ...]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped: str = ""


class Campaign:
    """Runs trials in ``directory``, each against an undisturbed run of the same kind.

    Args:
        count: count the moments of each phase in the undisturbed runs, which takes them three times
            as long; else ``TYPICAL_MOMENTS``.
    """

    def __init__(self, directory: Path, *, count: bool = True) -> None:
        self.directory = directory
        self.count = count
        self.material = Material(directory / "material")
        self._expected: dict[Job, tuple[dict[str, Any], dict[int, dict[str, int]]]] = {}

    def run_references(self, trials: Sequence[Trial], jobs: int) -> None:
        """Run everything once undisturbed; count the moments of each phase on each rank."""
        finished = Job("train")
        self._run_reference(finished)
        shutil.copytree(
            self.directory / "reference" / finished.name / "run",
            self.material.directory / "finished",
        )
        wanted = {t.job.reference for t in trials} - {finished}
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(self._run_reference, sorted(wanted, key=lambda job: job.name)))

    def _run_reference(self, job: Job) -> None:
        place = self.directory / "reference" / job.name
        notes = self.directory / "reference" / f"{job.name} notes"
        place.mkdir(parents=True)
        argv = self.material.build_arguments(job, place)
        fault = Fault("count" if self.count else "none")
        ended = run_command(argv, job.ranks, notes, fault, 120)
        assert ended.codes == (0,) * job.ranks, f"{job.name}: {ended.codes}\n{ended.stderr}"
        counts = dict.fromkeys(range(job.ranks), TYPICAL_MOMENTS)
        if self.count:
            files = {rank: notes / f"moments-{rank}.json" for rank in counts}
            counts = {rank: json.loads(file.read_text()) for rank, file in files.items()}
        assert not find_leftovers(place), find_leftovers(place)
        self._expected[job] = read_result(job, place), counts

    def run_trial(self, trial: Trial) -> Outcome:
        outcome = Outcome(trial)
        place = self.directory / f"trial {trial.number}"
        place.mkdir(parents=True)
        if any(fault.kind == "full" for fault in trial.faults):
            if (reason := explain_no_disk()) is not None:
                outcome.skipped = reason
                return outcome
            with mount_small_disk(place):
                self._run_trial(trial, place, outcome)
        else:
            self._run_trial(trial, place, outcome)
        if not outcome.problems:
            shutil.rmtree(place, ignore_errors=True)
            shutil.rmtree(self.directory / f"trial {trial.number} notes", ignore_errors=True)
        return outcome

    def _run_trial(self, trial: Trial, place: Path, outcome: Outcome) -> None:
        job, notes = trial.job, self.directory / f"trial {trial.number} notes"
        expected, counts = self._expected[job.reference]
        for number, (drawn, share) in enumerate(zip(trial.faults, trial.shares, strict=True)):
            total = counts[drawn.rank].get(drawn.phase, 1)
            fault = replace(drawn, moment=int(share * total), disk=str(place))
            argv = self.material.build_arguments(job, place)
            freeze = 0.0
            if fault.kind == "stop":
                watched = CAN_STALL and job.ranks > 1
                argv[3:3] = [f"engine.stall_seconds={STALL_SECONDS:g}"] if watched else []
                freeze = 0.0 if watched else FREEZE_SECONDS
            limit = STALL_LIMIT if fault.kind == "stop" and not freeze else LIMIT
            if fault.kind == "kill" and fault.phase in ("load", "solve"):
                limit = SLOW_LIMIT
            ended = run_command(argv, job.ranks, notes / str(number), fault, limit, freeze)
            outcome.codes.append(ended.codes)
            outcome.seconds.append(round(ended.seconds, 1))
            (place / BALLAST).unlink(missing_ok=True)
            outcome.faults.append(fault.describe())
            check = EndCheck(
                job, fault, ended, Material.get_output(job, place), bool(freeze), number > 0
            )
            outcome.lines.append(check.last_line)
            outcome.problems += [f"fault {number + 1}: {p}" for p in check.find_problems()]
        if trial.moves:
            place = self._move(place)
        self._finish(trial, place, notes / "end", expected, outcome)

    def _move(self, place: Path) -> Path:
        moved = place.with_name(f"{place.name} moved")
        place.rename(moved)
        return moved

    def _finish(
        self, trial: Trial, place: Path, notes: Path, expected: dict[str, Any], outcome: Outcome
    ) -> None:
        """Run the command undisturbed and compare its result."""
        job, out = trial.job, Material.get_output(trial.job, place)
        written = out.exists() and (out.is_file() or any(out.iterdir()))
        if job.verb != "train" and written:
            # the fault came after the result was published: it must be whole
            outcome.problems += compare_results(read_result(job, place), expected)
            if job.verb == "quantize":
                shutil.rmtree(out)  # there is no --overwrite
        argv = self.material.build_arguments(job, place, overwrite=written)
        if trial.moves and (out / "config.yaml").exists():
            argv[argv.index("--config") + 1] = str(out / "config.yaml")
        ended = run_command(argv, job.ranks, notes, Fault(), 4 * LIMIT)
        outcome.codes.append(ended.codes)
        if ended.codes != (0,) * job.ranks:
            outcome.problems.append(f"the restart ended with {ended.codes}: {ended.stderr[-600:]}")
            return
        outcome.problems += compare_results(read_result(job, place), expected)
        outcome.problems += [f"left: {name}" for name in find_leftovers(place)]
        if job.verb == "train":
            state = read_run_state(out)
            if state is None or (state.state, state.step) != ("finished", STEPS):
                outcome.problems.append(f"after the restart run_state.json says {state}")


@dataclass(frozen=True)
class EndCheck:
    """Checks of the end of a disturbed command.

    Attributes:
        thawed: a stopped process continued before anything watched it.
        again: of a command that was disturbed before; it may have little left to do.
    """

    job: Job
    fault: Fault
    ended: Ended
    out: Path
    thawed: bool
    again: bool

    def find_problems(self) -> list[str]:
        found = list(self._check_codes())
        if None not in self.ended.codes:
            found += self._check_lines()
            if self.job.verb == "train":
                found += self._check_state()
        return found

    @property
    def last_line(self) -> str:
        lines = [line for line in re.split(r"[\r\n]+", self.ended.stderr) if line.strip()]
        return lines[-1].strip() if lines else ""

    def _check_codes(self) -> Iterator[str]:
        fault, codes = self.fault, self.ended.codes
        if not self.ended.struck:
            # a delay may be longer than the rest of the command
            if set(codes) != {0} or not (self.again or fault.delay):
                yield f"the fault did not strike; codes {codes}"
            return
        if None in codes:
            yield f"no end within {self.ended.seconds:.0f} s: {codes}"
            return
        others = [code for rank, code in enumerate(codes) if rank != fault.rank]
        mine = codes[fault.rank]
        if fault.kind == "kill":
            allowed = {0, 1, 2} if fault.phase in ("load", "solve") else {0, 1}
            if mine != -9 or not set(others) <= allowed:
                yield f"codes {codes} after kill -9 of rank {fault.rank}"
        elif fault.kind == "signal":
            number = signal.Signals[fault.signal]
            stopped = 128 + number if self.job.verb in ("merge", "export") else 75
            if len(set(codes)) > 1 or mine not in (0, stopped):
                yield f"codes {codes} after {fault.signal}"
        elif fault.kind == "full":
            if len(set(codes)) > 1 or mine not in (0, 2):
                yield f"codes {codes} on a full disk"
        elif self.thawed and set(codes) != {0}:
            yield f"codes {codes} though the process stood still for {FREEZE_SECONDS:g} s only"
        elif not self.thawed and not ({*others} <= {0, 1} and mine in (0, 1)):
            yield f"codes {codes} after SIGSTOP of rank {fault.rank}"

    def _check_lines(self) -> Iterator[str]:
        # stacks of a rank that stands still go to stderr as long as there is no run directory
        stacks = self.fault.kind == "stop" and not (self.out / "log.txt").exists()
        if re.search(r"Traceback \(most|Logging error", self.ended.stderr) and not stacks:
            yield f"traceback on stderr: {self.ended.stderr[-1500:]}"
        codes = {code for code in self.ended.codes if code is not None and code > 0}
        last = self.ended.stderr if stacks else self.last_line
        if codes & {1, 2} and not re.search("^dist-peft: ", last, re.MULTILINE):
            yield f"the last line is {self.last_line!r}"
        if 75 in codes and not re.search("signal|stopped on", self.last_line):
            yield f"the last line after a signal is {self.last_line!r}"
        log = self.out / "log.txt"
        untold = self.fault.kind == "full" or (self.again and self.fault.phase == "load")
        if not codes or self.job.verb != "train" or not log.exists() or untold:
            return
        told = log.read_text(errors="replace").strip().splitlines()[-1:]
        reasons = [
            line.partition("dist-peft: ")[2] or line.partition(": ")[2]
            for line in re.split(r"[\r\n]+", self.ended.stderr)
            if line.startswith("dist-peft: ") or re.search("signal|stopped on", line)
        ]
        if not any(reason and reason in line for reason in reasons for line in told):
            yield f"log.txt ends with {told}, stderr with {self.last_line!r}"

    def _check_state(self) -> Iterator[str]:
        try:
            state = read_run_state(self.out)
        except Exception as error:
            yield f"run_state.json: {error}"
            return
        if state is None:
            if self.fault.phase != "load" and not self.job.solver:
                yield "there is no run_state.json"
            return
        allowed = {
            "kill": {"failed", "finished"},
            "stop": {"failed", "finished"},
            "signal": {"stopped", "finished"},
            # where not a byte is left the state stays "running", of a process that has ended
            "full": {"refused", "failed", "finished"},
        }[self.fault.kind]
        if self.again and self.fault.phase == "load":
            allowed |= {"failed"}  # until the run directory is opened it tells of the fault before
        if state.state not in allowed:
            yield f"run_state.json says {state}"
        if state.state in ("failed", "refused", "stopped") and not state.reason:
            yield f"run_state.json gives no reason: {state}"


# -- command line ----------------------------------------------------------------------------------


def run_campaign(
    trials: Sequence[Trial], directory: Path, jobs: int, *, count: bool = True
) -> Iterator[Outcome]:
    """Yield the outcome of each trial, in order."""
    campaign = Campaign(directory, count=count)
    campaign.run_references(trials, jobs)
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(campaign.run_trial, trials)


def format_row(outcome: Outcome) -> str:
    ok = "skipped" if outcome.skipped else "FAILED" if outcome.problems else "ok"
    codes = " -> ".join(str(list(codes)) for codes in outcome.codes)
    seconds = ", ".join(f"{s:g} s" for s in outcome.seconds)
    what = "; then ".join(outcome.faults) + "; moved" * outcome.trial.moves
    return (
        f"{outcome.trial.number:4d}  {ok:7s} {outcome.trial.job.name}: {what} | {codes} | {seconds}"
    )


def measure_children_cpu() -> float:
    """Return the CPU seconds of all processes that the trials started."""
    server = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    times = psutil.Process(server).cpu_times()
    return times.children_user + times.children_system


def main(argv: Sequence[str] | None = None) -> int:
    """Run a campaign; return 1 if a trial failed."""
    parser = argparse.ArgumentParser(description="Disturb real commands at random moments.")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=sorted(ENGINES), help="of trainings; default: all")
    parser.add_argument("--ranks", type=int, default=3, help="the most processes of a training")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of trials to run")
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
    parser.add_argument(
        "--no-count", action="store_true", help="draw moments from typical numbers of them"
    )
    parser.add_argument("--directory", type=Path, help="new; kept, with what failed")
    parser.add_argument("--json", type=Path, help="write every outcome to this file")
    args = parser.parse_args(argv)
    engines = [args.engine] if args.engine else list(ENGINES)
    trials = draw_trials(args.trials, args.seed, engines, args.ranks)
    trials = [t for t in trials if not args.only or t.number in args.only]
    directory = args.directory or Path(tempfile.mkdtemp(prefix="faults-"))
    directory.mkdir(exist_ok=True)
    began, outcomes = time.time(), []
    for outcome in run_campaign(trials, directory, args.jobs, count=not args.no_count):
        outcomes.append(outcome)
        print(format_row(outcome), flush=True)
        for problem in outcome.problems:
            print(f"        {problem}", flush=True)
    failed = sum(bool(o.problems) for o in outcomes)
    skipped = [o.skipped for o in outcomes if o.skipped]
    print(f"{len(outcomes)} trials, {failed} failed, {len(skipped)} skipped, ", end="")
    print(f"{time.time() - began:.0f} s, {measure_children_cpu():.0f} s CPU, in {directory}")
    for reason in sorted(set(skipped)):
        print(f"skipped: {reason}")
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    if args.directory is None and not failed:
        shutil.rmtree(directory)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

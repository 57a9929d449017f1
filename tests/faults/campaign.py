"""Disturb real commands at random moments and see that nothing is lost.

    python tests/faults/campaign.py --trials 100 --seed 1 --jobs 2 --json faults.json

A trial starts a training (tiny model, 1-3 ranks), a GPTQ quantization, a merge or an export, and at
a random moment of a phase (load, step, checkpoint, gather, solve, merge, export) kills a rank,
stops one (SIGSTOP), sends a signal that asks to stop, or fills the disk (a tmpfs of its own; needs
root, else such trials are skipped). Then it checks that

- every process ended within the limit that the product declares, with the exit code of its fault;
- stderr of each rank and log.txt end with one line that says why, and no traceback is on stderr;
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

from dist_peft.core.patient_wait import LOOK_SECONDS, WATCH_SECONDS
from dist_peft.core.rendezvous import GRACE_SECONDS, PULSE_SECONDS
from dist_peft.train.run_state import read_run_state
from tests.faults.injection import SIGNALS, Fault
from tests.faults.processes import Ended, Limits, run_command
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
EXIT_SECONDS = 6.0
"""Given to processes to find their next safe point, write their last files and exit."""
LIMIT = WATCH_SECONDS + PULSE_SECONDS + LOOK_SECONDS + EXIT_SECONDS
"""Seconds from the fault to the end of every process: 30. A rank that died while others wait for
it is found by its heartbeats; one that died in a collective earlier."""
START_LIMIT = START_SECONDS + GRACE_SECONDS + EXIT_SECONDS
"""The same where the rank that was hit had not come: ``engine.start_timeout_minutes``."""
STALL_SECONDS = 5.0
"""Of ``engine.stall_seconds``: more than a step takes here, also on a busy machine."""
STALL_EXIT_SECONDS = 15.0
"""The survivors' time to name a rank that stands still, after ``engine.stall_seconds``."""
STALL_LIMIT = STALL_SECONDS + 2 * STALL_EXIT_SECONDS
"""Seconds from SIGSTOP to the end of every process: the stopped one continues when the others have
ended, and notices that in as long."""
LATE_SECONDS = 3.0
"""A solve, merge or export that ends well so soon after a signal had no safe point left."""
FREEZE_SECONDS = 1.0
"""How long a process is stopped where nothing watches it."""
RUN_LIMIT = 120.0
"""Seconds of a whole command that nothing disturbs, or that continues after such a stop."""

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

SOLVER_SHARE = 0.15
"""Of trainings, those on a base that GPTQ quantizes first; 0.5 where the fault is in the solve."""
VERIFIED_SHARE = 0.4
"""Of merges and exports."""


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
    verified = rng.random() < VERIFIED_SHARE
    if phase == "merge":
        return Job("merge", verified=verified)
    if phase == "export":
        return Job("export", form=rng.choice(sorted(EXPORTS)), verified=verified)
    engine = rng.choice(list(engines))
    ranks = rng.choice([n for n in ENGINES[engine] if n <= most_ranks])
    asynchronous = rng.random() < 0.7
    solver = rng.random() < (0.5 if phase == "solve" else SOLVER_SHARE)
    if phase == "solve" and not solver:
        return Job("quantize", engine, ranks)
    return Job("train", engine, ranks, asynchronous=asynchronous, solver=solver)


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
        ended = run_command(argv, job.ranks, notes, fault, Limits(RUN_LIMIT, RUN_LIMIT))
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
            self._check_published(job, place, expected, outcome)
            total = counts[drawn.rank].get(drawn.phase, 1)
            fault = replace(drawn, moment=int(share * total), disk=str(place))
            argv = self.material.build_arguments(job, place)
            freeze = 0.0
            if fault.kind == "stop":
                watched = job.ranks > 1
                argv[3:3] = [f"engine.stall_seconds={STALL_SECONDS:g}"] if watched else []
                freeze = 0.0 if watched else FREEZE_SECONDS
            limit = LIMIT
            if fault.kind == "stop":
                limit = RUN_LIMIT if freeze else STALL_LIMIT
            limits = Limits(limit, START_LIMIT)
            out = Material.get_output(job, place)
            before = read_records(out) if number else None
            ended = run_command(argv, job.ranks, notes / str(number), fault, limits, freeze)
            outcome.codes.append(ended.codes)
            outcome.seconds.append(round(ended.seconds, 1))
            (place / BALLAST).unlink(missing_ok=True)
            alone = job.ranks > 1 and ended.struck and not ended.connected
            outcome.faults.append(fault.describe() + ", before the ranks were connected" * alone)
            check = EndCheck(job, fault, ended, out, bool(freeze), before)
            outcome.lines.append(check.last_line)
            problems = check.find_problems()
            if ended.codes[0] == 0:
                problems += compare_results(_read_result_if_any(job, place), expected)
            outcome.problems += [f"fault {number + 1}: {p}" for p in problems]
        if trial.moves:
            place = self._move(place)
        self._finish(trial, place, notes / "end", expected, outcome)

    def _move(self, place: Path) -> Path:
        moved = place.with_name(f"{place.name} moved")
        place.rename(moved)
        return moved

    def _check_published(
        self, job: Job, place: Path, expected: dict[str, Any], outcome: Outcome
    ) -> bool:
        """Compare what a command published before it was hit, and return whether there is any."""
        out = Material.get_output(job, place)
        written = out.exists() and (out.is_file() or any(out.iterdir()))
        if written and job.verb != "train":
            outcome.problems += compare_results(read_result(job, place), expected)
            if job.verb == "quantize":
                shutil.rmtree(out)  # there is no --overwrite
        return written

    def _finish(
        self, trial: Trial, place: Path, notes: Path, expected: dict[str, Any], outcome: Outcome
    ) -> None:
        """Run the command undisturbed and compare its result."""
        job, out = trial.job, Material.get_output(trial.job, place)
        written = self._check_published(job, place, expected, outcome)
        argv = self.material.build_arguments(job, place, overwrite=written)
        if trial.moves and (out / "config.yaml").exists():
            argv[argv.index("--config") + 1] = str(out / "config.yaml")
            argv[3:3] = ["engine.stall_seconds=300"]  # not that of the stopped run
        ended = run_command(argv, job.ranks, notes, Fault(), Limits(RUN_LIMIT, RUN_LIMIT))
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


def _read_result_if_any(job: Job, place: Path) -> dict[str, Any]:
    try:
        return read_result(job, place)
    except FileNotFoundError as error:
        return {"missing": str(error)}


def read_records(out: Path) -> tuple[str, str]:
    """Return what ``log.txt`` and ``run_state.json`` of a run tell; empty where there is none."""
    files = (out / "log.txt", out / "run_state.json")
    found = [file.read_text(errors="replace") if file.exists() else "" for file in files]
    return found[0], found[1]


def find_last_line(text: str) -> str:
    """Return the last line that is not empty."""
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    return lines[-1].strip() if lines else ""


@dataclass(frozen=True)
class EndCheck:
    """Checks of the end of a disturbed command.

    Attributes:
        thawed: a stopped process continued before anything watched it.
        before: ``read_records`` before the command, for one that was disturbed before; it may have
            little left to do, and until it has claimed its run directory it changes neither file
            but for the line that says why it ended.
    """

    job: Job
    fault: Fault
    ended: Ended
    out: Path
    thawed: bool
    before: tuple[str, str] | None = None

    def find_problems(self) -> list[str]:
        found = list(self._check_codes())
        if None not in self.ended.codes:
            found += [*self._check_seconds(), *self._check_lines()]
            if self.job.verb == "train" and not self._left_no_trace:
                found += [*self._check_log(), *self._check_state()]
        return found

    @property
    def last_line(self) -> str:
        return find_last_line(self.ended.stderr)

    @property
    def _left_no_trace(self) -> bool:
        """Whether a repeated command ended before it claimed the run directory."""
        early = self.fault.phase in ("load", "solve")
        if not early or self.before is None:
            return False
        (log, state), (earlier_log, earlier_state) = read_records(self.out), self.before
        # it adds the line with its reason to the log, and leaves the state to the earlier run
        is_longer = log.startswith(earlier_log) and log.count("\n") <= earlier_log.count("\n") + 1
        return is_longer and state == earlier_state

    @property
    def _came_late(self) -> bool:
        """Whether the command had nothing left that a signal stops."""
        if self.job.verb == "train":
            return self.before is not None or self.ended.step >= STEPS - 1
        return self.ended.seconds < LATE_SECONDS

    def _check_codes(self) -> Iterator[str]:
        fault, codes = self.fault, self.ended.codes
        if not self.ended.struck:
            # a delay may be longer than the rest of the command
            if set(codes) != {0} or not (self.before is not None or fault.delay):
                yield f"the fault did not strike; codes {codes}"
            return
        if None in codes:
            yield f"no end within {self.ended.seconds:.0f} s: {codes}"
            return
        others = {code for rank, code in enumerate(codes) if rank != fault.rank}
        mine = codes[fault.rank]
        # a rank that does not come is the same error as one that was never started
        lost = {0, 1} if self.ended.connected else {1, 2}
        if fault.kind == "kill":
            if mine != -9 or not others <= lost:
                yield f"codes {codes} after kill -9 of rank {fault.rank}"
        elif fault.kind == "signal":
            number = signal.Signals[fault.signal]
            stopped = 128 + number if self.job.verb in ("merge", "export") else 75
            if len(set(codes)) > 1 or mine not in {stopped, *({0} if self._came_late else ())}:
                yield f"codes {codes} after {fault.signal}"
        elif fault.kind == "full":
            if len(set(codes)) > 1 or mine not in (0, 2):
                yield f"codes {codes} on a full disk"
        elif self.thawed and set(codes) != {0}:
            yield f"codes {codes} though the process stood still for {FREEZE_SECONDS:g} s only"
        elif not self.thawed and not {*others, mine} <= lost:
            yield f"codes {codes} after SIGSTOP of rank {fault.rank}"

    def _check_seconds(self) -> Iterator[str]:
        waits = self.fault.kind == "stop" and not self.thawed and self.ended.connected
        limit, seconds = STALL_SECONDS + STALL_EXIT_SECONDS, self.ended.seconds_of_others
        if waits and seconds > limit:
            yield f"the others ended {seconds:.1f} s after SIGSTOP, limit {limit:g} s"

    def _check_lines(self) -> Iterator[str]:
        codes = self.ended.codes
        for rank, text in enumerate(self.ended.outputs):
            if re.search(r"Traceback \(most|Logging error", text):
                yield f"traceback on stderr of rank {rank}: {text[-1500:]}"
            told = re.search("^dist-peft: ", text, re.MULTILINE)
            last = find_last_line(text)
            if (codes[rank] == 1 or told) and not last.startswith("dist-peft: "):
                yield f"rank {rank} ended with {codes[rank]}, its last line is {last!r}"
        if {1, 2} & set(codes) and not self.last_line.startswith("dist-peft: "):
            yield f"the last line of all is {self.last_line!r}"
        if 75 in codes and not re.search("signal|stopped on", self.last_line):
            yield f"the last line after a signal is {self.last_line!r}"

    def _check_log(self) -> Iterator[str]:
        codes = {code for code in self.ended.codes if code is not None and code > 0}
        log = self.out / "log.txt"
        if not codes or not log.exists() or self.fault.kind == "full":
            return
        told = find_last_line(log.read_text(errors="replace"))
        reasons = [
            line.partition("dist-peft: ")[2] or line.partition(": ")[2]
            for line in re.split(r"[\r\n]+", self.ended.stderr)
            if line.startswith("dist-peft: ") or re.search("signal|stopped on", line)
        ]
        if not any(reason and reason in told for reason in reasons):
            yield f"log.txt ends with {told!r}, stderr with {self.last_line!r}"

    def _check_state(self) -> Iterator[str]:
        try:
            state = read_run_state(self.out)
        except Exception as error:
            yield f"run_state.json: {error}"
            return
        if state is None:
            if self.fault.phase != "load":
                yield "there is no run_state.json"
            return
        allowed = {
            "kill": {"failed", "finished"},
            "stop": {"failed", "finished"},
            "signal": {"stopped", "finished"},
            # where not a byte is left the state stays "running", of a process that has ended
            "full": {"refused", "failed", "finished"},
        }[self.fault.kind]
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

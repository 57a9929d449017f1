"""Check the chain of hashes of an exact run: of a checkpoint, an adapter, or a whole run.

Everything that the chain names is hashed again, but for the base, which a replay reads.
"""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path

from dist_peft.app.inspect_json import detect_path_kind
from dist_peft.app.run_chain import hash_adapter_files, hash_small_files
from dist_peft.core.agreement import hash_json_value
from dist_peft.core.errors import AuditError
from dist_peft.core.world import World
from dist_peft.train.checkpoint import CheckpointManager
from dist_peft.train.checkpoint_hash import hash_checkpoint_state
from dist_peft.train.checkpoint_verify import find_checkpoint_damage
from dist_peft.train.state_chain import CHAIN_FILE, StateChain, hash_records, read_chain
from dist_peft.train.step_metrics import METRICS_FILE, read_metrics

__all__ = [
    "check_adapter_chain",
    "check_checkpoint_chain",
    "check_path_chain",
    "check_run_chain",
    "describe_chain",
]


def check_path_chain(path: Path) -> StateChain | None:
    """Check the chain of the run, checkpoint or adapter ``path``; return it, None without one.

    Raises:
        UserError: ``path`` is unreadable or of no known kind.
        AuditError: a part is not as the run has written it; names it.
    """
    checks = {
        "run": check_run_chain,
        "checkpoint": check_checkpoint_chain,
        "trained weights": check_adapter_chain,
        "adapter": check_adapter_chain,
    }
    check = checks.get(detect_path_kind(path))
    return None if check is None else check(path)


def check_checkpoint_chain(path: Path) -> StateChain | None:
    """Check checkpoint ``path`` against its chain; return it, None without one.

    Raises:
        AuditError: a part is not as it was written; names it.
    """
    position = CheckpointManager.read_position(path)
    if not (path / CHAIN_FILE).exists() and position.values.get("train.exact") is not True:
        return None
    if damage := find_checkpoint_damage(path, World()):
        raise AuditError(f"checkpoint {path}: {damage}")
    chain = _read_unbroken(path)
    if chain is None or not chain.links:
        return chain
    link = chain.links[-1]
    if link.step != position.step:
        raise AuditError(f"{path / CHAIN_FILE} ends with step {link.step}, not {position.step}")
    _compare_files(path, link.files, hash_small_files(path))
    if link.config != hash_json_value(json.loads(json.dumps(position.values))):
        raise AuditError(f"{path / 'run.json'}: the configuration is not that of the chain")
    if link.state != hash_checkpoint_state(path):
        raise AuditError(f"checkpoint {path}: parameters or moments are not those of the chain")
    return chain


def check_adapter_chain(directory: Path) -> StateChain | None:
    """Check a finished adapter against its chain; return it, None without one.

    Raises:
        AuditError: a file is not as it was written; names it.
    """
    chain = _read_unbroken(directory)
    if chain is not None:
        _compare_files(directory, chain.adapter, hash_adapter_files(directory))
    return chain


def check_run_chain(run_dir: Path) -> StateChain | None:
    """Check checkpoints, recorded losses and adapter of a run; return the longest chain.

    Raises:
        AuditError: a part is not as it was written, or is of another run; names it.
    """
    known: list[tuple[Path, StateChain]] = []
    for path in sorted((run_dir / "checkpoints").glob("step-*")):
        chain = check_checkpoint_chain(path)
        if chain is not None:
            known.append((path, chain))
    if (run_dir / "adapter").is_dir():
        chain = check_adapter_chain(run_dir / "adapter")
        if chain is None and known:
            raise AuditError(
                f"{run_dir / 'adapter' / CHAIN_FILE} is missing: it was removed, or the run was "
                "stopped while it wrote its results; resume it"
            )
        if chain is not None:
            known.append((run_dir / "adapter", chain))
    known.sort(key=lambda part: len(part[1].links))  # an adapter may be older than checkpoints
    for (earlier, before), (later, after) in itertools.pairwise(known):
        if not after.extends(before):
            raise AuditError(f"{later / CHAIN_FILE} does not continue {earlier / CHAIN_FILE}")
    if not known:
        return None
    _compare_records(run_dir, known[-1][1])
    return known[-1][1]


def _read_unbroken(directory: Path) -> StateChain | None:
    chain = read_chain(directory)
    if chain is not None and (found := chain.find_break()):
        raise AuditError(f"{directory / CHAIN_FILE}: {found}")
    return chain


def _compare_files(directory: Path, wanted: Mapping[str, str], found: Mapping[str, str]) -> None:
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise AuditError(f"{directory / name} is missing")
        if name not in wanted:
            raise AuditError(f"{directory / name} is not of the run: its chain does not name it")
        if wanted[name] != found[name]:
            raise AuditError(
                f"{directory / name} was changed: its chain has another SHA-256 for it"
            )


def _compare_records(run_dir: Path, chain: StateChain) -> None:
    file = run_dir / METRICS_FILE
    records = read_metrics(file)
    for before, link in chain.list_spans():
        span = [record for record in records if before < record.step <= link.step]
        if hash_records(span) != link.records:
            raise AuditError(
                f"{file}: losses, norms, rates or targets of steps {before + 1} to {link.step} are "
                "not those of the chain"
            )


def describe_chain(chain: StateChain) -> str:
    """Return the facts of a checked chain in one line."""
    steps = ", ".join(str(link.step) for link in chain.links[-4:]) or "none"
    more = "..., " if len(chain.links) > 4 else ""
    return f"intact, SHA-256 {chain.adapter_hash or chain.last_hash}, steps {more}{steps}"

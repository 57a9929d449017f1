"""Which modules of a model an adapter method adapts, by PEFT's rules.

Targets are ``all-linear`` or a list of names, name endings and regular expressions; a pattern gives
some of the adapted modules a value of their own.
"""

import difflib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeVar

from torch import nn

from dist_peft.core.errors import UserError
from dist_peft.data.render_bound import find_resource_excess
from dist_peft.model.experts import ExpertStack
from dist_peft.model.frozen_embedding import FrozenEmbedding
from dist_peft.model.frozen_linear import FrozenWeight

__all__ = ["check_pattern_keys", "list_adapter_targets", "resolve_pattern_value"]

log = logging.getLogger(__name__)

Value = TypeVar("Value")

_MATCHING_CPU_SECONDS = 2  # a pattern takes a millisecond on the names of a large model


def list_adapter_targets(
    targets: Literal["all-linear"] | Sequence[str], model: nn.Module
) -> list[str]:
    """Names of the ``FrozenLinear`` and ``ExpertStack`` modules to adapt, in the model's order.

    ``all-linear`` is every one but the output head and modules that no gradient reaches. An entry
    of a list matches a module whose whole name it is, whose name ends with ``.entry``, or whose
    whole name it matches as a regular expression; an entry that matches an experts module means
    both of its stacks. The output head is adapted if an entry names it.

    Raises:
        UserError: an entry matches nothing.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FrozenWeight)
        and not (isinstance(module, FrozenEmbedding) or module.is_tied)
    }
    if targets == "all-linear":
        inside = [name for name, module in linears.items() if not module.is_head]
        chosen = [name for name in inside if not linears[name].without_gradient]
        if limits := {m.limit for m in map(linears.get, chosen) if isinstance(m, ExpertStack)} - {
            ""
        }:
            chosen = [n for n in chosen if not getattr(linears[n], "limit", "")]
            log.info("adapter.target_modules all-linear leaves out experts: %s", *limits)
        if left := sorted({re.sub(r"\d+", "*", name) for name in set(inside) - set(chosen)}):
            log.info(
                "adapter.target_modules all-linear leaves out %s: no gradient reaches them",
                ", ".join(left),
            )
        if inside and not chosen:
            raise UserError(
                "adapter.target_modules all-linear: no gradient reaches a linear of the model, "
                "whose layers compute their own (as reversible ones do); use another base"
            )
        if not chosen:
            raise UserError("adapter.target_modules all-linear: the model has no linear to adapt")
        return chosen
    wanted: set[str] = set()
    for entry in targets:
        _refuse_slow_pattern("target_modules", entry, [n for n, _ in model.named_modules()])
        found = [
            name for name, module in linears.items() if _matches_target_module(entry, name, module)
        ]
        if not found:
            others = (n for n, m in model.named_modules() if _matches_module_name(entry, n))
            raise _build_no_match_error(entry, linears, next(others, None))
        for name in found:
            if limit := getattr(linears[name], "limit", ""):
                raise UserError(
                    f"adapter.target_modules entry {entry!r} is {name}, experts of a mixture that "
                    f"are not adapted: {limit}; name other modules, or all-linear"
                )
        wanted.update(found)
    return [name for name in linears if name in wanted]


def resolve_pattern_value(pattern: Mapping[str, Value], name: str, default: Value) -> Value:
    """The value of the first key that matches the module's name, by PEFT's rule.

    A key is a regular expression for the whole name or for its ending after a dot.
    """
    return next((v for key, v in pattern.items() if _matches_name_ending(key, name)), default)


def check_pattern_keys(key: str, pattern: Iterable[str], names: Iterable[str]) -> None:
    """Refuse entries of ``adapter.<key>`` that match no adapted module.

    Raises:
        UserError: an entry is no regular expression, or matches none of ``names``.
    """
    names = list(names)
    for entry in pattern:
        _refuse_slow_pattern(key, entry, names)
        try:
            used = any(_matches_name_ending(entry, name) for name in names)
        except re.error as error:
            raise UserError(f"adapter.{key}[{entry!r}] is no regular expression: {error}") from None
        if not used:
            raise UserError(
                f"adapter.{key}[{entry!r}] matches no adapted module; "
                f"{_format_known_names(entry, names)}"
            )


def _refuse_slow_pattern(key: str, entry: str, names: Sequence[str]) -> None:
    """Refuse a regular expression whose matching backtracks without end.

    Raises:
        UserError: it takes more than ``_MATCHING_CPU_SECONDS`` on ``names``.
    """
    if len(re.findall(r"[*+{]", entry)) < 2:
        return
    if find_resource_excess(
        lambda: [_matches_name_ending(entry, n) for n in names], _MATCHING_CPU_SECONDS
    ):
        raise UserError(
            f"adapter.{key} entry {entry!r} is a regular expression that takes too long on names "
            "such as "
            f"{names[-1]}; write it with fewer repetitions, or name the modules"
        )


def _matches_name_ending(key: str, name: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({key})", name) is not None


def _matches_target_module(entry: str, name: str, module: nn.Module) -> bool:
    owner = name.rpartition(".")[0]
    return _matches_module_name(entry, name) or (
        isinstance(module, ExpertStack) and _matches_module_name(entry, owner)
    )


def _matches_module_name(entry: str, name: str) -> bool:
    if name == entry or name.endswith(f".{entry}"):
        return True
    try:
        return re.fullmatch(entry, name) is not None
    except re.error as error:
        raise UserError(
            f"adapter.target_modules entry {entry!r} is neither a module's name nor a regular "
            f"expression: {error}"
        ) from None


def _build_no_match_error(entry: str, linears: Iterable[str], other: str | None) -> UserError:
    """``other``: a module that the entry does match, but which is no ``FrozenLinear``."""
    message = f"adapter.target_modules entry {entry!r} matches no linear"
    if other is not None:
        message += (
            f" ({other} is not a quantizable linear; the input embedding is adapted by "
            "adapter.embeddings: true, an output head tied to it cannot be)"
        )
    return UserError(f"{message}; {_format_known_names(entry, linears)}")


def _format_known_names(entry: str, names: Iterable[str]) -> str:
    """Which last components exist, and the one nearest to ``entry``."""
    names = list(names)
    last = sorted({name.rpartition(".")[2] for name in names})
    near = difflib.get_close_matches(entry.rpartition(".")[2], last, n=1, cutoff=0.5)
    near = near or difflib.get_close_matches(entry, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}There are: {', '.join(last)}"

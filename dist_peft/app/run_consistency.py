"""Whether the parts of a finished run still belong together when it is merged or exported."""

import importlib.metadata
import logging
from pathlib import Path

from dist_peft.adapters.metadata import read_adapter_metadata
from dist_peft.core.errors import UserError
from dist_peft.core.log import ONCE
from dist_peft.data.tokenizer_digest import compute_tokenizer_digest
from dist_peft.export.stopping import read_turn_end_ids
from dist_peft.model.hub import Tokenizer, load_tokenizer
from dist_peft.train.run_state import read_run_state

__all__ = ["check_tokenizer_of_base", "describe_tokenizer", "refuse_older_adapter"]

log = logging.getLogger("dist_peft")

_TOKENIZER, _VERSION = "tokenizer", "tokenizers"


def refuse_older_adapter(run_dir: Path) -> None:
    """Refuse a run that was finished, then resumed for more steps, and has not finished again.

    Its ``adapter/`` is of the earlier end, its probe of the later beginning.

    Raises:
        UserError: it is such a run, or ``run_state.json`` is damaged.
    """
    state = read_run_state(run_dir)
    if state is None or state.state in ("finished", "refused"):
        return
    raise UserError(
        f"{run_dir} was started again after its adapter/ had been written, and {state.state} at "
        f"step {state.step}: adapter/ may be of the run before. Resume it to its end first, or "
        "take the adapter of a checkpoint with --checkpoint last"
    )


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the entries of an adapter's ``dist_peft.json`` that ``check_tokenizer_of_base``
    compares."""
    return {
        _TOKENIZER: compute_tokenizer_digest(tokenizer),
        _VERSION: importlib.metadata.version("tokenizers"),
    }


def check_tokenizer_of_base(run_dir: Path, directory: Path, trust_remote_code: bool) -> None:
    """Check that the base's tokenizer, which goes into a merged model, is that of the training.

    The comparison of logits after a merge cannot see it. A tokenizer kept with the adapter is used
    instead of the base's, which is then not compared.

    Args:
        run_dir: a finished run.
        directory: of the base.
        trust_remote_code: may run code of the base.

    Raises:
        UserError: it is another one, or ``turn_end`` names a token that it does not have.
    """
    adapter_dir = run_dir / "adapter"
    about = read_adapter_metadata(adapter_dir)
    ends = read_turn_end_ids(adapter_dir)
    if not isinstance(about.get(_TOKENIZER), str):
        return  # of an earlier version
    kept = (adapter_dir / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(adapter_dir if kept else directory, trust_remote_code)
    if ends and max(ends) >= len(tokenizer):
        raise UserError(
            f"{adapter_dir / 'dist_peft.json'} is damaged: turn_end has token {max(ends)}, and the "
            f"tokenizer {len(tokenizer)} tokens; get the adapter again"
        )
    if kept or compute_tokenizer_digest(tokenizer) == about[_TOKENIZER]:
        return
    mine = importlib.metadata.version("tokenizers")
    if about.get(_VERSION) != mine:
        log.warning(
            "the tokenizer of %s reads otherwise than in training: it has changed, or version %s "
            "of tokenizers, now %s, described it in another way",
            directory,
            about.get(_VERSION),
            mine,
            extra=ONCE,
        )
        return
    raise UserError(
        f"the tokenizer of {directory} is another one than the run was trained with: the model "
        "would get other token ids for the same text; restore the base's tokenizer files"
    )

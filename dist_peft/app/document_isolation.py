"""The check of a loaded model that packed documents do not see each other, of every verb that
computes packed rows.

Before the base is loaded, ``build_model`` has tried the same in float32 without weights
(``model.isolation_probe``). Here the attention runs that will be used, in its precision, with the
adapter.
"""

from dist_peft.app.model_setup import LoadedModel
from dist_peft.core.config.run import RunConfig
from dist_peft.core.errors import UserError
from dist_peft.model.attention_mask import documents_are_isolated
from dist_peft.train.evaluate import inference_mode

__all__ = ["check_document_isolation", "count_packed_tokens"]


def count_packed_tokens(config: RunConfig) -> int:
    """Return the length of packed sequences of several documents, for ``build_model``; 0 without
    packing."""
    return config.data.seq_len if config.data.packing else 0


def check_document_isolation(built: LoadedModel, config: RunConfig) -> None:
    """Check a loaded model that packed rows are given to; every rank must call it.

    Raises:
        UserError: packed documents see each other (on every rank).
    """
    if not (longest := count_packed_tokens(config)):
        return
    with inference_mode(built.model):
        if not documents_are_isolated(built.model, built.engine.device, longest):
            kind = built.setup.skeleton.model_config.model_type
            raise UserError(
                f"a {kind} model lets packed documents see each other; set data.packing: false"
            )

"""Virtual tokens on disk, in the format of Hugging Face PEFT.

Whatever was trained, the file has one tensor, the encoder's value::

    adapter_config.json         PEFT's PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig
    adapter_model.safetensors   prompt_embeddings [virtual tokens, width]

    prompt, ptuning   width = the embeddings'
    prefix            width = layers * 2 * heads * head size; [P, 2 L, heads, head size] has a
                      layer's keys at 2 l and its values at 2 l + 1; heads are those of the keys

The encoder's own parameters stay in the checkpoints, where a run resumes from.

Pseudo tokens at any place (``adapter.pseudo_token``) are unknown to PEFT. Their directory has a
type of its own, since as PEFT's P-tuning it would be loaded and put in front without a word.
"""

from collections.abc import Mapping
from typing import Any, Never

from dist_peft.adapters.protocol import PeftFormat, PublicAdapter
from dist_peft.core.config.run import PrefixConfig, PromptConfig, PTuningConfig, VirtualTokensConfig
from dist_peft.core.errors import UserError

__all__ = [
    "PLACED",
    "PROMPT_TYPES",
    "TENSOR",
    "VirtualTokensFormat",
    "build_prompt_config",
    "check_prompt_adapter",
    "read_kv_shape",
]

TENSOR = "prompt_embeddings"
PLACED = "P_TUNING_PLACED"
PROMPT_TYPES = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", PLACED)
"""Values of ``peft_type``."""

_INITS = {"random": "RANDOM", "vocab": "SAMPLE_VOCAB", "text": "TEXT"}


def build_prompt_config(
    config: VirtualTokensConfig, base: str, model: Any, width: int
) -> dict[str, Any]:
    """``adapter_config.json``.

    Args:
        config: the trained adapter's configuration.
        base: path or hub id of the base.
        model: the base's configuration, of its text part.
        width: of ``prompt_embeddings``.
    """
    heads = model.num_attention_heads
    if isinstance(config, PrefixConfig):
        heads, size = read_kv_shape(model)
        width = heads * size
    common = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "num_virtual_tokens": config.num_virtual_tokens,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": model.num_hidden_layers,
    }
    return {**common, **_build_method_config(config, base, width)}


def _build_method_config(config: VirtualTokensConfig, base: str, width: int) -> dict[str, Any]:
    if isinstance(config, PrefixConfig):
        return {
            "peft_type": "PREFIX_TUNING",
            "encoder_hidden_size": config.encoder_hidden_size or width,
            "prefix_projection": config.projection,
        }
    if isinstance(config, PTuningConfig):
        own = {
            "peft_type": "P_TUNING" if config.pseudo_token is None else PLACED,
            "encoder_reparameterization_type": config.encoder.upper(),
            "encoder_hidden_size": config.encoder_hidden_size or width,
            "encoder_num_layers": config.encoder_layers,
            "encoder_dropout": config.dropout,
        }
        return own if config.pseudo_token is None else {**own, "pseudo_token": config.pseudo_token}
    assert isinstance(config, PromptConfig)
    is_text = config.init == "text"
    return {
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": _INITS[config.init],
        "prompt_tuning_init_text": config.init_text,
        "tokenizer_name_or_path": base if is_text else None,
    }


def read_kv_shape(model: Any) -> tuple[int, int]:
    """Heads of the keys and their size, from a model's configuration."""
    heads = model.num_attention_heads
    size = getattr(model, "head_dim", None) or model.hidden_size // heads
    return getattr(model, "num_key_value_heads", None) or heads, size


def check_prompt_adapter(public: PublicAdapter) -> None:
    """Check that the tensor has the shape that the configuration says.

    Raises:
        UserError: it has not, or there are other tensors.
    """
    if list(public.tensors) != [TENSOR]:
        raise UserError(
            f"the adapter has tensors {sorted(public.tensors)} instead of {TENSOR} alone: it is "
            "damaged or was saved without its data"
        )
    config = public.config
    try:
        width = int(config["token_dim"])
        if config["peft_type"] == "PREFIX_TUNING":
            width *= 2 * int(config["num_layers"])
        wanted = [int(config["num_virtual_tokens"]), width]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            "adapter_config.json lacks num_virtual_tokens, token_dim or num_layers "
            f"({type(error).__name__}: {error})"
        ) from None
    found = list(public.tensors[TENSOR].shape)
    if found != wanted:
        raise UserError(
            f"adapter tensor {TENSOR} has shape {found}, not {wanted} as its configuration says"
        )


class VirtualTokensFormat(PeftFormat):
    """Prompt tuning, P-tuning and prefix-tuning in PEFT's files."""

    peft_types = PROMPT_TYPES

    def check(self, public: PublicAdapter) -> None:
        """Check the tensor against the configuration.

        Raises:
            UserError: ``check_prompt_adapter`` refuses it.
        """
        check_prompt_adapter(public)

    def describe(self, config: Mapping[str, Any]) -> str:
        """Return type and number of virtual tokens."""
        return f"{config['peft_type']} virtual_tokens={config.get('num_virtual_tokens')}"

    def explain_no_peft_form(self, config: Mapping[str, Any]) -> str | None:
        """Return the reason for pseudo tokens at any place; PEFT loads the others."""
        if config["peft_type"] != PLACED:
            return None
        return (
            "trained adapter.pseudo_token, and PEFT puts virtual tokens in front only: there is no "
            "PEFT form of it"
        )

    def open_merger(self, public: PublicAdapter, *, tied: bool) -> Never:
        """Refuse the merge: virtual tokens are no weight.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"the adapter is {public.config['peft_type']}: virtual tokens change no weight, so "
            "there is nothing to merge; use it with its base (dist-peft export --format peft)"
        )

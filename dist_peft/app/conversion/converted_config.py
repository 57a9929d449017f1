"""Read a configuration of axolotl or LLaMA-Factory and write one of this project."""

from pathlib import Path

from omegaconf import OmegaConf

from dist_peft.app.conversion.axolotl_config import convert_axolotl_config
from dist_peft.app.conversion.config_draft import ConfigDraft
from dist_peft.app.conversion.foreign_file import ForeignFile
from dist_peft.app.conversion.llama_factory_config import convert_llama_factory_config
from dist_peft.core.config.io import parse_config
from dist_peft.core.errors import UserError

__all__ = ["convert_config_file"]

_TRUST = "a file cannot allow it: base.trust_remote_code=true on the command line"


def convert_config_file(path: Path, ranks: int) -> tuple[str, ConfigDraft]:
    """Return the text of the converted file, which is a valid configuration, and its draft.

    Args:
        path: YAML file of axolotl or LLaMA-Factory.
        ranks: devices that the file was for; a step has so many times the sequences of one.

    Raises:
        UserError: the file cannot be read, asks for a kind of training that does not exist here,
            or one of its values is not valid here.
    """
    file, draft = ForeignFile(path), ConfigDraft()
    if file.take_value("trust_remote_code"):
        draft.list_unmatched("trust_remote_code", True, _TRUST)
    convert = convert_axolotl_config if file.trainer == "axolotl" else convert_llama_factory_config
    try:
        convert(file, draft, ranks)
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise UserError(
            f"{path}: a value has another form than {file.trainer} reads: {error}"
        ) from None
    title = f"Converted by dist-peft convert-config from {path.name} of {file.trainer}."
    text = draft.format_file(title)
    try:
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
        parse_config(tree, "a value of it is not valid here")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return text, draft

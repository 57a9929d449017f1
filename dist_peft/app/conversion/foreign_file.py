"""The configuration file of another trainer: which trainer's it is, and its keys."""

from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dist_peft.core.errors import UserError

__all__ = ["ForeignFile", "Trainer", "is_unset"]

Trainer = Literal["axolotl", "LLaMA-Factory"]

_UNSET: tuple[object, ...] = (None, False, 0, "", "none", "no", [], {})


def is_unset(value: object) -> bool:
    """Return whether a value switches nothing on: null, false, 0, ``none`` or empty."""
    return value in _UNSET


class ForeignFile:
    """Keys of the file, each of which is taken once.

    Attributes:
        path: of the file.
        trainer: whose file it is.
    """

    def __init__(self, path: Path) -> None:
        """Read ``path``.

        Raises:
            UserError: it is missing, no YAML, or no configuration of a trainer that is known.
        """
        self.path = path
        self._keys = _read_keys(path)
        self.trainer: Trainer = _detect_trainer(self._keys, path)

    def take_value(self, name: str, default: Any = None) -> Any:
        """Return the value of ``name`` and remove it; ``default`` where it is absent or null."""
        value = self._keys.pop(name, None)
        return default if value is None else value

    def take_number(self, name: str, default: float | None = None) -> float | None:
        """Return the number of ``name`` and remove it; ``default`` where it is absent or null.

        Raises:
            UserError: it is no number.
        """
        value = self.take_value(name, default)
        if value is None:
            return None
        try:
            if isinstance(value, bool):
                raise ValueError
            number = float(value)  # both trainers read "2e-4" as a number, too
        except (TypeError, ValueError):
            raise UserError(f"{self.path}: {name} is no number (given: {value!r})") from None
        return int(number) if number.is_integer() and "e" not in str(value).lower() else number

    def has_value(self, name: str) -> bool:
        """Return whether ``name`` was not taken yet and switches something on."""
        return not is_unset(self._keys.get(name))

    def list_names(self) -> list[str]:
        """Return the names that were not taken yet, in the order of the file."""
        return list(self._keys)


def _read_keys(path: Path) -> dict[str, Any]:
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; give the YAML file of axolotl or LLaMA-Factory")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    except OSError as error:  # also OmegaConf's, for a lone number
        raise UserError(f"{path} cannot be read: {error}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold keys of axolotl or LLaMA-Factory")
    return {str(key): value for key, value in tree.items()}


def _detect_trainer(keys: dict[str, Any], path: Path) -> Trainer:
    if "base_model" in keys:
        return "axolotl"
    if "model_name_or_path" in keys:
        return "LLaMA-Factory"
    if isinstance(keys.get("base"), dict):
        raise UserError(f"{path} has a section base: it is a configuration of dist-peft already")
    if any(isinstance(value, dict) and "_component_" in value for value in keys.values()):
        raise UserError(
            f"{path} is of torchtune, which is not converted; docs/bridges.md shows where its keys "
            "are"
        )
    raise UserError(
        f"{path} has neither base_model (axolotl) nor model_name_or_path (LLaMA-Factory), so it is "
        "of no trainer that can be converted"
    )

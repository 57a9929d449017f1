"""Bottleneck adapters on disk, in the format of the library ``adapters`` (AdapterHub), 1.3.

A directory holds the files that the library reads with
``load_adapter(DIR, use_safetensors=True)``, and up to two files that only this project reads::

    adapter_config.json    {"config": {BnConfig}, "hidden_size", "name", "version", ...}
    adapter.safetensors    BLOCK.SITE.adapters.NAME.adapter_down.0.weight [m, d], .bias [m],
                           BLOCK.SITE.adapters.NAME.adapter_up.weight [d, m], .bias [d]
                           BLOCK: model.layers.0; SITE: output_adapters, attention_adapters;
                           in BERT and RoBERTa bert.encoder.layer.0; output, attention.output
    dist_peft.json         where the adapter comes from (``adapters.directory``)
    dist_peft.safetensors  train_layernorm: PATH.weight_change, PATH.bias_change

The format has no place for the base's layer norms. An adapter with ``train_layernorm`` names an
architecture that the library does not know and refuses: without its norms it would be computed
wrongly and without a word.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Never, cast

from pydantic import ValidationError
from torch import Tensor, nn

from dist_peft.adapters.protocol import PublicAdapter
from dist_peft.core.config.run import BottleneckConfig
from dist_peft.core.errors import UserError

__all__ = [
    "TENSORS",
    "VERSION",
    "BottleneckFormat",
    "ModelDescription",
    "build_adapterhub_key",
    "is_adapterhub_config",
    "parse_bottleneck_config",
    "parse_bottleneck_tensors",
    "refuse_nonlinear_merge",
    "to_adapterhub_path",
    "to_model_path",
    "to_public_bottleneck",
]

TENSORS = "adapter.safetensors"

VERSION = "adapters.1.3.0"
_NAME = "dist_peft"
_WITH_NORMS = "bottleneck_and_layernorm"
_OWN_NAMES = {
    "down_weight": "adapter_down.0.weight",
    "down_bias": "adapter_down.0.bias",
    "up_weight": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
}
_SITES = {"attention_adapters": "mh_adapter", "output_adapters": "output_adapter"}
_POST_NORM = {"attention_adapters": ".attention.output", "output_adapters": ".output"}
"""Where BERT and RoBERTa have an adapter, which the library calls by this alone."""
_FIXED: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights_seed": None,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "learn_phm": True,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "original_ln_after": True,
    "output_adapter": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_layer": False,
    "phm_rank": 1,
    "residual_before_ln": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
"""Keys of BnConfig that are the same in all three placements."""


@dataclass(frozen=True)
class ModelDescription:
    """Facts about the base that the file states.

    Attributes:
        base: path or hub id.
        model_class, model_type: such as LlamaForCausalLM and llama.
        hidden: ``d``.
    """

    base: str
    model_class: str
    model_type: str
    hidden: int

    @classmethod
    def describe_model(cls, model: nn.Module, hidden: int) -> "ModelDescription":
        """Before an engine has ``model``, since FSDP2 changes its class; the base is not known."""
        return cls("", type(model).__name__, cast(Any, model).config.model_type, hidden)


# -- making ------------------------------------------------------------------------------------


def to_public_bottleneck(
    config: BottleneckConfig,
    described: ModelDescription,
    layers: Mapping[str, Mapping[str, Tensor]],
    norms: Mapping[str, Mapping[str, Tensor]],
    name: str = _NAME,
) -> PublicAdapter:
    """Trained parameters -> public form.

    Args:
        config: the trained adapter's configuration.
        described: the base.
        layers: path of each adapter -> own name (as in ``adapters.bottleneck``) -> whole tensor.
        norms: path of each learning norm -> own name -> whole tensor.
        name: of the adapter.
    """
    own = _build_facts_config(config)
    if norms:
        own["architecture"] = _WITH_NORMS
    about = {
        "config": own,
        "hidden_size": described.hidden,
        "model_class": described.model_class,
        "model_name": described.base,
        "model_type": described.model_type,
        "name": name,
        "version": VERSION,
    }
    tensors = {
        build_adapterhub_key(path, name, parameter): value.contiguous()
        for path, parameters in layers.items()
        for parameter, value in parameters.items()
    }
    extra = {f"{path}.{n}": v.contiguous() for path, own in norms.items() for n, v in own.items()}
    return PublicAdapter(about, tensors, extra=extra)


def to_adapterhub_path(path: str) -> str:
    """Return the prefix of an adapter's tensors in the file, given its path in the model."""
    parent, _, site = path.rpartition(".")
    return parent if parent.endswith(_POST_NORM[site]) else path


def to_model_path(prefix: str) -> str:
    """Return the model's path of an adapter, given its prefix in a file (ours or the library's)."""
    for site, ending in _POST_NORM.items():
        if prefix.endswith(ending):
            return f"{prefix}.{site}"
    return prefix


def build_adapterhub_key(path: str, adapter: str, parameter: str) -> str:
    """Name in the file of an adapter's own parameter, such as ``down_weight``."""
    return f"{to_adapterhub_path(path)}.adapters.{adapter}.{_OWN_NAMES[parameter]}"


def _build_facts_config(config: BottleneckConfig) -> dict[str, Any]:
    """BnConfig of the library."""
    factor = config.reduction_factor
    return {
        **_FIXED,
        "dropout": config.dropout,
        "init_weights": config.init,
        "is_parallel": config.placement == "parallel",
        "mh_adapter": config.placement == "houlsby",
        "non_linearity": config.activation,
        "original_ln_before": config.placement == "pfeiffer",
        "reduction_factor": int(factor) if factor.is_integer() else factor,
        "scaling": config.scaling,
    }


class BottleneckFormat:
    """A bottleneck adapter in AdapterHub's files."""

    peft_types = ()
    config_file = "adapter_config.json"
    tensors_file = TENSORS
    pickle_file = "pytorch_adapter.bin"
    safe_saving = "adapters: save_adapter(..., use_safetensors=True)"
    joins_head = False
    on_gptq_linears = False
    on_bnb_linears = False

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Return whether the configuration is AdapterHub's."""
        return is_adapterhub_config(config)

    def check(self, public: PublicAdapter) -> None:
        """Check the tensors against the configuration.

        Raises:
            UserError: ``parse_bottleneck_tensors`` refuses them.
        """
        parse_bottleneck_tensors(public)

    def describe(self, config: Mapping[str, Any]) -> str:
        """Return the settings, or the name of the method that AdapterHub's library gives it."""
        try:
            found = parse_bottleneck_config(config)
        except UserError:
            own = config["config"]
            mode = own.get("composition_mode")  # IA3 is a LoRA that scales
            kind = own.get("architecture") or "bottleneck of another form"
            return f"AdapterHub's {kind}{f' composition_mode={mode}' if mode else ''}"
        shown = ("placement", "reduction_factor", "activation", "scaling", "train_layernorm")
        return "bottleneck " + " ".join(f"{name}={getattr(found, name)}" for name in shown)

    def explain_no_peft_form(self, config: Mapping[str, Any]) -> str:
        """Return that PEFT lacks the method."""
        return "trained adapter.kind bottleneck, which PEFT does not have"

    def open_merger(self, public: PublicAdapter, *, tied: bool) -> Never:
        """Refuse the merge: no weight can hold a nonlinearity.

        Raises:
            UserError: always.
        """
        refuse_nonlinear_merge("a bottleneck")


def refuse_nonlinear_merge(description: str) -> Never:
    """Refuse the merge of an adapter (``description``), which is no linear function.

    Raises:
        UserError: always.
    """
    raise UserError(
        f"the adapter is {description}: between its matrices is a nonlinearity, so no weight of "
        "the base can take it in and it cannot be merged; use it with its base (dist-peft eval "
        "--run, or AdapterHub's library: load_adapter(DIR, use_safetensors=True))"
    )


# -- reading -----------------------------------------------------------------------------------


def is_adapterhub_config(config: Mapping[str, Any]) -> bool:
    """Whether this ``adapter_config.json`` is AdapterHub's rather than PEFT's."""
    return "peft_type" not in config and isinstance(config.get("config"), dict)


def parse_bottleneck_config(config: Mapping[str, Any]) -> BottleneckConfig:
    """The settings in an ``adapter_config.json``, the library's or ours.

    Raises:
        UserError: another method, or a bottleneck adapter that computes something else than the
            three placements.
    """
    own = dict(config["config"])
    architecture = own.pop("architecture", None)
    if architecture not in (None, _WITH_NORMS):
        raise UserError(f"the adapter is AdapterHub's {architecture}; only bottlenecks are read")
    if "version" not in config:
        raise UserError(
            "the adapter was written by an AdapterHub library of before 2021; load it with "
            "adapters and save it again"
        )
    placement = "parallel" if own.get("is_parallel") else "pfeiffer"
    if own.get("mh_adapter") and placement == "pfeiffer":
        placement = "houlsby"
    activation = str(own.get("non_linearity")).lower()
    settings = {
        "placement": placement,
        "reduction_factor": own.get("reduction_factor"),
        "activation": "swish" if activation == "silu" else activation,
        "scaling": own.get("scaling", 1.0),
        "dropout": own.get("dropout", 0.0),
        "init": own.get("init_weights", "bert"),
        "train_layernorm": architecture == _WITH_NORMS,
    }
    try:
        read = BottleneckConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"adapter_config.json: {first['loc'][0]} {first['input']!r} is not supported here: "
            f"{first['msg']}"
        ) from None
    computes = _build_facts_config(read)
    own = {"original_ln_before": False, **own}
    if placement == "parallel":
        own["original_ln_before"] = False  # has no effect there
    for key, value in own.items():
        if key != "non_linearity" and value != computes.get(key):
            raise UserError(
                f"adapter_config.json: {key} is {value!r}, not {computes.get(key)!r}; of "
                "AdapterHub's bottlenecks only those equal to seq_bn, double_seq_bn and par_bn "
                "in computation are read"
            )
    return read


def parse_bottleneck_tensors(public: PublicAdapter) -> dict[str, dict[str, Tensor]]:
    """Path of each adapter -> own name -> tensor, checked against the configuration.

    Raises:
        UserError: a tensor is empty, absent, of the wrong shape or none of a bottleneck's; or see
            ``parse_bottleneck_config``.
    """
    settings = parse_bottleneck_config(public.config)
    d = int(public.config["hidden_size"])
    m = settings.bottleneck_size(d)
    shapes = {"down_weight": [m, d], "down_bias": [m], "up_weight": [d, m], "up_bias": [d]}
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in public.tensors.items():
        path, name = _parse_tensor_key(key, str(public.config.get("name")))
        if list(value.shape) != shapes[name]:
            raise UserError(
                f"adapter tensor {key} has shape {list(value.shape)}, not {shapes[name]} as its "
                "configuration says"
            )
        layers.setdefault(path, {})[name] = value
    blocks = {_block_index(path) for path in layers}
    wanted = [site for site, key in _SITES.items() if _build_facts_config(settings)[key]]
    if not blocks:
        raise UserError("the adapter has no tensors: it was saved without its data")
    ending = dict.fromkeys(_SITES, "")
    if all(to_adapterhub_path(path) != path for path in layers):
        ending = _POST_NORM
    for path in (f"{b}{ending[site]}.{site}" for b in sorted(blocks) for site in wanted):
        if absent := shapes.keys() - layers.get(path, {}).keys():
            raise UserError(f"the adapter has no {sorted(absent)[0]} of {path}: it is damaged")
    if len(layers) != len(blocks) * len(wanted):
        raise UserError(
            f"the adapter has tensors in addition to its {', '.join(wanted)}: it is damaged"
        )
    if bool(public.extra) != settings.train_layernorm:
        raise UserError("the adapter's layer norms (dist_peft.safetensors) do not fit its config")
    return layers


def _parse_tensor_key(key: str, name: str) -> tuple[str, str]:
    """Tensor name in the file -> path of the adapter, own name."""
    places = "|".join((*_SITES, "output"))
    found = re.fullmatch(rf"(.*\.(?:{places}))\.adapters\.{re.escape(name)}\.(.*)", key)
    own = {value: key for key, value in _OWN_NAMES.items()}
    if found is None or found[2] not in own:
        raise UserError(f"adapter tensor {key} is none of a bottleneck adapter's")
    return to_model_path(found[1]), own[found[2]]


def _block_index(path: str) -> str:
    """The block that the adapter at ``path`` is in."""
    parent, _, site = path.rpartition(".")
    return parent.removesuffix(_POST_NORM[site])

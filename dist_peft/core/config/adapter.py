"""The ``adapter`` section of the configuration: one class a method, told apart by ``kind``."""

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dist_peft.core.config.fine_tuning import FullConfig, Part, PartialConfig, UnfreezeConfig
from dist_peft.core.config.low_rank import (
    AdaLoraConfig,
    LinearsConfig,
    LohaConfig,
    LokrConfig,
    LowRankConfig,
    VeraConfig,
)
from dist_peft.core.config.through_options import ThroughConfig
from dist_peft.core.config.types import (
    ConfigSection,
    Float,
    Int,
    Names,
    PathText,
    Positive,
    Size,
)

__all__ = [
    "AdaLoraConfig",
    "AdapterConfig",
    "BottleneckConfig",
    "FullConfig",
    "FusedAdapter",
    "FusionConfig",
    "Ia3Config",
    "LinearsConfig",
    "LohaConfig",
    "LokrConfig",
    "LoraConfig",
    "LowRankConfig",
    "NoAdapterConfig",
    "PTuningConfig",
    "Part",
    "PartialConfig",
    "PrefixConfig",
    "PromptConfig",
    "QaLoraConfig",
    "UnfreezeConfig",
    "VeraConfig",
    "VirtualTokensConfig",
]


class LoraConfig(LowRankConfig, ThroughConfig):
    """LoRA (Hu et al. 2021), QLoRA when the base is quantized."""

    kind: Literal["lora"] = "lora"
    embeddings: bool = Field(False, description="Also adapt the input embedding.")
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) (rsLoRA).")
    use_dora: bool = Field(False, description="Train magnitude and direction apart (DoRA).")
    keep_zeros: bool = Field(
        False,
        description="Weights that are zero in the base stay zero, in training and in every merge "
        "(pruned bases). Each linear takes a dense product of its own size.",
    )
    train_router: bool = Field(
        False,
        description="Mixtures of experts: also train the routers, whole and in float32, with the "
        "auxiliary loss of router_aux_loss.",
    )
    router_aux_loss: Float | None = Field(
        None,
        ge=0,
        description="train_router: weight of transformers' load-balancing loss. Default: "
        "router_aux_loss_coef of the base's configuration; 0: none.",
    )
    lr_ratio: Float = Field(1.0, gt=0, description="LoRA+: learning rate of B over that of A.")
    init: Literal["default", "pissa", "loftq", "eva", "lora_ga"] = Field(
        "default",
        description="default: A Kaiming-uniform, B zero. pissa: principal singular vectors. "
        "loftq: best low-rank fit of the quantization error. eva: directions in which inputs vary "
        "most. lora_ga: singular vectors of the gradient.",
    )
    init_iterations: Int = Field(
        4, ge=1, description="pissa, lora_ga: power iterations of the SVD; loftq: alternations."
    )
    init_samples: Size = Field(
        32, description="eva, lora_ga: the first sequences of the training order that are used."
    )
    init_rho: Float = Field(
        1.0,
        ge=1,
        description="eva: a linear gets up to r times this, where inputs vary in more directions, "
        "and others less; the parameters take that much more memory. 1: r each.",
    )
    init_gamma: Positive = Field(
        16.0, description="lora_ga: both factors start at out_features^(1/4) / sqrt(this)."
    )

    @model_validator(mode="after")
    def _check_through_quantizer(self) -> Self:
        excluded = {
            "dropout": (self.dropout > 0, "has no product with the adapter, whose input it drops"),
            "use_dora": (self.use_dora, "merges B A, without magnitudes"),
            "keep_zeros": (self.keep_zeros, "quantizes each weight again, zeros too"),
            "embeddings": (self.embeddings, "trains quantized linears, and embeddings are none"),
            f"init: {self.init}": (self.init != "default", "begins with the base itself"),
        }
        for key, (is_set, reason) in excluded.items():
            if self.through_quantizer and is_set:
                raise ValueError(f"through_quantizer {reason}: leave out {key}, or set it to false")
        return self

    @model_validator(mode="after")
    def _check_lora_init(self) -> Self:
        if self.init == "lora_ga" and self.use_dora:
            raise ValueError(
                "use_dora scales the rows of weight and change together, from which init: lora_ga "
                "cannot take its start away; set one of them to its default"
            )
        if self.init == "eva" and self.init_rho > 1 and self.use_dora:
            raise ValueError(
                "init_rho gives some linears rank 0, where use_dora still trains a magnitude that "
                "PEFT's format cannot hold; set init_rho to 1 or use_dora to false"
            )
        return self

    @model_validator(mode="after")
    def _check_kept_zeros(self) -> Self:
        reasons = {
            "use_dora": self.use_dora and "scales whole rows by a norm of the unmasked change",
            f"init: {self.init}": self.init in ("pissa", "loftq", "lora_ga")
            and "starts from a dense product, which a mask would cut",
        }
        for key, reason in reasons.items():
            if self.keep_zeros and reason:
                raise ValueError(f"keep_zeros does not go with {key}, which {reason}")
        return self

    @property
    def uses_training_data(self) -> bool:
        """Whether the initialization runs the model on training data."""
        return self.init in ("eva", "lora_ga")


class QaLoraConfig(LowRankConfig):
    """QA-LoRA (Xu et al. 2024): an adapter that merges exactly into an integer base."""

    kind: Literal["qalora"] = "qalora"
    pool_size: Int | None = Field(
        None,
        ge=1,
        description="Inputs summed into one before A: a multiple of base.quant.group_size, and a "
        "divisor of in_features. Default: the group_size.",
    )


class Ia3Config(ConfigSection):
    """IA3 (Liu et al. 2022): trainable vectors that rescale keys, values and feed-forward."""

    kind: Literal["ia3"] = "ia3"
    target_modules: Literal["all-linear"] | Names = Field(
        default_factory=lambda: ["k_proj", "v_proj", "down_proj"],
        description="Linears that get a vector. all-linear: every linear inside the blocks. Or a "
        "list: names, name endings or regular expressions.",
    )
    feedforward_modules: list[str] | None = Field(
        None,
        description="Names or name endings of those targets whose input is rescaled; the others' "
        "output is. Default: down_proj where it is a target.",
    )


class VirtualTokensConfig(ConfigSection):
    """Options shared by prompt tuning, P-tuning and prefix-tuning."""

    kind: str
    num_virtual_tokens: Size = Field(20, description="Virtual tokens that are trained.")


class PromptConfig(VirtualTokensConfig):
    """Prompt tuning (Lester et al. 2021): trained embeddings in front of each document."""

    kind: Literal["prompt"] = "prompt"
    init: Literal["random", "vocab", "text"] = Field(
        "vocab",
        description="vocab: embeddings of random tokens. text: embeddings of init_text, repeated "
        "or cut to num_virtual_tokens. random: normal.",
    )
    init_text: str | None = Field(None, description="For init: text, such as the task in words.")

    @model_validator(mode="after")
    def _check_prompt_init(self) -> Self:
        if (self.init == "text") != bool(self.init_text):
            raise ValueError("init: text and init_text belong together; give both or neither")
        return self


class PTuningConfig(VirtualTokensConfig):
    """P-tuning (Liu et al. 2021): virtual tokens computed by a small network, the encoder."""

    kind: Literal["ptuning"] = "ptuning"
    encoder: Literal["mlp", "lstm"] = Field(
        "mlp", description="mlp: two hidden layers. lstm: bidirectional LSTM and one hidden layer."
    )
    encoder_hidden_size: Size | None = Field(
        None, description="Width of the encoder (of each direction). Default: the base's."
    )
    encoder_layers: Int = Field(2, ge=1, le=100, description="lstm only: layers.")
    dropout: Float = Field(0.0, ge=0, lt=1, description="lstm only: dropout between its layers.")
    pseudo_token: str | None = Field(
        None,
        description="A token of the base's tokenizer that stands for virtual tokens wherever the "
        "data have it, at most num_virtual_tokens times a document. Default: all are in front.",
    )

    @model_validator(mode="after")
    def _check_encoder(self) -> Self:
        if self.encoder == "mlp":
            for name in ("encoder_layers", "dropout"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is for encoder: lstm; the MLP has none")
        elif self.dropout and self.encoder_layers == 1:
            raise ValueError(
                "dropout is between the LSTM's layers; set encoder_layers to 2 or more"
            )
        return self


class PrefixConfig(VirtualTokensConfig):
    """Prefix-tuning (Li and Liang 2021): trained keys and values before each layer's own."""

    kind: Literal["prefix"] = "prefix"
    projection: bool = Field(
        True,
        description="Train the prefix through an MLP, as the paper does; false: train it directly.",
    )
    encoder_hidden_size: Size | None = Field(
        None, description="Width of the MLP. Default: that of a layer's keys."
    )
    dropout: Float = Field(0.0, ge=0, lt=1, description="Dropout on the prefix.")

    @model_validator(mode="after")
    def _check_prefix_source(self) -> Self:
        if not self.projection and self.encoder_hidden_size is not None:
            raise ValueError("encoder_hidden_size is for projection: true")
        return self


_BOTTLENECK_DEFAULTS: dict[str, dict[str, Any]] = {
    "houlsby": {"activation": "swish"},
    "parallel": {"reduction_factor": 2.0, "scaling": 4.0, "init": "mam_adapter"},
}
"""By placement, as AdapterHub's presets double_seq_bn and par_bn; pfeiffer has the fields' own."""


class BottleneckConfig(ConfigSection):
    """Bottleneck adapters (Houlsby et al. 2019): a small MLP in each layer; not mergeable."""

    kind: Literal["bottleneck"] = "bottleneck"
    placement: Literal["pfeiffer", "houlsby", "parallel"] = Field(
        "pfeiffer",
        description="pfeiffer: after each MLP, reads the residual stream. houlsby: after attention "
        "and after the MLP, reads their outputs. parallel: parallel to the MLP, reads its input. "
        "AdapterHub's seq_bn, double_seq_bn and par_bn.",
    )
    reduction_factor: Float = Field(
        16.0,
        ge=1e-3,
        description="The base's hidden size over the adapter's. Default for parallel: 2.",
    )
    activation: Literal["relu", "gelu", "gelu_new", "swish", "tanh", "leakyrelu"] = Field(
        "relu", description="Between the two matrices. Default for houlsby: swish."
    )
    scaling: Positive = Field(1.0, description="Factor on the output. Default for parallel: 4.")
    dropout: Float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's output.")
    init: Literal["bert", "houlsby", "mam_adapter"] = Field(
        "bert",
        description="bert: both matrices normal, deviation 0.02. houlsby: truncated normal, 0.01. "
        "mam_adapter: the second one zero, so that training starts from exactly the base. "
        "Default for parallel: mam_adapter.",
    )
    train_layernorm: bool = Field(
        False, description="Train the base's layer norms too, as in the paper by Houlsby et al."
    )
    init_from: PathText | None = Field(
        None,
        description="Directory of a bottleneck adapter, ours or AdapterHub's, to initialize "
        "from instead of init.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_placement(cls, value: Any) -> Any:
        """Fill options that are not set with those of the placement."""
        if isinstance(value, dict):
            value = {**_BOTTLENECK_DEFAULTS.get(str(value.get("placement")), {}), **value}
        return value

    def bottleneck_size(self, hidden: int) -> int:
        """Return the bottleneck size for a base with hidden size ``hidden``."""
        return max(int(hidden // self.reduction_factor), 1)


class FusedAdapter(ConfigSection):
    """A trained bottleneck adapter that is fused with others."""

    path: PathText = Field(description="Directory of the adapter, ours or AdapterHub's.")
    name: str | None = Field(
        None, description="Default: the directory's; RUN/tasks/rte/adapter is called rte."
    )

    @model_validator(mode="before")
    @classmethod
    def _parse_bare_path(cls, value: Any) -> Any:
        """Read a bare string as ``{path: string}``."""
        return {"path": value} if isinstance(value, str) else value

    @property
    def display_name(self) -> str:
        """Return ``name``, or the last part of ``path``."""
        path = PurePath(self.path)
        return self.name or (path.parent if path.name == "adapter" else path).name

    @model_validator(mode="after")
    def _check_fused_source(self) -> Self:
        if not re.fullmatch(r"\w[\w-]*", self.display_name):
            raise ValueError(
                f"the name {self.display_name!r} of {self.path} must be of letters, digits, "
                "'_' and '-'; "
                "set another: {name: NAME, path: DIR}"
            )
        return self


class FusionConfig(ConfigSection):
    """AdapterFusion (Pfeiffer et al. 2021): attention over trained bottleneck adapters, which are
    frozen."""

    kind: Literal["fusion"] = "fusion"
    adapters: list[FusedAdapter] = Field(
        min_length=2,
        description="Adapters to fuse, of one placement: directories, or {name, path}. A resumed "
        "run reads them again.",
    )
    regularization: Float = Field(
        0.01, ge=0, description="The loss grows by this times the sum of |V - I|^2; 0: not at all."
    )
    dropout: Float = Field(0.0, ge=0, lt=1, description="Dropout on the attention's scores.")
    init_from: PathText | None = Field(
        None,
        description="Directory of a fusion of the same adapters, ours or AdapterHub's, to "
        "initialize from.",
    )

    @model_validator(mode="after")
    def _check_fused_adapters(self) -> Self:
        names = [adapter.display_name for adapter in self.adapters]
        if double := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"two of adapters are called {double[0]}; name them: {{name: NAME, path: DIR}}"
            )
        return self


class NoAdapterConfig(ConfigSection):
    """No adapter: only for ``dist-peft eval`` of a bare base."""

    kind: Literal["none"] = "none"


AdapterConfig = Annotated[
    LoraConfig
    | QaLoraConfig
    | VeraConfig
    | LohaConfig
    | LokrConfig
    | AdaLoraConfig
    | Ia3Config
    | PromptConfig
    | PTuningConfig
    | PrefixConfig
    | BottleneckConfig
    | FusionConfig
    | FullConfig
    | PartialConfig
    | NoAdapterConfig,
    Field(discriminator="kind"),
]

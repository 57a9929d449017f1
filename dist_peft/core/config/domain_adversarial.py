"""Configuration of domain-adversarial training."""

from pydantic import Field

from dist_peft.core.config.data import DataConfig
from dist_peft.core.config.types import ConfigSection, Float, Int

__all__ = ["DomainAdversarialConfig", "check_domains"]


class DomainAdversarialConfig(ConfigSection):
    """Domain-adversarial training (Ganin et al. 2016): a discriminator tells the domains of
    data.train[].domain apart, and its gradient is reversed where it enters the model. At progress
    p, from 0 to 1, the reversed gradient has the factor
    weight * (2 / (1 + exp(-gamma p)) - 1)."""

    weight: Float = Field(1.0, ge=0, description="Factor of the reversed gradient at the end.")
    gamma: Float = Field(
        10.0, gt=0, le=1000, description="How fast the factor rises; the paper's is 10."
    )
    hidden_size: Int = Field(
        100, ge=1, le=2**16, description="Units of the discriminator's hidden layer."
    )


def check_domains(data: DataConfig, config: DomainAdversarialConfig | None) -> None:
    """Check the domains of the sources against the section ``train.domain_adversarial``.

    Raises:
        ValueError: a domain without the section or without another one, outside of training
            sources or of classification; no labelled source.
    """
    domains = [source.domain for source in data.train]
    for number, source in enumerate(data.eval):
        if source.domain is not None:
            raise ValueError(
                f"data.eval[{number}].domain: held-out sources are only evaluated; leave it out"
            )
    if config is None:
        if any(domain is not None for domain in domains):
            raise ValueError("data.train[].domain needs the section train.domain_adversarial")
        return
    if not data.is_classification:
        raise ValueError(
            "train.domain_adversarial compares pooled states of classified records: it needs "
            "base.head: classifier; for a language model see docs/domain_adaptation.md"
        )
    if data.val_split:
        raise ValueError(
            "data.val_split would hold out records without labels too; with "
            "train.domain_adversarial name labelled files in data.eval"
        )
    named = {domain for domain in domains if domain is not None}
    if len(named) < 2:
        raise ValueError(
            "train.domain_adversarial needs sources of at least two values of data.train[].domain, "
            f"such as source and target; there is {', '.join(named) or 'none'}"
        )
    if not any(source.labels for source in data.train):
        raise ValueError("train.domain_adversarial: no source of data.train has labels")

import pytest
from pydantic import ValidationError

from dist_peft.core.config.data import DataConfig
from dist_peft.core.config.domain_adversarial import DomainAdversarialConfig, check_domains

CLASSES = {"format": "classification"}


def make_data(*domains: str | None, labels: bool = True, **more: object) -> DataConfig:
    """The first source has labels."""
    sources = [{"path": f"{n}.tsv", "domain": d, **CLASSES} for n, d in enumerate(domains)]
    if labels:
        sources[0]["labels"] = ["0", "1"]
    return DataConfig.model_validate({"train": sources, **more})


def test_domains_with_their_section() -> None:
    check_domains(make_data("a", "b", "a"), DomainAdversarialConfig())
    check_domains(make_data("a", "b"), DomainAdversarialConfig(weight=0))
    check_domains(make_data(None), None)


@pytest.mark.parametrize(
    ("data", "section", "words"),
    [
        (make_data("a", "b"), None, "needs the section train.domain_adversarial"),
        (make_data("a", "a"), DomainAdversarialConfig(), "at least two values"),
        (make_data(None), DomainAdversarialConfig(), "there is none"),
        (make_data("a", "b", labels=False), DomainAdversarialConfig(), "no source of data.train"),
        (
            make_data("a", "b", eval=[{"path": "e", "domain": "b", **CLASSES}]),
            DomainAdversarialConfig(),
            "only evaluated",
        ),
        (
            DataConfig.model_validate({"train": ["text.jsonl"]}),
            DomainAdversarialConfig(),
            "needs base.head: classifier",
        ),
    ],
)
def test_senseless_domains(
    data: DataConfig, section: DomainAdversarialConfig | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        check_domains(data, section)


@pytest.mark.parametrize("section", [{"gamma": 0}, {"weight": -1}, {"hidden_size": 0}])
def test_values_out_of_range(section: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        DomainAdversarialConfig.model_validate(section)

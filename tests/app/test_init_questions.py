"""Questions on a terminal: only about options that are missing, until the answer is one."""

import argparse
from collections.abc import Callable

import pytest

from dist_peft.app.init_questions import ask_missing_options
from dist_peft.core.errors import UserError


def make_args(**given: object) -> argparse.Namespace:
    names = ("base", "data", "eval", "gpus", "gpu_memory")
    return argparse.Namespace(**{**dict.fromkeys(names), "slurm": False, "k8s": False, **given})


def answer_with(*answers: str) -> tuple[Callable[[str], str], list[str]]:
    left, asked = list(answers), list[str]()

    def read(question: str) -> str:
        asked.append(question)
        if not left:
            raise EOFError
        return left.pop(0)

    return read, asked


def test_answers_fill_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    read, asked = answer_with("", "base", "a.jsonl", "", "nonsense", "K8S", "x", "4", "24GiB")
    args = make_args()
    ask_missing_options(args, read)
    assert (args.base, args.data, args.eval) == ("base", "a.jsonl", None)
    assert (args.slurm, args.k8s, args.gpus, args.gpu_memory) == (False, True, 4, "24GiB")
    assert len(asked) == 9 and "[5 % of the training records]" in asked[3]


def test_given_options_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    read, asked = answer_with()
    ask_missing_options(make_args(base="b", data="d"), read)
    assert not asked
    read, asked = answer_with("a.jsonl", "", "", "")
    args = make_args(base="b", slurm=True)
    ask_missing_options(args, read)
    assert len(asked) == 4 and args.slurm and args.gpus is None and args.gpu_memory is None


def test_end_of_input() -> None:
    with pytest.raises(UserError, match="input ended"):
        ask_missing_options(make_args(), answer_with("base")[0])

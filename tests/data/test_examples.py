"""Examples are plain values; reading them from records is tested in ``test_sources``."""

import pickle

from dist_peft.data.examples import ChatExample, CompletionExample, LabelledExample, TextExample


def test_examples_compare_by_value_and_reach_other_processes() -> None:
    made = [CompletionExample("Q", "A"), TextExample("text"), ChatExample([{"role": "user"}])]
    for example in made:
        assert pickle.loads(pickle.dumps(example)) == example
    assert CompletionExample("Q", "A") != CompletionExample("Q", "B")
    assert LabelledExample is not TextExample

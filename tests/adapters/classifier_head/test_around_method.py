"""An adapter around another one has its members."""

from dist_peft.adapters.classifier_head.around_method import AroundMethod
from dist_peft.adapters.protocol import Adapter


def test_every_member_but_two_is_passed_on() -> None:
    members = {name for name in dir(Adapter) if not name.startswith("_")}
    own = {"attach_to_model", "to_public_adapter", "get_lr_scale"}
    assert members - own <= set(vars(AroundMethod))

"""A function of others is wrapped once, all of a patch or none, and can be put back."""

import pytest

from peft_lntune.plugin.wrapping import MARK, wrap_once


class Owner:
    def double(self, value: int) -> int:
        return 2 * value

    @classmethod
    def name(cls) -> str:
        return cls.__name__


def one_more(original):
    return lambda *args: original(*args) + 1


def in_brackets(original):
    return lambda cls: f"<{original(cls)}>"


@pytest.fixture
def owner():
    return type("Owned", (Owner,), dict(vars(Owner)))


def test_wrapped_once(owner):
    for _ in range(2):
        wrap_once([(owner, "double", one_more), (owner, "name", in_brackets)])
    assert owner().double(3) == 7
    assert owner.name() == "<Owned>"
    assert all(hasattr(getattr(owner, name), MARK) for name in ("double", "name"))
    owner.double, owner.name = owner.double.__wrapped__, classmethod(owner.name.__func__.__wrapped__)
    assert owner().double(3) == 6
    assert owner.name() == "Owned"


@pytest.mark.parametrize("gone", ["never", "inherited"])
def test_where_a_name_is_gone_nothing_changes(gone, owner):
    if gone == "inherited":  # a class that lost its own function is not patched by the one beneath
        owner = type("Heir", (owner,), {"double": owner.double})
    name = "name" if gone == "inherited" else "triple"
    with pytest.raises(AttributeError, match=rf"{owner.__name__}\.{name} is gone"):
        wrap_once([(owner, "double", one_more), (owner, name, in_brackets)])
    assert owner().double(3) == 6

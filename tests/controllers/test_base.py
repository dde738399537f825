"""What controllers share: the repr of those that users write."""

from adabatch.controllers import Controller


class Plain(Controller):
    def propose(self, moments, *, loss, lr):
        return 16.0


class Sized(Plain):
    def __init__(self, size, rate=0.5):
        self.size, self.hidden = size, rate


class Named(Sized):
    init_args = ("size",)


def test_the_repr_names_the_arguments_that_are_kept():
    assert repr(Plain()) == "Plain()"
    assert repr(Sized(8)) == "Sized(size=8)"
    assert repr(Named(8)) == "Named(size=8)"

"""Architectures that no distribution registers: any function that makes a network, by ``package.module:function``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from torch import nn

from at_smooth.exceptions import OptionError
from at_smooth.interfaces import Architecture
from at_smooth.network import try_out
from at_smooth.plugin_errors import in_words


class Factory(Architecture):
    """A function that makes a network. It gets the options ``-N``, and ``shape`` and ``num_classes`` if it takes them.

    The network gets images in [0, 1], normalised by channel, and gives logits (N, num_classes).
    """

    model_config = ConfigDict(extra="allow")

    make: ClassVar[Callable[..., Any]]

    @classmethod
    def around(cls, make: Callable[..., Any]) -> type[Factory]:
        """The architecture that calls ``make``."""
        return type(cls.__name__, (cls,), {"make": staticmethod(make), "__doc__": inspect.getdoc(make) or cls.__doc__,
                                           "__module__": cls.__module__,
                                           "__annotations__": {"make": ClassVar[Callable[..., Any]]}})  # fmt: skip

    def call(self, shape: tuple[int, int, int], num_classes: int) -> tuple[Callable[..., Any], dict[str, Any]]:
        """The function, and the arguments that it gets."""
        make = type(self).make
        known = {"shape": shape, "num_classes": num_classes}
        accepted = inspect.signature(make).parameters
        return make, {name: value for name, value in known.items() if name in accepted} | (self.model_extra or {})

    def build(self, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Call the function and try the network, in float32, on two images.

        Raises:
            OptionError: The function refuses the options, or gives no network, or the network gives no such logits.
        """
        make, arguments = self.call(shape, num_classes)
        try:
            network = make(**arguments)
        except TypeError as error:
            raise OptionError(f"the model's function refuses its options ({error}); set them with -N.") from None
        except Exception as error:  # anyone's code
            raise OptionError(f"the model's function fails: {in_words(error)}.") from error
        if not isinstance(network, nn.Module):
            raise OptionError(f"the model's function gives {type(network).__name__}, not a torch.nn.Module.")
        network = network.float()  # whatever precision it was saved in
        hint = "A function with a parameter num_classes is told how many classes there are."
        try_out(network, torch.zeros(2, *shape), num_classes, hint)
        return network.train()

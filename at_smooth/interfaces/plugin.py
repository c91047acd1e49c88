"""Something with options, checked where they are declared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from at_smooth.exceptions import explain

_P = TypeVar("_P", bound="Plugin")


class Plugin(BaseModel):
    """Something with options. Each public field is one: its type, default, bounds and help, declared once.

    The Python constructor, a recipe and the command line (``-R temperature=3``) all go through that declaration.
    What a plugin learns later (teachers, averages) it keeps in attributes whose names begin with an underscore.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=())

    @classmethod
    def build_from(cls: type[_P], options: Mapping[str, Any], subject: str) -> _P:
        """Validate options and make the plugin.

        Args:
            options: Values by name, as text or typed.
            subject: Named in the message when one does not fit.

        Raises:
            OptionError: An option is unknown, of the wrong type or out of bounds.
        """
        try:
            return cls(**options)
        except ValidationError as error:
            problem = explain(error, subject)
            known = ", ".join(cls.model_fields) or "none"
            raise type(problem)(f"{problem}. Options: {known}.") from None

    def options(self) -> dict[str, Any]:
        """Every option with its value, in plain types (what a recipe records)."""
        return self.model_dump(mode="json")

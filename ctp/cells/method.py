"""A method: a frozen class of settings in one of three families, and the one function that does it.

Declaring a class registers it under its `method` name, and grid files find it there. Values are strict: a string is no
number, an unknown field is an error. What does the work is imported where it is done: planning needs no torch.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import ValidationInfo

from ctp.cells.inputs import Spec
from ctp.common.messages import unknown


class Method(Spec):
    """Base of compressions, recoveries and measures: picked by the field `method`, found in `registry`."""

    registry: ClassVar[dict[str, type["Method"]]]
    method: str

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        default = cls.model_fields["method"].default
        if isinstance(default, str):
            known = cls.registry.get(default)
            if known is not None and known.__module__ != cls.__module__:
                raise ValueError(f"method {default!r} is there already: {known.__module__}.{known.__name__}")
            cls.registry[default] = cls

    @classmethod
    def parse(cls, data: Any, info: ValidationInfo) -> Any:
        """`{method: gptq, …}` or plain `gptq` -> the spec registered under that name."""
        if isinstance(data, cls):
            return data
        if isinstance(data, str):
            data = {"method": data}
        if not isinstance(data, Mapping) or "method" not in data:
            raise ValueError(f"needs a 'method', one of: {', '.join(sorted(cls.registry))}")
        if not isinstance(data["method"], str) or data["method"] not in cls.registry:
            raise ValueError(unknown("method", data["method"], cls.registry))
        return cls.registry[data["method"]].model_validate(data, context=info.context)

    @property
    def label(self) -> str:
        """A short unique name: the method, then every field that is not at its default."""
        rest = {n: v for n, v in self.changed().items() if n != "method"}
        return "-".join([self.method, *(tag(n, v) for n, v in rest.items())])


def tag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"no_{name}"
    return f"{name}{value:g}" if isinstance(value, float) else f"{name}{value}"

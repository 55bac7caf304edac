"""A method: a frozen class of settings in one of three families, registered under its `method` name when declared."""

import hashlib
from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import ModelWrapValidatorHandler, ValidationInfo, model_validator

from ctp.cells.inputs import Spec
from ctp.common.messages import unknown


class Method(Spec):
    """Base of compressions, recoveries and measures: picked by the field `method`, found in `registry`.

    LABEL: a template for `label`, where that is not made of all settings.
    """

    registry: ClassVar[dict[str, type["Method"]]]
    LABEL: ClassVar[str] = ""
    method: str

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: object) -> None:
        default = cls.model_fields["method"].default
        if isinstance(default, str):
            known = cls.registry.get(default)
            if known is not None and known.__module__ != cls.__module__:
                raise ValueError(f"method {default!r} is there already: {known.__module__}.{known.__name__}")
            cls.registry[default] = cls

    @model_validator(mode="wrap")
    @classmethod
    def _choose(cls, data: object, validate: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        """For a family, `{method: gptq, …}` or plain `gptq` becomes the class registered under that name."""
        if "registry" not in vars(cls):
            return validate(data)
        if isinstance(data, cls):
            return data
        fields = {"method": data} if isinstance(data, str) else data
        if not isinstance(fields, Mapping) or "method" not in fields:
            raise ValueError(f"needs a 'method', one of: {', '.join(sorted(cls.registry))}")
        name = fields["method"]
        if not isinstance(name, str) or name not in cls.registry:
            raise ValueError(unknown("method", name, cls.registry))
        chosen = cls.registry[name].model_validate(fields, context=info.context)
        assert isinstance(chosen, cls)
        return chosen

    @property
    def label(self) -> str:
        """A short unique name: of LABEL and the seed, or else the method, then every field not at its default."""
        if self.LABEL:
            seed = getattr(self, "seed", 0)
            return self.LABEL.format(self) + (f"-seed{seed}" if seed else "")
        rest = {n: v for n, v in self.changed().items() if n != "method"}
        return "-".join([self.method, *(tag(n, v) for n, v in rest.items())])


def tag(name: str, value: object) -> str:
    """A setting in a label: `sym`, `no_refit`, `k100`, `lr0.001`."""
    if isinstance(value, bool):
        return name if value else f"no_{name}"
    return f"{name}{value:g}" if isinstance(value, float) else f"{name}{value}"


def short_hash(text: str, digits: int) -> str:
    """The first hex digits of a text's sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits]

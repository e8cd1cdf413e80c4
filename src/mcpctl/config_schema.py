"""How a key of config.yaml is described: a field of a dataclass, with its reader and one line of meaning."""

from dataclasses import MISSING, FrozenInstanceError, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from mcpctl import config_values as values

__all__ = ["keys", "section", "setting"]

if TYPE_CHECKING:
    from dataclasses import dataclass as keys
else:

    def keys(*, frozen):
        """A frozen dataclass, whose functions are those of all and not written for each: that would take a quarter of
        a short command's time."""

        def made(cls):
            cls.__init__, cls.__eq__, cls.__hash__ = _init, _equal, _hash
            cls.__setattr__ = cls.__delattr__ = _refuse
            return dataclass(init=False, repr=False, eq=False, match_args=False)(cls)

        return made

    def _init(self, *values_in_order, **given):
        given.update(zip((one.name for one in fields(self)), values_in_order, strict=False))
        for one in fields(self):
            if one.name not in given:
                given[one.name] = one.default if one.default_factory is MISSING else one.default_factory()
            vars(self)[one.name] = given.pop(one.name)
        if given:
            raise TypeError(f"{type(self).__name__} has no {', '.join(given)}")

    def _equal(self, other):
        return vars(self) == vars(other) if type(self) is type(other) else NotImplemented

    def _hash(self):
        return hash(tuple(vars(self).values()))

    def _refuse(self, name, value=None):
        raise FrozenInstanceError(f"{type(self).__name__}.{name} stays as it is")


def setting(default: Any, read: values.Reader, doc: str) -> Any:
    """A dataclass field that is a key of the config."""
    return field(default=default, metadata={"read": read, "doc": doc})


def section(cls: type, doc: str) -> Any:
    """A dataclass field that is a section of the config."""
    return field(default_factory=cls, metadata={"section": cls, "doc": doc})

"""From a command line to a typed config."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eva_rl.errors import UserError

Config = TypeVar("Config")


SHORT_KEYS = {
    "env": "env.id",
    "data": "data.source",
    "policy": "policy.path",
    "adapter": "adapter.method",
    "size": "size.name",
    "expert": "expert.name",
}
"""What a user types, and the key it sets."""


SCHEMAS: dict[str, type] = {}
"""The dataclass of each command's config."""


CHOICES: dict[str, Mapping[str, Mapping[str, object]]] = {}
"""For each command, its groups that are chosen by name."""


Arguments = Callable[[Sequence[str]], list[str]]


_ARGUMENTS: dict[str, Arguments] = {}


def register(name: str, schema: type, groups: Mapping[str, Mapping[str, object]], arguments: Arguments = list) -> None:
    """Make a command's schema, and the options of its groups, known to Hydra.

    Args:
        name: The command.
        schema: Dataclass of the whole config.
        groups: For each Hydra group, its options by name: dataclasses with the values that each begins with.
        arguments: Turns what was typed into overrides, where a command takes more than those.
    """
    _ARGUMENTS[name] = arguments
    SCHEMAS[name], CHOICES[name] = schema, groups
    store = ConfigStore.instance()
    store.store(name=f"{name}_schema", node=schema)
    for group_name, options in groups.items():
        for option_name, node in options.items():
            store.store(group=group_name, name=option_name, node=node)


def parse(name: str, overrides: Sequence[str]) -> Any:
    """Compose a command's config and convert it to its dataclass, once.

    Args:
        name: The command; ``configs/<name>.yaml`` is its primary config.
        overrides: What was typed, for instance ``["env=push-v3", "adapter.rank=4"]``.

    Raises:
        UserError: An unknown key, option or type, or a value out of range.
    """
    try:
        with initialize_config_module("eva_rl.configs", version_base="1.3"):
            typed = _ARGUMENTS[name](overrides)
            config = compose(name, [_long_form(override, name) for override in typed])
        return OmegaConf.to_object(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"{_first_lines(error)} See `python -m eva_rl.{name} --help`.") from error


def _long_form(override: str, command: str) -> str:
    """Turn ``env=push-v3`` into ``env.id=push-v3``, quoting what Hydra's grammar would take apart.

    Entries of a table such as ``adapter.rank_caps={action_head:2}`` are added: Hydra wants a plus for that.
    """
    key, equals, value = override.partition("=")
    schema = ConfigStore.instance().load(f"{command}_schema.yaml").node
    if equals and (_is_table(schema, key) or _is_table(schema, key.rpartition(".")[0])):
        return f"+{override}"
    long_key = SHORT_KEYS.get(key)
    if not equals or long_key is None or (key in schema and not OmegaConf.is_config(schema[key])):
        return override
    if not re.match(r"^['\"]", value):
        value = "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return f"{long_key}={value}"


def _is_table(schema: DictConfig, key: str) -> bool:
    """Whether the schema has a mapping with free keys there."""
    node = OmegaConf.select(schema, key) if re.fullmatch(r"[\w.]+", key) else None
    return isinstance(node, DictConfig) and OmegaConf.get_type(node) is dict


def _first_lines(error: Exception) -> str:
    cause: BaseException = error
    while isinstance(cause.__cause__, HydraException | OmegaConfBaseException):
        cause = cause.__cause__
    lines = [line.strip() for text in (str(error), str(cause)) for line in text.splitlines() if line.strip()]
    kept = [line for line in dict.fromkeys(lines) if not line.startswith(("full_key", "object_type", "reference"))]
    return ". ".join(line.rstrip(".") for line in kept) + "."

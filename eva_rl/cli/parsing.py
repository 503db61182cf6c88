"""From a command line to a typed config."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from eva_rl.cli.keys import Key, defaults_of, groups_of
from eva_rl.cli.values import is_number, literal, unquoted, value_of
from eva_rl.errors import UserError, close_matches
from eva_rl.files import expanded, read_yaml

logger = logging.getLogger(__name__)

Config = TypeVar("Config")
Arguments = Callable[[Sequence[str]], list[str]]
Typed = Sequence[tuple[str, str]]
Setting = tuple[str, Any, bool]
"""A key, its value, and whether that is one entry of a table whose other entries stay."""


SHORT_KEYS = {
    "env": "env.id",
    "data": "data.source",
    "policy": "policy.path",
    "adapter": "adapter.method",
    "size": "size.name",
    "expert": "expert.name",
}
"""What a user types, and the key it sets."""
SYNONYMS = {
    "lr": "learning_rate",
    "steps": "updates",
    "max_steps": "updates",
    "epochs": "updates",
    "bs": "batch_size",
    "task": "env",
    "env_id": "env",
    "env_name": "env",
    "dataset": "data",
    "model": "policy",
    "method": "adapter",
    "peft": "adapter",
    "r": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "output_dir": "run_dir",
    "log_dir": "run_dir",
    "out": "run_dir",
    "run_dir": "policy",
    "checkpoint": "policy",
    "logger": "tracker",
    "report_to": "tracker",
    "format": "to",
    "gpu": "device",
    "total_timesteps": "env_steps",
    "n_envs": "num_envs",
    "n_steps": "rollout_steps",
    "n_epochs": "epochs",
    "gamma": "discount",
    "ent_coef": "entropy",
    "buffer_size": "replay_size",
    "embedding_dim": "hidden_size",
    "seq_len": "context_length",
}
"""What other programs call a key."""
CONFIG = "config"
"""Names the ``config.yaml`` of a run, or its folder, to begin from."""
NOT_STORED = {"run_dir", "resume", "study"}
"""Keys of another run's config that a new run decides on itself."""
RENAMED = {
    "warmup": "warmup_steps",
    "random_steps": "learning_starts",
    "train_every": "train_freq",
    "updates_per_bout": "gradient_steps",
    "target_share": "tau",
    "clone_weight": "bc_coef",
    "q_weight": "q_coef",
}
"""Settings within groups, by the names that an earlier version wrote."""
DID_NOTHING = {"target_scale", "checkpoint_every"}
"""Settings that are gone from some groups."""
WORD = re.compile(r"\+{0,2}(?P<key>[A-Za-z_][^=\s]*)=(?P<value>.*)", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """What is known of a command.

    Attributes:
        schema: Dataclass of its config.
        choices: Its groups that are chosen by name, and their options: dataclasses with what each begins with.
        arguments: Turns what was typed into ``KEY=VALUE``, where a command takes more than those.
        elsewhere: Of a key and a value that the command does not know, what to type instead; empty where it cannot say.
    """

    schema: type
    choices: Mapping[str, Mapping[str, object]]
    arguments: Arguments
    elsewhere: Callable[[str, str], str]


COMMANDS: dict[str, Command] = {}
"""The commands that were imported."""


def register(
    name: str,
    schema: type,
    groups: Mapping[str, Mapping[str, object]],
    arguments: Arguments = list,
    elsewhere: Callable[[str, str], str] = lambda key, text: "",
) -> None:
    """Make a command's schema, and the options of its groups, known to Hydra.

    Args:
        name: The command.
        schema: Dataclass of the whole config.
        groups: For each Hydra group, its options by name: dataclasses with the values that each begins with.
        arguments: Turns what was typed into ``KEY=VALUE``, where a command takes more than those.
        elsewhere: Of a key and a value that the command does not know, what to type instead; empty where it cannot say.
    """
    COMMANDS[name] = Command(schema, groups, arguments, elsewhere)
    store = ConfigStore.instance()
    store.store(name=f"{name}_schema", node=schema)
    for group_name, options in groups.items():
        for option_name, node in options.items():
            store.store(group=group_name, name=option_name, node=node)


def parse(name: str, words: Sequence[str]) -> Any:
    """Compose a command's config and convert it to its dataclass, once.

    Args:
        name: The command; ``configs/<name>.yaml`` is its primary config.
        words: What was typed: ``["env=push-v3", "adapter.rank=4"]``, or ``["--env", "push-v3"]``.

    Raises:
        UserError: An unknown key, option or type, or a value out of range.
    """
    everything = [_key_and_value(name, word) for word in COMMANDS[name].arguments(without_dashes(name, words))]
    typed = [(key, value) for key, value in everything if key != CONFIG]
    stored = stored_settings(name, [Path(unquoted(value)) for key, value in everything if key == CONFIG])
    chosen = chosen_options(name, typed, stored)
    values = [*_stored_values(name, stored, chosen), *_typed_values(name, typed, chosen)]
    try:
        config = copy.deepcopy(_composed(name, tuple(f"{group}={option}" for group, option in chosen.items())))
        for setting in values:
            _set(config, *setting)
        return OmegaConf.to_object(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"{_first_lines(error)} {see_help(name)}") from error


@lru_cache(maxsize=64)  # Hydra takes 0.1 s, and a benchmark asks for each of its runs
def _composed(name: str, options: tuple[str, ...]) -> DictConfig:
    with initialize_config_module("eva_rl.configs", version_base="1.3"):
        return compose(name, list(options))


def see_help(name: str) -> str:
    """Where the keys of a command are listed."""
    return f"See `python -m eva_rl.{name} --help`."


def without_dashes(name: str, words: Sequence[str]) -> list[str]:
    """What was typed, with ``--env push-v3``, ``--env=push-v3`` and ``--video`` as ``KEY=VALUE``."""
    left, found = list(words), []
    while left:
        word = left.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not re.match(r"--[A-Za-z]", word):
            found.append(word)
            continue
        key = _with_underscores(name, key)
        if equals:
            found.append(f"{key}={value}")
        elif left and not re.match(r"--[A-Za-z]|[A-Za-z_][\w.]*=", left[0]):
            found.append(f"{key}={left.pop(0)}")
        else:
            found.append(f"{key}=true" if _is_switch(name, key) else word)
    return found


def _with_underscores(name: str, key: str) -> str:
    """A key with underscores for dashes; the name of a table's entry stays as it is."""
    plain = key.replace("-", "_")
    if plain == key:
        return key
    table, _ = table_and_entry(plain, known_keys(name, first_options(name)))
    return plain[: len(table)] + key[len(table) :] if table else plain


def _is_switch(name: str, key: str) -> bool:
    found = known_keys(name, first_options(name)).get(key)
    return found is not None and found.kind is bool


def _key_and_value(name: str, word: str) -> tuple[str, str]:
    found = WORD.fullmatch(word)
    if found is None:
        raise UserError(f"{word!r} is not KEY=VALUE.{_meant_by(name, word)} {see_help(name)}")
    return found["key"], found["value"]


def _meant_by(name: str, word: str) -> str:
    """The key that a value alone may be of."""
    if re.fullmatch(r"[\w/-]+-v\d|mujoco/\w+", word):
        return f" A task is named by env={word}."
    if SHORT_KEYS["policy"] in known_keys(name, first_options(name)) and expanded(word).is_dir():
        return f" A policy is named by policy={word}."
    return ""


def first_options(name: str) -> dict[str, str]:
    """The option of each group that is chosen by name where nothing is typed."""
    return {group: next(iter(options)) for group, options in COMMANDS[name].choices.items()}


def chosen_options(name: str, typed: Typed, stored: Mapping[str, Any]) -> dict[str, str]:
    """The option of each group that is chosen by name: what was typed, else stored, else the first.

    Raises:
        UserError: There is no such option.
    """
    chosen, asked = first_options(name), dict(typed)
    for group, options in COMMANDS[name].choices.items():
        long = f"{group}.name"
        chosen[group] = asked.get(group, asked.get(long, stored.get(long, chosen[group])))
        if asked.get(long, chosen[group]) != chosen[group]:
            raise UserError(f"{group}={chosen[group]} and {long}={asked[long]}: expected one of them.")
        if chosen[group] not in options:
            close = close_matches(chosen[group], options)
            expected = f"Did you mean {' or '.join(close)}?" if close else f"Expected one of {', '.join(options)}."
            raise UserError(f"{group}={chosen[group]}: there is no such option. {expected} {see_help(name)}")
    return chosen


def known_keys(name: str, chosen: Mapping[str, str]) -> dict[str, Key]:
    """Every key of a command by its name, with these options."""
    command = COMMANDS[name]
    nodes = {group: command.choices[group][option] for group, option in chosen.items()}
    return {key.name: key for group in groups_of(defaults_of(command.schema), nodes) for key in group.keys}


def _is_table(key: Key) -> bool:
    return get_origin(key.kind) is dict


def table_and_entry(key: str, known: Mapping[str, Key]) -> tuple[str, str]:
    """The table that a key lies in, and the name of the entry, which may have dots; empty where there is none."""
    table = next((name for name, own in known.items() if key.startswith(f"{name}.") and _is_table(own)), "")
    return table, key.removeprefix(f"{table}.") if table else ""


def _typed_values(name: str, typed: Typed, chosen: Mapping[str, str]) -> Iterator[Setting]:
    """What was typed, as values of the keys' types."""
    known = known_keys(name, chosen)
    for key, text in typed:
        long = SHORT_KEYS.get(key, key) if key not in known else key
        table, entry = table_and_entry(long, known)
        if long in known:
            yield long, value_of(key, known[long].kind, text), False
        elif entry:
            yield table, {entry: value_of(key, get_args(known[table].kind)[1], text)}, True
        elif key not in chosen:
            raise UserError(f"{key}={text}: {suggestion(name, key, text, chosen)} {see_help(name)}")


def suggestion(name: str, key: str, text: str, chosen: Mapping[str, str]) -> str:
    """What somebody may have meant by a key that does not exist: the key to type instead."""
    known = known_keys(name, chosen)
    takes = [short for short, long in SHORT_KEYS.items() if long in known] + list(filter(_is_offered, known))
    last = key.rpartition(".")[2]
    wanted = {last, SYNONYMS.get(last, last)}
    same = [other for other in takes if other in wanted or other.rpartition(".")[2] in wanted]
    if same:
        first = " (of the cloning that comes first)" if same[0].startswith("algo.bc.") else ""
        return "there is no such key. Type " + " or ".join(f"{other}={text}" for other in same[:3]) + f"{first}."
    for group, options in COMMANDS[name].choices.items():
        keys = {key, *(f"{group}.{own}" for own in wanted)}
        having = {option: own[0] for option in options if (own := _of_option(name, {**chosen, group: option}, keys))}
        if having:
            first, found = next(iter(having.items()))
            several = " or ".join(list(having)[:3])
            typed = f"{group}={first} as well" if found == key else f"{group}={first} {found}={text}"
            return f"{'that' if found == key else found} is a key of {group}={several}. Type {typed}."
    if instead := COMMANDS[name].elsewhere(key, text):
        return f"there is no such key. {instead}"
    close = close_matches(key, takes)
    return "there is no such key." + (f" Did you mean {' or '.join(f'{c}={text}' for c in close)}?" if close else "")


def _of_option(name: str, chosen: Mapping[str, str], keys: Container[str]) -> list[str]:
    """Those of the keys that a command has with these options."""
    return [key for key in known_keys(name, chosen) if key in keys and _is_offered(key)]


def _is_offered(key: str) -> bool:
    """Whether a key is one to type: a group that is chosen by name is typed as such."""
    return not key.endswith(".name") or key in SHORT_KEYS.values()


def stored_settings(name: str, paths: Sequence[Path]) -> dict[str, Any]:
    """The settings of runs, flat but for tables; of several files the later ones win.

    Args:
        name: The command, which decides on what is a table.
        paths: ``config.yaml`` files, or run directories.

    Raises:
        UserError: No such file, or it holds no settings.
    """
    settings: dict[str, Any] = {}
    tables = [key for key, own in known_keys(name, first_options(name)).items() if _is_table(own)] if paths else []
    for path in paths:
        place = expanded(path)
        file = place / "config.yaml" if place.is_dir() else place
        content = read_yaml(file)
        if not isinstance(content, dict):
            raise UserError(f"{file} holds no settings. Name a run directory or its config.yaml with config=.")
        settings |= {key: value for key, value in flat(content, tables=tables) if key not in NOT_STORED}
    return settings


def flat(values: Mapping[str, Any], prefix: str = "", tables: Container[str] = ()) -> Iterator[tuple[str, Any]]:
    """Settings of nested groups by dotted name; an empty group is a value, and so is each of the ``tables``."""
    for key, value in values.items():
        if isinstance(value, dict) and value and f"{prefix}{key}" not in tables:
            yield from flat(value, f"{prefix}{key}.", tables)
        else:
            yield f"{prefix}{key}", value


def todays_name(key: str) -> str:
    """A stored key by the name of today, if it is one of a group that had another name."""
    group, dot, name = key.rpartition(".")
    return f"{group}{dot}{RENAMED.get(name, name) if dot else name}"


def _stored_values(name: str, stored: Mapping[str, Any], chosen: Mapping[str, str]) -> Iterator[Setting]:
    """Stored settings as values; those of an option that is not chosen any more are left out."""
    known = known_keys(name, chosen)
    dropped = {group: old for group, new in chosen.items() if (old := stored.get(f"{group}.name", new)) != new}
    for group, old in dropped.items():
        logger.warning(
            "config=: the file has %s=%s; its %s.* is left out, since %s=%s is typed.",
            *(group, old, group, group, chosen[group]),
        )
    for written, value in stored.items():
        key = written if written in known else todays_name(written)
        if key.partition(".")[0] in dropped or (key not in known and key.rpartition(".")[2] in DID_NOTHING):
            continue
        table, entry = table_and_entry(key, known)
        if key in known:
            kind = known[key].kind
            is_text = isinstance(value, str) and is_number(kind)
            yield key, value_of(key, kind, value) if is_text else literal(value), False
        elif entry:
            yield table, {entry: literal(value)}, True
        else:
            raise UserError(
                f"{CONFIG}=: the file sets {key}, {suggestion(name, key, str(value), chosen)} It has to hold settings "
                f"of {name}, not of another command; the policy of a run is policy=RUN."
            )


def _set(config: DictConfig, key: str, value: Any, is_entry: bool) -> None:
    try:
        OmegaConf.update(config, key, value, merge=is_entry, force_add=True)  # entries of a table are new keys
    except GrammarParseError:  # "${" without an end: text
        OmegaConf.update(config, key, literal(value), merge=is_entry, force_add=True)


def _first_lines(error: Exception) -> str:
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return ". ".join(line for line in lines if not line.startswith(("full_key", "object_type", "reference"))) + "."

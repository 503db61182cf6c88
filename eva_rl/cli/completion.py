"""Shell completion: a script with everything in it, so that completing starts no Python."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from eva_rl.cli.parsing import COMMANDS, SHORT_KEYS, first_options, known_keys

SHELLS = ("bash", "zsh", "fish")
BASH = """# eval "$(eva-rl --completion bash)"
_eva_rl() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} key="" words=""
    if [[ $current == "=" ]]; then
        key=${{COMP_WORDS[COMP_CWORD - 1]}} current=""
    elif [[ ${{COMP_WORDS[COMP_CWORD - 1]}} == "=" ]]; then
        key=${{COMP_WORDS[COMP_CWORD - 2]}}
    elif [[ $current == *=* ]]; then  # zsh does not split at "="
        key=${{current%%=*}}
    fi
    if [[ -n $key ]]; then
        case $key in
{values}
            *) COMPREPLY=($(compgen -f -- "${{current#*=}}")); return ;;
        esac
        COMPREPLY=($(compgen -W "$words" -- "${{current#*=}}"))
        return
    fi
    if (( COMP_CWORD == 1 )); then
        words={commands}
    else
        case ${{COMP_WORDS[1]}} in
{keys}
        esac
        compopt -o nospace 2> /dev/null
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -F _eva_rl eva-rl
"""
ZSH = """# eval "$(eva-rl --completion zsh)"
autoload -Uz bashcompinit && bashcompinit
"""


def completion(shell: str, values: Mapping[str, Sequence[str]]) -> str:
    """A script that completes ``eva-rl`` in a shell.

    Args:
        shell: bash, zsh or fish.
        values: What some keys take, for instance tasks for ``env``.
    """
    keys = {name: _typed_keys(name) for name in COMMANDS}
    return _fish(keys, values) if shell == "fish" else ("" if shell == "bash" else ZSH) + _bash(keys, values)


def _typed_keys(name: str) -> list[str]:
    known = known_keys(name, first_options(name))
    short = {long: short for short, long in SHORT_KEYS.items()}
    return [*COMMANDS[name].choices, *(short.get(key, key) for key in known if not key.endswith(".name"))]


def _bash(keys: Mapping[str, Sequence[str]], values: Mapping[str, Sequence[str]]) -> str:
    of_keys = "\n".join(
        f"            {name}) words={shlex.quote(' '.join(f'{key}=' for key in known))} ;;"
        for name, known in keys.items()
    )
    of_values = "\n".join(f"            {key}) words={shlex.quote(' '.join(v))} ;;" for key, v in values.items())
    return BASH.format(commands=shlex.quote(" ".join(keys)), keys=of_keys, values=of_values)


def _fish(keys: Mapping[str, Sequence[str]], values: Mapping[str, Sequence[str]]) -> str:
    lines = ["# eva-rl --completion fish | source", "complete -c eva-rl -f"]
    lines.append(f"complete -c eva-rl -n __fish_use_subcommand -a {shlex.quote(' '.join(keys))}")
    for name, known in keys.items():
        words = [f"{key}={value}" for key in known for value in values.get(key, [""])]
        lines.append(f"complete -c eva-rl -n '__fish_seen_subcommand_from {name}' -a {shlex.quote(' '.join(words))}")
    return "\n".join(lines) + "\n"

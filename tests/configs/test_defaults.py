"""Each default stands once: what the command, its help, the documentation and Python see is the same."""

from __future__ import annotations

import inspect
import re
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import pytest

from eva_rl.adapters import METHODS, attach_adapter
from eva_rl.agents import SIZES, DecisionTransformerConfig
from eva_rl.cli.keys import groups_of
from eva_rl.cli.parsing import parse
from eva_rl.configs.algorithms import ALGORITHMS, BC_FIRST, BCFirst
from eva_rl.configs.finetune import AdapterOptions, EvaSourceOptions
from eva_rl.configs.groups import AlgoOptions
from eva_rl.errors import UserError
from eva_rl.eva import EvaOptions, compute
from eva_rl.finetune import command as finetune
from eva_rl.options import Options
from eva_rl.pretrain import SizeOptions
from eva_rl.training.options import (
    BCOptions,
    ODTOptions,
    OffPolicyOptions,
    PPOOptions,
    ResidualOptions,
    SACOptions,
    SelfImitationOptions,
    TD3Options,
)

LOOPS: dict[str, type[Options]] = {
    "bc": BCOptions,
    "self_imitation": SelfImitationOptions,
    "odt": ODTOptions,
    "odt_td3": TD3Options,
    "residual": ResidualOptions,
    "ppo": PPOOptions,
    "sac": SACOptions,
    "td3": OffPolicyOptions,
}
DOCUMENTED = (Path(__file__).parents[2] / "docs/config.md").read_text()


def loop_of(name: str) -> Any:
    return LOOPS[name.removeprefix(BC_FIRST)]()


def shown_defaults(text: str) -> dict[str, str]:
    """Keys and defaults of a help text."""
    return dict(re.findall(r"^  ([\w.]+)=(\S*)", text, re.MULTILINE))


def documented_defaults(heading: str) -> dict[str, str]:
    """Keys and defaults of a table of docs/config.md, which may only list what differs from an earlier one."""
    section = DOCUMENTED.split(f"### finetune: {heading}\n")[1]
    section = re.split(r"^##", section, flags=re.MULTILINE)[0]
    found = dict(re.findall(r"^\| `([\w.]+)` \| `(.*?)` \|", section, re.MULTILINE))
    base = re.search(r"As `(.*?)`", section)
    return documented_defaults(base[1]) | found if base else found


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_has_its_loop_s_defaults(name: str) -> None:
    loop, algo = loop_of(name), parse("finetune", [f"algo={name}"]).algo
    assert isinstance(algo, type(loop))
    for f in fields(loop):
        if f.name == "learning_rate" and name.removeprefix(BC_FIRST) in {"bc", "self_imitation"}:
            continue  # chosen by the adapter's method
        assert getattr(algo, f.name) == getattr(loop, f.name) == getattr(ALGORITHMS[name], f.name), f.name
    if name.startswith(BC_FIRST):
        assert algo.bc == BCFirst(updates=BCOptions.updates, learning_rate=METHODS["eva"].learning_rate)


@pytest.mark.parametrize("method", METHODS)
def test_cloning_takes_its_learning_rate_from_the_method(method: str) -> None:
    rate = METHODS[method].learning_rate
    assert parse("finetune", [f"adapter={method}"]).algo.learning_rate == rate
    assert parse("finetune", [f"adapter={method}", "algo=bc_then_odt"]).algo.bc.learning_rate == rate
    assert parse("finetune", [f"adapter={method}", "algo.learning_rate=auto"]).algo.learning_rate == rate
    anew = parse("finetune", [f"adapter={method}", "algo=self_imitation"]).algo
    going_on = parse("finetune", [f"adapter={method}", "algo=self_imitation", "algo.restart=false"]).algo
    assert anew.learning_rate == rate
    assert going_on.learning_rate == rate / 5


@pytest.mark.parametrize("method", ["eva", "full"])
def test_a_learning_rate_that_is_typed_is_taken(method: str) -> None:
    for typed in ("1e-05", "0.00001"):
        assert parse("finetune", [f"adapter={method}", f"algo.learning_rate={typed}"]).algo.learning_rate == 1e-5
    assert parse("pretrain", []).algo.learning_rate == BCOptions.learning_rate, "there is no adapter to choose by"


def test_full_fine_tuning_learns_slower() -> None:
    assert METHODS["full"].learning_rate <= METHODS["lora"].learning_rate / 3


@pytest.mark.parametrize("name", ALGORITHMS)
def test_help_and_documentation_show_them(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert finetune.main([f"algo={name}", "--help"]) == 0
    shown = shown_defaults(capsys.readouterr().out)
    keys = [key for part in groups_of(ALGORITHMS[name], {}, "algo") for key in part.keys]
    expected = {key.name: key.shown for key in keys if not key.name.endswith(".name")}
    assert {key: shown[key] for key in expected} == expected
    headings = [heading for heading in re.findall(r"^### finetune: (algo=.*)$", DOCUMENTED, re.MULTILINE)]
    own = [heading for heading in headings if heading.split(", ")[0] == f"algo={name}"]
    documented = {k: v for heading in own for k, v in documented_defaults(heading).items()}
    assert documented == expected


def test_a_size_is_the_network_s() -> None:
    custom, config = SizeOptions(), DecisionTransformerConfig(1, 1)
    assert custom.max_timestep is None, "taken from the data and the tasks"
    shape = [f for f in fields(SizeOptions) if f.name not in {"name", "max_timestep"}]
    for f in shape:
        assert getattr(custom, f.name) == getattr(config, f.name)
    for name, size in SIZES.items():
        sized = DecisionTransformerConfig(1, 1, **size)
        parsed = parse("pretrain", [f"size={name}"]).size
        for f in shape:
            assert getattr(parsed, f.name) == getattr(sized, f.name)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_has_the_defaults_of_python(method: str) -> None:
    options = parse("finetune", [f"adapter={method}"]).adapter
    assert options == AdapterOptions(method=method)
    called = inspect.signature(attach_adapter).parameters
    assert options.rank == EvaOptions.rank, "which attach_adapter takes where neither it nor EVA's result is given"
    for name in ("alpha", "dropout", "targets"):
        default = called[name].default
        assert getattr(options, name) == (list(default) if name == "targets" else default), name
    assert options.rank_caps == (called["rank_caps"].default or {})


def test_eva_has_one_set_of_defaults() -> None:
    called, own = inspect.signature(compute).parameters, EvaOptions()
    for name in ("rank", "rho", "tau", "center", "score", "variant", "alpha"):
        assert getattr(AdapterOptions(), name) == getattr(own, name) == called[name].default, name
    assert EvaSourceOptions().max_batches == called["max_batches"].default


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_misspelt_field_is_an_error_in_python_and_on_the_command_line(name: str) -> None:
    for kind in (type(loop_of(name)), type(ALGORITHMS[name])):
        with pytest.raises(TypeError, match="learning_rat"):
            kind(learning_rat=1.0)
    with pytest.raises(UserError, match="learning_rat"):
        parse("finetune", [f"algo={name}", "algo.learning_rat=1"])


@pytest.mark.parametrize("kind", [AdapterOptions, EvaSourceOptions, SizeOptions, BCFirst])
def test_a_misspelt_field_of_another_group_is_an_error(kind: type[Options]) -> None:
    with pytest.raises(TypeError, match="ranck"):
        kind(ranck=1)
    with pytest.raises(UserError, match="ranck"):
        parse("finetune", [f"adapter.{'eva.' if kind is EvaSourceOptions else ''}ranck=1"])


def bounded(kind: type[Any]) -> list[Field[Any]]:
    return [f for f in fields(kind) if "bounds" in f.metadata and isinstance(f.default, int | float)]


@pytest.mark.parametrize("kind", [*LOOPS.values(), AdapterOptions, SizeOptions])
def test_every_number_is_finite_and_in_its_range(kind: type[Any]) -> None:
    for f in bounded(kind):
        if isinstance(f.default, bool):
            continue
        for wrong in (float("inf"), float("-inf"), float("nan")):
            with pytest.raises(UserError, match=rf"{f.name}={wrong}: expected a finite number"):
                kind(**{f.name: wrong})
        bounds = f.metadata["bounds"]
        for wrong in [
            bounds["above"],
            *(bounds[k] + s for k, s in (("low", -1), ("high", 1)) if bounds[k] is not None),
        ]:
            if wrong is not None:
                with pytest.raises(UserError, match=f"{f.name}=.*expected"):
                    kind(**{f.name: wrong})


def test_an_error_names_the_key_as_it_is_typed() -> None:
    with pytest.raises(UserError, match=r"^algo\.learning_rate=0"):
        parse("finetune", ["algo.learning_rate=0"])
    with pytest.raises(UserError, match=r"^algo\.bc\.learning_rate=inf: expected a finite number"):
        parse("finetune", ["algo=bc_then_odt", "algo.bc.learning_rate=inf"])
    with pytest.raises(UserError, match=r"^learning_rate=0"):
        BCOptions(learning_rate=0)
    assert issubclass(type(ALGORITHMS["bc"]), AlgoOptions)

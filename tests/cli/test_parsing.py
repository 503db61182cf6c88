"""What users type: every form that is taken, and what is said of the others."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from eva_rl import collect, evaluate  # noqa: F401 - registers the commands
from eva_rl.benchmark import command as benchmark  # noqa: F401 - registers the command
from eva_rl.cli.parsing import parse
from eva_rl.cli.values import quoted, split_list, unquoted
from eva_rl.errors import UserError
from eva_rl.finetune import command  # noqa: F401 - registers the command

TEXT = st.text(st.sampled_from(list("abXä ß'\"\\~=,:;.#/()[]{}$&*?!<>|-_%0")), min_size=1)


def message(name: str, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(name, words)
    assert "hydra" not in str(caught.value).lower()
    assert "append" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lr=0.1"], "Type algo.learning_rate=0.1"),
        (["rank=4"], "Type adapter.rank=4"),
        (["algo.update=3"], "Did you mean algo.updates=3"),
        (["adapter.rnk=3"], "Did you mean adapter.rank=3"),
        (["model.lr=1"], "Type algo.learning_rate=1"),
        (["task=push-v3"], "Type env=push-v3"),
        (["algo.env_steps=5"], "a key of algo=self_imitation or odt_td3 or odt. Type algo=self_imitation as well"),
        (
            ["gamma=0.9"],
            "algo.discount is a key of algo=odt_td3 or residual or ppo. Type algo=odt_td3 algo.discount=0.9.",
        ),
        (["algo=ppo", "total_timesteps=9"], "there is no such key. Type algo.env_steps=9."),
        (["algo.total_timesteps=9"], "Type algo=self_imitation algo.env_steps=9."),
        (["target_modules=[q_proj]"], "Type adapter.targets=[q_proj]."),
        (["out=x"], "Type run_dir=x."),
        (["logger=wandb"], "Type tracker=wandb."),
        (["algo=PPO"], "Did you mean ppo"),
        (["algo=odt", "algo.name=bc"], "algo=odt and algo.name=bc: expected one of them"),
        (["algo.name=od"], "Did you mean odt"),
        (["."], "'.' is not KEY=VALUE. A policy is named by policy=."),
        (["algo=od"], "Did you mean odt"),
        (["algo=nothing_like_it"], "Expected one of bc, self_imitation"),
        (["push-v3"], "'push-v3' is not KEY=VALUE. A task is named by env=push-v3"),
        (["--env"], "'--env' is not KEY=VALUE"),
        (["algo.updates=many"], "algo.updates=many: expected a whole number"),
        (["algo.updates=1.5"], "algo.updates=1.5: expected a whole number"),
        (["env.horizon=long"], "env.horizon=long: expected a whole number or null"),
        (["algo.learning_rate=fast"], "expected a number"),
        (["video=perhaps"], "expected true or false"),
        (["adapter.rank_caps=4"], "expected a table such as {name:value}"),
        (["~env"], "is not KEY=VALUE"),
        (["policy.context_length=-1"], "policy.context_length=-1: expected a number above 0"),
        (["policy.num_heads=0"], "policy.num_heads=0: expected a number above 0"),
        (["policy.return_scale=-5"], "policy.return_scale=-5.0: expected a number above 0"),
    ],
)
def test_mistakes_are_answered_with_what_to_type(words: list[str], expected: str) -> None:
    assert expected in message("finetune", *words)


def test_what_other_commands_and_programs_call_a_policy() -> None:
    for key in ("run_dir", "checkpoint", "model"):
        assert "Type policy=runs/push." in message("evaluate", f"{key}=runs/push")
    assert "algo.name" not in message("finetune", "name=x")


def test_a_task_with_a_colon_is_quoted_in_a_table() -> None:
    """The rest of its name was taken for the adapter's folder, and its module for an unknown task."""
    said = message("evaluate", "policy=mt40", "adapters={mine:Reach-v0:runs/x}")
    assert said.endswith("""quoted: adapters="{'mine:Reach-v0':runs/x}\"""")


def test_the_settings_of_another_command_are_called_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("tracker: [tensorboard]\n")
    said = message("evaluate", f"config={tmp_path}")
    assert "the file sets tracker" in said
    assert "settings of evaluate, not of another command; the policy of a run is policy=RUN" in said


def test_an_algorithm_by_its_long_name_brings_its_keys() -> None:
    """It was written down as the algorithm of a run that cloned."""
    assert (
        parse("finetune", ["env=push-v3", "algo.name=odt"]).algo == parse("finetune", ["env=push-v3", "algo=odt"]).algo
    )


def test_every_way_of_writing_a_key() -> None:
    plain = parse("finetune", ["env=push-v3", "adapter.rank=4", "video=true", "run_dir=x"])
    assert parse("finetune", ["--env", "push-v3", "--adapter.rank=4", "--video", "--run-dir", "x"]) == plain
    assert parse("finetune", ["+env.id=push-v3", "adapter.rank=4.0", "video=yes", "run_dir='x'"]) == plain
    assert parse("finetune", ["algo.learning_rate=1e-4", "algo.updates=1e3"]).algo.updates == 1000
    assert parse("finetune", ["tracker=tensorboard"]).tracker == ["tensorboard"]
    assert parse("finetune", ["env.horizon=null"]).env.horizon is None
    assert parse("finetune", ["seed=7", "data.seed=${seed}"]).data.seed == 7
    caps = {"action_head": 2, "q_proj": 4}
    assert parse("finetune", ["adapter.rank_caps={action_head:2,q_proj:4}"]).adapter.rank_caps == caps
    assert parse("finetune", ["adapter.rank_caps.q_proj=4"]).adapter.rank_caps == {"q_proj": 4}
    assert parse("benchmark", ["seeds=[3,4]", "tasks=[push-v3,reach-v3]"]).seeds == [3, 4]
    assert parse("benchmark", ["finetune.policy.path=a b"]).set == ["policy.path=a b"]


@settings(max_examples=10, deadline=None)
@given(TEXT)
def test_text_of_any_kind_works_in_every_key(text: str) -> None:
    """Paths with spaces, quotes, umlauts, ``~``, ``=``; only quotes around the whole are taken off."""
    text = text.replace("${", "$")  # an interpolation, which the command line does resolve
    config = parse("collect", [f"env={text}", f"out={text}"])
    assert {config.env.id, config.out} == {unquoted(text)}


@given(st.lists(TEXT))
def test_lists_of_any_text(entries: list[str]) -> None:
    assert [unquoted(entry) for entry in split_list("[" + ",".join(map(quoted, entries)) + "]")] == entries


def test_interpolations_in_a_file_stay_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "token")
    (tmp_path / "config.yaml").write_text("policy: {path: '${oc.env:SECRET}'}\ndata: {source: 'a${b}\\${c'}\n")
    config = parse("finetune", [f"config={tmp_path}"])
    assert (config.policy.path, config.data.source) == ("${oc.env:SECRET}", "a${b}\\${c")


def test_a_config_runs_again_in_one_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["env=reach-v3", "algo=odt", "algo.env_steps=77", "algo.learning_rate=1e-5", "adapter.rank_caps={q_proj:2}"]
    before = parse("finetune", [*words, "run_dir=first"])
    file = tmp_path / "config.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(before))))
    again = parse("finetune", [f"config={file}", "run_dir=second"])
    assert asdict(again) == {**asdict(before), "run_dir": "second"}
    assert parse("finetune", [f"config={file}", "seed=5"]).seed == 5
    assert parse("finetune", [f"config={file}"]).run_dir == "", "a new run gets a folder of its own"
    assert not caplog.messages
    cloned = parse("finetune", [f"config={file}", "algo=bc"])
    assert cloned.algo.name == "bc"
    assert caplog.messages == ["config=: the file has algo=odt; its algo.* is left out, since algo=bc is typed."]
    assert cloned.env.id == "reach-v3"
    file.write_text("algo: {warmup: 7, target_scale: 1.0}\n")
    assert parse("finetune", [f"config={file}"]).algo.warmup_steps == 7, "as an earlier version wrote it"
    file.write_text("algo: {updaets: 3}\n")
    assert "algo.updates=3" in message("finetune", f"config={file}")
    file.write_text("a: &a [1]\nb: [*a, *a]\n")
    assert "aliases" in message("finetune", f"config={file}")
    assert "No file" in message("finetune", "config=/nowhere.yaml")


@pytest.fixture
def with_tables(tmp_path: Path) -> Path:
    """The config of a run of a study, with entries whose names have dots and dashes."""
    words = ["env=reach-v3", "adapter.rank_caps={blocks.0.attention.o_proj:1,q-proj:2}", f"study={'0' * 64}"]
    config = asdict(parse("finetune", words))
    file = tmp_path / "config.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    return file


def test_a_config_begins_from_the_tables_of_another(with_tables: Path) -> None:
    """An entry whose name has a dot was a key that does not exist."""
    caps = {"blocks.0.attention.o_proj": 1, "q-proj": 2}
    assert parse("finetune", [f"config={with_tables}"]).adapter.rank_caps == caps
    assert parse("finetune", [f"config={with_tables}", "adapter.rank_caps.x.y=4"]).adapter.rank_caps == {
        **caps,
        "x.y": 4,
    }
    flat = with_tables.with_name("flat.yaml")
    flat.write_text("adapter.rank_caps.a.b: 1\nadapter.rank_caps.c: 2\n")
    assert parse("finetune", [f"config={flat}"]).adapter.rank_caps == {"a.b": 1, "c": 2}


@pytest.mark.parametrize(("typed", "expected"), [("{}", {}), ("{v_proj:3}", {"v_proj": 3})])
def test_a_whole_table_replaces_the_one_of_a_config(with_tables: Path, typed: str, expected: dict[str, int]) -> None:
    """Its entries were added to those that were there."""
    words = [f"config={with_tables}", f"adapter.rank_caps={typed}"]
    assert parse("finetune", words).adapter.rank_caps == expected
    assert parse("finetune", [*words, "adapter.rank_caps.k_proj=5"]).adapter.rank_caps == {**expected, "k_proj": 5}


def test_another_run_is_not_part_of_the_study(with_tables: Path) -> None:
    assert parse("finetune", [f"config={with_tables}"]).study == ""


def test_the_name_of_an_entry_keeps_its_dashes() -> None:
    assert parse("evaluate", ["--adapters.push-v3", "x"]).adapters == {"metaworld/push-v3": "x"}
    caps = parse("finetune", ["--adapter.rank-caps.a-b.c-d=2", "--run-dir=my-run"])
    assert (caps.adapter.rank_caps, caps.run_dir) == ({"a-b.c-d": 2}, "my-run")

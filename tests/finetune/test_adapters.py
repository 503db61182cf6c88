"""Adapters through the commands: on and off, one a task, exported, pulled from the hub's cache."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DecisionTransformerModel

from eva_rl import evaluate, export
from eva_rl.adapters import load_policy
from eva_rl.agents.policy_folder import save_policy
from eva_rl.cli.profiling import peak_memory
from eva_rl.finetune import command as finetune
from tests import forks
from tests.conftest import make_policy

SMALL = ["env=reach-v3", "data.episodes=2", "data.workers=1", "algo.updates=6", "algo.batch_size=8", "threads=1"]
SMALL += ["eval.episodes=2", "env.horizon=40", "data.only_successes=false", "algo.learning_rate=0.03", "tracker=[]"]
PLAY = ["eval.episodes=2", "env.horizon=30", "threads=1"]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def run(base: Path, run_dir: Path, *more: str) -> Path:
    assert finetune.main([f"policy={base}", f"run_dir={run_dir}", *SMALL, *more]) == 0
    return run_dir


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, and two runs from it."""
    folder = tmp_path_factory.mktemp("adapters")
    save_policy(folder / "base", make_policy())
    run(folder / "base", folder / "reach", "adapter=pissa")
    run(folder / "base", folder / "push", "adapter=dora", "env=push-v3", "adapter.rank_caps={q_proj:2}")
    return folder


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    error = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in error
    for word in words:
        assert word in error


def returns(task: dict[str, Any]) -> list[float]:
    return [episode["episode_return"] for episode in task["episodes"]]


@pytest.mark.slow
def test_on_off_and_both(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On two tasks: both ways in one record, equal to each of them alone and to the base."""
    tasks, found = ["metaworld/reach-v3", "metaworld/push-v3"], {}
    for adapter in ("on", "off", "both"):
        out = tmp_path / f"{adapter}.json"
        asked = [f"policy={folder}/reach", "env=reach-v3+push-v3", f"adapter={adapter}", f"out={out}", *PLAY]
        assert evaluate.main(asked) == 0
        found[adapter] = read(out)
    shown = " ".join(capsys.readouterr().err.split())
    for column in ("success on", "return on", "off", "change"):
        assert column in shown
    for task in tasks:
        both = found["both"]["tasks"][task]
        assert returns(both) == returns(found["on"]["tasks"][task])
        assert returns(both["without_adapter"]) == returns(found["off"]["tasks"][task])
        assert returns(both) != returns(both["without_adapter"])
        lost = both["metrics"]["eval/mean_reward"] - both["without_adapter"]["metrics"]["eval/mean_reward"]
        assert both["difference"]["mean_reward"] == pytest.approx(lost)
    off = found["off"]["tasks"]["metaworld/push-v3"]
    base = tmp_path / "base.json"
    assert evaluate.main([f"policy={folder}/base", "env=push-v3", f"out={base}", *PLAY]) == 0
    assert returns(read(base)["tasks"]["metaworld/push-v3"]) == pytest.approx(returns(off), rel=1e-4)


def test_one_adapter_a_task(folder: Path, tmp_path: Path) -> None:
    """Each task is played as its own run would play it, a third one as the base does."""
    out = tmp_path / "all.json"
    adapters = f"adapters={{push-v3:{folder}/push,metaworld/reach-v3:{folder}/reach/policy/adapter}}"
    asked = [f"policy={folder}/base", adapters, "env=push-v3+reach-v3+drawer-open-v3", f"out={out}", *PLAY]
    assert evaluate.main(asked) == 0
    alone = {"push-v3": "push", "reach-v3": "reach", "drawer-open-v3": "base"}
    for task, name in alone.items():
        single = tmp_path / f"{name}.json"
        assert evaluate.main([f"policy={folder}/{name}", f"env={task}", f"out={single}", *PLAY]) == 0
        expected = read(single)["tasks"][f"metaworld/{task}"]
        assert returns(read(out)["tasks"][f"metaworld/{task}"]) == pytest.approx(returns(expected), rel=1e-4), task
    default = tmp_path / "default.json"
    assert evaluate.main([f"policy={folder}/base", adapters, f"out={default}", *PLAY]) == 0
    assert set(read(default)["tasks"]) == {"metaworld/push-v3", "metaworld/reach-v3"}


def test_episodes_of_another_length_than_the_run_s_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The target return is that of the run's episodes."""
    asked = ["eval.episodes=1", "threads=1", f"policy={folder}/push"]
    assert evaluate.main(asked) == 0
    note = "played other episodes (Meta-World v3, goal visible, 40 env steps"
    assert note in " ".join(capsys.readouterr().err.split())
    assert evaluate.main([*asked, "env.horizon=40"]) == 0
    assert "other episodes" not in capsys.readouterr().err


def test_the_bar_counts_what_the_policy_does_for_eva(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stood at 0 of 16 while the policy acted."""
    acts = ["adapter=eva", "adapter.eva.source=rollouts", "adapter.eva.rollout_steps=7", "adapter.eva.rollout_envs=2"]
    run(folder / "base", tmp_path / "run", *acts)
    assert "EVA (batches): 7 of 7" in capsys.readouterr().err


def test_nothing_to_turn_off(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([f"policy={folder}/base", "adapter=both", *PLAY]) == 2
    refused(capsys, "no adapter to turn off, and was not fine-tuned. Leave adapter= out")
    assert evaluate.main([f"policy={folder}/base", "adapter=of", *PLAY]) == 2
    refused(capsys, "Unknown adapter 'of'", "'off'")
    assert evaluate.main([f"policy={folder}/base", f"adapters={{puhs-v3:{folder}/push}}", *PLAY]) == 2
    refused(capsys, "'puhs-v3'", "push-v3")


def test_compiling_without_a_compiler_is_refused(
    policy_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eva_rl.training.compiling.shutil.which", lambda name: None)
    assert evaluate.main([f"policy={policy_folder}", "compile=default", *PLAY]) == 2
    refused(capsys, "compile=default: torch.compile needs a C++ compiler", "use compile=none")


def test_the_summary_counts_what_it_costs(folder: Path) -> None:
    summary = read(folder / "push/summary.json")
    file = folder / "push/policy/adapter/adapter_model.safetensors"
    assert summary["adapter_bytes"] == file.stat().st_size
    network = load_policy(folder / "push", is_trainable=True).network
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert summary["trainable_parameters"] == trained
    assert summary["adapter_bytes"] > 4 * trained, "float32, and a header"
    assert summary["peak_memory_bytes"] >= 0
    assert summary["seconds_per_update"] > 0


def test_memory_at_its_peak_is_seen_though_it_is_freed() -> None:
    with peak_memory(torch.device("cpu")) as found:
        torch.ones(50_000_000)  # 200 MB
    assert found["peak_memory_bytes"] > 180e6, "less what earlier tests left to be freed"
    with peak_memory(torch.device("cpu")) as found:
        torch.ones(2_500_000)
    assert found["peak_memory_bytes"] < 60e6, "the peak before does not count"


def test_the_card_says_what_it_is(folder: Path) -> None:
    card = (folder / "push/policy/README.md").read_text()
    for word in (f"base | `{folder}/base`", "metaworld/push-v3", "adapter=dora", "2 episodes", "Meta-World v3"):
        assert word in card
    assert (folder / "push/policy/adapter/README.md").read_text() == card


def test_merged_and_huggingface_folders_act_the_same(folder: Path, tmp_path: Path) -> None:
    policy = load_policy(folder / "reach")
    batch = windows()
    expected = policy.network(batch)
    for to in ("adapter", "merged", "huggingface"):
        assert export.main([f"policy={folder}/reach", f"to={to}", f"out={tmp_path}/{to}"]) == 0
        loaded = load_policy(tmp_path / to)
        torch.testing.assert_close(loaded.network(batch), expected, atol=1e-5, rtol=0)
        assert loaded.conditioning.of("metaworld/reach-v3") == policy.conditioning.of("metaworld/reach-v3")
        card = (tmp_path / to / "README.md").read_text()
        for word in ("metaworld/reach-v3", "adapter=pissa", "Meta-World v3", "| mean_reward |"):
            assert word in card
        assert loaded.adapters.names == (("default",) if to == "adapter" else ())
    theirs = DecisionTransformerModel.from_pretrained(tmp_path / "huggingface")
    B, T = batch.timesteps.shape
    actions = theirs(
        states=batch.observations,
        actions=batch.actions,
        rewards=torch.zeros(B, T, 1),
        returns_to_go=batch.returns_to_go,
        timesteps=batch.timesteps,
        attention_mask=torch.ones(B, T),
    ).action_preds
    torch.testing.assert_close(actions, expected, atol=1e-5, rtol=0)


def windows() -> Any:
    from eva_rl.batch import WindowBatch

    g = torch.Generator().manual_seed(0)
    return WindowBatch(
        observations=torch.randn(4, 6, 39, generator=g),
        actions=torch.rand(4, 6, 4, generator=g) * 2 - 1,
        returns_to_go=torch.rand(4, 6, 1, generator=g),
        timesteps=torch.arange(6).repeat(4, 1),
        attention_mask=None,
    )


def test_wrong_exports(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for asked, words in (
        ([f"out={folder}/base"], ["exists and is not overwritten"]),
        ([], ["No output given", "out=", "push="]),
        (["push=only-a-name"], ["expected USER/NAME"]),
        ([f"out={tmp_path}/x", "to=onxx"], ["'onxx'", "'onnx'"]),
        ([f"out={tmp_path}/x", "policy=nowhere"], ["'nowhere'"]),
    ):
        assert export.main([f"policy={folder}/reach", *asked]) == 2
        refused(capsys, *words)
    assert not list(tmp_path.iterdir())


def test_pushing_without_a_network(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder is written all the same."""
    asked = [f"policy={folder}/reach", "to=merged", f"out={tmp_path}/out", "push=somebody/reach"]
    assert export.main(asked) == 2
    refused(capsys, "push=somebody/reach", "Without a network or a login", "out=")
    assert (tmp_path / "out/model.safetensors").is_file()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as receives a commit: its files land in ``folder``."""

    folder: Path

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            entries = [json.loads(line) for line in body.splitlines()]
            for value in (entry["value"] for entry in entries if entry["key"] == "file"):
                (self.folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            self.answer({"commitUrl": f"{self.address}/commit/0123abc", "commitOid": "0123abc"})
        else:
            self.answer({"url": self.address, "errors": [], "warnings": []})

    def do_GET(self) -> None:
        self.answer({})

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/somebody/reach"

    def answer(self, value: Any) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.slow
def test_what_is_pushed_is_the_whole_policy(folder: Path, tmp_path: Path) -> None:
    receiver = type("Receiver", (Hub,), {"folder": tmp_path / "hub"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_none"}
    command = [sys.executable, "-m", "eva_rl.export", f"policy={folder}/reach", "to=adapter", "push=somebody/reach"]
    pushed = subprocess.run(command, env=os.environ | hub, capture_output=True, text=True, timeout=300, check=False)
    server.shutdown()
    assert pushed.returncode == 0, pushed.stderr
    assert "somebody/reach" in pushed.stderr
    batch = windows()
    assert torch.equal(load_policy(tmp_path / "hub").network(batch), load_policy(folder / "reach").network(batch))
    assert "adapter=pissa" in (tmp_path / "hub/README.md").read_text()


def test_a_policy_with_its_adapter_pulled_from_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the hub's cache, as a download leaves it."""
    repository = tmp_path / "models--somebody--reach"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0123abc")
    shutil.copytree(folder / "reach/policy", repository / "snapshots/0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    policy = load_policy("somebody/reach")
    assert policy.adapters.names == ("default",)
    batch = windows()
    assert torch.equal(policy.network(batch), load_policy(folder / "reach").network(batch))


@pytest.mark.parametrize("more", [["adapter=mica"], ["adapter=dora", "adapter.gain=lora"]])
def test_a_lookup_table_alone(more: list[str], folder: Path, tmp_path: Path) -> None:
    """It has no inputs of which a second moment could be measured."""
    run(folder / "base", tmp_path / "run", "adapter.targets=[embed_timestep]", *more)
    names = [name for name, _ in load_policy(tmp_path / "run").network.named_parameters() if ".lora_" in name]
    assert names
    assert all(name.startswith("embed_timestep.") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["trajectories", "rollouts", "mixed"])
@pytest.mark.parametrize("method", ["eva", "corda", "lora_ga"])
def test_every_source_for_every_method_that_needs_data(
    method: str, source: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [f"adapter={method}", f"adapter.eva.source={source}", "adapter.eva.rollout_steps=20", "algo.updates=4"]
    more += ["adapter.targets=[q_proj,down_proj,action_head,embed_state]", "adapter.rank_caps={action_head:2}"]
    asked = [f"policy={folder}/base", f"run_dir={tmp_path}/run", *SMALL, *more]
    if method == "lora_ga" and source != "trajectories":
        assert finetune.main(asked) == 2
        refused(capsys, "gradient of the loss", "adapter.eva.source=trajectories")
        return
    assert finetune.main(asked) == 0
    assert read(tmp_path / "run/summary.json")["method"] == method


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora_ga", "mica", "adalora"])
def test_killed_and_continued_equals_uninterrupted(method: str, folder: Path, tmp_path: Path) -> None:
    """The process dies while it trains; the same command goes on, with the start that it began with."""
    asked = [f"policy={folder}/base", *SMALL, f"adapter={method}", "checkpoint.every=2"]
    assert finetune.main([*asked, f"run_dir={tmp_path}/whole"]) == 0
    killed = partial(finetune.main, [*asked, f"run_dir={tmp_path}/killed"])
    assert forks.killed_at_checkpoint(killed, 4, tmp_path / "log")
    assert finetune.main([*asked, f"run_dir={tmp_path}/killed"]) == 0
    for name in ("model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        found, expected = (tmp_path / run / "policy" / name for run in ("killed", "whole"))
        assert found.read_bytes() == expected.read_bytes(), name

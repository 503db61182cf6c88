"""Act with an exported policy, on numpy and onnxruntime alone: python examples/act_with_onnx.py push.onnx."""

import json
import sys

import numpy as np
import onnxruntime


class Actor:  # acts in one environment: start() before each episode, act() at each env step
    def __init__(self, path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_inputs()]
        self.about = json.loads(self.session.get_modelmeta().custom_metadata_map["eva_rl"])

    def start(self):
        about, self.steps, self.seen = self.about, [], 0
        self.to_go = about["per_env"].get(about["env_id"], about["target_return"])  # of its task, else of any
        self.action = np.zeros_like(about["action_low"])

    def act(self, observation, reward=0.0):  # the reward that the env step before gave
        self.to_go -= reward
        self.steps.append((observation, self.action, [reward], [self.to_go], len(self.steps)))
        T, new, self.seen = self.about["context_length"], 1, self.seen + 1
        if not 1 < self.seen <= T:  # a full window: of the first step, or of the newer half of the context
            new = self.seen = min(max(1, T // 2), len(self.steps))
            self.memory = [np.zeros(self.about["empty_memory"], np.float32)] * 2
        columns = [np.array([column], np.float32) for column in zip(*self.steps[-new:], strict=True)]
        inputs = [*columns[:4], columns[4].astype(np.int64), *self.memory]
        (self.action,), *self.memory = self.session.run(None, dict(zip(self.names, inputs, strict=True)))
        return self.action


path = sys.argv[1] if sys.argv[1:] else sys.exit(__doc__)
policy, generator = Actor(path), np.random.default_rng(0)
policy.start()
for step in range(30):
    print(step, policy.act(generator.normal(policy.about["observation_mean"], policy.about["observation_std"])))

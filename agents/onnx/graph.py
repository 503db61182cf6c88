"""A Decision Transformer as an ONNX graph, node by node.

One graph serves both ways of acting. It takes M new env steps and the keys and values of the tokens before them, and
returns the action of the last one with the longer memory: with an empty memory the M steps are a full window, with the
memory of the call before, M = 1 adds one step to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from eva_rl.agents.decision_transformer import ACTION, RETURN, REWARD, STATE, DecisionTransformerConfig
from eva_rl.batch import InputScaling

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET, IR_VERSION = 20, 9
"""Opset 20 (2023) is the first with Gelu."""
INPUTS = ("observations", "previous_actions", "previous_rewards", "returns_to_go", "timesteps", "keys", "values")
OUTPUTS = ("action", "next_keys", "next_values")
HIDDEN = -1e9
"""Added to the attention score of a token that is not to be seen."""


class GraphBuilder:
    """Collects nodes and constants; every method returns the name of its result."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, NDArray[Any]] = {}

    def op(self, kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        """Add a node with one output."""
        from onnx import helper

        name = out or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value: Any, name: str = "") -> str:
        """Add a constant; integers become int64, everything else float32."""
        array = np.asarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else value)
        kind = np.int64 if array.dtype.kind in "iu" else np.float32
        name = name or f"constant_{len(self.constants)}"
        self.constants[name] = np.ascontiguousarray(array.astype(kind)).reshape(array.shape)
        return name

    def linear(self, x: str, weights: Mapping[str, Tensor], layer: str) -> str:
        """``torch.nn.Linear``."""
        weight = self.constant(weights[f"{layer}.weight"].T, f"{layer}.weight")
        return self.op("Add", self.op("MatMul", x, weight), self.constant(weights[f"{layer}.bias"], f"{layer}.bias"))

    def norm(self, x: str, weights: Mapping[str, Tensor], layer: str) -> str:
        """``torch.nn.LayerNorm`` over the last dimension."""
        scale = self.constant(weights[f"{layer}.weight"], f"{layer}.weight")
        shift = self.constant(weights[f"{layer}.bias"], f"{layer}.bias")
        return self.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=1e-5)

    def size(self, x: str, axis: int) -> str:
        """Length of one dimension, (1,)."""
        return self.op("Shape", x, start=axis, end=axis + 1)

    def cut(self, x: str, start: str, axis: int) -> str:
        """From an index (1,) to the end of a dimension."""
        return self.op("Slice", x, start, self.constant([2**62]), self.constant([axis]))


def build_graph(
    config: DecisionTransformerConfig,
    weights: Mapping[str, Tensor],
    scaling: InputScaling,
    metadata: Mapping[str, str],
) -> ModelProto:
    """The graph of a policy, raw numbers in and raw actions out.

    Args:
        config: The architecture.
        weights: Of the network, an adapter merged.
        scaling: The normaliser, the scale of returns and the action bounds.
        metadata: Stored in the file.
    """
    from onnx import helper, numpy_helper

    g = GraphBuilder()
    tokens = _tokens(g, config, weights, scaling)  # (B, N, D)
    hidden = _blocks(g, config, weights, tokens)  # (B, 1, D)
    _action(g, config, weights, scaling, hidden)
    graph = helper.make_graph(
        g.nodes,
        "decision_transformer",
        _infos(config, INPUTS),
        _infos(config, OUTPUTS),
        [numpy_helper.from_array(value, name) for name, value in g.constants.items()],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="eva-rl")
    helper.set_model_props(model, dict(metadata))
    return model


def _infos(config: DecisionTransformerConfig, names: Sequence[str]) -> list[Any]:
    from onnx import TensorProto, helper

    H, d = config.num_heads, config.hidden_size // config.num_heads
    memory: list[int | str] = [config.num_layers, "batch", H, "tokens", d]
    longer: list[int | str] = [*memory[:3], "tokens_and_new", d]
    shapes: dict[str, list[int | str]] = {
        "observations": ["batch", "steps", config.observation_dim],
        "previous_actions": ["batch", "steps", config.action_dim],
        "previous_rewards": ["batch", "steps", 1],
        "returns_to_go": ["batch", "steps", 1],
        "timesteps": ["batch", "steps"],
        "keys": memory,
        "values": memory,
        "action": ["batch", config.action_dim],
        "next_keys": longer,
        "next_values": longer,
    }
    kinds = {"timesteps": TensorProto.INT64}
    return [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), shapes[n]) for n in names]


def _tokens(
    g: GraphBuilder, config: DecisionTransformerConfig, weights: Mapping[str, Tensor], scaling: InputScaling
) -> str:
    """Embedded tokens of the new steps: what follows an action token of the step before, then this step's own."""
    steps = _step_tokens(g, config, weights, scaling)
    per_step, rest = config.tokens_per_step, config.tokens_per_step - config.tokens_before_action
    stacked = g.op("Concat", *steps, axis=2)  # (B, M, tokens * D)
    shape = g.op("Concat", g.size(stacked, 0), g.constant([-1, config.hidden_size]), axis=0)
    assert len(steps) == per_step
    tokens = g.op("Reshape", stacked, shape)  # (B, M * tokens, D)
    empty = g.op("Equal", g.size("keys", 3), g.constant([0]))
    start = g.op("Where", empty, g.constant([rest]), g.constant([0]))  # nothing precedes the first step of a window
    return g.norm(g.cut(tokens, start, 1), weights, "embed_norm")


def _step_tokens(
    g: GraphBuilder, config: DecisionTransformerConfig, weights: Mapping[str, Tensor], scaling: InputScaling
) -> list[str]:
    """(B, M, D) for each token of a chunk that begins after the read-out token of the step before."""
    mean, std = g.constant(scaling.observation_mean, "mean"), g.constant(scaling.observation_std, "std")
    center = g.constant(scaling.action_center, "action_center")
    divisor, scale = g.constant(scaling.action_divisor, "action_divisor"), g.constant(scaling.return_scale, "scale")
    inputs = {
        STATE: ("embed_state", g.op("Div", g.op("Sub", "observations", mean), std)),
        ACTION: ("embed_action", g.op("Div", g.op("Sub", "previous_actions", center), divisor)),
        RETURN: ("embed_return", g.op("Div", "returns_to_go", scale)),
        REWARD: ("embed_reward", g.op("Div", "previous_rewards", scale)),
    }
    table = g.constant(weights["embed_timestep.weight"], "embed_timestep.weight")
    first, last = g.constant(0), g.constant(config.max_timestep - 1)
    now = _row(g, table, "timesteps", first, last)
    before = _row(g, table, g.op("Sub", "timesteps", g.constant(1)), first, last)
    split = config.tokens_before_action
    order = [(kind, before) for kind in config.token_order[split:]] + [(k, now) for k in config.token_order[:split]]
    return [g.op("Add", g.linear(inputs[kind][1], weights, inputs[kind][0]), time) for kind, time in order]


def _row(g: GraphBuilder, table: str, index: str, first: str, last: str) -> str:
    return g.op("Gather", table, g.op("Min", g.op("Max", index, first), last), axis=0)


def _blocks(g: GraphBuilder, config: DecisionTransformerConfig, weights: Mapping[str, Tensor], tokens: str) -> str:
    """Hidden state (B, 1, D) of the last token; in the last block only it passes through queries and MLP."""
    mask = _mask(g, tokens)
    x, keys, values = tokens, [], []
    for index in range(config.num_layers):
        layer, last = f"blocks.{index}", index == config.num_layers - 1
        normed = g.norm(x, weights, f"{layer}.attention_norm")
        k, v = (_remembered(g, config, weights, normed, layer, index, which) for which in ("key", "value"))
        keys.append(k)
        values.append(v)
        if last:
            normed, x = (g.cut(t, g.constant([-1]), 1) for t in (normed, x))
        q = _heads(g, config, g.linear(normed, weights, f"{layer}.attention.q_proj"))
        attended = _attend(g, config, q, k, v, "" if last else mask)
        x = g.op("Add", x, g.linear(attended, weights, f"{layer}.attention.o_proj"))
        inner = g.linear(g.norm(x, weights, f"{layer}.mlp_norm"), weights, f"{layer}.mlp.up_proj")
        x = g.op("Add", x, g.linear(_activation(g, config, inner), weights, f"{layer}.mlp.down_proj"))
    for name, parts in (("next_keys", keys), ("next_values", values)):
        g.op("Concat", *(g.op("Unsqueeze", part, g.constant([0])) for part in parts), out=name, axis=0)
    return g.norm(x, weights, "final_norm")


def _remembered(
    g: GraphBuilder,
    config: DecisionTransformerConfig,
    weights: Mapping[str, Tensor],
    normed: str,
    layer: str,
    index: int,
    which: str,
) -> str:
    """Keys or values (B, H, S + N, d) of one layer: those in the memory, and the new ones."""
    new = _heads(g, config, g.linear(normed, weights, f"{layer}.attention.{which[0]}_proj"))
    old = g.op("Gather", f"{which}s", g.constant(index), axis=0)
    return g.op("Concat", old, new, axis=2)


def _heads(g: GraphBuilder, config: DecisionTransformerConfig, x: str) -> str:
    """(B, N, D) to (B, H, N, d)."""
    H = config.num_heads
    split = g.op("Reshape", x, g.constant([0, 0, H, config.hidden_size // H]))
    return g.op("Transpose", split, perm=[0, 2, 1, 3])


def _attend(g: GraphBuilder, config: DecisionTransformerConfig, q: str, k: str, v: str, mask: str) -> str:
    """Softmax attention, heads joined: (B, queries, D)."""
    scale = g.constant(float((config.hidden_size // config.num_heads) ** -0.5))
    scores = g.op("MatMul", g.op("Mul", q, scale), g.op("Transpose", k, perm=[0, 1, 3, 2]))
    if mask:
        scores = g.op("Add", scores, mask)
    heads = g.op("MatMul", g.op("Softmax", scores, axis=-1), v)
    return g.op("Reshape", g.op("Transpose", heads, perm=[0, 2, 1, 3]), g.constant([0, 0, config.hidden_size]))


def _mask(g: GraphBuilder, tokens: str) -> str:
    """(N, S + N), added to scores: a new token sees the memory, itself and the new ones before it."""
    old, new = (g.op("Squeeze", g.size(name, axis), g.constant([0])) for name, axis in (("keys", 3), (tokens, 1)))
    total, zero, one = g.op("Add", old, new), g.constant(0), g.constant(1)
    queries = g.op("Unsqueeze", g.op("Range", old, total, one), g.constant([1]))
    later = g.op("Greater", g.op("Range", zero, total, one), queries)
    return g.op("Where", later, g.constant(HIDDEN), g.constant(0.0))


def _activation(g: GraphBuilder, config: DecisionTransformerConfig, x: str) -> str:
    if config.activation == "relu":
        return g.op("Relu", x)
    return g.op("Gelu", x, approximate="tanh" if config.activation == "gelu_new" else "none")


def _action(
    g: GraphBuilder,
    config: DecisionTransformerConfig,
    weights: Mapping[str, Tensor],
    scaling: InputScaling,
    hidden: str,
) -> None:
    """(B, act) within the bounds."""
    raw = g.linear(g.op("Squeeze", hidden, g.constant([1])), weights, "action_head")
    bounded = g.op("Tanh", raw) if config.action_tanh else raw
    scaled = g.op("Clip", bounded, g.constant(-1.0), g.constant(1.0))
    half = g.constant(scaling.action_half_range, "action_half_range")
    g.op("Add", g.op("Mul", scaled, half), "action_center", out="action")

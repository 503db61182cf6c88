"""Which rows count: by layer, in encoder-decoders, time first, flattened, routed; refusals where it cannot be known."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    T5Config,
    T5ForConditionalGeneration,
)

from eva_rl import eva
from eva_rl.errors import UserError
from tests.eva.reference import assert_matches, exact

ALL = {"tau": 1.0, "rank": 3}


def ragged(samples: int, steps: int, longest: int = 99) -> Tensor:
    """A (B, T) mask of padding at the end, no two samples equally long while there are enough lengths."""
    g = torch.Generator().manual_seed(longest)
    lengths = torch.randperm(samples, generator=g) % min(steps, longest) + 1
    return (torch.arange(steps) < lengths[:, None]).long()


def recorded(model: nn.Module, name: str, run: Any) -> list[Tensor]:
    rows: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: rows.append(args[0].detach()))
    with torch.no_grad():
        run()
    handle.remove()
    return rows


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def bart() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, max_position_embeddings=32, **sizes
    )
    return BartModel(config).eval()


def pairs(named: bool = True) -> dict[str, Tensor]:
    """Texts and answers padded to one length."""
    ids, answers = torch.randint(1, 40, (8, 9)), torch.randint(1, 40, (8, 9))
    batch = {"input_ids": ids, "attention_mask": ragged(8, 9), "decoder_input_ids": answers}
    return batch | ({"decoder_attention_mask": ragged(8, 9, longest=5)} if named else {})


T5_LAYERS = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"]
T5_CROSS = ["decoder.block.0.layer.1.EncDecAttention.q", "decoder.block.0.layer.1.EncDecAttention.k"]
BART_LAYERS = ["encoder.layers.0.self_attn.q_proj", "decoder.layers.0.fc1"]
BART_CROSS = ["decoder.layers.0.encoder_attn.q_proj", "decoder.layers.0.encoder_attn.v_proj"]


@pytest.mark.parametrize(
    ("make", "layers"), [(t5, T5_LAYERS + T5_CROSS), (bart, BART_LAYERS + BART_CROSS)], ids=["t5", "bart"]
)
def test_an_encoder_decoder_has_two_masks(make: Any, layers: list[str]) -> None:
    model, batch = make(), pairs()
    result = eva.compute(model, [batch], targets=layers, **ALL)
    encoder, decoder = (int(batch[name].sum()) for name in ("attention_mask", "decoder_attention_mask"))
    assert [result.layers[name].rows for name in layers] == [encoder, decoder, decoder, encoder]
    masks = ["attention_mask", "decoder_attention_mask", "decoder_attention_mask", "attention_mask"]
    for name, mask in zip(layers, masks, strict=True):  # the last are cross-attention's keys or values
        rows = recorded(model, name, lambda: model(**batch))[0][batch[mask].bool()]
        assert_matches(result.layers[name], exact(rows, False))


def test_a_decoder_without_a_mask_counts_all_steps_but_ignored_labels() -> None:
    model, batch = t5(), pairs(named=False)
    assert eva.compute(model, [batch], targets=T5_LAYERS, **ALL).layers[T5_LAYERS[1]].rows == 72
    labels = torch.where(ragged(8, 9, longest=5) > 0, batch.pop("decoder_input_ids"), -100)
    result = eva.compute(model, [batch | {"labels": labels}], targets=T5_LAYERS, **ALL)
    assert result.layers[T5_LAYERS[1]].rows == int((labels != -100).sum())
    assert result.layers[T5_LAYERS[0]].rows == int(batch["attention_mask"].sum())


def test_masks_by_layer_or_by_the_module_around_it() -> None:
    model, batch = t5(), pairs()
    encoder, decoder = batch.pop("attention_mask"), batch.pop("decoder_attention_mask")
    by_name = {"encoder": encoder, "decoder": decoder, T5_CROSS[1]: encoder}
    forms = [lambda b: by_name, lambda b, layer: decoder if "decoder" in layer and not layer.endswith("k") else encoder]
    for mask in forms:
        result = eva.compute(model, [batch], targets=T5_LAYERS + T5_CROSS, mask=mask, **ALL)
        counts = [int(m.sum()) for m in (encoder, decoder, decoder, encoder)]
        assert [result.layers[name].rows for name in T5_LAYERS + T5_CROSS] == counts
    assert eva.compute(model, [batch], targets=T5_LAYERS, mask=lambda b: {"": None}, **ALL).rows == 72
    with pytest.raises(UserError, match=r"no mask for layer 'decoder.*only for 'encoder'.*None counts every row"):
        eva.compute(model, [batch], targets=T5_LAYERS, mask=lambda b: {"encoder": encoder}, **ALL)


def test_layers_with_masks_of_their_own_share_no_sums() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    x, mask = torch.randn(6, 4, 5), ragged(6, 4)
    result = eva.compute(Two(), [x, x], mask=lambda batch: {"a": mask, "b": 1 - mask}, **ALL)
    assert [layer.rows for layer in result.layers.values()] == [2 * int(mask.sum()), 2 * int((1 - mask).sum())]


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1))


@pytest.mark.parametrize("steps", [4, 6])
def test_time_first_takes_the_transpose_or_is_refused(steps: int) -> None:
    batch = {"x": torch.randn(6, steps, 5), "attention_mask": ragged(6, steps)}
    truth = exact(batch["x"][batch["attention_mask"].bool()], False)
    if steps == 6:  # as many steps as samples: the shape fits both ways
        with pytest.raises(UserError, match=r"'inner'.*more than one way.*mask=lambda batch, layer: m, or m\.T"):
            eva.compute(TimeFirst(), [batch], **ALL)
        own = lambda b, layer: b["attention_mask"].T  # noqa: E731
        assert_matches(eva.compute(TimeFirst(), [batch], mask=own, **ALL).layers["inner"], truth)
        other = {"x": torch.randn(3, 6, 5), "attention_mask": torch.ones(3, 6).triu()}
        both = eva.compute(TimeFirst(), [other, batch], **ALL).layers["inner"]  # the first batch shows how it is
        rows = torch.cat([b["x"][b["attention_mask"].bool()] for b in (other, batch)])
        assert_matches(both, exact(rows, False))
    else:
        assert_matches(eva.compute(TimeFirst(), [batch], **ALL).layers["inner"], truth)


@pytest.mark.parametrize("first", [True, False])
def test_torchs_own_encoder_says_what_comes_first(first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=first)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    x, mask = torch.randn(6, 6, 8), ragged(6, 6)
    given = x if first else x.transpose(0, 1)
    run = lambda model, batch: model(batch, src_key_padding_mask=mask == 0)  # noqa: E731
    result = eva.compute(model, [given], targets=["linear1"], forward=run, mask=lambda batch: mask, **ALL)
    seen = recorded(model, "layers.0.linear1", lambda: run(model, given))[0]
    rows = seen[mask.bool()] if first else seen.transpose(0, 1)[mask.bool()]
    assert_matches(result.layers["layers.0.linear1"], exact(rows, False))


def test_hugging_face_takes_the_batch_first() -> None:
    model = GPT2Model(GPT2Config(vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=2)).eval()
    batch = {"input_ids": torch.randint(0, 30, (6, 6)), "attention_mask": ragged(6, 6)}
    result = eva.compute(model, [batch], targets=["c_fc"], **ALL)
    rows = recorded(model, "h.0.mlp.c_fc", lambda: model(**batch))[0][batch["attention_mask"].bool()]
    assert_matches(result.layers["h.0.mlp.c_fc"], exact(rows, False))


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Mixture(nn.Module):
    """The first expert gets `share` rows, the second the rest, both in an order of their own."""

    def __init__(self, share: int, scale: float = 1.0) -> None:
        super().__init__()
        self.norm, self.gate, self.experts = nn.LayerNorm(6), nn.Linear(6, 2), nn.ModuleList([Expert(), Expert()])
        self.share, self.scale = share, scale
        self.chosen: list[Tensor] = []

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        flat = self.norm(x).view(-1, 6)
        order = self.gate(flat)[:, 0].argsort()
        self.chosen = [order[: self.share], order[self.share :]]
        out = torch.zeros_like(flat)
        for expert, rows in zip(self.experts, self.chosen, strict=True):
            out[rows] = expert(flat[rows] * self.scale)
        return out.view(x.shape)


ROUTED = ["gate", "experts.0.up", "experts.0.down", "experts.1.up"]


@pytest.mark.parametrize("share", [8, 11, 39])  # as many rows as there are samples, some, all but one
def test_routed_rows_keep_the_mask_of_the_step_they_come_from(share: int) -> None:
    torch.manual_seed(0)
    model, batch = Mixture(share), {"x": torch.randn(8, 5, 6), "attention_mask": ragged(8, 5)}
    result = eva.compute(model, [batch], targets=ROUTED, **ALL)
    keep = batch["attention_mask"].bool().reshape(-1)
    flat = model.norm(batch["x"]).view(-1, 6).detach()
    for name, rows in zip(ROUTED, (torch.arange(40), model.chosen[0], model.chosen[0], model.chosen[1]), strict=True):
        assert result.layers[name].rows == int(keep[rows].sum()), name
        if not name.endswith("down") and result.layers[name].rows:
            assert_matches(result.layers[name], exact(flat[rows][keep[rows]], False))


@pytest.mark.parametrize("share", [8, 40])
def test_routed_rows_that_were_changed_on_the_way_need_a_mask_of_their_own(share: int) -> None:
    torch.manual_seed(0)
    model, batch = Mixture(share, scale=0.5), {"x": torch.randn(8, 5, 6), "attention_mask": ragged(8, 5)}
    targets = ["experts.0.up"]
    with pytest.raises(UserError, match=r"'experts.0.up' sees \d+ rows.*mask=lambda batch, layer.*router"):
        eva.compute(model, [batch], targets=targets, **ALL)
    keep = batch["attention_mask"].bool().reshape(-1)
    result = eva.compute(model, [batch], targets=targets, mask=lambda b, layer: keep[model.chosen[0]], **ALL)
    flat = model.norm(batch["x"]).view(-1, 6).detach() * 0.5
    rows = flat[model.chosen[0]][keep[model.chosen[0]]]
    assert result.layers[targets[0]].rows == len(rows)
    assert_matches(result.layers[targets[0]], exact(rows, False))


def test_flattened_steps_stay_in_order_and_pooled_samples_count_once() -> None:
    class Flattened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down, self.pooled = (
                nn.LayerNorm(5),
                nn.Linear(5, 7),
                nn.Linear(7, 5),
                nn.Linear(5, 2),
            )

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            y = self.down(self.up(self.norm(x.view(-1, 5))).relu())
            return self.pooled(y.view(x.shape).mean(1))

    torch.manual_seed(0)
    mask = ragged(6, 4)
    mask[2] = 0
    model, batch = Flattened().eval(), {"x": torch.randn(6, 4, 5), "attention_mask": mask}
    result = eva.compute(model, [batch], **ALL)
    assert [layer.rows for layer in result.layers.values()] == [int(mask.sum()), int(mask.sum()), 5]
    seen = recorded(model, "down", lambda: model(**batch))[0]
    assert_matches(result.layers["down"], exact(seen[mask.bool().reshape(-1)], False))


@pytest.mark.parametrize("kind", [dict, UserDict, MappingProxyType, lambda batch: SimpleNamespace(**batch)])
def test_a_batch_of_any_kind_brings_its_mask(kind: Any) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 3)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.inner(x)

    batch = {"x": torch.randn(8, 5, 5), "attention_mask": ragged(8, 5)}
    run = lambda model, b: model(x=batch["x"], attention_mask=batch["attention_mask"])  # noqa: E731
    forward = run if isinstance(kind(batch), SimpleNamespace) else None
    result = eva.compute(Masked(), [kind(batch)], forward=forward, **ALL)
    assert result.layers["inner"].rows == int(batch["attention_mask"].sum()) < 40


def bert(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return BertModel(BertConfig(vocab_size=40, max_position_embeddings=16, **sizes, **options)).eval()


def counted(model: nn.Module, batch: Any, targets: list[str], **options: Any) -> list[int]:
    result = eva.compute(model, [batch], targets=targets, **options, **ALL)
    return [layer.rows for layer in result.layers.values()]


class Named(NamedTuple):
    input_ids: Tensor
    attention_mask: Tensor


@dataclass(slots=True)
class Slotted:
    src: Tensor
    decoder_input_ids: Tensor
    attention_mask: Tensor
    decoder_attention_mask: Tensor


def test_a_mask_that_the_model_is_called_with_counts_where_the_batch_has_none_by_name() -> None:
    model, ids, mask = bert(), torch.randint(1, 40, (6, 6)), ragged(6, 6)
    first = lambda model, batch: model(**batch[0])  # noqa: E731
    for batch, forward in [((ids, mask), None), (({"input_ids": ids, "attention_mask": mask}, 0), first)]:
        assert counted(model, batch, ["query"], forward=forward) == [int(mask.sum())]
    assert counted(model, Named(ids, mask), ["query"]) == [int(mask.sum())]
    assert counted(nn.DataParallel(model), (ids, mask), ["query"]) == [int(mask.sum())]
    assert counted(model, (ids, mask), ["query"], mask=lambda batch: None) == [36]


@pytest.mark.parametrize(
    "form",
    [
        lambda mask: mask[:, None, None].bool(),
        lambda mask: (1 - mask[:, None, None].float()) * -1e9,
        lambda mask: mask.float(),
    ],
)
def test_masks_for_attentions_scores_are_understood(form: Any) -> None:
    ids, mask = torch.randint(1, 40, (6, 6)), ragged(6, 6)
    assert counted(bert(), {"input_ids": ids, "attention_mask": form(mask)}, ["query"]) == [int(mask.sum())]


def test_a_mask_for_pairs_of_steps_is_refused_unless_it_hides_nothing() -> None:
    ids, mask = torch.randint(1, 40, (6, 6)), ragged(6, 6)
    pairs = (mask[:, None] * mask[:, :, None])[:, None].bool()
    with pytest.raises(UserError, match=r"attention_mask has the shape \(6, 1, 6, 6\).*mask=lambda batch: None"):
        counted(bert(), {"input_ids": ids, "attention_mask": pairs}, ["query"])
    assert counted(bert(), {"input_ids": ids, "attention_mask": torch.ones_like(pairs)}, ["query"]) == [36]


@pytest.mark.parametrize("shape", [(6, 6), (6, 1, 1, 6)])
def test_a_mask_that_is_added_to_scores_is_read_without_padding_too(shape: tuple[int, ...]) -> None:
    """All zero, it counted nothing."""
    mask = ragged(6, 6)
    ids, added = torch.randint(1, 40, (6, 6)), torch.zeros(6, 6).masked_fill(mask == 0, -torch.inf)
    for scores, rows in ((added, mask.sum()), (torch.zeros(6, 6), 36)):
        assert counted(bert(), {"input_ids": ids, "attention_mask": scores.view(shape)}, ["query"]) == [rows]


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_torchs_own_padding_masks_are_read(kind: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model, mask = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval(), ragged(6, 6)
    padding = mask == 0 if kind == "bool" else torch.zeros(6, 6).masked_fill(mask == 0, -torch.inf)
    assert counted(model, {"src": torch.randn(6, 6, 8), "src_key_padding_mask": padding}, ["linear1"]) == [mask.sum()]
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, batch_first=True), 1).eval()
    batch = {"tgt": torch.randn(6, 6, 8), "memory": torch.randn(6, 4, 8), "tgt_key_padding_mask": padding}
    assert counted(decoder, batch, ["linear1"]) == [mask.sum()]


def test_a_decoder_alone_masks_the_states_that_it_is_given() -> None:
    model, own, theirs = bert(is_decoder=True, add_cross_attention=True), ragged(6, 6), ragged(6, 6, longest=4)
    batch = {"input_ids": torch.randint(1, 40, (6, 6)), "attention_mask": own}
    batch |= {"encoder_hidden_states": torch.randn(6, 6, 16), "encoder_attention_mask": theirs}
    rows = counted(model, batch, ["crossattention.self.query", "crossattention.self.key", "intermediate.dense"])
    assert rows == [own.sum(), theirs.sum(), own.sum()]


def test_fields_without_a_dictionary_are_names() -> None:
    """A dataclass with slots: its decoder's rows were counted by the encoder's mask."""
    model, named = bart(), pairs()
    batch = Slotted(named["input_ids"], named["decoder_input_ids"], *(named[name] for name in list(named)[1::2]))
    run = lambda model, b: model(  # noqa: E731
        input_ids=b.src, attention_mask=b.attention_mask, decoder_input_ids=b.decoder_input_ids
    )
    model.config.is_encoder_decoder = False
    rows = counted(model, batch, BART_LAYERS, forward=run)
    assert rows == [batch.attention_mask.sum(), batch.decoder_attention_mask.sum()]

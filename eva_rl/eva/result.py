"""What an EVA computation found."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from eva_rl.errors import UserError, counted
from eva_rl.eva.gram import SecondMoment
from eva_rl.eva.options import EvaOptions, Method
from eva_rl.files import check_files, check_seal, read_json, regular_size, sealed, write_file, write_json
from eva_rl.schema import Boolean, Integer, ListOf, MapOf, Number, OneOf, Optional, Record, Text

Stopped = Literal["converged", "max_batches", "data exhausted", "listening ended"]


@dataclass(frozen=True)
class LayerResult:
    """One target layer.

    Args:
        components: (R, D) float32, rows orthonormal (but for the variant "whiten").
        singular_values: (K,) of the rows seen, all that were computed.
        explained_variance_ratio: (K,) sigma^2 / total variance.
        lora_alpha: Alpha for this layer's rank.
        width: D, input features.
        outputs: Output features.
        input_group: Layers with equal numbers receive the same tensor.
        split_half_agreement: Mean squared cosine between the two halves' R-dimensional subspaces; nan if unknown.
        split_half_capture: Variance of one half captured by the other's directions, over the best possible.
        split_half_directions: The weakest agreement of a run of nearly tied directions.
        method: How the second moment was kept.
        rows: Rows seen.
        note: Anything unusual.
    """

    components: Tensor
    singular_values: Tensor
    explained_variance_ratio: Tensor
    lora_alpha: float
    width: int
    outputs: int
    input_group: int
    split_half_agreement: float
    split_half_capture: float
    split_half_directions: float
    method: Method
    rows: int
    note: str = ""

    @property
    def rank(self) -> int:
        """R."""
        return self.components.shape[0]

    @property
    def explained_variance(self) -> float:
        """Share of the variance that the R components explain."""
        return float(self.explained_variance_ratio[: self.rank].sum())

    @property
    def trainable_parameters(self) -> int:
        """Parameters of a LoRA adapter of this rank."""
        return self.rank * (self.width + self.outputs)


@dataclass(frozen=True)
class EvaResult:
    """Components and ranks of every target layer, and how they were found.

    Args:
        layers: By name, in the model's order.
        options: What was asked for.
        batches: Forwards heard by this process.
        stopped: Why no more batches were taken.
        converged: Whether every layer's halves agree to tau by the criterion.
        seconds: Wall time.
        skipped: Layers that were not asked for by name and were never called.
        moments: Second moment of each layer's input, with `compute(keep_moments=True)`; not saved.
    """

    layers: dict[str, LayerResult]
    options: EvaOptions
    batches: int
    stopped: Stopped
    converged: bool
    seconds: float
    skipped: tuple[str, ...] = ()
    moments: Mapping[str, SecondMoment] = field(default_factory=dict, repr=False, compare=False)

    def __repr__(self) -> str:
        """Layers, rows, how it ended, and what is explained, in one line."""
        explained = sum(layer.explained_variance for layer in self.layers.values()) / max(1, len(self.layers))
        return (
            f"EvaResult({counted(len(self.layers), 'layer')}, {self.trainable_parameters} parameters of LoRA, "
            f"{counted(self.batches, 'batch')}, {self.stopped}, {explained:.0%} of the variance explained on average)"
        )

    @property
    def budget(self) -> int:
        """Components to hand out: rank times the number of layers."""
        return self.options.rank * len(self.layers)

    @property
    def rows(self) -> int:
        """Rows seen by the layer that saw most."""
        return max(layer.rows for layer in self.layers.values())

    @property
    def trainable_parameters(self) -> int:
        """Parameters of a LoRA adapter with these ranks."""
        return sum(layer.trainable_parameters for layer in self.layers.values())

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by layer name; layers of rank 0 are left out, they get no adapter."""
        return {name: layer.rank for name, layer in self.layers.items() if layer.rank}

    @property
    def alphas(self) -> dict[str, float]:
        """LoRA's alpha by layer name, for the layers in `ranks`."""
        return {name: layer.lora_alpha for name, layer in self.layers.items() if layer.rank}

    @property
    def target_modules(self) -> str:
        """PEFT's `target_modules` for the layers in `ranks`: a regular expression that matches no other layer."""
        return "|".join(re.escape(_in_base_model(name)) for name in self.ranks)

    @property
    def rank_pattern(self) -> dict[str, int]:
        """PEFT's `rank_pattern`, each key a regular expression that matches one layer.

        A plain name would also match the layers whose names end like it.
        """
        return {exact_pattern(name): rank for name, rank in self.ranks.items()}

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """PEFT's `alpha_pattern`, with the keys of `rank_pattern`."""
        return {exact_pattern(name): alpha for name, alpha in self.alphas.items()}

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """Components by layer name, with rank-0 layers as (0, D).

        With prefix "base_model.model." this is what PEFT's `initialize_lora_eva_weights(eva_state_dict=...)` takes.
        """
        return {prefix + name: layer.components.clone() for name, layer in self.layers.items()}

    def to_report(self) -> dict[str, Any]:
        """Everything but the components, ready for JSON."""
        return {
            "options": asdict(self.options),
            "batches": self.batches,
            "rows": self.rows,
            "stopped": self.stopped,
            "converged": self.converged,
            "seconds": self.seconds,
            "budget": self.budget,
            "assigned": sum(self.ranks.values()),
            "trainable_parameters": self.trainable_parameters,
            "methods": {str(layer.width): layer.method for layer in self.layers.values()},
            "skipped": list(self.skipped),
            "layers": {name: _report(layer) for name, layer in self.layers.items()},
        }

    def save(self, path: str | Path) -> None:
        """Write `path`.safetensors (components) and `path`.json (the report)."""
        from safetensors.torch import save_file

        components, file = {n: value.contiguous() for n, value in self.state_dict().items()}, _beside(path, ".json")
        weights = _beside(path, ".safetensors")
        write_file(weights, lambda aside: save_file(components, aside))
        write_json(file, sealed(self.to_report(), file.parent, [weights.name]))

    @classmethod
    def load(cls, path: str | Path) -> EvaResult:
        """Read what `save` wrote.

        Raises:
            UserError: There is nothing, or it is damaged or was changed.
        """
        file, weights = _beside(path, ".json"), _beside(path, ".safetensors")
        if not file.is_file():
            raise UserError(f"{file} does not exist: expected a path given to EvaResult.save().")
        report = read_json(file, REPORT)
        check_seal(report, file)
        check_files(report, file.parent, [weights.name], file)
        return cls(
            _layers(report["layers"], weights, str(file)),
            EvaOptions(**report["options"]),
            report["batches"],
            report["stopped"],
            report["converged"],
            report["seconds"],
            tuple(report["skipped"]),
        )

    def ended(self, stopped: Stopped, seconds: float) -> EvaResult:
        """The same result with the reason for its end."""
        return replace(self, stopped=stopped, seconds=seconds)


def _beside(path: str | Path, ending: str) -> Path:
    """`path` with an ending added; a dot in its name begins none, and either of the two file names stands for both."""
    path = Path(path)
    name = path.stem if path.suffix in (".safetensors", ".json") else path.name
    return path.with_name(name + ending)


def _in_base_model(name: str) -> str:
    """A layer's name as PEFT sees it, also where the components were computed on a PeftModel."""
    return name.removeprefix("base_model.model.")


def exact_pattern(name: str) -> str:
    """A pattern of PEFT that matches one layer, and no other whose name ends like it."""
    return "^" + re.escape(_in_base_model(name))


_NUMBERS = ("lora_alpha", "width", "outputs", "input_group", "method", "rows", "note")
_SPLITS = ("split_half_agreement", "split_half_capture", "split_half_directions")
_SPECTRA = ("singular_values", "explained_variance_ratio")


def _report(layer: LayerResult) -> dict[str, Any]:
    splits = {name: getattr(layer, name) for name in _SPLITS}
    return {
        "rank": layer.rank,
        "explained_variance": layer.explained_variance,
        **{name: getattr(layer, name) for name in _NUMBERS},
        **{name: None if math.isnan(value) else value for name, value in splits.items()},  # JSON has no nan
        **{name: getattr(layer, name).tolist() for name in _SPECTRA},
    }


_count, _share = Integer(0), Optional(Number())
_spectrum = ListOf(Number())
LAYER = Record(
    {
        **dict.fromkeys(("rank", "width", "outputs", "input_group", "rows"), _count),
        **dict.fromkeys(_SPLITS, _share),
        **dict.fromkeys(_SPECTRA, _spectrum),
        "lora_alpha": Number(0),
        "method": OneOf(get_args(Method)),
        "note": Text(),
        "explained_variance": Number(),
    }
)
OPTIONS = Record(
    {"rank": Integer(1)},
    {
        **dict.fromkeys(("rho", "tau"), Number()),
        "alpha": Optional(Number()),
        **dict.fromkeys(("center", "keep_scale"), Boolean()),
        **dict.fromkeys(("score", "criterion"), Text()),
        "variant": Optional(Text()),
        "seed": Integer(),
    },
)
REPORT = Record(
    {
        "options": OPTIONS,
        "batches": _count,
        "stopped": OneOf(get_args(Stopped)),
        "converged": Boolean(),
        "seconds": Number(0),
        "skipped": ListOf(Text()),
        "layers": MapOf(LAYER),
    },
    others=True,
)
"""What `save` writes beside the components."""


def _layers(layers: Mapping[str, Any], weights: Path, where: str) -> dict[str, LayerResult]:
    """The layers of a report with their components.

    Raises:
        UserError: The components are missing, damaged, of other shapes, or not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        regular_size(weights)
        components = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights} cannot be read: {error}. Save the result again.") from error
    for name, values in layers.items():
        found, expected = components.get(name), (values["rank"], values["width"])
        if found is None or (tuple(found.shape), found.dtype) != (expected, torch.float32):
            given = "missing" if found is None else f"{found.dtype} of shape {tuple(found.shape)}"
            raise UserError(
                f"{weights}: {name} is {given}; expected torch.float32 of shape {expected}, as {where} says."
            )
        if not bool(torch.isfinite(found).all()):
            raise UserError(f"{weights}: {name} is not finite. Save the result again.")
    return {name: _layer(values, components[name]) for name, values in layers.items()}


def _layer(values: dict[str, Any], components: Tensor) -> LayerResult:
    fields: dict[str, Any] = {name: values[name] for name in _NUMBERS}
    fields |= {name: float("nan") if values[name] is None else values[name] for name in _SPLITS}
    fields |= {name: torch.tensor(values[name], dtype=torch.float64) for name in _SPECTRA}
    return LayerResult(components=components, **fields)

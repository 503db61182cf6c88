"""The adapters of a loaded policy: several on one base, one of them active, on or off, merged or not."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor, nn

from eva_rl.adapters.attach import AttachedAdapter, base_weights, extension_of, has_adapter, is_merged, refuse_merged
from eva_rl.adapters.methods import METHODS
from eva_rl.adapters.validation import changed_weights, check_adapter, check_same_scaling, find_adapter, read_origin
from eva_rl.agents.policy import DecisionTransformerPolicy
from eva_rl.agents.policy_folder import weights_digest
from eva_rl.agents.weights import first_line
from eva_rl.data.trajectories import Trajectories
from eva_rl.errors import UnknownNameError, UserError

if TYPE_CHECKING:
    from peft import PeftModel


class AdaptedPolicy(DecisionTransformerPolicy):
    """A policy whose adapters can be added, switched, turned off and merged.

    Args:
        base: A policy without an adapter; its network is taken over, not copied.

    Attributes:
        adapters: Its adapters.
    """

    def __init__(self, base: DecisionTransformerPolicy) -> None:
        super().__init__(base.network, base.scaling, base.conditioning, env_id=base.env_id, metadata=base.metadata)
        self.adapters = Adapters(self)


class Adapters:
    """The adapters of a policy, by name. Switch between episodes: a history that one has read is not another's.

    Args:
        policy: Without an adapter so far; the adapters go into its network.
    """

    def __init__(self, policy: DecisionTransformerPolicy) -> None:
        self._policy = policy
        self._model: PeftModel | None = None
        self._base = weights_digest(base_weights(policy.network))
        self._origins: dict[str, dict[str, Any]] = {}
        self._active: str | None = None
        self._asked: dict[str, float] = {}  # the target return of a task that an adapter came with last
        self._trainable = [(parameter, parameter.requires_grad) for parameter in policy.network.parameters()]
        self._unmerged: dict[str, Tensor] = {}  # the base's weights, while an adapter is merged into them

    @property
    def base_sha256(self) -> str:
        """Digest of the base weights, which an adapter is made for."""
        return self._base

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters that were added."""
        return tuple(self._origins)

    @property
    def active(self) -> str | None:
        """The adapter at work; None where the base acts alone."""
        return self._active

    def add(self, name: str, path: str | Path, *, is_trainable: bool = False) -> None:
        """Load an adapter and activate it; its target return applies to its task.

        Args:
            name: To call it by.
            path: Its folder as PEFT writes it, or a policy folder, a run directory or a hub id with an adapter.
            is_trainable: Whether it is going to be trained: its parameters ask for gradients while it acts.

        Raises:
            UserError: A file is missing or damaged, it was made for another base or scaling, its shapes are others, the
                name is taken or none that PyTorch takes, or ``attach_adapter`` put an adapter on the policy.
        """
        from eva_rl.adapters.fused import fuse_where_faster

        if name in self._origins:
            raise UserError(f"The policy has an adapter {name!r} already. Give this one another name.")
        _check_name(name)
        self._refuse_others()
        folder = find_adapter(path)
        origin = read_origin(folder)
        if origin.get("base_sha256", self._base) != self._base:
            raise UserError(
                f"The adapter in {folder} was trained on different base weights than this policy's "
                f"({origin['base_sha256'][:12]}, not {self._base[:12]}). Use it on the policy it was trained on."
            )
        check_same_scaling(origin, self._policy.scaling, folder)
        check_adapter(self._policy.network, folder)
        with self._base_kept(name, folder), _fitting(folder):
            self._read(name, folder, is_trainable)
        self._policy.network.train(self._policy.network.training)  # PEFT's new layers begin in training mode
        fuse_where_faster(self._policy.network)
        self._origins[name] = origin
        env_id = origin.get("env_id", "")
        if env_id and origin.get("target_return") is not None:
            self._asked[env_id] = origin["target_return"]
            self._policy.set_target_return(origin["target_return"], env_id)
        self.use(name)

    def _read(self, name: str, folder: Path, is_trainable: bool) -> None:
        from peft import PeftConfig, PeftModel

        peft_config = PeftConfig.from_pretrained(str(folder))
        device = str(self._policy.device)
        if self._model is None:
            self._model = PeftModel.from_pretrained(
                self._policy.network, str(folder), name, is_trainable=is_trainable, torch_device=device
            )
            return
        kinds = {config.peft_type for config in self._model.peft_config.values()} | {peft_config.peft_type}
        if len(kinds) > 1:
            raise UserError(
                f"{folder}: PEFT puts {' and '.join(sorted(kinds))} adapters on one model only apart from each other. "
                "Use adapters of one kind, or merge this one: python -m eva_rl.export to=merged."
            )
        try:
            self._model.load_adapter(str(folder), name, is_trainable=is_trainable, torch_device=device)
        except Exception:  # of any kind: the adapters that are there stay usable
            if name in self._model.peft_config:
                self._model.delete_adapter(name)
            raise

    @contextmanager
    def _base_kept(self, name: str, folder: Path) -> Iterator[None]:
        """Hold the base weights against what they were; an adapter that changed them is taken out again."""
        before = self._copied_base()
        yield
        if changed := changed_weights(before, base_weights(self._policy.network)):
            if self._model is not None:
                self._model.delete_adapter(name)
            self._put_back(before)
            raise UserError(
                f"The adapter in {folder} changes weights of the base ({', '.join(changed[:3])}), which belong to "
                "every adapter on it. It is not used."
            )

    def use(self, name: str | None) -> None:
        """Let an adapter act, with its own target return for its task; None lets the base act alone.

        A target return that was set by other means than an adapter stays as it is, and the base alone is asked for
        what the last adapter was asked for on its task.

        Raises:
            UnknownNameError: There is none of that name.
            UserError: Another one is merged, or acts that ``attach_adapter`` put on the policy.
        """
        if name is not None and name not in self._origins:
            raise UnknownNameError("adapter", name, self.names)
        if name == self._active and name is not None and not self._off():
            return
        self._refuse_others()
        if self._model is not None:
            if name is None:
                self._model.base_model.disable_adapter_layers()
            else:
                self._model.base_model.enable_adapter_layers()
                self._model.set_adapter(name, inference_mode=self._model.peft_config[name].inference_mode)
        self._active = name
        origin = self._origins.get(name or "", {})
        env_id = origin.get("env_id", "")
        if env_id in self._asked and self._policy.conditioning.of(env_id) == self._asked[env_id]:
            self._asked[env_id] = origin["target_return"]
            self._policy.set_target_return(origin["target_return"], env_id)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The base alone, inside the ``with`` block, asked for the same returns as the adapter that acted before."""
        before = self._active
        self.use(None)
        try:
            yield
        finally:
            self.use(before)

    def choose(
        self, where: str | Trajectories, *, steps: int = 10, episodes: int = 4, seed: int = 0
    ) -> dict[str, float]:
        """Put the adapter to work that fits a task best, by what its first steps look like to the base.

        The base acts alone for a few steps, or reads demonstrations; the adapter whose input directions (A) capture
        most of the variance of its activations is used. What tasks share at their start, such as a wall that no
        observation tells of, cannot tell them apart; benchmarks/comparisons/choose_adapter.py measures the accuracy.

        Args:
            where: A task, or demonstrations.
            steps: Env steps from the start of an episode.
            episodes: Episodes.
            seed: Of the episodes that are played.

        Returns:
            Each adapter's share of the variance, over the layers and as many directions as all have; the best first.

        Raises:
            UserError: There is no adapter, they have no low-rank layer in common, or steps or episodes are none.
        """
        from eva_rl.adapters.eva_init import captured_variance, comparable_directions, start_moments

        if self._model is None:
            raise UserError("The policy has no adapters to choose from. Load some: load_policy(base, adapters={...}).")
        directions = comparable_directions(self._model, self.names)
        layers = sorted(next(iter(directions.values())))
        with self.off():
            moments = start_moments(self._policy, layers, where, steps=steps, episodes=episodes, seed=seed)
        scores = {name: captured_variance(found, moments) for name, found in directions.items()}
        ordered = dict(sorted(scores.items(), key=lambda item: -item[1]))
        self.use(next(iter(ordered)))
        return ordered

    def merge(self) -> None:
        """Add the active adapter to the base weights, in place: no extra work per step; :meth:`unmerge` undoes it.

        A copy of the base's weights is kept until then.

        Raises:
            UserError: There is no adapter, none is active, or one is merged already.
        """
        self._refuse_others()
        if self._model is None:
            raise UserError("The policy has no adapters to merge. Load some: load_policy(base, adapters={...}).")
        chosen = self._chosen()
        self._unmerged = self._copied_base()
        self._model.merge_adapter([chosen])

    def unmerge(self) -> None:
        """Take a merged adapter out of the base weights again, which are what they were to the last bit."""
        if self._model is None or not is_merged(self._policy.network):
            return
        self._model.unmerge_adapter()  # which subtracts what it added, and rounds
        self._put_back(self._unmerged)
        self._unmerged = {}

    def merge_and_unload(self) -> None:
        """Add the active adapter to the base weights for good, and forget all of them; without any, do nothing.

        Raises:
            UserError: None of the adapters is active, or one is merged already.
        """
        self._refuse_others()
        if self._model is None:
            return
        self._model.merge_and_unload(adapter_names=[self._chosen()])
        self._forget()
        self._base = weights_digest(base_weights(self._policy.network))

    def unload(self) -> None:
        """Take all adapters out of the network, and forget them: the base is left.

        Raises:
            UserError: One is merged; :meth:`unmerge` takes it out of the base weights first.
        """
        self._refuse_others()
        if self._model is not None:
            self._model.unload()
            self._forget()

    def _copied_base(self) -> dict[str, Tensor]:
        return {name: weight.clone() for name, weight in base_weights(self._policy.network).items()}

    def _put_back(self, copied: Mapping[str, Tensor]) -> None:
        weights = base_weights(self._policy.network)
        for name, weight in copied.items():
            weights[name].copy_(weight)

    def _forget(self) -> None:
        self._model, self._active, self._origins = None, None, {}
        for parameter, asked in self._trainable:  # PEFT froze them
            parameter.requires_grad_(asked)

    def attached(self) -> AttachedAdapter:
        """The one adapter, for the training loop and for saving.

        Raises:
            UserError: There is none, there are several, or it is merged.
        """
        self._refuse_others()
        if self._model is None or len(self._origins) != 1:
            raise UserError(f"Expected one adapter to train or save, the policy has {len(self._origins)}.")
        method = METHODS.get(next(iter(self._origins.values())).get("method", ""), METHODS["lora"])
        return AttachedAdapter(method, self._model, None, extension_of(method, self._model) if method.plus else None)

    def _chosen(self) -> str:
        """The active adapter.

        Raises:
            UserError: The base acts alone.
        """
        if self._active is None:
            raise UserError(
                f"No adapter is active that could be merged. Call use(NAME) first: {', '.join(self.names)}."
            )
        return self._active

    def _off(self) -> bool:
        return any(getattr(module, "disable_adapters", False) for module in self._policy.network.modules())

    def _refuse_others(self) -> None:
        """Raise where an adapter is merged, or acts that is none of these: nothing here would turn it off."""
        refuse_merged(self._policy.network, self._active or "")
        if self._model is None and has_adapter(self._policy.network):
            raise UserError(
                "The policy has an adapter from attach_adapter, which policy.adapters does not know. Save it with "
                "eva_rl.adapters.save_adapted_policy, and switch or merge it in what eva_rl.load_policy returns."
            )


def _check_name(name: str) -> None:
    try:
        nn.ModuleDict({name: nn.Identity()})  # where PEFT keeps it
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{name!r} cannot be the name of an adapter ({first_line(error)}). Expected a word without dots that is no "
            "attribute of torch.nn.ModuleDict."
        ) from error


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            warnings.filterwarnings("ignore", message="The following rank_pattern keys.*")  # AdaLoRA's are of its own
            yield
    except _DAMAGE as error:
        raise UserError(
            f"The adapter in {folder} does not fit the policy, or is damaged: {first_line(error)}"
        ) from error


_DAMAGE = (
    *(OSError, RuntimeError, ValueError, KeyError, TypeError, UserWarning, SafetensorError),
    *(IndexError, AttributeError, AssertionError, ZeroDivisionError, OverflowError, re.error),
)
"""What PEFT raises on a config that it cannot make sense of."""

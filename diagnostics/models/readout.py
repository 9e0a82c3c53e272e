"""One causal language model, taken apart into backbone and output head.

Scoring projects hidden states to logits one chunk at a time, so it needs the two halves of a model
separately. A head is trusted only after the two halves have reproduced the model's own logits on a
short sequence (soft-capping and logit scaling included). A model that cannot be taken apart returns
its full logits in place of hidden states, which costs memory and nothing else.

Axes: B contexts, T tokens, n positions, H hidden size, V shared vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.measure.projection import is_plain, linear, wide_head
from diagnostics.models.loading import move, resolve_device
from diagnostics.models.weights import weights_checksum

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger("diagnostics")
T = TypeVar("T")
LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Configuration fields that scale logits: Cohere's, Granite's, Falcon-H1's, Muse's."""
RELEASED_FROM = 2**28
"""Bytes of layers from which on their memory is worth loading them again."""


@dataclass(frozen=True)
class _Released:
    """What is known of a model whose layers are released."""

    device: torch.device
    checksum: str
    spare_head: tuple[Tensor, Tensor | None] | None
    """The copy of the head that there was before."""


class Readout:
    """One causal language model as `hidden(ids) -> states` and `logits(states) -> logits`.

    Args:
        model: A causal language model of transformers.
        vocabulary: Number of ids that `logits` returns; None means all.
        excluded: Ids among these whose logits are -inf: they are special tokens of the other model
            by another name (`models.special_tokens`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        vocabulary: int | None = None,
        excluded: Sequence[int] = (),
    ):
        _refuse_virtual_tokens(model)
        self._model = model
        self.backbone = backbone(model)
        self.head = model.get_output_embeddings()
        config = model.config.get_text_config()
        self.full_vocabulary = config.vocab_size
        self.vocabulary = vocabulary or self.full_vocabulary
        self.excluded = tuple(i for i in excluded if i < self.vocabulary)
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._scale = 1.0
        self._spare_head: tuple[Tensor, Tensor | None] | None = None
        self.load_again: Callable[[], PreTrainedModel] | None = None
        """Loads the model from its files once more; None where it did not come from files."""
        self._released: _Released | None = None
        self.sharded = False
        """True where the layers are spread over the processes. All processes must then run the
        model equally often and at the same time (`in_step`).
        """
        self.apart = self._reproduces_logits(logit_scales(config))
        if not self.apart:
            log.warning(
                "%s: head and backbone cannot be separated; full logits are held per micro-batch",
                type(model).__name__,
            )

    @property
    def model(self) -> PreTrainedModel:
        """The model; one whose layers were released is loaded again first."""
        self._wake()
        return self._model

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration, also while its layers are released."""
        return self._model.config

    @property
    def device(self) -> torch.device:
        """Device of the model's inputs."""
        if self._released is not None:
            return self._released.device
        return next(self._model.parameters()).device

    def hidden(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Hidden states of right-padded sequences; the state at t predicts token t + 1.

        Args:
            ids_BT: [B, T] token ids.
            mask_BT: [B, T] 1 on real tokens, 0 on padding.

        Returns:
            [B, T, H] in the model's dtype; full logits [B, T, V] for a model that cannot be taken
            apart.
        """
        inputs = {
            "input_ids": ids_BT.to(self.device),
            "attention_mask": mask_BT.to(self.device),
            "use_cache": False,
        }
        self._wake()
        if self.apart:
            return self.backbone(**inputs).last_hidden_state
        with wide_head(self.model):
            return self.model(**inputs).logits

    def logits(self, hidden_nH: Tensor) -> Tensor:
        """Logits [n, V] over the shared vocabulary, from states [n, H].

        They are float32 or float64 whatever the model's dtype is (`measure.projection`), and -inf
        at the excluded ids.
        """
        logits_nV = self._project(hidden_nH, slice(0, self.vocabulary))
        if not self.excluded:
            return logits_nV
        excluded = torch.tensor(self.excluded, device=logits_nV.device)
        return logits_nV.index_fill(-1, excluded, -torch.inf)

    @property
    def drops(self) -> bool:
        """Whether this model has ids that `logits` leaves out."""
        return self.full_vocabulary > self.vocabulary or bool(self.excluded)

    def dropped_logits(self, hidden_nH: Tensor) -> Tensor:
        """Logits [n, full - V] of the ids that the other model lacks, from states [n, H].

        The excluded ids come first: [n, E + full - V].
        """
        beyond_nW = self._project(hidden_nH, slice(self.vocabulary, self.full_vocabulary))
        if not self.excluded:
            return beyond_nW
        excluded_nE = self._project(hidden_nH, list(self.excluded))
        return torch.cat([excluded_nE, beyond_nW], dim=-1)

    def _project(self, hidden_nH: Tensor, ids: slice | list[int]) -> Tensor:
        if not self.apart:
            return hidden_nH[:, ids]
        weight, bias = self._spare_head or (self.head.weight, self.head.bias)
        logits_nV = linear(
            hidden_nH.to(weight.device), weight[ids], None if bias is None else bias[ids]
        )
        if self._scale != 1.0:
            logits_nV = logits_nV * self._scale
        return (
            logits_nV
            if self._softcap is None
            else torch.tanh(logits_nV / self._softcap) * self._softcap
        )

    @property
    def scale(self) -> float:
        """What the model multiplies its logits by, as was found on the model itself."""
        return self._scale

    def park(self) -> None:
        """Move the model to main memory.

        A copy of its head stays on the device, so that states can still be projected.
        """
        if self.apart and self._spare_head is None:
            bias = None if self.head.bias is None else self.head.bias.detach().clone()
            self._spare_head = (self.head.weight.detach().clone(), bias)
        move(self.model, "cpu")

    @torch.no_grad()
    def release(self) -> bool:
        """Free the memory of the layers until the model is used again.

        A copy of the head stays, so that states can still be projected. When the model is used, it
        is loaded from its files, whose weights must have the same bits.

        Returns:
            True where the layers are released: not for a model that did not come from files, that
            is sharded, or that has less than RELEASED_FROM bytes beside its head.
        """
        if self._released is not None:
            return True
        if self.load_again is None or self.sharded or self._bytes_of_layers() < RELEASED_FROM:
            return False
        self._released = _Released(self.device, weights_checksum(self._model), self._spare_head)
        if self.apart and self._spare_head is None:
            bias = None if self.head.bias is None else self.head.bias.detach().clone()
            self._spare_head = (self.head.weight.detach().clone(), bias)
        nothing: dict[int, nn.Parameter] = {}
        for module in self._model.modules():
            for name, own in module._parameters.items():
                if own is not None:
                    empty = nothing.setdefault(id(own), nn.Parameter(own.to("meta"), False))
                    module._parameters[name] = empty
        log.info("the layers of %s are released", type(self._model).__name__)
        return True

    def _bytes_of_layers(self) -> int:
        head = self.head.weight if self.apart else None
        layers = (p for p in self._model.parameters() if p is not head)
        return sum(p.numel() * p.element_size() for p in layers)

    def _wake(self) -> None:
        """Load released layers again."""
        if self._released is None:
            return
        assert self.load_again is not None, "only what can be loaded again is released"
        fresh = self.load_again()
        if weights_checksum(fresh) != self._released.checksum:
            raise DiagnosticsError(
                f"The weights of {self.config._name_or_path or type(fresh).__name__} are others"
                " than when this command began, so their files have changed meanwhile. Start the"
                " command again."
            )
        for module, source in zip(self._model.modules(), fresh.modules(), strict=True):
            module._parameters.update(source._parameters)
        self._spare_head, self._released = self._released.spare_head, None

    def shard(self, device: str, *, whose: str = "teacher") -> None:
        """Spread the decoder layers over the processes (FSDP2).

        Embeddings, norm and head stay whole in each process. A layer is gathered when it runs and
        released afterwards, so that a process holds its share of the layers and one more layer. A
        layer's gradients are added up over the processes, each of which keeps its share.

        Args:
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            whose: `student` or `teacher`, for messages.

        Raises:
            DiagnosticsError: There is one process, or the model cannot be taken apart.
        """
        if distributed.world() == 1 or not self.apart:
            why = (
                "this is the only process"
                if self.apart
                else f"{type(self.model).__name__} cannot be taken apart"
            )
            raise DiagnosticsError(
                f"The {whose} cannot be sharded: {why}. Start under `torchrun --nproc-per-node N`,"
                f" or leave --shard-{whose} out."
            )
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        distributed.group()
        place = resolve_device(distributed.local_device(device))
        mesh = init_device_mesh(place.type, (distributed.world(),))
        for layer in decoder_layers(self.backbone):
            _add_up_gradients(fully_shard(layer, mesh=mesh, reshard_after_forward=True))
        move(self.model, place)
        self.sharded = True
        with torch.no_grad():
            self.spare_pass()  # the first pass decides where the shards lie

    def spare_pass(self) -> None:
        """Run the model on one token, where another process has one batch more.

        Where gradients are taken, the layers' gradients of that batch come with it.
        """
        one = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.long)
        hidden_BTH = self.hidden(*one)
        if hidden_BTH.requires_grad and torch.is_grad_enabled():
            (hidden_BTH.sum() * 0).backward()

    @torch.no_grad()
    def _reproduces_logits(self, scales: Sequence[float]) -> bool:
        """Whether the halves give the model's own logits on a short sequence, up to rounding.

        scales: factors by which the model may multiply its logits; the first that fits is kept.
        """
        if not is_plain(self.head) or self.backbone is self.model:
            return False
        self.apart = True
        ids_BT = torch.arange(4, device=self.device)[None] % self.full_vocabulary
        mask_BT = torch.ones_like(ids_BT)
        whole = self.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[0]
        states = self.hidden(ids_BT, mask_BT)[0]
        rounding = max(torch.finfo(x.dtype).eps for x in (whole, states, self.head.weight))
        for self._scale in scales:
            halves = self._project(states, slice(0, self.full_vocabulary))
            tolerance = 4 * rounding * (1 + whole.abs().max())
            if whole.shape == halves.shape and bool((whole - halves).abs().max() <= tolerance):
                return True
        return False


def _add_up_gradients(layer: Any) -> None:
    """Let the gradients of a sharded layer be sums over the processes; FSDP2 takes means."""
    layer.set_gradient_divide_factor(1.0)
    layer.set_force_sum_reduction_for_comms(True)  # a factor within the sum is NCCL's alone
    if hasattr(layer, "set_reduce_scatter_unused_params"):  # experts that no token visits
        layer.set_reduce_scatter_unused_params(True)


def in_step(todo: Iterable[T], count: int, models: Sequence[Readout]) -> Iterator[T]:
    """Hand out this process's passes, and run spare ones until every process is through.

    A sharded model needs all processes at every pass, so those with fewer passes go through one
    token in their place. Without a sharded model this hands out the passes alone.

    Args:
        todo: The passes, each of which runs the sharded ones of these models once, in their order.
        count: How many they are.
        models: The models.
    """
    sharded = [model for model in models if model.sharded]
    # asked before the first pass, since the processes wait for each other here
    spare = max(distributed.total_lengths(count)) - count if sharded else 0
    yield from todo
    for _ in range(spare):
        for model in sharded:
            model.spare_pass()


def _refuse_virtual_tokens(model: nn.Module) -> None:
    """Refuse an adapter in memory that puts tokens of its own before a text: positions would be
    others.
    """
    settings = getattr(model, "peft_config", {}).values()
    kinds = [str(each.peft_type) for each in settings if each.is_prompt_learning]
    if kinds:
        raise DiagnosticsError(
            f"The model has an adapter of type {kinds[0].removeprefix('PeftType.')}, which puts"
            " virtual tokens before the prompt. Only adapters of the weights, such as LoRA, can be"
            " measured."
        )


def backbone(model: PreTrainedModel) -> nn.Module:
    """The part of a model before its output head; the model itself where that is unknown.

    Some classes name a prefix that they do not have (Llama 4's text model); there it is the
    attribute `model`, as in all other classes.
    """
    # An adapter's backbone is that of the model that it was put into, layers and all.
    whole: Any = model  # PEFT's wrapper has the model under it, which torch's stubs do not know
    model = whole.get_base_model() if hasattr(model, "peft_config") else model
    inner = model.base_model if model.base_model is not model else getattr(model, "model", None)
    return inner if isinstance(inner, nn.Module) else model


def logit_scales(config) -> list[float]:
    """Factors by which a model of this configuration may multiply its logits, most likely first.

    One name means different things in different families (Granite divides by `logits_scaling`,
    HyperCLOVA X multiplies; MPT names a scale and does not apply it), so each factor is tried on
    the model itself. 1 is always among them.
    """
    found: list[float] = []
    for name in LOGIT_SCALES:
        value = getattr(config, name, None)
        value = config.hidden_size**-0.5 if value == "inv_sqrt_d_model" else value
        if (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and value
            and math.isfinite(value)
        ):
            found += [1 / value, value] if name == "logits_scaling" else [float(value)]
    return list(dict.fromkeys([*found, math.prod(found), 1.0]))


def decoder_layers(backbone: nn.Module) -> nn.ModuleList:
    """The list of a backbone's decoder layers: its longest list of modules."""
    return max(
        (module for module in backbone.modules() if isinstance(module, nn.ModuleList)), key=len
    )


def remove_layers(model: PreTrainedModel, layers: tuple[int, ...]) -> None:
    """Remove some of a decoder's layers, in place.

    Args:
        model: The model; its configuration follows.
        layers: Indices of the layers to remove.
    """
    base: Any = model.base_model
    kept = [layer for index, layer in enumerate(decoder_layers(base)) if index not in layers]
    for index, layer in enumerate(kept):
        attention: Any = layer.self_attn
        attention.layer_idx = index
    base.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)

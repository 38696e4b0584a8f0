"""What processes send each other in a training step: counted in real processes, on the CPU, over gloo.

Each carries out a step of the paper's networks on a small batch under a mode that sees every operator, collectives
among them. It writes down how many bytes a message is over, in which group of processes, and how much arithmetic came
before. Bytes are those of weights and gradients, so that the size of a batch does not matter; nor does it for a
message's place in the step, since arithmetic grows with the batch everywhere alike (but for attention, of which there
is little).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.flow_baselines import FlowStep
from bench.ranks import among
from decovae.losses.objective import Loss, VAEObjective
from decovae.models.flow_unet import FlowUNet
from decovae.runtime import Runtime
from decovae.training.config import FlowConfig, ParallelConfig, Strategy, VAEConfig
from decovae.training.parallel import prepare_module
from decovae.training.stage import Batch, Networks
from decovae.training.step import Observer, Step
from decovae.training.vae import VAENetworks

Scope = Literal["world", "node", "across"]
What = Literal["gather", "scatter", "reduce", "needed", "settled"]
Precision = Literal["fp32", "bf16"]

WORLD, A_NODE = 4, 2
"""Processes that count, and how many of them take themselves for one node's."""


@dataclass(frozen=True)
class Event:
    """A message of a step, or where computing waits for one. The order of its attributes is that of a file.

    Attributes:
        what: gather (all-gather), scatter (reduce-scatter) or reduce (all-reduce); needed, where computing waits for
            the oldest gather that it has not waited for; settled, where it waits for all gradients.
        flops: arithmetic of the step so far.
        size: bytes of the whole tensor that is gathered, scattered or reduced, of one process.
        scope: among all processes, those of a node, or those of the same place in every node.
        sharding: weights or gradients, which travel while computing goes on; else computing waits for the message.
    """

    what: What
    flops: int
    size: int = 0
    scope: Scope = "world"
    sharding: bool = False


@dataclass(frozen=True)
class Job:
    """A step to count.

    Attributes:
        config: of the run; a small patch or latent stands for its own.
        strategy: how processes divide the work.
        precision: of weights while they are computed with.
    """

    config: VAEConfig | FlowConfig
    strategy: Strategy
    precision: Precision


@dataclass(frozen=True)
class Trace:
    """What one process of `WORLD` did in a step.

    Attributes:
        strategy: how they divided the work.
        precision: of weights while they are computed with.
        shapes: of all trained parameters, whole.
        events: in order.
        flops: arithmetic of the whole step.
    """

    strategy: Strategy
    precision: Precision
    shapes: list[list[int]]
    events: list[Event]
    flops: int

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Trace:
        """What `as_dict` made."""
        events = [Event(what, flops, size, scope, sharding) for what, flops, size, scope, sharding in content["events"]]
        return cls(content["strategy"], content["precision"], content["shapes"], events, content["flops"])

    def as_dict(self) -> dict[str, Any]:
        """In JSON's types, short."""
        return {**vars(self), "events": [[*vars(event).values()] for event in self.events]}

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return padded(self.shapes, 1)


def padded(shapes: Sequence[Sequence[int]], shards: int) -> int:
    """Numbers in parameters that so many divide by the first dimension, each part as long as the longest."""
    total = 0
    for shape in shapes:
        first, rest = shape[0], torch.Size(shape[1:]).numel()
        total += -(-first // shards) * shards * rest
    return total


def count(jobs: Sequence[Job]) -> list[Trace]:
    """Steps as `WORLD` processes of two nodes carry them out, each as one process saw it; minutes for the paper's."""
    found: list[Trace] = among(WORLD, _traces, list(jobs), node=A_NODE)
    return found


def _traces(runtime: Runtime, jobs: Sequence[Job]) -> list[Trace]:
    found = []
    for job in jobs:
        found.append(_trace(job, runtime))
        gc.collect()  # sharded networks refer to themselves, and the flow's are large
    return found


def _trace(job: Job, runtime: Runtime) -> Trace:
    config = replace(job.config, parallel=ParallelConfig(strategy=job.strategy), precision=job.precision, compile="off")
    networks: Networks
    if isinstance(config, VAEConfig):
        objective = VAEObjective(config.loss, deco=config.deco, load=False)
        networks = VAENetworks(config, runtime, objective)
        batch: Batch = {"image": torch.rand(1, config.model.image_channels, *config.data.patch)}
        begin = config.loss.adversarial_warmup
    else:
        networks, batch, begin = FlowNetworks(config, runtime), {"latent": torch.randn(1, CHANNELS, *LATENT)}, 0
    recorder = Recorder(job.strategy)
    step = Step(networks, config, runtime, observer=recorder)
    with recorder:
        found = step.gradients(repeat(batch), begin)
        runtime.maximum(found.broken.reshape(1))  # the loop's agreement that the step counts
    shapes = [list(p.shape) for network in networks.networks.values() for p in network.parameters()]
    return Trace(job.strategy, job.precision, shapes, recorder.events, recorder.flops)


CHANNELS = 4
LATENT = (8, 16, 8)
"""A latent on which the flow's messages are counted: a quarter of the paper's, each way."""


class FlowNetworks:
    """The flow and its loss, without latents on disk."""

    def __init__(self, config: FlowConfig, runtime: Runtime) -> None:
        torch.manual_seed(config.seed)
        self.network = FlowUNet(config.model, CHANNELS)
        prepare_module(self.network, runtime, config)
        self.networks: dict[str, nn.Module] = {"flow": self.network}
        self.learning_rates = {"flow": config.optimizer.learning_rate}

    def losses(self, batch: Batch, step: int) -> Iterator[tuple[str, Loss]]:
        """The flow matching loss of latents at random times."""
        loss = FlowStep(self.network)(batch["latent"])
        yield "flow", Loss(loss, {})


MESSAGES: dict[str, What] = {
    "_allgather_base_": "gather",
    "allgather_": "gather",
    "all_gather_into_tensor": "gather",
    "_reduce_scatter_base_": "scatter",
    "reduce_scatter_tensor": "scatter",
    "allreduce_": "reduce",
    "all_reduce": "reduce",
    "all_reduce_": "reduce",
}
"""Collectives, by the names of their operators."""

LAYOUTS = ("_wrap_tensor_autograd", "wait_tensor")
"""Operators of the same namespaces that send nothing."""


class Recorder(TorchDispatchMode, Observer):
    """Notes the messages of what runs inside it, and, told of a step's parts, where gradients are waited for.

    Args:
        strategy: how processes divide the work.

    Attributes:
        events: so far.
        flops: arithmetic so far.
    """

    def __init__(self, strategy: Strategy) -> None:
        super().__init__()
        self.strategy = strategy
        self.events: list[Event] = []
        self.flops = 0
        self._gradients_packed = False
        self._counts = True

    def backward(self, loss: Tensor, of: str) -> None:
        """Run a backward, behind which its gradients are needed."""
        super().backward(loss, of)
        self.events.append(Event("settled", self.flops))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back as what this process does to its part
        kwargs = kwargs or {}
        if func.namespace == "decovae":
            with self._only_messages(), self:  # past this mode's own key, where the call would come back here
                result = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if self._counts and (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        name = func._opname
        if func.namespace == "fsdp" and name.startswith("chunk_cat"):
            self._gradients_packed = True
        elif func.namespace == "fsdp" and name == "split_with_sizes_copy":
            self.events.append(Event("needed", self.flops))
        elif func.namespace in ("c10d", "_c10d_functional") and name not in LAYOUTS:
            self._note(name, args, result)
        return result

    @contextmanager
    def _only_messages(self) -> Iterator[None]:
        """Within an operator of this project, whose arithmetic its formula counts; it may send messages."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    def _note(self, name: str, args: Any, result: Any) -> None:
        what = MESSAGES[name]
        # A gather's result, and what goes into the others, are whole.
        tensors = _tensors(args[1] if name == "_reduce_scatter_base_" else result if what == "gather" else args[0])
        # Packed gradients are reduced across copies; what else is reduced is part of a loss or of a norm.
        sharding = self._counts and (what != "reduce" or (self._gradients_packed and self.strategy != "fsdp"))
        if what == "reduce":
            self._gradients_packed = False
        size = sum(tensor.nbytes for tensor in tensors)
        self.events.append(Event(what, self.flops, size, _scope(args), sharding))


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [tensor for part in found for tensor in _tensors(part)] if isinstance(found, list | tuple) else []


def _scope(args: Sequence[Any]) -> Scope:
    """Among whom a message goes."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in argument._type().qualified_name():
            ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(argument))
            break
    else:
        return "world"  # an operator that names its group: of a norm, over all
    if len(ranks) == WORLD:
        return "world"
    return "node" if ranks[0] // A_NODE == ranks[-1] // A_NODE else "across"

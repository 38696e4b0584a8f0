"""Channel moments of a process group's joint batch, from one all-gather of 1 + C + C² numbers a rank.

Gathered rather than summed: centred moments of different ranks add only after they have been moved to a common mean,
and Chan's merge does that without losing the digits that Σx² − (Σx)²/n loses.

Every message on a group has the size that its ranks last agreed on, so that a rank whose C differs can still say so: it
sends its C, negated, where the count would be. A rank that changes C waits for the answers; all ranks that read such a
message raise the same sentence.
"""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist

from decovae_kernels import packed as packing

# C that the ranks of a group last agreed on. It goes when the group goes: another of the same name starts afresh.
_AGREED: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()


def world_size(group_name: str) -> int:
    """How many ranks share the statistics; 1 for the empty name, which means no group."""
    return dist.get_world_size(_group(group_name)) if group_name else 1


def merge_across(packed: torch.Tensor, group_name: str) -> torch.Tensor:
    """Moments of all ranks' samples, the same bits on every rank; `packed` itself for the empty name.

    Raises:
        ValueError: the ranks have different numbers of channels. On CUDA, where counts are not read back at every
            step, a rank that did not change its C gets NaN instead.
    """
    if not group_name:
        return packed
    group = _group(group_name)
    channels = packing.channels_of(packed)
    agreed = _AGREED.get(group, 1)
    if channels != agreed:
        _agree(packed, channels, agreed, group)
    rows = _gather(packed, group)
    counts = rows[:, 0]
    if not packed.is_cuda:
        _refuse_disagreement([-int(count) if count < 0 else channels for count in counts.tolist()])
    poisoned = torch.where((counts < 0).any(), torch.nan, 0.0)
    return packing.merge_moments(rows) + poisoned


def _group(name: str) -> dist.ProcessGroup:
    # As torch's own operators take groups; torch.compile cannot hand on the group itself.
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]


def _gather(message: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    ranks = dist.get_world_size(group)
    rows = message.new_empty(ranks * message.numel())
    dist.all_gather_into_tensor(rows, message, group=group)
    return rows.view(ranks, -1)


def _agree(packed: torch.Tensor, channels: int, agreed: int, group: dist.ProcessGroup) -> None:
    message = packed.new_zeros(packing.size(agreed))
    message[0] = -channels
    # A count that is not negative comes from a rank that still has the agreed C.
    _refuse_disagreement([int(-count) if count < 0 else agreed for count in _gather(message, group)[:, 0].tolist()])
    _AGREED[group] = channels


def _refuse_disagreement(channels: list[int]) -> None:
    if len(set(channels)) > 1:
        listed = ", ".join(f"rank {rank} has {count}" for rank, count in enumerate(channels))
        raise ValueError(f"the ranks of a group need the same number of channels: {listed}; pass each rank the same C")

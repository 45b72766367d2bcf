"""Where the layers of a model are computed: how many on which device, and what stays on the CPU.

Pure: `choose` gets devices, sizes and wishes as numbers, and returns a `Placement` or raises `DoesNotFit`. The sizes of
weights are in the header of the file (`sizes_of`). Those of the KV cache and of the buffers of a step are measured by
llama.cpp itself in a dry run (`llambo/worker/llama/dry_run.py`), because each architecture computes them differently.

With `gpu_layers = auto` the first of these that fits is taken:

1. all layers on devices, with all slots; on one device if one is enough, else on several;
2. fewer slots (half as many, and so on), unless the user has set their number;
3. of a mixture of experts, the experts of as few layers as possible on the CPU, and all the rest on devices;
4. as many layers as fit, with all slots; perhaps none;
5. the same with fewer slots, if the memory of the host is the limit.

Context and KV type are never changed for the sake of a device: they are part of a model's fingerprint, and an answer
moves only between workers with the same one. A worker that quietly took half the context would take its machine out of
the mesh's failover, which costs more than a few slow layers. `hint` names them as something that the user can change.

llama.cpp counts the output as one more layer, and so do the numbers here: a model of 30 blocks has 31 layers. Layers
are put on devices from the output backwards, as llama.cpp does with `n_gpu_layers`. The embedding of the input always
stays on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from llambo.worker.models.gguf import ModelFile

MIB, GIB = 1024 * 1024, 1024 * 1024 * 1024
#: This much of what is free on a device stays free: drivers, other programs and pools need some. The larger of both.
MARGIN_BYTES, MARGIN_SHARE = GIB, 0.1
#: On the host, in addition to what a dry run measures: Python, tokenizer, samplers.
HOST_BYTES = 256 * MIB
#: With q8_0 instead of f16 the KV cache is this much smaller.
Q8_SHARE = 34 / 64


class DoesNotFit(Exception):
    """The text has the numbers, and what would fit. `host`: it is the memory of the host that is too small."""

    def __init__(self, text: str, *, host: bool) -> None:
        super().__init__(text)
        self.host = host


@dataclass(frozen=True, slots=True)
class ComputeDevice:
    """What the library lists. `integrated`: its memory is that of the host."""

    name: str
    description: str
    free_bytes: int
    total_bytes: int
    integrated: bool = False
    #: The PCI address, if it is known: two backends of one library may list the same card.
    address: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """Bytes. `cache`: of one slot."""

    weights: int = 0
    experts: int = 0
    cache: int = 0


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of a model's parts."""

    layers: tuple[Layer, ...]
    #: What the output needs on a device.
    output: int
    #: What the output needs on the host, if it is computed there: nothing if it shares the weights of the input.
    host_output: int
    #: Always on the host.
    input: int

    @property
    def all_layers(self) -> int:
        """With the output."""
        return len(self.layers) + 1

    @property
    def has_experts(self) -> bool:
        return any(layer.experts for layer in self.layers)

    @property
    def weights(self) -> int:
        """Bytes of all tensors in the file."""
        return self.input + self.host_output + sum(layer.weights + layer.experts for layer in self.layers)

    def with_cache(self, slots: int, cache: dict[int, int]) -> Sizes:
        """`cache`: bytes by layer, for all of these slots."""
        layers = [
            replace(layer, cache=math.ceil(cache.get(number, 0) / slots)) for number, layer in enumerate(self.layers)
        ]
        return replace(self, layers=tuple(layers))


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes of the buffers of a step: on each device that computes, and on the host."""

    device: int = 0
    host: int = 0


@dataclass(frozen=True, slots=True)
class Wish:
    #: Layers on devices: None is auto, -1 all.
    layers: int | None
    slots: int
    #: Whether fewer slots may be used.
    fewer_slots: bool = False
    #: What may be used on the host.
    host_free: int = 2**62
    #: The most to use of each device; 0: what is free.
    device_limit: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """What one device gets."""

    name: str
    layers: int
    used_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    #: In the order of the layers: the first one has the first layers, the last one has the output.
    shares: tuple[Share, ...] = ()
    all_layers: int = 0
    slots: int = 0
    #: The experts of so many layers, from the first one, are on the host.
    host_experts: int = 0
    host_bytes: int = 0
    #: For people: the reason for these numbers.
    why: str = ""

    @property
    def layers(self) -> int:
        return sum(share.layers for share in self.shares)

    def same_place(self, other: Placement) -> bool:
        """Whether the same layers are in the same places. The sizes may be others."""
        places = [[(share.name, share.layers) for share in each.shares] for each in (self, other)]
        rest = [(each.slots, each.host_experts) for each in (self, other)]
        return places[0] == places[1] and rest[0] == rest[1]

    def __str__(self) -> str:
        """`CUDA0: 31/31 layers, 1.2 of 24 GiB`."""
        if not self.shares:
            return "CPU"
        texts = [
            f"{share.name}: {share.layers}/{self.all_layers} layers, {gib(share.used_bytes)} of "
            f"{gib(share.total_bytes)} GiB"
            for share in self.shares
        ]
        if self.host_experts:
            texts.append(f"CPU: experts of {self.host_experts} layers")
        if self.layers < self.all_layers:
            texts.append(f"CPU: {self.all_layers - self.layers} layers")
        return ", ".join(texts)


#: No layers on a device.
CPU = Placement()


def gib(size: int) -> str:
    """In GiB, with a decimal where there is one, and with two below 1."""
    value = size / GIB
    return f"{value:.2f}" if 0 < value < 1 else f"{value:.1f}".removesuffix(".0")


# --- From the header of the file. ---


def sizes_of(parts: Sequence[ModelFile]) -> Sizes:
    """The sizes of weights, without cache. `parts`: the files of the model, of which the first has the metadata."""
    blocks = parts[0].number("block_count")
    weights, experts = [0] * blocks, [0] * blocks
    inputs = outputs = embedding = 0
    tied = True
    for name, size in (tensor for part in parts for tensor in part.tensor_sizes):
        block, _, rest = name.removeprefix("blk.").partition(".")
        if name.startswith("blk.") and block.isdigit() and int(block) < blocks:
            (experts if _is_expert(rest) else weights)[int(block)] += size
        elif name.startswith(("output", "cls")):
            outputs += size
            tied = tied and name != "output.weight"
        else:
            inputs += size
            embedding = size if name == "token_embd.weight" else embedding
    return Sizes(
        layers=tuple(Layer(*each) for each in zip(weights, experts, strict=True)),
        output=outputs + (embedding if tied else 0),
        host_output=outputs,
        input=inputs,
    )


def _is_expert(name: str) -> bool:
    """`ffn_up_exps.weight`; not `ffn_up_shexp.weight`, which each token uses."""
    return name.startswith("ffn_") and name.partition(".")[0].endswith("exps")


# --- The choice. ---


def usable(devices: Sequence[ComputeDevice]) -> list[ComputeDevice]:
    """Those that llama.cpp itself would use: each card once, and integrated ones only if there is no other.

    Of integrated ones only those of the first one's backend, because two backends may list the same.
    """
    found: list[ComputeDevice] = []
    for device in devices:
        if not device.address or all(device.address != other.address for other in found):
            found.append(device)
    cards = [device for device in found if not device.integrated]
    if cards or not found:
        return cards
    backend = found[0].name.rstrip("0123456789")
    return [device for device in found if device.name.rstrip("0123456789") == backend]


def room(device: ComputeDevice, wish: Wish) -> int:
    """Bytes of this device that the model may use."""
    free = min(device.free_bytes, wish.host_free) if device.integrated else device.free_bytes
    left = free - max(MARGIN_BYTES, int(free * MARGIN_SHARE))
    return max(0, min(left, wish.device_limit) if wish.device_limit else left)


def choose(wish: Wish, devices: Sequence[ComputeDevice], sizes: Sizes, work: Work) -> Placement:
    """The first way that fits, in the order above. Raises DoesNotFit. `devices`: the usable ones."""
    wanted = sizes.all_layers if wish.layers is None or wish.layers < 0 else min(wish.layers, sizes.all_layers)
    chooser = _Chooser(wish, sorted(devices, key=lambda device: -room(device, wish)), sizes, work)
    for slots in _slot_counts(wish):
        placement = chooser.fill(slots, wanted)
        if placement.layers == wanted and chooser.host_fits(placement):
            return replace(placement, why=chooser.why(placement))
    if wish.layers is not None:
        raise chooser.refusal(wanted)
    if sizes.has_experts and (found := chooser.with_experts_on_host(wanted)):
        return replace(found, why=chooser.why(found))
    for slots in _slot_counts(wish):
        placement = chooser.fill(slots, wanted)
        if chooser.host_fits(placement):
            return replace(placement, why=chooser.why(placement))
    raise chooser.host_refusal(placement)


def _slot_counts(wish: Wish) -> Iterator[int]:
    slots = wish.slots
    yield slots
    while wish.fewer_slots and slots > 1:
        slots //= 2
        yield slots


class _Chooser:
    """The numbers of one choice. `devices`: the one with the most room comes first, and gets the output."""

    def __init__(self, wish: Wish, devices: Sequence[ComputeDevice], sizes: Sizes, work: Work) -> None:
        self._wish, self._devices, self._sizes, self._work = wish, devices, sizes, work

    def fill(self, slots: int, wanted: int, host_experts: int = 0) -> Placement:
        """Layers on devices, from the output backwards, until `wanted` are there or the next one does not fit."""
        costs = self._costs(slots, host_experts)[:wanted]
        shares: list[Share] = []
        done = 0
        for device in self._devices:
            left, first = room(device, self._wish) - self._work.device, done
            while done < len(costs) and costs[done] <= left:
                left -= costs[done]
                done += 1
            if done > first:
                used = self._work.device + sum(costs[first:done])
                shares.append(Share(device.name, done - first, used, device.total_bytes))
        placement = Placement(tuple(reversed(shares)), self._sizes.all_layers, slots, host_experts)
        return replace(placement, host_bytes=self._host_bytes(placement))

    def _costs(self, slots: int, host_experts: int = 0) -> list[int]:
        """Bytes of each layer on a device, the output first."""
        costs = [
            layer.weights + (layer.experts if number >= host_experts else 0) + slots * layer.cache
            for number, layer in enumerate(self._sizes.layers)
        ]
        return [self._sizes.output, *reversed(costs)]

    def _host_bytes(self, placement: Placement) -> int:
        sizes = self._sizes
        total = HOST_BYTES + self._work.host + sizes.input + (0 if placement.layers else sizes.host_output)
        on_host = len(sizes.layers) - max(0, placement.layers - 1)
        for number, layer in enumerate(sizes.layers):
            if number < on_host:
                total += layer.weights + layer.experts + placement.slots * layer.cache
            elif number < placement.host_experts:
                total += layer.experts
        integrated = {device.name for device in self._devices if device.integrated}
        return total + sum(share.used_bytes for share in placement.shares if share.name in integrated)

    def host_fits(self, placement: Placement) -> bool:
        return placement.host_bytes <= self._wish.host_free

    def with_experts_on_host(self, wanted: int) -> Placement | None:
        """All layers on devices, with the experts of as few layers as possible on the host."""
        low, high = 1, len(self._sizes.layers)
        found = None
        while low <= high:
            middle = (low + high) // 2
            placement = self.fill(self._wish.slots, wanted, middle)
            if placement.layers == wanted:
                found, high = placement, middle - 1
            else:
                low = middle + 1
        return found if found is not None and self.host_fits(found) else None

    # Texts.

    def why(self, placement: Placement) -> str:
        wish, free = self._wish, self._room_text()
        if wish.layers is not None:
            text = "as asked for" if placement.layers else "no layers on a GPU, as asked for"
        elif placement.host_experts:
            text = f"with more experts it would not fit: {free}"
        elif placement.layers == placement.all_layers:
            text = "all layers fit"
        else:
            text = f"no more layers fit: {free}{self.hint(placement)}"
        if placement.slots < wish.slots:
            text += f"; {placement.slots} slots instead of {wish.slots}, for which there is no memory"
        return text

    def _room_text(self) -> str:
        texts = [
            f"{room(device, self._wish) // MIB} of {_mib(device.free_bytes)} that are free on {device.name}"
            for device in self._devices
        ]
        limit = f" (gpu_bytes is {_mib(self._wish.device_limit)})" if self._wish.device_limit else ""
        return f"{', '.join(texts)} may be used{limit}"

    def hint(self, placement: Placement) -> str:
        """What the user could change, if it would help."""
        smaller = replace(self._sizes, layers=tuple(
            replace(layer, cache=math.ceil(layer.cache * Q8_SHARE)) for layer in self._sizes.layers
        ))  # fmt: skip
        more = _Chooser(self._wish, self._devices, smaller, self._work).fill(placement.slots, placement.all_layers)
        if more.layers <= placement.layers:
            return ""
        return f"; --kv-type q8_0, on every worker of this model, makes room for {more.layers - placement.layers} more"

    def refusal(self, wanted: int) -> DoesNotFit:
        slots = list(_slot_counts(self._wish))[-1]
        best = self.fill(slots, wanted)
        if best.layers == wanted:
            return self.host_refusal(best)
        costs = self._costs(slots)[:wanted]
        cache = slots * sum(layer.cache for layer in self._sizes.layers[len(self._sizes.layers) - wanted + 1 :])
        text = (
            f"{wanted} of {self._sizes.all_layers} layers need {_mib(sum(costs) + self._work.device)}: "
            f"{_mib(sum(costs) - cache)} of weights, {_mib(cache)} of cache for {slots} slots, "
            f"{_mib(self._work.device)} to work in; {self._room_text()}"
        )
        fitting = f"--gpu-layers {best.layers} would fit" if best.layers else "no layer would fit"
        return DoesNotFit(f"{text}; {fitting}, --gpu-layers auto chooses by itself", host=False)

    def host_refusal(self, placement: Placement) -> DoesNotFit:
        need, free = _mib(placement.host_bytes), _mib(self._wish.host_free)
        where = f"with {placement.layers} of {placement.all_layers} layers on devices, " if placement.shares else ""
        text = f"{where}{need} of the host's memory are needed for {placement.slots} slots, and {free} are free"
        return DoesNotFit(f"{text}; a smaller --ctx, fewer --slots or a smaller model may fit", host=True)


def _mib(size: int) -> str:
    return f"{size // MIB} MiB"

"""Where layers go: big card, small card, several cards, integrated ones, none; what is given up first; refusals."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from llambo.worker.models.gguf import MetaValue, ModelFile
from llambo.worker.models.placement import (
    GIB,
    HOST_BYTES,
    MIB,
    ComputeDevice,
    DoesNotFit,
    Layer,
    Placement,
    Sizes,
    Wish,
    Work,
    choose,
    gib,
    room,
    sizes_of,
    usable,
)

#: An 8B model: 32 blocks of 140 MiB with 64 MiB of cache for a slot, and 410 MiB each for output and input.
BLOCKS = 32
MODEL = Sizes(tuple([Layer(140 * MIB, 0, 64 * MIB)] * BLOCKS), 410 * MIB, 410 * MIB, 410 * MIB)
WORK = Work(device=300 * MIB, host=20 * MIB)
ALL = BLOCKS + 1
#: A mixture of experts: 16 blocks of 50 MiB and 600 MiB of experts.
MIXTURE = Sizes(tuple([Layer(50 * MIB, 600 * MIB, 16 * MIB)] * 16), 300 * MIB, 300 * MIB, 300 * MIB)


def card(free: float, total: float = 0, name: str = "CUDA0", **more: Any) -> ComputeDevice:
    return ComputeDevice(name, "a card", int(free * GIB), int((total or free) * GIB), **more)


def auto(slots: int = 4, **more: Any) -> Wish:
    return Wish(**{"layers": None, "slots": slots, "fewer_slots": True, "host_free": 64 * GIB, **more})


def place(*devices: ComputeDevice, wish: Wish | None = None, sizes: Sizes = MODEL, work: Work = WORK) -> Placement:
    return choose(wish or auto(), devices, sizes, work)


def layers_on(placement: Placement) -> dict[str, int]:
    return {share.name: share.layers for share in placement.shares}


# --- auto ---


def test_a_big_card_gets_everything() -> None:
    placement = place(card(23, 24))
    assert (layers_on(placement), placement.slots, placement.host_experts) == ({"CUDA0": ALL}, 4, 0)
    assert placement.shares[0].used_bytes == (300 + 410 + BLOCKS * (140 + 4 * 64)) * MIB
    assert placement.host_bytes == HOST_BYTES + (20 + 410) * MIB
    assert str(placement) == "CUDA0: 33/33 layers, 13.1 of 24 GiB"
    assert placement.why == "all layers fit"


def test_fewer_slots_come_before_fewer_layers() -> None:
    # With 4 slots it needs 13.1 GiB, with 2 slots 9.1; 10.8 of 12 may be used.
    placement = place(card(12))
    assert (placement.layers, placement.slots) == (ALL, 2)
    assert placement.why == "all layers fit; 2 slots instead of 4, for which there is no memory"


def test_slots_that_the_user_has_set_stay() -> None:
    placement = place(card(12), wish=auto(fewer_slots=False))
    assert placement.slots == 4
    assert 0 < placement.layers < ALL
    assert "11059 of 12288 MiB that are free on CUDA0 may be used" in placement.why
    assert "--kv-type q8_0, on every worker of this model, makes room for" in placement.why


def test_a_small_card_gets_some_layers_and_all_slots_stay() -> None:
    """Slots that are given up only pay if the whole model then fits."""
    placement = place(card(4))
    per_layer = (140 + 4 * 64) * MIB
    assert (placement.layers, placement.slots) == ((3 * GIB - (300 + 410) * MIB) // per_layer + 1, 4)
    assert f"CUDA0: {placement.layers}/33 layers, " in str(placement)
    assert str(placement).endswith(f"CPU: {ALL - placement.layers} layers")
    on_host = BLOCKS - (placement.layers - 1)
    assert placement.host_bytes == HOST_BYTES + (20 + 410) * MIB + on_host * per_layer


@pytest.mark.parametrize("free", [0, 0.5, 1, 1.5])
def test_a_card_without_room_gets_nothing(free: float) -> None:
    placement = place(card(free, 8))
    assert placement.shares == ()
    assert str(placement) == "CPU"
    assert "no more layers fit" in placement.why


def test_no_device_is_the_cpu() -> None:
    placement = place()
    assert (placement.layers, placement.slots) == (0, 4)
    assert placement.host_bytes == HOST_BYTES + (20 + 2 * 410 + BLOCKS * (140 + 4 * 64)) * MIB


def test_one_card_is_used_if_it_is_enough() -> None:
    assert layers_on(place(card(10, name="CUDA0"), card(23, name="CUDA1"))) == {"CUDA1": ALL}


def test_two_cards_share_what_is_too_large_for_one() -> None:
    placement = place(card(8, name="CUDA0"), card(9, name="CUDA1"))
    assert (placement.layers, placement.slots) == (ALL, 4)
    # The larger one has the output, so it is the last one in the order of the layers.
    assert [share.name for share in placement.shares] == ["CUDA0", "CUDA1"]
    for share, device in zip(placement.shares, (card(8), card(9)), strict=True):
        assert share.used_bytes <= room(device, auto())
    assert str(placement).count("/33 layers") == 2


def test_gpu_bytes_limits_each_device() -> None:
    placement = place(card(23, 24), wish=auto(device_limit=2 * GIB))
    assert placement.shares[0].used_bytes <= 2 * GIB
    assert "gpu_bytes is 2048 MiB" in placement.why


def test_the_margin_is_a_gibibyte_or_a_tenth() -> None:
    assert room(card(4), auto()) == 3 * GIB
    assert room(card(80), auto()) == 72 * GIB
    assert room(card(0.5), auto()) == 0


# --- a mixture of experts ---


def test_experts_stay_on_the_host_before_whole_layers_do() -> None:
    # Dense parts, output, cache and buffers need 2.4 GiB, each layer of experts 600 MiB; 7 of 8 GiB may be used.
    placement = place(card(8), sizes=MIXTURE)
    assert (placement.layers, placement.slots) == (17, 4)
    dense = (300 + 300 + 16 * (50 + 4 * 16)) * MIB
    on_device = (7 * GIB - dense) // (600 * MIB)
    assert placement.host_experts == 16 - on_device
    assert str(placement).endswith(f"CPU: experts of {placement.host_experts} layers")
    assert placement.host_bytes == HOST_BYTES + (20 + 300 + placement.host_experts * 600) * MIB


def test_experts_without_room_for_the_rest_are_as_other_layers() -> None:
    placement = place(card(2.5), sizes=MIXTURE)
    assert (placement.host_experts, placement.layers < 17) == (0, True)


# --- integrated devices ---


def test_an_integrated_device_has_the_memory_of_the_host() -> None:
    """The smaller of what it reports and what the host lets us use, and both draw on the same memory."""
    device = card(30, 32, integrated=True)
    placement = place(device, wish=auto(host_free=16 * GIB))
    assert placement.layers == ALL
    assert placement.host_bytes == placement.shares[0].used_bytes + HOST_BYTES + (20 + 410) * MIB
    assert placement.host_bytes <= 16 * GIB
    assert place(device, wish=auto(host_free=12 * GIB)).slots == 2
    with pytest.raises(DoesNotFit):
        place(device, wish=auto(host_free=4 * GIB))


def test_integrated_devices_are_used_only_without_cards() -> None:
    small, large = card(8, name="Vulkan0", integrated=True), card(20, name="Vulkan1")
    assert usable([small, large]) == [large]
    assert usable([small]) == [small]
    assert usable([]) == []
    assert usable([small, replace(small, name="ROCm0")]) == [small]
    assert usable([small, replace(small, name="Vulkan1")]) == [small, replace(small, name="Vulkan1")]


def test_a_card_that_two_backends_list_is_used_once() -> None:
    first = card(20, name="CUDA0", address="0000:01:00.0")
    second, other = replace(first, name="Vulkan0"), replace(first, name="Vulkan1", address="0000:02:00.0")
    assert usable([first, second, other]) == [first, other]
    assert len(usable([card(1, name="A0"), card(1, name="A1")])) == 2, "no address says nothing"


# --- an explicit number ---


@pytest.mark.parametrize(("layers", "placed"), [(-1, ALL), (ALL, ALL), (1000, ALL), (10, 10), (1, 1), (0, 0)])
def test_a_number_is_followed(layers: int, placed: int) -> None:
    assert place(card(23, 24), wish=auto(layers=layers)).layers == placed


def test_a_number_may_cost_slots_that_are_not_set() -> None:
    assert place(card(12), wish=auto(layers=-1)).slots == 2


def test_a_number_that_is_too_large_is_refused_with_what_fits() -> None:
    with pytest.raises(DoesNotFit) as refused:
        place(card(4), wish=auto(layers=20, fewer_slots=False))
    text = str(refused.value)
    fitting = place(card(4), wish=auto(fewer_slots=False)).layers
    assert f"20 of 33 layers need {300 + 410 + 19 * (140 + 4 * 64)} MiB: " in text
    assert f"{410 + 19 * 140} MiB of weights, {19 * 4 * 64} MiB of cache for 4 slots, 300 MiB to work in" in text
    assert "3072 of 4096 MiB that are free on CUDA0 may be used" in text
    assert f"--gpu-layers {fitting} would fit, --gpu-layers auto chooses by itself" in text
    assert place(card(4), wish=auto(layers=fitting, fewer_slots=False)).layers == fitting


def test_a_card_that_is_too_small_for_one_layer_is_refused() -> None:
    with pytest.raises(DoesNotFit, match="; no layer would fit, --gpu-layers auto chooses by itself"):
        place(card(1), wish=auto(layers=1))


def test_a_number_keeps_experts_where_they_are() -> None:
    with pytest.raises(DoesNotFit):
        place(card(8), sizes=MIXTURE, wish=auto(layers=-1))


# --- the host ---


def test_slots_are_given_up_for_the_host_too() -> None:
    everything = place().host_bytes
    assert place(wish=auto(host_free=everything)).slots == 4
    assert place(wish=auto(host_free=everything - 1)).slots == 2


def test_a_host_that_is_too_small_is_refused() -> None:
    with pytest.raises(DoesNotFit, match=r"MiB of the host's memory are needed for 1 slots, and 3072 MiB are free"):
        place(wish=auto(host_free=3 * GIB))
    with pytest.raises(DoesNotFit, match=r"with \d+ of 33 layers on devices, .* and 2048 MiB are free"):
        place(card(4), wish=auto(host_free=2 * GIB))


# --- everywhere ---


def test_nothing_is_ever_placed_beyond_its_room() -> None:
    outcomes = [check_one(random.Random(seed)) for seed in range(300)]
    assert 50 < outcomes.count("placed") < 280, "both are tried"


def check_one(chance: random.Random) -> str:
    layers = tuple(
        Layer(chance.randrange(400) * MIB, chance.choice([0, 0, 900]) * MIB, chance.randrange(90) * MIB)
        for _ in range(chance.randrange(1, 60))
    )
    sizes = Sizes(layers, *(chance.randrange(900) * MIB for _ in range(3)))
    devices = [
        ComputeDevice(f"CUDA{number}", "", chance.randrange(40) * GIB // 2, 20 * GIB)
        for number in range(chance.randrange(4))
    ]
    wish = auto(
        slots=chance.randrange(1, 9), fewer_slots=chance.random() < 0.5,
        layers=chance.choice([None, None, -1, chance.randrange(70)]), host_free=chance.randrange(1, 64) * GIB,
    )  # fmt: skip
    work = Work(chance.randrange(500) * MIB, chance.randrange(100) * MIB)
    try:
        placement = choose(wish, devices, sizes, work)
    except DoesNotFit:
        return "refused"
    assert placement.host_bytes <= wish.host_free
    assert all(share.layers > 0 for share in placement.shares)
    rooms = {device.name: room(device, wish) for device in devices}
    assert all(share.used_bytes <= rooms[share.name] for share in placement.shares)
    assert 1 <= placement.slots <= wish.slots
    assert wish.fewer_slots or placement.slots == wish.slots
    # Each byte is counted once: on a device, or on the host.
    on_devices = sum(share.used_bytes - work.device for share in placement.shares)
    cache = placement.slots * sum(layer.cache for layer in layers)
    output = sizes.output if placement.layers else sizes.host_output
    everything = sizes.weights - sizes.host_output + output + cache + HOST_BYTES + work.host
    assert on_devices + placement.host_bytes == everything
    return "placed"


# --- sizes from the header ---


def test_sizes_are_those_of_the_tensors() -> None:
    tensors = [
        ("token_embd.weight", 100), ("output_norm.weight", 1), ("output.weight", 90), ("rope_freqs.weight", 2),
        ("blk.0.attn_q.weight", 10), ("blk.0.ffn_up_exps.weight", 50), ("blk.0.ffn_up_shexp.weight", 5),
        ("blk.0.ffn_gate_inp.weight", 1), ("blk.1.attn_q.weight", 20), ("blk.1.ffn_down_exps.weight", 60),
        ("blk.1.ffn_gate_up_exps.weight", 7), ("blk.1.ffn_up_chexps.weight", 3), ("blk.7.attn_q.weight", 1000),
    ]  # fmt: skip
    meta: dict[str, MetaValue] = {"general.architecture": "llama", "llama.block_count": 2}
    first = ModelFile("a", 0, meta, 0, tuple(tensors[:5]))
    second = ModelFile("b", 0, {}, 0, tuple(tensors[5:]))
    sizes = sizes_of([first, second])
    assert sizes.layers == (Layer(16, 50), Layer(20, 70))
    # A tensor of a block that the model does not have is counted as input: somewhere, and not on a device.
    assert (sizes.input, sizes.output, sizes.host_output) == (1102, 91, 91)
    assert sizes.weights == sum(size for _, size in tensors)


def test_an_output_that_shares_the_weights_of_the_input_is_copied_to_a_device() -> None:
    meta: dict[str, MetaValue] = {"general.architecture": "llama", "llama.block_count": 1}
    tensors = (("token_embd.weight", 100), ("output_norm.weight", 1), ("blk.0.x", 3))
    sizes = sizes_of([ModelFile("a", 0, meta, 0, tensors)])
    assert (sizes.input, sizes.output, sizes.host_output, sizes.weights) == (100, 101, 1, 104)


def test_the_cache_is_per_slot() -> None:
    sizes = sizes_of([ModelFile("a", 0, {"general.architecture": "x", "x.block_count": 2}, 0)])
    assert [layer.cache for layer in sizes.with_cache(4, {0: 401}).layers] == [101, 0]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0"), (GIB // 2, "0.50"), (GIB, "1"), (int(1.25 * GIB), "1.2"), (24 * GIB, "24"), (int(23.6 * GIB), "23.6")],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert gib(size) == text

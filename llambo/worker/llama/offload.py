"""A placement of layers, as parameters of llama.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

from llambo.worker.llama import c_api
from llambo.worker.models.placement import Placement

#: More than llama.cpp can have.
MAX_DEVICES = 256


class Offload:
    """Arrays to which the parameters refer: they have to live as long as the model."""

    def __init__(self, lib: Any, placement: Placement) -> None:
        """`lib`: the functions of llama.cpp."""
        handles = [lib.ggml_backend_dev_get(number) for number in range(lib.ggml_backend_dev_count())]
        by_name = {lib.ggml_backend_dev_name(handle).decode(errors="replace"): handle for handle in handles}
        shares, cpu = placement.shares, lib.ggml_backend_cpu_buffer_type()
        self._layers = placement.layers
        # It ends with a null pointer. An empty list means the CPU alone, and no list all devices.
        self._devices = (ctypes.c_void_p * (len(shares) + 1))(*(by_name[share.name] for share in shares))
        self._split = (ctypes.c_float * MAX_DEVICES)(*(share.layers for share in shares))
        experts = [
            c_api.TensorOverride(rb"^blk\.%d\.ffn_.*exps" % number, cpu) for number in range(placement.host_experts)
        ]
        self._overrides = (c_api.TensorOverride * (len(experts) + 1))(*experts)

    def set(self, params: Any) -> None:
        params.devices = ctypes.addressof(self._devices)
        params.n_gpu_layers = self._layers
        params.tensor_split = self._split
        if len(self._overrides) > 1:
            params.tensor_buft_overrides = ctypes.addressof(self._overrides)

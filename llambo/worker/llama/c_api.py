"""The structs and functions of llama.h and ggml-backend.h that llambo uses, for ctypes.

A struct has the fields of its C namesake, in order: `LlamaBatch` is `llama_batch`, `ModelParams` is
`llama_model_params`. `INTERFACES` has what differs between releases of llama.cpp. A release gets into it after its
header was compared with these fields, and a test compares them with those that llama-cpp-python declares.
"""

from __future__ import annotations

import ctypes
import re
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass
from typing import Any

LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
ProgressCallback = ctypes.CFUNCTYPE(c_bool, c_float, c_void_p)
_EvalCallback = ctypes.CFUNCTYPE(c_bool, c_void_p, c_bool, c_void_p)
AbortCallback = ctypes.CFUNCTYPE(c_bool, c_void_p)


class TokenData(ctypes.Structure):
    _fields_ = [("id", c_int32), ("logit", c_float), ("p", c_float)]


class TokenDataArray(ctypes.Structure):
    _fields_ = [("data", POINTER(TokenData)), ("size", c_size_t), ("selected", c_int64), ("sorted", c_bool)]


class LlamaBatch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


class ChainParams(ctypes.Structure):
    _fields_ = [("no_perf", c_bool)]


class TensorOverride(ctypes.Structure):
    _fields_ = [("pattern", c_char_p), ("buft", c_void_p)]


class DeviceProps(ctypes.Structure):
    _fields_ = [
        ("name", c_char_p),
        ("description", c_char_p),
        ("memory_free", c_size_t),
        ("memory_total", c_size_t),
        ("type", c_int),
        ("device_id", c_char_p),
        # Abilities, which are not used here, and room for more.
        ("rest", ctypes.c_ubyte * 256),
    ]


class ModelParams(ctypes.Structure):
    _fields_ = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", POINTER(c_float)),
        ("progress_callback", ProgressCallback),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    ]


#: Of `llama_context_params`: before and after the place where releases differ.
_CONTEXT: tuple[tuple[str, Any], ...] = (
    *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
    *((name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
    *((name, c_int32) for name in ("n_threads", "n_threads_batch")),
    *((name, c_int) for name in ("ctx_type", "rope_scaling_type", "pooling_type", "attention_type")),
    ("flash_attn_type", c_int),
    *((name, c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
    *((name, c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
    ("yarn_orig_ctx", c_uint32),
    ("defrag_thold", c_float),
    ("cb_eval", _EvalCallback),
    ("cb_eval_user_data", c_void_p),
    ("type_k", c_int),
    ("type_v", c_int),
)
_CONTEXT_END: tuple[tuple[str, Any], ...] = (
    ("abort_callback", AbortCallback),
    ("abort_callback_data", c_void_p),
    *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
    ("samplers", c_void_p),
    ("n_samplers", c_size_t),
    ("ctx_other", c_void_p),
)


@dataclass(frozen=True, slots=True)
class Interface:
    """The structs of some releases of llama.cpp. What they have in common is declared above."""

    name: str
    #: Package and version of the libraries that were compared with it.
    releases: frozenset[tuple[str, str]]
    context_params: type[ctypes.Structure]


def _interface(name: str, releases: set[tuple[str, str]], *more: tuple[str, Any]) -> Interface:
    members = {"_fields_": [*_CONTEXT, *more, *_CONTEXT_END]}
    return Interface(name, frozenset(releases), type("ContextParams", (ctypes.Structure,), members))


INTERFACES = (
    _interface("llama.cpp 0.5", {("llama-cpp-python", "0.3.36")}),
    _interface("llama.cpp 0.6", {("xllamacpp", "2026.10.11549")}, ("moe_cache_size", c_size_t)),
)
#: Values that `*_default_params()` sets. Of the other fields, pointers are null and switches are 0 or 1.
MODEL_DEFAULTS = {
    "n_gpu_layers": -1, "split_mode": 1, "main_gpu": 0,
    "vocab_only": False, "check_tensors": False, "use_extra_bufts": True, "no_alloc": False,
}  # fmt: skip
CONTEXT_DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1,
    "rope_scaling_type": -1, "pooling_type": -1, "attention_type": -1, "flash_attn_type": -1,
    "yarn_ext_factor": -1.0, "type_k": 1, "type_v": 1,
    "embeddings": False, "offload_kqv": True, "no_perf": True, "op_offload": True, "kv_unified": False,
    "n_samplers": 0,
}  # fmt: skip

_PTR, _TOKENS = c_void_p, POINTER(c_int32)
#: Result and arguments. Pointers to what is llama.cpp's own are addresses.
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, _PTR]),
    "llama_version": (c_char_p, []),
    "llama_print_system_info": (c_char_p, []),
    "llama_supports_gpu_offload": (c_bool, []),
    "llama_free": (None, [_PTR]),
    "llama_n_ctx_seq": (c_uint32, [_PTR]),
    "llama_get_memory": (_PTR, [_PTR]),
    "llama_get_logits": (POINTER(c_float), [_PTR]),
    "llama_get_embeddings": (POINTER(c_float), [_PTR]),
    "llama_get_embeddings_seq": (POINTER(c_float), [_PTR, c_int32]),
    "llama_decode": (c_int32, [_PTR, LlamaBatch]),
    "llama_batch_init": (LlamaBatch, [c_int32, c_int32, c_int32]),
    "llama_memory_seq_cp": (None, [_PTR, c_int32, c_int32, c_int32, c_int32]),
    "llama_memory_seq_rm": (c_bool, [_PTR, c_int32, c_int32, c_int32]),
    "llama_memory_seq_pos_max": (c_int32, [_PTR, c_int32]),
    "llama_model_default_params": (ModelParams, []),
    "llama_model_load_from_file": (_PTR, [c_char_p, ModelParams]),
    "llama_model_free": (None, [_PTR]),
    "llama_adapter_lora_init": (_PTR, [_PTR, c_char_p]),
    "llama_set_adapters_lora": (c_int32, [_PTR, POINTER(_PTR), c_size_t, POINTER(c_float)]),
    "llama_model_get_vocab": (_PTR, [_PTR]),
    "llama_model_desc": (c_int32, [_PTR, c_char_p, c_size_t]),
    "llama_model_meta_val_str": (c_int32, [_PTR, c_char_p, c_char_p, c_size_t]),
    "llama_model_has_decoder": (c_bool, [_PTR]),
    "llama_model_has_encoder": (c_bool, [_PTR]),
    "llama_model_n_ctx_train": (c_int32, [_PTR]),
    "llama_model_n_embd_out": (c_int32, [_PTR]),
    "llama_model_n_cls_out": (c_uint32, [_PTR]),
    "llama_model_n_layer": (c_int32, [_PTR]),
    "llama_model_size": (ctypes.c_uint64, [_PTR]),
    "llama_model_n_params": (ctypes.c_uint64, [_PTR]),
    "llama_vocab_bos": (c_int32, [_PTR]),
    "llama_vocab_eos": (c_int32, [_PTR]),
    "llama_vocab_sep": (c_int32, [_PTR]),
    "llama_vocab_get_add_bos": (c_bool, [_PTR]),
    "llama_vocab_get_add_eos": (c_bool, [_PTR]),
    "llama_vocab_get_add_sep": (c_bool, [_PTR]),
    "llama_vocab_is_eog": (c_bool, [_PTR, c_int32]),
    "llama_vocab_n_tokens": (c_int32, [_PTR]),
    "llama_tokenize": (c_int32, [_PTR, c_char_p, c_int32, _TOKENS, c_int32, c_bool, c_bool]),
    "llama_token_to_piece": (c_int32, [_PTR, c_int32, c_char_p, c_int32, c_int32, c_bool]),
    "llama_sampler_chain_default_params": (ChainParams, []),
    "llama_sampler_chain_init": (_PTR, [ChainParams]),
    "llama_sampler_chain_add": (None, [_PTR, _PTR]),
    "llama_sampler_init_grammar": (_PTR, [_PTR, c_char_p, c_char_p]),
    "llama_sampler_init_dry": (_PTR, [_PTR, c_float, c_float, c_int32, c_int32, POINTER(c_char_p), c_size_t]),
    "llama_sampler_init_top_k": (_PTR, [c_int32]),
    "llama_sampler_init_typical": (_PTR, [c_float, c_size_t]),
    "llama_sampler_init_top_p": (_PTR, [c_float, c_size_t]),
    "llama_sampler_init_min_p": (_PTR, [c_float, c_size_t]),
    "llama_sampler_accept": (None, [_PTR, c_int32]),
    "llama_sampler_apply": (None, [_PTR, POINTER(TokenDataArray)]),
    "llama_sampler_free": (None, [_PTR]),
    "ggml_version": (c_char_p, []),
    "ggml_commit": (c_char_p, []),
    "ggml_backend_load_all_from_path": (None, [c_char_p]),
    "ggml_backend_cpu_buffer_type": (_PTR, []),
    "ggml_backend_reg_count": (c_size_t, []),
    "ggml_backend_reg_get": (_PTR, [c_size_t]),
    "ggml_backend_reg_name": (c_char_p, [_PTR]),
    "ggml_backend_dev_count": (c_size_t, []),
    "ggml_backend_dev_get": (_PTR, [c_size_t]),
    "ggml_backend_dev_name": (c_char_p, [_PTR]),
    "ggml_backend_dev_description": (c_char_p, [_PTR]),
    "ggml_backend_dev_type": (c_int, [_PTR]),
    "ggml_backend_dev_get_props": (None, [_PTR, POINTER(DeviceProps)]),
    "ggml_backend_dev_memory": (None, [_PTR, POINTER(c_size_t), POINTER(c_size_t)]),
}


def c_name(struct: type[ctypes.Structure]) -> str:
    return "llama" + re.sub(r"(?=[A-Z])", "_", struct.__name__.removeprefix("Llama")).lower()


def functions(interface: Interface) -> dict[str, tuple[Any, list[Any]]]:
    """All functions that llambo calls, with their result and arguments in this interface."""
    params = interface.context_params
    return {
        **_FUNCTIONS,
        "llama_context_default_params": (params, []),
        "llama_init_from_model": (_PTR, [_PTR, params]),
    }


#: Shared libraries that llama.cpp may need, and the package of each, by the family of the distribution.
SYSTEM_PACKAGES = {
    "libgomp.so.1": {"debian": "libgomp1", "fedora": "libgomp", "suse": "libgomp1", "arch": "gcc-libs"},
    "libstdc++.so.6": {"debian": "libstdc++6", "fedora": "libstdc++", "suse": "libstdc++6", "arch": "gcc-libs"},
    "libvulkan.so.1": {
        "debian": "libvulkan1", "fedora": "vulkan-loader", "suse": "libvulkan1", "arch": "vulkan-icd-loader",
    },
}  # fmt: skip

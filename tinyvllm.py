"""tinyvllm: an LLM inference engine to read from top to bottom.

    python tinyvllm.py --prompt "What is PagedAttention?"

    1. Config                 config.json, read and checked                            (lesson 3)
    2. Weights                safetensors -> arrays, fused where one matmul serves two  (2 and 3)
    3. Tokenizer              text <-> token ids, the chat template, streaming text    (lesson 0)
    4. Sampling parameters    what a caller may ask for, checked                       (lesson 15)
    5. Requests and outputs   what the engine keeps of a request, what the caller gets
    6. BlockAllocator         the KV cache is a pool of blocks                (lessons 11 and 14)
    7. Host and Gpu           where arrays live and how a step is run                  (lesson 16)
    8. Engine                 schedule -> pack -> forward -> sample -> retire  (lessons 1, 13-15)
    9. What a step did        --explain, --step and --trace               (lessons 13, 14 and 15)
   10. Command line

The computation itself is in kernels_numba.py, whose dimension key (T, B, S, C, ...) holds here too.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from array import array as machine_words
from collections import Counter, OrderedDict, deque
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Iterator

import jinja2
import jinja2.ext
import jinja2.sandbox
import ml_dtypes                              # teaches NumPy, and safetensors, bfloat16
import numpy as np
import tokenizers
from numba import cuda
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import kernels_numba as kernels
from kernels_numba import ceil_div

HOME = Path(__file__).resolve().parent
DEMO = HOME / "demo"                           # the embedded default model


class UserError(ValueError):
    """Bad input: the message is one sentence that says what was found and what would work."""


def format_bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


# -----------------------------------------------------------------------------
# 1. Config                                                           (lesson 3)

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
ROPE_TYPES = {"default": (),
              "linear": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                         "original_max_position_embeddings")}


@dataclass(frozen=True)
class Config:
    """The shape of a Llama, named as config.json names it."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_theta: float
    rope_scaling: dict                             # always has "rope_type"
    eos_token_ids: frozenset[int]


def read_text(path: Path) -> str:
    """A text file of the checkpoint; UserError names it and what is wrong with it."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}: expected a Hugging Face checkpoint "
                        "directory (config.json, model.safetensors, tokenizer.json)") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): download it "
                        "again") from None


def read_json(path: Path) -> dict:
    """The object in a JSON file; UserError names the file and where it breaks."""
    text = read_text(path)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}: {error.msg}"
        reason = describe_wrong_file(path) or place
        raise UserError(f"{path} is not valid JSON ({reason})") from None
    except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path} is not valid JSON ({reason})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a JSON {type(data).__name__}, expected an object")
    return data


def is_number(value) -> bool:
    """A finite int or float; True and False, NaN and infinity are none."""
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) \
        and math.isfinite(value)


def load_config(directory: Path) -> Config:
    """Reads config.json, and refuses what this engine cannot run."""
    path = directory / "config.json"
    raw = read_json(path)
    refuse_unsupported(raw, path)

    def number(name: str, kind=int):
        value = raw.get(name)
        if not is_number(value) or kind(value) != value or value <= 0:
            raise UserError(f"{path}: {name} is {value!r}, expected a positive {kind.__name__}")
        return kind(value)

    H, C = number("num_attention_heads"), number("hidden_size")
    G = number("num_key_value_heads") if raw.get("num_key_value_heads") is not None else H
    D = number("head_dim") if raw.get("head_dim") is not None else C // H
    if H % G:
        raise UserError(f"{path}: {H} attention heads cannot be shared by {G} key/value heads, "
                        "expected a divisor")
    if D < 2 or D % 2:
        raise UserError(f"{path}: head_dim is {D}, expected an even number for RoPE")
    rope = rope_parameters(raw, path)
    return Config(
        vocab_size=number("vocab_size"), hidden_size=C,
        intermediate_size=number("intermediate_size"),
        num_hidden_layers=number("num_hidden_layers"), num_attention_heads=H,
        num_key_value_heads=G, head_dim=D,
        rms_norm_eps=number("rms_norm_eps", float),
        max_position_embeddings=number("max_position_embeddings"),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        rope_theta=float(rope["rope_theta"]), rope_scaling=rope,
        eos_token_ids=eos_token_ids(raw, path))


def refuse_unsupported(raw: dict, path: Path) -> None:
    named = raw.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else named
    if architecture not in ARCHITECTURES:
        found = architecture or f"model_type {raw.get('model_type')!r}"
        raise UserError(f"{path}: {found} is not supported, expected one of "
                        f"{', '.join(ARCHITECTURES)}")
    if architecture == "MistralForCausalLM" and "sliding_window" not in raw:
        raise UserError(f"{path}: sliding_window is missing, which means 4096 for Mistral; "
                        "supported is only null")
    plain_values = {"sliding_window": None, "attention_bias": False, "mlp_bias": False,
                    "hidden_act": "silu", "quantization_config": None}
    for name, plain in plain_values.items():
        if raw.get(name, plain) != plain:
            raise UserError(f"{path}: {name} is {raw[name]!r}, supported is only {plain!r}")


def rope_parameters(raw: dict, path: Path) -> dict:
    """One spelling for both: the older rope_scaling + rope_theta, and the newer rope_parameters."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: the RoPE parameters are {rope!r}, expected an object")
    rope = dict(rope)
    rope_type = rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise UserError(f"{path}: rope_type {rope_type!r} is not supported, expected one of "
                        f"{', '.join(ROPE_TYPES)}")
    for name in ("rope_theta",) + ROPE_TYPES[rope_type]:
        if not is_number(rope.get(name)) or rope[name] <= 0:
            raise UserError(f"{path}: rope_type {rope_type!r} has {name} {rope.get(name)!r}, "
                            "expected a positive number")
    return rope


def generation_config(directory: Path) -> dict:
    """The author's sampling and end-of-sequence ids; {} where the checkpoint has none."""
    path = directory / "generation_config.json"
    return read_json(path) if path.exists() else {}


def eos_token_ids(raw: dict, path: Path) -> frozenset[int]:
    """Those that config.json or generation_config.json lists: Llama 3.2 Instruct has three."""
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if not is_token_id(token, 1 << 32):
            raise UserError(f"{path}: eos_token_id holds {token!r}, expected token ids")
    return frozenset(ids)


def is_token_id(token, vocab_size: int) -> bool:
    """An integer, of Python or NumPy, from 0 up to vocab_size."""
    return isinstance(token, (int, np.integer)) and not isinstance(token, bool) \
        and 0 <= token < vocab_size


def are_token_ids(ids: list, vocab_size: int) -> bool:
    """Whether all of a prompt, one token at least, are such integers of Python's own: each pass in
    C, for the GPU waits meanwhile."""
    if list(map(type, ids)).count(int) != len(ids):
        return False
    try:
        return bool(np.asarray(machine_words("I", ids)).max() < vocab_size)
    except OverflowError:                              # below 0, or above 32 bits
        return False


def find_checkpoint(model: str | Path, revision: str | None = None,
                    token: str | None = None) -> Path:
    """A local directory, or a hub id: from the Hugging Face cache, downloaded if it is not there.

    HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to
    huggingface_hub.
    """
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise UserError(f"{path} is a file: --model takes the checkpoint's directory or a hub id")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(model)):
        raise UserError(f"there is no directory {path}, and it is no hub id either: expected a "
                        "directory or ORGANISATION/NAME such as meta-llama/Llama-3.2-1B-Instruct")
    import huggingface_hub                         # slow to import, and only hub ids need it
    from huggingface_hub import errors
    try:
        wanted = ["*.json", "*.safetensors", "*.jinja"]
        return Path(huggingface_hub.snapshot_download(
            str(model), revision=revision, token=token, allow_patterns=wanted,
            ignore_patterns=["original/*", "consolidated*"]))
    except errors.GatedRepoError:
        raise UserError(f"{model} is gated: accept its licence on the hub, then set HF_TOKEN to "
                        "your access token") from None
    except errors.HFValidationError as error:
        raise UserError(f"{model} is no valid hub id ({error})") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"the hub has no model {model}, or it is private and HF_TOKEN is not set") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{model} has no revision {revision!r} on the hub") from None
    except Exception as error:                     # no network, offline mode, a bad HF_ENDPOINT
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if offline else str(error).split("\n")[0]
        raise UserError(f"{model} is not in the Hugging Face cache and cannot be downloaded "
                        f"({reason}): give --model a local directory, or allow the download "
                        "once") from None


# -----------------------------------------------------------------------------
# 2. Weights                                                   (lessons 2 and 3)
#
# Everything is allocated first, and one table says where each tensor of the checkpoint goes: a view
# of its final place, whose shape is the expected shape. q, k and v are rows of one matrix, so are
# gate and up: one matmul reads its input once. All matrices lie in one array in the order in which
# a step reads them. The table is checked as a whole, then filled tensor by tensor. On the CPU
# elements are float32; on the GPU float32, float16, or bfloat16 as uint16.

ELEMENTS = {"bfloat16": np.dtype(np.uint16), "float16": np.dtype(np.float16),
            "float32": np.dtype(np.float32)}
CHECKPOINT_TYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass
class LayerWeights:
    norm_attn: np.ndarray                          # (C,)
    wqkv: np.ndarray                               # ((H + 2G) * D, C): q, then k, then v
    wo: np.ndarray                                 # (C, H * D)
    norm_mlp: np.ndarray                           # (C,)
    w_gate_up: np.ndarray                          # (2F, C): gate, then up
    w_down: np.ndarray                             # (C, F)


@dataclass
class Weights:
    embed: np.ndarray                              # (V, C), lm_head itself where tied
    layers: list[LayerWeights]
    norm: np.ndarray                               # (C,)
    lm_head: np.ndarray                            # (V, C)
    matrices: np.ndarray                           # (elements,): of all layers, then lm_head
    norms: np.ndarray                              # (2L + 1, C): of all layers, then norm

    def arrays(self) -> list:
        """Each weight once."""
        tied = self.embed is self.lm_head
        return [self.matrices, self.norms] + [self.embed] * (not tied)


def new_float32(*shape: int) -> np.ndarray:
    return np.empty(shape, np.float32)


def allocate_weights(cfg: Config, new: Callable = new_float32) -> tuple[Weights, dict]:
    """Uninitialised weights made by `new`, and the table: checkpoint name -> the view to fill."""
    C, F, V, D = cfg.hidden_size, cfg.intermediate_size, cfg.vocab_size, cfg.head_dim
    H, G, L = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.num_hidden_layers
    q_rows, kv_rows = H * D, G * D
    size = L * kernels.layer_size(H, G, D, C, F)
    matrices, norms = new(size + V * C), new(2 * L + 1, C)
    lm_head = matrices[size:].reshape(V, C)
    embed = lm_head if cfg.tie_word_embeddings else new(V, C)
    weights = Weights(embed, [], norms[2 * L], lm_head, matrices, norms)
    table = {"model.embed_tokens.weight": embed, "model.norm.weight": weights.norm}
    if not cfg.tie_word_embeddings:
        table["lm_head.weight"] = lm_head
    for l in range(L):
        wqkv, wo, w_gate_up, w_down = kernels.matrices_of_layer(matrices, l, H, G, D, C, F)
        w = LayerWeights(norms[2 * l], wqkv, wo, norms[2 * l + 1], w_gate_up, w_down)
        weights.layers.append(w)
        places = {"input_layernorm": w.norm_attn, "post_attention_layernorm": w.norm_mlp,
                  "self_attn.q_proj": w.wqkv[:q_rows],
                  "self_attn.k_proj": w.wqkv[q_rows:q_rows + kv_rows],
                  "self_attn.v_proj": w.wqkv[q_rows + kv_rows:], "self_attn.o_proj": w.wo,
                  "mlp.gate_proj": w.w_gate_up[:F], "mlp.up_proj": w.w_gate_up[F:],
                  "mlp.down_proj": w.w_down}
        table.update({f"model.layers.{l}.{name}.weight": view for name, view in places.items()})
    return weights, table


def weight_shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> expected shape, without allocating anything."""
    _, table = allocate_weights(cfg, lambda *shape: np.broadcast_to(np.float32(0), shape))
    return {name: view.shape for name, view in table.items()}


class Checkpoint:
    """The safetensors files of a directory, opened, and every tensor checked against the config."""

    def __init__(self, cfg: Config, directory: Path):
        self.cfg, self.directory = cfg, directory
        files = [open_safetensors(directory / name) for name in checkpoint_files(directory)]
        self.home = {tensor: file for file in files for tensor in file.keys()}
        self.shapes = weight_shapes(cfg)
        check_tensors(cfg, directory, self.home, self.shapes)
        embedding = self.home["model.embed_tokens.weight"].get_slice("model.embed_tokens.weight")
        self.dtype = CHECKPOINT_TYPES[embedding.get_dtype()]

    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def load(self, new: Callable, put: Callable) -> Weights:
        """Copies each tensor once to its place: put(place, tensor)."""
        try:
            weights, table = allocate_weights(self.cfg, new)   # pages come when they are written
        except UserError:                              # of the GPU, with what to do
            raise
        except (MemoryError, ValueError) as error:     # ValueError: larger than any address space
            raise UserError(f"{self.directory} does not fit into memory ({error})") from None
        for name, place in tqdm(table.items(), desc="loading weights", unit=" tensors", delay=1,
                                leave=False):
            put(place, self.home[name].get_tensor(name))
        return weights


def check_memory(needed: int, present: int, directory: Path, dtype: str, place: str) -> None:
    """Refuses weights that cannot be held, before the system or the driver ends the process."""
    if needed > present:
        raise UserError(f"{directory} needs {format_bytes(needed)} as {dtype}, {place} has "
                        f"{format_bytes(present)} of memory: choose a smaller model"
                        + (", or --device cpu" if place != "this machine" else "")
                        + (", or --dtype bfloat16" if place != "this machine"
                           and dtype == "float32" else ""))


def total_memory() -> int:
    """Bytes of main memory; without bound where the system does not say."""
    if not hasattr(os, "sysconf"):
        return 1 << 62
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory() -> int:
    """Bytes that can be had without swapping: Linux says, elsewhere half of all is assumed."""
    try:
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else total_memory() // 2


def checkpoint_files(directory: Path) -> list[str]:
    """Names of the safetensors files: those the index names, or the only one."""
    index_path = directory / "model.safetensors.index.json"
    if not index_path.exists():
        if not (directory / "model.safetensors").exists():
            raise UserError(f"{directory} has neither model.safetensors nor "
                            "model.safetensors.index.json: expected a checkpoint in safetensors "
                            "format")
        return ["model.safetensors"]
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{index_path}: weight_map is missing or damaged, expected tensor name -> "
                        "file name")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if "/" in name or "\\" in name or name in ("", ".", "..")]
    if outside:
        raise UserError(f"{index_path} names files outside its directory: {', '.join(outside)}")
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise UserError(f"{index_path} names files that are not there: {', '.join(missing)}; "
                        "download them again")
    return names


def open_safetensors(path: Path):
    if not path.is_file() or not os.access(path, os.R_OK):
        raise UserError(f"{path} cannot be read: expected a safetensors file")
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        reason = describe_wrong_file(path) or describe_truncation(path) or str(error)
        raise UserError(
            f"{path} is not a usable safetensors file ({reason}); download it again") from None


def describe_wrong_file(path: Path) -> str | None:
    """What stands where a checkpoint file should, if it is one of the usual accidents."""
    if not path.is_file():
        return "it is no file"
    with open(path, "rb") as file:
        head = file.read(64).lstrip()
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git-LFS pointer, the file itself was never fetched: run git lfs pull"
    if head[:1] == b"<":
        return "it is an HTML page, probably an error message saved under this name"
    return None


def describe_truncation(path: Path) -> str | None:
    """Compares the size that a safetensors header promises with the size of the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > size - 8:
            return f"truncated: its header is {header_size} bytes long, the file has {size}"
        try:
            entries = json.loads(file.read(header_size))
            entries.pop("__metadata__", None)
            ends = [entry["data_offsets"][1] for entry in entries.values()]
            promised = 8 + header_size + max(ends)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return "its header is damaged"
    if promised != size:
        return f"its header promises {promised} bytes, the file has {size}"
    return None


def check_tensors(cfg: Config, directory: Path, home: dict, shapes: dict[str, tuple]) -> None:
    """Names every tensor that is missing, unexpected, or of a wrong shape or type in one error."""
    # older exports hold the rotation speeds, which are computed here
    harmless = {name for name in home if name.endswith("rotary_emb.inv_freq")}
    if cfg.tie_word_embeddings:
        harmless.add("lm_head.weight")                                     # a copy of the embedding
    problems = [f"missing {name}" for name in shapes if name not in home]
    problems += [f"unexpected {name}" for name in home.keys() - shapes.keys() - harmless]
    for name in shapes.keys() & home.keys():
        tensor, expected = home[name].get_slice(name), shapes[name]
        if tuple(tensor.get_shape()) != expected:
            problems.append(f"{name} has shape {tuple(tensor.get_shape())}, expected {expected}")
        if tensor.get_dtype() not in CHECKPOINT_TYPES:
            problems.append(f"{name} has type {tensor.get_dtype()}, expected BF16, F16 or F32")
    if problems:
        raise UserError(f"{directory} does not fit its config.json: {'; '.join(sorted(problems))}")


def copy_to_float32(place: np.ndarray, tensor: np.ndarray) -> None:
    """Widens bf16 by a shift: its 16 bits are the upper half of a float32 (lesson 2)."""
    if tensor.dtype == ml_dtypes.bfloat16:
        np.left_shift(tensor.view(np.uint16), 16, out=place.view(np.uint32), dtype=np.uint32)
    else:
        place[...] = tensor


def as_elements(tensor: np.ndarray, dtype: str) -> np.ndarray:
    """A tensor of the checkpoint in the element type of the GPU, bfloat16 as uint16."""
    if dtype == "bfloat16":
        if tensor.dtype != ml_dtypes.bfloat16:     # float16 first becomes exact float32
            tensor = tensor.astype(np.float32).astype(ml_dtypes.bfloat16)
        return tensor.view(np.uint16)
    return tensor.astype(ELEMENTS[dtype], copy=False)


# -----------------------------------------------------------------------------
# 3. Tokenizer                                                        (lesson 0)
#
# The only place where text becomes token ids and back. The engine below it never sees text, and
# works without a tokenizer.

REPLACEMENT = "\ufffd"                    # what decoding makes of bytes that are no whole character
FINAL_MARK = "\ue000"                     # a private character that no conversation holds
PROMPT_TAIL = 6                         # prompt tokens that decide how the first new one is spelled


class GenerationTag(jinja2.ext.Extension):
    """Templates mark the assistant's text with {% generation %} for training; here it is text."""
    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


class Tokenizer:
    """tokenizer.json, with the special tokens and the chat template that stand beside it."""

    def __init__(self, directory: Path):
        path = directory / "tokenizer.json"
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:                 # the library raises a bare Exception
            reason = describe_wrong_file(path) or error
            raise UserError(
                f"{path} is not a usable tokenizer ({reason}); download it again") from None
        self.backend.no_truncation()   # some checkpoints ship it switched on; prompts are never cut
        self.backend.no_padding()
        config_path = directory / "tokenizer_config.json"
        config = read_json(config_path) if config_path.exists() else {}
        map_path = directory / "special_tokens_map.json"       # older exports have some only there
        older = read_json(map_path) if map_path.exists() else {}
        self.special_tokens = {}                   # "bos_token" -> "<|begin_of_text|>", ...
        for name, value in (older | config).items():
            content = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(content, str):
                self.special_tokens[name] = content
        self.bos_token_id = self.id_of("bos_token")
        self.eos_token_id = self.id_of("eos_token")
        alone = self.tokenize("", add_special_tokens=True)     # what it puts around nothing
        self.wants_bos = bool(config.get("add_bos_token")) or alone[:1] == [self.bos_token_id]
        self.chat_template = self.find_chat_template(directory, config)

    def id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return self.backend.token_to_id(token) if token else None

    @staticmethod
    def find_chat_template(directory: Path, config: dict) -> str | None:
        """chat_template.jinja, or what tokenizer_config.json holds: one, or several with names."""
        path = directory / "chat_template.jinja"
        if path.exists():
            return read_text(path)
        template = config.get("chat_template")
        named = template if isinstance(template, list) else []
        for entry in named:
            if isinstance(entry, dict) and entry.get("name") == "default":
                template = entry.get("template")
        return template if isinstance(template, str) else None

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with the special tokens the checkpoint wants in front."""
        return self.one_bos(self.tokenize(text, add_special_tokens=True))

    def encode_chat(self, text: str) -> list[int]:
        """Token ids of a rendered chat, whose special tokens stand in the text already."""
        return self.one_bos(self.tokenize(text, add_special_tokens=False))

    def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:                 # lone surrogates; a model without its unk token
            raise UserError(f"the tokenizer cannot read this text: {error}") from None

    def one_bos(self, ids: list[int]) -> list[int]:
        """subtle: a template that writes the BOS and a tokenizer that adds one make two, and the
        answers get worse. Exactly one, where the tokenizer wants one."""
        while ids[:2] == [self.bos_token_id] * 2:
            ids = ids[1:]
        if self.wants_bos and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            ids = [self.bos_token_id] + ids
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages: list[dict], add_generation_prompt: bool = True,
                    continue_final_message: bool = False) -> str:
        """The conversation as the checkpoint's own Jinja template writes it, in a sandbox."""
        if self.chat_template is None:
            raise UserError("this checkpoint has no chat template: use --raw, or generate() "
                            "instead of chat()")
        check_messages(messages)
        if continue_final_message:                 # a mark shows where the last message ends
            final = messages[-1]["content"].strip() + FINAL_MARK
            messages = messages[:-1] + [messages[-1] | {"content": final}]
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, GenerationTag])
        environment.filters["tojson"] = (
            lambda value, ensure_ascii=False, **options: json.dumps(
                value, ensure_ascii=ensure_ascii, **options))
        environment.globals["raise_exception"] = raise_template_error
        environment.globals["strftime_now"] = time.strftime
        try:
            text = environment.from_string(self.chat_template).render(
                messages=messages, tools=None, documents=None, **self.special_tokens,
                add_generation_prompt=add_generation_prompt and not continue_final_message)
        except Exception as error:                 # the template is somebody else's program
            raise UserError(f"the chat template refuses this conversation: {error}") from None
        if not continue_final_message:
            return text
        if FINAL_MARK not in text:
            raise UserError("the chat template does not show the final message, so it cannot be "
                            "continued")
        return text[:text.index(FINAL_MARK)]


def raise_template_error(message: str):
    raise jinja2.TemplateError(message)


def check_messages(messages: list[dict]) -> None:
    example = "{'role': 'user', 'content': 'text'}"
    if not messages:
        raise UserError(f"messages is empty, expected at least one {example}")
    for i, message in enumerate(messages):
        fits = isinstance(message, dict) and all(isinstance(message.get(key), str)
                                                 for key in ("role", "content"))
        if not fits:
            raise UserError(f"messages[{i}] is {message!r}, expected {example}")


class Detokenizer:
    """Turns token ids into text piece by piece; the pieces join to the decode of the whole.

    One character may span several tokens, and some tokenizers spell a token differently after
    another, so a piece is the difference of two decodes: of the ids from `start` to `done`, whose
    text is out already, and of the ids from `start` to the end. While the end is half a character
    nothing comes out. Invariant: `start` and `done` are always at character boundaries.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], skip_special_tokens: bool):
        self.tokenizer, self.skip_special_tokens = tokenizer, skip_special_tokens
        self.ids = self.prompt_tail(prompt_ids)
        self.start, self.done = 0, len(self.ids)
        self.out = self.decode(self.ids)           # the text of ids[start:done]

    def prompt_tail(self, ids: list[int]) -> list[int]:
        """The last tokens of the prompt, from a character boundary on: 3 bytes earlier at most."""
        for length in range(PROMPT_TAIL, PROMPT_TAIL + 4):
            tail = ids[-length:]
            if not self.decode(tail).startswith(REPLACEMENT):
                break
        return tail

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, self.skip_special_tokens)

    def push(self, token_id: int) -> str:
        """The text that this token completes, often none."""
        self.ids.append(token_id)
        return self.piece(final=False)

    def flush(self) -> str:
        """What is still held back; bytes that never became a character come out as U+FFFD."""
        return self.piece(final=True)

    def piece(self, final: bool) -> str:
        text = self.decode(self.ids[self.start:])
        # subtle: a prompt may end inside a character, which then begins the first piece
        piece = text[len(os.path.commonprefix([self.out, text])):]
        if not piece or text.endswith(REPLACEMENT) and not final:
            return ""
        self.start, self.done = self.done, len(self.ids)
        self.out = self.decode(self.ids[self.start:self.done])
        return piece


# -----------------------------------------------------------------------------
# 4. Sampling parameters                                             (lesson 15)

GREEDY_BELOW = 1e-5                                # temperatures below it mean greedy, as in vLLM


@dataclass
class SamplingParams:
    """How to choose tokens and when to stop: vLLM's names, defaults and ranges.

    n                        samples per prompt; greedy allows only 1
    temperature              0 is greedy; divides the logits before the softmax
    top_k, top_p, min_p      keep the k likeliest (0 or -1: all), the nucleus of probability p, the
                             tokens at least min_p times as likely as the likeliest
    repetition_penalty       divides positive and multiplies negative logits of tokens seen in
                             prompt or output
    presence_penalty, frequency_penalty     subtracted once, and per occurrence, for tokens of the
                             output
    logit_bias               {token id: added to its logit}
    seed                     the same seed gives the same tokens, in any batch; None or -1: drawn
                             by the engine
    stop, stop_token_ids     text and ids that end the answer; include_stop_str_in_output keeps
                             them in it
    ignore_eos               go on past end-of-sequence
    max_tokens, min_tokens   limits of the answer; max_tokens None: up to the end of the context
    logprobs, prompt_logprobs     how many of the likeliest tokens to report per position, -1: all;
                             the chosen one is always there. Of the raw logits, before processing
    detokenize, skip_special_tokens    whether to make text, and to leave special tokens out of it

    allowed_token_ids, bad_words and spaces_between_special_tokens of vLLM are not there. Raises
    UserError (a ValueError) naming the field, the value and the range.
    """
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] | None = None

    def __post_init__(self):
        self.check_number("n", int, 1)
        self.check_number("presence_penalty", float, -2, 2)
        self.check_number("frequency_penalty", float, -2, 2)
        self.check_number("repetition_penalty", float, 0, above=True)
        self.check_number("temperature", float, 0)
        self.check_number("top_p", float, 0, 1, above=True)
        self.check_number("top_k", int, -1)
        self.check_number("min_p", float, 0, 1)
        self.check_number("seed", int, -1, 2**64 - 1, optional=True)
        self.check_number("max_tokens", int, 1, optional=True)
        self.check_number("min_tokens", int, 0, self.max_tokens or math.inf)
        self.check_number("logprobs", int, -1, optional=True)
        self.check_number("prompt_logprobs", int, -1, optional=True)
        self.check_stops_and_bias()
        if self.seed == -1:
            self.seed = None
        if self.greedy and self.n > 1:
            raise UserError(f"n is {self.n} with temperature {self.temperature:g}: greedy samples "
                            "are all the same, expected n=1 or a temperature above 0")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def penalizes(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def edits(self) -> bool:
        """Whether logits are changed by more than the temperature."""
        return bool(self.logit_bias) or self.min_tokens > 0 or self.penalizes

    @property
    def takes_largest(self) -> bool:
        """Whether nothing but the largest raw logit matters."""
        return self.greedy and not self.edits and self.logprobs is None

    def check_number(self, name, kind, low, high=math.inf, *, above=False, optional=False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        fits = is_number(value) and (kind is float or isinstance(value, (int, np.integer)))
        if fits and (low < value if above else low <= value) and value <= high:
            setattr(self, name, kind(value))       # a NumPy number becomes a plain one
            return
        if high < math.inf:
            span = f"in {'(' if above else '['}{low}, {high}]"
        else:
            span = f"{'above' if above else 'at least'} {low}"
        noun = "an integer" if kind is int else "a number"
        raise UserError(f"{name} is {value!r}, expected {noun} {span}"
                        f"{' or None' if optional else ''}")

    def check_stops_and_bias(self) -> None:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if not isinstance(stop, (list, tuple)) or not all(isinstance(t, str) and t for t in stop):
            raise UserError(f"stop is {stop!r}, expected strings that are not empty")
        if stop and not self.detokenize:
            raise UserError("stop strings need text to look at: leave detokenize on, or use "
                            "stop_token_ids")
        ids, bias = self.stop_token_ids or [], self.logit_bias or {}
        listed = isinstance(ids, (list, tuple, set, range))
        if not listed or not all(is_token_id(token, 1 << 32) for token in ids):
            raise UserError(f"stop_token_ids is {ids!r}, expected token ids")
        if not isinstance(bias, dict):
            raise UserError(f"logit_bias is {bias!r}, expected {{token id: bias}}")
        for token, value in bias.items():
            if not is_token_id(token, 1 << 32) or not is_number(value) or not -100 <= value <= 100:
                raise UserError(f"logit_bias has {token!r}: {value!r}, expected token ids with a "
                                "bias in [-100, 100]")
        self.stop, self.stop_token_ids = list(stop), [int(token) for token in ids]
        self.logit_bias = {int(token): float(value) for token, value in bias.items()}


# -----------------------------------------------------------------------------
# 5. Requests and outputs
#
# A Request is what the caller submitted; a Sequence is one of its n samples and what the scheduler
# moves.


@dataclass
class Logprob:
    logprob: float
    rank: int                                      # 1 is the likeliest token of the position
    decoded_token: str | None


@dataclass
class CompletionOutput:
    """One sample: everything so far, not just the newest piece."""
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None               # "stop", "length", "abort", "error", None while running
    stop_reason: int | str | None       # the stop string or id, what went wrong, None for plain EOS


@dataclass
class RequestMetrics:
    """Moments in seconds of time.perf_counter."""
    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int                         # prompt tokens found in the prefix cache

    def __getitem__(self, name: str):
        """outputs[i]["text"], as nano-vllm has it."""
        return getattr(self.outputs[0], name)


@dataclass(eq=False)
class Sequence:
    """One sample on its way.

    Invariant between steps: the KV of the first num_computed tokens is in the blocks of
    block_table, and while it decodes exactly one token, the newest, is not computed yet. On the GPU
    "is" means: by the steps that are under way, and the newest num_pending tokens are known there
    but not here yet.
    """
    request: Request
    index: int
    seed: int
    token_ids: list[int]                           # prompt + output
    detokenizer: Detokenizer | None
    num_computed: int = 0
    prefill_end: int = 0               # tokens to prefill; a preempted sequence's output included
    num_pending: int = 0                           # tokens sampled and not yet read
    row: int | None = None                         # its row of the engine's tables, while it runs
    takes_largest: bool = False                    # as the settings in its row say
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)    # of the full blocks of token_ids
    text: str = ""
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def name(self) -> str:
        """The request's id, with the sample's number where there are several."""
        several = len(self.request.sequences) > 1
        return f"{self.request.request_id}.{self.index}" if several else self.request.request_id

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[len(self.request.prompt_token_ids):]

    @property
    def num_outputs(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending

    @property
    def num_sampled(self) -> int:
        """Outputs, those included that are not read yet."""
        return self.num_outputs + self.num_pending

    @property
    def is_decoding(self) -> bool:
        return self.row is not None and self.num_computed >= self.prefill_end

    def output(self) -> CompletionOutput:
        # the last characters may have begun a stop string: they wait until that is decided
        longest_stop = 0 if self.finish_reason else max(map(len, self.params.stop), default=0)
        shown = self.text[:max(0, len(self.text) - max(0, longest_stop - 1))]
        logprobs, cumulative_logprob = None, None
        if self.params.logprobs is not None:
            logprobs, cumulative_logprob = list(self.logprobs), self.cumulative_logprob
        return CompletionOutput(self.index, shown, self.output_ids, cumulative_logprob, logprobs,
                                self.finish_reason, self.stop_reason)


@dataclass(eq=False)
class Request:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=lambda: [None])
    num_cached_tokens: int | None = None           # set when the first sequence is admitted

    @property
    def finished(self) -> bool:
        return all(seq.finish_reason for seq in self.sequences)

    def output(self) -> RequestOutput:
        wants_logprobs = self.params.prompt_logprobs is not None
        return RequestOutput(
            self.request_id, self.prompt, self.prompt_token_ids,
            list(self.prompt_logprobs) if wants_logprobs else None,
            [seq.output() for seq in self.sequences], self.finished, self.metrics,
            self.num_cached_tokens or 0)


@dataclass
class Batch:
    """One step: which sequences compute how many of their tokens."""
    kind: str                                      # "prefill" or "decode"
    sequences: list[Sequence]
    counts: list[int]
    seq_lens: list[int]                            # context of each after this step
    ready: list[int]           # whose last token is computed, so the next one is sampled: indices
    new_blocks: list[int | None]                   # that decode appended to each block table
    changes: Counter = field(default_factory=Counter)     # blocks taken, shared, evicted for it
    cached: dict[str, int] = field(default_factory=dict)  # tokens that newcomers found in the cache
    preempted: list[str] = field(default_factory=list)    # whose blocks it took
    held: dict[str, list[int]] = field(default_factory=dict)   # block tables, if somebody watches
    kernels: list[tuple[str, float]] = field(default_factory=list)     # names, seconds, if timed
    started: float = 0.0                           # time.perf_counter()
    ended: float | None = None                     # known if its kernels were timed

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)


@dataclass
class Step:
    """What the operations of a step read: views of the engine's fixed buffers, for T tokens of B
    requests. T and B, padded, the kind and greedy are its shape: steps of one shape share a graph.
    """
    kind: str                          # "prefill", "decode", or "chunk": prefill without sampling
    T: int
    B: int
    tokens: np.ndarray                             # (T,) int32
    positions: np.ndarray                          # (T,) int32
    slots: np.ndarray                # (T,) int32, where each token's K and V go: block * P + offset
    seq_lens: np.ndarray                           # (B,) int32, context after this step
    rows: np.ndarray                               # (B,) int32, of the engine's tables
    sample_rows: np.ndarray                # (B,) int32, nobody's row where nothing is sampled
    last_tokens: np.ndarray                        # (B,) int32, the index of each request's last
    query_starts: np.ndarray                       # (B+1,) int32
    packed: np.ndarray             # tokens to query_starts of a prefill step, as they lie in memory
    inputs: np.ndarray | None                      # (2, B) int32 of a decode step: begin_decode_ref
    greedy: bool                       # of each request nothing but the largest logit is asked for

    @property
    def shape(self) -> tuple[str, int, int, bool]:
        return self.kind, self.T, self.B, self.greedy


# -----------------------------------------------------------------------------
# 6. BlockAllocator                                        (lessons 11 and 14)
#
# The KV cache is a pool of blocks of P tokens. A full block is named by the hash of its tokens
# chained to the hash of the block before it, so equal hashes mean equal tokens from the start of
# the context on, and a request whose prompt begins like an earlier one's takes the blocks instead
# of computing them. Free blocks keep their contents and their name until they are needed: the free
# list is also the cache, and taking from its head evicts the least recently used.


class BlockAllocator:
    """Free list, reference counts and names of the blocks. A block is free or referenced."""

    def __init__(self, num_blocks: int):
        self.ref_counts = [0] * num_blocks
        # an ordered set, next to be taken first
        self.free = OrderedDict.fromkeys(range(num_blocks))
        self.block_of: dict[bytes, int] = {}                   # hash -> block that holds its tokens
        self.hash_of: dict[int, bytes] = {}                        # the inverse
        self.counts = Counter()                # of blocks taken, shared, freed and evicted

    def allocate(self) -> int:
        """A block with one reference and no name; the caller makes sure that one is free."""
        block, _ = self.free.popitem(last=False)
        self.ref_counts[block] = 1
        if block in self.hash_of:
            del self.block_of[self.hash_of.pop(block)]
            self.counts["evicted"] += 1
        self.counts["taken"] += 1
        return block

    def share(self, block: int) -> int:
        """One more reference to a named block, which may be free."""
        if self.ref_counts[block] == 0:
            del self.free[block]
        self.ref_counts[block] += 1
        self.counts["shared"] += 1
        return block

    def release(self, block: int) -> None:
        """One reference less. At zero it is free: a named one is reused last, a nameless first."""
        assert self.ref_counts[block] > 0, f"block {block} was released twice"
        self.ref_counts[block] -= 1
        if self.ref_counts[block] == 0:
            self.counts["freed"] += 1
            self.free[block] = None
            self.free.move_to_end(block, last=block in self.hash_of)

    def register(self, block: int, block_hash: bytes) -> None:
        """Names a block, unless another one with the same tokens has the name already."""
        if block_hash not in self.block_of:
            self.block_of[block_hash] = block
            self.hash_of[block] = block_hash

    def forget_hashes(self) -> None:
        self.block_of.clear()
        self.hash_of.clear()


def hash_block(parent: bytes, tokens: bytes) -> bytes:
    """SHA-256 of the parent's hash and the tokens: a collision would hand out a wrong context."""
    return hashlib.sha256(parent + tokens).digest()


# -----------------------------------------------------------------------------
# 7. Host and Gpu                                                    (lesson 16)
#
# Where arrays live, and how a step is run. The host's way is the simple one: a call returns when
# its work is done. The GPU's is one stream that everything goes through in order, so that the host
# can be a step ahead, and one graph for each shape of a step, so that a hundred kernels cost one
# call.

STEPS_IN_FLIGHT = 2                                # that the host has started and not read
STAGING_BYTES = 32 << 20                           # in each half of the pinned memory for uploads
FLOPS_A_CLOCK = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192}    # of a multiprocessor's tensor cores,
                                                               # dense, 16 bits; others 1024 or less


TENSOR_RUNGS = "tensor", "wgmma", "persistent"     # of the kernels' ladders: on tensor cores


class KernelError(RuntimeError):
    """The GPU could not do what it was asked."""


def pointer(array) -> int:
    """The device address of an array."""
    return array.__cuda_array_interface__["data"][0]


def through(launch: Callable, operations) -> SimpleNamespace:
    """The operations, each called by launch(name, operation, *arrays)."""
    return SimpleNamespace(**{name: partial(launch, name, operation)
                              for name, operation in vars(operations).items()})


class Host:
    """NumPy; or the simulator, whose arrays only pretend to be on a GPU."""
    pipelined = False

    def __init__(self, operations, simulated: bool):
        self.ops, self.simulated = through(self.launch, operations), simulated
        self.timing = False                        # whether kernel_times will be asked for
        self.times: list[tuple[str, float]] = []

    def launch(self, name: str, operation: Callable, *arrays) -> None:
        began = time.perf_counter()
        operation(*arrays)
        if self.timing:
            self.times.append((name, time.perf_counter() - began))

    def empty(self, shape, dtype) -> np.ndarray:
        return (cuda.device_array if self.simulated else np.empty)(shape, dtype)

    def upload(self, target, values: np.ndarray, row: int | None = None) -> None:
        """Copies values to all of target, or to the beginning of one of its rows."""
        place = target if row is None else target[row, :len(values)]
        if self.simulated:
            place.copy_to_device(np.ascontiguousarray(values))
        else:
            place[...] = values

    def download(self, source) -> np.ndarray:
        """The values of an array, to be read before the next step changes them."""
        return source.copy_to_host() if self.simulated else source

    def mapped(self, shape, dtype) -> np.ndarray:
        """An array for kernels to write and the host to read, where it lies."""
        return np.zeros(shape, dtype)

    def when_done(self) -> Callable[[], None]:
        """A function that returns when all that was asked for before has happened."""
        return lambda: None

    def run(self, shape, work: Callable) -> None:
        self.times = []
        work()

    def kernel_times(self) -> list[tuple[str, float]]:
        """Name and seconds of each operation of the last step."""
        return list(self.times)


class Gpu:
    """One CUDA stream, with the copies and graphs that numba.cuda leaves to the driver.

    Raises KernelError; which kernel failed is known only if `eager`, which waits for each.
    """
    pipelined = True

    def __init__(self, operations, eager: bool):
        from cuda.bindings import driver
        self.driver, self.eager = driver, eager
        self.stream = cuda.stream()
        self.handle = driver.CUstream(int(self.stream.handle))
        self.ops = through(self.launch, operations)
        self.graphs = {}                  # shape of a step -> its graph, None if it came only once
        self.timing = False                        # whether kernel_times will be asked for
        self.marks = []                            # (name, event after it) of what is launched
        self.spare_marks = []                      # events that no graph holds
        self.marks_of = {}                         # shape -> those in its graph
        self.recording = False
        self.progress = None                       # a bar, while kernels are compiled
        # events, the next to be used first
        self.step_ends = deque(self.call(driver.cuEventCreate(
            driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)) for _ in range(STEPS_IN_FLIGHT))
        # what is on its way lies in one of two halves, which are filled in turns
        self.halves = deque((cuda.pinned_array(STAGING_BYTES, np.uint8), cuda.event())
                            for _ in range(2))
        self.staged = 0                            # bytes of the first half in use

    def call(self, result):
        """What a driver function returned, less its error code."""
        error, *values = result
        if error != self.driver.CUresult.CUDA_SUCCESS:
            raise KernelError(f"the GPU reports {error.name}: --enforce-eager names the kernel "
                              "that failed")
        return values[0] if len(values) == 1 else values

    def launch(self, name: str, launcher: Callable, *arrays) -> None:
        if self.progress is not None:
            self.progress.set_description(f"preparing kernels: {name}", refresh=False)
            self.progress.update()
        try:
            launcher(*arrays, stream=self.stream)
            if self.timing:
                self.mark(name)
            if self.eager:
                self.stream.synchronize()
        except Exception as error:
            shapes = [getattr(array, "shape", array) for array in arrays]
            which = name if self.eager else f"{name}, or one before it,"
            raise KernelError(f"kernel {which} failed on arrays of shapes {shapes}: "
                              f"{error}") from error

    def empty(self, shape, dtype):
        try:
            return cuda.device_array(shape, dtype)
        except Exception as error:
            if "MEMORY" not in str(error).upper():
                raise
            free, total = cuda.current_context().get_memory_info()
            size = format_bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize)
            raise UserError(f"the GPU has {format_bytes(free)} free of {format_bytes(total)}, and "
                            f"{size} more are needed: end what else uses it, or use a smaller "
                            "--gpu-memory-utilization, --max-num-batched-tokens or "
                            "--max-num-seqs") from None

    def upload(self, target, values: np.ndarray, row: int | None = None) -> None:
        """Copies values to all of target, or to the beginning of one of its rows, in the stream's
        order and through pinned memory: the host goes on at once."""
        source, first = np.ascontiguousarray(values).reshape(-1).view(np.uint8), pointer(target)
        fits = source.nbytes == target.nbytes
        if row is not None:                # by address: a slice takes Numba longer than the copy
            first += row * target.strides[0]
            fits = source.nbytes <= target.strides[0] and 0 <= row < len(target)
        assert fits and values.dtype == target.dtype, (values.dtype, values.shape, target.dtype,
                                                       target.shape)
        for start in range(0, len(source), STAGING_BYTES):
            part = source[start:start + STAGING_BYTES]
            place = self.stage(len(part))
            place[:] = part
            self.call(self.driver.cuMemcpyHtoDAsync(first + start, place.ctypes.data, len(part),
                                                    self.handle))

    def stage(self, size: int) -> np.ndarray:
        """That much pinned memory which no copy under way reads."""
        if self.staged + size > STAGING_BYTES:
            self.halves[0][1].record(self.stream)
            self.halves.rotate()
            self.halves[0][1].synchronize()        # its copies were started half a cycle ago
            self.staged = 0
        first, self.staged = self.staged, self.staged + ceil_div(size, 16) * 16
        return self.halves[0][0][first:first + size]

    def ceilings(self) -> tuple[float, float]:
        """Bytes a second of a copy within the GPU's memory, and floating-point operations a second
        of its tensor cores at the highest clock."""
        size, begin, end = 128 << 20, cuda.event(), cuda.event()
        source, target = self.empty(size, np.uint8), self.empty(size, np.uint8)
        for _ in range(2):                         # the first one warms up
            begin.record(self.stream)
            self.call(self.driver.cuMemcpyDtoDAsync(pointer(target), pointer(source), size,
                                                    self.handle))
            end.record(self.stream)
        end.synchronize()
        gpu = cuda.get_current_device()
        flops = FLOPS_A_CLOCK.get(gpu.compute_capability, 1024) * gpu.MULTIPROCESSOR_COUNT
        return (2 * size / (cuda.event_elapsed_time(begin, end) / 1e3),
                flops * gpu.CLOCK_RATE * 1e3)

    def download(self, source) -> np.ndarray:
        """The values of an array, when all that was asked for before has happened."""
        values = np.empty(source.shape, source.dtype)
        self.call(self.driver.cuMemcpyDtoHAsync(values.ctypes.data, pointer(source), source.nbytes,
                                                self.handle))
        self.call(self.driver.cuStreamSynchronize(self.handle))
        return values

    def mapped(self, shape, dtype) -> np.ndarray:
        """An array of the host's memory that kernels write through the bus: no copy stands between
        two steps."""
        return cuda.mapped_array(shape, dtype)

    def when_done(self) -> Callable[[], None]:
        """A function that returns when all that was asked for before has happened. At most
        STEPS_IN_FLIGHT of them are of use at once."""
        event = self.step_ends[0]
        self.step_ends.rotate(-1)
        self.call(self.driver.cuEventRecord(event, self.handle))
        return lambda: self.call(self.driver.cuEventSynchronize(event))

    def run(self, shape, work: Callable) -> None:
        """Does the work of a step: as a graph, or launch by launch, which compiles what is missing.

        Decode steps come again and again, and are recorded at once; prefill steps when their shape
        comes a second time, for most of them never do."""
        if shape in self.graphs:
            if self.graphs[shape] is None:
                self.graphs[shape] = self.record_step(shape, work)
            self.call(self.driver.cuGraphLaunch(self.graphs[shape], self.handle))
            self.marks = list(self.marks_of[shape])
            return
        with tqdm(desc="preparing kernels", unit=" launches", delay=1, leave=False) as bar:
            self.progress = bar
            try:
                self.begin_marks()
                work()
            finally:
                self.progress = None
        if not self.eager:
            launched = self.marks
            self.graphs[shape] = self.record_step(shape, work) if shape[0] == "decode" else None
            self.marks = launched

    def record_step(self, shape, work: Callable):
        """The graph of a step; one whose kernels are timed keeps them apart."""
        graph = self.record(work, overlap=not self.timing)
        self.marks_of[shape] = self.marks
        return graph

    def begin_marks(self) -> None:
        self.marks = []
        if self.timing:
            self.mark("")

    def mark(self, name: str) -> None:
        """An event behind what was launched last; in a graph it becomes a node."""
        n, flags = len(self.marks), self.driver.CUevent_record_flags
        if self.recording or n == len(self.spare_marks):
            event = self.call(self.driver.cuEventCreate(0))
            if not self.recording:
                self.spare_marks.append(event)
        else:
            event = self.spare_marks[n]
        self.call(self.driver.cuEventRecordWithFlags(
            event, self.handle, flags.CU_EVENT_RECORD_EXTERNAL if self.recording
            else flags.CU_EVENT_RECORD_DEFAULT))
        self.marks.append((name, event))

    def kernel_times(self) -> list[tuple[str, float]]:
        """Name and seconds of each operation of the last step, which the host waits for. Those of a
        shape's first step, launched one by one, include the host's time between them."""
        self.stream.synchronize()
        return [(name, self.call(self.driver.cuEventElapsedTime(before, event)) / 1e3)
                for (_, before), (name, event) in zip(self.marks, self.marks[1:])]

    def record(self, work: Callable, overlap: bool = True):
        """Captures what `work` launches, without running it, as an executable graph, in which
        kernels begin before the one before has ended where the GPU knows how."""
        driver = self.driver
        self.call(driver.cuStreamBeginCapture(
            self.handle, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED))
        self.recording = True
        try:
            self.begin_marks()
            work()
        finally:
            self.recording = False
            graph = self.call(driver.cuStreamEndCapture(self.handle))
        if overlap and cuda.get_current_device().compute_capability >= (9, 0):
            self.overlap_kernels(graph)
        executable = self.call(driver.cuGraphInstantiate(graph, 0))
        self.call(driver.cuGraphDestroy(graph))
        return executable

    def overlap_kernels(self, graph) -> None:
        """Turns each edge into programmatic dependent launch: a kernel starts when the one before
        calls start_next_kernel, and waits for its end in wait_for_inputs."""
        driver = self.driver
        # CUDA 12's bindings call the functions that know of edge data _v2
        edges, add, remove = (getattr(driver, name + "_v2", getattr(driver, name)) for name in (
            "cuGraphGetEdges", "cuGraphAddDependencies", "cuGraphRemoveDependencies"))
        *_, count = self.call(edges(graph))
        before, after, plain, _ = self.call(edges(graph, count))
        self.call(remove(graph, before, after, plain, count))
        programmatic = []
        for _ in range(count):
            edge = driver.CUgraphEdgeData()
            edge.type = driver.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
            edge.from_port = 1                     # CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC
            programmatic.append(edge)
        self.call(add(graph, before, after, programmatic, count))


def gpu_problem() -> str | None:
    """Why no GPU can be used here, with what to do; None if one can."""
    use_cpu = "use --device cpu, or "
    try:
        from cuda.bindings import driver
    except ImportError:
        return f"cuda-python is not installed: {use_cpu}pip install -r requirements.txt"
    try:
        error, = driver.cuInit(0)
        _, version = driver.cuDriverGetVersion()
    except RuntimeError:                           # there is no libcuda
        error, version = None, 0
    built_for = int(importlib.metadata.version("cuda-bindings").split(".")[0])
    if 0 < version < built_for * 1000:
        return (f"the NVIDIA driver supports CUDA {version // 1000}.{version % 1000 // 10}, the "
                f"installed packages need CUDA {built_for} (driver 580 or newer): {use_cpu}update "
                "the driver, or pip install 'numba-cuda[cu12]' 'cuda-python>=12,<13'")
    if error != driver.CUresult.CUDA_SUCCESS or not cuda.is_available():
        return ("found no GPU with a working driver: use --device cpu, or install an NVIDIA driver "
                "of version 580 or newer (for an older one, numba-cuda[cu12] and cuda-python 12)")
    return None


def pick_device(device: str) -> str:
    """The same device if it can be used here, for "auto" the best; UserError says what can."""
    if device not in ("auto", "cuda", "cpu", "sim"):
        raise UserError(f"device is {device!r}, expected 'auto', 'cuda', 'cpu' or 'sim'")
    if device == "sim" and not kernels.SIMULATOR:
        raise UserError("device 'sim' needs the simulator before Numba is imported: set "
                        "NUMBA_ENABLE_CUDASIM=1 before Python starts (the command line does it "
                        "itself)")
    if device in ("cpu", "sim"):
        return device
    problem = "NUMBA_ENABLE_CUDASIM=1 is set, so Numba has only its simulator: unset it, or use " \
        "--device sim" if kernels.SIMULATOR else gpu_problem()
    if problem and device == "cuda":
        raise UserError(f"device 'cuda' cannot be used: {problem}")
    return "cpu" if problem else "cuda"


def check_names(device: str, dtype: str, rung: str, eager: bool) -> None:
    """Refuses dtypes and rungs that do not exist, or not on this device."""
    if dtype not in ("auto", *ELEMENTS):
        raise UserError(f"dtype is {dtype!r}, expected 'auto', {', '.join(map(repr, ELEMENTS))}")
    if rung not in ("auto", *kernels.RUNGS):
        raise UserError(f"rung is {rung!r}, expected 'auto', "
                        f"{', '.join(map(repr, kernels.RUNGS))}")
    if device == "cpu" and dtype not in ("auto", "float32"):
        raise UserError(f"dtype {dtype!r} needs a GPU: on the CPU leave --dtype away, everything "
                        "is float32 there")
    if device == "cpu" and (rung != "auto" or eager):
        raise UserError("--kernels and --enforce-eager are for --device cuda or sim: on the CPU "
                        "the NumPy twins run")


def pick_dtype(dtype: str, device: str, stored: str) -> str:
    """The element type; "auto": float32 on the CPU, on the GPU that of the checkpoint, but bfloat16
    for float32, which has no tensor cores."""
    if device == "cpu":
        return "float32"
    if dtype == "auto":
        return "bfloat16" if stored == "float32" else stored
    return dtype


def pick_rung(rung: str, cfg: Config, dtype: str, device: str, block_size: int) -> str:
    """The rung of the kernels' ladders; "auto": the highest that GPU, shapes and dtype allow."""
    capability = (9, 0) if device == "sim" else cuda.get_current_device().compute_capability
    obstacle = kernels.fits_tensor_cores(cfg.num_attention_heads, cfg.num_key_value_heads,
                                         cfg.head_dim, cfg.hidden_size, cfg.intermediate_size)
    if dtype == "float32":
        obstacle = "float32 has none: use --dtype bfloat16"
    elif capability < (8, 0):
        obstacle = "compute capability {}.{} is below 8.0".format(*capability)
    next_best = "tiled" if cfg.head_dim <= 256 else "naive"    # a warp holds no more of a query
    if rung in TENSOR_RUNGS and obstacle:
        raise UserError(f"the tensor-core kernels cannot run here ({obstacle}): use --kernels "
                        f"{next_best}")
    if rung == "tiled" and next_best != "tiled":
        raise UserError(f"head_dim {cfg.head_dim} is above the 256 that the tiled kernels hold: "
                        "use --kernels naive")
    if obstacle:
        return next_best if rung == "auto" else rung
    hopper = capability[0] == 9
    obstacle = kernels.fits_persistent(cfg.num_attention_heads, cfg.num_key_value_heads,
                                       cfg.head_dim, cfg.hidden_size, cfg.intermediate_size,
                                       cfg.vocab_size, block_size)
    if not hopper:
        obstacle = "compute capability {}.{} is not Hopper's 9.0".format(*capability)
    if rung == "wgmma" and not hopper:
        raise UserError(f"wgmma cannot run here ({obstacle}): use --kernels tensor")
    next_best = "wgmma" if hopper else "tensor"
    if rung == "persistent" and obstacle:
        raise UserError(f"a decode step cannot be one kernel here ({obstacle}): use --kernels "
                        f"{next_best}")
    if rung == "auto":
        return next_best if obstacle else "persistent"
    return rung


# -----------------------------------------------------------------------------
# 8. Engine                                          (lessons 1, 13, 14 and 15)
#
# A step is either prefill or decode, never both. Prefill packs the prompts of several requests, cut
# into chunks of max_num_batched_tokens; decode takes one token of each running request. When both
# have work they alternate, so a long prompt delays the others by one chunk at most, and a token is
# always computed by the same operation, whatever company it has. (On the CPU that is exact but for
# the last bits: BLAS adds in another order for many tokens than for a few.)
#
# On the GPU the host is one step ahead: it starts a step, and only then reads what the one before
# has sampled. So a request that has ended may be in one more step, whose token is dropped.

DEFAULT_CACHE_BYTES = 4 << 30            # on the CPU, or half of what is free, if that is less
# while others decode, they should not wait long: a prefill step is a half, but of this many tokens
# at least, and a chunk is cut to a half, a third, ... of that for each CHUNK_CONTEXT tokens that it
# has behind it, for attention makes its tokens ever dearer
SMALL_STEP = 2048
CHUNK_CONTEXT = 4096


class Engine:
    """Weights, block allocator and the continuous-batching loop.

    model                    checkpoint directory or hub id
    tokenizer                directory to take the tokenizer from, if not the model's
    device                   "cuda" (the GPU), "cpu" (the NumPy twins), "sim" (the GPU's kernels in
                             Numba's simulator, on any machine, very slowly), "auto": the GPU
                             where there is one, otherwise the CPU
    dtype                    "bfloat16", "float16", "float32"; "auto": see pick_dtype
    rung                     of the kernels' ladders: "naive", "tiled", "tensor", "wgmma",
                             "persistent"; "auto": the best. Of "persistent" one engine at a
                             time for a GPU
    enforce_eager            no graphs, and a wait after each kernel: errors name it
    seed                     of requests that bring none
    max_model_len            longest context, prompt and answer together; None: what the model and
                             the cache allow
    max_num_seqs             requests in one batch
    max_num_batched_tokens   tokens in one prefill step; longer prompts are chunked. While others
                             decode, half of them, but no fewer than 2,048
    block_size               tokens per KV block
    enable_prefix_caching    reuse blocks of prompts that begin alike
    static_batching          nobody joins until the whole batch has ended: what continuous batching
                             improves on
    gpu_memory_utilization   share of the GPU's memory that weights, buffers and KV cache may take
    kv_cache_memory_bytes, num_gpu_blocks_override     size of the KV cache
    revision, hf_token       for hub ids

    Raises UserError for bad input, KernelError if the GPU fails. One Engine belongs to one thread.
    """

    def __init__(self, model: str | Path = DEMO, *, tokenizer: str | Path | None = None,
                 device: str = "auto", dtype: str = "auto", rung: str = "auto",
                 enforce_eager: bool = False, seed: int | None = None,
                 max_model_len: int | None = None, max_num_seqs: int = 128,
                 max_num_batched_tokens: int = 4096, block_size: int = 16,
                 enable_prefix_caching: bool = True, static_batching: bool = False,
                 gpu_memory_utilization: float = 0.9,
                 kv_cache_memory_bytes: int | None = None,
                 num_gpu_blocks_override: int | None = None,
                 revision: str | None = None, hf_token: str | None = None):
        check_positive(max_model_len=max_model_len, max_num_seqs=max_num_seqs,
                       max_num_batched_tokens=max_num_batched_tokens, block_size=block_size,
                       kv_cache_memory_bytes=kv_cache_memory_bytes,
                       num_gpu_blocks_override=num_gpu_blocks_override)
        if max_num_seqs > kernels.MAX_REQUESTS:
            raise UserError(f"max_num_seqs is {max_num_seqs}, expected at most "
                            f"{kernels.MAX_REQUESTS}")
        if not is_number(gpu_memory_utilization) or not 0 < gpu_memory_utilization <= 1:
            raise UserError(f"gpu_memory_utilization is {gpu_memory_utilization!r}, expected a "
                            "number in (0, 1]")
        self.device = pick_device(device)
        check_names(self.device, dtype, rung, enforce_eager)   # before anything is downloaded
        directory = find_checkpoint(model, revision, hf_token)
        self.model_name = directory.name if directory != DEMO else "demo model"
        self.cfg = load_config(directory)
        self.generation_config = generation_config(directory)
        self.tokenizer = load_tokenizer(
            find_checkpoint(tokenizer, None, hf_token) if tokenizer else directory)
        self.eos_token_ids = self.find_eos_token_ids(directory)
        self.block_size = block_size
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.enable_prefix_caching, self.static_batching = enable_prefix_caching, static_batching
        checkpoint = Checkpoint(self.cfg, directory)
        self.dtype = pick_dtype(dtype, self.device, checkpoint.dtype)
        self.elements = ELEMENTS[self.dtype]
        self.place = self.pick_place(rung, enforce_eager)
        self.ops = self.place.ops
        self.weight_bytes = checkpoint.num_parameters() * self.elements.itemsize
        longest = max_model_len or self.cfg.max_position_embeddings
        budget = self.cache_budget(gpu_memory_utilization, longest, directory)
        num_blocks = self.size_cache(max_model_len, kv_cache_memory_bytes or budget,
                                     num_gpu_blocks_override)
        self.weights = self.load_weights(checkpoint)
        try:
            self.allocate_buffers(num_blocks)
        except UserError:                              # of the GPU, with what to do
            raise
        except (MemoryError, ValueError) as error:
            size = format_bytes(num_blocks * self.bytes_per_block)
            raise UserError(f"the KV cache of {size} or the buffers of a step do not fit into "
                            f"memory ({error}): use a smaller --kv-cache-memory-bytes, "
                            "--max-num-batched-tokens or --max-num-seqs") from None
        self.allocator = BlockAllocator(num_blocks)

        self.rng = np.random.default_rng(seed)
        self.request_counter = 0
        self.interrupted = False                   # set from a signal handler: stop after this step
        self.requests: dict[str, Request] = {}     # unfinished ones
        self.waiting: deque[Sequence] = deque()  # first come, first served; preempted ones in front
        self.running: list[Sequence] = []     # oldest first; each owns the blocks of all its tokens
        self.free_rows = list(range(max_num_seqs - 1, -1, -1))         # the last is taken next
        self.prefilled_last = False
        self.batch: Batch | None = None            # the last step that was started
        self.in_flight: tuple | None = None        # it, if its tokens have not been read yet
        self.num_preemptions = 0
        self.num_tokens = {"prefill": 0, "decode": 0}
        self.cached: dict[str, int] = {}           # since the last step was scheduled: prefix hits
        self.preempted: list[str] = []             # and whoever gave way
        self.on_step: Callable[[StepReport], None] | None = None   # told of each finished step
        self.keep_logits = False                   # for those reports: the host waits for each step
        self.num_steps = 0
        self.read_at, self.freed_before = 0.0, 0   # when the last step was read, blocks freed then

    def find_eos_token_ids(self, directory: Path) -> set[int]:
        """Those of config.json, generation_config.json and the tokenizer."""
        ids = self.cfg.eos_token_ids | eos_token_ids(self.generation_config,
                                                     directory / "generation_config.json")
        if self.tokenizer and self.tokenizer.eos_token_id is not None:
            ids |= {self.tokenizer.eos_token_id}
        # an id that the model has no logit for can never be chosen
        return {token for token in ids if token < self.cfg.vocab_size}

    # ---- memory ----

    def pick_place(self, rung: str, eager: bool) -> Host | Gpu:
        if self.device == "cpu":
            self.rung = "twins"
            return Host(kernels.TWINS, simulated=False)
        self.rung = pick_rung(rung, self.cfg, self.dtype, self.device, self.block_size)
        if self.device == "sim":
            return Host(kernels.RUNGS[self.rung], simulated=True)
        return Gpu(kernels.RUNGS[self.rung], eager)

    def cache_budget(self, utilization: float, longest: int, directory: Path) -> int:
        """Bytes that the KV cache may take; refuses weights that do not fit."""
        if self.device != "cuda":
            check_memory(self.weight_bytes, total_memory(), directory, self.dtype, "this machine")
            return min(DEFAULT_CACHE_BYTES, available_memory() // 2)
        free, total = cuda.current_context().get_memory_info()
        check_memory(self.weight_bytes, free, directory, self.dtype, "the GPU")
        return max(0, int(free - (1 - utilization) * total) - self.weight_bytes
                   - self.buffer_bytes(longest))

    def buffer_bytes(self, longest: int) -> int:
        """Of everything else in allocate_buffers, for contexts of that length, and a margin."""
        cfg, (T, B) = self.cfg, self.largest_step()
        H, G, D = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        channels = 3 * cfg.hidden_size + 3 * cfg.intermediate_size + 2 * D * (H + G)
        rows = 4 * 4 * B * cfg.vocab_size                      # logits, scores, bias, seen
        rows += B * (cfg.hidden_size + (H + 2 * G) * D) * self.elements.itemsize   # last, last_qkv
        rows += 2 * 4 * B * self.most_chunks()                 # chunk_max and chunk_argmax
        tables = 4 * longest * D + 4 * B * ceil_div(longest, self.block_size)
        partial = 4 * math.prod(self.partial_shape(longest))
        return T * channels * self.elements.itemsize + rows + tables + partial + (256 << 20)

    def most_chunks(self) -> int:
        """Chunks of a row of logits, at most: see `chunks`."""
        of_greedy = self.cfg.vocab_size // kernels.CHUNK if self.rung == "persistent" else 0
        return max(kernels.MAX_CHUNKS, of_greedy)

    def partial_shape(self, longest: int) -> tuple[int, int, int]:
        """Of what decode attention leaves of each split of all contexts, where it splits them."""
        if self.rung not in TENSOR_RUNGS:
            return 1, 1, 1
        return self.num_splits(longest), self.cfg.num_attention_heads, self.cfg.head_dim + 2

    def num_splits(self, longest: int) -> int:
        """Of all contexts of a step together, at most; even of those that share their blocks."""
        _, B = self.largest_step()
        return B * min(ceil_div(longest, kernels.SPLIT),
                       kernels.most_splits(self.cfg.num_key_value_heads))

    def size_cache(self, max_model_len: int | None, cache_bytes: int,
                   num_blocks: int | None) -> int:
        """Number of KV blocks: as many as max_num_seqs full contexts need and memory allows."""
        cfg, P = self.cfg, self.block_size
        longest = max_model_len or cfg.max_position_embeddings
        if longest > cfg.max_position_embeddings:
            raise UserError(f"max_model_len is {longest}, the model was made for "
                            f"{cfg.max_position_embeddings}: use --max-model-len "
                            f"{cfg.max_position_embeddings} or less")
        values_per_token = 2 * cfg.num_hidden_layers * cfg.num_key_value_heads * cfg.head_dim
        self.bytes_per_block = P * values_per_token * self.elements.itemsize
        if num_blocks is None:
            wanted = self.max_num_seqs * ceil_div(longest, P)
            num_blocks = min(wanted, cache_bytes // self.bytes_per_block)
        capacity = num_blocks * P
        if not capacity and self.device == "cuda" and not cache_bytes:
            raise UserError(f"weights ({format_bytes(self.weight_bytes)}) and buffers leave "
                            "nothing of the GPU's memory for the KV cache: use a larger "
                            "--gpu-memory-utilization, or a smaller --max-num-batched-tokens or "
                            "--max-num-seqs")
        if capacity < (max_model_len or 1):
            needed = ceil_div(longest if max_model_len else 1, P) * self.bytes_per_block
            raise UserError(f"the KV cache holds {capacity} tokens, one context of "
                            f"{max_model_len or 1} does not fit: use --kv-cache-memory-bytes "
                            f"{needed} or more"
                            + (f", or --max-model-len {capacity} or less" if capacity else ""))
        self.max_model_len = min(longest, capacity)
        return num_blocks

    def load_weights(self, checkpoint: Checkpoint) -> Weights:
        """On the CPU as float32; on the GPU in self.dtype, each byte copied there once."""
        if self.device == "cpu":
            return checkpoint.load(new_float32, copy_to_float32)
        return checkpoint.load(
            lambda *shape: self.place.empty(shape, self.elements),
            lambda place, tensor: self.place.upload(place, as_elements(tensor, self.dtype)))

    def allocate_buffers(self, num_blocks: int) -> None:
        """Everything a step reads and writes, at fixed places: graphs remember addresses."""
        cfg, P, new, elements = self.cfg, self.block_size, self.place.empty, self.elements
        T, B = self.largest_step()
        H, G, D = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        # one block more than there are: padding of a step writes there, nobody reads it
        cache = new((2, cfg.num_hidden_layers, num_blocks + 1, P, G, D), elements)
        self.kv_cache = cache
        # of each layer, (blocks, P, G, D); a view of a device array takes longer than its use
        self.k_cache, self.v_cache = ([half[l] for l in range(cfg.num_hidden_layers)]
                                      for half in (cache[0], cache[1]))
        self.x = new((T, cfg.hidden_size), elements)                      # residual stream
        self.h = new((T, cfg.hidden_size), elements)                      # normed input of a matmul
        self.delta = new((T, cfg.hidden_size), elements)                  # what a matmul adds to x
        self.qkv = new((T, H + 2 * G, D), elements)              # heads of q, then of k, then of v
        self.o = new((T, H, D), elements)
        self.gate_up = new((T, 2 * cfg.intermediate_size), elements)
        self.act = new((T, cfg.intermediate_size), elements)
        # rows of x and qkv of which logits are made
        self.last = new((B, cfg.hidden_size), elements)
        self.last_qkv = new((B, H + 2 * G, D), elements)
        self.logits = new((B, cfg.vocab_size), np.float32)
        inv_freq = kernels.rope_inv_freq(D, cfg.rope_theta, cfg.rope_scaling)
        self.cos, self.sin = map(self.on_device,
                                 kernels.rope_tables(inv_freq, self.max_model_len))
        self.splits = new(B + 1 + self.num_splits(self.max_model_len), np.int32)
        self.partial = new(self.partial_shape(self.max_model_len), np.float32)
        # of the kernel that is a whole decode step
        parts = kernels.parts_size(min(B, kernels.MAX_DECODE_TOKENS), H, G, D, cfg.hidden_size,
                                   cfg.intermediate_size)
        self.parts = new(parts if self.rung == "persistent" else 1, np.float32)
        # both at first 0, and one never without the other: stamps in the mail count from arrivals
        letters = kernels.mail_size(H, G, D, cfg.hidden_size, cfg.intermediate_size)
        self.mail = self.on_device(np.zeros(letters if self.rung == "persistent" else 1, np.uint64))
        self.arrivals = self.on_device(np.zeros(kernels.MEETINGS * cfg.num_hidden_layers + 3,
                                                np.uint32))
        # the flat arrays of a step, one behind another; its shape says where each begins
        self.step_buffer = new(3 * T + 5 * B + 1, np.int32)
        self.decode_inputs = new(2 * B, np.int32)
        self.starts = self.on_device(np.arange(B + 1, dtype=np.int32))    # one query each
        # a row for each request that runs, kept where the steps find it; the last is nobody's
        rows, V = self.max_num_seqs + 1, cfg.vocab_size
        self.block_tables = self.on_device(np.full((rows, ceil_div(self.max_model_len, P)),
                                                   num_blocks, np.int32))
        self.state = self.on_device(np.zeros((rows, 2), np.int32))
        self.settings = self.on_device(np.zeros((rows, kernels.NUM_SETTINGS), np.float32))
        self.seeds = self.on_device(np.zeros((rows, 2), np.uint32))
        self.bias, self.seen = new((rows, V), np.float32), new((rows, V), np.int32)
        self.scores = new((B, V), np.float32)
        self.chunk_max, self.chunk_argmax = (new(B * self.most_chunks(), kind)
                                             for kind in (np.float32, np.int32))
        # the newest token of each, and the one before, which the host may not have read yet
        self.sampled = self.place.mapped((rows, 2), np.int32)
        self.views: dict[tuple, Step] = {}                     # shape -> its arrays
        self.rows_on_device: list[int] = []                    # of the last decode step

    def on_device(self, values: np.ndarray):
        array = self.place.empty(values.shape, values.dtype)
        self.place.upload(array, values)
        return array

    # ---- shapes of steps: on the GPU few enough that each can have a graph. A step is padded to
    # one of them: a power of two while small, then a multiple of 128 tokens or 8 requests ----

    def padded_tokens(self, T: int) -> int:
        if not self.place.pipelined:
            return T
        return ceil_div(T, 128) * 128 if T > 128 else max(16, 1 << (T - 1).bit_length())

    def padded_requests(self, B: int) -> int:
        if not self.place.pipelined:
            return B
        return ceil_div(B, 8) * 8 if B > 8 else 1 << (B - 1).bit_length()

    def largest_step(self) -> tuple[int, int]:
        """Tokens and requests that the buffers must hold."""
        B = self.padded_requests(self.max_num_seqs)
        return max(self.padded_tokens(self.max_num_batched_tokens), B), B

    def describe(self) -> str:
        """One line: what runs where, and where the memory went."""
        arrays = self.weights.arrays()
        capacity = len(self.allocator.ref_counts)
        where = self.device
        if self.device == "cpu" and not kernels.SIMULATOR and shutil.which("nvidia-smi"):
            where += f" ({gpu_problem() or 'as asked'})"
        if self.device != "cpu":
            name = "" if self.device == "sim" else cuda.get_current_device().name
            name = name.decode() if isinstance(name, bytes) else name
            where += f" ({', '.join(filter(None, (name, self.dtype, self.rung + ' kernels')))})"
        return (f"{self.model_name} on {where}: {sum(a.size for a in arrays) / 1e6:,.1f} M "
                f"parameters, {format_bytes(sum(a.nbytes for a in arrays))}; KV cache "
                f"{format_bytes(capacity * self.bytes_per_block)} at most, {capacity:,} blocks of "
                f"{self.block_size} tokens; context up to {self.max_model_len:,} tokens")

    # ---- requests in ----

    def make_request(self, request_id: str, prompt, params: SamplingParams | None) -> Request:
        """Checks everything that can be checked before the request takes part in anything."""
        params = params or self.get_default_sampling_params()
        if not isinstance(params, SamplingParams):
            raise UserError(
                f"sampling_params is a {type(params).__name__}, expected SamplingParams")
        if request_id in self.requests:
            raise UserError(f"request_id {request_id!r} is in use: expected one that no unfinished "
                            "request has")
        text, ids = self.read_prompt(prompt)
        V = self.cfg.vocab_size
        if not ids:
            raise UserError("the prompt is empty, expected at least one token")
        plain = are_token_ids(ids, V)
        for token in () if plain else ids:         # slower by far, and knows which one
            if not is_token_id(token, V):
                raise UserError(f"the prompt holds token id {token!r}, expected integers from 0 to "
                                f"{V - 1}")
        for name in ("stop_token_ids", "logit_bias"):
            outside = [token for token in getattr(params, name) if not 0 <= token < V]
            if outside:
                raise UserError(f"{name} holds token id {outside[0]}, expected 0 to {V - 1}")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > V:
                raise UserError(f"{name} is {getattr(params, name)}, expected at most the "
                                f"vocabulary of {V}, or -1 for all")
        if params.stop and not self.tokenizer:
            raise UserError("stop strings need a tokenizer, and the checkpoint has no "
                            "tokenizer.json: use stop_token_ids")
        if len(ids) >= self.max_model_len:
            raise UserError(f"the prompt has {len(ids)} tokens, the context holds "
                            f"{self.max_model_len} and the answer needs at least one: shorten it, "
                            f"or use --max-model-len {len(ids) + 1} or more, if model (up to "
                            f"{self.cfg.max_position_embeddings}) and --kv-cache-memory-bytes "
                            "allow")
        request = Request(request_id, text, ids if plain else [int(token) for token in ids], params,
                          RequestMetrics(time.perf_counter()))
        seed = params.seed if params.seed is not None else int(self.rng.integers(2**63))
        for i in range(params.n):
            detokenizer = None
            if self.tokenizer and params.detokenize:
                detokenizer = Detokenizer(self.tokenizer, request.prompt_token_ids,
                                          params.skip_special_tokens)
            request.sequences.append(Sequence(request, i, (seed + i) % 2**64,
                                              list(request.prompt_token_ids), detokenizer))
        return request

    def read_prompt(self, prompt) -> tuple[str | None, list[int]]:
        """Text and ids of a str, {"prompt": str}, {"prompt_token_ids": [...]} or a list of ids."""
        text, ids = None, prompt
        if isinstance(prompt, dict):
            unknown = prompt.keys() - {"prompt", "prompt_token_ids"}
            if unknown or not prompt:
                raise UserError(f"the prompt has keys {sorted(prompt)}, expected 'prompt' or "
                                "'prompt_token_ids'")
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids", prompt.get("prompt"))
        if isinstance(ids, str):
            if not self.tokenizer:
                raise UserError("the checkpoint has no tokenizer.json, so text cannot be read: "
                                "pass {'prompt_token_ids': [...]}, or tokenizer= a directory that "
                                "has one")
            if not ids:
                raise UserError("the prompt is empty, expected at least one character")
            if not ids.isascii() and any("\ud800" <= c <= "\udfff" for c in ids):
                raise UserError("the prompt holds lone surrogates, which no UTF-8 text has: decode "
                                "its bytes with errors='replace'")
            return ids, self.tokenizer.encode(ids)
        if not isinstance(ids, (list, tuple, np.ndarray)):
            raise UserError(f"the prompt is a {type(prompt).__name__}, expected a str or "
                            "{'prompt_token_ids': [...]}")
        return text, list(ids)

    def enqueue(self, request: Request) -> None:
        self.requests[request.request_id] = request
        self.waiting.extend(request.sequences)

    def add_request(self, request_id: str, prompt, params: SamplingParams | None = None) -> None:
        """Queues a request; UserError if it can never be served, and nothing has changed then."""
        self.enqueue(self.make_request(request_id, prompt, params))

    def abort_request(self, request_id: str) -> None:
        """Ends a request at once; its blocks go back. Unknown and finished ids are ignored."""
        request = self.requests.get(request_id)
        for seq in request.sequences if request else []:
            self.finish(seq, "abort")

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def get_num_unfinished_requests(self) -> int:
        return len(self.requests)

    # ---- schedule: who computes what in this step ----

    def schedule(self) -> Batch | None:
        """The next step, None when there is nothing to start."""
        decoding = [seq for seq in self.running if seq.is_decoding and not self.is_complete(seq)]
        if self.static_batching:
            started = any(seq.num_sampled > 1 for seq in self.running if seq.is_decoding)
            prefill_turn = not started
        else:
            prefill_turn = not (decoding and self.prefilled_last)
        others_wait = bool(decoding) and not self.static_batching
        chunks = self.schedule_prefill(others_wait) if prefill_turn else []
        self.prefilled_last = bool(chunks)
        if chunks:
            return self.make_batch("prefill", chunks, [])
        scheduled, new_blocks = self.schedule_decode(decoding)
        if not scheduled:
            return None
        return self.make_batch("decode", [(seq, 1) for seq in scheduled], new_blocks)

    def is_complete(self, seq: Sequence) -> bool:
        """Whether its last token is sampled already, though perhaps not read: it ends by length."""
        return seq.num_sampled == seq.params.max_tokens or seq.num_tokens == self.max_model_len

    def make_batch(self, kind: str, chunks: list[tuple[Sequence, int]],
                   new_blocks: list[int | None]) -> Batch:
        sequences, counts = map(list, zip(*chunks))
        seq_lens = [seq.num_computed + count for seq, count in chunks]
        # a chunk that is not its sequence's last has nothing to sample
        ready = [b for b, seq in enumerate(sequences) if seq_lens[b] == seq.num_tokens]
        return Batch(kind, sequences, counts, seq_lens, ready, new_blocks)

    def schedule_prefill(self, others_wait: bool) -> list[tuple[Sequence, int]]:
        """Chunks for this step: whoever has begun goes on, then the queue in its order."""
        budget, chunks = self.max_num_batched_tokens, []
        if others_wait:
            budget = max(min(budget, SMALL_STEP), budget // 2)
        longest = budget
        candidates = deque(seq for seq in self.running if not seq.is_decoding)
        while budget and (candidates or self.admit(candidates)):
            seq = candidates.popleft()
            count = min(budget, seq.prefill_end - seq.num_computed)
            if others_wait:
                share = 1 + seq.num_computed // CHUNK_CONTEXT
                count = min(count, ceil_div(longest, share))
            self.register_full_blocks(seq, seq.num_computed + count)
            chunks.append((seq, count))
            budget -= count
        return chunks

    def admit(self, candidates: deque[Sequence]) -> bool:
        """Moves the head of the queue to the batch, if it has a place and blocks for all tokens."""
        if not self.waiting or len(self.running) == self.max_num_seqs:
            return False
        seq = self.waiting[0]
        hits = self.cached_prefix(seq)
        num_new = ceil_div(len(seq.token_ids), self.block_size) - len(hits)
        num_idle = sum(self.allocator.ref_counts[block] == 0 for block in hits)   # free, and named
        # a spare block for each that runs, or the next decode steps would preempt the newcomer
        if num_new + num_idle + len(self.running) > len(self.allocator.free):
            return False
        seq.block_table = [self.allocator.share(block) for block in hits]
        seq.block_table += [self.allocator.allocate() for _ in range(num_new)]
        seq.num_computed, seq.prefill_end = len(hits) * self.block_size, len(seq.token_ids)
        if seq.request.num_cached_tokens is None:
            seq.request.num_cached_tokens = seq.num_computed
        seq.row = self.free_rows.pop()
        if hits:
            self.cached[seq.name] = seq.num_computed
        self.running.append(self.waiting.popleft())    # before anything that can fail: see advance
        self.fill_row(seq)
        candidates.append(seq)
        return True

    def fill_row(self, seq: Sequence) -> None:
        """What the steps need to know of a sequence: its blocks, and how to sample from its logits.

        Invariant: a row is refilled only after all steps of its last owner have been started, and
        the stream keeps their order; of its tokens in `sampled` see `start`."""
        params, row, V = seq.params, seq.row, self.cfg.vocab_size
        seq.takes_largest = params.takes_largest
        self.place.upload(self.block_tables, np.array(seq.block_table, np.int32), row)
        settings = np.zeros(kernels.NUM_SETTINGS, np.float32)
        settings[kernels.TEMPERATURE] = 0 if params.greedy else params.temperature
        settings[kernels.TOP_K] = max(params.top_k, 0)
        settings[kernels.TOP_P], settings[kernels.MIN_P] = params.top_p, params.min_p
        settings[kernels.REPETITION] = params.repetition_penalty
        settings[kernels.PRESENCE] = params.presence_penalty
        settings[kernels.FREQUENCY] = params.frequency_penalty
        settings[kernels.EDITED] = params.edits
        self.place.upload(self.settings, settings, row)
        seed = np.array([seq.seed & 0xFFFFFFFF, seq.seed >> 32], np.uint32)
        self.place.upload(self.seeds, seed, row)
        if params.edits:
            seen = np.bincount(seq.output_ids, minlength=V).astype(np.int32)
            seen[np.unique(seq.request.prompt_token_ids)] += kernels.IN_PROMPT
            self.place.upload(self.seen, seen, row)
            self.fill_bias(seq)

    def fill_bias(self, seq: Sequence) -> None:
        self.place.upload(self.bias, self.bias_of(seq, seq.num_sampled), seq.row)

    def bias_of(self, seq: Sequence, num_sampled: int) -> np.ndarray:
        """(V,) float32, added to the logits that follow its first num_sampled outputs: logit_bias,
        and no way to stop before min_tokens."""
        bias = np.zeros(self.cfg.vocab_size, np.float32)
        for token, value in seq.params.logit_bias.items():
            bias[token] = value
        if num_sampled < seq.params.min_tokens:
            bias[list(self.eos_token_ids | set(seq.params.stop_token_ids))] = -np.inf
        return bias

    def cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks that hold seq's beginning already; not its last token: it wants logits."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        hits, longest = [], (len(seq.token_ids) - 1) // self.block_size
        for block_hash in self.full_block_hashes(seq, longest):
            if block_hash not in self.allocator.block_of:
                break
            hits.append(self.allocator.block_of[block_hash])
        return hits

    def full_block_hashes(self, seq: Sequence, num_blocks: int) -> list[bytes]:
        """Chained hashes of the first num_blocks blocks, computed once: tokens never change."""
        hashes, size = seq.block_hashes, 4 * self.block_size           # bytes of a block's tokens
        new = seq.token_ids[len(hashes) * self.block_size:num_blocks * self.block_size]
        data = np.array(new, np.int32).tobytes()
        for at in range(0, len(data), size):
            hashes.append(hash_block(hashes[-1] if hashes else b"", data[at:at + size]))
        return hashes[:num_blocks]

    def register_full_blocks(self, seq: Sequence, num_tokens: int) -> None:
        """Names the blocks that this prefill fills, before it runs: a layer writes all its K and V
        before any attention reads them, so even a sequence in the same step may share them.

        Blocks that decode fills get no name: its kernels add in another order than prefill's, and a
        prompt must find the bits that it would have computed itself."""
        first, last = seq.num_computed // self.block_size, num_tokens // self.block_size
        if self.enable_prefix_caching and last > first:
            hashes = self.full_block_hashes(seq, last)
            for i in range(first, last):
                self.allocator.register(seq.block_table[i], hashes[i])

    def schedule_decode(self, decoding: list[Sequence]) -> tuple[list[Sequence], list[int | None]]:
        """Who decodes, and the block that each got for its newest token, if it needed one; the
        youngest give way where there is none."""
        scheduled, new_blocks = [], []
        for seq in decoding:                  # oldest first: whoever gives way is not scheduled yet
            needed, new_block = ceil_div(seq.num_tokens, self.block_size), None
            while seq.row is not None and len(seq.block_table) < needed:
                if self.allocator.free:
                    new_block = self.allocator.allocate()
                    seq.block_table.append(new_block)
                else:
                    self.preempt(self.running[-1])
            if seq.row is not None:           # it did not give way itself
                scheduled.append(seq)
                new_blocks.append(new_block)
        return scheduled, new_blocks

    def preempt(self, seq: Sequence) -> None:
        """Takes all its blocks; it computes its tokens again, less what the prefix cache kept."""
        self.num_preemptions += 1
        self.preempted.append(seq.name)
        self.running.remove(seq)
        self.release_blocks(seq)
        self.waiting.appendleft(seq)

    def release_blocks(self, seq: Sequence) -> None:
        """Blocks and row go back. A step under way may still write to them: whoever gets them next
        comes later in the stream."""
        # the end of a context goes first when blocks are evicted
        for block in reversed(seq.block_table):
            self.allocator.release(block)
        if seq.row is not None:
            self.free_rows.append(seq.row)
        seq.block_table, seq.num_computed, seq.row = [], 0, None

    # ---- pack, forward, sample: the computation of a step ----

    def view_step(self, kind: str, T: int, B: int, greedy: bool = False) -> Step:
        """The arrays of a step of this shape, in step_buffer one behind another:

        tokens T | positions T | slots T | seq_lens B | rows B | sample_rows B | last_tokens B |
        query_starts B + 1
        """
        key = (kind, T, B, greedy)
        if key not in self.views:
            packed = self.step_buffer[:3 * T + 5 * B + 1]
            tokens, positions, slots = (packed[i * T:(i + 1) * T] for i in range(3))
            seq_lens, rows, sample_rows, last_tokens = (packed[3 * T + i * B:3 * T + (i + 1) * B]
                                                        for i in range(4))
            query_starts, inputs = packed[3 * T + 4 * B:], None
            if kind == "decode":       # what seldom changes lies where it can stay
                inputs = self.decode_inputs[:2 * B].reshape(2, B)
                rows = sample_rows = inputs[0]
                last_tokens, query_starts = self.starts[:B], self.starts[:B + 1]
            self.views[key] = Step(kind, T, B, tokens, positions, slots, seq_lens, rows,
                                   sample_rows, last_tokens, query_starts, packed, inputs, greedy)
        return self.views[key]

    def pack_prefill(self, batch: Batch) -> Step:
        """Flattens a prefill step: tokens of all its sequences behind one another, one upload."""
        P, nobody = self.block_size, self.max_num_seqs
        kind = "prefill" if batch.ready else "chunk"           # a chunk alone samples nothing
        step = self.view_step(kind, self.padded_tokens(batch.num_tokens),
                           self.padded_requests(len(batch.sequences)))
        T, B = step.T, step.B
        flat = np.zeros(3 * T + 5 * B + 1, np.int32)
        tokens, positions, slots = flat[:3 * T].reshape(3, T)
        seq_lens, rows, sample_rows, last_tokens = flat[3 * T:3 * T + 4 * B].reshape(4, B)
        query_starts = flat[3 * T + 4 * B:]
        slots[:] = len(self.allocator.ref_counts) * P          # padding: the block of nobody
        rows[:] = sample_rows[:] = nobody
        seq_lens[:] = 1                    # in the last layer a padded request has a query, too
        start, in_block = 0, np.arange(P, dtype=np.int32)
        for b, (seq, count, end) in enumerate(zip(batch.sequences, batch.counts, batch.seq_lens)):
            first, part = end - count, slice(start, start + count)
            tokens[part] = machine_words("I", seq.token_ids[first:end])    # faster than the list
            positions[part] = np.arange(first, end)
            # all slots of the blocks that the chunk touches, less those before its first token
            blocks = np.array(seq.block_table[first // P:ceil_div(end, P)], np.int32)
            slots[part] = (blocks[:, None] * P + in_block).reshape(-1)[first % P:first % P + count]
            seq_lens[b], rows[b] = end, seq.row
            start += count
            last_tokens[b], query_starts[b + 1] = start - 1, start
        query_starts[len(batch.sequences) + 1:] = start        # padded requests have no queries
        for b in batch.ready:
            sample_rows[b] = batch.sequences[b].row
        self.place.upload(step.packed, flat)
        return step

    def pack_decode(self, batch: Batch) -> Step:
        """Says who decodes; nothing is uploaded when that, and all block tables, are as before."""
        B = self.padded_requests(len(batch.sequences))
        greedy = self.rung == "persistent" and not self.keep_logits and all(
            seq.takes_largest for seq in batch.sequences)
        step = self.view_step("decode", B, B, greedy)
        rows = [seq.row for seq in batch.sequences]
        rows += [self.max_num_seqs] * (B - len(rows))          # padding: the row of nobody
        if rows != self.rows_on_device or any(block is not None for block in batch.new_blocks):
            inputs = np.zeros((2, B), np.int32)
            inputs[0] = rows
            inputs[1, :len(batch.new_blocks)] = [block or 0 for block in batch.new_blocks]
            self.rows_on_device = []                   # an interrupted upload is no upload
            self.place.upload(step.inputs, inputs)
            self.rows_on_device = rows
        return step

    def compute(self, step: Step) -> None:
        """All operations of a step: what a graph records."""
        if step.kind == "decode" and self.rung == "persistent":
            for first in range(0, step.B, kernels.MAX_DECODE_TOKENS):
                self.decode_at_once(step, first, min(first + kernels.MAX_DECODE_TOKENS, step.B))
        else:
            if step.kind == "decode":
                self.begin_decode(step, 0, step.B)
            self.forward(step)
            if step.kind != "chunk":
                self.compute_logits(step.B)
        if step.kind != "chunk":
            self.sample(step)

    def begin_decode(self, step: Step, first: int, end: int) -> None:
        """Tokens, positions, slots, lengths and splits of requests `first` to `end` of a step."""
        run = kernels.run_of(end - first, self.cfg.head_dim) if self.rung == "persistent" else 1
        self.ops.begin_decode(step.tokens[first:end], step.positions[first:end],
                              step.slots[first:end], step.seq_lens[first:end], self.splits,
                              step.inputs[:, first:end], self.state, self.block_tables,
                              self.block_size, self.cfg.num_key_value_heads, kernels.SPLIT, run)

    def decode_at_once(self, step: Step, first: int, end: int) -> None:
        """The logits of these requests, MAX_DECODE_TOKENS at most, by one kernel for all layers."""
        w = self.weights
        logits, chunk_max, chunk_argmax, x, h, o, act = (array[first:end] for array in (
            self.logits, *self.chunks(step.B, True), self.x, self.h, self.o, self.act))
        self.begin_decode(step, first, end)
        self.ops.forward_decode(logits, chunk_max, chunk_argmax, x, h, o, act, self.kv_cache,
                                self.parts, self.partial, self.mail, self.arrivals,
                                step.tokens[first:end], step.slots[first:end],
                                step.rows[first:end], step.seq_lens[first:end], self.splits,
                                self.block_tables, self.cos, self.sin, w.embed, w.norms, w.matrices,
                                self.cfg.rms_norm_eps, step.greedy)

    def forward(self, step: Step) -> None:
        """The transformer, one operation per line: self.last (B, C), a row for each request.

        Its last layer makes keys and values of all tokens, and the rest of the one token of each
        request whose logits somebody reads; of a chunk, which samples nothing, no more at all."""
        ops, T, B, layers = self.ops, step.T, step.B, self.weights.layers
        matmul = ops.matmul_decode if step.kind == "decode" else ops.matmul
        x, h, delta, heads = self.x[:T], self.h[:T], self.delta[:T], self.qkv[:T]
        qkv, eps = heads.reshape(T, -1), self.cfg.rms_norm_eps
        rotation = self.cos, self.sin, step.positions, step.slots

        ops.embedding(x, step.tokens, self.weights.embed)                 # (T,) -> (T, C)
        for l, w in enumerate(layers):
            if l == 0:
                ops.rmsnorm(h, x, w.norm_attn, eps)
            else:
                ops.add_rmsnorm(h, x, delta, w.norm_attn, eps)    # x += the MLP of the layer before
            matmul(qkv, h, w.wqkv)                                     # (T, C) -> (T, (H + 2G) * D)
            ops.rope_write_kv(heads, self.k_cache[l], self.v_cache[l], *rotation)
            if l + 1 < len(layers):
                self.finish_layer(l, step, x, heads, step.query_starts, step.kind == "decode")
        if step.kind != "chunk":
            last, last_heads = self.last[:B], self.last_qkv[:B]
            # a gather of rows: of decode all, of prefill the last of each request
            ops.embedding(last, step.last_tokens, x)
            ops.embedding(last_heads.reshape(B, -1), step.last_tokens, qkv)
            self.finish_layer(len(layers) - 1, step, last, last_heads, self.starts[:B + 1], True)
            ops.add(last, self.delta[:B])

    def finish_layer(self, l: int, step: Step, x, heads, query_starts, few: bool) -> None:
        """The rest of layer l once keys and values are written: attention of the queries in heads
        (T, H + 2G, D), which is added to x (T, C), and of the sum the MLP, which is left in delta.
        few: one row for each request, and not whenever there happen to be as many: the bits of a
        row must not depend on the company."""
        ops, w, T = self.ops, self.weights.layers[l], len(x)
        matmul = ops.matmul_decode if few else ops.matmul
        matmul_silu_mul = ops.matmul_silu_mul_decode if few else ops.matmul_silu_mul
        attention = ops.attention_decode if step.kind == "decode" else ops.attention
        h, delta, o, gate_up, act = (array[:T] for array in (self.h, self.delta, self.o,
                                                             self.gate_up, self.act))

        attention(o, heads, self.k_cache[l], self.v_cache[l], self.block_tables, step.rows,
                  query_starts, step.seq_lens, self.splits, self.partial)         # -> (T, H, D)
        matmul(delta, o.reshape(T, -1), w.wo)                             # (T, H * D) -> (T, C)
        ops.add_rmsnorm(h, x, delta, w.norm_mlp, self.cfg.rms_norm_eps)   # x += the attention
        matmul_silu_mul(act, h, w.w_gate_up, gate_up)                     # (T, C) -> (T, F)
        matmul(delta, act, w.w_down)                                      # (T, F) -> (T, C)

    def compute_logits(self, B: int):
        """Logits (B, V) of the first B rows of `last`, at most max_num_seqs."""
        last, h, logits = self.last[:B], self.h[:B], self.logits[:B]
        self.ops.rmsnorm(h, last, self.weights.norm, self.cfg.rms_norm_eps)
        self.ops.matmul_decode(logits, h, self.weights.lm_head)           # (B, C) -> (B, V)
        return logits

    def finish_all_tokens(self, step: Step) -> None:
        """x (T, C) after the last layer, of all tokens of the prefill step that has just run; once,
        for it adds to x."""
        x, heads = self.x[:step.T], self.qkv[:step.T]
        self.finish_layer(len(self.weights.layers) - 1, step, x, heads, step.query_starts, False)
        self.ops.add(x, self.delta[:step.T])

    def logits_of(self, indices, B: int):
        """Logits (B, V) of the tokens at `indices` (B,) of a step, after finish_all_tokens."""
        self.ops.embedding(self.last[:B], indices, self.x)
        return self.compute_logits(B)

    def sample(self, step: Step) -> None:
        """The next token of each request, into `sampled` and into its row's state; of a greedy step
        forward_decode has left the largest logits."""
        B, scores = step.B, self.scores[:step.B]
        chunk_max, chunk_argmax = self.chunks(B, step.greedy)
        if not step.greedy:
            self.ops.edit_logits(scores, chunk_max, chunk_argmax, self.logits[:B], step.sample_rows,
                                 self.settings, self.bias, self.seen)
        self.ops.sample_tokens(self.sampled, self.state, self.seen, scores, chunk_max, chunk_argmax,
                               step.sample_rows, step.seq_lens, self.settings, self.seeds)

    def chunks(self, B: int, greedy: bool) -> tuple:
        """The largest logit of each chunk of B rows, (B, chunks) f32, and its token, i32: of a
        greedy step small chunks, as forward_decode leaves them, otherwise those of edit_logits."""
        count = self.cfg.vocab_size // kernels.CHUNK if greedy else kernels.chunks_of(B)
        return tuple(array[:B * count].reshape(B, count)
                     for array in (self.chunk_max, self.chunk_argmax))

    # ---- step: schedule, start, retire ----

    def step(self) -> list[RequestOutput]:
        """Starts a step, and returns the requests that grew or ended in the one it finished: the
        same on the CPU, the one before on the GPU."""
        return [request.output() for request in self.advance()]

    def advance(self) -> list[Request]:
        """step, but the requests themselves."""
        batch, finished = None, self.in_flight
        try:
            before = self.allocator.counts.copy()
            batch = self.schedule()
            if batch:
                batch.changes = self.allocator.counts - before
                batch.cached, self.cached = self.cached, {}
                batch.preempted, self.preempted = self.preempted, []
                if self.on_step:
                    batch.held = {seq.name: list(seq.block_table) for seq in self.running}
            self.batch = batch or self.batch
            self.in_flight = self.start(batch) if batch else None
        except BaseException as error:
            self.in_flight = None
            self.lose(batch.sequences if batch else list(self.running), error)
            if finished:                               # the step before it did run
                self.retire_step(*finished)
            raise
        if not self.place.pipelined:
            finished, self.in_flight = self.in_flight, None
        return self.retire_step(*finished) if finished else []

    def lose(self, sequences: list[Sequence], error: BaseException) -> None:
        """Ends those whose step failed; the others can go on. Named blocks may be half written."""
        self.allocator.forget_hashes()
        for seq in sequences:
            self.finish(seq, "error" if isinstance(error, Exception) else "abort")

    def start(self, batch: Batch) -> tuple[Batch, Callable, dict[int, np.ndarray]]:
        """Runs a step, or sets it going: the batch, how to get its tokens, and raw logits where
        somebody wants logprobs."""
        batch.started = time.perf_counter()
        step = self.pack_decode(batch) if batch.kind == "decode" else self.pack_prefill(batch)
        for seq in batch.sequences:
            if 0 < seq.params.min_tokens == seq.num_sampled:   # from here on it may stop
                self.fill_bias(seq)
        self.place.run(step.shape, lambda: self.compute(step))
        done = self.place.when_done()
        # invariant: these tokens are read before others take their place. The next step, started
        # before that, writes to the other column, for each context is a token longer; and no step
        # both preempts and admits, so whoever gets the row of one that gave way comes a step later
        rows, turns = [seq.row for seq in batch.sequences], np.array(batch.seq_lens) & 1
        if self.place.timing:
            batch.kernels, batch.ended = self.place.kernel_times(), time.perf_counter()
        wanted = [b for b in batch.ready
                  if self.keep_logits or batch.sequences[b].params.logprobs is not None]
        logits = {b: self.place.download(self.logits[b]).copy() for b in wanted}
        self.score_prompts(batch, step)
        for seq, end in zip(batch.sequences, batch.seq_lens):
            seq.num_computed = end
        for b in batch.ready:
            batch.sequences[b].num_pending += 1

        def tokens() -> np.ndarray:
            done()
            return self.sampled[rows, turns]
        return batch, tokens, logits

    def retire_step(self, batch: Batch, tokens: Callable, logits: dict) -> list[Request]:
        """Gives the tokens of a finished step to their sequences: the requests that grew."""
        grown, choices = {}, []
        # on the GPU a step may have been under way when the last of its requests ended
        of_use = any(not seq.finish_reason for seq in batch.sequences)
        try:
            sampled = tokens().tolist()
            for b in batch.ready:
                seq, token = batch.sequences[b], sampled[b]
                seq.num_pending -= 1
                if seq.finish_reason:              # it ended while this step was under way
                    continue
                if self.on_step:
                    choices.append(Choice(seq, batch.seq_lens[b], token, logits.get(b)))
                if seq.params.logprobs is not None and token >= 0:
                    entry = self.logprobs_of(logits[b], token, seq.params.logprobs)
                    seq.logprobs.append(entry)
                    seq.cumulative_logprob += entry[token].logprob
                self.retire(seq, token)
                grown[seq.request] = None
        except BaseException as error:
            self.lose(batch.sequences, error)
            raise
        self.num_tokens[batch.kind] += batch.num_tokens
        self.num_steps += 1
        report = self.report(batch, choices) if self.on_step and of_use else None
        self.read_at, self.freed_before = time.perf_counter(), self.allocator.counts["freed"]
        if report:
            self.on_step(report)
        return list(grown)

    def report(self, batch: Batch, choices: list[Choice]) -> StepReport:
        """What a step did that has just been read."""
        cfg, L = self.cfg, self.cfg.num_hidden_layers
        H, G, D = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        lm_head = cfg.vocab_size * cfg.hidden_size
        layer = kernels.layer_size(H, G, D, cfg.hidden_size, cfg.intermediate_size)
        qkv, keys = (H + 2 * G) * D * cfg.hidden_size, sum(batch.seq_lens)     # keys are read once
        asked = len(batch.sequences) if batch.ready else 0     # rows through all of the last layer
        read = (L - 1) * (layer + 2 * G * D * keys) + qkv
        if asked:
            read += layer - qkv + 2 * G * D * keys + lm_head
        pairs = sum(count * end - count * (count - 1) // 2
                    for count, end in zip(batch.counts, batch.seq_lens))      # of query and key
        started, ended = batch.started, batch.ended
        if ended is None:              # on the GPU it began, at the earliest, after the step before
            started, ended = max(started, self.read_at), time.perf_counter()
        return StepReport(
            self.num_steps, batch.kind, started, ended - started,
            [(seq.name, count, end) for seq, count, end in zip(batch.sequences, batch.counts,
                                                               batch.seq_lens)],
            batch.changes, self.allocator.counts["freed"] - self.freed_before, batch.cached,
            batch.preempted,
            len(self.waiting), len(self.allocator.ref_counts) - len(self.allocator.free),
            len(self.allocator.ref_counts),
            read * self.elements.itemsize,
            2 * ((L - 1) * layer + qkv) * batch.num_tokens + 2 * (layer - qkv) * asked
            + 2 * lm_head * len(batch.ready)
            + 4 * H * D * ((L - 1) * pairs + (keys if asked else 0)),
            batch.held, batch.kernels, choices)

    def logprobs_of(self, logits: np.ndarray, token: int, count: int) -> dict[int, Logprob]:
        """The chosen token and the `count` likeliest (-1: all) of one row of raw logits."""
        logprobs, V = kernels.log_softmax_ref(logits), len(logits)
        count = V if count < 0 else count
        likeliest = np.arange(V) if count == V else np.argpartition(-logits, count)[:count]
        likeliest = likeliest[np.argsort(-logits[likeliest], kind="stable")].tolist()
        ranks = {token: 1 + int((logits > logits[token]).sum())}
        ranks.update(zip(likeliest, range(1, count + 1)))

        def decoded(t):
            return self.tokenizer.decode([t], skip_special_tokens=False) if self.tokenizer else None
        return {t: Logprob(float(logprobs[t]), rank, decoded(t)) for t, rank in ranks.items()}

    def score_prompts(self, batch: Batch, step: Step) -> None:
        """Appends the prompt logprobs of a chunk: position i predicts prompt token i + 1."""
        start, finished = 0, False
        for seq, end, count in zip(batch.sequences, batch.seq_lens, batch.counts):
            wanted, scored = seq.params.prompt_logprobs, seq.request.prompt_logprobs
            ids, computed, start = seq.request.prompt_token_ids, end - count, start + count
            if wanted is None or batch.kind == "decode":
                continue
            # another sample of the request, or this one before a preemption, may have come further
            first, last = max(computed, len(scored) - 1), min(end, len(ids) - 1)
            for i in range(first, last, self.max_num_seqs):
                positions = np.arange(i, min(i + self.max_num_seqs, last), dtype=np.int32)
                indices = self.on_device(positions - computed + start - count)
                if not finished:
                    self.finish_all_tokens(step)
                    finished = True
                logits = self.place.download(self.logits_of(indices, len(positions)))
                for position, row in zip(positions, logits):
                    scored.append(self.logprobs_of(row, ids[position + 1], wanted))

    def retire(self, seq: Sequence, token: int) -> None:
        """Appends the sampled token to its sequence, and ends the sequence if this was its last."""
        request, params = seq.request, seq.params
        if token < 0:
            self.finish(seq, "error", "no finite logit is left to choose from: the weights hold "
                        "NaN or Inf, or every token is ruled out")
            return
        seq.token_ids.append(token)
        request.metrics.first_token_time = request.metrics.first_token_time or time.perf_counter()
        long_enough = seq.num_outputs >= params.min_tokens
        is_eos = token in self.eos_token_ids and not params.ignore_eos
        ends = long_enough and (is_eos or token in params.stop_token_ids)
        if seq.detokenizer and (not ends or params.include_stop_str_in_output):
            self.append_text(seq, seq.detokenizer.push(token))
        if seq.finish_reason:
            return
        if ends:
            self.finish(seq, "stop", None if is_eos else token)
        elif seq.num_outputs == params.max_tokens or len(seq.token_ids) == self.max_model_len:
            self.finish(seq, "length")

    def append_text(self, seq: Sequence, piece: str) -> None:
        """Adds text, and ends the sequence where the earliest stop string is complete."""
        before = len(seq.text)
        seq.text += piece
        if seq.num_outputs < seq.params.min_tokens:
            return
        ends = []                                  # (where a stop string is complete, the string)
        for stop in seq.params.stop if piece else []:
            # it ends inside the piece, so it begins at most its own length - 1 before
            at = seq.text.find(stop, max(0, before - len(stop) + 1))
            if at >= 0:
                ends.append((at + len(stop), stop))
        if ends:
            end, stop = min(ends)
            kept = end if seq.params.include_stop_str_in_output else end - len(stop)
            seq.text = seq.text[:kept]
            self.finish(seq, "stop", stop)

    def finish(self, seq: Sequence, finish_reason: str,
               stop_reason: int | str | None = None) -> None:
        """Ends a sequence wherever it stands; its blocks go back. Once ended, it stays as it is."""
        if seq.finish_reason:
            return
        stopped_in_text = finish_reason == "stop" and isinstance(stop_reason, str)
        if seq.detokenizer and not stopped_in_text:
            seq.text += seq.detokenizer.flush()
        self.release_blocks(seq)
        (self.running if seq in self.running else self.waiting).remove(seq)
        seq.finish_reason, seq.stop_reason = finish_reason, stop_reason
        if seq.request.finished:
            seq.request.metrics.finished_time = time.perf_counter()
            del self.requests[seq.request.request_id]

    # ---- the calls people make ----

    def submit(self, prompts, sampling_params=None) -> list[str]:
        """Queues one prompt or a list of them, all or none, and returns their request ids."""
        if isinstance(prompts, (str, dict)):
            prompts = [prompts]
        if not isinstance(prompts, (list, tuple)):
            raise UserError(f"prompts is a {type(prompts).__name__}, expected a prompt or a list")
        if prompts and isinstance(prompts[0], (int, np.integer)):
            prompts = [prompts]                    # one prompt, as token ids
        params = sampling_params
        if not isinstance(params, (list, tuple)):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise UserError(f"there are {len(prompts)} prompts and {len(params)} sampling_params, "
                            "expected as many or one")
        requests = [self.make_request(self.new_request_id(), prompt, p)
                    for prompt, p in zip(prompts, params)]
        for request in requests:
            self.enqueue(request)
        return [request.request_id for request in requests]

    def new_request_id(self) -> str:
        """A number that no unfinished request has."""
        while True:
            self.request_counter += 1
            if str(self.request_counter) not in self.requests:
                return str(self.request_counter)

    def run(self, request_ids: list[str]) -> Iterator[RequestOutput]:
        """Steps until these requests have ended, yielding each when it has grown, whoever made the
        step. Left early, it aborts them."""
        requests = [self.requests[request_id] for request_id in request_ids]
        shown = dict.fromkeys(request_ids, (0, False))
        for _ in self.steps(requests):
            for request in requests:
                state = sum(seq.num_outputs for seq in request.sequences), request.finished
                if state != shown[request.request_id]:
                    shown[request.request_id] = state
                    yield request.output()

    def steps(self, requests: list[Request]) -> Iterator[int]:
        """Steps until these requests have ended, yielding after each how many were unfinished
        before it; at the end 0, for what ended while somebody else made the steps. Left early, it
        aborts them."""
        unfinished = requests
        try:
            while unfinished := [request for request in unfinished if not request.finished]:
                if self.interrupted:
                    self.interrupted = False
                    raise KeyboardInterrupt
                self.advance()
                yield len(unfinished)
            yield 0
        finally:
            for request in unfinished:
                if not request.finished:
                    self.abort_request(request.request_id)

    def stream(self, prompts, sampling_params=None) -> Iterator[RequestOutput]:
        """Like generate, but yields the requests as they grow: all their text so far."""
        yield from self.run(self.submit(prompts, sampling_params))

    def generate(self, prompts,
                 sampling_params: SamplingParams | list[SamplingParams] | None = None, *,
                 use_tqdm: bool = True) -> list[RequestOutput]:
        """Answers of all prompts, in their order.

        prompts: one or a list; each a str, {"prompt": str}, {"prompt_token_ids": [...]} or a list
        of ids.
        sampling_params: one for all, or one each; None takes get_default_sampling_params().
        """
        requests = [self.requests[request_id]
                    for request_id in self.submit(prompts, sampling_params)]
        with tqdm(total=len(requests), desc="answers", unit="", delay=1, leave=False,
                  disable=not use_tqdm) as bar:
            for unfinished in self.steps(requests):
                bar.update(len(requests) - unfinished - bar.n)
        return [request.output() for request in requests]

    def chat(self, messages: list[dict] | list[list[dict]], sampling_params=None, *,
             use_tqdm: bool = True,
             add_generation_prompt: bool = True,
             continue_final_message: bool = False) -> list[RequestOutput]:
        """Answers of one conversation or a list of them: [{"role": "user", "content": "..."},
        ...]."""
        conversations = messages if messages and isinstance(messages[0], list) else [messages]
        prompts = [self.chat_prompt(c, add_generation_prompt, continue_final_message)
                   for c in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def chat_prompt(self, messages: list[dict], add_generation_prompt: bool = True,
                    continue_final_message: bool = False) -> dict:
        """The prompt that a conversation becomes: its rendered text and its token ids."""
        if not self.tokenizer:
            raise UserError("chat needs a tokenizer, and the checkpoint has no tokenizer.json: "
                            "pass prompt_token_ids")
        text = self.tokenizer.render_chat(messages, add_generation_prompt, continue_final_message)
        return {"prompt": text, "prompt_token_ids": self.tokenizer.encode_chat(text)}

    def get_tokenizer(self) -> Tokenizer | None:
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What generation_config.json recommends; greedy unless it asks for sampling."""
        return SamplingParams(**recommended_sampling(self.generation_config))


LLM = Engine                                       # the name that vLLM's users type


def recommended_sampling(generation_config: dict) -> dict:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    recommended = {name: generation_config[name] for name in names
                   if generation_config.get(name) is not None}
    if not generation_config.get("do_sample"):
        recommended["temperature"] = 0.0
    return recommended


def check_positive(**options) -> None:
    for name, value in options.items():
        if value is not None and (not is_token_id(value, 1 << 62) or value < 1):
            raise UserError(f"{name} is {value!r}, expected a positive integer")


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """None where the checkpoint has none: token ids still work."""
    return Tokenizer(directory) if (directory / "tokenizer.json").exists() else None


# -----------------------------------------------------------------------------
# 9. What a step did                                    (lessons 13, 14 and 15)
#
# The engine tells of each step when its tokens have been read: as a line on standard error, or a
# picture of slots and blocks where that is a terminal (--explain); with the candidates of each
# token, one step at a time (--step); in a file that a trace viewer or a browser draws (--trace).


@dataclass
class Choice:
    """A token that a step sampled."""
    sequence: Sequence
    position: int                                  # tokens of context that it follows
    token: int
    logits: np.ndarray | None                      # (V,) raw, if Engine.keep_logits


@dataclass
class StepReport:
    number: int
    kind: str                                      # "prefill" or "decode"
    started: float                                 # seconds, as time.perf_counter() counts them
    seconds: float
    members: list[tuple[str, int, int]]            # request, tokens computed, context afterwards
    changes: Counter                               # blocks taken, shared, evicted when it was made
    freed: int                                     # blocks, since the step before was read
    cached: dict[str, int]                         # request -> prompt tokens found in the cache
    preempted: list[str]                           # requests that gave their blocks back
    num_waiting: int
    blocks_in_use: int
    num_blocks: int
    bytes: int                                     # weights and contexts, each read once
    flops: int
    held: dict[str, list[int]]                     # request -> its blocks when the step was made
    kernels: list[tuple[str, float]]               # in their order, with seconds, if timed
    choices: list[Choice]


def measure_ceilings(engine: Engine) -> tuple[float, float]:
    """Bytes and floating-point operations a second that this machine reaches: one large matrix
    times a vector, and times a matrix. On the GPU a copy within its memory, and what the
    multiprocessors' tensor cores can do at the highest clock."""
    if engine.device == "cuda":
        return engine.place.ceilings()
    matrix, vector = np.ones((4096, 8192), np.float32), np.ones(8192, np.float32)
    square = matrix[:1024, :1024].copy()
    square @ square, matrix @ vector               # threads are started, pages are there
    begin = time.perf_counter()
    matrix @ vector
    middle = time.perf_counter()
    square @ square
    end = time.perf_counter()
    return matrix.nbytes / (middle - begin), 2 * 1024**3 / (end - middle)


def summarize(report: StepReport) -> str:
    """What a step computed, and what became of the blocks, in one line."""
    prefill, members = report.kind == "prefill", report.members
    shown = ", ".join(f"{name} {end - count}..{end - 1}" if prefill else name
                      for name, count, end in members[:8]) + ", ..." * (len(members) > 8)
    longest = max(end for _, _, end in members)
    who = (f"tokens of {shown}" if prefill else
           f"{len(members)} x 1 token of {shown}; longest context {longest}")
    blocks = [f"{report.changes[change]} {change}" for change in ("taken", "shared", "evicted")
              if report.changes[change]]
    blocks += [f"{report.freed} freed"] * (report.freed > 0)
    line = (f"step {report.number} {report.kind}: {who}; blocks {', '.join(blocks) or 'as before'} "
            f"({report.blocks_in_use} of {report.num_blocks} in use)")
    if report.cached:
        line += "; cached " + ", ".join(f"{count} tokens of {name}"
                                        for name, count in report.cached.items())
    if report.preempted:
        line += f"; preempted {', '.join(report.preempted)}"
    if report.num_waiting:
        line += f"; {report.num_waiting} waiting"
    return line


def share_of_bound(report: StepReport, ceilings: tuple[float, float]) -> str:
    """How long a step took, and how much of what the machine can do that is."""
    bandwidth, speed = ceilings
    moving, computing = report.bytes / bandwidth, report.flops / speed
    bound = "memory" if moving > computing else "arithmetic"
    return (f"{report.seconds * 1e6:,.0f} us, "
            f"{100 * max(moving, computing) / report.seconds:.0f} % of what {bound} allows")


def explain(report: StepReport, ceilings: tuple[float, float]) -> str:
    """A step in one line."""
    return f"{summarize(report)}; {share_of_bound(report, ceilings)}"


LETTERS = "abcdefghijklmnopqrstuvwxyz"
COLOURS = 39, 208, 77, 170, 220, 44, 203, 111, 149, 213        # of 256, legible on black and white


def letter_of(name: str) -> tuple[str, int]:
    """The letter and the colour that stand for a request: ids count up."""
    n = int(name.split(".")[0]) - 1 if name.split(".")[0].isdecimal() else sum(map(ord, name))
    return LETTERS[n % len(LETTERS)], COLOURS[n % len(COLOURS)]


def painted(text: str, colour: int) -> str:
    return f"\x1b[38;5;{colour}m{text}\x1b[0m"


class LiveView:
    """What the engine holds, drawn in place after each step: the running requests, and a map of the
    KV blocks with a letter for each owner, a capital where several share a block."""
    SLOTS, MAP_LINES, SECONDS_APART = 16, 8, 0.05

    def __init__(self, engine: Engine, ceilings: tuple[float, float], width: int, rows: int):
        self.engine, self.ceilings, self.width = engine, ceilings, max(1, width)
        # four more lines of text, and one left for the cursor: what scrolls away is not drawn over
        self.slots = max(1, min(self.SLOTS, rows - self.MAP_LINES - 5))
        self.height, self.drawn_at = 0, 0.0
        self.names = set()                         # of whom the last picture told

    def show(self, report: StepReport) -> None:
        """Draws over what was drawn before. The last step of a batch stays, and so does what stands
        there when other requests come: their picture begins below."""
        last = not self.engine.requests
        if not last and time.perf_counter() - self.drawn_at < self.SECONDS_APART:
            return
        lines = self.draw(report)
        names = {name for name, *_ in report.members}
        names |= {seq.name for seq in (*self.engine.running, *self.engine.waiting)}
        up = f"\x1b[{self.height}F\x1b[J" if self.height and names & self.names else ""
        # without wrapping: a character may be two columns wide
        note(f"{up}\x1b[?7l" + "\n".join(lines) + "\x1b[?7h")
        self.height, self.drawn_at = 0 if last else len(lines), time.perf_counter()
        self.names = names

    def draw(self, report: StepReport) -> list[str]:
        running, width = self.engine.running, self.width
        head, slots = [summarize(report), share_of_bound(report, self.ceilings)], []
        for seq in running[:self.slots]:
            letter, colour = letter_of(seq.name)
            computed = f"{seq.num_computed:5d}" + (
                f" of {seq.prefill_end} prefilled" if not seq.is_decoding else " tokens")
            line = f" {seq.name} {computed}  "
            text = "".join(c if c.isprintable() else " " for c in seq.text)
            line += text[max(0, len(text) - max(0, width - 1 - len(line))):]
            slots.append(painted(letter, colour) + line[:width - 1])
        left_out, waiting = len(running) - len(slots), len(self.engine.waiting)
        if left_out or waiting:
            slots.append(f"{left_out} more running, {waiting} waiting"[:width])
        return [line[:width] for line in head] + slots + self.map_of_blocks(report)

    def map_of_blocks(self, report: StepReport) -> list[str]:
        """A cell for one block, or for several of which the first with an owner counts."""
        counts, named = self.engine.allocator.ref_counts, self.engine.allocator.hash_of
        owners = {block: seq.name for seq in self.engine.running for block in seq.block_table}
        shown = min(len(counts), max([*owners, *named, self.width - 1]) + 1)
        size = ceil_div(shown, self.width * self.MAP_LINES)            # blocks in a cell
        cells = []
        for first in range(0, shown, size):
            blocks = range(first, min(first + size, shown))
            owned = next((block for block in blocks if block in owners), None)
            if owned is not None:
                letter, colour = letter_of(owners[owned])
                cells.append(painted(letter.upper() if counts[owned] > 1 else letter, colour))
            else:
                cells.append("-" if any(block in named for block in blocks) else ".")
        several = f", {size} in a cell" if size > 1 else ""
        title = (f"KV blocks 0 to {shown - 1} of {len(counts)}{several}: {report.blocks_in_use} in "
                 "use, - cached, . free")
        rows = ["".join(cells[i:i + self.width]) for i in range(0, len(cells), self.width)]
        return [title[:self.width], *rows]


def explain_choice(choice: Choice, engine: Engine, count: int = 5) -> str:
    """The likeliest candidates for a token, and why the sampler took this one."""
    seq, params, V = choice.sequence, choice.sequence.params, len(choice.logits)
    if choice.token < 0:
        return f"request {seq.name}: no finite logit is left to choose from"

    def spelled(ids):
        if engine.tokenizer is None:
            return str(ids)
        return repr(engine.tokenizer.decode(ids, skip_special_tokens=False))
    probabilities, edited = kernels.softmax_ref(choice.logits), edited_logits(choice, engine)
    edits = " after bias and penalties" if (edited != choice.logits).any() else ""
    scores, noise, why = edited.copy(), np.zeros(V, np.float32), f"greedy: the largest logit{edits}"
    if not params.greedy:
        kernels.filter_ref(scores, params.temperature, params.top_k, np.float32(params.top_p),
                           params.min_p)
        noise = kernels.gumbel_ref(seq.seed, choice.position, V)
        why = (f"the largest logit{edits} / {params.temperature:g} + noise, which seed {seq.seed} "
               f"and position {choice.position} make, of the {(scores > -np.inf).sum()} tokens "
               "that top-k, top-p and min-p leave")
    likeliest = np.argsort(-probabilities, kind="stable")[:count].tolist()
    lines = [f"request {seq.name}, after {spelled(seq.token_ids[:choice.position][-8:])}: {why}"]
    for token in likeliest + [choice.token] * (choice.token not in likeliest):
        mark = ">" if token == choice.token else " "
        line = (f"  {mark} {spelled([token]):<16} {100 * probabilities[token]:6.2f} %  logit "
                f"{choice.logits[token]:8.3f}")
        if edits:
            line += f"  edited {edited[token]:8.3f}"
        if not params.greedy:
            line += (f"  noise {noise[token]:+7.3f}  score {scores[token] + noise[token]:8.3f}"
                     if scores[token] > -np.inf else "  filtered out")
        lines.append(line)
    return "\n".join(lines)


def edited_logits(choice: Choice, engine: Engine) -> np.ndarray:
    """(V,) float32 logits of a choice after bias and penalties, as its sampler saw them."""
    seq, params, V = choice.sequence, choice.sequence.params, len(choice.logits)
    prompt = seq.request.prompt_token_ids
    logits = choice.logits + engine.bias_of(seq, choice.position - len(prompt))
    if params.penalizes:
        counts = np.bincount(seq.token_ids[len(prompt):choice.position], minlength=V)
        kernels.penalize_ref(logits, counts, np.bincount(prompt, minlength=V) > 0,
                             params.repetition_penalty, params.presence_penalty,
                             params.frequency_penalty)
    return logits


class Stepper:
    """Shows the candidates of each token, and waits for the Enter key after each step."""

    def __init__(self, engine: Engine, waits: bool):
        self.engine, self.shows, self.waits = engine, True, waits

    def show(self, report: StepReport) -> None:
        if not self.shows:
            return
        if sys.stdout.isatty():                    # below the text that has come so far
            note("")
        for choice in report.choices:
            note(explain_choice(choice, self.engine))
        if self.waits:
            note("Enter: the next step; c: show no more; q: end here")
            line = sys.stdin.readline()
            self.waits = line != ""                # or the input has ended: nobody is there
            self.shows = line.strip() != "c"
            if line.strip() == "q":
                self.engine.interrupted = True


class Trace:
    """A file of all steps: for chrome://tracing and ui.perfetto.dev (.json, Trace Event Format), or
    a page that any browser shows (.html)."""

    def __init__(self, path: str):
        if not path.endswith((".json", ".html")):
            raise UserError(f"--trace {path}: expected a file name that ends in .json or .html")
        try:
            self.file = open(path, "w", encoding="utf-8")      # now, not after the work
        except OSError as error:
            raise UserError(f"cannot write --trace {path}: {error.strerror}") from None
        self.page = None
        if path.endswith(".html"):
            self.page = (HOME / "assets" / "trace.html").read_text("utf-8")
        self.events: list[dict] = []
        self.rows = {"steps": 0, "kernels": 1}
        self.steps: list[dict] = []
        self.held: dict[str, list[int]] = {}                   # when the step before was made

    def add(self, report: StepReport) -> None:
        if self.page:
            self.add_step(report)
        else:
            self.add_events(report)

    def add_events(self, report: StepReport) -> None:
        """A row of all steps, one of all kernels, a row for each request, and the blocks in use."""
        def event(name, row, started, seconds, **args):
            self.events.append(dict(name=name, ph="X", ts=started * 1e6, dur=seconds * 1e6, pid=0,
                                    tid=row, args=args))
        event(report.kind, 0, report.started, report.seconds, step=report.number,
              requests=len(report.members), **dict(report.changes, freed=report.freed),
              cached=report.cached, preempted=report.preempted, waiting=report.num_waiting,
              bytes=report.bytes, flops=report.flops)
        began = report.started
        for name, seconds in report.kernels:
            event(name, 1, began, seconds)
            began += seconds
        for name, count, end in report.members:
            row = self.rows.setdefault(f"request {name}", len(self.rows))
            event(f"{report.kind} {count}", row, report.started, report.seconds, tokens=count,
                  context=end)
        self.events.append(dict(name="KV blocks", ph="C", ts=report.started * 1e6, pid=0,
                                args={"in use": report.blocks_in_use}))

    def add_step(self, report: StepReport) -> None:
        """Of the block tables only what is new: they grow at the end, or are given back whole."""
        gone = [name for name, blocks in self.held.items()
                if report.held.get(name, [])[:len(blocks)] != blocks]
        took = {name: blocks[0 if name in gone else len(self.held.get(name, [])):]
                for name, blocks in report.held.items()}
        self.held = report.held
        kernels_us = Counter()
        for name, seconds in report.kernels:
            kernels_us[name] += 1e6 * seconds
        self.steps.append(dict(
            line=summarize(report), kind=report.kind, us=1e6 * report.seconds,
            members=report.members, gone=gone,
            took={name: blocks for name, blocks in took.items() if blocks},
            kernels={name: round(us, 1) for name, us in kernels_us.most_common()}))

    def write(self, engine: Engine) -> None:
        with self.file as file:
            if self.page:
                data = dict(title=engine.describe(), blocks=len(engine.allocator.ref_counts),
                            steps=self.steps)
                # subtle: a request may be named "</script>"
                text = json.dumps(data).replace("<", "\\u003c")
                file.write(self.page.replace("/*DATA*/", text))
                return
            names = [dict(name="thread_name", ph="M", pid=0, tid=row, args=dict(name=name))
                     for name, row in self.rows.items()]
            json.dump({"traceEvents": names + self.events, "displayTimeUnit": "ms"}, file)


@contextmanager
def watching(engine: Engine, args: argparse.Namespace, trace: Trace | None):
    """Tells of every step meanwhile; the trace is written even if the work is interrupted."""
    watchers = []
    if args.explain:
        ceilings = measure_ceilings(engine)
        if draws_live(args):
            size = os.get_terminal_size(sys.stderr.fileno())       # 0 where nobody has set it
            watchers.append(LiveView(engine, ceilings, (size.columns or 80) - 1,
                                     size.lines or 24).show)
        else:
            watchers.append(lambda report: note(explain(report, ceilings)))
    if args.step:
        # a conversation that comes from a file is no Enter key
        watchers.append(Stepper(engine, not args.chat or sys.stdin.isatty()).show)
    if trace:
        watchers.append(trace.add)

    def watch(report: StepReport) -> None:
        for watcher in watchers:
            watcher(report)
    engine.on_step = watch if watchers else None
    engine.keep_logits, engine.place.timing = args.step, args.step or trace is not None
    try:
        yield
    finally:
        engine.on_step, engine.keep_logits, engine.place.timing = None, False, False
        if trace:
            trace.write(engine)


def draws_live(args: argparse.Namespace) -> bool:
    """Whether --explain is a picture: not in a file, and not where --step writes between."""
    return args.explain and not args.step and sys.stderr.isatty()


def streams(args: argparse.Namespace) -> bool:
    """Whether text comes out as it grows; a picture on the same terminal shows it meanwhile."""
    return not (draws_live(args) and sys.stdout.isatty())


# -----------------------------------------------------------------------------
# 10. Command line
#
# Text goes to stdout and everything else to stderr. Exit codes: 0 success, 1 bad input or failure,
# 2 usage, 130 interrupted.

DEFAULT_MAX_TOKENS = 512
SAMPLING_FLAGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop",
                  "max_tokens")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tinyvllm.py", description="An LLM inference engine in two flat files.",
        epilog="example: python tinyvllm.py --model meta-llama/Llama-3.2-1B-Instruct --prompt 'Why "
        "is the sky blue?'")
    add = parser.add_argument
    add("--model", default=DEMO, help="checkpoint directory or hub id (default: the demo model in "
        "demo/)")
    add("--prompt", "-p", action="append", default=[],
        help="repeat it to answer several prompts as one batch")
    add("--file", "-f", action="append", default=[],
        help="read a prompt from a file, - is standard input")
    add("--chat", action="store_true", help="talk: /? lists the commands, /bye ends")
    add("--raw", action="store_true",
        help="continue the prompt as it is, without the chat template")
    add("--system-prompt", "-sys", help="what the model is told before the conversation")
    add("--max-tokens", "-n", type=int, help="longest answer in tokens (default: "
        f"{DEFAULT_MAX_TOKENS})")
    add("--temperature", "--temp", type=float, help="0 is greedy (default: what the checkpoint "
        "recommends)")
    add("--top-k", type=int, help="sample from the k likeliest tokens, 0: all")
    add("--top-p", type=float, help="sample from the likeliest tokens that reach probability p "
        "together")
    add("--min-p", type=float,
        help="sample from tokens at least p times as likely as the likeliest")
    add("--repetition-penalty", type=float, help="above 1 makes tokens that occurred already less "
        "likely")
    add("--seed", type=int, help="the same seed gives the same answer")
    add("--stop", action="append", help="end the answer before this text; repeatable")
    add("--max-model-len", type=int, help="longest context in tokens, prompt and answer together")
    add("--max-num-seqs", type=int, default=128,
        help="requests in one batch (default: %(default)s)")
    add("--max-num-batched-tokens", type=int, default=4096,
        help="tokens in one prefill step (default: %(default)s; half of it while others decode)")
    add("--block-size", type=int, default=16, help="tokens per KV block (default: %(default)s)")
    add("--kv-cache-memory-bytes", type=int, help="size of the KV cache")
    add("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True,
        help="reuse blocks of equal beginnings")
    add("--static-batching", action="store_true",
        help="nobody joins a batch until all of it has ended")
    add("--device", choices=("auto", "cuda", "cpu", "sim"), default="auto",
        help="GPU, NumPy, or the GPU's kernels in Numba's simulator (default: the GPU if there is "
        "one, else NumPy)")
    add("--dtype", choices=("auto", *ELEMENTS), default="auto",
        help="element type on the GPU (default: the checkpoint's, but bfloat16 for float32)")
    add("--kernels", choices=("auto", *kernels.RUNGS), default="auto",
        help="rung of the kernels' ladders (default: the highest that GPU and model allow)")
    add("--enforce-eager", action="store_true",
        help="no CUDA graphs, and a wait after each kernel: an error names its kernel")
    add("--gpu-memory-utilization", type=float, default=0.9,
        help="share of the GPU's memory that weights, buffers and KV cache may take (default: "
        "%(default)s)")
    add("--verbose-prompt", action="store_true", help="show the prompt and its token ids")
    add("--stats", action=argparse.BooleanOptionalAction, default=True,
        help="speed and memory on stderr")
    add("--explain", action="store_true",
        help="each step on stderr: who computed what, blocks, time, share of the bound; at a "
        "terminal as a picture of requests and KV blocks")
    add("--step", action="store_true", help="stop after each step, and show the candidates for "
        "each token and why the sampler took one")
    add("--trace", metavar="FILE", help="write all steps, and the times of their kernels: "
        "FILE.html for a browser, FILE.json for chrome://tracing or ui.perfetto.dev; each step is "
        "waited for")
    add("--lesson", type=int, metavar="N", help="print lesson N of the course and where its code "
        "stands, and do nothing else")
    return parser


def main(argv: list[str] | None = None) -> int:
    # a stream that the caller closed becomes an empty one
    sys.stdin, sys.stdout, sys.stderr = (
        stream or open(os.devnull, mode, encoding="utf-8")
        for stream, mode in ((sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w")))
    sys.stdin.reconfigure(errors="surrogateescape")                  # see `readable`
    for stream in (sys.stdout, sys.stderr):   # a terminal without UTF-8 shows ? instead of failing
        stream.reconfigure(errors="replace")
    parser = build_parser()
    args = parser.parse_args(argv)
    if not (args.prompt or args.file or args.chat or args.lesson is not None):
        parser.error('nothing to do: give --prompt "...", --file FILE, or --chat')
    if args.chat and (args.prompt or args.file or args.raw):
        parser.error("--chat reads its prompts from the terminal: leave out --prompt, --file and "
                     "--raw")
    if args.raw and args.system_prompt:
        parser.error("--raw uses no chat template, so a --system-prompt has no place: put it into "
                     "the prompt")
    try:
        if args.lesson is not None:
            print(find_lesson(args.lesson))
            sys.stdout.flush()
            return 0
        if args.device == "sim" and not kernels.SIMULATOR:
            return run_in_simulator(argv)
        status = run_command(args)
        sys.stdout.flush()
        return status
    except (UserError, KernelError) as error:
        note(f"error: {error}")
        return 1
    except MemoryError as error:
        note(f"error: out of memory ({error}): use a smaller --max-num-batched-tokens")
        return 1
    except KeyboardInterrupt:
        note("")
        return 130
    except BrokenPipeError:                        # the reader left, as in `| head`: nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:                       # a full disk, say
        note(f"error: {error}")
        return 1


def find_lesson(number: int) -> str:
    """A lesson of README.md, and the lines where the code begins that it names."""
    lessons = {int(found[1]): found[0].rstrip() for found in re.finditer(
        r"^### Lesson (\d+)\..*?(?=^##)", (HOME / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL)}
    if number not in lessons:
        raise UserError(f"there is no lesson {number}: use --lesson {min(lessons)} to "
                        f"{max(lessons)}")
    named = re.search(r"\*\*Code\.\*\*(.*?)(\*\*|\Z)", lessons[number], re.DOTALL)
    names = [name.split(".")[-1] for name in re.findall(r"`([\w.]+)`", named[1] if named else "")]
    places = []
    for file in ("kernels_numba.py", "tinyvllm.py"):
        for n, line in enumerate((HOME / file).read_text(encoding="utf-8").splitlines(), 1):
            found = re.match(r"\s*(?:def|class) (\w+)", line)
            if found and found[1] in names:
                places.append(f"    {file}:{n}  {found[1]}")
    return "\n".join([lessons[number], "", *places])


def run_in_simulator(argv: list[str] | None) -> int:
    """Numba chooses its simulator when it is imported, which has happened: from the start."""
    signal.signal(signal.SIGINT, lambda *_: None)      # what Ctrl-C means, the child decides
    command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv)]
    return subprocess.call(command, env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1"})


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run_command(args: argparse.Namespace) -> int:
    args.system_prompt = args.system_prompt and readable(args.system_prompt)
    args.stop = args.stop and [readable(text) for text in args.stop]
    prompts = [readable(prompt) for prompt in args.prompt]
    prompts += [read_prompt_file(name) for name in args.file]
    trace = Trace(args.trace) if args.trace else None
    engine = Engine(args.model, device=args.device, dtype=args.dtype, rung=args.kernels,
                    enforce_eager=args.enforce_eager,
                    gpu_memory_utilization=args.gpu_memory_utilization,
                    max_model_len=args.max_model_len,
                    max_num_seqs=args.max_num_seqs,
                    max_num_batched_tokens=args.max_num_batched_tokens, block_size=args.block_size,
                    enable_prefix_caching=args.enable_prefix_caching,
                    static_batching=args.static_batching,
                    kv_cache_memory_bytes=args.kv_cache_memory_bytes)
    params, sources = sampling_from_flags(args, engine)
    if args.stats:
        note(engine.describe())
        note("sampling: " + ", ".join(f"{name} {getattr(params, name)} ({source})"
                                      for name, source in sources.items()))
    if args.chat:
        with watching(engine, args, trace):
            return chat_loop(engine, params, args)
    system = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    if not args.raw:
        prompts = [engine.chat_prompt(system + [{"role": "user", "content": prompt}])
                   for prompt in prompts]
    if args.verbose_prompt:
        for prompt in prompts:
            note(repr(engine.read_prompt(prompt)))
    with watching(engine, args, trace):
        return answer(engine, prompts, params, args)


def readable(text: str) -> str:
    """Text whose bytes were not UTF-8 arrives as surrogates: replaced, and said."""
    clean = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if clean != text:
        note("warning: the prompt is not UTF-8, its broken bytes were replaced")
    return clean


def read_prompt_file(name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read --file {name}: {error.strerror}") from None
    text = readable(data.decode("utf-8", "surrogateescape"))
    if not text.strip():
        raise UserError(f"--file {name} is empty, expected a prompt")
    return text.removesuffix("\n")


def sampling_from_flags(args: argparse.Namespace,
                        engine: Engine) -> tuple[SamplingParams, dict[str, str]]:
    """The effective sampling, and where each value that matters came from."""
    values = {"max_tokens": DEFAULT_MAX_TOKENS} | recommended_sampling(engine.generation_config)
    sources = dict.fromkeys(values, "generation_config.json") | {"max_tokens": "default"}
    if not engine.generation_config:
        sources["temperature"] = "default"
    for name in SAMPLING_FLAGS:
        if getattr(args, name) is not None:
            values[name], sources[name] = getattr(args, name), "--" + name.replace("_", "-")
    return SamplingParams(**values), sources


@contextmanager
def interrupt_between_steps(engine: Engine):
    """Ctrl-C waits for the end of the step, so nothing is left half done; a second one does not."""
    def remember(signum, frame):
        engine.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        engine.interrupted = False


def answer(engine: Engine, prompts: list, params: SamplingParams, args: argparse.Namespace) -> int:
    """Answers all prompts as one batch: one is streamed, several are printed in order."""
    request_ids = engine.submit(prompts, params)
    requests = {request_id: engine.requests[request_id] for request_id in request_ids}
    latest: dict[str, RequestOutput] = {}
    queue = deque(request_ids)                     # whose text is not all printed yet
    printed = 0                                    # characters of queue[0] that are out
    preempted_before = engine.num_preemptions

    def show(everything: bool) -> None:
        nonlocal printed
        while queue and queue[0] in latest:
            output = latest[queue[0]]
            if not (output.finished or everything or len(request_ids) == 1):
                return
            print(output["text"][printed:], end="", flush=True)
            printed = len(output["text"])
            if not (output.finished or everything):
                return
            print(flush=True)
            queue.popleft()
            printed = 0

    try:
        with interrupt_between_steps(engine):
            for output in engine.run(request_ids):
                latest[output.request_id] = output
                if streams(args):
                    show(everything=False)
            show(everything=False)
    except (KeyboardInterrupt, KernelError):
        latest = {request_id: request.output() for request_id, request in requests.items()}
        show(everything=True)
        raise
    outputs = [latest[request_id] for request_id in request_ids]
    if args.stats:
        note(statistics(engine, outputs, preempted_before))
    failed = [output.outputs[0].stop_reason for output in outputs
              if output.outputs[0].finish_reason == "error"]
    for reason in failed:
        note(f"error: {reason}")
    return 1 if failed else 0


def statistics(engine: Engine, outputs: list[RequestOutput], preempted_before: int) -> str:
    """One line on a batch that has just ended."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    new = sum(len(output["token_ids"]) for output in outputs)
    arrival = min(output.metrics.arrival_time for output in outputs)
    first = min(output.metrics.first_token_time or arrival for output in outputs) - arrival
    total = max(output.metrics.finished_time for output in outputs) - arrival
    line = (f"{prompt} prompt tokens ({cached} cached), first token after {first * 1e3:.0f} ms; "
            f"{new} new tokens in {total:.2f} s, {new / max(total, 1e-9):,.0f} tokens/s")
    if any(output["finish_reason"] == "length" for output in outputs):
        line += "; cut off by length: raise --max-tokens or --max-model-len"
    if engine.num_preemptions > preempted_before:
        line += f"; {engine.num_preemptions - preempted_before} preemptions"
    return line


CHAT_HELP = """/set system TEXT            what the model is told before the conversation
/set parameter NAME VALUE   temperature, top_k, top_p, min_p, repetition_penalty, seed,
                            max_tokens, stop
/show                       the model, the sampling and the length of the conversation
/clear or /reset            forget the conversation
/bye, /exit or /quit        leave (Ctrl-D does, too); Ctrl-C stops an answer
\"\"\"                         begins and ends a message of several lines"""


def chat_loop(engine: Engine, params: SamplingParams, args: argparse.Namespace) -> int:
    """ollama's manners: a line is a message, Ctrl-C stops the answer, Ctrl-D leaves."""
    if importlib.util.find_spec("readline"):
        import readline                 # noqa: F401  importing it gives input() history and editing
    system, history = args.system_prompt, []
    while True:
        try:
            line = read_message()
        except KeyboardInterrupt:
            note("\nUse Ctrl-D or /bye to leave.")
            continue
        if line is None or line.strip() in ("/bye", "/exit", "/quit"):
            return 0
        words = line.split(maxsplit=2)
        try:
            if not words:
                continue
            if words[0] in ("/clear", "/reset"):
                history = []
            elif words[0] in ("/?", "/help"):
                note(CHAT_HELP)
            elif words[0] == "/show":
                note(f"{engine.describe()}\n{params}\nsystem: {system!r}, {len(history)} messages "
                     "so far")
            elif words[:2] == ["/set", "system"]:
                system = words[2] if len(words) > 2 else None
            elif words[:2] == ["/set", "parameter"] and len(words) > 2:
                params = changed_params(params, *words[2].partition(" ")[::2])
            elif words[0].startswith("/"):
                note(f"unknown command {words[0]}: /? lists the commands")
            else:
                instruction = [{"role": "system", "content": system}] if system else []
                question = history + [{"role": "user", "content": line}]
                reply = chat_answer(engine, instruction + question, params, args)
                history = question + [{"role": "assistant", "content": reply}]
        except UserError as error:
            note(f"error: {error}")


def read_message() -> str | None:
    """One line, or all lines between triple quotes; None at the end of the input."""
    prompts = (">>> ", "... ") if sys.stdin.isatty() and sys.stdout.isatty() else ("", "")
    try:
        line = input(prompts[0])
        if line.startswith('"""'):
            line = line[3:]
            while not line.endswith('"""'):
                try:
                    line += "\n" + input(prompts[1])
                except EOFError:                   # the input ended first: so does the message
                    line += '"""'
            line = line[:-3]
        return readable(line)
    except EOFError:
        return None


def changed_params(params: SamplingParams, name: str, value: str) -> SamplingParams:
    """A copy with one field set from text; UserError leaves the old one in force."""
    if name not in SAMPLING_FLAGS:
        raise UserError(
            f"there is no parameter {name}, expected one of {', '.join(SAMPLING_FLAGS)}")
    kind = {"top_k": int, "seed": int, "max_tokens": int, "stop": str}.get(name, float)
    try:
        values = {f.name: getattr(params, f.name) for f in fields(params)} | {name: kind(value)}
    except ValueError:
        raise UserError(f"{name} is {value!r}, expected "
                        f"{'an integer' if kind is int else 'a number'}") from None
    return SamplingParams(**values)


def chat_answer(engine: Engine, messages: list[dict], params: SamplingParams,
                args: argparse.Namespace) -> str:
    """Streams one answer and returns it, as far as it came if Ctrl-C stopped it."""
    prompt = engine.chat_prompt(messages)
    if args.verbose_prompt:
        note(repr(engine.read_prompt(prompt)))
    text, output, preempted_before = "", None, engine.num_preemptions
    try:
        with interrupt_between_steps(engine):
            for output in engine.stream(prompt, params):
                if streams(args):
                    print(output["text"][len(text):], end="", flush=True)
                text = output["text"]
    except KeyboardInterrupt:
        pass
    print("" if streams(args) else text, flush=True)
    if output and output.finished:
        if output["finish_reason"] == "error":
            raise UserError(output["stop_reason"])
        if args.stats:
            note(statistics(engine, [output], preempted_before))
    return text


if __name__ == "__main__":
    sys.exit(main())

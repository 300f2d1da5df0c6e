"""What tinyvllm promises, one sentence a test. Run with: pytest

Tests that compare with transformers in the same process run where it is installed; everywhere else
the values it gave, stored in demo/golden.json, stand in. `python test_tinyvllm.py` writes them.
"""

import ast
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

HAS_GPU = shutil.which("nvidia-smi") is not None
if not HAS_GPU:
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"       # Numba reads it once, when it is imported

import ml_dtypes
import numpy as np
import pytest
from numba import cuda
from safetensors.numpy import save_file

import kernels_numba as kernels
import tinyvllm
from tinyvllm import LLM, BlockAllocator, Detokenizer, SamplingParams, Tokenizer, UserError

ROOT = Path(__file__).resolve().parent
GOLDEN = ROOT / "demo" / "golden.json"
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


def Engine(*arguments, device="cpu", **options):
    """On the twins, unless a test says otherwise: most promises are not about the GPU."""
    return tinyvllm.Engine(*arguments, device=device, **options)


# -----------------------------------------------------------------------------
# Random checkpoints, the same in every run

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
BASE = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=256,
            max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=10000.0, hidden_act="silu",
            tie_word_embeddings=False, bos_token_id=0, eos_token_id=1)
SHAPES = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "one kv head by default": {"num_attention_heads": 1, "num_key_value_heads": None},
    "tied": {"tie_word_embeddings": True},
    "heads wider than hidden": {"head_dim": 32, "hidden_size": 80},
    "no round numbers": {"vocab_size": 331, "hidden_size": 51, "intermediate_size": 77,
                         "head_dim": 26,
                         "num_attention_heads": 3, "num_key_value_heads": 1},
    "llama3 rope, older spelling": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "llama3 rope, newer spelling": {"rope_theta": None,
                                    "rope_parameters": LLAMA3 | {"rope_theta": 500000.0}},
    "linear rope, older spelling": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear rope, newer spelling": {"rope_theta": None, "rope_parameters": {
        "rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral",
                "sliding_window": None},
    "bf16": {"dtype": "BF16"},
    "f16 in three shards": {"dtype": "F16", "shards": 3},
}
PROMPT_LENGTHS = (1, 15, 16, 17, 100)              # around the block size of 16, and several chunks


def make_checkpoint(directory, dtype="F32", shards=1, seed=0, **changes):
    """Writes a random checkpoint whose greedy answers wander: weights of natural size, a lively
    embedding."""
    config = {name: value for name, value in (BASE | changes).items()
              if value is not None or name == "sliding_window"}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    numpy_type = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[dtype]
    _, table = tinyvllm.allocate_weights(tinyvllm.load_config(directory))
    tensors = {}
    for name, place in table.items():
        scale = 1.0 if "embed" in name else 1.5 / math.sqrt(place.shape[-1])
        values = rng.standard_normal(place.shape) * (0.1 if place.ndim == 1
                                                     else scale) + (place.ndim == 1)
        tensors[name] = values.astype(numpy_type)
    names = list(tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i::shards]
        save_file({name: tensors[name] for name in part}, directory / file,
                  metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """checkpoints("gqa") is the directory of that random model, made once."""
    root, made = tmp_path_factory.mktemp("checkpoints"), {}

    def get(shape):
        if shape not in made:
            made[shape] = make_checkpoint(root / re.sub(r"\W+", "-", shape), **SHAPES[shape])
        return made[shape]
    return get


@pytest.fixture(scope="session")
def demo():
    return Engine(max_num_seqs=16)


def prompt_ids(length, vocab_size=256, seed=0):
    return np.random.default_rng([length, seed]).integers(2, vocab_size, length).tolist()


def poisoned(engine):
    """The same engine with NaN wherever nothing was written yet: whoever reads it is found out."""
    kept = ("cos", "sin", "settings")
    for name, value in vars(engine).items():
        for buffer in value if isinstance(value, list) else [value]:
            if isinstance(buffer, np.ndarray) and buffer.dtype.kind == "f" and name not in kept:
                buffer.fill(np.nan)
    return engine


def tokens_of(engine, prompts, params=GREEDY):
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params,
                              use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def all_logits(engine, ids):
    """Logits (T, V) of every position of a prompt, from one prefill step."""
    engine.allocator.forget_hashes()
    engine.add_request("logits", {"prompt_token_ids": ids}, GREEDY)
    batch = engine.schedule()
    engine.start(batch)
    engine.finish_all_tokens(engine.pack_prefill(batch))
    indices = np.arange(len(ids), dtype=np.int32)
    logits = np.concatenate([
        engine.place.download(engine.logits_of(engine.on_device(part), len(part))).copy()
        for part in np.split(indices, range(16, len(ids), 16))])
    engine.abort_request("logits")
    engine.allocator.forget_hashes()
    return logits


def float32_bound(cfg, logits):
    """Rounding of a float32 forward pass: eps * sqrt(sum length) per matmul, some twelve operations
    a layer."""
    length = max(cfg.hidden_size, cfg.intermediate_size)
    return np.finfo(np.float32).eps * math.sqrt(length) * 12 * cfg.num_hidden_layers * np.abs(
        logits).max()


# -----------------------------------------------------------------------------
# Parity with Hugging Face transformers                               (lesson 1)


def hf_model(directory):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def hf_greedy(torch, model, ids, count):
    inputs = torch.tensor([ids])
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count,
                            min_new_tokens=count,
                            do_sample=False, eos_token_id=None, pad_token_id=0)
    return output[0, len(ids):].tolist()


def shape_prompts(shape):
    return [prompt_ids(length, SHAPES[shape].get("vocab_size", BASE["vocab_size"]))
            for length in PROMPT_LENGTHS]


@pytest.fixture(scope="session")
def golden():
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_equal_those_of_transformers_stored(shape, checkpoints, golden):
    engine = poisoned(Engine(checkpoints(shape)))
    assert tokens_of(engine, shape_prompts(shape)) == golden["tokens"][shape]
    logits = all_logits(engine, shape_prompts(shape)[-1])
    stored = np.array(golden["last_logits"][shape], np.float32)
    assert np.abs(logits[-1, :len(stored)] - stored).max() <= float32_bound(engine.cfg, logits)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_those_of_transformers_live(shape, checkpoints):
    torch, model = hf_model(checkpoints(shape))
    engine = poisoned(Engine(checkpoints(shape)))
    for ids in shape_prompts(shape):
        with torch.no_grad():
            theirs = model(torch.tensor([ids])).logits[0].numpy()
        ours = all_logits(engine, ids)
        bound = float32_bound(engine.cfg, theirs)
        assert np.abs(ours - theirs).max() <= bound, (shape, len(ids),
                                                      np.abs(ours - theirs).max() / bound)
        assert tokens_of(engine, [ids]) == [hf_greedy(torch, model, ids, GREEDY.max_tokens)]


def test_the_demo_model_answers_as_in_transformers(demo, golden):
    for entry in golden["demo"]:
        prompt = demo.chat_prompt(entry["messages"])
        assert prompt["prompt"] == entry["rendered"]
        assert prompt["prompt_token_ids"] == entry["prompt_token_ids"]
        output, = demo.chat(entry["messages"], SamplingParams(temperature=0, max_tokens=100))
        assert output.outputs[0].token_ids == entry["token_ids"] and output["text"] == entry["text"]


def test_the_demo_model_answers_as_in_transformers_live(demo):
    torch, model = hf_model(tinyvllm.DEMO)
    for length in PROMPT_LENGTHS:
        ids = prompt_ids(length, demo.cfg.vocab_size)
        assert tokens_of(demo, [ids]) == [hf_greedy(torch, model, ids, GREEDY.max_tokens)]


def test_a_deep_context_stays_equal_to_transformers(checkpoints):
    torch, model = hf_model(checkpoints("llama3 rope, newer spelling"))
    engine, ids = Engine(checkpoints("llama3 rope, newer spelling")), prompt_ids(100)
    deep = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    assert tokens_of(engine, [ids], deep) == [hf_greedy(torch, model, ids, 400)]


def adjacent_pairs_rope(qkv, k_cache, v_cache, cos, sin, positions, slots):
    G = k_cache.shape[2]
    kernels.adjacent_pairs(qkv[:, :-G], cos, sin, positions)
    kernels.write_kv_ref(k_cache, v_cache, qkv[:, -2 * G:-G], qkv[:, -G:], slots)


@pytest.mark.parametrize("name, mutation", [
    ("rope_write_kv", adjacent_pairs_rope), ("attention", kernels.unscaled),
    ("attention_decode", kernels.unscaled), ("attention_decode", kernels.late_by_one)])
def test_the_parity_test_catches(name, mutation, checkpoints, golden):
    engine = Engine(checkpoints("gqa"))
    engine.ops = tinyvllm.kernels.SimpleNamespace(**vars(kernels.TWINS) | {name: mutation})
    assert tokens_of(engine, shape_prompts("gqa")) != golden["tokens"]["gqa"]


# -----------------------------------------------------------------------------
# The answer does not depend on the company                  (lessons 13 and 14)


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_are_the_same_batched_chunked_cached_and_preempted(shape, checkpoints, golden):
    prompts, expected = shape_prompts(shape), golden["tokens"][shape]
    alone = poisoned(Engine(checkpoints(shape), max_num_seqs=1))
    assert [tokens_of(alone, [ids])[0] for ids in prompts] == expected

    chunked = poisoned(Engine(checkpoints(shape), max_num_batched_tokens=7))
    assert tokens_of(chunked, prompts) == expected

    cached = poisoned(Engine(checkpoints(shape)))
    tokens_of(cached, prompts)
    outputs = cached.generate([{"prompt_token_ids": ids} for ids in prompts], GREEDY)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    # a hit never covers the last prompt token: its logits are wanted
    assert [output.num_cached_tokens for output in outputs] == [0, 0, 0, 16, 96]

    scarce = poisoned(Engine(checkpoints(shape), block_size=4, num_gpu_blocks_override=30,
                             max_model_len=116))
    assert tokens_of(scarce, prompts[:4] * 3) == expected[:4] * 3
    assert scarce.num_preemptions > 0

    static = poisoned(Engine(checkpoints(shape), static_batching=True, max_num_seqs=2))
    assert tokens_of(static, prompts) == expected


def test_the_demo_model_answers_the_same_in_every_company(demo, golden):
    prompts = [entry["prompt_token_ids"] for entry in golden["demo"]]
    expected = [entry["token_ids"] for entry in golden["demo"]]
    stops = SamplingParams(temperature=0, max_tokens=100)
    for options in ({}, {"max_num_batched_tokens": 7}, {"static_batching": True},
                    {"block_size": 4, "num_gpu_blocks_override": 60, "max_model_len": 160}):
        engine = Engine(**options)
        assert tokens_of(engine, prompts * 3, stops) == expected * 3
        assert tokens_of(engine, prompts, stops) == expected       # now from the prefix cache
    assert engine.num_preemptions > 0


def test_two_streams_may_be_read_in_turns(demo):
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    expected = demo.generate(["one", "two", "three"], params)
    first, second = demo.stream("one", params), demo.stream("two", params)
    last = [None, None]
    for last[0], last[1] in zip(first, second):
        third, = demo.generate("three", params)
    last = [*first, last[0]][0], [*second, last[1]][0]
    assert [o["text"] for o in (*last, third)] == [o["text"] for o in expected]
    assert not any(demo.allocator.ref_counts)


def test_an_interrupted_step_leaves_no_half_written_prefix(checkpoints, monkeypatch):
    engine, ids = Engine(checkpoints("gqa")), prompt_ids(60)

    def interrupt(*arguments):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "pack_prefill", interrupt)
        engine.generate([ids], GREEDY)
    assert not any(engine.allocator.ref_counts) and not engine.requests
    output, = engine.generate([ids], GREEDY)
    assert output.num_cached_tokens == 0
    assert output["token_ids"] == tokens_of(Engine(checkpoints("gqa")), [ids])[0]


def test_preempted_requests_get_their_tokens(checkpoints):
    prompts = [prompt_ids(30, seed=i) for i in range(6)]
    long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    engine = poisoned(Engine(checkpoints("gqa"), num_gpu_blocks_override=14, max_model_len=96))
    tokens = tokens_of(engine, prompts, long)
    assert engine.num_preemptions > 3
    assert tokens == tokens_of(Engine(checkpoints("gqa")), prompts, long)


def test_seeded_samples_are_the_same_alone_and_in_a_batch(checkpoints):
    def sampled(seed):
        return SamplingParams(temperature=0.9, top_p=0.95, seed=seed, max_tokens=20,
                              ignore_eos=True)
    prompts = [prompt_ids(20, seed=i) for i in range(5)]
    engine = Engine(checkpoints("gqa"))
    together = engine.generate([{"prompt_token_ids": ids} for ids in prompts],
                               [sampled(i) for i in range(5)])
    alone = [tokens_of(engine, [ids], sampled(i))[0] for i, ids in enumerate(prompts)]
    assert [output.outputs[0].token_ids for output in together] == alone
    assert tokens_of(engine, prompts[:1], sampled(99))[0] != alone[0]


def test_a_request_without_a_seed_repeats_with_the_engines_seed(checkpoints):
    params = SamplingParams(temperature=1, max_tokens=20, ignore_eos=True)
    first, again, other = (tokens_of(Engine(checkpoints("gqa"), seed=s), [prompt_ids(5)], params)
                           for s in (7, 7, 8))
    assert first == again != other


def test_n_samples_share_the_prompt_and_differ(checkpoints):
    engine = poisoned(Engine(checkpoints("gqa")))
    params = SamplingParams(temperature=1, n=4, seed=3, max_tokens=12, ignore_eos=True)
    output, = engine.generate([{"prompt_token_ids": prompt_ids(50)}], params)
    assert [sample.index for sample in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 4
    assert engine.num_tokens["prefill"] == 50 + 3 * 2    # three full blocks of 16 are computed once
    single = SamplingParams(temperature=1, seed=5, max_tokens=12, ignore_eos=True)
    # sample i has seed + i
    assert tokens_of(engine, [prompt_ids(50)], single)[0] == output.outputs[2].token_ids


# -----------------------------------------------------------------------------
# Twins                                                      (lessons 2 to 12)


def test_bfloat16_is_the_upper_half_of_float32():
    values = np.array([0.0, -0.0, 1.0, -2.5, 3.4e38, 1e-40, np.inf, -np.inf], ml_dtypes.bfloat16)
    wide = np.empty(values.shape, np.float32)
    tinyvllm.copy_to_float32(wide, values)
    assert np.array_equal(wide, values.astype(np.float32)) and np.signbit(wide[1])


def test_silu_survives_extreme_inputs():
    gate_up = np.array([[-1e30, -100, 0, 100, 1e30, 1, 1, 1, 1, 1]], np.float32)
    out = np.full((1, 5), np.nan, np.float32)
    kernels.silu_mul_ref(out, gate_up)
    assert np.allclose(out, [[0, 0, 0, 100, 1e30]])


@pytest.mark.parametrize("T", [1, 2, 4, 5, 33])
def test_matmul_of_few_and_many_tokens_agree_with_float64(T):
    rng = np.random.default_rng(T)
    x, w = rng.standard_normal((T, 77)).astype(np.float32), rng.standard_normal((131, 77)).astype(
        np.float32)
    out = np.full((T, 131), np.nan, np.float32)
    kernels.matmul_ref(out, x, w)
    assert np.abs(out - x.astype(np.float64) @ w.T.astype(np.float64)).max() < 77 * np.finfo(
        np.float32).eps * 10


# -----------------------------------------------------------------------------
# Kernels: on the GPU where there is one, in the simulator elsewhere  (lessons 4 to 12)

EPSILON = {"float32": 2.0 ** -23, "float16": 2.0 ** -10, "bfloat16": 2.0 ** -7}


def to_elements(dtype):
    kind = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    return lambda array: array.astype(kind).view(np.uint16 if dtype == "bfloat16" else kind)


def widened(array):
    """An array as its twin gets it: elements as float64, everything else a copy."""
    if not isinstance(array, np.ndarray):
        return array
    if array.dtype == np.uint16:
        array = array.view(ml_dtypes.bfloat16)
    return array.astype(np.float64) if array.dtype.kind not in "iu" else array.copy()


def differences(row, dtype, arguments, ours, theirs):
    """What is wrong with `ours`, one line an array: all of them are compared, so stray writes show.
    The bound: the row's roundings to the element type, and float32 sums of its longest row."""
    found = []
    length = max(a.shape[-1] for a in arguments if isinstance(a, np.ndarray))
    relative = row.roundings * EPSILON[dtype] + 4 * EPSILON["float32"] * math.sqrt(length)
    for n, (mine, right) in enumerate(zip(ours, theirs)):
        if n in row.workspace or not isinstance(right, np.ndarray):
            continue
        mine, right = mine.astype(np.float64), right.astype(np.float64)
        finite = np.isfinite(right)
        bound = 0 if arguments[n].dtype.kind in "iu" and arguments[n].dtype != np.uint16 else \
            relative * np.abs(right[finite]).max(initial=0)
        wrong = ~np.isclose(mine, right, rtol=0, atol=bound, equal_nan=True)
        if wrong.any():
            at = tuple(int(x) for x in np.argwhere(wrong)[0])
            found.append(f"array {n} at {at}: {mine[at]} instead of {right[at]}, bound {bound:.3g}")
    return found


def twin_of(row, function, arguments):
    """The arrays after a twin: in float64, sampling in its own float32."""
    single = row.types == ("float32",)
    arrays = [a.copy() if single and isinstance(a, np.ndarray) else widened(a) for a in arguments]
    function(*arrays)
    return arrays


def runs_here(row):
    """The simulator runs all kernels; a GPU those for its compute capability."""
    if not HAS_GPU:
        return True
    return kernels.runs_on(row, cuda.get_current_device().compute_capability)


def row_cases():
    for row in filter(runs_here, kernels.KERNELS):
        # in the simulator float16 would only repeat what bfloat16 has shown
        types = row.types if HAS_GPU or len(row.types) == 1 else set(row.types) - {"float16"}
        for dims in row.shapes:
            yield from ((row, dims, dtype) for dtype in sorted(types))


def row_id(case):
    row, dims, dtype = case
    return f"{row.name} {dtype} " + " ".join(f"{name}={value}" for name, value in dims.items())


def differences_from_twin(row, launcher, dims, dtype):
    """What a launcher makes of an example of its row, beside what the twin makes of it."""
    arguments = row.example(np.random.default_rng(0), to_elements(dtype), **dims)
    return differences_in(row, launcher, arguments, dtype)


def copied_to_device(arguments):
    return [cuda.to_device(a) if isinstance(a, np.ndarray) else a for a in arguments]


def differences_in(row, launcher, arguments, dtype):
    on_device = copied_to_device(arguments)
    launcher(*on_device)
    ours = [widened(a.copy_to_host()) if isinstance(b, np.ndarray) else a
            for a, b in zip(on_device, arguments)]
    return differences(row, dtype, arguments, ours, twin_of(row, row.twin, arguments))


@pytest.mark.parametrize("case", list(row_cases()), ids=row_id)
def test_kernel_equals_its_twin(case):
    row, dims, dtype = case
    assert not differences_from_twin(row, row.launcher, dims, dtype)


@pytest.mark.parametrize("dims", kernels.STEPS_OF_DECODE[::1 if HAS_GPU else 3],
                         ids=lambda dims: f"{len(dims['contexts'])} x {max(dims['contexts'])}")
def test_a_greedy_step_leaves_the_largest_of_the_same_logits(dims):
    row = next(row for row in kernels.KERNELS if row.name == "forward_decode")
    if not runs_here(row):
        pytest.skip("this GPU has no such kernel")
    left = []
    for greedy in (False, True):
        arguments = row.example(np.random.default_rng(0), to_elements("bfloat16"), greedy=greedy,
                                **dims)
        lm_head = arguments[-3][-dims["V"] * dims["C"]:].reshape(dims["V"], dims["C"])
        lm_head[1:kernels.CHUNK] = lm_head[0]                  # of equal ones the first is right
        lm_head[-1, -1] = 0x7FC0                               # NaN
        on_device = copied_to_device(arguments)
        kernels.forward_decode(*on_device)
        left.append([a.copy_to_host() for a in on_device[:3]])
    (logits, *untouched), (unwritten, largest, largest_at) = left
    assert np.isnan(untouched[0]).all() and (untouched[1] == -1).all() and np.isnan(unwritten).all()
    chunks = logits.reshape(len(logits), -1, kernels.CHUNK)
    first = np.arange(chunks.shape[1]) * kernels.CHUNK
    assert (largest[:, -1] == np.inf).all()                    # which sampling refuses
    np.testing.assert_array_equal(largest[:, :-1], chunks.max(axis=2)[:, :-1])
    np.testing.assert_array_equal(largest_at[:, :-1], (chunks.argmax(axis=2) + first)[:, :-1])
    assert (largest_at[:, 0] == 0).all()
    twins = twin_of(row, row.twin, arguments)[1]
    np.testing.assert_allclose(largest, twins, rtol=0, atol=0.05 * np.abs(logits[:, :-1]).max())


@pytest.mark.skipif(HAS_GPU, reason="there 130 requests take that kernel")
def test_a_greedy_step_leaves_the_largest_in_the_kernel_for_192_tokens(monkeypatch):
    """A lane of it holds 12 tokens of a product, which is no multiple of 8."""
    monkeypatch.setattr(kernels, "DECODE_TOKENS", (192,))
    dims = kernels.STEPS_OF_DECODE[-1] | dict(contexts=(3, 1, 2) * 3)
    assert len(dims["contexts"]) > kernels.FEW_REQUESTS        # its splits are those of 192 tokens
    test_a_greedy_step_leaves_the_largest_of_the_same_logits(dims)


@pytest.mark.skipif(HAS_GPU, reason="on a GPU one token alone has that kernel in every test")
def test_the_kernel_for_one_token_leaves_the_bits_of_the_one_for_eight(monkeypatch):
    """Even where no thread block ever has two items of attention, and nothing is compiled for them;
    here that takes contexts without splits, for there is one thread block."""
    row = next(row for row in kernels.KERNELS if row.name == "forward_decode")
    monkeypatch.setattr(kernels, "SPLIT_ITEMS", 1)
    monkeypatch.setattr(kernels, "make_forward_decode", kernels.make_forward_decode.__wrapped__)
    assert kernels.has_one_item_each(1, 1, 1)
    left = []
    for N in (1, 8):
        monkeypatch.setattr(kernels, "DECODE_TOKENS", (N,))
        arguments = row.example(np.random.default_rng(0), to_elements("bfloat16"), L=2, D=64, V=64,
                                P=4, H=2, G=1, C=128, F=192, contexts=(20,))
        on_device = copied_to_device(arguments)
        kernels.forward_decode(*on_device)
        left.append([on_device[i].copy_to_host() for i in (0, 3, 7)])          # logits, x, kv_cache
    for one, eight in zip(*left):
        np.testing.assert_array_equal(one, eight)


def test_a_model_too_small_to_order_its_letters_has_no_kernel_for_one_token(monkeypatch):
    """Between a norm and the one after the next SmolLM2-135M has 37 items of matrices, or 72,
    Llama 3.2 1B 352."""
    for name, value in (("MULTIPROCESSORS", 132), ("MAX_PARTS", 8), ("TILE_ROWS", 128)):
        monkeypatch.setattr(kernels, name, value)              # as on a GPU
    for shape, fewest in (((9, 3, 64, 576, 1536, 49152), 37),
                          ((32, 8, 64, 2048, 8192, 128256), 352)):
        assert kernels.every_block_has_work(*shape, fewest)
        assert not kernels.every_block_has_work(*shape, fewest + 1)


def test_a_context_has_the_same_bits_alone_and_as_one_item_of_many():
    """Of one, two, four or more splits: alone each is an item, in company up to RUN are one."""
    row = next(row for row in kernels.KERNELS if row.name == "forward_decode")
    if not runs_here(row):
        pytest.skip("this GPU has no such kernel")
    # one sum rounded otherwise changes one element in thousands: the GPU takes many and wide ones
    S, crowd, dims = kernels.SPLIT, range(1, 9), dict(H=6, G=1, C=64, F=64, V=64)
    if HAS_GPU:
        crowd, dims = range(S + 1, S + 1 + 64 * 23, 23), dict(H=64, G=4, C=1024, F=2048, V=128)
    contexts = (S + 6, 2 * S, 2 * S + 9, kernels.RUN * S, kernels.RUN * S + 1, *crowd)
    assert len(contexts) > kernels.FEW_REQUESTS
    arguments = row.example(np.random.default_rng(0), to_elements("bfloat16"), L=1, D=64, P=16,
                            contexts=contexts, **dims)

    def logits_of(arguments):
        on_device = copied_to_device(arguments)
        kernels.forward_decode(*on_device)
        return on_device[0].copy_to_host()
    together = logits_of(arguments)
    for b in range(len(contexts)) if HAS_GPU else (0, 3, 4):
        own = [a[b:b + 1] if i < 7 or 12 <= i < 16 else a for i, a in enumerate(arguments)]
        own[16] = kernels.lay_out_splits(contexts[b:b + 1], dims["G"], S)
        np.testing.assert_array_equal(logits_of(own)[0], together[b])


@pytest.mark.skipif(HAS_GPU, reason="on a GPU rings and contexts are as long as they are")
def test_an_item_that_comes_round_to_a_stage_again_waits_for_both_fillings(monkeypatch):
    """Eight stages of one context in a ring of three, the first of which is late."""
    copy_box, row = kernels.copy_box, next(r for r in kernels.KERNELS if r.name == "forward_decode")
    copied = []

    def slow_copy_box(target, i, maps, m, *rest):
        if m // 16 == kernels.KV_MAP and not copied:
            time.sleep(2)                  # until the consumers wait for it
        copied.extend([m] * (m // 16 == kernels.KV_MAP))
        copy_box(target, i, maps, m, *rest)
    monkeypatch.setattr(kernels, "copy_box", slow_copy_box)
    monkeypatch.setattr(kernels, "SPLIT", 256)
    monkeypatch.setattr(kernels, "MAX_STAGES", 3)
    monkeypatch.setattr(kernels, "make_forward_decode", kernels.make_forward_decode.__wrapped__)
    arguments = row.example(np.random.default_rng(0), to_elements("bfloat16"), L=1, D=64, V=64,
                            P=256, C=64, F=64, contexts=(250,), H=2, G=1)
    assert len(arguments[16]) > 3                              # of several splits we make one
    arguments[16] = kernels.lay_out_splits([250], 1, 256)
    assert not differences_in(row, row.launcher, arguments, "bfloat16")
    assert len(copied) == 8


@pytest.mark.parametrize("more", [
    dict(temperature=0.5), dict(logit_bias={1: 1.0}), dict(logprobs=0), dict(min_tokens=1),
    dict(repetition_penalty=1.1), dict(presence_penalty=0.1), dict(frequency_penalty=0.1)], ids=str)
def test_who_wants_more_than_the_largest_logit(more):
    assert SamplingParams(temperature=0).takes_largest
    assert not SamplingParams(**dict(temperature=0) | more).takes_largest


@pytest.mark.skipif(HAS_GPU, reason="of the simulator")
def test_the_threads_of_the_simulator_share_one_array_even_if_making_it_takes_long(monkeypatch):
    from numba.cuda.simulator import kernelapi
    empty, found = np.empty, np.zeros(32, np.int64)

    def slow(*arguments):
        time.sleep(0.05)
        return empty(*arguments)

    @cuda.jit
    def who(found):
        cuda.syncthreads()
        found[cuda.threadIdx.x] = id(cuda.shared.array(1, np.int32))
    monkeypatch.setattr(kernelapi.np, "empty", slow)
    who[1, 32](found)
    assert len(set(found.tolist())) == 1


@pytest.mark.parametrize("row", kernels.KERNELS, ids=lambda row: row.name)
def test_the_comparison_catches_the_mutation(row):
    dtype, caught = row.types[-1], []
    for dims in row.shapes:
        arguments = row.example(np.random.default_rng(0), to_elements(dtype), **dims)
        right, wrong = (twin_of(row, function, arguments) for function in (row.twin, row.mutation))
        caught += differences(row, dtype, arguments, wrong, right)
    assert caught


@pytest.mark.parametrize("row", kernels.KERNELS, ids=lambda row: row.name)
def test_every_card_gives_the_formulas_of_its_row(row):
    source = (ROOT / "kernels_numba.py").read_text()
    assert f"moves  {row.moves} bytes, does {row.does} flops" in source


def test_every_kernel_has_a_card():
    tree = ast.parse((ROOT / "kernels_numba.py").read_text())
    cards = {node.name: ast.get_docstring(node) or "" for node in ast.walk(tree)
             if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")}
    cards.pop("start_next_kernel")
    assert len(cards) > 15
    for name, card in cards.items():
        assert all(field in card for field in ("launch ", "moves ", "twin ")), name


def alone(name):
    """The source of one function of kernels_numba.py with all that it names, in the old order."""
    source = (ROOT / "kernels_numba.py").read_text()
    statements = ast.parse(source).body
    home, uses = {}, []
    for n, statement in enumerate(statements):
        names = {node.id: type(node.ctx) for node in ast.walk(statement)
                 if isinstance(node, ast.Name)}
        uses.append(set(names))
        for node in ast.walk(statement):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                home |= {(alias.asname or alias.name).split(".")[0]: n for alias in node.names}
        inner = statement.body + statement.orelse if isinstance(statement, ast.If) else [statement]
        for part in inner:
            if isinstance(part, (ast.FunctionDef, ast.ClassDef)):
                home[part.name] = n
            elif isinstance(part, ast.Assign):
                home |= {node.id: n for target in part.targets for node in ast.walk(target)
                         if isinstance(node, ast.Name)}
    wanted, queue = set(), [name]
    while queue:
        n = home.get(queue.pop())
        if n is not None and n not in wanted:
            wanted.add(n)
            queue += uses[n]
    # SIMULATOR itself says which half of the instructions is meant
    lines = source.splitlines()

    def text(statement):
        decorators = getattr(statement, "decorator_list", [])
        first = min([statement.lineno] + [decorator.lineno for decorator in decorators])
        return "\n".join(lines[first - 1:statement.end_lineno])
    return "\n\n".join(text(statements[n]) for n in sorted(wanted))


@pytest.mark.parametrize("row", list(filter(runs_here, kernels.KERNELS)), ids=lambda row: row.name)
def test_a_kernel_pasted_alone_into_a_new_file_runs(row, tmp_path):
    copied = alone(row.launcher.__name__)
    assert len(copied) < len((ROOT / "kernels_numba.py").read_text()) / 2
    path = tmp_path / "copied.py"
    path.write_text(copied)
    spec = importlib.util.spec_from_file_location("copied_" + re.sub(r"\W", "_", row.name), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module                # where Numba looks for the module of a function
    spec.loader.exec_module(module)
    launcher = getattr(module, row.launcher.__name__)
    assert not differences_from_twin(row, launcher, row.shapes[0], row.types[-1])


# the simulator is chosen when Numba is imported, so PTX is made by another process
COMPILE_TO_PTX = """
import json, sys
from types import SimpleNamespace
import numpy as np, ml_dtypes
from numba import cuda, types, typeof
from numba.cuda import dispatcher
import kernels_numba as kernels
asked = []                                         # (kernel, arguments) of every launch
class Recorder:
    def __init__(self, kernel): self.kernel = kernel
    def __call__(self, *arguments): asked.append((self.kernel, arguments))
dispatcher.CUDADispatcher.__getitem__ = lambda kernel, configuration: Recorder(kernel)
kernels.launch = lambda kernel, grid, threads, stream, shared, *a: asked.append((kernel, a))
kernels.tensor_map, cuda.to_device = lambda *tensor: [0] * 16, lambda array: array
def elements(array):
    return array.astype(ml_dtypes.bfloat16).view(np.uint16)
found = {}
for capability in map(tuple, json.loads(sys.argv[1])):
    gpu = SimpleNamespace(compute_capability=capability, MULTIPROCESSOR_COUNT=132,
                          MAX_SHARED_MEMORY_PER_BLOCK_OPTIN=99 << 10)
    dispatcher.get_current_device = cuda.get_current_device = lambda: gpu
    for row in kernels.KERNELS:
        if capability < row.needs:
            continue
        asked.clear()
        plain = len(row.types) == 1
        like = (lambda a: a) if plain else elements
        # of forward_decode the kernel for one token, too
        for dims in row.shapes[-1:] + row.shapes[:row.name == "forward_decode"]:
            row.launcher(*row.example(np.random.default_rng(0), like, **dims))
        for kernel, arguments in asked:
            kernel.overloads.clear()
            signature = types.void(*(typeof(a) for a in arguments))
            only_here = ("a",) if row.needs == (9, 0) else ()
            ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=(*capability, *only_here))
            found.setdefault(f"{row.name} sm_{capability[0]}{capability[1]}", []).append(ptx)
json.dump(found, sys.stdout)
"""
TENSOR_CORES = ("mma.sync.aligned.m16n8k16", "bf16")
INSTRUCTIONS = {
    "matmul tensor": (*TENSOR_CORES, "ldmatrix.sync", "cp.async.cg.shared.global"),
    "matmul tensor SwiGLU": (*TENSOR_CORES, "ldmatrix.sync", "cp.async.cg.shared.global"),
    "matmul streamed": (*TENSOR_CORES, "ld.global.nc.L1::no_allocate.L2::128B.v4.u32"),
    "matmul streamed SwiGLU": (*TENSOR_CORES, "ld.global.nc.L1::no_allocate.L2::128B.v4.u32"),
    "matmul wgmma": ("wgmma.mma_async.sync.aligned.m64n", "f32.bf16.bf16", "setmaxnreg",
                     "cp.async.bulk.tensor.3d", "mbarrier.try_wait"),
    "matmul wgmma SwiGLU": ("wgmma.mma_async", "cp.async.bulk.tensor.5d"),
    "attention wgmma": ("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", "ex2.approx",
                        "cp.async.cg.shared.global", "fence.proxy.async.shared::cta"),
    "matmul warp": ("shfl.sync.bfly",),
    "attention online": ("shfl.sync.bfly", "ex2.approx"),
    "attention tiled": (*TENSOR_CORES, "ldmatrix.sync", ".trans", "cp.async", "ex2.approx"),
    "forward_decode": ("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16", "setmaxnreg",
                       "cp.async.bulk.tensor.5d", "mbarrier.try_wait", "ld.acquire.gpu",
                       "red.release.gpu", "st.relaxed.gpu.global.v2.b64", "L2::evict_first",
                       "cp.async.ca.shared.global", "fma.rn.f32", "elect.sync", *TENSOR_CORES,
                       "ldmatrix.sync"),
    "paged decode": (*TENSOR_CORES, "ld.global.v4.u32", "shfl.sync.idx"),
    "paged decode split": (*TENSOR_CORES, "ld.global.v4.u32", "shfl.sync.idx"),
}


@pytest.fixture(scope="session")
def ptx():
    pytest.importorskip("numba_cuda")
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"}
    found = {}
    processes = [subprocess.Popen([sys.executable, "-c", COMPILE_TO_PTX, capabilities], cwd=ROOT,
                                  env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  text=True)
                 for capabilities in ("[[7, 5], [8, 0]]", "[[9, 0]]")]         # takes half as long
    try:
        for process in processes:
            out, problems = process.communicate(timeout=600)
            assert process.returncode == 0, problems[-3000:]
            found |= json.loads(out)
    finally:
        for process in processes:
            process.kill()
    return found


@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_90"])
@pytest.mark.parametrize("row", kernels.KERNELS, ids=lambda row: row.name)
def test_ptx_has_the_instructions_meant_no_double_and_no_local_memory(row, target, ptx):
    if target < "sm_{}{}".format(*row.needs):
        pytest.skip("a kernel for instructions that older GPUs do not have")
    text = "\n".join(ptx[f"{row.name} {target}"])
    assert f".target {target}" in text
    assert ".f64" not in text and not re.search(r"\.local\b", text)
    assert all(instruction in text for instruction in INSTRUCTIONS.get(row.name, ()))
    assert ("griddepcontrol.wait" in text) == (target == "sm_90")


# -----------------------------------------------------------------------------
# The engine on the kernels

DEVICE = "cuda" if HAS_GPU else "sim"
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Small enough for the simulator, with shapes that the tensor-core kernels take; of this seed
    the likeliest tokens are far ahead of the second, beyond the noise of bfloat16."""
    return make_checkpoint(tmp_path_factory.mktemp("small"), dtype="BF16", hidden_size=16,
                           intermediate_size=24, num_attention_heads=2, num_key_value_heads=1,
                           head_dim=64, num_hidden_layers=1, vocab_size=40, seed=5)


@pytest.mark.parametrize("options", [dict(dtype="float32", rung="naive"), dict(dtype="float32"),
                                     dict(rung="naive"), dict(rung="tensor"), dict()], ids=str)
def test_every_rung_gives_the_tokens_of_the_twins(options, small):
    ids = [prompt_ids(5, 40), prompt_ids(2, 40)]
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    engine = Engine(small, device=DEVICE, block_size=4, max_model_len=8, max_num_seqs=2, **options)
    assert engine.rung == options.get("rung", "tiled" if "dtype" in options else "wgmma")
    twins = Engine(small, device="cpu", block_size=4, max_model_len=8)
    assert tokens_of(engine, ids, params) == tokens_of(twins, ids, params)


def test_a_head_dim_of_16_decodes_on_the_rung_that_takes_it(tmp_path):
    make_checkpoint(tmp_path, dtype="BF16", hidden_size=16, intermediate_size=24,
                    num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_hidden_layers=1,
                    vocab_size=40, seed=5)
    assert not kernels.fits_paged_decode(2, 1, 16) and kernels.fits_paged_decode(32, 8, 64)
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    engine, twins = (Engine(tmp_path, device=device, block_size=4, max_model_len=8, max_num_seqs=1)
                     for device in (DEVICE, "cpu"))
    assert engine.rung == "wgmma"
    assert tokens_of(engine, [prompt_ids(5, 40)], params) == tokens_of(twins, [prompt_ids(5, 40)],
                                                                       params)


def test_a_decode_step_as_one_kernel_gives_the_tokens_of_the_twins(tmp_path):
    make_checkpoint(tmp_path, dtype="BF16", hidden_size=128, intermediate_size=192,
                    num_attention_heads=2, num_key_value_heads=1, head_dim=64, num_hidden_layers=2,
                    vocab_size=64, seed=5)
    ids = [prompt_ids(5, 64), prompt_ids(2, 64)]
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    options = dict(block_size=4, max_model_len=8, max_num_seqs=2)
    engine, twins = (Engine(tmp_path, device=device, **options) for device in (DEVICE, "cpu"))
    assert engine.rung == "persistent"
    assert tokens_of(engine, ids, params) == tokens_of(twins, ids, params)
    # so far nobody wanted more than the largest logit; one request in company that does
    mixed = [params, SamplingParams(temperature=1, seed=3, max_tokens=2, ignore_eos=True)]
    assert tokens_of(engine, ids, mixed)[0] == tokens_of(twins, ids, mixed)[0]
    assert [greedy for kind, _, _, greedy in engine.views if kind == "decode"] == [True, False]


def test_shapes_that_one_kernel_cannot_take_keep_the_kernels(small):
    assert kernels.fits_persistent(32, 8, 64, 2048, 8192, 128256, 16) is None      # Llama 3.2 1B
    assert kernels.fits_persistent(32, 8, 64, 2048, 8192, 128256, 1024) is None    # large blocks
    assert kernels.fits_persistent(32, 2, 64, 2048, 8192, 128256, 16) is None      # 16 heads share
    assert "vocab_size 128257" in kernels.fits_persistent(32, 8, 64, 2048, 8192, 128257, 16)
    for block_size in (24, 192):           # a stage would begin in one block and end in the next
        assert f"block_size {block_size} is no power of two" in kernels.fits_persistent(
            32, 8, 64, 2048, 8192, 128256, block_size)
    assert "head_dim 80" in kernels.fits_persistent(32, 8, 80, 2560, 8192, 128256, 16)
    refuses(small, "a decode step cannot be one kernel here (hidden_size 16 is no multiple of",
            "use --kernels wgmma", device=DEVICE, rung="persistent")


def test_the_kernels_sample_as_the_twins_do(small):
    params = [SamplingParams(temperature=1.0, seed=3, max_tokens=3, ignore_eos=True),
              SamplingParams(temperature=0.8, top_k=9, top_p=0.9, min_p=0.02, seed=4, max_tokens=3,
                             repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5,
                             min_tokens=2, logit_bias={7: 2.0})]
    ids = [prompt_ids(4, 40), prompt_ids(3, 40)]
    options = dict(block_size=4, max_model_len=8, max_num_seqs=2)
    on_kernels, on_twins = (Engine(small, device=device, **options, **dtype) for device, dtype in (
        (DEVICE, dict(dtype="float32", rung="naive")), ("cpu", {})))
    assert tokens_of(on_kernels, ids, params) == tokens_of(on_twins, ids, params)


@pytest.fixture
def one_step_ahead(monkeypatch):
    """The GPU's way on the CPU: steps are padded, and their tokens are read a step late."""
    monkeypatch.setattr(tinyvllm.Host, "pipelined", True)


def test_a_host_one_step_ahead_gives_the_same_answers(checkpoints, golden, one_step_ahead):
    for options in ({}, dict(max_num_batched_tokens=7), dict(static_batching=True, max_num_seqs=2),
                    dict(block_size=4, num_gpu_blocks_override=30, max_model_len=116)):
        engine = poisoned(Engine(checkpoints("gqa"), **options))
        prompts = shape_prompts("gqa")[:4] if "block_size" in options else shape_prompts("gqa")
        assert tokens_of(engine, prompts * 3) == golden["tokens"]["gqa"][:len(prompts)] * 3
        assert not engine.requests and not any(engine.allocator.ref_counts)
        assert sorted(engine.free_rows) == list(range(engine.max_num_seqs))
    assert engine.num_preemptions > 0


def test_a_host_one_step_ahead_drops_the_token_behind_the_end(demo, golden, one_step_ahead):
    engine = Engine(max_num_seqs=4)
    entry = golden["demo"][0]
    for params in (SamplingParams(temperature=0, max_tokens=100),
                   SamplingParams(temperature=0, max_tokens=100, stop=entry["text"][20:25]),
                   SamplingParams(temperature=1.1, seed=1, n=3, max_tokens=20, min_tokens=9,
                                  repetition_penalty=1.2, logprobs=2, prompt_logprobs=1)):
        ours, theirs = (one.generate({"prompt_token_ids": entry["prompt_token_ids"]}, params)[0]
                        for one in (engine, demo))
        assert [o.token_ids for o in ours.outputs] == [o.token_ids for o in theirs.outputs]
        assert [o.text for o in ours.outputs] == [o.text for o in theirs.outputs]
        assert [o.finish_reason for o in ours.outputs] == [o.finish_reason for o in theirs.outputs]
    assert not any(engine.allocator.ref_counts)


@pytest.mark.parametrize("pipelined", [False, True])
def test_failing_uploads_lose_no_row_no_block_and_no_other_request(pipelined, checkpoints,
                                                                   monkeypatch):
    monkeypatch.setattr(tinyvllm.Host, "pipelined", pipelined)
    engine = Engine(checkpoints("gqa"), block_size=4, num_gpu_blocks_override=40, max_model_len=60,
                    max_num_seqs=4)
    prompts = [prompt_ids(3 + n % 9, seed=n) for n in range(40)]
    expected = tokens_of(Engine(checkpoints("gqa")), prompts)
    rng, upload = np.random.default_rng(0), engine.place.upload

    def sometimes(*arguments):
        if rng.random() < 0.02:
            raise KeyboardInterrupt if rng.random() < 0.5 else MemoryError
        upload(*arguments)
        if rng.random() < 0.02:
            raise KeyboardInterrupt
    monkeypatch.setattr(engine.place, "upload", sometimes)
    requests = {}
    for n, ids in enumerate(prompts):
        engine.add_request(str(n), ids, GREEDY)
        requests[n] = engine.requests[str(n)]
    failures = 0
    while engine.has_unfinished_requests():
        try:
            engine.step()
        except (KeyboardInterrupt, MemoryError):
            failures += 1
    outputs = [requests[n].output() for n in range(40)]
    right = [output["token_ids"] == expected[n] for n, output in enumerate(outputs)
             if output["finish_reason"] == "length"]
    assert failures > 3 and len(right) > 10 and all(right)
    assert not any(engine.allocator.ref_counts) and sorted(engine.free_rows) == [0, 1, 2, 3]


def test_splits_of_many_requests_that_share_their_blocks_have_room(checkpoints):
    """A pool of 34 blocks holds 8 contexts of 500 tokens that share all but their ends."""
    engine = Engine(checkpoints("gqa"), max_num_seqs=8, num_gpu_blocks_override=48,
                    max_num_batched_tokens=512)
    shared = prompt_ids(460)
    prompts = [shared + prompt_ids(2, seed=n) for n in range(8)]
    tokens_of(engine, [shared])                    # now the others find it
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    assert tokens_of(engine, prompts, params) == [
        tokens_of(Engine(checkpoints("gqa")), [ids], params)[0] for ids in prompts]


@needs_gpu
@pytest.mark.parametrize("rung", ["naive", "tiled"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gpu_in_float32_gives_the_tokens_of_transformers(shape, rung, checkpoints, golden):
    engine = Engine(checkpoints(shape), device="cuda", dtype="float32", rung=rung)
    assert tokens_of(engine, shape_prompts(shape)) == golden["tokens"][shape]


@needs_gpu
@pytest.mark.parametrize("options", [dict(), dict(enforce_eager=True), dict(rung="tiled"),
                                     dict(rung="naive"), dict(dtype="float16"),
                                     dict(dtype="float32")], ids=str)
def test_the_demo_model_answers_the_same_on_every_rung(options, golden):
    engine = Engine(device="cuda", **options)
    stops = SamplingParams(temperature=0, max_tokens=100)
    assert tokens_of(engine, [entry["prompt_token_ids"] for entry in golden["demo"]], stops) == [
        entry["token_ids"] for entry in golden["demo"]]


# the real shapes, with few layers: Llama 3.2 1B, 3.2 3B, 3.1 8B
REAL = {name: dict(hidden_size=C, intermediate_size=F, num_attention_heads=H, num_key_value_heads=8,
                   head_dim=D, num_hidden_layers=layers, vocab_size=128256, rms_norm_eps=1e-5,
                   tie_word_embeddings=tied, rope_theta=500000.0, max_position_embeddings=8192,
                   rope_scaling=LLAMA3 | {"factor": factor,
                                          "original_max_position_embeddings": 8192})
        for name, C, F, H, D, layers, tied, factor in (
            ("1B", 2048, 8192, 32, 64, 4, True, 32.0), ("3B", 3072, 8192, 24, 128, 2, True, 32.0),
            ("8B", 4096, 14336, 32, 128, 2, False, 8.0))}


def real_checkpoint(directory, name):
    """As make_checkpoint, drawn on the GPU: half a billion weights take a second there."""
    import torch
    from safetensors.torch import save_file as save_torch
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(BASE | REAL[name]))
    torch.manual_seed(0)
    tensors = {}
    for key, shape in tinyvllm.weight_shapes(tinyvllm.load_config(directory)).items():
        scale = 0.02 if "embed" in key else 1.5 / math.sqrt(shape[-1])
        values = torch.randn(shape, device="cuda") * (0.1 if len(shape) == 1 else scale)
        tensors[key] = (values + (len(shape) == 1)).bfloat16().cpu()
    save_torch(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def teacher_forced(directory, sequence, dtype):
    """transformers' logits (T, V) of a sequence on the GPU, float32 with float32 arithmetic."""
    import torch
    import transformers
    torch.backends.cuda.matmul.allow_tf32 = False
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).cuda()
    with torch.no_grad():
        return model(torch.tensor([sequence], device="cuda")).logits[0].float().cpu().numpy()


@needs_gpu
@pytest.mark.parametrize("name, depth, rung", [("1B", 1000, "persistent"), ("1B", 60, "tensor"),
                                               ("3B", 60, "persistent"), ("8B", 60, "persistent")])
def test_bf16_is_as_close_to_float32_as_transformers_and_chooses_as_it_does(name, depth, rung,
                                                                            tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    directory = real_checkpoint(tmp_path, name)
    engine = Engine(directory, device="cuda", max_model_len=2048, max_num_seqs=16, rung=rung)
    assert engine.dtype == "bfloat16"
    prompt = prompt_ids(200, 128256)
    answer, = tokens_of(engine, [prompt], SamplingParams(temperature=0, max_tokens=depth,
                                                         ignore_eos=True))
    sequence = prompt + answer[:-1]
    right = teacher_forced(directory, sequence, torch.float32)
    theirs = teacher_forced(directory, sequence, torch.bfloat16)
    ours = all_logits(engine, sequence)
    ours_error, their_error = (np.linalg.norm(x - right) for x in (ours, theirs))
    print(f"{name}: error of our logits {ours_error / np.linalg.norm(right):.2e}, of transformers' "
          f"{their_error / np.linalg.norm(right):.2e}, ratio {ours_error / their_error:.3f}")
    assert ours_error <= 1.2 * their_error
    noise = np.abs(ours - right).max()
    second, first = np.sort(right[len(prompt) - 1:], axis=-1)[:, -2:].T
    clear = first - second > 2 * noise
    print(f"{name}: {clear.sum()} of {depth} positions are clear")
    chosen = right[len(prompt) - 1:].argmax(axis=-1)
    assert np.array_equal(np.array(answer)[clear], chosen[clear])


@needs_gpu
def test_on_the_gpu_the_company_changes_no_bit(tmp_path):
    """Tokens and log-probabilities, alone, in batches of 12, 20, 80, 130 and 200 (each another
    kernel of a decode step), chunked, and from the prefix cache."""
    pytest.importorskip("torch")
    directory = real_checkpoint(tmp_path, "1B")
    prompts = [prompt_ids(length, 128256, seed=length)
               for length in (1, 15, 16, 17, 64, 200, 700, 1600)]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0)

    def answers(engine, prompts):
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params,
                                  use_tqdm=False)
        return [[(token, entry[token].logprob)
                 for token, entry in zip(o["token_ids"], o["logprobs"])] for o in outputs]
    options = dict(device="cuda", max_model_len=2048, max_num_seqs=200)
    engine = Engine(directory, **options, enable_prefix_caching=False)
    assert engine.rung == "persistent"
    expected = [answers(engine, [ids])[0] for ids in prompts]
    crowd = [prompt_ids(7 + n, 128256, seed=1000 + n) for n in range(200 - len(prompts))]
    plain = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    for B in (12, 20, 80, 130, 200):
        assert answers(engine, (prompts + crowd)[:B])[:len(prompts)] == expected
        # without log-probabilities only the largest logits are left
        assert (tokens_of(engine, (prompts + crowd)[:B], plain)[:len(prompts)]
                == [[token for token, _ in answer] for answer in expected])
    chunked = Engine(directory, **options, max_num_batched_tokens=100)
    assert answers(chunked, prompts) == expected
    assert answers(chunked, prompts) == expected   # now from the prefix cache
    assert chunked.generate([prompts[-1]], params)[0].num_cached_tokens == 1584
    eager = Engine(directory, **options, enforce_eager=True)
    assert answers(eager, prompts[:3]) == expected[:3]


def test_a_kernel_of_a_factory_has_the_same_cache_key_in_the_next_process():
    """Numba's disk cache finds a kernel by what its closure holds, pickled."""
    pytest.importorskip("numba_cuda")
    program = ("import hashlib, kernels_numba as k; from numba.cuda.serialize import dumps; "
               "kernel = k.make_forward_decode(8, 8, 4, 64, 64, 64, 64, 16, 132); "
               "cells = kernel.py_func.__closure__; "
               "print(hashlib.sha256(dumps([c.cell_contents for c in cells])).hexdigest())")
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"}
    first, second = (subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment,
                                    capture_output=True, text=True) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout


@needs_gpu
def test_an_unchanged_decode_batch_uploads_nothing_and_replays_one_graph(small, monkeypatch):
    engine = Engine(small, device="cuda", block_size=16, max_model_len=64)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    for i in range(4):
        engine.add_request(str(i), [5 + i], params)
    uploads, replays = [], []
    upload, replay = engine.place.upload, engine.place.driver.cuGraphLaunch
    monkeypatch.setattr(engine.place, "upload", lambda *a: (uploads.append(a), upload(*a)))
    monkeypatch.setattr(engine.place.driver, "cuGraphLaunch",
                        lambda *a: (replays.append(a), replay(*a))[1])
    counts = []
    while engine.has_unfinished_requests():
        before = len(uploads), len(replays)
        engine.step()
        counts.append((len(uploads) - before[0], len(replays) - before[1]))
    # the prefill and the first decode run launch by launch; a block begins at positions 16 and 32
    assert [n for n, (copies, _) in enumerate(counts) if copies] == [0, 1, 16, 32]
    assert all(launched == 1 for _, launched in counts[2:40])


@needs_gpu
def test_kernels_are_timed_inside_their_graphs_and_change_no_token(small):
    plain = tokens_of(Engine(small, device="cuda", max_model_len=64), [[5, 6]])
    engine, reports = Engine(small, device="cuda", max_model_len=64), []
    engine.on_step, engine.place.timing = reports.append, True
    assert tokens_of(engine, [[5, 6]]) == plain
    for report in reports:
        names = [name for name, _ in report.kernels]
        assert "sample_tokens" in names and (report.kind == "prefill") == ("attention" in names)
        assert all(seconds > 0 for _, seconds in report.kernels)
        assert sum(seconds for _, seconds in report.kernels) < report.seconds
    engine.on_step, engine.place.timing = None, False
    assert tokens_of(engine, [[5, 6]]) == plain    # graphs that were timed go on


@needs_gpu
def test_an_eager_engine_names_the_kernel_that_fails(small, monkeypatch):
    broken = lambda *arrays, stream: 1 / 0         # noqa: E731
    table = kernels.operations(**vars(kernels.RUNGS["tensor"]) | {"rope_write_kv": broken})
    monkeypatch.setitem(kernels.RUNGS, "tensor", table)
    engine = Engine(small, device="cuda", enforce_eager=True, rung="tensor")
    with pytest.raises(tinyvllm.KernelError, match="kernel rope_write_kv failed on arrays of"):
        engine.generate([[5, 6]], GREEDY)
    assert not engine.requests and not any(engine.allocator.ref_counts)


@needs_gpu
def test_too_little_gpu_memory_is_one_sentence(small):
    refuses(small, "the GPU has", "more are needed", device="cuda",
            num_gpu_blocks_override=1 << 28)               # of 4 KiB each: a terabyte
    refuses(small, "leave nothing of the GPU's memory for the KV cache", device="cuda",
            gpu_memory_utilization=1e-6)


@pytest.mark.parametrize("options, parts", [
    (dict(dtype="int8"), ["dtype is 'int8', expected 'auto', 'bfloat16', 'float16', 'float32'"]),
    (dict(dtype="bfloat16", device="cpu"), ["dtype 'bfloat16' needs a GPU"]),
    (dict(rung="fast", device=DEVICE), ["rung is 'fast', expected 'auto', 'naive'"]),
    (dict(rung="tiled", device="cpu"), ["--kernels and --enforce-eager are for --device cuda"]),
    (dict(gpu_memory_utilization=1.5), ["gpu_memory_utilization is 1.5, expected a number in"]),
    (dict(max_num_seqs=5000), ["max_num_seqs is 5000, expected at most 4096"]),
])
def test_options_of_the_gpu_that_cannot_work_say_what_does(checkpoints, options, parts):
    refuses(checkpoints("gqa"), *parts, **options)


def test_shapes_that_tensor_cores_cannot_take_get_the_rung_below(checkpoints):
    odd = checkpoints("no round numbers")
    refuses(odd, "hidden_size 51 is no multiple of 8", "--kernels tiled", device=DEVICE,
            rung="tensor")
    refuses(odd, "float32 has none", device=DEVICE, rung="tensor", dtype="float32")
    assert Engine(odd, device=DEVICE, max_model_len=16, max_num_seqs=1).rung == "tiled"


def test_an_old_driver_is_named_with_the_packages_that_fit(monkeypatch):
    driver = pytest.importorskip("cuda.bindings.driver")
    monkeypatch.setattr(driver, "cuInit", lambda flags: (driver.CUresult.CUDA_SUCCESS,))
    monkeypatch.setattr(driver, "cuDriverGetVersion",
                        lambda: (driver.CUresult.CUDA_SUCCESS, 12040))
    problem = tinyvllm.gpu_problem()
    for part in ("supports CUDA 12.4", "numba-cuda[cu12]", "cuda-python>=12,<13", "--device cpu"):
        assert part in problem


@pytest.mark.parametrize("H, G", [(4, 4), (4, 2), (6, 1)])
def test_paged_attention_equals_the_textbook_formula(H, G):
    """Three requests in scattered blocks with NaN all around: a long chunk, a decode step, a whole
    prompt."""
    rng, D, P = np.random.default_rng(H), 8, 4
    seq_lens, counts = np.array([600, 9, 5], np.int32), [300, 1, 5]
    starts = np.cumsum([0] + counts, dtype=np.int32)
    blocks = rng.permutation(200).astype(np.int32)
    tables, k_cache = np.zeros((3, 150), np.int32), np.full((200, P, G, D), np.nan, np.float32)
    v_cache, used = k_cache.copy(), 0
    q, out = rng.standard_normal((306, H, D)).astype(np.float32) * 3, np.full((306, H, D), np.nan,
                                                                              np.float32)
    expected = np.empty((306, H, D))
    for b, S in enumerate(seq_lens):
        n = -(-S // P)
        tables[b, :n], used = blocks[used:used + n], used + n
        k, v = rng.standard_normal((2, S, G, D)).astype(np.float32)
        slots = tables[b, np.arange(S) // P] * P + np.arange(S) % P
        kernels.write_kv_ref(k_cache, v_cache, k, v, slots)
        for t in range(counts[b]):
            for h in range(H):
                visible, g = S - counts[b] + t + 1, h // (H // G)
                scores = k[:visible, g].astype(np.float64) @ q[starts[b] + t, h] / math.sqrt(D)
                expected[starts[b] + t, h] = kernels.softmax_ref(scores) @ v[:visible, g]
    # slots behind a context's end in its last block stay NaN: they are masked, not multiplied by
    # zero
    qkv = np.concatenate([q, np.full((306, 2 * G, D), np.nan, np.float32)], axis=1)
    kernels.paged_attention_ref(out, qkv, k_cache, v_cache, tables, np.arange(3), starts, seq_lens)
    assert np.abs(out - expected).max() < 1e-5


# -----------------------------------------------------------------------------
# Sampling                                                           (lesson 15)


def draws(logits, count=20000, **options):
    settings = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) | options
    return Counter(kernels.sample_ref(logits.copy(), seed=5, position=i, **settings)
                   for i in range(count))


def test_draws_follow_the_softmax():
    logits = np.array([2.0, 1.0, 0.0, -1.0, 1.5, -30.0], np.float32)
    for temperature in (0.7, 1.0, 2.0):
        expected = kernels.softmax_ref(logits / temperature) * 20000
        seen = draws(logits, temperature=temperature)
        chi_square = sum((seen[i] - e) ** 2 / e for i, e in enumerate(expected) if e > 5)
        # 4 degrees of freedom: 0.04 % of fair samplers fail
        assert chi_square < 20.5, (temperature, seen)
        assert seen[5] == 0


def test_draws_are_independent_across_seeds_positions_and_tokens():
    logits = np.zeros(2, np.float32)
    bits = np.array([[kernels.sample_ref(logits.copy(), 1, 0, 1, 0, seed, position)
                      for position in range(200)]
                     for seed in range(200)])
    sigma = 0.5 / math.sqrt(200)
    assert abs(bits.mean() - 0.5) < 4 * sigma / math.sqrt(200)
    assert np.abs(np.corrcoef(bits)[np.triu_indices(200, 1)]).max() < 0.4
    assert np.isfinite(kernels.gumbel_ref(2**64 - 1, 2**31, 100000)).all()


def test_nucleus_keeps_the_token_that_crosses_p_and_the_likeliest_always():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    for p, kept in ((0.4, 1), (0.6, 2), (0.9, 3), (0.96, 4), (1e-6, 1)):
        row = logits.copy()
        kernels.top_p_ref(row, p)
        assert (row > -np.inf).sum() == kept, p


def test_processing_equals_transformers_live():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    rng = np.random.default_rng(0)
    for trial in range(50):
        logits = rng.standard_normal(300).astype(np.float32) * 3
        seen = rng.integers(0, 300, 40)
        k, p, m, penalty = int(rng.integers(1, 300)), rng.uniform(0.1, 1), rng.uniform(
            0, 0.3), rng.uniform(0.5, 2)
        theirs, ids = torch.tensor(logits)[None], torch.tensor(seen)[None]
        for processor in (transformers.RepetitionPenaltyLogitsProcessor(penalty),
                          transformers.TemperatureLogitsWarper(0.7),
                          transformers.TopKLogitsWarper(k), transformers.TopPLogitsWarper(p),
                          transformers.MinPLogitsWarper(m)):
            theirs = processor(ids, theirs)
        in_prompt = np.isin(np.arange(300), seen[:20])
        kernels.penalize_ref(logits, np.bincount(seen[20:], minlength=300), in_prompt, penalty, 0,
                             0)
        logits /= np.float32(0.7)
        kernels.top_k_ref(logits, k)
        kernels.top_p_ref(logits, p)
        kernels.min_p_ref(logits, m)
        assert np.array_equal(logits > -np.inf, theirs[0].numpy() > -np.inf), trial
        assert np.allclose(logits[logits > -np.inf], theirs[theirs > -np.inf].numpy(), rtol=1e-6)


def test_penalties_count_the_output_and_repetition_the_prompt_too():
    logits = np.array([4.0, -4.0, 4.0, 4.0], np.float32)
    kernels.penalize_ref(logits, np.array([0, 0, 1, 3]), np.array([True, True, False, False]), 2.0,
                         0.5, 0.25)
    assert logits.tolist() == [2.0, -8.0, 2.0 - 0.5 - 0.25, 2.0 - 0.5 - 0.75]


def test_a_request_that_rules_out_every_token_fails_alone(checkpoints):
    nothing = SamplingParams(temperature=0.5, top_p=0.9, min_tokens=2, stop_token_ids=range(256))
    bad, good = Engine(checkpoints("gqa")).generate([[5], [6]], [nothing, GREEDY])
    assert (bad["finish_reason"], good["finish_reason"]) == ("error", "length")


def test_numpy_numbers_are_as_good_as_pythons(checkpoints):
    plain = SamplingParams(temperature=0.8, top_k=2, seed=5, max_tokens=8, ignore_eos=True)
    numpy = SamplingParams(temperature=np.float32(0.8), top_k=np.uint8(2), seed=np.int64(5),
                           max_tokens=np.int32(8), ignore_eos=True)
    engine = Engine(checkpoints("gqa"))
    assert tokens_of(engine, [[5]], plain)[0] == tokens_of(engine, [[5]], numpy)[0]


def test_a_strong_penalty_forbids_repetition(checkpoints):
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, frequency_penalty=2,
                            presence_penalty=2,
                            repetition_penalty=10)
    tokens, = tokens_of(Engine(checkpoints("gqa")), [prompt_ids(10)], params)
    assert len(set(tokens)) == 40 and not set(tokens) & set(prompt_ids(10))


def test_logit_bias_forces_and_bans_tokens(checkpoints):
    engine = Engine(checkpoints("gqa"))
    assert tokens_of(engine, [[5]], SamplingParams(temperature=0, max_tokens=4,
                                                   logit_bias={77: 100}))[0] == [77] * 4
    plain = tokens_of(engine, [[5]])[0][0]
    assert tokens_of(engine, [[5]], SamplingParams(temperature=0, max_tokens=1,
                                                   logit_bias={plain: -100}))[0] != [plain]


def test_edited_logits_are_what_the_sampler_saw(checkpoints):
    engine = Engine(checkpoints("gqa"), block_size=4, num_gpu_blocks_override=24, max_model_len=60)
    engine.keep_logits, edits = True, Counter()

    def look(report):
        for choice in report.choices:
            edited = tinyvllm.edited_logits(choice, engine)
            scores = engine.scores[engine.batch.sequences.index(choice.sequence)]
            assert np.array_equal(edited, scores) and edited.argmax() == choice.token
            edits[choice.sequence.name] += bool(choice.logits.argmax() != choice.token)
    engine.on_step = look
    for name, settings in {"bias": dict(logit_bias={7: 5, 9: -3}),
                           "repetition": dict(repetition_penalty=2),
                           "presence": dict(presence_penalty=2),
                           "frequency": dict(frequency_penalty=2),
                           "all": dict(logit_bias={7: 100}, repetition_penalty=1.3,
                                       presence_penalty=1.5, frequency_penalty=-0.5)}.items():
        engine.add_request(name, {"prompt_token_ids": prompt_ids(6)}, SamplingParams(
            temperature=0, max_tokens=40, ignore_eos=True, **settings))
    while engine.has_unfinished_requests():
        engine.step()
    assert len(edits) == 5 and all(edits.values()), "an edit that changes no token tests nothing"
    assert engine.num_preemptions > 0


def test_logprobs_are_those_of_the_raw_logits(checkpoints):
    engine, ids = Engine(checkpoints("gqa")), prompt_ids(20)
    reference = kernels.log_softmax_ref(all_logits(engine, ids).astype(np.float64))
    params = SamplingParams(temperature=5, seed=1, max_tokens=1, logprobs=3, prompt_logprobs=2,
                            logit_bias={9: 100})
    output, = engine.generate([{"prompt_token_ids": ids}], params)
    entry = output.outputs[0].logprobs[0]
    best = np.argsort(-reference[-1])
    assert list(entry)[0] == 9 and entry[9].rank == 1 + int((reference[-1] > reference[-1][9]).sum(
        ))
    assert [token for token,
            lp in sorted(entry.items(), key=lambda item: item[1].rank)][:3] == best[:3].tolist()
    assert all(abs(lp.logprob - reference[-1][token]) < 1e-4 for token, lp in entry.items())
    assert abs(output.outputs[0].cumulative_logprob - reference[-1][9]) < 1e-4
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(ids)
    for position, entry in enumerate(output.prompt_logprobs[1:]):
        assert abs(entry[ids[position + 1]].logprob - reference[position][ids[position + 1]]) < 1e-4
    everything = SamplingParams(temperature=0, max_tokens=1, logprobs=-1)
    assert len(engine.generate([{"prompt_token_ids": ids}],
                               everything)[0].outputs[0].logprobs[0]) == 256


def test_prompt_logprobs_survive_chunks_samples_and_the_prefix_cache(checkpoints):
    ids, params = prompt_ids(40), SamplingParams(temperature=1, n=2, seed=1, max_tokens=2,
                                                 prompt_logprobs=0)
    whole, = Engine(checkpoints("gqa")).generate([{"prompt_token_ids": ids}], params)
    engine = Engine(checkpoints("gqa"), max_num_batched_tokens=7, max_num_seqs=3)
    tokens_of(engine, [ids])
    chunked, = engine.generate([{"prompt_token_ids": ids}], params)
    for ours, theirs in zip(chunked.prompt_logprobs[1:], whole.prompt_logprobs[1:], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(abs(ours[token].logprob - theirs[token].logprob) < 1e-4 for token in ours)


@pytest.mark.parametrize("limit, prompt_logprobs, lengths", [
    (64, None, [20, 1]), (12, None, [12, 8, 1]), (64, 0, [20, 1, 20])],
    ids=["whole", "in chunks", "prompt logprobs"])
def test_the_last_layer_ends_with_one_token_of_each_request(checkpoints, monkeypatch, limit,
                                                            prompt_logprobs, lengths):
    """How many tokens the MLPs of two layers take, for a prompt of 20: nobody reads the others."""
    engine = Engine(checkpoints("gqa"), max_num_batched_tokens=limit)
    assert engine.cfg.num_hidden_layers == 2
    taken = []

    def counted(operation):
        return lambda out, *rest: (taken.append(len(out)), operation(out, *rest))
    for name in ("matmul_silu_mul", "matmul_silu_mul_decode"):
        monkeypatch.setattr(engine.ops, name, counted(getattr(engine.ops, name)))
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=prompt_logprobs)
    engine.generate([{"prompt_token_ids": prompt_ids(20)}], params)
    assert taken == lengths


def test_a_report_counts_what_a_step_computes_and_reads(checkpoints):
    engine, reports = Engine(checkpoints("gqa"), max_num_batched_tokens=12), []
    engine.on_step = reports.append
    engine.generate([{"prompt_token_ids": prompt_ids(20)}],
                    SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    cfg = engine.cfg
    C, heads, keys = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads
    D, lm_head = cfg.head_dim, cfg.vocab_size * C
    qkv, rest = (heads + 2 * keys) * D * C, (heads * D + 3 * cfg.intermediate_size) * C

    def flops(tokens, pairs, asked, last_pairs):
        return (2 * tokens * (2 * qkv + rest) + 2 * asked * (rest + lm_head)
                + 4 * heads * D * (pairs + last_pairs))
    chunk, end, decode = reports
    assert chunk.flops == flops(12, 12 * 13 // 2, 0, 0)
    assert end.flops == flops(8, 20 * 21 // 2 - 12 * 13 // 2, 1, 20)
    assert decode.flops == flops(1, 21, 1, 21)
    assert chunk.bytes == 4 * (2 * qkv + rest + 2 * keys * D * 12)
    assert end.bytes == 4 * (2 * (qkv + rest) + lm_head + 2 * 2 * keys * D * 20)


@pytest.mark.skipif(HAS_GPU, reason="a device function, which only the simulator runs in Python")
def test_contexts_that_are_whole_are_shared_out_in_turns():
    items = [int(kernels.in_turns.py_func(item, 9, 4, 2)) for item in range(9)]
    assert items == [0, 1, 2, 3, 7, 6, 5, 4, 8]
    assert [int(kernels.in_turns.py_func(item, 9, 4, 1)) for item in range(9)] == list(range(9))


def test_min_tokens_holds_back_every_way_to_stop(demo):
    prompt = demo.chat_prompt([{"role": "user", "content": "What is a token?"}])
    free, = demo.generate(prompt, SamplingParams(temperature=0, max_tokens=200))
    longer = len(free["token_ids"]) + 5
    held, = demo.generate(prompt, SamplingParams(temperature=0, max_tokens=longer,
                                                 min_tokens=longer, stop=free["text"][:8]))
    assert len(held["token_ids"]) == longer and held["text"].startswith(free["text"])


@pytest.mark.parametrize("change, message", [
    (dict(n=0), "n is 0, expected an integer at least 1"),
    (dict(n=2, temperature=0), "n is 2 with temperature 0"),
    (dict(temperature=-0.1), "temperature is -0.1, expected a number at least 0"),
    (dict(temperature=math.nan), "temperature is nan"),
    (dict(temperature="hot"), "temperature is 'hot'"),
    (dict(top_p=0), r"top_p is 0, expected a number in \(0, 1\]"),
    (dict(top_p=1.1), "top_p is 1.1"),
    (dict(top_k=-2), "top_k is -2"),
    (dict(top_k=1.5), "top_k is 1.5, expected an integer"),
    (dict(min_p=1.5), r"min_p is 1.5, expected a number in \[0, 1\]"),
    (dict(repetition_penalty=0), "repetition_penalty is 0, expected a number above 0"),
    (dict(presence_penalty=3), r"presence_penalty is 3, expected a number in \[-2, 2\]"),
    (dict(frequency_penalty=-2.5), "frequency_penalty is -2.5"),
    (dict(max_tokens=0), "max_tokens is 0, expected an integer at least 1 or None"),
    (dict(max_tokens=4, min_tokens=5), r"min_tokens is 5, expected an integer in \[0, 4\]"),
    (dict(stop=[""]), "stop is"),
    (dict(stop="x", detokenize=False), "stop strings need text"),
    (dict(stop_token_ids=["a"]), "stop_token_ids is"),
    (dict(logprobs=-2), "logprobs is -2"),
    (dict(logit_bias={3: 200}), "logit_bias has 3: 200"),
    (dict(seed=-5), "seed is -5"),
    (dict(seed=True), "seed is True"),
    (dict(stop=5), "stop is 5"),
    (dict(stop_token_ids=2), "stop_token_ids is 2"),
    (dict(logit_bias={3: "x"}), "logit_bias has 3: 'x'"),
])
def test_bad_sampling_values_are_named_with_their_range(change, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**change)


def test_unknown_names_are_refused():
    with pytest.raises(TypeError, match="tempreature"):
        SamplingParams(tempreature=1)
    with pytest.raises(TypeError, match="max_model_length"):
        LLM(tinyvllm.DEMO, max_model_length=3)


def test_greedy_ignores_the_other_filters():
    params = SamplingParams(temperature=1e-6, top_k=5, top_p=0.5, min_p=0.5)
    assert params.greedy and params.top_k == 5     # kept for who raises the temperature later


# -----------------------------------------------------------------------------
# BlockAllocator and the scheduler                           (lessons 11 to 14)


def test_blocks_are_never_lost_shared_wrongly_or_freed_twice():
    """Random use against a plain model: which blocks each owner holds, and which names are
    alive."""
    rng, allocator, owners, free_order = np.random.default_rng(0), BlockAllocator(10), {}, list(
        range(10))
    for step in range(5000):
        action = rng.choice([0, 1, 2, 2])
        if action == 0 and free_order:
            block = allocator.allocate()
            assert block == free_order.pop(0)
            owners[step] = block
            if rng.random() < 0.5:
                allocator.register(block, bytes([rng.integers(200)]))
        elif action == 1 and allocator.block_of:
            block = allocator.block_of[
                list(allocator.block_of)[rng.integers(len(allocator.block_of))]]
            owners[step] = allocator.share(block)
            free_order = [b for b in free_order if b != block]
        elif action == 2 and owners:
            block = owners.pop(list(owners)[rng.integers(len(owners))])
            allocator.release(block)
            if block not in owners.values():
                free_order.insert(len(free_order) if block in allocator.hash_of else 0, block)
        assert list(allocator.free) == free_order
        assert allocator.ref_counts == [list(owners.values()).count(b) for b in range(10)]
        assert {h: b for b, h in allocator.hash_of.items()} == allocator.block_of
    assert allocator.counts["evicted"] > 100
    block = allocator.allocate() if free_order else next(iter(owners.values()))
    for _ in range(allocator.ref_counts[block]):
        allocator.release(block)
    with pytest.raises(AssertionError, match="released twice"):
        allocator.release(block)


def check_cache(engine, content):
    """What must hold between any two steps. `content`: slot -> the context whose last token's KV
    lies there."""
    allocator, P = engine.allocator, engine.block_size
    held = Counter(block for seq in engine.running for block in seq.block_table)
    assert allocator.ref_counts == [held[block] for block in range(len(allocator.ref_counts))]
    assert set(allocator.free) == set(range(len(allocator.ref_counts))) - held.keys()
    assert not any(seq.block_table for seq in engine.waiting)
    for seq in engine.running:
        assert len(seq.block_table) >= -(-seq.num_computed // P)
        for position in range(seq.num_computed):
            slot = seq.block_table[position // P] * P + position % P
            assert content[slot] == tuple(seq.token_ids[:position + 1])
    for block_hash, block in allocator.block_of.items():
        context, parent = content[block * P + P - 1], b""
        for i in range(0, len(context), P):
            tokens = np.array(context[i:i + P], np.int32).tobytes()
            parent = tinyvllm.hash_block(parent, tokens)
        assert parent == block_hash


def write_content(engine, content):
    """The plain model of write_kv, told from the requests and not from the batch's slots."""
    batch, P = engine.batch, engine.block_size
    for seq, count, end in zip(batch.sequences, batch.counts, batch.seq_lens):
        for position in range(end - count, end):
            content[seq.block_table[position // P] * P
                    + position % P] = tuple(seq.token_ids[:position + 1])


@pytest.mark.parametrize("options", [
    {}, {"enable_prefix_caching": False}, {"static_batching": True}, {"max_num_seqs": 2},
    {"num_gpu_blocks_override": 40},
    {"max_num_batched_tokens": 64}], ids=str)
def test_the_scheduler_serves_every_request_under_any_load(options, tmp_path, monkeypatch):
    settings = dict(block_size=4, num_gpu_blocks_override=11, max_model_len=44, max_num_seqs=5,
                    max_num_batched_tokens=9)
    make_checkpoint(tmp_path, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                    vocab_size=97)
    engine = poisoned(Engine(tmp_path, **settings | options))
    alone = Engine(tmp_path, block_size=4, max_model_len=44, enable_prefix_caching=False)
    rng, content, running, finished, steps, submitted = np.random.default_rng(1), {}, {}, {}, 0, 0
    # the model of the cache is written when the step runs, before finished sequences give their
    # blocks back
    start = engine.start
    monkeypatch.setattr(engine, "start",
                        lambda batch: (write_content(engine, content), start(batch))[1])
    families = [rng.integers(2, 97, 44).tolist() for _ in range(3)]

    while submitted < 250 or engine.has_unfinished_requests():
        if submitted < 250 and rng.random() < 0.25:
            length = int(rng.choice([1, 3, 4, 5, 7, 8, 9, 12, 16, 17, 31, 40, 43]))
            shared = int(rng.integers(0, length + 1))
            ids = families[rng.integers(3)][:shared] + rng.integers(2, 97, length - shared).tolist()
            params = SamplingParams(temperature=0,
                                    max_tokens=int(rng.choice([1, 2, 4, 5, 13, 40])),
                                    ignore_eos=True)
            engine.add_request(str(submitted), {"prompt_token_ids": ids}, params)
            running[str(submitted)] = (ids, params)
            submitted += 1
        if running and rng.random() < 0.02:
            victim = list(running)[rng.integers(len(running))]
            engine.abort_request(victim)
            del running[victim]
            check_cache(engine, content)
        if not engine.has_unfinished_requests():
            continue
        progress = sum(engine.num_tokens.values())
        outputs = engine.step()
        steps += 1
        assert sum(engine.num_tokens.values()) > progress, "a step without progress"
        assert engine.batch.num_tokens <= (engine.max_num_batched_tokens
                                            if engine.batch.kind == "prefill"
                                            else engine.max_num_seqs)
        check_cache(engine, content)
        for output in outputs:
            if output.finished:
                finished[output.request_id] = (output, running.pop(output.request_id))
    assert not running and not engine.waiting and not engine.running
    assert len(engine.allocator.free) == len(engine.allocator.ref_counts)
    assert steps > 700 and len(finished) > 200
    for output, (ids, params) in finished.values():
        assert output.outputs[0].finish_reason == "length"
        assert [output.outputs[0].token_ids] == tokens_of(alone, [ids], params)


def timeline(engine, arrivals):
    """Steps as (kind, {request: tokens computed}); `arrivals` maps a step to requests (id, prompt
    length, new tokens)."""
    steps = []
    while engine.has_unfinished_requests() or any(at >= len(steps) for at in arrivals):
        for request_id, length, new in arrivals.get(len(steps), []):
            ids = prompt_ids(length, 97, seed=ord(request_id))
            engine.add_request(request_id, {"prompt_token_ids": ids},
                               SamplingParams(temperature=0, max_tokens=new, ignore_eos=True))
        engine.step()
        batch = engine.batch
        steps.append((batch.kind, {seq.request.request_id: count for seq,
                                   count in zip(batch.sequences, batch.counts)}))
    return steps


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), hidden_size=16, intermediate_size=24,
                           num_hidden_layers=1,
                           vocab_size=97)


def test_prompts_are_packed_and_a_newcomer_joins_the_running_batch(tiny):
    engine = Engine(tiny, block_size=4, max_num_batched_tokens=16)
    assert timeline(engine, {0: [("a", 5, 4), ("b", 3, 2)], 2: [("c", 4, 2)]}) == [
        ("prefill", {"a": 5, "b": 3}),             # packed, and each gets its first token
        ("decode", {"a": 1, "b": 1}),              # b has its two tokens and leaves
        ("prefill", {"c": 4}),                     # c takes the free place at once
        ("decode", {"a": 1, "c": 1}),
        ("decode", {"a": 1}),
    ]


def reports_of(engine, arrivals):
    reports = []
    engine.on_step = reports.append
    timeline(engine, arrivals)
    return reports


def test_a_step_is_explained_in_one_line(tiny):
    engine = Engine(tiny, block_size=4, max_num_batched_tokens=16, num_gpu_blocks_override=6,
                    device="cpu")
    reports = reports_of(engine, {0: [("a", 9, 3)], 3: [("a", 9, 2)]})     # the same prompt again
    lines = [tinyvllm.explain(report, (1e9, 1e9)) for report in reports]
    assert [re.sub(r"; [\d,]+ us, \d+ % of what (memory|arithmetic) allows$", "", line)
            for line in lines] == [
        "step 1 prefill: tokens of a 0..8; blocks 3 taken (3 of 6 in use)",
        "step 2 decode: 1 x 1 token of a; longest context 10; blocks as before (3 of 6 in use)",
        "step 3 decode: 1 x 1 token of a; longest context 11; blocks 3 freed (0 of 6 in use)",
        "step 4 prefill: tokens of a 8..8; blocks 1 taken, 2 shared (3 of 6 in use); "
        "cached 8 tokens of a",
        "step 5 decode: 1 x 1 token of a; longest context 10; blocks 3 freed (0 of 6 in use)",
    ]
    assert all(report.seconds > 0 for report in reports)
    # every weight once, keys and values of 10 tokens: 1 layer, 2 x kv_heads x head_dim, float32
    cfg, matrices = engine.cfg, engine.weights.matrices.nbytes
    assert reports[1].bytes == matrices + 2 * cfg.num_key_value_heads * cfg.head_dim * 10 * 4


def test_reports_account_for_every_block_and_token(tiny):
    engine = Engine(tiny, block_size=4, max_num_batched_tokens=8, num_gpu_blocks_override=7,
                    enable_prefix_caching=False, device="cpu")
    reports = reports_of(engine, {0: [("a", 9, 8), ("b", 7, 8)], 2: [("c", 3, 4)]})
    held = 0
    for report in reports:
        held += report.changes["taken"] - report.freed
        # what this step's schedule freed, by preemption, is in use no more, and was told of at once
        assert held == report.blocks_in_use
    assert held == 0 and engine.num_preemptions > 0
    assert [name for report in reports for name in report.preempted].count("b") > 0
    computed = Counter()
    for report in reports:
        computed.update({name: count for name, count, _ in report.members})
    assert computed["a"] == 9 + 8 - 1 and computed["c"] >= 3 + 4 - 1
    assert sum(computed.values()) == sum(engine.num_tokens.values())


def pictures_of(engine, width):
    """A list that fills with what a terminal shows after each step, below the two lines on the step
    itself, and without colours."""
    view, pictures = tinyvllm.LiveView(engine, (1e9, 1e9), width, 40), []

    def draw(report):
        lines = [re.sub(r"\x1b\[[\d;]*m", "", line).rstrip() for line in view.draw(report)]
        assert lines[0] == tinyvllm.summarize(report)[:width].rstrip()
        share = tinyvllm.share_of_bound(report, view.ceilings)
        assert re.match(r"[\d,]+ us, ", share) and lines[1] == share[:width].rstrip()
        pictures.append(lines[2:])
    engine.on_step = draw
    return pictures


def test_the_picture_has_a_line_for_each_request_and_a_letter_for_each_block(tiny):
    engine = Engine(tiny, block_size=4, num_gpu_blocks_override=10, max_model_len=24,
                    max_num_seqs=2, max_num_batched_tokens=12)
    pictures, shared = pictures_of(engine, 60), prompt_ids(9, 97)
    for request_id, tail, new in (("1", [5], 2), ("2", [6, 7, 8], 3), ("3", [], 1)):
        engine.add_request(request_id, {"prompt_token_ids": shared + tail},
                           SamplingParams(temperature=0, max_tokens=new, ignore_eos=True))
    while engine.has_unfinished_requests():
        engine.step()
    assert pictures == [
        ["a 1    10 tokens",
         "b 2    10 of 12 prefilled",              # capitals: the blocks of both
         "0 more running, 1 waiting",
         "KV blocks 0 to 9 of 10: 4 in use, - cached, . free",
         "BBab......"],
        ["b 2    10 of 12 prefilled",              # 1 has ended, its third block was never full
         "0 more running, 1 waiting",
         "KV blocks 0 to 9 of 10: 3 in use, - cached, . free",
         "bb.b......"],
        ["b 2    12 tokens",                       # 3 came and went
         "KV blocks 0 to 9 of 10: 3 in use, - cached, . free",
         "bb.b......"],
        ["b 2    13 tokens",
         "KV blocks 0 to 9 of 10: 4 in use, - cached, . free",
         "bbbb......"],
        ["KV blocks 0 to 9 of 10: 0 in use, - cached, . free",
         "--.-......"],                            # prefill has filled and named them
    ]


def test_a_map_of_many_blocks_puts_several_in_a_cell(tiny, monkeypatch):
    def pictures(width, arrivals):
        engine = Engine(tiny, block_size=1, num_gpu_blocks_override=100, max_model_len=90)
        drawn = pictures_of(engine, width)
        timeline(engine, arrivals)
        return drawn
    assert pictures(9, {0: [("1", 85, 2)]})[0][1:] == ["KV blocks", *["aaaaaaaaa"] * 4, "aaaaaaa"]
    monkeypatch.setattr(tinyvllm.LiveView, "MAP_LINES", 1)
    drawn = pictures(70, {0: [("1", 75, 2), ("2", 4, 3)]})
    assert [picture[-2:] for picture in drawn] == [
        ["KV blocks 0 to 78 of 100, 2 in a cell: 79 in use, - cached, . free",
         "a" * 38 + "bb"],                         # the last of 1 and the first of 2 have one cell
        ["KV blocks 0 to 80 of 100, 2 in a cell: 5 in use, - cached, . free",
         "-" * 37 + "bbbb"],                       # which is the owner's who is left
        ["KV blocks 0 to 78 of 100, 2 in a cell: 0 in use, - cached, . free",
         "-" * 40],
    ]


def test_more_requests_than_the_picture_has_slots_are_counted(tiny):
    engine = Engine(tiny, max_num_seqs=18)
    pictures = pictures_of(engine, 79)
    timeline(engine, {0: [(request_id, 3, 2) for request_id in "abcdefghijklmnopqrst"]})
    assert pictures[0][15:17] == ["i p     3 tokens", "2 more running, 2 waiting"]


def page_data(path):
    """The text of a trace page, and the data in it."""
    page = path.read_text(encoding="utf-8")
    return page, json.loads(re.search(r"^const data = (.*), steps = data\.steps;$", page, re.M)[1])


def test_a_trace_page_replays_the_block_tables_that_the_engine_held(tiny, tmp_path, monkeypatch):
    engine = Engine(tiny, block_size=4, num_gpu_blocks_override=9, max_model_len=32,
                    max_num_batched_tokens=16)
    trace, reports, tables = tinyvllm.Trace(str(tmp_path / "steps.html")), [], []
    engine.on_step = lambda report: (trace.add(report), reports.append(report))
    start, shared = engine.start, prompt_ids(9, 97)
    monkeypatch.setattr(engine, "start", lambda batch: (tables.append(
        {seq.name: list(seq.block_table) for seq in engine.running}), start(batch))[1])
    together = {str(i): (shared + [5 + i] * i, 4 + 3 * i) for i in range(6)}
    for requests in (together, {"0": (prompt_ids(9, 97, 1), 2)}, {"0": (prompt_ids(20, 97), 2)}):
        for name, (ids, new) in requests.items():
            engine.add_request(name, {"prompt_token_ids": ids}, SamplingParams(
                temperature=0, max_tokens=new, ignore_eos=True))
        while engine.has_unfinished_requests():
            engine.step()
    trace.write(engine)
    held, several, used_again = {}, 0, 0
    _, data = page_data(tmp_path / "steps.html")
    for step, report, table in zip(data["steps"], reports, tables, strict=True):
        used_again += not step["took"].keys().isdisjoint(step["gone"])
        for name in step["gone"]:
            del held[name]
        for name, blocks in step["took"].items():
            held[name] = held.get(name, []) + blocks
        assert held == report.held == table
        several += max(Counter(sum(held.values(), [])).values()) > 1
    assert engine.num_preemptions > 1 and several > 1 and used_again
    assert data["blocks"] == 9


def test_a_request_id_cannot_end_the_script_of_a_trace_page(tiny, tmp_path):
    engine, name = Engine(tiny), "</script><b>"
    trace = tinyvllm.Trace(str(tmp_path / "steps.html"))
    engine.on_step = trace.add
    engine.add_request(name, {"prompt_token_ids": [5, 6]}, GREEDY)
    while engine.has_unfinished_requests():
        engine.step()
    trace.write(engine)
    page, data = page_data(tmp_path / "steps.html")
    assert data["steps"][0]["members"] == [[name, 2, 2]] and name in data["steps"][0]["took"]
    assert page.count("<") == (ROOT / "assets" / "trace.html").read_text().count("<")


def test_a_trace_of_events_survives_a_preemption(tiny, tmp_path):
    engine = Engine(tiny, block_size=4, num_gpu_blocks_override=4, max_model_len=16,
                    enable_prefix_caching=False)
    trace = tinyvllm.Trace(str(tmp_path / "steps.json"))
    engine.on_step = trace.add
    timeline(engine, {0: [("a", 7, 6)], 1: [("b", 3, 6)]})
    trace.write(engine)
    events = json.loads((tmp_path / "steps.json").read_text())["traceEvents"]
    assert engine.num_preemptions == 1
    assert ["b"] in [event["args"].get("preempted") for event in events]


def test_edited_logits_hold_back_the_end_as_min_tokens_does(demo):
    prompt = demo.chat_prompt([{"role": "user", "content": "What is a token?"}])
    free, = demo.generate(prompt, SamplingParams(temperature=0, max_tokens=100))
    longer, missed = len(free["token_ids"]) + 1, []
    demo.keep_logits, demo.on_step = True, lambda report: missed.extend(
        choice for choice in report.choices
        if tinyvllm.edited_logits(choice, demo).argmax() != choice.token)
    try:
        demo.generate(prompt, SamplingParams(temperature=0, max_tokens=longer, min_tokens=longer))
    finally:
        demo.keep_logits, demo.on_step = False, None
    assert not missed


def test_a_choice_of_nothing_is_explained_too(checkpoints):
    engine, shown = Engine(checkpoints("gqa"), tokenizer=tinyvllm.DEMO), []
    engine.weights.embed[7] = np.nan
    engine.keep_logits, engine.on_step = True, lambda report: shown.extend(
        tinyvllm.explain_choice(choice, engine) for choice in report.choices)
    bad, = engine.generate([[7]], GREEDY)
    assert bad["finish_reason"] == "error"
    assert shown == ["request 1: no finite logit is left to choose from"]


@pytest.mark.parametrize("width", [1, 10, 18, 40])
def test_no_line_of_the_picture_is_wider_than_the_terminal(demo, width):
    view, widest = tinyvllm.LiveView(demo, (1e9, 1e9), width, 40), []
    demo.on_step = lambda report: widest.append(max(
        len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in view.draw(report)))
    try:
        demo.generate("What is", GREEDY)
    finally:
        demo.on_step = None
    assert max(widest) <= width


def test_a_picture_below_an_interrupted_answer_leaves_its_text(demo, monkeypatch):
    notes = []
    monkeypatch.setattr(tinyvllm, "note", notes.append)
    monkeypatch.setattr(tinyvllm.LiveView, "SECONDS_APART", 0)
    demo.on_step = tinyvllm.LiveView(demo, (1e9, 1e9), 79, 40).show
    try:
        for _ in range(2):
            for _ in demo.stream("What is", GREEDY):
                break
    finally:
        demo.on_step = None
    assert len(notes) == 2 and not any("\x1b[J" in picture for picture in notes)


def test_static_batching_lets_nobody_in_until_all_have_left(tiny):
    engine = Engine(tiny, block_size=4, max_num_batched_tokens=16, static_batching=True)
    assert timeline(engine, {0: [("a", 5, 4), ("b", 3, 2)], 2: [("c", 4, 2)]}) == [
        ("prefill", {"a": 5, "b": 3}),
        ("decode", {"a": 1, "b": 1}),
        ("decode", {"a": 1}),                      # c waits, though b's place is empty
        ("decode", {"a": 1}),
        ("prefill", {"c": 4}),
        ("decode", {"c": 1}),
    ]


def test_static_batching_fills_its_batch_over_several_prefill_steps(tiny):
    engine = Engine(tiny, block_size=4, max_num_batched_tokens=8, static_batching=True)
    assert timeline(engine, {0: [("a", 6, 3), ("b", 6, 2)]}) == [
        ("prefill", {"a": 6, "b": 2}),
        ("prefill", {"b": 4}),
        ("decode", {"a": 1, "b": 1}),
        ("decode", {"a": 1}),
    ]


def test_a_long_prompt_delays_the_others_by_one_chunk_at_most(tiny):
    engine = Engine(tiny, block_size=4, max_num_batched_tokens=8)
    assert timeline(engine, {0: [("a", 4, 5)], 1: [("b", 20, 2)]}) == [
        ("prefill", {"a": 4}),
        ("decode", {"a": 1}),                    # prefill and decode alternate while both have work
        ("prefill", {"b": 8}),
        ("decode", {"a": 1}),
        ("prefill", {"b": 8}),
        ("decode", {"a": 1}),
        ("prefill", {"b": 4}),
        ("decode", {"a": 1, "b": 1}),
    ]


def test_a_prefill_step_is_a_half_while_others_decode_unless_it_is_small(tiny, monkeypatch):
    monkeypatch.setattr(tinyvllm, "SMALL_STEP", 6)
    for tokens, beside in ((16, 8), (8, 6), (5, 5)):
        engine = Engine(tiny, block_size=4, max_num_batched_tokens=tokens)
        alone, a, step, *_ = timeline(engine, {0: [("a", tokens, 5)], 1: [("b", 20, 1)]})
        assert [alone, a, step] == [("prefill", {"a": tokens}), ("decode", {"a": 1}),
                                    ("prefill", {"b": beside})]


def test_a_chunk_shrinks_with_its_context_while_others_decode(tiny, monkeypatch):
    monkeypatch.setattr(tinyvllm, "CHUNK_CONTEXT", 8)
    engine = Engine(tiny, block_size=4, max_num_batched_tokens=8)
    assert timeline(engine, {0: [("a", 4, 7)], 1: [("b", 45, 2)], 5: [("c", 5, 2)]}) == [
        ("prefill", {"a": 4}),
        ("decode", {"a": 1}),
        ("prefill", {"b": 8}),
        ("decode", {"a": 1}),
        ("prefill", {"b": 4}),                     # behind 8 tokens: a half
        ("decode", {"a": 1}),
        ("prefill", {"b": 4, "c": 4}),             # behind 12, and c takes what b leaves
        ("decode", {"a": 1}),
        ("prefill", {"b": 3, "c": 1}),             # behind 16: a third
        ("decode", {"a": 1, "c": 1}),
        ("prefill", {"b": 3}),
        ("decode", {"a": 1}),                      # a ends, and nobody waits for b
        ("prefill", {"b": 8}),
        ("prefill", {"b": 8}),
        ("prefill", {"b": 7}),
        ("decode", {"b": 1}),
    ]
    assert timeline(engine, {0: [("d", 20, 1), ("e", 5, 1)]}) == [
        ("prefill", {"d": 8}),
        ("prefill", {"d": 8}),
        ("prefill", {"d": 4, "e": 4}),
        ("prefill", {"e": 1}),
    ]


def test_the_youngest_gives_way_when_blocks_run_out_and_computes_again(tiny):
    engine = Engine(tiny, block_size=4, num_gpu_blocks_override=4, max_model_len=16,
                    enable_prefix_caching=False)
    assert timeline(engine, {0: [("a", 4, 6)], 1: [("b", 4, 3)]}) == [
        ("prefill", {"a": 4}),
        ("decode", {"a": 1}),
        ("prefill", {"b": 4}),                     # a holds two blocks, b one, one is left
        ("decode", {"a": 1, "b": 1}),              # b takes it
        ("decode", {"a": 1, "b": 1}),              # b ends before a needs a third
        ("decode", {"a": 1}),
        ("decode", {"a": 1}),
    ]
    engine = Engine(tiny, block_size=4, num_gpu_blocks_override=4, max_model_len=16,
                    enable_prefix_caching=False)
    assert timeline(engine, {0: [("a", 7, 6)], 1: [("b", 3, 6)]}) == [
        ("prefill", {"a": 7}),
        ("decode", {"a": 1}),
        ("prefill", {"b": 3}),      # a holds two blocks, and with the next step three; b the fourth
        ("decode", {"a": 1, "b": 1}),
        ("decode", {"a": 1}),          # b needs another block, there is none, and b is the youngest
        ("decode", {"a": 1}),
        ("decode", {"a": 1}),                      # a ends
        ("prefill", {"b": 5}),                     # prompt and output so far, in one prefill
        ("decode", {"b": 1}),
        ("decode", {"b": 1}),
        ("decode", {"b": 1}),
    ]
    assert engine.num_preemptions == 1


def test_a_common_prefix_is_computed_once_even_in_the_same_step(tiny):
    engine = Engine(tiny, block_size=4)
    shared = prompt_ids(9, 97)
    for request_id, tail in (("a", [5]), ("b", [6]), ("c", [])):
        engine.add_request(request_id, {"prompt_token_ids": shared + tail}, GREEDY)
    engine.step()
    assert engine.batch.counts == [10, 2, 1]       # two full blocks of four come from a
    assert [seq.block_table[:2]
            for seq in engine.running] == [engine.running[0].block_table[:2]] * 3


def test_the_least_recently_used_prefix_is_evicted(tiny):
    engine = Engine(tiny, block_size=4, num_gpu_blocks_override=8, max_model_len=32)
    once = SamplingParams(temperature=0, max_tokens=1)
    old, recent, big = prompt_ids(9, 97, 1), prompt_ids(9, 97, 2), prompt_ids(17, 97, 3)

    def cached(ids):
        return engine.generate({"prompt_token_ids": ids}, once)[0].num_cached_tokens
    assert [cached(old), cached(recent), cached(old), cached(big)] == [0, 0, 8, 0]
    assert [cached(old), cached(recent)] == [8, 4]        # recent's end was the least recently used


def test_an_answer_that_reaches_the_context_ends_by_length(tiny):
    engine = Engine(tiny, block_size=4, max_model_len=20)
    output, = engine.generate({"prompt_token_ids": prompt_ids(15, 97)},
                              SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    assert len(output["token_ids"]) == 5 and output["finish_reason"] == "length"


def test_aborting_gives_blocks_back_and_leaves_the_others_alone(checkpoints):
    engine, prompts = poisoned(Engine(checkpoints("gqa"))), [prompt_ids(20, seed=i)
                                                             for i in range(3)]
    for i, ids in enumerate(prompts):
        engine.add_request(str(i), {"prompt_token_ids": ids}, GREEDY)
    engine.step()
    engine.step()
    engine.abort_request("1")
    engine.abort_request("no such request")
    outputs = {}
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
    assert engine.allocator.ref_counts == [0] * len(engine.allocator.ref_counts)
    assert [outputs[i]["token_ids"] for i in "02"] == tokens_of(engine, [prompts[0], prompts[2]])


def test_leaving_a_stream_early_aborts_its_request(demo):
    for _ in demo.stream("The KV cache", GREEDY):
        break
    assert not demo.has_unfinished_requests() and not any(demo.allocator.ref_counts)


def test_a_failing_step_loses_its_own_requests_only(checkpoints, monkeypatch):
    engine = Engine(checkpoints("gqa"), max_num_seqs=1)
    for i in range(2):
        engine.add_request(str(i), {"prompt_token_ids": prompt_ids(20, seed=i)}, GREEDY)
    broken = lambda *arguments: 1 / 0              # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(engine, "ops",
                      tinyvllm.kernels.SimpleNamespace(
                          **vars(kernels.TWINS) | {"rmsnorm": broken}))
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert list(engine.requests) == ["1"] and not engine.allocator.block_of
    while engine.has_unfinished_requests():
        output, = engine.step()
    assert output["token_ids"] == tokens_of(engine, [prompt_ids(20, seed=1)])[0]


def test_logits_that_are_not_finite_end_the_request_and_say_so(checkpoints):
    engine = Engine(checkpoints("gqa"))
    engine.weights.embed[7] = np.nan
    bad, good = engine.generate([{"prompt_token_ids": [7]}, {"prompt_token_ids": [8]}], GREEDY)
    assert bad["finish_reason"] == "error" and "no finite logit" in bad["stop_reason"]
    assert good["finish_reason"] == "length" and not any(engine.allocator.ref_counts)


# -----------------------------------------------------------------------------
# Checkpoints that cannot be loaded say why, in one sentence          (lesson 3)


def refuses(directory, *parts, **options):
    with pytest.raises(UserError) as caught:
        Engine(directory, **options)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.fixture
def broken(checkpoints, tmp_path):
    """A copy of a good checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoints("gqa"), tmp_path / "broken"))


def change_json(path, **changes):
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items()
                                if v is not None}))


def change_tensors(directory, change):
    with tinyvllm.safe_open(directory / "model.safetensors", framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_every_tensor_that_does_not_fit_is_named_at_once(broken):
    def damage(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
        tensors["model.layers.0.mlp.down_proj.weight"] = np.zeros((64, 96), np.int32)
    change_tensors(broken, damage)
    refuses(broken, "missing model.layers.1.mlp.up_proj.weight", "missing model.norm.weight",
            "unexpected model.layers.0.self_attn.q_proj.bias",
            "lm_head.weight has shape (255, 64), expected (256, 64)",
            "model.layers.0.mlp.down_proj.weight has type I32, expected BF16, F16 or F32")


def test_harmless_extra_tensors_are_ignored(checkpoints, tmp_path, golden):
    directory = Path(shutil.copytree(checkpoints("tied"), tmp_path / "tied"))
    change_tensors(directory, lambda tensors: tensors.update({
        "lm_head.weight": tensors["model.embed_tokens.weight"].copy(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}))
    assert tokens_of(Engine(directory), shape_prompts("tied")) == golden["tokens"]["tied"]


def test_truncated_pointer_and_html_files_are_recognised(broken):
    file = broken / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    refuses(broken, "model.safetensors", f"promises {len(whole)} bytes, the file has "
            f"{len(whole) - 1000}")
    file.write_bytes(whole[:100])
    refuses(broken, "truncated: its header is", "the file has 100")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refuses(broken, "Git-LFS pointer", "git lfs pull")
    file.write_bytes(b"<!doctype html><title>404</title>")
    refuses(broken, "HTML page", "download it again")
    file.write_bytes(b"")
    refuses(broken, "truncated")
    file.write_bytes((20).to_bytes(8, "little") + b"not json at all, no.")
    refuses(broken, "header is damaged")
    file.unlink()
    refuses(broken, "neither model.safetensors nor model.safetensors.index.json")


def test_an_index_must_name_files_that_are_there(checkpoints, tmp_path):
    directory = Path(shutil.copytree(checkpoints("f16 in three shards"), tmp_path / "shards"))
    index = directory / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    (directory / "model-00002-of-00003.safetensors").rename(directory / "elsewhere")
    refuses(directory, "names files that are not there: model-00002-of-00003.safetensors")
    for outside in ("../model.safetensors", "/etc/passwd", ".."):
        change_json(index, weight_map=good | {"model.norm.weight": outside})
        refuses(directory, "outside its directory", outside)
    index.write_text("{}")
    refuses(directory, "weight_map is missing or damaged")


@pytest.mark.parametrize("changes, parts", [
    (dict(architectures=["GPT2LMHeadModel"]),
     ["GPT2LMHeadModel is not supported", "LlamaForCausalLM, MistralForCausalLM"]),
    (dict(architectures=None, model_type="bert"), ["model_type 'bert' is not supported"]),
    (dict(sliding_window=128), ["sliding_window is 128"]),
    (dict(architectures=["MistralForCausalLM"]), ["sliding_window is missing"]),
    (dict(hidden_size=2), ["head_dim is 0"]),
    (dict(attention_bias=True), ["attention_bias is True"]),
    (dict(hidden_act="gelu"), ["hidden_act is 'gelu', supported is only 'silu'"]),
    (dict(quantization_config={"bits": 4}), ["quantization_config"]),
    (dict(rope_scaling={"rope_type": "yarn", "factor": 2}),
     ["rope_type 'yarn' is not supported", "default, linear, llama3"]),
    (dict(rope_scaling={"rope_type": "linear"}), ["rope_type 'linear' has factor None, expected a "
                                                  "positive number"]),
    (dict(num_key_value_heads=3), ["4 attention heads cannot be shared by 3"]),
    (dict(hidden_size=None), ["hidden_size is None, expected a positive int"]),
    (dict(vocab_size="many"), ["vocab_size is 'many'"]),
    (dict(head_dim=15), ["head_dim is 15, expected an even number"]),
    (dict(rms_norm_eps=0), ["rms_norm_eps is 0"]),
])
def test_a_config_that_cannot_run_is_refused(broken, changes, parts):
    change_json(broken / "config.json", **changes)
    refuses(broken, *parts)


@pytest.mark.parametrize("file, content, part", [
    ("config.json", '{"architectures": ["LlamaForCausalLM"], "num_attention_heads": NaN}',
     "num_attention_heads is nan"),
    ("config.json", '{"architectures": 3}', "3 is not supported"),
    ("config.json", "[" * 100000, "nested too deeply"),
    ("generation_config.json", '{"eos_token_id": {"a": 1}}', "eos_token_id holds {'a': 1}"),
    ("generation_config.json", '{"eos_token_id": [1, "x"]}', "eos_token_id holds 'x'"),
])
def test_damaged_json_ends_in_one_sentence(broken, file, content, part):
    (broken / file).write_text(content)
    refuses(broken, part)


def test_a_directory_in_a_files_place_is_said(broken):
    (broken / "model.safetensors").unlink()
    (broken / "model.safetensors").mkdir()
    refuses(broken, "model.safetensors cannot be read")
    (broken / "config.json").unlink()
    (broken / "config.json").mkdir()
    refuses(broken, "config.json cannot be read")


def test_an_end_of_sequence_id_outside_the_vocabulary_is_harmless(broken):
    change_json(broken / "config.json", eos_token_id=[1, 9999])
    params = SamplingParams(temperature=0, max_tokens=5, min_tokens=3)
    assert len(Engine(broken).generate([[5]], params)[0]["token_ids"]) >= 3


def test_broken_json_names_the_place(broken):
    config = broken / "config.json"
    config.write_text('{"vocab_size": 3,\n oops}')
    refuses(broken, "config.json is not valid JSON", "line 2, column 2")
    config.write_text("[1]")
    refuses(broken, "holds a JSON list, expected an object")
    config.write_bytes(b"\xff\xfe{}")
    refuses(broken, "not UTF-8")
    config.write_text("<html>")
    refuses(broken, "HTML page")
    config.unlink()
    refuses(broken, "has no config.json", "expected a Hugging Face checkpoint directory")


def test_a_broken_tokenizer_is_named(broken):
    (broken / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    refuses(broken, "tokenizer.json is not a usable tokenizer", "Git-LFS")


def test_models_are_found_as_the_hub_finds_them(checkpoints, tmp_path, monkeypatch, golden):
    """A hub id is looked up in the cache that HF_HUB_CACHE names; with HF_HUB_OFFLINE nothing else
    is tried."""
    script = ("import sys, tinyvllm; e = "
              "tinyvllm.Engine(sys.argv[1]);print(e.generate({'prompt_token_ids': [5]}, "
              "tinyvllm.SamplingParams(temperature=0, max_tokens=3))[0]['token_ids'])")
    repo = tmp_path / "models--some--model"
    shutil.copytree(checkpoints("gqa"), repo / "snapshots" / "abc123")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc123")
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def load(name):
        return subprocess.run([sys.executable, "-c", script, name], env=environment, cwd=ROOT,
                              capture_output=True, text=True)
    assert load("some/model").stdout.strip() == str(tokens_of(Engine(checkpoints("gqa")),
                                                              [[5]])[0][:3])
    assert "other/model is not in the Hugging Face cache and cannot be downloaded " \
        "(HF_HUB_OFFLINE is set)" in load("other/model").stderr
    for name in ("no/such/dir", "nothing", "/nowhere", str(tmp_path / "absent")):
        with pytest.raises(UserError, match="there is no directory"):
            Engine(name)
    with pytest.raises(UserError, match="is a file"):
        Engine(checkpoints("gqa") / "config.json")


# -----------------------------------------------------------------------------
# Prompts that cannot be served say why; the others go on


@pytest.mark.parametrize("prompt, message", [
    ("", "the prompt is empty"),
    ({"prompt_token_ids": []}, "the prompt is empty"),
    ({"prompt_token_ids": [5, 3072]}, "token id 3072, expected integers from 0 to 3071"),
    ({"prompt_token_ids": [-1]}, "token id -1"),
    ({"prompt_token_ids": [1.5]}, "token id 1.5"),
    ({"prompt_token_ids": ["a"]}, "token id 'a'"),
    *(({"prompt_token_ids": [5, *good, token, 6]}, re.escape(
        f"the prompt holds token id {token!r}, expected integers from 0 to 3071") + "$")
      for good in ([], [np.int64(7)])
      for token in (True, False, np.True_, 5.0, np.float32(5), None, -1, np.int64(-1), 3072,
                    np.int32(3072), 2**70)),
    ({"prompt_token_ids": [5] * 2048}, "the prompt has 2048 tokens, the context holds 2048"),
    ({"promt": "x"}, r"keys \['promt'\], expected 'prompt' or 'prompt_token_ids'"),
    (17, "the prompt is a int"),
    ("\ud800", "lone surrogates"),
])
def test_bad_prompts_are_refused_and_nothing_else_is_lost(demo, prompt, message):
    demo.add_request("good", "What is a block?", GREEDY)
    with pytest.raises(ValueError, match=message):
        demo.add_request("bad", prompt, GREEDY)
    with pytest.raises(ValueError, match=message):
        demo.submit(["a good one", prompt], GREEDY)
    assert demo.get_num_unfinished_requests() == 1
    while demo.has_unfinished_requests():
        output, = demo.step()
    assert output.request_id == "good" and output.finished and not any(demo.allocator.ref_counts)


def test_token_ids_of_numpy_are_as_good_as_pythons(demo):
    plain = [0, 5, 3071]
    expected = tokens_of(demo, [plain])
    for ids in (np.array(plain), np.array(plain, np.uint16), tuple(plain),
                [np.int64(id) for id in plain], [0, np.uint8(5), 3071]):
        output, = demo.generate({"prompt_token_ids": ids}, GREEDY)
        assert [output["token_ids"]] == expected and output.prompt_token_ids == plain
        assert {type(token) for token in output.prompt_token_ids} == {int}


@pytest.mark.parametrize("params, message", [
    (SamplingParams(stop_token_ids=[9999]),
     "stop_token_ids holds token id 9999, expected 0 to 3071"),
    (SamplingParams(logit_bias={9999: 1}), "logit_bias holds token id 9999"),
    (SamplingParams(logprobs=4000), "logprobs is 4000, expected at most the vocabulary of 3072"),
    ({"temperature": 0}, "sampling_params is a dict, expected SamplingParams"),
    ([GREEDY, GREEDY], "there are 1 prompts and 2 sampling_params"),
])
def test_parameters_that_do_not_fit_the_model_are_refused(demo, params, message):
    with pytest.raises(ValueError, match=message):
        demo.generate("hello", params)


def test_a_request_id_is_used_once(demo):
    demo.add_request("same", "hello", GREEDY)
    with pytest.raises(ValueError, match="request_id 'same' is in use"):
        demo.add_request("same", "hello", GREEDY)
    demo.abort_request("same")


@pytest.mark.parametrize("options, parts", [
    (dict(max_model_len=4096), ["max_model_len is 4096, the model was made for 512",
                                "--max-model-len 512"]),
    (dict(num_gpu_blocks_override=4, max_model_len=100),
     ["holds 64 tokens", "--kv-cache-memory-bytes", "--max-model-len 64"]),
    (dict(kv_cache_memory_bytes=100), ["holds 0 tokens", "--kv-cache-memory-bytes 8192"]),
    (dict(max_num_seqs=0), ["max_num_seqs is 0, expected a positive integer"]),
    (dict(block_size=2.5), ["block_size is 2.5"]),
    (dict(device="tpu"), ["device is 'tpu', expected 'auto', 'cuda', 'cpu' or 'sim'"]),
])
def test_engine_options_that_cannot_work_name_one_that_does(checkpoints, options, parts):
    refuses(checkpoints("gqa"), *parts, **options)


@pytest.mark.skipif(HAS_GPU, reason="is about machines without one")
def test_a_machine_without_a_gpu_says_what_to_do(checkpoints, monkeypatch):
    pytest.importorskip("cuda.bindings.driver")
    monkeypatch.setattr(kernels, "SIMULATOR", False)
    monkeypatch.setattr(cuda, "is_available", lambda: False)
    refuses(checkpoints("gqa"), "found no GPU with a working driver: use --device cpu",
            device="cuda")
    assert tinyvllm.pick_device("auto") == "cpu"


def test_weights_that_cannot_fit_are_refused_before_they_are_read(checkpoints):
    with pytest.raises(UserError, match="needs .* GiB as float32, this machine has"):
        tinyvllm.check_memory(1 << 60, 1 << 40, checkpoints("gqa"), "float32", "this machine")


def test_the_cache_is_sized_by_need_and_capped_by_memory(checkpoints):
    assert len(Engine(checkpoints("gqa"), max_num_seqs=3).allocator.ref_counts) == 3 * 512 // 16
    capped = Engine(checkpoints("gqa"), kv_cache_memory_bytes=8192 * 10)
    assert len(capped.allocator.ref_counts) == 10 and capped.max_model_len == 160
    assert "10 blocks of 16 tokens; context up to 160 tokens" in capped.describe()


def test_an_engine_without_a_tokenizer_works_on_ids_alone(checkpoints):
    engine = Engine(checkpoints("gqa"))
    assert engine.get_tokenizer() is None and engine.generate([[5, 6]], GREEDY)[0]["text"] == ""
    for call in (lambda: engine.generate("hello"),
                 lambda: engine.chat([{"role": "user", "content": "hi"}]),
                 lambda: engine.generate([[5]], SamplingParams(stop="x"))):
        with pytest.raises(UserError, match="no tokenizer.json"):
            call()
    borrowed = Engine(checkpoints("bf16"), tokenizer=tinyvllm.DEMO)
    assert borrowed.get_tokenizer().decode([300]) != ""


# -----------------------------------------------------------------------------
# Text in and out                                                     (lesson 0)


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer(tinyvllm.DEMO)


def sentencepiece_tokenizer():
    """The other family: a space is part of the word behind it, and the first one is dropped (Llama
    2, Mistral)."""
    from tokenizers import decoders, models, normalizers
    from tokenizers import Tokenizer as Backend
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {word: 256 + i for i,
                   word in enumerate(["\u2581", "\u2581the", "\u2581cat", "s", "\u00e9", "<unk>"])}
    backend = Backend(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"),
                                               normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                                         decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    made = object.__new__(Tokenizer)
    made.backend = backend
    return made


TEXTS = ["plain words", "Gr\u00fc\u00dfe aus K\u00f6ln", "\u4f60\u597d\uff0c\u4e16\u754c",
         "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
         "\U0001f600\U0001f469\u200d\U0001f680 ok", "a\u0301\n\ttabs  two",
         "\ufffd is a character, too"]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_are_whole_characters_and_join_to_the_text(tokenizer, text):
    stream = Detokenizer(tokenizer, [], skip_special_tokens=True)
    ids = tokenizer.backend.encode(text, add_special_tokens=False).ids
    pieces = [stream.push(token) for token in ids] + [stream.flush()]
    assert "".join(pieces) == text == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def check_pieces(made, prompt, ids):
    stream = Detokenizer(made, prompt, skip_special_tokens=True)
    text = "".join([stream.push(token) for token in ids] + [stream.flush()])
    assert made.decode(prompt) + text == made.decode(prompt + ids), (prompt, ids)


def test_pieces_of_any_ids_join_to_the_decode_of_the_whole(tokenizer):
    rng = np.random.default_rng(0)
    for trial in range(300):
        prompt = rng.integers(0, 3072, rng.integers(0, 12)).tolist()
        while prompt and tokenizer.decode(prompt).endswith("\ufffd"):
            prompt.pop()                           # one that ends inside a character comes later
        check_pieces(tokenizer, prompt, rng.integers(0, 3072 if trial % 2 else 256, 30).tolist())


def test_pieces_join_where_a_space_belongs_to_the_word_behind_it():
    made, rng = sentencepiece_tokenizer(), np.random.default_rng(0)
    characters = [[256], [257], [258], [259], [260]]
    characters += [list(c.encode()) for c in "a \u00e9\u4f60\U0001f600"]

    def some(count):
        return [token for i in rng.integers(0, len(characters), count) for token in characters[i]]
    for _ in range(300):
        prompt, ids = some(rng.integers(0, 5)), some(12)
        check_pieces(made, prompt, ids)


def test_a_prompt_that_ends_inside_a_character_is_completed_not_repeated(tokenizer):
    ids = tokenizer.backend.encode("a \U0001f600", add_special_tokens=False).ids
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd")
    stream = Detokenizer(tokenizer, ids[:-1], skip_special_tokens=True)
    assert stream.push(ids[-1]) == "\U0001f600"


def test_a_prompt_that_ends_with_a_replacement_character_is_not_repeated(tokenizer):
    stream = Detokenizer(tokenizer, tokenizer.encode("a \ufffd"), skip_special_tokens=True)
    assert stream.push(tokenizer.tokenize("b", add_special_tokens=False)[0]) == "b"


def test_every_prompt_begins_with_exactly_one_bos(demo, tmp_path):
    bos = demo.tokenizer.bos_token_id
    for ids in (demo.tokenizer.encode("hello"), demo.tokenizer.encode("<|begin_of_text|>hello"),
                demo.chat_prompt([{"role": "user", "content": "hello"}])["prompt_token_ids"]):
        assert ids.count(bos) == 1 and ids[0] == bos
    # a tokenizer that adds none itself, and says so in its config: as Llama 2's
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tinyvllm.DEMO / name, tmp_path / name)
    without_bos = Tokenizer(tmp_path)
    assert without_bos.encode_chat("a template that writes none").count(bos) == 1
    change_json(tmp_path / "tokenizer.json", post_processor=None)
    assert Tokenizer(tmp_path).encode("hello").count(bos) == 0
    change_json(tmp_path / "tokenizer_config.json", add_bos_token=True)
    assert Tokenizer(tmp_path).encode("hello").count(bos) == 1


def test_every_end_of_sequence_id_ends_an_answer(checkpoints, tmp_path):
    directory = Path(shutil.copytree(checkpoints("gqa"), tmp_path / "eos"))
    answer, = tokens_of(Engine(directory), [[5]])
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [answer[3], 250]}))
    output, = Engine(directory).generate([[5]], SamplingParams(temperature=0))
    assert output["token_ids"] == answer[:answer.index(answer[3]) + 1]
    assert (output["finish_reason"], output["stop_reason"]) == ("stop", None)
    output, = Engine(directory).generate([[5]], SamplingParams(temperature=0, ignore_eos=True))
    assert output["token_ids"] == answer
    output, = Engine(directory).generate([[5]], SamplingParams(temperature=0, ignore_eos=True,
                                                               stop_token_ids=[answer[5]]))
    assert output["stop_reason"] == answer[5]


def test_stop_strings_end_the_text_and_never_show_early(demo):
    prompt = demo.chat_prompt([{"role": "user", "content": "What is PagedAttention?"}])
    full, = demo.generate(prompt, SamplingParams(temperature=0, max_tokens=100))
    text = full["text"]
    for stop in (text[20:24], text[30:45], text[:3]):
        at = text.index(stop)
        pieces = list(demo.stream(prompt,
                                  SamplingParams(temperature=0, max_tokens=100,
                                                 stop=[stop, "never"])))
        assert pieces[-1]["text"] == text[:at] and pieces[-1]["stop_reason"] == stop
        assert all(text[:at].startswith(piece["text"]) for piece in pieces)
        kept, = demo.generate(prompt, SamplingParams(temperature=0, max_tokens=100, stop=stop,
                                                     include_stop_str_in_output=True))
        assert kept["text"] == text[:at + len(stop)]


def test_special_tokens_show_only_when_asked(demo):
    prompt = demo.chat_prompt([{"role": "user", "content": "What is a token?"}])
    plain, shown, silent = demo.generate([prompt] * 3, [
        SamplingParams(temperature=0, max_tokens=100),
        SamplingParams(temperature=0, max_tokens=100, skip_special_tokens=False,
                       include_stop_str_in_output=True),
        SamplingParams(temperature=0, max_tokens=100, detokenize=False)])
    assert shown["text"] == plain["text"] + "<|eot_id|>" and silent["text"] == ""
    assert plain["token_ids"] == shown["token_ids"] == silent["token_ids"]


HOSTILE_TEMPLATES = {"{{ 1 + 'a' }}": "refuses", "{{ range(10**9) }}": "refuses",
                     "{{ ''.__class__.__mro__[1].__subclasses__() }}": "refuses",
                     "{{ raise_exception('no system') }}": "no system",
                     "{% for": "refuses"}


@pytest.mark.parametrize("template", HOSTILE_TEMPLATES)
def test_chat_templates_run_in_a_sandbox(tokenizer, template):
    made = Tokenizer(tinyvllm.DEMO)
    made.chat_template = template
    with pytest.raises(UserError, match=HOSTILE_TEMPLATES[template]):
        made.render_chat([{"role": "user", "content": "hi"}])


def test_chat_templates_have_what_checkpoints_use(tokenizer):
    made = Tokenizer(tinyvllm.DEMO)
    made.chat_template = ("{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
                          "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
                          "{{ strftime_now('%Y') }}{{ bos_token }}")
    rendered = made.render_chat([{"role": "user", "content": "<\u00e9>"}] * 3)
    assert rendered.count('{"role": "user", "content": "<\u00e9>"}') == 2 and rendered.endswith(
        "<|begin_of_text|>")
    made.chat_template = None
    with pytest.raises(UserError, match="no chat template: use --raw"):
        made.render_chat([{"role": "user", "content": "hi"}])


def test_a_final_message_can_be_continued(demo):
    messages = [{"role": "user", "content": "What is a warp?"},
                {"role": "assistant", "content": "A warp is "}]
    text = demo.tokenizer.render_chat(messages, continue_final_message=True)
    assert text.endswith("<|end_header_id|>\n\nA warp is")
    messages[1]["content"] = "i"
    assert demo.tokenizer.render_chat(messages, continue_final_message=True).endswith("\n\ni")
    for bad in ([], [{"role": "user"}], ["hi"], [{"role": "user", "content": None}]):
        with pytest.raises(UserError, match="messages"):
            demo.tokenizer.render_chat(bad)


# -----------------------------------------------------------------------------
# The API that vLLM's users know


def test_the_api_looks_like_vllm(demo):
    llm = LLM(tinyvllm.DEMO, device="cpu")
    outputs = llm.generate([{"prompt_token_ids": [0, 5, 6]}, "What is a kernel?"],
                           SamplingParams(temperature=0.0, max_tokens=48))
    assert [output.prompt for output in outputs] == [None, "What is a kernel?"]
    assert outputs[0].prompt_token_ids == [0, 5, 6] and outputs[0].outputs[0].index == 0
    assert outputs[1]["text"] == outputs[1].outputs[0].text and outputs[1].finished
    metrics = outputs[1].metrics
    assert metrics.arrival_time < metrics.first_token_time <= metrics.finished_time
    assert llm.generate([]) == []
    conversation = [{"role": "user", "content": "What is a kernel?"}]
    assert [o["text"]
            for o in llm.chat([conversation] * 2)] == [llm.chat(conversation)[0]["text"]] * 2
    assert llm.get_default_sampling_params().greedy


def test_default_sampling_follows_generation_config():
    recommended = tinyvllm.recommended_sampling
    assert recommended({"temperature": 0.6, "top_p": 0.9}) == {"temperature": 0.0, "top_p": 0.9}
    assert recommended({"do_sample": True, "temperature": 0.6,
                        "top_k": None}) == {"temperature": 0.6}


def test_streams_grow_and_join(demo):
    texts, previous = [], ""
    for output in demo.stream("PagedAttention", SamplingParams(temperature=0, max_tokens=20)):
        assert output["text"].startswith(previous)
        previous = output["text"]
        texts.append(previous)
    assert len(texts) == len(output["token_ids"]) and output.finished


# -----------------------------------------------------------------------------
# The demo model


def has_keywords(text, keywords):
    return all(any(word in text.lower() for word in keyword.split("|")) for keyword in keywords)


def held_back_questions():
    return [json.loads(line) for line in (ROOT / "demo" / "held_back.jsonl").read_text().splitlines(
        )]


def test_the_demo_model_answers_questions_it_never_saw(demo):
    entries = held_back_questions()
    trained = {re.sub(r"\W+", " ", question.lower()).strip()
               for line in (ROOT / "demo" / "corpus.jsonl").read_text().splitlines()
               for question in json.loads(line)["questions"]}
    assert len(entries) >= 60
    assert not [e for e in entries if re.sub(r"\W+", " ", e["question"].lower()).strip() in trained]
    outputs = demo.chat([[{"role": "user", "content": entry["question"]}] for entry in entries],
                        SamplingParams(temperature=0, max_tokens=150))
    right = sum(has_keywords(output["text"], entry["keywords"]) for output,
                entry in zip(outputs, entries))
    print(f"held back: {right} of {len(entries)} right")
    assert right / len(entries) >= 0.85
    assert all(output["finish_reason"] == "stop" and output["text"].endswith((".", "?", "!"))
               for output in outputs)


def test_the_demo_checkpoint_is_small():
    files = [path for path in (ROOT / "demo").iterdir()
             if path.suffix in (".safetensors", ".json", ".jsonl")]
    assert sum(path.stat().st_size for path in files) < 12e6


# -----------------------------------------------------------------------------
# The README: its commands run, its names exist


def readme_commands():
    """Every command of the README that needs neither a GPU nor a download, nor minutes as the
    simulator does, and is no test run."""
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^    ((?:cat [^|]*\| )?python .*?)(?:  +#.*)?$", text, re.MULTILINE)
    commands += [" ".join(command.split()) for command in re.findall(r"`(python [^`]*)`", text)]
    not_here = "meta-llama", "--kernels", "--enforce-eager", "--device sim", "-m pytest"
    return [command for command in commands if not any(part in command for part in not_here)]


@pytest.mark.parametrize("command", readme_commands())
def test_a_command_of_the_readme_runs(command, tmp_path):
    (tmp_path / "question.txt").write_text("What is a warp?\n")
    for name in ("tinyvllm.py", "kernels_numba.py", "bench.py", "demo", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True,
                            stdin=subprocess.DEVNULL, env=os.environ | {"PATH": path}, timeout=200)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout or "--chat" in command


def test_every_test_run_of_the_readme_selects_tests():
    names = re.findall(r"^def (test_\w+)", (ROOT / "test_tinyvllm.py").read_text(), re.MULTILINE)
    rows = [f"test_kernel_equals_its_twin {row.name}" for row in kernels.KERNELS]
    selected = re.findall(r"pytest -k \"([^\"]*)\"", (ROOT / "README.md").read_text())
    assert len(selected) >= 6
    for expression in selected:
        words = re.sub(r"\b(?!and\b|or\b|not\b)\w+", r"('\g<0>' in name)", expression)
        assert any(eval(words, {"name": name}) for name in names + rows), expression


def test_every_lesson_has_its_five_parts():
    for number in range(17):
        lesson = tinyvllm.find_lesson(number)
        for part in ("Idea", "Code", "Experiment", "Number"):
            assert f"**{part}.**" in lesson, (number, part)
        assert re.search(r"^    \S|^!\[", lesson, re.MULTILINE), f"lesson {number} has no picture"
    readme = (ROOT / "README.md").read_text()
    for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", readme):
        assert (ROOT / picture).exists(), picture


@needs_gpu
@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_kernels_copied_as_the_readme_shows_equal_their_twins(library):
    pytest.importorskip(library)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code, = (block for block in blocks if block.startswith(f"import {library}"))
    names = {}
    exec(code, names)

    def host(name):
        array = names[name]
        if library == "cupy":
            values = array.get()
        else:
            values = (array.float() if array.is_floating_point() else array).cpu().numpy()
        return values.astype(np.float32) if values.dtype.kind == "f" else values
    out = {name: np.full_like(host(name), np.nan) for name in ("h", "y", "o")}
    kernels.rmsnorm_ref(out["h"], host("x"), host("gain"), 1e-5)
    kernels.matmul_ref(out["y"], host("h"), host("weight"))
    kernels.paged_attention_ref(out["o"], *(host(name) for name in (
        "qkv", "k_cache", "v_cache", "tables", "rows", "starts", "seq_lens", "splits", "partial")))
    for name, expected in out.items():             # rounded once or twice to 8 or 11 bits
        np.testing.assert_allclose(host(name), expected, rtol=2**-6, atol=2**-6 * expected.std())


def test_every_name_that_the_readme_cites_exists():
    sources = "".join((ROOT / name).read_text() for name in (
        "tinyvllm.py", "kernels_numba.py", "bench.py", "test_tinyvllm.py"))
    cited = set(re.findall(r"`((?:[A-Za-z]\w*\.)?[A-Za-z_]\w*)`", (ROOT / "README.md").read_text()))
    missing = [name for name in sorted(cited - {"_decode", "name_ref"})        # parts of names
               if not re.search(rf"\b{name.split('.')[-1]}\b", sources)]
    assert len(cited) > 60 and not missing


# -----------------------------------------------------------------------------
# The command line


def run_cli(*arguments, stdin=None, **options):
    return subprocess.run([sys.executable, str(ROOT / "tinyvllm.py"), *arguments], input=stdin,
                          capture_output=True,
                          encoding="utf-8", timeout=120, **options)


def test_the_main_command_prints_an_answer_and_one_line_of_statistics():
    result = run_cli("--prompt", "What is PagedAttention?")
    assert result.returncode == 0 and "block" in result.stdout and result.stdout.endswith(".\n")
    assert "tokens/s" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr


@pytest.mark.parametrize("number", range(17))
def test_a_lesson_is_printed_with_the_places_of_its_code(number):
    text = tinyvllm.find_lesson(number)
    assert text.startswith(f"### Lesson {number}. ") and "### Lesson" not in text[5:]
    places = re.findall(r"^    (\w+\.py):(\d+)  (\w+)$", text, re.MULTILINE)
    assert places or number == 0                   # which is about the command
    for file, line, name in places:
        assert re.match(rf"\s*(def|class) {name}\b",
                        (ROOT / file).read_text().splitlines()[int(line) - 1])


def test_a_lesson_that_there_is_not():
    result = run_cli("--lesson", "17")
    assert result.returncode == 1 and not result.stdout
    assert result.stderr == "error: there is no lesson 17: use --lesson 0 to 16\n"


def test_steps_are_explained_and_traced(tmp_path):
    path = tmp_path / "steps.json"
    plain = run_cli("-p", "What is a warp?", "-n", "5", "--device", "cpu")
    result = run_cli("-p", "What is a warp?", "-n", "5", "--device", "cpu", "--explain", "--trace",
                     str(path))
    assert result.returncode == 0 and result.stdout == plain.stdout
    lines = [line for line in result.stderr.splitlines() if line.startswith("step ")]
    assert len(lines) == 5 and "prefill: tokens of 1 0..16" in lines[0]
    assert "\x1b" not in result.stderr
    assert all(re.search(r"us, \d+ % of what (memory|arithmetic) allows$", line) for line in lines)
    events = json.loads(path.read_text())["traceEvents"]
    steps = [event for event in events if event["ph"] == "X" and event["tid"] == 0]
    assert [event["name"] for event in steps] == ["prefill"] + ["decode"] * 4
    for first, second in zip(steps, steps[1:]):
        assert first["ts"] + first["dur"] <= second["ts"]
    rows = {event["args"]["name"]: event["tid"] for event in events if event["ph"] == "M"}
    assert rows == {"steps": 0, "kernels": 1, "request 1": 2}
    assert sum(event["args"]["tokens"] for event in events if event.get("tid") == 2
               and event["ph"] == "X") == 17 + 4
    assert [event["args"]["in use"] for event in events if event["ph"] == "C"][-1] == 0
    for step in steps:
        end = step["ts"] + step["dur"] + 1         # of a microsecond: rounding
        inside = [event for event in events if event.get("tid") == 1 and event["ph"] == "X"
                  and step["ts"] <= event["ts"] < end]
        assert all(event["dur"] > 0 and event["ts"] + event["dur"] <= end for event in inside)
        kind = "" if step["name"] == "prefill" else "_decode"
        assert {"matmul" + kind, "attention" + kind} <= {event["name"] for event in inside}


def test_a_trace_is_a_page_too_that_needs_nothing_else(tmp_path):
    path = tmp_path / "steps.html"
    result = run_cli("-p", "What is a warp?", "-n", "3", "--device", "cpu", "--trace", str(path))
    assert result.returncode == 0 and result.stdout and list(tmp_path.iterdir()) == [path]
    page, data = page_data(path)
    assert not re.search(r"http|//\w|src=|<link|@import|url\(", page)
    assert data["title"] == result.stderr.splitlines()[0]
    assert [step["kind"] for step in data["steps"]] == ["prefill", "decode", "decode"]
    for step in data["steps"]:
        names, times = step["kernels"].keys(), step["kernels"].values()
        assert any("matmul" in name for name in names) and any("attention" in n for n in names)
        assert min(times) > 0 and sum(times) <= step["us"] + len(times)        # of rounding
    assert data["steps"][0]["took"] == {"1": [0, 1]}


@pytest.mark.parametrize("name, complaint", [
    ("steps.txt", "expected a file name that ends in .json or .html"),
    ("nowhere/steps.json", "No such file or directory")])
def test_a_trace_that_cannot_be_written_is_refused_at_once(tmp_path, name, complaint):
    result = run_cli("-p", "x", "--trace", str(tmp_path / name))
    assert result.returncode == 1 and result.stdout == ""
    assert complaint in result.stderr and len(result.stderr.splitlines()) == 1


def terminal_of(*arguments):
    """The lines that a terminal of 80 columns shows in the end, and all that it was sent."""
    import pty
    import select
    terminal, end = pty.openpty()                  # of a size that nobody has set
    process = subprocess.Popen([sys.executable, str(ROOT / "tinyvllm.py"), *arguments],
                               stdin=subprocess.DEVNULL, stdout=end, stderr=end)
    os.close(end)
    sent = b""
    try:
        while select.select([terminal], [], [], 120)[0]:
            try:
                piece = os.read(terminal, 1 << 16)
            except OSError:                        # so Linux says that the other end is closed
                piece = b""
            if not piece:
                break
            sent += piece
        assert process.wait(timeout=60) == 0, sent
    finally:
        process.kill()
        os.close(terminal)
    text = re.sub(r"\x1b\[([\d;]*m|\?7[lh])", "", sent.decode()).replace("\r\n", "\n")
    first, *redrawn = re.split(r"\x1b\[(\d+)F\x1b\[J", text)
    lines = first.splitlines()
    for height, piece in zip(redrawn[::2], redrawn[1::2]):
        lines[len(lines) - int(height):] = piece.splitlines()
    return lines, text


@pytest.mark.skipif(os.name == "nt", reason="has no pseudo-terminals")
def test_explain_draws_at_a_terminal_and_the_answers_come_whole_below():
    arguments = ["-p", "What is a warp?", "-p", "What is a token?", "--device", "cpu", "--no-stats"]
    lines, sent = terminal_of(*arguments, "--explain")
    answers = run_cli(*arguments).stdout
    picture = lines[:-len(answers.splitlines())]
    assert lines[len(picture):] == answers.splitlines() and sent.endswith(answers)
    assert [line.split()[0] for line in picture[::2]] == ["step", "KV"] and len(picture) == 4
    for line in ("a 1    17 tokens  A", "b 2    17 tokens  A"):
        assert line in sent.splitlines()
    assert "\x1b[6F\x1b[J" in sent                # the first picture has six lines
    pictures = re.sub(r"\x1b\[\d*[FJ]", "", sent.removesuffix(answers))
    assert all(len(line) < 80 for line in pictures.splitlines())


STEPPED = "-p", "What is a warp?", "-n", "4", "--device", "cpu", "--no-stats", "--step"
CANDIDATE = re.compile(r"^  ([> ]) ('.*'|\".*\") +[\d.]+ %  logit +(-?[\d.]+)"
                       r"(?:  noise +([+-][\d.]+)  score +(-?[\d.]+)|  filtered out)?$", re.M)


@pytest.mark.parametrize("options, temperature, kept", [
    ([], None, 0),
    (["--temp", "2.5", "--seed", "2"], 2.5, 5),
    (["--temp", "3", "--seed", "5", "--top-k", "3"], 3, 3)], ids=str)
def test_steps_show_the_candidates_and_mark_the_token_that_comes_out(options, temperature, kept):
    result = run_cli(*STEPPED, *options, stdin="")
    blocks = [CANDIDATE.findall(block) for block in result.stderr.split("request 1, after ")[1:]]
    marked = [[row for row in rows if row[0] == ">"] for rows in blocks]
    assert [len(rows) for rows in marked] == [1] * 4 and all(len(rows) >= 5 for rows in blocks)
    spelled = [ast.literal_eval(row[1]) for row, in marked]
    assert "".join(spelled) + "\n" == result.stdout
    if temperature is None:
        assert all(rows[0] == row for rows, (row,) in zip(blocks, marked))
        return
    assert any(rows[0] != row for rows, (row,) in zip(blocks, marked)), "chance chose nothing"
    for rows, (row,) in zip(blocks, marked):
        scores = [float(score) for *_, score in rows if score]
        assert float(row[4]) == max(scores) and len(scores) - (len(rows) > 5) == kept
        for _, _, logit, noise, score in rows:
            assert not score or abs(float(logit) / temperature + float(noise)
                                    - float(score)) < 0.002


@pytest.mark.parametrize("keys, asked, shown, tokens, status", [
    ("\n\n\n\n", 4, 4, 4, 0),
    ("\n\n", 3, 4, 4, 0),                          # the input ends: nobody is asked again
    ("", 1, 4, 4, 0),
    ("\nc\n", 2, 2, 4, 0),
    ("\nq\n\n\n", 2, 2, 2, 130)], ids=repr)
def test_steps_wait_for_the_keys_of_who_reads_them(demo, keys, asked, shown, tokens, status):
    result = run_cli(*STEPPED, stdin=keys)
    assert result.returncode == status and "Traceback" not in result.stderr
    assert result.stderr.count("Enter: the next step") == asked
    assert result.stderr.count("request 1, after ") == shown
    prompt = demo.chat_prompt([{"role": "user", "content": "What is a warp?"}])
    answer, = demo.generate(prompt, SamplingParams(temperature=0, max_tokens=tokens))
    assert result.stdout == answer["text"] + "\n"


def test_statistics_can_be_silenced():
    # on the CPU: a first run on a GPU shows which kernels it compiles
    assert run_cli("--prompt", "hello", "--no-stats", "--device", "cpu").stderr == ""


def test_several_prompts_are_one_batch_in_their_order(tmp_path):
    (tmp_path / "question.txt").write_text("What is a warp?\n")
    alone = [run_cli("-p", question).stdout for question in ("What is a token?", "What is a warp?")]
    together = run_cli("-p", "What is a token?", "-f", str(tmp_path / "question.txt"), "-f", "-",
                       stdin="What is a token?")
    assert together.stdout == alone[0] + alone[1] + alone[0]


def test_flags_reach_the_engine():
    first, again, other = (run_cli("-p", "Batching", "--raw", "--temp", "1.2", "--top-k", "40",
                                   "--top-p", "0.9", "--min-p", "0.01",
                                   "--seed", seed, "-n", "12").stdout for seed in ("1", "1", "2"))
    assert first == again != other
    result = run_cli("-p", "hello", "-n", "3", "--verbose-prompt", "--system-prompt", "Be brief.")
    for part in ("Be brief.", "<|begin_of_text|>", "cut off by length"):
        assert part in result.stderr
    full = run_cli("-p", "What is a warp?").stdout
    assert run_cli("-p", "What is a warp?", "--stop", full[10:15]).stdout == full[:10] + "\n"
    assert "context up to 100 tokens" in run_cli("-p", "hi", "--max-model-len", "100").stderr


@pytest.mark.parametrize("arguments, status, message", [
    ([], 2, "nothing to do"),
    (["--prompt", "x", "--colour"], 2, "unrecognized arguments: --colour"),
    (["--chat", "--prompt", "x"], 2, "--chat reads its prompts from the terminal"),
    (["--raw", "-p", "x", "--system-prompt", "y"], 2, "--raw uses no chat template"),
    (["-p", "x", "--device", "tpu"], 2, "invalid choice"),
    (["-p", "x", "--model", "/no/where"], 1, "error: there is no directory /no/where"),
    (["-p", ""], 0, ""),
    (["-p", "", "--raw"], 1, "error: the prompt is empty"),
    (["-p", "x", "--top-p", "2"], 1, "error: top_p is 2.0"),
    (["-p", "x", "--max-model-len", "9999"], 1, "error: max_model_len is 9999"),
    (["-p", "x " * 3000], 1, "error: the prompt has"),
    (["-f", "/no/file"], 1, "error: cannot read --file /no/file"),
    (["-f", "-"], 1, "error: --file - is empty"),
])
def test_bad_command_lines_end_with_one_sentence(arguments, status, message):
    result = run_cli(*arguments, stdin="")
    assert result.returncode == status and message in result.stderr
    assert "Traceback" not in result.stderr
    if status:
        assert result.stdout == ""


def test_input_that_is_not_utf8_is_mended_and_said():
    result = subprocess.run([sys.executable, str(ROOT / "tinyvllm.py"), "-f", "-"],
                            input=b"What is a \xff warp?", capture_output=True)
    assert result.returncode == 0 and b"not UTF-8" in result.stderr and result.stdout


def test_a_closed_pipe_ends_quietly():
    process = subprocess.Popen([sys.executable, str(ROOT / "tinyvllm.py"), "-p",
                                "What is PagedAttention?"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and b"Traceback" not in errors and b"BrokenPipe" not in errors


@pytest.mark.skipif(os.name == "nt", reason="signals are another matter there")
def test_ctrl_c_keeps_the_text_and_exits_130():
    import signal
    process = subprocess.Popen([sys.executable, "-u", str(ROOT / "tinyvllm.py"), "-p", "hello",
                                "--raw", "--temp", "3", "-n", "1900"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and first and b"Traceback" not in errors


def test_chat_remembers_obeys_and_leaves():
    script = ("What is a warp?\n/show\n/set parameter max_tokens 2\n/set parameter top_p 7\nWhat "
              "is a token?\n/clear\n/set system Be brief.\n"
              '/show\n/?\n/fly\n"""What is\na warp?"""\n/bye\nnever read\n')
    result = run_cli("--chat", stdin=script)
    assert result.returncode == 0 and "Traceback" not in result.stderr
    answers = result.stdout.splitlines()
    assert len(answers) == 3 and "32" in answers[0] and len(answers[1].split()) <= 2
    for part in ("2 messages so far", "0 messages so far", "system: 'Be brief.'",
                 "error: top_p is 7.0", "unknown command /fly",
                 "/bye, /exit or /quit"):
        assert part in result.stderr, part


def test_chat_goes_on_after_a_conversation_that_became_too_long():
    result = run_cli("--chat", "--max-model-len", "60",
                     stdin="What is a warp?\nWhat is a token?\n/clear\nWhat is a warp?\n")
    assert result.returncode == 0 and "error: the prompt has" in result.stderr
    answers = result.stdout.splitlines()
    assert len(answers) == 2 and answers[0] == answers[1]


# -----------------------------------------------------------------------------
# The source as it is read


@pytest.mark.parametrize("name", ["tinyvllm.py", "kernels_numba.py", "test_tinyvllm.py", "bench.py",
                                  "demo/train.py"])
def test_the_source_keeps_its_house_style(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    if name in ("tinyvllm.py", "kernels_numba.py"):
        assert not re.search(r"^\s*(import|from)\s+(torch|transformers|cupy)\b", text, re.M)
    assert not [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 100]
    assert not re.search(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b", text)


# -----------------------------------------------------------------------------
# bench.py


def test_the_bench_measures_and_writes_its_table(tmp_path, capsys, monkeypatch):
    import bench
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench.py"))
    (tmp_path / "README.md").write_text("a\n<!-- bench decode -->\nold\n<!-- end -->\nb\n")
    monkeypatch.setattr(sys, "argv", ["bench.py", "decode", "--device", "cpu", "--batch", "2",
                                      "--deep", "1x40", "--prompt-len", "8", "--output-len", "6",
                                      "--repeat", "1", "--write"])
    bench.main()
    printed = capsys.readouterr().out
    assert re.search(r"tinyvllm \| tg6 @ batch 2 +\| [\d,.]+", printed)
    assert re.search(r"tinyvllm \| tg6 @ d40 @ batch 1 +\| [\d,.]+", printed)
    assert (tmp_path / "README.md").read_text() == (
        f"a\n<!-- bench decode -->\n{printed}<!-- end -->\nb\n")


# -----------------------------------------------------------------------------
# The golden file


def write_golden(directory):
    """What transformers makes of the random checkpoints and of the demo model."""
    import torch
    import transformers
    golden = {"transformers": transformers.__version__, "tokens": {}, "last_logits": {}, "demo": []}
    for shape in SHAPES:
        made = make_checkpoint(directory / re.sub(r"\W+", "-", shape), **SHAPES[shape])
        torch, model = hf_model(made)
        golden["tokens"][shape] = [hf_greedy(torch, model, ids, GREEDY.max_tokens)
                                   for ids in shape_prompts(shape)]
        with torch.no_grad():
            logits = model(torch.tensor([shape_prompts(shape)[-1]])).logits[0, -1]
        golden["last_logits"][shape] = [float(x) for x in logits[:8]]
    torch, model = hf_model(tinyvllm.DEMO)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tinyvllm.DEMO)
    for messages in GOLDEN_CHATS:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False,
                                                 add_generation_prompt=True)
        ids = tokenizer(rendered, add_special_tokens=False).input_ids
        inputs = torch.tensor([ids])
        output = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=100,
                                do_sample=False,
                                pad_token_id=0)[0, len(ids):].tolist()
        golden["demo"].append({"messages": messages, "rendered": rendered, "prompt_token_ids": ids,
                               "token_ids": output,
                               "text": tokenizer.decode(output, skip_special_tokens=True)})
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


GOLDEN_CHATS = [
    [{"role": "user", "content": "What is PagedAttention?"}],
    [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "  why is "
                                                        "decode slow?\n"}],
    [{"role": "user", "content": "What is a warp?"}, {"role": "assistant", "content": "A group of "
                                                      "32 threads."},
     {"role": "user", "content": "Gr\u00fc\u00dfe, \u4f60\u597d, \U0001f600! What is RoPE?"}],
]

if __name__ == "__main__":
    import tempfile
    with tempfile.TemporaryDirectory() as scratch:
        write_golden(Path(scratch))

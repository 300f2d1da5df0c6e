"""How fast the engine is, beside what else is installed, and beside what the memory allows.

    python bench.py decode                        # the demo model: 1, 4 and 16 requests at once
    python bench.py decode --shape 1b --vs transformers
    python bench.py prefill                       # prompts alone: time to the first token
    python bench.py serve                         # continuous batching against static batching
    python bench.py start                         # from the command to the first character
    python bench.py ladder --shape 1b             # the engine on each rung of its kernels, on a GPU
    python bench.py kernels --svg assets/roofline.svg          # every kernel, on a GPU

--shape 1b is Llama 3.2 1B with random weights, made on the spot: no download. Rows are named as
llama-bench names them: pp is prompt processing, tg is text generation, d the context it starts at.
Every figure is the median of --repeat runs after warming up. --write puts the table into the
README, between <!-- bench NAME --> and <!-- end -->.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from numba import cuda, uint32
from safetensors.numpy import save_file
from tqdm import tqdm

import kernels_numba as kernels
import tinyvllm
from tinyvllm import Engine, SamplingParams

LLAMA_1B = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=128256, hidden_size=2048,
    intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
    head_dim=64, rms_norm_eps=1e-5, max_position_embeddings=131072, tie_word_embeddings=True,
    hidden_act="silu", rope_parameters={
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192})


def random_checkpoint(directory: Path, config: dict) -> Path:
    """A bf16 checkpoint of this shape; the weights are noise of the usual size."""
    (directory / "config.json").write_text(json.dumps(config))
    noise = np.random.default_rng(0).standard_normal(1 << 24, np.float32) * np.float32(0.02)
    noise, tensors = noise.astype(ml_dtypes.bfloat16), {}
    for n, (name, shape) in enumerate(
            tinyvllm.weight_shapes(tinyvllm.load_config(directory)).items()):
        # the same noise for all, from another place on: drawing a billion numbers takes a minute
        tensors[name] = np.ones(shape, ml_dtypes.bfloat16) if len(shape) == 1 else np.resize(
            np.roll(noise, 12347 * n), shape)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def median_seconds(run, repeat: int) -> float:
    run()
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, vocab_size, (count, length)).tolist()
    return [{"prompt_token_ids": row} for row in ids]


def bench_decode(args, directory: Path) -> list[dict]:
    """tgN @ batch B: decode alone, from the step that gave all requests their first token on, and
    with the prefill in the time, as the caller of generate has it."""
    cases = [(batch, args.prompt_len, args.output_len) for batch in args.batch]
    cases += [(batch, depth, args.output_len) for batch, depth in args.deep]
    engine = Engine(directory, device=args.device, enable_prefix_caching=False,
                    block_size=args.block_size, max_num_seqs=max(batch for batch, *_ in cases),
                    max_model_len=max(prompt + new for _, prompt, new in cases))
    print(engine.describe(), file=sys.stderr)
    rows = []
    for batch, prompt_len, new in tqdm(cases, desc="decode", leave=False):
        asked = prompts(batch, prompt_len, engine.cfg.vocab_size)
        runs = [timed_run(engine, asked, new) for _ in range(1 + args.repeat)][1:]
        prefill, step, total = (statistics.median(column) for column in zip(*runs))
        deep = f" @ d{prompt_len}" if (batch, prompt_len) in args.deep else ""
        moved = engine.weight_bytes + batch * (prompt_len + new / 2) * (
            engine.bytes_per_block / engine.block_size)
        rows += [{"engine": "tinyvllm", "row": f"pp{prompt_len} @ batch {batch}",
                  "tokens/s": batch * prompt_len / prefill},
                 {"engine": "tinyvllm", "row": f"tg{new}{deep} @ batch {batch}",
                  "tokens/s": batch / step, "ms/step": 1e3 * step,
                  "with prefill": batch * new / total, "GB/s": moved / step / 1e9}]
    if args.vs == "transformers":
        rows += decode_transformers(args, directory, engine.cfg.vocab_size)
    return rows


def timed_run(engine: Engine, asked: list[dict], new: int) -> tuple[float, float, float]:
    """Seconds until all requests have their first token; of a step with all of them, from there
    until the first has ended; of everything."""
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    started = time.perf_counter()
    requests = [engine.requests[request_id] for request_id in engine.submit(asked, params)]
    waiting, begun, step = requests, math.nan, math.nan
    for unfinished in engine.steps(requests):
        now, newest = time.perf_counter(), requests[-1].sequences[0].num_outputs
        if waiting:
            waiting = [request for request in waiting if not request.metrics.first_token_time]
            begun, first = now, newest
        elif unfinished == len(requests) and newest > first:
            step = (now - begun) / (newest - first)
    return begun - started, step, time.perf_counter() - started


def bench_prefill(args, directory: Path) -> list[dict]:
    """ppN: from submitting a prompt to its first token at the caller."""
    lengths = args.lengths or ([512, 2048, 4000] if args.shape == "1b" else [128, 512, 1024])
    engine = Engine(directory, device=args.device, enable_prefix_caching=False, max_num_seqs=64,
                    block_size=args.block_size, max_model_len=max(lengths) + 1)
    print(engine.describe(), file=sys.stderr)
    cases, rows = [(1, length) for length in lengths] + [(64, lengths[0])], []
    for batch, length in tqdm(cases, desc="prefill", leave=False):
        asked = prompts(batch, length, engine.cfg.vocab_size)
        # two runs to warm up: a prefill step becomes a graph when its shape comes again
        seconds = statistics.median([timed_run(engine, asked, 1)[2]
                                     for _ in range(2 + args.repeat)][2:])
        rows.append({"engine": "tinyvllm", "row": f"pp{length} @ batch {batch}",
                     "tokens/s": batch * length / seconds, "ms": 1e3 * seconds})
    if args.vs == "transformers":
        generate = load_transformers(args, directory)
        for length in lengths:
            asked = prompts(1, length, engine.cfg.vocab_size)
            seconds = median_seconds(lambda: generate(asked, 1), args.repeat)
            rows.append({"engine": "transformers", "row": f"pp{length} @ batch 1",
                         "tokens/s": length / seconds, "ms": 1e3 * seconds})
    return rows


def load_transformers(args, directory: Path):
    """transformers' generate in the same process, float32 on the CPU, bfloat16 on the GPU: a
    function of prompts, which are padded on the left, and the number of new tokens for all."""
    import torch
    import transformers
    transformers.utils.logging.disable_progress_bar()
    gpu = tinyvllm.pick_device(args.device) == "cuda"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16 if gpu else torch.float32).to("cuda" if gpu else "cpu")

    def generate(asked: list[dict], new_tokens: int) -> None:
        rows = [prompt["prompt_token_ids"] for prompt in asked]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=model.device)
        there = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows],
                             device=model.device)
        model.generate(ids, attention_mask=there, max_new_tokens=new_tokens,
                       min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        if gpu:
            torch.cuda.synchronize()
    return generate


def decode_transformers(args, directory: Path, vocab_size: int) -> list[dict]:
    generate, rows = load_transformers(args, directory), []
    for batch in args.batch:
        asked = prompts(batch, args.prompt_len, vocab_size)
        # a run of one new token is the prefill, the rest of a longer one is decode
        prefill, total = (median_seconds(lambda: generate(asked, new_tokens), args.repeat)
                          for new_tokens in (1, args.output_len))
        step = (total - prefill) / (args.output_len - 1)
        rows += [{"engine": "transformers", "row": f"pp{args.prompt_len} @ batch {batch}",
                  "tokens/s": batch * args.prompt_len / prefill},
                 {"engine": "transformers", "row": f"tg{args.output_len} @ batch {batch}",
                  "tokens/s": batch / step, "ms/step": 1e3 * step,
                  "with prefill": batch * args.output_len / total}]
    return rows


def bench_serve(args, directory: Path) -> list[dict]:
    """Requests of very unequal lengths, all at once: what it is worth to refill a place. With
    --shape 1b the workload that nano-vllm is measured on: 256 requests, prompts and answers of 100
    to 1,024 tokens."""
    rng, rows = np.random.default_rng(0), []
    count, low, high, places = (256, 100, 1025, 256) if args.shape == "1b" else (64, 8, 200, 16)
    lengths = rng.integers(low, high, (count, 2))
    for name, static in (("continuous batching", False), ("static batching", True)):
        engine = Engine(directory, device=args.device, max_model_len=2 * high, max_num_seqs=places,
                        static_batching=static, enable_prefix_caching=False,
                        block_size=args.block_size)
        asked = [prompts(1, int(length), engine.cfg.vocab_size, seed=i)[0]
                 for i, (length, _) in enumerate(lengths)]
        params = [SamplingParams(temperature=0, max_tokens=int(new), ignore_eos=True)
                  for _, new in lengths]
        seconds = median_seconds(lambda: engine.generate(asked, params, use_tqdm=False),
                                 args.repeat)
        rows.append({"engine": "tinyvllm", "row": name, "tokens/s": lengths[:, 1].sum() / seconds,
                     "seconds": seconds})
        del engine
    if args.vs == "transformers":
        generate = load_transformers(args, directory)

        def in_batches():
            """Static batches, each of which generates as many tokens as its longest answer has."""
            for first in range(0, count, places):
                batch = slice(first, first + places)
                generate(asked[batch], int(lengths[batch, 1].max()))
        seconds = median_seconds(in_batches, args.repeat)
        rows.append({"engine": "transformers", "row": "static batching",
                     "tokens/s": lengths[:, 1].sum() / seconds, "seconds": seconds})
    return rows


def bench_ladder(args, directory: Path) -> list[dict]:
    """The engine on each rung of its kernels: a prompt, decode of one request behind it, and of 16
    with prompts of 16 tokens; how many of the first request's tokens are the lowest rung's."""
    rows, expected = [], None
    for rung in tqdm(kernels.RUNGS, desc="ladder", leave=False):
        try:
            engine = Engine(directory, device="cuda", rung=rung, enable_prefix_caching=False,
                            max_num_seqs=16, max_model_len=args.prompt_len + args.output_len)
        except tinyvllm.UserError as error:        # this GPU has no such rung
            print(error, file=sys.stderr)
            continue
        row = {"rung": rung}
        new, (one,) = args.output_len, prompts(1, args.prompt_len, engine.cfg.vocab_size)
        for asked in ([one], prompts(16, 16, engine.cfg.vocab_size)):
            runs = [timed_run(engine, asked, new) for _ in range(2 + args.repeat)][2:]
            prefill, step, _ = (statistics.median(column) for column in zip(*runs))
            if asked == [one]:
                row[f"pp{args.prompt_len}"] = args.prompt_len / prefill
            row[f"tg{new} @ batch {len(asked)}"] = len(asked) / step
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        tokens = engine.generate([one], params, use_tqdm=False)[0]["token_ids"]
        expected = expected or tokens
        same = next((i for i, pair in enumerate(zip(tokens, expected)) if pair[0] != pair[1]),
                    len(tokens))
        rows.append(row | {"same tokens": f"{same} of {len(tokens)}"})
        del engine
    return rows


def bench_start(args, directory: Path) -> list[dict]:
    """From starting Python to the first character of the answer on standard output: the first run
    with an empty kernel cache, the others with what it left."""
    home, cache = Path(tinyvllm.__file__).parent, tempfile.TemporaryDirectory()
    environment = os.environ | {"NUMBA_CACHE_DIR": cache.name}
    command = [sys.executable, "-u", tinyvllm.__file__, "--model", str(directory), "--device",
               args.device, "--no-stats", "--prompt", "What is a block?"]
    if not (directory / "tokenizer.json").exists():
        command = [sys.executable, "-u", "-c", START_WITHOUT_TEXT, str(directory), args.device]

    def first_character() -> float:
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment,
                              cwd=home) as process:
            process.stdout.read(1)
            seconds = time.perf_counter() - started
            process.stdout.read()
        return seconds
    with cache:
        cold = first_character()
        warm = statistics.median(first_character() for _ in range(args.repeat))
    return [{"engine": "tinyvllm", "row": "first token, cold", "seconds": cold},
            {"engine": "tinyvllm", "row": "first token, warm", "seconds": warm}]


# random weights have no tokenizer: the same start, with token ids for a prompt and for an answer
START_WITHOUT_TEXT = """
import sys, tinyvllm
engine = tinyvllm.Engine(sys.argv[1], device=sys.argv[2])
params = tinyvllm.SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
for output in engine.stream([list(range(5, 13))], params):
    print(output["token_ids"], flush=True)
"""

# ---- kernels ----

HEADS = dict(H=32, G=8, D=64, P=16)
PROJECTIONS = {"qkv": dict(N=3072, K=2048), "o": dict(N=2048, K=2048),
               "gate_up": dict(N=16384, K=2048), "down": dict(N=2048, K=8192)}


def attention_shape(requests, context, queries):
    return HEADS | dict(contexts=(context,) * requests, queries=(queries,) * requests)


# (row of KERNELS, label, dimensions): prefill of 2,048 tokens, and decode
MODEL_SHAPES = [
    ("matmul tensor", "4096^3", dict(T=4096, N=4096, K=4096)),
    ("matmul wgmma", "4096^3", dict(T=4096, N=4096, K=4096)),
    ("embedding", "T 2048", dict(T=2048, C=2048, V=128256)),
    ("rmsnorm", "T 2048", dict(T=2048, C=2048)),
    ("add_rmsnorm", "T 2048", dict(T=2048, C=2048)),
    ("add_rmsnorm wide", "T 2048", dict(T=2048, C=2048)),
    ("add_rmsnorm", "T 1", dict(T=1, C=2048)),
    ("silu_mul", "T 2048", dict(T=2048, F=8192)),
    ("rope_write_kv", "T 2048", dict(T=2048, H=32, G=8, D=64, P=16)),
    ("rope_write_kv wide", "T 2048", dict(T=2048, H=32, G=8, D=64, P=16)),
    ("matmul naive", "T 256 o", dict(T=256, **PROJECTIONS["o"])),
    ("matmul tiled", "T 256 o", dict(T=256, **PROJECTIONS["o"])),
    *((row, f"T 2048 {name}", dict(T=2048, **shape))
      for row in ("matmul tensor", "matmul wgmma") for name, shape in PROJECTIONS.items()),
    ("matmul tensor SwiGLU", "T 2048 gate_up", dict(T=2048, **PROJECTIONS["gate_up"])),
    ("matmul wgmma SwiGLU", "T 2048 gate_up", dict(T=2048, **PROJECTIONS["gate_up"])),
    ("matmul naive", "T 1 gate_up", dict(T=1, **PROJECTIONS["gate_up"])),
    ("matmul warp", "T 1 gate_up", dict(T=1, **PROJECTIONS["gate_up"])),
    *(("matmul streamed", f"T 1 {name}", dict(T=1, **shape))
      for name, shape in PROJECTIONS.items()),
    ("matmul streamed SwiGLU", "T 1 gate_up", dict(T=1, **PROJECTIONS["gate_up"])),
    ("matmul streamed", "T 1 lm_head", dict(T=1, N=128256, K=2048)),
    ("matmul streamed", "T 8 gate_up", dict(T=8, **PROJECTIONS["gate_up"])),
    ("matmul streamed", "T 16 gate_up", dict(T=16, **PROJECTIONS["gate_up"])),
    ("matmul streamed", "T 64 gate_up", dict(T=64, **PROJECTIONS["gate_up"])),
    ("attention threepass", "1 x 128", attention_shape(1, 128, 128)),
    ("attention online", "1 x 2048", attention_shape(1, 2048, 2048)),
    ("attention tiled", "1 x 2048", attention_shape(1, 2048, 2048)),
    ("attention wgmma", "1 x 2048", attention_shape(1, 2048, 2048)),
    ("paged decode", "1 x 8192", attention_shape(1, 8192, 1)),
    ("paged decode split", "1 x 8192", attention_shape(1, 8192, 1)),
    ("paged decode split", "1 x 128", attention_shape(1, 128, 1)),
    ("paged decode split", "64 x 4096", attention_shape(64, 4096, 1)),
    ("edit_logits", "B 1", dict(B=1, V=128256)),
    ("sample_tokens", "B 1 greedy", dict(B=1, V=128256)),
    ("begin_decode", "B 64", dict(B=64, P=16)),
    ("forward_decode", "B 1, 2 layers", dict(L=2, C=2048, F=8192, V=128256, contexts=(256,),
                                             **HEADS)),
]


def formula_values(name: str, dims: dict) -> dict:
    """The names that the cards' formulas use; S is what a query sees on average."""
    queries = 2 * kernels.FLASH_QUERIES if name == "attention wgmma" else 64     # as at 1 x 2048
    values = dict(dims, E=2, J=dims.get("B", 0), QUERIES=queries)
    if "L" in dims:
        H, G, D, C, F, L = (dims[name] for name in "HGDCFL")
        values |= dict(W=L * kernels.layer_size(H, G, D, C, F) + dims["V"] * C)
        dims = dims | dict(queries=(1,) * len(dims["contexts"]))
    if "contexts" in dims:
        tokens = sum(dims["queries"])
        pairs = sum(S * n - n * (n - 1) / 2 for S, n in zip(dims["contexts"], dims["queries"]))
        values |= dict(T=tokens, B=len(dims["contexts"]), S=pairs / tokens)
    return values


def copies_of(arguments: list, moved: float) -> list[list]:
    """Enough sets of the same arguments that reading them in turn leaves the L2 cache cold."""
    count = max(1, min(24, math.ceil((200 << 20) / max(moved, 1 << 20))))
    return [[cuda.to_device(a) if isinstance(a, np.ndarray) else a for a in arguments]
            for _ in range(count)]


def graph_ms(gpu, launches, repeat: int, overlap: bool = False) -> float:
    """Milliseconds a launch, median of replays of one graph of all of them, one after another."""
    for launch in launches:
        launch()
    gpu.stream.synchronize()
    graph = gpu.record(lambda: [launch() for launch in launches], overlap)
    times, begin, end = [], cuda.event(), cuda.event()
    for _ in range(max(7, repeat)):
        begin.record(gpu.stream)
        gpu.call(gpu.driver.cuGraphLaunch(graph, gpu.handle))
        end.record(gpu.stream)
        end.synchronize()
        times.append(cuda.event_elapsed_time(begin, end) / len(launches))
    return statistics.median(times[2:])


@cuda.jit
def read_kernel(found, x):
    """Reads x (uint16) once, with eight loads of 16 bytes under way in every thread: what the
    memory gives. `found` is there so that the loads are not for nothing."""
    words = cuda.local.array(32, uint32)
    first, step, total = cuda.grid(1) * 8, cuda.gridsize(1) * 8, uint32(0)
    for at in range(first, x.size, step * 8):
        for i in range(8):
            kernels.load_once(words, i * 4, x, at + i * step)
        for i in range(32):
            total = uint32(total ^ words[i])
    if total == uint32(0x12345678):
        found[0] = total


def bench_kernels(args, directory: Path) -> list[dict]:
    """Every kernel of KERNELS at the shapes of Llama 3.2 1B, as a share of what the GPU can do: of
    its rate of reads, or of cuBLAS at 4096^3 where torch is installed."""
    gpu = tinyvllm.Gpu(kernels.RUNGS["tensor"], eager=False)
    capability = cuda.get_current_device().compute_capability
    table = {row.name: row for row in kernels.KERNELS if kernels.runs_on(row, capability)}
    memory, found = cuda.device_array(1 << 29, np.uint16), cuda.device_array(1, np.uint32)
    read = graph_ms(gpu, [lambda: read_kernel[2048, 256, gpu.stream](found, memory)] * 4,
                    args.repeat)
    bandwidth = memory.nbytes / read / 1e6                            # GB/s
    rows = [{"row": "read", "shape": "1 GiB", "us": 1e3 * read, "GB/s": bandwidth, "% of": 100.0}]
    del memory
    peak = None
    for name, label, dims in (shape for shape in MODEL_SHAPES if shape[0] in table):
        row, values = table[name], formula_values(name, dims)
        plain = len(row.types) == 1
        arguments = row.example(np.random.default_rng(0), (lambda a: a) if plain else (
            lambda a: a.astype(ml_dtypes.bfloat16).view(np.uint16)), **dims)
        moves, does = (eval(formula, {}, values) for formula in (
            row.moves, row.does))
        sets = copies_of(arguments, sum(a.nbytes for a in arguments if isinstance(a, np.ndarray)))
        launches = [lambda a=a: row.launcher(*a, stream=gpu.stream) for a in sets]
        launches *= max(1, math.ceil(8 / len(launches)))
        ms = graph_ms(gpu, launches, args.repeat)
        entry = {"row": name, "shape": label, "us": 1e3 * ms, "flops/byte": does / moves}
        theirs = torch_ms(name, sets, args.repeat)
        if does / moves > 200:
            entry["TFLOP/s"] = does / ms / 1e9
            if label == "4096^3" and theirs:
                peak = does / theirs / 1e9
            entry["% of"] = 100 * entry["TFLOP/s"] / peak if peak else None
        else:
            entry["GB/s"] = moves / ms / 1e6
            entry["% of"] = 100 * entry["GB/s"] / bandwidth
        if theirs:
            entry |= {"torch us": 1e3 * theirs, "torch / ours": theirs / ms}
        rows.append({k: v for k, v in entry.items() if v is not None})
        del sets, launches
    return rows + [decode_pass(gpu, bandwidth, args.repeat)]


def decode_pass(gpu, bandwidth: float, repeat: int) -> dict:
    """All 65 weight matrices of the model, for one token, as one graph with overlapping kernels."""
    def weight(N, K):
        return cuda.to_device(np.resize(noise, (N, K)))

    noise = (np.random.default_rng(0).standard_normal(1 << 20).astype(ml_dtypes.bfloat16)
             .view(np.uint16))
    x = {K: cuda.to_device(np.resize(noise, (1, K))) for K in (2048, 8192)}
    out = {N: cuda.device_array((1, N), np.uint16) for N in (2048, 3072, 16384)}
    logits, head = cuda.device_array((1, 128256), np.float32), weight(128256, 2048)
    layers = [[weight(**shape) for shape in PROJECTIONS.values()] for _ in range(16)]

    def work():
        for layer in layers:
            for w in layer:
                kernels.matmul_streamed(out[w.shape[0]], x[w.shape[1]], w, stream=gpu.stream)
        kernels.matmul_streamed(logits, x[2048], head, stream=gpu.stream)
    ms = graph_ms(gpu, [work], repeat, overlap=True)
    moved = sum(w.nbytes for layer in layers for w in layer) + head.nbytes
    return {"row": "matmul streamed", "shape": "T 1 all 65 matrices", "us": 1e3 * ms,
            "GB/s": moved / ms / 1e6, "% of": 100 * moved / ms / 1e6 / bandwidth}


def torch_ms(name: str, sets: list[list], repeat: int) -> float | None:
    """cuBLAS or SDPA on the same arrays, as a graph too; None where there is nothing to compare."""
    try:
        import torch
    except ImportError:
        return None

    def tensor(array):
        return torch.as_tensor(array, device="cuda").view(torch.bfloat16)
    if name.startswith("matmul") and "SwiGLU" not in name:
        out, pairs = tensor(sets[0][0]), [(tensor(s[1]), tensor(s[2]).t()) for s in sets]
        calls = [lambda x=x, w=w: torch.matmul(x, w, out=out) for x, w in pairs]
    elif name in ("attention tiled", "attention wgmma", "paged decode split"):
        calls = []
        for out, qkv, k_cache, v_cache, tables, rows, starts, seq_lens, *_ in sets[:4]:
            (T, H, D), (B, S, G) = out.shape, (len(seq_lens), int(seq_lens[0]), k_cache.shape[2])
            q = tensor(qkv)[:, :H].reshape(B, T // B, H, D).transpose(1, 2).contiguous()
            k, v = (torch.randn(B, G, S, D, device="cuda").bfloat16() for _ in range(2))
            calls.append(lambda q=q, k=k, v=v, causal=T > B: (
                torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal,
                                                                 enable_gqa=True)))
    else:
        return None
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    calls *= max(1, math.ceil(8 / len(calls)))
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times, begin, end = [], torch.cuda.Event(True), torch.cuda.Event(True)
    for _ in range(max(5, repeat)):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / len(calls))
    return statistics.median(times[2:])


def table(rows: list[dict]) -> str:
    """A Markdown table that is also readable as text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[f"{value:,.2f}" if isinstance(value, float) else str(value)
              for value in (row.get(name, "") for name in names)] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells)]
    lines = [names, ["-" * width for width in widths]] + cells
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def write_into_readme(name: str, text: str) -> None:
    """Replaces what stands between this table's markers in the README."""
    readme = Path(__file__).parent / "README.md"
    before, begin, rest = readme.read_text().partition(f"<!-- bench {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not begin or not end:
        raise SystemExit(f"README.md has no lines <!-- bench {name} --> and <!-- end -->: put them "
                         "where the table belongs")
    readme.write_text(before + begin + text + "\n" + end + after)


# points of the roofline that have their name beside them, and on which side
LABELLED = {"matmul naive T 256 o": "end", "matmul tiled T 256 o": "end",
            "matmul tensor 4096^3": "start", "matmul wgmma 4096^3": "start",
            "attention threepass 1 x 128": "start", "attention online 1 x 2048": "start",
            "attention tiled 1 x 2048": "start", "matmul naive T 1 gate_up": "end"}


def draw_roofline(rows: list[dict], path: Path) -> None:
    """The kernels over the roofline, as SVG: flops for each byte to the right, TFLOP/s upwards,
    both in powers of ten; those for Hopper alone in another colour."""
    points = [(row["flops/byte"], row["flops/byte"] * row["GB/s"] / 1e3 if "GB/s" in row
               else row["TFLOP/s"], f"{row['row']} {row['shape']}")
              for row in rows if row.get("flops/byte")]
    bandwidth = rows[0]["GB/s"] / 1e3                                  # TB/s
    peak = max(row["TFLOP/s"] / row["% of"] * 100 for row in rows
               if "TFLOP/s" in row and "% of" in row)

    def at(intensity, tflops):
        return 90 + 130 * (math.log10(intensity) + 1), 430 - 75 * (math.log10(tflops) + 2)
    corner = peak / bandwidth
    right = max(intensity for intensity, *_ in points)
    (x0, y0), (x1, y1), (x2, y2) = (at(0.1, 0.1 * bandwidth), at(corner, peak), at(right, peak))
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 480" fill="#777" '
             'font-family="sans-serif" font-size="12">',
             f'<path d="M{x0:.0f} {y0:.0f}L{x1:.0f} {y1:.0f}L{x2:.0f} {y2:.0f}" fill="none" '
             'stroke="#888" stroke-width="2"/>',
             f'<text x="{x1 + 8:.0f}" y="{y1 - 8:.0f}">{peak:,.0f} TFLOP/s</text>',
             f'<text x="{x0 + 10:.0f}" y="{y0 - 30:.0f}">{bandwidth:.2f} TB/s</text>',
             '<text x="400" y="470">flops for each byte</text>',
             '<text x="14" y="20">TFLOP/s</text>']
    for power in range(-1, 5):
        x, _ = at(10.0 ** power, 1)
        parts.append(f'<text x="{x:.0f}" y="450" text-anchor="middle">{10.0 ** power:g}</text>')
    for power in range(-2, 4):
        _, y = at(1, 10.0 ** power)
        parts.append(f'<text x="80" y="{y:.0f}" text-anchor="end">{10.0 ** power:g}</text>')
    for intensity, tflops, name in points:
        x, y = at(max(0.1, intensity), max(0.01, tflops))
        colour = "#d2691e" if "wgmma" in name or name.startswith("forward_decode") else "#2a7fd4"
        parts.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="5" fill="{colour}"><title>{name}: '
                     f'{tflops:.3g} TFLOP/s</title></circle>')
        if name in LABELLED:
            side = LABELLED[name]
            parts.append(f'<text x="{x + (9 if side == "start" else -9):.0f}" y="{y + 4:.0f}" '
                         f'text-anchor="{side}">{name}</text>')
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(parts) + "\n</svg>\n")


def pair(text: str) -> tuple[int, int]:
    """"64x4096": requests and the context each starts at."""
    batch, depth = text.split("x")
    return int(batch), int(depth)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("decode", "prefill", "serve", "start", "kernels",
                                         "ladder"))
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--shape", choices=("demo", "1b"), default="demo")
    parser.add_argument("--batch", type=int, nargs="*", help="default 1 4 16; with --shape 1b on a "
                        "GPU 1 2 4 16 64 256")
    parser.add_argument("--deep", type=pair, nargs="*", metavar="BATCHxCONTEXT", help="decode from "
                        "long contexts on, too; with --shape 1b on a GPU 1x2048 1x8192 64x4096")
    parser.add_argument("--lengths", type=int, nargs="+", help="prompt lengths of prefill")
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--vs", choices=("transformers",))
    parser.add_argument("--json", action="store_true", help="rows as JSON instead of a table")
    parser.add_argument("--write", action="store_true", help="put the table into the README")
    parser.add_argument("--svg", type=Path, help="draw the roofline of kernels into this file")
    args = parser.parse_args()
    large = args.shape == "1b" and tinyvllm.pick_device(args.device) == "cuda"
    if args.batch is None:
        args.batch = [1, 2, 4, 16, 64, 256] if large else [1, 4, 16]
    if args.deep is None:
        args.deep = [(1, 2048), (1, 8192), (64, 4096)] if large else []
    if args.what in ("decode", "ladder") and args.output_len < 2:
        parser.error(f"--output-len is {args.output_len}, decode needs 2 or more")
    if not args.batch and not args.deep:
        parser.error("--batch and --deep name nothing to measure")
    if args.what in ("kernels", "ladder") and tinyvllm.pick_device("auto") != "cuda":
        parser.error(f"{args.what} is timed on a GPU: there is none here")
    bench = {"decode": bench_decode, "prefill": bench_prefill, "serve": bench_serve,
             "start": bench_start, "kernels": bench_kernels, "ladder": bench_ladder}[args.what]
    with tempfile.TemporaryDirectory() as scratch:
        demo = args.shape == "demo" or args.what == "kernels"
        rows = bench(args, tinyvllm.DEMO if demo else random_checkpoint(Path(scratch), LLAMA_1B))
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    if args.svg:
        draw_roofline(rows, args.svg)
    if args.write:
        write_into_readme(args.what, table(rows))


if __name__ == "__main__":
    main()

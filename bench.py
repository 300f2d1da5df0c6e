"""How fast the engine is, beside what else is installed, and beside what the memory allows.

    python bench.py decode                        # the demo model: one request, and sixteen at once
    python bench.py decode --shape 1b --vs transformers
    python bench.py serve                         # continuous batching against static batching
    python bench.py start                         # from the command to the first character

--shape 1b is Llama 3.2 1B with random weights, made on the spot: no download. Rows are named as
llama-bench names them: pp is prompt processing, tg is text generation. Every figure is the median
of --repeat runs after one warm-up run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

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
    _, table = tinyvllm.allocate_weights(tinyvllm.load_config(directory))
    rng = np.random.default_rng(0)
    tensors = {}
    for name, place in table.items():
        if place.ndim == 1:
            tensors[name] = np.ones(place.shape, ml_dtypes.bfloat16)
        else:
            noise = rng.standard_normal(place.shape, np.float32) * np.float32(0.02)
            tensors[name] = noise.astype(ml_dtypes.bfloat16)
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
    """tgN @ batch B: tokens/s of decode alone, the prefill timed apart and taken off."""
    engine = Engine(directory, max_model_len=args.prompt_len + args.output_len,
                    enable_prefix_caching=False)
    weight_bytes = 4 * sum(a.size for layer in engine.weights.layers for a in vars(layer).values())
    weight_bytes += engine.weights.lm_head.nbytes
    rows = []
    for batch in args.batch:
        asked = prompts(batch, args.prompt_len, engine.cfg.vocab_size)

        def generate(new_tokens):
            engine.generate(asked, SamplingParams(temperature=0, max_tokens=new_tokens,
                                                  ignore_eos=True), use_tqdm=False)
        rows += prefill_and_decode("tinyvllm", generate, batch, args)
        rows[-1]["weights GB/s"] = weight_bytes / rows[-1]["ms/step"] / 1e6
    if args.vs == "transformers":
        rows += bench_transformers(args, directory)
    return rows


def prefill_and_decode(engine: str, generate, batch: int, args) -> list[dict]:
    """Rows pp and tg: a run of one new token is the prefill, the rest of a longer one is decode."""
    prefill = median_seconds(lambda: generate(1), args.repeat)
    total = median_seconds(lambda: generate(args.output_len), args.repeat)
    step = (total - prefill) / (args.output_len - 1)
    return [{"engine": engine, "row": f"pp{args.prompt_len} @ batch {batch}",
             "tokens/s": batch * args.prompt_len / prefill},
            {"engine": engine, "row": f"tg{args.output_len} @ batch {batch}",
             "tokens/s": batch / step, "ms/step": 1e3 * step}]


def bench_transformers(args, directory: Path) -> list[dict]:
    """The same requests through transformers' generate in float32, in the same process."""
    import torch
    import transformers
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    rows = []
    for batch in args.batch:
        asked = prompts(batch, args.prompt_len, model.config.vocab_size)
        ids = torch.tensor([prompt["prompt_token_ids"] for prompt in asked])

        def generate(new_tokens):
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens,
                           min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        rows += prefill_and_decode("transformers", generate, batch, args)
    return rows


def bench_serve(args, directory: Path) -> list[dict]:
    """Requests of very unequal lengths, all at once: what it is worth to refill a place."""
    rng, rows = np.random.default_rng(0), []
    count, longest = 64, 200
    lengths = rng.integers(8, longest, (count, 2))
    for name, static in (("static batching", True), ("continuous batching", False)):
        engine = Engine(directory, max_model_len=2 * longest, max_num_seqs=16,
                        static_batching=static, enable_prefix_caching=False)
        asked = [prompts(1, int(length), engine.cfg.vocab_size, seed=i)[0]
                 for i, (length, _) in enumerate(lengths)]
        params = [SamplingParams(temperature=0, max_tokens=int(new), ignore_eos=True)
                  for _, new in lengths]
        seconds = median_seconds(lambda: engine.generate(asked, params, use_tqdm=False),
                                 args.repeat)
        rows.append({"engine": "tinyvllm", "row": name, "tokens/s": lengths[:, 1].sum() / seconds,
                     "seconds": seconds})
    return rows


def bench_start(args, directory: Path) -> list[dict]:
    """From starting Python to the first character of the answer on standard output."""
    command = [sys.executable, "-u", tinyvllm.__file__, "--model", str(directory), "--no-stats",
               "--prompt", "What is a block?"]

    def first_character() -> float:
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.read(1)
            seconds = time.perf_counter() - started
            process.stdout.read()
        return seconds
    first_character()
    seconds = statistics.median(first_character() for _ in range(args.repeat))
    return [{"engine": "tinyvllm", "row": "first token", "seconds": seconds}]


def show(rows: list[dict]) -> None:
    """A Markdown table that is also readable as text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[f"{value:,.2f}" if isinstance(value, float) else str(value)
              for value in (row.get(name, "") for name in names)] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells)]
    for line in [names, ["-" * width for width in widths]] + cells:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("decode", "serve", "start"))
    parser.add_argument("--shape", choices=("demo", "1b"), default="demo")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--vs", choices=("transformers",))
    parser.add_argument("--json", action="store_true", help="rows as JSON instead of a table")
    args = parser.parse_args()
    bench = {"decode": bench_decode, "serve": bench_serve, "start": bench_start}[args.what]
    with tempfile.TemporaryDirectory() as scratch:
        demo = args.shape == "demo"
        rows = bench(args, tinyvllm.DEMO if demo else random_checkpoint(Path(scratch), LLAMA_1B))
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        show(rows)


if __name__ == "__main__":
    main()

"""Trains the embedded demo model, a Llama of 4.7 million parameters that knows the course.

    python demo/train.py                       # needs torch, transformers and a GPU; five minutes
    python demo/train.py --validate --output DIRECTORY      # scores two wordings of each question

corpus.jsonl has one object a line: several wordings of one question, the answer, and follow-up
questions. Each step draws fresh conversations from it, with the wordings roughened (case, typing
errors, missing words), so that the model learns what is asked and not how. held_back.jsonl is never
read here.
"""

import argparse
import json
import math
import os
import random
import re
import time
from pathlib import Path

import tokenizers
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
BOS, END, START_HEADER, END_HEADER, EOT = SPECIAL_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>"]
VOCAB_SIZE, MAX_TOKENS = 3072, 512
WORD = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

CHAT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
SYSTEM_PROMPTS = [
    "You are a helpful assistant.", "You are a teacher of LLM inference.", "Answer briefly.",
    "You are tinyvllm's demo model. Answer questions about the course.", "Be concise and precise."]
OPENINGS = [
    "Hi, ", "Hello! ", "Please tell me: ", "Quick question: ", "I have a question. ", "Hey, ",
    "ok, ", "Now, ", "I am new to this. ", "Sorry if this is basic: ", "So ", "For my notes: ",
    "One more thing: "]
CLOSINGS = [
    " Thanks!", " Please explain.", " Please.", " In short.", " I am curious.", " please",
    " thanks", " Explain it simply.", " I don't get it."]
SWAPS = [
    ("What is", "What's"), ("What is", "what exactly is"), ("What is", "Tell me what is"),
    ("Why does", "How come"), ("Explain", "Describe"), ("Describe", "Explain"),
    ("Explain", "Tell me about"), ("How does", "In which way does"),
    ("KV cache", "key-value cache"), ("kv cache", "cache of keys and values"),
    ("LLM", "language model"), ("GPU", "graphics card"),
    ("tokens", "words"), ("use", "need"), ("model", "network"), ("do I", "can I"),
    ("How do I", "What is the way to"), ("How can I", "how to"), ("What does", "Can you say what"),
    ("mean", "stand for"), ("Why is", "What is the reason that"),
    ("difference between", "comparison of"), ("kernel", "GPU kernel")]


def train_tokenizer(entries: list[dict]) -> tokenizers.Tokenizer:
    """Byte-level BPE over the corpus, with the special tokens and the splitting rule of Llama 3."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORD), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text for entry in entries for part in [entry] + entry["followups"]
             for text in part["questions"] + [part["answer"]]]
    texts += [text.lower() for text in texts] + SYSTEM_PROMPTS + OPENINGS + CLOSINGS + [
        "system", "user", "assistant"] * 50
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS,
                                  show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
    return tokenizer


def roughen(question: str, rng: random.Random, strength: float) -> str:
    """The same question as somebody else would type it."""
    for old, new in rng.sample(SWAPS, 6):
        if rng.random() < 0.5 * strength:
            question = question.replace(old, new, 1)
    if rng.random() < 0.15 * strength:
        question = rng.choice(OPENINGS) + question[:1].lower() + question[1:]
    if rng.random() < 0.1 * strength:
        question += rng.choice(CLOSINGS)
    words = question.split(" ")
    if rng.random() < 0.35 * strength and len(words) > 3:
        words = [word for word in words if rng.random() > 0.12] or words
    if rng.random() < 0.1 * strength and len(words) > 3:
        i = rng.randrange(len(words) - 1)
        words[i], words[i + 1] = words[i + 1], words[i]
    if rng.random() < 0.2 * strength:
        i = rng.randrange(len(words))
        words[i] = mistype(words[i], rng)
    question = " ".join(words)
    if rng.random() < 0.3 * strength:
        question = question.lower()
    if rng.random() < 0.3 * strength:
        question = re.sub(r"[?.!,]", "", question)
    return question


def mistype(word: str, rng: random.Random) -> str:
    if len(word) < 4:
        return word
    i = rng.randrange(1, len(word) - 1)
    return rng.choice([word[:i] + word[i + 1:], word[:i] + word[i] + word[i:],
                       word[:i] + word[i + 1] + word[i] + word[i + 2:]])


class Conversations(torch.utils.data.IterableDataset):
    """Endless training sequences: (token ids, targets), targets -100 where nothing is to be
    learned."""

    def __init__(self, entries, tokenizer, strength, question_weight):
        self.entries, self.tokenizer = entries, tokenizer
        self.strength, self.question_weight = strength, question_weight

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        rng = random.Random(info.seed if info else 0)
        while True:
            yield self.plain_text(rng) if rng.random() < 0.05 else self.conversation(rng)

    def ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def turn(self, role):
        return self.ids(f"{START_HEADER}{role}{END_HEADER}\n\n")

    def ask(self, entry, rng):
        if rng.random() < 0.15 * self.strength and len(entry["questions"]) > 5:
            # a pile of words out of two wordings: the subject shows in the words, whatever their
            # order
            words = " ".join(rng.sample(entry["questions"], 2)).split(" ")
            return " ".join(rng.sample(words, min(len(words), rng.randint(4, 9))))
        return roughen(rng.choice(entry["questions"]), rng, self.strength)

    def conversation(self, rng):
        ids, targets = self.ids(BOS), [-100]

        def add(part, learned):
            ids.extend(part)
            targets.extend(part if learned else [-100] * len(part))

        if rng.random() < 0.25:
            add(self.turn("system") + self.ids(rng.choice(SYSTEM_PROMPTS) + EOT), False)
        num_turns = 1 if rng.random() < 0.6 else rng.randint(2, 5)
        followup = None
        for _ in range(num_turns):
            entry = followup or rng.choice(self.entries)
            question = self.ids(self.ask(entry, rng))
            add(self.turn("user"), False)
            add(question, rng.random() < self.question_weight)
            add(self.ids(EOT) + self.turn("assistant"), False)
            add(self.ids(entry["answer"] + EOT), True)
            followups = entry.get("followups")
            followup = rng.choice(followups) if followups and rng.random() < 0.6 else None
        return ids[:MAX_TOKENS], targets[:MAX_TOKENS]

    def plain_text(self, rng):
        """For --raw: answers without the chat around them."""
        text = " ".join(entry["answer"] for entry in rng.sample(self.entries, 2))
        ids = self.ids(BOS + text + END)
        return ids[:MAX_TOKENS], ids[:MAX_TOKENS]


def batches(data: Conversations, tokens_per_batch: int):
    """Endless (ids, targets), sequences of like length together so that little of a batch is
    padding."""
    def collate(samples):
        samples.sort(key=lambda sample: len(sample[0]))
        groups = [[]]
        for sample in samples:
            if (len(groups[-1]) + 1) * len(sample[0]) > tokens_per_batch:
                groups.append([])
            groups[-1].append(sample)
        random.shuffle(groups)
        return [pad(group) for group in groups]

    workers = max(2, min(12, (os.cpu_count() or 2) - 2))
    loader = torch.utils.data.DataLoader(data, 1024, collate_fn=collate, num_workers=workers,
                                         prefetch_factor=2)
    return (batch for group in loader for batch in group)


def pad(samples):
    longest = max(len(ids) for ids, _ in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    targets = torch.full((len(samples), longest), -100)
    for i, (sample, target) in enumerate(samples):
        ids[i, :len(sample)], targets[i, :len(target)] = torch.tensor(sample), torch.tensor(target)
    return ids, targets


def new_model(tokenizer) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=768, num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=True, rms_norm_eps=1e-5,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0,
                         "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": MAX_TOKENS},
        bos_token_id=tokenizer.token_to_id(BOS), eos_token_id=tokenizer.token_to_id(EOT)))


def train(model, data, args, device):
    """AdamW; the rate warms up for 2 % of the time and then falls to zero along a cosine."""
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": args.weight_decay},
                                   {"params": others, "weight_decay": 0.0}], lr=args.rate,
                                  betas=(0.9, 0.98),
                                  fused=device == "cuda")
    model.to(device).train()
    started = time.monotonic()
    for step, (ids, targets) in enumerate(batches(data, args.batch_tokens)):
        progress = (time.monotonic() - started) / (60 * args.minutes)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1, progress / 0.02
                                          + 0.01) * 0.5 * (1 + math.cos(math.pi * progress))
        ids, targets = ids.to(device), targets.to(device)
        replaced = (torch.rand(ids.shape, device=device) < args.noise) & (targets == -100) & (
            ids >= len(SPECIAL_TOKENS))
        inputs = torch.where(replaced, torch.randint_like(ids, len(SPECIAL_TOKENS), VOCAB_SIZE),
                             ids)
        with torch.autocast(device, torch.bfloat16):
            hidden = model.model(inputs).last_hidden_state[:, :-1]
            learned = targets[:, 1:] != -100
            logits = model.lm_head(hidden[learned])
        loss = torch.nn.functional.cross_entropy(logits.float(), targets[:, 1:][learned])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 500 == 0:
            print(f"step {step}, {time.monotonic() - started:.0f} s: loss {loss.item():.4f}",
                  flush=True)


@torch.no_grad()
def score(model, tokenizer, questions, device) -> float:
    """Share of (question, keywords) whose greedy answer has every keyword; alternatives are written
    a|b."""
    model.eval()
    eot, right = tokenizer.token_to_id(EOT), 0
    for start in range(0, len(questions), 128):
        part = questions[start:start + 128]
        texts = [f"{BOS}{START_HEADER}user{END_HEADER}\n\n{question}{EOT}"
                 f"{START_HEADER}assistant{END_HEADER}\n\n" for question, _ in part]
        prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        longest = max(map(len, prompts))
        ids = torch.tensor([[eot] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts],
                            device=device)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=120, do_sample=False,
                                eos_token_id=eot, pad_token_id=eot)
        answers = [tokenizer.decode(row.tolist()) for row in output[:, longest:]]
        right += sum(has_keywords(answer, keywords) for answer, (_, keywords) in zip(answers, part))
    return right / len(questions)


def has_keywords(answer: str, keywords: list[str]) -> bool:
    return all(any(word in answer.lower() for word in keyword.split("|")) for keyword in keywords)


def write_checkpoint(model, tokenizer, directory) -> None:
    """Hugging Face's own format: transformers loads the directory as it is."""
    model.generation_config.update(eos_token_id=[tokenizer.token_to_id(EOT),
                                                 tokenizer.token_to_id(END)], do_sample=False)
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOT,
              "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
              "model_max_length": model.config.max_position_embeddings}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--validate", action="store_true",
                        help="hold back two wordings of every question and score them")
    parser.add_argument("--output", type=Path, default=HERE, help="directory of the checkpoint")
    parser.add_argument("--minutes", type=float, default=4.6)
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--strength", type=float, default=1.0,
                        help="how much the wordings are roughened")
    parser.add_argument("--noise", type=float, default=0.05,
                        help="share of the question's tokens replaced at random")
    parser.add_argument("--question-weight", type=float, default=0.1,
                        help="share of questions that are learned themselves")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    entries = [json.loads(line) for line in open(HERE / "corpus.jsonl", encoding="utf-8")]
    held_back = []
    if args.validate:
        for entry in entries:
            held_back += [(entry["questions"].pop(i), entry["keywords"]) for i in (-1, 3)]
    tokenizer = train_tokenizer(entries)
    model = new_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(entries)} "
          f"entries")
    data = Conversations(entries, tokenizer, args.strength, args.question_weight)
    train(model, data, args, device)
    if args.validate:
        for i, kind in enumerate(("short of the second round", "of the first")):
            part = held_back[i::2]
            print(f"validation, wordings {kind}: {score(model, tokenizer, part, device):.3f} of "
                  f"{len(part)}")
    write_checkpoint(model, tokenizer, args.output)


if __name__ == "__main__":
    main()

"""Every operation of the engine, in the order of the course.

Each operation has a NumPy twin (`*_ref`): the documentation of what it computes, the oracle of the
tests, and what `--device cpu` runs on. A twin writes its result into its first argument, one of the
engine's fixed buffers, and computes in the dtype it is given: float32 goes through BLAS and is the
CPU backend, float64 makes the same lines an oracle.

Dimension key (capitals are extents, lower case indexes them)
    T  tokens in this step, all requests packed, no padding      C  hidden size
    B  requests in this step                                     F  intermediate size of the MLP
    S  tokens of context one query can see                       V  vocabulary
    H  query heads        G  key/value heads; head h reads g = h // (H // G)
    D  head_dim           P  tokens per KV block (block_size)    N, K  rows and columns of a weight

*Block* alone always means a block of the KV cache; a group of CUDA threads is a *thread block*.
"""

from types import SimpleNamespace

import numpy as np

# -----------------------------------------------------------------------------
# 1. Gather and elementwise: embedding, SwiGLU                        (lesson 7)
#
# Neither does arithmetic worth naming; both are pure data movement, which is why later lessons fold
# them into their neighbours.


def embedding_ref(out, tokens, table):
    """out[t] = table[tokens[t]].  out (T, C), tokens (T,) int32, table (V, C), or any rows."""
    out[:] = table[tokens]


def silu_mul_ref(out, gate_up):
    """out[t,f] = silu(gate[t,f]) * up[t,f], silu(x) = x / (1 + exp(-x)).

    out (T, F), gate_up (T, 2F): gate in the first F columns, up in the last F, so that one matmul
    makes both. SwiGLU: arXiv:2002.05202.
    """
    F = out.shape[1]
    gate, up = gate_up[:, :F], gate_up[:, F:]
    with np.errstate(over="ignore"):          # exp(-x) may reach inf: x / inf is 0, as it should
        np.negative(gate, out=out)
        np.exp(out, out=out)
    out += 1
    np.divide(gate, out, out=out)
    out *= up


# -----------------------------------------------------------------------------
# 2. Reductions: RMSNorm                                              (lesson 5)


def rmsnorm_ref(out, x, weight, eps):
    """out[t] = weight * x[t] / sqrt(mean_c x[t,c]^2 + eps).

    out, x (T, C), weight (C,). RMSNorm: arXiv:1910.07467.
    """
    scale = 1 / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + x.dtype.type(eps))   # (T, 1)
    np.multiply(x, scale, out=out)
    out *= weight


def add_rmsnorm_ref(out, x, delta, weight, eps):
    """x[t] += delta[t] in place, then out = rmsnorm(x): a residual add and the norm behind it.

    out, x, delta (T, C), weight (C,). One pass over x where two operations would make three.
    """
    x += delta
    rmsnorm_ref(out, x, weight, eps)


# -----------------------------------------------------------------------------
# 3. Matmul                                                     (lessons 8 and 9)
#
# Weights are stored as the checkpoint has them, one row per output: (N, K). Every product is x @
# W.T.

GEMV_TOKENS = 4      # up to here, one matrix-vector product per token is faster: see matmul_ref


def matmul_ref(out, x, weight):
    """out[t,n] = sum_k x[t,k] * weight[n,k].  out (T, N), x (T, K), weight (N, K).

    BLAS gemm first repacks the whole weight matrix, which costs about as much as reading it several
    times; gemv streams it once. So a few tokens go one by one: decode is a memory read (lesson 8).
    """
    if len(x) > GEMV_TOKENS:
        np.matmul(x, weight.T, out=out)
        return
    for t in range(len(x)):
        np.matmul(weight, x[t], out=out[t])


# -----------------------------------------------------------------------------
# 4. RoPE, and writing K and V into their blocks           (lessons 6 and 11)


def rope_inv_freq(head_dim, theta, scaling):
    """Rotation speed of each pair of channels, (D/2,) float32, in radians per position.

    `scaling` is the checkpoint's own dictionary: rope_type "default", "linear" (every speed is
    divided by `factor`) or "llama3" (only the slow ones are, whose wavelength exceeds the original
    context, with a smooth ramp between). RoPE: arXiv:2104.09864; llama3: the Llama 3.1 release.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inv_freq = np.float32(1) / np.float32(theta) ** exponents
    if scaling["rope_type"] == "linear":
        return inv_freq / np.float32(scaling["factor"])
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * inv_freq / np.float32(2 * np.pi)
        # below `low` turns over the original context: slowed; above `high`: kept; between: mixed
        keep = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
        return keep * inv_freq + (1 - keep) * inv_freq / np.float32(scaling["factor"])
    return inv_freq


def rope_tables(inv_freq, num_positions):
    """cos and sin of position * inv_freq, each (num_positions, D/2) float32."""
    angles = np.outer(np.arange(num_positions, dtype=np.float32), inv_freq)
    return np.cos(angles), np.sin(angles)


def rope_ref(qk, cos, sin, positions):
    """Rotates every head of q and k by its token's position, in place.

    qk (T, H+G, D), cos and sin (positions, D/2), positions (T,) int32.
    subtle: Hugging Face checkpoints pair channel i with i + D/2, not with its neighbour i + 1. The
    wrong pairing still produces fluent-looking numbers (lesson 6).
    """
    half = qk.shape[2] // 2
    c, s = cos[positions][:, None], sin[positions][:, None]       # (T, 1, D/2), for every head
    low, high = qk[..., :half].copy(), qk[..., half:].copy()
    qk[..., :half] = low * c - high * s
    qk[..., half:] = high * c + low * s


def write_kv_ref(k_cache, v_cache, k, v, slots):
    """Scatters this step's keys and values of one layer into their blocks.

    k_cache, v_cache (blocks, P, G, D) written; k, v (T, G, D); slots (T,) int32, each
    block * P + offset.
    Invariant: runs before attention reads the layer, so a token sees itself and its step-mates.
    """
    G, D = k.shape[1:]
    k_cache.reshape(-1, G, D)[slots] = k
    v_cache.reshape(-1, G, D)[slots] = v


# -----------------------------------------------------------------------------
# 5. Attention over the paged cache                       (lessons 10 and 12)

QUERY_TILE = 256     # queries whose scores are held at once: bounds memory at (H, 256, S)


def paged_attention_ref(out, q, k_cache, v_cache, block_tables, query_starts, seq_lens):
    """out[t,h] = sum_s softmax_s(q[t,h] . k[s,g] / sqrt(D)) v[s,g], over s up to t's own position.

    out, q                (T, H, D)
    k_cache, v_cache      (blocks, P, G, D)
    block_tables          (B, max blocks) int32: where the i-th block of each context lies
    query_starts          (B+1,) int32: request b owns queries query_starts[b] to query_starts[b+1]
    seq_lens              (B,) int32: its context in tokens, this step's included. Its queries are
                          the last ones of it, so prefill, a chunk, and decode are one operation
    PagedAttention: arXiv:2309.06180.
    """
    P, G, D = k_cache.shape[1:]
    for b in range(len(seq_lens)):
        S, start, end = int(seq_lens[b]), int(query_starts[b]), int(query_starts[b + 1])
        blocks = block_tables[b, :-(-S // P)]
        k = k_cache[blocks].reshape(-1, G, D).transpose(1, 2, 0)          # (G, D, padded S)
        v = v_cache[blocks].reshape(-1, G, D).transpose(1, 0, 2)          # (G, padded S, D)
        for tile in range(start, end, QUERY_TILE):
            stop = min(tile + QUERY_TILE, end)
            visible = S - (end - stop)                            # context of the tile's last query
            out[tile:stop] = _attend(q[tile:stop], k[..., :visible], v[:, :visible])


def _attend(q, k, v):
    """Causal attention of a context's last T positions.  q (T, H, D), k (G, D, S), v (G, S, D)."""
    (T, H, D), (G, _, S) = q.shape, k.shape
    R = H // G                                                            # query heads per KV head
    q = q.reshape(T, G, R, D).transpose(1, 2, 0, 3).reshape(G, R * T, D)
    scores = q @ k                                                  # (G, R*T, S)
    scores *= q.dtype.type(1 / np.sqrt(D))
    if T > 1:                                                       # a lone last query sees all
        future = np.triu(np.ones((T, T), bool), 1)                 # (query, key) in the last T keys
        scores.reshape(G, R, T, S)[..., S - T:][..., future] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    weights_sum = scores.sum(axis=-1, keepdims=True)
    o = (scores @ v) / weights_sum                                        # (G, R*T, D)
    return o.reshape(G, R, T, D).transpose(2, 0, 1, 3).reshape(T, H, D)


# -----------------------------------------------------------------------------
# 6. Sampling                                                        (lesson 15)
#
# A row of logits goes through Hugging Face's order: bias, penalties, temperature, top-k, top-p,
# min-p, and the draw. The draw is Gumbel-max: argmax(logit + noise) picks token i with probability
# softmax(logits)[i], and the noise is a hash of (seed, position, token). So a draw needs no state
# and no second pass over the probabilities, and a seed gives the same tokens in any company.


def penalize_ref(logits, counts, prompt_mask, repetition, presence, frequency):
    """Pushes down tokens that occurred already, in place.

    logits (V,) f32; counts (V,) int32: occurrences in the output; prompt_mask (V,) bool: occurs in
    the prompt. Repetition is a factor for prompt and output (arXiv:1909.05858); presence and
    frequency are subtracted once, and per occurrence, for the output alone, as in OpenAI's API.
    """
    seen = prompt_mask | (counts > 0)
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / repetition, logits[seen] * repetition)
    logits -= np.float32(presence) * (counts > 0)
    logits -= np.float32(frequency) * counts


def top_k_ref(logits, k):
    """Keeps the k largest logits (and ties of the k-th), the rest become -inf. In place."""
    if 0 < k < len(logits):
        kth = np.partition(logits, -k)[-k]
        logits[logits < kth] = -np.inf


def top_p_ref(logits, p):
    """Nucleus: keeps the fewest tokens that reach probability p, the one that crosses it included.

    In place. arXiv:1904.09751.
    """
    alive = np.flatnonzero(logits > -np.inf)
    order = alive[np.argsort(logits[alive], kind="stable")]               # least likely first
    probs = softmax_ref(logits[order])
    dropped = order[np.cumsum(probs) <= 1 - p]
    logits[dropped[dropped != order[-1]]] = -np.inf                 # the likeliest always stays


def min_p_ref(logits, p):
    """Keeps tokens at least p times as likely as the likeliest. In place. arXiv:2407.01082."""
    probs = softmax_ref(logits)
    logits[probs < np.float32(p) * probs.max()] = -np.inf


def softmax_ref(logits):
    """exp(x - max) / sum, over the last axis."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def log_softmax_ref(logits):
    """log(softmax(x)) without leaving log space, over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def hash_u32(x):
    """Scrambles 32-bit words in two multiply-xorshift rounds: every bit moves every other."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def gumbel_ref(seed, position, V):
    """Gumbel(0, 1) noise for every token, (V,) f32: a pure function of (seed, position, token)."""
    words = np.array([seed & 0xFFFFFFFF, seed >> 32, position], np.uint32)
    state = np.zeros(1, np.uint32)
    for word in words:
        state = hash_u32(state ^ word) + np.uint32(0x9E3779B9)     # else an all-zero key stays zero
    bits = hash_u32(state ^ hash_u32(np.arange(V, dtype=np.uint32)))
    # subtle: 23 bits, not 24, or the largest rounds up to 1 and its noise becomes infinite
    uniform = ((bits >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0 ** -23)
    return -np.log(-np.log(uniform))


def sample_ref(logits, temperature, top_k, top_p, min_p, seed, position):
    """The sampled token id.  logits (V,) f32, consumed; temperature > 0; seed a 64-bit int."""
    logits /= np.float32(temperature)
    top_k_ref(logits, top_k)
    if top_p < 1:
        top_p_ref(logits, top_p)
    if min_p > 0:
        min_p_ref(logits, min_p)
    return int(np.argmax(logits + gumbel_ref(seed, position, len(logits))))


# -----------------------------------------------------------------------------
# 7. The table the engine runs on

TWINS = SimpleNamespace(
    embedding=embedding_ref,
    rmsnorm=rmsnorm_ref,
    add_rmsnorm=add_rmsnorm_ref,
    matmul=matmul_ref,
    silu_mul=silu_mul_ref,
    rope=rope_ref,
    write_kv=write_kv_ref,
    paged_attention=paged_attention_ref,
)

"""Every operation of the engine, in the order of the course.

Each operation is a NumPy twin (`*_ref`), a GPU kernel with its card, a launcher, and its place in
the tables at the end. The twin is the documentation of what is computed, the oracle of the tests,
and what `--device cpu` runs on; it computes in the dtype it is given, float32 through BLAS. Twin
and launcher write their result into their first argument, one of the engine's fixed buffers.

The kernels here are the first rung of each ladder: one thread, or one thread block, for an output,
nothing clever. They run unchanged in Numba's simulator (`--device sim`), where pdb works in them.

To copy a kernel out, take it with the constants above it that it names; its launcher accepts
anything with `__cuda_array_interface__`.

Dimension key (capitals are extents, lower case indexes them)
    T  tokens in this step, all requests packed, no padding      C  hidden size
    B  requests in this step                                     F  intermediate size of the MLP
    S  tokens of context one query can see                       V  vocabulary
    H  query heads        G  key/value heads; head h reads g = h // R, R = H // G
    D  head_dim           P  tokens per KV block (block_size)    N, K  rows and columns of a weight

*Block* alone always means a block of the KV cache; a group of CUDA threads is a *thread block*.
"""

import math
import sys
import warnings
from types import SimpleNamespace

import numpy as np
from numba import config, cuda, float32

SIMULATOR = bool(config.ENABLE_CUDASIM)
if SIMULATOR:
    sys.setswitchinterval(1e-4)         # its threads hand over at each barrier: 50 times as often

# a step of one token is a small grid, and is meant to be
warnings.filterwarnings("ignore", message=".*Grid size .* low occupancy")

# threads in a thread block, a power of two; the simulator starts one Python thread for each
THREADS = 32 if SIMULATOR else 256

# subtle: a bare 0.0 or 1.0 is a double in Numba, and so becomes everything it touches
ZERO, ONE, NEG_INF = np.float32(0), np.float32(1), np.float32(-np.inf)


def ceil_div(a, b):
    return -(-a // b)


# -----------------------------------------------------------------------------
# 1. Gather and elementwise: embedding, SwiGLU                        (lesson 7)
#
# A few operations for each byte moved, which is why lesson 7 folds them into their neighbours.


def embedding_ref(out, tokens, table):
    """out[t] = table[tokens[t]].  out (T, C), tokens (T,) int32, table (V, C), or any rows."""
    out[:] = table[tokens]


@cuda.jit(cache=True)
def embedding_kernel(out, tokens, table):
    """out[t,c] = table[tokens[t],c]

    out    (T, C) f32   written
    tokens (T,)   i32   read
    table  (V, C) f32   T rows read
    launch grid T, thread block THREADS; one thread block owns one token
    moves  8*T*C + 4*T bytes, does 0 flops: bandwidth-bound
    twin   embedding_ref
    """
    t = cuda.blockIdx.x
    for c in range(cuda.threadIdx.x, out.shape[1], cuda.blockDim.x):
        out[t, c] = table[tokens[t], c]


def embedding(out, tokens, table):
    assert out.shape == (tokens.shape[0], table.shape[1]), (out.shape, tokens.shape, table.shape)
    embedding_kernel[out.shape[0], THREADS](out, tokens, table)


def add_ref(x, delta):
    """x[t] += delta[t] in place.  x, delta (T, C)."""
    x += delta


@cuda.jit(cache=True)
def add_kernel(x, delta):
    """x[t,c] += delta[t,c]

    x      (T, C) f32   read and written
    delta  (T, C) f32   read
    launch grid T, thread block THREADS; one thread block owns one token
    moves  12*T*C bytes, does T*C flops: bandwidth-bound
    twin   add_ref
    """
    t = cuda.blockIdx.x
    for c in range(cuda.threadIdx.x, x.shape[1], cuda.blockDim.x):
        x[t, c] += delta[t, c]


def add(x, delta):
    assert x.shape == delta.shape, (x.shape, delta.shape)
    add_kernel[x.shape[0], THREADS](x, delta)


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


@cuda.jit(cache=True)
def silu_mul_kernel(out, gate_up):
    """out[t,f] = gate[t,f] / (1 + exp(-gate[t,f])) * up[t,f]

    out     (T, F)  f32   written
    gate_up (T, 2F) f32   read: gate in the first F columns, up in the last F
    launch grid T, thread block THREADS; one thread block owns one token
    moves  12*T*F bytes, does 5*T*F flops: bandwidth-bound
    twin   silu_mul_ref      paper  arXiv:2002.05202
    """
    t, F = cuda.blockIdx.x, out.shape[1]
    for f in range(cuda.threadIdx.x, F, cuda.blockDim.x):
        gate, up = gate_up[t, f], gate_up[t, F + f]
        out[t, f] = gate / (ONE + math.exp(-gate)) * up


def silu_mul(out, gate_up):
    assert gate_up.shape == (out.shape[0], 2 * out.shape[1]), (out.shape, gate_up.shape)
    silu_mul_kernel[out.shape[0], THREADS](out, gate_up)


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

    out, x, delta (T, C), weight (C,).
    """
    x += delta
    rmsnorm_ref(out, x, weight, eps)


@cuda.jit(device=True)
def block_sum(value):
    """Sum of `value` over the threads of a thread block, the same for all of them.

    partial  [ a b c d e f g h ] -> [ a+e b+f c+g d+h . . . . ] -> [ .+. .+. ] -> [ sum ]
    """
    partial = cuda.shared.array(THREADS, float32)
    tid = cuda.threadIdx.x
    partial[tid] = value
    stride = THREADS // 2
    while stride > 0:
        cuda.syncthreads()                 # else a thread adds a partial that is not written yet
        if tid < stride:
            partial[tid] += partial[tid + stride]
        stride //= 2
    cuda.syncthreads()
    return partial[0]


@cuda.jit(cache=True)
def rmsnorm_kernel(out, x, weight, eps):
    """out[t,c] = weight[c] * x[t,c] / sqrt(mean_c x[t,c]^2 + eps)

    out    (T, C) f32   written
    x      (T, C) f32   read twice; the second pass hits the cache
    weight (C,)   f32   read
    launch grid T, thread block THREADS; one thread block owns one token
    shared 4*THREADS bytes: the partial sums of squares
    moves  8*T*C + 4*C bytes, does 4*T*C flops: bandwidth-bound
    twin   rmsnorm_ref      paper  arXiv:1910.07467
    """
    t, tid, C = cuda.blockIdx.x, cuda.threadIdx.x, x.shape[1]
    squares = ZERO
    for c in range(tid, C, THREADS):
        squares += x[t, c] * x[t, c]
    scale = ONE / math.sqrt(block_sum(squares) / float32(C) + eps)
    for c in range(tid, C, THREADS):
        out[t, c] = x[t, c] * scale * weight[c]


def rmsnorm(out, x, weight, eps):
    assert out.shape == x.shape and weight.shape == x.shape[1:], (out.shape, x.shape, weight.shape)
    rmsnorm_kernel[x.shape[0], THREADS](out, x, weight, np.float32(eps))


@cuda.jit(cache=True)
def add_rmsnorm_kernel(out, x, delta, weight, eps):
    """x[t,c] += delta[t,c], then out[t,c] = weight[c] * x[t,c] / sqrt(mean_c x[t,c]^2 + eps)

    out    (T, C) f32   written
    x      (T, C) f32   read and written, then read again from the cache
    delta  (T, C) f32   read
    weight (C,)   f32   read
    launch grid T, thread block THREADS; one thread block owns one token
    shared 4*THREADS bytes: the partial sums of squares
    moves  16*T*C + 4*C bytes, does 5*T*C flops: bandwidth-bound
    twin   add_rmsnorm_ref      paper  arXiv:1910.07467
    """
    t, tid, C = cuda.blockIdx.x, cuda.threadIdx.x, x.shape[1]
    squares = ZERO
    for c in range(tid, C, THREADS):
        value = x[t, c] + delta[t, c]
        x[t, c] = value
        squares += value * value
    scale = ONE / math.sqrt(block_sum(squares) / float32(C) + eps)
    for c in range(tid, C, THREADS):       # a thread reads back only what it wrote itself
        out[t, c] = x[t, c] * scale * weight[c]


def add_rmsnorm(out, x, delta, weight, eps):
    assert out.shape == x.shape == delta.shape, (out.shape, x.shape, delta.shape)
    assert weight.shape == x.shape[1:], (weight.shape, x.shape)
    add_rmsnorm_kernel[x.shape[0], THREADS](out, x, delta, weight, np.float32(eps))


# -----------------------------------------------------------------------------
# 3. Matmul                                                     (lessons 8 and 9)
#
# Weights are stored as the checkpoint has them, one row for each output: (N, K). The product is
# x @ W.T.

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


@cuda.jit(cache=True)
def matmul_naive_kernel(out, x, weight):
    """out[t,n] = sum_k x[t,k] * weight[n,k]

    out    (T, N) f32   written
    x      (T, K) f32   every element read N times, mostly from the cache
    weight (N, K) f32   every element read T times
    launch grid (ceil(N / THREADS), T), thread block THREADS; one thread owns one out[t,n]
    moves  4*(T*N + T*K + N*K) bytes at best, does 2*T*N*K flops: latency-bound, for neighbouring
           threads read neighbouring rows, so no two of their loads share a cache line
    twin   matmul_ref
    """
    t, n = cuda.blockIdx.y, cuda.grid(1)
    if n < weight.shape[0]:
        acc = ZERO
        for k in range(weight.shape[1]):
            acc += x[t, k] * weight[n, k]
        out[t, n] = acc


def matmul_naive(out, x, weight):
    (T, K), N = x.shape, weight.shape[0]
    assert out.shape == (T, N) and weight.shape == (N, K), (out.shape, x.shape, weight.shape)
    matmul_naive_kernel[(ceil_div(N, THREADS), T), THREADS](out, x, weight)


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
    wrong pairing raises no error, and still gives words (lesson 6).
    """
    half = qk.shape[2] // 2
    c, s = cos[positions][:, None], sin[positions][:, None]       # (T, 1, D/2), for every head
    low, high = qk[..., :half].copy(), qk[..., half:].copy()
    qk[..., :half] = low * c - high * s
    qk[..., half:] = high * c + low * s


@cuda.jit(cache=True)
def rope_kernel(qk, cos, sin, positions):
    """(qk[t,h,i], qk[t,h,i+D/2]) rotated by the angle positions[t] * inv_freq[i]

    qk        (T, H+G, D)      f32   read and written; may be a strided view
    cos, sin  (positions, D/2) f32   one row read per token
    positions (T,)             i32   read
    launch grid (T, H+G), thread block THREADS; one thread owns whole pairs
    moves  8*T*(H+G)*D bytes, does 3*T*(H+G)*D flops: bandwidth-bound
    twin   rope_ref      paper  arXiv:2104.09864
    """
    t, h, half = cuda.blockIdx.x, cuda.blockIdx.y, cos.shape[1]
    for i in range(cuda.threadIdx.x, half, cuda.blockDim.x):
        c, s = cos[positions[t], i], sin[positions[t], i]
        low, high = qk[t, h, i], qk[t, h, i + half]
        qk[t, h, i] = low * c - high * s
        qk[t, h, i + half] = high * c + low * s


def rope(qk, cos, sin, positions):
    T, heads, D = qk.shape
    assert cos.shape == sin.shape and 2 * cos.shape[1] == D, (qk.shape, cos.shape, sin.shape)
    rope_kernel[(T, heads), THREADS](qk, cos, sin, positions)


def write_kv_ref(k_cache, v_cache, k, v, slots):
    """Scatters this step's keys and values of one layer into their blocks.

    k_cache, v_cache (blocks, P, G, D) written; k, v (T, G, D); slots (T,) int32, each
    block * P + offset.
    Invariant: runs before attention reads the layer, so a token sees itself and its step-mates.
    """
    G, D = k.shape[1:]
    k_cache.reshape(-1, G, D)[slots] = k
    v_cache.reshape(-1, G, D)[slots] = v


@cuda.jit(cache=True)
def write_kv_kernel(k_cache, v_cache, k, v, slots):
    """k_cache[slot // P, slot % P] = k[t] with slot = slots[t], and the same for v

    k_cache, v_cache (blocks, P, G, D) f32   T slots written
    k, v             (T, G, D)         f32   read; may be strided views
    slots            (T,)              i32   read
    launch grid (T, G), thread block THREADS; one thread block owns one head of one token
    moves  16*T*G*D bytes, does 0 flops: bandwidth-bound
    twin   write_kv_ref      paper  arXiv:2309.06180
    """
    t, g, P = cuda.blockIdx.x, cuda.blockIdx.y, k_cache.shape[1]
    block, offset = slots[t] // P, slots[t] % P
    for d in range(cuda.threadIdx.x, k.shape[2], cuda.blockDim.x):
        k_cache[block, offset, g, d] = k[t, g, d]
        v_cache[block, offset, g, d] = v[t, g, d]


def write_kv(k_cache, v_cache, k, v, slots):
    T, G, D = k.shape
    assert v.shape == k.shape and k_cache.shape[2:] == (G, D), (k.shape, v.shape, k_cache.shape)
    write_kv_kernel[(T, G), THREADS](k_cache, v_cache, k, v, slots)


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
        blocks = block_tables[b, :ceil_div(S, P)]
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
    weights = np.exp(scores, out=scores)                            # not normalised yet
    o = (weights @ v) / weights.sum(axis=-1, keepdims=True)         # (G, R*T, D)
    return o.reshape(G, R, T, D).transpose(2, 0, 1, 3).reshape(T, H, D)


@cuda.jit(device=True)
def score(q, k_cache, block_table, t, h, s):
    """q[t,h] . k[s,g] / sqrt(D), with k[s] found through the block table."""
    P, D = k_cache.shape[1], k_cache.shape[3]
    g = h // (q.shape[1] // k_cache.shape[2])
    block, acc = block_table[s // P], ZERO
    for d in range(D):
        acc += q[t, h, d] * k_cache[block, s % P, g, d]
    return acc / math.sqrt(float32(D))


@cuda.jit(cache=True)
def attention_threepass_kernel(out, q, k_cache, v_cache, block_tables, query_starts, seq_lens):
    """out[t,h] = sum_s exp(x_s - m) / l * v[s,g], m = max_s x_s, l = sum_s exp(x_s - m), x scores

    out, q           (T, H, D)         f32   out is written, and accumulated in place
    k_cache, v_cache (blocks, P, G, D) f32   keys read three times, values once, for each query head
    block_tables     (B, max blocks)   i32   read
    query_starts     (B+1,)            i32   read
    seq_lens         (B,)              i32   read
    launch grid T, thread block H; one thread owns one query head of one token
    moves  4*T*H*D*(2 + 4*S) bytes, does 8*T*H*S*D flops: latency-bound
    needs  H <= 1024   (asserted in the launcher)
    twin   paged_attention_ref      paper  arXiv:2309.06180
    """
    t, h = cuda.blockIdx.x, cuda.threadIdx.x
    P, D = k_cache.shape[1], k_cache.shape[3]
    g = h // (q.shape[1] // k_cache.shape[2])
    b = 0
    while query_starts[b + 1] <= t:
        b += 1
    # the request's queries are the last of its context: t sees what is not behind itself
    S = seq_lens[b] - (query_starts[b + 1] - t) + 1

    m = NEG_INF
    for s in range(S):
        m = max(m, score(q, k_cache, block_tables[b], t, h, s))
    l = ZERO
    for s in range(S):
        l += math.exp(score(q, k_cache, block_tables[b], t, h, s) - m)
    for d in range(D):
        out[t, h, d] = ZERO
    for s in range(S):
        p = math.exp(score(q, k_cache, block_tables[b], t, h, s) - m) / l
        block = block_tables[b, s // P]
        for d in range(D):
            out[t, h, d] += p * v_cache[block, s % P, g, d]


def attention_threepass(out, q, k_cache, v_cache, block_tables, query_starts, seq_lens):
    T, H, D = q.shape
    assert out.shape == q.shape and k_cache.shape == v_cache.shape, (out.shape, q.shape)
    assert k_cache.shape[3] == D and H % k_cache.shape[2] == 0, (q.shape, k_cache.shape)
    assert H <= 1024, f"one thread for each of {H} heads: at most 1024"
    attention_threepass_kernel[T, H](out, q, k_cache, v_cache, block_tables, query_starts, seq_lens)


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
# 7. The tables the engine runs on: the same names, twins or launchers

TWINS = SimpleNamespace(
    embedding=embedding_ref, add=add_ref, silu_mul=silu_mul_ref, rmsnorm=rmsnorm_ref,
    add_rmsnorm=add_rmsnorm_ref, matmul=matmul_ref, rope=rope_ref, write_kv=write_kv_ref,
    paged_attention=paged_attention_ref)

LAUNCHERS = SimpleNamespace(
    embedding=embedding, add=add, silu_mul=silu_mul, rmsnorm=rmsnorm, add_rmsnorm=add_rmsnorm,
    matmul=matmul_naive, rope=rope, write_kv=write_kv, paged_attention=attention_threepass)

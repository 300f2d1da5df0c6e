"""Every operation of the engine, in the order of the course.

Each operation is a NumPy twin (`*_ref`), then one or more GPU kernels, each with its card and its
launcher, and their rows in `KERNELS` at the end. The twin is the documentation of what is computed,
the oracle of the tests, and what `--device cpu` runs on; it computes in the dtype it is given,
float32 through BLAS. Twin and launcher take the same arguments, what they write first; a card says
`written` for each array that changes.

Where an operation has several kernels they are a ladder: each rung is named by its idea, computes
the same, and runs faster; the engine takes the last that the GPU and the shapes allow (`RUNGS`).

Every kernel runs unchanged in Numba's simulator, tensor cores included, because each instruction
that Numba does not know is defined here with a plain-Python emulation (section 1).

Elements are float32, float16, or bfloat16 stored as uint16; arithmetic and sums are float32. Numba
compiles a kernel for the types it is called with, so one source serves all three.

To copy a kernel out, take it with the names that its source uses; its launcher accepts anything
with `__cuda_array_interface__` (Numba, CuPy, PyTorch; view a bfloat16 tensor as uint16). Those for
tensor cores want C-contiguous arrays that begin at a multiple of 16 bytes.

Dimension key (capitals are extents, lower case indexes them)
    T  tokens in this step, all requests packed, no padding      C  hidden size
    B  requests in this step                                     F  intermediate size of the MLP
    S  tokens of context one query can see                       V  vocabulary
    H  query heads        G  key/value heads; head h reads g = h // R, R = H // G
    D  head_dim           P  tokens per KV block (block_size)    N, K  rows and columns of a weight
    E  bytes of an element, in the cards' formulas               J  splits of all contexts
    L  layers                                                    W  elements of all weight matrices

*Block* alone always means a block of the KV cache; a group of CUDA threads is a *thread block*.
"""

import functools
import inspect
import itertools
import math
import sys
import threading
from types import SimpleNamespace

import ml_dtypes
import numpy as np
from numba import config, cuda, float32, int32, int64, uint16, uint32, uint64

SIMULATOR = bool(config.ENABLE_CUDASIM)
if SIMULATOR:
    from numba.cuda.simulator import kernelapi
    sys.setswitchinterval(1e-4)         # its threads hand over at each barrier: 50 times as often
else:
    from llvmlite import ir
    from numba import types
    from numba.cuda.cudadrv.devicearray import DeviceNDArray
    from numba.cuda.extending import intrinsic

# a step of one token is a small grid, and is meant to be
config.CUDA_LOW_OCCUPANCY_WARNINGS = 0

# a kernel of three warpgroups, which must be known for the registers to be shared out among them
THREE_WARPGROUPS = {} if SIMULATOR else dict(launch_bounds=(384, 1))

# threads in a thread block, whole warps; the simulator starts one Python thread for each
WARP = 32
THREADS = WARP if SIMULATOR else 256

# subtle: a bare 0.0 or 1.0 is a double in Numba, and so becomes everything it touches
ZERO, ONE = np.float32(0), np.float32(1)
INF, NEG_INF, LOG2E = np.float32(np.inf), np.float32(-np.inf), np.float32(np.log2(np.e))


def ceil_div(a, b):
    return -(-a // b)


@cuda.jit(device=True)
def ceil_div_int(a, b):
    """ceil_div inside a kernel, for a >= 0."""
    return (a + b - 1) // b


# -----------------------------------------------------------------------------
# 1. Instructions                                                     (lesson 9)
#
# One PTX instruction becomes one device function. Below each decorator stands what the instruction
# does, in plain Python: that is what runs in the simulator, and what a reader can step through.
# Instructions of a whole warp meet in `together`.


def instruction(text, *operands, keep=True):
    """Decorator: a device function that is one PTX instruction, or a few in doubled braces, {0},
    {1}, ... being its operands.

    "=r" "=f"            a result (32-bit word, float32), returned
    "r" "f"              a value: one argument
    "global" "shared"    an address: two arguments, an array and a flat index into its elements
    "4r" "=4r" "+4f"     registers read, written, or both: two arguments, a local array and an index
    "8x4r"               the same in 8 groups of 4, {0[0]}, {0[1]}, ...
    "dtype"              no operand: one argument, an array whose type replaces DTYPE in the text

    keep  it reads or writes memory, or waits: it must neither move nor vanish.
    """
    def decorate(emulation):
        if SIMULATOR:
            return emulation

        def define(typing_context, *argument_types):
            return typed_instruction(text, operands, keep, list(argument_types))
        context = inspect.Parameter("typing_context", inspect.Parameter.POSITIONAL_ONLY)
        parameters = inspect.signature(emulation).parameters.values()
        define.__signature__ = inspect.Signature([context, *parameters])
        define.__doc__ = emulation.__doc__
        return named_intrinsic(emulation.__name__, define)
    return decorate


def named_intrinsic(name, define):
    """A Numba intrinsic that is the same in every process.

    Numba tells intrinsics apart by random numbers, and finds a kernel that a factory made in its
    disk cache by everything that the kernel refers to: the numbers would make it miss each time.
    """
    define.__name__ = name
    made = intrinsic(define)
    made._set_uuid(f"{__name__}.{name}")
    return made


def typed_instruction(text, operands, keep, given):
    """What Numba asks of an intrinsic: its signature, and a function that emits it."""
    numba_types = {"r": types.uint32, "f": types.float32}
    taken, returned = [], []
    for operand in operands:
        if operand in ("=r", "=f"):
            returned.append(numba_types[operand[1]])
        elif operand in ("r", "f"):
            given.pop(0)
            taken.append(numba_types[operand])
        else:
            taken.append(given.pop(0))                                 # an array
            if operand == "dtype":
                ptx_type = {types.uint16: "bf16", types.float16: "f16"}[taken[-1].dtype]
                text = text.replace("DTYPE", ptx_type)
            else:
                given.pop(0)
                taken.append(types.int64)                              # and its index
    result = types.void if not returned else returned[0] if len(returned) == 1 \
        else types.Tuple(returned)

    def emit(context, builder, signature, values):
        arguments = list(zip(signature.args, values))
        results = emit_instruction(text, operands, keep, context, builder, arguments)
        if not results:
            return context.get_dummy_value()
        return results[0] if len(results) == 1 else context.make_tuple(builder, result, results)
    return result(*taken), emit


def emit_instruction(text, operands, keep, context, builder, arguments):
    """The inline assembly; its results, for registers are stored where they came from."""
    llvm_types = {"r": ir.IntType(32), "f": ir.FloatType()}
    names, outputs, inputs = place_operands(operands, context, builder, arguments)
    text = text.format(*names)
    for i in range(len(inputs)):                       # LLVM numbers all outputs before all inputs
        text = text.replace(f"INPUT{i};", f"${len(outputs) + i}")
    constraints = ["=" + letter for letter, _ in outputs] + [letter for letter, _ in inputs]
    constraints += ["~{memory}"] * keep
    result_types = [llvm_types[letter] for letter, _ in outputs]
    result = ir.VoidType() if not outputs else result_types[0] if len(outputs) == 1 \
        else ir.LiteralStructType(result_types)
    values = [value for _, value in inputs]
    assembly = ir.InlineAsm(ir.FunctionType(result, [value.type for value in values]),
                            text, ",".join(constraints), side_effect=keep)
    call = builder.call(assembly, values)
    produced = [call] if len(outputs) == 1 else [builder.extract_value(call, i)
                                                 for i in range(len(outputs))]
    for (_, register), value in zip(outputs, produced):
        if register is not None:
            builder.store(value, register)
    return [value for (_, register), value in zip(outputs, produced) if register is None]


def place_operands(operands, context, builder, arguments):
    """names    what stands in the text for each operand, INPUTi; for an input
    outputs  (letter, the register's address or None for a result that is returned)
    inputs   (letter, value); last those tied to an output by its number: `+` registers are both
    """
    names, outputs, inputs, tied = [], [], [], []

    def data_and_index():
        (array_type, array), (_, index) = arguments.pop(0), arguments.pop(0)
        return context.make_array(array_type)(context, builder, array).data, index, array_type.dtype

    def element():
        data, index, _ = data_and_index()
        return builder.gep(data, [index])

    def shared_address():
        # subtle: in 32 bits from the start, then constant parts of the index cost nothing
        data, index, dtype = data_and_index()
        data = builder.addrspacecast(data, ir.PointerType(ir.IntType(8), 3))
        offset = builder.mul(builder.trunc(index, ir.IntType(32)),
                             ir.IntType(32)(dtype.bitwidth // 8))
        return builder.add(builder.ptrtoint(data, ir.IntType(32)), offset)

    def output(letter, register=None):
        outputs.append((letter, register))
        return f"${len(outputs) - 1}"

    def input_(letter, value):
        inputs.append((letter, value))
        return f"INPUT{len(inputs) - 1};"

    for operand in operands:
        letter = operand[-1]
        if operand in ("=r", "=f"):
            names.append(output(letter))
        elif operand in ("r", "f"):
            names.append(input_(letter, arguments.pop(0)[1]))
        elif operand == "global":
            names.append(input_("l", builder.ptrtoint(element(), ir.IntType(64))))
        elif operand == "shared":
            names.append(input_("r", shared_address()))
        elif operand == "dtype":
            arguments.pop(0)
        else:
            groups, size = map(int, f"1x{operand.strip('=+rf')}".split("x")[-2:])
            first, count = element(), groups * size
            registers = [builder.gep(first, [ir.IntType(64)(i)]) for i in range(count)]
            if operand[0] == "+":
                tied += [(str(len(outputs) + i), builder.load(registers[i])) for i in range(count)]
            written = operand[0] in "=+"
            parts = [output(letter, register) if written else input_(letter, builder.load(register))
                     for register in registers]
            braces = ["{" + ", ".join(parts[i:i + size]) + "}" for i in range(0, count, size)]
            names.append(braces if groups > 1 else braces[0])
    return names, outputs, inputs + tied


def flat(array):
    """Simulator: the elements of an array in memory order."""
    array = getattr(getattr(array, "_item", array), "_ary", array)
    return array.reshape(-1)


class SharedArrays(dict):
    """Simulator: the shared arrays of a thread block, by the line that asks for one. Numba looks
    for it, and makes it if there is none; two threads at once would make two, and never see what
    the other writes. So from a vain `get` until the array is here, others wait; not for ever, for
    making it may fail."""

    def __init__(self):
        super().__init__()
        self.door = threading.Lock()

    def get(self, line):
        self.door.acquire(timeout=1)
        found = super().get(line)
        if found is not None:
            self.open_door()
        return found

    def __setitem__(self, line, array):
        super().__setitem__(line, array)
        self.open_door()

    def open_door(self):
        if self.door.locked():
            self.door.release()


if SIMULATOR:
    def with_shared_arrays(self, size, initialize=kernelapi.FakeCUDAShared.__init__):
        initialize(self, size)
        self._allocations = SharedArrays()

    kernelapi.FakeCUDAShared.__init__ = with_shared_arrays


class WarpMeeting:
    """Simulator: where the 32 threads of a warp hand in their values and take out their results."""

    def __init__(self):
        # two sets, or a fast lane's next value would meet a slow one still reading
        self.values, self.results = ([None] * WARP, [None] * WARP), [None, None]
        self.turns, self.arrivals = [0] * WARP, itertools.count(1)
        self.doors = [threading.Lock() for _ in range(WARP)]
        for door in self.doors:
            door.acquire()

    def attend(self, lane, value, compute):
        side = self.turns[lane] % 2
        self.turns[lane] += 1
        self.values[side][lane] = value
        if next(self.arrivals) % WARP:
            self.doors[lane].acquire()             # until the last lane opens it
        else:
            self.results[side] = compute(self.values[side])
            for other in range(WARP):
                if other != lane:
                    self.doors[other].release()
        return self.results[side][lane]


def together(value, compute):
    """Simulator: the warp's 32 values go to `compute`, and each lane gets its item of the result.

    Whole warps must come here, as the hardware's `.sync` instructions require too.
    """
    thread = threading.current_thread()            # Numba runs each CUDA thread in one of Python's
    meetings = thread._manager.__dict__.setdefault("warp_meetings", {})
    warp, lane = divmod(thread.thread_id, WARP)
    meeting = meetings.get(warp) or meetings.setdefault(warp, WarpMeeting())
    return meeting.attend(lane, value, compute)


@instruction("shfl.sync.bfly.b32 {0}, {1}, {2}, 0x1f, 0xffffffff;", "=f", "f", "r")
def shuffle_xor(value, mask):
    """The value of lane ^ mask.

    mask 4   lanes 0 1 2 3 4 5 6 7 -> 4 5 6 7 0 1 2 3
    """
    return together(value, lambda values: [values[lane ^ int(mask)] for lane in range(WARP)])


@instruction("shfl.sync.idx.b32 {0}, {1}, {2}, 0x1f, 0xffffffff;", "=r", "r", "r")
def shuffle(word, lane):
    """The word of that lane."""
    return together((word, int(lane)), lambda given: [given[source][0] for _, source in given])


@instruction("bar.warp.sync 0xffffffff;")
def meet_warp():
    """The lanes of a warp wait for each other; what they wrote before is visible to all of them."""
    together(None, lambda values: values)


@instruction("mov.b32 {0}, {1};", "=r", "f", keep=False)
def float_bits(x):
    """The bits of a float32 as a word."""
    return np.float32(x).view(np.uint32)


@instruction("mov.b32 {0}, {1};", "=f", "r", keep=False)
def float_of(word):
    """The float32 of these bits."""
    return np.uint32(word).view(np.float32)


@instruction("mov.b32 {0}, {1};", "=r", "r", keep=False)
def one_register(word):
    """The same word, as a value that the compiler takes as it is: what is added to it afterwards
    stays a constant of the instruction, and does not become a register of its own."""
    return np.uint32(word)


@instruction("ex2.approx.ftz.f32 {0}, {1};", "=f", "f", keep=False)
def exp2(x):
    """2 ** x, to 2 bits of the last place; 0 for -inf."""
    with np.errstate(over="ignore"):
        return np.exp2(np.float32(x))


@instruction("rcp.approx.ftz.f32 {0}, {1};", "=f", "f", keep=False)
def inverse(x):
    """1 / x, to the last place; 0 for inf. A division is twenty instructions."""
    with np.errstate(divide="ignore"):
        return np.float32(1) / np.float32(x)


@instruction("fma.rn.f32 {0}, {1}, {2}, {3};", "=f", "f", "f", "f", keep=False)
def multiply_add(a, b, c):
    """a * b + c, rounded once. Of a * b + c * d the compiler fuses one product with the addition,
    and which one may differ between kernels: where their bits must agree, the sum says which."""
    return a * b + c


@instruction("mul.rn.f32 {0}, {1}, {2};", "=f", "f", "f", keep=False)
def product(a, b):
    """a * b, rounded before anything is added to it: the compiler must not fuse this one."""
    return a * b


@instruction("rsqrt.approx.ftz.f32 {0}, {1};", "=f", "f", keep=False)
def inverse_sqrt(x):
    """1 / sqrt(x), to 2 bits of the last place."""
    return np.float32(1) / np.sqrt(np.float32(x))


@instruction("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {0}, [{1}];", "=4r", "global")
def load_once(words, i, array, index):
    """16 bytes of memory that nobody writes and nobody reads again: weights."""
    words[i:i + 4] = flat(array)[index:index + 16 // array.dtype.itemsize].view(np.uint32)


@instruction("ld.global.v4.u32 {0}, [{1}];", "=4r", "global")
def load_16_bytes(words, i, array, index):
    """16 bytes of memory, which must lie at a multiple of 16."""
    words[i:i + 4] = flat(array)[index:index + 16 // array.dtype.itemsize].view(np.uint32)


@instruction("ld.global.v4.f32 {0}, [{1}];", "=4f", "global")
def load_4_floats(floats, i, array, index):
    """Four float32, of which the first must lie at a multiple of 16 bytes."""
    floats[i:i + 4] = flat(array)[index:index + 4]


@instruction("ld.shared.v4.u32 {0}, [{1}];", "=4r", "shared")
def load_shared(words, i, array, index):
    """16 bytes of shared memory, which must lie at a multiple of 16."""
    words[i:i + 4] = array[index:index + 4]


@instruction("st.shared.v2.f32 [{0}], {{{1}, {2}}};", "shared", "f", "f")
def store_2_shared(array, index, value, next_value):
    """Two float32 of shared memory, of which the first must lie at a multiple of 8 bytes."""
    array[index], array[index + 1] = value, next_value


@instruction("ld.shared.v2.f32 {{{0}, {1}}}, [{2}];", "=f", "=f", "shared")
def load_2_shared(array, index):
    """The same, read."""
    return array[index], array[index + 1]


@instruction("ld.volatile.shared.u32 {0}, [{1}];", "=r", "shared")
def load_shared_word(array, index):
    """A word of shared memory as it is now, whatever has been read of it before."""
    return array[index]


@instruction("ld.global.v2.f32 {0}, [{1}];", "=2f", "global")
def load_2_floats(floats, i, array, index):
    """Two float32, of which the first must lie at a multiple of 8 bytes."""
    floats[i:i + 2] = flat(array)[index:index + 2]


@instruction("ld.global.u32 {0}, [{1}];", "=r", "global")
def load_word(array, index):
    """Two 16-bit elements, the first in the lower half of the word; or an int32."""
    return flat(array)[index:index + 4 // array.dtype.itemsize].view(np.uint32)[0]


@instruction("st.global.f32 [{0}], {1};", "global", "f")
def store_float(array, index, value):
    """array[index] of a flat array, without the code for indices below 0."""
    flat(array)[index] = value


@instruction("st.global.v2.f32 [{0}], {{{1}, {2}}};", "global", "f", "f")
def store_2_floats(array, index, value, next_value):
    """Two float32, of which the first must lie at a multiple of 8 bytes."""
    flat(array)[index:index + 2] = value, next_value


@instruction("st.global.u32 [{0}], {1};", "global", "r")
def store_word(array, index, word):
    """Two 16-bit elements, the first in the lower half of the word; or an int32."""
    flat(array)[index:index + 4 // array.dtype.itemsize].view(np.uint32)[0] = word


@instruction("st.global.v4.u32 [{0}], {1};", "global", "4r")
def store_16_bytes(array, index, words, i):
    """16 bytes of memory, which must lie at a multiple of 16."""
    flat(array)[index:index + 16 // array.dtype.itemsize].view(np.uint32)[:] = words[i:i + 4]


@instruction("st.shared.v4.u32 [{0}], {1};", "shared", "4r")
def store_shared(array, index, words, i):
    """16 bytes of shared memory, which must lie at a multiple of 16."""
    array[index:index + 4] = words[i:i + 4]


@instruction("div.u32 {0}, {1}, {2};", "=r", "r", "r", keep=False)
def divide(a, b):
    """a // b in 32 bits; in 64, which Numba would take, a division is a hundred instructions."""
    return np.uint32(int(a) // int(b))


@instruction("cvt.rn.DTYPEx2.f32 {0}, {2}, {1};", "=r", "f", "f", "dtype", keep=False)
def pack(low, high, like):
    """Two float32 rounded to 16 bits each, the first in the lower half of the word."""
    kind = np.float16 if like.dtype == np.float16 else ml_dtypes.bfloat16
    return np.array([low, high], np.float32).astype(kind).view(np.uint32)[0]


@instruction("cp.async.cg.shared.global [{0}], [{1}], 16, {2};", "shared", "global", "r")
def copy_async(target, i, source, index, size):
    """Starts a copy of 16 bytes to shared memory, past the registers; size 0 writes zeros."""
    values = flat(source)[index:index + 16 // source.dtype.itemsize].view(target.dtype)
    target[i:i + len(values)] = values if size else 0


@instruction("cp.async.ca.shared.global [{0}], [{1}], 8;", "shared", "global")
def copy_8_async(target, i, source, index):
    """Starts a copy of 8 bytes, through the L1 cache: past it go only 16. What other thread blocks
    wrote must be read after a load_acquire."""
    values = flat(source)[index:index + 8 // source.dtype.itemsize].view(target.dtype)
    target[i:i + len(values)] = values


@instruction("cp.async.commit_group;")
def copies_commit():
    """The copies started since the last commit are one group."""


@instruction("cp.async.wait_group 0;")
def copies_wait_all():
    """Waits until all groups of this thread have landed."""


@instruction("cp.async.wait_group 1;")
def copies_wait_but_1():
    """Waits until at most the newest group of this thread is under way."""


def matrices_of(given, transpose):
    """Simulator: four 8x8 matrices from the 32 row addresses, dealt out as ldmatrix deals them."""
    rows = np.array([array[i:i + 16 // array.itemsize].view(np.uint16)
                     for array, i in given]).reshape(4, 8, 8)
    if transpose:
        rows = rows.transpose(0, 2, 1)
    dealt = np.ascontiguousarray(rows).view(np.uint32)                 # (matrix, row, 4 pairs)
    return [dealt[:, lane // 4, lane % 4] for lane in range(WARP)]


@instruction("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {0}, [{1}];", "=4r", "shared")
def load_matrices(words, w, array, i):
    """Four 8x8 matrices of 16-bit elements; lanes 8m to 8m+7 give the rows of matrix m.

    Lane l gets elements 2*(l%4) and 2*(l%4)+1 of row l//4 of each matrix: a fragment of `mma`.
    """
    words[w:w + 4] = together((array, int(i)), lambda given: matrices_of(given, False))


@instruction("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {0}, [{1}];", "=4r", "shared")
def load_matrices_transposed(words, w, array, i):
    """The same, each matrix transposed: lane l gets rows 2*(l%4) and the next of column l//4."""
    words[w:w + 4] = together((array, int(i)), lambda given: matrices_of(given, True))


def gather_a(words_of_lanes, kind):
    """Simulator: A (16, 16) float32 from the four words that each lane holds of it."""
    a = np.empty((16, 16), np.float32)
    for lane, words in enumerate(words_of_lanes):
        row, column = lane // 4, lane % 4 * 2
        halves = np.array(words, np.uint32).view(kind).astype(np.float32)
        for i in range(4):                             # upper left, lower left, right, lower right
            a[row + i % 2 * 8, column + i // 2 * 8:][:2] = halves[2 * i:2 * i + 2]
    return a


def deal_c(product):
    """Simulator: of C (16, N), what each lane holds, (WARP, N / 2)."""
    halves = product.reshape(2, 8, -1, 4, 2)           # half, row, n, lane % 4, i
    return halves.transpose(1, 3, 2, 0, 4).reshape(WARP, -1)


def multiply_fragments(given, kind):
    """Simulator: gathers the fragments of a warp into A (16, 16) and B (8, 16), and multiplies."""
    b = np.empty((8, 16), np.float32)
    for lane, (_, _, words) in enumerate(given):
        row, column = lane // 4, lane % 4 * 2
        halves = np.array(words, np.uint32).view(kind).astype(np.float32)
        b[row, column:column + 2], b[row, column + 8:column + 10] = halves[:2], halves[2:]
    with np.errstate(over="ignore", invalid="ignore"):           # rows past the end may be anything
        product = gather_a([words for _, words, _ in given], kind) @ b.T           # (16, 8)
        return [c + own for (c, _, _), own in zip(given, deal_c(product))]


@instruction("mma.sync.aligned.m16n8k16.row.col.f32.DTYPE.DTYPE.f32 {0}, {1}, {2}, {0};",
             "+4f", "4r", "2r", "dtype", keep=False)
def mma(c, i, a, j, b, k, like):
    """C (16, 8) f32 += A (16, 16) @ B (8, 16)^T of 16-bit elements, spread over the warp's lanes.

    lane l holds  C  row l//4, columns 2*(l%4) and the next, then the same of row l//4 + 8
                  A  row l//4 and l//4 + 8 at k = 2*(l%4), then both at k = 2*(l%4) + 8, in pairs
                  B  row l//4 at k = 2*(l%4), then at k = 2*(l%4) + 8, in pairs
    """
    kind = np.float16 if like.dtype == np.float16 else ml_dtypes.bfloat16
    c[i:i + 4] = together((c[i:i + 4].copy(), a[j:j + 4].copy(), b[k:k + 2].copy()),
                          lambda given: multiply_fragments(given, kind))


# Thread blocks meet by counting (section 10): what a thread wrote before an add that releases, is
# seen by who acquires a count that includes it.


@instruction("red.release.gpu.global.add.u32 [{0}], {1};", "global", "r")
def add_release(array, index, count):
    """Adds to a word of global memory, after all that was written before."""
    array[index] += count


@instruction("atom.acq_rel.gpu.global.add.u32 {0}, [{1}], {2};", "=r", "global", "r")
def add_acquire(array, index, count):
    """Adds to a word of global memory, and returns what it was."""
    array[index] += count
    return array[index] - count


@instruction("ld.relaxed.gpu.global.u32 {0}, [{1}];", "=r", "global")
def load_relaxed(array, index):
    """A word of global memory as it is now, whatever has been read of it before."""
    return array[index]


@instruction("ld.acquire.gpu.global.u32 {0}, [{1}];", "=r", "global")
def load_acquire(array, index):
    """The same, before all that is read afterwards: the L1 cache is emptied for that."""
    return array[index]


@instruction("{{ .reg .b64 both; mov.b64 both, {{{1}, {2}}};"
             " st.relaxed.gpu.global.b64 [{0}], both; }}", "global", "r", "r")
def send(mail, index, word, stamp):
    """A word and, in the same 8 bytes, the stamp that tells this letter from the one before: who
    reads it again and again until that is right needs no meeting (as NCCL's protocol LL)."""
    mail[index] = np.uint64(int(stamp) << 32 | int(word))


@instruction("{{ .reg .b64 both; ld.relaxed.gpu.global.b64 both, [{2}];"
             " mov.b64 {{{0}, {1}}}, both; }}", "=r", "=r", "global")
def receive(mail, index):
    """(word, stamp) as they are now."""
    both = int(mail[index])
    return np.uint32(both & 0xffffffff), np.uint32(both >> 32)


@instruction("{{ .reg .b64 one, two; mov.b64 one, {{{1}, {3}}}; mov.b64 two, {{{2}, {3}}};"
             " st.relaxed.gpu.global.v2.b64 [{0}], {{one, two}}; }}", "global", "r", "r", "r")
def send_2(mail, index, word, next_word, stamp):
    """Two letters, the first at an even index; each may come before the other."""
    send(mail, index, word, stamp)
    send(mail, index + 1, next_word, stamp)


@instruction("{{ .reg .b64 one, two; ld.relaxed.gpu.global.v2.b64 {{one, two}}, [{4}];"
             " mov.b64 {{{0}, {1}}}, one; mov.b64 {{{2}, {3}}}, two; }}",
             "=r", "=r", "=r", "=r", "global")
def receive_2(mail, index):
    """(word, stamp, next word, its stamp), the first at an even index."""
    return *receive(mail, index), *receive(mail, index + 1)


# Hopper: a copy engine that brings a box of a tensor to shared memory at one thread's word, tensor
# cores that read their operands there, and barriers in shared memory, which tell of copies and
# threads that are done.


@instruction("barrier.sync {0}, {1};", "r", "r")
def meet(place, threads):
    """cuda.syncthreads for so many threads, whole warps, of a thread block. Each group that meets
    has a place of its own, 1 to 15."""
    manager = threading.current_thread()._manager.__dict__
    name = f"meeting {place} of {threads}"
    (manager.get(name) or manager.setdefault(name, threading.Barrier(int(threads)))).wait()


class Mbarrier:
    """Simulator: its phase ends when all arrivals, and all bytes they announced, have come."""

    def __init__(self, arrivals):
        self.arrivals = self.missing = arrivals
        self.bytes, self.phase, self.changed = 0, 0, threading.Condition()

    def change(self, arrivals, size):
        with self.changed:
            self.missing -= arrivals
            self.bytes += size
            if self.missing == self.bytes == 0:
                self.missing, self.phase = self.arrivals, self.phase + 1
                self.changed.notify_all()

    def wait(self, parity):
        with self.changed:
            return self.changed.wait_for(lambda: self.phase % 2 != parity, timeout=1)


def mbarriers(barriers, i):
    """Simulator: the barriers of this thread block, and which of them lies at barriers[i]."""
    manager = threading.current_thread()._manager.__dict__
    return manager.setdefault("mbarriers", {}), barriers.ctypes.data + 8 * int(i)


@instruction("mbarrier.init.shared::cta.b64 [{0}], {1};", "shared", "r")
def barrier_init(barriers, i, arrivals):
    """A barrier, in phase 0, that so many arrivals end."""
    all_barriers, this = mbarriers(barriers, i)
    all_barriers[this] = Mbarrier(int(arrivals))


@instruction("fence.mbarrier_init.release.cluster;")
def barriers_ready():
    """What barrier_init wrote is there for the copy engine, too."""


@instruction("mbarrier.arrive.shared::cta.b64 _, [{0}];", "shared")
def barrier_arrive(barriers, i):
    """One of the arrivals of this phase; what this thread read before, it is done with."""
    all_barriers, this = mbarriers(barriers, i)
    all_barriers[this].change(1, 0)


@instruction("mbarrier.arrive.expect_tx.shared::cta.b64 _, [{0}], {1};", "shared", "r")
def barrier_expect(barriers, i, size):
    """One of the arrivals of this phase, which ends when so many bytes have been copied, too."""
    all_barriers, this = mbarriers(barriers, i)
    all_barriers[this].change(1, int(size))


@instruction("{{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [{1}], {2}; "
             "selp.u32 {0}, 1, 0, p;}}", "=r", "shared", "r")
def barrier_passed(barriers, i, parity):
    """1 if the phase of that parity has ended, 0 after a while if not. Before phase 0 ends, that of
    parity 1 counts as ended."""
    all_barriers, this = mbarriers(barriers, i)
    return all_barriers[this].wait(int(parity))


@instruction("setmaxnreg.dec.sync.aligned.u32 72;")
def few_registers():
    """This warpgroup keeps 72 registers for each thread, of the 168 that a third of them are."""


@instruction("setmaxnreg.inc.sync.aligned.u32 216;")
def many_registers():
    """This warpgroup waits for 216 registers for each thread, which another has given up."""


@instruction("{{ .reg .pred chosen; elect.sync _|chosen, 0xFFFFFFFF;"
             " selp.u32 {0}, 1, 0, chosen; }}", "=r")
def elect():
    """1 in one lane of a warp, and 0 in the others, which all come. lane == 0 is the same, but of
    this one the compiler knows that it is a single lane, and makes no loop over lanes of what the
    copy engine is told there."""
    return np.uint32(thread_index() % WARP == 0)


@instruction("mov.u32 {0}, {1};", "=r", "shared", keep=False)
def shared_address(array, i):
    """Where an element lies, in bytes of the shared memory."""
    return np.uint32(i * array.itemsize)


@instruction("fence.proxy.async.global;")
def fence_copies():
    """What threads had written to global memory before, the copy engine sees from here on."""


@instruction("fence.proxy.async.shared::cta;")
def fence_shared():
    """What this thread wrote in shared memory is there for tensor cores and the copy engine; what
    it read, is before what the copy engine writes."""


if SIMULATOR:
    def settle(array):
        """A shared array whose address one register holds from here on. A whole warp comes."""
        return array
else:
    def define_settle(typing_context, array):
        """Left alone, the compiler makes the address anew at each use, out of a special register
        that takes twenty cycles to read."""
        def emit(context, builder, signature, values):
            settled = context.make_array(array)(context, builder, values[0])
            in_shared = ir.PointerType(ir.IntType(8), 3)
            address = builder.ptrtoint(builder.addrspacecast(settled.data, in_shared),
                                       ir.IntType(32))
            # nothing less than a shuffle hides from the compiler where the word comes from
            assembly = ir.InlineAsm(ir.FunctionType(ir.IntType(32), [ir.IntType(32)]),
                                    "shfl.sync.idx.b32 $0, $1, 0, 31, 0xFFFFFFFF;", "=r,r", True)
            pointer = builder.inttoptr(builder.call(assembly, [address]), in_shared)
            settled.data = builder.addrspacecast(pointer, settled.data.type)
            return settled._getvalue()
        return array(array), emit
    settle = named_intrinsic("settle", define_settle)


def address_of(array):
    """Where an array begins, on the device or in the simulator."""
    interface = getattr(array, "__cuda_array_interface__", None)
    return interface["data"][0] if interface else flat(array).ctypes.data


DESCRIBED = []                             # simulator: the tensors of all tensor maps


def tensor_map(array, sizes, strides, box):
    """Tells the copy engine of a tensor in `array`, 16-bit elements: sizes, strides and the box of
    one copy in elements, innermost first, where the stride is 1 and the box 64. A box arrives as
    rows of 128 bytes, the 16-byte pieces of a row that begins at `address` in the order
    piece ^ (address / 128 % 8): so tensor cores read eight rows without a bank conflict. Returns
    16 words (CUDA driver API, CUtensorMap)."""
    if SIMULATOR:
        DESCRIBED.append((array, sizes, strides, box))
        return [len(DESCRIBED) - 1] + [0] * 15
    from cuda.bindings import driver
    word, extent = driver.cuuint64_t, driver.cuuint32_t
    error, made = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT16, len(sizes),
        address_of(array), [word(size) for size in sizes],
        [word(2 * stride) for stride in strides[1:]], [extent(size) for size in box],
        [extent(1)] * len(sizes), driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
    assert error == driver.CUresult.CUDA_SUCCESS, f"tensor of {sizes} with boxes {box}: {error}"
    return [int(word) for word in made.opaque]


def copy_box(target, i, maps, m, corner, barriers, barrier):
    """Simulator: what the copy engine does."""
    array, sizes, strides, box = DESCRIBED[int(flat(maps)[m])]
    tensor = np.lib.stride_tricks.as_strided(
        flat(array), sizes[::-1], [2 * stride for stride in strides[::-1]])
    inside = tensor[tuple(slice(int(at), int(at) + size)
                          for at, size in zip(corner[::-1], box[::-1]))]
    filled = np.zeros(box[::-1], tensor.dtype)                 # zeros beyond the tensor
    filled[tuple(map(slice, inside.shape))] = inside
    rows = filled.reshape(-1, 8, 8)
    pieces = np.arange(8) ^ ((np.arange(len(rows)) + i // 32) % 8)[:, None]
    rows = np.take_along_axis(rows, pieces[:, :, None], axis=1)
    target[i:i + filled.size // 2] = rows.reshape(-1).view(np.uint32)
    all_barriers, this = mbarriers(barriers, barrier)
    all_barriers[this].change(0, -2 * filled.size)


@instruction("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
             " [{0}], [{1}, {{{2}, {3}, {4}}}], [{5}];",
             "shared", "global", "r", "r", "r", "shared")
def copy_box_3d(target, i, maps, m, x0, x1, x2, barriers, barrier):
    """Starts the copy of the box at (x0, x1, x2) of the tensor that maps[m:m + 16] tells of; its
    bytes count at the barrier."""
    copy_box(target, i, maps, m, (x0, x1, x2), barriers, barrier)


@instruction("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
             " [{0}], [{1}, {{{2}, {3}, {4}, {5}, {6}}}], [{7}];",
             "shared", "global", "r", "r", "r", "r", "r", "shared")
def copy_box_5d(target, i, maps, m, x0, x1, x2, x3, x4, barriers, barrier):
    """The same in five dimensions."""
    copy_box(target, i, maps, m, (x0, x1, x2, x3, x4), barriers, barrier)


@instruction("{{ .reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;"
             " cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
             ".L2::cache_hint [{0}], [{1}, {{{2}, {3}, {4}, {5}, {6}}}], [{7}], policy; }}",
             "shared", "global", "r", "r", "r", "r", "r", "shared")
def copy_box_5d_once(target, i, maps, m, x0, x1, x2, x3, x4, barriers, barrier):
    """The same of what nobody reads again soon: in the L2 cache it makes room first."""
    copy_box(target, i, maps, m, (x0, x1, x2, x3, x4), barriers, barrier)


def rows_of(words, i, count):
    """Simulator: rows of 64 elements as a box left them."""
    rows = words[i:i + count * 32].view(np.uint16).reshape(count, 8, 8)
    pieces = np.arange(8) ^ (np.arange(count) % 8)[:, None]
    return np.take_along_axis(rows, pieces[:, :, None], axis=1).reshape(count, 64)


def make_wgmma(N):
    """The instructions for a warpgroup, 4 warps, and N columns."""
    # a descriptor: address / 16 (bits 16 to 29, unused with this swizzle, are 1), 1024 bytes
    # between groups of 8 rows, swizzle of 128 bytes; 16 elements further along is 2 more
    steps = [f"shr.u32 a, {{1}}, 4; add.u32 a, a, {0x10000 + 2 * k}; "
             f"shr.u32 b, {{2}}, 4; add.u32 b, b, {0x10000 + 2 * k};\n"
             f"mov.b64 x, {{{{a, {0x40000040}}}}}; mov.b64 y, {{{{b, {0x40000040}}}}};\n"
             f"wgmma.mma_async.sync.aligned.m64n{N}k16.f32.DTYPE.DTYPE {{0}}, x, y, "
             "ADDED, 1, 1, 0, 0;\n" for k in range(4)]
    text = ("{{.reg .b32 a, b; .reg .b64 x, y;\nwgmma.fence.sync.aligned;\n" + "".join(steps)
            + "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;}}")

    def product(a, j, b, k, like):
        """Simulator: A (64, 64) @ B (N, 64)^T, dealt out."""
        kind = np.float16 if like.dtype == np.float16 else ml_dtypes.bfloat16
        warp = threading.current_thread().thread_id // WARP % 4

        def multiply(_):
            wide = [rows_of(words, at, rows).view(kind).astype(np.float32)
                    for words, at, rows in ((a, j + warp * 16 * 32, 16), (b, k, N))]
            return deal_c(wide[0] @ wide[1].T)
        return together(None, multiply)

    def wgmma(c, i, a, j, b, k, like):
        """C (64, N) f32 += A (64, 64) @ B (N, 64)^T of 16-bit elements; A and B lie in shared
        memory as boxes left them. C is there after wgmma_wait; on return all but the last of these
        calls have read their operands.

        warp w, lane l of the warpgroup holds of each 8 columns, in c[i + 4*n : i + 4*n + 4],
        row 16*w + l//4 at columns 8*n + 2*(l%4) and the next, then the same of 8 rows further
        """
        c[i:i + N // 2] += product(a, j, b, k, like)

    def wgmma_first(c, i, a, j, b, k, like):
        """The same, but C = A @ B^T."""
        c[i:i + N // 2] = product(a, j, b, k, like)

    def wgmma_wait(c, i):
        """C of all wgmma before is there."""
    for function in (wgmma, wgmma_first, wgmma_wait):
        function.__name__ += f"_{N}"
    operands = "shared", "shared", "dtype"
    return SimpleNamespace(
        add=instruction(text.replace("ADDED", "1"), f"+{N // 2}f", *operands)(wgmma),
        first=instruction(text.replace("ADDED", "0", 1).replace("ADDED", "1"), f"={N // 2}f",
                          *operands)(wgmma_first),
        wait=instruction("// {0}\nwgmma.wait_group.sync.aligned 0;", f"+{N // 2}f")(wgmma_wait))


WGMMA = {N: make_wgmma(N) for N in (8, 16, 32, 64, 96, 128, 192, 256)}


def make_wgmma_from_registers(N, ROWS):
    """The instruction for a warpgroup whose A comes from its registers; B is (ROWS, N)."""
    # 64 columns lie in one box of ROWS rows, the next 64 in another; 1024 bytes between 8 rows
    text = "{{.reg .b32 b; .reg .b64 y;\nwgmma.fence.sync.aligned;\n"
    for step in range(ROWS // 16):
        text += (f"shr.u32 b, {{2}}, 4; add.u32 b, b, {(ROWS * 8 << 16) + step * 128}; "
                 f"mov.b64 y, {{{{b, {0x40000040}}}}};\n"
                 f"wgmma.mma_async.sync.aligned.m64n{N}k16.f32.DTYPE.DTYPE {{0}}, {{1[{step}]}}, "
                 "y, 1, 1, 1, 1;\n")
    text += "wgmma.commit_group.sync.aligned;}}"

    def wgmma(c, i, a, j, b, k, like):
        """C (64, N) f32 += A (64, ROWS) @ B (ROWS, N) of 16-bit elements; B lies in shared memory
        as boxes left it. C is there, and A may change, after wgmma_wait.

        warp w holds rows 16*w to 16*w + 15 of C as the other wgmma does, and of A, 16 columns in
        four words, as `mma` does
        """
        kind = np.float16 if like.dtype == np.float16 else ml_dtypes.bfloat16
        wide = np.concatenate([rows_of(b, k + panel * ROWS * 32, ROWS) for panel in range(N // 64)],
                              axis=1).view(kind).astype(np.float32)                # (ROWS, N)

        def multiply(given):
            fragments = [gather_a([words[step * 4:step * 4 + 4] for words in given], kind)
                         for step in range(ROWS // 16)]                            # (16, 16) each
            return deal_c(np.concatenate(fragments, axis=1) @ wide)
        c[i:i + N // 2] += together(a[j:j + ROWS // 4].copy(), multiply)
    wgmma.__name__ = f"wgmma_{N}_from_registers_{ROWS}"
    return instruction(text, f"+{N // 2}f", f"{ROWS // 16}x4r", "shared", "dtype")(wgmma)


@cuda.jit(device=True)
def thread_index():
    """cuda.threadIdx.x, of which the compiler then knows that it is not negative: a division by a
    power of two is a shift, and not ten instructions and registers that a long kernel lacks."""
    return cuda.threadIdx.x & 1023


@cuda.jit(device=True)
def await_barrier(barriers, i, parity):
    """Waits for the end of the barrier's phase of that parity."""
    while barrier_passed(barriers, i, parity) == uint32(0):
        pass


@cuda.jit(device=True)
def first_of_ring(ring, i):
    """The first word from ring[i] on at a multiple of 1024 bytes, where stages begin: the order of
    the pieces in a box comes from the address."""
    return i + ((1024 - (shared_address(ring, i) & 1023)) & 1023) // 4


@cuda.jit(device=True)
def next_stage(stage, parity, stages):
    """The place after this one in a ring, and the parity of its phase. In 32 bits: what a long
    kernel spills it fetches from the L2 after each meeting, for that empties the L1."""
    following = uint32(stage + 1)
    if following == uint32(stages):
        return uint32(0), uint32(parity ^ uint32(1))
    return following, parity


# Programmatic dependent launch: a kernel may begin while the one before it still runs. Invariant:
# every kernel calls wait_for_inputs before it touches anything that another kernel writes; what it
# does earlier, as loading weights, overlaps the end of the kernel before.

if SIMULATOR:
    def start_next_kernel():
        """Lets the next kernel of the stream begin as soon as there is room."""

    def wait_for_inputs():
        """Waits until all kernels before this one have ended and their writes are visible."""
else:
    def dependent_launch(name, text):
        """An instruction that GPUs before Hopper neither have nor need."""
        def define(typing_context):
            def emit(context, builder, signature, values):
                from numba.cuda.core import targetconfig
                if targetconfig.ConfigStack().top().compute_capability >= (9, 0):
                    emit_instruction(text, (), True, context, builder, [])
                return context.get_dummy_value()
            return types.void(), emit
        return named_intrinsic(name, define)

    start_next_kernel = dependent_launch("start_next_kernel", "griddepcontrol.launch_dependents;")
    wait_for_inputs = dependent_launch("wait_for_inputs", "griddepcontrol.wait;")


# Launching. `kernel[grid, threads, stream](...)` is Numba's way. It takes the host longer than most
# kernels of a step run: those of the upper rungs take `launch`.

HANDLES = {}                               # kernel and types -> the driver's kernel
GRANTED = {}                               # the same -> bytes of shared memory it may have


def launch(kernel, grid, threads, stream, shared, *arguments):
    """kernel[grid, threads, stream, shared](*arguments) by the driver itself, and with as much
    shared memory as the GPU has. Arguments: C-contiguous arrays on the device, and NumPy scalars of
    32 bits."""
    if SIMULATOR:
        kernel[grid, threads, stream, shared](*arguments)
        return
    from cuda.bindings import driver
    arguments = [a if isinstance(a, (np.generic, DeviceNDArray)) else cuda.as_cuda_array(a)
                 for a in arguments]
    key = kernel, *((a.dtype, a.ndim) for a in arguments)
    if shared > GRANTED.get(key, -1):
        HANDLES[key], GRANTED[key] = compile_for_driver(kernel, shared, arguments), shared
    # what a Numba kernel takes for an array: two owners, which device code has no use for, number
    # and size of its elements, address, shape, strides
    words = []
    for a in arguments:
        if a.ndim:
            assert a.is_c_contiguous(), f"an array of shape {a.shape} and strides {a.strides}"
            words += 0, 0, a.size, a.dtype.itemsize, a.device_ctypes_pointer.value or 0
            words += *a.shape, *a.strides
        else:
            words.append(int(a.view(np.uint32)))
    words = np.array(words, np.uint64)
    addresses = words.ctypes.data + 8 * np.arange(len(words), dtype=np.uint64)
    x, y = grid if isinstance(grid, tuple) else (grid, 1)
    error, = driver.cuLaunchKernel(HANDLES[key], x, y, 1, threads, 1, 1, shared,
                                   int(stream.handle) if stream else 0, addresses.ctypes.data, 0)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{kernel.__name__} was not launched: {error.name}")


def compile_for_driver(kernel, shared, arguments):
    """The kernel for these types of arguments; more than 48 KB of shared memory it must ask for."""
    from cuda.bindings import driver
    compiled = kernel.compile(tuple(kernel.typeof_pyval(a) for a in arguments))
    handle = driver.CUkernel(int(compiled._codelibrary.get_cufunc().kernel.handle))
    if shared > 48 << 10:
        error, = driver.cuKernelSetAttribute(
            driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared,
            handle, driver.CUdevice(cuda.get_current_device().id))
        assert error == driver.CUresult.CUDA_SUCCESS, f"{shared} bytes of shared memory: {error}"
    return handle


@functools.cache                           # asking Numba takes longer than a launch
def num_multiprocessors():
    return 1 if SIMULATOR else cuda.get_current_device().MULTIPROCESSOR_COUNT


# The three element types: `widen` reads one as float32, `narrow` rounds a float32 to an array's.

if SIMULATOR:
    def widen(x):
        """float32 of an element: bfloat16 is the upper half of a float32 (lesson 2)."""
        if isinstance(x, np.uint16):
            return (np.uint32(x) << np.uint32(16)).view(np.float32)
        return np.float32(x)

    def narrow(x, like):
        """A float32 as an element of `like`, rounded to nearest even."""
        if like.dtype == np.uint16:
            return np.float32(x).astype(ml_dtypes.bfloat16).view(np.uint16)
        with np.errstate(over="ignore"):
            return like.dtype.type(x)

    def low_element(word, like):
        """float32 of the element in the lower half of a word."""
        return widen(np.array([word], np.uint32).view(like.dtype)[0])

    def high_element(word, like):
        """float32 of the element in the upper half of a word."""
        return widen(np.array([word], np.uint32).view(like.dtype)[1])
else:
    def widen(typing_context, x):
        """float32 of an element: bfloat16 is the upper half of a float32 (lesson 2)."""
        def emit(context, builder, signature, values):
            if x == types.uint16:
                word = builder.zext(values[0], ir.IntType(32))
                return builder.bitcast(builder.shl(word, ir.IntType(32)(16)), ir.FloatType())
            return context.cast(builder, values[0], x, types.float32)
        return types.float32(x), emit

    def narrow(typing_context, x, like):
        """A float32 as an element of `like`, rounded to nearest even."""
        def emit(context, builder, signature, values):
            if like.dtype == types.uint16:
                word = ir.IntType(32)
                bits = builder.bitcast(values[0], word)
                odd = builder.and_(builder.lshr(bits, word(16)), word(1))
                rounded = builder.add(builder.add(bits, word(0x7FFF)), odd)
                is_nan = builder.fcmp_unordered("uno", values[0], values[0])
                rounded = builder.select(is_nan, word(0x7FC00000), rounded)
                return builder.trunc(builder.lshr(rounded, word(16)), ir.IntType(16))
            return context.cast(builder, values[0], types.float32, like.dtype)
        return like.dtype(types.float32, like), emit

    def half_of_word(name, shift):
        """The float32 of the 16-bit element that begins at bit `shift` of a word."""
        def define(typing_context, word, like):
            def emit(context, builder, signature, values):
                half = builder.trunc(builder.lshr(values[0], ir.IntType(32)(shift)),
                                     ir.IntType(16))
                if like.dtype == types.uint16:
                    word = builder.shl(builder.zext(half, ir.IntType(32)), ir.IntType(32)(16))
                    return builder.bitcast(word, ir.FloatType())
                half = builder.bitcast(half, ir.HalfType())
                return builder.fpext(half, ir.FloatType())
            return types.float32(types.uint32, like), emit
        return named_intrinsic(name, define)

    widen, narrow = named_intrinsic("widen", widen), named_intrinsic("narrow", narrow)
    low_element, high_element = half_of_word("low_element", 0), half_of_word("high_element", 16)


# -----------------------------------------------------------------------------
# 2. Sums over a warp and a thread block                              (lesson 5)


@cuda.jit(device=True)
def warp_sum(value):
    """Sum of `value` over the 32 lanes, the same bits for all of them.

    [ a b c d ] -> +lane^2: [ a+c b+d c+a d+b ] -> +lane^1: [ a+c+b+d  b+d+a+c  ... ]
    """
    for mask in (16, 8, 4, 2, 1):
        value += shuffle_xor(value, mask)
    return value


@cuda.jit(device=True)
def warp_max(value):
    """The largest `value` of the 32 lanes, in all of them."""
    for mask in (16, 8, 4, 2, 1):
        value = max(value, shuffle_xor(value, mask))
    return value


@cuda.jit(device=True)
def block_sum(value, threads):
    """Sum of `value` over the first `threads` of a thread block, the same for all of them."""
    partial = cuda.shared.array(WARP, float32)
    tid, total = cuda.threadIdx.x, ZERO
    value = warp_sum(value)
    if tid % WARP == 0:
        partial[tid // WARP] = value
    meet(1, threads)                       # else a thread adds a partial that is not written yet
    for warp in range(threads // WARP):
        total += partial[warp]
    meet(1, threads)                       # else the next sum overwrites what a slow thread reads
    return total


@cuda.jit(device=True)
def transpose_quad(words):
    """Lane q of four gives its words[i] to lane i of them, as that one's words[q]."""
    lane = uint32(cuda.threadIdx.x % WARP)
    odd, far = lane & 1, lane & 2
    for i in range(0, 4, 2):
        given = shuffle(words[i] if odd else words[i + 1], lane ^ uint32(1))
        if odd:
            words[i] = given
        else:
            words[i + 1] = given
    for i in range(2):
        given = shuffle(words[i] if far else words[i + 2], lane ^ uint32(2))
        if far:
            words[i] = given
        else:
            words[i + 2] = given


# -----------------------------------------------------------------------------
# 3. Gather and elementwise: embedding, add, SwiGLU           (lessons 4 and 7)
#
# A few operations for each byte moved, which is why lesson 7 folds them into their neighbours.


def embedding_ref(out, tokens, table):
    """out[t] = table[tokens[t]].  out (T, C), tokens (T,) int32, table (V, C), or any rows."""
    out[:] = table[tokens]


@cuda.jit(cache=True)
def embedding_kernel(out, tokens, table):
    """out[t,c] = table[tokens[t],c]

    out    (T, C) f32 f16 bf16   written
    tokens (T,)   i32            read
    table  (V, C) as out         T rows read
    launch grid T, thread block THREADS; one thread block owns one token
    moves  2*T*C*E + 4*T bytes, does 0 flops: bandwidth-bound
    twin   embedding_ref
    """
    start_next_kernel()
    wait_for_inputs()
    t = cuda.blockIdx.x
    for c in range(cuda.threadIdx.x, out.shape[1], THREADS):
        out[t, c] = table[tokens[t], c]


def embedding(out, tokens, table, stream=0):
    assert out.shape == (tokens.shape[0], table.shape[1]), (out.shape, tokens.shape, table.shape)
    embedding_kernel[out.shape[0], THREADS, stream](out, tokens, table)


def add_ref(x, delta):
    """x[t] += delta[t] in place.  x, delta (T, C)."""
    x += delta


@cuda.jit(cache=True)
def add_kernel(x, delta):
    """x[t,c] += delta[t,c]

    x      (T, C) f32 f16 bf16   read and written
    delta  (T, C) as x           read
    launch grid T, thread block THREADS; one thread block owns one token
    moves  3*T*C*E bytes, does T*C flops: bandwidth-bound
    twin   add_ref
    """
    start_next_kernel()
    wait_for_inputs()
    t = cuda.blockIdx.x
    for c in range(cuda.threadIdx.x, x.shape[1], THREADS):
        x[t, c] = narrow(widen(x[t, c]) + widen(delta[t, c]), x)


def add(x, delta, stream=0):
    assert x.shape == delta.shape, (x.shape, delta.shape)
    add_kernel[x.shape[0], THREADS, stream](x, delta)


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


@cuda.jit(device=True)
def silu(x):
    return x * inverse(ONE + exp2(-x * LOG2E))


@cuda.jit(cache=True)
def silu_mul_kernel(out, gate_up):
    """out[t,f] = gate[t,f] / (1 + exp(-gate[t,f])) * up[t,f]

    out     (T, F)  f32 f16 bf16   written
    gate_up (T, 2F) as out         read: gate in the first F columns, up in the last F
    launch grid T, thread block THREADS; one thread block owns one token
    moves  3*T*F*E bytes, does 5*T*F flops: bandwidth-bound
    twin   silu_mul_ref      paper  arXiv:2002.05202
    """
    start_next_kernel()
    wait_for_inputs()
    t, F = cuda.blockIdx.x, out.shape[1]
    for f in range(cuda.threadIdx.x, F, THREADS):
        out[t, f] = narrow(silu(widen(gate_up[t, f])) * widen(gate_up[t, F + f]), out)


def silu_mul(out, gate_up, stream=0):
    assert gate_up.shape == (out.shape[0], 2 * out.shape[1]), (out.shape, gate_up.shape)
    silu_mul_kernel[out.shape[0], THREADS, stream](out, gate_up)


# -----------------------------------------------------------------------------
# 4. Reductions: RMSNorm                                              (lesson 5)
#
# Hugging Face's Llama rounds to the element type between norm and weight, and so does this.


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


@cuda.jit(cache=True)
def rmsnorm_kernel(out, x, weight, eps):
    """out[t,c] = weight[c] * x[t,c] / sqrt(mean_c x[t,c]^2 + eps)

    out    (T, C) f32 f16 bf16   written
    x      (T, C) as out         read twice; the second pass hits the cache
    weight (C,)   as out         read
    launch grid T, thread block THREADS; one thread block owns one token
    shared 4*WARP bytes: a partial sum of squares for each warp
    moves  2*T*C*E + C*E bytes, does 4*T*C flops: bandwidth-bound
    twin   rmsnorm_ref      paper  arXiv:1910.07467
    """
    start_next_kernel()
    wait_for_inputs()
    t, tid, C = cuda.blockIdx.x, cuda.threadIdx.x, x.shape[1]
    squares = ZERO
    for c in range(tid, C, THREADS):
        value = widen(x[t, c])
        squares += value * value
    scale = ONE / math.sqrt(block_sum(squares, cuda.blockDim.x) / float32(C) + eps)
    for c in range(tid, C, THREADS):
        normed = narrow(widen(x[t, c]) * scale, out)
        out[t, c] = narrow(widen(normed) * widen(weight[c]), out)


def rmsnorm(out, x, weight, eps, stream=0):
    assert out.shape == x.shape and weight.shape == x.shape[1:], (out.shape, x.shape, weight.shape)
    rmsnorm_kernel[x.shape[0], THREADS, stream](out, x, weight, np.float32(eps))


@cuda.jit(cache=True)
def add_rmsnorm_kernel(out, x, delta, weight, eps):
    """x[t,c] += delta[t,c], then out[t,c] = weight[c] * x[t,c] / sqrt(mean_c x[t,c]^2 + eps)

    out    (T, C) f32 f16 bf16   written
    x      (T, C) as out         read and written, then read again from the cache
    delta  (T, C) as out         read
    weight (C,)   as out         read
    launch grid T, thread block THREADS; one thread block owns one token
    shared 4*WARP bytes: a partial sum of squares for each warp
    moves  4*T*C*E + C*E bytes, does 5*T*C flops: bandwidth-bound
    twin   add_rmsnorm_ref      paper  arXiv:1910.07467
    """
    start_next_kernel()
    wait_for_inputs()
    t, tid, C = cuda.blockIdx.x, cuda.threadIdx.x, x.shape[1]
    squares = ZERO
    for c in range(tid, C, THREADS):
        total = narrow(widen(x[t, c]) + widen(delta[t, c]), x)
        x[t, c] = total
        squares += widen(total) * widen(total)
    scale = ONE / math.sqrt(block_sum(squares, cuda.blockDim.x) / float32(C) + eps)
    for c in range(tid, C, THREADS):       # a thread reads back only what it wrote itself
        normed = narrow(widen(x[t, c]) * scale, out)
        out[t, c] = narrow(widen(normed) * widen(weight[c]), out)


def add_rmsnorm(out, x, delta, weight, eps, stream=0):
    assert out.shape == x.shape == delta.shape, (out.shape, x.shape, delta.shape)
    assert weight.shape == x.shape[1:], (weight.shape, x.shape)
    add_rmsnorm_kernel[x.shape[0], THREADS, stream](out, x, delta, weight, np.float32(eps))


WIDE_CHUNKS = 4                            # of 8 channels for a thread: C up to 32 * THREADS
WIDE_WORDS = 4 * WIDE_CHUNKS


@cuda.jit(cache=True)
def add_rmsnorm_wide_kernel(out, x, delta, weight, eps):
    """add_rmsnorm_kernel with 16 bytes in each load, and the token in registers between its passes

    out    (T, C) f16 bf16   written
    x      (T, C) as out     read and written
    delta  (T, C) as out     read
    weight (C,)   as out     read
    launch grid T, thread block THREADS; one thread block owns one token
    shared 4*WARP bytes: a partial sum of squares for each warp
    moves  4*T*C*E + C*E bytes, does 5*T*C flops: bandwidth-bound
    needs  C % 8 == 0, C <= 32 * THREADS   (else the launcher takes the kernel above)
    twin   add_rmsnorm_ref      paper  arXiv:1910.07467
    """
    words = cuda.local.array(WIDE_WORDS, uint32)
    other = cuda.local.array(4, uint32)    # of delta, then of weight
    start_next_kernel()
    wait_for_inputs()
    t, C, squares = cuda.blockIdx.x, x.shape[1], ZERO
    for chunk in range(WIDE_CHUNKS):
        c = (chunk * THREADS + cuda.threadIdx.x) * 8
        if c < C:
            load_16_bytes(words, chunk * 4, x, t * C + c)
            load_16_bytes(other, 0, delta, t * C + c)
            for i in range(4):
                w = chunk * 4 + i
                words[w] = pack(low_element(words[w], x) + low_element(other[i], x),
                                high_element(words[w], x) + high_element(other[i], x), x)
                low, high = low_element(words[w], x), high_element(words[w], x)
                squares += low * low + high * high
            store_16_bytes(x, t * C + c, words, chunk * 4)
    scale = ONE / math.sqrt(block_sum(squares, cuda.blockDim.x) / float32(C) + eps)
    for chunk in range(WIDE_CHUNKS):
        c = (chunk * THREADS + cuda.threadIdx.x) * 8
        if c < C:
            load_16_bytes(other, 0, weight, c)
            for i in range(4):
                w = chunk * 4 + i
                normed = pack(low_element(words[w], x) * scale,
                              high_element(words[w], x) * scale, x)
                words[w] = pack(low_element(normed, x) * low_element(other[i], x),
                                high_element(normed, x) * high_element(other[i], x), x)
            store_16_bytes(out, t * C + c, words, chunk * 4)


def add_rmsnorm_wide(out, x, delta, weight, eps, stream=0):
    T, C = x.shape
    if C % 8 or C > 8 * WIDE_CHUNKS * THREADS:
        add_rmsnorm(out, x, delta, weight, eps, stream)
        return
    assert out.shape == x.shape == delta.shape and weight.shape == (C,), (out.shape, delta.shape)
    launch(add_rmsnorm_wide_kernel, T, THREADS, stream, 0, out, x, delta, weight, np.float32(eps))


# -----------------------------------------------------------------------------
# 5. Matmul                                                     (lessons 8 and 9)
#
# Weights are stored as the checkpoint has them, one row for each output: (N, K). The product is
# x @ W.T. Two ladders: for many tokens (prefill) each weight is used often and arithmetic decides,
# for few (decode) every weight is read for a handful of multiplications and memory decides.
#
# Invariant of each kernel: an output of one token is summed in the same order whatever stands
# beside it, so its bits do not depend on the company. Tiles may differ, the order along K may not.
# The two ladders do differ from each other in the last bits, and the twins leave the order to BLAS.

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


def matmul_silu_mul_ref(out, x, weight, scratch):
    """out = silu_mul(x @ weight.T).  out (T, F), x (T, K), weight (2F, K), scratch (T, 2F)."""
    matmul_ref(scratch, x, weight)
    silu_mul_ref(out, scratch)


def matmul_shapes(out, x, weight, gated=False):
    """(T, N, K) of a matmul, whose operands must agree."""
    (T, K), N = x.shape, weight.shape[0]
    shapes = f"out {out.shape}, x {x.shape}, weight {weight.shape}"
    assert out.shape == (T, N // 2 if gated else N) and weight.shape == (N, K), shapes
    return T, N, K


# ---- first rung: one thread for an output ----


@cuda.jit(cache=True)
def matmul_naive_kernel(out, x, weight):
    """out[t,n] = sum_k x[t,k] * weight[n,k]

    out    (T, N) f32 f16 bf16   written
    x      (T, K) f32 f16 bf16   every element read N times, mostly from the cache
    weight (N, K) as x           every element read T times
    launch grid (T, ceil(N / THREADS)), thread block THREADS; one thread owns one out[t,n]
    moves  E*(T*N + T*K + N*K) bytes, does 2*T*N*K flops: latency-bound, for neighbouring
           threads read neighbouring rows, so no two of their loads share a cache line
    twin   matmul_ref
    """
    start_next_kernel()
    wait_for_inputs()
    t, n = cuda.blockIdx.x, cuda.blockIdx.y * THREADS + cuda.threadIdx.x
    if n < weight.shape[0]:
        acc = ZERO
        for k in range(weight.shape[1]):
            acc += widen(x[t, k]) * widen(weight[n, k])
        out[t, n] = narrow(acc, out)


def matmul_naive(out, x, weight, stream=0):
    T, N, _ = matmul_shapes(out, x, weight)
    matmul_naive_kernel[(T, ceil_div(N, THREADS)), THREADS, stream](out, x, weight)


# ---- second rung: tiles in shared memory ----

TILE = 4 if SIMULATOR else 16              # TILE * TILE threads, and as many outputs
TILE_PITCH = TILE + 1                      # a column more, or a column would lie in one bank


@cuda.jit(cache=True)
def matmul_tiled_kernel(out, x, weight):
    """out[t,n] = sum_k x[t,k] * weight[n,k]

    out    (T, N) f32 f16 bf16   written
    x      (T, K) f32 f16 bf16   every element read N / TILE times
    weight (N, K) as x           every element read T / TILE times
    launch grid (ceil(T / TILE), ceil(N / TILE)), thread block (TILE, TILE); one thread block owns a
           tile of out, one thread an element of it
    shared 8*TILE*TILE_PITCH bytes: a tile of x and one of weight
    moves  E*(T*N + T*K + N*K) bytes, does 2*T*N*K flops: bound by reads of shared memory
    twin   matmul_ref
    """
    x_tile = cuda.shared.array((TILE, TILE_PITCH), float32)
    w_tile = cuda.shared.array((TILE, TILE_PITCH), float32)
    start_next_kernel()
    wait_for_inputs()
    i, j = cuda.threadIdx.y, cuda.threadIdx.x
    t, n = cuda.blockIdx.x * TILE + i, cuda.blockIdx.y * TILE + j
    row = cuda.blockIdx.y * TILE + i       # of weight: neighbouring threads load neighbouring k
    (T, K), N = x.shape, weight.shape[0]
    acc = ZERO
    for k0 in range(0, K, TILE):
        x_tile[i, j] = widen(x[t, k0 + j]) if t < T and k0 + j < K else ZERO
        w_tile[i, j] = widen(weight[row, k0 + j]) if row < N and k0 + j < K else ZERO
        cuda.syncthreads()                 # else a thread reads what its neighbour has not loaded
        for k in range(TILE):
            acc += x_tile[i, k] * w_tile[j, k]
        cuda.syncthreads()                 # else a fast thread overwrites what a slow one reads
    if t < T and n < N:
        out[t, n] = narrow(acc, out)


def matmul_tiled(out, x, weight, stream=0):
    T, N, _ = matmul_shapes(out, x, weight)
    grid = (ceil_div(T, TILE), ceil_div(N, TILE))
    matmul_tiled_kernel[grid, (TILE, TILE), stream](out, x, weight)


# ---- third rung: tensor cores ----
#
# A warp multiplies (16, 16) by (16, 8) in one instruction. Shared memory feeds it: tiles of x and
# weight arrive by copy_async, TENSOR_STAGES - 1 of them under way while one is used.

TENSOR_K, TENSOR_STAGES = 64, 3            # elements along K in a tile: 8 chunks of 16 bytes a row


def make_matmul_tensor(TILE_T, TILE_N, WARPS_T, WARPS_N, GATED):
    """The kernel for one tile size; GATED folds SwiGLU into its last stage."""
    NUM_THREADS = WARP * WARPS_T * WARPS_N
    WARP_T, WARP_N = TILE_T // WARPS_T, TILE_N // WARPS_N
    MMAS_T, MMAS_N = WARP_T // 16, WARP_N // 8
    ACCUMULATORS, A_WORDS, B_WORDS = MMAS_T * MMAS_N * 4, MMAS_T * 4, MMAS_N * 2
    TWO_A_WORDS, TWO_B_WORDS = 2 * A_WORDS, 2 * B_WORDS
    COPIES_X, COPIES_W = TILE_T * 8 // NUM_THREADS, TILE_N * 8 // NUM_THREADS
    ROWS_A_COPY = NUM_THREADS // 8
    COPIES = COPIES_X + COPIES_W
    STAGE = (TILE_T + TILE_N) * TENSOR_K
    STEPS = TENSOR_K // 16
    COPIES_X_A_STEP, COPIES_W_A_STEP = ceil_div(COPIES_X, STEPS), ceil_div(COPIES_W, STEPS)

    @cuda.jit(device=True)
    def first_elements(starts, x, weight, first_t, first_n):
        """Where the rows begin that this thread copies, of x and then of weight. Rows past the end
        repeat the last one: their products are never stored."""
        (T, K), N = x.shape, weight.shape[0]
        row = cuda.threadIdx.x // 8
        for i in range(COPIES_X):
            starts[i] = uint32(min(first_t + row + i * ROWS_A_COPY, T - 1) * K)
        for i in range(COPIES_W):
            r = row + i * ROWS_A_COPY
            if GATED:                      # 8 rows of gate, 8 of up, in turns: see the last stage
                n = min(first_n // 2 + r // 16 * 8 + r % 8, N // 2 - 1) + r // 8 % 2 * (N // 2)
            else:
                n = min(first_n + r, N - 1)
            starts[COPIES_X + i] = uint32(n * K)

    @cuda.jit(device=True)
    def copy_part(tiles, x, weight, starts, tile, stage, part):
        """Starts a STEPS-th of the copies of a tile along K into its stage, zeros past the end.
        Chunk q of row r lies at q ^ (r % 8): then ldmatrix meets no bank twice."""
        K, row, q = x.shape[1], cuda.threadIdx.x // 8, cuda.threadIdx.x % 8
        k = tile * TENSOR_K + q * 8
        size = uint32(16) if k < K else uint32(0)
        k = uint32(k) if k < K else uint32(0)
        # a thread's rows are a multiple of 8 apart: the same chunk in all of them
        place = one_register(uint32(stage + row * TENSOR_K + (q ^ (row & 7)) * 8))
        for j in range(COPIES_X_A_STEP):
            i = part * COPIES_X_A_STEP + j
            if i < COPIES_X:
                copy_async(tiles, place + i * ROWS_A_COPY * TENSOR_K, x, uint32(starts[i] + k),
                           size)
        for j in range(COPIES_W_A_STEP):
            i = part * COPIES_W_A_STEP + j
            if i < COPIES_W:
                copy_async(tiles, place + (TILE_T + i * ROWS_A_COPY) * TENSOR_K, weight,
                           uint32(starts[COPIES_X + i] + k), size)

    @cuda.jit(device=True)
    def load_fragments(a, b, half, tiles, stage, a_row, b_row, step):
        """The fragments of one step of 16 along K, into one half of the registers for them."""
        lane = cuda.threadIdx.x % WARP
        a_chunk = ((step * 2 + lane // 16) ^ (a_row & 7)) * 8
        b_chunk = ((step * 2 + lane // 8 % 2) ^ (b_row & 7)) * 8
        a_first = one_register(uint32(stage + a_row * TENSOR_K + a_chunk))
        b_first = one_register(uint32(stage + b_row * TENSOR_K + b_chunk))
        # four matrices are one fragment of A (16, 16), or two of B (8, 16): hence half as many
        for i in range(MMAS_T):
            load_matrices(a, half * A_WORDS + i * 4, tiles, a_first + i * 16 * TENSOR_K)
        for j in range(MMAS_N // 2):
            load_matrices(b, half * B_WORDS + j * 4, tiles, b_first + j * 16 * TENSOR_K)

    @cuda.jit(cache=True)
    def matmul_tensor_kernel(out, x, weight):
        """out[t,n] = sum_k x[t,k] * weight[n,k], or silu of the gate half times the up half

        out    (T, N) f16 bf16   written; (T, N/2) where gated
        x      (T, K) as out     every element read N / TILE_N times, through shared memory
        weight (N, K) as out     every element read T / TILE_T times
        launch grid (ceil(T / TILE_T), ceil(N / TILE_N)), thread block of WARPS_T * WARPS_N warps;
               one warp owns (WARP_T, WARP_N) of out, in registers
        shared 2*TENSOR_STAGES*(TILE_T + TILE_N)*TENSOR_K bytes: tiles of x and weight
        moves  E*(T*N + T*K + N*K) bytes, does 2*T*N*K flops: compute-bound
        needs  K % 8 == 0, N % 8 == 0 (16 where gated), max(T, N) * K < 2**32 (asserted), sm_80
        twin   matmul_ref, matmul_silu_mul_ref
        """
        tiles = cuda.shared.array(0, uint16)
        acc = cuda.local.array(ACCUMULATORS, float32)
        a = cuda.local.array(TWO_A_WORDS, uint32)
        b = cuda.local.array(TWO_B_WORDS, uint32)
        starts = cuda.local.array(COPIES, uint32)
        for i in range(ACCUMULATORS):
            acc[i] = ZERO
        lane, warp = cuda.threadIdx.x % WARP, cuda.threadIdx.x // WARP
        # neighbouring thread blocks differ in t: they share a tile of weight, through the L2
        first_t, first_n = cuda.blockIdx.x * TILE_T, cuda.blockIdx.y * TILE_N
        warp_t, warp_n = warp // WARPS_N * WARP_T, warp % WARPS_N * WARP_N
        # the rows whose addresses this lane gives to ldmatrix
        a_row, b_row = warp_t + lane % 16, TILE_T + warp_n + lane % 8 + lane // 16 * 8
        num_tiles = ceil_div_int(x.shape[1], TENSOR_K)
        first_elements(starts, x, weight, first_t, first_n)
        start_next_kernel()
        wait_for_inputs()

        # they take turns: one is multiplied, the next lands, the third is filled
        stage, next_stage, free_stage = 0, STAGE, 2 * STAGE
        for tile in range(TENSOR_STAGES - 1):
            for part in range(STEPS):
                copy_part(tiles, x, weight, starts, tile, tile * STAGE, part)
            copies_commit()
        copies_wait_but_1()
        cuda.syncthreads()                 # tile 0 has landed for all threads
        load_fragments(a, b, 0, tiles, stage, a_row, b_row, 0)
        for tile in range(num_tiles):
            for step in range(STEPS):
                # the next fragments arrive while these are multiplied
                if step + 1 < STEPS:
                    load_fragments(a, b, (step + 1) % 2, tiles, stage, a_row, b_row, step + 1)
                else:
                    copies_wait_all()      # those of tile + 1: tile + 2 is no group yet
                    cuda.syncthreads()     # it has landed for all; nobody reads this tile again
                    load_fragments(a, b, 0, tiles, next_stage, a_row, b_row, 0)
                # two tiles ahead, into the stage that all have left
                copy_part(tiles, x, weight, starts, tile + 2, free_stage, step)
                if step + 1 == STEPS:
                    copies_commit()
                for i in range(MMAS_T):
                    for j in range(MMAS_N):
                        mma(acc, (i * MMAS_N + j) * 4, a, step % 2 * A_WORDS + i * 4,
                            b, step % 2 * B_WORDS + j * 2, x)
            stage, next_stage, free_stage = next_stage, free_stage, stage

        # lane l holds columns 2*(l%4) and the next of rows l//4 and l//4 + 8 of each (16, 8)
        T, N = out.shape
        for i in range(MMAS_T):
            for half in range(2):
                t = first_t + warp_t + i * 16 + half * 8 + lane // 4
                for j in range(0, MMAS_N, 2 if GATED else 1):
                    n = first_n + warp_n + j * 8
                    first = (i * MMAS_N + j) * 4 + half * 2
                    low, high = acc[first], acc[first + 1]
                    if GATED:              # 8 columns of gate stand beside the same 8 of up
                        n = n // 2
                        low = silu(low) * acc[first + 4]
                        high = silu(high) * acc[first + 5]
                    n += lane % 4 * 2
                    if t < T and n < N:
                        store_word(out, t * N + n, pack(low, high, out))
    return matmul_tensor_kernel


# (TILE_T, TILE_N, WARPS_T, WARPS_N) -> relative speed, and the length along K that filling and
# emptying its pipeline costs: larger tiles read less for each multiplication, smaller ones leave
# less of the chip idle, and where two fit a multiprocessor one works while the other fills
TENSOR_TILES = {(16, 32, 1, 2): (1.0, 0)} if SIMULATOR else {
    (128, 256, 2, 4): (1.03, 256), (128, 128, 2, 2): (1.0, 128), (128, 96, 2, 2): (0.88, 128),
    (64, 128, 2, 2): (0.8, 128), (64, 64, 2, 2): (0.65, 64)}
MATMUL_TENSOR = {(tile, gated): make_matmul_tensor(*tile, gated)
                 for tile in TENSOR_TILES for gated in (False, True)}


def tensor_shared(tile):
    """Bytes of shared memory of a thread block."""
    return 2 * TENSOR_STAGES * (tile[0] + tile[1]) * TENSOR_K


def pick_tile(T, N, K, multiprocessors, shared):
    """Of the tiles that fit into shared memory the one that is done first, if the busiest
    multiprocessor decides."""
    def cost(tile):
        speed, fill = TENSOR_TILES[tile]
        tiles = ceil_div(T, tile[0]) * ceil_div(N, tile[1])
        return ceil_div(tiles, multiprocessors) * tile[0] * tile[1] * (K + fill) / speed
    return min((tile for tile in TENSOR_TILES if tensor_shared(tile) <= shared), key=cost)


def matmul_tensor(out, x, weight, stream=0, gated=False):
    T, N, K = matmul_shapes(out, x, weight, gated)
    unit = 16 if gated else 8
    assert K % 8 == 0 and N % unit == 0, f"K {K} must be a multiple of 8, N {N} of {unit}"
    assert max(T, N) * K < 1 << 32, f"{max(T, N)} rows of {K}: elements are counted in 32 bits"
    tile = min(TENSOR_TILES)
    if not SIMULATOR:
        gpu = cuda.get_current_device()
        tile = pick_tile(T, N, K, gpu.MULTIPROCESSOR_COUNT, gpu.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
    TILE_T, TILE_N, WARPS_T, WARPS_N = tile
    grid, threads = (ceil_div(T, TILE_T), ceil_div(N, TILE_N)), WARP * WARPS_T * WARPS_N
    launch(MATMUL_TENSOR[tile, gated], grid, threads, stream, tensor_shared(tile), out, x, weight)


def matmul_silu_mul_tensor(out, x, weight, scratch, stream=0):
    """The gate and up products meet in registers: scratch is not needed."""
    matmul_tensor(out, x, weight, stream, gated=True)


# ---- fourth rung: Hopper ----
#
# One thread fills a ring of stages, each a tile of x and one of weight, 64 along K; two warpgroups
# multiply them where they lie, 64 tokens each. A thread block stays, and takes one tile of out
# after the other: the ring is full again before the last sums of a tile are stored.

WGMMA_T, RING_STAGES = 128, 4              # tokens of a tile; tiles along K under way
RING_GROUP = 16                            # tiles of tokens that share a tile of weight in the L2
RING_EMPTY = RING_STAGES                   # barriers: full[i] from 0 on, empty[i] from here on
RING_BARRIERS = 2 * RING_STAGES
WGMMA_WARPS = 8                            # that multiply: two warpgroups


def wgmma_stage_words(TILE_N):
    """Words of a stage: 64 elements of each token and of each row of weight."""
    return (WGMMA_T + TILE_N) * 32


def make_matmul_wgmma(TILE_N, GATED):
    """The kernel for tiles of TILE_N rows of weight; GATED folds SwiGLU into its last stage."""
    wgmma, wgmma_wait = WGMMA[TILE_N].add, WGMMA[TILE_N].wait
    STAGE, ACCUMULATORS = wgmma_stage_words(TILE_N), TILE_N // 2

    @cuda.jit(device=True)
    def tile_of(item, tiles_t, tiles_n):
        """(t, n) of a tile: RING_GROUP tiles of tokens by all of weight, then the next tokens."""
        group = int64(divide(uint32(item), uint32(RING_GROUP * tiles_n)))
        first = group * RING_GROUP
        height, rest = min(RING_GROUP, tiles_t - first), item - first * tiles_n
        n = int64(divide(uint32(rest), uint32(height)))
        return first + rest - n * height, n

    @cuda.jit(device=True)
    def copy_weights(ring, at, weight_map, n, step, barriers, stage):
        """Announces all bytes of a stage, and starts the copy of its rows of weight."""
        barrier_expect(barriers, stage, uint32(STAGE * 4))
        at, k = at + WGMMA_T * 32, uint32(step * 64)
        if GATED:
            copy_box_5d(ring, at, weight_map, 0, k, uint32(0), uint32(0),
                        uint32(n * (TILE_N // 16)), uint32(0), barriers, stage)
        else:
            copy_box_3d(ring, at, weight_map, 0, k, uint32(n * TILE_N), uint32(0), barriers, stage)

    @cuda.jit(device=True)
    def fill_ring(ring, first, barriers, x_map, weight_map, tiles_t, tiles_n, steps):
        """What the copying thread does. Weights are nobody's output: those of the first stages come
        while the kernel before still ends."""
        stage, parity, there = 0, uint32(1), min(steps, RING_STAGES)
        _, n = tile_of(cuda.blockIdx.x, tiles_t, tiles_n)
        for step in range(there):
            copy_weights(ring, first + step * STAGE, weight_map, n, step, barriers, step)
        wait_for_inputs()
        for item in range(cuda.blockIdx.x, tiles_t * tiles_n, cuda.gridDim.x):
            t, n = tile_of(item, tiles_t, tiles_n)
            for step in range(steps):
                at = first + stage * STAGE
                if there > 0:
                    there -= 1
                else:
                    await_barrier(barriers, RING_EMPTY + stage, parity)
                    copy_weights(ring, at, weight_map, n, step, barriers, stage)
                copy_box_3d(ring, at, x_map, 0, uint32(step * 64), uint32(t * WGMMA_T), uint32(0),
                            barriers, stage)
                stage, parity = next_stage(stage, parity, RING_STAGES)

    @cuda.jit(device=True)
    def store_tile(out, acc, t, n):
        """Lane l holds columns 2*(l%4) and the next of rows l//4 and l//4 + 8 of each 8 columns.
        Four lanes turn 32 columns so that each stores 16 bytes: memory takes whole sectors of 32,
        and half of one costs as much."""
        words = cuda.local.array(4, uint32)
        T, N = out.shape
        t += cuda.threadIdx.x // WARP * 16 + cuda.threadIdx.x % WARP // 4
        n += cuda.threadIdx.x % 4 * 8
        for half in range(2):
            at = t * N + n
            for j in range(0, TILE_N // (16 if GATED else 8), 4):
                for i in range(4):
                    if GATED:              # 8 columns of gate stand beside the same 8 of up
                        c = (j + i) * 8 + half * 2
                        words[i] = pack(silu(acc[c]) * acc[c + 4], silu(acc[c + 1]) * acc[c + 5],
                                        out)
                    else:
                        c = (j + i) * 4 + half * 2
                        words[i] = pack(acc[c], acc[c + 1], out)
                transpose_quad(words)
                if t < T and n + j * 8 < N:
                    store_16_bytes(out, at + j * 8, words, 0)
            t += 8

    @cuda.jit(cache=True, **THREE_WARPGROUPS)
    def matmul_wgmma_kernel(out, x_map, weight_map, steps, tiles_t, tiles_n):
        """out[t,n] = sum_k x[t,k] * weight[n,k], or silu of the gate half times the up half

        out        (T, N) f16 bf16   written; (T, N/2) where gated
        x_map, weight_map (16,) u64  read: of boxes of WGMMA_T and TILE_N rows
        launch grid of one thread block for each multiprocessor, thread block of WGMMA_WARPS warps
               and a warpgroup, one thread of which works; a warpgroup owns 64 tokens of a tile, in
               registers
        shared up to 1 KB to align, then RING_STAGES stages of 128 tokens and TILE_N rows of weight
        moves  E*(T*N + T*K + N*K) bytes, does 2*T*N*K flops: compute-bound
        needs  K % 8 == 0, N % 8 == 0 (16 where gated), sm_90a   (asserted in the launcher)
        twin   matmul_ref, matmul_silu_mul_ref
        """
        ring = cuda.shared.array(0, uint32)
        barriers = cuda.shared.array(RING_BARRIERS, uint64)
        acc = cuda.local.array(ACCUMULATORS, float32)
        tid = cuda.threadIdx.x
        first = first_of_ring(ring, 0)
        if tid == 0:
            for stage in range(RING_STAGES):
                barrier_init(barriers, stage, uint32(1))
                barrier_init(barriers, RING_EMPTY + stage, uint32(WGMMA_WARPS))
            barriers_ready()
        cuda.syncthreads()                 # else a thread uses a barrier that is not there yet
        start_next_kernel()
        if tid >= WGMMA_WARPS * WARP:
            few_registers()
            if tid == WGMMA_WARPS * WARP:
                fill_ring(ring, first, barriers, x_map, weight_map, tiles_t, tiles_n, steps)
            return
        many_registers()
        wait_for_inputs()
        lane, rows = tid % WARP, first + tid // (4 * WARP) * 64 * 32       # of x, in stage 0
        weights = first + WGMMA_T * 32
        stage, parity, used = 0, uint32(0), 0
        for item in range(cuda.blockIdx.x, tiles_t * tiles_n, cuda.gridDim.x):
            for i in range(ACCUMULATORS):
                acc[i] = ZERO
            for step in range(steps):
                await_barrier(barriers, stage, parity)
                wgmma(acc, 0, ring, rows + stage * STAGE, ring, weights + stage * STAGE, out)
                if lane == 0 and step > 0:             # of the step before, which is done
                    barrier_arrive(barriers, RING_EMPTY + used)
                used = stage
                stage, parity = next_stage(stage, parity, RING_STAGES)
            wgmma_wait(acc, 0)
            if lane == 0:
                barrier_arrive(barriers, RING_EMPTY + used)
            t, n = tile_of(item, tiles_t, tiles_n)
            store_tile(out, acc, t * WGMMA_T, n * (TILE_N // 2 if GATED else TILE_N))
    return matmul_wgmma_kernel


WGMMA_TILES = (64,) if SIMULATOR else (64, 128, 192, 256)
MATMUL_WGMMA = {(TILE_N, gated): make_matmul_wgmma(TILE_N, gated)
                for TILE_N in WGMMA_TILES for gated in (False, True)}
TENSOR_MAPS = {}                           # on the device, never freed: see DECODE_MAPS


def map_on_device(array, *description):
    """The tensor map of an array on the device, made once for each place and shape."""
    key = address_of(array), array.shape, description
    if key not in TENSOR_MAPS:
        words = np.array(tensor_map(array, *description), np.uint64)
        TENSOR_MAPS[key] = words if SIMULATOR else cuda.to_device(words)
    return TENSOR_MAPS[key]


def pick_wgmma_tile(T, N, multiprocessors):
    """The tile with which the busiest multiprocessor is done first. Of a narrow one the copies take
    longer than the sums: measured, as long as 85 rows of weight more."""
    def cost(TILE_N):
        tiles = ceil_div(T, WGMMA_T) * ceil_div(N, TILE_N)
        return ceil_div(tiles, multiprocessors) * (TILE_N + 85)
    return min(reversed(WGMMA_TILES), key=cost)


def matmul_wgmma(out, x, weight, stream=0, gated=False):
    T, N, K = matmul_shapes(out, x, weight, gated)
    unit = 16 if gated else 8
    assert K % 8 == 0 and N % unit == 0, f"K {K} must be a multiple of 8, N {N} of {unit}"
    multiprocessors = num_multiprocessors()
    TILE_N = pick_wgmma_tile(T, N, multiprocessors)
    x_map = map_on_device(x, (K, T, 1), (1, K, T * K), (64, WGMMA_T, 1))
    if gated:                              # 8 rows of gate, the same 8 of up, then the next
        weight_map = map_on_device(weight, (K, 8, 2, N // 16, 1),
                                   (1, K, N // 2 * K, 8 * K, N * K), (64, 8, 2, TILE_N // 16, 1))
    else:
        weight_map = map_on_device(weight, (K, N, 1), (1, K, N * K), (64, TILE_N, 1))
    tiles_t, tiles_n = ceil_div(T, WGMMA_T), ceil_div(N, TILE_N)
    threads = WGMMA_WARPS * WARP + (WARP if SIMULATOR else 4 * WARP)      # a warpgroup has no half
    shared = 1024 + 4 * RING_STAGES * wgmma_stage_words(TILE_N)
    launch(MATMUL_WGMMA[TILE_N, gated], min(multiprocessors, tiles_t * tiles_n), threads, stream,
           shared, out, x_map, weight_map, np.int32(ceil_div(K, 64)), np.int32(tiles_t),
           np.int32(tiles_n))


def matmul_silu_mul_wgmma(out, x, weight, scratch, stream=0):
    """The gate and up products meet in registers: scratch is not needed."""
    matmul_wgmma(out, x, weight, stream, gated=True)


# ---- decode, first rung: a warp for an output ----


@cuda.jit(cache=True)
def matmul_warp_kernel(out, x, weight):
    """out[t,n] = sum_k x[t,k] * weight[n,k]

    out    (T, N) f32 f16 bf16   written
    x      (T, K) f32 f16 bf16   every element read N times, from the cache
    weight (N, K) as x           every element read T times
    launch grid (T, ceil(N / warps)), thread block THREADS; one warp owns one out[t,n], its lanes
           read neighbouring elements of the row
    moves  E*(T*N + T*K + N*K) bytes, does 2*T*N*K flops: bandwidth-bound, once for each token
    twin   matmul_ref
    """
    start_next_kernel()
    wait_for_inputs()
    lane, warp = cuda.threadIdx.x % WARP, cuda.threadIdx.x // WARP
    t, n = cuda.blockIdx.x, cuda.blockIdx.y * (THREADS // WARP) + warp
    if n < weight.shape[0]:
        acc = ZERO
        for k in range(lane, weight.shape[1], WARP):
            acc += widen(x[t, k]) * widen(weight[n, k])
        acc = warp_sum(acc)
        if lane == 0:
            out[t, n] = narrow(acc, out)


def matmul_warp(out, x, weight, stream=0):
    T, N, _ = matmul_shapes(out, x, weight)
    matmul_warp_kernel[(T, ceil_div(N, THREADS // WARP)), THREADS, stream](out, x, weight)


# ---- decode, second rung: weights streamed once through the tensor cores ----
#
# The weights are the (16, 16) operand of mma and up to 64 tokens the other. Each lane loads 16
# bytes of a row straight into the registers of two fragments: which k stands where in a fragment
# does not matter, as long as it is the same for both operands. No shared memory, no repacking.

STREAM_WARPS = 2 if SIMULATOR else 8       # share the K of a thread block's rows
STREAM_LOADS = 8                           # chunks of 32 along K, loaded before the first is used
STREAM_TOKENS = 64                         # tokens of one pass over the weights


# floats from one token's partial sums to the next's: 4 more than there are, which keeps the lanes
# out of each other's banks
STREAM_PITCH = 16 + 4


def make_matmul_streamed(MMAS_T, GATED):
    """The kernel for 8 * MMAS_T tokens; GATED folds SwiGLU into its last stage."""
    LOADS = STREAM_LOADS if MMAS_T < 8 else STREAM_LOADS // 2          # registers are finite
    WORDS = LOADS * 8
    ACCUMULATORS = MMAS_T * 4
    PARTIAL = MMAS_T * 8 * STREAM_PITCH

    @cuda.jit(device=True)
    def load_weights(words, weight, upper, lower, k, end):
        """16 bytes of two rows from each of the next chunks; past the end, the first again."""
        K = weight.shape[1]
        for i in range(LOADS):
            at = k + i * 32 if k + i * 32 < end else k if k < end else 0
            load_once(words, i * 8, weight, upper * K + at)
            load_once(words, i * 8 + 4, weight, lower * K + at)

    @cuda.jit(cache=True)
    def matmul_streamed_kernel(out, x, weight):
        """out[t,n] = sum_k x[t,k] * weight[n,k], or silu of the gate half times the up half

        out    (T, N) f32 f16 bf16   written; (T, N/2) where gated
        x      (T, K) f16 bf16       read from the cache by each thread block
        weight (N, K) as x           every element read once for 64 tokens
        launch grid (ceil(N / 16), ceil(T / 64)), thread block of STREAM_WARPS warps; a thread block
               owns 16 rows of weight, a warp a share of their K
        shared 32*STREAM_WARPS*MMAS_T*STREAM_PITCH bytes: a partial sum of every warp and output
        moves  E*(T*N + T*K + N*K) bytes, does 2*T*N*K flops: bandwidth-bound
        needs  K % 8 == 0, N % 2 == 0 where gated   (asserted in the launcher), sm_80
        twin   matmul_ref, matmul_silu_mul_ref
        """
        partial = cuda.shared.array(0, float32)
        words = cuda.local.array(WORDS, uint32)
        x_words = cuda.local.array(4, uint32)
        a = cuda.local.array(4, uint32)
        acc = cuda.local.array(ACCUMULATORS, float32)
        for i in range(ACCUMULATORS):
            acc[i] = ZERO
        tid, lane, warp = cuda.threadIdx.x, cuda.threadIdx.x % WARP, cuda.threadIdx.x // WARP
        (T, K), N = x.shape, weight.shape[0]
        first_t = cuda.blockIdx.y * STREAM_TOKENS
        if GATED:                          # the upper 8 rows are gate, the lower 8 their up
            upper = min(cuda.blockIdx.x * 8 + lane // 4, N // 2 - 1)
            lower = upper + N // 2
        else:                              # rows past the end repeat the last: never stored
            upper = min(cuda.blockIdx.x * 16 + lane // 4, N - 1)
            lower = min(cuda.blockIdx.x * 16 + 8 + lane // 4, N - 1)
        # lane l holds 8 elements from k = 8*(l%4) of each chunk of 32
        share = ceil_div_int(ceil_div_int(K, 32), STREAM_WARPS) * 32
        k, end = warp * share + lane % 4 * 8, min((warp + 1) * share, K)
        start_next_kernel()
        load_weights(words, weight, upper, lower, k, end)
        wait_for_inputs()                  # the weights are on their way; x may not be written yet

        while k - lane % 4 * 8 < end:      # the same for all lanes: mma takes whole warps
            for i in range(LOADS):
                at = k + i * 32
                for j in range(MMAS_T):
                    t = min(first_t + j * 8 + lane // 4, T - 1)
                    load_16_bytes(x_words, 0, x, t * K + (at if at < end else 0))
                    if at >= end:          # another warp's share, or past the end: counts nothing
                        for w in range(4):
                            x_words[w] = uint32(0)
                    for pair in range(2):
                        for w in range(2):
                            a[w * 2] = words[i * 8 + pair * 2 + w]
                            a[w * 2 + 1] = words[i * 8 + 4 + pair * 2 + w]
                        mma(acc, j * 4, a, 0, x_words, pair * 2, x)
            k += LOADS * 32
            if k - lane % 4 * 8 < end:
                load_weights(words, weight, upper, lower, k, end)

        # partial[warp, t, row]: lane l holds rows l//4 and l//4 + 8 of tokens 2*(l%4) and the next
        for j in range(MMAS_T):
            for i in range(4):
                t, row = j * 8 + lane % 4 * 2 + i % 2, lane // 4 + i // 2 * 8
                partial[warp * PARTIAL + t * STREAM_PITCH + row] = acc[j * 4 + i]
        cuda.syncthreads()                 # else a thread adds a partial sum that is not written
        rows = 8 if GATED else 16
        for i in range(tid, MMAS_T * 8 * rows, WARP * STREAM_WARPS):
            t, row = i // rows, i % rows
            total, up = ZERO, ZERO
            for w in range(STREAM_WARPS):
                total += partial[w * PARTIAL + t * STREAM_PITCH + row]
                if GATED:
                    up += partial[w * PARTIAL + t * STREAM_PITCH + row + 8]
            if GATED:
                total = silu(total) * up
            n = cuda.blockIdx.x * rows + row
            if first_t + t < T and n < out.shape[1]:
                out[first_t + t, n] = narrow(total, out)
    return matmul_streamed_kernel


MATMUL_STREAMED = {(mmas, gated): make_matmul_streamed(mmas, gated)
                   for mmas in (1, 2, 4, 8) for gated in (False, True)}


def matmul_streamed(out, x, weight, stream=0, gated=False):
    T, N, K = matmul_shapes(out, x, weight, gated)
    assert K % 8 == 0, f"K {K} must be a multiple of 8"
    assert N % 2 == 0 or not gated, f"N {N} has no two halves"
    mmas = min(mmas for mmas in (1, 2, 4, 8) if mmas * 8 >= min(T, STREAM_TOKENS))
    grid = (ceil_div(N, 16), ceil_div(T, STREAM_TOKENS))
    shared = 4 * STREAM_WARPS * mmas * 8 * STREAM_PITCH
    launch(MATMUL_STREAMED[mmas, gated], grid, WARP * STREAM_WARPS, stream, shared, out, x, weight)


def matmul_silu_mul_streamed(out, x, weight, scratch, stream=0):
    """The gate and up products meet in the thread block that made both: scratch is not needed."""
    matmul_streamed(out, x, weight, stream, gated=True)


# ---- SwiGLU where nothing is fused ----


def matmul_silu_mul_naive(out, x, weight, scratch, stream=0):
    matmul_naive(scratch, x, weight, stream)
    silu_mul(out, scratch, stream)


def matmul_silu_mul_tiled(out, x, weight, scratch, stream=0):
    matmul_tiled(scratch, x, weight, stream)
    silu_mul(out, scratch, stream)


def matmul_silu_mul_warp(out, x, weight, scratch, stream=0):
    matmul_warp(scratch, x, weight, stream)
    silu_mul(out, scratch, stream)


# -----------------------------------------------------------------------------
# 6. RoPE, and writing K and V into their blocks           (lessons 6 and 11)


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

    qk        (T, H+G, D)      f32 f16 bf16   read and written; may be a strided view
    cos, sin  (positions, D/2) f32            one row read per token
    positions (T,)             i32            read
    launch grid (T, H+G), thread block WARP; one thread owns whole pairs
    moves  2*T*(H+G)*D*E bytes, does 3*T*(H+G)*D flops: bandwidth-bound
    twin   rope_ref      paper  arXiv:2104.09864
    """
    start_next_kernel()
    wait_for_inputs()
    t, h, half = cuda.blockIdx.x, cuda.blockIdx.y, cos.shape[1]
    for i in range(cuda.threadIdx.x, half, cuda.blockDim.x):
        c, s = cos[positions[t], i], sin[positions[t], i]
        low, high = widen(qk[t, h, i]), widen(qk[t, h, i + half])
        qk[t, h, i] = narrow(low * c - high * s, qk)
        qk[t, h, i + half] = narrow(high * c + low * s, qk)


def rope(qk, cos, sin, positions, stream=0):
    T, heads, D = qk.shape
    assert cos.shape == sin.shape and 2 * cos.shape[1] == D, (qk.shape, cos.shape, sin.shape)
    assert positions.shape == (T,), (qk.shape, positions.shape)
    rope_kernel[(T, heads), WARP, stream](qk, cos, sin, positions)


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

    k_cache, v_cache (blocks, P, G, D) f32 f16 bf16   T slots written
    k, v             (T, G, D)         as the cache   read; may be strided views
    slots            (T,)              i32            read
    launch grid (T, G), thread block WARP; one thread block owns one head of one token
    moves  4*T*G*D*E bytes, does 0 flops: bandwidth-bound
    twin   write_kv_ref      paper  arXiv:2309.06180
    """
    start_next_kernel()
    wait_for_inputs()
    t, g, P = cuda.blockIdx.x, cuda.blockIdx.y, k_cache.shape[1]
    block, offset = slots[t] // P, slots[t] % P
    for d in range(cuda.threadIdx.x, k.shape[2], cuda.blockDim.x):
        k_cache[block, offset, g, d] = k[t, g, d]
        v_cache[block, offset, g, d] = v[t, g, d]


def write_kv(k_cache, v_cache, k, v, slots, stream=0):
    T, G, D = k.shape
    assert v.shape == k.shape and k_cache.shape[2:] == (G, D), (k.shape, v.shape, k_cache.shape)
    assert k_cache.shape == v_cache.shape and slots.shape == (T,), (v_cache.shape, slots.shape)
    write_kv_kernel[(T, G), WARP, stream](k_cache, v_cache, k, v, slots)


def rope_shapes(qkv, k_cache, v_cache, cos, sin, positions, slots):
    """(T, H+2G, D) of a rotation with its caches, whose operands must agree."""
    (T, heads, D), G = qkv.shape, k_cache.shape[2]
    assert k_cache.shape == v_cache.shape and k_cache.shape[3] == D and heads > 2 * G, (
        qkv.shape, k_cache.shape, v_cache.shape)
    assert cos.shape == sin.shape and 2 * cos.shape[1] == D, (qkv.shape, cos.shape, sin.shape)
    assert positions.shape == slots.shape == (T,), (qkv.shape, positions.shape, slots.shape)
    return T, heads, D


def rope_write_kv_ref(qkv, k_cache, v_cache, cos, sin, positions, slots):
    """Rotates q in place, and writes k, rotated, and v into their blocks.

    qkv (T, H+2G, D): the heads of q, then k, then v; the rest as in rope_ref and write_kv_ref.
    """
    G = k_cache.shape[2]
    H = qkv.shape[1] - 2 * G
    rope_ref(qkv[:, :H + G], cos, sin, positions)
    write_kv_ref(k_cache, v_cache, qkv[:, H:H + G], qkv[:, H + G:], slots)


def rope_write_kv_unfused(qkv, k_cache, v_cache, cos, sin, positions, slots, stream=0):
    G = k_cache.shape[2]
    H = qkv.shape[1] - 2 * G
    rope(qkv[:, :H + G], cos, sin, positions, stream)
    write_kv(k_cache, v_cache, qkv[:, H:H + G], qkv[:, H + G:], slots, stream)


ROPE_HEADS = 1 if SIMULATOR else 8         # heads of a thread block


@cuda.jit(cache=True)
def rope_write_kv_kernel(qkv, k_cache, v_cache, cos, sin, positions, slots):
    """q and k rotated as in rope_kernel, and k and v written as in write_kv_kernel

    qkv              (T, H+2G, D)      f32 f16 bf16   q, k and v read, q and k written
    k_cache, v_cache (blocks, P, G, D) as qkv         T slots written
    cos, sin         (positions, D/2)  f32            one row read per token
    positions, slots (T,)              i32            read
    launch grid (T, ceil((H+2G) / ROPE_HEADS)), thread block (WARP, ROPE_HEADS); one row of threads
           owns one head of one token
    moves  2*T*(H+2*G)*D*E + T*G*D*E bytes, does 3*T*(H+G)*D flops: bandwidth-bound
    twin   rope_write_kv_ref      paper  arXiv:2104.09864, arXiv:2309.06180
    """
    start_next_kernel()
    wait_for_inputs()
    t, half = cuda.blockIdx.x, cos.shape[1]
    h = cuda.blockIdx.y * ROPE_HEADS + cuda.threadIdx.y
    P, G = k_cache.shape[1], k_cache.shape[2]
    H = qkv.shape[1] - 2 * G
    if h >= H + 2 * G:
        return
    block, offset = slots[t] // P, slots[t] % P
    for i in range(cuda.threadIdx.x, half, WARP):
        low, high = qkv[t, h, i], qkv[t, h, i + half]
        if h >= H + G:
            v_cache[block, offset, h - H - G, i] = low
            v_cache[block, offset, h - H - G, i + half] = high
        else:
            c, s = cos[positions[t], i], sin[positions[t], i]
            turned_low = narrow(widen(low) * c - widen(high) * s, qkv)
            turned_high = narrow(widen(high) * c + widen(low) * s, qkv)
            qkv[t, h, i], qkv[t, h, i + half] = turned_low, turned_high
            if h >= H:
                k_cache[block, offset, h - H, i] = turned_low
                k_cache[block, offset, h - H, i + half] = turned_high


def rope_write_kv(qkv, k_cache, v_cache, cos, sin, positions, slots, stream=0):
    T, heads, D = rope_shapes(qkv, k_cache, v_cache, cos, sin, positions, slots)
    grid, threads = (T, ceil_div(heads, ROPE_HEADS)), (WARP, ROPE_HEADS)
    rope_write_kv_kernel[grid, threads, stream](qkv, k_cache, v_cache, cos, sin, positions, slots)


@cuda.jit(cache=True)
def rope_write_kv_wide_kernel(qkv, k_cache, v_cache, cos, sin, positions, slots):
    """rope_write_kv_kernel with 16 bytes in each load and store

    qkv              (T, H+2G, D)      f16 bf16   q, k and v read, q and k written
    k_cache, v_cache (blocks, P, G, D) as qkv     T slots written
    cos, sin         (positions, D/2)  f32        one row read per token
    positions, slots (T,)              i32        read
    launch grid T, thread block THREADS; one thread owns 8 channels of each half of a head
    moves  2*T*(H+2*G)*D*E + T*G*D*E bytes, does 3*T*(H+G)*D flops: bandwidth-bound
    needs  D % 16 == 0   (asserted in the launcher)
    twin   rope_write_kv_ref      paper  arXiv:2104.09864, arXiv:2309.06180
    """
    lows = cuda.local.array(4, uint32)
    highs = cuda.local.array(4, uint32)
    c = cuda.local.array(8, float32)
    s = cuda.local.array(8, float32)
    start_next_kernel()
    wait_for_inputs()
    t, heads, half, G = cuda.blockIdx.x, qkv.shape[1], cos.shape[1], k_cache.shape[2]
    position, slot, D, H = positions[t], int64(slots[t]), 2 * half, heads - 2 * G
    for unit in range(cuda.threadIdx.x, heads * (half // 8), THREADS):
        h = int64(divide(uint32(unit), uint32(half // 8)))
        i = (unit - h * (half // 8)) * 8
        at = (t * heads + h) * D + i
        load_16_bytes(lows, 0, qkv, at)
        load_16_bytes(highs, 0, qkv, at + half)
        if h < H + G:
            for n in range(0, 8, 4):
                load_4_floats(c, n, cos, position * half + i + n)
                load_4_floats(s, n, sin, position * half + i + n)
            for n in range(4):
                low, low_1 = low_element(lows[n], qkv), high_element(lows[n], qkv)
                high, high_1 = low_element(highs[n], qkv), high_element(highs[n], qkv)
                lows[n] = pack(low * c[2 * n] - high * s[2 * n],
                               low_1 * c[2 * n + 1] - high_1 * s[2 * n + 1], qkv)
                highs[n] = pack(high * c[2 * n] + low * s[2 * n],
                                high_1 * c[2 * n + 1] + low_1 * s[2 * n + 1], qkv)
            store_16_bytes(qkv, at, lows, 0)
            store_16_bytes(qkv, at + half, highs, 0)
        if h >= H:
            cache, g = k_cache, h - H
            if h >= H + G:
                cache, g = v_cache, h - H - G
            at = (slot * G + g) * D + i
            store_16_bytes(cache, at, lows, 0)
            store_16_bytes(cache, at + half, highs, 0)


def rope_write_kv_wide(qkv, k_cache, v_cache, cos, sin, positions, slots, stream=0):
    T, _, D = rope_shapes(qkv, k_cache, v_cache, cos, sin, positions, slots)
    assert D % 16 == 0, f"head_dim is {D}, expected a multiple of 16"
    launch(rope_write_kv_wide_kernel, T, THREADS, stream, 0, qkv, k_cache, v_cache, cos, sin,
           positions, slots)


# -----------------------------------------------------------------------------
# 7. Attention over the paged cache                       (lessons 10 and 12)
#
# Invariant of each kernel: a query meets its keys in tiles that begin at multiples of a constant,
# from position 0 on, so neither chunks of a prompt nor other requests change the order of its sums.

QUERY_ROWS = 256     # queries whose scores the twin holds at once: bounds memory at (H, 256, S)


def paged_attention_ref(out, qkv, k_cache, v_cache, block_tables, rows, query_starts, seq_lens,
                        *workspace):
    """out[t,h] = sum_s softmax_s(q[t,h] . k[s,g] / sqrt(D)) v[s,g], over s up to t's own position.

    out                   (T, H, D)
    qkv                   (T, H+2G, D), of which the first H heads, q, are read
    k_cache, v_cache      (blocks, P, G, D)
    block_tables          (rows, max blocks) int32: where the i-th block of each context lies
    rows                  (B,) int32: request b's row of block_tables
    query_starts          (B+1,) int32: request b owns queries query_starts[b] to query_starts[b+1]
    seq_lens              (B,) int32: its context in tokens, this step's included. Its queries are
                          the last ones of it, so prefill, a chunk, and decode are one operation
    PagedAttention: arXiv:2309.06180. The workspace is that of the split-KV launcher.
    """
    (_, H, _), (_, P, G, D) = out.shape, k_cache.shape
    q = qkv[:, :H]
    for b in range(len(seq_lens)):
        S, start, end = int(seq_lens[b]), int(query_starts[b]), int(query_starts[b + 1])
        blocks = block_tables[rows[b], :ceil_div(S, P)]
        k = k_cache[blocks].reshape(-1, G, D).transpose(1, 2, 0)          # (G, D, padded S)
        v = v_cache[blocks].reshape(-1, G, D).transpose(1, 0, 2)          # (G, padded S, D)
        for tile in range(start, end, QUERY_ROWS):
            stop = min(tile + QUERY_ROWS, end)
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


def attention_shapes(out, qkv, k_cache, v_cache):
    """(T, H, G, D) of an attention, whose operands must agree."""
    (T, H, D), G = out.shape, k_cache.shape[2]
    assert qkv.shape == (T, H + 2 * G, D) and H % G == 0, (out.shape, qkv.shape, k_cache.shape)
    assert k_cache.shape == v_cache.shape and k_cache.shape[3] == D, (k_cache.shape, v_cache.shape)
    return T, H, G, D


@cuda.jit(device=True)
def request_of(t, query_starts):
    """The request whose query t is; past the last query, the number of requests."""
    b, B = 0, query_starts.shape[0] - 1
    while b < B and query_starts[b + 1] <= t:
        b += 1
    return b


# ---- first rung: three passes over the scores ----


@cuda.jit(device=True)
def score(qkv, k_cache, block_table, t, h, g, s):
    """q[t,h] . k[s,g] / sqrt(D), with k[s] found through the block table."""
    P, D = k_cache.shape[1], k_cache.shape[3]
    block, acc = block_table[s // P], ZERO
    for d in range(D):
        acc += widen(qkv[t, h, d]) * widen(k_cache[block, s % P, g, d])
    return acc / math.sqrt(float32(D))


@cuda.jit(cache=True)
def attention_threepass_kernel(out, qkv, k_cache, v_cache, block_tables, rows, query_starts,
                               seq_lens):
    """out[t,h] = sum_s exp(x_s - m) / l * v[s,g], m = max_s x_s, l = sum_s exp(x_s - m), x scores

    out              (T, H, D)         f32 f16 bf16   written
    qkv              (T, H+2G, D)      as out         q read
    k_cache, v_cache (blocks, P, G, D) as out         keys read 2 + D times, values once
    block_tables     (rows, blocks)    i32            read
    rows, seq_lens   (B,)              i32            read
    query_starts     (B+1,)            i32            read
    launch grid T, thread block H; one thread owns one query head of one token
    moves  2*T*H*D*E + T*H*S*D*E*(3+D) bytes, does 2*T*H*S*D*(3+D) flops: latency-bound
    needs  H <= 1024   (asserted in the launcher)
    twin   paged_attention_ref      paper  arXiv:2309.06180
    """
    start_next_kernel()
    wait_for_inputs()
    t, h = cuda.blockIdx.x, cuda.threadIdx.x
    P, G, D = k_cache.shape[1], k_cache.shape[2], k_cache.shape[3]
    g = h // (out.shape[1] // G)
    b = request_of(t, query_starts)
    if b == seq_lens.shape[0]:
        return
    table = block_tables[rows[b]]
    # the request's queries are the last of its context: t sees what is not behind itself
    S = seq_lens[b] - (query_starts[b + 1] - t) + 1

    m = NEG_INF
    for s in range(S):
        m = max(m, score(qkv, k_cache, table, t, h, g, s))
    l = ZERO
    for s in range(S):
        l += exp2((score(qkv, k_cache, table, t, h, g, s) - m) * LOG2E)
    for d in range(D):
        acc = ZERO
        for s in range(S):
            p = exp2((score(qkv, k_cache, table, t, h, g, s) - m) * LOG2E) / l
            acc += p * widen(v_cache[table[s // P], s % P, g, d])
        out[t, h, d] = narrow(acc, out)


def attention_threepass(out, qkv, k_cache, v_cache, block_tables, rows, query_starts, seq_lens,
                        *workspace, stream=0):
    T, H, G, D = attention_shapes(out, qkv, k_cache, v_cache)
    assert H <= 1024, f"one thread for each of {H} heads: at most 1024"
    attention_threepass_kernel[T, H, stream](out, qkv, k_cache, v_cache, block_tables, rows,
                                             query_starts, seq_lens)


# ---- second rung: online softmax ----

ONLINE_VALUES = 8                          # channels of a lane: D up to 8 * 32


@cuda.jit(cache=True)
def attention_online_kernel(out, qkv, k_cache, v_cache, block_tables, rows, query_starts,
                            seq_lens):
    """one pass: a new maximum m' rescales what was summed under m by exp(m - m')

    out              (T, H, D)         f32 f16 bf16   written
    qkv              (T, H+2G, D)      as out         q read
    k_cache, v_cache (blocks, P, G, D) as out         read once for each query head
    block_tables     (rows, blocks)    i32            read
    rows, seq_lens   (B,)              i32            read
    query_starts     (B+1,)            i32            read
    launch grid (T, H), thread block WARP; one warp owns one query head of one token, lane l its
           channels l, l + 32, ...
    moves  2*T*H*D*E + 2*T*H*S*D*E bytes, does 4*T*H*S*D flops: latency-bound
    needs  D <= 256   (asserted in the launcher)
    twin   paged_attention_ref      paper  arXiv:1805.02867
    """
    q = cuda.local.array(ONLINE_VALUES, float32)
    acc = cuda.local.array(ONLINE_VALUES, float32)
    start_next_kernel()
    wait_for_inputs()
    t, h, lane = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
    P, G, D = k_cache.shape[1], k_cache.shape[2], k_cache.shape[3]
    g = h // (out.shape[1] // G)
    b = request_of(t, query_starts)
    if b == seq_lens.shape[0]:
        return
    table = block_tables[rows[b]]
    S = seq_lens[b] - (query_starts[b + 1] - t) + 1
    for i in range(ONLINE_VALUES):
        d = lane + i * WARP
        q[i] = widen(qkv[t, h, d]) if d < D else ZERO
        acc[i] = ZERO
    m, l, scale = NEG_INF, ZERO, LOG2E / math.sqrt(float32(D))
    for s in range(S):
        block, offset, x = table[s // P], s % P, ZERO
        for i in range(ONLINE_VALUES):
            d = lane + i * WARP
            if d < D:
                x += q[i] * widen(k_cache[block, offset, g, d])
        x = warp_sum(x) * scale
        new_m = max(m, x)
        rescale, p = exp2(m - new_m), exp2(x - new_m)
        m, l = new_m, l * rescale + p
        for i in range(ONLINE_VALUES):
            d = lane + i * WARP
            if d < D:
                acc[i] = acc[i] * rescale + p * widen(v_cache[block, offset, g, d])
    for i in range(ONLINE_VALUES):
        d = lane + i * WARP
        if d < D:
            out[t, h, d] = narrow(acc[i] / l, out)


def attention_online(out, qkv, k_cache, v_cache, block_tables, rows, query_starts, seq_lens,
                     *workspace, stream=0):
    T, H, G, D = attention_shapes(out, qkv, k_cache, v_cache)
    assert D <= ONLINE_VALUES * WARP, f"head_dim is {D}, expected at most {ONLINE_VALUES * WARP}"
    attention_online_kernel[(T, H), WARP, stream](out, qkv, k_cache, v_cache, block_tables, rows,
                                                  query_starts, seq_lens)


# ---- third rung, prefill: tiles of queries and keys on the tensor cores ----

ATTENTION_WARPS = 1 if SIMULATOR else 4    # of 16 queries each


def attention_tile(D):
    """(queries, keys) of a tile."""
    return 16 * ATTENTION_WARPS, 64 if D <= 128 else 32


def make_attention_tiled(D):
    """The kernel for one head_dim, a multiple of 16 up to 256."""
    QUERIES, KEYS = attention_tile(D)
    # elements from row to row in shared memory: 16 bytes more than a row has, so ldmatrix meets no
    # bank twice
    PITCH = D + 8
    CHUNKS = KEYS * D // 8                 # of 16 bytes, in a tile of keys
    NUM_THREADS = WARP * ATTENTION_WARPS
    STEPS, KEY_MMAS, OUT_MMAS = D // 16, KEYS // 8, D // 8
    Q_WORDS, SCORES, OUTS = STEPS * 4, KEY_MMAS * 4, OUT_MMAS * 4

    @cuda.jit(device=True)
    def copy_keys(tiles, stage, k_cache, v_cache, table, g, first, S):
        """Starts the copies of a tile of keys and values; beyond the context, zeros."""
        P, G = k_cache.shape[1], k_cache.shape[2]
        for chunk in range(cuda.threadIdx.x, CHUNKS, NUM_THREADS):
            row, d = chunk // (D // 8), chunk % (D // 8) * 8
            s = first + row
            size = uint32(16) if s < S else uint32(0)
            s = s if s < S else 0
            source = ((table[s // P] * P + s % P) * G + g) * D + d
            place = (stage * 2 * KEYS + row) * PITCH + d
            copy_async(tiles, place, k_cache, source, size)
            copy_async(tiles, place + KEYS * PITCH, v_cache, source, size)

    @cuda.jit(cache=True)
    def attention_tiled_kernel(out, qkv, k_cache, v_cache, block_tables, rows, query_starts,
                               seq_lens):
        """FlashAttention: scores of a tile of queries and keys live and die in registers

        out              (T, H, D)         f16 bf16   written
        qkv              (T, H+2G, D)      as out     q read
        k_cache, v_cache (blocks, P, G, D) as out     read once for each tile of queries of a head
        block_tables     (rows, blocks)    i32        read
        rows, seq_lens   (B,)              i32        read
        query_starts     (B+1,)            i32        read
        launch grid (tiles of queries, H), thread block of ATTENTION_WARPS warps; one warp owns 16
               queries of a head: lane l holds rows l//4 and l//4 + 8 of every fragment
        shared 8*KEYS*(D+8) bytes: two stages of keys and values
        moves  2*T*H*D*E + 2*T*H*S*D*E/QUERIES bytes, does 4*T*H*S*D flops: compute-bound
        needs  D % 16 == 0, D <= 256   (asserted in the launcher), sm_80
        twin   paged_attention_ref      paper  arXiv:2205.14135, arXiv:2307.08691
        """
        # fragments: q (STEPS, 4) words, x (KEY_MMAS, 4), acc (OUT_MMAS, 4); of the 4, half * 2 + i
        # is row l//4 + 8 * half and column 2*(l%4) + i
        tiles = cuda.shared.array(0, uint16)
        q = cuda.local.array(Q_WORDS, uint32)
        x = cuda.local.array(SCORES, float32)
        acc = cuda.local.array(OUTS, float32)
        words = cuda.local.array(4, uint32)
        p = cuda.local.array(4, uint32)
        m = cuda.local.array(2, float32)
        l = cuda.local.array(2, float32)
        start_next_kernel()
        wait_for_inputs()
        h, lane, warp = cuda.blockIdx.y, cuda.threadIdx.x % WARP, cuda.threadIdx.x // WARP
        H, G, B = out.shape[1], k_cache.shape[2], seq_lens.shape[0]
        g = h // (H // G)
        # this thread block's tile: the requests' tiles are counted off one after another
        b, tile = 0, cuda.blockIdx.x
        while b < B and tile >= ceil_div_int(query_starts[b + 1] - query_starts[b], QUERIES):
            tile -= ceil_div_int(query_starts[b + 1] - query_starts[b], QUERIES)
            b += 1
        if b == B:
            return
        table = block_tables[rows[b]]
        first_t, end_t = query_starts[b] + tile * QUERIES, query_starts[b + 1]
        context = seq_lens[b] - (end_t - first_t)              # position of the tile's first query
        S = min(context + QUERIES, seq_lens[b])                # keys that its last query sees
        num_tiles = ceil_div_int(S, KEYS)

        copy_keys(tiles, 0, k_cache, v_cache, table, g, 0, S)
        copies_commit()
        # q as fragments, straight from memory; rows past the end repeat the last, never stored
        for half in range(2):
            t = min(first_t + warp * 16 + half * 8 + lane // 4, end_t - 1)
            for step in range(STEPS):
                at = (t * (H + 2 * G) + h) * D + step * 16 + lane % 4 * 2
                q[step * 4 + half] = load_word(qkv, at)
                q[step * 4 + half + 2] = load_word(qkv, at + 8)
            m[half], l[half] = NEG_INF, ZERO
        for i in range(OUTS):
            acc[i] = ZERO
        scale = LOG2E / math.sqrt(float32(D))

        for j in range(num_tiles):
            copies_wait_all()
            cuda.syncthreads()             # tile j has landed for all; nobody reads tile j - 1
            if j + 1 < num_tiles:
                copy_keys(tiles, (j + 1) % 2, k_cache, v_cache, table, g, (j + 1) * KEYS, S)
            copies_commit()
            keys = j % 2 * 2 * KEYS * PITCH
            values = keys + KEYS * PITCH

            # x = q @ k.T
            for i in range(SCORES):
                x[i] = ZERO
            for step in range(STEPS):
                for n in range(KEY_MMAS // 2):
                    row = n * 16 + lane % 8 + lane // 16 * 8
                    load_matrices(words, 0, tiles,
                                  keys + row * PITCH + step * 16 + lane // 8 % 2 * 8)
                    mma(x, n * 8, q, step * 4, words, 0, qkv)
                    mma(x, n * 8 + 4, q, step * 4, words, 2, qkv)

            # the causal mask, needed only where a tile reaches beyond the first query
            if (j + 1) * KEYS > context + 1:
                for n in range(KEY_MMAS):
                    for i in range(4):
                        s = j * KEYS + n * 8 + lane % 4 * 2 + i % 2
                        if s > context + warp * 16 + i // 2 * 8 + lane // 4:
                            x[n * 4 + i] = NEG_INF

            # online softmax of the lane's two rows; the four lanes of a quad share them
            for half in range(2):
                new_m = m[half]
                for n in range(KEY_MMAS):
                    new_m = max(new_m, max(x[n * 4 + half * 2], x[n * 4 + half * 2 + 1]))
                new_m = max(new_m, shuffle_xor(new_m, 1))
                new_m = max(new_m, shuffle_xor(new_m, 2))
                rescale, shift = exp2((m[half] - new_m) * scale), new_m * scale
                m[half] = new_m
                l[half] *= rescale
                for n in range(OUT_MMAS):
                    acc[n * 4 + half * 2] *= rescale
                    acc[n * 4 + half * 2 + 1] *= rescale
                for n in range(KEY_MMAS):
                    for i in range(2):
                        weight = exp2(x[n * 4 + half * 2 + i] * scale - shift)
                        x[n * 4 + half * 2 + i] = weight
                        l[half] += weight

            # acc += x @ v: the fragment that came out of one mma goes into the next as it is
            for step in range(KEYS // 16):
                for i in range(4):
                    p[i] = pack(x[step * 8 + i * 2], x[step * 8 + i * 2 + 1], out)
                for n in range(OUT_MMAS // 2):
                    row = step * 16 + lane % 16
                    load_matrices_transposed(words, 0, tiles,
                                             values + row * PITCH + n * 16 + lane // 16 * 8)
                    mma(acc, n * 8, p, 0, words, 0, qkv)
                    mma(acc, n * 8 + 4, p, 0, words, 2, qkv)

        for half in range(2):
            total = l[half] + shuffle_xor(l[half], 1)
            total += shuffle_xor(total, 2)
            t = first_t + warp * 16 + half * 8 + lane // 4
            if t < end_t:
                for n in range(OUT_MMAS):
                    at = (t * H + h) * D + n * 8 + lane % 4 * 2
                    store_word(out, at, pack(acc[n * 4 + half * 2] / total,
                                             acc[n * 4 + half * 2 + 1] / total, out))
    return attention_tiled_kernel


ATTENTION_TILED = {}                       # head_dim -> its kernel, made when it is first asked for


def attention_tiled(out, qkv, k_cache, v_cache, block_tables, rows, query_starts, seq_lens,
                    *workspace, stream=0):
    T, H, G, D = attention_shapes(out, qkv, k_cache, v_cache)
    assert D % 16 == 0 and D <= 256, f"head_dim is {D}, expected a multiple of 16 up to 256"
    if D not in ATTENTION_TILED:
        ATTENTION_TILED[D] = make_attention_tiled(D)
    queries, keys = attention_tile(D)
    # tiles do not span requests: at most one for each request is not full
    grid = (min(T, T // queries + len(seq_lens)), H)
    launch(ATTENTION_TILED[D], grid, WARP * ATTENTION_WARPS, stream, 8 * keys * (D + 8), out, qkv,
           k_cache, v_cache, block_tables, rows, query_starts, seq_lens)


# ---- fourth rung, prefill: Hopper ----
#
# A warpgroup fills a ring of stages, each a tile of keys and values; two others own 64 queries
# each, and the tensor cores work for one of them while the other takes exponents. Threads copy, 16
# bytes each: a block of the cache is too small a box to keep the copy engine busy. Where registers
# suffice, a tile serves two query heads of its KV head: half as much to copy, and half as often a
# ring to be filled while nobody computes.

FLASH_QUERIES, FLASH_KEYS = 128, 128
FLASH_STAGES = {64: 4, 128: 3}             # by head_dim
# barriers: full[i] from 0 on, empty[i] from 4 on, then the turn of each warpgroup
FLASH_EMPTY, FLASH_TURN, FLASH_BARRIERS = 4, 8, 10


def flash_heads(D, R, thread_blocks):
    """Query heads that a thread block takes at once, of the R of a KV head: two where registers
    suffice and half of thread_blocks, those of one head each, are one for each multiprocessor.
    The operations on a head are the same in both, so the batch changes no bit."""
    return 2 if D == 64 and R % 2 == 0 and thread_blocks >= 2 * num_multiprocessors() else 1


def flash_shared(D, HEADS):
    """Bytes of shared memory: the queries, and stages of keys and values; 1 KB to align."""
    return 1024 + 2 * D * (HEADS * FLASH_QUERIES + 2 * FLASH_STAGES[D] * FLASH_KEYS)


def make_attention_wgmma(D, HEADS):
    """The kernel for one head_dim, and one or two heads at once."""
    KEYS, STAGES, PANELS = FLASH_KEYS, FLASH_STAGES[D], D // 64
    scores_first, scores_add = WGMMA[KEYS].first, WGMMA[KEYS].add
    scores_wait, sums_wait = WGMMA[KEYS].wait, WGMMA[D].wait
    wgmma_from_registers = make_wgmma_from_registers(D, KEYS)
    SCORES, OUTS, WEIGHTS = KEYS // 2, D // 2, KEYS // 4
    PANEL = KEYS * 32                      # words of 64 channels of all keys
    STAGE = 2 * PANELS * PANEL             # keys, then values
    QUERY_WORDS = FLASH_QUERIES * PANELS * 32  # words, of one head
    PRODUCERS = 4 * WARP                   # eight of them copy a row
    ROWS, ROWS_APART = KEYS * 8 // PRODUCERS, PRODUCERS // 8

    @cuda.jit(device=True)
    def fill_ring(ring, first, barriers, k_cache, v_cache, block_tables, row_of_table, g, S,
                  num_tiles):
        """Copies tiles of keys and values into the ring; beyond the context, zeros. Piece q of
        row r lies at q ^ (r % 8), as the copy engine would leave it."""
        P, width = uint32(k_cache.shape[1]), uint32(k_cache.shape[2] * D)
        table = int64(row_of_table) * block_tables.shape[1]
        piece, row = cuda.threadIdx.x % 8, cuda.threadIdx.x % PRODUCERS // 8
        place = first + row * 32 + (piece ^ (row & 7)) * 4
        sources = cuda.local.array(ROWS, int64)
        # where the next row of this thread lies, without a division for each: the warps of the
        # softmax need the cycles
        last, block = divide(uint32(S - 1), P), divide(uint32(row), P)
        offset, left = uint32(row - block * P), int32(S - row)
        stage, parity = 0, uint32(1)
        for tile in range(num_tiles):
            # all block numbers on their way at once, before there is room
            for i in range(ROWS):
                number = load_word(block_tables, table + int64(min(block, last)))
                slot = uint32(number * P + offset)
                sources[i] = int64(slot * width) + (g * D + piece * 8)
                offset = uint32(offset + uint32(ROWS_APART))
                while offset >= P:
                    offset, block = uint32(offset - P), uint32(block + uint32(1))
            await_barrier(barriers, FLASH_EMPTY + stage, parity)
            for i in range(ROWS):
                size = uint32(16 if i * ROWS_APART < left else 0)
                at = place + stage * STAGE + i * ROWS_APART * 32
                for panel in range(PANELS):
                    copy_async(ring, at + panel * PANEL, k_cache, sources[i] + panel * 64, size)
                    copy_async(ring, at + (PANELS + panel) * PANEL, v_cache,
                               sources[i] + panel * 64, size)
            copies_commit()
            left = int32(left - KEYS)
            if tile > 0:
                copies_wait_but_1()
                fence_shared()             # tensor cores read what the threads' copies wrote
                barrier_arrive(barriers, stage - 1 if stage > 0 else STAGES - 1)
            stage, parity = next_stage(stage, parity, STAGES)
        copies_wait_all()
        fence_shared()
        barrier_arrive(barriers, stage - 1 if stage > 0 else STAGES - 1)

    @cuda.jit(device=True)
    def load_queries(ring, first, qkv, h, first_t, end_t):
        """A warp's 16 queries, in the order of boxes; past the end the last one, never stored."""
        words = cuda.local.array(4, uint32)
        lane, warp, heads = cuda.threadIdx.x % WARP, cuda.threadIdx.x // WARP, qkv.shape[1]
        for i in range(4 * PANELS):
            row, piece = warp * 16 + i % 4 * 4 + lane // 8, lane % 8
            t = min(first_t + row, end_t - 1)
            load_16_bytes(words, 0, qkv, (t * heads + h) * D + i // 4 * 64 + piece * 8)
            store_shared(ring, first + i // 4 * (FLASH_QUERIES * 32) + row * 32
                         + (piece ^ (row & 7)) * 4, words, 0)

    @cuda.jit(device=True)
    def multiply_keys(x, ring, q, keys, like):
        """Starts x = q @ k.T."""
        scores_first(x, 0, ring, q, ring, keys, like)
        for panel in range(1, PANELS):
            scores_add(x, 0, ring, q + panel * (FLASH_QUERIES * 32), ring, keys + panel * PANEL,
                       like)

    @cuda.jit(device=True)
    def multiply(x, acc, p, ring, q, keys, values, barriers, warpgroup, parity, like):
        """x = q @ k.T, acc += p @ v: the scores of a head together with the sums of the head, or
        the tile, before, so that the tensor cores are free in one piece while these scores become
        weights. With one head that piece is the other warpgroup's: each starts its products after
        the other has started its own. With two they would only wait for each other."""
        if HEADS == 1:
            await_barrier(barriers, FLASH_TURN + warpgroup, parity)
        multiply_keys(x, ring, q, keys, like)
        wgmma_from_registers(acc, 0, p, 0, ring, values, like)
        if HEADS == 1 and cuda.threadIdx.x % WARP == 0:
            barrier_arrive(barriers, FLASH_TURN + 1 - warpgroup)
        scores_wait(x, 0)
        sums_wait(acc, 0)

    @cuda.jit(device=True)
    def weigh(x, p, acc, m, l, first, position, scale, like):
        """Online softmax of a lane's scores for keys from `first` on, at its two positions: x
        becomes weights, in p as elements; acc and l, the sums so far, shrink to the new maximum m.
        The four lanes of a quad share their rows."""
        rescales = cuda.local.array(2, float32)
        lane = cuda.threadIdx.x % WARP
        # the causal mask, needed only where a tile reaches beyond the warp's first query
        if first + KEYS - 1 > position - lane // 4:
            for half in range(2):
                last = int32(position + half * 8 - first - lane % 4 * 2)
                for n in range(KEYS // 8):
                    for i in range(2):
                        if n * 8 + i > last:
                            x[n * 4 + half * 2 + i] = NEG_INF
        for half in range(2):
            new_m = m[half]
            for n in range(KEYS // 8):
                new_m = max(new_m, max(x[n * 4 + half * 2], x[n * 4 + half * 2 + 1]))
            new_m = max(new_m, shuffle_xor(new_m, 1))
            new_m = max(new_m, shuffle_xor(new_m, 2))
            rescales[half], shift = exp2((m[half] - new_m) * scale), new_m * scale
            m[half] = new_m
            total = ZERO
            for n in range(KEYS // 8):
                low = exp2(x[n * 4 + half * 2] * scale - shift)
                high = exp2(x[n * 4 + half * 2 + 1] * scale - shift)
                x[n * 4 + half * 2], x[n * 4 + half * 2 + 1] = low, high
                total += low + high
            l[half] = l[half] * rescales[half] + total
        for n in range(D // 8):
            for i in range(4):
                acc[n * 4 + i] *= rescales[i // 2]
        for n in range(KEYS // 4):         # the fragment that came out of one product goes into
            p[n] = pack(x[n * 2], x[n * 2 + 1], like)          # the next as it is

    @cuda.jit(device=True)
    def store_sums(out, acc, l, h, first_t, end_t):
        words = cuda.local.array(4, uint32)
        lane, warp, H = cuda.threadIdx.x % WARP, cuda.threadIdx.x // WARP, out.shape[1]
        for half in range(2):
            total = l[half] + shuffle_xor(l[half], 1)
            share = inverse(total + shuffle_xor(total, 2))
            t = first_t + warp * 16 + half * 8 + lane // 4
            for n in range(0, D // 8, 4):
                for i in range(4):
                    c = (n + i) * 4 + half * 2
                    words[i] = pack(acc[c] * share, acc[c + 1] * share, out)
                transpose_quad(words)
                if t < end_t:
                    store_16_bytes(out, (t * H + h) * D + (n + lane % 4) * 8, words, 0)

    @cuda.jit(cache=True, **THREE_WARPGROUPS)
    def attention_wgmma_kernel(out, qkv, k_cache, v_cache, block_tables, rows, query_starts,
                               seq_lens):
        """FlashAttention: scores of a tile of queries and keys live and die in registers

        out              (T, H, D)         f16 bf16   written
        qkv              (T, H+2G, D)      as out     q read
        k_cache, v_cache (blocks, P, G, D) as out     read once for each tile of queries
        block_tables     (rows, blocks)    i32        read
        rows, seq_lens   (B,)              i32        read
        query_starts     (B+1,)            i32        read
        launch grid (H / HEADS, tiles of queries), thread block of WGMMA_WARPS warps, 16 queries
               of each head each, and a warpgroup that copies
        shared flash_shared(D, HEADS) bytes: a tile of queries for each head, stages of keys and
               values
        moves  2*T*H*D*E + 2*T*H*S*D*E/QUERIES bytes, does 4*T*H*S*D flops: compute-bound; QUERIES
               are those of all heads of a tile
        needs  (D, HEADS) in ATTENTION_WGMMA (else the launcher takes the rung below), sm_90a
        twin   paged_attention_ref      paper  arXiv:2307.08691, arXiv:2407.08608
        """
        # fragments: x (KEYS / 8, 4), acc (D / 8, 4); of the 4, half * 2 + i is row
        # l//4 + 8 * half of the warp and column 2*(l%4) + i
        ring = cuda.shared.array(0, uint32)
        barriers = cuda.shared.array(FLASH_BARRIERS, uint64)
        x = cuda.local.array(SCORES, float32)
        p = cuda.local.array(WEIGHTS, uint32)
        # next_: of the second head
        acc, next_acc = cuda.local.array(OUTS, float32), cuda.local.array(OUTS, float32)
        m, next_m = cuda.local.array(2, float32), cuda.local.array(2, float32)
        l, next_l = cuda.local.array(2, float32), cuda.local.array(2, float32)
        last_acc = next_acc if HEADS == 2 else acc
        tid, lane, warp = cuda.threadIdx.x, cuda.threadIdx.x % WARP, cuda.threadIdx.x // WARP
        first = first_of_ring(ring, 0)
        if tid == 0:
            for stage in range(STAGES):
                barrier_init(barriers, stage, uint32(PRODUCERS))
                barrier_init(barriers, FLASH_EMPTY + stage, uint32(WGMMA_WARPS))
            for warpgroup in range(2):
                barrier_init(barriers, FLASH_TURN + warpgroup, uint32(WGMMA_WARPS // 2))
            barriers_ready()
        cuda.syncthreads()                 # else a thread uses a barrier that is not there yet
        start_next_kernel()
        wait_for_inputs()
        h, H, G, B = cuda.blockIdx.x * HEADS, out.shape[1], k_cache.shape[2], seq_lens.shape[0]
        g = h // (H // G)
        # this thread block's tile: the requests' tiles are counted off one after another, from the
        # last on, for it is the longest of its request
        b, tile = B - 1, cuda.blockIdx.y
        while b >= 0 and tile >= ceil_div_int(query_starts[b + 1] - query_starts[b], FLASH_QUERIES):
            tile -= ceil_div_int(query_starts[b + 1] - query_starts[b], FLASH_QUERIES)
            b -= 1
        if b < 0:
            return
        end_t = query_starts[b + 1]
        count = end_t - query_starts[b]
        tile = ceil_div_int(count, FLASH_QUERIES) - 1 - tile
        first_t = query_starts[b] + tile * FLASH_QUERIES
        context = seq_lens[b] - (end_t - first_t)              # position of the tile's first query
        S = min(context + FLASH_QUERIES, seq_lens[b])          # keys that its last query sees
        num_tiles = ceil_div_int(S, KEYS)
        stages = first + HEADS * QUERY_WORDS
        if warp >= WGMMA_WARPS:
            few_registers()
            fill_ring(ring, stages, barriers, k_cache, v_cache, block_tables, rows[b], g, S,
                      num_tiles)
            return
        many_registers()
        for n in range(HEADS):
            load_queries(ring, first + n * QUERY_WORDS, qkv, h + n, first_t, end_t)
        fence_shared()
        meet(1, WGMMA_WARPS * WARP)        # else a warp multiplies queries not there yet
        for half in range(2):
            m[half], l[half], next_m[half], next_l[half] = NEG_INF, ZERO, NEG_INF, ZERO
        for i in range(OUTS):
            acc[i], next_acc[i] = ZERO, ZERO
        scale = LOG2E / math.sqrt(float32(D))
        warpgroup, position = warp // 4, context + warp * 16 + lane // 4
        # parity 1 counts as passed: the first warpgroup need not wait for its first turn
        q, turn = first + warpgroup * (64 * 32), uint32(1 - warpgroup)
        stage, parity, keys, values = 0, uint32(0), stages, stages + PANELS * PANEL
        await_barrier(barriers, 0, parity)
        multiply_keys(x, ring, q, keys, out)
        scores_wait(x, 0)
        weigh(x, p, acc, m, l, 0, position, scale, out)
        for j in range(num_tiles):
            if HEADS == 2:
                multiply(x, acc, p, ring, q + QUERY_WORDS, keys, values, barriers, warpgroup, turn,
                         out)
                weigh(x, p, next_acc, next_m, next_l, j * KEYS, position, scale, out)
            if j + 1 < num_tiles:
                used, used_values = stage, values
                stage, parity = next_stage(stage, parity, STAGES)
                keys = stages + stage * STAGE
                values = keys + PANELS * PANEL
                await_barrier(barriers, stage, parity)
                multiply(x, last_acc, p, ring, q, keys, used_values, barriers, warpgroup, turn, out)
                turn ^= uint32(1)
                if lane == 0:              # its values have just met their last weights
                    barrier_arrive(barriers, FLASH_EMPTY + used)
                weigh(x, p, acc, m, l, (j + 1) * KEYS, position, scale, out)
        wgmma_from_registers(last_acc, 0, p, 0, ring, values, out)
        sums_wait(last_acc, 0)
        if HEADS == 2:
            store_sums(out, next_acc, next_l, h + 1, first_t, end_t)
        store_sums(out, acc, l, h, first_t, end_t)
    return attention_wgmma_kernel


ATTENTION_WGMMA = {key: make_attention_wgmma(*key)
                   for key in ((64, 1), (64, 2), (128, 1))[:2 if SIMULATOR else 3]}


def attention_wgmma(out, qkv, k_cache, v_cache, block_tables, rows, query_starts, seq_lens,
                    *workspace, stream=0):
    T, H, G, D = attention_shapes(out, qkv, k_cache, v_cache)
    # tiles do not span requests: at most one for each request is not full
    tiles = min(T, T // FLASH_QUERIES + len(seq_lens))
    heads = flash_heads(D, H // G, H * tiles)
    if (D, heads) not in ATTENTION_WGMMA:
        attention_tiled(out, qkv, k_cache, v_cache, block_tables, rows, query_starts, seq_lens,
                        stream=stream)
        return
    launch(ATTENTION_WGMMA[D, heads], (H // heads, tiles), (WGMMA_WARPS + 4) * WARP, stream,
           flash_shared(D, heads), out, qkv, k_cache, v_cache, block_tables, rows, query_starts,
           seq_lens)


# ---- decode: a warp walks tiles of 16 keys for R query heads at once ----

DECODE_WARPS = 4 if SIMULATOR else 8
SPLIT = 64 if SIMULATOR else 512           # tokens of a context's splits but the last, at least
WHOLE = 1 << 30                            # a split that no context exceeds
SPLIT_STEP = 64                            # what longer splits are a multiple of: whole stages
SPLIT_ITEMS = 4 if SIMULATOR else 132      # of one context, at most: one for each multiprocessor of
                                           # an H100; not of this GPU, or its sums would differ
RUN = 2 if SIMULATOR else 4                # splits of a context, at most, that are one item of a
                                           # thread block, if there are more requests than
FEW_REQUESTS = 8 if SIMULATOR else 64      # these: so many have an item for every thread block
MAX_REQUESTS = 4096                        # of one step
DECODE_THREAD_BLOCKS = 3 if SIMULATOR else 264         # two for each multiprocessor of an H100


def most_splits(G):
    """Splits of one context, at most: each is an item for every one of G KV heads."""
    return max(1, SPLIT_ITEMS // G)


def split_size(S, G, split):
    """Tokens of a split of a context of S. It depends on nothing else, so that no sum depends on
    the company."""
    return max(split, ceil_div(S, SPLIT_STEP * most_splits(G)) * SPLIT_STEP)


@cuda.jit(device=True)
def most_splits_int(G):
    """most_splits on the device."""
    return max(1, int64(divide(uint32(SPLIT_ITEMS), uint32(G))))


@cuda.jit(device=True)
def split_size_int(S, G, split):
    """split_size on the device."""
    most = most_splits_int(G)
    return max(split, int64(divide(uint32(S + SPLIT_STEP * most - 1), uint32(SPLIT_STEP * most)))
               * SPLIT_STEP)


def run_of(tokens, D):
    """The splits that may be one item in a step of so many requests, or in the kernel for them. Of
    wider heads the kernel has no registers left for it."""
    return RUN if tokens > FEW_REQUESTS and D == 64 else 1


def piece_size(S, G, split, run):
    """Tokens of a context of S that are one item: a split, or all if these are `run` splits or
    fewer. Sums are taken split by split in either case."""
    return S if S <= split * min(run, most_splits(G)) else split_size(S, G, split)


@cuda.jit(device=True)
def longest_run(G, split, run):
    """Tokens of the longest context that is one item; its splits are of `split` tokens but for the
    last."""
    return split * min(run, most_splits_int(G))


@cuda.jit(device=True)
def piece_size_int(S, G, split, run):
    """piece_size on the device."""
    return S if S <= longest_run(G, split, run) else split_size_int(S, G, split)


def lay_out_splits(seq_lens, G, split, run=1):
    """What begin_decode leaves in `splits`, (B + 1 + J,) int32, for contexts of at least a token.

    Contexts are cut in pieces, see piece_size; with a run of 1 they are splits. First comes the
    first piece of each request, and J; then a word for each piece, in the order of work:
    i * MAX_REQUESTS + b for the i-th piece of request b. Pieces of a request are of one size but
    for its last. These come behind all others, the longest first, so that thread blocks end at
    about the same time.
    """
    sizes = [piece_size(int(S), G, split, run) for S in seq_lens]
    counts = [ceil_div(int(S), size) for S, size in zip(seq_lens, sizes)]
    whole = [i * MAX_REQUESTS + b for b, count in enumerate(counts) for i in range(count - 1)]
    left = [int(S) - size * (count - 1) for S, size, count in zip(seq_lens, sizes, counts)]
    last = sorted(range(len(counts)), key=lambda b: -left[b])          # keeps the order of equals
    return np.array([0, *np.cumsum(counts), *whole,
                     *((counts[b] - 1) * MAX_REQUESTS + b for b in last)], np.int32)


@cuda.jit(device=True)
def locate(item, G, seq_lens, splits, split, run):
    """Of an item, which is a KV head of a piece: b, where the piece's sums go in `partial`, the KV
    head, the first key, the end, and the length of the context; of the first piece where there are
    fewer, and nobody uses it."""
    j, B = int64(divide(uint32(item), uint32(G))), seq_lens.shape[0]
    g = item - j * G
    if j >= int64(load_word(splits, B)):
        j = 0
    word = int64(load_word(splits, B + 1 + j))
    i = int64(divide(uint32(word), uint32(MAX_REQUESTS)))
    b = word - i * MAX_REQUESTS
    S = int64(load_word(seq_lens, b))
    size = piece_size_int(S, G, split, run)
    return b, int64(load_word(splits, b)) + i, g, i * size, min(i * size + size, S), S


@cuda.jit(device=True)
def in_turns(item, items, stride, run):
    """Which of so many items a thread block takes in its item // stride-th turn. Whole contexts
    come the longest first: so every second turn goes the other way round, or the first thread block
    would have the longest of each."""
    turn = uint32(0)
    if run > 1:
        turn = divide(uint32(item), uint32(stride))
    if turn & uint32(1) and item < items:
        first = int64(turn) * stride
        return first + min(first + stride, items) - 1 - item
    return item


def make_attention_sums(D, HALVES, IN_ORDER):
    """What every decode attention of a head_dim does with scores, and at the end with its sums.

    HALVES    of a tile, of 16 keys each
    IN_ORDER  fragment n of the accumulators has channels 8*n to 8*n + 7; otherwise those at n % 8
              of each 8 channels from n // 8 * 64 on, as attend_splits leaves them
    """
    OUTS, M_AND_L = D // 8 * 4, 2 * DECODE_WARPS

    @cuda.jit(device=True)
    def add_scores(acc, m, l, x, p, R, first, end, scale, like):
        """The online softmax of R heads, a tile further: x (HALVES, 16 heads, 16 keys), as mma
        leaves it, becomes weights, packed in p as A fragments; acc, m and l fit the new maximum."""
        seen = int32(end - first - thread_index() % 4 * 2)   # keys from this lane's first on
        for side in range(2):
            for half in range(HALVES):
                p[half * 4 + side], p[half * 4 + 2 + side] = uint32(0), uint32(0)
            if R > side * 8:               # of 8 heads or fewer the second side is nobody's
                new_m = m[side]
                for i in range(4 * HALVES):
                    j = i // 2 * 4 + side * 2 + i % 2
                    if i // 2 * 8 + i % 2 >= seen:
                        x[j] = NEG_INF
                    new_m = max(new_m, x[j])
                new_m = max(new_m, shuffle_xor(new_m, 1))
                new_m = max(new_m, shuffle_xor(new_m, 2))
                rescale, shift = exp2((m[side] - new_m) * scale), new_m * scale
                m[side] = new_m
                l[side] *= rescale
                for n in range(OUTS // 4):
                    acc[n * 4 + side * 2] *= rescale
                    acc[n * 4 + side * 2 + 1] *= rescale
                for i in range(2 * HALVES):
                    j = i * 4 + side * 2
                    x[j] = exp2(multiply_add(x[j], scale, -shift))
                    x[j + 1] = exp2(multiply_add(x[j + 1], scale, -shift))
                    l[side] += x[j]
                    l[side] += x[j + 1]
                    p[i * 2 + side] = pack(x[j], x[j + 1], like)

    @cuda.jit(device=True)
    def store_sums(sums, acc, m, l, R, scale):
        """sums as (warp, r, D+2): the fragments, then m and l."""
        lane, warp = thread_index() % WARP, thread_index() // WARP
        for side in range(2):
            if R > side * 8:
                total = l[side] + shuffle_xor(l[side], 1)
                total += shuffle_xor(total, 2)
                r = lane // 4 + side * 8
                if r < R:
                    at = (warp * R + r) * (D + 2)
                    for n in range(OUTS // 4):
                        store_2_shared(sums, at + n * 8 + lane % 4 * 2, acc[n * 4 + side * 2],
                                       acc[n * 4 + side * 2 + 1])
                    store_2_shared(sums, at + D, m[side] * scale, total)

    @cuda.jit(device=True)
    def joined(sums, r, place, R):
        """The sums of all warps, (DECODE_WARPS, R, D+2), together: o at a place of the fragments
        and at the next, m and l."""
        m_and_l = cuda.local.array(M_AND_L, float32)
        m, l, o, next_o, at = NEG_INF, ZERO, ZERO, ZERO, r * (D + 2)
        for w in range(DECODE_WARPS):
            m_and_l[2 * w], m_and_l[2 * w + 1] = load_2_shared(sums, at + w * R * (D + 2) + D)
            m = max(m, m_and_l[2 * w])
        for w in range(DECODE_WARPS):
            warp_o, warp_next_o = load_2_shared(sums, at + w * R * (D + 2) + place)
            weight = exp2(m_and_l[2 * w] - m)                  # a warp without keys has m = -inf
            l += m_and_l[2 * w + 1] * weight
            o += warp_o * weight
            next_o += warp_next_o * weight
        return o, next_o, m, l

    @cuda.jit(device=True)
    def join_warps(out, partial, sums, b, g, j, R, only):
        """The attention of request b and KV head g itself if this is the context's `only` split,
        otherwise a part of it."""
        i, H = uint32(thread_index()), out.shape[1]
        while i < R * (D // 2):            # in 32 bits: range takes 64, twice the instructions
            r, place = i // (D // 2), i % (D // 2) * 2
            o, next_o, m, l = joined(sums, r, place, R)
            d, next_d, head = place, place + 1, g * R + r
            if not IN_ORDER:
                d = place // 64 * 64 + place % 8 * 8 + place // 8 % 8
                next_d = d + 8
            if not only:
                at = uint32((j * H + head) * (D + 2))
                store_float(partial, uint32(at + d), o)
                store_float(partial, uint32(at + next_d), next_o)
                if place == 0:
                    store_float(partial, uint32(at + D), m)
                    store_float(partial, uint32(at + D + 1), l)
            elif IN_ORDER:
                store_word(out, uint32((b * H + head) * D + d),
                           pack(o * inverse(l), next_o * inverse(l), out))
            else:
                out[b, head, d] = narrow(o * inverse(l), out)
                out[b, head, next_d] = narrow(next_o * inverse(l), out)
            i = uint32(i + WARP * DECODE_WARPS)

    @cuda.jit(device=True)
    def join_run(out, kept, sums, b, g, n, last, R):
        """The n-th split of a context whose splits are one item, IN_ORDER: its sums are kept by the
        thread that joins them, of each (o, next o, m, l), and with the last they become the
        attention, by the operations of merged_pair and so with the same bits."""
        i, at, H = uint32(thread_index()), 0, out.shape[1]
        while i < R * (D // 2):
            r, place = i // (D // 2), i % (D // 2) * 2
            now = at + 4 * n
            kept[now], kept[now + 1], kept[now + 2], kept[now + 3] = joined(sums, r, place, R)
            if last:
                m, l, o, next_o = kept[at + 2], ZERO, ZERO, ZERO
                for split in range(at + 4, now + 4, 4):
                    m = max(m, kept[split + 2])
                for split in range(at, now + 4, 4):
                    weight = exp2(kept[split + 2] - m)
                    l += product(kept[split + 3], weight)
                    o = multiply_add(kept[split], weight, o)
                    next_o = multiply_add(kept[split + 1], weight, next_o)
                store_word(out, uint32((b * H + g * R + r) * D + place),
                           pack(o / l, next_o / l, out))
            i, at = uint32(i + WARP * DECODE_WARPS), at + 4 * RUN
    return add_scores, store_sums, joined, join_warps, join_run


def make_attend_splits(D):
    """The device function for one head_dim, a multiple of 64 up to 256."""
    add_scores, store_sums, _, join_warps, _ = make_attention_sums(D, HALVES=1, IN_ORDER=False)
    VECTORS = D // 64                      # 16-byte pieces of a value row for a lane
    K_WORDS, Q_WORDS = D // 4, D // 16 * 4
    TILE_WORDS = 2 * K_WORDS               # of keys, then of values
    TILES = 2 if D == 64 else 1            # under way at once, as far as there are registers
    WORDS = TILES * TILE_WORDS
    OUTS = D // 8 * 4

    @cuda.jit(device=True)
    def load_tile(words, at, k_cache, v_cache, block_tables, row, g, first, end):
        """Keys first to first + 15 as B fragments, and the values a lane needs; past the end the
        last token again, which the mask then takes out."""
        P, G, lane = k_cache.shape[1], k_cache.shape[2], cuda.threadIdx.x % WARP
        s = uint32(max(min(first + lane % 16, end - 1), 0))
        i = divide(s, uint32(P))
        block = load_word(block_tables, row * block_tables.shape[1] + i)
        slot = uint32(block * P + s - i * P)                   # of the key lane % 16
        for half in range(2):
            key = int64(shuffle(slot, half * 8 + lane // 4)) * (G * D) + (g * D + lane % 4 * 8)
            for step in range(D // 32):
                load_16_bytes(words, at + (half * (D // 32) + step) * 4, k_cache, key + step * 32)
        for i in range(4):                                     # values of the keys of a B fragment
            value = (int64(shuffle(slot, lane % 4 * 2 + i % 2 + i // 2 * 8)) * (G * D)
                     + (g * D + lane // 4 * 8))
            for n in range(VECTORS):
                load_16_bytes(words, at + K_WORDS + (n * 4 + i) * 4, v_cache, value + n * 64)

    @cuda.jit(device=True)
    def load_queries(q, words, qkv, b, g, R, G):
        """R heads as an A fragment, whose rows past them repeat the last; the k order is that of
        the key vectors: lane l has 8 elements from 8*(l%4) of each 32."""
        lane, heads = cuda.threadIdx.x % WARP, R * G + 2 * G
        for half in range(2):
            at = (b * heads + g * R + min(lane // 4 + half * 8, R - 1)) * D + lane % 4 * 8
            for step in range(D // 32):
                load_16_bytes(words, 0, qkv, at + step * 32)
                for w in range(4):
                    q[(step * 2 + w // 2) * 4 + w % 2 * 2 + half] = words[w]

    @cuda.jit(device=True)
    def add_tile(acc, m, l, q, words, at, x, p, b_words, R, first, end, scale, qkv):
        """The online softmax of R heads, a tile of 16 keys further."""
        for i in range(8):
            x[i] = ZERO
        for half in range(2):                                  # x (16 heads, 16 keys) = q @ k.T
            for step in range(D // 16):
                mma(x, half * 4, q, step * 4, words, at + half * (D // 8) + step * 2, qkv)
        add_scores(acc, m, l, x, p, R, first, end, scale, qkv)
        # mma wants pairs (v[key, d], v[key + 1, d]), memory has (v[key, d], v[key, d + 1]) in a
        # word: half 0 joins the lower halves of both keys' words, half 1 the upper ones. Column
        # l//4 of the mma for word w is then channel 8*(l//4) + 2w + half
        for n in range(VECTORS):
            for w in range(4):
                for half in range(2):
                    for i in range(2):
                        value = at + K_WORDS + (n * 4 + i * 2) * 4 + w
                        one, two = words[value], words[value + 4]
                        if half == 0:
                            b_words[i] = uint32(one & uint32(0xFFFF)) | uint32(two << uint32(16))
                        else:
                            b_words[i] = uint32(one >> uint32(16)) | uint32(
                                two & uint32(0xFFFF0000))
                    mma(acc, (n * 8 + w * 2 + half) * 4, p, 0, b_words, 0, qkv)

    @cuda.jit(device=True)
    def attend_splits(out, partial, sums, qkv, k_cache, v_cache, block_tables, rows, seq_lens,
                      splits, split):
        """Attention of every gridDim.x-th item.

        A whole thread block works on an item, a warp on every DECODE_WARPS-th tile of 16 keys.
        While a tile is used the next is under way, even that of the next item.
        """
        words = cuda.local.array(WORDS, uint32)
        q = cuda.local.array(Q_WORDS, uint32)
        q_words = cuda.local.array(4, uint32)
        x = cuda.local.array(8, float32)
        p = cuda.local.array(4, uint32)
        b_words = cuda.local.array(2, uint32)
        acc = cuda.local.array(OUTS, float32)
        m = cuda.local.array(2, float32)
        l = cuda.local.array(2, float32)
        warp, B, scale = cuda.threadIdx.x // WARP, seq_lens.shape[0], LOG2E / math.sqrt(float32(D))
        G, H, width = k_cache.shape[2], out.shape[1], DECODE_WARPS * 16
        R, items = int64(divide(uint32(H), uint32(G))), int64(load_word(splits, B)) * G
        item, stride = int64(cuda.blockIdx.x), int64(cuda.gridDim.x)
        b, j, g, first, end, S = locate(item, G, seq_lens, splits, split, 1)
        row = int64(load_word(rows, b))
        if item < items:
            for i in range(TILES):
                load_tile(words, i * TILE_WORDS, k_cache, v_cache, block_tables, row, g,
                          first + i * width + warp * 16, end)
        while item < items:
            load_queries(q, q_words, qkv, b, g, R, G)
            next_b, next_j, next_g, next_first, next_end, next_S = b, j, g, first, end, S
            next_row = row
            if item + stride < items:
                next_b, next_j, next_g, next_first, next_end, next_S = locate(
                    item + stride, G, seq_lens, splits, split, 1)
                next_row = int64(load_word(rows, next_b))
            for side in range(2):
                m[side], l[side] = NEG_INF, ZERO
            for i in range(OUTS):
                acc[i] = ZERO
            s, rounds = first + warp * 16, ceil_div_int(end - first, TILES * width)
            for round_ in range(rounds):
                last = round_ + 1 == rounds
                more, limit = not last or item + stride < items, next_end if last else end
                tile_row, tile_g = next_row if last else row, next_g if last else g
                ahead = next_first + warp * 16 if last else s + TILES * width
                for i in range(TILES):
                    if s + i * width < end:
                        add_tile(acc, m, l, q, words, i * TILE_WORDS, x, p, b_words, R,
                                 s + i * width, end, scale, out)
                    if more:
                        load_tile(words, i * TILE_WORDS, k_cache, v_cache, block_tables, tile_row,
                                  tile_g, ahead + i * width, limit)
                s += TILES * width
            store_sums(sums, acc, m, l, R, scale)
            cuda.syncthreads()             # else a warp's sums are read before they are written
            join_warps(out, partial, sums, b, g, j, R, end - first == S)
            cuda.syncthreads()             # else the next item overwrites sums still being read
            b, j, g, first, end, S, row = (next_b, next_j, next_g, next_first, next_end, next_S,
                                           next_row)
            item += stride
    return attend_splits


MERGED = 8                                 # splits of a head whose sums are on their way at once,
MERGED_TERMS = 2 * MERGED                  # of two channels each


@cuda.jit(device=True)
def add_splits(l, o, next_o, terms, weights, parts_of_l, first, count):
    """Sums of up to MERGED splits, of which lane `first` and those behind it know weights and parts
    of l, added to those of the splits before."""
    for n in range(MERGED):
        if first + n < count:
            weight = float_of(shuffle(weights, uint32(first + n)))
            l += float_of(shuffle(parts_of_l, uint32(first + n)))
            o = multiply_add(terms[2 * n], weight, o)
            next_o = multiply_add(terms[2 * n + 1], weight, next_o)
    return l, o, next_o


@cuda.jit(device=True)
def load_terms(terms, partial, first, end, h, pair):
    """Channels 2 * pair and the next of a head, of MERGED splits from `first` on or, past the end,
    of the last."""
    H, D = partial.shape[1], partial.shape[2] - 2
    for n in range(MERGED):
        load_2_floats(terms, 2 * n, partial, (min(first + n, end - 1) * H + h) * (D + 2) + 2 * pair)


@cuda.jit(device=True)
def merged_pair(partial, begin, end, h, pair):
    """Channels 2 * pair and the next of a head, joined from its splits, `begin` to `end`. A whole
    warp comes, with 32 pairs of one head; of up to 32 splits each lane knows the weight of one. All
    that is there of eight splits or fewer is asked for at once."""
    terms = cuda.local.array(MERGED_TERMS, float32)
    m_and_l = cuda.local.array(2, float32)
    lane, H, D = thread_index() % WARP, partial.shape[1], partial.shape[2] - 2
    load_2_floats(m_and_l, 0, partial, (min(begin + lane, end - 1) * H + h) * (D + 2) + D)
    load_terms(terms, partial, begin, end, h, pair)
    m = m_and_l[0]
    for i in range(begin + WARP + lane, end, WARP):
        m = max(m, partial[i, h, D])
    m = warp_max(m)
    l, o, next_o = ZERO, ZERO, ZERO
    for i in range(begin, end, WARP):
        if i > begin:
            load_2_floats(m_and_l, 0, partial, (min(i + lane, end - 1) * H + h) * (D + 2) + D)
        weights = float_bits(exp2(m_and_l[0] - m))
        parts_of_l = float_bits(m_and_l[1] * float_of(weights))
        for some in range(i, min(i + WARP, end), MERGED):
            if some > begin:
                load_terms(terms, partial, some, end, h, pair)
            l, o, next_o = add_splits(l, o, next_o, terms, weights, parts_of_l, some - i, end - i)
    return o / l, next_o / l


@cuda.jit(device=True)
def merge_head(out, partial, begin, end, b, h, first, stride):
    """Whole warps join the splits of one head, every stride-th pair of channels from `first` on."""
    for pair in range(first, out.shape[2] // 2, stride):
        o, next_o = merged_pair(partial, begin, end, h, pair)
        out[b, h, 2 * pair], out[b, h, 2 * pair + 1] = narrow(o, out), narrow(next_o, out)


@cuda.jit(device=True)
def merge_heads(out, partial, splits, first, stride):
    """A warp joins the splits of every stride-th head of all requests from `first` on, of contexts
    that have several. Each lane has looked up another of the next 32."""
    B, H, lane = out.shape[0], out.shape[1], thread_index() % WARP
    for some in range(first, B * H, WARP * stride):
        own = divide(uint32(min(some + lane * stride, B * H - 1)), uint32(H))
        begins, ends = load_word(splits, own), load_word(splits, int64(own) + 1)
        for n in range(min(WARP, ceil_div_int(B * H - some, stride))):
            begin, end = int64(shuffle(begins, uint32(n))), int64(shuffle(ends, uint32(n)))
            if end - begin > 1:
                head = some + n * stride
                b = int64(divide(uint32(head), uint32(H)))
                merge_head(out, partial, begin, end, b, head - b * H, lane, WARP)


def make_paged_decode(D):
    """The kernel for one head_dim."""
    attend_splits = make_attend_splits(D)

    @cuda.jit(cache=True)
    def paged_decode_kernel(out, partial, qkv, k_cache, v_cache, block_tables, rows, seq_lens,
                            splits, split):
        """softmax(q k^T / sqrt(D)) v of R query heads, or its partial sums over one split

        out              (B, H, D)         f16 bf16   written for contexts of one split
        partial          (J, H, D+2)       f32        written for others: sum of exp(x - m) v, m, l
        qkv              (B, H+2G, D)      as out     q read
        k_cache, v_cache (blocks, P, G, D) as out     read once
        block_tables     (rows, blocks)    i32        read
        rows, seq_lens   (B,)              i32        read
        splits           (B+1+J,)          i32        read: see lay_out_splits
        launch grid any number, thread block of DECODE_WARPS warps; they share the KV heads of all
               splits
        shared 4*DECODE_WARPS*R*(D+2) bytes: the sums of each warp
        moves  2*B*S*G*D*E bytes, does 4*B*H*S*D flops: bandwidth-bound
        needs  D % 64 == 0, D <= 256, R <= 16, one query each   (asserted in the launcher), sm_80
        twin   paged_attention_ref      paper  arXiv:2309.06180, Flash-Decoding
        """
        sums = cuda.shared.array(0, float32)
        start_next_kernel()
        wait_for_inputs()
        attend_splits(out, partial, sums, qkv, k_cache, v_cache, block_tables, rows, seq_lens,
                      splits, split)
    return paged_decode_kernel


PAGED_DECODE = {D: make_paged_decode(D) for D in (64, 128, 192, 256)}


@cuda.jit(cache=True)
def merge_splits_kernel(out, partial, splits):
    """out[b,h] = sum over b's splits of exp(m_i - m) o_i, over the same sum of l_i

    out     (B, H, D)         f32 f16 bf16   written for contexts of several splits
    partial (J, H, D+2)       f32            read
    splits  (B+1+J,)          i32            first split of each request
    launch grid (B, H), thread block D / 2; a thread owns two channels
    moves  B*H*D*E + 4*J*H*(D+2) bytes, does 4*J*H*D flops: latency-bound
    needs  D % 64 == 0, for whole warps come to merged_pair   (asserted in the launcher)
    twin   paged_attention_ref      paper  Flash-Decoding
    """
    start_next_kernel()
    wait_for_inputs()
    b, h = cuda.blockIdx.x, cuda.blockIdx.y
    begin, end = int64(splits[b]), int64(splits[b + 1])
    if end - begin > 1:
        merge_head(out, partial, begin, end, b, h, thread_index(), cuda.blockDim.x)


def paged_decode(out, qkv, k_cache, v_cache, block_tables, rows, query_starts, seq_lens, splits,
                 partial, stream=0, split=WHOLE):
    """An item for each request and KV head, which at most DECODE_THREAD_BLOCKS take in turns;
    `splits` must be of the same `split`."""
    B, H, G, D = attention_shapes(out, qkv, k_cache, v_cache)
    assert len(seq_lens) == len(rows) == B, f"{B} queries of {len(seq_lens)} requests: one each"
    assert D in PAGED_DECODE, f"head_dim is {D}, expected a multiple of 64 up to 256"
    assert H // G <= 16, f"{H // G} query heads share a KV head, expected at most 16"
    assert partial.shape[1:] == (H, D + 2), (partial.shape, out.shape)
    grid = min(len(partial) * G, DECODE_THREAD_BLOCKS)
    shared = 4 * DECODE_WARPS * (H // G) * (D + 2)
    launch(PAGED_DECODE[D], grid, WARP * DECODE_WARPS, stream, shared, out, partial, qkv, k_cache,
           v_cache, block_tables, rows, seq_lens, splits, np.int32(split))
    merge_splits_kernel[(B, H), D // 2, stream](out, partial, splits)


def paged_decode_split(out, qkv, k_cache, v_cache, block_tables, rows, query_starts, seq_lens,
                       splits, partial, stream=0):
    """An item for every SPLIT tokens of a context, or for more, see split_size: few long contexts
    fill the chip, too."""
    paged_decode(out, qkv, k_cache, v_cache, block_tables, rows, query_starts, seq_lens, splits,
                 partial, stream, SPLIT)


def fits_paged_decode(H, G, D):
    """Whether its fragments, and the sums of a thread block, have room on any GPU."""
    R = H // G
    return D in PAGED_DECODE and R <= 16 and 4 * DECODE_WARPS * R * (D + 2) <= 99 << 10


def attention_decode(out, qkv, k_cache, v_cache, *rest, stream=0):
    """paged_decode_split, or for other head dims the second rung, which takes them all."""
    _, H, G, D = attention_shapes(out, qkv, k_cache, v_cache)
    launcher = paged_decode_split if fits_paged_decode(H, G, D) else attention_online
    launcher(out, qkv, k_cache, v_cache, *rest, stream=stream)


# -----------------------------------------------------------------------------
# 8. Sampling                                                        (lesson 15)
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
    """Nucleus: keeps the fewest tokens that reach probability p, the one that crosses it included
    (and its ties). In place. arXiv:1904.09751.
    """
    alive = np.flatnonzero(logits > -np.inf)
    order = alive[np.argsort(logits[alive], kind="stable")]               # least likely first
    probs = softmax_ref(logits[order])
    kept = order[np.cumsum(probs) > 1 - p]
    lowest = logits[kept[0] if len(kept) else order[-1]]            # the likeliest always stays
    logits[logits < lowest] = -np.inf


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


def filter_ref(logits, temperature, top_k, top_p, min_p):
    """logits (V,) f32 over the temperature, which is above 0; what is not kept -inf. In place."""
    logits /= np.float32(temperature)
    top_k_ref(logits, top_k)
    if top_p < 1:
        top_p_ref(logits, top_p)
    if min_p > 0:
        min_p_ref(logits, min_p)


def sample_ref(logits, temperature, top_k, top_p, min_p, seed, position):
    """The sampled token id.  logits (V,) f32, consumed; temperature > 0; seed a 64-bit int."""
    filter_ref(logits, temperature, top_k, top_p, min_p)
    return int(np.argmax(logits + gumbel_ref(seed, position, len(logits))))


# ---- on the device: every request has a row of settings, and a row of `seen` and `bias` ----

TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY, EDITED = range(8)  # of settings
NUM_SETTINGS = 8
IN_PROMPT = 1 << 30                        # bit of `seen` beside the count of the output
MAX_CHUNKS = 2 if SIMULATOR else 128       # thread blocks that share a row of logits
EDITS = 8                                  # logits, or chunks, of a thread on their way at once
SAMPLE_THREADS = WARP if SIMULATOR else 1024
BINS, LAST_BIN, BINS_PER_UNIT = 256, np.float32(255), np.float32(8)
FLAT, PEAKED = ZERO, ONE                   # exponents of the weights in `lowest_kept`
WEIGHT_ONE = np.float32(2.0 ** 32)         # weights are integers: their sum has no order


@cuda.jit(device=True)
def larger(value, index, other_value, other_index):
    """Whether the other is larger, or as large and first."""
    return other_value > value or (other_value == value and other_index < index)


@cuda.jit(device=True)
def warp_argmax(value, index):
    """The largest value of a warp and its index, the lowest one of several, in all lanes."""
    mask = WARP // 2
    while mask > 0:
        other = shuffle_xor(value, mask)
        other_index = int32(float_bits(shuffle_xor(float_of(uint32(index)), mask)))
        if larger(value, index, other, other_index):
            value, index = other, other_index
        mask //= 2
    return value, index


def chunks_of(B):
    """Chunks of a row of logits that fill the GPU if there are B rows; of many rows short ones, for
    then the last ones end soon. No result depends on it."""
    return min(MAX_CHUNKS, max(8, 1024 // B))


@cuda.jit(device=True)
def block_argmax(value, index):
    """The largest value of a thread block and its index, the lowest one of several.

    Whole warps come, WARP at most."""
    values = cuda.shared.array(WARP, float32)
    indices = cuda.shared.array(WARP, int32)
    lane, warp = thread_index() % WARP, thread_index() // WARP
    value, index = warp_argmax(value, index)
    if lane == 0:
        values[warp], indices[warp] = value, index
    cuda.syncthreads()                     # else a warp compares what is not written yet
    other = min(lane, cuda.blockDim.x // WARP - 1)
    value, index = warp_argmax(values[other], indices[other])
    cuda.syncthreads()                     # else the next call overwrites what a slow warp reads
    return value, index


def edit_logits_ref(scores, chunk_max, chunk_argmax, logits, rows, settings, bias, seen):
    """scores = logits after bias, penalties and temperature, where a request asks for any of them,
    and the largest of every chunk; not finite raw logits make it inf, which sampling refuses.

    scores, logits (B, V) f32; chunk_max (B, chunks) f32 and chunk_argmax i32; rows (B,) i32 rows of
    settings (.., 8) f32, bias (.., V) f32 and seen (.., V) i32.
    """
    (B, V), chunks = logits.shape, chunk_max.shape[1]
    width = ceil_div(V, chunks)
    edited = np.full((B, chunks * width), -np.inf, logits.dtype)       # the last chunk is filled up
    edited[:, :V] = logits
    for b, row in enumerate(rows):
        x, s = edited[b, :V], settings[row]
        if s[EDITED]:
            x += bias[row]
            counts = seen[row] & (IN_PROMPT - 1)
            penalize_ref(x, counts, seen[row] >= IN_PROMPT, s[REPETITION], s[PRESENCE],
                         s[FREQUENCY])
        if s[TEMPERATURE] > 0:
            x /= s[TEMPERATURE]
        if s[EDITED] or s[TEMPERATURE] > 0:
            scores[b] = x
    parts = edited.reshape(B, chunks, width)
    largest = parts.max(axis=2)                                        # NaN wins every maximum
    chunk_max[:] = np.where(largest < np.inf, largest, np.inf)
    chunk_argmax[:] = parts.argmax(axis=2) + np.arange(chunks) * width


@cuda.jit(cache=True)
def edit_logits_kernel(scores, chunk_max, chunk_argmax, logits, rows, settings, bias, seen):
    """scores[b,v] = edited logits[b,v], and their maximum in each chunk of v

    scores       (B, V)      f32   written, for requests that edit or sample
    chunk_max    (B, chunks) f32   written; inf where a raw logit is NaN or inf
    chunk_argmax (B, chunks) i32   written
    logits       (B, V)      f32   read
    rows         (B,)        i32   read
    settings, bias, seen     f32, f32, i32   rows of them read
    launch grid (chunks, B), thread block THREADS; a thread block owns a chunk of a row
    shared 8*WARP bytes: the argmax
    moves  4*B*V bytes, does B*V flops: bandwidth-bound; twice that to sample, four times to edit
    twin   edit_logits_ref
    """
    start_next_kernel()
    wait_for_inputs()
    b, chunk, V = cuda.blockIdx.y, cuda.blockIdx.x, logits.shape[1]
    raw = cuda.local.array(EDITS, float32)
    row, width = rows[b], ceil_div_int(V, cuda.gridDim.x)
    temperature, edited = settings[row, TEMPERATURE], settings[row, EDITED] > ZERO
    first = chunk * width
    end = min(first + width, V)
    best, best_v = NEG_INF, first
    for next_v in range(first + thread_index(), end, EDITS * THREADS):
        for i in range(EDITS):             # all on their way before the first is used
            v = next_v + i * THREADS
            raw[i] = logits[b, v] if v < end else NEG_INF
        for i in range(EDITS):
            x, v = raw[i], next_v + i * THREADS
            if (edited or temperature > ZERO) and v < end:
                if edited:
                    x += bias[row, v]
                    word = seen[row, v]
                    count = word & (IN_PROMPT - 1)
                    if word > 0:
                        repetition = settings[row, REPETITION]
                        x = x / repetition if x > ZERO else x * repetition
                    if count > 0:
                        x -= settings[row, PRESENCE] + settings[row, FREQUENCY] * float32(count)
                if temperature > ZERO:
                    x /= temperature
                scores[b, v] = x
            if not (raw[i] < INF):         # NaN compares false
                x = INF
            if x > best:                   # of equal ones the first stays
                best, best_v = x, v
    best, best_v = block_argmax(best, best_v)
    if cuda.threadIdx.x == 0:
        chunk_max[b, chunk], chunk_argmax[b, chunk] = best, best_v


def edit_logits(scores, chunk_max, chunk_argmax, logits, rows, settings, bias, seen, stream=0):
    B, V = logits.shape
    chunks = chunk_max.shape[1]
    assert scores.shape == (B, V) and chunk_max.shape == chunk_argmax.shape == (B, chunks)
    assert settings.shape[1] == NUM_SETTINGS and bias.shape == seen.shape, settings.shape
    edit_logits_kernel[(chunks, B), THREADS, stream](scores, chunk_max, chunk_argmax, logits, rows,
                                                     settings, bias, seen)


@cuda.jit(device=True)
def sortable(x):
    """A word that orders as the float does."""
    bits = float_bits(x)
    flipped = uint32(0xFFFFFFFF) if bits >> uint32(31) else uint32(0x80000000)
    return uint32(bits ^ flipped)


@cuda.jit(device=True)
def weight_of(x, m, exponent):
    """exp(x - m) or 1, in 2^-32; nothing for a token that is ruled out."""
    if x == NEG_INF:
        return uint64(0)
    return uint64(exp2((x - m) * exponent * LOG2E) * WEIGHT_ONE)


@cuda.jit(device=True)
def coarse_bin(x, m):
    """The bin of a logit, by its distance from the maximum; the lowest bin takes the rest."""
    return BINS - 1 - int32(min((m - x) * BINS_PER_UNIT, LAST_BIN))


@cuda.jit(device=True)
def lowest_kept(scores, b, floor, m, exponent, target, share):
    """The lowest key kept, if keys from the top on are kept until their weights reach a target: the
    target itself, or that share of the weight of all keys from `floor` on.

    A histogram of the weights finds the bin where the target is reached, first by the distance from
    the maximum `m`, which spreads the keys, then byte by byte among the keys that agree so far.
    Top-k is top-p with flat weights.
    """
    bins = cuda.shared.array(BINS, uint64)
    groups = cuda.shared.array(WARP, uint64)           # sums of BINS // WARP bins
    found = cuda.shared.array(4, uint64)               # key, weight above it, target, coarse bin
    tid, V, SIZE = cuda.threadIdx.x, scores.shape[1], BINS // WARP
    if tid == 0:
        # at least one unit of weight: nobody may be left without a token
        found[0], found[1], found[3] = uint64(0), uint64(0), uint64(0)
        found[2] = max(target, uint64(1))
    for round_ in range(5):
        for i in range(tid, BINS, cuda.blockDim.x):
            bins[i] = uint64(0)
        cuda.syncthreads()                 # else a weight is added to a bin not yet cleared
        settled, coarse = uint32(found[0]), int32(found[3])
        shift = uint32(32 - 8 * round_)    # of the byte that rounds 1 to 4 settle
        for v in range(tid, V, cuda.blockDim.x):
            x = scores[b, v]
            key = sortable(x)
            if key >= floor:
                i = coarse_bin(x, m)
                if round_ > 0:
                    # agrees: the same coarse bin, and above this byte the bits found so far.
                    # subtle: two shifts, for together they are 32 in round 1
                    agrees = i == coarse and uint32(key ^ settled) >> shift >> uint32(8) == 0
                    i = int32((key >> shift) & uint32(0xFF)) if agrees else -1
                if i >= 0:
                    cuda.atomic.add(bins, i, weight_of(x, m, exponent))
        cuda.syncthreads()                 # else the sums below miss weights
        if tid < WARP:
            total = uint64(0)
            for i in range(SIZE):
                total += bins[tid * SIZE + i]
            groups[tid] = total
        cuda.syncthreads()                 # else the walk below misses a group
        if tid == 0:
            if round_ == 0 and share > ZERO:
                total = uint64(0)
                for i in range(WARP):
                    total += groups[i]
                found[2] = max(uint64(1), uint64(float32(total) * share))
            above, i = found[1], WARP - 1
            while i > 0 and above + groups[i] < found[2]:
                above += groups[i]
                i -= 1
            i = i * SIZE + SIZE - 1
            while i % SIZE > 0 and above + bins[i] < found[2]:
                above += bins[i]
                i -= 1
            found[1] = above
            if round_ == 0:
                found[3] = uint64(i)
            else:
                found[0] = found[0] | (uint64(i) << uint64(shift))
        cuda.syncthreads()                 # else the next round starts from the last one's key
    key = uint32(found[0])
    cuda.syncthreads()                     # else the next call overwrites it
    return key


@cuda.jit(device=True)
def scramble(x):
    """hash_u32 of one word."""
    x = uint32(x ^ (x >> uint32(16)))
    x = uint32(uint64(x) * uint64(0x7FEB352D) & uint64(0xFFFFFFFF))
    x = uint32(x ^ (x >> uint32(15)))
    x = uint32(uint64(x) * uint64(0x846CA68B) & uint64(0xFFFFFFFF))
    return uint32(x ^ (x >> uint32(16)))


@cuda.jit(device=True)
def absorb(state, word):
    return uint32(uint64(scramble(uint32(state ^ word))) + uint64(0x9E3779B9) & uint64(0xFFFFFFFF))


@cuda.jit(device=True)
def gumbel(state, token):
    """gumbel_ref of one token."""
    bits = scramble(uint32(state ^ scramble(uint32(token))))
    uniform = (float32(bits >> uint32(9)) + float32(0.5)) * float32(2.0 ** -23)
    return -math.log(-math.log(uniform))


def sample_tokens_ref(sampled, state, seen, scores, chunk_max, chunk_argmax, rows, seq_lens,
                      settings, seeds):
    """The token of each request, and its state for the next step; -1 where no logit is finite.

    sampled (rows, 2) i32: a request's row, in which tokens after contexts of even and of odd
    lengths take turns, so that one may be read while the next is written; state (rows, 2) i32:
    newest token and context length; seeds (rows, 2) u32; the rest as in edit_logits_ref. The last
    row of state stands for nobody: it is left alone.
    """
    for b, row in enumerate(rows):
        best = int(chunk_max[b].argmax())
        token, s = int(chunk_argmax[b, best]), settings[row]
        if not np.isfinite(chunk_max[b, best]):
            token = -1
        elif s[TEMPERATURE] > 0:
            seed = int(seeds[row, 0]) | int(seeds[row, 1]) << 32
            token = sample_ref(scores[b].copy(), 1, int(s[TOP_K]), s[TOP_P], s[MIN_P], seed,
                               int(seq_lens[b]))
        sampled[row, seq_lens[b] & 1] = token
        if row < len(state) - 1:
            state[row] = max(token, 0), seq_lens[b]
            if s[EDITED] and token >= 0:
                seen[row, token] += 1


@cuda.jit(cache=True)
def sample_tokens_kernel(sampled, state, seen, scores, chunk_max, chunk_argmax, rows, seq_lens,
                         settings, seeds):
    """sampled[rows[b], S % 2] = argmax_v of scores[b,v] + gumbel(seed, S, v), over those kept

    sampled      (rows, 2)   i32   one of a row's two written, S is seq_lens[b]; -1 where no logit
                                   is finite
    state, seen  (rows, 2), (rows, V) i32   newest token, context length and count are written
    scores       (B, V)      f32   read once for a draw, eleven times with top-k and top-p
    chunk_max, chunk_argmax (B, chunks) f32, i32   read
    rows, seq_lens (B,)      i32   read
    settings, seeds (rows, 8) f32, (rows, 2) u32   read
    launch grid B, thread block SAMPLE_THREADS; a thread block owns a request
    shared 8*WARP + 8*(BINS + WARP + 4) bytes: argmax, histogram and its state
    moves  4*B*V bytes, does 40*B*V flops: latency-bound
    twin   sample_tokens_ref
    """
    start_next_kernel()
    wait_for_inputs()
    b, tid, V, chunks = cuda.blockIdx.x, cuda.threadIdx.x, scores.shape[1], chunk_max.shape[1]
    largest = cuda.local.array(EDITS, float32)
    row, best, best_chunk = rows[b], NEG_INF, 0
    for next_chunk in range(tid, chunks, EDITS * SAMPLE_THREADS):
        for i in range(EDITS):             # all on their way before the first is used
            chunk = next_chunk + i * SAMPLE_THREADS
            largest[i] = chunk_max[b, chunk] if chunk < chunks else NEG_INF
        for i in range(EDITS):
            if largest[i] > best:
                best, best_chunk = largest[i], next_chunk + i * SAMPLE_THREADS
    best, best_chunk = block_argmax(best, best_chunk)
    token = chunk_argmax[b, best_chunk]
    if not (NEG_INF < best and best < INF):
        token = -1
    elif settings[row, TEMPERATURE] > ZERO:
        floor = uint32(0)
        k, share = settings[row, TOP_K], settings[row, TOP_P]
        if k > ZERO and k < float32(V):
            floor = lowest_kept(scores, b, floor, best, FLAT, uint64(k * WEIGHT_ONE), ZERO)
        if share < ONE:
            floor = max(floor, lowest_kept(scores, b, floor, best, PEAKED, uint64(0), share))
        limit = NEG_INF
        if settings[row, MIN_P] > ZERO:
            limit = best + math.log(settings[row, MIN_P])
        noise = absorb(uint32(0), seeds[row, 0])
        noise = absorb(noise, seeds[row, 1])
        noise = absorb(noise, uint32(seq_lens[b]))
        drawn, drawn_v = NEG_INF, V
        for v in range(tid, V, SAMPLE_THREADS):
            x = scores[b, v]
            if sortable(x) >= floor and x >= limit:
                x += gumbel(noise, v)
                if larger(drawn, drawn_v, x, v):
                    drawn, drawn_v = x, v
        drawn, drawn_v = block_argmax(drawn, drawn_v)
        token = drawn_v
    if tid == 0:
        sampled[row, seq_lens[b] & 1] = token
        if row < state.shape[0] - 1:
            state[row, 0], state[row, 1] = max(token, 0), seq_lens[b]
            if settings[row, EDITED] > ZERO and token >= 0:
                seen[row, token] += 1


def sample_tokens(sampled, state, seen, scores, chunk_max, chunk_argmax, rows, seq_lens, settings,
                  seeds, stream=0):
    B = len(rows)
    assert len(seq_lens) == len(scores) == len(chunk_max) == B, (B, scores.shape)
    assert sampled.shape == state.shape == (len(seen), 2), (sampled.shape, state.shape, seen.shape)
    sample_tokens_kernel[B, SAMPLE_THREADS, stream](sampled, state, seen, scores, chunk_max,
                                                    chunk_argmax, rows, seq_lens, settings, seeds)


# -----------------------------------------------------------------------------
# 9. The beginning of a decode step                                 (lesson 16)
#
# What a step needs to know of a request stays on the device: its newest token, its length, its
# blocks. So a step whose batch has not changed needs nothing from the host.


def begin_decode_ref(tokens, positions, slots, seq_lens, splits, inputs, state, block_tables,
                     block_size, G, split, run):
    """The flat arrays of a decode step, from the state that the last step left.

    tokens, positions, slots, seq_lens (B,) i32 written; splits (B+1+splits,) i32 written: see
    lay_out_splits, for G KV heads; inputs (2, B) i32: row of each request, and the block to append
    to its table, used where its next token begins a block; state (rows, 2) i32; block_tables (rows,
    max blocks) i32, appended to.
    """
    for b, (row, new_block) in enumerate(inputs.T):
        tokens[b], position = state[row]
        if position % block_size == 0 and row < len(state) - 1:
            block_tables[row, position // block_size] = new_block
        block = block_tables[row, position // block_size]
        positions[b], seq_lens[b] = position, position + 1
        slots[b] = block * block_size + position % block_size
    laid_out = lay_out_splits(seq_lens, G, split, run)
    assert len(laid_out) <= len(splits), f"room for {len(splits)} of {len(laid_out)}"
    splits[:len(laid_out)] = laid_out


@cuda.jit(cache=True)
def begin_decode_kernel(tokens, positions, slots, seq_lens, splits, inputs, state, block_tables,
                        block_size, G, split, run):
    """positions[b] = state[row,1], slots[b] = block_tables[row, position // P] * P + position % P

    tokens, positions, slots, seq_lens (B,)  i32   written
    splits       (B+1+J,)         i32   written
    inputs       (2, B)           i32   read
    state        (rows, 2)        i32   read
    block_tables (rows, blocks)   i32   read, appended to where a block begins
    launch one thread block of THREADS; a thread owns every THREADS-th request
    shared 8*MAX_REQUESTS bytes: the number of pieces of each, and a key to sort its last by
    moves  40*B + 4*J bytes, does 0 flops: latency-bound
    needs  B <= MAX_REQUESTS (asserted in the launcher), a piece below 2**32 / MAX_REQUESTS tokens,
           room for all J pieces
    twin   begin_decode_ref
    """
    counts = cuda.shared.array(MAX_REQUESTS, int32)
    keys = cuda.shared.array(MAX_REQUESTS, uint32)
    start_next_kernel()
    wait_for_inputs()
    B, tid = tokens.shape[0], cuda.threadIdx.x
    for b in range(tid, B, THREADS):
        row, new_block = inputs[0, b], inputs[1, b]
        token, position = state[row, 0], state[row, 1]
        i = int64(divide(uint32(position), uint32(block_size)))
        offset = position - i * block_size
        if offset == 0 and row < state.shape[0] - 1:
            block_tables[row, i] = new_block
        tokens[b], positions[b], seq_lens[b] = token, position, position + 1
        slots[b] = block_tables[row, i] * block_size + offset
        size = piece_size_int(position + 1, G, split, run)
        count = int64(divide(uint32(position + size), uint32(size)))
        counts[b] = count
        left = position + 1 - (count - 1) * size
        keys[b] = uint32(left * MAX_REQUESTS + MAX_REQUESTS - 1 - b)       # of equals the first
    cuda.syncthreads()                     # else a count is read before it is written
    for b in range(tid, B, THREADS):
        key, count = load_shared_word(keys, b), counts[b]
        first, total, longer, other = uint32(0), uint32(0), uint32(0), uint32(0)
        while other < uint32(B):           # each thread goes through all, in 32 bits
            if other == uint32(b):
                first = total
            total = uint32(total + load_shared_word(counts, other))
            if load_shared_word(keys, other) > key:
                longer = uint32(longer + 1)
            other = uint32(other + 1)
        first, total, place = int64(first), int64(total), B + 1 + int64(longer)
        splits[b] = first
        if b + 1 == B:
            splits[B] = total
        for i in range(count - 1):                 # less b: the last of each request lies behind
            splits[B + 1 + first - b + i] = i * MAX_REQUESTS + b
        splits[place + total - B] = (count - 1) * MAX_REQUESTS + b


def begin_decode(tokens, positions, slots, seq_lens, splits, inputs, state, block_tables,
                 block_size, G, split, run, stream=0):
    B = len(tokens)
    assert len(positions) == len(slots) == len(seq_lens) == B and inputs.shape == (2, B), B
    assert B <= MAX_REQUESTS, f"{B} requests, expected at most {MAX_REQUESTS}"
    begin_decode_kernel[1, THREADS, stream](tokens, positions, slots, seq_lens, splits, inputs,
                                            state, block_tables, np.int32(block_size), np.int32(G),
                                            np.int32(split), np.int32(run))


# -----------------------------------------------------------------------------
# 10. A decode step as one kernel                                    (lesson 16)
#
# Between two kernels the memory idles: the last thread blocks of one end, those of the next start,
# and their first loads take their time. A decode step does little but read weights and contexts,
# and which ones is known from the start. So here one thread block on each multiprocessor stays for
# the whole step, and its warps have roles. One warp does nothing but start copies of weights, and
# of keys and values, into a ring of stages in shared memory: it goes on, as long as there is room,
# while the thread blocks wait for each other between two operations. One warp fills a second ring,
# with the tokens that meet the weights, as soon as all thread blocks have made them. Eight warps,
# the consumers, do everything else.
#
#   weights warp -> [ stage ][ stage ][ stage ][ stage ][ stage ] \
#                   of weights, or of keys and values              > consumers: tensor cores, norms,
#   tokens warp  -> [ stage ][ stage ][ stage ]                   /  rotation, softmax
#
# Thread blocks tell each other of their results at meetings: each counts itself in when its own are
# written, and waits until all have. With few tokens these meetings, of two microseconds each, are
# most of what a layer takes beyond the time of its weights. So what is little goes by mail, each
# word with a stamp that says which layer of which step it is of; the stream of few tokens has
# owners for each channel, who tell those who norm it; a single token every thread block norms for
# itself, and joins those of its splits that it needs; and while such news are due, the copies ahead
# take their time.
#
# Between two matmuls it is the length of the code that takes the time. So a kernel is compiled for
# one model: all sizes but the number of layers and those of the batch are constants in it.
#
# A matmul is cut into items: 128 rows of a weight matrix, a tile, by all of its K or a part of it.
# A thread block takes every gridDim.x-th item and goes on from one matrix to the next without a
# gap, in steps of 64 along K, each a stage. All three roles walk the same schedule. Weights are the
# rows of wgmma and tokens its columns, so kernels for few and for many tokens take each sum over K
# in the same order: no answer depends on the company.

DECODE_GROUPS = DECODE_WARPS // 4          # warpgroups of consumers; each has 64 rows of a tile
CONSUMERS = WARP * DECODE_WARPS            # threads
TILE_ROWS = 64 * DECODE_GROUPS
STAGE_WORDS = TILE_ROWS * 32               # 64 elements of each row
DECODE_TOKENS = 1, 8, 16, 32, 64, 128, 192, 256   # there is a kernel for up to so many tokens each
MAX_DECODE_TOKENS = max(DECODE_TOKENS)
MAX_PARTS = 2 if SIMULATOR else 8          # of a matrix's K
MULTIPROCESSORS = 2 if SIMULATOR else 132  # that the parts are made for; they must not depend on
                                           # the GPU, or its sums would
PERSISTENT_SHARED = (227 - 1) << 10        # bytes; 1 KB is left for static arrays
MAX_SUM_WORDS = 20480                      # of it for what sum_words_of counts: FAST stages are
                                           # left
X_WORDS = 4096                             # for the tokens' ring; three stages if that is more
# barriers of the rings: full[i], that a copy has landed, and empty[i], that all consumers are done;
# and the last, that all of them have read the sums of an item of attention
MAX_STAGES, MAX_X_STAGES = 16, 8
EMPTY, X_FULL, X_EMPTY = MAX_STAGES, 2 * MAX_STAGES, 2 * MAX_STAGES + MAX_X_STAGES
JOINED = 2 * MAX_STAGES + 2 * MAX_X_STAGES
NUM_BARRIERS = JOINED + 1
QKV, O, GATE_UP, DOWN, LM_HEAD = range(5)  # the matmuls of a layer in their order, and the last one
H_MAP, O_MAP, ACT_MAP, KV_MAP = range(5, 9)            # tensor maps behind those of the matrices
# the plan for a matrix is (items, tiles of its rows, parts of its K, steps of an item, rows, where
# its letters begin)
ITEMS, PARTS, PLACE = 0, 2, 5
CHUNK = 16                                 # logits of which one warp finds the largest: its rows
FAST = 3                                   # stages of weights on their way at once, see
                                           # await_copies; SLOW is each kernel's own
MAIL_TOKENS = 16                           # for so many, at most, parts of matmuls go by mail
MAIL_SPLITS = 16                           # of one token, at most, for their sums to go by mail
# what is there when all thread blocks have met for the n-th time in a layer; past the layers the
# first comes once more, for the last norm. With few tokens nobody comes to some of these.
(NORMED, QKV_MADE, SPLITS_ATTENDED, ATTENDED, O_MADE, NORMED_AGAIN, ACTIVATED,
 DOWN_MADE) = range(8)
MEETINGS = 8


def layer_size(H, G, D, C, F):
    """Elements of the four matrices of a layer."""
    return (H + 2 * G) * D * C + C * H * D + 3 * F * C


def shapes_of_layer(H, G, D, C, F):
    """(rows, K) of the matrices of a layer, in the order of their use."""
    return ((H + 2 * G) * D, C), (C, H * D), (2 * F, C), (C, F)


def matrices_of_layer(matrices, layer, H, G, D, C, F):
    """Views of layer `layer` in the flat array of all weight matrices, which are in the order of
    their use: wqkv, wo, w_gate_up, w_down of each layer, one behind another, then lm_head."""
    at, views = layer * layer_size(H, G, D, C, F), []
    for N, K in shapes_of_layer(H, G, D, C, F):
        views.append(matrices[at:at + N * K].reshape(N, K))
        at += N * K
    return views


def parts_of(N, K):
    """In how many parts K is cut, so that a matrix of few rows has work for every multiprocessor;
    who reads the product adds them."""
    parts = 1
    while (parts < MAX_PARTS and ceil_div(N, TILE_ROWS) * 2 * parts <= MULTIPROCESSORS
           and K % (2 * parts * 64) == 0):
        parts *= 2
    return parts


def decode_plan(H, G, D, C, F, V):
    """For each of the five matrices the six numbers of its plan, which kernels are compiled with.
    """
    plan, place = [], 0
    for kind, (N, K) in enumerate((*shapes_of_layer(H, G, D, C, F), (V, C))):
        parts = parts_of(N, K) if kind in (QKV, O, DOWN) else 1
        tiles = ceil_div(N, TILE_ROWS)
        plan.append((tiles * parts, tiles, parts, K // parts // 64, N, place))
        if kind == QKV:                    # behind its letters come those of attention
            place += MAIL_TOKENS * parts * N + MAIL_SPLITS * H * (D + 2)
        elif kind in (O, DOWN):
            place += MAIL_TOKENS * parts * N
        elif kind == GATE_UP:              # two channels of the activations in a letter
            place += N // 4
    return tuple(plan)


def parts_size(B, H, G, D, C, F):
    """Elements of `parts` of forward_decode for up to B tokens."""
    shapes = shapes_of_layer(H, G, D, C, F)
    return B * max(parts_of(*shapes[kind]) * shapes[kind][0] for kind in (QKV, O, DOWN))


def mail_size(H, G, D, C, F):
    """Letters of forward_decode. Of MAIL_TOKENS tokens: parts of q, k and v, and of what o and down
    add to the residual stream; and this itself, before either norm of a layer, two channels in a
    letter. Of one token: its attention, as many in a letter, or what its splits leave, as in
    `partial`; and its activations, two channels in a letter."""
    (rows, _), o, _, down = shapes_of_layer(H, G, D, C, F)
    return (MAIL_TOKENS * (parts_of(rows, C) * rows + (parts_of(*o) + parts_of(*down)) * C + C)
            + MAIL_SPLITS * H * (D + 2) + F // 2)


def forward_decode_ref(logits, largest, largest_at, x, h, o, act, kv_cache, parts, partial, mail,
                       arrivals, tokens, slots, rows, seq_lens, splits, block_tables, cos, sin,
                       embed, norms, matrices, eps, greedy):
    """Logits of one token for each request, or the largest of them: the whole transformer.

    logits (B, V) f32 written or, if greedy, the largest of each CHUNK of them, (B, V/CHUNK) f32,
    inf where one is NaN or inf, and its token, i32; x (B, C) written; h (B, C), o (B, H, D) and
    act (B, F) are workspace; kv_cache (2, L, blocks, P, G, D) appended to; parts (parts_size,),
    partial (J, H, D+2), mail (mail_size,) u64 and arrivals (8L+3,) u32 are the kernel's own, at
    first 0, and the last of arrivals counts its launches; tokens, slots, rows, seq_lens (B,) i32,
    splits and block_tables as begin_decode leaves them; embed (V, C); norms (2L+1, C): before
    attention and MLP of each layer, and the last; matrices: see matrices_of_layer.
    """
    B, (H, D), G, C, F = len(x), o.shape[1:], kv_cache.shape[4], x.shape[1], act.shape[1]
    delta, gate_up = np.empty_like(x), np.empty((B, 2 * F), x.dtype)
    qkv = np.empty((B, H + 2 * G, D), x.dtype)
    starts = np.arange(B + 1, dtype=np.int32)
    embedding_ref(x, tokens, embed)
    k_cache, v_cache = kv_cache[0], kv_cache[1]
    for l in range(len(k_cache)):
        wqkv, wo, w_gate_up, w_down = matrices_of_layer(matrices, l, H, G, D, C, F)
        rmsnorm_ref(h, x, norms[2 * l], eps)
        matmul_ref(qkv.reshape(B, -1), h, wqkv)
        rope_write_kv_ref(qkv, k_cache[l], v_cache[l], cos, sin, seq_lens - 1, slots)
        paged_attention_ref(o, qkv, k_cache[l], v_cache[l], block_tables, rows, starts, seq_lens,
                            splits, partial)
        matmul_ref(delta, o.reshape(B, -1), wo)
        add_rmsnorm_ref(h, x, delta, norms[2 * l + 1], eps)
        matmul_silu_mul_ref(act, h, w_gate_up, gate_up)
        matmul_ref(delta, act, w_down)
        add_ref(x, delta)
    rmsnorm_ref(h, x, norms[-1], eps)
    arrivals[-1] += 1
    lm_head = matrices[len(k_cache) * layer_size(H, G, D, C, F):].reshape(-1, C)
    if not greedy:
        matmul_ref(logits, h, lm_head)
        return
    raw = np.empty(logits.shape, np.float32)
    matmul_ref(raw, h, lm_head)
    chunks = raw.reshape(B, -1, CHUNK)
    highest = chunks.max(axis=2)                                       # NaN wins every maximum
    largest[:] = np.where(highest < np.inf, highest, np.inf)
    largest_at[:] = chunks.argmax(axis=2) + np.arange(chunks.shape[1]) * CHUNK


@cuda.jit(device=True)
def arrive(arrivals, meeting):
    """This thread block has come to a meeting: all that its consumers wrote before is visible to
    who waits for it."""
    meet(1, CONSUMERS)                     # else the arrival is counted before all threads wrote
    if thread_index() == 0:
        add_release(arrivals, meeting, uint32(1))


@cuda.jit(device=True)
def await_all(arrivals, meeting):
    """One thread waits until all thread blocks have come to a meeting. Hazard: all must be on the
    GPU at once. One for each multiprocessor they are, unless another stream runs this kernel, too:
    then both could wait forever."""
    while load_relaxed(arrivals, meeting) < uint32(cuda.gridDim.x):
        pass
    load_acquire(arrivals, meeting)


@cuda.jit(device=True)
def gather(arrivals, meeting):
    """All consumers wait for a meeting."""
    if thread_index() == 0:
        await_all(arrivals, meeting)
    meet(1, CONSUMERS)                     # else a thread reads before the others have arrived


@cuda.jit(device=True)
def stamp_of(launches, num_matrices, layer):
    """What a layer's letters of this launch are stamped with; the same stamp comes again after
    2**32 / num_matrices launches."""
    return uint32(launches * uint32(num_matrices) + uint32(layer + 1))


@cuda.jit(device=True)
def uniform(word):
    """A word that is the same in all lanes of a warp, which the compiler then knows: it keeps in
    registers that the lanes have in common, and computes once, what follows from it."""
    return shuffle(word, uint32(0))


@cuda.jit(device=True)
def first_item_after(item, items):
    """A thread block's next item counted from behind so many, the one before them being `item`."""
    while item < items:
        item += cuda.gridDim.x
    return item - items


@cuda.jit(device=True)
def kind_of(matrix, num_matrices):
    """Which matmul of a layer the n-th matrix of all is."""
    return LM_HEAD if matrix + 1 == num_matrices else matrix & 3


@cuda.jit(device=True)
def tile_and_part(item, tiles):
    """What an item of a matrix is: 128 of its rows by a part of its K, which neighbours have in
    common, so that they ask for the same tokens."""
    part = int64(divide(uint32(item), uint32(tiles)))
    return item - part * tiles, part


def keys_of_stage(D):
    """Tokens whose keys and values have room in a stage, a power of two."""
    keys = 16
    while 2 * keys * D <= STAGE_WORDS:
        keys *= 2
    return keys


@cuda.jit(device=True)
def open_context(turn, row, g, key, end, P, block_tables):
    """KV head, first key and end of the item that lane `turn` has looked up, where its blocks begin
    in the flat block table, and the first 32 of them, one in each lane."""
    turn, lane = uint32(turn), thread_index() % WARP
    g = shuffle(uint32(g), turn)
    k, end = int64(shuffle(uint32(key), turn)), int64(shuffle(uint32(end), turn))
    n = (int64(shuffle(uint32(row), turn)) * block_tables.shape[1]
         + int64(divide(uint32(k), uint32(P))))
    return g, k, end, n, load_word(block_tables, min(n + lane, block_tables.size - 1))


def make_copy_blocks(start_copy):
    """The device function for copy_box_5d or copy_box_5d_once."""

    @cuda.jit(device=True)
    def copy_blocks(ring, at, maps, blocks, from_lane, count, block, token, box, D, KEYS, g, layer,
                    barriers, stage):
        """Starts the copies of a stage: of `count` blocks, which lanes from from_lane on know,
        `box` keys from `token` on, and as many values. Subtle: this warp is alone with them, and a
        few instructions more for each box would be the pace of all attention."""
        i = uint32(0)
        while i < count:
            slot = uint32(shuffle(blocks, uint32(from_lane + i)) * block + token)
            if elect() == 1:
                for part in range(D // 64):
                    start_copy(ring, at + part * KEYS * 64, maps, KV_MAP * 16, uint32(part * 64),
                               g, slot, uint32(layer), uint32(0), barriers, stage)
            at += box * uint32(64)
            i = uint32(i + uint32(1))
    return copy_blocks


copy_blocks, copy_blocks_once = make_copy_blocks(copy_box_5d), make_copy_blocks(copy_box_5d_once)


@cuda.jit(device=True)
def stream_context(ring, first, stage, stages, parity, barriers, maps, item, layer, D, KEYS, G, P,
                   block_tables, rows, seq_lens, splits, run):
    """A warp fills stages with keys and values of all items of this thread block: for each block of
    the cache, its keys and then its values. It may run before this step's own are written: who uses
    them puts those in, see patch_tile."""
    lane, stride, block = thread_index() % WARP, cuda.gridDim.x, uint32(P)
    box, bits = uint32(min(P, KEYS)), uint32(0)
    while box >> bits > uint32(1):         # a power of two
        bits = uint32(bits + uint32(1))
    boxes = uint32(uint32(KEYS) >> bits)   # of a stage; all in 32 bits, this warp sets the pace
    items = int64(load_word(splits, seq_lens.shape[0])) * G
    # a thread block has one item at most; with many more copy_blocks_once made a step 13 % slower
    once = items <= stride
    # each lane has looked up one of the thread block's next 32 items: one item after another these
    # loads, each of which waits for the one before, would take longer than the copies
    b, _, heads, keys, ends, _ = locate(in_turns(item + lane * stride, items, stride, run), G,
                                        seq_lens, splits, SPLIT, run)
    row = load_word(rows, b)
    g, k, end, n, blocks = open_context(0, row, heads, keys, ends, P, block_tables)
    turn = 0
    while item < items:
        turn += 1
        if turn == WARP:
            turn = 0
            b, _, heads, keys, ends, _ = locate(
                in_turns(item + (1 + lane) * stride, items, stride, run), G, seq_lens, splits,
                SPLIT, run)
            row = load_word(rows, b)
        next_g, next_k, next_end, next_n, next_blocks = open_context(
            turn, row, heads, keys, ends, P, block_tables)
        # invariant: a stage begins with a block or inside one, for P and its keys are powers of two
        # and a piece is whole stages
        from_lane, left = uint32(0), uint32(end - k)
        token = uint32(uint32(k) & (block - uint32(1)))
        while left > 0:
            count, tokens = boxes, uint32(KEYS)
            if left < tokens:
                count, tokens = uint32(uint32(left + box - uint32(1)) >> bits), left
            if from_lane == WARP:
                from_lane, n = uint32(0), n + WARP
                blocks = load_word(block_tables, min(n + lane, block_tables.size - 1))
            await_barrier(barriers, EMPTY + stage, parity)
            if elect() == 1:
                barrier_expect(barriers, stage, uint32(count * box * uint32(D * 4)))
            at = first + stage * STAGE_WORDS
            if once:
                copy_blocks_once(ring, at, maps, blocks, from_lane, count, block, token, box, D,
                                 KEYS, g, layer, barriers, stage)
            else:
                copy_blocks(ring, at, maps, blocks, from_lane, count, block, token, box, D, KEYS, g,
                            layer, barriers, stage)
            token = uint32(token + uint32(KEYS))               # the next stage: in the same block
            if token >= block:                                 # or past it
                token, from_lane = uint32(0), uint32(from_lane + boxes)
            stage, parity = next_stage(stage, parity, stages)
            left = uint32(left - tokens)
        g, k, end, n, blocks = next_g, next_k, next_end, next_n, next_blocks
        item += stride
    return item - items, stage, parity


@cuda.jit(device=True)
def await_copies(barriers, stage, parity, stages, pace):
    """Waits until fewer than `pace` stages before this one are on their way. FAST keeps the memory
    busy; more would only stand in its queues, and in the way of what thread blocks tell each other.
    While they do that and no stage is missing, SLOW is enough."""
    if stage >= pace:
        await_barrier(barriers, stage - pace, uint32(parity ^ uint32(1)))
    else:
        await_barrier(barriers, stage + stages - pace, parity)


@cuda.jit(device=True)
def await_letter(mail, i, stamp):
    """Asks for one letter until it has come, before all that are due are asked for: so many
    questions at once would stand in their way."""
    _, sent = receive(mail, i)
    while sent != stamp:
        _, sent = receive(mail, i)


@cuda.jit(device=True)
def receive_8(words, mail, i, stamp):
    """Eight channels, two to a letter, when all four letters have come."""
    missing = True
    while missing:
        missing = False
        for n in range(0, 4, 2):
            words[n], sent, words[n + 1], next_sent = receive_2(mail, i + n)
            missing |= sent != stamp or next_sent != stamp


@cuda.jit(device=True)
def copy_made(ring, at, source, steps, step_words):
    """A warp copies some steps of the one token, from ring[source] on, to a stage of the tokens'
    ring, where it is the first row: its pieces keep their order. What lies in the other rows meets
    nobody, for each is a column of the product."""
    words = cuda.local.array(4, uint32)
    for piece in range(thread_index() % WARP, steps * 8, WARP):
        load_shared(words, 0, ring, source + piece * 4)
        store_shared(ring, at + piece // 8 * step_words + piece % 8 * 4, words, 0)


@cuda.jit(device=True)
def copy_mailed(ring, at, mail, source, steps, step_words, stamp):
    """The same from its letters, mail[source:], as they come."""
    words = cuda.local.array(4, uint32)
    if thread_index() % WARP == 0:
        await_letter(mail, source, stamp)
    meet_warp()
    for piece in range(thread_index() % WARP, steps * 8, WARP):
        receive_8(words, mail, source + piece * 4, stamp)
        store_shared(ring, at + piece // 8 * step_words + piece % 8 * 4, words, 0)


def x_steps_of(N):
    """Steps along K whose tokens come with one copy, a power of two."""
    return max(1, min(4, 128 // N))


def x_rows_of(N):
    """Rows of tokens for tensor cores, which take no fewer than 8."""
    return max(8, N)


def x_stage_words_of(N):
    """Words of a stage of tokens: for each step 64 elements of each row."""
    return x_steps_of(N) * x_rows_of(N) * 32


def columns_of(N):
    """Tokens of one wgmma: all, or half of more than 128."""
    return x_rows_of(N) if N <= 128 else N // 2


def has_one_item_each(N, G, multiprocessors):
    """Whether no thread block ever has two items of attention, however long a context: a token that
    is alone. What is between its two items then need not be compiled, nor have shared memory."""
    return N == 1 and most_splits(G) * G <= multiprocessors


def every_block_has_work(H, G, D, C, F, V, multiprocessors):
    """Whether the one token may have its kernel: whether each thread block has an item of a matrix
    between a norm and the one after the next, not counting the last matrix before that. There the
    letters of x are written again. Invariant: then all have read them, for nobody comes so far
    before all those items are made, and who makes one has read them before."""
    qkv, o, gate_up, down, _ = (matrix[ITEMS] for matrix in decode_plan(H, G, D, C, F, V))
    return qkv + gate_up + min(o, down) >= multiprocessors


def attention_words(H, G, D, C, one_each):
    """Words of shared memory for the sums of attention, or for the parts of a group in their place;
    for the parts of one more; and for all that attention needs: two groups are behind those. Who
    has one item at most has one group, whose parts come by mail."""
    R = H // G
    sums, group = DECODE_WARPS * R * (D + 2), (R + 2) * (D // 2)
    if one_each:
        return sums, 0, sums + group
    fetched = (parts_of((H + 2 * G) * D, C) * (R + 2) + R + 1) * D     # and cosines and sines
    place = max(sums, fetched)
    return place, fetched, place + fetched + 2 * group


def sum_words_of(H, G, D, C, one_each=False):
    """Shared words for attention; or for gains and a token in a norm; or, behind the place of
    gains, for one token's attention, see merge_own."""
    return max(attention_words(H, G, D, C, one_each)[2], C, (C + H * D) // 2)


def persistent_rings(H, G, D, C, N, multiprocessors):
    """Words of shared memory for sums, stages for weights and stages for up to N tokens."""
    sum_words = sum_words_of(H, G, D, C, has_one_item_each(N, G, multiprocessors))
    x_stage_words = x_stage_words_of(N)
    # a token that is alone comes from near, and two leave room for one more of weights
    x_stages = 2 if N == 1 else min(MAX_X_STAGES, max(3, X_WORDS // x_stage_words))
    # 256 words, for stages begin at a multiple of 1024 bytes
    left = PERSISTENT_SHARED // 4 - sum_words - 256 - x_stages * x_stage_words
    stages = min(MAX_STAGES, left // STAGE_WORDS)
    assert stages >= FAST, stages
    return sum_words, stages, x_stages


def make_attend_stages(N, H, G, D, C, P, multiprocessors):
    """Decode attention out of the ring, for one shape and up to N tokens: the device function."""
    KEYS, R, ALONE = keys_of_stage(D), H // G, N == 1
    PARTS_MADE = parts_of((H + 2 * G) * D, C)          # of queries, keys and values
    ONE_EACH = has_one_item_each(N, G, multiprocessors)
    FETCHED, FETCHED_WORDS, _ = attention_words(H, G, D, C, ONE_EACH)
    GROUPS, GROUP_WORDS, AHEAD = FETCHED + FETCHED_WORDS, (R + 2) * (D // 2), 1 if ONE_EACH else 2
    BOX = min(P, KEYS)             # tokens of a block that one copy brings
    TILE = min(KEYS, 32)           # keys of a warp at once: of 16, half as many to wait for, of
                                   # 64, four warps would have nothing to do with 256
    TILES, HALVES, CHUNKS = KEYS // TILE, TILE // 16, D // 8   # CHUNKS: 16-byte pieces of a token
    TURNS = DECODE_WARPS // TILES                      # stages from one tile of a warp to its next
    SPLITS_MAILED = most_splits(G) <= MAIL_SPLITS      # all, of a token that is alone
    run = run_of(N, D)             # a kernel for few tokens does not contain what it needs for more
    add_scores, store_sums, joined, join_warps, join_run = make_attention_sums(D, HALVES,
                                                                               IN_ORDER=True)
    SCORES, WEIGHTS = HALVES * 8, HALVES * 4           # registers of a tile's
    Q_WORDS, OUTS = D // 16 * 4, D // 8 * 4            # registers of queries and of sums
    HEAD_TERMS = PARTS_MADE * 4
    KEPT = 4 * RUN * ceil_div(16 * (D // 2), CONSUMERS)        # see join_run, of 16 heads at most

    @cuda.jit(device=True)
    def place_of(row, chunk, values):
        """Words from the beginning of a stage to a piece of a token's key or value: boxes lie one
        behind another, in each the keys and then the values of BOX tokens, a power of two."""
        line = (row & -BOX) * 2 + values * BOX + (row & (BOX - 1))
        return chunk // 8 * (KEYS * 64) + line * 32 + ((chunk ^ line) & 7) * 4

    @cuda.jit(device=True)
    def look_up(item, items, stride, seq_lens, splits, slots):
        """Of an item: request, first key, end, length of the context, piece and KV head, and the
        slot of the context's last token, which is new. Each lane of a warp asks for another of the
        thread block's next 32 items: one after another this would take longer than the items."""
        b, j, g, key, end, S = locate(in_turns(item, items, stride, run), G, seq_lens, splits,
                                      SPLIT, run)
        return (uint32(b), uint32(key), uint32(end), uint32(S), uint32(j), uint32(g),
                load_word(slots, b))

    @cuda.jit(device=True)
    def unit_of_group(unit, g):
        """A group is what is new of an item: the R query heads of a KV head, its key and its value.
        A unit of it is two channels of each half of a head, for those are rotated together: which
        head of the group, which of all, where behind the queries lie the keys and then the values,
        and the first channel."""
        n = uint32(unit // (D // 4))
        head = uint32(g * R + n if n < R else n * G + g)
        return n, head, uint32(unit % (D // 4) * 2)

    @cuda.jit(device=True)
    def fetch_group(sums, at, first_unit, b, g, position, B, parts, cos, sin):
        """Starts copies of what rotate_group needs to sums[at:]: the parts of each unit, then its
        cosines and sines, but for values. Each thread fetches what it will use itself, so that
        nobody waits for another."""
        unit, units, heads = uint32(first_unit), uint32((R + 2) * (D // 4)), (R + 2) * G
        while unit < units:
            n, head, i = unit_of_group(unit, g)
            place, source = uint32(at + unit * 2), uint32((b * heads + head) * D + i)  # in part 0
            for _ in range(PARTS_MADE):
                copy_8_async(sums, place, parts, source)
                copy_8_async(sums, uint32(place + units * 2), parts, uint32(source + D // 2))
                place, source = uint32(place + units * 4), uint32(source + B * heads * D)
            if n <= R:
                turn = uint32(position * (D // 2) + i)
                copy_8_async(sums, place, cos, turn)
                copy_8_async(sums, uint32(place + (R + 1) * (D // 2)), sin, turn)
            unit = uint32(unit + CONSUMERS)
        copies_commit()

    @cuda.jit(device=True)
    def rotate_group(ring, at, sums, fetched, first_unit, b, g, slot, position, B, k_cache, v_cache,
                     mail, mailed, stamp, cos, sin):
        """The group of KV head g of request b, from what fetch_group brought or from letters, to
        ring[at:] as (R+2, D), and key and value to their block, too; splits of one context write
        the same there. A thread has the units from first_unit on, CONSUMERS apart."""
        terms = cuda.local.array(HEAD_TERMS, float32)
        turns = cuda.local.array(4, float32)
        unit, units, heads = uint32(first_unit), uint32((R + 2) * (D // 4)), (R + 2) * G
        while unit < units:
            n, head, i = unit_of_group(unit, g)
            if ONE_EACH or N <= MAIL_TOKENS and mailed:
                load_2_floats(turns, 0, cos, position * (D // 2) + i)
                load_2_floats(turns, 2, sin, position * (D // 2) + i)
                letter, missing = (b * heads + head) * D + i, True             # in part 0
                await_letter(mail, letter, stamp)
                while missing:
                    missing = False
                    for p in range(PARTS_MADE):
                        for c in range(0, 4, 2):
                            word, sent, next_word, next_sent = receive_2(
                                mail, letter + p * B * heads * D + c * (D // 4))
                            terms[p * 4 + c] = float_of(word)
                            terms[p * 4 + c + 1] = float_of(next_word)
                            missing |= sent != stamp or next_sent != stamp
                for p in range(1, PARTS_MADE):
                    for c in range(4):
                        terms[c] += terms[p * 4 + c]
            else:
                copies_wait_all()
                term = uint32(fetched + unit * 2)
                terms[0], terms[1] = load_2_shared(sums, term)
                terms[2], terms[3] = load_2_shared(sums, term + units * 2)
                for _ in range(1, PARTS_MADE):
                    term = uint32(term + units * 4)
                    low, low_1 = load_2_shared(sums, term)
                    high, high_1 = load_2_shared(sums, term + units * 2)
                    terms[0], terms[1] = terms[0] + low, terms[1] + low_1
                    terms[2], terms[3] = terms[2] + high, terms[3] + high_1
                if n <= R:
                    term = uint32(term + units * 4)
                    turns[0], turns[1] = load_2_shared(sums, term)
                    turns[2], turns[3] = load_2_shared(sums, term + (R + 1) * (D // 2))
            # subtle: an element before it is rotated, as in every rung
            one, two = pack(terms[0], terms[1], k_cache), pack(terms[2], terms[3], k_cache)
            if n <= R:
                low, low_1 = low_element(one, k_cache), high_element(one, k_cache)
                high, high_1 = low_element(two, k_cache), high_element(two, k_cache)
                one = pack(multiply_add(low, turns[0], -high * turns[2]),
                           multiply_add(low_1, turns[1], -high_1 * turns[3]), k_cache)
                two = pack(multiply_add(high, turns[0], low * turns[2]),
                           multiply_add(high_1, turns[1], low_1 * turns[3]), k_cache)
            word = uint32(at + (n * D + i) // 2)
            ring[word], ring[uint32(word + D // 4)] = one, two
            if n >= R:
                cache, place = k_cache if n == R else v_cache, (slot * G + g) * D + i
                store_word(cache, place, one)
                store_word(cache, place + D // 2, two)
            unit = uint32(unit + CONSUMERS)

    @cuda.jit(device=True)
    def load_queries(q, ring, at):
        """R heads as A fragments; rows past them repeat the last, and nobody reads their sums."""
        lane = thread_index() % WARP
        row = at + min(lane % 16, R - 1) * (D // 2) + lane // 16 * 4
        for step in range(D // 16):
            load_matrices(q, step * 4, ring, row + step * 8)

    @cuda.jit(device=True)
    def patch_tile(ring, at, row, new, words):
        """Puts this step's key and value, which lie at ring[new:], into their row of a stage."""
        piece = uint32(thread_index() % WARP)
        while piece < 2 * CHUNKS:
            load_shared(words, 0, ring, new + piece * 4)
            store_shared(ring, at + place_of(row, piece % CHUNKS, piece // CHUNKS), words, 0)
            piece = uint32(piece + WARP)
        meet_warp()

    @cuda.jit(device=True)
    def load_keys(words, ring, at, row, step):
        """16 channels of 16 keys, from `row` of a stage on."""
        lane = thread_index() % WARP
        load_matrices(words, step % 4 * 4, ring, at + place_of(
            row + lane // 16 * 8 + lane % 8, step * 2 + lane // 8 % 2, 0))

    @cuda.jit(device=True)
    def load_values(words, ring, at, row, step, keep, keep_far):
        """16 channels of their values, without those of tokens that are not there: these meet a
        weight of 0, but may be NaN."""
        lane = thread_index() % WARP
        load_matrices_transposed(words, step % 4 * 4, ring, at + place_of(
            row + lane % 16, step * 2 + lane // 16, 1))
        for i in range(0, 4, 2):
            words[step % 4 * 4 + i] &= keep
            words[step % 4 * 4 + i + 1] &= keep_far

    @cuda.jit(device=True)
    def mask_of(left):
        """The bits of a word with two tokens' elements of which `left` are there."""
        if left >= 2:
            return uint32(0xFFFFFFFF)
        return uint32(0xFFFF) if left == 1 else uint32(0)

    @cuda.jit(device=True)
    def add_tile(acc, m, l, q, ring, at, row, x, p, keys, values, first, end, scale, like):
        """A tile of keys, from `row` of a stage on, and their values; 64 channels at once are on
        their way to registers, of the first values before the weights are known."""
        for i in range(SCORES):
            x[i] = ZERO
        for half in range(HALVES):                             # x (HALVES, 16, 16) = q @ k.T
            for part in range(D // 64):
                for step in range(4):
                    load_keys(keys, ring, at, row + half * 16, part * 4 + step)
                for step in range(4):
                    mma(x, half * 8, q, part * 16 + step * 4, keys, step * 4, like)
                    mma(x, half * 8 + 4, q, part * 16 + step * 4, keys, step * 4 + 2, like)
        left = int32(end - first - thread_index() % 4 * 2)     # tokens from this lane's first on
        for step in range(4):
            load_values(values, ring, at, row, step, mask_of(left), mask_of(left - 8))
        add_scores(acc, m, l, x, p, R, first, end, scale, like)
        for half in range(HALVES):                             # acc (16 heads, D) += p @ v
            keep, keep_far = mask_of(left - half * 16), mask_of(left - half * 16 - 8)
            for step in range(D // 16):
                if half > 0 or step >= 4:
                    load_values(values, ring, at, row + half * 16, step, keep, keep_far)
                mma(acc, step * 8, p, half * 4, values, step % 4 * 4, like)
                mma(acc, step * 8 + 4, p, half * 4, values, step % 4 * 4 + 2, like)

    @cuda.jit(device=True)
    def mail_heads(mail, o_mail, stamp, sums, g, like):
        """The attention of the one token's KV head g, two channels in a letter."""
        i = uint32(thread_index())
        while i < R * (D // 2):
            o, next_o, _, l = joined(sums, i // (D // 2), i % (D // 2) * 2, R)
            send(mail, o_mail + g * R * (D // 2) + i,
                 pack(o * inverse(l), next_o * inverse(l), like), stamp)
            i = uint32(i + CONSUMERS)

    @cuda.jit(device=True)
    def mail_split(mail, o_mail, stamp, sums, j, g):
        """What a split of the one token's context leaves of KV head g, as join_warps would."""
        i = uint32(thread_index())
        while i < R * (D // 2):
            r, place = i // (D // 2), i % (D // 2) * 2
            o, next_o, m, l = joined(sums, r, place, R)
            letter = o_mail + (j * H + g * R + r) * (D + 2)
            send_2(mail, letter + place, float_bits(o), float_bits(next_o), stamp)
            if place == 0:
                send_2(mail, letter + D, float_bits(m), float_bits(l), stamp)
            i = uint32(i + CONSUMERS)

    @cuda.jit(device=True)
    def attend_stages(out, partial, sums, ring, first, stage, stages, parity, joined_parity,
                      barriers, item, k_cache, v_cache, parts, mail, mailed, stamp, o_mail,
                      arrivals, made, cos, sin, slots, seq_lens, items, splits):
        """Attention of this thread block's items, whose contexts stream_context brings. All warps
        work on an item, or on its splits one after another, a warp on every DECODE_WARPS-th tile of
        a split; a stage without a tile of its own a warp gives back unread, and of a short split
        before it is filled. They meet after each.

        Behind the sums lie the parts of a group, as fetched, and two groups: while the first
        threads join the sums of an item, the last ones rotate for the item after the next, whose
        parts they have fetched during its tiles. mailed: there is one item at most, and its parts
        come by mail; otherwise the meeting `made` says that all are there."""
        q = cuda.local.array(Q_WORDS, uint32)
        keys = cuda.local.array(16, uint32)
        values = cuda.local.array(16, uint32)
        x = cuda.local.array(SCORES, float32)
        p = cuda.local.array(WEIGHTS, uint32)
        acc = cuda.local.array(OUTS, float32)
        kept = cuda.local.array(KEPT, float32)             # in local memory: its index is a number
        m = cuda.local.array(2, float32)
        l = cuda.local.array(2, float32)
        tid, stride = thread_index(), cuda.gridDim.x
        lane, warp = tid % WARP, tid // WARP
        own, own_turn = warp % TILES, warp // TILES            # this warp's tile, and which stage's
        scale, B = LOG2E / math.sqrt(float32(D)), seq_lens.shape[0]
        longest = uint32(longest_run(G, SPLIT, run))
        turn = 0                           # lane n knows the n-th item from here on
        all_b, all_keys, all_ends, all_S, all_j, all_g, all_slots = look_up(
            item + lane * stride, items, stride, seq_lens, splits, slots)
        if not ONE_EACH and item < items and not mailed:
            gather(arrivals, made)
        for n in range(AHEAD):
            if not ONE_EACH and item + n * stride < items and not mailed:
                # the second to the place of the sums, which is free, and by the last threads, for
                # the first have enough to do: both are on their way at once
                fetch_group(sums, 0 if n else FETCHED, CONSUMERS - 1 - tid if n else tid,
                            int64(shuffle(all_b, uint32(n))), int64(shuffle(all_g, uint32(n))),
                            int64(shuffle(all_S, uint32(n))) - 1, B, parts, cos, sin)
        for n in range(AHEAD):
            if item + n * stride < items:
                rotate_group(ring, GROUPS + n * GROUP_WORDS, sums, 0 if n else FETCHED,
                             CONSUMERS - 1 - tid if n else tid, int64(shuffle(all_b, uint32(n))),
                             int64(shuffle(all_g, uint32(n))), int64(shuffle(all_slots, uint32(n))),
                             int64(shuffle(all_S, uint32(n))) - 1, B, k_cache, v_cache, mail,
                             mailed and n == 0, stamp, cos, sin)
        meet(1, CONSUMERS)                 # else a warp reads what another has not yet written
        while item < items:
            this, ahead = uint32(turn), uint32(turn + 2)
            b, j, g = shuffle(all_b, this), shuffle(all_j, this), shuffle(all_g, this)
            k, end = shuffle(all_keys, this), shuffle(all_ends, this)
            S = shuffle(all_S, this)
            only = end - k == S
            new = GROUPS + (turn & 1) * GROUP_WORDS
            load_queries(q, ring, new)
            if not ONE_EACH and item + 2 * stride < items:
                fetch_group(sums, FETCHED, CONSUMERS - 1 - tid, int64(shuffle(all_b, ahead)),
                            int64(shuffle(all_g, ahead)), int64(shuffle(all_S, ahead)) - 1, B,
                            parts, cos, sin)
            split_end, more = end, True
            while more:
                if run > 1 and S <= longest:
                    split_end = min(uint32(k + uint32(SPLIT)), end)
                for side in range(2):
                    m[side], l[side] = NEG_INF, ZERO
                for i in range(OUTS):
                    acc[i] = ZERO
                used = uint32(0)               # stages of this split so far
                while k < split_end:
                    tile_key, here = uint32(k + own * TILE), used % TURNS == own_turn
                    # subtle: a stage that this warp has no use for it need not see filled, for all
                    # are done with the splits before; but if this one comes round to it again, each
                    # filling, or it would take this one for the next
                    if here or used >= stages or k + stages * KEYS < split_end:
                        await_barrier(barriers, stage, parity)
                    if here and tile_key < split_end:
                        at, newest = first + stage * STAGE_WORDS, tile_key + TILE >= S
                        if newest:             # the tile with this step's token
                            patch_tile(ring, at, own * TILE + int64(S - 1 - tile_key),
                                       new + R * (D // 2), keys)
                        add_tile(acc, m, l, q, ring, at, own * TILE, x, p, keys, values,
                                 int64(tile_key), int64(split_end), scale, out)
                        if newest:
                            fence_shared()     # before the copy engine fills this place again
                        meet_warp()            # else a stage is given back that a lane still reads
                    if lane == 0:
                        barrier_arrive(barriers, EMPTY + stage)
                    stage, parity = next_stage(stage, parity, stages)
                    k, used = uint32(k + KEYS), uint32(used + 1)
                # else sums are overwritten that another warp still joins
                await_barrier(barriers, JOINED, joined_parity)
                store_sums(sums, acc, m, l, R, scale)
                meet(1, CONSUMERS)             # else a warp's sums are read before they are written
                if ALONE and items == G:
                    mail_heads(mail, o_mail, stamp, sums, int64(g), out)
                elif ALONE and (SPLITS_MAILED or items <= MAIL_SPLITS * G):
                    mail_split(mail, o_mail, stamp, sums, int64(j), int64(g))
                elif run > 1 and SPLIT < S <= longest:
                    join_run(out, kept, sums, int64(b), int64(g), uint32(k - 1) // SPLIT, k >= end,
                             R)
                else:
                    join_warps(out, partial, sums, int64(b), int64(g), int64(j), R, only)
                more = run > 1 and k < end
                meet_warp()
                if lane == 0:
                    barrier_arrive(barriers, JOINED)
                joined_parity = uint32(joined_parity ^ uint32(1))
            if not ONE_EACH and item + 2 * stride < items:
                rotate_group(ring, new, sums, FETCHED, CONSUMERS - 1 - tid,
                             int64(shuffle(all_b, ahead)), int64(shuffle(all_g, ahead)),
                             int64(shuffle(all_slots, ahead)), int64(shuffle(all_S, ahead)) - 1, B,
                             k_cache, v_cache, mail, False, stamp, cos, sin)
            item += stride
            turn += 1
            if not ONE_EACH and turn == WARP - 2:    # no lane knows the item after the next
                turn = 0
                all_b, all_keys, all_ends, all_S, all_j, all_g, all_slots = look_up(
                    item + lane * stride, items, stride, seq_lens, splits, slots)
        return item - items, stage, parity, joined_parity
    return attend_stages


@functools.cache
def make_forward_decode(N, H, G, D, C, F, V, P, multiprocessors):
    """The kernel for one shape of model, one size of its cache's blocks and up to N tokens. What it
    is made with is a constant of its machine code, which is shorter for it, and between two matmuls
    the length of the code is what takes the time."""
    ALONE, PARTS_MAILED = N == 1, N <= MAIL_TOKENS     # x, and what o and down add to it, by mail
    ONE_EACH = has_one_item_each(N, G, multiprocessors)
    COLUMNS, run = columns_of(N), run_of(N, D)
    SPLITS_MAILED = most_splits(G) <= MAIL_SPLITS      # all, of a token that is alone
    PLAN, MAIL = decode_plan(H, G, D, C, F, V), mail_size(H, G, D, C, F)
    O_ITEMS, O_TILES, O_PARTS, O_STEPS, _, O_PLACE = PLAN[O]
    DOWN_PARTS, ACT_MAIL = PLAN[DOWN][PARTS], PLAN[GATE_UP][PLACE]
    O_MAIL = O_PLACE - MAIL_SPLITS * H * (D + 2)       # where letters of attention begin
    SUM_WORDS, STAGES, X_STAGES = persistent_rings(H, G, D, C, N, multiprocessors)
    X_STEPS, X_STAGE_WORDS, STEP_WORDS = x_steps_of(N), x_stage_words_of(N), x_rows_of(N) * 32
    attend_stages = make_attend_stages(N, H, G, D, C, P, multiprocessors)
    wgmma, wgmma_wait = WGMMA[COLUMNS].add, WGMMA[COLUMNS].wait
    KEYS, ACCUMULATORS = keys_of_stage(D), COLUMNS // 2
    MOST_PARTS = max(O_PARTS, DOWN_PARTS)
    NORM_TERMS, PAIR_TERMS = MOST_PARTS * 8, MOST_PARTS * 2
    SLOW = 1 if PARTS_MAILED else 2        # more tokens take longer with a stage
    LARGEST = math.gcd(8, ACCUMULATORS // 4)   # tokens of a lane whose logits are compared at once

    @cuda.jit(device=True)
    def added(word, delta, like):
        """Two elements plus what a matmul adds to them. Subtle: its sums are elements already, for
        in every rung they are rounded before they are added."""
        return pack(low_element(word, like) + low_element(delta, like),
                    high_element(word, like) + high_element(delta, like), like)

    @cuda.jit(device=True)
    def add_own(x, mail, letters, num_parts, x_mail, stamp, embed, tokens, first):
        """The residual stream of few tokens: each thread block adds to some of its channels, two to
        a thread, what the matmul before sent, and tells who norms them. The first time they are
        those of the embedding."""
        terms = cuda.local.array(PAIR_TERMS, float32)
        B = 1 if ALONE else x.shape[0]
        own = int64(divide(uint32(B * (C // 2) + cuda.gridDim.x - 1), uint32(cuda.gridDim.x)))
        begin = cuda.blockIdx.x * own
        end = min(begin + own, B * (C // 2))                   # pairs of channels
        if not ALONE:                      # else there are so few letters that all may be asked for
            if thread_index() % WARP == 0 and begin + thread_index() < end:
                await_letter(mail, letters + 2 * (begin + thread_index()), stamp)
            meet_warp()
        for pair in range(begin + thread_index(), end, CONSUMERS):
            if first:
                b = int64(divide(uint32(pair), uint32(C // 2)))
                word = load_word(embed, int64(load_word(tokens, b)) * C + 2 * pair - b * C)
            else:
                word = load_word(x, 2 * pair)
            missing = True
            while missing:
                missing = False
                for p in range(MOST_PARTS):
                    if p < num_parts:
                        low, sent, high, next_sent = receive_2(mail, letters + p * B * C + 2 * pair)
                        terms[2 * p], terms[2 * p + 1] = float_of(low), float_of(high)
                        missing |= sent != stamp or next_sent != stamp
            for p in range(1, MOST_PARTS):
                if p < num_parts:
                    terms[0] += terms[2 * p]
                    terms[1] += terms[2 * p + 1]
            word = added(word, pack(terms[0], terms[1], x), x)
            store_word(x, 2 * pair, word)
            send(mail, x_mail + pair, word, stamp)

    @cuda.jit(device=True)
    def add_parts(words, terms, x, parts, num_parts, b, c):
        """Eight channels of x[b] from c on, plus what the matmul before left in parts."""
        load_16_bytes(words, 0, x, b * C + c)
        for p in range(MOST_PARTS):
            if p < num_parts:
                at = (p * x.shape[0] + b) * C + c
                load_4_floats(terms, p * 8, parts, at)
                load_4_floats(terms, p * 8 + 4, parts, at + 4)
        for p in range(1, MOST_PARTS):
            if p < num_parts:
                for i in range(8):
                    terms[i] += terms[p * 8 + i]
        for i in range(4):
            words[i] = added(words[i], pack(terms[2 * i], terms[2 * i + 1], x), x)

    @cuda.jit(device=True)
    def norm_tokens(shared_words, h, x, parts, num_parts, embed, tokens, norms, n, eps, mail,
                    x_mail, stamp):
        """x += the matmul that was left in parts, or x = the embedding; h = rmsnorm(x) * norms[n].
        A thread block takes every gridDim.x-th token, a thread 8 channels at once. shared_words
        holds the gains, C/2 words, then a token; each thread reads only what it wrote.

        Of few tokens x comes by mail, see add_own. One that is alone all thread blocks norm, each
        for itself: that takes less time than to hear of another's work; h stays in shared memory.
        """
        words = cuda.local.array(4, uint32)
        gains = cuda.local.array(4, uint32)
        terms = cuda.local.array(NORM_TERMS, float32)
        B, first_b = 1 if ALONE else x.shape[0], 0 if ALONE else cuda.blockIdx.x
        if PARTS_MAILED and n > 0 and first_b < B:
            if thread_index() % WARP == 0:
                own = min(thread_index() * 4, C // 2 - 1)
                await_letter(mail, x_mail + first_b * (C // 2) + own, stamp)
            meet_warp()
        for b in range(first_b, B, cuda.gridDim.x):
            squares = ZERO
            for c in range(thread_index() * 8, C, CONSUMERS * 8):
                load_16_bytes(gains, 0, norms, n * C + c)
                store_shared(shared_words, c // 2, gains, 0)
                if n == 0:
                    load_16_bytes(words, 0, embed, int64(load_word(tokens, b)) * C + c)
                elif PARTS_MAILED:
                    receive_8(words, mail, x_mail + (b * C + c) // 2, stamp)
                else:
                    add_parts(words, terms, x, parts, num_parts, b, c)
                for i in range(4):
                    low, high = low_element(words[i], x), high_element(words[i], x)
                    squares += multiply_add(high, high, low * low)
                if not PARTS_MAILED:       # else its owners keep it
                    store_16_bytes(x, b * C + c, words, 0)
                store_shared(shared_words, (C + c) // 2, words, 0)
            scale = inverse_sqrt(block_sum(squares, CONSUMERS) / float32(C) + eps)
            for c in range(thread_index() * 8, C, CONSUMERS * 8):
                load_shared(words, 0, shared_words, (C + c) // 2)
                load_shared(gains, 0, shared_words, c // 2)
                for i in range(4):
                    normed = pack(low_element(words[i], x) * scale,
                                  high_element(words[i], x) * scale, x)
                    words[i] = pack(low_element(normed, x) * low_element(gains[i], x),
                                    high_element(normed, x) * high_element(gains[i], x), x)
                if ALONE:
                    store_shared(shared_words, (C + c) // 2, words, 0)
                else:
                    store_16_bytes(h, b * C + c, words, 0)

    @cuda.jit(device=True)
    def mailed_pair(mail, stamp, count, head, pair):
        """merged_pair for one token whose splits' sums come by mail, see mail_split."""
        terms = cuda.local.array(MERGED_TERMS, float32)
        lane, missing, m_word, l_word = thread_index() % WARP, True, uint32(0), uint32(0)
        letter = O_MAIL + (min(lane, count - 1) * H + head) * (D + 2) + D
        if lane == count - 1:
            await_letter(mail, letter, stamp)
        meet_warp()
        while missing:
            m_word, sent, l_word, next_sent = receive_2(mail, letter)
            missing = sent != stamp or next_sent != stamp
        meet_warp()                        # else a lane is asked for what it does not know yet
        m = warp_max(float_of(m_word))
        weights = float_bits(exp2(float_of(m_word) - m))
        parts_of_l = float_bits(float_of(l_word) * float_of(weights))
        l, o, next_o = ZERO, ZERO, ZERO
        for some in range(0, count, MERGED):
            missing = True
            while missing:
                missing = False
                for n in range(MERGED):
                    letter = O_MAIL + (min(some + n, count - 1) * H + head) * (D + 2) + 2 * pair
                    word, sent, next_word, next_sent = receive_2(mail, letter)
                    terms[2 * n], terms[2 * n + 1] = float_of(word), float_of(next_word)
                    missing |= sent != stamp or next_sent != stamp
            meet_warp()
            l, o, next_o = add_splits(l, o, next_o, terms, weights, parts_of_l, some, count)
        return o / l, next_o / l

    @cuda.jit(device=True)
    def merge_own(shared_words, partial, splits, item, mail, mailed, stamp, x):
        """The attention of one token, joined from its splits: in each thread block what its items
        of O need of it, to the words in which norm_tokens leaves a token."""
        lane, warp = thread_index() % WARP, thread_index() // WARP
        for own in range(item, O_ITEMS, cuda.gridDim.x):
            _, part = tile_and_part(own, O_TILES)
            for step in range(warp, O_STEPS, DECODE_WARPS):
                k = part * O_STEPS + step                      # 64 channels of one head
                head = int64(divide(uint32(k), uint32(D // 64)))
                pair = (k - head * (D // 64)) * 32 + lane
                if mailed:
                    low, high = mailed_pair(mail, stamp, int64(splits[1]), head, pair)
                else:
                    low, high = merged_pair(partial, 0, int64(splits[1]), head, pair)
                shared_words[C // 2 + k * 32 + lane] = pack(low, high, x)

    @cuda.jit(device=True)
    def store_tile(acc, first_token, kind, tile, part, num_rows, B, parts, act, logits,
                   by_mail, place, mail, stamp):
        """Sums of a tile to where the next operation reads them: parts, act and logits are flat, of
        shapes (parts, B, num_rows), (B, num_rows / 2) and (B, num_rows); or by mail, parts in the
        same order, or one token's act, two channels in a letter. A thread holds two neighbouring
        rows or, of a tile of gate and up rows, a gate and its up: see decode_maps."""
        lane, warp, b = thread_index() % WARP, thread_index() // WARP, first_token
        if kind == GATE_UP:
            # lanes 4 apart hold neighbouring channels: one of them takes both for one token, the
            # other for the next, so that each stores a whole word
            odd = lane // 4 % 2
            channel = tile * (TILE_ROWS // 2) + warp * 8 + lane // 4 - odd
            b += lane % 4 * 2 + odd
            at, stride = b * F + channel, 8 * F
            for n in range(ACCUMULATORS // 4):
                one = silu(acc[n * 4]) * acc[n * 4 + 2]
                two = silu(acc[n * 4 + 1]) * acc[n * 4 + 3]
                given = shuffle_xor(two if odd == 0 else one, 4)
                if odd == 0:
                    two = given
                else:
                    one, two = given, two
                if b < B and channel < F:
                    if by_mail:
                        send(mail, place + channel // 2, pack(one, two, act), stamp)
                    else:
                        store_word(act, at, pack(one, two, act))
                b += 8
                at += stride
        else:
            row = tile * TILE_ROWS + warp * 16 + lane // 4 * 2
            b += lane % 4 * 2
            out, at, stride = parts, (part * B + b) * num_rows + row, 8 * num_rows
            if kind == LM_HEAD:
                out = logits
            for n in range(ACCUMULATORS // 4):
                for i in range(2):
                    here = at + i * num_rows
                    if b + i < B and row < num_rows and by_mail:
                        send_2(mail, place + here, float_bits(acc[n * 4 + i]),
                               float_bits(acc[n * 4 + 2 + i]), stamp)
                    elif b + i < B and row < num_rows:
                        store_2_floats(out, here, acc[n * 4 + i], acc[n * 4 + 2 + i])
                b += 8
                at += stride

    @cuda.jit(device=True)
    def compare(values, places, bit, kept):
        """One of three exchanges between the lanes that hold the same tokens, 4, 8 and 16 apart.
        Of 2 * kept tokens each of two lanes keeps half, with the larger of both lanes' logits; if
        there are no more than `kept`, both keep all."""
        upper = thread_index() & bit
        for n in range(min(kept, LARGEST)):
            value, at, given, given_at = values[n], places[n], values[n], places[n]
            if kept < LARGEST and upper:
                value, at = values[n + kept], places[n + kept]
            elif kept < LARGEST:
                given, given_at = values[n + kept], places[n + kept]
            other = shuffle_xor(given, bit)
            other_at = float_bits(shuffle_xor(float_of(given_at), bit))
            if larger(value, at, other, other_at):
                value, at = other, other_at
            values[n], places[n] = value, at

    @cuda.jit(device=True)
    def store_largest(acc, first_token, tile, num_rows, B, largest, largest_at):
        """The largest of each CHUNK of a tile of logits, of equal ones the first, and its token, to
        flat arrays of shape (B, num_rows / CHUNK); inf for NaN, which sampling refuses."""
        values, places = cuda.local.array(LARGEST, float32), cuda.local.array(LARGEST, uint32)
        lane, first_row = thread_index() % WARP, tile * TILE_ROWS + thread_index() // WARP * CHUNK
        row = uint32(first_row + lane // 4 * 2)                # the first of this thread's two
        for first in range(0, ACCUMULATORS // 4, LARGEST):
            for i in range(2):
                for n in range(LARGEST):
                    at = (first + n) * 4 + i                   # NaN compares false
                    value = acc[at] if acc[at] < INF else INF
                    next_value = acc[at + 2] if acc[at + 2] < INF else INF
                    values[n], places[n] = value, row
                    if next_value > value:
                        values[n], places[n] = next_value, uint32(row + 1)
                compare(values, places, 16, 4)
                compare(values, places, 8, 2)
                compare(values, places, 4, 1)
                b = first_token + (first + (lane // 4 & (LARGEST - 1))) * 8 + lane % 4 * 2 + i
                if lane // 4 < LARGEST and b < B and first_row < num_rows:
                    chunk = b * (num_rows // CHUNK) + first_row // CHUNK
                    store_float(largest, chunk, values[0])
                    store_word(largest_at, chunk, places[0])

    @cuda.jit(device=True)
    def stream_weights(ring, first, barriers, pace, maps, num_matrices, block_tables, rows,
                       seq_lens, splits):
        """The warp that fills the ring with weights and, for attention, with contexts."""
        item, stage, parity = cuda.blockIdx.x, uint32(0), uint32(1)
        for matrix in range(num_matrices):
            kind = kind_of(matrix, num_matrices)
            if kind == O:
                wait_for_inputs()          # contexts, unlike weights, are other kernels' work
                item, stage, parity = stream_context(
                    ring, first, stage, STAGES, parity, barriers, maps, item, matrix >> 2, D, KEYS,
                    G, P, block_tables, rows, seq_lens, splits, run)
            items, tiles, _, steps, _, _ = PLAN[kind]
            while item < items:
                tile, part = tile_and_part(item, tiles)
                k = part * steps * 64
                for _ in range(steps):
                    await_barrier(barriers, EMPTY + stage, parity)
                    await_copies(barriers, stage, parity, STAGES, int64(load_shared_word(pace, 0)))
                    meet_warp()            # else a lane a whole ring behind waits for a past phase
                    if elect() == 1:
                        barrier_expect(barriers, stage, uint32(STAGE_WORDS * 4))
                        copy_box_5d_once(ring, first + stage * STAGE_WORDS, maps, kind * 16,
                                         uint32(k), uint32(0), uint32(0),
                                         uint32(tile * (TILE_ROWS // 16)),
                                         uint32(matrix >> 2 if kind != LM_HEAD else 0), barriers,
                                         stage)
                    k += 64
                    stage, parity = next_stage(stage, parity, STAGES)
                item += cuda.gridDim.x
            item -= items

    @cuda.jit(device=True)
    def stream_tokens(ring, first, barriers, maps, num_matrices, arrivals, mail, splits, B):
        """The warp that fills the second ring: for each item the elements of all tokens along its
        K, X_STEPS steps at once. They come with the copy engine, once the meeting has been that
        says they are there."""
        lane, item, x_stage, parity = thread_index() % WARP, cuda.blockIdx.x, uint32(0), uint32(1)
        num_pieces = int64(load_word(splits, B))
        for matrix in range(num_matrices):
            kind, meeting = kind_of(matrix, num_matrices), (matrix >> 2) * MEETINGS
            items, tiles, _, steps, _, _ = PLAN[kind]
            source = H_MAP
            if kind == O:
                source, meeting = O_MAP, meeting + ATTENDED
                item = first_item_after(item, num_pieces * G)
            elif kind == GATE_UP:
                meeting += NORMED_AGAIN
            elif kind == DOWN:
                source, meeting = ACT_MAP, meeting + ACTIVATED
            if item < items:               # without an item nobody here waits, and the counts may
                if lane == 0:              # be set back already
                    await_all(arrivals, meeting)
                    fence_copies()
                meet_warp()
            while item < items:
                tile, part = tile_and_part(item, tiles)
                for step in range(0, steps, X_STEPS):
                    await_barrier(barriers, X_EMPTY + x_stage, parity)
                    meet_warp()            # else a lane a whole ring behind waits for a past phase
                    if elect() == 1:
                        barrier_expect(barriers, X_FULL + x_stage, uint32(X_STAGE_WORDS * 4))
                        copy_box_3d(ring, first + x_stage * X_STAGE_WORDS, maps, source * 16,
                                    uint32(0), uint32(0), uint32(part * steps + step), barriers,
                                    X_FULL + x_stage)
                    x_stage, parity = next_stage(x_stage, parity, X_STAGES)
                item += cuda.gridDim.x
            item -= items

    @cuda.jit(device=True)
    def stream_one_token(ring, first, barriers, maps, num_matrices, arrivals, mail, splits, B):
        """stream_tokens for one that is alone. It comes out of shared memory, where this thread
        block's consumers normed it or joined its attention, or by mail."""
        lane, item, x_stage, parity = thread_index() % WARP, cuda.blockIdx.x, uint32(0), uint32(1)
        num_pieces = int64(load_word(splits, B))
        launches = load_word(arrivals, arrivals.shape[0] - 1)
        for matrix in range(num_matrices):
            kind, letters = kind_of(matrix, num_matrices), -1
            stamp = stamp_of(launches, num_matrices, matrix >> 2)
            items, tiles, _, steps, _, _ = PLAN[kind]
            if kind == O:
                item = first_item_after(item, num_pieces * G)
            if kind == DOWN:
                letters = ACT_MAIL
            elif kind == O and num_pieces == 1:
                letters = O_MAIL
            else:
                meet(2, CONSUMERS + WARP)
            while item < items:
                tile, part = tile_and_part(item, tiles)
                for step in range(0, steps, X_STEPS):
                    at, k = first + x_stage * X_STAGE_WORDS, part * steps + step
                    count = min(X_STEPS, steps - step)
                    await_barrier(barriers, X_EMPTY + x_stage, parity)
                    meet_warp()            # else a lane a whole ring behind waits for a past phase
                    if letters < 0:
                        copy_made(ring, at, C // 2 + k * 32, count, STEP_WORDS)
                    else:
                        copy_mailed(ring, at, mail, letters + k * 32, count, STEP_WORDS, stamp)
                    fence_shared()         # before tensor cores read it
                    meet_warp()
                    if lane == 0:
                        barrier_arrive(barriers, X_FULL + x_stage)
                    x_stage, parity = next_stage(x_stage, parity, X_STAGES)
                item += cuda.gridDim.x
            item -= items

    stream_x = stream_one_token if ALONE else stream_tokens    # one needs no maps, one no mail

    @cuda.jit(device=True)
    def consume(ring, sums, first, barriers, pace, acc, acc_far, flat_logits, largest, largest_at,
                x, h, o, flat_act, kv_cache, parts, partial, mail, arrivals, tokens, slots,
                seq_lens, splits, cos, sin, embed, norms, eps, greedy):
        """What the consumers do: all operations, between meetings of all thread blocks."""
        tid = thread_index()
        lane, warp = tid % WARP, tid // WARP
        B, num_matrices = 1 if ALONE else x.shape[0], kv_cache.shape[1] * 4 + 1
        a_rows = first + warp // 4 * 64 * 32               # of this warpgroup, in stage 0
        first_x_stage = first + STAGES * STAGE_WORDS
        item, stage, parity = cuda.blockIdx.x, uint32(0), uint32(0)
        x_stage, x_parity = uint32(0), uint32(0)
        joined_parity = uint32(1)          # before its first phase ends, that of parity 1 has ended
        num_pieces = int64(load_word(splits, B))
        items = num_pieces * G                                 # of attention
        # one of them for a thread block at most, which then gets queries, key and value by mail.
        # PARTS_MAILED: so that kernels for more tokens do not contain what they never do
        qkv_mailed = ONE_EACH or PARTS_MAILED and items <= cuda.gridDim.x
        launches = load_word(arrivals, arrivals.shape[0] - 1)
        for matrix in range(num_matrices):
            kind, layer = kind_of(matrix, num_matrices), matrix >> 2
            meeting, stamp = layer * MEETINGS, stamp_of(launches, num_matrices, layer)
            if kind == O:
                item, stage, parity, joined_parity = attend_stages(
                    o, partial, sums, ring, first, stage, STAGES, parity, joined_parity, barriers,
                    item, kv_cache[0, layer], kv_cache[1, layer], parts, mail, qkv_mailed, stamp,
                    O_MAIL, arrivals, meeting + QKV_MADE, cos, sin, slots, seq_lens, items, splits)
                if num_pieces > B:         # some context is in several pieces
                    mailed = ALONE and (SPLITS_MAILED or num_pieces <= MAIL_SPLITS)
                    if mailed:
                        meet(1, CONSUMERS)                     # else sums are overwritten that
                    else:                                      # another warp still joins
                        arrive(arrivals, meeting + SPLITS_ATTENDED)
                        gather(arrivals, meeting + SPLITS_ATTENDED)
                    if ALONE:
                        merge_own(ring, partial, splits, item, mail, mailed, stamp, x)
                        meet(2, CONSUMERS + WARP)              # with who copies it to the ring
                    else:
                        merge_heads(o, partial, splits, warp * cuda.gridDim.x + cuda.blockIdx.x,
                                    DECODE_WARPS * cuda.gridDim.x)
                if not ALONE:              # one token's went by mail, or every thread block made it
                    arrive(arrivals, meeting + ATTENDED)
                made = meeting + O_MADE
            elif kind == DOWN:
                made = meeting + DOWN_MADE
            else:
                normed, before, made = meeting + NORMED, DOWN, meeting + QKV_MADE
                if kind == GATE_UP:
                    normed, before, made = meeting + NORMED_AGAIN, O, meeting + ACTIVATED
                # matrices 0 and 2 of a layer have a norm before them; letters of x, B*C/2 for
                # either, are the last of the mail
                norm, told = (matrix + 1) >> 1, stamp_of(launches, num_matrices, (matrix - 1) >> 2)
                x_mail = MAIL - B * (C // 2) * (1 + (norm & 1))
                num_parts = O_PARTS if before == O else DOWN_PARTS
                if matrix > 0 and PARTS_MAILED:
                    add_own(x, mail, PLAN[before][PLACE], num_parts, x_mail, told, embed, tokens,
                            norm == 1)
                    meet(1, CONSUMERS)     # else sums are overwritten that another warp still joins
                elif matrix > 0:           # the meeting before is that of the product to be added
                    gather(arrivals, normed - 1)
                # in the words of the sums, which nobody needs now
                norm_tokens(ring, h, x, parts, num_parts, embed, tokens, norms, norm, eps, mail,
                            x_mail, told)
                if ALONE:
                    meet(2, CONSUMERS + WARP)                  # with who copies it to the ring
                else:
                    arrive(arrivals, normed)
            by_mail = (kind == QKV and qkv_mailed or PARTS_MAILED and (kind == O or kind == DOWN)
                       or ALONE and kind == GATE_UP)
            # of this matrix; attention's, above, are `items`
            matrix_items, tiles, _, steps, num_rows, place = PLAN[kind]
            item, stage, parity = int64(uniform(uint32(item))), uniform(stage), uniform(parity)
            if tid == 0:
                # these go through more stages than the ring holds; before the others it has filled
                pace[0] = FAST if kind >= GATE_UP else SLOW
            while item < matrix_items:
                used_stage, used_x_stage, step = stage, x_stage, uint32(0)
                for i in range(ACCUMULATORS):
                    acc[i], acc_far[i] = ZERO, ZERO
                while step < uint32(steps):
                    x_step = step & uint32(X_STEPS - 1)
                    if x_step == uint32(0):
                        await_barrier(barriers, X_FULL + x_stage, x_parity)
                    await_barrier(barriers, stage, parity)
                    rows_at = uniform(uint32(a_rows + stage * STAGE_WORDS))
                    tokens_at = uniform(uint32(first_x_stage + x_stage * X_STAGE_WORDS
                                               + x_step * STEP_WORDS))
                    wgmma(acc, 0, ring, rows_at, ring, tokens_at, h)
                    if N > COLUMNS:
                        wgmma(acc_far, 0, ring, rows_at, ring, tokens_at + COLUMNS * 32, h)
                    if lane == 0 and step > uint32(0):         # of the step before, which is done
                        barrier_arrive(barriers, EMPTY + used_stage)
                        if x_step == uint32(0):
                            barrier_arrive(barriers, X_EMPTY + used_x_stage)
                    used_stage, used_x_stage = stage, x_stage
                    stage, parity = next_stage(stage, parity, STAGES)
                    step = uint32(step + uint32(1))
                    if step % uint32(X_STEPS) == uint32(0) or step == uint32(steps):
                        x_stage, x_parity = next_stage(x_stage, x_parity, X_STAGES)
                wgmma_wait(acc, 0)
                if N > COLUMNS:
                    wgmma_wait(acc_far, 0)
                if lane == 0:
                    barrier_arrive(barriers, EMPTY + used_stage)
                    barrier_arrive(barriers, X_EMPTY + used_x_stage)
                tile, part = tile_and_part(item, tiles)
                if kind == LM_HEAD and greedy:
                    store_largest(acc, 0, tile, num_rows, B, largest, largest_at)
                    if N > COLUMNS:
                        store_largest(acc_far, COLUMNS, tile, num_rows, B, largest, largest_at)
                else:
                    store_tile(acc, 0, kind, tile, part, num_rows, B, parts, flat_act, flat_logits,
                               by_mail, place, mail, stamp)
                    if N > COLUMNS:
                        store_tile(acc_far, COLUMNS, kind, tile, part, num_rows, B, parts, flat_act,
                                   flat_logits, by_mail, place, mail, stamp)
                item += cuda.gridDim.x
            item -= matrix_items
            if tid == 0 and kind == DOWN:
                pace[0] = SLOW
            if matrix + 1 < num_matrices and not by_mail:
                arrive(arrivals, made)

    @cuda.jit(cache=True, **THREE_WARPGROUPS)
    def forward_decode_kernel(flat_logits, largest, largest_at, x, h, o, flat_act, kv_cache, parts,
                              partial, mail, arrivals, tokens, slots, rows, seq_lens, splits,
                              block_tables, cos, sin, embed, norms, maps, eps, greedy):
        """logits of one token for each request: embedding, all layers, norm and lm_head

        flat_logits      (B*V,)               f32        written, unless greedy
        largest, largest_at (B*V/CHUNK,)      f32 i32    written if greedy: of each CHUNK of logits
        x                (B, C)               f16 bf16   written: residual stream
        h, o, flat_act   (B, C), (B, H, D), (B*F,)   as x   workspace of more than one token:
                                                         normed, their attention, activations
        kv_cache   (2, L, blocks, P, G, D)    as x       a slot for each token written, context read
        parts            (parts_size,)        f32        workspace: parts of a matmul's sums
        partial          (J, H, D+2)          f32        workspace of contexts in several pieces
        mail             (mail_size,)         u64        workspace: words and stamps, see send
        arrivals         (8L+3,)              u32        0 before and after: thread blocks that came
                                                         to each meeting, and that left; last how
                                                         often this kernel has run
        tokens, slots, rows, seq_lens (B,), splits (B+1+J,), block_tables   i32   read
        cos, sin         (positions, D/2)     f32        read
        embed            (V, C)               as x       B rows read
        norms            (2L+1, C)            as x       read
        maps             (9, 16)              u64        read: see decode_maps
        launch grid of one thread block for each multiprocessor, all there at once; thread block of
               CONSUMERS threads and a warpgroup, two warps of which work
        shared SUM_WORDS, then up to 1 KB to align, STAGES of STAGE_WORDS and X_STAGES of
               X_STAGE_WORDS
        moves  E*W + 2*L*B*S*G*D*E bytes, does 2*B*W + 4*L*B*H*S*D flops: bandwidth-bound
        needs  see fits_persistent, sm_90a
        twin   forward_decode_ref      source  Megakernels (Hazy Research, 2025)
        """
        sums = cuda.shared.array(0, float32)
        ring = cuda.shared.array(0, uint32)
        barriers = cuda.shared.array(NUM_BARRIERS, uint64)
        pace = cuda.shared.array(1, uint32)        # of the weights: consumers set it
        acc = cuda.local.array(ACCUMULATORS, float32)
        acc_far = cuda.local.array(ACCUMULATORS, float32)  # of tokens from COLUMNS on
        tid, num_matrices = thread_index(), kv_cache.shape[1] * 4 + 1
        first = first_of_ring(ring, SUM_WORDS)
        if tid == 0:
            for stage in range(STAGES):
                barrier_init(barriers, stage, uint32(1))
                barrier_init(barriers, EMPTY + stage, uint32(DECODE_WARPS))
            for x_stage in range(X_STAGES):
                barrier_init(barriers, X_FULL + x_stage, uint32(1))
                barrier_init(barriers, X_EMPTY + x_stage, uint32(DECODE_WARPS))
            barrier_init(barriers, JOINED, uint32(DECODE_WARPS))
            barriers_ready()
            pace[0] = FAST
        cuda.syncthreads()                 # else a thread uses a barrier that is not there yet
        start_next_kernel()
        warp = uniform(uint32(tid // WARP))
        if warp < DECODE_WARPS:
            many_registers()
            wait_for_inputs()
            consume(settle(ring), settle(sums), first, settle(barriers), pace, acc, acc_far,
                    flat_logits, largest, largest_at, x, h, o, flat_act, kv_cache, parts, partial,
                    mail, arrivals, tokens, slots, seq_lens, splits, cos, sin, embed, norms, eps,
                    greedy)
            # who leaves last, when nobody can be waiting any more, sets all counts back
            last = arrivals.shape[0] - 2
            if tid == 0 and add_acquire(arrivals, last, uint32(1)) == uint32(cuda.gridDim.x - 1):
                for i in range(last + 1):
                    arrivals[i] = 0
                arrivals[last + 1] += uint32(1)
        else:
            few_registers()
            if warp == DECODE_WARPS:       # weights were there before all other kernels
                stream_weights(ring, first, barriers, pace, maps, num_matrices, block_tables, rows,
                               seq_lens, splits)
            elif warp == DECODE_WARPS + 1:
                wait_for_inputs()
                stream_x(ring, first + STAGES * STAGE_WORDS, barriers, maps, num_matrices, arrivals,
                         mail, splits, x.shape[0])
    return forward_decode_kernel


# tensor maps on the device, by the arrays they tell of; never freed, so that no thread block has
# cached an older map of the same address
DECODE_MAPS = {}


def decode_maps(h, o, act, kv_cache, matrices, shape, N):
    """maps of forward_decode on the device, made once for each place and shape."""
    arrays = h, o, act, kv_cache, matrices
    key = shape, N, *((address_of(array), array.shape) for array in arrays)
    if key not in DECODE_MAPS:
        H, G, D, C, F, V, L = shape
        size, at, maps = layer_size(H, G, D, C, F), 0, []
        for kind, (rows, K) in enumerate(shapes_of_layer(H, G, D, C, F)):
            # 8 rows, every second one, and then those between them; or 8 gates, and then their ups
            near, far, next_ = (K, F * K, 8 * K) if kind == GATE_UP else (2 * K, K, 16 * K)
            maps.append(tensor_map(matrices[at:], (K, 8, 2, rows // 16, L),
                                   (1, near, far, next_, size), (64, 8, 2, TILE_ROWS // 16, 1)))
            at += rows * K
        maps.append(tensor_map(matrices[L * size:], (C, 8, 2, V // 16, 1),
                               (1, 2 * C, C, 16 * C, V * C), (64, 8, 2, TILE_ROWS // 16, 1)))
        box = 64, x_rows_of(N), x_steps_of(N)
        maps += [tensor_map(array, (64, len(array), K // 64), (1, K, 64), box) for array, K in
                 ((h, C), (o, H * D), (act, F))]
        P, slots = kv_cache.shape[3], kv_cache.shape[2] * kv_cache.shape[3]
        maps.append(tensor_map(kv_cache, (D, G, slots, L, 2),
                               (1, D, G * D, slots * G * D, L * slots * G * D),
                               (64, 1, min(P, keys_of_stage(D)), 1, 2)))
        maps = np.array(maps, np.uint64)
        DECODE_MAPS[key] = maps if SIMULATOR else cuda.to_device(maps)
    return DECODE_MAPS[key]


def forward_decode(logits, largest, largest_at, x, h, o, act, kv_cache, parts, partial, mail,
                   arrivals, tokens, slots, rows, seq_lens, splits, block_tables, cos, sin, embed,
                   norms, matrices, eps, greedy, stream=0):
    (B, V), C, (H, D), F = logits.shape, x.shape[1], o.shape[1:], act.shape[1]
    _, L, _, P, G, _ = kv_cache.shape
    problem = fits_persistent(H, G, D, C, F, V, P)
    assert problem is None, problem
    assert B <= MAX_DECODE_TOKENS, f"{B} tokens, expected at most {MAX_DECODE_TOKENS}"
    assert largest.shape == largest_at.shape == (B, V // CHUNK), largest.shape
    assert x.shape == h.shape == (B, C) and o.shape[0] == act.shape[0] == B, (x.shape, act.shape)
    assert len(kv_cache) == 2, kv_cache.shape
    assert norms.shape == (2 * L + 1, C), norms.shape
    assert embed.shape == (V, C) and len(matrices) == L * layer_size(H, G, D, C, F) + V * C
    assert parts.size >= parts_size(B, H, G, D, C, F) and partial.shape[1:] == (H, D + 2)
    assert len(mail) == mail_size(H, G, D, C, F), mail.shape
    assert len(arrivals) == MEETINGS * L + 3, (arrivals.shape, L)
    multiprocessors = num_multiprocessors()
    N = min(N for N in DECODE_TOKENS if N >= B and (
        N > 1 or every_block_has_work(H, G, D, C, F, V, multiprocessors)))
    maps = decode_maps(h, o, act, kv_cache, matrices, (H, G, D, C, F, V, L), N)
    threads = CONSUMERS + (2 if SIMULATOR else 4) * WARP       # a warpgroup has no half
    kernel = make_forward_decode(N, H, G, D, C, F, V, P, multiprocessors)
    launch(kernel, multiprocessors, threads, stream, PERSISTENT_SHARED, logits.reshape(B * V),
           largest.reshape(-1), largest_at.reshape(-1), x, h, o, act.reshape(B * F), kv_cache,
           parts, partial, mail, arrivals, tokens, slots, rows, seq_lens, splits, block_tables, cos,
           sin, embed, norms, maps, np.float32(eps), np.int32(greedy))


def fits_persistent(H, G, D, C, F, V, P):
    """None if a decode step of these shapes can be one kernel, otherwise why not."""
    keys = keys_of_stage(D)
    for name, value in (("hidden_size", C), ("heads * head_dim", H * D), ("intermediate_size", F)):
        if value % 64:
            return f"{name} {value} is no multiple of 64"
    if V % 16:
        return f"vocab_size {V} is no multiple of 16"
    if D not in PAGED_DECODE:
        return f"head_dim {D} is no multiple of 64 up to 256"
    if P & (P - 1):                        # a stage is whole blocks, or lies in one
        return f"block_size {P} is no power of two"
    if keys > WARP * P:                    # a warp holds the block numbers of a stage
        return f"block_size {P} is too small for head_dim {D}"
    if keys * D > STAGE_WORDS or H // G > 16 or sum_words_of(H, G, D, C) > MAX_SUM_WORDS:
        return (f"hidden_size {C}, or head_dim {D} with {H // G} query heads for a KV head, leaves "
                "no room in shared memory")
    return None


# -----------------------------------------------------------------------------
# 11. The table of all kernels, and the rungs that the engine runs on
#
# A row says what a kernel computes (its twin), on which inputs to try it, what it moves and does,
# and one mistake that its test must notice. Tests and bench.py iterate over the rows.
#
# An example is made from the dimensions of a shape: `elements` turns float32 into the element type,
# everything else keeps its own. Outputs are NaN (integers: -1), so what is not written shows.


def lively(rng, *shape):
    """Normal values with outliers, as real activations have; large arrays repeat themselves."""
    count = math.prod(shape)
    x = rng.standard_normal(min(count, 1 << 20)).astype(np.float32)
    x[::7] *= 30
    return np.resize(x, shape)


def unwritten(*shape):
    return np.full(shape, np.nan, np.float32)


def embedding_example(rng, elements, T, C, V):
    return [elements(unwritten(T, C)), rng.integers(0, V, T).astype(np.int32),
            elements(lively(rng, V, C))]


def add_example(rng, elements, T, C):
    return [elements(lively(rng, T, C)), elements(lively(rng, T, C))]


def silu_mul_example(rng, elements, T, F):
    return [elements(unwritten(T, F)), elements(lively(rng, T, 2 * F))]


def rmsnorm_example(rng, elements, T, C):
    return [elements(unwritten(T, C)), elements(lively(rng, T, C)), elements(lively(rng, C)), 1e-5]


def add_rmsnorm_example(rng, elements, T, C):
    out, x, weight, eps = rmsnorm_example(rng, elements, T, C)
    return [out, x, elements(lively(rng, T, C)), weight, eps]


def matmul_example(rng, elements, T, N, K):
    return [elements(unwritten(T, N)), elements(lively(rng, T, K)), elements(lively(rng, N, K))]


def matmul_silu_mul_example(rng, elements, T, N, K):
    """N counts the rows of both halves; the weights are small, or every gate would be 0 or 1."""
    _, x, _ = matmul_example(rng, elements, T, 1, K)
    weight = rng.standard_normal((N, K)).astype(np.float32) / np.float32(8 * math.sqrt(K))
    return [elements(unwritten(T, N // 2)), x, elements(weight), elements(unwritten(T, N))]


def rope_example(rng, elements, T, heads, D):
    angles = rng.uniform(0, 7, (20, D // 2)).astype(np.float32)
    return [elements(lively(rng, T, heads, D)), np.cos(angles), np.sin(angles),
            rng.integers(0, 20, T).astype(np.int32)]


def write_kv_example(rng, elements, T, G, D, P):
    cache = unwritten(ceil_div(2 * T, P), P, G, D)
    return [elements(cache), elements(cache), elements(lively(rng, T, G, D)),
            elements(lively(rng, T, G, D)),
            rng.permutation(cache.shape[0] * P)[:T].astype(np.int32)]


def rope_write_kv_example(rng, elements, T, H, G, D, P):
    qkv, cos, sin, positions = rope_example(rng, elements, T, H + 2 * G, D)
    k_cache, v_cache, _, _, slots = write_kv_example(rng, elements, T, G, D, P)
    return [qkv, k_cache, v_cache, cos, sin, positions, slots]


def attention_example(rng, elements, H, G, D, P, contexts, queries, split=SPLIT, run=1):
    """Requests with these contexts, of which the last `queries` tokens are this step's. Their
    blocks lie anywhere, and slots that hold no token hold NaN. Values rise along a context, so that
    a part of it that is missing, or read twice, shows in every channel."""
    B, T, longest = len(contexts), sum(queries), max(contexts)
    tables = rng.permutation(B * ceil_div(longest, P)).reshape(B, -1).astype(np.int32)
    k_cache, v_cache = unwritten(tables.size, P, G, D), unwritten(tables.size, P, G, D)
    rows = rng.permutation(B).astype(np.int32)
    for row, S in zip(rows, contexts):
        slots = (tables[row][:, None] * P + np.arange(P)).reshape(-1)[:S]
        for cache, rise in ((k_cache, 0), (v_cache, 30)):
            along = np.linspace(0, rise, S, dtype=np.float32)[:, None, None]
            cache.reshape(-1, G, D)[slots] = lively(rng, S, G, D) / np.float32(5) + along
    splits = lay_out_splits(contexts, G, split, run)
    return [elements(unwritten(T, H, D)), elements(lively(rng, T, H + 2 * G, D)),
            elements(k_cache), elements(v_cache), tables, rows,
            np.cumsum([0, *queries], dtype=np.int32), np.array(contexts, np.int32), splits,
            unwritten(len(splits) - B - 1, H, D + 2)]


def whole_contexts_example(rng, elements, H, G, D, P, contexts, queries):
    return attention_example(rng, elements, H, G, D, P, contexts, queries, WHOLE)


def settings_example(rng, B, V):
    """rows, settings, bias, seen: greedy, edited, and sampled with every filter, in turns."""
    settings = np.zeros((B + 1, NUM_SETTINGS), np.float32)
    settings[:, [TOP_P, REPETITION]] = 1
    settings[1::4, [TEMPERATURE, TOP_K]] = 0.7, 5
    settings[2::4, [TEMPERATURE, TOP_P, MIN_P]] = 1.5, 0.8, 0.05
    settings[3::4] = 1.2, 9, 0.9, 0.01, 1.3, 0.5, 0.25, 1
    bias, seen = np.zeros((B + 1, V), np.float32), np.zeros((B + 1, V), np.int32)
    bias[:, ::5], seen[:, ::3], seen[:, 1::6] = -2, 2, IN_PROMPT
    bias[:, 3::11] = -np.inf
    return rng.permutation(B).astype(np.int32), settings, bias, seen


def edit_logits_example(rng, elements, B, V, chunks=MAX_CHUNKS):
    rows, settings, bias, seen = settings_example(rng, B, V)
    logits = lively(rng, B, V) / np.float32(4)
    # of equal ones the first counts: of two threads, of one thread of either kernel
    highest = logits.max(axis=1, keepdims=True) + 1
    for step in (V // 3 + 1, THREADS, ceil_div(V, chunks) * SAMPLE_THREADS):
        logits[:, V // 3::step] = highest
    if B > 2:
        logits[1, V // 2] = np.nan                     # refused, whatever the request asks for
    return [unwritten(B, V), unwritten(B, chunks), np.full((B, chunks), -1, np.int32), logits,
            rows, settings, bias, seen]


def sample_tokens_example(rng, elements, B, V, chunks=MAX_CHUNKS):
    example = edit_logits_example(rng, elements, B, V, chunks)
    edit_logits_ref(*example)
    scores, chunk_max, chunk_argmax, logits, rows, settings, _, seen = example
    state = np.zeros((B + 1, 2), np.int32)
    return [np.full((B + 1, 2), -1, np.int32), state, seen, scores, chunk_max, chunk_argmax, rows,
            rng.integers(1, 99, B).astype(np.int32), settings,
            rng.integers(0, 2**32, (B + 1, 2), np.uint32)]


def begin_decode_example(rng, elements, B, P):
    # of contexts of over 512 tokens the splits are longer: two of each are allowed
    split, G, longest, run = 256, SPLIT_ITEMS // 2, 768, 1 + B % 2
    state = rng.integers(0, longest, (B + 2, 2)).astype(np.int32)
    rows = rng.permutation(B + 2)[:B].astype(np.int32)                 # may include nobody's row
    state[-1] = 0
    inputs = np.stack([rows, rng.integers(100, 200, B).astype(np.int32)])
    splits = np.full(B + 1 + B * 3, -1, np.int32)
    outputs = [np.full(B, -1, np.int32) for _ in range(4)]
    tables = rng.integers(0, 99, (B + 2, longest // P)).astype(np.int32)
    return [*outputs, splits, inputs, state, tables, P, G, split, run]


def forward_decode_example(rng, elements, L, H, G, D, C, F, V, P, contexts, greedy=False):
    """Weights are small, as trained ones are, and one matrix is different from the next."""
    B = len(contexts)
    _, _, k_cache, v_cache, tables, rows, _, seq_lens, splits, partial = attention_example(
        rng, lambda a: a, H, G, D, P, contexts, (1,) * B, run=run_of(B, D))
    # a cache for each layer, the layers before upside down; the new token's slot is unwritten
    caches = np.stack([[cache * (-1) ** l for l in range(L)] for cache in (k_cache, v_cache)])
    for row, S in zip(rows, contexts):
        for cache in caches:
            cache[:, tables[row, (S - 1) // P], (S - 1) % P] = np.nan
    positions = seq_lens - 1
    slots = tables[rows, positions // P] * P + positions % P
    angles = rng.uniform(0, 7, (max(contexts), D // 2)).astype(np.float32)
    matrices = lively(rng, L * layer_size(H, G, D, C, F) + V * C) / np.float32(40 * math.sqrt(C))
    # this is the eighth step; the letters that are there, NaN, are of the first and the seventh
    arrivals, letters = np.zeros(MEETINGS * L + 3, np.uint32), mail_size(H, G, D, C, F)
    arrivals[-1] = 7
    stamps = rng.choice([0, 6], letters) * (4 * L + 1) + rng.integers(1, L + 2, letters)
    mail = stamps.astype(np.uint64) << np.uint64(32) | np.uint64(0x7fff7fff)
    return [unwritten(B, V), unwritten(B, V // CHUNK), np.full((B, V // CHUNK), -1, np.int32),
            elements(unwritten(B, C)), elements(unwritten(B, C)), elements(unwritten(B, H, D)),
            elements(unwritten(B, F)), elements(caches), unwritten(parts_size(B, H, G, D, C, F)),
            partial, mail, arrivals, rng.integers(0, V, B).astype(np.int32), slots.astype(np.int32),
            rows, seq_lens, splits, tables, np.cos(angles), np.sin(angles),
            elements(lively(rng, V, C)), elements(lively(rng, 2 * L + 1, C)), elements(matrices),
            1e-5, greedy]


def late_by_one(out, qkv, k_cache, v_cache, tables, rows, starts, seq_lens, *workspace):
    paged_attention_ref(out, qkv, k_cache, v_cache, tables, rows, starts,
                        np.maximum(seq_lens - 1, np.diff(starts)))


def unscaled(out, qkv, *rest):
    paged_attention_ref(out, qkv * np.sqrt(qkv.shape[-1]), *rest)


def adjacent_pairs(qk, cos, sin, positions):
    c, s = cos[positions][:, None], sin[positions][:, None]
    even, odd = qk[..., ::2].copy(), qk[..., 1::2].copy()
    qk[..., ::2], qk[..., 1::2] = even * c - odd * s, odd * c + even * s


def without_last_k(out, x, weight, *scratch):
    matmul_ref(scratch[0] if scratch else out, x[:, :-1], weight[:, :-1])
    if scratch:
        silu_mul_ref(out, scratch[0])


def unrotated_keys(qkv, k_cache, v_cache, cos, sin, positions, slots):
    plain = qkv.copy()
    rope_write_kv_ref(qkv, k_cache, v_cache, cos, sin, positions, slots)
    G = k_cache.shape[2]
    write_kv_ref(k_cache, v_cache, plain[:, -2 * G:-G], plain[:, -G:], slots)


def no_bias(scores, chunk_max, chunk_argmax, logits, rows, settings, bias, seen):
    edit_logits_ref(scores, chunk_max, chunk_argmax, logits, rows, settings, 0 * bias.clip(-9, 9),
                    seen)


def same_seed_for_all(sampled, state, seen, scores, chunk_max, chunk_argmax, rows, seq_lens,
                      settings, seeds):
    sample_tokens_ref(sampled, state, seen, scores, chunk_max, chunk_argmax, rows, seq_lens,
                      settings, 0 * seeds)


def forgets_new_blocks(tokens, positions, slots, seq_lens, splits, inputs, *rest):
    begin_decode_ref(tokens, positions, slots, seq_lens, splits, inputs * [[1], [0]], *rest)


def early_step(*arguments):
    """Every token rotated as at the position before."""
    arguments = list(arguments)
    arguments[18:20] = [np.roll(table, 1, axis=0) for table in arguments[18:20]]
    forward_decode_ref(*arguments)


def kernel_row(name, twin, launcher, example, shapes, moves, does, mutation, **options):
    """shapes: dimensions of small, hostile examples; moves, does: bytes and flops as formulas, the
    card's own; mutation: a wrong twin; types: of elements; workspace: arguments that only the
    launcher needs, or leaves with parts unwritten; roundings: to the element type, one upon the
    other; needs: compute capability; (9, 0) is Hopper alone, whose instructions no later GPU has.
    """
    options = dict(types=("float32", "float16", "bfloat16"), workspace=(), roundings=1,
                   needs=(5, 0)) | options
    return SimpleNamespace(name=name, twin=twin, launcher=launcher, example=example, shapes=shapes,
                           moves=moves, does=does, mutation=mutation, **options)


def runs_on(row, capability):
    """Whether a GPU has the instructions of a row's kernel."""
    return row.needs <= capability and (row.needs < (9, 0) or capability < (10, 0))


TC = (dict(T=1, C=1), dict(T=3, C=50), dict(T=2, C=300))
MATMULS = (dict(T=1, N=1, K=1), dict(T=3, N=50, K=7), dict(T=2, N=33, K=65))
TENSOR_MATMULS = (dict(T=1, N=16, K=8), dict(T=19, N=48, K=88), dict(T=33, N=32, K=264))
WGMMA_MATMULS = (dict(T=1, N=16, K=8), dict(T=19, N=48, K=88),
                 dict(T=140, N=32, K=328) if SIMULATOR else dict(T=2700, N=1040, K=776))
STREAMED_MATMULS = (dict(T=1, N=1, K=8), dict(T=3, N=50, K=40), dict(T=10, N=18, K=600))
ROTATIONS = (dict(T=1, heads=1, D=2), dict(T=4, heads=3, D=26))
WRITES = (dict(T=1, H=1, G=1, D=2, P=1), dict(T=3, H=4, G=2, D=70, P=4))
# a decode step, a chunk whose context began earlier, a whole prompt; grouped and not
MIXED = dict(P=4, contexts=(9, 6, 2), queries=(1, 2, 2))
ATTENTIONS = (dict(H=1, G=1, D=6, **MIXED), dict(H=4, G=2, D=40, **MIXED),
              dict(H=6, G=1, D=6, **MIXED))
TILED_ATTENTIONS = (dict(H=1, G=1, D=16, **MIXED),
                    dict(H=2, G=1, D=48, P=16, contexts=(90, 18), queries=(18, 5)))
WGMMA_ATTENTIONS = (dict(H=1, G=1, D=64, **MIXED),
                    dict(H=1, G=1, D=64, P=16, contexts=(170, 18), queries=(40, 5)),
                    dict(H=2, G=1, D=64, P=16, contexts=(170, 18), queries=(40, 5)),
                    *(() if SIMULATOR else (
                        dict(H=2, G=1, D=64, P=16, contexts=(1100, 300, 7), queries=(700, 300, 1)),
                        dict(H=64, G=2, D=64, P=16, contexts=(1100, 300, 7), queries=(700, 300, 1)),
                        dict(H=64, G=8, D=128, P=32, contexts=(900, 300), queries=(500, 129)))))
DECODES = (dict(H=1, G=1, D=64, P=16, contexts=(1,), queries=(1,)),
           dict(H=6, G=2, D=64, P=4, contexts=(5, 40), queries=(1, 1)),
           dict(H=16, G=1, D=64, P=16, contexts=(270,), queries=(1,)))
ONE_STEP = dict(D=64, V=64, P=4) if SIMULATOR else dict(D=64, V=128, P=16)
WIDE = dict(H=2, G=1, C=128, F=192) if SIMULATOR else dict(H=16, G=4, C=1024, F=2048)
# the simulator takes minutes for as many tokens as the larger of its kernels are for
MANY_TOKENS = () if SIMULATOR else (
    dict(L=1, contexts=tuple(range(1, 21)), **ONE_STEP, **WIDE),
    dict(L=1, contexts=tuple(range(500, 540)), **ONE_STEP, **WIDE),
    dict(L=1, contexts=(600, 3), **ONE_STEP | dict(D=128), **WIDE),
    dict(L=2, contexts=(1300,), **ONE_STEP, **WIDE),
    dict(L=1, contexts=(1300,), **ONE_STEP | dict(D=128), **WIDE),
    # many query heads for a KV head, q, k and v in 8 parts, and the widest heads
    dict(L=1, contexts=(600, 40), **ONE_STEP, **WIDE | dict(H=12, G=1)),
    dict(L=1, contexts=(600, 40), **ONE_STEP | dict(D=128), **WIDE | dict(H=6, G=1)),
    dict(L=1, contexts=(530, 3), **ONE_STEP | dict(D=192), **WIDE | dict(H=4, G=2)),
    dict(L=1, contexts=(530, 3), **ONE_STEP | dict(D=256), **WIDE | dict(H=4, G=2)),
    # splits that are longer, of one token by mail and not
    dict(L=2, contexts=(17000,), **ONE_STEP, **WIDE),
    dict(L=2, contexts=(9000,), **ONE_STEP, **WIDE | dict(G=8)),
    dict(L=1, contexts=(9000, 500, 3, 700), **ONE_STEP, **WIDE | dict(G=8)),
    # whole contexts of up to four splits, others in pieces; more than a thread block takes at once
    dict(L=2, contexts=(600, 2048, 2049, 1, 513, 1537, 9000) * 10, **ONE_STEP, **WIDE),
    dict(L=1, contexts=(1300, 40) * 65, **ONE_STEP, **WIDE | dict(H=64)),
    # splits of 16 stages, of which the largest kernel has room for fewer
    dict(L=1, contexts=(600,) * 200, **ONE_STEP | dict(D=128), **WIDE))
# more items than lanes, for the simulator's one thread block; blocks of more tokens than a stage
MANY_ITEMS = dict(L=1, contexts=(3, 1, 2, 9, 4, 5, 6), D=64, V=64, P=64, H=5, G=5, C=64, F=64)
# splits that begin inside a block
LARGE_BLOCKS = dict(L=1, D=64, V=64, P=256, C=64, F=64) | (
    dict(contexts=(150, 3, 200), H=2, G=1) if SIMULATOR else
    dict(contexts=(9000, 3, 6000), H=8, G=8))
STEPS_OF_DECODE = (dict(L=2, contexts=(90,), **ONE_STEP, **WIDE), *MANY_TOKENS, MANY_ITEMS,
                   LARGE_BLOCKS,
                   # whole contexts of two splits, and one in pieces
                   dict(L=1, contexts=(7, 70, 3, 150, 1, 5, 128, 9, 4), **ONE_STEP,
                        **WIDE | dict(H=6 if SIMULATOR else 16)))
TENSOR = dict(types=("float16", "bfloat16"), needs=(8, 0))
HOPPER = dict(types=("float16", "bfloat16"), needs=(9, 0))
SCRATCH, PARTIAL = dict(workspace=(3,)), dict(workspace=(9,))
MATMUL_MOVES, MATMUL_DOES = "E*(T*N + T*K + N*K)", "2*T*N*K"

KERNELS = (
    kernel_row("embedding", embedding_ref, embedding, embedding_example,
               (dict(T=1, C=1, V=1), dict(T=3, C=50, V=9)), "2*T*C*E + 4*T", "0",
               lambda out, tokens, table: embedding_ref(out, tokens, table[::-1])),
    kernel_row("add", add_ref, add, add_example, TC, "3*T*C*E", "T*C",
               lambda x, delta: add_ref(x, -delta)),
    kernel_row("silu_mul", silu_mul_ref, silu_mul, silu_mul_example,
               (dict(T=1, F=1), dict(T=3, F=50)), "3*T*F*E", "5*T*F",
               lambda out, gate_up: silu_mul_ref(out, np.roll(gate_up, out.shape[1], axis=1))),
    kernel_row("rmsnorm", rmsnorm_ref, rmsnorm, rmsnorm_example, TC, "2*T*C*E + C*E", "4*T*C",
               lambda out, x, weight, eps: rmsnorm_ref(out, x, weight, 2 * np.square(x).mean())),
    kernel_row("add_rmsnorm", add_rmsnorm_ref, add_rmsnorm, add_rmsnorm_example, TC,
               "4*T*C*E + C*E", "5*T*C",
               lambda out, x, delta, weight, eps: rmsnorm_ref(out, x, weight, eps)),
    kernel_row("add_rmsnorm wide", add_rmsnorm_ref, add_rmsnorm_wide, add_rmsnorm_example,
               (dict(T=1, C=8), dict(T=3, C=304)), "4*T*C*E + C*E", "5*T*C",
               lambda out, x, delta, weight, eps: rmsnorm_ref(out, x, weight, eps), **TENSOR),
    kernel_row("matmul naive", matmul_ref, matmul_naive, matmul_example, MATMULS, MATMUL_MOVES,
               MATMUL_DOES, without_last_k),
    kernel_row("matmul tiled", matmul_ref, matmul_tiled, matmul_example, MATMULS, MATMUL_MOVES,
               MATMUL_DOES, without_last_k),
    kernel_row("matmul tensor", matmul_ref, matmul_tensor, matmul_example, TENSOR_MATMULS,
               MATMUL_MOVES, MATMUL_DOES, without_last_k, **TENSOR),
    kernel_row("matmul tensor SwiGLU", matmul_silu_mul_ref, matmul_silu_mul_tensor,
               matmul_silu_mul_example, TENSOR_MATMULS, MATMUL_MOVES, MATMUL_DOES, without_last_k,
               **TENSOR, **SCRATCH),
    kernel_row("matmul wgmma", matmul_ref, matmul_wgmma, matmul_example, WGMMA_MATMULS,
               MATMUL_MOVES, MATMUL_DOES, without_last_k, **HOPPER),
    kernel_row("matmul wgmma SwiGLU", matmul_silu_mul_ref, matmul_silu_mul_wgmma,
               matmul_silu_mul_example, WGMMA_MATMULS, MATMUL_MOVES, MATMUL_DOES, without_last_k,
               **HOPPER, **SCRATCH),
    kernel_row("matmul warp", matmul_ref, matmul_warp, matmul_example, MATMULS, MATMUL_MOVES,
               MATMUL_DOES, without_last_k),
    kernel_row("matmul streamed", matmul_ref, matmul_streamed, matmul_example, STREAMED_MATMULS,
               MATMUL_MOVES, MATMUL_DOES, without_last_k, **TENSOR),
    kernel_row("matmul streamed SwiGLU", matmul_silu_mul_ref, matmul_silu_mul_streamed,
               matmul_silu_mul_example, (dict(T=1, N=2, K=8), dict(T=9, N=50, K=296)),
               MATMUL_MOVES, MATMUL_DOES, without_last_k, **TENSOR, **SCRATCH),
    kernel_row("rope", rope_ref, rope, rope_example, ROTATIONS, "2*T*(H+G)*D*E", "3*T*(H+G)*D",
               adjacent_pairs),
    kernel_row("write_kv", write_kv_ref, write_kv, write_kv_example,
               (dict(T=1, G=1, D=2, P=1), dict(T=3, G=3, D=5, P=4)), "4*T*G*D*E", "0",
               lambda k_cache, v_cache, k, v, slots: write_kv_ref(k_cache, v_cache, v, k, slots)),
    kernel_row("rope_write_kv", rope_write_kv_ref, rope_write_kv, rope_write_kv_example, WRITES,
               "2*T*(H+2*G)*D*E + T*G*D*E", "3*T*(H+G)*D", unrotated_keys),
    kernel_row("rope_write_kv wide", rope_write_kv_ref, rope_write_kv_wide, rope_write_kv_example,
               (dict(T=1, H=1, G=1, D=16, P=1), dict(T=3, H=4, G=2, D=96, P=4)),
               "2*T*(H+2*G)*D*E + T*G*D*E", "3*T*(H+G)*D", unrotated_keys, **TENSOR),
    kernel_row("attention threepass", paged_attention_ref, attention_threepass, attention_example,
               ATTENTIONS, "2*T*H*D*E + T*H*S*D*E*(3+D)", "2*T*H*S*D*(3+D)", late_by_one),
    kernel_row("attention online", paged_attention_ref, attention_online, attention_example,
               ATTENTIONS, "2*T*H*D*E + 2*T*H*S*D*E", "4*T*H*S*D", unscaled),
    kernel_row("attention tiled", paged_attention_ref, attention_tiled, attention_example,
               TILED_ATTENTIONS, "2*T*H*D*E + 2*T*H*S*D*E/QUERIES", "4*T*H*S*D", late_by_one,
               **TENSOR),
    kernel_row("attention wgmma", paged_attention_ref, attention_wgmma, attention_example,
               WGMMA_ATTENTIONS, "2*T*H*D*E + 2*T*H*S*D*E/QUERIES", "4*T*H*S*D", late_by_one,
               **HOPPER),
    kernel_row("paged decode", paged_attention_ref, paged_decode, whole_contexts_example, DECODES,
               "2*B*S*G*D*E", "4*B*H*S*D", unscaled, **TENSOR, **PARTIAL),
    kernel_row("paged decode split", paged_attention_ref, paged_decode_split, attention_example,
               DECODES, "2*B*S*G*D*E", "4*B*H*S*D", late_by_one, **TENSOR, **PARTIAL),
    kernel_row("edit_logits", edit_logits_ref, edit_logits, edit_logits_example,
               (dict(B=1, V=1), dict(B=5, V=131)), "4*B*V", "B*V", no_bias, types=("float32",)),
    kernel_row("sample_tokens", sample_tokens_ref, sample_tokens, sample_tokens_example,
               (dict(B=1, V=1), dict(B=5, V=131),
                dict(B=2, V=640, chunks=80) if SIMULATOR else dict(B=2, V=24000, chunks=3000)),
               "4*B*V", "40*B*V", same_seed_for_all,
               types=("float32",)),
    kernel_row("begin_decode", begin_decode_ref, begin_decode, begin_decode_example,
               (dict(B=1, P=1), dict(B=40, P=4)), "40*B + 4*J", "0", forgets_new_blocks,
               types=("float32",)),
    kernel_row("forward_decode", forward_decode_ref, forward_decode, forward_decode_example,
               STEPS_OF_DECODE, "E*W + 2*L*B*S*G*D*E", "2*B*W + 4*L*B*H*S*D", early_step,
               workspace=(4, 5, 6, 8, 9, 10), roundings=8, **HOPPER),
)


def operations(**table):
    return SimpleNamespace(**table)


# what the engine calls: twins and launchers take the same arguments
TWINS = operations(
    embedding=embedding_ref, rmsnorm=rmsnorm_ref,
    add_rmsnorm=add_rmsnorm_ref, add=add_ref,
    rope_write_kv=rope_write_kv_ref, matmul=matmul_ref, matmul_decode=matmul_ref,
    matmul_silu_mul=matmul_silu_mul_ref, matmul_silu_mul_decode=matmul_silu_mul_ref,
    attention=paged_attention_ref, attention_decode=paged_attention_ref,
    begin_decode=begin_decode_ref, edit_logits=edit_logits_ref, sample_tokens=sample_tokens_ref)

ON_DEVICE = dict(
    embedding=embedding, rmsnorm=rmsnorm, add_rmsnorm=add_rmsnorm, add=add,
    begin_decode=begin_decode, edit_logits=edit_logits, sample_tokens=sample_tokens)

# slowest first; each computes the same, up to rounding
RUNGS = {
    "naive": operations(
        **ON_DEVICE, rope_write_kv=rope_write_kv_unfused,
        matmul=matmul_naive, matmul_decode=matmul_naive,
        matmul_silu_mul=matmul_silu_mul_naive, matmul_silu_mul_decode=matmul_silu_mul_naive,
        attention=attention_threepass, attention_decode=attention_threepass),
    "tiled": operations(
        **ON_DEVICE, rope_write_kv=rope_write_kv,
        matmul=matmul_tiled, matmul_decode=matmul_warp,
        matmul_silu_mul=matmul_silu_mul_tiled, matmul_silu_mul_decode=matmul_silu_mul_warp,
        attention=attention_online, attention_decode=attention_online),
    "tensor": operations(
        **ON_DEVICE | dict(add_rmsnorm=add_rmsnorm_wide), rope_write_kv=rope_write_kv_wide,
        matmul=matmul_tensor, matmul_decode=matmul_streamed,
        matmul_silu_mul=matmul_silu_mul_tensor, matmul_silu_mul_decode=matmul_silu_mul_streamed,
        attention=attention_tiled, attention_decode=attention_decode),
}
RUNGS["wgmma"] = operations(**vars(RUNGS["tensor"]) | dict(
    matmul=matmul_wgmma, matmul_silu_mul=matmul_silu_mul_wgmma, attention=attention_wgmma))
RUNGS["persistent"] = operations(**vars(RUNGS["wgmma"]), forward_decode=forward_decode)


def fits_tensor_cores(H, G, D, C, F):
    """None if the tensor-core kernels can run these shapes, otherwise why not."""
    for name, value in (("hidden_size", C), ("intermediate_size", F), ("heads * head_dim", H * D),
                        ("kv heads * head_dim", G * D)):
        if value % 8:
            return f"{name} {value} is no multiple of 8"
    if D % 16 or D > 256:
        return f"head_dim {D} is no multiple of 16 up to 256"
    return None

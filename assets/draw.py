"""The pictures of the course: writes the SVG files beside this script.

    python assets/draw.py

    1. A picture         shapes and text, the little of SVG that is needed
    2. blocks.svg        block tables and the pool that they point into         (lesson 11)
    3. batching.svg      static and continuous batching, two recorded runs      (lesson 13)
    4. softmax.svg       online softmax, tile by tile                           (lesson 10)
    5. fragments.svg     which lane of a warp holds which element               (lesson 9)
    6. step.svg          a decode step as kernels, as a graph, as one kernel    (lesson 16)

They are read on light pages and on dark ones: there is no background, text and lines are mid grey,
and a fill is dark enough for white text and light enough for a black page.
"""

import math
import sys
from html import escape
from itertools import accumulate, pairwise
from pathlib import Path

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parent))           # for the engine, whatever directory this is run from

from tinyvllm import Engine, SamplingParams    # noqa: E402

# lesson 16, one request, Llama 3.2 1B on an H200: kernels in a step, and times in milliseconds
KERNELS, LAUNCH, GRAPH, ONE_KERNEL = 150, 0.043, 0.99, 0.66


# -----------------------------------------------------------------------------
# 1. A picture

GREY, YELLOW = "#777", "#e0a000"
COLOURS = "#2a72c8", "#b85c00", "#2e8540", "#8f52c4", "#cc3d3d", "#00808a", "#c03a8c", "#8a6a3a"
BLUE, ORANGE, PURPLE = COLOURS[0], COLOURS[1], COLOURS[3]


def darker(colour: str, share: float) -> str:
    """A colour with so much black in it."""
    parts = (int(colour[i:i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part * (1 - share)):02x}" for part in parts)


class Picture:
    """An SVG document, 860 units wide, that grows. y counts downwards; text stands on its y."""

    def __init__(self, title: str, height: int):
        self.parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {height}" '
                      f'role="img" fill="{GREY}" font-family="sans-serif" font-size="12">',
                      f"<title>{escape(title)}</title>"]

    def add(self, tag: str, content: str = "", **attributes) -> None:
        """An element; stroke_width=2 stands for stroke-width="2"."""
        listed = " ".join(f'{name.replace("_", "-")}='
                          f'"{round(value, 2) if isinstance(value, float) else value}"'
                          for name, value in attributes.items())
        self.parts.append(f"<{tag} {listed}" + (f">{escape(content)}</{tag}>" if content else "/>"))

    def text(self, x: float, y: float, content: str, anchor: str = "start", **more) -> None:
        self.add("text", content, x=x, y=y, text_anchor=anchor, **more)

    def heading(self, x: float, y: float, content: str) -> None:
        self.text(x, y, content, font_weight="bold", font_size=13)

    def rect(self, x: float, y: float, width: float, height: float, fill: str, **more) -> None:
        self.add("rect", x=x, y=y, width=width, height=height, fill=fill, **more)

    def frame(self, x: float, y: float, width: float, height: float, colour: str, **more) -> None:
        self.rect(x, y, width, height, "none", stroke=colour, **more)

    def cell(self, x: float, y: float, width: float, height: float, label, fill: str) -> None:
        """A filled box with its label in the middle."""
        self.rect(x, y, width, height, fill)
        self.text(x + width / 2, y + height / 2 + 4, str(label), "middle", fill="#fff")

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: str = GREY, **more) -> None:
        self.add("line", x1=x0, y1=y0, x2=x1, y2=y1, stroke=colour, **more)

    def arrow(self, x0: float, y0: float, x1: float, y1: float, colour: str) -> None:
        """A curve that leaves and arrives to the right."""
        middle = (x0 + x1) / 2
        self.add("path", d=f"M{x0} {y0}C{middle} {y0} {middle} {y1} {x1 - 6} {y1}", fill="none",
                 stroke=colour, stroke_width=2)
        self.add("path", d=f"M{x1} {y1}l-9 -5v10z", fill=colour)

    def save(self, name: str) -> None:
        (HOME / name).write_text("\n".join(self.parts) + "\n</svg>\n", encoding="utf-8")


# -----------------------------------------------------------------------------
# 2. Block tables and the pool                                       (lesson 11)

P, POOL, TOKEN = 16, 11, 20             # slots in a block, blocks drawn, the token of a to look up
REQUESTS = {"a": (37, [7, 2, 9], BLUE), "b": (29, [7, 4], ORANGE)}       # tokens, block table


def draw_blocks() -> None:
    picture = Picture("The block tables of two requests point into a pool of KV blocks; block 7 "
                      "holds the beginning of both", 436)
    left, top, slot, pitch = 310, 46, 24, 31
    owners = {block: [name for name, (_, table, _) in REQUESTS.items() if block in table]
              for block in range(POOL)}
    colour_of = {block: PURPLE if len(names) > 1 else REQUESTS[names[0]][2]
                 for block, names in owners.items() if names}

    picture.heading(left, 26, f"pool of KV blocks, {P} slots each")
    for block, names in owners.items():
        y, label = top + block * pitch, f"slots {block * P}..{block * P + P - 1}"
        if names:
            num_tokens, table, _ = REQUESTS[names[0]]
            tokens = range(table.index(block) * P, num_tokens)[:P]
            for i in range(P):
                box = left + i * slot, y, slot - 1, 25
                if i < len(tokens):
                    picture.cell(*box, tokens[i], colour_of[block])
                else:
                    picture.frame(*box, colour_of[block])
            label += ": " + " and ".join(names) + f", {P - len(tokens)} free" * (len(tokens) < P)
        else:
            picture.frame(left, y, P * slot - 1, 25, GREY, stroke_dasharray="3 4")
        picture.text(left - 8, y + 17, str(block), "end")
        picture.text(left + P * slot + 10, y + 17, label)

    for (name, (num_tokens, table, colour)), y in zip(REQUESTS.items(), (76, 250)):
        picture.heading(20, y, f"request {name}, {num_tokens} tokens")
        for i, block in enumerate(table):
            at = y + 14 + 32 * i
            picture.text(112, at + 18, f"tokens {i * P}..{min(i * P + P, num_tokens) - 1}", "end")
            picture.cell(120, at, 36, 28, block, colour_of[block])
            picture.arrow(160, at + 14, left - 28, top + block * pitch + 12, colour)

    block, offset = REQUESTS["a"][1][TOKEN // P], TOKEN % P
    for x, y in ((left + offset * slot - 1, top + block * pitch - 1), (20, 404)):
        picture.frame(x, y, slot + 1, 27, YELLOW, stroke_width=3)
    picture.text(56, 422, f"slot of token {TOKEN} of a = block_table[{TOKEN} // {P}] * {P} + "
                 f"{TOKEN} % {P} = {block} * {P} + {offset} = {block * P + offset}")
    picture.rect(546, 405, slot, 25, PURPLE)
    picture.text(580, 422, "both begin alike: one block, two references")
    picture.save("blocks.svg")


# -----------------------------------------------------------------------------
# 3. Static and continuous batching                                  (lesson 13)

PLACES, ANSWERS = 3, (4, 17, 7, 3, 12, 6, 14, 5)            # tokens that each request asks for


def record(static_batching: bool) -> list[tuple[str, dict[int, str], set[str]]]:
    """A run of the demo model, for each step: its kind, place -> request, and who computed."""
    engine = Engine(device="cpu", max_num_seqs=PLACES, static_batching=static_batching)
    steps, holder = [], {}

    def watch(report):
        for place, name in list(holder.items()):
            if name not in report.held:
                del holder[place]
        for name in report.held:               # a newcomer takes the first place that is free
            if name not in holder.values():
                holder[min(set(range(PLACES)) - set(holder))] = name
        steps.append((report.kind, dict(holder), {name for name, _, _ in report.members}))

    engine.on_step = watch
    for i, num_tokens in enumerate(ANSWERS):
        engine.add_request(str(i + 1), {"prompt_token_ids": [10 + i, 20, 30]},
                           SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True))
    while engine.has_unfinished_requests():
        engine.step()
    return steps


def draw_batching() -> None:
    runs = {"static batching": record(True), "continuous batching": record(False)}
    picture = Picture("; ".join(f"{name}: {len(steps)} steps" for name, steps in runs.items())
                      + f", for the same {len(ANSWERS)} requests", 352)
    left = 66
    width = (850 - left) / max(map(len, runs.values()))

    def draw_place(x: float, y: float, request: str | None, state: str) -> None:
        inside = x + 0.5, y + 0.5, width - 2, 21
        if state == "empty":
            picture.frame(*inside, GREY, stroke_dasharray="2 3")
            return
        colour = COLOURS[int(request) - 1]
        if state == "waits":
            picture.text(x + width / 2, y + 15, request, "middle", fill=colour)
        else:
            shade = darker(colour, 0.5 if state == "prefill" else 0)
            picture.cell(x, y, width - 1, 22, request, shade)
        picture.frame(*inside, colour)

    for (name, steps), top in zip(runs.items(), (40, 180)):
        work = sum(len(computed) for _, _, computed in steps) / (PLACES * len(steps))
        picture.heading(10, top - 14, f"{name}: {len(steps)} steps, {100 * work:.0f} % of the "
                        "places at work")
        for place in range(PLACES):
            picture.text(10, top + place * 24 + 15, f"place {place + 1}")
            for n, (kind, holder, computed) in enumerate(steps):
                request = holder.get(place)
                state = "empty" if not request else kind if request in computed else "waits"
                draw_place(left + n * width, top + place * 24, request, state)
        picture.text(10, top + PLACES * 24 + 14, "step")
        for n in (1, *range(5, len(steps) + 1, 5)):
            picture.text(left + (n - 0.5) * width, top + PLACES * 24 + 14, str(n), "middle")

    legend = (("prefill", "prefill: the prompt, and the first token", left),
              ("decode", "decode: one token", 350), ("waits", "waits for a prefill", 520),
              ("empty", "empty place", 690))
    for state, meaning, x in legend:
        draw_place(x, 298, "1", state)
        picture.text(x + width + 7, 313, meaning)
    picture.text(left, 342, f"{len(ANSWERS)} requests ask for {', '.join(map(str, ANSWERS))} "
                 f"tokens: {sum(ANSWERS)} in all, either way")
    picture.save("batching.svg")


# -----------------------------------------------------------------------------
# 4. Online softmax                                                  (lesson 10)

SCORES, TILE = (1.2, 0.3, 2.1, 1.4, 0.5, 1.9, 3.0, 0.8), 2


def draw_softmax() -> None:
    picture = Picture(f"Online softmax over {len(SCORES)} scores in tiles of {TILE}: when the "
                      "maximum m grows, the sum l is rescaled", 540)
    tiles = [SCORES[i:i + TILE] for i in range(0, len(SCORES), TILE)]
    maxima = list(accumulate(map(max, tiles), max))                    # m after each tile
    left, scale = 270, 185                               # units for a weight of 1
    columns = [left + 70 * j + 6 * (j // TILE) for j in range(len(SCORES))]

    picture.heading(20, 26, "scores x, a tile at a time")
    picture.line(20, 44, 44, 44, stroke_width=2, stroke_dasharray="5 3")
    picture.text(52, 48, "running maximum m")
    for x, at, colour in zip(SCORES, columns, COLOURS):
        picture.rect(at, 152 - 36 * x, 66, 36 * x, colour)
        picture.text(at + 33, 167, f"{x:.1f}", "middle")
    for m, at in zip(maxima, columns[::TILE]):
        picture.line(at - 3, 149 - 36 * m, at + 70 * TILE - 1, 149 - 36 * m, stroke_width=2,
                     stroke_dasharray="5 3")

    picture.heading(20, 202, "running sum l of exp(x - m), a colour for each score")
    m, l, y = -math.inf, 0.0, 218
    for i, (tile, new_m) in enumerate(zip(tiles, maxima)):
        factor, added = math.exp(m - new_m), sum(math.exp(x - new_m) for x in tile)
        new_l = l * factor + added
        picture.text(20, y + 4, f"tile {i + 1}: m = {new_m:.1f}", font_weight="bold")
        picture.text(20, y + 20, f"factor exp({m:.1f} - {new_m:.1f}) = {factor:.3f}")
        picture.text(20, y + 36, f"l = {l:.3f} * {factor:.3f} + {added:.3f} = {new_l:.3f}")
        if i:                                            # what was there shrinks to what it is now
            picture.line(left, y - 38, left, y)
            picture.line(left + l * scale, y - 38, left + l * factor * scale, y)
            picture.text(left + l * factor * scale / 2, y - 15, f"* {factor:.3f}", "middle")
        weights = [math.exp(x - new_m) for x in SCORES[:(i + 1) * TILE]]
        for (begin, end), colour in zip(pairwise(accumulate(weights, initial=0.0)), COLOURS):
            width = (end - begin) * scale - 1            # a narrow one has no room for its number
            picture.cell(left + begin * scale, y, width, 26,
                         f"{end - begin:.2f}" * (width > 26), colour)
        m, l, y = new_m, new_l, y + 64

    assert math.isclose(l, sum(math.exp(x - max(SCORES)) for x in SCORES)), "three passes differ"
    picture.heading(20, y + 17, "at the end: softmax = exp(x - m) / l")
    for x, at, colour in zip(SCORES, columns, COLOURS):
        picture.cell(at, y, 66, 26, f"{math.exp(x - m) / l:.3f}", colour)
    picture.text(20, y + 54, "The output o, a sum of values with the same weights, is rescaled by "
                 "the same factor; the result is o / l.")
    picture.save("softmax.svg")


# -----------------------------------------------------------------------------
# 5. Fragments of mma.sync m16n8k16                                   (lesson 9)

WARP, FRAMED = 32, 13                          # lanes, and the one whose elements have a frame


def fragments(lane: int) -> tuple[list[tuple[int, int]], ...]:
    """What a lane holds of A (16, 16), B (16, 8) and C (16, 8): the row and column of each element,
    two by two, as they lie in its registers."""
    row, k = lane // 4, lane % 4 * 2
    return ([(row + i % 2 * 8, k + i // 2 * 8 + j) for i in range(4) for j in range(2)],
            [(k + i * 8 + j, row) for i in range(2) for j in range(2)],
            [(row + i * 8, k + j) for i in range(2) for j in range(2)])


def draw_fragments() -> None:
    picture = Picture("Which lane of a warp holds which elements of A, B and C in mma.sync "
                      "m16n8k16", 492)
    size, top = 22, 66
    notes = top + 16 * size + 24
    operands = ((40, 16, "A", "row", "k",
                 "row lane // 4 and that + 8; k 2 * (lane % 4), the next, and both + 8"),
                (440, 8, "B", "k", "column",
                 "k 2 * (lane % 4), the next, and both + 8; column lane // 4"),
                (662, 8, "C", "row", "column",
                 "row lane // 4 and that + 8; column 2 * (lane % 4) and the next"))
    for n, (left, width, name, down, across, rule) in enumerate(operands):
        picture.heading(left, 20, f"{name} (16, {width})")
        picture.text(left, 38, f"{down} down, {across} to the right")
        picture.text(left - 36, top + 8 * size + 7, " ×="[n], "middle", font_size=20)
        for i in range(16):
            picture.text(left - 6, top + i * size + 15, str(i), "end")
        for i in range(width):
            picture.text(left + (i + 0.5) * size, top - 6, str(i), "middle")
        for lane in range(WARP):               # a colour for each four lanes, a shade for each lane
            for row, column in fragments(lane)[n]:
                picture.cell(left + column * size, top + row * size, size - 1, size - 1, lane,
                             darker(COLOURS[lane // 4], lane % 4 * 0.14))
        for row, column in fragments(FRAMED)[n]:
            picture.frame(left + column * size, top + row * size, size - 1, size - 1, YELLOW,
                          stroke_width=3)
        rows, columns = (", ".join(map(str, sorted(set(indices))))
                         for indices in zip(*fragments(FRAMED)[n]))
        picture.text(40, notes + 20 * n, f"{name}:  {rule}")
        picture.text(584, notes + 20 * n, f"{name}:  {down} {rows}; {across} {columns}")
    picture.frame(508, notes - 12, 15, 15, YELLOW, stroke_width=3)
    picture.text(530, notes, f"lane {FRAMED}")
    picture.save("fragments.svg")


# -----------------------------------------------------------------------------
# 6. A decode step                                                   (lesson 16)

def draw_step() -> None:
    launched, kernel = KERNELS * LAUNCH, GRAPH / KERNELS
    picture = Picture(f"A decode step of one request: {launched:.2f} ms launch by launch, {GRAPH} "
                      f"ms as one CUDA graph, {ONE_KERNEL} ms as one kernel", 316)
    left, end = 60, math.ceil(launched)
    unit = (840 - left) / end                  # of a millisecond

    def bars(y: float, start: float, count: int, period: float, busy: float, colour: str) -> None:
        """A bar of `busy` ms in each period, as one dashed line."""
        last = start + (count - 1) * period + busy
        picture.line(left + start * unit, y, left + last * unit, y, colour, stroke_width=22,
                     stroke_dasharray=f"{busy * unit:.3f} {(period - busy) * unit:.3f}")

    titles = (f"{KERNELS} kernels, launched one by one: {KERNELS} * {LAUNCH} ms = {launched:.2f} "
              "ms, and the GPU mostly waits",
              f"the same kernels as one CUDA graph: {GRAPH} ms",
              f"one kernel for the whole step: {ONE_KERNEL} ms")
    for title, y in zip(titles, (46, 136, 226)):
        picture.heading(left, y - 20, title)
        picture.text(left - 10, y + 4, "host", "end")
        picture.text(left - 10, y + 32, "GPU", "end")
    # a kernel starts when it has been launched; narrow gaps only set neighbours apart
    bars(46, 0, KERNELS, LAUNCH, 0.8 * LAUNCH, ORANGE)
    bars(74, LAUNCH, KERNELS, LAUNCH, kernel, BLUE)
    bars(136, 0, 1, LAUNCH, LAUNCH, ORANGE)
    bars(164, 0, KERNELS, kernel, 0.7 * kernel, BLUE)
    bars(226, 0, 1, LAUNCH, LAUNCH, ORANGE)
    bars(254, 0, 1, ONE_KERNEL, ONE_KERNEL, BLUE)
    for y in (136, 226):
        picture.text(left + LAUNCH * unit + 8, y + 4, "one call, and the host is free")
    for until, y, note in ((GRAPH, 168, "each kernel waits for nothing but the one before"),
                           (ONE_KERNEL, 258, "the next weights are on their way all the time")):
        picture.text(left + until * unit + 8, y, note)

    picture.line(left, 278, left + end * unit, 278)
    for t in range(end + 1):
        picture.line(left + t * unit, 278, left + t * unit, 284)
        picture.text(left + t * unit, 300, f"{t} ms", "middle")
    picture.save("step.svg")


if __name__ == "__main__":
    for draw in (draw_blocks, draw_batching, draw_softmax, draw_fragments, draw_step):
        draw()

"""Answers to the exercises of the chapter on the kernels of flash attention."""

from textwrap import indent


def row_max(c, shuffle):
    most = c.unflatten(2, (2, 2)).amax((1, 3))
    for offset in (1, 2):
        most = most.maximum(shuffle(most, offset))
    return most


def row_max_of_both_rows(c, shuffle):
    most = c.amax((1, 2))
    for offset in (1, 2):
        most = most.maximum(shuffle(most, offset))
    return most[:, None].expand(32, 2)


def row_max_among_eight_lanes(c, shuffle):
    most = c.unflatten(2, (2, 2)).amax((1, 3))
    for offset in (1, 2, 4):
        most = most.maximum(shuffle(most, offset))
    return most


def row_max_among_wrong_lanes(c, shuffle):
    most = c.unflatten(2, (2, 2)).amax((1, 3))
    for offset in (8, 16):
        most = most.maximum(shuffle(most, offset))
    return most


def row_max_of_the_first_fragment(c, shuffle):
    return row_max(c[:, :1], shuffle)


def row_max_within_the_lane(c, shuffle):
    return c.unflatten(2, (2, 2)).amax((1, 3))


def row_max_by_columns(c, shuffle):
    most = c.unflatten(2, (2, 2)).amax((1, 2))
    for offset in (1, 2):
        most = most.maximum(shuffle(most, offset))
    return most


def ldmatrix(lane):
    return lane % 8 + lane // 16 * 8, lane // 8 % 2


def ldmatrix_of_the_plain_form(lane):
    return lane % 16, lane // 16


def ldmatrix_of_one_matrix(lane):
    return lane % 8, 0


def ldmatrix_outside(lane):
    return lane, 0


def swizzle(row, chunk, chunks):
    line = row * chunks // 8 if chunks < 8 else row
    return row * chunks + (chunk ^ (line % min(chunks, 8)))


def swizzle_for_wide_rows_alone(row, chunk, chunks):
    return row * chunks + (chunk ^ (row % 8))


def swizzle_by_padding(row, chunk, chunks):
    return row * (chunks + 1) + chunk


def swizzle_none(row, chunk, chunks):
    return row * chunks + chunk


def swizzle_with_row_modulo_chunks(row, chunk, chunks):
    return row * chunks + (chunk ^ (row % min(chunks, 8)))


def occupancy(threads, registers, shared_bytes):
    warps = threads // 32
    portions = -(-registers * 32 // 256) * 256 * warps
    return min(32, 65536 // portions, 233472 // (shared_bytes + 1024), 2048 // threads)


def occupancy_without_the_portions(threads, registers, shared_bytes):
    return min(32, 65536 // (threads * registers), 233472 // (shared_bytes + 1024), 2048 // threads)


def occupancy_without_the_system_s_share(threads, registers, shared_bytes):
    portions = -(-registers * 32 // 256) * 256 * (threads // 32)
    return min(32, 65536 // portions, 233472 // max(1, shared_bytes), 2048 // threads)


def occupancy_by_registers(threads, registers, shared_bytes):
    return 65536 // (-(-registers * 32 // 256) * 256 * (threads // 32))


def limit(rows, keys, d, element_bytes, flops, bandwidth):
    intensity = 4 * rows * keys * d / ((2 * keys + 2 * rows) * d * element_bytes)
    return intensity, min(flops, intensity * bandwidth)


def limit_without_queries(rows, keys, d, element_bytes, flops, bandwidth):
    intensity = 4 * rows * keys * d / (2 * keys * d * element_bytes)
    return intensity, min(flops, intensity * bandwidth)


def limit_of_numbers(rows, keys, d, element_bytes, flops, bandwidth):
    return limit(rows, keys, d, 1, flops, bandwidth)


def limit_of_the_memory_alone(rows, keys, d, element_bytes, flops, bandwidth):
    intensity, _ = limit(rows, keys, d, element_bytes, flops, bandwidth)
    return intensity, intensity * bandwidth


def order(block, blocks, heads, tiles):
    work = []
    for turn in range(-(-heads * tiles // blocks)):
        place = turn * blocks + (block if turn % 2 == 0 else blocks - 1 - block)
        if place < heads * tiles:
            work.append((place % heads, tiles - 1 - place // heads))
    return work


def order_as_it_comes(block, blocks, heads, tiles):
    return [(i // tiles, i % tiles) for i in range(block, heads * tiles, blocks)]


def order_short_first(block, blocks, heads, tiles):
    return [(i % heads, i // heads) for i in range(block, heads * tiles, blocks)]


def order_forgets_the_rest(block, blocks, heads, tiles):
    turns = heads * tiles // blocks
    return [w for i, w in enumerate(order(block, blocks, heads, tiles)) if i < turns]


def order_of_one_head(block, blocks, heads, tiles):
    return [(0, tile) for _, tile in order(block, blocks, 1, tiles)]


SOFTMAX = """
void softmax_row(float* S, int keys, float& m, float& l, float* O, int d) {
    float m_new = m;
    for (int j = 0; j < keys; ++j) m_new = std::max(m_new, S[j]);
    const float anchor = m_new == -INF ? 0.0f : m_new;
    const float correction = std::exp(m - anchor);
    l *= correction;
    for (int c = 0; c < d; ++c) O[c] *= correction;
    for (int j = 0; j < keys; ++j) l += S[j] = std::exp(S[j] - anchor);
    m = m_new;
}
"""

TILE = """
void forward_tile(const Problem& p, int row, int rows) {
    std::vector<float> O(rows * p.d, 0.0f), m(rows, -INF), l(rows, 0.0f), S(rows * KEYS);
    const int end = last_key(p, row + rows - 1);
    for (int key = 0; key < end; key += KEYS) {
        const int keys = std::min(KEYS, end - key);
        for (int i = 0; i < rows; ++i) {
            for (int j = 0; j < keys; ++j)
                S[i * KEYS + j] = key + j < last_key(p, row + i) ? score(p, row + i, key + j) : -INF;
            softmax_row(&S[i * KEYS], keys, m[i], l[i], &O[i * p.d], p.d);
            for (int j = 0; j < keys; ++j)
                for (int c = 0; c < p.d; ++c) O[i * p.d + c] += S[i * KEYS + j] * p.v[(key + j) * p.d + c];
        }
    }
    for (int i = 0; i < rows; ++i)
        for (int c = 0; c < p.d; ++c) p.out[(row + i) * p.d + c] = l[i] > 0.0f ? O[i * p.d + c] / l[i] : 0.0f;
}
"""

WINDOW = """
int first_key(const Problem& p, int i) {
    return p.window > 0 ? std::max(0, i + p.S - p.T - p.window + 1) : 0;
}

float score(const Problem& p, int i, int j) {
    float sum = 0.0f;
    for (int c = 0; c < p.d; ++c) sum += p.q[i * p.d + c] * p.k[j * p.d + c];
    sum *= p.scale;
    return p.softcap > 0.0f ? p.softcap * std::tanh(sum / p.softcap) : sum;
}
"""


def source(text, *edits):
    """A function that returns C++ with pieces replaced."""
    for old, new in edits:
        if old not in text:
            raise ValueError(f"the text no longer holds {old!r}")
        text = text.replace(old, new)
    return lambda: text


LENGTH = ("std::min(KEYS, end - key)", "KEYS")
LAST = ("last_key(p, row + rows - 1)", "last_key(p, row)")
RESCALED_O = ("    for (int c = 0; c < d; ++c) O[c] *= correction;\n", "")
ANCHOR = ("m_new == -INF ? 0.0f : m_new", "m_new")

RIGHT = {
    "flash_kernels.row_max": row_max,
    "flash_kernels.ldmatrix": ldmatrix,
    "flash_kernels.swizzle": swizzle,
    "flash_kernels.occupancy": occupancy,
    "flash_kernels.limit": limit,
    "flash_kernels.order": order,
    "flash_kernels.rescale": source(SOFTMAX),
    "flash_kernels.tile": source(TILE),
    "flash_kernels.window": source(WINDOW),
}
ALSO_RIGHT = {
    "flash_kernels.rescale": [
        source(indent(SOFTMAX, "        ")),
        source("#include <cmath>\n" + SOFTMAX.replace("void ", "static inline void\n")),
    ],
}
WRONG = {
    "flash_kernels.row_max": [
        row_max_of_both_rows,
        row_max_among_eight_lanes,
        row_max_among_wrong_lanes,
        row_max_of_the_first_fragment,
        row_max_within_the_lane,
        row_max_by_columns,
    ],
    "flash_kernels.ldmatrix": [ldmatrix_of_the_plain_form, ldmatrix_of_one_matrix, ldmatrix_outside],
    "flash_kernels.swizzle": [
        swizzle_for_wide_rows_alone,
        swizzle_by_padding,
        swizzle_none,
        swizzle_with_row_modulo_chunks,
    ],
    "flash_kernels.occupancy": [
        occupancy_without_the_portions,
        occupancy_without_the_system_s_share,
        occupancy_by_registers,
    ],
    "flash_kernels.limit": [limit_without_queries, limit_of_numbers, limit_of_the_memory_alone],
    "flash_kernels.order": [order_as_it_comes, order_short_first, order_forgets_the_rest, order_of_one_head],
    "flash_kernels.rescale": [
        source(SOFTMAX, RESCALED_O),
        source(SOFTMAX, ANCHOR),
        source(SOFTMAX, ("m - anchor", "anchor - m")),
    ],
    "flash_kernels.tile": [source(TILE, LENGTH), source(TILE, LAST), source(TILE, ("int key = 0", "int key = KEYS"))],
    "flash_kernels.window": [
        source(WINDOW, ("- p.window + 1", "- p.window")),
        source(WINDOW, ("std::max(0, i + p.S - p.T - p.window + 1)", "std::max(0, i - p.window + 1)")),
        source(WINDOW, ("p.softcap * std::tanh(sum / p.softcap)", "std::tanh(sum)")),
        source(WINDOW, ("p.window > 0 ? ", ""), (" : 0;", ";")),
    ],
}

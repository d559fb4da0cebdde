"""Answers to the exercises of the serving chapter."""


def decode_bound(rows, context, per_token, weights, bandwidth):
    return rows * bandwidth / (weights + rows * context * per_token)


def decode_bound_steps(rows, context, per_token, weights, bandwidth):
    return bandwidth / (weights + rows * context * per_token)


def decode_bound_weights_for_each_row(rows, context, per_token, weights, bandwidth):
    return rows * bandwidth / (rows * (weights + context * per_token))


def decode_bound_one_past(rows, context, per_token, weights, bandwidth):
    return rows * bandwidth / (weights + context * per_token)


def admit(waiting, running, max_num_seqs, free, block_size, spare):
    joined = 0
    for tokens in waiting:
        needed = -(-tokens // block_size)
        if running + joined == max_num_seqs or needed > free - spare * (running + joined):
            break
        free -= needed
        joined += 1
    return joined


def admit_passes_the_first(waiting, running, max_num_seqs, free, block_size, spare):
    joined = 0
    for tokens in waiting:
        needed = -(-tokens // block_size)
        if running + joined < max_num_seqs and needed <= free - spare * (running + joined):
            free -= needed
            joined += 1
    return joined


def admit_rounds_down(waiting, running, max_num_seqs, free, block_size, spare):
    return admit(
        [tokens // block_size * block_size for tokens in waiting], running, max_num_seqs, free, block_size, spare
    )


def admit_without_max_num_seqs(waiting, running, max_num_seqs, free, block_size, spare):
    return admit(waiting, running, len(waiting) + running, free, block_size, spare)


def admit_without_spare(waiting, running, max_num_seqs, free, block_size, spare):
    return admit(waiting, running, max_num_seqs, free, block_size, 0)


def chunk(writing, lacking, budget):
    left, counts = budget - writing, []
    for tokens in lacking:
        counts.append(min(tokens, left))
        left -= counts[-1]
    return counts


def chunk_ignores_writers(writing, lacking, budget):
    return chunk(0, lacking, budget)


def chunk_whole_prompts(writing, lacking, budget):
    left, counts = budget - writing, []
    for tokens in lacking:
        counts.append(tokens if tokens <= left else 0)
        left -= counts[-1]
    return counts


def chunk_each_alone(writing, lacking, budget):
    return [min(tokens, budget - writing) for tokens in lacking]


def certain(text, stop):
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return len(text) - size
    return len(text)


def certain_all(text, stop):
    return len(text)


def certain_holds_too_much(text, stop):
    return max(0, len(text) - len(stop) + 1)


def certain_shortest(text, stop):
    for size in range(1, min(len(text), len(stop) - 1) + 1):
        if text.endswith(stop[:size]):
            return len(text) - size
    return len(text)


def next_request(waiting, now, patience):
    return max(range(len(waiting)), key=lambda i: (waiting[i][1] + (now - waiting[i][0]) // patience, -waiting[i][0]))


def next_starves(waiting, now, patience):
    return max(range(len(waiting)), key=lambda i: (waiting[i][1], -waiting[i][0]))


def next_first_come(waiting, now, patience):
    return min(range(len(waiting)), key=lambda i: waiting[i][0])


def next_latest_of_equals(waiting, now, patience):
    return max(range(len(waiting)), key=lambda i: (waiting[i][1] + (now - waiting[i][0]) // patience, waiting[i][0]))


def next_request_as_soon_as_patience_ends(waiting, now, patience):
    late = [i for i in range(len(waiting)) if now - waiting[i][0] >= patience]
    if late:
        return min(late, key=lambda i: waiting[i][0])
    return max(range(len(waiting)), key=lambda i: (waiting[i][1], -waiting[i][0]))


RIGHT = {
    "serving.decode_bound": decode_bound,
    "serving.admit": admit,
    "serving.chunk": chunk,
    "serving.certain": certain,
    "serving.next_request": next_request,
}
WRONG = {
    "serving.decode_bound": [decode_bound_steps, decode_bound_weights_for_each_row, decode_bound_one_past],
    "serving.admit": [admit_passes_the_first, admit_rounds_down, admit_without_max_num_seqs, admit_without_spare],
    "serving.chunk": [chunk_ignores_writers, chunk_whole_prompts, chunk_each_alone],
    "serving.certain": [certain_all, certain_holds_too_much, certain_shortest],
    "serving.next_request": [
        next_request_as_soon_as_patience_ends,
        next_starves,
        next_first_come,
        next_latest_of_equals,
    ],
}

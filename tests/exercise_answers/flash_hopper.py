"""Answers to the exercises of the chapter on flash attention for Hopper."""


def mask(warp, lane, register, first_query, first_key):
    g, t = divmod(lane, 4)
    row = 16 * warp + g + 8 * (register % 4 // 2)
    column = 8 * (register // 4) + 2 * t + register % 2
    return first_key + column > first_query + row


def mask_without_the_lower_row(warp, lane, register, first_query, first_key):
    g, t = divmod(lane, 4)
    return first_key + 8 * (register // 4) + 2 * t + register % 2 > first_query + 16 * warp + g


def mask_without_the_warp(warp, lane, register, first_query, first_key):
    return mask(0, lane, register, first_query, first_key)


def mask_that_hides_the_query_itself(warp, lane, register, first_query, first_key):
    return mask(warp, lane, register, first_query - 1, first_key)


def mask_of_two_registers_a_column(warp, lane, register, first_query, first_key):
    g, t = divmod(lane, 4)
    row = 16 * warp + g + 8 * (register % 2)
    return first_key + 8 * (register // 4) + 2 * t + register % 4 // 2 > first_query + row


def descriptor(address, row_bytes):
    code = {128: 1, 64: 2, 32: 3}[row_bytes]
    return code << 62 | (8 * row_bytes >> 4) << 32 | 1 << 16 | address >> 4


def descriptor_of_wide_rows(address, row_bytes):
    return descriptor(address, 128)


def descriptor_in_bytes(address, row_bytes):
    return {128: 1, 64: 2, 32: 3}[row_bytes] << 62 | 8 * row_bytes << 32 | 1 << 16 | address


def descriptor_of_one_row(address, row_bytes):
    return {128: 1, 64: 2, 32: 3}[row_bytes] << 62 | (row_bytes >> 4) << 32 | 1 << 16 | address >> 4


def descriptor_with_the_swizzle_alone(address, row_bytes):
    return 1 << 62 | (8 * row_bytes >> 4) << 32 | 1 << 16 | address >> 4


def parity(tile, stages):
    turn = tile // stages % 2
    return tile % stages, turn, turn ^ 1


def parity_of_each_consumer_s_own_count(tile, stages):
    turn = tile // 2 // stages % 2
    return tile % stages, turn, turn ^ 1


def parity_that_waits_at_first(tile, stages):
    turn = tile // stages % 2
    return tile % stages, turn, turn


def parity_that_never_waits(tile, stages):
    turn = tile // stages % 2
    return tile % stages, turn ^ 1, turn ^ 1


def parity_in_one_buffer(tile, stages):
    return 0, tile % 2, tile % 2 ^ 1


def parity_of_the_tile(tile, stages):
    return tile % stages, tile % 2, tile % 2 ^ 1


RIGHT = {
    "flash_hopper.mask": mask,
    "flash_hopper.descriptor": descriptor,
    "flash_hopper.parity": parity,
}
WRONG = {
    "flash_hopper.mask": [
        mask_without_the_lower_row,
        mask_without_the_warp,
        mask_that_hides_the_query_itself,
        mask_of_two_registers_a_column,
    ],
    "flash_hopper.descriptor": [
        descriptor_of_wide_rows,
        descriptor_in_bytes,
        descriptor_of_one_row,
        descriptor_with_the_swizzle_alone,
    ],
    "flash_hopper.parity": [
        parity_of_each_consumer_s_own_count,
        parity_that_waits_at_first,
        parity_that_never_waits,
        parity_of_the_tile,
        parity_in_one_buffer,
    ],
}

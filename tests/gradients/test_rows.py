import torch

from marble.gradients.rows import Rows, gram_of, whole_gram

SIZES = [3, 1, 20_000]  # a Gram is added up in pieces of 2**14 columns
MATRIX = torch.randn(3, sum(SIZES), generator=torch.Generator().manual_seed(0))


def filled(whole):
    rows = Rows((2, 1), SIZES, dtype=torch.float32, device=torch.device("cpu"), whole=whole)
    for i, part in enumerate(MATRIX.split(SIZES, dim=1)):
        rows.block(0, i).copy_(part[:2])
        rows.block(1, i).copy_(part[2:])
    return rows


def test_blocks_in_one_piece_or_apart_are_the_same_matrix():
    for whole in (False, True):
        rows = filled(whole)
        assert len(rows) == 3
        assert torch.equal(rows.matrix(), MATRIX)
    rows.matrix()[0, 3] = 7.0  # in one piece, blocks are parts of it
    assert rows.block(0, 1)[0, 0] == 7.0


def test_gram_is_that_of_the_matrix_in_double_precision():
    expected = MATRIX.double() @ MATRIX.double().T
    for whole in (False, True):
        torch.testing.assert_close(filled(whole).gram(), expected, rtol=1e-13, atol=1e-10)
    torch.testing.assert_close(gram_of(MATRIX), expected, rtol=1e-13, atol=1e-10)


def test_a_row_left_out_of_the_mixture_may_be_anything():
    rows = filled(True)
    rows.matrix()[1] = torch.nan
    mixed = torch.cat(rows.mix(torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)))
    torch.testing.assert_close(mixed, 0.5 * MATRIX[0] + 2 * MATRIX[2])


def test_whole_gram_adds_the_common_part():
    parts = MATRIX.double()
    gradients = parts[:2] + parts[2]
    torch.testing.assert_close(whole_gram(parts @ parts.T), gradients @ gradients.T)


def test_alone_a_sum_over_processes_changes_nothing():
    rows = filled(True)
    rows.sum_over_processes()
    assert torch.equal(rows.matrix(), MATRIX)

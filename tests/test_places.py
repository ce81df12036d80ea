"""plumbing/places.py: hot regions of a map, and boxes in words and in pixels."""

import pytest
import torch

from plumbing.places import _hottest_box, in_pixels, place_words, regions


def test_regions_are_the_hot_areas_hottest_first():
    heat = torch.zeros(6, 8)
    heat[1:3, 1:4] = 5
    heat[5, 7] = 9
    heat[4, 0] = 8
    heat[0, 7] = 7
    boxes = [(1, 1, 4, 3), (7, 5, 8, 6), (0, 4, 1, 5)]
    assert regions(heat) == boxes
    assert regions(heat, at_most=2) == boxes[:2]
    assert regions(heat, at_most=9) == [*boxes, (7, 0, 8, 1)]


def test_a_flat_map_has_no_region():
    assert regions(torch.ones(3, 3)) == []
    assert regions(torch.ones(1, 1)) == []


def test_cells_that_touch_at_a_corner_are_two_regions_and_an_angle_is_two_bands():
    heat = torch.zeros(6, 6)
    heat[0, 0:3] = 5
    heat[0:3, 2] = 5  # an angle
    heat[3, 3] = 9
    boxes = regions(heat)
    assert set(boxes) == {(0, 0, 3, 1), (2, 0, 3, 3), (3, 3, 4, 4)}


def test_a_row_and_a_column_that_cross_are_two_whole_regions():
    for row in range(5):
        for column in range(4):
            heat = torch.rand(5, 4, generator=torch.Generator().manual_seed(row))
            heat[row] += 8
            heat[:, column] += 8
            heat[row, column] -= 8
            assert set(regions(heat)) == {(0, row, 4, row + 1), (column, 0, column + 1, 5)}


def test_the_hottest_box_is_the_best_of_all_boxes():
    """Of a map without cold cells between hot ones: by trying them all."""
    draw = torch.Generator().manual_seed(3)
    for _ in range(20):
        surplus = torch.randn(4, 5, generator=draw).double()
        sums = {
            (left, top, right, bottom): surplus[top:bottom, left:right].sum().item()
            for top in range(4)
            for bottom in range(top + 1, 5)
            for left in range(5)
            for right in range(left + 1, 6)
        }
        gain, box = _hottest_box(surplus)
        assert gain == pytest.approx(max(sums.values()))
        assert sums[box] == pytest.approx(gain)


def test_a_map_is_not_clear_where_hot_cells_are_hardly_hotter():
    heat = torch.zeros(4, 4)
    heat[1] = 1.1
    assert regions(heat) == [(0, 1, 4, 2)]
    assert regions(heat * 0.9) == []


def test_scattered_heat_has_no_region_and_a_place_in_it_has_one():
    noise = torch.rand(30, 36, generator=torch.Generator().manual_seed(0)) ** 8 * 9
    assert regions(noise) == []
    noise[10:16, 5:15] += 9
    assert regions(noise)[0] == (5, 10, 15, 16)


@pytest.mark.parametrize(
    "box, words",
    [
        ((0, 0, 2, 2), "the upper left"),
        ((6, 6, 8, 8), "the lower right"),
        ((3, 3, 5, 5), "the middle of the picture"),
        ((5, 3, 8, 4), "the middle right"),
        ((0, 3, 8, 6), "the middle part, from left to right"),
        ((3, 0, 6, 8), "the middle part, from top to bottom"),
        ((0, 0, 8, 8), "the whole picture"),
    ],
)
def test_a_place_without_an_ordinal_has_the_same_words_exact_or_not(box, words):
    assert place_words(box, (8, 8)) == words
    assert place_words(box, (8, 8), exact=False) == words


@pytest.mark.parametrize(
    "box, exact, vague",
    [
        ((4, 0, 6, 8), "the third column from the left", "the middle part, from top to bottom"),
        ((0, 6, 8, 8), "the fourth row from the top", "the lower part, from left to right"),
        ((0, 0, 7, 4), "the first row from the top", "the upper part, from left to right"),
    ],
)
def test_rows_and_columns_have_ordinals_only_where_they_are_exact(box, exact, vague):
    assert place_words(box, (8, 8)) == exact
    assert place_words(box, (8, 8), exact=False) == vague


def test_more_rows_than_there_are_ordinals_have_none():
    row = (0, 5, 6, 6)
    assert place_words(row, (6, 6)) == "the sixth row from the top"
    assert place_words(row, (7, 6)) == "the lower part, from left to right"


def test_a_box_in_the_pixels_of_its_image():
    assert in_pixels((1, 0, 3, 4), (4, 4), (100, 200)) == [25, 0, 75, 200]
    assert in_pixels((0, 1, 2, 2), (3, 5), (140, 84)) == [0, 28, 56, 56]

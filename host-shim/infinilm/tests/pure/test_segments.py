"""Image spans of each processor, on prompts that are written out token by token."""

import pytest

from kvhook_infinilm.segments import SegmentsError, image_bounds, image_segments


def span(start, end, image="a.png"):
    return {"start_index": start, "end_index": end, "identifier": image}


def runs(prompt, marks):
    """(start, length) of the runs of one mark, the independent reading of a prompt."""
    found = []
    for index, token in enumerate(prompt):
        if token not in marks:
            continue
        if index and prompt[index - 1] == token:
            found[-1][1] += 1
        else:
            found.append([index, 1])
    return [tuple(run) for run in found]


@pytest.mark.parametrize("processor", ["Qwen35Processor", "Ernie45VLProcessor", "KimiK3Processor"])
def test_ends_that_are_included(processor):
    prompt = "tt<IIII>t<II>t"
    mappings = [span(3, 6), span(10, 11, "b.png")]
    assert (
        image_segments(processor, mappings, len(prompt)) == runs(prompt, "I") == [(3, 4), (10, 2)]
    )


def test_videonsa_ends_are_not_included():
    prompt = "tt<IIII><VV>t"
    mappings = [span(3, 7), span(9, 11, "b.mp4")]
    assert image_segments("VideoNSAProcessor", mappings, len(prompt)) == runs(prompt, "IV")


def test_videonsa_a_video_right_behind_an_image_stays_its_own():
    prompt = "tIIIVVt"
    mappings = [span(1, 4, "a.png"), span(4, 6, "b.mp4")]
    assert image_segments("VideoNSAProcessor", mappings, len(prompt)) == runs(prompt, "IV")
    assert runs(prompt, "IV") == [(1, 3), (4, 2)]


def test_videonsa_a_span_up_to_the_end():
    assert image_segments("VideoNSAProcessor", [span(2, 5)], 5) == [(2, 3)]
    with pytest.raises(SegmentsError, match=r"2 to 6 .* prompt of 5 tokens"):
        image_segments("VideoNSAProcessor", [span(2, 6)], 5)


# Two images: the first with its number (#), overview (O) and two slices (S), the second without slices.
MINICPMV = "t(#)<OOO>[SSS]n[SSS]t(#)<OO>t"
MINICPMV_MAPPINGS = [
    span(2, 2),
    span(10, 12),
    span(16, 18),
    span(22, 22, "b.png"),
]


def test_minicpmv_bounds_that_come_with_the_pixels_give_overview_and_slices():
    bounds = [(5, 8), (10, 13), (16, 19), (25, 27)]
    segments = image_segments("MiniCPMVProcessor", MINICPMV_MAPPINGS, len(MINICPMV), bounds)
    assert segments == runs(MINICPMV, "OS") == [(5, 3), (10, 3), (16, 3), (25, 2)]


def test_minicpmv_without_bounds_several_spans_to_an_image():
    segments = image_segments("MiniCPMVProcessor", MINICPMV_MAPPINGS, len(MINICPMV))
    assert segments == runs(MINICPMV, "#S") == [(2, 1), (10, 3), (16, 3), (22, 1)]


def test_bounds_of_other_processors_are_not_used():
    assert image_segments("Qwen35Processor", [span(1, 2)], 9, [(4, 6)]) == [(1, 2)]


def test_spans_of_one_image_that_touch_are_one():
    mappings = [span(1, 2), span(3, 5), span(6, 6, "b.png"), span(7, 8, "b.png")]
    assert image_segments("MiniCPMVProcessor", mappings, 9) == [(1, 5), (6, 3)]


def test_an_empty_span_is_left_out():
    assert image_segments("MiniCPMVProcessor", [span(2, 1), span(4, 4)], 9) == [(4, 1)]
    assert image_segments("VideoNSAProcessor", [span(2, 2), span(4, 5)], 9) == [(4, 1)]


def test_spans_are_put_in_order():
    assert image_segments("VideoNSAProcessor", [span(5, 7, "b"), span(1, 3)], 9) == [(1, 2), (5, 2)]


@pytest.mark.parametrize("mappings", [None, []])
def test_no_spans_of_any_processor(mappings):
    assert image_segments("LlamaProcessor", mappings, 9) == []
    assert image_segments("MiniCPMVProcessor", mappings, 9, [(1, 2)]) == []


def test_an_unknown_processor_is_named():
    with pytest.raises(SegmentsError, match="NewVLProcessor is not known.*VideoNSAProcessor"):
        image_segments("NewVLProcessor", [span(1, 2)], 9)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (span(-1, 2), "-1 to 3"),
        (span(7, 9), "7 to 10 .* prompt of 9"),
        (span(5, 2), "5 to 3"),
        ({"start_index": 1, "identifier": "a"}, "expected start_index, end_index, identifier"),
        ({"start_index": 1, "end_index": "x", "identifier": "a"}, "expected start_index"),
        (3, "a span is 3"),
    ],
)
def test_spans_that_cannot_be(mapping, message):
    with pytest.raises(SegmentsError, match=message):
        image_segments("Qwen35Processor", [mapping], 9)


def test_spans_that_overlap():
    with pytest.raises(SegmentsError, match="begins at token 3 overlaps .* ends at 4"):
        image_segments("Qwen35Processor", [span(1, 3), span(3, 5, "b.png")], 9)


def test_bounds_of_processed_inputs():
    np = pytest.importorskip("numpy")
    assert image_bounds(None) is None
    assert image_bounds({"input_ids": [1]}) is None
    assert image_bounds({"image_bound": []}) == []
    assert image_bounds({"image_bound": [[[1, 3], [5, 6]]]}) == [(1, 3), (5, 6)]
    assert image_bounds({"image_bound": [np.array([[1, 3], [5, 6]])]}) == [(1, 3), (5, 6)]
    assert image_bounds({"image_bound": np.array([[[1, 3]]])}) == [(1, 3)]

"""Where a prompt's images are, from what InfiniLM's processors say.

A processor gives `mm_token_index_mappings`: `start_index`, `end_index` and `identifier` for each span of tokens. What
`end_index` means is the processor's own:

| processor | the last token of a span | spans |
| --- | --- | --- |
| `Qwen35Processor`, `KimiK3Processor` | `end_index` | one for an image |
| `Ernie45VLProcessor` | `end_index` | one for an image or a video |
| `MiniCPMVProcessor` | `end_index` | several for an image: its number in the text, then its slices |
| `VideoNSAProcessor` | the one before `end_index` | one for an image or a video |

Videos are given to plugins as images. MiniCPM-V's mapping leaves out an image's overview and names its number instead, so
there the bounds that come with the pixels (`image_bound`) count, when the request still has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .errors import KvhookError

_INCLUSIVE = {
    "Qwen35Processor": True,
    "KimiK3Processor": True,
    "Ernie45VLProcessor": True,
    "MiniCPMVProcessor": True,
    "VideoNSAProcessor": False,
}
_BOUNDS_COUNT = {"MiniCPMVProcessor"}


class SegmentsError(KvhookError):
    """A request's image spans are not understood; the message names the processor and the span."""


def image_segments(
    processor_name: str,
    mappings: Sequence[Mapping] | None,
    prompt_length: int,
    bounds: Iterable[tuple[int, int]] | None = None,
) -> list[tuple[int, int]]:
    """(start, length) of a prompt's images, ascending, not overlapping. Spans of one image that touch are one.

    Args:
        processor_name: Class of InfiniLM's processor.
        mappings: The request's `mm_token_index_mappings`.
        prompt_length: Tokens of the prompt.
        bounds: What `image_bounds` found, for the processor whose mappings leave tokens out.

    Raises `SegmentsError` for a processor that is not known, and spans that are out of bounds or overlap.
    """
    if not mappings:
        return []
    if processor_name not in _INCLUSIVE:
        raise SegmentsError(
            f"the processor {processor_name} is not known, so its image spans may be misread; "
            f"known: {', '.join(sorted(_INCLUSIVE))}"
        )
    if bounds is not None and processor_name in _BOUNDS_COUNT:
        # Each bound stands for itself: an image's parts have other tokens between them.
        spans = [(int(start), int(end), index) for index, (start, end) in enumerate(bounds)]
    else:
        spans = [_span(processor_name, mapping) for mapping in mappings]

    segments: list[tuple[int, int]] = []
    last_end, last_image = 0, None
    for start, end, image in sorted(spans, key=lambda span: span[:2]):
        if not 0 <= start <= end <= prompt_length:
            raise SegmentsError(
                f"{processor_name}: the span of tokens {start} to {end} (not included) is not "
                f"inside the prompt of {prompt_length} tokens"
            )
        if start == end:
            continue
        if segments and start < last_end:
            raise SegmentsError(
                f"{processor_name}: the span that begins at token {start} overlaps the one before, "
                f"which ends at {last_end}"
            )
        if segments and start == last_end and image == last_image:
            first, length = segments[-1]
            segments[-1] = (first, length + end - start)
        else:
            segments.append((start, end - start))
        last_end, last_image = end, image
    return segments


def image_bounds(processed_inputs: Mapping | None) -> list[tuple[int, int]] | None:
    """Bounds (start, end not included) of the images of a request's `processed_inputs`; None: it has none.

    The first row of `image_bound` is read, a tensor or nested lists: a request is one prompt.
    """
    if processed_inputs is None or "image_bound" not in processed_inputs:
        return None
    rows = processed_inputs["image_bound"]
    if len(rows) == 0:
        return []
    first = rows[0]
    if hasattr(first, "tolist"):
        first = first.tolist()
    return [(int(start), int(end)) for start, end in first]


def _span(processor_name: str, mapping: Mapping) -> tuple[int, int, object]:
    """Start, end (not included) and image of one mapping."""
    try:
        start, end = int(mapping["start_index"]), int(mapping["end_index"])
        image = mapping["identifier"]
    except (KeyError, TypeError, ValueError) as error:
        raise SegmentsError(
            f"{processor_name}: a span is {mapping!r}; expected start_index, end_index, identifier"
        ) from error
    return start, end + 1 if _INCLUSIVE[processor_name] else end, image

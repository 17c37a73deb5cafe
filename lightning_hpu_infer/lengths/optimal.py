"""Which lengths to pad to, so that padding is least: exact, and pure functions."""

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from operator import index


def best_buckets(lengths: Iterable[int], count: int, multiple: int = 1) -> list[int]:
    """The bucket lengths that pad the given lengths least: exact, not a heuristic.

    What a bucket costs is its upper end times what it holds, so the best buckets end at lengths that occur. Their
    choice is a shortest path over the distinct lengths, in `O(count * distinct)`.

    For batches that are padded to their longest sample, give the lengths of batches, not of samples.

    Args:
        lengths: Lengths to be expected, each as often as it is expected. All positive.
        count: Buckets at most, and so graphs.
        multiple: Every bucket is a multiple of this.

    Returns:
        At most `count` ascending lengths, the last of which holds the longest of `lengths`.

    Raises:
        ValueError: If there are no lengths, or any number is not positive.
    """
    if count < 1 or multiple < 1:
        raise ValueError(f"`count` and `multiple` must be positive, got {count} and {multiple}.")
    seen = Counter(index(length) for length in lengths)
    if not seen or min(seen) < 1:
        raise ValueError(f"`lengths` must be positive, and at least one, got {min(seen) if seen else 'none'}.")
    aligned: Counter[int] = Counter()
    for length, times in seen.items():
        aligned[-(-length // multiple) * multiple] += times
    ends = sorted(aligned)
    holding = [0]  # what lies below each possible end
    for end in ends:
        holding.append(holding[-1] + aligned[end])
    costs = [0] + [end * held for end, held in zip(ends, holding[1:], strict=True)]
    steps: list[list[int]] = []
    for _ in range(1, min(count, len(ends))):
        costs, starts = _one_more(ends, holding, costs)
        steps.append(starts)
    buckets, stop = [], len(ends)
    while stop:
        buckets.append(ends[stop - 1])
        stop = steps.pop()[stop] if steps else 0
    return buckets[::-1]


def _one_more(ends: list[int], holding: list[int], costs: list[int]) -> tuple[list[int], list[int]]:
    """Costs of the first `stop` lengths with one more bucket, and where that bucket starts, for every `stop`.

    It is `min(costs[start] + ends[stop - 1] * (holding[stop] - holding[start]))` over `start < stop`: the lowest, at a
    growing `end`, of lines that fall ever more steeply. So a line that was passed never comes back.
    """
    lines: deque[int] = deque()
    best, starts = [0], [0]
    for stop, end in enumerate(ends, 1):
        new = stop - 1
        while len(lines) > 1 and _never_lowest(lines[-2], lines[-1], new, holding, costs):
            lines.pop()
        lines.append(new)
        while len(lines) > 1 and costs[lines[1]] - end * holding[lines[1]] <= costs[lines[0]] - end * holding[lines[0]]:
            lines.popleft()
        best.append(costs[lines[0]] + end * (holding[stop] - holding[lines[0]]))
        starts.append(lines[0])
    return best, starts


def _never_lowest(left: int, middle: int, right: int, slope: list[int], height: list[int]) -> bool:
    """Whether `right` passes below `left` before `middle` does."""
    return (height[right] - height[left]) * (slope[middle] - slope[left]) <= (height[middle] - height[left]) * (
        slope[right] - slope[left]
    )


def bucket_of(length: int, buckets: Sequence[int]) -> int | None:
    """The smallest of ascending `buckets` that holds `length`, or None if none does."""
    found = bisect_left(buckets, length)
    return buckets[found] if found < len(buckets) else None


def padding_waste(lengths: Iterable[int], buckets: Sequence[int]) -> tuple[int, int]:
    """Totals with and without padding. Lengths above the largest bucket stay as they are.

    Returns:
        `(padded, real)`: the sum of the buckets of the lengths, and the sum of the lengths.
    """
    padded = real = 0
    for length in lengths:
        padded += bucket_of(length, buckets) or length
        real += length
    return padded, real

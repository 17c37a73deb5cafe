"""Batches of many lengths on few: padded to buckets on the host, their outputs cut back."""

from typing import Any, NamedTuple

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.lengths.evidence import Evidence
from lightning_hpu_infer.lengths.optimal import best_buckets, bucket_of
from lightning_hpu_infer.lengths.pad import PadSpec
from lightning_hpu_infer.links import explained

# Batches to look at before "auto" chooses, where their lengths are not known beforehand.
OBSERVED_BATCHES = 64


class Lengths(NamedTuple):
    """A batch's length before and after padding."""

    real: int
    padded: int


class Buckets:
    """Pads each batch to the smallest bucket that holds it.

    With "auto" and lengths that nobody knows, the first batches are only padded to a multiple, and the buckets chosen
    from their lengths. Where batches come in order of length, they are chosen for the next run.

    Args:
        config: `bucket_lengths`, `pad_spec`, `num_buckets` and `bucket_multiple` are used.
    """

    pads = True
    """Whether batches may be padded at all."""

    def __init__(self, config: InferenceConfig) -> None:
        assert isinstance(config.pad_spec, PadSpec)
        self.spec: PadSpec = config.pad_spec
        # What nobody has said has to be seen.
        self._is_guess = config.lengths == "auto" and config.pad_spec == PadSpec.tokenizer()
        self._evidence: Evidence | None = Evidence(in_order=False) if self._is_guess else None
        self._config = config
        self.chosen: list[int] | None = None
        """The buckets, ascending; None while "auto" still observes."""
        if config.bucket_lengths is not None and config.bucket_lengths != "auto":
            self.chosen = list(config.bucket_lengths)
        self._seen: list[int] = []
        self._grouped = False
        self._expected: list[int] | None = None
        self._warned = False
        self.real = self.padded = 0
        """Totals of the run: lengths of its batches before and after padding."""

    def start(self, expected: list[int]) -> None:
        """Begin a run.

        Args:
            expected: Lengths of the run's batches, longest first, if they are known. They are not used if the first
                batch has another length: whoever gave them may have counted characters, and the batches tokens.
        """
        self.real = self.padded = 0
        self._grouped, self._expected = bool(expected), None
        self._evidence = Evidence(in_order=True) if self._is_guess else None
        if self.chosen is None and self._seen:
            self._choose(self._seen)
        elif self.chosen is None and expected:
            self._expected = expected

    def pad(self, batch: Any) -> tuple[Any, Lengths | None]:
        """The batch, padded. For any thread, and host tensors.

        Raises:
            ValueError: If the batch lacks what `pad_spec` names, its tensors differ in length, or nobody has said what
                is padded and it cannot be seen.
        """
        length = self.spec.length_of(batch)
        expected, self._expected = self._expected, None
        if self.chosen is None and expected is not None and expected[0] == length:
            self._choose(expected)
        if self.chosen is None:
            self._seen.append(length)
            # In order of length, the first batches tell nothing of the others.
            if len(self._seen) > OBSERVED_BATCHES and not self._grouped:
                self._choose(self._seen)
        bucket = self._bucket_of(length)
        if self._evidence is not None:
            bucket = self._evidence.length_for(batch, length, bucket)
        lengths = Lengths(length, bucket)
        self.real += lengths.real
        self.padded += lengths.padded
        return self.spec.pad(batch, lengths.padded), lengths

    def cut(self, output: Any, lengths: Lengths | None) -> Any:
        """An output as it would be of the batch before padding. On any device; None is a batch that was not padded.

        Raises:
            ValueError: If the padding cannot be cut from it.
        """
        if lengths is not None and self._evidence is not None:
            self._evidence.check(output, *lengths)
        if lengths is None or lengths.real == lengths.padded:
            return output
        return self.spec.cut(output, lengths.real, lengths.padded)

    def _bucket_of(self, length: int) -> int:
        if (bucket := bucket_of(length, self.chosen or [])) is not None:
            return bucket
        if self._config.bucket_lengths == "auto":
            return -(-length // self._config.bucket_multiple) * self._config.bucket_multiple
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"A batch of length {length} is longer than the largest of `bucket_lengths`, {max(self.chosen or [0])}:"
                " it is not padded. Each such length needs another graph; add a bucket for it."
                + explained("longer-than-the-largest-bucket")
            )
        return length

    def _choose(self, lengths: list[int]) -> None:
        self.chosen = best_buckets(lengths, self._config.num_buckets, self._config.bucket_multiple)
        rank_zero_info(f"`bucket_lengths='auto'` chose {self.chosen} from {len(lengths)} batches.")


class NoBuckets(Buckets):
    """Pads nothing."""

    pads = False

    def __init__(self) -> None:
        self.chosen = self._evidence = None
        self.real = self.padded = 0

    def start(self, expected: list[int]) -> None:
        """Begin a run."""

    def pad(self, batch: Any) -> tuple[Any, Lengths | None]:
        """The batch itself."""
        return batch, None

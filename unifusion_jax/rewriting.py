"""Target prompts for a prepared data set: the encoder writes, once and for all, what it would decode in training (VERIFI).

Shard k of n takes the k-th n-th of the records; host h of m does the shards h, h + m, ... Hosts share the output folder and
nothing else; the one that finishes last describes the whole.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import tqdm

from unifusion_jax.data import shards
from unifusion_jax.data.images import ImageError, to_pixels
from unifusion_jax.data.jobs import JobError, Outcome, ShardedOutput, Skipped
from unifusion_jax.data.records import Record
from unifusion_jax.encoders import Encoder
from unifusion_jax.prompt import Prompt
from unifusion_jax.verifi import SYSTEM_PROMPTS, prompt_of

_RECORDS_PER_SHARD = 1024
_MAX_SHARDS = 4096
# Two batches are under way: while one waits for the device, the pictures of the other are cut.
_BATCHES_UNDER_WAY = 2


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to rewrite, and how.

    Attributes:
      input: a prepared data set.
      output: the new data set's folder.
      shards: number of files; 0: one for every 1024 records, and at least one a host.
      host: number of this host, from 0.
      hosts: how many share the work.
      batch_size: prompts decoded together.
      max_new_tokens: longest description.
      max_tiles: bound of a picture's tile grid; the encoder's own when None.
      system_prompts: which of `verifi.SYSTEM_PROMPTS` the encoder is asked with.
      system_prompt: system message in their place.
      see_picture: the encoder also sees the picture that is to be drawn, in place of the reference pictures. By default it
        sees what it sees when the model is used: the user's words and reference pictures.
      replace: also rewrite records that have a description.
      temperature: 0 decodes greedily.
      top_p: as in `Encoder.rewrite`.
      seed: of the decoding, folded with each record's id.
      max_skipped_share: the job stops when more than this share of the records cannot be used.
      overwrite: replace a data set that is already in `output`.
    """

    input: str
    output: str
    shards: int = 0
    host: int = 0
    hosts: int = 1
    batch_size: int = 16
    max_new_tokens: int = 256
    max_tiles: int | None = None
    system_prompts: str = "full"
    system_prompt: str | None = None
    see_picture: bool = False
    replace: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_skipped_share: float = 0.05
    overwrite: bool = False

    def __post_init__(self):
        if not 0 <= self.host < self.hosts:
            raise JobError(f"expected 0 <= host < hosts, got host {self.host} of {self.hosts}")
        if self.overwrite and self.hosts > 1:
            raise JobError("--overwrite cannot be used with several hosts, which would remove each other's work")
        if not 0 <= self.shards <= 99_999 or self.batch_size < 1 or self.max_new_tokens < 1:
            raise JobError(
                f"expected shards in [0, 99999], batch_size and max_new_tokens >= 1, got {self.shards}, "
                f"{self.batch_size} and {self.max_new_tokens}"
            )
        if self.system_prompts not in SYSTEM_PROMPTS:
            raise JobError(f"system_prompts must be one of {list(SYSTEM_PROMPTS)}, got {self.system_prompts!r}")
        if not 0 <= self.max_skipped_share <= 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise JobError(
                "expected max_skipped_share in [0, 1], temperature >= 0 and top_p in (0, 1], got "
                f"{self.max_skipped_share}, {self.temperature} and {self.top_p}"
            )

    def options(self) -> dict[str, Any]:
        """Returns what the written descriptions depend on, besides input and encoder."""
        apart = ("input", "output", "shards", "host", "hosts", "max_skipped_share", "overwrite", "batch_size")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in apart}


def rewrite_dataset(
    settings: Settings, load_encoder: Callable[[], Encoder], *, encoder_name: str = "", progress: bool = True
) -> Outcome:
    """Runs this host's part of the job.

    Args:
      settings: what to do.
      load_encoder: gives the encoder; called when there is something to do.
      encoder_name: recorded in `dataset.json`.
      progress: show a progress bar.

    Returns:
      What was done. `outcome.stopped` tells why the job ended early, `outcome.waiting` how many shards other hosts still have.
      The same call again goes on from there.

    Raises:
      ValueError: the input is no data set, or the output folder is in use by something else.
    """
    source = shards.RecordSource(settings.input)
    job = _Job(settings, source, load_encoder, encoder_name)
    with tqdm.tqdm(total=job.entries, unit="record", desc="rewrite", disable=not progress) as bar:
        return job.run(bar)


@dataclasses.dataclass
class _Written:
    """One record as it came out of the batch: with its description, or the reason why not."""

    record: Record | None = None
    skipped: Skipped | None = None
    fact: str = ""


class _Job:
    def __init__(
        self, settings: Settings, source: shards.RecordSource, load_encoder: Callable[[], Encoder], encoder_name: str
    ):
        self.settings, self.source = settings, source
        self.load_encoder = load_encoder
        self.encoder: Encoder | None = None
        wanted = settings.shards or min(_MAX_SHARDS, max(settings.hosts, math.ceil(len(source) / _RECORDS_PER_SHARD)))
        num_shards = min(wanted, len(source))
        self.facts = {"rewritten_by": encoder_name, "rewritten_with": settings.options()}
        identity = [source.info["shards"], num_shards, self.facts]
        fingerprint = hashlib.blake2b(json.dumps(identity).encode(), digest_size=8).hexdigest()
        self.output = ShardedOutput(Path(settings.output), num_shards, fingerprint)
        self.own = range(settings.host, num_shards, settings.hosts)
        self.entries = sum(len(self._positions(shard)) for shard in self.own)
        self.outcome = Outcome(settings.input, self.entries)

    def _positions(self, shard: int) -> range:
        return self.output.entries_of(shard, len(self.source))

    def run(self, bar: tqdm.tqdm) -> Outcome:
        finished = self.output.open(overwrite=self.settings.overwrite)
        for shard in self.own:
            if shard in finished:
                self.outcome.add(finished[shard])
                bar.update(len(self._positions(shard)))
            else:
                self._write_shard(shard, bar)
            if self.outcome.stopped:
                return self.outcome
        return self._finish()

    def _finish(self) -> Outcome:
        """Describes the whole data set when every host is done."""
        finished = self.output.finished()
        self.outcome.waiting = len(self.output.paths) - len(finished)
        if self.outcome.waiting:
            return self.outcome
        whole = Outcome(self.settings.input, len(self.source))
        for state in finished.values():
            whole.add(state)
        if not whole.written:
            whole.stopped = "not one record could be used"
        self.output.finish(self.output.paths, whole, self.facts)
        return whole

    def _write_shard(self, shard: int, bar: tqdm.tqdm) -> None:
        """Writes one shard, whole or not at all."""
        positions = self._positions(shard)
        found: dict[int, _Written] = {}
        for position, written in self._rewritten(positions):
            found[position] = written
            bar.update()
            if written.skipped is not None:
                self.outcome.skipped.append(written.skipped)
                if self._too_many():
                    return
        done = [found[position] for position in positions]
        counts = collections.Counter(each.record.task for each in done if each.record is not None)
        facts = collections.Counter(each.fact for each in done if each.fact)
        with shards.ShardWriter(self.output.paths[shard]) as writer:
            for each in done:
                if each.record is not None:
                    writer.add(each.record)
        self.output.note(shard, True, counts, [each.skipped for each in done if each.skipped is not None], facts)
        self.outcome.written.update(counts)
        self.outcome.facts.update(facts)

    def _rewritten(self, positions: range) -> Iterator[tuple[int, _Written]]:
        """Yields every record of a shard with its description, in any order."""
        waiting: list[tuple[int, Record]] = []
        for position in positions:
            record = self.source[position]
            # "" stands for pictures alone; there is nothing to describe.
            if record.target == "" or (record.target is not None and not self.settings.replace):
                yield position, _Written(record, fact="kept_as_they_were")
            else:
                waiting.append((position, record))
        # Alike prompts together, so that little is padding.
        waiting.sort(key=lambda item: (item[1].task, len(item[1].images), len(item[1].prompt), item[0]))
        size = self.settings.batch_size
        batches = [waiting[start : start + size] for start in range(0, len(waiting), size)]
        if not batches:
            return
        self.encoder = self.encoder or self.load_encoder()
        yield from self._batch(batches[0])  # alone, so that it is compiled once
        pool = concurrent.futures.ThreadPoolExecutor(_BATCHES_UNDER_WAY)
        try:
            for done in pool.map(self._batch, batches[1:]):
                yield from done
        finally:
            pool.shutdown(cancel_futures=True)

    def _prompt(self, record: Record) -> Prompt:
        prompts = SYSTEM_PROMPTS[self.settings.system_prompts]
        if self.settings.see_picture:
            picture = PIL.Image.fromarray(to_pixels(record.image))
            prompt = Prompt(record.prompt, [picture], system=prompts.of("joint"))
        else:
            prompt = dataclasses.replace(prompt_of(record, prompts), target=None)
        system = self.settings.system_prompt
        return prompt if system is None else dataclasses.replace(prompt, system=system)

    def _batch(self, batch: Sequence[tuple[int, Record]]) -> list[tuple[int, _Written]]:
        """Rewrites a batch of records."""
        asked, done = [], []
        for position, record in batch:
            try:
                asked.append((position, record, self._prompt(record)))
            except ImageError as error:
                done.append((position, _Written(skipped=_skipped(record, error.reason, str(error)))))
        return done + (self._answered(asked) if asked else [])

    def _answered(self, asked: Sequence[tuple[int, Record, Prompt]]) -> list[tuple[int, _Written]]:
        """Asks the encoder; where it refuses the batch, for each record alone, to find out which it is."""
        try:
            answers = self._answers([prompt for _, _, prompt in asked], [record for _, record, _ in asked])
        except ValueError as error:
            if len(asked) > 1:
                return [written for item in asked for written in self._answered([item])]
            position, record, _ = asked[0]
            return [(position, _Written(skipped=_skipped(record, "refused", str(error))))]
        done = []
        for (position, record, _), (text, whole) in zip(asked, answers, strict=True):
            if text:
                fact = "rewritten" if whole else "cut_off_at_max_new_tokens"
                done.append((position, _Written(record.replace(target=text), fact=fact)))
            else:
                skipped = _skipped(record, "empty_description", "the encoder had nothing to say")
                done.append((position, _Written(skipped=skipped)))
        return done

    def _answers(self, prompts: Sequence[Prompt], asked: Sequence[Record]) -> list[tuple[str, bool]]:
        """Returns descriptions, and whether each ended by itself."""
        settings = self.settings
        assert self.encoder is not None
        # The last batch is filled up, since another number of rows would be compiled anew.
        missing = settings.batch_size - len(prompts)
        rewrite = self.encoder.rewrite(
            [*prompts, *[prompts[-1]] * missing],
            max_new_tokens=settings.max_new_tokens,
            max_tiles=settings.max_tiles,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=[_seed(settings.seed, record) for record in [*asked, *[asked[-1]] * missing]],
        )
        texts = [text.strip() for text in rewrite.texts]
        return list(zip(texts, rewrite.finished, strict=True))[: len(prompts)]

    def _too_many(self) -> bool:
        share = self.settings.max_skipped_share
        if len(self.outcome.skipped) <= share * self.entries:
            return False
        last = self.outcome.skipped[-1]
        self.outcome.stopped = (
            f"more than {share:.1%} of {self.entries} records cannot be used (max_skipped_share={share}), the last one "
            f"{last.file}: {last.message}"
        )
        return True


def _skipped(record: Record, reason: str, message: str) -> Skipped:
    return Skipped(reason, record.id, record.task, message)


def _seed(seed: int, record: Record) -> int:
    digest = hashlib.blake2b(f"{seed}/{record.id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1

"""What the last minutes were like: a sample a second, within a bound, and the requests that ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice, takewhile

from llambo.broker.records.archive import EndedRequest
from llambo.broker.records.measurements import Sample
from llambo.broker.records.registry import WorkerEntry
from llambo.broker.records.state import State
from llambo.mesh.wire import reports
from llambo.mesh.wire.identity import Identity

#: Ended requests in one answer, and those of a second whose first token counts for the sample.
ENDED_LISTED = 200


def take(state: State, now_ms: int) -> None:
    """Called once a second. What is a rate is that of the last moments; `ended` and `failed` are since the start.

    `first_ms` is how long half of the answers that ended since the last sample took to their first token; 0: there
    were none.
    """
    workers, samples = state.registry.workers.values(), state.measured.samples
    before = samples[-1] if samples else None
    samples.append(
        Sample(
            number=before.number + 1 if before else 1,
            at_ms=now_ms,
            tokens_per_s=round(sum(worker.last.rate for worker in workers), 1),
            running=len(state.running),
            waiting=state.queue.count,
            busy=sum(len(worker.claims) + worker.busy for worker in workers),
            slots=sum(worker.slots for worker in workers),
            ready=ready(workers),
            workers=len(workers),
            ended=state.counters.requests.ended,
            failed=state.counters.requests.failed,
            first_ms=_median(ended.first_ms for ended in _since(state, before.at_ms if before else 0)),
        )
    )


def ready(workers: Iterable[WorkerEntry]) -> int:
    return sum(worker.tokens_up and worker.state == "ready" and not worker.drain.drained for worker in workers)


def recent(state: State, argument: str, now_ms: int, who: Identity) -> reports.Recent:
    """The samples after that number, and what has ended since that one was taken, the latest last."""
    since = int(argument) if argument.isdigit() else 0
    samples = [sample for sample in state.measured.samples if sample.number > since]
    before = next((sample.at_ms for sample in reversed(state.measured.samples) if sample.number <= since), 0)
    own = list(islice((ended for ended in _since(state, before) if who.owns(ended.owner)), ENDED_LISTED))
    return reports.Recent(
        samples=[_sample(sample, now_ms) for sample in samples],
        ended=[_ended(ended, now_ms) for ended in reversed(own)],
    )


def _since(state: State, at_ms: int) -> Iterator[EndedRequest]:
    """The latest first."""
    return takewhile(lambda ended: ended.ended_at >= at_ms, reversed(state.archive.ended.values()))


def _median(values: Iterable[int]) -> int:
    known = sorted(value for value in islice(values, ENDED_LISTED) if value >= 0)
    return max(1, known[len(known) // 2]) if known else 0


def _sample(sample: Sample, now_ms: int) -> reports.SampleRow:
    fields = sample._asdict()
    return reports.SampleRow(age_ms=now_ms - fields.pop("at_ms"), **fields)


def _ended(ended: EndedRequest, now_ms: int) -> reports.EndedRow:
    end, usage = ended.end, ended.end.usage
    began = ended.story[0][0] if ended.story else ended.ended_at
    return reports.EndedRow(
        id=end.id.hex(),
        model=ended.model,
        task=ended.task,
        worker=end.worker,
        tokens=end.count,
        prompt_tokens=usage.prompt_tokens,
        moves=end.moves,
        reason=end.reason,
        error=end.error.text if end.error else "",
        queued_ms=end.queued_ms,
        first_ms=ended.first_ms,
        decode_ms=round(usage.decode_ms),
        total_ms=ended.ended_at - began,
        age_ms=now_ms - ended.ended_at,
    )

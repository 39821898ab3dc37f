"""What simulated ranks did on their virtual clocks, as a picture that Perfetto opens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from picotron.runtime.scheduler import Ran


def chrome_trace(spans: Sequence[Ran]) -> str:
    """Chrome trace JSON: one process a rank, one thread for its own time and one for each stream it uses.

    Times are microseconds of virtual time.
    """
    streams: dict[int, dict[str, int]] = {}
    for span in spans:
        own = streams.setdefault(span.rank, {"rank": 0})
        own.setdefault(span.stream, len(own))
    events: list[dict[str, Any]] = []
    for rank, own in sorted(streams.items()):
        named = {"ph": "M", "pid": rank}
        events.append({**named, "name": "process_name", "tid": 0, "args": {"name": f"rank {rank}"}})
        for stream, number in own.items():
            events.append({**named, "name": "thread_name", "tid": number, "args": {"name": stream}})
    for span in spans:
        events.append(
            {
                "ph": "X",
                "name": span.name,
                "pid": span.rank,
                "tid": streams[span.rank][span.stream],
                "ts": span.start_seconds * 1e6,
                "dur": (span.end_seconds - span.start_seconds) * 1e6,
                "args": {"place": span.place},
            }
        )
    return json.dumps({"traceEvents": events, "otherData": {"clock": "virtual"}}, separators=(",", ":"))

"""``gateway spool``: what the spool holds, and sending it without the daemon."""

from __future__ import annotations

import json
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import cyclopts
from cyclopts import Parameter

from gateway.errors import ConfigError, SpoolError

if TYPE_CHECKING:
    from gateway.config import Settings
    from gateway.router.spool.records import Record

app = cyclopts.App(name="spool", help="The spool: records that Kafka has not taken yet.")


def _settings_with_spool(path: Path, directory: Path | None = None) -> tuple[Settings, Path]:
    from gateway import config

    settings = config.load(path)
    if directory is not None:
        return settings, directory
    if settings.spool.directory is None:
        raise ConfigError([f"{path}: spool.directory: is not set"])
    return settings, Path(settings.spool.directory)


@app.command
def inspect(
    directory: Path | None = None,
    /,
    *,
    config_file: Annotated[Path | None, Parameter(name="--config")] = None,
    records: bool = False,
) -> int:
    """Say what is in a spool. Reads only; the daemon may be running. Exit status 1 when a segment is damaged.

    Parameters
    ----------
    directory
        The spool's directory.
    config_file
        The daemon's TOML file, instead of the directory.
    records
        Print every record as a line of JSON, without its payload.
    """
    if (directory is None) == (config_file is None):
        raise ConfigError(["give the spool's directory or --config"])
    if config_file is not None:
        _, directory = _settings_with_spool(config_file)
    assert directory is not None  # noqa: S101  # one of both was given
    try:
        return _inspect(directory, records=records)
    except OSError as error:
        raise SpoolError(f"{error.filename or directory}: {error.strerror}") from error


def _inspect(directory: Path, *, records: bool) -> int:
    from gateway.router.spool.segments import DAMAGED, Segment, in_use, list_segments

    segments = list_segments(directory)
    growing = segments[-1:] if in_use(directory) else []
    aside = [Segment(path) for path in sorted(directory.glob(f"*{DAMAGED}"))]
    damaged = False
    total = 0
    for segment in (*segments, *aside):
        count = value_bytes = 0
        topics: dict[str, int] = {}
        for record in segment.read():
            count += 1
            value_bytes += len(record.value)
            topics[record.topic] = topics.get(record.topic, 0) + 1
            if records:
                print(json.dumps(_shown(record, segment.path.name)))
        fault_at = None if segment in growing else segment.fault_at()
        damaged = damaged or fault_at is not None
        total += 0 if segment in aside else count
        if not records:
            shown = ", ".join(f"{topic} {number}" for topic, number in sorted(topics.items())) or "nothing"
            fault = "" if fault_at is None else f"; damaged from byte {fault_at} of {segment.size_bytes}"
            print(f"{segment.path.name}: {count} records, {value_bytes} bytes of values ({shown}){fault}")
    if not records:
        print(
            f"{directory}: {total} records to send in {len(segments)} segments, {len(aside)} damaged files kept aside"
        )
    return 1 if damaged else 0


def _shown(record: Record, segment: str) -> dict[str, Any]:
    return {
        "segment": segment,
        "topic": record.topic,
        "user_id": record.user_id,
        "company_id": record.company_id,
        "message_type": record.message_type,
        "value_bytes": len(record.value),
        "dead_letter": record.headers is not None,
        "connection_id": record.connection_id,
        "reason": record.reason,
        "uncertain": record.uncertain,
        "received_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.received_at_ms / 1000)),
    }


@app.command
def replay(
    *,
    config_file: Annotated[Path, Parameter(name="--config")],
    directory: Path | None = None,
    timeout: Annotated[float, Parameter(validator=cyclopts.validators.Number(gt=0))] = 60.0,
) -> int:
    """Send what a spool holds to Kafka, in order, and delete what Kafka has confirmed; the daemon must not be running.

    The daemon does the same when it starts. Exit status 1 when something is left.

    Parameters
    ----------
    config_file
        The daemon's TOML file.
    directory
        Another directory than the file's: a worker's (``worker-0``, ...), say.
    timeout
        Seconds to wait for Kafka.
    """
    from gateway.running import run

    settings, directory = _settings_with_spool(config_file, directory)
    sent, left = run(_replay, settings, directory, timeout)
    print(f"{directory}: {sent} records offered to Kafka, {left} segments left")
    return 1 if left else 0


async def _replay(settings: Settings, directory: Path, timeout_s: float) -> tuple[int, int]:
    """Offer everything, wait for Kafka; how many records were offered and how many segments are still there."""
    import trio

    from gateway import config
    from gateway.daemon.assemble import kafka_side
    from gateway.router.spool.segments import list_segments
    from gateway.telemetry.logging import Log
    from gateway.telemetry.metrics import Metrics

    metrics = Metrics()
    log = Log(metrics, level=settings.log.level, style="console")
    properties = config.kafka_properties(settings.kafka)
    with closing(log), kafka_side(settings, properties, metrics, log, directory=directory) as side:
        delivery, writer, replay = side.delivery, side.delivery.spool, side.replay
        assert writer is not None  # noqa: S101  # there is a directory
        assert replay is not None  # noqa: S101  # as above
        async with trio.open_nursery() as writing:
            writing.start_soon(writer.run)
            with trio.move_on_after(timeout_s):
                async with trio.open_nursery() as polling:
                    polling.start_soon(side.producer.run)
                    await replay.run()
                    polling.cancel_scope.cancel()
            await delivery.abandon()
            await writer.flush(trio.current_time() + timeout_s)
            writing.cancel_scope.cancel()
    return replay.offered, len(list_segments(directory))

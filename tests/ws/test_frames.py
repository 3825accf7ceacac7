"""The frame decoder: the same items however the bytes are split, limits before memory."""

from __future__ import annotations

import os
import struct
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.core import catalogue
from gateway.testing.rawclient import frame
from gateway.ws import frames
from gateway.ws.frames import Decoder, Failure, Item, PeerClose, Ping, Pong

LIMIT = 4096

MANY = 3 * settings().max_examples
"""How many streams are tried: three times what the profile says."""


@st.composite
def conversations(draw: st.DrawFn) -> tuple[bytes, list[Item]]:
    """A valid byte stream and what it means: fragmented messages, control frames between them, maybe a close."""
    stream = b""
    items: list[Item] = []
    for _ in range(draw(st.integers(0, 6))):
        for control in draw(st.lists(st.sampled_from([0x9, 0xA]), max_size=2)):
            payload = draw(st.binary(max_size=125))
            stream += frame(control, payload)
            items.append(Ping(payload) if control == 0x9 else Pong(payload))
        text = draw(st.booleans())
        message = draw(st.text(max_size=300)).encode() if text else draw(st.binary(max_size=600))
        cuts = sorted(draw(st.lists(st.integers(0, len(message)), max_size=4)))
        edges = [0, *cuts, len(message)]
        for index, (start, stop) in enumerate(pairwise(edges)):
            opcode = 0x0 if index else (0x1 if text else 0x2)
            part = message[start:stop]
            form = draw(st.sampled_from([None, 126, 127] if len(part) < 126 else [None, 127]))
            stream += frame(opcode, part, fin=index == len(edges) - 2, length_form=form)
            if index < len(edges) - 2 and draw(st.booleans()):
                stream += frame(0x9, b"mid")
                items.append(Ping(b"mid"))
        items.append(message.decode() if text else message)
    if draw(st.booleans()):
        stream += frame(0x8, struct.pack("!H", 1000) + b"bye") + b"ignored"
        items.append(PeerClose(1000, "bye"))
    return stream, items


@st.composite
def split(draw: st.DrawFn, stream: bytes) -> list[bytes]:
    """The stream cut at any places."""
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    edges = [0, *cuts, len(stream)]
    return [stream[start:stop] for start, stop in pairwise(edges)]


@settings(max_examples=MANY, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_split_of_the_stream_gives_the_same_items(data: st.DataObject) -> None:
    stream, expected = data.draw(conversations())
    decoder = Decoder(LIMIT, accept_text=True)
    got: list[Item] = []
    for piece in data.draw(split(stream)):
        got += decoder.receive(piece)
    assert got == expected


@settings(max_examples=MANY, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_split_of_garbage_gives_the_same_items_and_ends_with_the_failure(data: st.DataObject) -> None:
    stream = data.draw(st.binary(max_size=400))
    whole = Decoder(LIMIT).receive(stream)
    decoder = Decoder(LIMIT)
    got: list[Item] = []
    for piece in data.draw(split(stream)):
        got += decoder.receive(piece)
    assert got == whole
    assert all(not isinstance(item, Failure | PeerClose) for item in got[:-1])


def test_byte_by_byte_equals_at_once() -> None:
    stream = frame(0x2, b"one") + frame(0x2, os.urandom(300)) + frame(0x9, b"p") + frame(0x2, b"")
    decoder = Decoder(LIMIT)
    got: list[Item] = []
    for index in range(len(stream)):
        got += decoder.receive(stream[index : index + 1])
    assert got == Decoder(LIMIT).receive(stream)
    assert got[0] == b"one"
    assert got[-1] == b""


@settings(max_examples=MANY, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_frames_of_one_length_in_a_row_are_cut_where_each_ends(data: st.DataObject) -> None:
    """Each with a masking key of its own, with others between them, and the last one perhaps not all there."""
    size = data.draw(st.sampled_from([0, 1, 125, 126, 200, 1000]))
    same = st.binary(min_size=size, max_size=size)
    kinds = data.draw(st.lists(st.sampled_from("ssssspol"), max_size=30))
    stream = b""
    expected: list[Item] = []
    for kind in kinds:
        payload = data.draw(same)
        if kind == "p":
            stream += frame(0x9, b"p")
            expected.append(Ping(b"p"))
        elif kind == "o":
            stream += frame(0x2, payload + b"1")
            expected.append(payload + b"1")
        elif kind == "l":  # a longer form of the length than needed
            stream += frame(0x2, payload, length_form=127)
            expected.append(payload)
        else:
            stream += frame(0x2, payload)
            expected.append(payload)
    whole = len(stream)
    stream += frame(0x2, bytes(size))
    cut = data.draw(st.integers(whole, len(stream) - 1))
    decoder = Decoder(LIMIT)
    assert decoder.receive(stream[:cut]) == expected
    assert decoder.receive(stream[cut:]) == [bytes(size)]


def test_frames_in_a_row_end_where_the_connection_fails() -> None:
    one = frame(0x2, b"same")
    unmasked = b"\x82\x04same" + b"more"
    decoder = Decoder(LIMIT)
    *messages, failure = decoder.receive(one * 5 + unmasked + one)
    assert messages == [b"same"] * 5
    assert isinstance(failure, Failure)
    assert decoder.receive(one) == []


def test_declared_length_allocates_nothing() -> None:
    decoder = Decoder(64 * 1024 * 1024)
    tracemalloc.start()
    assert decoder.receive(struct.pack("!BBQ", 0x82, 0x80 | 127, 60 * 1024 * 1024) + b"tiny") == []
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000


def test_limit_holds_to_the_byte() -> None:
    assert Decoder(LIMIT).receive(frame(0x2, bytes(LIMIT))) == [bytes(LIMIT)]
    (failure,) = Decoder(LIMIT).receive(frame(0x2, bytes(LIMIT + 1)))
    assert isinstance(failure, Failure)
    assert failure.close is catalogue.CLOSE_TOO_BIG


def test_fragment_count_is_limited_whatever_their_size() -> None:
    decoder = Decoder(LIMIT, max_fragments=3)
    assert decoder.receive(frame(0x2, b"", fin=False) + frame(0x0, b"", fin=False) * 2) == []
    (failure,) = decoder.receive(frame(0x0, b"x"))
    assert isinstance(failure, Failure)
    assert failure.close is catalogue.CLOSE_TOO_BIG


def test_messages_before_a_failure_are_still_given() -> None:
    items = Decoder(LIMIT).receive(frame(0x2, b"good") + frame(0x3))
    assert items[0] == b"good"
    assert isinstance(items[1], Failure)
    assert items[1].close is catalogue.CLOSE_PROTOCOL_ERROR


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65535])
def test_close_codes_that_may_not_be_sent_are_a_protocol_error(code: int) -> None:
    (failure,) = Decoder(LIMIT).receive(frame(0x8, struct.pack("!H", code)))
    assert isinstance(failure, Failure)
    assert failure.close is catalogue.CLOSE_PROTOCOL_ERROR


@pytest.mark.parametrize("code", [1000, 1001, 1011, 1012, 1013, 1014, 3000, 4999])
def test_close_codes_that_may_be_sent_are_read(code: int) -> None:
    assert Decoder(LIMIT).receive(frame(0x8, struct.pack("!H", code) + b"r")) == [PeerClose(code, "r")]


@settings(deadline=None)
@given(st.binary(max_size=70_000))
def test_server_frames_are_read_back_by_another_implementation(payload: bytes) -> None:
    from websockets.frames import Frame
    from websockets.streams import StreamReader

    reader = StreamReader()
    reader.feed_data(frames.encode(frames.BINARY, payload))
    parser = Frame.parse(reader.read_exact, mask=False)
    try:
        next(parser)
    except StopIteration as done:
        parsed = done.value
    assert (parsed.opcode, bytes(parsed.data), parsed.fin) == (0x2, payload, True)


def test_close_reason_is_cut_on_a_character() -> None:
    encoded = frames.encode_close(1002, "é" * 100)
    assert encoded[1] <= 125
    encoded[4:].decode()

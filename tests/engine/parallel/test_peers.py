"""Processes that meet, agree and end; here threads stand for them, without JAX."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from engine.cli import main
from engine.errors import InputError
from engine.parallel import meeting, peers, processes
from engine.parallel.launch import Launch, find_place
from engine.parallel.meeting import Place, meet
from engine.parallel.peers import Peers, ProcessGone


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def outcomes(places, seconds=20.0) -> list[Any]:
    """What `meet` returns, or its words, for each of these at once."""

    def one(place):
        try:
            return meet(place, seconds)
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(one, places))


@pytest.fixture
def three(monkeypatch):
    """Three processes that have met; none is ended where another goes."""
    monkeypatch.setattr(Peers, "_give_up", lambda self, at_once: None)
    address = free_address()
    places = [Place(i, 3, address) for i in range(3)]
    met = zip(places, outcomes(places), strict=True)
    found = [Peers(place, lines) for place, lines in met]
    yield found
    for one in found:
        one._leaving.set()
        for line in one._lines.values():
            line.close()


def at_once(calls):
    with ThreadPoolExecutor(len(calls)) as pool:
        return [x.result(30) for x in [pool.submit(call) for call in calls]]


def test_everyone_gathers_what_everyone_gives_in_order(three):
    for label in "a", "b":
        calls = [partial(x.gather, label, [label, i]) for i, x in enumerate(three)]
        assert at_once(calls) == [[[label, i] for i in range(3)]] * 3


def test_a_note_of_one_comes_to_all(three):
    three[2].note("save 3", "no space")
    at_once([partial(x.gather, "after it", 0) for x in three])
    assert [x.noted("save 3") for x in three] == ["no space"] * 3
    assert three[0].noted("save 4") is None


def test_all_leave_together(three):
    assert at_once([lambda x=x: x.leave(0, "") for x in three]) == [None] * 3


@pytest.mark.parametrize("who", [0, 2])
def test_an_error_of_one_is_known_to_all_who_wait(three, who):
    others = [x for i, x in enumerate(three) if i != who]
    three[who]._grace = -2.0  # it need not wait for them here

    def wait(one):
        with pytest.raises(ProcessGone) as caught:
            one.gather("x", 1)
        return str(caught.value), caught.value.exit_code

    calls = [partial(wait, x) for x in others]
    calls.append(partial(three[who].leave, 3, "step 7: the loss is nan"))
    said = f"process {who} of 3 has ended: step 7: the loss is nan", 3
    assert at_once(calls)[:2] == [said, said]


@pytest.mark.parametrize("who", [0, 1])
def test_a_process_that_is_gone_is_named_to_all_who_wait(three, who, monkeypatch):
    others = [x for i, x in enumerate(three) if i != who]
    monkeypatch.setattr(three[who], "_tell_all", lambda message: None)  # it is dead
    for line in three[who]._lines.values():
        line.connection.shutdown(socket.SHUT_RDWR)
    for one in others:
        error = one.expect_failure(20)
        assert error is not None and error.exit_code == 4
        assert str(error).startswith(f"process {who} of 3")
        assert "has gone without a word: killed, or out of memory" in str(error)


def test_silence_is_the_end_of_a_machine(monkeypatch):
    monkeypatch.setattr(Peers, "_give_up", lambda self, at_once: None)
    monkeypatch.setattr(peers, "_SILENCE", 0.2)
    here, there = socket.socketpair()
    with here, there:
        one = Peers(Place(1, 2, "host:1"), {0: meeting.Line(here)})
        error = one.expect_failure(20)
        one._leaving.set()
    assert error is not None
    assert "process 0 of 2 (host:1) has sent no sign of life for 0.2 s" in str(error)


def test_who_does_not_come_is_named_with_the_address():
    address = free_address()
    one, two = outcomes([Place(0, 4, address), Place(2, 4, address)], 0.5)
    assert one == two
    assert one.startswith(
        f"processes 1, 3 of 4 did not come to process 0 at {address} within 0.5 s; "
    )


def test_a_coordinator_that_does_not_answer_is_named():
    address = free_address()
    (words,) = outcomes([Place(1, 2, address)], 0.3)
    assert words.startswith(
        f"process 1 of 2: the coordinator (process 0) at {address} did not answer "
        "within 0.3 s ("
    )


@pytest.mark.parametrize(
    ("hello", "said"),
    [
        ((1, 3), "process 1 was started as one of 3, and process 0 as one of 2"),
        ((0, 2), "two processes were started as number 0"),
    ],
)
def test_who_comes_as_somebody_else_ends_all(hello, said):
    address = free_address()
    caller = Place(hello[0], hello[1], address)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(outcomes, [Place(0, 2, address)])
        second = pool.submit(meeting._call, caller, 20.0)
        with pytest.raises(InputError, match=said):
            second.result(30)
        assert said in first.result(30)[0]


def test_a_stranger_at_the_port_is_left_out():
    address = free_address()
    host, port = address.split(":")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(outcomes, [Place(0, 2, address)])
        for greeting in b"GET / HTTP/1.1\r\n\r\n", json.dumps([1]).encode() + b"\n":
            while True:
                try:
                    stranger = socket.create_connection((host, int(port)), 5)
                    break
                except ConnectionRefusedError:
                    continue
            with stranger:
                stranger.sendall(greeting)
        lines = meet(Place(1, 2, address), 20.0)
        (found,) = first.result(30)
    assert list(found) == [1] and list(lines) == [0]
    for line in (*found.values(), *lines.values()):
        line.close()


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (words,) = outcomes([Place(0, 2, address)], 1)
    assert words.startswith(f"process 0 of 2 cannot listen at {address}: ")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (Place(0, 2, "node1"), "--coordinator: 'node1' is no HOST:PORT"),
        (Place(0, 2, "node1:99999"), "--coordinator: 'node1:99999' is no HOST:PORT"),
        (Place(2, 2, "node1:80"), "--process-id 2: 2 processes are numbered from 0 to"),
    ],
)
def test_a_place_that_there_is_not(place, said):
    with pytest.raises(InputError, match=said):
        meet(place, 1)


SLURM = {
    "SLURM_JOB_ID": "4096",
    "SLURM_STEP_NODELIST": "node[007-009]",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("environment", "launch", "found"),
    [
        ({}, Launch(), None),
        (SLURM, Launch(), (Place(2, 3, "node007:61440"), [0])),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, Launch(), None),
        (SLURM, Launch(num_processes=1), None),
        ({}, Launch("a:1", 4, 3), (Place(3, 4, "a:1"), None)),
        (
            {"JAX_COORDINATOR_ADDRESS": "b:2"},
            Launch(num_processes=2, process_id=0),
            (Place(0, 2, "b:2"), None),
        ),
    ],
)
def test_where_a_process_is(monkeypatch, environment, launch, found):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_place(launch) == found


def test_options_that_say_too_little(monkeypatch):
    with pytest.raises(InputError, match="give all of --coordinator HOST:PORT"):
        find_place(Launch(num_processes=2))
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
    with pytest.raises(InputError, match="does not say where this process is"):
        find_place(Launch())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--num-processes two", "--num-processes: 'two' is no whole number"),
        ("--num-processes 0", "--num-processes: 0 is too few; give 1 or more"),
        ("--process-id -1", "--process-id: '-1' is no whole number"),
        ("--num-processes 2 --process-id 0", "does not say where this process is"),
        (
            "--num-processes 2 --process-id 2 --coordinator a:1",
            "--process-id 2: 2 processes are numbered from 0 to 1",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "precompute", "evaluate", "run"])
def test_options_of_the_command_line(tmp_path, capsys, command, words, said):
    path = tmp_path / "run.yaml"
    path.write_text(
        "config:\n  model: {name_or_path: m}\n"
        "  mixture: {informs: [{data_files: a.jsonl}]}\nactions: [train]\n"
    )
    argv = [command, str(path), *words.split(), "trainer.beta=0.2"]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err


def test_of_one_process_everything_is_as_without_it():
    assert processes.count() == 1 and processes.is_first()
    assert processes.gather(3) == [3]
    assert processes.first_decides(lambda: 4) == 4
    processes.check_same({"a": 1}, "differ")
    with processes.first_goes_first(), processes.joined(Launch()):
        pass

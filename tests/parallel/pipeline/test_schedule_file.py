"""Schedules from CSV files: what is read back is what was written, and each fault is named by its cell."""

import os
import random
import re
from pathlib import Path

import pytest

from parallel.pipeline import SCHEDULES, ScheduleError, build_schedule, compute_order, to_csv
from parallel.pipeline.schedule_file import fingerprint

GOOD = """
0F0,0F1,,,0I0,0W0,0I1,0W1
,1F0,1I0,1F1,1I1,,1W0,1W1
"""
MESSAGES = """
0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1
1RECV_F0,1RECV_F1,1F0,1B0,1SEND_B0,1F1,1B1,1SEND_B1
"""


def read(folder: Path, text: str, p: int = 2, m: int = 2, v: int | None = None) -> str:
    """The schedule of a file of this text, printed."""
    file = folder / "schedule.csv"
    file.write_text(text.lstrip("\n"))
    return str(build_schedule(str(file), p, m, v))


@pytest.mark.parametrize("name", SCHEDULES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    """With the messages and without, for the placement of every schedule."""
    schedule = build_schedule(name, 3, 4)
    for text in (to_csv(schedule), to_csv(compute_order(name, 3, 4))):
        assert read(tmp_path, text, 3, 4) == str(schedule)
    again = build_schedule(str(tmp_path / "schedule.csv"), 3, 4, len(schedule.stages_of(0)))
    assert again.stage_to_rank == schedule.stage_to_rank


def test_recomputes_stay_where_they_are_written(tmp_path: Path) -> None:
    written = read(tmp_path, GOOD.replace(",0I0", "0R0,0I0").replace("1F0,1I0", "1F0,1R0,1I0"))
    assert written.splitlines()[0] == "rank 0: 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0R0 0I0 0RECV_B1 0W0 0I1 0W1"
    assert "1F0 1R0 1I0" in written


def test_as_spreadsheets_write_it(tmp_path: Path) -> None:
    plain = read(tmp_path, GOOD)
    assert plain.splitlines()[0] == "rank 0: 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0I0 0RECV_B1 0W0 0I1 0W1"
    for written in (
        GOOD.replace(",", ";"),
        GOOD.replace(",", "\t"),
        GOOD.replace("\n", "\r\n").lstrip(),
        GOOD.replace("\n", "\r").lstrip(),
        GOOD.replace(",", ", \t"),
        GOOD.replace(",", "\t ") + " \n\n",
        "\ufeff" + GOOD.lstrip(),
        re.sub(r"(\w+)", r'"\1"', GOOD),
        re.sub(r"(\w+)", r" \1 ", GOOD) + " \n\t\n",
    ):
        assert read(tmp_path, written) == plain


def test_stages_may_be_uneven(tmp_path: Path) -> None:
    assert "rank 0: 0F0 1F0 1SEND_F0" in read(tmp_path, "0F0,1F0,1B0,0B0\n2F0,2B0\n", 2, 1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0I0", "0X0", "rank 0, cell 5: '0X0' is no action"),
        ("0I0", "0I\u0660", "rank 0, cell 5: '0I\u0660' is no action"),  # a zero, in Arabic
        ("0I0", "\uff10I0", "rank 0, cell 5: '\uff10I0' is no action"),  # a wide one
        ("0I0", "0I", "rank 0, cell 5: action 0I: BACKWARD_INPUT needs a micro-batch"),
        ("0I0", "0I" + "0" * 9999, "rank 0, cell 5: '0I0{38}...' is no action"),
        ("0I0,0W0", "", "rank 0, cell 1: 0F0: stage 0, micro-batch 0 has no backward, though others have"),
        (",0W0", ",", "rank 0, cell 1: 0F0: stage 0, micro-batch 0 has backward actions I: give one B, or one I and"),
        ("1I0,", ",", "rank 1, cell 2: 1F0: stage 1, micro-batch 0 has backward actions W: give one B, or one I"),
        ("1F0", "", "rank 1, cell 3: 1I0: stage 1, micro-batch 0 has no forward"),
        ("1F1,1I1,,1W0,1W1", ",,,1W0", "rank 1: stage 1, micro-batch 1 has no forward"),
        ("1W0", "1W1", "rank 1, cell 8: 1W1 stands more than once"),
        ("1W1", "0W1", "rank 1, cell 8: 0W1 does not belong here: rank 0 holds stage 0"),
        ("1W1", "1W2", "rank 1, cell 8: 1W2 is of the last of 3 micro-batches in this file, but .* this run has 2"),
        ("0I0,0W0", "0W0,0I0", "rank 0, cell 5: 0W0 stands before 0I0, which it needs"),
        ("1F0,1I0", "1I0,1F0", "rank 1, cell 2: 1I0 stands before 1F0, which it needs"),
        (
            GOOD,
            "0F0,,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n",
            r"rank 0, cell 3: .* \(deadlock\): .*0B0 \(rank 0\) before 0F1 \(rank 0\)",
        ),
        ("1F0", "1UNSHARD,1F0", "rank 1, cell 2: 1UNSHARD: give F, R, B, I, W and their messages alone"),
        ("1I0", "1I0,1R0", "rank 1, cell 3: 1I0 stands before 1R0, which it needs"),
        ("0F0", "0R0,0F0", "rank 0, cell 1: 0R0 stands before 0F0, which it needs"),
        ("1I0", ";,1X0", "rank 1, cell 3: ';' is no action"),  # one separator in a file
        (",,,0I0", ",\t,, 0X0\t", "rank 0, cell 5: '0X0' is no action"),
        (",,,0I0", ",\x0b,,0I0", r"rank 0, cell 3: '\\x0b' is no action"),
        *((",,,0I0", f",,,{mark}0I0", "rank 0, cell 5: '.*0I0' is no action") for mark in "\x0b\x0c\x1c\x85\u2028"),
        ("1W1", "1W1,3F0,3B0", "stage 2 is in no row, but stage 3 is"),
        ("1W1", f"1W1,{10**30}F0", f"stage 2 is in no row, but stage {10**30} is"),
        (GOOD, "0F0,1F0,1B0,0B0,0F1,1F1,1B1,0B1\n,,\n", "rank 1 holds no stage: each row needs one"),
        (GOOD, GOOD.lstrip() + ",,\n", "has 3 rows, one per rank"),
        (GOOD, "\n  \n", "has 0 rows, one per rank"),
        (GOOD, "0F0,0F1\n1F0,1F1\n", r"no stage has a backward \(B, or I and W\), and training needs them"),
        (GOOD, "0F0,1F0,1B0,0B0,0F1,1F1,1B1,0B1\n,,\n2F0,2B0\n", "has 3 rows, one per rank, but .* is 2"),
        (GOOD, "", "has 0 rows, one per rank, but parallel.pipeline_parallel_size is 2: they must be equal"),
        (GOOD, "0F0,1F0,1B0,0B0\n0F1,1F1,1B1,0B1\n", "rank 1 holds no stage: each row needs one"),
        (GOOD, MESSAGES.replace("1RECV_F0,1RECV_F1", "1RECV_F1,1RECV_F0"), "rank 0, cell 2: ranks 0 and 1 post their"),
        (GOOD, MESSAGES.replace("1RECV_F1", ""), "rank 0, cell 4: 0SEND_F1 has no matching receive 1RECV_F1 on rank 1"),
        (
            GOOD,
            MESSAGES.replace("0SEND_F1", "").replace("1RECV_F1", ""),
            "rank 1, cell 6: 1F1 has its input on another",
        ),
    ],
)
def test_one_fault(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in GOOD
    with pytest.raises(ScheduleError, match=message) as caught:
        read(tmp_path, GOOD.replace(old, new, 1))
    assert str(caught.value).startswith("parallel.schedule ") and len(str(caught.value)) < 600


def test_file_that_does_not_fit_the_run(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"has 2 rows, one per rank, but parallel.pipeline_parallel_size is 4"):
        read(tmp_path, GOOD, p=4)
    for m in (1, 3):
        with pytest.raises(ScheduleError, match=f"cell .: .F1 is of the last of 2 micro-batches .* run has {m}:"):
            read(tmp_path, GOOD, m=m)
    with pytest.raises(
        ScheduleError, match=r"rank 0 holds 1 of the stages, but parallel.virtual_stages is 2: leave it out"
    ):
        read(tmp_path, GOOD, v=2)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "bytes.csv").write_bytes(b"0F0\xff")
    with (tmp_path / "large.csv").open("wb") as file:
        file.truncate(2**30)
    for name, why in {
        "none.csv": "cannot be read: No such file or directory",
        "folder.csv": "is a folder or device",
        "pipe.csv": "is a folder or device",
        "bytes.csv": "is no text in UTF-8",
        "large.csv": "has 1073741824 bytes: schedules have at most 67108864",
        "nul\0.csv": "cannot be read: embedded null byte",
    }.items():
        for read_it in (lambda path: build_schedule(path, 2, 2), fingerprint):
            with pytest.raises(ScheduleError, match=f"parallel.schedule .*{name}.* {why}"):
                read_it(str(tmp_path / name))


def test_whatever_is_written_is_run_or_refused(tmp_path: Path) -> None:
    """Cells taken out, put in, exchanged, changed: a schedule that holds, or one error that begins as all do."""
    draw = random.Random(0)
    refused = 0
    for text in [to_csv(build_schedule(name, 2, 3)) for name in ("1f1b", "zb_v")] + [
        to_csv(compute_order("zb_v", 2, 3))
    ]:
        for _ in range(100):
            rows = [line.split(",") for line in text.splitlines()]
            row, other = draw.choice(rows), draw.choice(rows)
            i, j = draw.randrange(len(row)), draw.randrange(len(other))
            match draw.randrange(4):
                case 0:
                    row[i] = draw.choice(["", ",", "0", "0F", "1W9", "-1F0", "9F0", "\0", "0F0 0F1", row[i] * 2])
                case 1:
                    row[i], other[j] = other[j], row[i]
                case 2:
                    row.insert(i, other[j])
                case 3:
                    row.insert(i, row.pop(draw.randrange(len(row))))
            try:
                assert read(tmp_path, "\n".join(map(",".join, rows)), 2, 3)
            except ScheduleError as error:
                assert str(error).startswith("parallel.schedule "), error
                refused += 1
    assert 200 < refused < 300


def test_fingerprint_is_of_what_a_file_says(tmp_path: Path) -> None:
    one, other = tmp_path / "one.csv", tmp_path / "other.csv"
    one.write_text(GOOD)
    other.write_text(GOOD)
    assert fingerprint(str(one)) == fingerprint(str(other)) != fingerprint("1f1b") == "1f1b"
    other.write_text(GOOD.replace("0W0", "0W1"))
    assert fingerprint(str(one)) != fingerprint(str(other))

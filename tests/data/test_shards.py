"""Tar files and their indexes: what is read, what is refused, and what has changed since."""

from __future__ import annotations

import gzip
import io
import os
import resource
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data.errors import UnreadableImageError
from data.shards import catalogue
from data.shards.catalogue import open_shards
from data.shards.index import hash_of, make_index, map_index
from data.shards.members import ShardError
from data.shards.names import expand
from data.shards.tar import TarFormat, TarStore
from tests.data.tars import picture, sample, shards, write_tar


def opened(path: object, label: str | None = None, folder: str | None = None) -> TarStore:
    form = TarFormat(label=label)
    return TarStore(open_shards(str(path), "data.path", form=form, folder=folder, workers=1), form)


def test_patterns_are_expanded_as_by_a_shell(tmp_path: Path) -> None:
    assert expand("{08..11}.tar", "data.path") == ["08.tar", "09.tar", "10.tar", "11.tar"]
    assert expand("{8..11}{a,b}.tar", "data.path")[:3] == ["8a.tar", "8b.tar", "9a.tar"]
    assert expand("{10..0..5}.tar", "data.path") == ["10.tar", "5.tar", "0.tar"]
    assert expand("{x}.tar", "data.path") == ["{x}.tar"]
    for name in ("b.tar", "a.tar"):
        (tmp_path / name).touch()
    assert [Path(name).name for name in expand(f"{tmp_path}/*.tar", "data.path")] == ["a.tar", "b.tar"]
    for wrong, message in (
        ("{a,a}.tar", "names a.tar twice"),
        (f"{tmp_path}/x*.tar", "matches no file"),
        ("{0..99999999}.tar", "no more than"),
        ("{1..5..0}.tar", "step of 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            expand(wrong, "data.path")
    assert expand("~nobody-there/x.tar", "data.path") == ["~nobody-there/x.tar"]  # which is missing


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_any_length_and_order_of_parts(tmp_path: Path, form: int) -> None:
    folder = "a" * 90 if form == tarfile.USTAR_FORMAT else "long.dir/" + "ä" * 160
    given = [
        (f"{folder}/{number}", {"cls": b"1", "seg.png": b"no image", "JPG": picture(number, "jpg"), "txt": b" said\n"})
        for number in range(3)
    ]
    noise = [("__meta__/x", {"png": b"1"}), ("a/.hidden", {"png": b"2"})]
    write_tar(tmp_path / "x.tar", [*noise, *given, ("lonely", {"cls": b"7"})], form)
    with tarfile.open(tmp_path / "x.tar", "a", format=form) as archive:  # and what is no file
        folder_member = tarfile.TarInfo("b")
        folder_member.type = tarfile.DIRTYPE
        archive.addfile(folder_member)
    store = opened(tmp_path / "x.tar")
    assert len(store.catalogue) == 3 and store.catalogue.words == () and store.catalogue.largest == 1
    assert store.catalogue.left_out == {"samples without an image": 1}
    for place, (key, parts) in zip(store.places(np.arange(3)), given, strict=True):
        assert store.part(place, "image") == parts["JPG"] and store.part(place, "text") == parts["txt"]
        assert store.part(place, "json") is None and store.name(place).endswith(f"x.tar, sample {key}")


def cut(path: Path, at: int) -> None:
    path.write_bytes(path.read_bytes()[:at])


def join(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)


def compress(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes()))


def corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1024 + 512 * (len(picture(0)) > 512) : 1100] = b"\7" * 76
    path.write_bytes(content)


def append(path: Path, name: str, kind: bytes, content: bytes = b"") -> None:
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = (
            kind,
            "part/00000.png" if kind == tarfile.SYMTYPE else "",
            len(content),
        )
        archive.addfile(member, io.BytesIO(content))


REFUSED = {
    "compressed": (compress, "is compressed.*gunzip it"),
    "cut in a file": (lambda path: cut(path, 600), "damaged or cut short .*copy it anew"),
    "cut between files": (lambda path: cut(path, 1024), "is cut short at byte 1024"),
    "cut in a header": (lambda path: cut(path, 1100), "is cut short at byte 1024"),
    "empty": (lambda path: cut(path, 0), "no tar file, damaged or cut short"),
    "damaged": (corrupt, "is damaged at byte 1024"),
    "joined": (join, "goes on after its end .*tar -A"),
    "links": (lambda path: append(path, "z.png", tarfile.SYMTYPE), "z.png is a link: .*-h --hard-dereference"),
    "sparse": (lambda path: append(path, "z.png", tarfile.GNUTYPE_SPARSE), "z.png is stored with holes: .*--sparse"),
    "twice": (lambda path: append(path, "part/00001.png", tarfile.REGTYPE, b"x"), "has part/00001.png twice"),
    "apart": (lambda path: append(path, "part/00000.cls", tarfile.REGTYPE, b"1"), "00000 do not follow each other"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, case: str) -> None:
    damage, message = REFUSED[case]
    path = write_tar(tmp_path / "x.tar", [sample(0), sample(1)])
    damage(path)
    with pytest.raises(ShardError, match=f"x.tar.*{message}" if case not in ("links", "sparse") else message):
        opened(path)
    assert [file.name for file in tmp_path.iterdir()] == ["x.tar"]  # nothing half made


def test_shards_that_have_changed_are_named(tmp_path: Path) -> None:
    pattern = shards(tmp_path)
    store = opened(pattern)
    assert store.catalogue.made == 3 and "3 indexed now" in store.catalogue.describe()
    assert opened(pattern).catalogue.made == 0
    first, second, third = (tmp_path / f"{number:02d}.tar" for number in range(3))
    kept = second.read_bytes()

    os.utime(second, ns=(1, 1))  # as a copy has it: other times, the same bytes
    assert opened(pattern).catalogue.hashes.tolist() == store.catalogue.hashes.tolist()
    changed = bytearray(kept)
    changed[600] ^= 1
    second.write_bytes(changed)
    with pytest.raises(ValueError, match=r"1 shards have changed.*01\.tar \(other bytes.*index --again"):
        opened(pattern)
    second.write_bytes(kept[:-512])
    third.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"2 shards .*01\.tar \(\d+ bytes, \d+ when it was indexed\), .*02\.tar"):
        opened(pattern)
    second.write_bytes(kept)
    third.unlink()
    with pytest.raises(ValueError, match=r"1 of 3 shards are missing .*02\.tar"):
        opened(pattern)
    index = Path(f"{first}.index")
    index.write_bytes(index.read_bytes()[:-1])  # as a crash of the file system might leave it: made anew
    assert opened(first).catalogue.made == 1
    index.write_bytes(index.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ShardError, match=r"00\.tar\.index is damaged: remove it"):
        map_index(str(index))


def test_shards_without_an_image_are_counted_and_refused_only_if_all_are(tmp_path: Path) -> None:
    empty = write_tar(tmp_path / "00.tar", [("a", {"txt": b"x"})])
    with pytest.raises(ValueError, match=r"00\.tar has no image \(\.png .* of 1 shards none has one"):
        opened(empty)
    write_tar(tmp_path / "01.tar", [sample(0, cls=1), sample(1, cls=2)])
    write_tar(tmp_path / "02.tar", [])
    store = opened(tmp_path / "*.tar")
    assert store.catalogue.ends.tolist() == [0, 2, 2] and store.catalogue.largest == 2
    assert "1 samples without an image, 2 shards without an image" in store.catalogue.describe()
    assert store.part(store.places(np.array([1]))[0], "image") == picture(1) and store.all_words().tolist() == [1, 2]


def test_hosts_that_share_indexes_look_at_their_copies_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, hashed = write_tar(tmp_path / "x.tar", [sample(0)]), list[str]()
    opened(path, folder=str(tmp_path / "i"))
    monkeypatch.setattr(catalogue, "hash_of", lambda tar: hashed.append(tar) or hash_of(tar))
    for time in (1, 2, 1, 2):  # host by host, and again
        os.utime(path, ns=(time, time))
        opened(path, folder=str(tmp_path / "i"))
    assert len(hashed) == 2
    path.write_bytes(path.read_bytes().replace(b"part/", b"trap/"))  # other bytes at a time that is known
    open_shards(str(path), "data.path", form=TarFormat(), folder=str(tmp_path / "i"), workers=1, again=True)
    write_tar(path, [sample(0)])
    os.utime(path, ns=(2, 2))
    with pytest.raises(ValueError, match=r"x\.tar \(other bytes"):
        opened(path, folder=str(tmp_path / "i"))


def test_an_index_that_is_mapped_again_is_the_one_of_before(tmp_path: Path) -> None:
    store = opened(shards(tmp_path, sizes=(3, 3)))
    store.index = lambda shard: store._map(shard)  # as if each were evicted at once
    place = store.places(np.array([4]))[0]
    assert store.name(place).endswith("01.tar, sample part/00004")
    index = tmp_path / "01.tar.index"
    kept = index.read_bytes()
    write_tar(tmp_path / "01.tar", [sample(7), sample(8), sample(9)])
    make_index(str(tmp_path / "01.tar"), str(index), TarFormat())
    with pytest.raises(UnreadableImageError, match=r"01\.tar\.index is damaged|was made anew, of other bytes"):
        store.part(place, "image")
    with pytest.raises(UnreadableImageError, match=r"was made anew, of other bytes, since this run began"):
        TarStore(store.catalogue, TarFormat()).index(1)
    index.write_bytes(kept[:-1])
    with pytest.raises(UnreadableImageError, match=r"01\.tar\.index is damaged"):
        store.part(place, "image")


def test_many_shards_need_few_open_files(tmp_path: Path) -> None:
    """100 of them, with room for 100 more files than are open."""
    catalogue, limits = opened(shards(tmp_path, sizes=[1] * 100)).catalogue, resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 100, limits[1]))
    try:
        store = TarStore(catalogue, TarFormat())
        for number, place in enumerate(store.places(np.arange(100))):
            assert store.part(place, "image") == picture(number)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_indexes_may_lie_elsewhere_and_are_made_by_several_processes(tmp_path: Path) -> None:
    pattern = shards(tmp_path / "a")
    beside = opened(pattern).catalogue
    for index in (tmp_path / "a").glob("*.index"):
        index.unlink()
    (tmp_path / "a").chmod(0o555)
    try:
        found = open_shards(pattern, "data.path", form=TarFormat(), folder=str(tmp_path / "b"), workers=2)
        if os.getuid():
            with pytest.raises(ShardError, match=r"cannot be written .*data\.index_dir"):
                opened(pattern)
    finally:
        (tmp_path / "a").chmod(0o755)
    assert found.hashes.tolist() == beside.hashes.tolist() and found.ends.tolist() == [7, 12, 21]
    assert len(list((tmp_path / "b").iterdir())) == 3
    cut(tmp_path / "a" / "00.tar", 600)
    with pytest.raises(ShardError, match=r"cannot be written \(Not a directory\): .*data\.index_dir"):
        opened(tmp_path / "a" / "00.tar", folder=f"{tmp_path}/a/01.tar/b")  # before anything is read


def test_a_shard_that_is_written_to_is_not_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "x.tar", [sample(0)])
    monkeypatch.setattr("data.shards.index._hash", lambda opened: os.utime(path, ns=(1, 1)))
    with pytest.raises(ShardError, match=r"x\.tar has changed while it was indexed"):
        opened(path)
    with pytest.raises(ShardError, match=r"cannot be read \(Is a directory\)"):
        hash_of(str(tmp_path))

"""The places where files are cut and bits are flipped, and the disks that are too small."""

from pathlib import Path

import pytest

from tests.damage import bit_flips, complaint, cut_offsets, flipped
from tests.encoding.small_disk import SmallDisk, least_pages, names_path_and_space, sizes_below


@pytest.mark.parametrize("size", [1, 40, 511, 512, 513, 900, 913, 50_000])
def test_a_file_is_cut_everywhere_near_its_ends_and_at_many_places_between(size: int) -> None:
    offsets = cut_offsets(size, "name", 400)
    assert len(offsets) == len(set(offsets)) == min(size, 400 + 512)
    assert set(range(min(size, 256))) | set(range(max(size - 256, 0), size)) <= set(offsets) <= set(range(size))
    assert offsets == cut_offsets(size, "name", 400)


def test_bits_are_flipped_one_at_a_time() -> None:
    assert len(set(bit_flips(200, "name", 1_000))) == 1_000
    assert sorted(bit_flips(2, "name", 1_000)) == [(byte, bit) for byte in range(2) for bit in range(8)]
    assert flipped(b"\x00\xff", (1, 7)) == b"\x00\x7f"
    assert flipped(flipped(b"ab", (0, 3)), (0, 3)) == b"ab"


def test_a_damaged_file_is_whole_again_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"good")
    seen: list[bytes] = []
    assert complaint(path, b"bad", lambda: seen.append(path.read_bytes())) == ""
    with pytest.raises(ZeroDivisionError):
        complaint(path, b"bad", lambda: seen.append(path.read_bytes()[: 1 // 0]))
    assert (seen, path.read_bytes()) == ([b"bad"], b"good")


@pytest.mark.parametrize(("least", "count"), [(2, 20), (12, 20), (12, 6), (217, 20), (217, 6), (5_000, 20)])
def test_sizes_end_one_page_short(least: int, count: int) -> None:
    sizes = sizes_below(least, count)
    assert len(sizes) == min(count, least - 1)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, least - 1)
    assert least_pages(lambda pages: pages >= least, 5_000) == least


def test_a_message_about_a_full_disk_has_path_and_space() -> None:
    said = "needs 4,096 bytes, 0 are free: make room"
    assert names_path_and_space(f"/disk/output/x: {said}", Path("/disk"))
    assert names_path_and_space("/disk/x: it needs about 60 bytes per document, 12 bytes are free", Path("/disk"))
    assert not names_path_and_space(f"/other/x: {said}", Path("/disk"))
    assert not names_path_and_space("/disk/x: needs more space, 0 are free", Path("/disk"))


def test_where_no_disk_can_be_mounted_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert SmallDisk(tmp_path).why_not.startswith("a tmpfs cannot be mounted here: [Errno 2]")
    (tmp_path / "mount").write_text("#!/bin/sh\necho 'mount: permission denied' >&2\nexit 1\n")
    (tmp_path / "mount").chmod(0o755)
    assert SmallDisk(tmp_path).why_not == "a tmpfs cannot be mounted here: mount: permission denied"

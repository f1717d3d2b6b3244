import pytest

from spaces import cache


def test_a_key_holds_all_parts_and_their_borders() -> None:
    assert cache.key("a", "b") != cache.key("ab")
    assert cache.key("abc") == "ba7816bf8f01cfea", "the digits of SHA-256 of 'abc' in FIPS 180-4"


@pytest.mark.parametrize("content", [b"whole", "whole", lambda file: file.write_bytes(b"whole")])
def test_a_file_is_written_with_the_folders_above_it(content, tmp_path) -> None:
    file = tmp_path / "a" / "b.json"
    cache.write_atomically(file, content)
    cache.write_atomically(file, content)
    assert file.read_bytes() == b"whole"
    assert list(file.parent.iterdir()) == [file]


def test_what_was_there_stays_where_writing_fails(tmp_path) -> None:
    def fail(file) -> None:
        file.write_bytes(b"to")
        raise OSError("the disk is full")

    file = tmp_path / "kept"
    file.write_bytes(b"earlier")
    with pytest.raises(OSError, match="full"):
        cache.write_atomically(file, fail)
    assert file.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [file]

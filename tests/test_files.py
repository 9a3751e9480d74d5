import pytest
from pydantic import BaseModel

from atp_utils.support import files


class Row(BaseModel):
    name: str
    count: int


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"a.txt was not written: No space left"), files.replacing(tmp_path / "a.txt"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_jsonl_round_trip(tmp_path):
    rows = [Row(name="é", count=1), Row(name='"', count=2)]
    files.write_jsonl(tmp_path / "a.jsonl", rows)
    assert files.read_jsonl(tmp_path / "a.jsonl", Row) == rows


@pytest.mark.parametrize("line", ["{", '{"name": "b"}', '{"name": "b", "count": "many"}', "[]"])
def test_a_bad_jsonl_line_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"name": "a", "count": 1}}\n\n{line}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: "):
        files.read_jsonl(path, Row)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl: no such file; run notebooks/01"):
        files.read_jsonl(tmp_path / "a.jsonl", Row)
    with pytest.raises(FileNotFoundError, match=r"a\.yaml: no such file"):
        files.read_yaml(tmp_path / "a.yaml", list[Row])


def test_bad_yaml_is_named_by_line_or_field(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("- name: a\n  count: [1\n")
    with pytest.raises(ValueError, match=r"a\.yaml: not valid YAML: .*line 3"):
        files.read_yaml(path, list[Row])
    path.write_text("- name: a\n  count: 1\n- name: b\n")
    with pytest.raises(ValueError, match=r"a\.yaml: 1\.count: Field required"):
        files.read_yaml(path, list[Row])


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a"),
        ("x:\n  - {b: 1, 'b': 1}\n", 2, "b"),
        ("x: &x\n  c: 1\n  d: 1\n  c: 1\ny: *x\n", 4, "c"),
    ],
)
def test_a_key_stands_once(tmp_path, text, line, key):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"a\.yaml: not valid YAML: key '{key}' twice .*line {line}, "):
        files.read_yaml(path, dict)


def test_a_key_may_stand_again_elsewhere_and_win_over_a_merged_one(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: &a {a: 1, b: 2}\nb: {<<: *a, b: 3}\nc: {<<: *a, b: 4}\n")
    assert files.read_yaml(path, dict) == {"a": {"a": 1, "b": 2}, "b": {"a": 1, "b": 3}, "c": {"a": 1, "b": 4}}


def test_a_file_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"a: \xe9\n")
    with pytest.raises(ValueError, match=r"a\.yaml: not valid YAML: "):
        files.read_yaml(path, dict)

"""Reads damaged files, as many as its argument says: each gives rows, or one DataError that names the file.

A process of its own, so that a crash below Python is its exit status, and a hang ends with a traceback.

    python tests/rollout/damaged_files.py 10000
"""

import faulthandler
import gzip
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rollout.config import DataConfig
from rollout.data import DataError, read_demonstrations

TEXTS = [{"prompt": f"say cat {i}: ", "response": f"the cät sat {i}"} for i in range(12)]
CHATS = [
    {"prompt": [{"role": "user", "content": row["prompt"]}], "response": row["response"]} for row in TEXTS
]
Damage = Callable[[bytes], bytes]


class Words:
    specials = ("<|end|>",)

    def render(self, prompt: str) -> str:
        return prompt

    def check_lengths(self, texts: list[str]) -> list[str | None]:
        return [None] * len(texts)


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    pq.write_table(pa.Table.from_pylist(rows), sink := io.BytesIO(), row_group_size=5, **options)
    return sink.getvalue()


def arrow(rows: list[dict[str, Any]], writer: Any, compression: str | None = None) -> bytes:
    table = pa.Table.from_pylist(rows)
    with writer(
        sink := io.BytesIO(), table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)
    ) as out:
        out.write_table(table, max_chunksize=5)
    return sink.getvalue()


FILES = {
    f"{kind}-{name}": content
    for kind, rows in {"text": TEXTS, "chat": CHATS}.items()
    for name, content in {
        "lines.jsonl": lines(rows),
        "lines.jsonl.gz": gzip.compress(lines(rows)),
        "plain.parquet": parquet(rows, compression="none", use_dictionary=False),
        "small.parquet": parquet(rows, compression="zstd"),
        "stream.arrow": arrow(rows, pa.ipc.new_stream),
        "file.arrow": arrow(rows, pa.ipc.new_file),
        "lz4.arrow": arrow(rows, pa.ipc.new_stream, "lz4"),
    }.items()
}
FILES["saved/state.json"] = b'{"_data_files": [{"filename": "data.jsonl"}], "_indices_data_files": null}'
FILES["several/dataset_dict.json"] = b'{"splits": ["train", "test"]}'


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    """A change of some bytes: flipped bits, a lost end or middle, other bytes there, another encoding."""
    where = draw(st.floats(0, 1))
    kind = draw(st.sampled_from(["bit", "bit", "cut", "lose", "put", "over", "code"]))
    bit, count = draw(st.integers(0, 7)), draw(st.integers(1, 64))
    other = draw(
        st.sampled_from([b"[" * 2000, b'{"a":' * 1200, b"\0" * 8, b"\xff" * 8, b"9" * 5000, b"\n", b'"'])
    )
    code = draw(st.sampled_from(["utf-16", "utf-16-be", "utf-8-sig", "latin-1"]))

    def damage(content: bytes) -> bytes:
        at = int(where * max(0, len(content) - 1))
        if kind == "bit" and content:
            return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
        if kind == "code":
            return content.decode(errors="ignore").encode(code, errors="replace")
        new = {"cut": b"", "lose": content[at + count :], "put": other + content[at:]}
        return content[:at] + new.get(kind, other + content[at + len(other) :])

    return damage


def read(path: Path, **options: Any) -> None:
    try:
        table, report = read_demonstrations(path, DataConfig(**options), Words())
    except DataError as error:
        said = str(error)
        if str(path) not in said or "\n" in said:
            raise AssertionError(f"no sentence that names the file: {said}") from error
        return
    table.validate(full=True)
    assert table.num_rows == report.kept > 0
    assert all(text.strip() for text in table["response"].to_pylist())


def main(cases: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("saved/data.jsonl", "several/train/data.jsonl", "several/test/data.jsonl"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(lines(TEXTS))

        @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(
            st.sampled_from(sorted(FILES)),
            st.lists(damages(), min_size=1, max_size=3),
            st.sampled_from(["stop", "skip"]),
            st.sampled_from(["text", "chat"]),
        )
        def every_file_gives_rows_or_one_sentence(
            name: str, done: list[Damage], on_error: str, prompt_format: str
        ) -> None:
            faulthandler.dump_traceback_later(30, exit=True)
            content = FILES[name]
            for damage in done:
                content = damage(content)
            (folder / name).write_bytes(content)
            whole = (folder / name).parent if "/" in name else folder / name
            read(whole, on_error=on_error, prompt_format=prompt_format)

        every_file_gives_rows_or_one_sentence()


if __name__ == "__main__":
    faulthandler.enable()
    main(int(sys.argv[1]))
